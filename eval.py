"""Put numbers on checkpoints: open data sets, load models, match classes, predict, then count.

    python eval.py runs/convnext_nano-shapes-1/best.pt --data shapes --data shapes-noise
    python eval.py a/best.pt b/best.pt --data /imagenet --data /imagenet-a --json result.json
    torchrun --nproc-per-node=8 eval.py best.pt --data /imagenet-c
    python eval.py best.pt --data photo.jpg

An image: open_folder() finds its file and its class, match_dataset() the same class in the
checkpoint. A loader's process makes a tensor of it (read_image) and crops it (eval_transform).
predict() runs the model on batches: per image the five best classes, their probabilities, the loss.
All numbers are counted from that, by count(), mistakes() and whatever you add.

The first half is what all programs share: processes, checkpoints, data sets, predict(), and the
drawn data, `shapes` and `flags`. The second half evaluates checkpoints.

A data set spec is
- `shapes` or `flags`, drawn below (`flags:64000`: 64,000 training images instead of 16,000), or
  the same pictures as training never shows them: `shapes-noise`, `shapes-blur`;
- `cifar10` or `cifar100`, downloaded by torchvision to data/;
- a folder with train/ and val/ (valid/, validation/, test/) in it, or directly with class folders:
  also ImageNet-V2, -A, -R, -Sketch;
- a folder of ImageNet-C's shape, <corruption>/<severity 1 to 5>/<class>;
- an image file or a folder of them, without classes: then the five best of each are printed.
"""

import argparse
import copy
import hashlib
import io
import json
import math
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, partial
from multiprocessing import parent_process, resource_tracker
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm

import convnext
import vit
from moe import MoE, count_parameters

# ================================================================ FIRST HALF: what programs share
# ---------------------------------------------------------------- processes and messages

def setup_processes():
    """Return (rank, world size, device), as torchrun says. Ranks above 0 print to nowhere."""
    gpu = torch.cuda.is_available()
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            warn("several SLURM tasks without torchrun: each computes the same, for itself. Start "
                 "one task per node: srun torchrun ... (see README)")
        return 0, 1, torch.device("cuda" if gpu else "cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    hour = timedelta(hours=1)  # the others wait while one saves or downloads
    backend, gpu = ("nccl", device) if gpu else ("gloo", None)
    dist.init_process_group(backend, timeout=hour, device_id=gpu)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size(), device


def best_dtype(device):
    """Return bfloat16 for a GPU that computes in it and does not emulate it, else float32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    return torch.bfloat16 if native else torch.float32


def autocast(device, dtype):
    """Return the autocast context of a run: on for bfloat16, off for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


@contextmanager
def together():
    """Let a ValueError or OSError inside this block end all processes, which must all come here.

    Rank 0 raises the first error, the others exit with status 2.
    """
    error = None
    try:
        yield
    except (ValueError, OSError) as raised:
        error = str(raised) or repr(raised)
    errors = [error]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        if any(errors) and dist.get_rank() > 0:
            raise SystemExit(2)
    for rank, error in enumerate(errors):
        if error:
            raise ValueError(f"process {rank}: {error}" if rank else error)


def download(function, by_hand):
    """Return function(), called by one process of a machine at a time: the first one downloads.

    by_hand: what a user can do if it fails, in words.
    """
    user = getattr(os, "getuid", int)()  # on Windows 0
    with open(Path(tempfile.gettempdir(), f"download-{user}.lock"), "w") as lock:
        with suppress(ImportError, OSError):  # Windows, or a file system without locks
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return function()
        except Exception as error:  # any bytes may be in the file
            told = f"not downloaded or not readable ({one_line(error)}): {by_hand}"
            raise ValueError(told) from None


def run_program(main):
    """Call main(). What a user can mend is an error of one line, with status 2."""
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, RuntimeError) as error:
        told = one_line(error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            told = f"out of memory ({told}): a larger --accumulate (train.py) helps, or a smaller "
            told += "--batch-size, --image-size or --model"
        elif isinstance(error, RuntimeError) and not re.search(
                "DataLoader worker|Connection closed", str(error)):
            raise  # a bug of ours: show the traceback
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)


def one_line(error):
    """Return what an error says in one line: of a loader's process the last of its traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "Original Traceback" in str(error) else 0].removeprefix("ValueError: ")


@cache
def warn(text):
    """Print a warning, once, however many data sets and processes have it to say."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


class Output:
    """A stream to print to, line by line. The program goes on if nobody reads it (`| head`)."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):  # not in a notebook. backslashes: for odd file names
            stream.reconfigure(line_buffering=True, errors="backslashreplace")

    def write(self, text):
        try:
            self.stream.write(text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def number(interval, kind=float):
    """Return an argparse type for the numbers of an interval such as "[0, 1)", which excludes 1."""
    low, high = map(float, interval[1:-1].split(","))
    included = {low: interval[0] == "[", high: interval[-1] == "]"}

    def parse(text):
        with suppress(ValueError):
            value = kind(text)
            if low < value < high or included.get(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {kind.__name__} in {interval}, got {text}")

    return parse


# Ctrl-C and SIGTERM often reach every process: a terminal, timeout, srun and systemd see to that.
# The main one decides what to do, and may still need images: loaders must not end by themselves.
SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


def watch_signals(run):
    """Let the first Ctrl-C, SIGTERM, SIGHUP or end of torchrun set run.signal: the loop saves.

    A second one ends this process at once, also while a file hangs. Repeats within two seconds are
    ignored: torchrun forwards signals that every process already received.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    reader.settimeout(2)
    signal.set_wakeup_fd(writer.fileno())  # Python writes the number of each signal there
    parent = os.getppid()

    def watch(writer):  # in a thread, for the main one may hang
        while True:
            number = 0
            with suppress(TimeoutError):
                number = reader.recv(1)[0]
            if not run.signal and "RANK" in os.environ and os.getppid() != parent:
                number = signal.SIGTERM  # torchrun was killed
            if number in SIGNALS and not run.signal:
                first, run.signal = time.monotonic(), int(number)
            elif number in SIGNALS and time.monotonic() - first > 2:
                os._exit(128 + number)

    threading.Thread(target=watch, args=[writer], daemon=True).start()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, lambda number, frame: None)


