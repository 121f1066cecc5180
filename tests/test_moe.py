"""moe.py from the bottom up: each test checks the claim in its docstring.

`pytest -x tests/test_moe.py` stops at the first thing that is not right yet. Letters as in moe.py:
T tokens, D width, H hidden width, E experts, K experts per token, C slots per expert, R = T*K rows
(one per token and choice).
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from checks import autocast_on_meta, has_no_loop_over_tokens, says
from moe import (ROUTERS, Experts, MoE, Router, Routing, SoftMoE, assign_slots, balance_loss,
                 combine, compute_dtype, count_parameters, dispatch, expert_capacity,
                 importance_loss, load_loss, make_moe, place_rows, top_k_gates)
from rules import LATER_TOKEN_FIRST, ROUND


def close(actual, expected, hint=""):
    """Assert equality to torch's tolerances, for integers exactly. A failure shows the hint."""
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


def worked_example(**options):
    """The layer at the top of moe.py, with 3 * 1 * 0.5 / 2 = 0.75, so 1 slot, and its tokens."""
    options = dict(capacity_factor=0.5, router_noise=0.0) | options
    layer = MoE(dim=1, hidden=1, num_experts=2, k=1, **options)
    layer.router.codes.data = torch.tensor([[math.log(3)], [0.0]])
    layer.experts[0], layer.experts[1] = Times(10), Times(100)
    return layer, torch.tensor([[1.0], [2.0], [-1.0]])


@pytest.mark.layer
def test_the_worked_example_of_the_docstring():
    """The numbers at the top of moe.py, step by step: 3 tokens, 2 experts, 1 slot per expert."""
    layer, x = worked_example()
    y, routing = layer(x)
    # exp(ln 3) / (exp(ln 3) + exp(0)) = 3 / 4; exp(2 ln 3) = 9: 9 / 10; exp(-ln 3) = 1 / 3: 1 / 4
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
    assert y[0] == 0, "a dropped token is exactly 0"
    # Importance 0.4^2 / 1.5^2; 2 tokens and 1 token ask, 0.5 from their mean: 0.5^2 / 1.5^2.
    close(routing.balance_loss, (0.16 + 0.25) / 2.25)


@pytest.mark.layer
def test_the_worked_example_by_position():
    """Without batch_priority token 0 gets the slot, although the gate of token 1 is larger."""
    layer, x = worked_example(batch_priority=False)
    y, routing = layer(x)
    close(routing.kept, [[1], [0], [1]])
    close(y, [[0.75 * 10], [0.0], [0.75 * -100]])


# ---------------------------------------------------------------- top_k_gates

@pytest.mark.top_k
def test_the_most_probable_experts_best_first():
    """Each token gets its k largest probabilities and their experts, in descending order."""
    gates, experts = top_k_gates(torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.1, 0.3]]), 2)
    close(experts, [[1, 2], [0, 2]], "best first")
    close(gates, [[0.5, 0.4], [0.6, 0.3]],
          "0.5556 instead of 0.5: the gates of a token need not sum to 1, and with k = 1 would all "
          "be 1; 0.38: probs is a softmax already, a second one flattens it")


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


# ---------------------------------------------------------------- expert_capacity and assign_slots

@pytest.mark.capacity
@pytest.mark.parametrize("num_tokens, k, num_experts, factor, slots", [
    (8, 2, 4, 1.0, 4),  # 8 * 2 / 4 = 4: exactly enough when the load is even
    (8, 2, 4, 1.05, ROUND(4.2)),  # 5, rounded up
    (100, 1, 10, 1.1, 11),  # 100 * 1.1 / 10 is 11.000000000000002 in floats, and must not become 12
    (8, 1, 4, 1e-9, 1),  # at least 1, whatever the factor
    (4, 2, 2, 8.0, 4)])  # 32: at most T, since a token asks an expert once
