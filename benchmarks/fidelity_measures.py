"""What `fidelity.py` says of a student and of a set of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnfuse.audit.features import features
from bnfuse.audit.imports import without_broken_torchvision
from bnfuse.audit.intervals import clopper_pearson
from bnfuse.batches import Source
from bnfuse.datasets import ArrayDataset
from bnfuse.models import Teacher
from bnfuse.preprocessing import Preprocessing

with without_broken_torchvision():
    from torchmetrics.functional.classification import multiclass_calibration_error


def logits_of(model: nn.Module, preprocessing: Preprocessing, images: ArrayDataset, device: torch.device) -> Tensor:
    """Of a network in eval mode, float32 [N, K] on the CPU."""
    source = Source(images, preprocessing, device)
    with torch.no_grad():
        parts = [model(preprocessing.normalize(x)) for _, x in source.batches(list(torch.arange(len(images)).split(256)))]
    return torch.cat(parts).float().cpu()


def figures(logits: Tensor, of_teacher: Tensor, labels: Tensor) -> dict:
    """How well a student does.

    Parameters
    ----------
    logits, of_teacher : the student's and the teacher's, [N, K]
    labels : int64 [N]

    Returns
    -------
    correct, tested (numbers of images), accuracy, interval (its Clopper–Pearson 95 % interval), agreement (share of the images
    that student and teacher put in the same class), calibration_error (ECE with 15 bins, Guo et al. 2017), teacher_accuracy
    """
    predictions, teacher_predictions = logits.argmax(1), of_teacher.argmax(1)
    correct, tested = int((predictions == labels).sum()), len(labels)
    error = multiclass_calibration_error(logits.softmax(1), labels, num_classes=logits.shape[1], n_bins=15, norm="l1")
    return {
        "correct": correct,
        "tested": tested,
        "accuracy": correct / tested,
        "interval": list(clopper_pearson(correct, tested)),
        "agreement": (predictions == teacher_predictions).double().mean().item(),
        "calibration_error": float(error),
        "teacher_accuracy": (teacher_predictions == labels).double().mean().item(),
    }


def within_class_spread(x: Tensor, labels: Tensor) -> float:
    """The mean over classes of the unbiased variance of features x [N, D] in the class, summed over D; labels [N]."""
    return torch.stack([x[labels == k].double().var(0).sum() for k in labels.unique()]).mean().item()


def diversity(teacher: Teacher, images: ArrayDataset, real: ArrayDataset, device: torch.device) -> float:
    """The within-class spread of the teacher's features, over that of real images; 1 where they are as varied."""
    if images is real:
        return 1.0
    ours, theirs = (within_class_spread(features(teacher, part, device), part.labels) for part in (images, real))
    return ours / theirs
