"""Classes of different size: batches that balance them, images dealt in proportion, the area under the ROC curve; and, with
digits reduced to two classes, the flow as for a small medical set of one's own."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from bnfuse import InputError, SynthesisConfig, TrainConfig, load_dataset
from bnfuse.batches import SAMPLINGS, draw_order
from bnfuse.card import read_card
from bnfuse.cli import main
from bnfuse.plans import plan
from bnfuse.training import Evaluation

run = lambda line: main(line.split())


# ---- sampling ----


@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(sum), seed=st.integers(0, 1000))
def test_an_epoch_has_each_class_as_often_as_any_other(counts, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    once, balanced = (draw_order(labels, sampling, torch.Generator().manual_seed(seed)) for sampling in SAMPLINGS)
    assert once.equal(torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)))
    assert len(balanced) == len(labels)
    drawn = torch.bincount(labels[balanced], minlength=len(counts))[torch.tensor(counts) > 0]
    assert drawn.max() - drawn.min() <= 1
    times = torch.bincount(balanced, minlength=len(labels))
    for k in labels.unique():
        assert times[labels == k].max() - times[labels == k].min() <= 1


def test_sampling_is_checked():
    with pytest.raises(InputError, match="sampling must be one of instance, class_balanced, got 'balanced'"):
        TrainConfig(sampling="balanced")


# ---- how many images of each class ----


@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    batch_size=st.integers(1, 10),
    together=st.integers(0, 3),  # 0 is balanced
)
def test_a_plan_deals_every_image_of_unequal_classes_once(counts, batch_size, together):
    plans = {"class_plan": "balanced"} if not together else {"classes_per_batch": min(together, batch_size)}
    units = plan(SynthesisConfig(batch_size=batch_size, **plans), range(len(counts)), counts)
    pairs = [pair for unit in units for pair in zip(unit.classes, unit.indices)]
    assert sorted(pairs) == [(k, i) for k, count in enumerate(counts) for i in range(count)]
    for unit in units:
        assert 0 < len(unit.classes) <= batch_size and list(unit.classes) == sorted(unit.classes)


# ---- AUC ----


def evaluation(logits, labels) -> Evaluation:
    return Evaluation(0.0, [], 0.0, logits.argmax(1), logits, labels)


@given(scores=st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
def test_auc_of_two_classes_counts_pairs_and_half_of_ties(scores):
    values, labels = torch.tensor([s for s, _ in scores]).float(), torch.tensor([int(label) for _, label in scores])
    found = evaluation(torch.stack([-values, 2 * values], 1), labels).auc
    higher = values[labels == 1][:, None] - values[labels == 0]  # of every pair
    if not higher.numel():
        assert found is None
    else:
        assert found == pytest.approx(((higher > 0).double() + 0.5 * (higher == 0)).mean().item(), abs=1e-12)


def test_auc_tells_apart_what_is_certain():
    logits = torch.tensor([[0.0, 40.0], [0.0, 50.0], [0.0, 60.0], [0.0, 45.0]])  # probabilities in float32 are all 1
    assert evaluation(logits, torch.tensor([0, 1, 1, 0])).auc == 1.0


def test_auc_of_more_classes_is_the_mean_over_them():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(60, 4, generator=generator), torch.randint(0, 4, (60,), generator=generator)
    expected = roc_auc_score(labels, logits.double().softmax(1), multi_class="ovr", average="macro")
    assert evaluation(logits, labels).auc == pytest.approx(expected, abs=1e-12)
    few = labels < 3
    present = [roc_auc_score(labels[few] == k, logits[few].double().softmax(1)[:, k]) for k in range(3)]
    assert evaluation(logits[few], labels[few]).auc == pytest.approx(sum(present) / 3, abs=1e-12)
    assert np.isnan(evaluation(logits * torch.nan, labels).auc)


# ---- the flow ----


@pytest.fixture
def threes_and_eights(tmp_path, monkeypatch):
    """train.npz with 40 threes and 140 eights, test.npz with all that are held out; in the working directory."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        digits = load_dataset(f"digits:{split}").with_classes(["3", "8"])
        chosen = (digits.labels == 1) | ((digits.labels == 0).cumsum(0) <= (40 if split == "train" else 1000))
        images, labels = digits.images[chosen].numpy(), digits.labels[chosen].numpy()
        np.savez(f"{split}.npz", images=images, labels=labels, class_names=np.array(["healthy", "ill"]))
    return tmp_path


def test_a_small_set_of_two_classes_of_different_size(threes_and_eights, capsys):
    train = "train --test test.npz --model resnet8 --batch-size 32 --lr 0.01 --sampling class_balanced"
    assert run(f"{train} --data train.npz --out teacher --epochs 12") == 0
    assert float(re.search(r"accuracy on test.npz: [\d.]+%; AUC ([\d.]+)", capsys.readouterr().out)[1]) > 0.9
    flow = "--teacher teacher/model.safetensors --statistics s"
    assert run("record --teacher teacher/model.safetensors --data train.npz --out s") == 0
    synthesize = f"synthesize {flow} --iterations 100 --images-per-class 45"
    assert run(f"{synthesize} --class-shares recorded --out synthetic") == 0
    private, made = load_dataset("train.npz"), load_dataset("synthetic")
    counts = Counter(private.labels.tolist())
    expected = [round(90 * counts[k] / len(private)) for k in (0, 1)]
    assert torch.bincount(made.labels).tolist() == expected == read_card(threes_and_eights / "synthetic")["counts"]
    assert expected[0] < 25 and run(f"{synthesize} --class-shares recorded --out synthetic") == 0  # it goes on, and is done

    capsys.readouterr()
    assert run(f"{train} --data synthetic --out student --epochs 25") == 0
    metrics = json.loads((threes_and_eights / "student" / "metrics.json").read_text())
    assert f"AUC {metrics['auc']:.3f}" in capsys.readouterr().out
    assert metrics["auc"] > 0.9 and set(metrics["per_class_accuracy"]) == {"healthy", "ill"}
    assert run(f"synthesize {flow} --class-shares recorded --targets running --out other --statistics s --iterations 1") == 0
    assert run("synthesize --teacher teacher/model.safetensors --targets running --class-shares recorded --out none") == 2
    assert "class_shares='recorded' needs class statistics" in capsys.readouterr().err
