"""Train a dense or sparse image classifier, on a laptop or under torchrun.

    python train.py                                            a sparse ConvNeXt on the embedded data, about 1 minute
    python train.py --data FOLDER --model vit_nano             your own images, one folder per class
    torchrun --nproc-per-node=8 train.py --data /imagenet --model vit_s --moe-layers every2 --experts 8 --k 2

Results go to runs/<model>-<data>-<number>/, or to --out DIR; a run named by --out continues by itself when started
again. There: last.pt and best.pt (checkpoints), log.jsonl (one line per epoch).

Every random draw depends only on the seed and on what it is for: an image's augmentation on (seed,
epoch, image); the mixing, noise and drop path of one process in one pass on (seed, step, its share
of the batch). There is no generator state to save, and neither the number of worker processes nor
an interruption changes a run: stopped by kill, Ctrl-C or a scheduler's SIGTERM and started again,
it ends with the weights of a run that was never interrupted.
"""

import argparse
import json
import math
import os
import pickle
import re
import shlex
import signal
import sys
import textwrap
import time
import warnings
from contextlib import nullcontext, suppress
from itertools import count
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

import convnext
import vit
from eval import (
    MEAN, STD, FolderImages, auto_workers, autocast, best_dtype, build_model, eval_loader,
    eval_transform, evaluate, fail, first_line, leave_signals, load_checkpoint, normalize, number,
    open_dataset, read_checkpoint, setup_processes, start_loader, together)
from moe import MoE, balance_loss, count_parameters

# ---------------------------------------------------------------- recipes
# One dictionary per model; a flag of the same name overrides an entry. `lr` holds for a global
# batch of `lr_batch` images and is scaled linearly with the batch.
#
# Placement, experts, k and ratio are the paper's own choice for each model. Its table of
# hyperparameters could not be obtained: router noise, capacity and balance weight are V-MoE's
# (Riquelme et al. 2021).

BASE = dict(
    moe_layers="last2", experts=8, expert_ratio=4, router="linear", router_noise=1.0,
    capacity_factor=1.05, balance_weight=0.005, loss="softmax", decay="cosine",
    layer_decay=1.0, head_scale=1.0)

# ImageNet-1k from scratch. ConvNeXt and DeiT augment with timm. Ours still differs from timm:
# - RandAugment has torchvision's 13 operations; timm has two more, Invert and SolarizeAdd.
# - Its magnitude is always the same; timm draws it, with a deviation of 0.5.
# - It samples bilinearly, timm bicubically; its Posterize keeps 4 bits, timm's 1 bit.
# - RandomErasing fills with the mean colour, timm's with noise.
IMAGENET = BASE | dict(
    epochs=300, weight_decay=0.05, clip_grad=0.0, label_smoothing=0.1, mixup=0.8, cutmix=1.0,
    randaug=9, erasing=0.25, crop_scale=0.08, flip=1, image_size=224, crop_ratio=0.875)

# Liu et al. 2022, TRAINING.md
CONVNEXT = IMAGENET | dict(
    experts=4, k=1, expert_ratio=2, lr=4e-3, lr_batch=4096, batch_size=4096, min_lr=1e-6,
    warmup_epochs=20, ema=0.9999)
CONVNEXT_ISO = CONVNEXT | dict(experts=8, expert_ratio=4, warmup_epochs=50)

# DeiT: Touvron et al. 2021, README_deit.md. Not here: repeated augmentation. DeiT reports its raw
# weights (`top1` in the log), never its EMA (`ema_top1`).
VIT = IMAGENET | dict(
    moe_layers="every2", k=2, lr=1e-3, lr_batch=1024, batch_size=1024, min_lr=1e-5,
    warmup_epochs=5, drop_path=0.1, ema=0.99996)

# V-MoE's S/32: Riquelme et al. 2021, their vmoe_s32_last2_ilsvrc2012_randaug_light1.py.
# Its published accuracy is no target for ours. It has what ours lacks: expert dropout 0.2, a tanh
# layer of 512 units before the head, a head that starts at 0 with bias -ln 1000, inputs in
# [-1, 1], routing in groups of 8 images. It trains on 99% of the images, and drops tokens by
# their position in the batch (ours: by their gate).
VMOE = IMAGENET | dict(
    k=2, lr=3e-3, lr_batch=8192, batch_size=8192, min_lr=1e-5, decay="linear",
    warmup_epochs=64.1,  # 10,000 steps
    weight_decay=0.1, clip_grad=1.0, loss="sigmoid", label_smoothing=0.0, mixup=0.2, cutmix=0.0,
    randaug=10, erasing=0.0, crop_scale=0.05, drop_path=0.0, ema=0.0)

# Ours, for 32-pixel images and a minute or two on a CPU: 5 to 50 epochs, for about `steps` steps.
NANO = BASE | dict(
    batch_size=64, lr_batch=64, min_lr=1e-5, warmup_epochs=1, weight_decay=0.05, clip_grad=1.0,
    label_smoothing=0.0, mixup=0.0, cutmix=0.0, randaug=0, erasing=0.0, crop_scale=1.0, flip=0,
    image_size=32, crop_ratio=1.0, capacity_factor=0.0, drop_path=0.0, ema=0.0)

RECIPES = dict(
    convnext_nano=NANO | dict(k=1, lr=4e-3, steps=1250),
    convnext_t=CONVNEXT | dict(drop_path=0.1),
    convnext_s=CONVNEXT | dict(drop_path=0.4),
    convnext_b=CONVNEXT | dict(drop_path=0.5),
    convnext_iso_s=CONVNEXT_ISO | dict(drop_path=0.1),
    convnext_iso_b=CONVNEXT_ISO | dict(drop_path=0.2),
    vit_nano=NANO | dict(k=2, lr=3e-3, steps=1750),
    vit_ti=VIT, vit_s=VIT, vit_b=VIT, vit_b32=VIT, vit_l=VIT,
    vmoe_s32=VMOE)

# Fine-tuning, with --init-from: published for weights from ImageNet-21k. Nano models keep their
# own recipe.

# TRAINING.md, "Fine-tune from ImageNet-22K". 8 experts of ratio 4: the paper's choice on 21k.
CONVNEXT_TUNE = CONVNEXT | dict(
    experts=8, expert_ratio=4, epochs=30, lr=5e-5, lr_batch=512, batch_size=512, warmup_epochs=0,
    weight_decay=1e-8, mixup=0.0, cutmix=0.0, ema=0.0, layer_decay=0.8, head_scale=0.001)

