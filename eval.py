"""Put a number on a checkpoint: open a data set, load a model, match the classes, count what is right.

    python eval.py runs/convnext_nano-shapes-1/best.pt --data shapes --data shapes-noise --data shapes-rotated
    python eval.py a/best.pt b/best.pt --data /imagenet --data /imagenet-v2 --data /imagenet-a --json result.json
    torchrun --nproc-per-node=8 eval.py best.pt --data /imagenet-c

One row per checkpoint, as in the tables of Videau et al., TMLR 2025. train.py computes the accuracies of its log with the
same evaluate(). Sections: models and checkpoints, data sets, whose class is which, counting, command line.

A data set spec is
- `shapes`, drawn below (`shapes:4000` for 4,000 training images instead of 16,000), or the same pictures as training
  never shows them: `shapes-noise`, `shapes-blur`, `shapes-rotated`, `shapes-inverted`;
- `cifar10` or `cifar100`, downloaded by torchvision to data/;
- a folder with train/ and val/ (valid/, validation/, test/) in it, or directly with class folders:
  also ImageNet-V2, -A, -R, -Sketch;
- a folder of ImageNet-C's shape, <corruption>/<severity 1 to 5>/<class>.
"""

import argparse
import collections
import copy
import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
import unicodedata
import warnings
from contextlib import contextmanager
from functools import cache, partial
from itertools import chain, cycle, islice
from multiprocessing import resource_tracker
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm

import convnext
import vit
from moe import MoE, Router, count_parameters

# ---------------------------------------------------------------- models and checkpoints

MODELS = {preset.__name__: preset for preset in (
    vit.vit_nano, vit.vit_ti, vit.vit_s, vit.vit_b, vit.vit_b32, vit.vit_l, vit.vmoe_s32, convnext.convnext_nano,
    convnext.convnext_t, convnext.convnext_s, convnext.convnext_b, convnext.convnext_iso_s, convnext.convnext_iso_b)}

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in 0..1, per colour
CHECKPOINT_KEYS = {"config", "classes", "image_size", "crop_ratio", "mean", "std", "model", "ema", "optimizer", "epoch",
                   "step", "best", "args"}


def build_model(config):
    """The model of a config: a dict with `model`, a preset's name, and the options of that preset. ValueError if wrong."""
    options = dict(config)
    name = options.pop("model")
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(MODELS)}")
    return MODELS[name](**options)


