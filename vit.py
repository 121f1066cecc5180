"""Vision Transformer, dense or sparse: some blocks hold a Mixture of Experts in place of their MLP.

The architecture is ViT (Dosovitskiy et al. 2021) with a class token, a learned position embedding
and pre-norm blocks; with moe_layers="none" it is exactly that. The sparse variants follow Videau et
al., TMLR 2025, section 3.

    from vit import vit_s
    model = vit_s(moe_layers="every2", num_experts=8, k=2)
    logits = model(images)                                  # images (B, 3, 224, 224) -> (B, 1000)
    logits, routings = model(images, return_routing=True)   # and one moe.Routing per sparse block

Letters: B images, N tokens per image (the class token first), D width, H hidden width, E experts,
K experts per token. vit.py and convnext.py have parts of the same name (place_moe, Block,
init_weights, from_torchvision, TABLE) on purpose: each file can be read alone.
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import StochasticDepth

from moe import MLP, make_moe


def place_moe(moe_layers, depth):
    """Return the indices of the blocks that hold a MoE, ascending, counted from 0.

    moe_layers: a list of indices, or a placement (paper, section 4): every2 is the odd blocks 1, 3,
    5, ...; last2 and last3 are the last two or three of these; none is no block.
    Raise ValueError for another name or block, and if last2 or last3 finds fewer blocks.
    """
    odd = list(range(1, depth, 2))
    places = {"none": [], "every2": odd, "last2": odd[-2:], "last3": odd[-3:]}
    if not isinstance(moe_layers, str):
        wrong = [i for i in moe_layers if not 0 <= i < depth]
        if wrong:
            raise ValueError(f"moe_layers names block {wrong[0]}: expected 0 to {depth - 1}")
        return sorted(set(moe_layers))
    if moe_layers not in places:
        raise ValueError(f"moe_layers {moe_layers!r} does not exist in a ViT: expected one of "
                         f"{', '.join(places)}, or block indices")
    if moe_layers in ("last2", "last3") and len(odd) < int(moe_layers[-1]):
        raise ValueError(f"moe_layers {moe_layers!r} needs {moe_layers[-1]} odd blocks: a ViT of "
                         f"{depth} blocks has {len(odd)}")
    return places[moe_layers]


class Attention(nn.Module):
    """Multi-head self-attention, x (B, N, D) -> (B, N, D): softmax(q k^T / sqrt(d)) v per head."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)  # (B, N, 3 D) -> ...
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, d), d = D / heads
        y = F.scaled_dot_product_attention(q, k, v)  # never stores the (N, N) matrix
        return self.proj(y.transpose(1, 2).reshape(B, N, D))  # heads side by side again


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): x (B, N, D) -> the same, and a Routing.

    mlp: a moe.MLP, or for a sparse block what moe.make_moe() returns. The Routing of a dense block
    is None.
    """

    def __init__(self, dim, heads, mlp, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp
        self.drop_path = StochasticDepth(drop_path, mode="row")  # drops a branch for whole images

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        y = self.mlp(self.norm2(x))
        routing = None
        if not isinstance(self.mlp, MLP):
            y, routing = y
        return x + self.drop_path(y), routing  # a dropped token has y = 0: it passes unchanged


class ViT(nn.Module):
    """images (B, 3, image_size, image_size) -> logits (B, num_classes), and a list of Routing.

    The list comes with return_routing=True: one moe.Routing per sparse block, input to output.

    Args:
        dim, depth, heads: D, the number of blocks, and the heads of each attention.
        image_size, patch_size: in pixels.
        moe_layers: which blocks are sparse, see place_moe.
        num_experts, k, router, router_noise, capacity_factor: of each MoE, see moe.MoE. router may
            also be "expert_choice" or "soft", see moe.make_moe.
        mlp_ratio, expert_ratio: H / D of a dense block's MLP and of one expert.
        drop_path: the rate at the last block. It grows linearly from 0 at the first.
        init_std: deviation of linear layers' weights, as in DeiT. None leaves them to PyTorch
            (uniform in +-1/sqrt(inputs)), which suits small widths better.

    Attributes: moe_blocks, the indices of the sparse blocks; grids, for each of them (class tokens,
    rows, columns) in the order of the tokens, to lay a Routing out as a picture.
    """

    def __init__(self, image_size=224, patch_size=16, dim=384, depth=12, heads=6, mlp_ratio=4,
                 num_classes=1000, moe_layers="none", num_experts=8, k=2, expert_ratio=4,
                 router="linear", router_noise=1.0, capacity_factor=None, drop_path=0.0,
                 init_std=0.02):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is not a multiple of the patch size "
                             f"{patch_size}")
        side = image_size // patch_size
        self.image_size = image_size
        self.moe_blocks = place_moe(moe_layers, depth)
        self.grids = [(1, side, side)] * len(self.moe_blocks)

        self.patch_embed = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dim))
        self.blocks = nn.ModuleList()
        for i in range(depth):
            if i in self.moe_blocks:
                hidden, tokens = int(expert_ratio * dim), 1 + side * side
                mlp = make_moe(dim, hidden, num_experts, k, router, tokens,
                               capacity_factor=capacity_factor, router_noise=router_noise)
            else:
                mlp = MLP(dim, int(mlp_ratio * dim))
            self.blocks.append(Block(dim, heads, mlp, drop_path * i / max(1, depth - 1)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        if init_std:
            self.apply(partial(init_weights, std=init_std))
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images, return_routing=False):
        x = self.patch_embed(images)  # (B, D, rows, columns)
        x = x.flatten(2).transpose(1, 2)  # (B, D, rows, columns) -> (B, rows * columns, D)
        class_token = self.class_token.expand(len(x), -1, -1)  # (1, 1, D) -> (B, 1, D)
        x = torch.cat([class_token, x], dim=1) + self.pos_embed  # (B, N, D)
        routings = []
        for block in self.blocks:
            x, routing = block(x)
            if routing is not None:
                routings.append(routing)
        logits = self.head(self.norm(x)[:, 0])  # the class token speaks for the image
        return (logits, routings) if return_routing else logits


def init_weights(module, std):
    """Draw the weights of a linear layer from N(0, std^2), truncated, and make its biases zero.

    For module.apply, as in DeiT's code. So the experts start as the MLP of a dense block does.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------- weights from elsewhere

