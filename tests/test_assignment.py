"""make_assignment.py and grade.py: what a student gets, and what a submission cannot do.

Grading starts a process for each submission and concept. So most tests here grade a project of one
function, in which pytest takes less than a second.
"""

import ast
import compileall
import csv
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import grade
import make_assignment
from blanks import blank, body_of, find
from concepts import BY_NAME, CONCEPTS
from make_assignment import ROOT, handout

pytestmark = pytest.mark.course

# ---------------------------------------------------------------- blanks and handout


FUNCTIONS = [function for concept in CONCEPTS for function in concept.functions.split()]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_docstring_is_a_handout(function):
    """Each function to be written has a docstring, its own or that of its class.

    In the files of the model it has a shape or a type, so that who has only the docstring can
    begin."""
    file, _, path = function.partition(".")
    _, text = handout((ROOT / f"{file}.py").read_text("utf-8"), path)
    assert text
    if file in ("moe", "vit", "convnext"):
        kinds = r"\([A-Z1.][^)]*\)|scalar|\bint\b|ints\b|bool|dtype|indices|weights|state dict"
        assert re.search(kinds, text), f"{function}: neither a shape nor a type"


def test_a_blank_keeps_everything_but_the_body():
    """Signature, decorator, docstring, neighbours and comments outside stay; the body raises, and
    says what to write."""
    source = '''import math

class A:
    # about f
    @staticmethod
    def f(x: int = 1, *, y) -> int:
        """Doc.

        More.
        """
        # a hint that would give it away
        return math.sqrt(x)

    def g(self):
        return 1
'''
    expected = source.replace(
        '''        # a hint that would give it away
        return math.sqrt(x)
''',
        '''        raise NotImplementedError("roots: write A.f")
''',
    )
    assert blank(source, "A.f", "roots") == expected
    with pytest.raises(ValueError, match="a function of one line"):
        blank("def f(x): return x\n", "f", "c")
    with pytest.raises(ValueError, match="no h in the file"):
        blank("def f(x):\n    return x\n", "h", "c")
    assert blank("def g(x):\n    # why\n    return x\n\n\nz = 1\n", "g", "c") == (
        'def g(x):\n    raise NotImplementedError("c: write g")\n\n\nz = 1\n'
    )


def test_an_assignment_by_hand(tmp_path, capsys):
    """The functions of the concepts are gone, the handout has their docstrings, solutions stay
    here, and all files compile."""
    out = tmp_path / "homework"
    make_assignment.main(make_assignment.parse_args([str(out), "combine", "top_k"]))
    files = "ASSIGNMENT.md README.md requirements.txt tests"
    files += " convnext.py eval.py inspect_experts.py moe.py train.py vit.py"
    assert {path.name for path in out.iterdir() if path.name[0] != "."} == set(files.split())
    ours = {"make_assignment.py", "grade.py", "referee.py", "needs.py", "test_the_tests.py"}
    assert not ours & set(os.listdir(out / "tests"))
    assert not (out / ".git").exists() and compileall.compile_dir(out, quiet=1)
    source = (out / "moe.py").read_text("utf-8")
    blanks = re.findall('raise NotImplementedError\\("(.*)"\\)', source)
    assert blanks == ["top_k: write top_k_gates", "combine: write combine"]
    text = (out / "ASSIGNMENT.md").read_text("utf-8")
    assert text.index("## top_k") < text.index("## combine"), "in teaching order"
    for part in ("Choose the k most probable experts", "pytest -m combine", "(it needs dispatch)",
                 "taken from your moe.py, and nothing else", "\n- your moe.py\n- answers.md",
                 "### `combine` in moe.py", "pip install -r requirements.txt"):
        assert part in text
    assert make_assignment.COMMON not in text, "nothing here has args or a run"
    assert make_assignment.COMMON in make_assignment.write_handout(["recipe"])


def test_what_students_get_is_about_their_task(tmp_path):
    """rules.py does not say what we use it for. The README leads to ASSIGNMENT.md, without the
    parts that need files which stay here."""
    make_assignment.copy_project(tmp_path)
    rules = (tmp_path / "tests/rules.py").read_text("utf-8")
    assert not re.search("cop(y|ied)|course|instructor|solution|chang", rules)
    readme = (tmp_path / "README.md").read_text("utf-8")
    assert readme.startswith("This is an assignment: start with ASSIGNMENT.md.\n\n# Sparse")
    assert not re.search("make_assignment|Changed the code", readme)
    assert "\n- **Out of memory?**" in readme and "\n## Never run" in readme


