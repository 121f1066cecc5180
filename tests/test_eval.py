"""Tests of eval.py: drawn pictures, folders, counting, checkpoints and the command line."""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import random
import signal
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import v2

import eval as evaluation
import vit
from checks import Burglar, drawn, make_folder, save_checkpoint
from eval import (
    FLAG_PALETTE, PALETTE, TensorImages, auto_workers, best_classes, best_dtype, build_model, count,
    eval_loader, eval_transform, evaluate, hold_out, image_losses, load_checkpoint, mistakes,
    normalize, open_dataset, predict, read_image)

CPU = torch.device("cpu")
CONFIG = dict(model="vit_nano", num_classes=3, depth=2, dim=16, moe_layers=[1])

# ---------------------------------------------------------------- shapes: the embedded data

@pytest.mark.shapes
@pytest.mark.parametrize("name, expected", [
    ("shapes", "8347a917a37522c1"), ("flags", "cbf0003f0459d139")])
def test_the_same_pictures_on_every_machine(name, expected):
    """The first eight pictures to train on are these, bit by bit, with every PyTorch."""
    checksum = hashlib.sha256(drawn(name, 500).images[:8].numpy().tobytes()).hexdigest()
    assert checksum.startswith(expected), "was a draw changed?"


@pytest.mark.shapes
def test_labels_are_what_one_sees():
    """The labels of the first sixteen pictures name what one sees in them: draw them and look."""
    data = drawn("shapes", 500)
    assert [data.classes[data[i][1]] for i in range(16)] == [
        "cross-stripes", "cross-dots", "cross-stripes", "circle-plain",
        "cross-plain", "triangle-stripes", "circle-dots", "square-plain",
        "square-dots", "circle-stripes", "square-dots", "square-plain",
        "circle-plain", "square-plain", "circle-checks", "cross-plain"]
    assert_close(data.labels, 4 * data.factors["shape"] + data.factors["texture"])


@pytest.mark.shapes
def test_a_longer_set_begins_with_the_shorter():
    """20 pictures are the first 20 of 600, drawn in parts of 500."""
    short, long = (open_dataset(f"shapes:{n}", "train") for n in (20, 600))
    assert torch.equal(short.images, long.images[:20])
    assert torch.equal(short.labels, long.labels[:20])
    assert len(long.images.flatten(1).unique(dim=0)) == 600, "the same part again and again?"


@pytest.mark.shapes
def test_training_and_validation_pictures_differ():
    """No picture to validate with is among those to train on."""
    train = {image.numpy().tobytes() for image in drawn("shapes", 500).images}
    val = {image.numpy().tobytes() for image in drawn("shapes", 500, "val").images}
    assert len(train) == len(val) == 500 and not train & val


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
@pytest.mark.parametrize("spec", ["shapes:0", "shapes:many", "shapes:1.5", "shapes:100001"])
def test_a_wrong_number_of_pictures(spec):
    """Only 1 to 100000 can follow the name."""
    with pytest.raises(ValueError, match="expected (shapes|flags):COUNT with a COUNT up to 100000"):
        open_dataset(spec, "train")


# ---------------------------------------------------------------- flags

@pytest.mark.shapes
def test_each_country_has_49_flags_and_each_flag_one_country():
    """Of 14 x 14 x 14 flags, 56 countries have 49 each, and no stripe tells the country."""
    country = evaluation.COUNTRIES
    for split in ("train", "val"):
        data = drawn("flags", 9, split)
        assert torch.equal(data.labels, country[data.factors["colour"].unbind(1)])
    assert country.shape == (14, 14, 14), "and they are these on every machine:"
    assert hashlib.sha256(country.numpy()).hexdigest().startswith("8f878ddc00146c48")
    assert country.flatten().bincount().tolist() == [49] * 56
    for stripe in range(3):
        for colour in range(14):  # 196 flags
            assert country.select(stripe, colour).flatten().bincount().max() < 20


@pytest.mark.shapes
def test_a_flag_is_three_stripes_around_its_centre():
    """Below each other, from 12 above it to 11 below, 24 wide, in the colours of the factors."""
    data, palette = drawn("flags", 20), torch.tensor(FLAG_PALETTE)
    for i in range(20):
        expected = torch.zeros(32, 32, dtype=torch.uint8)
        row, column, colours = (data.factors[name][i] for name in ("row", "column", "colour"))
        for stripe in range(3):
            top = row - 12 + 8 * stripe
            expected[top:top + 8, column - 12:column + 12] = stripe + 1
            mean = data.images[i, :, expected == stripe + 1].float().mean(1)  # (3,), shaded by 12
            assert (mean - palette[colours[stripe]]).abs().max() < 12 + 4, "of noise up to 16"
        assert torch.equal(data.masks[i], expected)


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


def pillow(file):
    """What Pillow makes of a file."""
    with Image.open(file) as image:
        return v2.functional.pil_to_tensor(image.convert("RGB"))


