"""Show what each expert of a sparse checkpoint does: numbers to cite and figures to look at.

    python inspect_experts.py runs/convnext_nano-shapes-1/best.pt --data shapes --out inspect
    python inspect_experts.py runs/convnext_nano-shapes-1/best.pt --data photo.jpg --out photo

This is the model inspection of "Mixture of Experts for Image Classification: What's the Sweet
Spot?" (Videau et al., TMLR 2025), section 5.6, Figures 5 to 10. It adds what the paper could not
measure: which known factor of an image (shape, texture, colour, position) the experts follow.

The way of a routing, from the layer to the report:
1. The model returns one Routing per MoE layer, and LayerCounts.add() adds it to the running sums
   of its layer.
2. After the last image, LayerCounts.summary() turns the sums into the numbers of summary.json.
3. Each figure draws the numbers once, as SVG, which goes into report.html and into a file.

The report begins with how the training went (log.jsonl beside the checkpoint) and what the model
gets wrong. A dense checkpoint has these two only. Own pictures, one file or a folder of them, need
no classes: the report shows the answer and the routing of each.

DIR then holds report.html (one file, opens from disk), summary.json (all numbers), routing.csv
(patches per layer, class and expert, as UTF-8 with a byte order mark) and one SVG file per figure.

As in the paper, a token counts for its first choice. The class token of a ViT has no place in the
image, so it is counted apart. Everything else is about the patches.

Letters: B images of a batch, M images in all, N patches per image, E experts, K counted choices
per patch (1, or k with --all-choices), L levels of a factor (16 classes, 2 for object or not, ...).
"""

import argparse
import base64
import csv
import html
import io
import itertools
import json
import math
import os
import platform
import re
import sys
import tempfile
import unicodedata
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageColor
from torchvision.transforms import v2
from tqdm import tqdm

from eval import (
    PALETTE, auto_workers, best_dtype, eval_loader, eval_transform, load_checkpoint, match_classes,
    normalize, number, open_dataset, run_program, warn)

# ---------------------------------------------------------------- 1. statistics
# Pure functions of counts. "Patches of an expert" are the patches that chose it.


def crosstab(rows, columns, R, C):
    """Count how often each pair occurs: rows and columns, int64 of one shape -> (R, C) int64.

    A row of -1 is left out.
    """
    cells = (rows + 1) * C + columns  # row -1 has the first C cells, which are cut off below
    counts = cells.flatten().bincount(minlength=(R + 1) * C)
    return counts.view(R + 1, C)[1:]


def patches_per_level(levels, chosen, L, E):
    """Count the patches of each level per expert: chosen (B, N, K) int64 -> (L, E) int64.

    levels: in 0 .. L - 1 or -1 for none. (B,) is one per image, (B, N) or (1, N) one per patch.
    """
    levels = levels.view(len(levels), -1, 1)
    return crosstab(levels.expand_as(chosen), chosen, L, E)


def cumulative(histogram):
    """For each expert, list the share of its images that send it at most 1, 2, ..., N patches.

    histogram (E, 1 + N): the images that send it 0, 1, ..., N. An expert's images are those that
    send it at least one patch. An expert without images has None. (Paper, Figure 8.)
    """
    curves = []
    for images in histogram[:, 1:].double():
        shares = images.cumsum(0) / images.sum()
        curves.append(shares.tolist() if images.any() else None)
    return curves


def similarity(shared, patches):
    """Return the paper's Jaccard-like similarity of two experts, (E, E) float64 (section 5.6).

        S_ij = sum over images with both of (c_i + c_j - |c_i - c_j|)
               / sum over images with either of (c_i + c_j)

    c_i is an image's number of patches of expert i. c_i + c_j - |c_i - c_j| is 2 min(c_i, c_j), and
    0 unless both experts appear. So two sums over all images suffice: shared (E, E), the sum of
    min(c_i, c_j), and patches (E,), the sum of c_i. An expert that is never chosen has 0.
    """
    either = patches.unsqueeze(1) + patches  # (E, E)
    return 2 * shared.double() / either.clamp(min=1)


def entropy(p):
    """Return H = sum of -p log2 p over a tensor of probabilities, a float in bits."""
    return torch.special.entr(p).sum().item() / math.log(2)


def mutual_information(counts):
    """Return (bits, normalized): how much knowing the row tells about the column.

    counts (R, C): how often each pair was seen, so p(r, c) = counts[r, c] / counts.sum().

        I = sum of p(r, c) log2( p(r, c) / (p(r) p(c)) ) = H(r) + H(c) - H(r, c)

    (Cover and Thomas, Elements of Information Theory, section 2.4.) The normalized value is
    I / min(H(r), H(c)). It is 1 if one side decides the other, and 0 if they are independent or
    if one side never varies.
    """
    p = counts.double() / counts.sum().clamp(min=1)
    h_rows = entropy(p.sum(1))
    h_columns = entropy(p.sum(0))
    bits = max(0.0, h_rows + h_columns - entropy(p))  # rounding may leave a little less than 0
    smaller = min(h_rows, h_columns)
    return bits, bits / smaller if smaller > 1e-12 else 0.0


def row_shares(table):
    """Return the share of each row's patches per column, of a table of patches. An empty row: 0."""
    return table.double() / table.sum(1, keepdim=True).clamp(min=1)


def top_classes(table, classes, count=5):
    """For each expert, list the classes with the largest shares of its patches.

    table (classes, E): patches. classes: the names. Returns [[name, share], ...] per expert,
    largest first, at most `count` of them, without classes that have no patch.
    """
    found = []
    for share in row_shares(table.T):  # (classes,), of one expert
        best = share.argsort(descending=True, stable=True)[:count]
        best = best[share[best] > 0].tolist()
        found.append([[classes[c], share[c].item()] for c in best])
    return found


def read_log(checkpoint):
    """Read the log.jsonl beside a checkpoint, the path: {epoch: dict}, empty if there is none.

    A line that train.py did not write whole is left out.
    """
    log = {}
    with suppress(OSError):
        lines = Path(checkpoint).with_name("log.jsonl").read_text(errors="replace")
        for line in lines.splitlines():
            whole = re.fullmatch(r'{"epoch": (\d{1,6}),.*}', line)
            with suppress(ValueError):
                if whole:
                    log[int(whole[1])] = json.loads(line)
    return log


def points_of(log, *keys):
    """List (epoch, log[epoch][key][key]...) for the epochs that have a number there."""
    points = []
    for epoch, value in sorted(log.items()):
        with suppress(LookupError, TypeError):
            for key in keys:
                value = value[key]
            if math.isfinite(value):
                points.append((epoch, value))
    return points


# ---------------------------------------------------------------- 2. one pass over the images


