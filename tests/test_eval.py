"""Tests of eval.py: drawn pictures, folders, counting, checkpoints and the command line."""

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import signal
import struct
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import eval as evaluation
import forked
from checks import on_meta
from eval import (CHECKPOINT_KEYS, FLAG_PALETTE, MODELS, PALETTE, Flags, Glyphs, Shapes,
                  TensorImages, accuracy_per_class, auto_workers, autocast, best_dtype, build_model,
                  class_probabilities, countries, distances, draw_characters, draw_glyphs,
                  drawn_size, eval_loader, eval_transform, evaluate, hold_out, image_losses,
                  load_checkpoint, match_classes, normalize, number, open_dataset, open_pictures,
                  read_image, worst_pairs)

CPU = torch.device("cpu")

# ---------------------------------------------------------------- shapes: the embedded data


@pytest.mark.shapes
def test_the_same_pictures_on_every_machine():
    """The first eight pictures to train on are these, bit by bit, with every PyTorch."""
    checksum = hashlib.sha256(Shapes(500, seed=1).images[:8].numpy().tobytes()).hexdigest()
    expected = "8347a917a37522c1e356cc2102a50295b327ec70f150725e927926cf52a84468"
    assert checksum == expected, "was a draw changed?"


@pytest.mark.shapes
def test_labels_are_what_one_sees():
    """The labels of the first sixteen pictures name what one sees in them: draw them and look."""
    data = Shapes(500, seed=1)
    assert [data.classes[data[i][1]] for i in range(16)] == [
        "cross-stripes", "cross-dots", "cross-stripes", "circle-plain",
        "cross-plain", "triangle-stripes", "circle-dots", "square-plain",
        "square-dots", "circle-stripes", "square-dots", "square-plain",
        "circle-plain", "square-plain", "circle-checks", "cross-plain",
    ]


@pytest.mark.shapes
def test_a_longer_set_begins_with_the_shorter():
    """20 pictures are the first 20 of 600 of the same seed, drawn in parts of 500."""
    short, long = Shapes(20, seed=3), Shapes(600, seed=3)
    assert (len(short), len(long)) == (20, 600)
    assert torch.equal(short.images, long.images[:20])
    assert torch.equal(short.labels, long.labels[:20])
    assert torch.equal(short.masks, long.masks[:20])
    for name, factor in short.factors.items():
        assert torch.equal(factor, long.factors[name][:20]), name
    assert len(long.images.flatten(1).unique(dim=0)) == 600, "the same part again and again?"


@pytest.mark.shapes
def test_training_and_validation_pictures_differ():
    """No picture to validate with is among those to train on."""
    train = {image.numpy().tobytes() for image in Shapes(500, 1).images}
    val = {image.numpy().tobytes() for image in Shapes(500, 2).images}
    assert len(train) == len(val) == 500 and not train & val


@pytest.mark.shapes
def test_classes_are_shape_times_texture():
    """Label 4 * shape + texture is class shape-texture: all textures of the circle first."""
    data = Shapes(500, seed=1)
    assert data.classes == [
        "circle-plain", "circle-stripes", "circle-checks", "circle-dots",
        "square-plain", "square-stripes", "square-checks", "square-dots",
        "triangle-plain", "triangle-stripes", "triangle-checks", "triangle-dots",
        "cross-plain", "cross-stripes", "cross-checks", "cross-dots",
    ]
    assert_close(data.labels, 4 * data.factors["shape"] + data.factors["texture"])


@pytest.mark.shapes
def test_all_classes_are_about_equally_frequent():
    """Of 1,600 pictures each of the 16 classes has 100, give or take four deviations of 10."""
    # one class: mean 1600 / 16 = 100, deviation sqrt(1600 * 1/16 * 15/16) = 9.7
    counts = Shapes(1600, seed=1).labels.bincount(minlength=16)
    assert len(counts) == 16 and counts.min() > 60 and counts.max() < 140, counts


@pytest.mark.shapes
def test_the_mask_is_where_the_object_is():
    """Inside its mask a picture is bright, outside it is dark."""
    # The dimmest object colour is (0, 158, 115): its brightest channel, less 25 of shade and 12 of
    # noise, is 121. The brightest background is a quarter of 240 + 25: 66, with 12 of noise 78. So
    # 100 separates them always.
    data = Shapes(500, seed=1)
    assert torch.equal(data.images.amax(dim=1) > 100, data.masks)


@pytest.mark.shapes
def test_row_and_column_are_the_centre():
    """The centre of mass of a circle's mask is at the factors row and column, in this order."""
    data = Shapes(500, seed=1)
    circles = data.factors["shape"] == 0
    masks = data.masks[circles].double()
    area = masks.sum((1, 2))
    row = (masks.sum(2) * torch.arange(32)).sum(1) / area
    column = (masks.sum(1) * torch.arange(32)).sum(1) / area
    expected = data.factors["row"][circles].double()
    assert_close(row, expected, msg=lambda m: f"rows and columns swapped? {m}")
    assert_close(column, data.factors["column"][circles].double())


@pytest.mark.shapes
def test_the_mask_has_the_shape_of_its_factor():
    """What one sees in the mask is the shape that its factor names."""
    data = Shapes(500, seed=1)
    mask = data.masks
    row = data.factors["row"].view(-1, 1, 1)
    column = data.factors["column"].view(-1, 1, 1)
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    # half a turn about the centre may lead out of the picture
    turned_y, turned_x = 2 * row - y, 2 * column - x
    visible = (turned_y >= 0) & (turned_y < 32) & (turned_x >= 0) & (turned_x < 32)
    turned = mask[torch.arange(500).view(-1, 1, 1), turned_y.clamp(0, 31), turned_x.clamp(0, 31)]
    changes = (visible & (turned != mask)).any(dim=2).any(dim=1)
    r = ((y - row) ** 2 + (x - column) ** 2).sqrt()
    reach = (r * mask).amax((1, 2))
    # circle 1; square 2 reach^2 / (pi reach^2) = 0.64
    is_round = mask.sum((1, 2)) / (math.pi * reach**2) > 0.85
    # the smallest square is 8.75 from centre to side
    is_full = (mask | (r > 8.2)).all(dim=2).all(dim=1)

    seen = torch.where(changes, 2, torch.where(is_round, 0, torch.where(is_full, 1, 3)))
    wrong = (seen != data.factors["shape"]).nonzero().flatten().tolist()
    assert not wrong, f"pictures {wrong[:10]} do not show the shape of their factor"


@pytest.mark.shapes
def test_colours_are_those_of_the_factors():
    """Object and background have the colours of their factors, shaded by up to 25."""
    data = Shapes(500, seed=1)
    palette = torch.tensor(PALETTE).float()
    plain = data.factors["texture"] == 0
    for inside, factor, brightness in [(True, "colour", 1), (False, "background", 4)]:
        where = (data.masks == inside).unsqueeze(1)
        mean = (data.images * where).sum((2, 3)) / where.sum((2, 3))  # (N, 3)
        error = (brightness * mean - palette[data.factors[factor]]).abs()
        # 25 of shade, 3 of rounding down, and the noise of a black pixel is cut off at 0: its mean
        # is 3, times 4 is 12
        assert error[plain].max() <= 25 + 3 + 12, f"{factor}: another layer's colour?"
    assert (data.factors["colour"] != data.factors["background"]).all()


@pytest.mark.shapes
def test_only_plain_objects_have_one_colour():
    """Within a plain object a channel varies by the noise of +-12 only, else by more."""
    data = Shapes(500, seed=1)
    inside = data.masks.unsqueeze(1)
    highest = data.images.masked_fill(~inside, 0).amax((2, 3)).int()
    lowest = data.images.masked_fill(~inside, 255).amin((2, 3)).int()
    spread = (highest - lowest).amax(1)
    assert torch.equal(spread <= 24, data.factors["texture"] == 0)


@pytest.mark.shapes
def test_an_item_is_image_label_and_no_complaint():
    """Item i is (image through the transform, label, -1), and path(i) is a name for messages."""
    data = Shapes(3, seed=1, transform=lambda image: image[:, :4])
    image, label, unreadable = data[2]
    assert torch.equal(image, data.images[2, :, :4])
    assert label == int(data.labels[2])
    assert unreadable == -1
    assert data.path(2) == "image 2" and len(data) == 3


@pytest.mark.shapes
def test_a_linear_classifier_cannot_solve_it():
    """Ridge regression on the pixels stays under 40%: class is not colour or place."""
    train, val = Shapes(1600, seed=1), Shapes(500, seed=2)
    x, x_val = (data.images.flatten(1).float() / 255 - 0.3 for data in (train, val))
    y = F.one_hot(train.labels, 16).float()
    # weights = x^T (x x^T + lambda)^-1 y: the same as (x^T x + lambda)^-1 x^T y, with the smaller
    # matrix
    weights = x.T @ torch.linalg.solve(x @ x.T + 100 * torch.eye(1600), y)
    accuracy = ((x_val @ weights).argmax(1) == val.labels).float().mean()
    assert 1 / 16 < accuracy < 0.4, f"{accuracy:.0%}: easier than it should be (or noise, below 6%)"


@pytest.mark.shapes
def test_the_size_of_shapes():
    """`shapes:COUNT` changes the number of pictures to train on, and not those to validate."""
    assert drawn_size("shapes", "train")[0] == 16_000
    assert drawn_size("shapes:40", "train")[0] == 40
    for split in ("val", "all"):
        assert drawn_size("shapes:40", split) == drawn_size("shapes", "val")
    count, seed, _ = drawn_size("shapes", "val")
    assert count == 2000 and seed != drawn_size("shapes", "train")[1]
    data = open_dataset("shapes:40", "train", transform=lambda image: image[:, :1])
    assert len(data) == 40 and data[0][0].shape == (3, 1, 32)


@pytest.mark.shapes
@pytest.mark.parametrize(
    "spec",
    ["shapes:0", "shapes:-5", "shapes:many", "shapes:1.5", "shapes:100001", "shapes:10:10",
     "glyphs:100001", "glyphs:10:1", "glyphs:10:10001", "glyphs:10:10:10",
     "flags:0", "flags:10:10"],
)
def test_a_wrong_number_of_pictures_or_classes(spec):
    """Only 1 to 100000 pictures, and for glyphs 2 to 10000 classes, can follow the name."""
    with pytest.raises(ValueError, match=r"expected `shapes\[:COUNT\]`.* 1 to 100000 images"):
        open_dataset(spec, "train")


# ---------------------------------------------------------------- glyphs


@pytest.mark.shapes
def test_the_same_glyphs_on_every_machine():
    """The first eight glyphs to train on are these, bit by bit, with every PyTorch."""
    data = Glyphs(500, seed=1)
    checksum = hashlib.sha256(data.images[:8].numpy().tobytes()).hexdigest()
    expected = "b007c5fcd45012880eb1bf41fdcc9c0cc43cccea2ffc2810fc018d0d730afe33"
    assert checksum == expected, "was a draw changed?"


