"""Presets: each one's loss and gradient are those of its project's formula, and the driver takes their settings."""

import copy
import json
import math

import pytest
import torch
import transcriptions
from tolerances import TOLERANCES
from torch import nn
from virtual_cases import Keep

from bnfuse import ClassStatistics, InputError, SynthesisConfig, preset, record, synthesize
from bnfuse.augment import Augmentation
from bnfuse.checkpoints import save_checkpoint
from bnfuse.cli import main
from bnfuse.models import Teacher, freeze
from bnfuse.networks import CifarResNet
from bnfuse.optimisation import learning_rate, optimise
from bnfuse.preprocessing import Preprocessing
from bnfuse.presets import PRESETS, listing, settings, table
from bnfuse.priors import combine, image_means
from bnfuse.site_moments import SiteMoments
from bnfuse.store import verify
from bnfuse.units import UnitMaker

SIZE, CLASSES = 20, 4
PREPROCESSING = Preprocessing((SIZE, SIZE), (0.5,) * 3, (0.25,) * 3)
PAGE = "docs/presets.md"


class Small(nn.Module):
    """Conv, BN, ReLU and a residual, at two sizes."""

    def __init__(self, width: int):
        super().__init__()
        conv = lambda c_in, stride=1: nn.Conv2d(c_in, width, 3, stride, padding=1, bias=False)
        self.conv1, self.bn1 = conv(3), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 2), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        x = torch.relu(self.bn3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))


def teacher(width: int, seed: int) -> Teacher:
    torch.manual_seed(seed)
    model = Small(width)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return Teacher(freeze(model), "small", CLASSES, PREPROCESSING)


# ---- the table ----


def test_presets_are_configs_and_changes_win():
    for name in PRESETS:
        config = preset(name)
        assert config.preset == name and preset(name, lr=0.125).lr == 0.125
        assert all(getattr(config, field) == value for field, value in PRESETS[name].fields.items())
    assert preset("soufleri") == SynthesisConfig(preset="soufleri")
    with pytest.raises(InputError, match="no preset is called 'sre3l'; choose one of soufleri, deepinversion, sre2l"):
        preset("sre3l")


def test_every_project_that_is_named_has_a_preset_and_a_transcription():
    names = "deepinversion sre2l cda lpld wmdd gvbsm edc dwa cvdd fadrm zeroq gdfq intraq fast_datafree breaching abd dsg"
    assert set(PRESETS) == {*names.split(), "dp_imgsyn", "soufleri"}
    assert all(callable(getattr(transcriptions, name)) for name in PRESETS)


def test_the_page_shows_the_table(pytestconfig):
    page = (pytestconfig.rootpath / PAGE).read_text()
    shown = page.partition("<!-- presets -->\n")[2].partition("\n<!-- /presets -->")[0]
    assert shown == table(), "put what `python -m bnfuse.presets` prints between the page's markers"


def test_settings_are_what_the_command_line_takes(capsys):
    assert settings("zeroq").startswith("--sites bn pixels --targets running --groups sample")
    assert "--no-clip" in settings("zeroq") and "--betas 0.9 0.999" in settings("zeroq")
    with pytest.raises(SystemExit) as ended:
        main(["synthesize", "--list-presets"])
    assert ended.value.code == 0 and capsys.readouterr().out == listing() + "\n"


# ---- what presets brought into the driver ----


def test_the_crop_curriculum_is_cdas():
    curriculum = Augmentation(crop_scale=0.08, crop_curriculum=0.5)
    for i in range(21):
        expected = 0.08 + 0.92 * (1 + math.cos(math.pi * i / 10)) / 2 if i < 10 else 0.08
        assert curriculum.least_crop(i / 20) == pytest.approx(expected)
    images, generator = torch.zeros(1, 3, 64, 64), torch.Generator().manual_seed(0)
    areas = [[_area(curriculum.draw(images, generator, progress=p)) for _ in range(200)] for p in (0.0, 0.25, 1.0)]
    assert min(areas[0]) > 0.85 and 0.4 < min(areas[1]) < 0.6 and min(areas[2]) < 0.12
    with pytest.raises(InputError, match="crop_curriculum must be a share of the steps, from 0 to 1, got 2"):
        SynthesisConfig(crop_curriculum=2)


