"""moe.py from the bottom up: every test checks the one claim in its docstring, each section builds on those above it.

Run `pytest -x tests/test_moe.py`: it stops at the first thing that is not right yet. Letters as in moe.py: T tokens,
D width, H hidden width, E experts, K experts per token, C slots per expert, R = T*K rows.
"""

import math

import pytest
import torch
from torch import nn

from moe import (MLP, ROUTERS, Experts, MoE, Router, Routing, assign_slots, combine, count_parameters, dispatch,
                 expert_capacity, importance_loss, load_loss, mean_balance_loss, place_rows, top_k_gates)


def close(actual, expected, hint=""):
    """Equal within torch's default tolerances (exactly, for integers and bools); a failure also shows the hint."""
    if not isinstance(expected, torch.Tensor):
        expected = torch.tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, msg=lambda difference: f"{difference}\n\nHint: {hint}")


def randomise(module):
    """Every parameter from N(0, 1), in float64: zero biases would hide a forgotten one, equal logits a wrong choice."""
    module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def dense_copy(experts, e):
    """Expert e as a plain torch MLP: nn.Linear keeps its weight as (outputs, inputs), Experts as (inputs, outputs)."""
    (dim, hidden), dtype = experts.w1[e].shape, experts.w1.dtype
    mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)).to(dtype)
    weights = experts.w1[e].T, experts.b1[e], experts.w2[e].T, experts.b2[e]
    mlp.load_state_dict(dict(zip(("0.weight", "0.bias", "2.weight", "2.bias"), weights)))
    return mlp


# ---------------------------------------------------------------- top_k_gates


def test_top_k_are_the_most_probable_experts_best_first():
    """Token by token the k largest probabilities and their experts, in descending order."""
    probs = torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.1, 0.3]])
    gates, experts = top_k_gates(probs, 2)
    close(experts, [[1, 2], [0, 2]], "best first")
    close(gates, [[0.5, 0.4], [0.6, 0.3]], "0.5556 instead of 0.5: the gates of a token need not sum to 1")


def test_a_single_gate_is_a_probability_and_not_1():
    """With k = 1 the gate is the softmax over ALL experts: a renormalised one would be 1, and teach nothing."""
    gates, _ = top_k_gates(torch.tensor([[0.2, 0.5, 0.3]]), 1)
    close(gates, [[0.5]], "1.0 instead of 0.5: are the gates renormalised?")


# ---------------------------------------------------------------- expert_capacity


@pytest.mark.parametrize("num_tokens, k, num_experts, factor, slots", [
    (8, 1, 4, 1.0, 2),  # 8 * 1 / 4 = 2: exactly enough when the load is even
    (8, 2, 4, 1.0, 4),  # every token asks twice
    (8, 2, 4, 1.05, 5),  # 4.2 rounds up
    (10, 1, 4, 1.0, 3),  # 2.5 rounds up, not to the nearest even number
    (20, 1, 2, 1.1, 11),  # 20 * 1.1 / 2 is 11.000000000000002 in floats, and must not become 12
    (3, 1, 8, 1.0, 1),  # 0.375: at least 1
    (1000, 1, 8, 1e-9, 1),  # at least 1, whatever the factor
    (4, 2, 2, 8.0, 4),  # 32: at most T, since a token asks an expert once
])
def test_capacity_by_hand(num_tokens, k, num_experts, factor, slots):
    """C = ceil(T K factor / E), at least 1, at most T, and an int."""
    capacity = expert_capacity(num_tokens, k, num_experts, factor)
    assert capacity == slots and isinstance(capacity, int), f"{capacity!r} slots instead of {slots}"


# ---------------------------------------------------------------- assign_slots


def test_slots_in_order_of_position():
    """Without priority an expert serves its tokens from the first to the last, and drops the rest."""
    experts = torch.tensor([[0], [0], [1], [0]])  # expert 0 has 2 slots: for tokens 0 and 1, so token 3 is dropped
    close(assign_slots(experts, 2, capacity=2), torch.tensor([[True], [True], [True], [False]]))


def test_slots_in_order_of_priority():
    """With priority an expert serves the highest first: Batch Prioritized Routing."""
    experts = torch.tensor([[0], [0], [1], [0]])
    priority = torch.tensor([0.1, 0.9, 0.5, 0.3])  # expert 0 serves token 1 (0.9), token 3 (0.3), and drops token 0
    kept = assign_slots(experts, 2, 2, priority)
    close(kept, [[False], [True], [True], [True]], "token 1 dropped: lowest first? token 3: is kept in queue order?")


