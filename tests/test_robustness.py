"""Tests of the protocols of eval.py: classes, ReaL, ImageNet-C, shifts, routing, processes."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import v2

import eval as evaluation
import forked
from checks import drawn
from eval import (
    ALEXNET, CHECKPOINT_KEYS, TensorImages, build_model, change_routing, corruption_errors,
    eval_loader, eval_transform, evaluate, match_classes, match_dataset, open_dataset, open_parts,
    read_real)

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent

CLASSES = [f"n{i:02}" for i in range(12)]  # of the checkpoint: n00, n01, ..., n11
CONFIG = dict(model="vit_nano", num_classes=12, depth=2, dim=16, moe_layers=[1], num_experts=4, k=2)
# how the model of `always` ranks the classes, whatever it sees
BEST_FIRST = [2, 10, 0, 7, 5, 1, 3, 4, 6, 8, 9, 11]


def make_folder(root, files):
    """Write images of 36 x 32 pixels. files: {"folder/name.png": grey level} or a list."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        level = files[name] if isinstance(files, dict) else 0
        Image.new("RGB", (36, 32), (level, level, level)).save(root / name)
    return str(root)


def write_checkpoint(path, model, **changes):
    """A checkpoint as train.py writes it; the model sees pixels in 0..1."""
    checkpoint = dict(config=CONFIG, classes=CLASSES, model=model.state_dict(), ema=None)
    checkpoint |= dict(image_size=32, crop_ratio=0.5, mean=(0.0,) * 3, std=(1.0,) * 3)
    checkpoint |= dict(optimizer={}, epoch=1, step=1, best=0.0, args={})
    assert set(checkpoint) == CHECKPOINT_KEYS
    torch.save(checkpoint | changes, path)
    return str(path)


@pytest.fixture
def always(tmp_path):
    """Return a checkpoint with the same logits for every image: 12 for class 2, 11 for 10, ..."""
    model = build_model(CONFIG)
    nn.init.zeros_(model.head.weight)
    for logit, column in zip(range(12, 0, -1), BEST_FIRST):
        model.head.bias.data[column] = logit
    return write_checkpoint(tmp_path / "always.pt", model)


def run(monkeypatch, folder, *arguments):
    """`python eval.py <arguments>`; returns the results in its JSON file."""
    arguments = [*map(str, arguments), "--workers", "0", "--json", str(folder / "out.json")]
    evaluation.main(evaluation.parse_args(arguments))
    return json.loads((folder / "out.json").read_text())["results"]


class Known(nn.Module):
    """Return row i of a table of logits for an image of grey level i."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, images):  # evaluated with mean 0 and std 1, so that a pixel is level / 255
        return self.table[(images[:, 0, 0, 0] * 255).round().long()]


def score(table, matched, batch_size, workers):
    """Return evaluate() of the Known model on what match_dataset() returned."""
    loader = eval_loader(matched, batch_size, workers, CPU, matched.indices)
    return evaluate(Known(table), loader, CPU, (0.0,) * 3, (1.0,) * 3, matched.columns)


# ---------------------------------------------------------------- whose class is which


@pytest.mark.classes
def test_integer_folders_are_class_numbers():
    """Folders 0 to 11, sorted 0, 1, 10, 11, 2, ..., stand for the classes of these numbers."""
    names = sorted(map(str, range(12)))
    assert names[:5] == ["0", "1", "10", "11", "2"]
    found = match_classes(names, CLASSES)
    assert found == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9], "the position among the sorted names?"
    assert match_classes(["000", "007", "011"], CLASSES) == [0, 7, 11], "zeros change nothing"


@pytest.mark.classes
def test_integer_folders_of_integer_classes_go_by_name():
    """If the checkpoint's own classes are called by numbers, the name decides."""
    classes = sorted(map(str, range(12)))
    assert match_classes(["10", "2"], classes) == [2, 4]  # of 0, 1, 10, 11, 2


@pytest.mark.classes
def test_a_wrong_number_is_an_unknown_class():
    """A folder 12 of a model with classes 0 to 11 is unmatched, and so is a number among names."""
    with pytest.raises(ValueError, match=r"1 of 3 classes .* unknown .*\(12, "):
        match_classes(["0", "11", "12"], CLASSES)
    with pytest.raises(ValueError, match=r"1 of 2 classes .* unknown .*\(3, "):
        match_classes(["3", "n04"], CLASSES)


@pytest.mark.classes
def test_unmatched_folders_can_be_left_out():
    """With ignore_unmatched an unknown folder gets -1, unless all are unknown."""
    assert match_classes(["n03", "zebra", "n01"], CLASSES, ignore_unmatched=True) == [3, -1, 1]
    expected = "1 of 2 classes .*zebra.*--ignore-unmatched leaves them out"
    with pytest.raises(ValueError, match=expected):
        match_classes(["n03", "zebra"], CLASSES)
    with pytest.raises(ValueError, match="2 of 2 classes .*unknown"):
        match_classes(["cow", "zebra"], CLASSES, ignore_unmatched=True)