# luma, the "L" of Pillow
GREYS = [[(299 * r + 587 * g + 114 * b + 500) // 1000] * 3 for r, g, b in COLOURS]


@pytest.mark.folders
@pytest.mark.parametrize("name, mode, expected", [
    ("rgb.png", "RGB", COLOURS), ("alpha.png", "RGBA", COLOURS), ("grey.png", "L", GREYS),
    ("rgb.jpg", "RGB", COLOURS), ("LOUD.JPEG", "RGB", COLOURS), ("cmyk.jpg", "CMYK", COLOURS),
    ("rgb.bmp", "RGB", COLOURS), ("rgb.tif", "RGB", COLOURS),
    # None: what Pillow reads
    ("palette.png", "P", None), ("palette.gif", "P", None), ("rgb.webp", "RGB", None)])
@pytest.mark.parametrize("decoders", ["torchvision and Pillow", "Pillow"])
def test_every_kind_of_file_becomes_rgb(tmp_path, monkeypatch, decoders, name, mode, expected):
    """A file of any mode and format is read as (3, H, W) uint8 RGB, by either decoder."""
    if decoders == "Pillow":  # torchvision has announced that its decoders will go
        monkeypatch.delattr(evaluation.torchvision.io, "decode_jpeg")
    options = {"quality": 100, "subsampling": 0} if "j" in name.lower() else {}
    picture(mode).save(tmp_path / name, **options)
    image = read_image(str(tmp_path / name))
    assert image.dtype == torch.uint8 and image.shape == (3, 32, 32)
    expected = pillow(tmp_path / name) if expected is None else fields(expected)
    # JPEG rounds in its own colour space, and decoders differ: 3 of 255. All others are exact.
    allowed = 3 if name.lower().endswith(("jpg", "jpeg", "webp")) else 0
    worst = (image.int() - expected.int()).abs().max()
    assert worst <= allowed, f"{worst}: inverted? BGR? transposed?"


@pytest.mark.folders
@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation, corners", [
    # The viewer shows the fields 0 1 / 2 3 (COLOURS) as ...
    (1, [0, 1, 2, 3]), (2, [1, 0, 3, 2]), (3, [3, 2, 1, 0]), (4, [2, 3, 0, 1]),
    (5, [0, 2, 1, 3]), (6, [2, 0, 3, 1]), (7, [3, 1, 2, 0]), (8, [1, 3, 0, 2])])
def test_pictures_are_turned_as_a_viewer_does(tmp_path, kind, orientation, corners):
    """EXIF's orientation turns or mirrors the picture: 6 is that of a phone held upright."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().resize((64, 32), Image.NEAREST).save(tmp_path / "phone", kind, exif=exif)
    image = read_image(str(tmp_path / "phone")).int()
    assert image.shape == ((3, 32, 64) if orientation < 5 else (3, 64, 32)), "rows first"
    height, width = image.shape[1:]
    for corner, (y, x) in zip(corners, [(0, 0), (0, 1), (1, 0), (1, 1)]):
        seen = image[:, height // 4 + y * height // 2, width // 4 + x * width // 2]
        error = (seen - torch.tensor(COLOURS[corner])).abs().max()
        assert error < 12, "lossy, but no other field's colour"


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


def saved(kind, **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    picture().save(file, kind, **options)
    return file.getvalue()


@pytest.mark.folders
@pytest.mark.parametrize("content", [b"", b"this is no image", saved("jpeg")[:400], None])
def test_a_broken_file_is_none(tmp_path, content):
    """A file that is empty, no image, cut off or gone is None, and not an exception."""
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    assert read_image(str(tmp_path / "a.png")) is None


@pytest.mark.folders
@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "webp", "bmp", "tiff"])
def test_damaged_files_are_read_or_reported(tmp_path, kind):
    """60 files with wrong bits, cut off or zeroed in part are what Pillow makes of them, or None.

    Never are they the blank or half a picture that a decoder leaves behind when it raises.
    """
    draw, content, found = random.Random(kind), saved(kind), []
    for i in range(60):
        damaged, place = bytearray(content), draw.randrange(len(content))
        if i % 3 == 0:
            damaged[place] ^= 1 << draw.randrange(8)
        elif i % 3 == 1:
            del damaged[place:]
        else:
            damaged[place:place + 16] = bytes(len(damaged[place:place + 16]))
        (tmp_path / "damaged").write_bytes(damaged)
        image = read_image(str(tmp_path / "damaged"))
        try:
            expected = pillow(tmp_path / "damaged")
        except Exception:
            expected = None
        found.append(image is None)
        if kind == "jpeg":  # torchvision also reads JPEG files of which a part is missing
            assert image is None or image.dtype == torch.uint8 and len(image) == 3
        else:
            assert image is None or expected is not None and torch.equal(image, expected), i
    assert any(found), "not even a cut file is reported?"


# ---------------------------------------------------------------- folders

def names(dataset):
    """The class folder and the name of every item's file."""
    return ["/".join(Path(dataset.path(i)).parts[-2:]) for i in range(len(dataset))]


def contents(dataset):
    """(class folder and name of the file, class name, grey level) of every item."""
    found = []
    for i, file in enumerate(names(dataset)):
        image, label, _ = dataset[i]
        found.append((file, dataset.classes[label], int(image[0, 0, 0])))
    return found


@pytest.mark.folders
def test_classes_and_files_are_sorted(tmp_path):
    """Labels follow the sorted class names and items the sorted files, on every file system, with
    spaces, dots and any script in their names."""
    root = make_folder(tmp_path, ["b/2.png", "b/10.png", "a/my photo (1).v2.PNG", "C/猫 👍.png"])
    data = open_dataset(root, "all")
    assert data.classes == ["C", "a", "b"]  # by code point, capitals first
    b = [("b/10.png", "b", 1), ("b/2.png", "b", 0)]
    assert contents(data) == [("C/猫 👍.png", "C", 3), ("a/my photo (1).v2.PNG", "a", 2), *b]
    assert [data[i][1:] for i in range(4)] == [(0, -1), (1, -1), (2, -1), (2, -1)]


@pytest.mark.folders
@pytest.mark.parametrize("train, val", [
    ("train", "val"), ("Train", "Valid"), ("TRAINING", "validation"), ("train", "test")])
