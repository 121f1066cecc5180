"""The sparse Mixture-of-Experts (MoE) layer: a router sends each token to k of E small MLPs.

It replaces the MLP of a ViT or ConvNeXt block, as in "Mixture of Experts for Image Classification:
What's the Sweet Spot?" (Videau et al., TMLR 2025, section 3):

    y = sum over the k most probable experts e of  probs_e * MLP_e(x),  probs = softmax(router(x))

    layer = MoE(dim=384, hidden=1536, num_experts=8, k=2)
    y, routing = layer(x)                                  # x (..., 384) -> y (..., 384)
    loss = cross_entropy + 0.005 * routing.balance_loss    # keeps every expert at work

Letters: B images, N tokens per image, T = B*N tokens, D width, H hidden width, E experts, K experts
per token, C slots per expert, R = T*K rows, one per token and choice.

A worked example: T = 3 tokens of width D = 1, E = 2 experts, K = 1; no noise, and C = 1 from a
capacity_factor of 0.5. The router's logits are x ln 3 and 0. The experts answer 10 x and 100 x.

    token   x     logits          probs      chosen  gate   slot              row  answer     y
      0     1  ( 1.10, 0.00)  (0.75, 0.25)     0     0.75   none: dropped      2       0      0
      1     2  ( 2.20, 0.00)  (0.90, 0.10)     0     0.90   that of expert 0   0      20     18
      2    -1  (-1.10, 0.00)  (0.25, 0.75)     1     0.75   that of expert 1   1    -100    -75

Tokens 0 and 1 both ask for expert 0. Token 1 gets the slot, because its gate is larger. dispatch()
sorts the tokens by expert: row 0 is token 1, row 1 is token 2, the dropped token comes last.
combine() multiplies each answer by its gate. A dropped token gets y = 0: the block's residual
connection carries it on. MoE.forward() names these steps, and they follow in the order of the call.
The last section has two other ways to route: experts choose tokens, and Soft MoE.
"""

import math
import re
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROUTERS = ("linear", "cosine", "l2")


class Routing(NamedTuple):
    """What one MoE layer decided for its T tokens. The layer returns it and does not keep it."""
    logits: torch.Tensor  # (T, E) float32, the router's scores without training noise
    probs: torch.Tensor  # (T, E) float32, softmax of these logits
    experts: torch.Tensor  # (T, K) int64, the chosen experts, best first
    gates: torch.Tensor  # (T, K) float32, their probabilities (with noise, while training)
    kept: torch.Tensor  # (T, K) bool, False where the expert was full and the choice was dropped
    balance_loss: torch.Tensor  # scalar, importance + load