@pytest.mark.shapes
def test_the_size_of_glyphs():
    """`glyphs:COUNT:CLASSES`: 300 classes unless told, and 2,000 pictures to validate."""
    assert drawn_size("glyphs", "train") == (16_000, 1, 300)
    assert drawn_size("glyphs:40", "train") == (40, 1, 300)
    assert drawn_size("glyphs:40:7", "train") == (40, 1, 7)
    assert drawn_size("glyphs:40:7", "val") == (2000, 2, 7)
    data = open_dataset("glyphs:40:7", "train")
    assert len(data) == 40 and data.classes[:2] == ["glyph-0000", "glyph-0001"]
    assert data.labels.max() == 6


@pytest.mark.shapes
def test_a_character_is_the_same_in_every_set():
    """More classes leave the first ones as they are: a class means the same in every set."""
    assert torch.equal(draw_characters(300)[:7], draw_characters(7))


@pytest.mark.shapes
def test_distances_from_a_stroke():
    """A point in the middle of pixel (3, 2): 16 units to the next, at most 126 each way."""
    x = torch.full((1, 3, 1), 16 * 3 + 8, dtype=torch.int32)
    y = torch.full((1, 3, 1), 16 * 2 + 8, dtype=torch.int32)
    found = distances(x, y)[0, 1]  # (32 rows, 32 columns)
    assert found[2, 3] == 0
    assert found[2, 5] == 32**2 and found[3, 4] == 16**2 + 16**2
    assert found[31, 31] == 2 * 126**2


@pytest.mark.shapes
def test_a_mask_tells_the_strokes_apart():
    """Three strokes that are dots, beside each other, in the middle and below: 1, 2 and 3."""
    dots = torch.tensor([[-200, 0], [0, 0], [0, 200]], dtype=torch.int32)  # x, y of each
    character = dots.view(1, 3, 1, 2).expand(1, 3, 3, 2)
    drawn = draw_glyphs(character, torch.Generator().manual_seed(0), n=20)
    for mask in drawn["masks"]:
        rows, columns = zip(*[(mask == s).nonzero().double().mean(0).tolist() for s in (1, 2, 3)])
        assert columns[0] < columns[1] - 3, "stroke 1 is left of 2"
        assert rows[2] > rows[1] + 3, "stroke 3 is below 2"


@pytest.mark.shapes
def test_the_ink_is_where_a_glyph_is_light():
    """On the mask a picture is at least 64 brighter on average than off it, in every colour."""
    data = Glyphs(20, seed=1, classes=5)
    for image, mask in zip(data.images.float(), data.masks > 0):
        difference = image[:, mask].mean(1) - image[:, ~mask].mean(1)  # (3,)
        assert difference.min() > 50
    assert data.masks.unique().tolist() == [0, 1, 2, 3], "three strokes and the ground"


@pytest.mark.shapes
def test_a_glyph_lies_around_its_centre():
    """Half a character is 12 pixels wide at most, and turned it stays within 18 of its centre."""
    data = Glyphs(50, seed=1)
    for mask, row, column in zip(data.masks, data.factors["row"], data.factors["column"]):
        rows, columns = mask.nonzero().T
        distance = (rows - row).square() + (columns - column).square()
        assert distance.max() < 18**2


@pytest.mark.shapes
def test_the_colour_of_a_glyph_is_that_of_its_ink():
    """Factor colour: which of red, green and blue is the strongest on the ink."""
    data = Glyphs(50, seed=1)
    for image, mask, colour in zip(data.images.float(), data.masks > 0, data.factors["colour"]):
        means = image[:, mask].mean(1)  # (3,), with a blurred edge and noise
        assert means[colour] > means.max() - 15


@pytest.mark.shapes
def test_a_linear_classifier_cannot_read_glyphs():
    """Ridge regression on the pixels stays under 40% of 100 classes: the hand is unsteady."""
    train, val = Glyphs(1600, seed=1, classes=100), Glyphs(500, seed=2, classes=100)
    x, x_val = (data.images.flatten(1).float() / 255 - 0.3 for data in (train, val))
    y = F.one_hot(train.labels, 100).float()
    weights = x.T @ torch.linalg.solve(x @ x.T + 100 * torch.eye(1600), y)
    accuracy = ((x_val @ weights).argmax(1) == val.labels).float().mean()
    assert 1 / 100 < accuracy < 0.4, f"{accuracy:.0%}"


# ---------------------------------------------------------------- flags


@pytest.mark.shapes
def test_the_same_flags_on_every_machine():
    """The first eight flags to train on and the country of each flag are these, bit by bit."""
    images = Flags(500, seed=1).images[:8]
    checksums = [hashlib.sha256(data.numpy().tobytes()).hexdigest()
                 for data in (images, countries())]
    assert checksums[0].startswith("cbf0003f0459d139"), "was a draw changed?"
    assert checksums[1].startswith("8f878ddc00146c48"), "was a draw changed?"


@pytest.mark.shapes
def test_each_country_has_49_flags_and_each_flag_one_country():
    """Of 14 x 14 x 14 flags, 56 countries have 49 each, and no stripe tells the country."""
    country = countries()
    assert country.shape == (14, 14, 14)
    assert country.flatten().bincount().tolist() == [49] * 56
    for stripe in range(3):
        for colour in range(14):  # 196 flags
            assert country.select(stripe, colour).flatten().bincount().max() < 20


@pytest.mark.shapes
def test_a_flag_belongs_to_the_same_country_in_every_set():
    """A flag's class goes by its three colours alone, to train on and to validate."""
    train, val = [
        {tuple(flag): label for flag, label in zip(data.factors["colour"].tolist(), data.labels)}
        for data in (Flags(2000, seed=1), Flags(2000, seed=2))
    ]
    common = train.keys() & val.keys()
    assert 500 < len(common) < len(val), "other pictures, and many of the same flags"
    assert all(train[flag] == val[flag] for flag in common)


@pytest.mark.shapes
def test_a_flag_has_the_colours_of_its_factors():
    """Each stripe of 8 x 24 pixels has its colour of the palette, shaded by up to 12."""
    data = Flags(20, seed=1)
    palette = torch.tensor(FLAG_PALETTE)
    for image, mask, colours in zip(data.images.float(), data.masks, data.factors["colour"]):
        assert mask.flatten().int().bincount().tolist() == [32 * 32 - 3 * 192, 192, 192, 192]
        for stripe in range(3):
            mean = image[:, mask == stripe + 1].mean(1)  # (3,), of noise up to 16
            assert (mean - palette[colours[stripe]]).abs().max() < 12 + 4


@pytest.mark.shapes
def test_a_flag_lies_around_its_centre():
    """Stripe 1 is the upper one, and the flag reaches from 12 above its centre to 11 below."""
    data = Flags(20, seed=1)
    for mask, row, column in zip(data.masks, data.factors["row"], data.factors["column"]):
        rows, columns = mask.nonzero().T
        assert rows.aminmax() == (row - 12, row + 11)
        assert columns.aminmax() == (column - 12, column + 11)
        assert mask[row - 12:row + 12:8, column].tolist() == [1, 2, 3]


# ---------------------------------------------------------------- reading image files


# of four fields of 16 x 16
COLOURS = ((200, 60, 20), (20, 180, 60), (40, 40, 220), (250, 250, 130))


def picture(mode="RGB"):
    """32 rows, 32 columns in four fields: top left, top right, bottom left, bottom right."""
    image = Image.new("RGB", (32, 32))
    for colour, corner in zip(COLOURS, [(0, 0), (16, 0), (0, 16), (16, 16)]):
        image.paste(colour, (*corner, corner[0] + 16, corner[1] + 16))
    return image.convert(mode)


def fields(colours):
    """The same as a tensor (3, 32, 32)."""
    quarters = torch.tensor(colours, dtype=torch.uint8).view(2, 2, 3).permute(2, 0, 1)
    return quarters.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)


# luma, the "L" of Pillow
GREYS = [[(299 * r + 587 * g + 114 * b + 500) // 1000] * 3 for r, g, b in COLOURS]


@pytest.mark.folders
@pytest.mark.parametrize(
    "name, mode, expected",
    [
        ("rgb.png", "RGB", COLOURS),
        ("grey.png", "L", GREYS),
        ("palette.png", "P", None),  # None: what Pillow reads
        ("alpha.png", "RGBA", COLOURS),
        ("grey_alpha.png", "LA", GREYS),
        ("black_and_white.png", "1", None),
        ("rgb.jpg", "RGB", COLOURS),
        ("LOUD.JPEG", "RGB", COLOURS),
        ("grey.jpg", "L", GREYS),
        ("cmyk.jpg", "CMYK", COLOURS),
        ("rgb.bmp", "RGB", COLOURS),
        ("palette.gif", "P", None),
        ("rgb.webp", "RGB", None),
        ("rgb.tif", "RGB", COLOURS),
        ("grey.pgm", "L", GREYS),
    ],
)
@pytest.mark.parametrize("decoders", ["torchvision and Pillow", "Pillow"])
def test_every_kind_of_file_becomes_rgb(tmp_path, monkeypatch, decoders, name, mode, expected):
    """A file of any mode and format is read as (3, H, W) uint8 RGB, by either decoder."""
    if decoders == "Pillow":  # torchvision has announced that its decoders will go
        monkeypatch.delattr(evaluation.torchvision.io, "decode_jpeg")
    options = {"quality": 100, "subsampling": 0} if "j" in name.lower() else {}
    picture(mode).save(tmp_path / name, **options)
    image = read_image(str(tmp_path / name))
    assert image.dtype == torch.uint8 and image.shape == (3, 32, 32)
    if expected is None:
        with Image.open(tmp_path / name) as file:
            expected_image = v2.functional.pil_to_tensor(file.convert("RGB"))
    else:
        expected_image = fields(expected)
    # JPEG rounds in its own colour space, and decoders differ: 3 of 255. All others are exact.
    worst = (image.int() - expected_image.int()).abs().max()
    allowed = 3 if name.lower().endswith(("jpg", "jpeg", "webp")) else 0
    assert worst <= allowed, f"{worst}: inverted? BGR? transposed?"


@pytest.mark.folders
def test_sixteen_bits_become_eight(tmp_path):
    """A 16-bit grey PNG is scaled to 8 bits, and not cut off at 255."""
    # White is 65535 and becomes 255: value / 257, rounded up or down.
    deep = torch.tensor([[0, 255, 256, 1000, 32768, 65000, 65535]])
    Image.fromarray(deep.numpy().astype("uint16")).save(tmp_path / "deep.png")
    image = read_image(str(tmp_path / "deep.png"))
    assert image.shape == (3, 1, 7) and image.dtype == torch.uint8
    difference = (image - deep / 257).abs().max()  # 0, 0.99, 0.996, 3.89, 127.5, 252.9, 255
    assert difference < 1, image[0].tolist()


def tiff(bits, numbers, zero_is=1, kind=1):
    """The bytes of a TIFF of one row. zero_is: 0 white, 1 black. kind: 2 signed, 3 floats."""
    data = numbers.tobytes()
    if bits == 12:  # two numbers in three bytes
        data = bytes.fromhex("".join(f"{number:03x}" for number in numbers))
    # width, height, bits, not compressed, what 0 is, place of the data, samples, rows, bytes, kind
    tags = {256: len(numbers), 257: 1, 258: bits, 259: 1, 262: zero_is, 273: 8, 277: 1, 278: 1,
            279: len(data), 339: kind}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    header = b"II*\0" + struct.pack("<I", 8 + len(data))
    return header + data + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)


def array(kind, *numbers):
    return torch.tensor(numbers, dtype=torch.float64).numpy().astype(kind)


DEEP = array("<u2", 0, 257, 32896, 65535)  # 257 = 65535 / 255, and 32896 = 128 * 257
FLAT = array("<u2", 0, 16, 2056, 4095)  # 16 / 4095 * 255 = 0.996, 2056 / 4095 * 255 = 128.03


@pytest.mark.folders
@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("16.tif", tiff(16, DEEP), [0, 1, 128, 255]),
        ("white.tif", tiff(16, DEEP, zero_is=0), [255, 254, 127, 0]),
        ("12.tif", tiff(12, FLAT), [0, 1, 128, 255]),
        ("signed.tif", tiff(16, array("<i2", 0, 1000), kind=2), None),
        ("32.tif", tiff(32, array("<u4", 0, 1000)), None),
        ("float.tif", tiff(32, array("<f4", 0, 0.5, 1), kind=3), [0, 128, 255]),  # 127.5, to even
        ("far.tif", tiff(32, array("<f4", 0, 0.5, 2000), kind=3), None),
        ("nan.tif", tiff(32, array("<f4", 0, math.nan), kind=3), None),
        ("10.pgm", b"P5 3 1 1023 " + array(">u2", 0, 512, 1023).tobytes(), [0, 128, 255]),  # 127.6
        ("4.pgm", b"P5 3 1 15 " + bytes([0, 8, 15]), [0, 136, 255]),
        ("16.pgm", b"P5 2 1 65535 " + array(">u2", 257, 65535).tobytes(), [1, 255]),
    ],
)
def test_deep_files_are_scaled_by_their_range(tmp_path, name, content, expected):
    """10, 12 and 16 bits, and floats from 0 to 1, become 0 to 255; what has no known range is
    unreadable, not black or white."""
    (tmp_path / name).write_bytes(content)
    image = read_image(str(tmp_path / name))
    assert image is None if expected is None else image[2, 0].tolist() == expected


