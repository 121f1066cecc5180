"""train.py: the schedule, the order of the images, checkpoints, and small runs from the first step
to the last line."""

import collections
import functools
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
    monkeypatch.setattr(
        evaluation, "draw_shapes", functools.partial(evaluation.draw_shapes, n=128)
    )  # and not 500 at a time
    small = {"train": lambda n: (n, 1, 300), "val": lambda n: (40, 2, 300)}
    monkeypatch.setattr(
        evaluation, "drawn_size", lambda spec, split: small[split](int(spec.split(":")[1]))
    )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(flags):
    """The whole program, as `python train.py <flags>` would run it."""
    train.main(train.parse_args([*TINY, *shlex.split(flags)]))


def resolve(flags):
    """The configuration of `python train.py <flags>`, before it has seen the data."""
    return train.resolve(train.parse_args(flags.split()))


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
    ("--data nowhere", "no data at 'nowhere'"),
    ("--batch-size 31 --accumulate 2",
     "expected a multiple of 2 (1 processes x 2 passes) up to 96"),
    ("--batch-size 1000", "up to 96, the number of training images: use 96"),
    ("--freeze-backbone", "give --init-from"),
    ("--init-from nowhere.pt", "no checkpoint at nowhere.pt"),
    ("--init-from torchvision", "torchvision has no weights for vit_pico"),
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
def test_a_flag_without_a_recipe_has_a_default():
    """What is not given and not None here is in no recipe."""
    given = {name: value for name, value in vars(train.parse_args([])).items() if value is not None}
    assert given == dict(
        data="shapes", model="convnext_nano", seed=0, accumulate=1, dtype="auto",
        save_every_minutes=30.0, freeze_backbone=False, compile=False)


@pytest.mark.recipe
def test_a_random_backbone_is_not_frozen():
    """--freeze-backbone needs weights from somewhere."""
    with pytest.raises(ValueError, match="give --init-from"):
        resolve("--freeze-backbone")
    assert resolve("--freeze-backbone --init-from x.pt").freeze_backbone


@pytest.mark.recipe
def test_the_batch_must_be_a_multiple_of_the_processes():
    """32 images cannot be shared equally by 3 processes; 30 can."""
    config = resolve(" ".join(TINY))
    with pytest.raises(ValueError, match="--batch-size 32: expected a multiple of 3 .* use 30"):
        train.fit_to_data(config, num_images=96, world=3)


@pytest.mark.recipe
def test_the_learning_rate_follows_the_batch():
    """DeiT's rule: 1e-3 at 1024 images per step, so 5e-4 at 512; a given --lr is taken as it is."""
    config = resolve("--model vit_s --batch-size 512")
    train.fit_to_data(config, num_images=10_000, world=1)
    assert config.lr == 5e-4
    config = resolve("--model vit_s --batch-size 512 --lr 0.002")
    train.fit_to_data(config, num_images=10_000, world=1)
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


# From the sources that train.py names. "-": there is no such entry; drop_path is in the next table.
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
    min_lr           1e-6      1e-6    1e-5     1e-5    1e-6           1e-6      1e-5
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
        found = train.find_recipe(args)
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
        assert "steps" in train.find_recipe(args), "as only ours"


@pytest.mark.recipe
@pytest.mark.parametrize("flags, expected", [
    ("--model convnext_t", "ConvNeXt-T-4 of Table 1: 82.1%"),
    ("--model convnext_t --moe-layers none", "ConvNeXt-T of Table 1: 82.1%"),
    ("--model convnext_b", "ConvNeXt-B-4 of Table 1: 83.5%"),
    ("--model convnext_iso_s", "ConvNeXt-S-8 iso of Table 1: 80.3%"),
    ("--model vit_s", "ViT-S-8 every2 of Table 1: 80.7%"),
    ("--model vit_s --moe-layers last2", "ViT-S-8 last2 of Table 1: 80.5%"),
    ("--model vit_b", "ViT-B-8 every2 of Table 1: 82.5% on ImageNet-1k; 82.2% with DeiT's recipe"),
    ("--model vit_b --moe-layers none", "ViT-B of Table 1: 82.8% on ImageNet-1k; 81.8% with DeiT"),
    ("--model convnext_t --expert-ratio 4", None),
    ("--model convnext_t --experts 8", None),
    ("--model convnext_t --k 2", None),
    ("--model convnext_t --moe-layers 7,17", None),
    ("--model convnext_t --router l2", None),
    ("--model convnext_t --image-size 192", None),
    ("--model convnext_t --moe-layers none --init-from torchvision", None),
    ("--model vmoe_s32", None),
    ("", None),
])
def test_the_row_of_table_1_is_named(flags, expected):
    """The paper's own configurations are known with their accuracy, all others are not."""
    words = train.paper_row(resolve(flags))
    assert words is None if expected is None else words.startswith(expected)