def test_capacity_by_hand(num_tokens, k, num_experts, factor, slots):
    """C = ceil(T K factor / E), at least 1, at most T, and an int."""
    capacity = expert_capacity(num_tokens, k, num_experts, factor)
    assert capacity == slots and isinstance(capacity, int), f"{capacity!r} slots instead of {slots}"


@pytest.mark.capacity
@pytest.mark.parametrize("experts, capacity, priority, kept, hint", [
    # Expert 0 serves token 1 (0.9), then token 3 (0.3), and drops token 0.
    ([[0], [0], [1], [0]], 2, [0.1, 0.9, 0.5, 0.3], [[0], [1], [1], [1]],
     "lowest priority first? answers in the order of the queue, not of the tokens?"),
    # First choices: token 0 takes a slot of expert 0, tokens 1 and 2 both slots of expert 1. Then
    # token 0 finds expert 1 full, token 1 takes the other slot of expert 0, token 2 finds it full.
    ([[0, 1], [1, 0], [1, 0]], 2, None, [[1, 0], [1, 1], [1, 0]],
     "served token by token instead of rank by rank? slots of the first rank forgotten?"),
    # Token 0's second choice (expert 1) waits for token 1's first, and loses.
    ([[0, 1], [1, 0]], 1, [0.9, 0.6], [[1, 0], [1, 0]],
     "priority does not lift a second choice over a first")])
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
@pytest.mark.parametrize("capacity", [1, 7])
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


# ---------------------------------------------------------------- the balance losses

@pytest.mark.balance
def test_importance_by_hand():
    """Importance is var / mean^2 of the experts' summed probabilities (population variance)."""
    # Sums 2.25 and 0.75: mean 1.5, both deviate by 0.75. 0.75^2 / 1.5^2 = 0.25
    close(importance_loss(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.75, 0.25]])), 0.25,
          "0.5: var divided by E - 1, or no square; 0.375: divided by the mean, not its square")


@pytest.mark.balance
def test_one_expert_takes_all():
    """When one of 4 experts gets everything, importance and load are both E - 1."""
    logits = torch.tensor([[100.0, 0.0, 0.0, 0.0]]).expand(5, 4)
    close(importance_loss(logits.softmax(-1)), 3.0, "4: var divided by E - 1")
    close(load_loss(logits, logits, 1, 0.0), 3.0)
    close(load_loss(logits, logits + 0.1 * torch.randn(5, 4), 1, 0.1), 3.0)


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
    assert logits.grad.isfinite().all(), "NaN: a square root has no derivative at 0"


@pytest.mark.balance
def test_load_without_noise_is_the_plain_count():
    """noise_std = 0 counts who is in the top k, and has a zero gradient, not a missing one."""
    logits = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 1.0]], requires_grad=True)
    # k = 1: both choose expert 0: load (1, 0, 0), mean 1/3, var (4 + 1 + 1) / 9 / 3 = 2/9; 2/9 * 9
    close(load_loss(logits, logits, 1, 0.0), 2.0)
    # k = 2: {0, 1} and {0, 2}: (1, 1/2, 1/2), mean 2/3, var (4 + 1 + 1) / 36 / 3; 1/18 * 9/4 = 1/8
    loss = load_loss(logits, logits, 2, 0.0)
    close(loss, 0.125, "2.0: the threshold is the k-th largest logit, not the largest")
    loss.backward()
    close(logits.grad, torch.zeros(2, 3))


@pytest.mark.edge
@pytest.mark.balance
def test_a_broken_score_breaks_the_loss_and_raises_nothing():
    """NaN logits give a NaN loss: the training loop looks for it, and says at which step."""
    logits = torch.tensor([[math.nan, 0.0], [1.0, 0.0]])
    assert importance_loss(logits.softmax(-1)).isnan() and load_loss(logits, logits, 1, 0.5).isnan()


