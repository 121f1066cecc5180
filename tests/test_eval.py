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

import numpy as np
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
from checks import drawn, on_meta
from eval import (CHECKPOINT_KEYS, FLAG_PALETTE, MODELS, PALETTE, TensorImages,
                  auto_workers, best_dtype, build_model, eval_loader,
                  eval_transform, evaluate, hold_out, image_losses, load_checkpoint, match_classes,
                  mistakes, normalize, number, open_dataset, predict, read_image)

CPU = torch.device("cpu")

# ---------------------------------------------------------------- shapes: the embedded data


@pytest.mark.shapes
def test_the_same_pictures_on_every_machine():
    """The first eight pictures to train on are these, bit by bit, with every PyTorch."""
    checksum = hashlib.sha256(drawn("shapes", 500).images[:8].numpy().tobytes()).hexdigest()
    expected = "8347a917a37522c1e356cc2102a50295b327ec70f150725e927926cf52a84468"
    assert checksum == expected, "was a draw changed?"


@pytest.mark.shapes
def test_labels_are_what_one_sees():
    """The labels of the first sixteen pictures name what one sees in them: draw them and look."""
    data = drawn("shapes", 500)
    assert [data.classes[data[i][1]] for i in range(16)] == [
        "cross-stripes", "cross-dots", "cross-stripes", "circle-plain",
        "cross-plain", "triangle-stripes", "circle-dots", "square-plain",
        "square-dots", "circle-stripes", "square-dots", "square-plain",
        "circle-plain", "square-plain", "circle-checks", "cross-plain",
    ]


@pytest.mark.shapes
def test_a_longer_set_begins_with_the_shorter():
    """20 pictures are the first 20 of 600, drawn in parts of 500."""
    short, long = (open_dataset(f"shapes:{n}", "train") for n in (20, 600))
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
    train = {image.numpy().tobytes() for image in drawn("shapes", 500).images}
    val = {image.numpy().tobytes() for image in drawn("shapes", 500, "val").images}
    assert len(train) == len(val) == 500 and not train & val


@pytest.mark.shapes
def test_classes_are_shape_times_texture():
    """Label 4 * shape + texture is class shape-texture: all textures of the circle first."""
    data = drawn("shapes", 500)
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
    counts = drawn("shapes", 1600).labels.bincount(minlength=16)
    assert len(counts) == 16 and counts.min() > 60 and counts.max() < 140, counts


@pytest.mark.shapes
def test_the_mask_is_where_the_object_is():
    """Inside its mask a picture is bright, outside it is dark."""
    # The dimmest object colour is (0, 158, 115): its brightest channel, less 25 of shade and 12 of
    # noise, is 121. The brightest background is a quarter of 240 + 25: 66, with 12 of noise 78. So
    # 100 separates them always.
    data = drawn("shapes", 500)
    assert torch.equal(data.images.amax(dim=1) > 100, data.masks)


@pytest.mark.shapes
def test_row_and_column_are_the_centre():
    """The centre of mass of a circle's mask is at the factors row and column, in this order."""
    data = drawn("shapes", 500)
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
    data = drawn("shapes", 500)
    mask = data.masks.bool()
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
    data = drawn("shapes", 500)
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
    data = drawn("shapes", 500)
    inside = data.masks.bool().unsqueeze(1)
    highest = data.images.masked_fill(~inside, 0).amax((2, 3)).int()
    lowest = data.images.masked_fill(~inside, 255).amin((2, 3)).int()
    spread = (highest - lowest).amax(1)
    assert torch.equal(spread <= 24, data.factors["texture"] == 0)


@pytest.mark.shapes
def test_an_item_is_image_label_and_no_complaint():
    """Item i is (image through the transform, label, -1)."""
    data = drawn("shapes", 3, transform=lambda image: image[:, :4])
    image, label, unreadable = data[2]
    assert torch.equal(image, data.images[2, :, :4])
    assert label == int(data.labels[2])
    assert unreadable == -1
    assert len(data) == 3


@pytest.mark.shapes
def test_a_linear_classifier_cannot_solve_it():
    """Ridge regression on the pixels stays under 40%: class is not colour or place."""
    train, val = drawn("shapes", 1600), drawn("shapes", 500, "val")
    x, x_val = (data.images.flatten(1).float() / 255 - 0.3 for data in (train, val))
    y = F.one_hot(train.labels, 16).float()
    # weights = x^T (x x^T + lambda)^-1 y: the same as (x^T x + lambda)^-1 x^T y, with the smaller
    # matrix
    weights = x.T @ torch.linalg.solve(x @ x.T + 100 * torch.eye(1600), y)
    accuracy = ((x_val @ weights).argmax(1) == val.labels).float().mean()
    assert 1 / 16 < accuracy < 0.4, f"{accuracy:.0%}: easier than it should be (or noise, below 6%)"