@pytest.mark.evaluator
def test_numeric_folders_end_to_end(always, tmp_path, monkeypatch, capsys):
    """The accuracy on folders 0 to 11 is that of the classes with these numbers."""
    # Two images in each folder, a third in 2 and a third and a fourth in 10: 27 images. The model
    # always says class 2: 3 of 27 right; by position in the sorted names class 2 would be folder
    # "10", 4 of 27. Its best five are 2, 10, 0, 7 and 5: 3 + 4 + 2 + 2 + 2 = 13 of 27.
    files = [f"{i}/{j}.png" for i in range(12) for j in range(2)]
    files += ["2/2.png", "10/2.png", "10/3.png"]
    data = make_folder(tmp_path / "v2", files)
    [row] = run(monkeypatch, tmp_path, always, "--data", data)
    result = row["data"][data]
    assert (result["images"], result["correct1"], result["correct5"]) == (27, 3, 13)
    note = "27 images, 12 of 12 classes\n"
    assert note in capsys.readouterr().out


@pytest.mark.evaluator
def test_the_loss_is_of_the_kind_of_the_training(tmp_path, monkeypatch):
    """After --loss sigmoid that is the loss, too: with logits of 0 it is 12 ln 2, and not ln 12."""
    model = build_model(CONFIG)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    data = make_folder(tmp_path / "data", [f"{name}/0.png" for name in CLASSES])
    for loss, expected in (("softmax", math.log(12)), ("sigmoid", 12 * math.log(2))):
        path = write_checkpoint(tmp_path / f"{loss}.pt", model, args=dict(loss=loss))
        [row] = run(monkeypatch, tmp_path, path, "--data", data)
        assert row["data"][data]["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.evaluator
def test_a_subset_of_the_classes_restricts_the_logits(always, tmp_path, monkeypatch, capsys):
    """On 6 of 12 classes the prediction is made among the 6, as for ImageNet-A."""
    # Classes 1, 3, 5, 8, 9, 11, which the model ranks 5, 1, 3, 8, 9, 11. Images: 1 of 1, 2 of 3, 3
    # of 5, 1 each of the others: 9. Of 6 it says 5: 3 right; the best five are all but 11: 8.
    # Without the restriction: 0, and 5 only, 3.
    counts = {"01": 1, "03": 2, "05": 3, "08": 1, "09": 1, "11": 1}
    files = [f"n{name}/{i}.png" for name, count in counts.items() for i in range(count)]
    data = make_folder(tmp_path / "a", files)
    [row] = run(monkeypatch, tmp_path, always, "--data", data)
    result = row["data"][data]
    assert (result["images"], result["correct1"], result["correct5"]) == (9, 3, 8)
    # logits of 5, 1, 3, 8, 9, 11 by their places in BEST_FIRST: 8, 7, 6, 3, 2, 1
    logits = {"05": 8, "01": 7, "03": 6, "08": 3, "09": 2, "11": 1}
    normalizer = math.log(sum(map(math.exp, logits.values())))
    loss = sum(normalizer - logits[name[1:3]] for name in files) / 9
    assert result["loss"] == pytest.approx(loss, rel=1e-6)
    assert "9 images, 6 of 12 classes, logits restricted\n" in capsys.readouterr().out


@pytest.mark.evaluator
def test_ignored_folders_do_not_count(always, tmp_path, monkeypatch, capsys):
    """--ignore-unmatched leaves images of unknown folders out, and says how many."""
    files = ["n02/0.png", "n03/0.png", "n03/1.png", "aardvark/0.png", "zebra/0.png", "zebra/1.png"]
    data = make_folder(tmp_path / "data", files)
    expected = r"2 of 4 classes of the data are unknown .*\(aardvark, zebra"
    with pytest.raises(ValueError, match=expected):
        run(monkeypatch, tmp_path, always, "--data", data)
    [row] = run(monkeypatch, tmp_path, always, "--data", data, "--ignore-unmatched")
    # "n02" is what the model says
    assert (row["data"][data]["images"], row["data"][data]["correct1"]) == (3, 1)
    note = "3 images, 2 of 12 classes, logits restricted, 3 images without an answer skipped\n"
    assert note in capsys.readouterr().out


@pytest.mark.classes
def test_two_names_of_one_class_are_one_column():
    """Folders 1 and 01 both stand for class 1, which competes once."""
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 1, 1)
    data = TensorImages(images, torch.tensor([0, 1, 2]), ["01", "1", "2"])
    matched = match_dataset(data, CLASSES)
    assert matched.columns == [1, 2]
    assert matched.labels.tolist() == [[0], [0], [1]]
    assert data.labels.tolist() == [0, 1, 2], "the labels of the data set itself stay"


