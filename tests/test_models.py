"""vit.py and convnext.py: where the experts sit, what a model costs, what dense and sparse compute.

Models are compared in float64 and with every weight drawn at random, so that a forgotten weight, a
bias at its initial zero or a norm with another epsilon shows in the logits.
"""

from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.convnext import ConvNeXt as OfficialConvNeXt
from torchvision.models.vision_transformer import VisionTransformer as OfficialViT
from torchvision.ops import StochasticDepth

import benchmark
import convnext
import vit
from checks import says
from convnext import (ConvNeXt, convnext_b, convnext_iso_b, convnext_iso_s, convnext_nano,
                      convnext_s, convnext_t)
from eval import count_flops
from moe import MLP, MoE, balance_loss, count_parameters
from train import upcycle
from vit import ViT, vit_b, vit_b32, vit_l, vit_nano, vit_s, vit_ti, vmoe_s32

VITS = [vit_nano, vit_ti, vit_s, vit_b, vit_b32, vit_l, vmoe_s32]
CONVNEXTS = [convnext_nano, convnext_t, convnext_s, convnext_b, convnext_iso_s, convnext_iso_b]
PRESETS = VITS + CONVNEXTS

# Two models small enough to train in a test. Blocks 1 and 3 of the ViT are sparse; 1, 3 and 6 of
# the ConvNeXt.
SPARSE = dict(num_classes=5, moe_layers="every2", num_experts=4)
SMALL_VIT = partial(vit_nano, dim=32, router="cosine", **SPARSE)
SMALL_CONVNEXT = partial(convnext_nano, widths=(8, 16, 32), layer_scale=0.1, **SPARSE)


def by_family(name, vits, convnexts):
    """Parametrize a test with cases of two concepts: ViTs belong to vit, ConvNeXts to convnext."""
    cases = [pytest.param(case, marks=pytest.mark.vit) for case in vits]
    cases += [pytest.param(case, marks=pytest.mark.convnext) for case in convnexts]
    return pytest.mark.parametrize(name, cases)


both = by_family("small", [SMALL_VIT], [SMALL_CONVNEXT])


def blocks_of(model):
    """All blocks from input to output, whether in one list (ViT) or in stages (ConvNeXt)."""
    stages = [model.blocks] if isinstance(model, ViT) else model.stages
    return [block for stage in stages for block in stage]


