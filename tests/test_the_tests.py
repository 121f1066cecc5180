"""Do the tests notice mistakes, and does the summary tell what is so?

With --slow one place of the project is broken at a time (mutants.py), or one concept is left
unwritten, and the tests of the concerned concepts run. That no test calls what its concept does not
need is checked in every run, by needs.py: so no mistake can redden a concept that does not need it.

Each such run is a process, forked from one that has PyTorch loaded: 150 new Pythons would take
12 minutes. As many run at a time as there are processors, and a thread waits for each.
"""

import importlib.util
import json
import os
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import forked
import mutants
from concepts import BY_NAME, CONCEPTS
from make_assignment import ROOT, blank

pytestmark = pytest.mark.course

MUTANTS = mutants.read_table()
WRITTEN = [concept.name for concept in CONCEPTS if concept.functions]


# ---------------------------------------------------------------- the table of concepts


def test_teaching_order_needs_nothing_that_comes_later():
    """Each concept needs only concepts above it. Each function belongs to one concept only."""
    above, functions = [], []
    for concept in CONCEPTS:
        assert set(concept.needs.split()) <= set(above), concept.name
        assert len(concept.lesson) <= 110, f"{concept.name}: a lesson is one line"
        above.append(concept.name)
        functions += concept.functions.split()
    assert len(functions) == len(set(functions))


def test_every_mutant_can_be_made():
    """Each expression of the table of mutants is there once, and what comes out compiles."""
    for _, function, old, new in MUTANTS:
        file, _, path = function.partition(".")
        source = mutants.replace((ROOT / f"{file}.py").read_text("utf-8"), path, old, new)
        compile(source, file, "exec")


def test_replace_by_hand():
    """Only the one function changes, however it is laid out. Twice or never there: an error."""
    source = 'def f(x):\n    return g("é", x [0],\n             1)\n\ndef h(x):\n    return x[0]\n'
    changed = 'def f(x):\n    return g("é", (y),\n             1)\n\ndef h(x):\n    return x[0]\n'
    assert mutants.replace(source, "f", "x[0]", "y") == changed
    with pytest.raises(ValueError, match="'y' is 0 times in f: expected once"):
        mutants.replace(source, "f", "y", "x")
    with pytest.raises(ValueError, match="'x' is 2 times in f"):
        mutants.replace("def f(x):\n    return x + x\n", "f", "x", "y")
    assert mutants.replace("def f(x):\n    x = 1\n", "f", "x = 1", "pass").endswith(":\n    pass\n")


# ---------------------------------------------------------------- the project, changed


def run_changed(sources, concepts, folder, flags):
    """Run the quick tests of concepts with other sources of some files: {file: source}.

    For forked.start(). The status is pytest's, and folder/results.json has conftest.py's results.
    """
    os.nice(10)
    os.chdir(ROOT)
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(folder.parent / "cache")
    files = ("moe", "vit", "convnext", "eval", "train", "inspect_experts")  # by their imports
    for file in files:
        del sys.modules[file]  # they were loaded unchanged
    for file in files:
        if file in sources:
            sys.modules[file] = importlib.util.module_from_spec(importlib.util.find_spec(file))
            exec(compile(sources[file], f"{file}.py", "exec"), vars(sys.modules[file]))
    mark = " or ".join(concepts)
    paths = [str(path) for path in (ROOT / "tests").glob("test_*.py")
             if re.search(rf"mark\.({'|'.join(concepts)})\b", path.read_text("utf-8"))]
    options = f"-q --tb=no -p no:cacheprovider -p no:needs --basetemp={folder}/tmp".split()
    status = pytest.main([*options, "-m", f"({mark}) and not slow", *flags, *paths])
    results = {concept: [(passed, sorted(unwritten)) for passed, unwritten in tests.values()]
               for concept, tests in sys.modules["conftest"].results.items()}
    (folder / "results.json").write_text(json.dumps(results))
    sys.exit(status)


def source_of(file):
    return (ROOT / f"{file}.py").read_text("utf-8")


one_at_a_time = threading.Lock()  # Python 3.11 loses count if two threads make syntax trees