TORCHVISION_NAMES = (  # a part of a name there, and here; the rest of the name is the same
    ("conv_proj.", "patch_embed."),
    ("encoder.pos_embedding", "pos_embed"),
    ("encoder.layers.encoder_layer_", "blocks."),
    (".ln_1.", ".norm1."),
    (".self_attention.in_proj_", ".attn.qkv."),
    (".self_attention.out_proj.", ".attn.proj."),
    (".ln_2.", ".norm2."),
    (".mlp.linear_1.", ".mlp.0."),  # in files from before torchvision 0.12
    (".mlp.linear_2.", ".mlp.2."),
    (".mlp.3.", ".mlp.2."),  # there is a dropout in between
    ("encoder.ln.", "norm."),
    ("heads.head.", "head."),
)


def from_torchvision(state_dict):
    """Return the state dict of a torchvision VisionTransformer (vit_b_16, ...) with our names."""
    renamed = {}
    for name, weight in state_dict.items():
        for theirs, ours in TORCHVISION_NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = weight
    return renamed


def resize_positions(state_dict, model):
    """Interpolate pos_embed (1, N, D) of a state dict to the image size of the model."""
    there = state_dict.get("pos_embed")
    here = model.pos_embed
    if there is None or there.shape[1] == here.shape[1]:
        return state_dict
    old = math.isqrt(there.shape[1] - 1)  # rows and columns
    new = math.isqrt(here.shape[1] - 1)
    class_token, patches = there.split([1, old * old], dim=1)
    grid = patches.unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, old^2, D) -> (1, D, old, old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    patches = grid.flatten(2).transpose(1, 2)  # (1, D, new, new) -> (1, new^2, D)
    return state_dict | dict(pos_embed=torch.cat([class_token, patches], dim=1))


# ---------------------------------------------------------------- presets (options: see ViT)

def vit_nano(num_classes=1000, **options):
    """For 32-pixel images on a CPU: width 64, 4 blocks, 4 x 4 patches of 8 pixels."""
    sizes = dict(image_size=32, patch_size=8, dim=64, depth=4, heads=4, init_std=None)
    return ViT(**sizes | options, num_classes=num_classes)


def vit_pico(num_classes=1000, **options):
    """As vit_nano, of half the width: 32."""
    return vit_nano(num_classes, **dict(dim=32) | options)


def vit_micro(num_classes=1000, **options):
    """As vit_nano, of twice the width: 128."""
    return vit_nano(num_classes, **dict(dim=128) | options)


def vit_ti(num_classes=1000, **options):
    """ViT-Ti/16: width 192, 12 blocks, 3 heads; 5.7M parameters when dense."""
    return ViT(**dict(dim=192, depth=12, heads=3) | options, num_classes=num_classes)


def vit_s(num_classes=1000, **options):
    """ViT-S/16: width 384, 12 blocks, 6 heads; 22.1M parameters when dense, 71.7M with every2."""
    return ViT(**dict(dim=384, depth=12, heads=6) | options, num_classes=num_classes)


def vit_b(num_classes=1000, **options):
    """ViT-B/16: width 768, 12 blocks, 12 heads; 86.6M parameters when dense, 284.9M with every2."""
    return ViT(**dict(dim=768, depth=12, heads=12) | options, num_classes=num_classes)


def vit_b32(num_classes=1000, **options):
    """ViT-B/32: the same with patches of 32 pixels, a quarter of the tokens."""
    return vit_b(num_classes, **dict(patch_size=32) | options)


def vit_l(num_classes=1000, **options):
    """ViT-L/16: width 1,024, 24 blocks, 16 heads; 304.3M parameters when dense."""
    return ViT(**dict(dim=1024, depth=24, heads=16) | options, num_classes=num_classes)


def vmoe_s32(num_classes=1000, **options):
    """The sizes of V-MoE-S/32 (Riquelme et al. 2021): width 512, 8 blocks, 49 patches.

    8 experts, top 2, in blocks 5 and 7.
    """
    sizes = dict(patch_size=32, dim=512, depth=8, heads=8, moe_layers="last2", num_experts=8, k=2)
    return ViT(**sizes | options, num_classes=num_classes)


# The paper's Table 1, beside which tests/benchmark.py prints ours: name, preset, options; the
# paper's params (M), active params (M), GFLOPs and top-1 on ImageNet-1k (%); a note.
EXCEEDS = "the paper's active parameters and GFLOPs exceed exact top-2"
DENSE = dict(moe_layers="none")
LAST2 = dict(moe_layers="last2", num_experts=8, k=2, expert_ratio=4, router="linear")
EVERY2 = dict(moe_layers="every2", num_experts=8, k=2, expert_ratio=4, router="linear")
TABLE = (
    ("ViT-S", vit_s, DENSE, 22.0, 22.0, 4.6, 79.8, ""),
    ("ViT-S-8 last2", vit_s, LAST2, 38.6, 25.0, 5.3, 80.5, EXCEEDS),
    ("ViT-S-8 every2", vit_s, EVERY2, 71.7, 33.1, 6.9, 80.7, EXCEEDS),
    ("ViT-B", vit_b, DENSE, 86.6, 86.6, 17.5, 82.8, ""),
    ("ViT-B-8 every2", vit_b, EVERY2, 284.9, 129.9, 26.3, 82.5, EXCEEDS),
)
# Table 1 trains ViT-B with DeiT III's recipe. Table 9 has its top-1 with DeiT's, which is ours.
TABLE_9 = {"ViT-B": 81.8, "ViT-B-8 every2": 82.2}
