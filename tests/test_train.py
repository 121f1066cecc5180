"""train.py: the schedule, the order of the images, checkpoints, and small runs from the first step to the last line."""

import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torchvision.io import write_png

import eval as evaluation
import train
from moe import MoE
from vit import vit_nano

ROOT = Path(__file__).resolve().parent.parent
TINY = "--data shapes:96 --model vit_nano --batch-size 32 --workers 0".split()  # 3 steps per epoch


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Runs write into an empty folder without waiting for the disk, validate on 40 pictures, and leave the signal handlers
    as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(evaluation, "draw_shapes", functools.partial(evaluation.draw_shapes, n=128))  # and not 500 at a time
    small = {"train": lambda n: (n, 1), "val": lambda n: (40, 2)}
    monkeypatch.setattr(evaluation, "shapes_size", lambda spec, split: small[split](int(spec.split(":")[1])))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(*flags):
    """The whole program, as `python train.py <flags>` would run it."""
    train.main(train.parse_args([*TINY, *flags]))


def make_folder(root, classes=("cat", "dog"), images=6, size=(12, 10)):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(images):
            write_png(torch.full((3, *size), 100 * label + i, dtype=torch.uint8), str(root / name / f"{i}.png"))


# ---------------------------------------------------------------- configuration


@pytest.mark.training
@pytest.mark.parametrize("flags, expected", [
    ("--model resnet", "unknown model 'resnet': expected one of convnext_nano"),
    ("--moe-layers every3", "expected one of none, every2, last2, last3"),
    ("--moe-layers stage", "'stage' does not exist in a ViT"),
    ("--moe-layers 1,9", "names block 9"),
    ("--router quadratic", "linear, cosine, l2"),
    ("--experts 4 --k 5", "k = 5.* 1 to 4"),
    ("--data nowhere", "no data at 'nowhere'"),
    ("--batch-size 31 --accumulate 2", "not a multiple of 2"),
    ("--batch-size 1000", "more than the 96 training images"),
    ("--epochs 0", "--epochs 0: expected at least 1"),
    ("--freeze-backbone", "give --init-from"),
    ("--init-from nowhere.pt", "no checkpoint at nowhere.pt"),
    ("--init-from torchvision", "torchvision has no weights for vit_nano"),
])
def test_a_wrong_flag_is_one_line_before_anything_is_written(flags, expected, tmp_path):
    """The message says what was expected, and the working folder stays empty."""
    with pytest.raises(ValueError) as error:
        run(*flags.split())
    assert expected in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.recipe
def test_the_batch_must_be_a_multiple_of_the_processes():
    """32 images cannot be shared equally by 3 processes; 30 can."""
    config = train.resolve(train.parse_args(TINY))
    with pytest.raises(ValueError, match="--batch-size 32 is not a multiple of 3 .* use 30"):
        train.fit_to_data(config, num_images=96, world=3)


@pytest.mark.recipe
def test_the_learning_rate_follows_the_batch():
    """DeiT's rule: 1e-3 at 1024 images per step, so 5e-4 at 512; a given --lr is taken as it is."""
    config = train.resolve(train.parse_args("--model vit_s --batch-size 512".split()))
    train.fit_to_data(config, num_images=10_000, world=1)
    assert config["lr"] == 5e-4
    config = train.resolve(train.parse_args("--model vit_s --batch-size 512 --lr 0.002".split()))
    train.fit_to_data(config, num_images=10_000, world=1)
    assert config["lr"] == 0.002


@pytest.mark.recipe
def test_a_flag_overrides_the_recipe():
    """What is given holds, also 0; the rest is the model's recipe; experts decay like all weights unless told otherwise."""
    config = train.resolve(train.parse_args("--model vit_s --mixup 0 --weight-decay 0.2 --experts 4".split()))
    assert (config["mixup"], config["weight_decay"], config["experts"]) == (0, 0.2, 4)
    assert (config["cutmix"], config["k"]) == (1.0, 2), "DeiT's, and the paper's two experts per token"
    assert config["expert_weight_decay"] == 0.2
    assert train.resolve(train.parse_args("--moe-layers 3,5".split()))["moe_layers"] == [3, 5]


