"""Vision Transformer, dense or sparse: some blocks have a Mixture of Experts where the others have their MLP.

Architecture: ViT (Dosovitskiy et al. 2021) with class token, learned position embedding and pre-norm blocks. With
moe_layers="none" it is exactly that. The sparse variants follow Videau et al., TMLR 2025, section 3.

    from vit import vit_s
    model = vit_s(moe_layers="every2", num_experts=8, k=2)
    logits = model(images)                                     # images (B, 3, 224, 224) -> logits (B, 1000)
    logits, routings = model(images, return_routing=True)      # and one moe.Routing per sparse block

Letters: B images, N tokens per image (class token first), D width, H hidden width, E experts, K experts per token.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import StochasticDepth

from moe import MLP, MoE, count_flops, count_parameters, upcycle

PLACEMENTS = ("none", "every2", "last2", "last3")


def place_moe(moe_layers, depth):
    """Block indices (0-based, ascending) that get a MoE, for moe_layers, a placement name or a list (paper, section 4).

    every2: the odd blocks 1, 3, 5, ...; last2 and last3: the last two or three of these. Raises ValueError for a
    placement that a network of `depth` blocks does not have.
    """
    if not isinstance(moe_layers, str):
        wrong = [i for i in moe_layers if not 0 <= i < depth]
        if wrong:
            raise ValueError(f"moe_layers names block {wrong[0]}, but the model has blocks 0 to {depth - 1}")
        return sorted(set(moe_layers))
    odd = list(range(1, depth, 2))
    blocks = {"none": [], "every2": odd, "last2": odd[-2:], "last3": odd[-3:]}.get(moe_layers)
    if blocks is None:
        raise ValueError(f"moe_layers {moe_layers!r} does not exist in a ViT: expected one of {', '.join(PLACEMENTS)} "
                         f"or a list of block indices")
    if moe_layers[:4] == "last" and len(blocks) < int(moe_layers[4:]):
        raise ValueError(f"moe_layers {moe_layers!r} needs {moe_layers[4:]} odd blocks, but {depth} blocks have {len(odd)}")
    return blocks


class Attention(nn.Module):
    """Multi-head self-attention, x (B, N, D) -> (B, N, D): softmax(q k^T / sqrt(D / heads)) v in each head, then proj."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def multiply_adds(self, x):
        """For moe.count_flops(), an int: q k^T and its product with v, for x (B, N, D); linear layers count themselves."""
        B, N, D = x.shape
        return 2 * B * N * N * D

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        # softmax(q k^T / sqrt(d)) v, without ever storing the (N, N) matrix
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, N, D))  # heads side by side again


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): x (B, N, D) -> (B, N, D), and a sparse block's Routing or None."""

    def __init__(self, dim, heads, mlp, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp
        self.drop_path = StochasticDepth(drop_path, mode="row")  # drops the branch for whole images

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        y = self.mlp(self.norm2(x))
        y, routing = y if isinstance(y, tuple) else (y, None)  # a MoE also says how it routed
        return x + self.drop_path(y), routing  # a token that found no slot has y = 0: it passes unchanged


class ViT(nn.Module):
    """images (B, 3, image_size, image_size) -> logits (B, num_classes), and with return_routing=True a list of Routing.

    dim is D, depth the number of blocks, heads that of each attention, patch_size in pixels.
    moe_layers: "none", "every2", "last2", "last3" or a list of block indices; num_experts and k: E and K of each MoE.
    mlp_ratio is H / D of the dense blocks, expert_ratio that of one expert. drop_path grows linearly from 0 at the first
    block to its value at the last.
    router, router_noise, capacity_factor: see moe.MoE. init_std: of the dense weights, as in DeiT; None leaves them to
    PyTorch (uniform in +-1/sqrt(inputs)), which suits small widths better.
    moe_blocks: the indices of the sparse blocks. grids: for each of them (class tokens, rows, columns), in the order of
    the tokens, to lay a routing out as a picture.
    """

    def __init__(self, image_size=224, patch_size=16, dim=384, depth=12, heads=6, mlp_ratio=4, num_classes=1000,
                 moe_layers="none", num_experts=8, k=2, expert_ratio=4, router="linear", router_noise=1.0,
                 capacity_factor=None, drop_path=0.0, init_std=0.02):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is not a multiple of the patch size {patch_size}")
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
                mlp = MoE(dim, int(expert_ratio * dim), num_experts, k, router, capacity_factor,
                          router_noise=router_noise)
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
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, D, rows, columns) -> (B, rows*columns, D)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed  # (B, N, D)
        routings = []
        for block in self.blocks:
            x, routing = block(x)
            if routing is not None:
                routings.append(routing)
        logits = self.head(self.norm(x)[:, 0])  # the class token speaks for the image
        return (logits, routings) if return_routing else logits