@pytest.mark.parametrize("names, lines", [
    (["top_k"], ["| concept | hours | to discuss |", "| top_k | 1 | What", "Hours in all: 1."]),
    # 4 + 1 + 4 + 3 hours: 12 in 10 days. After 4 of them day 1 + 40 // 12 = 4 has begun.
    (["router", "top_k", "balance", "dispatch"],
     ["| day | concept | hours | to discuss |", "| 1 to 4 | router | 4 | Why",
      "| 4 to 5 | top_k | 1 | What", "| 5 to 8 | balance | 4 | Counting",
      "| 8 to 10 | dispatch | 3 | Why", "Hours in all: 12."]),
])
def test_the_plan_by_hand(names, lines):
    """A line per concept, with days where there is work for ten of them, and the sum of hours."""
    printed = make_assignment.write_plan(names).splitlines()
    found = [line for line in printed if line.startswith(("|", "Hours")) and "---" not in line]
    assert len(found) == len(lines)
    for line, start in zip(found, lines):
        assert line.startswith(start)


def test_the_docstring_of_a_class_comes_before_its_methods():
    """Once, under its own heading: it may be about another method than the first."""
    text = make_assignment.write_handout(["layer"])
    headings = re.findall("^### (.*) in moe.py$", text, re.MULTILINE)
    methods = ["`MoE.__init__`", "`MoE.forward`", "`MoE.route`"]
    assert headings == ["class `MoE`", *methods]
    assert text.count("batch_priority: short of slots") == 1 and text.count("noise_std = ") >= 1
    assert text.count("As the docstring of MoE says.") == 2


def test_a_failure_leaves_nothing_half_written(tmp_path, monkeypatch):
    """A table that names a function which is not there: an error, and no folder with the solutions
    in it."""
    monkeypatch.setitem(
        BY_NAME, "top_k", BY_NAME["top_k"]._replace(functions="moe.top_k_gates moe.top_q_gates")
    )
    with pytest.raises(ValueError, match="there is no top_q_gates"):
        make_assignment.make(tmp_path / "homework", ["top_k"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments, expected", [
    (["EXISTS", "top_k"], "exists already"),
    (["new", "top_q"], "unknown concept 'top_q': expected one of router, top_k"),
    (["new", "course"], "unknown concept 'course'"),
    (["top_k", "combine"], "top_k is a concept: the folder to write comes first"),
    ([str(ROOT / "homework"), "top_k"], "is inside the project"),
    (["new"], "at least one concept"),
])
def test_an_impossible_assignment_is_one_line_and_writes_nothing(
    arguments, expected, tmp_path, monkeypatch
):
    """A folder that exists, a concept that does not: refused before anything is copied."""
    monkeypatch.chdir(tmp_path)
    arguments = [str(tmp_path) if argument == "EXISTS" else argument for argument in arguments]
    with pytest.raises(ValueError, match=expected):
        make_assignment.main(make_assignment.parse_args(arguments))
    assert os.listdir(tmp_path) == []


def test_the_list_has_every_concept(capsys):
    """--list prints the table: concept, lesson, functions, what it needs."""
    make_assignment.main(make_assignment.parse_args(["--list"]))
    printed = capsys.readouterr().out
    for concept in CONCEPTS:
        for words in (concept.name, concept.lesson, concept.functions):
            assert words in printed