@pytest.mark.recipe
@pytest.mark.parametrize("num_images, epochs", [(16_000, 5), (4_000, 20), (640, 50), (64, 50)])
def test_nano_models_train_for_about_as_many_steps_on_any_data(num_images, epochs):
    """1,250 steps of 64 images, in 5 to 50 epochs: 250 steps an epoch make 5, 62 make 20, 10 would make 125."""
    config = train.resolve(train.parse_args([]))
    train.fit_to_data(config, num_images, world=1)
    assert config["epochs"] == epochs


@pytest.mark.training
def test_train_and_val_must_have_the_same_classes(tmp_path):
    """The classes that only one of them has are named."""
    make_folder(tmp_path / "d" / "train", ("cat", "dog"))
    make_folder(tmp_path / "d" / "val", ("cat", "emu"))
    with pytest.raises(ValueError, match="different classes; only one of them has dog, emu"):
        run("--data", "d")


# ---------------------------------------------------------------- optimisation


@pytest.mark.optimizer
def test_learning_rate_by_hand():
    """Warmup of 2 of 10 steps to the peak 1.0, then half a cosine to 0.1 at the last step."""
    config = dict(epochs=5, warmup_epochs=1, lr=1.0, min_lr=0.1, decay="cosine")
    rates = [train.learning_rate(step, 2, config) for step in range(10)]
    assert rates[:2] == [0.5, 1.0]  # 1/2 and 2/2 of the peak
    assert math.isclose(rates[5], 0.1 + 0.9 * 0.5)  # step 5 is 4 of the 8 steps after the warmup: cos(pi/2) = 0
    assert math.isclose(rates[9], 0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)


@pytest.mark.optimizer
def test_linear_decay_by_hand():
    """The same run with --decay linear: 8 equal steps of 0.9 / 8 from the peak 1.0 down to 0.1."""
    config = dict(epochs=5, warmup_epochs=1, lr=1.0, min_lr=0.1, decay="linear")
    rates = [train.learning_rate(step, 2, config) for step in range(10)]
    for i, rate in enumerate(rates[1:]):
        assert math.isclose(rate, 1.0 - i * 0.9 / 8)


