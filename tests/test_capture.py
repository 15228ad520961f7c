"""What surrounds a captured step: static memory in, static memory out. The capture itself is seen in test_gpu.py."""

import dataclasses

import pytest
import torch
import virtual_cases as cases

from bnfuse import InputError, capture, optimisation, synthesize
from bnfuse.averaging import MovingAverage


class Rerun:
    """Stands for a graph: the same memory at every call, from which and to which the function is run anew."""

    made = 0

    def __init__(self, function, inputs):
        self.function, self.inputs = function, [tensor.detach().clone() for tensor in inputs]
        self.outputs = [tensor.clone() for tensor in function(*self.inputs)]
        Rerun.made += 1

    def __call__(self, *inputs):
        for ours, given in zip(self.inputs, inputs):
            ours.copy_(given.detach())
        for ours, new in zip(self.outputs, self.function(*self.inputs)):
            ours.copy_(new)
        return self.outputs


@pytest.fixture
def rerun(monkeypatch):
    monkeypatch.setattr(capture, "Replayed", Rerun)
    monkeypatch.setattr(optimisation, "check_cuda_graph", lambda *_: None)
    Rerun.made = 0


_PRIORS = {"tv_weight": 0.1, "l2_weight": 0.1}


@pytest.mark.parametrize("priors", [{}, _PRIORS, _PRIORS | {"prior_kind": "norms"}])
def test_a_replayed_unit_is_the_same(rerun, priors):
    """With views, two stages of different size, and loss terms shown that belong to their own step."""
    teacher = cases.teacher()
    objective, config = cases.objective(teacher, **priors), dataclasses.replace(cases.CONFIG, iterations=25)
    shown = [], []
    expected, losses = cases.make_unit(objective, teacher, config, show=lambda step, _, terms: shown[0].append(terms))
    images, replayed = cases.make_unit(
        objective, teacher, config, show=lambda step, _, terms: shown[1].append(terms), cuda_graph=True
    )
    assert Rerun.made == 2  # one for each size
    assert images.equal(expected) and replayed == losses and shown[0] == shown[1] and len(shown[0]) > 2


@pytest.mark.parametrize("plan, graphs", [("together", 1), ("in_turn", 2), ("drawn", 1)])
def test_a_replayed_unit_of_two_teachers_is_the_same(rerun, plan, graphs):
    """With a graph for each choice of teachers and each size, and averages that the calls before a capture do not move."""
    teacher = cases.teacher()
    objective = cases.ensemble(teacher, plan, tv_weight=0.1)
    for member in objective.members:
        member.matcher.moving_average = MovingAverage(0.4, "straight_through", "zero")
    expected, losses = cases.make_unit(objective, teacher)
    images, replayed = cases.make_unit(objective, teacher, cuda_graph=True)
    assert Rerun.made == 2 * graphs
    assert images.equal(expected) and replayed == losses


def test_without_a_gpu_it_is_an_error(tmp_path):
    teacher = cases.teacher()
    with pytest.raises(InputError, match="cuda_graph needs a batch in one piece on a CUDA device, got the device cpu"):
        cases.make_unit(cases.objective(teacher), teacher, cuda_graph=True)
    with pytest.raises(InputError, match="got the device cpu"):
        synthesize(teacher, None, tmp_path / "out", cases.CONFIG, device="cpu", cuda_graph=True, progress=False)
    assert not (tmp_path / "out").exists()


def test_micro_batches_are_an_error():
    with pytest.raises(InputError, match="got micro-batches, offloading or ranks that share a batch"):
        optimisation.check_cuda_graph(torch.device("cuda"), False)
