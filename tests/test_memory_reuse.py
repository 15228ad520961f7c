"""Memory that is used again: the pool behind the kernels' outputs, and gradients overwritten where they lie.

Both are invisible while they are right. Tests of the pool read `_C.pool_use`; tests of the backward pass in place hold a
gradient in every way in which one can be held, and look whether it changed.
"""

import copy
import ctypes
import io
import math
import pickle
import random
import threading
from contextlib import contextmanager

import pytest
import torch
from test_ops import in_layout
from tolerances import assert_elements_close
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bnfuse import backends, ops, reference

C = backends.extension
MB = 2**20
SHAPE = (4, 16, 128, 128)  # 4 MB in float32: a block of the pool
BLOCK = 4 * MB
EVERY_LAYOUT = ["contiguous", "channels_last"]


@pytest.fixture(autouse=True)
def empty_pool():
    """What earlier tests kept is given back first, so that bytes can be counted."""
    backends.release_memory()
    yield
    backends.release_memory()


@pytest.fixture
def poisoned_pool():
    C.poison_pool(True)
    yield
    C.poison_pool(False)


def in_use() -> int:
    return C.pool_use()[0]


def kept() -> int:
    return C.pool_use()[1]


def randn(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0) -> Tensor:
    return in_layout(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype), layout)


def bn_act(x: Tensor, act: str = "relu", *, residual: Tensor | None = None, backend: str = "cpp") -> Tensor:
    dtype = reference.moment_dtype(x.dtype)
    scale = torch.linspace(0.5, 2, x.shape[1], dtype=dtype)
    return ops.bn_act(x, scale, scale - 1, residual=residual, act=act, backend=backend)[0]


# ---- the pool ----


def test_a_freed_output_s_memory_is_kept_and_used_again():
    x = randn(*SHAPE)
    before = in_use()
    y = bn_act(x)
    assert in_use() - before == BLOCK and kept() == 0
    place = y.data_ptr()
    del y
    assert in_use() == before and kept() == BLOCK
    y = bn_act(x)
    assert y.data_ptr() == place
    assert in_use() - before == BLOCK and kept() == 0


def test_two_living_outputs_never_share_memory():
    x = randn(*SHAPE)
    outputs = [bn_act(x) for _ in range(4)]
    places = sorted(y.data_ptr() for y in outputs)
    assert all(b - a >= BLOCK for a, b in zip(places, places[1:]))
    del outputs[1]
    again = bn_act(x)
    assert again.data_ptr() in places and again.data_ptr() not in [y.data_ptr() for y in outputs]


def test_a_view_or_an_array_keeps_the_memory():
    x = randn(*SHAPE)
    before = in_use()
    y = bn_act(x)
    expected = y.clone()
    holders = [y[1:2], y.numpy(), y.detach(), y.untyped_storage()]
    del y
    while holders:
        assert in_use() - before == BLOCK and kept() == 0
        if len(holders) == 4:
            others = [bn_act(x * k) for k in range(3)]
            assert torch.equal(holders[0], expected[1:2]) and torch.equal(torch.from_numpy(holders[1]), expected)
            del others
            backends.release_memory()
        holders.pop()
    assert in_use() == before and kept() == BLOCK


def test_small_outputs_are_not_pooled():
    x = randn(4, 16, 16, 16)
    before = C.pool_use()
    y = bn_act(x)
    assert C.pool_use() == before and y.shape == x.shape


def test_a_smaller_output_takes_a_larger_block_unless_that_wastes_too_much():
    x = randn(48, 16, 128, 128)  # 48 MB
    before = in_use()
    del_me = bn_act(x)
    del del_me
    assert kept() == 12 * BLOCK
    small = bn_act(x[:1])  # 1 MB, in a block of 2: 24 times less than what is kept
    assert in_use() - before == 2 * MB and kept() == 12 * BLOCK
    large = bn_act(x[:8])
    assert in_use() - before == 2 * MB + 12 * BLOCK and kept() == 0
    del small, large