@pytest.mark.balance
def test_load_by_hand():
    """The load is P(clean logit + new noise >= threshold), the k-th largest NOISY logit."""
    logits, noisy = torch.tensor([[0.0, 1.0]]).double(), torch.tensor([[2.0, 0.5]]).double()
    # sigma 0.5, threshold 2: expert 0 falls 4 sigma short, 1 - Phi(4), and expert 1 2, 1 - Phi(2)
    p, q = 0.0000316712418331, 0.0227501319481792  # from a table of the normal distribution
    # mean (p + q) / 2, both deviate by (q - p) / 2
    close(load_loss(logits, noisy, 1, 0.5), ((q - p) / (q + p)) ** 2,
          "0.0001: P(falls short), Phi instead of 1 - Phi; 0.83: threshold from the clean logits")


@pytest.mark.balance
def test_load_gradcheck():
    """The gradient agrees with finite differences. It also flows through the threshold, a logit."""
    logits, noise = randn(5, 4).requires_grad_(), 0.25 * randn(5, 4)
    assert torch.autograd.gradcheck(lambda x: load_loss(x, x + noise, 2, 0.25), logits)


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
    ([[False, True], [False, True], [True, True]], [1, 4, 3, 5, 0, 2], [1, 1, 2])])
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
    experts, kept = torch.tensor([[1, 0], [0, 1]]), torch.tensor([[True, True], [True, False]])
    rows, _, order = dispatch(tokens, experts, kept, 2)
    # expert 0: token 0's second and token 1's first choice; expert 1: 0's first; the dropped
    close(order, [1, 2, 0, 3])
    (rows * torch.tensor([[1.0], [10.0], [100.0], [1000.0]])).sum().backward()
    close(tokens.grad, [[101.0], [1010.0]], "1 and 10: only one of the copies")


@pytest.mark.dispatch
@pytest.mark.parametrize("expert, kept, counts", [
    (2, True, [0, 0, 60]), (0, True, [60, 0, 0]), (1, False, [0, 0, 0])])
def test_all_to_one_expert_and_all_dropped(expert, kept, counts):
    """Experts without a token count 0, at either end. When all are dropped no row is lost."""
    tokens = randn(60, 2)
    rows, found, _ = dispatch(tokens, torch.full((60, 1), expert), torch.full((60, 1), kept), 3)
    close(found, counts)
    close(rows, tokens, "equal keys must keep their order: is the sort stable?")


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
def test_the_router_learns_by_the_answers_and_the_experts_by_the_gates():
    """dy/d(gate) = answer, although top-k has no gradient, and dy/d(answer) = gate."""
    rows = torch.tensor([[10.0], [20.0], [30.0], [40.0]], requires_grad=True)
    weights = torch.tensor([[0.5, 0.25], [0.125, 0.0]], requires_grad=True)
    combine(rows, weights, torch.tensor([3, 0, 2, 1])).sum().backward()
    # choice 0 is in row 1, choice 1 in row 3, 2 in row 2, 3 in row 0
    close(weights.grad, [[20.0, 40.0], [30.0, 10.0]])
    close(rows.grad, [[0.0], [0.5], [0.125], [0.25]])


@pytest.mark.combine
def test_gates_are_not_rounded_to_the_type_of_the_answers():
    """bfloat16 answers, float32 gates: the sum is float32, as under autocast."""
    weights = torch.tensor([[0.3, 0.7]])  # 0.3 in bfloat16 would be 0.30078125
    y = combine(torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16), weights, torch.tensor([0, 1]))
    assert y.dtype == torch.float32
    close(y, [[0.3 * 1 + 0.7 * 2]], "1.6953: the gates were cast to bfloat16")


