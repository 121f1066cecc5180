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
from torchvision.transforms.functional import pil_to_tensor

import inspect_experts
from checks import drawn, save_checkpoint
from eval import (DRAWN, MEAN, STD, TensorImages, eval_transform, load_checkpoint, match_dataset,
                  normalize, read_image)
from inspect_experts import (
    BLUE, FIGURES, Layer, Run, count_patches, cumulative, cut_out, describe, draw_amount,
    draw_balance, draw_classes, draw_load, draw_pictures, draw_similarity, draw_surest,
    draw_training, draw_where, heat, inspect, known_factors, mutual_information, overlay,
    overview, palette, parse_args, picture, plot, report_html, routing_csv, similarity, store,
    surest_patches, top_classes, write_files)
from moe import Routing

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
    one_bit = [9.0] * grid[0] + [math.log(2)] * (grid[1] * grid[2])  # but the class token
    return Layer(block, grid, experts, torch.tensor(nats or [one_bit] * len(choices)))


def images_of(labels, names, red=None, side=2):
    """A data set of grey images, or with such red values: for each image those of its pixels."""
    images = torch.full((len(labels), 3, side, side), 100, dtype=torch.uint8)
    if red:
        images[:, 0] = torch.tensor(red).view(-1, side, side)
    return TensorImages(images, torch.tensor(labels), names)


def data_of(labels, names, red=None, side=2):
    """Such images, matched with a checkpoint of the same classes."""
    return match_dataset(images_of(labels, names, red, side), names)


def drawn_data(name, count):
    """The first pictures of `shapes` or `flags`, matched in the same way."""
    data = drawn(name, count, transform=lambda images: images)
    return match_dataset(data, data.classes)


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
def test_cumulative_distribution_by_hand():
    """Of the images that use an expert: which share sends it at most 1, 2, 3, 4 patches."""
    # Expert 0 gets 1, 3, 1 and 0 patches: of three images two send at most 1 or 2, and all at
    # most 3. Expert 1 gets 3, 1, 3 and 4. No image uses expert 2.
    curves = cumulative(torch.tensor([[1, 3, 0], [3, 1, 0], [1, 3, 0], [0, 4, 0]]), 4)
    assert_close(curves[:2], [[2 / 3, 2 / 3, 1.0, 1.0], [1 / 4, 1 / 4, 3 / 4, 1.0]])
    assert curves[2] is None


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
    assert_close(nats, torch.tensor([[0, math.log(2), 1.5 * math.log(2)]] * 2))  # 1, 1.5 bits
    assert experts.element_size() + nats.element_size() == 6, "bytes per patch, says the docstring"


@pytest.mark.statistics
@pytest.mark.parametrize("name, value, choices, E, grid", [
    ("experts_per_image", (1 + 2 + 4) / 3, [[3] * 4, [0, 1, 1, 0], [0, 1, 2, 3]], 4, (0, 2, 2)),
    ("share", [0.75, 0.25], [[0, 0, 1, 0]], 2, (0, 2, 2)),
    # 3/4 and 1/4 have a standard deviation of 1/4 around a mean of 1/2.
    ("coefficient_of_variation", 0.5, [[0, 0, 1, 0]], 2, (0, 2, 2)),
    # Of two images with 2 x 3 patches the second leaves expert 0 one patch earlier.
    ("spatial", [[[1, 0.5, 0], [0, 0, 0]], [[0, 0.5, 1], [1, 1, 1]]],
     [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]], 2, (0, 2, 3)),
    ("class_token_share", None, [[0, 0]], 2, (0, 1, 2)),  # a ConvNeXt has none
    # A ViT's class token, the first of an image, counts here and nowhere else.
    ("class_token_share", [0, 0.5, 0.5], [[2, 0, 0], [1, 0, 0]], 3, (1, 1, 2)),
    ("router_entropy_bits", 1.0, [[2, 0, 0], [1, 0, 0]], 3, (1, 1, 2)),  # as layer_of() says
    ("experts_per_image", 1, [[2, 0, 0], [1, 0, 0]], 3, (1, 1, 2)),
    # Image 0 sends one patch to each, image 1 both to expert 1: 2 min(1, 1) / (1 + 3).
    ("similarity", [[1, 0.5], [0.5, 1]], [[0, 0, 1], [0, 1, 1]], 2, (1, 1, 2)),
    ("patches_per_image_cdf", [[1, 1], [0.5, 1]], [[0, 0, 1], [0, 1, 1]], 2, (1, 1, 2))])
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


