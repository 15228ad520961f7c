"""Drop-in hooks on 1, 2 and 4 ranks of unequal batches: their whole batch is that of one process, and its gradient is, too."""

import os
import subprocess
import sys
from pathlib import Path

import compat_ranks as cases
import pytest
import torch

RANKS = Path(__file__).with_name("compat_ranks.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found: size → rank → results."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run([sys.executable, RANKS, folder], env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    return {s: [torch.load(folder / f"{s}_{r}.pt", weights_only=True) for r in range(s)] for s in cases.SHARES}


@pytest.mark.parametrize("kind", cases.HOOKS)
def test_r_feature_and_gradient_of_ranks_are_those_of_one_process(ranks, kind):
    expected = cases.measured(kind, None, slice(None))
    assert any(r > 0 for r, _ in expected)
    for found in ranks.values():
        for step, (r, gradient) in enumerate(expected):
            values = [rank[kind][step][0] for rank in found]
            assert all(value.equal(values[0]) for value in values)  # the same bits on every rank
            torch.testing.assert_close(values[0], r, rtol=1e-10, atol=0)
            rows = torch.cat([rank[kind][step][1] for rank in found])
            assert (rows - gradient).abs().max() <= 1e-10 * gradient.abs().max()


def test_class_wise_hooks_pool_each_class_over_the_ranks(ranks):
    expected = cases.classes(None, 4)
    for size in (1, 2):
        for rank in ranks[size]:
            torch.testing.assert_close(rank["classes"], expected, rtol=1e-10, atol=0)


def test_under_distributed_data_parallel(ranks):
    alone = cases.generator_gradient(cases.BNFeatureHook, slice(None), lambda model: model)
    for size in (1, 2):
        for rank in ranks[size]:
            ours, eager = rank["ddp"]
            torch.testing.assert_close(ours, eager, rtol=1e-10, atol=1e-12)
            if size == 1:
                torch.testing.assert_close(ours, alone, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(rank["ddp, whole"], ranks[1][0]["ddp, whole"], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(rank["copied"], ranks[1][0]["copied"], rtol=1e-10, atol=0)
