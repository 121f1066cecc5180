"""moe.py from the bottom up: each test checks the claim in its docstring.

Each section builds on those above it.

`pytest -x tests/test_moe.py` stops at the first thing that is not right yet. Letters as in moe.py:
T tokens, D width, H hidden width, E experts, K experts per token, C slots per expert, R = T*K rows
(one per token and choice).
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from checks import autocast_on_meta, has_no_loop_over_tokens, on_meta, says
from moe import (MLP, ROUTERS, Experts, MoE, Router, Routing, assign_slots, balance_loss, combine,
                 compute_dtype, count_parameters, dispatch, expert_capacity, importance_loss,
                 load_loss, place_rows, top_k_gates)
from rules import LATER_TOKEN_FIRST, ROUND


def close(actual, expected, hint=""):
    """Assert equality within torch's default tolerances, exactly for integers and bools.

    A failure also shows the hint.
    """
    if not isinstance(expected, torch.Tensor):
        expected = torch.tensor(expected, dtype=actual.dtype)
    more = f"\n\nHint: {hint}" if hint else ""
    torch.testing.assert_close(actual, expected, msg=lambda difference: difference + more)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def randomise(module):
    """Draw every parameter from N(0, 1), in float64, so that no zero bias hides a forgotten one."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter)
    return module


def dense_copy(experts, e):
    """A plain torch MLP with the weights of expert e, in float64."""
    dim, hidden = experts[e][0].in_features, experts[e][0].out_features
    mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)).double()
    mlp.load_state_dict(experts[e].state_dict())
    return mlp


class Times(nn.Module):
    """A stand-in for an expert that multiplies by a number."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, rows):
        return self.factor * rows


# ---------------------------------------------------------------- the worked example


@pytest.mark.layer
def test_the_worked_example_of_the_docstring():
    """The numbers at the top of moe.py, step by step: 3 tokens, 2 experts, 1 slot per expert."""
    # 3 tokens * 1 choice * 0.5 / 2 experts = 0.75, so 1 slot.
    layer = MoE(dim=1, hidden=1, num_experts=2, k=1, capacity_factor=0.5, router_noise=0.0)
    layer.router.codes.data = torch.tensor([[math.log(3)], [0.0]])
    layer.experts[0], layer.experts[1] = Times(10), Times(100)
    x = torch.tensor([[1.0], [2.0], [-1.0]])

    y, routing = layer(x)
    # exp(ln 3) / (exp(ln 3) + exp(0)) = 3 / 4; exp(2 ln 3) is 9, so 9 / 10; exp(-ln 3) is 1 / 3, so
    # 1 / 4.
    close(routing.probs, [[0.75, 0.25], [0.90, 0.10], [0.25, 0.75]])
    close(routing.experts, [[0], [0], [1]])
    close(routing.gates, [[0.75], [0.90], [0.75]])
    close(routing.kept, [[0], [1], [1]], "token 1 comes before token 0: its gate is larger")
    rows, counts, order = dispatch(x, routing.experts, routing.kept, 2)
    close(rows, [[2.0], [-1.0], [1.0]])
    close(counts, [1, 1])
    close(order, [1, 2, 0])
    close(layer.experts(rows, counts), [[20.0], [-100.0], [0.0]])
    close(y, [[0.0], [18.0], [-75.0]])
    # Importance 0.4^2 / 1.5^2; 2 tokens and 1 token ask, 0.5 from their mean: 0.5^2 / 1.5^2.
    close(routing.balance_loss, (0.16 + 0.25) / 2.25)


# ---------------------------------------------------------------- top_k_gates


@pytest.mark.top_k
@pytest.mark.parametrize("T, E, k", [(5, 4, 1), (5, 4, 3), (1, 6, 2)])
def test_a_gate_and_an_expert_per_choice(T, E, k):
    """Gates (T, K) in the type of probs, experts (T, K) int64."""
    gates, experts = top_k_gates(torch.rand(T, E).softmax(-1), k)
    assert gates.shape == experts.shape == (T, k), "is the choice along the experts, the last axis?"
    assert gates.dtype == torch.float32 and experts.dtype == torch.int64


@pytest.mark.top_k
def test_the_most_probable_experts_best_first():
    """Each token gets its k largest probabilities and their experts, in descending order."""
    gates, experts = top_k_gates(torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.1, 0.3]]), 2)
    close(experts, [[1, 2], [0, 2]], "best first")
    close(gates, [[0.5, 0.4], [0.6, 0.3]],
          "0.5556 instead of 0.5: the gates of a token need not sum to 1; 0.38: probs is a "
          "softmax already, a second one flattens it")


@pytest.mark.top_k
def test_a_single_gate_is_a_probability_and_not_1():
    """With k = 1 the gate is the softmax over ALL experts: renormalised, it would always be 1."""
    gates, _ = top_k_gates(torch.tensor([[0.2, 0.5, 0.3]]), 1)
    close(gates, [[0.5]], "1.0 instead of 0.5: are the gates renormalised?")


@pytest.mark.top_k
def test_equal_probabilities_still_give_different_experts():
    """With equal probabilities any expert may be chosen, but no token gets one of them twice."""
    gates, experts = top_k_gates(torch.full((3, 4), 0.25), 2)
    assert all(len(set(choices)) == 2 for choices in experts.tolist()), "the same expert twice"
    close(gates, torch.full((3, 2), 0.25))


@pytest.mark.top_k
def test_the_gradient_goes_to_the_chosen_probabilities():
    """d(gate)/d(probability) is 1 for chosen experts and 0 for others: no choice has a gradient."""
    probs = torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.1, 0.3]], requires_grad=True)
    gates, _ = top_k_gates(probs, 2)
    assert gates.requires_grad, "detached: the router would never learn"
    (gates * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    close(probs.grad, [[0.0, 1.0, 2.0], [3.0, 0.0, 4.0]])


@pytest.mark.edge
@pytest.mark.top_k
def test_top_k_in_one_go():
    """It chooses for all tokens at once, and on the device of probs."""
    has_no_loop_over_tokens(lambda probs: top_k_gates(probs, 2), lambda T: [torch.rand(T, 4)])
    gates, experts = top_k_gates(on_meta(6, 4), 2)
    assert gates.is_meta and experts.is_meta


# ---------------------------------------------------------------- expert_capacity


@pytest.mark.capacity
@pytest.mark.parametrize("num_tokens, k, num_experts, factor, slots", [
    (8, 1, 4, 1.0, 2),  # 8 * 1 / 4 = 2: exactly enough when the load is even
    (8, 2, 4, 1.0, 4),  # every token asks twice
    (8, 2, 4, 1.05, ROUND(4.2)),  # 5, rounded up
    (100, 1, 10, 1.1, 11),  # 100 * 1.1 / 10 is 11.000000000000002 in floats, and must not become 12
    (50, 1, 10, 1.16, ROUND(5.8)),  # 6
    (3, 1, 8, 1.0, 1),  # 0.375: at least 1
    (257, 1, 256, 1.0, ROUND(1.0039)),  # 2
    (8, 1, 4, 1e-9, 1),  # at least 1, whatever the factor
    (4, 2, 2, 8.0, 4),  # 32: at most T, since a token asks an expert once
])
def test_capacity_by_hand(num_tokens, k, num_experts, factor, slots):
    """C = ceil(T K factor / E), at least 1, at most T, and an int."""
    capacity = expert_capacity(num_tokens, k, num_experts, factor)
    assert capacity == slots and isinstance(capacity, int), f"{capacity!r} slots instead of {slots}"


# ---------------------------------------------------------------- assign_slots


SLOTS = {  # what is tested: experts, capacity, priority, kept, and the likely mistake
    # By position: the 2 slots of expert 0 go to tokens 0 and 1, so token 3 is dropped.
    "one choice, by position": (
        [[0], [0], [1], [0]], 2, None, [[1], [1], [1], [0]],
        "1 slot or 3 instead of 2: the first in line has place 1, and the last one place C",
    ),
    # Expert 0 serves token 1 (0.9), then token 3 (0.3), and drops token 0.
    "one choice, by priority": (
        [[0], [0], [1], [0]], 2, [0.1, 0.9, 0.5, 0.3], [[0], [1], [1], [1]],
        "lowest priority first? answers in the order of the queue, not of the tokens?",
    ),
    # All at one expert with one slot: only the most important token is served.
    "one slot": (
        [[2], [2], [2]], 1, [0.4, 0.8, 0.6], [[0], [1], [0]],
        "answers in the order of the queue?",
    ),
    # First choices: token 0 takes a slot of expert 0, tokens 1 and 2 both slots of expert 1. Then
    # second choices: token 0 wants expert 1 (full), token 1 takes the other slot of expert 0, token
    # 2 finds it full.
    "two choices, by position": (
        [[0, 1], [1, 0], [1, 0]], 2, None, [[1, 0], [1, 1], [1, 0]],
        "served token by token instead of rank by rank? slots of the first rank forgotten?",
    ),
    # The same in order of token 2, 1, 0: now token 2's second choice gets the other slot of expert
    # 0.
    "two choices, by priority": (
        [[0, 1], [1, 0], [1, 0]], 2, [0.5, 0.6, 0.9], [[1, 0], [1, 0], [1, 1]],
        "the same order of tokens serves both ranks",
    ),
    # Token 0's second choice (expert 1) waits for token 1's first, and loses.
    "rank before priority": (
        [[0, 1], [1, 0]], 1, [0.9, 0.6], [[1, 0], [1, 0]],
        "priority does not lift a second choice over a first",
    ),
}


@pytest.mark.capacity
@pytest.mark.parametrize("experts, capacity, priority, kept, hint", SLOTS.values(), ids=SLOTS)
def test_slots_by_hand(experts, capacity, priority, kept, hint):
    """All first choices come before any second. Within a rank position or priority decides."""
    priority = None if priority is None else torch.tensor(priority)
    close(assign_slots(torch.tensor(experts), 3, capacity, priority), kept, hint)


@pytest.mark.capacity
def test_ties_go_to_the_earlier_token():
    """Equal priorities keep the order of position: the sort must be stable."""
    kept = assign_slots(torch.zeros(1000, 1, dtype=torch.int64), 1, 500, torch.ones(1000))
    earlier = torch.arange(1000) < 500
    close(kept[:, 0], ~earlier if LATER_TOKEN_FIRST else earlier)


@pytest.mark.capacity
@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize("capacity", [1, 7, 40])
def test_slots_against_a_loop(capacity, prioritised):
    """Sorting gives out the slots that serving one choice after the other does."""
    T, K, E = 40, 3, 5
    experts = torch.rand(T, E).topk(K).indices
    priority = torch.rand(T) if prioritised else None
    tokens = sorted(range(T), key=lambda t: -priority[t].item()) if prioritised else range(T)
    used, expected = [0] * E, torch.zeros(T, K, dtype=torch.bool)
    for j in range(K):  # rank by rank ...
        for t in tokens:  # ... everybody in order
            expected[t, j] = used[experts[t, j]] < capacity
            used[experts[t, j]] += 1
    close(assign_slots(experts, E, capacity, priority), expected)
    assert expected.all() == (capacity == T)


@pytest.mark.edge
@pytest.mark.capacity
@pytest.mark.parametrize("prioritised", [False, True])
def test_slots_need_no_look_at_the_data(prioritised):
    """It works by tensor operations on the input's device: a GPU would wait for a loop."""
    has_no_loop_over_tokens(
        lambda experts, priority: assign_slots(experts, 4, 3, priority if prioritised else None),
        lambda T: [torch.rand(T, 4).topk(2).indices, torch.rand(T)],
    )
    priority = on_meta(6) if prioritised else None
    kept = assign_slots(on_meta(6, 2, dtype=torch.int64), 4, 3, priority)
    assert kept.is_meta and kept.shape == (6, 2) and kept.dtype == torch.bool


