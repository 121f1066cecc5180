"""train.py: the schedule, the order of the images, checkpoints, and small runs from the first step
to the last line."""

import collections
import itertools
import json
import math
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torchvision.io import write_png
from torchvision.transforms import v2

import convnext
import eval as evaluation
import train
from checks import drawn
from moe import MoE
from vit import vit_nano

ROOT = Path(__file__).resolve().parent.parent
# 3 steps per epoch
TINY = "--data shapes:96 --model vit_pico --experts 4 --batch-size 32 --workers 0".split()


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Runs write into an empty folder without waiting for the disk, validate on 40 pictures, and
    leave the signal handlers as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(evaluation, "VAL_IMAGES", 40)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(flags):
    """The whole program, as `python train.py <flags>` would run it."""
    train.main(train.parse_args([*TINY, *shlex.split(flags)]))


def resolve(flags):
    """The configuration of `python train.py <flags>`, before it has seen the data."""
    return train.parse_args(flags.split())


def make_folder(root, classes=("cat", "dog"), images=6, size=(12, 10)):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(images):
            write_png(
                torch.full((3, *size), 100 * label + i, dtype=torch.uint8),
                str(root / name / f"{i}.png"),
            )


# ---------------------------------------------------------------- configuration


@pytest.mark.training
@pytest.mark.parametrize("flags, expected", [
    ("--moe-layers every3", "expected one of none, every2, last2, last3"),
    ("--moe-layers stage", "'stage' does not exist in a ViT"),
    ("--moe-layers 1,9", "names block 9"),
    ("--router quadratic", "linear, cosine, l2"),
    ("--experts 4 --k 5", "k = 5: expected 1 to 4"),
    ("--data nowhere", "no folder 'nowhere'"),
    ("--batch-size 31 --accumulate 2",
     "expected a multiple of 2 = 1 process(es) x 2 pass(es), up to 96"),
    ("--batch-size 1000", "up to 96 images: use 96"),
    ("--freeze-backbone", "give --init-from"),
    ("--init-from nowhere.pt", "nowhere.pt is not a checkpoint"),
    ("--init-from torchvision", "torchvision has weights for vit_b, vit_b32"),
])
def test_a_wrong_flag_is_one_line_before_anything_is_written(flags, expected, tmp_path):
    """The message says what was expected, and the working folder stays empty."""
    with pytest.raises(ValueError) as error:
        run(flags)
    assert expected in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.recipe
@pytest.mark.parametrize("flag", [
    "--epochs 0", "--lr nan", "--lr -1", "--ema 1.5", "--ema 1", "--crop-ratio 0", "--k 1.5",
    "--crop-scale -1", "--randaug 20", "--label-smoothing 2", "--capacity-factor inf",
    "--mixup -1", "--weight-decay -1", "--warmup-epochs -1", "--moe-layers 1-3",
    "--expert-ratio 0", "--workers -1", "--accumulate 0", "--model resnet", "--seed -1",
    "--experts 0", "--router-noise -1", "--balance-weight -1", "--batch-size 0", "--min-lr -1",
    "--decay step", "--expert-weight-decay -1", "--layer-decay 0", "--head-scale -1",
    "--clip-grad -1", "--drop-path 1", "--loss hinge", "--cutmix -1", "--erasing 2", "--flip 2",
    "--image-size 0", "--dtype float16", "--save-every-minutes -1",
])
def test_a_number_out_of_range_is_refused(flag, capsys):
    """The last line names the flag and the value, and the exit status is 2."""
    with pytest.raises(SystemExit) as stop:
        train.parse_args(flag.split())
    name, value = flag.split()
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and name in last and value in last


@pytest.mark.recipe
def test_a_random_backbone_is_not_frozen():
    """--freeze-backbone needs weights from somewhere."""
    with pytest.raises(ValueError, match="give --init-from"):
        train.settle(resolve("--freeze-backbone"), 10_000, 100, world=1)
    train.settle(resolve("--freeze-backbone --init-from x.pt"), 10_000, 100, world=1)


@pytest.mark.recipe
def test_the_batch_must_be_a_multiple_of_the_processes():
    """32 images cannot be shared equally by 3 processes; 30 can."""
    config = resolve(" ".join(TINY))
    with pytest.raises(ValueError, match="--batch-size 32: expected a multiple of 3 = 3 .* use 30"):
        train.settle(config, 96, 40, world=3)


@pytest.mark.recipe
def test_the_learning_rate_follows_the_batch():
    """DeiT's rule: 1e-3 at 1024 images per step, so 5e-4 at 512; a given --lr is taken as it is."""
    config = resolve("--model vit_s --batch-size 512")
    train.settle(config, 10_000, 100, world=1)
    assert config.lr == 5e-4
    config = resolve("--model vit_s --batch-size 512 --lr 0.002")
    train.settle(config, 10_000, 100, world=1)
    assert config.lr == 0.002


@pytest.mark.recipe
def test_a_flag_overrides_the_recipe():
    """What is given holds, also 0; the rest is the model's recipe; experts decay like all weights
    unless told otherwise."""
    config = resolve("--model vit_s --mixup 0 --weight-decay 0.2 --experts 4")
    assert (config.mixup, config.weight_decay, config.experts) == (0, 0.2, 4)
    assert (config.cutmix, config.k) == (1.0, 2), "DeiT's, and the paper's two experts per token"
    assert config.expert_weight_decay == 0.2
    config = resolve("--moe-layers 3,5")
    assert config.moe_layers == [3, 5]


