"""The demo from end to end, with so few steps that only its shape is tested, not its accuracy."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from bnfuse import demo, load_dataset
from bnfuse.store import verify


@pytest.fixture
def short(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(demo, "TEACHER", dataclasses.replace(demo.TEACHER, model="resnet8", epochs=4))
    monkeypatch.setattr(demo, "STUDENT", dataclasses.replace(demo.STUDENT, model="resnet8", epochs=1))
    monkeypatch.setattr(demo, "SYNTHESIS", dataclasses.replace(demo.SYNTHESIS, images_per_class=10, iterations=3))
    yield
    torch.set_num_threads(threads)


def test_it_leaves_what_it_promises_twice_in_a_row(short, tmp_path, capsys):
    for _ in range(2):
        summary = demo.run_demo(tmp_path / "demo")
        written = json.loads((tmp_path / "demo" / "summary.json").read_text())
        assert written == summary
        accuracies = [f"{who}_accuracy" for who in ("teacher", "real_student", "synthetic_student", "noise_student")]
        assert set(written) >= {*accuracies, "images", "seconds"} and written["images"] == 100
        assert all(0 <= written[name] <= 1 for name in accuracies)
        with Image.open(tmp_path / "demo" / "contact_sheet.png") as picture:
            assert picture.width > picture.height > 600
        assert verify(tmp_path / "demo" / "synthetic") == []
        assert "Accuracy on 359 real digits" in capsys.readouterr().out


def test_the_control_is_noise_with_the_same_labels():
    data = load_dataset("digits:test")
    noise = demo.noise_like(data, seed=3)
    assert noise.labels.equal(data.labels) and noise.images.shape == (len(data), 8, 8, 1)
    assert 120 < noise.images.float().mean() < 135 and noise.images.equal(demo.noise_like(data, seed=3).images)
