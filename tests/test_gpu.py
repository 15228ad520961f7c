"""The operators on a GPU: values, gradients, dispatcher, compilation, graph capture, no waiting for the device.

Both GPU backends run every test; expectations are computed on the CPU in float64. Without a CUDA device all is skipped.
"""

import copy
import dataclasses
import itertools
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import virtual_cases as cases
from networks import Chains, settle
from test_ops import Case, assert_agrees_with_the_reference, in_layout, make_case
from tolerances import LARGE_MEAN_VARIANCE_RELATIVE, assert_elements_close, assert_moments_close
from torch import Tensor

from bnfuse import Matcher, backends, fuse, group_by_class, ops, reference
from bnfuse.averaging import MovingAverage
from bnfuse.convolutions import FrozenConvolution, ImageConvolution
from bnfuse.models import build_model
from bnfuse.optimisation import optimise

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

# Sites of ResNet-50 and MobileNetV2 with few samples, and what vectors and tiles do not divide.
SHAPES = [
    (4, 64, 56, 56),
    (4, 256, 56, 56),
    (8, 2048, 7, 7),
    (8, 96, 112, 112),
    (3, 24, 57, 55),
    (5, 70, 31, 33),
    (2, 3, 17, 19, 5),
    (301, 37),
    (64, 1280, 1, 1),
    (1, 16, 8, 8),
]
LAYOUTS = ["contiguous", "channels_last"]


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """No TF32: a step of Adam turns what it rounds off into the sign of a small gradient."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture(params=["cuda", "triton"])
def backend(request) -> str:
    found = next(b for b in backends.describe() if b.name == request.param)
    if not found.available:
        pytest.skip(f"{found.name}: {found.reason}")
    return found.name


def on_gpu(case: Case) -> Case:
    return Case(**{k: v.cuda() if isinstance(v, Tensor) else v for k, v in vars(case).items()})


def agree(case: Case, backend: str) -> None:
    """The case on the GPU against the reference in float64 on the CPU."""
    actual, expected = [t.cpu() for t in on_gpu(case).run(backend)], case.double().run("reference")
    for ours, theirs, moments in zip(actual, expected, (False, True, True, False, False)):
        (assert_moments_close if moments else assert_elements_close)(ours, theirs, case.x.dtype)


@pytest.mark.parametrize("layout", [*LAYOUTS, "sliced", "offset"])
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees(backend, shape, dtype, layout):
    n = shape[0]
    groups = [n // 3, 0, n - n // 3]
    agree(make_case(shape, dtype=dtype, layout=layout, groups=groups, act="relu"), backend)
    agree(make_case(shape, dtype=dtype, layout=layout, groups=groups, act="relu", residual=True, seed=1), backend)


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_activation(backend, layout, residual, act):
    for dtype in ops.DTYPES:
        case = make_case((5, 72, 14, 14), dtype=dtype, layout=layout, groups=[2, 0, 3], act=act, residual=residual)
        agree(case, backend)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4), (0, 3)], ids=str)
def test_nothing_in_nothing_out(backend, shape):
    case = on_gpu(make_case(shape, groups=[0, shape[0]], residual=True))
    y, mean, var, dx, dresidual = case.run(backend)
    assert y.shape == dx.shape == dresidual.shape == shape
    assert mean.shape == var.shape == (2, shape[1]) and not mean.any() and not var.any()


def test_many_groups_of_any_length(backend):
    lengths = torch.randint(0, 4, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    for layout in LAYOUTS:
        agree(make_case((sum(lengths), 17, 5, 3), layout=layout, groups=lengths, act="silu"), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_moments(backend, layout):
    case = make_case((6, 40, 13, 11), dtype=torch.bfloat16, layout=layout, groups=[2, 4])
    x = case.x.cuda().requires_grad_()
    mean, var = ops.group_moments(x, case.group_starts.cuda(), backend=backend)
    (gradient,) = torch.autograd.grad([mean, var], x, [case.dmean.cuda(), case.dvar.cuda()])
    wide = case.double()
    expected_mean, expected_var = reference.group_moments(wide.x, wide.group_starts)
    assert_moments_close(mean.detach().cpu(), expected_mean, torch.bfloat16)
    assert_moments_close(var.detach().cpu(), expected_var, torch.bfloat16)
    expected = reference.group_moments_backward(wide.x, expected_mean, wide.dmean, wide.dvar, wide.group_starts)
    assert_elements_close(gradient.cpu(), expected, torch.bfloat16)


@pytest.mark.parametrize("distance", reference.DISTANCES)
@pytest.mark.parametrize("use_std", [False, True])
def test_the_loss_of_all_sites(backend, distance, use_std):
    generator = torch.Generator().manual_seed(0)
    channels, groups, rows = [3, 64, 2048, 1, 130] * 12, 5, 7
    draw = lambda *size: torch.randn(size, generator=generator).abs() + 0.1
    mean, var = ([draw(groups, c) for c in channels] for _ in range(2))
    targets = draw(rows, sum(channels)), draw(rows, sum(channels)), draw(len(channels))
    classes = torch.tensor([6, 0, 3, 3, 1])
    options = dict(distance=distance, use_std=use_std, slack=0.25, mean_weight=0.5, var_weight=2.0)

    def run(device, dtype, backend):
        leaves = [[t.to(device, dtype).requires_grad_() for t in moments] for moments in (mean, var)]
        tables = [t.to(device, dtype) for t in targets]
        loss, distances = ops.bn_loss(*leaves, *tables, classes=classes.to(device), backend=backend, **options)
        gradients = torch.autograd.grad(loss, leaves[0] + leaves[1])
        return [t.detach().cpu() for t in (loss, distances, *gradients)]

    for actual, expected in zip(run("cuda", torch.float32, backend), run("cpu", torch.float64, "reference"), strict=True):
        assert_moments_close(actual, expected, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_site_with_its_own_targets(backend, layout):
    case = make_case((5, 72, 9, 9), layout=layout, groups=[2, 0, 3], act="relu", residual=True)
    generator = torch.Generator().manual_seed(2)
    targets = torch.randn(4, 72, generator=generator), torch.rand(4, 72, generator=generator)
    classes = torch.tensor([3, 1, 0])

    def run(case, targets, classes, backend):
        x, residual = case.x.detach().requires_grad_(), case.residual.detach().requires_grad_()
        y, loss, mean, var = ops.bn_act_loss(
            x,
            case.scale,
            case.shift,
            *targets,
            group_starts=case.group_starts,
            classes=classes,
            weight=0.5,
            residual=residual,
            act=case.act,
            backend=backend,
        )
        gradients = torch.autograd.grad([y, loss], [x, residual], [case.dy, torch.full_like(loss, 3)])
        return [t.detach().cpu() for t in (y, loss, mean, var, *gradients)]

    actual = run(on_gpu(case), [t.cuda() for t in targets], classes.cuda(), backend)
    expected = run(case.double(), [t.double() for t in targets], classes, "reference")
    for ours, theirs, moments in zip(actual, expected, (False, True, True, True, False, False), strict=True):
        (assert_moments_close if moments else assert_elements_close)(ours, theirs, torch.float32)


# ---- numerics ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 8, 40, 40), (16, 8, 7, 7), (512, 8)], ids=str)
def test_a_large_mean_does_not_cancel(backend, shape, layout):
    x = in_layout(1e4 + torch.randn(shape, generator=torch.Generator().manual_seed(0)), layout)
    mean, var = (t.cpu() for t in ops.group_moments(x.cuda(), backend=backend))
    expected_mean, expected_var = reference.group_moments(x.double(), torch.tensor([0, shape[0]]))
    assert_moments_close(mean, expected_mean, torch.float32)
    torch.testing.assert_close(var.double(), expected_var, rtol=LARGE_MEAN_VARIANCE_RELATIVE, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_inf_stay_in_their_channel_and_group(backend, layout, value):
    for dtype in ops.DTYPES:
        case = make_case((4, 24, 9, 9), dtype=dtype, layout=layout, groups=[2, 2], act="relu")
        clean = [t.clone() for t in on_gpu(case).run(backend)]
        case.x[3, 5, 8, 8] = value
        y, mean, var, dx = on_gpu(case).run(backend)
        elsewhere = torch.ones_like(y, dtype=torch.bool)
        elsewhere[2:, 5] = False
        assert torch.equal(y[elsewhere], clean[0][elsewhere]) and torch.equal(dx[elsewhere], clean[3][elsewhere])
        for moment, before in ((mean, clean[1]), (var, clean[2])):
            assert not moment[1, 5].isfinite()
            moment[1, 5] = before[1, 5]
            assert torch.equal(moment, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_input_gives_the_same_bits(backend, layout):
    case = make_case((32, 72, 29, 29), dtype=torch.bfloat16, layout=layout, groups=[5, 27], act="relu", residual=True)
    case.x = in_layout(torch.randn(case.x.shape, generator=torch.Generator().manual_seed(0)).bfloat16(), layout)
    case = on_gpu(case)
    first = case.run(backend)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(case.run(backend), first))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_elements_than_32_bits_count(backend, layout):
    shape = (2750, 64, 112, 112)  # 2.2e9 elements, 4.4 GB
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=memory_format)
    x.normal_(generator=torch.Generator("cuda").manual_seed(0))
    x[-1].fill_(3)  # its elements lie beyond 2³¹
    starts = torch.tensor([0, shape[0] - 1, shape[0]], device="cuda")
    scale, shift = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    y, mean, var = ops.bn_act(x, scale, shift, group_starts=starts, act="relu", backend=backend)
    assert (y[-1] == 3).all() and (y[-2] == x[-2].relu()).all()
    assert (mean[1] == 3).all() and (var[1] == 0).all()
    assert mean[0].abs().max() < 1e-3 and (var[0] - 1).abs().max() < 1e-3


# ---- dispatcher, compilation, graphs ----


def test_opcheck(backend):
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs it")
    case = on_gpu(make_case((4, 8, 5, 5), groups=[1, 3], act="relu", residual=True))
    found = ops.operators(backend, "cuda")
    x = case.x.requires_grad_()
    site = x, case.residual, case.scale, case.shift, case.group_starts
    torch.library.opcheck(found.bn_forward, (*site, "relu", 0.1))
    torch.library.opcheck(found.group_moments, (x, case.group_starts))
    tables = case.dmean.clone(), case.dvar.abs()
    options = "l2", False, 1e-8, 0.0, 1.0, 1.0
    classes = torch.tensor([1, 0], device="cuda")
    torch.library.opcheck(found.bn_forward_with_targets, (*site, *tables, classes, 0.5, "relu", 0.1, *options))
    moments = [case.dmean.clone().requires_grad_()], [case.dvar.abs().requires_grad_()]
    torch.library.opcheck(found.bn_loss, (*moments, *tables, classes, torch.ones(1, device="cuda"), *options))


class Step:
    """One synthesis step of a small network: images, loss, gradient, Adam."""

    def __init__(self, backend: str, model=None):
        torch.manual_seed(0)  # of the convolutions' weights
        model = (settle(Chains()) if model is None else model).cuda()
        self.fused, self.matcher = fuse(model, backend=backend), Matcher.from_running(model, backend=backend).cuda()
        self.images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)).cuda().requires_grad_()
        self.labels = torch.arange(12, device="cuda") % 5
        self.group_starts = torch.tensor([0, 5, 12], device="cuda")
        self.adam = torch.optim.Adam([self.images], lr=0.05, capturable=True)

    def loss(self, images: Tensor) -> Tensor:
        logits, moments = self.fused(images, self.group_starts)
        return torch.nn.functional.cross_entropy(logits, self.labels) + self.matcher(moments)

    def __call__(self) -> Tensor:
        loss = self.loss(self.images)
        (self.images.grad,) = torch.autograd.grad(loss, self.images)
        self.adam.step()
        return loss.detach()


def test_a_step_agrees_with_the_reference(backend):
    step, expected = Step(backend), Step("reference")
    for _ in range(3):
        torch.testing.assert_close(step(), expected(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.images, expected.images, rtol=1e-2, atol=1e-3)


def test_a_step_never_waits_for_the_device(backend):
    step = Step(backend)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_captured_in_a_graph(backend):
    captured, eager = Step(backend), Step(backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            captured()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()
    for _ in range(3):
        eager()
    for _ in range(4):
        graph.replay()
        eager()
    torch.testing.assert_close(captured.images, eager.images, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, dict(site_drop=0.3, unbiased=True, relative=True)], ids=str)
def test_a_unit_is_the_same_from_a_graph(backend, options):
    """The driver's own step with --cuda-graph, with views, and at two sizes; with a moving average where there are options."""
    teacher = cases.teacher()
    objective = cases.objective(teacher, tv_weight=0.1)
    of, average = objective.matcher, MovingAverage(0.4, start="first") if options else None
    matcher = Matcher(of.names, of.channels, of.target_mean, of.target_var, moving_average=average, **options).cuda()
    fused = fuse(teacher.model.cuda(), backend=backend)
    objective, labels = dataclasses.replace(objective, teacher=fused, matcher=matcher), cases.LABELS.cuda()
    groups = group_by_class(labels)
    unit = objective, groups, labels, cases.SEEDS, 5, teacher, cases.CONFIG, lambda *_: None
    made = [optimise(*unit, cuda_graph=on) for on in (False, True)]
    torch.testing.assert_close(made[1][0], made[0][0], rtol=1e-4, atol=1e-4)
    assert made[1][1] == pytest.approx(made[0][1], rel=1e-4)