# From the sources that train.py names; drop_path is in the next table. min_lr of ViT-tune is ours.
PUBLISHED = """
                     ConvNeXt  iso     DeiT     V-MoE   ConvNeXt-tune  iso-tune  ViT-tune
    moe_layers       last2     last2   every2   last2   last2          last2     every2
    experts          4         8       8        8       8              8         8
    k                1         1       2        2       1              1         2
    expert_ratio     2         4       4        4       4              4         4
    router           linear    linear  linear   linear  linear         linear    linear
    router_noise     1         1       1        1       1              1         1
    capacity_factor  1.05      1.05    1.05     1.05    1.05           1.05      1.05
    balance_weight   0.005     0.005   0.005    0.005   0.005          0.005     0.005
    epochs           300       300     300      300     30             30        20
    base_lr          4e-3      4e-3    1e-3     3e-3    5e-5           5e-5      1e-5
    base_batch       4096      4096    1024     8192    512            512       512
    weight_decay     0.05      0.05    0.05     0.1     1e-8           1e-8      0.1
    warmup_epochs    20        50      5        64.1    0              0         5
    min_lr           1e-6      1e-6    1e-5     1e-5    1e-6           1e-6      1e-6
    decay            cosine    cosine  cosine   linear  cosine         cosine    cosine
    loss             softmax   softmax softmax  sigmoid softmax        softmax   softmax
    label_smoothing  0.1       0.1     0.1      0       0.1            0.1       0.1
    mixup            0.8       0.8     0.8      0.2     0              0         0.8
    cutmix           1         1       1        0       0              0         1
    randaug          9         9       9        10      9              9         9
    erasing          0.25      0.25    0.25     0       0.25           0.25      0
    crop_scale       0.08      0.08    0.08     0.05    0.08           0.08      0.08
    flip             1         1       1        1       1              1         1
    image_size       224       224     224      224     224            224       224
    crop_ratio       0.875     0.875   0.875    0.875   0.875          0.875     1
    ema              0.9999    0.9999  0.99996  0       0              0         0.99996
    clip_grad        0         0       0        1       0              0         0
    layer_decay      1         1       1        1       0.8            1         1
    head_scale       1         1       1        1       0.001          0.001     1
"""
PUBLISHED_OF_MODELS = """
                    from scratch: recipe, drop_path    fine-tuned: recipe, drop_path
    convnext_t      ConvNeXt  0.1                      ConvNeXt-tune  0.1
    convnext_s      ConvNeXt  0.4                      ConvNeXt-tune  0.2
    convnext_b      ConvNeXt  0.5                      ConvNeXt-tune  0.2
    convnext_iso_s  iso       0.1                      iso-tune       0.1
    convnext_iso_b  iso       0.2                      iso-tune       0.2
    vit_ti          DeiT      0.1                      ViT-tune       0.2
    vit_s           DeiT      0.1                      ViT-tune       0.2
    vit_b           DeiT      0.1                      ViT-tune       0.2
    vit_b32         DeiT      0.1                      ViT-tune       0.2
    vit_l           DeiT      0.1                      ViT-tune       0.45
    vmoe_s32        V-MoE     0                        ViT-tune       0.2
"""
MODELS_IN_TABLE = [line.split() for line in PUBLISHED_OF_MODELS.splitlines()[2:]]


@pytest.mark.recipe
@pytest.mark.parametrize("model, recipe, drop_path, tuned, tuned_drop_path", MODELS_IN_TABLE)
def test_every_hyperparameter_is_as_published(model, recipe, drop_path, tuned, tuned_drop_path):
    """Each entry of a recipe, from scratch and with --init-from, is that of the tables above."""
    header, *lines = PUBLISHED.strip().splitlines()
    for init_from, name, rate in ((None, recipe, drop_path), ("x.pt", tuned, tuned_drop_path)):
        column = 1 + header.split().index(name)
        expected = {line.split()[0]: line.split()[column] for line in lines} | dict(drop_path=rate)
        if init_from and model == "vmoe_s32":
            expected["moe_layers"] = "last2"  # its experts stay where they are
        args = SimpleNamespace(model=model, data="shapes", init_from=init_from)
        found = train.recipe_of(args)
        assert found.keys() == expected.keys()
        for option, value in found.items():
            published = expected[option] if isinstance(value, str) else float(expected[option])
            assert value == published, f"{option} is {value}, published is {published}"


@pytest.mark.recipe
def test_all_models_are_in_the_table():
    """No recipe is unchecked but those of the nano models, which are ours."""
    unchecked = set(train.RECIPES) - {model for model, *_ in MODELS_IN_TABLE}
    assert unchecked == {"convnext_nano", "vit_pico", "vit_nano", "vit_micro"}
    for model in unchecked:
        args = SimpleNamespace(model=model, data="shapes", init_from=None)
        assert "steps" in train.recipe_of(args), "as only ours"


@pytest.mark.recipe
def test_a_warm_up_fits_into_its_run():
    """Longer than the run, a recipe's becomes a tenth of the run, and a given one is refused."""
    config = resolve("--model convnext_t --epochs 5")
    train.settle(config, 10_000, 100, world=1)
    assert config.warmup_epochs == 0.5, "and not 20"
    config = resolve("--model vit_s --epochs 5 --warmup-epochs 6")
    with pytest.raises(ValueError, match="--warmup-epochs 6: expected fewer than the 5 epochs"):
        train.settle(config, 10_000, 100, world=1)
    for recipe in [*train.RECIPES.values(), *train.FINE_TUNING.values()]:
        assert recipe["warmup_epochs"] < recipe.get("epochs", 5)


@pytest.mark.recipe
def test_a_rate_never_rises_after_its_warm_up():
    """With 64 images a step the ViT's rate for fine-tuning is 1e-5 * 64 / 512, and no more at the
    end."""
    config = resolve("--model vit_s --init-from x.pt --batch-size 64 --min-lr 1e-5")
    train.settle(config, 10_000, 100, world=1)
    assert config.lr == config.min_lr == 1e-5 / 8


@pytest.mark.recipe
def test_layer_wise_decay_is_for_the_published_models():
    """The groups of layers are those of ConvNeXt T, S and B."""
    with pytest.raises(ValueError, match="--layer-decay is for convnext_t, convnext_s, convnext"):
        train.settle(resolve("--model vit_s --layer-decay 0.8"), 10_000, 100, world=1)


@pytest.mark.recipe
@pytest.mark.parametrize("num_images, epochs", [(16_000, 5), (4_000, 20), (640, 50), (64, 50)])
def test_nano_models_train_for_about_as_many_steps_on_any_data(num_images, epochs):
    """1,250 steps of 64 images, in 5 to 50 epochs: 250 steps an epoch make 5, 62 make 20, 10 would
    make 125."""
    config = resolve("--data flags")
    train.settle(config, num_images, 100, world=1)
    assert config.epochs == epochs


@pytest.mark.recipe
def test_the_first_run_is_short():
    """`python train.py` takes 2 epochs of 16,000 // 48 = 333 steps, at the peak rate of a step of
    48 images. Flags say otherwise, and no other data or model is so easy."""
    config = resolve("")
    train.settle(config, 16_000, 100, world=1)
    assert (config.epochs, config.batch_size) == (2, 48) and math.isclose(config.lr, 6e-3)
    config = resolve("--epochs 9 --batch-size 24")
    train.settle(config, 16_000, 100, world=1)
    assert (config.epochs, config.batch_size) == (9, 24) and math.isclose(config.lr, 3e-3)
    for flags in ("--data flags", "--model vit_nano"):
        assert resolve(flags).epochs is None, "as many as --data needs"


@pytest.mark.training
def test_train_and_val_must_have_the_same_classes(tmp_path):
    """The classes that only one of them has are named."""
    make_folder(tmp_path / "d" / "train", ("cat", "dog"))
    make_folder(tmp_path / "d" / "val", ("cat", "emu"))
    with pytest.raises(ValueError, match="different classes: only one of them has dog, emu"):
        run("--data d")


