"""Train a dense or sparse image classifier, on a laptop or under torchrun.

    python train.py                                  a sparse ConvNeXt on drawn shapes: a minute
    python train.py --data FOLDER --model vit_nano   your own images, one folder per class
    torchrun --nproc-per-node=8 train.py --data /imagenet --model convnext_t

A run writes last.pt, best.pt (checkpoints) and log.jsonl (a line per epoch) to --out DIR or to
runs/<model>-<data>-<number>/. A run named by --out continues when it is started again.

Read train() first, the whole loop. Above it stands what it uses: recipes, flags, data, weights to
start from, optimisation. Below it: the run's folder, main.

An image: image_order() says when it comes, a loader's process reads it (eval.read_image) and
augments it (train_transform), next_batch() brings it to the GPU, normalizes and mixes it.
The rate: settle() scales a recipe's base_lr to the batch unless --lr gives the peak, and
learning_rate() makes of it the rate of a step.
Saved: last.pt every --save-every-minutes, after a signal, and at the end of an epoch both before
its validation and after it; best.pt after a validation that was the best so far. Each is a whole
checkpoint: weights, averaged weights, optimizer, step, log.
Random draws depend on the seed and on where they are made: an image's augmentation on (seed, epoch,
image); mixing, noise and drop path on (seed, step, share of the batch). So no generator has to be
saved, the number of loader processes changes nothing, and a run that was stopped and started again
ends with the weights of an uninterrupted one.
"""

import argparse
import copy
import json
import math
import os
import re
import shlex
import signal
import sys
import textwrap
import time
import warnings
from contextlib import suppress
from functools import partial
from glob import escape, glob
from itertools import count

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

import convnext
import vit
from eval import (  # what all programs share: data sets, checkpoints, processes, evaluate()
    MEAN, STD, auto_workers, best_dtype, build_model, download, eval_loader, eval_transform,
    evaluate, leave_signals, load_checkpoint, normalize, number, one_line, open_dataset,
    read_checkpoint, run_program, setup_processes, together, watch_signals)
from moe import ExpertChoice, MoE, SoftMoE, balance_loss, count_parameters

# ---------------------------------------------------------------- recipes
# One dictionary per model. A flag of the same name overrides an entry. base_lr is the peak rate for
# base_batch images, scaled linearly to another --batch-size unless --lr gives it. Placement,
# experts, k and ratio are the paper's. Its other hyperparameters were not available: router noise,
# capacity and balance weight are V-MoE's (Riquelme et al. 2021). See .github/differences.md.

BASE = dict(
    moe_layers="last2", experts=8, expert_ratio=4, router="linear", router_noise=1.0,
    capacity_factor=1.05, balance_weight=0.005, loss="softmax", decay="cosine",
    layer_decay=1.0, head_scale=1.0)

# ImageNet-1k from scratch
IMAGENET = BASE | dict(
    epochs=300, weight_decay=0.05, clip_grad=0.0, label_smoothing=0.1, mixup=0.8, cutmix=1.0,
    randaug=9, erasing=0.25, crop_scale=0.08, flip=1, image_size=224, crop_ratio=0.875)

# Liu et al. 2022, TRAINING.md
CONVNEXT = IMAGENET | dict(
    experts=4, k=1, expert_ratio=2, base_lr=4e-3, base_batch=4096, min_lr=1e-6,
    warmup_epochs=20, drop_path=0.1, ema=0.9999)
CONVNEXT_ISO = CONVNEXT | dict(experts=8, expert_ratio=4, warmup_epochs=50)

# Touvron et al. 2021, README_deit.md. DeiT reports its raw weights, `top1` in the log.
VIT = IMAGENET | dict(
    moe_layers="every2", k=2, base_lr=1e-3, base_batch=1024, min_lr=1e-5,
    warmup_epochs=5, drop_path=0.1, ema=0.99996)

# V-MoE's S/32: Riquelme et al. 2021, vmoe_s32_last2_ilsvrc2012_randaug_light1.py
VMOE = IMAGENET | dict(
    k=2, base_lr=3e-3, base_batch=8192, min_lr=1e-5, decay="linear",
    warmup_epochs=64.1,  # 10,000 steps
    weight_decay=0.1, clip_grad=1.0, loss="sigmoid", label_smoothing=0.0, mixup=0.2, cutmix=0.0,
    randaug=10, erasing=0.0, crop_scale=0.05, drop_path=0.0, ema=0.0)

# Ours, for 32-pixel images and a minute or two on a CPU: 5 to 50 epochs, for about `steps` steps
NANO = BASE | dict(
    base_batch=64, min_lr=1e-5, warmup_epochs=1, weight_decay=0.05, clip_grad=1.0,
    label_smoothing=0.0, mixup=0.0, cutmix=0.0, randaug=0, erasing=0.0, crop_scale=1.0, flip=0,
    image_size=32, crop_ratio=1.0, capacity_factor=0.0, drop_path=0.0, ema=0.0)