@pytest.mark.combine
def test_there_and_back_again_against_a_loop():
    """With experts that add their number, x + p, a row at any wrong place shows. Dropped: 0."""
    T, K, E, D = 30, 3, 5, 4
    tokens, weights, kept = randn(T, D), randn(T, K), torch.rand(T, K) < 0.7
    experts = torch.rand(T, E).topk(K).indices
    rows, counts, order = dispatch(tokens, experts, kept, E)
    p = torch.arange(E).repeat_interleave(counts)
    nobodys = torch.full((T * K - len(p),), 10 ** 15)  # in dropped rows: must leave no trace
    y = combine(rows + torch.cat([p, nobodys]).unsqueeze(1), weights * kept, order)
    expected = torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        for j in range(K):
            if kept[t, j]:
                expected[t] += weights[t, j] * (tokens[t] + experts[t, j])
    close(y, expected)


# ---------------------------------------------------------------- Experts

PATHS = [  # the two ways to run the experts
    pytest.param("loop", marks=pytest.mark.experts),
    pytest.param("grouped", marks=pytest.mark.grouped)]


def poisoned(grouped_mm):
    """grouped_mm on a bad day: rows behind the last offset, which it leaves unset, are NaN."""

    def call(rows, weight, offs):
        unset, rows = torch.arange(len(rows)).unsqueeze(1) >= offs[-1], 1 * rows
        rows.register_hook(lambda gradient: gradient.masked_fill(unset, torch.nan))
        return grouped_mm(rows, weight, offs=offs).masked_fill(unset, torch.nan)

    return call


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("counts", [
    pytest.param([3, 1, 5], id="every expert"),
    pytest.param([4, 2, 0], id="dropped behind an idle expert"),
    pytest.param([2, 0, 3], id="dropped"),
    pytest.param([0, 0, 0], id="all dropped")])
def test_experts_are_independent_mlps(counts, path, monkeypatch):
    """The loop and the kernel give the answers and gradients of Linear - GELU - Linear.

    Rows beyond the counts are dropped and give 0, whatever is in memory there."""
    monkeypatch.setattr(F, "grouped_mm", poisoned(F.grouped_mm))
    dtype = torch.float64 if path == "loop" else torch.float32  # all that the kernel has
    experts, rows = Experts(3, 8, 16), randn(9, 8).to(dtype).requires_grad_()
    for parameter in experts.to(dtype).parameters():
        nn.init.normal_(parameter, std=0.5)
    answers = getattr(experts, path)(rows, torch.tensor(counts))
    mlps = nn.ModuleList(dense_copy(experts, e) for e in range(3)).to(dtype)
    *groups, dropped = rows.split([*counts, 9 - sum(counts)])
    expected = [mlp(group) for mlp, group in zip(mlps, groups)]
    expected = torch.cat([*expected, torch.zeros_like(dropped)])
    close(answers, expected, "is a bias missing? is GELU the exact one?")
    assert not answers[sum(counts):].any(), "the bias is not 0: a dropped row meets no expert"
    found = torch.autograd.grad(answers.square().sum(), [rows, *experts.parameters()])
    right = torch.autograd.grad(expected.square().sum(), [rows, *mlps.parameters()])
    for ours, theirs in zip(found, right):
        close(ours, theirs, "NaN: the kernel never writes rows beyond its last offset")


@pytest.mark.experts
def test_an_idle_expert_gets_a_zero_gradient_and_not_none():
    """Every expert is called, on 0 rows too: no process of a DDP group waits for an idle one."""
    experts = Experts(3, 4, 7)
    experts(torch.randn(5, 4), torch.tensor([0, 5, 0])).sum().backward()
    for e, expert in enumerate(experts):
        for parameter in expert.parameters():
            assert parameter.grad is not None, f"expert {e} was not called"
            assert parameter.grad.any() == (e == 1)


