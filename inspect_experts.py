"""Show what each expert of a sparse checkpoint does: numbers to cite and figures to look at.

    python inspect_experts.py runs/convnext_nano-shapes-1/best.pt --data shapes --out inspect
    python inspect_experts.py runs/convnext_nano-shapes-1/best.pt --data photo.jpg --out photo

This is the model inspection of "Mixture of Experts for Image Classification: What's the Sweet
Spot?" (Videau et al., TMLR 2025), section 5.6, Figures 5 to 10. It adds what the paper could not
measure: which known factor of an image (shape, texture, colour, position) the experts follow.

As in the paper a token counts for its first choice. The class token of a ViT has no place in the
image, so it is counted apart.

1. eval.predict() makes one pass over the images. Of each MoE layer it stores which expert every
   patch chose and how sure the router was (class Layer): 6 bytes per patch and layer, 353 MB for
   50,000 images of 196 patches in six layers. For the 3,136 patches of a ConvNeXt's first stage
   take --max-images.
2. describe() computes all numbers of a layer from that, with one function: count_patches().
3. A figure is a function draw_x(run, layer) that returns a panel of HTML. Its docstring is heading
   and caption. To add one, write it and add it to FIGURES.

DIR then holds report.html (one file, opens from disk), summary.json (the numbers of the layers)
and routing.csv (patches per layer, class and expert). The report of a dense model has its training
and its answers, that of own pictures (a file or a folder) answers and routing.

Letters: M images in all, N patches per image, E experts, L levels of a factor (16 classes, 2 for
object or not, ...).
"""

import argparse
import base64
import colorsys
import csv
import io
import json
import math
import os
from functools import partial
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchvision.io import encode_jpeg, encode_png
from torchvision.transforms import v2

from eval import (
    PALETTE, Predictions, auto_workers, best_classes, best_dtype, choose_split, count, eval_loader,
    eval_transform, load_checkpoint, match_dataset, number, open_dataset, predict, run_program)
from moe import count_flops

# ---------------------------------------------------------------- 1. statistics
# Pure functions of counts. "Patches of an expert" are the patches that chose it.

def count_patches(levels, chosen, L, E):
    """Count the patches of each level that chose each expert: (L, E) int64.

    chosen (M, N): the expert of each patch. levels: (M, N), (M, 1) if all patches of an image share
    one, or (1, N) if all images do; in 0 .. L - 1, or -1 for patches that count nowhere.
    """
    cells = (levels + 1) * E + chosen  # level -1 has the first E cells, which are cut off below
    counts = cells.flatten().bincount(minlength=(L + 1) * E)
    return counts.view(L + 1, E)[1:]


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


def similarity(per_image):
    """Return the paper's Jaccard-like similarity of two experts, (E, E) float64 (section 5.6).

        S_ij = sum over images with both of (c_i + c_j - |c_i - c_j|)
               / sum over images with either of (c_i + c_j)

    per_image (M, E): c_i, an image's number of patches of expert i. c_i + c_j - |c_i - c_j| is
    2 min(c_i, c_j), and 0 unless both experts appear. An expert that is never chosen has 0.
    """
    shared = [torch.minimum(patches.unsqueeze(1), per_image).sum(0) for patches in per_image.T]
    patches = per_image.sum(0)
    either = patches.unsqueeze(1) + patches  # (E, E)
    return 2 * torch.stack(shared).double() / either.clamp(min=1)


def cumulative(per_image, N):
    """For each expert, list the share of its images that send it at most 1, 2, ..., N patches.

    per_image (M, E). An expert's images are those that send it at least one patch. An expert
    without images has None. (Paper, Figure 8.)
    """
    curves = []
    for patches in per_image.T:  # (M,)
        images = patches.bincount(minlength=N + 1)[1:].double()  # that send 1, 2, ..., N
        shares = images.cumsum(0) / images.sum()
        curves.append(shares.tolist() if images.any() else None)
    return curves


def row_shares(table):
    """Return the share of each row's patches per column, of a table of patches. An empty row: 0."""
    return table.double() / table.sum(1, keepdim=True).clamp(min=1)