@pytest.mark.folders
@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize(
    "orientation, corners",
    [
        # The viewer shows the fields 0 1 / 2 3 (COLOURS) as ...
        (1, [0, 1, 2, 3]),
        (2, [1, 0, 3, 2]),
        (3, [3, 2, 1, 0]),
        (4, [2, 3, 0, 1]),
        (5, [0, 2, 1, 3]),
        (6, [2, 0, 3, 1]),
        (7, [3, 1, 2, 0]),
        (8, [1, 3, 0, 2]),
    ],
)
def test_pictures_are_turned_as_a_viewer_does(tmp_path, kind, orientation, corners):
    """EXIF's orientation, 6 for a phone held upright, turns or mirrors the picture, whatever
    decodes it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().resize((64, 32), Image.NEAREST).save(tmp_path / "phone", kind, exif=exif)
    image = read_image(str(tmp_path / "phone")).int()
    assert image.shape == ((3, 32, 64) if orientation < 5 else (3, 64, 32))
    height, width = image.shape[1:]
    for corner, (y, x) in zip(corners, [(0, 0), (0, 1), (1, 0), (1, 1)]):
        seen = image[:, height // 4 + y * height // 2, width // 4 + x * width // 2]
        assert (
            seen - torch.tensor(COLOURS[corner])
        ).abs().max() < 12, "lossy, but no other field's colour"


@pytest.mark.folders
@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_of_an_animation_the_first_picture(tmp_path, kind):
    """Three pictures in one file, dark, grey and bright: the dark one is read, (3, H, W)."""
    frames = [Image.new("RGB", (8, 8), (level, level, level)) for level in (10, 100, 200)]
    frames[0].save(tmp_path / "moving", kind, save_all=True, append_images=frames[1:])
    image = read_image(str(tmp_path / "moving"))
    assert image.shape == (3, 8, 8) and (image.int() - 10).abs().max() <= 2


@pytest.mark.folders
def test_only_jpeg_goes_to_torchvision(tmp_path, monkeypatch):
    """The first bytes decide, not the name: torchvision's decoder of PNG can end the process at one
    wrong bit."""
    seen = []
    see = lambda content, *_, **__: seen.append(content[:2].tolist())
    monkeypatch.setattr(evaluation.torchvision.io, "decode_jpeg", see)
    monkeypatch.delattr(evaluation.torchvision.io, "decode_image")
    for kind in ("jpeg", "png", "gif", "bmp"):
        (tmp_path / "any.jpg").write_bytes(saved(kind))
        read_image(str(tmp_path / "any.jpg"))
    assert seen == [[0xFF, 0xD8]], "it takes a tensor of bytes"


@pytest.mark.folders
@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "webp", "bmp", "tiff"])
def test_damaged_files_are_read_or_reported(tmp_path, kind):
    """60 files with wrong bits, cut off or zeroed in part: each is an image or None, and nothing is
    raised."""
    draw, content, found = random.Random(kind), saved(kind), []
    for i in range(60):
        damaged, place = bytearray(content), draw.randrange(len(content))
        if i % 3 == 0:
            damaged[place] ^= 1 << draw.randrange(8)
        elif i % 3 == 1:
            del damaged[place:]
        else:
            damaged[place : place + 16] = bytes(len(damaged[place : place + 16]))
        (tmp_path / "damaged").write_bytes(damaged)
        image = read_image(str(tmp_path / "damaged"))
        assert image is None or image.dtype == torch.uint8 and image.dim() == 3 and len(image) == 3
        found.append(image is None)
    assert any(found), "not even a cut file is reported?"


@pytest.mark.folders
@pytest.mark.parametrize(
    "kind, options", [("jpeg", {}), ("jpeg", dict(progressive=True)), ("png", {})]
)
def test_more_pixels_than_the_limit_are_unreadable(tmp_path, monkeypatch, kind, options):
    """The limit is twice Pillow's MAX_IMAGE_PIXELS: of 500, 32 x 32 = 1,024 pixels are beyond it,
    31 x 32 are not.

    Else a damaged header that claims 65,535 x 65,535 pixels would fill the memory.
    """
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for height, shape in [(32, None), (31, (3, 31, 32))]:
        picture().crop((0, 0, 32, height)).save(tmp_path / "any", kind, **options)
        image = read_image(str(tmp_path / "any"))
        assert (image if image is None else image.shape) == shape


@pytest.mark.folders
@pytest.mark.parametrize("width, height", [(1, 1), (7, 3), (3, 7)])
def test_images_keep_their_size(tmp_path, width, height):
    """A file of W x H pixels is read as (3, H, W): rows first."""
    Image.new("RGB", (width, height), (1, 2, 3)).save(tmp_path / "any.png")
    assert read_image(str(tmp_path / "any.png")).shape == (3, height, width)


def saved(kind):
    """The bytes of an image file."""
    file = io.BytesIO()
    picture().save(file, kind)
    return file.getvalue()


BROKEN = {
    "empty.png": b"", "text.png": b"this is no image",
    "half.jpg": saved("jpeg")[:400], "half.png": saved("png")[:90],
    "half.gif": saved("gif")[:60], "half.bmp": saved("bmp")[:500],
}


@pytest.mark.folders
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_none(tmp_path, name):
    """A file that is empty, cut off or no image is None, and not an exception of some decoder."""
    (tmp_path / name).write_bytes(BROKEN[name])
    assert read_image(str(tmp_path / name)) is None
    assert read_image(str(tmp_path / "gone.png")) is None, "a file that has disappeared, too"


# ---------------------------------------------------------------- folders


def make_folder(root, files):
    """Write small images, file i of grey level i, and return the folder for open_dataset()."""
    for level, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (level, level, level)).save(root / name)
    return str(root)


def names(dataset):
    """The file of every item, relative to the folder."""
    return [os.path.relpath(dataset.path(i), dataset.root) for i in range(len(dataset))]


def contents(dataset):
    """(file relative to the folder, class name, grey level) of every item."""
    found = []
    for i, file in enumerate(names(dataset)):
        image, label, _ = dataset[i]
        found.append((file, dataset.classes[label], int(image[0, 0, 0])))
    return found


@pytest.mark.folders
def test_classes_and_files_are_sorted(tmp_path):
    """Labels follow the sorted class names and items the sorted files, on every file system."""
    root = make_folder(tmp_path, ["b/2.png", "b/10.png", "a/x.png", "C/y.png"])
    data = open_dataset(root, "all")
    assert data.classes == ["C", "a", "b"]  # by code point, capitals first
    b = [("b/10.png", "b", 1), ("b/2.png", "b", 0)]
    assert contents(data) == [("C/y.png", "C", 3), ("a/x.png", "a", 2), *b]
    assert [data[i][1:] for i in range(4)] == [(0, -1), (1, -1), (2, -1), (2, -1)]


@pytest.mark.folders
def test_subfolders_belong_to_their_class(tmp_path):
    """An image at any depth below a class folder is of that class."""
    cats = ["cat/1.png", "cat/indoor/2.png", "cat/indoor/sofa/3.png"]
    root = make_folder(tmp_path, [*cats, "dog/a/b/c/4.png"])
    data = open_dataset(root, "all")
    assert contents(data) == [
        ("cat/1.png", "cat", 0),
        ("cat/indoor/2.png", "cat", 1),
        ("cat/indoor/sofa/3.png", "cat", 2),
        ("dog/a/b/c/4.png", "dog", 3),
    ]


@pytest.mark.folders
def test_odd_names(tmp_path):
    """Spaces, accents, other scripts, emoji and dots in names are read and given back."""
    names = ["big cat/my photo (1).png", "chien à poil/éléphant.v2.PNG", "猫/写真.png", "🐈/👍.png"]
    data = open_dataset(make_folder(tmp_path, names), "all")
    assert contents(data) == [(name, name.split("/")[0], level) for level, name in enumerate(names)]


@pytest.mark.folders
def test_what_is_no_image_is_left_out(tmp_path):
    """Hidden folders, files beside the class folders and other files are no data."""
    root = make_folder(tmp_path, ["a/1.png", "b/2.png", ".cache/3.png", "4.png"])
    (tmp_path / "a" / "notes.txt").write_text("ignored")
    (tmp_path / "a" / "png").write_text("a name without extension")
    data = open_dataset(root, "all")
    assert data.classes == ["a", "b"]
    assert contents(data) == [("a/1.png", "a", 0), ("b/2.png", "b", 1)]


@pytest.mark.folders
def test_what_systems_leave_behind_is_no_data(tmp_path, capsys):
    """Hidden files, macOS's and Synology's copies and thumbnails, and results of our own runs are
    neither mentioned nor read."""
    others = "__MACOSX/a/3.png a/.hidden.png a/.ipynb_checkpoints/4.png a/@eaDir/1.png/thumb.jpg"
    results = "runs/x/inspect/figure.png b/y/figure.png"
    root = make_folder(tmp_path, ["a/1.png", "b/2.png", *others.split(), *results.split()])
    empty = "a/._1.png a/Thumbs.db b/desktop.ini .DS_Store runs/x/last.pt b/y/report.html"
    for name in empty.split():
        (tmp_path / name).write_bytes(b"")
    data = open_dataset(root, "all")
    assert data.classes == ["a", "b"] and names(data) == ["a/1.png", "b/2.png"]
    told = f"warning: {root}; 1 class folders without images are left out (runs)\n"
    assert capsys.readouterr().err == told


@pytest.mark.folders
def test_what_is_left_out_is_said(tmp_path, capsys):
    """A class folder without an image that can be read is named, with the types of its files, and
    is no class."""
    root = make_folder(tmp_path, ["a/1.png", "b/2.png", "b/sub/3.jfif"])
    (tmp_path / "c").mkdir()
    for i in range(10):
        (tmp_path / "c" / f"IMG_{i}.HEIC").write_bytes(b"x")
    data = open_dataset(root, "all")
    assert open_dataset(root, "all").classes == data.classes == ["a", "b"]
    [told] = capsys.readouterr().err.splitlines()  # once, although it was opened twice
    assert told.startswith(f"warning: {root}; 1 class folders without images are left out (c); ")
    assert "; 10 files of other types are left out (.heic); " in told
    assert "; 1 images lie deeper than in a class folder " in told
    assert told.endswith("belong to the upper one (b/sub/3.jfif)")


@pytest.mark.folders
def test_links_do_not_lead_in_a_circle(tmp_path, capsys):
    """20 images stay 20: a link to a folder above, or to one that is read already, is named and not
    followed."""
    root = make_folder(tmp_path / "data", [f"{name}/{i}.png" for name in "ab" for i in range(10)])
    make_folder(tmp_path / "elsewhere", ["20.png"])
    for link, target in [("a/up", ".."), ("b/up", ".."), ("a/b", "../b"), ("above", "../.."),
                         ("a/self", "self"), ("a/more", "../../elsewhere")]:
        os.symlink(target, tmp_path / "data" / link)
    data = open_dataset(root, "all")
    assert data.classes == ["a", "b"] and len(data) == 21 and "a/more/20.png" in names(data)
    told = capsys.readouterr().err
    assert [
        f"{root}/{link} leads to a folder" in told for link in ("a/up", "b/up", "a/b", "above")
    ] == [True] * 4


@pytest.mark.folders
@pytest.mark.parametrize("train, val", [
    ("train", "valid"), ("Train", "Val"), ("TRAINING", "validation"), ("train", "test")])
def test_other_names_of_the_splits(tmp_path, train, val):
    """Folders of other usual names, also in capitals, are the splits, and not classes."""
    files = f"{train}/a/1.png {train}/b/2.png {val}/a/3.png {val}/b/4.png"
    root = make_folder(tmp_path, files.split())
    assert names(open_dataset(root, "train")) == ["a/1.png", "b/2.png"]
    for split in ("val", "all"):
        assert names(open_dataset(root, split)) == ["a/3.png", "b/4.png"]


@pytest.mark.folders
def test_a_class_may_be_called_train(tmp_path):
    """Beside bus/ a folder train/ with images in it is a class; one with class folders in it is
    split alone."""
    root = make_folder(tmp_path / "flat", ["bus/1.png", "train/2.png"])
    assert open_dataset(root, "all").classes == ["bus", "train"]
    files = [f"train/{name}/{i}.png" for name in "ab" for i in range(5)] + ["other/c/1.png"]
    root = make_folder(tmp_path / "alone", files)
    assert open_dataset(root, "val").labels.tolist() == [0, 1]
    assert len(open_dataset(root, "train")) == 8


@pytest.mark.folders
@pytest.mark.parametrize("files", [
    ["my_dataset/a/1.png", "my_dataset/b/2.png"],
    ["archive/train/a/1.png", "archive/val/a/2.png"],
])
def test_one_class_is_nothing_to_learn(tmp_path, files):
    """A folder too high has one class, on which the accuracy would be 100%: training refuses it."""
    root = make_folder(tmp_path, files)
    top = files[0].split("/")[0]
    told = f"only one class folder, {top}, in .*: give the folder that holds"
    with pytest.raises(ValueError, match=told):
        open_dataset(root, "train")


@pytest.mark.folders
def test_one_corruption_has_no_classes(tmp_path):
    """The severities 1 to 5 of one corruption of ImageNet-C are not classes; folders 1 to 5 with
    images in them are."""
    files = [f"{severity}/n0{i}/1.png" for severity in range(1, 6) for i in range(2)]
    root = make_folder(tmp_path / "fog", files)
    told = "fog looks like one corruption of ImageNet-C: its folders 1, 2, 3, 4, 5 hold class"
    with pytest.raises(ValueError, match=told):
        open_dataset(root, "all")
    stars = make_folder(tmp_path / "stars", ["1/1.png", "5/2.png"])
    assert open_dataset(stars, "all").classes == ["1", "5"]
    files = [f"{split}/{name}/patient{i}/x.png"
             for split in ("train", "val") for name in "12" for i in "ab"]
    grades = make_folder(tmp_path / "grades", files)
    assert open_dataset(grades, "val").classes == ["1", "2"], "a folder per patient in each class"


@pytest.mark.counting
@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be blocked")
def test_new_processes_of_a_loader_get_no_signal():
    """SIGINT and SIGTERM are blocked while a loader starts its processes, and not after it."""
    met = []

    class Loader:
        num_workers = 1

        def __iter__(self):
            met.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
            return iter([])

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    evaluation.start_loader(Loader())
    assert {signal.SIGINT, signal.SIGTERM} <= met[0]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.counting
def test_a_loader_starts_where_signals_cannot_be_blocked(monkeypatch):
    """On Windows there is no pthread_sigmask."""
    monkeypatch.delattr(signal, "pthread_sigmask")

    class Loader(list):
        num_workers = 1

    assert list(evaluation.start_loader(Loader([1, 2]))) == [1, 2]


@pytest.mark.folders
def test_an_error_without_words_is_not_lost():
    """together() raises whatever error it caught, also one that says nothing."""
    with pytest.raises(ValueError, match="OSError"):
        with evaluation.together():
            raise OSError


@pytest.mark.folders
@pytest.mark.parametrize("errors, met", [
    ([None, None], None), (["no data", None], "^no data$"), ([None, "full"], "^process 1: full$")])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_ends_all(errors, met, rank, monkeypatch):
    """Rank 0 raises it and names the process. The others leave with status 2, if there is one."""
    monkeypatch.setattr(evaluation.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluation.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(evaluation.dist, "get_rank", lambda: rank)
    gather = lambda found, own: found.__setitem__(slice(None), errors)
    monkeypatch.setattr(evaluation.dist, "all_gather_object", gather)
    ending = pytest.raises(SystemExit if rank else ValueError, match="2" if rank else met)
    with ending if met else contextlib.nullcontext(), evaluation.together():
        if errors[rank]:
            raise ValueError(errors[rank])


@pytest.mark.folders
def test_a_folder_that_cannot_be_opened(tmp_path, monkeypatch):
    """A class folder without permission is an error that names it, and not a class of no images."""
    root = make_folder(tmp_path, ["a/1.png", "b/2.png"])
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=f"cannot open the folder {root}/b: Permission denied"):
        open_dataset(root, "all")


@pytest.mark.folders
def test_one_name_in_two_spellings(tmp_path):
    """macOS stores é as e and an accent: in train/ and val/ it is the same class, and the file is
    found under its own name."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    files = f"train/{composed}/1.png train/b/2.png val/{decomposed}/3.png val/b/4.png"
    root = make_folder(tmp_path, files.split())
    train, val = (open_dataset(root, split) for split in ("train", "val"))
    assert train.classes == val.classes == ["b", composed] and int(val[1][0][0, 0, 0]) == 2
    one, other = (open_dataset(make_folder(tmp_path / "flat" / name, [f"{name}/1.png"]), "all")
                  for name in (composed, decomposed))
    assert one.fingerprint() == other.fingerprint(), "a copy on another system is the same data"