def leave_signals(worker):
    """Let a loader's new process obey a SIGTERM of the main one only, and end after it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = parent_process().pid

    def obey():
        with suppress(ProcessLookupError):
            while True:
                os.kill(main, 0)  # raises if it has ended
                received = signal.sigtimedwait({signal.SIGTERM}, 2)
                if received and received.si_pid == main:
                    break
        os._exit(0)

    if hasattr(signal, "sigtimedwait"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=obey, daemon=True).start()


def start_loader(loader):
    """Return iter(loader), whose new processes get no signal before leave_signals()."""
    if loader.num_workers == 0 or not hasattr(signal, "sigtimedwait"):
        return iter(loader)
    resource_tracker.ensure_running()  # later it would unblock the signals (Python < 3.12)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # new processes inherit it
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---------------------------------------------------------------- models and checkpoints

VITS = "vit_nano vit_pico vit_micro vit_ti vit_s vit_b vit_b32 vit_l vmoe_s32"
CONVNEXTS = "convnext_nano convnext_t convnext_s convnext_b convnext_iso_s convnext_iso_b"
MODELS = {name: getattr(vit, name) for name in VITS.split()}
MODELS |= {name: getattr(convnext, name) for name in CONVNEXTS.split()}
CHECKPOINT_KEYS = {*"config classes image_size crop_ratio mean std model ema optimizer".split(),
                   *"epoch step best args".split()}
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in 0..1, per colour
STD = (0.229, 0.224, 0.225)


def build_model(config):
    """Build the model of a config: a dict with `model`, a preset's name, and its options."""
    options = dict(config)
    name = options.pop("model")
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(MODELS)}")
    return MODELS[name](**options)


def load_checkpoint(path, device="cpu", raw=False):
    """Return the model of a checkpoint, in evaluation mode on the device, and the file's dict.

    The model has the averaged weights (EMA) if the run kept them, unless raw.
    """
    checkpoint = read_checkpoint(path)
    weights = checkpoint["model"] if raw or not checkpoint["ema"] else checkpoint["ema"]
    try:
        model = build_model(checkpoint["config"])
        model.load_state_dict(weights)
        if checkpoint["config"]["num_classes"] != len(checkpoint["classes"]):
            raise KeyError(f"num_classes is not {len(checkpoint['classes'])}")
    except (TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"config and weights in {path} do not fit: {reason}") from None
    return model.to(device).eval(), checkpoint


def read_checkpoint(path, mmap=True):
    """Read the dict of a checkpoint, on the CPU. Raise ValueError if the file is not one.

    weights_only refuses a file that wants to run code. With mmap what nobody looks at, such as the
    optimizer's moments, takes no memory.
    """
    if not os.path.isfile(path):
        raise ValueError(f"no checkpoint at {path}: expected one like runs/<run>/best.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        missing = CHECKPOINT_KEYS - set(checkpoint)
    except Exception as error:  # of whatever kind: any bytes may be in the file
        raise ValueError(f"{path} cannot be opened as a checkpoint, it is empty, truncated or not "
                         f"one of ours: {one_line(error)}") from None
    if missing:
        lacking = ", ".join(sorted(missing))
        raise ValueError(f"{path} is not a checkpoint of train.py: it lacks {lacking}")
    return checkpoint


# ---------------------------------------------------------------- data sets
# Each has .classes (names in label order), .labels (N,) and items (image (3, S, S) uint8 as the
# transform makes it, label, unreadable). unreadable is -1, or the index of a file that could not be
# read and was replaced by the next one: train.py reports it and goes on, evaluate() stops.

def open_dataset(spec, split, transform=None):
    """Open split "train", "val" or "all" of a data set spec, one of those at the top of this file.

    If a folder has no val/, "val" is a fifth of each class, "train" the rest and "all" both. For
    every other data set "all" is "val". transform: uint8 (3, H, W) -> uint8 (3, S, S).
    """
    if re.fullmatch("(shapes|flags)(-noise|-blur)?(:.*)?", spec):
        return open_drawn(spec, split, transform)
    if spec in ("cifar10", "cifar100"):
        kind = getattr(torchvision.datasets, spec.upper())
        read = partial(kind, "data", train=split == "train", download=True)
        cifar = download(read, f"place {kind.filename} in data/ by hand")
        images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2)  # (N, 32, 32, 3) -> channels 1st
        return TensorImages(images, torch.tensor(cifar.targets), cifar.classes, transform)
    return open_folder(spec, split, transform)


class TensorImages:
    """Images in memory: images (N, 3, H, W) uint8, labels (N,) int64, names of the classes.

    An index may also be a list of B: then the item is a batch of them, which is much faster.
    """

    def __init__(self, images, labels, classes, transform=None):
        self.images, self.labels = images, labels
        self.classes, self.transform = list(classes), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        unreadable = torch.full(image.shape[:-3], -1)  # () or (B,)
        if self.transform:
            image = self.transform(image)
        return image, self.labels[index], unreadable


class FolderImages:
    """Image files {class: [path from root, ...]}. The class "" holds own pictures, labelled -1.

    All paths are in one array: Python writes a reference count into each str of a list, so every
    loader process would end up with a copy.
    """

    def __init__(self, root, files, transform=None):
        self.root, self.transform = root, transform
        self.classes = [name for name in files if name]
        self.files = np.array([os.fsencode(path) for paths in files.values() for path in paths])
        counts = torch.tensor([len(paths) for paths in files.values()])
        labels = torch.arange(len(files)) if self.classes else torch.tensor([-1])
        self.labels = labels.repeat_interleave(counts)

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        """Return the file of the item at an index, a str."""
        return os.path.join(self.root, os.fsdecode(self.files[index]))

    def __getitem__(self, index):
        tries = min(100, len(self)) if self.classes else 1
        for i in range(index, index + tries):  # the file itself or the next that can be read
            i %= len(self)
            image = read_image(self.path(i))
            if image is not None:
                break
        replaced = image is None or i != index
        if image is None and self.classes:
            raise ValueError(f"cannot read {self.path(index)}, nor the images after it")
        if image is None:  # black: nothing takes the place of one's own picture
            image = torch.zeros(3, 1, 1, dtype=torch.uint8)
        if self.transform:
            image = self.transform(image)
        return image, self.labels[i], index if replaced else -1


# ---------------------------------------------------------------- folders of images

EXTENSIONS = tuple(
    ".jpg .jpeg .jpe .jfif .png .bmp .webp .gif .tif .tiff .ppm .pgm .avif".split())
TRAIN = ("train", "training")  # the first that exists, in small letters or capitals
VAL = ("val", "valid", "validation", "test")
HINT = ("expected FOLDER/train/<class>/<image>.jpg and FOLDER/val/<class>/<image>.jpg, or "
        "FOLDER/<class>/<image>.jpg, or shapes, flags, cifar10, cifar100; to classify also "
        "FOLDER/<image>.jpg or one image")


