"""Collect, tabulate and draw the study (study.sh).

    python .github/study.py --add run study/E8-0    append a run's results to study.jsonl
    python .github/study.py                         write study.md, study.svg and follows.svg

study.jsonl has three kinds of lines: "run" (the last epoch of a run, not its best), "shifts"
(accuracy on pictures that training never shows) and "follows" (what the experts of a run follow).
"""

import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "study.jsonl"

# ---------------------------------------------------------------- collect


def what_a_run_reached(folder):
    """Return the results of a run's last epoch and the options that matter, a dict."""
    sys.path.insert(0, str(HERE.parent))
    import torch

    from eval import read_checkpoint
    checkpoint = read_checkpoint(str(folder / "last.pt"))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    args, last = checkpoint["args"], log[-1]
    if checkpoint["epoch"] != args["epochs"]:
        raise ValueError(f"{folder} is not finished")
    found = {name: last[name] for name in ("top1", "val_loss", "train_loss")}
    found["unevenness"] = [statistics.pstdev(load) * len(load) for load in last["load"]]
    found["seconds"] = round(sum(line["seconds"] for line in log))
    names = ("data", "model", "moe_layers", "experts", "k", "expert_ratio", "router", "lr",
             "balance_weight", "epochs")
    return found | {name: args[name] for name in names} | dict(torch=torch.__version__)


def accuracy_on_shifts(folder):
    """Return top-1 in % per data set, from what eval.py wrote into the run's folder."""
    [result] = json.loads((folder / "shifts.json").read_text())["results"]
    return dict(top1={name.split("-")[1]: data["top1"] for name, data in result["data"].items()})


def what_experts_follow(folder):
    """Return for each layer [mutual information, the same by chance] per factor."""
    summary = json.loads((folder / "inspect" / "summary.json").read_text())
    layers = {}
    for layer in summary["layers"]:
        layers[f"block {layer['block']}"] = {
            name: [round(found["normalized"], 4), round(found["normalized_by_chance"], 4)]
            for name, found in layer["information"].items()}
    return dict(top1=summary["top1"], layers=layers)


KINDS = dict(run=what_a_run_reached, shifts=accuracy_on_shifts, follows=what_experts_follow)


def add(kind, folder):
    """Append a line to study.jsonl about a run: its folder is NAME-SEED."""
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


def mean_of(values):
    values = list(values)
    return Mean(statistics.mean(values), statistics.stdev(values), len(values))


class Study:
    """The lines of study.jsonl by kind and name: study.runs["E8"][seed] is a line."""

    def __init__(self, file=RESULTS):
        found = {kind: defaultdict(dict) for kind in KINDS}
        for line in map(json.loads, open(file)):
            kind = next(iter(line))
            found[kind][line[kind]][line["seed"]] = line
        self.runs, self.shifts, self.follows = (found[kind] for kind in KINDS)

    def has(self, *names):
        """Tell whether all of these runs have two seeds or more."""
        return all(len(self.runs[name]) > 1 for name in names)

    def top1(self, name):
        """Return the Mean of a run's top-1 accuracy in % over its seeds."""
        return mean_of(line["top1"] for line in self.runs[name].values())

    def gain(self, name, base="dense"):
        """Return the Mean of the differences to another run with the same seeds: a paired test.

        The same seed means the same pictures in the same order, but not the same start. (Not in
        part l, where the longer runs have more pictures.)
        """
        seeds = sorted(set(self.runs[name]) & set(self.runs[base]))
        return mean_of(self.runs[name][s]["top1"] - self.runs[base][s]["top1"] for s in seeds)

    def unevenness(self, name):
        """Return the Mean over the seeds of the load's coefficient of variation in the last layer.

        0: every expert has as many tokens as the others.
        """
        return mean_of(line["unevenness"][-1] for line in self.runs[name].values())


# ---------------------------------------------------------------- tables

EXPERTS = (1, 2, 4, 8, 16, 32)
SIZES = {"none": "dense", "4": "E4", "8": "E8", "16": "E16"}


def sizes(start):
    """Return the rows without experts and with 4, 8 and 16, of runs that begin with `start`."""
    return f"{start}dense", {E: f"{start}{run}" for E, run in SIZES.items()}


def as_long(start, steps):
    """Return the rows with 8 experts, and without for as many steps as take the same time."""
    return f"{start}E8", {"8 experts, 2,000 steps": f"{start}E8",
                          f"none, {steps:,}": f"longer-{start}dense",
                          "none, 2,000": f"{start}dense"}


