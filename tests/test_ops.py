"""The operators: every backend against the reference in float64, their autograd, their compilation, their errors.

Most tests draw values that are small multiples of a power of two, so that scale·x + shift (+ residual) is exact in
every dtype and hits the kinks of the activations exactly; see tolerances.py.
"""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from functorch.compile import aot_function, nop
from hypothesis import given
from hypothesis import strategies as st
from tolerances import LARGE_MEAN_VARIANCE_RELATIVE, assert_elements_close, assert_moments_close
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from bnfuse import backends, ops, reference
from bnfuse.errors import BackendError, InputError

pytestmark = pytest.mark.usefixtures("poisoned_memory", "extension")
SLOPE = 0.125


# ---- inputs ----


@dataclass
class Case:
    """One site with everything that its forward and backward pass take."""

    x: Tensor  # [N, C, *spatial]
    residual: Tensor | None  # like x
    scale: Tensor  # [C]
    shift: Tensor  # [C]
    group_starts: Tensor  # int64 [G + 1]
    act: str
    dy: Tensor  # like x
    dmean: Tensor  # [G, C]
    dvar: Tensor  # [G, C]

    def double(self) -> "Case":
        """The same values in float64, and in the same memory layout."""
        return Case(**{k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in vars(self).items()})

    def run(self, backend: str) -> tuple[Tensor, ...]:
        """y, mean, var, dx (and dresidual) through the public operator and its autograd."""
        x = self.x.detach().requires_grad_()
        residual = None if self.residual is None else self.residual.detach().requires_grad_()
        y, mean, var = ops.bn_act(
            x,
            self.scale,
            self.shift,
            group_starts=self.group_starts,
            residual=residual,
            act=self.act,
            slope=SLOPE,
            backend=backend,
        )
        inputs = [x] if residual is None else [x, residual]
        gradients = torch.autograd.grad([y, mean, var], inputs, [self.dy, self.dmean, self.dvar])
        return y.detach(), mean.detach(), var.detach(), *gradients


def in_layout(values: Tensor, layout: str) -> Tensor:
    """The same values, laid out as named."""
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":  # every other channel of a larger tensor: not dense
        return values.repeat_interleave(2, dim=1)[:, ::2]
    if layout == "offset":  # contiguous, and not aligned to more than an element
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
    return values


