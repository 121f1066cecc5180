"""What does sparse cost? `python tests/benchmark.py` prints three tables.

1. Parameters and multiply-adds of our models beside the paper's Table 1.
2. The time of a whole MoE layer (router, dispatch, experts, combine, losses) beside that of a dense
   MLP on as many rows as the experts see, T * K: the same multiply-adds. Forward + backward,
   float32 on a CPU, bfloat16 autocast on a GPU. All candidates take turns, so that all meet the
   same moods of the machine.
3. The same for the other ways to route: experts that choose tokens, and Soft MoE.
With --models it prints another one:
4. For each model with the experts of its recipe: images/s of forward and backward, and how much
   memory one more image in the batch takes (a minute per large model, which needs 10 GB).
With --layer the second table alone, with --gpu, on a GPU:
5. Images/s and memory of whole training steps at 224 pixels, dense and sparse, eager and compiled.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import convnext  # noqa: E402, after the path is set
import train  # noqa: E402
import vit  # noqa: E402
from eval import build_model, count_flops  # noqa: E402
from moe import MLP, MoE, balance_loss, count_parameters, make_moe  # noqa: E402

SHAPES = (  # name, T tokens on a CPU, D, H, E, K
    ("ViT-S", 6272, 384, 1536, 8, 2),
    ("ViT-S", 6272, 384, 1536, 16, 1),
    ("ConvNeXt-T stage 4", 1568, 768, 3072, 4, 1),
    ("vit_nano, 64 images", 1088, 64, 256, 8, 1))


def print_paper_table():
    """Print each row of Table 1: the paper's number, then ours.

    Its accuracies stand alone: here nobody has trained on ImageNet.
    """
    print(f"{'':<17}{'params M':>18}{'active M':>18}{'GFLOPs':>18}{'top-1 %':>10}")
    print(f"{'':<17}" + f"{'paper':>10}{'ours':>8}" * 3 + f"{'paper':>10}")
    for name, preset, options, *paper, top1, note in vit.TABLE + convnext.TABLE:
        model = preset(**options)
        total, active = count_parameters(model)
        ours = total / 1e6, active / 1e6, count_flops(model, 224) / 1e9
        pairs = "".join(f"{theirs:>10.1f}{our:>8.1f}" for theirs, our in zip(paper, ours))
        print(f"{name:<17}{pairs}{top1:>10.1f}  {note}".rstrip())


def clock(device):
    """Return seconds, read when a device ("cpu", "cuda") has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def training_step(run, x, device):
    """Return the seconds of one forward and backward pass of run, a function of x."""
    x.grad = None
    start = clock(device)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        y, extra_loss = run(x)
    # A sum, not a mean: with a mean over millions of numbers the gradients would be so small
    # (denormal) that the products of a CPU take ten times as long.
    loss = y.float().square().sum() + extra_loss
    loss.backward()
    return clock(device) - start


def compare(T, dim, hidden, num_experts, k, device, rounds):
    """Return the median seconds of {"dense": s, "loop": s, "grouped_mm": s} for one shape."""
    layer, dense = MoE(dim, hidden, num_experts, k).to(device), MLP(dim, hidden).to(device)
    tokens = torch.randn(T, dim, device=device, requires_grad=True)
    rows = torch.randn(T * k, dim, device=device, requires_grad=True)

    def sparse(experts_forward):
        def run(x):
            layer.experts.forward = experts_forward
            y, routing = layer(x)
            return y, 0.005 * routing.balance_loss
        return run

    candidates = {
        "dense": (lambda x: (dense(x), 0), rows),
        "loop": (sparse(layer.experts.loop), tokens),
        "grouped_mm": (sparse(layer.experts.grouped), tokens)}
    return take_turns(candidates, [layer, dense], device, rounds)


def take_turns(candidates, modules, device, rounds):
    """Return the median seconds of each candidate, {name: (run, x)}. modules: all layers."""
    seconds = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, (run, x) in candidates.items():
            for module in modules:
                module.zero_grad()
            seconds[name].append(training_step(run, x, device))
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}  # 1st: warm-up


def print_layer_times():
    """Print the time of a layer over that of a dense MLP, for each of SHAPES and both paths."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds, scale = (31, 8) if device == "cuda" else (11, 1)
    print(f"Forward + backward in ms, median of n = {rounds}, {device}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads. Ratio: time over dense.\n")
    print(f"{'':<57}{'dense':>8}{'loop':>8}{'ratio':>7}{'grouped_mm':>12}{'ratio':>7}")
    for name, T, D, H, E, K in SHAPES:
        ms = {path: 1e3 * s for path, s in compare(scale * T, D, H, E, K, device, rounds).items()}
        title = f"{name}: {scale * T} tokens, {D} -> {H}, E {E}, k {K}"
        print(f"{title:<57}{ms['dense']:>8.1f}"
              f"{ms['loop']:>8.1f}{ms['loop'] / ms['dense']:>7.2f}"
              f"{ms['grouped_mm']:>12.1f}{ms['grouped_mm'] / ms['dense']:>7.2f}")


def print_router_times():
    """Print the time of each way to route over that of a dense MLP, on images of 196 tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds, B = (31, 256) if device == "cuda" else (11, 32)
    N, D, H, E, K = 196, 384, 1536, 8, 2
    dense = MLP(D, H).to(device)
    images = torch.randn(B, N, D, device=device, requires_grad=True)
    rows = torch.randn(B * N * K, D, device=device, requires_grad=True)
    candidates, modules = {"dense": (lambda x: (dense(x), 0), rows)}, [dense]
    for router in ("linear", "expert_choice", "soft"):
        layer = make_moe(D, H, E, K, router, N).to(device)

        def run(x, layer=layer):
            y, routing = layer(x)
            return y, 0.005 * routing.balance_loss

        candidates[router] = (run, images)
        modules.append(layer)
    seconds = take_turns(candidates, modules, device, rounds)
    print(f"{B} images of {N} tokens, {D} -> {H}, E {E}, k {K}: time over dense, n = {rounds}")
    for router in ("linear", "expert_choice", "soft"):
        print(f"  --router {router:<14}{seconds[router] / seconds['dense']:.2f}")


