"""Class statistics of any site, and of any estimator: each is what a plain loop over the images says, in float64."""

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from networks import Chains, settle
from torch import nn

from bnfuse import ClassStatistics, InputError, Matcher, freeze, fuse, group_by_class, record
from bnfuse.cli import main
from bnfuse.compat.lpld import BNFeatureHook_ClassStats_Training
from bnfuse.estimators import VARIANCES, index_batches
from bnfuse.models import batchnorm_layers
from bnfuse.statistics_file import PARTS

CLASSES = 3
PAGE = Path(__file__).parents[1] / "docs/recording.md"


class Tokens(nn.Module):
    """A network without BatchNorm: GroupNorm, LayerNorm over tokens [B, N, C], and a block that gives a tuple."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mix = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, tokens):
            mixed = self.mix(self.norm(tokens))
            return tokens + mixed, mixed

    def __init__(self):
        super().__init__()
        self.conv, self.gn, self.block, self.fc = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), Tokens.Block(), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = F.relu(self.gn(self.conv(x)))
        tokens, _ = self.block(x.flatten(2).transpose(1, 2))
        return self.fc(tokens.mean(1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return freeze(Tokens().double())


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    images = torch.randn(40, 3, 7, 6, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (40,))
    return images + labels[:, None, None, None], labels


def batches(data, size=7):
    return list(zip(*(part.split(size) for part in data)))


def take(model, data, size=7, **options):
    return record(model, batches(data, size), CLASSES, minimum_images=1, **options)


def activations(model, images):
    """By site name, [N, C, elements of a channel and sample], gathered without `sites`."""
    with torch.no_grad():
        conv = model.conv(images)
        gn = model.gn(conv)
        tokens = F.relu(gn).flatten(2).transpose(1, 2)
        mixed = model.block(tokens)[1]
        whole = F.interpolate(images, (8, 8), mode="bilinear", align_corners=False)
    cells = torch.stack([whole[:, :, i : i + 4, j : j + 4].flatten(1) for i in (0, 4) for j in (0, 4)], dim=1)
    return {
        "pixels": images.flatten(2),
        "pixels@cells=4": cells,
        "conv:input": images.flatten(2),
        "gn:input": conv.flatten(2),
        "gn:output": gn.flatten(2),
        "block.norm:input@last": tokens.transpose(1, 2),
        "block:output:1@last": mixed.transpose(1, 2),
    }


RULES = ("pixels", "pixels@cells=4", "conv", "type=GroupNorm", "type=GroupNorm:output", "type=LayerNorm@last")
RULES += ("name=block:output:1@last",)


def test_pooled_moments_of_every_kind_of_site(model, data):
    statistics = take(model, data, sites=RULES)
    expected = activations(model, data[0])
    assert set(statistics.sites) == set(expected) and statistics.rules == RULES and statistics.variance == "pooled"
    for name, x in expected.items():
        for k in range(CLASSES):
            of_class = x[data[1] == k].transpose(0, 1).flatten(1)  # [C, elements]
            site = statistics.sites[name]
            assert site.count[k] == of_class.shape[1]
            torch.testing.assert_close(site.mean[k], of_class.mean(1), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(site.m2[k] / site.count[k], of_class.var(1, correction=0), rtol=1e-11, atol=1e-12)


def loop(variance, x, labels, size):
    """[K, C] mean and variance of one site as the methods' own loops have them; x [N, C, L]."""
    k, c = CLASSES, x.shape[1]
    mean, var, weight = torch.zeros(k, c).double(), torch.zeros(k, c).double(), torch.zeros(k, 1).double()
    if variance == "ema":
        var += 1
    for part, classes in zip(x.split(1 if variance == "images" else size), labels.split(1 if variance == "images" else size)):
        for k in classes.unique().tolist():
            here = part[classes == k]
            m, v = here.mean((0, 2)), here.var((0, 2), correction=0)
            if variance == "ema":
                mean[k], var[k] = 0.9 * mean[k] + 0.1 * m, 0.9 * var[k] + 0.1 * v
            else:
                mean[k] += m * len(here)
                var[k] += v * len(here)
                weight[k] += len(here)
    return (mean, var) if variance == "ema" else (mean / weight, var / weight)


