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
from checks import Burglar, drawn, same_runs
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


def settle(flags, num_images=10_000, world=1):
    """The same after it has seen so many images, in so many processes."""
    config = resolve(flags)
    train.settle(config, num_images, 100, world)
    return config


def make_folder(root, classes=("cat", "dog"), images=6):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(images):
            image = torch.full((3, 12, 10), 100 * label + i, dtype=torch.uint8)
            write_png(image, str(root / name / f"{i}.png"))


def load(path):
    return torch.load(path, weights_only=True)


def read_log(folder):
    return [json.loads(line) for line in open(f"{folder}/log.jsonl")]


def epoch_and_step(path):
    return load(path)["epoch"], load(path)["step"]


def send(number, until):
    """Send this process a signal, and give a thread 5 seconds to note it."""
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 5
    while not until() and time.monotonic() < deadline:
        time.sleep(0.001)


def fail(*_, **__):
    raise OSError(28, "No space left on device")


# ---------------------------------------------------------------- configuration

@pytest.mark.training
@pytest.mark.parametrize("flags, expected", [
    ("--moe-layers 1,9", "names block 9"),
    ("--router quadratic", "linear, cosine, l2"),
    ("--experts 4 --k 5", "k = 5: expected 1 to 4"),
    ("--data nowhere", "no folder 'nowhere'"),
    ("--batch-size 1000", "up to 96 images: use 96"),
    ("--init-from nowhere.pt", "nowhere.pt is not a checkpoint"),
    ("--init-from torchvision", "torchvision has weights for vit_b, vit_b32"),
    ("--out /dev/null", "cannot write /dev/null/log.jsonl")])  # not a folder
def test_a_wrong_flag_is_one_line_before_anything_is_done(flags, expected, tmp_path, monkeypatch):
    """The message says what was expected; no step is made, and the working folder stays empty."""
    monkeypatch.setattr(train, "train", lambda run: pytest.fail("trained for nothing"))
    with pytest.raises(ValueError) as error:
        run(flags)
    assert expected in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.recipe
@pytest.mark.parametrize("flag", [
    "--epochs 0", "--lr nan", "--lr -1", "--ema 1", "--k 1.5", "--crop-scale 0", "--randaug 20",
    "--capacity-factor inf", "--moe-layers 1-3", "--model resnet", "--decay step"])
def test_a_number_out_of_range_is_refused(flag, capsys):
    """The last line names the flag and the value, and the exit status is 2."""
    with pytest.raises(SystemExit) as stop:
        train.parse_args(flag.split())
    name, value = flag.split()
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and name in last and value in last


@pytest.mark.recipe
@pytest.mark.parametrize("flags, world, expected", [
    ("--freeze-backbone", 1, "give --init-from"),
    ("--layer-decay 0.8", 1, "--layer-decay is for convnext_t, convnext_s, convnext_b only"),
    ("--epochs 5 --warmup-epochs 6", 1, "--warmup-epochs 6: expected fewer than the 5 epochs"),
    # 32 images are no multiple of 3 processes x 2 passes; 30 are
    ("--batch-size 32 --accumulate 2", 3, "--batch-size 32: expected a multiple of 6 = 3 .* x 2 ")])
def test_options_that_do_not_go_together(flags, world, expected):
    """Nobody freezes a random backbone, or shares a batch unequally: the message says what to do.

    The groups of layers of --layer-decay are those of ConvNeXt T, S and B.
    """
    with pytest.raises(ValueError, match=expected):
        settle(f"--model vit_s {flags}", world=world)


@pytest.mark.recipe
def test_the_learning_rate_follows_the_batch():
    """DeiT's rule: 1e-3 at 1024 images per step, so 5e-4 at 512; a given --lr is taken as it is.

    It never rises after its warm-up: 1e-5 * 64 / 512 is also the least that it falls to.
    """
    assert settle("--model vit_s --batch-size 512").lr == 5e-4
    assert settle("--model vit_s --batch-size 512 --lr 0.002").lr == 0.002
    config = settle("--model vit_s --init-from x.pt --batch-size 64 --min-lr 1e-5", 50_000)
    assert config.lr == config.min_lr == 1e-5 / 8