@pytest.mark.parametrize("passed, lines, well", [
    # router is blank: both of its tests turn, one of layer's two does (it needs router), none of
    # top_k's.
    (dict(a=0, b=0, c=1, d=0, e=1),
     "router 2 of 2 turn, expected all, a, b, layer 1 of 2 turn, expected some, d", True),
    (dict(a=0, b=1, c=1, d=0, e=1),
     "router 1 of 2 turn, expected all WRONG, a, layer 1 of 2 turn, expected some, d", False),
    (dict(a=0, b=0, c=0, d=1, e=1),
     "router 2 of 2 turn, expected all, a, b, top_k 1 of 1 turn, expected none WRONG, c", False),
])
def test_the_solution_check_by_hand(passed, lines, well):
    """It reports, concept by concept, how many tests the blanks turn and which, and what is wrong
    with that."""
    concepts = dict(a="router", b="router", c="top_k", d="layer", e="layer")
    complete = {test: (concept, True) for test, concept in concepts.items()}
    blanked = {test: (concepts[test], bool(ok)) for test, ok in passed.items()}
    found, is_well = make_assignment.judge(["router"], complete, blanked)
    assert ", ".join(" ".join(line.split()) for line in found) == lines and is_well == well


# ---------------------------------------------------------------- grading: only bodies are taken


def test_a_body_and_nothing_else_is_taken():
    """Default values, decorators, annotations, other functions and module code stay behind."""
    ours = '''@fast
def f(x, k=1):
    """Ours."""
    raise NotImplementedError("top_k: write f")
'''
    theirs = '''import os
os._exit(0)

@print
def f(x: print(1), k=print(2)) -> print(3):
    """Theirs."""
    def helper(y):
        return y + 1

    return helper(x)

def g():
    return 2
'''
    source, reason = grade.graft(ours, "f", "top_k", theirs)
    assert source == '''@fast
def f(x, k=1):
    """Ours."""
    def helper(y):
        return y + 1
    return helper(x)
'''
    assert reason == ""
    assert body_of("def f(x): return x", "f") == "return x"
    assert body_of("def f(x): return 1\ndef f(x): return 2", "f") == "return 2", "as in Python"


@pytest.mark.parametrize("theirs, words", [
    ("def g(x): return 1", "there is no f"),
    ("f = print", "there is no f"),
    ("class f: pass", "f is not a function"),
    ("async def f(x): return 1", "f is not a function"),
    ("def f(y): return 1", "expected ['x']"),
    ("def f(x): nonlocal x", "nonlocal"),
    ("def f(x) return 1", "expected ':'"),
    ("def f(x): return \0", "null byte"),
    ("", "there is no f"),
])
def test_a_body_that_cannot_be_taken_leaves_a_blank(theirs, words):
    """The reason is told, and the other concepts are graded all the same."""
    ours = "def f(x):\n    return 1\n"
    source, reason = grade.graft(ours, "f", "top_k", theirs)
    assert source == blank(ours, "f", "top_k") and words in reason


def test_all_our_bodies_can_be_taken():
    """Whatever is in them (decorators, nested functions, f-strings), they come out as they are."""
    for function in FUNCTIONS:
        file, _, path = function.partition(".")
        source = (ROOT / f"{file}.py").read_text("utf-8")
        node, _ = find(source, path)
        body = node.body[1:] if ast.get_docstring(node) else node.body
        taken = ast.parse(body_of(source, path)).body
        assert list(map(ast.dump, taken)) == list(map(ast.dump, body)), function


def test_words_to_look_at_are_told():
    """They cost nothing. A body with them should be read."""
    source = "def f(x):\n    import os\n    torch.testing.close = 1\n    return x.sum()\n"
    assert grade.suspicious_words(source, "f") == ["os", "testing"]


def test_words_that_ours_needs_are_not_told(tmp_path):
    """Who writes a checkpoint opens a file. Who looks for modules should say why."""
    def copy_ours(folder):
        copy_miniature(folder)
        (folder / "moe.py").write_text("def top_k_gates(probs, k):\n    return open(probs)\n")

    theirs = tmp_path / "moe.py"
    theirs.write_text("def top_k_gates(probs, k):\n    return open(sys.modules)\n")
    (tmp_path / "copy").mkdir()
    _, look = grade.write_copy(tmp_path / "copy", "top_k", theirs, copy_ours)
    assert look == ["modules", "sys"]


def test_one_file_is_no_submission_for_two(tmp_path):
    """place_moe is in vit.py and in convnext.py: one file would be taken for both."""
    (tmp_path / "ASSIGNMENT.md").write_text("")
    (tmp_path / "vit.py").write_text('raise NotImplementedError("placement: write place_moe")')
    with pytest.raises(ValueError, match="vit.py is one file, .* in convnext.py, vit.py: expected"):
        grade.grade([tmp_path / "vit.py"], tmp_path, copy_miniature)


