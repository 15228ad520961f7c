"""The CUDA kernels without a GPU: their sources run under an emulation of CUDA's threads, against the reference in float64.

The emulation (cuda_emulation/) runs every thread of every block, knows which memory a kernel may touch, and may shuffle the
order in which blocks and threads run. What it cannot show is speed, and what nvcc makes of the sources; for the latter see
test_cuda_sources.py.
"""

import ctypes
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loss import EVERY_DISTANCE, Loss, assert_close
from test_ops import SLOPE, Case, cases, in_layout, make_case
from tolerances import LARGE_MEAN_VARIANCE_RELATIVE, assert_elements_close, assert_moments_close
from torch import Tensor

from bnfuse import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPERATORS = "bn_forward bn_forward_with_targets bn_backward bn_backward_ group_moments group_moments_backward bn_loss".split()
NO_MASK = torch.empty(0, dtype=torch.uint8)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """The operators of csrc/cuda on CPU tensors, and `device` to say how the emulated one behaves."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not sys.platform.startswith("linux") or "Free Software" not in subprocess.getoutput(f"{compiler} --version"):
        pytest.skip("the emulation needs Linux and GCC, whose -fsanitize=kernel-address checks each access")
    sources, library = Path(__file__).parent / "cuda_emulation", tmp_path_factory.mktemp("emulation") / "emulation.so"
    home = Path(torch.__file__).parent
    includes = [flag for path in ("include", "include/torch/csrc/api/include") for flag in ("-isystem", home / path)]
    flags = """-std=c++17 -O1 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas
        -fsanitize=kernel-address --param asan-instrumentation-with-call-threshold=0 --param asan-stack=0 --param asan-globals=0
        -DBNFUSE_EMULATED -DTORCH_TARGET_VERSION=0x020a000000000000"""
    command = [compiler, sources / "emulation.cpp", "-o", library, *flags.split(), "-I", sources, *includes]
    built = subprocess.run([*command, "-L", home / "lib", "-ltorch_cpu", "-lc10"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    definitions = torch.library.Library("bnfuse_emulated", "DEF")
    for name in OPERATORS:
        definitions.define(str(getattr(torch.ops.bnfuse_cpp, name).default._schema).split("::")[1])
    torch.ops.load_library(library)
    emulation = ctypes.CDLL(str(library))
    emulation.mistake.restype = ctypes.c_char_p
    emulation.emulate.argtypes = [ctypes.c_int, ctypes.c_bool, ctypes.c_uint64]
    operators = {name: getattr(torch.ops.bnfuse_emulated, name) for name in OPERATORS}

    def device(multiprocessors=132, seed=None):
        emulation.emulate(multiprocessors, seed is not None, seed or 0)

    yield SimpleNamespace(**operators, device=device, plan=emulation.plan, mistake=emulation.mistake)
    definitions._destroy()


@pytest.fixture(autouse=True)
def plain_device(request):
    request.getfixturevalue("kernels").device()


# ---- the emulation itself ----


@pytest.mark.parametrize(
    "kind, said",
    [
        (0, ""),
        (1, "4 bytes read outside of every tensor (block 0, thread 31)"),
        (2, "4 bytes written outside of every tensor (block 0, thread 0)"),
        (3, "4 bytes written to a tensor that is only read"),
        (4, "16 bytes accessed where they are not aligned"),
        (5, "access beyond the block's shared memory (block 0, thread 31)"),
        (6, "a barrier that some threads of the block do not reach"),
        (7, "threads wait for each other for ever"),
    ],
)
def test_the_emulation_sees_mistakes(kernels, kind, said):
    heard = kernels.mistake(kind, ctypes.byref(ctypes.c_float())).decode()
    assert said in heard if said else not heard


def test_the_emulation_shows_a_missing_barrier_as_nan(kernels):
    total = ctypes.c_float()
    assert not kernels.mistake(0, ctypes.byref(total)) and total.value == 32
    assert not kernels.mistake(8, ctypes.byref(total)) and math.isnan(total.value)


# ---- one site ----


def dense(case: Case) -> Case:
    """The case as the operators are given it: x dense, and all that is like x in its layout."""
    x = case.x if ops._is_dense(case.x) else case.x.contiguous()
    residual = None if case.residual is None else ops._match_layout(case.residual, x)
    return Case(**{**vars(case), "x": x, "residual": residual, "dy": ops._match_layout(case.dy, x)})


def forward_and_backward(operators, case: Case) -> tuple[Tensor, ...]:
    """y, mean, var, mask, dx and dresidual, the last two from both forms of the backward pass."""
    sites = case.scale, case.shift
    y, mean, var, mask = operators.bn_forward(case.x, case.residual, *sites, case.group_starts, case.act, SLOPE)
    residual = None if mask.numel() else case.residual
    moments = mean, case.dmean, case.dvar, case.group_starts
    wants = case.residual is not None
    dx, dresidual = operators.bn_backward(case.dy, case.x, residual, mask, *sites, *moments, case.act, SLOPE, wants)
    if hasattr(operators, "bn_backward_"):
        taken = torch.empty_like(case.dy).copy_(case.dy)
        again = operators.bn_backward_(taken, case.x, residual, mask, *sites, *moments, case.act, SLOPE, wants)
        assert torch.equal(taken.nan_to_num(7.0), dx.nan_to_num(7.0))
        assert torch.equal(again.nan_to_num(7.0), dresidual.nan_to_num(7.0))
    return y, mean, var, mask, dx, dresidual


def assert_agrees(kernels, case: Case) -> None:
    case, dtype = dense(case), case.x.dtype
    y, mean, var, mask, dx, dresidual = forward_and_backward(kernels, case)
    expected_y, expected_mean, expected_var, expected_mask, expected_dx, expected_dresidual = forward_and_backward(
        reference, case.double()
    )
    assert torch.equal(mask, expected_mask)
    assert y.stride() == dx.stride() == case.x.stride()
    for actual, expected in ((y, expected_y), (dx, expected_dx), (dresidual, expected_dresidual)):
        assert_elements_close(actual, expected, dtype)
    for actual, expected in ((mean, expected_mean), (var, expected_var)):
        assert_moments_close(actual, expected, dtype)


devices = st.tuples(st.sampled_from([1, 3, 132]), st.integers(0, 2**16))


@given(case=cases(), device=devices)
def test_agrees_on_drawn_shapes(kernels, case, device):
    kernels.device(*device)
    assert_agrees(kernels, case)


@given(case=cases(), device=devices)
@settings(max_examples=30)
def test_group_moments_agree(kernels, case, device):
    kernels.device(*device)
    case = dense(case)
    mean, var = kernels.group_moments(case.x, case.group_starts)
    expected = reference.group_moments(case.x.double(), case.group_starts)
    assert_moments_close(mean, expected[0], case.x.dtype)
    assert_moments_close(var, expected[1], case.x.dtype)
    for dmean, dvar in ((case.dmean, case.dvar), (None, case.dvar), (case.dmean, None), (None, None)):
        dx = kernels.group_moments_backward(case.x, mean, dmean, dvar, case.group_starts)
        double = [None if t is None else t.double() for t in (mean, dmean, dvar)]
        wanted = reference.group_moments_backward(case.x.double(), *double, case.group_starts)
        assert_elements_close(dx, wanted, case.x.dtype)


# One shape at least for each way of walking and of accessing memory, and more than one block, tile, step and part of each.
WALKS = {
    "rows": ((5, 16, 6, 7), "contiguous_rows"),
    "rows_of_odd_width": ((5, 11, 6, 7), "contiguous_rows"),
    "rows_of_several_tiles": ((3, 520, 3, 3), "contiguous_rows"),
    "rows_not_aligned": ((5, 16, 6, 7), "offset_rows"),
    "no_spatial": ((37, 24), "contiguous"),
    "planes": ((5, 11, 8, 8), "contiguous"),
    "planes_of_several_steps": ((2, 2, 64, 72), "contiguous"),
    "planes_not_aligned": ((5, 11, 8, 8), "offset"),
    "odd_planes_of_several_steps": ((2, 2, 51, 53), "contiguous"),
    "packed_planes": ((5, 16, 7, 7), "contiguous"),
    "packed_planes_of_14": ((2, 6, 14, 14), "contiguous"),
    "packed_tiny_planes": ((9, 12, 1, 2), "contiguous"),
    "odd_planes_that_do_not_pack": ((3, 5, 7, 7), "contiguous"),
}
every_walk = pytest.mark.parametrize("shape, layout", WALKS.values(), ids=WALKS)


def laid_out(values: Tensor, layout: str) -> Tensor:
    if layout == "contiguous_rows":
        return in_layout(values, "channels_last")
    if layout == "offset_rows":
        return in_layout(values.movedim(1, -1).contiguous(), "offset").movedim(-1, 1)
    return in_layout(values, layout)


def case_of(shape, layout, **options) -> Case:
    case = make_case(shape, **options)
    for name in ("x", "residual", "dy"):
        if getattr(case, name) is not None:
            setattr(case, name, laid_out(getattr(case, name), layout))
    return case


@every_walk
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_agrees_for_every_walk(kernels, shape, layout, dtype):
    n = shape[0]
    for act in reference.ACTIVATIONS:
        for residual, multiprocessors in ((False, 132), (True, 2)):
            kernels.device(multiprocessors)
            groups = [n // 3, 0, n - n // 3]
            assert_agrees(kernels, case_of(shape, layout, dtype=dtype, groups=groups, act=act, residual=residual))


@pytest.mark.parametrize("layout", ["contiguous", "contiguous_rows"])
def test_more_groups_than_threads(kernels, layout):
    """One sample a group, empty groups in between, and a device so small that a chunk could hold several of them."""
    kernels.device(1)
    groups = [1, 0, 1, 2] * 150
    assert_agrees(kernels, case_of((600, 8, 2, 2), layout, groups=groups, residual=True))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4), (0, 3)], ids=str)
def test_nothing_in_nothing_out(kernels, shape):
    case = dense(make_case(shape, groups=[0, shape[0]], residual=True))
    y, mean, var, mask, dx, dresidual = forward_and_backward(kernels, case)
    assert y.shape == dx.shape == dresidual.shape == shape
    assert not mean.any() and not var.any() and mean.shape == var.shape == (2, shape[1])
    assert mask.shape == reference.mask_shape(case.x)


@every_walk
@pytest.mark.parametrize("act, residual", [("silu", True), ("relu", True), ("relu6", False)])
def test_the_same_bits_in_any_order(kernels, shape, layout, act, residual):
    n = shape[0]
    case = case_of(shape, layout, groups=[n // 2, n - n // 2], act=act, residual=residual)
    case.x = torch.empty_like(case.x).copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    runs = []
    for seed in (None, 1, 2):
        kernels.device(3, seed)
        runs.append(forward_and_backward(kernels, dense(case)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape, layout", [((9, 24, 8, 8), "rows"), ((9, 24, 8, 8), "contiguous"), ((9, 24, 7, 7), "contiguous")], ids=str
)
def test_the_same_bits_at_any_address(kernels, shape, layout, dtype):
    given, moved = ("contiguous_rows", "offset_rows") if layout == "rows" else ("contiguous", "offset")
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    runs = []
    for layouts in ((given, given), (moved, given), (given, moved)):
        case = case_of(shape, given, dtype=dtype, groups=[4, 5], residual=True)
        case.x, case.residual = laid_out(values, layouts[0]), laid_out(case.residual, layouts[1])
        runs.append((*forward_and_backward(kernels, case), *kernels.group_moments(case.x, case.group_starts)))
    assert laid_out(values, moved).data_ptr() % 16
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@pytest.mark.parametrize("shape", [(5, 264, 3, 3), (5, 64, 3, 3), (3, 24, 1, 1)], ids=str)
def test_the_same_bits_from_coefficients_at_any_address(kernels, shape):
    """Eight channels' are read at once where they lie at a multiple of 16 bytes."""

    def moved(values: Tensor) -> Tensor:
        return torch.cat([torch.full((1,), math.nan), values.flatten()])[1:].view(values.shape)

    case = case_of(shape, "contiguous_rows", groups=[2, shape[0] - 2], act="silu", residual=True)
    elsewhere = Case(**{k: moved(v) if k in ("scale", "shift", "dmean", "dvar") else v for k, v in vars(case).items()})
    assert case.scale.data_ptr() % 16 == 0 and elsewhere.scale.data_ptr() % 16 and elsewhere.dvar.data_ptr() % 16
    kernels.device(2)
    assert all(torch.equal(a, b) for a, b in zip(forward_and_backward(kernels, case), forward_and_backward(kernels, elsewhere)))