def top_classes(table, names, limit=5):
    """For each expert, list the classes with the largest shares of its patches, largest first.

    table (classes, E): patches. Returns [[name, share], ...] per expert, without empty classes.
    """
    found = []
    for share in row_shares(table.T):  # (classes,), of one expert
        best = share.argsort(descending=True, stable=True)[:limit].tolist()
        found.append([[names[c], share[c].item()] for c in best if share[c] > 0])
    return found


# ---------------------------------------------------------------- 2. one pass over the images

class Layer(NamedTuple):
    """What one MoE layer chose for the M images, and what follows from it."""
    block: int  # of the network
    grid: tuple  # (class tokens, rows, columns) of an image's tokens
    experts: torch.Tensor  # (M, tokens) int16, the first choice of each
    entropy: torch.Tensor  # (M, tokens) float32, of the router's probabilities, in nats
    table: torch.Tensor = None  # (classes, E) int64 patches; of own pictures no row
    numbers: dict = {}  # see describe()

    def patches(self):
        """Return the choices of the patches, (M, N) int64."""
        return self.experts[:, self.grid[0]:].long()

    def panel(self, *parts):
        """Return a panel for the page: the block, then parts, pieces of HTML."""
        return panel(f"block {self.block}", *parts)


class Run(NamedTuple):
    """Everything that the figures and files are made of. A dense model has no layers."""
    path: str  # of the checkpoint
    config: dict  # model name and options
    log: list  # a dict per epoch
    data: object  # the data set, as match_dataset() returns it
    images: list  # indices in it of the M images
    shown: dict  # which of the M are in the report: their best classes, [[name, probability], ...]
    top1: float  # percent of the M images
    routed: float  # share of the multiply-adds that routed experts do
    layers: list  # of Layer
    colours: list  # of the E experts