@pytest.mark.recipe
@pytest.mark.parametrize("model, lr", [("convnext_t", 5e-5), ("vit_b", 1e-5)])
def test_few_pictures_are_fine_tuned_in_smaller_steps(model, lr):
    """Of 512 images 800 pictures would make one step per epoch, of 64 they make 12."""
    for images, batch in [(800, 64), (50_000, 512)]:
        config = settle(f"--model {model} --init-from torchvision", images)
        assert (config.batch_size, config.lr) == (batch, lr)


@pytest.mark.recipe
def test_a_flag_overrides_the_recipe():
    """What is given holds, also 0; the rest is the model's recipe; experts decay like all weights
    unless told otherwise."""
    config = resolve("--model vit_s --mixup 0 --weight-decay 0.2 --moe-layers 3,5")
    assert (config.mixup, config.weight_decay, config.moe_layers) == (0, 0.2, [3, 5])
    assert (config.cutmix, config.k) == (1.0, 2), "DeiT's, and the paper's two experts per token"
    assert config.expert_weight_decay == 0.2


# From the sources that train.py names: what differs most between them. min_lr of ViT-tune is ours.
PUBLISHED = """
                     ConvNeXt  iso     DeiT     V-MoE   ConvNeXt-tune  iso-tune  ViT-tune
    moe_layers       last2     last2   every2   last2   last2          last2     every2
    experts          4         8       8        8       8              8         8
    k                1         1       2        2       1              1         2
    epochs           300       300     300      300     30             30        20
    base_lr          4e-3      4e-3    1e-3     3e-3    5e-5           5e-5      1e-5
    base_batch       4096      4096    1024     8192    512            512       512
    weight_decay     0.05      0.05    0.05     0.1     1e-8           1e-8      0.1
    warmup_epochs    20        50      5        64.1    0              0         5
    min_lr           1e-6      1e-6    1e-5     1e-5    1e-6           1e-6      1e-6
    mixup            0.8       0.8     0.8      0.2     0              0         0.8
    ema              0.9999    0.9999  0.99996  0       0              0         0.99996
    layer_decay      1         1       1        1       0.8            1         1
    head_scale       1         1       1        1       0.001          0.001     0.001
"""
PUBLISHED_OF_MODELS = """
                    from scratch: recipe, drop_path    fine-tuned: recipe, drop_path
    convnext_t      ConvNeXt  0.1                      ConvNeXt-tune  0.1
    convnext_s      ConvNeXt  0.4                      ConvNeXt-tune  0.2
    convnext_b      ConvNeXt  0.5                      ConvNeXt-tune  0.2
    convnext_iso_s  iso       0.1                      iso-tune       0.1
    convnext_iso_b  iso       0.2                      iso-tune       0.2
    vit_s           DeiT      0.1                      ViT-tune       0.2
    vit_l           DeiT      0.1                      ViT-tune       0.45
    vmoe_s32        V-MoE     0                        ViT-tune       0.2
"""
MODELS_IN_TABLE = [line.split() for line in PUBLISHED_OF_MODELS.splitlines()[2:]]


@pytest.mark.recipe
@pytest.mark.parametrize("model, recipe, drop_path, tuned, tuned_drop_path", MODELS_IN_TABLE)
def test_the_hyperparameters_are_as_published(model, recipe, drop_path, tuned, tuned_drop_path):
    """A recipe, from scratch and with --init-from, has the values of the tables above."""
    header, *lines = PUBLISHED.strip().splitlines()
    for init_from, name, rate in ((None, recipe, drop_path), ("x.pt", tuned, tuned_drop_path)):
        column = 1 + header.split().index(name)
        expected = {line.split()[0]: line.split()[column] for line in lines} | dict(drop_path=rate)
        if init_from and model == "vmoe_s32":
            expected["moe_layers"] = "last2"  # its experts stay where they are
        found = train.recipe_of(SimpleNamespace(model=model, data="shapes", init_from=init_from))
        for option, published in expected.items():
            value = found[option]
            published = published if isinstance(value, str) else float(published)
            assert value == published, f"{option} is {value}, published is {published}"