@pytest.mark.edge
@pytest.mark.capacity
@pytest.mark.parametrize("prioritised", [False, True])
def test_no_tokens_need_no_slots(prioritised):
    """An empty batch gives an empty answer."""
    priority = torch.zeros(0) if prioritised else None
    assert assign_slots(torch.zeros(0, 2, dtype=torch.int64), 4, 1, priority).shape == (0, 2)


# ---------------------------------------------------------------- the balance losses


@pytest.mark.balance
def test_importance_by_hand():
    """Importance is var / mean^2 of the experts' summed probabilities (population variance)."""
    # Sums 1.5 and 0.5: mean 1, both deviate by 0.5. One token alone: mean 0.5, both deviate by
    # 0.25, 0.0625 / 0.25.
    close(importance_loss(torch.tensor([[0.9, 0.1], [0.6, 0.4]])), 0.25,
          "0.5: var divided by E - 1, or no square")
    close(importance_loss(torch.tensor([[0.75, 0.25]])), 0.25,
          "0.0625: not divided by the squared mean")


@pytest.mark.balance
@pytest.mark.parametrize("E", [2, 4, 8])
def test_one_expert_takes_all(E):
    """When one expert gets everything, importance and load are both E - 1."""
    logits = torch.full((5, E), -100.0)
    logits[:, E - 1] = 100.0
    close(importance_loss(logits.softmax(-1)), float(E - 1),
          "E instead of E - 1: var divided by E - 1")
    close(load_loss(logits, logits, 1, 0.0), float(E - 1))
    close(load_loss(logits, logits + 0.1 * torch.randn(5, E), 1, 0.1), float(E - 1))


@pytest.mark.edge
@pytest.mark.balance
@pytest.mark.parametrize("E", [1, 4])
@pytest.mark.parametrize("noise_std", [0.0, 0.25])
def test_exact_balance_has_no_loss_and_a_finite_gradient(E, noise_std):
    """With equal logits, and with E = 1, both losses are 0 and their gradients are not NaN."""
    logits = torch.zeros(6, E, requires_grad=True)
    loss = importance_loss(logits.softmax(-1)) + load_loss(logits, logits, 1, noise_std)
    loss.backward()
    assert loss.item() == 0, f"{loss.item()} instead of 0: is the variance divided by E - 1 = 0?"
    assert logits.grad.isfinite().all(), (
        "NaN: the derivative of a square root at 0 is infinite; var / mean^2 has none")