@pytest.mark.statistics
@pytest.mark.parametrize("name, side, factors", [
    ("shapes", 8, ["class", "object", "shape", "texture", "colour"]),
    ("flags", 4, ["class", "object", "part", "colour"])])  # parts: three stripes
def test_known_factors_by_plain_loops(name, side, factors):
    """A patch that mostly shows the object has the factors of the part with most of its pixels."""
    data, images, pixels = drawn_data(name, 8), [4, 0, 7, 1], 32 // side
    found = known_factors(data, images, (0, side, side))
    assert list(found) == factors
    for m, image in enumerate(images):
        assert found["class"][0][m] == data.labels[image]
        for n in range(side * side):
            top, left = n // side * pixels, n % side * pixels
            patch = data.masks[image, top:top + pixels, left:left + pixels]
            counts = [(patch == part).sum().item() for part in (1, 2, 3)]
            shown, part = sum(counts) > pixels * pixels / 2, counts.index(max(counts))
            expected = {"object": int(shown), "part": part if shown else -1}
            for factor in ("shape", "texture", "colour"):
                value = data.factors.get(factor, data.labels)[image].expand(3)[part]
                expected[factor] = value if shown else -1
            for factor in factors[1:]:
                assert found[factor][0][m, n] == expected[factor]


@pytest.mark.statistics
def test_experts_that_follow_the_object_are_found():
    """Experts for background and object have an information of 1 with `object`, 0 with shape."""
    data, images = drawn_data("shapes", 200), list(range(200))
    on_object, _ = known_factors(data, images, (0, 8, 8))["object"]
    described = describe(layer_of(on_object.tolist(), (0, 8, 8)), data, images, 2)
    found = described.numbers["information"]
    assert_close(found["object"]["normalized"], 1.0)
    assert found["shape"]["bits"] == 0, "on the object there is one expert only"
    by_chance = found["object"]["normalized_by_chance"]
    assert 0.2 < by_chance < 0.8, "objects are in the centre: the position alone tells something"


# ---------------------------------------------------------------- one pass over the images

class RedDecides(nn.Module):
    """A stub: each pixel is a patch, its red value is its expert, and the first is the class."""

    def __init__(self, num_experts, num_classes):
        super().__init__()
        self.num_experts, self.num_classes, self.seen = num_experts, num_classes, 0
        self.grids, self.moe_blocks = [(0, 2, 2)], [1]

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
        model, data = model(E, len(names)), images_of(labels, names, red)
        checkpoint = dict(config={}, classes=names, image_size=2, crop_ratio=1.0, mean=MEAN,
                          std=STD, args={})
        monkeypatch.setattr(inspect_experts, "load_checkpoint", lambda path: (model, checkpoint))
        monkeypatch.setattr(inspect_experts, "open_dataset", lambda *args: data)
        monkeypatch.setattr(inspect_experts, "count_flops", lambda *args: 1)
        usual = ["stub.pt", "--data", "red", "--out", "out", "--batch-size", "2"]
        run = inspect("stub.pt", parse_args([*usual, *flags]), torch.device("cpu"))
        assert model.seen == len(run.images), "each image passes the model once"
        return run
    return inspect_red


@pytest.mark.report
@pytest.mark.parametrize("count, flags, images, shown", [
    # Folders come class by class: --max-images does not take the first ones.
    (9, "--max-images 3 --examples 1", [0, 3, 6], [1]),
    (6, "--examples 2", range(6), [1, 4]),  # the middles of 0, 1, 2 and of 3, 4, 5
    (15, "--examples 8", range(15), [0, 2, 4, 6, 8, 10, 12, 14]),
    (1, "--examples 8", [0], [0]),  # once
    (3, "--examples 0", range(3), [])])
def test_images_are_spread_over_the_data(red_run, count, flags, images, shown):
    """n examples are the middles of n equal parts of the images, which are spread over the data."""
    run = red_run([[i] * 4 for i in range(count)], count, [0] * count, ["a"], *flags.split())
    assert run.images == list(images) and list(run.shown) == shown
    assert run.layers[0].experts[:, 0].tolist() == run.images