@pytest.mark.recipe
def test_a_warm_up_fits_into_its_run():
    """Longer than the run, a recipe's of 20 epochs becomes a tenth of it."""
    assert settle("--model convnext_t --epochs 5").warmup_epochs == 0.5


@pytest.mark.recipe
@pytest.mark.parametrize("num_images, epochs", [(64_000, 5), (16_000, 5), (4_000, 20), (640, 50)])
def test_nano_models_train_for_about_as_many_steps_on_any_data(num_images, epochs):
    """1,250 steps of 64 images, in 5 to 50 epochs: 1,000 steps an epoch would make 1, 250 make 5,
    62 make 20, 10 would make 125."""
    assert settle("--data flags", num_images).epochs == epochs


@pytest.mark.recipe
def test_the_first_run_is_short():
    """`python train.py` takes 2 epochs of 16,000 // 48 = 333 steps, at the peak rate of a step of
    48 images. Flags say otherwise, and no other data or model is so easy."""
    config = settle("", 16_000)
    assert (config.epochs, config.batch_size) == (2, 48) and math.isclose(config.lr, 6e-3)
    config = settle("--epochs 9 --batch-size 24", 16_000)
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
    """Warmup of 2 of 10 steps to the peak 1.0, then half a cosine or a line to 0.1 at the last."""
    config = SimpleNamespace(epochs=5, warmup_epochs=1, lr=1.0, min_lr=0.1, decay="cosine")
    rates = [train.learning_rate(step, 2, config) for step in range(10)]
    assert rates[:2] == [0.5, 1.0]  # 1/2 and 2/2 of the peak
    # step 5 is 4 of the 8 steps after the warmup: cos(pi/2) = 0
    assert math.isclose(rates[5], 0.1 + 0.9 * 0.5)
    assert math.isclose(rates[9], 0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    config.decay = "linear"  # 8 equal steps of 0.9 / 8
    for step in range(1, 10):
        rate = train.learning_rate(step, 2, config)
        assert math.isclose(rate, 1.0 - (step - 1) * 0.9 / 8)


# What a logit of 2 costs, if it should say yes or no. A logit of 0 costs log 2 in any case.
YES, NO = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))


@pytest.mark.optimizer
@pytest.mark.parametrize("loss, target, smoothing, expected", [
    ("sigmoid", 0, 0.0, YES + math.log(2)),  # each class is a yes or no of its own: -log sigmoid(2)
    ("sigmoid", 1, 0.0, NO + math.log(2)),
    ("sigmoid", [0.5, 0.5], 0.0, 0.5 * YES + 0.5 * NO + math.log(2)),  # mixed
    ("sigmoid", 0, 0.2, 0.9 * YES + 0.1 * NO + math.log(2)),  # 1, 0 become 0.9, 0.1 of 2 classes
    ("softmax", 0, 0.0, YES),  # of two classes, softmax is the sigmoid of the difference
    ("softmax", 0, 0.2, 0.9 * YES + 0.1 * NO)])
def test_losses_by_hand(loss, target, smoothing, expected):
    """Logits 2 and 0 of two images alike: the mean over the images, not their sum."""
    config = SimpleNamespace(loss=loss, label_smoothing=smoothing)
    logits, targets = torch.tensor([[2.0, 0.0]] * 2), torch.tensor([target] * 2)
    found = train.classification_loss(logits, targets, config).item()
    assert math.isclose(found, expected, rel_tol=1e-6)


