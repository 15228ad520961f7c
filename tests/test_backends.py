"""Which backend runs: chosen by name, by the environment and by `auto`; and the operators' whole life on the Triton backend.

Triton's kernels have tests of their own; here they are called as users call them, through dispatcher and autograd. Without a
GPU they run in Triton's interpreter.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
from networks import Chains, settle
from test_ops import SLOPE, make_case
from tolerances import assert_elements_close, assert_moments_close

from bnfuse import InputError, Matcher, backends, fuse, ops, reference
from bnfuse.errors import BackendError

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(not backends.triton_is_installed(), reason="Triton is not installed")
needs_no_gpu = pytest.mark.skipif(not INTERPRETED, reason="says what is missing where there is no GPU")


@pytest.fixture
def fresh_choice():
    """What was resolved before is forgotten, before the test and after it."""
    backends._resolve.cache_clear()
    yield
    backends._resolve.cache_clear()


# ---- the choice ----


def test_every_backend_says_whether_it_can_run_and_why():
    found = {b.name: b for b in backends.describe()}
    assert list(found) == ["cpp", "cuda", "triton", "reference"] and set(found) == set(backends.BACKENDS) - {"auto"}
    assert all(b.reason for b in found.values())
    assert found["reference"].available and found["cpp"].available


@needs_no_gpu
def test_auto_never_takes_the_interpreter(fresh_choice, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.resolve("auto", "cpu") == "cpp"
    monkeypatch.setattr(backends, "extension", None)
    backends._resolve.cache_clear()
    with pytest.warns(UserWarning, match="slow reference backend on cpu"):
        assert backends.resolve("auto", "cpu") == "reference"


@needs_no_gpu
def test_a_gpu_backend_that_is_missing_says_what_is_missing(fresh_choice, monkeypatch):
    missing = "the C.. extension was built without CUDA|built for sm_.*, but this PyTorch .* sees no CUDA device"
    with pytest.raises(BackendError, match=f"'cuda' was asked for and is not available: ({missing})"):
        backends.resolve("cuda", "cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="'triton' was asked for and is not available: .* sees no CUDA device"):
        backends.resolve("triton", "cuda")
    monkeypatch.setattr(backends, "triton_is_installed", lambda: False)
    backends._resolve.cache_clear()
    with pytest.raises(BackendError, match="Triton is not installed"):
        backends.resolve("triton", "cuda")
    with pytest.warns(UserWarning, match="slow reference backend on cuda"):
        assert backends.resolve("auto", "cuda") == "reference"


class FakeExtension:
    """What an extension built for two architectures says."""

    cuda_architectures = staticmethod(lambda: ["sm_80", "sm_90"])
    compiler = staticmethod(lambda: "gcc")
    instruction_set = staticmethod(lambda: "AVX2")


@needs_no_gpu
@pytest.mark.parametrize(
    ("capability", "available", "reason"),
    [
        ((9, 0), True, "built for sm_80, sm_90, running on sm_90"),
        ((8, 6), True, "running on sm_86"),  # runs what was built for 8.0
        ((12, 0), False, "the device is sm_120; set TORCH_CUDA_ARCH_LIST"),
        ((7, 5), False, "the device is sm_75"),
    ],
)
def test_cuda_kernels_run_where_machine_code_was_built_for(monkeypatch, capability, available, reason):
    monkeypatch.setattr(backends, "extension", FakeExtension)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    found = backends._cuda()
    assert found.available == available and reason in found.reason
    assert "CUDA_VISIBLE_DEVICES" not in found.reason


@needs_no_gpu
@needs_triton
def test_every_visible_device_must_fit(monkeypatch):
    """The choice is made once for all of them, and not by whichever is the current one."""
    capabilities = [(9, 0), (7, 5), (8, 0)]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "extension", FakeExtension)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])
    for found in (backends._cuda(), backends._triton()):
        assert not found.available
        assert "the device is sm_75" in found.reason
        assert found.reason.endswith(", or leave cuda:1 out of CUDA_VISIBLE_DEVICES")
    capabilities[1] = 9, 0
    for found in (backends._cuda(), backends._triton()):
        assert found.available and "sm_90, sm_80" in found.reason


@needs_triton
@pytest.mark.parametrize("value", ["1", "true", "Yes", "ON", "y", "0", "false", "2", ""])
def test_the_interpreter_is_asked_for_in_tritons_own_words(monkeypatch, value):
    from triton import knobs

    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert backends._triton_interprets() == knobs.runtime.interpret


def test_the_environment_chooses_for_auto_alone(fresh_choice, monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert backends.resolve("auto", "cpu") == "reference" and backends.resolve("cpp", "cpu") == "cpp"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(InputError, match="BNFUSE_BACKEND=fast in the environment: unknown backend 'fast'; choose one of auto"):
        backends.resolve("auto", "cpu")
    with pytest.raises(InputError, match="^unknown backend 'slow'"):
        backends.resolve("slow", "cpu")
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cpp")
    with pytest.raises(BackendError, match="BNFUSE_BACKEND=cpp in the environment: .* asked for a tensor on 'cuda'"):
        backends.resolve("auto", "cuda")


@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_an_unknown_instruction_set_is_an_error_and_no_reason_to_be_slow(backend):
    program = "import torch, bnfuse; print(bnfuse.ops.group_moments(torch.ones(2, 3), backend='reference')[0].tolist())\n"
    program += f"bnfuse.ops.group_moments(torch.ones(2, 3), backend={backend!r})"
    environment = {**os.environ, "BNFUSE_INSTRUCTION_SET": "avx"}
    environment.pop("BNFUSE_BACKEND", None)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert "BackendError: " in ran.stderr and "BNFUSE_INSTRUCTION_SET is 'avx', expected one of " in ran.stderr
    assert "pip install" not in ran.stderr and "slow reference" not in ran.stderr
    assert "[[1.0, 1.0, 1.0]]" in ran.stdout


# ---- the operators on Triton ----


@needs_triton
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_site_through_triton(residual, layout):
    case = make_case((5, 6, 3, 3), layout=layout, groups=[2, 0, 3], act="relu", residual=residual)
    expected = case.double().run("reference")
    on_device = type(case)(**{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in vars(case).items()})
    for actual, wide, moments in zip(on_device.run("triton"), expected, (False, True, True, False, False)):
        (assert_moments_close if moments else assert_elements_close)(actual.cpu(), wide, torch.float32)


@needs_triton
def test_opcheck_of_the_triton_operators():
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs it")
    case = make_case((3, 4, 2, 2), groups=[1, 2], act="relu", residual=True)
    x, residual, scale, shift, starts, dmean, dvar = (
        t.to(DEVICE) for t in (case.x, case.residual, case.scale, case.shift, case.group_starts, case.dmean, case.dvar)
    )
    classes, weights = torch.tensor([1, 0], device=DEVICE), torch.ones(1, device=DEVICE)
    found, options = ops.operators("triton", DEVICE), ("l2", False, 1e-8, 0.0, 1.0, 1.0)
    x.requires_grad_()
    torch.library.opcheck(found.bn_forward, (x, residual, scale, shift, starts, "relu", SLOPE))
    torch.library.opcheck(found.group_moments, (x, starts))
    torch.library.opcheck(
        found.bn_forward_with_targets,
        (x, residual, scale, shift, starts, dmean, dvar.abs(), classes, 0.5, "relu", SLOPE, *options),
    )
    moments = [dmean.clone().requires_grad_()], [dvar.abs().requires_grad_()]
    torch.library.opcheck(found.bn_loss, (*moments, dmean, dvar.abs(), classes, weights, *options))


@needs_triton
def test_a_network_and_its_loss_through_triton():
    model, images, starts = settle(Chains()), torch.randn(5, 3, 6, 6), torch.tensor([0, 2, 5])

    def gradient(backend, device, dtype):
        network = copy.deepcopy(model).to(device, dtype)
        fused, matcher = fuse(network, backend=backend), Matcher.from_running(network, backend=backend).to(device)
        leaf = images.to(device, dtype).requires_grad_()
        logits, moments = fused(leaf, starts.to(device))
        loss = logits.square().mean() + matcher(moments)
        return loss.detach().cpu(), torch.autograd.grad(loss, leaf)[0].cpu()

    loss, actual = gradient("triton", DEVICE, torch.float32)
    wide_loss, expected = gradient("reference", "cpu", torch.float64)
    torch.testing.assert_close(loss.double(), wide_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("distance", reference.DISTANCES)
def test_a_site_with_targets_through_triton(distance):
    case = make_case((4, 5, 2, 3), groups=[1, 3], act="silu", residual=True)
    targets, classes = (case.dmean.flip(0), case.dvar.abs()), torch.tensor([1, 1])

    def run(backend, device, dtype):
        move = lambda t: t.to(device, dtype) if t.is_floating_point() else t.to(device)
        x, residual = move(case.x).requires_grad_(), move(case.residual).requires_grad_()
        y, loss, mean, var = ops.bn_act_loss(
            x,
            move(case.scale),
            move(case.shift),
            *map(move, targets),
            group_starts=move(case.group_starts),
            classes=move(classes),
            weight=0.5,
            residual=residual,
            act=case.act,
            distance=distance,
            slack=0.25,
            backend=backend,
        )
        cotangents = [move(case.dy), torch.full_like(loss, 3), move(case.dmean)]
        return [loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad([y, loss, mean], [x, residual], cotangents))]

    actual, expected = run("triton", DEVICE, torch.float32), run("reference", "cpu", torch.float64)
    assert_moments_close(actual[0], expected[0], torch.float32)
    for ours, wide in zip(actual[1:], expected[1:]):
        assert_elements_close(ours, wide, torch.float32)
