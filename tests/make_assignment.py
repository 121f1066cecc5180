"""Make an assignment: copy the project and remove what is to be written.

    python tests/make_assignment.py ../homework top_k combine     without the functions of these two

concepts.py has all concepts, in teaching order. In the copy each function of the concepts keeps its
signature and its docstring, which is the task. Its body becomes `raise NotImplementedError`.
ASSIGNMENT.md is the handout, with a plan, a rubric and room for your rules. Solutions and the
history stay here. To try an assignment before you hand it out, grade the solution and the blanks:
the first scores in each concept, the second in none.

    python tests/grade.py . ../homework --against ../homework

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
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from blanks import blank, find
from concepts import BY_NAME, CONCEPTS, PLAN, functions_of

ROOT = Path(__file__).resolve().parent.parent
PROJECT = """
    moe.py vit.py convnext.py eval.py train.py inspect_experts.py requirements.txt README.md
    .gitignore .github/*.* tests/benchmark.py tests/gpu_check.sh tests/checks.py tests/concepts.py
    tests/conftest.py tests/forked.py tests/rules.py tests/test_moe.py tests/test_other_routers.py
    tests/test_models.py tests/test_eval.py tests/test_robustness.py tests/test_train.py
    tests/test_processes.py tests/test_inspect.py tests/test_gpu.py
""".split()
README_HEAD = "This is an assignment: start with ASSIGNMENT.md."
START = """# Assignment

| to be filled in by your instructor | |
|---|---|
| hand in until | |
| hand in by | |
| rules for working together, for code of others and for language models | |

## The layer in one example

The letters below are those of all files. This is the beginning of moe.py:

```
{example}
```

## Set up, once

You need Python 3.10 or newer. The installation takes 5.6 GB on Linux. For a CPU alone (1 GB) first
install torch and torchvision as <https://pytorch.org/get-started/locally/> says for "CPU".

```sh
python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && . .venv/bin/activate
```

## How to work

Write the functions below. The docstring is the task, and each test checks one claim and says it in
its docstring. A function that is not written yet raises `NotImplementedError`.

- Write into the bodies only. Keep all names, signatures and decorators.
- **A helper function or an import outside of a body is lost in grading**, though your own tests
  pass: put it inside the body that needs it.
- Use tensor operations, not a Python loop over tokens. A loop over experts or over the K choices is
  fine. Make new tensors on the device of the input: a test runs on the device "meta", which has
  shapes but no numbers.
- Word error messages as you like, with the values the tests ask for.

```sh
# one concept, in seconds: stops at the next thing to learn
python -m pytest -x -m {first}
# all concepts of this assignment
python -m pytest -x -m "{mine}"
# everything, a minute or two, with a line per concept: hundreds fail at first
python -m pytest -q --tb=no -rN
# before you hand in: silent if Python can parse it
python -m py_compile {files}
```
"""
COMMON = """
`args` are the parsed flags. `config` is a namespace of all flags and recipe values, as
`settle()` in train.py leaves it. `run` is a `Run` of train.py; look there for what it holds.
`device` is a torch.device, `dtype` torch.float32 or torch.bfloat16.
"""
PLAN_HEAD = """
## Plan

In this order: later concepts use earlier ones. The hours are estimates.

| concept | hours | to discuss |
|---|---|---|
"""
END = """
## What to hand in

- your {files}
- answers.md, in which you answer each question of the plan, under the name of its concept

## How it is graded

The bodies of the functions above are taken from your {files}, and nothing else is. For each concept
they are put into a fresh copy. There all other functions are right, so a mistake in one concept
does not cost another. **A file that Python cannot parse scores 0 in everything that is in it.**
A concept scores if all its tests that are not marked `edge` pass. Edge tests try more than numbers:
another device, no loop over tokens, no tokens at all, NaN. They count together, as one part.
Our tests are used, perhaps with some you have not seen.

| part | share | full marks |
|---|---|---|
| concepts | 55% | all tests of the concept pass; each concept counts the same |
| edges | 5% | all tests marked `edge` pass |
| answers | 25% | each question answered in your own words, with an example of yours |
| code | 15% | a shape comment at each reshape, comments say why, no dead code |
"""

# ---------------------------------------------------------------- the handout

def source_of(file):
    """Return the source of a program of this project, such as "moe"."""
    return (ROOT / f"{file}.py").read_text(encoding="utf-8")


def write_task(file, path, described):
    """Return the part of the handout for one function.

    The docstring of a class comes before its first method. `described`: the classes so far.
    """
    node, owner = find(source_of(file), path)
    text, described_by = "", ""
    if owner is not None:
        described_by = f"As the docstring of {owner.name} says."
        if (file, owner.name) not in described:
            described.add((file, owner.name))
            about = ast.get_docstring(owner) or ""
            text = f"\n### class `{owner.name}` in {file}.py\n\n```\n{about}\n```\n"
    decorators = "".join(f"@{ast.unparse(decorator)}\n" for decorator in node.decorator_list)
    signature = f"{decorators}def {path}({ast.unparse(node.args)})"
    task = ast.get_docstring(node) or described_by
    return f"{text}\n### `{path}` in {file}.py\n\n```\n{signature}\n\n{task}\n```\n"


def write_plan(names):
    """Return a table of concepts with hours and questions, and the sum of hours."""
    rows = [f"| {name} | {PLAN[name].hours} | {PLAN[name].question} |\n" for name in names]
    hours = sum(PLAN[name].hours for name in names)
    return f"{PLAN_HEAD}{''.join(rows)}\nHours in all: {hours}.\n"


def write_handout(names):
    """Return the text of ASSIGNMENT.md. names: concepts in teaching order."""
    functions = [function for name in names for function in functions_of(name)]
    files = list(dict.fromkeys(f"{file}.py" for file, _ in functions))
    example = ast.get_docstring(ast.parse(source_of("moe")))
    parts = [START.format(example=example, first=names[0], mine=" or ".join(names),
                          files=" ".join(files))]
    if set(files) - {"moe.py", "vit.py", "convnext.py"}:  # the words that only the programs use
        parts.append(COMMON)
    described = set()
    for name in names:
        concept = BY_NAME[name]
        parts.append(f"\n## {name}\n\n{concept.lesson}\n\nTest it: `python -m pytest -m {name}`")
        given = ", ".join(need for need in concept.needs.split() if need not in names)
        parts.append(f" ({given}: given)\n" if given else "\n")
        parts += [write_task(*function, described) for function in functions_of(name)]
    parts.append(write_plan(names))
    parts.append(END.format(files=", ".join(files)))
    return "".join(parts)


# ---------------------------------------------------------------- the copy

def copy_project(out):
    """Copy what a student gets, still complete.

    Named file by file: private tests, solutions, runs and data stay here.
    """
    for path in [path for pattern in PROJECT for path in ROOT.glob(pattern)]:
        copy = out / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    readme = (out / "README.md").read_text(encoding="utf-8")  # without what is for us
    readme = re.sub(r"## Make it an assignment\n.*?(?=## )", "", readme, flags=re.DOTALL)
    readme = re.sub(r"- \*\*Changed the code\?\*\*.*?\n(?=- |\n)", "", readme, flags=re.DOTALL)
    (out / "README.md").write_text(f"{README_HEAD}\n\n{readme}", encoding="utf-8")


def blanked(names):
    """Return {file: source} of the programs in which these concepts are, with their blanks."""
    concepts = {}  # {file: {path of a function: its concept}}
    for name in names:
        for file, path in functions_of(name):
            concepts.setdefault(file, {})[path] = name
    return {file: blank(source_of(file), paths) for file, paths in concepts.items()}


def check(out, names):
    """Raise ValueError if the assignment cannot be made."""
    possible = [concept.name for concept in CONCEPTS if concept.functions]
    for name in names:
        if name not in possible:
            raise ValueError(f"unknown concept {name!r}: expected one of {', '.join(possible)}")
    if out.name in possible:
        raise ValueError(f"{out} is a concept: the folder to write comes first")
    if out.exists():
        raise ValueError(f"{out} exists already: give a folder that does not, it will be made")
    if ROOT in out.resolve().parents:
        raise ValueError(f"{out} is inside the project, where its tests would be found with ours:"
                         " give a folder outside")


def make(out, names):
    """Write the assignment. Raise ValueError, before anything is written, if it cannot be made."""
    check(out, names)
    names = [name for name in BY_NAME if name in names]  # in teaching order
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as place:  # complete, or not there at all
        copy = Path(place) / out.name
        copy_project(copy)
        for file, source in blanked(names).items():
            (copy / f"{file}.py").write_text(source, encoding="utf-8")
        (copy / "ASSIGNMENT.md").write_text(write_handout(names), encoding="utf-8")
        os.rename(copy, out)


# ---------------------------------------------------------------- the tests of a project

def files_with_tests(concepts, folder=ROOT):
    """Return the test files of a project that have tests of these concepts: less to load."""
    mark = re.compile(rf"mark\.({'|'.join(concepts)})\b")
    return [str(path) for path in sorted((folder / "tests").glob("test_*.py"))
            if mark.search(path.read_text(encoding="utf-8"))]


def read_results(file):
    """Return {test: what conftest.py wrote about it} of a file that --results names."""
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {line["test"]: line for line in lines}


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Copy the project without some functions.")
    parser.add_argument("out", type=Path, help="folder to write, must not exist")
    parser.add_argument("concepts", nargs="+", metavar="concept",
                        help="what is to be written: names of tests/concepts.py")
    return parser.parse_args(argv)


def main(args):
    make(args.out, args.concepts)
    print(f"written to {args.out}: start with ASSIGNMENT.md")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