def open_folder(root, split, transform=None):
    """Open a split of a folder, or own pictures. Raise ValueError if there are no images.

    root holds a training and a validation folder under their usual names, or class folders, of
    which a fifth is held out, or images only: own pictures.
    """
    if os.path.isfile(root) and split != "train":
        return FolderImages("", {"": [root]}, transform)
    if not os.path.isdir(root):
        raise ValueError(f"no folder {root!r}: {HINT}")
    train, val = subfolder(root, TRAIN), subfolder(root, VAL)
    flat = not val or split == "train" and not train
    if flat and train:
        warn(f"no {root}/val: only {train} is read, of which training holds out a fifth")
    root = (val if split != "train" and val else train) or root
    files = find_images(root)
    if split == "train" and len(files) < 2:
        raise ValueError(f"{root} has fewer than two class folders with images: {HINT}")
    if flat and split != "all" and "" not in files:
        files = hold_out(files, split, root)
    return FolderImages(root, files, transform)


def subfolder(root, names):
    """Return the first folder of root of these names, in any case, that holds folders, or None."""
    there = {name.lower(): os.path.join(root, name) for name in os.listdir(root)}
    for path in (there[name] for name in names if name in there):
        if os.path.isdir(path) and any(entry.is_dir() for entry in os.scandir(path)):
            return path
    return None


def find_images(root):
    """List the images in and below each class folder: {class: paths from root}, both sorted.

    If there are none, the images in root itself come as {"": paths}. Links below a class folder are
    not followed. One warning says what is left out. Raise ValueError if that is all.
    """
    def visible(name):  # no ._1.jpg of macOS
        return not name.startswith(".")

    def is_data(folder):  # no .git, no @eaDir of a Synology, no $RECYCLE.BIN
        return folder[0] not in ".@$" and folder != "lost+found"

    def refuse(error):
        raise error

    start, found, others = os.path.join(root, ""), defaultdict(list), Counter()
    names = sorted(filter(visible, os.listdir(root)))
    for name in (name for name in names if is_data(name) and os.path.isdir(start + name)):
        if Path(root).resolve().is_relative_to(Path(start + name).resolve()):
            continue  # a link to root or above
        for place, below, files in os.walk(start + name, onerror=refuse):
            below[:] = filter(is_data, below)
            others["links to folders"] += sum(os.path.islink(f"{place}/{name}") for name in below)
            for file in filter(visible, files):
                if file.lower().endswith(EXTENSIONS):
                    found[name].append(os.path.join(place, file)[len(start):])
                else:
                    others[os.path.splitext(file)[1] or file] += 1
        if name not in found:
            others[f"{name}/"] += 1
    loose = [name for name in names if name.lower().endswith(EXTENSIONS)]
    notes = ", ".join(f"{kind} ({n})" for kind, n in others.most_common(8) if n)
    if not found and not loose:
        raise ValueError(f"no images in {root} (found: {notes or 'nothing'}): {HINT}")
    if notes:
        warn(f"{root}: left out what is or holds no image: {notes}")
    return {name: sorted(files) for name, files in found.items()} or {"": loose}


def hold_out(classes, split, root):
    """Keep what is for split "train" or "val" of each class: {name: files} -> {name: files}.

    Each class is sorted by a hash of the file names, and its first fifth is for validation: adding
    or removing an image moves at most one other.
    """
    def hashed(file):  # its path within the class folder
        return hashlib.sha256(os.fsencode(file.partition("/")[2])).digest()

    few = [name for name, files in classes.items() if len(files) < 5]
    if len(few) == len(classes):
        raise ValueError(f"classes of {root} have fewer than 5 images: too few to hold out a fifth")
    if few:
        warn(f"classes of fewer than 5 images have none to validate: {', '.join(few[:5])} "
             f"({len(few)} in all)")
    kept = {}
    for name, files in classes.items():
        fifth = set(sorted(files, key=hashed)[:len(files) // 5])
        kept[name] = [file for file in files if (file in fifth) == (split == "val")]
    return kept


warnings.filterwarnings("ignore", module="PIL")  # an odd file is read or reported


def read_image(path):
    """Read an image file: (3, H, W) uint8 RGB, or None. Of an animation the first picture.

    It is turned as its EXIF data say, which published ImageNet protocols do not do. Transparency is
    laid on white. More than 179 million pixels (Pillow's limit) are unreadable: a damaged header
    may claim any size.
    """
    try:
        if not os.path.isfile(path):  # but a pipe, which may never end
            return None
        content = bytearray(Path(path).read_bytes())
        if content.startswith(b"\x89PNG\r\n"):
            content = without_metadata(content)
        image = Image.open(io.BytesIO(content))  # the header; too many pixels raise
        if image.format in ("JPEG", "MPO"):  # MPO: a JPEG with more than one picture
            with suppress(Exception):  # Pillow is slower, and reads more
                return torchvision.io.decode_jpeg(torch.frombuffer(content, dtype=torch.uint8),
                                                  "RGB", apply_exif_orientation=True)
        return decode(image)  # not by torchvision: one wrong bit of a PNG can crash it
    except Exception:  # a decoder may raise anything
        return None


def without_metadata(png):
    """Return a PNG file without chunks that are no picture: Pillow stumbles over damaged ones."""
    kept, start = png[:8], 8
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start:start + 4], "big")  # name, checksum; data
        name = png[start + 4:start + 8]
        if name == b"eXIf":  # with a right checksum
            kept += png[start:end - 4] + zlib.crc32(png[start + 4:end - 4]).to_bytes(4, "big")
        elif name[:1].isupper() or name == b"tRNS":  # capitals: critical
            kept += png[start:end]
        start = end
    return kept


def decode(image):
    """Decode an image that Pillow has opened, or raise. Grey of 12 or 16 bits is scaled to 8."""
    image.load()  # damaged pixels raise here; damaged EXIF data only mean that it is not turned
    tags = dict(getattr(image, "tag_v2", {}))  # of a TIFF. 258: bits, 262: 0 is white, 339: signed
    with suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        bits = tags.get(258, (16,))[0]  # PNG and PGM have 16
        grey = v2.functional.pil_to_tensor(image.convert("F")) * (255 / (2**bits - 1))  # (1, H, W)
        known = image.mode != "F" and bits <= 16 and tags.get(339, (1,))[0] == 1
        if not known or not 0 <= grey.min() <= grey.max() <= 255:
            raise ValueError("no known range: floats, signed, or of 32 bits")
        grey = 255 - grey if tags.get(262) == 0 else grey
        return grey.round().to(torch.uint8).repeat(3, 1, 1)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return v2.functional.pil_to_tensor(image.convert("RGB"))


# ---------------------------------------------------------------- from images to predictions

def eval_transform(image_size, crop_ratio):
    """Return the transform uint8 (3, H, W) -> (3, S, S), S = image_size: resize and crop.

    The short side becomes S / crop_ratio, bicubic: for ImageNet 256 pixels, of which 224 are left.
    """
    bicubic, short_side = v2.InterpolationMode.BICUBIC, round(image_size / crop_ratio)
    resize = v2.Resize(short_side, bicubic, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(image_size)])