def test_first_choices_come_before_all_second_choices():
    """K = 2: the last token's first choice is served before the first token's second choice."""
    experts = torch.tensor([[0, 1], [1, 0], [1, 0]])
    # Two slots each. First choices: token 0 takes a slot of expert 0, tokens 1 and 2 both slots of expert 1.
    # Second choices: token 0 wants expert 1 (full), token 1 takes the last slot of expert 0, token 2 finds it full.
    kept = assign_slots(experts, 2, 2)
    close(kept, [[True, False], [True, True], [True, False]], "[1,1] [1,1] [0,0]: served token by token, not by rank")


def test_one_order_of_tokens_serves_every_rank():
    """K = 2 with priority: the same order of tokens within the first choices and within the second."""
    experts = torch.tensor([[0, 1], [1, 0], [1, 0]])
    priority = torch.tensor([0.5, 0.6, 0.9])  # so the order is token 2, 1, 0
    # First choices: 2 and 1 fill expert 1, 0 takes a slot of expert 0. Second: 2 takes the other one, 1 and 0 find none.
    close(assign_slots(experts, 2, 2, priority), [[True, False], [True, False], [True, True]])


def test_priority_does_not_lift_a_second_choice_over_a_first():
    """The most important token's second choice still waits for the least important token's first."""
    kept = assign_slots(torch.tensor([[0, 1], [1, 0]]), 2, 1, torch.tensor([0.9, 0.6]))
    close(kept, [[True, False], [True, False]], "[1,1] [0,0]: sorted by priority before rank")


def test_ties_go_to_the_earlier_token():
    """Equal priorities keep the order of position: the sort must be stable."""
    kept = assign_slots(torch.zeros(1000, 1, dtype=torch.int64), 1, 500, torch.ones(1000))
    close(kept[:, 0], torch.arange(1000) < 500)


def test_one_slot_goes_to_the_most_important_token():
    """Capacity 1 and all tokens at one expert: exactly one choice survives."""
    kept = assign_slots(torch.tensor([[2], [2], [2]]), 3, 1, torch.tensor([0.4, 0.8, 0.6]))
    close(kept, [[False], [True], [False]])


@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize("capacity", [1, 7, 40])
def test_slots_against_a_loop(capacity, prioritised):
    """The cumulative sum gives out the same slots as counting one choice after the other; T slots drop nothing."""
    T, K, E = 40, 3, 5
    experts = torch.rand(T, E).topk(K).indices
    priority = torch.rand(T) if prioritised else None
    tokens = sorted(range(T), key=lambda t: -priority[t].item()) if prioritised else range(T)
    used, expected = [0] * E, torch.zeros(T, K, dtype=torch.bool)
    for j in range(K):  # rank by rank ...
        for t in tokens:  # ... everybody in order
            e = experts[t, j].item()
            expected[t, j] = used[e] < capacity
            used[e] += 1
    close(assign_slots(experts, E, capacity, priority), expected)
    assert capacity < T or expected.all()


# ---------------------------------------------------------------- the balance losses


def test_importance_by_hand():
    """Importance is var / mean^2 of the experts' summed probabilities, with the population variance."""
    # Sums 1.5 and 0.5, mean 1, deviations +-0.5; and one token alone: mean 0.5, deviations +-0.25, (0.25 / 0.5)^2.
    close(importance_loss(torch.tensor([[0.9, 0.1], [0.6, 0.4]])), 0.25, "0.5: divided by E - 1; 0.5 also without ^2")
    close(importance_loss(torch.tensor([[0.75, 0.25]])), 0.25, "0.0625: not divided by the squared mean")


@pytest.mark.parametrize("E", [2, 4, 8])
def test_one_expert_takes_all(E):
    """When one expert gets everything both losses are E - 1, the most they can be for k = 1."""
    logits = torch.full((5, E), -100.0)
    logits[:, E - 1] = 100.0
    close(importance_loss(logits.softmax(-1)), float(E - 1), "E instead of E - 1: divided by E - 1, not by E?")
    close(load_loss(logits, logits + 1e-3 * torch.randn(5, E), 1, 0.0), float(E - 1))
    # With a little noise the winner is half sure of itself (it ties with its own threshold), the others have no chance.
    close(load_loss(logits, logits, 1, 1 / E), float(E - 1))


