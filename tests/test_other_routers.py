"""moe.py, its last section: experts that choose their tokens, and Soft MoE."""

import copy
import math
import re

import pytest
import torch
from torch import nn

import eval as evaluation
import inspect_experts
import train
from checks import save_checkpoint
from convnext import convnext_nano
from eval import count_flops, load_checkpoint
from moe import MLP, ExpertChoice, SoftMoE, count_parameters, make_moe
from rules import ROUND
from test_moe import Times, close
from vit import vit_nano

BOTH = [pytest.param("expert_choice", marks=pytest.mark.expert_choice),
        pytest.param("soft", marks=pytest.mark.soft)]


def make(router, dim=6, tokens=5, num_experts=3, k=2):
    """A layer in float64, for comparisons to many digits."""
    return make_moe(dim, 8, num_experts, k, router, tokens).double()


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
    close(y.flatten(), [0.75 * 10 + 0.25 * 100, 0.90 * 20, 0.75 * -100])
    close(routing.experts, [[0], [0], [1]], "of token 0: 0.75 is more than 0.25")
    close(routing.gates, [[0.75], [0.90], [0.75]])
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
    close(y.flatten(), [0.75 * 10 - 0.25 * 60, 0.75 * 10 - 0.25 * 60, 0.25 * 10 - 0.75 * 60])
    close(routing.experts, [[0], [0], [1]])
    close(routing.gates, [[0.75], [0.75], [0.75]])
    assert routing.kept.all() and routing.balance_loss == 0


@pytest.mark.expert_choice
def test_a_token_that_no_expert_takes_gets_0():
    """Its y and gate are exactly 0. What others got is by the experts that took them."""
    layer = ExpertChoice(dim=3, hidden=4, num_experts=3, k=1)
    layer.router = nn.Identity()  # the tokens are their logits
    layer.experts[0], layer.experts[1], layer.experts[2] = Times(10), Times(100), Times(1000)
    # C = 1. In each column the largest: expert 0 takes token 0, experts 1 and 2 take token 2.
    x = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.2, 0.2], [0.45, 0.3, 0.25]]).log()
    y, routing = layer(x.unsqueeze(0))
    close(y[0], torch.tensor([[0.8 * 10], [0.0], [0.3 * 100 + 0.25 * 1000]]) * x)
    assert (y[0][1] == 0).all()
    close(routing.kept, [[1], [0], [1]])
    close(routing.gates, [[0.8], [0.0], [0.3]])
    close(routing.experts, [[0], [0], [1]], "of token 2: the most probable, 0, did not take it")