def init_weights(module, std):
    """For module.apply: truncated normal weights of deviation std, zero bias, as the official code; linear layers and
    convolutions only. Routers and experts initialise themselves."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------- weights from elsewhere

TORCHVISION = (  # what its names say, what ours say; the rest of a name is the same
    ("conv_proj.", "patch_embed."),
    ("encoder.pos_embedding", "pos_embed"),
    ("encoder.layers.encoder_layer_", "blocks."),
    (".ln_1.", ".norm1."),
    (".self_attention.in_proj_", ".attn.qkv."),
    (".self_attention.out_proj.", ".attn.proj."),
    (".ln_2.", ".norm2."),
    (".mlp.linear_1.", ".mlp.0."), (".mlp.linear_2.", ".mlp.2."),  # in its older files
    (".mlp.3.", ".mlp.2."),  # there is a dropout in between
    ("encoder.ln.", "norm."),
    ("heads.head.", "head."))


def load_torchvision(model, state_dict):
    """Load the state_dict of a torchvision VisionTransformer (vit_b_16, vit_b_32, ...) into a model of ours of that size.

    A sparse model is upcycled (moe.upcycle). For another image size the position embedding is interpolated; a head for
    another number of classes stays fresh. Returns the names left fresh; ValueError names the first tensor that does not fit.
    """
    state = {}
    for name, weight in state_dict.items():
        for theirs, ours in TORCHVISION:
            name = name.replace(theirs, ours)
        state[name] = weight
    return upcycle(resize_positions(state, model), model)


def resize_positions(state, model):
    """A state dict with its pos_embed (1, 1 + N, D) fitted to the model's image size: bicubic, the class token's apart."""
    there, here = state.get("pos_embed"), model.pos_embed
    if there is None or there.shape[1] == here.shape[1]:
        return state
    old, new = (round((pos.shape[1] - 1) ** 0.5) for pos in (there, here))
    grid = there[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, old * old, D) -> (1, D, old, old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    return state | dict(pos_embed=torch.cat([there[:, :1], grid.flatten(2).transpose(1, 2)], dim=1))


# ---------------------------------------------------------------- presets: the paper's sizes, and one for a laptop
# options: moe_layers="none", num_experts=8, k=2, expert_ratio=4, router="linear", ... as in ViT above.


def vit_nano(num_classes=1000, **options):
    """For 32-pixel images on a CPU: width 64, 4 blocks, 4x4 patches of 8 pixels."""
    sizes = dict(image_size=32, patch_size=8, dim=64, depth=4, heads=4, init_std=None)
    return ViT(**sizes | options, num_classes=num_classes)


def vit_ti(num_classes=1000, **options):
    """ViT-Ti/16: width 192, 12 blocks, 3 heads; 5.7M parameters when dense."""
    return ViT(**dict(dim=192, depth=12, heads=3) | options, num_classes=num_classes)


def vit_s(num_classes=1000, **options):
    """ViT-S/16: width 384, 12 blocks, 6 heads; 22.1M parameters when dense, 71.7M with moe_layers="every2"."""
    return ViT(**dict(dim=384, depth=12, heads=6) | options, num_classes=num_classes)


def vit_b(num_classes=1000, **options):
    """ViT-B/16: width 768, 12 blocks, 12 heads; 86.6M parameters when dense, 284.9M with moe_layers="every2"."""
    return ViT(**dict(dim=768, depth=12, heads=12) | options, num_classes=num_classes)


def vit_b32(num_classes=1000, **options):
    """ViT-B/32: the same with patches of 32 pixels, a quarter of the tokens."""
    return vit_b(num_classes, **dict(patch_size=32) | options)


def vit_l(num_classes=1000, **options):
    """ViT-L/16: width 1,024, 24 blocks, 16 heads; 304.3M parameters when dense."""
    return ViT(**dict(dim=1024, depth=24, heads=16) | options, num_classes=num_classes)


def vmoe_s32(num_classes=1000, **options):
    """V-MoE-S/32 (Riquelme et al. 2021): width 512, 8 blocks, 49 patches; 8 experts, top 2, in blocks 5 and 7."""
    sizes = dict(patch_size=32, dim=512, depth=8, heads=8, moe_layers="last2", num_experts=8, k=2)
    return ViT(**sizes | options, num_classes=num_classes)


# ---------------------------------------------------------------- python vit.py: the paper's Table 1 beside ours

DENSE = dict(moe_layers="none")
LAST2 = dict(moe_layers="last2", num_experts=8, k=2, expert_ratio=4, router="linear")
EVERY2 = dict(moe_layers="every2", num_experts=8, k=2, expert_ratio=4, router="linear")
EXACT = "active and GFLOPs exceed exact top-2"
TABLE = (
    # name, preset, options; the paper's params (M), active params (M), GFLOPs, top-1 (%); a note
    ("ViT-S", vit_s, DENSE, 22.0, 22.0, 4.6, 79.8, ""),
    ("ViT-S-8 last2", vit_s, LAST2, 38.6, 25.0, 5.3, 80.5, EXACT),
    ("ViT-S-8 every2", vit_s, EVERY2, 71.7, 33.1, 6.9, 80.7, EXACT),
    ("ViT-B", vit_b, DENSE, 86.6, 86.6, 17.5, 82.8, ""),
    ("ViT-B-8 every2", vit_b, EVERY2, 284.9, 129.9, 26.3, 82.5, EXACT))
# Table 1 trains ViT-B with DeiT III's recipe. Table 9 has its top-1 with DeiT's, which is ours.
TABLE_9 = {"ViT-B": 81.8, "ViT-B-8 every2": 82.2}


def print_table():
    """Print one line per row of TABLE. Built on the meta device: it takes seconds and no memory."""
    groups = "".join(f"{title:>18}" for title in ("params M", "active M", "GFLOPs"))
    print(f"{'':<16}{groups}{'top-1 %':>10}")
    print(f"{'':<16}" + f"{'paper':>10}{'ours':>8}" * 3 + f"{'paper':>10}")
    for name, preset, options, *paper, top1, note in TABLE:
        with torch.device("meta"):
            model = preset(**options)
        ours = [count / 1e6 for count in count_parameters(model)]
        ours.append(count_flops(model, 224) / 1e9)
        pairs = "".join(f"{theirs:>10.1f}{our:>8.1f}" for theirs, our in zip(paper, ours))
        print(f"{name:<16}{pairs}{top1:>10.1f}  {note}".rstrip())


if __name__ == "__main__":
    print_table()
