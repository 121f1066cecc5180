"""Processes that start at once, for tests that need several, or that kill one.

A new Python takes 5 s to load PyTorch and our programs, and the tests start dozens of them. So a
server loads them once, and each process is a fork of it. (Not a fork of pytest itself: earlier
tests leave threads in it, and a process forked from several threads can hang.) What the processes
print goes to a file. finish() shows it, so pytest prints it below a test that fails, and nowhere
else.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import threading
from multiprocessing.connection import wait

import pytest
import torch

# A start looks which of the other processes have ended. If two threads look at the same one, its
# exit code arrives in one of them, and the other gets 255.
one_at_a_time = threading.Lock()

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
    processes = []
    for rank in range(world):
        file, printed = tempfile.mkstemp()
        os.close(file)
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
        ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        call = (printed, ranks if world > 1 else {}, function, arguments)
        process = server.Process(target=begin, args=call)
        process.printed = printed
        with one_at_a_time:
            process.start()
        processes.append(process)
    return processes


def begin(printed, ranks, function, arguments):
    """Prepare such a process, then call the function."""
    output = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)  # and so for all that this process starts
    os.dup2(output, 2)
    gc.freeze()  # what the server has loaded need not be searched for garbage, and so not copied
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same numbers on every machine
    os.environ.update({name: str(value) for name, value in ranks.items()})
    multiprocessing.set_start_method("fork", force=True)  # for the data loader's own processes
    function(*arguments)


def finish(processes, seconds=120):
    """Wait for the processes to end, print what they have printed, and return their exit codes."""
    for process in processes:
        wait([process.sentinel], seconds)
        with one_at_a_time:
            process.join(0)
        with open(process.printed, errors="replace") as file:
            print(file.read(), end="")
        os.remove(process.printed)
    return [process.exitcode for process in processes]


def program(file, arguments, folder, name):
    """Do, as a function for start(), `cd folder; python file arguments >>name.out 2>>name.err`."""
    os.chdir(folder)
    sys.argv = [str(file), *arguments]
    with open(f"{name}.out", "a") as sys.stdout, open(f"{name}.err", "a") as sys.stderr:
        runpy.run_path(str(file), run_name="__main__")