@pytest.mark.report
def test_examples_have_their_own_answers(red_run):
    """An example's best classes are those of its own image, with their probabilities."""
    red = [[0] * 4, [1] * 4, [1] * 4, [0] * 4]
    run = red_run(red, 2, [0, 0, 1, 1], ["a", "b"], "--examples", "2")
    p = pytest.approx(1 / (1 + math.exp(-3)))  # of logits 3 and 0
    assert run.shown[1][0] == ["b", p] and run.shown[3][0] == ["a", p]


@pytest.mark.report
@pytest.mark.parametrize("logits, probs", [(1, math.nan), (math.nan, 1)])
def test_a_model_that_computes_nan_is_refused(red_run, logits, probs):
    """A checkpoint with broken weights, in a router or elsewhere, gets no report with NaN in it."""
    class Broken(RedDecides):
        def forward(self, images, return_routing):
            good, [routing] = super().forward(images, return_routing)
            return good * logits, [routing._replace(probs=routing.probs * probs)]

    with pytest.raises(ValueError, match="stub.pt: .* numbers that are not finite"):
        red_run([[0, 1, 1, 1]], 2, [0], ["a"], model=Broken)


# ---------------------------------------------------------------- what figures are made of

class Page(HTMLParser):
    """The elements of HTML: .tag, .attributes, .text up to the next tag. All must be closed."""

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
        sources = [img.attributes["src"].partition(";base64,")[2] for img in self.all("img")]
        return [Image.open(io.BytesIO(base64.b64decode(source))) for source in sources]

    def curves(self):
        """The points of each curve, ["x,y", ...], without the gray lines."""
        lines = [line.attributes for line in self.all("polyline")]
        return [line["points"].split() for line in lines if line["stroke"] != "gray"]


@pytest.mark.report
@pytest.mark.parametrize("E", [2, 8, 9, 16, 64, 200])
def test_every_expert_has_its_own_colour(E):
    """No two experts share a colour, and on a grey photograph each tint differs from grey."""
    colours = palette(E)
    assert len(set(colours)) == E
    grey = torch.full((3, E, E), 128, dtype=torch.uint8)
    tinted = overlay(grey, torch.arange(E).expand(E, E), colours)[:, 0].int()  # (3, E)
    assert (tinted.amax(0) - tinted.amin(0)).min() >= 20, "of 255, between two channels"


@pytest.mark.report
def test_a_patch_is_tinted_by_its_expert():
    """The overlay is 0.4 of the grey image and 0.6 of the expert's colour, each patch in place."""
    image = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)
    tinted = overlay(image, torch.tensor([[0, 1], [0, 0]]), [(100, 0, 0), (0, 0, 200)])
    # The grey of pure red is 0.2989 * 255 = 76, and 0.4 * 76 = 30. 0.6 * 100 = 60, 0.6 * 200 = 120.
    red, blue = [90, 30, 30], [30, 30, 150]
    assert tinted[:, 0, 0].tolist() == tinted[:, 2, 1].tolist() == tinted[:, 3, 2].tolist() == red
    assert tinted[:, 1, 3].tolist() == blue


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
    pixels = torch.tensor([10, 100, 200], dtype=torch.uint8).view(3, 1, 1).expand(3, rows, 99)
    page = Page(picture(pixels))
    [image] = page.pictures()
    assert (image.format, image.size) == (kind, (99, rows))
    assert image.getpixel((0, 0)) == pytest.approx((10, 100, 200), abs=3 if kind == "JPEG" else 0)
    assert page.all("img")[0].attributes.get("class") == look


@pytest.mark.report
def test_a_large_table_becomes_a_picture():
    """More than 2,000 values are one pixel each: 1,000 classes of two experts are still a table."""
    values = torch.tensor([[0.0, 0.5]]).expand(1000, 2)
    table = Page(heat(values, 0.5, range(1000)))
    large = Page(heat(values.repeat(1, 50), 0.5, range(1000)))
    assert len(table.all("td")) == 2000 and table.styles("td")[1] == {"--blue": "80%"}
    [image] = large.pictures()
    assert large.all("td") == [] and image.size == (100, 1000)
    assert [image.getpixel((x, 500)) for x in (0, 1)] == [(40, 40, 40), BLUE], "not a JPEG"


