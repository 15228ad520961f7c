"""A fused network gives the logits, gradients and moments of the network it was made from."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import Chains, Shared, Untraceable, Viewing, settle
from real_data import real_data
from torch import nn
from torch.nn.utils import prune
from torchvision_shim import import_torchvision

from bnfuse import InputError, fuse
from bnfuse.convolutions import FrozenConvolution
from bnfuse.fusion import FusedBatchNorm
from bnfuse.models import batchnorm_layers, build_model, freeze, load_teacher
from bnfuse.preprocessing import Preprocessing

BACKENDS = ("reference", "cpp")


def hooked_moments(model, images, bounds):
    """Each BatchNorm input's mean and biased variance by group, taken with plain hooks."""
    seen = {}

    def hook(name):
        def record(_module, inputs):
            x = inputs[0].flatten(2) if inputs[0].dim() > 2 else inputs[0][:, :, None]
            key = name if name not in seen else f"{name}#2"
            seen[key] = tuple(
                torch.stack([f(x[a:b]) for a, b in zip(bounds, bounds[1:])])
                for f in (lambda part: part.mean((0, 2)), lambda part: part.var((0, 2), correction=0))
            )

        return record

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in batchnorm_layers(model).items()]
    logits = model(images)
    for handle in handles:
        handle.remove()
    return logits, seen


def check_same(model, images, bounds, *, trace=True, backend="cpp", rtol=1e-5):
    """Logits to 1e-5, moments, and the gradient of a loss that uses both, against hooks on the original."""
    images = images.clone().requires_grad_()
    logits, expected = hooked_moments(model, images, bounds)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    loss = (logits * weights).sum() + sum(mean.square().sum() + var.square().sum() for mean, var in expected.values())
    (gradient,) = torch.autograd.grad(loss, images)

    fused = fuse(model, trace=trace, backend=backend)
    fused_images = images.detach().requires_grad_()
    fused_logits, moments = fused(fused_images, torch.tensor(bounds))
    fused_loss = (fused_logits * weights).sum() + sum(m.square().sum() + v.square().sum() for m, v in moments.values())
    (fused_gradient,) = torch.autograd.grad(fused_loss, fused_images)

    assert set(moments) == set(expected)
    scale = max(1.0, logits.abs().max().item())
    torch.testing.assert_close(fused_logits, logits, rtol=0, atol=1e-5 * scale)
    for name, (mean, var) in expected.items():
        torch.testing.assert_close(moments[name][0], mean, rtol=rtol, atol=1e-5 * max(1.0, mean.abs().max().item()))
        torch.testing.assert_close(moments[name][1], var, rtol=10 * rtol, atol=1e-5 * max(1.0, var.abs().max().item()))
    torch.testing.assert_close(fused_gradient, gradient, rtol=1e-3, atol=2e-4 * gradient.abs().max().item())
    return fused


def check_logits_and_sites(model):
    """Either way of fusing gives the logits to 1e-5 and sees every BatchNorm layer."""
    images = torch.randn(2, 3, 64, 64)
    logits = model(images)
    for trace in (True, False):
        fused, moments = fuse(model, trace=trace)(images)
        torch.testing.assert_close(fused, logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item())
        assert set(moments) == set(batchnorm_layers(model))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trace", (True, False))
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_chains(backend, trace, memory_format):
    model = settle(Chains())
    images = torch.randn(7, 3, 9, 8).to(memory_format=memory_format)
    fused = check_same(model, images, [0, 3, 4, 7], trace=trace, backend=backend)
    folded = dict(line.strip().split(": ") for line in fused.describe().splitlines()[1:])
    if trace:
        assert folded == {
            "bn0": "BN + leaky_relu",
            "bn1": "BN + add + relu",
            "bn2": "BN + add + relu6",
            "bn_skip": "BN + add + relu",
            "bn3": "BN",
            "bn4": "BN",
            "bn_head": "BN + hardswish",
        } or folded == {
            "bn0": "BN + leaky_relu",
            "bn1": "BN + add + relu",
            "bn2": "BN + add + relu6",
            "bn_skip": "BN",
            "bn3": "BN + add + relu",
            "bn4": "BN",
            "bn_head": "BN + hardswish",
        }
    else:
        assert set(folded.values()) == {"BN"}