@pytest.mark.folders
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_no_terminal_can_show(tmp_path, capsys):
    """Names in Latin-1 or with a line break are read, and written with escapes: a message stays one
    line."""
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    for i, name in enumerate([b"a\nb.png", b"\xfc.png"]):
        with open(os.path.join(folder, name), "wb") as file:
            Image.new("L", (4, 4), i).save(file, "png")
    data = open_dataset(str(tmp_path), "all")
    assert [int(data[i][0][0, 0, 0]) for i in range(2)] == [0, 1]
    assert data.fingerprint()["images"] == [2] and data.classes == ["caf\udce9"]
    evaluation.warn(f"cannot read {data.path(0)}")
    assert capsys.readouterr().err == f"warning: cannot read {tmp_path}/caf\\udce9/a\\nb.png\n"
    with pytest.raises(SystemExit, match="2"):
        evaluation.fail(f"cannot read {data.path(0)}")
    assert capsys.readouterr().err == f"error: cannot read {tmp_path}/caf\\udce9/a\\nb.png\n"


@pytest.mark.folders
def test_train_and_val_folders(tmp_path):
    """Where there are train/ and val/, "train" is the one, and "val" and "all" are the other."""
    files = "train/a/1.png train/b/2.png val/a/3.png val/b/4.png val/b/5.png"
    root = make_folder(tmp_path, files.split())
    assert contents(open_dataset(root, "train")) == [("a/1.png", "a", 0), ("b/2.png", "b", 1)]
    val = [("a/3.png", "a", 2), ("b/4.png", "b", 3), ("b/5.png", "b", 4)]
    assert contents(open_dataset(root, "val")) == contents(open_dataset(root, "all")) == val


@pytest.mark.folders
def test_a_flat_folder_holds_out_a_fifth(tmp_path):
    """Without a folder for validation the fifth of each class with the smallest hashes validates,
    the rest trains."""
    files = [f"{name}/{i:02}.png" for name in "ab" for i in range(11)]
    root = make_folder(tmp_path, files)
    train, val, everything = (names(open_dataset(root, split)) for split in ("train", "val", "all"))
    # 11 // 5 = 2 of 11. `printf 03.png | sha256sum` begins with 0490, of 06.png with 0ba7; the
    # third, 02.png, with 0ec4.
    assert val == ["a/03.png", "a/06.png", "b/03.png", "b/06.png"], (
        "is the class folder a part of the name?")
    assert sorted(train + val) == everything == files and not set(train) & set(val)


@pytest.mark.folders
def test_one_image_less_moves_at_most_one(tmp_path):
    """Whichever of 23 images is removed, at most one other changes sides: else training images
    would validate."""
    files = [f"a/{i}.png" for i in range(23)]

    def held_out(files):
        return set(hold_out({"a": files}, "val", "root")["a"])

    before = held_out(files)
    assert len(before) == 4 and held_out(files[::-1]) == before, "the order must not matter"
    for removed in files:
        after = held_out([name for name in files if name != removed])
        assert len((before ^ after) - {removed}) <= 1


