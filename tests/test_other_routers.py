"""moe.py, its last section: experts that choose their tokens, and Soft MoE."""

import copy
import math
import os

import pytest
import torch
from torch import nn

import eval as evaluation
import inspect_experts
import train
from checks import autocast_on_meta, has_no_loop_over_tokens
from convnext import convnext_nano
from eval import change_routing, count_flops, load_checkpoint
from moe import MLP, ExpertChoice, SoftMoE, count_parameters, make_moe
from rules import ROUND
from vit import vit_nano

BOTH = [
    pytest.param("expert_choice", marks=pytest.mark.expert_choice),
    pytest.param("soft", marks=pytest.mark.soft),
]


class Times(nn.Module):
    """An expert that multiplies."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, rows):
        return self.factor * rows


def make(router, dim=6, tokens=5, num_experts=3, k=2):
    """A layer in float64, for comparisons to many digits."""
    return make_moe(dim, 8, num_experts, k, router, tokens).double()


# ---------------------------------------------------------------- by hand


@pytest.mark.expert_choice
def test_expert_choice_by_hand():
    """The example of the docstring: 3 tokens, 2 experts, each takes C = ceil(3 * 1 / 2) = 2."""
    if ROUND(1.5) == 1:
        pytest.skip("with 1 token for each expert the example is another")
    layer = ExpertChoice(dim=1, hidden=1, num_experts=2, k=1)
    layer.router.codes.data = torch.tensor([[math.log(3.0)], [0.0]])
    layer.experts[0], layer.experts[1] = Times(10.0), Times(100.0)
    y, routing = layer(torch.tensor([[[1.0], [2.0], [-1.0]]]))
    # Expert 0: probabilities 0.75, 0.90, 0.25, so tokens 1 and 0. Expert 1: 0.25, 0.10, 0.75, so
    # tokens 2 and 0.
    expected = [0.75 * 10 + 0.25 * 100, 0.90 * 20, 0.75 * -100]
    torch.testing.assert_close(y.flatten(), torch.tensor(expected))
    assert routing.experts.tolist() == [[0], [0], [1]], "of token 0: 0.75 is more than 0.25"
    torch.testing.assert_close(routing.gates.flatten(), torch.tensor([0.75, 0.90, 0.75]))
    assert routing.kept.all() and routing.balance_loss == 0


@pytest.mark.soft
def test_soft_moe_by_hand():
    """3 tokens, 2 experts with a slot each; scores +-a with exp(2 a) = 3."""
    layer = SoftMoE(dim=1, hidden=1, num_experts=2, slots=1)
    layer.codes.data = torch.tensor([[5.0], [-7.0]])  # normalized: 1 and -1
    layer.scale.data = torch.tensor(math.log(3.0) / 2)
    layer.experts[0], layer.experts[1] = Times(10.0), Times(100.0)
    y, routing = layer(torch.tensor([[[1.0], [2.0], [-2.0]]]))  # normalized: 1, 1, -1
    # Slot 0 is (3 * 1 + 3 * 2 + 1 * -2) / 7 = 1, slot 1 is (1 * 1 + 1 * 2 + 3 * -2) / 5 = -0.6.
    # The answers are 10 and -60. Tokens 0 and 1 take 3/4 and 1/4 of them, token 2 1/4 and 3/4.
    expected = [0.75 * 10 - 0.25 * 60, 0.75 * 10 - 0.25 * 60, 0.25 * 10 - 0.75 * 60]
    torch.testing.assert_close(y.flatten(), torch.tensor(expected))
    assert routing.experts.tolist() == [[0], [0], [1]]
    torch.testing.assert_close(routing.gates.flatten(), torch.tensor([0.75, 0.75, 0.75]))
    assert routing.kept.all() and routing.balance_loss == 0


@pytest.mark.expert_choice
def test_a_token_that_no_expert_takes_gets_0():
    """Both experts prefer the other tokens: y is exactly 0, and kept is False."""
    layer = ExpertChoice(dim=2, hidden=4, num_experts=2, k=1)
    layer.router.codes.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[[5.0, 0.0], [0.0, 5.0], [1.0, 0.9], [0.9, 1.0], [0.1, 0.1], [0.3, 0.3]]])
    y, routing = layer(x)  # C = 3: each takes its own, the one that is nearly, and one more
    unmet = ~routing.kept.flatten()
    assert unmet.any() and not unmet.all()
    assert (y[0][unmet] == 0).all() and (y[0][~unmet] != 0).any(1).all()
    assert (routing.gates[unmet] == 0).all()


# ---------------------------------------------------------------- against loops


@pytest.mark.expert_choice
def test_the_expert_of_a_token_is_one_that_took_it():
    """Expert 0 is the most probable for token 2, but takes the others: expert 1 has it."""
    layer = ExpertChoice(dim=2, hidden=4, num_experts=2, k=1)
    layer.router = nn.Identity()  # the tokens are their logits
    x = torch.tensor([[[5.0, 0.0], [4.0, 0.0], [1.0, 0.9], [0.0, -9.0]]])  # C = 2
    layer.experts[0], layer.experts[1] = Times(1.0), Times(1.0)
    _, routing = layer(x)
    # Expert 0 takes tokens 3 and 0 (nearly 1 and 0.993), expert 1 tokens 2 (0.475) and 1 (0.018).
    assert routing.experts.flatten().tolist() == [0, 1, 1, 0]
    assert routing.kept.all() and routing.probs[2].argmax() == 0


@pytest.mark.soft
def test_soft_moe_against_a_loop():
    """Slot by slot: mix the tokens, ask the slot's expert, hand its answer back."""
    layer, x = make("soft"), torch.randn(4, 5, 6, dtype=torch.float64)
    S = len(layer.codes) // 3
    assert S == ROUND(5 * 2 / 3), "4, rounded up"
    layer.scale.data *= 3
    expected = torch.zeros_like(x)
    for b, image in enumerate(x):
        cosine = torch.cosine_similarity(image[:, None], layer.codes[None], dim=2)  # (N, E*S)
        scores = layer.scale * cosine
        for slot in range(3 * S):
            mixture = sum(w * token for w, token in zip(scores[:, slot].softmax(0), image))
            answer = layer.experts[slot // S](mixture)
            for n in range(5):
                expected[b, n] += scores[n].softmax(0)[slot] * answer
    torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.soft
def test_the_shares_of_the_experts_in_an_answer():
    """probs says how much of a token's answer comes from each expert: its slots' weights, added."""
    layer, x = make("soft"), torch.randn(2, 5, 6, dtype=torch.float64)
    routing = layer(x)[1]
    for n, token in enumerate(x.flatten(0, 1)):
        scores = torch.cosine_similarity(token[None], layer.codes, dim=1)  # scale is 1
        shares = scores.softmax(0).view(3, -1).sum(1).float()
        torch.testing.assert_close(routing.probs[n], shares)
        assert routing.experts[n] == shares.argmax() and routing.gates[n] == routing.probs[n].max()


# ---------------------------------------------------------------- what both promise


@pytest.mark.parametrize("router", BOTH)
def test_the_gradient_of_every_parameter(router):
    """torch's gradcheck in float64: of the input, the codes, the scale and the experts."""
    layer = make(router, dim=3, tokens=4, num_experts=2, k=1)
    names, parameters = zip(*layer.named_parameters())

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))[0]

    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.parametrize("router", BOTH)
