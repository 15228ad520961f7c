"""The whole pipeline, rerun on chosen private images: teacher, statistics, synthesis, student. And what a student gives away.

Attacks that have to know who was in the data (canaries, shadows) cannot ask the published images: they make their own, the
same way, as often as they need.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..batches import Source
from ..datasets import ArrayDataset, load_dataset
from ..models import Teacher, freeze
from ..plans import SynthesisConfig
from ..statistics import record
from ..synthesis import synthesize
from ..training import TrainConfig, TrainResult, train
from .context import Context


@dataclass(frozen=True)
class Pipeline:
    """How teachers and students are trained and images synthesised when it is rerun. Seeds are the audit's."""

    teacher: TrainConfig
    synthesis: SynthesisConfig
    student: TrainConfig


def student(
    context: Context, arm: str, images: Tensor, labels: Tensor, pipeline: Pipeline, folder: Path, *words: int | str
) -> TrainResult:
    """The student that somebody trains on what an arm publishes of some private images.

    Parameters
    ----------
    arm : "original" and "noised" publish the arm's images themselves, "synthetic" what the pipeline makes of them
    images : int64 [M], which of the private images
    labels : int64 [M], their labels, which may be wrong ones
    folder : for temporary files
    words : name this run, see `Context.seed_for`
    """
    source = context.noised if arm == "noised" else context.private
    data = ArrayDataset(source.images[images], labels, context.private.class_names, name="rerun")
    if arm == "synthetic":
        data = synthesised(context, data, pipeline, folder, *words)
    return learn(context, data, pipeline.student, *words)


def synthesised(context: Context, data: ArrayDataset, pipeline: Pipeline, folder: Path, *words: int | str) -> ArrayDataset:
    """Synthetic images from a teacher trained on `data`, and from their statistics."""
    trained = learn(context, data, pipeline.teacher, *words, "teacher")
    classes = data.num_classes
    teacher = Teacher(freeze(trained.model), pipeline.teacher.model, classes, trained.preprocessing, data.class_names)
    statistics = record(teacher, DataLoader(data, batch_size=256), classes, allow_few_images=True)
    config = replace(pipeline.synthesis, seed=context.seed_for(*words, "synthesis"))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".synthesis-") as out:
        synthesize(teacher, statistics, out, config, device=context.device, progress=False)
        return load_dataset(out, channels=data.image_shape[0]).in_memory()


def learn(context: Context, data: ArrayDataset, config: TrainConfig, *words: int | str) -> TrainResult:
    """A network trained on `data` from a seed that `words` name."""
    return train(data, replace(config, seed=context.seed_for(*words)), progress=False, device=context.device)


@torch.no_grad()
def confidence(trained: TrainResult, data: ArrayDataset, device: torch.device) -> Tensor:
    """log(p / (1 - p)), p the probability of each image's label: float64 [N] (arXiv 2112.03570, section IV C).

    It orders images as their loss does, the other way round, and is about normal over networks.
    """
    source = Source(data, trained.preprocessing, device)
    batches = source.batches(list(torch.arange(len(data)).split(512)))
    logits = torch.cat([trained.model(source.preprocessing.normalize(x)).double().cpu() for _, x in batches])  # [N, K]
    own = data.labels[:, None]
    return (logits.gather(1, own) - logits.scatter(1, own, -torch.inf).logsumexp(1, keepdim=True)).flatten()
