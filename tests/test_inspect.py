"""inspect_experts.py: what is counted, the numbers made of the counts, the pictures, and the command line.

Most tests write a routing down by hand: for each image the experts of its patches, row by row.
"""

import csv
import io
import json
import math
import os
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from PIL import Image
from torch.testing import assert_close

import inspect_experts
from eval import MEAN, STD, Shapes, TensorImages, build_model, draw_shapes, eval_loader
from inspect_experts import (FIGURES, LayerCounts, Panel, count_routing, crosstab, cumulative, cut_out, inspect,
                             known_factors, make_files, mutual_information, overlay, palette, png, sheet, similarity, svg,
                             tint, top_classes)
from moe import Routing

CPU = torch.device("cpu")


def routing(choices, num_experts, probs=None):
    """The Routing of a batch from nested lists: image -> token -> expert, or a tuple of k experts."""
    experts = torch.tensor(choices)
    experts = experts.flatten(0, 1) if experts.dim() == 3 else experts.flatten().unsqueeze(1)  # (T, K)
    if probs is None:
        probs = torch.full((len(experts), num_experts), 1 / num_experts)
    return Routing(probs.log(), probs, experts, probs.gather(1, experts), torch.ones_like(experts) > 0, torch.zeros(()))


def counted(choices, num_experts, grid, labels=None, num_classes=2, probs=None, batch=None, **options):
    """The LayerCounts of one hand-made layer, fed `batch` images at a time (None: all at once)."""
    labels = torch.tensor(labels or [0] * len(choices))
    layer = LayerCounts(num_experts, grid, {"class": (labels, num_classes)}, **options)
    batch, tokens = batch or len(choices), len(choices[0])
    for i in range(0, len(choices), batch):
        part = None if probs is None else probs[i * tokens:(i + batch) * tokens]
        layer.add(routing(choices[i:i + batch], num_experts, part))
    return layer


# ---------------------------------------------------------------- statistics


@pytest.mark.statistics
def test_crosstab_by_hand():
    """Each pair (row, column) is counted in its cell, and a row of -1 in none."""
    rows, columns = torch.tensor([[0, 1], [1, -1]]), torch.tensor([[2, 0], [0, 2]])
    assert crosstab(rows, columns, 2, 3).tolist() == [[0, 0, 1], [2, 0, 0]]


@pytest.mark.statistics
@pytest.mark.parametrize("counts, bits, normalized", [
    ([[3, 0], [0, 3]], 1.0, 1.0),  # the row decides the column: one bit of one
    ([[1, 2], [2, 4]], 0.0, 0.0),  # the second row is twice the first: no news
    # p = 1/2 0 / 1/4 1/4: H(row) = 1, H(column) = H(3/4, 1/4) = 2 - 3/4 log2 3 = 0.811278, H(both) = 1.5;
    # I = 1 + 0.811278 - 1.5 = 0.311278, and over the smaller entropy 0.311278 / 0.811278 = 0.383689
    ([[2, 0], [1, 1]], 0.311278, 0.383689),
    ([[5, 3]], 0.0, 0.0),  # one row: nothing to know
    ([[0, 0], [0, 0]], 0.0, 0.0),
    ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], 2.0, 1.0)])
def test_mutual_information_by_hand(counts, bits, normalized):
    """Mutual information is in bits, and 1 when normalised if one side decides the other."""
    assert_close(mutual_information(torch.tensor(counts)), (bits, normalized), atol=1e-6, rtol=0)


@pytest.mark.statistics
def test_similarity_by_hand():
    """Experts are similar as far as they get equally many patches of the same images (paper, section 5.6)."""
    # Patches of three images per expert: (2, 2, 0), (4, 0, 0), (1, 0, 3).
    # S_01: both appear in the first, 2 + 2 - 0 = 4; one or both in all: 4 + 4 + 1 = 9.
    # S_02: both in the third, 1 + 3 - 2 = 2; one or both in all: 2 + 4 + 4 = 10.  S_12: never both: 0.
    layer = counted([[0, 1, 0, 1], [0, 0, 0, 0], [2, 0, 2, 2]], 4, (0, 2, 2))
    assert_close(layer.summary("ab")["similarity"],
                 [[1.0, 4 / 9, 2 / 10, 0.0], [4 / 9, 1.0, 0.0, 0.0], [2 / 10, 0.0, 1.0, 0.0], [0.0] * 4])  # 3: never chosen