@pytest.mark.parametrize("path", PATHS)
def test_experts_answer_in_the_type_of_autocast(path):
    """Under bf16 autocast the answers are bfloat16, as those of one MLP. Dropped rows give 0."""
    experts, rows = Experts(3, 8, 16), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):  # it does not know the kernel
        answers = getattr(experts, path)(rows, torch.tensor([2, 0, 3]))
        expected = torch.cat([experts[0](rows[:2]), experts[2](rows[2:5])])
    assert answers.dtype == torch.bfloat16, "float32 rows of zeros among them?"
    error = (answers[:5] - expected).float().norm()
    assert error <= 2 ** -7 * expected.float().norm()  # each step rounds to 2^-8
    assert not answers[5:].any()


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
    (False, True, "loop")])  # on a CPU the loop is faster
def test_which_path_is_taken(compiling, fits, path, monkeypatch):
    """The kernel where it fits, if the layer is compiled. On a CPU all else takes the loop."""
    experts = Experts(3, 8, 16)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(experts, "use_grouped_mm", lambda rows: fits)
    for name in ("loop", "grouped"):
        monkeypatch.setattr(experts, name, lambda *inputs, name=name: (name, *inputs))
    rows, counts = torch.zeros(4, 8), torch.tensor([4, 0, 0])
    assert experts(rows, counts) == (path, rows, counts)


@pytest.mark.edge
@pytest.mark.parametrize("path", PATHS)
def test_every_new_tensor_is_on_the_device_of_the_rows(path):
    """The default device is meta here, and the rows are on the CPU: the two do not mix."""
    experts, rows, counts = Experts(2, 16, 32), torch.randn(5, 16), torch.tensor([2, 1])
    expected = getattr(experts, path)(rows, counts)
    with torch.device("meta"):
        answers = getattr(experts, path)(rows, counts)
    assert not answers.is_meta
    close(answers, expected)


@pytest.mark.experts
def test_the_dtype_to_compute_in():
    """That of the rows, or under autocast its own; not the weights'."""
    rows = torch.zeros(2, 4, dtype=torch.float64)
    assert compute_dtype(rows) == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(rows) == torch.bfloat16


@pytest.mark.grouped
@pytest.mark.parametrize("dtype, dim, hidden, possible", [
    (torch.bfloat16, 8, 24, True),
    (torch.bfloat16, 16, 36, False),  # 36 * 2 = 72 bytes, not a multiple of 16
    (torch.bfloat16, 6, 32, False),  # 6 * 2 = 12 bytes
    (torch.float32, 16, 32, False)])  # torch 2.14 cannot trace it
def test_where_the_kernel_can_be_used(dtype, dim, hidden, possible):
    """In bfloat16, and only for rows of a multiple of 16 bytes."""
    experts, rows = Experts(3, dim, hidden), torch.zeros(4, dim, dtype=dtype)
    assert experts.use_grouped_mm(rows) == possible


@pytest.mark.slow
@pytest.mark.parametrize("router, dtype", [
    pytest.param("linear", torch.float32, marks=pytest.mark.grouped),
    pytest.param("linear", torch.bfloat16, marks=pytest.mark.grouped),
    pytest.param("expert_choice", torch.float32, marks=pytest.mark.expert_choice),
    pytest.param("soft", torch.float32, marks=pytest.mark.soft)])
def test_a_compiled_layer_is_the_same_layer(router, dtype):
    """torch.compile gives the loss and gradients of the uncompiled layer.

    It is one graph, except for MoE in float32: there the loop over the experts is left out.
    """
    path = "loop" if dtype == torch.float32 else "grouped"
    layer = make_moe(16, 32, 4, 2, router, 10, capacity_factor=1.0, router_noise=0.0)
    x, results = torch.randn(3, 10, 16), []
    torch.compiler.reset()  # forget the graphs of earlier tests
    # aot_eager traces forward and backward without the wait for a C++ compiler.
    whole = router != "linear" or path == "grouped"
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=whole)
    for run in (compiled, layer):
        layer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y, routing = run(x)
        loss = y.square().mean() + routing.balance_loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in layer.parameters())])
        layer.experts.forward = getattr(layer.experts, path)  # the uncompiled one takes it, too
    tolerance = 1e-5 if dtype == torch.float32 else 1e-4  # bfloat16 is rounded in another order
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)