def test_the_names_of_the_splits(tmp_path, train, val):
    """Where there are train/ and val/, "train" is the one, and "val" and "all" are the other."""
    files = f"{train}/a/1.png {train}/b/2.png {val}/a/3.png {val}/b/4.png {val}/b/5.png"
    root = make_folder(tmp_path, files.split())
    assert contents(open_dataset(root, "train")) == [("a/1.png", "a", 0), ("b/2.png", "b", 1)]
    expected = [("a/3.png", "a", 2), ("b/4.png", "b", 3), ("b/5.png", "b", 4)]
    assert contents(open_dataset(root, "val")) == contents(open_dataset(root, "all")) == expected


@pytest.mark.folders
@pytest.mark.parametrize("name", ["shapes", "flags-noise", "cifar10"])
def test_a_folder_goes_before_a_data_set_of_its_name(tmp_path, monkeypatch, name):
    """Who has such a folder means it."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / name, ["a/1.png", "b/2.png"])
    assert open_dataset(name, "all").classes == ["a", "b"]


@pytest.mark.folders
def test_a_class_may_be_called_train(tmp_path, capsys):
    """A folder train/ of images is a class; one of class folders is split alone, with a warning."""
    root = make_folder(tmp_path / "flat", ["bus/1.png", "train/2.png"])
    assert open_dataset(root, "all").classes == ["bus", "train"]
    files = [f"train/{name}/{i}.png" for name in "ab" for i in range(5)] + ["other/c/1.png"]
    root = make_folder(tmp_path / "alone", files)
    assert open_dataset(root, "val").labels.tolist() == [0, 1]
    assert len(open_dataset(root, "train")) == 8
    assert capsys.readouterr().err == (
        f"warning: no classes in {root}/val: only {root}/train is read, of which training holds "
        f"out a fifth\n")


@pytest.mark.folders
@pytest.mark.parametrize("raised, errors, met", [
    (None, [None, None], None),
    (ValueError("no data"), ["no data", None], "^no data$"),
    (OSError("full"), [None, "full"], "^process 1: full$"),
    (OSError(), [None, "OSError()"], "^process 1: OSError")])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_ends_all(raised, errors, met, rank, monkeypatch):
    """Rank 0 raises it and names the process, even if it has no words; the others end with 2."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(evaluation, "gather", lambda own: own == errors[rank] and errors)
    ending = pytest.raises(SystemExit if rank else ValueError, match="2" if rank else met)
    with ending if met else contextlib.nullcontext(), evaluation.together():
        if errors[rank]:
            raise raised


@pytest.mark.folders
def test_a_flat_folder_holds_out_a_fifth(tmp_path):
    """Without val/ the fifth of each class with the smallest hashes validates, the rest trains."""
    files = [f"{name}/{i:02}.png" for name in "ab" for i in range(11)]
    root = make_folder(tmp_path, files)
    train, val, everything = (names(open_dataset(root, split)) for split in ("train", "val", "all"))
    # 2 of 11. `printf 03.png | sha256sum` begins with 0490, of 06.png 0ba7; then 02.png, 0ec4.
    assert val == ["a/03.png", "a/06.png", "b/03.png", "b/06.png"], "hashes of a/03.png?"
    assert sorted(train + val) == everything == files and not set(train) & set(val)


@pytest.mark.folders
def test_one_image_less_moves_at_most_one():
    """Whichever of 23 images is removed, at most one other changes sides: training images would
    validate."""
    files = [f"root/a/{i}.png" for i in range(23)]

    def held_out(files):
        return set(hold_out({"a": files}, "val", "root")["a"])

    before = held_out(files)
    assert len(before) == 4 and held_out(files[::-1]) == before, "the order must not matter"
    for removed in files:
        after = held_out([name for name in files if name != removed])
        assert len((before ^ after) - {removed}) <= 1


@pytest.mark.folders
def test_a_class_of_few_images_is_named(tmp_path, capsys):
    """Fewer than 5 images have no fifth: a warning, or an error if all classes are so small."""
    files = [f"{name}/{i}.png" for name in "ab" for i in range(5)]
    root = make_folder(tmp_path / "some", [*files, "c/0.png", "d/0.png"])
    assert open_dataset(root, "val").labels.tolist() == [0, 1]
    assert open_dataset(root, "train").classes == ["a", "b", "c", "d"]
    told = "warning: none to validate in 2 classes of fewer than 5 images: c, d\n"
    assert capsys.readouterr().err == told, "once, although it was opened twice"
    with pytest.raises(ValueError, match="fewer than 5 images: too few to hold out a fifth"):
        open_dataset(make_folder(tmp_path / "none", files[:4]), "val")


@pytest.mark.folders
@pytest.mark.parametrize("make, expected", [
    (lambda root: None, "no folder "),
    (lambda root: root.mkdir(), "(found: nothing)"),
    (lambda root: make_folder(root, ["1.png"]), "has fewer than two class folders"),
    (lambda root: make_folder(root, ["my_dataset/a/1.png", "my_dataset/b/2.png"]),
     "has fewer than two class folders"),  # the accuracy on one class would be 100%
    (lambda root: (root / "a").mkdir(parents=True), "(found: a/ (1))"),
], ids="missing empty no-classes too-high no-images".split())
def test_a_folder_without_images_shows_what_was_expected(tmp_path, make, expected):
    """A data set that is not there is an error with the place and the expected tree."""
    make(tmp_path / "here")
    with pytest.raises(ValueError) as error:
        open_dataset(str(tmp_path / "here"), "train")
    assert expected in str(error.value) and str(tmp_path / "here") in str(error.value)
    assert str(error.value).count("FOLDER/train/<class>/<image>.jpg") == 1


@pytest.mark.folders
@pytest.mark.parametrize("broken, item, replaced_by", [
    ([1], 1, 2),  # by the next
    ([1, 2], 1, 3),  # by the next that can be read
    ([3], 3, 0)])  # after the last comes the first