@pytest.mark.statistics
def test_similarity_is_the_papers_formula():
    """2 min(c_i, c_j) over c_i + c_j, summed, is the paper's formula with its absolute difference and its two conditions."""
    c = torch.randint(0, 4, (20, 5))  # patches per image and expert
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            both = sum(a + b - abs(a - b) for a, b in c[:, [i, j]].tolist() if a > 0 and b > 0)
            expected[i, j] = both / sum(a + b for a, b in c[:, [i, j]].tolist() if a > 0 or b > 0)
    assert_close(similarity(torch.minimum(c.unsqueeze(2), c.unsqueeze(1)).sum(0), c.sum(0)), expected)


@pytest.mark.statistics
def test_cumulative_distribution_by_hand():
    """Of the images that use an expert: which share sends it at most 1, 2, 3, 4 patches; None if no image does."""
    # Expert 0 gets 1, 3, 1 and 0 patches: of three images two send at most 1 or 2, all at most 3. Expert 1 gets 3, 1, 3, 4.
    layer = counted([[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]], 3, (0, 2, 2))
    assert_close(cumulative(layer.histogram)[:2], [[2 / 3, 2 / 3, 1.0, 1.0], [1 / 4, 1 / 4, 3 / 4, 1.0]])
    assert cumulative(layer.histogram)[2] is None


@pytest.mark.statistics
def test_experts_per_image_by_hand():
    """The mean number of different experts among an image's patches: here 1, 2 and 4."""
    layer = counted([[3, 3, 3, 3], [0, 1, 1, 0], [0, 1, 2, 3]], 4, (0, 2, 2))
    assert layer.summary("ab")["experts_per_image"] == (1 + 2 + 4) / 3


@pytest.mark.statistics
def test_load_by_hand():
    """Three quarters and one quarter of the patches: standard deviation 1/4 around a mean of 1/2, so that CV = 0.5."""
    summary = counted([[0, 0, 1, 0]], 2, (0, 2, 2)).summary("ab")
    assert summary["share"] == [0.75, 0.25] and summary["coefficient_of_variation"] == 0.5


@pytest.mark.statistics
def test_spatial_map_by_hand():
    """A map says for which share of the images a position chooses the expert, rows and columns as in the image."""
    layer = counted([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]], 2, (0, 2, 3))
    assert layer.summary("ab")["spatial"] == [[[1, 0.5, 0], [0, 0, 0]], [[0, 0.5, 1], [1, 1, 1]]]


@pytest.mark.statistics
def test_router_entropy_by_hand():
    """Entropies of 1 bit (two experts alike), 2 bits (four alike), 0 and 0 (certain) have a mean of 0.75 bits."""
    probs = torch.tensor([[0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0, 0, 0, 1]])
    assert_close(counted([[0, 0, 0, 3]], 4, (0, 2, 2), probs=probs).summary("ab")["router_entropy_bits"], 0.75)


@pytest.mark.statistics
def test_top_classes_by_hand():
    """Per expert the classes with the largest shares of its tokens, without those that have none."""
    table = torch.tensor([[1, 0], [3, 0], [0, 0]])  # tokens of three classes for two experts
    assert top_classes(table, ["cat", "dog", "emu"]) == [[["dog", 0.75], ["cat", 0.25]], []]
    assert top_classes(table, ["cat", "dog", "emu"], count=1) == [[["dog", 0.75]], []]


@pytest.mark.statistics
def test_the_class_token_is_counted_apart():
    """The first token of a ViT's image goes into class_token_share only, whatever its probabilities."""
    probs = torch.tensor([[0.5, 0.5, 0], [1, 0, 0], [1, 0, 0]] * 2)  # the class token alone has an entropy
    summary = counted([[2, 0, 0], [1, 0, 0]], 3, (1, 1, 2), probs=probs).summary("ab")
    assert summary["class_token_share"] == [0, 0.5, 0.5]
    assert summary["share"] == [1, 0, 0] and summary["experts_per_image"] == 1 and summary["router_entropy_bits"] == 0
    assert summary["spatial"] == [[[1, 1]], [[0, 0]], [[0, 0]]]
    assert counted([[0, 0]], 2, (0, 1, 2)).summary("ab")["class_token_share"] is None, "a ConvNeXt has none"


@pytest.mark.statistics
@pytest.mark.parametrize("all_choices, share, experts_per_image", [
    (False, [1.0, 0.0, 0.0], 1), (True, [0.5, 0.25, 0.25], 3)])
