"""Does README.md say what is so? Its commands are run, its flags exist, its counts are right."""

import functools
import glob
import os
import re
import shlex
import shutil
import signal
import subprocess

import pytest

import eval as evaluation
import forked
import inspect_experts
import make_assignment
import train
from concepts import BY_NAME, CONCEPTS
from make_assignment import ROOT

pytestmark = [
    pytest.mark.course,
    pytest.mark.skipif(not shutil.which("bash"), reason="bash reads the README's commands"),
]

TEXT = (ROOT / "README.md").read_text()
PROGRAMS = {"train.py": train, "eval.py": evaluation, "inspect_experts.py": inspect_experts,
            "tests/make_assignment.py": make_assignment}
SAY = """python() { printf '%q ' "$@"; echo; }
torchrun() { while [[ $1 == -* ]]; do shift; done; python "$@"; }
srun() { "$@"; }
scontrol() { echo node1; }
pip() { :; }
python3() { :; }
"""  # instead of running a command, say its words: so bash itself expands loops and variables


def commands():
    """All commands of the README, in sh blocks (loops unrolled) and in sentences: lists of
    words, python left out, in order."""
    found = []
    for block in map("".join, re.findall(r"```sh\n(.*?)```|`(python [^`]+)`", TEXT, re.DOTALL)):
        block = block.replace(".venv/bin/", "")
        said = subprocess.run(
            ["bash", "-c", SAY + block], capture_output=True, text=True, timeout=60
        )
        assert said.returncode == 0 and not said.stderr, f"{said.stderr}\nin\n{block}"
        found += [shlex.split(line) for line in said.stdout.splitlines()]
    return found


def test_every_command_has_flags_that_exist(capsys):
    """The parser of each program takes its command. The benchmark has no flags."""
    seen = set()
    for program, *arguments in commands():
        seen.add(program)
        if program in PROGRAMS:
            try:
                PROGRAMS[program].parse_args(arguments)
            except SystemExit:
                pytest.fail(
                    f"python {program} {shlex.join(arguments)}:"
                    f" {capsys.readouterr().err.splitlines()[-1]}"
                )
        elif program == "-m":
            assert arguments[0] == "pytest"
            concepts = (
                set(re.findall(r"\w+", " ".join(arguments[arguments.index("-m") + 1 :][:1])))
                if "-m" in arguments
                else set()
            )
            assert concepts <= {*BY_NAME, "or", "not", "slow"}, arguments
        else:
            assert program == "tests/benchmark.py" and not arguments, program
    assert {*PROGRAMS, "-m", "tests/benchmark.py"} <= seen


# not on a laptop
ELSEWHERE = ("/imagenet", "path/to", "/shared", "a/best.pt", "best.pt", "runs/dense/best.pt", "../")


@pytest.mark.slow
def test_the_commands_for_a_laptop_run_in_their_order(tmp_path, monkeypatch, capsys):
    """On few pictures, for one epoch, in one process: what a command needs has been made before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
    monkeypatch.setattr(os, "fsync", lambda file: None)  # nor waits for the disk
    monkeypatch.setattr(
        evaluation, "shapes_size", lambda spec, split: (16, 1) if split == "train" else (16, 2)
    )
    # and not 500 at a time
    monkeypatch.setattr(evaluation, "draw_shapes", functools.partial(evaluation.draw_shapes, n=16))
    monkeypatch.setattr(evaluation, "images_per_second", lambda *_: 1.0)
    done = 0
    for program, *arguments in dict.fromkeys(map(tuple, commands())):  # each once
        if program not in ("train.py", "eval.py", "inspect_experts.py") or any(
            # seed 0 will do
            word.startswith(ELSEWHERE) or re.match(r"study/.*-[12]\b", word) for word in arguments
        ):
            continue
        files = [
            name
            for word in arguments
            for name in (sorted(glob.glob(word))[:3] if "*" in word else [word])
        ]
        quick = ["--epochs", "1"] if program == "train.py" else []
        PROGRAMS[program].main(PROGRAMS[program].parse_args(files + quick))
        capsys.readouterr()
        done += 1
    assert done > 30
    assert os.path.exists("inspect/report.html")


@pytest.mark.slow
@forked.needs_fork
def test_a_mistake_is_one_line_and_status_2(tmp_path):
    """Each program, run as a script: one line on stderr, nothing on stdout, nothing written."""
    mistakes = {
        "train.py --data shapes:100 --experts 2 --k 3": "error: k = 3: ",
        "eval.py nowhere.pt --data shapes": "error: no checkpoint at nowhere.pt",
        "inspect_experts.py nowhere.pt --data shapes --out out": (
            "error: no checkpoint at nowhere.pt"
        ),
        "tests/make_assignment.py out no_such_concept": "error: unknown concept",
    }
    (tmp_path / "here").mkdir()
    for i, (command, expected) in enumerate(mistakes.items()):
        file, *arguments = command.split()
        run = forked.start(
            forked.program, ROOT / file, arguments, tmp_path / "here", tmp_path / str(i)
        )
        assert forked.finish(run) == [2], command
        out, error = ((tmp_path / f"{i}.{stream}").read_text() for stream in ("out", "err"))
        assert out == "" and error.count("\n") == 1 and error.startswith(expected), command
    assert os.listdir(tmp_path / "here") == []


def test_the_assignments_can_be_made(tmp_path, monkeypatch, capsys):
    """Each ready-made assignment is written where the command says."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made = [
        arguments
        for program, *arguments in commands()
        if program == "tests/make_assignment.py" and "--grade" not in arguments
    ]
    for arguments in made:
        make_assignment.main(
            make_assignment.parse_args([word for word in arguments if word != "--solution-check"])
        )
    assert len(list(tmp_path.glob("*/ASSIGNMENT.md"))) >= 3


def test_the_number_of_concepts():
    """Those that can be an assignment: all but the course itself."""
    assert set(re.findall(r"(\d+) concepts", TEXT)) == {
        str(sum(bool(concept.functions) for concept in CONCEPTS))
    }


def test_links_lead_somewhere():
    """Every link to a file of the project has one."""
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_ci_runs_the_command_for_tests():
    """.ci/run takes the command behind the mark, which is there once and installs first."""
    command = re.findall(r"<!-- test command -->\n```sh\n(.*)\n```", TEXT)
    assert (
        len(command) == 1
        and "pip install -r requirements.txt" in command[0]
        and command[0].endswith("pytest -q")
    )
