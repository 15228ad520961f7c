"""The drop-in hooks against the hooks of the scripts they stand for, which are written out here in plain PyTorch."""

import copy
import io
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES, assert_elements_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnfuse import InputError, freeze, fuse
from bnfuse.compat import (
    BatchNormHook,
    BNFeatureHook,
    DeepInversionFeatureHook,
    DeepInversionHook,
    edc,
    gvbsm,
    lpld,
    wmdd,
    zeroq,
)
from bnfuse.networks import CifarResNet

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from eager_hooks import BNFeatureHook as EagerHook  # noqa: E402

BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Running statistics and weights that are none of the defaults; frozen."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda like, low, high: torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.copy_(draw(layer.running_mean, -1, 1))
            layer.running_var.copy_(draw(layer.running_var, 0.2, 2))
            layer.weight.data.copy_(draw(layer.weight, 0.5, 1.5))
            layer.bias.data.copy_(draw(layer.bias, -1, 1))
    return freeze(module)


def images(*shape, dtype=torch.float64, layout=torch.contiguous_format, seed: int = 1) -> torch.Tensor:
    x = 1.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.7
    return x.to(dtype).contiguous(memory_format=layout) if x.dim() == 4 else x.to(dtype)


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """A distance or a gradient of `dtype` against float64, relative to the largest element of a gradient."""
    limit = 1e-9 if dtype == torch.float64 else TOLERANCES[dtype].relative
    assert (actual.double() - expected.double()).abs().max() <= limit * expected.abs().max().clamp(min=1e-3)


