"""Grade what students have written: concept by concept, by our own copy of the tests.

    python tests/make_assignment.py --grade alice bob --against ../homework

From a submission only the BODIES of the blanked functions are taken. Nothing at its module level
runs, and its tests, decorators and default values are ignored. For each concept its bodies go into
a fresh copy of this project, in which all other functions are ours: a wrong dispatch does not cost
combine. The tests of the concept run there in a process of their own: with an empty environment, a
limit of time, and referee.py. A concept scores 1 if all of its tests pass, else 0.

Solution, tests and rules are those of the project that runs the command, not those of the
assignment: run it in the project that made the assignment. Its share of the mark is that for
working code. Read the answers and the code yourself, by the rubric in ASSIGNMENT.md.

This keeps out short tricks, not an attacker. The process runs as you: it can read and write what
you can, use the network, and search its own memory for the referee's secret. Run it in a sandbox:
a container or virtual machine without network, without this repository's history, and without
other submissions.
"""

import ast
import csv
import io
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

from blanks import blank, body_of, find, parameters, replace_body
from concepts import BY_NAME

TESTS = Path(__file__).resolve().parent
LIMIT = 600  # seconds for all runs of one concept's tests
RUNS = ["plain spoiled", "spoiled plain spoiled"]  # see referee.py
# Words that a body seldom needs. They cost nothing, but where ours does without them somebody
# should read it.
LOOK = set(
    "os sys gc inspect ctypes pytest testing subprocess importlib builtins exec eval open globals"
    " setattr __import__ __dict__ __class__ __globals__ __main__ _getframe referee modules unittest"
    " atexit".split()
)

# ---------------------------------------------------------------- from a submission to a copy


def blanked_concepts(assignment):
    """Return the names of the concepts that are to be written in an assignment's folder."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(assignment.glob("*.py"))]
    marks = re.findall(r'NotImplementedError\("(\w+): write [\w.]+"\)', "\n".join(sources))
    names = [name for name in BY_NAME if name in marks]
    if not names:
        raise ValueError(f"nothing is to be written in {assignment}: expected an assignment")
    return names


def read_submission(submission, file):
    """Return the source of FILE.py in a submission: a folder, or the one file itself."""
    path = submission if submission.suffix == ".py" else submission / f"{file}.py"
    with tokenize.open(path) as source:  # as Python reads it: byte order mark, coding line
        return source.read()


def graft(ours, path, concept, theirs):
    """Put the body of a function in `theirs` into `ours`, both sources of a file.

    Return (the new source, ""). If the body cannot be used, return the source with a blank and the
    reason.
    """
    try:
        wanted, found = parameters(ours, path), parameters(theirs, path)
        if found != wanted:
            raise ValueError(f"{path} has the parameters {found}: expected {wanted}")
        source = replace_body(ours, path, body_of(theirs, path))
        compile(source, path, "exec")  # a `nonlocal` that has lost its function, and the like
        return source, ""
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        return blank(ours, path, concept), f"{path}: {error}"


def suspicious_words(source, path):
    """Return the words in a function that somebody should look at."""
    nodes = list(ast.walk(find(source, path)[0]))
    words = {node.id for node in nodes if isinstance(node, ast.Name)}
    words |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    words |= {node.name.split(".")[0] for node in nodes if isinstance(node, ast.alias)}
    return sorted(words & LOOK)


def write_copy(folder, concept, submission, copy_project):
    """Write a project with the submission's bodies of one concept. None: with our own.

    Return (reasons why a body is missing, words to look at).
    """
    copy_project(folder)
    for private in [TESTS / "referee.py", *TESTS.glob("test_private*.py")]:
        shutil.copy(private, folder / "tests")
    missing, look = [], []
    for function in BY_NAME[concept].functions.split() if submission else []:
        file, _, path = function.partition(".")
        ours = (folder / f"{file}.py").read_text(encoding="utf-8")
        try:
            theirs = read_submission(submission, file)
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            theirs = ""
            missing.append(f"{file}.py: {error}")
        source, reason = graft(ours, path, concept, theirs)
        (folder / f"{file}.py").write_text(source, encoding="utf-8")
        if reason:
            missing.append(reason)
        else:
            look += set(suspicious_words(theirs, path)) - set(suspicious_words(ours, path))
    return missing, sorted(set(look))


# ---------------------------------------------------------------- run


def run_concept(folder, concept, limit, runs):
    """Run a concept's tests in a copy: {(test, spoiled): its report by referee.py}.

    runs: one of RUNS. After `limit` seconds the process is killed, and so is everything that it has
    started. Reports sent before count.
    """
    secret = secrets.token_hex(16)
    command = [sys.executable, "tests/referee.py", concept, *BY_NAME[concept].functions.split()]
    with tempfile.TemporaryFile() as channel:
        process = subprocess.Popen(
            command, cwd=folder, env={}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=channel, stderr=subprocess.DEVNULL)
        try:
            process.communicate(f"{secret} {runs}\n".encode(), timeout=limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # also children that are still running
            except OSError:
                pass  # all have ended
            process.wait()
        channel.seek(0)
        lines = channel.read().decode(errors="replace").splitlines()
    return read_reports(lines, secret)


def read_reports(lines, secret):
    """Return {(test, spoiled): report} of the lines that carry the secret.

    Of two reports the one that the test passed stays: it must never pass when spoiled.
    """
    reports = {}
    for line in lines:
        try:
            report = json.loads(line)
            key = report["test"], report["spoiled"]
            if report["secret"] == secret and (key not in reports or report["passed"]):
                reports[key] = report
        except (ValueError, KeyError, TypeError):
            pass  # written by somebody else
    return reports


def judge(expected, reports):
    """Compare the reports of a submission with those of our own code.

    Return (tests passed, tests that count, why it is not all right or "").

    The tests that count are those that pass with our code. Those that fail when our answers are
    spoiled must also fail when the submission's are.
    """
    counting = [key for key, ours in expected.items() if not key[1] and ours["passed"]]
    must_fail = [key for key, ours in expected.items() if key[1] and not ours["passed"]]
    passed = [key for key in counting if reports.get(key, {}).get("passed")]
    blind = [test for test, spoiled in must_fail if reports.get((test, spoiled), {}).get("passed")]
    unsent = [key for key in counting + must_fail if key not in reports]
    problem = ""
    if blind:
        problem = f"{len(blind)} tests pass whatever the answer is, such as {blind[0]}: read it"
    elif unsent:
        problem = f"the process ended or was stopped, {len(unsent)} results were not reported"
    elif len(passed) < len(counting):
        first = next(key for key in counting if key not in passed)
        problem = f"{first[0]}: {summary(reports[first]['message'])}"
    return len(passed), len(counting), problem


def summary(message):
    """Return the first line of a test's message, and its hint if it has one."""
    first, _, more = message.strip().partition("\n")
    return " ".join([first, *re.findall("^Hint: .*", more, re.MULTILINE)])