def test_first_choices_or_all(all_choices, share, experts_per_image):
    """With k = 2 a patch counts for its first expert or, on demand, for both."""
    summary = counted([[(0, 1), (0, 2)]], 3, (0, 1, 2), all_choices=all_choices).summary("ab")
    assert summary["share"] == share and summary["experts_per_image"] == experts_per_image


@pytest.mark.statistics
def test_information_on_classes():
    """Experts that follow the class tell all about it; experts that follow the position tell nothing."""
    by_class = counted([[0, 0], [1, 1], [0, 0], [1, 1]], 2, (0, 1, 2), [0, 1, 0, 1]).summary("ab")["information"]
    assert by_class["class"]["normalized"] == 1 and by_class["position"]["normalized"] == 0
    by_place = counted([[0, 1]] * 4, 2, (0, 1, 2), [0, 1, 0, 1]).summary("ab")["information"]
    assert by_place["class"]["normalized"] == 0 and by_place["position"]["normalized"] == 1


@pytest.mark.statistics
def test_chance_is_found_with_the_factors_of_other_images():
    """With as many classes as images the class decides the expert, and would by chance: that information means nothing."""
    choices = [[e, e] for e in (0, 1, 0, 1, 1, 0)]
    many = counted(choices, 2, (0, 1, 2), [0, 1, 2, 3, 4, 5], 6).summary("abcdef")["information"]["class"]
    assert_close((many["normalized"], many["normalized_by_chance"]), (1.0, 1.0))
    two = counted(choices * 50, 2, (0, 1, 2), [0, 1, 0, 1, 1, 0] * 50).summary("ab")["information"]["class"]
    assert two["normalized"] == 1 and two["normalized_by_chance"] < 0.05, "300 images: the chance is small"


@pytest.mark.statistics
def test_the_surest_patches_by_hand():
    """Per expert the patches with the highest probability among those whose first choice it is, one per image."""
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.95, 0.05], [0.2, 0.8]])  # three images of two
    for batch in (1, 3):
        layer = counted([[0, 0], [1, 0], [0, 1]], 2, (0, 1, 2), probs=probs, patches=3, batch=batch)
        assert_close(layer.surest, torch.tensor([[0.95, 0.9, 0.6], [0.8, 0.7, 0.0]]))  # no third image chose expert 1
        assert layer.surest_at[0].tolist() == [[2, 0], [0, 0], [1, 1]]  # (image, patch)
        assert layer.surest_at[1, :2].tolist() == [[2, 1], [1, 0]]


