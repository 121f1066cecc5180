"""What all tests share: they can import the project from anywhere, and they are small and repeatable."""

import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tensors are small: more threads only get in each other's way

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:The image decoding and encoding capabilities:DeprecationWarning")
    config.addinivalue_line("markers", "slow: starts processes of its own; skip with -m 'not slow'")


@pytest.fixture(autouse=True)
def same_draws_every_time():
    """Each test starts from the same seed, whatever ran before it."""
    torch.manual_seed(0)
