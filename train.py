"""Train a dense or sparse image classifier, on a laptop or under torchrun.

    python train.py                                            a sparse ConvNeXt on the embedded data, about 1 minute
    python train.py --data FOLDER --model vit_nano             your own images, one folder per class
    torchrun --nproc-per-node=8 train.py --data /imagenet --model vit_s --moe-layers every2 --experts 8 --k 2

Results go to runs/<model>-<data>-<number>/, or to --out DIR; a run named by --out continues by itself when started
again. There: last.pt and best.pt (checkpoints), log.jsonl (one line per epoch).

Every random draw depends only on the seed and on what it is for: an image's augmentation on (seed, epoch, image), a
batch's mixing, noise and drop path on (seed, step). There is no generator state to save, and neither the number of
worker processes nor an interruption changes a run: stopped by kill, Ctrl-C or a scheduler's SIGTERM and started again,
it ends with the weights of a run that was never interrupted.
"""

import argparse
import json
import math
import os
import pickle
import signal
import sys
import textwrap
import time
import warnings
from contextlib import nullcontext
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
from eval import (MEAN, STD, auto_workers, autocast, best_dtype, build_model, eval_loader, eval_transform, evaluate,
                  load_checkpoint, normalize, open_dataset, refuse_stacked_experts, setup_processes)
from moe import MoE, balance_loss, count_parameters

# ---------------------------------------------------------------- recipes
# One dictionary per family; a flag of the same name overrides an entry. lr holds for a global batch of lr_batch and
# is scaled linearly with the batch. The MoE entries are stand-ins, as the paper's table of hyperparameters could not be
# obtained: noise, capacity and balance weight are V-MoE's (Riquelme et al. 2021).

BASE = dict(
    moe_layers="last2", experts=8, expert_ratio=4, router="linear", router_noise=1.0, capacity_factor=1.05,
    balance_weight=0.005, loss="softmax", decay="cosine")
IMAGENET = BASE | dict(
    epochs=300, weight_decay=0.05, label_smoothing=0.1, mixup=0.8, cutmix=1.0, randaug=9, erasing=0.25, clip_grad=0.0,
    crop_scale=0.08, flip=1, image_size=224, crop_ratio=0.875)
CONVNEXT = IMAGENET | dict(  # Liu et al. 2022, TRAINING.md
    k=1, lr=4e-3, lr_batch=4096, batch_size=4096, min_lr=1e-6, warmup_epochs=20, ema=0.9999)
VIT = IMAGENET | dict(  # DeiT: Touvron et al. 2021, README_deit.md
    k=2, lr=1e-3, lr_batch=1024, batch_size=1024, min_lr=1e-5, warmup_epochs=5, drop_path=0.1, ema=0.99996)
VMOE = IMAGENET | dict(  # V-MoE: Riquelme et al. 2021, appendix B; it reports 73.1% for S/32
    k=2, lr=3e-3, lr_batch=8192, batch_size=8192, min_lr=1e-5, warmup_epochs=64.1, weight_decay=0.1, clip_grad=1.0,
    loss="sigmoid", decay="linear", label_smoothing=0.0, mixup=0.2, cutmix=0.0, randaug=10, erasing=0.0, drop_path=0.0,
    ema=0.0)  # 64.1 epochs are 10,000 steps
NANO = BASE | dict(  # ours, for 32-pixel images and a minute or two on a CPU: 5 to 50 epochs, for about `steps` steps
    batch_size=64, lr_batch=64, min_lr=1e-5, warmup_epochs=1, weight_decay=0.05, drop_path=0.0, label_smoothing=0.0,
    mixup=0.0, cutmix=0.0, randaug=0, erasing=0.0, clip_grad=1.0, ema=0.0, crop_scale=1.0, flip=0, image_size=32,
    crop_ratio=1.0, capacity_factor=0.0)