@pytest.mark.parametrize("starts", [[0, 2], [3, 99], [2**62, -1]], ids=str)
def test_a_single_group_is_all_of_x_whatever_its_starts(kernels, starts):
    """So no kernel waits for them. Right ones are 0 and N."""
    case = case_of((6, 8, 3, 3), "contiguous_rows", residual=True)
    expected = forward_and_backward(kernels, case)
    case.group_starts = torch.tensor(starts)
    assert all(torch.equal(a, b) for a, b in zip(forward_and_backward(kernels, case), expected))


@every_walk
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_cancellation(kernels, shape, layout, multiprocessors):
    """A mean ten thousand times the deviation; constant channels; rows far from all others, first."""
    kernels.device(multiprocessors)
    n, channels = shape[:2]
    starts = torch.tensor([0, n])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for x, tolerance in ((1e4 + noise, LARGE_MEAN_VARIANCE_RELATIVE), (torch.cat([noise[:1] - 1e4, noise[1:]]), 2e-6)):
        x = laid_out(x, layout)
        mean, var = kernels.group_moments(x, starts)
        expected_mean, expected_var = reference.group_moments(x.double(), starts)
        assert_moments_close(mean, expected_mean, torch.float32)
        torch.testing.assert_close(var.double(), expected_var, rtol=tolerance, atol=0)
    constants = torch.linspace(0.1, 1e5, channels).view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
    mean, var = kernels.group_moments(laid_out(constants.contiguous(), layout), starts)
    assert torch.equal(mean[0], torch.linspace(0.1, 1e5, channels)) and not var.any()


