"""Tests of the protocols of eval.py: classes, ReaL, ImageNet-C, shifts, routing, processes."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn as nn
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import v2

import eval as evaluation
import forked
from checks import drawn, make_folder, save_checkpoint
from eval import (
    ALEXNET, TensorImages, build_model, change_routing, choose_split,
    corruption_errors, eval_loader, eval_transform, match_classes, match_dataset, open_dataset,
    open_parts, read_real)

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent

CLASSES = [f"n{i:02}" for i in range(12)]  # of the checkpoint: n00, n01, ..., n11
CONFIG = dict(model="vit_nano", num_classes=12, depth=2, dim=16, moe_layers=[1], num_experts=4, k=2)
# how the model of `always` ranks the classes, whatever it sees
BEST_FIRST = [2, 10, 0, 7, 5, 1, 3, 4, 6, 8, 9, 11]


@pytest.fixture
def always(tmp_path):
    """Return a checkpoint with the same logits for every image: 12 for class 2, 11 for 10, ..."""
    model = build_model(CONFIG)
    nn.init.zeros_(model.head.weight)
    for logit, column in zip(range(12, 0, -1), BEST_FIRST):
        model.head.bias.data[column] = logit
    return save_checkpoint(tmp_path / "always.pt", CONFIG, CLASSES, model, crop_ratio=0.5)


def run(folder, *arguments):
    """`python eval.py <arguments>`; returns the results in its JSON file."""
    arguments = [*map(str, arguments), "--workers", "0", "--json", str(folder / "out.json")]
    evaluation.main(evaluation.parse_args(arguments))
    return json.loads((folder / "out.json").read_text())["results"]


# ---------------------------------------------------------------- whose class is which

NUMBERS = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, ...


@pytest.mark.classes
@pytest.mark.parametrize("names, classes, expected", [
    (["cat", "dog"], ["dog", "ant", "cat"], [2, 0]),  # by name
    (NUMBERS, CLASSES, [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]),  # names that are numbers
    (["000", "007", "011"], CLASSES, [0, 7, 11]),  # zeros change nothing
    (["10", "2"], NUMBERS, [2, 4])])  # the checkpoint's own classes are numbers: by name
def test_which_class_a_folder_is(names, classes, expected):
    """Each folder gets the position of its name, or a class that its name is the number of."""
    assert match_classes(names, classes) == expected, "the position among the sorted names?"


@pytest.mark.classes
@pytest.mark.parametrize("names, expected", [
    (["n01", "zebra", "n03"], ("1 of 3", "zebra")),
    (["cow", "zebra"], ("2 of 2", "cow, zebra")),
    (["0", "11", "12"], ("1 of 3", "12")),  # the classes are 0 to 11
    (["3", "n04"], ("1 of 2", "3"))])  # a number among names is none
def test_unknown_classes_are_named(names, expected):
    """A folder that the checkpoint has no class for is refused: it can be neither right nor wrong.

    The message gives examples of both.
    """
    with pytest.raises(ValueError) as error:
        match_classes(names, CLASSES)
    count, examples = expected
    assert str(error.value) == (f"{count} classes of the data are unknown to the checkpoint "
                                f"({examples}, ...; not n00, ...)")


@pytest.mark.classes
@pytest.mark.parametrize("names, columns, labels", [
    (["0", "1", "10", "11", "2"], [0, 1, 2, 10, 11], [0, 1, 3, 4, 2]),
    (["01", "1", "2"], [1, 2], [0, 0, 1])])  # two names of one class, which competes once
def test_labels_are_places_among_the_columns(names, columns, labels):
    """The columns are sorted, and an image of their i-th class has label i."""
    images = torch.zeros(len(names), 3, 1, 1, dtype=torch.uint8)
    data = TensorImages(images, torch.arange(len(names)), names)
    matched = match_dataset(data, CLASSES)
    assert matched.columns == columns and matched.labels.flatten().tolist() == labels
    assert matched.names == [CLASSES[column] for column in columns]
    assert data.labels.tolist() == list(range(len(names))), "the data set itself stays"


@pytest.mark.classes
def test_the_split_chooses_itself(tmp_path):
    """Of a flat folder all images count, or the held-out fifth if the checkpoint was trained on it.

    What is asked for goes before.
    """
    data = make_folder(tmp_path / "d", [f"n0{c}/{i}.png" for c in (2, 3) for i in range(10)])
    for trained_on, asked, images in (
            ("", None, 20), (f"{data}/", None, 4), (data, "all", 20), ("", "train", 16)):
        split, told = choose_split(data, trained_on, asked)
        assert len(open_dataset(data, split)) == images
        assert told == (", those held out from its training" if images == 4 else "")


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

# The files of three classes, whose order in the folders is not that of their numbers.
VALIDATION = [
    "n07/ILSVRC2012_val_00000001.png",
    "n00/ILSVRC2012_val_00000002.png",
    "n02/ILSVRC2012_val_00000003.png",
    "n00/ILSVRC2012_val_00000004_n00.png",
    "n02/ILSVRC2012_val_00000005.png"]


@pytest.mark.classes
def test_real_labels_belong_to_file_names(tmp_path):
    """Entry i of a ReaL file is for the image with number i + 1; an empty one skips it."""
    # The classes n00, n02, n07 are 0, 1, 2 of the file. The sorted files are images 2, 4, 3, 5, 1.
    (tmp_path / "real.json").write_text("[[1], [], [0, 2], [2, 1], [1]]")
    data = open_dataset(make_folder(tmp_path / "val5", VALIDATION), "all")
    matched = match_dataset(data, CLASSES, str(tmp_path / "real.json"))
    assert matched.labels.tolist() == [[-1, -1], [2, 1], [0, 2], [1, -1], [1, -1]]
    assert matched.indices == [1, 2, 3, 4]


@pytest.mark.evaluator
def test_images_without_a_real_label_do_not_count(always, tmp_path, capsys):
    """The model always says n02: label 1. Of images 1, 3, 4 and 5 all but 3 are right."""
    data = make_folder(tmp_path / "val5", VALIDATION)
    (tmp_path / "real.json").write_text("[[1], [], [0, 2], [2, 1], [1]]")
    [row] = run(tmp_path, always, "--data", data, "--real", tmp_path / "real.json")
    result = row["data"][data]
    assert (result["images"], result["correct1"], result["correct5"]) == (4, 3, 4)
    note = "4 images, 3 of 12 classes, logits restricted, those with ReaL labels from "
    assert f"; {note}{tmp_path / 'real.json'}\n" in capsys.readouterr().out


@pytest.mark.classes
@pytest.mark.parametrize("text, expected", [
    ("[[1], [], [0], [2]]", "expected for each of ILSVRC2012_val_00000001 to 00000005 a list"),
    ("[[1], [], [0], [2], [1], [1]]", "expected for each"),
    ("[[1], [], [0], [3], [1]]", "expected .* labels from 0 to 2"),
    ('[["n00"], [], [0], [2], [1]]', "expected .* labels from 0 to 2"),
    ("[[1.5], [], [0], [2], [1]]", "expected .* labels from 0 to 2"),
    ("[1, 2, 3, 4, 5]", ""),
    ("7", ""),
    ("[[1], ", "Expecting value"),
    (None, ".*No such file")])
def test_a_wrong_real_file(tmp_path, text, expected):
    """A ReaL file that does not fit is one line that says why."""
    data = open_dataset(make_folder(tmp_path / "val5", VALIDATION), "all")
    if text:
        (tmp_path / "real.json").write_text(text)
    with pytest.raises(ValueError, match=f"real.json does not fit: {expected}") as error:
        read_real(str(tmp_path / "real.json"), data, 3)
    assert "\n" not in str(error.value)


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
def test_corruptions_by_hand(always, tmp_path, capsys):
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
    [row] = run(tmp_path, always, "--data", root)
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
    [line] = [line for line in out.splitlines() if line.startswith("  brightness")]
    assert line.split()[1:] == "10.00 30.00 50.00 70.00 90.00 50.00 88.56".split()


@pytest.mark.evaluator
def test_the_mce_of_alexnet_is_100():
    """With AlexNet's own errors every CE and mCE is 100, and the mean error is 78.90."""
    # The sum of the 15 constants is 11.834896, and 11.834896 / 15 = 0.788993.
    results = {}
    for part in evaluation.PARTS:
        results[part] = dict(top1=100 - 100 * ALEXNET[part[:-2]], protocol="5 images")
    errors = corruption_errors(results)
    assert errors["mce"] == pytest.approx(100)
    assert errors["protocol"] == "75 parts, each 5 images"
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
def test_a_missing_severity_or_corruption(tmp_path):
    """If some of the 15 x 5 folders are missing, the message counts them and names the first."""
    for part in set(evaluation.PARTS) - {"snow/3", "snow/4"}:
        (tmp_path / part / "n00").mkdir(parents=True)
    with pytest.raises(ValueError, match="lacks 2 of ImageNet-C's folders: snow/3, "):
        open_parts(str(tmp_path), "all")


