"""Train a dense or sparse image classifier, on a laptop or under torchrun.

    python train.py                                  a sparse ConvNeXt on drawn shapes: a minute
    python train.py --data FOLDER --model vit_nano   your own images, one folder per class
    torchrun --nproc-per-node=8 train.py --data /imagenet --model convnext_t

A run writes to runs/<model>-<data>-<number>/ or to --out DIR: last.pt and best.pt (checkpoints) and
log.jsonl (one line per epoch). A run named by --out continues when it is started again.

Read train() first. It is the whole loop: batch, forward, loss, backward, step, log.

The way of an image: read_image() in eval.py reads the file. train_transform() augments it, in a
process of the loader. next_batch() normalizes and mixes the batch, and train() computes the loss.

The way of the learning rate: a recipe gives `base_lr`, or the user gives --lr. fit_to_data() scales
the recipe's to the batch. learning_rate() turns this peak into the rate of a step, and train()
hands it to the optimizer, times the lr_scale of each parameter group.

What is saved when: last.pt every --save-every-minutes, after a signal, and at the end of an epoch
both before its validation and after it; best.pt after a validation that was the best so far. Each
file is a whole checkpoint: weights, averaged weights, optimizer, epoch and step. claim_folder()
finds the run's folder, restore() continues from its last.pt.

Random draws depend on the seed and on what they are for: an image's augmentation on (seed, epoch,
image); mixing, noise and drop path on (seed, step, share of the batch). So no generator has to be
saved, and the number of loader processes changes nothing. A run that was stopped by kill, Ctrl-C or
SIGTERM and started again with as many processes ends with the weights of an uninterrupted one.
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
from eval import (  # what all programs share: data sets, checkpoints, processes, evaluate()
    MEAN, STD, FolderImages, Output, auto_workers, autocast, best_dtype, build_model, eval_loader,
    eval_transform, evaluate, fail, first_line, leave_signals, load_checkpoint, normalize, number,
    open_dataset, read_checkpoint, setup_processes, start_loader, together, warn)
from moe import ExpertChoice, MoE, SoftMoE, balance_loss, count_parameters

# ---------------------------------------------------------------- recipes
# One dictionary per model. A flag of the same name overrides an entry. `base_batch` is the batch
# unless --batch-size gives another, and `base_lr` the peak learning rate for `base_batch` images.
# For another batch it is scaled linearly, unless --lr gives the rate.
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
    experts=4, k=1, expert_ratio=2, base_lr=4e-3, base_batch=4096, min_lr=1e-6,
    warmup_epochs=20, ema=0.9999)
CONVNEXT_ISO = CONVNEXT | dict(experts=8, expert_ratio=4, warmup_epochs=50)

# DeiT: Touvron et al. 2021, README_deit.md. Not here: repeated augmentation. DeiT reports its raw
# weights (`top1` in the log), never its EMA (`ema_top1`).
VIT = IMAGENET | dict(
    moe_layers="every2", k=2, base_lr=1e-3, base_batch=1024, min_lr=1e-5,
    warmup_epochs=5, drop_path=0.1, ema=0.99996)

# V-MoE's S/32: Riquelme et al. 2021, their vmoe_s32_last2_ilsvrc2012_randaug_light1.py.
# Its published accuracy is no target for ours. It has what ours lacks: expert dropout 0.2, a tanh
# layer of 512 units before the head, a head that starts at 0 with bias -ln 1000, inputs in
# [-1, 1], routing in groups of 8 images. It trains on 99% of the images, and drops tokens by
# their position in the batch (ours: by their gate).
VMOE = IMAGENET | dict(
    k=2, base_lr=3e-3, base_batch=8192, min_lr=1e-5, decay="linear",
    warmup_epochs=64.1,  # 10,000 steps
    weight_decay=0.1, clip_grad=1.0, loss="sigmoid", label_smoothing=0.0, mixup=0.2, cutmix=0.0,
    randaug=10, erasing=0.0, crop_scale=0.05, drop_path=0.0, ema=0.0)

# Ours, for 32-pixel images and a minute or two on a CPU: 5 to 50 epochs, for about `steps` steps.
NANO = BASE | dict(
    base_batch=64, min_lr=1e-5, warmup_epochs=1, weight_decay=0.05, clip_grad=1.0,
    label_smoothing=0.0, mixup=0.0, cutmix=0.0, randaug=0, erasing=0.0, crop_scale=1.0, flip=0,
    image_size=32, crop_ratio=1.0, capacity_factor=0.0, drop_path=0.0, ema=0.0)

VIT_NANO = NANO | dict(k=2, base_lr=3e-3, steps=1750)  # the rate goes with 1 / width

RECIPES = dict(
    convnext_nano=NANO | dict(k=1, base_lr=4e-3, steps=1250),
    convnext_t=CONVNEXT | dict(drop_path=0.1),
    convnext_s=CONVNEXT | dict(drop_path=0.4),
    convnext_b=CONVNEXT | dict(drop_path=0.5),
    convnext_iso_s=CONVNEXT_ISO | dict(drop_path=0.1),
    convnext_iso_b=CONVNEXT_ISO | dict(drop_path=0.2),
    vit_pico=VIT_NANO | dict(base_lr=6e-3), vit_nano=VIT_NANO,
    vit_micro=VIT_NANO | dict(base_lr=1.5e-3),
    vit_ti=VIT, vit_s=VIT, vit_b=VIT, vit_b32=VIT, vit_l=VIT,
    vmoe_s32=VMOE)

# The nano models on a folder: there are few pictures of a class, and they differ. No flip: letters
# and digits do not like it.
NANO_FOLDER = dict(crop_scale=0.25, cutmix=1.0)

# Fine-tuning, with --init-from: published for weights from ImageNet-21k. Nano models keep their
# own recipe.

# TRAINING.md, "Fine-tune from ImageNet-22K". 8 experts of ratio 4: the paper's choice on 21k.
CONVNEXT_TUNE = CONVNEXT | dict(
    experts=8, expert_ratio=4, epochs=30, base_lr=5e-5, base_batch=512, warmup_epochs=0,
    weight_decay=1e-8, mixup=0.0, cutmix=0.0, ema=0.0, layer_decay=0.8, head_scale=0.001)

# DeiT III's line with AdamW (README_revenge.md). Its other one, lr 3e-4, is for LAMB.
VIT_TUNE = VIT | dict(
    epochs=20, base_lr=1e-5, base_batch=512, weight_decay=0.1, erasing=0.0,
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
TORCHVISION = dict(
    vit_b="vit_b_16", vit_b32="vit_b_32", vit_l="vit_l_16",
    convnext_t="convnext_tiny", convnext_s="convnext_small", convnext_b="convnext_base")


def find_recipe(args):
    """Return the recipe of args.model, a dict, fit for args.data and args.init_from."""
    recipe = RECIPES[args.model]
    if args.init_from and args.model in FINE_TUNING:
        recipe = FINE_TUNING[args.model]
    if is_nano(args) and os.path.isdir(args.data):
        recipe = recipe | NANO_FOLDER
    return recipe


def is_nano(args):
    """Tell whether args.model has one of the recipes of about `steps` steps."""
    return "steps" in RECIPES[args.model]


# ---------------------------------------------------------------- command line


def blocks(text):
    """Turn "3,5" into [3, 5]. Leave a name such as every2 as it is."""
    if not text[:1].isdigit():
        return text
    try:
        return [int(block) for block in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected blocks as in 3,5, got {text}") from None


def parse_args(argv=None):
    """Return the flags as a namespace. One that belongs to a recipe and is not given is None."""
    parser = argparse.ArgumentParser(
        description="Train a dense or sparse image classifier. A flag that is not given has the "
                    "value of the model's recipe (top of train.py).",
        usage="%(prog)s [--data FOLDER] [--model NAME] ... (--help shows all flags)")
    flag = parser.add_argument
    whole, amount, share = number("[1, inf)", int), number("[0, inf)"), number("[0, 1]")

    flag("--data", default="shapes",
         help="shapes[:COUNT], flags[:COUNT], glyphs[:COUNT[:CLASSES]], cifar10, cifar100 or a "
              "folder")
    flag("--model", default="convnext_nano", choices=list(RECIPES), metavar="NAME",
         help=f"{', '.join(RECIPES)} (default: convnext_nano)")
    flag("--out", help="folder of the run, continued if it holds one (default: a new one)")
    flag("--init-from", help="`torchvision` for its weights, or a checkpoint of ours")
    flag("--freeze-backbone", action="store_true", help="train the head only")
    flag("--seed", type=number("[0, 4294967296)", int), default=0)

    flag("--moe-layers", type=blocks, help="none, every2, last2, last3, stage, or blocks as in 3,5")
    flag("--experts", type=whole, help="experts E per MoE layer")
    flag("--k", type=whole, help="experts K per token")
    flag("--expert-ratio", type=number("[0.1, inf)"), help="hidden width of an expert over D")
    flag("--router", help="linear, cosine, l2, expert_choice or soft")
    flag("--router-noise", type=amount, help="std in training, in units of 1/E; 0: off")
    flag("--capacity-factor", type=amount, help="slots over the even share; 0: no limit")
    flag("--balance-weight", type=amount, help="weight of the balance loss")

    flag("--epochs", type=whole)
    flag("--batch-size", type=whole, help="images per step, over all processes")
    flag("--accumulate", type=whole, default=1, help="passes per step (default: 1)")
    flag("--lr", type=amount, help="peak (default: the recipe's, scaled to the batch)")
    flag("--min-lr", type=amount, help="learning rate at the end")
    flag("--decay", choices=("cosine", "linear"), help="from the peak to the end")
    flag("--warmup-epochs", type=amount)
    flag("--weight-decay", type=amount)
    flag("--expert-weight-decay", type=amount, help="default: --weight-decay")
    flag("--layer-decay", type=number("(0, 1]"), help="rate of a layer over that of the next one")
    flag("--head-scale", type=amount, help="scale of a head that --init-from leaves fresh")
    flag("--clip-grad", type=amount, help="largest norm of the gradient; 0: off")
    flag("--ema", type=number("[0, 1)"), help="decay of averaged weights; 0: off")
    flag("--drop-path", type=number("[0, 1)"), help="rate at the last block")
    flag("--loss", choices=("softmax", "sigmoid"), help="sigmoid: each class for itself")
    flag("--label-smoothing", type=share)
    flag("--mixup", type=amount, help="alpha; 0: off")
    flag("--cutmix", type=amount, help="alpha; 0: off")
    flag("--randaug", type=number("[0, 10]", int), help="magnitude; 0: off")
    flag("--erasing", type=share, help="probability of erasing a rectangle")
    flag("--crop-scale", type=number("(0, 1]"), help="smallest area of a random crop; 1: off")
    flag("--flip", type=int, choices=(0, 1), help="1: mirror every other image")
    flag("--image-size", type=whole, help="pixels")
    flag("--crop-ratio", type=number("(0, 1]"), help="evaluation: crop over resized size")

    flag("--workers", type=number("[0, inf)", int),
         help="image loaders per process (default: 0 if in memory, else up to 12)")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
         help="auto: bfloat16 on a GPU that has it")
    flag("--compile", action="store_true", help="torch.compile the model")
    flag("--save-every-minutes", type=number("[0, inf]"), default=30.0,
         help="also save within an epoch, this often (default: 30)")
    return parser.parse_args(argv)


def resolve(args):
    """Return the configuration of a run: the flags, and the recipe where a flag is not given.

    lr, batch_size and epochs may still be None: they depend on the data, see fit_to_data(). Raise
    ValueError if flags do not go together.
    """
    if args.freeze_backbone and not args.init_from:
        raise ValueError("--freeze-backbone trains the head only, on a random backbone: "
                         "give --init-from, too")
    config = argparse.Namespace(**find_recipe(args))
    for name, value in vars(args).items():
        if value is not None or name not in config:
            setattr(config, name, value)
    if config.expert_weight_decay is None:
        config.expert_weight_decay = config.weight_decay
    if config.layer_decay != 1 and config.model not in LAYER_DECAYED:
        raise ValueError(f"--layer-decay {config.layer_decay} is for {', '.join(LAYER_DECAYED)} "
                         f"only: leave it out, or give 1")
    return config


def fit_to_data(config, num_images, world):
    """Settle batch size, learning rates, epochs and warm-up, in place in the config.

    num_images are trained on by `world` processes. Raise ValueError if they do not go together.
    """
    config.shares = shares = world * config.accumulate  # of a step's batch, all of one size
    batch = config.batch_size or config.base_batch
    fitting = min(batch, num_images) // shares * shares
    if config.batch_size is None:
        batch = config.batch_size = fitting
    if batch != fitting or batch == 0:
        raise ValueError(
            f"--batch-size {batch}: expected a multiple of {shares} ({world} processes x "
            f"{config.accumulate} passes) up to {num_images}, the number of training images: "
            f"use {fitting or 'more images'}")
    if config.lr is None:
        config.lr = config.base_lr * batch / config.base_batch
    config.min_lr = min(config.min_lr, config.lr)  # a rate only falls after its warm-up
    if config.epochs is None:  # nano: about `steps` steps
        epochs = round(config.steps / (num_images // batch))
        config.epochs = min(50, max(5, epochs))
    if config.warmup_epochs >= config.epochs:
        if config.warmup_epochs != find_recipe(config)["warmup_epochs"]:  # given by the user
            raise ValueError(f"--warmup-epochs {config.warmup_epochs:g} is not shorter than the "
                             f"run of {config.epochs} epochs: give fewer")
        config.warmup_epochs = config.epochs / 10  # the recipe's is for its own, longer run


def model_config(config, num_classes):
    """Return what eval.build_model() needs to build this run's model again, a dict."""
    names = ("model", "moe_layers", "k", "expert_ratio", "router", "router_noise", "drop_path",
             "image_size")
    options = {name: getattr(config, name) for name in names}
    options["num_classes"] = num_classes
    options["num_experts"] = config.experts
    options["capacity_factor"] = config.capacity_factor or None
    return options


