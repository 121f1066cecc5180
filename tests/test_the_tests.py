"""Do the tests notice? One line of the project is broken at a time, and one concept at a time is
left unwritten.

Each runs the concerned tests in a copy of the project, in a process forked from a server that has
PyTorch loaded already. That no test calls what its concept does not need is checked in every run of
the tests, by needs.py."""

import ast
import concurrent.futures
import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

import forked
import make_assignment
from concepts import BY_NAME, CONCEPTS, all_needs
from make_assignment import ROOT, copy_project, find

WRITTEN = [concept.name for concept in CONCEPTS if concept.functions]

# File, what stands there, what a mistaken student might write, and the concept that must notice.
MUTANTS = [
    (
        "moe.py",
        "F.linear(F.normalize(z, dim=-1)",
        "F.linear(z",
        "router",
    ),  # cosine of tokens of any length
    (
        "moe.py",
        "return -scale * torch.cdist",
        "return scale * torch.cdist",
        "router",
    ),  # the farthest expert wins
    ("moe.py", ".clamp(max=math.log(100.0)).exp()", ".exp()", "router"),  # no bound
    (
        "moe.py",
        "with torch.autocast(x.device.type, enabled=False)",
        "with torch.autocast(x.device.type)",
        "router",
    ),
    (
        "moe.py",
        "0.02 * torch.randn(num_experts, dim)",
        "torch.randn(num_experts, dim)",
        "router",
    ),  # decided at the start
    (
        "moe.py",
        "0.02 * torch.randn(num_experts, dim)",
        "torch.zeros(num_experts, dim)",
        "router",
    ),  # all tokens to one
    (
        "moe.py",
        "torch.promote_types(x.dtype, torch.float32)",
        "torch.promote_types(x.dtype, self.codes.dtype)",
        "router",
    ),
    (
        "moe.py",
        'compute_mode="donot_use_mm_for_euclid_dist"',
        "",
        "router",
    ),  # scores depend on the batch's size
    (
        "moe.py",
        "return probs.topk(k, dim=-1)",
        "best = probs.topk(k, dim=-1); return best[0] / best[0].sum(-1, keepdim=True), best[1]",
        "top_k",
    ),  # renormalised
    (
        "moe.py",
        "probs.topk(k, dim=-1)",
        "probs.topk(k, dim=-1, largest=False)",
        "top_k",
    ),  # the worst
    (
        "moe.py",
        "probs.topk(k, dim=-1)",
        "probs.detach().topk(k, dim=-1)",
        "top_k",
    ),  # a router that cannot learn
    ("moe.py", "x.var(correction=0)", "x.var()", "balance"),  # divided by E - 1
    ("moe.py", "x.mean().square()", "x.mean()", "balance"),  # no factor E
    (
        "moe.py",
        "noisy_logits.topk(k, dim=-1)",
        "logits.topk(k, dim=-1)",
        "balance",
    ),  # threshold from the clean logits
    (
        "moe.py",
        "ndtr((logits - threshold)",
        "ndtr((threshold - logits)",
        "balance",
    ),  # Phi, not 1 - Phi
    ("moe.py", ".values[:, -1:]", ".values[:, :1]", "balance"),  # the largest, not the k-th largest
    (
        "moe.py",
        "(logits >= threshold) + 0.0 * logits",
        "(logits >= threshold).float()",
        "balance",
    ),  # a missing gradient instead of a zero one
    (
        "moe.py",
        "(routing.balance_loss for routing",
        "(routing.balance_loss.detach() for routing",
        "balance",
    ),
    (
        "moe.py",
        "torch.tensor(0.0))",
        "torch.tensor(0.0)) / max(1, len(routings))",
        "balance",
    ),  # mean
    ("moe.py", ".square().clamp(min=1e-30)", ".square()", "balance"),  # NaN without tokens
    (
        "moe.py",
        "values[:, -1:]  # (T, 1)",
        "values[:, -1:].detach()",
        "balance",
    ),  # the threshold is a logit, too
    (
        "moe.py",
        "round(num_tokens * k * factor / num_experts, 6)",
        "num_tokens * k * factor / num_experts",
        "capacity",
    ),
    (
        "moe.py",
        "num_tokens * k * factor",
        "num_tokens * factor",
        "capacity",
    ),  # a token asks k times
    ("moe.py", "(place <= capacity)", "(place < capacity)", "capacity"),  # one slot too few
    (
        "moe.py",
        "experts[served].T.reshape(-1)",
        "experts[served].reshape(-1)",
        "capacity",
    ),  # token by token, not by rank
    (
        "moe.py",
        "priority.argsort(descending=True, stable=True)",
        "priority.argsort(stable=True)",
        "capacity",
    ),
    ("moe.py", "kept[served] = ", "kept[:] = ", "capacity"),  # left in the order of the queue
    (
        "moe.py",
        "experts.masked_fill(~kept, num_experts)",
        "experts",
        "dispatch",
    ),  # counts include the dropped
    (
        "moe.py",
        "torch.empty_like(rows).index_copy_(0, places, rows)",
        "rows[places]",
        "dispatch",
    ),  # the inverse
    (
        "moe.py",
        "owner.argsort(stable=True)",
        "owner.argsort(descending=True, stable=True)",
        "dispatch",
    ),
    (
        "moe.py",
        "owner.argsort(stable=True)",
        "owner.argsort()",
        "dispatch",
    ),  # tokens of one expert in any order
    (
        "moe.py",
        "(answers * weights.unsqueeze(-1)).sum(1)",
        "answers.sum(1)",
        "combine",
    ),  # the gate is not multiplied
    (
        "moe.py",
        "answers * weights.unsqueeze(-1)",
        "answers * weights.detach().unsqueeze(-1)",
        "combine",
    ),
    (
        "moe.py",
        "place_rows(rows, order).unflatten",
        "rows.unflatten",
        "combine",
    ),  # not brought back
    (
        "moe.py",
        "MLP(dim, hidden) for _ in range(num_experts)",
        "[MLP(dim, hidden)] * num_experts",
        "experts",
    ),  # E times the same MLP
    (
        "moe.py",
        "torch.zeros_like(dropped, dtype=answers[0].dtype)",
        "dropped.to(answers[0])",
        "experts",
    ),  # a dropped row passes through
    (
        "moe.py",
        "torch.zeros_like(dropped, dtype=answers[0].dtype)",
        "torch.zeros_like(dropped)",
        "experts",
    ),  # float32 under autocast
    (
        "moe.py",
        "for expert, group in zip(self, groups)]",
        "for expert, group in zip(self, groups) if len(group)]",
        "experts",
    ),  # idle: no gradient
    (
        "moe.py",
        "top_k_gates(noisy.softmax(-1), self.k)",
        "top_k_gates(probs, self.k)",
        "layer",
    ),  # the noise chooses nobody
    (
        "moe.py",
        "if self.training and self.noise_std > 0",
        "if self.noise_std > 0",
        "layer",
    ),  # noise in evaluation
    ("moe.py", "router_noise / num_experts", "router_noise", "layer"),
    ("moe.py", "factor is not None and factor <= 0", "factor is not None and factor < 0", "layer"),
    (
        "moe.py",
        "self.capacity_factor if self.training else self.eval_capacity_factor",
        "self.capacity_factor",
        "layer",
    ),
    (
        "moe.py",
        "gates[:, 0] if self.batch_priority else None",
        "None",
        "layer",
    ),  # by position, always
    (
        "moe.py",
        "if self.batch_priority else None",
        "if self.batch_priority and self.training else None",
        "layer",
    ),
    (
        "moe.py",
        "Routing(logits, probs, experts, gates, kept",
        "Routing(logits, probs, experts, gates * kept, kept",
        "layer",
    ),
    (
        "moe.py",
        "load_loss(logits, noisy, self.k, self.noise_std)",
        "load_loss(logits, noisy, self.k, self.noise_std * self.training)",
        "layer",
    ),  # another loss in evaluation
    (
        "moe.py",
        "importance_loss(probs) + load_loss",
        "importance_loss(noisy.softmax(-1)) + load_loss",
        "layer",
    ),
    ("vit.py", '"last2": odd[-2:]', '"last2": odd[:2]', "placement"),
    ("convnext.py", "stages[-2][depths[-2] // 2]", "stages[-2][0]", "placement"),
    (
        "vit.py",
        "drop_path * i / max(1, depth - 1)",
        "drop_path",
        "building",
    ),  # the same rate everywhere
    (
        "convnext.py",
        "hidden, tokens = int(expert_ratio * dim)",
        "hidden, tokens = int(mlp_ratio * dim)",
        "building",
    ),
    ("vit.py", "q, k, v = qkv", "k, v, q = qkv", "vit"),
    (
        "vit.py",
        "y.transpose(1, 2).reshape(B, N, D)",
        "y.reshape(B, N, D)",
        "vit",
    ),  # heads mixed with tokens
    (
        "vit.py",
        "return x + self.drop_path(y), routing",
        "return self.drop_path(y), routing",
        "vit",
    ),  # no residual
    ("vit.py", "[class_token, x]", "[x, class_token]", "vit"),
    ("convnext.py", "y = self.skip * h + y", "y = 0 * h + y", "convnext"),  # without the added skip
    ("convnext.py", "y = self.gamma * y", "pass", "convnext"),  # without layer scale
    (
        "convnext.py",
        "self.dwconv(x).permute(0, 2, 3, 1)",
        "self.dwconv(x).permute(0, 3, 2, 1)",
        "convnext",
    ),  # H and W swapped
    ("convnext.py", "x + self.drop_path(y.permute", "x + (y.permute", "convnext"),
    (
        "moe.py",
        "torch.where(row < ends[-1], torch.addmm(answers, member, b2), 0)",
        "torch.addmm(answers, member, b2)",
        "grouped",
    ),  # dropped rows pass through the last expert
    (
        "moe.py",
        "torch.where(row < ends[-1], torch.addmm(answers, member, b2), 0)",
        "torch.where(row < ends[-1], answers, 0)",
        "grouped",
    ),  # no bias
    (
        "moe.py",
        "(layer.num_experts - layer.k) * expert",
        "(layer.num_experts - 1) * expert",
        "costs",
    ),  # as if k were 1
    ("eval.py", "for e in range(layer.k)]", "for e in range(layer.num_experts)]", "costs"),
    (
        "moe.py",
        "answers * gates.permute(2, 0, 1).reshape(-1, 1)",
        "answers",
        "expert_choice",
    ),
    ("moe.py", "gates, chosen = probs.topk(", "gates, chosen = logits.topk(", "expert_choice"),
    ("moe.py", "torch.where(kept, taken, probs)", "probs", "expert_choice"),  # not who took it
    ("moe.py", "scores.softmax(1).transpose", "scores.softmax(2).transpose", "soft"),
    ("moe.py", "y = scores.softmax(2) @ answers", "y = scores.softmax(1) @ answers", "soft"),
    ("moe.py", "F.normalize(tokens, dim=-1), codes", "tokens, codes", "soft"),
    (
        "train.py",
        "layer.num_experts / layer.k if exact",
        "1.0 if exact",
        "weights",
    ),  # copies only: outputs shrink
    (
        "vit.py",
        "torch.cat([class_token, patches]",
        "torch.cat([here[:, :1], patches]",
        "weights",
    ),  # not the class token's own
    ("eval.py", "data.masks.rot90(1, (1, 2))", "data.masks", "shapes"),  # picture turned, mask not
    ("eval.py", "images = 255 - images", "images = 256 - images", "shapes"),  # one too bright
    ("eval.py", 'files[:fifth] if split == "val" else files[fifth:]', "files[fifth:]", "folders"),
    ("eval.py", 'file.partition("/")[2])', "file)", "folders"),  # the class folder counts
    ("eval.py", 'warn(f"{folder} leads', 'str(f"{folder} leads', "folders"),  # without a word
    ("eval.py", "met.add(real)", "pass", "folders"),  # in two classes
    ("eval.py", "ImageOps.exif_transpose(image)", "image", "folders"),
    ("eval.py", "apply_exif_orientation=True", "apply_exif_orientation=False", "folders"),
    ("eval.py", "2**bits - 1", "65535", "folders"),  # 12 bits turn black
    ("eval.py", 'if image.format in ("JPEG", "MPO"):', "if True:", "folders"),  # may crash
    ("eval.py", "-1 if i == index else index", "-1 if i == index else i", "folders"),  # wrong file
    ("eval.py", "min(5, logits.shape[1])", "5", "counting"),
    ("eval.py", "indices[rank::world]", "indices[::world]", "counting"),  # all count the same
    ("eval.py", "hits.any(1).sum()", "hits.sum()", "counting"),  # two answers count twice
    ("eval.py", "right = right[:, 1:]", "right = right[:, :-1]", "counting"),  # not the padding
    ("eval.py", "torch.addcmul(-mean / std", "torch.addcmul(mean / std", "counting"),
    ("eval.py", "if raw or not weights:", "if True:", "checkpoints"),  # never the averaged ones
    ("eval.py", "weights_only=True, mmap=True", "weights_only=False", "checkpoints"),
    (
        "eval.py",
        "position = {name: int(name) for name in names if int(name) < len(classes)}",
        "position = {name: i for i, name in enumerate(names)}",
        "classes",
    ),  # sorted 0, 1, 10
    ("eval.py", 'row["params"], row["active"] = ', 'row["active"], row["params"] = ', "evaluator"),
    (
        "eval.py",
        ".setdefault(seed, row)",
        '.setdefault(row["checkpoint"], row)',
        "evaluator",
    ),  # not by seed
    ("train.py", "config.base_lr * batch / config.base_batch", "config.base_lr", "recipe"),
    ("train.py", "config.warmup_epochs = config.epochs / 10", "pass", "recipe"),  # ends at its peak
    ("train.py", "options.items() <= model.items()", "True", "recipe"),  # all are dense
    ("train.py", "tuned = FINE_TUNING.get", "tuned = RECIPES.get", "recipe"),
    (
        "train.py",
        "return min(decay, (1 + step) / (10 + step))",
        "return decay",
        "optimizer",
    ),  # a short run ends near its start
    (
        "train.py",
        "layer_decay ** (13 - layer_group(name))",
        "layer_decay ** layer_group(name)",
        "optimizer",
    ),
    ("train.py", "3 + block // 3", "3 + block", "optimizer"),  # more groups than published
    (
        "train.py",
        "(1 - smoothing) * targets + smoothing / num_classes",
        "targets.float()",
        "optimizer",
    ),
    (
        "train.py",
        "(step + 1) / warmup",
        "step / warmup",
        "optimizer",
    ),  # the first step does nothing
    ("train.py", 'elif ".experts." in name', 'elif False', "optimizer"),  # one rate for all
    ("train.py", "first = self.rank * self.accumulate", "first = 0", "batches"),  # all see the same
    ("train.py", "p=7 / 13", "p=1.0", "batches"),  # nearly twice as many operations
    ("train.py", "fill=mean_colour,", "", "batches"),  # black
    (
        "train.py",
        "draw_seed(self.seed, self.epoch)",
        "draw_seed(self.seed)",
        "batches",
    ),  # every epoch in the same order
    (
        "train.py",
        "share = run.rank * run.config.accumulate + part",
        "share = part",
        "training",
    ),  # alike
    ("train.py", 'group["lr_scale"] * rate', "rate", "training"),
    (
        "train.py",
        "config.batch_size // self.world // config.accumulate",
        "config.batch_size // self.world",
        "training",
    ),
    ("train.py", "(total / config.accumulate).backward()", "total.backward()", "training"),
    (
        "train.py",
        "~(losses.isfinite().all() & norm.isfinite())",
        "~losses.isfinite().all()",
        "training",
    ),  # NaN weights
    (
        "train.py",
        'save(run, "last.pt")  # before',
        'run.step  # before',
        "training",
    ),  # lost if it cannot be validated
    (
        "train.py",
        "torch.empty_like(like).copy_(value)",
        "value.clone()",
        "training",
    ),  # permuted moments
    (
        "train.py",
        "SystemExit(1 if run.unsaved else 128 + stop)",
        "SystemExit(1)",
        "training",
    ),  # a scheduler would not requeue it
    ("inspect_experts.py", "return 2 * shared.double()", "return shared.double()", "statistics"),
    ("inspect_experts.py", "smaller = min(h_rows", "smaller = max(h_rows", "statistics"),
    (
        "inspect_experts.py",
        "else experts[..., :1]",
        "else experts[..., -1:]",
        "statistics",
    ),  # the last choice
    ("inspect_experts.py", 'element("text", escape(words)', 'element("text", words', "report"),
]


