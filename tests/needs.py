"""Which concepts does a test really call? Its own, and no other that its concept does not need.

So each run of the tests also shows that nothing is missing in the column `needs` of concepts.py:
functions that a test never calls cannot fail it, whatever a student has made of them. (Slow tests
call functions in other processes, unseen.) conftest.py asks; in an assignment this file is missing,
and nobody asks.
"""

import functools
import importlib

import pytest

from concepts import CONCEPTS, all_needs

called = set()  # names of the concepts whose functions were called since the current test began


def watch_all():
    """Replace every function of the table by one that first writes down its concept.

    Call it before anybody imports them by name.
    """
    # in the order of their imports
    for file in ("moe", "vit", "convnext", "eval", "train", "inspect_experts"):
        module = importlib.import_module(file)
        for concept in CONCEPTS:
            for function in concept.functions.split():
                *place, name = function.split(".")
                if place[0] == file:
                    owner = getattr(module, place[1]) if len(place) > 1 else module
                    setattr(owner, name, watched(getattr(owner, name), concept.name))


def watched(function, concept):
    @functools.wraps(function)
    def call(*args, **kwargs):
        __tracebackhide__ = True  # a failing test shows the function itself
        called.add(concept)
        return function(*args, **kwargs)
    return call


def check(concept, slow):
    """Fail the test that has just passed if it called too little or too much.

    It must call a function of its concept, and none of a concept that this one does not need.
    """
    if concept == "course":  # the tests of the tests
        return
    if not slow and concept not in called:  # slow tests call it in processes of their own
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