def with_random_weights(module):
    """Return the module in float64 and evaluation mode, with no weight at 0, 1 or so."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.double().eval()


# ---------------------------------------------------------------- placement: the blocks with a MoE

@pytest.mark.placement
@pytest.mark.parametrize("name, depth, expected", [
    ("none", 12, []), ("every2", 12, [1, 3, 5, 7, 9, 11]), ("every2", 5, [1, 3]),
    ("last2", 12, [9, 11]), ("last3", 24, [19, 21, 23]), ([5, 0, 11, 5], 12, [0, 5, 11])])
def test_placements_in_a_vit(name, depth, expected):
    """The sparse blocks of a ViT are the odd ones, counted from 0, or the last 2 or 3 of these."""
    assert vit.place_moe(name, depth) == expected, "counted from 0, odd means 1, 3, 5"


@pytest.mark.placement
@pytest.mark.parametrize("name, depths, expected", [
    # isotropic: one stage, placed as in a ViT
    ("every2", (6,), [1, 3, 5]),
    ("last3", (18,), [13, 15, 17]),
    # hierarchical: the stages are blocks 0-2, 3-5, 6-14 and 15-17
    ("every2", (3, 3, 9, 3), [1, 4, 7, 9, 11, 13, 16]),  # 3+1, 6+1, 6+3, ...: odd WITHIN the stage
    ("last2", (3, 3, 9, 3), [14, 17]),
    ("last3", (3, 3, 9, 3), [10, 14, 17]),  # 10 = 6 + 4, the middle of 6..14
    ("stage", (3, 3, 9, 3), [2, 5, 14, 17]),
    ("last3", (2, 5, 2), [4, 6, 8]),  # three stages, blocks 0-1, 2-6 and 7-8
    ([5, 0, 11, 5], (3, 3, 9, 3), [0, 5, 11])])  # in any order and twice
def test_placements_in_a_convnext(name, depths, expected):
    """With stages, "odd" and "last" are counted inside each. With one they are as in a ViT."""
    assert convnext.place_moe(name, depths) == expected, "odd within its stage?"


@pytest.mark.placement
@pytest.mark.parametrize("place, sizes, moe_layers, expected", [
    (vit.place_moe, 12, "stage", "stage none every2 last2 last3"),
    (vit.place_moe, 12, [3, 12], "12 11"),
    (vit.place_moe, 12, [-1], "-1 11"),
    (vit.place_moe, 5, "last3", "last3 3 5 2"),
    (convnext.place_moe, (18,), "stage", "stage none every2 last2 last3"),
    (convnext.place_moe, (3, 3, 9, 3), [18], "18 17"),
    (convnext.place_moe, (3, 1, 1), "last3", "last3")])  # block 3 is middle and last
def test_an_impossible_placement_says_what_is_possible(place, sizes, moe_layers, expected):
    """A placement that the network does not have is a ValueError that lists what it has."""
    with pytest.raises(ValueError) as error:
        place(moe_layers, sizes)
    says(error, *expected.split())


@pytest.mark.building
@pytest.mark.parametrize("model, grids", [
    # 224 / 16 = 14 patches a side, and a class token
    (partial(vit_s, moe_layers="last2"), [(1, 14, 14)] * 2),
    # 224 / 4, halved
    (partial(convnext_t, moe_layers="stage"), [(0, 56, 56), (0, 28, 28), (0, 14, 14), (0, 7, 7)]),
    (partial(convnext_iso_s, moe_layers="last2"), [(0, 14, 14)] * 2)])
def test_grids_say_how_the_tokens_lie_in_the_image(model, grids):
    """grids has (class tokens, rows, columns) of each sparse block, at its stage's resolution."""
    with torch.device("meta"):
        model = model()
    assert model.grids == grids, "is the resolution halved before or after the stage?"


# ---------------------------------------------------------------- what a model costs

# Where we do not count what the paper's Table 1 says: millions of parameters, total and per token.
WE_COUNT = {
    "ConvNeXt-S": (50.2, 50.2),  # the paper rounds to 50
    "ConvNeXt-B iso": (87.1, 87.1),  # so does the code of ConvNeXt
    "ConvNeXt-B-8 iso": (153.2, 87.1),
    "ViT-S-8 last2": (38.6, 24.4),  # exact top-2 gives ours
    "ViT-S-8 every2": (71.7, 29.2),
    "ViT-B-8 every2": (284.9, 114.9)}
SIZES = [(preset, options, *WE_COUNT.get(name, (total, active)))
         for name, preset, options, total, active, *_ in vit.TABLE + convnext.TABLE]
# Not in Table 1: timm's counts. V-MoE-S/32 by hand: 8 attentions of 1.05, 6 + 2 * 8 MLPs of 2.10
# (active: 6 + 2 * 2), and 2.12 for all the rest.
SIZES += [(vit_ti, {}, 5.7, 5.7), (vit_b32, {}, 88.2, 88.2), (vit_l, {}, 304.3, 304.3),
          (vmoe_s32, {}, 56.7, 31.5)]


@pytest.mark.costs
@pytest.mark.parametrize("preset, options, total, active", SIZES)
def test_parameter_counts_of_the_paper(preset, options, total, active):
    """Our models have the parameters of the papers', total and active, to 0.1 million."""
    with torch.device("meta"):  # shapes without memory: ViT-B with 8 experts would fill a gigabyte
        counted = count_parameters(preset(**options))
    for count, millions in zip(counted, (total, active)):
        assert abs(count / 1e6 - millions) < 0.1, (
            f"{count / 1e6:.2f}, not {millions}: expert_ratio? router? gamma?")


@pytest.mark.costs
def test_flops_of_a_vit_by_hand():
    """A 1-block ViT of width 8 on 4 patches and a class token: every product counted once."""
    model = ViT(image_size=8, patch_size=4, dim=8, depth=1, heads=2, num_classes=3)
    patches = 4 * 8 * (3 * 4 * 4)
    # qkv and proj for each of 5 tokens; q k^T and its product with v
    attention = 5 * (8 * 24 + 8 * 8) + 2 * 5 * 5 * 8
    mlp = 5 * 2 * 8 * 32
    assert count_flops(model, 8) == patches + attention + mlp + 8 * 3
    assert model.training, "counting leaves a model in its mode"