@pytest.mark.statistics
@pytest.mark.parametrize("all_choices", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 11])
def test_every_number_by_plain_loops(all_choices, batch):
    """Random routing, class token, k = 2, an unused expert, a class without images: the summary is what loops find."""
    M, rows, columns, E, C = 11, 2, 3, 5, 4
    N, probs = rows * columns, torch.rand(M * (1 + rows * columns), E).softmax(1)
    choices = [[tuple(torch.randperm(E - 1)[:2].tolist()) for _ in range(1 + N)] for _ in range(M)]  # never expert E - 1
    labels = torch.randint(0, C - 1, (M,)).tolist()  # never class C - 1
    layer = counted(choices, E, (1, rows, columns), labels, C, probs, batch, all_choices=all_choices)
    summary = layer.summary("abcd")

    K = 2 if all_choices else 1
    seen = [(m, n, e) for m in range(M) for n in range(N) for e in choices[m][1 + n][:K]]  # every counted choice
    share = [sum(e == i for _, _, e in seen) / len(seen) for i in range(E)]
    std = math.sqrt(sum((s - 1 / E) ** 2 for s in share) / E)
    patches = [[sum((m, i) == (a, e) for a, _, e in seen) for i in range(E)] for m in range(M)]
    entropy = sum(-p * math.log2(p) for m in range(M) for n in range(N) for p in probs[m * (1 + N) + 1 + n].tolist())

    def information(rows_of):  # a list of (row, expert)
        def h(values):
            counts = [values.count(v) for v in set(values)]
            return -sum(c / len(values) * math.log2(c / len(values)) for c in counts)
        (a, b), both = zip(*rows_of), h(rows_of)
        return h(a) + h(b) - both, (h(a) + h(b) - both) / min(h(a), h(b))

    def with_chance(own, other):
        return dict(zip(("bits", "normalized", "normalized_by_chance"), (*information(own), information(other)[1])))

    expected = dict(
        grid=[rows, columns], share=share, coefficient_of_variation=std * E,
        class_token_share=[sum(e == i for m in range(M) for e in choices[m][0][:K]) / (M * K) for i in range(E)],
        experts_per_image=sum(c > 0 for image in patches for c in image) / M, router_entropy_bits=entropy / (M * N),
        information={
            "class": with_chance([(labels[m], e) for m, _, e in seen], [(labels[layer.shuffled[m]], e) for m, _, e in seen]),
            "position": with_chance([(n, e) for _, n, e in seen], [((n + m) % N, e) for m, n, e in seen])},
        similarity=[[sum(a[i] + a[j] - abs(a[i] - a[j]) for a in patches if a[i] and a[j])
                     / max(1, sum(a[i] + a[j] for a in patches if a[i] or a[j])) for j in range(E)] for i in range(E)],
        spatial=[[[sum((r * columns + c, i) == (n, e) for _, n, e in seen) / M for c in range(columns)] for r in range(rows)]
                 for i in range(E)],
        patches_per_image_cdf=[[sum(0 < a[i] <= most for a in patches) / sum(a[i] > 0 for a in patches)
                                for most in range(1, N + 1)] for i in range(E - 1)] + [None])
    classes = {(i, name): sum((c, i) == (labels[m], e) for m, _, e in seen) / (len(seen) * share[i])
               for i in range(E - 1) for c, name in enumerate("abcd")}
    for i, top in enumerate(summary.pop("top_classes")):
        assert_close(dict(top), {name: s for (e, name), s in classes.items() if e == i and s > 0}, atol=1e-6, rtol=0)
        assert [s for _, s in top] == sorted((s for _, s in top), reverse=True)
    assert summary["patches_per_image_cdf"].pop() is expected["patches_per_image_cdf"].pop() is None
    assert_close(summary, expected, atol=1e-6, rtol=0)


# ---------------------------------------------------------------- one pass over the data


class RedDecides(nn.Module):
    """A stub: each pixel is a patch, and its red value is the expert it goes to; a second layer takes its 2x2 mean."""

    def __init__(self, side, num_experts, grids=1):
        super().__init__()
        self.grids, self.moe_blocks = [(0, side >> i, side >> i) for i in range(grids)], list(range(1, 1 + grids))
        self.num_experts = num_experts

    def forward(self, images, return_routing):
        red = (images[:, 0] * STD[0] + MEAN[0]) * 255  # (B, S, S), undoing normalize()
        levels = [nn.functional.avg_pool2d(red, 1 << i).round().long().flatten(1) for i in range(len(self.grids))]
        return None, [routing(level.tolist(), self.num_experts) for level in levels]


def red_images(values, side=2):
    """(M, 3, side, side) uint8 with these red values, and 100 in green and blue."""
    images = torch.full((len(values), 3, side, side), 100, dtype=torch.uint8)
    images[:, 0] = torch.tensor(values, dtype=torch.uint8).view(-1, side, side)
    return images


def red_run(values, num_experts, labels, classes, side=2, grids=1, **options):
    """inspect() on such images: a Run, and its arguments."""
    args = SimpleNamespace(**dict(max_images=None, batch_size=2, workers=0, all_choices=False, examples=2, data="red",
                                  split="all") | options)
    data = TensorImages(red_images(values, side), torch.tensor(labels), classes)
    checkpoint = dict(config=dict(model="stub", num_experts=num_experts), mean=MEAN, std=STD)
    return inspect("stub.pt", RedDecides(side, num_experts, grids), checkpoint, data, args, CPU), args


@pytest.mark.statistics
def test_counting_while_the_images_pass_by():
    """Over a loader with a last, smaller batch: every image is counted once, under its own class."""
    run, _ = red_run([[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 1]], 2, [1, 0, 1], ["a", "b"])
    assert run.counts[0].images == 3
    assert run.counts[0].tables["class"].tolist() == [[0, 4], [5, 3]]  # b: 3 + 2 patches for expert 0, 1 + 2 for expert 1


