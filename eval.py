"""Put numbers on checkpoints: open data sets, load models, match classes, predict, then count.

    python eval.py runs/convnext_nano-shapes-1/best.pt --data shapes --data shapes-noise
    python eval.py a/best.pt b/best.pt --data /imagenet --data /imagenet-a --json result.json
    torchrun --nproc-per-node=8 eval.py best.pt --data /imagenet-c
    python eval.py best.pt --data photo.jpg

An image: open_folder() finds its file and its class, match_dataset() the same class in the
checkpoint. A loader's process makes a tensor of it (read_image) and crops it (eval_transform).
predict() runs the model on batches: per image the five best classes, their probabilities, the loss.
All numbers are counted from that, by count(), mistakes() and whatever you add.

A data set spec is
- `shapes` or `flags`, drawn below (`flags:64000`: 64,000 training images instead of 16,000), or
  the same pictures as training never shows them: `shapes-noise`, `shapes-blur`;
- `cifar10` or `cifar100`, downloaded by torchvision to data/, unless there is such a folder;
- a folder with train/ and val/ (valid/, validation/, test/), or directly with class folders, or of
  ImageNet-C's shape, <corruption>/<severity 1 to 5>/<class>;
- an image file or a folder of them, without classes: prints the five best of each.
"""

import argparse
import copy
import ctypes
import hashlib
import io
import json
import math
import os
import re
import signal
import struct
import sys
import threading
import time
import warnings
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, partial
from multiprocessing import parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

import convnext
import vit
from moe import MoE, count_flops, count_parameters

# ---------------------------------------------------------------- processes and messages

def setup_processes():
    """Return (rank, world size, device), as torchrun says. Ranks above 0 print to nowhere."""
    gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu")
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            warn("several SLURM tasks without torchrun all do the same: see README, srun torchrun")
        return 0, 1, device
    if gpu:
        torch.cuda.set_device(device)
    backend, gpu = ("nccl", device) if gpu else ("gloo", None)
    dist.init_process_group(backend, timeout=timedelta(hours=1), device_id=gpu)  # saves take long
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size(), device


def best_dtype(device):
    """Return bfloat16 for a GPU that computes in it and does not emulate it, else float32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    return torch.bfloat16 if native else torch.float32


def gather(value):
    """Return what each process gives, a list by rank: [value] if there is one process."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


@contextmanager
def together():
    """End all processes, which must all come here, if one raises ValueError or OSError inside."""
    error = None
    try:
        yield
    except (ValueError, OSError) as raised:
        error = str(raised) or repr(raised)
    for rank, error in enumerate(gather(error)):
        if error and os.environ.get("RANK", "0") != "0":
            raise SystemExit(2)
        if error:
            raise ValueError(f"process {rank}: {error}" if rank else error)


def download(function, by_hand):
    """Return function(), called by one process of a machine at a time. by_hand: what else to do."""
    with open(__file__) as lock:
        with suppress(ImportError, OSError):  # Windows, or a file system without locks
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return function()
        except Exception as error:  # any bytes may be in the file
            raise ValueError(f"not downloaded or not readable ({one_line(error)}): {by_hand}")


def run_program(main):
    """Call main(). What a user can mend is an error of one line, with status 2."""
    for stream in (sys.stdout, sys.stderr):
        shield(stream)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, RuntimeError) as error:
        told = one_line(error)
        if "out of memory" in told or "can't allocate memory" in told:
            told += ": a larger --accumulate (train.py) or a smaller --batch-size or --model helps"
        elif isinstance(error, RuntimeError) and not re.search(
                "DataLoader worker|Connection closed", str(error)):
            raise  # a bug of ours: show the traceback
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)


def shield(stream):
    """Let a stream print at each line, and the program go on if nobody reads it (`| head`)."""
    def write(text):
        try:
            return plain(text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    if hasattr(stream, "reconfigure"):  # not in a notebook
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # odd file names
        plain, stream.write = stream.write, write


def one_line(error):
    """Return what an error says in one line: of a loader's process the last of its traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "Original Traceback" in str(error) else 0].removeprefix("ValueError: ")


@cache
def warn(text):
    """Print a warning, once, however many data sets and processes have it to say."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


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

    A second one ends this process at once. Repeats within two seconds are ignored: torchrun
    forwards signals that every process already received.
    """
    def note(number, frame):
        if run.signal and time.monotonic() > run.signalled + 2:
            os._exit(128 + number)
        if not run.signal:
            run.signal, run.signalled = number, time.monotonic()

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, note)
    if "RANK" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: when its parent ends


def leave_signals(worker):
    """Let a loader's new process obey a SIGTERM of the main one only, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = parent_process().pid

    def obey():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
            pass
        os._exit(0)

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=obey, daemon=True).start()


