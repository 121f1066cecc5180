"""Processes that start at once: a server that has loaded PyTorch and our programs forks them.

A new Python would take 5 s to load these.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import sys

import pytest
import torch

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")

if hasattr(os, "fork"):
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torchvision", "inspect_experts", "train"])


def start(function, *arguments, world=1):
    """Call function(*arguments) in `world` new processes. Return the processes.

    Environment variables tell each its rank, as torchrun's do.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        server.Process(target=begin, args=(rank, world, port, function, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def begin(rank, world, port, function, arguments):
    """Prepare such a process, then call the function."""
    gc.freeze()  # what the server has loaded need not be searched for garbage, and so not copied
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same numbers on every machine
    multiprocessing.set_start_method("fork", force=True)  # for the data loader's own processes
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    function(*arguments)


def finish(processes, seconds=120):
    """Wait for the processes to end, and return their exit codes."""
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]


def program(file, arguments, folder, name):
    """Do, as a function for start(), `cd folder; python file arguments >>name.out 2>>name.err`."""
    os.chdir(folder)
    sys.argv = [str(file), *arguments]
    with open(f"{name}.out", "a") as sys.stdout, open(f"{name}.err", "a") as sys.stderr:
        runpy.run_path(str(file), run_name="__main__")