@pytest.mark.statistics
def test_two_grid_sizes():
    """A ConvNeXt has fewer patches in its later stages: each layer is counted on its own grid."""
    run, _ = red_run([[0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0]], 2, [0], ["a"], side=4, grids=2)
    assert [layer["grid"] for layer in run.layers] == [[4, 4], [2, 2]]
    assert run.layers[1]["spatial"][1] == [[0, 1], [1, 0]]
    assert len(run.layers[0]["patches_per_image_cdf"][0]) == 16 and len(run.layers[1]["patches_per_image_cdf"][0]) == 4


@pytest.mark.statistics
def test_max_images_are_spread_over_the_data():
    """Folders come class by class: three of nine images are 0, 3 and 6, not the first three."""
    run, _ = red_run([[i] * 4 for i in range(9)], 9, [0] * 9, ["a"], max_images=3)
    assert run.layers[0]["share"] == [share / 3 for share in (1, 0, 0, 1, 0, 0, 1, 0, 0)]


@pytest.mark.statistics
def test_examples_show_their_own_routing():
    """An example is the image as loaded, its class, and the experts of its patches as a picture."""
    values = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1], [2, 0, 2, 0], [0, 0, 0, 0], [1, 2, 3, 3]]
    run, _ = red_run(values, 4, [0, 1] * 3, ["a", "b"], examples=2)  # the middles of the two halves: images 1 and 4
    assert [name for name, _, _ in run.examples] == ["b", "a"]
    for (_, image, maps), i in zip(run.examples, (1, 4)):
        assert torch.equal(image, red_images(values)[i]) and maps[0].flatten().tolist() == values[i]
    assert len(red_run(values[:1], 4, [0], ["a"], examples=8)[0].examples) == 1, "an image is shown once"


@pytest.mark.statistics
def test_an_image_that_cannot_be_read_is_named():
    """Numbers without an image would not be comparable: the run stops and names the file."""
    class Broken(TensorImages):
        def __getitem__(self, index):
            return self.images[index], 0, index if index == 1 else -1

    data = torch.utils.data.Subset(Broken(red_images([[0] * 4] * 3), torch.zeros(3), ["a"]), [0, 1, 2])
    layer = LayerCounts(2, (0, 2, 2), {"class": (torch.zeros(3, dtype=torch.int64), 1)})
    with pytest.raises(ValueError, match="cannot read image 1: repair or remove"):
        count_routing(RedDecides(2, 2), eval_loader(data, 2, 0, CPU), [layer], CPU, MEAN, STD)


@pytest.mark.statistics
def test_known_factors_of_shapes():
    """A patch shows the object if more than half its pixels do; shape, texture and colour count on these patches only."""
    data = Shapes(20, seed=2)
    chosen = torch.arange(20)
    factors = known_factors(data, chosen, (0, 8, 8), lambda images: images)
    assert list(factors) == ["class", "object", "shape", "texture", "colour"]
    assert [count for _, count in factors.values()] == [16, 2, 4, 4, int(data.factors["colour"].max()) + 1]
    for m in range(20):
        for n in range(64):
            r, c = n // 8 * 4, n % 8 * 4
            shown = data.masks[m, r:r + 4, c:c + 4].sum() > 8  # of 16 pixels
            assert factors["object"][0][m, n] == shown
            for name in ("shape", "texture", "colour"):
                assert factors[name][0][m, n] == (data.factors[name][m] if shown else -1)


@pytest.mark.statistics
def test_experts_that_follow_the_object_are_found():
    """Experts 0 and 1 for background and object: information 1 with `object`, none with shape, and more than by chance."""
    data = Shapes(200, seed=2)
    factors = known_factors(data, torch.arange(200), (0, 8, 8), lambda images: images)
    layer = LayerCounts(2, (0, 8, 8), factors)
    layer.add(routing(factors["object"][0].tolist(), 2))
    found = layer.summary(data.classes)["information"]
    assert_close(found["object"]["normalized"], 1.0)
    assert found["shape"]["bits"] == 0, "on the object there is one expert only"
    assert 0.2 < found["object"]["normalized_by_chance"] < 0.8, "objects are in the centre: position alone tells something"


@pytest.mark.statistics
@pytest.mark.parametrize("patch, top, left", [(0, 0, 0), (27, 6, 6), (63, 20, 20)])
def test_cut_outs_stay_inside(patch, top, left):
    """A patch of an 8x8 grid on 32 pixels with its neighbours is 12 x 12 pixels, moved inside at the border."""
    image = torch.arange(3 * 32 * 32).view(3, 32, 32)  # patch 27 is row 3, column 3: centre 14, so from 14 - 6 = 8
    top, left = (8, 8) if patch == 27 else (top, left)
    assert torch.equal(cut_out(image, patch, (0, 8, 8), size=12), image[:, top:top + 12, left:left + 12])