@pytest.mark.grouped
@pytest.mark.slow
@pytest.mark.parametrize("dtype, atol, rtol", [
    (torch.float32, 0, 0), (torch.bfloat16, 2e-3, 2 ** -6)])  # one kernel rounds otherwise
def test_torch_export(dtype, atol, rtol):
    """An exported layer answers like the layer itself, whatever tokens come and choose."""
    layer, inputs = MoE(16, 32, 4, 2).to(dtype).eval(), torch.randn(9, 6, 16).to(dtype)
    exported = torch.export.export(layer, (inputs[0],)).module()
    for x in inputs:
        torch.testing.assert_close(exported(x)[0], layer(x)[0], atol=atol, rtol=rtol)


# ---------------------------------------------------------------- Router

@pytest.mark.router
@pytest.mark.parametrize("kind, score", [
    ("linear", lambda r, x, e: r.codes[e] @ x),  # no bias
    ("cosine", lambda r, x, e: r.log_scale.exp() * torch.cosine_similarity(
        r.proj @ x, r.codes[e], dim=0)),
    ("l2", lambda r, x, e: -r.log_scale.exp() * (r.proj @ x - r.codes[e]).norm())])  # nearest wins
def test_router_formulas(kind, score):
    """Each logit is the formula of its kind, token by token. float64 tokens stay float64."""
    router, x = randomise(Router(6, 3, kind)), randn(5, 6)
    expected = torch.stack([torch.stack([score(router, t, e) for e in range(3)]) for t in x])
    close(router(x), expected, "float32 is the least, not the only dtype: torch.promote_types")


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
@pytest.mark.parametrize("kind", ["cosine", "l2"])
def test_temperature_starts_at_2_and_is_bounded_by_100(kind):
    """s is 2 at the start and at most 100, so that the softmax never becomes an argmax."""
    router, x = Router(6, 3, kind).double(), randn(5, 6)
    start = router(x)
    for log_scale, scale in ((math.log(2.0), 2.0), (math.log(50.0), 50.0), (50.0, 100.0)):
        nn.init.constant_(router.log_scale, log_scale)
        close(router(x), start / 2.0 * scale, "s = exp(log_scale), at most 100")


@pytest.mark.router
@pytest.mark.parametrize("dim, proj_dim", [(1, 1), (8, 4), (9, 4), (1024, 256)])
def test_width_of_the_projection(dim, proj_dim):
    """P x has half the width of x, rounded down, at least 1 and at most 256."""
    assert Router(dim, 2, "cosine").codes.shape == (2, proj_dim)
    assert Router(dim, 2, "l2").proj.shape == (proj_dim, dim)


@pytest.mark.parametrize("draw, std", [
    pytest.param(lambda: Router(400, 50).codes, 0.02, marks=pytest.mark.router),
    pytest.param(lambda: Router(400, 50, "l2").proj, 400 ** -0.5, marks=pytest.mark.router),
    pytest.param(lambda: Router(400, 50, "l2").codes, 200 ** -0.5, marks=pytest.mark.router),
    pytest.param(lambda: SoftMoE(400, 8, 5, 10).codes, 400 ** -0.5, marks=pytest.mark.soft)])
def test_codes_and_projections_start_from_a_normal_distribution(draw, std):
    """Linear codes are small: all probabilities start near 1 / E. All else keeps a token's size."""
    values = draw().flatten() / std  # 10,000 or more
    assert abs(values.std() - 1) < 0.05 and abs(values.mean()) < 0.05
    assert values.abs().max() > 3, "not normal: some are more than 3 deviations away"