@pytest.mark.optimizer
def test_the_layers_of_layer_wise_decay_by_hand():
    """Each group has 0.8 of the rate of the next: 0 stem, ..., 12 last stage, 13 head."""
    with torch.device("meta"):
        model = convnext.convnext_s(moe_layers="last2")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {}
    groups = train.parameter_groups(model, 0.05, 0.05, layer_decay=0.8)
    for group in groups:
        scale |= {names[id(parameter)]: group["lr_scale"] for parameter in group["params"]}
    expected = {
        "stem": 0, "stages.0": 1,
        "downsample.0": 2, "stages.1": 2,
        "downsample.1": 3,  # and three blocks of 27 in each group: 3, 3, 3, 4, 4, 4, ..., 11
        "downsample.2": 12, "stages.3": 12,
        "norm": 13, "head": 13}
    expected |= {f"stages.2.{block}": 3 + block // 3 for block in range(27)}
    assert set(scale) == set(names.values()), "every parameter must be in exactly one group"
    for name in scale:
        (layer,) = {expected[place] for place in expected if name.startswith(place + ".")}
        assert math.isclose(scale[name], 0.8 ** (13 - layer)), name
    assert groups[0]["lr_scale"] == 1, "whose rate the log shows"


@pytest.mark.training
def test_each_group_has_its_share_of_the_rate():
    """At the end of the run the rate is 1e-5, and a quarter of it for a group of scale 0.25."""
    state = train.Run(train.parse_args([*TINY, "--epochs", "1", "--warmup-epochs", "0"]))
    first, *_, last = state.optimizer.param_groups
    last["lr_scale"] = 0.25
    train.train(state)
    assert math.isclose(first["lr"], 1e-5) and math.isclose(last["lr"], 1e-5 / 4)


@pytest.mark.optimizer
def test_what_decays_and_what_does_not():
    """Weights decay, expert weights with their own rate; norms, biases, embeddings and class token
    do not."""
    model = vit_nano(num_classes=4, moe_layers="last2", router="cosine")
    rate = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in train.parameter_groups(model, weight_decay=0.05, expert_weight_decay=0.2):
        rate |= {names[id(p)]: group["weight_decay"] for p in group["params"]}
    expected = {
        "head.weight": 0.05,
        "blocks.1.mlp.router.proj": 0.05,
        "blocks.1.mlp.experts.3.0.weight": 0.2,
        "blocks.1.mlp.experts.3.2.bias": 0.0,
        "blocks.1.mlp.router.log_scale": 0.0,
        "pos_embed": 0.0,
        "class_token": 0.0,
        "blocks.0.norm1.weight": 0.0}
    assert {name: rate[name] for name in expected} == expected


@pytest.mark.optimizer
def test_mixup_blends_pictures_and_cutmix_cuts_them():
    """Of one black and one white picture MixUp makes even greys, CutMix black and white with a
    rectangle of the other."""
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    mixup, cutmix, neither = (
        train.make_mixer(SimpleNamespace(mixup=m, cutmix=c), num_classes=2)
        for m, c in ((1.0, 0), (0, 1.0), (0, 0)))
    for _ in range(5):
        [grey] = mixup(images, torch.tensor([0, 1]))[0][0].unique()
        assert 0 < grey < 1, "one grey for the whole picture"
        values = cutmix(images, torch.tensor([0, 1]))[0][0].unique()
        assert set(values.tolist()) <= {0.0, 1.0}, "pixels are taken, not blended"
    assert neither is None


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
    calls, numbers = [], collections.Counter()

    def record(operation, image, *args, **options):
        calls.append(options)
        return operation(image, *args, **options)

    for name in OPERATIONS:
        recorded = functools.partial(record, getattr(v2.functional, name))
        monkeypatch.setattr(v2.functional, name, recorded)
    augment = train.train_transform(SimpleNamespace(**PLAIN | dict(randaug=9)))
    for image in torch.randint(0, 256, (2000, 3, 8, 8), dtype=torch.uint8):
        before = len(calls)
        augment(image)
        numbers[len(calls) - before] += 1
    for number, probability in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert within_chance(numbers[number], probability), f"{number}: {numbers[number]} of 2000"
    for options in calls:
        if "fill" in options:
            assert list(options["fill"]) == [124, 116, 104]  # 255 times .485, .456, .406
            assert options["interpolation"] == v2.InterpolationMode.BILINEAR


@pytest.mark.batches
@pytest.mark.parametrize("option, value, probability", [("flip", 1, 0.5), ("erasing", 0.25, 0.25)])
def test_flips_and_erasing_have_their_probability(option, value, probability):
    """Of 2,000 images half are mirrored, a quarter have a rectangle erased."""
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8).expand(3, 8, 8)
    augment = train.train_transform(SimpleNamespace(**PLAIN | {option: value}))
    changed = sum(not torch.equal(augment(image), image) for _ in range(2000))
    assert within_chance(changed, probability), f"{changed} of 2000"


# ---------------------------------------------------------------- whole runs

