"""What careless users do: an error says what was given and what to do, before work is lost or anything is overwritten."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnfuse
from bnfuse import InputError, Preprocessing, SynthesisConfig, TrainConfig, load_dataset, load_teacher, statistics
from bnfuse.checkpoints import read_facts, read_weights, save_checkpoint
from bnfuse.cli import main
from bnfuse.models import build_model
from bnfuse.networks import CifarResNet

OWN = """
import torch
from torch import nn
from bnfuse.networks import CifarResNet
def half(): return CifarResNet(8, 10, 1).half()
def double(): return CifarResNet(8, 10, 1).double()
def lazy(): return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(10))
"""


def run(*arguments) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """A teacher of the digits, its statistics, and a small synthetic dataset with labels of views."""
    root = tmp_path_factory.mktemp("flow")
    teacher = root / "teacher" / "model.safetensors"
    assert run("train", "--data", "digits:train", "--model", "resnet8", "--epochs", 1, "--out", root / "teacher") == 0
    assert run("record", "--teacher", teacher, "--data", "digits:train", "--out", root / "s.safetensors") == 0
    made = "--statistics", root / "s.safetensors", "--out", root / "synthetic", "--images-per-class", 1, "--iterations", 1
    assert run("synthesize", "--teacher", teacher, *made) == 0
    assert run("relabel", root / "synthetic", "--teacher", teacher, "--views", 2, "--batch-size", 5) == 0
    return root


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def save_npz(path, labels, **more):
    np.savez(path, images=np.zeros((len(labels), 8, 8), np.uint8), labels=np.array(labels), **more)
    return path


# ---- nothing is overwritten ----


def test_a_recording_takes_the_place_of_no_other_file(flow, tmp_path, capsys):
    teacher = tmp_path / "t.safetensors"
    shutil.copy(flow / "teacher/model.safetensors", teacher)
    private = save_npz(tmp_path / "private.npz", [k for k in range(10) for _ in range(20)])
    for data, out in ((private, private), ("digits:train", teacher)):
        before = out.read_bytes()
        assert run("record", "--teacher", teacher, "--data", data, "--out", out) == 2
        assert f"{out} is there and holds no class statistics" in capsys.readouterr().err and out.read_bytes() == before
    shutil.copy(flow / "s.safetensors", tmp_path / "s.safetensors")
    assert run("record", "--teacher", teacher, "--data", "digits:train", "--out", tmp_path / "s.safetensors") == 0


def test_a_network_of_another_training_is_kept(flow, tmp_path, capsys):
    out = shutil.copytree(flow / "teacher", tmp_path / "teacher")
    before = (out / "model.safetensors").read_bytes()
    again = "train", "--data", "digits:train", "--model", "resnet8", "--out", out
    assert run(*again, "--epochs", 2) == 2
    assert f"{out} holds a network of another training (epochs: 1, now 2)" in capsys.readouterr().err
    assert run(*again, "--epochs", 1, "--limit-per-class", 9) == 2
    assert "images: 1438, now 90" in capsys.readouterr().err and (out / "model.safetensors").read_bytes() == before
    assert run(*again, "--epochs", 1) == 0 and (out / "model.safetensors").read_bytes() == before
    (out / "metrics.json").unlink()
    assert run(*again, "--epochs", 1) == 2 and "no metrics.json that says of what training" in capsys.readouterr().err


def test_a_full_disk_is_told_of_by_a_recording(flow, tmp_path, capsys, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(statistics, "save_file", full)
    out = tmp_path / "out" / "s.safetensors"
    assert run("record", "--teacher", flow / "teacher/model.safetensors", "--data", "digits:train", "--out", out) == 2
    assert "No space left on device (os error 28); free some space" in capsys.readouterr().err and not [*out.parent.iterdir()]


def test_a_recording_that_the_disk_has_no_space_for_does_not_begin(flow, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bnfuse.estimate.free_bytes", lambda _: 1000)
    monkeypatch.setattr("bnfuse.cli.record", lambda *_, **__: pytest.fail("recorded"))
    out = tmp_path / "s.safetensors"
    assert run("record", "--teacher", flow / "teacher/model.safetensors", "--data", "digits:train", "--out", out) == 2
    # resnet8 has 240 channels: mean and squared deviations of ten classes
    assert "statistics take 38.4 kB, but only 1.0 kB are free" in capsys.readouterr().err


def test_training_finds_out_first_that_its_folder_cannot_be_written_to(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("bnfuse.files.tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("bnfuse.training._train_epoch", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(InputError, match="model.safetensors: Read-only file system; choose another place"):
        bnfuse.train(load_dataset("digits:test"), TrainConfig(model="resnet8"), out=tmp_path)


def test_a_dataset_is_not_exported_into_itself(flow, tmp_path, capsys):
    inside = flow / "synthetic" / "images" / "copy"
    assert run("export", flow / "synthetic", inside, "--format", "imagefolder") == 2
    assert "lies in the dataset that is exported" in capsys.readouterr().err and not inside.exists()


@pytest.mark.parametrize("command, begins", [("train", True), ("record", True), ("relabel", False)])
def test_who_interrupts_is_told_whether_the_work_is_kept(command, begins, capsys, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for place in ("bnfuse.cli.load_dataset", "bnfuse.cli_flags.load_dataset", "bnfuse.cli_flags.load_teacher"):
        monkeypatch.setattr(place, interrupted)
    given = {"relabel": [tmp_path, "--teacher", "resnet8"], "train": ["--data", "digits", "--model", "resnet8"]}
    given = given.get(command, ["--data", "digits", "--teacher", "resnet8"])
    assert run(command, *given, *(["--out", tmp_path / "out"] if begins else [])) == 130
    assert ("begins anew" if begins else "goes on with what is not done yet") in capsys.readouterr().err


# ---- images and labels ----


def test_labels_with_gaps_are_refused_and_absurd_ones_take_no_memory(tmp_path):
    with pytest.raises(InputError, match="labels run up to 4, and no image has 1, 3: number the classes from 0 without gaps"):
        load_dataset(save_npz(tmp_path / "gap.npz", [0, 2, 4]))
    assert load_dataset(save_npz(tmp_path / "named.npz", [0, 2], class_names=list("abc"))).num_classes == 3
    with pytest.raises(InputError, match="the largest of 3 labels is 2000000000"):
        load_dataset(save_npz(tmp_path / "huge.npz", [0, 1, 2_000_000_000]))
    content = np.zeros(4, np.uint8)
    np.savez(tmp_path / "split.npz", a_bytes=content, a_offsets=np.arange(5), a_labels=np.array([0, 1, 2, 2_000_000_000]))
    with pytest.raises(InputError, match="the largest of 4 labels is 2000000000"):
        load_dataset(f"{tmp_path / 'split.npz'}:a")


def test_a_folder_one_level_too_high_is_refused(flow, tmp_path, capsys):
    for part in ("train", "val"):
        for name in "ab":
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / "photos" / part / name / "1.png")
    with pytest.raises(InputError, match="photos holds train, val, which are no classes: name the folder .* as .*photos/train"):
        load_dataset(tmp_path / "photos")
    assert load_dataset(tmp_path / "photos" / "val").class_names == ["a", "b"]
    assert run("export", flow / "synthetic", tmp_path / "exported", "--format", "imagefolder") == 0
    with pytest.raises(InputError, match="exported holds train, which are no classes"):
        load_dataset(tmp_path / "exported")
    (tmp_path / "views" / "train").mkdir(parents=True)  # a class of its own, of trains
    Image.new("L", (8, 8)).save(tmp_path / "views" / "train" / "1.png")
    assert load_dataset(tmp_path / "views").class_names == ["train"]


def test_a_lost_manifest_is_made_again(flow, tmp_path, capsys):
    data = shutil.copytree(flow / "synthetic", tmp_path / "d")
    shutil.rmtree(data / "relabel")
    before = (data / "manifest.jsonl").read_bytes()
    (data / "manifest.jsonl").unlink()
    with pytest.raises(InputError, match="was made by bnfuse and has lost its manifest.jsonl"):
        load_dataset(data)
    assert run("verify", data) == 1
    made = "--teacher", flow / "teacher/model.safetensors", "--statistics", flow / "s.safetensors"
    assert run("verify", data, "--repair", *made) == 0 and (data / "manifest.jsonl").read_bytes() == before
    capsys.readouterr()
    assert run("verify", data) == 0 and "every file is as it was written" in capsys.readouterr().out


def test_a_folder_that_is_no_dataset_is_called_that(flow, capsys):
    assert run("relabel", flow / "teacher", "--teacher", flow / "teacher/model.safetensors") == 2
    said = capsys.readouterr().err
    assert "holds no card.json; expected a dataset written by bnfuse" in said and "JSON (" not in said


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda x: (255 * x).to(torch.uint8),
            r"is torch.uint8 \[32, 1, 8, 8\]; expected pixels in \[0, 1\], float \[N, 1, H, W\]",
        ),
        (lambda x: 255 * x, r"pixels from 0 to 255; expected \[0, 1\]"),
        (lambda x: (x - 0.3) / 0.2, r"leave out Normalize"),
        (lambda x: x.expand(-1, 3, -1, -1), r"\[32, 3, 8, 8\]; expected .* \[N, 1, H, W\]"),
    ],
)
def test_a_loader_gives_pixels_as_they_are(flow, change, message):
    teacher, data = load_teacher(flow / "teacher/model.safetensors"), load_dataset("digits:train")
    images, labels = data.batch(range(320))
    with pytest.raises(InputError, match=f"batch 0 of the loader .*{message}"):
        bnfuse.record(teacher, DataLoader(TensorDataset(change(images), labels), 32), 10)


def test_a_class_of_few_images_is_refused_before_the_pass(flow, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bnfuse.cli.record", lambda *_, **__: pytest.fail("recorded"))
    few = save_npz(tmp_path / "few.npz", [k for k in range(10) for _ in range(3 if k == 7 else 20)])
    teacher = flow / "teacher/model.safetensors"
    assert run("record", "--teacher", teacher, "--data", few, "--out", tmp_path / "s.safetensors") == 2
    assert "fewer than 20 images in 1 class(es): 7 (3)" in capsys.readouterr().err


def test_private_and_synthetic_exchanged(flow, tmp_path, capsys):
    given = "audit", "--private", flow / "synthetic", "--synthetic", "digits:train", "--out", tmp_path / "audit"
    assert run(*given) == 2 and "exchange them" in capsys.readouterr().err


@pytest.mark.parametrize("fields", [((127.0,), (60.0,)), ((float("nan"),), (1.0,)), ((-0.1,), (1.0,))])
def test_a_mean_that_is_not_of_pixels_in_0_to_1(fields):
    with pytest.raises(InputError, match=r"mean must be of pixels in \[0, 1\]"):
        Preprocessing((8, 8), *fields)
    with pytest.raises(InputError, match="std must be positive and finite"):
        Preprocessing((8, 8), (0.5,), (float("inf"),))


# ---- labels ----


def test_damaged_labels_of_views_are_found_and_made_again(flow, tmp_path, capsys):
    data = shutil.copytree(flow / "synthetic", tmp_path / "d")
    assert run("verify", data) == 0
    file = data / "relabel" / "0001-00000.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-3] + bytes([before[-3] ^ 1]) + before[-2:])
    for checked in (data, data / "relabel"):
        capsys.readouterr()
        assert run("verify", checked) == 1
        assert f"{file} is not what was written: remove what is left of it" in capsys.readouterr().out
    file.unlink()
    assert run("verify", data) == 1 and "0001-00000.safetensors is missing" in capsys.readouterr().out
    card = (data / "relabel" / "labels.json").read_bytes()
    given = "relabel", data, "--teacher", flow / "teacher/model.safetensors", "--views", 2, "--batch-size", 5
    assert run(*given) == 0 and file.read_bytes() == before
    assert run("verify", data) == 0 and (data / "relabel" / "labels.json").read_bytes() == card
    earlier = {name: value for name, value in json.loads(card).items() if name != "files"}
    (data / "relabel" / "labels.json").write_text(json.dumps(earlier))
    assert run(*given) == 0 and run("verify", data) == 1 and "has no hashes" in capsys.readouterr().out


# ---- networks ----


def test_networks_are_float32_and_know_their_shapes(own, tmp_path, capsys):
    for name, message in {
        "half": "conv1.weight is torch.float16, expected torch.float32: return model.float()",
        "double": "conv1.weight is torch.float64",
        "lazy": "0.weight is lazy, without a shape yet",
    }.items():
        for command in (["record", "--teacher"], ["train", "--epochs", 1, "--model"]):
            size = "--image-size", 8, "--mean", 0.5, "--std", 0.5
            assert run(*command, f"{own}:{name}", *size, "--data", "digits:train", "--out", tmp_path / command[0]) == 2
            assert message in capsys.readouterr().err


def test_a_mistyped_teacher_is_called_unknown(capsys, tmp_path):
    assert run("record", "--teacher", "digits:train", "--data", "x.safetensors", "--out", tmp_path / "s.safetensors") == 2
    said = capsys.readouterr().err
    assert "no model is called 'digits:train'" in said and "--mean" not in said


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(nn.DataParallel(m)), lambda m: nn.DataParallel(torch.compile(m))])
def test_wrappers_are_taken_off_in_any_order(wrap, tmp_path):
    model = CifarResNet(8, 10, 1)
    torch.save(wrap(model).state_dict(), tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt").keys() == model.state_dict().keys()
    loaded = build_model("resnet8", 10, 1, str(tmp_path / "w.pt"))
    assert all(value.equal(model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_damaged_facts_of_a_checkpoint(tmp_path):
    path = tmp_path / "m.safetensors"
    facts = dict(architecture="resnet8", num_classes=1000, class_names=None, metrics={})
    save_checkpoint(path, CifarResNet(8, 1000, 1), preprocessing=Preprocessing((8, 8), (0.5,), (0.5,)), **facts)
    damaged = path.read_bytes().replace(b'\\"num_classes\\": 1000', b'\\"num_classes\\": \\"\\"')
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="the metadata of .* is damaged: ValueError"):
        read_facts(path)


def test_a_judge_without_the_classes_is_told_what_one_needs(flow, tmp_path, capsys):
    out = tmp_path / "other"
    assert (
        run(
            "train",
            "--data",
            save_npz(tmp_path / "three.npz", [0, 1, 2] * 4),
            "--model",
            "resnet8",
            "--epochs",
            1,
            "--out",
            out,
        )
        == 0
    )
    made = "--teacher", flow / "teacher/model.safetensors", "--statistics", flow / "s.safetensors", "--iterations", 1
    judge = "--judge", out / "model.safetensors"
    assert run("synthesize", *made, "--out", tmp_path / "synthetic", *judge) == 2
    said = capsys.readouterr().err
    assert "the judge, resnet8, tells 3 classes apart" in said and "--outputs" not in said
    assert not (tmp_path / "synthetic").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(lr="0.1"), "lr must be a number, got '0.1'"),
        (dict(betas=0.9), "betas must be a tuple of numbers, got 0.9"),
        (dict(betas=("a", 1)), "betas must be a tuple of numbers"),
        (dict(flip="no"), "flip must be True or False, got 'no'"),
        (dict(mean_weight=None), "mean_weight must be a number, got None"),
    ],
)
def test_fields_of_the_wrong_kind(fields, message):
    with pytest.raises(InputError, match=message):
        SynthesisConfig(**fields)
    assert SynthesisConfig(lr=1, tv_weight=np.float32(0.5)).lr == 1
