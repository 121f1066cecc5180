"""Mistakes that a student might make: one place of one function, and what becomes of it.

Below a function's name, a line per mistake: an expression, an arrow, and what replaces it (`pass`
replaces a statement). The expression is looked for in the function's syntax tree, so spaces, quotes
and line breaks do not matter. It must be there exactly once.
"""

import ast

from blanks import find
from concepts import CONCEPTS

TABLE = """
moe.Router.__init__
    0.02 * torch.randn(num_experts, dim) -> torch.randn(num_experts, dim)  # decided at the start
moe.Router.forward
    F.normalize(z, dim=-1) -> z  # a cosine of tokens of any length
    -scale -> scale  # the farthest expert wins
    self.log_scale.to(dtype).clamp(max=math.log(100.0)) -> self.log_scale.to(dtype)  # no bound
    torch.autocast(x.device.type, enabled=False) -> torch.autocast(x.device.type)
moe.top_k_gates
    probs.topk(k, dim=-1) -> (probs / probs.topk(k).values.sum(-1, True)).topk(k)  # renormalised
    probs.topk(k, dim=-1) -> probs.topk(k, dim=-1, largest=False)  # the worst
    probs -> probs.detach()  # a router that cannot learn
moe.cv_squared
    x.var(correction=0) -> x.var()  # divided by E - 1
    x.mean().square() -> x.mean()  # no factor E
moe.load_loss
    noisy_logits -> logits  # the threshold of the clean logits
    logits - threshold -> threshold - logits  # Phi, not 1 - Phi
    noisy_logits.topk(k, dim=-1).values[:, -1:] -> noisy_logits.topk(k, dim=-1).values[:, :1]
    (logits >= threshold) + 0.0 * logits -> (logits >= threshold).float()  # no gradient, not zero
moe.balance_loss
    routing.balance_loss -> routing.balance_loss / len(routings)  # a mean
moe.expert_capacity
    round(num_tokens * k * factor / num_experts, 6) -> num_tokens * k * factor / num_experts
    num_tokens * k -> num_tokens  # a token asks k times
moe.assign_slots
    experts[served].T -> experts[served]  # token by token, not by rank
    priority.argsort(descending=True, stable=True) -> priority.argsort(stable=True)
    torch.empty_like(found).view(T, K).index_copy_(0, served, found.view(K, T).T) ->
        found.view(K, T).T  # left in the order of the queue
moe.dispatch
    experts.masked_fill(~kept, num_experts) -> experts  # the counts include what is dropped
    owner.sort(stable=True) -> owner.sort(descending=True, stable=True)
    owner.sort(stable=True) -> owner.sort()  # the tokens of one expert in any order
moe.place_rows
    torch.empty_like(rows).index_copy_(0, places, rows) -> rows[places]  # the inverse
moe.combine
    answers * weights.unsqueeze(-1) -> answers  # the gate is not multiplied
    weights.unsqueeze(-1) -> weights.detach().unsqueeze(-1)
    place_rows(rows, order) -> rows  # not brought back
moe.Experts.__init__
    (MLP(dim, hidden) for _ in range(num_experts)) -> [MLP(dim, hidden)] * num_experts  # one MLP
moe.Experts.loop
    torch.zeros_like(dropped, dtype=answers[0].dtype) -> dropped.to(answers[0])  # passes through
    expert(group) -> expert(group) if len(group) else group  # an idle expert has no gradient
moe.MoE.__init__
    router_noise / num_experts -> router_noise
moe.MoE.route
    noisy.softmax(-1) -> probs  # the noise chooses nobody
    self.training and self.noise_std > 0 -> self.noise_std > 0  # noise in evaluation
    load_loss(logits, noisy, self.k, self.noise_std) ->
        load_loss(logits, noisy, self.k, self.noise_std * self.training)  # another in evaluation
    self.capacity_factor if self.training else self.eval_capacity_factor -> self.capacity_factor
    gates[:, 0] if self.batch_priority else None -> None  # always by position
vit.place_moe
    odd[-2:] -> odd[:2]
convnext.place_moe
    depths[-2] // 2 -> 0
vit.ViT.__init__
    drop_path * i / max(1, depth - 1) -> drop_path  # the same rate everywhere
convnext.ConvNeXt.__init__
    expert_ratio -> mlp_ratio
    kernel_size -> 7  # whatever was asked for
vit.Attention.forward
    (q, k, v) -> (k, v, q)
    y.transpose(1, 2) -> y  # heads mixed with tokens
vit.Block.forward
    x + self.drop_path(y) -> self.drop_path(y)  # no residual
vit.ViT.forward
    [class_token, x] -> [x, class_token]
convnext.Block.forward
    self.skip -> 0  # without the added skip
    self.gamma * y -> y  # without layer scale
    self.dwconv(x).permute(0, 2, 3, 1) -> self.dwconv(x).permute(0, 3, 2, 1)  # H and W swapped
moe.Experts.grouped
    answers.addmm_(member, b2).masked_fill_(row >= ends[-1], 0) ->
        answers.masked_fill_(row >= ends[-1], 0)  # no bias
    answers.addmm_(member, b2).masked_fill_(row >= ends[-1], 0) ->
        answers.addmm_(member, b2)  # dropped rows pass through the last expert
moe.count_parameters
    layer.k -> 1
moe.count_flops
    counter.get_flop_counts() -> {}  # nothing is counted
moe.ExpertChoice.forward
    answers * gates.permute(2, 0, 1).reshape(-1, 1) -> answers
    probs.topk -> logits.topk
    torch.where(kept, taken, probs) -> probs  # not who took it
moe.SoftMoE.forward
    scores.softmax(1) -> scores.softmax(2)
    F.normalize(tokens, dim=-1) -> tokens
train.experts_from_mlp
    layer.num_experts / layer.k -> 1.0  # copies only: the outputs shrink
vit.resize_positions
    [class_token, patches] -> [here[:, :1], patches]  # not the class token's own
eval.open_drawn
    torch.randint(-80, 81, images.shape, generator=random, dtype=torch.int32) -> 80
eval.draw_shapes
    order[:, :3] -> order[:, 1:4]  # other colours than those of the factors
eval.draw_flags
    torch.tensor(FLAG_PALETTE, dtype=torch.int32)[colours] ->
        torch.tensor(FLAG_PALETTE, dtype=torch.int32)[colours.flip(1)]  # upside down
eval.open_folder
    flat and split != 'all' and '' not in files -> flat and split != 'all'
eval.hold_out
    split == 'val' -> split != 'val'
    file[start:] -> file  # the class folder counts
eval.find_images
    HIDDEN.search(file[len(root):]) -> None  # what systems leave behind counts
eval.decode
    ImageOps.exif_transpose(image) -> image
    image.mode == 'F' or grey.min() < 0 or grey.max() > 255 -> False  # cut off
eval.FolderImages.__getitem__
    unreadable = index -> pass  # replaced in silence
eval.predict
    min(5, logits.shape[1]) -> 5
    logits.sigmoid() -> logits.softmax(1)
    whole[rank::len(parts)] -> whole[rank * len(part):(rank + 1) * len(part)]  # out of order
eval.count
    hits.any(1) -> hits  # two answers count twice
eval.mistakes
    t != b -> True  # what is right is a mistake, too
    100 * pairs[c, c] / n -> 100 * pairs[c, c] / len(true)
eval.eval_loader
    (range(len(dataset)) if indices is None else indices)[rank::world] ->
        range(len(dataset)) if indices is None else indices  # all count the same
eval.image_losses
    F.one_hot(answers + 1, logits.shape[1] + 1)[..., 1:] ->
        F.one_hot(answers + 1, logits.shape[1] + 1)[..., :-1]  # not the padding
eval.normalize
    -mean -> mean
eval.load_checkpoint
    raw or not checkpoint['ema'] -> True  # never the averaged ones
eval.read_checkpoint
    torch.load -> lambda path, **options: torch.load(path, weights_only=False)
eval.match_classes
    {name: int(name) for name in names if int(name) < len(classes)} ->
        {name: i for i, name in enumerate(names)}  # sorted 0, 1, 10
eval.match_dataset
    found.unique(return_inverse=True) -> (found, found.argsort())  # a class in two columns
eval.choose_split
    'val' if same else 'all' -> 'all'  # what was trained on counts, too
train.settle
    config.base_lr * fitting / config.base_batch -> config.base_lr
train.recipe_of
    FINE_TUNING.get(args.model, {}) if args.init_from else {} -> {}
train.update_ema
    min(decay, (1 + step) / (10 + step)) -> decay  # a short run ends near its start
train.parameter_groups
    13 - layer_group(name) -> layer_group(name)
train.classification_loss
    (1 - smoothing) * targets + smoothing / num_classes -> targets.float()
train.learning_rate
    config.lr * (step + 1) -> config.lr * step  # the first step does nothing
train.image_order
    order.view(steps, world, passes, -1)[:, rank] -> order.view(steps, world, passes, -1)[:, 0]
    seed_draws(config.seed, epoch) -> seed_draws(config.seed)  # the same order in every epoch
train.Augmented.__getitem__
    seed_draws(self.seed, epoch, index) -> seed_draws(self.seed, index)  # in every epoch alike
train.next_batch
    run.rank * run.config.accumulate + part -> part  # all mix alike
train.train
    total / config.accumulate -> total
train.Run.__init__
    config.batch_size // self.world // config.accumulate -> config.batch_size // self.world
train.check_and_agree
    losses.isfinite().all() & norm.isfinite() -> losses.isfinite().all()  # NaN weights
train.restore
    then != now -> False  # whatever was there is continued
inspect_experts.count_patches
    levels + 1 -> levels.clamp(min=0) + 1  # the background counts as level 0
inspect_experts.known_factors
    shares.argmax(0) -> shares.argmin(0)
inspect_experts.similarity
    2 * torch.stack(shared).double() -> torch.stack(shared).double()
inspect_experts.mutual_information
    min -> max
inspect_experts.store
    routing.experts[:, 0] -> routing.experts[:, -1]  # the last choice
inspect_experts.describe
    levels[others] -> levels  # as much by chance as measured
inspect_experts.panel
    escape(title) -> title
"""