@pytest.mark.training
def test_each_share_of_a_step_draws_its_own_mixing():
    """Two passes of each of two processes that get the same images mix them in four ways."""
    state = train.Run(train.parse_args([*TINY, "--mixup", "0.8", "--accumulate", "2"]))
    images, labels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8)
    mixed = set()
    for state.rank, part in itertools.product(range(2), repeat=2):
        batches = iter([(images, labels, torch.full((8,), -1))])
        found, _ = train.next_batch(state, batches, part, train.Meter(state))
        mixed.add(found.numpy().tobytes())
    assert len(mixed) == 4


@pytest.mark.training
def test_validation_takes_no_more_memory_than_training():
    """32 images a step in 4 passes: batches of 8, in validation, too."""
    state = train.Run(train.parse_args([*TINY, "--accumulate", "4"]))
    assert {len(images) for images, _, _ in state.val_loader} == {8}  # 40 pictures
    state.passes[:] = train.image_order(state.config, 0, 0, 1).flatten(0, 1).tolist()
    assert {len(images) for images, _, _ in state.loader} == {8}


@pytest.mark.training
def test_the_gradient_of_two_passes_is_that_of_one(monkeypatch):
    """Each pass counts half. (Losses would hardly show it: Adam and clipping undo a factor common
    to all gradients.)"""
    gradients, agree = [], train.check_and_agree

    def keep_gradient(run, *noticed):
        gradients.append(run.model.head.weight.grad.clone())
        return agree(run, *noticed)

    monkeypatch.setattr(train, "check_and_agree", keep_gradient)
    flags = "--epochs 1 --clip-grad 0 --router-noise 0 --balance-weight 0"
    for passes in (1, 2):
        run(f"{flags} --accumulate {passes}")
    first, again = gradients[0], gradients[3]  # of the first of 3 steps
    torch.testing.assert_close(again, first, msg=lambda m: f"a factor 2? {m}")


@pytest.mark.training
def test_a_run_leaves_checkpoints_and_a_log(capsys):
    """Two epochs of three steps: last.pt, best.pt, two lines of log with the promised fields, and
    the next commands."""
    run("--epochs 2 --out r")
    assert sorted(os.listdir("r")) == ["best.pt", "last.pt", "log.jsonl"]
    lines = read_log("r")
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 6)]
    fields = "epoch step lr train_loss balance_loss val_loss top1 top5"
    fields += " images_per_s data_wait seconds dropped load"
    assert set(fields.split()) <= set(lines[0])
    assert len(lines[0]["load"]) == 2, "one list per MoE layer"
    out = capsys.readouterr().out
    assert "python eval.py r/best.pt --data shapes:96" in out
    assert "python inspect_experts.py r/best.pt" in out


@pytest.mark.training
def test_the_log_and_eval_agree():
    """Accuracy and loss in the log are what eval.py's functions find for the checkpoint."""
    run("--epochs 1 --loss sigmoid --out r")
    cpu = torch.device("cpu")
    model, saved = evaluation.load_checkpoint("r/last.pt", cpu)
    data = evaluation.open_dataset("shapes:96", "val")
    loader = evaluation.eval_loader(data, 7, 0, cpu)
    found = evaluation.evaluate(model, loader, cpu, saved["mean"], saved["std"], loss="sigmoid")
    [line] = read_log("r")
    assert line["top1"] == found["top1"] and math.isclose(line["val_loss"], found["loss"])
    assert saved["classes"] == data.classes


@pytest.mark.training
def test_training_learns():
    """Two pictures of different classes, repeated: the loss falls from ln 2 towards 0."""
    make_folder(Path("d/train"), images=8)
    make_folder(Path("d/val"), images=2)
    run("--data d --cutmix 0 --epochs 20 --batch-size 8 --out r")
    losses = [line["train_loss"] for line in read_log("r")]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.training