def test_kernels_run_on_the_current_stream(backend):
    case = on_gpu(make_case((64, 64, 28, 28), layout="channels_last", act="relu"))
    expected = case.run(backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what runs on any other stream comes too early
        late = Case(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(case).items()})
        actual = late.run(backend)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("groups", [1, 32])
def test_a_frozen_convolution_keeps_and_copies_nothing(kernel, groups):
    conv = torch.nn.Conv2d(32, 32, kernel, padding=kernel // 2, groups=groups).cuda().requires_grad_(False)
    conv = conv.to(memory_format=torch.channels_last)
    x = torch.randn(32, 32, 64, 64, device="cuda").to(memory_format=torch.channels_last).requires_grad_()

    def run(module):
        y = module(x)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return y.detach(), gradient

    for actual, expected in zip(run(FrozenConvolution(conv)), run(conv)):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)  # another algorithm perhaps
        assert actual.stride() == expected.stride()


@pytest.mark.parametrize(
    "dtype, autocast",
    [(torch.float32, False), *itertools.product((torch.bfloat16, torch.float16), (False, True))],
    ids=str,
)
def test_the_convolution_that_images_enter_gives_torchs_values_and_gradient(dtype, autocast):
    """Over cells of pixels, in 16 bits with channels of zeros; each against float64, and no farther off than torch's own."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 64, 7, stride=2, padding=3).requires_grad_(False).cuda()
    images, dy = torch.randn(8, 3, 64, 64, device="cuda"), torch.randn(8, 64, 32, 32, device="cuda")

    def run(module, weights, given):
        module = copy.deepcopy(module).to(dtype=weights, memory_format=torch.channels_last)
        x = images.to(dtype=given, memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cuda", dtype, enabled=autocast and given == torch.float32):
            y = module(x)
        return y.detach(), torch.autograd.grad(y, x, dy.to(y.dtype))[0]

    weights = torch.float32 if autocast else dtype
    exact = run(conv, torch.float64, torch.float64)
    for ours, torchs, wide in zip(run(ImageConvolution(conv), weights, weights), run(conv, weights, weights), exact):
        assert ours.dtype == torchs.dtype and ours.stride() == torchs.stride()
        off = [((found.double() - wide).norm() / wide.norm()).item() for found in (ours, torchs)]
        assert off[0] <= max(1.5 * off[1], 1e-6)


def test_compiles_in_one_graph(backend):
    step = Step(backend)
    (expected,) = torch.autograd.grad(step.loss(step.images), step.images)
    compiled = torch.compile(step.loss, fullgraph=True)
    (actual,) = torch.autograd.grad(compiled(step.images), step.images)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_a_residual_network_under_autocast(backend):
    step = Step(backend, settle(build_model("resnet8", 5)))
    expected = step.loss(step.images)
    with torch.autocast("cuda", torch.bfloat16):
        actual = step.loss(step.images)
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(backend, tool, tmp_path):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    script = tmp_path / "small.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from test_gpu import on_gpu
            from test_ops import make_case
            for layout in ("contiguous", "channels_last", "offset"):
                for residual in (False, True):
                    case = make_case((3, 11, 7, 5), layout=layout, groups=[1, 2], act="relu", residual=residual)
                    on_gpu(case).run({backend!r})
            """
        )
    )
    command = [sanitizer, "--tool", tool, "--error-exitcode", "3", sys.executable, str(script)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if "Device not supported" in ran.stdout + ran.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert ran.returncode == 0, f"{ran.stdout[-4000:]}\n{ran.stderr[-2000:]}"


def test_nccl_sends_what_a_team_sends():
    """The collectives of `Team`, on the process group that `Ranks.start` makes, with one rank: two would want two GPUs."""
    if not torch.distributed.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    script = textwrap.dedent(
        """
        import torch
        import torch.distributed as dist
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
        for device in ("cpu", "cuda"):
            sums = torch.arange(1000, dtype=torch.float64, device=device) / 3
            rows = sums.float().view(10, 100)
            reduced, shares = sums.clone(), [torch.empty_like(rows)]
            dist.all_reduce(reduced)
            dist.all_gather(shares, rows)
            assert reduced.equal(sums) and shares[0].equal(rows), device
        dist.destroy_process_group()
        """
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_auto_takes_a_gpu_backend():
    assert backends.resolve("auto", "cuda") in ("cuda", "triton")
    assert_agrees_with_the_reference(make_case((2, 3, 4, 4)), "cpp")  # and the CPU still its own