@pytest.mark.parametrize("E", [1, 4])
@pytest.mark.parametrize("noise_std", [0.0, 0.25])
def test_exact_balance_has_no_loss_and_a_finite_gradient(E, noise_std):
    """With equal logits, and with E = 1, both losses are 0 and their gradients are not NaN."""
    logits = torch.zeros(6, E, requires_grad=True)
    loss = importance_loss(logits.softmax(-1)) + load_loss(logits, logits, 1, noise_std)
    loss.backward()
    assert loss.item() == 0, f"{loss.item()} instead of 0: is the variance divided by E - 1 = 0?"
    assert logits.grad.isfinite().all(), "NaN: the derivative of std at 0 is infinite; square the mean, not std / mean"


def test_load_without_noise_is_the_plain_count():
    """noise_std = 0 counts who is in the top k, divides nothing by zero, and has a zero gradient, not a missing one."""
    logits = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 1.0]], requires_grad=True)
    # k = 1: both choose expert 0: load (1, 0, 0), mean 1/3, var (4 + 1 + 1) / 9 / 3 = 2/9, CV^2 = 2/9 * 9 = 2.
    close(load_loss(logits, logits, 1, 0.0), 2.0)
    # k = 2: {0, 1} and {0, 2}: load (1, 1/2, 1/2), mean 2/3, var (4 + 1 + 1) / 36 / 3 = 1/18, CV^2 = 1/18 * 9/4 = 1/8.
    loss = load_loss(logits, logits, 2, 0.0)
    close(loss, 0.125, "0 or 2: is the threshold the k-th largest logit?")
    loss.backward()
    close(logits.grad, torch.zeros(2, 3))


def test_load_by_hand():
    """One token's load is P(logit + new noise >= threshold), with the largest NOISY logit as threshold for k = 1."""
    logits, noisy = torch.tensor([[0.0, 1.0]]).double(), torch.tensor([[2.0, 0.5]]).double()
    # threshold 2: expert 0 is 2 sigma short of it, 1 - Phi(2) = 0.02275; expert 1 is 1 sigma short, 1 - Phi(1) = 0.15866
    p, q = 0.022750131948179, 0.158655253931457  # from any table of the normal distribution
    close(load_loss(logits, noisy, 1, 1.0), ((p - q) / (p + q)) ** 2,  # mean (p + q) / 2, both deviate by (p - q) / 2
          "0.213: the probability to fall short, Phi and not 1 - Phi; 0.278: the clean logits as threshold")


def test_load_against_a_loop():
    """load = CV^2 over experts of the mean over tokens of 1 - Phi((k-th largest noisy logit - clean logit) / sigma)."""
    T, E, k, sigma = 6, 4, 2, 0.25
    logits = torch.randn(T, E, dtype=torch.float64)
    noisy = logits + sigma * torch.randn(T, E, dtype=torch.float64)
    load = [0.0] * E
    for t in range(T):
        threshold = sorted(noisy[t].tolist())[-k]
        for e in range(E):
            z = (threshold - logits[t, e].item()) / sigma
            load[e] += (1 - 0.5 * (1 + math.erf(z / math.sqrt(2)))) / T
    mean = sum(load) / E
    variance = sum((x - mean) ** 2 for x in load) / E
    close(load_loss(logits, noisy, k, sigma), variance / mean ** 2)


def test_the_load_has_a_gradient_although_counting_has_none():
    """With noise a step down the gradient takes tokens from the busiest expert: that is what the noise is for."""
    logits = torch.tensor([[0.5, 0.0], [0.5, 0.0]], requires_grad=True)  # expert 0 wins every token
    load_loss(logits, logits + torch.tensor([[0.3, 0.0], [-0.1, 0.2]]), 1, 0.5).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1] < 0).all()


# ---------------------------------------------------------------- dispatch and combine


def test_place_rows_by_hand():
    """Row i goes TO positions[i]; taking it FROM positions[i] is the inverse."""
    rows = torch.tensor([[10.0], [11.0], [12.0]])
    placed = place_rows(rows, torch.tensor([2, 0, 1]))  # 10 to the end, 11 to the front, 12 to the middle
    close(placed, [[11.0], [12.0], [10.0]], "12, 10, 11: that is rows[positions]")