@pytest.mark.recipe
def test_a_warm_up_fits_into_its_run():
    """Longer than the run, a recipe's becomes a tenth of the run, and a given one is refused."""
    config = resolve("--model convnext_t --epochs 5")
    train.fit_to_data(config, num_images=10_000, world=1)
    assert config.warmup_epochs == 0.5, "and not 20"
    config = resolve("--model vit_s --epochs 5 --warmup-epochs 6")
    with pytest.raises(
        ValueError, match="--warmup-epochs 6 is not shorter than the run of 5 epochs"
    ):
        train.fit_to_data(config, num_images=10_000, world=1)
    for recipe in [*train.RECIPES.values(), *train.FINE_TUNING.values()]:
        assert recipe["warmup_epochs"] < recipe.get("epochs", 5)


@pytest.mark.recipe
def test_a_rate_never_rises_after_its_warm_up():
    """With 64 images a step the ViT's rate for fine-tuning, 1e-5 * 64 / 512, is also its last."""
    flags = "--model vit_s --init-from x.pt --batch-size 64".split()
    config = train.resolve(train.parse_args(flags))
    train.fit_to_data(config, num_images=10_000, world=1)
    assert config.lr == config.min_lr == 1e-5 / 8


@pytest.mark.recipe
def test_layer_wise_decay_is_for_the_published_models():
    """The groups of layers are those of ConvNeXt T, S and B."""
    with pytest.raises(ValueError, match="--layer-decay 0.8 is for convnext_t, convnext_s, conv"):
        resolve("--model vit_s --layer-decay 0.8")


@pytest.mark.recipe
@pytest.mark.parametrize("num_images, epochs", [(16_000, 5), (4_000, 20), (640, 50), (64, 50)])
def test_nano_models_train_for_about_as_many_steps_on_any_data(num_images, epochs):
    """1,250 steps of 64 images, in 5 to 50 epochs: 250 steps an epoch make 5, 62 make 20, 10 would
    make 125."""
    config = resolve("")
    train.fit_to_data(config, num_images, world=1)
    assert config.epochs == epochs


@pytest.mark.training
def test_train_and_val_must_have_the_same_classes(tmp_path):
    """The classes that only one of them has are named."""
    make_folder(tmp_path / "d" / "train", ("cat", "dog"))
    make_folder(tmp_path / "d" / "val", ("cat", "emu"))
    with pytest.raises(ValueError, match="different classes; only one of them has dog, emu"):
        run("--data d")


