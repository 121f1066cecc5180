"""Put numbers on checkpoints: open data sets, load models, match classes, count what is right.

    python eval.py runs/convnext_nano-shapes-1/best.pt --data shapes --data shapes-noise
    python eval.py a/best.pt b/best.pt --data /imagenet --data /imagenet-a --json result.json
    torchrun --nproc-per-node=8 eval.py best.pt --data /imagenet-c
    python eval.py best.pt --data photo.jpg

The way of an image: find_images() finds its file and its class, and match_dataset() the same class
in the checkpoint. eval_loader() asks for it in a batch: read_image() makes the file a tensor
(3, H, W) uint8, and eval_transform() cuts out (3, S, S). evaluate() normalizes the batch, runs the
model and counts right answers, and print_results() prints them in percent, one row per checkpoint
as in Videau et al., TMLR 2025.

The first half is what all programs share: processes, checkpoints, data sets, counting, and the
drawn data, `shapes`, `glyphs` and `flags`. The second half evaluates checkpoints: class matching,
ImageNet-C, own pictures and mistakes, changed routing, cost, results, command line.

A data set spec is
- `shapes`, `glyphs` or `flags`, drawn below (`flags:64000` for 64,000 training images instead of
  16,000, `glyphs:16000:100` for 100 classes instead of 300), or the same pictures as training never
  shows them: `shapes-noise`, `-blur`, `-rotated`, `-inverted`;
- `cifar10` or `cifar100`, downloaded by torchvision to data/;
- a folder with train/ and val/ (valid/, validation/, test/) in it, or directly with class folders:
  also ImageNet-V2, -A, -R, -Sketch;
- a folder of ImageNet-C's shape, <corruption>/<severity 1 to 5>/<class>;
- own pictures without classes, but not for training: an image file, or a folder of them. Nothing
  is counted. The five best classes of each are printed.
"""

import argparse
import copy
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import signal
import socket
import statistics
import sys
import threading
import time
import unicodedata
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm

import convnext
import vit
from moe import MoE, Router, count_parameters

# ================================================================================================
# FIRST HALF: what all programs share
# train.py and inspect_experts.py import from here: processes and messages, models and checkpoints,
# data sets, counting, and last the drawn data.

# ---------------------------------------------------------------- processes and messages


def setup_processes():
    """Return (rank, world size, device), as torchrun says or for a single process.

    Ranks above 0 print to nowhere from now on; what goes to stderr is seen.
    """
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            warn("several SLURM tasks, but no torchrun: each task computes the same, for itself. "
                 "Start one task per node, srun torchrun ... (see README)")
        return 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    hour = timedelta(hours=1)  # others wait while one saves or downloads
    dist.init_process_group(backend, timeout=hour, device_id=gpu)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size(), device


def best_dtype(device):
    """Return bfloat16 for a GPU that computes in it, else float32.

    A CPU and older GPUs would only emulate bfloat16, or gain little.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    return torch.bfloat16 if native else torch.float32


def autocast(device, dtype):
    """Return the autocast context of a run: on for bfloat16, off for float32."""
    enabled = dtype == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


class SharedError(ValueError):
    """An error that together() has brought to all processes."""


@contextmanager
def together():
    """Let a ValueError or OSError inside this block end all processes, whichever met it.

    Every process must come here. Rank 0 raises the first error as a ValueError, the others exit
    with status 2.
    """
    error = None
    try:
        yield
    except SharedError:
        raise
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
            raise SharedError(f"process {rank}: {error}" if rank else error)


def download(function, by_hand):
    """Return function(), called by the first process of each node before the others.

    Raise ValueError if it fails, in whatever way. by_hand: what a user can do then, in words.
    """
    for first in (True, False):
        with together():
            if first == (os.environ.get("LOCAL_RANK", "0") == "0"):
                try:
                    result = function()
                except Exception as error:  # any bytes may be in the file
                    told = f"not downloaded or not readable ({first_line(error)})"
                    raise ValueError(f"{told}: {by_hand}") from None
    return result


def run_program(main):
    """Call main(). What a user can mend is an error of one line, with status 2."""
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        main()
    except (ValueError, OSError) as error:
        fail(last_line(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            fail(f"out of memory ({first_line(error)}): give --accumulate 2 or more (train.py), a "
                 f"smaller --batch-size, --image-size or --model")
        if not any(word in str(error) for word in ("DataLoader worker", "Connection closed")):
            raise
        fail(last_line(error))  # of a loader's process, or another rank has ended


def last_line(error):
    """Return what an error says; of one in a loader's process the last line of its traceback."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1]
    return text.removeprefix("ValueError: ")


def fail(text):
    """Print an error in one line, and exit with status 2."""
    print(f"error: {one_line(text)}", file=sys.stderr)
    sys.exit(2)


@cache
def warn(text):
    """Print a warning, once, however many data sets and processes have it to say."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {one_line(text)}", file=sys.stderr)


def one_line(text):
    """Escape what no terminal can show, such as a line break in a file's name."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error):
    """Return the first line of what an error says, or its name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Output:
    """A stream to print to, line by line.

    If nobody reads it any more (`| head`), or its disk is full, the program goes on in silence.
    """

    def __init__(self, stream):
        # backslashes: for names that the stream cannot encode
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
        self.stream = stream

    def write(self, text):
        try:
            self.stream.write(text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def number(interval, kind=float):
    """Return an argparse type that accepts the finite numbers of an interval such as "[0, 1)".

    A square bracket includes the end, a round one excludes it. kind: float or int.
    """
    low, high = map(float, interval[1:-1].split(","))
    included = {low: interval[0] == "[", high: interval[-1] == "]"}

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # in no interval
        if low < value < high or included.get(value):
            return value
        told = f"expected {kind.__name__} in {interval}, got {text}"
        raise argparse.ArgumentTypeError(told)

    return parse


# Ctrl-C and SIGTERM often reach every process of a run: a terminal, timeout, srun and systemd see
# to that. The main process decides what to do, and may still need images for it. So the processes
# of its loaders must not end by themselves.
SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


def watch_signals(run):
    """Let the first Ctrl-C, SIGTERM or SIGHUP set run.signal: the loop finishes its step and saves.

    A second one ends this process at once, also while a file hangs. Within two seconds it counts as
    the first: torchrun repeats what a terminal or a scheduler has sent to all processes.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())  # Python writes the number of each signal there

    def watch(writer):  # in a thread, for the main one may hang
        while number := reader.recv(1)[0]:
            if number in SIGNALS and not run.signal:
                first, run.signal = time.monotonic(), number
            elif number in SIGNALS and time.monotonic() - first > 2:
                os._exit(128 + number)

    threading.Thread(target=watch, args=[writer], daemon=True).start()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, lambda number, frame: None)


