"""Checks that several test files share."""

import contextlib
import os
import re
from unittest import mock

import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

import eval as evaluation


def says(error, *words):
    """Assert that a message has these words and numbers, in any order.

    error: what `with pytest.raises(...) as error` gives.
    """
    for word in map(str, words):
        found = re.search(rf"(?<!\w)(?<!\d\.){re.escape(word)}(?!\w)", str(error.value))
        assert found, f"{word!r} is missing in the message: {error.value}"


@contextlib.contextmanager
def autocast_on_meta():
    """Let torch.autocast accept the device "meta", which it does not know. It does nothing."""
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled

    def accept(device_type, *args, **kwargs):
        known = device_type != "meta"
        return autocast(device_type, *args, **kwargs) if known else contextlib.nullcontext()

    def ask(device_type):
        return device_type != "meta" and is_enabled(device_type)

    with mock.patch.multiple(torch, autocast=accept, is_autocast_enabled=ask):
        yield


class Operations(TorchFunctionMode):
    """Count the calls of torch's functions in a `with` block."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def has_no_loop_over_tokens(function, inputs):
    """Assert that function(*inputs(T)) makes as many tensor operations for 40 tokens as for 10."""
    counts = []
    for T in (10, 40):
        arguments = inputs(T)
        with Operations() as operations:
            function(*arguments)
        counts.append(operations.count)
    assert counts[0] == counts[1], f"{counts} operations for 10, 40 tokens: a loop over them?"


def make_folder(root, files):
    """Write images of 36 x 32 pixels, file i of grey level i, and return the folder, a str."""
    for level, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (36, 32), (level, level, level)).save(root / name)
    return str(root)


def save_checkpoint(path, config, classes, model=None, /, **changes):
    """Save a checkpoint as train.py does, of an untrained model unless one is given: its path."""
    weights = (model or evaluation.build_model(config)).state_dict()
    checkpoint = dict(config=config, classes=classes, model=weights, ema=None, image_size=32)
    checkpoint |= dict(crop_ratio=1.0, mean=(0.0,) * 3, std=(1.0,) * 3, optimizer={}, args={})
    checkpoint |= dict(epoch=1, step=1, best=0.0)
    assert set(checkpoint) == evaluation.CHECKPOINT_KEYS
    torch.save(checkpoint | changes, path)
    return str(path)


class Burglar:
    """Unpickled the old way, it would create the folder it was given."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def same_runs(*folders):
    """Assert that two runs ended with the same bits: weights, averages, optimizer and log.

    But for training losses: after an interruption these count since then.
    """
    runs = [torch.load(f"{folder}/last.pt", weights_only=True) for folder in folders]
    for run in runs:
        run["optimizer"] = run["optimizer"]["state"]
    for part in ("model", "ema", "optimizer"):
        torch.testing.assert_close(*(run[part] for run in runs), rtol=0, atol=0)
    for line, other in zip(*(run["log"] for run in runs), strict=True):
        for name in ("epoch", "step", "lr", "val_loss", "top1", "ema_val_loss", "ema_top1"):
            assert line[name] == other[name], name


def drawn(name, count, split="train", transform=None):
    """The first `count` pictures of `shapes` or `flags`, of those to train on or to validate."""
    data = evaluation.open_dataset(f"{name}:{count}", split, transform)
    for part in ("images", "labels", "masks"):
        setattr(data, part, getattr(data, part)[:count])
    data.factors = {factor: values[:count] for factor, values in data.factors.items()}
    return data


def few_pictures(monkeypatch, train, val):
    """Let all drawn data sets have so many pictures, whatever is asked for."""
    original = evaluation.open_drawn

    def open_few(spec, split, transform=None):
        return original(f"{spec.partition(':')[0]}:{train}", split, transform)

    monkeypatch.setattr(evaluation, "VAL_IMAGES", val)
    monkeypatch.setattr(evaluation, "open_drawn", open_few)
