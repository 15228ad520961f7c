"""Every measure of the audit on a GPU, at the quick budget on few digits: it ends with figures of every arm, and the teacher's
network has stayed where it was put. What the measures find is tested on the CPU."""

import math
from importlib.util import find_spec

import pytest
import torch
from torch.utils.data import DataLoader

import bnfuse
from bnfuse import Teacher
from bnfuse.audit import ARMS, MEASURES
from bnfuse.datasets import load_dataset
from bnfuse.models import build_model, freeze
from bnfuse.preprocessing import Preprocessing

DEVICE = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
    pytest.mark.skipif(find_spec("torchmetrics") is None, reason="the audit's measures need bnfuse[audit]"),
]


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_runs_there(name, tmp_path):
    private, heldout = load_dataset("digits:train").first_per_class(40), load_dataset("digits:test").first_per_class(20)
    teacher = Teacher(freeze(build_model("resnet8", 10, 1)), "resnet8", 10, Preprocessing((8, 8), (0.5,), (0.25,)))
    teacher.model.to(DEVICE)
    statistics = bnfuse.record(teacher, DataLoader(private, batch_size=50), 10)
    known = {"teacher": teacher, "statistics": statistics}
    result = bnfuse.audit(
        private, heldout, heldout.first_per_class(15), tmp_path, **known, measures=[name], device=DEVICE, progress=False
    )
    finding = next(finding for finding in result.findings if finding.measure == name)
    assert finding.verdict != "not run", finding.sentence
    assert all(not math.isnan(finding.row(arm).figures[0].value) for arm in ARMS)
    assert {parameter.device.type for parameter in teacher.model.parameters()} == {torch.device(DEVICE).type}