@pytest.mark.classes
@pytest.mark.parametrize("workers, batch_size", [(0, 1), (0, 7), (0, 23), (0, 100), (2, 4)])
def test_the_counts_are_those_of_a_plain_loop(tmp_path, workers, batch_size):
    """At any batch size and number of workers the counts are those of a loop over the files."""
    draw = random.Random(5)
    names = ["n09", "n02", "n10", "n00", "n07", "n05", "n11"]
    root = make_folder(tmp_path, {f"{draw.choice(names)}/{i:02}.png": i for i in range(23)})
    table = torch.randn(23, 12)
    top1 = top5 = 0
    folders = sorted(os.listdir(root))
    for folder in folders:
        for file in os.listdir(tmp_path / folder):
            logits = table[int(file[:2])]
            mine = logits[CLASSES.index(folder)]
            better = sum(bool(logits[CLASSES.index(other)] > mine) for other in folders)
            top1 += better < 1
            top5 += better < 5
    data = match_dataset(open_dataset(root, "all", eval_transform(32, 1.0)), CLASSES)
    result = score(table, data, batch_size, workers)
    assert (result["images"], result["correct1"], result["correct5"]) == (23, top1, top5)
    assert 0 < top1 < top5 < 23, "a test that cannot fail"


@pytest.mark.counting
@pytest.mark.parametrize("size", [32, 20])
def test_images_in_memory_come_in_whole_batches(size):
    """Seven images in batches of 3, 3 and 1 are the items one by one, also when resized."""
    data = drawn("shapes", 7, transform=eval_transform(size, 1.0))
    batches = list(eval_loader(data, 3, 0, CPU))
    assert [len(images) for images, _, _ in batches] == [3, 3, 1]
    images, labels, unreadable = map(torch.cat, zip(*batches))
    assert torch.equal(images, torch.stack([data[i][0] for i in range(7)]))
    assert torch.equal(labels, data.labels)
    assert unreadable.tolist() == [-1] * 7


# ---------------------------------------------------------------- several right answers: ReaL


@pytest.mark.counting
def test_one_of_several_answers_is_enough():
    """An image counts once if the best guess, or one of the best five, is among its labels."""
    # With 7 classes and logits 7, 6, ..., 1 the best five are 0 to 4. Answers: {0, 6} right at
    # once; {3, 4} within five, and only once; {5, 6} wrong; {1} within five. -1 is padding, and
    # not the last class.
    table = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]] * 4)
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 1, 1)
    data = TensorImages(images, torch.tensor([[6, 0], [3, 4], [5, 6], [1, -1]]), ["-"])
    result = evaluate(Known(table), eval_loader(data, 3, 0, CPU), CPU, (0.0,) * 3, (1.0,) * 3)
    assert (result["images"], result["correct1"], result["correct5"]) == (4, 1, 3)
    p = table[0].double().softmax(0).tolist()
    right = [p[6] + p[0], p[3] + p[4], p[5] + p[6], p[1]]
    expected = -sum(map(math.log, right)) / 4
    assert result["loss"] == pytest.approx(expected, rel=1e-6)


# The files of three classes, whose order in the folders is not that of their numbers.
VALIDATION = [
    "n07/ILSVRC2012_val_00000001.png",
    "n00/ILSVRC2012_val_00000002.png",
    "n02/ILSVRC2012_val_00000003.png",
    "n00/ILSVRC2012_val_00000004_n00.png",
    "n02/ILSVRC2012_val_00000005.png",
]


@pytest.mark.evaluator
def test_real_labels_belong_to_file_names(always, tmp_path, monkeypatch, capsys):
    """Entry i of a ReaL file is for the image with number i + 1; an empty one skips it."""
    # The matched classes n00, n02, n07 are 0, 1, 2; the model always says n02: label 1. Images 1:
    # [1], right. 2: [], skipped. 3: [0, 2], wrong. 4: [2, 1], right. 5: [1], right. So 3 of 4.
    # Taken in the order of the sorted files (2, 4, 3, 5, 1) images 4 would be skipped; by folders
    # it is 2 of 5.
    data = make_folder(tmp_path / "val5", VALIDATION)
    (tmp_path / "real.json").write_text(json.dumps([[1], [], [0, 2], [2, 1], [1]]))
    [row] = run(monkeypatch, tmp_path, always, "--data", data, "--real", tmp_path / "real.json")
    result = row["data"][data]
    assert (result["images"], result["correct1"], result["correct5"]) == (4, 3, 4)
    note = f"1 images without an answer skipped, ReaL labels from {tmp_path / 'real.json'}\n"
    assert note in capsys.readouterr().out
    labels = read_real(str(tmp_path / "real.json"), open_dataset(data, "all"), 3)
    assert labels.tolist() == [[-1, -1], [2, 1], [0, 2], [1, -1], [1, -1]]  # images 2, 4, 3, 5, 1


@pytest.mark.classes
def test_real_labels_are_padded_with_minus_1(tmp_path):
    """Image 1 has one right label, image 2 none, image 3 two."""
    files = [f"n00/ILSVRC2012_val_0000000{i}.png" for i in (1, 2, 3)]
    data = open_dataset(make_folder(tmp_path / "val3", files), "all")
    (tmp_path / "real.json").write_text("[[1], [], [0, 2]]")
    labels = read_real(str(tmp_path / "real.json"), data, 3)
    assert labels.tolist() == [[1, -1], [-1, -1], [0, 2]]