def make_case(shape, *, dtype=torch.float32, layout="contiguous", groups=None, act="relu", residual=False, seed=0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    moments = reference.moment_dtype(dtype)
    groups = [shape[0]] if groups is None else groups

    def eighths(*size, low=-32, high=33, dtype=dtype, layout="contiguous"):
        return in_layout((torch.randint(low, high, size, generator=generator) / 8).to(dtype), layout)

    channels = shape[1]
    return Case(
        x=eighths(*shape, layout=layout),
        residual=eighths(*shape, layout=layout) if residual else None,
        scale=eighths(channels, low=1, high=17, dtype=moments),
        shift=eighths(channels, low=-8, high=9, dtype=moments),
        group_starts=torch.tensor([0, *groups]).cumsum(0),
        act=act,
        dy=eighths(*shape, layout=layout),
        dmean=eighths(len(groups), channels, dtype=moments),
        dvar=eighths(len(groups), channels, dtype=moments),
    )


@st.composite
def cases(draw) -> Case:
    groups = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    channels = draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 31, 64, 70])))
    spatial = draw(st.lists(st.integers(1, 9), max_size=3))
    return make_case(
        (sum(groups), channels, *spatial),
        dtype=draw(st.sampled_from(ops.DTYPES)),
        layout=draw(st.sampled_from(["contiguous", "channels_last", "sliced", "offset"])),
        groups=groups,
        act=draw(st.sampled_from(reference.ACTIVATIONS)),
        residual=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def assert_agrees_with_the_reference(case: Case, backend: str) -> None:
    dtype = case.x.dtype
    y, mean, var, *gradients = case.run(backend)
    expected_y, expected_mean, expected_var, *expected_gradients = case.double().run("reference")
    assert y.shape == case.x.shape
    assert_elements_close(y, expected_y, dtype)
    assert_moments_close(mean, expected_mean, dtype)
    assert_moments_close(var, expected_var, dtype)
    assert len(gradients) == len(expected_gradients)
    for gradient, expected in zip(gradients, expected_gradients):
        assert_elements_close(gradient, expected, dtype)


# ---- values ----


@given(case=cases())
def test_agrees_on_drawn_shapes(case):
    assert_agrees_with_the_reference(case, "cpp")


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_agrees_for_every_kernel(dtype, act, residual):
    for layout in ("contiguous", "channels_last"):
        case = make_case((5, 11, 6, 7), dtype=dtype, layout=layout, groups=[2, 0, 3], act=act, residual=residual)
        assert_agrees_with_the_reference(case, "cpp")


# Larger than one tile of the kernels in every direction, and no multiple of it.
@pytest.mark.parametrize(
    "shape, layout",
    [
        ((3, 2, 71, 73), "contiguous"),  # a plane of several tiles
        ((13, 3, 7, 7), "contiguous"),  # tiles of planes of several samples, which the groups cut
        ((7, 37, 5, 9), "offset"),  # the same, and no plane is aligned
        ((3, 70, 25, 25), "contiguous"),  # a sample in several pieces
        ((200, 5, 3, 3), "contiguous"),  # tiny planes: several samples a row of the tile, some left over
        ((40, 70, 3, 3), "contiguous"),  # tiny planes of many channels
        ((3, 3, 71, 73), "channels_last"),  # few channels: several positions a row of the tile, some left over
        ((3, 70, 31, 33), "channels_last"),  # several tiles and chunks of rows
        ((3, 523, 9, 11), "channels_last"),  # channels in several tiles
        ((301, 37), "contiguous"),  # no spatial dimensions
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_beyond_one_tile(shape, layout, dtype):
    n = shape[0]
    case = make_case(shape, dtype=dtype, layout=layout, groups=[n // 3, n - n // 3], act="relu", residual=True)
    assert_agrees_with_the_reference(case, "cpp")
    mask = ops.operators("cpp", "cpu").bn_forward(
        case.x, case.residual, case.scale, case.shift, case.group_starts, "relu", 0.0
    )[3]
    _, _, _, expected = reference.bn_forward(
        case.x.double(),
        case.residual.double(),
        case.scale.double(),
        case.shift.double(),
        case.group_starts,
        "relu",
        0.0,
    )
    assert torch.equal(mask, expected)


@given(case=cases())
def test_mask_is_the_reference_s(case):
    x = case.x if ops._is_dense(case.x) else case.x.contiguous()
    residual = None if case.residual is None else ops._match_layout(case.residual, x)
    arguments = x, residual, case.scale, case.shift, case.group_starts, case.act, SLOPE
    actual, expected = (ops.operators(b, "cpu").bn_forward(*arguments)[3] for b in ("cpp", "reference"))
    assert torch.equal(actual, expected)


@given(case=cases())
def test_group_moments_agree(case):
    def run(x, backend):
        x = x.detach().requires_grad_()
        mean, var = ops.group_moments(x, case.group_starts, backend=backend)
        (gradient,) = torch.autograd.grad([mean, var], x, [case.dmean.to(mean.dtype), case.dvar.to(mean.dtype)])
        return mean.detach(), var.detach(), gradient

    mean, var, gradient = run(case.x, "cpp")
    expected_mean, expected_var, expected_gradient = run(case.x.double(), "reference")
    assert_moments_close(mean, expected_mean, case.x.dtype)
    assert_moments_close(var, expected_var, case.x.dtype)
    assert_elements_close(gradient, expected_gradient, case.x.dtype)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4), (0, 3)], ids=str)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_nothing_in_nothing_out(shape, backend):
    case = make_case(shape, groups=[0, shape[0]], residual=True)
    y, mean, var, dx, dresidual = case.run(backend)
    assert y.shape == dx.shape == dresidual.shape == shape
    assert mean.shape == var.shape == (2, shape[1])
    assert not mean.any() and not var.any()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("layouts", [("contiguous", "channels_last"), ("channels_last", "sliced"), ("sliced", "contiguous")])
def test_what_the_operator_refuses_for_its_layout_is_copied(layouts, backend):
    case = make_case((4, 6, 5, 5), groups=[1, 3], residual=True)
    x, residual = in_layout(case.x, layouts[0]), in_layout(case.residual, layouts[1])
    expected = case.double().run("reference")[:3]
    checked = ops.bn_act(
        x, case.scale, case.shift, group_starts=case.group_starts, residual=residual, act=case.act, backend=backend
    )
    unchecked = ops.bn_act_unchecked(x, residual, case.scale, case.shift, case.group_starts, case.act, SLOPE, backend)
    for actual in (checked, unchecked):
        assert_elements_close(actual[0], expected[0], torch.float32)
        for moments, right in zip(actual[1:], expected[1:]):
            assert_moments_close(moments, right, torch.float32)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("given", ["y", "mean", "var"])
def test_gradients_through_one_output_alone(layout, given):
    case = make_case((4, 6, 5, 5), dtype=torch.float64, layout=layout, groups=[1, 3], residual=True)

    def run(backend):
        x, residual = case.x.detach().requires_grad_(), case.residual.detach().requires_grad_()
        outputs = ops.bn_act(
            x, case.scale, case.shift, group_starts=case.group_starts, residual=residual, act="relu", backend=backend
        )
        output = dict(zip(("y", "mean", "var"), outputs))[given]
        cotangent = {"y": case.dy, "mean": case.dmean, "var": case.dvar}[given]
        return torch.autograd.grad(output, (x, residual), cotangent, allow_unused=True)

    for actual, expected in zip(run("cpp"), run("reference")):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_elements_close(actual, expected, torch.float64)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(backend, act, layout):
    generator = torch.Generator().manual_seed(0)
    x, residual = (
        in_layout(t, layout).requires_grad_() for t in torch.randn(2, 3, 2, 2, 1, dtype=torch.float64, generator=generator)
    )
    scale, shift = torch.rand(2, 2, dtype=torch.float64, generator=generator) + 0.5
    starts = torch.tensor([0, 1, 3])

    def site(x, residual=None):
        return ops.bn_act(x, scale, shift, group_starts=starts, residual=residual, act=act, backend=backend)

    assert torch.autograd.gradcheck(site, (x, residual))
    assert torch.autograd.gradcheck(site, (x,))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck_of_group_moments(backend, layout):
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = in_layout(x, layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.group_moments(x, torch.tensor([0, 1, 3]), backend=backend), (x,))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(16, 5, 40, 40), (16, 5, 7, 7), (64, 5)], ids=str)
def test_a_large_mean_does_not_cancel(shape, layout):
    x = in_layout(1e4 + torch.randn(shape, generator=torch.Generator().manual_seed(0)), layout)
    mean, var = ops.group_moments(x, backend="cpp")
    expected_mean, expected_var = reference.group_moments(x.double(), torch.tensor([0, shape[0]]))
    assert_moments_close(mean, expected_mean, torch.float32)
    torch.testing.assert_close(var.double(), expected_var, rtol=LARGE_MEAN_VARIANCE_RELATIVE, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_nan_and_inf_reach_the_outputs(value, layout, dtype):
    case = make_case((4, 3, 9, 9), dtype=dtype, layout=layout, groups=[2, 2])
    case.x[3, 1, 8, 8] = value
    for act in reference.ACTIVATIONS:
        case.act = act
        y, mean, var, dx = case.run("cpp")
        expected_y, _, _, expected_dx = case.double().run("reference")
        for moment in (mean, var):
            assert moment.isfinite().tolist() == [[True] * 3, [True, False, True]]
        assert torch.equal(y.isnan(), expected_y.isnan()) and torch.equal(y.isinf(), expected_y.isinf())
        # Whether a mean with inf in it is inf or NaN depends on the order of a sum; that it is not finite does not.
        assert torch.equal(dx.isfinite(), expected_dx.isfinite())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(8, 5, 33, 31), (8, 70, 33, 31), (8, 300, 7, 7)], ids=str)