def test_an_unreadable_file_is_replaced_and_reported(tmp_path, broken, item, replaced_by):
    """For a broken file comes the next, with ITS label and the index of the broken one."""
    data = open_dataset(make_folder(tmp_path, ["a/0.png", "a/1.png", "b/2.png", "c/3.png"]), "all")
    for i in broken:
        Path(data.path(i)).write_bytes(b"")
    image, label, unreadable = data[item]
    assert int(image[0, 0, 0]) == replaced_by
    assert label == [0, 0, 1, 2][replaced_by], "the label must be that of the picture"
    assert unreadable == item, "report the file that was asked for"


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
    numbers = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)

    def fake(root, train, download):
        return mock.Mock(data=numbers + train, classes=["cat", "dog"], targets=[1, 0])

    fake.filename = "archive.tar.gz"
    monkeypatch.setattr(evaluation.torchvision.datasets, kind, fake)
    for split, plus in [("train", 1), ("val", 0), ("all", 0)]:
        data = open_dataset(spec, split, transform=lambda image: image[:, 1:])  # no first row
        image, label, unreadable = data[1]
        assert image.shape == (3, 3, 5)
        assert (label, unreadable, data.classes) == (0, -1, ["cat", "dog"])
        # image 1, row 2, column 3, channel 0 is value 1 * 60 + 2 * 15 + 3 * 3 + 0
        assert image[0, 1, 3] == 99 + plus, "channels last, or the other half"


@pytest.mark.folders
@pytest.mark.parametrize("problem", [OSError("no route\nto host"), RuntimeError("corrupted")])
def test_cifar_without_a_network(monkeypatch, problem):
    """If the download fails, one line says what went wrong and which file to get by hand."""
    fake = mock.Mock(side_effect=problem, filename="cifar-10-python.tar.gz")
    monkeypatch.setattr(evaluation.torchvision.datasets, "CIFAR10", fake)
    with pytest.raises(ValueError) as error:
        open_dataset("cifar10", "train")
    told = str(problem).splitlines()[0]
    assert str(error.value) == (
        f"not downloaded or not readable ({told}): place cifar-10-python.tar.gz in data/ by hand")


@pytest.mark.folders
@pytest.mark.parametrize("files, opened", [
    (["1.png", "2.jpg"], ["1.png", "2.jpg"]),  # own pictures
    (["1.png", "a/2.png"], ["2.png"]),  # class folders, and a picture beside them
    (["1.png", "empty/x.txt", ".hidden/2.png"], ["1.png"])])
def test_pictures_without_classes(tmp_path, files, opened):
    """If no folder holds images those in the folder itself are one's own: no classes, labels -1."""
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(saved("png"))
    data = open_dataset(str(tmp_path), "all")
    assert [Path(data.path(i)).name for i in range(len(data))] == opened
    assert (data.classes, data[0][1]) == (([], -1) if opened[0] == "1.png" else (["a"], 0))
    if not data.classes:
        assert len(open_dataset(str(tmp_path), "val")) == len(data), "a fifth is not held out"
    single = open_dataset(data.path(0), "all")
    assert len(single) == 1 and single.path(0) == data.path(0) and not single.classes


@pytest.mark.folders
def test_what_is_left_out_is_said(tmp_path, capsys):
    """Hidden files and what systems leave behind are no data; other kinds are named, once.

    Links to folders within a class, which may lead in a circle, are not followed.
    """
    files = "a/1.png a/deep/2.png b/@3.png .git/4.png a/._1.png @eaDir/5.png a/@eaDir/6.png 7.png"
    root = make_folder(tmp_path, files.split())
    for other in ("a/notes.txt", "a/b.HEIC", "c/d.HEIC", "__MACOSX/a/._1.jpg", "README"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).touch()
    for link in ("a/up", "a/deep/up"):
        (tmp_path / link).symlink_to(tmp_path)
    data = open_dataset(root, "all")
    assert names(data) == ["a/1.png", "deep/2.png", "b/@3.png"] and data.classes == ["a", "b"]
    open_dataset(root, "all")
    assert capsys.readouterr().err == (
        f"warning: {root}: left out .HEIC (2), README (1), .txt (1), c/ (1), images in no class "
        f"folder (1)\n")


@pytest.mark.folders
@pytest.mark.parametrize("name, kind, values, expected", [
    # white is 65535 = 255 * 257; 257 becomes 1, 32768 / 257 = 127.502 becomes 128
    ("16.png", "uint16", [0, 257, 32768, 65535], [0, 1, 128, 255]),
    ("32.tif", "int32", [0, 65535, 65700], None),  # 65700 / 257 = 255.6
    ("float.tif", "float32", [0, 0.5, 1], None)])
def test_deep_grey_is_scaled_to_eight_bits(tmp_path, name, kind, values, expected):
    """Of 16 bits 65535 is white. Values of no known range are unreadable, and not cut off."""
    Image.fromarray(np.array([values], dtype=kind)).save(tmp_path / name)
    image = read_image(str(tmp_path / name))
    assert image is None if expected is None else image.tolist() == [[expected]] * 3


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


def png_with(name, data):
    """A small PNG with one more chunk, whose checksum is wrong."""
    chunk = struct.pack(">I", len(data)) + name + data + b"\0\0\0\0"
    return saved("png")[:33] + chunk + saved("png")[33:]


# EXIF data of one entry: tag 0x0112, kind 3 (16 bits), one value, 3 for upside down
ORIENTATION_3 = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 3, 1, 3, 0)


@pytest.mark.folders
@pytest.mark.parametrize("name, data", [
    (b"tEXt", b"a\0b"), (b"iCCP", b"x"), (b"eXIf", b"II"), (b"eXIf", ORIENTATION_3)])
