"""A plugin: each test calls its own concept, and no other that its concept does not need.

So every run also shows that the column `needs` of concepts.py lacks nothing: functions that a test
never calls cannot fail it, whatever a student has made of them. Slow tests call functions in other
processes, unseen. conftest.py loads this file; an assignment does not have it.
"""

import functools
import importlib

import pytest

from concepts import BY_NAME, CONCEPTS, all_needs

called = set()  # names of the concepts whose functions were called since the current test began


def pytest_configure():
    """Watch every function of the table, before a test file imports it by name."""
    for file in ("moe", "vit", "convnext", "eval", "train", "inspect_experts"):  # by their imports
        importlib.import_module(file)
        for concept in CONCEPTS:
            for function in concept.functions.split():
                if function.split(".")[0] == file:
                    watch(function, concept.name)


def watch(function, concept):
    """Replace a function, "file.name" or "file.Class.name", by one that writes down its concept."""
    file, *classes, name = function.split(".")
    owner = importlib.import_module(file)
    for part in classes:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*args, **kwargs):
        __tracebackhide__ = True  # a failing test shows the function itself
        called.add(concept)
        return original(*args, **kwargs)

    setattr(owner, name, call)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    called.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fail a test that has just passed if it called too little or too much."""
    result = yield
    concept = next(mark.name for mark in item.iter_markers() if mark.name in BY_NAME)
    if concept == "course":  # the tests of the tests
        return result
    if concept not in called and not item.get_closest_marker("slow"):
        pytest.fail(
            f"the test passes without calling a function of its concept, {concept}: does it belong"
            " to another?"
        )
    strangers = called - {concept} - all_needs(concept)
    if strangers:
        pytest.fail(
            f"a test of {concept} calls {', '.join(sorted(strangers))}: add to its needs in"
            " concepts.py, or test less"
        )
    return result