def test_same_bits_at_any_number_of_threads(shape, layout):
    generator = torch.Generator().manual_seed(0)
    case = make_case(shape, layout=layout, groups=[3, 5], act="silu", residual=True)
    case.x = in_layout(torch.randn(shape, generator=generator), layout)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(case.run("cpp"))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


def test_statistics_are_float32_for_narrower_input():
    for dtype in (torch.bfloat16, torch.float16):
        case = make_case((6, 4, 5, 5), dtype=dtype, groups=[1, 0, 5])
        y, mean, var, dx = case.run("cpp")
        assert y.dtype == dx.dtype == dtype and mean.dtype == var.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_narrow_value_is_read_and_rounded_as_torch_does(dtype):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    every = bits.view(dtype).view(1, 1, -1)
    one, zero = torch.ones(1), torch.zeros(1)
    # Identity reads and writes every value; halving and thirding make results that need rounding, subnormals included.
    for factor in (1.0, 0.5, 1 / 3, 3.0):
        y, _, _ = ops.bn_act(every, one * factor, zero, backend="cpp")
        expected = (every.float() * factor).to(dtype)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(0), expected.nan_to_num(0))


def test_the_instruction_set_asked_for_is_the_one_that_runs():
    asked = os.environ.get("BNFUSE_INSTRUCTION_SET")
    running = backends.extension.instruction_set()
    assert running in backends.extension.instruction_sets()
    assert asked is None or running.lower().replace("-", "") == asked