@pytest.mark.evaluator
def test_corruptions_have_the_same_classes(tmp_path):
    """A corruption without one of the classes would be easier, and is an error."""
    root = make_corruptions(tmp_path / "c", lambda name, severity: ["n02/0.png", "n03/0.png"])
    shutil.rmtree(tmp_path / "c" / "frost" / "2" / "n03")
    with pytest.raises(ValueError, match="frost/2 has not the same class folders as fog/1"):
        open_parts(root, "all")


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
@pytest.mark.parametrize("options, changes, expected", [
    ({}, dict(k=5), "--k 5: a MoE layer has 4 experts to choose from"),
    ({}, dict(drop_experts=[(0, 0), (0, 1), (0, 3)]), "--k 2: a MoE layer has 1 experts"),
    ({}, dict(drop_experts=[(1, 0)]), "--drop-expert 1 0: layers 1, experts 4"),
    ({}, dict(drop_experts=[(0, 4)]), "--drop-expert 0 4: layers 1, experts 4"),
    ({}, dict(drop_experts=[(0, -1)]), "--drop-expert 0 -1: layers 1, experts 4"),
    (dict(moe_layers="none"), dict(k=1), "tokens choose no experts here"),
    (dict(router="soft"), dict(capacity_factor=1.0), "tokens choose no experts here"),
    (dict(router="expert_choice"), dict(drop_experts=[(0, 1)]), "tokens choose no experts here")])