def normalize(images, mean, std):
    """Turn images uint8 (B, 3, S, S) into float32: (pixel / 255 - mean) / std per colour."""
    mean, std = (per_colour(tuple(values), images.device) for values in (mean, std))
    # In one pass: a small model would wait for the memory.
    return torch.addcmul(-mean / std, images.float(), 1 / (255 * std))


@cache  # made once: it is a copy from the CPU, for which a GPU waits
def per_colour(values, device):
    """Return three numbers as a tensor (3, 1, 1) on a device."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def auto_workers(dataset, world=1, given=None):
    """Return how many processes load a dataset: as given, 0 if it is in memory, else 1 to 12."""
    if given is not None or isinstance(dataset, TensorImages):
        return given or 0
    world = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # on this machine alone
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(12, max(1, mine // world))


def eval_loader(dataset, batch_size, workers, device, indices=None):
    """Return a loader of this process's share of a dataset, or of these indices: every world-th.

    So each image counts once. DistributedSampler would fill up the shares with images that count
    twice.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = (range(len(dataset)) if indices is None else indices)[rank::world]
    sampling = dict(batch_size=batch_size, sampler=share)
    if isinstance(dataset, TensorImages):  # asked for whole batches
        sampling = dict(batch_size=None, sampler=BatchSampler(share, batch_size, drop_last=False))
    return DataLoader(dataset, **sampling, num_workers=workers, persistent_workers=workers > 0,
                      pin_memory=device.type == "cuda", worker_init_fn=leave_signals)


@torch.no_grad()
def outputs(model, loader, device, mean, std, dtype=torch.float32, progress="",
            stop=lambda: False, **options):
    """Yield (model(images, **options), labels, unreadable) for each batch, in evaluation mode.

    dtype: bfloat16 for autocast. progress: the name of a bar, none if empty. stop: a function,
    asked before each batch whether to end.
    """
    was_training, hidden = model.training, None if progress else True  # None: off a terminal
    model.eval()
    try:
        for images, labels, unreadable in tqdm(
                start_loader(loader), progress, len(loader), leave=False, disable=hidden):
            if stop():
                break
            images = normalize(images.to(device, non_blocking=True), mean, std)  # (B, 3, S, S)
            with autocast(device, dtype):
                output = model(images, **options)
            yield output, labels.to(device, non_blocking=True), unreadable
    finally:  # also if nobody asks for the rest
        model.train(was_training)


class Predictions(NamedTuple):
    """What a model says of the N images of a loader, in their order, on the CPU."""
    best: torch.Tensor  # (N, 5) int64, the most probable classes, best first; or fewer
    probs: torch.Tensor  # (N, 5) float32, their probabilities
    losses: torch.Tensor  # (N,) float32, see image_losses()
    answers: torch.Tensor  # (N, L) int64, the right classes, padded with -1
    unreadable: torch.Tensor  # (N,) int64, the index of a file that cannot be read, else -1


def predict(model, loader, device, mean, std, columns=None, loss="softmax", stop=lambda: False,
            **options):
    """Run a model over a loader of eval_loader(): Predictions, the same for all processes.

    columns: of the logits, among which the prediction is made; classes are indices into them. loss:
    see image_losses(). stop, options: see outputs(). After a stop of any process all return None.
    """
    columns = slice(None) if columns is None else torch.tensor(columns, device=device)
    batches = []
    for logits, labels, unreadable in outputs(
            model, loader, device, mean, std, stop=stop, **options):
        logits = logits[:, columns].float()  # (B, classes)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
        probs = class_probabilities(logits, loss).gather(1, best)
        answers = labels.view(len(labels), -1)  # (B,) or (B, L) -> (B, L)
        losses = image_losses(logits, answers, loss)
        batches.append(Predictions(best, probs, losses, answers, unreadable))
    mine = bool(stop()), [torch.cat(field).cpu() for field in zip(*batches)]
    shares = [mine]
    if dist.is_initialized():
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, mine)
    if any(stopped for stopped, _ in shares):
        return None
    N = sum(len(fields[0]) for _, fields in shares if fields)  # a process may have no image
    found = [field.new_empty(N, *field.shape[1:]) for field in shares[0][1]]
    for rank, (_, fields) in enumerate(shares):
        for whole, share in zip(found, fields):
            whole[rank::len(shares)] = share
    return Predictions(*found)


def count(found, dataset):
    """Count Predictions: dict(images, correct1, correct5, top1, top5, loss), top1 and 5 in percent.

    correct5: one of the best five is one of the answers. Raise ValueError if files could not be
    read: an accuracy without them would not be comparable.
    """
    broken = [dataset.path(index) for index in found.unreadable.tolist() if index >= 0]
    with together():
        if broken:
            raise ValueError(f"cannot read {', '.join(broken[:5])} ({len(broken)} in all): repair "
                             f"or replace them")
    # (N, 5, 1) and (N, 1, L) -> (N, 5): is this guess one of the answers?
    hits = (found.best.unsqueeze(2) == found.answers.unsqueeze(1)).any(2)
    N, correct1, correct5 = len(hits), hits[:, 0].sum().item(), hits.any(1).sum().item()
    return dict(images=N, correct1=correct1, correct5=correct5, top1=100 * correct1 / N,
                top5=100 * correct5 / N, loss=found.losses.double().mean().item())


def evaluate(model, loader, *args, **options):
    """Return count() of predict(), or None after a stop."""
    found = predict(model, loader, *args, **options)
    return found and count(found, loader.dataset)


def image_losses(logits, answers, loss):
    """Return the loss of each image, (B,), for logits (B, classes) and answers (B, L), padded: -1.

    loss "softmax": -log(probability of the right answers), the cross-entropy if there is only one.
    "sigmoid": each class is a yes or no of its own, summed over the classes (V-MoE).
    """
    if loss == "sigmoid":
        right = F.one_hot(answers + 1, logits.shape[1] + 1).amax(1)  # (B, 1 + classes)
        right = right[:, 1:].to(logits.dtype)  # without the column of the padding
        return F.binary_cross_entropy_with_logits(logits, right, reduction="none").sum(1)
    log_probs = logits.log_softmax(1).gather(1, answers.clamp(min=0))  # (B, L)
    return -log_probs.masked_fill(answers < 0, -math.inf).logsumexp(1)


def class_probabilities(logits, loss):
    """Return the probability of each class of logits (B, classes), as trained with a loss."""
    return logits.sigmoid() if loss == "sigmoid" else logits.softmax(1)


def mistakes(found, names):
    """Return {class: dict(top1, images)}, and [[true class, predicted class, images], ...]."""
    pairs = Counter(zip(found.answers[:, 0].tolist(), found.best[:, 0].tolist()))
    images, per_class = Counter(found.answers[:, 0].tolist()), {}
    for true, n in sorted(images.items()):
        per_class[names[true]] = dict(top1=100 * pairs[true, true] / n, images=n)
    wrong = [[names[t], names[p], n] for (t, p), n in sorted(pairs.items()) if t != p]
    return per_class, sorted(wrong, key=lambda pair: -pair[2])