def test_private_tests_are_for_grading_only(tmp_path, monkeypatch):
    """tests/test_private*.py is in the copy that is graded, and not in the assignment."""
    monkeypatch.setattr(grade, "TESTS", tmp_path)
    for name in ("referee.py", "test_private_1.py", "test_other.py"):
        (tmp_path / name).write_text("")
    copy = tmp_path / "copy"
    copy.mkdir()
    grade.write_copy(copy, "top_k", None, copy_miniature)
    assert sorted(os.listdir(copy / "tests")) == [
        "conftest.py", "referee.py", "test_mini.py", "test_private_1.py"
    ]
    assert not [name for name in make_assignment.PROJECT if "private" in name]


def test_lines_of_somebody_else_are_no_reports():
    """A report carries the secret. Anything else in the file is left out."""
    ours = json.dumps(dict(secret="s", test="a", spoiled=False, passed=True))
    forged = json.dumps(dict(secret="t", test="b", spoiled=False, passed=True))
    reports = grade.read_reports([forged, "[]", "1", "{", "", ours], "s")
    assert list(reports) == [("a", False)]


@pytest.mark.parametrize(
    "message, note",
    [
        ("AssertionError: not close!\n\nDifference: 1\n\nHint: 2 and not 1: twice?",
         "AssertionError: not close! Hint: 2 and not 1: twice?"),
        ("assert 1 == 2\n + where 1 = f()", "assert 1 == 2"),
        ("", ""),
    ],
    ids=["hint", "no hint", "nothing"],
)
def test_a_note_says_what_failed_and_has_the_hint(message, note):
    """Of a message of many lines the first one and the hint answer: why 0?"""
    ours, theirs = dict(passed=True, message=""), dict(passed=False, message=message)
    problem = grade.judge({("test_f", False): ours}, {("test_f", False): theirs})
    assert problem == (0, 1, f"test_f: {note}")


# ---------------------------------------------------------------- grading: one function

MINIATURE = {
    "tests/conftest.py": '''
def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true")
''',
    "moe.py": '''
def top_k_gates(probs, k):
    """Return the k largest of probs, a list."""
    return sorted(probs, reverse=True)[:k]
''',
    "tests/test_mini.py": '''
import pytest
import testing
from moe import top_k_gates

@pytest.mark.top_k
def test_two_of_three():
    testing.assert_close(top_k_gates([1, 3, 2], 2), [3, 2])

@pytest.mark.top_k
def test_all():
    assert top_k_gates([1, 2], 2) == [2, 1]

@pytest.mark.top_k
def test_it_is_a_list():
    assert type(top_k_gates([1, 2], 1)) is list

@pytest.mark.top_k
def test_no_place_for_this_one():
    pytest.skip("not here")

@pytest.mark.router
def test_of_another_concept():
    assert False
''',
    # as torch.testing has it, but torch takes seconds to import
    "testing.py": '''
def assert_close(actual, expected):
    if actual != expected:
        raise AssertionError(f"{actual} is not {expected}")
''',
}


