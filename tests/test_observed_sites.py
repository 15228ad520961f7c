"""Sites that are no BatchNorm inputs: a fused network yields the moments that plain hooks on the original see."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import Chains, Shared, Untraceable, settle
from torch import nn

from bnfuse import InputError, freeze, fuse
from bnfuse.convolutions import FrozenConvolution
from bnfuse.models import build_model
from bnfuse.moments import Observer


class Tokens(nn.Module):
    """Patches as tokens [B, N, C]; a block of torch.nn inside, one that takes a tuple, and in-place steps; no BatchNorm."""

    class Mix(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, width)

        def forward(self, pair, *, scale):
            x, skip = pair
            return self.fc(self.norm(x)) * scale + skip, skip

    def __init__(self, width: int = 8, classes: int = 5):
        super().__init__()
        self.patches, self.act = nn.Conv2d(3, width, 2, stride=2), nn.ReLU(inplace=True)
        self.mix = Tokens.Mix(width)
        self.attention = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.act(self.patches(x)).flatten(2).transpose(1, 2)  # [B, N, C]
        x, skip = self.mix((x, 0.5 * x), scale=2.0)
        x = self.attention(x) + skip
        return self.head(x.mean(1))


class Volumes(nn.Module):
    """[N, C, D, H, W], then [N, C, L], then [N, C]."""

    def __init__(self):
        super().__init__()
        self.conv3, self.bn3 = nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4)
        self.conv1, self.bn1, self.norm = nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.GroupNorm(2, 6)
        self.fc, self.bn = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.bn3(self.conv3(x[:, :, None].expand(-1, -1, 2, -1, -1))))
        x = F.relu(self.norm(self.bn1(self.conv1(x.flatten(2)))))
        return self.head(F.relu(self.bn(self.fc(x.mean(2)))))


def plain_moments(model, images, bounds, wanted):
    """Moments by hooks that copy what they see; `wanted`: site name → module, end, which tensor, layout."""
    seen, handles = {}, []

    def keep(name, pick, layout):
        def take(values):
            x = pick(values)
            if layout == "last":
                x = torch.movedim(x, -1, 1)
            if layout.startswith("cells"):
                k = int(layout.split("=")[1])
                rows, columns = (-(-s // k) for s in x.shape[2:])
                x = F.interpolate(x, (rows * k, columns * k), mode="bilinear", align_corners=False)
                parts = [p.flatten(1) for row in x.split(k, 2) for p in row.split(k, 3)]
                x = torch.stack(parts, 1)
            x = x.flatten(2) if x.dim() > 2 else x[:, :, None]
            groups = [x[a:b] for a, b in zip(bounds, bounds[1:])]
            means = torch.stack([g.mean((0, 2)) for g in groups])
            variances = torch.stack([g.var((0, 2), correction=0) for g in groups])
            seen[name if name not in seen else f"{name}#2"] = means, variances

        return take

    for name, (module, end, pick, layout) in wanted.items():
        take = keep(name, pick, layout)
        target = model.get_submodule(module)
        if end == "input":
            hook = lambda _m, args, kwargs, take=take: take((args, kwargs))
            handles.append(target.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(target.register_forward_hook(lambda _m, _i, output, take=take: take(output)))
    logits = model(images)
    for handle in handles:
        handle.remove()
    return logits, seen


def check(model, rules, wanted, size=(7, 8), *, trace=True, backend="auto", layout=torch.contiguous_format):
    """Logits, moments and the gradient of a loss that uses all, in float64, by plain hooks and by the fused network."""
    model = settle(copy.deepcopy(model)).double()
    images = torch.randn(5, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)
    bounds = [0, 1, 5]
    fused = fuse(model, sites=rules, trace=trace, backend=backend)
    plain = copy.deepcopy(model)
    for module in plain.modules():  # what hooks look at must stay as it was
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    results = []
    for run in (
        lambda x: plain_moments(plain, x, bounds, wanted),
        lambda x: fused(x, torch.tensor(bounds)),
    ):
        leaf = images.clone().requires_grad_()
        logits, moments = run(leaf)
        loss = logits.square().sum() + sum(m.sin().sum() + v.log1p().sum() for m, v in moments.values())
        results.append((logits, dict(moments), torch.autograd.grad(loss, leaf)[0]))
    (logits, expected, gradient), (fused_logits, moments, fused_gradient) = results
    assert set(moments) == set(expected)
    torch.testing.assert_close(fused_logits, logits, rtol=1e-10, atol=1e-10)
    for name, values in expected.items():
        for actual, value in zip(moments[name], values):
            torch.testing.assert_close(actual, value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fused_gradient, gradient, rtol=1e-9, atol=1e-10)
    return fused


first = lambda values: values[0][0]  # the first positional input
whole = lambda output: output

CHAINS = {
    "pixels": ("", "input", first, "channels"),
    "pixels@cells=4": ("", "input", first, "cells=4"),
    "stem:input": ("stem", "input", first, "channels"),
    "stem:input@cells=4": ("stem", "input", first, "cells=4"),
    "conv2:output": ("conv2", "output", whole, "channels"),
    "bn2": ("bn2", "input", first, "channels"),
    "bn2@cells=4": ("bn2", "input", first, "cells=4"),
    "act0:output": ("act0", "output", whole, "channels"),
    "bn_skip:output": ("bn_skip", "output", whole, "channels"),
    "head:input": ("head", "input", first, "channels"),
    "fc:output@last": ("fc", "output", whole, "last"),
}
CHAINS_RULES = (
    *("pixels", "pixels@cells=4", "name=stem", "name=stem@cells=4", "name=conv2:output", "name=bn2", "name=bn2@cells=4"),
    *("name=act0:output", "name=bn_skip:output", "name=head", "name=fc:output@last"),
)
TOKENS = {
    "patches:output": ("patches", "output", whole, "channels"),
    "mix:input@last": ("mix", "input", lambda v: v[0][0][0], "last"),
    "mix:input:1@last": ("mix", "input", lambda v: v[0][0][1], "last"),
    "mix:output:1@last": ("mix", "output", lambda v: v[1], "last"),
    "mix.norm:output@last": ("mix.norm", "output", whole, "last"),
    "attention.norm1:input@last": ("attention.norm1", "input", first, "last"),
}
TOKENS_RULES = (
    *("conv:output", "name=mix@last", "name=mix:input:1@last", "name=mix:output:1@last", "name=mix.norm:output@last"),
    "name=attention.norm1@last",
)
VOLUMES = {
    "conv3:input": ("conv3", "input", first, "channels"),
    "conv1:output": ("conv1", "output", whole, "channels"),
    "norm:input": ("norm", "input", first, "channels"),
    "fc:input": ("fc", "input", first, "channels"),
    **{name: (name, "input", first, "channels") for name in ("bn3", "bn1", "bn")},
}
VOLUMES_RULES = "bn", "name=conv3", "name=conv1:output", "type=GroupNorm", "name=fc"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("trace", [True, False])
def test_sites_of_every_kind(trace, backend, layout):
    fused = check(Chains(), CHAINS_RULES, CHAINS, trace=trace, backend=backend, layout=layout)
    assert fused.traced is trace and set(fused.site_names) == set(CHAINS)


@pytest.mark.parametrize("trace", [True, False])
def test_sites_of_volumes_sequences_and_vectors(trace):
    check(Volumes(), VOLUMES_RULES, VOLUMES, trace=trace)


def test_sites_of_tokens_and_tuples_without_batchnorm():
    """Traced without what is inside torch.nn's attention block; not traced with it, for its code looks at its data."""
    inside = TOKENS_RULES[-1]
    fused = check(Tokens(), TOKENS_RULES[:-1], {k: v for k, v in TOKENS.items() if not k.startswith("attention")}, (6, 6))
    assert fused.traced
    with pytest.warns(UserWarning, match="Tokens cannot be traced"):
        fused = check(Tokens(), TOKENS_RULES, TOKENS, (6, 6))
    assert not fused.traced and inside == "name=attention.norm1@last"
    check(Tokens(), TOKENS_RULES, TOKENS, (6, 6), trace=False)