@pytest.mark.balance
def test_load_without_noise_is_the_plain_count():
    """noise_std = 0 counts who is in the top k, and has a zero gradient, not a missing one."""
    logits = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 1.0]], requires_grad=True)
    # k = 1: both choose expert 0: load (1, 0, 0), mean 1/3, var (4 + 1 + 1) / 9 / 3 = 2/9, CV^2 =
    # 2/9 * 9 = 2.
    close(load_loss(logits, logits, 1, 0.0), 2.0)
    # k = 2: {0, 1} and {0, 2}: load (1, 1/2, 1/2), mean 2/3, var (4 + 1 + 1) / 36 / 3 = 1/18, CV^2
    # = 1/18 * 9/4 = 1/8.
    loss = load_loss(logits, logits, 2, 0.0)
    close(loss, 0.125, "2.0: the threshold is the k-th largest logit, not the largest")
    loss.backward()
    close(logits.grad, torch.zeros(2, 3))


@pytest.mark.edge
@pytest.mark.balance
@pytest.mark.parametrize("noise_std", [0.0, 0.25])
def test_no_tokens_have_no_loss(noise_std):
    """Without a token both losses are 0, not 0 / 0, and so are their gradients."""
    logits = torch.zeros(0, 4, requires_grad=True)
    loss = importance_loss(logits.softmax(-1)) + load_loss(logits, logits, 2, noise_std)
    loss.backward()
    close(loss.detach(), 0.0, "nan: divided by a mean of 0")


@pytest.mark.edge
@pytest.mark.balance
def test_a_broken_score_breaks_the_loss_and_raises_nothing():
    """NaN logits give a NaN loss: the training loop looks for it, and says at which step."""
    logits = torch.tensor([[math.nan, 0.0], [1.0, 0.0]])
    assert importance_loss(logits.softmax(-1)).isnan() and load_loss(logits, logits, 1, 0.5).isnan()


@pytest.mark.edge
@pytest.mark.balance
def test_losses_stay_on_the_device_of_their_input():
    """Nothing is made on the CPU, and nothing waits for a value: a tensor without data will do."""
    has_no_loop_over_tokens(importance_loss, lambda T: [torch.rand(T, 4)])
    has_no_loop_over_tokens(
        lambda logits: load_loss(logits, logits, 2, 0.25), lambda T: [torch.rand(T, 4)]
    )
    logits = on_meta(6, 4)
    with autocast_on_meta():
        losses = [importance_loss(logits), load_loss(logits, logits, 2, 0.0),
                  load_loss(logits, logits, 2, 0.25)]
    for loss in losses:
        assert loss.is_meta and loss.shape == ()


@pytest.mark.balance
def test_load_by_hand():
    """The load is P(clean logit + new noise >= threshold), the k-th largest NOISY logit."""
    logits, noisy = torch.tensor([[0.0, 1.0]]).double(), torch.tensor([[2.0, 0.5]]).double()
    # k = 1, sigma 0.5, threshold 2: expert 0 falls 4 sigma short, 1 - Phi(4); expert 1 falls 2
    # sigma short, 1 - Phi(2).
    p, q = 0.0000316712418331, 0.0227501319481792  # from a table of the normal distribution
    # mean (p + q) / 2, both deviate by (q - p) / 2
    close(load_loss(logits, noisy, 1, 0.5), ((q - p) / (q + p)) ** 2,
          "0.0001: P(falls short), Phi instead of 1 - Phi; 0.83: threshold from the clean logits")


@pytest.mark.balance
def test_load_gradcheck():
    """The gradient agrees with finite differences. It also flows through the threshold, a logit."""
    noise = 0.25 * randn(5, 4)
    assert torch.autograd.gradcheck(
        lambda logits: load_loss(logits, logits + noise, 2, 0.25), randn(5, 4).requires_grad_()
    )


@pytest.mark.balance
def test_load_has_a_gradient_although_counting_has_none():
    """With noise a step against the gradient takes tokens from the busier expert."""
    logits = torch.tensor([[0.5, 0.0], [0.5, 0.0]], requires_grad=True)  # expert 0 wins every token
    load_loss(logits, logits + torch.tensor([[0.3, 0.0], [-0.1, 0.2]]), 1, 0.5).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1] < 0).all(), (
        f"gradient {logits.grad.tolist()}")


# ---------------------------------------------------------------- dispatch and combine


@pytest.mark.dispatch
def test_place_rows_by_hand():
    """Row i goes TO positions[i]; to take it FROM positions[i] is the inverse."""
    placed = place_rows(torch.tensor([[10.0], [11.0], [12.0]]), torch.tensor([2, 0, 1]))
    # 10 to the end, 11 to the front
    close(placed, [[11.0], [12.0], [10.0]], "12, 10, 11: that is rows[positions]")


