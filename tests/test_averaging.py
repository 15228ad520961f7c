"""Moving averages of moments against their recurrence, written out."""

import itertools

import pytest
import torch

from bnfuse import InputError
from bnfuse.averaging import GRADIENTS, STARTS, MovingAverage

M = 0.4


def batches(count: int = 4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, 5, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("gradient, start", list(itertools.product(GRADIENTS, STARTS)))
def test_values_and_gradients(gradient, start):
    average = MovingAverage(M, gradient, start)
    old = torch.zeros(2, 2, 5, dtype=torch.float64)
    for i, batch in enumerate(batches()):
        share = 1.0 if start == "first" and i == 0 else 1 - M
        expected = share * batch.detach() + (1 - share) * old
        value = torch.stack(average(*batch.unbind()))
        torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-14)
        (slope,) = torch.autograd.grad(value.square().sum(), batch)
        weight = 1.0 if gradient == "straight_through" else share
        torch.testing.assert_close(slope, 2 * weight * expected, rtol=1e-13, atol=1e-14)
        old = expected
    torch.testing.assert_close(torch.stack([average.mean, average.var]), old, rtol=1e-14, atol=1e-14)


def test_it_is_looked_at_without_being_moved():
    average, (first, second, *_) = MovingAverage(M), batches()
    average(*first.unbind())
    kept = average.mean.clone()
    looked = average(*second.unbind(), update=False)
    assert average.mean.equal(kept)
    assert all(a.equal(b) for a, b in zip(looked, average(*second.unbind())))


@pytest.mark.parametrize("start", STARTS)
def test_it_goes_on_from_its_state_dict(start):
    average, moments = MovingAverage(M, start=start), batches()
    for batch in moments:
        average(*batch.unbind())
    state = {name: value.clone() for name, value in average.state_dict().items()}
    expected = average(*moments[0].unbind())
    other = MovingAverage(M, start=start).double()
    for part in (other, average):
        part.load_state_dict(state)
        assert all(a.equal(b) for a, b in zip(part(*moments[0].unbind()), expected))


@pytest.mark.parametrize("start", STARTS)
def test_it_is_put_back_in_place(start):
    """What happened since `state` leaves no trace, also where nothing had happened before."""
    average, moments = MovingAverage(M, start=start), batches()
    blank, first = average.state(), average(*moments[0].unbind())
    memory = average.mean.data_ptr()
    average.restore(blank)
    assert average.mean.data_ptr() == memory and not average.begun
    assert all(a.equal(b) for a, b in zip(average(*moments[0].unbind()), first))
    kept, second = average.state(), average(*moments[1].unbind())
    average.restore(kept)
    assert average.mean.data_ptr() == memory
    assert all(a.equal(b) for a, b in zip(average(*moments[1].unbind()), second))
    other = MovingAverage(M, start=start)
    other.restore(kept)
    assert all(a.equal(b) for a, b in zip(other(*moments[1].unbind()), second))


def test_a_look_does_not_fix_the_groups():
    average, rows = MovingAverage(0.5, start="first"), torch.rand(2, 3)
    assert average(rows, rows, update=False)[0].equal(rows) and not average.mean.numel()
    one = torch.rand(1, 3)
    assert average(one, one)[0].equal(one) and average.mean.equal(one)


def test_one_begun_in_inference_mode_goes_on_outside_of_it():
    average, rows = MovingAverage(0.5), torch.rand(2, 3)
    with torch.inference_mode():
        average(rows, rows)
    average(rows, rows)
    assert average.mean.isfinite().all()


def test_groups_must_stay_until_it_begins_anew():
    average = MovingAverage(M)
    average(torch.ones(2, 3), torch.ones(2, 3))
    for other in (torch.ones(1, 3), torch.ones(2, 3).double()):
        with pytest.raises(InputError, match=r"torch.float32 moments \[2, 3\] was given"):
            average(other, other)
    average.reset()
    assert average(torch.ones(1, 3), torch.ones(1, 3))[0].equal(torch.full((1, 3), 1 - M))


def test_arguments_out_of_range():
    for arguments, message in (
        ((1.0,), "from 0 up to but not 1, got 1.0"),
        ((0.5, "full"), "one of scaled, straight_through"),
        ((0.5, "scaled", "one"), "one of zero, first"),
    ):
        with pytest.raises(InputError, match=message):
            MovingAverage(*arguments)
