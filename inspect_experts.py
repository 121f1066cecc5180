"""What do the experts do? Run a sparse checkpoint once over a data set: numbers to cite, pictures to look at.

    python inspect_experts.py runs/convnext_nano-shapes-1/best.pt --data shapes --out inspect

The model inspection of "Mixture of Experts for Image Classification: What's the Sweet Spot?", section 5.6, Figures 5 to
10, and what that paper could not measure: which known factor of the image (shape, texture, colour, position) the experts
follow. Writes DIR/report.html (one file, opens from disk), DIR/summary.json (all numbers), DIR/routing.csv (layer, block,
class, expert, tokens, share of the class's tokens) and the report's figures as PNG.

As in the paper a token counts for its first choice. The class token of a ViT has no place in the image: it is counted
apart, and everything else is about the patches. Counting is done as the images pass by; but for its label, nothing is
kept of an image.

Letters: B images, N patches per image, M images in all, E experts, K counted choices per token (1, or k).
"""

import argparse
import base64
import colorsys
import csv
import html
import io
import json
import math
import os
import platform
import re
import sys
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Subset
from torchvision.transforms import v2
from tqdm import tqdm

from eval import (auto_workers, autocast, best_dtype, eval_loader, eval_transform, load_checkpoint, match_classes, normalize,
                  open_dataset)

# ---------------------------------------------------------------- statistics: pure functions of counts


def crosstab(rows, columns, R, C):
    """How often each pair occurs: rows and columns (same shape), int64 -> counts (R, C) int64. A row of -1 is left out."""
    cells = ((rows + 1) * C + columns).flatten()  # the rows that are -1 come first in the table, and are cut off
    table = torch.zeros((R + 1) * C, dtype=torch.int64, device=cells.device)
    return table.scatter_add_(0, cells, torch.ones_like(cells)).view(R + 1, C)[1:]


def mutual_information(counts):
    """(bits, normalised) that knowing the row says about the column, from a table of counts (rows, columns).

    I = sum p(r, c) log2( p(r, c) / (p(r) p(c)) ); normalised by the smaller of the two entropies: 1 if one decides the
    other, 0 if they have nothing to do with each other (or if there is nothing to know).
    """
    p = counts.double() / max(1, counts.sum().item())
    entropies = [torch.special.entr(p.sum(axis)).sum().item() / math.log(2) for axis in (0, 1)]
    bits = max(0.0, sum(entropies) - torch.special.entr(p).sum().item() / math.log(2))
    return bits, bits / min(entropies) if min(entropies) > 1e-12 else 0.0


def similarity(shared, tokens):
    """Jaccard-like similarity of experts (E, E), paper section 5.6. 1 on the diagonal, 0 for an expert never chosen.

    With c_i the tokens that an image sends to expert i, S_ij = sum of (c_i + c_j - |c_i - c_j|) over the images where both
    appear, over sum of (c_i + c_j) where either does. As c_i + c_j - |c_i - c_j| = 2 min(c_i, c_j), which is 0 unless both
    appear, two sums over all images suffice: shared (E, E) = sum of min(c_i, c_j), and tokens (E,) = sum of c_i.
    """
    return 2 * shared.double() / (tokens.unsqueeze(1) + tokens).clamp(min=1)


def cumulative(histogram):
    """For each expert the share of the images using it that send it at most 1, 2, ... patches; None if no image does.

    histogram (E, 1 + most patches): the number of images that send expert e exactly n patches.
    """
    users = histogram[:, 1:].double()
    return [(row.cumsum(0) / row.sum()).tolist() if row.sum() > 0 else None for row in users]


def top_classes(table, classes, count=5):
    """For each expert [[class, share of the expert's tokens], ...], largest first, only classes that have some.

    table (classes, E): tokens; at most `count` classes for each.
    """
    order = table.argsort(dim=0, descending=True, stable=True)[:count].T.tolist()  # (E, count)
    shares = table.double() / table.sum(0).clamp(min=1)
    return [[[classes[c], shares[c, e].item()] for c in best if table[c, e] > 0] for e, best in enumerate(order)]