@pytest.mark.report
def test_a_curve_by_hand():
    """A curve from 0 to 1 goes from the corner of the axes to the opposite one. [] has no point."""
    curves = [[(1, 0), (2, 0.5), (3, 1)], [], [(2, 0.5)]]
    page = Page(plot(curves, palette(3), middle=0.2))
    middle = "175.0,75.0"
    # The last point is there twice: SVG makes a dot of it, so a single point is seen.
    assert page.curves() == [["36.0,140.0", middle, "314.0,10.0", "314.0,10.0"], [], [middle] * 2]
    lines = [line.attributes for line in page.all("polyline")]
    assert [line["points"].split()[0] for line in lines[:3]] == [  # at 0, 0.2 and the top
        "36.0,140.0", "36.0,114.0", "36.0,10.0"]
    assert lines[3]["stroke"] == "rgb(230 159 0)" and lines[3]["stroke-linecap"] == "round"
    assert page.texts("text") == ["1", "3", "1"]  # below the ends of the axis, and at the top


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
    """A Run of two layers on 2 x 2 patches: expert 0 has 3/4 of the first, 5/8 of the second."""
    first = layer_of([[0, 0, 0, 0], [0, 0, 1, 1]], (0, 2, 2), block=1)
    second = layer_of([[0, 0, 1, 1], [0, 0, 0, 1]], (0, 2, 2), block=3)
    data = data_of([0, 1], ["ant", "bee"])
    return run_of(2, data, first, second, log=LOG, shown={0: [["ant", 0.5]]})


def second_panel(draw):
    """What a figure shows of the second layer."""
    run = two_layers()
    return Page(draw(run, run.layers[1]))


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
@pytest.mark.parametrize("draw, top, middle, last, first, second", [
    # The share of the choices per epoch, see LOG, and the even share 1/E. Epoch 2 is not known.
    (draw_balance, 0.75, 0.5, 3, [(1, 0.75), (3, 0.5)], [(1, 0.25), (3, 0.5)]),
    # The share of the images with at most 1, 2, ... patches. Expert 0 gets 2 of an image, and 3 of
    # the other. Expert 1 gets 2 and 1.
    (draw_amount, 1, 0, 4, [(1, 0), (2, 0.5), (3, 1), (4, 1)], [(1, 0.5), (2, 1), (3, 1), (4, 1)])])
def test_curves_of_experts_are_those_of_the_layer(draw, top, middle, last, first, second):
    """Each expert has a curve of its numbers in this layer, and a line is what to compare with."""
    page = second_panel(draw)
    found = [curve[:-1] for curve in page.curves()]
    assert found == [at(first, top, last), at(second, top, last)]
    line = page.all("polyline")[1].attributes["points"].split()
    assert line == at([(1, middle), (last, middle)], top, last)


@pytest.mark.report
@pytest.mark.parametrize("answer, told", [("bee", "right: bee 62.5%"), ("ant", "wrong: ant 62.5%")])
def test_pictures_are_tinted_by_the_experts_of_their_own_image(answer, told):
    """First the image as the model sees it, then one overlay per layer, and what the answer was."""
    first = layer_of([[0, 1, 2, 2], [0, 0, 0, 0]], (0, 2, 2), block=1)
    later = layer_of([[2], [1]], (0, 1, 1), block=3)
    data = data_of([0, 1], ["ant", "bee"], [[0] * 16, [*range(0, 160, 10)]], side=4)
    run = run_of(3, data, first, later, images=[1, 0], shown={0: [[answer, 0.625]]})
    page = Page(draw_pictures(run, 0))
    assert page.text == f"beeimageblock 1block 3{told}"
    image = data.images[1]
    expected = [image, overlay(image, torch.tensor([[0, 1], [2, 2]]), palette(3)),
                overlay(image, torch.tensor([[2]]), palette(3))]
    for found, pixels in zip(page.pictures(), expected, strict=True):
        assert torch.equal(pil_to_tensor(found), pixels)


@pytest.mark.report
def test_load_has_one_scale_for_all_layers():
    """Bars are shares over the largest of any layer, here 3/4, and so is the line at 1/E = 1/2."""
    page = second_panel(draw_load)
    assert page.text == "block 30: 62.5%1: 37.5%"
    assert [style["--length"] for style in page.styles("div")] == ["83.33%", "50.00%"]
    assert [style["--line"] for style in page.styles("div")] == ["66.67%", "66.67%"]