def _area(view) -> float:
    return view.crop[2] * view.crop[3] / 64**2


def test_a_constant_schedule():
    config = SynthesisConfig(lr=0.5, warmup=3, iterations=9, schedule="constant")
    assert [learning_rate(config, step) for step in range(1, 10)] == [0.125, 0.25, 0.375, *[0.5] * 6]


@pytest.mark.parametrize("parts", [[5], [2, 3], [1, 1, 3]])
def test_priors_of_each_kind_from_parts_of_a_batch(parts):
    images = torch.randn(5, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    view = images.roll((1, 2), (2, 3))
    four = transcriptions.four_differences
    expected = {
        "norms": (sum(d.norm() for d in four(view)), view.flatten(1).norm(dim=1).mean()),
        "absolute": (sum(d.abs().mean() for d in four(images)), images.square().mean()),
        "mean_squares": (sum(d.square().mean() for d in four(images)[:2]), images.square().mean()),
    }
    for kind, (tv, l2) in expected.items():
        means: dict = {}
        for rows, count in zip(torch.arange(5).split(parts), parts):
            for name, value in image_means(images[rows], view[rows], kind, ("tv", "l2")).items():
                means[name] = means.get(name, 0) + count / 5 * value
        terms = combine(means, 5)
        assert set(terms) == {"tv", "l2"}
        torch.testing.assert_close(terms["tv"], tv, rtol=1e-12, atol=0)
        torch.testing.assert_close(terms["l2"], l2, rtol=1e-12, atol=0)
    flat = torch.ones(1, 1, 3, 3, requires_grad=True)
    variation = combine(image_means(flat, flat, "norms", ("tv",)), 1)["tv"]
    assert torch.autograd.grad(variation, flat)[0].equal(torch.zeros(1, 1, 3, 3))  # as a norm's at 0


# ---- the formulas ----

LABELS = [0, 0, 0, 0, 1, 1, 2, 2]  # of every image of a batch; shares that float32 has exactly
PRIORS = (60.0, 52.0, 57.0)  # of CV-DD's teachers
TEACHERS = {"gvbsm": 2, "edc": 2, "fadrm": 2, "cvdd": 3}


def statistics(of: Teacher) -> ClassStatistics:
    """As recorded at BatchNorm and convolution inputs, these also in cells: made up, as any numbers will do."""
    generator = torch.Generator().manual_seed(3)
    cells = {"conv1": 4, "conv2": 4, "conv3": 4}  # of 16×16 positions, 20×20 being resized to 32×32
    sites = {}
    for name, module in of.model.named_modules():
        if isinstance(module, nn.Conv2d):
            sites |= {f"{name}:input": module.in_channels, f"{name}:input@cells=16": cells[name]}
        elif isinstance(module, nn.BatchNorm2d):
            sites[name] = module.num_features

    def made_up(channels: int) -> SiteMoments:
        count = torch.tensor([30, 10, 20, 40])
        mean = 0.3 * torch.randn(CLASSES, channels, dtype=torch.float64, generator=generator)
        var = 0.5 + torch.rand(CLASSES, channels, dtype=torch.float64, generator=generator)
        return SiteMoments(count, mean, var * count[:, None])

    tables = {name: made_up(channels) for name, channels in sites.items()}
    names = [str(k) for k in range(CLASSES)]
    return ClassStatistics(tables, torch.tensor([30, 10, 20, 40]), of.fingerprint, PREPROCESSING, class_names=names)


def tables(of: ClassStatistics, per_class: bool) -> dict:
    """Under the names of the transcriptions, with float32's values, which is what targets are kept in."""
    found = {}
    for name in of.sites:
        pair = of.moments(per_class=per_class, names=[name])
        found[name.replace(":input", "").replace("@cells=16", "@cells")] = [table.float().double() for table in pair]
    return found


def classes_of(name: str) -> list[int]:
    """A batch that the preset's plan may have."""
    return [1] * 8 if PRESETS[name].fields.get("classes_per_batch", 1) == 1 and name in ("lpld", "soufleri") else LABELS


def build(name: str, dtype: torch.dtype) -> tuple[UnitMaker, list[ClassStatistics]]:
    """What the driver makes of a preset, for teachers of this dtype."""
    teachers = [teacher(6 + k, k) for k in range(TEACHERS.get(name, 1))]
    for each in teachers:
        each.model.to(dtype)
    recorded = [statistics(each) for each in teachers]
    config = preset(name, **({"teacher_priors": PRIORS} if name == "cvdd" else {}))
    pairs = list(zip(teachers, recorded))
    return UnitMaker(*pairs[0], config, torch.device("cpu"), "auto", more_teachers=pairs[1:]), recorded


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_loss_and_gradient_are_its_projects(name, dtype, memory_format):
    """Over four steps, against float64 on the values given: 10⁻⁹ in float64, the table's tolerances in float32, where the
    gradient's are of its largest element: it is the sum of what runs back through all layers."""
    maker, recorded = build(name, dtype)
    oracles = [copy.deepcopy(each.teacher.model).double() for each in (maker.source, *maker.more_sources)]
    classes = classes_of(name)
    starts, rows = maker.targets[0].groups(classes, maker.config.grouping)
    labels, generator, memory = torch.tensor(classes), torch.Generator().manual_seed(4), {}
    maker.objective.begin()
    for number in range(4):
        images = torch.randn(8, 3, SIZE, SIZE, dtype=torch.float64, generator=generator).to(dtype)
        ours, theirs = (value.detach().requires_grad_() for value in (images, images.double()))
        view = ours.roll((2, -1), (2, 3)).contiguous(memory_format=memory_format)
        losses = maker.objective.at(0, number)(ours, view, labels, starts, rows)
        step = transcriptions.Step(
            oracles,
            theirs,
            theirs.roll((2, -1), (2, 3)),
            labels,
            number,
            [tables(each, True) for each in recorded],
            [tables(each, False) for each in recorded],
            memory,
        )
        if name == "cvdd":  # which two were drawn is the driver's affair
            drawn = maker.objective.at(0, number).chosen
            step.networks, step.priors = [oracles[k] for k in drawn], tuple(PRIORS[k] for k in drawn)
            assert len(drawn) == 2
        expected = getattr(transcriptions, name)(step)
        gradient, reference = torch.autograd.grad(losses.total, ours)[0], torch.autograd.grad(expected, theirs)[0]
        relative = 1e-9 if dtype == torch.float64 else TOLERANCES[dtype].relative
        absolute = 0 if dtype == torch.float64 else TOLERANCES[dtype].absolute
        assert losses.total.item() == pytest.approx(expected.item(), rel=relative, abs=absolute)
        scale = reference.abs().max()
        assert (gradient.double() - reference).abs().max() <= (relative + absolute) * scale


# ---- the driver ----


def short(name: str, **changes) -> dict:
    """A preset's settings, for a run of a moment."""
    few = {"images_per_class": 2, "batch_size": 4, "iterations": 3, "low_resolution_iterations": 0, "warmup": 0}
    few |= {"classes_per_batch": min(2, PRESETS[name].fields.get("classes_per_batch", 1))}
    return few | ({"teacher_priors": PRIORS} if name == "cvdd" else {}) | changes


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_through_the_driver(name, tmp_path):
    teachers = [teacher(6 + k, k) for k in range(TEACHERS.get(name, 1))]
    (first, recorded), *more = [(each, statistics(each)) for each in teachers]
    config = preset(name, **short(name))
    done = synthesize(first, recorded, tmp_path / "out", config, device="cpu", progress=False, more_teachers=more)
    assert done.made == 8 and verify(tmp_path / "out") == [] and all(map(math.isfinite, done.losses.values()))
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["config"]["preset"] == name
    assert SynthesisConfig.from_card(card) == config


@pytest.mark.parametrize("name", ["gvbsm", "edc", "fast_datafree", "zeroq", "dsg", "deepinversion"])
def test_what_a_preset_keeps_from_step_to_step_survives_a_break_and_micro_batches(name):
    teachers = [(each, statistics(each)) for each in (teacher(6, 0), teacher(8, 1))]
    config = preset(name, **short(name, iterations=12, jitter=2, teacher_plan="in_turn"))
    maker = UnitMaker(*teachers[0], config, torch.device("cpu"), "auto", more_teachers=teachers[1:])
    unit = maker.units[-1]
    groups = [targets.groups(unit.classes, config.grouping) for targets in maker.targets][0]
    labels, seeds, keep = torch.tensor(unit.classes), maker.seeds(unit), Keep(7)

    def make(**options):
        return optimise(maker.objective, groups, labels, seeds, 0, maker.teacher, config, lambda *_: None, **options)

    images, losses = make(checkpoint=keep)
    resumed, again = make(state=keep.states[7])
    assert resumed.equal(images) and again == losses
    parts, theirs = make(micro_batch=3)
    assert (parts - images).abs().mean() < 1e-3
    assert {term: pytest.approx(value, rel=1e-3) for term, value in theirs.items()} == losses


def test_gvbsm_from_a_recording_of_its_sites(tmp_path):
    """The first hook, whose losses count ten times, is the first convolution's; in whole channels and in cells."""
    images = torch.rand(80, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(6))
    batches = [(images, torch.arange(80) % CLASSES)]
    pairs = [(each, record(each, batches, CLASSES, sites=preset("gvbsm").sites)) for each in (teacher(6, 0), teacher(8, 1))]
    config = preset("gvbsm", **short("gvbsm"))
    maker = UnitMaker(*pairs[0], config, torch.device("cpu"), "auto", more_teachers=pairs[1:])
    for targets in maker.targets:
        weights = dict(zip(targets.matcher.names, targets.matcher.site_weights.tolist()))
        assert len(weights) == 9
        assert {name for name, weight in weights.items() if weight == 10} == {"conv1:input", "conv1:input@cells=16"}
    done = synthesize(*pairs[0], tmp_path / "out", config, device="cpu", progress=False, more_teachers=pairs[1:])
    assert done.made == 8 and verify(tmp_path / "out") == []


def test_without_clipping_pixels_leave_their_range():
    each = teacher(6, 0)
    found = {}
    for clip in (True, False):
        config = preset("zeroq", **short("zeroq", clip=clip, noise_scale=1.0))
        maker = UnitMaker(each, None, config, torch.device("cpu"), "auto")
        groups = maker.targets[0].groups([0, 1], "sample")
        found[clip] = optimise(maker.objective, groups, torch.tensor([0, 1]), [1, 2], 0, each, config, lambda *_: None)[0]
    assert found[True].abs().max() <= 2 < found[False].abs().max()  # black and white are ∓2


def test_the_command_line_takes_a_preset_and_its_own_flags_win(tmp_path, capsys):
    model = CifarResNet(8, 3, 3)
    preprocessing = Preprocessing((8, 8), (0.5,) * 3, (0.25,) * 3)
    about = {"architecture": "resnet8", "num_classes": 3, "preprocessing": preprocessing}
    save_checkpoint(tmp_path / "t.safetensors", model, **about)
    command = ["synthesize", "--teacher", str(tmp_path / "t.safetensors"), "--device", "cpu", "--out", str(tmp_path / "out")]
    flags = ["--images-per-class", "1", "--iterations", "2", "--lr", "0.125", "--no-flip", "--jitter", "0"]
    assert main([*command, "--preset", "cda", *flags]) == 0
    config = SynthesisConfig.from_card(json.loads((tmp_path / "out" / "card.json").read_text()))
    expected = preset("cda", images_per_class=1, iterations=2, lr=0.125, flip=False, jitter=0)
    assert config == expected and config.crop_curriculum == 1 and config.bn_weight == 0.01
    assert main([*command, *flags, "--preset", "cda"]) == 0  # wherever it stands
    assert main([*command, *flags, "--preset", "sre2l"]) == 2
    assert "config.preset" in capsys.readouterr().err
    assert main([*command, "--preset", "sre3l"]) == 2
    assert "no preset is called 'sre3l'; choose one of soufleri" in capsys.readouterr().err
