"""make_assignment.py and grade.py: what a student gets, and what becomes of a submission."""

import ast
import compileall
import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import grade
import make_assignment
from blanks import blank, body_of, find, replace_bodies
from concepts import BY_NAME, CONCEPTS, functions_of
from make_assignment import ROOT, source_of

pytestmark = pytest.mark.course

FUNCTIONS = [function for concept in CONCEPTS for function in functions_of(concept.name)]
OURS = '''@fast
def f(x, k=1):
    """Ours."""
    # a hint that would give it away
    return x


z = 1
'''

# ---------------------------------------------------------------- blanks

def test_a_blank_keeps_everything_but_the_body():
    """Decorator, signature, docstring and what is around stay. Comments of the body go."""
    raises = 'raise NotImplementedError("roots: write f")'
    body = "# a hint that would give it away\n    return x"
    assert blank(OURS, {"f": "roots"}) == OURS.replace(body, raises)
    undocumented = "class A:\n    def f(x):\n        # why\n        return x\n"
    assert "why" not in blank(undocumented, {"A.f": "roots"})
    with pytest.raises(ValueError, match="a function of one line"):
        blank("def f(x): return x\n", {"f": "c"})


def test_a_body_and_nothing_else_is_taken():
    """Default values, decorators, annotations, other functions and module code stay behind."""
    theirs = '''import os
os._exit(0)

@print
def f(x: print(1), k=print(2)) -> print(3):
    """Theirs."""
    def helper(y):
        return y + 1

    return helper(x)
'''
    source = replace_bodies(OURS, {"f": body_of(theirs, "f")})
    body = "    def helper(y):\n        return y + 1\n    return helper(x)\n"
    assert source == f'@fast\ndef f(x, k=1):\n    """Ours."""\n{body}\n\nz = 1\n'
    assert body_of("def f(x): return 1\ndef f(x): return 2", "f") == "return 2", "as in Python"


@pytest.mark.parametrize("theirs, words", [
    ("def g(probs, k): return 1", "no top_k_gates in"),
    ("class top_k_gates: pass", "top_k_gates is not a function"),
    ("async def top_k_gates(probs, k): return 1", "top_k_gates is not a function"),
    ("def top_k_gates(probs, k): nonlocal x", "nonlocal")])
def test_a_body_that_cannot_be_taken_leaves_a_blank(theirs, words, tmp_path):
    """There is a note, and the other functions are graded all the same."""
    [note] = grade.write_copy(tmp_path, "top_k", {"moe": theirs})
    blank_source = blank(source_of("moe"), {"top_k_gates": "top_k"})
    assert (tmp_path / "moe.py").read_text("utf-8") == blank_source and words in note


def test_all_our_bodies_can_be_taken():
    """Whatever is in them (decorators, nested functions, f-strings), they come out as they are."""
    for file, path in FUNCTIONS:
        node, _ = find(source_of(file), path)
        body = node.body[1:] if ast.get_docstring(node) else node.body
        taken = ast.parse(body_of(source_of(file), path)).body
        assert list(map(ast.dump, taken)) == list(map(ast.dump, body)), path


# ---------------------------------------------------------------- what a student gets

@pytest.mark.parametrize("file, path", FUNCTIONS)
def test_a_docstring_is_a_handout(file, path):
    """Each function to be written has a docstring, its own or that of its class.

    In the files of the model it has a shape or a type, for whoever has only the docstring."""
    node, owner = find(source_of(file), path)
    text = "".join(ast.get_docstring(each) or "" for each in (node, owner) if each)
    assert text
    if file in ("moe", "vit", "convnext"):
        kinds = r"\([A-Z1.][^)]*\)|scalar|\bint\b|ints\b|bool|dtype|indices|weights|state dict"
        assert re.search(kinds, text), f"{path}: neither a shape nor a type"


@pytest.fixture(scope="module")
def homework(tmp_path_factory):
    """An assignment of two concepts, given in the wrong order."""
    out = tmp_path_factory.mktemp("course") / "homework"
    make_assignment.main(make_assignment.parse_args([str(out), "combine", "top_k"]))
    return out


def test_an_assignment_by_hand(homework):
    """The functions are gone, solutions stay here, and all files compile."""
    files = "ASSIGNMENT.md README.md requirements.txt tests"
    files += " convnext.py eval.py inspect_experts.py moe.py train.py vit.py"
    assert {path.name for path in homework.iterdir() if path.name[0] != "."} == set(files.split())
    ours = {"make_assignment.py", "grade.py", "mutants.py", "test_the_tests.py"}
    assert not ours & set(os.listdir(homework / "tests"))
    assert not (homework / ".git").exists() and compileall.compile_dir(homework, quiet=1)
    source = (homework / "moe.py").read_text("utf-8")
    blanks = re.findall('raise NotImplementedError\\("(.*)"\\)', source)
    assert blanks == ["top_k: write top_k_gates", "combine: write combine"]