def test_what_is_inside_a_module_of_torch_is_traced_where_that_can_be():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    wanted = {"0.0:output": ("0.0", "output", whole, "channels"), "0:output": ("0", "output", whole, "channels")}
    assert check(model, ["name=0", "name=0:output", "name=0.0:output"], wanted | {"0:input": ("0", "input", first, "channels")})


@pytest.mark.parametrize("trace", [True, False])
def test_a_site_that_runs_twice(trace):
    wanted = {"conv:output": ("conv", "output", whole, "channels"), "bn:output": ("bn", "output", whole, "channels")}
    check(Shared(), ["conv:output", "bn:output"], wanted, trace=trace)


def test_what_is_written_over_afterwards_was_seen_as_it_was():
    """An addition and an activation in place, on a BatchNorm's output and on a convolution's."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.act, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(True), nn.Conv2d(3, 5, 1)

        def forward(self, x):
            y = self.bn(self.conv(x))
            y += x
            y = self.act(self.last(self.act(y)))
            return y.mean((2, 3))

    wanted = {
        "bn:output": ("bn", "output", lambda y: y.clone(), "channels"),
        "last:output": ("last", "output", lambda y: y.clone(), "channels"),
    }
    assert "clone" in check(InPlace(), ["bn:output", "name=last:output"], wanted).body.code


def test_batchnorm_inputs_are_as_fast_as_they_were():
    """One operator a layer, no observer, whatever else could be asked for."""
    model = settle(build_model("resnet8", 5))
    fused = fuse(model)
    assert not any(isinstance(m, Observer) for m in fused.modules())
    more = fuse(model, sites=["bn", "conv"])
    assert more.describe().startswith(fused.describe())  # the same chains are folded
    assert fuse(model, sites=["name=bn1"])(torch.randn(2, 3, 8, 8))[1].keys() == {"bn1"}


@pytest.mark.parametrize("trace", [True, False])
def test_observed_convolutions_keep_nothing_beyond_what_is_observed(trace):
    fused = fuse(settle(build_model("resnet8", 5)), sites=["conv", "conv:output"], trace=trace)
    assert sum(isinstance(m, FrozenConvolution) for m in fused.modules()) == 7
    assert len(fused(torch.randn(2, 3, 8, 8))[1]) == 14


def test_it_compiles_into_one_graph():
    fused = fuse(settle(build_model("resnet8", 5)), sites=["bn", "conv@cells=4", "pixels"])
    images, starts = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 4])
    logits, moments = torch.compile(fused, fullgraph=True, backend="aot_eager")(images, starts)
    expected, expected_moments = fused(images, starts)
    torch.testing.assert_close(logits, expected)
    assert list(moments) == list(expected_moments) and moments.positions == expected_moments.positions
    assert moments.group_starts.equal(starts)
    torch.testing.assert_close(moments["conv1:input@cells=4"], expected_moments["conv1:input@cells=4"])


@pytest.mark.parametrize("trace", [True, False])
def test_it_survives_copying_and_pickling(trace):
    fused = fuse(settle(Chains()), sites=CHAINS_RULES, trace=trace)
    images = torch.randn(2, 3, 5, 5)
    others = [copy.deepcopy(fused)] + ([] if trace else [pickle.loads(pickle.dumps(fused))])
    expected = fused(images)[1]
    for other in others:
        moments = other(images)[1]
        assert list(moments) == list(expected)
        torch.testing.assert_close(moments["stem:input"], expected["stem:input"])
    assert not fused._tape.moments


def test_autocast_keeps_float32_statistics():
    fused = fuse(settle(Chains()), sites=["conv:output", "bn"])
    with torch.autocast("cpu", torch.bfloat16):
        moments = fused(torch.randn(2, 3, 8, 8))[1]
    assert all(value.dtype == torch.float32 for pair in moments.values() for value in pair)


def test_counts_of_elements():
    moments = fuse(settle(Chains()), sites=["bn", "pixels", "name=stem@cells=4"])(torch.randn(3, 3, 7, 8))[1]
    expected = {"pixels": 56, "stem:input@cells=4": 48, "bn0": 56, "bn_head": 1}
    assert {name: moments.positions[name] for name in expected} == expected
    assert moments.group_starts.tolist() == [0, 3]


def test_what_cannot_be_observed():
    with pytest.raises(InputError, match="nothing in Chains fits the rule 'type=LayerNorm'"):
        fuse(settle(Chains()), sites=["bn", "type=LayerNorm"])
    with pytest.raises(InputError, match="has no BatchNorm layer"):
        fuse(freeze(Tokens()))
    with pytest.raises(
        InputError, match=r"'mix:input:2@last' asks for number 2 of the inputs, which are Tensor, Tensor, float"
    ):
        fuse(freeze(Tokens()), sites=["name=mix:input:2@last"])(torch.randn(2, 3, 6, 6))
    with pytest.raises(InputError, match=r"site 'patches:input@last' has 2 samples|expected"):
        fuse(freeze(Tokens()), sites=["name=mix@cells=2"])(torch.randn(2, 3, 6, 6))

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, x):
            return self.fc(x.flatten(2).transpose(1, 2).flatten(0, 1)).view(len(x), -1, 5).mean(1)

    with pytest.raises(InputError, match="site 'fc:input' has 8 samples in a pass over 2 images"):
        fuse(freeze(Apart()), sites=["name=fc"], trace=False)(torch.randn(2, 3, 2, 2))


def test_an_untraceable_network_is_observed_with_a_note():
    model = settle(Untraceable())
    with pytest.warns(UserWarning, match="Untraceable cannot be traced"):
        fused = fuse(model, sites=["bn", "conv", "name=fc:output"])
    assert list(fused(torch.randn(2, 3, 6, 6))[1]) == ["conv:input", "bn", "fc:output"]