class LayerCounts:
    """The running sums of one MoE layer, on the CPU. An image is forgotten once it is counted.

    As a control, each factor is counted a second time with the images' factors shuffled ("by
    chance"). Only what exceeds this control is a finding. The control is above 0 if there are few
    images per class, or if a factor is tied to the position, as objects are to the centre.

    Args:
        num_images: M.
        num_experts: E.
        grid: (class tokens, rows, columns) of the layer's tokens.
        factors: {name: (levels, L)} of the M images, from known_factors().
        all_choices: count all k choices of a patch, not only the first.
        keep: number of patches to keep per expert, those with the highest probability.
    """

    def __init__(self, num_images, num_experts, grid, factors, all_choices=False, keep=6):
        self.num_experts = num_experts
        self.grid = grid
        self.factors = factors
        self.all_choices = all_choices
        seed = torch.Generator().manual_seed(0)
        self.shuffled = torch.randperm(num_images, generator=seed)  # image m by chance
        self.images = 0
        self.class_token = 0  # becomes (E,)
        self.histogram = 0  # (E, 1 + N), the images that send an expert 0, 1, ..., N patches
        self.shared = 0  # (E, E), see similarity()
        self.entropy = 0  # (), in nats, summed over the patches
        self.tables = defaultdict(int)  # {factor: (L, E) patches}
        self.by_chance = defaultdict(int)
        self.surest = torch.zeros(num_experts, keep)  # the highest probabilities, best first
        self.surest_at = torch.zeros(num_experts, keep, dtype=torch.int64)  # image * N + patch

    def add(self, routing):
        """Add the next B images: a Routing of T = B * (class tokens + N) tokens, image by image.

        Return the first choices as B pictures, (B, rows, columns) int64.
        """
        extra, rows, columns = self.grid
        tokens = extra + rows * columns
        E = self.num_experts
        experts = routing.experts.cpu().unflatten(0, (-1, tokens))  # (T, k) -> (B, tokens, k)
        probs = routing.probs.cpu().unflatten(0, (-1, tokens))[:, extra:]  # (B, N, E)
        counted = experts if self.all_choices else experts[..., :1]
        chosen = counted[:, extra:]  # (B, N, K)
        B, N, _ = chosen.shape
        image = self.images + torch.arange(B)

        per_image = patches_per_level(torch.arange(B), chosen, B, E)
        expert = torch.arange(E).expand(B, E)
        self.images += B
        self.class_token += counted[:, :extra].flatten().bincount(minlength=E)
        self.histogram += crosstab(expert, per_image, E, 1 + N)
        self.shared += torch.minimum(per_image.unsqueeze(2), per_image.unsqueeze(1)).sum(0)
        self.entropy += torch.special.entr(probs).sum(dtype=torch.float64)
        self.add_factors(image, chosen)
        self.add_surest(image, chosen[..., 0], probs)
        return chosen[..., 0].view(B, rows, columns)

    def add_factors(self, image, chosen):
        """Pair the experts of each patch with the levels of each factor.

        image (B,): indices in 0 .. M - 1. chosen (B, N, K).
        """
        N = chosen.shape[1]
        E = self.num_experts
        other = self.shuffled[image]
        for name, (levels, L) in self.factors.items():
            self.tables[name] += patches_per_level(levels[image], chosen, L, E)
            self.by_chance[name] += patches_per_level(levels[other], chosen, L, E)
        position = torch.arange(N).unsqueeze(0)  # (1, N)
        moved = (position + image.unsqueeze(1)) % N  # by chance: image m is moved on by m patches
        self.tables["position"] += patches_per_level(position, chosen, N, E)
        self.by_chance["position"] += patches_per_level(moved, chosen, N, E)

    def add_surest(self, image, first, probs):
        """Keep the patches that chose their expert with the highest probability, one per image.

        image (B,): indices in 0 .. M - 1. first (B, N): the first choices. probs (B, N, E).
        """
        mine = F.one_hot(first, self.num_experts)  # (B, N, E)
        best, patch = (probs * mine).max(dim=1)  # (B, E): of each image
        place = image.unsqueeze(1) * first.shape[1] + patch
        best = torch.cat([self.surest, best.T], dim=1)  # (E, keep + B)
        place = torch.cat([self.surest_at, place.T], dim=1)
        order = best.argsort(dim=1, descending=True, stable=True)
        order = order[:, :self.surest.shape[1]]  # (E, keep)
        self.surest = best.gather(1, order)
        self.surest_at = place.gather(1, order)

    def summary(self, classes):
        """Return the numbers of this layer as plain values for JSON. classes: the names."""
        extra, rows, columns = self.grid
        position = self.tables["position"]  # (N, E)
        patches = position.sum(0).double()  # (E,)
        share = patches / patches.sum()
        token_share = self.class_token / self.class_token.sum().double()
        maps = position.T.double() / self.images  # (E, N)
        used = self.histogram[:, 1:].sum()  # pairs of an image and an expert
        nats = self.entropy / (self.images * rows * columns)

        numbers = {"grid": [rows, columns]}
        numbers["share"] = share.tolist()
        numbers["coefficient_of_variation"] = (share.std(correction=0) / share.mean()).item()
        numbers["class_token_share"] = token_share.tolist() if extra else None
        numbers["experts_per_image"] = used.item() / self.images
        numbers["router_entropy_bits"] = nats.item() / math.log(2)
        numbers["information"] = self.information()
        numbers["similarity"] = similarity(self.shared, patches).tolist()
        if "class" in self.tables:
            numbers["top_classes"] = top_classes(self.tables["class"], classes)
        numbers["spatial"] = maps.view(-1, rows, columns).tolist()
        numbers["patches_per_image_cdf"] = cumulative(self.histogram)
        return numbers

    def information(self):
        """Return for each factor what it tells about the expert, and what it tells by chance."""
        found = {}
        for name, table in self.tables.items():
            bits, normalized = mutual_information(table)
            _, by_chance = mutual_information(self.by_chance[name])
            found[name] = dict(bits=bits, normalized=normalized, normalized_by_chance=by_chance)
        return found


def known_factors(dataset, chosen, grid):
    """Return what is known about the chosen images: {factor: (levels, L)}, levels in 0 .. L - 1.

    Levels are int64, (M,) for images or (M, N) for the patches of a grid. Every data set knows
    the classes, but of own pictures nothing is known. The drawn ones also know which patches show
    the object and, for these, its colour, the shape and texture of `shapes`, and the part that
    fills most of the patch: a stroke of `glyphs`, a stripe of `flags`. On the background these are
    -1, which counts nowhere.
    """
    if not dataset.classes:
        return {}
    factors = {"class": (dataset.labels[chosen].long(), len(dataset.classes))}
    if not hasattr(dataset, "factors"):
        return factors
    masks = dataset.masks[chosen].unsqueeze(1)  # (M, 1, 32, 32), the part of the object, or 0
    parts = int(dataset.masks.max())
    shares = []  # of each patch that shows a part, (M, N) each
    for part in range(1, parts + 1):
        mask = 255 * (masks == part).to(torch.uint8)
        mask = dataset.transform(mask).float() / 255  # (M, 1, S, S), cropped like the images
        shares.append(F.adaptive_avg_pool2d(mask, grid[1:]).flatten(1))
    shares = torch.stack(shares)  # (parts, M, N)
    on_object = shares.sum(0) > 1 / 2
    factors["object"] = (on_object.long(), 2)
    part = shares.argmax(0)  # (M, N)
    if parts > 1:
        factors["part"] = (part.where(on_object, -1), parts)
    for name in ("shape", "texture", "colour"):
        if name in dataset.factors:
            values = dataset.factors[name][chosen]  # (M,), or of each part (M, parts)
            values = values.gather(1, part) if values.ndim == 2 else values.unsqueeze(1)
            factors[name] = (values.where(on_object, -1), int(values.max()) + 1)
    return factors