@pytest.mark.filterwarnings("ignore:.*moving average starts from")
@pytest.mark.parametrize("variance", ["images", "batches", "ema"])
def test_the_other_estimators_are_their_methods_loops(model, data, variance, tmp_path):
    recorded = take(model, data, sites=RULES, variance=variance)
    recorded.save(tmp_path / "s.safetensors")
    loaded = ClassStatistics.load(tmp_path / "s.safetensors", sites=reversed(RULES))
    assert loaded.variance == variance and loaded.digest() == recorded.digest()
    exact = take(model, data, sites=RULES)
    expected = activations(model, data[0])
    for statistics in (recorded, loaded):
        for name, x in expected.items():
            mean, var = statistics.moments(names=[name])
            for actual, wanted in zip((mean, var), loop(variance, x, data[1], size=7)):
                torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-12)
            some = statistics.moments(names=[name], classes=[2, 0])
            assert some[0].equal(mean[[2, 0]]) and some[1].equal(var[[2, 0]])
        for a, b in zip(statistics.moments(per_class=False), exact.moments(per_class=False)):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        with pytest.raises(InputError, match="some classes together"):
            statistics.moments(per_class=False, classes=[0, 1])
    assert not torch.allclose(recorded.moments()[1], exact.moments()[1], rtol=1e-3)  # none is the pooled one


@pytest.mark.filterwarnings("ignore:.*moving average starts from")
def test_every_estimator_gives_targets(model, data):
    for variance in VARIANCES:
        statistics = take(model, data, sites=("type=GroupNorm",), variance=variance)
        matcher, whole = (Matcher.from_statistics(statistics, per_class=per_class) for per_class in (True, False))
        mean, var = statistics.moments()
        moments = {"gn:input": (mean, var)}
        torch.testing.assert_close(matcher(moments, torch.arange(CLASSES)).item(), 0.0, rtol=0, atol=1e-6)
        assert whole.target_mean.shape == (1, 4)


def test_images_do_not_depend_on_batches_and_single_class_batches_leave_out_their_differences(model, data):
    sites = ("type=GroupNorm",)
    for a, b in zip(
        take(model, data, sites=sites, variance="images").moments(),
        take(model, data, 40, sites=sites, variance="images").moments(),
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    order = data[1].argsort(stable=True)
    one_batch = take(model, (data[0][order], data[1][order]), 40, sites=sites, variance="batches")
    for a, b in zip(one_batch.moments(), take(model, data, sites=sites).moments()):  # one slice a class: the pooled moments
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_batches_are_dealt_as_the_methods_have_them():
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 1])
    assert index_batches("pooled", labels, 4) == index_batches("images", labels, 4) == [[0, 1, 2, 3], [4, 5, 6]]
    assert index_batches("batches", labels, 2) == [[0, 2], [5], [1, 4], [6], [3]]  # of one class each
    shuffled = index_batches("ema", labels, 3, seed=5)
    assert [len(batch) for batch in shuffled] == [3, 3, 1] and sorted(sum(shuffled, [])) == list(range(7))
    assert shuffled == index_batches("ema", labels, 3, seed=5) != index_batches("ema", labels, 3, seed=6)


