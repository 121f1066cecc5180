"""Make an assignment: copy the project and remove what is to be written.

    python tests/make_assignment.py --list                        the concepts, in teaching order
    python tests/make_assignment.py ../homework top_k combine     without the functions of these two
    python tests/make_assignment.py --solution-check ../homework top_k combine    and run the tests
    python tests/make_assignment.py --grade alice bob --against ../homework     see grade.py

In OUT each function of the concepts keeps its signature and its docstring, which is the task. Its
body becomes `raise NotImplementedError`. OUT/ASSIGNMENT.md is the handout, with a plan and a
rubric. This file, the tests of the tests and the history stay here.

A solution copied from this project passes, unless you change a rule before you make the assignment.
tests/rules.py has two, and both change `capacity` only. Change all places of a rule, the docstrings
too: they are the handout. Then run `python -m pytest`. The new lines of code are in
tests/test_assignment.py, test_changed_rules_change_all_that_follows.

    rule                      places
    ROUND = math.floor        moe.expert_capacity; its docstring and those of ExpertChoice, with its
                              example, where C becomes 1, and of SoftMoE; 4 slots instead of 5 in
                              tests/test_robustness.py, test_a_limited_capacity
    LATER_TOKEN_FIRST = True  moe.assign_slots and its docstring

Tests of your own may find mistakes that ours miss, but they catch no copy: what is right passes.
Write them into tests/test_private*.py of the project that grades, each with the marker of one
concept. They are used in grading, and students do not get them.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from blanks import blank, find
from concepts import BY_NAME, CONCEPTS, PLAN, all_needs
from grade import LIMIT, grade

ROOT = Path(__file__).resolve().parent.parent
PROJECT = """
    moe.py vit.py convnext.py eval.py train.py inspect_experts.py requirements.txt README.md
    .gitignore .ci/run .github/layer.svg .github/report.png .github/study.svg .github/follows.svg
    .github/study.sh .github/study.py .github/study.jsonl .github/study.md .github/costs.md
    .github/differences.md .github/training.md
    tests/benchmark.py tests/checks.py tests/concepts.py tests/conftest.py tests/forked.py
    tests/rules.py tests/test_moe.py tests/test_other_routers.py tests/test_models.py
    tests/test_eval.py tests/test_robustness.py tests/test_train.py tests/test_processes.py
    tests/test_inspect.py
""".split()
README_HEAD = "This is an assignment: start with ASSIGNMENT.md."
COMMON = """`args` are the parsed flags. `config` is a namespace of all flags and recipe values, as
`resolve()` in train.py returns it. `run` is a `Run` of train.py; look there for what it holds.
`device` is a torch.device, `dtype` torch.float32 or torch.bfloat16."""
START = """# Assignment

Set up, once:

```sh
python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && . .venv/bin/activate
```

Write the functions below. The docstring is the task, and each test checks one claim and says it in
its docstring. A function that is not written yet raises `NotImplementedError`.

- Write into the bodies only. Keep all names, signatures and decorators.
- A helper function or an import of your own goes inside the body that needs it: only the bodies
  are graded.
- Use tensor operations, not a Python loop over tokens. A loop over experts or over the K choices is
  fine. Make new tensors on the device of the input: a test runs on the device "meta", which has
  shapes but no numbers.
- Word error messages as you like, with the values the tests ask for.

```sh
python -m pytest -x -m "{mine}"   # stops at the next thing to learn
python -m pytest   # everything: what still fails?
```
"""
PLAN_HEAD = """
## Plan

In this order: later concepts use earlier ones. The hours are estimates.

"""
END = """
## What to hand in

- your {files}
- answers.md, in which you answer each question of the plan, under the name of its concept

## How it is graded

Each concept counts the same, and scores only if all of its tests pass. The bodies of the functions
above are taken from your {files}, and nothing else is. For each concept they are put into a fresh
copy. There all other functions are right, so a mistake in one concept does not cost another. Our
tests are used, perhaps with some you have not seen.