@pytest.mark.training
def test_of_many_classes_five_are_named(monkeypatch):
    """Of six that only one of train and val has, the message leaves out the last."""
    for val, named in (("abcdef", "has b, c, d, e, f"), ("abcdefg", "has b, c, d, e, f, ...")):
        classes = dict(train=["a"], val=list(val))
        monkeypatch.setattr(train, "open_dataset", lambda data, split, transform:
                            SimpleNamespace(classes=classes[split]))
        with pytest.raises(ValueError) as error:
            train.open_data(resolve(" ".join(TINY)))
        assert str(error.value).endswith(named)


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
def test_vmoe_warms_up_for_10000_steps():
    """V-MoE-S/32 on ImageNet: 1,281,167 images in batches of 8,192 are 156 steps per epoch."""
    config = SimpleNamespace(**train.RECIPES["vmoe_s32"], lr=3e-3)
    rates = [
        train.learning_rate(step, 1_281_167 // 8192, config) for step in (4_999, 9_999, 10_000)
    ]
    assert math.isclose(rates[0], 3e-3 / 2) and rates[1] == 3e-3 and rates[2] < 3e-3


@pytest.mark.optimizer
def test_ema_decay_by_hand():
    """(1 + step) / (10 + step), until that is more than the flag's decay: 0.9999 = 89,991 / 90,000
    from step 89,990 on."""
    assert [train.ema_decay(step, 0.9999) for step in (0, 8, 90)] == [1 / 10, 9 / 18, 91 / 100]
    assert train.ema_decay(89_989, 0.9999) < 0.9999 == train.ema_decay(89_991, 0.9999)


@pytest.mark.optimizer
def test_sigmoid_loss_by_hand():
    """Each class is a yes or no: -log sigmoid(2) for the true one, -log(1 - sigmoid(0)) = log 2 for
    the other."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    config = SimpleNamespace(loss="sigmoid", label_smoothing=0.0)
    expected = math.log(1 + math.exp(-2)) + math.log(
        2
    )  # the same for both images, so also their mean
    loss = train.classification_loss(logits, torch.tensor([0, 1]), config).item()
    assert math.isclose(loss, expected, rel_tol=1e-6)
    mixed = train.classification_loss(logits, torch.tensor([[0.5, 0.5], [0.5, 0.5]]), config).item()
    other = math.log(1 + math.exp(2)) + math.log(
        2
    )  # the loss with the wrong label; half and half is the mean of the two
    assert math.isclose(mixed, (expected + other) / 2, rel_tol=1e-6), "mixed targets"


@pytest.mark.optimizer
def test_sigmoid_loss_is_smoothed_by_hand():
    """Smoothing 0.2 over 2 classes: the targets 1 and 0 become 0.9 and 0.1."""
    config = SimpleNamespace(loss="sigmoid", label_smoothing=0.2)
    yes, no = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))  # of logit 2
    expected = 0.9 * yes + 0.1 * no + math.log(2)  # logit 0 costs log 2, whatever is right
    logits = torch.tensor([[2.0, 0.0]])
    found = train.classification_loss(logits, torch.tensor([0]), config).item()
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
def test_mixed_targets_sum_to_one():
    """MixUp and CutMix make two-class targets: probabilities, one row per image."""
    for name in ("mixup", "cutmix"):
        mixer = train.make_mixer(mixing(**{name: 1.0}), num_classes=5)
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
    """What two processes load for step 1, together and in parts, is what one process loads for
    it."""
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
def test_two_passes_see_the_shares_of_two_processes():
    """Of each step one process has in its passes, in order, what two processes have."""
    for step in range(2):
        passes = order(0, 1, accumulate=2)[2 * step : 2 * step + 2]
        assert passes == [order(rank, 2)[step] for rank in range(2)]


@pytest.mark.batches
def test_seeds_of_neighbours_are_far_apart():
    """Seeds depend on each number and on the order, fill 32 bits, and neighbouring images draw
    nothing alike."""
    seeds = {train.draw_seed(*numbers) for numbers in itertools.product(range(20), repeat=3)}
    assert len(seeds) == 8000 and all(0 <= seed < 2**32 for seed in seeds)
    assert train.draw_seed(1, 2, 3) == train.draw_seed(1, 2, 3) != train.draw_seed(1, 3, 2)
    generators = [torch.Generator().manual_seed(train.draw_seed(0, 0, i)) for i in range(20)]
    draws = [torch.rand(50, generator=generator) for generator in generators]
    assert (
        torch.corrcoef(torch.stack(draws)).fill_diagonal_(0).abs().max() < 0.6
    ), "50 draws: chance gives up to about 0.5"


@pytest.mark.batches
@pytest.mark.parametrize(
    "flags", ["--model vit_s --image-size 24", "--model convnext_nano --image-size 16"]
)
def test_a_training_image_has_the_size_asked_for(flags):
    """With or without a random crop, uint8 (3, H, W) becomes uint8 (3, S, S)."""
    config = resolve(flags)
    image = train.train_transform(config)(torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8))
    assert image.shape == (3, config.image_size, config.image_size) and image.dtype == torch.uint8


@pytest.mark.batches
def test_augmentation_depends_on_seed_epoch_and_image_alone():
    """Asked in any order, after any other draws, an item is the same; another epoch gives another
    crop."""
    config = resolve("--model vit_s --image-size 32")
    data = train.Augmented(evaluation.Shapes(4, 1, train.train_transform(config)), seed=0)
    first = data[0, 2][0]
    torch.manual_seed(99)
    data[0, 1]
    assert torch.equal(data[0, 2][0], first)
    assert not torch.equal(data[1, 2][0], first)
    before = torch.get_rng_state()
    data[0, 0]
    assert torch.equal(torch.get_rng_state(), before), (
        "loading in the main process must not disturb its other draws")


@pytest.mark.batches
def test_augmentation_does_not_ask_a_gpu(monkeypatch):
    """A loader's process that touches the GPU fails: only the generator of the CPU is put back."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: pytest.fail("asked the GPU"))
    train.Augmented(evaluation.Shapes(4, 1), seed=0)[0, 1]


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
def test_each_process_draws_its_own_mixing():
    """Four ranks that get the same images mix them in four ways, in each step."""
    ranks = []
    for rank in range(4):
        state = train.Run(train.parse_args(MIXING))
        state.rank = rank  # its batches are still those of rank 0
        ranks.append(record_mixing(state))
    for step in range(3):
        for one, other in itertools.combinations(ranks, 2):
            assert not torch.equal(one[step], other[step])


@pytest.mark.training
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than processors
@pytest.mark.parametrize("rank", [0, 3])
def test_mixing_is_the_same_with_any_number_of_workers(rank):
    """1, 2 and 4 processes that load images: the same mixed images, bit for bit."""
    mixed = []
    for workers in ("1", "2", "4"):
        state = train.Run(train.parse_args([*MIXING, "--workers", workers]))
        state.rank = rank
        mixed.append(torch.stack(record_mixing(state)))
        state.loader = None  # ends its processes
    assert torch.equal(mixed[1], mixed[0]) and torch.equal(mixed[2], mixed[0])


@pytest.mark.optimizer
def test_half_of_the_batches_are_mixed_by_mixup():
    """Of 2,000 batches half are blended and half are cut, as with DeiT and ConvNeXt."""
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    mixer = train.make_mixer(mixing(mixup=0.8, cutmix=1.0), num_classes=2)
    blended = 0
    for _ in range(2000):
        mixed, targets = mixer(images, torch.tensor([0, 1]))
        black_or_white = ((mixed == 0) | (mixed == 1)).all()
        blended += not black_or_white
    # MixUp with lambda so near to 0 or 1 that a picture stays as it was: too rare to be seen here.
    assert within_chance(blended, 0.5), f"{blended} of 2000"


@pytest.mark.training
def test_validation_takes_no_more_memory_than_training():
    """32 images a step in 4 passes: batches of 8, in validation, too."""
    state = train.Run(train.parse_args([*TINY, "--accumulate", "4"]))
    assert {len(images) for images, _, _ in state.val_loader} == {8}  # 40 pictures
    assert len(next(iter(state.loader))[0]) == 8


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
def test_the_summary_says_what_was_scaled(capsys):
    """A warm-up longer than the run is printed with its new length."""
    flags = "--model vit_ti --moe-layers none --image-size 32 --epochs 1 --out r"
    state = train.Run(train.parse_args([*TINY, *flags.split()]))
    train.print_summary(state)
    printed = " ".join(capsys.readouterr().out.split())
    told = "warm-up 0.1 epochs (the recipe's warm-up of 5 epochs is not shorter than this run)"
    assert told in printed


@pytest.mark.training
def test_accumulation_changes_nothing_but_memory():
    """Two passes of 16 images are one step of 32: the same losses (without noise and capacity,
    which see a pass at a time)."""
    for passes in ("1", "2"):
        flags = f"--epochs 2 --accumulate {passes} --out {passes}"
        run(f"{flags} --router-noise 0 --balance-weight 0")
    losses = [[line["train_loss"] for line in read_log(passes)] for passes in ("1", "2")]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), atol=1e-5, rtol=0)


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
        return original(*arguments)

    monkeypatch.setattr(train, "check_and_agree", agree_and_interrupt)
    with pytest.raises(SystemExit) as stop:
        run(f"{flags} --out broken")
    assert stop.value.code == 143 and "\ncontinue    python " in capsys.readouterr().out
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
def test_another_configuration_does_not_continue_a_run():
    """The differing options are named with both values, and the run is left alone."""
    run("--epochs 1 --out r")
    with pytest.raises(ValueError, match=r"another configuration \(--experts 4 there, 8 now\)"):
        run("--epochs 1 --out r --experts 8")