def leave_signals(worker):
    """Leave SIGINT and SIGTERM to the main process. A loader's new process calls this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=obey_parent, daemon=True).start()
    elif hasattr(os, "setpgid"):  # macOS: out of reach of signals to the whole group
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # forgets one that has come
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def obey_parent():
    """End this process at a SIGTERM of the main process, not at those of others, or after it."""
    main = multiprocessing.parent_process().pid
    with suppress(ProcessLookupError):
        while True:
            os.kill(main, 0)  # raises if it has ended
            received = signal.sigtimedwait({signal.SIGTERM}, 2)
            if received and received.si_pid == main:
                break
    os._exit(0)


def start_loader(loader):
    """Return iter(loader), whose new processes get no signal before leave_signals()."""
    if loader.num_workers == 0 or not hasattr(signal, "pthread_sigmask"):
        return iter(loader)
    resource_tracker.ensure_running()  # later it would unblock the signals (Python < 3.12)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # new processes inherit it
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---------------------------------------------------------------- models and checkpoints

VITS = "vit_nano vit_pico vit_micro vit_ti vit_s vit_b vit_b32 vit_l vmoe_s32"
CONVNEXTS = (
    "convnext_nano convnext_t convnext_s convnext_b convnext_iso_s convnext_iso_b")
MODELS = {name: getattr(vit, name) for name in VITS.split()}
MODELS |= {name: getattr(convnext, name) for name in CONVNEXTS.split()}

CHECKPOINT_KEYS = set(
    "config classes image_size crop_ratio mean std model ema optimizer epoch step best "
    "args".split())
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in 0..1, per colour
STD = (0.229, 0.224, 0.225)


def build_model(config):
    """Build the model of a config: a dict with `model`, a preset's name, and its options.

    Raise ValueError if there is no such model or an option is out of range.
    """
    options = dict(config)
    name = options.pop("model")
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(MODELS)}")
    return MODELS[name](**options)


def load_checkpoint(path, device="cpu", raw=False):
    """Return the model of a checkpoint, in evaluation mode on the device, and the file's dict.

    The model has the averaged weights (EMA) if the run kept them, unless raw. Raise ValueError for
    whatever is not a checkpoint of train.py.
    """
    checkpoint = read_checkpoint(path)
    weights = checkpoint["ema"]
    if raw or not weights:
        weights = checkpoint["model"]
    try:
        model = build_model(checkpoint["config"])
        model.load_state_dict(weights)
    except (TypeError, KeyError) as error:
        raise ValueError(f"the config in {path} does not describe a model: {error}") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights in {path} do not fit its own config: {reason}") from None
    names, outputs = len(checkpoint["classes"]), checkpoint["config"].get("num_classes")
    if names != outputs:
        raise ValueError(f"{path} names {names} classes, but its model has {outputs} outputs")
    return model.to(device).eval(), checkpoint


def read_checkpoint(path, mmap=True):
    """Read the dict of a checkpoint. Raise ValueError if the file is not one.

    weights_only=True refuses a file that wants to run code when opened. With mmap=True what nobody
    looks at, such as the optimizer's moments, takes no memory.
    """
    if not os.path.isfile(path):
        raise ValueError(f"no checkpoint at {path}: expected one like runs/<run>/best.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
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
        told = "whose experts were stacked weights: train it again"
        raise ValueError(f"{path} is from an older version, {told}")
    return checkpoint


# ---------------------------------------------------------------- data sets
# Each has .classes (names in label order), .labels (N,), .path(index), .fingerprint() and items
# (image (3, S, S) uint8 as the transform makes it, label, unreadable). unreadable is -1, or the
# index of a file that could not be read and was replaced by the next one. The caller decides what
# to do then: train.py reports it and goes on, evaluate() stops.


def open_dataset(spec, split, transform=None):
    """Open split "train", "val" or "all" of a data set spec, one of those at the top of this file.

    If a folder has no val/, "val" is a fifth of each class, "train" the rest and "all" both. For
    every other data set "all" is "val". transform: uint8 (3, H, W) -> uint8 (3, S, S).
    Raise ValueError if there is no such data set.
    """
    name, _, shifted = spec.split(":")[0].partition("-")
    if name in DRAWN and shifted in ("", *SHIFTS):
        count, seed, classes = drawn_size(spec, split)
        if name == "glyphs":
            data = Glyphs(count, seed, transform, classes)
        else:
            data = DRAWN[name](count, seed, transform)
        return shift(data, shifted) if shifted else data
    if spec in ("cifar10", "cifar100"):
        return open_cifar(spec, split, transform)
    return FolderImages(spec, split, transform)


class TensorImages:
    """Images in memory: images (N, 3, H, W) uint8, labels (N,) int64, names of the classes.

    An index may also be a list of B: then the item is a batch of them, which is much faster.
    """

    def __init__(self, images, labels, classes, transform=None):
        self.images = images
        self.labels = labels
        self.classes = list(classes)
        self.transform = transform

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        """Return a name for messages: there is no file."""
        return f"image {index}"

    def fingerprint(self):
        """Describe the images by their labels, for they have no names; see fingerprint()."""
        return fingerprint(self, self.labels.numpy().tobytes())

    def __getitem__(self, index):
        image = self.images[index]
        unreadable = torch.full(image.shape[:-3], -1)  # () or (B,)
        if self.transform:
            image = self.transform(image)
        return image, self.labels[index], unreadable


def fingerprint(dataset, names):
    """Describe a data set, for comparing it: dict(classes, images per class, digest).

    digest: a hash of `names`, bytes that tell the images apart. Their contents do not count.
    """
    counts = dataset.labels.bincount(minlength=len(dataset.classes)).tolist()
    digest = hashlib.sha256(names).hexdigest()
    return dict(classes=dataset.classes, images=counts, digest=digest)


def open_cifar(spec, split, transform):
    """Open cifar10 or cifar100, downloaded to data/ at first use. See open_dataset()."""
    kind = getattr(torchvision.datasets, spec.upper())
    read = partial(kind, "data", train=split == "train", download=True)
    cifar = download(read, f"place {kind.filename} in data/ by hand")
    # (N, 32, 32, 3) -> (N, 3, 32, 32)
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return TensorImages(images, torch.tensor(cifar.targets), cifar.classes, transform)


# ---------------------------------------------------------------- folders of images

EXTENSIONS = tuple(
    ".jpg .jpeg .jpe .jfif .png .bmp .webp .gif .tif .tiff .ppm .pgm .avif".split())
TRAIN = ("train", "training")  # the first that exists, in small letters or capitals
VAL = ("val", "valid", "validation", "test")
NO_DATA = "__macosx @eadir $recycle.bin lost+found thumbs.db desktop.ini".split()
RESULTS = {"last.pt", "report.html"}  # in folders that our programs have written
TREE = ("FOLDER/train/<class>/<image>.jpg and FOLDER/val/<class>/<image>.jpg or "
        "FOLDER/<class>/<image>.jpg")


class FolderImages:
    """Images in class folders, of any size, depth of subfolders and colour mode (all become RGB).

    The next image takes the place of an unreadable one. flat: whether root has no val/, so that a
    fifth is held out. files: the paths from self.root, in one array. Not a list of str: Python
    writes a reference count into each str it touches, so every loader process would end up with a
    copy of all.
    """

    def __init__(self, root, split, transform=None):
        self.root, self.flat = split_folder(root, split)
        self.transform = transform
        files = find_images(self.root)
        if split == "train" and len(files) == 1:
            told = f"only one class folder, {', '.join(files)}, in {self.root}"
            raise ValueError(f"{told}: give the folder that holds all: {TREE}")
        if self.flat and split != "all":
            files = hold_out(files, split, root)
        self.classes = list(files)
        names = itertools.chain.from_iterable(files.values())
        self.files = np.array([os.fsencode(name) for name in names])
        counts = torch.tensor([len(names) for names in files.values()])
        self.labels = torch.arange(len(files)).repeat_interleave(counts)

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        """Return the file of the item at an index, a str."""
        return os.path.join(self.root, os.fsdecode(self.files[index]))

    def fingerprint(self):
        """Describe the images by their names; see fingerprint()."""
        names = composed(os.fsdecode(b"\0".join(self.files)))
        return fingerprint(self, os.fsencode(names))

    def __getitem__(self, index):
        for i in range(index, index + 100):  # the file itself or the next that can be read
            i %= len(self)
            image = read_image(self.path(i))
            if image is not None:
                break
        else:
            raise ValueError(f"100 images in a row cannot be read, from {self.path(index)} on")
        image = prepare_image(image, self.transform, self.path(i))
        return image, self.labels[i], -1 if i == index else index


class Pictures:
    """Image files whose classes nobody knows: classes is empty, and every label is -1.

    A black picture stands for an unreadable one, with the index of the file as `unreadable`.
    """

    def __init__(self, files, transform=None):
        self.files = files
        self.transform = transform
        self.classes = []

    def __len__(self):
        return len(self.files)

    def path(self, index):
        """Return the file of the item at an index, a str."""
        return self.files[index]

    def __getitem__(self, index):
        image = read_image(self.path(index))
        unreadable = index if image is None else -1
        if image is None:
            image = torch.zeros(3, 1, 1, dtype=torch.uint8)
        return prepare_image(image, self.transform, self.path(index)), -1, unreadable


def open_pictures(spec, transform=None):
    """Open an image file, or a folder in which images lie directly and none in class folders.

    Return a Pictures, sorted by name, or None for every other spec: open_dataset() may know it.
    """
    if os.path.isfile(spec):
        return Pictures([spec], transform)
    if not os.path.isdir(spec):
        return None
    files = [os.path.join(spec, name) for name in list_folder(spec)[1] if is_image(name)]
    if not files or any(map(is_image, list_files(spec))):
        return None
    return Pictures(files, transform)


def prepare_image(image, transform, path):
    """Return transform(image), or the image (3, H, W) itself if there is no transform.

    path: of its file, for the error. Raise ValueError if the transform fails.
    """
    try:
        return transform(image) if transform else image
    except (RuntimeError, MemoryError) as error:  # 1 x 20,000 pixels take gigabytes
        told = f"cannot prepare {path}, {tuple(image.shape[1:])} pixels"
        raise ValueError(f"{told}: {first_line(error)}") from error


def split_folder(root, split):
    """Find the folder with the class folders of a split: (its path, whether to hold out a fifth).

    That is root/train or root/val, under any name in TRAIN or VAL, or root if there is neither.
    """
    if os.path.isfile(root):
        raise ValueError(f"{root} is a file: to train, give a folder: {TREE}")
    if not os.path.isdir(root):
        specs = f"`shapes`, `glyphs`, `flags`, one of these with -{', -'.join(SHIFTS)}, `cifar10`, "
        specs += "`cifar100`, a picture to classify"
        raise ValueError(f"no data at {root!r}: expected {specs} or a folder: {TREE}")
    paths = {name.lower(): os.path.join(root, name) for name in list_folder(root)[0]}
    train = [paths[name] for name in TRAIN if name in paths]
    val = [paths[name] for name in VAL if name in paths]
    if train and val:
        return (train if split == "train" else val)[0], False
    if val and split != "train" and holds_folders(val[0]):
        return val[0], False
    if train and holds_folders(train[0]):
        warn(f"no {root}/val: a fifth of {train[0]} is held out, all else is not read")
        return train[0], True
    if paths and paths.keys() <= set("12345") and all(map(holds_folders, paths.values())):
        raise ValueError(f"{root} looks like one corruption of ImageNet-C: its folders "
                         f"{', '.join(paths)} hold class folders; give one of them, or all")
    return root, True


def holds_folders(path):
    """Tell whether a folder holds folders and no image, unlike one of a class."""
    folders, files = list_folder(path)
    return bool(folders) and not any(map(is_image, files))


def is_image(name):
    """Tell by its name whether a file is an image."""
    return name.lower().endswith(EXTENSIONS)


def list_folder(path):
    """Return the names of the folders and of the files in a folder, without NO_DATA, sorted."""
    def refuse(error):
        raise ValueError(f"cannot open the folder {error.filename}: {error.strerror}")

    def is_data(name):
        return name[0] != "." and name.lower() not in NO_DATA

    _, folders, files = next(os.walk(path, onerror=refuse))
    return sorted(filter(is_data, folders)), sorted(filter(is_data, files))


def list_files(root):
    """List the files in and below the folders of root, each as its path from there: "cat/1.jpg".

    No folder is read twice: a link to one above must not lead round in a circle.
    """
    found = []
    places = [Path(root)]  # more are added on the way
    met = {Path(root).resolve(), *Path(root).resolve().parents}
    for place in places:
        folders, files = list_folder(place)
        if RESULTS & set(files):
            continue
        if place != Path(root):  # what lies beside the class folders is no data
            inside = place.relative_to(root).as_posix()
            found += [f"{inside}/{name}" for name in files]
        for folder in map(place.joinpath, folders):
            real = folder.resolve()
            if real in met:
                warn(f"{folder} leads to a folder above it or read already: left out")
            else:
                places.append(folder)
            met.add(real)
    return found


def find_images(root):
    """Find the images of each class: {class: paths from root}, both sorted.

    A class is a folder with an image in it or below it. One warning says what is odd. Raise
    ValueError if there is no class.
    """
    found = {composed(name): [] for name in list_folder(root)[0]}
    types, deep = [], []
    for file in sorted(list_files(root), key=composed):
        top, *below = file.split("/")
        if not is_image(file):
            types.append(os.path.splitext(file)[1].lower() or below[-1])
            continue
        found[composed(top)].append(file)
        if len(below) > 1:
            deep.append(file)
    classes = {name: files for name, files in sorted(found.items()) if files}
    odd = {
        "class folders without images are left out": found.keys() - classes.keys(),
        "files of other types are left out": types,
        "images lie deeper than in a class folder and belong to the upper one": deep,
    }
    notes = [root]
    for what, names in odd.items():
        if names:
            notes.append(f"{len(names)} {what} ({', '.join(sorted(set(names))[:3])})")
    notes = "; ".join(notes)
    if not classes:
        what = "images in the class folders of" if found else "class folders in"
        raise ValueError(f"no {what} {notes}: expected {TREE}")
    if notes != root:
        warn(notes)
    return classes


def composed(name):
    """Return a name in Unicode's composed form (NFC): macOS may store é as e and an accent."""
    return unicodedata.normalize("NFC", name)


