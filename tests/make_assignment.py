"""Make an assignment: copy the project and remove what is to be written.

    python tests/make_assignment.py --list                        the concepts, in teaching order
    python tests/make_assignment.py ../homework top_k combine     without the functions of these two
    python tests/make_assignment.py --solution-check ../homework top_k combine    and run the tests

In OUT each function of the concepts keeps its signature and its docstring, which is the task. Its
body becomes `raise NotImplementedError`. OUT/ASSIGNMENT.md is the handout. This file, the tests of
the tests and the history stay here.
"""

import argparse
import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from concepts import BY_NAME, CONCEPTS, all_needs

ROOT = Path(__file__).resolve().parent.parent
PROJECT = (
    "moe.py vit.py convnext.py eval.py train.py inspect_experts.py requirements.txt README.md"
    " .gitignore .ci/run .github/routing.png tests/benchmark.py tests/concepts.py tests/conftest.py"
    " tests/forked.py tests/test_moe.py tests/test_other_routers.py tests/test_models.py"
    " tests/test_eval.py tests/test_robustness.py tests/test_train.py tests/test_processes.py"
    " tests/test_inspect.py"
).split()
COMMON = """`args` are the parsed flags. `config` is a namespace of all flags and recipe values, as
`resolve()` in train.py returns it. `run` is a `Run` of train.py; look there for what it holds.
`device` is a torch.device, `dtype` torch.float32 or torch.bfloat16."""
START = """# Assignment

Write the functions below: each docstring is the task, each test checks one claim and says it in its
docstring.
A function that is not written yet raises `NotImplementedError`. Keep all names and signatures,
helpers included.

```sh
python -m pytest -x -m "{mine}"   # stops at the next thing to learn
python -m pytest -m "not slow"   # everything that is quick: what still waits for yours?
```
"""
END = """
## How it is graded

By the tests marked {names}, each with the same weight: your {files}, and nothing else,
is copied over a fresh assignment, and `python -m pytest -m "{mine}" --junitxml=grade.xml` is run
there. The summary counts per concept. All other tests must pass at the end as well.
"""

# ---------------------------------------------------------------- find, blank, describe a function


parse = functools.cache(ast.parse)


def find(source, path):
    """Find a function in the syntax tree: return its node, and the node of its class or None.

    path: "function" or "Class.method".
    """
    owner, node = None, parse(source)
    for name in path.split("."):
        owner = node
        node = next((child for child in node.body if getattr(child, "name", None) == name), None)
        if node is None:
            raise ValueError(
                f"there is no {path} in the file: has tests/concepts.py another name for it?"
            )
    return node, owner if isinstance(owner, ast.ClassDef) else None


def blank(source, path, concept):
    """Return the source of a file with one function's body replaced.

    Signature, docstring and all other lines stay as they are.
    """
    node, _ = find(source, path)
    lines = source.splitlines(keepends=True)
    first = node.body[0]
    documented = ast.get_docstring(node)
    if first.lineno == node.lineno:
        raise ValueError(f"{path} is a function of one line: give its body a line of its own")
    start = first.end_lineno if documented else first.lineno - 1
    # comments above a statement belong to the body
    while not documented and lines[start - 1].lstrip().startswith("#"):
        start -= 1
    indent = " " * first.col_offset
    lines[start : node.end_lineno] = [
        f'{indent}raise NotImplementedError("{concept}: write {path}")\n'
    ]
    return "".join(lines)


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
    readme = (out / "README.md").read_text(encoding="utf-8")  # without the section for instructors
    readme = re.sub(r"## Make it an assignment\n.*?(?=## )", "", readme, flags=re.DOTALL)
    (out / "README.md").write_text(readme, encoding="utf-8")


def blank_concepts(out, names):
    """Blank the functions of the concepts in a copy, in place."""
    for name in names:
        for function in BY_NAME[name].functions.split():
            file, _, path = function.partition(".")
            text = blank((out / f"{file}.py").read_text(encoding="utf-8"), path, name)
            (out / f"{file}.py").write_text(text, encoding="utf-8")


def write_handout(names):
    """The text of ASSIGNMENT.md."""
    mine = " or ".join(names)
    parts = [START.format(mine=mine)]
    functions = [function for name in names for function in BY_NAME[name].functions.split()]
    files = list(dict.fromkeys(f"{function.split('.')[0]}.py" for function in functions))
    if files != ["moe.py"]:  # the words that only the programs use
        parts.append(f"\n{COMMON}\n")
    described = set()  # classes whose docstring has been printed
    for name in names:
        concept = BY_NAME[name]
        needs = ", ".join(concept.needs.split())
        parts.append(f"\n## {name}\n\n{concept.lesson}\n\nTest it: `python -m pytest -m {name}`")
        parts.append(f" (it needs {needs})\n" if needs else "\n")
        for function in concept.functions.split():
            file, _, path = function.partition(".")
            source = (ROOT / f"{file}.py").read_text(encoding="utf-8")
            signature, text = handout(source, path)
            node, owner = find(source, path)
            if owner is not None and (file, owner.name) in described:
                text = ast.get_docstring(node) or f"As {owner.name} above says."
            described.add((file, owner.name if owner else None))
            parts.append(f"\n### `{path}` in {file}.py\n\n```\n{signature}\n\n{text}\n```\n")
    parts.append(END.format(names=", ".join(names), files=", ".join(files), mine=mine))
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
        cases = [
            case
            for case in ElementTree.parse(report).iter("testcase")
            if case.find("skipped") is None
        ]
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
    return parser.parse_args(argv)


def main(args):
    if args.list:
        for concept in CONCEPTS:
            print(f"{concept.name:<12} {concept.lesson}")
            print(f"{'':<12} {concept.functions or '(nothing to write)'}")
            if concept.needs:
                print(f"{'':<12} needs {concept.needs}")
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
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