def l2(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.norm(a - b, 2)


def moments_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """mean and biased var [C], as the scripts find them."""
    rows = x.transpose(0, 1).reshape(x.shape[1], -1)
    return rows.mean(1), rows.var(1, unbiased=False)


def against(hook, module: nn.Module, x: torch.Tensor, expected_r, weight: float = 0.3) -> None:
    """The hook's layer on x, its r_feature and the gradient of both, against the layer's own forward and `expected_r(x)`."""
    x = x.requires_grad_()
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y = module(x)
    gradient = torch.autograd.grad((y * dy.to(y.dtype)).sum() + weight * hook.r_feature, x)[0]
    plain, leaf = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    wanted_y, wanted_r = plain(leaf), expected_r(leaf)
    wanted = torch.autograd.grad((wanted_y * dy).sum() + weight * wanted_r, leaf)[0]
    assert_elements_close(y.detach(), wanted_y.detach(), x.dtype)
    close(hook.r_feature.detach(), wanted_r.detach(), x.dtype)
    assert_elements_close(gradient, wanted, x.dtype)


# ---- the plain hook ----

LAYERS = {
    "[N, C]": (nn.BatchNorm1d, (9, 5)),
    "[N, C, L]": (nn.BatchNorm1d, (4, 5, 7)),
    "[N, C, H, W]": (nn.BatchNorm2d, (3, 5, 6, 7)),
    "one image": (nn.BatchNorm2d, (1, 5, 6, 7)),
    "[N, C, D, H, W]": (nn.BatchNorm3d, (2, 5, 3, 4, 5)),
    "without weights": (lambda c: nn.BatchNorm2d(c, affine=False), (3, 5, 6, 7)),
}


@pytest.mark.parametrize("kind", LAYERS)
@LAYOUTS
@BOTH
def test_a_layer_has_the_eager_hooks_distance_output_and_gradient(dtype, layout, kind):
    make, shape = LAYERS[kind]
    layer = make(5)
    layer = fill(layer.to(dtype)) if layer.affine else layer.to(dtype).eval()
    mean, var = layer.running_mean.double(), layer.running_var.double()
    x = images(*shape, dtype=dtype, layout=layout)
    distance = lambda x: l2(mean, moments_of(x)[0]) + l2(var, moments_of(x)[1])
    against(DeepInversionFeatureHook(layer), layer, x, distance)


def script(net, hook_class, x, first_multiplier=10.0):
    """Loss and gradient as the scripts take them."""
    hooks = [hook_class(m) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    leaf = x.detach().requires_grad_()
    out = net(leaf)
    weights = [first_multiplier] + [1.0] * (len(hooks) - 1)
    loss = F.cross_entropy(out, torch.arange(len(x)) % 10) + 0.01 * sum(w * h.r_feature for w, h in zip(weights, hooks))
    gradient = torch.autograd.grad(loss, leaf)[0]
    for hook in hooks:
        hook.close()
    return loss.detach(), gradient


@LAYOUTS
@BOTH
def test_a_network_has_the_eager_hooks_loss_and_gradient(dtype, layout):
    net = fill(CifarResNet(8)).to(dtype)
    x = images(6, 3, 16, 16, dtype=dtype, layout=layout)
    expected = script(copy.deepcopy(net).double(), EagerHook, x.double())
    loss, gradient = script(net, BNFeatureHook, x)
    assert (loss - expected[0]).abs() <= (1e-9 if dtype == torch.float64 else 1e-5) * expected[0]
    worst = (gradient - expected[1]).abs().max() / expected[1].abs().max()
    assert worst <= (1e-9 if dtype == torch.float64 else 1e-4)  # through eight layers, with a kink in each


class Calls(TorchDispatchMode):
    """Names of the operators that read or write a whole activation."""

    def __init__(self, elements: int):
        self.elements, self.names = elements, []
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        values = [v for v in (*args, *(result if isinstance(result, (tuple, list)) else [result]))]
        if any(isinstance(v, torch.Tensor) and v.numel() >= self.elements for v in values):
            self.names.append(func.overloadpacket.__name__)
        return result


def test_one_operator_a_layer_and_pass(extension):
    layer, x = fill(nn.BatchNorm2d(5)), images(3, 5, 6, 7, dtype=torch.float32)
    hooks = [BNFeatureHook(layer), DeepInversionFeatureHook(layer)]
    with Calls(x.numel()) as calls, torch.no_grad():
        layer(x)
    assert calls.names == ["bn_forward_with_targets"]
    assert hooks[0].r_feature is hooks[1].r_feature


def test_hooks_that_differ_share_a_layer():
    layer, x = fill(nn.BatchNorm2d(5)).double(), images(3, 5, 6, 7)
    plain, averaged = BNFeatureHook(layer), gvbsm.BNFeatureHook(layer, 0.5)
    layer(x)
    mean, var = moments_of(x)
    close(plain.r_feature, l2(layer.running_mean, mean) + l2(layer.running_var, var), x.dtype)
    close(averaged.r_feature, l2(layer.running_mean, mean / 2) + l2(layer.running_var, var / 2), x.dtype)


def test_large_means_do_not_cancel_the_variance():
    layer = fill(nn.BatchNorm2d(5))
    x = images(8, 5, 6, 7, dtype=torch.float32) + 1e4
    hook = BNFeatureHook(layer)
    layer(x)
    torch.testing.assert_close(hook.var[0].double(), moments_of(x.double())[1], rtol=1e-3, atol=0)


# ---- what becomes of the layer ----


def test_a_closed_layer_is_what_it_was():
    net = fill(CifarResNet(8))
    before, keys = {name: type(m) for name, m in net.named_modules()}, list(net.state_dict())
    attributes = dict(net.bn1.__dict__)
    hooks = [BNFeatureHook(m) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    second = BNFeatureHook(net.bn1)
    assert isinstance(net.bn1, nn.BatchNorm2d) and list(net.state_dict()) == keys
    net(images(2, 3, 16, 16, dtype=torch.float32))
    for hook in hooks:
        hook.close()
        hook.close()  # once more does no harm
    assert type(net.bn1) is not nn.BatchNorm2d and second.r_feature == hooks[0].r_feature
    second.hook.remove()
    assert {name: type(m) for name, m in net.named_modules()} == before
    assert net.bn1.__dict__ == attributes and list(net.state_dict()) == keys


def test_copies_and_pickles_are_plain_and_hooks_go_along_with_their_own_copy():
    net, x = fill(CifarResNet(8)), images(2, 3, 16, 16, dtype=torch.float32)
    hook, conv = BNFeatureHook(net.bn1), gvbsm.ConvFeatureHook(net.conv1, name="conv1", drop_rate=0, training_momentum=0)
    conv.running = {f"running_{kind}": torch.zeros(1) for kind in ("dd_mean", "dd_var", "patch_mean", "patch_var")}
    expected = net(x.requires_grad_())  # now the hooks hang on a graph
    saved = io.BytesIO()
    torch.save(net, saved)
    saved.seek(0)
    for other in (copy.deepcopy(net), torch.load(saved, weights_only=False)):
        assert type(other.bn1) is nn.BatchNorm2d
        torch.testing.assert_close(other(x), net(x))
    net_copy, hook_copy, conv_copy = copy.deepcopy((net, hook, conv))
    assert hook_copy.module is net_copy.bn1 and conv_copy.module is net_copy.conv1
    with pytest.raises(AttributeError, match="nothing yet"):
        _ = hook_copy.r_feature
    assert net_copy(x).equal(expected)
    assert hook_copy.r_feature == hook.r_feature and conv_copy.r_feature == conv.r_feature


def test_a_network_is_read_as_it_is_at_each_call():
    layer, x = fill(nn.BatchNorm2d(5)).double(), images(3, 5, 6, 7)
    hook = BNFeatureHook(layer)
    layer(x)
    for change in (layer.running_mean.zero_, layer.running_var.data.fill_):
        change(*([0.25] if change.__name__ == "fill_" else []))
        layer.weight.data = layer.weight.data + 0.5
        y = layer(x)
        mean, var = moments_of(x)
        close(hook.r_feature, l2(layer.running_mean, mean) + l2(layer.running_var, var), x.dtype)
        torch.testing.assert_close(y, nn.BatchNorm2d.forward(copy.deepcopy(layer), x), rtol=1e-12, atol=1e-12)


def test_fuse_takes_a_network_with_hooks():
    net, x = fill(CifarResNet(8)), images(4, 3, 16, 16, dtype=torch.float32)
    expected = net(x)
    hook = BNFeatureHook(net.bn1)
    logits, moments = fuse(net)(x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments["bn1"][0], hook.mean)


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match="goes on a BatchNorm layer, got Conv2d"):
        BNFeatureHook(nn.Conv2d(3, 4, 3))
    with pytest.raises(InputError, match="unknown backend"):
        BNFeatureHook(nn.BatchNorm2d(3), backend="best")
    with pytest.raises(AttributeError, match="has not run"):
        _ = BNFeatureHook(nn.BatchNorm2d(3)).r_feature
    with pytest.raises(InputError, match="no running statistics"):
        BNFeatureHook(nn.BatchNorm2d(3, track_running_stats=False))
    hooked = fill(nn.BatchNorm2d(3))
    BNFeatureHook(hooked)
    with pytest.raises(ValueError, match="expected 4D input"):
        hooked(torch.zeros(2, 3))


# ---- layers that train, and layers of other classes ----


def training(layer):
    return layer.train()


def with_gradient(layer):
    return layer.requires_grad_()


@pytest.mark.parametrize("change", [training, with_gradient])
def test_a_layer_that_trains_does_what_it_did_and_says_so_once(change):
    layer, x = change(fill(nn.BatchNorm2d(5)).double()), images(3, 5, 6, 7)
    other = copy.deepcopy(layer)
    hook, eager = DeepInversionFeatureHook(layer), EagerHook(other)
    results = []
    for module, its in ((layer, hook), (other, eager)):
        leaf = x.clone().requires_grad_()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = [module(leaf) for _ in range(2)][-1]
        (y.square().sum() + its.r_feature).backward()
        results.append(
            [y.detach(), its.r_feature.detach(), leaf.grad, module.running_mean, module.running_var, module.weight.grad]
        )
        assert [str(w.message)[:45] for w in caught] == (
            ["a layer is measured by the eager formula, sin"] if its is hook else []
        )
    for actual, expected in zip(*results):
        assert (actual is expected is None) or torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_layer_whose_weights_ask_for_a_gradient_is_fused_where_none_is_taken(extension):
    layer, x = fill(nn.BatchNorm2d(5)).requires_grad_(), images(3, 5, 6, 7, dtype=torch.float32)
    hook = BNFeatureHook(layer)
    with Calls(x.numel()) as calls, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    assert calls.names == ["bn_forward_with_targets"] and hook.r_feature > 0


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.BatchNorm2d):
    """Only its name is its own."""


@BOTH
def test_a_layer_with_a_forward_of_its_own_keeps_it(dtype):
    layer, x = fill(Doubled(5)).to(dtype), images(3, 5, 6, 7, dtype=dtype)
    hook = BNFeatureHook(layer)
    assert type(layer) is Doubled
    mean, var = layer.running_mean.double(), layer.running_var.double()
    against(hook, layer, x, lambda x: l2(mean, moments_of(x)[0]) + l2(var, moments_of(x)[1]))
    hook.close()
    before = hook.r_feature
    layer(x + 1)
    assert hook.r_feature is before
    assert isinstance(layer, Doubled) and BNFeatureHook(fill(Renamed(5))).module.__class__ is not Renamed


# ---- autocast, compilers, replicas ----


def test_under_autocast_statistics_are_float32_of_the_very_values():
    net, x = fill(CifarResNet(8)), images(4, 3, 16, 16, dtype=torch.float32).requires_grad_()
    hook, seen = BNFeatureHook(net.bn1), []
    net.bn1.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0], output)))
    with torch.autocast("cpu", torch.bfloat16):
        net(x)
    given, y = seen
    assert given.dtype == y.dtype == torch.bfloat16 and hook.r_feature.dtype == torch.float32
    mean, var = moments_of(given.detach().double())
    expected = l2(net.bn1.running_mean.double(), mean) + l2(net.bn1.running_var.double(), var)
    close(hook.r_feature.detach(), expected, torch.float32)
    torch.autograd.grad(hook.r_feature, x)


