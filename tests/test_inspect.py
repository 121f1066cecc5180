"""inspect_experts.py: what is counted, the numbers made of the counts, the figures and the files.

Most tests write a routing down by hand: for each image the experts of its patches, row by row.
"""

import base64
import csv
import io
import json
import math
import os
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from PIL import Image
from torch.testing import assert_close

import inspect_experts
from checks import drawn
from eval import (DRAWN, MEAN, STD, TensorImages, build_model,
                  eval_loader, eval_transform, load_checkpoint, normalize, read_image)
from inspect_experts import (FIGURES, LayerCounts, Panel, bars, count_choices, crosstab,
                             cumulative, cut_out, draw_balance, draw_curves, draw_examples,
                             draw_mistakes, escape, file_svg, heat_map, inspect,
                             known_factors, make_files, mutual_information, overlay, palette,
                             panel_svg, picture, plot, points_of, ranking, read_log, routing_csv,
                             row_shares, short, similarity, text, tiles, tint, top_classes)
from moe import Routing

CPU = torch.device("cpu")


def routing(choices, num_experts, probs=None):
    """The Routing of a batch from nested lists: image -> token -> expert, or k experts."""
    experts = torch.tensor(choices)
    if experts.dim() == 2:
        experts = experts.unsqueeze(2)
    experts = experts.flatten(0, 1)  # (T, K)
    if probs is None:
        probs = torch.full((len(experts), num_experts), 1 / num_experts)
    kept = torch.ones_like(experts) > 0
    return Routing(probs.log(), probs, experts, probs.gather(1, experts), kept, torch.zeros(()))


def counted(choices, num_experts, grid, labels=None, num_classes=2, probs=None, batch=None,
            **options):
    """The LayerCounts of one hand-made layer, fed `batch` images at a time (None: all at once)."""
    labels = torch.tensor(labels or [0] * len(choices))
    factors = {"class": (labels, num_classes)}
    layer = LayerCounts(len(labels), num_experts, grid, factors, **options)
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
    # p = 1/2 0 / 1/4 1/4, so H(row) = 1, H(column) = H(3/4, 1/4) = 2 - 3/4 log2 3 = 0.811278 and
    # H(both) = 1.5. I = 1 + 0.811278 - 1.5 = 0.311278. Over the smaller: 0.311278 / 0.811278.
    ([[2, 0], [1, 1]], 0.311278, 0.383689),
    ([[5, 3]], 0.0, 0.0),  # one row: nothing to know
    ([[0, 0], [0, 0]], 0.0, 0.0),
    ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], 2.0, 1.0)])
def test_mutual_information_by_hand(counts, bits, normalized):
    """Mutual information is in bits, and 1 when normalized if one side decides the other."""
    found = mutual_information(torch.tensor(counts))
    assert_close(found, (bits, normalized), atol=1e-6, rtol=0)


@pytest.mark.statistics
def test_similarity_by_hand():
    """Experts are similar if they get equally many patches of the same images (section 5.6)."""
    # Patches of three images per expert: (2, 2, 0), (4, 0, 0), (1, 0, 3).
    # S_01: both appear in the first, 2 + 2 - 0 = 4. One or both appear in all: 4 + 4 + 1 = 9.
    # S_02: both appear in the third, 1 + 3 - 2 = 2. One or both in all: 2 + 4 + 4 = 10.
    # S_12: they never appear together: 0. Expert 3 is never chosen.
    layer = counted([[0, 1, 0, 1], [0, 0, 0, 0], [2, 0, 2, 2]], 4, (0, 2, 2))
    expected = [[1.0, 4 / 9, 2 / 10, 0.0], [4 / 9, 1.0, 0.0, 0.0], [2 / 10, 0.0, 1.0, 0.0],
                [0.0, 0.0, 0.0, 0.0]]
    assert_close(layer.summary("ab")["similarity"], expected)


@pytest.mark.statistics
def test_similarity_is_the_papers_formula():
    """2 min(c_i, c_j) / (c_i + c_j), summed, is the paper's formula with its two conditions."""
    c = torch.randint(0, 4, (20, 5))  # patches per image and expert
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            pairs = c[:, [i, j]].tolist()
            both = sum(a + b - abs(a - b) for a, b in pairs if a > 0 and b > 0)
            expected[i, j] = both / sum(a + b for a, b in pairs if a > 0 or b > 0)
    shared = torch.minimum(c.unsqueeze(2), c.unsqueeze(1)).sum(0)
    assert_close(similarity(shared, c.sum(0)), expected)


@pytest.mark.statistics
def test_cumulative_distribution_by_hand():
    """Of the images that use an expert: which share sends it at most 1, 2, 3, 4 patches."""
    # Expert 0 gets 1, 3, 1 and 0 patches: of three images two send at most 1 or 2, and all at
    # most 3. Expert 1 gets 3, 1, 3 and 4. No image uses expert 2.
    layer = counted([[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]], 3, (0, 2, 2))
    curves = cumulative(layer.histogram)
    assert_close(curves[:2], [[2 / 3, 2 / 3, 1.0, 1.0], [1 / 4, 1 / 4, 3 / 4, 1.0]])
    assert curves[2] is None


@pytest.mark.statistics
def test_experts_per_image_by_hand():
    """The mean number of different experts among an image's patches: here 1, 2 and 4."""
    layer = counted([[3, 3, 3, 3], [0, 1, 1, 0], [0, 1, 2, 3]], 4, (0, 2, 2))
    assert layer.summary("ab")["experts_per_image"] == (1 + 2 + 4) / 3


@pytest.mark.statistics
def test_load_by_hand():
    """Loads of 3/4 and 1/4 have a standard deviation of 1/4 around a mean of 1/2: CV = 0.5."""
    summary = counted([[0, 0, 1, 0]], 2, (0, 2, 2)).summary("ab")
    assert summary["share"] == [0.75, 0.25] and summary["coefficient_of_variation"] == 0.5


@pytest.mark.statistics
def test_spatial_map_by_hand():
    """A map says for which share of the images a position chooses the expert, as in the image."""
    layer = counted([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]], 2, (0, 2, 3))
    assert layer.summary("ab")["spatial"] == [[[1, 0.5, 0], [0, 0, 0]], [[0, 0.5, 1], [1, 1, 1]]]


@pytest.mark.statistics
def test_router_entropy_by_hand():
    """Entropies of 1 bit (two experts alike), 2 bits (four alike), 0 and 0 have a mean of 0.75."""
    probs = torch.tensor([[0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0, 0, 0, 1]])
    summary = counted([[0, 0, 0, 3]], 4, (0, 2, 2), probs=probs).summary("ab")
    assert_close(summary["router_entropy_bits"], 0.75)


@pytest.mark.statistics
def test_top_classes_by_hand():
    """Per expert the classes with the largest shares of its tokens, without empty ones."""
    table = torch.tensor([[1, 0], [3, 0], [0, 0]])  # tokens of three classes for two experts
    names = ["cat", "dog", "emu"]
    assert top_classes(table, names) == [[["dog", 0.75], ["cat", 0.25]], []]
    assert top_classes(table, names, count=1) == [[["dog", 0.75]], []]


@pytest.mark.statistics
def test_row_shares_by_hand():
    """The shares of a class sum to 1 over the experts, and a class without patches has none."""
    assert row_shares(torch.tensor([[1, 3], [0, 0]])).tolist() == [[0.25, 0.75], [0, 0]]


@pytest.mark.statistics
def test_the_class_token_is_counted_apart():
    """The first token of a ViT's image goes into class_token_share only."""
    # The class token alone has an entropy.
    probs = torch.tensor([[0.5, 0.5, 0], [1, 0, 0], [1, 0, 0]] * 2)
    summary = counted([[2, 0, 0], [1, 0, 0]], 3, (1, 1, 2), probs=probs).summary("ab")
    assert summary["class_token_share"] == [0, 0.5, 0.5]
    assert summary["share"] == [1, 0, 0]
    assert summary["experts_per_image"] == 1 and summary["router_entropy_bits"] == 0
    assert summary["spatial"] == [[[1, 1]], [[0, 0]], [[0, 0]]]


@pytest.mark.statistics
def test_without_a_class_token_it_has_no_share():
    """A ConvNeXt has no class token: the share is None."""
    assert counted([[0, 0]], 2, (0, 1, 2)).summary("ab")["class_token_share"] is None


@pytest.mark.statistics
@pytest.mark.parametrize("all_choices, share, experts_per_image", [
    (False, [1.0, 0.0, 0.0], 1), (True, [0.5, 0.25, 0.25], 3)])