@pytest.mark.classes
@pytest.mark.parametrize("text, expected", [
    ("[[1], [], [0], [2]]", "4 entries for 5 images .* expected one for each"),
    ("[[1], [], [0], [2], [1], [1]]", "6 entries for 5 images"),
    ("[[1], [], [0], [3], [1]]", "expected labels from 0 to 2, the matched classes"),
    ('[["n00"], [], [0], [2], [1]]', "real.json does not fit"),
    ("[[1.5], [], [0], [2], [1]]", "expected labels from 0 to 2"),
    ("[1, 2, 3, 4, 5]", "real.json does not fit"),
    ("7", "real.json does not fit"),
    ("[[1], ", "real.json does not fit: Expecting value"),
    (None, "real.json does not fit: .*No such file"),
])
def test_a_wrong_real_file(tmp_path, text, expected):
    """A ReaL file that does not fit is one line that says why."""
    data = open_dataset(make_folder(tmp_path / "val5", VALIDATION), "all")
    if text:
        (tmp_path / "real.json").write_text(text)
    with pytest.raises(ValueError, match=expected) as error:
        read_real(str(tmp_path / "real.json"), data, 3)
    assert "\n" not in str(error.value)


@pytest.mark.classes
def test_real_needs_the_official_names(tmp_path):
    """Files that are not called ILSVRC2012_val_<number> cannot be found in a ReaL file."""
    files = ["n00/cat.png", "n00/ILSVRC2012_val_00000001.png"]
    data = open_dataset(make_folder(tmp_path / "val", files), "all")
    (tmp_path / "real.json").write_text("[[0], [0]]")
    expected = r"2 entries for 2 images .*, expected one for each of ILSVRC2012_val_00000001"
    with pytest.raises(ValueError, match=expected):
        read_real(str(tmp_path / "real.json"), data, 1)


# ---------------------------------------------------------------- ImageNet-C


def make_corruptions(root, files):
    """Write ImageNet-C's folders. files(corruption, severity): the names, in n02 and n03."""
    for name in ALEXNET:
        for severity in range(1, 6):
            for folder in ("n02", "n03"):
                (root / name / str(severity) / folder).mkdir(parents=True)
            make_folder(root, [f"{name}/{severity}/{file}" for file in files(name, severity)])
    return str(root)


@pytest.mark.evaluator
def test_corruptions_by_hand(always, tmp_path, monkeypatch, capsys):
    """Errors per corruption and severity, mean error and mCE of a model that is right on n02 only,
    of 10 images."""
    # At severity s there are 2s - 1 images of n03 and the rest of n02: errors 10, 30, 50, 70, 90,
    # mean 50. Fog has one: 10.
    # Mean error: (14 * 50 + 10) / 15 = 47.33. Of the CE, 0.50 / AlexNet's error, brightness's is 50
    # / 0.564592 = 88.56.
    root = make_corruptions(tmp_path / "c", lambda name, s: [
        f"n03/{i}.png" if i < (1 if name == "fog" else 2 * s - 1) else f"n02/{i}.png"
        for i in range(10)])
    # one of four extra sets, which do not count
    (tmp_path / "c" / "speckle_noise" / "1" / "n02").mkdir(parents=True)
    [row] = run(monkeypatch, tmp_path, always, "--data", root)
    result = row["data"][root]
    table = result["corruptions"]
    assert table["brightness"] == pytest.approx([10, 30, 50, 70, 90, 50, 88.5595], abs=1e-3)
    assert table["fog"][:6] == pytest.approx([10] * 6) and len(table) == 15
    assert result["mean_error"] == pytest.approx(142 / 3)
    mce = sum((10 if name == "fog" else 50) / ALEXNET[name] for name in ALEXNET) / 15
    assert result["mce"] == pytest.approx(mce) and mce > 60
    assert result["parts"]["snow/2"]["correct1"] == 7 and len(result["parts"]) == 75
    out = capsys.readouterr().out
    assert "mean error 47.33 %" in out and f"mCE {mce:.2f} %" in out
    [line] = [line for line in out.splitlines() if line.startswith("brightness")]
    assert line.split()[1:] == "10.00 30.00 50.00 70.00 90.00 50.00 88.56".split()


@pytest.mark.evaluator
def test_the_mce_of_alexnet_is_100():
    """With AlexNet's own errors every CE and mCE is 100, and the mean error is 78.90."""
    # The sum of the 15 constants is 11.834896, and 11.834896 / 15 = 0.788993.
    results = {}
    for part in evaluation.PARTS:
        results[part] = dict(top1=100 - 100 * ALEXNET[part[:-2]])
    errors = corruption_errors(results)
    assert errors["mce"] == pytest.approx(100)
    assert errors["mean_error"] == pytest.approx(78.8993, abs=1e-4)
    assert {round(row[6], 9) for row in errors["corruptions"].values()} == {100}
    assert len(ALEXNET) == 15