def test_a_step_compiles_whole():
    net, x = fill(CifarResNet(8)), images(4, 3, 16, 16, dtype=torch.float32).requires_grad_()
    hooks = [BNFeatureHook(m) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]

    def step(x):
        return net(x).square().sum() + sum(hook.r_feature for hook in hooks)

    expected = step(x)
    gradient = torch.autograd.grad(expected, x)[0]
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, x)[0], gradient)


@pytest.mark.parametrize("hook_class", [BNFeatureHook, gvbsm.BNFeatureHook])
def test_replicas_of_data_parallel_measure_their_batches_as_one(hook_class):
    layer, x = fill(nn.BatchNorm2d(5)).double(), images(7, 5, 6, 7)
    single = copy.deepcopy(layer)
    hooks, whole = [hook_class(layer) for _ in range(2)], hook_class(single)
    for step in range(2):
        leaves = [part.detach().requires_grad_() for part in (x + step).split([4, 2, 1])]
        replicas = [layer._replicate_for_data_parallel() for _ in leaves]
        for replica in replicas:
            for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
                setattr(replica, name, value)
        outputs = [replica(leaf) for replica, leaf in zip(replicas, leaves)]
        leaf = (x + step).requires_grad_()
        expected = single(leaf)
        torch.testing.assert_close(torch.cat(outputs), expected, rtol=1e-12, atol=1e-12)
        wanted = torch.autograd.grad(whole.r_feature, leaf)[0]
        for hook in hooks:
            close(hook.r_feature.detach(), whole.r_feature.detach(), torch.float64)
            gradient = torch.cat(torch.autograd.grad(hook.r_feature, leaves, retain_graph=True))
            torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


