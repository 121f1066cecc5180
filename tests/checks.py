"""Checks that several test files share."""

import contextlib
import re
from unittest import mock

import torch
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
    assert counts[0] == counts[1], (
        f"{counts[0]} operations for 10 tokens, {counts[1]} for 40: a Python loop over tokens?"
    )


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