@pytest.mark.optimizer
def test_vmoe_warms_up_for_10000_steps():
    """V-MoE-S/32 on ImageNet: 1,281,167 images in batches of 8,192 are 156 steps per epoch."""
    config = dict(train.RECIPES["vmoe_s32"])
    rates = [train.learning_rate(step, 1_281_167 // 8192, config) for step in (4_999, 9_999, 10_000)]
    assert math.isclose(rates[0], 3e-3 / 2) and rates[1] == 3e-3 and rates[2] < 3e-3


@pytest.mark.optimizer
def test_ema_decay_by_hand():
    """(1 + step) / (10 + step), until that is more than the flag's decay: 0.9999 = 89,991 / 90,000 from step 89,990 on."""
    assert [train.ema_decay(step, 0.9999) for step in (0, 8, 90)] == [1 / 10, 9 / 18, 91 / 100]
    assert train.ema_decay(89_989, 0.9999) < 0.9999 == train.ema_decay(89_991, 0.9999)


@pytest.mark.optimizer
def test_sigmoid_loss_by_hand():
    """Each class is a yes or no: -log sigmoid(2) for the true one, -log(1 - sigmoid(0)) = log 2 for the other."""
    logits, config = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), dict(loss="sigmoid", label_smoothing=0.0)
    expected = math.log(1 + math.exp(-2)) + math.log(2)  # the same for both images, so also their mean
    assert math.isclose(train.classification_loss(logits, torch.tensor([0, 1]), config).item(), expected, rel_tol=1e-6)
    mixed = train.classification_loss(logits, torch.tensor([[0.5, 0.5], [0.5, 0.5]]), config).item()
    other = math.log(1 + math.exp(2)) + math.log(2)  # the loss with the wrong label; half and half is the mean of the two
    assert math.isclose(mixed, (expected + other) / 2, rel_tol=1e-6), "mixed targets"


@pytest.mark.optimizer
def test_what_decays_and_what_does_not():
    """Weights decay, expert weights with their own rate; norms, biases, embeddings and class token do not."""
    model = vit_nano(num_classes=4, moe_layers="last2", router="cosine")
    rate = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in train.parameter_groups(model, weight_decay=0.05, expert_weight_decay=0.2):
        rate |= {names[id(p)]: group["weight_decay"] for p in group["params"]}
    assert set(rate) == set(names.values()), "every parameter must be in exactly one group"
    expected = {"head.weight": 0.05, "blocks.1.mlp.experts.3.0.weight": 0.2,
                "blocks.1.mlp.experts.0.2.weight": 0.2, "blocks.1.mlp.router.proj": 0.05,
                "blocks.1.mlp.experts.0.0.bias": 0.0, "blocks.1.mlp.experts.3.2.bias": 0.0,
                "blocks.1.mlp.router.log_scale": 0.0, "pos_embed": 0.0, "class_token": 0.0, "head.bias": 0.0,
                "blocks.0.norm1.weight": 0.0, "patch_embed.weight": 0.05}
    assert {name: rate[name] for name in expected} == expected


@pytest.mark.optimizer
def test_mixup_blends_pictures_and_cutmix_cuts_them():
    """Of one black and one white picture MixUp makes even greys, CutMix black and white with a rectangle of the other."""
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    for name in ("mixup", "cutmix"):
        mixer = train.make_mixer(dict(mixup=0, cutmix=0) | {name: 1.0}, num_classes=2)
        values = [mixer(images, torch.tensor([0, 1]))[0][0].unique() for _ in range(5)]  # of the first picture
        if name == "mixup":
            assert all(len(v) == 1 and 0 < v < 1 for v in values), "one grey for the whole picture"
        else:
            assert all(set(v.tolist()) <= {0.0, 1.0} for v in values), "pixels are taken, not blended"
    assert train.make_mixer(dict(mixup=0, cutmix=0), num_classes=2) is None


@pytest.mark.optimizer
def test_mixed_targets_sum_to_one():
    """MixUp and CutMix make two-class targets: probabilities, one row per image."""
    for name in ("mixup", "cutmix"):
        mixer = train.make_mixer(dict(mixup=0, cutmix=0) | {name: 1.0}, num_classes=5)
        images, targets = mixer(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
        assert targets.shape == (4, 5) and images.shape == (4, 3, 8, 8)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))


# ---------------------------------------------------------------- the order of the images


def order(rank, world, accumulate=1, epoch=0, first_step=0):
    batches = train.Batches(22, 8, accumulate, seed=3, rank=rank, world=world)
    batches.epoch, batches.first_step = epoch, first_step
    return [[index for _, index in batch] for batch in batches]


@pytest.mark.batches
def test_an_epoch_shows_no_image_twice():
    """22 images in steps of 8: two steps of different images, the incomplete third is left out."""
    shown = sum(order(0, 1), [])
    assert len(shown) == 16 and len(set(shown)) == 16


@pytest.mark.batches
def test_a_step_has_the_same_images_at_every_world_size():
    """What two processes load for step 1, together and in parts, is what one process loads for it."""
    alone = order(0, 1)
    for step in range(2):
        halves = order(0, 2)[step] + order(1, 2)[step]
        assert sorted(halves) == sorted(alone[step])
    quarters = order(0, 2, accumulate=2)
    assert sorted(quarters[0] + quarters[1]) == sorted(order(0, 2)[0])


@pytest.mark.batches
def test_epochs_differ_and_can_be_entered_in_the_middle():
    """Each epoch has its own order; starting at step 1 gives that epoch's second step."""
    assert order(0, 1, epoch=0) != order(0, 1, epoch=1)
    assert order(0, 1, epoch=1, first_step=1) == order(0, 1, epoch=1)[1:]


@pytest.mark.batches
def test_accumulation_splits_a_share_in_order():
    """Two passes of half a process's share each, and together that share, image by image."""
    whole, halves = order(1, 2), order(1, 2, accumulate=2)
    assert [a + b for a, b in zip(halves[::2], halves[1::2])] == whole and len(halves[0]) == 2