def test_first_choices_or_all(all_choices, share, experts_per_image):
    """With k = 2 a patch counts for its first expert or, on demand, for both."""
    layer = counted([[(0, 1), (0, 2)]], 3, (0, 1, 2), all_choices=all_choices)
    summary = layer.summary("ab")
    assert summary["share"] == share and summary["experts_per_image"] == experts_per_image


@pytest.mark.statistics
@pytest.mark.parametrize("choices, of_class, of_position", [
    ([[0, 0], [1, 1], [0, 0], [1, 1]], 1, 0), ([[0, 1]] * 4, 0, 1)])
def test_information_by_hand(choices, of_class, of_position):
    """Experts that follow the class tell all about it, and nothing about the position."""
    layer = counted(choices, 2, (0, 1, 2), [0, 1, 0, 1])
    found = layer.summary("ab")["information"]
    assert found["class"]["normalized"] == of_class
    assert found["position"]["normalized"] == of_position


@pytest.mark.statistics
def test_chance_is_found_with_the_factors_of_other_images():
    """With as many classes as images the class decides the expert, and would so by chance."""
    choices = [[e, e] for e in (0, 1, 0, 1, 1, 0)]
    many = counted(choices, 2, (0, 1, 2), [0, 1, 2, 3, 4, 5], 6).summary("abcdef")
    found = many["information"]["class"]
    assert_close((found["normalized"], found["normalized_by_chance"]), (1.0, 1.0))


@pytest.mark.statistics
def test_chance_is_small_with_many_images():
    """With 300 images of two classes, information by chance is below 0.05."""
    labels = [0, 1, 0, 1, 1, 0] * 50
    two = counted([[e, e] for e in labels], 2, (0, 1, 2), labels).summary("ab")
    found = two["information"]["class"]
    assert found["normalized"] == 1 and found["normalized_by_chance"] < 0.05


@pytest.mark.statistics
@pytest.mark.parametrize("batch", [1, 3])
def test_the_surest_patches_by_hand(batch):
    """Per expert the patches of highest probability that chose it first, one per image."""
    # Three images of two patches, so that place 5 is patch 1 of image 2.
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.95, 0.05], [0.2, 0.8]])
    layer = counted([[0, 0], [1, 0], [0, 1]], 2, (0, 1, 2), probs=probs, keep=3, batch=batch)
    # Image 0 chose expert 0 twice, and 0.9 is the surer one. Only two images chose expert 1.
    assert_close(layer.surest, torch.tensor([[0.95, 0.9, 0.6], [0.8, 0.7, 0.0]]))
    assert layer.surest_at[0].tolist() == [4, 0, 3]
    assert layer.surest_at[1, :2].tolist() == [5, 2]
    # The third place of expert 1 is empty: it has two patches to show, expert 0 has three.
    images = [(torch.zeros(3, 32, 64, dtype=torch.uint8), 0, None)] * 3
    of_0, of_1 = inspect_experts.surest_patches(images, torch.arange(3), layer)
    assert of_0.shape[2] * 2 == of_1.shape[2] * 3


@pytest.mark.statistics
@pytest.mark.parametrize("all_choices", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 11])
def test_every_number_by_plain_loops(all_choices, batch):
    """Random routing, class token, k = 2, an unused expert: the summary is what loops find."""
    M, rows, columns, E, C = 11, 2, 3, 5, 4
    N = rows * columns
    probs = torch.rand(M * (1 + N), E).softmax(1)
    choices = []  # never expert E - 1
    for _ in range(M):
        choices.append([torch.randperm(E - 1)[:2].tolist() for _ in range(1 + N)])
    labels = torch.randint(0, C - 1, (M,)).tolist()  # never class C - 1
    layer = counted(choices, E, (1, rows, columns), labels, C, probs, batch,
                    all_choices=all_choices)
    summary = layer.summary("abcd")

    K = 2 if all_choices else 1
    seen = []  # every counted choice
    for m in range(M):
        for n in range(N):
            seen += [(m, n, e) for e in choices[m][1 + n][:K]]
    patches = torch.zeros(M, E)
    for m, _, e in seen:
        patches[m, e] += 1
    patches = patches.tolist()
    chosen = [e for _, _, e in seen]
    share = [chosen.count(i) / len(chosen) for i in range(E)]
    std = math.sqrt(sum((s - 1 / E) ** 2 for s in share) / E)

    entropy = 0
    for m in range(M):
        for n in range(N):
            entropy += sum(-p * math.log2(p) for p in probs[m * (1 + N) + 1 + n].tolist())

    def h(values):
        counts = [values.count(v) for v in set(values)]
        return -sum(c / len(values) * math.log2(c / len(values)) for c in counts)

    def information(pairs, pairs_by_chance):  # lists of (level, expert)
        found = []
        for some in (pairs, pairs_by_chance):
            a, b = zip(*some)
            bits = h(a) + h(b) - h(some)
            found += [bits, bits / min(h(a), h(b))]
        return dict(bits=found[0], normalized=found[1], normalized_by_chance=found[3])

    expected = dict(grid=[rows, columns], share=share, coefficient_of_variation=std * E)
    tokens = []
    for m in range(M):
        tokens += choices[m][0][:K]
    expected["class_token_share"] = [tokens.count(i) / (M * K) for i in range(E)]
    expected["experts_per_image"] = sum(E - image.count(0) for image in patches) / M
    expected["router_entropy_bits"] = entropy / (M * N)
    expected["information"] = {
        "class": information([(labels[m], e) for m, _, e in seen],
                             [(labels[layer.shuffled[m]], e) for m, _, e in seen]),
        "position": information([(n, e) for _, n, e in seen],
                                [((n + m) % N, e) for m, n, e in seen])}
    alike = torch.zeros(E, E, dtype=torch.float64)
    for i in range(E):
        for j in range(E):
            pairs = [(image[i], image[j]) for image in patches]
            both = sum(a + b - abs(a - b) for a, b in pairs if a and b)
            alike[i, j] = both / max(1, sum(a + b for a, b in pairs if a or b))
    expected["similarity"] = alike.tolist()
    maps = torch.zeros(E, rows, columns, dtype=torch.float64)
    for _, n, e in seen:
        maps[e, n // columns, n % columns] += 1 / M
    expected["spatial"] = maps.tolist()
    curves = []
    for i in range(E - 1):
        used = [image[i] for image in patches if image[i]]
        curve = []
        for most in range(1, N + 1):
            curve.append(sum(c <= most for c in used) / len(used))
        curves.append(curve)

    tops, cdf = summary.pop("top_classes"), summary.pop("patches_per_image_cdf")
    for i in range(E - 1):
        mine = [labels[m] for m, _, e in seen if e == i]
        classes = {"abcd"[c]: mine.count(c) / len(mine) for c in set(mine)}
        assert_close(dict(tops[i]), classes, atol=1e-6, rtol=0)
        assert [s for _, s in tops[i]] == sorted(classes.values(), reverse=True)
    assert tops[E - 1] == [] and cdf[E - 1] is None
    assert_close(cdf[:-1], curves, atol=1e-6, rtol=0)
    assert_close(summary, expected, atol=1e-6, rtol=0)


# ---------------------------------------------------------------- one pass over the images


class RedDecides(nn.Module):
    """A stub: each pixel is a patch, and its red value is the expert that it goes to.

    A second layer takes the mean of 2 x 2 pixels.
    """

    def __init__(self, side, num_experts, num_classes, grids=1):
        super().__init__()
        self.num_classes = num_classes
        self.grids = [(0, side >> i, side >> i) for i in range(grids)]
        self.moe_blocks = list(range(1, 1 + grids))
        self.num_experts = num_experts

    def forward(self, images, return_routing):
        red = (images[:, 0] * STD[0] + MEAN[0]) * 255  # (B, S, S), undoing normalize()
        routings = []
        for i in range(len(self.grids)):
            level = nn.functional.avg_pool2d(red, 1 << i).round().long().flatten(1)
            routings.append(routing(level.tolist(), self.num_experts))
        return self.logits(red), routings

    def logits(self, red):
        """The first pixel decides the class: logits 3 for it, and 0 for the others."""
        first = red[:, 0, 0].round().long() % self.num_classes
        return 3.0 * nn.functional.one_hot(first, self.num_classes)


def red_images(values, side=2):
    """(M, 3, side, side) uint8 with these red values, and 100 in green and blue."""
    images = torch.full((len(values), 3, side, side), 100, dtype=torch.uint8)
    images[:, 0] = torch.tensor(values, dtype=torch.uint8).view(-1, side, side)
    return images


def stub(config, classes):
    """What inspect() reads of a checkpoint's dict."""
    return dict(config=config, classes=list(classes), mean=MEAN, std=STD, args={})


def red_run(values, num_experts, labels, classes, side=2, grids=1, path="stub.pt", **options):
    """inspect() on such images: its Findings, and its arguments."""
    usual = dict(max_images=None, batch_size=2, workers=0, all_choices=False, examples=2,
                 data="red", split="all")
    args = SimpleNamespace(**usual | options)
    data = TensorImages(red_images(values, side), torch.tensor(labels), classes)
    config = dict(model="stub", num_experts=num_experts)
    model = RedDecides(side, num_experts, len(classes), grids)
    return inspect(path, model, stub(config, classes), data, args, CPU), args


@pytest.mark.statistics
def test_counting_while_the_images_pass_by():
    """Over a loader with a last, smaller batch every image is counted once, under its class."""
    values = [[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 1]]
    run, _ = red_run(values, 2, [1, 0, 1], ["a", "b"])
    assert run.images == 3
    # b: 3 + 2 patches for expert 0, and 1 + 2 for expert 1
    assert run.class_tables[0].tolist() == [[0, 4], [5, 3]]


@pytest.mark.statistics
def test_two_grid_sizes():
    """A ConvNeXt has fewer patches in its later stages: each layer is counted on its own grid."""
    values = [[0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0]]
    run, _ = red_run(values, 2, [0], ["a"], side=4, grids=2)
    assert [layer["grid"] for layer in run.layers] == [[4, 4], [2, 2]]
    assert run.layers[1]["spatial"][1] == [[0, 1], [1, 0]]
    assert [len(layer["patches_per_image_cdf"][0]) for layer in run.layers] == [16, 4]


@pytest.mark.statistics
def test_max_images_are_spread_over_the_data():
    """Folders come class by class: three of nine images are 0, 3 and 6, not the first three."""
    run, _ = red_run([[i] * 4 for i in range(9)], 9, [0] * 9, ["a"], max_images=3)
    assert run.layers[0]["share"] == [share / 3 for share in (1, 0, 0, 1, 0, 0, 1, 0, 0)]


@pytest.mark.statistics
def test_examples_show_their_own_routing():
    """An example is the image as loaded, its label, and the experts of its patches."""
    values = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1], [2, 0, 2, 0], [0, 0, 0, 0], [1, 2, 3, 3]]
    # The middles of the two halves are images 1 and 4.
    run, _ = red_run(values, 4, [0, 1] * 3, ["a", "b"], examples=2)
    assert [example.title for example in run.examples] == ["b", "a"]
    for example, i in zip(run.examples, (1, 4)):
        assert torch.equal(example.image, red_images(values)[i])
        assert example.maps[0].flatten().tolist() == values[i]