def hold_out(classes, split, root):
    """Keep what is for split "train" or "val" of each class: {name: files} -> {name: files}.

    Each class is sorted by a hash of the file names, and its first fifth is for validation: adding
    or removing an image moves at most one other. Warn of classes of root that are too small. Raise
    ValueError if all are.
    """
    def hash_of(file):
        below = composed(file.partition("/")[2])  # within the class folder
        return hashlib.sha256(os.fsencode(below)).digest()

    few = [name for name, files in classes.items() if len(files) < 5]
    told = f"{len(few)} of {len(classes)} classes of {root} have fewer than 5 images"
    if len(few) == len(classes):
        raise ValueError(f"{told}: too few to hold out a fifth for validation")
    if few:
        warn(f"{told}, and so no validation image: {', '.join(few[:5])}")
    kept = {}
    for name, files in classes.items():
        files = sorted(files, key=hash_of)
        fifth = len(files) // 5
        kept[name] = sorted(files[:fifth] if split == "val" else files[fifth:])
    return kept


warnings.filterwarnings("ignore", module="PIL")  # an odd file is read or reported
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def read_image(path):
    """Read an image file: (3, H, W) uint8 RGB, or None. Of an animation the first picture.

    It is turned as its EXIF data say, which published ImageNet protocols do not do. An image of
    more than 179 million pixels (Pillow's limit) counts as unreadable: a damaged header may claim
    any size, and decoding it could fill the memory.
    """
    try:
        content = bytearray(Path(path).read_bytes())
        image = Image.open(io.BytesIO(content))  # the header; too many pixels raise
        if image.format in ("JPEG", "MPO"):  # MPO: a JPEG with more than one picture
            with suppress(Exception):
                return read_jpeg(content)
        return read_other(image)
    except Exception:  # a decoder may raise anything
        return None


def read_jpeg(content):
    """Decode a JPEG file with torchvision, which is faster than Pillow, or raise.

    Other files go to Pillow: one wrong bit of a PNG can crash torchvision.
    """
    content = torch.frombuffer(content, dtype=torch.uint8)
    return torchvision.io.decode_jpeg(content, mode="RGB", apply_exif_orientation=True)


def read_other(image):
    """Decode an image that Pillow has opened, or raise.

    Grey of 12 or 16 bits and floats from 0 to 1 are scaled to 0 .. 255.
    """
    upright = ImageOps.exif_transpose(image)
    if not image.mode.startswith(("I", "F")):
        return v2.functional.pil_to_tensor(upright.convert("RGB"))
    tags = getattr(image, "tag_v2", {})  # TIFF's: 258 is the bits, 262 is 0 if 0 is white
    bits = tags.get(258, (16,))[0]  # PNG and PGM have 16 here
    white = 1 if image.mode == "F" else 2**bits - 1
    grey = v2.functional.pil_to_tensor(upright.convert("F"))  # (1, H, W)
    grey = grey * (255 / white)
    if image.mode == "I" and tags or not 0 <= grey.min() <= grey.max() <= 255:
        raise ValueError("no known range: signed, of 32 bits, or floats beyond 0 to 1")
    if tags.get(262) == 0:
        grey = 255 - grey
    return grey.round().to(torch.uint8).repeat(3, 1, 1)


# ---------------------------------------------------------------- from images to counts


def eval_transform(image_size, crop_ratio):
    """Return the transform uint8 (3, H, W) -> (3, S, S), S = image_size.

    It resizes the short side to S / crop_ratio (bicubic) and cuts out the centre: 256 and 224
    pixels for ImageNet.
    """
    short_side = round(image_size / crop_ratio)
    resize = v2.Resize(short_side, v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(image_size)])


def normalize(images, mean, std):
    """Turn images uint8 (B, 3, S, S) into float32: (pixel / 255 - mean) / std per colour."""
    mean, std = per_colour(tuple(mean), images.device), per_colour(tuple(std), images.device)
    # In one pass: a small model would wait for the memory.
    return torch.addcmul(-mean / std, images.float(), 1 / (255 * std))


@cache  # a copy from the CPU, for which a GPU would wait
def per_colour(numbers, device):
    """Return three numbers as a tensor (3, 1, 1) on a device."""
    return torch.tensor(numbers, device=device).view(3, 1, 1)


