"""Collect, tabulate and draw the study (study.sh).

    python tests/study.py --add run study/E8-0    append the results of a run to study.jsonl
    python tests/study.py                         fill the tables of study.md, draw study.svg

Both pages and study.jsonl are in .github. A line of study.jsonl is of one of four kinds:
run      what one training reached, with one seed: in the last epoch, not in its best
shifts   the accuracy of such a model on pictures that training never shows
follows  what its experts follow
speed    the seconds of training steps of its model, dense and sparse in turns
"""

import json
import math
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / ".github" / "study.jsonl"

# ---------------------------------------------------------------- collect

OPTIONS = ("data", "model", "moe_layers", "experts", "k", "expert_ratio", "router", "lr",
           "balance_weight", "batch_size", "epochs")


def options_of(folder):
    """Return all options of a finished run, a dict."""
    from eval import read_checkpoint
    checkpoint = read_checkpoint(str(folder / "last.pt"))
    if checkpoint["epoch"] != checkpoint["args"]["epochs"]:
        raise ValueError(f"{folder} is not finished")
    return checkpoint["args"]


def what_a_run_reached(folder):
    """Return what the last epoch reached, the way there, and the options that matter."""
    import torch
    args = options_of(folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = {name: log[-1][name] for name in ("top1", "val_loss", "train_loss")}
    found["unevenness"] = [statistics.pstdev(load) * len(load) for load in log[-1]["load"]]
    found["seconds"] = round(sum(line["seconds"] for line in log))
    found["curve"] = [[line["step"], line["top1"], round(line["seconds"])] for line in log]
    return found | {name: args[name] for name in OPTIONS} | dict(torch=torch.__version__)


def accuracy_on_shifts(folder):
    """Return top-1 in % per data set, from what eval.py wrote into the run's folder."""
    [result] = json.loads((folder / "shifts.json").read_text())["results"]
    return dict(top1={name.split("-")[1]: data["top1"] for name, data in result["data"].items()})


def what_experts_follow(folder):
    """Return for each layer [mutual information, the same by chance] per factor."""
    summary = json.loads((folder / "inspect" / "summary.json").read_text())
    layers = defaultdict(dict)
    for layer in summary["layers"]:
        for name, found in layer["information"].items():
            numbers = found["normalized"], found["normalized_by_chance"]
            layers[f"block {layer['block']}"][name] = [round(number, 4) for number in numbers]
    return dict(top1=summary["top1"], layers=layers)


def seconds_of_steps(folder):
    """Return the seconds of training steps of the run's model, {"dense": [s], "sparse": [s]}."""
    from benchmark import steps_in_turns
    return steps_in_turns(options_of(folder))


KINDS = dict(run=what_a_run_reached, shifts=accuracy_on_shifts, follows=what_experts_follow,
             speed=seconds_of_steps)


def add(kind, folder):
    """Append a line to study.jsonl about a run: its folder is NAME-SEED."""
    sys.path.insert(0, str(ROOT))
    name, _, seed = folder.name.rpartition("-")
    line = {kind: name, "seed": int(seed)} | KINDS[kind](folder)
    with open(RESULTS, "a") as file:
        print(json.dumps(line), file=file)


# ---------------------------------------------------------------- means and differences

# 97.5% of Student's t distribution are below this, by degrees of freedom
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306,
           9: 2.262, 14: 2.145, 19: 2.093}


class Mean(NamedTuple):
    """A mean, the standard deviation, and of how many; the mean's 95% interval is ± half."""

    mean: float
    deviation: float
    n: int

    @property
    def half(self):
        degrees = max(d for d in STUDENT if d <= self.n - 1)  # fewer: a wider interval
        return STUDENT[degrees] * self.deviation / math.sqrt(self.n)

    def interval(self):
        """Return the 95% interval as text."""
        return f"{self.mean - self.half:.1f} to {self.mean + self.half:.1f}"

    def signed(self):
        """Return a difference as text: with its interval, if there are several."""
        return f"{self.mean:+.1f}" + (f" ({self.interval()})" if self.n > 1 else "")

    def __str__(self):
        return f"{self.mean:.1f} ± {self.deviation:.1f}" if self.n > 1 else f"{self.mean:.1f}"


def mean_of(values):
    values = list(values)
    return Mean(statistics.mean(values), statistics.stdev(values) if values[1:] else 0, len(values))