def test_an_interrupted_run_ends_like_an_uninterrupted_one(monkeypatch, capsys):
    """SIGTERM in the middle of epoch 2: saved, exit status 143; continued, every bit of the result
    is the same."""
    flags = "--epochs 3 --ema 0.9 --mixup 0.2 --cutmix 1 --erasing 0.5 --drop-path 0.2"
    flags += " --capacity-factor 1.05"
    run(f"{flags} --out whole")
    original = train.check_and_agree

    def agree_and_interrupt(state, *numbers):
        if state.step == 4:  # the second of epoch 2's three steps
            send(signal.SIGTERM, until=lambda: state.signal)
        return original(state, *numbers)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(train, "check_and_agree", agree_and_interrupt)
        with pytest.raises(SystemExit) as stop:
            run(f"{flags} --out broken")
    assert stop.value.code == 143 and "--out broken continue" in capsys.readouterr().out
    assert epoch_and_step("broken/last.pt") == (1, 5)
    run(f"{flags} --out broken")

    same_runs("whole", "broken")


@pytest.mark.training
def test_a_finished_run_stays_as_it_is(monkeypatch, capsys):
    """The same command again loads no other weights, trains nothing and shows the result."""
    run("--epochs 1 --out first")
    again = "--epochs 1 --init-from first/last.pt --out r"
    run(again)
    before = Path("r/last.pt").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(train, "start_from", lambda *_: pytest.fail("--init-from is for the start"))
    run(again)
    assert "finished after epoch 1" in (out := capsys.readouterr().out) and "best top-1" in out
    assert Path("r/last.pt").read_bytes() == before


@pytest.mark.training
def test_runs_are_numbered():
    """Without --out every run gets a folder of its own."""
    run("--epochs 1")
    run("--epochs 1")
    assert sorted(os.listdir("runs")) == ["vit_pico-shapes-96-1", "vit_pico-shapes-96-2"]


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
def test_what_may_change_when_a_run_is_continued(tmp_path, capsys):
    """The options that the README advises to change, and the path of the same images.

    It is kept as a whole path: eval.py may be started elsewhere.
    """
    make_folder(Path("d"), images=10)
    run("--epochs 1 --batch-size 8 --out r --data d --lr 0.002")
    Path("d").rename("my photos")
    run("--epochs 2 --batch-size 8 --out r --data 'my photos' --lr 0.001 --min-lr 0.001"
        " --balance-weight 0.1 --clip-grad 0.5 --accumulate 2")
    out = capsys.readouterr().out
    for change in (f"data {tmp_path}/d there, {tmp_path}/my photos now",
                   "lr 0.002 there, 0.001 now", "balance weight 0.005 there, 0.1 now",
                   "epochs 1 there, 2 now"):
        assert change in out
    assert f"r/best.pt --data '{tmp_path}/my photos'" in out, "quoted"
    assert [line["lr"] for line in read_log("r")][1] == 0.001


@pytest.mark.training
@pytest.mark.parametrize("change, flags, expected", [
    ("true", "--experts 8", "experts 4 there, 8 now"),
    ("true", "--seed 1", "seed 0 there, 1 now"),
    ("mv d/cat d/emu", "", "only one of them has the classes cat, emu"),
    ("rm d/dog/0.png d/dog/1.png d/dog/2.png", "", "train images 16 there, 14 now")])
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
def test_a_best_checkpoint_without_a_last_one_is_not_overwritten():
    """A run that starts anew in its folder would replace it."""
    run("--epochs 1 --out r")
    os.remove("r/last.pt")
    with pytest.raises(ValueError, match="no r/last.pt: copy r/best.pt there"):
        run("--epochs 1 --out r")


# ---------------------------------------------------------------- nothing is lost

@pytest.mark.training
def test_a_full_disk_leaves_the_old_checkpoint(monkeypatch):
    """When the new file cannot be written the old one is still there, and the run ends."""
    run("--epochs 1 --out r")
    before = Path("r/last.pt").read_bytes()
    monkeypatch.setattr(train.os, "fsync", fail)
    with pytest.raises(ValueError, match="cannot write r/log.jsonl .*No space left"):
        run("--epochs 2 --out r")
    assert Path("r/last.pt").read_bytes() == before and len(os.listdir("r")) == 3