VIT_NANO = NANO | dict(k=2, base_lr=3e-3, steps=1750)  # the rate goes with 1 / width

RECIPES = dict(
    convnext_nano=NANO | dict(k=1, base_lr=4e-3, steps=1250),
    convnext_t=CONVNEXT,
    convnext_s=CONVNEXT | dict(drop_path=0.4),
    convnext_b=CONVNEXT | dict(drop_path=0.5),
    convnext_iso_s=CONVNEXT_ISO,
    convnext_iso_b=CONVNEXT_ISO | dict(drop_path=0.2),
    vit_pico=VIT_NANO | dict(base_lr=6e-3), vit_nano=VIT_NANO,
    vit_micro=VIT_NANO | dict(base_lr=1.5e-3),
    vit_ti=VIT, vit_s=VIT, vit_b=VIT, vit_b32=VIT, vit_l=VIT,
    vmoe_s32=VMOE)

# Nano models on a folder: few pictures of a class. No flip: letters and digits do not like it.
NANO_FOLDER = dict(crop_scale=0.25, cutmix=1.0)
FIRST_RUN = dict(epochs=2, base_batch=48, base_lr=6e-3)  # `python train.py`: shapes are easy

# Fine-tuning, with --init-from; nano models keep their own recipe. Liu et al. 2022, TRAINING.md,
# "Fine-tune from ImageNet-22K". 8 experts of ratio 4: the paper's choice on 21k.
CONVNEXT_TUNE = CONVNEXT | dict(
    experts=8, expert_ratio=4, epochs=30, base_lr=5e-5, base_batch=512, warmup_epochs=0,
    weight_decay=1e-8, drop_path=0.2, mixup=0.0, cutmix=0.0, ema=0.0, layer_decay=0.8,
    head_scale=0.001)
ISO_TUNE = CONVNEXT_TUNE | dict(layer_decay=1.0)

# DeiT III's AdamW line (README_revenge.md). There it goes from 192 to 224 pixels of ImageNet-1k, at
# a constant rate; ours decays. For 21k it has LAMB. A small fresh head: Dosovitskiy et al. 2021.
VIT_TUNE = VIT | dict(
    epochs=20, base_lr=1e-5, base_batch=512, min_lr=1e-6, weight_decay=0.1, erasing=0.0,
    drop_path=0.2, crop_ratio=1.0, head_scale=0.001)

FINE_TUNING = dict(  # of ConvNeXt only B is published
    convnext_t=CONVNEXT_TUNE | dict(drop_path=0.1),
    convnext_s=CONVNEXT_TUNE, convnext_b=CONVNEXT_TUNE,
    convnext_iso_s=ISO_TUNE | dict(drop_path=0.1), convnext_iso_b=ISO_TUNE,
    vit_ti=VIT_TUNE, vit_s=VIT_TUNE, vit_b=VIT_TUNE, vit_b32=VIT_TUNE,
    vit_l=VIT_TUNE | dict(drop_path=0.45),
    vmoe_s32=VIT_TUNE | dict(moe_layers="last2"))  # V-MoE fine-tunes with SGD

# The torchvision model whose weights fit, for --init-from torchvision
TORCHVISION = dict(
    vit_b="vit_b_16", vit_b32="vit_b_32", vit_l="vit_l_16",
    convnext_t="convnext_tiny", convnext_s="convnext_small", convnext_b="convnext_base")


def recipe_of(args):
    """Return the recipe of args.model, a dict, fit for args.data and args.init_from."""
    recipe = RECIPES[args.model] | (FINE_TUNING.get(args.model, {}) if args.init_from else {})
    if "steps" in recipe and os.path.isdir(args.data):
        recipe = recipe | NANO_FOLDER
    elif (args.model, args.data) == ("convnext_nano", "shapes"):
        recipe = recipe | FIRST_RUN
    return recipe


# ---------------------------------------------------------------- flags, and the configuration

def blocks(text):
    """Turn "3,5" into [3, 5]; leave a name such as every2 as it is."""
    return [int(block) for block in text.split(",")] if text[:1].isdigit() else text