def print_model_costs():
    """Print a line per model. Each measurement has a fresh process with its own peak memory."""
    print(f"forward and backward on {torch.get_num_threads()} CPU threads, float32, "
          f"torch {torch.__version__}")
    print(f"{'model':<16}{'pixels':>7}{'params M':>10}{'active M':>10}{'GFLOPs':>8}"
          f"{'images/s':>10}{'MB per image':>14}")
    spawn = multiprocessing.get_context("spawn")
    for name in train.RECIPES:
        config = train.parse_args(["--model", name])
        options = train.model_config(config, num_classes=1000)
        few, many = (64, 256) if config.image_size == 32 else (2, 6)
        results = []
        for B in (few, many):  # this process stays small: a new one inherits its peak
            with spawn.Pool(1) as pool:
                results.append(pool.apply(step_cost, (options, B)))
        (_, small, *_), (seconds, large, total, active, flops) = results
        print(f"{name:<16}{config.image_size:>7}{total / 1e6:>10.2f}{active / 1e6:>10.2f}"
              f"{flops / 1e9:>8.3f}{many / seconds:>10.1f}"
              f"{(large - small) / (many - few):>14.1f}", flush=True)


def step_cost(options, B):
    """Return median seconds and peak MB of training steps on B images, without the optimizer, and
    the model's parameters, active ones and multiply-adds.
    """
    model = build_model(options)
    images = torch.randn(B, 3, options["image_size"], options["image_size"])
    seconds = []
    for _ in range(4):
        start = clock("cpu")
        logits, _ = model(images, return_routing=True)
        logits.square().sum().backward()
        seconds.append(clock("cpu") - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux: in KiB
    flops = count_flops(model, options["image_size"])
    return statistics.median(seconds[1:]), peak, *count_parameters(model), flops


def steps_in_turns(options, rounds=100):
    """Time whole training steps, dense and sparse in turns: {"dense": [seconds], "sparse": ...}.

    options: all those of a run (train.parse_args), a dict. The rate stays constant. It is the time
    of the processor, to which other programs add little: call it with one thread, on a CPU.
    """
    runs, seconds = {}, {"dense": [], "sparse": []}
    for name, layers in (("dense", "none"), ("sparse", options["moe_layers"])):
        changed = dict(moe_layers=layers, out=tempfile.mkdtemp())
        runs[name] = run = train.Run(argparse.Namespace(**options | changed))
        order = train.image_order(run.config, 0, rank=0, world=1)[:rounds + 1]
        run.passes[:] = order.flatten(0, 1).tolist()
        run.meter, run.batches = train.Meter(run), iter(run.loader)
    for _ in range(rounds + 1):
        for name, run in runs.items():
            begin = time.process_time()
            images, targets = train.next_batch(run, run.batches, 0, run.meter)
            logits, routings = run.net(images, return_routing=True)
            loss = train.classification_loss(logits, targets, run.config)
            (loss + run.config.balance_weight * balance_loss(routings)).backward()
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip_grad)
            run.optimizer.step()
            run.optimizer.zero_grad()
            seconds[name].append(round(time.process_time() - begin, 4))
    return {name: times[1:] for name, times in seconds.items()}  # the first warms up


def print_gpu_speed(B=256, steps=10):
    """Print images/s and peak memory of training steps on a GPU, in bfloat16."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {B}, {steps} steps")
    for name in ("vit_s", "convnext_t"):
        for layers in ("none", train.RECIPES[name]["moe_layers"]):
            for compiled in (False, True):
                config = train.parse_args(["--model", name, "--moe-layers", layers])
                model = build_model(train.model_config(config, num_classes=1000)).cuda()
                optimizer = torch.optim.AdamW(model.parameters(), fused=True)
                net = torch.compile(model) if compiled else model
                images = torch.randn(B, 3, 224, 224, device="cuda")
                labels = torch.randint(1000, (B,), device="cuda")
                torch.cuda.reset_peak_memory_stats()
                for step in range(steps + 3):
                    if step == 3:  # after the warm-up
                        start = clock("cuda")
                    with torch.autocast("cuda", torch.bfloat16):
                        logits, routings = net(images, return_routing=True)
                    loss = torch.nn.functional.cross_entropy(logits.float(), labels)
                    (loss + 0.005 * balance_loss(routings)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                speed = steps * B / (clock("cuda") - start)
                memory = torch.cuda.max_memory_allocated() / 2**30
                print(f"{name:<12}{layers:<8}{'compiled' if compiled else 'eager':<10}"
                      f"{speed:>8.0f} images/s{memory:>8.1f} GiB", flush=True)


MODES = {"": [print_paper_table, print_layer_times, print_router_times], "--gpu": [print_gpu_speed],
         "--models": [print_model_costs], "--layer": [print_layer_times]}

if __name__ == "__main__":
    for show in MODES.get("".join(sys.argv[1:])) or sys.exit(__doc__):
        show()
        print()