TABLES = {  # title: (what the gain is over, {row: run})
    "a. How many experts? vit_nano, one per token":
        ("dense", {"none": "dense"} | {f"{E}": f"E{E}" for E in EXPERTS}),
    "r. Is the learning rate right, without experts?":
        ("dense", {"7.5e-4": "dense-7.5e-4", "1.5e-3": "dense", "3e-3": "dense-3e-3"}),
    "r. And with 8?":
        ("E8", {"7.5e-4": "E8-7.5e-4", "1.5e-3": "E8", "3e-3": "E8-3e-3"}),
    "w. Dense MLPs as wide as eight experts, by the learning rate":
        ("E8", {"8 experts": "E8", "3e-4": "wide-3e-4", "7.5e-4": "wide-7.5e-4",
                "1.5e-3": "wide-1.5e-3", "3e-3": "wide-3e-3"}),
    "b. In which of the blocks 0 to 3? 8 experts":
        ("E8", {"1 and 3 (last2)": "E8", "1": "blocks-1", "3": "blocks-3",
                "0 to 3": "blocks-0,1,2,3"}),
    "c. How many of 8 per token, how wide?":
        ("E8", {"1 of ratio 4": "E8", "2 of ratio 4": "k2", "2 of ratio 2": "k2-half",
                "4 of ratio 1": "k4-quarter"}),
    "d. Which router? 8 experts":
        ("E8", {"linear": "E8", "cosine": "cosine", "l2": "l2", "expert choice": "expert_choice",
                "soft": "soft"}),
    "e. 16,000 pictures, in as many steps": sizes("16000-"),
    "e. 4,000 pictures, which show 77% of the flags": sizes("4000-"),
    "f. Half the width, vit_pico": sizes("pico-"),
    "f. Twice the width, vit_micro": sizes("micro-"),
    "h. How strong a balance? 8 experts":
        ("E8", {"weight 0": "E8-balance-0", "0.005": "E8", "0.05": "E8-balance-0.05"}),
    "h. And with 16?":
        ("E16", {"weight 0": "E16-balance-0", "0.005": "E16", "0.05": "E16-balance-0.05"}),
    "i. convnext_nano": sizes("convnext-"),
    "l. Without experts, for as long as with 8: vit_nano": as_long("", 2660),
    "l. For as long: vit_pico": as_long("pico-", 2760),
    "l. For as long: vit_micro": as_long("micro-", 2440),
    "l. For as long: convnext_nano": as_long("convnext-", 2480),
    "l. Three times as many steps":
        ("long-dense", {"none": "long-dense", "8": "long-E8"}),
    "y. glyphs: how many experts?":
        ("glyphs-dense", {"none": "glyphs-dense"} | {f"{E}": f"glyphs-E{E}" for E in EXPERTS}),
    "y. glyphs: which router? 8 experts":
        ("glyphs-dense", {"none": "glyphs-dense", "linear": "glyphs-E8", "cosine": "glyphs-cosine",
                          "l2": "glyphs-l2", "expert choice": "glyphs-expert_choice"}),
    "y. glyphs: half the width, vit_pico": sizes("glyphs-pico-"),
    "y. glyphs: twice the width, vit_micro": sizes("glyphs-micro-"),
    "y. glyphs: without experts, at vit_nano's learning rate":
        ("glyphs-dense", {"width 64": "glyphs-dense", "width 32": "glyphs-pico-3e-3",
                          "width 128": "glyphs-micro-3e-3"}),
}


def in_words(mean, sign=""):
    """Return a Mean as text: "74.6 ± 2.9", or with sign "+" its interval: "+3.4 (1.5 to 5.3)"."""
    if sign:
        low, high = mean.mean - mean.half, mean.mean + mean.half
        return f"{mean.mean:+.1f} ({low:.1f} to {high:.1f})"
    return f"{mean.mean:.1f} ± {mean.deviation:.1f}"


def table(study, title, base, rows):
    """Return the lines of one table in Markdown, of the rows that have run at least twice."""
    lines = [f"### {title}", "", f"| | top-1 % | n | more than {base} (95%) | load, CV |",
             "|---|---|---|---|---|"]
    for label, name in rows.items():
        if not study.has(name, base):
            continue
        top1 = study.top1(name)
        gain = in_words(study.gain(name, base), "+") if name != base else ""
        run = study.runs[name][0]
        sparse = run["unevenness"] and run["experts"] > 1
        load = f"{study.unevenness(name).mean:.2f}" if sparse else ""
        lines.append(f"| {label} | {in_words(top1)} | {top1.n} | {gain} | {load} |")
    return lines + [""] if len(lines) > 5 else []


def table_of_shifts(study):
    """Return the lines of the table of shifted pictures."""
    lines = []
    for name, seeds in study.shifts.items():
        kinds = next(iter(seeds.values()))["top1"]
        lines = lines or ["### g. Pictures that training never shows, top-1 %", "",
                          f"| | {' | '.join(kinds)} | n |", "|---" * (len(kinds) + 2) + "|"]
        means = [in_words(mean_of(line["top1"][kind] for line in seeds.values()))
                 for kind in kinds]
        lines.append(f"| {name} | {' | '.join(means)} | {len(seeds)} |")
    return lines + [""] if lines else []