@pytest.mark.router
def test_distances_do_not_depend_on_the_number_of_tokens():
    """l2: for large batches torch.cdist takes a less exact formula unless told not to."""
    # whole numbers, whose distances are exact; their squares are too large for a float32
    router, x = Router(8, 4, "l2"), torch.randint(3000, 3010, (40, 8)).float()
    router.proj.data = torch.eye(4, 8)
    router.codes.data = torch.randint(3000, 3010, (4, 4)).float()
    close(router(x)[:3], router(x[:3]), "torch.cdist: see its compute_mode")


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
        probs = layer.router(token.unsqueeze(0))[0].softmax(-1)  # over all, before the choice
        best = probs.argsort(descending=True)[:k]
        close(answer, sum(probs[e] * mlps[e](token) for e in best),
              f"k = {k}; if only k = 4 is right, the gates are renormalised; "
              "if none is: two softmaxes, none, or no gate?")


@pytest.mark.layer
@pytest.mark.parametrize("training", [False, True])
def test_one_expert_is_the_dense_mlp(training):
    """E = 1, k = 1: the softmax of one number is 1, so the layer is MLP(x), already balanced."""
    layer, x = randomise(MoE(6, 8, num_experts=1, k=1)).train(training), randn(5, 6)
    y, routing = layer(x)
    close(y, dense_copy(layer.experts, 0)(x))
    assert routing.balance_loss.item() == 0
    (y.sum() + routing.balance_loss).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters()), "NaN: balance of one expert"


@pytest.mark.layer
@pytest.mark.parametrize("task", [True, False])
def test_the_task_alone_teaches_the_router(task):
    """With k = 1 every expert's code gets a gradient. That of the balance loss meets no expert."""
    layer = randomise(MoE(6, 8, num_experts=4, k=1))
    y, routing = layer(randn(20, 6))
    (y.square().sum() if task else routing.balance_loss).backward()
    gradient = layer.router.codes.grad
    assert gradient is not None and (gradient.abs().amax(1) > 1e-6).all(), (
        "no gradient: gates always 1, or detached?")
    assert all((parameter.grad is not None) == task for parameter in layer.experts.parameters())


@pytest.mark.layer
@pytest.mark.parametrize("training, noise", [(True, 2.0), (True, 0.0), (False, 2.0)])
def test_noise_moves_the_choice_but_not_logits_and_probs(training, noise):
    """In training N(0, (noise / E)^2) changes experts, gates and load, but not logits and probs.

    Evaluation draws none, but its load loss has the sigma of training."""
    layer, x = randomise(MoE(6, 8, num_experts=4, k=2, router_noise=noise)), randn(50, 6)
    logits, sigma = layer.train(training).router(x), noise / 4
    torch.manual_seed(1)
    noisy = logits + sigma * torch.randn_like(logits) if training else logits
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
def test_routing_stays_float32_under_autocast():
    """Under bf16 autocast logits, gates and choices are float32's. The experts run in bf16."""
    layer, x = MoE(16, 32, num_experts=8, k=2).eval(), torch.randn(40, 16)
    y, plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_autocast, routing = layer(x)
        y_from_bf16, _ = layer(x.bfloat16())
    assert routing.logits.dtype == routing.probs.dtype == routing.gates.dtype == torch.float32
    for part, of_plain in zip(routing, plain):
        assert torch.equal(part, of_plain), "to cast the input is not enough: turn autocast off"
    dtypes = y_autocast.dtype, y_from_bf16.dtype
    assert dtypes == (torch.float32, torch.bfloat16), "y has the dtype of x"
    assert not torch.equal(y_autocast, y), "the experts ran in float32: autocast is off too long"