# ---------------------------------------------------------------- pictures


@pytest.mark.report
@pytest.mark.parametrize("num_experts", [2, 8, 9, 16, 64])
def test_every_expert_has_its_own_colour(num_experts):
    """No two experts share a colour."""
    assert len(set(palette(num_experts))) == num_experts


@pytest.mark.report
def test_a_patch_is_tinted_by_its_expert():
    """On black, the overlay is 0.6 of the expert's colour, each patch in its place."""
    picture = overlay(torch.zeros(3, 4, 4, dtype=torch.uint8), torch.tensor([[0, 1], [0, 0]]), [(100, 0, 0), (0, 0, 200)])
    red, blue = (60, 0, 0), (0, 0, 120)
    assert [picture.getpixel(xy) for xy in ((0, 0), (3, 1), (1, 2), (2, 3))] == [red, blue, red, red]


@pytest.mark.report
def test_tint_is_transparent_at_zero():
    """A heat map has one colour and the values as opacity, so it can lie on a light and on a dark page."""
    picture = tint(torch.tensor([[0.0, 1.0], [0.2, 0.0]]), (1, 2, 3))
    assert [picture.getpixel(xy) for xy in ((0, 0), (1, 0), (0, 1))] == [(1, 2, 3, 0), (1, 2, 3, 255), (1, 2, 3, 51)]


@pytest.mark.report
def test_a_panel_is_drawn_alike_in_both_ways():
    """The same marks become SVG with these coordinates, and pixels at twice these coordinates below the title."""
    panel = Panel("<title>", 30)
    panel.rect(10, 5, 20, 10, (200, 0, 0), 0.5)
    panel.line([(0, 25), (320, 25)], (0, 0, 200), 2)
    panel.text(5, 20, "a<b")
    panel.image(40, 5, 10, 10, Image.new("RGB", (2, 2), (0, 200, 0)))
    page = svg(panel)
    assert '<rect x="10.0" y="5.0" width="20.0" height="10.0" fill="rgb(200, 0, 0)" fill-opacity="0.50"/>' in page
    assert 'points="0.0,25.0 320.0,25.0"' in page
    assert "a&lt;b</text>" in page and "&lt;title&gt;" in page and "<title>" not in page
    picture = png(panel, scale=2, top=22)
    assert picture.size == (640, 2 * 52)
    half = (228, 127, 127)  # red at half strength on white: 255 - 0.5 * 55 = 227.5, 255 - 0.5 * 255 = 127.5
    assert max(abs(a - b) for a, b in zip(picture.getpixel((40, 64)), half)) <= 1
    assert picture.getpixel((300, 94)) == (0, 0, 200) and picture.getpixel((90, 64)) == (0, 200, 0)


@pytest.mark.report
def test_a_sheet_has_four_panels_to_a_row():
    """Six panels are two rows, and the row's height is that of its highest panel."""
    last = Panel("", 200)
    last.rect(0, 0, 320, 200, (0, 0, 200))
    picture = sheet([Panel("", 100)] * 5 + [last])
    assert picture.size == (40 + 4 * 680, 40 + 2 * (100 + 22) + 40 + 2 * (200 + 22) + 40)
    x, y = 40 + 680, 40 + 2 * (100 + 22) + 40 + 2 * 22  # the second of the second row, below its title
    assert picture.getpixel((x, y)) == (0, 0, 200)
    assert picture.getpixel((x - 1, y)) == picture.getpixel((x, y - 1)) == (255, 255, 255)


# ---------------------------------------------------------------- the files