def read_table():
    """Return the mistakes: a list of (concept, function, old, new), all str."""
    owner = {function: concept.name for concept in CONCEPTS
             for function in concept.functions.split()}
    mutants, function = [], None
    for line in TABLE.strip().replace("->\n", "->").splitlines():
        text = line.partition("  #")[0]
        if text.startswith(" "):
            old, new = text.split("->")
            mutants.append((owner[function], function, old.strip(), new.strip()))
        else:
            function = text
    return mutants


def replace(source, path, old, new):
    """Return the source of a file with one expression or statement of a function replaced.

    path: "function" or "Class.method". Raise ValueError unless old is there exactly once.
    """
    kind, mode = (ast.stmt, "exec") if new == "pass" else (ast.expr, "eval")
    wanted = ast.unparse(ast.parse(old, mode=mode))
    function, _ = find(source, path)
    found = [node for node in ast.walk(function)
             if isinstance(node, kind) and ast.unparse(node) == wanted]
    if len(found) != 1:
        raise ValueError(f"{old!r} is {len(found)} times in {path}: expected once")
    lines = source.encode().splitlines(keepends=True)  # the tree counts columns in bytes
    [node] = found
    start = sum(map(len, lines[:node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[:node.end_lineno - 1])) + node.end_col_offset
    text = b"".join(lines)
    replacement = new if new == "pass" else f"({new})"
    return (text[:start] + replacement.encode() + text[end:]).decode()