def test_an_impossible_routing(options, changes, expected):
    """An impossible routing is an error that says what is possible."""
    with pytest.raises(ValueError, match=expected):
        change_routing(build_model(CONFIG | options), **changes)


@pytest.mark.evaluator
def test_the_command_says_that_it_deviates(always, tmp_path, capsys):
    """Each change of the routing is printed, counted in the costs, and in the JSON."""
    data = make_folder(tmp_path / "data", ["n02/0.png", "n03/0.png"])
    [usual] = run(tmp_path, always, "--data", data)
    assert "deviates" not in capsys.readouterr().out and usual["deviations"] == []
    changes = ["--k", 1, "--capacity-factor", 1.5, "--drop-expert", 0, 3]
    [row] = run(tmp_path, always, "--data", data, *changes)
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


@pytest.mark.evaluator
def test_mistakes_are_printed_and_written(always, tmp_path, capsys):
    """The model always says n02. Of a data set without a mistake nothing is printed.

    The latter was trained on: one of its five images is held out.
    """
    wrong = make_folder(tmp_path / "wrong", ["n02/0.png", "n03/1.png"])
    [row] = run(tmp_path, always, "--data", wrong)
    out = capsys.readouterr().out
    assert "    lowest top-1: n03 0.0 %, n02 100.0 %\n" in out
    assert "    most frequent mistakes: n03 -> n02 (1)\n" in out
    assert row["data"][wrong]["confusions"] == [["n03", "n02", 1]]
    assert row["data"][wrong]["per_class"]["n02"] == dict(top1=100.0, images=1)
    right = make_folder(tmp_path / "right", [f"n02/{i}.png" for i in range(5)])
    torch.save(torch.load(always) | dict(args=dict(data=right)), always)
    note = "images, 1 of 12 classes, logits restricted"
    for flags, protocol in [((), f"1 {note}, those held out from its training"),
                            (("--split", "all"), f"5 {note}")]:
        [row] = run(tmp_path, always, "--data", right, *flags)
        assert row["data"][right]["protocol"] == protocol
    assert "lowest" not in capsys.readouterr().out


@pytest.mark.evaluator
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_own_pictures_against_a_loop(tmp_path, capsys, loss):
    """Of each picture the five best of twelve classes, in % on its line, and in the JSON."""
    model = sparse_model()
    nn.init.normal_(model.head.weight)
    path = save_checkpoint(tmp_path / "o.pt", CONFIG, CLASSES, model, args=dict(loss=loss))
    made = make_noise(tmp_path / "d", ["b.png", "c.png", "a.png"])
    [row] = run(tmp_path, path, "--data", tmp_path / "d", "--batch-size", 2)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert row["data"] == {}, "nothing to count"
    for line, found, file in zip(lines, row["pictures"], sorted(made), strict=True):
        logits = model(made[file].unsqueeze(0) / 255)[0].tolist()
        total = sum(math.exp(logit) for logit in logits)
        best = sorted(range(12), key=lambda i: -logits[i])[:5]
        expected = [math.exp(logits[i]) / total for i in best]
        if loss == "sigmoid":
            expected = [1 / (1 + math.exp(-logits[i])) for i in best]
        names, probs = zip(*found["best"])
        assert found["file"] == file and list(names) == [CLASSES[i] for i in best]
        assert probs == pytest.approx(expected, rel=1e-4)
        texts = [f"{name} {100 * p:.1f}%" for name, p in zip(names, probs)]
        assert line == f"  {file}: {', '.join(texts)}"