@pytest.mark.report
def test_maps_by_hand():
    """A map's full colour is the most that any position chooses any expert; 0 is dark."""
    layer = layer_of([[0, 0, 1, 1], [0, 1, 0, 2], [1, 1, 0, 2]], (0, 2, 2))
    run = run_of(3, data_of([0, 0, 0], ["ant"]), layer)
    page = Page(draw_where(run, run.layers[0]))
    # Expert 0: two of three images on the left, one at the upper right, none at the lower right.
    # Its colour is 230, 159, 0, and half of it from 40 is 135, 99.5 (rounded to even), 20.
    colours = [page.pictures()[0].getpixel((x, y)) for y in (0, 1) for x in (0, 1)]
    assert colours == [(230, 159, 0), (135, 100, 20), (230, 159, 0), (40, 40, 40)]
    assert page.text.endswith("full colour: 67% of the images")


@pytest.mark.report
@pytest.mark.parametrize("draw, cells, blues", [
    # Shares of a class's patches, and 80% blue is the largest of any layer: 100%.
    (draw_classes, ["0.50", "0.50", "0.75", "0.25"], ["40%", "40%", "60%", "20%"]),
    # Two experts that share their images by 2 to 2 and 3 to 1 patches: 2 (2 + 1) / (5 + 3).
    (draw_similarity, ["1.00", "0.75", "0.75", "1.00"], ["80%", "60%", "60%", "80%"])])
def test_tables_have_one_scale_for_all_layers(draw, cells, blues):
    """Classes in rows, or experts, and experts in columns: the number, and as strong a blue."""
    page = second_panel(draw)
    assert [text[:4] for text in page.texts("td")] == cells
    assert [style["--blue"] for style in page.styles("td")] == blues
    assert page.texts("bdi") == ["block 3", *(["ant", "bee"] if draw is draw_classes else "01")]


@pytest.mark.report
def test_surest_patches_are_cut_out_of_their_images():
    """An expert's cut-outs stand side by side, surest first, below its two largest classes."""
    layer = layer_of([[0] * 64] * 3, (0, 8, 8), nats=[[0.5] * 64, [0.3] * 64, [0.4] * 64])
    data = data_of([0, 1, 1], ["ant", "bee"], [[10] * 1024, [20] * 1024, [30] * 1024], side=32)
    run = run_of(2, data, layer, images=[0, 2, 1])
    page = Page(draw_surest(run, run.layers[0]))
    [strip] = page.pictures()
    assert strip.size == (36, 12)  # cut-outs of 12 x 12, see test_cut_outs_by_hand
    assert [strip.getpixel((x, 0))[0] for x in (0, 12, 24)] == [30, 20, 10]
    assert page.text == "block 1 0: bee 67%, ant 33% 1: never chosen"


# ---------------------------------------------------------------- the report and the files

ALL = "training balance pictures load where amount classes similarity surest"


def headings(page):
    """The figures on a page, by their headings: "training balance ..." for draw_training(), ..."""
    names = {draw.__doc__.split("\n")[0]: draw.__name__ for draw in FIGURES}
    return " ".join(names[text].removeprefix("draw_") for text in page.texts("h2"))


@pytest.mark.report
@pytest.mark.parametrize("E, classes", [(1, 1), (64, 3), (200, 2), (4, 1000)])
def test_the_report_has_a_panel_per_layer_and_picture(E, classes):
    """From 1 to 200 experts and to 1,000 classes: well-formed, and all figures are there."""
    M = min(classes, 10)
    first = layer_of(torch.randint(0, E, (M, 17)).tolist(), (1, 4, 4), block=1)
    second = layer_of(torch.randint(0, E, (M, 4)).tolist(), (0, 2, 2), block=3)
    log = dict(epoch=1, val_loss=1.0, top1=0.0, load=[[1 / E] * E] * 2)
    data = data_of(list(range(M)), [f"class {i}" for i in range(classes)], side=4)
    run = run_of(E, data, first, second, log=[log], shown={0: [["class 0", 0.5]]})
    page = Page(report_html(run, "spec"))
    assert headings(page) == ALL and len(page.all("span")) == E, "a legend"
    said = " ".join(page.text.split())
    for draw in FIGURES:  # its docstring is heading and caption
        assert all(" ".join(part.split()) in said for part in draw.__doc__.split("\n", 1))
    # Per layer: balance, load, map, amounts, classes, similarity, surest. Three of training.
    assert len(page.all("figure")) == 2 * 7 + 3 + 1


@pytest.mark.report
def test_without_a_log_its_figures_are_left_out():
    """A checkpoint from before its first epoch has no curves, of training or of balance."""
    page = Page(report_html(two_layers()._replace(log=[]), "spec"))
    assert headings(page) == ALL.removeprefix("training balance ")


