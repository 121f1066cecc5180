"""Put a number on a checkpoint: open a data set, load a model, match the classes, count what is right.

    python eval.py runs/convnext_nano-shapes-1/best.pt --data shapes
    python eval.py best.pt --data /imagenet --json result.json

train.py computes the accuracies of its log with the same evaluate(). Four sections: models and checkpoints, data
sets, counting, command line.

A data set spec is `shapes` (made here, below; `shapes:4000` for 4,000 training images instead of 16,000), `cifar10` or `cifar100`
(downloaded by torchvision to data/), or a folder: with train/ and val/ in it, or directly with class folders.
"""

import argparse
import json
import os
import pickle
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

import convnext
import vit
from moe import count_parameters

# ---------------------------------------------------------------- models and checkpoints

MODELS = {preset.__name__: preset for preset in (
    vit.vit_nano, vit.vit_ti, vit.vit_s, vit.vit_b, vit.vit_b32, vit.vit_l, vit.vmoe_s32, convnext.convnext_nano, convnext.convnext_t, convnext.convnext_s,
    convnext.convnext_b, convnext.convnext_iso_s, convnext.convnext_iso_b)}

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
    """Open a checkpoint of train.py: (model in evaluation mode, the checkpoint's dict).

    The model has the averaged weights (EMA) if the run kept them, unless raw. Read with weights_only=True: a file that
    wants to run code when opened is refused. Raises ValueError, in one line, for whatever is not such a checkpoint.
    """
    if not os.path.isfile(path):
        raise ValueError(f"no checkpoint at {path}: expected a file like runs/<model>-<data>-1/best.pt")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} cannot be opened as a checkpoint, it is truncated or not one of ours: {reason}") from None
    missing = CHECKPOINT_KEYS - set(checkpoint) if isinstance(checkpoint, dict) else CHECKPOINT_KEYS
    if missing:
        raise ValueError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(sorted(missing))}")
    model = build_model(checkpoint["config"])
    try:
        model.load_state_dict(checkpoint["model"] if raw or not checkpoint["ema"] else checkpoint["ema"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights in {path} do not fit its own config: {reason}") from None
    return model.to(device).eval(), checkpoint


# ---------------------------------------------------------------- data sets
# Each has .classes (names in label order), .path(index), and items (image (3, S, S) uint8, label, unreadable): the last
# is -1, or the index of the file that could not be read and was replaced by the next one. Who gets the item decides
# what that means: train.py reports and goes on, evaluate() stops.

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def open_dataset(spec, split, transform=None):
    """Open split "train", "val" or "all" of a data set spec (see the top of this file). ValueError if that is impossible.

    transform: uint8 tensor (3, H, W) -> uint8 tensor (3, S, S). A folder without train/ and val/ is split here: every
    fifth image of a class is for validation. "all" is every image of it; elsewhere "all" means "val".
    """
    if spec.split(":")[0] == "shapes":
        return Shapes(*shapes_size(spec, split), transform)
    if spec in ("cifar10", "cifar100"):
        return open_cifar(spec, split, transform)
    return FolderImages(spec, split, transform)


class FolderImages:
    """Images in class folders, of any size, any depth of subfolders and any colour mode (all become RGB).

    File names are kept as one block of bytes and an array of offsets. A list of a million Python strings would take
    ten times the memory, again in each worker: counting references writes to shared pages (pytorch issue 13246).
    """

    def __init__(self, root, split, transform=None):
        root, held_out = split_folder(root, split)
        self.root, self.transform = root, transform
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
        if not self.classes:
            raise ValueError(f"no class folders in {root}{EXPECTED_TREE}")
        blocks, lengths, labels = [], [], []
        for label, name in enumerate(self.classes):
            files = [os.fsencode(f) for f in image_files(root, name)]
            if held_out is not None:
                files = [f for i, f in enumerate(files) if (i % 5 == 4) == held_out]
            blocks.append(b"".join(files))
            lengths.append(torch.tensor([len(f) for f in files], dtype=torch.int64))
            labels.append(torch.full((len(files),), label, dtype=torch.int32))
        self.names = b"".join(blocks)
        self.ends = torch.cat(lengths).cumsum(0)
        self.labels = torch.cat(labels)
        if len(self.labels) == 0:
            raise ValueError(f"no images in the {len(self.classes)} class folders of {root}{EXPECTED_TREE}")

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        """The file of an item, as a str."""
        start = int(self.ends[index - 1]) if index else 0
        return os.path.join(self.root, os.fsdecode(self.names[start:int(self.ends[index])]))

    def __getitem__(self, index):
        unreadable = -1
        for i in range(index, index + 100):  # the file itself or, failing that, the next one that can be read
            i %= len(self)
            image = read_image(self.path(i))
            if image is not None:
                return self.transform(image) if self.transform else image, int(self.labels[i]), unreadable
            unreadable = index
        raise ValueError(f"100 images in a row cannot be read, from {self.path(index)} on")


EXPECTED_TREE = """: expected
    FOLDER/train/<class>/<image>.jpg and FOLDER/val/<class>/<image>.jpg
 or FOLDER/<class>/<image>.jpg"""


def split_folder(root, split):
    """(the folder with the class folders of this split, None or whether to take the held-out fifth of its images)."""
    if not os.path.isdir(root):
        raise ValueError(f"no data at {root!r}: expected `shapes`, `cifar10`, `cifar100` or a folder{EXPECTED_TREE}")
    train, val = os.path.join(root, "train"), os.path.join(root, "val")
    if os.path.isdir(train) and os.path.isdir(val):
        return (train if split == "train" else val), None
    if os.path.isdir(val) and split != "train":
        return val, None
    return root, {"train": False, "val": True, "all": None}[split]


def image_files(root, name):
    """Paths of the images in class folder `name` and below, relative to root, in sorted order."""
    found = []
    for folder, _, files in os.walk(os.path.join(root, name), followlinks=True):
        found += [os.path.relpath(os.path.join(folder, f), root) for f in files if f.lower().endswith(EXTENSIONS)]
    return sorted(found)


def read_image(path):
    """(3, H, W) uint8 RGB, or None if the file cannot be decoded.

    torchvision decodes JPEG and PNG to a tensor directly, faster than Pillow, which reads the rest. (Since 0.29 torchvision
    announces that its decoders will go, in favour of another package: then Pillow reads everything.)
    """
    try:
        image = torchvision.io.decode_image(path, mode="RGB")
        return image if image.dtype == torch.uint8 else v2.functional.to_dtype(image, torch.uint8, scale=True)
    except (RuntimeError, AttributeError):
        pass
    try:
        with Image.open(path) as image:
            return v2.functional.pil_to_tensor(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError):  # Pillow's words for a broken file
        return None


class TensorImages:
    """Images that are in memory already: images (N, 3, H, W) uint8 and labels (N,)."""

    def __init__(self, images, labels, classes, transform=None):
        self.images, self.labels, self.classes, self.transform = images, labels, list(classes), transform

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        """There is no file; a name for messages."""
        return f"image {index}"

    def __getitem__(self, index):
        image = self.images[index]
        return self.transform(image) if self.transform else image, int(self.labels[index]), -1


def open_cifar(spec, split, transform):
    """CIFAR-10 or -100 by torchvision, downloaded to data/ at the first use."""
    kind = torchvision.datasets.CIFAR10 if spec == "cifar10" else torchvision.datasets.CIFAR100
    try:
        cifar = kind("data", train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{spec} could not be downloaded ({str(error).splitlines()[0]}): without a network, place "
                         f"{kind.filename} in data/ by hand") from None
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
    """`count` pictures (N, 3, 32, 32) drawn from a seed; a longer set of the same seed begins with the same pictures.

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
    """(count, seed) of a split of `shapes` or `shapes:COUNT`: 16,000 to train on, 2,000 others to validate."""
    count = spec.partition(":")[2] or "16000"
    if not count.isdigit() or not 1 <= int(count) <= 100_000:
        raise ValueError(f"{spec!r} is no data set: expected `shapes` or `shapes:COUNT` with a count of 1 to 100000")
    return (int(count), 1) if split == "train" else (2000, 2)


def draw_shapes(generator, n=500):
    """n pictures: images (n, 3, 32, 32) uint8, masks (n, 32, 32) bool, factors."""
    def draw(low, high, *size):
        return torch.randint(low, high, (n, *size), generator=generator, dtype=torch.int32)

    shape, texture = draw(0, 4), draw(0, 4)
    row, column, radius = draw(12, 20), draw(12, 20), draw(10 * 256, 13 * 256)
    turn = draw(0, 7)
    colours = torch.rand(n, 8, generator=generator).argsort(dim=1, stable=True)[:, :3]  # object, its texture, background: all different

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


# ---------------------------------------------------------------- counting


def eval_transform(image_size, crop_ratio):
    """Resize the short side to image_size / crop_ratio (bicubic), then the centre square: 256 and 224 for ImageNet."""
    resize = round(image_size / crop_ratio)
    return v2.Compose([v2.Resize(resize, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(image_size)])


def normalize(images, mean, std):
    """uint8 (B, 3, S, S) on any device -> float32, (pixel / 255 - mean) / std per colour."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    return (images.float() / 255 - mean) / std


def autocast(device, dtype):
    """The autocast context of a run: on for bfloat16, off for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def best_dtype(device):
    """bfloat16 on a GPU that computes in it, else float32. (A CPU would only emulate it, or gain little.)"""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def match_classes(names, classes):
    """For each class name of a data set its position among the checkpoint's classes. ValueError names the unmatched."""
    position = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in names if name not in position]
    if unknown:
        raise ValueError(f"{len(unknown)} of {len(names)} classes of the data are unknown to the checkpoint "
                         f"({', '.join(unknown[:3])}, ...): it knows {', '.join(classes[:3])}, ...")
    return [position[name] for name in names]


def auto_workers(dataset, world=1):
    """Processes to load images with: none if they are in memory, else this process's share of the processors, at most 12."""
    return 0 if isinstance(dataset, TensorImages) else min(12, max(1, (os.cpu_count() or 1) // world))


def eval_loader(dataset, batch_size, workers, device):
    """Batches of this process's share of a data set: every world-th image, so that each is counted exactly once.

    (DistributedSampler would repeat images until the shares are equal, and count those twice.)
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return DataLoader(dataset, batch_size, sampler=range(rank, len(dataset), world), num_workers=workers,
                      pin_memory=device.type == "cuda", persistent_workers=workers > 0)


@torch.no_grad()
def evaluate(model, loader, device, mean, std, columns=None, dtype=torch.float32, progress=False):
    """Count over a loader of eval_loader(): dict(images, top1, top5 in percent, loss = mean cross-entropy).

    columns: for each class of the data its column of the logits, from match_classes(); the prediction is made among
    these only. None: the classes are the model's own. With fewer than 5 classes top5 is top-all, 100.
    Under torchrun each process counts its share and the sums are added at the end. Raises ValueError at the first image
    that cannot be read. The model is left in the mode it came in.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, top-1, top-5, loss
    for images, labels, unreadable in tqdm(loader, desc="evaluate", unit="batch", leave=False,
                                           disable=None if progress else True):
        if (unreadable >= 0).any():
            raise ValueError(f"cannot read {loader.dataset.path(int(unreadable.max()))}: an accuracy without this image "
                             f"would not be comparable; repair or remove the file")
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast(device, dtype):
            logits = model(normalize(images, mean, std)).float()
        logits = logits if columns is None else logits[:, columns]
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
        hits = best == labels.unsqueeze(1)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([torch.tensor(len(labels), device=device), hits[:, 0].sum(), hits.sum(), loss])
    if dist.is_initialized():
        dist.all_reduce(sums)
    images, top1, top5, loss = sums.tolist()
    model.train(was_training)
    return dict(images=int(images), top1=100 * top1 / images, top5=100 * top5 / images, loss=loss / images)


# ---------------------------------------------------------------- command line


def parse_args():
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint of train.py on a data set.")
    parser.add_argument("checkpoint", help="a file such as runs/convnext_nano-shapes-1/best.pt")
    parser.add_argument("--data", required=True, help="shapes, cifar10, cifar100 or a folder")
    parser.add_argument("--split", choices=("train", "val", "all"), default="all",
                        help="of a folder without val/: all of it, or the fifth that training holds out (default: all)")
    parser.add_argument("--raw", action="store_true", help="the plain weights, where the checkpoint has averaged ones (EMA)")
    parser.add_argument("--batch-size", type=int, default=128, help="images at a time (default: 128)")
    parser.add_argument("--workers", type=int, help="processes that load images (default: 0 if in memory, else up to 12)")
    parser.add_argument("--json", help="write the result to this file, too")
    return parser.parse_args()


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, checkpoint = load_checkpoint(args.checkpoint, device, args.raw)
    dataset = open_dataset(args.data, args.split, eval_transform(checkpoint["image_size"], checkpoint["crop_ratio"]))
    columns = match_classes(dataset.classes, checkpoint["classes"])
    workers = auto_workers(dataset) if args.workers is None else args.workers
    loader = eval_loader(dataset, args.batch_size, workers, device)
    result = evaluate(model, loader, device, checkpoint["mean"], checkpoint["std"], columns, best_dtype(device), True)

    total, active = count_parameters(model)
    print(f"{'model':<16}{'params M':>9}{'active M':>10}{'images':>8}{'top-1 %':>9}{'top-5 %':>9}{'loss':>8}")
    print(f"{checkpoint['config']['model']:<16}{total / 1e6:>9.2f}{active / 1e6:>10.2f}{result['images']:>8}"
          f"{result['top1']:>9.2f}{result['top5']:>9.2f}{result['loss']:>8.4f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(checkpoint=args.checkpoint, data=args.data, params=total, active=active, **result), file, indent=1)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