class MoE(nn.Module):
    """Replace the MLP of a block: x (..., D) -> y (..., D) in the dtype of x, and a Routing.

    dim, hidden: D and H of each expert. num_experts, k: E experts, of which a token meets k.
    router: "linear", "cosine" or "l2", see Router.
    capacity_factor: limits an expert to expert_capacity() slots in training. None is no limit.
    eval_capacity_factor: the same in evaluation. If set, a prediction depends on the whole batch.
    batch_priority: short of slots, serve tokens by largest gate (True) or by position (False).
    router_noise: in training, N(0, (router_noise / E)^2) is added to the logits, as in V-MoE.
    Raise ValueError for a k outside 1 .. E, a factor not in (0, inf), and negative noise.
    Attributes: num_experts to batch_priority, noise_std = router_noise / E, router, experts.
    """

    def __init__(self, dim, hidden, num_experts, k, router="linear", capacity_factor=None,
                 eval_capacity_factor=None, batch_priority=True, router_noise=1.0):
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(f"k = {k}: expected 1 to {num_experts}, the number of experts")
        for factor in (capacity_factor, eval_capacity_factor):
            if factor is not None and not 0 < factor < math.inf:
                raise ValueError(f"capacity factor {factor}: expected above 0 and finite, or None")
        if router_noise < 0:
            raise ValueError(f"router noise {router_noise}: expected 0 or more")
        self.num_experts, self.k, self.batch_priority = num_experts, k, batch_priority
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.noise_std = router_noise / num_experts
        self.router = Router(dim, num_experts, router)
        self.experts = Experts(num_experts, dim, hidden)

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])  # (..., D) -> (T, D)
        routing = self.route(tokens)  # who goes where, with what weight, at what cost
        tokens = tokens.to(compute_dtype(tokens))  # before they are copied: half the traffic
        rows, counts, order = dispatch(tokens, routing.experts, routing.kept, self.num_experts)
        rows = self.experts(rows, counts)  # (R, D), each expert sees only its own rows
        y = combine(rows, routing.gates * routing.kept, order)  # (T, D), a dropped choice adds 0
        return y.to(x.dtype).reshape(x.shape), routing

    def route(self, tokens):
        """Return the Routing of tokens (T, D): score, choose k experts, assign slots.

        The noise, drawn once in training, moves experts, gates and the load loss. logits, probs and
        the importance loss are without noise. balance_loss is importance + load, with noise_std in
        evaluation, too. A dropped choice keeps its gate: `kept` says that it was dropped.
        """
        logits = self.router(tokens)  # (T, E)
        noisy = logits
        if self.training and self.noise_std > 0:
            noisy = logits + self.noise_std * torch.randn_like(logits)
        gates, experts = top_k_gates(noisy.softmax(-1), self.k)
        kept = torch.ones_like(experts, dtype=torch.bool)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is not None:
            capacity = expert_capacity(len(tokens), self.k, self.num_experts, factor)
            priority = gates[:, 0] if self.batch_priority else None  # for all choices of a token
            kept = assign_slots(experts, self.num_experts, capacity, priority)
        probs = logits.softmax(-1)  # the importance loss sees the scores without noise
        loss = importance_loss(probs) + load_loss(logits, noisy, self.k, self.noise_std)
        return Routing(logits, probs, experts, gates, kept, loss)


# ---------------------------------------------------------------- route: who goes where