def load_checkpoint(path, device, raw=False):
    """Open a checkpoint of train.py at path: (model in evaluation mode on the device, the
    checkpoint's dict).

    The model has the averaged weights (EMA) if the run kept them, unless raw. Raises ValueError, in
    one line, for whatever is not such a checkpoint.
    """
    checkpoint = read_checkpoint(path, device)
    try:
        model = build_model(checkpoint["config"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"the config in {path} does not describe a model of this version: {error}") from None
    if checkpoint["config"].get("num_classes") != len(checkpoint["classes"]):
        raise ValueError(f"{path} names {len(checkpoint['classes'])} classes, but its model has "
                         f"{checkpoint['config'].get('num_classes')} outputs: expected one name per output")
    try:
        model.load_state_dict(checkpoint["model"] if raw or not checkpoint["ema"] else checkpoint["ema"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights in {path} do not fit its own config: {reason}") from None
    return model.to(device).eval(), checkpoint


def read_checkpoint(path, device):
    """Read the dict of a checkpoint at path. Raise ValueError, in one line, if the file is not one.

    Read with weights_only=True: a file that wants to run code when opened is refused. With
    mmap=True the processes share the file's pages, and what nobody looks at, such as the
    optimizer's moments, takes no memory.
    """
    if not os.path.isfile(path):
        raise ValueError(f"no checkpoint at {path}: expected a file like "
                         f"runs/<model>-<data>-1/best.pt")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except Exception as error:  # of whatever kind: any bytes may be in the file
        reason = f"it is truncated or not one of ours: {first_line(error)}"
        if os.path.getsize(path) == 0:
            reason = "it is empty"
        raise ValueError(f"{path} cannot be opened as a checkpoint, {reason}") from None
    missing = CHECKPOINT_KEYS - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        lacking = ", ".join(sorted(missing))
        raise ValueError(f"{path} is not a checkpoint of train.py: it lacks {lacking}")
    if any(name.endswith(".experts.w1") for name in checkpoint["model"]):
        raise ValueError(f"{path} is from an older version, whose experts were stacked weights and "
                         f"not MLPs: train it again")
    return checkpoint


def change_routing(model, k=None, capacity_factor=None, drop_experts=()):
    """Let a sparse model choose its experts otherwise than in training. Returns what differs, a list of sentences.

    k: experts per token. capacity_factor: limits the experts' slots, in units of the even share. drop_experts: pairs
    (MoE layer, expert), both counted from 0. ValueError if the model has no such layer or expert, or too few are left.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError("a dense model has no router: --k, --capacity-factor and --drop-expert need a sparse one")
    E, trained_k, trained_factor = layers[0].num_experts, layers[0].k, layers[0].capacity_factor
    k, notes = k or trained_k, []
    for i, expert in drop_experts:
        if not (0 <= i < len(layers) and 0 <= expert < E):
            raise ValueError(f"--drop-expert {i}:{expert}: expected a MoE layer 0 to {len(layers) - 1}, expert 0 to {E - 1}")
        layers[i].router.register_forward_hook(partial(mute, expert=expert))
        notes.append(f"expert {expert} of MoE layer {i}, block {model.moe_blocks[i]}, is never chosen")
    left = E - max(len({expert for i, expert in drop_experts if i == layer}) for layer in range(len(layers)))
    if k > left:
        raise ValueError(f"k = {k} experts per token, but a MoE layer has only {left} to choose from: give --k 1 to {left}")
    for layer in layers:
        layer.k, layer.eval_capacity_factor = k, capacity_factor
    if k != trained_k:
        notes.append(f"k = {k} instead of {trained_k}")
    if capacity_factor is not None:
        notes.append(f"capacity factor {capacity_factor} instead of {trained_factor or 'no limit'}; with a limit a "
                     f"prediction depends on the other images of its batch")
    return notes


def mute(router, inputs, logits, expert):
    """A forward hook for a router, inputs -> logits (T, E): nobody chooses this expert, the softmax is over the others."""
    logits[:, expert] = -math.inf


# ---------------------------------------------------------------- data sets
# Each has .classes (names in label order), .labels (N,), .path(index), and items (image (3, S, S) uint8, label, unreadable):
# the last is -1, or the index of the file that could not be read and was replaced by the next one. Who gets the item
# decides what that means: train.py reports and goes on, evaluate() stops.

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff",
              ".ppm", ".pgm", ".avif")
TRAIN, VAL = ("train", "training"), ("val", "valid", "validation", "test")  # the first that exists
NO_DATA = ("__macosx", "@eadir", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini")
RESULTS = {"last.pt", "report.html"}  # a folder with one of these was written by our programs
EXPECTED_TREE = """: expected
    FOLDER/train/<class>/<image>.jpg and FOLDER/val/<class>/<image>.jpg
 or FOLDER/<class>/<image>.jpg"""
warnings.filterwarnings("ignore", module="PIL")  # an odd file is read or reported, and that is all
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def open_dataset(spec, split, transform=None):
    """Open split "train", "val" or "all" of a data set spec, one of those at the top of this file.

    Of a folder without one for validation, "val" is a fifth of each class, "train" the rest and
    "all" everything. Elsewhere "all" means "val". transform: uint8 tensor (3, H, W) -> uint8 tensor
    (3, S, S). Raise ValueError if there is no such data set.
    """
    if spec.split(":")[0] in ("shapes", *SHIFTS):
        return shift(Shapes(*shapes_size(spec, split), transform), spec.split(":")[0])
    if spec in ("cifar10", "cifar100"):
        return open_cifar(spec, split, transform)
    return FolderImages(spec, split, transform)


class FolderImages:
    """Images in class folders, of any size, depth of subfolders and colour mode (all become RGB).

    root, split and transform as in open_dataset. flat: whether root had no folder for validation.
    Items come by their index; the next image takes the place of an unreadable one. File names are
    one block of bytes and an array of offsets: a list of a million strings takes ten times the
    memory, again in each worker, as counting references writes to shared pages (pytorch issue
    13246).
    """

    def __init__(self, root, split, transform=None):
        self.root, self.flat = split_folder(root, split)
        self.transform = transform
        files = find_images(self.root)
        if split == "train" and len(files) == 1:
            raise ValueError(f"only one class folder, {', '.join(files)}, in {self.root}: give the "
                             f"folder that holds the class folders{EXPECTED_TREE}")
        if self.flat and split != "all":
            files = hold_out(files, split, root)
        self.classes = list(files)
        names = [os.fsencode(name) for name in chain(*files.values())]
        self.names = b"".join(names)
        self.ends = torch.tensor([len(name) for name in names]).cumsum(0)
        counts = torch.tensor([len(files[name]) for name in files])
        self.labels = torch.arange(len(files), dtype=torch.int32).repeat_interleave(counts)

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        """The file of the item at an index, as a str."""
        start = int(self.ends[index - 1]) if index else 0
        return os.path.join(self.root, os.fsdecode(self.names[start:int(self.ends[index])]))

    def fingerprint(self):
        """Describe the images by their names; see fingerprint()."""
        return fingerprint(self, self.names + self.ends.numpy().tobytes())

    def __getitem__(self, index):
        unreadable = -1
        for i in range(index, index + 100):  # the file itself or the next that can be read
            i %= len(self)
            image = read_image(self.path(i))
            if image is not None:
                break
            unreadable = index
        else:
            raise ValueError(f"100 images in a row cannot be read, from {self.path(index)} on")
        try:
            image = self.transform(image) if self.transform else image
        except (RuntimeError, MemoryError) as error:  # 1 x 20,000 pixels, resized, take gigabytes
            raise ValueError(f"cannot prepare {self.path(i)}, {tuple(image.shape[1:])} pixels: "
                             f"{first_line(error)}") from error
        return image, self.labels[i].long(), unreadable


@cache
def warn(text):
    """Print a warning, once, however many data sets and processes have it to say."""
    if os.environ.get("RANK", "0") == "0":
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)  # odd names, escaped
        print(f"warning: {line}", file=sys.stderr)


def first_line(error):
    """What an error says, in one line; its name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def split_folder(root, split):
    """Find the folder with the class folders of a split: (its path, whether to hold out a fifth).

    It is called by a word of TRAIN or VAL, in small letters or capitals; without any it is root.
    """
    if not os.path.isdir(root):
        raise ValueError(f"no data at {root!r}: expected `shapes`, one of {', '.join(SHIFTS)}, "
                         f"`cifar10`, `cifar100` or a folder{EXPECTED_TREE}")
    paths = {name.lower(): os.path.join(root, name) for name in next(walk(root))[1]}
    if paths and set(paths) <= set("12345") and all(map(holds_folders, paths.values())):
        raise ValueError(f"{root} looks like one corruption of ImageNet-C: its folders "
                         f"{', '.join(sorted(paths))} hold class folders, not images; give one of "
                         f"them, or the folder of all corruptions")
    train = next((paths[name] for name in TRAIN if name in paths), None)
    val = next((paths[name] for name in VAL if name in paths), None)
    if train and val:
        return (train if split == "train" else val), False
    if val and split != "train" and holds_folders(val):
        return val, False
    if train and holds_folders(train):
        warn(f"no {root}/val: a fifth of {train} is held out, and what lies beside it is not read")
        return train, True
    return root, True


def holds_folders(path):
    """Whether a folder holds folders and no image, as that of a split does, but none of a class."""
    _, folders, files = next(walk(path))
    return bool(folders) and not any(file.lower().endswith(EXTENSIONS) for file in files)


def walk(root):
    """os.walk() without hidden files, what systems leave behind, and folders that were met before.

    So a link to a folder above does not lead round in a circle. ValueError for a folder without
    permission.
    """
    def refuse(error):
        raise ValueError(f"cannot open the folder {error.filename}: {error.strerror}")

    def is_data(name):
        return name[0] != "." and name.lower() not in NO_DATA

    def is_new(path):
        real = Path(path).resolve()
        if real in met:
            warn(f"{path} leads to a folder above it or read already: left out")
        new = real not in met
        met.add(real)
        return new

    met = {Path(root).resolve(), *Path(root).resolve().parents}
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        folders[:] = [name for name in sorted(folders)
                      if is_data(name) and is_new(os.path.join(folder, name))]
        yield folder, folders, list(filter(is_data, files))


def find_images(root):
    """Find the images of each class: {class: file names relative to root}, both sorted.

    A class is a folder with an image in it or below it. Warnings say what is left out. Class names
    are in Unicode's composed form (NFC), for macOS may decompose them. ValueError if there is no
    image.
    """
    found, others = {}, collections.Counter()
    for folder, folders, files in walk(root):
        place = os.path.relpath(folder, root).replace(os.sep, "/")
        if RESULTS & set(files):
            folders.clear()  # nothing below it is data either
        elif folder != root:
            images = [f"{place}/{file}" for file in files if file.lower().endswith(EXTENSIONS)]
            found.setdefault(unicodedata.normalize("NFC", place.split("/")[0]), []).extend(images)
            others.update(os.path.splitext(file)[1].lower() or file for file in files)
    classes = {name: sorted(found[name]) for name in sorted(found) if found[name]}
    empty = [name for name in sorted(found) if not found[name]]
    types = [f"{n} {kind}" for kind, n in others.most_common(9) if kind not in EXTENSIONS]
    left_out = f"left out of {root}"
    if empty:
        left_out += f", class folders without images: {', '.join(empty[:5])}"
    if types:
        left_out += f", files of other types: {', '.join(types)}"
    if not classes:
        what = "images in the class folders of" if found else "class folders in"
        raise ValueError(f"no {what} {root}; {left_out}{EXPECTED_TREE}")
    if empty or types:
        warn(left_out)
    deep = [name for name in chain(*classes.values()) if name.count("/") > 1]
    if deep:
        warn(f"{len(deep)} images of {root} lie deeper than in a class folder ({deep[0]}, ...): "
             f"they belong to the upper one")
    return classes


def hold_out(classes, split, root):
    """Keep what is for split "train" or "val" of each class: {name: files} -> {name: files}.

    The fifth whose names have the smallest hashes validates: one image less moves at most one
    other. Warn of classes of root without a validation image. ValueError if that is all of them.
    """
    def hash_of(file):
        below = unicodedata.normalize("NFC", file.partition("/")[2])  # within the class folder
        return hashlib.sha256(os.fsencode(below)).digest()

    kept, few = {}, []
    for name, files in classes.items():
        fifth = set(sorted(files, key=hash_of)[:len(files) // 5])
        kept[name] = [file for file in files if (file in fifth) == (split == "val")]
        few += [] if fifth else [name]
    told = f"{len(few)} of {len(classes)} classes of {root} have fewer than 5 images"
    if len(few) == len(classes):
        raise ValueError(f"{told}: too few to hold out a fifth for validation")
    if few:
        warn(f"{told}, and so no validation image: {', '.join(few[:5])}")
    return kept


def read_image(path):
    """Read the file at path: (3, H, W) uint8 RGB, or None. Of an animation the first picture.

    Pictures are turned as their EXIF data say, as every viewer shows them. Published ImageNet
    protocols do not turn them. Pillow reads what is no JPEG: one wrong bit of a PNG can crash
    torchvision. Cut off, or of more than Pillow's limit of 179 million pixels, a JPEG is unreadable
    to either.
    """
    try:
        with open(path, "rb") as file:
            content = bytearray(file.read())
    except (OSError, MemoryError):
        return None
    for decode in (read_jpeg, read_other):
        try:
            return decode(content)
        except Exception:  # a decoder may raise anything
            pass
    return None


JPEG_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the markers before height and width


def read_jpeg(content):
    """Decode a JPEG file, a bytearray, with torchvision, which is faster than Pillow, or raise.

    The size is looked up first: for what a damaged header claims, libjpeg may take all of the
    memory.
    """
    if content[:3] != b"\xff\xd8\xff":
        raise ValueError("no JPEG")
    place = 2  # of a marker: FF, its number, and the length of what belongs to it
    while content[place + 1] not in JPEG_FRAMES:
        place += 2 + int.from_bytes(content[place + 2:place + 4], "big")
    height, width = (int.from_bytes(content[place + i:place + i + 2], "big") for i in (5, 7))
    if content[place] != 0xFF or height * width > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError("a damaged header")
    content = torch.frombuffer(content, dtype=torch.uint8)
    return torchvision.io.decode_jpeg(content, mode="RGB", apply_exif_orientation=True)


def read_other(content):
    """Decode an image file, a bytearray, with Pillow, or raise.

    Grey of 12 or 16 bits and floats from 0 to 1 are scaled to 0 .. 255. Other numbers have no known
    range.
    """
    image = Image.open(io.BytesIO(content))
    upright = ImageOps.exif_transpose(image)
    if not image.mode.startswith(("I", "F")):
        return v2.functional.pil_to_tensor(upright.convert("RGB"))
    tags = getattr(image, "tag_v2", {})  # TIFF's: 258 is the bits, 262 is 0 if 0 is white
    white = 1 if image.mode == "F" else 2 ** tags.get(258, (16,))[0] - 1  # PNG and PGM have 16 here
    grey = v2.functional.pil_to_tensor(upright.convert("F")) * (255 / white)  # (1, H, W)
    if image.mode == "I" and tags or not 0 <= grey.min() <= grey.max() <= 255:
        raise ValueError("signed, of 32 bits, or floats beyond 0 to 1")
    grey = 255 - grey if tags.get(262) == 0 else grey
    return grey.round().to(torch.uint8).repeat(3, 1, 1)


class TensorImages:
    """Images that are in memory already: images (N, 3, H, W) uint8, labels (N,), the names of the classes, a transform.

    An index may also be a list of B: then the item is a batch of them. One by one they take longer than a small model.
    """

    def __init__(self, images, labels, classes, transform=None):
        self.images, self.labels, self.classes, self.transform = images, labels, list(classes), transform

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        """There is no file; a name for messages."""
        return f"image {index}"

    def fingerprint(self):
        """Describe the images by their labels, for they have no names; see fingerprint()."""
        return fingerprint(self, self.labels.numpy().tobytes())

    def __getitem__(self, index):
        image, label = self.images[index], self.labels[index]
        return self.transform(image) if self.transform else image, label, torch.full(image.shape[:-3], -1)


def fingerprint(dataset, names):
    """Describe a data set in plain values, for comparing it: dict(classes, images, digest).

    classes: the names, in label order. images: how many each class has. digest: a hash of `names`,
    the bytes of the file names relative to the folder, which may lie elsewhere. Contents do not
    count.
    """
    counts = dataset.labels.bincount(minlength=len(dataset.classes)).tolist()
    return dict(classes=dataset.classes, images=counts, digest=hashlib.sha256(names).hexdigest())


def open_cifar(spec, split, transform):
    """cifar10 or cifar100 (spec) by torchvision, downloaded to data/ at first use; split, transform: see open_dataset."""
    kind = torchvision.datasets.CIFAR10 if spec == "cifar10" else torchvision.datasets.CIFAR100
    try:
        cifar = kind("data", train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{spec} could not be downloaded ({first_line(error)}): without a "
                         f"network, place {kind.filename} in data/ by hand") from None
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()  # (N, 32, 32, 3) -> (N, 3, 32, 32)
    return TensorImages(images, torch.tensor(cifar.targets), cifar.classes, transform)


# ---------------------------------------------------------------- the embedded data: shapes
# A textured shape on a background; the class is shape and texture. Position, size, rotation and colours are nuisance.
# Unlike a photograph, every picture comes with its factors and its object's mask, so that one can measure what the
# experts follow. Only whole numbers are used (lengths in 1/256 pixel), so that every machine draws the same pictures.

SHAPES = ("circle", "square", "triangle", "cross")
TEXTURES = ("plain", "stripes", "checks", "dots")
PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
           (235, 235, 235))  # the eight colours of Okabe and Ito, with white for their black
COSINES, SINES = (213, 237, 251, 256, 251, 237, 213), (-142, -98, -50, 0, 50, 98, 142)  # x 256, of -33.75 .. 33.75 degrees


class Shapes(TensorImages):
    """`count` pictures (N, 3, 32, 32) drawn from a seed, in parts of 500 with generators of their own; a longer set of the
    same seed begins with the same pictures. transform: as in open_dataset.

    factors: dict of int64 tensors (N,): shape, texture, colour and background (indices into the tuples above), row and
    column of the object's centre in pixels. masks (N, 32, 32): where the object is.
    """

    def __init__(self, count, seed, transform=None):
        parts = [draw_shapes(torch.Generator().manual_seed(seed * 1000 + i)) for i in range(-(-count // 500))]
        images, self.masks = (torch.cat([part[i] for part in parts])[:count] for i in (0, 1))
        self.factors = {name: torch.cat([part[2][name] for part in parts])[:count] for name in parts[0][2]}
        classes = [f"{shape}-{texture}" for shape in SHAPES for texture in TEXTURES]
        super().__init__(images, 4 * self.factors["shape"] + self.factors["texture"], classes, transform)


def shapes_size(spec, split):
    """(count, seed) of a split of spec, `shapes` or `shapes:COUNT`: 16,000 to train on, 2,000 others to validate.

    ValueError unless the count is 1 to 100000.
    """
    count = spec.partition(":")[2] or "16000"
    if not count.isdecimal() or not 1 <= int(count) <= 100_000:
        raise ValueError(f"{spec!r} is no data set: expected `shapes` or `shapes:COUNT` with a count of 1 to 100000")
    return (int(count), 1) if split == "train" else (2000, 2)


def draw_shapes(generator, n=500):
    """n pictures of a torch.Generator: images (n, 3, 32, 32) uint8, masks (n, 32, 32) bool, a dict of factors (n,) int64."""
    def draw(low, high, *size):
        return torch.randint(low, high, (n, *size), generator=generator, dtype=torch.int32)

    shape, texture = draw(0, 4), draw(0, 4)
    row, column, radius = draw(12, 20), draw(12, 20), draw(10 * 256, 13 * 256)
    turn = draw(0, 7)
    colours = torch.rand(n, 8, generator=generator).argsort(dim=1, stable=True)[:, :3]  # three: object, texture, background

    # The pixel grid in the object's own frame: u to its right, v down, both (n, 32, 32) in 1/256 pixel.
    cos, sin = (torch.tensor(table, dtype=torch.int32)[turn].view(n, 1, 1) for table in (COSINES, SINES))
    x = torch.arange(32, dtype=torch.int32).view(1, 1, 32) - column.view(n, 1, 1)
    y = torch.arange(32, dtype=torch.int32).view(1, 32, 1) - row.view(n, 1, 1)
    u, v, r = cos * x + sin * y, cos * y - sin * x, radius.view(n, 1, 1)

    inside = torch.stack([
        u * u + v * v < r * r,
        torch.maximum(u.abs(), v.abs()) * 8 < r * 7,
        torch.maximum(2 * v, (u.abs() * 443 >> 8) - v) < r * 5 // 4,  # 443 / 256 is the square root of 3
        (torch.minimum(u.abs(), v.abs()) * 3 < r) & (torch.maximum(u.abs(), v.abs()) < r)])
    second = torch.stack([  # where the texture shows its second colour; stripes and checks of 3 pixels, dots every 5
        torch.zeros_like(u, dtype=torch.bool),
        u // 1024 % 2 == 1,
        (u // 1024 + v // 1024) % 2 == 1,
        ((u + 896) % 1792 - 896) ** 2 + ((v + 896) % 1792 - 896) ** 2 < 580 ** 2])
    every = torch.arange(n)
    mask = inside[shape.long(), every]
    layer = torch.where(mask, second[texture.long(), every].long(), 2)  # (n, 32, 32): object, texture, background
    paint = torch.tensor(PALETTE, dtype=torch.int32)[colours]  # (n, 3 layers, 3 colours)
    paint = (paint + draw(-25, 26, 3, 3)) * torch.tensor([4, 4, 1], dtype=torch.int32).view(3, 1) // 4  # dark background
    images = paint[every.view(n, 1, 1), layer].permute(0, 3, 1, 2) + draw(-12, 13, 3, 32, 32)  # (n, 3, 32, 32)
    factors = dict(shape=shape, texture=texture, colour=colours[:, 0], background=colours[:, 2], row=row, column=column)
    return images.clamp(0, 255).to(torch.uint8), mask, {name: factor.long() for name, factor in factors.items()}


SHIFTS = ("shapes-noise", "shapes-blur", "shapes-rotated", "shapes-inverted")


def shift(data, name):
    """Change the pictures of data, a Shapes, in place, to what training never shows; labels, masks and places stay right.

    name: one of SHIFTS; any other changes nothing.
    """
    images = data.images
    if name == "shapes-noise":  # each value up to 80 brighter or darker; training has seen 12
        draws = torch.randint(-80, 81, images.shape, generator=torch.Generator().manual_seed(3), dtype=torch.int32)
        data.images = (images + draws).clamp(0, 255).to(torch.uint8)
    elif name == "shapes-blur":  # the mean of 3 x 3 values: their sum is exact in float32, and no ninth is near .5
        data.images = F.avg_pool2d(F.pad(images.float(), (1, 1, 1, 1), "replicate"), 3, 1).round().to(torch.uint8)
    elif name == "shapes-rotated":  # a quarter turn to the left; training has seen turns of up to 34 degrees
        data.images, data.masks = images.rot90(1, (2, 3)), data.masks.rot90(1, (1, 2))
        data.factors |= dict(row=31 - data.factors["column"], column=data.factors["row"])
    elif name == "shapes-inverted":  # negatives: a dark object on a bright background
        data.images = 255 - images
    return data


# ---------------------------------------------------------------- whose class is which
# One rule for every test set. Folder names are looked up among the checkpoint's classes, and the prediction is made among
# the classes that were found: all 1,000 for ImageNet-V2 and Sketch, 200 for -A and -R, and 1,000 of a 21k model's ("zero
# shot"). V2 has folders 0 to 999, which are sorted 0, 1, 10, 100: such a name is the number of a class, not its position.


def match_classes(names, classes, ignore_unmatched=False):
    """For each class folder of a data set its position among the checkpoint's classes: a list of int.

    ValueError names folders that the checkpoint does not know; with ignore_unmatched they get -1, if others are known.
    """
    keys, known = names, classes
    if are_numbers(names, classes):
        keys, known = [int(name) for name in names], range(len(classes))
    position = {key: i for i, key in enumerate(known)}
    columns = [position.get(key, -1) for key in keys]
    unknown = [name for name, column in zip(names, columns) if column < 0]
    if unknown and (not ignore_unmatched or len(unknown) == len(names)):
        way_out = "" if len(unknown) == len(names) else "; --ignore-unmatched leaves them out"
        raise ValueError(f"{len(unknown)} of {len(names)} classes of the data are unknown to the checkpoint "
                         f"({', '.join(unknown[:3])}, ...): it knows {', '.join(classes[:3])}, ...{way_out}")
    return columns


def are_numbers(names, classes):
    """Whether folder names are numbers of classes: all are integers, and no class is itself called by an integer."""
    return all(n.isdecimal() for n in names) and not any(c.isdecimal() for c in classes)


def match_dataset(dataset, classes, ignore_unmatched=False, real=None):
    """A dataset as a checkpoint with these classes is scored on it: a copy, which shares the images, with new attributes.

    ignore_unmatched: as in match_classes.
    labels (N, L): the L right answers of each image as indices into columns, padded with -1. L is 1, except with real, a
    file of ReaL labels. columns: those of the logits that take part. indices: the images that have an answer. note: what
    was done, in words. Raises ValueError if nothing is left.
    """
    found = match_classes(dataset.classes, classes, ignore_unmatched)
    dataset = copy.copy(dataset)
    dataset.columns = sorted(set(found) - {-1})
    place = {column: i for i, column in enumerate(dataset.columns)} | {-1: -1}
    if real:
        dataset.labels = read_real(real, dataset, len(dataset.columns))
    else:
        dataset.labels = torch.tensor([place[column] for column in found])[dataset.labels.long()].unsqueeze(1)  # (N, 1)
    dataset.indices = (dataset.labels >= 0).any(1).nonzero().flatten().tolist()
    if not dataset.indices:
        raise ValueError("no image of the data is in a class that the checkpoint knows")
    skipped = len(dataset) - len(dataset.indices)
    dataset.note = ", ".join([f"{len(dataset.indices)} images, {len(dataset.columns)} of {len(classes)} classes"]
                             + ["logits restricted"] * (len(dataset.columns) < len(classes))
                             + ["folder names are class numbers"] * are_numbers(dataset.classes, classes)
                             + [f"{found.count(-1)} unmatched folders left out"] * (-1 in found)
                             + [f"ReaL labels from {real}"] * bool(real) + [f"{skipped} images skipped"] * (skipped > 0))
    return dataset


def read_real(path, dataset, num_classes):
    """ReaL's labels of ImageNet's validation images (Beyer et al. 2020), (N, L) int64 padded with -1, for a dataset of N.

    The file at path is a JSON list of the lists of right labels, some empty: entry i belongs to the image whose NAME has
    number i + 1, ILSVRC2012_val_00000001.JPEG, not to the i-th of the files sorted by class. ValueError if file and images
    do not correspond one to one, or the labels are not among 0 .. num_classes - 1.
    """
    try:
        with open(path) as file:
            real = {f"ILSVRC2012_val_{i:08}": entry for i, entry in enumerate(json.load(file), start=1)}
        names = [os.path.basename(dataset.path(i))[:23] for i in range(len(dataset))]
        if sorted(names) != sorted(real):
            raise ValueError(f"{len(real)} entries for {len(names)} images ({names[0]}, ...), expected one for each of "
                             f"ILSVRC2012_val_00000001 to {len(names):08}")
        longest = max(1, *map(len, real.values()))
        labels = torch.tensor([real[name] + [-1] * (longest - len(real[name])) for name in names])  # (N, L)
        if labels.dtype != torch.int64 or not -1 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(f"expected labels from 0 to {num_classes - 1}, the matched classes in order")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--real {path} does not fit: {first_line(error)}") from None
    return labels


# ---------------------------------------------------------------- counting


def eval_transform(image_size, crop_ratio):
    """uint8 (3, H, W) -> (3, S, S), S = image_size: resize the short side to S / crop_ratio (bicubic), then the centre.

    256 and 224 pixels for ImageNet.
    """
    resize = round(image_size / crop_ratio)
    return v2.Compose([v2.Resize(resize, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(image_size)])


def normalize(images, mean, std):
    """images uint8 (B, 3, S, S) on any device -> float32, (pixel / 255 - mean) / std per colour."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    return torch.addcmul(-mean / std, images.float(), 1 / (255 * std))  # one pass: a small model would wait for the memory


def autocast(device, dtype):
    """The autocast context of a run: on for bfloat16, off for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def best_dtype(device):
    """bfloat16 on a GPU that computes in it, else float32. (A CPU and older GPUs would only emulate it, or gain little.)"""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32


def auto_workers(dataset, world=1):
    """Processes to load a dataset with: none if it is in memory, else a share of the processors by world, at most 12."""
    world = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # processes on this machine alone
    return 0 if isinstance(dataset, TensorImages) else min(12, max(1, (os.cpu_count() or 1) // world))


def eval_loader(dataset, batch_size, workers, device, indices=None):
    """Batches of this process's share of a dataset: every world-th image, so that each is counted exactly once.

    (DistributedSampler would repeat images until the shares are equal, and count those twice.)
    batch_size images at a time, loaded by `workers` processes; indices: of the images that take part; None for all.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = (range(len(dataset)) if indices is None else indices)[rank::world]
    sampling = dict(batch_size=batch_size, sampler=share)
    if isinstance(dataset, TensorImages):  # asked for whole batches
        sampling = dict(batch_size=None, sampler=BatchSampler(share, batch_size, drop_last=False))
    return DataLoader(dataset, **sampling, num_workers=workers, pin_memory=device.type == "cuda",
                      persistent_workers=workers > 0, worker_init_fn=leave_signals)


# Ctrl-C and SIGTERM often reach every process of a run: a terminal, timeout, srun and systemd see
# to that. The main process decides what to do, and may still need images for it. So the processes
# of its loaders must not end by themselves.
SIGNALS = {signal.SIGINT, signal.SIGTERM}


def leave_signals(worker):
    """Leave SIGINT and SIGTERM to the main process. A loader's new process calls this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=obey_parent, daemon=True).start()
    elif hasattr(os, "setpgid"):  # macOS: at least out of reach of signals to the whole group
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # forgets one that has come already
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def obey_parent():
    """End this process at a SIGTERM of the main process, but not at those of others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)


def start_loader(loader):
    """Return iter(loader), whose new processes get no signal before they call leave_signals()."""
    if loader.num_workers == 0 or not hasattr(signal, "pthread_sigmask"):
        return iter(loader)
    resource_tracker.ensure_running()  # started later, it unblocks the signals (Python < 3.12)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # new processes inherit this
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def together():
    """Let a ValueError or OSError inside this block end all processes, whichever of them met it.

    Every process must come here. Rank 0 raises a ValueError that names each error once. The others
    exit quietly, with status 2.
    """
    error = None
    try:
        yield
    except (ValueError, OSError) as raised:
        error = str(raised)
    errors = [error]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        if any(errors) and dist.get_rank() > 0:
            raise SystemExit(2)
    found = {}  # {error: in words}
    for rank, error in enumerate(errors):
        found.setdefault(error, f"process {rank}: {error}" if rank else error)
    found.pop(None, None)
    if found:
        raise ValueError("\nerror: ".join(found.values()))


def image_losses(logits, answers, loss):
    """Return the loss of each image, (B,), for logits (B, classes) and answers (B, L).

    answers are the right classes of an image, int64, padded with -1; L is 1 if there is only one.
    loss is the kind with which the model was trained, without label smoothing:
    - "softmax": -log(probability of the right answers), the cross-entropy if there is only one.
    - "sigmoid": each class is a yes or no of its own, summed over the classes (V-MoE).
    """
    if loss == "sigmoid":
        right = F.one_hot(answers + 1, logits.shape[1] + 1).amax(1)  # (B, L) -> (B, 1 + classes)
        right = right[:, 1:].to(logits.dtype)  # without the column of the padding
        return F.binary_cross_entropy_with_logits(logits, right, reduction="none").sum(1)
    log_probs = logits.log_softmax(1).gather(1, answers.clamp(min=0))  # (B, L)
    return -log_probs.masked_fill(answers < 0, -math.inf).logsumexp(1)


@torch.no_grad()
def evaluate(model, loader, device, mean, std, columns=None, dtype=torch.float32, progress="",
             loss="softmax", stop=lambda: False):
    """Count over a loader of eval_loader(): dict(images, correct1, correct5, top1, top5 in percent, loss).

    The model runs on normalize(images, mean, std), under autocast if dtype is bfloat16.
    Labels are (B,), or (B, L) padded with -1 if several answers are right: then one of them must be the best, or among the
    best five. The result's loss is the mean over images of image_losses(), of the kind `loss`.
    columns: the columns of the logits among which the prediction is made; labels are indices into them. None: all.
    With fewer than 5 classes top5 is top-all, 100. progress: what the progress bar is called; none if empty.
    Under torchrun each process counts its share and the sums are added at the end. ValueError if an
    image cannot be read, see together(). stop: a function, asked before each batch whether to end
    here; then the result is None, in all processes. The model is left in the mode it came in.
    """
    was_training = model.training
    model.eval()
    columns = None if columns is None else torch.tensor(columns, device=device)
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, right at once, right within five, loss
    broken = -1
    shown = None if progress else True  # tqdm's `disable`; None: shown on a terminal only
    for images, labels, unreadable in tqdm(start_loader(loader), desc=progress, unit="batch",
                                           leave=False, total=len(loader), disable=shown):
        broken = int(unreadable.max())
        if broken >= 0 or stop():
            break
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast(device, dtype):
            logits = model(normalize(images, mean, std)).float()  # (B, classes)
        logits = logits if columns is None else logits[:, columns]
        answers = labels.view(len(labels), -1)  # (B,) or (B, L) -> (B, L)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
        hits = (best.unsqueeze(2) == answers.unsqueeze(1)).any(2)  # (B, 5): is this guess one of the answers?
        total = image_losses(logits, answers, loss).double().sum()
        count = torch.tensor(len(labels), device=device)
        sums += torch.stack([count, hits[:, 0].sum(), hits.any(1).sum(), total])
    model.train(was_training)
    with together():
        if broken >= 0:
            raise ValueError(f"cannot read {loader.dataset.path(broken)}: an accuracy without "
                             f"this image would not be comparable; repair or remove the file")
    stopped = torch.tensor(int(bool(stop())), device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(stopped, dist.ReduceOp.MAX)
    if stopped:
        return None
    images, correct1, correct5, total = sums.tolist()
    return dict(images=int(images), correct1=int(correct1), correct5=int(correct5), top1=100 * correct1 / images,
                top5=100 * correct5 / images, loss=total / images)


@torch.no_grad()
def count_flops(model, image_size):
    """Return the multiply-adds of one image in evaluation, an int: what the papers call FLOPs.

    torch counts the products and convolutions of a copy of the model that has shapes, but no data.
    Norms, activations and additions are left out, as is usual.
    """
    shapes = copy.deepcopy(model).to("meta").eval()
    for layer in shapes.modules():
        if isinstance(layer, Router):
            layer.forward = partial(cost_of_a_router, layer)
        if isinstance(layer, MoE):
            layer.forward = partial(cost_of_a_moe, layer)
    with FlopCounterMode(display=False) as counter:
        shapes(torch.empty(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops() // 2  # torch counts a product and a sum


def cost_of_a_moe(layer, x):
    """Stand in for MoE.forward in count_flops: each token of x meets the router and k experts."""
    layer.router(x)
    answers = [layer.experts[e](x) for e in range(layer.k)]
    return answers[0], None


def cost_of_a_router(router, x):
    """Stand in for Router.forward in count_flops, which turns autocast off: not without data."""
    for weight in router.parameters():
        if weight.ndim == 2:  # the codes, after the projection if there is one
            x = F.linear(x, weight)
    return x


def clock(device):
    """Return seconds, read when a device ("cpu", "cuda") has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def images_per_second(model, images, device, dtype):
    """Speed of the model alone, a float: on images (B, 3, S, S), the median of 3 passes or, if fast, of 0.3 s of them."""
    seconds = []
    while len(seconds) < 4 or sum(seconds) < 0.3:
        start = clock(device.type)
        with autocast(device, dtype):
            model(images)
        seconds.append(clock(device.type) - start)
    return len(images) / statistics.median(seconds[1:])  # the first is a warm-up


# ---------------------------------------------------------------- ImageNet-C (Hendrycks and Dietterich 2019)

ALEXNET = dict(  # its error per corruption, a mean over five severities: what mCE divides by
    gaussian_noise=.886428, shot_noise=.894468, impulse_noise=.922640, defocus_blur=.819880, glass_blur=.826268,
    motion_blur=.785948, zoom_blur=.798360, snow=.866816, frost=.826572, fog=.819324, brightness=.564592,
    contrast=.853204, elastic_transform=.646056, pixelate=.717840, jpeg_compression=.606500)


def open_parts(spec, split):
    """{"": a split of a spec} or, for a folder of ImageNet-C's shape, {"fog/1": data set, ...}. ValueError if some lack."""
    folders = {f"{name}/{severity}": os.path.join(spec, name, severity) for name in ALEXNET for severity in "12345"}
    missing = [part for part, path in folders.items() if not os.path.isdir(path)]
    if len(missing) == len(folders):
        return {"": open_dataset(spec, split)}
    if missing:
        raise ValueError(f"{spec} has ImageNet-C's shape, but {len(missing)} of 75 folders are missing ({missing[0]}, ...): "
                         f"expected 15 corruptions with severities 1 to 5")
    parts = {part: open_dataset(path, "all") for part, path in folders.items()}
    uneven = [part for part, dataset in parts.items() if dataset.classes != parts["fog/1"].classes]
    if uneven:  # they would be evaluated with logits restricted to different classes
        raise ValueError(f"{spec}: {uneven[0]} has not the same class folders as fog/1, expected the same in all 75")
    return parts


def corruption_errors(results):
    """Percent, from results {"fog/1": evaluate()'s, ...}: dict(corruptions: {"fog": [5 errors, mean, CE]}, mean_error, mce)

    The mean error is the plain mean over all 75. A CE is a corruption's mean error divided by AlexNet's, and mCE is the
    mean of the CE: two numbers of similar size, of which one has been quoted as the other.
    """
    table = {}
    for name, alexnet in ALEXNET.items():
        errors = [100 - results[f"{name}/{severity}"]["top1"] for severity in "12345"]
        table[name] = [*errors, statistics.mean(errors), statistics.mean(errors) / alexnet]
    mean_error, mce = (statistics.mean(row[column] for row in table.values()) for column in (5, 6))
    return dict(corruptions=table, mean_error=mean_error, mce=mce)


# ---------------------------------------------------------------- command line


def number(interval, kind=float):
    """Return an argparse type that accepts the finite numbers of an interval such as "[0, 1)".

    A square bracket includes the end, a round one excludes it. kind: float or int.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # fails both comparisons
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise argparse.ArgumentTypeError(f"expected {kind.__name__} in {interval}, got {text}")
        return value

    return parse


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Evaluate checkpoints of train.py on data sets: a row per checkpoint.",
        usage="%(prog)s CHECKPOINT ... --data SPEC ... (--help shows all flags)")
    flag = parser.add_argument
    flag("checkpoint", nargs="+", help="files such as runs/convnext_nano-shapes-1/best.pt")
    flag("--data", required=True, action="append", help="shapes, cifar10, a folder, ... (top of eval.py); repeatable")
    flag("--split", choices=("train", "val", "all"), default="all",
         help="of a folder without val/: all of it, or the fifth that training holds out (default: all)")
    flag("--ignore-unmatched", action="store_true", help="leave out class folders that the checkpoint does not know")
    flag("--real", metavar="FILE", help="score ImageNet's validation images by the ReaL labels in this JSON file")
    flag("--raw", action="store_true", help="the plain weights, where the checkpoint has averaged ones (EMA)")
    flag("--k", type=number("[1, inf)", int), help="experts per token, other than in training")
    flag("--capacity-factor", type=number("(0, inf)"),
         help="slots per expert, in units of the even share (default: no limit)")
    flag("--drop-expert", type=layer_and_expert, action="append", default=[], metavar="LAYER:EXPERT",
         help="never choose this expert; MoE layers and experts count from 0; repeatable")
    flag("--batch-size", type=number("[1, inf)", int), default=128,
         help="images at a time in each process (default: 128)")
    flag("--workers", type=number("[0, inf)", int),
         help="processes that load images (default: 0 if in memory, else up to 12)")
    flag("--json", metavar="FILE", help="also write the results there, with counts and how they were obtained")
    return parser.parse_args(argv)


def layer_and_expert(text):
    """"0:3" -> (0, 3)."""
    layer, expert = text.split(":")
    return int(layer), int(expert)


def setup_processes():
    """(rank, world size, device): from torchrun's environment, or one process on the GPU or CPU at hand."""
    if "RANK" not in os.environ:
        return 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def check(args):
    """ValueError for options that cannot be."""
    if args.real and (len(args.data) > 1 or args.ignore_unmatched):
        raise ValueError("--real scores one --data, ImageNet's validation images, and all of its classes")
    if args.json and not os.path.isdir(os.path.dirname(args.json) or "."):
        raise ValueError(f"--json {args.json}: there is no folder {os.path.dirname(args.json)}")


def prepare(path, data, args):
    """Whatever can be wrong is found here, before anything is computed: (model, its row of the results so far, data).

    path: of a checkpoint. data: {spec: {part: data set}}, as opened, and as this checkpoint is scored on it.
    """
    model, checkpoint = load_checkpoint(path, torch.device("cpu"), args.raw)
    row = dict(checkpoint=path, weights="raw" if args.raw or not checkpoint["ema"] else "EMA")
    row |= {name: checkpoint[name] for name in ("config", "epoch", "image_size", "crop_ratio", "mean", "std", "args")}
    changes = args.k, args.capacity_factor, args.drop_expert
    row["deviations"] = change_routing(model, *changes) if any(changes) else []
    row["params"], row["active"] = count_parameters(model)
    row["multiply_adds"] = count_flops(model, row["image_size"])
    data = {spec: {part: match_dataset(dataset, checkpoint["classes"], args.ignore_unmatched, args.real)
                   for part, dataset in parts.items()} for spec, parts in data.items()}
    for spec, part, dataset in ((spec, *item) for spec, parts in data.items() for item in parts.items()):
        resized = eval_transform(row["image_size"], row["crop_ratio"])
        trained_on = row["args"].get("data") and os.path.abspath(row["args"]["data"])
        flat = getattr(dataset, "flat", False)
        if flat and os.path.abspath(spec) == trained_on and args.split == "all":
            dataset.note += ", those of the training among them: --split val leaves them out"
        if part and min(dataset[dataset.indices[0]][0].shape[1:]) < row["image_size"]:
            raise ValueError(f"{spec} is only cropped, but an image of {part} is smaller than {row['image_size']} pixels")
        dataset.transform = v2.CenterCrop(row["image_size"]) if part else resized
    return model, row, data


def measure(model, row, data, args, device, world, progress):
    """Complete a row of the results, in place: the model's speed, and its counts on each data set.

    data: as prepare() returns it. world: number of processes. progress: whether this one shows a progress bar.
    """
    model, dtype, row["data"] = model.to(device), best_dtype(device), {}
    mean, std = row["mean"], row["std"]
    for spec, parts in data.items():
        results = {}
        for part, dataset in parts.items():
            workers = auto_workers(dataset, world) if args.workers is None else args.workers
            loader = eval_loader(dataset, args.batch_size, workers, device, dataset.indices)
            if "images_per_s" not in row:
                batch = torch.stack([dataset[i][0] for i in islice(cycle(dataset.indices), args.batch_size)])
                row["images_per_s"] = images_per_second(model, normalize(batch.to(device), mean, std), device, dtype)
            counts = evaluate(model, loader, device, mean, std, dataset.columns, dtype,
                              progress and f"{spec} {part}", row["args"].get("loss", "softmax"))
            if not math.isfinite(counts["loss"]):
                raise ValueError(f"{row['checkpoint']} computes logits on {spec} that are not finite numbers")
            results[part] = counts | dict(protocol=dataset.note, transform=" ".join(str(dataset.transform).split()))
        row["data"][spec] = results[""] if "" in results else corruption_errors(results) | dict(parts=results)
    model.cpu()


def print_plan(row, data):
    """Say what is evaluated (a row), and on what (data). Of ImageNet-C's 75 parts, each different note is printed once."""
    print(f"{row['checkpoint']}: {row['config']['model']} after epoch {row['epoch']}, {row['weights']} weights")
    notes = [f"deviates from training: {deviation}" for deviation in row["deviations"]]
    for spec, parts in data.items():
        notes += [f"{spec}{', each part' if part else ''}: {dataset.note}" for part, dataset in parts.items()]
    print("".join(f"  {note}\n" for note in dict.fromkeys(notes)), end="", flush=True)


def over_seeds(rows):
    """[(name, number of runs, {spec: (mean, standard deviation)})] of the top-1 of runs that differ in the seed only.

    Of rows, the results, with the arguments of their training. The deviation is that of a sample, divided by n - 1. name:
    what the paths of the checkpoints have in common, and a star.
    """
    groups = {}
    for row in rows:
        setting = {name: value for name, value in row["args"].items() if name not in ("seed", "out", "workers")}
        groups.setdefault(json.dumps(setting, sort_keys=True), []).append(row)
    found = []
    for group in (group for group in groups.values() if len(group) > 1):
        top1 = {spec: [row["data"][spec]["top1"] for row in group]
                for spec, result in group[0]["data"].items() if "top1" in result}
        found.append((os.path.commonprefix([row["checkpoint"] for row in group]) + "*", len(group),
                      {spec: (statistics.mean(values), statistics.stdev(values)) for spec, values in top1.items()}))
    return found


def print_results(rows):
    """Print rows, the results: a line per checkpoint, one per group of seeds, and for ImageNet-C one per corruption."""
    specs = [spec for spec, result in rows[0]["data"].items() if "top1" in result]
    wide, first = [max(18, len(spec) + 2) for spec in specs], max(len(row["checkpoint"]) for row in rows)
    print("\n" + " " * (first + 39) * bool(specs) + "".join(f"{spec:>{width}}" for spec, width in zip(specs, wide)))
    print(f"{'checkpoint':<{first}}{'params M':>10}{'active M':>10}{'GFLOPs':>9}{'images/s':>10}"
          + "".join(f"{'top-1 %':>{width - 9}}{'top-5 %':>9}" for width in wide))
    for row in rows:
        print(f"{row['checkpoint']:<{first}}{row['params'] / 1e6:>10.2f}{row['active'] / 1e6:>10.2f}"
              f"{row['multiply_adds'] / 1e9:>9.3g}{row['images_per_s']:>10.0f}"
              + "".join(f"{row['data'][spec]['top1']:>{width - 9}.2f}{row['data'][spec]['top5']:>9.2f}"
                        for spec, width in zip(specs, wide)))
    seeds = over_seeds(rows)
    if seeds:
        first = max(len(name) for name, _, _ in seeds)
        print(f"\ntop-1 %, mean and standard deviation over seeds\n{'':<{first}}{'n':>4}"
              + "".join(f"{spec:>{width}}" for spec, width in zip(specs, wide)))
    for name, n, top1 in seeds:
        print(f"{name:<{first}}{n:>4}" + "".join(f"{top1[spec][0]:>{width - 6}.2f}{top1[spec][1]:>6.2f}"
                                                 for spec, width in zip(specs, wide)))
    for row, spec, result in ((row, *item) for row in rows for item in row["data"].items() if "mce" in item[1]):
        print(f"\n{row['checkpoint']} on {spec}, error in % per severity\n{'corruption':<18}"
              + "".join(f"{title:>8}" for title in (1, 2, 3, 4, 5, "mean", "CE")))
        for name, errors in result["corruptions"].items():
            print(f"{name:<18}" + "".join(f"{error:>8.2f}" for error in errors))
        print(f"mean error {result['mean_error']:.2f} %, the mean of the 75 errors\n"
              f"mCE {result['mce']:.2f} %, the mean of the 15 CE, which are mean errors in % of AlexNet's")


def main(args):
    """The whole program: check everything, evaluate each checkpoint on each data set, print the table, write the JSON."""
    rank, world, device = setup_processes()
    with together():
        check(args)
        data = {spec: open_parts(spec, args.split) for spec in args.data}
        prepared = [prepare(path, data, args) for path in args.checkpoint]
    for model, row, matched in prepared:
        if rank == 0:
            print_plan(row, matched)
        measure(model, row, matched, args, device, world, progress=rank == 0)
    rows = [row for _, row, _ in prepared]
    if rank == 0:
        print_results(rows)
    if rank == 0 and args.json:
        machine = dict(torch=torch.__version__, device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                       dtype=str(best_dtype(device)), processes=world, batch_size=args.batch_size)
        text = json.dumps(machine | dict(results=rows), indent=1)
        with open(args.json, "w") as file:
            file.write(text)
    if dist.is_initialized():
        dist.destroy_process_group()


def fail(error):
    """Print an error of all processes, see together(), or of this one, and exit with status 2.

    Of an error in a loader's worker only the last line is left, without the traceback.
    """
    print(f"error: {str(error).rpartition('ValueError: ')[2].strip()}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack a name's characters
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        fail(error)
