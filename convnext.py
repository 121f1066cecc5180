"""ConvNeXt, dense or sparse: some blocks have a Mixture of Experts where the others have their MLP.

Architecture: ConvNeXt (Liu et al. 2022), hierarchical with four stages, and its isotropic variant, which keeps one
resolution like a ViT. With moe_layers="none" it is exactly that. The sparse variants follow Videau et al., TMLR 2025,
section 3: every position of the feature map is a token and is routed on its own.

    from convnext import convnext_t
    model = convnext_t(moe_layers="last2", num_experts=4, k=1, expert_ratio=2)
    logits = model(images)                                     # images (B, 3, 224, 224) -> logits (B, 1000)
    logits, routings = model(images, return_routing=True)      # and one moe.Routing per sparse block

Letters: B images, C channels (the width D of the MoE), H and W rows and columns of the feature map, E experts,
K experts per token. T = B * H * W tokens, row by row.
"""

import re
from functools import partial
from itertools import accumulate

import torch
import torch.nn as nn
from torchvision.ops import StochasticDepth

from moe import MLP, MoE, count_flops, count_parameters, upcycle

PLACEMENTS = ("none", "every2", "last2", "last3", "stage")


def place_moe(moe_layers, depths):
    """Block indices (0-based through the whole network) that get a MoE, for moe_layers, a placement name or a list.

    Four stages (paper, section 4): every2 is the odd blocks inside each stage; last2 the last block of each of the last
    two stages; last3 these and the middle block of the last stage but one; stage the last block of every stage.
    One stage (isotropic): as in a ViT, every2 is the odd blocks, last2 and last3 the last two or three of these.
    Raises ValueError for a placement that a network of these depths does not have.
    """
    ends = list(accumulate(depths))  # the first block behind each stage
    if not isinstance(moe_layers, str):
        wrong = [i for i in moe_layers if not 0 <= i < ends[-1]]
        if wrong:
            raise ValueError(f"moe_layers names block {wrong[0]}, but the model has blocks 0 to {ends[-1] - 1}")
        return sorted(set(moe_layers))
    odd = [end - depth + i for depth, end in zip(depths, ends) for i in range(1, depth, 2)]
    lasts = [end - 1 for end in ends]
    if len(depths) == 1:
        places = {"none": [], "every2": odd, "last2": odd[-2:], "last3": odd[-3:]}
    else:
        middle = ends[-2] - depths[-2] + depths[-2] // 2
        places = {"none": [], "every2": odd, "last2": lasts[-2:], "last3": [middle] + lasts[-2:], "stage": lasts}
    if moe_layers not in places:
        raise ValueError(f"moe_layers {moe_layers!r} does not exist in a ConvNeXt of {len(depths)} stage(s): expected "
                         f"one of {', '.join(places)} or a list of block indices")
    if moe_layers[:4] == "last" and len(set(places[moe_layers])) < int(moe_layers[4:]):
        raise ValueError(f"moe_layers {moe_layers!r} needs {moe_layers[4:]} different blocks, but depths {depths} "
                         f"give only {sorted(set(places[moe_layers]))}")
    return sorted(places[moe_layers])


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of x (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """7x7 depthwise convolution, LayerNorm, MLP or MoE, around a residual: x (B, C, H, W) -> the same, and the Routing.

    dense:   x + drop_path(gamma * MLP(norm(h)))                       h = dwconv(x)
    sparse:  x + drop_path(gamma * (h + MoE(norm(h))))

    The sparse block has one added skip connection around the MoE (paper, Figure 1b): a token that finds no slot, or
    whose gate is small, still brings its convolution. That gamma scales the skip too is our reading of the figure.

    The MLP is two nn.Linear on (B, H, W, C), not two 1x1 convolutions on (B, C, H, W), as in the official code: the
    same function, faster, and a position is then a row, as the MoE wants it. In channels_last memory the permutes are free.
    """

    def __init__(self, dim, mlp, drop_path, layer_scale):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp
        if isinstance(mlp, MoE):
            self.register_buffer("skip", torch.ones(()))  # 1: the added skip is there; moe.upcycle() makes it 0
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
        self.drop_path = StochasticDepth(drop_path, mode="row")  # drops the branch for whole images

    def forward(self, x):
        h = self.dwconv(x).permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
        y, routing = self.mlp(self.norm(h)), None
        if isinstance(y, tuple):  # a MoE also says how it routed
            y, routing = y
            y = self.skip * h + y
        if self.gamma is not None:
            y = self.gamma * y
        return x + self.drop_path(y.permute(0, 3, 1, 2)), routing  # (B, H, W, C) -> (B, C, H, W)


class ConvNeXt(nn.Module):
    """images (B, 3, S, S) -> logits (B, num_classes), and with return_routing=True a list of Routing.

    depths and widths: blocks and channels per stage; the stem cuts patches of patch_size pixels, between stages the
    resolution halves. layer_scale: the start of gamma; None leaves it out. One stage makes it isotropic: no norm after the
    stem, no layer scale, a final norm after the pooling all the same.
    moe_layers: "none", "every2", "last2", "last3", "stage" (not if isotropic) or a list of block indices; num_experts and
    k: E and K of each MoE.
    mlp_ratio is the hidden width of the dense blocks over C, expert_ratio that of one expert. drop_path grows linearly
    from 0 at the first block to its value at the last. router, router_noise, capacity_factor: see moe.MoE.
    init_std: of the dense weights, as in the official code; None leaves them to PyTorch (uniform in +-1/sqrt(inputs)),
    which suits small widths better. image_size: only for grids; any size that the strides divide can be classified.
    moe_blocks: the indices of the sparse blocks. grids: for each of them (class tokens = 0, rows, columns), in the order
    of the tokens, to lay a routing out as a picture.
    """

    def __init__(self, image_size=224, patch_size=4, depths=(3, 3, 9, 3), widths=(96, 192, 384, 768), mlp_ratio=4,
                 num_classes=1000, moe_layers="none", num_experts=8, k=1, expert_ratio=4, router="linear",
                 router_noise=1.0, capacity_factor=None, drop_path=0.0, layer_scale=1e-6, init_std=0.02):
        super().__init__()
        isotropic = len(depths) == 1
        shrink = patch_size * 2 ** (len(depths) - 1)
        if image_size % shrink:
            raise ValueError(f"image size {image_size} is not a multiple of {shrink}, by which stem and stages divide it")
        self.image_size = image_size
        self.moe_blocks = place_moe(moe_layers, depths)
        self.grids = []

        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], patch_size, stride=patch_size))
        if not isotropic:
            self.stem.append(ChannelNorm(widths[0], eps=1e-6))
        self.downsample = nn.ModuleList(
            nn.Sequential(ChannelNorm(before, eps=1e-6), nn.Conv2d(before, after, kernel_size=2, stride=2))
            for before, after in zip(widths, widths[1:]))
        self.stages = nn.ModuleList()
        index, side = 0, image_size // patch_size
        for depth, dim in zip(depths, widths):
            stage = nn.ModuleList()
            for _ in range(depth):
                if index in self.moe_blocks:
                    mlp = MoE(dim, int(expert_ratio * dim), num_experts, k, router, capacity_factor,
                              router_noise=router_noise)
                    self.grids.append((0, side, side))
                else:
                    mlp = MLP(dim, int(mlp_ratio * dim))
                rate = drop_path * index / max(1, sum(depths) - 1)
                stage.append(Block(dim, mlp, rate, None if isotropic else layer_scale))
                index += 1
            self.stages.append(stage)
            side //= 2
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], num_classes)
        if init_std:
            self.apply(partial(init_weights, std=init_std))

    def forward(self, images, return_routing=False):
        x = self.stem(images)  # (B, 3, S, S) -> (B, C, H, W)
        routings = []
        for i, stage in enumerate(self.stages):
            if i > 0:
                x = self.downsample[i - 1](x)  # (B, C, H, W) -> (B, 2C, H/2, W/2)
            for block in stage:
                x, routing = block(x)
                if routing is not None:
                    routings.append(routing)
        logits = self.head(self.norm(x.mean([2, 3])))  # (B, C, H, W) -> (B, C) -> (B, num_classes)
        return (logits, routings) if return_routing else logits