RECIPES = dict(
    convnext_nano=NANO | dict(k=1, lr=4e-3, steps=1250),
    convnext_t=CONVNEXT | dict(drop_path=0.1),
    convnext_s=CONVNEXT | dict(drop_path=0.4),
    convnext_b=CONVNEXT | dict(drop_path=0.5),
    convnext_iso_s=CONVNEXT | dict(drop_path=0.1, warmup_epochs=50),
    convnext_iso_b=CONVNEXT | dict(drop_path=0.2, warmup_epochs=50),
    vit_nano=NANO | dict(k=2, lr=3e-3, steps=1750),
    vit_ti=VIT, vit_s=VIT, vit_b=VIT, vit_b32=VIT, vit_l=VIT, vmoe_s32=VMOE)
# With --init-from, on top of the model's recipe (but for the nano models): ConvNeXt's and DeiT III's fine-tuning from 21k
# to 1k, without ConvNeXt's layer-wise decay of the learning rate.
CONVNEXT_TUNE = dict(
    epochs=30, lr=5e-5, lr_batch=512, batch_size=512, warmup_epochs=0, weight_decay=1e-8, mixup=0.0, cutmix=0.0)
VIT_TUNE = dict(epochs=50, lr=3e-4, lr_batch=2048, batch_size=2048, weight_decay=0.02)
# The torchvision model whose weights fit, for --init-from torchvision.
TORCHVISION = dict(vit_b="vit_b_16", vit_b32="vit_b_32", vit_l="vit_l_16",
                   convnext_t="convnext_tiny", convnext_s="convnext_small", convnext_b="convnext_base")


def parse_args(argv=None):
    """The flags as a namespace; those that are not given and belong to a recipe are None."""
    parser = argparse.ArgumentParser(description="Train a dense or sparse image classifier. A flag that is not given has "
                                     "the value of the model's recipe (top of train.py).")
    flag = parser.add_argument
    flag("--data", default="shapes", help="shapes, shapes:COUNT, cifar10, cifar100 or a folder (default: shapes)")
    flag("--model", default="convnext_nano", help=f"one of {', '.join(RECIPES)} (default: convnext_nano)")
    flag("--out", help="folder of the run, continued if it holds one (default: a new runs/<model>-<data>-<number>)")
    flag("--init-from", help="start from `torchvision`'s ImageNet weights or a checkpoint of ours; a dense one is upcycled")
    flag("--freeze-backbone", action="store_true", help="train the head only (linear probe)")
    flag("--seed", type=int, default=0, help="start of all random draws (default: 0)")

    flag("--moe-layers", help="none, every2, last2, last3, stage, or block indices such as 3,5")
    flag("--experts", type=int, help="experts E per MoE layer")
    flag("--k", type=int, help="experts K per token")
    flag("--expert-ratio", type=float, help="hidden width of an expert, in units of the model's width")
    flag("--router", help="linear, cosine or l2")
    flag("--router-noise", type=float, help="std of the training noise on the router's logits, in units of 1/E; 0 is off")
    flag("--capacity-factor", type=float, help="slots per expert in training, in units of the even share; 0: no limit")
    flag("--balance-weight", type=float, help="weight of the balance loss")

    flag("--epochs", type=int)
    flag("--batch-size", type=int, help="global: images per step over all processes")
    flag("--accumulate", type=int, default=1, help="split each step's batch into this many passes (default: 1)")
    flag("--lr", type=float, help="peak learning rate for this batch (default: the recipe's, scaled with the batch)")
    flag("--min-lr", type=float, help="learning rate at the end")
    flag("--decay", choices=("cosine", "linear"), help="from the peak to the end")
    flag("--warmup-epochs", type=float)
    flag("--weight-decay", type=float)
    flag("--expert-weight-decay", type=float, help="of the experts' weights (default: --weight-decay)")
    flag("--clip-grad", type=float, help="largest norm of the gradient; 0 is off")
    flag("--ema", type=float, help="decay per step of the averaged weights, less at the start; 0 is off")
    flag("--drop-path", type=float, help="rate at the last block")
    flag("--loss", choices=("softmax", "sigmoid"), help="cross-entropy over the classes, or of each class for itself")
    flag("--label-smoothing", type=float)
    flag("--mixup", type=float, help="alpha; 0 is off")
    flag("--cutmix", type=float, help="alpha; 0 is off")
    flag("--randaug", type=int, help="magnitude of RandAugment, 1 to 10; 0 is off")
    flag("--erasing", type=float, help="probability of erasing a rectangle")
    flag("--crop-scale", type=float, help="smallest part of an image's area that a training crop shows; 1: no random crop")
    flag("--flip", type=int, choices=(0, 1), help="1: mirror every other training image")
    flag("--image-size", type=int, help="pixels")
    flag("--crop-ratio", type=float, help="image size over the size to which evaluation resizes before its centre crop")

    flag("--workers", type=int, help="processes that load images, for each training process (default: 0 if the images are "
         "in memory, else its share of the processors, at most 12)")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on a GPU that has it")
    flag("--compile", action="store_true", help="torch.compile the model")
    flag("--save-every-minutes", type=float, default=30.0, help="also save within an epoch, this often (default: 30)")
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
    if config["moe_layers"][0].isdigit():
        config["moe_layers"] = [int(i) for i in config["moe_layers"].split(",")]
    for name in ("epochs", "batch_size", "accumulate", "image_size"):
        if config[name] is not None and config[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} {config[name]}: expected at least 1")
    return config