# DeiT III's line with AdamW (README_revenge.md). Its other one, lr 3e-4, is for LAMB.
VIT_TUNE = VIT | dict(
    epochs=20, lr=1e-5, lr_batch=512, batch_size=512, weight_decay=0.1, erasing=0.0,
    drop_path=0.2, crop_ratio=1.0)

FINE_TUNING = dict(
    convnext_t=CONVNEXT_TUNE | dict(drop_path=0.1),
    convnext_s=CONVNEXT_TUNE | dict(drop_path=0.2),
    convnext_b=CONVNEXT_TUNE | dict(drop_path=0.2),
    convnext_iso_s=CONVNEXT_TUNE | dict(drop_path=0.1, layer_decay=1.0),  # not published
    convnext_iso_b=CONVNEXT_TUNE | dict(drop_path=0.2, layer_decay=1.0),  # not published
    vit_ti=VIT_TUNE, vit_s=VIT_TUNE, vit_b=VIT_TUNE, vit_b32=VIT_TUNE,
    vit_l=VIT_TUNE | dict(drop_path=0.45),
    vmoe_s32=VIT_TUNE | dict(moe_layers="last2"))  # V-MoE fine-tunes with SGD

# The torchvision model whose weights fit, for --init-from torchvision.
TORCHVISION = dict(vit_b="vit_b_16", vit_b32="vit_b_32", vit_l="vit_l_16",
                   convnext_t="convnext_tiny", convnext_s="convnext_small", convnext_b="convnext_base")


def blocks(text):
    """Turn "3,5" into [3, 5], and leave a name such as every2 as it is."""
    return [int(i) for i in text.split(",")] if text[:1].isdigit() else text


def parse_args(argv=None):
    """The flags as a namespace; those that are not given and belong to a recipe are None."""
    parser = argparse.ArgumentParser(description="Train a dense or sparse image classifier. A flag that is not given has "
                                     "the value of the model's recipe (top of train.py).")
    flag = parser.add_argument
    whole, amount, share = number("[1, inf)", int), number("[0, inf)"), number("[0, 1]")
    flag("--data", default="shapes", help="shapes, shapes:COUNT, cifar10, cifar100 or a folder (default: shapes)")
    flag("--model", default="convnext_nano", help=f"one of {', '.join(RECIPES)} (default: convnext_nano)")
    flag("--out", help="folder of the run, continued if it holds one (default: a new runs/<model>-<data>-<number>)")
    flag("--init-from", help="start from `torchvision`'s ImageNet weights or a checkpoint of ours; a dense one is upcycled")
    flag("--freeze-backbone", action="store_true", help="train the head only (linear probe)")
    flag("--seed", type=number("[0, 4294967296)", int), default=0,
         help="start of all random draws (default: 0)")

    flag("--moe-layers", type=blocks,
         help="none, every2, last2, last3, stage, or block indices such as 3,5")
    flag("--experts", type=whole, help="experts E per MoE layer")
    flag("--k", type=whole, help="experts K per token")
    flag("--expert-ratio", type=number("[0.1, inf)"),
         help="hidden width of an expert, in units of the model's width")
    flag("--router", help="linear, cosine or l2")
    flag("--router-noise", type=amount,
         help="std of the training noise on the router's logits, in units of 1/E; 0 is off")
    flag("--capacity-factor", type=amount,
         help="slots per expert in training, in units of the even share; 0: no limit")
    flag("--balance-weight", type=amount, help="weight of the balance loss")

    flag("--epochs", type=whole)
    flag("--batch-size", type=whole, help="global: images per step over all processes")
    flag("--accumulate", type=whole, default=1,
         help="split each step's batch into this many passes (default: 1)")
    flag("--lr", type=amount,
         help="peak learning rate for this batch (default: the recipe's, scaled with the batch)")
    flag("--min-lr", type=amount, help="learning rate at the end")
    flag("--decay", choices=("cosine", "linear"), help="from the peak to the end")
    flag("--warmup-epochs", type=amount)
    flag("--weight-decay", type=amount)
    flag("--expert-weight-decay", type=amount,
         help="of the experts' weights (default: --weight-decay)")
    flag("--layer-decay", type=number("(0, 1]"),
         help="factor on the learning rate from a group of layers to the one below it "
         "(ConvNeXt T, S, B); 1 is off")
    flag("--head-scale", type=amount, help="scale of a head that starts fresh under --init-from")
    flag("--clip-grad", type=amount, help="largest norm of the gradient; 0 is off")
    flag("--ema", type=number("[0, 1)"),
         help="decay per step of the averaged weights, less at the start; 0 is off")
    flag("--drop-path", type=number("[0, 1)"), help="rate at the last block")
    flag("--loss", choices=("softmax", "sigmoid"), help="cross-entropy over the classes, or of each class for itself")
    flag("--label-smoothing", type=share)
    flag("--mixup", type=amount, help="alpha; 0 is off")
    flag("--cutmix", type=amount, help="alpha; 0 is off")
    flag("--randaug", type=number("[0, 10]", int),
         help="magnitude of RandAugment, 1 to 10; 0 is off")
    flag("--erasing", type=share, help="probability of erasing a rectangle")
    flag("--crop-scale", type=number("(0, 1]"),
         help="smallest part of an image's area that a training crop shows; 1: no random crop")
    flag("--flip", type=int, choices=(0, 1), help="1: mirror every other training image")
    flag("--image-size", type=whole, help="pixels")
    flag("--crop-ratio", type=number("(0, 1]"),
         help="image size over the size to which evaluation resizes before its centre crop")

    flag("--workers", type=number("[0, inf)", int),
         help="processes that load images, for each training process (default: 0 if the images "
         "are in memory, else its share of the processors, at most 12)")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on a GPU that has it")
    flag("--compile", action="store_true", help="torch.compile the model")
    flag("--save-every-minutes", type=number("[0, inf]"), default=30.0,
         help="also save within an epoch, this often (default: 30)")
    return parser.parse_args(argv)