@pytest.mark.training
def test_an_epoch_is_saved_before_it_is_validated(monkeypatch):
    """A validation that fails costs no training: continued, the run validates what it has. The log
    has the epoch without losses of training, for no step was made since."""
    with monkeypatch.context() as broken:
        broken.setattr(train, "evaluate", fail)
        with pytest.raises(OSError, match="No space left"):
            run("--epochs 1 --out r")
    assert epoch_and_step("r/last.pt") == (0, 3) and read_log("r") == []
    monkeypatch.setattr(train, "next_batch", lambda *_: pytest.fail("trained again"))
    run("--epochs 1 --out r")
    [line] = read_log("r")
    assert (line["epoch"], line["step"]) == (1, 3) and "train_loss" not in line
    assert os.path.exists("r/best.pt")


@pytest.mark.training
def test_a_signal_ends_the_validation(monkeypatch):
    """SIGTERM before the first of two batches: the model sees none of them, the epoch is saved, the
    exit status is 128 + 15."""
    evaluate, seen = train.evaluate, []

    def evaluate_and_interrupt(model, *arguments, **options):
        send(signal.SIGTERM, until=options["stop"])
        model.register_forward_hook(lambda *_: seen.append(1))
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr(train, "evaluate", evaluate_and_interrupt)
    with pytest.raises(SystemExit) as stop:
        run("--epochs 2 --out r")
    assert stop.value.code == 143 and not seen
    assert epoch_and_step("r/last.pt") == (0, 3) and not os.path.exists("r/best.pt")


@pytest.mark.training
def test_what_a_loaders_process_gets_can_be_sent_to_it():
    """Where processes do not fork (macOS, Windows, Python 3.14) all that they need is pickled."""
    make_folder(Path("d"), images=10)
    flags = "--data d --model vit_ti --moe-layers none --image-size 32 --batch-size 8 --workers 1"
    state = train.Run(train.parse_args(flags.split()))
    for loader, item in ((state.loader, 3), (state.val_loader, 3)):
        assert pickle.loads(pickle.dumps(loader.worker_init_fn)) is evaluation.leave_signals
        assert len(pickle.loads(pickle.dumps(loader.dataset))[item]) == 3


def steep(logits, *_):
    """A loss of 1 whose gradient is not finite."""
    return 0 * (logits - logits.detach()).sqrt().sum() + 1


@pytest.mark.training
@pytest.mark.parametrize("loss, expected", [
    (lambda logits, *_: logits.sum() * math.nan, r"step 0: .* \[nan, .* smaller --lr"),
    (steep, r"step 0: .* \[1.0, .* norm of the gradient nan")])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(loss, expected, monkeypatch):
    """Noticed before it reaches the weights: the message names step, numbers and what to try."""
    monkeypatch.setattr(train, "classification_loss", loss)
    with pytest.raises(ValueError, match=expected):
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
def test_the_line_of_an_epoch_by_hand():
    """4 steps after step 10 with losses 6 and 2 in all, and 3 tokens that choose expert 0, which
    keeps two: 1.5, 0.5, and loads before 1 of 4 is dropped."""
    config = SimpleNamespace(experts=3, batch_size=32)
    state = SimpleNamespace(model=SimpleNamespace(moe_blocks=[5]), device="cpu", config=config,
                            world=1, step=10)
    meter = train.Meter(state)
    experts = torch.tensor([[0], [0], [1], [0]])
    kept = torch.tensor([[True], [True], [True], [False]])
    meter.count([SimpleNamespace(experts=experts, kept=kept)])
    meter.losses[:], state.step = torch.tensor([6.0, 2.0]), 14
    line = meter.summary(state)
    assert (line["train_loss"], line["balance_loss"], line["dropped"]) == (1.5, 0.5, 0.25)
    assert line["load"] == [[0.75, 0.25, 0]]
    assert math.isclose(line["images_per_s"] * line["seconds"], 4 * 32)


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

@pytest.mark.training
def test_a_dense_checkpoint_starts_a_sparse_run():
    """--init-from a dense run of ours upcycles: at learning rate 0 the sparse model stays, and is,
    the dense one."""
    run("--moe-layers none --epochs 1 --out dense")
    run("--moe-layers last2 --epochs 1 --init-from dense/last.pt --lr 0 --min-lr 0 --out sparse")
    images = torch.randn(4, 3, 32, 32)
    dense, _ = evaluation.load_checkpoint("dense/last.pt", "cpu")
    sparse, _ = evaluation.load_checkpoint("sparse/last.pt", "cpu")
    assert sparse.moe_blocks and not dense.moe_blocks
    torch.testing.assert_close(sparse(images), dense(images), atol=1e-5, rtol=1e-5)


