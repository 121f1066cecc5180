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
With eight {top1 E8}%, without {top1 dense} (+{gain E8 dense} points, 95% interval {span E8 dense},
{n E8 dense}). After 6,000 steps both have 99% ({n long-dense long-E8}).

makes 2,660 steps and reaches {top1 longer-dense}. At width 32 it is
{gain longer-pico-dense pico-E8} points ahead, as a ConvNeXt
{gain longer-convnext-dense convnext-E8}, at width 128 nothing clear
({gain longer-micro-dense micro-E8}, {n longer-dense longer-pico-dense longer-micro-dense
longer-convnext-dense pico-E8 micro-E8 convnext-E8}):

MLPs with the experts' parameters (3.1 times the multiply-adds) reach {top1 wide-1.5e-3}, a ViT of
width 128 (3.8 times) {top1 micro-dense} ({n wide-1.5e-3 micro-dense}).

With eight {top1 glyphs-E8}%, without {top1 glyphs-dense} (+{gain glyphs-E8 glyphs-dense} points,
95% interval {span glyphs-E8 glyphs-dense}, {n glyphs-E8 glyphs-dense}).

2, 4, 8, 16 and 32 reach {mean E2}, {mean E4}, {mean E8}, {mean E16} and {mean E32}. On a quarter
of the pictures eight gain {gain 16000-E8 16000-dense} points, on a sixteenth
{gain 4000-E8 4000-dense} (n = 5 or more).

Over linear expert choice gains {gain expert_choice E8} points (with 13% more multiply-adds), cosine
and L2 nothing clear; soft loses {gain E8 soft} ({n expert_choice cosine l2 soft}).

Eight gain {gain pico-E8 pico-dense} points at width 32, {gain micro-E8 micro-dense} at 128 and
{gain convnext-E8 convnext-dense} in a ConvNeXt, where 16 gain {gain convnext-E16 convnext-dense}
({n pico-E8 pico-dense micro-E8 micro-dense convnext-E16 convnext-E8 convnext-dense}).

Doubled it costs {gain dense dense-3e-3} points without, {gain E8 E8-3e-3} with
({n dense-3e-3 E8-3e-3}).

The paper's ViT-S gains 0.4 on ImageNet

torch 2.14"""  # The paper's ViT-S has 79.8, with 8 experts and one per token 80.2


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

    section = (ROOT / "README.md").read_text().split("(.github/study.svg)")[1].split("Your own")[0]
    text = " ".join(section.split())
    for words in SAID.split("\n\n"):
        words = re.sub(r"\{(.*?)\}", filled, " ".join(words.split()))
        assert words in text, words
        text = text.replace(words, "", 1)
    assert not re.search(r"\d\.\d|n = ", text), "a number that nothing here computes"


def test_the_verdicts_of_the_readme():
    """Something is clear if the 95% interval of the paired difference excludes 0."""
    found = study.Study()

    def clear(name, base):
        gain = found.gain(name, base)
        return gain.mean - gain.half > 0

    def unclear(name, base):
        return not clear(name, base) and not clear(base, name)

    for size in ("", "pico-", "micro-", "convnext-"):
        assert clear(f"{size}E8", f"{size}dense"), "ahead per step"
    for size in ("", "pico-", "convnext-"):
        assert clear(f"longer-{size}dense", f"{size}E8"), "not per second"
    assert unclear("longer-micro-dense", "micro-E8")
    assert unclear("glyphs-E8", "glyphs-dense"), "glyphs: no clear gain"
    assert clear("expert_choice", "E8") and clear("E8", "soft")
    assert unclear("cosine", "E8") and unclear("l2", "E8")
    assert clear("dense", "dense-3e-3") and clear("E8", "E8-3e-3"), "the learning rate matters"
    many = ("E2", "E4", "E8", "E16", "E32", "16000-E8", "16000-dense", "4000-E8", "4000-dense")
    assert min(len(found.runs[name]) for name in many) == 5, "n = 5 or more"
    late = [line["top1"] for name in ("long-dense", "long-E8")
            for line in found.runs[name].values()]
    assert 99 <= min(late) and max(late) < 100, "after 6,000 steps both have 99%"
    versions = {line["torch"][:4] for seeds in found.runs.values() for line in seeds.values()}
    assert versions == {"2.14"}


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


def test_what_the_readme_says_experts_follow():
    """By information above chance, in each seed: colour on flags, place and ink on glyphs."""
    def best(name, block, n):
        """Return for each seed the n factors that the experts of a block follow most."""
        runs = study.Study().follows[name]
        assert len(runs) > 1
        for run in runs.values():
            found = run["layers"][block].items()
            above = {factor: measured - chance for factor, (measured, chance) in found}
            yield set(sorted(above, key=above.get)[-n:])

    assert all(factors == {"colour"} for block in ("block 1", "block 3")
               for factors in best("flags-vit", block, 1))
    assert all(factors == {"position", "object"} for factors in best("glyphs-vit", "block 1", 2))