def test_the_command_line_records_them(tmp_path, capsys):
    (tmp_path / "teacher.py").write_text(
        "import torch; from torch import nn\n\ndef small():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))\n"
    )
    command = ["record", "--teacher", f"{tmp_path / 'teacher.py'}:small", "--data", "digits:train", "--image-size", "8"]
    command += ["--mean", "0.3", "--std", "0.4", "--device", "cpu", "--out", str(tmp_path / "s.safetensors")]
    assert main(command) == 2
    assert "no BatchNorm layer: it has GroupNorm (1)" in (error := capsys.readouterr().err) and "Traceback" not in error
    command += ["--sites", "type=GroupNorm", "pixels"]
    for more, said in (
        (["--out", str(tmp_path)], "is a folder: name the file"),
        (["--workers", "-1"], "--workers must be at least 0"),
    ):
        assert main([*command, *more]) == 2 and said in capsys.readouterr().err
    recorded = {}
    for variance in VARIANCES:
        assert main([*command, "--class-variance", variance]) == 0
        assert "10 classes at 2 sites (5 channels)" in capsys.readouterr().out
        loaded = ClassStatistics.load(tmp_path / "s.safetensors", sites=("type=GroupNorm", "pixels"))
        assert loaded.variance == variance
        recorded[variance] = loaded.moments()[1]
    assert len({tuple(var.flatten().tolist()) for var in recorded.values()}) == len(VARIANCES)


@pytest.mark.filterwarnings("ignore:.*moving average starts from")
def test_merging(model, data):
    sites = ("type=GroupNorm", "pixels")
    halves = [tuple(part[rows] for part in data) for rows in (slice(0, None, 2), slice(1, None, 2))]
    whole, first, second = (take(model, part, sites=sites) for part in (data, *halves))
    merged = first.merge(second)
    assert merged.rules == sites
    for a, b in zip(merged.moments(), whole.moments()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError, match="set of sites is type=GroupNorm, expected type=GroupNorm pixels"):
        first.merge(take(model, halves[1], sites=("type=GroupNorm",)))
    for variance, why in (("images", "images' own"), ("batches", "batches that"), ("ema", "the order")):
        one, two = (take(model, half, sites=sites, variance=variance) for half in halves)
        with pytest.raises(InputError, match=f"variance='{variance}' cannot be merged.*{why}"):
            one.merge(two)
        with pytest.raises(InputError, match="way of taking the variance"):
            first.merge(two)


def test_other_sites_are_refused(model, data, tmp_path):
    path = tmp_path / "s.safetensors"
    take(model, data, sites=("type=GroupNorm", "pixels")).save(path)
    ClassStatistics.load(path, sites=("pixels", "type=GroupNorm:input@channels"))  # the same, said otherwise
    with pytest.raises(InputError, match="of the sites type=GroupNorm pixels, expected bn.*record --sites bn"):
        ClassStatistics.load(path, sites=("bn",))


def test_a_file_of_the_first_format_loads(data, tmp_path):
    network = settle(Chains()).double()
    statistics = record(network, batches(data), CLASSES, minimum_images=1)
    statistics.save(tmp_path / "new.safetensors")
    with safetensors.safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    assert all(key == "images" or key.split("/")[0] in PARTS for key in tensors)  # the layout of the first
    for old, new in (('"version": 2', '"version": 1'), ('"rules": ["bn"], ', ""), ('"variance": "pooled", ', "")):
        assert old in metadata["description"]
        metadata["description"] = metadata["description"].replace(old, new)
    safetensors.torch.save_file(tensors, tmp_path / "old.safetensors", metadata)
    loaded = ClassStatistics.load(tmp_path / "old.safetensors", teacher=network, sites=("bn",))
    assert (loaded.rules, loaded.variance, loaded.digest()) == (("bn",), "pooled", statistics.digest())
    metadata["description"] = metadata["description"].replace('"version": 1', '"version": 4')
    safetensors.torch.save_file(tensors, tmp_path / "newer.safetensors", metadata)
    with pytest.raises(InputError, match="format version 4, this bnfuse reads 1, 2, 3"):
        ClassStatistics.load(tmp_path / "newer.safetensors")


def test_a_damaged_file_is_refused(model, data, tmp_path):
    path = tmp_path / "s.safetensors"
    take(model, data, sites=("pixels",), variance="images").save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    del tensors["whole_mean/pixels"]
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(InputError, match="damaged: site 'pixels'"):
        ClassStatistics.load(path)