class Router(nn.Module):
    """Score each token against each expert: x (T, D) -> logits (T, E).

    linear:  code_e . x                         the paper's choice
    cosine:  scale * cosine(P x, code_e)        Chi et al. 2022
    l2:      -scale * distance(P x, code_e)     the same with a distance

    Parameters: `codes`, a vector per expert; `proj`, the P, to D // 2 dimensions, at least 1 and at
    most 256; `log_scale`: its exp, the scale, starts at 2 and is capped at 100, as in Tutel.
    Example: x = (2, 1) and codes (1, 0) and (0, 3) give the linear logits 2 and 3.
    Logits are float32, or float64 for tokens in float64, also under autocast and for weights in
    bfloat16. Raise ValueError for another kind; name all kinds, and expert_choice and soft.
    Start: codes from N(0, 0.02^2) if linear, else N(0, 1 / their width); proj from N(0, 1 / D).
    """

    def __init__(self, dim, num_experts, kind="linear"):
        super().__init__()
        if kind not in ROUTERS:
            raise ValueError(f"router {kind!r}: expected {', '.join(ROUTERS)}, or by make_moe() "
                             f"expert_choice or soft")
        self.kind = kind
        if kind == "linear":  # small codes: at the start all probabilities are near 1/E
            self.codes = nn.Parameter(0.02 * torch.randn(num_experts, dim))
        else:
            proj_dim = max(1, min(256, dim // 2))
            self.proj = nn.Parameter(torch.randn(proj_dim, dim) / dim**0.5)
            self.codes = nn.Parameter(torch.randn(num_experts, proj_dim) / proj_dim**0.5)
            self.log_scale = nn.Parameter(torch.tensor(math.log(2.0)))

    def forward(self, x):
        # Not in bfloat16: its 8 bits would decide by rounding between nearly equal experts.
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            x, codes = x.to(dtype), self.codes.to(dtype)
            if self.kind == "linear":
                return F.linear(x, codes)  # (T, D) -> (T, E)
            z = F.linear(x, self.proj.to(dtype))  # (T, D) -> (T, proj_dim)
            scale = self.log_scale.to(dtype).clamp(max=math.log(100.0)).exp()
            if self.kind == "cosine":
                return scale * F.linear(F.normalize(z, dim=-1), F.normalize(codes, dim=-1))
            # cdist's default is less exact for many rows: scores would depend on the batch size.
            return -scale * torch.cdist(z, codes, compute_mode="donot_use_mm_for_euclid_dist")


def top_k_gates(probs, k):
    """Choose the k most probable experts: probs (T, E) -> gates, experts (T, K), best first.

    probs is a softmax over ALL experts. The gates are not divided by their sum (paper, section 3):
    with k = 1 the quotient would always be 1, and the loss could not teach the router.
    Example: probs (0.1, 0.5, 0.4) and k = 2 give gates (0.5, 0.4) and experts (1, 2).
    """
    return probs.topk(k, dim=-1)


def expert_capacity(num_tokens, k, num_experts, factor):
    """Return the slots per expert, C = ceil(T K factor / E), an int in 1 .. T.

    Round to 6 digits before rounding up: in floats 100 * 1.1 / 10 is 11.000000000000002, not 11.
    """
    slots = math.ceil(round(num_tokens * k * factor / num_experts, 6))
    return max(1, min(slots, num_tokens))


def assign_slots(experts, num_experts, capacity, priority=None):
    """Give out `capacity` slots per expert: experts (T, K), best first -> kept (T, K) bool.

    All first choices are served before any second choice. Within a rank, tokens come by position
    or, with priority (T,), by descending priority; ties go to the earlier token, so sort with
    stable=True. With the top-1 gate as priority this is Batch Prioritized Routing (Riquelme et al.
    2021, section 4). T may be 0.
    No value decides a shape or an `if`: a GPU would be waited for (as bincount does, or a loop).
    Example: capacity 2 and experts ((0, 1), (1, 0), (1, 0)) give kept ((1, 0), (1, 1), (1, 0)):
    the first choices fill expert 1; of the second, only token 1's finds a slot, at expert 0.
    """
    T, K = experts.shape
    served = torch.arange(T, device=experts.device)  # (T,) tokens in the order of service
    if priority is not None:
        served = priority.argsort(descending=True, stable=True)
    queue = experts[served].T.reshape(-1)  # (T, K) -> (K*T,) all first choices, then all second
    lines, order = queue.sort(stable=True)  # side by side, a line in front of each expert
    heads = torch.searchsorted(lines, lines)  # the first place of one's own line
    in_slots = torch.arange(len(lines), device=lines.device) - heads < capacity
    found = torch.empty_like(in_slots).index_copy_(0, order, in_slots)  # back in the queue
    return torch.empty_like(found).view(T, K).index_copy_(0, served, found.view(K, T).T)


def importance_loss(probs):
    """Return CV^2 of the experts' summed probabilities (Shazeer et al. 2017, equations 6, 7).

    probs (T, E): no noise in it. 0 if all sums are equal or T is 0, E - 1 if one expert gets all.
    In the worked example the sums 1.9 and 1.1 are both 0.4 from their mean: 0.4^2 / 1.5^2 = 0.071.
    """
    return cv_squared(probs.sum(0))


def load_loss(logits, noisy_logits, k, noise_std):
    """Return CV^2 of the tokens each expert can expect (Shazeer et al. 2017; V-MoE, appendix A).

    logits (T, E) are clean; noisy_logits (T, E) = logits + N(0, noise_std^2) made the choice.
    A count has no gradient. So ask: with new noise, how probably does expert e reach the top k of
    this token? V-MoE takes the k-th largest NOISY logit as threshold: the probability is
    1 - Phi((threshold - logit) / noise_std), Phi the normal distribution. Its sum over tokens is
    the load of e. Example: logit 1, threshold 2, noise_std 0.5: 1 - Phi(2) = 0.02.
    noise_std = 0 gives the plain count, and backward() a gradient of 0. Dropped choices count.
    No tokens give 0. NaN gives NaN and raises nothing: use torch.special.ndtr.
    """
    threshold = noisy_logits.topk(k, dim=-1).values[:, -1:]  # (T, 1)
    if noise_std > 0:
        reaches = torch.special.ndtr((logits - threshold) / noise_std)  # 1 - Phi(z) = Phi(-z)
    else:
        reaches = (logits >= threshold) + 0.0 * logits  # a zero gradient: backward() must work
    return cv_squared(reaches.sum(0))


def cv_squared(x):
    """Return the squared coefficient of variation of x (E,): population variance / mean^2.

    All 0 give 0. The gradient is finite, for no root is taken: that of a variance of 0 has none.
    """
    return x.var(correction=0) / x.mean().square().clamp(min=1e-30)  # no tokens: 0, not 0 / 0


def balance_loss(routings):
    """Return the SUM of the layers' balance losses, as V-MoE does: a scalar tensor, 0 for none."""
    return sum((routing.balance_loss for routing in routings), torch.tensor(0.0))


# ---------------------------------------------------------------- dispatch, experts, combine

def dispatch(tokens, experts, kept, num_experts):
    """Copy each token once per choice and sort the copies by expert.

    tokens (T, D), experts (T, K), kept (T, K) bool -> rows (R, D), counts (E,) int64, order (R,).
    Rows of expert 0 come first, dropped rows last. counts: rows per expert. order[r] = t * K + j
    says that row r is choice j of token t. Rows have the dtype of tokens. Rows of one expert keep
    the order of tokens. T may be 0. No value decides a shape or an `if`, as in assign_slots().
    """
    K = experts.shape[1]
    owner = experts.masked_fill(~kept, num_experts).flatten()  # (T, K) -> (R,), dropped: E
    owner, order = owner.sort(stable=True)
    first = torch.searchsorted(owner, torch.arange(num_experts + 1, device=owner.device))
    row = torch.arange(len(order), device=order.device)
    places = torch.empty_like(order).scatter_(0, order, row)  # copy i goes to row places[i]
    copies = tokens.unsqueeze(1).expand(-1, K, -1).flatten(0, 1)  # (T, D) -> (T, K, D) -> (R, D)
    return place_rows(copies, places), first.diff(), order  # first row of e + 1 - first of e


def place_rows(rows, places):
    """Move row i of rows (R, D) to places[i], where places (R,) is a permutation."""
    return torch.empty_like(rows).index_copy_(0, places, rows)  # indexing is slower backward


class MLP(nn.Sequential):
    """The MLP of a dense ViT or ConvNeXt block, and an expert: (..., D) -> (..., D)."""

    def __init__(self, dim, hidden):
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Experts(nn.ModuleList):
    """E MLPs: rows (R, D) sorted by expert, counts (E,) -> answers (R, D), in the MLPs' dtype.

    With counts (2, 1) rows 0 and 1 go through self[0], and row 2 through self[1]. Any rows behind
    these were dropped: their answer is exactly 0. Under autocast all answers are in its dtype.
    """

    def __init__(self, num_experts, dim, hidden):
        super().__init__(MLP(dim, hidden) for _ in range(num_experts))

    def forward(self, rows, counts):
        if (rows.is_cuda or torch.compiler.is_compiling()) and self.use_grouped_mm(rows):
            return self.grouped(rows, counts)
        return self.loop(rows, counts)

    @torch.compiler.disable  # its shapes depend on the data: compiled models call it as it is
    def loop(self, rows, counts):
        """Call each expert on its rows, even on 0: DDP needs a gradient of 0 there, not None."""
        counts = counts.tolist()  # the CPU waits for them
        *groups, dropped = rows.split([*counts, len(rows) - sum(counts)])  # a group per expert
        answers = [expert(group) for expert, group in zip(self, groups)]
        return torch.cat([*answers, torch.zeros_like(dropped, dtype=answers[0].dtype)])

    def grouped(self, rows, counts):
        """Call all experts in one kernel per linear layer, without a wait for the counts."""
        # grouped_mm leaves rows behind its last group unset, perhaps NaN, and 0 * NaN is NaN. So
        # the last expert takes the dropped rows in, and a mask makes them 0, backward too.
        dtype = compute_dtype(rows)
        parameters = zip(*(expert.parameters() for expert in self))
        w1, b1, w2, b2 = (torch.stack(each).to(dtype) for each in parameters)  # (E, H, D), (E, H)
        ends = counts.cumsum(0)  # (E,) the row behind each expert's last
        row = torch.arange(len(rows), device=rows.device).unsqueeze(1)  # (R, 1)
        member = ((row >= ends - counts) & (row < ends)).to(dtype)  # (R, E) 1: the expert's row
        groups = ends.to(torch.int32)
        groups[-1:] = len(rows)  # a slice: groups[-1] would copy from the CPU, and wait
        # The kernel has no bias. member @ b is the bias of each row, with a fast backward pass.
        hidden = F.grouped_mm(rows.to(dtype), w1.transpose(1, 2), offs=groups)  # (R, H)
        hidden = F.gelu(hidden.addmm_(member, b1))
        answers = F.grouped_mm(hidden, w2.transpose(1, 2), offs=groups)  # (R, D)
        return answers.addmm_(member, b2).masked_fill_(row >= ends[-1], 0)

    def use_grouped_mm(self, rows):
        """Return whether one kernel is better for rows (R, D) on a GPU, or compiled, than the loop.

        It needs bfloat16, D and H multiples of 8, and on a GPU capability 9 or 10: other GPUs loop.
        """
        hidden, dim = self[0][0].weight.shape
        half = compute_dtype(rows) == torch.bfloat16
        fits = not rows.is_cuda or torch.cuda.get_device_capability(rows.device)[0] in (9, 10)
        return half and fits and dim % 8 == hidden % 8 == 0


def compute_dtype(rows):
    """Return autocast's dtype where it is on (it does not know grouped_mm), else that of rows."""
    device = rows.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype


def combine(rows, weights, order):
    """Bring the answers back to their tokens and add them, weighted: y (T, D).

    rows (R, D) and order (R,) as dispatch() made them. weights (T, K): the gates, 0 if dropped.
    y has the wider dtype of both: rows in bfloat16 and weights in float32 give float32. T may be 0.
    This product is how a router learns. A choice has no gradient, but y has one by the gate: the
    answer. If more of an answer lowers the loss, the gradient step raises the gate, through the
    softmax: its expert's logit goes up, the others go down.
    """
    T, K = weights.shape
    answers = place_rows(rows, order).unflatten(0, (T, K))  # row r to choice order[r]: (T, K, D)
    return (answers * weights.unsqueeze(-1)).sum(1)


# ---------------------------------------------------------------- two other ways to route
# Both see one image at a time: a prediction never depends on its batch. Nothing is to balance.

class ExpertChoice(nn.Module):
    """Let experts choose their tokens (Zhou et al. 2022): x (B, ..., D) -> y, and a Routing.

    Of the N tokens of an image, each expert takes the C = ceil(N k / E) most probable for it. So a
    token meets k experts on average: perhaps several, perhaps none, and then its y is 0.
    Example: with the probs of the worked example C is 2. Expert 0 takes tokens 1 and 0, expert 1
    takes tokens 2 and 0. So token 0 gets 0.75 * 10 + 0.25 * 100.
    Only the router and the experts multiply matrices: take rows by index. B may be 0.
    In the Routing K is 1: a token's expert is the one with the largest gate of those that took it.
    If none did, it is the most probable expert, kept is False and its gate 0. balance_loss is 0.
    """

    def __init__(self, dim, hidden, num_experts, k):
        super().__init__()
        self.num_experts, self.k = num_experts, k
        self.router = Router(dim, num_experts)
        self.experts = Experts(num_experts, dim, hidden)

    def forward(self, x):
        tokens = x.flatten(1, -2)  # (B, ..., D) -> (B, N, D)
        B, N, D = tokens.shape
        logits = self.router(tokens)  # (B, N, E)
        probs = logits.softmax(-1)
        capacity = expert_capacity(N, self.k, self.num_experts, 1.0)
        gates, chosen = probs.topk(capacity, dim=1)  # (B, C, E)
        first = N * torch.arange(B, device=x.device).view(B, 1, 1)  # an image's place in B*N tokens
        places = (first + chosen).permute(2, 0, 1).flatten()  # (B, C, E) -> (E*B*C,)
        rows = tokens.flatten(0, 1).index_select(0, places)  # (E*B*C, D), expert by expert
        groups = rows.chunk(self.num_experts)  # E times (B*C, D)
        answers = torch.cat([expert(group) for expert, group in zip(self.experts, groups)])
        answers = answers * gates.permute(2, 0, 1).reshape(-1, 1)  # (B, C, E) -> (E*B*C, 1)
        y = answers.new_zeros(B * N, D).index_add(0, places, answers)

        taken = torch.zeros_like(probs).scatter(1, chosen, gates)  # (B, N, E) gates, or 0
        logits, probs, taken = (t.flatten(0, 1) for t in (logits, probs, taken))  # (T, E)
        kept = taken.amax(1, keepdim=True) > 0  # (T, 1)
        best = torch.where(kept, taken, probs).argmax(1, keepdim=True)
        routing = Routing(logits, probs, best, taken.gather(1, best), kept, probs.new_zeros(()))
        return y.to(x.dtype).reshape(x.shape), routing


class SoftMoE(nn.Module):
    """Let each expert answer S mixtures of an image's tokens: x (B, ..., D) -> y, and a Routing.

    Puigcerver et al. 2024, section 2, normalized as in 2.3. Each of the E * S slots has a code. A
    softmax over the tokens makes a slot, a weighted mean of the tokens. A softmax over the slots
    makes a token's y, a weighted mean of the answers. S = ceil(N k / E) costs as much as top k.
    In the Routing K is 1: probs are the experts' shares in a token's y, and the largest is chosen.
    Its logits, probs and gates are float32, and balance_loss is 0. B may be 0.
    """

    def __init__(self, dim, hidden, num_experts, slots):
        super().__init__()
        self.num_experts = num_experts
        self.codes = nn.Parameter(torch.randn(num_experts * slots, dim) / dim**0.5)  # (E*S, D)
        self.scale = nn.Parameter(torch.ones(()))
        self.experts = Experts(num_experts, dim, hidden)

    def forward(self, x):
        tokens = x.flatten(1, -2)  # (B, ..., D) -> (B, N, D)
        codes = self.scale * F.normalize(self.codes, dim=-1)
        scores = F.linear(F.normalize(tokens, dim=-1), codes)  # (B, N, E*S)
        mixtures = scores.softmax(1).transpose(1, 2) @ tokens  # (B, E*S, D)
        groups = mixtures.unflatten(1, (self.num_experts, -1)).unbind(1)  # E times (B, S, D)
        answers = torch.cat([expert(group) for expert, group in zip(self.experts, groups)], dim=1)
        y = scores.softmax(2) @ answers  # (B, N, E*S) @ (B, E*S, D) -> (B, N, D)

        # The softmax of these logits is the sum of the weights of an expert's slots.
        logits = scores.float().unflatten(2, (self.num_experts, -1)).logsumexp(3).flatten(0, 1)
        probs = logits.softmax(-1)  # (T, E)
        gates, best = top_k_gates(probs, 1)
        routing = Routing(logits, probs, best, gates, best >= 0, probs.new_zeros(()))  # all kept
        return y.to(x.dtype).reshape(x.shape), routing


def make_moe(dim, hidden, num_experts, k, router, tokens, **options):
    """Return the layer named by router: x (B, ..., D) -> y, Routing. options: more of MoE."""
    if not 1 <= k <= num_experts:
        raise ValueError(f"k = {k}: expected 1 to {num_experts}, the number of experts")
    if router == "expert_choice":
        return ExpertChoice(dim, hidden, num_experts, k)
    if router == "soft":
        return SoftMoE(dim, hidden, num_experts, expert_capacity(tokens, k, num_experts, 1.0))
    return MoE(dim, hidden, num_experts, k, router, **options)


def count_parameters(model):
    """Return (total, active) parameters, ints. Active: k of the E experts per MoE, and the rest."""
    total = active = sum(parameter.numel() for parameter in model.parameters())
    for layer in model.modules():
        if isinstance(layer, (MoE, ExpertChoice)):  # in a SoftMoE all experts meet all tokens
            expert = sum(parameter.numel() for parameter in layer.experts[0].parameters())
            active -= (layer.num_experts - layer.k) * expert
    return total, active


@torch.no_grad()
def count_flops(model, image_size, modules="^Global$"):
    """Return the multiply-adds of one image, an int: in all of a model, or in some of its modules.

    They are what the papers call FLOPs: products and convolutions alone, counted by torch in a pass
    of an empty image. It misses fused attention (hence MATH) and the distances of an L2 router.
    modules: a regular expression of names, such as "ViT.blocks.1.mlp$". All that match are added.
    """
    was_training = model.training
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    model.train(was_training)
    counts = counter.get_flop_counts().items()  # {name: {product: number}}
    return sum(sum(flops.values()) for name, flops in counts if re.search(modules, name)) // 2
