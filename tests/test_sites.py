"""Rules name the sites that they say, and each is laid out so that its moments are those of the formula."""

import pickle

import pytest
import torch
from networks import Chains, Shared, settle
from torch import nn

from bnfuse import InputError
from bnfuse.reference import group_moments
from bnfuse.sites import Site, SiteRule, call_name, observe, select, stem


def names(model, *rules):
    return [site.name for site in select(model, rules)]


class Pairs(nn.Module):
    """Its block takes a nested tuple and a keyword argument and gives a dictionary."""

    class Block(nn.Module):
        def forward(self, pair, *, third):
            return {"sum": pair[0] + pair[1], "all": (third, pair[0] * third)}

    def __init__(self):
        super().__init__()
        self.block = Pairs.Block()

    def forward(self, x):
        return self.block((x, 2 * x), third=3 * x)["all"][1]


def test_rules_in_full():
    assert SiteRule.parse("bn") == SiteRule("bn")
    assert SiteRule.parse("conv:output:2@last") == SiteRule("conv", end="output", index=2, layout="last")
    assert SiteRule.parse("type=GroupNorm:input@cells=16") == SiteRule("type", "GroupNorm", layout="cells", cells=16)
    assert SiteRule.parse("name=layer1.*.conv[12]@channels") == SiteRule("name", "layer1.*.conv[12]")
    for text in ("", "batchnorm", "conv:inputs", "conv:1", "bn@cells=0", "bn@cells", "type=", "pixels:output", "name=a@rows"):
        with pytest.raises(InputError, match="names no sites: expected KIND"):
            SiteRule.parse(text)


def test_sites_come_in_the_order_of_the_modules():
    model = Chains()
    assert names(model, "bn") == ["bn0", "bn1", "bn2", "bn3", "bn_skip", "bn4", "bn_head"]
    assert names(model, "bn", "conv@cells=4", "pixels", "conv")[:5] == [
        "pixels",
        "stem:input@cells=4",
        "stem:input",
        "bn0",
        "conv1:input@cells=4",
    ]
    assert names(model, "name=bn[01]", "bn:output", "type=_BatchNorm", "name=fc:output") == [
        *("bn0", "bn0:output", "bn1", "bn1:output", "bn2", "bn2:output", "bn3", "bn3:output", "bn_skip", "bn_skip:output"),
        *("bn4", "bn4:output", "bn_head", "bn_head:output", "fc:output"),
    ]
    assert [site.batchnorm for site in select(model, ["name=bn0", "name=bn0:output", "name=bn0@last"])] == [True, False, False]
    assert stem("stem:input@cells=4") == stem("stem:input") == "stem:input"


def test_rules_that_nothing_fits_say_what_there_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.ReLU())
    with pytest.raises(
        InputError, match=r"Sequential has no BatchNorm layer: it has GroupNorm \(1\), .*--sites type=GroupNorm"
    ):
        select(model, ["conv", "bn"])
    with pytest.raises(InputError, match=r"fits the rule 'type=Linear'; it has ReLU \(2\), Conv2d \(1\), Group"):
        select(model, ["type=Linear"])
    with pytest.raises(InputError, match="'name=layer1'; it has modules named 0, 1, 2, 3"):
        select(model, ["name=layer1"])
    with pytest.raises(InputError, match="at least one rule"):
        select(model, [])


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6), (4, 3, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_moments_of_every_shape(shape, last):
    x = torch.randn(shape, dtype=torch.float64)
    given = x.movedim(1, -1).contiguous() if last else x
    arranged = Site("s", "s", layout="last" if last else "channels").arrange(given)
    assert arranged.equal(x) and arranged.data_ptr() == given.data_ptr()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size, resized", [((8, 12), (8, 12)), ((7, 9), (8, 12)), ((3, 3), (4, 4))])
def test_moments_of_cells(size, resized, layout):
    """Cells of 4×4 positions, row by row, over samples, channels and positions."""
    x = torch.randn(3, 2, *size, dtype=torch.float64).to(memory_format=layout)
    mean, var = group_moments(Site("s", "s", layout="cells", cells=4).arrange(x), torch.tensor([0, 1, 3]))
    whole = nn.functional.interpolate(x, resized, mode="bilinear") if size != resized else x
    for group, rows in enumerate((slice(0, 1), slice(1, 3))):
        cells = [
            whole[rows, :, i : i + 4, j : j + 4].flatten() for i in range(0, resized[0], 4) for j in range(0, resized[1], 4)
        ]
        torch.testing.assert_close(mean[group], torch.stack([c.mean() for c in cells]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(var[group], torch.stack([c.var(correction=0) for c in cells]), rtol=1e-12, atol=1e-12)


def test_tensors_that_have_no_moments():
    for site, x in (
        (Site("a", "a"), torch.zeros(3)),
        (Site("a", "a"), torch.zeros(3, 2, dtype=torch.int64)),
        (Site("a", "a", layout="cells", cells=4), torch.zeros(3, 2, 5)),
    ):
        with pytest.raises(InputError, match="site 'a' is torch"):
            site.arrange(x)


def test_what_is_observed_and_when_no_longer():
    model, x = Pairs(), torch.randn(2, 3)
    sites = select(model, ["pixels", *(f"name=block:{end}:{i}" for end in ("input", "output") for i in range(3))])
    seen = {}
    with observe(model, sites, lambda site, value: seen.update({site.name: value})):
        model(x)
    first = {"pixels": x, "block:input": x, "block:input:1": 2 * x, "block:input:2": 3 * x}
    expected = first | {"block:output": 3 * x, "block:output:1": 3 * x, "block:output:2": 3 * x.square()}
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value)
    seen.clear()
    model(x)
    assert not seen
    with (
        observe(model, select(model, ["name=block:input:3"]), print),
        pytest.raises(InputError, match="are Tensor, Tensor, Te"),
    ):
        model(x)


def test_a_site_that_runs_twice_is_shown_twice_and_hooks_can_be_pickled():
    model, seen = settle(Shared()), []
    with observe(model, select(model, ["conv:output"]), Appending(seen)):
        assert "conv" in dict(pickle.loads(pickle.dumps(model)).named_modules())
        model(torch.randn(2, 3, 5, 5))
    assert seen == [("conv:output", (2, 3, 5, 5))] * 2
    assert call_name("a", ["a", "a#2"]) == "a#3" and call_name("a", []) == "a"


class Appending:
    def __init__(self, seen):
        self.seen = seen

    def __call__(self, site, x):
        self.seen.append((site.name, tuple(x.shape)))