class Study:
    """The lines of study.jsonl by kind and name: study.runs["E8"][seed] is a line."""

    def __init__(self, file=RESULTS):
        found = {kind: defaultdict(dict) for kind in KINDS}
        for line in map(json.loads, open(file)):
            kind = next(iter(line))
            found[kind][line[kind]][line["seed"]] = line
        self.runs, self.shifts, self.follows, self.speed = found.values()

    def top1(self, name):
        """Return the Mean of a run's top-1 accuracy in % over its seeds."""
        return mean_of(line["top1"] for line in self.runs[name].values())

    def gain(self, name, base="dense"):
        """Return the Mean of the differences to another run with the same seeds: a paired test.

        The same seed means the same pictures in the same order, but not the same start. (Where
        one of the two has more pictures, it means nothing.)
        """
        ours, theirs = self.runs[name], self.runs[base]
        return mean_of(ours[s]["top1"] - theirs[s]["top1"] for s in sorted(ours) if s in theirs)

    def curve(self, name, scale=1.0):
        """Return [(step times scale, the Mean of top-1 there)] over the seeds of a run."""
        points, seeds = [], [line["curve"] for line in self.runs[name].values()]
        for epoch in zip(*seeds):
            steps, top1, _ = zip(*epoch)
            points.append((steps[0] * scale, mean_of(top1)))
        return points

    def step_seconds(self, start):
        """Return the median seconds of a training step, {"dense": s, "E8": s}."""
        [line] = self.speed[f"{start}E8"].values() or [dict(dense=[], sparse=[])]
        return dict(dense=statistics.median(line["dense"]), E8=statistics.median(line["sparse"]))

    def gain_in_equal_time(self, start):
        """Return the Mean of how far 8 experts are ahead when the run without them ends.

        By then they have made fewer steps. Between two epochs top-1 is taken to rise evenly.
        """
        seconds, gains = self.step_seconds(start), []
        dense, sparse = (self.runs[f"{start}{name}"] for name in ("dense", "E8"))
        for seed in dense.keys() & sparse.keys():
            (before, low, _), (after, high, _) = sparse[seed]["curve"][-2:]
            steps = after * seconds["dense"] / seconds["E8"]
            part = (steps - before) / (after - before)  # of the last epoch
            gains.append(low + part * (high - low) - dense[seed]["top1"])
        return mean_of(gains)


# ---------------------------------------------------------------- tables
# A row of study.md begins with its label and the name of its run in backticks. These functions
# return the cells behind them. heads: those of their columns.

def accuracy(study, name, label, heads):
    """Return top-1, n, the gain over the run that the head names, and how uneven the load is."""
    seeds, base = study.runs[name], heads[2].split("`")[1]
    gain = "" if name == base else study.gain(name, base).signed()
    loads = [line["unevenness"][-1] for line in seeds.values() if line["unevenness"]
             and line["experts"] > 1 and line["router"] not in ("expert_choice", "soft")]
    uneven = f"{statistics.mean(loads):.2f}" if loads else ""
    return [f"{study.top1(name)}", f"{len(seeds)}", gain, uneven]


def speed(study, name, label, heads):
    """Return the time of a step without experts and with them, n, and both gains of experts."""
    start = name.removesuffix("E8")
    times = [f"{1000 * seconds:.0f}" for seconds in study.step_seconds(start).values()]
    gains = study.gain(name, f"{start}dense"), study.gain_in_equal_time(start)
    return [*times, f"{gains[0].n}", *(gain.signed() for gain in gains)]


def shifted(study, name, label, heads):
    """Return top-1 on each kind of shifted pictures."""
    found = [line["top1"] for line in study.shifts[name].values()]
    return [str(mean_of(top1[kind] for top1 in found)) for kind in heads]


def followed(study, name, label, heads):
    """Return for each factor what the experts of a layer tell about it, by chance in brackets."""
    layers, cells = [line["layers"][label] for line in study.follows[name].values()], []
    if not layers:
        raise statistics.StatisticsError("no such line")
    for factor in heads:
        pairs = zip(*(layer[factor] for layer in layers if factor in layer))
        means = [f"{statistics.mean(numbers):.2f}" for numbers in pairs]
        cells.append("{} ({})".format(*means) if means else "")
    return cells


FILL = {"top-1 %": accuracy, "ms a step, dense": speed, "noise": shifted, "class": followed}


def fill(study, page):
    """Return the text of study.md with new numbers in its tables, from the results there are."""
    count = sum(len(seeds) for seeds in study.runs.values())
    lines = re.sub(r"\d+ runs", f"{count} runs", page).splitlines()
    for i, line in enumerate(lines):
        label, name, *rest = [cell.strip() for cell in line.split("|")[1:-1]] or ["", ""]
        if name == "run":
            heads = rest
        elif name.startswith("`"):
            try:
                found = FILL[heads[0]](study, name.strip("`"), label, heads)
            except statistics.StatisticsError:  # of nothing
                found = ["not yet", *[""] * (len(heads) - 1)]
            lines[i] = f"| {label} | {name} | {' | '.join(found)} |"
    return "\n".join(lines) + "\n"


def main():
    """Write both pages anew: the picture if all runs of the tables are there."""
    import study_figure
    study, page = Study(), RESULTS.with_suffix(".md")
    page.write_text(fill(study, page.read_text()))
    if "not yet" not in page.read_text():
        RESULTS.with_suffix(".svg").write_text(study_figure.draw(study))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--add"]:
        add(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