def test_damaged_metadata_do_not_hide_a_picture(name, data, tmp_path):
    """A chunk of a PNG that is no picture may hold anything; a wrong checksum is no reason not to
    turn it."""
    (tmp_path / "b.png").write_bytes(png_with(name, data))
    expected = fields(COLOURS[::-1] if data == ORIENTATION_3 else COLOURS)
    assert torch.equal(read_image(tmp_path / "b.png"), expected)


# ---------------------------------------------------------------- from pixels to the model

@pytest.mark.counting
@pytest.mark.parametrize("image_size, crop_ratio, height, width, rows, columns", [
    (32, 0.5, 64, 64, (16, 48), (16, 48)),  # 32 / 0.5 = 64: no resizing; (64 - 32) / 2 = 16
    # 224 / 0.875 = 256, the short side; (300 - 224) / 2 = 38
    (224, 0.875, 256, 300, (16, 240), (38, 262)),
    (224, 0.875, 300, 256, (38, 262), (16, 240)),
    (32, 1.0, 32, 48, (0, 32), (8, 40))])  # a ratio of 1: all of the short side
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
def test_bfloat16_is_for_gpus_that_have_it(monkeypatch):
    """Only a GPU that computes in bfloat16 itself runs in it."""
    for native, dtype in [(True, torch.bfloat16), (False, torch.float32)]:
        supported = functools.partial(lambda native, emulated=True: native or emulated, native)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert best_dtype(torch.device("cuda")) == dtype and best_dtype(CPU) == torch.float32


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
        self.table = table

    def forward(self, images):  # evaluated with mean 0 and std 1, so that a pixel is level / 255
        return self.table[(images[:, 0, 0, 0] * 255).round().long()]


def loader_of(labels, batch_size=2):
    """Return a loader of images of grey levels 0, 1, 2, ...: the model Known tells them apart."""
    levels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    names = [f"class {i}" for i in range(12)]
    return eval_loader(TensorImages(levels, torch.tensor(labels), names), batch_size, 0, CPU)


def predicted(table, loader, *options, **more):
    """predict() of the model Known, which sees a grey level as level / 255."""
    return predict(Known(table), loader, CPU, (0.0,) * 3, (1.0,) * 3, *options, **more)


def counted(table, labels, columns=None, batch_size=2, **options):
    """count() for images of grey levels 0, 1, 2, ..., with the logits in the table."""
    loader = loader_of(labels, batch_size)
    return evaluate(Known(table), loader, CPU, (0.0,) * 3, (1.0,) * 3, columns, **options)


@pytest.mark.counting
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_counting_by_hand(batch_size):
    """top1 and top5 are percentages of the images, loss is the mean cross-entropy of all."""
    ln2 = math.log(2)
    # softmax: 1/2 for one class, 1/4 for the others; three classes are all among the best five
    table = torch.tensor([[ln2, 0.0, 0.0], [0.0, ln2, 0.0], [0.0, 0.0, ln2], [ln2, 0.0, 0.0]])
    result = counted(table, [0, 1, 2, 1], batch_size=batch_size)  # right, right, right, wrong
    # loss: -ln 1/2 three times, -ln 1/4 = 2 ln 2 once
    counts = dict(images=4, correct1=3, correct5=4, top1=75.0, top5=100.0)
    assert result == pytest.approx(counts | dict(loss=5 * ln2 / 4)), "a mean of batches' means?"


@pytest.mark.counting
def test_one_of_several_answers_is_enough():
    """An image counts once if the best guess, or one of the best five, is among its labels."""
    # With 7 classes and logits 7, 6, ..., 1 the best five are 0 to 4. Answers: {0, 6} right at
    # once; {3, 4} within five, and only once; {5, 6} wrong; {1} within five. -1 is padding, and
    # not the last class.
    table = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]] * 4)
    result = counted(table, [[6, 0], [3, 4], [5, 6], [1, -1]])
    assert (result["images"], result["correct1"], result["correct5"]) == (4, 1, 3)
    p = table[0].double().softmax(0).tolist()
    right = [p[6] + p[0], p[3] + p[4], p[5] + p[6], p[1]]
    expected = -sum(map(math.log, right)) / 4
    assert result["loss"] == pytest.approx(expected, rel=1e-6)


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
def test_lines_arrive_at_once_in_any_encoding(tmp_path):
    """A name that the encoding of the output lacks is written another way, and ends nothing."""
    with open(tmp_path / "log", "w", encoding="ascii") as log:
        evaluation.shield(log)
        print("caf\u00e9 \udce9", file=log)
        assert (tmp_path / "log").read_text() == "caf\\xe9 \\udce9\n"
    evaluation.shield(io.StringIO())  # a notebook's stream has no reconfigure()


@pytest.mark.counting
def test_mistakes_by_hand():
    """Accuracy per class in percent, and which classes were taken for which, most often first."""
    # a: right, taken for b; b: for c twice, for a; c: right. There is no d.
    true, best = [0, 0, 1, 1, 1, 2], [0, 1, 2, 2, 0, 2]
    found = predicted(F.one_hot(torch.tensor(best), 4).float(), loader_of(true))
    per_class, pairs = mistakes(found, "abcd")
    assert per_class == {"a": dict(top1=50.0, images=2), "b": dict(top1=0.0, images=3),
                         "c": dict(top1=100.0, images=1)}
    assert pairs == [["b", "c", 2], ["a", "b", 1], ["b", "a", 1]]


@pytest.mark.counting
def test_columns_restrict_the_prediction():
    """With columns the prediction and the loss are made among the data's classes only."""
    # Column 0 is best, but no class of the data. Of 3 and 1 best is 3, then 1, then 3.
    table = torch.tensor([[9.0, 1, 2, 3], [9.0, 5, 2, 3], [9.0, 0, 2, 1]])
    # label 0 of the data is column 3, label 1 is column 1
    result = counted(table, labels=[0, 1, 1], columns=[3, 1])
    assert result["top1"] == pytest.approx(100 * 2 / 3), "0 if all four columns take part"
    # two logits 2 apart, right and wrong: ln(1 + e^-2) twice; and 1 apart, wrong: ln(1 + e^1)
    assert result["loss"] == pytest.approx((2 * math.log1p(math.exp(-2)) + math.log1p(math.e)) / 3)


