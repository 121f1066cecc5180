"""inspect_experts.py: what is counted, the numbers made of the counts, the figures and the files.

Most tests write a routing down by hand: for each image the experts of its patches, row by row.
Letters as in inspect_experts.py: M images, N patches per image, E experts, L levels of a factor.
"""

import base64
import csv
import io
import json
import math
import os
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import inspect_experts
from checks import drawn
from eval import (DRAWN, MEAN, STD, TensorImages, build_model, eval_transform, load_checkpoint,
                  match_dataset, normalize, read_image)
from inspect_experts import (
    BLUE, FIGURES, Layer, Run, bar, count_patches, cumulative, cut_out, describe, draw_amount,
    draw_balance, draw_classes, draw_load, draw_pictures, draw_similarity, draw_surest,
    draw_training, draw_where, entropy, heat, inspect, known_factors, mutual_information, overlay,
    overview, palette, parse_args, picture, plot, report_html, routing_csv, row_shares, similarity,
    store, surest_patches, swatch, tiles, tint, top_classes, write_files)
from moe import Routing

CPU = torch.device("cpu")


# ---------------------------------------------------------------- routings and data by hand


def routing_of(choices, E, probs=None):
    """The Routing of a batch from nested lists: image -> token -> its k experts."""
    experts = torch.tensor(choices).flatten(0, 1)  # (B, tokens, K) -> (T, K)
    if probs is None:
        probs = torch.full((len(experts), E), 1 / E)
    kept = torch.ones_like(experts) > 0
    return Routing(probs.log(), probs, experts, probs.gather(1, experts), kept, torch.zeros(()))


def layer_of(choices, grid, block=1, nats=None):
    """A Layer from nested lists: image -> token -> expert. nats: of each token, else 1 bit."""
    experts = torch.tensor(choices, dtype=torch.int16)
    nats = torch.full(experts.shape, math.log(2)) if nats is None else torch.tensor(nats)
    return Layer(block, grid, experts, nats)


def images_of(labels, names, red=None, side=2):
    """A data set of grey images, or with such red values: for each image those of its pixels."""
    images = torch.full((len(labels), 3, side, side), 100, dtype=torch.uint8)
    if red:
        images[:, 0] = torch.tensor(red).view(-1, side, side)
    return TensorImages(images, torch.tensor(labels), names)


def data_of(labels, names, red=None, side=2):
    """Such images, matched with a checkpoint of the same classes."""
    return match_dataset(images_of(labels, names, red, side), names)


def numbers_of(choices, E, grid, labels=None, names="ab"):
    """The numbers of a layer by hand, see describe(). All images are of class 0 unless labelled."""
    labels = labels or [0] * len(choices)
    return describe(layer_of(choices, grid), data_of(labels, names), range(len(labels)), E).numbers


def run_of(E, data, *layers, **others):
    """A Run of such layers over all images of a data set. others: its other fields."""
    images = range(len(data))
    described = [describe(layer, data, images, E) for layer in layers]
    usual = dict(path="a.pt", config=dict(model="by_hand"), log=[], data=data, images=list(images),
                 shown={}, top1=50.0, routed=0.4, layers=described, colours=palette(E))
    return Run(**usual | others)


# ---------------------------------------------------------------- statistics


@pytest.mark.statistics
def test_count_patches_by_hand():
    """Each pair of level and expert is counted in its cell, and a level of -1 in none."""
    levels, chosen = torch.tensor([[0, 1], [1, -1]]), torch.tensor([[2, 0], [0, 2]])
    assert count_patches(levels, chosen, 2, 3).tolist() == [[0, 0, 1], [2, 0, 0]]


@pytest.mark.statistics
@pytest.mark.parametrize("p, bits", [
    ([1.0, 0.0], 0.0), ([0.5, 0.5], 1.0), ([0.25] * 4, 2.0),
    ([0.5, 0.25, 0.25], 1.5)])  # 1/2 * 1 + 2 * 1/4 * 2
def test_entropy_by_hand(p, bits):
    """Entropy is in bits: one for two equal chances, two for four, none for a certainty."""
    assert_close(entropy(torch.tensor(p).double()), bits)


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
    per_image = torch.tensor([[2, 2, 0, 0], [4, 0, 0, 0], [1, 0, 3, 0]])
    expected = [[1.0, 4 / 9, 2 / 10, 0.0], [4 / 9, 1.0, 0.0, 0.0], [2 / 10, 0.0, 1.0, 0.0],
                [0.0, 0.0, 0.0, 0.0]]
    assert_close(similarity(per_image).tolist(), expected)


@pytest.mark.statistics
def test_similarity_is_the_papers_formula():
    """2 min(c_i, c_j) / (c_i + c_j), summed, is the paper's formula with its two conditions."""
    per_image = torch.randint(0, 4, (20, 5))
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            pairs = per_image[:, [i, j]].tolist()
            both = sum(a + b - abs(a - b) for a, b in pairs if a > 0 and b > 0)
            expected[i, j] = both / sum(a + b for a, b in pairs if a > 0 or b > 0)
    assert_close(similarity(per_image), expected)


@pytest.mark.statistics
def test_cumulative_distribution_by_hand():
    """Of the images that use an expert: which share sends it at most 1, 2, 3, 4 patches."""
    # Expert 0 gets 1, 3, 1 and 0 patches: of three images two send at most 1 or 2, and all at
    # most 3. Expert 1 gets 3, 1, 3 and 4. No image uses expert 2.
    curves = cumulative(torch.tensor([[1, 3, 0], [3, 1, 0], [1, 3, 0], [0, 4, 0]]), 4)
    assert_close(curves[:2], [[2 / 3, 2 / 3, 1.0, 1.0], [1 / 4, 1 / 4, 3 / 4, 1.0]])
    assert curves[2] is None


@pytest.mark.statistics
def test_row_shares_by_hand():
    """The shares of a class sum to 1 over the experts, and a class without patches has none."""
    assert row_shares(torch.tensor([[1, 3], [0, 0]])).tolist() == [[0.25, 0.75], [0, 0]]


@pytest.mark.statistics
def test_top_classes_by_hand():
    """Per expert the classes with the largest shares of its patches, without empty ones."""
    table = torch.tensor([[1, 0], [3, 0], [0, 0]])  # patches of three classes for two experts
    names = ["cat", "dog", "emu"]
    assert top_classes(table, names) == [[["dog", 0.75], ["cat", 0.25]], []]
    assert top_classes(table, names, limit=1) == [[["dog", 0.75]], []]


# ---------------------------------------------------------------- the numbers of a layer