@pytest.mark.report
def test_the_overview_by_hand():
    """A row per measure, a column per layer; in brackets what chance alone would tell."""
    layer = layer_of([[0, 0, 1, 2, 3]] * 4, (1, 1, 4))
    run = run_of(4, data_of([0, 1, 0, 1], ["ant", "bee"]), layer, layer._replace(block=3))
    # All experts follow the position alone, as in test_information_by_hand.
    rows = [["block", "1", "3"], ["grid", "1x4", "1x4"], ["experts per image", "4.00", "4.00"],
            ["router, bits", "1.00", "1.00"], ["load, CV", "0.00", "0.00"],
            ["class", "0.00 (0.00)", "0.00 (0.00)"], ["position", "1.00 (0.00)", "1.00 (0.00)"]]
    assert overview(run) == rows
    page = Page(report_html(run, "spec"))
    assert page.texts("td")[:21] == sum(rows, []), "the page's first table"
    assert "a.pt: model=by_hand. Images of spec. Top-1: 50.00% of 4. Data: 4 images, 2" in page.text
    assert "Routed experts do 40% of the multiply-adds." in page.text


@pytest.mark.report
def test_names_are_only_text():
    """Names with markup in them are shown and not obeyed, and the page loads nothing."""
    name, other = "<script>alert(1)</script>", "a' onload='x"
    run = run_of(2, data_of([0, 1], [name, other]), layer_of([[0, 1], [1, 1]], (0, 1, 2)),
                 path=name, config={"model": name}, shown={0: [[name, 0.5]], 1: [[other, 0.5]]})
    page = Page(report_html(run, name))
    # Path, model, data, title and answer of a picture, a row of classes, and the top of an expert.
    assert page.text.count(name) >= 7
    for element in page.elements:
        assert element.tag != "script" and not {"onload", "href"} & set(element.attributes)
        assert element.attributes.get("src", "data:image/").startswith("data:image/")


@pytest.mark.report
def test_names_of_any_characters(tmp_path):
    """Chinese, Arabic, emojis, control characters and bytes that are no UTF-8 can be written."""
    names = ["猫", "العربية", "🐦 bird", "a\x01b\nc", os.fsdecode(b"caf\xe9")]
    written = {*names[:4], r"caf\udce9"}
    run = run_of(2, data_of(range(5), names), layer_of([[0, 1]] * 5, (0, 1, 2)))
    write_files(tmp_path, run, names[4])
    assert written <= set(Page((tmp_path / "report.html").read_text("utf-8")).texts("bdi"))
    table = io.StringIO((tmp_path / "routing.csv").read_text("utf-8-sig"), newline="")
    assert {row[2] for row in csv.reader(table)} == {"class"} | written
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert [name for name, _ in summary["layers"][0]["top_classes"][0]] == names


@pytest.mark.report
def test_routing_csv_by_hand():
    """One row per layer, class and expert; a class without images has 0 patches, a share of 0."""
    layer = layer_of([[0, 0, 0, 1]], (0, 2, 2), block=5)
    text = routing_csv(run_of(2, data_of([0], ["a,b", "empty"]), layer))
    assert text[0] == "\ufeff", "without this mark Excel shows café wrong"
    rows = list(csv.reader(io.StringIO(text[1:], newline="")))
    assert rows == [["layer", "block", "class", "expert", "tokens", "share"],
                    ["0", "5", "a,b", "0", "3", "0.750000"],
                    ["0", "5", "a,b", "1", "1", "0.250000"],
                    ["0", "5", "empty", "0", "0", "0.000000"],
                    ["0", "5", "empty", "1", "0", "0.000000"]]


@pytest.mark.report
def test_summary_is_json_without_nan(tmp_path):
    """Other programs read summary.json: NaN is no JSON. Unused experts and classes are in it."""
    run = run_of(8, data_of([0], ["a", "empty"]), layer_of([[0, 1]], (0, 1, 2)))
    write_files(tmp_path, run, "spec")
    text = (tmp_path / "summary.json").read_text("utf-8")
    summary = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert summary.pop("layers") == [dict(layer=0) | run.layers[0].numbers]
    assert summary == dict(checkpoint="a.pt", model=dict(model="by_hand"), data="spec", images=1,
                           top1=50.0, protocol="1 images, 2 of 2 classes", routed_share=0.4)