# ---- the other projects' hooks: one after the other, as their scripts write them ----


@BOTH
def test_fast_datafree_moves_its_average_when_told(dtype):
    layer, m = fill(nn.BatchNorm2d(5)).to(dtype), 0.9
    hook = DeepInversionHook(layer, m)
    mean, var = layer.running_mean.double(), layer.running_var.double()
    average = []

    def distance(x):
        own = moments_of(x)
        if average:
            own = [(1 - m) * new + m * old for old, new in zip(average, own)]
        return l2(mean, own[0]) + l2(var, own[1])

    for step in range(3):
        x = images(3, 5, 6, 7, dtype=dtype, seed=step)
        against(hook, layer, x, distance)
        hook.update_mmt()
        batch = moments_of(x.detach().double())
        average[:] = [m * old + (1 - m) * new for old, new in zip(average, batch)] if average else batch
    close(hook.mmt[0][0], average[0], dtype)
    with pytest.raises(InputError, match="mmt_rate"):
        DeepInversionHook(layer, 1.5)


@BOTH
def test_lpld_measures_against_the_class(dtype):
    layer = fill(nn.BatchNorm2d(5)).to(dtype)
    with pytest.raises(InputError, match="class_running_mean"):
        lpld.BNFeatureHook_ClassStats_Training(layer, 2)
    layer.class_running_mean, layer.class_running_var = images(4, 5, dtype=dtype), images(4, 5, dtype=dtype).abs()
    mean, var = layer.class_running_mean[2].double(), layer.class_running_var[2].double()
    hook = lpld.BNFeatureHook_ClassStats_Training(layer, 2)
    against(hook, layer, images(3, 5, 6, 7, dtype=dtype), lambda x: l2(mean, moments_of(x)[0]) + l2(var, moments_of(x)[1]))
    with pytest.raises(InputError, match="classes 4 to 5"):
        lpld.BNFeatureHook_ClassStats_Training(layer, 4)