def test_rows_sorted_by_expert():
    """Every choice is a row, expert by expert, and within an expert in order of token and choice."""
    tokens = torch.tensor([[1.0], [2.0], [3.0]])
    experts = torch.tensor([[1, 0], [0, 2], [1, 2]])  # choices 0 .. 5 belong to experts 1 0 0 2 1 2
    rows, counts, order = dispatch(tokens, experts, torch.ones(3, 2, dtype=torch.bool), 3)
    close(order, [1, 2, 0, 4, 3, 5], "order[r] = t * K + j: expert 0 has choices 1, 2; expert 1 has 0, 4; expert 2 has 3, 5")
    close(rows, [[1.0], [2.0], [1.0], [3.0], [2.0], [3.0]], "row r is token order[r] // K")
    close(counts, [2, 2, 2])


def test_dropped_rows_come_last_and_are_not_counted():
    """A dropped choice is behind the last expert's rows and in nobody's count."""
    tokens = torch.tensor([[1.0], [2.0], [3.0]])
    experts = torch.tensor([[1, 0], [0, 2], [1, 2]])
    kept = torch.tensor([[False, True], [False, True], [True, True]])  # choices 0 and 2 dropped
    rows, counts, order = dispatch(tokens, experts, kept, 3)
    close(counts, [1, 1, 2], "2, 2, 2: the dropped are counted")
    close(order, [1, 4, 3, 5, 0, 2])
    close(rows, [[1.0], [3.0], [2.0], [3.0], [1.0], [2.0]])


def test_combine_by_hand():
    """Each answer returns to its token, times its weight, and the answers of one token are added."""
    rows = torch.tensor([[10.0], [20.0], [30.0], [40.0], [50.0], [60.0]])
    order = torch.tensor([1, 2, 0, 4, 3, 5])  # token 0 gets 30 and 10, token 1 gets 20 and 50, token 2 gets 40 and 60
    weights = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.1, 0.2]])
    # 0.5 * 30 + 0.25 * 10 = 17.5      1 * 20 + 0 * 50 = 20      0.1 * 40 + 0.2 * 60 = 16
    close(combine(rows, weights, order), [[17.5], [20.0], [16.0]], "40, 70, 100: the weights are missing")


def test_the_gradient_of_a_gate_is_the_experts_answer():
    """dy/d(gate) = the expert's answer: how a router learns although top-k has no gradient."""
    rows, order = torch.tensor([[10.0], [20.0], [30.0], [40.0]]), torch.tensor([3, 0, 2, 1])
    weights = torch.full((2, 2), 0.5, requires_grad=True)
    combine(rows, weights, order).sum().backward()
    close(weights.grad, [[20.0, 40.0], [30.0, 10.0]])  # choice 0 is in row 1, choice 1 in row 3, 2 in row 2, 3 in row 0


def test_there_and_back_again_against_a_loop():
    """With experts that add their number, x + p, any row at the wrong expert or token shows; the dropped add exactly 0."""
    T, K, E, D = 30, 3, 5, 4
    tokens = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    experts = torch.rand(T, E).topk(K).indices
    kept, weights = torch.rand(T, K) < 0.7, torch.rand(T, K, dtype=torch.float64)
    rows, counts, order = dispatch(tokens, experts, kept, E)
    owners = [p for p in range(E) for _ in range(counts[p])]
    owners += [1e30] * (T * K - len(owners))  # nobody's rows: 0 times anything finite must leave no trace
    y = combine(rows + torch.tensor(owners).unsqueeze(1), weights * kept, order)
    expected = torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        for j in range(K):
            if kept[t, j]:
                expected[t] += weights[t, j] * (tokens[t].detach() + experts[t, j])
    close(y, expected)
    y.sum().backward()  # a token's gradient is the sum over its copies: dy/dx = its kept weights
    close(tokens.grad, (weights * kept).sum(1, keepdim=True).expand(T, D))


# ---------------------------------------------------------------- Experts