@pytest.mark.training
def test_a_linear_probe_trains_the_head_only(monkeypatch):
    """--freeze-backbone: everything but the head keeps its bits, and works as in evaluation,
    without drop path and router noise."""
    run("--epochs 1 --out first")
    modes, next_batch = [], train.next_batch

    def keep_mode(state, *rest):
        modes.append(state.model.training)
        return next_batch(state, *rest)

    monkeypatch.setattr(train, "next_batch", keep_mode)
    run("--epochs 1 --out probe --init-from first/last.pt --freeze-backbone")
    before, after = load("first/last.pt")["model"], load("probe/last.pt")["model"]
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["head.weight", "head.bias"] and modes == [False] * 3


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
    monkeypatch.setattr("urllib.request.urlopen", fail)
    if there:
        torch.save(Burglar("was here"), place / "convnext_tiny-983f1562.pth")
    args = SimpleNamespace(init_from="torchvision", model="convnext_t")
    with pytest.raises(ValueError, match=r"not readable .*place https://\S+983f1562.pth in \S+"):
        train.start_from(convnext.convnext_nano(num_classes=3), args, [])
    assert not os.path.exists("was here")


@pytest.mark.recipe
@pytest.mark.parametrize("model, changed", [
    ("vit_nano", True), ("convnext_nano", True), ("vit_s", False)])
def test_on_a_folder_the_nano_models_crop_and_mix(model, changed):
    """Their recipe changes in two entries, without a flip, and a flag goes before both."""
    Path("shapes").mkdir()  # and not the drawn data
    recipe = train.recipe_of(SimpleNamespace(model=model, data="shapes", init_from=None))
    differing = {name for name, value in recipe.items() if value != train.RECIPES[model][name]}
    assert differing == ({"crop_scale", "cutmix"} if changed else set())
    config = resolve(f"--model {model} --data shapes --crop-scale 0.5 --flip 1")
    assert (config.crop_scale, config.flip) == (0.5, 1)


@pytest.mark.training
def test_a_head_for_as_many_other_classes_is_fresh():
    """Two classes there, two others here: the head's rows would answer for the wrong ones.

    A fresh head, and no other, starts as small as --head-scale 0.001 says.
    """
    for folder, classes in (("pets", ("cat", "dog")), ("birds", ("emu", "kiwi"))):
        make_folder(Path(folder), classes, images=10)
    run("--epochs 1 --batch-size 8 --data pets --out first")

    def head(data, scale):
        flags = f"--init-from first/last.pt --batch-size 8 --data {data} --head-scale {scale}"
        return train.Run(train.parse_args([*TINY, *flags.split()])).model.head.weight

    assert torch.equal(head("pets", 0.001), load("first/last.pt")["model"]["head.weight"])
    torch.testing.assert_close(head("birds", 0.001), 0.001 * head("birds", 1))


@pytest.mark.training
@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(monkeypatch):
    """--compile gives the same losses, and a checkpoint that any program reads."""
    compile, compiled = torch.compile, []

    def trace(model):  # only the tracing: test_models.py goes on from there
        compiled.append(model)
        return compile(model, backend="eager")

    monkeypatch.setattr(torch, "compile", trace)
    # No noise, whose draws may differ; always 40 pictures, so that two graphs suffice.
    flags = "--epochs 1 --data shapes:120 --batch-size 40 --moe-layers 3 --router-noise 0"
    run(f"{flags} --out plain")
    run(f"{flags} --out compiled --compile")
    assert len(compiled) == 1
    weights = [torch.load(f"{name}/last.pt")["model"] for name in ("plain", "compiled")]
    assert weights[0].keys() == weights[1].keys()
    plain = json.loads(open("plain/log.jsonl").readline())
    traced = json.loads(open("compiled/log.jsonl").readline())
    for loss in ("train_loss", "balance_loss", "val_loss"):
        assert traced[loss] == pytest.approx(plain[loss], abs=1e-4)