@pytest.mark.layer
@pytest.mark.parametrize("train_factor, eval_factor", [(0.5, None), (None, 0.5), (1.0, 0.5)])
def test_each_mode_has_its_own_capacity(train_factor, eval_factor):
    """capacity_factor limits training only, eval_capacity_factor evaluation only, None nothing."""
    factors = dict(capacity_factor=train_factor, eval_capacity_factor=eval_factor)
    layer = MoE(6, 8, 4, k=2, router_noise=0.0, **factors)
    for training, factor in ((True, train_factor), (False, eval_factor)):
        # 40 equal tokens choose the same two experts
        kept = layer.train(training)(torch.ones(40, 6))[1].kept
        slots = 40 if factor is None else int(40 * 2 * factor / 4)  # 10 at 0.5, 20 at 1.0
        close(kept.sum(0), [slots, slots], f"training={training}: the limit of the other mode?")


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


@pytest.mark.layer
@pytest.mark.parametrize("wrong, named", [
    (dict(k=0), [0, 4]), (dict(k=5), [5, 4]), (dict(capacity_factor=0.0), [0.0]),
    (dict(capacity_factor=float("inf")), [float("inf")]),
    (dict(eval_capacity_factor=-1.0), [-1.0]), (dict(router_noise=-0.1), [-0.1])])
def test_impossible_options_are_refused(wrong, named):
    """The message has the value, and for k the number of experts besides."""
    with pytest.raises(ValueError) as error:
        MoE(6, 8, num_experts=4, **dict(k=1) | wrong)
    says(error, *named)


# ---------------------------------------------------------------- all tokens at once, on any device

def scored_by(kind):
    return lambda x, probs, experts: Router(6, 4, kind).to(x.device)(x)


def layer_of(router, training=True, **options):
    """A function that makes a layer on the device of its tokens, and calls it."""

    def call(x, probs, experts):
        layer = make_moe(6, 8, 4, 2, router, 6, **options).train(training).to(x.device)
        layer.experts.forward = lambda rows, counts: rows  # the loop would wait for the counts
        y, routing = layer(x.unsqueeze(0))  # the tokens of one image
        return y, *routing

    return call


IN_ONE_GO = [  # of x (T, 6), p (T, 4) and experts e (T, 2)
    *[("router", scored_by(kind)) for kind in ROUTERS],
    ("top_k", lambda x, p, e: top_k_gates(p, 2)),
    ("balance", lambda x, p, e: importance_loss(p)),
    ("balance", lambda x, p, e: load_loss(p, p, 2, 0.0)),
    ("balance", lambda x, p, e: load_loss(p, p, 2, 0.25)),
    ("capacity", lambda x, p, e: assign_slots(e, 4, 3)),
    ("capacity", lambda x, p, e: assign_slots(e, 4, 3, p[:, 0])),
    ("dispatch", lambda x, p, e: dispatch(x, e, p[:, :2] > 0.5, 4)),
    ("combine", lambda x, p, e: combine(x.repeat(2, 1), p[:, :2], e.flatten())),
    ("layer", layer_of("linear")),
    ("layer", layer_of("linear", capacity_factor=1.0)),
    ("layer", layer_of("linear", training=False, eval_capacity_factor=1.0)),
    ("expert_choice", layer_of("expert_choice")),
    ("soft", layer_of("soft"))]
IN_ONE_GO = [pytest.param(function, marks=getattr(pytest.mark, concept), id=concept)
             for concept, function in IN_ONE_GO]


@pytest.mark.edge
@pytest.mark.parametrize("function", IN_ONE_GO)
def test_all_tokens_at_once_on_the_device_of_the_input(function):
    """As many operations for 40 tokens as for 10, all on one device: a GPU need not wait.

    Tensors on meta have no values. One that forgets its device would be on the CPU, and refused."""

    def inputs(T):
        return torch.rand(T, 6), torch.rand(T, 4), torch.rand(T, 4).topk(2).indices

    has_no_loop_over_tokens(function, inputs)
    with autocast_on_meta():
        results = function(*(tensor.to("meta") for tensor in inputs(6)))
    results = [results] if isinstance(results, torch.Tensor) else results
    assert all(result.is_meta for result in results), "a torch.ones() without device?"


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