@pytest.mark.soft
def test_soft_moe_against_a_loop():
    """Slot by slot: mix the tokens, ask the slot's expert, hand its answer back.

    probs says how much of a token's y comes from each expert: its slots' weights, added."""
    layer, x = make("soft"), torch.randn(4, 5, 6, dtype=torch.float64)
    S = len(layer.codes) // 3
    assert S == ROUND(5 * 2 / 3), "4, rounded up"
    layer.scale.data *= 3
    y, routing = layer(x)
    expected, shares = torch.zeros_like(x), torch.zeros(4, 5, 3)
    for b, image in enumerate(x):
        cosine = torch.cosine_similarity(image[:, None], layer.codes[None], dim=2)  # (N, E*S)
        scores = layer.scale * cosine
        for slot in range(3 * S):
            mixture = sum(w * token for w, token in zip(scores[:, slot].softmax(0), image))
            answer = layer.experts[slot // S](mixture)
            for n in range(5):
                expected[b, n] += scores[n].softmax(0)[slot] * answer
                shares[b, n, slot // S] += scores[n].softmax(0)[slot].item()
    close(y, expected)
    close(routing.probs, shares.flatten(0, 1))
    close(routing.gates[:, 0], routing.probs.amax(1))
    close(routing.experts[:, 0], routing.probs.argmax(1))


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
def test_a_prediction_does_not_depend_on_the_batch(router):
    """An image alone and with seven others: the same y."""
    layer, x = make(router), torch.randn(8, 5, 6, dtype=torch.float64)
    for i in (0, 7):
        close(layer(x[i : i + 1])[0][0], layer(x)[0][i])


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
@pytest.mark.parametrize("k", [0, 5])
def test_a_k_outside_1_to_e_is_refused(router, k):
    """Although it would compute something: a token cannot meet more experts than there are."""
    make_moe(6, 8, 4, 4, router, tokens=12)  # as many as there are
    with pytest.raises(ValueError, match=f"k = {k}: expected 1 to 4"):
        make_moe(6, 8, 4, k, router, tokens=12)


@pytest.mark.parametrize("router", BOTH)
def test_one_expert_is_a_dense_mlp_for_equal_tokens(router):
    """E = 1, k = 1: the gates are 1, and a mean of equal tokens is that token."""
    layer = make(router, tokens=5, num_experts=1, k=1)
    x = torch.randn(2, 1, 6, dtype=torch.float64).expand(2, 5, 6)
    close(layer(x)[0], layer.experts[0](x))


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


@pytest.mark.parametrize("router", BOTH)
def test_parameters_and_multiply_adds_by_hand(router):
    """A ViT with one sparse block, beside the dense one of the same size."""
    options = dict(num_classes=10, num_experts=4, k=2, expert_ratio=4)
    dense = vit_nano(**options, moe_layers="none")
    sparse = vit_nano(**options, moe_layers=[1], router=router)
    D, N, E = 64, 17, 4  # 16 patches and the class token
    S = ROUND(17 * 2 / 4)  # 9 slots, or tokens, per expert
    mlp = sum(parameter.numel() for parameter in MLP(D, 4 * D).parameters())
    codes = E * D if router == "expert_choice" else E * S * D + 1  # + 1: the scale
    total, active = count_parameters(sparse)
    assert total == count_parameters(dense)[0] + 3 * mlp + codes
    assert active == (total - 2 * mlp if router == "expert_choice" else total)
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
    before = {name: weight.clone() for name, weight in sparse.state_dict().items()}
    assert not train.upcycle(dense.state_dict(), sparse), "the head is loaded"
    for name, weight in sparse.state_dict().items():
        if ".experts." in name:
            mlp = dense.state_dict()[re.sub(r"experts\.\d\.", "", name)]  # the same for all
            assert torch.equal(weight, mlp), name
        if "codes" in name:
            assert torch.equal(weight, before[name]), name


@pytest.mark.training
@pytest.mark.parametrize("router", ["expert_choice", "soft"])
@pytest.mark.parametrize("model", ["vit_nano", "convnext_nano"])
def test_a_run_with_another_router(router, model, tmp_path, monkeypatch):
    """One epoch of three steps: the weights of every expert and of the codes have moved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "VAL_IMAGES", 48)
    flags = "--data shapes:48 --batch-size 16 --epochs 1 --experts 4 --workers 0 --out r".split()
    state = train.Run(train.parse_args([*flags, "--model", model, "--router", router]))
    before = copy.deepcopy(state.model.state_dict())
    train.train(state)
    for name, weight in load_checkpoint("r/last.pt", "cpu")[0].state_dict().items():
        if ".experts." in name or "codes" in name:
            assert not torch.equal(before[name], weight), name


@pytest.mark.report
@pytest.mark.parametrize("router, words", [
    ("expert_choice", "that with the largest gate of those that took it"),
    ("soft", "the expert with the largest share in its answer")])
def test_a_report_says_what_counts_as_a_choice(router, words, tmp_path, monkeypatch):
    """The report of such a model ends with a sentence on what a patch counts for."""
    config = dict(model="vit_nano", num_classes=16, moe_layers="last2", router=router)
    path = save_checkpoint(tmp_path / "r.pt", config, evaluation.DRAWN["shapes"][1])
    monkeypatch.setattr(evaluation, "VAL_IMAGES", 40)
    flags = [path, "--data", "shapes", "--out", str(tmp_path / "report")]
    inspect_experts.main(inspect_experts.parse_args(flags))
    assert words in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