@pytest.mark.training
def test_a_smaller_rate_may_continue_a_run(capsys):
    """As the advice after a loss that is not finite says: the change is told, and it holds."""
    run("--epochs 2 --out r --lr 0.002")
    os.remove("r/best.pt")
    checkpoint = torch.load("r/last.pt", weights_only=True)
    torch.save(checkpoint | dict(epoch=1, step=3), "r/last.pt")
    run("--epochs 2 --out r --lr 0.001 --clip-grad 0.5")
    err = capsys.readouterr().err
    assert "--lr 0.002 there, 0.001 now" in err and "--clip-grad 1.0 there, 0.5 now" in err
    config = SimpleNamespace(epochs=2, warmup_epochs=1, lr=0.001, min_lr=1e-5, decay="cosine")
    assert read_log("r")[1]["lr"] == train.learning_rate(5, 3, config)


@pytest.mark.training
def test_other_validation_images_are_noticed(capsys):
    """A run goes on without a broken one, and says that its accuracies cannot be compared."""
    make_folder(Path("d/train"))
    make_folder(Path("d/val"))
    flags = "--data d --batch-size 8 --out r --epochs 1"
    run(flags)
    os.remove("d/val/dog/3.png")
    run(flags)
    assert "validation images are not those of the run in r (12 images" in capsys.readouterr().err


@pytest.mark.training
def test_runs_are_numbered():
    """Without --out every run gets a folder of its own."""
    run("--epochs 1")
    run("--epochs 1")
    assert sorted(os.listdir("runs")) == ["vit_pico-shapes-96-1", "vit_pico-shapes-96-2"]


@pytest.mark.training
def test_a_truncated_checkpoint_is_not_overwritten():
    """It is named, the best one is offered in its place, and no file changes."""
    run("--epochs 1 --out r")
    whole = Path("r/last.pt").read_bytes()
    Path("r/last.pt").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="r/last.pt cannot be opened.*copy r/best.pt to r/last.pt"):
        run("--epochs 1 --out r")
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
        run("--epochs 1 --out r")
    assert not os.path.exists("proof")


@pytest.mark.training
def test_ema_by_formula(monkeypatch):
    """The averaged weights start as those of step 0, then become d * average + (1 - d) * weights, d
    = ema_decay(step, 0.3)."""
    seen = []

    def keep_weights(averaged, model):
        update(averaged, model)
        seen.append(model.head.weight.detach().clone())

    update = train.AveragedModel.update_parameters
    monkeypatch.setattr(train.AveragedModel, "update_parameters", keep_weights)
    run("--epochs 2 --ema 0.3 --out r")
    average = seen[0]
    for weights, decay in zip(
        seen[1:], (2 / 11, 3 / 12, 0.3, 0.3, 0.3), strict=True
    ):  # 4 / 13 would be more than 0.3
        average = decay * average + (1 - decay) * weights
    checkpoint = torch.load("r/last.pt", weights_only=True)
    assert checkpoint["ema"]["head.weight"].dtype == torch.float32
    torch.testing.assert_close(checkpoint["ema"]["head.weight"], average)
    assert {"ema_top1", "ema_val_loss"} <= set(
        json.loads(open("r/log.jsonl").readline())
    ), "evaluated, too"


@pytest.mark.recipe
def test_every_value_of_a_recipe_has_a_flag():
    """Whatever a recipe sets can be overridden on the command line (base_lr and base_batch by --lr
    and --batch-size; nano's steps by --epochs)."""
    for recipe in [*train.RECIPES.values(), *train.FINE_TUNING.values()]:
        assert set(recipe) - {"base_lr", "base_batch", "steps"} <= set(vars(train.parse_args([])))


