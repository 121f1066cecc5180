"""Draw study.svg: accuracy while training, per step and per second, and for other choices."""

import math

from study import Mean

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 590" role="img">
<title>Top-1 accuracy with and without experts, per step, per second, and for other choices</title>
<style>
  text { font: 13px system-ui, sans-serif }
  .title { font-weight: 600 }
  .grid { stroke: #e3e3e3 }
</style>
<rect width="100%" height="100%" fill="white"/>"""  # white: readable on a dark page, too


def text(x, y, words, anchor="start", kind="", ink="#222"):
    return (f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}" text-anchor="{anchor}" fill="{ink}">'
            f"{words}</text>")


def stroke(path, colour, dashed):
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'


class Panel:
    """One of the small multiples: top-1 in % over something, drawn into .parts.

    ticks: what stands below the axis, and where: {words: number}, ascending.
    """

    def __init__(self, left, top, width, height, title, axis, ticks):
        self.left, self.top, self.width, self.height = left, top, width, height
        self.first, *_, self.last = ticks.values()
        self.parts, bottom = [text(left, top - 14, title, kind="title")], top + height
        for percent in range(0, 101, 20):
            y = self.y(percent)
            self.parts.append(f'<path class="grid" d="M{left} {y:.1f}h{width}"/>')
            self.parts.append(text(left - 6, y + 4, percent, "end"))
        for words, at in ticks.items():
            self.parts.append(text(self.x(at), bottom + 18, words, "middle"))
        self.parts.append(text(left + width / 2, bottom + 36, axis, "middle"))

    def x(self, at):
        return self.left + self.width * (at - self.first) / (self.last - self.first)

    def y(self, percent):
        return self.top + self.height * (1 - percent / 100)

    def line(self, points, colour, dashed=False):
        """Draw [(where, Mean)]: a line, and a band of a deviation up and down."""
        path = "L".join(f"{self.x(at):.1f} {self.y(mean.mean):.1f}" for at, mean in points)
        edge = [(at, mean.mean + mean.deviation) for at, mean in points]
        edge += [(at, mean.mean - mean.deviation) for at, mean in reversed(points)]
        band = " ".join(f"{self.x(at):.1f},{self.y(percent):.1f}" for at, percent in edge)
        self.parts.append(f'<polygon points="{band}" fill="{colour}" fill-opacity="0.2"/>')
        self.parts.append(stroke(path, colour, dashed))
        for at, mean in points:
            if mean.deviation:  # measured: not where a line begins
                place = f'cx="{self.x(at):.1f}" cy="{self.y(mean.mean):.1f}"'
                self.parts.append(f'<circle {place} r="3" fill="{colour}"/>')

    def label(self, lines):
        """Name lines at their right ends, at least 14 pixels apart: [(label, mean, colour)]."""
        y = -math.inf
        for label, mean, colour in sorted(lines, key=lambda line: -line[1].mean):
            y = max(y + 14, self.y(mean.mean) + 4)
            self.parts.append(text(self.left + self.width + 5, y, label, ink=colour))


CURVES = {  # run: (label, colour)
    "512-dense": ("", BLUE), "512-E8": ("width 64", BLUE),
    "512-micro-dense": ("", ORANGE), "512-micro-E8": ("width 128", ORANGE)}
CHANCE = Mean(100 / 56, 0, 1)  # 56 classes: what an untrained model knows


def curves(study, per_second):
    """Return a panel of top-1 while training, with and without experts, of two widths."""
    lines = []
    for name, (label, colour) in CURVES.items():
        start, _, model = name.rpartition("-")
        scale = study.step_seconds(f"{start}-")[model] if per_second else 1
        lines.append(([(0, CHANCE), *study.curve(name, scale)], colour, model == "dense", label))
    left, width, unit, what, axis = (  # unit: from one tick to the next
        (420, 260, 50, "seconds", "seconds of training on one core") if per_second else
        (44, 270, 125, "steps", "steps of 512 pictures"))
    end = max(points[-1][0] for points, *_ in lines)
    ticks = {f"{at}": at for at in range(0, math.ceil(end / unit) * unit + 1, unit)}
    panel = Panel(left, 84, width, 200, f"8 experts: top-1 % against {what}", axis, ticks)
    for points, colour, dashed, label in lines:
        panel.line(points, colour, dashed)
        at, mean = points[-1]
        shift, anchor = (6, "start") if colour == BLUE else (-8, "end")  # one ends in the middle
        y = panel.y(mean.mean) + 4
        if label:
            panel.parts.append(text(panel.x(at) + shift, y, label, anchor, ink=colour))
    return panel


SMALL = {  # title: {line: (what its runs' names begin with, colour)}
    "How many experts?": {"": ("", BLUE)},
    "How many pictures?": {"64,000": ("", BLUE), "16,000": ("16000-", ORANGE),
                           "4,000": ("4000-", GREEN)},
    "How wide a model?": {"width 128": ("micro-", ORANGE), "width 64": ("", BLUE),
                          "width 32": ("pico-", GREEN)}}


def small_panel(study, title, left):
    """Return a panel of top-1 over the number of experts, in 2,000 steps of 64 pictures."""
    experts = (1, 2, 4, 8, 16, 32) if title == "How many experts?" else (4, 8, 16)
    ticks = {f"{E}": math.log2(E) for E in experts}
    panel, labels = Panel(left, 386, 150, 150, title, "experts", ticks), []
    for label, (start, colour) in SMALL[title].items():
        dense = study.top1(f"{start}dense")._replace(deviation=0)
        panel.line([(panel.first, dense), (panel.last, dense)], colour, dashed=True)
        points = [(at, study.top1(f"{start}E{E}")) for E, at in ticks.items()]
        panel.line(points, colour)
        labels.append((label, points[-1][1], colour))
    panel.label(labels)
    return panel


def draw(study):
    """Return study.svg: top-1 per step and per second, and small panels of other choices."""
    parts = [HEAD, stroke("44 28h28", BLUE, False), text(78, 32, "with experts"),
             stroke("176 28h28", BLUE, True), text(210, 32, "dense: without"),
             text(330, 32, "Validation on flags. Bands: ± a standard deviation.")]
    for per_second in (False, True):
        parts += curves(study, per_second).parts
    parts.append(text(44, 350, "Top-1 % after 2,000 steps of 64 pictures:"))
    for i, title in enumerate(SMALL):
        parts += small_panel(study, title, 44 + 246 * i).parts
    return "\n".join([*parts, "</svg>\n"])