@pytest.mark.batches
def test_seeds_of_neighbours_are_far_apart():
    """Seeds depend on each number and on the order, fill 32 bits, and neighbouring images draw nothing alike."""
    seeds = {train.draw_seed(*numbers) for numbers in itertools.product(range(20), repeat=3)}
    assert len(seeds) == 8000 and all(0 <= seed < 2 ** 32 for seed in seeds)
    assert train.draw_seed(1, 2, 3) == train.draw_seed(1, 2, 3) != train.draw_seed(1, 3, 2)
    draws = [torch.rand(50, generator=torch.Generator().manual_seed(train.draw_seed(0, 0, i))) for i in range(20)]
    assert torch.corrcoef(torch.stack(draws)).fill_diagonal_(0).abs().max() < 0.6, "50 draws: chance gives up to about 0.5"


@pytest.mark.batches
@pytest.mark.parametrize("flags", ["--model vit_s --image-size 24", "--model convnext_nano --image-size 16"])
def test_a_training_image_has_the_size_asked_for(flags):
    """With or without a random crop, uint8 (3, H, W) becomes uint8 (3, S, S)."""
    config = train.resolve(train.parse_args(flags.split()))
    image = train.train_transform(config)(torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8))
    assert image.shape == (3, config["image_size"], config["image_size"]) and image.dtype == torch.uint8


@pytest.mark.batches
def test_augmentation_depends_on_seed_epoch_and_image_alone():
    """Asked in any order, after any other draws, an item is the same; another epoch gives another crop."""
    config = train.resolve(train.parse_args("--model vit_s --image-size 32".split()))
    data = train.Augmented(evaluation.Shapes(4, 1, train.train_transform(config)), seed=0)
    first = data[0, 2][0]
    torch.manual_seed(99)
    data[0, 1]
    assert torch.equal(data[0, 2][0], first)
    assert not torch.equal(data[1, 2][0], first)
    before = torch.get_rng_state()
    data[0, 0]
    assert torch.equal(torch.get_rng_state(), before), "loading in the main process must not disturb its other draws"


# ---------------------------------------------------------------- whole runs


@pytest.mark.training
def test_accumulation_changes_nothing_but_memory():
    """Two passes of 16 images are one step of 32: the same losses (without noise and capacity, which see a pass at a time)."""
    for passes in ("1", "2"):
        run("--epochs", "2", "--accumulate", passes, "--router-noise", "0", "--balance-weight", "0", "--out", passes)
    losses = [[json.loads(line)["train_loss"] for line in open(f"{passes}/log.jsonl")] for passes in ("1", "2")]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), atol=1e-5, rtol=0)


@pytest.mark.training
def test_the_gradient_of_two_passes_is_that_of_one(monkeypatch):
    """Each pass counts half. (Losses would hardly show it: Adam and clipping undo a factor common to all gradients.)"""
    gradients, agree = [], train.agree

    def keep_gradient(run, *noticed):
        gradients.append(run.model.head.weight.grad.clone())
        agree(run, *noticed)

    monkeypatch.setattr(train, "agree", keep_gradient)
    for passes in ("1", "2"):
        run("--epochs", "1", "--accumulate", passes, "--router-noise", "0", "--balance-weight", "0", "--clip-grad", "0")
    torch.testing.assert_close(gradients[3], gradients[0], msg=lambda m: f"of the first of 3 steps; a factor 2? {m}")


@pytest.mark.training
def test_a_run_leaves_checkpoints_and_a_log(capsys):
    """Two epochs of three steps: last.pt, best.pt, two lines of log with the promised fields, and the next commands."""
    run("--epochs", "2", "--out", "r")
    assert sorted(os.listdir("r")) == ["best.pt", "last.pt", "log.jsonl"]
    lines = [json.loads(line) for line in open("r/log.jsonl")]
    assert [line["epoch"] for line in lines] == [1, 2] and [line["step"] for line in lines] == [3, 6]
    fields = "epoch step lr train_loss balance_loss val_loss top1 top5 images_per_s data_wait seconds dropped load"
    assert set(fields.split()) <= set(lines[0])
    assert len(lines[0]["load"]) == 2, "one list per MoE layer"
    assert all(math.isclose(sum(shares), 1) for shares in lines[0]["load"])
    out = capsys.readouterr().out
    assert "python eval.py r/best.pt --data shapes:96" in out and "python inspect_experts.py r/best.pt" in out