def inspect(path, args, device):
    """Open a checkpoint and its data, and run it over them once: return a Run.

    Raise ValueError if they do not fit together, if an image cannot be read, or if the model
    computes numbers that are not finite.
    """
    model, checkpoint = load_checkpoint(path)
    config, size = checkpoint["config"], checkpoint["image_size"]
    E = max(getattr(module, "num_experts", 0) for module in model.modules())
    routed = count_flops(model, size, r"experts\.\d+$") / count_flops(model, size)
    split, held_out = choose_split(args.data, checkpoint["args"].get("data", ""), args.split)
    dataset = open_dataset(args.data, split, eval_transform(size, checkpoint["crop_ratio"]))
    data = match_dataset(dataset, checkpoint["classes"])
    data.note += held_out
    os.makedirs(args.out, exist_ok=True)
    if not os.access(args.out, os.W_OK):
        raise ValueError(f"--out {args.out} cannot be written: choose another folder")
    M = min(len(data.indices), args.max_images or len(data.indices))
    images = [data.indices[m * len(data.indices) // M] for m in range(M)]  # classes come in order
    data.note += f", {M} of them evenly spread" * (M < len(data.indices))
    usual = 8 if data.classes else 50
    n = min(M, usual if args.examples is None else args.examples)
    shown = [(2 * i + 1) * M // (2 * n) for i in range(n)]  # the middles of n equal parts

    loader = eval_loader(data, args.batch_size, auto_workers(data, 1, args.workers), device, images)
    stored = [([], []) for _ in model.grids]
    found = predict(
        model.to(device), loader, device, checkpoint["mean"], checkpoint["std"], data.columns,
        checkpoint["args"].get("loss", "softmax"), best_dtype(device), "inspect",
        watch=partial(store, stored, model.grids))
    top1 = count(found, data)["top1"]  # raises if an image cannot be read
    if not found.probs.isfinite().all():
        raise ValueError(f"{path}: its answers are numbers that are not finite")
    layers = []
    for block, grid, parts in zip(model.moe_blocks, model.grids, stored):
        layer = Layer(block, grid, *map(torch.cat, parts))
        if not layer.entropy.isfinite().all():
            raise ValueError(f"{path}: block {block} routes by numbers that are not finite")
        layers.append(describe(layer, data, images, E))
    answers = best_classes(Predictions(*(field[shown] for field in found)), data.names)
    shown, log = dict(zip(shown, answers)), checkpoint.get("log", [])
    return Run(path, config, log, data, images, shown, top1, routed, layers, palette(E))


def store(stored, grids, routings):
    """Add the choices of a batch to stored, a pair of lists per MoE layer: experts and entropy.

    routings: the layers' Routings of T = B * tokens tokens, image by image.
    """
    for (experts, entropies), (extra, rows, columns), routing in zip(stored, grids, routings):
        tokens = extra + rows * columns
        first = routing.experts[:, 0].view(-1, tokens)  # (T, K) -> (T,) -> (B, tokens)
        nats = torch.special.entr(routing.probs).sum(1).view(-1, tokens)
        experts.append(first.to(torch.int16).cpu())
        entropies.append(nats.cpu())


def known_factors(data, images, grid):
    """Return what is known about M images: {factor: (levels, L)}, levels in 0 .. L - 1.

    Levels are int64, (M, 1) for images or (M, N) for the patches of a grid. Every data set knows
    the classes, but of own pictures nothing is known. The drawn ones also know which patches show
    the object and, for these, its colour, the shape and texture of `shapes`, and the stripe of
    `flags` that fills most of the patch. On the background these are -1, which counts nowhere.
    """
    if not data.classes:
        return {}
    factors = {"class": (data.labels[images], len(data.names))}
    if not hasattr(data, "factors"):
        return factors
    masks = data.masks[images].unsqueeze(1)  # (M, 1, 32, 32), the part of the object, or 0
    shares = []  # of each patch that shows a part, (M, N) each
    for part in range(1, int(data.masks.max()) + 1):
        mask = data.transform(255 * (masks == part).to(torch.uint8))  # cropped like the images
        shares.append(F.adaptive_avg_pool2d(mask.float() / 255, grid[1:]).flatten(1))
    shares = torch.stack(shares)  # (parts, M, N)
    on_object = shares.sum(0) > 1 / 2
    factors["object"] = (on_object.long(), 2)
    part = shares.argmax(0)  # (M, N)
    if len(shares) > 1:
        factors["part"] = (part.where(on_object, -1), len(shares))
    for name in ("shape", "texture", "colour"):
        if name in data.factors:
            values = data.factors[name][images]  # (M,), or of each part (M, parts)
            values = values.gather(1, part) if values.ndim == 2 else values.unsqueeze(1)
            factors[name] = (values.where(on_object, -1), int(values.max()) + 1)
    return factors


def describe(layer, data, images, E):
    """Return the layer with the numbers of the layer, plain values for JSON, and its class table.

    What the expert tells about a factor is also measured by chance: with the factor of another
    image, and with positions moved on by the image's number. Only what exceeds this is a finding:
    chance is above 0 if there are few images per class, or if a factor is tied to the position.
    """
    chosen = layer.patches()  # (M, N)
    M, N = chosen.shape
    image = torch.arange(M).unsqueeze(1)  # (M, 1)
    position = torch.arange(N).unsqueeze(0)  # (1, N)
    others = torch.randperm(M, generator=torch.Generator().manual_seed(0))
    factors = known_factors(data, images, layer.grid)
    pairs = {name: (levels, levels[others], L) for name, (levels, L) in factors.items()}
    pairs["position"] = (position, (position + image) % N, N)
    tables, information = {}, {}
    for name, (levels, by_chance, L) in pairs.items():
        tables[name] = count_patches(levels, chosen, L, E)
        bits, normalized = mutual_information(tables[name])
        _, chance = mutual_information(count_patches(by_chance, chosen, L, E))
        information[name] = dict(bits=bits, normalized=normalized, normalized_by_chance=chance)

    extra, rows, columns = layer.grid
    per_image = count_patches(image, chosen, M, E)
    share = per_image.sum(0).double() / chosen.numel()
    class_token = layer.experts[:, :extra].flatten().bincount(minlength=E).double()
    bits = layer.entropy[:, extra:].mean(dtype=torch.float64) / math.log(2)
    maps = tables["position"].T.double() / M  # (E, N)
    table = tables.get("class", torch.zeros(0, E))
    numbers = dict(block=layer.block, grid=[rows, columns], information=information)
    numbers["share"] = share.tolist()
    numbers["coefficient_of_variation"] = (share.std(correction=0) / share.mean()).item()
    numbers["class_token_share"] = (class_token / class_token.sum()).tolist() if extra else None
    numbers["experts_per_image"] = (per_image > 0).sum().item() / M
    numbers["router_entropy_bits"] = bits.item()
    numbers["similarity"] = similarity(per_image).tolist()
    numbers["spatial"] = maps.view(E, rows, columns).tolist()
    numbers["patches_per_image_cdf"] = cumulative(per_image, N)
    numbers["top_classes"] = top_classes(table, data.names)
    return layer._replace(numbers=numbers, table=table)


def surest_patches(layer, expert, limit=6):
    """List the (image, patch) of lowest entropy that chose an expert, at most one per image."""
    nats = layer.entropy[:, layer.grid[0]:]  # (M, N)
    nats = nats.masked_fill(layer.patches() != expert, math.inf)
    lowest, patch = nats.min(dim=1)  # (M,)
    order = lowest.argsort(stable=True)[:limit].tolist()
    return [(m, patch[m].item()) for m in order if lowest[m] < math.inf]


# ---------------------------------------------------------------- 3. what figures are made of
# HTML: tables whose cells have a background, pictures, and SVG for curves.

BLUE = (20, 140, 220)  # numbers that belong to no expert


def palette(E):
    """Return one colour per expert, [(r, g, b), ...].

    Up to 8 are those of Okabe and Ito, which colour-blind readers can tell apart, but violet for
    black: a grey tint looks like none. More are an even wheel of hues, alternately dark and bright.
    """
    if E <= 8:
        return [*PALETTE[:7], (150, 0, 240)][:E]
    tones = [(0.85, 0.75), (0.5, 0.95)] * E  # saturation and value
    wheel = [colorsys.hsv_to_rgb(e / E, *tones[e]) for e in range(E)]
    return [tuple(round(255 * channel) for channel in rgb) for rgb in wheel]


def picture(pixels, exact=False):
    """Return an <img> of pixels (3, rows, columns) uint8. Few rows or columns keep hard edges."""
    small = exact or min(pixels.shape[1:]) <= 64  # a JPEG would mix neighbours
    file = encode_png(pixels) if small else encode_jpeg(pixels, quality=80)
    data = base64.b64encode(file.numpy().tobytes()).decode()
    kind, look = ("png", " class=pixels") if small else ("jpeg", "")
    return f'<img alt="" src="data:image/{kind};base64,{data}"{look}>'


def panel(title, *parts):
    """Return a panel of the page: parts, pieces of HTML, below a title."""
    return f"<figure><h3><bdi>{escape(title)}</bdi></h3>{''.join(parts)}</figure>"


def swatch(colour):
    """Return a small square of a colour (r, g, b)."""
    return '<i style="background:rgb({} {} {})"></i>'.format(*colour)


def tiles(pictures, labels):
    """Return pictures side by side, HTML of each, with a label above it."""
    cells = [f"<div>{label}{image}</div>" for image, label in zip(pictures, labels)]
    return f"<div class=tiles>{''.join(cells)}</div>"


def tint(values, colour):
    """Paint values (rows, columns) in 0..1 in one colour: (3, rows, columns) uint8, 0 is dark."""
    dark, colour = torch.tensor([[[40.0]]]), torch.tensor(colour).view(3, 1, 1)
    return (dark + values * (colour - dark)).round().to(torch.uint8)


def overlay(image, experts, colours):
    """Tint each patch of a grey image by its expert: image (3, S, S) -> (3, S, S) uint8.

    experts (rows, columns) int64. colours: one per expert. (Paper, Figure 6.)
    """
    patches = torch.tensor(colours, dtype=torch.float).T[:, experts]  # (3, rows, columns)
    colour = F.interpolate(patches.unsqueeze(0), image.shape[1:])[0]  # (3, S, S), hard edges
    grey = v2.functional.rgb_to_grayscale(image, 3)
    return (0.4 * grey + 0.6 * colour).round().to(torch.uint8)


def cut_out(image, patch, grid):
    """Cut a patch and its neighbours out of an image (3, S, S), as (3, side, side).

    The cut is three patches wide, or a quarter of the image if that is more. At the border of the
    image it is moved inside. patch: an index into the grid.
    """
    _, rows, columns = grid
    S = image.shape[-1]
    step = S // rows  # a patch is as high as wide
    side = min(S, max(S // 4, 3 * step))
    middle = step // 2 - side // 2  # from a patch's corner to that of the cut around it
    top, left = [min(max(0, i * step + middle), S - side) for i in divmod(patch, columns)]
    return image[:, top:top + side, left:left + side]


def heat(values, top, names):
    """Return a table of values (rows, E), as blue as they are near to top. names: of the rows.

    More than 2,000 values are a picture without names and numbers.
    """
    if values.numel() > 2000:
        return f"<div class=map>{picture(tint(values / top, BLUE), exact=True)}</div>"
    page = "<tr><th>" + "".join(f"<th>{expert}" for expert in range(values.shape[1]))
    for name, numbers in zip(names, values.tolist()):
        page += f"<tr><th><bdi>{escape(str(name))}</bdi>"
        for value in numbers:
            page += f'<td style="--blue:{0.8 * value / top:.0%}">{value:.2f}'
    return f"<table>{page}</table>"


def bar(label, length, colour, line):
    """Return a label before a bar: length and the place of a vertical line, both in 0..1."""
    style = "--colour:rgb({} {} {});--length:{:.2%};--line:{:.2%}".format(*colour, length, line)
    return f'<div class=bar>{label}<div style="{style}"></div></div>'


def plot(curves, colours, middle=0.0):
    """Return an SVG of curves, lists of (x, y), x = 1, 2, ..., y from 0 up. middle: of a line."""
    points = [point for curve in curves for point in curve] or [(1, 1)]
    last, top = max(x for x, _ in points), max(y for _, y in points) or 1

    def line(points, look):  # on 320 x 160 pixels, y downwards
        path = [f"{36 + 278 * x:.1f},{140 - 130 * y / top:.1f}" for x, y in points]
        return f"<polyline points='{' '.join(path)}' stroke={look} />"

    marks = "".join(line([(0, y), (1, y)], "gray") for y in (0, middle, top))
    marks += f"<text x=36 y=156>1</text><text x=314 y=156 text-anchor=end>{last}</text>"
    marks += f"<text x=32 y=14 text-anchor=end>{top:.3g}</text>"
    for curve, colour in zip(curves, colours):
        thin = curve[::len(curve) // 150 + 1] + curve[-1:]  # one twice is a dot
        look = "'rgb({} {} {})' stroke-width=2 stroke-linecap=round".format(*colour)
        marks += line([((x - 1) / max(1, last - 1), y) for x, y in thin], look)
    return f"<svg viewBox='0 0 320 160'>{marks}</svg>"


# ---------------------------------------------------------------- 4. figures
# Each returns one panel: most often that of a MoE layer. The first line of its docstring is its
# heading in the report, and the rest is its caption.

CURVES = {  # panel -> its curves: name -> field of the log
    "loss": {"validation": "val_loss", "validation, EMA": "ema_val_loss", "training": "train_loss"},
    "top-1, %": {"weights": "top1", "EMA": "ema_top1"},
    "balance loss": {"training": "balance_loss"},
}


def draw_training(run, title):
    """How it went: losses and accuracy per epoch

    Up to this checkpoint: last.pt has all epochs. Beside each name is its last value. EMA: the
    averaged weights. A training loss that falls while the validation loss rises means overfitting.
    With augmentation and noise the training loss is usually the higher one.
    """
    colours = (BLUE, *PALETTE[::2])
    curves = [[(line["epoch"], line[field]) for line in run.log if field in line]
              for field in CURVES[title].values()]
    legend = ""
    for name, curve, colour in zip(CURVES[title], curves, colours):
        if curve:
            legend += f"<div>{swatch(colour)} {name} {curve[-1][1]:.3g}</div>"
    return panel(title, plot(curves, colours), legend)


def draw_balance(run, layer):
    """How balance came about: the share of the choices that each expert gets, per epoch

    The middle line is the even share, 1/E. Curves that come together show the balance losses at
    work. A curve that falls to 0 is an expert that died. All k choices of a token are counted, on
    training images.
    """
    E, i = len(run.colours), run.layers.index(layer)
    loads = [(line["epoch"], line["load"][i]) for line in run.log if "load" in line]
    curves = [[(epoch, load[e]) for epoch, load in loads] for e in range(E)]
    return layer.panel(plot(curves, run.colours, 1 / E))


def draw_pictures(run, m):
    """Pictures, and how the model answered

    First the square that the model sees, then one picture per MoE layer, every patch tinted by its
    expert. Look for experts that keep to the object, to its outline, to the background, or to a
    place whatever the image shows. (Paper, Figure 6.)
    """
    data, index = run.data, run.images[m]
    image, label, _ = data[index]
    pictures, labels = [picture(image)], ["image"]
    for layer in run.layers:
        experts = layer.patches()[m].view(layer.grid[1:])
        pictures.append(picture(overlay(image, experts, run.colours)))
        labels.append(f"block {layer.block}")
    told = [f"<bdi>{escape(name)}</bdi> {share:.1%}" for name, share in run.shown[m]]
    if not data.classes:
        return panel(os.path.basename(data.path(index)), tiles(pictures, labels), "<br>".join(told))
    title = data.names[label[0]]
    right = "right: " if run.shown[m][0][0] == title else "wrong: "
    return panel(title, tiles(pictures, labels), right, told[0])


def draw_load(run, layer):
    """Load: the share of the patches that each expert gets

    The line is the even share, 1/E. An expert far above it is a favourite, and an expert without
    a bar is dead weight. The balance losses of the training are there against both. (Paper,
    Figure 5.)
    """
    shares = layer.numbers["share"]
    top = max(max(other.numbers["share"]) for other in run.layers)
    bars = ""
    for e, (share, colour) in enumerate(zip(shares, run.colours)):
        bars += bar(f"{e}: {share:.1%}", share / top, colour, 1 / len(shares) / top)
    return layer.panel(bars)


def draw_where(run, layer):
    """Where: how often each position of the grid chooses each expert

    There is one map per expert. An even tint means that position plays no role. The paper found
    experts for the border and for the centre in ConvNeXt, and none of that kind in ViT. (Figure 7.)
    """
    maps = torch.tensor(layer.numbers["spatial"])  # (E, rows, columns)
    top = maps.max()
    pictures = [picture(tint(one / top, colour)) for one, colour in zip(maps, run.colours)]
    return layer.panel(tiles(pictures, range(len(maps))), f"full colour: {top:.0%} of the images")


def draw_amount(run, layer):
    """How many patches: cumulative distribution over the images that use an expert

    To the right: at most so many patches of the image. Upwards: share of the images. A curve that
    rises at once belongs to an expert that takes few patches of an image. One that rises late
    belongs to an expert that takes many. (Paper, Figure 8.)
    """
    curves = layer.numbers["patches_per_image_cdf"]
    return layer.panel(plot([list(enumerate(curve or [], 1)) for curve in curves], run.colours))


def draw_classes(run, layer):
    """Which class: the share of each class's patches per expert

    There is a row per class, in the order of the labels, and a column per expert. An even column
    means that the expert does not care about the class. In the paper the first MoE layers do not
    follow the classes, and the last three do: animals against objects. (Figures 9 and 10, top.)
    """
    top = max(row_shares(other.table).max().item() for other in run.layers)
    shares = heat(row_shares(layer.table), top, run.data.names)
    return layer.panel(shares, f"full colour: {top:.0%} of a class")


def draw_similarity(run, layer):
    """Together or apart: similarity of the experts

    1: two experts always get equally many patches of the same image. 0: they never share an
    image. (Paper, section 5.6, and Figures 9 and 10, bottom.)
    """
    return layer.panel(heat(torch.tensor(layer.numbers["similarity"]), 1, range(len(run.colours))))


def draw_surest(run, layer):
    """What the router is surest of

    For each expert the six patches with the lowest entropy among those that chose it, at most one
    per image, with their surroundings, and the two classes with the largest shares of its patches.
    """
    rows = []
    for expert, colour in enumerate(run.colours):
        classes = layer.numbers["top_classes"][expert][:2]
        told = [f"<bdi>{escape(name)}</bdi> {share:.0%}" for name, share in classes]
        rows.append(f"<div>{swatch(colour)} {expert}: {', '.join(told) or 'never chosen'}</div>")
        places = surest_patches(layer, expert)
        cuts = [cut_out(run.data[run.images[m]][0], patch, layer.grid) for m, patch in places]
        rows += [picture(torch.cat(cuts, dim=2))] if cuts else []
    return layer.panel(*rows)


FIGURES = {  # draw_x -> what it has a panel for
    draw_training: "curves", draw_balance: "loads", draw_pictures: "images", draw_load: "layers",
    draw_where: "layers", draw_amount: "layers", draw_classes: "layers",
    draw_similarity: "layers", draw_surest: "layers"}


def parts_of(run):
    """List what the figures of a run have panels for. Own pictures have figures of images only."""
    layers, log = (run.layers, run.log) if run.data.classes else ([], [])
    curves, loads = (CURVES, layers) if log else ([], [])
    return dict(curves=curves, loads=loads, images=run.shown, layers=layers)


# ---------------------------------------------------------------- 5. the report and the files

MEASURES = {"block": "{block}", "grid": "{grid[0]}x{grid[1]}",
            "experts per image": "{experts_per_image:.2f}",
            "router, bits": "{router_entropy_bits:.2f}",
            "load, CV": "{coefficient_of_variation:.2f}"}
MEANINGS = """Experts per image: different ones that an image uses, mean. Load, CV: standard
deviation of the experts' shares over their mean. Router, bits: mean entropy of its probabilities, 0
if it is always sure, log2 E if it never is. Below: normalised mutual information of a patch's
expert and its class and so on, 0 if neither tells about the other, 1 if one decides the other, and
in brackets by chance. Shape, texture, colour, part: among the patches of the object."""
ABOUT = """A patch counts for its first choice. After Videau et al., “Mixture of Experts for Image
Classification: What’s the Sweet Spot?” (2025), section 5.6."""
OTHER_ROUTERS = {  # what counts as a patch's choice where tokens do not choose, see moe.py
    "expert_choice": "Experts choose, equally many patches each. A patch counts for that with the "
                     "largest gate of those that took it, or if none did for the most probable.",
    "soft": "In a Soft MoE a patch counts for the expert with the largest share in its answer; all "
            "experts work equally much."}


def overview(run):
    """List the rows of the table for page and terminal: a measure, then its cell for each layer."""
    rows = [[name, *(cell.format(**layer.numbers) for layer in run.layers)]
            for name, cell in MEASURES.items()]
    for name in run.layers[0].numbers["information"]:
        known = [layer.numbers["information"][name] for layer in run.layers]
        cell = "{normalized:.2f} ({normalized_by_chance:.2f})"
        rows.append([name, *(cell.format(**numbers) for numbers in known)])
    return rows


def report_html(run, data):
    """Return the page, a str: one file, no scripts, no links. data: the spec of the images."""
    title = "What the experts do" if run.layers else "What the model does"
    options = " ".join(f"{key}={value}" for key, value in run.config.items())
    page = f"<h1>{title}</h1><p>{escape(f'{run.path}: {options}. Images of {data}.')}"
    if run.data.classes:
        page += f" Top-1: {run.top1:.2f}% of {len(run.images)}. Data: {run.data.note}."
    if run.layers:
        page += f" Routed experts do {run.routed:.0%} of the multiply-adds. {ABOUT}"
        page += f" {OTHER_ROUTERS.get(run.config.get('router'), '')}<p class=legend>experts: "
        for e, colour in enumerate(run.colours):
            page += f"<span>{swatch(colour)} {e}</span> "
        rows = ["<td>".join(row) for row in overview(run)]
        page += f"<table><tr><td>{'<tr><td>'.join(rows)}</table><p>{MEANINGS}"
    for draw, parts in FIGURES.items():
        heading, caption = draw.__doc__.split("\n", 1)
        panels = [draw(run, part) for part in parts_of(run)[parts]]
        if panels:
            page += f"<h2>{heading}</h2><p>{caption}<div class=panels>{''.join(panels)}</div>"
    return ("<!DOCTYPE html><html lang=en><meta charset=utf-8><meta name=viewport "
            f"content='width=device-width'><title>{title}</title><style>{STYLE}</style>{page}")


STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1368px; margin: auto; padding: 16px }
p { max-width: 70ch; opacity: 0.8; overflow-wrap: anywhere } h3 { margin: 0 0 4px }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr));
  gap: 20px 28px } figure { margin: 0; min-width: 0; overflow-x: auto }
.legend { position: sticky; top: 0; background: Canvas; padding: 4px 0; z-index: 1 }
.legend span { white-space: nowrap } i { display: inline-block; width: 0.8em; height: 0.8em }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(72px, 1fr));
  gap: 6px; font-size: 13px }
