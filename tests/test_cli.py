"""The command line as a user meets it: the whole flow in files, help that helps, errors without tracebacks."""

import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from bnfuse import BackendError, __version__, backends
from bnfuse.cli import main

TRAIN = ["--epochs", "6", "--batch-size", "64", "--model", "resnet8"]


def run(*arguments) -> int:
    return main([str(a) for a in arguments])


def test_the_whole_flow(tmp_path, capsys):
    teacher, statistics, out = tmp_path / "teacher", tmp_path / "s.safetensors", tmp_path / "synthetic"
    assert run("train", "--data", "digits:train", "--test", "digits:test", "--out", teacher, *TRAIN) == 0
    assert float(re.search(r"accuracy on digits:test: ([\d.]+)%", capsys.readouterr().out)[1]) > 80
    assert run("record", "--teacher", teacher / "model.safetensors", "--data", "digits:train", "--out", statistics) == 0
    assert "10 classes at 7 BatchNorm layers" in capsys.readouterr().out
    assert (
        run(
            "synthesize",
            "--teacher",
            teacher / "model.safetensors",
            "--statistics",
            statistics,
            "--out",
            out,
            "--images-per-class",
            4,
            "--batch-size",
            4,
            "--iterations",
            5,
            "--soft-labels",
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "40 images, 40 made now" in text and re.search(r"the teacher takes [\d.]+% of them", text)
    student = "train", "--data", out, "--test", "digits:test", "--out", tmp_path / "student", *TRAIN
    assert run(*student) == run(*student) == 0  # the same training once more
    assert run(*student, "--soft-labels") == 2 and "labels: 'hard', now 'soft'" in capsys.readouterr().err
    assert run(*student, "--soft-labels", "--out", tmp_path / "soft") == 0
    metrics = json.loads((tmp_path / "student" / "metrics.json").read_text())
    assert 0 <= metrics["accuracy"] <= 1
    assert run("train", "--data", "digits:train", "--limit-per-class", 5, "--out", tmp_path / "few", *TRAIN) == 0
    assert "on 50 images" in capsys.readouterr().out


def test_a_private_image_folder(tmp_path, capsys):
    torch.manual_seed(0)
    for k, name in enumerate(("cats", "dogs & more")):
        (tmp_path / "private" / name).mkdir(parents=True)
        for i in range(25):
            pixels = (torch.rand(12, 14, 3) * 100 + 100 * k).to(torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "private" / name / f"{i}.png")
    teacher = tmp_path / "t"
    assert (
        run(
            "train",
            "--data",
            tmp_path / "private",
            "--image-size",
            12,
            "--out",
            teacher,
            "--epochs",
            2,
            "--model",
            "resnet8",
        )
        == 0
    )
    arguments = [
        "--teacher",
        teacher / "model.safetensors",
        "--data",
        tmp_path / "private",
        "--out",
        tmp_path / "s.safetensors",
    ]
    assert run("record", *arguments) == 0
    (tmp_path / "private" / "cats" / "7.png").write_bytes(b"not an image")
    assert run("record", *arguments) == 2
    assert "7.png" in capsys.readouterr().err
    (tmp_path / "private" / "cats" / "7.png").unlink()
    assert run("record", *arguments, "--minimum-images", 25) == 2
    assert "fewer than 25 images in 1 class(es): cats (24)" in capsys.readouterr().err
    assert run("record", *arguments, "--minimum-images", 25, "--allow-few-images") == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            [
                "record",
                "--teacher",
                "resnet21",
                "--data",
                "digits",
                "--out",
                "x",
                "--image-size",
                "8",
                "--mean",
                "0",
                "--std",
                "1",
            ],
            "resnet21",
        ),
        (["record", "--teacher", "resnet20", "--data", "digits", "--out", "x"], "--image-size --mean --std"),
        (
            ["record", "--teacher", "resnet20", "--data", "digits", "--out", "x", "--mean", "0"],
            "--image-size, --std is missing",
        ),
        (["train", "--data", "nowhere", "--out", "x"], "nowhere"),
        (["train", "--data", "digits", "--out", "x", "--epochs", "0"], "epochs"),
        (["train", "--data", "digits", "--out", "x", "--device", "gpu"], "--device gpu cannot be used"),
        (["synthesize", "--teacher", "missing.safetensors", "--out", "x"], "missing.safetensors"),
    ],
)
def test_errors_are_one_message(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "bnfuse: error: " in error and "Traceback" not in error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ("train", "record", "synthesize", "verify", "relabel", "export", "demo", "doctor"))
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert len(text) > 100 and (command != "synthesize" or "--images-per-class" in text and "--tv-weight" in text)


def test_doctor(capsys):
    assert run("doctor") == 0
    text = capsys.readouterr().out
    assert __version__ in text and torch.__version__ in text and "threads" in text
    for backend in backends.describe():
        assert backend.name in text and backend.reason in text


def test_doctor_says_what_is_installed_and_cannot_be_imported(monkeypatch, tmp_path, capsys):
    for name, raised in (("torchvision", "RuntimeError('no such operator\\nand more')"), ("timm", "OSError()")):
        (tmp_path / f"{name}.py").write_text(f"raise {raised}")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.8.7")
    assert run("doctor") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "9.8.7" in line}
    assert lines["torchvision"].endswith(" 9.8.7, which cannot be imported beside this torch: no such operator")
    assert lines["timm"].endswith(" 9.8.7, which cannot be imported beside this torch: OSError")
    assert lines["numpy"].endswith(" 9.8.7")


def test_backend_by_environment(monkeypatch):
    assert backends.resolve("auto", "cpu") == "cpp"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert backends.resolve("auto", "cpu") == "reference" and backends.resolve("cpp", "cpu") == "cpp"


def test_missing_extension_is_an_error_by_name_and_a_note_by_auto(monkeypatch):
    backends._resolve.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(backends, "extension", None)
            patch.setattr(backends, "_extension_error", ImportError("no _C"))
            with pytest.raises(BackendError, match="'cpp' was asked for and is not available: .*no _C.*pip install"):
                backends.resolve("cpp", "cpu")
            with pytest.warns(UserWarning, match="slow reference backend"):
                assert backends.resolve("auto", "cpu") == "reference"
    finally:
        backends._resolve.cache_clear()


def test_a_backend_on_a_device_it_does_not_serve():
    with pytest.raises(BackendError, match="runs on cpu"):
        backends.resolve("cpp", "cuda")


def test_a_disk_that_refuses_is_one_message(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("train", "--data", "digits:test", "--out", tmp_path / "file" / "x", *TRAIN) == 2
    assert "bnfuse: error: " in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error():
    listing = subprocess.Popen(
        [sys.executable, "-m", "bnfuse", "synthesize", "--list-presets"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    listing.stdout.close()
    _, said = listing.communicate()
    assert listing.returncode == 141 and said == b""