class Page(HTMLParser):
    """Collects tags, attributes and text, and sees to it that what is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.open = [], [], "", []
        self.feed(text)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src")]

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag in ("svg", "figure", "div", "table", "text", "p", "h2", "h3"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_data(self, data):
        self.text += data


EXTREMES = {  # values, E, labels, classes, options
    "two classes": ([[0, 1, 1, 1], [0, 0, 0, 1]], 2, [0, 1], ["a", "b"], {}),
    "one image": ([[0, 1, 2, 3]], 8, [0], ["a"], {}),
    "64 experts": ([[0, 11, 22, 33], [63, 62, 61, 60]], 64, [0, 1], ["a", "b"], {}),
    "1000 classes": ([[0, 1, 2, 3]] * 10, 4, list(range(10)), [f"class number {i}" for i in range(1000)], {}),
    "two grids": ([[0, 0, 1, 1] * 4] * 2, 3, [0, 0], ["a", "b"], dict(side=4, grids=2)),
    "no examples": ([[0, 1, 1, 1]], 2, [0], ["a"], dict(examples=0))}


@pytest.mark.report
@pytest.mark.parametrize("case", EXTREMES)
def test_the_report_has_a_picture_per_layer(case):
    """From 2 to 64 experts and to 1,000 classes: well-formed, all figures there, and every figure also a PNG that opens."""
    *values, options = EXTREMES[case]
    run, args = red_run(*values, **options)
    files = make_files([run], args)
    page, layers, examples = Page(files["report.html"].decode()), len(run.layers), len(run.examples)
    # per layer: load, map, classes, similarity, patches, curves; per example one; two legends; depth; factors and by chance
    assert page.open == [] and page.tags.count("svg") == 6 * layers + examples + 2 + 1 + 2
    assert set(files) == {"summary.json", "routing.csv", "report.html"} | {f"{figure[0]}.png" for figure in FIGURES}
    for figure in FIGURES:
        Image.open(io.BytesIO(files[f"{figure[0]}.png"])).verify()
    json.loads(files["summary.json"], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.report
def test_names_are_only_text():
    """Class names and paths with markup in them are shown and not obeyed; the page loads nothing from elsewhere."""
    name = "<script>alert(1)</script>"
    run, args = red_run([[0, 1, 1, 1]], 2, [0], [name, 'a" onload="x'])
    page = Page(make_files([run._replace(name=name)], args)["report.html"].decode())
    assert "script" not in page.tags and name in page.text
    assert all(link.startswith("data:image/") for link in page.links) and page.links


@pytest.mark.report
def test_routing_csv_by_hand():
    """One row per layer, class and expert; a class without images has 0 tokens and a share of 0; commas are quoted."""
    run, args = red_run([[0, 0, 0, 1], [1, 1, 1, 1]], 2, [0, 2], ["a,b", "empty", "c"])
    rows = list(csv.reader(io.StringIO(make_files([run], args)["routing.csv"].decode())))
    assert rows == [["layer", "block", "class", "expert", "tokens", "share"],
                    ["0", "1", "a,b", "0", "3", "0.750000"], ["0", "1", "a,b", "1", "1", "0.250000"],
                    ["0", "1", "empty", "0", "0", "0.000000"], ["0", "1", "empty", "1", "0", "0.000000"],
                    ["0", "1", "c", "0", "0", "0.000000"], ["0", "1", "c", "1", "4", "1.000000"]]


@pytest.mark.report
def test_two_checkpoints_side_by_side():
    """With --compare the page, the PNG files and summary.json hold both; each routing has a CSV of its own."""
    (run, args), (other, _) = (red_run([values], 2, [0], ["a"]) for values in ([0, 1, 1, 1], [0, 0, 0, 1]))
    files = make_files([run, other._replace(name="other.pt")], args)
    summary = json.loads(files["summary.json"])
    assert summary["layers"][0]["share"] == [0.25, 0.75] and summary["compare"]["layers"][0]["share"] == [0.75, 0.25]
    assert files["routing.csv"] != files["routing_compare.csv"]
    alone = make_files([run], args)["report.html"].count(b"<svg")
    assert files["report.html"].count(b"<svg") == 2 * alone and b"<h3>other.pt</h3>" in files["report.html"]


# ---------------------------------------------------------------- command line


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Saves untrained checkpoints in an empty folder, which becomes the current one: name.pt from options of the model."""
    monkeypatch.chdir(tmp_path)

    def save(name, **options):
        config = dict(model="convnext_nano", num_classes=16, num_experts=4) | options
        torch.save(dict(config=config, classes=Shapes(1, 2).classes, image_size=32, crop_ratio=1.0, mean=MEAN, std=STD,
                        model=build_model(config).state_dict(), ema={}, optimizer={}, epoch=1, step=1, best=0.0, args={}),
                   name)
        return name
    return save


def run_main(monkeypatch, *argv):
    """python inspect_experts.py ARGV in this process; `shapes` has 100 pictures."""
    monkeypatch.setattr("eval.shapes_size", lambda spec, split: (100, 2))
    monkeypatch.setattr("eval.draw_shapes", lambda generator: draw_shapes(generator, n=100))
    monkeypatch.setattr(sys, "argv", ["inspect_experts.py", *argv])
    inspect_experts.main(inspect_experts.parse_args())