def find_recipe(config):
    """The recipe of the model, with --init-from its variant for fine-tuning."""
    model, tune = config["model"], {}
    if config["init_from"] and not model.endswith("_nano"):
        tune = CONVNEXT_TUNE if model.startswith("convnext") else VIT_TUNE
    return RECIPES[model] | tune


def fit_to_data(config, num_images, world):
    """Settle batch_size, lr and epochs for num_images and a world of processes, in place. ValueError if impossible."""
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
    if config["randaug"]:
        # Magnitude 9 of 10, as in timm's "rand-m9"; torchvision's default scale goes to 30. Without timm's mstd0.5.
        steps.append(v2.RandAugment(num_ops=2, magnitude=config["randaug"], num_magnitude_bins=11))
    if config["erasing"]:
        steps.append(v2.RandomErasing(config["erasing"], value=[round(255 * mean) for mean in MEAN]))
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
    A process takes every world-th image of a step, in `accumulate` parts. Before iterating set .epoch, and .first_step to
    continue inside an epoch.
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
        for step in order[:self.steps * self.batch_size].split(self.batch_size)[self.first_step:]:
            for part in step[self.rank::self.world].chunk(self.accumulate):
                yield [(self.epoch, int(index)) for index in part]


def make_mixer(config, num_classes):
    """MixUp or CutMix, by lot for each batch: (images, labels (B,)) -> (images, targets (B, num_classes)); or None."""
    mixers = [kind(alpha=config[name], num_classes=num_classes)
              for name, kind in (("mixup", v2.MixUp), ("cutmix", v2.CutMix)) if config[name]]
    return v2.RandomChoice(mixers) if mixers else None


# ---------------------------------------------------------------- optimisation


def start_from(model, config):
    """Load the weights that --init-from names into the model. Return the names left fresh.

    Raises ValueError if they do not fit, or if torchvision's weights cannot be had.
    """
    family = vit if isinstance(model, vit.ViT) else convnext
    if config["init_from"] == "torchvision":
        weights = family.from_torchvision(torchvision_weights(config["model"]))
    else:
        weights = load_checkpoint(config["init_from"], "cpu")[0].state_dict()
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
    """Cross-entropy of logits (B, classes) with labels (B,) or mixed targets (B, classes): a scalar, mean over images.

    softmax: the classes exclude each other. sigmoid (V-MoE): each class is a yes or no of its own, summed over classes.
    """
    if config["loss"] == "softmax":
        return F.cross_entropy(logits, targets, label_smoothing=config["label_smoothing"])
    targets = F.one_hot(targets, logits.shape[1]) if targets.ndim == 1 else targets
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum") / len(logits)