@pytest.mark.dispatch
@pytest.mark.parametrize("kept, order, counts", [
    # Choices 0 .. 5 are experts 1 0 0 2 1 2: expert 0 has choices 1 and 2, expert 1 has 0 and 4,
    # expert 2 the rest.
    ([[True, True], [True, True], [True, True]], [1, 2, 0, 4, 3, 5], [2, 2, 2]),
    # Choices 0 and 2 are dropped: behind everybody else, and in nobody's count.
    ([[False, True], [False, True], [True, True]], [1, 4, 3, 5, 0, 2], [1, 1, 2]),
])
def test_dispatch_by_hand(kept, order, counts):
    """A row per choice, sorted by expert, then by token, dropped ones last; row r is choice
    order[r] = t * K + j."""
    tokens, experts = torch.tensor([[0.0], [10.0], [20.0]]), torch.tensor([[1, 0], [0, 2], [1, 2]])
    result = dispatch(tokens, experts, torch.tensor(kept), 3)
    close(result[2], order)
    close(result[1], counts, "2, 2, 2: are the dropped counted?")
    assert result[1].dtype == result[2].dtype == torch.int64
    close(result[0], [[10.0 * (r // 2)] for r in order], "row r is token order[r] // K")


@pytest.mark.dispatch
def test_the_gradients_of_a_tokens_copies_add_up():
    """A token with K rows gets the sum of their K gradients, also those of dropped rows."""
    tokens = torch.zeros(2, 1, requires_grad=True)
    rows, _, order = dispatch(
        tokens, torch.tensor([[1, 0], [0, 1]]), torch.tensor([[True, True], [True, False]]), 2
    )
    # expert 0: token 0's second and token 1's first choice; expert 1: 0's first; the dropped
    close(order, [1, 2, 0, 3])
    (rows * torch.tensor([[1.0], [10.0], [100.0], [1000.0]])).sum().backward()
    close(tokens.grad, [[101.0], [1010.0]], "1 and 10: only one of the copies")


@pytest.mark.dispatch
@pytest.mark.parametrize(
    "expert, kept, counts", [(2, True, [0, 0, 60]), (0, True, [60, 0, 0]), (1, False, [0, 0, 0])]
)
def test_all_to_one_expert_and_all_dropped(expert, kept, counts):
    """Experts without a token count 0, at either end. When all are dropped no row is lost."""
    tokens = randn(60, 2)
    rows, found, _ = dispatch(tokens, torch.full((60, 1), expert), torch.full((60, 1), kept), 3)
    close(found, counts)
    close(rows, tokens, "equal keys must keep their order: is the sort stable?")


@pytest.mark.edge
@pytest.mark.dispatch
def test_dispatch_needs_no_look_at_the_data():
    """All shapes are known beforehand, on the device of the input: a GPU need not report counts."""
    has_no_loop_over_tokens(
        lambda *tensors: dispatch(*tensors, 4),
        lambda T: [torch.rand(T, 3), torch.rand(T, 4).topk(2).indices, torch.rand(T, 2) < 0.5],
    )
    experts, kept = on_meta(6, 2, dtype=torch.int64), on_meta(6, 2, dtype=torch.bool)
    rows, counts, order = dispatch(on_meta(6, 3), experts, kept, 4)
    assert rows.is_meta and counts.is_meta and order.is_meta
    assert (rows.shape, counts.shape, order.shape) == ((12, 3), (4,), (12,))


@pytest.mark.dispatch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_keep_the_type_of_their_tokens(dtype):
    """Rows are copies: nothing is rounded on the way."""
    tokens = torch.randn(4, 3).to(dtype)
    rows, _, order = dispatch(tokens, torch.tensor([[1], [0], [1], [0]]), torch.ones(4, 1) > 0, 2)
    assert rows.dtype == dtype and torch.equal(rows, tokens[order])


@pytest.mark.edge
@pytest.mark.dispatch
@pytest.mark.parametrize("K", [1, 2])
def test_no_tokens_make_no_rows(K):
    """An empty batch gives no rows, and each expert counts 0."""
    none = torch.zeros(0, K)
    rows, counts, order = dispatch(torch.zeros(0, 3), none.long(), none.bool(), 4)
    assert rows.shape == (0, 3) and counts.tolist() == [0, 0, 0, 0] and order.shape == (0,)


@pytest.mark.combine
@pytest.mark.parametrize("T, K, D", [
    (5, 1, 3), (5, 4, 3), (1, 2, 1), pytest.param(0, 2, 3, marks=pytest.mark.edge)])
def test_combine_gives_one_row_per_token(T, K, D):
    """Rows (R, D) and weights (T, K) give y (T, D), also for no token."""
    y = combine(randn(T * K, D), randn(T, K), torch.randperm(T * K))
    assert y.shape == (T, D), "for no token, -1 in a view() could be anything: name D"


@pytest.mark.combine
def test_combine_by_hand():
    """Each answer returns to its token, times its weight. The answers of one token are added."""
    rows = torch.tensor([[10.0], [20.0], [30.0], [40.0], [50.0], [60.0]])
    # token 0 gets 30 and 10, token 1 gets 20 and 50, token 2 gets 40 and 60
    order = torch.tensor([1, 2, 0, 4, 3, 5])
    weights = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.1, 0.2]])
    # 0.5 * 30 + 0.25 * 10 = 17.5      1 * 20 + 0 * 50 = 20      0.1 * 40 + 0.2 * 60 = 16
    close(combine(rows, weights, order), [[17.5], [20.0], [16.0]],
          "40, 70, 100: no weights; 8.75, 10, 8: the mean and not the sum; "
          "else: row r belongs TO place order[r], rows[order] would take it from there")


@pytest.mark.combine
def test_the_gradient_of_an_answer_is_its_gate():
    """dy/d(answer) = gate: an expert learns from a token as much as the router trusts it."""
    rows = torch.zeros(4, 2, requires_grad=True)
    combine(
        rows, torch.tensor([[0.5, 0.25], [0.125, 0.0]]), torch.tensor([3, 0, 2, 1])
    ).sum().backward()
    close(rows.grad, [[0.0, 0.0], [0.5, 0.5], [0.125, 0.125], [0.25, 0.25]],
          "row 0 holds choice 3, row 1 choice 0, ...")


@pytest.mark.combine
def test_gates_are_not_rounded_to_the_type_of_the_answers():
    """bfloat16 answers, float32 gates: the sum is float32, as under autocast."""
    weights = torch.tensor([[0.3, 0.7]])  # 0.3 in bfloat16 would be 0.30078125
    y = combine(torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16), weights, torch.tensor([0, 1]))
    assert y.dtype == torch.float32
    close(y, [[0.3 * 1 + 0.7 * 2]], "1.6953: the gates were cast to bfloat16")


@pytest.mark.edge
@pytest.mark.combine
def test_combine_stays_on_the_device_of_its_input():
    """No tensor is made on the CPU, and no loop goes over the tokens."""
    has_no_loop_over_tokens(
        combine, lambda T: [torch.rand(2 * T, 3), torch.rand(T, 2), torch.randperm(2 * T)]
    )
    with autocast_on_meta():
        y = combine(on_meta(12, 3), on_meta(6, 2), on_meta(12, dtype=torch.int64))
    assert y.is_meta


@pytest.mark.combine
def test_the_gradient_of_a_gate_is_the_experts_answer():
    """dy/d(gate) = the expert's answer: how a router learns although top-k has no gradient."""
    rows, order = torch.tensor([[10.0], [20.0], [30.0], [40.0]]), torch.tensor([3, 0, 2, 1])
    weights = torch.full((2, 2), 0.5, requires_grad=True)
    combine(rows, weights, order).sum().backward()
    # choice 0 is in row 1, choice 1 in row 3, 2 in row 2, 3 in row 0
    close(weights.grad, [[20.0, 40.0], [30.0, 10.0]])


@pytest.mark.combine
def test_there_and_back_again_against_a_loop():
    """With experts that add their number, x + p, a row at any wrong place shows. Dropped: 0."""
    T, K, E, D = 30, 3, 5, 4
    tokens, weights, kept = randn(T, D).requires_grad_(), randn(T, K), torch.rand(T, K) < 0.7
    experts = torch.rand(T, E).topk(K).indices
    rows, counts, order = dispatch(tokens, experts, kept, E)
    p = torch.arange(E).repeat_interleave(counts)
    # whatever is in the dropped rows must leave no trace
    nobodys = torch.full((T * K - len(p),), 10 ** 15)
    y = combine(rows + torch.cat([p, nobodys]).unsqueeze(1), weights * kept, order)
    expected = torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        for j in range(K):
            if kept[t, j]:
                expected[t] += weights[t, j] * (tokens[t].detach() + experts[t, j])
    close(y, expected)
    y.sum().backward()  # the gradients of a token's copies add up: the sum of its kept weights
    close(tokens.grad, (weights * kept).sum(1, keepdim=True).expand(T, D))


# ---------------------------------------------------------------- Experts


@pytest.mark.experts
@pytest.mark.parametrize("counts", [[3, 1, 2], [0, 4, 0], [0, 0, 6], [2, 0, 3], [0, 0, 0]])
def test_experts_are_independent_mlps(counts):
    """Outputs and gradients are those of Linear - GELU - Linear. Rows beyond the counts give 0."""
    experts, rows = randomise(Experts(3, 4, 7)), randn(6, 4)
    out = experts(rows, torch.tensor(counts))
    out.sum().backward()
    *groups, rest = rows.split(counts + [6 - sum(counts)])
    mlps = [dense_copy(experts, e) for e in range(3)]
    expected = torch.cat(
        [mlp(group) for mlp, group in zip(mlps, groups)] + [torch.zeros_like(rest)]
    )
    close(out, expected, "is a bias missing? is GELU the exact one?")
    assert (out[sum(counts):] == 0).all(), (
        "the bias is not 0: a row of nobody must not pass through an expert")
    expected.sum().backward()
    for expert, mlp in zip(experts, mlps):
        for ours, theirs in zip(expert.parameters(), mlp.parameters()):
            close(ours.grad, theirs.grad)


@pytest.mark.experts
def test_an_expert_is_an_mlp():
    """experts[e] is the very module that a dense block has, and can be called on its own."""
    experts, rows = Experts(3, 4, 7), torch.randn(5, 4)
    assert [type(expert) for expert in experts] == [MLP] * 3
    close(experts(rows, torch.tensor([0, 5, 0])), experts[1](rows))