@pytest.mark.parametrize("name", ["avx512", "avx2", "baseline"])
def test_every_instruction_set_agrees(name):
    built = [n.lower().replace("-", "") for n in backends.extension.instruction_sets()]
    if name not in built:
        pytest.skip(f"{name} is not built for this kind of processor")
    if name == backends.extension.instruction_set().lower().replace("-", ""):
        return  # it is the one that all other tests run
    tests = "asked_for or every_kernel or narrow_value or (beyond_one_tile and float32)"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", tests],
        env={**os.environ, "BNFUSE_INSTRUCTION_SET": name},
        capture_output=True,
        text=True,
    )
    if "this processor does not support" in ran.stdout:
        pytest.skip(f"this processor has no {name}")
    assert ran.returncode == 0, ran.stdout


def test_an_unknown_instruction_set_is_an_error_of_the_import():
    ran = subprocess.run(
        [sys.executable, "-c", "import torch; from bnfuse import _C"],
        capture_output=True,
        text=True,
        env={**os.environ, "BNFUSE_INSTRUCTION_SET": "mmx"},
    )
    assert "ImportError: BNFUSE_INSTRUCTION_SET is 'mmx', expected one of" in ran.stderr


# ---- the operators as PyTorch sees them ----


def operator_arguments(backend: str, layout: str, act: str, residual: bool):
    """Arguments of all four operators; gradients are asked for where they exist."""
    case = make_case((4, 3, 5, 5), layout=layout, groups=[1, 3], act=act, residual=residual)
    kernels = ops.operators(backend, "cpu")
    _, mean, _, mask = kernels.bn_forward(case.x, case.residual, case.scale, case.shift, case.group_starts, act, SLOPE)
    x = case.x.detach().requires_grad_()
    res = case.residual.detach().requires_grad_() if residual else None
    return {
        "bn_forward": (x, res, case.scale, case.shift, case.group_starts, act, SLOPE),
        "bn_backward": (
            case.dy,
            case.x,
            None if mask.numel() else case.residual,
            mask,
            case.scale,
            case.shift,
            mean,
            case.dmean,
            case.dvar,
            case.group_starts,
            act,
            SLOPE,
            residual,
        ),
        "group_moments": (x, case.group_starts),
        "group_moments_backward": (case.x, mean, case.dmean, case.dvar, case.group_starts),
    }