def run_mutant(folder, mutant):
    """Return the status of the concept's tests, which stop at the first that fails."""
    concept, function, old, new = mutant
    file, _, path = function.partition(".")
    with one_at_a_time:
        sources = {file: mutants.replace(source_of(file), path, old, new)}
    folder.mkdir()
    [status] = forked.finish(forked.start(run_changed, sources, [concept], folder, ["-x"]))
    return status


def run_unwritten(folder, concept):
    """Return the results of the tests of a concept that is unwritten, and of those that need it.

    {concept: [(passed, names of the concepts that were found unwritten)]}
    """
    sources = {}
    with one_at_a_time:
        for function in BY_NAME[concept].functions.split():
            file, _, path = function.partition(".")
            sources[file] = blank(sources.get(file) or source_of(file), path, concept)
    folder.mkdir()
    concepts = [concept, *waiting_for(concept)]
    forked.finish(forked.start(run_changed, sources, concepts, folder, []))
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """Run the selected mutants and concepts in the background: {mutant or concept: Future}."""
    folder, futures = tmp_path_factory.mktemp("runs"), {}
    threads = ThreadPoolExecutor(os.cpu_count())
    for number, item in enumerate(request.session.items):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        for name, run in (("mutant", run_mutant), ("unwritten", run_unwritten)):
            if name in parameters:
                change = parameters[name]
                futures[change] = threads.submit(run, folder / str(number), change)
    yield futures
    threads.shutdown(cancel_futures=True)


@pytest.mark.slow
@forked.needs_fork
@pytest.mark.parametrize("mutant", MUTANTS, ids=" ".join)
def test_a_mistake_is_noticed_by_its_own_concept(mutant, outcomes):
    """A test of the concept fails. (It does not merely fail to start.)"""
    assert outcomes[mutant].result() == pytest.ExitCode.TESTS_FAILED


UNSEEN = {("grouped", "vit"), ("grouped", "convnext"), ("training", "grouped"),
          ("training", "weights")}  # needed by slow tests only


def waiting_for(concept):
    """Return the names of the concepts whose quick tests need this one directly."""
    return [other.name for other in CONCEPTS
            if concept in other.needs.split() and (other.name, concept) not in UNSEEN]


@pytest.mark.slow
@forked.needs_fork
@pytest.mark.parametrize("unwritten", WRITTEN)
def test_without_a_concept_its_tests_and_those_that_need_it_do_not_pass(unwritten, outcomes):
    """All tests of the concept meet it unwritten. Of what needs it, some do, and no other fails."""
    found = outcomes[unwritten].result()
    assert all(names == [unwritten] for _, names in found.pop(unwritten))
    assert set(found) == set(waiting_for(unwritten))
    for name, tests in found.items():
        assert [unwritten] in [names for _, names in tests], f"{name} does not need {unwritten}"
        assert all(passed or names == [unwritten] for passed, names in tests), name


# ---------------------------------------------------------------- what pytest prints


def run_pytest(folder, flags):
    """Do, for forked.start(), `cd folder; python -m pytest flags >out 2>err`."""
    os.chdir(folder)
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != ROOT / "tests"]
    for name in ("concepts", "conftest"):  # the folder has its own
        sys.modules.pop(name, None)
    with open("out", "w") as sys.stdout, open("err", "w") as sys.stderr:
        sys.exit(pytest.main(["-p", "no:cacheprovider", "--basetemp=tmp", *flags]))


def run_suite(folder, tests, *flags):
    """Run pytest on a test file in an empty project with our conftest.py.

    tests: {test: (concept, body)}. Return pytest's status, and the lines of stdout and stderr.
    """
    (folder / "tests").mkdir()
    for name in ("concepts.py", "conftest.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests" / name)
    source = "import pytest\n"
    for name, (concept, body) in tests.items():
        source += f"@pytest.mark.{concept}\ndef test_{name}(): {body}\n"
    (folder / "tests" / "test_it.py").write_text(source)
    [status] = forked.finish(forked.start(run_pytest, folder, flags))
    return status, *[(folder / name).read_text().splitlines() for name in ("out", "err")]