@pytest.mark.experts
def test_an_idle_expert_gets_a_zero_gradient_and_not_none():
    """Every expert is called, on 0 rows too: no process of a DDP group waits for an idle one."""
    experts = Experts(3, 4, 7)
    experts(torch.randn(5, 4), torch.tensor([0, 5, 0])).sum().backward()
    for e, expert in enumerate(experts):
        for parameter in expert.parameters():
            assert parameter.grad is not None, f"expert {e} was not called"
            assert parameter.grad.any() == (e == 1)


@pytest.mark.experts
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0]])
def test_experts_answer_in_the_type_of_autocast(counts):
    """Under bf16 autocast the answers are bfloat16, as those of one MLP. Dropped rows give 0."""
    experts, rows = Experts(3, 4, 7), torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        answers = experts(rows, torch.tensor(counts))
        expected = torch.cat([experts[0](rows[:2]), experts[2](rows[2:5])])
    assert answers.dtype == torch.bfloat16, "float32 rows of zeros among them?"
    kept = sum(counts)
    close(answers[:kept], expected[:kept])
    assert not answers[kept:].any()


@pytest.mark.experts
def test_no_two_experts_start_alike():
    """Experts that start alike and see alike tokens would stay alike."""
    first, second = Experts(2, 16, 32)
    for a, b in zip(first.parameters(), second.parameters()):
        assert (a != b).all()


@pytest.mark.experts
@pytest.mark.parametrize("compiling, fits, path", [
    (True, True, "grouped"),
    (True, False, "loop"),
    (False, True, "loop"),  # on a CPU the loop is faster
])
def test_which_path_is_taken(compiling, fits, path, monkeypatch):
    """The kernel where it fits, if the layer is compiled. On a CPU all else takes the loop."""
    experts, taken = Experts(3, 8, 16), []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(experts, "use_grouped_mm", lambda rows: fits)
    for name in ("loop", "grouped"):
        monkeypatch.setattr(experts, name, lambda *inputs, name=name: taken.append((name, *inputs)))
    rows, counts = torch.zeros(4, 8), torch.tensor([4, 0, 0])
    experts(rows, counts)
    [(found, *inputs)] = taken
    assert found == path and inputs[0] is rows and inputs[1] is counts


# ---------------------------------------------------------------- the two ways to run the experts

PATHS = "loop", "grouped"


@pytest.mark.edge
@pytest.mark.parametrize("path", [
    pytest.param("loop", marks=pytest.mark.experts),
    pytest.param("grouped", marks=pytest.mark.grouped)])
def test_every_new_tensor_is_on_the_device_of_the_rows(path):
    """The default device is meta here, and the rows are on the CPU: the two do not mix."""
    experts, rows, counts = Experts(2, 16, 32), torch.randn(5, 16), torch.tensor([2, 1])
    expected = getattr(experts, path)(rows, counts)
    with torch.device("meta"):
        answers = getattr(experts, path)(rows, counts)
    assert not answers.is_meta
    close(answers, expected)


def run_both(counts, num_rows, dtype):
    """Answers and gradients (of rows and all parameters) of both paths on the same random input."""
    experts = Experts(len(counts), 16, 32)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    experts.to(dtype)
    rows, grad = torch.randn(num_rows, 16).to(dtype), torch.randn(num_rows, 16).to(dtype)
    results = []
    for path in PATHS:
        rows = rows.detach().requires_grad_()
        answers = getattr(experts, path)(rows, torch.tensor(counts))
        gradients = torch.autograd.grad(answers, [rows, *experts.parameters()], grad)
        results.append([answers, *gradients])
    names = ["answers", "rows", *(name for name, _ in experts.named_parameters())]
    return list(zip(names, *results))


GROUPS = [  # rows per expert, number of rows: what is more belongs to nobody
    pytest.param([3, 1, 2], 6, id="every expert"),
    pytest.param([0, 4, 0], 4, id="all on one"),
    pytest.param([2, 0, 3], 7, id="two dropped"),
    pytest.param([4, 2, 0], 9, id="dropped behind an idle expert"),
    pytest.param([0, 0, 0], 4, id="all dropped"),
    pytest.param([0, 1, 0], 1, id="one token"),
    pytest.param([1, 0, 1, 0, 0, 0, 0, 0], 2, id="fewer tokens than experts")]


@pytest.mark.grouped
@pytest.mark.parametrize("counts, num_rows", GROUPS)
def test_one_kernel_gives_what_the_loop_gives_in_bfloat16(counts, num_rows):
    """grouped() and loop() agree in answers and gradients, but for rounding to 2^-8 at each step.

    For float32 see test_nothing_leaks_from_rows_that_the_kernel_leaves_unset."""
    for name, looped, grouped in run_both(counts, num_rows, torch.bfloat16):
        assert looped.dtype == grouped.dtype == torch.bfloat16, name
        error = (grouped - looped).float().norm() / looped.float().norm().clamp(min=1e-6)
        assert error <= 2 ** -7, f"{name}: off by {error:.1%}. Is the right bias added?"


def poisoned(grouped_mm):
    """grouped_mm on a bad day: rows behind the last offset, which it leaves unset, are NaN."""

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows, weight, offs):
            ctx.save_for_backward(rows, weight, offs)
            answers = grouped_mm(rows, weight, offs=offs).clone()
            answers[offs[-1]:] = torch.nan
            return answers

        @staticmethod
        def backward(ctx, grad):
            rows, weight, offs = (x.detach() for x in ctx.saved_tensors)
            with torch.enable_grad():
                rows, weight = rows.requires_grad_(), weight.requires_grad_()
                answers = grouped_mm(rows, weight, offs=offs)
            rows_grad, weight_grad = torch.autograd.grad(answers, (rows, weight), grad)
            rows_grad[offs[-1]:] = torch.nan
            return rows_grad, weight_grad, None

    return lambda rows, weight, offs: Poisoned.apply(rows, weight, offs)


@pytest.mark.grouped
@pytest.mark.parametrize("counts, num_rows", GROUPS)
def test_nothing_leaks_from_rows_that_the_kernel_leaves_unset(counts, num_rows, monkeypatch):
    """Whatever is in memory behind the last group, all is finite and dropped rows give 0."""
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", poisoned(F.grouped_mm))
    results = run_both(counts, num_rows, torch.float32)
    for name, looped, grouped in results:
        close(grouped, looped, f"{name}: the kernel never writes rows beyond its last offset")
    for name, _, grouped in results[:2]:  # answers, and the gradient of the rows
        assert not grouped[sum(counts):].any(), name


@pytest.mark.grouped
@pytest.mark.parametrize("dtype, dim, hidden, exporting, possible", [
    (torch.bfloat16, 8, 24, False, True),
    (torch.bfloat16, 16, 36, False, False),  # 36 * 2 = 72 bytes, not a multiple of 16
    (torch.bfloat16, 6, 32, False, False),  # 6 * 2 = 12 bytes
    (torch.float32, 16, 32, False, False),  # torch 2.14 cannot trace it
    (torch.float32, 16, 32, True, True),  # torch.export must, or says what is missing
    (torch.float32, 6, 32, True, False),  # 6 * 4 = 24 bytes
])
def test_where_the_kernel_can_be_used(dtype, dim, hidden, exporting, possible, monkeypatch):
    """In bfloat16, or while exporting, and only for rows of a multiple of 16 bytes."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: exporting)
    experts, rows = Experts(3, dim, hidden), torch.zeros(4, dim, dtype=dtype)
    assert experts.use_grouped_mm(rows) == possible


@pytest.mark.experts
def test_the_dtype_to_compute_in():
    """That of the rows, or under autocast its own; not the weights'."""
    rows = torch.zeros(2, 4, dtype=torch.float64)
    assert compute_dtype(rows) == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(rows) == torch.bfloat16