def test_the_floor_counts_what_a_moving_average_averages(model):
    labels = torch.zeros(400, dtype=torch.int64)
    images = torch.randn(400, 3, 7, 6, dtype=torch.float64)
    sites = ("pixels",)
    # one image a batch: 400 weigh as much as the (1 + 0.9) / (1 - 0.9) = 19 last ones
    with pytest.raises(InputError, match=r"fewer than 20 images in 1 class\(es\) in effect: 0 \(19\).*last batches"):
        record(model, batches((images, labels), 1), 1, sites=sites, variance="ema")
    record(model, batches((images, labels), 1), 1, sites=sites, variance="ema", minimum_images=19)
    record(model, batches((images, labels), 4), 1, sites=sites, variance="ema")
    for variance in ("images", "batches"):
        record(model, batches((images[:20], labels[:20]), 5), 1, sites=sites, variance=variance)
        with pytest.raises(InputError, match=r"fewer than 20 images in 1 class\(es\): 0 \(19\)"):
            record(model, batches((images[:19], labels[:19]), 5), 1, sites=sites, variance=variance)
    with pytest.warns(UserWarning, match=r"35% of the statistics of class 0 .*since 10 batches"):
        record(model, batches((images, labels), 40), 1, sites=sites, variance="ema")


def test_what_cannot_be_recorded(model, data):
    with pytest.raises(InputError, match="no BatchNorm layer: it has GroupNorm .1., LayerNorm .1."):
        take(model, data)
    with pytest.raises(InputError, match="variance must be one of pooled, images, batches, ema, got 'biased'"):
        take(model, data, sites=("conv",), variance="biased")
    with pytest.raises(InputError, match="nothing in Tokens fits the rule 'type=InstanceNorm2d'"):
        take(model, data, sites=("type=InstanceNorm2d",))

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.gn = nn.GroupNorm(1, 3)

        def forward(self, x):
            return torch.cat([self.gn(half) for half in x.chunk(2)]).mean((2, 3))

    with pytest.raises(InputError, match="'gn:input' has 4 samples in a pass over 7 images"):
        take(freeze(Halves().double()), data, sites=("type=GroupNorm",))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_is_recorded_is_what_the_fused_network_yields(model, data):
    """The same sites under the same names, a layer that runs twice included, and the same numbers."""

    class Twice(Tokens):
        def forward(self, x):
            return super().forward(x) + super().forward(x.flip(2))

    torch.manual_seed(0)
    twice = freeze(Twice().double())
    order = data[1].argsort(stable=True)
    images, labels = data[0][order], data[1][order]
    for network in (model, twice):
        for part in (RULES, ("type=GroupNorm",)):
            statistics = take(network, (images, labels), 40, sites=part)
            fused = fuse(network, sites=part)
            _, moments = fused(images, group_by_class(labels)[0])
            assert list(moments) == list(statistics.sites)
            for name, (mean, var) in moments.items():
                for actual, expected in zip((mean, var), statistics.moments(names=[name])):
                    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
            assert Matcher.from_statistics(statistics).double()(moments, torch.arange(CLASSES)) < 1e-5


@pytest.mark.filterwarnings("ignore:.*moving average starts from")
def test_statistics_on_the_layers_are_what_the_methods_hooks_measure(data):
    """By the snippet of docs/recording.md: LPLD's hook on each layer, and the matcher, say the same."""
    network, images = settle(Chains()).double(), data[0]
    statistics = record(network, batches(data), CLASSES, minimum_images=1, variance="ema")
    code = re.search(r"```python\n(for name, layer in batchnorm_layers.*?)```", PAGE.read_text(), re.DOTALL)[1]
    exec(code, {"batchnorm_layers": batchnorm_layers, "model": network, "statistics": statistics})
    _, moments = fuse(network)(images)
    expected = Matcher.from_statistics(statistics)(moments, torch.tensor([1]))
    hooks = [BNFeatureHook_ClassStats_Training(layer, 1) for layer in batchnorm_layers(network).values()]
    network(images)
    torch.testing.assert_close(sum(hook.r_feature for hook in hooks), expected, rtol=1e-12, atol=1e-12)
