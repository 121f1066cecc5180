"""Do the pages and the README say what came out of the study? (.github/study.py)"""

import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import sys

import pytest

import eval as evaluation
import inspect_experts
import train
from make_assignment import ROOT
from vit import vit_micro, vit_nano

sys.path.append(str(ROOT / ".github"))

import study  # noqa: E402, after the path is set
from study import in_words  # noqa: E402

pytestmark = pytest.mark.course


def test_a_gain_by_hand(tmp_path):
    """The differences between runs of the same seed are 1, 2, 3: their mean and its interval."""
    runs = [("E8", 0, 5), ("E8", 1, 7), ("E8", 2, 9),
            ("dense", 2, 6), ("dense", 1, 5), ("dense", 0, 4), ("dense", 3, 100)]
    lines = [json.dumps(dict(run=run, seed=seed, top1=top1)) for run, seed, top1 in runs]
    (tmp_path / "results").write_text("\n".join(lines))
    gain = study.Study(tmp_path / "results").gain("E8")
    assert gain == (2, 1, 3)
    assert gain.half == pytest.approx(4.303 / math.sqrt(3)), "Student's t with 2 degrees of freedom"
    assert in_words(gain, "+") == "+2.0 (-0.5 to 4.5)"


def test_the_pages_are_those_of_the_results():
    """`python .github/study.py` would write the same files again."""
    found = study.Study()
    pages = {"study.md": study.write_tables, "study.svg": study.draw_study,
             "follows.svg": study.draw_follows}
    for name, write in pages.items():
        assert (ROOT / ".github" / name).read_text() == write(found), name


@pytest.mark.skipif(not shutil.which("bash"), reason="bash runs the study")
def test_the_loop_makes_every_row_of_the_tables(tmp_path):
    """All commands of study.sh have flags that exist, and no row waits for a run that never comes.

    In an empty folder, where nothing is done yet, it says its commands in place of running them.
    """
    say = 'python() { printf "%q " "$@"; echo; }; . ' + shlex.quote(f"{ROOT}/.github/study.sh")
    said = subprocess.run(["bash", "-c", say], capture_output=True, text=True, cwd=tmp_path)
    programs = {"train.py": train, "eval.py": evaluation, "inspect_experts.py": inspect_experts}
    runs = {"run": set(), "shifts": set(), "follows": set()}
    for program, *words in map(shlex.split, said.stdout.splitlines()):
        if program in programs:
            programs[program].parse_args(words)
        else:
            flag, kind, folder = words
            assert (program, flag) == (".github/study.py", "--add")
            runs[kind].add(folder.removeprefix("study/").rpartition("-")[0])
    rows = {name for _, table in study.TABLES.values() for name in table.values()}
    assert rows == runs["run"] and runs["shifts"] == {"dense", "E8"}
    assert set(study.FOLLOWED) == runs["follows"]


SAID = """\
{top1 E8}% after 2,000 steps of 64 pictures, and without experts {top1 dense} ({n E8 dense}).

makes 2,660 steps and has {top1 longer-dense} ({n longer-dense}):

In the paper ViT-S gains 0.4 points on ImageNet"""  # 79.8; 80.2 with 8 experts, one per token


def test_what_the_readme_says_came_out():
    """The numbers of its section are those of the results: SAID is the text without them."""
    found = study.Study()

    def n(*names):
        """Return of how many seeds, if it is the same for all of these runs."""
        [count] = {len(found.runs[name]) for name in names}
        return f"n = {count}"

    def span(name, base):
        gain = found.gain(name, base)
        return f"{gain.mean - gain.half:.1f} to {gain.mean + gain.half:.1f}"

    fill = dict(top1=lambda name: in_words(found.top1(name)),
                mean=lambda name: f"{found.top1(name).mean:.1f}",
                gain=lambda name, base: f"{found.gain(name, base).mean:.1f}", span=span, n=n)

    def filled(match):
        function, *names = match[1].split()
        return fill[function](*names)

    section = (ROOT / "README.md").read_text().split("(.github/study.svg)")[1].split("Try it")[0]
    text = " ".join(section.split())
    for words in SAID.split("\n\n"):
        words = re.sub(r"\{(.*?)\}", filled, " ".join(words.split()))
        assert words in text, words
        text = text.replace(words, "", 1)
    assert not re.search(r"\d\.\d|n = ", text), "a number that nothing here computes"


def test_the_verdicts_of_the_readme():
    """Ahead per step, behind per second: the 95% interval of each paired difference excludes 0."""
    found = study.Study()
    for name, base in (("E8", "dense"), ("longer-dense", "E8")):
        gain = found.gain(name, base)
        assert gain.mean - gain.half > 0, name


@pytest.mark.parametrize("size, steps", [
    ("", 2660), ("pico-", 2760), ("micro-", 2440), ("convnext-", 2480)])
def test_equal_time(size, steps):
    """So many steps without experts take no longer than 2,000 with eight, at most 7% less."""
    runs = study.Study().runs
    dense, sparse = runs[f"longer-{size}dense"].values(), runs[f"{size}E8"].values()
    seconds = [statistics.median(line["seconds"] for line in lines) for lines in (dense, sparse)]
    assert 0.93 < seconds[0] / seconds[1] <= 1
    assert {line["data"] for line in dense} == {f"flags:{steps // 2 * 64}"}, "batches of 64, twice"


@pytest.mark.parametrize("options, more", [
    (dict(num_experts=32, k=1), 2), (dict(num_experts=8, k=1, router="expert_choice"), 13),
    (dict(num_experts=8, k=1, router="soft"), 17), (dict(num_experts=8, k=2), 31),
    (dict(num_experts=1, k=1, expert_ratio=32), 211),
], ids=str)
def test_what_experts_cost_in_the_study(options, more):
    """study.md says how many % more multiply-adds than without experts; README 3.1 times."""
    dense = evaluation.count_flops(vit_nano(56), 32)
    sparse = evaluation.count_flops(vit_nano(56, moe_layers=[1, 3], **options), 32)
    assert round(100 * sparse / dense) == 100 + more


def test_the_wider_model_of_the_study():
    """Twice the width without experts: 3.8 times the multiply-adds."""
    nano, micro = (evaluation.count_flops(model(56), 32) for model in (vit_nano, vit_micro))
    assert micro / nano == pytest.approx(3.8, abs=0.05)


def test_the_wide_mlps_have_as_many_parameters_as_eight_experts():
    """Within 1%: only the router and some biases differ."""
    wide, sparse = (vit_nano(56, moe_layers=[1, 3], k=1, num_experts=E, expert_ratio=ratio)
                    for E, ratio in ((1, 32), (8, 4)))
    counts = [evaluation.count_parameters(model)[0] for model in (wide, sparse)]
    assert counts[0] / counts[1] == pytest.approx(1, abs=0.01)