@pytest.mark.training
def test_the_log_and_eval_agree(capsys):
    """The accuracy in the log is the one that eval.py's functions find for the checkpoint."""
    run("--epochs", "1", "--out", "r")
    model, checkpoint = evaluation.load_checkpoint("r/last.pt", torch.device("cpu"))
    data = evaluation.open_dataset("shapes:96", "val")
    loader = evaluation.eval_loader(data, 7, 0, torch.device("cpu"))
    found = evaluation.evaluate(model, loader, torch.device("cpu"), checkpoint["mean"], checkpoint["std"])
    assert found["top1"] == json.loads(open("r/log.jsonl").readline())["top1"]
    assert checkpoint["classes"] == data.classes


@pytest.mark.training
def test_training_learns():
    """Two pictures of different classes, repeated: the loss falls from ln 2 towards 0."""
    make_folder(Path("d/train"), images=8)
    make_folder(Path("d/val"), images=2)
    run("--data", "d", "--epochs", "20", "--batch-size", "8", "--out", "r")
    losses = [json.loads(line)["train_loss"] for line in open("r/log.jsonl")]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.training
def test_an_interrupted_run_ends_like_an_uninterrupted_one(monkeypatch):
    """SIGTERM in the middle of epoch 2: saved, exit status 143; continued, every bit of the result is the same."""
    flags = "--epochs 3 --ema 0.9 --mixup 0.2 --cutmix 1 --erasing 0.5 --drop-path 0.2 --capacity-factor 1.05".split()
    run(*flags, "--out", "whole")
    original, calls = train.agree, []

    def agree_and_interrupt(*arguments):
        calls.append(1)
        if len(calls) == 5:  # in the second of epoch 2's three steps
            os.kill(os.getpid(), signal.SIGTERM)
        original(*arguments)

    monkeypatch.setattr(train, "agree", agree_and_interrupt)
    with pytest.raises(SystemExit) as stop:
        run(*flags, "--out", "broken")
    assert stop.value.code == 143
    saved = torch.load("broken/last.pt", weights_only=True)
    assert (saved["epoch"], saved["step"]) == (1, 5)
    monkeypatch.setattr(train, "agree", original)
    run(*flags, "--out", "broken")

    whole, broken = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("whole", "broken"))
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][name], broken[part][name]) for name in whole[part]), part
    for key, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(state[name], broken["optimizer"]["state"][key][name]) for name in state)
    timing = ("seconds", "images_per_s", "data_wait")
    logs = [[{k: v for k, v in json.loads(line).items() if k not in timing} for line in open(f"{name}/log.jsonl")]
            for name in ("whole", "broken")]
    assert logs[0] == logs[1]


@pytest.mark.training
def test_a_finished_run_says_so(capsys):
    """The same command again trains nothing and shows the result."""
    run("--epochs", "1", "--out", "r")
    before = Path("r/last.pt").read_bytes()
    capsys.readouterr()
    run("--epochs", "1", "--out", "r")
    assert "finished after epoch 1" in (out := capsys.readouterr().out) and "best top-1" in out
    assert Path("r/last.pt").read_bytes() == before


@pytest.mark.training
def test_another_configuration_does_not_continue_a_run():
    """The differing options are named with both values, and the run is left alone."""
    run("--epochs", "1", "--out", "r")
    with pytest.raises(ValueError, match=r"another configuration \(--experts 8 there, 4 now\)"):
        run("--epochs", "1", "--out", "r", "--experts", "4")


@pytest.mark.training
def test_runs_are_numbered():
    """Without --out every run gets a folder of its own."""
    run("--epochs", "1")
    run("--epochs", "1")
    assert sorted(os.listdir("runs")) == ["vit_nano-shapes-96-1", "vit_nano-shapes-96-2"]