def resolve(args):
    """The configuration of a run: the model's recipe, overridden by the flags. Plain values; ValueError if wrong."""
    if args.model not in RECIPES:
        raise ValueError(f"unknown model {args.model!r}: expected one of {', '.join(RECIPES)}")
    if args.freeze_backbone and not args.init_from:
        raise ValueError("--freeze-backbone trains the head only, on a random backbone: give --init-from, too")
    given = {name: value for name, value in vars(args).items() if value is not None}
    config = vars(args) | find_recipe(vars(args)) | given
    for name in ("lr", "batch_size", "epochs"):
        config[name] = given.get(name)  # None: fit_to_data() will settle it
    config["expert_weight_decay"] = given.get("expert_weight_decay", config["weight_decay"])
    if config["layer_decay"] != 1 and config["model"] not in LAYER_DECAYED:
        raise ValueError(f"--layer-decay {config['layer_decay']} is for {', '.join(LAYER_DECAYED)} "
                         f"only: leave it out, or give 1")
    return config


def find_recipe(config):
    """Return the recipe of config["model"]: with --init-from the one for fine-tuning, if any."""
    table = FINE_TUNING if config["init_from"] else RECIPES
    return table.get(config["model"], RECIPES[config["model"]])


def fit_to_data(config, num_images, world):
    """Settle batch size, learning rates, epochs and warm-up, in place in the config.

    num_images: those to train on. world: the number of processes. Raises ValueError if they do
    not fit together.
    """
    recipe, share = find_recipe(config), world * config["accumulate"]
    batch = config["batch_size"]
    if batch is None:  # the recipe's, or all images where there are fewer
        batch = min(recipe["batch_size"], num_images)
        batch = max(share, batch - batch % share)
    if batch % share:
        raise ValueError(f"--batch-size {batch} is not a multiple of {share} ({world} processes x {config['accumulate']} "
                         f"accumulation passes): use {max(share, batch - batch % share)}")
    if batch > num_images:
        raise ValueError(f"--batch-size {batch} is more than the {num_images} training images: use {num_images} or less")
    config["batch_size"] = batch
    if config["lr"] is None:
        config["lr"] = recipe["lr"] * batch / recipe["lr_batch"]
    if config["epochs"] is None:
        steps = recipe.get("steps", 0) / (num_images // batch)
        config["epochs"] = recipe.get("epochs") or min(50, max(5, round(steps)))
    config["min_lr"] = min(config["min_lr"], config["lr"])  # a rate only falls after its warm-up
    if config["warmup_epochs"] > config["epochs"]:
        if config["warmup_epochs"] != recipe["warmup_epochs"]:
            raise ValueError(f"--warmup-epochs {config['warmup_epochs']:g} is longer than the run "
                             f"of {config['epochs']} epochs: give fewer")
        config["warmup_epochs"] = config["epochs"] / 10  # the recipe's is for its own, longer run


def model_config(config, num_classes):
    """What eval.build_model needs to build this run's model again."""
    names = ("model", "moe_layers", "k", "expert_ratio", "router", "router_noise", "drop_path", "image_size")
    return {name: config[name] for name in names} | dict(
        num_classes=num_classes, num_experts=config["experts"], capacity_factor=config["capacity_factor"] or None)


# ---------------------------------------------------------------- data


def draw_seed(*numbers):
    """One 32-bit seed (an int) from several whole numbers, such as (seed, epoch, image)."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 0x9E3779B1 + number + 0x7F4A7C15) % 2 ** 32
    return mixed


def seed_draws(device, *numbers):
    """Start the draws of this process, on the CPU and its device, from several whole numbers."""
    # On a CPU torch.manual_seed() would also write down a stack trace, for the GPU that might come.
    seed = torch.manual_seed if device.type == "cuda" else torch.default_generator.manual_seed
    seed(draw_seed(*numbers))


def train_transform(config):
    """Augmentation of one image by the recipe: uint8 (3, H, W) -> uint8 (3, S, S)."""
    if config["crop_scale"] < 1:
        steps = [v2.RandomResizedCrop(config["image_size"], scale=(config["crop_scale"], 1.0),
                                      interpolation=v2.InterpolationMode.BICUBIC, antialias=True)]
    else:
        steps = [eval_transform(config["image_size"], config["crop_ratio"])]
    if config["flip"]:
        steps.append(v2.RandomHorizontalFlip())
    grey = [round(255 * mean) for mean in MEAN]  # the mean colour
    if config["randaug"]:
        # As timm's rand-m9-inc1: two operations, each with probability 1/2, magnitude 9 of 10.
        # One of torchvision's 14 operations is Identity, hence 7/13: 7/13 * 13/14 = 1/2.
        operation = v2.RandAugment(1, config["randaug"], num_magnitude_bins=11, fill=grey,
                                   interpolation=v2.InterpolationMode.BILINEAR)
        steps += [v2.RandomApply([operation], p=7 / 13)] * 2
    if config["erasing"]:
        steps.append(v2.RandomErasing(config["erasing"], value=grey))
    return v2.Compose(steps)


class Augmented:
    """A data set whose items are asked for by a key (epoch, index): the transform's draws depend on these two alone."""

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key):
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw_seed(self.seed, epoch, index))
            return self.dataset[index]


