"""The driver: what it optimises, what it leaves on disk, and that stopping it changes nothing."""

import dataclasses
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision_shim import import_torchvision

from bnfuse import BnfuseError, ClassStatistics, InputError, SynthesisConfig, load_dataset, record, synthesize
from bnfuse.augment import Augmentation
from bnfuse.checkpoints import save_checkpoint
from bnfuse.models import Teacher, freeze, load_teacher
from bnfuse.networks import CifarResNet
from bnfuse.optimisation import Images
from bnfuse.plans import plan
from bnfuse.preprocessing import Preprocessing
from bnfuse.priors import l2, total_variation
from bnfuse.seeds import derive_seed
from bnfuse.store import verify

SMALL = SynthesisConfig(images_per_class=3, batch_size=2, iterations=4, soft_labels=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher that has seen a few digits, and their statistics, as files."""
    root = tmp_path_factory.mktemp("synthesis")
    torch.manual_seed(0)
    data = load_dataset("digits:train")
    images, labels = data.batch(range(600))
    preprocessing = Preprocessing((8, 8), (images.mean().item(),), (images.std().item(),))
    model = CifarResNet(8, 10, 1, width=8)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(80):
        part = torch.randint(0, 600, (64,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(preprocessing.normalize(images[part])), labels[part]).backward()
        optimizer.step()
    teacher = Teacher(freeze(model), "custom", 10, preprocessing, data.class_names)
    torch.save(model.state_dict(), root / "weights.pt")
    (root / "net.py").write_text(
        "import torch\nfrom pathlib import Path\nfrom bnfuse.networks import CifarResNet\n\n\ndef net():\n"
        "    model = CifarResNet(8, 10, 1, width=8)\n"
        "    model.load_state_dict(torch.load(Path(__file__).with_name('weights.pt'), weights_only=True))\n    return model\n"
    )
    record(teacher, [(images, labels)], 10, class_names=data.class_names, dataset="digits").save(root / "s.safetensors")
    return root


@pytest.fixture(scope="module")
def teacher(folder):
    statistics = ClassStatistics.load(folder / "s.safetensors")
    return load_teacher(f"{folder / 'net.py'}:net", preprocessing=statistics.preprocessing)


@pytest.fixture(scope="module")
def statistics(folder):
    return ClassStatistics.load(folder / "s.safetensors")


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_what_lies_on_disk(teacher, statistics, tmp_path):
    result = synthesize(teacher, statistics, tmp_path / "out", SMALL, progress=False)
    assert (result.images, result.made) == (30, 30) and verify(tmp_path / "out") == []
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["config"]["iterations"] == 4 and card["statistics"]["sha256"] == statistics.digest()
    assert card["teacher"]["fingerprint"] == teacher.fingerprint and card["complete"]
    data = load_dataset(str(tmp_path / "out"))
    assert data.class_names == statistics.class_names and torch.bincount(data.labels).tolist() == [3] * 10
    assert data.soft_labels.shape == (30, 10)
    logits = teacher.model(teacher.preprocessing.normalize(data.batch(range(30))[0]))
    torch.testing.assert_close(data.soft_labels, logits, rtol=1e-2, atol=1e-2)  # stored in float16
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.height > 10 * 64 and sheet.width > 3 * 64
    assert synthesize(teacher, statistics, tmp_path / "out", SMALL, progress=False).made == 0


def test_other_loaders_read_it(teacher, statistics, tmp_path):
    synthesize(teacher, statistics, tmp_path / "out", SMALL, progress=False)
    folder = import_torchvision().datasets.ImageFolder(tmp_path / "out" / "images")
    assert [label for _, label in folder.samples] == [k for k in range(10) for _ in range(3)]
    assert folder[0][0].size == (8, 8)


def test_the_same_config_gives_the_same_images(teacher, statistics, tmp_path):
    for name in "ab":
        synthesize(teacher, statistics, tmp_path / name, SMALL, progress=False)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    synthesize(teacher, statistics, tmp_path / "c", dataclasses.replace(SMALL, seed=1), progress=False)
    a, c = (load_dataset(str(tmp_path / name)).batch(range(30))[0] for name in "ac")
    assert (a != c).flatten(1).any(1).all()


def test_another_config_on_the_same_folder_is_refused(teacher, statistics, tmp_path):
    synthesize(teacher, statistics, tmp_path / "out", SMALL, progress=False)
    with pytest.raises(InputError, match="iterations"):
        synthesize(teacher, statistics, tmp_path / "out", dataclasses.replace(SMALL, iterations=5), progress=False)


def test_matching_moves_the_statistics(teacher, statistics, tmp_path):
    config = SynthesisConfig(images_per_class=20, batch_size=20, iterations=60, classes=(3, 8))
    result = synthesize(teacher, statistics, tmp_path / "out", config, progress=False)
    noise = synthesize(
        teacher, statistics, tmp_path / "noise", dataclasses.replace(config, iterations=1, lr=1e-9), progress=False
    )
    assert result.losses["bn"] < 0.25 * noise.losses["bn"]
    data = load_dataset(str(tmp_path / "out"))
    assert data.class_names == ["3", "8"]
    predicted = teacher.model(teacher.preprocessing.normalize(data.batch(range(40))[0])).argmax(1)
    assert predicted.tolist() == [3] * 20 + [8] * 20


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": "global"},
        {"targets": "running"},
        {"classes_per_batch": 2, "batch_size": 7},
        {"class_plan": "balanced", "batch_size": 4},
        {"class_plan": "balanced", "batch_size": 4, "targets": "running"},
        {"distance": "mse"},
        {
            "low_resolution_iterations": 3,
            "jitter": 2,
            "flip": True,
            "crop_scale": 0.5,
            "warmup": 2,
            "tv_weight": 0.1,
            "l2_weight": 0.1,
            "first_site_weight": 10.0,
        },
    ],
)
def test_every_option_runs_to_the_end(teacher, statistics, tmp_path, changes):
    config = dataclasses.replace(SMALL, images_per_class=2, classes=(1, 4, 5), **changes)
    result = synthesize(teacher, statistics, tmp_path / "out", config, progress=False)
    assert result.made == 6 and verify(tmp_path / "out") == []
    expected = {"bn", "ce", "total"} | ({"tv", "l2"} if "tv_weight" in changes else set())
    assert set(result.losses) == expected


def test_running_targets_need_no_statistics(teacher, tmp_path):
    config = dataclasses.replace(SMALL, targets="running", images_per_class=1, classes=(7,))
    assert synthesize(teacher, None, tmp_path / "out", config, progress=False).made == 1
    with pytest.raises(InputError, match="needs class statistics"):
        synthesize(teacher, None, tmp_path / "other", SMALL, progress=False)


def test_outputs_of_a_teacher_that_knows_more_classes(teacher, tmp_path):
    data = load_dataset("digits:train", classes=["7", "2"])
    statistics = record(teacher, [data.batch(range(len(data)))], 2, class_names=["seven", "two"], outputs=[7, 2])
    config = SynthesisConfig(images_per_class=10, batch_size=10, iterations=60, soft_labels=True)
    synthesize(teacher, statistics, tmp_path / "out", config, progress=False)
    made = load_dataset(str(tmp_path / "out"))
    predicted = teacher.model(teacher.preprocessing.normalize(made.batch(range(20))[0])).argmax(1)
    assert predicted.tolist() == [7] * 10 + [2] * 10
    assert made.class_names == ["seven", "two"] and made.soft_labels.shape == (20, 2)


def test_killed_at_random_moments_it_ends_with_the_same_bytes(folder, teacher, statistics, tmp_path):
    """SIGKILLs at random moments of a run, each followed by the same command; `make chaos` has many more."""
    preprocessing = statistics.preprocessing
    config = ["--images-per-class", "4", "--batch-size", "2", "--iterations", "40", "--soft-labels"]
    command = [
        sys.executable,
        "-m",
        "bnfuse",
        "synthesize",
        "--teacher",
        f"{folder / 'net.py'}:net",
        "--image-size",
        "8",
        "--mean",
        str(preprocessing.mean[0]),
        "--std",
        str(preprocessing.std[0]),
        "--statistics",
        str(folder / "s.safetensors"),
        *config,
        "--device",
        "cpu",
    ]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True, env=environment)

    manifest, draw = tmp_path / "killed" / "manifest.jsonl", random.Random(0)

    def committed() -> int:
        return len(manifest.read_bytes().splitlines()) if manifest.exists() else 0

    for images in sorted(draw.sample(range(36), 5)):  # of 40: however fast the machine is, no run comes to its end
        process = subprocess.Popen(
            [*command, "--out", str(tmp_path / "killed")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        while committed() < images and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    subprocess.run([*command, "--out", str(tmp_path / "killed")], check=True, capture_output=True, env=environment)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_diverging_loss_stops_with_its_terms(teacher, statistics, tmp_path):
    config = dataclasses.replace(SMALL, bn_weight=1e38, iterations=20)
    with pytest.raises(BnfuseError, match=r"unit 0, step \d+: the loss is not finite \(.*total = (inf|nan)\)"):
        synthesize(teacher, statistics, tmp_path / "out", config, progress=False)


def test_images_that_break_in_the_last_step_are_not_kept(teacher, statistics, tmp_path, monkeypatch):
    step = Images.adam

    def breaking(self, *arguments):
        step(self, *arguments)
        self.values[1, 0, 2, 3] = float("nan")

    monkeypatch.setattr(Images, "adam", breaking)
    config = dataclasses.replace(SMALL, iterations=1, low_resolution_iterations=0)
    with pytest.raises(BnfuseError, match="unit 0, step 1: images are not finite after the last step; lower lr"):
        synthesize(teacher, statistics, tmp_path / "out", config, progress=False)
    assert not list((tmp_path / "out").rglob("*.png"))


def test_options_that_are_refused_before_the_work(teacher, statistics, tmp_path):
    with pytest.raises(InputError, match="checkpoint_every must be at least 0, got -1"):
        synthesize(teacher, statistics, tmp_path / "out", SMALL, checkpoint_every=-1)
    config = dataclasses.replace(SMALL, site_drop=0.5, drop_sites=("conv",))
    with pytest.raises(InputError, match=r"drop_sites=conv \(--drop-sites\) names none of the sites that are matched"):
        synthesize(teacher, statistics, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"images_per_class": 0}, "images_per_class must be an integer of at least 1, got 0"),
        ({"images_per_class": 2.5}, "images_per_class must be an integer of at least 1, got 2.5"),
        ({"batch_size": "100"}, "batch_size must be an integer of at least 1, got '100'"),
        ({"classes_per_batch": True}, "classes_per_batch must be an integer of at least 1, got True"),
        ({"iterations": 1e3}, "iterations must be an integer of at least 1, got 1000.0"),
        ({"low_resolution_iterations": 0.5}, "low_resolution_iterations must be an integer of at least 0, got 0.5"),
        ({"betas": (1.0, 0.9)}, r"betas must be two numbers from 0 to below 1, got \(1.0, 0.9\)"),
        ({"betas": (0.5, -0.1)}, "betas must be two numbers from 0 to below 1"),
        ({"betas": (0.5,)}, "betas must be two numbers from 0 to below 1"),
        ({"drop_sites": ("bn",)}, r"needs a site_drop \(--site-drop\) above 0"),
        ({"warmup": float("nan")}, "warmup must be an integer of at least 0, got nan"),
        ({"seed": 1.0}, "seed must be an integer of at least 0, got 1.0"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"tv_weight": -1.0}, "tv_weight must be at least 0"),
        ({"targets": "mean"}, "targets must be one of class, global, running"),
        ({"distance": "cosine"}, "distance must be one"),
        ({"batch_size": 2, "classes_per_batch": 3}, "3 classes do not fit a batch of 2"),
        ({"class_plan": "random"}, "class_plan must be one of grouped, balanced"),
        ({"class_plan": "balanced", "classes_per_batch": 2}, "a balanced batch has every class"),
        ({"crop_scale": 0.0}, "crop_scale in"),
        ({"jitter": -1}, "jitter must be an integer of at least 0, got -1"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(InputError, match=message):
        SynthesisConfig(**fields)


def test_statistics_of_another_teacher_and_unknown_classes_are_refused(statistics, teacher, tmp_path):
    other = dataclasses.replace(teacher, model=freeze(CifarResNet(8, 10, 1, width=8)))
    with pytest.raises(InputError, match="teacher is"):
        synthesize(other, statistics, tmp_path / "out", SMALL, progress=False)
    with pytest.raises(InputError, match="different numbers from 0 to 9, got"):
        synthesize(teacher, statistics, tmp_path / "out", dataclasses.replace(SMALL, classes=(10,)), progress=False)
    assert not (tmp_path / "out").exists()


def test_grey_images_have_no_colours_to_scale(statistics, teacher, tmp_path):
    with pytest.raises(InputError, match=r"chroma_scale=0.5 is for images of several channels, these have one: make it 1"):
        synthesize(teacher, statistics, tmp_path / "out", dataclasses.replace(SMALL, chroma_scale=0.5), progress=False)
    assert not (tmp_path / "out").exists()


@settings(max_examples=100)
@given(
    images=st.integers(1, 12),
    classes=st.integers(1, 9),
    batch_size=st.integers(1, 20),
    together=st.integers(0, 5),  # 0 is balanced
)
def test_a_plan_deals_every_image_once(images, classes, batch_size, together):
    plans = {"class_plan": "balanced"} if not together else {"classes_per_batch": min(together, batch_size)}
    config = SynthesisConfig(images_per_class=images, batch_size=batch_size, **plans)
    numbers = [10 * k + 3 for k in range(classes)]  # a dataset's class numbers may be any
    units = plan(config, numbers)
    pairs = [pair for unit in units for pair in zip(unit.classes, unit.indices)]
    assert sorted(pairs) == [(k, i) for k in numbers for i in range(images)]
    assert [unit.number for unit in units] == list(range(len(units))) and units == plan(config, numbers)
    for unit in units:
        assert len(unit.indices) == len(unit.classes) <= batch_size
        runs = [k for k, _ in itertools.groupby(unit.classes)]
        assert len(runs) == len(set(runs))
        counts = [unit.classes.count(k) for k in runs]
        if together:
            assert len(runs) <= together and len(set(counts)) == 1
        else:
            counts += [0] * (classes - len(runs))
            assert max(counts) - min(counts) <= 1
    if not together:
        sizes = [len(unit.classes) for unit in units]
        assert max(sizes) - min(sizes) <= 1 and len(units) == -(-images * classes // batch_size)


def test_plans_by_example():
    def classes_of(**fields):
        return [unit.classes for unit in plan(SynthesisConfig(**fields), range(4))]

    assert classes_of(images_per_class=3, batch_size=2) == [(k,) * n for k in range(4) for n in (2, 1)]
    assert classes_of(images_per_class=2, batch_size=5, classes_per_batch=2) == [(0, 0, 1, 1), (2, 2, 3, 3)]
    assert classes_of(images_per_class=2, batch_size=4, class_plan="balanced") == [(0, 1, 2, 3)] * 2
    assert classes_of(images_per_class=3, batch_size=6, class_plan="balanced") == [(0, 0, 1, 1, 2, 3), (0, 1, 2, 2, 3, 3)]
    hundred = plan(SynthesisConfig(images_per_class=10, batch_size=100, class_plan="balanced"), range(1000))
    assert all(len(set(unit.classes)) == 100 for unit in hundred) and len(hundred) == 100


def test_seeds_are_stable_and_apart():
    assert derive_seed(0, 3, 17) == 5833085195678034086  # a stored dataset is made again from these
    assert len({derive_seed(s, k, i) for s in range(3) for k in range(12) for i in range(12)}) == 3 * 12 * 12


def test_views():
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).reshape(2, 3, 8, 8)
    same = Augmentation().draw(images, torch.Generator())
    assert same(images).equal(images)
    augmentation = Augmentation(jitter=3, flip=True)
    for seed in range(20):
        view = augmentation.draw(images, torch.Generator().manual_seed(seed))
        shown = view(images)
        assert all(abs(s) <= 3 for s in view.shift) and shown.equal(view(images))
        for image, original, flipped in zip(shown, images, view.flip):
            undone = image.roll([-s for s in view.shift], (1, 2))
            assert undone.equal(original.flip(2) if flipped else original)
    crop = Augmentation(crop_scale=0.25)
    for seed in range(50):
        top, left, height, width = crop.draw(images, torch.Generator().manual_seed(seed)).crop
        assert 0 <= top <= 8 - height and 0 <= left <= 8 - width and height * width >= 8 * 8 * 0.25 * 0.7
    flat = torch.full((1, 1, 8, 8), 2.0)
    torch.testing.assert_close(crop.draw(flat, torch.Generator())(flat), flat)


def test_priors():
    ramp = torch.arange(4.0).expand(2, 3, 5, 4)
    assert total_variation(ramp).item() == 1 and total_variation(torch.ones(1, 1, 3, 3)).item() == 0
    assert l2(2 * torch.ones(2, 1, 3, 3)).item() == 4


def test_checkpoint_teacher_needs_no_flags(tmp_path, teacher):
    save_checkpoint(
        tmp_path / "t.safetensors",
        CifarResNet(8, 10, 1),
        architecture="resnet8",
        num_classes=10,
        preprocessing=teacher.preprocessing,
    )
    assert load_teacher(tmp_path / "t.safetensors").preprocessing == teacher.preprocessing