@pytest.mark.grouped
def test_autocast_reaches_the_kernel():
    """Under autocast both paths compute in bfloat16, although autocast does not know grouped_mm."""
    experts, rows, counts = Experts(2, 16, 32), torch.randn(5, 16), torch.tensor([2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        looped, grouped = experts.loop(rows, counts), experts.grouped(rows, counts)
    assert looped.dtype == grouped.dtype == torch.bfloat16
    assert (grouped - looped).float().norm() <= 2 ** -7 * looped.float().norm()  # they round apart


def training_step(path):
    """y and all gradients of a layer whose experts take this path."""
    torch.manual_seed(1)
    layer = MoE(16, 32, 4, 2, capacity_factor=0.5)
    layer.experts.forward = getattr(layer.experts, path)
    y, routing = layer(torch.randn(64, 16))
    (y.square().sum() + routing.balance_loss).backward()
    return [y, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.grouped
def test_the_same_bits_twice():
    """Two runs of a layer are equal to the last bit: nothing is summed in a random order."""
    for path in PATHS:
        for first, second in zip(training_step(path), training_step(path)):
            assert torch.equal(first, second), path


@pytest.mark.grouped
@pytest.mark.slow
@pytest.mark.parametrize("dtype, path", [(torch.float32, "loop"), (torch.bfloat16, "grouped")])
def test_a_compiled_layer_is_the_same_layer(dtype, path):
    """torch.compile gives the loss and gradients of the uncompiled layer, in both types.

    In bfloat16 the layer is one graph. In float32 the loop over the experts is left out of it.
    """
    layer = MoE(16, 32, 4, 2, capacity_factor=1.0, router_noise=0.0)
    x, results = torch.randn(3, 10, 16), []
    torch.compiler.reset()  # forget the graphs of earlier tests
    # aot_eager traces forward and backward without the wait for a C++ compiler.
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=path == "grouped")
    for run in (compiled, layer):
        layer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y, routing = run(x)
        loss = y.square().mean() + routing.balance_loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in layer.parameters())])
        layer.experts.forward = getattr(layer.experts, path)  # the uncompiled one takes it, too
    tolerance = 1e-5 if dtype == torch.float32 else 1e-4  # bfloat16 is rounded in another order
    for traced, plain in zip(*results):
        torch.testing.assert_close(traced, plain, atol=tolerance, rtol=tolerance)


@pytest.mark.grouped
@pytest.mark.slow
def test_torch_export_in_bfloat16():
    """An exported bfloat16 layer is one graph, with the loop's answers to the precision of bf16."""
    layer, x = MoE(16, 32, 4, 2).bfloat16().eval(), torch.randn(6, 16).bfloat16()
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x)[0], layer(x)[0], atol=2e-3, rtol=2 ** -6)


# ---------------------------------------------------------------- Router


def cosine(a, b):
    return a @ b / (a.norm() * b.norm())


@pytest.mark.router
@pytest.mark.parametrize("kind, score", [
    ("linear", lambda r, x, e: r.codes[e] @ x),  # no bias
    ("cosine", lambda r, x, e: r.log_scale.exp() * cosine(r.proj @ x, r.codes[e])),
    ("l2", lambda r, x, e: -r.log_scale.exp() * (r.proj @ x - r.codes[e]).norm()),  # nearest wins
])
def test_router_formulas(kind, score):
    """Each logit is the formula of its kind, token by token. float64 tokens stay float64."""
    router, x = randomise(Router(6, 3, kind)), randn(5, 6)
    assert router(x).dtype == torch.float64, (
        "float32 is the least, not the only one: torch.promote_types")
    logits = router(x)
    for t in range(len(x)):
        close(logits[t], torch.stack([score(router, x[t], e) for e in range(3)]))