@pytest.mark.statistics
def test_examples_are_spread_over_the_data():
    """Eight examples of fifteen images: every second one, up to the last class."""
    run, _ = red_run([[i] * 4 for i in range(15)], 15, [0] * 15, ["a"], examples=8)
    shown = [example.maps[0].flatten()[0].item() for example in run.examples]
    assert shown == [0, 2, 4, 6, 8, 10, 12, 14]


@pytest.mark.statistics
def test_an_image_is_shown_once():
    """With fewer images than examples each image is one example."""
    run, _ = red_run([[0, 1, 2, 3]], 4, [0], ["a"], examples=8)
    assert len(run.examples) == 1


@pytest.mark.statistics
def test_an_image_that_cannot_be_read_is_named():
    """Numbers without an image would not be comparable: the run stops and names the file."""
    class Broken(TensorImages):
        def __getitem__(self, indices):
            unreadable = torch.tensor([i if i == 1 else -1 for i in indices])
            return self.images[indices], self.labels[indices], unreadable

        def path(self, index):
            return f"image {index}"

    data = Broken(red_images([[0] * 4] * 3), torch.zeros(3), ["a"])
    layer = LayerCounts(3, 2, (0, 2, 2), {"class": (torch.zeros(3, dtype=torch.int64), 1)})
    loader = eval_loader(data, 2, 0, CPU)
    with pytest.raises(ValueError, match="cannot read image 1: repair or replace"):
        count_choices(RedDecides(2, 2, 1), loader, [layer], [0], stub({}, ["a"]), CPU)


@pytest.mark.statistics
def test_a_router_that_computes_nan_is_refused():
    """A checkpoint with broken weights gets no report with NaN in it."""
    class Broken(RedDecides):
        def forward(self, images, return_routing):
            logits, (good,) = super().forward(images, return_routing)
            return logits, [good._replace(probs=good.probs * math.nan)]

    data = TensorImages(red_images([[0, 1, 1, 1]]), torch.tensor([0]), ["a"])
    checkpoint = stub(dict(num_experts=2), ["a"])
    args = SimpleNamespace(max_images=None, batch_size=2, workers=0, all_choices=False, examples=0)
    with pytest.raises(ValueError, match="a.pt: the router of block 1 computes .* not finite"):
        inspect("a.pt", Broken(2, 2, 1), checkpoint, data, args, CPU)


@pytest.mark.statistics
def test_known_factors_of_shapes():
    """A patch shows the object if more than half its pixels do, and only then has a shape."""
    data = drawn("shapes", 20, transform=lambda images: images)
    factors = known_factors(data, torch.arange(20), (0, 8, 8))
    assert list(factors) == ["class", "object", "shape", "texture", "colour"]
    colours = int(data.factors["colour"].max()) + 1
    assert [count for _, count in factors.values()] == [16, 2, 4, 4, colours]
    for m in range(20):
        for n in range(64):
            r, c = n // 8 * 4, n % 8 * 4
            shown = data.masks[m, r:r + 4, c:c + 4].sum() > 8  # of 16 pixels
            assert factors["object"][0][m, n] == shown
            for name in ("shape", "texture", "colour"):
                assert factors[name][0][m, n] == (data.factors[name][m] if shown else -1)


@pytest.mark.statistics
def test_known_factors_of_flags():
    """A patch that is mostly flag has the colour of the stripe with most of its pixels."""
    data = drawn("flags", 5, transform=lambda images: images)
    factors = known_factors(data, torch.arange(5), (0, 4, 4))
    assert list(factors) == ["class", "object", "part", "colour"]
    for m in range(5):
        for n in range(16):
            r, c = n // 4 * 8, n % 4 * 8
            patch = data.masks[m, r:r + 8, c:c + 8]
            counts = [(patch == stripe).sum().item() for stripe in (1, 2, 3)]
            shown, stripe = sum(counts) > 32, counts.index(max(counts))  # of 64; the upper of two
            assert factors["object"][0][m, n] == shown
            assert factors["part"][0][m, n] == (stripe if shown else -1)
            colour = data.factors["colour"][m, stripe]
            assert factors["colour"][0][m, n] == (colour if shown else -1)


@pytest.mark.statistics
def test_experts_that_follow_the_object_are_found():
    """Experts for background and object have an information of 1 with `object`, 0 with shape."""
    data = drawn("shapes", 200, transform=lambda images: images)
    factors = known_factors(data, torch.arange(200), (0, 8, 8))
    layer = LayerCounts(200, 2, (0, 8, 8), factors)
    layer.add(routing(factors["object"][0].tolist(), 2))
    found = layer.summary(data.classes)["information"]
    assert_close(found["object"]["normalized"], 1.0)
    assert found["shape"]["bits"] == 0, "on the object there is one expert only"
    by_chance = found["object"]["normalized_by_chance"]
    assert 0.2 < by_chance < 0.8, "objects are in the centre: the position alone tells something"


@pytest.mark.statistics
@pytest.mark.parametrize("patch, top, left", [(0, 0, 0), (27, 8, 8), (63, 20, 20)])
def test_cut_outs_stay_inside(patch, top, left):
    """A patch of an 8 x 8 grid on 32 pixels with its neighbours is 12 x 12 pixels."""
    image = torch.arange(3 * 32 * 32).view(3, 32, 32)
    # Patch 27 is in row 3 and column 3, so the cut begins with patch 2 in both: at pixel 8.
    cut = cut_out(image, patch, (0, 8, 8))
    assert torch.equal(cut, image[:, top:top + 12, left:left + 12])