def test_what_is_kept_never_exceeds_what_was_in_use_at_once():
    choices, living, most = random.Random(0), [], 0
    x = randn(12, 16, 128, 128)
    start = in_use()
    for step in range(200):
        if step == 100:
            living.clear()
        if living and choices.random() < 0.5:
            living.pop(choices.randrange(len(living)))
        else:
            living.append(bn_act(x[: choices.randint(1, 12)]))
        used, waiting = C.pool_use()
        most = max(most, used)
        assert 0 <= waiting <= most
        assert used - start >= sum(y.numel() * 4 for y in living)
    living.clear()
    assert in_use() == start and 0 < kept() <= most


def test_release_memory_gives_back_what_is_kept_and_leaves_the_rest():
    x = randn(*SHAPE)
    start = in_use()
    first, second = bn_act(x), bn_act(x)
    expected = first.clone()
    del second
    assert kept() == BLOCK
    backends.release_memory()
    assert kept() == 0 and in_use() - start == BLOCK
    assert torch.equal(first, expected)
    del first
    assert kept() == BLOCK and in_use() == start  # it was in use when the rest was released
    backends.release_memory()
    backends.release_memory()
    assert C.pool_use() == (start, 0)


def test_outputs_that_outlive_many_others_stay_intact():
    x = [randn(*SHAPE, seed=seed) for seed in range(3)]
    expected = [bn_act(t, backend="reference") for t in x]
    old = [bn_act(t) for t in x]
    for k in range(10):
        young = [bn_act(t + k, "silu") for t in x]
        _, mean, _ = ops.bn_act(x[0], torch.ones(16), torch.zeros(16), backend="cpp")
        del young
    for y, wanted in zip(old, expected):
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


def test_tensors_of_one_thread_are_freed_and_made_in_others():
    x = randn(*SHAPE)
    start = in_use()
    expected = [bn_act(x + k) for k in range(4)]
    wrong = []

    def work(k):
        for _ in range(8):
            first, second = bn_act(x + k), bn_act(x + k)
            if not (torch.equal(first, expected[k]) and torch.equal(second, expected[k])):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    free = threading.Thread(target=expected.clear)
    free.start()
    free.join()
    assert in_use() == start and kept() >= 4 * BLOCK


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize("shape", [SHAPE, (2, 8, 16, 64, 64), (64, 16, 1024), (1024, 1024), (1, 64, 256, 64)], ids=str)
def test_outputs_are_like_x(shape, layout, dtype):
    x = randn(*shape, dtype=dtype, layout=layout).requires_grad_()
    before = in_use()
    y = bn_act(x, "silu", residual=x.detach())
    (dx,) = torch.autograd.grad(y, x, y.detach())
    (dmoments,) = torch.autograd.grad(ops.group_moments(x, backend="cpp")[1].sum(), x)
    assert in_use() - before >= 3 * x.numel() * x.element_size(), "the outputs are to come from the pool"
    for out in (y, dx, dmoments):
        assert out.dtype == dtype and out.shape == x.shape and out.stride() == x.stride()
        assert out.data_ptr() % 64 == 0 and out.storage_offset() == 0
        assert out.device == x.device and out.is_contiguous() == x.is_contiguous()


def test_an_output_can_be_used_like_any_tensor():
    x = randn(*SHAPE)
    expected = bn_act(x, backend="reference").double()
    y = bn_act(x)
    assert_elements_close(y, expected, torch.float32)
    values = y.clone()
    assert torch.equal(y.view(-1)[-5:], values.view(-1)[-5:]) and (y.numpy() == values.numpy()).all()
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    for same in (torch.load(file, weights_only=True), copy.deepcopy(y), pickle.loads(pickle.dumps(y)), torch.from_dlpack(y)):
        assert torch.equal(same, values)
    y.mul_(2).add_(1)
    assert torch.equal(y, 2 * values + 1)
    assert torch.equal(y.clone().share_memory_(), y)
    y.resize_(2, 16, 128, 128)
    assert torch.equal(y, 2 * values[:2] + 1)


def test_an_output_can_be_moved_to_shared_memory():
    y = bn_act(randn(*SHAPE))
    values, before = y.clone(), in_use()
    assert torch.equal(y.share_memory_(), values) and y.is_shared()
    assert before - in_use() == BLOCK


def test_an_output_can_be_resized_to_more():
    y = bn_act(randn(*SHAPE))
    values = y.clone()
    y.resize_(8, 16, 128, 128)
    assert torch.equal(y[:4], values)


