"""What all tests share: they can import the project from anywhere, and they are small and repeatable."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tensors are small: more threads only get in each other's way

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def compile_knows_grouped_mm():
    """Older releases (2.11) trace the kernel in bfloat16 only, and the tests compile in float32."""
    try:
        rows, weights = torch.empty(4, 16, device="meta"), torch.empty(2, 16, 16, device="meta")
        torch.nn.functional.grouped_mm(rows, weights, offs=torch.empty(2, dtype=torch.int32, device="meta"))
        return True
    except RuntimeError:
        return False


needs_compile = pytest.mark.skipif(not shutil.which("g++") or not compile_knows_grouped_mm(),
                                   reason="torch.compile in float32 on a CPU needs a C++ compiler and torch above 2.11")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:The image decoding and encoding capabilities:DeprecationWarning")
    config.addinivalue_line("markers", "slow: starts processes of its own; skip with -m 'not slow'")


@pytest.fixture(autouse=True)
def same_draws_every_time():
    """Each test starts from the same seed, whatever ran before it."""
    torch.manual_seed(0)