# ---------------------------------------------------------------- optimisation


@pytest.mark.optimizer
def test_learning_rate_by_hand():
    """Warmup of 2 of 10 steps to the peak 1.0, then half a cosine to 0.1 at the last step."""
    config = SimpleNamespace(epochs=5, warmup_epochs=1, lr=1.0, min_lr=0.1, decay="cosine")
    rates = [train.learning_rate(step, 2, config) for step in range(10)]
    assert rates[:2] == [0.5, 1.0]  # 1/2 and 2/2 of the peak
    assert math.isclose(
        rates[5], 0.1 + 0.9 * 0.5
    )  # step 5 is 4 of the 8 steps after the warmup: cos(pi/2) = 0
    assert math.isclose(rates[9], 0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)


@pytest.mark.optimizer
def test_linear_decay_by_hand():
    """The same run with --decay linear: 8 equal steps of 0.9 / 8 from the peak 1.0 down to 0.1."""
    config = SimpleNamespace(epochs=5, warmup_epochs=1, lr=1.0, min_lr=0.1, decay="linear")
    rates = [train.learning_rate(step, 2, config) for step in range(10)]
    for i, rate in enumerate(rates[1:]):
        assert math.isclose(rate, 1.0 - i * 0.9 / 8)


@pytest.mark.optimizer
def test_sigmoid_loss_by_hand():
    """Each class is a yes or no: -log sigmoid(2) for the true one, -log(1 - sigmoid(0)) = log 2 for
    the other."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    config = SimpleNamespace(loss="sigmoid", label_smoothing=0.0)
    expected = math.log(1 + math.exp(-2)) + math.log(2)  # for both images, so also their mean
    loss = train.classification_loss(logits, torch.tensor([0, 1]), config).item()
    assert math.isclose(loss, expected, rel_tol=1e-6)
    mixed = train.classification_loss(logits, torch.tensor([[0.5, 0.5], [0.5, 0.5]]), config).item()
    other = math.log(1 + math.exp(2)) + math.log(2)  # the wrong label; half and half is the mean
    assert math.isclose(mixed, (expected + other) / 2, rel_tol=1e-6), "mixed targets"


@pytest.mark.optimizer
def test_sigmoid_loss_is_smoothed_by_hand():
    """Smoothing 0.2 over 2 classes: the targets 1 and 0 become 0.9 and 0.1."""
    config = SimpleNamespace(loss="sigmoid", label_smoothing=0.2)
    yes, no = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))  # of logit 2
    expected = 0.9 * yes + 0.1 * no + math.log(2)  # logit 0 costs log 2, whatever is right
    found = train.classification_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), config).item()
    assert math.isclose(found, expected, rel_tol=1e-6)


@pytest.mark.optimizer
@pytest.mark.parametrize("preset, third_stage", [
    (convnext.convnext_t, [3, 3, 3, 4, 4, 4, 5, 5, 5]),
    (convnext.convnext_s, [3 + i // 3 for i in range(27)]),
])
def test_the_layers_of_layer_wise_decay_by_hand(preset, third_stage):
    """Each group has 0.8 of the rate of the next: 0 stem, ..., 12 last stage, 13 head."""
    with torch.device("meta"):
        model = preset(moe_layers="last2")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {}
    groups = train.parameter_groups(model, 0.05, 0.05, layer_decay=0.8)
    for group in groups:
        scale |= {names[id(parameter)]: group["lr_scale"] for parameter in group["params"]}
    expected = {
        "stem": 0, "stages.0": 1,
        "downsample.0": 2, "stages.1": 2,
        "downsample.1": 3,
        "downsample.2": 12, "stages.3": 12,
        "norm": 13, "head": 13,
    }
    expected |= {f"stages.2.{block}": layer for block, layer in enumerate(third_stage)}
    assert set(scale) == set(names.values()), "every parameter must be in exactly one group"
    for name in scale:
        (layer,) = {expected[place] for place in expected if name.startswith(place + ".")}
        assert math.isclose(scale[name], 0.8 ** (13 - layer)), name
    assert groups[0]["lr_scale"] == 1, "whose rate the log shows"


@pytest.mark.training
def test_each_group_has_its_share_of_the_rate(monkeypatch):
    """With --layer-decay 0.5 the head has the whole rate, the stem 0.5 ** 13 of it."""
    flags = "--model convnext_t --moe-layers none --image-size 32 --data shapes:8 --batch-size 8"
    flags += " --layer-decay 0.5 --warmup-epochs 0 --epochs 1"
    monkeypatch.setattr(train, "save", lambda *_: None)  # 28 million parameters
    state = train.Run(train.parse_args([*TINY, *flags.split()]))
    train.train(state)
    peak = train.learning_rate(0, 1, state.config)  # of the only step
    rates = {round(math.log2(peak / group["lr"])) for group in state.optimizer.param_groups}
    assert rates == {0, 1, 8, 9, 10, 11, 12, 13}, "head, last stage, third, second, first, stem"


@pytest.mark.optimizer
def test_what_decays_and_what_does_not():
    """Weights decay, expert weights with their own rate; norms, biases, embeddings and class token
    do not."""
    model = vit_nano(num_classes=4, moe_layers="last2", router="cosine")
    rate = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in train.parameter_groups(model, weight_decay=0.05, expert_weight_decay=0.2):
        rate |= {names[id(p)]: group["weight_decay"] for p in group["params"]}
    assert set(rate) == set(names.values()), "every parameter must be in exactly one group"
    expected = {
        "head.weight": 0.05,
        "blocks.1.mlp.experts.3.0.weight": 0.2,
        "blocks.1.mlp.experts.0.2.weight": 0.2,
        "blocks.1.mlp.router.proj": 0.05,
        "blocks.1.mlp.experts.0.0.bias": 0.0,
        "blocks.1.mlp.experts.3.2.bias": 0.0,
        "blocks.1.mlp.router.log_scale": 0.0,
        "pos_embed": 0.0,
        "class_token": 0.0,
        "head.bias": 0.0,
        "blocks.0.norm1.weight": 0.0,
        "patch_embed.weight": 0.05,
    }
    assert {name: rate[name] for name in expected} == expected


def mixing(mixup=0, cutmix=0):
    return SimpleNamespace(mixup=mixup, cutmix=cutmix)


@pytest.mark.optimizer
def test_mixup_blends_pictures_and_cutmix_cuts_them():
    """Of one black and one white picture MixUp makes even greys, CutMix black and white with a
    rectangle of the other."""
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    for name in ("mixup", "cutmix"):
        mixer = train.make_mixer(mixing(**{name: 1.0}), num_classes=2)
        values = [
            mixer(images, torch.tensor([0, 1]))[0][0].unique() for _ in range(5)
        ]  # of the first picture
        if name == "mixup":
            assert all(len(v) == 1 and 0 < v < 1 for v in values), "one grey for the whole picture"
        else:
            assert all(
                set(v.tolist()) <= {0.0, 1.0} for v in values
            ), "pixels are taken, not blended"
    assert train.make_mixer(mixing(), num_classes=2) is None


@pytest.mark.optimizer
def test_averaged_weights_by_hand():
    """From 1 to 0 at steps 0 and 8, with d = 1 / 10 and 9 / 18; later with the flag's 0.6."""
    averaged, weights = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    for step, expected in ((0, 1 / 10), (8, 9 / 18), (10**6, 0.6)):
        averaged.weight.data[:], weights.weight.data[:] = 1.0, 0.0
        train.update_ema(averaged, weights, step, decay=0.6)
        assert math.isclose(averaged.weight.item(), expected, rel_tol=1e-6)