class Watch(nn.Module):
    """Note what a model is given. Its logits are 0 and the sum of the pixel's colours."""

    def forward(self, images):
        self.mode = self.training, torch.is_grad_enabled()
        self.logits = images.flatten(1) @ torch.tensor([[0.0, 1.0]] * 3)
        return self.logits


@pytest.mark.counting
def test_routings_can_be_watched():
    """watch gets the Routings of each batch, here words, and the predictions are the same."""

    class Sparse(Known):
        def forward(self, images, return_routing):
            assert return_routing
            return super().forward(images), [f"layer {i} of {len(images)}" for i in (1, 3)]

    table, seen = torch.randn(3, 4), []
    found = predict(Sparse(table), loader_of([0, 1, 2]), CPU, (0.0,) * 3, (1.0,) * 3,
                    watch=seen.append)
    assert seen == [["layer 1 of 2", "layer 3 of 2"], ["layer 1 of 1", "layer 3 of 1"]]
    assert_close(found.losses, F.cross_entropy(table, torch.arange(3), reduction="none"))


@pytest.mark.counting
def test_a_stop_is_asked_for_before_each_batch():
    """Without a stop 3 batches are predicted; with one there is no result, and nothing to count."""
    table, labels = torch.zeros(6, 3), [0, 1, 2, 0, 1, 2]
    for answers in ([False] * 4, [False, True, True], [False] * 3 + [True]):
        asked = iter(answers)
        result = counted(table, labels, stop=lambda: next(asked))
        assert (result is None) == any(answers) and next(asked, "all") == "all"


@pytest.mark.counting
def test_the_model_runs_in_the_dtype_asked_for():
    """With dtype=bfloat16 it runs under autocast, and its logits are counted in float32.

    In evaluation mode, without gradients, on normalized images.
    """
    images, model = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), Watch()
    loader = eval_loader(TensorImages(images, torch.tensor([0]), ["-"]), 1, 0, CPU)
    for dtype in (torch.bfloat16, torch.float32):
        result = evaluate(model, loader, CPU, (0.5,) * 3, (0.25,) * 3, dtype=dtype)
        assert model.logits.dtype == dtype and model.mode == (False, False)
        expected = math.log1p(math.exp(6))  # of logits 0 and 3 * (1 - 0.5) / 0.25
        assert result["loss"] == pytest.approx(expected, rel=1e-6), "summed in bfloat16?"


@pytest.mark.counting
def test_an_accuracy_without_an_image_is_refused(tmp_path):
    """Files that cannot be read are all found, counted and named."""
    data = open_dataset(make_folder(tmp_path, ["a/0.png", "a/1.png", "b/2.png"]), "all")
    for broken in ("a/0.png", "b/2.png"):
        (tmp_path / broken).write_bytes(b"")
    with pytest.raises(ValueError) as error:
        count(predicted(torch.zeros(3, 2), eval_loader(data, 2, 0, CPU)), data)
    assert str(error.value) == f"cannot read 2 files: {tmp_path}/a/0.png, {tmp_path}/b/2.png"


@pytest.mark.counting
@pytest.mark.parametrize("world", [1, 2, 3, 12])
def test_each_image_counts_once_in_the_order_of_the_data(world, monkeypatch):
    """Whatever the number of processes, even if one has no image: all have the same result."""
    table, labels, shares = torch.randn(11, 6), [i % 6 for i in range(11)], {}
    monkeypatch.setattr(evaluation.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluation.dist, "get_world_size", lambda: world)

    def gather(found, own):  # in the second round all shares are known
        shares[rank] = own
        found[:] = [shares.get(i, own) for i in range(world)]

    monkeypatch.setattr(evaluation.dist, "all_gather_object", gather)
    for rank in [*range(world), *range(world)]:
        monkeypatch.setattr(evaluation.dist, "get_rank", lambda: rank)
        found = predicted(table, loader_of(labels))
    losses = F.cross_entropy(table, torch.tensor(labels), reduction="none")
    assert_close(found.losses, losses, msg=lambda m: f"twice, not at all or in another order? {m}")
    assert found.answers[:, 0].tolist() == labels


@pytest.mark.counting
@pytest.mark.parametrize("loss, probs, losses", [
    ("softmax", [3 / 6, 2 / 6, 1 / 6], math.log(6)),
    # each for itself, e^x / (e^x + 1); the loss of "a, not b, not c" is -ln 1/2 - ln 1/4 - ln 1/3
    ("sigmoid", [3 / 4, 2 / 3, 1 / 2], math.log(24))])
def test_the_best_classes_by_hand(loss, probs, losses):
    """Logits 0, ln 3 and ln 2 of a, b and c, of which a is right: b is best, and a last."""
    found = predicted(torch.tensor([[0.0, math.log(3), math.log(2)]]), loader_of([0]), loss=loss)
    [best] = best_classes(found, "abc")
    assert [name for name, _ in best] == ["b", "c", "a"]
    assert [p for _, p in best] == pytest.approx(probs)
    assert found.losses.tolist() == pytest.approx([losses])


# ---------------------------------------------------------------- models and checkpoints

@pytest.mark.checkpoints
def test_a_model_is_built_from_its_name_and_options():
    """build_model() makes a preset of vit.py or convnext.py, and changes no config."""
    config = dict(model="convnext_nano", num_classes=3, moe_layers="last2")
    for _ in range(2):
        model = build_model(config)
        assert model.head.out_features == 3 and model.moe_blocks == [4, 6]
    assert isinstance(build_model(CONFIG), vit.ViT) and len(build_model(CONFIG).blocks) == 2


