"""Do the pages and the README say what came out of the study? (study.py)"""

import json
import math
import re
import shlex
import shutil
import subprocess

import pytest

import eval as evaluation
import inspect_experts
import study
import study_figure
import train
from make_assignment import ROOT
from vit import vit_nano

PAGE = (ROOT / ".github" / "study.md").read_text()
pytestmark = pytest.mark.course


def study_of(tmp_path, *lines):
    """Return the Study of lines (kind, name, seed, what it found)."""
    text = "\n".join(json.dumps({kind: name, "seed": seed} | found)
                     for kind, name, seed, found in lines)
    (tmp_path / "results").write_text(text)
    return study.Study(tmp_path / "results")


def test_a_gain_by_hand(tmp_path):
    """The differences between runs of the same seed are 1, 2, 3: their mean and its interval."""
    runs = [("E8", 0, 5), ("E8", 1, 7), ("E8", 2, 9),
            ("dense", 2, 6), ("dense", 1, 5), ("dense", 0, 4), ("dense", 3, 100)]
    lines = [("run", name, seed, dict(top1=top1)) for name, seed, top1 in runs]
    gain = study_of(tmp_path, *lines).gain("E8")
    assert gain == (2, 1, 3)
    assert gain.half == pytest.approx(4.303 / math.sqrt(3)), "Student's t with 2 degrees of freedom"
    assert gain.signed() == "+2.0 (-0.5 to 4.5)"


def test_a_gain_in_equal_time_by_hand(tmp_path):
    """A sparse step takes 1.25 times as long: when the dense run has made 100, it has made 80.

    Of the steps from 60 to 100, in which it rises from 40 to 60%, these are the half: 50%.
    """
    dense = dict(top1=35, curve=[[60, 20, 1], [100, 35, 1]])
    sparse = dict(top1=60, curve=[[60, 40, 1], [100, 60, 1]])
    times = dict(dense=[0.4, 0.1, 9.0], sparse=[0.5, 0.2, 9.0])  # medians 0.4 and 0.5
    found = study_of(tmp_path, ("run", "dense", 0, dense), ("run", "E8", 0, sparse),
                     ("speed", "E8", 0, times))
    assert found.gain_in_equal_time("") == pytest.approx((50 - 35, 0, 1))


def test_the_pages_are_those_of_the_results():
    """`python tests/study.py` would write the same files again."""
    found = study.Study()
    assert study.fill(found, PAGE) == PAGE
    assert (ROOT / ".github" / "study.svg").read_text() == study_figure.draw(found)


def test_a_result_is_one_line():
    """No run stands in study.jsonl twice."""
    lines = [json.loads(line) for line in open(study.RESULTS)]
    keys = [tuple(line.items())[:2] for line in lines]  # (kind, name), ("seed", number)
    assert len(set(keys)) == len(keys)


@pytest.mark.skipif(not shutil.which("bash"), reason="bash runs the study")
def test_the_loop_makes_every_row_of_the_tables(tmp_path):
    """All commands of study.sh have flags that exist, and no row waits for a run that never comes.

    In an empty folder, where nothing is done yet, it says its commands in place of running them.
    """
    say = 'python() { printf "%q " "$@"; echo; }; . ' + shlex.quote(f"{ROOT}/tests/study.sh")
    said = subprocess.run(["bash", "-c", say], capture_output=True, text=True, cwd=tmp_path)
    programs = {"train.py": train, "eval.py": evaluation, "inspect_experts.py": inspect_experts}
    made = {kind: set() for kind in study.KINDS}
    for program, *words in map(shlex.split, said.stdout.splitlines()):
        if program in programs:
            programs[program].parse_args(words)
        else:
            flag, kind, folder = words
            assert (program, flag) == ("tests/study.py", "--add")
            made[kind].add(folder.removeprefix("study/").rpartition("-")[0])
    rows = set(re.findall(r"^\|[^|]*\| `(.*?)` \|", PAGE, re.MULTILINE))
    assert rows == made["run"] | made["follows"]
    assert made["speed"] | made["shifts"] <= rows
    found = study.Study()
    for kind, names in zip(made, (found.runs, found.shifts, found.follows, found.speed)):
        assert set(names) <= made[kind], "results of no command"


SAID = """\
it then knows {top1 512-E8}% after {steps 512-E8} steps of 512 pictures, and the dense one
{top1 512-dense} ({n 512-E8 512-dense}, [all runs](.github/study.md)).

a sparse step takes {longer 512-}% longer, and when the dense run ends, experts lead by {ahead 512-}
points (interval: {span 512-}), at twice the width by {ahead 512-micro-};

in steps of 64, where its fixed time weighs more, neither leads, or the dense one.

The paper's ViT-S gains 0.4 points on ImageNet

with {parameters}."""  # the paper's ViT-S: 79.8, and 80.2 with 8 experts, one per token