def test_an_output_s_storage_can_be_emptied():
    """As FSDP and some ways of offloading activations free memory that others still refer to."""
    y = bn_act(randn(*SHAPE))
    y.untyped_storage().resize_(0)
    assert y.untyped_storage().nbytes() == 0


# ---- every element is written ----

WALKS = {
    "planes": ((11, 11, 71, 73), "contiguous"),
    "small_planes": ((301, 35, 7, 9), "contiguous"),
    "rows": ((5, 70, 43, 41), "channels_last"),
    "rows_of_several_tiles": ((9, 2100, 5, 7), "channels_last"),
    "few_channels_folded": ((5, 3, 231, 173), "channels_last"),
    "no_spatial": ((4001, 141), "contiguous"),
    "volume": ((3, 11, 17, 31, 33), "channels_last"),
}


def test_poison_fills_a_pooled_block(poisoned_pool):
    """The kernels leave no trace of it in a tensor, but a block is longer than its tensor, and there it shows."""
    y = bn_act(randn(5, 16, 128, 128)[:, :, :, :127].contiguous())
    used = y.numel() * 4
    assert in_use() >= used + 64
    assert ctypes.string_at(y.data_ptr() + used, 64) == b"\xff" * 64
    assert torch.frombuffer(bytearray(b"\xff" * 8), dtype=torch.float64).isnan().all()