def test_the_handout_by_hand(homework):
    """In this order: example, setup, one concept, the tasks in teaching order, plan, grading."""
    text = (homework / "ASSIGNMENT.md").read_text("utf-8")
    parts = ["| hand in until |", "A worked example: T = 3", "Python 3.10", "5.6 GB",
             "pytest -x -m top_k\n", 'pytest -x -m "top_k or combine"', "pytest -q", "## top_k",
             "### `top_k_gates` in moe.py", "Choose the k most probable experts", "## combine",
             "(dispatch: given)", "| top_k | 1 | What", "Hours in all: 3.", "- your moe.py\n",
             "cannot parse scores 0"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "parsed flags" not in text, "nothing here has args or a run"
    assert "parsed flags" in make_assignment.write_handout(["recipe"])
    classes = re.findall("^### class (.*) in", make_assignment.write_handout(["layer"]), re.M)
    assert classes == ["`MoE`"], "once, although three of its methods are to be written"


def test_the_readme_of_a_copy_is_for_students(homework):
    """It leads to ASSIGNMENT.md, has no part for instructors, and all its links and pictures."""
    readme = (homework / "README.md").read_text("utf-8")
    assert readme.startswith("This is an assignment: start with ASSIGNMENT.md.\n\n# Sparse")
    assert not re.search("make_assignment|Changed the code", readme)
    assert "\n- **Out of memory?**" in readme and "\n## The paper and this code" in readme
    for target in re.findall(r"\]\(([^)#]+)\)", re.sub(r"```.*?```", "", readme, flags=re.DOTALL)):
        assert target.startswith("https://") or (homework / target).exists(), target
    rules = (homework / "tests/rules.py").read_text("utf-8")
    assert not re.search("cop(y|ied)|course|instructor|solution|chang", rules)


def test_a_failure_leaves_nothing_half_written(tmp_path, monkeypatch):
    """A table that names a function which is not there: no folder with the solutions in it."""
    wrong = BY_NAME["top_k"]._replace(functions="moe.top_k_gates moe.top_q_gates")
    monkeypatch.setitem(BY_NAME, "top_k", wrong)
    with pytest.raises(ValueError, match="no top_q_gates in"):
        make_assignment.make(tmp_path / "homework", ["top_k"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments, expected", [
    ([".", "top_k"], "exists already"),
    (["new", "top_q"], "unknown concept 'top_q': expected one of router, top_k"),
    (["new", "course"], "unknown concept 'course'"),
    (["top_k", "combine"], "top_k is a concept: the folder to write comes first"),
    ([str(ROOT / "homework"), "top_k"], "is inside the project")])
def test_an_impossible_assignment_writes_nothing(arguments, expected, tmp_path, monkeypatch):
    """A folder that exists, a concept that does not: refused before anything is copied."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=expected):
        make_assignment.main(make_assignment.parse_args(arguments))
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- grading

@pytest.mark.parametrize("encoding, first", [("utf-8-sig", ""), ("latin-1", "# coding: latin-1\n")])
def test_a_submission_is_read_as_python_reads_it(encoding, first, tmp_path):
    """A byte order mark, as some editors write, and a coding line change nothing."""
    source = first + "name = 'Zoë'\n"
    (tmp_path / "moe.py").write_text(source, encoding=encoding, newline="\r\n")
    assert grade.read_submission(tmp_path, ["moe"]) == ({"moe": source}, [])


def result(passed, edge=False, message=""):
    return dict(passed=passed, edge=edge, message=message)


def test_a_score_by_hand():
    """All numbers are right, so the concept scores; of the edges one is not."""
    ours = {f"t::{name}": result(True, edge=name > "b") for name in "abcd"}
    found = ours | {"t::c": result(False, message="off\n\nDifference: 1\n\nHint: a device?")}
    score = grade.judge(ours, found)
    assert score == (2, 2, 1, 2, "c: off Hint: a device?") and score.points == 1
    del found["t::a"]  # the process ended before, or somebody skipped it
    assert grade.judge(ours, found).points == 0
    assert grade.judge(ours, found).note.startswith("a: no result")


def grade_source(source, folder, limit=60):
    """Grade a moe.py for top_k and capacity. Return the student's line of the table, a dict."""
    (folder / "alice").mkdir()
    (folder / "alice/moe.py").write_text(source, encoding="utf-8")
    (folder / "ASSIGNMENT.md").write_text("# Assignment\n\n## top_k\n\n## capacity\n\n## Plan\n")
    grade.grade([folder / "alice"], folder, folder / "grades.csv", limit)
    with open(folder / "grades.csv", newline="") as file:
        [row] = csv.DictReader(file)
    return row


@pytest.mark.slow
def test_an_honest_mistake_and_a_loop_over_tokens(tmp_path):
    """An unstable sort costs one test, and so capacity, but not top_k. There a loop over tokens has
    right numbers: it costs an edge and no concept."""
    source = source_of("moe").replace("descending=True, stable=True", "descending=True")
    loop = "best = [sorted(range(len(p)), key=lambda e: -p[e])[:k] for p in probs]\n"
    loop += "experts = torch.tensor(best).view(len(probs), k)\n"
    loop += "return probs.gather(1, experts), experts"
    row = grade_source(replace_bodies(source, {"top_k_gates": loop}), tmp_path)
    assert (row["score"], row["top_k"], row["capacity"]) == ("1", "1", "0")
    passed, tests = map(int, row["capacity tests"].split(" of "))
    right, edges = map(int, row["edges"].split(" of "))
    assert tests - passed == edges - right == 1 and passed > 10
    assert "capacity: test_ties_go_to_the_earlier_token: " in row["note"]
    assert "top_k: test_all_tokens_at_once_on_the_device_of_the_input[top_k]: " in row["note"]


@pytest.mark.slow
def test_what_cannot_be_parsed_is_said_once_and_not_run(tmp_path, monkeypatch):
    """Python could not import the file either: 0 in all that is in it."""
    monkeypatch.setattr(grade, "run_tests", lambda *_: pytest.fail("tests were run"))
    monkeypatch.setattr(grade, "run_ours", lambda *_: {"t::a": result(True)})
    row = grade_source("def top_k_gates(probs, k)\n", tmp_path)
    assert (row["score"], row["top_k tests"], row["capacity tests"]) == ("0", "0 of 1", "0 of 1")
    assert row["note"].count("moe.py") == 2 and "expected ':' (moe.py, line 1)" in row["note"]


@pytest.mark.slow
def test_a_body_has_no_environment_and_a_limit_of_time(tmp_path, monkeypatch):
    """Keys in the environment of the one who grades stay there. A loop for ever is ended."""
    monkeypatch.setenv("SECRET_TOKEN", "1")
    monkeypatch.setattr(grade, "run_ours", lambda *_: {"t::a": result(True)})
    seen = tmp_path / "seen"
    body = f"import os\nopen({str(seen)!r}, 'w').write(str('SECRET_TOKEN' in os.environ))\n"
    source = replace_bodies(source_of("moe"), {"top_k_gates": body + "while True: pass"})
    row = grade_source(source, tmp_path, limit=8)
    assert row["score"] == "0" and "top_k: a: no result" in row["note"]
    assert seen.read_text() == "False"


@pytest.fixture
def instant(tmp_path, monkeypatch):
    """Let each submission score without running its tests. carol's is stopped by Ctrl-C."""
    def grade_concept(sources, *_):
        if "carol" in sources["moe"]:
            raise KeyboardInterrupt
        return grade.Score(3, 3, 0, 1, "")

    monkeypatch.setattr(grade, "grade_concept", grade_concept)
    monkeypatch.setattr(grade, "run_ours", lambda *_: {})
    monkeypatch.chdir(tmp_path)
    for name in ("homework", "alice", "bob", "carol", "late/alice"):
        os.makedirs(name)
        Path(name, "moe.py").write_text(f"# {name}")
    Path("homework/ASSIGNMENT.md").write_text("## top_k\n")
    command = ["--against", "homework"]
    return lambda *names: grade.main(grade.parse_args([*names, *command]))


def test_after_ctrl_c_the_same_command_does_the_rest(instant, capsys):
    """A line is added per student, beside the handout. Lines that are there stay, also changed
    ones. However a path is typed, the name is that of its folder."""
    with pytest.raises(KeyboardInterrupt):
        instant("./bob/", "carol", "alice")
    table = Path("homework-grades.csv")
    table.write_text(table.read_text().replace("bob,1", "bob,7"))
    Path("carol/moe.py").write_text("")
    instant("bob", "carol", "bob/../alice")
    assert table.read_text().splitlines() == [
        "submission,score,edges,top_k,top_k tests,note", "bob,7,0 of 1,1,3 of 3,",
        "carol,1,0 of 1,1,3 of 3,", "alice,1,0 of 1,1,3 of 3,"]
    assert capsys.readouterr().out.count("bob") == 1


@pytest.mark.parametrize("arguments, expected", [
    ("nobody", "no submission at nobody"),
    ("alice late/alice", "late/alice is the second submission named alice"),
    ("alice --against bob", "no ASSIGNMENT.md in .*bob"),
    ("alice --against carol", "has no concept of tests/concepts.py as a heading"),
    ("alice/moe.py --against late", "is one file, but the assignment is in several"),
    ("alice --table other.csv", "other.csv has other columns")])
def test_what_cannot_be_graded_is_refused(arguments, expected, instant):
    """In one line, before any test runs."""
    Path("carol/ASSIGNMENT.md").write_text("## carol\n")
    Path("late/ASSIGNMENT.md").write_text("## placement\n")
    Path("other.csv").write_text("submission,router\n")
    with pytest.raises(ValueError, match=expected):
        grade.main(grade.parse_args(["--against", "homework", *arguments.split()]))


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
         "priority.argsort(stable=True).flip(0)")]
    for file, old, new in changes:
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old} in {file}: make_assignment.py names it"
        (tmp_path / file).write_text(text.replace(old, new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-m"]
    command += ["(capacity or expert_choice or soft) and not slow", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "tests"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