img { width: 100%; display: block } .pixels { image-rendering: pixelated }
.map img { height: 400px } svg { fill: currentColor; font-size: 11px } svg polyline { fill: none }
.bar { display: grid; grid-template-columns: 6em 1fr; font-size: 13px }
.bar div { background: linear-gradient(90deg, transparent var(--line), gray 0
  calc(1px + var(--line)), #0000 0), linear-gradient(90deg, var(--colour) var(--length), #0000 0) }
table { border-collapse: collapse; font-size: 13px } td, th { padding: 2px 6px; text-align: right }
td { background: rgb(20 140 220/var(--blue, 0%)) }
th { white-space: nowrap; max-width: 14em; overflow: hidden; text-overflow: ellipsis }
"""


def routing_csv(run):
    """Return routing.csv, a str: per layer, class and expert patches and share of the class's."""
    file = io.StringIO(newline="")
    file.write("\ufeff")  # a byte order mark, for Excel
    writer = csv.writer(file)
    writer.writerow(["layer", "block", "class", "expert", "tokens", "share"])
    for i, layer in enumerate(run.layers):
        shares = row_shares(layer.table).tolist()
        for c, name in enumerate(run.data.names):
            for e, tokens in enumerate(layer.table[c].tolist()):
                writer.writerow([i, layer.block, name, e, tokens, f"{shares[c][e]:.6f}"])
    return file.getvalue()


def write_files(folder, run, data):
    """Write report.html, summary.json and routing.csv, each whole or not at all."""
    files = {"report.html": report_html(run, data)}
    Path(folder, "routing.csv").unlink(missing_ok=True)  # perhaps of other data
    summary = dict(checkpoint=run.path, model=run.config, data=data, images=len(run.images))
    if run.data.classes:
        summary |= dict(top1=run.top1, protocol=run.data.note, routed_share=run.routed)
    summary["layers"] = [dict(layer=i) | layer.numbers for i, layer in enumerate(run.layers)]
    files["summary.json"] = json.dumps(summary, allow_nan=False)
    if run.layers and run.data.classes:
        files["routing.csv"] = routing_csv(run)
    for name, content in files.items():
        part = Path(folder, f"{name}.tmp")
        part.write_bytes(content.encode(errors="backslashreplace"))
        part.replace(Path(folder, name))
    print(f"written to {folder}/: {', '.join(sorted(files))}")


def print_run(run):
    """Print what a run found: the answers for own pictures, else the overview."""
    if not run.data.classes:
        print(f"{len(run.shown)} of {len(run.images)} pictures, their best classes:")
        for m, answers in run.shown.items():
            told = [f"{name} {share:.1%}" for name, share in answers]
            print(f"{run.data.path(run.images[m])}: {', '.join(told)}")
        return
    print(f"{run.path}: top-1 {run.top1:.2f}% of {len(run.images)} images; "
          f"{run.routed:.0%} of the multiply-adds are those of routed experts")
    if not run.layers:
        return
    for name, *cells in overview(run):
        print(f"{name:<18}", *map("{:>12}".format, cells))
    print("class and below: 1 if one of it and the expert decides the other; in brackets by chance")


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    """Return the flags as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag, positive = parser.add_argument, number("[1, inf)", int)
    flag("checkpoint", help="a file such as runs/convnext_nano-shapes-1/best.pt")
    flag("--data", required=True, help="see the top of eval.py; also a picture or a folder of them")
    flag("--split", choices=("train", "val", "all"), help="(default: all; val if trained on it)")
    flag("--out", required=True, help="folder for the results")
    flag("--max-images", type=positive, help="evenly spread over the data (default: all)")
    flag("--examples", type=number("[0, inf)", int), help="images to show (default: 8; own: 50)")
    flag("--batch-size", type=positive, default=128, help="images at once (default: 128)")
    flag("--workers", type=number("[0, inf)", int), help="processes that load images")
    return parser.parse_args(argv)


def main(args):
    """Check everything, make one pass over the images, then write and print the results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = inspect(args.checkpoint, args, device)
    write_files(args.out, run, args.data)
    print_run(run)


if __name__ == "__main__":
    run_program(lambda: main(parse_args()))