@pytest.mark.parametrize("shape, layout", WALKS.values(), ids=WALKS)
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
def test_every_kernel_writes_every_element(shape, layout, dtype, act):
    n = shape[0]
    x, residual, dy = (randn(*shape, dtype=dtype, layout=layout, seed=seed) for seed in range(3))
    assert x.numel() * x.element_size() >= MB
    starts = torch.tensor([0, n // 3, n // 3, n])
    scale = torch.linspace(0.5, 2, shape[1], dtype=reference.moment_dtype(dtype))

    def run():
        for more in (None, residual):
            inputs = [t.detach().requires_grad_() for t in (x, more) if t is not None]
            y, mean, var = ops.bn_act(
                inputs[0],
                scale,
                scale - 1,
                group_starts=starts,
                residual=inputs[-1] if more is not None else None,
                act=act,
                backend="cpp",
            )
            yield y.detach()
            yield from torch.autograd.grad([y, mean], inputs, [dy, mean.detach()], retain_graph=True)  # not in place
            yield torch.autograd.grad(var.sum(), inputs[0])[0]

    clean = list(run())
    C.poison_pool(True)
    try:
        poisoned = list(run())
    finally:
        C.poison_pool(False)
    for a, b in zip(clean, poisoned, strict=True):
        assert not b.isnan().any() and torch.equal(a, b)


# ---- the backward pass in place ----


def leaves(dtype=torch.float32, layout="contiguous", count=1, shape=(2, 16, 128, 129)):
    return [randn(*shape, dtype=dtype, layout=layout, seed=seed).requires_grad_() for seed in range(count)]


@contextmanager
def counting_the_pool():
    """Bytes by which the pool's use has grown inside, in a list of one."""
    before, grown = in_use(), [None]
    yield grown
    grown[0] = in_use() - before


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize("act", ["relu", "identity", "silu"])
def test_a_gradient_that_nobody_holds_is_overwritten(layout, act):
    """dx takes nothing from the pool, where all large outputs come from; where somebody holds dy, it does."""
    for holds in (False, True):
        (x,) = leaves(layout=layout)
        y = bn_act(x, act)
        held = []
        if holds:
            y.register_hook(held.append)
        out = y * 2
        dout = torch.ones_like(out)
        with counting_the_pool() as grown:
            (dx,) = torch.autograd.grad(out, x, dout)
        assert (grown[0] == 0) == (not holds)
        expected = torch.autograd.grad(2 * bn_act(x, act, backend="reference"), x, dout)[0]
        torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act, with_residual", [("silu", True), ("relu", True), ("relu", False)])
def test_in_place_and_apart_give_the_same_bits(act, with_residual):
    for layout in EVERY_LAYOUT:
        for dtype in ops.DTYPES:
            x, r = leaves(dtype=dtype, layout=layout, count=2)
            dout, results = randn(*x.shape, dtype=dtype, layout=layout, seed=3), []
            inputs = [x, r] if with_residual else [x]
            for holds in (False, True):
                out = bn_act(x, act, residual=r if with_residual else None)
                # The gradient of out·1 is a fresh tensor that nobody holds; dout itself is held here.
                results.append(torch.autograd.grad(out if holds else out * 1, inputs, dout))
            assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_chain_of_sites_takes_no_memory_of_its_own_backward():
    (x,) = leaves()
    z = x
    for act in ("relu", "silu", "identity", "leaky_relu", "hardswish"):
        z = bn_act(z, act)
    out = z * 1.5
    with counting_the_pool() as grown:
        gradient = torch.autograd.grad(out, x, torch.ones_like(out))
    # The outputs of the sites are freed as the graph is; none of their blocks and no other holds dx.
    assert grown[0] <= 0 and gradient[0].abs().sum() > 0


def agree_with_float64(function, inputs, **run_options) -> None:
    """The gradients of function(*inputs, backend=…) by all inputs, on the kernels and on the reference in float64."""

    def run(tensors, backend):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = function(*tensors, backend=backend)
        dout = randn(*out.shape, seed=9).to(out.dtype) if out.dim() else None
        return torch.autograd.grad(out, tensors, dout)

    actual = run(inputs, "cpp")
    expected = run([t.double() for t in inputs], "reference")
    for gradient, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=2e-5)


def two_branches(x, backend):
    return bn_act(x, "relu", backend=backend) + bn_act(x, "silu", backend=backend)


def two_branches_of_two_inputs(x, r, backend):
    return bn_act(x, "silu", backend=backend) + bn_act(r, "relu", backend=backend)


def an_output_used_twice(x, backend):
    y = bn_act(x, "silu", backend=backend)
    return y * 2 + y.square()


def an_output_added_to_itself(x, backend):
    y = bn_act(x, "silu", backend=backend)
    return y + y


def an_output_and_its_site_s_successor(x, backend):
    y = bn_act(x, "silu", backend=backend)
    return y + bn_act(y, "relu", backend=backend)


def residual_identity(x, r, backend):
    return bn_act(x, "identity", residual=r, backend=backend) * 3


def residual_relu(x, r, backend):
    return bn_act(x, "relu", residual=r, backend=backend) * 3


def residual_of_a_site(x, r, backend):
    return bn_act(
        bn_act(x, "silu", backend=backend), residual=bn_act(r, "silu", backend=backend), act="identity", backend=backend
    )


def residual_is_x(x, backend):
    return bn_act(x, "identity", residual=x, backend=backend) * 3


def residual_block(x, backend):
    y = bn_act(bn_act(x, "relu", backend=backend), "silu", backend=backend)
    return bn_act(y, "identity", residual=x, backend=backend) + bn_act(y, "relu", residual=x, backend=backend)


def summed(x, backend):
    return bn_act(x, "silu", backend=backend).sum()


def averaged_over_space(x, backend):
    return bn_act(x, "silu", backend=backend).mean((2, 3))


def viewed(x, backend):
    return bn_act(x, "silu", backend=backend).flatten(1)


def transposed(x, backend):
    return bn_act(x, "silu", backend=backend).transpose(2, 3)


def sliced(x, backend):
    y = bn_act(x, "silu", backend=backend)
    return torch.cat([y[1:], y[:1], y[:1]])


def with_moments(x, backend):
    y, mean, var = ops.bn_act(
        x,
        torch.ones(16, dtype=reference.moment_dtype(x.dtype)),
        torch.zeros(16, dtype=reference.moment_dtype(x.dtype)),
        act="silu",
        backend=backend,
    )
    return (y * 2).flatten(1) + (mean.square().sum() + var.square().sum())


@pytest.mark.parametrize(
    "function",
    [
        two_branches,
        two_branches_of_two_inputs,
        an_output_used_twice,
        an_output_added_to_itself,
        an_output_and_its_site_s_successor,
        residual_identity,
        residual_relu,
        residual_of_a_site,
        residual_is_x,
        residual_block,
        summed,
        averaged_over_space,
        viewed,
        transposed,
        sliced,
        with_moments,
    ],
)
@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_gradients_however_they_flow(function, layout):
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    agree_with_float64(function, leaves(layout=layout, count=len(names) - 1, shape=(2, 16, 40, 41)))


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_a_gradient_that_the_user_passes_is_not_changed(layout, act, residual):
    x, r = leaves(layout=layout, count=2)
    dy = randn(*x.shape, layout=layout, seed=5)
    before = dy.clone()
    inputs = [x, r] if residual else [x]
    gradients = torch.autograd.grad(bn_act(x, act, residual=r if residual else None), inputs, dy)
    assert torch.equal(dy, before)
    bn_act(x, act, residual=r if residual else None).backward(dy)
    assert torch.equal(dy, before)
    assert all(torch.equal(t.grad, g) for t, g in zip(inputs, gradients))


HOLDERS = {
    "itself": lambda g: g,
    "detached": lambda g: g.detach(),
    "view": lambda g: g.view(-1),
    "slice": lambda g: g[:1],
    "array": lambda g: g.numpy(),
    "storage": lambda g: g.untyped_storage(),
    "dlpack": lambda g: torch.from_dlpack(g),
    "closure": lambda g: lambda: g,
}


def values_of(held, like: Tensor) -> Tensor:
    held = held() if callable(held) else held
    if isinstance(held, torch.UntypedStorage):
        return torch.empty(0, dtype=like.dtype).set_(held)
    return held.flatten() if isinstance(held, Tensor) else torch.from_numpy(held).flatten()


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("place", ["tensor_hook", "node_prehook", "node_hook", "multi_grad_hook", "retain_grad"])
def test_a_gradient_that_a_hook_holds_is_not_changed(hold, place):
    (x,) = leaves()
    y = bn_act(x, "silu")
    out = y * 2
    held, before = [], []

    def keep(gradient):
        before.append(gradient.flatten().clone())
        held.append(hold(gradient))

    if place == "tensor_hook":
        y.register_hook(keep)
    elif place == "node_prehook":
        y.grad_fn.register_prehook(lambda gradients: keep(gradients[0]))
    elif place == "node_hook":
        out.grad_fn.register_hook(lambda gradients, _: keep(gradients[0]))
    elif place == "multi_grad_hook":
        torch.autograd.graph.register_multi_grad_hook((y,), lambda gradients: keep(gradients[0]))
    else:
        y.retain_grad()
    dout = randn(*out.shape, seed=3)
    (dx,) = torch.autograd.grad(out, x, dout)
    if place == "retain_grad":
        held.append(hold(y.grad))
        before.append((2 * dout).flatten())
    assert len(held) == 1
    values = values_of(held[0], x)
    assert torch.equal(values, before[0][: len(values)]) and len(values)
    expected = torch.autograd.grad(2 * bn_act(x, "silu", backend="reference"), x, dout)[0]
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_a_hook_puts_in_its_place_is_not_changed():
    (x,) = leaves()
    mine = randn(*x.shape, seed=4)
    before = mine.clone()
    y = bn_act(x, "silu")
    y.register_hook(lambda gradient: mine)
    (dx,) = torch.autograd.grad(y * 2, x, torch.ones_like(y))
    assert torch.equal(mine, before)
    expected = torch.autograd.grad(bn_act(x, "silu"), x, mine)[0]
    assert torch.equal(dx, expected)


def test_a_gradient_that_a_function_keeps_for_itself_is_not_changed():
    mine = [randn(2, 16, 128, 129, seed=4)]
    before = mine[0].clone()

    class GivesItsOwn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.sum()

        @staticmethod
        def backward(ctx, _):
            return mine[0]

    (x,) = leaves()
    for _ in range(2):
        (dx,) = torch.autograd.grad(GivesItsOwn.apply(bn_act(x, "silu")), x)
        assert torch.equal(mine[0], before)
        assert torch.equal(dx, torch.autograd.grad(bn_act(x, "silu"), x, before)[0])


def test_saved_tensors_that_are_gradients_are_not_changed():
    """A function's saved tensor is the gradient itself: nobody but the graph holds it."""

    class SavesItsGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, weights):
            ctx.save_for_backward(weights)
            return (y * weights).sum()

        @staticmethod
        def backward(ctx, _):
            return ctx.saved_tensors[0], None

    (x,) = leaves()
    weights = randn(*x.shape, seed=4)
    loss = SavesItsGradient.apply(bn_act(x, "silu"), weights.clone())
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, torch.autograd.grad(bn_act(x, "silu"), x, weights)[0])