class Batches:
    """The order of the images: an iterable of lists of (epoch, index), what DataLoader calls a batch sampler.

    Each epoch is a permutation of all images, cut into steps of `batch_size`; the last, incomplete step is left out.
    A step is cut into world * accumulate shares. A process takes `accumulate` of them, one in each
    of its passes: so two passes of one process see the shares of two processes.
    Before iterating set .epoch, and .first_step to continue inside an epoch.
    """

    def __init__(self, num_images, batch_size, accumulate, seed, rank, world):
        self.num_images, self.batch_size, self.accumulate, self.seed = num_images, batch_size, accumulate, seed
        self.rank, self.world = rank, world
        self.epoch, self.first_step = 0, 0
        self.steps = num_images // batch_size  # per epoch

    def __len__(self):
        return (self.steps - self.first_step) * self.accumulate

    def __iter__(self):
        generator = torch.Generator().manual_seed(draw_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        steps = order[:self.steps * self.batch_size].split(self.batch_size)
        first = self.rank * self.accumulate
        for step in steps[self.first_step:]:
            shares = step.chunk(self.world * self.accumulate)
            for share in shares[first:first + self.accumulate]:
                yield [(self.epoch, int(index)) for index in share]


def make_mixer(config, num_classes):
    """MixUp or CutMix, by lot for each batch: (images, labels (B,)) -> (images, targets (B, num_classes)); or None."""
    mixers = [kind(alpha=config[name], num_classes=num_classes)
              for name, kind in (("mixup", v2.MixUp), ("cutmix", v2.CutMix)) if config[name]]
    return v2.RandomChoice(mixers) if mixers else None


# ---------------------------------------------------------------- optimisation


def start_from(model, config, classes=None):
    """Load the weights that --init-from names into the model. Return the names left fresh.

    Among them is the head, if the checkpoint's classes are not these. Raises ValueError if the
    weights do not fit, or if torchvision's weights cannot be had.
    """
    family = vit if isinstance(model, vit.ViT) else convnext
    if config["init_from"] == "torchvision":
        weights = family.from_torchvision(torchvision_weights(config["model"]))
    else:
        there, checkpoint = load_checkpoint(config["init_from"], "cpu")
        weights = there.state_dict()
        if classes not in (None, checkpoint["classes"]):  # as many, perhaps, but others
            weights |= {"head.weight": torch.empty(0), "head.bias": torch.empty(0)}
    if family is vit:
        weights = vit.resize_positions(weights, model)
    return upcycle(weights, model)


@torch.no_grad()
def upcycle(weights, model, exact=True):
    """Load the state dict of a model of the same backbone, dense or sparse, into a model.

    Where the weights have an MLP and the model has a MoE, each expert becomes this MLP, see
    experts_from_mlp. A head for another number of classes stays fresh. Returns the names left
    fresh. Raises ValueError that names the first tensor which does not fit; then nothing is loaded.
    """
    state, own = dict(weights), model.state_dict()
    fresh = []
    for name in ("head.weight", "head.bias"):
        if name in state and state[name].shape != own[name].shape:
            state[name] = own[name]
            fresh.append(name)
    for name, layer in model.named_modules():
        if isinstance(layer, MoE) and f"{name}.0.weight" in state:
            leaves = ("0.weight", "0.bias", "2.weight", "2.bias")
            mlp = {leaf: state.pop(f"{name}.{leaf}") for leaf in leaves}
            for key, value in experts_from_mlp(mlp, layer, exact).items():
                state[f"{name}.{key}"] = value
            skip = name.removesuffix("mlp") + "skip"  # the skip that a sparse ConvNeXt block adds
            if skip in own:
                state[skip] = torch.zeros(()) if exact else own[skip]
    for name in sorted(own.keys() | state.keys()):
        there = tuple(state[name].shape) if name in state else "missing"
        here = tuple(own[name].shape) if name in own else "missing"
        if there != here:
            raise ValueError(f"the weights do not fit the model: {name} is {there} in the weights, "
                             f"{here} in the model")
    model.load_state_dict(state)
    return fresh


def experts_from_mlp(mlp, layer, exact):
    """Return a state dict for a MoE layer whose experts are all copies of a dense MLP's weights.

    The k kept gates sum to less than 1, so copies alone would shrink the layer's output. exact=True
    makes the layer compute what the MLP does (in evaluation, without a capacity limit): with equal
    codes each gate is 1/E, k of them sum to k/E, and the last linear layer is multiplied by E/k.
    The router noise then separates the experts, so leave it on. exact=False only copies.
    """
    state = layer.state_dict()
    scale = layer.num_experts / layer.k if exact else 1.0
    for e in range(layer.num_experts):
        for leaf, weight in mlp.items():
            state[f"experts.{e}.{leaf}"] = scale * weight if leaf.startswith("2.") else weight
    if exact:
        state["router.codes"] = state["router.codes"][:1].expand_as(state["router.codes"])
    return state


def torchvision_weights(name):
    """torchvision's ImageNet weights for our model of that name, a state dict, from its cache or the network."""
    if name not in TORCHVISION:
        raise ValueError(f"torchvision has no weights for {name}: expected one of {', '.join(TORCHVISION)}")
    weights = torchvision.models.get_model_weights(TORCHVISION[name]).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        place = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
        raise ValueError(f"torchvision's weights for {name} cannot be loaded ({str(error).splitlines()[0]}): download "
                         f"{weights.url} by hand and place it at {place}") from None


def classification_loss(logits, targets, config):
    """Return the cross-entropy of logits (B, C) with targets, a scalar: the mean over the images.

    targets: labels (B,), or mixed probabilities (B, C), C classes. Label smoothing s moves them to
    (1 - s) * targets + s / C.
    --loss softmax: the classes exclude each other. --loss sigmoid (V-MoE): each class is a yes or
    no of its own, summed over the classes.
    """
    smoothing = config["label_smoothing"]
    if config["loss"] == "softmax":
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)
    B, C = logits.shape
    if targets.ndim == 1:
        targets = F.one_hot(targets, C)  # (B,) -> (B, C)
    targets = (1 - smoothing) * targets + smoothing / C
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / B


LAYER_DECAYED = ("convnext_t", "convnext_s", "convnext_b")  # the models that layer_group() knows