@pytest.mark.costs
def test_flops_of_a_depthwise_convolution():
    """A 7x7 depthwise convolution costs 49 per output, not 49 times the channels: by hand."""
    model = ConvNeXt(image_size=8, patch_size=4, depths=(1,), widths=(6,), num_classes=3)
    stem, positions = 4 * 6 * (3 * 4 * 4), 4
    assert count_flops(model, 8) == stem + positions * (6 * 49 + 2 * 6 * 24) + 6 * 3


@pytest.mark.costs
@pytest.mark.parametrize("router, router_cost", [  # for 4 experts, of one token
    ("linear", 4 * 64),  # codes
    ("cosine", 32 * 64 + 4 * 32),  # projection, codes
    ("l2", 32 * 64)])  # torch counts no distances
def test_sparse_costs_k_experts(router, router_cost):
    """k = 2 experts of the MLP's size cost two MLPs and their router, though there are four."""
    dense, sparse = vit_nano(3), vit_nano(3, moe_layers=[3], num_experts=4, k=2, router=router)
    more = count_flops(sparse, 32) - count_flops(dense, 32)
    assert more == 17 * (2 * 64 * 256 + router_cost)  # 17 tokens; 2 * 64 * 256: one more MLP


@pytest.mark.costs
@pytest.mark.slow  # takes 5 s
def test_the_printed_table_holds_what_it_says(capsys):
    """Our sizes are Table 1's within 2%, but where the row's note says that the paper is wrong."""
    benchmark.print_paper_table()
    printed, table = capsys.readouterr().out.splitlines()[2:], vit.TABLE + convnext.TABLE
    assert len(printed) == len(table)
    for line, (name, *_, note) in zip(printed, table):
        numbers = [float(number) for number in line.removeprefix(name).removesuffix(note).split()]
        for paper, ours in zip(numbers[::2], numbers[1::2]):
            assert note or abs(ours / paper - 1) <= 0.02, line


# ---------------------------------------------------------------- options

@pytest.mark.building
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_every_preset_passes_its_options_on(preset):
    """The options of a preset reach its MLPs, each of its MoE layers, and its head."""
    options = dict(moe_layers="last2", num_experts=6, k=3, expert_ratio=0.5, router="cosine",
                   router_noise=1.5, capacity_factor=1.25, mlp_ratio=3)
    with torch.device("meta"):
        model = preset(num_classes=7, **options)
    mlps = [block.mlp for block in blocks_of(model)]
    layers = [mlp for mlp in mlps if isinstance(mlp, MoE)]
    assert len(layers) == 2 and model.head.out_features == 7
    assert mlps[0][0].out_features == 3 * mlps[0][0].in_features
    for layer in layers:
        H, D = layer.experts[0][0].weight.shape
        assert (len(layer.experts), H) == (6, D // 2), (
            "the hidden width of an expert is expert_ratio * D, not mlp_ratio * D")
        assert (layer.num_experts, layer.k, layer.router.kind) == (6, 3, "cosine")
        assert layer.capacity_factor == 1.25
        assert layer.noise_std == 1.5 / 6, "router_noise is in units of 1 / E"
        assert layer.eval_capacity_factor is None, "capacity_factor limits training only"


@pytest.mark.building
@pytest.mark.parametrize("preset, k", [(vit_s, 2), (convnext_t, 1)])
def test_the_defaults_of_a_sparse_model(preset, k):
    """8 experts of the MLP's size, top 2 in a ViT and top 1 in a ConvNeXt. Nothing is limited or
    dropped, unless a recipe asks for it."""
    with torch.device("meta"):
        model = preset(moe_layers="last2")
    assert {m.p for m in model.modules() if isinstance(m, StochasticDepth)} == {0.0}
    layer = blocks_of(model)[-1].mlp
    H, D = layer.experts[0][0].weight.shape
    assert (len(layer.experts), H, layer.k, layer.noise_std) == (8, 4 * D, k, 1 / 8)
    assert layer.capacity_factor is None