# ---------------------------------------------------------------- the drawn data
# Unlike photographs these pictures come with their factors and their object's mask, so that one can
# measure what the experts follow. Only whole numbers are used, so that every machine draws the same
# pictures.

VAL_IMAGES = 2000


def open_drawn(spec, split, transform=None):
    """Open `NAME`, `NAME:COUNT` or either with `-SHIFT`: a TensorImages with factors and masks.

    factors: a dict of int64 tensors, one value per picture or per part of the object. masks
    (N, 32, 32) uint8: 0 on the ground, else the part of the object.
    """
    name, shift, count = re.fullmatch("([a-z]+)-?([a-z]*):?(.*)", spec).groups()
    count = int(count) if count.isdecimal() else 0 if ":" in spec else 16_000
    if not 1 <= count <= 100_000:
        raise ValueError(f"no data set {spec!r}: expected {name}:COUNT with a COUNT up to 100000")
    count, seed = (count, 1) if split == "train" else (VAL_IMAGES, 2)
    draw, classes = DRAWN[name]
    parts = [draw(torch.Generator().manual_seed(1000 * seed + i)) for i in range(-(-count // 500))]
    drawn = {key: torch.cat([part[key] for part in parts])[:count] for key in parts[0]}
    images = drawn.pop("images").int()
    if shift == "noise":  # up to 80 brighter or darker; training has seen 16 at most
        generator = torch.Generator().manual_seed(3)
        images += torch.randint(-80, 81, images.shape, generator=generator, dtype=torch.int32)
    if shift == "blur":  # the mean of 3 x 3; no ninth of a whole number is near .5
        images = F.avg_pool2d(F.pad(images.float(), (1, 1, 1, 1), "replicate"), 3, 1).round()
    images = images.clamp(0, 255).to(torch.uint8)
    data = TensorImages(images, drawn.pop("labels"), classes, transform)
    data.masks, data.factors = drawn.pop("masks"), drawn
    return data


def paint(colours, layers, noise):
    """Give each pixel the colour of its layer: images (n, 3, 32, 32) uint8.

    colours (n, layers, 3), layers (n, 32, 32): an index into them, noise (n, 3, 32, 32).
    """
    picture = torch.arange(len(layers)).view(-1, 1, 1)
    images = colours[picture, layers.long()].permute(0, 3, 1, 2)  # (n, 32, 32, 3) -> (n, 3, 32, 32)
    return (images + noise).clamp(0, 255).to(torch.uint8)


def whole_numbers(generator, low, high, *size):
    """Draw whole numbers from low to high - 1, int32."""
    return torch.randint(low, high, size, generator=generator, dtype=torch.int32)


# ---- shapes: a textured shape on a background; the class is shape and texture. Position, size,
# rotation and colours are nuisance. Lengths are in 1/256 pixel.

SHAPES = ("circle", "square", "triangle", "cross")
TEXTURES = ("plain", "stripes", "checks", "dots")
OKABE_ITO = "E69F00 56B4E9 009E73 F0E442 0072B2 D55E00 CC79A7 EBEBEB"  # white for black
PALETTE = [tuple(bytes.fromhex(colour)) for colour in OKABE_ITO.split()]
COSINES = torch.tensor((213, 237, 251, 256, 251, 237, 213))  # x 256, of -33.75 .. 33.75 degrees
SINES = torch.tensor((-142, -98, -50, 0, 50, 98, 142))


def draw_shapes(generator, n=500):
    """Draw n pictures: a dict of images, labels, masks and factors, see open_drawn().

    Factors: shape, texture, colour and background (indices into the tuples above), row and column
    of the object's centre in pixels.
    """
    draw = partial(whole_numbers, generator)
    shape, texture = draw(0, 4, n), draw(0, 4, n)
    row, column = draw(12, 20, n, 1, 1), draw(12, 20, n, 1, 1)
    radius, turn = draw(2560, 3328, n, 1, 1), draw(0, 7, n, 1, 1)
    order = torch.rand(n, 8, generator=generator).argsort(dim=1, stable=True)
    colours = order[:, :3]  # (n, 3): object, texture, background
    shade, noise = draw(-25, 26, n, 3, 3), draw(-12, 13, n, 3, 32, 32)

    # The pixel grid in the object's own frame: u to its right, v down, both (n, 32, 32).
    pixels = torch.arange(32, dtype=torch.int32)
    x, y = pixels - column, pixels.view(32, 1) - row
    cos, sin = COSINES[turn].int(), SINES[turn].int()  # (n, 1, 1)
    u, v = cos * x + sin * y, cos * y - sin * x
    picture = torch.arange(n)
    masks = outlines(u, v, radius)[shape, picture]  # (4, n, 32, 32) -> (n, 32, 32)
    second = textures(u, v)[texture, picture]
    layers = torch.where(masks, second.int(), 2)  # object, texture, background
    bright = (torch.tensor(PALETTE)[colours] + shade) * torch.tensor([[4], [4], [1]]) // 4
    factors = dict(shape=shape, texture=texture, row=row, column=column, colour=colours[:, 0],
                   background=colours[:, 2])
    drawn = {name: factor.flatten().long() for name, factor in factors.items()}
    return drawn | dict(images=paint(bright, layers, noise), masks=masks.to(torch.uint8),
                        labels=4 * drawn["shape"] + drawn["texture"])


def outlines(u, v, r):
    """Say where each of the SHAPES is: u, v (n, 32, 32), radius r (n, 1, 1) -> (4, n, 32, 32)."""
    near, far = torch.stack([u, v]).abs().aminmax(dim=0)
    slope = (u.abs() * 443 >> 8) - v  # 443 / 256 is the square root of 3
    circle, square = u * u + v * v < r * r, far * 8 < r * 7
    triangle = torch.maximum(2 * v, slope) < r * 5 // 4
    cross = (near * 3 < r) & (far < r)
    return torch.stack([circle, square, triangle, cross])


def textures(u, v):
    """Say where each of the TEXTURES has its second colour: u, v (n, 32, 32) -> (4, n, 32, 32)."""
    column, row = u // 1024, v // 1024  # stripes and checks of 4 pixels
    x, y = (u + 896) % 1792 - 896, (v + 896) % 1792 - 896  # from a dot: one every 7 pixels
    plain, dots = torch.zeros_like(u, dtype=torch.bool), x * x + y * y < 580 * 580
    return torch.stack([plain, column % 2 == 1, (column + row) % 2 == 1, dots])


# ---- flags: three stripes, each of one of 14 colours. A class is a country. Each of the 2,744
# flags was assigned at random to one of 56 countries, 49 to each. No rule predicts the country: the
# flags must be learnt by heart.

FLAG_COLOURS = ("F0F0F0 202020 D02030 F07820 F0D020 30A040 105040 40C0D0 2050C0 702080 E080B0 "
                "805030 98D838 8090B0")
FLAG_PALETTE = [tuple(bytes.fromhex(colour)) for colour in FLAG_COLOURS.split()]


LOTS = torch.randperm(14**3, generator=torch.Generator().manual_seed(0))
COUNTRIES = (LOTS % 56).view(14, 14, 14)  # of a flag by its three colours, whatever the seed


def draw_flags(generator, n=500):
    """Draw n flags of 24 x 24 pixels, as draw_shapes() does.

    Factors: colour (n, 3), of each stripe from above, an index into FLAG_PALETTE; row and column.
    """
    draw = partial(whole_numbers, generator)
    colours = draw(0, 14, n, 3)
    row, column = draw(15, 18, n, 1, 1), draw(15, 18, n, 1, 1)
    ground, shade = draw(70, 120, n, 1, 3), draw(-12, 13, n, 4, 3)
    noise = draw(-16, 17, n, 3, 32, 32)

    pixels = torch.arange(32, dtype=torch.int32)
    x, y = pixels - column + 12, pixels.view(32, 1) - row + 12  # from the flag's upper left corner
    on_flag = (x >= 0) & (x < 24) & (y >= 0) & (y < 24)
    masks = torch.where(on_flag, y // 8 + 1, 0)  # (n, 32, 32)
    stripes = torch.tensor(FLAG_PALETTE, dtype=torch.int32)[colours]  # (n, 3 stripes, 3 colours)
    images = paint(torch.cat([ground, stripes], dim=1) + shade, masks, noise)
    colours, row, column = colours.long(), row.flatten().long(), column.flatten().long()
    return dict(colour=colours, row=row, column=column, images=images, masks=masks.to(torch.uint8),
                labels=COUNTRIES[colours.unbind(1)])


DRAWN = dict(
    shapes=(draw_shapes, [f"{shape}-{texture}" for shape in SHAPES for texture in TEXTURES]),
    flags=(draw_flags, [f"country-{i:02}" for i in range(56)]))

# ================================================================ SECOND HALF: evaluate checkpoints
# ---------------------------------------------------------------- whose class is which
# One rule for every test set. Folder names are looked up among the checkpoint's classes, and the
# prediction is made among the classes that were found: all 1,000 for ImageNet-V2 and Sketch, 200
# for -A and -R. A model of 21,000 classes is scored among ImageNet's 1,000. ImageNet-V2 calls its
# folders 0 to 999. Sorted as text they come as 0, 1, 10, so such a name is read as the number of a
# class, whatever its place.

def match_classes(names, classes, ignore_unmatched=False):
    """Find the class folders of a data set among the checkpoint's classes: a list of positions.

    Raise ValueError for an unknown folder. With ignore_unmatched it gets -1, if others are known.
    """
    position = {name: i for i, name in enumerate(classes)}
    if all(map(str.isdecimal, names)) and not any(map(str.isdecimal, classes)):
        position = {name: int(name) for name in names if int(name) < len(classes)}
    unknown = [name for name in names if name not in position]
    if len(unknown) == len(names) or unknown and not ignore_unmatched:
        hint = "; --ignore-unmatched leaves them out" if len(unknown) < len(names) else ""
        raise ValueError(f"{len(unknown)} of {len(names)} classes of the data are unknown to the "
                         f"checkpoint ({', '.join(unknown[:3])}, ...): it knows "
                         f"{', '.join(classes[:3])}, ...{hint}")
    return [position.get(name, -1) for name in names]


def match_dataset(dataset, classes, ignore_unmatched=False, real=None):
    """Return a copy of a data set, as a checkpoint with these classes is scored on it.

    Its attributes: columns, the logits that take part; names, of their classes; labels (N, L), the
    right answers as indices into columns; indices, of the images that have one; note, what was
    done, in words. real: a file of ReaL labels, which replace those of the folders.
    """
    data, own = copy.copy(dataset), not dataset.classes  # own pictures have no class
    if own and real:
        raise ValueError("--real scores ImageNet's validation images, not pictures without classes")
    found = [] if own else match_classes(data.classes, classes, ignore_unmatched)
    data.columns = sorted(set(found) - {-1}) or list(range(len(classes)))
    data.names = [classes[column] for column in data.columns]
    place = {column: i for i, column in enumerate(data.columns)}
    places = torch.tensor([place.get(column, -1) for column in found] or [-1])
    data.labels = places[dataset.labels].unsqueeze(1)  # (N,) -> (N, 1)
    if real:
        data.labels = read_real(real, data, len(data.columns))  # (N, L)
    data.indices = ((data.labels >= 0).any(1) | own).nonzero()[:, 0].tolist()
    if not data.indices:
        raise ValueError("no image of the data has a class that the checkpoint knows")
    data.note = f"{len(data.indices)} images, {len(data.columns)} of {len(classes)} classes"
    if len(data.columns) < len(classes):
        data.note += ", logits restricted"
    if len(data.indices) < len(data):
        data.note += f", {len(data) - len(data.indices)} images without an answer skipped"
    if real:
        data.note += f", ReaL labels from {real}"
    if own:
        data.note = f"{len(data)} picture(s) without a class"
    return data


def read_real(path, dataset, num_classes):
    """Read ReaL labels (Beyer et al. 2020): (N, L) int64, padded with -1.

    The file at path is a JSON list of the lists of right labels, some empty. Entry i belongs to the
    image whose NAME has number i + 1, ILSVRC2012_val_00000001.JPEG, not to the i-th of the files
    sorted by class.
    """
    try:
        entries = json.loads(Path(path).read_text())
        real = {f"ILSVRC2012_val_{i:08}": entry for i, entry in enumerate(entries, start=1)}
        names = [os.path.basename(dataset.path(i))[:23] for i in range(len(dataset))]
        if sorted(names) != sorted(real):
            raise ValueError(f"{len(real)} entries for {len(names)} images ({names[0]}, ...), "
                             f"expected one for each of ILSVRC2012_val_00000001 to {len(names):08}")
        if not set().union(*entries) <= set(range(num_classes)):
            raise ValueError(f"expected labels from 0 to {num_classes - 1}, the matched classes")
        rows = [torch.tensor(real[name], dtype=torch.long) for name in names]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--real {path} does not fit: {one_line(error)}") from None
    return pad_sequence(rows, batch_first=True, padding_value=-1)


# ---------------------------------------------------------------- ImageNet-C
# (Hendrycks and Dietterich 2019)

ALEXNET = dict(  # its error per corruption, a mean over five severities: what mCE divides by
    gaussian_noise=.886428, shot_noise=.894468, impulse_noise=.922640, defocus_blur=.819880,
    glass_blur=.826268, motion_blur=.785948, zoom_blur=.798360, snow=.866816, frost=.826572,
    fog=.819324, brightness=.564592, contrast=.853204, elastic_transform=.646056,
    pixelate=.717840, jpeg_compression=.606500)
PARTS = [f"{corruption}/{severity}" for corruption in ALEXNET for severity in "12345"]


@cache  # for several checkpoints
def open_parts(spec, split):
    """Open a spec: {"": data set}, or of ImageNet-C's shape {"fog/1": data set, ...}."""
    missing = [part for part in PARTS if not os.path.isdir(os.path.join(spec, part))]
    if missing == PARTS:
        return {"": open_dataset(spec, split)}
    if missing:
        raise ValueError(f"{spec} has ImageNet-C's shape, but {len(missing)} of 75 folders are "
                         f"missing ({missing[0]}, ...)")
    parts = {part: open_dataset(os.path.join(spec, part), "all") for part in PARTS}
    for part, dataset in parts.items():
        if dataset.classes != parts["fog/1"].classes:  # other logits would take part
            raise ValueError(f"{spec}: {part} has not the same class folders as fog/1")
    return parts


def corruption_errors(results):
    """Sum up {"fog/1": count(), ...}: dict(corruptions, mean_error, mce) in percent.

    corruptions: {"fog": [5 errors, their mean, CE], ...}. A CE is the mean divided by AlexNet's.
    mean_error is the mean of the 15 means, mce the mean of the 15 CE: two numbers of similar size,
    of which one has been printed as the other.
    """
    table = {}
    for name, alexnet in ALEXNET.items():
        errors = [100 - results[f"{name}/{severity}"]["top1"] for severity in "12345"]
        table[name] = [*errors, sum(errors) / 5, sum(errors) / 5 / alexnet]
    mean_error, mce = (sum(row[i] for row in table.values()) / 15 for i in (5, 6))
    return dict(corruptions=table, mean_error=mean_error, mce=mce)


# ---------------------------------------------------------------- changed routing, and the cost

def change_routing(model, k=None, capacity_factor=None, drop_experts=()):
    """Change how a sparse model chooses its experts. Return what differs, a list of sentences.

    k: experts per token. capacity_factor: limits the experts' slots, in units of the even share.
    drop_experts: pairs (MoE layer, expert), both counted from 0.
    """
    if not (k or capacity_factor or drop_experts):
        return []
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError("--k, --capacity-factor and --drop-expert are for a model whose tokens "
                         "choose experts, not for a dense one, expert_choice or soft")
    E, last, notes = layers[0].num_experts, len(layers) - 1, []
    drops = set(drop_experts)
    for i, expert in drops:
        if not (0 <= i <= last and 0 <= expert < E):
            raise ValueError(f"--drop-expert {i}:{expert}: expected 0:0 to {last}:{E - 1}")
        layers[i].router.register_forward_hook(partial(mute, expert=expert))
        notes.append(f"expert {expert} of MoE layer {i}, block {model.moe_blocks[i]}: not chosen")
    k, trained = k or layers[0].k, layers[0].k
    left = E - max(Counter(i for i, _ in drops).values(), default=0)
    if k > left:
        raise ValueError(f"--k {k}: a MoE layer has {left} experts to choose from")
    if k != trained:
        notes.append(f"k = {k} instead of {trained}")
    if capacity_factor:
        notes.append(f"capacity factor {capacity_factor}: a prediction depends on its batch")
    for layer in layers:
        layer.k, layer.eval_capacity_factor = k, capacity_factor
    return notes


def mute(router, inputs, logits, expert):
    """Change a router's logits (T, E), as its forward hook, so that nobody chooses this expert."""
    logits[:, expert] = -math.inf


@torch.no_grad()
def count_flops(model, image_size, modules="^Global$"):
    """Return the multiply-adds of one image, an int: in all of a model, or in some of its modules.

    They are what the papers call FLOPs: products and convolutions alone, counted by torch in a pass
    of an empty image. It misses fused attention (hence MATH) and the distances of an L2 router.
    modules: a regular expression of names such as "ViT.blocks.1.mlp.experts.0".
    """
    was_training = model.training
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    model.train(was_training)
    counts = counter.get_flop_counts().items()  # {name: {product: number}}
    return sum(sum(flops.values()) for name, flops in counts if re.search(modules, name)) // 2


# ---------------------------------------------------------------- results: a dict per checkpoint

def prepare(path, args):
    """Find what can be wrong before anything is computed: return (model, row, {key: data set}).

    path: of a checkpoint. row: a dict of its results so far. A key is (spec, part), where part is
    "fog/1" or the like for ImageNet-C, and "" otherwise.
    """
    model, checkpoint = load_checkpoint(path, raw=args.raw)
    row = dict(checkpoint=path, weights="raw" if args.raw or not checkpoint["ema"] else "EMA")
    for name in ("config", "epoch", "image_size", "crop_ratio", "mean", "std", "args"):
        row[name] = checkpoint[name]
    row["deviations"] = change_routing(model, args.k, None, args.drop_expert)
    row["params"], row["active"] = count_parameters(model)
    row["multiply_adds"] = count_flops(model, row["image_size"])
    row["routed"] = count_flops(model, row["image_size"], r"experts\.\d+$")  # of these, in experts
    row["deviations"] += change_routing(model, None, args.capacity_factor)  # now: it needs a batch
    matched, size = {}, row["image_size"]
    for spec in args.data:
        trained_on = os.path.realpath(row["args"].get("data", "")) == os.path.realpath(spec)
        split = args.split or ("val" if trained_on else "all")  # "val" of a flat folder is a fifth
        for part, dataset in open_parts(spec, split).items():
            data = match_dataset(dataset, checkpoint["classes"], args.ignore_unmatched, args.real)
            crop = v2.CenterCrop(size)
            data.transform = crop if part else eval_transform(size, row["crop_ratio"])
            if part and min(dataset[data.indices[0]][0].shape[1:]) < size:
                raise ValueError(f"{spec} is only cropped, but {part} has less than {size} pixels")
            data.note += ", those held out from its training" * (trained_on and split == "val")
            matched[spec, part] = data
    return model, row, matched


def measure(model, row, matched, args, device, world):
    """Add to a row of prepare() the counts on each data set, and the answers for own pictures."""
    model.to(device)
    row["data"], row["pictures"] = defaultdict(dict), []
    for (spec, part), data in matched.items():
        workers = auto_workers(data, world, args.workers)
        loader = eval_loader(data, args.batch_size, workers, device, data.indices)
        found = predict(model, loader, device, row["mean"], row["std"], data.columns,
                        row["args"].get("loss", "softmax"), dtype=best_dtype(device),
                        progress=f"{spec} {part}" if world == 1 else "")
        with together():
            if not (found.losses if data.classes else found.probs).isfinite().all():
                raise ValueError(f"{row['checkpoint']}: its logits on {spec} are not finite")
        if not data.classes:
            for i, (best, probs) in enumerate(zip(found.best.tolist(), found.probs.tolist())):
                read = found.unreadable[i] < 0
                row["pictures"].append(dict(
                    file=data.path(i), classes=[data.names[c] for c in best if read],
                    probabilities=[p for p in probs if read]))
            continue
        counts = count(found, data) | dict(protocol=data.note, classes=len(data.columns))
        if not part and not args.real:  # not for 75 parts, nor for several right answers
            counts["per_class"], counts["confusions"] = mistakes(found, data.names)
        row["data"][spec][part] = counts
    for spec, parts in row["data"].items():
        row["data"][spec] = parts.get("") or corruption_errors(parts) | dict(parts=parts)
    model.cpu()


def print_row(row, matched):
    """Say what was evaluated, on what, and what there is besides accuracies."""
    path, config = row["checkpoint"], row["config"]
    print(f"\n{path}: {config['model']} after epoch {row['epoch']}, {row['weights']} weights")
    notes = [f"  deviates from training: {deviation}" for deviation in row["deviations"]]
    for (spec, part), data in matched.items():
        notes.append(f"  {spec}{', each part' if part else ''}: {data.note}")
    print("\n".join(dict.fromkeys(notes)))
    for spec, result in row["data"].items():
        if "mce" in result:
            lines = [[name, *errors] for name, errors in result["corruptions"].items()]
            print_table([["error in % per severity", *"12345", "mean", "CE"], *lines])
            print(f"  mean error {result['mean_error']:.2f} %, the mean of the 75 errors; mCE "
                  f"{result['mce']:.2f} %, the mean of the 15 CE: in % of AlexNet's errors")
        if result.get("confusions"):
            worst = sorted((n["top1"], name) for name, n in result["per_class"].items())[:5]
            told = [f"{name} {top1:.1f} %" for top1, name in worst]
            print(f"  {spec}, lowest top-1: {', '.join(told)}")
            pairs = [f"{true} -> {best} ({n})" for true, best, n in result["confusions"][:5]]
            print(f"  {spec}, most frequent mistakes: {', '.join(pairs)}")
    for picture in row["pictures"]:
        best = zip(picture["classes"], picture["probabilities"])
        told = [f"{name} {100 * probability:.1f} %" for name, probability in best]
        print(f"  {picture['file']}: {', '.join(told) or 'cannot be read'}")


def print_accuracies(rows):
    """Print a line per checkpoint. top-5 is left out where it would be 100 %."""
    titles = ["checkpoint", "params M", "active M", "GFLOPs", "routed %"]
    scores = []  # (spec, "top1" or "top5"), in the order of the columns
    for spec in (spec for spec, result in rows[0]["data"].items() if "top1" in result):
        many = max(row["data"][spec]["classes"] for row in rows) > 5
        for score, title in [("top1", "top-1 %"), ("top5", "top-5 %")][:1 + many]:
            scores.append((spec, score))
            titles.append(f"{os.path.basename(os.path.normpath(spec))} {title}")
    table = [titles]
    for row in rows:
        flops, share = row["multiply_adds"], 100 * row["routed"] / row["multiply_adds"]
        cells = [row["checkpoint"], row["params"] / 1e6, row["active"] / 1e6, f"{flops / 1e9:.3g}"]
        accuracies = [row["data"][spec][score] for spec, score in scores]
        table.append([*cells, f"{share:.0f}", *accuracies])
    print()
    print_table(table)


def print_table(rows):
    """Print rows of cells in columns. Floats get two decimals."""
    texts = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row]
             for row in rows]
    first, *widths = [max(map(len, column)) for column in zip(*texts)]
    for name, *cells in texts:
        print(name.ljust(first), *map(str.rjust, cells, widths), sep="  ")


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    """Return the flags as a namespace."""
    usage = "%(prog)s CHECKPOINT ... --data SPEC ... (--help shows all flags)"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.splitlines()[0])
    flag, positive = parser.add_argument, number("[1, inf)", int)
    flag("checkpoint", nargs="+", help="files such as runs/convnext_nano-shapes-1/best.pt")
    flag("--data", required=True, action="append", help="see the top of eval.py; repeatable")
    flag("--split", choices=("train", "val", "all"), help="of a folder without val/ (default: all "
         "of it, but what training held out if the checkpoint was trained on it)")
    flag("--ignore-unmatched", action="store_true", help="leave out unknown classes")
    flag("--real", metavar="FILE", help="score ImageNet by the ReaL labels in this JSON file")
    flag("--raw", action="store_true", help="plain weights, not the averaged ones (EMA)")
    flag("--k", type=positive, help="experts per token, other than in training")
    flag("--capacity-factor", type=number("(0, inf)"), help="slots over the even share")
    flag("--drop-expert", type=pair, action="append", default=[], metavar="LAYER:EXPERT",
         help="never choose this expert; both count from 0; repeatable")
    flag("--batch-size", type=positive, default=128, help="in each process (default: 128)")
    flag("--workers", type=number("[0, inf)", int), help="processes that load images")
    flag("--json", metavar="FILE", help="also write the results there, with all mistakes")
    return parser.parse_args(argv)


def pair(text):
    """Turn "0:3" into (0, 3)."""
    layer, expert = map(int, text.split(":"))
    return layer, expert


def main(args):
    """Check everything, evaluate each checkpoint on each data set, write and print the results.

    The status is 1 if a picture could not be read.
    """
    rank, world, device = setup_processes()
    with together():
        if args.real and (len(args.data) > 1 or args.ignore_unmatched):
            raise ValueError("--real scores one --data, ImageNet's validation images, all classes")
        place = args.json if os.path.exists(args.json or "") else os.path.dirname(args.json or "")
        if os.path.isdir(args.json or "") or not os.access(place or ".", os.W_OK):
            raise ValueError(f"--json {args.json} cannot be written")
        prepared = [prepare(path, args) for path in args.checkpoint]
    for model, row, matched in prepared:
        measure(model, row, matched, args, device, world)
    rows = [row for _, row, _ in prepared]
    try:
        if args.json and rank == 0:
            run = dict(torch=torch.__version__, device=str(device), dtype=str(best_dtype(device)),
                       processes=world, batch_size=args.batch_size, results=rows)
            Path(args.json).write_text(json.dumps(run, indent=1))
    finally:  # a full disk loses no result
        for _, row, matched in prepared:
            print_row(row, matched)
        if rows[0]["data"]:
            print_accuracies(rows)
    if world > 1:
        dist.destroy_process_group()
    if not all(picture["classes"] for picture in rows[0]["pictures"]):
        sys.exit(1)  # a picture could not be read


if __name__ == "__main__":
    run_program(lambda: main(parse_args()))