def test_the_gradient_of_an_output_is_asked_for_too():
    (x,) = leaves()
    y = bn_act(x, "silu")
    dout = randn(*x.shape, seed=3)
    dy, dx = torch.autograd.grad(y * 2, [y, x], dout)
    assert torch.equal(dy, 2 * dout)
    assert torch.equal(dx, torch.autograd.grad(bn_act(x, "silu"), x, 2 * dout)[0])


def test_two_backward_passes_of_one_graph_are_alike():
    x, r = leaves(count=2)
    out = bn_act(bn_act(x, "silu"), "relu", residual=bn_act(r, "silu")) * 2
    dout = randn(*x.shape, seed=3)
    first = torch.autograd.grad(out, [x, r], dout, retain_graph=True)
    kept_values = [g.clone() for g in first]
    second = torch.autograd.grad(out, [x, r], dout, retain_graph=True)
    third = torch.autograd.grad(out, [x, r], dout)
    for a, b, c, d in zip(first, kept_values, second, third):
        assert torch.equal(a, b) and torch.equal(b, c) and torch.equal(c, d)


def test_gradients_accumulate_in_leaves():
    x, r = leaves(count=2)
    for _ in range(3):
        (bn_act(x, "identity", residual=r) * 2).backward(torch.ones_like(x))
    single = torch.autograd.grad(bn_act(x, "identity", residual=r) * 2, [x, r], torch.ones_like(x))
    assert torch.equal(x.grad, 3 * single[0]) and torch.equal(r.grad, 3 * single[1])
    assert x.grad.data_ptr() != r.grad.data_ptr()
    x.grad.fill_(math.nan)
    assert not r.grad.isnan().any()