@pytest.mark.training
def test_a_full_disk_leaves_the_old_checkpoint(monkeypatch, capsys):
    """When the new file cannot be written the old one is still there, and the message says so."""
    run("--epochs 1 --out r")
    before = Path("r/last.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    state = train.Run(train.parse_args([*TINY, "--epochs", "1", "--out", "r"]))
    monkeypatch.setattr(train.os, "fsync", full)
    train.save(state, "last.pt")
    assert Path("r/last.pt").read_bytes() == before and not Path("r/last.pt.tmp").exists()
    assert "No space left on device" in capsys.readouterr().err


def fail(*_, **__):
    raise ValueError("no quota left")


@pytest.mark.training
def test_a_folder_that_cannot_be_written_is_found_before_training(monkeypatch):
    """--out is a file, or its disk is full: one line, and no step is made."""
    monkeypatch.setattr(train, "train", lambda run: pytest.fail("trained for nothing"))
    Path("file").write_text("")
    with pytest.raises(ValueError, match="cannot write to file .* give another --out"):
        run("--epochs 1 --out file")
    monkeypatch.setattr(train, "write_checkpoint", fail)
    with pytest.raises(ValueError, match="no quota left"):
        run("--epochs 1 --out r")


@pytest.mark.training
@pytest.mark.parametrize("minutes_ago, due", [(1, False), (3, True)])
def test_a_save_is_due_every_so_many_minutes(minutes_ago, due):
    """With --save-every-minutes 2, 3 minutes after the last save."""
    last = time.monotonic() - 60 * minutes_ago
    config = SimpleNamespace(save_every_minutes=2)
    state = SimpleNamespace(saved_at=last, signal=0, device="cpu", world=1, config=config)
    assert train.check_and_agree(state, torch.zeros(2), torch.tensor(1.0)) == (0, due)


@pytest.mark.training
def test_a_best_checkpoint_that_is_gone_is_not_offered(capsys):
    """Its file was deleted: the last lines do not name it."""
    run("--epochs 1 --out r")
    os.remove("r/best.pt")
    capsys.readouterr()
    run("--epochs 1 --out r")
    assert "best.pt" not in capsys.readouterr().out


@pytest.mark.training
def test_a_run_that_could_not_be_saved_does_not_end_well(monkeypatch, capsys):
    """The last save failed: exit status 1, and no command with a checkpoint that is not there."""
    loop = train.train

    def train_on_a_full_disk(state):
        monkeypatch.setattr(train, "write_checkpoint", fail)
        loop(state)

    monkeypatch.setattr(train, "train", train_on_a_full_disk)
    with pytest.raises(SystemExit) as stop:
        run("--epochs 1 --out r")
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and "no quota left" in err
    assert "best" not in out.replace("best top-1", "") and "evaluate" not in out


@pytest.mark.training
def test_a_best_epoch_that_could_not_be_written_is_not_the_best(monkeypatch):
    """The second epoch's best.pt does not fit on the disk: the third, not as good, is written."""
    write, evaluate, top1 = train.write_checkpoint, train.evaluate, iter((10.0, 90.0, 50.0))

    def write_all_but_one(checkpoint, path):
        if path.endswith("best.pt") and checkpoint["epoch"] == 2:
            raise ValueError("no quota left")
        write(checkpoint, path)

    def evaluate_as_told(*arguments, **options):
        return evaluate(*arguments, **options) | dict(top1=next(top1))

    monkeypatch.setattr(train, "write_checkpoint", write_all_but_one)
    monkeypatch.setattr(train, "evaluate", evaluate_as_told)
    run("--epochs 3 --out r")
    best = torch.load("r/best.pt", weights_only=True)
    assert best["best"] == dict(top1=50.0, epoch=3) and best["epoch"] == 3


# ---------------------------------------------------------------- nothing is lost


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
        with pytest.raises(ValueError, match="no quota left"):
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
        model.register_forward_hook(lambda *_: seen.append(1))
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr(train, "evaluate", evaluate_and_interrupt)
    with pytest.raises(SystemExit) as stop:
        run("--epochs 2 --out r")
    assert stop.value.code == 143 and not seen
    assert epoch_and_step("r/last.pt") == (0, 3) and not os.path.exists("r/best.pt")


@pytest.mark.training
@pytest.mark.parametrize("out", ["", "my run"])
def test_a_stopped_run_says_how_to_continue(out, monkeypatch, capsys):
    """The command that started it, with the folder that the run has made for itself."""
    flags = [*TINY, "--epochs", "1", *(["--out", out] if out else [])]
    monkeypatch.setattr(train.sys, "argv", ["train.py", *flags])
    state = train.Run(train.parse_args(flags))
    train.print_continuation(state)
    assert capsys.readouterr().out == "", "nothing was saved"
    train.save(state, "last.pt")
    train.print_continuation(state)
    *_, command = capsys.readouterr().out.splitlines()
    folder = out or "runs/vit_pico-shapes-96-1"
    python, *words = shlex.split(command.removeprefix("continue    "))
    assert (python, words[0]) == ("python", "train.py")
    state.log.close()
    continued = train.Run(train.parse_args(words[1:]))
    assert continued.folder == folder


@pytest.mark.training
def test_a_log_that_cannot_be_written_is_a_warning(capsys):
    """A full disk costs a line of the log, and not the run."""
    with open(os.devnull) as readable_only:
        train.write_log(SimpleNamespace(log=readable_only), dict(epoch=1))
    assert "warning: cannot write log.jsonl (not writable)" in capsys.readouterr().err


@pytest.mark.training
def test_lines_of_the_log_that_are_blank_or_cut_do_no_harm():
    """They are left out when the run goes on, and so is what a killed process wrote about an epoch
    that is not saved."""
    run("--epochs 1 --out r")
    line = Path("r/log.jsonl").read_text()
    later = line.replace('"epoch": 1', '"epoch": 2')
    bad = ["\n", line, "null\n", "[]\n", later, '{"epoch": 1, "tra\n', line.strip()]
    Path("r/log.jsonl").write_text("".join(bad))
    run("--epochs 1 --out r")
    assert Path("r/log.jsonl").read_text() == line


@pytest.mark.training
@pytest.mark.parametrize("change, expected", [
    ("mv d/cat d/emu", "class cat is gone, class emu is new"),
    ("cp -r d/cat d/emu", "class emu is new, 16 images then, 24 now"),
    ("cp d/cat/1.png d/cat/20.png && cp d/cat/1.png d/cat/21.png", "16 images then, 18 now"),
    ("rm d/dog/0.png d/dog/1.png d/dog/2.png", "16 images then, 14 now"),
    ("mv d/cat/3.png d/cat/03.png && mv d/cat/4.png d/cat/04.png",
     "as many images, with other names"),
])
def test_a_run_is_not_continued_on_other_images(change, expected):
    """Images or a class came, went or were renamed: one line says what differs. (Of 20 images 4
    validate.)"""
    make_folder(Path("d"), images=10)
    flags = "--data d --epochs 1 --batch-size 8 --out r"
    run(flags)
    subprocess.run(change, shell=True, check=True)
    with pytest.raises(ValueError, match=f"images are not those of the run in r .{expected}"):
        run(flags)


@pytest.mark.training
def test_other_images_are_named_before_what_follows_from_them():
    """Without --batch-size 16 images make a batch of 16, and 14 one of 14: the images are to
    blame."""
    make_folder(Path("d"), images=10)
    flags = "--data d --model vit_nano --workers 0 --epochs 1 --out r".split()
    train.main(train.parse_args(flags))
    subprocess.run("rm d/dog/0.png d/dog/1.png d/dog/2.png", shell=True, check=True)
    with pytest.raises(ValueError, match="16 images then, 14 now"):
        train.main(train.parse_args(flags))


@pytest.mark.training
def test_a_run_is_continued_when_its_images_moved(capsys):
    """The same images under another path are the same data."""
    make_folder(Path("d"), images=10)
    flags = "--epochs 1 --batch-size 8 --out r"
    run(f"{flags} --data d")
    run(f"{flags} --data d/")
    Path("d").rename("my photos")
    run(f"{flags} --data 'my photos'")
    out = capsys.readouterr().out
    assert out.count("finished after epoch 1") == 2
    assert "r/best.pt --data 'my photos' --split val\n" in out, "quoted, without training images"
    assert "--data 'my photos' --split val --out r/inspect\n" in out


@pytest.mark.training
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_a_folder_in_use_is_refused():
    """As long as another process holds the log locked. When that is killed, the folder is free."""
    os.mkdir("r")
    hold = (
        "import fcntl; log = open('r/log.jsonl', 'a'); fcntl.lockf(log, fcntl.LOCK_EX); "
        "print(flush=True); input()"
    )
    command = [sys.executable, "-c", hold]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(ValueError, match="r is in use by another run"):
        run("--epochs 1 --out r")
    other.kill()
    other.communicate()
    run("--epochs 1 --out r")


@pytest.mark.training
@pytest.mark.parametrize("averaged", [False, True])
def test_weights_that_are_not_finite_are_not_saved(averaged, monkeypatch):
    """The step that breaks the weights is an epoch's last: no loss shows it any more. And yet
    nothing is written."""
    save = train.save

    def break_weights(state, *names):
        if state.step == 6:
            broken = state.ema.module if averaged else state.model
            broken.head.weight.data[0, 0] = math.inf
        save(state, *names)

    monkeypatch.setattr(train, "save", break_weights)
    expected = "weights are not finite after step 6; .*r/last.pt"
    with pytest.raises(FloatingPointError, match=expected):
        run(f"--epochs 3 --out r --ema {0.9 if averaged else 0}")
    assert epoch_and_step("r/last.pt") == epoch_and_step("r/best.pt") == (1, 3)


@pytest.mark.training
def test_an_epoch_whose_validation_is_not_finite_is_neither_last_nor_best(monkeypatch):
    """Its checkpoint is put aside; the run is not started anew over the best one."""
    evaluate, results = train.evaluate, []

    def evaluate_badly(*arguments, **options):
        results.append(evaluate(*arguments, **options))
        return results[-1] | (dict(loss=math.nan) if len(results) == 2 else {})

    monkeypatch.setattr(train, "evaluate", evaluate_badly)
    with pytest.raises(FloatingPointError, match="validation loss after epoch 2 is nan"):
        run("--epochs 3 --out r")
    assert sorted(os.listdir("r")) == ["best.pt", "log.jsonl", "not_finite.pt"]
    assert epoch_and_step("r/best.pt") == (1, 3) and "NaN" not in Path("r/log.jsonl").read_text()
    expected = "no checkpoint at r/last.pt: .* copy r/best.pt to r/last.pt"
    with pytest.raises(ValueError, match=expected):
        run("--epochs 3 --out r")


@pytest.mark.training
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
def test_a_file_that_is_no_checkpoint_is_one_line(content):
    """Empty, text, or the beginning of a zip file: the message is one line that names the file."""
    os.mkdir("r")
    Path("r/last.pt").write_bytes(content)
    for flag in ("--out r", "--init-from r/last.pt"):
        with pytest.raises(ValueError, match="^r/last.pt cannot be opened as a check") as error:
            run(f"--epochs 1 {flag}")
        assert "\n" not in str(error.value)


@pytest.mark.training
def test_moments_are_restored_in_the_layout_of_their_parameter():
    """A ConvNeXt run of a GPU (channels_last) goes on on a CPU: each value keeps its place, and the
    file is not kept."""
    flags = [*TINY, "--model", "convnext_nano", "--epochs", "1", "--out", "r"]
    train.main(train.parse_args(flags))
    checkpoint = torch.load("r/last.pt", weights_only=True)
    for state in checkpoint["optimizer"]["state"].values():
        for name, value in state.items():
            state[name] = value.to(memory_format=torch.channels_last) if value.ndim == 4 else value
    torch.save(checkpoint, "r/last.pt")
    continued = train.Run(train.parse_args(flags)).optimizer
    for parameter, state in continued.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].stride() == parameter.stride()
            kept = state[name].untyped_storage().nbytes()
            assert kept == state[name].nbytes, "a view of the whole checkpoint"
    for key, state in continued.state_dict()["state"].items():
        there = checkpoint["optimizer"]["state"][key]
        assert all(torch.equal(value, there[name]) for name, value in state.items())