@pytest.mark.report
def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    """When the disk is full the old file stays as it was."""
    def full(path, content):
        path.write_text("half")
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
        return save_checkpoint(name, config, DRAWN["shapes"][1], crop_ratio=0.5, mean=MEAN, std=STD,
                               args=dict(args), log=list(log))
    return save


def run_main(*argv):
    """python inspect_experts.py ARGV in this process: the summary.json and the page of out/."""
    inspect_experts.main(parse_args(["--out", "out", "--workers", "0", *argv]))
    summary, page = Path("out/summary.json"), Path("out/report.html")
    return json.loads(summary.read_text("utf-8")), Page(page.read_text("utf-8"))


def save_pictures(*paths):
    """Save small pictures, from dark to bright, of different widths."""
    for i, path in enumerate(paths):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.linear_gradient("L").resize((40 + i, 36)).save(path)


@pytest.mark.report
@pytest.mark.parametrize("options, blocks, grids", [
    (dict(model="vit_nano", moe_layers="every2", k=2), [1, 3], [[4, 4]] * 2),
    (dict(moe_layers="every2", k=1), [1, 3, 6], [[8, 8], [4, 4], [2, 2]]),
    ({}, [], [])])  # dense
def test_one_command_writes_everything(checkpoint, options, blocks, grids):
    """The files say what they are about. The log inside the checkpoint is drawn, too."""
    line = dict(epoch=1, val_loss=1.5, top1=3, load=[[0.25] * 4] * len(blocks))
    path = checkpoint("a.pt", [line], **options)
    summary, page = run_main(path, "--data", "shapes", "--max-images", "40")
    assert {"report.html", "summary.json"} <= set(os.listdir("out"))
    assert os.path.exists("out/routing.csv") == bool(blocks)
    assert (summary["images"], summary["data"], summary["checkpoint"]) == (40, "shapes", "a.pt")
    assert summary["protocol"] == "100 images, 16 of 16 classes, 40 of them evenly spread"
    assert [layer["block"] for layer in summary["layers"]] == blocks
    assert [layer["grid"] for layer in summary["layers"]] == grids
    assert headings(page) == (ALL if blocks else "training pictures")
    assert "validation 1.5" in page.text and page.texts("div").count("image") == 8


@pytest.mark.report
def test_what_is_printed(checkpoint, capsys):
    """First the accuracy and the share of the experts, then the page's table."""
    path = checkpoint("a.pt", args=dict(data="shapes"), moe_layers="last2")
    summary, page = run_main(path, "--data", "shapes")
    assert summary["protocol"] == "100 images, 16 of 16 classes, those held out from its training"
    written, first, *rows, last = capsys.readouterr().out.splitlines()
    assert written == "written to out/: report.html, routing.csv, summary.json"
    assert first.startswith(f"a.pt: top-1 {summary['top1']:.2f}% of 100 images; "
                            f"{summary['routed_share']:.0%} of the multiply-adds")
    cells = page.texts("td")
    for i, row in enumerate(rows):
        name, *values = cells[3 * i:3 * i + 3]
        assert row == f"{name:<18} {values[0]:>12} {values[1]:>12}"
    assert [row.split()[0] for row in rows[-6:]] == list(summary["layers"][0]["information"])


@pytest.mark.report
@pytest.mark.parametrize("k", [1, 2])
def test_the_routed_share_by_hand(checkpoint, k):
    """The experts' multiply-adds over all those of one image, for a ViT of width D = 32."""
    path = checkpoint("a.pt", model="vit_pico", moe_layers="last2", num_experts=4, k=k)
    summary, _ = run_main(path, "--data", "shapes", "--max-images", "1")
    # 16 patches of 3 * 8 * 8 values, T = 17 tokens with the class token, H = 4 D, 16 classes.
    T, D = 17, 32
    mlp = T * 2 * D * 4 * D
    attention = T * D * 3 * D + T * D * D + 2 * T * T * D  # q, k and v; output; scores and mix
    routers = 2 * T * D * 4
    total = 16 * 192 * D + 4 * attention + 2 * mlp + routers + 2 * k * mlp + D * 16
    assert summary["routed_share"] == 2 * k * mlp / total