@pytest.mark.statistics
def test_a_patch_is_in_the_middle_of_its_cut_out():
    """A patch of 8 pixels (28 x 28 on 224) is shown in a quarter of the image, 56 pixels."""
    image = torch.arange(3 * 224 * 224).view(3, 224, 224)
    cut = cut_out(image, 10 * 28 + 20, (0, 28, 28))  # the patch at pixels 80 and 160
    assert torch.equal(cut, image[:, 56:112, 136:192])  # 24 pixels on each side of it


# ---------------------------------------------------------------- figures

SVG = "{http://www.w3.org/2000/svg}"


def parse(panel):
    """A panel's elements by kind, {"rect": [attributes, ...], ...}, and its texts by position.

    Numbers are relative to the panel's corner below the title.
    """
    root = ET.fromstring(f'<g xmlns="http://www.w3.org/2000/svg">{"".join(panel.marks)}</g>')
    marks = dict(rect=[], image=[], polyline=[])
    texts = {}
    for mark in root:
        kind = mark.tag.removeprefix(SVG)
        if kind == "text":
            texts[float(mark.get("x")), float(mark.get("y"))] = mark.text
        else:
            marks[kind].append(mark.attrib)
    return marks, texts


def place(mark):
    """x, y, width and height of a rect or an image."""
    return [float(mark[name]) for name in ("x", "y", "width", "height")]


def pixels(mark):
    """The Pillow image inside an element `image` of SVG."""
    return Image.open(io.BytesIO(base64.b64decode(mark["href"].partition(",")[2])))


@pytest.mark.report
@pytest.mark.parametrize("num_experts", [2, 8, 9, 16, 64, 200])
def test_every_expert_has_its_own_colour(num_experts):
    """No two experts share a colour."""
    assert len(set(palette(num_experts))) == num_experts


@pytest.mark.report
def test_many_colours_are_alternately_dark_and_bright():
    """The strongest channel is 75% of 255 = 191, and 95% = 242: hues of neighbours are close."""
    assert [max(colour) for colour in palette(9)] == [191, 242] * 4 + [191]


@pytest.mark.report
@pytest.mark.parametrize("num_experts", [8, 16, 200])
def test_no_tint_looks_like_no_tint(num_experts):
    """On a grey photograph every expert's tint has a colour: its channels differ by 20 or more."""
    colours = palette(num_experts)
    photograph = torch.full((3, 2, 2), 128, dtype=torch.uint8)
    for e in range(num_experts):
        tinted = overlay(photograph, torch.tensor([[e]]), colours)[:, 0, 0].int()
        assert tinted.max() - tinted.min() >= 20, f"expert {e} is grey: {colours[e]}"


@pytest.mark.report
def test_a_patch_is_tinted_by_its_expert():
    """On black, the overlay is 0.6 of the expert's colour, each patch in its place."""
    black = torch.zeros(3, 4, 4, dtype=torch.uint8)
    tinted = overlay(black, torch.tensor([[0, 1], [0, 0]]), [(100, 0, 0), (0, 0, 200)])
    red, blue = [60, 0, 0], [0, 0, 120]
    assert tinted[:, 0, 0].tolist() == tinted[:, 2, 1].tolist() == tinted[:, 3, 2].tolist() == red
    assert tinted[:, 1, 3].tolist() == blue


@pytest.mark.report
def test_tint_has_one_colour_and_the_values_as_opacity():
    """A map is 10% opaque at 0 and 80% at 1, so that it lies on a light and on a dark page."""
    tinted = tint(torch.tensor([[0.0, 1.0, 0.5]]), (1, 2, 3))
    assert tinted[:3, 0, 1].tolist() == [1, 2, 3]
    assert tinted[3, 0].tolist() == [26, 204, 115]  # 255 * 0.1, 255 * 0.8, 255 * 0.45, rounded


@pytest.mark.report
def test_bars_by_hand():
    """Values of 1 and 0.5 of a top of 1 are bars of 110 and 55 pixels on the same base line."""
    marks, texts = parse(bars("", [1, 0.5], 1, [(1, 2, 3), (4, 5, 6)], ["a", "b"], "{:.0%}"))
    # Half of 320 pixels each, with a tenth free on either side.
    assert [place(bar) for bar in marks["rect"]] == [[16, 5, 128, 110], [176, 60, 128, 55]]
    assert [bar["fill"] for bar in marks["rect"]] == ["rgb(1, 2, 3)", "rgb(4, 5, 6)"]
    assert texts == {(80, 129): "a", (240, 129): "b", (80, 143): "100%", (240, 143): "50%"}


@pytest.mark.report
@pytest.mark.parametrize("count", [16, 64, 200, 1000])
def test_labels_have_room(count):
    """However many bars there are, their labels do not overlap and the bars have a width."""
    numbers = list(range(count))
    marks, texts = parse(bars("", [1] * count, 1, palette(count), numbers, "{}"))
    assert all(place(bar)[2] > 0 for bar in marks["rect"])
    at = sorted(x for x, _ in texts)
    wide = 7 * len(str(count - 1))
    assert all(b - a >= wide for a, b in zip(at, at[1:])) and len(at) >= 2


@pytest.mark.report
def test_a_curve_by_hand():
    """A curve from 0 to 1 goes from the corner of the axes to the opposite one. [] has none."""
    marks, texts = parse(plot("", [[(1, 0), (2, 0.5), (3, 1)], []], [(1, 2, 3), (4, 5, 6)], "time"))
    *axis, curve = marks["polyline"]
    assert curve["points"].split()[:3] == ["40.0,150.0", "174.0,78.0", "308.0,6.0"]
    assert curve["stroke"] == "rgb(1, 2, 3)" and curve["stroke-width"] == "2"
    assert len(axis) == 3 and {line["stroke"] for line in axis} == {"rgb(136, 136, 136)"}
    ticks = {(40, 165): "1", (174, 165): "2", (308, 165): "3", (160, 180): "time"}
    heights = {(35, 154): "0", (35, 82): "0.5", (35, 10): "1"}
    assert (ticks | heights).items() <= texts.items()


@pytest.mark.report
def test_a_curve_with_gaps_and_one_of_a_single_point():
    """A missing epoch is bridged. One point is drawn twice in its place: SVG makes that a dot."""
    panel = plot("", [[(1, 8), (4, 2)], [(2, 4)]], [(1, 2, 3), (4, 5, 6)], "", 2, ["a", "b"])
    marks, texts = parse(panel)
    _, middle, _, gap, dot = [line["points"].split() for line in marks["polyline"]]
    # Epoch 2 is a third of 268 pixels to the right of 40. 8 is the top, 144 pixels high.
    assert gap[:2] == ["40.0,6.0", "308.0,114.0"] and dot == ["129.3,78.0"] * 2
    assert middle == ["40.0,114.0", "308.0,114.0"]
    assert marks["polyline"][4]["stroke-linecap"] == "round", "else a dot has no size"
    assert [place(swatch)[0] for swatch in marks["rect"]] == [0, 106.67]
    assert texts[14, 201] == "a" and texts[35, 118] == "2"


@pytest.mark.report
@pytest.mark.parametrize("middle", [7.9, 0.1])
def test_numbers_of_an_axis_have_room(middle):
    """A line close to the one below it is drawn without a number."""
    marks, texts = parse(plot("", [[(1, 8), (2, 1)]], [(1, 2, 3)], "", middle))
    numbers = {name for (x, _), name in texts.items() if x == 35}
    assert len(marks["polyline"]) == 4
    assert numbers == ({"0", "7.9"} if middle == 7.9 else {"0", "8"})


@pytest.mark.report
def test_a_thousand_epochs_are_few_points():
    """A curve has about a point per two pixels, the last one among them."""
    marks, _ = parse(plot("", [[(n, n) for n in range(1, 1001)]], [(1, 2, 3)], ""))
    points = marks["polyline"][-1]["points"].split()
    assert 100 <= len(points) <= 160 and points[-1] == "308.0,6.0"


@pytest.mark.report
def test_ranking_by_hand():
    """Each row has its label on the left, its note on the right and a bar of its share below."""
    panel = ranking("", [("a", 0.5, "1 of 2"), ("b", 0, "0 of 9")])
    assert panel.height == 48
    marks, texts = parse(panel)
    assert [place(bar) for bar in marks["rect"]] == [[0, 17, 160, 4], [0, 41, 1, 4]]
    assert texts == {(0, 12): "a", (320, 12): "1 of 2", (0, 36): "b", (320, 36): "0 of 9"}


