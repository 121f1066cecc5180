"""Grade what students have written: concept by concept, by our own copy of the tests.

    python tests/grade.py submissions/* --against ../homework

From a submission only the BODIES of the blanked functions are taken. For each concept they go into
a fresh copy of this project, in which all other functions are ours: a wrong dispatch does not cost
combine. The quick tests of the concept run there, in a process with an empty environment and a
limit of time, for about 3 s of a processor (n = 112, the concepts of the layer), as many at a time
as there are processors. Solution, tests and rules are those of the project that runs the command.

A line per student is added to ../homework-grades.csv, with these columns per concept: 1 if all of
its tests pass, else 0; tests passed "of" tests run. Tests marked `edge` (a device, NaN, ...) are
left out there, and are summed up over all concepts in the column "edges". "note" says what failed
first. Who is in the file already is left alone: after Ctrl-C the same command does the rest. To
grade someone anew, delete the line.

**This is no sandbox, and no defence against cheating.** The code runs as you: grade in a container
without network, without this repository's history and without other submissions. A body can change
pytest, and so pass every test: read the code that you grade. Words to look for are pytest, sys,
torch.testing, gc, and any double underscore.
"""

import argparse
import ast
import contextlib
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from blanks import blank, body_of, replace_bodies
from concepts import BY_NAME, functions_of
from make_assignment import copy_project, files_with_tests, read_results

TESTS = Path(__file__).resolve().parent
LIMIT = 120  # seconds for one concept's tests

# ---------------------------------------------------------------- from a submission to a copy

def read_concepts(assignment):
    """Return the names of the concepts that an assignment's handout asks for."""
    handout = assignment / "ASSIGNMENT.md"
    if not handout.exists():
        raise ValueError(f"no ASSIGNMENT.md in {assignment}: give the folder that was handed out")
    headings = re.findall(r"^## (\w+)$", handout.read_text(encoding="utf-8"), re.MULTILINE)
    names = [name for name in BY_NAME if name in headings]
    if not names:
        raise ValueError(f"{handout} has no concept of tests/concepts.py as a heading: expected one"
                         " that make_assignment.py has written")
    return names


def read_submission(submission, files):
    """Return ({file: source}, reasons) of a submission: a folder, or the one file itself.

    A file that Python cannot read or parse is left out, and there is a reason for it.
    """
    sources, reasons = {}, []
    for file in files:
        path = submission / f"{file}.py" if submission.is_dir() else submission
        try:
            with tokenize.open(path) as lines:  # as Python does: byte order mark, coding line
                sources[file] = lines.read()
            ast.parse(sources[file], f"{file}.py")
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            sources.pop(file, None)
            reasons.append(f"{file}.py cannot be read, its tests were not run: {error}")
    return sources, reasons


def write_copy(folder, concept, sources):
    """Write a project with the bodies of one concept from `sources`. Return notes, a list.

    Functions of a file that is not among the sources stay ours. A body that cannot be used leaves
    a blank, and there is a note.
    """
    copy_project(folder)
    for private in TESTS.glob("test_private*.py"):
        shutil.copy(private, folder / "tests")
    notes = []
    for file, path in functions_of(concept):
        if file in sources:
            ours = (folder / f"{file}.py").read_text(encoding="utf-8")
            try:
                source = replace_bodies(ours, {path: body_of(sources[file], path)})
                compile(source, path, "exec")  # a `nonlocal` that has lost its function
            except (ValueError, SyntaxError) as error:
                source = blank(ours, {path: concept})
                notes.append(f"{path}: {error}")
            (folder / f"{file}.py").write_text(source, encoding="utf-8")
    return notes


# ---------------------------------------------------------------- run the tests of a copy

def run_tests(folder, concept, limit):
    """Run a concept's quick tests in a copy. Return {test: what conftest.py wrote about it}.

    After `limit` seconds the process is ended. Tests that were done by then count.
    """
    results = folder / "results.jsonl"
    results.touch()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", concept,
               f"--results={results}", *files_with_tests([concept], folder)]
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, cwd=folder, env={}, timeout=limit, **quiet)
    return read_results(results)


class Score(NamedTuple):
    passed: int  # tests of the numbers
    tests: int
    passed_edges: int  # tests marked edge
    edges: int
    note: str  # what failed first

    @property
    def points(self):
        return int(self.passed == self.tests)


def judge(expected, found):
    """Compare results with those of our own code, which passed: return a Score."""
    failed = [test for test in expected if not found.get(test, {}).get("passed")]
    edges = [test for test, ours in expected.items() if ours["edge"]]
    failed_edges = [test for test in failed if test in edges]
    tests, wrong = len(expected) - len(edges), len(failed) - len(failed_edges)
    note = ""
    if failed:
        message = found.get(failed[0], {}).get("message", "no result, the process was stopped")
        note = f"{failed[0].partition('::')[2]}: {shorten(message)}"
        if "NameError" in note:
            note += " (was it defined outside of a body?)"
    return Score(tests - wrong, tests, len(edges) - len(failed_edges), len(edges), note)