@pytest.mark.training
def test_a_truncated_checkpoint_is_not_overwritten():
    """It is named, the best one is offered in its place, and no file changes."""
    run("--epochs", "1", "--out", "r")
    whole = Path("r/last.pt").read_bytes()
    Path("r/last.pt").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="r/last.pt cannot be opened.*copy r/best.pt over it"):
        run("--epochs", "1", "--out", "r")
    assert Path("r/last.pt").read_bytes() == whole[:1000]


@pytest.mark.training
def test_a_checkpoint_that_would_run_code_is_refused():
    """A last.pt that carries a command is reported, and the command has not run."""

    class Command:
        def __reduce__(self):
            return os.mkdir, ("proof",)

    os.mkdir("r")
    torch.save(dict(args=Command()), "r/last.pt")
    with pytest.raises(ValueError, match="r/last.pt cannot be opened"):
        run("--epochs", "1", "--out", "r")
    assert not os.path.exists("proof")


@pytest.mark.training
def test_ema_by_formula(monkeypatch):
    """The averaged weights start as those of step 0, then become d * average + (1 - d) * weights, d = ema_decay(step, 0.3)."""
    seen, step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda r, parts: (step(r, parts), seen.append(r.model.head.weight.detach().clone())))
    run("--epochs", "2", "--ema", "0.3", "--out", "r")
    average = seen[0]
    for weights, decay in zip(seen[1:], (2 / 11, 3 / 12, 0.3, 0.3, 0.3), strict=True):  # 4 / 13 would be more than 0.3
        average = decay * average + (1 - decay) * weights
    checkpoint = torch.load("r/last.pt", weights_only=True)
    assert checkpoint["ema"]["head.weight"].dtype == torch.float32
    torch.testing.assert_close(checkpoint["ema"]["head.weight"], average)
    assert {"ema_top1", "ema_val_loss"} <= set(json.loads(open("r/log.jsonl").readline())), "evaluated, too"


@pytest.mark.recipe
def test_every_value_of_a_recipe_has_a_flag():
    """Whatever a recipe sets can be overridden on the command line (but for the batch that its lr belongs to, and nano's steps)."""
    for recipe in [*train.RECIPES.values(), train.CONVNEXT_TUNE, train.VIT_TUNE]:
        assert set(recipe) - {"lr_batch", "steps"} <= set(vars(train.parse_args([])))


@pytest.mark.training
def test_a_full_disk_leaves_the_old_checkpoint(monkeypatch, capsys):
    """When the new file cannot be written the old one is still there, and the message says so."""
    run("--epochs", "1", "--out", "r")
    before = Path("r/last.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.os, "fsync", full)
    state = train.prepare(train.parse_args([*TINY, "--epochs", "1", "--out", "r"]))
    train.save(state, "last.pt")
    assert Path("r/last.pt").read_bytes() == before and not Path("r/last.pt.tmp").exists()
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.training
def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch):
    """The message names step, lr and the last good checkpoint, and the weights are still finite."""
    monkeypatch.setattr(train, "normalize", lambda images, mean, std: images.float() * float("nan"))
    with pytest.raises(FloatingPointError, match=r"not finite at step 0 .* lr .*r/last.pt"):
        run("--epochs", "1", "--out", "r")
    assert not os.path.exists("r/last.pt")


@pytest.mark.training
def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch):
    """The loss is fine, its gradient is not: noticed before it reaches the weights, also without --clip-grad."""
    loss = train.classification_loss
    monkeypatch.setattr(train, "classification_loss", lambda *args: 0 * (loss(*args) - loss(*args).detach()).sqrt() + 1)
    with pytest.raises(FloatingPointError, match=r"step 0 .* cross-entropy 1, .* gradient nan"):
        run("--epochs", "1", "--clip-grad", "0", "--out", "r")
    assert not os.path.exists("r/last.pt")


@pytest.mark.training
def test_an_unreadable_training_image_is_reported_once_and_replaced(capsys):
    """Three epochs meet the broken file three times: one warning with its path, counted in the log."""
    make_folder(Path("d/train"), images=4)
    make_folder(Path("d/val"), images=2)
    Path("d/train/cat/1.png").write_bytes(b"not an image")
    run("--data", "d", "--epochs", "3", "--batch-size", "8", "--out", "r")
    assert capsys.readouterr().err.count("d/train/cat/1.png") == 1
    assert [json.loads(line)["unreadable"] for line in open("r/log.jsonl")] == [1, 1, 1]


