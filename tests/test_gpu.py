"""Where would a GPU wait? These tests find it on a machine that has none.

A GPU computes what it is told in its own time, while Python tells it the next thing. It waits, and
half its speed is lost, if Python asks for a value (.item(), .tolist(), `if`, a shape that depends
on the data) or copies between CPU and GPU. FakeTensorMode gives tensors that claim to be on a GPU
and have no data. So a value cannot be asked for: torch raises an error. NoCopies sees the copies.
backward() and the optimizer cannot be tried like this: tests marked `gpu` need a real one.
"""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import eval as evaluation
import train
from convnext import convnext_nano
from moe import balance_loss, make_moe
from vit import vit_nano

GPU = torch.device("cuda")
pytestmark = [pytest.mark.edge, pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="torch without CUDA")]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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
    # Mean and deviation of the colours are there already: they are brought to the GPU once.
    monkeypatch.setattr(evaluation, "per_colour", lambda *_: torch.ones(3, 1, 1, device=GPU))
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
@pytest.mark.parametrize("wait", [torch.Tensor.item, torch.Tensor.nonzero, torch.Tensor.cpu])
def test_a_wait_is_noticed(wait, monkeypatch):
    """A value, a shape that depends on the data, a copy: a GPU would wait for each of them."""
    with imagined_gpu(monkeypatch):
        y, _ = call_on_gpu(make_moe(8, 16, 2, 1, "linear", 4), torch.empty(4, 8, device=GPU))
        with pytest.raises((AssertionError, RuntimeError)):
            wait(y[0, 0])


@pytest.mark.grouped
@pytest.mark.parametrize("capability, path", [
    ((8, 0), "loop"), ((9, 0), "grouped"), ((10, 0), "grouped"), ((12, 0), "loop"),
], ids=["A100", "H100", "B200", "RTX 50"])
def test_only_some_gpus_have_the_kernel(capability, path, monkeypatch):
    """Where torch has no kernel it loops itself, and waits six times: our loop waits once."""
    layer, taken = make_moe(32, 64, 4, 2, "linear", 17), []
    for name in ("loop", "grouped"):
        monkeypatch.setattr(layer.experts, name,
                            lambda rows, counts, name=name: taken.append(name) or rows)
    with imagined_gpu(monkeypatch, capability):
        call_on_gpu(layer, torch.empty(5, 32, device=GPU))
    assert taken == [path]


def of(concept, *values):
    return pytest.param(*values, marks=getattr(pytest.mark, concept))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("preset, options", [
    of("grouped", vit_nano, dict(router="linear", capacity_factor=1.05)),
    of("grouped", vit_nano, dict(router="cosine")),
    of("grouped", convnext_nano, dict(router="l2", drop_path=0.1)),
    of("expert_choice", vit_nano, dict(router="expert_choice")),
    of("soft", vit_nano, dict(router="soft"))])
def test_no_model_makes_a_gpu_wait(preset, options, training, monkeypatch):
    """From images to logits and the balance loss: the counts of the experts stay on the GPU."""
    model = preset(5, moe_layers="last2", num_experts=4, **options).train(training)
    with imagined_gpu(monkeypatch):
        images = torch.empty(6, 3, 32, 32, device=GPU)
        logits, routings = call_on_gpu(model, images, return_routing=True)
        total = logits.float().logsumexp(1).mean() + balance_loss(routings)
    assert logits.device.type == total.device.type == "cuda" and len(routings) == 2


@pytest.mark.counting
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_an_evaluation_waits_only_at_its_end(loss, monkeypatch):
    """No batch makes a GPU wait. After the last one all predictions are brought to the CPU."""
    images, labels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2).long()
    loader, seen = [(images, labels, labels)] * 3, []
    with imagined_gpu(monkeypatch), pytest.raises(AssertionError, match="a GPU waits for"):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 5, device=GPU))
        model.register_forward_pre_hook(lambda _, images: seen.append(images))
        evaluation.predict(model, loader, GPU, (0.5,) * 3, (0.5,) * 3, loss=loss)
    assert len(seen) == 3, "it waited before the last batch"


@pytest.mark.training
@pytest.mark.parametrize("moe_layers", ["none", "last2"])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_step_of_training_waits_once(moe_layers, loss, monkeypatch):
    """For three flags: not for the batch, the losses or the counts of the experts."""
    config = train.parse_args(f"--model vit_nano --loss {loss}".split())
    model, waits = vit_nano(5, moe_layers=moe_layers), []
    run = SimpleNamespace(config=config, device=GPU, model=model, world=1, rank=0, step=0, signal=0,
                          mixer=None, unreadable=set(), saved_at=0.0)
    batch = [torch.zeros(6, 3, 32, 32, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64),
             SimpleNamespace(tolist=lambda: [-1])]
    with imagined_gpu(monkeypatch):
        meter = train.Meter(run)
        images, targets = train.next_batch(run, iter([batch]), 0, meter)
        logits, routings = call_on_gpu(model, images, return_routing=True)
        loss = train.classification_loss(logits.float(), targets, config)
        balance = balance_loss(routings) + torch.zeros_like(loss)
        losses = torch.zeros(2, device=GPU) + torch.stack([loss, balance]).detach()
        meter.count(routings)
        meter.losses += losses
        monkeypatch.setattr(FakeTensor, "tolist", lambda flags: waits.append(flags) or [0, 0, 0])
        train.check_and_agree(run, losses, loss)
    assert len(waits) == 1 and waits[0].shape == (3,)


@pytest.mark.gpu
@pytest.mark.grouped
@needs_gpu
@pytest.mark.parametrize("capacity_factor", [None, 1.05, 0.3])
def test_a_gpu_computes_what_a_cpu_does(capacity_factor):
    """Answers and gradients of a layer in bfloat16 against float64, with idle experts."""
    layer = make_moe(64, 256, 8, 2, "linear", 49, capacity_factor=capacity_factor, router_noise=0.0)
    on_gpu = copy.deepcopy(layer).to(GPU)
    x, results = torch.randn(4, 49, 64, dtype=torch.float64), []
    for module, tokens in ((layer.double(), x), (on_gpu, x.float().to(GPU))):
        tokens = tokens.requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=module is on_gpu):
            y, routing = module(tokens)
        (y.double().square().sum() + routing.balance_loss).backward()
        gradients = [tokens.grad, *(p.grad for p in module.parameters())]
        results.append([part.double().cpu() for part in (y, *gradients)])
    for right, found in zip(*results):
        assert (found - right).norm() <= 0.03 * right.norm() + 1e-6


@pytest.mark.gpu
@pytest.mark.training
@needs_gpu
@pytest.mark.parametrize("model", ["vit_nano", "convnext_nano"])
def test_a_run_on_a_gpu_is_continued(model, tmp_path, monkeypatch):
    """Two epochs at once, and one after the other: the same losses to the precision of bfloat16."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "VAL_IMAGES", 64)
    flags = f"--data shapes:256 --model {model} --warmup-epochs 1 --ema 0.9 --out".split()
    for out, epochs in (("whole", "2"), ("parts", "1"), ("parts", "2")):
        train.main(train.parse_args([*flags, out, "--epochs", epochs, "--warmup-epochs", "0.5"]))
    whole, parts = (torch.load(f"{out}/last.pt", weights_only=True) for out in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 8
    assert abs(whole["log"][0]["train_loss"] - parts["log"][0]["train_loss"]) < 0.05