@pytest.fixture
def saved_model(tmp_path):
    """Return a model that says "b" and a folder: both.pt also has averaged weights, for "c"."""
    model = build_model(CONFIG)
    nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([0.0, 5.0, 0.0])
    averaged = {name: weight.clone() for name, weight in model.state_dict().items()}
    averaged["head.bias"] = torch.tensor([0.0, 0.0, 5.0])
    save_checkpoint(tmp_path / "both.pt", CONFIG, [*"abc"], model, ema=averaged)
    save_checkpoint(tmp_path / "plain.pt", CONFIG, [*"abc"], model, args=dict(ema=0))
    return model, tmp_path


@pytest.mark.checkpoints
def test_a_checkpoint_comes_back(tmp_path):
    """load_checkpoint() gives the same model in evaluation mode, and the stored dict."""
    model = build_model(CONFIG).eval()
    path = save_checkpoint(tmp_path / "last.pt", CONFIG, [*"abc"], model, epoch=7)
    loaded, stored = load_checkpoint(path, CPU)
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


def cut_off(path):
    """A checkpoint of which the end is missing, as after a full disk."""
    save_checkpoint(path, CONFIG, [*"abc"])
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.checkpoints
@pytest.mark.parametrize("make, reason", [
    (lambda path: None, ".*No such file"),
    (lambda path: path.mkdir(), ""),
    (cut_off, ""),
    (lambda path: path.write_bytes(b""), ""),
    (lambda path: path.write_text("a\n\ntext"), ""),
    (lambda path: torch.save(dict(model={}, epoch=3), path), ".*it lacks args, best, classes, "),
    (lambda path: torch.save(7, path), ""),
], ids="missing folder cut empty text foreign number".split())
def test_what_is_not_a_checkpoint_is_one_line(tmp_path, make, reason):
    """Whatever is wrong with a file, one line names it and says what was expected."""
    path = tmp_path / "last.pt"
    make(path)
    expected = f"^{path} is not a checkpoint like runs/<run>/best.pt, or not whole: {reason}"
    with pytest.raises(ValueError, match=expected) as error:
        load_checkpoint(str(path), CPU)
    assert "\n" not in str(error.value)


@pytest.mark.checkpoints
@pytest.mark.parametrize("changes, reason", [
    (dict(config=CONFIG | {"dim": 32}), "Error.* size mismatch"),
    (dict(config=CONFIG | {"depth": 3}), "Error.* Missing key"),
    (dict(config=CONFIG | {"size": 1}), ".*unexpected keyword argument 'size'"),
    (dict(classes=["a", "b"]), "'num_classes is not 2'")])