def copy_miniature(folder):
    (folder / "tests").mkdir()
    for name, text in MINIATURE.items():
        (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def expected():
    return grade.expect("top_k", copy_miniature, 60)


def grade_body(body, tmp_path, expected, limit=60):
    """Grade top_k_gates with this body: the result, as in the JSON file."""
    source = "def top_k_gates(probs, k):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    (tmp_path / "moe.py").write_text(source, encoding="utf-8")
    return grade.grade_concept("top_k", tmp_path, expected, copy_miniature, limit)


@pytest.mark.slow
def test_our_own_code_says_which_tests_count(expected):
    """The skipped test does not. Spoiled, the test of the type still passes: it sees no numbers."""
    passed = {key for key, report in expected.items() if report["passed"]}
    names = {(test.partition("::")[2], spoiled) for test, spoiled in passed}
    assert names == {("test_two_of_three", False), ("test_all", False),
                     ("test_it_is_a_list", False), ("test_it_is_a_list", True)}


@pytest.mark.slow
def test_a_right_body_scores(tmp_path, expected):
    """Written in another way, with a helper and an import inside the body."""
    body = """
        import heapq

        def largest(numbers):
            return heapq.nlargest(k, numbers)

        return largest(probs)
    """
    result = grade_body(body, tmp_path, expected)
    assert result == dict(score=1, passed=3, tests=3, note="", look=[])


@pytest.mark.slow
def test_a_wrong_body_scores_nothing_and_is_told_why(tmp_path, expected):
    """A concept counts as a whole: 2 of 3 tests give no points. The note has the first message."""
    result = grade_body("return sorted(probs)[::-1][: k - 1] or [2]", tmp_path, expected)
    assert result["score"] == 0 and result["passed"] == 1
    assert "test_two_of_three: AssertionError: [3] is not [3, 2]" in result["note"]


CHEATS = {  # what a body might do: its code, and a part of the note
    "end the process": ("import os; os._exit(0)", "not reported"),
    "leave": ("import sys; sys.exit(0)", "SystemExit"),
    "leave pytest": ("import pytest; pytest.exit('done', 0)", "not reported"),
    "skip the tests": ("import pytest; pytest.skip('no')", "skipped"),
    "run no test": (
        "import _pytest.python; _pytest.python.Function.runtest = lambda self: None; return [0]",
        "pass whatever the answer is",
    ),
    "compare nothing": (
        "import testing; testing.assert_close = lambda *args: None; return [0]",
        "",
    ),
    "compare nothing, and guess the rest": (
        "import testing; testing.assert_close = lambda *args: None; return [2, 1]",
        "",
    ),
    "report what you like": (
        "import _pytest.reports as r; r.TestReport.outcome = property(lambda s: 'passed',"
        " lambda s, value: None); return [0]",
        "",
    ),
    "an answer that is equal to all": (
        "return type('Equal', (list,), {'__eq__': lambda s, o: True, '__ne__': lambda s, o: False})"
        "(probs)",
        "",
    ),
    "change the referee": (
        "import testing, __main__; testing.assert_close = lambda *args: None;"
        " __main__.spoil = None; return [2, 1]",
        "pass whatever the answer is",
    ),
    "write the report and leave": (
        "import os; open('report.xml', 'w').write('<testsuite failures=\"0\"/>'); os._exit(0)",
        "not reported",
    ),
    "write reports into every file, and leave": (
        """
        import json, os
        for name in ("test_two_of_three", "test_all", "test_it_is_a_list"):
            for spoiled in (True, False):
                line = dict(test=f"tests/test_mini.py::{name}", spoiled=spoiled, passed=not spoiled)
                for number in range(20):
                    try:
                        os.write(number, (json.dumps(line) + chr(10)).encode())
                    except OSError:
                        pass
        os._exit(0)
        """,
        "not reported",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("body, note", CHEATS.values(), ids=CHEATS)
def test_a_trick_gains_nothing(body, note, tmp_path, expected, monkeypatch):
    """A body of a line or two that works on pytest instead of on the task scores 0."""
    monkeypatch.setattr(grade, "RUNS", grade.RUNS[1:])  # no chance in a test
    result = grade_body(body, tmp_path, expected)
    assert result["score"] == 0 and result["note"] and note in result["note"], result


@pytest.mark.slow
def test_a_spoiled_run_comes_last(tmp_path, expected, monkeypatch):
    """What the first call changes, the first test does not see yet, but the last run does."""
    assert all(runs.endswith("plain spoiled") for runs in grade.RUNS)
    monkeypatch.setattr(grade, "RUNS", grade.RUNS[:1])
    body = "import testing; testing.assert_close = lambda *args: None; return [2, 1]"
    assert grade_body(body, tmp_path, expected)["score"] == 0


@pytest.mark.slow
def test_a_loop_for_ever_is_stopped(tmp_path, expected):
    """After the limit the process is killed with all that it has started."""
    body = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'while True: pass'])"
    result = grade_body(body + "\nwhile True: pass", tmp_path, expected, limit=2)
    assert result["score"] == 0 and "not reported" in result["note"]


@pytest.mark.slow
def test_the_environment_is_empty(tmp_path, expected, monkeypatch):
    """Keys and tokens in the environment of the one who grades stay there."""
    monkeypatch.setenv("SECRET_TOKEN", "1")
    body = "import os; assert 'SECRET_TOKEN' not in os.environ; return sorted(probs)[::-1][:k]"
    result = grade_body(body, tmp_path, expected)
    assert result["score"] == 1 and result["look"] == ["os"]


@pytest.mark.parametrize("encoding, first", [("utf-8-sig", ""), ("latin-1", "# coding: latin-1\n")])
def test_a_submission_is_read_as_python_reads_it(encoding, first, tmp_path):
    """A byte order mark, as some editors write, and a coding line change nothing."""
    source = first + "name = 'Zoë'\n"
    (tmp_path / "moe.py").write_text(source, encoding=encoding)
    assert grade.read_submission(tmp_path, "moe") == source


@pytest.mark.slow
def test_grades_of_a_class(tmp_path, capsys, monkeypatch):
    """A CSV line per submission, details in JSON. A submission may be a folder or the file."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("homework")
    (tmp_path / "homework/ASSIGNMENT.md").write_text("")
    (tmp_path / "homework/moe.py").write_text(blank(MINIATURE["moe.py"], "top_k_gates", "top_k"))
    os.mkdir("alice")
    shutil.copy("homework/moe.py", "alice/moe.py")
    (tmp_path / "bob.py").write_text("1 / 0\n" + MINIATURE["moe.py"])
    os.mkdir("carol, the third")
    submissions = [tmp_path / name for name in ("alice", "bob.py", "carol, the third")]
    grade.grade(submissions, tmp_path / "homework", copy_miniature, 60)
    with open("grades.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["submission", "top_k", "score"]
    assert lines == [["alice", "0", "0"], ["bob.py", "1", "1"], ["carol, the third", "0", "0"]]
    alice, bob, carol = json.loads((tmp_path / "grades.json").read_text())
    assert bob["concepts"]["top_k"] == dict(score=1, passed=3, tests=3, note="", look=[])
    assert "NotImplementedError: top_k: write top_k_gates" in alice["concepts"]["top_k"]["note"]
    assert "No such file" in carol["concepts"]["top_k"]["note"]
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.fixture
def instant(tmp_path, monkeypatch):
    """Let each submission score 1 without running its tests. carol's is stopped by Ctrl-C."""

    def grade_concept(concept, submission, *_):
        if submission.name == "carol":
            raise KeyboardInterrupt
        return dict(score=1, passed=3, tests=3, note="", look=[])

    monkeypatch.setattr(grade, "grade_concept", grade_concept)
    monkeypatch.setattr(grade, "expect", lambda *_: {})
    monkeypatch.chdir(tmp_path)
    for name in ("homework", "alice", "bob", "carol", "late/alice"):
        os.makedirs(name)
    (tmp_path / "homework/ASSIGNMENT.md").write_text("")
    source = blank(MINIATURE["moe.py"], "top_k_gates", "top_k")
    (tmp_path / "homework/moe.py").write_text(source)
    return lambda *names: grade.grade(list(map(Path, names)), Path("homework"), copy_miniature)


def test_the_progress_is_not_among_the_grades(instant, capsys):
    """A line before each step goes to stderr, so that one sees how long it takes."""
    instant("alice", "bob")
    out, errors = capsys.readouterr()
    assert out.splitlines() == ["submission,top_k,score", "alice,1,1", "bob,1,1"]
    steps = ["checking our own solution: top_k 1/1", "grading alice 1/2", "grading bob 2/2"]
    assert errors.splitlines() == steps


@pytest.mark.parametrize("typed", ["alice", "alice/", "./alice", "ABSOLUTE/alice", "bob/../alice"])
def test_a_submission_has_the_name_of_its_folder(typed, instant, tmp_path):
    """However the path is typed, the same student has the same name in both files."""
    instant(typed.replace("ABSOLUTE", str(tmp_path)))
    assert Path("grades.csv").read_text().splitlines()[1] == "alice,1,1"
    assert json.loads(Path("grades.json").read_text())[0]["submission"] == "alice"


def test_after_ctrl_c_the_same_command_does_the_rest(instant, capsys):
    """Who is in grades.csv stays as it was. Given bob, then stopped at carol, bob is not graded
    again."""
    with pytest.raises(KeyboardInterrupt):
        instant("bob", "carol", "alice")
    assert capsys.readouterr().err.splitlines()[-1] == "stopped: students in grades.csv: 1"
    os.rename("carol", "carl")
    instant("bob", "carl", "alice")
    assert "bob" not in capsys.readouterr().out
    names = [line.partition(",")[0] for line in Path("grades.csv").read_text().splitlines()]
    assert names == ["submission", "bob", "carl", "alice"]
    assert [result["submission"] for result in json.loads(Path("grades.json").read_text())] == (
        names[1:]
    )


def test_ctrl_c_is_one_line_and_status_130(instant, monkeypatch, capsys):
    """No traceback, and the status that a shell expects of a program that SIGINT has ended."""
    command = ["make_assignment.py", "--grade", "alice", "carol", "--against", "homework"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / "tests/make_assignment.py"), run_name="__main__")
    assert error.value.code == 130
    last_lines = capsys.readouterr().err.splitlines()[-2:]
    assert last_lines == ["grading carol 2/2", "stopped: students in grades.csv: 1"]