def init_weights(module, std):
    """For module.apply: truncated normal weights of deviation std, zero bias, as the official code; linear layers and
    convolutions only. Routers and experts initialise themselves."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------- weights from elsewhere

TORCHVISION = (  # its names (in `features`, even numbers are the stem and the downsamplings, odd ones stages), and ours
    (r"features\.0\.", lambda m: "stem."),
    (r"features\.([246])\.", lambda m: f"downsample.{int(m[1]) // 2 - 1}."),
    (r"features\.([1357])\.", lambda m: f"stages.{int(m[1]) // 2}."),
    (r"block\.0\.", lambda m: "dwconv."),
    (r"block\.2\.", lambda m: "norm."),
    (r"block\.3\.", lambda m: "mlp.0."),
    (r"block\.5\.", lambda m: "mlp.2."),
    (r"layer_scale", lambda m: "gamma"),
    (r"classifier\.0\.", lambda m: "norm."),
    (r"classifier\.2\.", lambda m: "head."))


def load_torchvision(model, state_dict):
    """Load the state_dict of torchvision's convnext_tiny, _small, _base or _large into a model of ours of that size.

    A sparse model is upcycled (moe.upcycle); a head for another number of classes stays fresh. Any image size fits.
    Returns the names left fresh; ValueError names the first tensor that does not fit.
    """
    state = {}
    for name, weight in state_dict.items():
        for theirs, ours in TORCHVISION:
            name = re.sub(theirs, ours, name)
        state[name] = weight.flatten() if name.endswith("gamma") else weight  # (C, 1, 1) -> (C,)
    return upcycle(state, model)


# ---------------------------------------------------------------- presets: the paper's sizes, and one for a laptop
# options: moe_layers="none", num_experts=8, k=1, expert_ratio=4, router="linear", ... as in ConvNeXt above.


def convnext_nano(num_classes=1000, **options):
    """For 32-pixel images on a CPU: three stages of 8x8, 4x4 and 2x2 positions. So few blocks need no layer scale."""
    sizes = dict(image_size=32, depths=(2, 3, 2), widths=(32, 64, 128), layer_scale=None, init_std=None)
    return ConvNeXt(**sizes | options, num_classes=num_classes)


def convnext_t(num_classes=1000, **options):
    """ConvNeXt-T: 28.6M parameters when dense, 34.5M with last2, 4 experts and expert_ratio=2."""
    return ConvNeXt(**dict(depths=(3, 3, 9, 3), widths=(96, 192, 384, 768)) | options, num_classes=num_classes)


def convnext_s(num_classes=1000, **options):
    """ConvNeXt-S: 50.2M parameters when dense, 56.1M with last2, 4 experts and expert_ratio=2."""
    return ConvNeXt(**dict(depths=(3, 3, 27, 3), widths=(96, 192, 384, 768)) | options, num_classes=num_classes)


def convnext_b(num_classes=1000, **options):
    """ConvNeXt-B: 88.6M parameters when dense, 99.1M with last2, 4 experts and expert_ratio=2."""
    return ConvNeXt(**dict(depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024)) | options, num_classes=num_classes)


def convnext_iso_s(num_classes=1000, **options):
    """Isotropic ConvNeXt-S: 18 blocks of width 384 on 14x14 positions; 22.3M when dense, 38.9M with last2."""
    return ConvNeXt(**dict(patch_size=16, depths=(18,), widths=(384,)) | options, num_classes=num_classes)


def convnext_iso_b(num_classes=1000, **options):
    """Isotropic ConvNeXt-B: 18 blocks of width 768 on 14x14 positions; 87.1M when dense, 153.2M with last2."""
    return ConvNeXt(**dict(patch_size=16, depths=(18,), widths=(768,)) | options, num_classes=num_classes)


# ---------------------------------------------------------------- python convnext.py: the paper's Table 1 beside ours

DENSE = dict(moe_layers="none")
FOUR = dict(moe_layers="last2", num_experts=4, k=1, expert_ratio=2, router="linear")
EIGHT = dict(moe_layers="last2", num_experts=8, k=1, expert_ratio=4, router="linear")
TABLE = (
    # name, preset, options; the paper's params (M), active params (M), GFLOPs, top-1 (%); a note
    ("ConvNeXt-T", convnext_t, DENSE, 28.6, 28.6, 4.5, 82.1, ""),
    ("ConvNeXt-T-4", convnext_t, FOUR, 34.5, 25.6, 4.2, 82.1, ""),
    ("ConvNeXt-S", convnext_s, DENSE, 50.0, 50.0, 8.7, 83.1, ""),
    ("ConvNeXt-S-4", convnext_s, FOUR, 56.1, 47.3, 8.5, 83.1, ""),
    ("ConvNeXt-B", convnext_b, DENSE, 88.6, 88.6, 15.4, 83.8, ""),
    ("ConvNeXt-B-4", convnext_b, FOUR, 99.1, 83.4, 15.0, 83.5, ""),
    ("ConvNeXt-S iso", convnext_iso_s, DENSE, 22.3, 22.3, 4.3, 79.7, ""),
    ("ConvNeXt-S-8 iso", convnext_iso_s, EIGHT, 38.9, 22.3, 4.3, 80.3, ""),
    ("ConvNeXt-B iso", convnext_iso_b, DENSE, 82.4, 82.4, 16.9, 82.0,
     "params: the official code has 87.1"),
    ("ConvNeXt-B-8 iso", convnext_iso_b, EIGHT, 115.4, 82.4, 16.9, 81.6,
     "params: 115.4 counts one MoE layer of two"))


def print_table():
    """Print one line per row of TABLE. Built on the meta device: it takes seconds and no memory."""
    groups = "".join(f"{title:>18}" for title in ("params M", "active M", "GFLOPs"))
    print(f"{'':<17}{groups}{'top-1 %':>10}")
    print(f"{'':<17}" + f"{'paper':>10}{'ours':>8}" * 3 + f"{'paper':>10}")
    for name, preset, options, *paper, top1, note in TABLE:
        with torch.device("meta"):
            model = preset(**options)
        ours = [count / 1e6 for count in count_parameters(model)]
        ours.append(count_flops(model, 224) / 1e9)
        pairs = "".join(f"{theirs:>10.1f}{our:>8.1f}" for theirs, our in zip(paper, ours))
        print(f"{name:<17}{pairs}{top1:>10.1f}  {note}".rstrip())


if __name__ == "__main__":
    print_table()
