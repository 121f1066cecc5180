"""train.py in real processes: killed and continued, and two against one.

torchrun does two things: it starts the processes, and tells each its rank by environment variables.
Here forked.py does both. test_train.py has a run under torchrun itself.
"""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torchvision.io import write_png

import eval as evaluation
import forked
import train
from forked import finish
from moe import MoE

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.training, pytest.mark.slow, forked.needs_fork]


def train_in(folder, *flags):
    """Do `cd folder; python train.py flags` on few pictures, not waiting for the disk."""
    os.chdir(folder)
    os.setpgid(0, 0)  # a group of this process and its loaders' processes, see interrupt()
    os.fsync = lambda file: None
    evaluation.VAL_IMAGES = 40
    train.main(train.parse_args(flags))


def start(world, folder, *flags):
    """Start train_in() in `world` processes."""
    return forked.start(train_in, folder, *flags, world=world)


def load(path):
    return torch.load(path, weights_only=True)


def read_log(run):
    """Return the lines of a run's log, dicts."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def same(a, b):
    """Return whether a and b are equal to the last bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---------------------------------------------------------------- killed and continued


LONG = (
    "--data shapes:80 --model vit_nano --batch-size 8 --epochs 6 --ema 0.9 "
    "--mixup 0.2 --cutmix 1 --erasing 0.5 --crop-scale 0.5 --flip 1 --drop-path 0.2 "
    "--capacity-factor 1.05 --save-every-minutes 0.002"
).split()


def interrupt(processes, run, number):
    """Send a signal in the middle of epoch 2, after a save. Return the step of the last checkpoint.

    The processes that load images for these get it, too.
    """
    deadline = time.monotonic() + 60
    step = 0
    while not (step > 10 and step % 10):  # 10 steps per epoch
        running = all(process.is_alive() for process in processes)
        assert running and time.monotonic() < deadline, "the run ended before it was stopped"
        time.sleep(0.05)
        step = load(run / "last.pt")["step"] if (run / "last.pt").exists() else 0
    for process in processes:
        os.killpg(process.pid, number)
    return step


@pytest.mark.parametrize("world, workers", [(1, "2"), (2, "0")])
def test_killed_and_continued_a_run_ends_like_a_whole_one(world, workers, tmp_path):
    """SIGTERM, then SIGKILL, then to the end: the same bits as a run that was left alone.

    That one had no processes to load images.
    """
    assert finish(start(world, tmp_path, *LONG, "--workers", "0", "--out", "whole")) == [0] * world
    broken = (*LONG, "--workers", workers, "--out", "broken")
    last = tmp_path / "broken" / "last.pt"

    processes = start(world, tmp_path, *broken)
    reached = interrupt(processes, tmp_path / "broken", signal.SIGTERM)
    assert finish(processes) == [143] * world, "128 + 15: a scheduler sees that the run was stopped"
    saved = load(last)["step"]
    assert reached <= saved < 60, "saved on the way out"

    processes = start(world, tmp_path, *broken)
    while load(last)["step"] == saved:
        time.sleep(0.02)
    interrupt(processes, tmp_path / "broken", signal.SIGKILL)
    assert finish(processes) == [-9] * world
    assert load(last)["step"] < 60

    assert finish(start(world, tmp_path, *broken)) == [0] * world
    expected, continued = load(tmp_path / "whole" / "last.pt"), load(last)
    for part in ("model", "ema", "optimizer", "step"):
        assert same(expected[part], continued[part]), part
    assert expected["best"]["epoch"] == continued["best"]["epoch"]
    logs = read_log(tmp_path / "whole"), read_log(tmp_path / "broken")
    for line, other in zip(*logs, strict=True):
        for field in ("epoch", "step", "lr", "val_loss", "top1", "ema_val_loss", "ema_top1"):
            assert line[field] == other[field], field  # training losses: since the interruption


