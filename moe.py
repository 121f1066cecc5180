"""The sparse Mixture-of-Experts layer: a router, E expert MLPs, and the bookkeeping between them.

It replaces the MLP of a transformer or ConvNeXt block, as in "Mixture of Experts for Image Classification:
What's the Sweet Spot?" (Videau et al., TMLR 2025), which builds on V-MoE (Riquelme et al., 2021):

    y = sum over the K best experts e of  G(x)_e * MLP_e(x),     G(x) = softmax(router(x))

    from moe import MoE
    layer = MoE(dim=384, hidden=1536, num_experts=8, k=2)
    y, routing = layer(x)                                      # x (..., 384) -> y (..., 384)
    loss = cross_entropy + 0.005 * routing.balance_loss        # keeps every expert in work

Letters, the same in every file: B images, N tokens per image, T = B*N tokens, D width, H hidden width,
E experts, K experts per token, C slots per expert, R = T*K rows (one per token and choice).

Read it from top to bottom: pure functions of tensors first, then the modules that hold the parameters. The
question everybody asks, "how does the router learn if top-k has no gradient?", is answered by combine().
"""

import math
import time
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

ROUTERS = ("linear", "cosine", "l2")


class Routing(NamedTuple):
    """What one MoE layer decided for its T tokens. Returned by the layer, never stored in it."""

    logits: torch.Tensor  # (T, E) float32, without the training noise
    probs: torch.Tensor  # (T, E) float32, softmax of these clean logits
    experts: torch.Tensor  # (T, K) int64, the chosen experts, best first
    gates: torch.Tensor  # (T, K) float32, their probabilities (with the noise, while training); need not sum to 1
    kept: torch.Tensor  # (T, K) bool, False where the expert was full and the choice was dropped
    balance_loss: torch.Tensor  # scalar, importance + load


# ---------------------------------------------------------------- who goes where


def top_k_gates(probs, k):
    """Choose the k most probable experts of every token.

    probs (T, E): a softmax over ALL experts. Returns gates (T, K), the probabilities of the chosen experts, and
    experts (T, K) int64, best first. The gates are not renormalised (paper, section 3): with k = 1 a renormalised
    gate would always be 1, and the classification loss could never tell the router anything.
    """
    gates, experts = probs.topk(k, dim=-1)
    return gates, experts


def expert_capacity(num_tokens, k, num_experts, factor):
    """Slots per expert, C = ceil(T K factor / E), at least 1 and at most T (an int).

    T is num_tokens, K is k, E num_experts. factor 1.0 is just enough when the load is perfectly even; V-MoE trains at 1.05.
    Rounded to 6 digits before the ceil, for floats: 100 * 1.1 / 10 is 11.000000000000002, and must give 11 slots, not 12.
    """
    slots = math.ceil(round(num_tokens * k * factor / num_experts, 6))
    return max(1, min(slots, num_tokens))


def assign_slots(experts, num_experts, capacity, priority=None):
    """Fill the experts' slots and say which choices found one: kept (T, K) bool.

    experts (T, K): the choices among 0 .. num_experts - 1, best first. All first choices are served before any second
    choice. Within one rank tokens come in order of position or, with priority (T,), highest priority first: Batch
    Prioritized Routing (Riquelme et al. 2021, section 4) when the priority is the top-1 gate. Ties go to the earlier token.
    A choice is dropped when its expert has already given out `capacity` slots.
    """
    T, K = experts.shape
    order = torch.arange(T, device=experts.device)
    if priority is not None:
        order = priority.argsort(descending=True, stable=True)
    queue = experts[order].T.reshape(-1)  # (K T,) everybody's first choice, then everybody's second
    asked = (queue.unsqueeze(1) == torch.arange(num_experts, device=queue.device)).cumsum(0)  # (K T, E)
    place = asked.gather(1, queue.unsqueeze(1)).squeeze(1)  # (K T,) 1 for the first in line at that expert
    kept = torch.empty(T, K, dtype=torch.bool, device=experts.device)
    kept[order] = (place <= capacity).view(K, T).T  # back to the order of the tokens
    return kept