def parse_args(argv=None):
    """Return the configuration of a run, a namespace: flags, or the recipe where none is given.

    lr, batch_size and epochs may be None until settle() has seen the data.
    """
    parser = argparse.ArgumentParser(
        description="A flag that is not given has the value of the model's recipe (in train.py).",
        usage="%(prog)s [--data FOLDER] [--model NAME] ... (--help shows all flags)")
    flag = parser.add_argument
    whole, amount, share = number("[1, inf)", int), number("[0, inf)"), number("[0, 1]")

    flag("--data", default="shapes", help="shapes[:COUNT], flags[:COUNT], cifar10, cifar100, DIR")
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
    flag("--accumulate", type=whole, default=1, help="passes per step; balance, capacity see one")
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

    flag("--workers", type=number("[0, inf)", int), help="image loaders of each process")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of products")
    flag("--compile", action="store_true", help="torch.compile the model")
    flag("--save-every-minutes", type=number("[0, inf]"), default=30.0, help="within an epoch")

    parser.set_defaults(**recipe_of(parser.parse_args(argv)))
    config = parser.parse_args(argv)
    if config.expert_weight_decay is None:
        config.expert_weight_decay = config.weight_decay
    if os.path.isdir(config.data):
        config.data = os.path.abspath(config.data)  # eval.py may be started elsewhere
    return config