# ---------------------------------------------------------------- all submissions


def grade_concept(concept, submission, expected, copy_project, limit):
    """Return the result of one concept of a submission as a dict for JSON."""
    with tempfile.TemporaryDirectory() as folder:
        missing, look = write_copy(Path(folder), concept, submission, copy_project)
        reports = run_concept(folder, concept, limit, secrets.choice(RUNS))
    passed, tests, problem = judge(expected, reports)
    score = int(passed == tests and not problem and not missing)
    note = "; ".join(filter(None, [*missing, problem]))
    return dict(score=score, passed=passed, tests=tests, note=note, look=look)


def grade_submission(submission, expected, copy_project, limit):
    """Return the results of all concepts of a submission as a dict for JSON.

    expected: {concept: what expect() returns}.
    """
    concepts = {
        concept: grade_concept(concept, submission, reports, copy_project, limit)
        for concept, reports in expected.items()
    }
    score = sum(result["score"] for result in concepts.values())
    return dict(submission=name_of(submission), score=score, concepts=concepts)


def expect(concept, copy_project, limit):
    """Return the reports for our own code. Raise ValueError if its tests do not work here."""
    with tempfile.TemporaryDirectory() as folder:
        write_copy(Path(folder), concept, None, copy_project)
        expected = run_concept(folder, concept, limit, RUNS[0])
    passed = sum(ours["passed"] for (_, spoiled), ours in expected.items() if not spoiled)
    can_fail = any(not ours["passed"] for (_, spoiled), ours in expected.items() if spoiled)
    if not passed or not can_fail:
        raise ValueError(
            f"{concept}: the tests do not pass with our own code, or do not end within {limit} s:"
            f" try `python -m pytest -m {concept}`"
        )
    return expected


