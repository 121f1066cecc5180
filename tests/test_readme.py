"""Does README.md say what is so? Its commands are run, its flags exist, its counts are right.

So do the pages in .github, to which it leads.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import torchvision

import eval as evaluation
import forked
import grade
import inspect_experts
import make_assignment
import train
from checks import few_pictures
from concepts import BY_NAME, CONCEPTS
from make_assignment import ROOT

pytestmark = [
    pytest.mark.course,
    pytest.mark.skipif(not shutil.which("bash"), reason="bash reads the README's commands")]

TEXT = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *(ROOT / ".github").glob("*.md"))}
PROGRAMS = {"train.py": train, "eval.py": evaluation, "inspect_experts.py": inspect_experts,
            "tests/make_assignment.py": make_assignment, "tests/grade.py": grade}
SAY = """python() { printf '%q ' "$@"; echo; }
torchrun() { while [[ $1 == -* ]]; do shift; done; python "$@"; }
srun() { "$@"; }
scontrol() { echo node1; }
pip() { :; }
python3() { :; }
"""  # instead of running a command, say its words: so bash itself expands loops and variables


def commands():
    """Return all commands of the pages, in sh blocks (loops unrolled) and in sentences, in order.

    A command is a list of words, python left out.
    """
    found, text = [], "\n".join(PAGES.values())
    for block in map("".join, re.findall(r"```sh\n(.*?)```|`(python [^`]+)`", text, re.DOTALL)):
        block = block.replace(".venv/bin/", "")
        said = subprocess.run(["bash", "-c", SAY + block], capture_output=True, text=True)
        assert said.returncode == 0 and not said.stderr, f"{said.stderr}\nin\n{block}"
        found += [shlex.split(line) for line in said.stdout.splitlines()]
    return found


def test_every_command_has_flags_that_exist(capsys):
    """The parser of each program takes its command. Tests are chosen by names of concepts."""
    seen = set()
    for program, *arguments in commands():
        seen.add(program)
        if program in PROGRAMS:
            try:
                PROGRAMS[program].parse_args(arguments)
            except SystemExit:
                said = capsys.readouterr().err.splitlines()[-1]
                pytest.fail(f"python {program} {shlex.join(arguments)}: {said}")
        elif program == "-m":
            assert arguments[0] == "pytest"
            chosen = arguments[arguments.index("-m") + 1] if "-m" in arguments else ""
            assert set(chosen.split()) <= {*BY_NAME, "or", "not", "slow"}, arguments
        else:
            others = [["tests/benchmark.py"], ["tests/benchmark.py", "--models"],
                      ["tests/study.py"]]
            assert [program, *arguments] in others
    assert {*PROGRAMS, "-m", "tests/benchmark.py"} <= seen


def python_block(name):
    """Return the Python block of the README below the comment with this name."""
    [block] = re.findall(rf"<!-- python: {name} -->\n```python\n(.*?)```", TEXT, re.DOTALL)
    return block


def test_the_lines_that_classify_a_picture(tmp_path, monkeypatch, capsys):
    """As printed, they name the best classes of a picture with the probabilities of eval.py."""
    monkeypatch.chdir(tmp_path)
    data = ["--data", "shapes:64", "--model", "vit_nano", "--epochs", "1", "--out", "runs/mine"]
    few_pictures(monkeypatch, train=64, val=64)
    train.main(train.parse_args(data))
    image = evaluation.open_dataset("shapes:1", "train")[0][0]
    torchvision.io.write_jpeg(image, "photo.jpg")
    arguments = ["runs/mine/best.pt", "--data", "photo.jpg", "--json", "said.json"]
    evaluation.main(evaluation.parse_args(arguments))
    capsys.readouterr()
    exec(python_block("classify"), {})
    [said] = json.loads(Path("said.json").read_text())["results"][0]["pictures"]
    expected = [f"{name}: {probability:.1%}" for name, probability in said["best"][:2]]
    assert capsys.readouterr().out.splitlines() == expected


def test_the_mixer_takes_a_step(monkeypatch):
    """As printed, for one step: then every expert has a gradient, and so does its router."""
    few_pictures(monkeypatch, train=64, val=64)
    names = {}
    exec(python_block("mixer").replace("range(1000)", "range(1)"), names)
    logits, routings = names["model"](torch.randn(4, 3, 32, 32))
    (logits.sum() + names["balance_loss"](routings)).backward()
    for block in names["model"].blocks:
        assert block.channels.router.codes.grad.abs().sum() > 0
        assert all(expert[0].weight.grad is not None for expert in block.channels.experts)
    assert len(routings) == 4 and logits.shape == (4, 16)


# what needs data, weights or runs that a laptop does not have
ELSEWHERE = ("/imagenet", "torchvision", "a/best.pt", "best.pt")


@pytest.mark.slow  # takes 10 s
def test_the_commands_for_a_laptop_run_in_their_order(tmp_path, monkeypatch, capsys):
    """On few pictures, for one epoch, in one process: what a command needs has been made before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
    monkeypatch.setattr(os, "fsync", lambda file: None)  # nor waits for the disk
    few_pictures(monkeypatch, train=64, val=16)
    for name in ("cat", "dog"):
        Path(f"path/to/folder/{name}").mkdir(parents=True)
    for i, (image, *_) in enumerate(evaluation.open_dataset("shapes", "train")):
        torchvision.io.write_jpeg(image, f"path/to/folder/{('cat', 'dog')[i % 2]}/{i}.jpg")
    torchvision.io.write_jpeg(image, "path/to/photo.jpg")
    done = 0
    for program, *arguments in dict.fromkeys(map(tuple, commands())):  # each once
        if program not in ("train.py", "eval.py", "inspect_experts.py"):
            continue
        if any(word.startswith(ELSEWHERE) for word in arguments):
            continue
        if program == "train.py":
            arguments += ["--epochs", "1", "--workers", "0"]
        PROGRAMS[program].main(PROGRAMS[program].parse_args(arguments))
        capsys.readouterr()
        done += 1
    assert done >= 9
    assert os.path.exists("inspect/report.html") and os.path.exists("photo/report.html")