FOLLOWS = """### s. What the experts follow

![What a patch's expert tells about the picture](follows.svg)

The mutual information between a patch's expert and what is known of the patch, over the entropy of
the less uncertain of the two: 1 if one determines the other, 0 if they have nothing to do with each
other. In brackets by chance: the same when each picture has the factors of another. 8 experts, mean
of three seeds.
"""


def write_tables(study):
    """Return the text of study.md."""
    count = sum(len(seeds) for seeds in study.runs.values())
    seconds = sorted(line["seconds"] for seeds in study.runs.values() for line in seeds.values())
    lines = [f"""# The study

`bash .github/study.sh` makes the runs, `python .github/study.py` wrote this page from study.jsonl:
{count} runs, median {seconds[count // 2]} s on one core of a shared AMD EPYC beside
another run (torch 2.14, float32). A run has 2,000 steps of 64 pictures, but for part l, and 2,000
other pictures validate it. Where nothing else is said the data are `flags:64000`, and the model is
vit_nano with experts in two of its four blocks and one expert per token.

`glyphs`: 300 characters of an invented script, 16,000 pictures. Handwriting must be read. Eight
experts gained nothing certain there, so a task was looked for on which they do. `flags`: three
stripes in 14 colours. Each of the 2,744 flags was assigned at random to one of 56 countries, the
classes. No rule predicts them, they must be learnt by heart. Nearly every flag of the validation is
among the 64,000 pictures, with other noise: flags test memory, not generalization. The two differ
in more than this: number of classes, of pictures, learning rate.

Top-1 accuracy in % after the last epoch: mean ± standard deviation over n seeds. The gain is the
mean difference between runs of the same seed, of those seeds that both have, with the 95% interval
of a paired t-test. A seed is an order of the pictures and a start; all have the same pictures.
Learning rate and number of experts of vit_nano were chosen on the 2,000 that validate, too. Those
of the other models were not tuned on flags. If there were no effect at all, one interval in twenty
would still exclude 0. "Load, CV" is the deviation of the experts' loads over their mean in the last
layer: 0 is even. Another processor or number of threads rounds differently, and a run ends
elsewhere within the deviation.

The runs of part l have more steps and as many more pictures, and the schedule is stretched over
them. So one seed is not the same order as in a shorter run, and the pairs there are pairs by name.

With experts a model has at most 2% more multiply-adds than without, for the router. The exceptions:
expert choice has 13% more, soft routing 17%, two experts of ratio 4 per token 31%. The wide MLPs of
part w, with as many parameters as eight experts, have 211% more.
"""]
    for title, (base, rows) in TABLES.items():
        lines += table(study, title, base, rows)
        if title.startswith("f. Twice"):
            lines += table_of_shifts(study)
    return "\n".join([*lines, FOLLOWS])


# ---------------------------------------------------------------- pictures

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"  # Okabe and Ito's
STYLE = """<style>
  text { font: 13px system-ui, sans-serif }
  .title { font-weight: 600 }
  .small { font-size: 12px }
  .grid { stroke: #e3e3e3 }
</style>
"""