class BatchNorm2dWithPerClassStats(nn.BatchNorm2d):
    """WMDD's layer, as its hook finds it."""

    def forward(self, x, labels=None):
        return super().forward(x)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNorm2dWithPerClassStats])
@LAYOUTS
@BOTH
def test_wmdd_measures_each_class_against_its_own(dtype, layout, kind):
    layer = fill(kind(5)).to(dtype)
    layer.running_mean_per_class, layer.running_var_per_class = images(6, 5, dtype=dtype), images(6, 5, dtype=dtype).abs()
    targets = [table[1:4].double() for table in (layer.running_mean_per_class, layer.running_var_per_class)]

    def distance(x):
        x = x.view(3, 4, *x.shape[1:])
        own = x.mean([1, 3, 4]), x.var([1, 3, 4], unbiased=False)
        return sum(torch.norm(target - value, dim=1).mean() for target, value in zip(targets, own))

    hook = wmdd.BNFeatureHook_new(layer, True, ipc=4, start=1, end=4)
    assert type(layer) is not kind  # fused, both of them
    against(hook, layer, images(12, 5, 6, 7, dtype=dtype, layout=layout), distance)
    with pytest.raises(InputError, match="3 classes of 4 images make 12, and the batch has 11"):
        layer(images(11, 5, 6, 7, dtype=dtype))
    hook.close()
    older = wmdd.BNFeatureHook(layer, True, 1, 4)
    layer(images(3, 5, 6, 7, dtype=dtype))
    own = images(3, 5, 6, 7, dtype=dtype).double()
    own = own.mean([2, 3]), own.var([2, 3], unbiased=False)
    close(older.r_feature, sum(torch.norm(t - v, dim=1).mean() for t, v in zip(targets, own)), dtype)
    with pytest.raises(InputError, match="weights of single images"):
        wmdd.BNFeatureHook_new(layer, weights=torch.ones(2))


class Averages:
    """What G-VBSM and EDC keep of a moment: zero start, the value the average, the gradient the batch's."""

    def __init__(self, momentum):
        self.momentum, self.old = momentum, {}

    def __call__(self, name, batch):
        with torch.no_grad():
            self.old[name] = self.momentum * self.old.get(name, 0.0) + (1 - self.momentum) * batch
        return self.old[name] + batch - batch.detach()


@BOTH
def test_gvbsm_batchnorm(dtype):
    layer, averages = fill(nn.BatchNorm2d(5)).to(dtype), Averages(0.4)
    hook = gvbsm.BNFeatureHook(layer, 0.4)
    mean, var = layer.running_mean.double(), layer.running_var.double()
    for step in range(3):
        x = images(3, 5, 6, 7, dtype=dtype, seed=step)
        against(
            hook, layer, x, lambda x: sum(l2(t, averages(i, v)) for i, (t, v) in enumerate(zip((mean, var), moments_of(x))))
        )