@pytest.mark.building
@pytest.mark.parametrize("preset", VITS[1:], ids=lambda preset: preset.__name__)
def test_heads_have_64_channels(preset):
    """The papers' ViTs have heads of 64 channels, which no count of parameters shows."""
    with torch.device("meta"):
        model = preset()
    assert {64 * block.attn.heads for block in model.blocks} == {model.head.in_features}


@pytest.mark.building
@pytest.mark.parametrize("model, expected", [
    (partial(ViT, image_size=30, patch_size=8), "30 8"),
    (partial(ConvNeXt, image_size=48), "48 32")])  # stem 4, between stages 2 * 2 * 2
def test_impossible_sizes_are_refused(model, expected):
    """Sizes that do not fit are a ValueError that names the numbers, before any image is seen."""
    with torch.device("meta"), pytest.raises(ValueError) as error:
        model()
    says(error, *expected.split())


@pytest.mark.convnext
def test_a_convnext_classifies_images_of_other_sizes():
    """Convolutions and the mean over positions take other sizes: 64 x 96 in a model for 32."""
    logits, routings = SMALL_CONVNEXT()(torch.zeros(2, 3, 64, 96), return_routing=True)
    assert logits.shape == (2, 5)
    assert [len(r.logits) for r in routings] == [2 * 16 * 24, 2 * 8 * 12, 2 * 4 * 6]


# ---------------------------------------------------------------- the published dense models

@pytest.mark.vit
def test_a_dense_vit_block_is_torchs_encoder_layer():
    """A block computes what nn.TransformerEncoderLayer with norm_first=True does."""
    ours = with_random_weights(vit.Block(16, 4, MLP(16, 48), drop_path=0.0))
    like_ours = dict(activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoderLayer(16, 4, 48, dropout=0.0, **like_ours).double().eval()
    names = {
        "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.0.", "linear2.": "mlp.2.", "norm1.": "norm1.", "norm2.": "norm2."}
    state = ours.state_dict()
    theirs.load_state_dict({
        a + kind: state[b + kind] for a, b in names.items() for kind in ("weight", "bias")})
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    y, routing = ours(x)
    assert_close(y, theirs(x), msg=lambda m: f"heads split wrongly, post-norm, a skip missing? {m}")
    assert routing is None


def official_vit(num_classes=5):
    return OfficialViT(image_size=24, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16,
                       mlp_dim=32, num_classes=num_classes)


def small_vit(image_size=24):
    """Ours of the same sizes."""
    return ViT(image_size=image_size, patch_size=8, dim=16, depth=3, heads=2, mlp_ratio=2,
               num_classes=5)


def official_convnext():
    settings = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, 12, 1), CNBlockConfig(12, None, 2)]
    return OfficialConvNeXt(settings, layer_scale=0.5, num_classes=5)


def small_convnext():
    """Ours of the same sizes."""
    return ConvNeXt(image_size=32, depths=(2, 1, 2), widths=(8, 16, 12), num_classes=5,
                    layer_scale=0.5)


@pytest.mark.weights
@pytest.mark.parametrize("module, theirs, ours, size", [
    (vit, official_vit, small_vit, 24), (convnext, official_convnext, small_convnext, 32),
], ids=["vit", "convnext"])
def test_a_dense_model_is_torchvisions(module, theirs, ours, size):
    """With torchvision's weights ours has its logits and, in a random direction, its gradients of
    the images."""
    theirs, ours = with_random_weights(theirs()), ours().double().eval()
    ours.load_state_dict(module.from_torchvision(theirs.state_dict()))
    images, direction = torch.randn(2, 3, size, size).double(), torch.randn(2, 5).double()
    results = []
    for model in (ours, theirs):
        x = images.clone().requires_grad_()
        logits = model(x)
        results.append((logits, *torch.autograd.grad(logits, x, direction)))
    assert_close(*results, msg=lambda m: f"a weight in the wrong place, another epsilon? {m}")