@pytest.mark.statistics
@pytest.mark.parametrize("batch", [1, 2])
def test_the_first_choice_and_the_entropy_of_each_token_are_stored(batch):
    """Of k = 2 experts the first is kept, and H = -sum p ln p of the probabilities, in nats."""
    choices = [[(0, 1), (1, 0), (2, 1)], [(2, 0), (0, 1), (1, 2)]]  # 2 images of 1 + 2 tokens
    probs = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0.5, 0.25, 0.25]] * 2)
    stored = [([], []), ([], [])]
    for i in range(0, 2, batch):
        part = routing_of(choices[i:i + batch], 3, probs[3 * i:3 * (i + batch)])
        smaller = routing_of([[(2, 0)]] * batch, 3)  # a later layer, with one token per image
        store(stored, [(1, 1, 2), (0, 1, 1)], [part, smaller])
    (experts, nats), (later, _) = [[torch.cat(parts) for parts in layer] for layer in stored]
    assert experts.tolist() == [[0, 1, 2], [2, 0, 1]] and later.tolist() == [[2], [2]]
    # 1 and 1.5 bits: see test_entropy_by_hand
    assert_close(nats, torch.tensor([[0, math.log(2), 1.5 * math.log(2)]] * 2))
    assert experts.element_size() + nats.element_size() == 6, "bytes per patch, says the docstring"


@pytest.mark.statistics
@pytest.mark.parametrize("name, value, choices, E, grid", [
    ("experts_per_image", (1 + 2 + 4) / 3, [[3, 3, 3, 3], [0, 1, 1, 0], [0, 1, 2, 3]], 4, (0, 2, 2)),
    ("share", [0.75, 0.25], [[0, 0, 1, 0]], 2, (0, 2, 2)),
    # 3/4 and 1/4 have a standard deviation of 1/4 around a mean of 1/2.
    ("coefficient_of_variation", 0.5, [[0, 0, 1, 0]], 2, (0, 2, 2)),
    # Of two images with 2 x 3 patches the second leaves expert 0 one patch earlier.
    ("spatial", [[[1, 0.5, 0], [0, 0, 0]], [[0, 0.5, 1], [1, 1, 1]]],
     [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]], 2, (0, 2, 3)),
    ("router_entropy_bits", 1.0, [[0, 1]], 2, (0, 1, 2)),  # numbers_of() has ln 2 = 1 bit
    ("class_token_share", None, [[0, 0]], 2, (0, 1, 2)),  # a ConvNeXt has none
    # A ViT's class token, the first of an image, counts here and nowhere else.
    ("class_token_share", [0, 0.5, 0.5], [[2, 0, 0], [1, 0, 0]], 3, (1, 1, 2)),
    ("share", [1, 0, 0], [[2, 0, 0], [1, 0, 0]], 3, (1, 1, 2)),
    ("experts_per_image", 1, [[2, 0, 0], [1, 0, 0]], 3, (1, 1, 2)),
    ("spatial", [[[1, 1]], [[0, 0]], [[0, 0]]], [[2, 0, 0], [1, 0, 0]], 3, (1, 1, 2))])
def test_numbers_of_a_layer_by_hand(name, value, choices, E, grid):
    """What the choices of all images' patches, row by row, have as this number."""
    assert_close(numbers_of(choices, E, grid)[name], value, check_dtype=False)


@pytest.mark.statistics
@pytest.mark.parametrize("choices, of_class, of_position", [
    ([[0, 0], [1, 1], [0, 0], [1, 1]], 1, 0), ([[0, 1]] * 4, 0, 1)])
def test_information_by_hand(choices, of_class, of_position):
    """Experts that follow the class tell all about it, and nothing about the position."""
    found = numbers_of(choices, 2, (0, 1, 2), [0, 1, 0, 1])["information"]
    assert found["class"]["normalized"] == found["class"]["bits"] == of_class
    assert found["position"]["normalized"] == found["position"]["bits"] == of_position
    # Positions move on by the image's number: then each expert is as often at both.
    assert found["position"]["normalized_by_chance"] == 0


@pytest.mark.statistics
@pytest.mark.parametrize("labels, least, most", [
    ([0, 1, 2, 3, 4, 5], 0.999, 1.001),  # a class per image decides the expert whatever it is
    ([0, 1, 0, 1, 1, 0] * 50, 0, 0.05)])  # 300 images of two classes