@pytest.mark.training
def test_what_a_loaders_process_gets_can_be_sent_to_it():
    """Where processes do not fork (macOS, Windows, Python 3.14) all that they need is pickled."""
    make_folder(Path("d"), images=10)
    flags = "--data d --model vit_ti --moe-layers none --image-size 32 --batch-size 8 --workers 1"
    state = train.Run(train.parse_args(flags.split()))
    for loader, item in ((state.loader, (0, 3)), (state.val_loader, 3)):
        assert pickle.loads(pickle.dumps(loader.worker_init_fn)) is evaluation.leave_signals
        assert len(pickle.loads(pickle.dumps(loader.dataset))[item]) == 3


@pytest.mark.training
def test_a_loss_that_is_not_finite_stops_the_run(monkeypatch):
    """The message names step, lr and what to try, and no checkpoint is written."""
    monkeypatch.setattr(train, "normalize", lambda images, mean, std: images.float() * float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"not finite at step 0 .* lr .* try a smaller --lr"
    ):
        run("--epochs 1 --out r")
    assert not os.path.exists("r/last.pt")


@pytest.mark.training
def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch):
    """The loss is fine, its gradient is not: noticed before it reaches the weights, also without
    --clip-grad."""
    loss = train.classification_loss
    steep = lambda *args: 0 * (loss(*args) - loss(*args).detach()).sqrt() + 1
    monkeypatch.setattr(train, "classification_loss", steep)
    with pytest.raises(FloatingPointError, match=r"step 0 .* cross-entropy 1, .* gradient nan"):
        run("--epochs 1 --clip-grad 0 --out r")
    assert not os.path.exists("r/last.pt")