def test_ctrl_c_exits_with_130(tmp_path):
    """SIGINT finishes the step, saves, and exits with 128 + 2."""
    processes = start(1, tmp_path, *LONG, "--workers", "0", "--out", "r")
    reached = interrupt(processes, tmp_path / "r", signal.SIGINT)
    assert finish(processes) == [130]
    assert load(tmp_path / "r" / "last.pt")["step"] >= reached


def programs(folder, flags, data):
    """Do `python train.py flags --data data[rank]` in each process, see forked.program()."""
    rank = int(os.environ["RANK"])
    forked.program(ROOT / "train.py", [*flags, "--data", data[rank]], folder, "r")


@pytest.mark.parametrize("second, expected", [
    ("nowhere", "error: process 1: no folder 'nowhere'"),
    ("other", "error: process 1: other or r/last.pt is not what process 0 has"),
])
def test_what_is_wrong_in_one_process_is_told_once(second, expected, tmp_path):
    """Process 1 lacks the data, or has others: both end with status 2, and one line says why."""
    for folder, classes in (("data", ("cat", "emu")), ("other", ("cat", "dog"))):
        for name in classes:
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(10):
                image = torch.full((3, 32, 32), i, dtype=torch.uint8)
                write_png(image, str(tmp_path / folder / name / f"{i}.png"))
    flags = "--model vit_nano --batch-size 8 --epochs 1 --workers 0 --out r".split()
    assert finish(forked.start(programs, tmp_path, flags, ["data", second], world=2)) == [2, 2]
    [error] = [line for line in (tmp_path / "r.err").read_text().splitlines() if "rror" in line]
    assert error.startswith(expected)


def train_apart(folder, *flags):
    """As train_in(), but each rank in a folder of its own, as on two machines with local disks."""
    train_in(folder / os.environ["RANK"], *flags)


def test_processes_at_different_steps_do_not_train_together(tmp_path):
    """Rank 0 would continue a run that rank 1 does not see: both end with status 2."""
    flags = "--data shapes:64 --model vit_nano --batch-size 32 --workers 0 --out r".split()
    for rank in "01":
        (tmp_path / rank).mkdir()
    assert finish(start(1, tmp_path / "0", *flags, "--epochs", "1")) == [0]
    before = (tmp_path / "0" / "r" / "last.pt").read_bytes()
    processes = forked.start(train_apart, tmp_path, *flags, "--epochs", "1", world=2)
    assert finish(processes) != [0, 0]
    assert (tmp_path / "0" / "r" / "last.pt").read_bytes() == before


# ---------------------------------------------------------------- two processes against one


def test_two_processes_train_like_one(tmp_path):
    """The same global batches, one step per epoch: the losses agree to 1e-5, and it learns.

    Without what each process draws for itself (noise, drop path) or computes from its own tokens
    (balance loss).
    """
    flags = (
        "--data shapes:32 --model vit_nano --batch-size 32 --epochs 10 --warmup-epochs 1 "
        "--balance-weight 0 --router-noise 0 --workers 0 --lr 0.0006 --moe-layers every2"
    ).split()
    for world in (1, 2):
        assert finish(start(world, tmp_path, *flags, "--out", f"world{world}")) == [0] * world
    one, two = (torch.tensor([line["train_loss"] for line in read_log(tmp_path / folder)])
                for folder in ("world1", "world2"))
    assert len(one) == 10 and one[-1] < 0.95 * one[0]
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)