@torch.no_grad()
def count_choices(model, loader, layers, columns, checkpoint, device, examples=()):
    """Run the model once over a loader, and add each routing to its LayerCounts in `layers`.

    columns: those of the logits among which a class is predicted. checkpoint: its dict. examples:
    positions of images to show. Return the predictions, (M,) int64 indices into columns, and for
    each example (image (3, S, S) uint8, [first choices (rows, columns) per layer], probabilities
    (len(columns),)). Compute in bfloat16 where eval.py does. Raise ValueError at the first image
    that cannot be read.
    """
    loss = checkpoint["args"].get("loss", "softmax")
    predicted, shown = [], []
    seen = 0
    batches = tqdm(loader, "inspect", len(loader), unit="batch", leave=False,
                   disable=None)
    for images, _, unreadable in batches:
        broken = int(unreadable.max())
        if broken >= 0:
            path = loader.dataset.path(broken)
            raise ValueError(f"cannot read {path}: repair or replace the file")
        with torch.autocast(device.type, torch.bfloat16, best_dtype(device) == torch.bfloat16):
            inputs = normalize(images.to(device), checkpoint["mean"], checkpoint["std"])
            logits, routings = model(inputs, return_routing=True)
        logits = logits.float()[:, columns]
        probs = (logits.sigmoid() if loss == "sigmoid" else logits.softmax(1)).cpu()
        predicted.append(logits.argmax(1).cpu())
        maps = [layer.add(routing) for layer, routing in zip(layers, routings)]
        for i in range(len(images)):
            if seen + i in examples:
                mine = [choices[i] for choices in maps]
                shown.append((images[i], mine, probs[i]))
        seen += len(images)
    return torch.cat(predicted), shown