@pytest.mark.weights
def test_older_names_of_torchvisions_vit():
    """Files from before torchvision 0.12 call the MLP's layers linear_1 and linear_2."""
    state = official_vit().state_dict()
    old = {name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): weight
           for name, weight in state.items()}
    assert "encoder.layers.encoder_layer_0.mlp.linear_1.weight" in old
    assert_close(vit.from_torchvision(old), vit.from_torchvision(state))


@pytest.mark.weights
def test_a_head_for_other_classes_stays_fresh():
    """7 classes there, 5 here: the head keeps its random start, and the caller is told."""
    theirs, ours = with_random_weights(official_vit(num_classes=7)).float(), small_vit()
    head = ours.head.weight.clone()
    assert upcycle(vit.from_torchvision(theirs.state_dict()), ours), "the head is fresh"
    assert torch.equal(ours.head.weight, head)
    assert torch.equal(ours.norm.weight, list(theirs.parameters())[-4]), "the rest is loaded"


@pytest.mark.weights
def test_positions_of_another_image_size():
    """Position embeddings linear in the row stay linear. The class token's is not touched."""
    ours = small_vit(image_size=64)  # 8 x 8 patches; the weights know 4 x 4
    state = small_vit(image_size=32).state_dict()
    rows = torch.arange(4.0).view(4, 1, 1).expand(4, 4, 16)
    state["pos_embed"] = torch.cat([torch.full((1, 16), 9.0), rows.reshape(16, 16)]).unsqueeze(0)
    fitted = vit.resize_positions(state, ours)["pos_embed"]
    assert torch.equal(fitted[0, 0], torch.full((16,), 9.0))
    grid = fitted[0, 1:].view(8, 8, 16)
    # Pixel centres: new row i lies at (i + 0.5) / 2 - 0.5 in old rows. Away from the border bicubic
    # is exact on a line.
    for i in (3, 4):
        assert_close(grid[i], torch.full((8, 16), (i + 0.5) / 2 - 0.5))
    assert_close(grid[:, 0], grid[:, 7], msg="rows and columns mixed up")
    assert vit.resize_positions(state, small_vit(image_size=32)) is state, "nothing to do"


@pytest.mark.convnext
def test_an_isotropic_convnext_by_hand():
    """One stage: patches, blocks x + MLP(norm(dwconv(x))), mean over positions, norm, head."""
    model = ConvNeXt(image_size=32, patch_size=8, depths=(2,), widths=(16,), num_classes=5)
    with_random_weights(model)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = model.stem[0](images)  # (2, 16, 4, 4), and no norm behind it
    for block in model.stages[0]:
        h = block.dwconv(x).permute(0, 2, 3, 1)
        x = x + block.mlp(block.norm(h)).permute(0, 3, 1, 2)
    assert_close(model(images), model.head(model.norm(x.mean(dim=(2, 3)))))
    for name in model.state_dict():
        assert "gamma" not in name and not name.startswith(("stem.1", "downsample"))


# ---------------------------------------------------------------- blocks, sparse and dense

@pytest.mark.vit
def test_a_sparse_vit_block_has_the_moe_in_place_of_the_mlp():
    """A sparse ViT block is x + MoE(norm(x)) after its attention, with no other skip."""
    block = with_random_weights(vit.Block(16, 2, MoE(16, 32, num_experts=4, k=2), drop_path=0.0))
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    after_attention = x + block.attn(block.norm1(x))
    y, _ = block.mlp(block.norm2(after_attention))
    assert_close(block(x)[0], after_attention + y)


@pytest.mark.convnext
def test_a_sparse_convnext_block_has_one_more_skip():
    """A sparse ConvNeXt block is x + gamma * (h + MoE(norm(h))), where h is the convolution."""
    moe = MoE(16, 32, num_experts=4, k=2)
    block = with_random_weights(convnext.Block(16, moe, drop_path=0.0, layer_scale=0.1))
    x = torch.randn(2, 16, 5, 4, dtype=torch.float64)
    h = F.conv2d(x, block.dwconv.weight, block.dwconv.bias, padding=3, groups=16)
    expected = torch.empty_like(x)
    for b in range(2):
        for row in range(5):
            for column in range(4):
                position = h[b, :, row, column]  # (16,), one token
                y, _ = block.mlp(block.norm(position))
                expected[b, :, row, column] = x[b, :, row, column] + block.gamma * (position + y)
    assert_close(block(x)[0], expected,
                 msg=lambda m: f"h + MoE(norm(h))? gamma around both? permuted back? {m}")