# ---------------------------------------------------------------- data


def open_data(config):
    """Return (training set, validation set). Raise ValueError if their classes differ."""
    resized = eval_transform(config.image_size, config.crop_ratio)
    train_set = open_dataset(config.data, "train", train_transform(config))
    val_set = open_dataset(config.data, "val", resized)
    differing = sorted(set(train_set.classes) ^ set(val_set.classes))
    if differing:
        more = ", ..." if len(differing) > 5 else ""
        raise ValueError(f"train and val of {config.data} have different classes; only one of "
                         f"them has {', '.join(differing[:5])}{more}")
    return train_set, val_set


def train_transform(config):
    """Return the augmentation of the recipe, uint8 (3, H, W) -> uint8 (3, S, S)."""
    size = config.image_size
    mean_colour = [round(255 * mean) for mean in MEAN]
    steps = [eval_transform(size, config.crop_ratio)]
    if config.crop_scale < 1:
        bicubic = v2.InterpolationMode.BICUBIC
        scale = (config.crop_scale, 1.0)
        steps = [v2.RandomResizedCrop(size, scale, interpolation=bicubic, antialias=True)]
    if config.flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.randaug:
        # As timm's rand-m9-inc1: two operations, each with probability 1/2, magnitude 9 of 10.
        # One of torchvision's 14 operations is Identity, hence 7/13: 7/13 * 13/14 = 1/2.
        operation = v2.RandAugment(1, config.randaug, num_magnitude_bins=11,
                                   fill=mean_colour,
                                   interpolation=v2.InterpolationMode.BILINEAR)
        steps += [v2.RandomApply([operation], p=7 / 13)] * 2
    if config.erasing:
        steps.append(v2.RandomErasing(config.erasing, value=mean_colour))
    return v2.Compose(steps)