@pytest.mark.training
def test_routing_is_counted_before_anything_is_dropped():
    """Three tokens choose expert 0, which keeps two: the count says 3 chosen, 1 dropped."""
    routing = SimpleNamespace(experts=torch.tensor([[0], [0], [1], [0]]), kept=torch.tensor([[True], [True], [True], [False]]))
    assert train.count_routing([routing], num_experts=3).tolist() == [[3, 1, 0, 1]]


@pytest.mark.training
def test_dense_models_train_too():
    """--moe-layers none: no MoE layer, balance loss 0."""
    run("--epochs", "1", "--out", "r", "--moe-layers", "none")
    model, _ = evaluation.load_checkpoint("r/last.pt", torch.device("cpu"))
    assert not any(isinstance(module, MoE) for module in model.modules())
    assert json.loads(open("r/log.jsonl").readline())["balance_loss"] == 0


@pytest.mark.training
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiled_run_is_the_same_run(dtype, monkeypatch):
    """--compile gives the same losses, and a checkpoint that any program reads."""
    compile, compiled = torch.compile, []

    def trace(model):  # only the tracing: test_models.py goes on from there
        compiled.append(model)
        return compile(model, backend="eager")

    monkeypatch.setattr(torch, "compile", trace)
    # No noise, whose draws may differ; always 40 pictures, so that two graphs suffice.
    flags = ["--epochs", "1", "--data", "shapes:120", "--batch-size", "40", "--moe-layers", "3",
             "--router-noise", "0", "--dtype", dtype]
    run(*flags, "--out", "plain")
    run(*flags, "--out", "compiled", "--compile")
    assert len(compiled) == 1
    assert state("plain/last.pt").keys() == state("compiled/last.pt").keys()
    plain = json.loads(open("plain/log.jsonl").readline())
    traced = json.loads(open("compiled/log.jsonl").readline())
    for loss in ("train_loss", "balance_loss", "val_loss"):
        # In bfloat16 the compiled run takes grouped_mm, which rounds otherwise than the loop.
        tolerance = 1e-4 if dtype == "float32" else 2e-2
        assert traced[loss] == pytest.approx(plain[loss], abs=tolerance)


# ---------------------------------------------------------------- real processes