@pytest.mark.vit
def test_the_head_reads_the_class_token_with_its_position():
    """Without blocks the logits are those of class token + position 0, whatever the image."""
    model = with_random_weights(ViT(image_size=8, patch_size=4, dim=8, depth=0, heads=2))
    token = model.class_token[0, 0] + model.pos_embed[0, 0]
    logits = model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert_close(logits, model.head(model.norm(token)).expand(2, -1))


@pytest.mark.convnext
@pytest.mark.parametrize("kernel_size, expected", [
    (3, [[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]]),
    (7, [[16] * 4] * 4)])  # 49 weights, of which 33 lie outside of the map
def test_what_a_kernel_sees_of_a_small_map(kernel_size, expected):
    """On 4 x 4 positions of value 1 a convolution with weights of 1 counts those that it sees.

    The MoE answers 0, as to a token without a slot: a block adds its convolution and nothing else.
    """
    block = convnext.Block(1, AnswersZero(), 0.0, layer_scale=None, kernel_size=kernel_size)
    nn.init.ones_(block.dwconv.weight)
    nn.init.zeros_(block.dwconv.bias)
    x = torch.ones(1, 1, 4, 4)
    y, _ = block(x)
    assert_close((y - x)[0, 0], torch.tensor(expected).float())


class AnswersZero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x), None


@pytest.mark.building
@pytest.mark.parametrize("model, size", [
    (convnext_nano, 3), (convnext_t, 7), (convnext_iso_s, 7),
    (partial(convnext_nano, kernel_size=5), 5)])
def test_kernels_fit_the_maps(model, size):
    """The published models have depthwise 7x7 kernels. On the small maps of convnext_nano 3x3 are
    enough."""
    with torch.device("meta"):
        kernels = {block.dwconv.weight.shape[1:] for block in blocks_of(model())}
    assert kernels == {(1, size, size)}, "depthwise, as many rows as columns"


@pytest.mark.building
def test_gamma_starts_at_layer_scale():
    """gamma has a value per channel and starts at layer_scale, 1e-6 by default. None: no gamma."""
    small = partial(ConvNeXt, image_size=8, depths=(1, 1), widths=(4, 8))
    assert blocks_of(small())[1].gamma.tolist() == pytest.approx([1e-6] * 8)
    assert blocks_of(small(layer_scale=0.1))[1].gamma.tolist() == pytest.approx([0.1] * 8)
    assert blocks_of(small(layer_scale=None))[1].gamma is None


@pytest.mark.building
@pytest.mark.parametrize("model", [
    partial(vit_nano, depth=7), partial(convnext_nano, depths=(2, 3, 2))])