# ---------------------------------------------------------------- the order of the images


def order(rank, world, accumulate=1, epoch=0):
    """The images of a process, [step][pass]: 22 images in steps of 8."""
    config = SimpleNamespace(train_images=22, batch_size=8, accumulate=accumulate, seed=3)
    return train.image_order(config, epoch, rank, world).tolist()


@pytest.mark.batches
def test_an_epoch_shows_no_image_twice():
    """22 images in steps of 8: two steps of different images, the incomplete third is left out."""
    shown = [image for step in order(0, 1) for image in step[0]]
    assert len(shown) == 16 and len(set(shown)) == 16
    assert order(0, 1, epoch=1) != order(0, 1, epoch=0)


@pytest.mark.batches
@pytest.mark.parametrize("world, accumulate", [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_a_step_has_the_same_images_however_it_is_shared(world, accumulate):
    """The shares of a step, process by process and pass by pass, are the step of one process."""
    for step, [whole] in enumerate(order(0, 1)):
        passes = [order(rank, world, accumulate)[step] for rank in range(world)]
        assert [image for process in passes for share in process for image in share] == whole


@pytest.mark.batches
def test_draws_depend_on_each_number_and_on_their_order():
    """1,000 seeds of three numbers give 1,000 different draws, the same at each call."""
    draws = set()
    for numbers in itertools.product(range(10), repeat=3):
        train.seed_draws(*numbers)
        draws.add(torch.rand(()).item())
    assert len(draws) == 1000
    train.seed_draws(9, 9, 9)
    assert torch.rand(()).item() in draws


@pytest.mark.batches
def test_augmentation_depends_on_seed_epoch_and_image_alone():
    """Of 4 images item 2 is image 2 in epoch 0, item 6 in epoch 1, with another crop."""
    config = resolve("--model vit_s --image-size 32")
    data = train.Augmented(drawn("shapes", 4, transform=train.train_transform(config)), seed=0)
    first = data[2][0]
    torch.manual_seed(99)
    assert torch.equal(data[2][0], first), "whatever was drawn before"
    assert data[6][1] == data[2][1] and not torch.equal(data[6][0], first)




@pytest.mark.batches
@pytest.mark.parametrize(
    "flags", ["--model vit_s --image-size 24", "--model convnext_nano --image-size 16"]
)
def test_a_training_image_has_the_size_asked_for(flags):
    """With or without a random crop, uint8 (3, H, W) becomes uint8 (3, S, S)."""
    config = resolve(flags)
    image = train.train_transform(config)(torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8))
    assert image.shape == (3, config.image_size, config.image_size) and image.dtype == torch.uint8


OPERATIONS = (
    "affine rotate adjust_brightness adjust_saturation adjust_contrast adjust_sharpness "
    "posterize solarize autocontrast equalize"
).split()  # torchvision's, without Identity
PLAIN = dict(crop_scale=1, crop_ratio=1, image_size=8, flip=0, randaug=0, erasing=0)


def within_chance(count, probability, draws=2000):
    """Whether a count is within four standard deviations of the binomial distribution."""
    deviation = math.sqrt(draws * probability * (1 - probability))
    return abs(count - draws * probability) < 4 * deviation


@pytest.mark.batches
def test_randaugment_applies_each_of_two_operations_with_probability_a_half(monkeypatch):
    """Of 2,000 images a quarter has none, a half one, a quarter two, as with timm.

    What they move in from outside has the mean colour.
    """
    calls = []

    def recorded(operation):
        def call(image, *args, **kwargs):
            calls.append(kwargs)
            return operation(image, *args, **kwargs)

        return call

    for name in OPERATIONS:
        monkeypatch.setattr(v2.functional, name, recorded(getattr(v2.functional, name)))
    augment = train.train_transform(SimpleNamespace(**PLAIN | dict(randaug=9)))
    images = torch.randint(0, 256, (2000, 3, 8, 8), dtype=torch.uint8)
    numbers = collections.Counter()
    for image in images:
        before = len(calls)
        assert augment(image).dtype == torch.uint8
        numbers[len(calls) - before] += 1
    assert set(numbers) == {0, 1, 2}
    for number, probability in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert within_chance(numbers[number], probability), f"{number}: {numbers[number]} of 2000"
    geometric = [kwargs for kwargs in calls if "fill" in kwargs]
    assert within_chance(len(geometric), 5 / 13, draws=len(calls)), "5 of 13 operations move pixels"
    for kwargs in geometric:
        assert list(kwargs["fill"]) == [124, 116, 104]  # 255 times .485, .456, .406
        assert kwargs["interpolation"] == v2.InterpolationMode.BILINEAR


@pytest.mark.batches
@pytest.mark.parametrize("option, value, probability", [("flip", 1, 0.5), ("erasing", 0.25, 0.25)])
def test_flips_and_erasing_have_their_probability(option, value, probability):
    """Of 2,000 images half are mirrored, a quarter have a rectangle erased."""
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8).expand(3, 8, 8)
    augment = train.train_transform(SimpleNamespace(**PLAIN | {option: value}))
    changed = sum(not torch.equal(augment(image), image) for _ in range(2000))
    assert within_chance(changed, probability), f"{changed} of 2000"


# ---------------------------------------------------------------- whole runs


def record_mixing(state):
    """Train a prepared run of one epoch; return its mixed images, a tensor for each step."""
    mixed, mixer = [], state.mixer

    def mix_and_keep(images, labels):
        images, targets = mixer(images, labels)
        mixed.append(images)
        return images, targets

    state.mixer = mix_and_keep
    train.train(state)
    return mixed