@pytest.mark.report
@pytest.mark.parametrize("flags, images", [([], 1), (["--split", "all"], 5)])
def test_what_the_model_was_trained_on_is_left_out(checkpoint, flags, images):
    """Of a flat folder that it was trained on only the held-out fifth is inspected."""
    save_pictures(*(f"images/circle-plain/{i}.png" for i in range(5)))
    path = checkpoint("a.pt", args=dict(data="images"), moe_layers="last2")
    assert run_main(path, "--data", "./images/", *flags)[0]["images"] == images


@pytest.mark.report
@pytest.mark.parametrize("data", ["images", "images/circle-plain/2.png"])
def test_an_image_that_cannot_be_read_is_named(checkpoint, data):
    """Numbers without an image would not be comparable, and own pictures would lack an answer."""
    save_pictures("images/circle-plain/1.png")
    Path("images/circle-plain/2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot read 1 files: images/circle-plain/2.png"):
        run_main(checkpoint("a.pt", moe_layers="last2"), "--data", data)
    assert os.listdir("out") == []


@pytest.mark.report
@pytest.mark.parametrize("flags, message", [
    ("a.pt --data shapes --out a.pt", "a.pt"),
    ("missing.pt --data shapes", "missing.pt is not a checkpoint"),
    ("a.pt --data nowhere", "no folder 'nowhere'"),
    ("a.pt --data zoo", "1 of 1 classes of the data are unknown to the checkpoint .zebra")])
def test_refusals_come_before_any_work(checkpoint, monkeypatch, flags, message):
    """What cannot be done is said in one line, before an image is read or a file is written."""
    checkpoint("a.pt", moe_layers="last2")
    save_pictures("zoo/zebra/1.png")
    monkeypatch.setattr(inspect_experts, "predict", lambda *args: pytest.fail("it worked"))
    with pytest.raises((OSError, ValueError), match=message) as error:
        run_main(*flags.split())
    assert "\n" not in str(error.value)
    assert not os.path.exists("out") or os.listdir("out") == []


@pytest.mark.report
def test_a_folder_that_cannot_be_written_is_refused_first(checkpoint, monkeypatch):
    """A folder of somebody else: one line says so, before an image is looked at."""
    path = checkpoint("a.pt")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(inspect_experts, "predict", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(ValueError, match="--out out cannot be written: choose another folder"):
        run_main(path, "--data", "shapes")


@pytest.mark.report
@pytest.mark.parametrize("options, layers", [(dict(moe_layers="last2"), 2), ({}, 0)])
@pytest.mark.parametrize("data, numbers", [("own", [0, 1, 2]), ("own/photo 1.png", [1])])
def test_own_pictures(checkpoint, capsys, options, layers, data, numbers):
    """Without classes there are the five best with their probabilities, and the routing."""
    save_pictures(*(f"own/photo {i}.png" for i in range(3)))
    os.mkdir("out")
    Path("out/routing.csv").touch()
    summary, page = run_main(checkpoint("a.pt", [dict(epoch=1)], **options), "--data", data)
    assert sorted(os.listdir("out")) == ["report.html", "summary.json"], "an old routing.csv"
    assert headings(page) == "pictures" and "Top-1" not in page.text and "top1" not in summary
    assert len(page.pictures()) == len(numbers) * (1 + layers)
    model, saved = load_checkpoint("a.pt")
    printed = capsys.readouterr().out.splitlines()[2:]
    for i, line in zip(numbers, printed, strict=True):
        image = eval_transform(32, 0.5)(read_image(f"own/photo {i}.png")).unsqueeze(0)
        with torch.no_grad():
            probs = model(normalize(image, MEAN, STD)).softmax(1)[0].tolist()
        best = sorted(zip(probs, saved["classes"]), reverse=True)[:5]
        told = [f"{name} {p:.1%}" for p, name in best]
        assert line == f"own/photo {i}.png: {', '.join(told)}"
        assert f"photo {i}.png" in page.texts("bdi") and "".join(told) in page.text


@pytest.mark.report
def test_at_most_fifty_pictures(checkpoint, capsys):
    """More than 50 own pictures would be a page that nobody reads: 50 are shown, all count."""
    save_pictures(*(f"own/{i:02}.png" for i in range(52)))
    summary, page = run_main(checkpoint("a.pt"), "--data", "own")
    _, first, *lines = capsys.readouterr().out.splitlines()
    assert first == "50 of 52 pictures, their best classes:"
    assert len(lines) == len(page.all("figure")) == 50 and summary["images"] == 52