| part | share | full marks |
|---|---|---|
| concepts | 60% | all tests of the concept pass |
| answers | 25% | each question answered in your own words, with an example of yours |
| code | 15% | a shape comment at each reshape, comments say why, no dead code |
"""

# ---------------------------------------------------------------- the handout


def handout(source, path):
    """Return (signature, docstring) of a function.

    A method has its class's docstring, followed by its own if it has one.
    """
    node, owner = find(source, path)
    text = ast.get_docstring(node) or ""
    if owner is not None:
        text = "\n\n".join(filter(None, [ast.get_docstring(owner), text]))
    decorators = "".join(f"@{ast.unparse(decorator)}\n" for decorator in node.decorator_list)
    return f"{decorators}def {path}({ast.unparse(node.args)})", text


# ---------------------------------------------------------------- the whole project


def copy_project(out):
    """Copy what a student gets, still complete.

    Named file by file: private tests, solutions, runs and data stay here.
    """
    for name in PROJECT:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, out / name)
    readme = (out / "README.md").read_text(encoding="utf-8")  # without what is for us
    readme = re.sub(r"## Make it an assignment\n.*?(?=## )", "", readme, flags=re.DOTALL)
    readme = re.sub(r"- \*\*Changed the code\?\*\*.*?\n(?=- |\n)", "", readme, flags=re.DOTALL)
    (out / "README.md").write_text(f"{README_HEAD}\n\n{readme}", encoding="utf-8")


def blank_concepts(out, names):
    """Blank the functions of the concepts in a copy, in place."""
    for name in names:
        for function in BY_NAME[name].functions.split():
            file, _, path = function.partition(".")
            text = blank((out / f"{file}.py").read_text(encoding="utf-8"), path, name)
            (out / f"{file}.py").write_text(text, encoding="utf-8")


def write_plan(names):
    """Return a table of concepts. From 10 hours on it spreads them over two weeks, ten days."""
    total = sum(PLAN[name].hours for name in names)
    rows, before = [["day", "concept", "hours", "to discuss"], ["---"] * 4], 0
    for name in names:
        day = 1 + 10 * before // total
        before += PLAN[name].hours
        last = max(day, -(-10 * before // total))  # rounded up
        days = f"{day}" if day == last else f"{day} to {last}"
        rows.append([days, name, f"{PLAN[name].hours}", PLAN[name].question])
    first = 0 if total >= 10 else 1
    table = "\n".join(f"| {' | '.join(row[first:])} |" for row in rows)
    return f"{PLAN_HEAD}{table}\n\nHours in all: {total}.\n"


def write_task(function, described):
    """Return the parts of the handout for one function, "file.path". Add it to `described`.

    The first method of a class comes after the docstring of the class, under its own heading.
    """
    file, _, path = function.partition(".")
    source = (ROOT / f"{file}.py").read_text(encoding="utf-8")
    node, owner = find(source, path)
    parts = []
    if owner is not None and (file, owner.name) not in described:
        text = ast.get_docstring(owner) or ""
        parts.append(f"\n### class `{owner.name}` in {file}.py\n\n```\n{text}\n```\n")
        described.add((file, owner.name))
    text = ast.get_docstring(node) or f"As the docstring of {owner.name} says."
    signature, _ = handout(source, path)
    parts.append(f"\n### `{path}` in {file}.py\n\n```\n{signature}\n\n{text}\n```\n")
    return parts


def write_handout(names):
    """Return the text of ASSIGNMENT.md. names: concepts in teaching order."""
    mine = " or ".join(names)
    parts = [START.format(mine=mine)]
    functions = [function for name in names for function in BY_NAME[name].functions.split()]
    files = list(dict.fromkeys(f"{function.split('.')[0]}.py" for function in functions))
    if files != ["moe.py"]:  # the words that only the programs use
        parts.append(f"\n{COMMON}\n")
    described = set()  # functions and classes whose docstring is printed
    for name in names:
        concept = BY_NAME[name]
        needs = ", ".join(concept.needs.split())
        parts.append(f"\n## {name}\n\n{concept.lesson}\n\nTest it: `python -m pytest -m {name}`")
        parts.append(f" (it needs {needs})\n" if needs else "\n")
        for function in concept.functions.split():
            parts += write_task(function, described)
    parts.append(write_plan(names))
    parts.append(END.format(files=", ".join(files)))
    return "".join(parts)


def make(out, names):
    """Write the assignment. Raise ValueError, before anything is written, if it cannot be made."""
    unknown = [name for name in names if name not in BY_NAME or not BY_NAME[name].functions]
    if unknown:
        possible = [concept.name for concept in CONCEPTS if concept.functions]
        raise ValueError(f"unknown concept {unknown[0]!r}: expected one of {', '.join(possible)}")
    if out.name in BY_NAME:
        raise ValueError(
            f"{out} is a concept: the folder to write comes first, as in ../homework {out}"
            f" {' '.join(names)}"
        )
    if out.exists():
        raise ValueError(f"{out} exists already: give a folder that does not, it will be made")
    if ROOT in out.resolve().parents:
        raise ValueError(
            f"{out} is inside the project: give a folder outside, or its tests would be found with"
            " ours"
        )
    names = [name for name in BY_NAME if name in names]  # in teaching order
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as place:  # complete, or not there at all
        copy_project(Path(place) / out.name)
        blank_concepts(Path(place) / out.name, names)
        task = Path(place) / out.name / "ASSIGNMENT.md"
        task.write_text(write_handout(names), encoding="utf-8")
        os.rename(Path(place) / out.name, out)


# ---------------------------------------------------------------- what do the blanks turn?


def run_tests(folder, *flags):
    """Run the tests of a copy of the project in a new process: {test: (concept, passed)}.

    Skipped tests are left out.
    """
    with tempfile.TemporaryDirectory() as place:
        report = os.path.join(place, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider"]
        command += ["-m", "not slow", f"--junitxml={report}", *flags]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode not in (0, 1):  # all passed, some failed
            raise ValueError(
                f"the tests in {folder} cannot be run:"
                f" {(done.stdout + done.stderr).strip().splitlines()[-1]}"
            )
        cases = [case for case in ElementTree.parse(report).iter("testcase")
                 if case.find("skipped") is None]
    return {f"{case.get('classname')}::{case.get('name')}": (
        case.find("properties/property[@name='concept']").get("value"),
        case.find("failure") is None and case.find("error") is None) for case in cases}


def judge(names, complete, blanked):
    """Compare the tests of a complete and a blanked copy, as run_tests() returns them.

    Return (lines to print, whether all is well).

    Well means: complete, all pass; blanked, no test of the concepts passes, and of the others only
    those fail whose concept needs one of them.
    """
    lines, well = [], True
    for concept in CONCEPTS:
        tests = [test for test, (name, _) in complete.items() if name == concept.name]
        turned = [
            test for test in tests if complete[test][1] and not blanked.get(test, (None, False))[1]
        ]
        broken = [test for test in tests if not complete[test][1]]
        may = "some" if all_needs(concept.name) & set(names) else "none"
        if concept.name in names:
            may = "all"
        wrong = broken or (may == "all" and len(turned) < len(tests)) or (may == "none" and turned)
        well = well and not wrong
        if turned or wrong:
            failing = f"; {len(broken)} fail without blanks" if broken else ""
            mark = "   WRONG" if wrong else ""
            count = f"{len(turned):>4} of {len(tests):>3} turn"
            lines.append(f"{concept.name:<12} {count}, expected {may}{failing}{mark}")
            lines += [f"    {test}" for test in turned]
    return lines, well


def solution_check(out, names):
    """Run the quick tests on the assignment and on a complete copy. Print which ones turn."""
    with tempfile.TemporaryDirectory() as place:
        copy_project(Path(place))
        lines, well = judge(names, run_tests(place), run_tests(out))
    print("\n".join(lines))
    print("the blanks turn all tests of their concepts, and no test that needs none of them" * well)
    if not well:
        raise ValueError(
            "the blanks do not turn exactly the tests of their concepts and of those that need them"
        )


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Copy the project without the functions of some concepts."
    )
    parser.add_argument("out", nargs="?", type=Path, help="folder to write, must not exist")
    parser.add_argument(
        "concepts", nargs="*", metavar="concept", help="what is to be written; see --list"
    )
    parser.add_argument("--list", action="store_true", help="print the concepts and stop")
    parser.add_argument("--solution-check", action="store_true",
                        help="then run the tests with and without the blanks (minutes)")
    parser.add_argument("--grade", nargs="+", type=Path, metavar="SUBMISSION",
                        help="grade folders (or .py files, if all is in one) by the solution, the"
                        " tests and the rules of this project; needs --against. A concept"
                        " takes about 5 s of a processor, for our own solution and for each"
                        " student (measured once, with top_k and combine; others differ)")
    parser.add_argument("--against", type=Path, metavar="ASSIGNMENT",
                        help="the folder OUT as it was handed out")
    parser.add_argument("--limit", type=float, default=LIMIT,
                        help=f"seconds for the tests of one concept ({LIMIT})")
    parser.add_argument("--grades", type=Path, default=Path("grades"),
                        help="write this .csv and .json, or go on with them (grades)")
    return parser.parse_args(argv)


def main(args):
    if args.list:
        for concept in CONCEPTS:
            print(f"{concept.name:<12} {concept.lesson}")
            print(f"{'':<12} {concept.functions or '(nothing to write)'}")
            if concept.needs:
                print(f"{'':<12} needs {concept.needs}")
        return
    if args.grade:
        if args.against is None or args.out is not None:
            raise ValueError(
                "expected --grade SUBMISSION ... --against ASSIGNMENT, without OUT and concepts"
            )
        grade(args.grade, args.against, copy_project, args.limit, args.grades)
        return
    if not args.concepts:
        raise ValueError(
            "expected OUT and at least one concept: python tests/make_assignment.py ../homework"
            " top_k"
        )
    make(args.out, args.concepts)
    print(f"written to {args.out}: start with ASSIGNMENT.md, then python -m pytest -x")
    if args.solution_check:
        solution_check(args.out, args.concepts)


if __name__ == "__main__":
    try:
        main(parse_args())
    except BrokenPipeError:  # --list | head
        os._exit(0)
    except KeyboardInterrupt:  # Ctrl-C; grade() has said what is done
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