@pytest.mark.parametrize("counts", [[3, 1, 2], [0, 4, 0], [0, 0, 6], [2, 0, 3], [0, 0, 0]])
def test_experts_are_independent_mlps(counts):
    """Outputs and gradients are those of nn.Linear - GELU - nn.Linear per expert; a row beyond the counts gives 0."""
    experts = randomise(Experts(3, 4, 7))
    rows = torch.randn(6, 4, dtype=torch.float64)
    out = experts(rows, torch.tensor(counts))
    out.sum().backward()
    start = 0
    for e, count in enumerate(counts):
        mlp = dense_copy(experts, e)
        expected = mlp(rows[start:start + count])
        close(out[start:start + count], expected, f"expert {e}: is a bias missing, or GELU not the exact one?")
        expected.sum().backward()
        close(experts.w1.grad[e].T, mlp[0].weight.grad)
        close(experts.b1.grad[e], mlp[0].bias.grad)
        close(experts.w2.grad[e].T, mlp[2].weight.grad)
        close(experts.b2.grad[e], mlp[2].bias.grad)
        start += count
    assert torch.equal(out[start:], torch.zeros_like(out[start:])), "rows beyond sum(counts) must be exactly 0"


def test_an_idle_expert_gets_a_zero_gradient_and_not_none():
    """Every parameter has a gradient after any step, so no process of a DDP group waits for an idle expert."""
    experts = Experts(3, 4, 7)
    experts(torch.randn(5, 4), torch.tensor([0, 5, 0])).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None and (parameter.grad[[0, 2]] == 0).all() and (parameter.grad[1] != 0).any()


def test_experts_gradcheck():
    """The gradients agree with finite differences, for rows, weights and biases, with an empty expert and a dropped row."""
    experts = randomise(Experts(3, 2, 3))
    rows = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([2, 0, 1])
    assert torch.autograd.gradcheck(lambda rows, *_: experts(rows, counts), (rows, *experts.parameters()))


def test_experts_start_like_linear_and_all_different():
    """At the start weights are uniform in +-1/sqrt(inputs), biases 0, and no two experts are alike."""
    experts = Experts(2, 16, 400)
    for weight, bound in ((experts.w1, 1 / 4), (experts.w2, 1 / 20)):  # 16 inputs, then 400
        assert 0.98 * bound < weight.max() <= bound and -bound <= weight.min() < -0.98 * bound
        assert (weight[0] != weight[1]).any(), "the same draw for all experts: they would stay alike for a long time"
    assert not experts.b1.any() and not experts.b2.any()


# ---------------------------------------------------------------- Router


def test_linear_router_formula():
    """The linear router's logits are dot products, logits[t, e] = sum_d W[e, d] x[t, d], without a bias."""
    router = randomise(Router(6, 3, "linear"))
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = [[sum(router.weight[e, d] * x[t, d] for d in range(6)).item() for e in range(3)] for t in range(5)]
    close(router(x), expected)


def test_cosine_router_formula():
    """The cosine router's logits are s * cos(P x, code_e), with s = exp(log_scale)."""
    router = randomise(Router(6, 3, "cosine"))
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = torch.empty(5, 3, dtype=torch.float64)
    for t in range(5):
        z = router.proj @ x[t]
        for e, code in enumerate(router.codes):
            expected[t, e] = router.log_scale.exp() * (z @ code) / math.sqrt((z @ z) * (code @ code))
    close(router(x), expected.detach())


def test_l2_router_formula():
    """The l2 router's logits are -s * |P x - code_e|: the nearest code wins."""
    router = randomise(Router(6, 3, "l2"))
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = torch.empty(5, 3, dtype=torch.float64)
    for t in range(5):
        for e, code in enumerate(router.codes):
            expected[t, e] = -router.log_scale.exp() * ((router.proj @ x[t] - code) ** 2).sum().sqrt()
    close(router(x), expected.detach(), "positive: the farthest code would win; too large: is the distance squared?")


def test_cosine_router_ignores_the_length_of_a_token():
    """x and 1000 x get the same cosine logits: only the direction counts."""
    router, x = randomise(Router(6, 3, "cosine")), torch.randn(5, 6, dtype=torch.float64)
    close(router(1000 * x), router(x))