def test_drop_path_grows_linearly_with_depth(model):
    """Among 7 blocks with drop_path=0.6 the rates are 0, 0.1, ..., 0.6, through all stages."""
    with torch.device("meta"):
        blocks = blocks_of(model(drop_path=0.6))
    rates = [m.p for block in blocks for m in block.modules() if isinstance(m, StochasticDepth)]
    assert_close(rates, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def branch_of(name):
    """Return a block with drop path 0.75 and one branch, because two draw apart, and an input."""
    if name == "convnext":
        block = convnext.Block(8, MLP(8, 16), drop_path=0.75, layer_scale=0.5)
        return block, torch.randn(200, 8, 2, 2)
    block = vit.Block(8, 2, MLP(8, 16), drop_path=0.75)
    silent = block.attn.proj if name == "vit mlp" else block.mlp[2]
    nn.init.zeros_(silent.weight)
    nn.init.zeros_(silent.bias)
    return block, torch.randn(200, 3, 8)


@by_family("name", ["vit attention", "vit mlp"], ["convnext"])
def test_drop_path_keeps_the_mean(name):
    """Drop path removes a branch for whole images, and multiplies others by 1 / (1 - rate)."""
    block, x = branch_of(name)
    branch = block.eval()(x)[0] - x
    trained = block.train()(x)[0] - x
    dropped = torch.tensor([torch.equal(image, torch.zeros_like(image)) for image in trained])
    # The mean is 0.75 * 0 + 0.25 * 4 * branch = branch.
    assert_close(trained[~dropped], 4 * branch[~dropped],
                 msg=lambda m: f"not rescaled, or dropped by element? {m}")
    assert 20 < (~dropped).sum() < 80, "of 200 images about 50 keep the branch"


# ---------------------------------------------------------------- the whole model

@both
def test_one_routing_per_sparse_block_in_order(small):
    """return_routing=True adds a list with the Routing of each MoE layer, from input to output."""
    model, seen = small(), {}
    for i, block in enumerate(blocks_of(model)):
        if isinstance(block.mlp, MoE):  # a hook sees what the layer returned: (y, Routing)
            block.mlp.register_forward_hook(lambda _, __, output, i=i: seen.update({i: output[1]}))
    _, routings = model(torch.randn(2, 3, 32, 32), return_routing=True)
    assert list(seen) == model.moe_blocks and len(routings) == len(seen)
    for routing, block in zip(routings, model.moe_blocks):
        assert routing is seen[block], "is the list in the order of moe_blocks?"


@both
def test_tokens_are_in_reading_order(small):
    """Tokens come image by image, the class token first if there is one, then row by row."""
    model = with_random_weights(small(moe_layers=[0]))
    block = blocks_of(model)[0]
    if isinstance(model, ViT):  # let nothing mix the patches, nor tell them apart by place
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(model.pos_embed)
    else:  # a convolution that looks at the centre only
        nn.init.dirac_(block.dwconv.weight, groups=block.dwconv.groups)
    class_tokens, rows, columns = model.grids[0]
    patch = 32 // rows
    images = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    # in the second image row 2, column 1 is bright
    images[1, :, 2 * patch:3 * patch, 1 * patch:2 * patch] = 1.0
    logits = model(images, return_routing=True)[1][0].logits  # (T, E)

    per_image = class_tokens + rows * columns
    bright = per_image + class_tokens + 2 * columns + 1
    black = logits[class_tokens]  # the first patch of the first image
    different = [t for t in range(len(logits)) if not torch.allclose(logits[t], black)]
    expected = [0] * class_tokens + [per_image] * class_tokens + [bright]
    assert different == expected, "rows and columns swapped?"


@both
def test_a_prediction_does_not_depend_on_the_batch(small):
    """In evaluation an image has the same logits alone and among others, with any capacity."""
    model = with_random_weights(small(capacity_factor=1.0))
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    assert_close(model(images), alone)


@both
def test_the_gradient_reaches_every_parameter(small):
    """No weight is left out of the loss: each gets a gradient, and not only zeros."""
    model = small()
    logits, routings = model(torch.randn(8, 3, 32, 32), return_routing=True)
    loss = F.cross_entropy(logits, torch.arange(8) % 5) + balance_loss(routings)
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without, f"created but never used, or cut off: {without}"


@pytest.mark.building
@pytest.mark.parametrize("model, kinds", [  # DeiT leaves its one convolution as it is
    (partial(vit_nano, dim=128), nn.Linear),
    (partial(convnext_nano, widths=(96, 96, 192), kernel_size=7), (nn.Linear, nn.Conv2d))])
def test_init_std_is_the_spread_of_the_weights(model, kinds):
    """init_std=0.02 is the deviation of the weights, experts' too; biases start at zero."""
    model = model(init_std=0.02, moe_layers=[1])
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    assert blocks_of(model)[1].mlp.experts[0][0] in layers
    for module in layers:
        # The fewest are 96 * 3 * 4 * 4 = 4,608 weights: exact to 0.02 / sqrt(2 * 4608) = 0.0002.
        assert abs(module.weight.std() - 0.02) < 0.001 and not module.bias.any(), module
    assert isinstance(model, ConvNeXt) or model.patch_embed.bias.any()


@pytest.mark.building
def test_token_and_positions_of_a_vit_start_apart():
    """Class token and positions start random: attention could not tell equal positions apart."""
    model = vit_s(depth=1)
    assert abs(model.pos_embed.std() - 0.02) < 0.001  # 197 * 384 = 75,648 values
    assert 0.01 < model.class_token.std() < 0.03  # 384 values


# ---------------------------------------------------------------- compile, upcycle

@pytest.mark.grouped
@pytest.mark.slow
@pytest.mark.parametrize("model, dtype", [
    (partial(ViT, patch_size=4, dim=16, depth=2, heads=2), torch.bfloat16),
    (partial(ConvNeXt, depths=(2,), widths=(16,)), torch.float32)], ids=["vit", "convnext"])
def test_a_compiled_model_is_the_same_model(model, dtype):
    """torch.compile of a sparse model: the same loss, in training and in evaluation.

    In bfloat16 the model is one graph. In float32 the loops over the experts are left out of it.
    """
    model = model(image_size=8, num_classes=3, moe_layers=[1], router_noise=0)
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
    one_graph = dtype == torch.bfloat16
    torch.compiler.reset()  # forget the graphs of earlier tests
    # aot_eager traces forward and backward without the wait for a C++ compiler.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=one_graph)
    for training in (True, False):
        model.train(training)
        losses = []
        for run in (model, compiled):
            with torch.autocast("cpu", dtype, enabled=one_graph):
                logits, routings = run(images, return_routing=True)
            losses.append(F.cross_entropy(logits.float(), labels) + balance_loss(routings))
        tolerance = 1e-2 if one_graph else 1e-5  # the loop rounds its sums to bfloat16 elsewhere
        assert_close(*losses, atol=tolerance, rtol=tolerance)
        if training:
            losses[1].backward()  # the backward graph is traced, too


def dense_and_sparse(preset, **options):
    """A dense model with random weights and biases, and a sparse one of the same backbone."""
    dense = preset(num_classes=5)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.1)  # zero biases would hide a forgotten one
    return dense.eval(), preset(num_classes=5, moe_layers="last2", num_experts=4, **options).eval()