@pytest.mark.router
@pytest.mark.parametrize("kind", ROUTERS)
def test_scores_are_float32_under_autocast(kind):
    """Under bf16 autocast and for bf16 weights logits are float32: rounding must not decide."""
    router, x = Router(16, 4, kind), torch.randn(30, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, of_bfloat16 = router(x), router(x.bfloat16())
    assert torch.equal(logits, router(x)), "to cast the input is not enough, autocast must be off"
    assert of_bfloat16.dtype == router.bfloat16()(x.bfloat16()).dtype == torch.float32


@pytest.mark.router
@pytest.mark.parametrize("kind", ROUTERS)
def test_router_gradcheck(kind):
    """The logits' gradients in x and in every parameter agree with finite differences."""
    router, x = randomise(Router(4, 3, kind)), randn(5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: router(x), (x, *router.parameters()))


@pytest.mark.router
@pytest.mark.parametrize(
    "log_scale, scale", [(None, 2.0), (math.log(0.5), 0.5), (math.log(50.0), 50.0), (50.0, 100.0)]
)
@pytest.mark.parametrize("kind, score", [("cosine", 1.0), ("l2", -math.sqrt(3.0))])
def test_temperature_starts_at_2_and_is_bounded_by_100(kind, score, log_scale, scale):
    """s is 2 at the start and at most 100, so that the softmax never becomes an argmax."""
    router = Router(6, 1, kind)
    # x = 1/6 gives P x = (1, 1, 1): cosine 1 with (1, 1, 1), distance sqrt(3) to (0, 0, 0)
    nn.init.ones_(router.proj)
    nn.init.constant_(router.codes, 1.0 if kind == "cosine" else 0.0)
    if log_scale is not None:
        nn.init.constant_(router.log_scale, log_scale)
    close(router(torch.full((1, 6), 1 / 6)), [[scale * score]], "s = exp(log_scale), at most 100")


@pytest.mark.router
@pytest.mark.parametrize("dim, proj_dim", [(1, 1), (8, 4), (9, 4), (1024, 256)])
def test_width_of_the_projection(dim, proj_dim):
    """P x has half the width of x, rounded down, at least 1 and at most 256."""
    assert Router(dim, 2, "cosine").codes.shape == (2, proj_dim)
    assert Router(dim, 2, "l2").proj.shape == (proj_dim, dim)


@pytest.mark.router
@pytest.mark.parametrize("kind", ["cosine", "l2"])
def test_a_projection_keeps_the_size_of_a_token(kind):
    """proj starts with deviation 1 / sqrt(D), so that P x has numbers of the size of those in x,
    and the codes are like it."""
    router = Router(400, 8, kind)  # P x of width 200
    # 80,000 values
    assert abs(router.proj.std() - 400 ** -0.5) < 0.002 and abs(router.proj.mean()) < 0.001
    # 1,600 values
    assert abs(router.codes.std() - 200 ** -0.5) < 0.01 and abs(router.codes.mean()) < 0.01


@pytest.mark.router
def test_linear_codes_start_small():
    """They are drawn from N(0, 0.02^2): so at the start all probabilities are near 1 / E."""
    codes = Router(400, 50).codes  # 20,000 values
    assert abs(codes.std() - 0.02) < 0.001 and abs(codes.mean()) < 0.001
    assert codes.abs().max() > 0.06, (
        "not normal: of 20,000 values some are more than 3 deviations away")


@pytest.mark.router
def test_distances_do_not_depend_on_the_number_of_tokens():
    """l2: for large batches torch.cdist takes a less exact formula unless told not to."""
    # whole numbers, whose distances are exact; their squares are too large for a float32
    router, x = Router(8, 4, "l2"), torch.randint(3000, 3010, (40, 8)).float()
    router.proj.data = torch.eye(4, 8)
    router.codes.data = torch.randint(3000, 3010, (4, 4)).float()
    close(router(x)[:3], router(x[:3]), "torch.cdist: see its compute_mode")


@pytest.mark.edge
@pytest.mark.router
@pytest.mark.parametrize("kind", ROUTERS)
def test_a_router_scores_all_tokens_at_once(kind):
    """No loop goes over the tokens, and logits are on the device of the tokens."""
    has_no_loop_over_tokens(Router(6, 4, kind), lambda T: [torch.rand(T, 6)])
    with autocast_on_meta():
        assert Router(6, 4, kind).to("meta")(on_meta(5, 6)).is_meta


@pytest.mark.router
def test_unknown_router_lists_the_known_ones():
    """A misspelt router stops at once, and the message names all that exist."""
    with pytest.raises(ValueError) as error:
        Router(6, 4, kind="quadratic")
    says(error, "quadratic", *ROUTERS, "expert_choice", "soft")


# ---------------------------------------------------------------- MoE: the whole layer


@pytest.mark.layer
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_layer_against_a_loop_over_tokens(router, k):
    """y = sum over the k best experts e of softmax(logits)_e * MLP_e(x), in any shape (..., D)."""
    layer = randomise(MoE(dim=6, hidden=8, num_experts=4, k=k, router=router)).eval()
    x = randn(2, 5, 6)
    y, routing = layer(x)
    assert y.shape == x.shape and routing.probs.shape == (10, 4) and routing.gates.shape == (10, k)
    close(layer(x.transpose(0, 1))[0], y.transpose(0, 1),
          "view() of x, whose memory may be in another order: reshape()")
    mlps = [dense_copy(layer.experts, e) for e in range(4)]
    for token, answer in zip(x.view(10, 6), y.view(10, 6)):
        # over all experts, before the choice
        probs = layer.router(token.unsqueeze(0))[0].softmax(-1)
        best = probs.argsort(descending=True)[:k]
        close(answer, sum(probs[e] * mlps[e](token) for e in best),
              f"k = {k}; if only k = 4 is right, the gates are renormalised; "
              "if none is: two softmaxes, none, or no gate?")


@pytest.mark.layer
@pytest.mark.parametrize("training", [False, True])
def test_one_expert_is_the_dense_mlp(training):
    """E = 1, k = 1: the softmax of one number is 1, so the layer is MLP(x), already balanced."""
    layer = randomise(MoE(6, 8, num_experts=1, k=1)).train(training)
    mlp = MLP(6, 8).double()
    x = randn(5, 6)
    mlp.load_state_dict(dense_copy(layer.experts, 0).state_dict())
    y, routing = layer(x)
    close(y, mlp(x))
    assert routing.balance_loss.item() == 0
    (y.sum() + routing.balance_loss).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters()), (
        "NaN: the balance loss of a single expert")


@pytest.mark.layer
def test_the_task_alone_teaches_the_router():
    """With k = 1 every expert's logit gets a gradient: the gate is a softmax over all experts."""
    layer = randomise(MoE(6, 8, num_experts=4, k=1))
    layer(randn(20, 6))[0].square().sum().backward()
    gradient = layer.router.codes.grad
    assert gradient is not None and (gradient.abs().amax(1) > 1e-6).all(), (
        "no gradient: gates always 1, or detached?")


@pytest.mark.layer
def test_the_balance_loss_teaches_the_router_only():
    """The balance loss reaches the router and no expert: it asks who works, not how."""
    layer = randomise(MoE(6, 8, num_experts=4, k=1))
    layer(randn(20, 6))[1].balance_loss.backward()
    assert layer.router.codes.grad.abs().max() > 1e-6, (
        "no gradient: detached on its way into Routing?")
    assert all(parameter.grad is None for parameter in layer.experts.parameters())


@pytest.mark.layer
def test_noise_only_while_training():
    """Training draws other gates every time. Evaluation and router_noise = 0 never do."""
    layer, x = randomise(MoE(6, 8, num_experts=4, k=2)), randn(5, 6)
    quiet = MoE(6, 8, num_experts=4, k=2, router_noise=0.0).double()
    quiet.load_state_dict(layer.state_dict())
    assert not torch.equal(layer(x)[1].gates, layer(x)[1].gates), "no noise while training"
    y, routing = layer.eval()(x)
    for again in (layer(x), quiet.train()(x)):
        assert torch.equal(again[0], y) and torch.equal(again[1].gates, routing.gates)


@pytest.mark.layer
def test_noise_moves_the_choice_but_not_logits_and_probs():
    """In training noise N(0, (noise / E)^2) changes experts and gates, but not logits and probs."""
    layer, x = randomise(MoE(6, 8, num_experts=4, k=2, router_noise=2.0)), randn(50, 6)
    logits, sigma = layer.router(x), 2.0 / 4
    torch.manual_seed(1)
    noisy = logits + sigma * torch.randn_like(logits)
    torch.manual_seed(1)  # so that the layer draws the same numbers
    routing = layer(x)[1]
    close(routing.logits, logits)
    close(routing.probs, logits.softmax(-1), "noise in probs would make the importance loss noisy")
    gates, experts = noisy.softmax(-1).sort(descending=True)
    close(routing.experts, experts[:, :2])
    close(routing.gates, gates[:, :2], "the gates of the clean probabilities, or another sigma?")
    importance, load = importance_loss(logits.softmax(-1)), load_loss(logits, noisy, 2, sigma)
    close(routing.balance_loss, importance + load)


@pytest.mark.layer
def test_balance_loss_in_evaluation():
    """Evaluation draws no noise, but its load loss has the sigma of training, noise / E."""
    layer, x = randomise(MoE(6, 8, num_experts=4, k=2)).eval(), randn(20, 6)
    logits, routing = layer.router(x), layer(x)[1]
    importance, load = importance_loss(logits.softmax(-1)), load_loss(logits, logits, 2, 1 / 4)
    close(routing.balance_loss, importance + load)


@pytest.mark.layer
@pytest.mark.parametrize("kind", ROUTERS)
def test_routing_stays_float32_under_autocast(kind):
    """Under bf16 autocast logits, gates and choices are float32's. The experts run in bf16."""
    layer, x = MoE(16, 32, num_experts=8, k=2, router=kind).eval(), torch.randn(40, 16)
    y, plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_autocast, routing = layer(x)
        y_from_bf16 = layer(x.bfloat16())[0]
    assert routing.logits.dtype == routing.probs.dtype == routing.gates.dtype == torch.float32
    assert torch.equal(routing.logits, plain.logits), (
        "bf16: to cast the input is not enough, autocast must be off")
    assert torch.equal(routing.experts, plain.experts) and torch.equal(routing.gates, plain.gates)
    assert y_autocast.dtype == torch.float32 and y_from_bf16.dtype == torch.bfloat16, (
        "y has the dtype of x")
    assert not torch.equal(y_autocast, y), (
        "the experts ran in float32: autocast is off for too much")