MIXING = [*TINY, "--mixup", "0.8", "--cutmix", "1", "--epochs", "1", "--warmup-epochs", "0"]


@pytest.mark.training
def test_each_process_draws_its_own_mixing(monkeypatch):
    """Four ranks that get the same images mix them in four ways, in each step."""
    ranks, order = [], train.image_order
    monkeypatch.setattr(train, "image_order", lambda config, epoch, *_: order(config, epoch, 0, 1))
    for rank in range(4):
        state = train.Run(train.parse_args(MIXING))
        state.rank = rank
        ranks.append(record_mixing(state))
    for step in range(3):
        for one, other in itertools.combinations(ranks, 2):
            assert not torch.equal(one[step], other[step])


@pytest.mark.training
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than processors
@pytest.mark.parametrize("rank", [0, 3])
def test_mixing_is_the_same_with_any_number_of_workers(rank, monkeypatch):
    """1, 2 and 4 processes that load images: the same mixed images, bit for bit."""
    mixed, order = [], train.image_order
    monkeypatch.setattr(train, "image_order", lambda config, epoch, *_: order(config, epoch, 0, 1))
    for workers in ("1", "2", "4"):
        state = train.Run(train.parse_args([*MIXING, "--workers", workers]))
        state.rank = rank
        mixed.append(torch.stack(record_mixing(state)))
        state.loader = None  # ends its processes
    assert torch.equal(mixed[1], mixed[0]) and torch.equal(mixed[2], mixed[0])


@pytest.mark.training
def test_validation_takes_no_more_memory_than_training():
    """32 images a step in 4 passes: batches of 8, in validation, too."""
    state = train.Run(train.parse_args([*TINY, "--accumulate", "4"]))
    assert {len(images) for images, _, _ in state.val_loader} == {8}  # 40 pictures
    state.passes[:] = train.image_order(state.config, 0, 0, 1).flatten(0, 1).tolist()
    assert {len(images) for images, _, _ in state.loader} == {8}


@pytest.mark.training
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_both_losses_in_the_log_are_of_one_kind(loss):
    """At learning rate 0, on the same pictures: train and validation loss agree."""
    make_folder(Path("d/train"), images=8, size=(32, 32))
    make_folder(Path("d/val"), images=8, size=(32, 32))
    flags = "--data d --cutmix 0 --crop-scale 1 --epochs 1 --batch-size 16 --lr 0 --router-noise 0"
    run(f"{flags} --loss {loss} --out r")
    line = json.loads(open("r/log.jsonl").readline())
    assert line["val_loss"] == pytest.approx(line["train_loss"], rel=1e-5)


@pytest.mark.training
def test_the_gradient_of_two_passes_is_that_of_one(monkeypatch):
    """Each pass counts half. (Losses would hardly show it: Adam and clipping undo a factor common
    to all gradients.)"""
    gradients, agree = [], train.check_and_agree

    def keep_gradient(run, *noticed):
        gradients.append(run.model.head.weight.grad.clone())
        return agree(run, *noticed)

    monkeypatch.setattr(train, "check_and_agree", keep_gradient)
    for passes in ("1", "2"):
        flags = f"--epochs 1 --accumulate {passes} --clip-grad 0"
        run(f"{flags} --router-noise 0 --balance-weight 0")
    torch.testing.assert_close(
        gradients[3], gradients[0], msg=lambda m: f"of the first of 3 steps; a factor 2? {m}"
    )


@pytest.mark.training
def test_a_run_leaves_checkpoints_and_a_log(capsys):
    """Two epochs of three steps: last.pt, best.pt, two lines of log with the promised fields, and
    the next commands."""
    run("--epochs 2 --out r")
    assert sorted(os.listdir("r")) == ["best.pt", "last.pt", "log.jsonl"]
    lines = [json.loads(line) for line in open("r/log.jsonl")]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 6)]
    fields = "epoch step lr train_loss balance_loss val_loss top1 top5"
    fields += " images_per_s data_wait seconds dropped load"
    assert set(fields.split()) <= set(lines[0])
    assert len(lines[0]["load"]) == 2, "one list per MoE layer"
    assert all(math.isclose(sum(shares), 1) for shares in lines[0]["load"])
    out = capsys.readouterr().out
    assert "python eval.py r/best.pt --data shapes:96" in out
    assert "python inspect_experts.py r/best.pt" in out


@pytest.mark.training
def test_the_log_and_eval_agree(capsys):
    """The accuracy in the log is the one that eval.py's functions find for the checkpoint."""
    run("--epochs 1 --out r")
    model, checkpoint = evaluation.load_checkpoint("r/last.pt", torch.device("cpu"))
    data = evaluation.open_dataset("shapes:96", "val")
    loader = evaluation.eval_loader(data, 7, 0, torch.device("cpu"))
    found = evaluation.evaluate(
        model, loader, torch.device("cpu"), checkpoint["mean"], checkpoint["std"]
    )
    assert found["top1"] == json.loads(open("r/log.jsonl").readline())["top1"]
    assert checkpoint["classes"] == data.classes


@pytest.mark.training
def test_training_learns():
    """Two pictures of different classes, repeated: the loss falls from ln 2 towards 0."""
    make_folder(Path("d/train"), images=8)
    make_folder(Path("d/val"), images=2)
    run("--data d --cutmix 0 --epochs 20 --batch-size 8 --out r")
    losses = [json.loads(line)["train_loss"] for line in open("r/log.jsonl")]
    assert losses[-1] < 0.1 * losses[0]


def read_log(folder):
    return [json.loads(line) for line in open(f"{folder}/log.jsonl")]


@pytest.mark.training
def test_an_interrupted_run_ends_like_an_uninterrupted_one(monkeypatch, capsys):
    """SIGTERM in the middle of epoch 2: saved, exit status 143; continued, every bit of the result
    is the same."""
    flags = "--epochs 3 --ema 0.9 --mixup 0.2 --cutmix 1 --erasing 0.5 --drop-path 0.2"
    flags += " --capacity-factor 1.05"
    run(f"{flags} --out whole")
    original, calls = train.check_and_agree, []

    def agree_and_interrupt(*arguments):
        calls.append(1)
        if len(calls) == 5:  # in the second of epoch 2's three steps
            os.kill(os.getpid(), signal.SIGTERM)
            while not arguments[0].signal:  # a thread notes it
                time.sleep(0.001)
        return original(*arguments)

    monkeypatch.setattr(train, "check_and_agree", agree_and_interrupt)
    with pytest.raises(SystemExit) as stop:
        run(f"{flags} --out broken")
    assert stop.value.code == 143 and "--out broken continue" in capsys.readouterr().out
    saved = torch.load("broken/last.pt", weights_only=True)
    assert (saved["epoch"], saved["step"]) == (1, 5)
    monkeypatch.setattr(train, "check_and_agree", original)
    run(f"{flags} --out broken")

    whole, broken = (
        torch.load(f"{name}/last.pt", weights_only=True) for name in ("whole", "broken")
    )
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][name], broken[part][name]) for name in whole[part]), part
    for key, state in whole["optimizer"]["state"].items():
        assert all(
            torch.equal(state[name], broken["optimizer"]["state"][key][name]) for name in state
        )
    timing = {"seconds", "images_per_s", "data_wait"}
    means = {"train_loss", "balance_loss", "dropped", "load"}
    for line, other in zip(read_log("whole"), read_log("broken"), strict=True):
        epoch = line["epoch"]  # in epoch 2 the means are those of one step, after the interruption
        same = set(line) - timing - (means if epoch == 2 else set())
        assert {name: line[name] for name in same} == {name: other[name] for name in same}, epoch


