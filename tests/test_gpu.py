"""Where would a GPU wait? These tests find it on a machine that has none.

A GPU computes what it is told in its own time, while Python tells it the next thing. It waits, and
half its speed is lost, if Python asks for a value (.item(), .tolist(), `if`, a shape that depends
on the data) or copies between CPU and GPU. FakeTensorMode gives tensors that claim to be on a GPU
and have no data. So a value cannot be asked for: torch raises an error. NoCopies sees the copies.
backward() cannot be tried like this. What is marked `gpu` runs on a real one only.
"""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from convnext import convnext_nano
from moe import balance_loss, make_moe
from vit import vit_nano

GPU = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch without CUDA")


class NoCopies(TorchDispatchMode):
    """Every operation of torch passes here. Fail at one that copies between CPU and GPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if operation in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[operation is torch.ops.aten.copy_.default]  # copy_(target, source)
            moved = source.device.type != result.device.type
            assert not moved or kwargs.get("non_blocking"), f"a GPU waits for {operation}"
        return result


@contextmanager
def imagined_gpu(monkeypatch, capability=(9, 0)):
    """Let tensors be "on a GPU" of a compute capability, and fail where it would be waited for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    with FakeTensorMode(allow_non_fake_inputs=True), NoCopies():
        yield


def call_on_gpu(module, *args, **kwargs):
    """Call a module of the CPU as if its weights were on the GPU, under bfloat16 autocast."""
    weights = {name: torch.empty_like(w, device=GPU) for name, w in module.state_dict().items()}
    with torch.autocast("cuda", torch.bfloat16):
        return torch.func.functional_call(module, weights, args, kwargs)


@pytest.mark.grouped
@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(),
    lambda x: 1 if x.sum() > 0 else 0,
    lambda x: x[x > 0],
    lambda x: x.long().bincount(minlength=4),
    lambda x: x.__setitem__(-1, torch.ones(())),
    lambda x: torch.tensor([1.0, 2.0], device=x.device),
    lambda x: x.cpu()], ids=["item", "if", "mask", "bincount", "set one", "list", "copy"])
def test_a_wait_is_noticed(wait, monkeypatch):
    """Seven ways to make a GPU wait, each of which looks harmless."""
    with imagined_gpu(monkeypatch):
        x = call_on_gpu(make_moe(8, 16, 2, 1, "linear", 4), torch.empty(4, 8, device=GPU))[0]
        with pytest.raises((AssertionError, RuntimeError)):
            wait(x[:, 0])


ROUTERS = [
    pytest.param("linear", marks=pytest.mark.grouped),
    pytest.param("cosine", marks=pytest.mark.grouped),
    pytest.param("l2", marks=pytest.mark.grouped),
    pytest.param("expert_choice", marks=pytest.mark.expert_choice),
    pytest.param("soft", marks=pytest.mark.soft)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_no_layer_makes_a_gpu_wait(router, training, monkeypatch):
    """Neither with slots for all nor with few: the counts of the experts stay on the GPU."""
    for factor in (None,) if router in ("expert_choice", "soft") else (None, 1.05):
        options = {} if factor is None else dict(capacity_factor=factor, eval_capacity_factor=2.0)
        layer = make_moe(32, 64, 4, 2, router, 17, **options).train(training)
        with imagined_gpu(monkeypatch):
            x = torch.empty(3, 17, 32, device=GPU)
            y, routing = call_on_gpu(layer, x)
        assert y.device.type == routing.balance_loss.device.type == "cuda" and y.shape == x.shape


@pytest.mark.grouped
@pytest.mark.parametrize("capability, path", [
    ((8, 0), "loop"),  # A100
    ((9, 0), "grouped"),  # H100, H200
    ((10, 0), "grouped"),  # B200
    ((12, 0), "loop")])  # RTX 50
def test_only_some_gpus_have_the_kernel(capability, path, monkeypatch):
    """Where torch has no kernel it loops itself, and waits six times: our loop waits once."""
    layer, taken = make_moe(32, 64, 4, 2, "linear", 17), []
    for name in ("loop", "grouped"):
        def note(rows, counts, name=name):
            taken.append(name)
            return rows
        monkeypatch.setattr(layer.experts, name, note)
    with imagined_gpu(monkeypatch, capability):
        call_on_gpu(layer, torch.empty(5, 32, device=GPU))
    assert taken == [path]


@pytest.mark.grouped
@pytest.mark.parametrize("preset", [vit_nano, convnext_nano])
@pytest.mark.parametrize("training", [True, False])
def test_no_model_makes_a_gpu_wait(preset, training, monkeypatch):
    """From images to logits and the balance loss, in training and in evaluation."""
    model = preset(5, moe_layers="last2", num_experts=4, drop_path=0.1).train(training)
    with imagined_gpu(monkeypatch):
        images = torch.empty(6, 3, 32, 32, device=GPU)
        logits, routings = call_on_gpu(model, images, return_routing=True)
        total = logits.float().logsumexp(1).mean() + balance_loss(routings)
    assert logits.device.type == total.device.type == "cuda" and len(routings) == 2