@pytest.mark.folders
def test_a_class_of_few_images_is_named(tmp_path, capsys):
    """Fewer than 5 images have no fifth: such a class is named in a warning; if all are so small,
    that is an error."""
    files = [f"{name}/{i}.png" for name in "ab" for i in range(5)]
    root = make_folder(tmp_path / "some", [*files, "c/0.png", "d/0.png"])
    assert open_dataset(root, "val").labels.tolist() == [0, 1]
    assert open_dataset(root, "train").classes == ["a", "b", "c", "d"]
    told = f"warning: 2 of 4 classes of {root} have fewer than 5 images, and so no validation image"
    assert capsys.readouterr().err == told + ": c, d\n", "once, although it was opened twice"
    told = "1 of 1 classes of .* have fewer than 5 images: too few to hold out a fifth"
    with pytest.raises(ValueError, match=told):
        open_dataset(make_folder(tmp_path / "none", files[:4]), "val")


@pytest.mark.folders
def test_a_transform_sees_every_image(tmp_path):
    """The transform is applied to what was read, so that images of all sizes fit in one batch."""
    (tmp_path / "a").mkdir()
    for i, size in enumerate([(40, 20), (20, 40), (8, 8)]):
        Image.new("L", size, 9).save(tmp_path / "a" / f"{i}.png")
    data = open_dataset(str(tmp_path), "all", v2.Resize((16, 16)))
    images, labels, unreadable = next(iter(DataLoader(data, batch_size=3)))
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8 and (images == 9).all()
    assert labels.tolist() == [0, 0, 0] and unreadable.tolist() == [-1, -1, -1]


@pytest.mark.folders
@pytest.mark.parametrize("make, expected", [
    (lambda root: None, "no data at"),
    (lambda root: (root.parent / "here").write_text("a file"), "is a file: to train, give a"),
    (lambda root: root.mkdir(), "no class folders in"),
    (lambda root: make_folder(root, ["1.png", "2.png"]), "no class folders in"),
    (lambda root: (root / "a").mkdir(parents=True), "no images in the class folders of"),
    (lambda root: list(map(os.makedirs, [root / "train/a", root / "val"])), "no class folders in"),
], ids=["missing", "a file", "empty", "no classes", "no images", "empty val"])
def test_a_folder_without_images_shows_what_was_expected(tmp_path, make, expected):
    """A data set that is not there is an error with the place and the expected tree."""
    root = tmp_path / "here"
    make(root)
    with pytest.raises(ValueError) as error:
        open_dataset(str(root), "val")
    message = str(error.value)
    assert expected in message and str(root) in message
    assert "FOLDER/train/<class>/<image>.jpg" in message
    assert " or FOLDER/<class>/<image>.jpg" in message


@pytest.mark.folders
@pytest.mark.parametrize(
    "broken, item, replaced_by",
    [
        ([1], 1, 2),  # by the next
        ([1, 2], 1, 3),  # by the next that can be read
        ([3], 3, 0),  # after the last comes the first
    ],
)
def test_an_unreadable_file_is_replaced_and_reported(tmp_path, broken, item, replaced_by):
    """For a broken file comes the next, with ITS label and the index of the broken one."""
    root = make_folder(tmp_path, ["a/0.png", "a/1.png", "b/2.png", "c/3.png"])
    data = open_dataset(root, "all")
    for i in broken:
        Path(data.path(i)).write_bytes(b"")
    image, label, unreadable = data[item]
    assert int(image[0, 0, 0]) == replaced_by
    assert label == [0, 0, 1, 2][replaced_by], "the label must be that of the picture"
    assert unreadable == item, "report the file that was asked for"


@pytest.mark.folders
@forked.needs_fork
def test_an_error_of_a_worker_is_one_line(tmp_path, capsys):
    """An error of a transform names the file, and the worker's traceback is left out."""

    def too_large(image):
        raise RuntimeError("not enough memory: you tried to allocate 4 GB\nand more")

    data = open_dataset(make_folder(tmp_path, ["a/0.png"]), "all", too_large)
    try:
        next(iter(DataLoader(data, num_workers=1, multiprocessing_context="fork")))
    except ValueError as error:
        message = str(error)  # the error itself would keep the worker alive
    assert "Traceback" in message
    with pytest.raises(SystemExit, match="2"):
        evaluation.fail(evaluation.last_line(message))
    told = f"error: cannot prepare {tmp_path}/a/0.png, (5, 6) pixels: not enough memory"
    assert capsys.readouterr().err == told + ": you tried to allocate 4 GB\n"


@pytest.mark.folders
def test_a_folder_of_broken_files_is_an_error(tmp_path):
    """The search for a readable file ends after 100, with the name of the first."""
    root = make_folder(tmp_path, ["a/0.png", "a/1.png"])
    for name in ("0.png", "1.png"):
        (tmp_path / "a" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"100 images in a row cannot be read, from .*1\.png"):
        open_dataset(root, "all")[1]


@pytest.mark.folders
def test_pictures_without_classes(tmp_path):
    """A file is one picture, a folder all that lie in it, sorted: items have the label -1."""
    root = make_folder(tmp_path / "d", ["b.png", "a.png", ".hidden.png"])
    (tmp_path / "d" / "notes.txt").write_text("no picture")
    (tmp_path / "d" / "sub").mkdir()
    (tmp_path / "d" / "sub" / "notes.txt").write_text("nor is this a class")
    data = open_pictures(root, lambda image: image + 10)
    assert [data.path(i) for i in range(len(data))] == [f"{root}/a.png", f"{root}/b.png"]
    assert data.classes == []
    items = [(int(image[0, 0, 0]), label, unreadable) for image, label, unreadable in map(
        data.__getitem__, range(2))]
    assert items == [(11, -1, -1), (10, -1, -1)], "(transformed grey level, label, unreadable)"
    one = open_pictures(f"{root}/b.png")
    assert len(one) == 1 and one.path(0) == f"{root}/b.png" and one[0][0].shape == (3, 5, 6)


@pytest.mark.folders
def test_what_is_not_pictures_without_classes(tmp_path):
    """None is what open_dataset() may know, or nobody: with a class folder a folder has classes."""
    classes = make_folder(tmp_path / "c", ["a/0.png", "b/1.png"])
    both = make_folder(tmp_path / "both", ["0.png", "a/1.png"])
    (tmp_path / "empty").mkdir()
    for spec in (classes, both, str(tmp_path / "empty"), str(tmp_path / "no"), "shapes", "cifar10"):
        assert open_pictures(spec) is None, spec


@pytest.mark.folders
def test_pictures_that_cannot_be_used(tmp_path):
    """An unreadable picture is a black one with its index; one too large to prepare is named."""
    root = make_folder(tmp_path / "d", ["a.png", "b.png"])
    (tmp_path / "d" / "a.png").write_bytes(b"no picture")
    image, label, unreadable = open_pictures(root, v2.Resize((32, 32)))[0]
    assert torch.equal(image, torch.zeros(3, 32, 32, dtype=torch.uint8))
    assert (label, unreadable) == (-1, 0)

    def too_large(image):
        raise MemoryError("of 9 GB")

    with pytest.raises(ValueError, match=r"cannot prepare .*b.png, \(5, 6\) pixels: of 9 GB"):
        open_pictures(root, too_large)[1]


@pytest.mark.folders
@pytest.mark.parametrize("spec, expected", [
    ("d/a.png", "d/a.png is a file: to train, give"), ("d", "no class folders in d.* expected")])
def test_pictures_without_classes_are_nothing_to_learn(tmp_path, monkeypatch, spec, expected):
    """For training they are one line, which says what is expected."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "d", ["a.png", "b.png"])
    with pytest.raises(ValueError, match=f"{expected} .*FOLDER"):
        open_dataset(spec, "train")


@pytest.mark.folders
def test_a_fingerprint_is_of_names(tmp_path):
    """A data set in another place has the same fingerprint; one image less, renamed or of another
    class changes it."""
    names = ["a/1.png", "b/2.png", "b/3.png"]
    first = open_dataset(make_folder(tmp_path / "first", names), "all").fingerprint()
    assert (first["classes"], first["images"]) == (["a", "b"], [1, 2])
    none_of_b = evaluation.TensorImages(torch.zeros(2, 3, 1, 1), torch.tensor([0, 0]), ["a", "b"])
    assert evaluation.fingerprint(none_of_b, b"")["images"] == [2, 0]
    assert open_dataset(make_folder(tmp_path / "copy", names), "all").fingerprint() == first
    for i, other in enumerate(
        [names[:2], ["a/1.png", "b/2.png", "b/4.png"], ["a/1.png", "a/2.png", "b/3.png"]]
    ):
        changed = open_dataset(make_folder(tmp_path / str(i), other), "all").fingerprint()
        assert changed["digest"] != first["digest"], other


@pytest.mark.folders
def test_a_fingerprint_of_pictures_in_memory():
    """Pictures without names are known by their labels: equal for the same pictures, not for
    fewer."""
    first, fewer = Shapes(20, 1).fingerprint(), Shapes(19, 1).fingerprint()
    assert Shapes(20, 1).fingerprint() == first and first["digest"] != fewer["digest"]
    assert len(first["classes"]) == 16 and sum(first["images"]) == 20


@pytest.mark.folders
@pytest.mark.parametrize("spec, kind", [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_cifar_has_channels_first(monkeypatch, spec, kind):
    """CIFAR's (N, rows, columns, 3) become (N, 3, rows, columns); the test half validates."""

    class Fake:
        filename = "archive.tar.gz"
        classes, targets = ["cat", "dog"], [1, 0]

        def __init__(self, root, train, download):
            numbers = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8)
            self.data = numbers.view(2, 4, 5, 3).numpy() + train

    monkeypatch.setattr(evaluation.torchvision.datasets, kind, Fake)
    for split, plus in [("train", 1), ("val", 0), ("all", 0)]:
        # without its first row
        data = open_dataset(spec, split, transform=lambda image: image[:, 1:])
        image, label, unreadable = data[1]
        assert image.shape == (3, 3, 5)
        assert (label, unreadable, data.classes) == (0, -1, ["cat", "dog"])
        # image 1, row 2, column 3, channel 0 is value 1 * 60 + 2 * 15 + 3 * 3 + 0
        assert image[0, 1, 3] == 99 + plus, "channels last, or the other half"


@pytest.mark.folders
@pytest.mark.parametrize("problem", [OSError("no route\nto host"), RuntimeError("corrupted")])
def test_cifar_without_a_network(monkeypatch, problem):
    """If the download fails, one line says what went wrong and which file to get by hand."""

    class Fake:
        filename = "cifar-10-python.tar.gz"

        def __init__(self, *_, **__):
            raise problem

    monkeypatch.setattr(evaluation.torchvision.datasets, "CIFAR10", Fake)
    expected = "not downloaded .*place cifar-10-python"
    with pytest.raises(ValueError, match=expected) as error:
        open_dataset("cifar10", "train")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- from pixels to the model