@pytest.mark.evaluator
@pytest.mark.parametrize("names", [["a.png"], ["a.png", "b.png"]])
def test_an_unreadable_picture_is_a_line(always, tmp_path, capsys, names):
    """It says so, the others are classified, the JSON is written, and the status is 1."""
    data = make_folder(tmp_path / "d", names)
    (tmp_path / "d" / "a.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="1"):
        run(tmp_path, always, "--data", data)
    [row] = json.loads((tmp_path / "out.json").read_text())["results"]
    assert row["pictures"][0] == dict(file=f"{data}/a.png", best=[])
    assert [len(picture["best"]) for picture in row["pictures"][1:]] == [5] * (len(names) - 1)
    assert f"  {data}/a.png: cannot be read\n" in capsys.readouterr().out


@pytest.mark.evaluator
@pytest.mark.parametrize("files", [["x.png"], ["n02/0.png", "n03/1.png"]])
def test_a_model_that_computes_nonsense(tmp_path, files):
    """Logits that are not numbers have no accuracy and no best classes: topk would make them up."""
    model = build_model(CONFIG)
    model.head.bias.data[3] = math.nan
    path = save_checkpoint(tmp_path / "nan.pt", CONFIG, CLASSES, model)
    data = make_folder(tmp_path / "data", files)
    with pytest.raises(ValueError, match="nan.pt: its logits on .*data are not finite"):
        run(tmp_path, path, "--data", data)
    assert not (tmp_path / "out.json").exists()


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
    ("--data shapes --data shapes-blur --real real.json", "--real scores one --data"),
    ("--data {folder} --real real.json", "--real scores ImageNet's .* not pictures without cl"),
    ("--data shapes --json no/such/out.json", "--json no/such/out.json cannot be written"),
    ("--data shapes --json /", "--json / cannot be written")])
def test_options_that_cannot_be(always, tmp_path, monkeypatch, flags, expected):
    """An option that cannot be is found before anything is computed, in one line."""
    flags = flags.format(folder=make_folder(tmp_path / "own", ["x.png"]))
    monkeypatch.delattr(evaluation, "predict")
    with pytest.raises(ValueError, match=expected):
        evaluation.main(evaluation.parse_args([always, *flags.split()]))


@pytest.mark.evaluator
def test_the_json_file_is_there_before_anything_is_printed(always, tmp_path, monkeypatch, capsys):
    """A result is safe when one sees it; if the disk is full, one sees it all the same."""
    file, seen = make_folder(tmp_path, ["x.png"]) + "/x.png", []
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "print_row", lambda row: seen.append(os.listdir(tmp_path)))
        run(tmp_path, always, "--data", file)
    assert "out.json" in seen[0]
    monkeypatch.setattr(Path, "write_text", mock.Mock(side_effect=OSError("No space left")))
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, always, "--data", file)
    assert f"  {file}: n02 " in capsys.readouterr().out


@pytest.mark.evaluator
@pytest.mark.slow
@forked.needs_fork
def test_two_processes_count_the_same(tmp_path):
    """Two processes have the results of one, to which each of 23 images and 5 pictures counts once.

    Only one of the two prints.
    """
    model, draw = sparse_model(), random.Random(1)
    nn.init.normal_(model.head.weight)
    checkpoint = save_checkpoint(tmp_path / "random.pt", CONFIG, CLASSES, model)
    make_noise(tmp_path / "own", [f"{i}.png" for i in range(5)])
    make_noise(tmp_path / "data", [f"{draw.choice(CLASSES)}/{i}.png" for i in range(23)])
    flags = ["--data", str(tmp_path / "data"), "--data", str(tmp_path / "own")]
    flags += ["--batch-size", "4", "--workers", "1", "--json"]
    for world in (1, 2):
        arguments = [checkpoint, *flags, str(tmp_path / f"{world}.json")]
        call = forked.program, ROOT / "eval.py", arguments, tmp_path, world
        run = forked.start(*call, world=world)
        assert forked.finish(run) == [0] * world, (tmp_path / f"{world}.err").read_text()
        assert (tmp_path / f"{world}.out").read_text().count("random.pt: vit_nano") == 1
    written = [json.loads((tmp_path / name).read_text()) for name in ("1.json", "2.json")]
    assert [result["processes"] for result in written] == [1, 2]
    rows = [result["results"][0]["data"][str(tmp_path / "data")] for result in written]
    assert rows[0].pop("loss") == pytest.approx(rows[1].pop("loss"), rel=1e-6)
    assert rows[0] == rows[1] and rows[0]["images"] == 23 and 0 < rows[0]["correct5"] < 23
    alone, together = [result["results"][0]["pictures"] for result in written]
    for i, (one, two) in enumerate(zip(alone, together, strict=True)):
        assert one["file"] == two["file"] == str(tmp_path / "own" / f"{i}.png")
        (names, probs), (names2, probs2) = zip(*one["best"]), zip(*two["best"])
        assert names == names2 and probs == pytest.approx(probs2, rel=1e-5)