def conv_moments(x, k):
    """Of channels and of patches of k×k positions, by the names in the files."""
    size = [-(-length // k) * k for length in x.shape[2:]]
    y = F.interpolate(x, size, mode="bilinear") if list(x.shape[2:]) != size else x
    patches = F.unfold(y.transpose(0, 1).reshape(-1, 1, *size), k, stride=k)  # [C·N, k·k, patches]
    patches = patches.transpose(0, 2).flatten(1)  # [patches, k·k·N·C]
    found = moments_of(x)
    return {
        "running_dd_mean": found[0],
        "running_dd_var": found[1],
        "running_patch_mean": patches.mean(1),
        "running_patch_var": patches.var(1, unbiased=False),
    }


def real_batches(dtype, classes=3):
    """Two batches of real images and their labels."""
    labels = torch.tensor([0, 2, 1, 1]), torch.tensor([2, 0, 1])
    return [(images(len(label), 5, 6, 9, dtype=dtype, seed=10 + i), label) for i, label in enumerate(labels)]


@BOTH
def test_gvbsm_convolution(dtype, tmp_path):
    conv, averages = nn.Conv2d(5, 5, 1).to(dtype).requires_grad_(False), Averages(0.4)
    options = dict(save_path=str(tmp_path), data_number=7, name="layer1.conv", training_momentum=0.4, cells=4)
    hook = gvbsm.ConvFeatureHook(conv, drop_rate=0.0, **options)
    assert not hook.load_tag
    with pytest.raises(InputError, match=r"set_hook\(pre=True\)"):
        conv(images(2, 5, 6, 9, dtype=dtype))
    hook.set_hook(pre=True)
    targets = {}
    for x, _ in real_batches(dtype):
        conv(x)
        for name, value in conv_moments(x.double(), 4).items():
            targets[name] = targets.get(name, 0) + value * len(x) / 7
    hook.save()
    hook.close()

    hook = gvbsm.ConvFeatureHook(conv, drop_rate=0.0, **options)
    assert hook.load_tag
    for name, value in targets.items():
        close(getattr(hook, name), value, dtype)
    for step in range(2):
        x = images(3, 5, 6, 9, dtype=dtype, seed=step)
        against(hook, conv, x, lambda x: sum(l2(targets[n], averages(n, v)) for n, v in conv_moments(x, 4).items()))
    hook.close()

    dropping = gvbsm.ConvFeatureHook(conv, drop_rate=0.5, **options)
    random.seed(3)
    dropped = [random.random() > 0.5 for _ in range(20)]
    random.seed(3)
    for expected in dropped:
        conv(x)
        assert (dropping.r_feature.shape == (1,)) == expected and (float(dropping.r_feature.detach()) == 0) == expected


def by_class(batches, moments):
    """Means over each class's images of `moments` of single images."""
    found = [{}, {}, {}]
    for x, labels in batches:
        for image, label in zip(x.double(), labels):
            for name, value in moments(image[None]).items():
                found[label].setdefault(name, []).append(value)
    return {name: torch.stack([torch.stack(row[name]).mean(0) for row in found]) for name in found[0]}


@BOTH
def test_edc_batchnorm(dtype, tmp_path):
    layer, averages = fill(nn.BatchNorm2d(5)).to(dtype), Averages(0.8)
    options = dict(save_path=str(tmp_path), training_momentum=0.8, name="layer1.bn")
    hook = edc.BNFeatureHook(layer, **options)
    assert not hook.load_tag
    hook.set_hook(pre=True)
    for x, labels in real_batches(dtype):
        hook.set_label(labels)
        layer(x)
    hook.save()
    recorded = hook.tables
    hook.close()

    hook, labels = edc.BNFeatureHook(layer, **options), torch.tensor([1, 1, 2])
    assert hook.load_tag and all(table.equal(recorded[name]) for name, table in hook.tables.items())
    names = "running_dd_mean", "running_dd_var"
    tables = by_class(real_batches(dtype), lambda x: dict(zip(names, moments_of(x))))
    running = dict(zip(names, (layer.running_mean.double(), layer.running_var.double())))
    hook.set_hook(pre=False)
    with pytest.raises(InputError, match="set_label"):
        layer(images(3, 5, 6, 7, dtype=dtype))
    hook.average.reset()
    hook.set_label(labels)

    def distance(x):
        values = {name: averages(name, value) for name, value in zip(names, moments_of(x))}
        return sum(0.5 * l2(running[n], v) + 0.5 * l2(tables[n][labels].mean(0), v) for n, v in values.items())

    for step in range(2):
        against(hook, layer, images(3, 5, 6, 7, dtype=dtype, seed=step), distance)
    kept = hook.r_feature
    hook.set_return()
    layer(images(2, 5, 6, 7, dtype=dtype))
    assert hook.r_feature is kept


@BOTH
@pytest.mark.parametrize("swapped", [True, False])
def test_edc_convolution(dtype, swapped, tmp_path):
    conv, averages = nn.Conv2d(5, 5, 1).to(dtype).requires_grad_(False), Averages(0.8)
    options = dict(save_path=str(tmp_path), data_number=7, name="conv", training_momentum=0.8, cells=4, swapped=swapped)
    hook = edc.ConvFeatureHook(conv, drop_rate=0.0, **options)
    hook.set_hook(pre=True)
    for x, labels in real_batches(dtype):
        hook.set_label(labels)
        conv(x)
    hook.save()
    hook.close()

    hook, labels = edc.ConvFeatureHook(conv, drop_rate=0.0, **options), torch.tensor([1, 1, 2])
    assert hook.load_tag
    hook.set_label(labels)
    tables = by_class(real_batches(dtype), lambda x: conv_moments(x, 4))
    if swapped:
        tables["running_patch_mean"], tables["running_patch_var"] = tables["running_patch_var"], tables["running_patch_mean"]
    running = {n: sum(conv_moments(x.double(), 4)[n] * len(x) / 7 for x, _ in real_batches(dtype)) for n in tables}

    def distance(x):
        values = {name: averages(name, value) for name, value in conv_moments(x, 4).items()}
        return sum(0.5 * l2(running[n], v) + 0.5 * l2(tables[n][labels].mean(0), v) for n, v in values.items())

    for step in range(2):
        against(hook, conv, images(3, 5, 6, 9, dtype=dtype, seed=step), distance)


def test_edc_local_measures_against_a_batch_of_real_images(tmp_path):
    layer, conv = fill(nn.BatchNorm2d(5)).double(), nn.Conv2d(5, 4, 3).double().requires_grad_(False)
    options = dict(save_path=str(tmp_path), name="x", training_momentum=0.0, category_aware="local")
    on_layer, on_conv = edc.BNFeatureHook(layer, **options), edc.ConvFeatureHook(conv, cells=4, drop_rate=0, **options)
    on_conv.running = conv_moments(images(4, 5, 6, 9, seed=1), 4)
    real, x = images(2, 5, 6, 9, seed=2), images(2, 5, 6, 9, seed=3)
    with pytest.raises(InputError, match="set_tea"):
        layer(x)
    on_layer.average.reset()
    for hook, module in ((on_layer, layer), (on_conv, conv)):
        hook.set_tea()
        module(real)
        hook.set_ori()
        module(x)
    running = dict(zip(("running_dd_mean", "running_dd_var"), (layer.running_mean, layer.running_var)))
    for hook, wanted in ((on_layer, running), (on_conv, on_conv.running)):
        own, theirs = conv_moments(x, 4), conv_moments(real, 4)
        close(hook.r_feature, sum(0.5 * l2(wanted[n], own[n]) + 0.5 * l2(theirs[n], own[n]) for n in wanted), torch.float64)


@BOTH
def test_zeroq_finds_each_samples_mean_and_std(dtype):
    conv, hook = nn.Conv2d(3, 4, 3).to(dtype).requires_grad_(False), zeroq.output_hook()
    handle = conv.register_forward_hook(hook.hook)
    x = images(3, 3, 6, 7, dtype=dtype).requires_grad_()
    out = conv(x)
    assert hook.outputs is out
    rows = out.double().view(3, 4, -1)
    expected = rows.mean(2), (rows.var(2) + 1e-6).sqrt()
    for actual, wanted in zip(hook.mean_and_std(), expected):
        close(actual.detach(), wanted.detach(), dtype)
        gradients = [torch.autograd.grad(value.square().sum(), out, retain_graph=True)[0] for value in (actual, wanted)]
        close(*gradients, dtype)
    handle.remove()
    hook.clear()
    assert hook.outputs is None
    for shape in ((3, 4), (3, 4, 1, 1)):
        with pytest.raises(InputError, match=r"over positions needs two of them at least, got \[3, 4"):
            zeroq.mean_and_std(images(*shape, dtype=dtype))


def test_hooks_can_be_derived_from():
    """As docs/drop_in.md shows: targets of one's own, or a distance."""

    class Twice(BatchNormHook):
        def targets(self, module):
            return 2 * module.running_mean[None], 2 * module.running_var[None]

    layer, x = fill(nn.BatchNorm2d(5)).double(), images(3, 5, 6, 7)
    hook, plain = Twice(layer), BNFeatureHook(layer)
    layer(x)
    mean, var = moments_of(x)
    close(hook.r_feature, l2(2 * layer.running_mean, mean) + l2(2 * layer.running_var, var), x.dtype)
    close(plain.r_feature, l2(layer.running_mean, mean) + l2(layer.running_var, var), x.dtype)

    class Largest(BatchNormHook):
        def measure(self, mean, var, target_mean, target_var):
            return (mean - target_mean).abs().max()

    layer, x = fill(nn.BatchNorm2d(5)).double(), images(3, 5, 6, 7).requires_grad_()
    hook = Largest(layer)
    layer(x)
    expected = (x.mean((0, 2, 3)) - layer.running_mean).abs().max()
    close(hook.r_feature, expected, x.dtype)
    close(*(torch.autograd.grad(of, x)[0] for of in (hook.r_feature, expected)), x.dtype)


def test_a_layer_is_called_as_it_was():
    layer, x = fill(nn.BatchNorm2d(5)).double(), images(3, 5, 6, 7)
    hook = BNFeatureHook(layer)
    torch.testing.assert_close(layer(input=x), nn.BatchNorm2d.forward(copy.deepcopy(layer), x), rtol=1e-12, atol=1e-12)
    labelled = fill(BatchNorm2dWithPerClassStats(5)).double()
    labelled.running_mean_per_class, labelled.running_var_per_class = images(1, 5), images(1, 5).abs()
    classwise = wmdd.BNFeatureHook_new(labelled, True, 3, 0, 1)
    torch.testing.assert_close(labelled(x, labels=torch.zeros(3)), layer(x), rtol=1e-12, atol=1e-12)
    assert hook.r_feature > 0 and classwise.r_feature > 0


def test_running_statistics_may_change_before_the_backward_pass():
    layer, x = fill(nn.BatchNorm2d(5)).double(), images(3, 5, 6, 7).requires_grad_()
    hook = BNFeatureHook(layer)
    y = layer(x)
    loss = y.square().sum() + hook.r_feature
    expected = torch.autograd.grad(loss, x, retain_graph=True)[0]
    layer.running_mean.zero_()
    layer.running_var.fill_(1)
    assert torch.autograd.grad(loss, x)[0].equal(expected)


@pytest.mark.parametrize("hook_class", [BNFeatureHook, DeepInversionHook, gvbsm.BNFeatureHook])
def test_gradients_of_gradients_of_a_frozen_layer(hook_class):
    layer = fill(nn.BatchNorm2d(2)).double()
    hook = hook_class(layer) if hook_class is not gvbsm.BNFeatureHook else hook_class(layer, 0.0)

    def loss(x):
        return layer(x).square().sum() + hook.r_feature

    assert torch.autograd.gradgradcheck(loss, images(2, 2, 3, 3).requires_grad_())


def test_gradients_of_gradients_by_weights_that_train():
    """Gradient inversion: the network's weights ask for gradients, which are differentiated by the images."""
    results, original = [], fill(CifarResNet(8, width=4)).double().requires_grad_()
    for hook_class in (EagerHook, DeepInversionFeatureHook):
        net = copy.deepcopy(original)
        x = images(2, 3, 8, 8).requires_grad_()
        hooks = [hook_class(m) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = F.cross_entropy(net(x), torch.arange(2))
        gradients = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        objective = sum(g.square().sum() for g in gradients) + 0.1 * sum(hook.r_feature for hook in hooks)
        results.append((objective.detach(), torch.autograd.grad(objective, x)[0]))
    for actual, expected in zip(*results[::-1]):
        close(actual, expected, torch.float64)