def prepared(checkpoint, spec):
    """Return {part: the data set as it is scored} of a spec."""
    args = evaluation.parse_args([checkpoint, "--data", spec])
    _, _, matched = evaluation.prepare(checkpoint, args)
    return {part: found for (_, part), found in matched.items()}


@pytest.mark.evaluator
def test_corrupted_images_are_cropped_only(tmp_path, always):
    """Of ImageNet-C the model sees the centre, while other sets are resized first."""
    pixels = torch.randint(0, 256, (3, 40, 44), dtype=torch.uint8)
    root = make_corruptions(tmp_path / "c", lambda name, severity: ["n02/0.png"])
    v2.functional.to_pil_image(pixels).save(tmp_path / "c" / "fog" / "1" / "n02" / "0.png")
    centre = pixels[:, 4:36, 6:38]  # (40 - 32) / 2 = 4, (44 - 32) / 2 = 6
    cropped = prepared(always, root)["fog/1"]
    assert torch.equal(cropped[0][0], centre)
    resized = prepared(always, os.path.join(root, "fog", "1"))[""]
    assert not torch.equal(resized[0][0], centre), "crop ratio 0.5: the short side becomes 64"


@pytest.mark.evaluator
def test_small_corrupted_images_are_refused(tmp_path, always):
    """A centre crop that is larger than the image would be filled up with black: an error."""
    root = make_corruptions(tmp_path / "c", lambda name, severity: ["n02/0.png"])
    Image.new("RGB", (40, 31)).save(tmp_path / "c" / "snow" / "4" / "n02" / "0.png")
    expected = "only cropped, but snow/4 has less than 32 pixels"
    with pytest.raises(ValueError, match=expected):
        prepared(always, root)


@pytest.mark.evaluator
@pytest.mark.parametrize("missing, expected", [
    (["fog/3"], r"1 of 75 folders are missing \(fog/3, "),
    ([f"snow/{s}" for s in range(1, 6)],
     r"5 of 75 folders are missing \(snow/1"),
])
def test_a_missing_severity_or_corruption(tmp_path, missing, expected):
    """If one of the 15 x 5 folders is missing, the message names it."""
    for part in set(evaluation.PARTS) - set(missing):
        (tmp_path / part / "n00").mkdir(parents=True)
    with pytest.raises(ValueError, match=expected):
        open_parts(str(tmp_path), "all")


@pytest.mark.evaluator
def test_corruptions_have_the_same_classes(tmp_path):
    """A corruption without one of the classes would be easier, and is an error."""
    root = make_corruptions(tmp_path / "c", lambda name, severity: ["n02/0.png", "n03/0.png"])
    shutil.rmtree(tmp_path / "c" / "frost" / "2" / "n03")
    with pytest.raises(ValueError, match="frost/2 has not the same class folders as fog/1"):
        open_parts(root, "all")


@pytest.mark.evaluator
def test_a_class_called_fog(tmp_path):
    """A data set of the weather, with classes fog and snow, has not the shape of ImageNet-C."""
    root = make_folder(tmp_path, ["fog/1.png", "snow/2.png"])
    parts = open_parts(root, "all")
    assert list(parts) == [""] and parts[""].classes == ["fog", "snow"]


# ---------------------------------------------------------------- shapes that training never shows


