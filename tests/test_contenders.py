"""What the benchmarks let compete: what is wrong is not timed, steps under autocast, both GPU backends beside each other."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bnfuse.convolutions import FrozenConvolution

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import contenders  # noqa: E402
import steps  # noqa: E402
from sites import Site  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of", ["bnfuse", "hook"])
def test_a_site_s_contender_without_the_loss_s_gradient_is_not_timed(of, dtype):
    case = contenders.make_case(Site((16, 8, 32, 32), "relu", True), CPU, dtype, torch.contiguous_format)
    functions = {name: case.functions(compiled=False)[name] for name in ("bnfuse", "hook", "plain")}
    contenders.verify(case, functions)

    def with_share(share: float):
        """Its value is right, and so is y's gradient."""
        y, loss = functions[of]()
        return y, share * loss + (1 - share) * loss.detach()

    for share in (0.0, 0.5):
        with pytest.raises(AssertionError, match=f"{of}: the loss's gradient .* not timed"):
            contenders.verify(case, {of: partial(with_share, share)})


@pytest.fixture(scope="module")
def teacher():
    """ResNet-20 in float32, and images [3, 3, 32, 32] with labels."""
    model = steps.make_teacher("resnet20", CPU, torch.float32, torch.contiguous_format)
    return model, *steps.make_images("resnet20", 3, model, torch.contiguous_format)


def under_autocast(hook: torch.nn.Module, model, images, labels) -> dict:
    losses = {("bnfuse", ""): steps.FusedLoss(model, labels), ("hook", "contiguous"): hook}
    return {key: (steps.AutocastLoss(loss, torch.bfloat16), images) for key, loss in losses.items()}


def test_under_autocast_the_network_computes_in_16_bits_and_images_stay_in_32(teacher):
    model, images, labels = teacher
    dtypes = []
    note = lambda layer, _, y: dtypes.append((getattr(layer, "convolution", layer).weight.dtype, y.dtype))
    for loss, given in under_autocast(steps.HookLoss(model, labels), *teacher).values():
        layers = [module for module in loss.modules() if isinstance(module, (torch.nn.Conv2d, FrozenConvolution))]
        handles = [layer.register_forward_hook(note) for layer in layers]  # a frozen convolution does not call the one in it
        _, gradient = steps.value_and_gradient(loss, given)
        assert gradient.dtype == torch.float32
        for handle in handles:  # bnfuse shares its layers with the teacher
            handle.remove()
    assert len(dtypes) == 2 * 19 and set(dtypes) == {(torch.float32, torch.bfloat16)}


def test_what_is_wrong_under_autocast_is_not_timed(teacher):
    model, images, labels = teacher
    steps.verify(model, under_autocast(steps.HookLoss(model, labels), *teacher), images, labels, autocast=torch.bfloat16)
    without_statistics = under_autocast(steps.PlainLoss(model, labels), *teacher)
    with pytest.raises(AssertionError, match="loss against hook .* not timed"):
        steps.verify(model, without_statistics, images, labels, autocast=torch.bfloat16)
    with pytest.raises(AssertionError, match="not timed"):  # bfloat16 passes for nothing but bfloat16
        steps.verify(model, under_autocast(steps.HookLoss(model, labels), *teacher), images, labels)


def test_16_bits_are_held_to_what_the_eager_hook_loses_in_them():
    """MobileNetV2 with random weights turns bfloat16's rounding into a gradient that is off by two thirds, for the hook too."""
    model = steps.make_teacher("mobilenet_v2", CPU, torch.bfloat16, torch.contiguous_format)
    images, labels = steps.make_images("mobilenet_v2", 2, model, torch.contiguous_format)
    losses = {("bnfuse", ""): steps.FusedLoss(model, labels), ("hook", "contiguous"): steps.HookLoss(model, labels)}
    steps.verify(model, {name: (loss, images) for name, loss in losses.items()}, images, labels)
    other_images = torch.randn_like(images)  # whose gradient has as much to do with ours as any
    with pytest.raises(AssertionError, match="against hook .* not timed"):
        given = {name: (loss, images if name[0] == "bnfuse" else other_images) for name, loss in losses.items()}
        steps.verify(model, given, images, labels)

    class WithoutGradient(steps.FusedLoss):
        def forward(self, images):
            value = super().forward(images)
            return value.detach() + 0 * value

    with pytest.raises(AssertionError, match="image gradient against hook .* not timed"):
        losses["bnfuse", ""] = WithoutGradient(model, labels)
        steps.verify(model, {name: (loss, images) for name, loss in losses.items()}, images, labels)


def test_tf32_is_held_to_what_its_mantissa_can(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    gpu = torch.device("cuda")
    assert steps.tolerances(torch.float32, gpu) == steps.tolerances(torch.float16, gpu)
    assert steps.tolerances(torch.float32, CPU) == (1e-4, 1e-2)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert steps.tolerances(torch.float32, gpu) == (1e-4, 1e-2)


@pytest.mark.parametrize("chosen, other", [("cuda", "triton"), ("triton", "cuda")])
def test_the_gpu_backend_that_auto_does_not_take_is_timed_beside_it(monkeypatch, chosen, other):
    found = [SimpleNamespace(name=name, available=True) for name in ("cpp", "cuda", "triton", "reference")]
    monkeypatch.setattr(contenders.backends, "describe", lambda: found)
    monkeypatch.setattr(contenders.backends, "resolve", lambda *_: chosen)
    assert contenders.other_backends(torch.device("cuda")) == [other]
    assert contenders.other_backends(CPU) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_gpu_that_is_not_there_is_named():
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "--device", "cuda", "--compile-for"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device cuda: this PyTorch" in ran.stderr and "sees no CUDA device" in ran.stderr
