"""What scores of members and non-members amount to: rates with intervals, AUC, ε; and what an attack's parts promise."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom
from sklearn.metrics import roc_auc_score

from bnfuse.audit.canaries import epsilon_lower_bound, guess
from bnfuse.audit.scores import Scores, roc_plot
from bnfuse.audit.shadows import halves, offline


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(seed, count, mean=0.0):
    return torch.randn(count, generator=rng(seed)).double() + mean


# ---- rates and AUC ----


def test_the_rate_is_that_of_the_threshold_which_so_many_others_pass():
    scores = Scores(torch.arange(0.5, 200.5), torch.arange(0.0, 200.0))
    rate = scores.tpr(0.01)  # two of the others may pass: 199 and 198; so may members above 197, which are three
    assert rate.value == 3 / 200
    assert rate.low == pytest.approx(beta.ppf(0.025, 3, 198)) and rate.high == pytest.approx(beta.ppf(0.975, 4, 197))
    assert rate.chance == pytest.approx(beta.ppf(0.975, 3, 198))  # of 2 in 200
    assert not rate.above_chance and Scores(torch.full((50,), 300.0), scores.others).tpr(0.01).above_chance


def test_members_that_tie_with_the_threshold_are_not_caught():
    assert Scores(torch.ones(50), torch.ones(100)).tpr(0.01).value == 0


@pytest.mark.parametrize(
    ("others", "told"), [(99, [False, False]), (100, [True, False]), (999, [True, False]), (1000, [True, True])]
)
def test_a_rate_that_so_few_others_cannot_tell_is_undefined_and_said_to_be(others, told):
    scores = Scores(normal(0, 40), normal(1, others))
    assert [scores.tpr(fpr) is not None for fpr in (0.01, 0.001)] == told
    assert [not math.isnan(figure.value) for figure in scores.figures(rng())] == [*told, True]
    text = scores.unresolved() or ""
    assert [f"{100 * fpr:g} % FPR (needs {round(1 / fpr):,})" not in text for fpr in (0.01, 0.001)] == told
    assert (text == "") == all(told)


def test_the_chance_of_passing_by_luck_is_as_stated():
    passed = [Scores(normal(2 * i, 100), normal(2 * i + 1, 200)).tpr(0.01).above_chance for i in range(100)]
    assert sum(passed) <= 1


@pytest.mark.parametrize("digits", [0, 6], ids=["ties", "no ties"])
def test_auc_is_scikit_learns(digits):
    members, others = normal(0, 70, 0.5).round(decimals=digits), normal(1, 130).round(decimals=digits)
    truth = np.r_[np.ones(70), np.zeros(130)]
    assert Scores(members, others).auc() == pytest.approx(roc_auc_score(truth, torch.cat([members, others])), abs=1e-12)


def test_the_interval_of_the_auc_covers_the_truth_as_often_as_it_says():
    truth = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(0.7 / math.sqrt(2))).item()
    inside = []
    for i in range(120):
        low, high = Scores(normal(2 * i, 80, 0.7), normal(2 * i + 1, 120)).auc_interval(rng(i), resamples=300)
        inside.append(low <= truth <= high)
    assert 0.89 <= sum(inside) / len(inside) <= 0.99


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="members must be numbers"):
        Scores(torch.tensor([math.nan]), torch.ones(3))
    with pytest.raises(ValueError, match="others must be numbers"):
        Scores(torch.ones(3), torch.ones(0))


def test_the_roc_is_drawn_on_logarithmic_axes():
    plot = roc_plot(
        {"one": {"original": Scores(normal(0, 50, 1), normal(1, 50))}, "two": {"control": Scores(normal(2, 9), normal(3, 9))}}
    )
    for axes in plot.axes:
        assert axes.get_xscale() == axes.get_yscale() == "log" and axes.get_xlim()[0] > 0
    assert [axes.get_title() for axes in plot.axes] == ["one", "two"]


# ---- canaries ----


@pytest.mark.parametrize(("right", "guesses"), [(10, 10), (90, 100), (60, 100), (700, 1000)])
def test_epsilon_is_the_largest_that_the_guesses_rule_out(right, guesses):
    epsilon = epsilon_lower_bound(right, guesses)
    assert binom.sf(right - 1, guesses, 1 / (1 + math.exp(-epsilon))) == pytest.approx(0.05, abs=1e-9)


def test_epsilon_of_known_cases():
    assert epsilon_lower_bound(100, 100) == pytest.approx(3.4936, abs=1e-3)  # all right: share 0.05^(1/100) = 0.97049
    assert epsilon_lower_bound(1, 1) == 0  # the share is 0.05, its logit negative
    assert epsilon_lower_bound(50, 100) == epsilon_lower_bound(58, 100) == epsilon_lower_bound(0, 100) == 0
    assert 0 < epsilon_lower_bound(59, 100) < 0.05  # P[Binomial(100, 1/2) ≥ 59] = 0.044 is the first below 0.05
    with pytest.raises(ValueError, match="11 right guesses of 10"):
        epsilon_lower_bound(11, 10)


def test_a_mechanism_that_is_private_is_not_convicted():
    """Randomised response of ε = 1 on each coin: the bound is above 1 at most once in twenty."""
    above = 0
    for i in range(400):
        included = torch.rand(80, generator=rng(i)) < 0.5
        honest = torch.rand(80, generator=rng(i + 1000)) < math.e / (1 + math.e)
        answers = torch.where(honest, included, ~included)
        above += guess(answers.double(), included).epsilon > 1
    assert above <= 30  # 20 are expected at most; three standard deviations


def test_guesses_are_the_extreme_quarters_and_the_worst_canary_is_an_included_one():
    scores = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]).double()
    included = torch.tensor([False, True, True, False, True, False, True, False])
    told = guess(scores, included)
    assert (told.right, told.made, told.worst) == (2, 4, 1)  # 8 is wrong, 7 right; 2 wrong, 1 right
    left_out = scores[~included]
    assert told.exposure == pytest.approx(float((7 - left_out.mean()) / left_out.std()))


# ---- shadows ----


def test_every_image_is_in_half_of_the_shadows_and_every_class_is_shared_out():
    labels = torch.arange(37) % 4
    inside = halves(labels, 6, rng())
    assert inside.sum(0).tolist() == [3] * 37
    for shadow in inside:
        assert ((torch.bincount(labels[shadow], minlength=4) - torch.bincount(labels) / 2).abs() <= 0.5).all()
    assert len({tuple(row.tolist()) for row in inside}) == 6
    for wrong in (2, 5):
        with pytest.raises(ValueError, match=f"got {wrong} shadows"):
            halves(labels, wrong, rng())


def test_what_images_have_of_their_own_is_taken_off_and_membership_is_left():
    """Difficulty differs far more between images than membership shifts a confidence: only a comparison tells."""
    labels = torch.arange(400) % 4
    inside = halves(labels, 8, rng())
    difficulty = 5 * normal(1, 400)
    confidences = difficulty + 1.5 * inside + torch.stack([normal(10 + i, 400, 0.0) for i in range(8)]) * 0.5
    plain = Scores(confidences[inside], confidences[~inside])
    attacks = offline(confidences, inside)
    assert plain.auc() < 0.62 and attacks["LiRA"].auc() > 0.95 and attacks["RMIA"].auc() > 0.8
    assert len(attacks["LiRA"].members) == len(attacks["LiRA"].others) == 8 * 200


@pytest.mark.parametrize("shadows", [4, 8])
def test_where_nothing_leaks_shadows_find_nothing(shadows):
    inside = halves(torch.arange(2000) % 4, shadows, rng())
    confidences = 3 * normal(1, 2000) + torch.stack([normal(10 + i, 2000) for i in range(shadows)])
    for scores in offline(confidences, inside).values():
        assert abs(scores.auc() - 0.5) < 0.02
        assert scores.tpr(0.01).low < 0.01 < scores.tpr(0.01).high