def draw_seed(*numbers):
    """Mix whole numbers, such as (seed, epoch, image), into one seed of 32 bits, an int."""
    mixed = 0
    for n in numbers:
        mixed = (mixed * 0x9E3779B1 + n + 0x7F4A7C15) % 2 ** 32
    return mixed


def seed_draws(device, *numbers):
    """Start the draws of this process, on the CPU and its device, from several whole numbers."""
    # On a CPU torch.manual_seed() would also write down a stack trace, for a GPU that might come.
    gpu = device.type == "cuda"
    start = torch.manual_seed if gpu else torch.default_generator.manual_seed
    start(draw_seed(*numbers))


class Augmented:
    """A data set whose items are asked for by (epoch, index): seeds of their augmentation."""

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key):
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw_seed(self.seed, epoch, index))
            return self.dataset[index]


class Batches:
    """The order of the images: lists of (epoch, index), for DataLoader a batch sampler.

    Each epoch is a permutation of all images, cut into steps of `batch_size`. The last, incomplete
    step is left out. A step is cut into world * accumulate shares, of which a process takes
    `accumulate`, one in each of its passes: two passes of one process see what two processes see.
    Set .epoch before iterating, and .first_step to enter an epoch in the middle.
    """

    def __init__(self, num_images, batch_size, accumulate, seed, rank, world):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.epoch, self.first_step = 0, 0
        self.steps = num_images // batch_size  # per epoch

    def __len__(self):
        return (self.steps - self.first_step) * self.accumulate

    def __iter__(self):
        generator = torch.Generator().manual_seed(draw_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        first = self.rank * self.accumulate
        for step in range(self.first_step, self.steps):
            batch = order[step * self.batch_size:(step + 1) * self.batch_size]
            shares = batch.chunk(self.world * self.accumulate)
            for share in shares[first:first + self.accumulate]:
                yield [(self.epoch, index) for index in share.tolist()]


def make_mixer(config, num_classes):
    """Return MixUp and CutMix, of which each batch draws one, or None.

    It maps images and labels (B,) to images and targets (B, num_classes).
    """
    mixers = []
    if config.mixup:
        mixers.append(v2.MixUp(alpha=config.mixup, num_classes=num_classes))
    if config.cutmix:
        mixers.append(v2.CutMix(alpha=config.cutmix, num_classes=num_classes))
    return v2.RandomChoice(mixers) if mixers else None


# ---------------------------------------------------------------- weights to start from


def start_from(model, config, classes):
    """Load the weights that --init-from names into the model. Return the names left fresh.

    The head is fresh if the weights are for other classes. Raise ValueError if they do not fit, or
    if torchvision's cannot be had.
    """
    family = vit if isinstance(model, vit.ViT) else convnext
    if config.init_from == "torchvision":
        weights = family.from_torchvision(torchvision_weights(config.model))
        same_classes = all(re.fullmatch(r"n\d{8}", name) for name in classes)  # ImageNet's
    else:
        there, checkpoint = load_checkpoint(config.init_from, "cpu")
        weights = there.state_dict()
        same_classes = checkpoint["classes"] == classes
    if not same_classes:  # upcycle() leaves a head of another shape fresh
        weights |= {"head.weight": torch.empty(0), "head.bias": torch.empty(0)}
    if family is vit:
        weights = vit.resize_positions(weights, model)
    return upcycle(weights, model)


@torch.no_grad()
def upcycle(weights, model, exact=True):
    """Load the state dict of a model of the same backbone, dense or sparse, into a model.

    Where the weights have an MLP and the model has a MoE, each expert becomes this MLP, see
    experts_from_mlp(). Experts that choose tokens and Soft MoE have fresh codes: what they compute
    is not what the MLP did. A head for another number of classes stays fresh. Return the names left
    fresh. Raise ValueError that names the first tensor which does not fit; then nothing is loaded.
    """
    state, own, fresh = dict(weights), model.state_dict(), []
    for name in ("head.weight", "head.bias"):
        if name in state and state[name].shape != own[name].shape:
            state[name] = own[name]
            fresh.append(name)
    for name, layer in model.named_modules():
        if isinstance(layer, (MoE, ExpertChoice, SoftMoE)) and f"{name}.0.weight" in state:
            leaves = ("0.weight", "0.bias", "2.weight", "2.bias")
            mlp = {leaf: state.pop(f"{name}.{leaf}") for leaf in leaves}
            tokens_choose = isinstance(layer, MoE)
            for key, value in experts_from_mlp(mlp, layer, exact and tokens_choose).items():
                state[f"{name}.{key}"] = value
                if not tokens_choose and not key.startswith("experts."):
                    fresh.append(f"{name}.{key}")
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
    """Return a state dict for a sparse layer whose experts are all copies of a dense MLP's weights.

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
    """Return torchvision's ImageNet weights, a state dict, from its cache or the network."""
    if name not in TORCHVISION:
        raise ValueError(f"torchvision has no weights for {name}: "
                         f"expected one of {', '.join(TORCHVISION)}")
    weights = torchvision.models.get_model_weights(TORCHVISION[name]).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        file = os.path.basename(weights.url)
        place = os.path.join(torch.hub.get_dir(), "checkpoints", file)
        raise ValueError(f"torchvision's weights for {name} cannot be loaded "
                         f"({first_line(error)}): download {weights.url} by hand and place it at "
                         f"{place}") from None


# ---------------------------------------------------------------- optimisation


def classification_loss(logits, targets, config):
    """Return the cross-entropy of logits (B, classes) with targets: a scalar, the mean over images.

    targets: labels (B,), or mixed probabilities (B, classes). Label smoothing s moves them to
    (1 - s) * targets + s / classes.
    --loss softmax: the classes exclude each other. --loss sigmoid (V-MoE): each class is a yes or
    no of its own, summed over the classes.
    """
    smoothing = config.label_smoothing
    if config.loss == "softmax":
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)
    num_images, num_classes = logits.shape
    if targets.ndim == 1:
        targets = F.one_hot(targets, num_classes)  # (B,) -> (B, classes)
    targets = (1 - smoothing) * targets + smoothing / num_classes
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / num_images


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

    Keys: params, weight_decay, and lr_scale, by which train() multiplies the learning rate.
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
    """Return the rate of an optimizer step: linear warm-up to the peak, then decay to the minimum.

    Steps count from 0 through the whole run. The last step of the warm-up has the peak, the last
    step of the run the minimum. The decay is half a cosine or a line.
    """
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step + 1 - warmup) / max(1, total - warmup)
    if config.decay == "linear":
        left = 1 - progress
    else:
        left = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * left


