"""A batch cut into micro-batches has the loss, the gradient and the images of the whole."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import virtual_cases as cases
from safetensors.torch import load, save
from tolerances import TOLERANCES
from torch import nn

from bnfuse import InputError, SynthesisConfig, load_dataset, synthesize
from bnfuse.augment import Augmentation
from bnfuse.fusion import fuse
from bnfuse.optimisation import NonFiniteLoss, _resize, _schedule, _start, _valid_range
from bnfuse.pictures import ContactSheet
from bnfuse.plans import Unit
from bnfuse.seeds import derive_seed
from bnfuse.units import recognised
from bnfuse.virtual import Seen, VirtualBatch


@pytest.fixture(scope="module")
def teacher():
    return cases.teacher()


@pytest.fixture(scope="module")
def objective(teacher):
    return cases.objective(teacher, tv_weight=0.1, l2_weight=0.1)


# ---- gradients ----


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_gradients_of_a_virtual_batch_are_the_big_batchs(loss):
    """In float64, with soft targets, groups that straddle micro-batches, an empty group, and micro-batches of every size."""
    fused, batch, loss = cases.network(), cases.batch(), cases.LOSSES[loss]
    total, gradient = cases.big_batch(fused, loss, *batch)
    for micro_batch in (1, 2, 3, 4, 5, 10, 11, 100, None):
        virtual, actual, _ = cases.virtual_batch(fused, loss, *batch, micro_batch)
        assert abs(virtual - total) <= 1e-12 * abs(total) and cases.worst(actual, gradient) <= 1e-10


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_gradients_in_float32(loss):
    """Elements against the largest, since each is a sum of what the network's weights multiply."""
    fused, batch, loss = cases.network(torch.float32), cases.batch(dtype=torch.float32), cases.LOSSES[loss]
    total, gradient = cases.big_batch(fused, loss, *batch)
    tolerance = TOLERANCES[torch.float32]
    for micro_batch in (1, 4, 11):
        virtual, actual, _ = cases.virtual_batch(fused, loss, *batch, micro_batch)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(virtual, total, rtol=tolerance.relative, atol=tolerance.absolute)
        scale = gradient.abs().max()
        torch.testing.assert_close(actual / scale, gradient / scale, rtol=tolerance.relative, atol=tolerance.absolute)


def test_the_second_stream_spares_the_last_micro_batch():
    batch = cases.batch()
    for micro_batch, looks in ((11, 1), (6, 3), (4, 5), (1, 21)):
        assert cases.virtual_batch(cases.network(), cases.LOSSES["mse"], *batch, micro_batch)[2] == looks


def test_a_layer_that_runs_twice_and_one_that_is_only_observed():
    from networks import Shared, settle

    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    model = Shared()
    model.conv = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Own(3))
    fused = fuse(settle(model).double())
    loss = lambda means, moments: (means["ce"] + sum(m.square().sum() + v.log().sum() for m, v in moments.values()),)
    images, targets, _ = cases.batch(8)
    batch = images, targets, torch.tensor([0, 3, 8])
    gradient = cases.big_batch(fused, loss, *batch)[1]
    assert cases.worst(cases.virtual_batch(fused, loss, *batch, 2)[1], gradient) <= 1e-10
    assert fused.running_means(["bn", "bn#2"]).equal(torch.cat([model.bn.running_mean] * 2))


def test_nan_in_one_image_reaches_the_loss_and_its_group():
    images, targets, starts = cases.batch()
    images[4, 0, 2, 2] = float("nan")
    seen = {}
    loss = lambda means, moments: (means["ce"] + sum(seen.update(moments) or m.sum() for m, _ in moments.values()),)
    assert cases.virtual_batch(cases.network(), loss, images, targets, starts, 2)[0].isnan()
    assert seen["bn0"][0][2].isnan().all() and seen["bn0"][0][[0, 1, 3]].isfinite().all()