@every_walk
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_touches_its_group_and_channel_alone(kernels, shape, layout, value):
    n, channels = shape[:2]
    clean = case_of(shape, layout, groups=[n // 2, n - n // 2], act="silu", residual=True)
    bad = Case(**{**vars(clean), "x": torch.empty_like(clean.x).copy_(clean.x)})
    bad.x[(n - 1, channels // 2, *[-1] * (len(shape) - 2))] = value
    y, mean, var, _, dx, _ = forward_and_backward(kernels, dense(bad))
    clean_y, clean_mean, clean_var, _, clean_dx, _ = forward_and_backward(kernels, dense(clean))
    spoilt = torch.zeros(2, channels, dtype=torch.bool)
    spoilt[1, channels // 2] = True
    for moment, clean_moment in ((mean, clean_mean), (var, clean_var)):
        assert torch.equal(moment.isfinite(), ~spoilt) and torch.equal(moment[~spoilt], clean_moment[~spoilt])
    assert torch.equal((y != clean_y).nonzero(), (bad.x != clean.x).nonzero())
    spoilt_dx = reference.per_sample(spoilt, clean.group_starts, dx).expand_as(dx)
    assert torch.equal(dx[~spoilt_dx], clean_dx[~spoilt_dx]) and not dx[spoilt_dx].isfinite().any()


@every_walk
def test_x_is_not_touched_for_a_variance_without_gradient(kernels, shape, layout):
    case = dense(case_of(shape, layout, residual=True))
    mask = kernels.bn_forward(case.x, case.residual, case.scale, case.shift, case.group_starts, "relu", SLOPE)[3]
    x, zeros = torch.full_like(case.x, math.nan), torch.zeros(1, shape[1])
    sites, moments = (mask, case.scale, case.shift), (zeros, case.dmean, None, case.group_starts, "relu", SLOPE)
    dx, dresidual = kernels.bn_backward(case.dy, x, None, *sites, *moments, True)
    double = [t.double() if t.is_floating_point() else t for t in (*sites, zeros, case.dmean)]
    expected, expected_dresidual = reference.bn_backward(
        case.dy.double(), torch.zeros_like(x).double(), None, *double, None, case.group_starts, "relu", SLOPE, True
    )
    assert_elements_close(dx, expected, torch.float32)
    assert_elements_close(dresidual, expected_dresidual, torch.float32)
    dx, dresidual = kernels.bn_backward(None, x, None, *sites, *moments, True)
    without_dy = reference.group_moments_backward(torch.zeros_like(x).double(), *double[3:], None, case.group_starts)
    assert_elements_close(dx, without_dy, torch.float32)
    assert not dresidual.any()


@pytest.mark.parametrize(
    "starts", [[0, -5, 9], [0, 3, 99], [4, 2, 0], [0, 0, 0], [2**62, -(2**62), 7], [5, 99], [6, 0, 6, 0]], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "contiguous_rows"])
def test_wrong_group_starts_lead_nowhere_outside_of_x(kernels, starts, layout):
    """The host cannot see them. What comes out is undefined; that no other memory is touched the emulation checks."""
    case = case_of((6, 8, 3, 3), layout, residual=True)
    site = case.scale, case.shift
    for multiprocessors in (1, 132):
        kernels.device(multiprocessors)
        like = torch.ones(len(starts) - 1, 8)
        moments = like, like, like, torch.tensor(starts), "silu", SLOPE
        kernels.bn_forward(case.x, case.residual, *site, *moments[3:])
        kernels.bn_backward(case.dy, case.x, case.residual, NO_MASK, *site, *moments, True)


def test_says_what_it_expected_and_got(kernels):
    x, one, starts = torch.zeros(4, 3, 2, 2), torch.ones(3), torch.tensor([0, 4])
    for change, message in (
        (dict(x=x.int()), r"x must be float32, float64, bfloat16 or float16, got int32"),
        (dict(x=x[:, :, ::2]), r"x must be contiguous or channels_last, got float32 \[4, 3, 1, 2\] with strides"),
        (dict(residual=x.half()), r"residual must have x's dtype, shape and strides"),
        (dict(scale=one[:2]), r"scale must be float32 \[3\], got float32 \[2\]"),
        (dict(starts=starts.int()), r"group_starts must be int64 \[G \+ 1\] with at least one group, got int32"),
        (dict(act="gelu"), r"act must be one of identity, relu, .* got 'gelu'"),
    ):
        arguments = dict(x=x, residual=None, scale=one, shift=one, starts=starts, act="relu", slope=0.0) | change
        with pytest.raises(RuntimeError, match=message):
            kernels.bn_forward(*arguments.values())


# ---- the loss ----


def arguments_of(loss: Loss):
    options = {"distance": "l2", "use_std": False, "eps": 1e-8, "slack": 0.0, "mean_weight": 1.0, "var_weight": 1.0}
    tables = loss.target_mean, loss.target_var, loss.classes
    return loss.mean, loss.var, *tables, loss.site_weights, *(options | loss.options).values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(
    groups=st.integers(1, 6),
    classes=st.integers(1, 5),
    channels=st.lists(st.one_of(st.integers(1, 9), st.sampled_from([64, 257])), min_size=1, max_size=6),
    kind=st.sampled_from(EVERY_DISTANCE),
    slack=st.sampled_from([0.0, 0.25]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30)
def test_the_loss_agrees(kernels, dtype, groups, classes, channels, kind, slack, seed):
    kernels.device(132, seed)
    options = {"distance": kind[0], "use_std": kind[1], "slack": slack, "mean_weight": 0.5, "var_weight": 2.0}
    loss = Loss(groups, channels, classes, dtype, seed, **options)
    actual = kernels.bn_loss(*arguments_of(loss))
    value, distances, gradients = loss.double().run("reference")
    half = len(gradients) // 2
    expected = value, distances, *(torch.cat([g.flatten() for g in part]) for part in (gradients[:half], gradients[half:]))
    for result, wanted in zip(actual, expected):
        assert_close(result, wanted, dtype)


def test_more_sites_than_a_launch_takes(kernels):
    loss = Loss(3, [1 + s % 5 for s in range(250)], 4, torch.float64)
    for actual, expected in zip(kernels.bn_loss(*arguments_of(loss)), torch.ops.bnfuse_cpp.bn_loss(*arguments_of(loss))):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


def test_the_loss_is_rounded_once(kernels):
    """Distances enter it in float64: sites that all but cancel leave what float32 distances would have lost."""
    loss = Loss(2, (64, 64), 1, torch.float32)
    loss.mean[1], loss.var[1] = loss.mean[0] * (1 + 1e-6), loss.var[0]
    half = loss.target_mean.shape[1] // 2
    for target in (loss.target_mean, loss.target_var):
        target[:, half:] = target[:, :half]
    loss.site_weights = torch.tensor([1.0, -1.0])
    double = [t.double() for t in (*loss.mean, *loss.var, loss.target_mean, loss.target_var, loss.site_weights)]
    expected, _ = reference.bn_loss(double[:2], double[2:4], *double[4:6], None, double[6], *arguments_of(loss)[6:])
    torch.testing.assert_close(kernels.bn_loss(*arguments_of(loss))[0].double(), expected, rtol=1e-6, atol=0)


def test_a_class_that_the_table_does_not_hold_makes_its_group_nan(kernels):
    loss = Loss(3, (5, 2), 4)
    loss.classes = torch.tensor([3, 4, -1])
    value, distances, *gradients = kernels.bn_loss(*arguments_of(loss))
    assert value.isnan() and distances.isnan().tolist() == [[False] * 2, [True] * 2, [True] * 2]
    for gradient in gradients:
        groups = torch.cat([g.view(3, -1) for g in gradient.split([15, 6])], 1)
        assert groups.isnan().all(1).tolist() == [False, True, True] and not groups[0].isnan().any()


@pytest.mark.parametrize("backend", ["cuda", "cpu"])
@given(case=cases(), classes=st.sampled_from([1, 3]), kind=st.sampled_from(EVERY_DISTANCE), device=devices)
@settings(max_examples=30)
def test_a_site_with_targets_agrees(kernels, backend, case, classes, kind, device):
    """bn_forward, and the loss of its moments: on the CPU's operator, too, which is bn_forward and bn_loss in turn."""
    kernels.device(*device)
    operators = kernels if backend == "cuda" else torch.ops.bnfuse_cpp
    case = dense(case)
    channels, groups, dtype = case.x.shape[1], len(case.group_starts) - 1, reference.moment_dtype(case.x.dtype)
    loss = Loss(groups, (channels,), classes, dtype, distance=kind[0], use_std=kind[1], slack=0.25, eps=1e-3)
    _, _, *tables, _weights, distance, use_std, eps, slack, mean_weight, var_weight = arguments_of(loss)
    site = case.x, case.residual, case.scale, case.shift, case.group_starts
    options = distance, use_std, eps, slack, mean_weight, var_weight
    y, mean, var, mask, value, dmean, dvar = operators.bn_forward_with_targets(*site, *tables, 2.5, case.act, SLOPE, *options)
    for actual, expected in zip((y, mean, var, mask), operators.bn_forward(*site, case.act, SLOPE)):
        assert torch.equal(actual, expected)
    weights = torch.full((1,), 2.5, dtype=dtype)
    expected, _, *gradients = torch.ops.bnfuse_cpp.bn_loss([mean], [var], *tables, weights, *options)
    assert_close(value, expected.double(), dtype)
    for actual, wanted in zip((dmean, dvar), gradients):
        assert_close(actual, wanted.view(groups, channels).double(), dtype)


# ---- how x is cut ----

LAYOUTS = ("rows", "planes", "packed")


def plan(kernels, shape, channels_last, groups=1, aligned=True, multiprocessors=132):
    n, c, *spatial = shape
    values = (ctypes.c_int64 * 9)()
    sizes = [ctypes.c_int64(v) for v in (n, c, math.prod(spatial))]
    planes = ctypes.c_bool(not channels_last)
    kernels.plan(*sizes, planes, ctypes.c_int64(groups), ctypes.c_bool(aligned), ctypes.c_int64(multiprocessors), values)
    names = "layout aligned blocks threads used chunks chunk_rows partials steps".split()
    return SimpleNamespace(**dict(zip(names, values)))


SITES = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]
SITES += [(32, 112), (96, 112), (16, 112), (24, 56), (144, 56), (192, 28), (384, 14), (96, 14), (576, 14), (960, 7), (1280, 7)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels, size", SITES)
def test_networks_fill_the_device(kernels, channels, size, channels_last):
    """Every site of ResNet-18/50 and MobileNetV2 at 224 pixels, 256 images: whole vectors, blocks that all multiprocessors hold
    at a time, or take in turns that are full, threads with work, and partial moments that are little beside x."""
    for groups in (1, 10):
        cut = plan(kernels, (256, channels, size, size), channels_last, groups)
        assert cut.aligned and LAYOUTS[cut.layout] == ("rows" if channels_last else "planes" if size % 4 == 0 else "packed")
        places = 132 * {"rows": 1, "packed": 1, "planes": 3}[LAYOUTS[cut.layout]]
        turns = cut.blocks / places  # with more groups some of the blocks have nothing to do, and which is not known here
        assert turns <= 10 and (groups > 1 or turns / math.ceil(turns) >= 0.8), f"{cut.blocks} blocks for {places} places"
        assert cut.used >= 0.85 * cut.threads
        assert 2 * 8 * cut.partials <= 0.08 * 2 * 2 * 256 * channels * size**2


@given(
    samples=st.integers(1, 5000),
    channels=st.integers(1, 300),
    plane=st.integers(1, 2**26),
    channels_last=st.booleans(),
    groups=st.integers(1, 300),
    aligned=st.booleans(),
)
def test_no_moment_takes_more_values_than_float32_is_good_for(
    kernels, samples, channels, plane, channels_last, groups, aligned
):
    """One after the other; the threads' moments are put together in float64."""
    assert plan(kernels, (samples, channels, plane), channels_last, groups, aligned).steps <= 512


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    channels=st.integers(1, 70),
    plane=st.integers(2, 300),
    channels_last=st.booleans(),
    multiprocessors=st.sampled_from([1, 3, 132]),
)
def test_every_group_has_numbers_for_its_chunks(kernels, lengths, channels, plane, channels_last, multiprocessors):
    if sum(lengths) == 0:
        return
    cut = plan(kernels, (sum(lengths), channels, plane), channels_last, len(lengths), True, multiprocessors)
    rows_a_sample, start, taken = plane if channels_last else 1, 0, []
    for group, length in enumerate(lengths):
        first = start * rows_a_sample // cut.chunk_rows + group
        taken += range(first, first + math.ceil(length * rows_a_sample / cut.chunk_rows))
        start += length
    assert len(set(taken)) == len(taken) and max(taken) < cut.chunks
