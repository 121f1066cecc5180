"""train.py in real processes: killed and continued, and two against one.

torchrun does two things: it starts the processes, and tells each its rank by environment variables.
Here forked.py does both. test_train.py has a run under torchrun itself.
"""

import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation
import forked
import train
from checks import same_runs
from forked import finish, start

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.training, pytest.mark.slow, forked.needs_fork]


def train_in(folder, *flags):
    """Do `cd folder; python train.py flags` on few pictures, not waiting for the disk."""
    os.chdir(folder)
    os.setpgid(0, 0)  # a group of this process and its loaders' processes, see interrupt()
    os.fsync = lambda file: None
    evaluation.VAL_IMAGES = 15
    train.main(train.parse_args(flags))


def load(path):
    return torch.load(path, weights_only=True)


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
    whole = start(train_in, tmp_path, *LONG, "--workers", "0", "--out", "whole", world=world)
    assert finish(whole) == [0] * world
    broken = (*LONG, "--workers", workers, "--out", "broken")
    last = tmp_path / "broken" / "last.pt"

    processes = start(train_in, tmp_path, *broken, world=world)
    reached = interrupt(processes, tmp_path / "broken", signal.SIGTERM)
    assert finish(processes) == [143] * world, "128 + 15: a scheduler sees that the run was stopped"
    saved = load(last)["step"]
    assert reached <= saved < 60, "saved on the way out"

    processes = start(train_in, tmp_path, *broken, world=world)
    while load(last)["step"] == saved:
        time.sleep(0.02)
    interrupt(processes, tmp_path / "broken", signal.SIGKILL)
    assert finish(processes) == [-9] * world
    assert load(last)["step"] < 60

    assert finish(start(train_in, tmp_path, *broken, world=world)) == [0] * world
    same_runs(tmp_path / "whole", tmp_path / "broken")


def programs(folder, flags, data):
    """Do `python train.py flags --data data[rank]` in each process, see forked.program()."""
    rank = int(os.environ["RANK"])
    forked.program(ROOT / "train.py", [*flags, "--data", data[rank]], folder, "r")


@pytest.mark.parametrize("second, expected", [
    ("nowhere", "error: process 1: no folder 'nowhere'"),
    ("shapes:96", "error: process 1: shapes:96 or r/last.pt is not what process 0 has")])
def test_what_is_wrong_in_one_process_is_told_once(second, expected, tmp_path):
    """Process 1 lacks the data, or has others: both end with status 2, and one line says why."""
    flags = "--model vit_nano --batch-size 8 --epochs 1 --workers 0 --out r".split()
    assert finish(start(programs, tmp_path, flags, ["shapes:64", second], world=2)) == [2, 2]
    [error] = [line for line in (tmp_path / "r.err").read_text().splitlines() if "rror" in line]
    assert error.startswith(expected)


# ---------------------------------------------------------------- two processes against one

def test_two_processes_are_two_passes_of_one(tmp_path):
    """With --accumulate 2 one process ends like two, bit for bit: draws belong to shares.

    Everything is on: mixing, EMA, noise, drop path, a capacity, the balance loss. Of 15 pictures
    that validate each process sees some, and none counts twice.
    """
    flags = (
        "--data shapes:96 --model vit_nano --batch-size 32 --epochs 2 --mixup 0.8 --cutmix 1 "
        "--ema 0.9 --drop-path 0.2 --capacity-factor 1.05 --workers 0 --accumulate"
    ).split()
    for world in (1, 2):
        passes = str(2 // world)
        out = f"world{world}"
        processes = start(train_in, tmp_path, *flags, passes, "--out", out, world=world)
        assert finish(processes) == [0] * world
    one, two = (load(tmp_path / f"world{world}" / "last.pt") for world in (1, 2))
    for part in ("model", "ema"):
        torch.testing.assert_close(two[part], one[part], rtol=0, atol=0)
    for line, other in zip(one["log"], two["log"], strict=True):
        assert line["load"] == other["load"] and line["dropped"] == other["dropped"] > 0
        for field in ("train_loss", "balance_loss", "val_loss", "ema_val_loss", "top1"):
            assert math.isclose(line[field], other[field], abs_tol=1e-5), field