def test_the_schemas_in_python_are_those_in_c():
    for name, schema in (ops.SCHEMAS | ops.COMPILED_SCHEMAS).items():
        compiled = getattr(torch.ops.bnfuse_cpp, name).default._schema
        assert str(compiled) == str(torch._C.parse_schema(f"bnfuse_cpp::{name}{schema}"))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("operator", ["bn_forward", "bn_backward", "group_moments", "group_moments_backward"])
def test_opcheck(operator, layout, backend):
    for act, residual in (("relu", False), ("relu", True), ("silu", True)):
        arguments = operator_arguments(backend, layout, act, residual)[operator]
        torch.library.opcheck(getattr(ops.operators(backend, "cpu"), operator), arguments)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_to_one_graph(backend, layout):
    case = make_case((4, 3, 5, 5), dtype=torch.float64, layout=layout, groups=[1, 3], residual=True)

    def step(x, residual):
        y, mean, var = ops.bn_act(
            x, case.scale, case.shift, group_starts=case.group_starts, residual=residual, act="relu", backend=backend
        )
        more = ops.group_moments(y, backend=backend)
        return (y * case.dy).sum() + (mean * case.dmean).sum() + (var * case.dvar).sum() + sum(m.sum() for m in more)

    def run(function):
        x, residual = case.x.detach().requires_grad_(), case.residual.detach().requires_grad_()
        loss = function(x, residual)
        return loss.detach(), *torch.autograd.grad(loss, (x, residual))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled), run(step)):
        assert_elements_close(actual, expected, torch.float64)


def under_fake_tensors(function, x):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return function(x)


TRACED = {
    "aot_function": lambda f, x: aot_function(f, fw_compiler=nop)(x.requires_grad_()),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "make_fx": lambda f, x: make_fx(torch.func.functionalize(f), tracing_mode="fake")(x)(x),
    "make_fx_symbolic": lambda f, x: make_fx(torch.func.functionalize(f), tracing_mode="symbolic")(x)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x[None])[0],
    "fake": under_fake_tensors,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("trace", TRACED)
def test_what_traces_leaves_nothing_behind(trace):
    """The groups that are kept from call to call are ordinary tensors, whatever the first call of a batch size ran under."""
    x = make_case((5, 3, 2, 2)).x
    ops._cached_one_group.cache_clear()
    # make_fx lifts no tensor that a function closes over.
    traced = TRACED[trace](lambda x: ops.bn_act(x, torch.ones(3), torch.zeros(3), backend="cpp")[0], x.clone())
    assert traced.shape == x.shape
    y, mean, _ = ops.bn_act(x, ONE, ZERO, backend="cpp")
    for tensor in (y, mean, ops._cached_one_group(5, x.device)):
        assert type(tensor) is Tensor and not torch._is_functional_tensor(tensor)
        assert not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    assert torch.equal(y, x) and ops._cached_one_group(5, x.device).tolist() == [0, 5]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_groups_and_classes_are_not_read_while_something_traces(backend):
    def losses(x, starts, classes, constants, targets):
        options = dict(group_starts=starts, classes=classes, backend="cpp")
        _, loss, mean, var = ops.bn_act_loss(x.transpose(2, 3), *constants, *targets, **options)
        return loss + ops.bn_loss([mean], [var], *targets, constants[0][:1], classes=classes, backend=backend)[0]

    arguments = torch.tensor([0, 2, 4]), torch.tensor([1, 0]), torch.stack([ONE, ZERO]), torch.ones(2, 2, 3)
    traced = aot_function(losses, fw_compiler=nop)(X.clone().requires_grad_(), *arguments)
    assert torch.equal(traced, losses(X, *arguments))


def test_gradients_that_are_views_are_taken_as_they_are():
    """Autograd hands over expanded and transposed gradients; the kernels walk dense memory."""
    case = make_case((4, 3, 5, 6), dtype=torch.float64, act="identity", residual=True)

    def run(backend):
        x, residual = case.x.detach().requires_grad_(), case.residual.detach().requires_grad_()
        y, mean, var = ops.bn_act(x, case.scale, case.shift, residual=residual, backend=backend)
        loss = y.sum() + (y.transpose(2, 3) * case.dy.transpose(2, 3).contiguous()).sum() + mean.sum() + var.sum()
        return torch.autograd.grad(loss, (x, residual))

    for actual, expected in zip(run("cpp"), run("reference")):
        assert_elements_close(actual, expected, torch.float64)