def test_the_original_is_left_as_it_was_and_shares_its_weights():
    model = settle(Chains())
    before = {name: type(module) for name, module in model.named_modules()}
    for trace in (True, False):
        fused = fuse(model, trace=trace)
        assert {name: type(module) for name, module in model.named_modules()} == before
        assert {p.data_ptr() for p in model.fc.parameters()} <= {p.data_ptr() for p in fused.parameters()}


def test_untraceable_network_falls_back_with_a_note():
    model = settle(Untraceable())
    with pytest.warns(UserWarning, match="Untraceable cannot be traced"):
        fused = fuse(model)
    assert not fused.traced
    images = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(fused(images)[0], model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("trace", (True, False))
def test_a_layer_that_runs_twice_is_two_sites(trace):
    fused = check_same(settle(Shared()), torch.randn(4, 3, 5, 5), [0, 4], trace=trace)
    assert list(fused(torch.randn(2, 3, 5, 5))[1]) == ["bn", "bn#2"]


def test_residual_that_broadcasts_is_added_outside():
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 5)

        def forward(self, x):
            x = self.conv(x)
            return self.fc(F.relu(self.bn(x) + x.mean((2, 3), keepdim=True)).mean((2, 3)))

    check_same(settle(Broadcast()), torch.randn(3, 3, 4, 4), [0, 3])


