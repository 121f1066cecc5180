"""Do the pages and the README say what came out of the study? (.github/study.py)"""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import eval as evaluation
import inspect_experts
import train
from make_assignment import ROOT
from vit import vit_nano

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


def test_what_the_readme_says_came_out():
    """Each number of the README's section is computed from the results, and so is each verdict."""
    found = study.Study()
    section = (ROOT / "README.md").read_text().split("## Do experts help?")[1].split("```")[0]
    text = " ".join(section.split())

    def top1(name):
        return in_words(found.top1(name))

    def gain(name, base):
        return f"{found.gain(name, base).mean:.1f}"

    def interval(name, base):
        mean = found.gain(name, base)
        assert mean.n == 10
        return (f"({mean.mean:+.1f} points, 95% interval {mean.mean - mean.half:.1f} to "
                f"{mean.mean + mean.half:.1f}, n = 10")

    def n(name):
        return f"(n = {len(found.runs[name])})"

    sparse = [f"{found.top1(f'E{E}').mean:.1f}" for E in study.EXPERTS[1:]]
    everywhere = f"{found.top1('blocks-0,1,2,3').mean:.1f}"
    said = [
        f"With eight it reaches {top1('E8')}%, without {top1('dense')} {interval('E8', 'dense')}",
        f"3.1 times the multiply-adds it reaches {top1('wide-1.5e-3')} {n('wide-1.5e-3')}",
        f"With eight {top1('glyphs-E8')}%, without {top1('glyphs-dense')}"
        f" {interval('glyphs-E8', 'glyphs-dense')}",
        f"2, 4, 8, 16 and 32 reach {', '.join(sparse[:-1])} and {sparse[-1]}, and eight in four"
        f" blocks, not two, {everywhere} {n('blocks-0,1,2,3')}",
        f"soft loses {gain('E8', 'soft')} {n('soft')}",
        f"gain {gain('pico-E8', 'pico-dense')} points at half the width {n('pico-E8')}",
        f"{gain('micro-E8', 'micro-dense')} at twice the width and"
        f" {gain('convnext-E8', 'convnext-dense')} in a ConvNeXt {n('micro-E8')}",
        f"it costs {gain('dense', 'dense-3e-3')} points without and {gain('E8', 'E8-3e-3')} with"
        f" {n('E8-3e-3')}",
        "torch 2.14", "The paper's ViT-S gains 0.9",  # its Table 1: 79.8 and 80.7
    ]
    for words in said:
        assert words in text, words
        text = text.replace(words, "", 1)
    assert not re.search(r"\d\.\d", text), "a number that nothing here computes"
    helped, unclear = found.gain("E8"), found.gain("glyphs-E8", "glyphs-dense")
    assert helped.mean - helped.half > 0, "Flags: experts learn faster"
    assert unclear.mean - unclear.half < 0 < unclear.mean + unclear.half, "Glyphs: no clear gain"
    late = [line["top1"] for name in ("long-dense", "long-E8")
            for line in found.runs[name].values()]
    assert min(late) > 99, "After 6,000 steps both have 99%"
    routers = [abs(found.gain(name, "E8").mean) for name in ("cosine", "l2", "expert_choice")]
    assert max(routers) < 3, "Cosine, L2 and expert choice differ from linear by less than 3 points"


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


def test_the_wide_mlps_have_as_many_parameters_as_eight_experts():
    """Within 1%: only the router and some biases differ."""
    wide, sparse = (vit_nano(56, moe_layers=[1, 3], k=1, num_experts=E, expert_ratio=ratio)
                    for E, ratio in ((1, 32), (8, 4)))
    counts = [evaluation.count_parameters(model)[0] for model in (wide, sparse)]
    assert counts[0] / counts[1] == pytest.approx(1, abs=0.01)


def test_what_the_readme_says_experts_follow():
    """By mutual information above chance, in each seed: colour on flags, place and ink on glyphs."""
    def best(name, block, n):
        """Return for each seed the n factors that the experts of a block follow most."""
        for run in study.Study().follows[name].values():
            found = run["layers"][block].items()
            above = {factor: measured - chance for factor, (measured, chance) in found}
            yield set(sorted(above, key=above.get)[-n:])

    assert all(factors == {"colour"} for block in ("block 1", "block 3")
               for factors in best("flags-vit", block, 1))
    assert all(factors == {"position", "object"} for factors in best("glyphs-vit", "block 1", 2))