@pytest.mark.training
def test_an_unreadable_training_image_is_reported_once_and_replaced(capsys):
    """Three epochs meet the broken file three times: one warning with its path, counted in the
    log."""
    make_folder(Path("d/train"), images=4)
    make_folder(Path("d/val"), images=2)
    Path("d/train/cat/1.png").write_bytes(b"not an image")
    run("--data d --epochs 3 --batch-size 8 --out r")
    assert capsys.readouterr().err.count("d/train/cat/1.png") == 1
    assert [json.loads(line)["unreadable"] for line in open("r/log.jsonl")] == [1, 1, 1]


@pytest.mark.training
def test_routing_is_counted_before_anything_is_dropped():
    """Three tokens choose expert 0, which keeps two: the count says 3 chosen, 1 dropped."""
    experts = torch.tensor([[0], [0], [1], [0]])
    kept = torch.tensor([[True], [True], [True], [False]])
    state = SimpleNamespace(
        model=SimpleNamespace(moe_blocks=[5]), device="cpu", config=SimpleNamespace(experts=3)
    )
    meter = train.Meter(state)
    meter.count([SimpleNamespace(experts=experts, kept=kept)])
    assert meter.load.tolist() == [[3, 1, 0]] and meter.dropped.item() == 1


@pytest.mark.training
def test_the_line_of_an_epoch_by_hand():
    """4 steps of 32 images in 8 s, of which 2 s waited: 16 images/s. 3 of 12 choices dropped."""
    config = SimpleNamespace(experts=2, batch_size=32)
    state = SimpleNamespace(model=SimpleNamespace(moe_blocks=[5]), device="cpu", config=config,
                            world=1, unreadable={"a.png"})
    meter = train.Meter(state)
    meter.steps, meter.seconds, meter.wait = 4, 8.0, 2.0
    meter.losses[:] = torch.tensor([6.0, 2.0])
    meter.load[:], meter.dropped[...] = torch.tensor([[9, 3]]), 3
    assert meter.summary(state) == dict(
        train_loss=1.5, balance_loss=0.5, seconds=8.0, data_wait=0.25, images_per_s=16.0,
        dropped=0.25, unreadable=1, load=[[0.75, 0.25]])


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
def test_a_run_of_the_old_layout_is_not_continued():
    """Experts were stacked weights once: one line says so, and the files stay as they are."""
    run("--epochs 1 --out old")
    checkpoint = torch.load("old/last.pt", weights_only=True)
    checkpoint["model"]["blocks.1.mlp.experts.w1"] = torch.zeros(8, 64, 256)
    torch.save(checkpoint, "old/last.pt")
    with pytest.raises(ValueError, match="old/last.pt is from an older version"):
        run("--epochs 1 --out old")
    assert "blocks.1.mlp.experts.w1" in state("old/last.pt")


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
    assert "from first/last.pt, fresh: head.weight, head.bias" in capsys.readouterr().out
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
    for data, fresh in (("birds", "head.weight, head.bias"), ("pets", "nothing")):
        run(f"{flags} --data {data} --init-from first/last.pt")
        assert f"from first/last.pt, fresh: {fresh}\n" in capsys.readouterr().out


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
    assert train.start_from(model, args, []) == []
    assert torch.equal(model.head.weight, weights["classifier.2.weight"])
    fresh = train.start_from(model, args, [f"bird {i}" for i in range(1000)])
    assert fresh == ["head.weight", "head.bias"], "as many classes, but others"