def layer_group(name):
    """Return the group, 0 to 13, of a parameter of ConvNeXt T, S or B, by its name.

    0 is the stem, 1 and 2 the first two stages, 3 to 11 three blocks each of the third stage, 12
    the last stage, 13 the norm and the head. What downsamples belongs to the stage that follows,
    or to its first group. As get_num_layer_for_convnext in the official optim_factory.py. (T has 9
    blocks in its third stage: its groups 6 to 11 are empty.)
    """
    part, *indices = name.split(".")
    if part == "stem":
        return 0
    if part == "downsample":
        return (2, 3, 12)[int(indices[0])]
    if part == "stages":
        stage, block = int(indices[0]), int(indices[1])
        return (1, 2, 3 + block // 3, 12)[stage]
    return 13


def parameter_groups(model, weight_decay, expert_weight_decay, layer_decay=1.0):
    """Return a model's parameters in groups for the optimizer, a list of dicts.

    Keys: params, weight_decay, and lr_scale, by which train_step() multiplies the learning rate.
    weight_decay holds for weight matrices and convolutions, expert_weight_decay for the experts'
    matrices, 0 for the rest: norms, biases, layer scale, embeddings, router temperatures.
    layer_decay: the head has the whole learning rate, each group of layers below it (see
    layer_group) this share of the one above. The first dict of the list has lr_scale 1.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name in ("pos_embed", "class_token"):
            decay = 0.0
        elif ".experts." in name:
            decay = expert_weight_decay
        else:
            decay = weight_decay
        scale = layer_decay ** (13 - layer_group(name))
        group = dict(params=[], weight_decay=decay, lr_scale=scale)
        groups.setdefault((scale, decay), group)["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: group["lr_scale"], reverse=True)


def learning_rate(step, steps_per_epoch, config):
    """The rate of optimizer step `step`: linear warmup to the peak, then half a cosine or a line to the minimum.

    Steps count from 0 through the whole run, steps_per_epoch in each epoch. The last step of the warmup has the peak, the
    last step of the run the minimum.
    """
    total, warmup = config["epochs"] * steps_per_epoch, round(config["warmup_epochs"] * steps_per_epoch)
    if step < warmup:
        return config["lr"] * (step + 1) / warmup
    progress = (step + 1 - warmup) / max(1, total - warmup)
    left = 1 - progress if config["decay"] == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config["min_lr"] + (config["lr"] - config["min_lr"]) * left


def ema_decay(step, decay):
    """Decay of the averaged weights at optimizer step `step`, counted from 0: min(decay, (1 + step) / (10 + step)), a float.

    So they always average over about the last ninth of the run. With a decay of 0.9999 from the start a run of 1,000 steps
    would end with nine tenths of its random start; at the end of a published recipe the ramp makes no difference.
    """
    return min(decay, (1 + step) / (10 + step))


# ---------------------------------------------------------------- runs and checkpoints


FREE_TO_CHANGE = {"out", "workers", "save_every_minutes"}  # when a run is continued


def claim_folder(config):
    """Make the folder of this run and open its log.jsonl: (path, file). ValueError if impossible.

    While this process lives the log is locked: no second run can write here. Without --out each run
    makes a folder of its own; of several that start at once only one can make the same.
    """
    name = os.path.basename(os.path.normpath(config["data"])).replace(":", "-")
    numbered = (f"runs/{config['model']}-{name}-{i}" for i in count(1))
    try:
        for folder in [config["out"]] if config["out"] else numbered:
            with suppress(FileExistsError):
                os.makedirs(folder, exist_ok=folder == config["out"])
                break
        log = open(os.path.join(folder, "log.jsonl"), "a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error}): give another --out") from None
    try:
        import fcntl
        # A POSIX lock ends with this process, even if it is killed. Loaders do not inherit it.
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{folder} is in use by another run: give another --out") from None
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks
    return folder, log


def open_last(run):
    """Read the checkpoint with which the run in run.folder continues. None if it is a new run.

    ValueError if the file cannot be read, or is from another configuration or other images.
    """
    last, best = (os.path.join(run.folder, name) for name in ("last.pt", "best.pt"))
    if not os.path.exists(last) and not os.path.exists(best):
        return None
    try:
        checkpoint = read_checkpoint(last, "cpu")
    except ValueError as error:
        raise ValueError(f"{error}; to continue from the best epoch copy {best} to {last}, "
                         f"if it is there, or give another --out") from None
    differing = compare_data(checkpoint.get("data"), run.train_set.fingerprint())
    if differing:
        raise ValueError(f"the training images are not those of the run in {run.folder} "
                         f"({differing}): restore them to continue it, or give another --out")
    there, free = checkpoint["args"], FREE_TO_CHANGE
    if isinstance(run.train_set, FolderImages):
        free = free | {"data"}  # it may have moved: the images count
    differing = [f"--{name.replace('_', '-')} {there.get(name)} there, {now} now"
                 for name, now in run.config.items() if name not in free and there.get(name) != now]
    if differing:
        raise ValueError(f"{run.folder} holds a run of another configuration "
                         f"({'; '.join(differing)}): give the same options to continue it, or "
                         f"another --out")
    return checkpoint


def compare_data(then, now):
    """Say in words how two fingerprints of data sets differ. "" if they do not, or one is None."""
    if not then or then == now:
        return ""
    before, after = set(then["classes"]), set(now["classes"])
    words = [f"class {name} is gone" for name in sorted(before - after)[:3]]
    words += [f"class {name} is new" for name in sorted(after - before)[:3]]
    counts = sum(then["images"]), sum(now["images"])
    if counts[0] != counts[1]:
        words.append(f"{counts[0]} images then, {counts[1]} now")
    return ", ".join(words) or "as many images, with other names"


def make_checkpoint(run):
    """Return the run as a dict of plain values and tensors.

    epoch: how many are trained. line: what sum_up() said of the last, if it is not validated yet.
    """
    config = run.config
    return dict(
        config=model_config(config, len(run.train_set.classes)), classes=run.train_set.classes,
        image_size=config["image_size"], crop_ratio=config["crop_ratio"], mean=MEAN, std=STD,
        model=run.model.state_dict(), ema=run.ema.module.state_dict() if run.ema else None,
        optimizer=run.optimizer.state_dict(), epoch=run.epoch, step=run.step, best=run.best,
        args=config, line=run.line, data=run.train_set.fingerprint())


def restore(run, checkpoint):
    """Put a run where its checkpoint was made. Everything is copied: its file can be closed."""
    run.model.load_state_dict(checkpoint["model"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    for parameter, state in run.optimizer.state.items():
        for name, value in state.items():
            # In the memory layout of the parameter, as AdamW expects. The checkpoint may have
            # another: a ConvNeXt is channels_last on a GPU only.
            like = parameter if value.shape == parameter.shape else value
            state[name] = torch.empty_like(like).copy_(value)
    if run.ema:
        run.ema.module.load_state_dict(checkpoint["ema"])
        run.ema.n_averaged.fill_(checkpoint["step"])
    run.epoch, run.step, run.best = checkpoint["epoch"], checkpoint["step"], checkpoint["best"]
    run.line = checkpoint.get("line")


def write_checkpoint(checkpoint, path):
    """Write a checkpoint to path. Raise ValueError if that is impossible.

    It goes into a temporary file, to the disk, and is renamed: the old or the new file is complete.
    """
    try:
        with open(path + ".tmp", "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            os.remove(path + ".tmp")
        reason = first_line(error.__context__ or error)
        raise ValueError(f"cannot write {path} ({reason})") from None


def save(run, *names):
    """Write the run's checkpoint to the files of these names, by rank 0, while the others wait.

    If the disk is full the old file stays, run.unsaved is set, and the run goes on: the next save
    may have more luck. FloatingPointError if a weight is not finite: then nothing is written.
    """
    weights = [*run.model.parameters(), *(run.ema.parameters() if run.ema else [])]
    if not torch.nn.utils.get_total_norm(weights).isfinite():
        raise FloatingPointError(f"weights are not finite after step {run.step}; {advise(run)}")
    if run.rank == 0:
        run.unsaved = False
        for name in names:
            try:
                write_checkpoint(make_checkpoint(run), os.path.join(run.folder, name))
            except ValueError as error:
                run.unsaved = True
                tqdm.write(f"warning: {error}; the old file is untouched", file=sys.stderr)
    run.saved_at = time.monotonic()
    if run.world > 1:
        dist.barrier()


def advise(run):
    """Say what to do when something is not finite: the end of an error message."""
    last = os.path.join(run.folder, "last.pt")
    return (f"nothing of this step was saved, the last good checkpoint is {last}; "
            f"try a smaller --lr, --clip-grad 1 or --dtype float32")


def cut_log(log, epoch):
    """Leave in an open log.jsonl the whole lines up to an epoch. Later ones will come again."""
    log.seek(0)
    lines, kept = log.readlines(), []
    for line in lines:
        whole = re.fullmatch(r'{"epoch": (\d+),.*}\n', line)  # as write_log() makes them
        if whole and int(whole[1]) <= epoch:
            kept.append(line)
    if kept != lines:
        log.truncate(0)
        log.writelines(kept)
        log.flush()


def write_log(run, line):
    """Append an epoch's line to log.jsonl."""
    try:
        print(json.dumps(line), file=run.log, flush=True)
    except OSError as error:
        tqdm.write(f"warning: cannot write log.jsonl ({error})", file=sys.stderr)


# ---------------------------------------------------------------- the run


def open_data(config):
    """(training set, validation set), their classes checked to be the same."""
    train = open_dataset(config["data"], "train", train_transform(config))
    val = open_dataset(config["data"], "val", eval_transform(config["image_size"], config["crop_ratio"]))
    differing = sorted(set(train.classes) ^ set(val.classes))
    if differing:
        raise ValueError(f"train and val of {config['data']} have different classes; only one of them has "
                         f"{', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''}")
    return train, val


def count_routing(routings, num_experts):
    """The routings of L MoE layers as (L, E + 1) int64, E = num_experts: choices per expert, before any is dropped, and in
    the last column the number of dropped ones."""
    rows = [torch.cat([(r.experts.reshape(-1, 1) == torch.arange(num_experts, device=r.experts.device)).sum(0),
                       (~r.kept).sum().view(1)]) for r in routings]
    return torch.stack(rows) if rows else torch.zeros(0, num_experts + 1, dtype=torch.int64)


def prepare(args):
    """Settle everything a run needs: a namespace. Raises ValueError for whatever is wrong.

    No file is written before all options and data were found to be right.
    """
    rank, world, device = setup_processes()
    warnings.filterwarnings("ignore", "Grad strides do not match")  # DDP's word on depthwise convolutions: harmless
    run = SimpleNamespace(rank=rank, world=world, device=device, epoch=0, step=0, best=None,
                          line=None, unreadable=set(), signal=0, stop=0, unsaved=False,
                          saved_at=time.monotonic())
    with together():
        config = run.config = resolve(args)
        run.dtype = best_dtype(device)
        if config["dtype"] != "auto":
            run.dtype = getattr(torch, config["dtype"])
        run.train_set, run.val_set = open_data(config)
        fit_to_data(config, len(run.train_set), world)
        torch.manual_seed(config["seed"])
        run.model = build_model(model_config(config, len(run.train_set.classes)))
        # On a GPU, in this layout, a ConvNeXt's permutes cost nothing.
        nhwc = device.type == "cuda" and isinstance(run.model, convnext.ConvNeXt)
        run.layout = torch.channels_last if nhwc else torch.contiguous_format
        run.model.to(device, memory_format=run.layout)
        with torch.no_grad():
            for parameter in run.model.head.parameters():
                parameter.mul_(config["head_scale"])  # --init-from may have a head for these classes
        continued = config["out"] and os.path.exists(os.path.join(config["out"], "last.pt"))
        start = config["init_from"] and not continued
        run.fresh = start_from(run.model, config, run.train_set.classes) if start else []
    if config["freeze_backbone"]:
        run.model.requires_grad_(False)
        run.model.head.requires_grad_(True)

    workers = auto_workers(run.train_set, world) if config["workers"] is None else config["workers"]
    run.batches = Batches(len(run.train_set), config["batch_size"], config["accumulate"], config["seed"], rank, world)
    run.loader = DataLoader(Augmented(run.train_set, config["seed"]), batch_sampler=run.batches, num_workers=workers,
                            pin_memory=device.type == "cuda", persistent_workers=workers > 0,
                            worker_init_fn=leave_signals)
    per_pass = max(1, config["batch_size"] // world // config["accumulate"])
    run.val_loader = eval_loader(run.val_set, per_pass, workers, device)
    run.mixer = make_mixer(config, len(run.train_set.classes))
    decays = (config[name] for name in ("weight_decay", "expert_weight_decay", "layer_decay"))
    run.optimizer = torch.optim.AdamW(parameter_groups(run.model, *decays),
                                      betas=(0.9, 0.999), eps=1e-8, fused=True)
    average = lambda ema, now, _: get_ema_multi_avg_fn(ema_decay(run.step, config["ema"]))(ema, now, _)  # noqa: E731
    run.ema = AveragedModel(run.model, multi_avg_fn=average) if config["ema"] else None
    find_folder(run)
    run.first_epoch = run.epoch
    run.net = DistributedDataParallel(run.model) if world > 1 else run.model
    run.net = torch.compile(run.net) if config["compile"] else run.net
    return run


def find_folder(run):
    """Settle where all processes write the run, and continue the run that is there."""
    data = [run.train_set.fingerprint(), run.val_set.fingerprint()]
    found = [None, data]
    with together():
        if run.rank == 0:
            found[0], run.log = claim_folder(run.config)
    if run.world > 1:
        dist.broadcast_object_list(found)  # rank 0 decides for all
    run.folder = found[0]
    with together():
        differing = [compare_data(*pair) for pair in zip(found[1], data)]
        if any(differing):
            raise ValueError(f"{run.config['data']} is not the same as that of process 0 "
                             f"({max(differing)})")
        checkpoint = open_last(run)
        if checkpoint:
            restore(run, checkpoint)
        if run.rank == 0:
            cut_log(run.log, run.epoch - bool(run.line))
            trial = os.path.join(run.folder, "trial.pt")  # a full disk is found now
            write_checkpoint(make_checkpoint(run), trial)
            os.remove(trial)


def train_step(run, parts):
    """One optimizer step on the next batch, a loader's next `accumulate` parts; adds its numbers to run.progress."""
    config, accumulate = run.config, run.config["accumulate"]
    for group in run.optimizer.param_groups:
        group["lr"] = group["lr_scale"] * learning_rate(run.step, run.batches.steps, config)
    losses = torch.zeros(2, device=run.device)  # cross-entropy, balance
    for part in range(accumulate):
        waiting = time.perf_counter()
        images, labels, unreadable = next(parts)
        run.progress["wait"] += time.perf_counter() - waiting
        report_unreadable(run, unreadable)
        images = normalize(images.to(run.device, non_blocking=True), MEAN, STD).contiguous(memory_format=run.layout)
        targets = labels.to(run.device, non_blocking=True)
        share = run.rank * accumulate + part  # of the step's images, as in Batches
        seed_draws(run.device, config["seed"], run.step, share)  # mixing, noise, drop path: its own
        if run.mixer:
            images, targets = run.mixer(images, targets)
        send = run.world == 1 or part == accumulate - 1  # DDP averages the gradients over the processes once per step
        with nullcontext() if send else run.net.no_sync():
            with autocast(run.device, run.dtype):
                logits, routings = run.net(images, return_routing=True)
            loss = classification_loss(logits.float(), targets, config)
            balance = balance_loss(routings).to(run.device)
            ((loss + config["balance_weight"] * balance) / accumulate).backward()
        losses += torch.stack([loss.detach(), balance.detach()]) / accumulate
        run.progress["routed"] += count_routing(routings, config["experts"]).to(run.device)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config["clip_grad"] or math.inf)
    agree(run, losses, norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.ema:
        run.ema.update_parameters(run.model)
    run.step += 1
    run.progress["losses"] += losses


def agree(run, losses, norm):
    """Share three flags across all processes: a loss or gradient that is not finite, a signal to
    stop, and whether it is time to save. Called before the optimizer step, so that all act alike.

    losses (2,), norm: of the gradient. Sets run.stop and run.save_now. Raises FloatingPointError.
    """
    minutes = (time.monotonic() - run.saved_at) / 60
    flags = torch.tensor([0.0, run.signal, minutes >= run.config["save_every_minutes"]], device=run.device)
    flags[0] = ~(losses.isfinite().all() & norm.isfinite())
    if run.world > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    broken, run.stop, run.save_now = (int(flag) for flag in flags.tolist())
    if broken:
        raise FloatingPointError(
            f"loss or gradient is not finite at step {run.step} (epoch {run.epoch + 1}): "
            f"cross-entropy {losses[0].item():.4g}, balance {losses[1].item():.4g}, "
            f"norm of the gradient {norm.item():.4g}, lr {run.optimizer.param_groups[0]['lr']:.3g}; "
            f"{advise(run)}")


def train_epoch(run):
    """Train to the end of the epoch, from where it was left. Return what sum_up() says of it.

    After a signal it saves and returns None. The losses are means over the steps since the run was
    started or continued.
    """
    layers, first = len(run.model.moe_blocks), run.step - run.epoch * run.batches.steps
    run.progress = dict(
        losses=torch.zeros(2, dtype=torch.float64, device=run.device), wait=0.0,
        routed=torch.zeros(layers, run.config["experts"] + 1, dtype=torch.int64, device=run.device))
    run.batches.epoch, run.batches.first_step = run.epoch, first
    run.net.train(not run.config["freeze_backbone"])  # frozen, it works as in evaluation: no noise, no drop path
    parts = start_loader(run.loader)
    begin = time.perf_counter()
    for _ in tqdm(range(first, run.batches.steps), desc=f"epoch {run.epoch + 1}", unit="step", leave=False,
                  initial=first, total=run.batches.steps, disable=None if run.rank == 0 else True):
        train_step(run, parts)
        if run.stop or run.save_now:
            save(run, "last.pt")
        if run.stop:
            return None
    return sum_up(run, run.batches.steps - first, time.perf_counter() - begin)


def sum_up(run, steps, seconds):
    """Return the training half of an epoch's line for the log: a dict, means over `steps` steps."""
    losses, routed = run.progress["losses"] / steps / run.world, run.progress["routed"]
    unreadable = torch.tensor(len(run.unreadable), device=run.device)
    if run.world > 1:
        for numbers in (losses, routed, unreadable):
            dist.all_reduce(numbers)
    choices, dropped = routed[:, :-1].double(), routed[:, -1]
    loss, balance = losses.tolist()
    lr = run.optimizer.param_groups[0]["lr"]
    return dict(epoch=run.epoch + 1, step=run.step, lr=lr, train_loss=loss, balance_loss=balance,
                images_per_s=steps * run.config["batch_size"] / seconds,
                data_wait=run.progress["wait"] / seconds, seconds=seconds,
                dropped=(dropped.sum() / choices.sum().clamp(min=1)).item(), unreadable=unreadable.item(),
                load=(choices / choices.sum(1, keepdim=True)).tolist())


def validate_epoch(run):
    """Evaluate the weights, and the averaged ones. Return the other half of the epoch's line.

    After a signal it is None. FloatingPointError if a loss is not finite; last.pt is then renamed.
    """
    line = {}
    for prefix, model in (("", run.model), ("ema_", run.ema and run.ema.module)):
        if model is None:
            break
        val = evaluate(model, run.val_loader, run.device, MEAN, STD, dtype=run.dtype,
                       loss=run.config["loss"], stop=lambda: run.signal)
        if val is None:
            run.stop = run.signal or signal.SIGTERM  # which another process got
            return None
        if not math.isfinite(val["loss"]):
            last, bad = (os.path.join(run.folder, name) for name in ("last.pt", "not_finite.pt"))
            if run.rank == 0 and os.path.exists(last):
                os.replace(last, bad)
            raise FloatingPointError(
                f"the validation loss after epoch {run.epoch} is {val['loss']}: "
                f"last.pt is now {bad}; to continue from the best epoch, if there is one, copy best.pt to last.pt")
        line[f"{prefix}val_loss"] = val["loss"]
        line[f"{prefix}top1"], line[f"{prefix}top5"] = val["top1"], val["top5"]
    return line


def report_unreadable(run, indices):
    """Name each image that could not be read, once."""
    for index in set(indices.tolist()) - run.unreadable - {-1}:
        run.unreadable.add(index)
        tqdm.write(f"warning: cannot read {run.train_set.path(index)}: the next image takes its place", file=sys.stderr)


def paper_row(config):
    """Return in words what the paper reports for this configuration, or None if it does not.

    Its Table 1: trained from scratch on ImageNet-1k, at 224 pixels, with the linear router.
    """
    model = model_config(config, num_classes=1000)
    if config["init_from"] or config["image_size"] != 224:
        return None
    for name, preset, options, *_, top1, _ in vit.TABLE + convnext.TABLE:
        if preset.__name__ == model["model"] and options.items() <= model.items():
            words = f"{name} of Table 1: {top1}% on ImageNet-1k"
            if name in vit.TABLE_9:
                words += f"; {vit.TABLE_9[name]}% with DeiT's recipe, which is ours (Table 9)"
            return words
    return None


def print_summary(run):
    """Print what was chosen, and what follows from it: a row per subject."""
    config, blocks = run.config, run.model.moe_blocks
    total, active = (count / 1e6 for count in count_parameters(run.model))
    recipe = find_recipe(config)
    per_pass = config["batch_size"] // run.world // config["accumulate"]

    model = f"{config['model']}, dense"
    if blocks:
        model = (f"{config['model']}, {config['experts']} experts, top {config['k']}, "
                 f"in blocks {blocks}")
    start = None
    if config["init_from"]:
        start = f"from {config['init_from']}, fresh: {', '.join(run.fresh) or 'nothing'}"
    warmup = f"warm-up {config['warmup_epochs']:g} epochs"
    if recipe["warmup_epochs"] > config["epochs"]:
        warmup += f" (the recipe's {recipe['warmup_epochs']:g} are longer than this run)"
    values = [f"{name} {config[name]}" for name in sorted(recipe) if name in config]

    rows = dict(
        data=f"{config['data']}: {len(run.train_set)} images to train on, {len(run.val_set)} to "
             f"validate, {len(run.train_set.classes)} classes",
        model=model,
        start=start,
        paper=paper_row(config),
        parameters=f"{total:.2f}M, active per token {active:.2f}M",
        batch=f"{config['batch_size']} = {run.world} process(es) x {config['accumulate']} pass(es) "
              f"x {per_pass}",
        schedule=f"{config['epochs']} epochs x {run.batches.steps} steps, "
                 f"peak lr {config['lr']:.3g}, {warmup}",
        machine=f"{run.device}, {str(run.dtype).removeprefix('torch.')}",
        results=f"{run.folder}/",
        recipe=textwrap.fill(", ".join(values), 98, subsequent_indent=12 * " "))
    for subject, words in rows.items():
        if words:
            print(f"{subject:<12}{words}")


def print_result(run):
    """The last lines: how good it got, and what to do with it."""
    best, data = os.path.join(run.folder, "best.pt"), run.config["data"]
    no_val = getattr(run.train_set, "root", None) == data  # a folder of class folders
    held_out = " --split val" if no_val else ""
    print(f"best top-1  {run.best['top1']:.2f}% in epoch {run.best['epoch']}")
    if not os.path.exists(best):
        return
    print(f"evaluate    python eval.py {shlex.quote(best)} --data {shlex.quote(data)}{held_out}")
    if run.model.moe_blocks:
        out = os.path.join(run.folder, "inspect")
        print(f"inspect     python inspect_experts.py {shlex.quote(best)} "
              f"--data {shlex.quote(data)}{held_out} --out {shlex.quote(out)}")


def print_epoch(run, line):
    """One aligned line per epoch, and once a warning if the data come too slowly."""
    if run.epoch == run.first_epoch + 1:
        print(f"{'epoch':>9}{'loss':>9}{'balance':>9}{'val loss':>10}{'top-1 %':>9}{'top-5 %':>9}"
              + f"{'EMA top-1':>11}" * bool(run.ema) + f"{'images/s':>10}{'data wait':>11}")
    print(f"{line['epoch']:>5}/{run.config['epochs']:<3}{line['train_loss']:>9.4f}{line['balance_loss']:>9.3f}"
          f"{line['val_loss']:>10.4f}{line['top1']:>9.2f}{line['top5']:>9.2f}"
          + (f"{line['ema_top1']:>11.2f}" if run.ema else "")
          + f"{line['images_per_s']:>10.0f}{line['data_wait']:>11.0%}", flush=True)
    if line["data_wait"] > 0.2 and run.epoch == run.first_epoch + 1:
        print(f"warning: {line['data_wait']:.0%} of the time went into waiting for data; more --workers (now "
              f"{run.loader.num_workers}) or smaller image files help", file=sys.stderr)


class Output:
    """A stream to print to, line by line.

    If nobody reads it any more, or its disk is full, the run goes on in silence.
    """

    def __init__(self, stream):
        # backslashes: for names that the stream cannot encode
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
        self.stream = stream

    def write(self, text):
        try:
            self.stream.write(text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def main(args):
    """Prepare, then for each epoch train, save, validate, log. A signal exits with 128 + signal."""
    run = prepare(args)
    if run.rank == 0:
        print_summary(run)
        if run.step:
            finished = run.epoch >= run.config["epochs"] and not run.line
            state = "finished" if finished else "continuing"
            print(f"{state} after epoch {run.epoch}, step {run.step}")
    for name in (signal.SIGTERM, signal.SIGINT):
        # Finish the step, save, exit.
        signal.signal(name, lambda name, frame: setattr(run, "signal", name))
    while run.line or run.epoch < run.config["epochs"]:
        if not run.line:  # else the last epoch was trained, but not validated
            run.line = train_epoch(run)
            if run.stop:
                break
            run.epoch += 1
            save(run, "last.pt")  # before anything else can go wrong
        validation = validate_epoch(run)
        if run.stop:
            break
        line, run.line = run.line | validation, None
        top1 = line.get("ema_top1", line["top1"])
        improved = run.best is None or top1 > run.best["top1"]
        if improved:
            run.best = dict(top1=top1, epoch=run.epoch)
        if run.rank == 0:
            write_log(run, line)
        save(run, *(["best.pt", "last.pt"] if improved else ["last.pt"]))
        if run.rank == 0:
            print_epoch(run, line)
    run.loader = run.val_loader = None  # ends their processes
    if run.stop:
        raise SystemExit(128 + run.stop)
    if run.rank == 0:
        print_result(run)
    if run.world > 1:
        dist.destroy_process_group()
    if run.unsaved:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        fail(error)
    except RuntimeError as error:
        if not any(word in str(error) for word in ("DataLoader worker", "Connection closed")):
            raise
        fail(first_line(error))  # a loader's process or another rank was killed: no fault of ours
    except FloatingPointError as error:  # of all processes
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:  # before the first step
        sys.exit(128 + signal.SIGINT)