@pytest.mark.counting
@pytest.mark.parametrize(
    "image_size, crop_ratio, height, width, rows, columns",
    [
        (32, 0.5, 64, 64, (16, 48), (16, 48)),  # 32 / 0.5 = 64: no resizing; (64 - 32) / 2 = 16
        # 224 / 0.875 = 256, the short side; (300 - 224) / 2 = 38
        (224, 0.875, 256, 300, (16, 240), (38, 262)),
        (224, 0.875, 300, 256, (38, 262), (16, 240)),
        (32, 1.0, 32, 48, (0, 32), (8, 40)),  # a ratio of 1: all of the short side
    ],
)
def test_the_centre_is_evaluated(image_size, crop_ratio, height, width, rows, columns):
    """The short side becomes image_size / crop_ratio pixels, then the centre square is cut out."""
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    # the short side has its size already: nothing is interpolated
    expected = image[:, slice(*rows), slice(*columns)]
    assert torch.equal(eval_transform(image_size, crop_ratio)(image), expected)


@pytest.mark.counting
@pytest.mark.parametrize("height, width, resized", [(96, 120, (64, 80)), (20, 10, (128, 64))])
def test_resizing_is_bicubic(height, width, resized):
    """Images are resized with the bicubic filter of Pillow, to one grey value."""
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    pillow = v2.functional.to_pil_image(image).resize(resized[::-1], Image.BICUBIC)
    top, left = (resized[0] - 48) // 2, (resized[1] - 48) // 2
    expected = v2.functional.pil_to_tensor(pillow)[:, top : top + 48, left : left + 48]
    # 48 / 0.75 = 64
    difference = (eval_transform(48, 0.75)(image).int() - expected.int()).abs().max()
    assert difference <= 1, "bilinear, or not antialiased?"


@pytest.mark.counting
def test_normalize_by_hand():
    """A pixel becomes (pixel / 255 - mean) / std with mean and std of its own colour."""
    # red 0, green 51 = 0.2 * 255, blue 255
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    # (0 - 0.5) / 0.25 = -2;  (0.2 - 0.4) / 0.5 = -0.4;  (1 - 0.6) / 0.2 = 2
    expected = torch.tensor([-2.0, -0.4, 2.0]).view(1, 3, 1, 1)
    actual = normalize(images, mean=(0.5, 0.4, 0.6), std=(0.25, 0.5, 0.2))
    assert_close(actual, expected, msg=lambda m: f"std and mean swapped? {m}")


@pytest.mark.counting
def test_normalize_works_on_the_device_of_the_images():
    """Mean and std are tensors there, too: on a GPU nothing else can be computed with."""
    images = on_meta(1, 3, 2, 2, dtype=torch.uint8)
    assert normalize(images, (0.5,) * 3, (0.25,) * 3).is_meta


@pytest.mark.counting
def test_autocast_is_on_for_bfloat16_only():
    """Under autocast() a matrix product is computed in the dtype of the run."""
    a = torch.ones(2, 2)
    for dtype in (torch.bfloat16, torch.float32):
        with autocast(CPU, dtype):
            assert (a @ a).dtype == dtype


@pytest.mark.counting
def test_bfloat16_is_for_gpus_that_have_it(monkeypatch):
    """Only a GPU that computes in bfloat16 itself runs in it."""
    for native, dtype in [(True, torch.bfloat16), (False, torch.float32)]:
        supported = functools.partial(lambda native, emulated=True: native or emulated, native)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert best_dtype(torch.device("cuda")) == dtype and best_dtype(CPU) == torch.float32


@pytest.mark.classes
def test_match_classes_by_name():
    """Each class of the data gets the position of its name in the checkpoint."""
    assert match_classes(["cat", "dog"], ["dog", "ant", "cat"]) == [2, 0]


@pytest.mark.classes
def test_unknown_classes_are_named():
    """Unknown classes are counted and named, with examples of known ones."""
    expected = r"2 of 3 classes .* unknown .*\(cow, eel.*it knows ant, cat"
    with pytest.raises(ValueError, match=expected):
        match_classes(["cat", "cow", "eel"], ["ant", "cat"])


@pytest.mark.counting
def test_loading_needs_processes_only_for_files(tmp_path, monkeypatch):
    """Images in memory are served by this process, files by a share of the processors, 1 to 12."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    files = open_dataset(make_folder(tmp_path, ["a/0.png"]), "all")
    assert auto_workers(Shapes(500, seed=1)) == 0
    assert [auto_workers(files, world) for world in (1, 8, 100)] == [12, 8, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # by torchrun: 8 of the 100 are on this machine
    assert auto_workers(files, 100) == 8


# ---------------------------------------------------------------- counting


class Known(nn.Module):
    """Return row i of a table of logits for an image of grey level i."""

    def __init__(self, table):
        super().__init__()
        self.table, self.modes = table, []

    def forward(self, images):  # evaluated with mean 0 and std 1, so that a pixel is level / 255
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.table[(images[:, 0, 0, 0] * 255).round().long()]


def count(table, labels, columns=None, batch_size=2, model=None, **options):
    """evaluate() for images of grey levels 0, 1, 2, ..., with the logits in the table."""
    levels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    names = [f"class {i}" for i in range(12)]
    loader = eval_loader(TensorImages(levels, torch.tensor(labels), names), batch_size, 0, CPU)
    return evaluate(model or Known(table), loader, CPU, (0.0,) * 3, (1.0,) * 3, columns, **options)


@pytest.mark.counting
def test_counting_by_hand():
    """top1 and top5 are percentages of the images, loss is the mean cross-entropy."""
    ln2 = math.log(2)
    table = torch.tensor(
        [
            [ln2, 0.0, 0.0],  # softmax 1/2, 1/4, 1/4
            [0.0, ln2, 0.0],
            [0.0, 0.0, ln2],
            [ln2, 0.0, 0.0],
        ]
    )
    result = count(table, labels=[0, 1, 2, 1])  # right, right, right, wrong
    # loss: -ln 1/2 three times, -ln 1/4 = 2 ln 2 once
    counts = dict(images=4, correct1=3, correct5=4, top1=75.0, top5=100.0)
    assert result == pytest.approx(counts | dict(loss=5 * ln2 / 4))


@pytest.mark.counting
def test_sigmoid_losses_by_hand():
    """Each class is a yes or no of its own: logits ln 3, 0, 0 say yes by 3/4, 1/2, 1/2."""
    ln2, ln4 = math.log(2), math.log(4)
    logits = torch.tensor([[math.log(3), 0.0, 0.0]] * 3)
    answers = torch.tensor([[0, -1], [2, -1], [0, 2]])  # one right answer, another, both
    # -ln 3/4 if class 0 is a yes, -ln 1/4 if it is a no; the other two cost ln 2 each, always
    expected = [math.log(4 / 3) + 2 * ln2, ln4 + 2 * ln2, math.log(4 / 3) + 2 * ln2]
    assert image_losses(logits, answers, "sigmoid").tolist() == pytest.approx(expected)


@pytest.mark.counting
@pytest.mark.parametrize("batch_size", [1, 7, 23, 100])
def test_counting_against_a_loop(batch_size):
    """The last, smaller batch counts like the others: 23 images give the same at any size."""
    table, labels = torch.randn(23, 12), torch.randint(0, 12, (23,)).tolist()
    labels[:8] = table[:8].argmax(1).tolist()  # so that not all are wrong
    top1 = top5 = loss = 0
    for logits, label in zip(table.double(), labels):
        # classes ahead of the right one
        better = sum(float(value) > float(logits[label]) for value in logits)
        top1 += better < 1
        top5 += better < 5
        loss -= float(logits.log_softmax(0)[label])
    expected = dict(images=23, correct1=top1, correct5=top5, loss=loss / 23)
    expected |= dict(top1=100 * top1 / 23, top5=100 * top5 / 23)
    found = count(table, labels, batch_size=batch_size)
    assert found == pytest.approx(expected), "a mean of means of unequal batches?"


@pytest.mark.counting
@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("columns", [None, [4, 0, 7]])
def test_the_confusion_matrix_against_a_loop(batch_size, columns):
    """It counts each image at (true class, predicted class), at any size of the batches."""
    C = len(columns or range(12))
    table, labels = torch.randn(23, 12), torch.randint(0, C, (23,)).tolist()
    expected = torch.zeros(C, C, dtype=torch.int64)
    for logits, label in zip(table, labels):
        taking_part = [float(logits[column]) for column in columns or range(12)]
        expected[label, taking_part.index(max(taking_part))] += 1
    result = count(table, labels, columns, batch_size, confusion=True)
    found = result.pop("confusion")
    assert found.dtype == torch.int64
    assert torch.equal(found, expected), "transposed?" if torch.equal(found, expected.T) else ""
    assert found.sum() == 23 and found.trace() == result["correct1"]
    assert result == count(table, labels, columns, batch_size), "only when asked"


@pytest.mark.counting
def test_accuracy_per_class_against_a_loop():
    """Of the images of a class, so many percent are right: no number for a class without any."""
    confusion = torch.randint(0, 9, (6, 6))
    confusion[2] = 0
    for i, accuracy in enumerate(accuracy_per_class(confusion).tolist()):
        images = sum(int(confusion[i, j]) for j in range(6))
        expected = 100 * int(confusion[i, i]) / images if images else math.nan
        assert accuracy == pytest.approx(expected, nan_ok=True), "of the images predicted so?"


@pytest.mark.counting
def test_the_worst_pairs_against_a_loop():
    """The most frequent first, equal ones in the order of the classes, nothing that is right."""
    confusion = torch.randint(0, 4, (6, 6))
    pairs = []
    for true in range(6):
        for predicted in range(6):
            if true != predicted and confusion[true, predicted] > 0:
                pairs.append([true, predicted, int(confusion[true, predicted])])
    pairs.sort(key=lambda pair: -pair[2])
    assert worst_pairs(confusion) == pairs
    assert worst_pairs(confusion, 3) == pairs[:3]
    assert worst_pairs(confusion, 99) == pairs
    assert worst_pairs(torch.eye(3, dtype=torch.int64), 5) == []


@pytest.mark.counting
def test_class_probabilities_against_a_loop():
    """softmax shares 1 among the classes; sigmoid asks each on its own, as V-MoE's loss does."""
    logits = torch.randn(3, 4)
    softmax = class_probabilities(logits, "softmax").tolist()
    sigmoid = class_probabilities(logits, "sigmoid").tolist()
    for i, row in enumerate(logits.tolist()):
        total = sum(math.exp(logit) for logit in row)
        assert softmax[i] == pytest.approx([math.exp(logit) / total for logit in row])
        assert sigmoid[i] == pytest.approx([1 / (1 + math.exp(-logit)) for logit in row])


@pytest.mark.counting
def test_output_goes_on_when_nobody_reads_it(tmp_path):
    """Lines arrive at once, also with names that the encoding lacks; a closed pipe ends nothing."""
    with open(tmp_path / "log", "w", encoding="ascii") as log:
        print("caf\u00e9 \udce9", file=evaluation.Output(log))
        assert (tmp_path / "log").read_text() == "caf\\xe9 \\udce9\n"
    reader, writer = os.pipe()
    out = evaluation.Output(open(writer, "w"))
    os.close(reader)
    for _ in range(3):
        print("a line", file=out, flush=True)


@pytest.mark.counting
@pytest.mark.parametrize("name, on_a_terminal, shown", [
    ("val", True, True), ("", True, False), ("val", False, False)])