def cut_out(image, patch, grid):
    """Cut a patch and its neighbours out of an image (3, S, S), as (3, side, side).

    The cut is three patches wide, or a quarter of the image if that is more. At the border of the
    image it is moved inside. patch: an index into the grid.
    """
    _, rows, columns = grid
    S = image.shape[-1]
    step = S // rows  # a patch is as high as wide
    side = min(S, max(S // 4, 3 * step))
    row, column = divmod(patch, columns)
    middle = step // 2 - side // 2  # from a patch's corner to that of the cut around it
    top = min(max(0, row * step + middle), S - side)
    left = min(max(0, column * step + middle), S - side)
    return image[:, top:top + side, left:left + side]


def surest_patches(dataset, chosen, layer):
    """For each expert, join the patches that LayerCounts kept, side by side: (3, side, width).

    An expert without patches has None. chosen (M,): which images of the dataset were counted.
    """
    strips = []
    for probs, places in zip(layer.surest, layer.surest_at):
        cuts = []
        for place in places[probs > 0].tolist():
            m, patch = divmod(place, math.prod(layer.grid[1:]))
            image, _, _ = dataset[int(chosen[m])]
            cuts.append(cut_out(image, patch, layer.grid))
        strips.append(torch.cat(cuts, dim=2) if cuts else None)
    return strips


class Example(NamedTuple):
    """An image, where its patches went, and what the model answered."""
    title: str  # the class of the image, or the path of an own picture
    image: torch.Tensor  # (3, S, S) uint8, what the model sees
    maps: list  # per MoE layer: the first choices, (rows, columns)
    answers: list  # [[class, probability], ...], the best first


class Findings(NamedTuple):
    """What one checkpoint did on the data: everything that the figures and files are made of.

    A dense model has no layers.
    """

    name: str  # path of the checkpoint
    config: dict  # model name and options
    images: int  # how many were counted
    classes: list  # names, in the order of the labels
    layers: list  # the summary() of each MoE layer, with its number and its block
    examples: list  # of Example
    # What own pictures do not have:
    log: dict = {}  # see read_log()
    confusion: torch.Tensor | None = None  # (true classes, predicted classes) int64 images
    class_tables: list = []  # per layer: (classes, E) int64 patches
    patches: list = []  # per layer: its surest_patches()


def inspect(path, model, checkpoint, dataset, args, device):
    """Run one checkpoint over a data set, and return all that is known of it.

    path, checkpoint, model: the file, its dict and the model. args: of the command line. Raise
    ValueError if an image cannot be read or if a router computes something that is not finite.
    """
    own = not dataset.classes
    classes = dataset.classes or checkpoint["classes"]
    columns = match_classes(classes, checkpoint["classes"])
    M = min(len(dataset), args.max_images or len(dataset))
    chosen = torch.arange(M) * len(dataset) // M  # evenly spread: folders come class by class
    examples = middles(M, M if own else min(args.examples, M))
    counts = []
    for grid in model.grids:
        factors = known_factors(dataset, chosen, grid)
        E = checkpoint["config"]["num_experts"]
        counts.append(LayerCounts(M, E, grid, factors, args.all_choices))

    workers = auto_workers(dataset) if args.workers is None else args.workers
    loader = eval_loader(dataset, args.batch_size, workers, device, chosen.tolist())
    predicted, shown = count_choices(model, loader, counts, columns, checkpoint, device, examples)

    layers = []
    for i, (block, layer) in enumerate(zip(model.moe_blocks, counts)):
        if not layer.entropy.isfinite():
            raise ValueError(f"{path}: the router of block {block} computes numbers that are not "
                             f"finite: inspect another checkpoint")
        layers.append(dict(layer=i, block=block) | layer.summary(classes))
    named = []
    for index, (image, maps, probs) in zip(chosen[examples].tolist(), shown):
        title = dataset.path(index) if own else classes[dataset.labels[index]]
        named.append(Example(title, image, maps, best_classes(probs, classes)))
    found = Findings(path, checkpoint["config"], M, classes, layers, named)
    if own:
        return found
    return found._replace(
        log=read_log(path),
        confusion=crosstab(dataset.labels[chosen], predicted, len(classes), len(classes)),
        class_tables=[layer.tables["class"] for layer in counts],
        patches=[surest_patches(dataset, chosen, layer) for layer in counts])


def middles(M, n):
    """List the positions in the middle of n equal parts of M images."""
    return [(2 * i + 1) * M // (2 * n) for i in range(n)]


def best_classes(probs, classes):
    """List the five most probable classes, [[name, probability], ...]. probs (classes,)."""
    values, best = probs.topk(min(5, len(classes)))
    return [[classes[c], value] for c, value in zip(best.tolist(), values.tolist())]


# ---------------------------------------------------------------- 3. figures
# A figure is a list of panels, most often one per MoE layer. A panel is WIDTH pixels wide, so that
# it fits on a phone. Lengths are in pixels, y points downwards, and colours are (r, g, b). Text
# has the colour of the page, so that it follows dark mode.

WIDTH = 320  # of a panel
TITLE = 24  # height of its title
GAP = 24  # between the panels of a file
GREY = (136, 136, 136)  # lines
BLUE = (20, 140, 220)  # numbers that belong to no expert
VIOLET = (150, 0, 240)  # see palette()


class Panel(NamedTuple):
    """A part of a figure, drawn below the one before it."""
    title: str
    height: float  # without the title
    marks: list  # elements of SVG, strings


def palette(num_experts):
    """Return one colour per expert, [(r, g, b), ...].

    Up to 8 experts have the colours of Okabe and Ito, which colour-blind readers can tell apart.
    The eighth is violet instead of black: a tint in black, grey or white looks like no tint.
    More experts have an even wheel of hues, alternately dark and bright.
    """
    if num_experts <= 8:
        return [*PALETTE[:7], VIOLET][:num_experts]
    colours = []
    for e in range(num_experts):
        tone = "85%, 75%" if e % 2 == 0 else "50%, 95%"  # saturation and value
        colours.append(ImageColor.getrgb(f"hsv({360 * e / num_experts}, {tone})"))
    return colours


def escape(words):
    """Make a text safe inside SVG and HTML. Characters that XML forbids become a white square."""
    forbidden = r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
    return html.escape(re.sub(forbidden, "\u25a1", str(words)))


def short(words, length):
    """Cut a text to `length` characters, of which Chinese ones and emojis take two places."""
    places = 0
    for i, character in enumerate(words):
        places += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if places > length:
            return words[:i - 1] + "…"
    return words


def element(kind, content="", **attributes):
    """Return an element of SVG, with hyphens for the underscores in the names of attributes."""
    words = [kind]
    for name, value in attributes.items():
        value = round(value, 2) if isinstance(value, float) else value
        words.append(f'{name.replace("_", "-")}="{value}"')
    return f"<{' '.join(words)}>{content}</{kind}>"


def rect(x, y, width, height, colour):
    """Return a filled rectangle with its top left corner at (x, y)."""
    return element("rect", x=x, y=y, width=width, height=height, fill=f"rgb{colour}")


def line(points, colour, width=2):
    """Return a line through points, [(x, y), ...], to a tenth of a pixel."""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element("polyline", points=points, fill="none", stroke=f"rgb{colour}",
                   stroke_width=width, stroke_linecap="round")


def text(x, y, words, anchor="start", size=11):
    """Return an escaped text, with y as its base line.

    anchor: which part of the text is at x, "start", "middle" or "end".
    """
    return element("text", escape(words), x=x, y=y, text_anchor=anchor, font_size=size)


def picture(x, y, width, height, pixels):
    """Stretch pixels, uint8 (3, rows, columns) or (4, ...) with opacity, to width x height.

    Few pixels keep hard edges. A picture with more than twice as many pixels as the page shows is
    shrunk to twice as many. If it is higher than 32 pixels it becomes a JPEG, which takes a fifth
    of the bytes, else a PNG.
    """
    image = v2.functional.to_pil_image(pixels)
    rendering = "pixelated" if image.width < width else "auto"
    columns = min(image.width, round(2 * width))
    rows = min(image.height, round(2 * height))
    image = image.resize((columns, rows), Image.Resampling.BOX)
    kind = "jpeg" if image.mode == "RGB" and image.height > 32 else "png"
    file = io.BytesIO()
    image.save(file, kind, quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return element("image", x=x, y=y, width=width, height=height, preserveAspectRatio="none",
                   image_rendering=rendering, href=f"data:image/{kind};base64,{data}")


def tint(values, colour):
    """Paint values (rows, columns) in 0..1 in one colour: (4, rows, columns) uint8.

    The opacity is 10% for 0, so that the edge of the map shows, and 80% for 1, so that a number
    on it can be read, on a light and on a dark page.
    """
    pixels = torch.empty(4, *values.shape, dtype=torch.uint8)
    pixels[:3] = torch.tensor(colour).view(3, 1, 1)
    pixels[3] = (255 * (0.1 + 0.7 * values)).round()
    return pixels


def overlay(image, experts, colours):
    """Tint each patch of a grey image by its expert: image (3, S, S) -> (3, S, S) uint8.

    experts (rows, columns) int64. colours: one per expert. (Paper, Figure 6.)
    """
    patches = torch.tensor(colours, dtype=torch.float).T[:, experts]  # (3, rows, columns)
    colour = F.interpolate(patches.unsqueeze(0), image.shape[1:])[0]  # (3, S, S), hard edges
    grey = v2.functional.rgb_to_grayscale(image, 3)
    return (0.4 * grey + 0.6 * colour).round().to(torch.uint8)


def labels_across(labels, left, step, y):
    """Write labels in the middle of columns of `step` pixels, as many as have room."""
    longest = max(len(str(label)) for label in labels)
    skip = math.ceil((7 * longest + 4) / step)
    marks = []
    for i in range(0, len(labels), skip):
        marks.append(text(left + (i + 0.5) * step, y, labels[i], "middle"))
    return marks


def bars(title, values, top, colours, labels, note):
    """Draw a bar per value, 110 pixels high for `top`. Below are its label and, by note, a number.

    note: a format such as "{:.2f}". Only up to 8 bars have room for the numbers.
    """
    step = WIDTH / len(values)
    marks = labels_across(labels, 0, step, 129)
    if len(values) <= 8:
        marks += labels_across([note.format(value) for value in values], 0, step, 143)
    for i, value in enumerate(values):
        x = (i + 0.1) * step
        height = 110 * value / top
        marks.append(rect(x, 115 - height, 0.8 * step, height, colours[i]))
    return Panel(title, 148, marks)


def tiles(title, pictures, labels, per_row):
    """Draw pictures of one height in rows, with a label above each. None: only the label."""
    shown = [pixels for pixels in pictures if pixels is not None]
    columns = max(pixels.shape[2] for pixels in shown)
    width = (WIDTH + 6) / per_row - 6
    scale = width / columns
    height = scale * shown[0].shape[1]
    marks = []
    for i, pixels in enumerate(pictures):
        row, column = divmod(i, per_row)
        x = column * (width + 6)
        y = row * (height + 20)
        marks.append(text(x, y + 11, labels[i]))
        if pixels is not None:
            marks.append(picture(x, y + 15, scale * pixels.shape[2], height, pixels))
    return Panel(title, y + height + 20, marks)


def heat_map(title, values, rows, columns, left, height, top=1):
    """Draw a table of numbers in 0..1 as tinted cells, with the numbers if they have room.

    values (rows, columns): `top` and more has the full colour. left: pixels for the labels of the
    rows. height: pixels of a cell.
    """
    width = (WIDTH - left) / len(columns)
    cells = tint((values / top).clamp(max=1), BLUE)
    marks = [picture(left, 16, WIDTH - left, len(rows) * height, cells)]
    marks += labels_across(columns, left, width, 11)
    for i in range(0, len(rows), math.ceil(12 / height)):
        y = 20 + (i + 0.5) * height
        label = short(str(rows[i]), 16)
        marks.append(text(left - 5, y, label, "end", 10))
        for j in range(len(columns) if width >= 18 else 0):
            number = f"{values[i, j]:.2f}".removeprefix("0").replace("1.00", "1")
            marks.append(text(left + (j + 0.5) * width, y, number, "middle", 10))
    return Panel(title, 20 + len(rows) * height, marks)


def plot(title, curves, colours, x_title, middle=None, names=()):
    """Draw curves: lists of points (x, y), x = 1, 2, ..., y from 0 up. An empty one is not drawn.

    middle: height of the grey line between those at 0 and at the top; None for half of the top.
    names: of the curves, for a legend; "" for one that is not drawn.
    """
    xs, ys = zip(*itertools.chain.from_iterable(curves))
    N, top = max(xs), max(ys) or 1

    def at(x, y):
        return 40 + 268 * (x - 1) / max(1, N - 1), 150 - 144 * y / top

    marks = [text(WIDTH / 2, 180, x_title, "middle")]
    for n in {1, math.ceil(N / 2), N}:
        x, y = at(n, 0)
        marks.append(text(x, y + 15, n, "middle"))
    lowest = math.inf  # what is not above it has no room
    for tick in (0, middle or top / 2, top):
        x, y = at(1, tick)
        marks.append(line([(x, y), at(N, tick)], GREY, 1))
        if y < lowest:
            marks.append(text(x - 5, y + 4, f"{tick:.3g}", "end"))
            lowest = y - 12
    for points, colour in zip(curves, colours):
        step = math.ceil(len(points) / 150)  # one per 2 pixels
        shown = [at(x, y) for x, y in points[::step or 1] + points[-1:]]  # one twice is a dot
        if shown:
            marks.append(line(shown, colour))
    for i, (name, colour) in enumerate(zip(names, colours)):
        x = i * WIDTH / 3
        if name:
            marks += [rect(x, 192, 10, 10, colour), text(x + 14, 201, name)]
    return Panel(title, 210 if names else 190, marks)


def ranking(title, rows):
    """Draw a row per (label, share in 0..1, note): the two texts, and a bar below them."""
    marks = []
    for i, (label, share, note) in enumerate(rows):
        y = 24 * i
        marks.append(text(0, y + 12, label))
        marks.append(text(WIDTH, y + 12, note, "end"))
        marks.append(rect(0, y + 17, max(1, WIDTH * share), 4, BLUE))
    return Panel(title, 24 * len(rows), marks)


def isolated(name, length):
    """Shorten a name and mark its ends, so that an Arabic one leaves its neighbours in place."""
    return f"\u2068{short(name, length)}\u2069"


def legend(num_experts):
    """Draw the colours of the experts, which all figures share, ten to a row."""
    colours = torch.tensor(palette(num_experts), dtype=torch.uint8)  # (E, 3)
    swatches = colours.view(-1, 3, 1, 1).expand(-1, 3, 1, 3)  # three pixels wide
    return tiles("the experts and their colours", swatches, range(num_experts), 10)


# Each figure takes the Findings of a run and yields its panels. The first line of its docstring is
# its heading in the report, and the rest is its caption.


CURVES = {  # panel -> its curves: name -> field of log.jsonl
    "loss": {"val": "val_loss", "val, EMA": "ema_val_loss", "train": "train_loss"},
    "top-1, %": {"weights": "top1", "EMA": "ema_top1"},
    "learning rate": {"rate": "lr"},
}


def draw_curves(run):
    """How it went: losses, accuracy and learning rate per epoch

    Beside each name is its last value. EMA: the averaged weights. A training loss that falls while
    the validation loss rises means overfitting. With augmentation and noise the training loss is
    usually the higher one.
    """
    for title, fields in CURVES.items():
        curves = [points_of(run.log, field) for field in fields.values()]
        names = []
        for name, points in zip(fields, curves):
            names.append(f"{name} {points[-1][1]:.3g}" if points else "")
        if any(curves):
            yield plot(title, curves, (BLUE, *PALETTE[::2]), "epoch", names=names)


def draw_balance(run):
    """How balance came about: the share of the choices that each expert gets, per epoch

    The middle line is the even share, 1/E. Curves that come together show the balance losses at
    work. A curve that falls to 0 is an expert that died. All k choices of a token are counted, on
    training images.
    """
    E = run.config["num_experts"]
    panels = []
    for layer in run.layers:
        curves = [points_of(run.log, "load", layer["layer"], e) for e in range(E)]
        if any(curves):
            panels.append(plot(f"block {layer['block']}", curves, palette(E), "epoch", 1 / E))
    return [legend(E), *panels] if panels else []


def draw_mistakes(run):
    """What is wrong: which classes are taken for which

    The matrix has a row per true class and a column per predicted one, by their numbers. A cell is
    the share of the row's images, so the diagonal is right and all else is wrong. The full colour
    is that of the strongest confusion. Above 40 classes there are only the lists: the most frequent
    confusions and the classes of lowest accuracy.
    """
    C = len(run.classes)
    if C <= 40:
        shares = row_shares(run.confusion)
        top = max(0.01, (shares - shares.diag().diag()).max().item())
        labels = [f"{c} {name}" for c, name in enumerate(run.classes)]
        title = f"true and predicted, full colour: {100 * top:.0f}%"
        yield heat_map(title, shares, labels, range(C), 110, 18, top)
    mistakes = name_mistakes(run.confusion, run.classes)
    per_class = mistakes["per_class"]
    rows = []
    for true, predicted, images in mistakes["confusions"][:20]:
        total = per_class[true]["images"]
        label = f"{isolated(true, 15)} taken for {isolated(predicted, 15)}"
        rows.append((label, images / total, f"{images} of {total}"))
    if rows:
        yield ranking("the most frequent confusions", rows)
    rows = []
    for name, found in sorted(per_class.items(), key=lambda item: item[1]["top1"])[:40]:
        note = "{top1:.1f}% of {images}".format(**found)
        rows.append((isolated(name, 36), found["top1"] / 100, note))
    yield ranking("accuracy per class, the lowest first", rows)


def draw_load(run):
    """Load: the share of the patches that each expert gets

    The line is the even share, 1/E. An expert far above it is a favourite, and an expert without
    a bar is dead weight. The balance losses of the training are there against both. (Paper,
    Figure 5.)
    """
    E = run.config["num_experts"]
    top = max(max(layer["share"]) for layer in run.layers)
    even = 115 - 110 / E / top
    for layer in run.layers:
        title = f"block {layer['block']}"
        panel = bars(title, layer["share"], top, palette(E), range(E), "{:.1%}")
        panel.marks.append(line([(0, even), (WIDTH, even)], GREY, 1))
        yield panel


def draw_examples(run):
    """Pictures: the answer, and every patch tinted by its expert

    First the square that the model sees, then one picture per MoE layer, if there are any. Below:
    the predicted class and its probability, or the five best for own pictures. Look for experts
    that keep to the object, to its outline, to the background, or to a place whatever the image
    shows. (Paper, Figure 6.)
    """
    own = run.confusion is None
    colours = palette(run.config["num_experts"]) if run.layers else []
    labels = ["image"] + [f"block {layer['block']}" for layer in run.layers]
    per_row = 2 if own else min(4, max(2, len(labels)))
    if run.layers:
        yield legend(len(colours))
    for example in run.examples:
        pictures = [example.image]
        pictures += [overlay(example.image, experts, colours) for experts in example.maps]
        title = short(os.path.basename(example.title) if own else example.title, 45)
        panel = tiles(title, pictures, labels, per_row)
        marks, y = panel.marks, panel.height + 8
        for name, probability in example.answers if own else example.answers[:1]:
            answer = f"{isolated(name, 36)} {100 * probability:.1f}%"
            if not own:
                answer = ("right: " if name == example.title else "wrong: ") + answer
            marks.append(text(0, y, answer))
            y += 16
        yield Panel(title, y, marks)


def draw_spatial(run):
    """Where: how often each position of the grid chooses each expert

    There is one map per expert. An even tint means that position plays no role. The paper found
    experts for the border and for the centre in ConvNeXt, and none of that kind in ViT. (Figure 7.)
    """
    E = run.config["num_experts"]
    for layer in run.layers:
        maps = torch.tensor(layer["spatial"])  # (E, rows, columns)
        top = maps.max()
        pictures = [tint(values, colour) for values, colour in zip(maps / top, palette(E))]
        title = f"block {layer['block']}, full colour: {100 * top:.0f}% of the images"
        yield tiles(title, pictures, range(E), min(E, 4) if E <= 16 else 8)


def draw_cumulative(run):
    """How many patches: cumulative distribution over the images that use an expert

    Upwards: share of the images. A curve that rises at once belongs to an expert that takes few
    patches of an image. One that rises late belongs to an expert that takes many. (Paper,
    Figure 8.)
    """
    colours = palette(run.config["num_experts"])
    yield legend(len(colours))
    for layer in run.layers:
        curves = [list(enumerate(shares or [], 1)) for shares in layer["patches_per_image_cdf"]]
        title = f"block {layer['block']}"
        yield plot(title, curves, colours, "patches of the image, at most")


def draw_classes(run):
    """Which class: the share of each class's patches per expert

    There is a row per class, in the order of the labels, and a column per expert. An even column
    means that the expert does not care about the class. In the paper the first MoE layers do not
    follow the classes, and the last three do: animals against objects. (Figures 9 and 10, top.)
    """
    experts = range(run.config["num_experts"])
    height = min(18, 1000 / len(run.classes))  # of a cell: one pixel for 1,000 classes
    shares = [row_shares(table) for table in run.class_tables]
    top = max(share.max().item() for share in shares)
    for layer, share in zip(run.layers, shares):
        title = f"block {layer['block']}, strongest: {100 * top:.0f}% of a class"
        yield heat_map(title, share, run.classes, experts, 110, height, top)


def draw_similarity(run):
    """Together or apart: similarity of the experts

    1: two experts always get equally many patches of the same image. 0: they never share an
    image. (Paper, section 5.6, and Figures 9 and 10, bottom.)
    """
    experts = range(run.config["num_experts"])
    height = min(30, (WIDTH - 20) / len(experts))
    for layer in run.layers:
        values = torch.tensor(layer["similarity"])
        yield heat_map(f"block {layer['block']}", values, experts, experts, 20, height)


def draw_depth(run):
    """How many experts an image uses, by depth

    The mean number of different experts among the patches of one image. The paper counts about 7
    of 8 for ViT-S, and 6 of 8, 10.5 of 16 and 15.8 of 32 for ConvNeXt.
    """
    E = run.config["num_experts"]
    values = [layer["experts_per_image"] for layer in run.layers]
    blocks = [layer["block"] for layer in run.layers]
    colours = [BLUE] * len(blocks)
    yield bars(f"experts per image, of {E}, in block", values, E, colours, blocks, "{:.2f}")


def draw_factors(run):
    """What the experts follow: mutual information with what is known of the image

    1: the factor decides the expert, or the expert the factor. 0: they have nothing to do with
    each other. Compare with chance, the same measure when each image has the factors of another
    image. Object: whether the patch shows the object. Shape, texture, colour and part (a glyph's
    stroke, a flag's stripe): among the patches of the object. Position: in the grid. The paper
    could not measure this, because ImageNet has no natural decomposition.
    """
    blocks = [layer["block"] for layer in run.layers]
    names = list(run.layers[0]["information"])
    for key, title in (("normalized", "measured"), ("normalized_by_chance", "by chance")):
        columns = []
        for layer in run.layers:
            columns.append([known[key] for known in layer["information"].values()])
        values = torch.tensor(columns).T  # (factors, layers)
        yield heat_map(f"{title}, per block", values, names, blocks, 70, 30)


def draw_patches(run):
    """What the router is surest of

    For each expert: the six patches that chose it with the highest probability, at most one per
    image, with their surroundings, and the two classes with the largest shares of its patches.
    """
    for layer, strips in zip(run.layers, run.patches):
        labels = []
        for e, best in enumerate(layer["top_classes"]):
            best = [f"{isolated(name, 18)} {100 * share:.0f}%" for name, share in best[:2]]
            labels.append(f"{e}: {', '.join(best) or 'never chosen'}")
        yield tiles(f"block {layer['block']}", strips, labels, 1)


FIGURES = {  # file name -> what draws it
    "curves": draw_curves,
    "balance": draw_balance,
    "mistakes": draw_mistakes,
    "fig5": draw_load,
    "fig6": draw_examples,
    "fig7": draw_spatial,
    "fig8": draw_cumulative,
    "fig9": draw_classes,
    "fig9_similarity": draw_similarity,
    "depth": draw_depth,
    "factors": draw_factors,
    "patches": draw_patches,
}
DENSE = ("curves", "mistakes", "fig6")  # what a model without experts has
OWN = ("fig6",)  # what pictures without classes have


def figures_of(run):
    """Return the names of the figures that a run has. A figure may still have no panel."""
    if run.confusion is None:
        return OWN
    return tuple(FIGURES) if run.layers else DENSE


# ---------------------------------------------------------------- 4. the files

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1368px; margin: auto; padding: 16px }
p { max-width: 70ch; opacity: 0.75 } h3, p { overflow-wrap: anywhere }
.panels { display: flex; flex-wrap: wrap; gap: 20px 28px; align-items: start }
.panels > div { flex: 1 1 330px; min-width: 0 }
svg { max-width: 100%; height: auto; fill: currentColor }
table { border-collapse: collapse; font-size: 13px; line-height: 1.3 }
td, th { padding: 3px 5px; text-align: right }
th { border-bottom: 1px solid; vertical-align: bottom; font-weight: 600 }
"""
SUFFIXES = ("", "_compare")  # of the names of a run's files
KEY_NUMBERS = {  # columns of the table at the top: the cells of a layer, and what they mean
    "block": ("{block}", "which block of the network holds the MoE layer"),
    "grid": ("{grid[0]}×{grid[1]}", "rows and columns of the patches"),
    "experts per image": ("{experts_per_image:.2f}", "different experts that an image uses, mean"),
    "load, CV": ("{coefficient_of_variation:.3f}",
                 "standard deviation of the experts' shares over their mean, 0 if all are equal"),
    "router, bits": ("{router_entropy_bits:.2f}",
                     "mean entropy of the router's probabilities, 0 if it is always sure and "
                     "log2 E if it never is"),
    "class, bits": ("{information[class][bits]:.3f}",
                    "what the expert of a patch tells about the class of its image"),
    "class, norm.": ("{information[class][normalized]:.3f}",
                     "the same from 0, nothing, to 1, everything"),
}


def panel_svg(panel, x=0, y=0):
    """Return a panel with its title above it, for the page, or at (x, y) of a file.

    The title has 14 pixels. It is also the alt text: role "img" and aria-label.
    """
    marks = text(0, -10, panel.title, size=14) + "".join(panel.marks)
    height = math.ceil(TITLE + panel.height)
    return element("svg", marks, x=x, y=y, width=WIDTH, height=height, overflow="visible",
                   viewBox=f"0 {-TITLE} {WIDTH} {height}", role="img",
                   aria_label=escape(panel.title))


def file_svg(panels, per_row=4):
    """Return the panels of one figure as an SVG file, a str, in rows on white."""
    step_x = WIDTH + GAP
    step_y = TITLE + GAP + math.ceil(max(panel.height for panel in panels))
    width = GAP + step_x * min(per_row, len(panels))
    height = GAP + step_y * math.ceil(len(panels) / per_row)
    marks = rect(0, 0, width, height, (255, 255, 255))
    for i, panel in enumerate(panels):
        row, column = divmod(i, per_row)
        marks += panel_svg(panel, GAP + column * step_x, GAP + row * step_y)
    return element("svg", marks, xmlns="http://www.w3.org/2000/svg", width=width, height=height,
                   viewBox=f"0 0 {width} {height}", font_family="system-ui, sans-serif")


def key_numbers(run):
    """Return the head of a run in the report: name, config, accuracy and a row per MoE layer."""
    config = " ".join(f"{key}={value}" for key, value in run.config.items())
    head = f"<h3>{escape(run.name)}</h3><p>{escape(config)}</p>"
    if run.confusion is not None:
        head += f"<p>top-1: {top1(run):.2f}% of {run.images} images.</p>"
    if not run.layers:
        head += "<p>A dense model: it has no experts, so their figures are left out.</p>"
    elif run.confusion is not None:
        table = "<tr><th>" + "<th>".join(KEY_NUMBERS)
        row = "<tr><td>" + "<td>".join(cell for cell, _ in KEY_NUMBERS.values())
        for layer in run.layers:
            table += row.format(**layer)
        meanings = "; ".join(f"{title}: {said}" for title, (_, said) in KEY_NUMBERS.items())
        head += f"<table>{table}</table><p>{escape(meanings)}.</p>"
    return f"<div>{head}</div>"


def top1(run):
    """Return the accuracy of a run in percent."""
    return 100 * run.confusion.trace().item() / run.images


def draw_all(runs):
    """Draw each figure of each run once: return (its part of the page, {file name: SVG file}).

    The files of the second run, that of --compare, have a name of their own.
    """
    page = ""
    files = {}
    for figure, draw in FIGURES.items():
        part = ""
        for run, suffix in zip(runs, SUFFIXES):
            panels = list(draw(run)) if figure in figures_of(run) else []
            if not panels:
                continue
            files[f"{figure}{suffix}.svg"] = file_svg(panels)
            if len(runs) > 1:
                part += f"<h3>{escape(run.name)}</h3>"
            elements = "".join(panel_svg(panel) for panel in panels)
            part += f"<div class=panels>{elements}</div>"
        if part:
            heading, caption = draw.__doc__.split("\n", 1)
            page += f"<h2>{heading}</h2><p>{caption}</p>{part}"
    return page, files


def report_html(runs, figures, about):
    """Return the page, a str: one file, no scripts, no links.

    figures: see draw_all(). about: a sentence for the head.
    """
    title = "What the experts do" if runs[0].layers else "What the model does"
    heads = "".join(key_numbers(run) for run in runs)
    return ("<!DOCTYPE html><html lang=en><meta charset=utf-8>"
            "<meta name=viewport content='width=device-width'>"
            f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1><p>{escape(about)}</p>"
            f"<div class=panels>{heads}</div>{figures}</html>\n")


def routing_csv(run):
    """Return routing.csv, a str: for each layer, class and expert the patches and their share.

    The share is that of the class's patches. A spreadsheet takes a cell that starts with = + - @
    for a formula, so an apostrophe comes before it.
    """
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["layer", "block", "class", "expert", "tokens", "share"])
    for layer, table in zip(run.layers, run.class_tables):
        shares = row_shares(table)
        for c, name in enumerate(run.classes):
            cell = f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name
            for e, tokens in enumerate(table[c].tolist()):
                share = f"{shares[c, e]:.6f}"
                writer.writerow([layer["layer"], layer["block"], cell, e, tokens, share])
    return file.getvalue()


def name_mistakes(confusion, names):
    """Put a confusion matrix (true, predicted) into words: dict(per_class, confusions).

    per_class: {name: dict(top1, images)}, in percent. confusions: [[true name, predicted name,
    images], ...], the most frequent first.
    """
    per_class, images = {}, confusion.sum(1).tolist()
    for name, right, n in zip(names, confusion.diagonal().tolist(), images):
        if n:
            per_class[name] = dict(top1=100 * right / n, images=n)
    pairs = [[names[i], names[j], confusion[i, j].item()]
             for i, j in confusion.nonzero().tolist() if i != j]
    return dict(per_class=per_class, confusions=sorted(pairs, key=lambda pair: -pair[2]))


def describe(run, args):
    """Return what summary.json says about one checkpoint, a dict."""
    about = dict(checkpoint=run.name, model=run.config, data=args.data, split=args.split)
    about["images"] = run.images
    about["choices"] = "all" if args.all_choices else "first"
    about["versions"] = dict(python=platform.python_version(), torch=torch.__version__,
                             torchvision=torchvision.__version__)
    about["layers"] = run.layers
    if run.confusion is None:
        about["pictures"] = [describe_picture(example) for example in run.examples]
        return about
    about["top1"] = top1(run)
    return about | name_mistakes(run.confusion, run.classes)


def describe_picture(example):
    """Return what summary.json says about an own picture, a dict. experts: a grid per layer."""
    classes, probabilities = zip(*example.answers)
    experts = [choices.tolist() for choices in example.maps]
    return dict(file=example.title, classes=classes, probabilities=probabilities, experts=experts)


OTHER_ROUTERS = dict(  # what counts as a patch's choice where tokens do not choose, see moe.py
    expert_choice="In a model whose experts choose, a patch counts for the expert with the largest "
                  "gate of those that took it, or if none did for its most probable expert.",
    soft="In a Soft MoE nothing is chosen: a patch counts for the expert with the largest share in "
         "its answer.")


def make_files(runs, args):
    """Return all results, {file name: str}. The second of two runs is that of --compare."""
    figures, files = draw_all(runs)
    for run, suffix in zip(runs, SUFFIXES):
        if run.class_tables:
            files[f"routing{suffix}.csv"] = "\ufeff" + routing_csv(run)  # the mark is for Excel
    about = f"Images of {args.data}, made with torch {torch.__version__}."
    if any(run.layers for run in runs):
        counted = "all its experts" if args.all_choices else "its first choice"
        about += (f" Every patch counts for {counted}, and the class token of a ViT is left out. "
                  f"After Videau et al., “Mixture of Experts for Image Classification: What’s the "
                  f"Sweet Spot?” (2025), section 5.6.")
    for router in sorted({run.config.get("router") for run in runs} & set(OTHER_ROUTERS)):
        about += f" {OTHER_ROUTERS[router]}"
    files["report.html"] = report_html(runs, figures, about)

    summary = describe(runs[0], args)
    if len(runs) > 1:
        summary["compare"] = describe(runs[1], args)
    summary = json.dumps(summary, indent=1, allow_nan=False)
    files["summary.json"] = re.sub(r",\n *(?=[-\d])", ", ", summary)  # a list of numbers: a line
    return files


def open_folder(folder):
    """Make the folder for the results. Raise ValueError if nothing can be written there."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be a folder for the results ({error.strerror}): "
                         f"choose another place") from None


def write_files(folder, files):
    """Write files, {name: str}, each whole or not at all. Raise ValueError if one fails."""
    for name, content in files.items():
        path = os.path.join(folder, name)
        try:
            with open(path + ".tmp", "wb") as file:
                file.write(content.encode(errors="backslashreplace"))
            os.replace(path + ".tmp", path)
        except OSError as error:
            raise ValueError(f"cannot write {path} ({error.strerror}): make room or choose "
                             f"another --out") from None


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    """Return the flags as a namespace."""
    parser = argparse.ArgumentParser(description="Show what each expert of a checkpoint does.")
    flag = parser.add_argument
    flag("checkpoint", help="a file such as runs/convnext_nano-shapes-1/best.pt")
    flag("--data", required=True,
         help="shapes, cifar10, cifar100, a folder, a picture or a folder of pictures")
    flag("--split", choices=("train", "val", "all"), help="of a folder without val/ (default: all "
         "of it, but what training held out if the checkpoint was trained on it)")
    flag("--out", required=True, help="folder for the results")
    flag("--compare", help="another checkpoint, shown beside the first")
    flag("--max-images", type=number("[1, inf)", int),
         help="evenly spread over the data (default: all)")
    flag("--examples", type=number("[0, inf)", int), default=8, help="images to show (default: 8)")
    flag("--all-choices", action="store_true", help="count all k experts of a token, not one")
    flag("--batch-size", type=number("[1, inf)", int), default=128,
         help="images at once (default: 128)")
    flag("--workers", type=number("[0, inf)", int),
         help="loading processes (default: 0 if in memory)")
    return parser.parse_args(argv)


MOST_PICTURES = 50  # of one's own, in a report


def open_all(path, args, device):
    """Open a checkpoint and its data: (path, model, checkpoint, data set).

    Raise ValueError if one of them cannot be opened or if they do not fit together.
    """
    model, checkpoint = load_checkpoint(path, device)
    transform = eval_transform(checkpoint["image_size"], checkpoint["crop_ratio"])
    trained_on = os.path.abspath(checkpoint["args"].get("data", "")) == os.path.abspath(args.data)
    split = args.split or ("val" if trained_on else "all")
    dataset = open_dataset(args.data, split, transform)
    if dataset.classes:
        match_classes(dataset.classes, checkpoint["classes"])
    elif len(dataset) > MOST_PICTURES:
        warn(f"{len(dataset)} pictures in {args.data}: the first {MOST_PICTURES} are shown")
        dataset.files = dataset.files[:MOST_PICTURES]
        dataset.labels = dataset.labels[:MOST_PICTURES]
    return path, model, checkpoint, dataset


def print_run(run):
    """Print what a run found: the answers for own pictures, else the accuracy and the layers."""
    if run.confusion is None:
        print(f"{run.name}, the best classes and their probabilities in %")
        for example in run.examples:
            best = ", ".join(f"{name} {100 * value:.1f}" for name, value in example.answers)
            print(f"{example.title}: {best}")
        return
    print(f"{run.name}, {run.images} images, top-1 {top1(run):.2f}%", end="; ")
    if run.layers:
        print_layers(run)
    else:
        print("a dense model: it has no experts, so their figures are left out")


def print_layers(run):
    """Print a line per MoE layer: experts per image, what the experts follow, and the load."""
    factors = list(run.layers[0]["information"])
    head = "".join(f"{name:>10}" for name in factors)
    print("what the expert of a patch says about its class and so on: normalised mutual "
          "information")
    print(f"{'block':>5}{'experts per image':>19}{head}   share of patches per expert, %")
    for layer in run.layers:
        cells = ["{block:>5}{experts_per_image:>19.2f}".format(**layer)]
        for known in layer["information"].values():
            cells.append(f"{known['normalized']:>10.3f}")
        load = " ".join(f"{100 * share:4.1f}" for share in layer["share"])
        print(f"{''.join(cells)}   {load}")


def main(args):
    """Open and check everything, make one pass per checkpoint, then write all files."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = [open_all(args.checkpoint, args, device)]
    if args.compare:
        opened.append(open_all(args.compare, args, device))
    open_folder(args.out)
    runs = [inspect(*one, args, device) for one in opened]
    files = make_files(runs, args)
    write_files(args.out, files)
    for run in runs:
        print_run(run)
    figures = [name for name in files if name.endswith(".svg")]
    others = sorted(files.keys() - set(figures))
    print(f"written to {args.out}/: {', '.join(others)}, {len(figures)} figures as SVG")


if __name__ == "__main__":
    run_program(lambda: main(parse_args()))