@pytest.mark.training
@pytest.mark.slow
def test_torchrun_with_two_processes(tmp_path):
    """Two processes on a CPU finish an epoch; only one of them prints and writes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "train.py"),
               "--epochs", "1", "--data", "shapes:128", "--model", "vit_nano", "--out", "r"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90,
                            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("best top-1") == 1
    assert len(open(tmp_path / "r" / "log.jsonl").readlines()) == 1


# ---------------------------------------------------------------- starting from other weights


def state(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.training
def test_a_run_of_the_old_layout_is_not_continued():
    """Experts were stacked weights once: one line says so, and the files stay as they are."""
    run("--epochs", "1", "--out", "old")
    checkpoint = torch.load("old/last.pt", weights_only=True)
    checkpoint["model"]["blocks.1.mlp.experts.w1"] = torch.zeros(8, 64, 256)
    torch.save(checkpoint, "old/last.pt")
    with pytest.raises(ValueError, match="old/last.pt is from an older version"):
        run("--epochs", "1", "--out", "old")
    assert "blocks.1.mlp.experts.w1" in state("old/last.pt")


@pytest.mark.training
def test_a_dense_checkpoint_starts_a_sparse_run():
    """--init-from a dense run of ours upcycles: at learning rate 0 the sparse model stays, and is, the dense one."""
    run("--moe-layers", "none", "--epochs", "1", "--out", "dense")
    run("--moe-layers", "last2", "--epochs", "1", "--init-from", "dense/last.pt", "--lr", "0", "--min-lr", "0", "--out", "sparse")
    images = torch.randn(4, 3, 32, 32)
    dense, sparse = (evaluation.load_checkpoint(f"{name}/last.pt", "cpu")[0] for name in ("dense", "sparse"))
    assert sparse.moe_blocks and not dense.moe_blocks
    torch.testing.assert_close(sparse(images), dense(images), atol=1e-5, rtol=1e-5)


@pytest.mark.training
def test_a_linear_probe_trains_the_head_only(capsys, tmp_path):
    """--freeze-backbone: everything but the head keeps its bits; the head for other classes is fresh, and announced."""
    run("--epochs", "1", "--moe-layers", "last2", "--out", "first")
    make_folder(tmp_path / "photos", ("cat", "dog", "emu"), images=20, size=(32, 32))
    run("--data", "photos", "--init-from", "first/last.pt", "--freeze-backbone", "--moe-layers", "last2", "--epochs", "2",
        "--drop-path", "0.5", "--out", "probe")
    assert "from first/last.pt, fresh: head.weight, head.bias" in capsys.readouterr().out
    before, after = state("first/last.pt"), state("probe/last.pt")
    changed = [name for name in before if before[name].shape != after[name].shape or (before[name] != after[name]).any()]
    assert changed == ["head.weight", "head.bias"]


@pytest.mark.training
def test_frozen_layers_work_as_in_evaluation(monkeypatch):
    """A frozen backbone has no drop path and no router noise: its features are those that evaluation will see."""
    run("--epochs", "1", "--out", "first")
    modes, step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda r, parts: (modes.append(r.model.training), step(r, parts)))
    run("--epochs", "1", "--init-from", "first/last.pt", "--freeze-backbone", "--out", "probe")
    assert modes == [False] * 3


@pytest.mark.training
def test_a_continued_run_does_not_start_from_the_other_weights_again(monkeypatch):
    """--init-from holds for the start: on the second call the run's own checkpoint counts."""
    run("--epochs", "1", "--out", "first")
    again = ("--epochs", "1", "--init-from", "first/last.pt", "--out", "second")
    run(*again)
    monkeypatch.setattr(train, "start_from", lambda *_: pytest.fail("the weights were loaded again"))
    run(*again)


@pytest.mark.training
def test_torchvisions_weights_placed_by_hand(tmp_path, monkeypatch):
    """Without a network a file in torch's cache is used; its values arrive in our model."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "hub" / "checkpoints").mkdir(parents=True)
    weights = torchvision.models.convnext_tiny().state_dict()
    torch.save(weights, tmp_path / "cache" / "hub" / "checkpoints" / "convnext_tiny-983f1562.pth")
    model = evaluation.build_model(dict(model="convnext_t", num_classes=1000))
    assert train.start_from(model, dict(init_from="torchvision", model="convnext_t")) == []
    assert torch.equal(model.head.weight, weights["classifier.2.weight"])


@pytest.mark.training
def test_without_a_network_the_file_to_place_is_named(tmp_path, monkeypatch):
    """One line says what to download, from where, and where to put it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(ValueError, match=r"download https://\S+/convnext_tiny-983f1562.pth by hand and place it at (\S+)") as error:
        train.torchvision_weights("convnext_t")
    assert str(tmp_path / "cache" / "hub" / "checkpoints" / "convnext_tiny-983f1562.pth") in str(error.value)
    with pytest.raises(ValueError, match="no weights for convnext_nano: expected one of vit_b, "):
        train.torchvision_weights("convnext_nano")


def unreachable(*args, **kwargs):
    raise OSError("Name or service not known")


@pytest.mark.recipe
@pytest.mark.parametrize("model, expected", [("convnext_t", (30, 5e-5, 1e-8)), ("vit_s", (50, 3e-4, 0.02)),
                                             ("vit_nano", (None, None, 0.05))])
def test_fine_tuning_has_its_own_recipe(model, expected):
    """With --init-from epochs, learning rate at the recipe's batch, and weight decay are those published for fine-tuning."""
    config = train.resolve(train.parse_args(["--model", model, "--init-from", "x.pt"]))
    recipe = train.find_recipe(config)
    assert (recipe.get("epochs"), recipe["lr"] if expected[1] else None, config["weight_decay"]) == expected
