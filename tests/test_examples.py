"""The examples: each of them twice, the same but for one import, short, and with the same losses."""

import importlib
import sys
from difflib import unified_diff
from pathlib import Path

import pytest
import torch

from bnfuse import freeze
from bnfuse.networks import CifarResNet

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))

SCRIPTS = {"recover_sre2l": ("recover", "BNFeatureHook"), "invert_deepinversion": ("invert", "DeepInversionFeatureHook")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_versions_differ_by_one_import(script):
    eager, fused = ((EXAMPLES / f"{name}.py").read_text().splitlines() for name in (script, f"{script}_bnfuse"))
    changes = [line for line in unified_diff(eager, fused, n=0, lineterm="") if line[0] in "+-"][2:]
    hook = SCRIPTS[script][1]
    assert changes == [f"-from eager_hooks import {hook}", f"+from bnfuse.compat import {hook}"]
    assert len(eager) < 80


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def runs(script: str, **options):
    torch.manual_seed(1)
    teacher = freeze(CifarResNet(8, width=8))
    for layer in teacher.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_()
    labels = torch.arange(6)
    modules = (importlib.import_module(name) for name in (script, f"{script}_bnfuse"))
    return [getattr(module, SCRIPTS[script][0])(teacher, labels, (3, 16, 16), jitter=4, **options) for module in modules]


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_versions_find_the_same_images(script, float64):
    (images, losses), (ours, our_losses) = runs(script, iterations=9)
    assert len(losses) == 9 and losses[-1] != losses[0]
    assert our_losses == pytest.approx(losses, rel=1e-9)
    torch.testing.assert_close(ours, images, rtol=0, atol=1e-7)


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_versions_begin_with_the_same_loss_in_float32(script):
    (_, losses), (_, ours) = runs(script, iterations=1)
    assert ours == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_as_they_are(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script, "--iterations", "3", "--batch", "20"])
    importlib.import_module(f"{script}_bnfuse").main()
    assert "recognised" in capsys.readouterr().out