# ---------------------------------------------------------------- copies, and their tests


def bystanders(concept):
    """The other concepts of moe.py that do not need this one of moe.py. Their tests are quick;
    elsewhere needs.py must do."""
    names = [
        c.name
        for c in CONCEPTS
        if c.functions and all(f.startswith("moe.") for f in c.functions.split())
    ]
    return [
        name
        for name in names
        if concept in names and name != concept and concept not in all_needs(name)
    ]


class OneFailureIsEnough:
    """A plugin for pytest: skips the rest of a concept's tests once one of them has failed."""

    def __init__(self, concepts):
        self.concepts, self.failed = concepts, set()

    def pytest_runtest_setup(self, item):
        if dict(item.user_properties)["concept"] in self.failed:
            pytest.skip("another test has noticed")

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed |= {dict(report.user_properties)["concept"]} & set(self.concepts)


def enter(folder):
    """Make a copy of the project the one whose files are imported, in a process of its own."""
    os.chdir(folder)
    sys.dont_write_bytecode = False
    ours = {path.stem for place in (ROOT, ROOT / "tests") for path in place.glob("*.py")}
    sys.path[:] = [
        place for place in sys.path if Path(place or ".").resolve() not in (ROOT, ROOT / "tests")
    ]
    for name in ours & set(sys.modules):
        del sys.modules[name]  # the server has loaded the original