UNWRITTEN = 'raise NotImplementedError("router: write Router.forward")'
SUITE = dict(
    a=("layer", UNWRITTEN), b=("layer", "pass"), c=("balance", "assert 0.5 == 1.0"),
    d=("balance", UNWRITTEN), e=("top_k", "pass"), f=("router", UNWRITTEN), g=("top_k", "pass"),
    h=("router", UNWRITTEN), i=("top_k", "pytest.skip()"),
)


@pytest.mark.slow
@forked.needs_fork
@pytest.mark.parametrize("flags, expected", [
    ([], ["router 0/2 not written yet", "top_k 2/2 done", "balance 0/2 BROKEN",
          "layer 1/2 waits for router"]),
    # of what ran, a name that is sure stays; BROKEN and done are sure of a whole concept only
    (["-x"], ["router 0/1 passed, 2 in all not written yet"]),
    (["-k", "test_b or test_c or test_e"],
     ["top_k 1/1 passed, 3 in all so far", "balance 0/1 passed, 2 in all so far",
      "layer 1/1 passed, 2 in all so far"]),
    (["-m", "balance"], ["balance 0/2 BROKEN"]),
    (["tests/test_it.py::test_e", "tests/test_it.py::test_g"], ["top_k 2/2 so far"]),
    (["tests/test_it.py", "-k", "test_a"], ["layer 0/1 passed, 2 in all waits for router"]),
    (["tests"], ["router 0/2 not written yet", "top_k 2/2 done", "balance 0/2 BROKEN",
                 "layer 1/2 waits for router"]),
    (["-m", "slow"], []),
])
def test_the_summary_by_hand(flags, expected, tmp_path):
    """A line per concept: tests passed and run, of how many, and what that says."""
    _, out, _ = run_suite(tmp_path, SUITE, "-q", "--tb=no", *flags)
    found = [" ".join(line.split()) for line in out if line.startswith(tuple(BY_NAME))]
    assert len(found) == len(expected), out
    for line, start in zip(found, expected):
        name = start.split()[0]
        assert line.startswith(f"{start} {BY_NAME[name].lesson[:20]}"), line


@pytest.mark.slow
@forked.needs_fork
def test_the_tests_run_in_the_order_of_the_concepts(tmp_path):
    """Whatever the order in the file: so -x stops at the next thing to learn."""
    _, out, _ = run_suite(tmp_path, SUITE, "-v")
    order = re.findall(r"::test_(\w)", "\n".join(line for line in out if "%]" in line))
    assert "".join(order) == "fhegicdab"


@pytest.mark.slow
@forked.needs_fork
def test_a_run_is_short(tmp_path):
    """A dot is ten tests that passed. Of a test that failed, 20 lines of its output are shown."""
    noisy = "[print(f'line {i}') for i in range(1000)]; assert 0"
    suite = {str(i): ("router", "pass") for i in range(25)} | {"noisy": ("top_k", noisy)}
    _, out, _ = run_suite(tmp_path, suite, "-q")
    assert out[0].split() == ["..F", "[100%]"]
    assert "... 980 lines" in out and "line 980" in out and "line 979" not in out


@pytest.mark.slow
@forked.needs_fork
def test_processes_print_only_below_a_test_that_fails(tmp_path, capfd):
    """What a process writes, also past Python, comes from finish()."""
    processes = forked.start(os.system, "echo hello; echo world >&2")
    forked.finish(processes)
    assert capfd.readouterr() == ("hello\nworld\n", "")


@pytest.mark.slow
@forked.needs_fork
@pytest.mark.parametrize("marks, named", [
    ("slow", "[]"), ("router\n@pytest.mark.top_k", "'top_k', 'router'"),
])
def test_a_test_without_a_concept_or_with_two_is_refused(marks, named, tmp_path):
    """A usage error, status 4, that names the test and says what is expected."""
    status, _, errors = run_suite(tmp_path, {"1": (marks, "pass")})
    assert status == pytest.ExitCode.USAGE_ERROR
    [error] = [line for line in errors if line.startswith("ERROR: tests/test_it.py::test_1 has")]
    assert named in error and "expected exactly one" in error