def ema_decay(step, decay):
    """Return the decay of the averaged weights: min(decay, (1 + step) / (10 + step)).

    So they always average over about the last ninth of the run. With a decay of 0.9999 from the
    start a run of 1,000 steps would end with nine tenths of its random start. At the end of a
    published recipe the ramp makes no difference.
    """
    return min(decay, (1 + step) / (10 + step))


def averaged(model, decay):
    """Return a copy of the model whose weights update_parameters() averages."""
    def average(ema, now, step):
        get_ema_multi_avg_fn(ema_decay(int(step), decay))(ema, now, step)

    return AveragedModel(model, multi_avg_fn=average)


# ---------------------------------------------------------------- what a run is made of


class Run:
    """All that a run consists of, from its flags. It is continued if its folder holds a run.

    Raise ValueError for whatever is wrong. No file is written before all options and data were
    found to be right.
    """

    def __init__(self, args):
        # ---- this process: rank 0 prints and writes
        self.rank, self.world, self.device = setup_processes()

        # ---- what to do
        with together():
            self.config = config = resolve(args)
            self.train_set, self.val_set = open_data(config)
            fit_to_data(config, len(self.train_set), self.world)
            self.model, self.fresh = make_model(config, self.train_set.classes)

        # ---- images: the order of them, their loaders, and what mixes them
        workers = config.workers
        if workers is None:
            workers = auto_workers(self.train_set, self.world)
        self.batches = Batches(len(self.train_set), config.batch_size, config.accumulate,
                               config.seed, self.rank, self.world)
        self.loader = DataLoader(
            Augmented(self.train_set, config.seed), batch_sampler=self.batches,
            num_workers=workers, pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0, worker_init_fn=leave_signals)
        self.images_per_pass = config.batch_size // self.world // config.accumulate
        self.val_loader = eval_loader(self.val_set, self.images_per_pass, workers, self.device)
        self.mixer = make_mixer(config, len(self.train_set.classes))
        self.unreadable = set()  # indices of images

        # ---- model and optimizer
        # In channels_last the permutes of a ConvNeXt on a GPU cost nothing.
        nhwc = self.device.type == "cuda" and isinstance(self.model, convnext.ConvNeXt)
        self.layout = torch.channels_last if nhwc else torch.contiguous_format
        self.model.to(self.device, memory_format=self.layout)
        self.dtype = best_dtype(self.device)  # bfloat16 means autocast
        if config.dtype != "auto":
            self.dtype = getattr(torch, config.dtype)
        self.ema = averaged(self.model, config.ema) if config.ema else None
        groups = parameter_groups(
            self.model, config.weight_decay, config.expert_weight_decay, config.layer_decay)
        # The rate is set by train(), step by step.
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)

        # ---- where it stands; with the weights and the optimizer this makes a checkpoint
        self.epoch = 0  # how many are trained, validated and logged
        self.step = 0  # of the optimizer, over all epochs
        self.best = None  # top1 and epoch of best.pt
        self.signal = 0  # the last SIGTERM or SIGINT
        self.saved_at = time.monotonic()
        self.unsaved = set()  # names of files that could not be written when last tried
        self.folder = self.log = None  # its path, and its log.jsonl, open on rank 0
        claim_and_continue(self)

        # ---- what the loop calls: the model, wrapped
        self.net = self.model
        if self.world > 1:
            # DDP complains about the strides of depthwise convolutions, which is harmless.
            warnings.filterwarnings("ignore", "Grad strides do not match")
            self.net = DistributedDataParallel(self.model)
        if config.compile:
            self.net = torch.compile(self.net)