@pytest.mark.layer
@pytest.mark.parametrize(
    "train_factor, eval_factor", [(None, None), (0.5, None), (None, 0.5), (1.0, 0.5)]
)
def test_each_mode_has_its_own_capacity(train_factor, eval_factor):
    """capacity_factor limits training only, eval_capacity_factor evaluation only, None nothing."""
    factors = dict(capacity_factor=train_factor, eval_capacity_factor=eval_factor)
    layer = MoE(6, 8, 4, k=2, router_noise=0.0, **factors)
    for training, factor in ((True, train_factor), (False, eval_factor)):
        # 40 equal tokens choose the same two experts
        kept = layer.train(training)(torch.ones(40, 6))[1].kept
        slots = 40 if factor is None else int(40 * 2 * factor / 4)  # 10 at 0.5, 20 at 1.0
        close(
            kept.sum(0), [slots, slots], f"training={training}: is it the limit of the other mode?"
        )


@pytest.mark.layer
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_priority, dropped", [(True, 0), (False, 2)])
def test_a_dropped_token_is_exactly_zero(batch_priority, dropped, training):
    """Where the expert was full y is exactly 0. The other tokens are as without a limit."""
    limited = dict(capacity_factor=1.0, eval_capacity_factor=1.0, batch_priority=batch_priority)
    layer = randomise(MoE(2, 8, 2, k=1, router_noise=0.0, **limited)).train(training)
    nn.init.eye_(layer.router.codes)  # the logits are x itself
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]]).double()
    # Tokens 0, 1, 2 want expert 0, with gates sigmoid(1), sigmoid(2), sigmoid(3); it has 4 * 1 *
    # 1.0 / 2 = 2 slots: by priority token 0 is dropped, by position token 2. Token 3 has expert 1
    # for itself.
    y, routing = layer(x)
    assert (y[dropped] == 0).all() and routing.kept.sum() == 3, (
        f"token {dropped} has no slot: its y must be 0")
    answers = torch.cat([dense_copy(layer.experts, 0)(x[:3]), dense_copy(layer.experts, 1)(x[3:])])
    gates = torch.tensor([[1.0], [2.0], [3.0], [1.0]]).double().sigmoid()
    close(
        routing.gates, gates, "a dropped choice keeps its gate: what was dropped stands in `kept`"
    )
    expected = answers * gates
    expected[dropped] = 0.0
    close(y, expected)


@pytest.mark.layer
def test_batch_priority_ranks_tokens_by_their_best_gate():
    """With K = 2 too a token's priority is its first gate, for both choices."""
    layer = randomise(MoE(6, 8, num_experts=4, k=2, capacity_factor=0.5))
    routing = layer(randn(40, 6))[1]  # each expert has 40 * 2 * 0.5 / 4 = 10 slots
    close(routing.kept, assign_slots(routing.experts, 4, 10, priority=routing.gates[:, 0]))


@pytest.mark.edge
@pytest.mark.layer
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_no_images(training, capacity_factor):
    """No tokens give y (0, D), a balance loss of 0, and finite gradients."""
    layer = MoE(6, 8, num_experts=4, k=2, capacity_factor=capacity_factor).train(training)
    y, routing = layer(torch.zeros(0, 5, 6))
    (y.sum() + routing.balance_loss).backward()
    assert y.shape == (0, 5, 6) and routing.balance_loss.item() == 0
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.edge
@pytest.mark.layer
@pytest.mark.parametrize("training", [True, False])
def test_a_token_that_is_not_a_number_stays_alone(training):
    """NaN in one token raises nothing; in evaluation all other tokens keep their y."""
    layer, x = MoE(6, 8, num_experts=4, k=2, capacity_factor=1.0).train(training), torch.randn(5, 6)
    expected = layer.eval()(x)[0]
    x[2] = math.nan
    y = layer.train(training)(x)[0]
    assert y[2].isnan().all()
    if not training:
        close(y[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


class AllOnMeta(nn.Module):
    """A stand-in for the experts: theirs wait for the counts, and a tensor on meta has none."""

    def forward(self, rows, counts):
        return rows


@pytest.mark.edge
@pytest.mark.layer
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_makes_everything_on_the_device_of_the_input(training, capacity_factor):
    """On the meta device: a tensor that forgets its device would be on the CPU, and refused."""
    factors = dict(capacity_factor=capacity_factor, eval_capacity_factor=capacity_factor)
    layer = MoE(6, 8, num_experts=4, k=2, **factors).train(training).to("meta")
    layer.experts = AllOnMeta()
    with autocast_on_meta():
        y, routing = layer(on_meta(2, 5, 6))
    assert y.is_meta
    for name, part in zip(Routing._fields, routing):
        assert part.is_meta, f"{name} is on the CPU: a torch.ones() without device?"


@pytest.mark.edge
@pytest.mark.layer
def test_the_layer_has_no_loop_over_tokens():
    """It takes as many tensor operations for 40 tokens as for 10."""
    layer = MoE(6, 8, num_experts=4, k=2, capacity_factor=1.0)
    has_no_loop_over_tokens(layer, lambda T: [torch.rand(T, 6)])


@pytest.mark.layer
@pytest.mark.parametrize(
    "wrong", [dict(capacity_factor=0.0), dict(eval_capacity_factor=-1.0), dict(router_noise=-0.1)]
)
def test_impossible_factors_are_refused(wrong):
    """A capacity factor of 0 and negative noise are refused. The message has the value."""
    with pytest.raises(ValueError) as error:
        MoE(6, 8, num_experts=4, k=1, **wrong)
    says(error, *wrong.values())


@pytest.mark.layer
@pytest.mark.parametrize("k", [0, 5])
def test_k_must_fit_the_experts(k):
    """A token cannot choose more experts than there are, nor none: the message has both numbers."""
    with pytest.raises(ValueError) as error:
        MoE(6, 8, num_experts=4, k=k)
    says(error, k, 4)


# ---------------------------------------------------------------- around the layer


@pytest.mark.costs
@pytest.mark.parametrize("E, k, total, active", [
    (4, 1, 82, 31), (4, 2, 82, 48), (4, 4, 82, 82), (1, 1, 25, 25)])
def test_parameters_by_hand(E, k, total, active):
    """total counts everything, active k experts per MoE layer and all the rest."""
    model = nn.Sequential(nn.Linear(2, 2), MoE(dim=2, hidden=3, num_experts=E, k=k))
    # Linear 2 * 2 + 2 = 6, router E * 2, an expert 2 * 3 + 3 + 3 * 2 + 2 = 17. With E = 4:
    # 6 + 8 + 4 * 17 = 82 in all, and 6 + 8 + 17 = 31 active with k = 1.
    assert count_parameters(model) == (total, active)


@pytest.mark.balance
def test_balance_loss_of_a_model_is_the_sum_over_its_layers():
    """The sum, as in V-MoE, so that each layer is balanced as much at any depth. Dense: 0."""
    losses = torch.tensor([1.0, 4.0], requires_grad=True)
    loss = balance_loss([Routing(*[None] * 5, balance_loss=value) for value in losses])
    close(loss.detach(), 5.0, "2.5: the mean")
    loss.backward()
    close(losses.grad, [1.0, 1.0])
    close(balance_loss([]), 0.0)