def test_batchnorm_subclass_with_its_own_forward_is_observed():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = settle(nn.Sequential(nn.Conv2d(3, 4, 1), Doubled(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    fused = check_same(model, torch.randn(3, 3, 4, 4), [0, 1, 3])
    assert "1: moments only" in fused.describe()


@pytest.mark.parametrize("name", ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5"))
def test_torchvision_networks(name):
    torchvision = import_torchvision()
    torch.manual_seed(0)
    model = settle(torchvision.models.get_model(name, num_classes=7))
    check_logits_and_sites(model)


def test_torchvision_chains_are_found():
    torchvision = import_torchvision()
    text = fuse(settle(torchvision.models.get_model("resnet18"))).describe()
    assert (
        text.count("BN + add + relu") == 8
        and text.count(": BN + relu") == 9
        and text.count(": BN\n") + text.endswith(": BN") == 3
    )


@pytest.mark.parametrize("name", ("resnet18", "mobilenetv3_small_050"))
def test_timm_networks(name):
    import_torchvision()
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = settle(timm.create_model(name, num_classes=5))
    check_logits_and_sites(model)


def test_pretrained_resnet20_on_real_weights():
    model = load_teacher(
        "resnet20",
        weights=real_data("resnet20-12fca82f.th"),
        preprocessing=Preprocessing((32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ).model
    fused = check_same(model, torch.randn(6, 3, 32, 32), [0, 2, 6])
    assert fused.describe().count("BN + add + relu") == 9 and fused.describe().count(": BN + relu") == 10


def test_pretrained_mobilenet_on_real_weights():
    spec = f"{real_data('mobilenet_v1.py')}:mobilenet_v1"
    model = load_teacher(spec, preprocessing=Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3)).model
    images = torch.rand(2, 3, 224, 224) * 2 - 1
    for trace in (True, False):
        fused = fuse(model, trace=trace)
        torch.testing.assert_close(fused(images)[0], model(images), rtol=0, atol=1e-5 * model(images).abs().max().item())
    assert fuse(model).describe().count("BN + relu6") == 27


def test_it_compiles_into_one_graph():
    model = fuse(settle(build_model("resnet8", 5)))
    images, starts = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 4])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, moments = compiled(images, starts)
    expected, expected_moments = model(images, starts)
    torch.testing.assert_close(logits, expected)
    assert list(moments) == list(expected_moments)


def test_it_survives_copying_and_pickling():
    model = fuse(settle(Chains()), trace=False)
    images = torch.randn(2, 3, 5, 5)
    expected = model(images)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(images)[0], expected)
        assert list(other(images)[1]) == list(model(images)[1])


def test_autocast_keeps_float32_statistics():
    model = fuse(settle(build_model("resnet8", 5)))
    images = torch.randn(4, 3, 8, 8)
    expected = model(images)[1]
    with torch.autocast("cpu", torch.bfloat16):
        _, moments = model(images)
    for name, (mean, var) in moments.items():
        assert mean.dtype == var.dtype == torch.float32
        torch.testing.assert_close(mean, expected[name][0], rtol=0.1, atol=0.05)


def layouts_inside(fused, images):
    """The layouts in which a fused network's sites see their inputs."""
    seen = set()

    def observe(_module, inputs):
        if inputs[0].dim() == 4:
            seen.update(f for f in (torch.contiguous_format, torch.channels_last) if inputs[0].is_contiguous(memory_format=f))

    handles = [m.register_forward_pre_hook(observe) for m in fused.body.modules() if isinstance(m, FusedBatchNorm)]
    fused(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("memory_format", [None, torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("given", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_traced_network_runs_in_the_layout_asked_for(memory_format, given):
    fused = fuse(settle(build_model("resnet8", 5)), memory_format=memory_format)
    images = torch.randn(2, 3, 16, 16).to(memory_format=given)
    assert layouts_inside(fused, images) == {memory_format or torch.channels_last}


@pytest.mark.parametrize("given", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_network_that_was_not_traced_keeps_the_images_layout(given):
    fused = fuse(settle(build_model("resnet8", 5)), trace=False)
    assert layouts_inside(fused, torch.randn(2, 3, 16, 16).to(memory_format=given)) == {given}
    asked = fuse(settle(build_model("resnet8", 5)), trace=False, memory_format=torch.channels_last)
    assert layouts_inside(asked, torch.randn(2, 3, 16, 16).to(memory_format=given)) == {torch.channels_last}


def test_a_view_does_not_bind_a_traced_network_to_one_layout():
    check_same(settle(Viewing()), torch.randn(4, 3, 8, 8), [0, 1, 4])
    check_same(settle(Viewing()), torch.randn(4, 3, 8, 8), [0, 1, 4], trace=False)


def test_weights_are_laid_out_once_and_the_original_s_stay_as_they_are():
    model = settle(build_model("resnet8", 5))
    before = {name: weight.stride() for name, weight in model.named_parameters()}
    fused = fuse(model)
    assert {name: weight.stride() for name, weight in model.named_parameters()} == before
    convolutions = [m.convolution for m in fused.modules() if isinstance(m, FrozenConvolution)]
    assert len(convolutions) == 7
    assert all(c.weight.is_contiguous(memory_format=torch.channels_last) for c in convolutions)
    assert not any(c.weight.requires_grad for c in convolutions)


def test_unfit_networks_are_refused():
    with pytest.raises(InputError, match="eval"):
        fuse(Chains())
    with pytest.raises(InputError, match="unknown backend"):
        fuse(settle(Chains()), backend="fast")
    with pytest.raises(InputError, match="memory_format must be torch.channels_last"):
        fuse(settle(Chains()), memory_format=torch.channels_last_3d)


# ---- convolutions that keep nothing of their input ----


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("options", [dict(padding=1), dict(stride=2, bias=False), dict(groups=4, dilation=2)], ids=str)
def test_a_frozen_convolution_gives_torch_s_values_and_gradient(options, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, **options).requires_grad_(False)
    x = torch.randn(3, 8, 9, 11).to(memory_format=layout).requires_grad_()

    def run(module):
        y = module(x)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y) * y.detach())
        return y.detach(), gradient

    for actual, expected in zip(run(FrozenConvolution(conv)), run(conv)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("of_weight", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("of_input", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_frozen_convolution_lays_its_gradient_out_as_torch_does(kernel, of_input, of_weight, dtype):
    """Where nothing of the input is kept, its layout must be known all the same: a gradient laid out otherwise is copied."""
    conv = nn.Conv2d(8, 12, kernel).requires_grad_(False).to(dtype=dtype, memory_format=of_weight)
    x = torch.randn(3, 8, 9, 11, dtype=dtype).to(memory_format=of_input).requires_grad_()
    actual, expected = (torch.autograd.grad(module(x).square().sum(), x)[0] for module in (FrozenConvolution(conv), conv))
    assert torch.equal(actual, expected) and actual.stride() == expected.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_frozen_convolution_has_a_gradient_off_the_cpu(kernel, layout):
    """Where what is allocated is taken, read or not, its backward allocates no second input; meta stands for such a device."""
    conv = nn.Conv2d(8, 12, kernel, device="meta").requires_grad_(False)
    x = torch.empty(3, 8, 9, 11, device="meta").to(memory_format=layout).requires_grad_()
    (gradient,) = torch.autograd.grad(FrozenConvolution(conv)(x).sum(), x)
    assert gradient.is_meta and gradient.shape == x.shape


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_take_an_expanded_input_and_the_weight_s_layout(kernel, layout):
    """What the gradient of a frozen convolution rests on, off the CPU: neither values nor strides come from the input."""
    x = torch.randn(3, 8, 9, 11).to(memory_format=layout)
    weight = torch.randn(12, 8, kernel, kernel)
    if layout == torch.channels_last:
        weight = weight.contiguous(memory_format=layout).as_strided(weight.shape, (8 * kernel**2, 1, 8 * kernel, 8))
    dy = torch.randn_like(nn.functional.conv2d(x, weight))
    options = None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False]
    stand_in = torch.empty(()).expand(x.shape)
    actual, expected = (torch.ops.aten.convolution_backward(dy, t, weight, *options)[0] for t in (stand_in, x))
    assert torch.equal(actual, expected) and actual.stride() == expected.stride() == x.stride()


def kept_bytes(function) -> int:
    """Bytes of the storages that autograd keeps for backward."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = function()
    return sum(kept.values()) if alive is not None else 0


def test_a_frozen_convolution_keeps_its_weight_alone():
    conv = nn.Conv2d(8, 8, 3).requires_grad_(False)
    x = torch.randn(4, 8, 32, 32, requires_grad=True)
    frozen = FrozenConvolution(conv)
    assert kept_bytes(lambda: frozen(x)) == conv.weight.numel() * 4
    assert kept_bytes(lambda: conv(x)) > x.numel() * 4


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm", "prune", "hook"])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_convolution_whose_weight_is_made_for_each_pass_runs_as_it_is(kind, memory_format):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    conv = model[0]
    if kind == "prune":
        prune.l1_unstructured(conv, "weight", 0.5)
    elif kind == "hook":
        conv.register_forward_pre_hook(lambda _layer, inputs: (inputs[0] * 2,))
    else:
        getattr(nn.utils, kind)(conv)
    freeze(model)
    with torch.no_grad():
        (conv.weight_orig if kind in ("spectral_norm", "prune") else next(conv.parameters())).mul_(1.5)  # as loaded later
    x = torch.randn(5, 3, 6, 6)
    logits, _ = fuse(model, memory_format=memory_format)(x)
    torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-5)


def test_a_network_may_ask_its_convolutions_for_what_they_hold():
    """As CLIP's ResNets ask for the dtype of a weight."""

    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x.type(self.conv.weight.dtype))).mean((2, 3))

    model, x = settle(Asking()), torch.randn(2, 3, 5, 5)
    for trace in (True, False):
        torch.testing.assert_close(fuse(model, trace=trace)(x)[0], model(x), rtol=1e-4, atol=1e-5)


def test_a_pass_in_inference_mode_leaves_nothing_behind():
    model, x = settle(Chains()), torch.randn(7, 3, 8, 8)  # a batch of a size of its own: what is kept is kept by size
    fused = fuse(model)
    with torch.inference_mode():
        fused(x)
    x.requires_grad_()
    logits, moments = fused(x)
    (logits.sum() + sum(mean.sum() for mean, _ in moments.values())).backward()
    assert x.grad.isfinite().all()


def test_a_frozen_convolution_that_is_unfrozen_trains_again():
    conv = nn.Conv2d(3, 4, 3)
    FrozenConvolution(conv)(torch.randn(2, 3, 8, 8)).sum().backward()
    assert conv.weight.grad is not None


def test_a_frozen_convolution_follows_autocast():
    conv = nn.Conv2d(3, 4, 3).requires_grad_(False)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = FrozenConvolution(conv)(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32


def test_a_frozen_convolution_under_autocast_is_torchs_and_keeps_its_weight_alone():
    conv = nn.Conv2d(8, 8, 3).requires_grad_(False)
    x = torch.randn(4, 8, 32, 32, requires_grad=True)
    weight = torch.randn(4, 8, 30, 30, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kept_bytes(lambda: FrozenConvolution(conv)(x)) == conv.weight.numel() * 2
        assert kept_bytes(lambda: conv(x)) > x.numel() * 2
        ours, torchs = FrozenConvolution(conv)(x), conv(x)
        wide = FrozenConvolution(nn.Conv2d(8, 8, 3).double().requires_grad_(False))(x.double())
    assert ours.equal(torchs) and wide.dtype == torch.float64
    assert torch.autograd.grad(ours, x, weight)[0].equal(torch.autograd.grad(torchs, x, weight)[0])


def test_a_fused_network_runs_on_the_meta_device():
    logits, moments = fuse(settle(Chains())).to("meta")(torch.empty(2, 3, 8, 8, device="meta"))
    assert logits.is_meta and all(mean.is_meta for mean, _ in moments.values())
