"""What all tests share: each belongs to one concept of concepts.py, and is repeatable.

The last lines of a run have one line per concept.
"""

import collections
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tensors are small: more threads only get in each other's way

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from concepts import BY_NAME, CONCEPTS  # noqa: E402, after the path is set

try:
    import needs
    needs.watch_all()
except ModuleNotFoundError as error:
    if error.name != "needs":
        raise
    needs = None  # in an assignment


@pytest.fixture(autouse=True)
def same_draws_every_time():
    """Each test starts from the same seed, whatever ran before it."""
    # torch.manual_seed() would also write down a stack trace, which takes 3 ms
    torch.default_generator.manual_seed(0)


# ---------------------------------------------------------------- tests in the order of concepts


def pytest_configure(config):
    config.addinivalue_line(
        "filterwarnings", "ignore:The image decoding and encoding capabilities:DeprecationWarning"
    )
    config.addinivalue_line("markers", "slow: starts processes of its own; skip with -m 'not slow'")
    for concept in CONCEPTS:
        config.addinivalue_line("markers", f"{concept.name}: {concept.lesson}")


def concept_of(item):
    return next(mark.name for mark in item.iter_markers() if mark.name in BY_NAME)


@pytest.hookimpl(tryfirst=True)  # before -m and -k choose among them
def pytest_collection_modifyitems(items):
    for item in items:
        names = [mark.name for mark in item.iter_markers() if mark.name in BY_NAME]
        if len(names) != 1:
            raise pytest.UsageError(
                f"{item.nodeid} has the concepts {names}: expected exactly one of"
                f" tests/concepts.py, as in @pytest.mark.{CONCEPTS[0].name}"
            )
        item.user_properties.append(("concept", names[0]))  # for --junitxml
    items.sort(key=lambda item: list(BY_NAME).index(concept_of(item)))
    totals.update(collections.Counter(concept_of(item) for item in items))


def pytest_collection_finish(session):
    """Call begin_session() of the test files that have one.

    They start work in other processes, while the first tests keep only one processor busy.
    """
    for module in dict.fromkeys(
        item.module for item in session.items if not session.config.option.collectonly
    ):
        getattr(module, "begin_session", lambda session: None)(session)


# ---------------------------------------------------------------- results: one line per concept

totals = {}  # {concept: number of tests, also of those that -m, -k or -x leave out}
results = {}  # {concept: {test: (passed, names of the concepts that were found unwritten)}}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if needs:
        needs.called.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if needs:
        needs.check(concept_of(item), slow=item.get_closest_marker("slow") is not None)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    tests = results.setdefault(concept_of(item), {})
    if report.skipped:
        totals[concept_of(item)] -= 1
    elif report.failed:
        told = [
            str(call.excinfo.value),
            *re.findall("NotImplementedError: .*", "\n".join(text for _, text in report.sections)),
        ]
        unwritten = {
            name for name in re.findall(r"(\w+): write \w", "\n".join(told)) if name in BY_NAME
        }
        tests[item.nodeid] = False, unwritten
    elif report.when == "call":
        tests[item.nodeid] = True, set()
    return report


def state_of(concept):
    """Return the state of a concept, in words.

    "done" or, if not all tests were run, "so far"; "not written yet"; "waits for" others; "BROKEN"
    if a test failed that met no unwritten function.
    """
    outcomes = results[concept].values()
    missing = set().union(*(unwritten for _, unwritten in outcomes))
    if any(not passed and not unwritten for passed, unwritten in outcomes):
        return "BROKEN"
    if concept in missing:
        return "not written yet"
    if missing:
        names = [name for name in BY_NAME if name in missing]
        return f"waits for {', '.join(names[:2])}" + (", ..." if len(names) > 2 else "")
    return "done" if len(outcomes) == totals[concept] else "so far"


def pytest_unconfigure(config):
    """Print the last lines: passed/total, state and lesson of every concept that was tested."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    shown = [concept for concept in CONCEPTS if results.get(concept.name)]
    states = [state_of(concept.name) for concept in shown]
    width = shutil.get_terminal_size((160, 24)).columns
    for concept, state in zip(shown if terminal else [], states):
        passed = sum(passed for passed, _ in results[concept.name].values())
        count = f"{passed}/{totals[concept.name]}"
        line = f"{concept.name:<12}{count:>8}  {state:<{max(map(len, states))}}  {concept.lesson}"
        terminal.write_line(line if len(line) <= width else line[:width - 3] + "...")