def test_two_processes_are_two_passes_of_one(tmp_path):
    """With --accumulate 2 one process ends like two, bit for bit: draws belong to shares.

    Everything is on: mixing, EMA, noise, drop path, a capacity, the balance loss.
    """
    flags = (
        "--data shapes:96 --model vit_nano --batch-size 32 --epochs 2 --mixup 0.8 --cutmix 1 "
        "--ema 0.9 --drop-path 0.2 --capacity-factor 1.05 --workers 0 --accumulate"
    ).split()
    for world in (1, 2):
        passes = str(2 // world)
        processes = start(world, tmp_path, *flags, passes, "--out", f"world{world}")
        assert finish(processes) == [0] * world
    one, two = (load(tmp_path / f"world{world}" / "last.pt") for world in (1, 2))
    for part in ("model", "ema"):
        for name in one[part]:
            assert torch.equal(two[part][name], one[part][name]), (part, name)
    for line, other in zip(read_log(tmp_path / "world1"), read_log(tmp_path / "world2")):
        assert line["load"] == other["load"] and line["dropped"] == other["dropped"] > 0
        for field in ("train_loss", "balance_loss", "val_loss", "ema_val_loss"):
            assert math.isclose(line[field], other[field], abs_tol=1e-5), field


def step_with_idle_experts(folder):
    """In each of two processes: a DDP step of a layer whose process uses one expert of its own."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    layer = MoE(dim=2, hidden=4, num_experts=3, k=1, router_noise=0)
    layer.router.codes.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])  # 2: nobody
    net = DistributedDataParallel(layer)  # its defaults, without find_unused_parameters
    token = torch.eye(2)[rank : rank + 1]  # (1, 2): rank 0 chooses expert 0, rank 1 expert 1
    for _ in range(2):  # a process that waited for a gradient would fail in the second step
        y, routing = net(token)
        (y.sum() + routing.balance_loss).backward()
    used = [expert[2].bias.grad.any().item() for expert in layer.experts]
    torch.save(used, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_no_process_waits_for_an_idle_expert(tmp_path):
    """With DDP's defaults a process may leave experts idle: their gradient is 0, not None."""
    assert finish(forked.start(step_with_idle_experts, tmp_path, world=2)) == [0, 0]
    for rank in (0, 1):  # averaged over the processes: experts 0 and 1 have a gradient
        assert load(tmp_path / f"{rank}.pt") == [True, True, False]


def test_ranks_hold_the_same_bits(tmp_path):
    """Each rank draws its own noise and drop path, and yet applies the average gradient."""
    flags = (
        "--data shapes:96 --model vit_nano --batch-size 32 --epochs 2 --drop-path 0.2 "
        "--capacity-factor 1.05 --workers 0 --out r"
    ).split()
    assert finish(forked.start(train_and_keep_weights, tmp_path, *flags, world=2)) == [0, 0]
    assert same(load(tmp_path / "rank0.pt"), load(tmp_path / "rank1.pt"))


def train_and_keep_weights(folder, *flags):
    """As train_in(), but at every save each rank also writes its own weights."""
    save = train.save

    def save_both(run, *names):
        save(run, *names)
        torch.save(run.model.state_dict(), f"rank{run.rank}.pt")

    train.save = save_both
    train_in(folder, *flags)


def test_validation_counts_each_of_7_images_once(tmp_path):
    """7 images on 2 ranks: accuracy and loss are those of one process."""
    for split, count in (("train", 8), ("val", 7)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for i in range(count)[label::2]:
                image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
                write_png(image, str(tmp_path / "d" / split / name / f"{i}.png"))
    flags = "--data d --model vit_nano --batch-size 8 --epochs 1 --workers 0 --out r".split()
    assert finish(start(2, tmp_path, *flags)) == [0, 0]
    [line] = read_log(tmp_path / "r")
    cpu = torch.device("cpu")
    model, checkpoint = evaluation.load_checkpoint(tmp_path / "r" / "last.pt", cpu)
    data = evaluation.open_dataset(str(tmp_path / "d"), "val", evaluation.eval_transform(32, 1.0))
    loader = evaluation.eval_loader(data, 3, 0, cpu)
    alone = evaluation.evaluate(model, loader, cpu, checkpoint["mean"], checkpoint["std"])
    assert alone["images"] == 7 and line["top1"] == alone["top1"]
    assert abs(line["val_loss"] - alone["loss"]) < 1e-6