class Burglar:
    """Unpickled the old way, it would create a folder."""

    def __reduce__(self):
        return os.mkdir, ("was here",)


@pytest.mark.training
def test_torchvisions_weights_cannot_run_code(tmp_path, monkeypatch):
    """A file in the place of torchvision's that would execute something is refused."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(Burglar(), tmp_path / "hub" / "checkpoints" / "convnext_tiny-983f1562.pth")
    with pytest.raises(ValueError, match="weights for convnext_t cannot be loaded"):
        train.torchvision_weights("convnext_t")
    assert not os.path.exists("was here")


@pytest.mark.training
def test_without_a_network_the_file_to_place_is_named(tmp_path, monkeypatch):
    """One line says what to download, from where, and where to put it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    told = r"download https://\S+/convnext_tiny-983f1562.pth by hand and place it at (\S+)"
    with pytest.raises(ValueError, match=told) as error:
        train.torchvision_weights("convnext_t")
    place = tmp_path / "cache" / "hub" / "checkpoints" / "convnext_tiny-983f1562.pth"
    assert str(place) in str(error.value)
    with pytest.raises(ValueError, match="no weights for convnext_nano: expected one of vit_b, "):
        train.torchvision_weights("convnext_nano")


def unreachable(*args, **kwargs):
    raise OSError("Name or service not known")


@pytest.mark.recipe
def test_nano_models_are_fine_tuned_by_their_own_recipe():
    """With --init-from, too, the recipe of vit_nano is that of vit_nano."""
    args = SimpleNamespace(model="vit_nano", data="shapes", init_from="x.pt")
    assert train.find_recipe(args) == train.RECIPES["vit_nano"]


@pytest.mark.recipe
@pytest.mark.parametrize("model, changed", [("vit_nano", True), ("vit_s", False)])
def test_on_a_folder_the_nano_models_crop_and_mix(model, changed):
    """Their recipe changes in two entries, without a flip, and a flag goes before both."""
    Path("d").mkdir()
    recipe = train.find_recipe(SimpleNamespace(model=model, data="d", init_from=None))
    differing = {name for name, value in recipe.items() if value != train.RECIPES[model][name]}
    assert differing == ({"crop_scale", "cutmix"} if changed else set())
    config = resolve(f"--model {model} --data d --crop-scale 0.5 --flip 1")
    assert (config.crop_scale, config.flip) == (0.5, 1)


@pytest.mark.training
def test_the_summary_says_how_a_folder_is_augmented(capsys):
    """Of pictures in a folder, with two flags to try, or one; nothing of drawn ones."""
    make_folder(Path("d"), images=10)
    for flags, expected in [("--data d", ["25% to 100%", "--flip 1, ", "twice the --epochs"]),
                            ("--data d --flip 1", ["worth trying: twice the --epochs"]),
                            ("--data shapes:96", [])]:
        args = train.parse_args([*TINY, *flags.split(), "--batch-size", "4"])
        train.print_summary(train.Run(args))
        told = capsys.readouterr().out
        assert ("augment  " in told) == bool(expected)
        assert all(words in told for words in expected)


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