def parameter_groups(model, weight_decay, expert_weight_decay):
    """Return a model's parameters in groups for the optimizer, by their weight decay.

    Experts' matrices have expert_weight_decay. Not decayed are norms, biases, layer scale, router
    temperatures, class token and position embedding. All else has weight_decay.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        rate = expert_weight_decay if ".experts." in name else weight_decay
        if parameter.ndim < 2 or name in ("pos_embed", "class_token"):
            rate = 0.0
        group = groups.setdefault(rate, dict(params=[], weight_decay=rate))
        group["params"].append(parameter)
    return list(groups.values())


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


FREE_TO_CHANGE = ("out", "workers", "save_every_minutes")  # options that a continued run may have otherwise


def choose_folder(config):
    """The folder of this run, and its last checkpoint if it is to be continued: (path, checkpoint or None).

    ValueError if --out holds a run of another configuration, or a last.pt that cannot be opened.
    """
    if config["out"] is None:
        data = os.path.basename(os.path.normpath(config["data"])).replace(":", "-")
        number = 1
        while os.path.exists(f"runs/{config['model']}-{data}-{number}"):
            number += 1
        return f"runs/{config['model']}-{data}-{number}", None
    last, best = (os.path.join(config["out"], name) for name in ("last.pt", "best.pt"))
    if not os.path.exists(last):
        return config["out"], None
    try:
        checkpoint = torch.load(last, map_location="cpu", weights_only=True)
        there = checkpoint["args"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, TypeError) as error:
        offer = f"; to continue from the best epoch, copy {best} over it" if os.path.exists(best) else ""
        raise ValueError(f"{last} cannot be opened, it is truncated or not a checkpoint of train.py "
                         f"({str(error).splitlines()[0][:100]}){offer}; or give another --out") from None
    refuse_stacked_experts(last, checkpoint["model"])
    differing = [f"--{name.replace('_', '-')} {there.get(name)} there, {config[name]} now"
                 for name in config if name not in FREE_TO_CHANGE and there.get(name) != config[name]]
    if differing:
        raise ValueError(f"{config['out']} holds a run of another configuration ({'; '.join(differing)}): give the same "
                         f"options to continue it, or another --out")
    return config["out"], checkpoint


def add_up(run):
    """The unfinished epoch so far, its losses and routing summed over all processes: plain values, None between epochs."""
    if run.progress is None:
        return None
    losses, routed = run.progress["losses"].clone(), run.progress["routed"].clone()
    if run.world > 1:
        dist.all_reduce(losses)
        dist.all_reduce(routed)
    return run.progress | dict(losses=losses.tolist(), routed=routed.tolist())


def make_checkpoint(run, progress):
    """The run as a dict of plain values and tensors, which torch.load opens with weights_only=True.

    epoch: finished ones. progress: of the unfinished epoch, from add_up().
    """
    config = run.config
    return dict(
        config=model_config(config, len(run.train_set.classes)), classes=run.train_set.classes,
        image_size=config["image_size"], crop_ratio=config["crop_ratio"], mean=MEAN, std=STD,
        model=run.model.state_dict(), ema=run.ema.module.state_dict() if run.ema else None,
        optimizer=run.optimizer.state_dict(), epoch=run.epoch, step=run.step, best=run.best, progress=progress, args=config)


def restore(run, checkpoint):
    """Put a run where its checkpoint was made, and its log with it."""
    run.model.load_state_dict(checkpoint["model"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    if run.ema:
        run.ema.module.load_state_dict(checkpoint["ema"])
        run.ema.n_averaged.fill_(checkpoint["step"])
    run.epoch, run.step, run.best = checkpoint["epoch"], checkpoint["step"], checkpoint["best"]
    run.progress = checkpoint["progress"]
    if run.progress and run.rank > 0:  # rank 0 carries the sums of all processes on
        zeros = torch.zeros_like(torch.tensor(run.progress["routed"])).tolist()
        run.progress = run.progress | dict(losses=[0.0, 0.0], routed=zeros)


def save(run, *names):
    """Write the run's checkpoint to the files of these names in its folder, by rank 0, while the others wait.

    Into a temporary file in the same folder, to the disk, then renamed: at any moment the old or the new file is complete.
    If the disk is full the old file stays and the run goes on: the next save may have more luck.
    """
    progress = add_up(run)
    if run.rank == 0:
        checkpoint = make_checkpoint(run, progress)
        for path in (os.path.join(run.folder, name) for name in names):
            try:
                with open(path + ".tmp", "wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(path + ".tmp", path)
            except (OSError, RuntimeError) as error:
                if os.path.exists(path + ".tmp"):
                    os.remove(path + ".tmp")
                tqdm.write(f"warning: cannot write {path} ({str(error).splitlines()[0]}); the file of the last successful "
                           f"save is untouched", file=sys.stderr)
    run.saved_at = time.monotonic()
    if run.world > 1:
        dist.barrier()


def write_log(run, line):
    """Append an epoch's line to log.jsonl, after removing what a killed process had written for this epoch or later."""
    path, lines = os.path.join(run.folder, "log.jsonl"), []
    if os.path.exists(path):
        with open(path) as log:
            lines = [old for old in log if old.endswith("\n") and json.loads(old)["epoch"] < line["epoch"]]
    with open(path + ".tmp", "w") as log:
        log.writelines(lines + [json.dumps(line) + "\n"])
    os.replace(path + ".tmp", path)


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
    """Everything a run needs, settled before any file is written: a namespace. Raises ValueError for whatever is wrong."""
    config = resolve(args)
    rank, world, device = setup_processes()
    warnings.filterwarnings("ignore", "Grad strides do not match")  # DDP's word on depthwise convolutions: harmless
    run = SimpleNamespace(config=config, rank=rank, world=world, device=device, epoch=0, step=0, best=None, progress=None,
                          unreadable=set(), signal=0, saved_at=time.monotonic())
    run.dtype = best_dtype(device) if config["dtype"] == "auto" else getattr(torch, config["dtype"])
    run.train_set, run.val_set = open_data(config)
    fit_to_data(config, len(run.train_set), world)
    torch.manual_seed(config["seed"])
    run.model = build_model(model_config(config, len(run.train_set.classes)))
    nhwc = device.type == "cuda" and isinstance(run.model, convnext.ConvNeXt)  # there its permutes cost nothing
    run.layout = torch.channels_last if nhwc else torch.contiguous_format
    run.model.to(device, memory_format=run.layout)
    found = [choose_folder(config) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(found)  # rank 0 decides for all
    run.folder, checkpoint = found[0]
    run.fresh = start_from(run.model, config) if config["init_from"] and not checkpoint else []
    if config["freeze_backbone"]:
        run.model.requires_grad_(False)
        run.model.head.requires_grad_(True)

    workers = auto_workers(run.train_set, world) if config["workers"] is None else config["workers"]
    run.batches = Batches(len(run.train_set), config["batch_size"], config["accumulate"], config["seed"], rank, world)
    run.loader = DataLoader(Augmented(run.train_set, config["seed"]), batch_sampler=run.batches, num_workers=workers,
                            pin_memory=device.type == "cuda", persistent_workers=workers > 0)
    run.val_loader = eval_loader(run.val_set, max(1, config["batch_size"] // world), workers, device)
    run.mixer = make_mixer(config, len(run.train_set.classes))
    run.optimizer = torch.optim.AdamW(parameter_groups(run.model, config["weight_decay"], config["expert_weight_decay"]),
                                      betas=(0.9, 0.999), eps=1e-8, fused=True)
    average = lambda ema, now, _: get_ema_multi_avg_fn(ema_decay(run.step, config["ema"]))(ema, now, _)  # noqa: E731
    run.ema = AveragedModel(run.model, multi_avg_fn=average) if config["ema"] else None
    if checkpoint:
        restore(run, checkpoint)
    run.first_epoch = run.epoch
    run.net = DistributedDataParallel(run.model) if world > 1 else run.model
    run.net = torch.compile(run.net) if config["compile"] else run.net
    return run


def train_step(run, parts):
    """One optimizer step on the next batch, a loader's next `accumulate` parts; adds its numbers to run.progress."""
    config, accumulate = run.config, run.config["accumulate"]
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, run.batches.steps, config)
    losses = torch.zeros(2, device=run.device)  # cross-entropy, balance
    for part in range(accumulate):
        waiting = time.perf_counter()
        images, labels, unreadable = next(parts)
        run.progress["wait"] += time.perf_counter() - waiting
        report_unreadable(run, unreadable)
        images = normalize(images.to(run.device, non_blocking=True), MEAN, STD).contiguous(memory_format=run.layout)
        targets = labels.to(run.device, non_blocking=True)
        seed_draws(run.device, config["seed"], run.step, part)
        if run.mixer:
            images, targets = run.mixer(images, targets)
        seed_draws(run.device, config["seed"], run.step, part, run.rank)  # noise and drop path, own to each process
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
    """Let all processes know, before the weights change, what one knows: losses (2,) or a norm of the gradient that are not
    finite, a signal to stop, that it is time to save. Sets run.stop and run.save_now; raises FloatingPointError on all."""
    minutes = (time.monotonic() - run.saved_at) / 60
    flags = torch.tensor([0.0, run.signal, minutes >= run.config["save_every_minutes"]], device=run.device)
    flags[0] = ~(losses.isfinite().all() & norm.isfinite())
    if run.world > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    broken, run.stop, run.save_now = (int(flag) for flag in flags.tolist())
    if broken:
        raise FloatingPointError(
            f"loss or gradient is not finite at step {run.step} (epoch {run.epoch + 1}): cross-entropy {losses[0].item():.4g}, "
            f"balance {losses[1].item():.4g}, norm of the gradient {norm.item():.4g}, lr {run.optimizer.param_groups[0]['lr']:.3g}; nothing of this step was saved, "
            f"the last good checkpoint is {os.path.join(run.folder, 'last.pt')}; try a smaller --lr, --clip-grad 1 or "
            f"--dtype float32")


def train_epoch(run):
    """Train to the end of the epoch, from where it was left. False if a signal ended it early."""
    layers, first = len(run.model.moe_blocks), run.step - run.epoch * run.batches.steps
    columns = run.config["experts"] + 1
    start = run.progress or dict(losses=[0.0, 0.0], routed=[[0] * columns] * layers, wait=0.0, seconds=0.0)
    run.progress = start | dict(
        losses=torch.tensor(start["losses"], dtype=torch.float64, device=run.device),
        routed=torch.tensor(start["routed"], dtype=torch.int64, device=run.device).view(layers, columns))
    run.batches.epoch, run.batches.first_step = run.epoch, first
    run.net.train(not run.config["freeze_backbone"])  # frozen, it works as in evaluation: no noise, no drop path
    parts = iter(run.loader)
    clock = time.perf_counter() - run.progress["seconds"]
    for _ in tqdm(range(first, run.batches.steps), desc=f"epoch {run.epoch + 1}", unit="step", leave=False,
                  initial=first, total=run.batches.steps, disable=None if run.rank == 0 else True):
        train_step(run, parts)
        run.progress["seconds"] = time.perf_counter() - clock
        if run.stop or run.save_now:
            save(run, "last.pt")
        if run.stop:
            return False
    return True


def validate_epoch(run):
    """Evaluate after the epoch's last step; the epoch's line for the log, a dict."""
    progress, steps = add_up(run), run.batches.steps
    loss, balance = (total / steps / run.world for total in progress["losses"])
    routed = torch.tensor(progress["routed"], dtype=torch.float64).view(-1, run.config["experts"] + 1)
    choices, dropped = routed[:, :-1], routed[:, -1]
    unreadable = torch.tensor(len(run.unreadable), device=run.device)
    if run.world > 1:
        dist.all_reduce(unreadable)
    val = evaluate(run.model, run.val_loader, run.device, MEAN, STD, dtype=run.dtype)
    line = dict(epoch=run.epoch + 1, step=run.step, lr=run.optimizer.param_groups[0]["lr"], train_loss=loss,
                balance_loss=balance, val_loss=val["loss"], top1=val["top1"], top5=val["top5"],
                images_per_s=steps * run.config["batch_size"] / progress["seconds"],
                data_wait=progress["wait"] / progress["seconds"], seconds=progress["seconds"],
                dropped=(dropped.sum() / choices.sum().clamp(min=1)).item(), unreadable=unreadable.item(),
                load=(choices / choices.sum(1, keepdim=True)).tolist())
    if run.ema:
        val = evaluate(run.ema.module, run.val_loader, run.device, MEAN, STD, dtype=run.dtype)
        line |= dict(ema_val_loss=val["loss"], ema_top1=val["top1"], ema_top5=val["top5"])
    return line


def report_unreadable(run, indices):
    """Name each image that could not be read, once."""
    for index in set(indices.tolist()) - run.unreadable - {-1}:
        run.unreadable.add(index)
        tqdm.write(f"warning: cannot read {run.train_set.path(index)}: the next image takes its place", file=sys.stderr)


def print_summary(run):
    """What was chosen, and what follows from it."""
    config, (total, active) = run.config, count_parameters(run.model)
    blocks = run.model.moe_blocks
    sparse = f"{config['experts']} experts, top {config['k']}, in blocks {blocks}" if blocks else "dense"
    passes = f"{run.world} process(es) x {config['accumulate']} pass(es)"
    start = f"start       from {config['init_from']}, fresh: {', '.join(run.fresh) or 'nothing'}\n" * bool(config["init_from"])
    print(f"data        {config['data']}: {len(run.train_set)} images to train on, {len(run.val_set)} to validate, "
          f"{len(run.train_set.classes)} classes\n"
          f"model       {config['model']}, {sparse}\n{start}"
          f"parameters  {total / 1e6:.2f}M, active per token {active / 1e6:.2f}M\n"
          f"batch       {config['batch_size']} = {passes} x {config['batch_size'] // run.world // config['accumulate']}\n"
          f"schedule    {config['epochs']} epochs x {run.batches.steps} steps, peak lr {config['lr']:.3g}\n"
          f"machine     {run.device}, {str(run.dtype).removeprefix('torch.')}\n"
          f"results     {run.folder}/")
    options = ", ".join(f"{name} {config[name]}" for name in sorted(find_recipe(config)) if name in config)
    print(textwrap.fill(f"recipe      {options}", 110, subsequent_indent=12 * " "))


def print_result(run):
    """The last lines: how good it got, and what to do with it."""
    best, data = os.path.join(run.folder, "best.pt"), run.config["data"]
    held_out = "" if data.startswith(("shapes", "cifar")) or os.path.isdir(os.path.join(data, "val")) else " --split val"
    print(f"best top-1  {run.best['top1']:.2f}% in epoch {run.best['epoch']}\n"
          f"evaluate    python eval.py {best} --data {data}{held_out}")
    if run.model.moe_blocks:
        print(f"inspect     python inspect_experts.py {best} --data {data} --out {os.path.join(run.folder, 'inspect')}")


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


def main(args):
    """The whole program: prepare, then epoch by epoch train, validate, log and save. Stopped, it exits with 128 + signal."""
    run = prepare(args)
    finished = run.epoch >= run.config["epochs"]
    if run.rank == 0:
        print_summary(run)
        os.makedirs(run.folder, exist_ok=True)
        if run.step:
            print(f"{'finished' if finished else 'continuing'} after epoch {run.epoch}, step {run.step}", flush=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: setattr(run, "signal", number))  # finish the step, save, exit
    while run.epoch < run.config["epochs"]:
        if not train_epoch(run):
            run.loader = run.val_loader = None  # ends their processes, which have learned to ignore signals, too
            raise SystemExit(128 + run.stop)
        line = validate_epoch(run)
        run.epoch, run.progress = run.epoch + 1, None
        top1 = line.get("ema_top1", line["top1"])
        improved = run.best is None or top1 > run.best["top1"]
        if improved:
            run.best = dict(top1=top1, epoch=run.epoch)
        if run.rank == 0:
            write_log(run, line)
            print_epoch(run, line)
        save(run, *(["best.pt", "last.pt"] if improved else ["last.pt"]))
    if run.rank == 0:
        print_result(run)
    if run.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, FloatingPointError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, FloatingPointError) else 2)