def auto_workers(dataset, world=1, given=None):
    """Return how many processes load a dataset: as given, 0 if it is in memory, else 1 to 12.

    world processes share the machine's processors.
    """
    if given is not None or isinstance(dataset, TensorImages):
        return given or 0
    world = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # on this machine alone
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(12, max(1, mine // world))


def eval_loader(dataset, batch_size, workers, device, indices=None):
    """Return a loader of this process's share of a dataset: every world-th image.

    So each image is counted once. DistributedSampler would fill up the shares with images that
    count twice. indices: of the images that take part; None for all.
    """
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    if indices is None:
        indices = range(len(dataset))
    share = indices[rank::world]
    sampling = dict(batch_size=batch_size, sampler=share)
    if isinstance(dataset, TensorImages):  # asked for whole batches
        batches = BatchSampler(share, batch_size, drop_last=False)
        sampling = dict(batch_size=None, sampler=batches)
    gpu = device.type == "cuda"
    loading = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=gpu)
    return DataLoader(dataset, **sampling, **loading, worker_init_fn=leave_signals)


def show_progress(loader, name):
    """Iterate over the batches of a loader, with a progress bar on a terminal if it has a name."""
    hidden = None if name else True  # None: shown on a terminal only
    return tqdm(start_loader(loader), name, len(loader), leave=False, disable=hidden)


@torch.no_grad()
def evaluate(model, loader, device, mean, std, columns=None, dtype=torch.float32, progress="",
             loss="softmax", confusion=False, stop=lambda: False):
    """Count over a loader of eval_loader(): dict(images, correct1, correct5, top1, top5, loss).

    top1 and top5 are in percent; with fewer than 5 classes top5 is 100. loss is the mean of
    image_losses(), of the kind `loss`. Labels are (B,), or (B, L) padded with -1 where several
    answers are right.
    columns: the columns of the logits among which the prediction is made; labels are indices into
    them. None: all. dtype: bfloat16 for autocast. progress: the name of the progress bar; none if
    empty. stop: a function, asked before each batch whether to end and return None.
    confusion: also return the counts (true class, predicted class), int64, under this name. This
    is for at most some thousand classes: the table for 21,000 would take 3.5 GB.
    Under torchrun each process counts its share, and all return the sums. The model is left in the
    mode it came in. Raise ValueError, see together(), if an image cannot be read: an accuracy
    without it would not be comparable.
    """
    was_training = model.training
    model.eval()
    if columns is not None:
        columns = torch.tensor(columns, device=device)
    table = None
    if confusion:
        C = len(loader.dataset.classes if columns is None else columns)
        table = torch.zeros(C, C, dtype=torch.int64, device=device)
    totals = Counter()
    broken = -1
    for images, labels, unreadable in show_progress(loader, progress):
        broken = int(unreadable.max())
        if broken >= 0 or stop():
            break
        images = images.to(device, non_blocking=True)  # (B, 3, S, S)
        labels = labels.to(device, non_blocking=True)
        with autocast(device, dtype):
            logits = model(normalize(images, mean, std)).float()  # (B, classes)
        if columns is not None:
            logits = logits[:, columns]
        answers = labels.view(len(labels), -1)  # (B,) or (B, L) -> (B, L)
        totals.update(count_batch(logits, answers, loss, table))  # adds
    model.train(was_training)
    with together():
        if broken >= 0:
            path = loader.dataset.path(broken)
            raise ValueError(f"cannot read {path}: repair or replace the file")
    sums = [float(totals[name]) for name in ("images", "correct1", "correct5", "loss")]
    sums = torch.tensor(sums, dtype=torch.float64, device=device)
    stopped = torch.tensor(int(bool(stop())), device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(stopped, dist.ReduceOp.MAX)
        if confusion:
            dist.all_reduce(table)
    if stopped:
        return None
    n, correct1, correct5, total = sums.tolist()
    counts = dict(images=int(n), correct1=int(correct1), correct5=int(correct5))
    counts |= dict(top1=100 * correct1 / n, top5=100 * correct5 / n, loss=total / n)
    return counts | dict(confusion=table.cpu()) if confusion else counts


def count_batch(logits, answers, loss, confusion=None):
    """Count one batch: dict(images, correct1, correct5, loss), sums that evaluate() adds up.

    Parameters: as in image_losses(). correct1: the best guess is one of the answers. correct5: one
    of the best five is. confusion: a table (true class, predicted class) int64, or None. Each image
    with its first answer and its best guess is added to it.
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
    # (B, 5, 1) and (B, 1, L) -> (B, 5): is this guess one of the answers?
    hits = (best.unsqueeze(2) == answers.unsqueeze(1)).any(2)
    correct1, correct5 = hits[:, 0].sum(), hits.any(1).sum()
    total = image_losses(logits, answers, loss).double().sum()
    if confusion is not None:  # in place: a batch changes few of a million places
        one = torch.ones_like(best[:, 0])
        confusion.index_put_((answers[:, 0], best[:, 0]), one, accumulate=True)
    return dict(images=len(logits), correct1=correct1, correct5=correct5, loss=total)


def image_losses(logits, answers, loss):
    """Return the loss of each image, (B,), for logits (B, classes) and answers (B, L).

    answers are the right classes, int64, padded with -1. loss is the kind with which the model was
    trained, here without label smoothing:
    - "softmax": -log(probability of the right answers), the cross-entropy if there is only one.
    - "sigmoid": each class is a yes or no of its own, summed over the classes (V-MoE).
    """
    if loss == "sigmoid":
        right = F.one_hot(answers + 1, logits.shape[1] + 1).amax(1)  # (B, 1 + classes)
        right = right[:, 1:].to(logits.dtype)  # without the column of the padding
        losses = F.binary_cross_entropy_with_logits(logits, right, reduction="none")
        return losses.sum(1)
    log_probs = logits.log_softmax(1).gather(1, answers.clamp(min=0))  # (B, L)
    return -log_probs.masked_fill(answers < 0, -math.inf).logsumexp(1)


def class_probabilities(logits, loss):
    """Return the probability of each class, as trained with a loss: (B, classes) -> (B, classes).

    They sum to 1 for "softmax". For "sigmoid" each class is a yes or no of its own.
    """
    return logits.sigmoid() if loss == "sigmoid" else logits.softmax(1)


def accuracy_per_class(confusion):
    """Return the accuracy of each class in percent, (C,) float64: NaN for one without images.

    confusion: counts (C true classes, C predicted classes) of evaluate(). The images of a class
    are the sum of its row.
    """
    return 100 * confusion.diagonal().double() / confusion.sum(1)


def worst_pairs(confusion, n=None):
    """List the n most frequent mistakes, [[true class, predicted class, images], ...], or all.

    confusion: counts (C, C), see accuracy_per_class(). The most frequent come first, and equally
    frequent ones in the order of the classes.
    """
    true, predicted = confusion.nonzero().T
    wrong = true != predicted
    true, predicted = true[wrong], predicted[wrong]
    images = confusion[true, predicted]
    order = images.argsort(descending=True, stable=True)[:n]
    return torch.stack([true, predicted, images], dim=1)[order].tolist()


# ---------------------------------------------------------------- the drawn data
# Unlike photographs these pictures come with their factors and their object's mask, so that one can
# measure what the experts follow. Only whole numbers are used, so that every machine draws the same
# pictures.

SHIFTS = ("noise", "blur", "rotated", "inverted")
DRAWN_SPECS = ("`shapes[:COUNT]`, `flags[:COUNT]` or `glyphs[:COUNT[:CLASSES]]` with 1 to 100000 "
               "images and 2 to 10000 classes")


def drawn_size(spec, split):
    """Return (count, seed, classes) of a split: 16,000 pictures to train on, 2,000 to validate.

    `NAME:COUNT` is another number to train on, `glyphs:COUNT:CLASSES` another number of classes
    than 300. Raise ValueError if they are out of range.
    """
    name, *numbers = spec.split(":")
    told = f"{spec!r} is no data set: expected {DRAWN_SPECS}"
    most = 2 if name.startswith("glyphs") else 1
    if len(numbers) > most or not all(map(str.isdecimal, numbers)):
        raise ValueError(told)
    defaults = ["16000", "300"]
    count, classes = map(int, numbers + defaults[len(numbers):])
    if not (1 <= count <= 100_000 and 2 <= classes <= 10_000):
        raise ValueError(told)
    return (count, 1, classes) if split == "train" else (2000, 2, classes)


def draw_parts(draw, count, seed):
    """Call draw(generator), which draws 500 pictures, until there are `count`: a dict of tensors.

    A longer set of the same seed begins with the same pictures.
    """
    parts = []
    for i in range(math.ceil(count / 500)):
        parts.append(draw(torch.Generator().manual_seed(seed * 1000 + i)))
    drawn = {}
    for name in parts[0]:
        drawn[name] = torch.cat([part[name] for part in parts])[:count]
    return drawn


def shift(data, name):
    """Change drawn pictures, in place, to what training never shows.

    name: one of SHIFTS. Labels, masks and factors stay right.
    """
    images = data.images.int()
    if name == "noise":  # up to 80 brighter or darker; training has seen 16 at most
        generator = torch.Generator().manual_seed(3)
        images += torch.randint(-80, 81, images.shape, generator=generator, dtype=torch.int32)
    if name == "blur":  # the mean of 3 x 3; no ninth of a whole number is near .5
        padded = F.pad(images.float(), (1, 1, 1, 1), "replicate")
        images = F.avg_pool2d(padded, 3, 1).round()
    if name == "rotated":  # a quarter turn to the left; training has seen 34 degrees at most
        images, data.masks = images.rot90(1, (2, 3)), data.masks.rot90(1, (1, 2))
        row, column = data.factors["row"], data.factors["column"]
        data.factors |= dict(row=31 - column, column=row)
    if name == "inverted":  # negatives: a dark object on a bright background
        images = 255 - images
    data.images = images.clamp(0, 255).to(torch.uint8)
    return data


# ---- shapes: a textured shape on a background; the class is shape and texture. Position, size,
# rotation and colours are nuisance. Lengths are in 1/256 pixel.

SHAPES = ("circle", "square", "triangle", "cross")
TEXTURES = ("plain", "stripes", "checks", "dots")
OKABE_ITO = "E69F00 56B4E9 009E73 F0E442 0072B2 D55E00 CC79A7 EBEBEB"  # white for black
PALETTE = [tuple(bytes.fromhex(colour)) for colour in OKABE_ITO.split()]
COSINES = (213, 237, 251, 256, 251, 237, 213)  # x 256, of -33.75 .. 33.75 degrees
SINES = (-142, -98, -50, 0, 50, 98, 142)


class Shapes(TensorImages):
    """`count` pictures (N, 3, 32, 32) of shapes, drawn from a seed.

    factors: dict of int64 tensors (N,): shape, texture, colour and background (indices into the
    tuples above), row and column of the object's centre in pixels. masks (N, 32, 32): True where
    the object is.
    """

    object_share = 1 / 2  # of a patch that shows the object

    def __init__(self, count, seed, transform=None):
        drawn = draw_parts(draw_shapes, count, seed)
        images, self.masks = drawn.pop("images"), drawn.pop("masks")
        self.factors = drawn
        labels = 4 * drawn["shape"] + drawn["texture"]
        classes = [f"{shape}-{texture}" for shape in SHAPES for texture in TEXTURES]
        super().__init__(images, labels, classes, transform)


def draw_shapes(generator, n=500):
    """Draw n pictures with a torch.Generator: a dict of tensors whose first axis is n.

    images (n, 3, 32, 32) uint8, masks (n, 32, 32) bool, and int64 factors (n,), see Shapes.
    """
    def draw(low, high, *size):
        size = (n, *size)
        return torch.randint(low, high, size, generator=generator, dtype=torch.int32)

    def table(numbers):
        return torch.tensor(numbers, dtype=torch.int32)

    shape, texture = draw(0, 4), draw(0, 4)
    row, column = draw(12, 20, 1, 1), draw(12, 20, 1, 1)
    radius, turn = draw(2560, 3328, 1, 1), draw(0, 7, 1, 1)
    order = torch.rand(n, 8, generator=generator).argsort(dim=1, stable=True)
    colours = order[:, :3]  # (n, 3): object, texture, background
    shade, noise = draw(-25, 26, 3, 3), draw(-12, 13, 3, 32, 32)

    # The pixel grid in the object's own frame: u to its right, v down, both (n, 32, 32).
    pixels = table(range(32))
    x, y = pixels - column, pixels.view(32, 1) - row
    cos, sin = table(COSINES)[turn], table(SINES)[turn]  # (n, 1, 1)
    u, v = cos * x + sin * y, cos * y - sin * x
    picture = torch.arange(n)
    masks = outlines(u, v, radius)[shape, picture]  # (4, n, 32, 32) -> (n, 32, 32)
    second = textures(u, v)[texture, picture]
    layer = torch.where(masks, second.long(), 2)  # object, texture, background

    paint = table(PALETTE)[colours] + shade  # (n, 3 layers, 3 colours)
    paint = paint * table([[4], [4], [1]]) // 4  # the background is dark
    images = paint[picture.view(n, 1, 1), layer]  # (n, 32, 32, 3)
    images = (images.permute(0, 3, 1, 2) + noise).clamp(0, 255)  # (n, 3, 32, 32)
    factors = dict(shape=shape, texture=texture, row=row, column=column)
    factors |= dict(colour=colours[:, 0], background=colours[:, 2])
    drawn = {name: factor.flatten().long() for name, factor in factors.items()}
    return drawn | dict(images=images.to(torch.uint8), masks=masks)


def outlines(u, v, r):
    """Say where each of the SHAPES is: u, v (n, 32, 32), radius r (n, 1, 1) -> (4, n, 32, 32)."""
    near, far = torch.stack([u, v]).abs().aminmax(dim=0)
    slope = (u.abs() * 443 >> 8) - v  # 443 / 256 is the square root of 3
    circle = u * u + v * v < r * r
    square = far * 8 < r * 7
    triangle = torch.maximum(2 * v, slope) < r * 5 // 4
    cross = (near * 3 < r) & (far < r)
    return torch.stack([circle, square, triangle, cross])


def textures(u, v):
    """Say where each of the TEXTURES has its second colour: u, v (n, 32, 32) -> (4, n, 32, 32)."""
    column, row = u // 1024, v // 1024  # stripes and checks of 4 pixels
    x, y = (u + 896) % 1792 - 896, (v + 896) % 1792 - 896  # from a dot: one every 7 pixels
    plain = torch.zeros_like(u, dtype=torch.bool)
    stripes, checks = column % 2 == 1, (column + row) % 2 == 1
    dots = x * x + y * y < 580 * 580
    return torch.stack([plain, stripes, checks, dots])


# ---- glyphs: an invented script. A class is a character of three strokes, an example is written by
# an unsteady hand: bent, turned, moved, thick or thin, light on dark. Half the width of a character
# is 256 at first; then lengths are in 1/16 pixel.

COSINES_20 = (241, 247, 252, 255, 256, 255, 252, 247, 241)  # x 256, of -20, -15, .. 20 degrees
SINES_20 = (-88, -66, -44, -22, 0, 22, 44, 66, 88)


class Glyphs(TensorImages):
    """`count` pictures (N, 3, 32, 32) of `classes` characters, drawn from a seed.

    factors: dict of int64 tensors (N,): colour (0, 1, 2: red, green or blue is the strongest), row
    and column of the centre in pixels. masks (N, 32, 32) uint8: 0 on the ground, 1, 2 or 3 on the
    ink of a stroke. The characters are the same for every seed.
    """

    object_share = 1 / 5  # of a patch that shows ink: lines are thin

    def __init__(self, count, seed, transform=None, classes=300):
        drawn = draw_parts(partial(draw_glyphs, draw_characters(classes)), count, seed)
        images, labels, self.masks = (drawn.pop(name) for name in ("images", "labels", "masks"))
        self.factors = drawn
        super().__init__(images, labels, [f"glyph-{i:04}" for i in range(classes)], transform)


def draw_characters(classes):
    """Draw the three points (x, y) of each of three strokes: (classes, 3, 3, 2) in -256 .. 256."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-256, 257, (classes, 3, 3, 2), generator=generator, dtype=torch.int32)


def draw_glyphs(characters, generator, n=500):
    """Draw n examples of characters (classes, 3, 3, 2): a dict of tensors whose first axis is n.

    images (n, 3, 32, 32) uint8, labels (n,), masks (n, 32, 32) uint8, factors (n,), see Glyphs.
    """
    def draw(low, high, *size):
        size = (n, *size)
        return torch.randint(low, high, size, generator=generator, dtype=torch.int32)

    def table(numbers):
        return torch.tensor(numbers, dtype=torch.int32)

    label, turn = draw(0, len(characters)), draw(0, 9, 1, 1)
    wobble = draw(-10, 11, 3, 3, 2, 4).sum(-1, dtype=torch.int32)  # nearly normal, deviation 12
    size, thickness = draw(160, 193, 1, 1, 1), draw(14, 27, 1, 1)
    row, column = draw(13, 20, 1, 1), draw(13, 20, 1, 1)
    light, dark = draw(160, 256, 3, 1, 1), draw(0, 96, 3, 1, 1)
    noise = draw(-16, 17, 3, 32, 32)

    # A stroke is a Bezier curve, here 17 points on it: x and y are both (n, 3, 17).
    t = table(range(17))
    start, bend, end = (characters[label] + wobble).unsqueeze(-1).unbind(2)  # (n, 3, 2, 1) each
    points = ((16 - t) ** 2 * start + 2 * t * (16 - t) * bend + t * t * end) // 256
    u, v = (points * size // 256).unbind(2)  # (n, 3, 2, 17) -> (n, 3, 17)
    cos, sin = table(COSINES_20)[turn], table(SINES_20)[turn]  # (n, 1, 1)
    x = 16 * column + (cos * u - sin * v) // 256
    y = 16 * row + (sin * u + cos * v) // 256

    nearest = distances(x, y)  # (n, 3, 32, 32)
    distance = nearest.amin(1)  # of each pixel from the ink, squared
    inner, outer = thickness.square(), (thickness + 16).square()
    ink = ((outer - distance) * 256 // (outer - inner)).clamp(0, 256)  # 256 on the line, 0 beside
    masks = (nearest.argmin(1) + 1) * (ink > 127)
    images = dark + (light - dark) * ink.unsqueeze(1) // 256 + noise
    factors = dict(colour=light.argmax(1), row=row, column=column)
    drawn = {name: factor.flatten().long() for name, factor in factors.items()}
    images, masks = images.clamp(0, 255).to(torch.uint8), masks.to(torch.uint8)
    return drawn | dict(images=images, labels=label.long(), masks=masks)


def distances(x, y):
    """Return the squared distance of each pixel from three curves: (n, 3, 32, 32) int32.

    x, y (n, 3, P): P points of each curve in 1/16 pixel. A distance counts at most 126 in each
    direction, so that 16 bits do, which are fast.
    """
    pixels = 16 * torch.arange(32, dtype=torch.int32) + 8
    dx = (x.unsqueeze(3) - pixels).clamp(-126, 126).square().short()  # (n, 3, P, 32)
    dy = (y.unsqueeze(3) - pixels).clamp(-126, 126).square().short()
    nearest = torch.full((len(x), 3, 32, 32), 32767, dtype=torch.int16)
    for p in range(x.shape[2]):
        # (n, 3, 1, 32) + (n, 3, 32, 1): a row of columns, and a column of rows
        torch.minimum(nearest, dx[:, :, p].unsqueeze(2) + dy[:, :, p].unsqueeze(3), out=nearest)
    return nearest.int()


# ---- flags: three stripes, each of one of 14 colours. A class is a country. Each of the 2,744
# flags was assigned at random to one of 56 countries, 49 to each. No rule predicts the country: the
# flags must be learnt by heart. `flags-inverted` is unfair: an inverted flag is nearly another
# flag.

FLAG_COLOURS = ("F0F0F0 202020 D02030 F07820 F0D020 30A040 105040 40C0D0 2050C0 702080 E080B0 "
                "805030 98D838 8090B0")
FLAG_PALETTE = [tuple(bytes.fromhex(colour)) for colour in FLAG_COLOURS.split()]
COUNTRIES = 56


class Flags(TensorImages):
    """`count` pictures (N, 3, 32, 32) of flags of 24 x 24 pixels, drawn from a seed.

    factors: dict of int64 tensors: colour (N, 3), of each stripe from above, an index into
    FLAG_PALETTE; row and column (N,) of the centre in pixels. masks (N, 32, 32) uint8: 0 on the
    ground, 1, 2 or 3 on a stripe. A flag belongs to the same country whatever the seed.
    """

    object_share = 1 / 2  # of a patch that shows the flag

    def __init__(self, count, seed, transform=None):
        drawn = draw_parts(draw_flags, count, seed)
        images, self.masks = drawn.pop("images"), drawn.pop("masks")
        self.factors = drawn
        labels = countries()[drawn["colour"].unbind(1)]
        super().__init__(images, labels, [f"country-{i:02}" for i in range(COUNTRIES)], transform)


def countries():
    """Draw the country of each flag, by its three colours: (14, 14, 14) int64 in 0 .. 55."""
    colours = len(FLAG_PALETTE)
    lots = torch.randperm(colours**3, generator=torch.Generator().manual_seed(0))
    return (lots % COUNTRIES).view(colours, colours, colours)


def draw_flags(generator, n=500):
    """Draw n flags with a torch.Generator: a dict of tensors whose first axis is n.

    images (n, 3, 32, 32) uint8, masks (n, 32, 32) uint8, and int64 factors, see Flags.
    """
    def draw(low, high, *size):
        size = (n, *size)
        return torch.randint(low, high, size, generator=generator, dtype=torch.int32)

    colours = draw(0, len(FLAG_PALETTE), 3)
    row, column = draw(15, 18, 1, 1), draw(15, 18, 1, 1)
    ground, shade, noise = draw(70, 120, 1, 3), draw(-12, 13, 4, 3), draw(-16, 17, 3, 32, 32)

    pixels = torch.arange(32, dtype=torch.int32)
    x, y = pixels - column + 12, pixels.view(32, 1) - row + 12  # from the flag's upper left corner
    on_flag = (x >= 0) & (x < 24) & (y >= 0) & (y < 24)
    masks = torch.where(on_flag, y // 8 + 1, 0)  # (n, 32, 32)

    palette = torch.tensor(FLAG_PALETTE, dtype=torch.int32)
    paint = torch.cat([ground, palette[colours]], dim=1) + shade  # (n, ground and stripes, 3)
    picture = torch.arange(n).view(n, 1, 1)
    images = paint[picture, masks].permute(0, 3, 1, 2) + noise  # (n, 32, 32, 3) -> (n, 3, 32, 32)
    factors = dict(colour=colours.long(), row=row.flatten().long(), column=column.flatten().long())
    return factors | dict(images=images.clamp(0, 255).to(torch.uint8), masks=masks.to(torch.uint8))


DRAWN = dict(shapes=Shapes, glyphs=Glyphs, flags=Flags)


# ================================================================================================
# SECOND HALF: evaluation of checkpoints

# ---------------------------------------------------------------- whose class is which
# One rule for every test set. Folder names are looked up among the checkpoint's classes, and the
# prediction is made among the classes that were found: all 1,000 for ImageNet-V2 and Sketch, 200
# for -A and -R. A model of 21,000 classes is scored among ImageNet's 1,000. ImageNet-V2 calls its
# folders 0 to 999. Sorted as text they come as 0, 1, 10, so such a name is read as the number of a
# class, whatever its place.


@dataclass
class Matched:
    """A data set as a checkpoint is scored on it."""

    dataset: FolderImages | TensorImages  # labels (N, L): right answers, indices into columns
    columns: list  # of the logits that take part
    names: list  # of the classes of these columns
    indices: list  # of the images that have an answer
    note: str  # what was done, in words


def match_classes(names, classes, ignore_unmatched=False):
    """Find the class folders of a data set among the checkpoint's classes: a list of positions.

    Raise ValueError for an unknown folder. With ignore_unmatched it gets -1, if others are known.
    """
    position = {name: i for i, name in enumerate(classes)}
    if are_numbers(names, classes):
        position = {name: int(name) for name in names if int(name) < len(classes)}
    found = [position.get(name, -1) for name in names]
    unknown = [name for name in names if name not in position]
    if len(unknown) == len(names) or unknown and not ignore_unmatched:
        told = f"{len(unknown)} of {len(names)} classes of the data are unknown to the checkpoint"
        some, known = ", ".join(unknown[:3]), ", ".join(classes[:3])
        hint = "; --ignore-unmatched leaves them out" if len(unknown) < len(names) else ""
        raise ValueError(f"{told} ({some}, ...): it knows {known}, ...{hint}")
    return found


def are_numbers(names, classes):
    """Tell whether folders are called by numbers of classes, and no class is itself so called."""
    return all(map(str.isdecimal, names)) and not any(map(str.isdecimal, classes))


def match_dataset(dataset, classes, ignore_unmatched=False, real=None):
    """Return a data set as a checkpoint with these classes is scored on it: a Matched.

    The images are shared. ignore_unmatched: see match_classes(). real: a file of ReaL labels, which
    replace those of the folders. Raise ValueError if no image has an answer.
    """
    found = match_classes(dataset.classes, classes, ignore_unmatched)
    columns = sorted(set(found) - {-1})
    place = {column: i for i, column in enumerate(columns)}
    dataset = copy.copy(dataset)
    if real:
        dataset.labels = read_real(real, dataset, len(columns))  # (N, L)
    else:
        places = torch.tensor([place.get(column, -1) for column in found])
        dataset.labels = places[dataset.labels].unsqueeze(1)  # (N,) -> (N, 1)
    indices = (dataset.labels >= 0).any(1).nonzero().flatten().tolist()
    if not indices:
        raise ValueError("no image of the data is in a class that the checkpoint knows")
    notes = {
        f"{len(indices)} images, {len(columns)} of {len(classes)} classes": True,
        "logits restricted": len(columns) < len(classes),
        "folder names are class numbers": are_numbers(dataset.classes, classes),
        f"{found.count(-1)} unmatched folders left out": -1 in found,
        f"ReaL labels from {real}": real,
        f"{len(dataset) - len(indices)} images skipped": len(indices) < len(dataset),
    }
    note = ", ".join(text for text, holds in notes.items() if holds)
    names = [classes[column] for column in columns]
    return Matched(dataset, columns, names, indices, note)


def read_real(path, dataset, num_classes):
    """Read ReaL labels (Beyer et al. 2020): (N, L) int64, padded with -1.

    The file at path is a JSON list of the lists of right labels, some empty. Entry i belongs to the
    image whose NAME has number i + 1, ILSVRC2012_val_00000001.JPEG, not to the i-th of the files
    sorted by class. Raise ValueError if it does not fit the images or the number of classes.
    """
    try:
        entries = json.loads(Path(path).read_text())
        real = {f"ILSVRC2012_val_{i:08}": entry for i, entry in enumerate(entries, start=1)}
        names = [os.path.basename(dataset.path(i))[:23] for i in range(len(dataset))]
        if sorted(names) != sorted(real):
            told = f"{len(real)} entries for {len(names)} images ({names[0]}, ...)"
            last = f"{len(names):08}"
            raise ValueError(f"{told}, expected one for each of ILSVRC2012_val_00000001 to {last}")
        if not set().union(*entries) <= set(range(num_classes)):
            last = num_classes - 1
            raise ValueError(f"expected labels from 0 to {last}, the matched classes in order")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--real {path} does not fit: {first_line(error)}") from None
    rows = [torch.tensor(real[name], dtype=torch.long) for name in names]
    return pad_sequence(rows, batch_first=True, padding_value=-1)


# ---------------------------------------------------------------- ImageNet-C
# (Hendrycks and Dietterich 2019)

ALEXNET = dict(  # its error per corruption, a mean over five severities: what mCE divides by
    gaussian_noise=.886428, shot_noise=.894468, impulse_noise=.922640, defocus_blur=.819880,
    glass_blur=.826268, motion_blur=.785948, zoom_blur=.798360, snow=.866816, frost=.826572,
    fog=.819324, brightness=.564592, contrast=.853204, elastic_transform=.646056,
    pixelate=.717840, jpeg_compression=.606500)
PARTS = [f"{corruption}/{severity}" for corruption in ALEXNET for severity in "12345"]


def open_parts(spec, split):
    """Open a spec: {"": data set}, or for a folder of ImageNet-C's shape {"fog/1": data set, ...}.

    Own pictures come as {"": Pictures}.
    Raise ValueError if one of its 75 folders is missing or has other classes.
    """
    missing = [part for part in PARTS if not os.path.isdir(os.path.join(spec, part))]
    if missing == PARTS:
        return {"": open_pictures(spec) or open_dataset(spec, split)}
    if missing:
        told = f"{len(missing)} of 75 folders are missing ({missing[0]}, ...)"
        expected = "expected 15 corruptions with severities 1 to 5"
        raise ValueError(f"{spec} has ImageNet-C's shape, but {told}: {expected}")
    parts = {part: open_dataset(os.path.join(spec, part), "all") for part in PARTS}
    for part, dataset in parts.items():
        if dataset.classes != parts["fog/1"].classes:  # other logits would take part
            raise ValueError(f"{spec}: {part} has not the same class folders as fog/1")
    return parts


def corruption_errors(results):
    """Sum up {"fog/1": evaluate()'s result, ...}: dict(corruptions, mean_error, mce) in percent.

    corruptions: {"fog": [5 errors, their mean, CE], ...}. A CE is the mean divided by AlexNet's.
    mean_error is the mean of the 15 means, mce the mean of the 15 CE: two numbers of similar size,
    of which one has been printed as the other.
    """
    table = {}
    for name, alexnet in ALEXNET.items():
        errors = [100 - results[f"{name}/{severity}"]["top1"] for severity in "12345"]
        average = statistics.mean(errors)
        table[name] = [*errors, average, average / alexnet]
    mean_error = statistics.mean(row[5] for row in table.values())
    mce = statistics.mean(row[6] for row in table.values())
    return dict(corruptions=table, mean_error=mean_error, mce=mce)


# ---------------------------------------------------------------- own pictures, and mistakes


def match_pictures(pictures, classes, real=None):
    """Return Pictures as a checkpoint with these classes classifies them: a Matched.

    Raise ValueError if there is a file of ReaL labels: pictures without classes are not counted.
    """
    if real:
        raise ValueError("--real scores ImageNet's validation images, not pictures without classes")
    note = f"{len(pictures)} pictures without classes"
    if len(pictures) == 1:
        note = "1 picture without a class"
    columns = list(range(len(classes)))
    return Matched(copy.copy(pictures), columns, classes, list(range(len(pictures))), note)


@torch.no_grad()
def classify(model, loader, device, mean, std, names, dtype=torch.float32, loss="softmax",
             progress=""):
    """Classify the Pictures of an eval_loader(): [dict(file, classes, probabilities), ...].

    classes: names of the five best, or of all if there are fewer, the best first. probabilities:
    theirs, as floats. Both are empty if a picture cannot be read.
    names: of all classes. For the other parameters see evaluate(). Under torchrun each process
    classifies its share, and all return the whole, in the order of the files. Raise ValueError if
    the logits are not finite.
    """
    best = []  # of each picture of this process: [probabilities], [columns], unreadable
    for images, _, unreadable in show_progress(loader, progress):
        with autocast(device, dtype):
            logits = model(normalize(images.to(device), mean, std)).float()  # (B, classes)
        values, columns = class_probabilities(logits, loss).topk(min(5, len(names)))  # (B, 5)
        best += zip(values.tolist(), columns.tolist(), unreadable.tolist())
    shares = [best]
    if dist.is_initialized():
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, best)
    found = []
    for i in range(len(loader.dataset)):
        values, columns, unreadable = shares[i % len(shares)][i // len(shares)]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"the logits of {loader.dataset.path(i)} are not finite")
        classes = [names[column] for column in columns]
        if unreadable >= 0:
            classes, values = [], []
        found.append(dict(file=loader.dataset.path(i), classes=classes, probabilities=values))
    return found


def name_mistakes(confusion, names):
    """Put a confusion matrix (C, C) of evaluate() into words: dict(per_class, confusions).

    names: of the C classes. per_class: {name: dict(top1, images)}, in percent, of the classes with
    images. confusions: [[true name, predicted name, images], ...], all of them, the most frequent
    first.
    """
    per_class = {}
    accuracies, counts = accuracy_per_class(confusion).tolist(), confusion.sum(1).tolist()
    for name, accuracy, images in zip(names, accuracies, counts):
        if images:
            per_class[name] = dict(top1=accuracy, images=images)
    confusions = []
    for true, predicted, images in worst_pairs(confusion):
        confusions.append([names[true], names[predicted], images])
    return dict(per_class=per_class, confusions=confusions)


# ---------------------------------------------------------------- changed routing, and the cost


def change_routing(model, k=None, capacity_factor=None, drop_experts=()):
    """Change how a sparse model chooses its experts. Return what differs, a list of sentences.

    k: experts per token. capacity_factor: limits the experts' slots, in units of the even share.
    drop_experts: pairs (MoE layer, expert), both counted from 0. Raise ValueError if the model has
    no such layer or expert, or too few are left.
    """
    if not (k or capacity_factor or drop_experts):
        return []
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        flags = "--k, --capacity-factor and --drop-expert"
        told = "not for one that is dense or has --router expert_choice or soft"
        raise ValueError(f"{flags} are for a model whose tokens choose experts, {told}")
    E, trained_k, factor = layers[0].num_experts, layers[0].k, layers[0].capacity_factor
    k = k or trained_k
    notes = []
    for i, expert in drop_experts:
        if i not in range(len(layers)) or expert not in range(E):
            expected = f"expected a MoE layer 0 to {len(layers) - 1}, expert 0 to {E - 1}"
            raise ValueError(f"--drop-expert {i}:{expert}: {expected}")
        layers[i].router.register_forward_hook(partial(mute, expert=expert))
        place = f"MoE layer {i}, block {model.moe_blocks[i]}"
        notes.append(f"expert {expert} of {place}, is never chosen")
    dropped = Counter(i for i, _ in set(drop_experts))  # {layer: how many}
    left = E - max(dropped.values(), default=0)
    if k > left:
        told = f"a MoE layer has only {left} to choose from: give --k 1 to {left}"
        raise ValueError(f"k = {k} experts per token, but {told}")
    if k != trained_k:
        notes.append(f"k = {k} instead of {trained_k}")
    if capacity_factor:
        told = "with a limit a prediction depends on the other images of its batch"
        notes.append(f"capacity factor {capacity_factor} instead of {factor or 'no limit'}; {told}")
    for layer in layers:
        layer.k, layer.eval_capacity_factor = k, capacity_factor
    return notes


def mute(router, inputs, logits, expert):
    """Change a router's logits (T, E), as its forward hook, so that nobody chooses this expert."""
    logits[:, expert] = -math.inf


@torch.no_grad()
def count_flops(model, image_size):
    """Return the multiply-adds of one image in evaluation, an int: what the papers call FLOPs.

    torch counts products and convolutions in a copy of the model without data, as is usual without
    norms, activations and additions.
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
    """Measure the speed of the model alone on images (B, 3, S, S): a float.

    It is the median of at least 3 passes after a warm-up, of more if all took less than 0.3 s.
    """
    seconds = []
    while len(seconds) < 4 or sum(seconds) < 0.3:
        start = clock(device.type)
        with autocast(device, dtype):
            model(images)
        seconds.append(clock(device.type) - start)
    return len(images) / statistics.median(seconds[1:])


# ---------------------------------------------------------------- results: a dict per checkpoint


def prepare(path, data, args):
    """Find what can be wrong before anything is computed: return (model, row, {key: Matched}).

    path: of a checkpoint. row: a dict of its results so far. data: {key: data set}; a key is
    (spec, part), where part is "fog/1" or the like for ImageNet-C, and "" otherwise. Among the
    data sets may be Pictures.
    """
    model, checkpoint = load_checkpoint(path, torch.device("cpu"), args.raw)
    weights = "raw" if args.raw or not checkpoint["ema"] else "EMA"
    row = dict(checkpoint=path, weights=weights)
    for name in ("config", "epoch", "image_size", "crop_ratio", "mean", "std", "args"):
        row[name] = checkpoint[name]
    row["deviations"] = change_routing(model, args.k, args.capacity_factor, args.drop_expert)
    row["params"], row["active"] = count_parameters(model)
    row["multiply_adds"] = count_flops(model, row["image_size"])
    matched = {}
    for (spec, part), dataset in data.items():
        classes = checkpoint["classes"]
        if isinstance(dataset, Pictures):
            found = match_pictures(dataset, classes, args.real)
        else:
            found = match_dataset(dataset, classes, args.ignore_unmatched, args.real)
        whole = args.split == "all" and getattr(dataset, "flat", False)
        if whole and was_trained_on(row, spec):
            found.note += ", those of the training among them: --split val leaves them out"
        found.dataset.transform = eval_transform(row["image_size"], row["crop_ratio"])
        if part:
            found.dataset.transform = v2.CenterCrop(row["image_size"])
            first = dataset[found.indices[0]][0]  # (3, H, W)
            if min(first.shape[1:]) < row["image_size"]:
                told = f"an image of {part} is smaller than {row['image_size']} pixels"
                raise ValueError(f"{spec} is only cropped, but {told}")
        matched[spec, part] = found
    return model, row, matched


def was_trained_on(row, spec):
    """Tell whether a checkpoint was trained on the folder of a spec."""
    return os.path.abspath(row["args"].get("data", "shapes")) == os.path.abspath(spec)


def measure(model, row, matched, args, device, world, progress):
    """Add to a row the model's speed and counts on each data set, and what it says of pictures.

    See prepare(). The speed is measured only if there is a data set.
    """
    model.to(device)
    dtype = best_dtype(device)
    counted = [found for found in matched.values() if not isinstance(found.dataset, Pictures)]
    if counted:
        row["images_per_s"] = speed_on(counted[0], model, row, args, device, dtype)
    row["data"], row["pictures"] = {}, []
    results = defaultdict(dict)  # {spec: {part: counts}}
    for (spec, part), found in matched.items():
        data = found.dataset
        workers = auto_workers(data, world) if args.workers is None else args.workers
        loader = eval_loader(data, args.batch_size, workers, device, found.indices)
        inputs = (model, loader, device, row["mean"], row["std"])
        options = dict(dtype=dtype, loss=row["args"].get("loss", "softmax"))
        options |= dict(progress=progress and f"{spec} {part}")
        if isinstance(data, Pictures):
            row["pictures"] += classify(*inputs, found.names, **options)
            continue
        # Not for 75 parts, not for several right answers, not for a table that fills the memory.
        confusion = not part and not args.real and len(found.columns) <= 1000
        counts = evaluate(*inputs, columns=found.columns, confusion=confusion, **options)
        if not math.isfinite(counts["loss"]):
            raise ValueError(f"{row['checkpoint']} computes logits on {spec} that are not finite")
        if confusion:
            counts |= name_mistakes(counts.pop("confusion"), found.names)
        transform = " ".join(str(data.transform).split())
        counts |= dict(protocol=found.note, transform=transform, classes=len(found.columns))
        results[spec][part] = counts
    for spec, parts in results.items():
        if "" in parts:
            row["data"][spec] = parts[""]
        else:
            row["data"][spec] = corruption_errors(parts) | dict(parts=parts)
    model.cpu()


def speed_on(matched, model, row, args, device, dtype):
    """Return images_per_second() for a whole batch of a Matched, whose images may come twice."""
    indices = itertools.islice(itertools.cycle(matched.indices), args.batch_size)
    images = torch.stack([matched.dataset[i][0] for i in indices])
    images = normalize(images.to(device), row["mean"], row["std"])
    return images_per_second(model, images, device, dtype)


def over_seeds(rows):
    """Group the rows of runs that differ in the seed only: [[row, ...], ...], each of two or more.

    Of checkpoints with one seed, such as best.pt and last.pt of a run, only the first counts.
    """
    groups = defaultdict(dict)  # {setting: {seed: row}}
    for row in rows:
        setting = row["args"] | dict(seed=None, out=None, workers=None)
        seed = row["args"].get("seed")
        groups[json.dumps(setting, sort_keys=True)].setdefault(seed, row)
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def print_plan(row, matched):
    """Say what is evaluated, and on what: a note that holds for 75 parts is printed once."""
    model, epoch = row["config"]["model"], row["epoch"]
    print(f"{row['checkpoint']}: {model} after epoch {epoch}, {row['weights']} weights")
    notes = [f"  deviates from training: {deviation}" for deviation in row["deviations"]]
    for (spec, part), found in matched.items():
        notes.append(f"  {spec}{part and ', each part'}: {found.note}")
    print("\n".join(dict.fromkeys(notes)), flush=True)


def print_table(rows):
    """Print rows of cells in columns. Floats get two decimals."""
    texts = []
    for row in rows:
        texts.append([f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row])
    first, *widths = [max(map(len, column)) for column in zip(*texts)]
    for name, *cells in texts:
        line = name.ljust(first)
        for cell, width in zip(cells, widths):
            line += "  " + cell.rjust(width)
        print(line.rstrip())


def print_results(rows):
    """Print the accuracies of all checkpoints, then what each has besides.

    That is a line per corruption of ImageNet-C, the five best classes of each picture, and, of a
    single checkpoint, its mistakes: of many they would be too long to read.
    """
    if rows[0]["data"]:
        print_accuracies(rows)
    for row in rows:
        for spec, result in row["data"].items():
            if "mce" in result:
                print(f"\n{row['checkpoint']} on {spec}, error in % per severity")
                print_corruptions(result)
            if result.get("confusions") and len(rows) == 1:
                print(f"\n{row['checkpoint']} on {spec}")
                print_mistakes(result)
        if row["pictures"]:
            print(f"\n{row['checkpoint']}, the best classes and their probabilities in %")
            print_pictures(row["pictures"])


def print_accuracies(rows):
    """Print a line per checkpoint, and one per group of seeds.

    top-5 is left out where no checkpoint chooses among more than five classes: it would be 100 %.
    """
    specs = [spec for spec, result in rows[0]["data"].items() if "top1" in result]
    titles = ["checkpoint", "params M", "active M", "GFLOPs", "images/s"]
    above = [""] * len(titles)
    scores = []  # (spec, "top1" or "top5"), in the order of the columns
    for spec in specs:
        scores.append((spec, "top1"))
        above.append(spec)
        titles.append("top-1 %")
        if max(row["data"][spec]["classes"] for row in rows) > 5:
            scores.append((spec, "top5"))
            above.append("")
            titles.append("top-5 %")
    table = [above, titles]
    for row in rows:
        cells = [row["checkpoint"], row["params"] / 1e6, row["active"] / 1e6]
        cells += [f"{row['multiply_adds'] / 1e9:.3g}", round(row["images_per_s"])]
        cells += [row["data"][spec][score] for spec, score in scores]
        table.append(cells)
    print()
    print_table(table)
    groups = over_seeds(rows)
    if groups:
        print("\ntop-1 %, mean and standard deviation over seeds")
        names = [name for spec in specs for name in (spec, "")]  # each above two columns
        print_table([["", "n", *names], *(seed_cells(group, specs) for group in groups)])


def print_mistakes(result):
    """Print the five classes of lowest accuracy, and the five most frequent confusions."""
    table = [["lowest accuracy", "top-1 %", "images"]]
    for name, found in sorted(result["per_class"].items(), key=lambda item: item[1]["top1"])[:5]:
        if found["top1"] < 100:
            table.append([name, found["top1"], found["images"]])
    print_table(table)
    table = [["most frequent confusions", "images"]]
    for true, predicted, images in result["confusions"][:5]:
        table.append([f"{true} -> {predicted}", images])
    print_table(table)


def print_pictures(pictures):
    """Print what classify() returned, a line per picture."""
    table = []
    columns = max(len(picture["classes"]) for picture in pictures)
    for picture in pictures:
        cells = ["cannot be read"]
        if picture["classes"]:
            best = zip(picture["classes"], picture["probabilities"])
            cells = [f"{name} {100 * probability:.1f}" for name, probability in best]
        empty = [""] * (columns - len(cells))
        table.append([one_line(picture["file"]), *cells, *empty])
    print_table(table)


def seed_cells(group, specs):
    """Return the cells of a line: name and size of a group of seeds, mean and deviation per spec.

    The deviation is that of a sample, divided by n - 1.
    """
    cells = [os.path.commonprefix([row["checkpoint"] for row in group]) + "*", len(group)]
    for spec in specs:
        top1 = [row["data"][spec]["top1"] for row in group]
        cells += [statistics.mean(top1), statistics.stdev(top1)]
    return cells


def print_corruptions(result):
    """Print what corruption_errors() returned."""
    table = [["corruption", 1, 2, 3, 4, 5, "mean", "CE"]]
    for name, errors in result["corruptions"].items():
        table.append([name, *errors])
    print_table(table)
    print(f"mean error {result['mean_error']:.2f} %, the mean of the 75 errors")
    print(f"mCE {result['mce']:.2f} %, the mean of the 15 CE: mean errors in % of AlexNet's")


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    usage = "%(prog)s CHECKPOINT ... --data SPEC ... (--help shows all flags)"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.splitlines()[0])
    flag = parser.add_argument
    count = number("[1, inf)", int)
    flag("checkpoint", nargs="+", help="files such as runs/convnext_nano-shapes-1/best.pt")
    flag("--data", required=True, action="append",
         help="shapes, cifar10, a folder, a picture, ... (top of eval.py); repeatable")
    flag("--split", choices=("train", "val", "all"), default="all",
         help="of a folder without val/: all of it, or what training holds out (default: all)")
    flag("--ignore-unmatched", action="store_true", help="leave out unknown classes")
    flag("--real", metavar="FILE", help="score ImageNet by the ReaL labels in this JSON file")
    flag("--raw", action="store_true", help="plain weights, not the averaged ones (EMA)")
    flag("--k", type=count, help="experts per token, other than in training")
    flag("--capacity-factor", type=number("(0, inf)"),
         help="slots per expert, in units of the even share (default: no limit)")
    flag("--drop-expert", type=layer_and_expert, action="append", default=[],
         metavar="LAYER:EXPERT", help="never choose this expert; both count from 0; repeatable")
    flag("--batch-size", type=count, default=128, help="in each process (default: 128)")
    flag("--workers", type=number("[0, inf)", int),
         help="processes that load images (default: 0 if in memory, else up to 12)")
    flag("--json", metavar="FILE",
         help="also write the results there, with accuracy per class and all confusions")
    return parser.parse_args(argv)


def layer_and_expert(text):
    """Turn "0:3" into (0, 3)."""
    layer, expert = text.split(":")
    return int(layer), int(expert)


def check(args):
    """Raise ValueError for options that cannot be."""
    if args.real and (len(args.data) > 1 or args.ignore_unmatched):
        raise ValueError("--real scores one --data, ImageNet's validation images, on all classes")
    folder = os.path.dirname(args.json or "")
    if folder and not os.path.isdir(folder):
        raise ValueError(f"--json {args.json}: there is no folder {folder}")


def main(args):
    """Check everything, evaluate each checkpoint on each data set, print and write the results.

    The status is 1 if a picture could not be read.
    """
    rank, world, device = setup_processes()
    with together():
        check(args)
        data = {}  # {(spec, part): data set}
        for spec in args.data:
            for part, dataset in open_parts(spec, args.split).items():
                data[spec, part] = dataset
        prepared = [prepare(path, data, args) for path in args.checkpoint]
    for model, row, matched in prepared:
        if rank == 0:
            print_plan(row, matched)
        measure(model, row, matched, args, device, world, progress=rank == 0)
    rows = [row for _, row, _ in prepared]
    if rank == 0:
        print_results(rows)
    if rank == 0 and args.json:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        run = dict(torch=torch.__version__, device=name, dtype=str(best_dtype(device)))
        run |= dict(processes=world, batch_size=args.batch_size, results=rows)
        Path(args.json).write_text(json.dumps(run, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()
    if not all(picture["classes"] for picture in rows[0]["pictures"]):
        raise SystemExit(1)  # a picture could not be read


if __name__ == "__main__":
    run_program(lambda: main(parse_args()))