@pytest.mark.parametrize("log_scale, scale", [(None, 2.0), (math.log(50.0), 50.0), (50.0, 100.0)])
def test_temperature_starts_at_2_and_is_bounded_by_100(log_scale, scale):
    """s is 2 at the start and never more than 100, so that training cannot turn the softmax into an argmax."""
    cosine, l2 = Router(6, 3, "cosine"), Router(6, 3, "l2")
    for router in (cosine, l2):
        nn.init.ones_(router.proj)
        nn.init.zeros_(router.codes) if router is l2 else nn.init.ones_(router.codes)
        if log_scale is not None:
            nn.init.constant_(router.log_scale, log_scale)
    x = torch.full((1, 6), 1 / 6)  # P x = (1, 1, 1): cosine 1 with the code (1, 1, 1), distance sqrt(3) to (0, 0, 0)
    close(cosine(x), [[scale] * 3])
    close(l2(x), [[-scale * math.sqrt(3)] * 3])


@pytest.mark.parametrize("dim, proj_dim", [(1, 1), (8, 4), (1024, 256)])
def test_width_of_the_projection(dim, proj_dim):
    """P x has half the width of x, at least 1 and at most 256, unless another is asked for."""
    assert Router(dim, 2, "cosine").codes.shape == (2, proj_dim) and Router(dim, 2, "l2").proj.shape == (proj_dim, dim)
    assert Router(dim, 2, "l2", proj_dim=3).codes.shape == (2, 3)


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_start_undecided(kind):
    """At the start no expert is favoured much: each gets between half and twice its share of the tokens' probability."""
    share = Router(64, 4, kind)(torch.randn(500, 64)).softmax(-1).mean(0)
    assert (share > 0.5 / 4).all() and (share < 2 / 4).all(), f"mean probabilities {share.tolist()}"


def test_unknown_router_lists_the_known_ones():
    """A misspelt router stops at once, and the message names all that exist."""
    with pytest.raises(ValueError, match="'quadratic'.*linear, cosine, l2"):
        Router(6, 3, "quadratic")


# ---------------------------------------------------------------- MoE: the whole layer


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_layer_against_a_loop_over_tokens(router, k):
    """y = sum over the k best experts e of softmax(logits)_e * MLP_e(x), token by token, in any shape (..., D)."""
    layer = randomise(MoE(dim=6, hidden=8, num_experts=4, k=k, router=router)).eval()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    y, routing = layer(x)
    mlps = [dense_copy(layer.experts, e) for e in range(4)]
    for token, answer in zip(x.reshape(10, 6), y.reshape(10, 6)):
        probs = layer.router(token.unsqueeze(0))[0].softmax(-1)  # over all four, before the choice
        best = sorted(range(4), key=lambda e: -probs[e].item())[:k]
        close(answer, sum(probs[e] * mlps[e](token) for e in best), "k < 4 only: are the gates renormalised?")
    assert y.shape == x.shape and routing.probs.shape == (10, 4) and routing.gates.shape == (10, k)


@pytest.mark.parametrize("training", [False, True])
def test_one_expert_is_the_dense_mlp(training):
    """E = 1, k = 1: the softmax of one number is 1, so the layer is MLP(x), and there is nothing to balance."""
    layer = randomise(MoE(6, 8, num_experts=1, k=1)).train(training)
    mlp, x = MLP(6, 8).double(), torch.randn(5, 6, dtype=torch.float64)
    mlp.load_state_dict(dense_copy(layer.experts, 0).state_dict())
    y, routing = layer(x)
    close(y, mlp(x))
    assert routing.balance_loss.item() == 0
    (y.sum() + routing.balance_loss).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters()), "NaN: the balance loss of a single expert"


def test_the_task_alone_teaches_the_router():
    """k = 1 and no balance loss: still every expert's logit gets a gradient, since its gate is a softmax over all."""
    layer = randomise(MoE(6, 8, num_experts=4, k=1))
    y, _ = layer(torch.randn(20, 6, dtype=torch.float64))
    y.square().sum().backward()
    gradient = layer.router.weight.grad
    assert gradient is not None and (gradient.abs().amax(1) > 1e-6).all(), "no gradient: gates always 1, or detached?"


def test_layer_gradcheck():
    """y and the balance loss agree with finite differences in x and every parameter, through both router and experts."""
    layer = randomise(MoE(2, 3, num_experts=3, k=2, router="cosine")).eval()
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def outputs(x, *_):
        y, routing = layer(x)
        return y, routing.balance_loss

    assert torch.autograd.gradcheck(outputs, (x, *layer.parameters()))