@pytest.mark.slow
@forked.needs_fork
def test_a_mistake_is_one_line_and_status_2(tmp_path):
    """Each program, run as a script: one line on stderr, nothing on stdout, nothing written."""
    mistakes = {
        "train.py --data shapes:100 --experts 2 --k 3": "error: k = 3: ",
        "eval.py nowhere.pt --data shapes": "error: nowhere.pt is not a checkpoint",
        "inspect_experts.py no.pt --data shapes --out out": "error: no.pt is not a checkpoint",
        "tests/make_assignment.py out no_such_concept": "error: unknown concept",
        "tests/grade.py nobody --against nowhere": "error: no ASSIGNMENT.md in "}
    (tmp_path / "here").mkdir()
    for i, (command, expected) in enumerate(mistakes.items()):
        file, *arguments = command.split()
        run = forked.start(
            forked.program, ROOT / file, arguments, tmp_path / "here", tmp_path / str(i))
        assert forked.finish(run) == [2], command
        out, error = ((tmp_path / f"{i}.{stream}").read_text() for stream in ("out", "err"))
        assert out == "" and error.count("\n") == 1 and error.startswith(expected), command
    assert os.listdir(tmp_path / "here") == []


def test_the_assignments_can_be_made(tmp_path, monkeypatch, capsys):
    """Each ready-made assignment is written where the command says."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made = [arguments for program, *arguments in commands()
            if program == "tests/make_assignment.py"]
    for arguments in made:
        make_assignment.main(make_assignment.parse_args(arguments))
    assert len(list(tmp_path.glob("*/ASSIGNMENT.md"))) >= 2


def test_the_number_of_concepts():
    """Those that can be an assignment: all but the course itself."""
    assert set(re.findall(r"(\d+) concepts", TEXT)) == {
        str(sum(bool(concept.functions) for concept in CONCEPTS))
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Every link and picture of a page that is a file of the project is there."""
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_readme_is_short():
    """At most 200 lines and 12 kB can be seen at once: all else is folded, or in .github."""
    seen = re.sub(r"<details>.*?</details>\n", "", TEXT, flags=re.DOTALL)
    assert seen.count("\n") <= 200 and len(seen.encode()) <= 12_000


def test_ci_runs_the_command_for_tests():
    """.ci/run takes the command behind the mark, which is there once and installs first."""
    command = re.findall(r"<!-- test command -->\n```sh\n(.*)\n```", TEXT)
    assert len(command) == 1 and command[0].endswith("pytest -q")
    assert "pip install -r requirements.txt" in command[0]
