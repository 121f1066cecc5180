"""Run the tests of one concept and report each result to grade.py, which starts this file:

    python tests/referee.py CONCEPT moe.function ...

The code under test is a stranger's. It may end the process, change pytest, or make every assertion
succeed. So no exit status and no printed line counts, only reports that carry a secret. And the
tests run once more with SPOILED answers: what the graded functions return is changed behind their
back. A test that passes even then does not test any more. A spoiled run is the last one: it finds
what an earlier run has left behind. By chance there is another one before.

The secret and the order of the runs come by stdin. They stay in local variables: a global one would
be a line of code away from a stranger.
"""

import functools
import importlib
import json
import os
import sys
import types
from pathlib import Path

import pytest


def spoil(value):
    """Return a wrong answer like `value`: other numbers, other gradients, the same types.

    A tensor is known by its dtype: this file does not import torch, which takes seconds.
    """
    if isinstance(value, bool):
        return not value
    if str(getattr(value, "dtype", "")) == "torch.bool":
        return ~value
    if isinstance(value, (int, float)) or hasattr(value, "dtype"):
        return 2 * value + 1
    if hasattr(value, "_fields"):  # a named tuple, such as a Routing
        return type(value)(*map(spoil, value))
    if type(value) in (tuple, list):
        return type(value)(map(spoil, value))
    if type(value).__module__ == "torch.return_types":  # of topk() and sort()
        return tuple(map(spoil, value))
    raise AssertionError("a spoiled answer")


def watch(name, is_spoiled):
    """Replace a function, as "file.function" or "file.Class.method", by one that may be spoiled.

    Only calls from outside are spoiled, not those among the watched functions. So it does not
    matter which of them call each other. Call it before the tests import the function.
    """
    file, *path = name.split(".")
    owner = importlib.import_module(file)
    for part in path[:-1]:
        owner = getattr(owner, part)
    function = getattr(owner, path[-1])

    @functools.wraps(function)
    def call(*args, **kwargs):
        is_spoiled.depth += 1
        try:
            answer = function(*args, **kwargs)
        finally:
            is_spoiled.depth -= 1
        changes = is_spoiled.now and is_spoiled.depth == 0 and path[-1] != "__init__"
        return spoil(answer) if changes else answer

    setattr(owner, path[-1], call)


class Spoiled:
    """Whether answers are spoiled now, and how many watched functions are being called."""

    now = False
    depth = 0


class Reporter:
    """A plugin of pytest that sends a line of JSON for each test."""

    def __init__(self, send, spoiled):
        self.send = send
        self.spoiled = spoiled
        self.messages = {}  # {test: why it did not pass}

    def pytest_runtest_logreport(self, report):
        test = report.nodeid
        if report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            self.messages[test] = getattr(crash, "message", report.outcome)
        if report.when == "teardown":
            self.send(test=test, spoiled=self.spoiled, passed=test not in self.messages,
                      message=self.messages.get(test, ""))


def main(concept, *functions):
    secret, *runs = sys.stdin.readline().split()
    channel = os.fdopen(os.dup(1), "w")  # whatever else is printed goes nowhere
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)

    def send(**report):
        print(json.dumps({"secret": secret, **report}), file=channel, flush=True)

    sys.modules["__main__"] = types.ModuleType("__main__")  # this file is not to be imported
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here.parent), str(here)]
    is_spoiled = Spoiled()
    for function in functions:
        watch(function, is_spoiled)
    for run in runs:
        spoiled = run == "spoiled"
        is_spoiled.now, is_spoiled.depth = spoiled, 0
        flags = ["-q", "--slow", "--tb=short", "-p", "no:cacheprovider", "-m", concept, str(here)]
        pytest.main(flags, plugins=[Reporter(send, spoiled)])


if __name__ == "__main__":
    main(*sys.argv[1:])