class LayerCounts:
    """Running sums of one MoE layer over the images seen so far.

    grid: (class tokens, rows, columns) of the layer. factors: what is known about the M images, from known_factors().
    Each is also paired with another image (`shuffled`): what is left then is the level of chance, which is above 0 when
    there are few images for the number of classes, or where a factor is tied to the position, as objects are to the centre.
    """

    def __init__(self, num_experts, grid, factors, all_choices=False, device="cpu", patches=6):
        self.num_experts, self.grid, self.factors = num_experts, grid, factors
        self.all_choices, self.device, self.images, N = all_choices, device, 0, grid[1] * grid[2]
        self.shuffled = torch.randperm(len(factors["class"][0]), generator=torch.Generator().manual_seed(0))
        sizes = {name: count for name, (_, count) in factors.items()} | {"position": N}
        self.tables = {name: self.zeros(count, num_experts) for name, count in sizes.items()}  # (levels, E) patches
        self.by_chance = {name: self.zeros(count, num_experts) for name, count in sizes.items()}
        self.class_token = self.zeros(num_experts)
        self.entropy = torch.zeros((), dtype=torch.float64, device=device)  # nats, summed over patches
        self.histogram = self.zeros(num_experts, 1 + N)  # images that send expert e exactly n patches
        self.shared = self.zeros(num_experts, num_experts)  # see similarity()
        self.surest = torch.zeros(num_experts, patches, device=device)  # highest probabilities met, at most one per image,
        self.surest_at = self.zeros(num_experts, patches, 2)  # and their (image, patch)

    def zeros(self, *size):
        return torch.zeros(size, dtype=torch.int64, device=self.device)

    def add(self, routing):
        """Count the next B images: their routing, a Routing of T = B * (class tokens + N) tokens, image by image."""
        extra, E, N = self.grid[0], self.num_experts, self.grid[1] * self.grid[2]
        choices = routing.experts if self.all_choices else routing.experts[:, :1]
        choices = choices.view(-1, extra + N, choices.shape[1])  # (T, K) -> (B, class tokens + N, K)
        probs = routing.probs.view(-1, extra + N, E)[:, extra:]  # (B, N, E)
        self.class_token += crosstab(torch.zeros_like(choices[:, :extra]), choices[:, :extra], 1, E)[0]
        choices = choices[:, extra:]  # (B, N, K)
        B = len(choices)
        image = torch.arange(B, device=self.device).view(B, 1, 1).expand_as(choices)
        per_image = crosstab(image, choices, B, E)  # (B, E)
        self.histogram += crosstab(torch.arange(E, device=self.device).expand(B, E), per_image, E, 1 + N)
        self.shared += torch.minimum(per_image.unsqueeze(2), per_image.unsqueeze(1)).sum(0)  # (B, E, E) -> (E, E)
        self.entropy += torch.special.entr(probs).sum(dtype=torch.float64)
        self.add_factors(choices)
        self.add_surest(choices[..., 0], probs)
        self.images += B

    def add_factors(self, choices):
        """Pair the experts of every patch, choices (B, N, K), with the levels of each factor, and with those by chance."""
        B, N, _ = choices.shape
        mine = torch.arange(self.images, self.images + B)
        position = torch.arange(N).expand(B, N)
        levels = {name: (level[mine], level[self.shuffled[mine]]) for name, (level, _) in self.factors.items()}
        levels["position"] = position, (position + mine.unsqueeze(1)) % N  # by chance: all patches of image m move on by m
        for name, pair in levels.items():
            for table, level in zip((self.tables[name], self.by_chance[name]), pair):
                level = level.to(self.device).view(B, -1, 1).expand_as(choices)  # (B,) or (B, N) -> (B, N, K)
                table += crosstab(level, choices, len(table), self.num_experts)

    def add_surest(self, first, probs):
        """Keep, for each expert, the patches that chose it with the highest probability: first (B, N), probs (B, N, E)."""
        chosen = first.unsqueeze(2) == torch.arange(self.num_experts, device=self.device)  # (B, N, E)
        value, patch = (probs * chosen).max(1)  # (B, E): the best patch of each image
        image = torch.arange(self.images, self.images + len(first), device=self.device).unsqueeze(1).expand_as(patch)
        value = torch.cat([self.surest, value.T], 1)  # (E, patches + B)
        at = torch.cat([self.surest_at, torch.stack([image, patch], 2).transpose(0, 1)], 1)  # (E, patches + B, 2)
        order = value.argsort(dim=1, descending=True, stable=True)[:, :self.surest.shape[1]]  # (E, patches)
        self.surest, self.surest_at = value.gather(1, order), at.gather(1, order.unsqueeze(2).expand(-1, -1, 2))

    def summary(self, classes):
        """The numbers of this layer as plain values for JSON, a dict; classes are the names. The report explains each."""
        _, rows, columns = self.grid
        tables, by_chance = ({name: table.cpu() for name, table in t.items()} for t in (self.tables, self.by_chance))
        tokens, spatial = tables["position"].sum(0), tables["position"].T.double() / self.images  # (E,), (E, N)
        share = tokens.double() / tokens.sum()
        information = {name: (*mutual_information(tables[name]), mutual_information(by_chance[name])[1]) for name in tables}
        return dict(
            grid=[rows, columns], share=share.tolist(),
            coefficient_of_variation=(share.std(correction=0) / share.mean()).item(),
            class_token_share=(self.class_token.double() / self.class_token.sum()).tolist() if self.grid[0] else None,
            experts_per_image=self.histogram[:, 1:].sum().item() / self.images,
            router_entropy_bits=self.entropy.item() / (self.images * rows * columns * math.log(2)),
            information={name: dict(zip(("bits", "normalized", "normalized_by_chance"), values))
                         for name, values in information.items()},
            similarity=similarity(self.shared.cpu(), tokens).tolist(), top_classes=top_classes(tables["class"], classes),
            spatial=spatial.view(-1, rows, columns).tolist(), patches_per_image_cdf=cumulative(self.histogram.cpu()))