def test_an_empty_file_is_no_earlier_grade(instant):
    """A run that was cut may leave one, and the next run goes on."""
    for name in ("grades.csv", "grades.json"):
        Path(name).write_text("")
    instant("bob")
    assert Path("grades.csv").read_text().splitlines() == ["submission,top_k,score", "bob,1,1"]


@pytest.mark.parametrize("name, old, new", [
    ("grades.csv", "bob,1,1", "bob,0,0"),
    ("grades.json", "top_k", "router"),
    ("grades.json", "[", "{"),
])
def test_grades_that_were_changed_are_not_overwritten(name, old, new, instant):
    """A table that somebody has corrected, another assignment's, a broken file: refused."""
    instant("bob")
    changed = Path(name).read_text().replace(old, new, 1)
    Path(name).write_text(changed)
    with pytest.raises(ValueError, match="grades.csv or grades.json exists already"):
        instant("bob", "alice")
    assert Path(name).read_text() == changed


def test_two_students_with_one_name_are_refused(instant):
    """Their lines could not be told apart."""
    with pytest.raises(ValueError, match="late/alice is the second submission named alice"):
        instant("alice", "late/alice")


@pytest.mark.parametrize("arguments, expected", [
    ("--grade nobody", "--against ASSIGNMENT"),
    ("--grade nobody --against .", "no ASSIGNMENT.md in ."),
    ("--grade nobody --against homework", "no submission at nobody"),
    ("--grade homework --against complete", "nothing is to be written in complete"),
])
def test_what_cannot_be_graded_is_one_line(arguments, expected, tmp_path, monkeypatch):
    """Refused before any test runs, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("homework", blank(MINIATURE["moe.py"], "top_k_gates", "top_k")),
                       ("complete", MINIATURE["moe.py"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ASSIGNMENT.md").write_text("")
        (tmp_path / name / "moe.py").write_text(text)
    with pytest.raises(ValueError, match=expected):
        make_assignment.main(make_assignment.parse_args(arguments.split()))
    assert sorted(os.listdir(tmp_path)) == ["complete", "homework"]


# ---------------------------------------------------------------- rules that a course may change


@pytest.mark.slow
def test_changed_rules_change_all_that_follows(tmp_path):
    """Both changes of rules.py, in constants and functions: all quick tests of them pass."""
    make_assignment.copy_project(tmp_path)
    changes = [
        ("tests/rules.py", "ROUND = math.ceil", "ROUND = math.floor"),
        ("tests/rules.py", "LATER_TOKEN_FIRST = False", "LATER_TOKEN_FIRST = True"),
        ("moe.py", "math.ceil(round(", "math.floor(round("),
        ("moe.py", "priority.argsort(descending=True, stable=True)",
         "priority.argsort(stable=True).flip(0)"),
    ]
    for file, old, new in changes:
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old} in {file}: make_assignment.py names it"
        (tmp_path / file).write_text(text.replace(old, new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-m"]
    command += ["(capacity or expert_choice or soft) and not slow", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "tests"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
