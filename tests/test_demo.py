"""The demo from end to end, with so few steps, and an audit so small, that only its shape is tested, not its figures."""

import dataclasses
import json
from pathlib import Path
from urllib.parse import unquote, urlparse

import audit_measures
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
    monkeypatch.setattr(demo, "VIEWS", dataclasses.replace(demo.VIEWS, views=2))
    monkeypatch.setattr(demo, "SYNTHESIS", dataclasses.replace(demo.SYNTHESIS, images_per_class=10, iterations=3))
    measure = audit_measures.module(
        "tiny", lambda context, config: audit_measures.finding(context, "tiny"), needs={"statistics"}
    )
    audit_measures.replace_measures(monkeypatch, {"tiny": measure})
    yield
    torch.set_num_threads(threads)


def test_it_leaves_what_it_promises_twice_in_a_row(short, tmp_path, capsys):
    for _ in range(2):
        summary = demo.run_demo(tmp_path / "demo")
        written = json.loads((tmp_path / "demo" / "summary.json").read_text())
        assert written == summary
        students = ("real_student", "synthetic_student", "synthetic_hard_student", "noise_student", "noise_hard_student")
        accuracies = [f"{who}_accuracy" for who in ("teacher", *students)]
        assert set(written) >= {*accuracies, "images", "seconds"} and written["images"] == 100
        assert all(0 <= written[name] <= 1 for name in accuracies)
        with Image.open(tmp_path / "demo" / "contact_sheet.png") as picture:
            assert picture.width > picture.height > 600
        assert verify(tmp_path / "demo" / "synthetic") == []
        printed = capsys.readouterr().out
        assert "Accuracy on 359 real digits" in printed
        assert written["audit"] == {"tiny": "no leak seen"} and written["audit_seconds"] < written["seconds"]
        link = printed.strip().splitlines()[-1]
        assert link.startswith("read it: file:///") and link.endswith("/audit/audit.html")
        page = Path(unquote(urlparse(link.removeprefix("read it: ")).path)).read_text()
        assert f"--teacher {tmp_path}/demo/teacher/model.safetensors" in page and "--only tiny" in page


def test_the_control_is_noise_with_the_same_labels():
    data = load_dataset("digits:test")
    noise = demo.noise_like(data, seed=3)
    assert noise.labels.equal(data.labels) and noise.images.shape == (len(data), 8, 8, 1)
    assert 120 < noise.images.float().mean() < 135 and noise.images.equal(demo.noise_like(data, seed=3).images)