@pytest.mark.report
def test_tiles_by_hand():
    """Three pictures, two to a row, stand in reading order below their labels; None has none."""
    red = torch.zeros(3, 4, 4, dtype=torch.uint8)
    red[0] = 255
    marks, texts = parse(tiles("", [red, None, red], ["a", "b", "c"], 2))
    # (320 - 6) / 2 = 157 pixels wide and high, 6 apart, and 20 pixels for the label
    assert [place(image) for image in marks["image"]] == [[0, 15, 157, 157], [0, 192, 157, 157]]
    assert texts == {(0, 11): "a", (163, 11): "b", (0, 188): "c"}
    assert pixels(marks["image"][1]).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.report
def test_heat_map_by_hand():
    """A cell per value in one small picture, rows down and columns across, with the numbers."""
    values = torch.tensor([[0.0, 0.5], [0.13, 0.25]])
    marks, texts = parse(heat_map("", values, ["r0", "r1"], ["c0", "c1"], 20, 30, top=0.5))
    cells = marks["image"][0]
    assert place(cells) == [20, 16, 300, 60] and cells["image-rendering"] == "pixelated"
    opacity = [pixels(cells).getpixel(xy)[3] for xy in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert opacity == [26, 204, 72, 115]  # 255 * (0.1 + 0.7 * value / 0.5), rounded
    assert texts[95, 35] == ".00" and texts[245, 35] == ".50"
    assert texts[95, 65] == ".13" and texts[245, 65] == ".25"
    assert texts[15, 35] == "r0" and texts[15, 65] == "r1" and texts[95, 11] == "c0"


@pytest.mark.report
def test_the_rows_of_a_large_heat_map_have_labels_with_room():
    """With 1,000 rows of a pixel every twelfth has a label."""
    names = [str(c) for c in range(1000)]
    _, texts = parse(heat_map("", torch.zeros(1000, 16), names, range(16), 110, 1))
    rows = [name for (x, _), name in texts.items() if x == 105]
    assert rows == [str(c) for c in range(0, 1000, 12)]


@pytest.mark.report
def test_large_pictures_are_reduced():
    """A picture has at most twice the pixels that the page shows, and a small one keeps its own."""
    large = pixels(ET.fromstring(picture(0, 0, 75, 50, torch.zeros(4, 400, 400).byte())).attrib)
    small = pixels(ET.fromstring(picture(0, 0, 75, 50, torch.zeros(4, 8, 8).byte())).attrib)
    assert large.size == (150, 100) and small.size == (8, 8)


@pytest.mark.report
@pytest.mark.parametrize("colours, height, kind", [(3, 33, "JPEG"), (3, 32, "PNG"), (4, 33, "PNG")])
def test_a_picture_of_more_than_32_rows_is_a_jpeg(colours, height, kind):
    """A PNG would be five times as long. A JPEG has no opacity."""
    image = picture(0, 0, 50, 50, torch.zeros(colours, height, 40).byte())
    assert pixels(ET.fromstring(image).attrib).format == kind


@pytest.mark.report
def test_texts_are_escaped():
    """Markup in a name is shown and not obeyed."""
    assert ET.fromstring(text(1, 2, "<b>&\"'")).text == "<b>&\"'"


@pytest.mark.report
def test_a_text_has_an_anchor_and_a_size():
    """At x it starts, is in the middle or ends. 11 pixels are usual."""
    middle = {"x": "1", "y": "2", "text-anchor": "middle", "font-size": "14"}
    assert ET.fromstring(text(1, 2, "a", "middle", 14)).attrib == middle
    usual = {"x": "1", "y": "2", "text-anchor": "start", "font-size": "11"}
    assert ET.fromstring(text(1, 2, "a")).attrib == usual


@pytest.mark.report
def test_what_xml_forbids_is_replaced():
    """A control character or half a character of a file name would make the SVG unreadable."""
    assert escape("a\x01b\udce9c\ufffe") == "a□b□c□"
    assert escape("猫 🐦 العربية") == "猫 🐦 العربية"


@pytest.mark.report
@pytest.mark.parametrize("name, expected", [
    ("abcd", "abcd"), ("abcde", "abc…"), ("猫犬", "猫犬"), ("猫犬鳥", "猫…")])
def test_short_names_by_hand(name, expected):
    """A long name is cut to four places, of which a Chinese character takes two."""
    assert short(name, 4) == expected


@pytest.mark.report
def test_tiles_of_different_widths():
    """Pictures keep their shape: the widest fills its place, and half as wide is half of it."""
    wide, narrow = torch.zeros(3, 4, 8).byte(), torch.zeros(3, 4, 4).byte()
    marks, _ = parse(tiles("", [narrow, wide], ["a", "b"], 1))
    assert [place(image)[2:] for image in marks["image"]] == [[160, 160], [320, 160]]


@pytest.mark.report
def test_a_panel_of_the_page_has_its_title_above_the_marks():
    """The title is the alt text and the first line: y = 0 is 24 pixels below the upper edge."""
    root = ET.fromstring(panel_svg(Panel("a & b", 30, [text(5, 20, "inside")])))
    assert root.get("aria-label") == "a & b" and root.get("viewBox") == "0 -24 320 54"
    assert (root.get("width"), root.get("height")) == ("320", "54")
    title, inside = root.findall("text")
    assert (title.text, title.get("y"), title.get("font-size")) == ("a & b", "-10", "14")
    assert (inside.text, inside.get("y")) == ("inside", "20")
    assert root.get("role") == "img", "else a screen reader does not read the alt text"


@pytest.mark.report
def test_a_file_has_four_panels_to_a_row():
    """Six panels are two rows, as far apart as the highest panel needs, on white."""
    panels = [Panel(str(i), 100, []) for i in range(5)] + [Panel("5", 200, [])]
    root = ET.fromstring(file_svg(panels))
    assert root.tag == SVG + "svg"
    corners = [(panel.get("x"), panel.get("y")) for panel in root.findall(SVG + "svg")]
    # Columns are 320 + 24 pixels apart, and rows 24 (title) + 200 + 24.
    assert len(corners) == 6 and corners[3] == ("1056", "24") and corners[4] == ("24", "272")
    assert (root.get("width"), root.get("height")) == (str(24 + 4 * 344), str(24 + 2 * 248))
    white = root.find(SVG + "rect").attrib
    assert place(white) == [0, 0, 24 + 4 * 344, 24 + 2 * 248]
    assert white["fill"] == "rgb(255, 255, 255)"


# ---------------------------------------------------------------- the files


class Page(HTMLParser):
    """Collects tags, links and text, and sees to it that what is opened is closed."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.links, self.text, self.open = [], [], "", []
        self.feed(source)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src")]

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag in ("svg", "g", "div", "table", "text", "p", "h2", "h3"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_data(self, data):
        self.text += data


EXTREMES = {  # values, E, labels, classes, options
    "two classes": ([[0, 1, 1, 1], [0, 0, 0, 1]], 2, [0, 1], ["a", "b"], {}),
    "one image": ([[0, 1, 2, 3]], 8, [0], ["a"], {}),
    "one expert": ([[0, 0, 0, 0]], 1, [0], ["a"], {}),
    "64 experts": ([[0, 11, 22, 33], [63, 62, 61, 60]], 64, [0, 1], ["a", "b"], {}),
    "200 experts": ([[0, 11, 22, 199]], 200, [0], ["a"], {}),
    "1000 classes": ([[0, 1, 2, 3]] * 10, 4, list(range(10)), [f"class {i}" for i in range(1000)],
                     {}),
    "two grids": ([[0, 0, 1, 1] * 4] * 2, 3, [0, 0], ["a", "b"], dict(side=4, grids=2)),
    "no examples": ([[0, 1, 1, 1]], 2, [0], ["a"], dict(examples=0))}


@pytest.mark.report
@pytest.mark.parametrize("case", EXTREMES)
def test_the_report_has_a_picture_per_layer(case):
    """From 1 to 200 experts and to 1,000 classes: well-formed, and all figures are there."""
    *values, options = EXTREMES[case]
    run, args = red_run(*values, **options)
    page = Page(make_files([run], args)["report.html"])
    layers, examples = len(run.layers), len(run.examples)
    # Per layer: load, map, classes, similarity, patches and curves. Then one per example, two
    # legends, depth, and factors measured and by chance.
    panels = 6 * layers + examples + 2 + 1 + 2
    # Accuracy per class, the matrix of up to 40 classes, and the confusions if there are any.
    wrong = run.confusion.sum() > run.confusion.trace()
    panels += 1 + (len(run.classes) <= 40) + int(wrong)
    assert page.open == [] and page.tags.count("svg") == panels
    assert page.tags.count("h3") == 1, "the name of a single run is said once"
    assert page.text.startswith("What the experts do")


@pytest.mark.report
@pytest.mark.parametrize("case", EXTREMES)
def test_every_figure_is_also_an_svg_file(case):
    """Each file is XML, has the panels of the page, and no mark with a negative size."""
    *values, options = EXTREMES[case]
    run, args = red_run(*values, **options)
    files = make_files([run], args)
    names = {f"{figure}.svg" for figure in FIGURES.keys() - {"curves", "balance"}}  # without a log
    assert set(files) == {"summary.json", "routing.csv", "report.html"} | names
    panels = 0
    for name in names:
        root = ET.fromstring(files[name])
        panels += len(root.findall(SVG + "svg"))
        sizes = [float(mark.get("width")) for mark in root.iter() if mark.get("width")]
        assert min(sizes) > 0, name
    assert panels == files["report.html"].count("<svg")


@pytest.mark.report
def test_the_caption_of_a_figure_is_its_docstring():
    """The report says above each figure what its function's docstring says."""
    run, args = red_run([[0, 1, 1, 1]], 2, [0], ["a"])
    run = run._replace(log={1: dict(epoch=1, lr=1, load=[[0.5, 0.5]])})
    page = Page(make_files([run], args)["report.html"])
    said = " ".join(page.text.split())
    for draw in FIGURES.values():
        heading, caption = draw.__doc__.split("\n", 1)
        assert heading in said and " ".join(caption.split()) in said


@pytest.mark.report
def test_summary_is_json_without_nan():
    """Other programs read summary.json: NaN is no JSON."""
    run, args = red_run([[0, 1, 1, 1]], 8, [0], ["a", "empty"])
    summary = make_files([run], args)["summary.json"]
    json.loads(summary, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.report
def test_summary_keeps_names_as_they_are():
    """Numbers share a line, and a name that looks like numbers keeps its spaces."""
    name = "[1,  2,\n 3]"
    run, args = red_run([[0, 0, 1, 1]], 2, [0], [name])
    files = make_files([run], args)
    summary = json.loads(files["summary.json"])
    assert summary["layers"][0]["top_classes"][0] == [[name, 1.0]]
    assert "0.5, 0.5" in files["summary.json"]


@pytest.mark.report
def test_names_are_only_text():
    """Names with markup in them are shown and not obeyed, and the page loads nothing."""
    name = "<script>alert(1)</script>"
    run, args = red_run([[0, 1, 1, 1]], 2, [0], [name, 'a" onload="x'])
    page = Page(make_files([run._replace(name=name)], args)["report.html"])
    assert "script" not in page.tags and name in page.text
    assert page.links and all(link.startswith("data:image/") for link in page.links)


@pytest.mark.report
def test_names_of_any_characters(tmp_path):
    """Chinese, Arabic, emojis, control characters and bytes that are no UTF-8 can be written."""
    names = ["猫", "العربية", "🐦 bird", "a\x01b\nc", os.fsdecode(b"caf\xe9")]
    run, args = red_run([[0, 1, 1, 1]] * 5, 2, [0, 1, 2, 3, 4], names, examples=5)
    inspect_experts.write_files(tmp_path, make_files([run], args))
    figure = ET.parse(tmp_path / "fig6.svg")
    titles = [mark.text for mark in figure.iter(SVG + "text")]
    assert {"猫", "العربية", "🐦 bird"} <= set(titles)
    table = (tmp_path / "routing.csv").read_text("utf-8-sig")
    assert "猫" in table and "caf" in table


@pytest.mark.report
def test_routing_csv_by_hand():
    """One row per layer, class and expert; a class without images has 0 tokens and a share of 0."""
    values, classes = [[0, 0, 0, 1], [1, 1, 1, 1]], ["a,b", "empty", "c"]
    run, _ = red_run(values, 2, [0, 2], classes)
    rows = list(csv.reader(io.StringIO(routing_csv(run), newline="")))
    assert rows == [["layer", "block", "class", "expert", "tokens", "share"],
                    ["0", "1", "a,b", "0", "3", "0.750000"],
                    ["0", "1", "a,b", "1", "1", "0.250000"],
                    ["0", "1", "empty", "0", "0", "0.000000"],
                    ["0", "1", "empty", "1", "0", "0.000000"],
                    ["0", "1", "c", "0", "0", "0.000000"],
                    ["0", "1", "c", "1", "4", "1.000000"]]


@pytest.mark.report
def test_a_spreadsheet_takes_no_class_for_a_formula():
    """A name that starts with = + - @ or a tab gets an apostrophe, and other names get none."""
    names = ["=1+1", "+1", "-2+3", "@SUM(1)", "\t=1", "a=1", "001"]
    run, _ = red_run([[0, 1, 1, 1]], 2, [0], names)
    rows = csv.reader(io.StringIO(routing_csv(run), newline=""))
    cells = list(dict.fromkeys(row[2] for row in rows))
    expected = ["'=1+1", "'+1", "'-2+3", "'@SUM(1)", "'\t=1", "a=1", "001"]
    assert cells == ["class"] + expected


@pytest.mark.report
def test_a_spreadsheet_knows_the_encoding(tmp_path):
    """routing.csv begins with UTF-8's byte order mark, without which Excel shows café wrong."""
    run, args = red_run([[0, 1, 1, 1]], 2, [0], ["café"])
    inspect_experts.write_files(tmp_path, make_files([run], args))
    content = (tmp_path / "routing.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbflayer,") and "café".encode() in content


@pytest.mark.report
def test_two_checkpoints_side_by_side():
    """With --compare the page and summary.json hold both; CSV and figures have files each."""
    run, args = red_run([[0, 1, 1, 1]], 2, [0], ["a"])
    other, _ = red_run([[0, 0, 0, 1]], 2, [0], ["a"])
    files = make_files([run, other._replace(name="other.pt")], args)
    summary = json.loads(files["summary.json"])
    assert summary["layers"][0]["share"] == [0.25, 0.75]
    assert summary["compare"]["layers"][0]["share"] == [0.75, 0.25]
    for name in ("routing.csv", "fig5.svg"):
        assert files[name] == make_files([run], args)[name]
        assert files[name] != files[name.replace(".", "_compare.")]
    alone = make_files([run], args)["report.html"].count("<svg")
    page = files["report.html"]
    assert page.count("<svg") == 2 * alone and "<h3>other.pt</h3>" in page


# ---------------------------------------------------------------- command line


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Saves untrained checkpoints in an empty folder, which becomes the current one."""
    monkeypatch.chdir(tmp_path)

    def save(name, **options):
        config = dict(model="convnext_nano", num_classes=16, num_experts=4) | options
        model = build_model(config).state_dict()
        usual = dict(image_size=32, crop_ratio=1.0, mean=MEAN, std=STD, ema={}, optimizer={},
                     epoch=1, step=1, best=0.0, args={})
        torch.save(usual | dict(config=config, classes=DRAWN["shapes"][1], model=model), name)
        return name
    return save


def run_main(monkeypatch, *argv):
    """python inspect_experts.py ARGV in this process; `shapes` has 100 pictures."""
    monkeypatch.setattr("eval.VAL_IMAGES", 100)
    monkeypatch.setattr(sys, "argv", ["inspect_experts.py", *argv])
    inspect_experts.main(inspect_experts.parse_args())


@pytest.mark.report
def test_one_command_writes_everything(checkpoint, monkeypatch):
    """A ViT with k = 2 beside a ConvNeXt with three grids: all files say what they are about."""
    vit = checkpoint("vit.pt", model="vit_nano", moe_layers="every2", k=2)
    conv = checkpoint("conv.pt", moe_layers="every2", k=1)
    run_main(monkeypatch, vit, "--compare", conv, "--data", "shapes", "--max-images", "40",
             "--all-choices", "--out", "deep/out")
    expected = ["summary.json", "report.html"]
    figures = FIGURES.keys() - {"curves", "balance"}  # there is no log
    for name in ("routing.csv", *(f"{figure}.svg" for figure in figures)):
        expected += [name, name.replace(".", "_compare.")]
    assert sorted(os.listdir("deep/out")) == sorted(expected)
    summary = json.loads(Path("deep/out/summary.json").read_text())
    assert (summary["images"], summary["data"], summary["choices"]) == (40, "shapes", "all")
    assert (summary["checkpoint"], summary["model"]["model"]) == ("vit.pt", "vit_nano")
    assert summary["versions"]["torch"] == torch.__version__
    layers = summary["layers"]
    assert [layer["block"] for layer in layers] == [1, 3] and layers[0]["grid"] == [4, 4]
    assert set(layers[0]["information"]) == {
        "class", "object", "shape", "texture", "colour", "position"}
    grids = [layer["grid"] for layer in summary["compare"]["layers"]]
    assert grids == [[8, 8], [4, 4], [2, 2]]


@pytest.mark.report
def test_what_is_printed(checkpoint, monkeypatch, capsys):
    """A line per MoE layer: block, experts per image, information per factor, load per expert."""
    path = checkpoint("a.pt", moe_layers="last2")
    run_main(monkeypatch, path, "--data", "shapes", "--out", "out")
    text = Path("out/summary.json").read_text()
    assert text.startswith('{\n "checkpoint"'), "one entry per line, for people"
    summary = json.loads(text)
    lines = capsys.readouterr().out.splitlines()[2:]
    for layer, line in zip(summary["layers"], lines[:len(summary["layers"])], strict=True):
        numbers = re.findall(r"[\d.]+", line)
        assert int(numbers[0]) == layer["block"]
        found = [known["normalized"] for known in layer["information"].values()]
        load = [100 * share for share in layer["share"]]
        expected = [layer["experts_per_image"], *found, *load]
        assert_close([float(number) for number in numbers[1:]], expected, atol=0.051, rtol=0)


@pytest.mark.report
def test_folders_have_class_and_position_only(checkpoint, monkeypatch):
    """Nothing else is known about photographs in folders."""
    for name in ("circle-plain", "cross-dots"):
        os.makedirs(f"images/{name}")
        Image.new("RGB", (40, 36), (200, 100, 50)).save(f"images/{name}/1.png")
    path = checkpoint("a.pt", moe_layers="last2")
    run_main(monkeypatch, path, "--data", "images", "--workers", "0", "--out", "out")
    summary = json.loads(Path("out/summary.json").read_text())
    assert set(summary["layers"][0]["information"]) == {"class", "position"}
    assert summary["images"] == 2


@pytest.mark.report
def test_classes_that_the_checkpoint_does_not_know(checkpoint, monkeypatch):
    """Data of other classes is refused, with their names."""
    os.makedirs("images/zebra")
    Image.new("RGB", (32, 32)).save("images/zebra/1.png")
    path = checkpoint("a.pt", moe_layers="last2")
    with pytest.raises(ValueError, match="zebra"):
        run_main(monkeypatch, path, "--data", "images", "--workers", "0", "--out", "out")
    # the second of two checkpoints, before anything is counted for the first
    saved = torch.load(path, weights_only=True)
    torch.save(saved | dict(classes=[f"bird {i}" for i in range(16)]), "birds.pt")
    monkeypatch.setattr(inspect_experts, "count_choices", lambda *args: pytest.fail("counted"))
    with pytest.raises(ValueError, match="circle"):
        run_main(monkeypatch, path, "--compare", "birds.pt", "--data", "shapes", "--out", "out")


@pytest.mark.report
@pytest.mark.parametrize("argv, message", [
    (["sparse.pt", "--out", "sparse.pt"], "--out sparse.pt cannot be a folder"),
    (["sparse.pt", "--out", "/proc/out"], "--out /proc/out cannot be a folder"),
    (["missing.pt"], "no checkpoint at missing.pt")])
def test_refusals_come_before_any_work(checkpoint, monkeypatch, argv, message):
    """What cannot be done is said in one line, before an image is read or a file is written."""
    checkpoint("dense.pt"), checkpoint("sparse.pt", moe_layers="last2")
    monkeypatch.setattr(inspect_experts, "count_choices", lambda *args: pytest.fail("it worked"))
    with pytest.raises(ValueError, match=message) as error:
        run_main(monkeypatch, "--data", "shapes", "--out", "out", *argv)
    assert "\n" not in str(error.value)
    assert not os.path.exists("out") or os.listdir("out") == []


@pytest.mark.report
def test_a_report_needs_data_and_a_place(capsys):
    """Without --data or --out the parser says what is missing, with status 2."""
    for given, missing in (("--out out", "--data"), ("--data shapes", "--out")):
        with pytest.raises(SystemExit, match="2"):
            inspect_experts.parse_args(["a.pt", *given.split()])
        assert f"required: {missing}" in capsys.readouterr().err


@pytest.mark.report
@pytest.mark.parametrize("flag, least", [
    ("--max-images", 1), ("--examples", 0), ("--batch-size", 1), ("--workers", 0)])
def test_numbers_that_cannot_be(flag, least, capsys):
    """A number out of range is refused by the parser, with the range, and status 2."""
    usual = ["a.pt", "--data", "shapes", "--out", "out", flag]
    args = inspect_experts.parse_args([*usual, str(least)])
    assert getattr(args, flag.strip("-").replace("-", "_")) == least
    for word in (str(least - 1), "1.5", "many"):
        with pytest.raises(SystemExit) as stop:
            inspect_experts.parse_args([*usual, word])
        said = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2
        assert said.endswith(f"argument {flag}: expected int in [{least}, inf), got {word}")


@pytest.mark.report
def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    """When the disk is full the old file stays as it was, and the message says what to do."""
    def full(source, target):
        raise OSError(28, "No space left on device")

    (tmp_path / "summary.json").write_text("old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match="No space left.*make room or choose another --out"):
        inspect_experts.write_files(str(tmp_path), {"summary.json": "new"})
    assert (tmp_path / "summary.json").read_text() == "old"


# ---------------------------------------------------------------- how it went, and what is wrong


@pytest.mark.statistics
def test_broken_lines_of_a_log_are_left_out(tmp_path):
    """Half a line, an empty one, and what is no object are skipped; a later line replaces one."""
    lines = ['{"epoch": 1, "lr": 1}', '{"epoch": 2, "l', "", "[1]", '{"lr": 5}', '{"epoch": "3"}',
             '{"epoch": 4, "lr": 4, }', '{"epoch": 5, "lr": 5}', '{"epoch": 5, "lr": 6}']
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\x00")
    log = read_log(str(tmp_path / "best.pt"))
    assert log == {1: dict(epoch=1, lr=1), 5: dict(epoch=5, lr=6)}


@pytest.mark.statistics
def test_without_a_log_there_is_none(tmp_path):
    """A checkpoint that was copied elsewhere has no log beside it."""
    assert read_log(str(tmp_path / "best.pt")) == {}


@pytest.mark.statistics
def test_points_of_a_log_by_hand():
    """Epochs without the number are left out: missing, of another kind, or not finite."""
    log = {3: dict(lr=0.5, load=[[1, 2], [3, 4]]), 1: dict(lr=1), 2: {}, 4: dict(lr="high"),
           5: dict(lr=math.nan, load=[[5]]), 6: dict(lr=None, load=7)}
    assert points_of(log, "lr") == [(1, 1), (3, 0.5)]
    assert points_of(log, "load", 1, 0) == [(3, 3)]
    assert points_of(log, "load", 0, 1) == [(3, 2)]
    assert points_of({}, "lr") == []


def write_log(folder, lines):
    """A log.jsonl in a folder, for a checkpoint there."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (Path(folder) / "log.jsonl").write_text(text + '{"epoch": 9, "tr')


@pytest.mark.report
def test_curves_show_the_log(tmp_path):
    """Every point of the curves is the number of its epoch, as high as its share of the top."""
    lines = [dict(epoch=1, lr=0.25, val_loss=4.0, top1=10, load=[[0.75, 0.25]], train_loss=2.0),
             dict(epoch=2, lr=0.5, val_loss=1.0, top1=40),  # trained before an interruption
             dict(epoch=3, lr=0.125, val_loss=2.0, top1=20, load=[[0.5, 0.5]], train_loss=1.0)]
    write_log(tmp_path, lines)
    run, _ = red_run([[0, 1, 1, 1]], 2, [0], ["a"], path=str(tmp_path / "best.pt"))

    def expected(values, top):
        points = [f"{40 + 134 * (epoch - 1):.1f},{150 - 144 * value / top:.1f}"
                  for epoch, value in values]
        return points + points[-1:]

    drawn = []
    for panel in [*draw_curves(run), *draw_balance(run)]:
        marks, texts = parse(panel)
        drawn += [line["points"].split() for line in marks["polyline"]
                  if line["stroke"] != "rgb(136, 136, 136)"]
    each = [("val_loss", 4), ("train_loss", 4), ("top1", 40), ("lr", 0.5)]
    wanted = []
    for field, top in each:
        wanted.append(expected([(l["epoch"], l[field]) for l in lines if field in l], top))
    for e in range(2):
        wanted.append(expected([(l["epoch"], l["load"][0][e]) for l in lines if "load" in l], 0.75))
    assert drawn == wanted


@pytest.mark.report
def test_mistakes_by_a_loop():
    """Matrix, confusions and accuracies are what a loop over the images counts."""
    values = torch.randint(0, 4, (60, 4)).tolist()
    labels = torch.randint(0, 4, (60,)).tolist()
    names = ["ant", "bee", "cat", "dog"]
    run, args = red_run(values, 4, labels, names)
    counts = {}
    for label, pixels_of_image in zip(labels, values):
        pair = (label, pixels_of_image[0])  # the stub predicts the first pixel
        counts[pair] = counts.get(pair, 0) + 1
    for true in range(4):
        for predicted in range(4):
            assert run.confusion[true, predicted] == counts.get((true, predicted), 0)
    summary = json.loads(make_files([run], args)["summary.json"])
    right = sum(n for (true, predicted), n in counts.items() if true == predicted)
    assert_close(summary["top1"], 100 * right / 60)
    for c, name in enumerate(names):
        total = labels.count(c)
        expected = dict(top1=100 * counts.get((c, c), 0) / total, images=total)
        assert_close(summary["per_class"][name], expected)
    wrong = {(names[a], names[b]): n for (a, b), n in counts.items() if a != b}
    assert {(a, b): n for a, b, n in summary["confusions"]} == wrong
    matrix, pairs, classes = draw_mistakes(run)
    _, texts = parse(matrix)
    for true in range(4):
        for predicted in range(4):
            share = counts.get((true, predicted), 0) / labels.count(true)
            shown = texts[110 + (predicted + 0.5) * 52.5, 20 + (true + 0.5) * 18]
            assert abs(float(shown) - share) <= 0.005001
    _, texts = parse(pairs)
    a, b, n = summary["confusions"][0]
    assert texts[0, 12] == f"\u2068{a}\u2069 taken for \u2068{b}\u2069"
    assert texts[320, 12] == f"{n} of {labels.count(names.index(a))}"
    _, texts = parse(classes)
    lowest = min(found["top1"] for found in summary["per_class"].values())
    assert texts[320, 12].startswith(f"{lowest:.1f}% of")


@pytest.mark.report
def test_many_classes_have_no_matrix():
    """Above 40 classes the lists say what a matrix could not show."""
    names = [f"class {i}" for i in range(50)]
    run, _ = red_run([[0, 1, 1, 1]] * 50, 2, list(range(50)), names)
    titles = [panel.title for panel in draw_mistakes(run)]
    assert titles == ["the most frequent confusions", "accuracy per class, the lowest first"]


@pytest.mark.report
def test_examples_say_what_was_predicted():
    """Above an example is its class, and below it the predicted one with its probability."""
    run, _ = red_run([[0, 1, 1, 1], [0, 1, 1, 1]], 2, [0, 1], ["ant", "bee"])
    _, right, wrong = draw_examples(run)
    probability = 100 / (1 + math.exp(-3))  # logits of 3 and 0
    for panel, title, verdict in ((right, "ant", "right"), (wrong, "bee", "wrong")):
        assert panel.title == title
        _, texts = parse(panel)
        assert f"{verdict}: \u2068ant\u2069 {probability:.1f}%" in texts.values()


@pytest.mark.report
def test_a_dense_checkpoint_has_a_report(checkpoint, monkeypatch, capsys):
    """Curves, mistakes and pictures: what a model without experts has. A sentence says so."""
    path = checkpoint("dense.pt")
    write_log(".", [dict(epoch=1, lr=1, val_loss=1, top1=3)])
    run_main(monkeypatch, path, "--data", "shapes", "--out", "out")
    expected = ["curves.svg", "fig6.svg", "mistakes.svg", "report.html", "summary.json"]
    assert sorted(os.listdir("out")) == expected
    page = Page(Path("out/report.html").read_text())
    assert page.open == [] and page.text.startswith("What the model does")
    assert "it has no experts, so their figures are left out" in page.text
    summary = json.loads(Path("out/summary.json").read_text())
    assert f"top-1 {summary['top1']:.2f}%; a dense model" in capsys.readouterr().out


@pytest.mark.report
def test_a_dense_model_beside_a_sparse_one(checkpoint, monkeypatch):
    """With --compare each has the figures that it can have."""
    dense, sparse = checkpoint("dense.pt"), checkpoint("sparse.pt", moe_layers="last2")
    run_main(monkeypatch, sparse, "--compare", dense, "--data", "shapes", "--out", "out")
    files = set(os.listdir("out"))
    assert {"fig5.svg", "mistakes.svg", "mistakes_compare.svg", "routing.csv"} <= files
    assert not {"fig5_compare.svg", "routing_compare.csv"} & files


def save_pictures(count):
    """Pictures without classes, and one's own file names."""
    os.makedirs("own")
    for i in range(count):
        Image.new("RGB", (40, 36), (4 * i, 100, 50)).save(f"own/photo {i:02}.png")


@pytest.mark.report
@pytest.mark.parametrize("options", [dict(moe_layers="last2"), {}])
@pytest.mark.parametrize("data", ["own", "own/photo 01.png"])
def test_own_pictures(checkpoint, monkeypatch, capsys, options, data):
    """No classes: the five best ones with their probabilities, and the routing of each layer."""
    save_pictures(3)
    path = checkpoint("a.pt", **options)
    run_main(monkeypatch, path, "--data", data, "--workers", "0", "--out", "out")
    assert sorted(os.listdir("out")) == ["fig6.svg", "report.html", "summary.json"]
    found = json.loads(Path("out/summary.json").read_text())["pictures"]
    files = [f"own/photo {i:02}.png" for i in range(3)] if data == "own" else [data]
    assert [picture["file"] for picture in found] == files
    model, saved = load_checkpoint(path, CPU)
    page, printed = Path("out/report.html").read_text(), capsys.readouterr().out
    for shown in found:
        pixels = read_image(shown["file"])
        inputs = normalize(eval_transform(32, 1.0)(pixels).unsqueeze(0), MEAN, STD)
        with torch.no_grad():
            logits, routings = model(inputs, return_routing=True)
        probs = dict(zip(saved["classes"], logits.softmax(1)[0].tolist()))
        best = sorted(probs, key=probs.get, reverse=True)[:5]
        assert shown["classes"] == best
        assert_close(shown["probabilities"], [probs[name] for name in best])
        for experts, routing in zip(shown["experts"], routings, strict=True):
            assert sum(experts, []) == routing.experts[:, 0].tolist()
        assert os.path.basename(shown["file"]) in page and f"{shown['file']}: " in printed
        assert f"\u2068{best[0]}\u2069 {100 * probs[best[0]]:.1f}%" in page


@pytest.mark.report
def test_at_most_fifty_pictures(checkpoint, monkeypatch, capsys):
    """More than 50 pictures would be a page that nobody reads: a warning says so."""
    save_pictures(52)
    path = checkpoint("a.pt", moe_layers="last2")
    run_main(monkeypatch, path, "--data", "own", "--workers", "0", "--out", "out")
    found = json.loads(Path("out/summary.json").read_text())["pictures"]
    assert len(found) == 50 and found[49]["file"] == "own/photo 49.png"
    assert "52 pictures in own: the first 50 are shown" in capsys.readouterr().err
    for i in (50, 51):
        os.remove(f"own/photo {i}.png")
    run_main(monkeypatch, path, "--data", "own", "--workers", "0", "--out", "all")
    assert "pictures in own" not in capsys.readouterr().err


@pytest.mark.report
def test_a_broken_picture_is_named(checkpoint, monkeypatch):
    """A file that is no picture ends in one line with its name."""
    Path("photo.jpg").write_bytes(b"no picture")
    path = checkpoint("a.pt", moe_layers="last2")
    with pytest.raises(ValueError, match="cannot read photo.jpg: repair or replace the file"):
        run_main(monkeypatch, path, "--data", "photo.jpg", "--workers", "0", "--out", "out")


@pytest.mark.report
def test_headings_of_the_table_are_explained():
    """Below the first table stands what each of its columns means."""
    run, args = red_run([[0, 1, 1, 1]], 2, [0], ["a"])
    said = Page(make_files([run], args)["report.html"]).text
    for title, (_, meaning) in inspect_experts.KEY_NUMBERS.items():
        assert f"{title}: {meaning}" in said


@pytest.mark.report
def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    """A disk that is read-only: one line, before any work."""

    def refuse(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(inspect_experts.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match="cannot be a folder .*Read-only file system"):
        inspect_experts.open_folder(str(tmp_path))