@pytest.mark.training
def test_a_finished_run_says_so(capsys):
    """The same command again trains nothing and shows the result."""
    run("--epochs 1 --out r")
    before = Path("r/last.pt").read_bytes()
    capsys.readouterr()
    run("--epochs 1 --out r")
    assert "finished after epoch 1" in (out := capsys.readouterr().out) and "best top-1" in out
    assert Path("r/last.pt").read_bytes() == before


@pytest.mark.training
def test_runs_are_numbered():
    """Without --out every run gets a folder of its own."""
    run("--epochs 1")
    run("--epochs 1")
    assert sorted(os.listdir("runs")) == ["vit_pico-shapes-96-1", "vit_pico-shapes-96-2"]


def fail(*_, **__):
    raise OSError("no quota left")


@pytest.mark.training
@pytest.mark.parametrize("minutes_ago, due", [(1, False), (3, True)])
def test_a_save_is_due_every_so_many_minutes(minutes_ago, due):
    """With --save-every-minutes 2, 3 minutes after the last save."""
    last = time.monotonic() - 60 * minutes_ago
    config = SimpleNamespace(save_every_minutes=2)
    state = SimpleNamespace(saved_at=last, signal=0, device="cpu", world=1, config=config)
    assert train.check_and_agree(state, torch.zeros(2), torch.tensor(1.0)) == (0, due)


# ---------------------------------------------------------------- continued, or refused


@pytest.mark.training
def test_what_may_change_when_a_run_is_continued(capsys):
    """The options that the README advises to change, and the path of the same images."""
    make_folder(Path("d"), images=10)
    run("--epochs 1 --batch-size 8 --out r --data d --lr 0.002")
    Path("d").rename("my photos")
    run("--epochs 2 --batch-size 8 --out r --data 'my photos' --lr 0.001 --min-lr 0.001"
        " --balance-weight 0.1 --clip-grad 0.5 --accumulate 2")
    out = capsys.readouterr().out
    for change in ("data d there, my photos now", "lr 0.002 there, 0.001 now",
                   "balance weight 0.005 there, 0.1 now", "epochs 1 there, 2 now"):
        assert change in out
    assert "r/best.pt --data 'my photos'" in out, "quoted"
    assert [line["lr"] for line in read_log("r")][1] == 0.001


@pytest.mark.training
@pytest.mark.parametrize("change, flags, expected", [
    ("true", "--experts 8", "experts 4 there, 8 now"),
    ("true", "--seed 1", "seed 0 there, 1 now"),
    ("mv d/cat d/emu", "", "only one of them has the classes cat, emu"),
    ("rm d/dog/0.png d/dog/1.png d/dog/2.png", "", "train images 16 there, 14 now"),
])
def test_a_run_is_not_continued_as_another(change, flags, expected):
    """Other options, classes or numbers of images are named, and the run is left alone. (Of 20
    images 4 validate.)"""
    make_folder(Path("d"), images=10)
    run("--data d --epochs 1 --batch-size 8 --out r")
    before = Path("r/last.pt").read_bytes()
    subprocess.run(change, shell=True, check=True)
    with pytest.raises(ValueError) as error:
        run(f"--data d --epochs 1 --batch-size 8 --out r {flags}")
    assert "r holds another run" in str(error.value) and expected in str(error.value)
    assert Path("r/last.pt").read_bytes() == before


@pytest.mark.training
def test_a_run_of_another_version_is_not_continued():
    """A convnext_nano once had 7x7 kernels. Its weights are refused in a line that names them."""
    run("--model convnext_nano --epochs 1 --out r")
    checkpoint = torch.load("r/last.pt", weights_only=True)
    old = convnext.convnext_nano(16, moe_layers="last2", num_experts=4, kernel_size=7)
    torch.save(checkpoint | dict(model=old.state_dict()), "r/last.pt")
    with pytest.raises(ValueError, match=r"do not fit: .*dwconv.weight: .*\[32, 1, 7, 7\]"):
        run("--model convnext_nano --epochs 1 --out r")


@pytest.mark.training
def test_a_best_checkpoint_without_a_last_one_is_not_overwritten():
    """A run that starts anew in its folder would replace it."""
    run("--epochs 1 --out r")
    os.remove("r/last.pt")
    with pytest.raises(ValueError, match="no r/last.pt: copy r/best.pt there"):
        run("--epochs 1 --out r")


# ---------------------------------------------------------------- nothing is lost


@pytest.mark.training
def test_a_folder_that_cannot_be_written_is_found_before_training(monkeypatch):
    """--out is a file: one line, and no step is made."""
    monkeypatch.setattr(train, "train", lambda run: pytest.fail("trained for nothing"))
    Path("file").write_text("")
    with pytest.raises(ValueError, match="cannot write file/log.jsonl"):
        run("--epochs 1 --out file")