@pytest.mark.shapes
def test_the_number_of_pictures():
    """`shapes:COUNT` is for training: 16,000 unless told, and always 2,000 to validate."""
    assert len(open_dataset("flags", "train")) == 16_000
    assert [len(open_dataset("shapes:40", split)) for split in ("train", "val", "all")] == [
        40, 2000, 2000]


@pytest.mark.shapes
@pytest.mark.parametrize("spec", [
    "shapes:0", "shapes:-5", "shapes:many", "shapes:1.5", "shapes:100001", "shapes:10:10",
    "flags:0", "flags:", "flags-blur:x"])
def test_a_wrong_number_of_pictures(spec):
    """Only 1 to 100000 can follow the name."""
    with pytest.raises(ValueError, match="expected (shapes|flags):COUNT with a COUNT up to 100000"):
        open_dataset(spec, "train")


# ---------------------------------------------------------------- flags


@pytest.mark.shapes
def test_the_same_flags_on_every_machine():
    """The first eight flags to train on and the country of each flag are these, bit by bit."""
    images = drawn("flags", 500).images[:8]
    checksums = [hashlib.sha256(data.numpy().tobytes()).hexdigest()
                 for data in (images, evaluation.COUNTRIES)]
    assert checksums[0].startswith("cbf0003f0459d139"), "was a draw changed?"
    assert checksums[1].startswith("8f878ddc00146c48"), "was a draw changed?"


@pytest.mark.shapes
def test_each_country_has_49_flags_and_each_flag_one_country():
    """Of 14 x 14 x 14 flags, 56 countries have 49 each, and no stripe tells the country."""
    country = evaluation.COUNTRIES
    data = drawn("flags", 9)
    assert torch.equal(data.labels, country[data.factors["colour"].unbind(1)])
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
        for data in (drawn("flags", 2000), drawn("flags", 2000, "val"))
    ]
    common = train.keys() & val.keys()
    assert 500 < len(common) < len(val), "other pictures, and many of the same flags"
    assert all(train[flag] == val[flag] for flag in common)


@pytest.mark.shapes
def test_a_flag_has_the_colours_of_its_factors():
    """Each stripe of 8 x 24 pixels has its colour of the palette, shaded by up to 12."""
    data = drawn("flags", 20)
    palette = torch.tensor(FLAG_PALETTE)
    for image, mask, colours in zip(data.images.float(), data.masks, data.factors["colour"]):
        assert mask.flatten().int().bincount().tolist() == [32 * 32 - 3 * 192, 192, 192, 192]
        for stripe in range(3):
            mean = image[:, mask == stripe + 1].mean(1)  # (3,), of noise up to 16
            assert (mean - palette[colours[stripe]]).abs().max() < 12 + 4


@pytest.mark.shapes
def test_a_flag_lies_around_its_centre():
    """Stripe 1 is the upper one, and the flag reaches from 12 above its centre to 11 below."""
    data = drawn("flags", 20)
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
    return [Path(dataset.path(i)).name for i in range(len(dataset))]


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
def test_odd_names(tmp_path):
    """Spaces, accents, other scripts, emoji and dots in names are read and given back."""
    names = ["big cat/my photo (1).png", "chien à poil/éléphant.v2.PNG", "猫/写真.png", "🐈/👍.png"]
    data = open_dataset(make_folder(tmp_path, names), "all")
    assert contents(data) == [(name, name.split("/")[0], level) for level, name in enumerate(names)]


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
    with pytest.raises(ValueError, match="has fewer than two class folders with images: expected"):
        open_dataset(root, "train")


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
    with pytest.raises(OSError, match=f"Permission denied: '{root}/b'"):
        open_dataset(root, "all")


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
    told = "warning: classes of fewer than 5 images have none to validate: c, d (2 in all)\n"
    assert capsys.readouterr().err == told, "once, although it was opened twice"
    with pytest.raises(ValueError, match="fewer than 5 images: too few to hold out a fifth"):
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
    (lambda root: None, "no folder "),
    (lambda root: (root.parent / "here").write_text("a file"), "no folder "),
    (lambda root: root.mkdir(), "(found: nothing)"),
    (lambda root: make_folder(root, ["1.png", "2.png"]), "has fewer than two class folders"),
    (lambda root: (root / "a").mkdir(parents=True), "(found: a/ (1))"),
    (lambda root: list(map(os.makedirs, [root / "train/a", root / "val"])), "(found: a/ (1))"),
], ids=["missing", "a file", "empty", "no classes", "no images", "empty val"])
def test_a_folder_without_images_shows_what_was_expected(tmp_path, make, expected):
    """A data set that is not there is an error with the place and the expected tree."""
    root = tmp_path / "here"
    make(root)
    with pytest.raises(ValueError) as error:
        open_dataset(str(root), "train")
    message = str(error.value)
    assert expected in message and str(root) in message
    assert "FOLDER/train/<class>/<image>.jpg" in message


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
def test_an_error_of_a_worker_is_one_line(tmp_path):
    """Of an error in a loader's process the last line counts, and not its traceback."""

    def broken(image):
        raise RuntimeError("stack expects each tensor to be equal size")

    data = open_dataset(make_folder(tmp_path, ["a/0.png"]), "all", broken)
    try:
        next(iter(DataLoader(data, num_workers=1, multiprocessing_context="fork")))
    except RuntimeError as error:
        message = str(error)  # the error itself would keep the worker alive
    assert "Traceback" in message
    told = "RuntimeError: stack expects each tensor to be equal size"
    assert evaluation.one_line(message) == told
    assert evaluation.one_line(ValueError()) == "ValueError", "an error without words"


