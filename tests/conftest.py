"""What all tests share: each belongs to one concept of concepts.py, and is repeatable.

    python -m pytest -q             all that a student needs
    python -m pytest -q --slow -m slow
                                    what a maintainer needs besides (minutes): runs with several
                                    processes, do the tests notice mistakes (test_the_tests.py), do
                                    the README's commands run?

With -q a dot is ten tests that passed. The last lines of a run have one line per concept.
"""

import collections
import gc
import importlib.util
import itertools
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tensors are small: more threads only get in each other's way
gc.disable()  # until all is loaded, see pytest_collection_finish()

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from concepts import BY_NAME, CONCEPTS  # noqa: E402, after the path is set


def pytest_addoption(parser):
    text = "also run what starts processes or takes long: mutants, blanks, the README's commands"
    parser.addoption("--slow", action="store_true", help=text)


def pytest_configure(config):
    config.addinivalue_line(
        "filterwarnings", "ignore:The image decoding and encoding capabilities:DeprecationWarning"
    )
    config.addinivalue_line("markers", "slow: starts processes or takes long; runs with --slow")
    config.addinivalue_line("markers", "gpu: for a real GPU, from which other tests are kept away")
    for concept in CONCEPTS:
        config.addinivalue_line("markers", f"{concept.name}: {concept.lesson}")
    if importlib.util.find_spec("needs"):  # not in an assignment
        config.pluginmanager.register(importlib.import_module("needs"), "needs")


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


def concept_of(item):
    """Return the name of the concept that a test belongs to."""
    return next(mark.name for mark in item.iter_markers() if mark.name in BY_NAME)


@pytest.hookimpl(tryfirst=True)  # before -m and -k choose among them
def pytest_collection_modifyitems(items, config):
    """Sort the tests by concept, and count them. Without --slow leave out the slow ones."""
    for item in items:
        names = [mark.name for mark in item.iter_markers() if mark.name in BY_NAME]
        if len(names) != 1:
            raise pytest.UsageError(
                f"{item.nodeid} has the concepts {names}: expected exactly one of"
                f" tests/concepts.py, as in @pytest.mark.{CONCEPTS[0].name}"
            )
        item.user_properties.append(("concept", names[0]))  # for --junitxml
    if not config.getoption("slow"):
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    items.sort(key=lambda item: list(BY_NAME).index(concept_of(item)))
    totals.update(collections.Counter(concept_of(item) for item in items))


def pytest_collection_finish():
    """Let the garbage collector leave out all that is loaded by now: that is much, and it stays."""
    gc.freeze()
    gc.enable()


# ---------------------------------------------------------------- results: one line per concept

totals = {}  # {concept: number of tests, also of those that -m, -k or -x leave out}
results = {}  # {concept: {test: (passed, names of the concepts that were found unwritten)}}
passed_so_far = itertools.count(1)


def pytest_report_teststatus(report, config):
    """With -q, print one dot for ten tests that pass. All else is shown as pytest does."""
    if report.when == "call" and report.passed and config.get_verbosity() < 0:
        return "passed", "." if next(passed_so_far) % 10 == 0 else "", "PASSED"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Write down the result of a test, and shorten what is shown of one that failed."""
    if call.excinfo is not None:
        leave_out_libraries(call.excinfo.tb)
    report = yield
    name = concept_of(item)
    tests = results.setdefault(name, {})
    if report.skipped:
        totals[name] -= 1
    elif report.failed:
        tests[item.nodeid] = False, unwritten_concepts(report, str(call.excinfo.value))
        report.sections[:] = [(title, last_lines(text)) for title, text in report.sections
                              if "Captured log" not in title]  # we have none: it is a compiler's
    elif report.when == "call":
        tests[item.nodeid] = True, set()
    return report


def unwritten_concepts(report, message):
    """Return the concepts of which a failed test met an unwritten function, a set of names.

    message: of its error. The processes that it started may have printed theirs.
    """
    printed = "\n".join(text for _, text in report.sections)
    messages = [message, *re.findall("NotImplementedError: .*", printed)]
    return set(re.findall(r"(\w+): write \w", "\n".join(messages))) & set(BY_NAME)


def leave_out_libraries(traceback):
    """Unlink the calls inside libraries from a traceback: torch.compile has 150 lines of them."""
    while traceback.tb_next:
        if "site-packages" in traceback.tb_next.tb_frame.f_code.co_filename:
            traceback.tb_next = traceback.tb_next.tb_next
        else:
            traceback = traceback.tb_next


def last_lines(text, count=20):
    """Return the end of a text: a run in a process prints hundreds of lines."""
    lines = text.splitlines(keepends=True)
    left_out = [f"... {len(lines) - count} lines\n"] if len(lines) > count else []
    return "".join(left_out + lines[-count:])


def state_of(concept, all_collected=True):
    """Return (passed tests of those that ran, state) of a concept, in words.

    The state is "not written yet" or "waits for" others if a test met an unwritten function.
    Otherwise, where all tests of the concept ran, it is "done" or "BROKEN"; else "so far".
    all_collected: whether pytest has looked at all files, so that we know of all tests.
    """
    outcomes = results[concept].values()
    passed = sum(passed for passed, _ in outcomes)
    unwritten = set().union(*(names for _, names in outcomes))
    wrong = any(not passed and not names for passed, names in outcomes)
    count = f"{passed}/{len(outcomes)}"
    complete = all_collected and len(outcomes) == totals[concept]
    if len(outcomes) < totals[concept]:
        count += f" passed, {totals[concept]} in all"
    if wrong:
        return count, "BROKEN" if complete else "so far"
    if concept in unwritten:
        return count, "not written yet"
    if unwritten:
        names = [name for name in BY_NAME if name in unwritten]
        return count, f"waits for {', '.join(names[:2])}" + (", ..." if len(names) > 2 else "")
    return count, "done" if complete else "so far"


def pytest_unconfigure(config):
    """Print the last lines: passed/run, state and lesson of every concept that was tested."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    shown = [concept for concept in CONCEPTS if results.get(concept.name)]
    if terminal is None or not shown:
        return
    folders = [Path(arg).resolve() for arg in config.args]
    all_collected = set(folders) <= {ROOT, ROOT / "tests"} and not config.getoption("lf", False)
    states = [state_of(concept.name, all_collected) for concept in shown]
    counts_width = max(len(count) for count, _ in states)
    states_width = max(len(state) for _, state in states)
    width = shutil.get_terminal_size((160, 24)).columns
    for concept, (count, state) in zip(shown, states):
        line = f"{concept.name:<13} {count:>{counts_width}}  {state:<{states_width}}  "
        line += concept.lesson
        terminal.write_line(line if len(line) <= width else line[:width - 3] + "...")