def test_what_is_kept_for_backward_does_not_grow_with_the_batch():
    """The most bytes that autograd holds at any time, of batches of 4 to 64 in micro-batches of 4."""

    class Held:
        now = most = 0

        def __init__(self, tensor):
            self.tensor = tensor
            Held.now += tensor.nbytes
            Held.most = max(Held.most, Held.now)

        def __del__(self):
            Held.now -= self.tensor.nbytes

    fused, peaks = cases.network(), []
    for count in (4, 8, 64):
        images, targets = torch.randn(count, 3, 6, 6, dtype=torch.float64), torch.arange(count) % 5
        Held.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            cases.virtual_batch(fused, cases.LOSSES["mse"], images, targets, torch.tensor([0, 1, 1, 2, count]), 4)
        peaks.append(Held.most)
        assert Held.now == 0
    assert max(peaks) < 1.1 * peaks[0]


def test_batches_that_cannot_be():
    with pytest.raises(InputError, match="micro_batch must be at least 1, got 0"):
        VirtualBatch(torch.tensor([0, 3]), 0)
    with pytest.raises(InputError, match="at least one image"):
        VirtualBatch(torch.tensor([0, 0]))


# ---- units ----


def plain_loop(objective, teacher, config):
    """The method with torch's own Adam and nothing else: what a unit in one piece must give, to the bit."""
    starts, classes = cases.groups()
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "views", 5))
    low, high = _valid_range(teacher, torch.device("cpu"))
    images = None
    for size, iterations in (((4, 4), config.low_resolution_iterations), ((8, 8), config.iterations)):
        images = _start(cases.SEEDS, teacher, size, config) if images is None else _resize(images, size)
        images = images.clamp(low, high).contiguous(memory_format=torch.channels_last).requires_grad_()
        augmentation = Augmentation(round(config.jitter * size[0] / 8), config.flip, config.crop_scale)
        adam = torch.optim.Adam([images], lr=config.lr, betas=config.betas)
        for i in range(iterations):
            adam.param_groups[0]["lr"] = config.lr * _schedule(i, iterations, config.warmup)
            view = augmentation.draw(images, generator)(images)
            total = objective(images, view, cases.LABELS, starts, classes).total
            (images.grad,) = torch.autograd.grad(total, images)
            adam.step()
            with torch.no_grad():
                images.clamp_(low, high)
        images = images.detach()
    return images, total.item()


