"""Do the tests notice mistakes, and does the summary tell what is so?

With --slow one place of the project is broken at a time (mutants.py), or some concepts are left
unwritten, and the tests of a concept run. Each such run is a process, forked from one that has
PyTorch loaded: some 200 new Pythons would take 5 minutes longer. As many run at a time as there are
processors, and a thread waits for each.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import forked
import mutants
from concepts import BY_NAME, CONCEPTS, PLAN, all_needs
from make_assignment import ROOT, blanked, files_with_tests, read_results, source_of

pytestmark = pytest.mark.course

MUTANTS = mutants.read_table()
WRITTEN = [concept.name for concept in CONCEPTS if concept.functions]
FILES = ("moe", "vit", "convnext", "eval", "train", "inspect_experts")  # by their imports


# ---------------------------------------------------------------- the tables

def test_teaching_order_needs_nothing_that_comes_later():
    """Each concept needs only concepts above it. Each function belongs to one concept only."""
    above, functions = [], []
    for concept in CONCEPTS:
        assert set(concept.needs.split()) <= set(above), concept.name
        assert len(concept.lesson) <= 110, f"{concept.name}: a lesson is one line"
        above.append(concept.name)
        functions += concept.functions.split()
    assert len(functions) == len(set(functions)) and list(PLAN) == WRITTEN


def test_every_mutant_can_be_made():
    """Each expression of the table of mutants is there once, and what comes out compiles."""
    for _, function, old, new in MUTANTS:
        file, _, path = function.partition(".")
        compile(mutants.replace(source_of(file), path, old, new), file, "exec")


def test_replace_by_hand():
    """Only the one function changes, however it is laid out. Twice or never there: an error."""
    source = 'def f(x):\n    return "é" + g(x,\n        1)\n\n\ndef g(x):\n    return g(x, 1)\n'
    expected = 'def f(x):\n    return "é" + (0)\n\n\ndef g(x):\n    return g(x, 1)\n'
    assert mutants.replace(source, "f", "g(x, 1)", "0") == expected
    with pytest.raises(ValueError, match="'y' is 0 times in f"):
        mutants.replace(source, "f", "y", "x")
    with pytest.raises(ValueError, match="'x' is 2 times in f"):
        mutants.replace("def f(x):\n    return x + x\n", "f", "x", "y")
    assert mutants.replace("def f(x):\n    x = 1\n", "f", "x = 1", "pass").endswith(":\n    pass\n")


# ---------------------------------------------------------------- the project, changed

def run_changed(sources, concepts, folder, flags):
    """Run the quick tests of concepts with other sources of some files: {file: source}.

    For forked.start(). The status is pytest's, folder/results.jsonl has conftest.py's results.
    """
    os.nice(10)
    os.chdir(ROOT)
    # test files are compiled once, although some set PYTHONDONTWRITEBYTECODE
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(folder.parent / "cache")
    for file in FILES:
        del sys.modules[file]  # they were loaded unchanged
    for file in FILES:
        if file in sources:
            sys.modules[file] = importlib.util.module_from_spec(importlib.util.find_spec(file))
            exec(compile(sources[file], f"{file}.py", "exec"), vars(sys.modules[file]))
    options = f"-q --tb=no -p no:cacheprovider --basetemp={folder}/tmp".split()
    options += [f"--results={folder}/results.jsonl", "-m", " or ".join(concepts)]
    sys.exit(pytest.main([*options, *flags, *files_with_tests(concepts)]))


def run(folder, sources, concepts, *flags):
    """Do so in a process. Return (pytest's status, results of the tests, dicts)."""
    folder.mkdir()
    process = forked.start(run_changed, sources, concepts, folder, flags)
    [status] = forked.finish(process, 600)
    return status, read_results(folder / "results.jsonl").values()


def with_mistake(mutant):
    """Return what to run for a mutant: its concept, up to the first test that fails."""
    concept, function, old, new = mutant
    file, _, path = function.partition(".")
    return {file: mutants.replace(source_of(file), path, old, new)}, [concept], "-x"


def with_needs_only(concept):
    """Return what to run for a concept where all that it does not need is unwritten."""
    return blanked(set(WRITTEN) - {concept} - all_needs(concept)), [concept]


def without(concept):
    """Return what to run without a concept: its tests, and those of who needs it directly."""
    return blanked([concept]), [concept, *waiting_for(concept)]


RUNS = dict(mutant=with_mistake, alone=with_needs_only, unwritten=without)


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """Run what the selected tests ask for in the background: {(kind, change): Future}."""
    folder, futures = tmp_path_factory.mktemp("runs"), {}
    threads = ThreadPoolExecutor(os.cpu_count())
    for item in request.session.items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        for kind in set(RUNS) & set(parameters):
            change = parameters[kind]
            place = folder / str(len(futures))
            futures[kind, change] = threads.submit(run, place, *RUNS[kind](change))
    yield futures
    threads.shutdown(cancel_futures=True)


@pytest.mark.slow
@forked.needs_fork
@pytest.mark.parametrize("mutant", MUTANTS, ids=" ".join)
def test_a_mistake_is_noticed_by_its_own_concept(mutant, outcomes):
    """A test of the concept fails. (It does not merely fail to start.)"""
    status, _ = outcomes["mutant", mutant].result()
    assert status == pytest.ExitCode.TESTS_FAILED


@pytest.mark.slow
@forked.needs_fork
@pytest.mark.parametrize("alone", WRITTEN)
def test_a_concept_needs_no_more_than_it_says(alone, outcomes):
    """Its tests pass where every concept that it does not need is unwritten."""
    _, results = outcomes["alone", alone].result()
    failed = {result["test"]: result["unwritten"] for result in results if not result["passed"]}
    assert results and not failed, "add to its needs in concepts.py, or test less"


UNSEEN = {("grouped", "vit"), ("grouped", "convnext"), ("training", "grouped"),
          ("training", "weights")}  # needed by slow tests only


def waiting_for(concept):
    """Return the names of the concepts whose quick tests need this one directly."""
    return [other.name for other in CONCEPTS
            if concept in other.needs.split() and (other.name, concept) not in UNSEEN]


@pytest.mark.slow
@forked.needs_fork
@pytest.mark.parametrize("unwritten", WRITTEN)
def test_without_a_concept_its_tests_do_not_pass(unwritten, outcomes):
    """All tests of the concept meet it unwritten, and so do some of each that needs it."""
    met = {}
    _, results = outcomes["unwritten", unwritten].result()
    for result in results:
        met.setdefault(result["concept"], []).append(result["unwritten"] == [unwritten])
        assert result["passed"] or result["unwritten"] == [unwritten], result["test"]
    assert all(met.pop(unwritten)), "a test that cannot fail: does it belong to another concept?"
    assert {name for name in met if any(met[name])} == set(waiting_for(unwritten))


# ---------------------------------------------------------------- what pytest prints

def run_suite(folder, tests, *flags):
    """Run pytest on a test file in an empty project with our conftest.py. Return the process.

    tests: {test: (marks, body)}.
    """
    (folder / "tests").mkdir()
    for name in ("concepts.py", "conftest.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests" / name)
    source = "import pytest\n"
    for name, (marks, body) in tests.items():
        source += "".join(f"@pytest.mark.{mark}\n" for mark in marks.split())
        source += f"def test_{name}(): {body}\n"
    (folder / "tests" / "test_it.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


UNWRITTEN = 'raise NotImplementedError("router: write Router.forward")'
SUITE = dict(
    a=("layer", UNWRITTEN), b=("layer", "pass"), c=("balance", "assert 0.5 == 1.0"),
    d=("balance", UNWRITTEN), e=("edge capacity", "assert 0"), f=("router", UNWRITTEN),
    g=("top_k", "pass"), h=("router", UNWRITTEN), i=("top_k", "pytest.skip()"),
    j=("capacity", "pass"))


@pytest.mark.slow
@pytest.mark.parametrize("flags, expected", [
    ("tests -v", ["router 0/2 not written yet", "top_k 1/1 done", "balance 0/2 BROKEN",
                  "capacity 1/2 edges left", "layer 1/2 waits for router"]),
    ("-x", ["router 0/1 of 2 not written yet"]),
    ("-k test_b", ["layer 1/1 of 2 so far"]),
    ("tests/test_it.py::test_g", ["top_k 1/1 so far"])])
def test_the_summary_by_hand(flags, expected, tmp_path):
    """A line per concept: tests passed and run, of how many, and what that says.

    Tests run in the order of the concepts, edges last: -x stops at the next thing to learn."""
    out = run_suite(tmp_path, SUITE, *flags.split()).stdout
    found = [" ".join(line.split()) for line in out.splitlines() if line.startswith(tuple(BY_NAME))]
    assert len(found) == len(expected), out
    for line, start in zip(found, expected):
        assert line.startswith(f"{start} {BY_NAME[start.split()[0]].lesson[:20]}"), line
    if "-v" in flags:
        assert re.findall(r"::test_(\w) .*%", out) == list("fhgicdjeab")


@pytest.mark.slow
@pytest.mark.parametrize("marks, named", [("slow", "[]"), ("router top_k", "'top_k', 'router'")])
def test_a_test_without_a_concept_or_with_two_is_refused(marks, named, tmp_path):
    """A usage error, status 4, that names the test and says what is expected."""
    process = run_suite(tmp_path, {"1": (marks, "pass")})
    assert process.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"tests/test_it.py::test_1 has the concepts [{named.strip('[]')}]" in process.stderr


@pytest.mark.slow
@forked.needs_fork
def test_processes_print_only_below_a_test_that_fails(capfd):
    """What a process writes, also past Python, comes from finish()."""
    forked.finish(forked.start(os.system, "echo hello; echo world >&2"))
    assert capfd.readouterr() == ("hello\nworld\n", "")