# ---------------------------------------------------------------- one pass over the data


class Run(NamedTuple):
    """What one checkpoint did: everything that the files and the report are made of."""

    name: str  # the checkpoint's path
    config: dict
    blocks: list  # index of each MoE layer's block
    classes: list
    counts: list  # a LayerCounts per MoE layer
    layers: list  # its summary()
    examples: list  # (title, image (3, S, S) uint8, [(rows, columns) experts per layer])
    patches: list  # per layer and expert, surest_patches()


def known_factors(dataset, chosen, grid, transform):
    """What is known about the chosen images (M,): {factor: (levels, number of levels)}.

    Levels are int64, (M,) for images or (M, N) for the patches of a grid; transform: that of the images. Every dataset
    has classes; `shapes` knows for each patch whether it shows the object (more than half of it), and for these, which
    shape, texture and colour: on the background these three are -1, which counts nowhere.
    """
    factors = {"class": (dataset.labels[chosen].long(), len(dataset.classes))}
    if hasattr(dataset, "factors"):
        masks = transform(255 * dataset.masks[chosen].unsqueeze(1).to(torch.uint8))  # (M, 1, S, S), cropped like the images
        on_object = F.adaptive_avg_pool2d(masks.float(), grid[1:]).flatten(1) > 127.5  # (M, N)
        factors["object"] = (on_object.long(), 2)
        for name in ("shape", "texture", "colour"):
            values = dataset.factors[name]
            factors[name] = (torch.where(on_object, values[chosen].unsqueeze(1), -1), int(values.max()) + 1)
    return factors


@torch.no_grad()
def count_routing(model, loader, layers, device, mean, std, examples=()):
    """Run the model once over the loader and count in `layers`, a LayerCounts per MoE layer. mean, std: for normalize().

    Returns for each position in `examples` (image (3, S, S) uint8, [(rows, columns) first choices per layer]).
    Computes in bfloat16 where eval.py does. ValueError at the first image that cannot be read.
    """
    shown, seen = [], 0
    for images, _, unreadable in tqdm(loader, desc="inspect", unit="batch", leave=False, disable=None):
        if (unreadable >= 0).any():
            path = loader.dataset.dataset.path(int(unreadable.max()))
            raise ValueError(f"cannot read {path}: repair or remove the file")
        with autocast(device, best_dtype(device)):
            _, routings = model(normalize(images.to(device, non_blocking=True), mean, std), return_routing=True)
        for layer, routing in zip(layers, routings):
            layer.add(routing)
        for i in (i - seen for i in examples if seen <= i < seen + len(images)):
            maps = [r.experts[:, 0].view(len(images), -1)[i, layer.grid[0]:].view(layer.grid[1:]).cpu()
                    for layer, r in zip(layers, routings)]
            shown.append((images[i], maps))
        seen += len(images)
    return shown


