"""What all tests share: small, repeatable, each belonging to one concept of concepts.py, and summed up by concept."""

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

pytest_plugins = "pytester"  # for the tests of this file

try:
    import needs
    needs.watch_all()
except ModuleNotFoundError:
    needs = None  # in an assignment


def compile_knows_grouped_mm():
    """Older releases (2.11) trace the kernel in bfloat16 only, and the tests compile in float32."""
    try:
        rows, weights = torch.empty(4, 16, device="meta"), torch.empty(2, 16, 16, device="meta")
        torch.nn.functional.grouped_mm(rows, weights, offs=torch.empty(2, dtype=torch.int32, device="meta"))
        return True
    except RuntimeError:
        return False


needs_compile = pytest.mark.skipif(not shutil.which("g++") or not compile_knows_grouped_mm(),
                                   reason="torch.compile in float32 on a CPU needs a C++ compiler and torch above 2.11")


@pytest.fixture(autouse=True)
def same_draws_every_time():
    """Each test starts from the same seed, whatever ran before it."""
    torch.manual_seed(0)


# ---------------------------------------------------------------- each test has one concept, and they come in its order


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:The image decoding and encoding capabilities:DeprecationWarning")
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
            raise pytest.UsageError(f"{item.nodeid} has the concepts {names}: expected exactly one of tests/concepts.py, "
                                    f"as in @pytest.mark.{CONCEPTS[0].name}")
        item.user_properties.append(("concept", names[0]))  # for --junitxml
    items.sort(key=lambda item: list(BY_NAME).index(concept_of(item)))


# ---------------------------------------------------------------- what came of it: one line per concept

results = {}  # {concept: [(passed, names of the concepts that were found unwritten), ...]}


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
    if report.failed or report.when == "call" and report.passed:
        told = "".join([str(call.excinfo.value) if report.failed else "", *(text for _, text in report.sections)])
        unwritten = {name for name in re.findall(r"(\w+): write \w", told) if name in BY_NAME}
        results.setdefault(concept_of(item), []).append((report.passed, unwritten if report.failed else set()))
    return report


def state_of(concept, outcomes):
    """done, not written yet, waits for others, or BROKEN: a test failed that met no unwritten function."""
    missing = set().union(*(unwritten for _, unwritten in outcomes))
    if any(not passed and not unwritten for passed, unwritten in outcomes):
        return "BROKEN"
    if concept in missing:
        return "not written yet"
    return f"waits for {', '.join(name for name in BY_NAME if name in missing)}" if missing else "done"


def pytest_unconfigure(config):
    """The last lines, after those of pytest: passed/total, state and lesson of every concept that was tested."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    shown = [(concept, results[concept.name]) for concept in CONCEPTS if concept.name in results]
    states = [state_of(concept.name, outcomes) for concept, outcomes in shown]
    for (concept, outcomes), state in zip(shown if terminal else [], states):
        count = f"{sum(passed for passed, _ in outcomes)}/{len(outcomes)}"
        terminal.write_line(f"{concept.name:<12}{count:>8}  {state:<{max(map(len, states))}}  {concept.lesson}")