def test_one_micro_batch_is_the_plain_loop_to_the_bit(teacher, objective):
    images, total = plain_loop(objective, teacher, cases.CONFIG)
    for micro_batch in (None, 7, 100):
        made, losses = cases.make_unit(objective, teacher, micro_batch=micro_batch)
        assert made.equal(images) and losses["total"] == total
    assert cases.make_unit(objective, teacher, offload=True)[0].equal(images)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_images_of_micro_batches_are_the_big_batchs_to_rounding(teacher, objective, micro_batch):
    whole, expected = cases.make_unit(objective, teacher)
    images, losses = cases.make_unit(objective, teacher, micro_batch=micro_batch)
    # Adam divides by the gradient's size, so that where it is next to nothing its rounding moves a pixel: few, and a little.
    assert (images - whole).abs().mean() < 1e-4 and not images.equal(whole)
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert value == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize(
    "channels, micro_batch, changes",
    [
        (1, None, {}),
        (1, 3, {}),
        (3, 3, {}),
        (3, None, {"step_exponent": 1.0, "chroma_scale": 0.3}),
        (1, 3, {"step_exponent": 1.0}),
    ],
)
def test_a_unit_goes_on_from_its_state_to_the_same_bits(channels, micro_batch, changes):
    """From the first stage, from its end, from the second, and through a file."""
    teacher, config = cases.teacher(channels), dataclasses.replace(cases.CONFIG, **changes)
    objective = cases.objective(teacher)
    keep = cases.Keep(1, 6, 7, 19)
    images, losses = cases.make_unit(objective, teacher, config, micro_batch=micro_batch, checkpoint=keep)
    if changes:
        assert not images.equal(cases.make_unit(objective, teacher, micro_batch=micro_batch)[0])
        assert images.equal(cases.make_unit(objective, teacher, config, micro_batch=micro_batch, offload=True)[0])
    assert list(keep.states) == [1, 6, 7, 19]
    for step, state in keep.states.items():
        state, steps = load(save(state)), []
        show = lambda step, *_, steps=steps: steps.append(step)
        again = cases.make_unit(objective, teacher, config, show, micro_batch=micro_batch, state=state)
        assert again[0].equal(images) and again[1] == losses
        assert steps == [s for s in (6, 10, 20) if s > step]
        assert set(state) == {"step", "generator"}  # the images are not held twice


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from /proc")
def test_the_memory_of_a_unit_is_its_images_and_adams_state_and_the_rest_does_not_grow_with_it():
    """Of 64 images and of 4,096, by an allocator that gives back what is free."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, str(Path(__file__).with_name("unit_memory.py"))]
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    (_, _, _, small), (images, image_bytes, held, large) = ([*map(int, line.split())] for line in printed.splitlines()[1:])
    assert images == 4096 and held < 3.3 * image_bytes
    assert large < small + 2 * 2**20


def test_a_contact_sheet_asks_for_the_images_that_it_shows(tmp_path):
    """Of a batch of 70 that forms, on this rank 60, those of the first 20 classes whose number is below 10."""
    unit = Unit(0, tuple([0] * 35 + [30] * 35), (*range(35), *range(35)))
    sheet, asked = ContactSheet(tmp_path, [str(k) for k in range(40)], every=0), []

    def pixels(rows):
        asked.append(rows)
        return torch.full((len(rows), 1, 8, 8), 128, dtype=torch.uint8)

    sheet.refresh(unit, 60, pixels)
    assert asked == [[*range(10)]] and (tmp_path / "contact_sheet.png").exists()
    sheet.refresh(Unit(1, (30,), (3,)), 1, pixels)
    assert len(asked) == 1


def test_a_state_of_another_unit_is_refused(teacher, objective):
    keep = cases.Keep(3)
    cases.make_unit(objective, teacher, checkpoint=keep)
    state = keep.states[3]
    for broken, message in (
        ({k: v for k, v in state.items() if k != "exp_avg"}, "lacks exp_avg"),
        (state | {"values": state["values"][:5]}, "of 5 images after 3 steps, the unit has 7 images and 20"),
        (state | {"step": torch.tensor(20)}, "after 20 steps"),
    ):
        with pytest.raises(InputError, match=message):
            cases.make_unit(objective, teacher, state=broken)


def test_what_save_raises_ends_the_unit(teacher, objective):
    class Stop(cases.Keep):
        def save(self, step, state):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cases.make_unit(objective, teacher, checkpoint=Stop(4))


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_loss_that_is_not_finite_names_the_step_and_the_site_it_began_at(teacher, micro_batch):
    objective = cases.objective(teacher)
    match = objective.matcher
    site = match.names.index("layer2.0.bn1")
    column = sum(match.channels[:site]) + 2

    class Break(cases.Keep):
        def due(self, step):
            if step == 12:
                match.target_var[1, column] = float("inf")
            return False

    with pytest.raises(NonFiniteLoss, match=r"unit 5, step 13: .*bn = .*total = .*'layer2.0.bn1'") as caught:
        cases.make_unit(objective, teacher, micro_batch=micro_batch, checkpoint=Break())
    assert (caught.value.unit, caught.value.step, caught.value.where) == (5, 13, "layer2.0.bn1")


def test_a_loss_that_is_not_finite_for_another_reason_names_the_term(teacher):
    outputs = torch.full((7, 10), float("nan"))
    with pytest.raises(NonFiniteLoss) as caught:
        cases.make_unit(cases.objective(teacher), teacher, outputs=outputs, micro_batch=2)
    assert caught.value.where == "ce" and caught.value.step == 1
    with pytest.raises(NonFiniteLoss) as caught:
        cases.make_unit(cases.objective(teacher, bn_weight=3e38), teacher)
    assert caught.value.where == "total"


def test_no_state_is_saved_after_a_loss_that_was_not_finite(teacher):
    objective = cases.objective(teacher)
    objective.matcher.target_mean[0, 0] = float("nan")
    keep = cases.Keep(3)
    with pytest.raises(NonFiniteLoss, match="step 1:"):
        cases.make_unit(objective, teacher, checkpoint=keep)
    assert not keep.states


def test_soft_targets_of_a_unit(teacher, objective):
    """One-hot probabilities are what their class is, and any others go through micro-batches."""
    hot = torch.nn.functional.one_hot(cases.LABELS, 10).float()
    expected = cases.make_unit(objective, teacher)[1]
    assert cases.make_unit(objective, teacher, outputs=hot)[1]["ce"] == pytest.approx(expected["ce"], rel=1e-3)
    soft = 0.9 * hot + 0.01
    whole, parts = (cases.make_unit(objective, teacher, outputs=soft, micro_batch=size)[1] for size in (None, 2))
    assert parts["ce"] == pytest.approx(whole["ce"], rel=1e-4) and whole["ce"] > expected["ce"]


def test_a_dataset_in_micro_batches(teacher, tmp_path):
    """The same images but for rounding, which a uint8 shows by 1 at most; nothing is begun with a size that cannot be."""
    config = SynthesisConfig(
        images_per_class=5,
        classes=(1, 2),
        batch_size=10,
        classes_per_batch=2,
        iterations=5,
        targets="running",
        soft_labels=True,
    )
    made = {}
    for micro_batch in (None, 3):
        out = tmp_path / str(micro_batch)
        result = synthesize(teacher, None, out, config, micro_batch=micro_batch, offload=micro_batch == 3, progress=False)
        data = load_dataset(str(out))
        made[micro_batch] = data.batch(range(10))[0], data.soft_labels
        assert recognised(teacher, None, out, config, micro_batch=micro_batch) == pytest.approx(
            recognised(teacher, None, out, config)
        )
        assert result.made == 10
    assert (made[3][0] - made[None][0]).abs().mean() < 0.1 / 255
    torch.testing.assert_close(made[3][1], made[None][1], rtol=0, atol=0.02)
    with pytest.raises(InputError, match="micro_batch must be at least 1, got 0"):
        synthesize(teacher, None, tmp_path / "other", config, micro_batch=0, progress=False)
    assert not (tmp_path / "other").exists()


# ---- bfloat16 ----


def test_precisions_that_are_not_known():
    with pytest.raises(InputError, match="precision must be one of float32, bfloat16, got 'float16'"):
        SynthesisConfig(precision="float16")


def test_bfloat16_is_in_the_teacher_alone(teacher):
    """Moments, losses, images and their state in float32; gradients near float32's, in micro-batches as in one batch."""
    starts, classes = cases.groups()
    noise = _start(cases.SEEDS, teacher, (8, 8), cases.CONFIG)
    gradients, dtypes = {}, []
    for precision in ("float32", "bfloat16"):
        objective = cases.objective(teacher, tv_weight=0.1, precision=precision)
        site = next(m for m in objective.teacher.body.modules() if type(m).__name__ == "FusedBatchNorm")
        handle = site.register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
        leaf = noise.clone().requires_grad_()
        losses = objective(leaf, leaf, cases.LABELS, starts, classes)
        assert {value.dtype for value in losses.terms.values()} == {torch.float32} == {losses.distances.dtype}
        gradients[precision] = torch.autograd.grad(losses.total, leaf)[0]
        handle.remove()
    assert dtypes == [torch.float32, torch.bfloat16]
    full, half = gradients["float32"], gradients["bfloat16"]
    assert half.dtype == torch.float32 and not half.equal(full)
    assert (half - full).norm() < 0.1 * full.norm()

    batch = VirtualBatch(starts, 3)

    def look(part):
        leaf = noise[part.rows].clone().requires_grad_()
        means, moments = objective.look(leaf, leaf, cases.LABELS[part.rows], part.group_starts)
        assert all(value.dtype == torch.float32 for pair in moments.values() for value in pair)
        return Seen(leaf, means, moments)

    parts = torch.empty_like(noise)
    loss = lambda means, moments: objective.combine(means, moments, classes, batch.count)
    for rows, gradient in batch.gradients(look, loss)[1]:
        parts[rows] = gradient
    assert (parts - half).norm() < 0.01 * half.norm()  # a coefficient rounded otherwise moves a bfloat16 by a whole step


def test_a_unit_in_bfloat16_ends_near_the_one_in_float32(teacher):
    config = dataclasses.replace(cases.CONFIG, precision="bfloat16")
    keep = cases.Keep(3)
    full = cases.make_unit(cases.objective(teacher), teacher)[1]
    images, half = cases.make_unit(cases.objective(teacher, precision="bfloat16"), teacher, config, checkpoint=keep)
    assert images.dtype == torch.float32 and all(keep.states[3][n].dtype == torch.float32 for n in ("values", "exp_avg"))
    assert half["total"] == pytest.approx(full["total"], rel=0.05) and half["total"] != full["total"]