@pytest.mark.shapes
@pytest.mark.parametrize("name", ["shapes", "flags"])
def test_shifted_pictures_by_hand(name):
    """Blur: the rounded mean of the 3 x 3 around a value, beyond the border too. Noise: up to 80
    either way. Both have the labels of the plain pictures, and are the same each time."""
    plain, blurred, noisy = (open_dataset(name + shift, "val") for shift in ("", "-blur", "-noise"))
    x = plain.images.int()
    for row, column in [(0, 0), (0, 31), (31, 5), (10, 10), (20, 7)]:
        rows = [min(max(row + d, 0), 31) for d in (-1, 0, 1)]
        columns = [min(max(column + d, 0), 31) for d in (-1, 0, 1)]
        total = sum(x[:, :, r, c] for r in rows for c in columns)
        # floor(total / 9 + 1/2)
        assert torch.equal(blurred.images[:, :, row, column].int(), (2 * total + 9) // 18)
    change = noisy.images.int() - x
    free = (plain.images >= 80) & (plain.images <= 175)  # nothing is cut off here
    # uniform on -80 .. 80: mean 0, deviation sqrt((161^2 - 1) / 12) = 46.5
    assert abs(change[free].double().mean()) < 2 and abs(change[free].double().std() - 46.5) < 1
    assert torch.equal(open_dataset(name + "-noise", "val").images, noisy.images)
    assert torch.equal(noisy.labels, plain.labels) and torch.equal(blurred.labels, plain.labels)


# ---------------------------------------------------------------- what a router may do otherwise


def sparse_model():
    """A random sparse model, 2 of 4 experts in one layer, with a router that has opinions."""
    model = build_model(CONFIG).eval()
    nn.init.normal_(model.blocks[1].mlp.router.codes)
    return model


@pytest.mark.evaluator
def test_another_k():
    """With --k 1 the model computes what one built with k = 1 and its weights does."""
    model, single = sparse_model(), build_model(CONFIG | dict(k=1)).eval()
    single.load_state_dict(model.state_dict())
    images = torch.rand(3, 3, 32, 32)
    assert not torch.allclose(model(images), single(images))
    assert change_routing(model, k=1) == ["k = 1 instead of 2"]
    assert_close(model(images), single(images))
    assert change_routing(sparse_model(), k=2) == [], "that is no change"


@pytest.mark.evaluator
def test_a_limited_capacity():
    """With a capacity factor an expert takes no more than ceil(T K factor / E) choices."""
    # 2 images of 17 tokens, T = 34: ceil(34 * 2 * 0.25 / 4) = ceil(4.25) = 5 slots for each of 4
    # experts
    model = sparse_model()
    [note] = change_routing(model, capacity_factor=0.25)
    assert note == "capacity factor 0.25: a prediction depends on its batch"
    _, [routing] = model(torch.rand(2, 3, 32, 32), return_routing=True)
    taken = [int((routing.kept & (routing.experts == e)).sum()) for e in range(4)]
    asked = [int((routing.experts == e).sum()) for e in range(4)]
    assert taken == [min(5, n) for n in asked] and max(asked) > 5


@pytest.mark.evaluator
def test_a_dropped_expert():
    """Nobody chooses a dropped expert: the softmax is over the others."""
    model, images = sparse_model(), torch.rand(2, 3, 32, 32)
    _, [before] = model(images, return_routing=True)
    assert (before.experts == 2).any()
    notes = change_routing(model, drop_experts=[(0, 2)])
    assert notes == ["expert 2 of MoE layer 0, block 1: not chosen"]
    _, [after] = model(images, return_routing=True)
    assert not (after.experts == 2).any()
    others = before.probs[:, [0, 1, 3]]
    assert_close(after.probs[:, [0, 1, 3]], others / others.sum(1, keepdim=True))
    assert (after.probs[:, 2] == 0).all() and after.gates.isfinite().all()


@pytest.mark.evaluator
@pytest.mark.parametrize("changes, expected", [
    (dict(k=5),
     "--k 5: a MoE layer has 4 experts to choose from"),
    (dict(drop_experts=[(0, 0), (0, 1), (0, 3)]),
     "--k 2: a MoE layer has 1 experts"),
    (dict(drop_experts=[(1, 0)]), "--drop-expert 1:0: expected 0:0 to 0:3"),
    (dict(drop_experts=[(0, 4)]), "--drop-expert 0:4: expected 0:0 to 0:3"),
    (dict(drop_experts=[(0, -1)]), "--drop-expert 0:-1: expected"),
])
def test_an_impossible_routing(changes, expected):
    """An impossible routing is an error that says what is possible."""
    with pytest.raises(ValueError, match=expected):
        change_routing(sparse_model(), **changes)


@pytest.mark.evaluator
def test_a_dense_model_has_nothing_to_change():
    """A dense model cannot be evaluated with another k."""
    with pytest.raises(ValueError, match="not for a dense one"):
        change_routing(build_model(CONFIG | dict(moe_layers="none")), k=1)


@pytest.mark.evaluator
def test_the_command_says_that_it_deviates(always, tmp_path, monkeypatch, capsys):
    """Each change of the routing is printed, counted in the costs, and in the JSON."""
    data = make_folder(tmp_path / "data", ["n02/0.png", "n03/0.png"])
    [usual] = run(monkeypatch, tmp_path, always, "--data", data)
    assert "deviates" not in capsys.readouterr().out and usual["deviations"] == []
    changes = ["--k", 1, "--capacity-factor", 1.5, "--drop-expert", "0:3"]
    [row] = run(monkeypatch, tmp_path, always, "--data", data, *changes)
    out = capsys.readouterr().out
    assert out.count("  deviates from training: ") == 3
    assert "deviates from training: k = 1 instead of 2\n" in out
    assert len(row["deviations"]) == 3
    # one of two experts per token less: 2 matrices of 16 x 64 and biases 64 + 16; 17 tokens per
    # image
    assert usual["active"] - row["active"] == 2 * 16 * 64 + 64 + 16
    assert usual["multiply_adds"] - row["multiply_adds"] == 17 * 2 * 16 * 64


# ---------------------------------------------------------------- mistakes, and own pictures


def make_noise(root, files):
    """Write images of 32 x 32 random pixels, and return {file: pixels (3, 32, 32)}."""
    made = {}
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        made[str(root / name)] = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
        v2.functional.to_pil_image(made[str(root / name)]).save(root / name)
    return made


@pytest.fixture
def opinions(tmp_path):
    """Return a random model and its checkpoint, which sees images of 32 x 32 pixels as they are."""
    model = sparse_model()
    nn.init.normal_(model.head.weight)
    path = write_checkpoint(tmp_path / "opinions.pt", model, crop_ratio=1.0)
    return model, path


@pytest.mark.evaluator
def test_mistakes_are_printed_and_written(always, tmp_path, monkeypatch, capsys):
    """The model always says n02. Of a data set without a mistake nothing is printed."""
    wrong = make_folder(tmp_path / "wrong", ["n02/0.png", "n03/1.png"])
    [row] = run(monkeypatch, tmp_path, always, "--data", wrong)
    out = capsys.readouterr().out
    assert f"  {wrong}, lowest top-1: n03 0.0 %, n02 100.0 %\n" in out
    assert f"  {wrong}, most frequent mistakes: n03 -> n02 (1)\n" in out
    assert row["data"][wrong]["confusions"] == [["n03", "n02", 1]]
    assert row["data"][wrong]["per_class"]["n02"] == dict(top1=100.0, images=1)
    run(monkeypatch, tmp_path, always, "--data", make_folder(tmp_path / "right", ["n02/0.png"]))
    assert "lowest" not in capsys.readouterr().out


@pytest.mark.evaluator
def test_the_split_chooses_itself(always, tmp_path, monkeypatch):
    """Of a flat folder all images count, or the held-out fifth if the checkpoint was trained on it;
    --split goes before."""
    data = make_folder(tmp_path / "d", [f"n0{c}/{i}.png" for c in (2, 3) for i in range(10)])
    path = write_checkpoint(tmp_path / "own.pt", build_model(CONFIG), args=dict(data=data))
    for checkpoint, flags, images in ((always, (), 20), (path, (), 4),
                                      (path, ("--split", "all"), 20),
                                      (always, ("--split", "train"), 16)):
        [row] = run(monkeypatch, tmp_path, checkpoint, "--data", data, *flags)
        assert row["data"][data]["images"] == images


@pytest.mark.evaluator
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_own_pictures_against_a_loop(opinions, tmp_path, monkeypatch, capsys, loss):
    """Of each picture the five best of twelve classes, in % on its line, and in the JSON."""
    model, _ = opinions
    path = write_checkpoint(tmp_path / "o.pt", model, crop_ratio=1.0, args=dict(loss=loss))
    made = make_noise(tmp_path / "d", ["b.png", "c.png", "a.png"])
    [row] = run(monkeypatch, tmp_path, path, "--data", tmp_path / "d", "--batch-size", 2)
    *_, first, second, third = capsys.readouterr().out.splitlines()
    assert row["data"] == {}, "nothing to count"
    for line, found, file in zip((first, second, third), row["pictures"], sorted(made)):
        logits = model(made[file].unsqueeze(0) / 255)[0].tolist()
        total = sum(math.exp(logit) for logit in logits)
        best = sorted(range(12), key=lambda i: -logits[i])[:5]
        expected = [math.exp(logits[i]) / total for i in best]
        if loss == "sigmoid":
            expected = [1 / (1 + math.exp(-logits[i])) for i in best]
        assert found["file"] == file and found["classes"] == [CLASSES[i] for i in best]
        assert found["probabilities"] == pytest.approx(expected, rel=1e-4)
        cells = zip(found["classes"], found["probabilities"])
        texts = [f"{name} {100 * p:.1f} %" for name, p in cells]
        assert line == f"  {file}: {', '.join(texts)}"


@pytest.mark.evaluator
def test_one_picture_of_two_classes(tmp_path, monkeypatch, capsys):
    """With two classes both are printed, averaged weights (EMA) first, for --raw the raw ones."""
    config = CONFIG | dict(num_classes=2)
    model = build_model(config)
    nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([math.log(3), 0.0])  # 3/4 and 1/4
    ema = model.state_dict() | {"head.bias": torch.tensor([0.0, math.log(9)])}  # 1/10 and 9/10
    path = write_checkpoint(
        tmp_path / "two.pt", model, config=config, classes=["cat", "dog"], ema=ema)
    file = make_folder(tmp_path, ["x.png"]) + "/x.png"
    for flags, cells in (((), "dog 90.0 %, cat 10.0 %"), (("--raw",), "cat 75.0 %, dog 25.0 %"),
                         (("--k", 1), "dog 90.0 %, cat 10.0 %")):
        run(monkeypatch, tmp_path, path, "--data", file, *flags)
        out = capsys.readouterr().out
        assert out.splitlines()[-1] == f"  {file}: {cells}"
        assert f"  {file}: 1 picture(s) without a class\n" in out
        assert ("deviates from training: k = 1 instead of 2" in out) == ("--k" in flags)


@pytest.mark.evaluator
@pytest.mark.parametrize("names", [["a.png"], ["a.png", "b.png"]])
def test_an_unreadable_picture_is_a_line(always, tmp_path, monkeypatch, capsys, names):
    """It says so, the others are classified, the JSON is written, and the status is 1."""
    data = make_folder(tmp_path / "d", names)
    (tmp_path / "d" / "a.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, tmp_path, always, "--data", data)
    [row] = json.loads((tmp_path / "out.json").read_text())["results"]
    assert row["pictures"][0] == dict(file=f"{data}/a.png", classes=[], probabilities=[])
    assert [len(picture["classes"]) for picture in row["pictures"][1:]] == [5] * (len(names) - 1)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "a.png" in line]
    assert line == f"  {data}/a.png: cannot be read"


@pytest.mark.evaluator
def test_pictures_that_cannot_be_classified(always, tmp_path, monkeypatch):
    """ReaL labels are of other images; a model that computes nonsense has no probabilities."""
    file = make_folder(tmp_path, ["x.png"]) + "/x.png"
    with pytest.raises(ValueError, match="--real scores ImageNet's .* not pictures"):
        run(monkeypatch, tmp_path, always, "--data", file, "--real", "real.json")
    model = build_model(CONFIG)
    model.head.bias.data[3] = math.nan
    path = write_checkpoint(tmp_path / "nan.pt", model)
    with pytest.raises(ValueError, match="its logits on .*x.png are not finite"):
        run(monkeypatch, tmp_path, path, "--data", file)


@pytest.mark.evaluator
@pytest.mark.slow
@forked.needs_fork
def test_head_ends_the_output_in_silence(always, tmp_path):
    """`python eval.py ... | head -1` prints no traceback, and the JSON is written."""
    reader, writer = os.pipe()
    os.close(reader)
    file = make_folder(tmp_path, ["x.png"]) + "/x.png"
    arguments = [always, "--data", file, "--workers", "0", "--json", str(tmp_path / "out.json")]
    command = [sys.executable, str(ROOT / "eval.py"), *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out.json").exists()


# ---------------------------------------------------------------- speed, options, processes


@pytest.mark.evaluator
@pytest.mark.parametrize("flags, expected", [
    ("--data shapes-blur --real real.json", "--real scores one --data"),
    ("--json no/such/out.json", "--json no/such/out.json cannot be written"),
    ("--json /", "--json / cannot be written"),
])
def test_options_that_cannot_be(always, flags, expected):
    """An option that cannot be is found before anything is computed, in one line."""
    with pytest.raises(ValueError, match=expected):
        evaluation.main(evaluation.parse_args([always, "--data", "shapes", *flags.split()]))


@pytest.mark.evaluator
def test_a_model_that_computes_nonsense(tmp_path, monkeypatch):
    """Logits that are not numbers have no accuracy: topk would make one up."""
    model = build_model(CONFIG)
    model.head.bias.data[3] = math.nan
    path = write_checkpoint(tmp_path / "nan.pt", model)
    data = make_folder(tmp_path / "data", ["n02/0.png", "n03/1.png"])
    with pytest.raises(ValueError, match="nan.pt: its logits on .* are not finite"):
        run(monkeypatch, tmp_path, path, "--data", data)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.evaluator
@pytest.mark.slow
@forked.needs_fork
def test_two_processes_count_the_same(tmp_path):
    """Two processes count each of 23 images once, and only one of the two prints.

    Their confusions are summed, and the five pictures come in order.
    """
    model = sparse_model()
    nn.init.normal_(model.head.weight)
    checkpoint = write_checkpoint(tmp_path / "random.pt", model, crop_ratio=1.0)
    make_noise(tmp_path / "own", [f"{i}.png" for i in range(5)])
    draw = random.Random(1)
    for i in range(23):
        folder = tmp_path / "data" / draw.choice(CLASSES)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
        v2.functional.to_pil_image(pixels).save(folder / f"{i}.png")
    flags = ["--data", str(tmp_path / "data"), "--data", str(tmp_path / "own")]
    flags += ["--batch-size", "4", "--workers", "1", "--json"]
    for world in (1, 2):
        arguments = [checkpoint, *flags, str(tmp_path / f"{world}.json")]
        run = forked.start(
            forked.program, ROOT / "eval.py", arguments, tmp_path, world, world=world)
        assert forked.finish(run) == [0] * world, (tmp_path / f"{world}.err").read_text()
        assert (tmp_path / f"{world}.out").read_text().count("random.pt: vit_nano") == 1
    written = [json.loads((tmp_path / name).read_text()) for name in ("1.json", "2.json")]
    assert [result["processes"] for result in written] == [1, 2]
    rows = [result["results"][0]["data"][str(tmp_path / "data")] for result in written]
    assert rows[0].pop("loss") == pytest.approx(rows[1].pop("loss"), rel=1e-6)
    assert rows[0] == rows[1] and rows[0]["images"] == 23 and 0 < rows[0]["correct5"] < 23
    right = sum(found["top1"] * found["images"] / 100 for found in rows[0]["per_class"].values())
    wrong = sum(n for _, _, n in rows[0]["confusions"])
    assert round(right) + wrong == 23 and round(right) == rows[0]["correct1"]
    alone, together = [result["results"][0]["pictures"] for result in written]
    for i, (one, two) in enumerate(zip(alone, together, strict=True)):
        assert one["file"] == two["file"] == str(tmp_path / "own" / f"{i}.png")
        assert one["classes"] == two["classes"]
        assert one["probabilities"] == pytest.approx(two["probabilities"], rel=1e-5)
