"""Ranks that share a batch have the loss, the gradient and the images that one rank has of the whole: 1, 2 and 4 over gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import virtual_cases as cases
from team_ranks import COUNTS, MICRO_BATCHES, SIZES

from bnfuse.ensemble import TEACHER_PLANS

RANKS = Path(__file__).with_name("team_ranks.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found: size → rank → results."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run([sys.executable, RANKS, folder], env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    return {s: [torch.load(folder / f"{s}_{r}.pt", weights_only=True) for r in range(s)] for s in SIZES}


def test_rows_are_dealt_in_order_and_evenly(ranks):
    for size, found in ranks.items():
        for i, count in enumerate((0, 1, 3, 8, 11)):
            spans = [rank["rows"][i] for rank in found]
            assert [row for span in spans for row in range(*span)] == list(range(count))
            lengths = [stop - start for start, stop in spans]
            assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)
        for rank in found:
            assert rank["gathered"].equal(torch.arange(22).view(11, 2))
            assert rank["sum"].tolist() == [size, sum(range(size))]


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_gradients_of_a_team_are_the_big_batchs(ranks, loss):
    fused = cases.network()
    for count in COUNTS:
        total, gradient = cases.big_batch(fused, cases.LOSSES[loss], *cases.batch(count))
        for micro_batch in MICRO_BATCHES:
            for found in (rank for team in ranks.values() for rank in team):
                theirs, actual = found[f"{loss}, {count}, {micro_batch}"]
                assert abs(theirs - total) <= 1e-12 * abs(total) and cases.worst(actual, gradient) <= 1e-10


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_images_of_a_team_are_those_of_one_rank_to_rounding(ranks, micro_batch):
    teacher = cases.teacher(3)
    objective = cases.objective(teacher, tv_weight=0.1, l2_weight=0.1)
    expected, losses = cases.make_unit(objective, teacher)
    for team in ranks.values():
        for found in team:
            images, theirs, *_ = found[f"unit, {micro_batch}"]
            assert images.equal(team[0][f"unit, {micro_batch}"][0]) and theirs == team[0][f"unit, {micro_batch}"][1]
            assert (images - expected).abs().mean() < 1e-4
            assert {name: pytest.approx(value, rel=1e-4) for name, value in theirs.items()} == losses


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_one_all_reduce_a_step_for_the_whole_network(ranks, micro_batch):
    """Σ(x − c) and Σ(x − c)² of two groups and all channels, and three terms; a wish to save goes alone, every 10th, and so
    does, at the end, whether an image is broken."""
    channels = sum(cases.objective(cases.teacher(3)).matcher.channels)
    for size, team in ranks.items():
        for found in team:
            *_, sums = found[f"unit, {micro_batch}"]
            steps = [n for n in sums if n > 1]
            assert steps == ([2 * 2 * channels + 3] * cases.CONFIG.total_iterations if size > 1 else [])
            assert sums.count(1) == 2 * (size > 1)


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_a_team_goes_on_from_its_state_to_the_same_bits(ranks, micro_batch):
    """And a team of another size, here one rank, goes on from it to rounding."""
    teacher = cases.teacher(3)
    objective = cases.objective(teacher, tv_weight=0.1, l2_weight=0.1)
    for team in ranks.values():
        for found in team:
            images, losses, state, _ = found[f"unit, {micro_batch}"]
            resumed, again = found[f"resumed, {micro_batch}"]
            assert resumed.equal(images) and again == losses
            assert all(state[name].equal(team[0][f"unit, {micro_batch}"][2][name]) for name in state)
        alone, _ = cases.make_unit(objective, teacher, state=dict(state))
        assert (alone - images).abs().mean() < 1e-4


def test_what_one_rank_wants_saved_all_save(ranks):
    assert all(found["saved at"] == [10] for team in ranks.values() for found in team)


def test_a_loss_that_is_not_finite_ends_the_unit_on_every_rank(ranks):
    assert all(found["not finite"] == (1, "ce") for team in ranks.values() for found in team)


def test_two_teachers_on_a_team_make_the_images_that_they_make_on_one_rank(ranks):
    teacher = cases.teacher(3)
    for number, plan in enumerate(TEACHER_PLANS):
        expected, losses = cases.make_unit(cases.ensemble(teacher, plan), teacher)
        for team in ranks.values():
            for found in team:
                images, theirs = found["two teachers"][number]
                assert images.equal(team[0]["two teachers"][number][0])
                assert (images - expected).abs().mean() < 1e-4
                assert {name: pytest.approx(value, rel=1e-4) for name, value in theirs.items()} == losses