def test_chance_is_found_with_the_classes_of_other_images(labels, least, most):
    """Experts that follow the class would tell all of it by chance, too, if images are few."""
    choices = [[e, e] for e in [0, 1, 0, 1, 1, 0] * (len(labels) // 6)]
    found = numbers_of(choices, 2, (0, 1, 2), labels, "abcdef")["information"]["class"]
    assert found["normalized"] == pytest.approx(1)
    assert least <= found["normalized_by_chance"] <= most


@pytest.mark.statistics
def test_the_surest_patches_by_hand():
    """Per expert the patches of lowest entropy that chose it, the surest first, one per image."""
    # Image 0 chose expert 0 twice, and 0.1 is the surer one. Only images 1 and 2 chose expert 1.
    # The class tokens, the surest of all, chose both: they have no place in an image.
    nats = [[0.0, 0.1, 0.2], [0.0, 0.5, 0.3], [0.0, 0.05, 0.4]]
    layer = layer_of([[0, 0, 0], [1, 1, 0], [1, 0, 1]], (1, 1, 2), nats=nats)
    assert surest_patches(layer, 0) == [(2, 0), (0, 0), (1, 1)]
    assert surest_patches(layer, 0, limit=2) == [(2, 0), (0, 0)]
    assert surest_patches(layer, 1) == [(2, 1), (1, 0)]
    assert surest_patches(layer, 2) == []


def information_by_loop(pairs):
    """Mutual information of a list of (level, expert): (bits, normalized)."""
    entropies = []
    for values in (*zip(*pairs), pairs):  # levels, experts, both
        shares = [values.count(value) / len(values) for value in set(values)]
        entropies.append(-sum(p * math.log2(p) for p in shares))
    h_levels, h_experts, h_both = entropies
    bits = h_levels + h_experts - h_both
    return bits, bits / min(h_levels, h_experts)


@pytest.mark.statistics
def test_every_number_by_plain_loops():
    """Random choices, a class token, an unused expert: the numbers are what loops find."""
    M, rows, columns, E, names = 11, 2, 3, 5, "abcd"
    N = rows * columns
    choices = torch.randint(0, E - 1, (M, 1 + N)).tolist()  # never expert E - 1
    labels = torch.randint(0, 3, (M,)).tolist()  # never class d
    numbers = numbers_of(choices, E, (1, rows, columns), labels, names)

    per_image, spatial = torch.zeros(M, E), torch.zeros(E, rows, columns, dtype=torch.float64)
    seen = []  # (image, position, expert) of every patch
    for m in range(M):
        for n in range(N):
            expert = choices[m][1 + n]
            seen.append((m, n, expert))
            per_image[m, expert] += 1
            spatial[expert, n // columns, n % columns] += 1 / M
    others = torch.randperm(M, generator=torch.Generator().manual_seed(0)).tolist()
    factors = {  # and the same by chance
        "class": ([(labels[m], e) for m, _, e in seen],
                  [(labels[others[m]], e) for m, _, e in seen]),
        "position": ([(n, e) for _, n, e in seen], [((n + m) % N, e) for m, n, e in seen])}
    assert list(numbers["information"]) == list(factors)
    for name, (pairs, by_chance) in factors.items():
        expected = *information_by_loop(pairs), information_by_loop(by_chance)[1]
        assert list(numbers["information"][name].values()) == pytest.approx(expected)

    shares = [sum(e == expert for _, _, e in seen) / (M * N) for expert in range(E)]
    variance = sum((share - 1 / E) ** 2 for share in shares) / E
    class_tokens = [tokens[0] for tokens in choices]
    assert numbers["share"] == pytest.approx(shares)
    assert numbers["coefficient_of_variation"] == pytest.approx(math.sqrt(variance) * E)
    assert numbers["class_token_share"] == [class_tokens.count(e) / M for e in range(E)]
    assert numbers["experts_per_image"] == len({(m, e) for m, _, e in seen}) / M
    assert_close(torch.tensor(numbers["spatial"], dtype=torch.float64), spatial)
    # Both have tests of their own above.
    assert numbers["similarity"] == similarity(per_image).tolist()
    assert numbers["patches_per_image_cdf"] == cumulative(per_image.long(), N)
    for expert, found in enumerate(numbers["top_classes"]):
        mine = [names[labels[m]] for m, _, e in seen if e == expert]
        assert dict(found) == {name: mine.count(name) / len(mine) for name in set(mine)}


@pytest.mark.statistics
def test_known_factors_of_shapes():
    """A patch shows the object if more than half its pixels do, and only then has a shape."""
    data = drawn("shapes", 20, transform=lambda images: images)
    data = match_dataset(data, data.classes)
    factors = known_factors(data, list(range(20)), (0, 8, 8))
    assert list(factors) == ["class", "object", "shape", "texture", "colour"]
    colours = int(data.factors["colour"].max()) + 1
    assert [L for _, L in factors.values()] == [16, 2, 4, 4, colours]
    assert torch.equal(factors["class"][0], data.labels)
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
    data = match_dataset(data, data.classes)
    factors = known_factors(data, [4, 0, 1], (0, 4, 4))
    assert list(factors) == ["class", "object", "part", "colour"]
    for m, image in enumerate([4, 0, 1]):
        for n in range(16):
            r, c = n // 4 * 8, n % 4 * 8
            patch = data.masks[image, r:r + 8, c:c + 8]
            counts = [(patch == stripe).sum().item() for stripe in (1, 2, 3)]
            shown, stripe = sum(counts) > 32, counts.index(max(counts))  # of 64; the upper of two
            assert factors["object"][0][m, n] == shown
            assert factors["part"][0][m, n] == (stripe if shown else -1)
            colour = data.factors["colour"][image, stripe]
            assert factors["colour"][0][m, n] == (colour if shown else -1)


@pytest.mark.statistics
def test_of_own_pictures_only_the_position_is_known():
    """Pictures without classes have no factors: a layer still has numbers, and an empty table."""
    layer = layer_of([[0, 1]], (0, 1, 2))
    described = describe(layer, data_of([-1], []), [0], 2)
    assert list(described.numbers["information"]) == ["position"]
    assert described.table.shape == (0, 2) and described.numbers["top_classes"] == [[], []]


@pytest.mark.statistics
def test_experts_that_follow_the_object_are_found():
    """Experts for background and object have an information of 1 with `object`, 0 with shape."""
    data = drawn("shapes", 200, transform=lambda images: images)
    data = match_dataset(data, data.classes)
    on_object, _ = known_factors(data, list(range(200)), (0, 8, 8))["object"]
    layer = layer_of(on_object.tolist(), (0, 8, 8))
    found = describe(layer, data, list(range(200)), 2).numbers["information"]
    assert_close(found["object"]["normalized"], 1.0)
    assert found["shape"]["bits"] == 0, "on the object there is one expert only"
    by_chance = found["object"]["normalized_by_chance"]
    assert 0.2 < by_chance < 0.8, "objects are in the centre: the position alone tells something"


# ---------------------------------------------------------------- one pass over the images


class RedDecides(nn.Module):
    """A stub: each pixel is a patch, and its red value is the expert that it goes to.

    The first pixel is the predicted class.
    """

    def __init__(self, side, num_experts, num_classes):
        super().__init__()
        self.num_experts, self.num_classes, self.seen = num_experts, num_classes, 0
        self.grids, self.moe_blocks = [(0, side, side)], [1]

    def forward(self, images, return_routing):
        self.seen += len(images)
        red = (images[:, 0] * STD[0] + MEAN[0]) * 255  # (B, S, S), undoing normalize()
        experts = red.round().long().flatten(1)  # (B, S * S)
        logits = 3.0 * nn.functional.one_hot(experts[:, 0] % self.num_classes, self.num_classes)
        return logits, [routing_of(experts.unsqueeze(2).tolist(), self.num_experts)]


@pytest.fixture
def red_run(monkeypatch):
    """Returns a function that runs inspect() with RedDecides on 2 x 2 pixels of red values."""
    def inspect_red(red, E, labels, names, *flags, model=RedDecides):
        model, data = model(2, E, len(names)), images_of(labels, names, red)
        checkpoint = dict(config={}, classes=names, image_size=2, crop_ratio=1.0, mean=MEAN,
                          std=STD, args={})
        monkeypatch.setattr(inspect_experts, "load_checkpoint", lambda path: (model, checkpoint))
        monkeypatch.setattr(inspect_experts, "open_dataset", lambda *args: data)
        monkeypatch.setattr(inspect_experts, "count_flops", lambda *args: 1)
        usual = ["stub.pt", "--data", "red", "--out", "out", "--batch-size", "2"]
        run = inspect("stub.pt", parse_args([*usual, *flags]), CPU)
        assert model.seen == len(run.images), "each image passes the model once"
        return run
    return inspect_red


@pytest.mark.report
def test_counting_while_the_images_pass_by(red_run):
    """Over a loader with a last, smaller batch every image is counted once, under its class."""
    run = red_run([[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 1]], 2, [1, 0, 1], ["a", "b"])
    # b: 3 + 2 patches for expert 0, and 1 + 2 for expert 1
    assert run.layers[0].table.tolist() == [[0, 4], [5, 3]]
    # Predicted are a, b and a: none is right.
    assert run.images == [0, 1, 2] and run.top1 == 0


@pytest.mark.report
def test_max_images_are_spread_over_the_data(red_run):
    """Folders come class by class: three of nine images are 0, 3 and 6, not the first three."""
    run = red_run([[i] * 4 for i in range(9)], 9, [0] * 9, ["a"], "--max-images", "3")
    assert run.images == [0, 3, 6]
    assert run.layers[0].numbers["share"] == [share / 3 for share in (1, 0, 0, 1, 0, 0, 1, 0, 0)]


@pytest.mark.report
@pytest.mark.parametrize("count, examples, shown", [
    (6, 2, [1, 4]),  # the middles of 0, 1, 2 and of 3, 4, 5
    (15, 8, [0, 2, 4, 6, 8, 10, 12, 14]),
    (1, 8, [0]),  # once
    (3, 0, [])])
def test_examples_are_spread_over_the_data(red_run, count, examples, shown):
    """n examples are the middles of n equal parts of the data. No image is shown twice."""
    red = [[i] * 4 for i in range(count)]
    run = red_run(red, count, [0] * count, ["a"], "--examples", str(examples))
    assert list(run.shown) == shown


@pytest.mark.report
def test_examples_have_their_own_answers(red_run):
    """An example's best classes are those of its own image, with their probabilities."""
    run = red_run([[0] * 4, [1] * 4, [1] * 4, [0] * 4], 2, [0, 0, 1, 1], ["a", "b"],
                  "--examples", "2")
    names = {m: [name for name, _ in answers] for m, answers in run.shown.items()}
    assert names == {1: ["b", "a"], 3: ["a", "b"]}
    p = 1 / (1 + math.exp(-3))  # of logits 3 and 0
    assert_close([share for _, share in run.shown[1]], [p, 1 - p])


@pytest.mark.report
def test_a_router_that_computes_nan_is_refused(red_run):
    """A checkpoint with broken weights gets no report with NaN in it."""
    class Broken(RedDecides):
        def forward(self, images, return_routing):
            logits, [good] = super().forward(images, return_routing)
            return logits, [good._replace(probs=good.probs * math.nan)]

    with pytest.raises(ValueError, match="stub.pt: the router of block 1 computes .* not finite"):
        red_run([[0, 1, 1, 1]], 2, [0], ["a"], model=Broken)


# ---------------------------------------------------------------- what figures are made of


class Page(HTMLParser):
    """Lists the elements of HTML with the text behind each. Asserts that what is opened is closed.

    An element has .tag, .attributes (a dict) and .text, up to the next tag.
    """

    def __init__(self, source):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag, attributes):
        self.elements.append(SimpleNamespace(tag=tag, attributes=dict(attributes), text=""))

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in ("html", "meta", "p", "br", "img", "tr", "th", "td"):  # need no end
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag == self.open.pop()

    def handle_data(self, data):
        self.text += data
        if self.elements:
            self.elements[-1].text += data

    def all(self, tag):
        return [element for element in self.elements if element.tag == tag]

    def texts(self, tag):
        return [element.text for element in self.all(tag)]

    def styles(self, tag):
        """The style of each such element that has one, a dict."""
        styles = [e.attributes["style"] for e in self.all(tag) if "style" in e.attributes]
        return [dict(rule.split(":") for rule in style.split(";")) for style in styles]

    def pictures(self):
        """The Pillow image in each <img>."""
        found = []
        for img in self.all("img"):
            kind, data = img.attributes["src"].split(";base64,")
            assert kind in ("data:image/png", "data:image/jpeg")
            found.append(Image.open(io.BytesIO(base64.b64decode(data))))
        return found

    def curves(self):
        """The points of each curve, ["x,y", ...], without the gray lines."""
        lines = [line.attributes for line in self.all("polyline")]
        return [line["points"].split() for line in lines if line["stroke"] != "gray"]


@pytest.mark.report
@pytest.mark.parametrize("E", [2, 8, 9, 16, 64, 200])
def test_every_expert_has_its_own_colour(E):
    """No two experts share a colour; close hues, of many, are alternately dark and bright."""
    colours = palette(E)
    assert len(set(colours)) == E
    strongest = [max(colour) for colour in colours]
    assert E <= 8 or set(strongest[::2]) == {191} and set(strongest[1::2]) == {242}  # 75%, 95%


@pytest.mark.report
@pytest.mark.parametrize("E", [8, 16, 200])
def test_no_tint_looks_like_no_tint(E):
    """On a grey photograph every expert's tint has a colour: its channels differ by 20 or more."""
    photograph = torch.full((3, 2, 2), 128, dtype=torch.uint8)
    for e, colour in enumerate(palette(E)):
        tinted = overlay(photograph, torch.tensor([[0]]), [colour])[:, 0, 0].int()
        assert tinted.max() - tinted.min() >= 20, f"expert {e} is grey: {colour}"


@pytest.mark.report
def test_a_patch_is_tinted_by_its_expert():
    """The overlay is 0.4 of the grey image and 0.6 of the expert's colour, each patch in place."""
    grey = torch.full((3, 4, 4), 50, dtype=torch.uint8)
    tinted = overlay(grey, torch.tensor([[0, 1], [0, 0]]), [(100, 0, 0), (0, 0, 200)])
    red, blue = [80, 20, 20], [20, 20, 140]  # 0.4 * 50 = 20, 0.6 * 100 = 60, 0.6 * 200 = 120
    assert tinted[:, 0, 0].tolist() == tinted[:, 2, 1].tolist() == tinted[:, 3, 2].tolist() == red
    assert tinted[:, 1, 3].tolist() == blue


@pytest.mark.report
def test_tint_by_hand():
    """0 is dark, 40 in each channel, 1 is the colour, and a half lies in the middle."""
    tinted = tint(torch.tensor([[0.0, 1.0, 0.5]]), (240, 0, 41))
    assert tinted[:, 0].T.tolist() == [[40, 40, 40], [240, 0, 41], [140, 20, 40]]  # 40.5: even


@pytest.mark.report
@pytest.mark.parametrize("S, rows, patch, top, left, side", [
    # A patch of 4 pixels with its neighbours is 12 x 12. Patch 27 is in row 3 and column 3, so the
    # cut begins with row 2 and column 2: at pixel 8. At a border it is moved inside.
    (32, 8, 27, 8, 8, 12), (32, 8, 0, 0, 0, 12), (32, 8, 63, 20, 20, 12),
    # A patch of 8 pixels is shown in a quarter of 224, 56 pixels: 24 on each side of it.
    (224, 28, 10 * 28 + 20, 80 - 24, 160 - 24, 56)])
def test_cut_outs_by_hand(S, rows, patch, top, left, side):
    """A patch is in the middle of its cut-out, which stays inside of the image."""
    image = torch.arange(3 * S * S).view(3, S, S)
    cut = cut_out(image, patch, (0, rows, rows))
    assert torch.equal(cut, image[:, top:top + side, left:left + side])


@pytest.mark.report
@pytest.mark.parametrize("rows, kind, look", [(64, "PNG", "pixels"), (65, "JPEG", None)])
def test_a_picture_of_many_pixels_is_a_jpeg(rows, kind, look):
    """A photograph as a PNG would be five times as long. Few pixels are shown with hard edges."""
    pixels = torch.tensor([10, 100, 200], dtype=torch.uint8).view(3, 1, 1).expand(3, rows, 40)
    page = Page(picture(pixels))
    [image] = page.pictures()
    assert (image.format, image.size) == (kind, (40, rows))
    assert image.getpixel((0, 0)) == pytest.approx((10, 100, 200), abs=3 if kind == "JPEG" else 0)
    assert page.all("img")[0].attributes.get("class") == look


@pytest.mark.report
def test_a_heat_table_by_hand():
    """A cell per value, rows down and columns across, as blue as it is near to the top."""
    page = Page(heat(torch.tensor([[0.0, 0.5], [0.13, 0.25]]), 0.5, ["r0", "r1"]))
    assert page.texts("th") == ["", "0", "1", "", ""] and page.texts("bdi") == ["r0", "r1"]
    assert page.texts("td") == ["0.00", "0.50", "0.13", "0.25"]
    strengths = [style["--blue"] for style in page.styles("td")]
    assert strengths == ["0%", "80%", "21%", "40%"]  # 0.8 * value / 0.5


@pytest.mark.report
@pytest.mark.parametrize("rows", [1000, 1001])
def test_a_large_table_becomes_a_picture(rows):
    """More than 2,000 values are one pixel each: 1,000 classes of two experts are still a table."""
    values = torch.zeros(rows, 2)
    values[:, 1] = 0.5
    page = Page(heat(values, 0.5, range(rows)))
    assert len(page.all("td")) == (2000 if rows == 1000 else 0)
    for image in page.pictures():
        assert image.size == (2, 1001)
        assert sum(image.getpixel((1, 500))) > sum(image.getpixel((0, 500))) + 30


@pytest.mark.report
def test_a_curve_by_hand():
    """A curve from 0 to 1 goes from the corner of the axes to the opposite one. [] has no point."""
    page = Page(plot([[(1, 0), (2, 0.5), (3, 1)], []], [(1, 2, 3), (4, 5, 6)]))
    assert page.curves() == [["36.0,140.0", "175.0,75.0", "314.0,10.0", "314.0,10.0"], []]
    strokes = [line.attributes["stroke"] for line in page.all("polyline")]
    assert strokes == ["gray"] * 3 + ["rgb(1 2 3)", "rgb(4 5 6)"]
    assert page.texts("text") == ["1", "3", "1"]  # below the ends of the axis, and at the top


@pytest.mark.report
def test_a_curve_with_a_gap_and_one_of_a_single_point():
    """A missing epoch is bridged. One point is drawn twice in its place: SVG makes that a dot."""
    page = Page(plot([[(1, 8), (4, 2)], [(2, 4)]], [(1, 2, 3), (4, 5, 6)], middle=2))
    # Epoch 2 is a third of 278 pixels to the right of 36. 8 is the top, 130 pixels high.
    gap, dot = page.curves()
    assert gap[:2] == ["36.0,10.0", "314.0,107.5"] and dot == ["128.7,75.0"] * 2
    _, middle, _, _, dot = [line.attributes for line in page.all("polyline")]
    assert middle["points"] == "36.0,107.5 314.0,107.5"
    assert dot["stroke-linecap"] == "round", "else a dot has no size"


@pytest.mark.report
def test_a_thousand_epochs_are_few_points():
    """A curve has about a point per two pixels, the last one among them."""
    [points] = Page(plot([[(n, n) for n in range(1, 1001)]], [(1, 2, 3)])).curves()
    assert 100 <= len(points) <= 160 and points[-1] == "314.0,10.0"


# ---------------------------------------------------------------- figures

LOG = [dict(epoch=1, val_loss=4.0, top1=10, load=[[1, 0], [0.75, 0.25]], train_loss=2.0),
       dict(epoch=2, val_loss=1.0, top1=40),  # trained before an interruption
       dict(epoch=3, val_loss=2.0, top1=20, load=[[1, 0], [0.5, 0.5]], train_loss=1.0)]


def two_layers():
    """A Run of two layers on 2 x 2 patches: expert 0 has all of the first, 5/8 of the second."""
    first = layer_of([[0, 0, 0, 0], [0, 0, 0, 0]], (0, 2, 2), block=1)
    second = layer_of([[0, 0, 1, 1], [0, 0, 0, 1]], (0, 2, 2), block=3)
    return run_of(2, data_of([0, 1], ["ant", "bee"]), first, second, log=LOG)


def at(points, top, last):
    """Where plot() puts points (x, y), as in test_a_curve_by_hand."""
    return [f"{36 + 278 * (x - 1) / (last - 1):.1f},{140 - 130 * y / top:.1f}" for x, y in points]


@pytest.mark.report
def test_training_curves_show_the_log():
    """Every point is the number of its epoch. An epoch, or a curve, without numbers is left out."""
    page = Page(draw_training(two_layers(), "loss"))
    validation, ema, training = page.curves()
    assert validation[:-1] == at([(1, 4), (2, 1), (3, 2)], 4, 3)  # the last is there twice
    assert ema == [] and training[:-1] == at([(1, 2), (3, 1)], 4, 3)
    assert page.text.endswith(" validation 2 training 1"), "a legend with the last values"
    colours = [line.attributes["stroke"] for line in page.all("polyline")[3:]]
    assert [style["background"] for style in page.styles("i")] == [colours[0], colours[2]]


@pytest.mark.report
def test_balance_curves_are_those_of_the_layer():
    """Each expert has a curve of its share in this layer per epoch, and 1/E is a line."""
    run = two_layers()
    page = Page(draw_balance(run, run.layers[1]))
    expected = [at([(1, 0.75), (3, 0.5)], 0.75, 3), at([(1, 0.25), (3, 0.5)], 0.75, 3)]
    assert [curve[:-1] for curve in page.curves()] == expected
    even = page.all("polyline")[1].attributes["points"].split()
    assert even == at([(1, 0.5), (3, 0.5)], 0.75, 3)


@pytest.mark.report
def test_pictures_are_tinted_by_the_experts_of_their_own_image():
    """First the image as the model sees it, then one picture per layer, each patch in its place."""
    layers = [layer_of([[0, 0, 0, 0], experts], (0, 2, 2), block)
              for block, experts in ((1, [0, 1, 1, 2]), (3, [2, 2, 0, 0]))]
    data = data_of([0, 1], ["ant", "bee"], [[0] * 16, [*range(0, 160, 10)]], side=4)
    page = Page(draw_pictures(run_of(3, data, *layers, shown={1: [["bee", 0.9]]}), 1))
    assert [text for text in page.texts("div") if text] == ["image", "block 1", "block 3"]
    image, *tinted = page.pictures()
    for row in range(4):
        for column in range(4):
            rgb = image.getpixel((column, row))
            assert rgb == tuple(data.images[1, :, row, column].tolist())
            grey = 0.2989 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]  # ITU-R 601
            patch = row // 2 * 2 + column // 2
            for layer, shown in zip(layers, tinted, strict=True):
                colour = palette(3)[layer.experts[1, patch]]
                for found, channel in zip(shown.getpixel((column, row)), colour):
                    assert abs(found - 0.4 * grey - 0.6 * channel) <= 1


@pytest.mark.report
@pytest.mark.parametrize("label, verdict", [(0, "right: "), (1, "wrong: ")])
def test_a_picture_says_whether_the_answer_is_right(label, verdict):
    """The title is the class of the image, and below is the best answer with its probability."""
    answers = [["ant", 0.625], ["bee", 0.375]]
    page = Page(draw_pictures(run_of(0, data_of([label], ["ant", "bee"]), shown={0: answers}), 0))
    assert page.texts("bdi")[0] == ["ant", "bee"][label]
    assert page.text.endswith(f"{verdict}ant 62.5%")


@pytest.mark.report
def test_load_has_one_scale_for_all_layers():
    """Bars are shares over the largest of any layer, here 1, and the line is at 1/E = 0.5."""
    run = two_layers()
    page = Page(draw_load(run, run.layers[1]))
    assert page.text == "block 30: 62.5%1: 37.5%"
    assert [style["--length"] for style in page.styles("div")] == ["62.50%", "37.50%"]
    assert [style["--line"] for style in page.styles("div")] == ["50.00%", "50.00%"]


@pytest.mark.report
def test_maps_by_hand():
    """A map's full colour is the most that any position chooses any expert; 0 is dark."""
    run = two_layers()
    page = Page(draw_where(run, run.layers[1]))
    # Expert 0: both images in the upper row, one at the lower left, none at the lower right.
    # Its colour is 230, 159, 0, and half of it from 40 is 135, 99.5 (rounded to even), 20.
    first, _ = page.pictures()
    colours = [first.getpixel((x, y)) for y in (0, 1) for x in (0, 1)]
    assert colours == [(230, 159, 0), (230, 159, 0), (135, 100, 20), (40, 40, 40)]
    assert page.text.endswith("full colour: 100% of the images")


@pytest.mark.report
def test_amounts_by_hand():
    """The curve of an expert goes through its share of images with at most 1, 2, ... patches."""
    run = two_layers()
    # Expert 0 of the second layer gets 2 patches of an image, and 3 of the other. Expert 1: 2, 1.
    first, second = Page(draw_amount(run, run.layers[1])).curves()
    assert first[:-1] == at([(1, 0), (2, 0.5), (3, 1), (4, 1)], 1, 4)
    assert second[:-1] == at([(1, 0.5), (2, 1), (3, 1), (4, 1)], 1, 4)
    assert Page(draw_amount(run, run.layers[0])).curves()[1] == [], "never chosen"


@pytest.mark.report
def test_classes_have_one_scale_for_all_layers():
    """Cells are shares of a class's patches over the largest of any layer, here 100%."""
    run = two_layers()
    page = Page(draw_classes(run, run.layers[1]))
    assert page.texts("bdi") == ["block 3", "ant", "bee"]
    assert [style["--blue"] for style in page.styles("td")] == ["40%", "40%", "60%", "20%"]
    assert page.text.endswith("0.500.500.750.25full colour: 100% of a class".replace("0.750", "bee0.750"))


@pytest.mark.report
def test_similarities_by_hand():
    """Two experts that share their images by 2 to 2 and 3 to 1 patches: 2 (2 + 1) / (5 + 3)."""
    run = two_layers()
    page = Page(draw_similarity(run, run.layers[1]))
    assert page.texts("td") == ["1.00", "0.75", "0.75", "1.00"]
    assert page.styles("td")[1] == {"--blue": "60%"}  # 0.8 * 0.75


@pytest.mark.report
def test_surest_patches_are_cut_out_of_their_images():
    """An expert's cut-outs stand side by side, surest first, below its two largest classes."""
    layer = layer_of([[0] * 64] * 3, (0, 8, 8), nats=[[0.5] * 64, [0.3] * 64, [0.4] * 64])
    data = data_of([0, 1, 1], ["ant", "bee"], [[10] * 1024, [20] * 1024, [30] * 1024], side=32)
    run = run_of(2, data, layer, images=[0, 2, 1])
    page = Page(draw_surest(run, run.layers[0]))
    [strip] = page.pictures()
    assert strip.size == (36, 12)  # cut-outs of 12 x 12, see test_cut_outs_stay_inside
    assert [strip.getpixel((x, 0))[0] for x in (0, 12, 24)] == [30, 20, 10]
    assert page.text == "block 1 0: bee 67%, ant 33% 1: never chosen"


# ---------------------------------------------------------------- the report and the files


ALL = "training balance pictures load where amount classes similarity surest"


def headings(page):
    """The figures on a page, by their headings: "training balance ..." for draw_training(), ..."""
    names = {draw.__doc__.split("\n")[0]: draw.__name__ for draw in FIGURES}
    return " ".join(names[text].removeprefix("draw_") for text in page.texts("h2"))


@pytest.mark.report
@pytest.mark.parametrize("E, classes, grids", [
    (1, 1, [(0, 2, 2)]), (64, 3, [(1, 2, 2)]), (200, 2, [(0, 2, 2)]), (4, 1000, [(0, 2, 2)]),
    (3, 4, [(0, 4, 4), (0, 2, 2)])])
def test_the_report_has_a_panel_per_layer_and_picture(E, classes, grids):
    """From 1 to 200 experts and to 1,000 classes: well-formed, and all figures are there."""
    M = min(classes, 10)
    layers = []
    for block, (extra, rows, columns) in enumerate(grids):
        choices = torch.randint(0, E, (M, extra + rows * columns)).tolist()
        layers.append(layer_of(choices, grids[block], block))
    log = dict(epoch=1, val_loss=1.0, top1=0.0, load=[[1 / E] * E] * len(grids))
    data = data_of(list(range(M)), [f"class {i}" for i in range(classes)], side=4)
    run = run_of(E, data, *layers, log=[log], shown={0: [["class 0", 0.5]]})
    page = Page(report_html(run, "spec"))
    assert headings(page) == ALL
    # Per layer: balance, load, map, amounts, classes, similarity, surest. Three of training.
    assert len(page.all("figure")) == 7 * len(grids) + 3 + 1
    assert len(page.all("span")) == E, "a legend"


@pytest.mark.report
def test_the_report_says_what_it_is_about():
    """Above the figures: checkpoint, configuration, data, accuracy and share of the experts."""
    run = two_layers()._replace(config=dict(model="vit_nano", k=2))
    text = " ".join(Page(report_html(run, "spec")).text.split())
    assert "a.pt: model=vit_nano k=2. Images of spec. Top-1: 50.00% of 2." in text
    assert "Routed experts do 40% of the multiply-adds." in text


@pytest.mark.report
def test_the_caption_of_a_figure_is_its_docstring():
    """The report says above each figure what its function's docstring says."""
    run = two_layers()._replace(shown={0: [["ant", 0.5]]})
    page = Page(report_html(run, "spec"))
    said = " ".join(page.text.split())
    for draw in FIGURES:
        heading, caption = draw.__doc__.split("\n", 1)
        assert heading in page.texts("h2") and " ".join(caption.split()) in said


@pytest.mark.report
def test_without_a_log_its_figures_are_left_out():
    """A checkpoint from before its first epoch has no curves, of training or of balance."""
    run = two_layers()._replace(log=[], shown={0: [["ant", 0.5]]})
    page = Page(report_html(run, "spec"))
    assert headings(page) == ALL.removeprefix("training balance ")


@pytest.mark.report
def test_the_overview_by_hand():
    """A row per measure, a column per layer; in brackets what chance alone would tell."""
    layer = layer_of([[0, 1], [0, 1]], (0, 1, 2), nats=[[math.log(2), 0.0]] * 2)
    run = run_of(2, data_of([0, 1], ["ant", "bee"]), layer, layer._replace(block=3))
    rows = [["block", "1", "3"], ["grid", "1x2", "1x2"], ["experts per image", "2.00", "2.00"],
            ["router, bits", "0.50", "0.50"], ["load, CV", "0.00", "0.00"],
            # Both experts follow the position alone, as in test_chance_of_positions_by_hand.
            ["class", "0.00 (0.00)", "0.00 (0.00)"], ["position", "1.00 (0.00)", "1.00 (0.00)"]]
    assert overview(run) == rows
    cells = Page(report_html(run, "spec")).texts("td")
    assert cells[:21] == sum(rows, []), "the page's first table"


@pytest.mark.report
def test_names_are_only_text():
    """Names with markup in them are shown and not obeyed, and the page loads nothing."""
    name, other = "<script>alert(1)</script>", "a' onload='x"
    run = run_of(2, data_of([0, 1], [name, other]), layer_of([[0, 1], [1, 1]], (0, 1, 2)),
                 path=name, config={"model": name}, shown={0: [[name, 0.5]], 1: [[other, 0.5]]})
    page = Page(report_html(run, name))
    assert page.all("script") == []
    # Path, model, data, title and answer of a picture, a row of classes, and the top of an expert.
    assert page.text.count(name) >= 7
    for element in page.elements:
        assert not {"onload", "href"} & set(element.attributes)
        assert element.attributes.get("src", "data:image/").startswith("data:image/")


@pytest.mark.report
def test_names_of_any_characters(tmp_path):
    """Chinese, Arabic, emojis, control characters and bytes that are no UTF-8 can be written."""
    names = ["猫", "العربية", "🐦 bird", "a\x01b\nc", os.fsdecode(b"caf\xe9")]
    shown = {m: [[name, 0.5]] for m, name in enumerate(names)}
    run = run_of(2, data_of(range(5), names), layer_of([[0, 1]] * 5, (0, 1, 2)), shown=shown)
    write_files(tmp_path, run, names[4])
    titles = Page((tmp_path / "report.html").read_text("utf-8")).texts("bdi")
    assert {*names[:4], r"caf\udce9"} <= set(titles)
    table = io.StringIO((tmp_path / "routing.csv").read_text("utf-8-sig"), newline="")
    assert {*names[:4], r"caf\udce9"} <= {row[2] for row in csv.reader(table)}
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert [name for name, _ in summary["layers"][0]["top_classes"][0]] == names


@pytest.mark.report
def test_routing_csv_by_hand():
    """One row per layer, class and expert; a class without images has 0 patches, a share of 0."""
    layer = layer_of([[0, 0, 0, 1], [1, 1, 1, 1]], (0, 2, 2), block=5)
    text = routing_csv(run_of(2, data_of([0, 2], ["a,b", "empty", "c"]), layer))
    assert text[0] == "\ufeff", "without this mark Excel shows café wrong"
    rows = list(csv.reader(io.StringIO(text[1:], newline="")))
    assert rows == [["layer", "block", "class", "expert", "tokens", "share"],
                    ["0", "5", "a,b", "0", "3", "0.750000"],
                    ["0", "5", "a,b", "1", "1", "0.250000"],
                    ["0", "5", "empty", "0", "0", "0.000000"],
                    ["0", "5", "empty", "1", "0", "0.000000"],
                    ["0", "5", "c", "0", "0", "0.000000"],
                    ["0", "5", "c", "1", "4", "1.000000"]]


@pytest.mark.report
def test_summary_is_json_without_nan(tmp_path):
    """Other programs read summary.json: NaN is no JSON. Unused experts and classes are in it."""
    run = run_of(8, data_of([0], ["a", "empty"]), layer_of([[0, 1]], (0, 1, 2)))
    write_files(tmp_path, run, "spec")
    text = (tmp_path / "summary.json").read_text("utf-8")
    summary = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert summary.pop("layers") == [dict(layer=0) | run.layers[0].numbers]
    assert summary == dict(checkpoint="a.pt", model=dict(model="by_hand"), data="spec", images=1,
                           top1=50.0, routed_share=0.4)


@pytest.mark.report
def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    """When the disk is full the old file stays as it was."""
    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_files(tmp_path, two_layers(), "spec")
    assert (tmp_path / "report.html").read_text() == "old"


# ---------------------------------------------------------------- command line


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Saves untrained checkpoints in an empty folder, which becomes the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("eval.VAL_IMAGES", 100)

    def save(name, log=(), args=(), **options):
        config = dict(model="convnext_nano", num_classes=16, num_experts=4) | options
        model = build_model(config).state_dict()
        usual = dict(image_size=32, crop_ratio=1.0, mean=MEAN, std=STD, ema={}, optimizer={},
                     epoch=1, step=1, best=0.0, args=dict(args), log=list(log))
        torch.save(usual | dict(config=config, classes=DRAWN["shapes"][1], model=model), name)
        return name
    return save


def run_main(*argv):
    """python inspect_experts.py ARGV in this process: the summary.json and the page of out/."""
    inspect_experts.main(parse_args(["--out", "out", "--workers", "0", *argv]))
    summary, page = Path("out/summary.json"), Path("out/report.html")
    return json.loads(summary.read_text("utf-8")), Page(page.read_text("utf-8"))


def save_pictures(*paths):
    """Save small pictures of different colours."""
    for i, path in enumerate(paths):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.new("RGB", (40, 36), (4 * i, 100, 50)).save(path)


@pytest.mark.report
@pytest.mark.parametrize("options, blocks, grids", [
    (dict(model="vit_nano", moe_layers="every2", k=2), [1, 3], [[4, 4]] * 2),
    (dict(moe_layers="every2", k=1), [1, 3, 6], [[8, 8], [4, 4], [2, 2]])])
def test_one_command_writes_everything(checkpoint, options, blocks, grids):
    """A ViT with k = 2 and a ConvNeXt with three grids: the files say what they are about."""
    path = checkpoint("a.pt", **options)
    summary, page = run_main(path, "--data", "shapes", "--max-images", "40")
    assert sorted(os.listdir("out")) == ["report.html", "routing.csv", "summary.json"]
    assert (summary["images"], summary["data"], summary["checkpoint"]) == (40, "shapes", "a.pt")
    assert summary["model"]["model"] == options.get("model", "convnext_nano")
    assert [layer["block"] for layer in summary["layers"]] == blocks
    assert [layer["grid"] for layer in summary["layers"]] == grids
    known = {"class", "object", "shape", "texture", "colour", "position"}
    assert set(summary["layers"][0]["information"]) == known
    assert page.texts("div").count("image") == 8, "examples"


@pytest.mark.report
def test_what_is_printed(checkpoint, capsys):
    """First the accuracy and the share of the experts, then the overview as a table."""
    summary, _ = run_main(checkpoint("a.pt", moe_layers="last2"), "--data", "shapes")
    written, first, *lines = capsys.readouterr().out.splitlines()
    assert written == "written to out/: report.html, routing.csv, summary.json"
    assert first == (f"a.pt: top-1 {summary['top1']:.2f}% of 100 images; "
                     f"{summary['routed_share']:.0%} of the multiply-adds are those of routed "
                     f"experts")
    table = {line[:18].strip(): line[18:].split() for line in lines}
    layers = summary["layers"]
    assert table["block"] == [str(layer["block"]) for layer in layers]
    assert table["experts per image"] == [f"{layer['experts_per_image']:.2f}" for layer in layers]
    for name in layers[0]["information"]:
        found = [layer["information"][name]["normalized"] for layer in layers]
        assert table[name][::2] == [f"{value:.2f}" for value in found]


@pytest.mark.report
@pytest.mark.parametrize("k", [1, 2])
def test_the_routed_share_by_hand(checkpoint, k):
    """The experts' multiply-adds over all those of one image, for a ViT of width D = 32."""
    options = dict(model="vit_pico", moe_layers="last2", num_experts=4, k=k)
    path = checkpoint("a.pt", **options)
    summary, _ = run_main(path, "--data", "shapes", "--max-images", "1")
    # 16 patches of 3 * 8 * 8 values, T = 17 tokens with the class token, H = 4 D, 16 classes.
    T, D = 17, 32
    mlp = T * 2 * D * 4 * D
    attention = T * D * 3 * D + T * D * D + 2 * T * T * D  # q, k and v; output; scores and mix
    routers = 2 * T * D * 4
    total = 16 * 192 * D + 4 * attention + 2 * mlp + routers + 2 * k * mlp + D * 16
    assert summary["routed_share"] == 2 * k * mlp / total


@pytest.mark.report
def test_the_log_inside_a_checkpoint_is_drawn(checkpoint):
    """Training curves and balance come from the checkpoint itself: no other file is needed."""
    line = dict(epoch=1, val_loss=1.5, train_loss=1, balance_loss=0.5, top1=3,
                load=[[0.25] * 4] * 2)
    _, page = run_main(checkpoint("a.pt", [line], moe_layers="last2"), "--data", "shapes")
    assert headings(page) == ALL and "validation 1.5" in page.text


@pytest.mark.report
def test_what_the_model_was_trained_on_is_left_out(checkpoint):
    """Of a flat folder that a checkpoint was trained on only the held-out fifth is inspected."""
    files = [f"circle-plain/{i}.png" for i in range(5)]
    save_pictures(*(f"images/{file}" for file in files), *(f"other/{file}" for file in files))
    path = checkpoint("a.pt", args=dict(data="images"), moe_layers="last2")
    asked = [("./images/", []), ("images", ["--split", "all"]), ("other", [])]
    found = [run_main(path, "--data", data, *flags)[0]["images"] for data, flags in asked]
    assert found == [1, 5, 5]


@pytest.mark.report
@pytest.mark.parametrize("data", ["images", "images/circle-plain/2.png"])
def test_an_image_that_cannot_be_read_is_named(checkpoint, data):
    """Numbers without an image would not be comparable, and own pictures would lack an answer."""
    save_pictures("images/circle-plain/1.png")
    Path("images/circle-plain/2.png").write_bytes(b"no picture")
    path = checkpoint("a.pt", moe_layers="last2")
    with pytest.raises(ValueError, match="cannot read 1 files: images/circle-plain/2.png"):
        run_main(path, "--data", data)
    assert os.listdir("out") == []


@pytest.mark.report
@pytest.mark.parametrize("argv, error, message", [
    (["a.pt", "--data", "shapes", "--out", "a.pt"], OSError, "a.pt"),
    (["a.pt", "--data", "shapes", "--out", "/proc/out"], OSError, "/proc/out"),
    (["missing.pt", "--data", "shapes"], ValueError, "missing.pt is not a checkpoint"),
    (["a.pt", "--data", "nowhere"], ValueError, "no folder 'nowhere'"),
    (["a.pt", "--data", "zoo"], ValueError, "1 of 1 classes .* unknown to the checkpoint .zebra")])
def test_refusals_come_before_any_work(checkpoint, monkeypatch, argv, error, message):
    """What cannot be done is said in one line, before an image is read or a file is written."""
    checkpoint("a.pt", moe_layers="last2")
    save_pictures("zoo/zebra/1.png")
    monkeypatch.setattr(inspect_experts, "predict", lambda *args: pytest.fail("it worked"))
    with pytest.raises(error, match=message) as found:
        run_main(*argv)
    assert "\n" not in str(found.value)
    assert not os.path.exists("out") or os.listdir("out") == []


@pytest.mark.report
def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    """A folder of somebody else: one line says so, before the checkpoint is looked for."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--out out cannot be written: choose another folder"):
        run_main("missing.pt", "--data", "shapes")


@pytest.mark.report
@pytest.mark.parametrize("flags, message", [
    ("--out out", "required: --data"), ("--data shapes", "required: --out"),
    *((f"--data shapes --out out {flag} {least - 1}", f"argument {flag}: expected int in [{least},")
      for flag, least in (("--max-images", 1), ("--examples", 0), ("--batch-size", 1)))])
def test_flags_that_cannot_be(flags, message, capsys):
    """The parser says what is missing or out of range, with status 2."""
    with pytest.raises(SystemExit, match="2"):
        parse_args(["a.pt", *flags.split()])
    assert message in capsys.readouterr().err


@pytest.mark.report
@pytest.mark.parametrize("options", [dict(moe_layers="last2"), {}])
@pytest.mark.parametrize("data", ["own", "own/photo 01.png"])
def test_own_pictures(checkpoint, capsys, options, data):
    """Without classes there are the five best with their probabilities, and the routing."""
    files = [f"own/photo {i:02}.png" for i in range(3)]
    save_pictures(*files)
    path = checkpoint("a.pt", [dict(epoch=1, top1=3)], **options)
    summary, page = run_main(path, "--data", data)
    assert sorted(os.listdir("out")) == ["report.html", "summary.json"]
    assert headings(page) == "pictures"
    assert "top1" not in summary and "Top-1" not in page.text
    shown = files if data == "own" else [data]
    assert len(page.pictures()) == len(shown) * (1 + len(summary["layers"]))
    assert len(summary["layers"]) == (2 if options else 0)

    model, saved = load_checkpoint(path, CPU)
    printed = capsys.readouterr().out.splitlines()[2:]
    for file, line in zip(shown, printed, strict=True):
        image = eval_transform(32, 1.0)(read_image(file)).unsqueeze(0)
        with torch.no_grad():
            probs = model(normalize(image, MEAN, STD)).softmax(1)[0].tolist()
        best = sorted(zip(probs, saved["classes"]), reverse=True)[:5]
        told = [f"{name} {p:.1%}" for p, name in best]
        assert line == f"{file}: {', '.join(told)}"
        assert os.path.basename(file) in page.texts("bdi") and "".join(told) in page.text


@pytest.mark.report
def test_at_most_fifty_pictures(checkpoint, capsys):
    """More than 50 own pictures would be a page that nobody reads: 50 are shown, all count."""
    save_pictures(*(f"own/{i:02}.png" for i in range(52)))
    summary, page = run_main(checkpoint("a.pt"), "--data", "own")
    _, first, *lines = capsys.readouterr().out.splitlines()
    assert first == "50 of 52 pictures, their best classes:"
    assert len(lines) == len(page.all("figure")) == 50 and summary["images"] == 52


@pytest.mark.report
def test_a_dense_checkpoint_has_a_report(checkpoint, capsys):
    """Training and pictures are what a model without experts has."""
    path = checkpoint("dense.pt", [dict(epoch=1, val_loss=1, top1=3)])
    summary, page = run_main(path, "--data", "shapes")
    assert sorted(os.listdir("out")) == ["report.html", "summary.json"]
    assert summary["layers"] == [] and summary["routed_share"] == 0
    assert headings(page) == "training pictures"
    _, first = capsys.readouterr().out.splitlines()
    assert first.startswith(f"dense.pt: top-1 {summary['top1']:.2f}% of 100 images; 0% of the")