def shorten(message):
    """Return the first line of a test's message, and its hint if it has one."""
    first, _, more = message.strip().partition("\n")
    return " ".join([first, *re.findall("^Hint: .*", more, re.MULTILINE)])


def run_ours(limit, concept):
    """Return the results of our own code. Raise ValueError if its tests do not work here."""
    with tempfile.TemporaryDirectory() as folder:
        write_copy(Path(folder), concept, {})
        found = run_tests(Path(folder), concept, limit)
    if not found or not all(ours["passed"] for ours in found.values()):
        raise ValueError(
            f"{concept}: the tests do not pass with our own code, or do not end within {limit} s:"
            f" try `python -m pytest -m {concept}`")
    return found


def grade_concept(sources, limit, concept, ours):
    """Return the Score of a concept. Where one of its files is not in `sources`, no test runs."""
    if not {file for file, _ in functions_of(concept)} <= set(sources):
        return judge(ours, {})._replace(note="")
    with tempfile.TemporaryDirectory() as folder:
        notes = write_copy(Path(folder), concept, sources)
        score = judge(ours, run_tests(Path(folder), concept, limit))
    return score._replace(note="; ".join([*notes, *filter(None, [score.note])]))


# ---------------------------------------------------------------- all submissions

def name_of(submission):
    """Return the name of a submission's folder or file, however its path is typed."""
    return os.path.basename(os.path.abspath(submission))


def check(submissions, files):
    """Raise ValueError if something cannot be graded."""
    names = []
    for submission in submissions:
        if not submission.exists():
            raise ValueError(f"no submission at {submission}: expected a folder, or a .py file")
        if submission.is_file() and len(files) > 1:  # it would be taken for all of them
            raise ValueError(f"{submission} is one file, but the assignment is in several"
                             f" ({', '.join(files)}): expected a folder")
        if name_of(submission) in names:
            raise ValueError(f"{submission} is the second submission named {name_of(submission)}:"
                             " expected a folder per student")
        names.append(name_of(submission))


def start_table(table, concepts):
    """Write the first line of the table if it is not there. Return the names in its other lines."""
    columns = [column for concept in concepts for column in (concept, f"{concept} tests")]
    header = ["submission", "score", "edges", *columns, "note"]
    if not table.exists() or not table.stat().st_size:
        add_line(table, header)
    with open(table, newline="", encoding="utf-8") as file:
        first, *rows = csv.reader(file)
    if first != header:
        raise ValueError(f"{table} has other columns, perhaps of another assignment: move it away,"
                         " or give another --table")
    return [row[0] for row in rows if row]


def add_line(table, cells):
    """Add a line to a CSV file. What is in it stays, also what somebody has corrected."""
    with open(table, "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(cells)


def row_of(submission, reasons, scores):
    """Return the cells of a student's line. scores: {concept: Score}."""
    cells, notes = [], list(reasons)
    for concept, score in scores.items():
        cells += [score.points, f"{score.passed} of {score.tests}"]  # 3/4 would become a date
        if score.note:
            notes.append(f"{concept}: {score.note}")
    points, passed, edges = (sum(map(attrgetter(name), scores.values()))
                             for name in ("points", "passed_edges", "edges"))
    return [name_of(submission), points, f"{passed} of {edges}", *cells, "; ".join(notes)]


def grade(submissions, assignment, table, limit=LIMIT, jobs=1):
    """Grade submissions, `jobs` processes at a time, and add a line for each to the table.

    Raise ValueError, before anything runs, if something cannot be graded.
    """
    concepts = read_concepts(assignment)
    files = sorted({file for concept in concepts for file, _ in functions_of(concept)})
    check(submissions, files)
    known = start_table(table, concepts)
    left = [submission for submission in submissions if name_of(submission) not in known]
    if len(left) < len(submissions):
        print(f"{len(submissions) - len(left)} are in {table} already: delete a line to regrade it")
    with ThreadPoolExecutor(jobs) as pool:
        try:
            ours = list(pool.map(partial(run_ours, limit), concepts))
            for submission in left:
                sources, reasons = read_submission(submission, files)
                scores = list(pool.map(partial(grade_concept, sources, limit), concepts, ours))
                row = row_of(submission, reasons, dict(zip(concepts, scores)))
                add_line(table, row)
                print(f"{row[0]}: {row[1]} of {len(concepts)} concepts, edges {row[2]}", flush=True)
            print(f"table: {table}")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # of no use after Ctrl-C or a mistake


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Grade folders, or .py files if all is in one.")
    parser.add_argument("submissions", nargs="+", type=Path, metavar="SUBMISSION")
    parser.add_argument("--against", type=Path, required=True, metavar="ASSIGNMENT",
                        help="the folder that was handed out")
    parser.add_argument("--table", type=Path, metavar="FILE",
                        help="the CSV file to add to (ASSIGNMENT-grades.csv)")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS",
                        help=f"for the tests of one concept ({LIMIT})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(),
                        help="processes at a time (one per processor)")
    return parser.parse_args(argv)


def main(args):
    assignment = args.against.resolve()
    table = args.table or assignment.with_name(f"{assignment.name}-grades.csv")
    grade(args.submissions, assignment, table, args.limit, args.jobs)


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        print("stopped: the same command does the rest", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