QUIET = [
    "-p",
    "no:cacheprovider",
    "-p",
    "no:logging",
    "--basetemp=tmp",
]  # pytest without what only takes time here


def run_concepts(answer, folder, names, plugins):
    """Send {concept: (tests that passed, state)} of the quick tests of these concepts in a copy."""
    enter(folder)
    files = [
        str(path)
        for path in Path("tests").glob("test_*.py")
        if re.search(rf"mark\.({'|'.join(names)})\b", path.read_text("utf-8"))
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(
            [*QUIET, "-q", "--tb=no", "-m", f"({' or '.join(names)}) and not slow", *files], plugins
        )
    conftest = sys.modules["conftest"]
    answer.send(
        {
            name: (sum(passed for passed, _ in tests.values()), conftest.state_of(name))
            for name, tests in conftest.results.items()
        }
    )


def run_copy(answer, template, change, names, plugins):
    """The same in a copy of a copy, changed by change, a function and its arguments after the
    folder."""
    os.nice(10)  # the tests that run meanwhile come first
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(template, Path(place) / "project")
        function, *arguments = change
        function(folder, *arguments)
        run_concepts(answer, folder, names, plugins)


def mutate(folder, file, old, new):
    """Replace a line in a file of a copy."""
    (folder / file).write_text((ROOT / file).read_text("utf-8").replace(old, new), "utf-8")


def in_process(function, *arguments):
    """What function(answer, *arguments) sends, in a process of its own."""
    answer, sending = forked.server.Pipe(duplex=False)
    (process,) = forked.start(function, sending, *arguments)
    sending.close()  # so that a process that dies is an error, and not an endless wait
    result = answer.recv()
    process.join()
    return result


def after(other, *arguments):
    """in_process() when another future has finished."""
    other.result()
    return in_process(*arguments)


outcomes = {}  # {mutant or unwritten concept: Future of {concept: (tests that passed, state)}}


def begin_session(session):
    """conftest.py calls this before the first test: the copies are tested in the background, while
    other tests run.

    As many at a time as there are processors, at most four."""
    jobs = {
        mutant: (
            (mutate, *mutant[:3]),
            [mutant[3], *bystanders(mutant[3])],
            [OneFailureIsEnough(mutant[3:])],
        )
        for mutant in selected(session, "mutant_outcome")
    }
    jobs |= {
        concept: (
            (make_assignment.blank_concepts, [concept]),
            [concept, *waiting_for(concept), *bystanders(concept)],
            [OneFailureIsEnough(waiting_for(concept))],
        )
        for concept in selected(session, "unwritten")
    }
    if not jobs or not hasattr(os, "fork"):
        return
    place, threads = tempfile.TemporaryDirectory(), concurrent.futures.ThreadPoolExecutor(
        min(4, os.cpu_count())
    )
    session.config.add_cleanup(place.cleanup)
    session.config.add_cleanup(
        lambda: threads.shutdown(cancel_futures=True)
    )  # the last added is the first done
    template = Path(place.name) / "project"
    copy_project(template)
    # All is collected there once, and so compiled: its copies start quickly. No test is of the
    # concept "course".
    compiled = threads.submit(in_process, run_concepts, template, ["course"], [])
    for key, job in jobs.items():
        outcomes[key] = threads.submit(after, compiled, run_copy, template, *job)


def selected(session, name):
    """The values of a parameter in the tests that this run of pytest has selected."""
    items = [
        item
        for item in session.items
        if name in getattr(getattr(item, "callspec", None), "params", {})
    ]
    return list(dict.fromkeys(item.callspec.params[name] for item in items))


# ---------------------------------------------------------------- mutants


@pytest.mark.course
@pytest.mark.parametrize(
    "mutant", MUTANTS, ids=lambda mutant: f"{mutant[3]}: {mutant[2][:40]}".replace("\n", "")
)
def test_a_mutant_is_one_change_in_a_function_of_its_concept(mutant):
    """What is to be replaced stands exactly once in the file, in a function that the table gives to
    this concept."""
    file, old, _, concept = mutant
    source = (ROOT / file).read_text("utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {file}"
    line = source[: source.index(old)].count("\n") + 1
    functions = [function.split(".", 1) for function in BY_NAME[concept].functions.split()]
    nodes = [find(source, path)[0] for name, path in functions if f"{name}.py" == file]
    assert any(
        node.lineno < line <= node.end_lineno for node in nodes
    ), f"line {line} is in no function of {concept}"
    ast.parse(source.replace(old, mutant[2]))


@pytest.mark.course
@pytest.mark.slow
@forked.needs_fork
@pytest.mark.parametrize(
    "mutant_outcome", MUTANTS, ids=lambda mutant: f"{mutant[3]}: {mutant[2][:40]}".replace("\n", "")
)
def test_a_mutant_fails_its_own_concept_and_no_other(mutant_outcome):
    """At least one test of the concept fails, and none of the bystanders, which do not need it."""
    file, old, new, concept = mutant_outcome
    states = {name: state for name, (_, state) in outcomes[mutant_outcome].result().items()}
    assert states.pop(concept) == "BROKEN", f"nobody notices that {old!r} has become {new!r}"
    assert set(states.values()) <= {
        "done",
        "so far",
    }, f"tests that should not see the mistake fail: {states}"


# ---------------------------------------------------------------- concepts left unwritten

UNSEEN = {
    ("grouped", "vit"),
    ("grouped", "convnext"),
    ("training", "grouped"),
    ("training", "weights"),
}  # by slow or late tests


def waiting_for(concept):
    """The concepts that need this one directly."""
    return [
        other.name
        for other in CONCEPTS
        if concept in other.needs.split() and (other.name, concept) not in UNSEEN
    ]


@pytest.mark.course
@pytest.mark.slow
@forked.needs_fork
@pytest.mark.parametrize("unwritten", WRITTEN)
def test_without_a_concept_its_tests_and_those_that_need_it_do_not_pass(unwritten):
    """All its tests fail, as "not written yet"; what needs it directly waits for it; what does not
    need it is done."""
    found = outcomes[unwritten].result()
    assert found.pop(unwritten) == (0, "not written yet")
    for name, (_, state) in found.items():
        expected = (
            {f"waits for {unwritten}"} if name in waiting_for(unwritten) else {"done", "so far"}
        )  # but for slow tests
        assert state in expected, f"without {unwritten}, {name} is {state!r}"


# ---------------------------------------------------------------- the table, the assignment


@pytest.mark.course
def test_teaching_order_needs_nothing_that_comes_later():
    """Each concept needs only concepts above it, each function belongs to one concept only, and
    each lesson is one line."""
    above = []
    for concept in CONCEPTS:
        assert set(concept.needs.split()) <= set(above), concept.name
        assert len(concept.lesson) <= 110, concept.name
        above.append(concept.name)
    functions = [function for concept in CONCEPTS for function in concept.functions.split()]
    assert len(functions) == len(set(functions))


# ---------------------------------------------------------------- what pytest prints


def run_pytest(folder, *flags):
    """`cd folder; python -m pytest flags >out 2>err`, for start()."""
    enter(folder)
    with open("out", "w") as out, open("err", "w") as err, contextlib.redirect_stdout(
        out
    ), contextlib.redirect_stderr(err):
        sys.exit(pytest.main([*QUIET, *flags]))


def run_tests(tests, folder, *flags):
    """Run pytest on a test file of ours in an empty project with our conftest.py: its status and
    the lines it prints."""
    (folder / "tests").mkdir()
    for name in ("concepts.py", "conftest.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests" / name)
    (folder / "tests" / "test_it.py").write_text("import pytest\n" + tests)
    (status,) = forked.finish(forked.start(run_pytest, folder, *flags))
    return (
        status,
        (folder / "out").read_text().splitlines(),
        (folder / "err").read_text().splitlines(),
    )


@pytest.mark.course
@pytest.mark.slow
@forked.needs_fork
def test_the_summary_tells_unwritten_waiting_and_broken_apart(tmp_path):
    """A line per concept in teaching order: tests run in that order, and each state has its
    name."""
    _, lines, _ = run_tests(
        '''
@pytest.mark.layer
def test_1(): raise NotImplementedError("router: write Router.forward")
@pytest.mark.layer
def test_2(): pass
@pytest.mark.balance
def test_3(): assert 0.5 == 1.0, "factor E missing"
@pytest.mark.balance
def test_4(): raise NotImplementedError("router: write Router.forward")
@pytest.mark.top_k
def test_5(): pass
@pytest.mark.router
def test_6(): raise NotImplementedError("router: write Router.forward")
''',
        tmp_path,
        "-v",
    )
    order = [
        line.split("::")[1].split()[0] for line in lines if line.startswith("tests/test_it.py::")
    ]
    assert order == ["test_6", "test_5", "test_3", "test_4", "test_1", "test_2"]
    assert [" ".join(line.split()[:5]).split(" A ")[0] for line in lines[-4:]] == [
        "router 0/1 not written yet",
        "top_k 1/1 done Softmax over",
        "balance 0/2 BROKEN Without a",
        "layer 1/2 waits for router",
    ]


@pytest.mark.course
@pytest.mark.slow
@forked.needs_fork
def test_the_summary_counts_what_was_left_out(tmp_path):
    """passed/total is of all tests of a concept; with some deselected its state is "so far";
    skipped tests do not count."""
    _, lines, _ = run_tests(
        '''
@pytest.mark.router
def test_1(): pass
@pytest.mark.router
def test_2(): pass
@pytest.mark.top_k
def test_3(): pass
@pytest.mark.top_k
@pytest.mark.skip
def test_4(): pass
''',
        tmp_path,
        "-k",
        "test_1 or test_3 or test_4",
    )
    assert [line.split()[:3] for line in lines[-2:]] == [
        ["router", "1/2", "so"],
        ["top_k", "1/1", "done"],
    ]


@pytest.mark.course
@pytest.mark.slow
@forked.needs_fork
@pytest.mark.parametrize(
    "marks, named",
    [("", r"\[\]"), ("@pytest.mark.router\n@pytest.mark.top_k\n", "'top_k', 'router'")],
)
def test_a_test_without_a_concept_or_with_two_is_refused(marks, named, tmp_path):
    """A usage error, status 4, that names the test and says what is expected."""
    status, _, errors = run_tests(f"{marks}def test_1(): pass\n", tmp_path)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert re.search(
        rf"^ERROR: tests/test_it.py::test_1 has the concepts .*{named}.*expected exactly one",
        "\n".join(errors),
        re.M,
    )