def test_a_progress_bar_is_for_a_terminal(name, on_a_terminal, shown, monkeypatch):
    """It has a name, and it is gone when the last batch is done."""
    terminal = io.StringIO()
    terminal.isatty = lambda: on_a_terminal
    monkeypatch.setattr(sys, "stderr", terminal)
    loader = eval_loader(Shapes(4, seed=1), 2, 0, CPU)
    assert len(list(evaluation.show_progress(loader, name))) == 2
    assert (f"{name}: " in terminal.getvalue()) == shown
    assert not shown or terminal.getvalue().endswith(" \r"), "the line is not empty at the end"


@pytest.mark.counting
def test_top5_with_fewer_than_five_classes():
    """With three classes every label is among the best five: top5 is 100."""
    assert count(torch.randn(6, 3), [0, 1, 2, 0, 1, 2])["top5"] == 100.0


@pytest.mark.counting
def test_columns_restrict_the_prediction():
    """With columns the prediction and the loss are made among the data's classes only."""
    # column 0 is best, but no class of the data; of 3 and 1, 3 is best
    table = torch.tensor(
        [[9.0, 1.0, 2.0, 3.0], [9.0, 5.0, 2.0, 3.0], [9.0, 0.0, 2.0, 1.0]]  # of 3 and 1, 1 is best
    )  # of 3 and 1, 3 is best
    # label 0 of the data is column 3, label 1 is column 1
    result = count(table, labels=[0, 1, 1], columns=[3, 1])
    assert result["top1"] == pytest.approx(100 * 2 / 3), "0 if all four columns take part"
    # two logits 2 apart, right and wrong: ln(1 + e^-2) twice; and 1 apart, wrong: ln(1 + e^1)
    assert result["loss"] == pytest.approx((2 * math.log1p(math.exp(-2)) + math.log1p(math.e)) / 3)


@pytest.mark.counting
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back(training):
    """A model is evaluated in evaluation mode, and left in the mode that it came in."""
    model = Known(torch.randn(4, 3)).train(training)
    count(None, [0, 1, 2, 0], model=model)
    assert model.modes == [(False, False)] * 2, "(training, gradients) at each batch"
    assert model.training == training


@pytest.mark.counting
def test_mean_and_std_reach_the_model():
    """evaluate() shows the model normalized images: black and white become -1 and 1."""

    class Watch(nn.Module):
        def forward(self, images):
            self.seen = images
            return torch.zeros(len(images), 2)

    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    model, data = Watch(), TensorImages(images, torch.tensor([0, 1]), ["black", "white"])
    evaluate(model, eval_loader(data, 2, 0, CPU), CPU, (0.5,) * 3, (0.5,) * 3)
    assert_close(model.seen, torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1))


@pytest.mark.counting
def test_the_model_runs_in_the_dtype_asked_for():
    """With dtype=bfloat16 the model runs under autocast, and its logits are counted in float32."""

    class Product(nn.Module):
        def forward(self, images):
            self.logits = images.flatten(1) @ torch.tensor([[0.0, 1.0]] * 3)
            return self.logits

    images = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)  # logits 0 and 3
    loader = eval_loader(TensorImages(images, torch.tensor([0]), ["-"]), 1, 0, CPU)
    for dtype in (torch.bfloat16, torch.float32):
        result = evaluate(model := Product(), loader, CPU, (0.0,) * 3, (1.0,) * 3, dtype=dtype)
        assert model.logits.dtype == dtype
        expected = math.log1p(math.exp(3))
        assert result["loss"] == pytest.approx(expected, rel=1e-6), "summed in bfloat16?"