# ---------------------------------------------------------------- what it costs: the balance losses


def cv_squared(x):
    """Squared coefficient of variation of x (E,): var / mean^2, with the population variance (divide by E).

    No square root on the way: (std / mean)^2 is the same number, but where all experts are equal the derivative of the
    root is infinite and the gradient NaN, just when the router is perfect. 0, with a finite gradient, for E = 1.
    """
    return x.var(correction=0) / x.mean().square()


def importance_loss(probs):
    """CV^2 of each expert's total probability (Shazeer et al. 2017, equations 6 and 7).

    probs (T, E) from the CLEAN logits. Scalar: 0 when all experts get the same sum, E - 1 when one gets all.
    """
    return cv_squared(probs.sum(0))


def load_loss(logits, noisy_logits, k, noise_std):
    """CV^2 of the number of tokens each expert can expect (Shazeer et al. 2017, section 4; V-MoE, appendix A).

    logits (T, E) clean, noisy_logits (T, E) with the noise N(0, noise_std^2) that chose the k experts. Scalar, as
    above. Counting tokens has no gradient, but the router is noisy, so ask: if expert e's noise were drawn again, how
    likely is it that e reaches the token's top k? With thr = the token's k-th largest NOISY logit that is P(logit +
    noise >= thr) = 1 - Phi((thr - logit) / noise_std): threshold and score are both logits. Averaged over tokens, it is
    the load (E,); gradients flow through both. With noise_std = 0 the probability is 0 or 1, the plain count, whose gradient
    is zero, not missing. Dropped choices count too: a loss that only saw survivors would be blind to an overflowing expert.
    Far below every threshold Phi is flat: an expert that nobody chooses can be brought back by the importance loss only.
    """
    threshold = noisy_logits.topk(k, dim=-1).values[:, -1:]  # (T, 1)
    if noise_std == 0:
        reaches = (logits >= threshold).float() + 0.0 * logits  # 0 * logits: a zero gradient, not a missing one
    else:
        reaches = torch.special.ndtr((logits - threshold) / noise_std)  # ndtr is Phi, and 1 - Phi(z) = Phi(-z)
    return cv_squared(reaches.mean(0))


# ---------------------------------------------------------------- there and back again


def place_rows(rows, positions):
    """Move row i to positions[i]: rows (R, D) -> (R, D), for positions (R,) that are a permutation of 0 .. R-1.

    The same as rows[order] with the inverse permutation, but its backward pass is a plain gather. The backward of
    indexing adds up gradients with atomics on a GPU, which is slower and differs from run to run.
    """
    return torch.empty_like(rows).index_copy(0, positions, rows)


def dispatch(tokens, experts, kept, num_experts):
    """Copy each token once per choice and sort the copies by expert.

    tokens (T, D), experts (T, K), kept (T, K) -> rows (R, D), counts (E,) int64, order (R,) int64; E is num_experts.
    Rows come expert by expert, in the order of t * K + j within each, dropped choices last (they belong to no expert,
    so sum(counts) may be less than R).
    order[r] = t * K + j says that row r is choice j of token t. All shapes are known beforehand: nothing waits for a
    GPU to report how many tokens chose an expert.
    """
    T, K = experts.shape
    owner = experts.masked_fill(~kept, num_experts).reshape(-1)  # (R,) the dropped sort behind the last expert
    order = owner.argsort(stable=True)
    positions = torch.empty_like(order).scatter(0, order, torch.arange(T * K, device=order.device))  # its inverse
    copies = tokens.unsqueeze(1).expand(-1, K, -1).reshape(T * K, -1)  # (T, D) -> (T, K, D) -> (R, D)
    counts = (owner.unsqueeze(1) == torch.arange(num_experts, device=owner.device)).sum(0)
    return place_rows(copies, positions), counts, order