def settle(config, train_images, val_images, world):
    """Settle batch size, learning rates, epochs and warm-up, in place in the config.

    `world` processes train on train_images. Raise ValueError for options that do not go together.
    """
    config.train_images, config.val_images = train_images, val_images
    if config.freeze_backbone and not config.init_from:
        raise ValueError("--freeze-backbone freezes a random backbone: give --init-from, too")
    if config.layer_decay != 1 and config.model not in LAYER_DECAYED:
        raise ValueError(f"--layer-decay is for {', '.join(LAYER_DECAYED)} only: leave it out")
    if config.init_from and train_images < 50_000:  # published batches would be too few steps
        config.base_batch = min(config.base_batch, 64)
    shares = world * config.accumulate  # of a step's batch, all of one size
    batch = config.batch_size or config.base_batch
    fitting = min(batch, train_images) // shares * shares
    if fitting == 0 or config.batch_size not in (None, fitting):
        raise ValueError(
            f"--batch-size {batch}: expected a multiple of {shares} = {world} process(es) x "
            f"{config.accumulate} pass(es), up to {train_images} images: use {fitting or 'more'}")
    config.batch_size = fitting
    if config.lr is None:
        config.lr = config.base_lr * fitting / config.base_batch
    config.min_lr = min(config.min_lr, config.lr)  # a rate only falls after its warm-up
    if config.epochs is None:  # nano: about `steps` steps
        config.epochs = min(50, max(5, round(config.steps / (train_images // fitting))))
    if config.warmup_epochs >= config.epochs:
        if config.warmup_epochs != recipe_of(config)["warmup_epochs"]:  # given by the user
            raise ValueError(f"--warmup-epochs {config.warmup_epochs:g}: expected fewer than the "
                             f"{config.epochs} epochs of the run")
        config.warmup_epochs = config.epochs / 10  # the recipe's is for its own, longer run


def model_config(config, num_classes):
    """Return what eval.build_model() needs to build the model of a run, a dict."""
    names = "model moe_layers k expert_ratio router router_noise drop_path image_size"
    options = {name: getattr(config, name) for name in names.split()}
    options |= dict(num_classes=num_classes, num_experts=config.experts)
    return options | dict(capacity_factor=config.capacity_factor or None)


# ---------------------------------------------------------------- data

def open_data(config):
    """Return (training set, validation set). Raise ValueError if their classes differ."""
    train_set = open_dataset(config.data, "train", train_transform(config))
    val_set = open_dataset(config.data, "val", eval_transform(config.image_size, config.crop_ratio))
    differing = set(train_set.classes) ^ set(val_set.classes)
    if differing:
        raise ValueError(f"train and val of {config.data} have different classes: only one of them "
                         f"has {', '.join(sorted(differing)[:5])}")
    return train_set, val_set


def train_transform(config):
    """Return the augmentation of the recipe, uint8 (3, H, W) -> uint8 (3, S, S)."""
    size, bicubic = config.image_size, v2.InterpolationMode.BICUBIC
    mean_colour = [round(255 * mean) for mean in MEAN]
    steps = [eval_transform(size, config.crop_ratio)]
    if config.crop_scale < 1:
        steps = [v2.RandomResizedCrop(size, (config.crop_scale, 1.0), interpolation=bicubic)]
    if config.flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.randaug:
        # As timm's rand-m9-inc1: two operations, each with probability 1/2, magnitude 9 of 10.
        # One of torchvision's 14 operations is Identity, hence 7/13: 7/13 * 13/14 = 1/2.
        operation = v2.RandAugment(1, config.randaug, num_magnitude_bins=11, fill=mean_colour,
                                   interpolation=v2.InterpolationMode.BILINEAR)
        steps += [v2.RandomApply([operation], p=7 / 13)] * 2
    if config.erasing:
        steps.append(v2.RandomErasing(config.erasing, value=mean_colour))
    return v2.Compose(steps)


def seed_draws(*numbers):
    """Start all draws of this process from whole numbers such as (seed, epoch, image)."""
    mixed = 0
    for n in numbers:
        mixed = (mixed * 0x9E3779B1 + n + 0x7F4A7C15) % 2**32
    torch.default_generator.manual_seed(mixed)  # torch.manual_seed() also notes a stack trace
    if torch.cuda.is_initialized():  # not in a loader's process
        torch.cuda.manual_seed(mixed)


class Augmented:
    """A data set whose item epoch * N + i is image i of N, with its augmentation in this epoch."""

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key):
        epoch, index = divmod(key, len(self.dataset))
        seed_draws(self.seed, epoch, index)
        return self.dataset[index]


def image_order(config, epoch, rank, world):
    """Return the images of a process in an epoch, indices (steps, accumulate, images per pass).

    An epoch is a permutation of all images, cut into whole steps. A step is cut into world *
    accumulate shares: two passes of one process see what two processes see.
    """
    seed_draws(config.seed, epoch)
    steps, passes = config.train_images // config.batch_size, config.accumulate
    order = torch.randperm(config.train_images)[:steps * config.batch_size]
    return order.view(steps, world, passes, -1)[:, rank]


def make_mixer(config, num_classes):
    """Return MixUp and CutMix, of which each batch draws one, or None.

    It maps images and labels (B,) to images and targets (B, num_classes).
    """
    alphas = {v2.MixUp: config.mixup, v2.CutMix: config.cutmix}
    mixers = [mixer(alpha=a, num_classes=num_classes) for mixer, a in alphas.items() if a]
    return v2.RandomChoice(mixers) if mixers else None


# ---------------------------------------------------------------- weights to start from

def start_from(model, config, classes):
    """Load the weights of --init-from. Return whether the head stays fresh: for other classes."""
    family = vit if isinstance(model, vit.ViT) else convnext
    if config.init_from != "torchvision":
        there, checkpoint = load_checkpoint(config.init_from)
        weights, same_classes = there.state_dict(), checkpoint["classes"] == classes
    elif config.model not in TORCHVISION:
        raise ValueError(f"torchvision has weights for {', '.join(TORCHVISION)} only")
    else:
        file = torchvision.models.get_model_weights(TORCHVISION[config.model]).IMAGENET1K_V1
        read = partial(file.get_state_dict, check_hash=True, weights_only=True)
        place = f"place {file.url} in {torch.hub.get_dir()}/checkpoints by hand"
        weights = family.from_torchvision(download(read, place))
        same_classes = all(re.fullmatch(r"n\d{8}", name) for name in classes)  # ImageNet's
    if not same_classes:
        del weights["head.weight"]  # upcycle() will leave the head fresh
    if family is vit:
        weights = vit.resize_positions(weights, model)
    return upcycle(weights, model)


@torch.no_grad()
def upcycle(weights, model):
    """Load the state dict of a model of the same backbone, dense or sparse, into a model.

    Where the weights have an MLP and the model has a MoE, each expert becomes this MLP, see
    experts_from_mlp(), and a sparse ConvNeXt block adds no skip. A head that the weights lack, or
    have in another size, stays fresh: return whether. Raise ValueError for weights that do not fit.
    """
    state, own = dict(weights), model.state_dict()
    head = own["head.weight"]
    fresh = "head.weight" not in state or state["head.weight"].shape != head.shape
    if fresh:
        state |= {"head.weight": head, "head.bias": own["head.bias"]}
    for name, layer in model.named_modules():
        if isinstance(layer, (MoE, ExpertChoice, SoftMoE)) and f"{name}.0.weight" in state:
            leaves = ("0.weight", "0.bias", "2.weight", "2.bias")
            mlp = {leaf: state.pop(f"{name}.{leaf}") for leaf in leaves}
            for key, value in experts_from_mlp(mlp, layer).items():
                state[f"{name}.{key}"] = value
            skip = name.removesuffix("mlp") + "skip"
            if skip in own:
                state[skip] = torch.zeros(())
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit: {' '.join(str(error).split())[:300]}") from None
    return fresh


def experts_from_mlp(mlp, layer):
    """Return a state dict for a sparse layer whose experts are all copies of a dense MLP's weights.

    A MoE then computes what the MLP does, in evaluation and dropless: with equal codes each gate is
    1/E, k of them sum to k/E, and the last linear layer is multiplied by E/k. The router noise
    separates the experts. The other ways to route get copies, and fresh codes.
    """
    state = layer.state_dict()
    tokens_choose = isinstance(layer, MoE)
    scale = layer.num_experts / layer.k if tokens_choose else 1.0
    for e in range(layer.num_experts):
        for leaf, weight in mlp.items():
            state[f"experts.{e}.{leaf}"] = scale * weight if leaf.startswith("2.") else weight
    if tokens_choose:
        state["router.codes"] = state["router.codes"][:1].expand_as(state["router.codes"])
    return state


# ---------------------------------------------------------------- optimisation

def classification_loss(logits, targets, config):
    """Return the cross-entropy of logits (B, classes) with targets: a scalar, the mean over images.

    targets: labels (B,), or mixed probabilities (B, classes). Label smoothing s moves them to
    (1 - s) * targets + s / classes. --loss sigmoid (V-MoE): each class is a yes or no of its own,
    summed over the classes.
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

    As get_num_layer_for_convnext in the official optim_factory.py: 0 is the stem, 1 and 2 the first
    two stages, 3 to 11 three blocks each of the third one, 12 the last, 13 norm and head. What
    downsamples belongs to the group that follows.
    """
    part, *indices = name.split(".")
    if part == "stem":
        return 0
    if part == "downsample":
        return (2, 3, 12)[int(indices[0])]
    if part == "stages":
        stage, block = map(int, indices[:2])
        return (1, 2, 3 + block // 3, 12)[stage]
    return 13


def parameter_groups(model, weight_decay, expert_weight_decay, layer_decay=1.0):
    """Return a model's parameters in groups for the optimizer, a list of dicts.

    Keys: params, weight_decay, and lr_scale, by which train() multiplies the learning rate.
    weight_decay holds for weight matrices and convolutions, expert_weight_decay for the experts'
    matrices, 0 for the rest: norms, biases, layer scale, embeddings, router temperatures. The first
    group has lr_scale 1, the head's; each layer_group() has layer_decay of the one above.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        decay = expert_weight_decay if ".experts." in name else weight_decay
        if parameter.ndim < 2 or name in ("pos_embed", "class_token"):
            decay = 0.0
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
    left = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * left


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Move the averaged weights: ema = d * ema + (1 - d) * weights, after step 0, 1, 2, ...

    d = min(decay, (1 + step) / (10 + step)): a mean over at most the last ninth of the run. With
    d = 0.9999 a run of 1,000 steps would end with nine tenths of its random start.
    """
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


# ---------------------------------------------------------------- what a run is made of

class Run:
    """All that a run consists of, from its configuration. It is continued if its folder holds one.

    Raise ValueError for whatever is wrong, before a step is made.
    """

    def __init__(self, config):
        self.rank, self.world, self.device = setup_processes()
        self.config = config
        with together():
            self.train_set, self.val_set = open_data(config)
            settle(config, len(self.train_set), len(self.val_set), self.world)
            classes = self.train_set.classes
            torch.manual_seed(config.seed)
            self.model, self.fresh_head = build_model(model_config(config, len(classes))), True
            for parameter in self.model.head.parameters():
                parameter.data *= config.head_scale  # overwritten by a head of --init-from
            if config.init_from and not (config.out and os.path.exists(f"{config.out}/last.pt")):
                self.fresh_head = start_from(self.model, config, classes)
        if config.freeze_backbone:
            self.model.requires_grad_(False).head.requires_grad_(True)
        # ---- images: their loaders, and what mixes them
        workers = auto_workers(self.train_set, self.world, config.workers)
        self.passes = []  # those left of an epoch: for each the keys of its images in Augmented
        self.loader = DataLoader(
            Augmented(self.train_set, config.seed), batch_sampler=self.passes,
            num_workers=workers, pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0, worker_init_fn=leave_signals)
        self.steps = config.train_images // config.batch_size  # per epoch
        self.images_per_pass = config.batch_size // self.world // config.accumulate
        self.val_loader = eval_loader(self.val_set, self.images_per_pass, workers, self.device)
        self.mixer = make_mixer(config, len(classes))
        self.unreadable = set()  # indices of images
        # ---- model and optimizer
        self.model.to(self.device)
        auto = config.dtype == "auto"  # bfloat16 means autocast
        self.dtype = best_dtype(self.device) if auto else getattr(torch, config.dtype)
        self.ema = copy.deepcopy(self.model) if config.ema else None
        groups = parameter_groups(  # the rate is set by train(), step by step
            self.model, config.weight_decay, config.expert_weight_decay, config.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)
        # ---- where it stands; with the weights and the optimizer this makes a checkpoint
        self.step = 0  # of the optimizer, over all epochs
        self.log = []  # a dict per epoch that is trained and validated
        self.signal = 0  # the first SIGINT, SIGTERM or SIGHUP
        self.best = None  # the line of the log with the best top-1, of averaged weights if any
        self.saved_at = time.monotonic()
        self.folder, self.changed = None, []
        claim_and_continue(self)
        # ---- what the loop calls: the model, wrapped
        self.net = self.model
        if self.world > 1:
            warnings.filterwarnings("ignore", "Grad strides|`broadcast_buffers`")  # both harmless
            self.net = DDP(self.model, broadcast_buffers=False)
        if config.compile:
            self.net = torch.compile(self.net)


# ---------------------------------------------------------------- the loop

def train(run):
    """Train and validate, from where the run stands to its last epoch.

    Return 0, or 128 + signal after a signal, when everything is saved.
    """
    config, model = run.config, run.model
    for epoch in range(len(run.log), config.epochs):
        first_step = run.step - epoch * run.steps  # more than 0 in an interrupted epoch
        order = image_order(config, epoch, run.rank, run.world)[first_step:].flatten(0, 1)
        run.passes[:] = (epoch * config.train_images + order).tolist()
        run.net.train(not config.freeze_backbone)  # frozen layers work as in evaluation
        passes = iter(run.loader)
        meter = Meter(run)

        for _ in tqdm(range(first_step, run.steps), f"epoch {epoch + 1}", leave=False,
                      disable=run.rank > 0 or None):  # None: there is a bar on a terminal
            # ---- the rate of this step
            rate = learning_rate(run.step, run.steps, config)
            for group in run.optimizer.param_groups:
                group["lr"] = group["lr_scale"] * rate

            # ---- batch, forward, loss, backward: `accumulate` times
            losses = torch.zeros(2, device=run.device)  # cross-entropy, balance
            for part in range(config.accumulate):
                images, targets = next_batch(run, passes, part, meter)
                # DDP averages the gradients over the processes in the last pass only.
                run.net.require_backward_grad_sync = part == config.accumulate - 1
                with torch.autocast(run.device.type, torch.bfloat16, run.dtype == torch.bfloat16):
                    logits, routings = run.net(images, return_routing=True)
                loss = classification_loss(logits.float(), targets, config)
                balance = balance_loss(routings) + torch.zeros_like(loss)  # on its device
                total = loss + config.balance_weight * balance
                (total / config.accumulate).backward()
                losses += torch.stack([loss, balance]).detach() / config.accumulate
                meter.count(routings)

            # ---- step
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
            stop, due = check_and_agree(run, losses, norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
            if run.ema:
                update_ema(run.ema, model, run.step, config.ema)
            run.step += 1
            meter.losses += losses
            if stop or due:
                save(run, "last.pt")
            if stop:
                return 128 + stop

        # ---- validate, log, save
        save(run, "last.pt")  # before the validation, which may fail or be interrupted
        line = dict(epoch=epoch + 1, step=run.step, lr=run.optimizer.param_groups[0]["lr"])
        line |= meter.summary(run)
        results = validate(run)
        if results is None:  # a signal came, perhaps to another process
            return 128 + (run.signal or signal.SIGTERM)
        line |= results
        run.log.append(line)
        run.best = max(run.log, key=lambda line: line.get("ema_top1", line["top1"]))
        save(run, *["best.pt"] * (run.best is line), "last.pt")
        words = [form.format(line[name]) for name, form in WORDS.items() if name in line]
        print(f"epoch {epoch + 1}/{config.epochs}", *words, sep="  ")
    return 0


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
    targets = labels.to(run.device, non_blocking=True)
    share = run.rank * run.config.accumulate + part  # of the step's images, see image_order()
    seed_draws(run.config.seed, run.step, share)
    return run.mixer(images, targets) if run.mixer else (images, targets)


def check_and_agree(run, losses, norm):
    """Share three flags, so that all processes act alike: a non-finite loss or gradient norm, a
    stop signal, and whether it is time to save. Called before such numbers reach the weights.

    Return (signal or 0, whether to save). Raise ValueError if a number is not finite.
    """
    broken = ~(losses.isfinite().all() & norm.isfinite())
    due = time.monotonic() - run.saved_at >= 60 * run.config.save_every_minutes
    flags = torch.full((3,), float(run.signal), device=run.device)
    flags[:1], flags[2:] = broken, due  # slices: no copy from the CPU, for which a GPU would wait
    if run.world > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    broken_somewhere, stop, due = flags.tolist()  # where this loop waits for a GPU
    if broken_somewhere:
        with together():
            if broken:
                raise ValueError(
                    f"not finite at step {run.step}: [loss, balance loss] {losses.tolist()}, norm "
                    f"of the gradient {norm:.4g}; nothing of it was saved: continue with a smaller "
                    f"--lr, --clip-grad 1 or --dtype float32")
    return int(stop), bool(due)


class Meter:
    """What the log says of training: sums over this process's steps of an epoch, or of its rest."""

    def __init__(self, run):
        layers, E = len(run.model.moe_blocks), run.config.experts
        self.first_step, self.begin, self.wait = run.step, time.perf_counter(), 0.0
        self.losses = torch.zeros(2, dtype=torch.float64, device=run.device)
        self.load = torch.zeros(layers, E, dtype=torch.int64, device=run.device)
        self.dropped = torch.zeros((), dtype=torch.int64, device=run.device)

    def count(self, routings):
        """Count the choices of each expert, before any is dropped, and the dropped ones."""
        for load, routing in zip(self.load, routings):  # load (E,): a view of a layer's row
            load += F.one_hot(routing.experts, len(load)).sum((0, 1))  # (T, K) -> (T, K, E) -> (E,)
            self.dropped += (~routing.kept).sum()

    def summary(self, run):
        """Return the means over steps and processes, a dict for the log. Empty without a step."""
        if run.world > 1:
            for sums in (self.losses, self.load, self.dropped):
                dist.all_reduce(sums)
        steps, seconds = run.step - self.first_step, time.perf_counter() - self.begin
        if steps == 0:  # all were done before an interruption
            return {}
        loss, balance = (self.losses / steps / run.world).tolist()
        load = self.load.double()
        return dict(
            train_loss=loss, balance_loss=balance, seconds=seconds, data_wait=self.wait / seconds,
            images_per_s=steps * run.config.batch_size / seconds,
            dropped=(self.dropped / load.sum().clamp(min=1)).item(),
            load=(load / load.sum(1, keepdim=True)).tolist())


def validate(run):
    """Evaluate the weights, and the averaged ones. Return a dict for the log, None after a signal.

    Raise ValueError if a loss is not finite.
    """
    line = {}
    for prefix, model in (("", run.model), ("ema_", run.ema)):
        if model is None:
            break
        val = evaluate(model, run.val_loader, run.device, MEAN, STD, dtype=run.dtype,
                       loss=run.config.loss, stop=lambda: run.signal)
        if val is None:
            return None
        with together():
            if not math.isfinite(val["loss"]):
                raise ValueError("the validation loss is not finite: give a smaller --lr, and copy "
                                 "best.pt, if there is one, to last.pt to continue from there")
        line |= {f"{prefix}val_loss": val["loss"], f"{prefix}top1": val["top1"],
                 f"{prefix}top5": val["top5"]}
    return line


WORDS = dict(  # of an epoch's line
    train_loss="loss {:.4f}", balance_loss="balance {:.3f}", val_loss="val loss {:.4f}",
    top1="top-1 {:.2f}%", top5="top-5 {:.2f}%", ema_top1="EMA top-1 {:.2f}%",
    images_per_s="{:.0f} images/s", data_wait="data wait {:.0%}")

# ---------------------------------------------------------------- the run's folder

# What may change when a run is continued. Everything else must be as it was.
MAY_CHANGE = set(
    "out data workers accumulate lr min_lr clip_grad dtype compile balance_weight epochs "
    "warmup_epochs save_every_minutes val_images".split())


def claim_and_continue(run):
    """Claim the folder where all processes write, and continue the run that is there."""
    config, told = run.config, [None, None, None]
    here = run.train_set.classes, config.train_images, config.val_images
    with together():
        if run.rank == 0:
            data = os.path.basename(os.path.normpath(config.data)).replace(":", "-")
            numbered = (f"runs/{config.model}-{data}-{i}" for i in count(1))
            for folder in [config.out] if config.out else numbered:
                with suppress(FileExistsError):  # of another run, which may start just now
                    os.makedirs(folder, exist_ok=folder == config.out)
                    break
            for unfinished in glob(f"{escape(folder)}/*.pt.*.tmp"):  # by a killed process
                os.remove(unfinished)
            told = [folder, os.path.exists(f"{folder}/last.pt"), here]
    if run.world > 1:
        dist.broadcast_object_list(told)  # rank 0 decides for all
    run.folder, continued, there = told
    last, best = f"{run.folder}/last.pt", f"{run.folder}/best.pt"
    with together():
        if (os.path.exists(last), here) != (continued, there):
            raise ValueError(f"{config.data} or {last} is not what process 0 has: all processes "
                             f"must share both folders")
        if continued:
            restore(run, last)
        elif os.path.exists(best):
            raise ValueError(f"no {last}: copy {best} there to continue, or give another --out")
    save(run)  # only the log: a folder that cannot be written is found now


def restore(run, path):
    """Put a run where the checkpoint at path was made, or raise ValueError if it is of another."""
    checkpoint = read_checkpoint(path, mmap=False)  # in memory: the file will be replaced
    refused = []
    for name, now in vars(run.config).items():
        then = checkpoint["args"].get(name)
        if then != now:
            change = f"{name.replace('_', ' ')} {then} there, {now} now"
            (run.changed if name in MAY_CHANGE else refused).append(change)
    other = set(checkpoint["classes"]) ^ set(run.train_set.classes)
    if other:
        refused.append(f"only one of them has the classes {', '.join(sorted(other)[:5])}")
    if refused:
        raise ValueError(f"{run.folder} holds another run ({'; '.join(refused)}): give the same "
                         f"options and data to continue it, or another --out")
    upcycle(checkpoint["model"], run.model)  # as it is: a ValueError if the model has changed since
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    if run.ema:
        run.ema.load_state_dict(checkpoint["ema"])
    run.step, run.log, run.best = (checkpoint[name] for name in ("step", "log", "best"))


def save(run, *names):
    """Write log.jsonl, and the run as a checkpoint to the files of these names, by rank 0.

    A file is written under another name, brought to the disk and renamed: the old or the new one is
    complete, whatever happens. Raise ValueError if it cannot be written.
    """
    config, classes = run.config, run.train_set.classes
    checkpoint = dict(
        config=model_config(config, len(classes)), classes=classes, image_size=config.image_size,
        crop_ratio=config.crop_ratio, mean=MEAN, std=STD, model=run.model.state_dict(),
        ema=run.ema.state_dict() if run.ema else None, optimizer=run.optimizer.state_dict(),
        epoch=len(run.log), step=run.step, best=run.best, log=run.log, args=vars(config))
    log = "".join(json.dumps(line) + "\n" for line in run.log)
    with together():  # the others wait
        for name in ("log.jsonl", *names) if run.rank == 0 else ():
            path = f"{run.folder}/{name}"
            new = f"{path}.{os.getpid()}.tmp"  # torchrun's end may leave another process behind
            try:
                with open(new, "wb") as file:
                    torch.save(checkpoint, file) if name in names else file.write(log.encode())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(new, path)
            except (OSError, RuntimeError) as error:  # torch's: of a full disk
                with suppress(OSError):
                    os.remove(new)
                raise ValueError(f"cannot write {path} ({one_line(error.__context__ or error)}); "
                                 f"a file that was there is untouched") from None
    run.saved_at = time.monotonic()


# ---------------------------------------------------------------- what is printed, and main

def print_summary(run):
    """Print what was chosen, and what follows from it: a line per subject."""
    config, moe_blocks = run.config, run.model.moe_blocks
    total, active = count_parameters(run.model)
    sparse = f"{config.experts} experts, top {config.k}, in blocks {moe_blocks}"
    print(f"data        {config.data}: {config.train_images} images to train on, "
          f"{config.val_images} to validate, {len(run.train_set.classes)} classes")
    print(f"model       {config.model}, {sparse if moe_blocks else 'dense'}")
    print(f"parameters  {total / 1e6:.2f}M, active per token {active / 1e6:.2f}M")
    if config.init_from and not run.step:
        print(f"start       {config.init_from}{', head fresh' * run.fresh_head}")
    print(f"batch       {config.batch_size} = {run.world} process(es) x "
          f"{config.accumulate} pass(es) x {run.images_per_pass}")
    print(f"schedule    {config.epochs} epochs x {run.steps} steps, "
          f"peak lr {config.lr:.3g}, warm-up {config.warmup_epochs:g} epochs")
    print(f"machine     {run.device}, {run.dtype}; results in {run.folder}/")
    values = ", ".join(f"{name} {getattr(config, name)}" for name in sorted(recipe_of(config)))
    print(textwrap.fill(f"recipe      {values}", 98, subsequent_indent=12 * " "))
    if run.step:
        state = "finished" if len(run.log) >= config.epochs else "continuing"
        print(f"{state} after epoch {len(run.log)}, step {run.step}", *run.changed, sep=", ")


def main(config):
    """Prepare a run, train it, and say how good it got. After a signal the status is 128 + it."""
    run = Run(config)
    watch_signals(run)
    print_summary(run)
    try:
        status = train(run)
    finally:
        run.loader = run.val_loader = None  # ends their processes
    if status:
        print(f"stopped     after step {run.step}: the same flags with --out {run.folder} continue")
    else:
        flags, best = shlex.join([f"{run.folder}/best.pt", "--data", config.data]), run.best
        print(f"best top-1  {best.get('ema_top1', best['top1']):.2f}% in epoch {best['epoch']}")
        print(f"evaluate    python eval.py {flags}")
        print(f"inspect     python inspect_experts.py {flags} --out inspect")
    if run.world > 1:
        dist.destroy_process_group()
    if status:
        sys.exit(status)


if __name__ == "__main__":
    run_program(lambda: main(parse_args()))