@pytest.mark.weights
@pytest.mark.parametrize("k, router", [(1, "linear"), (2, "cosine"), (4, "l2")])
@pytest.mark.parametrize("preset", [vit_nano, convnext_nano])
def test_an_upcycled_model_starts_as_the_dense_one(preset, k, router):
    """upcycle(): gates of 1/E, k of them, experts E/k times the MLP: the dense logits to 1e-6."""
    dense, sparse = dense_and_sparse(preset, k=k, router=router)
    upcycle(dense.state_dict(), sparse)
    images = torch.randn(3, 3, 32, 32)
    assert_close(sparse(images), dense(images), atol=1e-6, rtol=1e-6)


@pytest.mark.weights
def test_an_upcycled_model_learns():
    """After upcycling the router's noise separates the experts: they get different gradients."""
    dense, sparse = dense_and_sparse(vit_nano, k=1)
    upcycle(dense.state_dict(), sparse)
    images = torch.randn(8, 3, 32, 32)
    F.cross_entropy(sparse.train()(images), torch.arange(8) % 5).backward()
    experts = next(module for module in sparse.modules() if isinstance(module, MoE)).experts
    assert (experts[0][0].weight.grad != experts[1][0].weight.grad).any()


@pytest.mark.weights
def test_a_sparse_model_is_loaded_as_it_is():
    """Sparse weights are copied one to one, with their router and their skip, which upcycling has
    switched off."""
    dense, first = dense_and_sparse(convnext_nano, k=1)
    upcycle(dense.state_dict(), first)
    _, second = dense_and_sparse(convnext_nano, k=1)
    assert not upcycle(first.state_dict(), second), "the head is loaded"
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(second(images), first(images))
    assert {block.skip.item() for block in blocks_of(second) if hasattr(block, "skip")} == {0.0}


@pytest.mark.weights
def test_experts_of_another_size_cannot_be_upcycled():
    """expert_ratio 2 against an MLP of ratio 4: the error names the expert and both sizes."""
    narrow = vit_nano(num_classes=5, moe_layers=[3], expert_ratio=2)
    with pytest.raises(ValueError) as error:
        upcycle(vit_nano(num_classes=5).state_dict(), narrow)
    says(error, "blocks.3.mlp.experts.0.0.weight", "[256, 64]", "[128, 64]")