@pytest.mark.parametrize("preset", [vit_nano, convnext_nano])
def test_a_prediction_does_not_depend_on_the_batch(router, preset):
    """An image alone and with seven others: the same logits to 1e-6."""
    model = preset(num_classes=4, moe_layers="last2", num_experts=4, k=1, router=router).eval()
    images = torch.randn(8, 3, 32, 32)
    together = model(images)
    for i in (0, 7):
        torch.testing.assert_close(model(images[i : i + 1])[0], together[i], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("router", BOTH)
@pytest.mark.parametrize("B", [2, pytest.param(0, marks=pytest.mark.edge)])
def test_a_routing_has_the_promised_shapes(router, B):
    """T rows of E or 1, in float32, int64 and bool, for pictures (B, H, W, D), also for none."""
    x = torch.randn(B, 4, 3, 6)  # N = 12
    y, routing = make_moe(6, 8, 3, 2, router, tokens=12)(x)
    assert y.shape == x.shape and y.isfinite().all(), "for no image, -1 could be anything"
    assert routing.logits.shape == routing.probs.shape == (12 * B, 3)
    assert routing.experts.shape == routing.gates.shape == routing.kept.shape == (12 * B, 1)
    types = routing.probs.dtype, routing.gates.dtype, routing.experts.dtype, routing.kept.dtype
    assert types == (torch.float32, torch.float32, torch.int64, torch.bool)


@pytest.mark.parametrize("router", BOTH)
def test_one_expert_is_a_dense_mlp_for_equal_tokens(router):
    """E = 1, k = 1: the gates are 1, and a mean of equal tokens is that token."""
    layer = make(router, tokens=5, num_experts=1, k=1)
    x = torch.randn(2, 1, 6, dtype=torch.float64).expand(2, 5, 6)
    torch.testing.assert_close(layer(x)[0], layer.experts[0](x))


@pytest.mark.parametrize("router", BOTH)
def test_bfloat16_under_autocast(router):
    """y has the type of x, within the precision of bfloat16 of the float32 result."""
    layer, x = make_moe(32, 64, 4, 2, router, tokens=9), torch.randn(3, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(x)
        half, _ = layer(x.bfloat16())
    assert y.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert routing.probs.dtype == torch.float32
    torch.testing.assert_close(y, layer(x)[0], atol=0.03, rtol=0.03)


@pytest.mark.edge
@pytest.mark.parametrize("router", BOTH)
def test_everything_is_made_on_the_device_of_the_input(router):
    """On the meta device: a tensor that forgets its device would be on the CPU, and refused."""
    layer, x = make_moe(6, 8, 3, 2, router, tokens=5), torch.empty(2, 5, 6)
    with autocast_on_meta():
        y, routing = layer.to("meta")(x.to("meta"))
    assert {y.device.type, *(part.device.type for part in routing)} == {"meta"}


@pytest.mark.edge
@pytest.mark.parametrize("router", BOTH)
def test_no_loop_goes_over_the_tokens(router):
    """As many tensor operations for images of 40 tokens as for images of 10."""
    layer = make_moe(6, 8, 3, 2, router, tokens=10)
    has_no_loop_over_tokens(layer, lambda N: [torch.randn(2, N, 6)])


@pytest.mark.slow
@pytest.mark.parametrize("router", BOTH)
def test_the_layer_compiles_into_one_graph(router):
    """torch.compile with fullgraph=True gives the same y and the same gradient."""
    torch._dynamo.reset()
    layer, x = make_moe(8, 16, 3, 2, router, tokens=6), torch.randn(2, 6, 8, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for run in (layer, compiled):
        y, _ = run(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("router", BOTH)
def test_parameters_and_multiply_adds_by_hand(router):
    """A ViT with one sparse block, beside the dense one of the same size."""
    options = dict(num_classes=10, num_experts=4, k=1, expert_ratio=4)
    dense = vit_nano(**options, moe_layers="none")
    sparse = vit_nano(**options, moe_layers=[1], router=router)
    D, N, E = 64, 17, 4  # 16 patches and the class token
    S = ROUND(17 / 4)  # 5 slots, or tokens, per expert
    mlp = sum(parameter.numel() for parameter in MLP(D, 4 * D).parameters())
    codes = E * D if router == "expert_choice" else E * S * D + 1  # + 1: the scale
    total, active = count_parameters(sparse)
    assert total == count_parameters(dense)[0] + 3 * mlp + codes
    assert active == (total - 3 * mlp if router == "expert_choice" else total)
    rows = E * S  # in all experts together; the dense MLP has N
    extra = (rows - N) * 2 * D * 4 * D
    extra += N * E * D if router == "expert_choice" else 3 * N * E * S * D  # scores; and two means
    assert count_flops(sparse, 32) - count_flops(dense, 32) == extra


@pytest.mark.parametrize("router", BOTH)
@pytest.mark.parametrize("preset", [vit_nano, convnext_nano])
def test_upcycling_copies_the_experts_but_no_codes(router, preset):
    """Each expert is the dense MLP. The codes are fresh, so the model is not the dense one."""
    options = dict(num_classes=4, num_experts=3, k=1)
    dense = preset(**options, moe_layers="none")
    sparse = preset(**options, moe_layers="last2", router=router)
    codes = "router.codes" if router == "expert_choice" else "codes"
    layers = [name for name, module in sparse.named_modules() if hasattr(module, "experts")]
    before = {name: sparse.state_dict()[f"{name}.{codes}"].clone() for name in layers}
    assert not train.upcycle(dense.state_dict(), sparse), "the head is loaded"
    for name in layers:
        assert torch.equal(sparse.state_dict()[f"{name}.{codes}"], before[name])
        for expert in sparse.get_submodule(name).experts:
            for leaf, weight in dense.get_submodule(name).state_dict().items():
                assert torch.equal(expert.state_dict()[leaf], weight)


@pytest.mark.training
@pytest.mark.parametrize("router", ["expert_choice", "soft"])
@pytest.mark.parametrize("model", ["vit_nano", "convnext_nano"])
def test_a_run_with_another_router(router, model, tmp_path, monkeypatch):
    """One epoch of three steps: the weights of every expert and of the codes have moved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "VAL_IMAGES", 48)
    flags = "--data shapes:48 --batch-size 16 --epochs 1 --experts 4 --workers 0 --out r".split()
    config = train.parse_args([*flags, "--model", model, "--router", router])
    state = train.Run(config)
    before = copy.deepcopy(state.model.state_dict())
    train.train(state)
    after = load_checkpoint("r/last.pt", "cpu")[0].state_dict()
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    expected = [name for name in after if ".experts." in name or "codes" in name]
    assert set(expected) <= set(moved)
    assert os.path.exists("r/best.pt")


@pytest.mark.evaluator
@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_flags_for_tokens_that_choose_are_refused(router):
    """--k, --capacity-factor and --drop-expert have no meaning there: one line says so."""
    model = vit_nano(num_classes=4, moe_layers="last2", router=router)
    for change in (dict(k=1), dict(capacity_factor=1.0), dict(drop_experts=[(0, 1)])):
        with pytest.raises(ValueError, match="tokens choose no experts here"):
            change_routing(model, **change)


@pytest.mark.report
@pytest.mark.parametrize("router, words", [
    ("expert_choice", "the one with the largest gate of those that took it"),
    ("soft", "the expert with the largest share in its answer"),
])
def test_a_report_says_what_counts_as_a_choice(router, words, tmp_path, monkeypatch):
    """The report of such a model ends with a sentence on what a patch counts for."""
    config = dict(
        model="vit_nano", num_classes=16, num_experts=8, moe_layers="last2", router=router
    )
    checkpoint = dict.fromkeys(evaluation.CHECKPOINT_KEYS) | dict(
        config=config, model=evaluation.build_model(config).state_dict(), args={},
        classes=evaluation.DRAWN["shapes"][1], image_size=32, crop_ratio=1.0,
        mean=evaluation.MEAN, std=evaluation.STD)
    torch.save(checkpoint, tmp_path / "r.pt")
    monkeypatch.setattr(evaluation, "VAL_IMAGES", 40)
    flags = [str(tmp_path / "r.pt"), "--data", "shapes", "--out", str(tmp_path / "report")]
    inspect_experts.main(inspect_experts.parse_args(flags))
    assert words in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


@pytest.mark.soft
def test_the_codes_of_the_slots_start_with_length_1():
    """At any width. Only their direction counts, and longer ones would turn more slowly."""
    lengths = SoftMoE(100, 8, num_experts=4, slots=25).codes.norm(dim=1)
    assert 0.7 < lengths.min() and lengths.max() < 1.3