def combine(rows, weights, order):
    """Bring the experts' answers back to their tokens and add them up, weighted: y (T, D).

    rows (R, D) and order (R,) as dispatch() made them; weights (T, K): the gate of each choice, 0 where dropped.
    This product is how a router learns: top-k has no gradient, but dy/d(gate) = the expert's answer, and the gate is
    a softmax over all experts, so an expert that helps raises its own logit and lowers those of the others.
    """
    T, K = weights.shape
    answers = place_rows(rows, order).view(T, K, -1)  # (R, D) -> (T, K, D)
    return (answers * weights.unsqueeze(-1)).sum(1)


# ---------------------------------------------------------------- the modules


class MLP(nn.Sequential):
    """The dense MLP of a ViT or ConvNeXt block, (..., D) -> (..., D). Each expert is one of these."""

    def __init__(self, dim, hidden):
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Router(nn.Module):
    """Score every token against every expert: x (T, D) -> logits (T, E), in float32 even under autocast or for bfloat16
    tokens and parameters; float64 tokens get float64 logits.

    kind    logits                            as in
    linear  code_e . x                        the paper's "Conv" gate (a 1x1 convolution), and the one that wins there
    cosine  s * cos(P x, code_e)              Chi et al. 2022: P projects to a low dimension, one learned code per expert
    l2      -s * |P x - code_e|               the same with distances

    s = exp(log_scale) is a learned inverse temperature, starting at 2 and bounded by 100 as in Tutel.
    dim is D, num_experts E; proj_dim is the width of P x: half of D rounded down, but at least 1 and at most 256.
    Parameters: codes (E, D), from N(0, 0.02^2); for cosine and l2 codes (E, proj_dim) and proj (proj_dim, D), the P, both
    from N(0, 1 / inputs), and log_scale. ValueError for another kind: it and "expected one of linear, cosine, l2".
    """

    def __init__(self, dim, num_experts, kind="linear", proj_dim=None):
        super().__init__()
        if kind not in ROUTERS:
            raise ValueError(f"unknown router {kind!r}: expected one of {', '.join(ROUTERS)}")
        self.kind = kind
        if kind == "linear":
            self.codes = nn.Parameter(torch.randn(num_experts, dim) * 0.02)  # at the start all probabilities are near 1/E
        else:
            proj_dim = proj_dim or max(1, min(256, dim // 2))
            self.proj = nn.Parameter(torch.randn(proj_dim, dim) * dim ** -0.5)
            self.codes = nn.Parameter(torch.randn(num_experts, proj_dim) * proj_dim ** -0.5)
            self.log_scale = nn.Parameter(torch.tensor(math.log(2.0)))

    def forward(self, x):
        # Autocast must be off, not only the input float32: it would cast the matrix product back to bfloat16, and
        # with 8 bits of mantissa near ties among experts are decided by rounding.
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            x, codes = x.to(dtype), self.codes.to(dtype)
            if self.kind == "linear":
                return F.linear(x, codes)
            scale = self.log_scale.to(dtype).clamp(max=math.log(100.0)).exp()
            z = F.linear(x, self.proj.to(dtype))  # (T, P)
            if self.kind == "cosine":
                return scale * F.linear(F.normalize(z, dim=-1), F.normalize(codes, dim=-1))
            # The default mode takes a less exact formula for large batches: scores would depend on the batch's size.
            return -scale * torch.cdist(z, codes, compute_mode="donot_use_mm_for_euclid_dist")


class Experts(nn.Module):
    """E independent MLPs, Linear - GELU - Linear, with stacked weights.

    forward(rows (R, D) sorted by expert, counts (E,)) -> (R, D): the first counts[0] rows go through expert 0, the
    next counts[1] through expert 1, and so on. Rows beyond sum(counts) belong to nobody and come out as exactly 0.

    Stacked, because then every expert is part of the graph at every step: an expert without tokens gets a zero
    gradient instead of none, and no process of a DDP group waits for it. The price: Adam's momentum and weight decay
    go on moving an idle expert.
    """

    def __init__(self, num_experts, dim, hidden):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.b1 = nn.Parameter(torch.empty(num_experts, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.b2 = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self):
        """Uniform in +-1/sqrt(inputs), as nn.Linear, zero bias. Each expert has its own draw (V-MoE: all the same)."""
        for weight in (self.w1, self.w2):
            nn.init.uniform_(weight, -weight.shape[1] ** -0.5, weight.shape[1] ** -0.5)
        for bias in (self.b1, self.b2):
            nn.init.zeros_(bias)

    def forward(self, rows, counts):
        run = grouped_experts if use_grouped_mm(rows, self.w1) else loop_experts
        return run(rows, counts, self.w1, self.b1, self.w2, self.b2)


def use_grouped_mm(rows, w1):
    """Which of the two ways to run the experts on rows (R, D) with w1 (E, D, H): True for one kernel, False for the loop.

    On a CPU the loop is the faster one (python moe.py prints both). On a GPU it would wait for the counts to reach the
    host and start 2E small kernels, and torch.compile cannot trace a loop whose shapes depend on the data. The kernel
    does not know float64 and wants both widths to be multiples of 16 bytes.
    """
    dtype = compute_dtype(rows)
    possible = dtype != torch.float64 and all(width * dtype.itemsize % 16 == 0 for width in w1.shape[1:])
    return possible and (rows.is_cuda or torch.compiler.is_compiling())


def compute_dtype(rows):
    """Autocast's type where it is on (it does not know grouped_mm, so we cast by hand), else that of the rows (R, D)."""
    device = rows.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype


def loop_experts(rows, counts, w1, b1, w2, b2):
    """The experts one after the other: rows (R, D) and counts (E,) as in Experts.forward -> (R, D).

    w1 (E, D, H), b1 (E, H), w2 (E, H, D), b2 (E, D). The exact GELU; rows beyond sum(counts) come out as 0.
    """
    counts = counts.tolist()
    *groups, dropped = rows.split(counts + [len(rows) - sum(counts)])
    answers = []
    # unbind, not w1[e]: in the backward pass each w1[e] would fill a zero tensor as large as all experts together.
    for group, v1, c1, v2, c2 in zip(groups, w1.unbind(0), b1.unbind(0), w2.unbind(0), b2.unbind(0)):
        hidden = F.gelu(torch.addmm(c1, group, v1))  # (counts[e], H)
        answers.append(torch.addmm(c2, hidden, v2))  # (counts[e], D)
    return torch.cat(answers + [torch.zeros_like(dropped, dtype=answers[0].dtype)])


def grouped_experts(rows, counts, w1, b1, w2, b2):
    """All experts in one kernel per linear layer, without asking the GPU for the counts.

    Arguments and result as loop_experts: rows (R, D), counts (E,), w1, b1, w2, b2 -> (R, D).
    The kernel leaves rows behind the last group unset (whatever was in memory, even NaN), in its output and in the
    gradient of its input. So there are none: the last group takes the ownerless rows along, and the mask at the end makes
    them 0, forward and backward.
    """
    R, dtype = len(rows), compute_dtype(rows)
    ends = counts.cumsum(0)  # (E,) the row behind each expert's last
    row = torch.arange(R, device=rows.device).unsqueeze(1)  # (R, 1)
    member = ((row < ends) & (row >= ends - counts)).to(dtype)  # (R, E) one-hot: whose row it is
    groups = ends.index_fill(0, torch.tensor([len(ends) - 1], device=rows.device), R).to(torch.int32)
    rows, w1, b1, w2, b2 = (x.to(dtype) for x in (rows, w1, b1, w2, b2))
    # The kernel has no bias yet. member @ b adds the right one to each row, and its backward is a plain matrix product.
    hidden = F.gelu(torch.addmm(F.grouped_mm(rows, w1, offs=groups), member, b1))  # (R, H)
    answers = torch.addmm(F.grouped_mm(hidden, w2, offs=groups), member, b2)  # (R, D)
    return torch.where(row < ends[-1], answers, 0)


class MoE(nn.Module):
    """The sparse layer: x (..., D) -> (y (..., D), Routing). Put it where a block has its MLP, inside the residual.

    dim is D, hidden H; num_experts E, of which each token meets k; router: a kind of Router. y has the dtype of x.
    Attributes: router, experts (the modules), num_experts, k, capacity_factor, eval_capacity_factor, noise_std.
    capacity_factor: None keeps every choice; a number limits each expert to expert_capacity() slots while training,
        served in order of the top-1 gate if batch_priority (else by position).
    eval_capacity_factor: the same for evaluation. None by default, because with a limit the prediction for one image
        depends on the other images of its batch.
    router_noise: while training, N(0, (router_noise / E)^2) is added to the logits before the choice (V-MoE); 0 is off.
    Raises ValueError if k is not between 1 and num_experts ("k must be 1 to 4"), for a factor of 0 or less, and for
    negative noise; the message has the wrong number.
    """

    def __init__(self, dim, hidden, num_experts, k, router="linear", capacity_factor=None,
                 eval_capacity_factor=None, batch_priority=True, router_noise=1.0):
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(f"k = {k} experts per token, but the layer has {num_experts}: k must be 1 to {num_experts}")
        factors = [factor for factor in (capacity_factor, eval_capacity_factor) if factor is not None]
        if min(factors, default=1) <= 0 or router_noise < 0:
            raise ValueError(f"capacity factors {capacity_factor} and {eval_capacity_factor} must be above 0 (or None), "
                             f"router noise {router_noise} at least 0")
        self.num_experts, self.k = num_experts, k
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.batch_priority = batch_priority
        self.noise_std = router_noise / num_experts
        self.router = Router(dim, num_experts, router)
        self.experts = Experts(num_experts, dim, hidden)

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])  # (..., D) -> (T, D)
        routing = self.route(tokens)  # who goes where, with what weight, at what cost
        rows, counts, order = dispatch(tokens, routing.experts, routing.kept, self.num_experts)  # (R, D) by expert
        rows = self.experts(rows, counts)  # each expert sees its own rows only
        y = combine(rows, routing.gates * routing.kept, order)  # (T, D), a dropped choice adds exactly 0
        return y.to(x.dtype).reshape(x.shape), routing

    def route(self, tokens):
        """Decide for tokens (T, D): scores, noise (while training), choice, slots, balance losses. Returns a Routing, whose
        gates are those before dropping. The load loss takes noise_std in evaluation, too, with the clean logits as noisy ones.
        """
        logits = self.router(tokens)  # (T, E)
        probs = logits.softmax(-1)
        noisy = logits
        if self.training and self.noise_std > 0:
            noisy = logits + self.noise_std * torch.randn_like(logits)
        gates, experts = top_k_gates(noisy.softmax(-1), self.k)  # noise moves the choice and its weight, not the loss
        kept = self.assign(gates, experts)
        balance_loss = importance_loss(probs) + load_loss(logits, noisy, self.k, self.noise_std)
        return Routing(logits, probs, experts, gates, kept, balance_loss)

    def assign(self, gates, experts):
        """kept (T, K) bool under the capacity that holds now, for gates and experts (T, K); all True without one."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None:
            return torch.ones_like(experts, dtype=torch.bool)
        capacity = expert_capacity(len(experts), self.k, self.num_experts, factor)
        return assign_slots(experts, self.num_experts, capacity, gates[:, 0] if self.batch_priority else None)

    def multiply_adds(self, x):
        """For count_flops(): each token of x (..., D) meets the router and k experts."""
        router = sum(weight.numel() for weight in self.router.parameters() if weight.ndim == 2)
        expert = self.experts.w1[0].numel() + self.experts.w2[0].numel()
        return x.numel() // x.shape[-1] * (router + self.k * expert)


# ---------------------------------------------------------------- around the layer


def count_parameters(model):
    """(total, active) parameters of a model, ints: a token uses k of the E experts of each MoE layer, and all the rest."""
    total = sum(p.numel() for p in model.parameters())
    idle = sum(sum(p.numel() for p in layer.experts.parameters()) * (layer.num_experts - layer.k) // layer.num_experts
               for layer in model.modules() if isinstance(layer, MoE))
    return total, total - idle


@torch.no_grad()
def count_flops(model, image_size):
    """Multiply-adds (an int) of one image (3, S, S), S = image_size, through the model in evaluation: the papers' "FLOPs".

    Counted by hooks: linear layers and convolutions by their output, attention and MoE by their method multiply_adds();
    norms, activations and additions are left out, as is usual. (torch's FlopCounterMode sees 0 in grouped_mm.) MoE
    layers are not run: so a model on torch's meta device can be counted, which needs neither weights nor time.
    """
    total, was_training = 0, model.training

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            total += output.numel() * module.weight[0].numel()
        elif hasattr(module, "multiply_adds"):
            total += module.multiply_adds(*inputs)

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for layer in layers:
        layer.forward = lambda x: (x, None)
    try:
        model.eval()(torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device))
    finally:  # leave the model as it was
        model.train(was_training)
        for layer in layers:
            del layer.forward
        for hook in hooks:
            hook.remove()
    return total


def mean_balance_loss(routings):
    """Mean of the layers' balance losses, so that its weight means the same at any number of MoE layers; 0 if none.

    routings: a list with one Routing per MoE layer. Returns a scalar tensor, also for an empty list.

    Under DDP each process computes it from its own tokens and DDP averages the gradients: the mean of local losses,
    not the loss of the global batch. A local loss asks each process's share of the batch to be balanced.
    """
    return torch.stack([r.balance_loss for r in routings]).mean() if routings else torch.tensor(0.0)


@torch.no_grad()
def upcycle(state_dict, model, exact=True):
    """Load the state_dict of a model of the same backbone, dense or sparse: a list of the names that were left fresh.

    Where the weights have an MLP and the model a MoE, every expert becomes this MLP. The kept gates sum to less than 1,
    so copies alone would shrink the layer's output. With exact=True the sparse model computes the dense function at the
    start (in evaluation, without a capacity limit): equal router codes give every expert the gate 1/E, K of them sum to
    K/E, and w2 and b2 are multiplied by E/K. The router noise then breaks the tie, so leave it on. The skip that a sparse
    ConvNeXt block adds is switched off for good (its buffer `skip` becomes 0), as a dense block has none. exact=False only
    copies: random router, w2 and b2 as they are, skip on.
    A head for another number of classes stays fresh. ValueError names the first tensor that does not fit otherwise.
    """
    state, own = dict(state_dict), model.state_dict()
    fresh = [name for name in ("head.weight", "head.bias") if name in state and state[name].shape != own[name].shape]
    state |= {name: own[name] for name in fresh}
    for name, layer in model.named_modules():
        if isinstance(layer, MoE) and f"{name}.0.weight" in state:
            w1, b1, w2, b2 = (state.pop(f"{name}.{leaf}") for leaf in ("0.weight", "0.bias", "2.weight", "2.bias"))
            if w1.T.shape != layer.experts.w1.shape[1:]:
                raise ValueError(f"{name}: the weights have an MLP {tuple(w1.T.shape)}, the model experts "
                                 f"{tuple(layer.experts.w1.shape[1:])}: they must be of the same size to upcycle")
            scale = layer.num_experts / layer.k if exact else 1.0
            for stacked, dense in zip(layer.experts.parameters(), (w1.T, b1, scale * w2.T, scale * b2)):
                stacked.copy_(dense)  # the same for all E
            if exact:
                layer.router.codes.copy_(layer.router.codes[0].clone())
            state |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
            skip = name.removesuffix("mlp") + "skip"
            state |= {skip: own[skip] * (not exact)} if skip in own else {}
    for name in sorted(own.keys() | state.keys()):
        there, here = (tuple(tensors[name].shape) if name in tensors else "missing" for tensors in (state, own))
        if there != here:
            raise ValueError(f"the weights do not fit the model: {name} is {there} in the weights, {here} in the model")
    model.load_state_dict(state)
    return fresh


# ---------------------------------------------------------------- python moe.py: what does sparse cost?


def compare(tokens, dim, hidden, num_experts, k, device, rounds):
    """Time a dense MLP on tokens * k rows, and the whole layer with either path, forward + backward.

    Returns (median seconds {"dense": s, "loop": s, "grouped_mm": s}, largest difference between the two paths' outputs).
    """
    layer, dense = MoE(dim, hidden, num_experts, k).to(device), MLP(dim, hidden).to(device)
    nn.init.normal_(layer.experts.b1), nn.init.normal_(layer.experts.b2)  # or a wrong bias would not show
    x, rows = (torch.randn(n, dim, device=device, requires_grad=True) for n in (tokens, tokens * k))
    paths = {"loop": loop_experts, "grouped_mm": grouped_experts}
    seconds, outputs = {"dense": [], "loop": [], "grouped_mm": []}, {}
    for name in list(seconds) * (rounds + 1):  # in turn, so that all meet the same moods of the machine
        for tensor in (x, rows, *layer.parameters(), *dense.parameters()):
            tensor.grad = None
        if name in paths:
            layer.experts.forward = lambda rows, counts: paths[name](rows, counts, *layer.experts.parameters())
        torch.manual_seed(0)  # the same router noise for both paths
        start = clock(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            y, routing = layer(x) if name in paths else (dense(rows), None)
        loss = y.float().square().mean() + (0.005 * routing.balance_loss if routing else 0)
        loss.backward()
        seconds[name].append(clock(device) - start)
        outputs[name] = y.detach()
    medians = {name: sorted(times[1:])[rounds // 2] for name, times in seconds.items()}  # the first is a warm-up
    return medians, (outputs["loop"] - outputs["grouped_mm"]).abs().max().item()


def clock(device):
    """Seconds, read when the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    device, rounds, times = ("cuda", 31, 8) if torch.cuda.is_available() else ("cpu", 11, 1)
    print(f"Forward + backward in ms, median of {rounds} interleaved runs on {device}, torch {torch.__version__}; ratios to "
          f"dense.\nBy itself the layer takes the {'grouped_mm' if device == 'cuda' else 'loop'} path here.\n\n"
          f"{'':<58}{'dense':>7}{'loop':>8}{'ratio':>7}{'grouped_mm':>12}{'ratio':>7}{'difference':>12}")
    for name, T, D, H, E, K in (("ViT-S", 6272, 384, 1536, 8, 2), ("ViT-S", 6272, 384, 1536, 16, 1),
                                ("ConvNeXt-T stage 4", 1568, 768, 3072, 4, 1)):
        ms, difference = compare(times * T, D, H, E, K, device, rounds)
        dense, loop, grouped = (1e3 * ms[path] for path in ("dense", "loop", "grouped_mm"))
        print(f"{f'{name}: {times * T} tokens, {D} -> {H}, E {E}, k {K}':<58}{dense:>7.1f}{loop:>8.1f}{loop / dense:>7.2f}"
              f"{grouped:>12.1f}{grouped / dense:>7.2f}{difference:>12.1e}")