@pytest.mark.folders
def test_a_folder_of_broken_files_is_an_error(tmp_path):
    """The search for a readable file ends after 100, with the name of the first."""
    root = make_folder(tmp_path, ["a/0.png", "a/1.png"])
    for name in ("0.png", "1.png"):
        (tmp_path / "a" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read .*1\.png, nor the images after it"):
        open_dataset(root, "all")[1]


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


@pytest.mark.folders
@pytest.mark.parametrize("files, opened", [
    (["1.png", "2.jpg"], ["1.png", "2.jpg"]),  # own pictures
    (["1.png", "a/2.png"], ["a/2.png"]),  # class folders, and a picture beside them
    (["1.png", "empty/x.txt", ".hidden/2.png"], ["1.png"])])
def test_pictures_without_classes(tmp_path, files, opened):
    """If no folder holds images those in the folder itself are one's own: no classes, labels -1."""
    root = make_folder(tmp_path, [file for file in files if file.endswith("g")])
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    data = open_dataset(root, "all")
    assert names(data) == opened
    assert (data.classes, data[0][1]) == (([], -1) if opened[0] == "1.png" else (["a"], 0))
    if not data.classes:
        assert names(open_dataset(root, "val")) == opened, "a fifth is not held out"
    single = open_dataset(data.path(0), "all")
    assert len(single) == 1 and single.path(0) == data.path(0) and not single.classes


@pytest.mark.folders
def test_what_is_left_out_is_said(tmp_path, capsys):
    """Hidden files, links in a circle and what systems leave behind are not followed; folders
    without images and files of other kinds are named, once."""
    files = "a/1.png a/deep/2.png b/@3.png .git/4.png a/._1.png @eaDir/5.png a/@eaDir/6.png"
    root = make_folder(tmp_path, files.split())
    for other in ("a/notes.txt", "a/b.HEIC", "c/d.HEIC", "__MACOSX/a/._1.jpg"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).touch()
    for link in ("a/up", "up", "a/deep/up"):
        (tmp_path / link).symlink_to(tmp_path)
    data = open_dataset(root, "all")
    assert names(data) == ["a/1.png", "a/deep/2.png", "b/@3.png"] and data.classes == ["a", "b"]
    open_dataset(root, "all")
    [told] = capsys.readouterr().err.splitlines()
    assert told == (f"warning: {root}: left out what is or holds no image: links to folders (2), "
                    f".HEIC (2), __MACOSX/ (1), .txt (1), c/ (1)")


@pytest.mark.folders
@pytest.mark.parametrize("name, content, expected", [
    ("16.tif", tiff(16, DEEP), [0, 1, 128, 255]),
    ("white.tif", tiff(16, DEEP, zero_is=0), [255, 254, 127, 0]),
    ("12.tif", tiff(12, FLAT), [0, 1, 128, 255]),
    ("signed.tif", tiff(16, array("<i2", 0, 1000), kind=2), None),
    ("32.tif", tiff(32, array("<u4", 0, 1000)), None),
    ("float.tif", tiff(32, array("<f4", 0, 0.5, 1), kind=3), None),
    ("10.pgm", b"P5 3 1 1023 " + array(">u2", 0, 512, 1023).tobytes(), [0, 128, 255]),  # 127.6
    ("16.pgm", b"P5 2 1 65535 " + array(">u2", 257, 65535).tobytes(), [1, 255])])
def test_deep_files_are_scaled_by_their_range(tmp_path, name, content, expected):
    """10, 12 and 16 bits become 0 to 255; what has no known range is unreadable, not black."""
    (tmp_path / name).write_bytes(content)
    image = read_image(str(tmp_path / name))
    assert image is None if expected is None else image[2, 0].tolist() == expected


def transparent(mode):
    """A red disc on nothing; what is hidden under the nothing is green."""
    image = Image.new("RGBA", (20, 20), (0, 255, 0, 0))
    image.paste((255, 0, 0, 255), (5, 5, 15, 15))
    if mode == "P":
        image = image.convert("RGB").quantize(4)
        image.info["transparency"] = image.getpixel((0, 0))
        return image
    return image.convert(mode)


@pytest.mark.folders
@pytest.mark.parametrize("mode, kind", [
    ("RGBA", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "webp"), ("RGBA", "gif"), ("P", "gif")])
def test_transparency_is_white(mode, kind, tmp_path):
    """Whatever colour is hidden under it, and whatever the mode of the file."""
    options = dict(lossless=True, exact=True) if kind == "webp" else {}
    transparent(mode).save(tmp_path / f"a.{kind}", **options)
    image = read_image(tmp_path / f"a.{kind}")
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert image[1, 10, 10] < 100, "the disc itself stays"


@pytest.mark.folders
@pytest.mark.parametrize("kind", ["png", "gif", "tiff", "webp"])
def test_damaged_pixels_are_no_picture(kind, tmp_path):
    """Of 20 files with a few damaged bytes each is what Pillow makes of it, and None if it raises:
    never the blank or half a picture that it leaves behind."""
    pixels = torch.randint(0, 256, (120, 160, 3), dtype=torch.uint8).numpy()
    whole, refused = io.BytesIO(), 0
    options = dict(compression="tiff_lzw") if kind == "tiff" else {}
    Image.fromarray(pixels).save(whole, kind, **options)
    for i in range(20):
        content = bytearray(whole.getvalue())
        start = len(content) // 4 + i * len(content) // 40
        content[start:start + 4] = b"\xff\0\xff\0"
        (tmp_path / "a").write_bytes(content)
        try:
            image = Image.open(io.BytesIO(content))
            image.load()
            expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            assert torch.equal(read_image(tmp_path / "a"), expected)
        except (OSError, SyntaxError, ValueError):
            assert read_image(tmp_path / "a") is None
            refused += 1
    assert refused or kind != "png"


def png_with(name, data):
    """A small PNG with one more chunk, whose checksum is wrong."""
    file = saved("png")
    chunk = struct.pack(">I", len(data)) + name + data + b"\0\0\0\0"
    return file[:33] + chunk + file[33:]


@pytest.mark.folders
@pytest.mark.parametrize("name, data", [
    (b"tEXt", b"a\0b"), (b"pHYs", b"ab"), (b"gAMA", b"a"), (b"iCCP", b"x"), (b"tIME", b""),
    (b"zTXt", b"a\0\0garbage"), (b"iTXt", b"a\0\1\0\0\0garbage"), (b"eXIf", b"II")])
def test_damaged_metadata_do_not_hide_a_picture(name, data, tmp_path):
    """A chunk of a PNG that is no picture may hold anything."""
    (tmp_path / "a.png").write_bytes(saved("png"))
    (tmp_path / "b.png").write_bytes(png_with(name, data))
    assert torch.equal(read_image(tmp_path / "b.png"), read_image(tmp_path / "a.png"))


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
    assert auto_workers(drawn("shapes", 500)) == 0
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
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_mistakes_against_a_loop(batch_size):
    """Accuracy per class in percent, and the pairs of classes that were taken for another."""
    table, labels = torch.randn(60, 4), torch.randint(4, (60,))
    images = torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    loader = eval_loader(TensorImages(images, labels, "abcd"), batch_size, 0, CPU)
    found = predict(Known(table), loader, CPU, (0.0,) * 3, (1.0,) * 3)
    per_class, pairs = mistakes(found, "abcd")
    guesses = table.argmax(1)
    assert found.best[:, 0].tolist() == guesses.tolist(), "in the order of the data"
    assert_close(found.probs, table.softmax(1).sort(1, descending=True).values)
    for c, name in enumerate("abcd"):
        mine = labels == c
        right = (guesses[mine] == c).double().mean().item()
        assert per_class[name]["images"] == mine.sum() and math.isclose(
            per_class[name]["top1"], 100 * right, abs_tol=1e-9)
    counts = [n for *_, n in pairs]
    assert counts == sorted(counts, reverse=True) and sum(counts) == (guesses != labels).sum()
    for true, guess, n in pairs:
        assert ((labels == "abcd".index(true)) & (guesses == "abcd".index(guess))).sum() == n


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
    with pytest.raises(ValueError, match=f"cannot read .*{broken} .1 in all.: repair"):
        loader = eval_loader(data, 2, 0, CPU)
        evaluate(Known(torch.zeros(3, 2)), loader, CPU, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.counting
@pytest.mark.parametrize("world", [1, 2, 3, 12])
def test_predictions_come_in_the_order_of_the_data(world, monkeypatch):
    """Whatever the number of processes, even if one has no image: all have the same result."""
    table = torch.randn(11, 6)
    images = torch.arange(11, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    data, shares = TensorImages(images, torch.arange(11) % 6, "abcdef"), {}
    monkeypatch.setattr(evaluation.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluation.dist, "get_world_size", lambda: world)

    def gather(found, own):  # in the second round all shares are known
        shares[rank] = own
        found[:] = [shares.get(i, own) for i in range(world)]

    monkeypatch.setattr(evaluation.dist, "all_gather_object", gather)
    for rank in [*range(world), *range(world)]:
        monkeypatch.setattr(evaluation.dist, "get_rank", lambda: rank)
        loader = eval_loader(data, 2, 0, CPU)
        found = predict(Known(table), loader, CPU, (0.0,) * 3, (1.0,) * 3)
    assert_close(found.losses, F.cross_entropy(table, data.labels, reduction="none"))
    assert found.answers[:, 0].tolist() == data.labels.tolist()


@pytest.mark.counting
def test_class_probabilities_by_hand():
    """Logits 0 and ln 3: 1/4 and 3/4 for softmax; 1/2 and 3/4, each for itself, for sigmoid."""
    logits = torch.tensor([[0.0, math.log(3)]])
    assert_close(class_probabilities(logits, "softmax"), torch.tensor([[0.25, 0.75]]))
    assert_close(class_probabilities(logits, "sigmoid"), torch.tensor([[0.5, 0.75]]))


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
        cut_off, "{path} cannot be opened as a checkpoint, it is empty, truncated or not one of "
                 "ours"),
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
        "{path} cannot be opened as a checkpoint"),
    "other width": (
        lambda path: write_checkpoint(path, CONFIG | {"dim": 32}),
        "config and weights in {path} do not fit: Error"),
    "other depth": (
        lambda path: write_checkpoint(path, CONFIG | {"depth": 3}),
        "config and weights in {path} do not fit: Error"),
    "other model": (
        lambda path: write_checkpoint(path, {"model": "resnet"}),
        "unknown model 'resnet': expected one of vit_nano,"),
    "unknown option": (
        lambda path: write_checkpoint(path, CONFIG | {"size": 1}),
        "config and weights in {path} do not fit: "),
    "no model": (
        lambda path: write_checkpoint(path, {"dim": 16}),
        "config and weights in {path} do not fit: "),
    "few classes": (
        lambda path: write_checkpoint(path, classes=["a", "b"]),
        "config and weights in {path} do not fit: 'num_classes is not 2'"),
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
    *_, header, first, second = capsys.readouterr().out.splitlines()
    assert header.startswith("checkpoint ") and header.endswith("one top-1 %  two top-1 %")
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
    """Above the table stand the kind of weights and how the classes were matched."""
    _, folder = saved_model
    data = make_folder(folder / "data", ["b/0.png", "b/1.png", "b/2.png", "c/3.png"])
    # EMA says "c", the raw weights "b"
    for flags, weights, top1 in [([], "EMA", "25.00"), (["--raw"], "raw", "75.00")]:
        run(monkeypatch, folder / "both.pt", "--data", data, "--workers", 0, *flags)
        lines = capsys.readouterr().out.splitlines()
        assert lines[1:3] == [
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
def test_data_of_other_classes_is_refused(saved_model, monkeypatch):
    """A class that the checkpoint has never seen cannot be counted as right or wrong."""
    _, folder = saved_model
    data = make_folder(folder / "data", ["b/0.png", "zebra/1.png"])
    expected = "1 of 2 classes of the data are unknown to the checkpoint .zebra"
    with pytest.raises(ValueError, match=expected):
        run(monkeypatch, folder / "plain.pt", "--data", data)