@pytest.mark.counting
# batches of two: the third opens the second
@pytest.mark.parametrize("broken", ["a/0.png", "a/1.png", "b/2.png"])
def test_an_accuracy_without_an_image_is_refused(tmp_path, broken):
    """evaluate() stops at an unreadable file and names it."""
    data = open_dataset(make_folder(tmp_path, ["a/0.png", "a/1.png", "b/2.png"]), "all")
    (tmp_path / broken).write_bytes(b"")
    with pytest.raises(ValueError, match=f"cannot read .*{broken}: .*repair or replace the file"):
        loader = eval_loader(data, 2, 0, CPU)
        evaluate(Known(torch.zeros(3, 2)), loader, CPU, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.counting
def test_processes_share_the_images(monkeypatch):
    """Three processes get every one of 11 images once, and none twice to fill up."""
    images = torch.arange(11, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    data = TensorImages(images, torch.arange(11), ["-"])
    monkeypatch.setattr(evaluation.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluation.dist, "get_world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(evaluation.dist, "get_rank", lambda rank=rank: rank)
        batches = [labels for _, labels, _ in eval_loader(data, 2, 0, CPU)]
        shares.append(torch.cat(batches).tolist())
    assert sorted(itertools.chain(*shares)) == list(range(11)), "an image twice, or not at all"
    assert sorted(map(len, shares)) == [3, 4, 4]


@pytest.mark.counting
def test_the_sums_of_all_processes_are_added(monkeypatch):
    """The counts of all processes are added exactly: here to another's 2^24 hits."""
    monkeypatch.setattr(evaluation.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluation.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(evaluation.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(evaluation.dist, "all_gather_object", lambda errors, error: None)
    add = lambda sums, op=None: op or sums.add_(2**24)
    monkeypatch.setattr(evaluation.dist, "all_reduce", add)
    table = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    result = count(table, [0, 1, 1], columns=[0, 1], confusion=True)  # two of three are right
    assert result["confusion"].tolist() == [[2**24 + 1, 2**24], [2**24 + 1, 2**24 + 1]]
    assert result["images"] == 2**24 + 3, "float32 counts to 2^24 only, and then in steps of 2"
    assert result["top1"] == pytest.approx(100 * (2**24 + 2) / (2**24 + 3), rel=1e-12)


# ---------------------------------------------------------------- models and checkpoints


@pytest.mark.checkpoints
def test_every_model_has_a_name():
    """build_model() makes each preset from its name and options, and changes no config."""
    vits = "vit_nano vit_pico vit_micro vit_ti vit_s vit_b vit_b32 vit_l vmoe_s32"
    convnexts = "convnext_nano convnext_t convnext_s convnext_b convnext_iso_s convnext_iso_b"
    assert list(MODELS) == [*vits.split(), *convnexts.split()]
    config = dict(model="convnext_nano", num_classes=3, moe_layers="last2")
    for _ in range(2):
        model = build_model(config)
        assert model.head.out_features == 3 and model.moe_blocks == [4, 6]


@pytest.mark.checkpoints
@pytest.mark.parametrize("config, expected", [
    (dict(model="resnet"), "unknown model 'resnet': expected one of vit_nano, vit_pico, "),
    (dict(model="vit_nano", moe_layers="every3"), "expected one of none, every2, last2, last3"),
    (dict(model="vit_nano", moe_layers="last2", router="round"), "linear, cosine, l2"),
    (dict(model="convnext_nano", moe_layers="last2", num_experts=2, k=3),
     "k = 3: expected 1 to 2"),
])
def test_a_wrong_config_lists_what_exists(config, expected):
    """An option that does not exist is a ValueError that lists the valid ones."""
    with pytest.raises(ValueError) as error:
        build_model(config)
    assert expected in str(error.value)


def checkpoint_of(config, weights, averaged=None, **changes):
    """A checkpoint as train.py writes it, for a model of three classes and images in 0..1."""
    checkpoint = dict(config=config, classes=["a", "b", "c"], model=weights, ema=averaged)
    checkpoint |= dict(image_size=32, crop_ratio=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    checkpoint |= dict(optimizer={}, epoch=1, step=1, best=0.0, args={})
    assert set(checkpoint) == CHECKPOINT_KEYS
    return checkpoint | changes


CONFIG = dict(model="vit_nano", num_classes=3, depth=2, dim=16, moe_layers=[1])


@pytest.fixture
def saved_model(tmp_path):
    """Return a model that says "b" and a folder: both.pt also has averaged weights, for "c"."""
    model = build_model(CONFIG)
    nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([0.0, 5.0, 0.0])
    averaged = {name: weight.clone() for name, weight in model.state_dict().items()}
    averaged["head.bias"] = torch.tensor([0.0, 0.0, 5.0])
    torch.save(checkpoint_of(CONFIG, model.state_dict(), averaged), tmp_path / "both.pt")
    # not another seed
    torch.save(checkpoint_of(CONFIG, model.state_dict(), args=dict(ema=0)), tmp_path / "plain.pt")
    return model, tmp_path


@pytest.mark.checkpoints
def test_a_checkpoint_comes_back(tmp_path):
    """load_checkpoint() gives the same model in evaluation mode, and the stored dict."""
    model = build_model(CONFIG).eval()
    checkpoint = checkpoint_of(CONFIG, model.state_dict(), epoch=7)
    torch.save(checkpoint, tmp_path / "last.pt")
    loaded, stored = load_checkpoint(str(tmp_path / "last.pt"), CPU)
    images = torch.rand(2, 3, 32, 32)
    assert_close(loaded(images), model(images))
    assert not loaded.training and stored["epoch"] == 7 and stored["classes"] == ["a", "b", "c"]


@pytest.mark.checkpoints
def test_averaged_weights_are_preferred(saved_model):
    """Averaged weights (EMA) are loaded if there are any, with raw=True the plain ones."""
    _, folder = saved_model
    for name, raw, says in [("both.pt", False, 2), ("both.pt", True, 1),
                            ("plain.pt", False, 1), ("plain.pt", True, 1)]:
        model, _ = load_checkpoint(str(folder / name), CPU, raw)
        assert model(torch.rand(1, 3, 32, 32)).argmax() == says, (name, raw)


def write_checkpoint(path, config=CONFIG, **changes):
    """A checkpoint with something wrong."""
    model = build_model(CONFIG)
    torch.save(checkpoint_of(config, model.state_dict(), **changes), path)


def cut_off(path):
    """A checkpoint of which the end is missing, as after a full disk."""
    write_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-1000])


NO_CHECKPOINTS = {  # how it is made, and a part of the message
    "missing": (lambda path: None, "no checkpoint at {path}: expected one like runs/<run>/best.pt"),
    "folder": (lambda path: path.mkdir(), "no checkpoint at {path}"),
    "cut off": (
        cut_off, "{path} cannot be opened as a checkpoint, it is truncated or not one of ours"),
    "empty": (
        lambda path: path.write_bytes(b""),
        "{path} cannot be opened as a checkpoint, it is empty"),
    "text": (
        lambda path: path.write_text("a\n\ntext"), "{path} cannot be opened as a checkpoint"),
    "zip": (
        lambda path: path.write_bytes(b"PK\3\4"), "{path} cannot be opened as a checkpoint"),
    "image": (
        lambda path: path.write_bytes(saved("png")), "{path} cannot be opened as a checkpoint"),
    "foreign dict": (
        lambda path: torch.save(dict(model={}, epoch=3), path),
        "{path} is not a checkpoint of train.py: it lacks args,"),
    "number": (
        lambda path: torch.save(7, path),
        "{path} is not a checkpoint of train.py: it lacks args,"),
    "other width": (
        lambda path: write_checkpoint(path, CONFIG | {"dim": 32}),
        "the weights in {path} do not fit its own config"),
    "other depth": (
        lambda path: write_checkpoint(path, CONFIG | {"depth": 3}),
        "the weights in {path} do not fit its own config"),
    "other model": (
        lambda path: write_checkpoint(path, {"model": "resnet"}),
        "unknown model 'resnet': expected one of vit_nano,"),
    "unknown option": (
        lambda path: write_checkpoint(path, CONFIG | {"size": 1}),
        "the config in {path} does not describe a model"),
    "no model": (
        lambda path: write_checkpoint(path, {"dim": 16}),
        "the config in {path} does not describe a model"),
    "few classes": (
        lambda path: write_checkpoint(path, classes=["a", "b"]),
        "{path} names 2 classes, but its model has 3 outputs"),
    "stacked experts": (
        lambda path: write_checkpoint(
            path, model={"blocks.1.mlp.experts.w1": torch.zeros(4, 16, 64)}),
        "{path} is from an older version, whose experts were stacked weights"),
}


@pytest.mark.checkpoints
@pytest.mark.parametrize("make, expected", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_what_is_not_a_checkpoint_is_one_line(tmp_path, make, expected):
    """Whatever is wrong with the file, one line names the file or what is valid."""
    path = tmp_path / "last.pt"
    make(path)
    with pytest.raises(ValueError) as error:
        load_checkpoint(str(path), CPU)
    message = str(error.value)
    assert message.startswith(expected.format(path=path)) and "\n" not in message


@pytest.mark.checkpoints
def test_a_checkpoint_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    """A file without permission, or on a disk that fails, is an error that names it, too."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    write_checkpoint(tmp_path / "last.pt")
    monkeypatch.setattr(torch, "load", refuse)
    expected = "last.pt cannot be opened as a checkpoint.*Permission denied"
    with pytest.raises(ValueError, match=expected):
        load_checkpoint(str(tmp_path / "last.pt"), CPU)


class Burglar:
    """Unpickled the old way, it would create the file it was given."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.checkpoints
def test_a_checkpoint_cannot_run_code(tmp_path):
    """A file that would execute something when opened is refused, and nothing is executed."""
    proof = str(tmp_path / "was here")
    write_checkpoint(tmp_path / "evil.pt", args=Burglar(proof))
    with pytest.raises(ValueError, match="evil.pt cannot be opened as a checkpoint"):
        load_checkpoint(str(tmp_path / "evil.pt"), CPU)
    assert not os.path.exists(proof), "opened without weights_only=True"


# ---------------------------------------------------------------- the command line


def run(monkeypatch, *arguments):
    """The whole program, as `python eval.py <arguments>` would run it."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    # the same numbers on every machine
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    evaluation.main(evaluation.parse_args())


def table_row(lines, checkpoint):
    """Return the cells of a checkpoint's row in the printed table."""
    return next(line for line in lines if line.startswith(f"{checkpoint} ")).split()


@pytest.mark.evaluator
@pytest.mark.parametrize("flag, interval, right, wrong", [
    ("--batch-size", "int in [1, inf)", [1, 7], ["0", "-1", "1.5", "inf", "nan", "many", ""]),
    ("--workers", "int in [0, inf)", [0, 1], ["-1"]),
    ("--capacity-factor", "float in (0, inf)", [0.001, 5.0], ["0", "-1", "inf", "nan"]),
])
def test_a_number_out_of_its_interval(capsys, flag, interval, right, wrong):
    """[ and ] include an end of an interval, ( and ) leave it out; any other number ends the
    program with status 2."""
    flags = ["best.pt", "--data", "shapes", flag]
    for value in right:
        args = evaluation.parse_args([*flags, str(value)])
        evaluation.check(args)
        assert getattr(args, flag[2:].replace("-", "_")) == value
    for text in wrong:
        with pytest.raises(SystemExit, match="2"):
            evaluation.parse_args([*flags, text])
        assert capsys.readouterr().err.endswith(
            f"argument {flag}: expected {interval}, got {text}\n"
        )
    assert number("[0, 1]")("1") == 1.0 and number("[0, 1)")("0.9") == 0.9
    with pytest.raises(argparse.ArgumentTypeError, match="got 1"):
        number("[0, 1)")("1")


@pytest.mark.evaluator
def test_the_command_prints_a_table_and_writes_json(saved_model, monkeypatch, capsys):
    """The command prints a row per checkpoint, with top-1 per data set, and writes JSON.

    With three classes top-5 would always be 100: it is not printed.
    """
    model, folder = saved_model
    # Classes b and c, which the model knows as 1 and 2, and never a. Raw weights say "b", averaged
    # ones say "c".
    one = make_folder(folder / "one", ["b/0.png", "b/1.png", "b/2.png", "c/3.png", "c/4.png"])
    two = make_folder(folder / "two", ["a/0.png", "b/1.png", "c/2.png", "c/3.png"])
    both, plain = folder / "both.pt", folder / "plain.pt"
    flags = f"--data {one} --data {two} --batch-size 2 --workers 0 --json {folder}/out.json"
    run(monkeypatch, both, plain, *flags.split())
    *_, names, header, first, second = capsys.readouterr().out.splitlines()
    assert names.split() == [one, two]
    assert header.split("  ")[0].startswith("checkpoint") and header.count("top-1 %") == 2
    assert "top-5" not in header
    params = sum(p.numel() for p in model.parameters())
    # width 16, hidden 64: 2 of the 8 experts of one layer work
    active = params - 6 * (2 * 4 * 16 * 16 + 4 * 16 + 16)
    size = [f"{params / 1e6:.2f}", f"{active / 1e6:.2f}"]
    # "c": 2 of 5, and 2 of 4
    for line, path, numbers in [
        (first, both, ["40.00", "50.00"]),
        # "b": 3 of 5, and 1 of 4
        (second, plain, ["60.00", "25.00"]),
    ]:
        cells = line.split()
        assert cells[:3] == [str(path), *size] and cells[5:] == numbers

    text = (folder / "out.json").read_text()
    assert text.startswith('{\n "'), "one entry per line, for people"
    written = json.loads(text)
    assert written["batch_size"] == 2 and written["processes"] == 1 and len(written["results"]) == 2
    assert written["dtype"] == "torch.float32" and written["torch"] == torch.__version__
    row = written["results"][1]
    assert (row["checkpoint"], row["weights"]) == (str(plain), "raw")
    assert (row["params"], row["active"]) == (params, active)
    assert second.split()[3] == f"{row['multiply_adds'] / 1e9:.3g}", "10^9 multiply-adds"
    # the logits of b and c are 5 and 0: -ln(e^5 / (e^5 + 1)) if b is right, -ln(1 / (e^5 + 1)) if c
    # is
    loss = (3 * math.log1p(math.exp(-5)) + 2 * math.log1p(math.exp(5))) / 5
    expected = dict(images=5, correct1=3, correct5=5, top1=60.0, top5=100.0, loss=loss)
    assert {name: row["data"][one][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert row["data"][one]["protocol"] == "5 images, 2 of 3 classes, logits restricted"


@pytest.mark.evaluator
def test_what_is_evaluated_is_said_first(saved_model, monkeypatch, capsys):
    """Before the table stand the kind of weights and how the classes were matched."""
    _, folder = saved_model
    data = make_folder(folder / "data", ["b/0.png", "b/1.png", "b/2.png", "c/3.png"])
    # EMA says "c", the raw weights "b"
    for flags, weights, top1 in [([], "EMA", "25.00"), (["--raw"], "raw", "75.00")]:
        run(monkeypatch, folder / "both.pt", "--data", data, "--workers", 0, *flags)
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == [
            f"{folder / 'both.pt'}: vit_nano after epoch 1, {weights} weights",
            f"  {data}: 4 images, 2 of 3 classes, logits restricted",
        ]
        assert table_row(lines, folder / "both.pt")[5] == top1


@pytest.mark.evaluator
def test_the_checkpoint_says_how_to_prepare_images(tmp_path, monkeypatch):
    """Image size, crop, mean and deviation are those of the checkpoint."""
    model = build_model(CONFIG).eval()
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    checkpoint = checkpoint_of(CONFIG, model.state_dict(), crop_ratio=0.5, mean=mean, std=std)
    torch.save(checkpoint, tmp_path / "best.pt")
    pixels = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    for name in "abc":  # three classes, one image
        (tmp_path / "data" / name).mkdir(parents=True)
        v2.functional.to_pil_image(pixels).save(tmp_path / "data" / name / "0.png")
    data = str(tmp_path / "data")
    flags = ["--data", data, "--workers", 0, "--json", tmp_path / "out.json"]
    run(monkeypatch, tmp_path / "best.pt", *flags)
    # 32 / 0.5 = 64 is the short side already; the centre of 64 x 80 begins at row 16, column 24
    centre = pixels[:, 16:48, 24:56].float() / 255
    x = torch.stack([(centre[i] - mean[i]) / std[i] for i in range(3)])
    loss = -model(x.unsqueeze(0)).log_softmax(1)[0].mean().item()
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["results"][0]["data"][data]["loss"] == pytest.approx(loss)


@pytest.mark.evaluator
@pytest.mark.parametrize(
    "flags, images", [("", 10), ("--split all", 10), ("--split val", 2), ("--split train", 8)]
)
def test_split_chooses_among_the_images_of_a_flat_folder(
    saved_model, monkeypatch, capsys, flags, images
):
    """A folder without val/ is evaluated whole, unless --split asks for a part."""
    _, folder = saved_model
    data = make_folder(folder / "data", [f"{name}/{i}.png" for name in "bc" for i in range(5)])
    run(monkeypatch, folder / "both.pt", "--data", data, "--workers", 0, *flags.split())
    lines = capsys.readouterr().out.splitlines()
    # "c" is half
    assert lines[1].startswith(f"  {data}: {images} images")
    assert table_row(lines, folder / "both.pt")[5] == "50.00"


@pytest.mark.evaluator
def test_images_of_the_training_are_not_counted_unnoticed(saved_model, monkeypatch, capsys):
    """A whole folder that the checkpoint was trained on is evaluated with a remark."""
    model, folder = saved_model
    data = make_folder(folder / "data", [f"{name}/{i}.png" for name in "bc" for i in range(5)])
    write_checkpoint(folder / "here.pt", model=model.state_dict(), args=dict(data=data))
    for flags, said in ((["--split", "all"], True), (["--split", "val"], False)):
        run(monkeypatch, folder / "here.pt", "--data", data, "--workers", 0, *flags)
        remark = ", those of the training among them: --split val leaves them out"
        assert (remark in capsys.readouterr().out) == said


@pytest.mark.evaluator
def test_data_of_other_classes_is_refused(saved_model, monkeypatch):
    """A class that the checkpoint has never seen cannot be counted as right or wrong."""
    _, folder = saved_model
    data = make_folder(folder / "data", ["b/0.png", "zebra/1.png"])
    expected = "1 of 2 classes of the data are unknown to the checkpoint .zebra"
    with pytest.raises(ValueError, match=expected):
        run(monkeypatch, folder / "plain.pt", "--data", data)