def test_gradients_of_x_and_residual_are_apart_in_memory():
    for act in ("identity", "relu", "silu"):
        x, r = leaves(count=2)
        (bn_act(x, act, residual=r) * 2).backward(torch.ones_like(x))
        expected = r.grad.clone()
        x.grad.fill_(math.nan)
        assert torch.equal(r.grad, expected)


def test_a_gradient_is_not_overwritten_while_a_graph_of_it_is_made():
    (x,) = leaves()
    weights = randn(*x.shape, seed=2).requires_grad_()
    places, y = [], bn_act(x, "silu")
    y.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    (dx,) = torch.autograd.grad((y * weights).sum(), x, create_graph=True)
    assert dx.data_ptr() != places[0]
    assert torch.equal(dx, torch.autograd.grad((bn_act(x, "silu") * weights).sum(), x)[0])


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_checkpointing(layout):
    x, r = leaves(layout=layout, count=2)

    def block(x, r):
        return bn_act(bn_act(x, "silu"), "relu", residual=r)

    def gradients(out):
        return torch.autograd.grad(bn_act(out, "silu") * 2, [x, r], torch.ones_like(x))

    expected = gradients(block(x, r))
    for a, b in zip(gradients(checkpoint(block, x, r, use_reentrant=False)), expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("act, with_residual", [("silu", False), ("silu", True), ("relu", True)])
def test_saved_tensors_hooks(act, with_residual):
    x, r = leaves(count=2)

    def gradients():
        out = bn_act(bn_act(x, "silu"), act, residual=r if with_residual else None) * 2
        return torch.autograd.grad(out, [x, r] if with_residual else [x], torch.ones_like(x))

    expected = gradients()
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone().numpy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        actual = gradients()
    assert x.shape in packed
    with torch.autograd.graph.save_on_cpu():
        again = gradients()
    for a, b, c in zip(actual, again, expected):
        assert torch.equal(a, c) and torch.equal(b, c)


def test_an_x_changed_in_place_is_noticed():
    (x,) = leaves()
    z = x * 1
    out = bn_act(z, "silu") * 2
    z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_batched_gradients_are_each_right():
    """Every gradient of a batch shares one memory, so none of them may be overwritten."""
    (x,) = leaves(shape=(2, 3, 8, 9))
    y = bn_act(x, "silu")
    dy = randn(5, *y.shape, seed=7)
    expected = [torch.autograd.grad(y, x, d, retain_graph=True)[0] for d in dy]
    (actual,) = torch.autograd.grad(y * 1, x, dy, is_grads_batched=True)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-6, atol=1e-6)