def page(width, height, title, parts):
    """Return an SVG file's text. The white ground makes it readable on a dark page, too."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n'
            f'<title>{title}</title>\n{STYLE}<rect width="100%" height="100%" fill="white"/>\n'
            + "\n".join(parts) + "\n</svg>\n")


def text(x, y, words, kind="", anchor="start", ink="#222"):
    return (f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}" text-anchor="{anchor}" fill="{ink}">'
            f"{words}</text>")


class Panel:
    """One of the small multiples: accuracy in % over the number of experts, drawn into .parts."""

    def __init__(self, left, title, experts, low, high, top=58, width=150, height=220):
        self.left, self.top, self.width, self.height = left, top, width, height
        self.experts, self.low, self.high = experts, low, high
        self.parts = [text(left, top - 34, title, "title")]
        for percent in range(low, high + 1, 20):
            y = self.y(percent)
            self.parts += [f'<path class="grid" d="M{left} {y:.1f}h{width}"/>',
                           text(left - 6, y + 4, percent, "small", "end")]
        for E in experts:
            self.parts.append(text(self.x(E), top + height + 18, E, "small", "middle"))
        self.parts.append(text(left + width / 2, top + height + 36, "experts", "small", "middle"))

    def x(self, E):
        """Return the place of E experts: doubling it is one step."""
        steps = math.log2(self.experts[-1] / self.experts[0])
        return self.left + 12 + (self.width - 24) * math.log2(E / self.experts[0]) / steps

    def y(self, percent):
        return self.top + self.height * (self.high - percent) / (self.high - self.low)

    def dense(self, mean, colour):
        """Draw the accuracy without experts: a dashed line."""
        self.parts.append(f'<path d="M{self.left} {self.y(mean.mean):.1f}h{self.width}" fill="none"'
                          f' stroke="{colour}" stroke-width="1.5" stroke-dasharray="5 4"/>')

    def sparse(self, means, colour):
        """Draw the accuracy with experts, {E: Mean}: a line, with a deviation up and down."""
        points = [(self.x(E), self.y(mean.mean)) for E, mean in means.items()]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), mean in zip(points, means.values()):
            up, down = self.y(mean.mean + mean.deviation), self.y(mean.mean - mean.deviation)
            self.parts += [
                f'<path d="M{x:.1f} {up:.1f}V{down:.1f}" stroke="{colour}" stroke-width="1.5"/>',
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>']

    def label(self, lines):
        """Name the lines at their right ends, at least 14 pixels apart: {label: (mean, colour)}."""
        y = -math.inf
        for label, (mean, colour) in sorted(lines.items(), key=lambda line: -line[1][0].mean):
            y = max(y + 14, self.y(mean.mean) + 4)
            self.parts.append(text(self.left + self.width + 4, y, label, "small", ink=colour))


PANELS = {  # title: {line: (what its runs' names begin with, colour)}
    "How many experts?": {"flags": ("", BLUE), "glyphs": ("glyphs-", GREY)},
    "How many pictures?": {"64,000": ("", BLUE), "16,000": ("16000-", ORANGE),
                           "4,000": ("4000-", GREEN)},
    "How wide a model?": {"width 128": ("micro-", ORANGE), "width 64": ("", BLUE),
                          "width 32": ("pico-", GREEN)},
}


def draw_study(study):
    """Return study.svg: accuracy over experts, for more pictures, for wider models."""
    parts = [text(40, 44, "Top-1 % on flags (grey: glyphs). Dashed: without experts, with as many "
                          "multiply-adds. Bars: ± a deviation.", "small")]
    for i, (title, lines) in enumerate(PANELS.items()):
        panel, labels = Panel(40 + 246 * i, title, EXPERTS if i == 0 else (4, 8, 16), 0, 100), {}
        for label, (start, colour) in lines.items():
            found = {E: study.top1(f"{start}E{E}") for E in panel.experts
                     if study.has(f"{start}E{E}")}
            if not found:
                continue
            panel.dense(study.top1(f"{start}dense"), colour)
            panel.sparse(found, colour)
            labels[label] = found[max(found)], colour
        panel.label(labels)
        parts += panel.parts
    return page(758, 328, "Accuracy over the number of experts", parts)


FOLLOWED = {  # what it is called in study.jsonl: title
    "flags-vit": "ViT, flags",
    "glyphs-vit": "ViT, glyphs", "glyphs-convnext": "ConvNeXt, glyphs",
    "shapes-vit": "ViT, shapes", "shapes-convnext": "ConvNeXt, shapes",
}
FACTORS = ("class", "object", "shape", "texture", "part", "colour", "position")


def draw_follows(study):
    """Return follows.svg: per layer, what a patch's expert tells about the picture."""
    parts = [text(150 + 80 * i, 24, name, "title", "middle") for i, name in enumerate(FACTORS)]
    y = 36
    for name, title in FOLLOWED.items():
        if name not in study.follows:
            continue
        runs = list(study.follows[name].values())
        parts.append(text(8, y + 16, title, "title"))
        for layer in runs[0]["layers"]:
            y += 28
            parts.append(text(8, y + 16, layer, "small"))
            for i, factor in enumerate(FACTORS):
                pairs = [run["layers"][layer][factor] for run in runs
                         if factor in run["layers"][layer]]
                if pairs:
                    parts += cell(114 + 80 * i, y, *map(statistics.mean, zip(*pairs)))
        y += 36
    return page(684, y + 4, "What a patch's expert tells about the picture", parts)


def cell(x, y, found, chance):
    """Return a cell with a number, the darker the more it exceeds what chance gives."""
    excess = max(0.0, found - chance)
    dark = min(1.0, 2 * excess)
    ink = "white" if dark > 0.75 else "#222"
    return [f'<rect x="{x}" y="{y}" width="72" height="24" fill="{BLUE}" fill-opacity="{dark:.2f}"'
            ' stroke="#ccc"/>',
            text(x + 36, y + 16, f"{found:.2f} ({chance:.2f})", "small", "middle", ink)]


def main():
    study = Study()
    (HERE / "study.md").write_text(write_tables(study))
    (HERE / "study.svg").write_text(draw_study(study))
    (HERE / "follows.svg").write_text(draw_follows(study))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--add"]:
        add(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