@pytest.mark.report
def test_one_command_writes_everything(checkpoint, monkeypatch):
    """A ViT with k = 2 beside a ConvNeXt with three grids, 40 images: all files are there and say what they are about."""
    vit = checkpoint("vit.pt", model="vit_nano", moe_layers="every2", k=2)
    conv = checkpoint("conv.pt", moe_layers="every2", k=1)
    run_main(monkeypatch, vit, "--compare", conv, "--data", "shapes", "--max-images", "40", "--all-choices",
             "--out", "deep/out")
    assert sorted(os.listdir("deep/out")) == sorted(
        ["summary.json", "routing.csv", "routing_compare.csv", "report.html"] + [f"{figure[0]}.png" for figure in FIGURES])
    summary = json.loads(Path("deep/out/summary.json").read_text())
    assert (summary["images"], summary["data"], summary["choices"], summary["checkpoint"]) == (40, "shapes", "all", "vit.pt")
    assert summary["versions"]["torch"] == torch.__version__ and summary["model"]["model"] == "vit_nano"
    assert [layer["block"] for layer in summary["layers"]] == [1, 3] and summary["layers"][0]["grid"] == [4, 4]
    assert [layer["grid"] for layer in summary["compare"]["layers"]] == [[8, 8], [4, 4], [2, 2]]
    assert set(summary["layers"][0]["information"]) == {"class", "object", "shape", "texture", "colour", "position"}


@pytest.mark.report
def test_folders_have_class_and_position_only(checkpoint, monkeypatch):
    """Nothing else is known about photographs in folders."""
    for name in ("circle-plain", "cross-dots"):
        os.makedirs(f"images/{name}")
        Image.new("RGB", (40, 36), (200, 100, 50)).save(f"images/{name}/1.png")
    run_main(monkeypatch, checkpoint("a.pt", moe_layers="last2"), "--data", "images", "--workers", "0", "--out", "out")
    summary = json.loads(Path("out/summary.json").read_text())
    assert set(summary["layers"][0]["information"]) == {"class", "position"} and summary["images"] == 2


@pytest.mark.report
def test_classes_that_the_checkpoint_does_not_know(checkpoint, monkeypatch):
    """Data of other classes is refused, with their names."""
    os.makedirs("images/zebra")
    Image.new("RGB", (32, 32)).save("images/zebra/1.png")
    with pytest.raises(ValueError, match="zebra"):
        run_main(monkeypatch, checkpoint("a.pt", moe_layers="last2"), "--data", "images", "--workers", "0", "--out", "out")


@pytest.mark.report
@pytest.mark.parametrize("argv, message", [
    (["dense.pt"], "dense.pt is a dense model, it has no experts to inspect"),
    (["sparse.pt", "--compare", "dense.pt"], "dense.pt is a dense model, it has no experts to inspect"),
    (["sparse.pt", "--max-images", "0"], "--max-images 0: expected at least 1"),
    (["sparse.pt", "--examples", "-1"], "--examples -1: expected at least 0"),
    (["sparse.pt", "--batch-size", "0"], "--batch-size 0: expected at least 1"),
    (["sparse.pt", "--out", "sparse.pt"], "--out sparse.pt cannot be a folder"),
    (["missing.pt"], "no checkpoint at missing.pt")])
def test_refusals_come_before_any_work(checkpoint, monkeypatch, argv, message):
    """What cannot be done is said in one line, before an image is looked at and before a file is written."""
    checkpoint("dense.pt"), checkpoint("sparse.pt", moe_layers="last2")
    monkeypatch.setattr(inspect_experts, "count_routing", lambda *args: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message) as error:
        run_main(monkeypatch, "--data", "shapes", "--out", "out", *argv)
    assert "\n" not in str(error.value)
    assert not os.path.exists("out") or os.listdir("out") == []


@pytest.mark.report
def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    """When the disk is full the old file stays as it was, and the message says what to do."""
    def full(source, target):
        raise OSError(28, "No space left on device")

    (tmp_path / "summary.json").write_text("old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match="No space left on device.*make room or choose another --out"):
        inspect_experts.write_files(str(tmp_path), {"summary.json": b"new"})
    assert (tmp_path / "summary.json").read_text() == "old"