def test_a_config_that_does_not_fit_its_weights(tmp_path, changes, reason):
    """Where config, classes and weights contradict each other one line names the file and why."""
    path = save_checkpoint(tmp_path / "last.pt", CONFIG, [*"abc"], **changes)
    expected = f"^config and weights in {path} do not fit: {reason}"
    with pytest.raises(ValueError, match=expected) as error:
        load_checkpoint(path, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.checkpoints
def test_a_checkpoint_cannot_run_code(tmp_path):
    """A file that would execute something when opened is refused, and nothing is executed."""
    proof = str(tmp_path / "was here")
    path = save_checkpoint(tmp_path / "evil.pt", CONFIG, [*"abc"], args=Burglar(proof))
    with pytest.raises(ValueError, match="evil.pt is not a checkpoint") as error:
        load_checkpoint(path, CPU)
    assert "\n" not in str(error.value)
    assert not os.path.exists(proof), "opened without weights_only=True"


# ---------------------------------------------------------------- the command line

def run(monkeypatch, *arguments):
    """The whole program, as `python eval.py <arguments>` would run it."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    evaluation.main(evaluation.parse_args())


@pytest.mark.evaluator
@pytest.mark.parametrize("flag, interval, right, wrong", [
    ("--batch-size", "int in [1, inf)", [1, 7], ["0", "-1", "1.5", "inf", "nan", "many", ""]),
    ("--workers", "int in [0, inf)", [0, 1], ["-1"]),
    ("--capacity-factor", "float in (0, inf)", [0.001, 5.0], ["0", "-1", "inf", "nan"])])
def test_a_number_out_of_its_interval(capsys, flag, interval, right, wrong):
    """[ and ] include an end of an interval, ( and ) exclude it; other numbers are refused."""
    flags = ["best.pt", "--data", "shapes", flag]
    for value in right:
        args = evaluation.parse_args([*flags, str(value)])
        assert getattr(args, flag[2:].replace("-", "_")) == value
    for text in wrong:
        with pytest.raises(SystemExit, match="2"):
            evaluation.parse_args([*flags, text])
        told = f"argument {flag}: expected {interval}, got {text}\n"
        assert capsys.readouterr().err.endswith(told)


@pytest.mark.evaluator
@pytest.mark.parametrize("raised, status, told", [
    (ValueError("no data\nat all"), 2, "error: no data\n"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore"), 2,
     "error: CUDA out of memory. Tried 2 GiB: a larger --accumulate (train.py) or a smaller "
     "--batch-size or --model helps\n"),
    (RuntimeError("DataLoader worker (pid 7) is killed"), 2,
     "error: DataLoader worker (pid 7) is killed\n"),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most "
                  "recent call last):\n  File ...\nRuntimeError: expected equal sizes"), 2,
     "error: RuntimeError: expected equal sizes\n"),  # of a traceback the last line
    (KeyboardInterrupt(), 130, ""),
    (RecursionError("a bug"), None, "")])  # a RuntimeError
def test_what_a_user_can_mend_is_one_line(raised, status, told, monkeypatch, capsys):
    """It ends the program with status 2, Ctrl-C with 130; a bug shows its traceback."""
    monkeypatch.setattr(evaluation, "load_checkpoint", mock.Mock(side_effect=raised))
    with pytest.raises(SystemExit if status else RecursionError, match=f"^{status or raised}$"):
        evaluation.run_program(lambda: run(monkeypatch, "best.pt", "--data", "shapes"))
    assert capsys.readouterr().err == told


@pytest.mark.evaluator
def test_the_command_prints_results_and_writes_json(saved_model, monkeypatch, capsys):
    """Each checkpoint has a block with a line per data set, and a dict of the JSON file."""
    model, folder = saved_model
    # Classes b and c, which the model knows as 1 and 2, and never a. Averaged weights (EMA) say
    # "c": 2 of 5 and 2 of 4. Raw ones say "b": 3 of 5 and 1 of 4.
    one = make_folder(folder / "one", ["b/0.png", "b/1.png", "b/2.png", "c/3.png", "c/4.png"])
    two = make_folder(folder / "two", ["a/0.png", "b/1.png", "c/2.png", "c/3.png"])
    both, plain = folder / "both.pt", folder / "plain.pt"
    flags = f"--data {one} --data {two} --batch-size 2 --workers 0 --json {folder}/out.json"
    run(monkeypatch, both, plain, *flags.split())
    blocks = capsys.readouterr().out.strip().split("\n\n")
    written = json.loads((folder / "out.json").read_text())
    assert written["batch_size"] == 2 and written["processes"] == 1
    assert written["dtype"] == "torch.float32" and written["torch"] == torch.__version__
    params = sum(p.numel() for p in model.parameters())
    # width 16, hidden 64: 2 of the 8 experts of one layer work
    active = params - 6 * (2 * 4 * 16 * 16 + 4 * 16 + 16)
    for block, row, path, weights, top1 in zip(
            blocks, written["results"], (both, plain), ("EMA", "raw"),
            (("40.00", "50.00"), ("60.00", "25.00")), strict=True):
        cost, share = row["multiply_adds"], row["routed_share"]
        assert cost * share == pytest.approx(17 * 2 * 2 * 16 * 64), "17 tokens, 2 experts, 2 layers"
        assert [line for line in block.splitlines() if not line.startswith("    ")] == [
            f"{path}: vit_nano after epoch 1, {weights} weights",
            f"  {params:,} parameters, {active:,} active; {cost:,} multiply-adds, {share:.0%} of "
            "them in routed experts",
            f"  {one}: top-1 {top1[0]} %, top-5 100.00 %; 5 images, 2 of 3 classes, logits "
            "restricted",
            f"  {two}: top-1 {top1[1]} %, top-5 100.00 %; 4 images, 3 of 3 classes"]
        assert (row["checkpoint"], row["weights"]) == (str(path), weights)
        assert (row["params"], row["active"]) == (params, active)
    # The logits of b and c are 5 and 0: -ln(e^5 / (e^5 + 1)) if b is right, else -ln(1 / (e^5 + 1))
    loss = (3 * math.log1p(math.exp(-5)) + 2 * math.log1p(math.exp(5))) / 5
    expected = dict(images=5, correct1=3, correct5=5, top1=60.0, top5=100.0, loss=loss)
    found = written["results"][1]["data"][one]
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    run(monkeypatch, both, "--raw", "--data", one, "--workers", "0")
    assert f"  {one}: top-1 60.00 %" in capsys.readouterr().out, "--raw: not the averaged ones"


@pytest.mark.evaluator
def test_the_checkpoint_says_how_to_prepare_images(tmp_path, monkeypatch):
    """Image size, crop, mean and deviation are those of the checkpoint."""
    model, mean, std = build_model(CONFIG).eval(), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    path = save_checkpoint(
        tmp_path / "best.pt", CONFIG, [*"abc"], model, crop_ratio=0.5, mean=mean, std=std)
    pixels = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    data = make_folder(tmp_path / "data", ["a/0.png", "b/0.png", "c/0.png"])
    for name in "abc":  # three classes, one image
        v2.functional.to_pil_image(pixels).save(tmp_path / "data" / name / "0.png")
    flags = ["--data", data, "--workers", 0, "--json", tmp_path / "out.json"]
    run(monkeypatch, path, *flags)
    # 32 / 0.5 = 64 is the short side already; the centre of 64 x 80 begins at row 16, column 24
    centre = pixels[:, 16:48, 24:56].float() / 255
    x = torch.stack([(centre[i] - mean[i]) / std[i] for i in range(3)])
    loss = -model(x.unsqueeze(0)).log_softmax(1)[0].mean().item()
    [row] = json.loads((tmp_path / "out.json").read_text())["results"]
    assert row["data"][data]["loss"] == pytest.approx(loss)


# ---------------------------------------------------------------- signals

@pytest.mark.training
def test_a_second_signal_ends_the_process(monkeypatch):
    """The first is for the loop, which saves; one more than two seconds later ends all at once."""
    handlers, seconds, ended, run = {}, [0.0], [], SimpleNamespace(signal=0)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # whatever nohup left
    monkeypatch.setattr(evaluation.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(os, "_exit", ended.append)
    evaluation.watch_signals(run)
    assert set(handlers) == evaluation.SIGNALS >= {signal.SIGINT, signal.SIGTERM}
    for now, number, exits in [(100, signal.SIGTERM, []), (101.9, signal.SIGTERM, []),
                               (101.9, signal.SIGINT, []), (102.1, signal.SIGINT, [128 + 2])]:
        seconds[0] = now
        handlers[number](number, None)
        assert (run.signal, ended) == (signal.SIGTERM, exits)