# ---------------------------------------------------------------- models and checkpoints

NAMES = ("vit_nano vit_pico vit_micro vit_ti vit_s vit_b vit_b32 vit_l vmoe_s32 convnext_nano "
         "convnext_t convnext_s convnext_b convnext_iso_s convnext_iso_b")
MODELS = {name: getattr(vit, name, None) or getattr(convnext, name) for name in NAMES.split()}
KEYS = "config classes image_size crop_ratio mean std model ema optimizer epoch step best args"
CHECKPOINT_KEYS = set(KEYS.split())
VAL_IMAGES = 2000  # of the drawn data
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in 0..1, per colour
STD = (0.229, 0.224, 0.225)


def build_model(config):
    """Build the model of a config: a dict with `model`, a preset's name, and its options."""
    options = dict(config)
    return MODELS[options.pop("model")](**options)


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

    With mmap what nobody looks at, such as the optimizer's moments, takes no memory.
    """
    try:  # weights_only refuses a file that wants to run code
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if lacking := CHECKPOINT_KEYS - set(checkpoint):
            raise KeyError(f"it lacks {', '.join(sorted(lacking))}")
    except Exception as error:  # of whatever kind: any bytes may be in the file
        raise ValueError(f"{path} is not a checkpoint like runs/<run>/best.pt, or not whole: "
                         f"{one_line(error)}") from None
    return checkpoint


# ---------------------------------------------------------------- data sets
# Each has .classes (names in label order), .labels (N,) and items (image (3, S, S) uint8, label,
# unreadable). unreadable is -1, or the index of a file that could not be read and was replaced by
# the next one: train.py reports it and goes on, count() refuses.

def open_dataset(spec, split, transform=None):
    """Open split "train", "val" or "all" of a data set spec, one of those at the top of this file.

    Of a folder without val/ "val" is a fifth of each class, "train" the rest and "all" both. Else
    "all" is "val". transform: uint8 (3, H, W) -> uint8 (3, S, S).
    """
    if re.fullmatch("(shapes|flags)(-noise|-blur)?(:.*)?", spec) and not os.path.isdir(spec):
        return open_drawn(spec, split, transform)
    if spec in ("cifar10", "cifar100") and not os.path.isdir(spec):
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
        self.images, self.labels, self.classes = images, labels, list(classes)
        self.transform = transform or v2.Identity()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        images = self.images[index]
        unreadable = torch.full(images.shape[:-3], -1)  # () or (B,)
        return self.transform(images), self.labels[index], unreadable


class FolderImages:
    """Image files {class: [path, ...]}. The class "" holds own pictures, which are labelled -1.

    All paths are in one array: Python writes a reference count into each str of a list, so every
    loader process would end up with a copy.
    """

    def __init__(self, files, transform=None):
        self.classes = [name for name in files if name]
        self.transform = transform or v2.Identity()
        self.files = np.array([os.fsencode(path) for paths in files.values() for path in paths])
        counts = torch.tensor([len(paths) for paths in files.values()])
        first = 0 if self.classes else -1
        self.labels = torch.arange(first, first + len(files)).repeat_interleave(counts)

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        """Return the file of the item at an index, a str."""
        return os.fsdecode(self.files[index])

    def __getitem__(self, index):
        unreadable, tries = -1, min(100, len(self)) if self.classes else 1
        for i in range(index, index + tries):  # the file itself or the next that can be read
            image = read_image(self.path(i % len(self)))
            if image is not None:
                break
            unreadable = index
        else:
            if self.classes:
                raise ValueError(f"cannot read {self.path(index)}, nor the images after it")
            image = torch.zeros(3, 1, 1, dtype=torch.uint8)  # nothing replaces an own picture
        return self.transform(image), self.labels[i % len(self)], unreadable


# ---------------------------------------------------------------- folders of images

EXTENSIONS = tuple(".jpg .jpeg .jpe .jfif .png .bmp .webp .gif .tif .tiff .ppm .pgm .avif".split())
warnings.filterwarnings("ignore", module="PIL")  # an odd file is read or reported
TRAIN = ("train", "training")  # the first that exists, in small letters or capitals
VAL = ("val", "valid", "validation", "test")
HIDDEN = re.compile(r"[/\\](\.|@eaDir|\$RECYCLE|__MACOSX|lost\+found)")  # what is no data
HINT = ("expected FOLDER/train/<class>/<image>.jpg and FOLDER/val/<class>/<image>.jpg, or "
        "FOLDER/<class>/<image>.jpg, or shapes, flags, cifar10, cifar100; to classify also images")


def open_folder(root, split, transform=None):
    """Open a split of a folder, an image, or a folder of images. Raise ValueError if it has none.

    root holds a training and a validation folder under their usual names, or class folders, of
    which a fifth is held out.
    """
    if os.path.isfile(root) and split != "train":
        return FolderImages({"": [root]}, transform)
    if not os.path.isdir(root):
        raise ValueError(f"no folder {root!r}: {HINT}")
    train, val = subfolder(root, TRAIN), subfolder(root, VAL)
    flat = not val or split == "train" and not train
    if flat and train:
        warn(f"no classes in {root}/val: only {train} is read, of which training holds out a fifth")
    root = os.path.normpath((val if split != "train" and val else train) or root)
    files = find_images(root)
    if split == "train" and len(files) < 2:
        raise ValueError(f"{root} has fewer than two class folders with images: {HINT}")
    if flat and split != "all" and "" not in files:
        files = hold_out(files, split, root)
    return FolderImages(files, transform)


def subfolder(root, names):
    """Return the first folder of root of these names, in any case, that holds folders, or None."""
    there = {name.lower(): os.path.join(root, name) for name in os.listdir(root)}
    paths = [there[name] for name in names if name in there]
    return next((path for path in paths if any(below for _, below, _ in os.walk(path))), None)


def find_images(root):
    """List the images in and below each class folder of root, {class: paths}, both sorted.

    If there are none, the images in root itself come as {"": paths}. Links below a class folder are
    not followed. One warning says what is left out. Raise ValueError if that is all.
    """
    classes, others = {}, Counter()
    _, folders, loose = next(os.walk(root))
    for name in ["", *sorted(folders)]:
        walk = os.walk(os.path.join(root, name), onerror=warn) if name else [(root, [], loose)]
        files = [os.path.join(place, file) for place, _, names in walk for file in names]
        files = [file for file in files if not HIDDEN.search(file[len(root):])]
        images = sorted(file for file in files if file.lower().endswith(EXTENSIONS))
        rest = sorted(set(files) - set(images))
        others.update(os.path.splitext(file)[1] or os.path.basename(file) for file in rest)
        if images:
            classes[name] = images
        elif name and not HIDDEN.search(f"/{name}"):
            others[f"{name}/"] += 1
    if len(classes) > 1 and "" in classes:
        others["images in no class folder"] = len(classes.pop(""))
    left_out = ", ".join(f"{kind} ({n})" for kind, n in others.most_common(8))
    if not classes:
        raise ValueError(f"no images in {root} (found: {left_out or 'nothing'}): {HINT}")
    if left_out:
        warn(f"{root}: left out {left_out}")
    return classes


def hold_out(classes, split, root):
    """Keep what is for split "train" or "val" of each class of root: {name: files} -> the same.

    The first fifth by a hash of the names is for validation: one more image moves at most one.
    """
    few = [name for name, files in classes.items() if len(files) < 5]
    if len(few) == len(classes):
        raise ValueError(f"classes of {root} have fewer than 5 images: too few to hold out a fifth")
    if few:
        warn(f"none to validate in {len(few)} classes of fewer than 5 images: {', '.join(few[:5])}")
    kept = {}
    for name, files in classes.items():
        start = len(os.path.join(root, name, ""))  # of the name within the class folder
        hashes = [hashlib.sha256(os.fsencode(file[start:])).digest() for file in files]
        fifth = set(sorted(hashes)[:len(files) // 5])
        kept[name] = [f for f, hash in zip(files, hashes) if (hash in fifth) == (split == "val")]
    return kept


def read_image(path):
    """Read an image file: (3, H, W) uint8 RGB, or None. Of an animation the first picture.

    It is turned as its EXIF data say, unlike in published ImageNet protocols, and laid on white if
    it is transparent. More than 179 million pixels (Pillow's limit) are unreadable.
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
    kept, start, name = png[:8], 8, b""
    while name != b"IEND":
        size, name = struct.unpack_from(">I4s", png, start)
        end = start + size + 12  # with the size itself, the name and a checksum
        if name == b"eXIf":  # with a right checksum
            kept += png[start:end - 4] + zlib.crc32(png[start + 4:end - 4]).to_bytes(4, "big")
        elif name[:1].isupper() or name == b"tRNS":  # capitals: critical
            kept += png[start:end]
        start = end
    return kept


def decode(image):
    """Decode an image that Pillow has opened, or raise. Grey of 16 bits is scaled to 8."""
    image.load()  # damaged pixels raise here; damaged EXIF data only mean that it is not turned
    with suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        grey = v2.functional.pil_to_tensor(image.convert("F")) / 257  # 65535 / 255
        if image.mode == "F" or grey.min() < 0 or grey.max() > 255:
            raise ValueError("no known range: floats, signed, or of 32 bits")
        return grey.round().to(torch.uint8).repeat(3, 1, 1)  # (1, H, W) -> (3, H, W)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return v2.functional.pil_to_tensor(image.convert("RGB"))


# ---------------------------------------------------------------- from images to predictions

def eval_transform(image_size, crop_ratio):
    """Return the transform uint8 (3, H, W) -> (3, S, S), S = image_size: resize and crop.

    The short side becomes S / crop_ratio, bicubic: for ImageNet 256 pixels, of which 224 are left.
    """
    short_side, bicubic = round(image_size / crop_ratio), v2.InterpolationMode.BICUBIC
    return v2.Compose([v2.Resize(short_side, bicubic), v2.CenterCrop(image_size)])


def normalize(images, mean, std):
    """Turn images uint8 (B, 3, S, S) into float32: (pixel / 255 - mean) / std per colour."""
    mean, std = per_colour(tuple(mean), images.device), per_colour(tuple(std), images.device)
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

    So each image counts once. DistributedSampler would fill up shares with images that count twice.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = (range(len(dataset)) if indices is None else indices)[rank::world]
    sampling = dict(batch_size=batch_size, sampler=share)
    if isinstance(dataset, TensorImages):  # asked for whole batches
        sampling = dict(batch_size=None, sampler=BatchSampler(share, batch_size, drop_last=False))
    return DataLoader(dataset, **sampling, num_workers=workers, persistent_workers=workers > 0,
                      pin_memory=device.type == "cuda", worker_init_fn=leave_signals)


class Predictions(NamedTuple):
    """What a model says of the N images of a loader, in their order, on the CPU."""
    best: torch.Tensor  # (N, 5) int64, the most probable classes, best first; or fewer
    probs: torch.Tensor  # (N, 5) float32, their probabilities
    losses: torch.Tensor  # (N,) float32, see image_losses()
    answers: torch.Tensor  # (N, L) int64, the right classes, padded with -1
    unreadable: torch.Tensor  # (N,) int64, the index of a file that cannot be read, else -1


@torch.no_grad()
def predict(model, loader, device, mean, std, columns=None, loss="softmax", dtype=torch.float32,
            progress="", stop=lambda: False, watch=None):
    """Run a model over a loader of eval_loader(): Predictions, the same for all processes.

    columns: of the logits, among which the prediction is made; classes are indices into them. loss:
    see image_losses(). dtype: bfloat16 for autocast. progress: the name of a bar, none if empty.
    stop: asked before each batch; after a stop of any process all return None. watch: a function
    that is given the Routings of each batch.
    """
    columns = slice(None) if columns is None else torch.tensor(columns, device=device)
    batches = []
    model.eval()
    for images, labels, unreadable in tqdm(loader, progress, len(loader), leave=False,
                                           disable=None if progress else True):
        if stop():
            break
        images = normalize(images.to(device, non_blocking=True), mean, std)  # (B, 3, S, S)
        with torch.autocast(device.type, torch.bfloat16, dtype == torch.bfloat16):
            output = model(images, return_routing=True) if watch else model(images)
        if watch:
            output, routings = output
            watch(routings)
        logits = output[:, columns].float()  # (B, classes)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
        probs = logits.sigmoid() if loss == "sigmoid" else logits.softmax(1)
        answers = labels.to(device, non_blocking=True).view(len(labels), -1)  # (B, L)
        losses = image_losses(logits, answers, loss)
        batches.append((best, probs.gather(1, best), losses, answers, unreadable))
    mine = [torch.cat(field).cpu() for field in zip(*batches)]
    stopped, shares = zip(*gather((stop(), mine)))
    if any(stopped):
        return None
    shares = [share for share in shares if share]  # the last processes may have no image
    found = []
    for parts in zip(*shares):  # those of a field: each has every world-th image
        whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
        for rank, part in enumerate(parts):
            whole[rank::len(parts)] = part
        found.append(whole)
    return Predictions(*found)


def count(found, dataset):
    """Count Predictions: dict(images, correct1, correct5, top1, top5, loss), top1 and 5 in percent.

    correct5: one of the best five is right. Raise ValueError if files could not be read.
    """
    broken = [dataset.path(index) for index in found.unreadable.tolist() if index >= 0]
    with together():
        if broken:
            raise ValueError(f"cannot read {len(broken)} files: {', '.join(broken[:5])}")
    guesses, answers = found.best.unsqueeze(2), found.answers.unsqueeze(1)  # (N, 5, 1), (N, 1, L)
    hits = (guesses == answers).any(2)  # (N, 5): is this guess one of the answers?
    N = len(hits)
    correct1, correct5 = hits[:, 0].sum().item(), hits.any(1).sum().item()
    return dict(images=N, correct1=correct1, correct5=correct5, top1=100 * correct1 / N,
                top5=100 * correct5 / N, loss=found.losses.double().mean().item())


def evaluate(model, loader, *args, **options):
    """Return count() of predict(), or None after a stop."""
    found = predict(model, loader, *args, **options)
    return found and count(found, loader.dataset)


def image_losses(logits, answers, loss):
    """Return the loss of each image, (B,), for logits (B, classes) and answers (B, L), padded: -1.

    loss "softmax": -log(probability of the right answers). "sigmoid": each class is a yes or no of
    its own, summed over the classes (V-MoE).
    """
    if loss == "sigmoid":
        right = F.one_hot(answers + 1, logits.shape[1] + 1)[..., 1:].amax(1)  # not of the padding
        return F.binary_cross_entropy_with_logits(logits, right.float(), reduction="none").sum(1)
    log_probs = logits.log_softmax(1).gather(1, answers.clamp(min=0))  # (B, L)
    return -log_probs.masked_fill(answers < 0, -math.inf).logsumexp(1)


def best_classes(found, names):
    """List each image's most probable classes, [[name, probability], ...], best first."""
    pairs = zip(found.best.tolist(), found.probs.tolist())
    return [[[names[c], p] for c, p in zip(best, probs)] for best, probs in pairs]


def mistakes(found, names):
    """Return {class: dict(top1, images)}, and [[true class, predicted class, images], ...]."""
    true, best = found.answers[:, 0].tolist(), found.best[:, 0].tolist()
    pairs, per_class = Counter(sorted(zip(true, best))), {}
    for c, n in sorted(Counter(true).items()):
        per_class[names[c]] = dict(top1=100 * pairs[c, c] / n, images=n)
    wrong = [[names[t], names[b], n] for (t, b), n in pairs.most_common() if t != b]
    return per_class, wrong


# ---------------------------------------------------------------- the drawn data
# With their factors and their object's mask one can measure what the experts follow. Only whole
# numbers are used, so that every machine draws the same pictures.

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
    images = drawn.pop("images")
    if shift == "noise":  # up to 80 brighter or darker; training has seen 16 at most
        random = torch.Generator().manual_seed(3)
        images = images + torch.randint(-80, 81, images.shape, generator=random, dtype=torch.int32)
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
    draw = partial(torch.randint, generator=generator, dtype=torch.int32)
    shape, texture = draw(0, 4, (n,)), draw(0, 4, (n,))
    row, column = draw(12, 20, (n, 1, 1)), draw(12, 20, (n, 1, 1))
    radius, turn = draw(2560, 3328, (n, 1, 1)), draw(0, 7, (n, 1, 1))
    order = torch.rand(n, 8, generator=generator).argsort(dim=1, stable=True)
    colours = order[:, :3]  # (n, 3): object, texture, background
    shade, noise = draw(-25, 26, (n, 3, 3)), draw(-12, 13, (n, 3, 32, 32))
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
    return drawn | dict(images=paint(bright.int(), layers, noise), masks=masks.to(torch.uint8),
                        labels=4 * drawn["shape"] + drawn["texture"])


def outlines(u, v, r):
    """Say where each of the SHAPES is: u, v (n, 32, 32), radius r (n, 1, 1) -> (4, n, 32, 32)."""
    near, far = torch.stack([u, v]).abs().aminmax(dim=0)
    slope = (u.abs() * 443 >> 8) - v  # 443 / 256 is the square root of 3
    circle = u * u + v * v < r * r
    triangle = torch.maximum(2 * v, slope) < r * 5 // 4
    cross = (near * 3 < r) & (far < r)
    return torch.stack([circle, far * 8 < r * 7, triangle, cross])


def textures(u, v):
    """Say where each of the TEXTURES has its second colour: u, v (n, 32, 32) -> (4, n, 32, 32)."""
    column, row = u >> 10, v >> 10  # stripes and checks of 4 pixels
    x, y = [(w + 896) % 1792 - 896 for w in (u, v)]  # from a dot: one every 7 pixels
    dots = x * x + y * y < 580 * 580
    return torch.stack([torch.zeros_like(dots), (column & 1) > 0, (column + row & 1) > 0, dots])


# ---- flags: three stripes in 14 colours. The class is a country: the 2,744 flags were assigned to
# 56 of them at random, 49 to each. So no rule predicts it, and flags must be learnt by heart.

FLAG_COLOURS = ("F0F0F0 202020 D02030 F07820 F0D020 30A040 105040 40C0D0 2050C0 702080 E080B0 "
                "805030 98D838 8090B0")
FLAG_PALETTE = [tuple(bytes.fromhex(colour)) for colour in FLAG_COLOURS.split()]
LOTS = torch.randperm(14**3, generator=torch.Generator().manual_seed(0))
COUNTRIES = (LOTS % 56).view(14, 14, 14)  # of a flag by its three colours, whatever the seed


def draw_flags(generator, n=500):
    """Draw n flags of 24 x 24 pixels, as draw_shapes() does.

    Factors: colour (n, 3), of each stripe from above, an index into FLAG_PALETTE; row and column.
    """
    draw = partial(torch.randint, generator=generator, dtype=torch.int32)
    colours = draw(0, 14, (n, 3)).long()
    row, column = draw(15, 18, (n, 1, 1)), draw(15, 18, (n, 1, 1))
    ground, shade = draw(70, 120, (n, 1, 3)), draw(-12, 13, (n, 4, 3))
    noise = draw(-16, 17, (n, 3, 32, 32))
    pixels = torch.arange(32, dtype=torch.int32)
    x, y = pixels - column + 12, pixels.view(32, 1) - row + 12  # from the flag's upper left corner
    on_flag = (x >= 0) & (x < 24) & (y >= 0) & (y < 24)
    masks = torch.where(on_flag, y // 8 + 1, 0).to(torch.uint8)  # (n, 32, 32)
    stripes = torch.tensor(FLAG_PALETTE, dtype=torch.int32)[colours]  # (n, 3 stripes, 3 colours)
    images = paint(torch.cat([ground, stripes], dim=1) + shade, masks, noise)
    return dict(colour=colours, row=row.flatten().long(), column=column.flatten().long(),
                images=images, masks=masks, labels=COUNTRIES[colours.unbind(1)])


DRAWN = dict(
    shapes=(draw_shapes, [f"{shape}-{texture}" for shape in SHAPES for texture in TEXTURES]),
    flags=(draw_flags, [f"country-{i:02}" for i in range(56)]))

# ---------------------------------------------------------------- whose class is which
# One rule for every test set: the prediction is made among those classes of the checkpoint that are
# folders of the data: all 1,000 for ImageNet-V2 and Sketch, 200 for -A and -R. ImageNet-V2 calls
# its folders 0 to 999. As text they are sorted 0, 1, 10, so such a name is the number of a class.

def match_classes(names, classes):
    """Find the class folders of a data set among the checkpoint's classes: a list of positions."""
    position = {name: i for i, name in enumerate(classes)}
    if all(map(str.isdecimal, names)) and not any(map(str.isdecimal, classes)):
        position = {name: int(name) for name in names if int(name) < len(classes)}
    unknown = [name for name in names if name not in position]
    if unknown:
        raise ValueError(f"{len(unknown)} of {len(names)} classes of the data are unknown to the "
                         f"checkpoint ({', '.join(unknown[:3])}, ...; not {classes[0]}, ...)")
    return [position[name] for name in names]


def match_dataset(dataset, classes, real=None):
    """Return a copy of a data set, as a checkpoint with these classes is scored on it.

    Its attributes: columns, the logits that take part; names, of their classes; labels (N, L), the
    right answers as indices into columns; indices, of the images that have one; note, in words.
    real: a file of ReaL labels, which replace those of the folders.
    """
    data = copy.copy(dataset)
    if not data.classes and real:
        raise ValueError("--real scores ImageNet's validation images, not pictures without classes")
    if not data.classes:
        data.columns, data.names, data.indices, data.note = None, classes, range(len(data)), ""
        return data
    found = torch.tensor(match_classes(data.classes, classes))
    columns, places = found.unique(return_inverse=True)  # places: of the data's classes in columns
    data.columns = columns.tolist()
    data.names = [classes[column] for column in data.columns]
    data.labels = places[dataset.labels].unsqueeze(1)  # (N,) -> (N, 1)
    if real:
        data.labels = read_real(real, data, len(data.columns))  # (N, L)
    data.indices = (data.labels >= 0).any(1).nonzero().flatten().tolist()
    data.note = f"{len(data.indices)} images, {len(data.columns)} of {len(classes)} classes"
    if len(data.columns) < len(classes):
        data.note += ", logits restricted"
    if real:
        data.note += f", those with ReaL labels from {real}"
    return data


def choose_split(spec, trained_on, split=None):
    """Return (split to score, words on it): the held-out part of what a checkpoint trained on."""
    same = os.path.realpath(trained_on) == os.path.realpath(spec)
    split = split or ("val" if same else "all")
    return split, ", those held out from its training" * (same and split == "val")


def read_real(path, dataset, num_classes):
    """Read ReaL labels (Beyer et al. 2020): (N, L) int64, padded with -1.

    The file at path is a JSON list of lists of right labels, some empty. Entry 0 belongs to the
    image whose NAME is ILSVRC2012_val_00000001.JPEG, not to the first of the files sorted by class.
    """
    try:
        lists = json.loads(Path(path).read_text())
        real = {f"ILSVRC2012_val_{i:08}": labels for i, labels in enumerate(lists, start=1)}
        names = [os.path.basename(dataset.path(i))[:23] for i in range(len(dataset))]
        if sorted(names) != sorted(real) or not set().union(*lists) <= set(range(num_classes)):
            raise ValueError(f"expected for each of ILSVRC2012_val_00000001 to {len(names):08} a "
                             f"list of labels from 0 to {num_classes - 1}")
        rows = [torch.tensor(real[name], dtype=torch.long) for name in names]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--real {path} does not fit: {one_line(error)}") from None
    return pad_sequence(rows, batch_first=True, padding_value=-1)


# ---------------------------------------------------------------- ImageNet-C (Hendrycks 2019)

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
        raise ValueError(f"{spec} lacks {len(missing)} of ImageNet-C's folders: {missing[0]}, ...")
    parts = {part: open_dataset(os.path.join(spec, part), "all") for part in PARTS}
    for part, dataset in parts.items():
        if dataset.classes != parts["fog/1"].classes:  # other logits would take part
            raise ValueError(f"{spec}: {part} has not the same class folders as fog/1")
    return parts


def corruption_errors(results):
    """Sum up {"fog/1": count(), ...}: dict(corruptions, mean_error, mce) in percent.

    corruptions: {"fog": [5 errors, their mean, CE], ...}. A CE is the mean divided by AlexNet's.
    mean_error is the mean of the 15 means, mce of the 15 CE: two numbers that are easily confused.
    """
    table = {}
    for name, alexnet in ALEXNET.items():
        errors = [100 - results[f"{name}/{severity}"]["top1"] for severity in "12345"]
        table[name] = [*errors, sum(errors) / 5, sum(errors) / 5 / alexnet]
    mean_error, mce = (sum(row[i] for row in table.values()) / 15 for i in (5, 6))
    protocol = f"75 parts, each {results['fog/1']['protocol']}"
    return dict(corruptions=table, mean_error=mean_error, mce=mce, protocol=protocol, parts=results)


# ---------------------------------------------------------------- changed routing

def change_routing(model, k=None, capacity_factor=None, drop_experts=()):
    """Change how a sparse model chooses its experts. Return what differs, a list of sentences.

    k: experts per token. capacity_factor: limits the experts' slots, in units of the even share.
    drop_experts: pairs (MoE layer, expert), both counted from 0.
    """
    if not (k or capacity_factor or drop_experts):
        return []
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError("--k, --capacity-factor and --drop-expert: tokens choose no experts here")
    E, trained, notes = layers[0].num_experts, layers[0].k, []
    for i, expert in drop_experts:
        if not (0 <= i < len(layers) and 0 <= expert < E):
            raise ValueError(f"--drop-expert {i} {expert}: layers {len(layers)}, experts {E}")
        layers[i].router.register_forward_hook(partial(mute, expert=expert))
        notes.append(f"expert {expert} of MoE layer {i}, block {model.moe_blocks[i]}: not chosen")
    k = k or trained
    left = E - max(Counter(i for i, _ in drop_experts).values(), default=0)
    if k > left:
        raise ValueError(f"--k {k}: a MoE layer has {left} experts to choose from")
    notes += [f"k = {k} instead of {trained}"] * (k != trained)
    if capacity_factor:
        notes.append(f"capacity factor {capacity_factor}: a prediction depends on its batch")
    for layer in layers:
        layer.k, layer.eval_capacity_factor = k, capacity_factor
    return notes


def mute(router, inputs, logits, expert):
    """Change a router's logits (T, E), as its forward hook, so that nobody chooses this expert."""
    logits[:, expert] = -math.inf


# ---------------------------------------------------------------- results: a dict per checkpoint

def prepare(path, args):
    """Find what can be wrong before anything is computed: (model, row, {(spec, part): data set}).

    path: of a checkpoint. row: a dict of its results so far. part: "fog/1" or the like, or "".
    """
    model, checkpoint = load_checkpoint(path, raw=args.raw)
    row = dict(checkpoint=path, weights="raw" if args.raw or not checkpoint["ema"] else "EMA")
    for name in ("config", "epoch", "image_size", "crop_ratio", "mean", "std", "args"):
        row[name] = checkpoint[name]
    size, crop, matched = row["image_size"], row["crop_ratio"], {}
    row["deviations"] = change_routing(model, args.k, None, args.drop_expert)
    row["params"], row["active"] = count_parameters(model)
    row["multiply_adds"] = flops = count_flops(model, size)
    row["routed_share"] = count_flops(model, size, r"experts\.\d+$") / flops
    row["deviations"] += change_routing(model, None, args.capacity_factor)  # now: it needs a batch
    for spec in args.data:
        split, held_out = choose_split(spec, row["args"].get("data", ""), args.split)
        for part, dataset in open_parts(spec, split).items():
            data = match_dataset(dataset, checkpoint["classes"], args.real)
            data.transform = v2.CenterCrop(size) if part else eval_transform(size, crop)
            if part and min(dataset[data.indices[0]][0].shape[1:]) < size:
                raise ValueError(f"{spec} is only cropped, but {part} has less than {size} pixels")
            data.note += held_out
            matched[spec, part] = data
    return model, row, matched


def measure(model, row, matched, args, device, world):
    """Add to a row of prepare() the counts on each data set, and the answers for own pictures."""
    model.to(device)
    parts, row["data"], row["pictures"] = defaultdict(dict), {}, []
    for (spec, part), data in matched.items():
        workers = auto_workers(data, world, args.workers)
        loader = eval_loader(data, args.batch_size, workers, device, data.indices)
        found = predict(model, loader, device, row["mean"], row["std"], data.columns,
                        row["args"].get("loss", "softmax"), best_dtype(device), f"{spec} {part}")
        with together():
            if not found.probs.isfinite().all():
                raise ValueError(f"{row['checkpoint']}: its logits on {spec} are not finite")
        if not data.classes:
            for i, best in enumerate(best_classes(found, data.names)):
                best = best if found.unreadable[i] < 0 else []
                row["pictures"].append(dict(file=data.path(i), best=best))
            continue
        counts = count(found, data) | dict(protocol=data.note, classes=len(data.columns))
        if not part and not args.real:  # not for 75 parts, nor for several right answers
            counts["per_class"], counts["confusions"] = mistakes(found, data.names)
        parts[spec][part] = counts
    for spec, results in parts.items():
        row["data"][spec] = results.get("") or corruption_errors(results)
    model.cpu()


def print_row(row):
    """Say what was evaluated, on what, and with which results."""
    print("\n{checkpoint}: {config[model]} after epoch {epoch}, {weights} weights".format(**row))
    print("  {params:,} parameters, {active:,} active; {multiply_adds:,} multiply-adds, "
          "{routed_share:.0%} of them in routed experts".format(**row))
    for deviation in row["deviations"]:
        print(f"  deviates from training: {deviation}")
    for spec, result in row["data"].items():
        told = "top-1 {top1:.2f} %, top-5 {top5:.2f} %; {protocol}"
        if "mce" in result:
            print(f"{'  error in %, severity':23}      1      2      3      4      5   mean     CE")
            for name, errors in result["corruptions"].items():
                print(f"  {name:21}", *(f"{error:6.2f}" for error in errors))
            told = "mean error {mean_error:.2f} %, mCE {mce:.2f} % of AlexNet's; {protocol}"
        print(f"  {spec}:", told.format(**result))
        if result.get("confusions"):
            worst = sorted(result["per_class"].items(), key=lambda item: item[1]["top1"])[:5]
            print("    lowest top-1:", ", ".join(f"{name} {n['top1']:.1f} %" for name, n in worst))
            told = ["{} -> {} ({})".format(*mistake) for mistake in result["confusions"][:5]]
            print("    most frequent mistakes:", ", ".join(told))
    for picture in row["pictures"]:
        told = ["{} {:.1%}".format(*answer) for answer in picture["best"]]
        print(f"  {picture['file']}: {', '.join(told) or 'cannot be read'}")


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    """Return the flags as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag, positive = parser.add_argument, number("[1, inf)", int)
    flag("checkpoint", nargs="+", help="files such as runs/convnext_nano-shapes-1/best.pt")
    flag("--data", required=True, action="append", help="see the top of eval.py; repeatable")
    flag("--split", choices=("train", "val", "all"), help="(default: all; val if trained on it)")
    flag("--real", metavar="FILE", help="score ImageNet by the ReaL labels in this JSON file")
    flag("--raw", action="store_true", help="plain weights, not the averaged ones (EMA)")
    flag("--k", type=positive, help="experts per token, other than in training")
    flag("--capacity-factor", type=number("(0, inf)"), help="slots over the even share")
    flag("--drop-expert", type=int, nargs=2, action="append", default=[], help="MoE layer, expert")
    flag("--batch-size", type=positive, default=128, help="in each process (default: 128)")
    flag("--workers", type=number("[0, inf)", int), help="processes that load images")
    flag("--json", metavar="FILE", help="also write the results there, with all mistakes")
    return parser.parse_args(argv)


def main(args):
    """Check everything, evaluate, write and print. Exit with 1 if a picture could not be read."""
    rank, world, device = setup_processes()
    with together():
        if args.real and len(args.data) > 1:
            raise ValueError("--real scores one --data, ImageNet's validation images")
        folder = os.path.dirname(args.json or "") or "."
        if os.path.isdir(args.json or "") or not os.access(folder, os.W_OK):
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
        for row in rows:
            print_row(row)
    if world > 1:
        dist.destroy_process_group()
    if not all(picture["best"] for picture in rows[0]["pictures"]):
        sys.exit(1)  # a picture could not be read


if __name__ == "__main__":
    run_program(lambda: main(parse_args()))