def parameters():
    """Return how many times the parameters of vit_nano eight experts have."""
    counts = [evaluation.count_parameters(vit_nano(56, moe_layers=layers, num_experts=8, k=1))[0]
              for layers in ("last2", "none")]
    return f"{counts[0] / counts[1]:.1f} times the parameters"


def test_what_the_readme_says_came_out():
    """The numbers of its section are those of the results: SAID is the text around them.

    At most five sentences and 15 numbers, each of which stands in SAID.
    """
    found = study.Study()

    def n(*names):
        """Return of how many seeds, if it is the same for all of these runs."""
        [count] = {len(found.runs[name]) for name in names}
        return f"n = {count}"

    def longer(start):
        seconds = found.step_seconds(start)
        return f"{100 * (seconds['E8'] / seconds['dense'] - 1):.0f}"

    fill = dict(top1=lambda name: f"{found.top1(name)}", n=n, longer=longer,
                steps=lambda name: f"{found.curve(name)[-1][0]:.0f}",
                ahead=lambda start: f"{found.gain_in_equal_time(start).mean:.1f}",
                span=lambda start: found.gain_in_equal_time(start).interval(),
                parameters=parameters)

    def filled(match):
        function, *names = match[1].split()
        return fill[function](*names)

    readme = " ".join((ROOT / "README.md").read_text().split())
    text = readme.split("(.github/study.svg)")[1].split(" Try it:")[0].strip()
    assert len(re.findall(r"[.?](?= |$)", text)) <= 5, "sentences"
    assert len(re.findall(r"\d[\d.,]*", text)) <= 15
    for words in SAID.split("\n\n"):
        words = re.sub(r"\{(.*?)\}", filled, " ".join(words.split()))
        assert words in text, words
        text = text.replace(words, "", 1)
    assert not re.search(r"\d", text), "a number that nothing here computes"


def test_the_verdicts_of_the_readme():
    """Experts lead in steps of 512, at both widths; in those of 64 nobody, or the dense model."""
    found = study.Study()
    for start in ("512-", "512-micro-"):
        for gain in (found.gain(f"{start}E8", f"{start}dense"), found.gain_in_equal_time(start)):
            assert gain.n >= 5 and gain.mean - gain.half > 0, gain
    for dense, sparse, leads in [
            ("equal-dense", "E8", False), ("micro-longer-dense", "micro-E8", False),
            ("pico-longer-dense", "pico-E8", True)]:
        gain = found.gain(dense, sparse)
        assert gain.n >= 5 and (gain.mean > gain.half) == leads and gain.mean > 0


@pytest.mark.parametrize("size, name, steps", [
    ("", "equal-dense", 2540), ("pico-", "pico-longer-dense", 2760),
    ("micro-", "micro-longer-dense", 2440)])
def test_equal_time(size, name, steps):
    """So many steps without experts take as long as 2,000 with eight, within 5%."""
    found = study.Study()
    seconds = found.step_seconds(size)
    assert steps * seconds["dense"] == pytest.approx(2000 * seconds["E8"], rel=0.05)
    data = {line["data"] for line in found.runs[name].values()}
    assert data == {f"flags:{steps // 2 * 64}"}, "batches of 64, twice"


@pytest.mark.parametrize("options, more", [
    (dict(num_experts=32, k=1), 2), (dict(num_experts=8, k=1, router="expert_choice"), 13),
    (dict(num_experts=8, k=1, router="soft"), 17), (dict(num_experts=8, k=2), 31),
    (dict(num_experts=1, k=1, expert_ratio=32), 211)], ids=str)
def test_what_experts_cost_in_the_study(options, more):
    """study.md says how many % more multiply-adds than without experts."""
    dense = evaluation.count_flops(vit_nano(56), 32)
    sparse = evaluation.count_flops(vit_nano(56, moe_layers=[1, 3], **options), 32)
    assert round(100 * sparse / dense) == 100 + more


def test_the_wide_mlps_have_as_many_parameters_as_eight_experts():
    """Within 1%: only the router and some biases differ."""
    wide, sparse = (vit_nano(56, moe_layers=[1, 3], k=1, num_experts=E, expert_ratio=ratio)
                    for E, ratio in ((1, 32), (8, 4)))
    counts = [evaluation.count_parameters(model)[0] for model in (wide, sparse)]
    assert counts[0] / counts[1] == pytest.approx(1, abs=0.01)
