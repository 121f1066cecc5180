"""ConvNeXt, dense or sparse: some blocks hold a Mixture of Experts in place of their MLP.

The architecture is ConvNeXt (Liu et al. 2022), with four stages, or isotropic: one resolution, like
a ViT. With moe_layers="none" it is exactly that. The sparse variants follow Videau et al., TMLR
2025, section 3: every position of the feature map is a token.

    from convnext import convnext_t
    model = convnext_t(moe_layers="last2", num_experts=4, k=1, expert_ratio=2)
    logits = model(images)                                  # images (B, 3, 224, 224) -> (B, 1000)
    logits, routings = model(images, return_routing=True)   # and one moe.Routing per sparse block

Letters: B images, C channels (the width D of the MoE), H and W rows and columns of the feature map,
E experts, K experts per token. T = B * H * W tokens, row by row. vit.py and convnext.py have parts
of the same name (place_moe, Block, init_weights, ...) on purpose: each file can be read alone.
"""

from functools import partial
from itertools import islice

import torch
import torch.nn as nn
from torchvision.ops import StochasticDepth

from moe import MLP, make_moe


def place_moe(moe_layers, depths):
    """Return the indices of the blocks that hold a MoE, ascending, counted through all stages.

    moe_layers: a list of indices, or a placement (paper, section 4). With several stages:
        every2  the odd blocks inside each stage
        last2   the last block of each of the last two stages
        last3   last2, plus the middle block of the last stage but one
        stage   the last block of each stage
    With one stage (isotropic) the placements are those of a ViT: every2 is the odd blocks, last2
    and last3 are the last two or three of these.
    Raise ValueError for another name or block, and if last2 or last3 finds fewer blocks.
    """
    depth = sum(depths)
    blocks = iter(range(depth))
    stages = [list(islice(blocks, n)) for n in depths]  # depths (2, 3): [[0, 1], [2, 3, 4]]
    if not isinstance(moe_layers, str):
        wrong = [i for i in moe_layers if not 0 <= i < depth]
        if wrong:
            raise ValueError(f"moe_layers names block {wrong[0]}: expected 0 to {depth - 1}")
        return sorted(set(moe_layers))
    odd = [i for stage in stages for i in stage[1::2]]
    places = {"none": [], "every2": odd, "last2": odd[-2:], "last3": odd[-3:]}
    if len(stages) > 1:
        ends = [stage[-1] for stage in stages]
        middle = stages[-2][depths[-2] // 2]
        places["last2"] = ends[-2:]
        places["last3"] = [middle, *ends[-2:]]
        places["stage"] = ends
    if moe_layers not in places:
        raise ValueError(f"moe_layers {moe_layers!r} does not exist in a ConvNeXt of {len(depths)} "
                         f"stage(s): expected one of {', '.join(places)}, or block indices")
    blocks = sorted(set(places[moe_layers]))
    if moe_layers in ("last2", "last3") and len(blocks) < int(moe_layers[-1]):
        raise ValueError(f"moe_layers {moe_layers!r} needs {moe_layers[-1]} different blocks: a "
                         f"ConvNeXt of depths {depths} has {blocks}")
    return blocks


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of x (B, C, H, W)."""

    def forward(self, x):
        x = super().forward(x.permute(0, 2, 3, 1))  # (B, C, H, W) -> (B, H, W, C)
        return x.permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise convolution, LayerNorm, MLP or MoE: x (B, C, H, W) -> the same, and a Routing.

    dense:   x + drop_path(gamma * MLP(norm(h)))           h = dwconv(x)
    sparse:  x + drop_path(gamma * (h + MoE(norm(h))))

    mlp: a moe.MLP, or what moe.make_moe() returns. The Routing of a dense block is None.
    The sparse block has an added skip connection around the MoE (paper, Figure 1b): a token that
    finds no slot still brings its convolution. That gamma scales this skip, too, is our reading.

    The MLP is two nn.Linear on (B, H, W, C) and not two 1x1 convolutions, as in the official code:
    the same function, but faster, and the MoE wants rows.
    """

    def __init__(self, dim, mlp, drop_path, layer_scale, kernel_size=7):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp
        if not isinstance(mlp, MLP):  # train.upcycle() sets it to 0: a dense block has no such skip
            self.register_buffer("skip", torch.ones(()))
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
        self.drop_path = StochasticDepth(drop_path, mode="row")  # drops a branch for whole images

    def forward(self, x):
        h = self.dwconv(x).permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
        y = self.mlp(self.norm(h))
        routing = None
        if not isinstance(self.mlp, MLP):
            y, routing = y
            y = self.skip * h + y
        if self.gamma is not None:
            y = self.gamma * y
        return x + self.drop_path(y.permute(0, 3, 1, 2)), routing  # (B, H, W, C) -> (B, C, H, W)


class ConvNeXt(nn.Module):
    """images (B, 3, S, S) -> logits (B, num_classes), and a list of Routing.

    The list comes with return_routing=True: one moe.Routing per sparse block, input to output.

    Args:
        depths, widths: the blocks and channels of each stage. The resolution halves in between.
            A single stage is isotropic: no norm after the stem and no layer scale.
        image_size, patch_size of the stem: in pixels. Other sizes work, too; grids is for this one.
        kernel_size: rows and columns of the depthwise convolutions, odd. All published models: 7.
        moe_layers: which blocks are sparse, see place_moe.
        num_experts, k, router, router_noise, capacity_factor: of each MoE, see moe.MoE. router may
            also be "expert_choice" or "soft", see moe.make_moe.
        mlp_ratio, expert_ratio: hidden width over C, of a dense block's MLP and of one expert.
        drop_path: the rate at the last block. It grows linearly from 0 at the first.
        layer_scale: the initial gamma. None leaves gamma out.
        init_std: deviation of the initial weights, larger for small widths. None: PyTorch's.

    Attributes: moe_blocks, the indices of the sparse blocks; grids, for each of them (0 class
    tokens, rows, columns) in the order of the tokens, to lay a Routing out as a picture.
    """

    def __init__(self, image_size=224, patch_size=4, kernel_size=7, depths=(3, 3, 9, 3),
                 widths=(96, 192, 384, 768), mlp_ratio=4, num_classes=1000, moe_layers="none",
                 num_experts=8, k=1, expert_ratio=4, router="linear", router_noise=1.0,
                 capacity_factor=None, drop_path=0.0, layer_scale=1e-6, init_std=0.02):
        super().__init__()
        isotropic = len(depths) == 1
        shrink = patch_size * 2 ** (len(depths) - 1)  # by which stem and stages divide the sides
        if image_size % shrink:
            raise ValueError(f"image size {image_size} is not a multiple of {shrink}")
        self.image_size = image_size
        self.moe_blocks = place_moe(moe_layers, depths)
        self.grids = []

        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], patch_size, stride=patch_size))
        if not isotropic:
            self.stem.append(ChannelNorm(widths[0], eps=1e-6))
        self.downsample = nn.ModuleList()
        for before, after in zip(widths, widths[1:]):
            norm = ChannelNorm(before, eps=1e-6)
            conv = nn.Conv2d(before, after, 2, stride=2)
            self.downsample.append(nn.Sequential(norm, conv))
        self.stages = nn.ModuleList()
        index, side = 0, image_size // patch_size
        for depth, dim in zip(depths, widths):
            stage = nn.ModuleList()
            for _ in range(depth):
                if index in self.moe_blocks:
                    hidden, tokens = int(expert_ratio * dim), side * side
                    mlp = make_moe(dim, hidden, num_experts, k, router, tokens,
                                   capacity_factor=capacity_factor, router_noise=router_noise)
                    self.grids.append((0, side, side))
                else:
                    mlp = MLP(dim, int(mlp_ratio * dim))
                rate = drop_path * index / max(1, sum(depths) - 1)
                stage.append(Block(dim, mlp, rate, None if isotropic else layer_scale, kernel_size))
                index += 1
            self.stages.append(stage)
            side //= 2
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], num_classes)
        if init_std:
            self.apply(partial(init_weights, std=init_std))

    def forward(self, images, return_routing=False):
        if images.is_cuda:  # all that follows is then channels_last, and the permutes are free
            images = images.contiguous(memory_format=torch.channels_last)
        x = self.stem(images)  # (B, 3, S, S) -> (B, C, H, W)
        routings = []
        for i, stage in enumerate(self.stages):
            if i > 0:
                x = self.downsample[i - 1](x)  # (B, C, H, W) -> (B, 2C, H/2, W/2)
            for block in stage:
                x, routing = block(x)
                if routing is not None:
                    routings.append(routing)
        logits = self.head(self.norm(x.mean([2, 3])))  # (B, C, H, W) -> (B, C) -> logits
        return (logits, routings) if return_routing else logits