def cut_out(image, patch, grid, size=48):
    """What surrounds a patch of a grid, (3, size, size): three patches, or a quarter of the image (3, S, S) if more."""
    S, (_, rows, columns) = image.shape[-1], grid
    side = min(S, max(S // 4, 3 * S // rows))
    top, left = (min(max(0, (2 * i + 1) * S // (2 * n) - side // 2), S - side)
                 for i, n in ((patch // columns, rows), (patch % columns, columns)))
    mode = v2.InterpolationMode.NEAREST_EXACT if side < size else v2.InterpolationMode.BILINEAR
    return v2.functional.resized_crop(image, top, left, side, side, [size, size], mode)


def surest_patches(dataset, chosen, layer):
    """For each expert its patches of highest probability, cut out and joined, (3, 48, 48 patches); None if it has none.

    layer: the LayerCounts of the chosen images (M,) of a dataset.
    """
    strips = []
    for probs, places in zip(layer.surest.tolist(), layer.surest_at.tolist()):
        places = [place for p, place in zip(probs, places) if p > 0]
        patches = [cut_out(dataset[int(chosen[image])][0], patch, layer.grid) for image, patch in places]
        blank = torch.full((3, 48, 48 * (len(probs) - len(patches))), 255, dtype=torch.uint8)
        strips.append(torch.cat(patches + [blank], 2) if patches else None)
    return strips


def inspect(path, model, checkpoint, dataset, args, device):
    """Everything about one checkpoint (its path and dict, the model) on one dataset: a Run."""
    M = min(len(dataset), args.max_images or len(dataset))
    chosen = torch.arange(M) * len(dataset) // M  # evenly spread: a folder's images come class by class
    loader = eval_loader(Subset(dataset, chosen.tolist()), args.batch_size,
                         auto_workers(dataset) if args.workers is None else args.workers, device)
    experts = checkpoint["config"]["num_experts"]
    counts = [LayerCounts(experts, grid, known_factors(dataset, chosen, grid, dataset.transform), args.all_choices, device)
              for grid in model.grids]
    n = min(args.examples, M)
    spread = [(2 * i + 1) * M // (2 * n) for i in range(n)]
    shown = count_routing(model, loader, counts, device, checkpoint["mean"], checkpoint["std"], spread)
    examples = [(dataset.classes[dataset.labels[chosen[i]]], *example) for i, example in zip(spread, shown)]
    patches = [surest_patches(dataset, chosen, layer) for layer in counts]
    return Run(path, checkpoint["config"], model.moe_blocks, dataset.classes, counts,
               [layer.summary(dataset.classes) for layer in counts], examples, patches)


# ---------------------------------------------------------------- pictures: a panel is a list of marks
# Each is drawn twice from the same list: as SVG for the page, where text stays sharp and follows dark mode, and by Pillow
# for the PNG files. A panel is as wide as a phone and the page lets panels flow: nothing is shrunk or scrolled sideways.

WIDTH, GREY, BLUE = 320, (136, 136, 136), (20, 140, 220)
OKABE_ITO = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66),
             GREY)  # for their black, which dark mode would hide


def palette(num_experts):
    """num_experts colours (r, g, b): Okabe and Ito's, which the colour-blind can tell apart, beyond 8 an even wheel."""
    if num_experts <= len(OKABE_ITO):
        return OKABE_ITO[:num_experts]
    wheel = (colorsys.hsv_to_rgb(e / num_experts, (0.85, 0.5)[e % 2], (0.75, 0.95)[e % 2]) for e in range(num_experts))
    return [tuple(round(255 * c) for c in colour) for colour in wheel]


class Panel:
    """A picture WIDTH wide with a title above it. Lengths in pixels, y downwards; colours are (r, g, b)."""

    def __init__(self, title, height):
        self.title, self.height, self.marks = title, math.ceil(height), []

    def rect(self, x, y, w, h, colour, alpha=1.0):
        self.marks.append(("rect", x, y, w, h, colour, alpha))

    def line(self, points, colour, width=2):
        self.marks.append(("line", points, colour, width))

    def text(self, x, y, text, anchor="start", size=11):
        """In the colour of the page's text; y is the base line, anchor "start", "middle" or "end"."""
        self.marks.append(("text", x, y, str(text), anchor, size))

    def image(self, x, y, w, h, picture):
        """A Pillow image stretched to w x h: a small one keeps hard edges, a large one is reduced to twice the size."""
        size = min(picture.width, round(2 * w)), min(picture.height, round(2 * h))
        self.marks.append(("image", x, y, w, h, picture if size == picture.size else picture.resize(size, Image.BOX)))


def svg(panel):
    """The panel as an element of the page, a str, text escaped."""
    title, marks = html.escape(panel.title), "".join(SVG_MARKS[kind](*mark) for kind, *mark in panel.marks)
    return (f'<figure><figcaption>{title}</figcaption><svg role="img" aria-label="{title}" width="{WIDTH}" '
            f'height="{panel.height}" viewBox="0 0 {WIDTH} {panel.height}">{marks}</svg></figure>')


def svg_rect(x, y, w, h, colour, alpha):
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="rgb{colour}" fill-opacity="{alpha:.2f}"/>'


def svg_line(points, colour, width):
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{points}" fill="none" stroke="rgb{colour}" stroke-width="{width}"/>'


def svg_text(x, y, text, anchor, size):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{html.escape(text)}</text>'


def svg_image(x, y, w, h, picture):
    photo = picture.mode == "RGB" and picture.width > 64
    data = base64.b64encode(encode(picture, "JPEG" if photo else "PNG")).decode()
    return (f'<image x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" preserveAspectRatio="none" '
            f'{"class=hard " if picture.width < w else ""}href="data:image/{"jpeg" if photo else "png"};base64,{data}"/>')


SVG_MARKS = dict(rect=svg_rect, line=svg_line, text=svg_text, image=svg_image)


def encode(picture, kind):
    """The bytes of a JPEG or PNG file."""
    file = io.BytesIO()
    picture.save(file, kind, quality=85)
    return file.getvalue()


def png(panel, scale=2, top=22):
    """The panel, under its title in a strip of `top` pixels, as a Pillow image on white, `scale` times as large."""
    picture = Image.new("RGB", (WIDTH * scale, (top + panel.height) * scale), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((0, 0), panel.title, "black", font(13 * scale))
    for kind, *mark in panel.marks:
        if kind == "line":
            points, colour, width = mark
            draw.line([(scale * x, scale * (top + y)) for x, y in points], colour, scale * width, joint="curve")
        elif kind == "text":
            x, y, text, anchor, size = mark
            anchor = dict(start="ls", middle="ms", end="rs")[anchor]
            draw.text((scale * x, scale * (top + y)), text, "black", font(size * scale), anchor)
        else:
            x, y, w, h = (round(scale * v) for v in (mark[0], top + mark[1], mark[2], mark[3]))
            w, h = max(1, w), max(1, h)
            if kind == "rect":
                part = Image.new("RGBA", (w, h), (*mark[4], round(255 * mark[5])))
            else:
                part = mark[4].resize((w, h), Image.NEAREST if mark[4].width < w else Image.BOX)
            picture.paste(part, (x, y), part if part.mode == "RGBA" else None)
    return picture


@cache
def font(size):
    return ImageFont.load_default(size)


def sheet(panels, per_row=4, gap=40):
    """The panels in rows of per_row, a gap apart, as one Pillow image: a PNG file of DIR."""
    rows = [[png(panel) for panel in panels[i:i + per_row]] for i in range(0, len(panels), per_row)]
    heights = [max(picture.height for picture in row) + gap for row in rows]
    step = rows[0][0].width + gap
    page = Image.new("RGB", (gap + len(rows[0]) * step, gap + sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            page.paste(picture, (gap + j * step, gap + sum(heights[:i])))
    return page


def short(text, length):
    return text if len(text) <= length else text[:length - 1] + "…"


def tint(values, colour):
    """values (rows, columns) in 0..1 -> an image of one colour, transparent at 0 and full at 1, on any background."""
    rgb = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, *values.shape)
    alpha = (255 * values).round().to(torch.uint8).unsqueeze(0)
    return v2.functional.to_pil_image(torch.cat([rgb, alpha]), "RGBA")


def overlay(image, experts, colours):
    """The image (3, S, S) in grey, each patch tinted with its expert's of the colours, experts (rows, columns): Fig. 6."""
    grid = torch.tensor(colours, dtype=torch.float)[experts].permute(2, 0, 1).unsqueeze(0)  # (1, 3, rows, columns)
    colour = F.interpolate(grid, image.shape[-2:], mode="nearest")[0]
    grey = v2.functional.rgb_to_grayscale(image, 3).float()
    return v2.functional.to_pil_image((0.4 * grey + 0.6 * colour).round().to(torch.uint8))


def tiles(title, pictures, labels, per_row):
    """Small pictures of one shape (None: nothing but the label) in rows, a label above each."""
    w = (WIDTH - 6 * (per_row - 1)) / per_row
    h = w * next((p.height / p.width for p in pictures if p), 0)
    panel = Panel(title, math.ceil(len(pictures) / per_row) * (h + 20))
    for i, (picture, label) in enumerate(zip(pictures, labels)):
        x, y = i % per_row * (w + 6), i // per_row * (h + 20)
        panel.text(x, y + 11, label)
        if picture:
            panel.rect(x, y + 15, w, h, GREY, 0.12)
            panel.image(x, y + 15, w, h, picture)
    return panel


def plot(title, curves, colours, x_label, x_ticks, y_ticks):
    """Curves, each a list of (x, y), over the range of the ticks. The title says what y is."""
    panel, left, right, top, bottom = Panel(title, 190), 34, WIDTH - 12, 6, 150

    def place(x, y):
        return (left + (x - x_ticks[0]) / max(1, x_ticks[-1] - x_ticks[0]) * (right - left),
                bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top))

    for y in y_ticks:
        panel.line([place(x_ticks[0], y), (right, place(0, y)[1])], GREY, 1)
        panel.text(left - 5, place(0, y)[1] + 4, f"{y:g}", "end")
    for x in x_ticks:
        panel.text(place(x, 0)[0], bottom + 15, f"{x:g}", "middle")
    panel.text((left + right) / 2, bottom + 30, x_label, "middle")
    for curve, colour in zip(curves, colours):
        panel.line([place(*point) for point in curve], colour)
        for x, y in (place(*point) for point in curve if len(curves) == 1):
            panel.rect(x - 3, y - 3, 6, 6, colour)
    return panel


def matrix(title, values, rows, columns, left):
    """A small table (rows, columns) of numbers in 0..1, each a tinted cell, with its value where that fits."""
    w = (WIDTH - left) / len(columns)
    h, step = min(w, 30), math.ceil(14 / w)
    panel = Panel(title, len(rows) * h + 18)
    for j in range(0, len(columns), step):
        panel.text(left + (j + 0.5) * w, 11, columns[j], "middle")
    for i, row in enumerate(values):
        panel.text(left - 5, 18 + (i + 0.65) * h, rows[i] if i % step == 0 else "", "end")
        for j, value in enumerate(row):
            panel.rect(left + j * w, 18 + i * h, w - 1, h - 1, BLUE, 0.04 + 0.7 * value)
            if w >= 18:
                text = f"{value:.2f}".lstrip("0") if value < 0.995 else "1"
                panel.text(left + (j + 0.48) * w, 18 + (i + 0.65) * h, text, "middle", 10)
    return panel


# ---------------------------------------------------------------- the figures: a Run -> panels, most of them one per layer


def legend(run):
    """The colours of the experts, shared by all figures."""
    colours = palette(run.counts[0].num_experts)
    per_row = min(16, len(colours))
    panel, w = Panel("the experts and their colours", math.ceil(len(colours) / per_row) * 24), WIDTH / per_row
    for e, colour in enumerate(colours):
        panel.rect(e % per_row * w, e // per_row * 24, w - 2, 8, colour)
        panel.text((e % per_row + 0.5) * w, e // per_row * 24 + 20, e, "middle")
    return panel


def draw_load(run):
    E, top = run.counts[0].num_experts, max(max(layer["share"]) for layer in run.layers)
    w, even = WIDTH / E, 130 - 110 / E / top
    for block, layer in zip(run.blocks, run.layers):
        panel = Panel(f"block {block}", 150)
        panel.line([(0, even), (WIDTH, even)], GREY, 1)
        for e, (share, colour) in enumerate(zip(layer["share"], palette(E))):
            h = 110 * share / top
            panel.rect(e * w + 1, 130 - h, w - 2, h, colour)
            panel.text((e + 0.5) * w, 145, e if e % math.ceil(E / 16) == 0 else "", "middle")
            y = even - 3 if 115 - h < even < 128 - h else 126 - h  # not struck through by the line
            panel.text((e + 0.5) * w, y, f"{100 * share:.1f}%" if E <= 8 else "", "middle", 10)
        yield panel


def draw_examples(run):
    yield legend(run)
    colours, labels = palette(run.counts[0].num_experts), ["image"] + [f"block {block}" for block in run.blocks]
    for name, image, maps in run.examples:
        pictures = [v2.functional.to_pil_image(image)] + [overlay(image, experts, colours) for experts in maps]
        yield tiles(short(name, 45), pictures, labels, min(4, len(pictures)))


def draw_spatial(run):
    for block, layer in zip(run.blocks, run.layers):
        maps = torch.tensor(layer["spatial"])  # (E, rows, columns)
        pictures = [tint(values / maps.max(), colour) for values, colour in zip(maps, palette(len(maps)))]
        title = f"block {block}, full colour: {100 * maps.max():.0f}% of the images"
        yield tiles(title, pictures, range(len(maps)), min(len(maps), 4 if len(maps) <= 16 else 8))


def draw_cumulative(run):
    yield legend(run)
    for block, layer in zip(run.blocks, run.layers):
        cdfs, N = layer["patches_per_image_cdf"], layer["grid"][0] * layer["grid"][1]
        shown = sorted({round(i * (N - 1) / 150) for i in range(151)})  # more points than pixels help nobody
        curves = [[(i + 1, cdf[i]) for i in shown] if cdf else [] for cdf in cdfs]
        x_ticks = sorted({1, math.ceil(N / 2), N})
        yield plot(f"block {block}", curves, palette(len(cdfs)), "patches of the image, at most", x_ticks, [0, 0.5, 1])


def draw_classes(run):
    tables = [layer.tables["class"].cpu().double() for layer in run.counts]  # (classes, E)
    shares = [table / table.sum(1, keepdim=True).clamp(min=1) for table in tables]
    left, C, E, top = 110, *shares[0].shape, max(share.max().item() for share in shares)
    h, w = min(18, max(360, min(C, 1000)) / C), (WIDTH - left) / E  # of a cell; at least a pixel high up to 1,000 classes
    for block, share in zip(run.blocks, shares):
        panel = Panel(f"block {block}, strongest: {100 * top:.0f}% of a class", C * h + 24)
        for e in range(0, E, math.ceil(14 / w)):
            panel.text(left + (e + 0.5) * w, 11, e, "middle")
        panel.image(left, 16, WIDTH - left, C * h, tint(share / top, BLUE))
        for c in range(0, C, math.ceil(12 / h)):
            name = run.classes[c] if h >= 12 else f"{c} {run.classes[c]}"  # with its number where not all have room
            panel.text(left - 5, 16 + c * h + max(9, h / 2 + 4), short(name, 17), "end", 10)
        yield panel


def draw_similarity(run):
    experts = range(run.counts[0].num_experts)
    for block, layer in zip(run.blocks, run.layers):
        yield matrix(f"block {block}", layer["similarity"], experts, experts, 20)


def draw_depth(run):
    E, curve = run.counts[0].num_experts, [(b, layer["experts_per_image"]) for b, layer in zip(run.blocks, run.layers)]
    yield plot(f"experts per image, of {E}", [curve], [BLUE], "block", run.blocks, [0, E / 2, E])


def draw_factors(run):
    names = list(run.layers[0]["information"])
    for key, title in (("normalized", "measured, per block"), ("normalized_by_chance", "by chance, per block")):
        values = [[layer["information"][name][key] for layer in run.layers] for name in names]
        yield matrix(title, values, names, run.blocks, 70)


def draw_patches(run):
    for block, layer, strips in zip(run.blocks, run.layers, run.patches):
        labels = [", ".join(f"{short(name, 18)} {100 * share:.0f}%" for name, share in top[:2]) or "never chosen"
                  for top in layer["top_classes"]]
        pictures = [None if strip is None else v2.functional.to_pil_image(strip) for strip in strips]
        yield tiles(f"block {block}", pictures, [f"{e}: {label}" for e, label in enumerate(labels)], 1)


FIGURES = (  # file name, heading, what draws it, how to read it
    ("fig5", "Load: the share of the patches that each expert gets", draw_load,
     "The line is the even share, 1/E. Far above it is a favourite, an expert without a bar is dead weight; the balance "
     "losses of the training are there against both. (Paper, Figure 5.)"),
    ("fig6", "Who sees what: every patch tinted by its expert", draw_examples,
     "First the image, then one picture per MoE layer. Look for experts that keep to the object, to its outline, to the "
     "background, or to a place whatever the image shows. (Paper, Figure 6.)"),
    ("fig7", "Where: how often each position of the grid chooses each expert", draw_spatial,
     "One map per expert; an even tint: position plays no role. The paper found experts for the border and for the centre "
     "in ConvNeXt, none of that kind in ViT. (Figure 7.)"),
    ("fig8", "How many patches: cumulative distribution over the images that use an expert", draw_cumulative,
     "Upwards: share of the images. A curve that rises at once belongs to an expert that takes few patches of an image; "
     "one that rises late, to an expert that takes many. (Paper, Figure 8.)"),
    ("fig9", "Which class: the share of each class's patches per expert", draw_classes,
     "A row per class, in the order of the labels; a column per expert. Even columns: the expert does not care about the "
     "class. In the paper the first MoE layers do not follow the classes, the last three do: animals against objects. "
     "(Figures 9 and 10, top.)"),
    ("fig9_similarity", "Together or apart: similarity of the experts", draw_similarity,
     "1: two experts always get equally many patches of the same image; 0: they never share an image. (Paper, section 5.6, "
     "and Figures 9 and 10, bottom.)"),
    ("depth", "How many experts an image uses, by depth", draw_depth,
     "The mean number of different experts among the patches of one image. The paper counts about 7 of 8 for ViT-S, and "
     "6 of 8, 10.5 of 16 and 15.8 of 32 for ConvNeXt."),
    ("factors", "What the experts follow: mutual information with what is known of the image", draw_factors,
     "1: the factor decides the expert, or the expert the factor; 0: they have nothing to do with each other. What counts "
     "is the excess over chance, the same measure with each image given the factors of another. (object: does the patch "
     "show it? shape, texture, colour: among the object's patches; position: in the grid.) The paper could not measure "
     "this: ImageNet has no natural decomposition."),
    ("patches", "What the router is surest of", draw_patches,
     "For each expert the six patches that chose it with the highest probability, one per image at most, with their "
     "surroundings, and the two classes with the largest shares of its patches."))

# ---------------------------------------------------------------- the files

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1368px; margin: auto; padding: 16px }
p { max-width: 70ch; opacity: 0.75 } h3, p { overflow-wrap: anywhere }
.panels { display: flex; flex-wrap: wrap; gap: 20px 28px; align-items: start }
figure { margin: 0; max-width: 100% } figcaption { font-size: 14px }
svg { max-width: 100%; fill: currentColor } .hard { image-rendering: pixelated }
.panels > div { flex: 1 1 330px; min-width: 0 }
table { border-collapse: collapse; font-size: 13px; line-height: 1.3 } td, th { padding: 3px 5px; text-align: right }
th { border-bottom: 1px solid; vertical-align: bottom; font-weight: 600 }
"""


def key_numbers(run):
    """The table at the head of the report, a row per MoE layer."""
    head = "block", "grid", "experts per image", "load, CV", "router, bits", "class, bits", "class, norm."
    rows = [(block, "{}×{}".format(*s["grid"]), f"{s['experts_per_image']:.2f}", f"{s['coefficient_of_variation']:.3f}",
             f"{s['router_entropy_bits']:.2f}", f"{s['information']['class']['bits']:.3f}",
             f"{s['information']['class']['normalized']:.3f}") for block, s in zip(run.blocks, run.layers)]
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    config = " ".join(f"{key}={value}" for key, value in run.config.items())
    return (f"<div><h3>{html.escape(run.name)}</h3><p>{html.escape(config)}</p>"
            f"<table><tr><th>{'<th>'.join(head)}</tr>{rows}</table></div>")


def write_report(figures, runs, about):
    """The page of the runs, a str: one file, no scripts, no links. about: a sentence for its head.

    figures: [(file name, heading, caption, [panels per run])].
    """
    parts = [f"<h1>What the experts do</h1><p>{html.escape(about)}</p><div class=panels>", *map(key_numbers, runs), "</div>"]
    for _, heading, caption, panels_per_run in figures:
        parts.append(f"<h2>{heading}</h2><p>{caption}</p>")
        for run, panels in zip(runs, panels_per_run):
            parts.append(f"<h3>{html.escape(run.name)}</h3>" if len(runs) > 1 else "")
            parts.append(f'<div class=panels>{"".join(map(svg, panels))}</div>')
    return (f'<!DOCTYPE html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
            f"<title>What the experts do</title><style>{STYLE}</style>{''.join(parts)}</html>\n").encode()


def write_csv(run):
    """The bytes of a run's routing.csv: for every layer, class and expert the tokens, and their share of the class's."""
    file = io.StringIO(newline="")
    rows = csv.writer(file)
    rows.writerow(("layer", "block", "class", "expert", "tokens", "share"))
    for i, (block, layer) in enumerate(zip(run.blocks, run.counts)):
        table = layer.tables["class"].cpu()
        shares = table / table.sum(1, keepdim=True).clamp(min=1)
        for name, counts, class_shares in zip(run.classes, table.tolist(), shares.tolist()):
            for expert, (count, share) in enumerate(zip(counts, class_shares)):
                rows.writerow((i, block, name, expert, count, f"{share:.6f}"))
    return file.getvalue().encode()


def describe(run, args):
    """What summary.json says about one checkpoint."""
    layers = [dict(layer=i, block=block) | layer for i, (block, layer) in enumerate(zip(run.blocks, run.layers))]
    versions = dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__)
    return dict(checkpoint=run.name, model=run.config, data=args.data, split=args.split, images=run.counts[0].images,
                choices="all" if args.all_choices else "first", versions=versions, layers=layers)


def make_files(runs, args):
    """All results of the runs: {file name: bytes}. What belongs to that of --compare has `compare` in its name or key."""
    summary = describe(runs[0], args) | {"compare": describe(run, args) for run in runs[1:]}
    text = json.dumps(summary, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # a list of numbers on one line
    files = {"summary.json": text.encode()}
    for run, name in zip(runs, ("routing.csv", "routing_compare.csv")):
        files[name] = write_csv(run)
    figures = [(name, heading, caption, [list(draw(run)) for run in runs]) for name, heading, draw, caption in FIGURES]
    for name, _, _, panels_per_run in figures:
        files[f"{name}.png"] = encode(sheet(sum(panels_per_run, [])), "PNG")
    counted = "all its experts" if args.all_choices else "its first choice"
    about = (f"{summary['images']} images of {args.data}. Every patch counts for {counted}; the class token of a ViT is "
             f"left out. Made with torch {torch.__version__}, after Videau et al., “Mixture of Experts for Image "
             f"Classification: What’s the Sweet Spot?” (2025), section 5.6.")
    return files | {"report.html": write_report(figures, runs, about)}


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Show what each expert of a sparse checkpoint does.")
    flag = parser.add_argument
    flag("checkpoint", help="a file such as runs/convnext_nano-shapes-1/best.pt")
    flag("--data", required=True, help="shapes, cifar10, cifar100 or a folder")
    flag("--split", choices=("train", "val", "all"), default="all",
         help="of a folder without val/: all of it, or the fifth that training holds out (default: all)")
    flag("--out", required=True, help="folder for the results")
    flag("--compare", help="another checkpoint, shown beside the first")
    flag("--max-images", type=int, help="use this many, evenly spread over the data (default: all)")
    flag("--examples", type=int, default=8, help="images shown with their routing (default: 8)")
    flag("--all-choices", action="store_true", help="count all k experts of a token, not its first choice only")
    flag("--batch-size", type=int, default=128, help="images at a time (default: 128)")
    flag("--workers", type=int, help="processes that load images (default: 0 if in memory, else up to 12)")
    return parser.parse_args(argv)


def open_all(path, args, device):
    """(path, model, checkpoint, data set) of one checkpoint; ValueError if they cannot be had or do not fit together."""
    model, checkpoint = load_checkpoint(path, device)
    if not model.moe_blocks:
        raise ValueError(f"{path} is a dense model, it has no experts to inspect: train one with --moe-layers last2")
    dataset = open_dataset(args.data, args.split, eval_transform(checkpoint["image_size"], checkpoint["crop_ratio"]))
    match_classes(dataset.classes, checkpoint["classes"])
    return path, model, checkpoint, dataset


def check(args):
    """Refuse numbers that make no sense, and a folder that cannot be written, before any work is done."""
    for name, least in (("max_images", 1), ("examples", 0), ("batch_size", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {args.out} cannot be a folder ({error.strerror}): choose another place") from None


def write_files(folder, files):
    """files {name: bytes} into the folder, each whole or not at all. ValueError if that is impossible."""
    for name, content in files.items():
        path = os.path.join(folder, name)
        try:
            with open(path + ".tmp", "wb") as file:
                file.write(content)
            os.replace(path + ".tmp", path)
        except OSError as error:
            raise ValueError(f"cannot write {path} ({error.strerror}): make room or choose another --out") from None


def main(args):
    """The whole program: open and check everything, one pass per checkpoint, then all files, then a short table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = [open_all(path, args, device) for path in (args.checkpoint, args.compare) if path]
    check(args)
    runs = [inspect(*one, args, device) for one in opened]
    write_files(args.out, make_files(runs, args))
    for run in runs:
        print(f"{run.name}, {run.counts[0].images} images; what the expert of a patch says about its class and so on: "
              f"normalised mutual information\n{'block':>5}{'experts per image':>19}"
              + "".join(f"{name:>10}" for name in run.layers[0]["information"]) + "   share of patches per expert, %")
        for block, s in zip(run.blocks, run.layers):
            print(f"{block:>5}{s['experts_per_image']:>19.2f}"
                  + "".join(f"{value['normalized']:>10.3f}" for value in s["information"].values()) + "   "
                  + " ".join(f"{100 * share:4.1f}" for share in s["share"]))
    print(f"written to {args.out}/: report.html, summary.json, routing.csv, {len(FIGURES)} figures")


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
