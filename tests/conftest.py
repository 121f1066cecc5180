"""What all tests share. concepts.py says what is where in this folder: start there.

    python -m pytest -q                    all that a student needs
    python -m pytest -q --slow -m slow     what a maintainer needs besides (minutes): runs with
                                           several processes, and the tests of the tests

With -q a dot is ten tests that passed. The last lines of a run have one line per concept.
"""

import collections
import gc
import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

torch.set_num_threads(1)  # the tensors are small: more threads only get in each other's way
gc.disable()  # until all is loaded, see pytest_collection_finish()

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from concepts import BY_NAME, CONCEPTS  # noqa: E402, after the path is set

MARKERS = """
slow: starts processes or takes long; runs with --slow
gpu: for a real GPU, from which other tests are kept away
edge: a device, a loop over tokens, no tokens at all, NaN: graded apart from the numbers
"""


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--results", metavar="FILE", help="append a line of JSON per test to FILE")


def pytest_configure(config):
    config.addinivalue_line(
        "filterwarnings", "ignore:The image decoding and encoding capabilities:DeprecationWarning")
    for line in MARKERS.strip().splitlines():
        config.addinivalue_line("markers", line)
    for concept in CONCEPTS:
        config.addinivalue_line("markers", f"{concept.name}: {concept.lesson}")


@pytest.fixture(autouse=True)
def same_draws_every_time():
    """Start each test from the same seed, whatever ran before it."""
    # torch.manual_seed() would also write down a stack trace, which takes 3 ms
    torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def no_gpu(request, monkeypatch):
    """Hide the GPU from our programs: the numbers are the same on every machine."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# ---------------------------------------------------------------- tests in the order of concepts

def concepts_of(item):
    """Return the names of the concepts that a test is marked with. It should be one."""
    return [mark.name for mark in item.iter_markers() if mark.name in BY_NAME]


def place_of(item):
    """Return what tests are sorted by: their concept's place, then numbers before edges."""
    [name] = concepts_of(item)
    return list(BY_NAME).index(name), item.get_closest_marker("edge") is not None


@pytest.hookimpl(tryfirst=True)  # before -m and -k choose among them
def pytest_collection_modifyitems(items, config):
    """Sort the tests by concept, and count them. Without --slow leave out the slow ones."""
    for item in items:
        names = concepts_of(item)
        if len(names) != 1:
            raise pytest.UsageError(
                f"{item.nodeid} has the concepts {names}: expected exactly one of"
                f" tests/concepts.py, as in @pytest.mark.{CONCEPTS[0].name}")
    if not config.getoption("slow"):
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    items.sort(key=place_of)
    totals.update(collections.Counter(concepts_of(item)[0] for item in items))


def pytest_collection_finish():
    """Let the garbage collector leave out all that is loaded by now: that is much, and it stays."""
    gc.freeze()
    gc.enable()


# ---------------------------------------------------------------- results: one line per concept

class Result(NamedTuple):
    concept: str
    edge: bool  # whether the test is marked so
    passed: bool
    unwritten: list  # names of the concepts of which it met an unwritten function
    message: str  # of the error that it failed with


totals = {}  # {concept: number of tests, also of those that -m, -k or -x leave out}
results = {}  # {test: Result}
passed_so_far = itertools.count(1)


def pytest_report_teststatus(report, config):
    """With -q, print one dot for ten tests that pass. All else is shown as pytest does."""
    if report.when == "call" and report.passed and config.get_verbosity() < 0:
        return "passed", "." if next(passed_so_far) % 10 == 0 else "", "PASSED"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Write down the result of a test that passed or failed."""
    report = yield
    [concept] = concepts_of(item)
    if report.skipped:
        totals[concept] -= 1
    elif report.failed or report.when == "call":
        message = call.excinfo.exconly() if report.failed else ""
        printed = [text for _, text in report.sections]  # processes print their errors
        found = re.findall(r"(\w+): write \w", "\n".join([message, *printed]))
        unwritten = sorted(set(found) & set(BY_NAME)) if report.failed else []
        edge = item.get_closest_marker("edge") is not None
        results[item.nodeid] = Result(concept, edge, report.passed, unwritten, message)
        if file := item.config.getoption("results"):
            with open(file, "a", encoding="utf-8") as lines:
                line = {"test": item.nodeid, **results[item.nodeid]._asdict()}
                lines.write(json.dumps(line) + "\n")
    return report


def state_of(concept, whole_suite=True):
    """Return ("passed/run", state) of a concept.

    A test that failed at an unwritten function says nothing else. "so far": all that ran passed,
    but some tests did not run, or are in files that pytest was not given.
    """
    found = [result for result in results.values() if result.concept == concept]
    failed = [result for result in found if not result.passed]
    count = f"{len(found) - len(failed)}/{len(found)}"
    if len(found) < totals[concept]:
        count += f" of {totals[concept]}"
    unwritten = [name for name in BY_NAME if any(name in each.unwritten for each in failed)]
    if any(not (result.unwritten or result.edge) for result in failed):
        return count, "BROKEN"
    if concept in unwritten:
        return count, "not written yet"
    if unwritten:
        return count, f"waits for {', '.join(unwritten[:2])}" + ", ..." * (len(unwritten) > 2)
    if failed:
        return count, "edges left"
    complete = whole_suite and len(found) == totals[concept]
    return count, "done" if complete else "so far"


def pytest_unconfigure(config):
    """Print the last lines: passed/run, state and lesson of every concept that was tested."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    tested = {result.concept for result in results.values()}
    if terminal is None or not tested:
        return
    folders = {Path(arg).resolve() for arg in config.args}
    whole_suite = folders <= {ROOT, ROOT / "tests"} and not config.getoption("lf", False)
    states = {concept: state_of(concept.name, whole_suite)
              for concept in CONCEPTS if concept.name in tested}
    states_width = max(len(state) for _, state in states.values())
    width = shutil.get_terminal_size((160, 24)).columns
    for concept, (count, state) in states.items():
        line = f"{concept.name:<13} {count:>7}  {state:<{states_width}}  {concept.lesson}"
        terminal.write_line(line if len(line) <= width else line[:width - 3] + "...")