@pytest.mark.training
def test_a_full_disk_leaves_the_old_checkpoint(monkeypatch):
    """When the new file cannot be written the old one is still there, and the run ends."""
    run("--epochs 1 --out r")
    before = Path("r/last.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.os, "fsync", full)
    with pytest.raises(ValueError, match="cannot write r/log.jsonl .*No space left"):
        run("--epochs 2 --out r")
    assert Path("r/last.pt").read_bytes() == before and len(os.listdir("r")) == 3


def epoch_and_step(path):
    checkpoint = torch.load(path, weights_only=True)
    return checkpoint["epoch"], checkpoint["step"]


@pytest.mark.training
def test_an_epoch_is_saved_before_it_is_validated(monkeypatch):
    """A validation that fails costs no training: continued, the run validates what it has. The log
    has the epoch without losses of training, for no step was made since."""
    run("--epochs 1 --out whole")
    with monkeypatch.context() as broken:
        broken.setattr(train, "evaluate", fail)
        with pytest.raises(OSError, match="no quota left"):
            run("--epochs 1 --out r")
    assert epoch_and_step("r/last.pt") == (0, 3) and Path("r/log.jsonl").read_text() == ""
    monkeypatch.setattr(train, "next_batch", lambda *_: pytest.fail("trained again"))
    run("--epochs 1 --out r")
    [whole], [line] = read_log("whole"), read_log("r")
    for name in ("epoch", "step", "lr", "val_loss", "top1"):
        assert line[name] == whole[name], name
    assert "train_loss" in whole and "train_loss" not in line
    assert os.path.exists("r/best.pt")


@pytest.mark.training
def test_a_signal_ends_the_validation(monkeypatch):
    """SIGTERM before the first of two batches: the model sees none of them, the epoch is saved, the
    exit status is 143."""
    evaluate, seen = train.evaluate, []

    def evaluate_and_interrupt(model, *arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        while not options["stop"]():  # a thread notes it
            time.sleep(0.001)
        model.register_forward_hook(lambda *_: seen.append(1))
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr(train, "evaluate", evaluate_and_interrupt)
    with pytest.raises(SystemExit) as stop:
        run("--epochs 2 --out r")
    assert stop.value.code == 143 and not seen
    assert epoch_and_step("r/last.pt") == (0, 3) and not os.path.exists("r/best.pt")


@pytest.mark.training
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
def test_a_file_that_is_no_checkpoint_is_one_line(content):
    """Empty, text, or the beginning of a zip file: the message is one line that names the file."""
    os.mkdir("r")
    Path("r/last.pt").write_bytes(content)
    for flag in ("--out r", "--init-from r/last.pt"):
        with pytest.raises(ValueError, match="^r/last.pt is not a checkpoint") as error:
            run(f"--epochs 1 {flag}")
        assert "\n" not in str(error.value)


@pytest.mark.training
def test_what_a_loaders_process_gets_can_be_sent_to_it():
    """Where processes do not fork (macOS, Windows, Python 3.14) all that they need is pickled."""
    make_folder(Path("d"), images=10)
    flags = "--data d --model vit_ti --moe-layers none --image-size 32 --batch-size 8 --workers 1"
    state = train.Run(train.parse_args(flags.split()))
    for loader, item in ((state.loader, 3), (state.val_loader, 3)):
        assert pickle.loads(pickle.dumps(loader.worker_init_fn)) is evaluation.leave_signals
        assert len(pickle.loads(pickle.dumps(loader.dataset))[item]) == 3


@pytest.mark.training
def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch):
    """The message names step, lr and what to try, and no checkpoint is written."""
    monkeypatch.setattr(train, "normalize", lambda images, mean, std: images.float() * float("nan"))
    with pytest.raises(ValueError, match=r"not finite at step 0: .* nan.* smaller --lr"):
        run("--epochs 1 --out r")
    assert not os.path.exists("r/last.pt")


@pytest.mark.training
def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch):
    """The loss is fine, its gradient is not: noticed before it reaches the weights, also without
    --clip-grad."""
    loss = train.classification_loss
    steep = lambda *args: 0 * (loss(*args) - loss(*args).detach()).sqrt() + 1
    monkeypatch.setattr(train, "classification_loss", steep)
    with pytest.raises(ValueError, match=r"step 0: .* \[1.0, .* norm of the gradient nan"):
        run("--epochs 1 --clip-grad 0 --out r")
    assert not os.path.exists("r/last.pt")


@pytest.mark.training
def test_an_unreadable_training_image_is_reported_once_and_replaced(capsys):
    """Three epochs meet the broken file three times: one warning with its path."""
    make_folder(Path("d/train"), images=4)
    make_folder(Path("d/val"), images=2)
    Path("d/train/cat/1.png").write_bytes(b"not an image")
    run("--data d --epochs 3 --batch-size 8 --out r")
    assert capsys.readouterr().err.count("d/train/cat/1.png") == 1


@pytest.mark.training
def test_routing_is_counted_before_anything_is_dropped():
    """Three tokens choose expert 0, which keeps two: the count says 3 chosen, 1 dropped."""
    experts = torch.tensor([[0], [0], [1], [0]])
    kept = torch.tensor([[True], [True], [True], [False]])
    state = SimpleNamespace(model=SimpleNamespace(moe_blocks=[5]), device="cpu", step=0,
                            config=SimpleNamespace(experts=3))
    meter = train.Meter(state)
    meter.count([SimpleNamespace(experts=experts, kept=kept)])
    assert meter.load.tolist() == [[3, 1, 0]] and meter.dropped.item() == 1


@pytest.mark.training
def test_the_line_of_an_epoch_by_hand():
    """4 steps of losses 6 and 2 in all: 1.5 and 0.5. 3 of 12 choices dropped, 9 of expert 0."""
    config = SimpleNamespace(experts=2, batch_size=32)
    state = SimpleNamespace(model=SimpleNamespace(moe_blocks=[5]), device="cpu", config=config,
                            world=1, step=10)
    meter = train.Meter(state)
    meter.losses[:], state.step = torch.tensor([6.0, 2.0]), 14
    meter.load[:], meter.dropped[...] = torch.tensor([[9, 3]]), 3
    line = meter.summary(state)
    assert (line["train_loss"], line["balance_loss"], line["dropped"]) == (1.5, 0.5, 0.25)
    assert line["load"] == [[0.75, 0.25]]
    assert math.isclose(line["images_per_s"] * line["seconds"], 4 * 32)