def init_weights(module, std):
    """Draw the weights of a linear layer or convolution from N(0, std^2), truncated; zero biases.

    For module.apply, as in the official code. So the experts start like a dense block's MLP.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------- weights from elsewhere

TORCHVISION_NAMES = (  # a part of a name there (even numbers: stem and downsamplings), and here
    ("features.0.", "stem."),
    ("features.2.", "downsample.0."),
    ("features.4.", "downsample.1."),
    ("features.6.", "downsample.2."),
    ("features.1.", "stages.0."),
    ("features.3.", "stages.1."),
    ("features.5.", "stages.2."),
    ("features.7.", "stages.3."),
    ("block.0.", "dwconv."),
    ("block.2.", "norm."),
    ("block.3.", "mlp.0."),
    ("block.5.", "mlp.2."),
    ("layer_scale", "gamma"),
    ("classifier.0.", "norm."),
    ("classifier.2.", "head."),
)


def from_torchvision(state_dict):
    """Return the state dict of a torchvision ConvNeXt (convnext_tiny, ...) with our names."""
    renamed = {}
    for name, weight in state_dict.items():
        for theirs, ours in TORCHVISION_NAMES:
            name = name.replace(theirs, ours)
        if name.endswith("gamma"):
            weight = weight.flatten()  # (C, 1, 1) -> (C,)
        renamed[name] = weight
    return renamed


# ---------------------------------------------------------------- presets (options: see ConvNeXt)

def convnext_nano(num_classes=1000, **options):
    """For 32-pixel images on a CPU: 8 x 8, 4 x 4 and 2 x 2 positions, too few for 7x7 kernels."""
    sizes = dict(image_size=32, depths=(2, 3, 2), widths=(32, 64, 128), kernel_size=3)
    sizes |= dict(init_std=0.12, layer_scale=None)  # only deep networks need a layer scale
    return ConvNeXt(**sizes | options, num_classes=num_classes)


def convnext_t(num_classes=1000, **options):
    """ConvNeXt-T: 28.6M parameters when dense, 34.5M with last2, 4 experts and expert_ratio=2."""
    sizes = dict(depths=(3, 3, 9, 3), widths=(96, 192, 384, 768))
    return ConvNeXt(**sizes | options, num_classes=num_classes)


def convnext_s(num_classes=1000, **options):
    """ConvNeXt-S: 50.2M parameters when dense, 56.1M with last2, 4 experts and expert_ratio=2."""
    sizes = dict(depths=(3, 3, 27, 3), widths=(96, 192, 384, 768))
    return ConvNeXt(**sizes | options, num_classes=num_classes)


def convnext_b(num_classes=1000, **options):
    """ConvNeXt-B: 88.6M parameters when dense, 99.1M with last2, 4 experts and expert_ratio=2."""
    sizes = dict(depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024))
    return ConvNeXt(**sizes | options, num_classes=num_classes)


def convnext_iso_s(num_classes=1000, **options):
    """Isotropic ConvNeXt-S: 18 blocks of width 384, 14 x 14 positions; 22.3M, 38.9M with last2."""
    sizes = dict(patch_size=16, depths=(18,), widths=(384,))
    return ConvNeXt(**sizes | options, num_classes=num_classes)


def convnext_iso_b(num_classes=1000, **options):
    """Isotropic ConvNeXt-B: 18 blocks of width 768, 14 x 14 positions; 87.1M, 153.2M with last2."""
    sizes = dict(patch_size=16, depths=(18,), widths=(768,))
    return ConvNeXt(**sizes | options, num_classes=num_classes)


# The paper's Table 1, beside which tests/benchmark.py prints ours: name, preset, options; the
# paper's params (M), active params (M), GFLOPs and top-1 on ImageNet-1k (%); a note.
DENSE = dict(moe_layers="none")
FOUR = dict(moe_layers="last2", num_experts=4, k=1, expert_ratio=2, router="linear")
EIGHT = dict(moe_layers="last2", num_experts=8, k=1, expert_ratio=4, router="linear")
OFFICIAL = "the official code has 87.1"
ONE_MOE = "115.4 counts one MoE of two"
TABLE = (
    ("ConvNeXt-T", convnext_t, DENSE, 28.6, 28.6, 4.5, 82.1, ""),
    ("ConvNeXt-T-4", convnext_t, FOUR, 34.5, 25.6, 4.2, 82.1, ""),
    ("ConvNeXt-S", convnext_s, DENSE, 50.0, 50.0, 8.7, 83.1, ""),
    ("ConvNeXt-S-4", convnext_s, FOUR, 56.1, 47.3, 8.5, 83.1, ""),
    ("ConvNeXt-B", convnext_b, DENSE, 88.6, 88.6, 15.4, 83.8, ""),
    ("ConvNeXt-B-4", convnext_b, FOUR, 99.1, 83.4, 15.0, 83.5, ""),
    ("ConvNeXt-S iso", convnext_iso_s, DENSE, 22.3, 22.3, 4.3, 79.7, ""),
    ("ConvNeXt-S-8 iso", convnext_iso_s, EIGHT, 38.9, 22.3, 4.3, 80.3, ""),
    ("ConvNeXt-B iso", convnext_iso_b, DENSE, 82.4, 82.4, 16.9, 82.0, OFFICIAL),
    ("ConvNeXt-B-8 iso", convnext_iso_b, EIGHT, 115.4, 82.4, 16.9, 81.6, ONE_MOE),
)