def make_model(config, classes):
    """Return (the model on the CPU, names of its weights that --init-from did not bring)."""
    torch.manual_seed(config.seed)
    model, fresh = build_model(model_config(config, len(classes))), []
    for parameter in model.head.parameters():
        parameter.data *= config.head_scale  # overwritten if --init-from has a head that fits
    continued = config.out and os.path.exists(os.path.join(config.out, "last.pt"))
    if config.init_from and not continued:
        fresh = start_from(model, config, classes)
    if config.freeze_backbone:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    return model, fresh


# ---------------------------------------------------------------- the loop


def train(run):
    """Train and validate, from where the run stands to its last epoch.

    An epoch that was interrupted goes on where it was. Its losses in the log are then means of the
    steps since.
    Raise SystemExit(128 + signal) after SIGTERM or SIGINT, when everything is saved.
    """
    config, model, steps = run.config, run.model, run.batches.steps
    first_epoch = run.epoch
    for epoch in range(first_epoch, config.epochs):
        first_step = run.step - epoch * steps  # more than 0 in an interrupted epoch
        run.batches.epoch, run.batches.first_step = epoch, first_step
        run.net.train(not config.freeze_backbone)  # frozen layers work as in evaluation
        passes = start_loader(run.loader)
        meter = Meter(run)

        for _ in progress_bar(run, first_step):  # over the steps that are left
            # ---- the rate of this step
            rate = learning_rate(run.step, steps, config)
            for group in run.optimizer.param_groups:
                group["lr"] = group["lr_scale"] * rate

            # ---- batch, forward, loss, backward: `accumulate` times
            losses = torch.zeros(2, device=run.device)  # cross-entropy, balance
            for part in range(config.accumulate):
                images, targets = next_batch(run, passes, part, meter)
                # In the last pass DDP averages the gradients over the processes.
                last_pass = part == config.accumulate - 1
                sync = nullcontext() if last_pass or run.world == 1 else run.net.no_sync()
                with sync:
                    with autocast(run.device, run.dtype):
                        logits, routings = run.net(images, return_routing=True)
                    loss = classification_loss(logits.float(), targets, config)
                    balance = balance_loss(routings).to(run.device)
                    total = loss + config.balance_weight * balance
                    (total / config.accumulate).backward()
                losses += torch.stack([loss.detach(), balance.detach()]) / config.accumulate
                meter.count(routings)

            # ---- step
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
            stop, due = check_and_agree(run, losses, norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
            if run.ema:
                run.ema.update_parameters(model)
            run.step += 1
            meter.add(losses)
            if stop or due:
                save(run, "last.pt")
            if stop:
                raise SystemExit(1 if run.unsaved else 128 + stop)

        # ---- validate, log, save
        save(run, "last.pt")  # before the validation, which may fail or be interrupted
        line = dict(epoch=epoch + 1, step=run.step, lr=run.optimizer.param_groups[0]["lr"])
        line |= meter.summary(run)
        line |= validate(run)
        run.epoch = epoch + 1
        top1 = line.get("ema_top1", line["top1"])
        best_before = run.best
        improved = run.best is None or top1 > run.best["top1"]
        if improved:
            run.best = dict(top1=top1, epoch=run.epoch)
        if run.rank == 0:
            write_log(run, line)
        names = ["best.pt", "last.pt"] if improved else ["last.pt"]
        save(run, *names)
        if "best.pt" in run.unsaved:
            run.best = best_before  # a later epoch may be written as the best one
        if run.rank == 0:
            print_epoch(run, line, header=epoch == first_epoch)


def progress_bar(run, first_step):
    """Return an iterable of the rest of an epoch's steps, shown as a bar on rank 0's terminal."""
    steps = run.batches.steps
    hidden = None if run.rank == 0 else True  # None: hidden unless there is a terminal
    return tqdm(range(first_step, steps), desc=f"epoch {run.epoch + 1}", unit="step", leave=False,
                initial=first_step, total=steps, disable=hidden)


def next_batch(run, passes, part, meter):
    """Return the images and targets of the next pass, normalized and mixed, on the device.

    Seed the draws of the pass: those of the mixing here, of noise and drop path in the model.
    """
    waiting = time.perf_counter()
    images, labels, unreadable = next(passes)
    meter.wait += time.perf_counter() - waiting
    for index in set(unreadable.tolist()) - run.unreadable - {-1}:
        run.unreadable.add(index)
        tqdm.write(f"warning: cannot read {run.train_set.path(index)}: the next image takes its "
                   f"place", file=sys.stderr)
    images = normalize(images.to(run.device, non_blocking=True), MEAN, STD)
    images = images.contiguous(memory_format=run.layout)
    targets = labels.to(run.device, non_blocking=True)
    share = run.rank * run.config.accumulate + part  # of the step's images, as in Batches
    seed_draws(run.device, run.config.seed, run.step, share)
    return run.mixer(images, targets) if run.mixer else (images, targets)


def check_and_agree(run, losses, norm):
    """Share three flags across all processes: a non-finite loss or gradient, a stop signal, and
    whether it is time to save. Called before the optimizer step, so that all ranks act alike.

    losses (2,), norm: of the gradient. Return (signal or 0, whether to save). Raise
    FloatingPointError if a number is not finite.
    """
    due = time.monotonic() - run.saved_at >= 60 * run.config.save_every_minutes
    flags = torch.tensor([0, run.signal, due], dtype=torch.float32, device=run.device)
    flags[0] = ~(losses.isfinite().all() & norm.isfinite())
    if run.world > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    broken, stop, due = flags.tolist()
    if broken:
        cross_entropy, balance = losses.tolist()
        rate = run.optimizer.param_groups[0]["lr"]
        raise FloatingPointError(
            f"loss or gradient is not finite at step {run.step} (epoch {run.epoch + 1}): "
            f"cross-entropy {cross_entropy:.4g}, balance {balance:.4g}, "
            f"norm of the gradient {norm.item():.4g}, lr {rate:.3g}; {advise(run)}")
    return int(stop), bool(due)


class Meter:
    """What the log says of an epoch's training: sums over the steps of this process."""

    def __init__(self, run):
        layers, E = len(run.model.moe_blocks), run.config.experts
        self.steps = 0
        self.begin = time.perf_counter()
        self.seconds = self.wait = 0.0  # for all, and of these waiting for images
        self.losses = torch.zeros(2, dtype=torch.float64, device=run.device)
        self.load = torch.zeros(layers, E, dtype=torch.int64, device=run.device)
        self.dropped = torch.zeros((), dtype=torch.int64, device=run.device)

    def count(self, routings):
        """Count the choices of each expert, before any is dropped, and the dropped ones."""
        for load, routing in zip(self.load, routings):  # load (E,): a view of a layer's row
            load += F.one_hot(routing.experts, len(load)).sum((0, 1))  # (T, K) -> (T, K, E) -> (E,)
            self.dropped += (~routing.kept).sum()

    def add(self, losses):
        """Add the losses (2,) of a step."""
        self.losses += losses
        self.steps += 1
        self.seconds = time.perf_counter() - self.begin

    def summary(self, run):
        """Return the means over steps and processes, a dict for the log. Empty without a step."""
        unreadable = torch.tensor(len(run.unreadable), device=run.device)
        if run.world > 1:
            for sums in (self.losses, self.load, self.dropped, unreadable):
                dist.all_reduce(sums)
        if self.steps == 0:  # all were done before an interruption
            return {}
        loss, balance = (self.losses / self.steps / run.world).tolist()
        load = self.load.double()
        return dict(
            train_loss=loss, balance_loss=balance, seconds=self.seconds,
            data_wait=self.wait / self.seconds,
            images_per_s=self.steps * run.config.batch_size / self.seconds,
            dropped=(self.dropped / load.sum().clamp(min=1)).item(),
            unreadable=unreadable.item(), load=(load / load.sum(1, keepdim=True)).tolist())


def validate(run):
    """Evaluate the weights, and the averaged ones. Return losses and accuracies for the log.

    Raise SystemExit(128 + signal) after a signal. Raise FloatingPointError if a loss is not finite;
    last.pt is then renamed, so that nobody continues from it.
    """
    line, models = {}, {"": run.model}
    if run.ema:
        models["ema_"] = run.ema.module
    for prefix, model in models.items():
        val = evaluate(model, run.val_loader, run.device, MEAN, STD, dtype=run.dtype,
                       loss=run.config.loss, stop=lambda: run.signal)
        if val is None:
            raise SystemExit(128 + (run.signal or signal.SIGTERM))  # which another process got
        if not math.isfinite(val["loss"]):
            last, bad = (os.path.join(run.folder, name) for name in ("last.pt", "not_finite.pt"))
            if run.rank == 0 and os.path.exists(last):
                os.replace(last, bad)
            raise FloatingPointError(
                f"the validation loss after epoch {run.epoch + 1} is {val['loss']}: last.pt is now "
                f"{bad}; to continue from the best epoch, if there is one, copy best.pt to last.pt")
        line |= {f"{prefix}val_loss": val["loss"], f"{prefix}top1": val["top1"],
                 f"{prefix}top5": val["top5"]}
    return line


# ---------------------------------------------------------------- the run's folder


# What may differ when a run is continued: without a word, and what is then said.
FREE_TO_CHANGE = {"out", "workers", "save_every_minutes", "accumulate"}
CHANGED_ALOUD = {"lr", "min_lr", "clip_grad", "dtype", "compile", "shares"}


def claim_and_continue(run):
    """Claim the folder where all processes write, and continue the run that is there."""
    data = [run.train_set.fingerprint(), run.val_set.fingerprint()]
    found = [None, data]
    with together():
        if run.rank == 0:
            found[0], run.log = claim_folder(run.config)
    if run.world > 1:
        dist.broadcast_object_list(found)  # rank 0 decides for all
    run.folder = found[0]
    with together():
        for there, here in zip(found[1], data):
            differing = compare_data(there, here)
            if differing:
                raise ValueError(f"{run.config.data} is not the same as that of process 0 "
                                 f"({differing})")
        checkpoint = open_last(run)
        if checkpoint:
            restore(run, checkpoint)
    with together():
        places = [None] * run.world
        if run.world > 1:
            dist.all_gather_object(places, (run.epoch, run.step))
        if len(set(places)) > 1:
            raise ValueError(f"{run.folder} is at different steps for different processes: --out "
                             f"must be a folder that all of them share")
        if run.rank == 0:
            cut_log(run.log, run.epoch)
            trial = os.path.join(run.folder, "trial.pt")  # a full disk is found now
            write_checkpoint(make_checkpoint(run), trial)
            os.remove(trial)


def claim_folder(config):
    """Make the folder of this run and open its log.jsonl. Return (path, file).

    While this process lives the log is locked: no second run can write here. Without --out each run
    makes a folder of its own, also when several start at once. Raise ValueError if the folder
    cannot be written or is in use.
    """
    data = os.path.basename(os.path.normpath(config.data)).replace(":", "-")
    numbered = (f"runs/{config.model}-{data}-{i}" for i in count(1))
    try:
        for folder in [config.out] if config.out else numbered:
            with suppress(FileExistsError):
                os.makedirs(folder, exist_ok=folder == config.out)
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
    """Return the checkpoint with which the run in run.folder continues. None if it is a new run.

    Raise ValueError if it cannot be read, or is of other images or another configuration.
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
    differing = compare_data(checkpoint.get("val_data"), run.val_set.fingerprint())
    if differing:
        warn(f"the validation images are not those of the run in {run.folder} ({differing}): its "
             f"accuracies cannot be compared")
    there, free = checkpoint["args"], FREE_TO_CHANGE
    if isinstance(run.train_set, FolderImages):
        free = free | {"data"}  # it may have moved: the images count
    options = []
    for name, now in vars(run.config).items():
        if name in free or there.get(name) == now:
            continue
        change = f"--{name.replace('_', '-')} {there.get(name)} there, {now} now"
        if name in CHANGED_ALOUD:
            warn(f"{run.folder} is continued with another configuration ({change})")
        else:
            options.append(change)
    if options:
        raise ValueError(f"{run.folder} holds a run of another configuration "
                         f"({'; '.join(options)}): give the same options to continue it, or "
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


# ---------------------------------------------------------------- checkpoints and the log


def make_checkpoint(run):
    """Return the run as a dict of plain values and tensors.

    config: what eval.build_model() needs. args: the whole configuration of the run.
    """
    config, classes = run.config, run.train_set.classes
    return dict(
        config=model_config(config, len(classes)), classes=classes, image_size=config.image_size,
        crop_ratio=config.crop_ratio, mean=MEAN, std=STD, model=run.model.state_dict(),
        ema=run.ema.module.state_dict() if run.ema else None,
        optimizer=run.optimizer.state_dict(), epoch=run.epoch, step=run.step, best=run.best,
        args=vars(config), data=run.train_set.fingerprint(),
        val_data=run.val_set.fingerprint())


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
    run.epoch, run.step, run.best = (checkpoint[name] for name in ("epoch", "step", "best"))


def save(run, *names):
    """Write the run's checkpoint to the files of these names, by rank 0, while the others wait.

    If the disk is full the old file stays, its name is in run.unsaved, and the run goes on: the
    next save may have more luck. Raise FloatingPointError if a weight is not finite; then nothing
    is written.
    """
    weights = list(run.model.parameters())
    if run.ema:
        weights += run.ema.parameters()
    if not torch.nn.utils.get_total_norm(weights).isfinite():
        raise FloatingPointError(f"weights are not finite after step {run.step}; {advise(run)}")
    if run.rank == 0:
        for name in names:
            try:
                write_checkpoint(make_checkpoint(run), os.path.join(run.folder, name))
                run.unsaved.discard(name)
            except ValueError as error:
                run.unsaved.add(name)
                tqdm.write(f"warning: {error}; the old file is untouched", file=sys.stderr)
    run.saved_at = time.monotonic()
    if run.world > 1:
        dist.barrier()


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


def advise(run):
    """Say what to do when something is not finite: the end of an error message."""
    last = os.path.join(run.folder, "last.pt")
    advice = "nothing of this step was saved; try a smaller --lr, --clip-grad 1 or --dtype float32"
    if os.path.exists(last):
        advice += f", also to continue from {last}"
    return advice


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


# ---------------------------------------------------------------- what a run prints


def paper_row(config):
    """Return in words what the paper reports for this configuration, or None if it does not.

    Its Table 1: trained from scratch on ImageNet-1k, at 224 pixels, with the linear router.
    """
    model = model_config(config, num_classes=1000)
    if config.init_from or config.image_size != 224:
        return None
    for name, preset, options, *_, top1, _ in vit.TABLE + convnext.TABLE:
        if preset.__name__ == model["model"] and options.items() <= model.items():
            words = f"{name} of Table 1: {top1}% on ImageNet-1k"
            if name in vit.TABLE_9:
                words += f"; {vit.TABLE_9[name]}% with DeiT's recipe, which is ours (Table 9)"
            return words
    return None


def print_summary(run):
    """Print what was chosen, and what follows from it: a line per subject."""
    config, blocks, recipe = run.config, run.model.moe_blocks, find_recipe(run.config)
    total, active = count_parameters(run.model)

    print(f"data        {config.data}: {len(run.train_set)} images to train on, "
          f"{len(run.val_set)} to validate, {len(run.train_set.classes)} classes")
    sparse = f"{config.experts} experts, top {config.k}, in blocks {blocks}"
    print(f"model       {config.model}, {sparse if blocks else 'dense'}")
    if config.init_from and not run.step:
        print(f"start       from {config.init_from}, fresh: {', '.join(run.fresh) or 'nothing'}")
    if paper_row(config):
        print(f"paper       {paper_row(config)}")
    print(f"parameters  {total / 1e6:.2f}M, active per token {active / 1e6:.2f}M")
    print(f"batch       {config.batch_size} = {run.world} process(es) x "
          f"{config.accumulate} pass(es) x {run.images_per_pass}")
    print(f"schedule    {config.epochs} epochs x {run.batches.steps} steps, "
          f"peak lr {config.lr:.3g}, warm-up {config.warmup_epochs:g} epochs")
    if recipe["warmup_epochs"] >= config.epochs:
        print(f"            (the recipe's warm-up of {recipe['warmup_epochs']:g} epochs is not "
              f"shorter than this run)")
    if is_nano(config) and isinstance(run.train_set, FolderImages):
        print(f"augment     random crops of {config.crop_scale:.0%} to 100% of the area, "
              f"CutMix {config.cutmix:g}")
        flip = "" if config.flip else "--flip 1, but not for letters, and "
        print(f"            worth trying: {flip}twice the --epochs")
    print(f"machine     {run.device}, {str(run.dtype).removeprefix('torch.')}")
    print(f"results     {run.folder}/")
    values = ", ".join(f"{name} {getattr(config, name)}" for name in sorted(recipe))
    print(textwrap.fill(f"recipe      {values}", 98, subsequent_indent=12 * " "))
    if run.step:
        state = "finished" if run.epoch == config.epochs else "continuing"
        print(f"{state} after epoch {run.epoch}, step {run.step}")


COLUMNS = (  # field of the log, title, format
    ("train_loss", "loss", ".4f"),
    ("balance_loss", "balance", ".3f"),
    ("val_loss", "val loss", ".4f"),
    ("top1", "top-1 %", ".2f"),
    ("top5", "top-5 %", ".2f"),
    ("ema_top1", "EMA top-1", ".2f"),
    ("images_per_s", "images/s", ".0f"),
    ("data_wait", "data wait", ".0%"))


def print_epoch(run, line, header):
    """Print a line of the log in columns, below a header with their titles if header is True."""
    hidden = set()
    if not run.ema:
        hidden.add("ema_top1")
    if len(run.train_set.classes) <= 5:
        hidden.add("top5")
    titles, row = f"{'epoch':>9}", f"{line['epoch']:>5}/{run.config.epochs:<3}"
    for name, title, form in COLUMNS:
        if name not in hidden:
            titles += f"{title:>10}"
            row += f"{line.get(name, math.nan):>10{form}}"
    if header:
        print(titles)
    print(row, flush=True)
    wait = line.get("data_wait", 0)
    if header and wait > 0.2 and isinstance(run.train_set, FolderImages):
        print(f"warning: {wait:.0%} of the time went into waiting for data; more --workers (now "
              f"{run.loader.num_workers}) or smaller image files help", file=sys.stderr)


def print_result(run):
    """Print the last lines: how good it got, and what to do with it."""
    best, data = os.path.join(run.folder, "best.pt"), run.config.data
    if not run.best or not os.path.exists(best):
        return
    print(f"best top-1  {run.best['top1']:.2f}% in epoch {run.best['epoch']}")
    flags = f"{shlex.quote(best)} --data {shlex.quote(data)}"
    if getattr(run.val_set, "flat", False):  # a fifth of a folder is held out
        flags += " --split val"
    print(f"evaluate    python eval.py {flags}")
    if run.model.moe_blocks:
        out = os.path.join(run.folder, "inspect")
        print(f"inspect     python inspect_experts.py {flags} --out {shlex.quote(out)}")


def print_continuation(run):
    """Print the command that continues a stopped run: the one that started it, with its folder."""
    last = os.path.join(run.folder, "last.pt")
    if "last.pt" in run.unsaved or not os.path.exists(last):
        return
    launcher = "torchrun ..." if run.world > 1 else "python"
    command = shlex.join(sys.argv)
    if not run.config.out:
        command += f" --out {shlex.quote(run.folder)}"
    print(f"stopped     after step {run.step}, saved in {last}")
    print(f"continue    {launcher} {command}")


def main(args):
    """Prepare a run, train it, and say how good it got. After a signal the status is 128 + it."""
    run = Run(args)
    if run.rank == 0:
        print_summary(run)
    for stop in (signal.SIGTERM, signal.SIGINT):  # finish the step, save, exit
        signal.signal(stop, lambda received, frame: setattr(run, "signal", received))
    try:
        train(run)
    except SystemExit:
        if run.rank == 0:
            print_continuation(run)
        raise
    finally:
        run.loader = run.val_loader = None  # ends their processes
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