# ---- what is refused ----

X = torch.zeros(4, 3, 2, 2)
ONE, ZERO = torch.ones(3), torch.zeros(3)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=X.long()), r"x must be one of torch.float32, .*, got torch.int64"),
        (dict(x=X[0, 0, 0]), r"x must be \[N, C, \*spatial\] with 0 to 3 spatial dimensions, got shape \[2\]"),
        (dict(x=torch.zeros(1, 3, 1, 1, 1, 1)), r"0 to 3 spatial dimensions, got shape \[1, 3, 1, 1, 1, 1\]"),
        (dict(x=torch.zeros(8)[::2], group_starts=torch.tensor([0, 4])), r"with 0 to 3 spatial dimensions, got shape \[4\]"),
        (dict(group_starts=[0, 4]), r"group_starts must be a tensor, int64 \[G \+ 1\], got a list"),
        (dict(scale=torch.ones(4)), r"scale must be torch.float32 \[3\] .* got torch.float32 \[4\]"),
        (dict(shift=ZERO.double()), r"shift must be torch.float32 \[3\] .* got torch.float64 \[3\]"),
        (dict(x=X.double()), r"scale must be torch.float64 \[3\] .* got torch.float32 \[3\]"),
        (dict(scale=torch.ones(3, requires_grad=True)), r"scale asks for a gradient.*detach it"),
        (dict(residual=X[:2]), r"residual must be like x, .* \[4, 3, 2, 2\] .* got torch.float32 \[2, 3, 2, 2\]"),
        (dict(residual=X.half()), r"residual must be like x, torch.float32 .* got torch.float16"),
        (dict(act="gelu"), r"unknown activation 'gelu'; choose one of identity, relu"),
        (dict(backend="fast"), r"unknown backend 'fast'; choose one of auto"),
        (dict(group_starts=torch.tensor([0, 4]).int()), r"group_starts must be int64 \[G \+ 1\].* got torch.int32"),
        (
            dict(group_starts=torch.tensor([0])),
            r"group_starts must be int64 .* at least one group, got torch.int64 \[1\]",
        ),
        (dict(group_starts=torch.tensor([0, 3])), r"from 0 to the batch size 4 without decreasing, got \[0, 3\]"),
        (dict(group_starts=torch.tensor([1, 4])), r"from 0 to the batch size 4 without decreasing, got \[1, 4\]"),
        (dict(group_starts=torch.tensor([0, 3, 2, 4])), r"without decreasing, got \[0, 3, 2, 4\]"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_bn_act_says_what_it_expected_and_got(change, message):
    arguments = {"x": X, "scale": ONE, "shift": ZERO, **change}
    with pytest.raises(InputError, match=message):
        ops.bn_act(arguments.pop("x"), arguments.pop("scale"), arguments.pop("shift"), **arguments)


@pytest.mark.parametrize("name", ["residual", "scale", "shift", "group_starts", "target_mean", "target_var", "classes"])
def test_one_argument_without_memory_is_an_error(name):
    """A tensor on "meta" takes the whole operator there, whose outputs would be memory that nobody wrote."""
    tensors = dict(x=X, residual=X, scale=ONE, shift=ZERO, target_mean=torch.zeros(2, 3), target_var=torch.ones(2, 3))
    tensors |= dict(group_starts=torch.tensor([0, 4]), classes=torch.tensor([1]))
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(InputError, match="meta"):
        ops.bn_act_loss(**tensors, backend="cpp")
    targets = {key: tensors.pop(key) for key in ("target_mean", "target_var", "classes")}
    with pytest.raises(InputError, match="meta"):
        if name in tensors:
            ops.bn_act(**tensors, backend="cpp")
        else:
            ops.bn_loss([ZERO[None]], [ONE[None]], **targets, site_weights=ONE[:1], backend="cpp")


def test_the_groups_that_a_graph_has_captured_are_never_let_go():
    """Nothing but bnfuse keeps the memory that each replay reads, however many batch sizes come after it."""
    first = ops.check_group_starts(None, torch.empty(7, 1))
    for samples in range(1000, 1200):
        ops.check_group_starts(None, torch.empty(samples, 1))
    assert ops.check_group_starts(None, torch.empty(7, 1)) is first


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_nothing_without_channels_is_held_against_targets(backend):
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("Triton is not interpreted where there is a GPU")
    x, none, table = torch.zeros(4, 0, 2), torch.zeros(0), torch.zeros(1, 0)
    with pytest.raises(InputError, match=r"x must have at least one channel to be held against targets, got shape \[4, 0, 2\]"):
        ops.bn_act_loss(x, none, none, table, table, group_starts=torch.tensor([0, 4]), backend=backend)
    moments = [torch.ones(1, 2), torch.ones(1, 0)]
    for sites in (moments, moments[1:]):
        targets = torch.ones(1, sum(site.shape[1] for site in sites))
        with pytest.raises(InputError, match=r"the mean of every site must have at least one channel .* got shape \[1, 0\]"):
            ops.bn_loss(sites, sites, targets, targets, torch.ones(len(sites)), backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("classes", [None, torch.zeros(0, dtype=torch.int64)])
def test_of_no_groups_there_is_no_loss(backend, classes):
    none, targets = [torch.ones(0, 2)], torch.ones(1 if classes is None else 3, 2)
    with pytest.raises(InputError, match="these are moments of none: pass those of at least one"):
        ops.bn_loss(none, none, targets, targets, torch.ones(1), classes=classes, backend=backend)


def test_a_backend_that_cannot_run_on_the_device_is_an_error():
    with pytest.raises(BackendError, match="'cpp' was asked for a tensor on 'cuda' but runs on cpu"):
        backends.resolve("cpp", "cuda")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=X[:, :, ::2]), r"x must be contiguous or channels_last, got float32 \[4, 3, 1, 2\] with strides"),
        (dict(x=X.int()), r"x must be float32, float64, bfloat16 or float16, got int32"),
        (dict(residual=X.to(memory_format=torch.channels_last)), r"residual must have x's dtype, shape and strides"),
        (dict(scale=torch.ones(2)), r"scale must be float32 \[3\], got float32 \[2\]"),
        (dict(shift=ZERO.double()), r"shift must be float32 \[3\], got float64 \[3\]"),
        (dict(group_starts=torch.tensor([0, 5])), r"from 0 to the batch size 4 without decreasing, got \[0, 5\]"),
        (dict(act="gelu"), r"act must be one of identity, relu, .* got 'gelu'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_the_kernels_check_at_their_own_border(change, message):
    """Python checks first; a compiled graph and a caller of the raw operator do not pass there."""
    arguments = {
        "x": X,
        "residual": None,
        "scale": ONE,
        "shift": ZERO,
        "group_starts": torch.tensor([0, 4]),
        "act": "relu",
        "slope": 0.0,
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bnfuse_cpp.bn_forward(*arguments.values())


def test_the_backward_kernel_checks_its_mask_and_gradients():
    kernels = torch.ops.bnfuse_cpp
    starts, no_mask = torch.tensor([0, 4]), torch.empty(0, dtype=torch.uint8)
    moments = torch.zeros(1, 3)

    def backward(dy=X, mask=no_mask, dmean=None):
        return kernels.bn_backward(dy, X, None, mask, ONE, ZERO, moments, dmean, None, starts, "relu", 0.0, False)

    with pytest.raises(RuntimeError, match=r"dy must have x's dtype, shape and strides"):
        backward(dy=X.transpose(2, 3))
    with pytest.raises(RuntimeError, match=r"mask must be contiguous uint8 \[12, 1\] or empty, got uint8 \[5\]"):
        backward(mask=torch.zeros(5, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match=r"dmean must be float32 \[1, 3\], got float32 \[2, 3\]"):
        backward(dmean=torch.zeros(2, 3))


def test_memory_is_poisoned():
    assert torch.empty(3).isnan().all() and torch.empty_like(X).isnan().all()