def test_noise_only_while_training():
    """Training draws new gates every time, around the clean ones; evaluation, and router_noise = 0, never do."""
    layer, x = randomise(MoE(6, 8, num_experts=4, k=2)), torch.randn(5, 6, dtype=torch.float64)
    quiet = MoE(6, 8, num_experts=4, k=2, router_noise=0.0).double()
    quiet.load_state_dict(layer.state_dict())
    assert not torch.equal(layer(x)[1].gates, layer(x)[1].gates), "no noise while training"
    clean = layer.eval()(x)
    for y, routing in (layer(x), quiet.train()(x), quiet.eval()(x)):
        assert torch.equal(y, clean[0]) and torch.equal(routing.gates, clean[1].gates)


def test_size_of_the_noise():
    """The noise on the logits is N(0, (router_noise / E)^2)."""
    layer = MoE(6, 8, num_experts=4, k=4, router_noise=2.0)  # sigma = 2 / 4; k = E shows every noisy probability
    x = torch.zeros(20_000, 6)  # clean logits 0, so log(gate) = noise - log sum exp, the same for all experts of a token
    routing = layer.route(x)
    noise = torch.empty(20_000, 4).scatter(1, routing.experts, routing.gates.log())
    difference = noise[:, 0] - noise[:, 1]  # of two experts' noise: variance 2 sigma^2 = 0.5
    # The mean of 20,000 draws strays by sqrt(0.5 / 20,000) = 0.005, the variance by 0.5 sqrt(2 / 20,000) = 0.005.
    assert abs(difference.mean()) < 0.025 and abs(difference.var() - 0.5) < 0.025, f"variance {difference.var():.3f}"


def test_noise_moves_the_choice_but_not_logits_and_probs():
    """Routing.logits and .probs are the clean ones while experts and gates are the noisy ones."""
    layer, x = randomise(MoE(6, 8, num_experts=4, k=4)), torch.randn(50, 6, dtype=torch.float64)
    routing = layer(x)[1]
    close(routing.logits, layer.router(x))
    close(routing.probs, layer.router(x).softmax(-1), "with noise in probs the importance loss would be noisy")
    assert (routing.gates != routing.probs.gather(1, routing.experts)).any(), "gates from the clean probabilities"
    assert (routing.gates[:, 1:] <= routing.gates[:, :-1]).all(), "best first, by the same noisy gate that weighs"


def test_balance_loss_is_clean_importance_plus_noisy_load():
    """balance_loss = importance(clean probs) + load(clean logits, noisy logits, k, sigma)."""
    layer, x = randomise(MoE(6, 8, num_experts=4, k=2)), torch.randn(50, 6, dtype=torch.float64)
    logits = layer.router(x)
    close(layer.eval()(x)[1].balance_loss, importance_loss(logits.softmax(-1)) + load_loss(logits, logits, 2, 0.25))
    torch.manual_seed(1)
    noisy = logits + 0.25 * torch.randn_like(logits)  # sigma = 1 / E; the layer below draws the same numbers
    torch.manual_seed(1)
    close(layer.train()(x)[1].balance_loss, importance_loss(logits.softmax(-1)) + load_loss(logits, noisy, 2, 0.25))


@pytest.mark.parametrize("kind", ROUTERS)
def test_routing_stays_float32_under_autocast(kind):
    """Under bf16 autocast the logits are bit for bit those of float32, and so are the choices; the experts run in bf16."""
    layer, x = MoE(16, 32, num_experts=8, k=2, router=kind).eval(), torch.randn(40, 16)
    y, plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_autocast, routing = layer(x)
        y_half = layer(x.bfloat16())[0]
    assert routing.logits.dtype == routing.probs.dtype == routing.gates.dtype == torch.float32
    assert torch.equal(routing.logits, plain.logits), "rounded to bf16: casting the input is not enough, turn autocast off"
    assert torch.equal(routing.experts, plain.experts) and torch.equal(routing.gates, plain.gates)
    assert y_autocast.dtype == torch.float32 and y_half.dtype == torch.bfloat16, "y has the dtype of x"
    assert not torch.equal(y_autocast, y), "the experts ran in float32: autocast is off for too much"


def test_an_image_is_classified_alone():
    """In evaluation y of a token does not depend on the other tokens of its batch, whatever the training capacity."""
    layer = randomise(MoE(6, 8, num_experts=4, k=2, capacity_factor=0.5)).eval()
    x = torch.randn(40, 6, dtype=torch.float64)
    y, routing = layer(x)
    close(layer(x[:3])[0], y[:3])
    assert routing.kept.all()