@pytest.mark.training
def test_dense_models_train_too():
    """--moe-layers none: no MoE layer, balance loss 0."""
    run("--epochs 1 --out r --moe-layers none")
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
    flags = "--epochs 1 --data shapes:120 --batch-size 40 --moe-layers 3 --router-noise 0"
    run(f"{flags} --dtype {dtype} --out plain")
    run(f"{flags} --dtype {dtype} --out compiled --compile")
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
@pytest.mark.slow  # takes 10 s; test_processes.py does the same with forked processes
def test_torchrun_with_two_processes(tmp_path):
    """Two processes on a CPU finish an epoch; only one of them prints and writes."""
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=2".split()
    flags = "--epochs 1 --data shapes:128 --model vit_nano --out r".split()
    result = subprocess.run(
        [sys.executable, *torchrun, ROOT / "train.py", *flags], cwd=tmp_path, timeout=90,
        capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("best top-1") == 1
    assert len(open(tmp_path / "r" / "log.jsonl").readlines()) == 1


# ---------------------------------------------------------------- starting from other weights


def state(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.training
def test_a_dense_checkpoint_starts_a_sparse_run():
    """--init-from a dense run of ours upcycles: at learning rate 0 the sparse model stays, and is,
    the dense one."""
    run("--moe-layers none --epochs 1 --out dense")
    run("--moe-layers last2 --epochs 1 --init-from dense/last.pt --lr 0 --min-lr 0 --out sparse")
    images = torch.randn(4, 3, 32, 32)
    dense, sparse = (
        evaluation.load_checkpoint(f"{name}/last.pt", "cpu")[0] for name in ("dense", "sparse")
    )
    assert sparse.moe_blocks and not dense.moe_blocks
    torch.testing.assert_close(sparse(images), dense(images), atol=1e-5, rtol=1e-5)


@pytest.mark.training
def test_a_linear_probe_trains_the_head_only(capsys, tmp_path):
    """--freeze-backbone: everything but the head keeps its bits; the head for other classes is
    fresh, and announced."""
    run("--epochs 1 --moe-layers last2 --out first")
    make_folder(tmp_path / "photos", ("cat", "dog", "emu"), images=20, size=(32, 32))
    run("--data photos --moe-layers last2 --epochs 2 --drop-path 0.5 --out probe"
        " --init-from first/last.pt --freeze-backbone")
    assert "first/last.pt, head fresh\n" in capsys.readouterr().out
    before, after = state("first/last.pt"), state("probe/last.pt")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["head.weight", "head.bias"]


@pytest.mark.training
def test_a_head_for_as_many_other_classes_is_fresh(capsys):
    """Two classes there, two others here: the head's rows would answer for the wrong ones."""
    for folder, classes in (("pets", ("cat", "dog")), ("birds", ("emu", "kiwi"))):
        make_folder(Path(folder), classes, images=10)
    flags = "--epochs 1 --batch-size 8"
    run(f"{flags} --data pets --out first")
    for data, fresh in (("birds", True), ("pets", False)):
        run(f"{flags} --data {data} --init-from first/last.pt")
        assert (", head fresh" in capsys.readouterr().out) == fresh


@pytest.mark.training
def test_frozen_layers_work_as_in_evaluation(monkeypatch):
    """A frozen backbone has no drop path and no router noise: its features are those that
    evaluation will see."""
    run("--epochs 1 --out first")
    modes, next_batch = [], train.next_batch

    def keep_mode(state, *rest):
        modes.append(state.model.training)
        return next_batch(state, *rest)

    monkeypatch.setattr(train, "next_batch", keep_mode)
    run("--epochs 1 --init-from first/last.pt --freeze-backbone --out probe")
    assert modes == [False] * 3


@pytest.mark.training
def test_a_continued_run_does_not_start_from_the_other_weights_again(monkeypatch):
    """--init-from holds for the start: on the second call the run's own checkpoint counts."""
    run("--epochs 1 --out first")
    again = "--epochs 1 --init-from first/last.pt --out second"
    run(again)
    monkeypatch.setattr(
        train, "start_from", lambda *_: pytest.fail("the weights were loaded again")
    )
    run(again)


@pytest.mark.training
def test_torchvisions_weights_placed_by_hand(tmp_path, monkeypatch):
    """Without a network a file in torch's cache is used; its values arrive in our model."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "hub" / "checkpoints").mkdir(parents=True)
    weights = torchvision.models.convnext_tiny().state_dict()
    torch.save(weights, tmp_path / "cache" / "hub" / "checkpoints" / "convnext_tiny-983f1562.pth")
    model = evaluation.build_model(dict(model="convnext_t", num_classes=1000))
    args = SimpleNamespace(init_from="torchvision", model="convnext_t")
    assert not train.start_from(model, args, []), "ImageNet's classes: the head is loaded"
    assert torch.equal(model.head.weight, weights["classifier.2.weight"])
    assert train.start_from(model, args, [f"bird {i}" for i in range(1000)]), "but other classes"


@pytest.mark.training
@pytest.mark.parametrize("there", [False, True])
def test_weights_that_cannot_be_had_are_one_line(there, tmp_path, monkeypatch):
    """Without a network it names the file and where to put it, and so if that file is no weights:
    nothing in it is run."""
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    if there:
        torch.save(Burglar(), place / "convnext_tiny-983f1562.pth")
    args = SimpleNamespace(init_from="torchvision", model="convnext_t")
    model = convnext.convnext_nano(num_classes=3)
    with pytest.raises(ValueError, match=r"not readable .*place https://\S+983f1562.pth in \S+"):
        train.start_from(model, args, [])
    assert not os.path.exists("was here")


class Burglar:
    """Unpickled the old way, it would create a folder."""

    def __reduce__(self):
        return os.mkdir, ("was here",)


def unreachable(*args, **kwargs):
    raise OSError("Name or service not known")


@pytest.mark.recipe
def test_nano_models_are_fine_tuned_by_their_own_recipe():
    """With --init-from, too, the recipe of vit_nano is that of vit_nano."""
    args = SimpleNamespace(model="vit_nano", data="shapes", init_from="x.pt")
    assert train.recipe_of(args) == train.RECIPES["vit_nano"]


@pytest.mark.recipe
@pytest.mark.parametrize("model, changed", [("vit_nano", True), ("vit_s", False)])
def test_on_a_folder_the_nano_models_crop_and_mix(model, changed):
    """Their recipe changes in two entries, without a flip, and a flag goes before both."""
    Path("d").mkdir()
    recipe = train.recipe_of(SimpleNamespace(model=model, data="d", init_from=None))
    differing = {name for name, value in recipe.items() if value != train.RECIPES[model][name]}
    assert differing == ({"crop_scale", "cutmix"} if changed else set())
    config = resolve(f"--model {model} --data d --crop-scale 0.5 --flip 1")
    assert (config.crop_scale, config.flip) == (0.5, 1)


@pytest.mark.training
def test_a_fresh_head_starts_small_but_a_loaded_one_stays():
    """--head-scale 0.001 is for the head that --init-from does not bring: three classes, not 16."""
    run("--epochs 1 --out first")
    make_folder(Path("photos"), ("cat", "dog", "emu"), images=20, size=(32, 32))
    flags = [*TINY, "--init-from", "first/last.pt"]
    heads = []
    for scale in ("1", "0.001"):
        args = train.parse_args([*flags, "--data", "photos", "--head-scale", scale])
        heads.append(train.Run(args).model.head.weight)
    torch.testing.assert_close(heads[1], 0.001 * heads[0])
    args = train.parse_args([*flags, "--head-scale", "0.001"])
    loaded = train.Run(args).model.head.weight
    assert torch.equal(loaded, state("first/last.pt")["head.weight"])