def expect_all(concepts, copy_project, limit):
    """Return the reports for our own code, as {concept: what expect() returns}."""
    expected = {}
    for number, concept in enumerate(concepts, 1):
        say(f"checking our own solution: {concept} {number}/{len(concepts)}")
        expected[concept] = expect(concept, copy_project, limit)
    return expected


# ---------------------------------------------------------------- grades.csv and grades.json


def check(submissions, assignment):
    """Raise ValueError if something cannot be graded."""
    if not (assignment / "ASSIGNMENT.md").exists():
        raise ValueError(f"no ASSIGNMENT.md in {assignment}: give the folder that was handed out")
    functions = " ".join(BY_NAME[name].functions for name in blanked_concepts(assignment)).split()
    sources = sorted({f"{function.split('.')[0]}.py" for function in functions})
    names = []
    for submission in submissions:
        if not submission.exists():
            raise ValueError(f"no submission at {submission}: expected a folder, or a .py file")
        if submission.suffix == ".py" and len(sources) > 1:  # it would be taken for all of them
            raise ValueError(f"{submission} is one file, but the assignment is in "
                             f"{', '.join(sources)}: expected a folder")
        if name_of(submission) in names:
            raise ValueError(
                f"{submission} is the second submission named {name_of(submission)}: expected a"
                " folder per student"
            )
        names.append(name_of(submission))


def name_of(submission):
    """Return the name of a submission's folder or file, however its path is typed."""
    return os.path.basename(os.path.abspath(submission))


def csv_of(results):
    """Return the text of the CSV file: a line per submission, "" without any."""
    table = io.StringIO()
    lines = csv.writer(table)
    lines.writerows(["submission", *result["concepts"], "score"] for result in results[:1])
    lines.writerows(map(row_of, results))
    return table.getvalue()


def row_of(result):
    """Return the cells of a submission's line: its name, a score per concept, their sum."""
    scores = [concept["score"] for concept in result["concepts"].values()]
    return [result["submission"], *scores, result["score"]]


def read_results(out, concepts):
    """Return the results that an earlier run has left in OUT.json, or [].

    Raise ValueError if the files are not as a run with these concepts leaves them.
    """
    files = [out.with_suffix(suffix) for suffix in (".csv", ".json")]
    texts = [file.read_text(encoding="utf-8") if file.exists() else "" for file in files]
    try:
        results = json.loads(texts[1] or "[]")
        ours = all(list(result["concepts"]) == concepts for result in results)
        ours = ours and csv_of(results).splitlines() == texts[0].splitlines()
    except (ValueError, KeyError, TypeError):  # written by something else
        ours = False
    if not ours:
        raise ValueError(
            f"{files[0]} or {files[1].name} exists already, not as this command leaves them: move"
            " both away, earlier grades may be in them"
        )
    return results


def write_results(results, out):
    """Write OUT.csv and OUT.json. Each is whole at any time, also if this is stopped."""
    for suffix, text in ((".csv", csv_of(results)), (".json", json.dumps(results, indent=2))):
        part = out.with_suffix(f"{suffix}.part")
        part.write_text(text, encoding="utf-8", newline="")
        part.replace(out.with_suffix(suffix))


def say(text):
    """Print a line of progress: to stderr, where it is not among the grades."""
    print(text, file=sys.stderr, flush=True)


def grade(submissions, assignment, copy_project, limit=LIMIT, out=Path("grades")):
    """Grade submissions. Print a CSV line for each, and write OUT.csv and, with notes, OUT.json.

    Those that are in OUT.csv already stay: after Ctrl-C the same command does the rest.
    copy_project: function that writes a complete project into a folder.
    Raise ValueError, before anything runs, if something cannot be graded.
    """
    check(submissions, assignment)
    concepts = blanked_concepts(assignment)
    results = read_results(out, concepts)
    table = out.with_suffix(".csv")
    known = [result["submission"] for result in results]
    left = [submission for submission in submissions if name_of(submission) not in known]
    if known:
        say(f"students in {table} already, who stay as they are: {len(known)}")
    try:
        expected = expect_all(concepts if left else [], copy_project, limit)
        print(",".join(["submission", *concepts, "score"]), flush=True)
        for number, submission in enumerate(left, 1):
            say(f"grading {name_of(submission)} {number}/{len(left)}")
            results.append(grade_submission(submission, expected, copy_project, limit))
            write_results(results, out)
            print(",".join(map(str, row_of(results[-1]))), flush=True)
    except KeyboardInterrupt:
        say(f"stopped: students in {table}: {len(results)}")
        raise