@pytest.mark.parametrize("train_factor, eval_factor", [(None, None), (0.5, None), (None, 0.5), (1.0, 0.5)])
def test_each_mode_has_its_own_capacity(train_factor, eval_factor):
    """capacity_factor limits training only, eval_capacity_factor evaluation only, and None drops nothing."""
    layer = randomise(MoE(6, 8, num_experts=4, k=2, capacity_factor=train_factor, eval_capacity_factor=eval_factor))
    x = torch.zeros(40, 6, dtype=torch.float64)  # equal tokens: without noise all 40 choose the same two experts
    layer.noise_std = 0.0
    for training, factor in ((True, train_factor), (False, eval_factor)):
        kept = layer.train(training)(x)[1].kept
        served = 40 if factor is None else int(40 * 2 * factor / 4)  # 10 slots at 0.5, 20 at 1.0
        close(kept.sum(0), [served, served], f"training={training}: the limit of the other mode?")


@pytest.mark.parametrize("batch_priority, dropped", [(True, 0), (False, 2)])
def test_a_dropped_token_is_exactly_zero(batch_priority, dropped):
    """Where the expert was full y is exactly 0, so the residual carries the token; who is dropped: by gate or position."""
    layer = randomise(MoE(2, 8, num_experts=2, k=1, capacity_factor=1.0, batch_priority=batch_priority, router_noise=0))
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(2))  # the logits are x itself
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]]).double()
    # Tokens 0, 1, 2 want expert 0, with gates sigmoid(1), sigmoid(2), sigmoid(3); it has 4 * 1 * 1.0 / 2 = 2 slots.
    y, routing = layer(x)
    for t in range(4):
        mlp = dense_copy(layer.experts, 0 if t < 3 else 1)
        if t == dropped:
            assert (y[t] == 0).all() and not routing.kept[t], f"token {t} has no slot, and its y must be 0"
        else:
            close(y[t], routing.gates[t] * mlp(x[t]), "a kept choice is the same as without any limit")


@pytest.mark.parametrize("T", [1, 3])
def test_fewer_tokens_than_experts(T):
    """A tiny batch trains: outputs, losses and gradients are finite, and every parameter gets a gradient."""
    layer = MoE(6, 8, num_experts=8, k=2, capacity_factor=1.0)
    y, routing = layer(torch.randn(T, 6))
    assert y.shape == (T, 6) and routing.kept[0].all()
    (y.sum() + routing.balance_loss).backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


def test_the_same_seed_gives_the_same_bits():
    """Two training steps from one seed are equal bit for bit, outputs, losses and gradients."""
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        layer = MoE(16, 32, num_experts=4, k=2, capacity_factor=1.0)
        y, routing = layer(torch.randn(64, 16))
        (y.square().sum() + routing.balance_loss).backward()
        results.append([y, routing.balance_loss, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("k", [0, 5])
def test_k_must_fit_the_experts(k):
    """A token cannot choose more experts than there are, nor none: one clear line, before any work."""
    with pytest.raises(ValueError, match=f"k = {k}.*k must be 1 to 4"):
        MoE(6, 8, num_experts=4, k=k)


# ---------------------------------------------------------------- around the layer


@pytest.mark.parametrize("k, active", [(1, 31), (2, 48), (4, 82)])
def test_parameters_by_hand(k, active):
    """total counts everything, active k experts per MoE layer and all the rest."""
    model = nn.Sequential(nn.Linear(2, 2), MoE(dim=2, hidden=3, num_experts=4, k=k))
    # Linear 2 * 2 + 2 = 6, router 4 * 2 = 8, one expert 2 * 3 + 3 + 3 * 2 + 2 = 17, four of them 68.
    assert count_parameters(model) == (82, active)  # 6 + 8 + 68 = 82; with k = 1: 6 + 8 + 17 = 31


def test_balance_loss_of_a_model_is_the_mean_over_its_layers():
    """The mean, not the sum, so that its weight means the same at any depth; a dense model has 0."""
    routings = [Routing(*[None] * 5, balance_loss=torch.tensor(value)) for value in (1.0, 4.0)]
    close(mean_balance_loss(routings), 2.5, "5: the sum")
    close(mean_balance_loss([]), 0.0)
