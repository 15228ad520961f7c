"""Train a network from scratch on a dataset, real or synthetic, and test it on real images.

The same loop makes teachers and students. How images are read and augmented is in `batches`; how a network is named
and loaded is in `models`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from .batches import (
    SAMPLINGS,
    Source,
    checked_labels,
    decoded,
    draw_order,
    even_batches,
    flip_and_shift,
    measure_preprocessing,
    mix,
    random_crop,
)
from .checkpoints import save_checkpoint
from .class_names import misplaced
from .configs import check_whole
from .errors import InputError
from .files import check_place, write_atomically
from .labels import LabelledViews, Labels
from .models import build_model, check_output, fingerprint
from .preprocessing import Preprocessing

WEIGHTS, METRICS = "model.safetensors", "metrics.json"  # what `train` writes into its folder

# (lr, weight_decay) where the config leaves them out
OPTIMIZER_DEFAULTS = {"adamw": (2e-3, 0.01), "sgd": (0.1, 5e-4)}


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained. What is left out is meant for small images and a few thousand of them.

    Attributes
    ----------
    model : the network's name, see `models.SPEC_GRAMMAR`
    epochs : passes over the dataset
    sampling : what a pass is where classes are of different size: every image once (instance); or as many images, but every
        class as often as any other, so that those of small classes come again and again (class_balanced; arXiv 1910.09217)
    batch_size : images a step; all batches of an epoch are of about the same size, at most this
    optimizer : "adamw" or "sgd" (with Nesterov momentum)
    lr : the highest the schedule reaches; left out, 0.002 with adamw and 0.1 with sgd
    weight_decay : left out, 0.01 with adamw and 0.0005 with sgd
    momentum : of SGD
    warmup : fraction of all steps during which lr rises from zero, before it falls to zero along a cosine
    label_smoothing : of hard labels
    flip : mirror half of the images, left to right
    shift : translate by up to so many pixels, each way; what comes in is the image reflected at its border
    crop_scale : lower bound of the area of a random resized crop; 1.0 is off
    mixup, cutmix : alpha of the Beta distribution (arXiv 1710.09412, 1905.04899); 0 is off, of both each gets half
    noise : standard deviation of Gaussian noise, in pixels of [0, 1]
    temperature : T of soft labels (Hinton et al., arXiv 1503.02531)
    seed : of the initial weights, the order of the images and their augmentation
    eval_every : test after every so many epochs; 0 tests at the end only
    workers : processes that read a dataset which is not in memory
    recipe : a student's settings, by name, from which these began, see --list-recipes

    Raises
    ------
    InputError
        A value out of its range; the message names the field.
    """

    model: str = "resnet20"
    epochs: int = 30
    sampling: str = "instance"
    batch_size: int = 128
    optimizer: str = "adamw"
    lr: float | None = None
    weight_decay: float | None = None
    momentum: float = 0.9
    warmup: float = 0.1
    label_smoothing: float = 0.0
    flip: bool = False
    shift: int = 1
    crop_scale: float = 1.0
    mixup: float = 0.0
    cutmix: float = 0.0
    noise: float = 0.0
    temperature: float = 4.0
    seed: int = 0
    eval_every: int = 5
    workers: int = 0
    recipe: str | None = None

    def __post_init__(self):
        if self.optimizer not in OPTIMIZER_DEFAULTS:
            raise InputError(f"optimizer must be one of {', '.join(OPTIMIZER_DEFAULTS)}, got {self.optimizer!r}")
        if self.sampling not in SAMPLINGS:
            raise InputError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {self.sampling!r}")
        for name, default in zip(("lr", "weight_decay"), OPTIMIZER_DEFAULTS[self.optimizer]):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_whole(self, {"epochs": 1, "batch_size": 2, "shift": 0, "seed": 0, "eval_every": 0, "workers": 0})
        for name, fits, range_text in (
            ("lr", lambda v: v > 0, "positive"),
            ("weight_decay", lambda v: v >= 0, "0 or more"),
            ("momentum", lambda v: 0 < v < 1, "between 0 and 1, both excluded"),
            ("warmup", lambda v: 0 <= v < 1, "from 0 to below 1"),
            ("label_smoothing", lambda v: 0 <= v < 1, "from 0 to below 1"),
            ("crop_scale", lambda v: 0 < v <= 1, "above 0 and at most 1"),
            ("mixup", lambda v: v >= 0, "0 or more"),
            ("cutmix", lambda v: v >= 0, "0 or more"),
            ("noise", lambda v: v >= 0, "0 or more"),
            ("temperature", lambda v: v > 0, "positive"),
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or not fits(value):
                raise InputError(f"{name} must be {range_text}, got {value!r}")


@dataclass
class Evaluation:
    """How well a network does on a dataset.

    Attributes
    ----------
    accuracy : fraction of the images classified as labelled
    per_class_accuracy : the same for each class in order of label; None for a class without images
    loss : mean cross-entropy, in nats
    predictions : the class with the largest logit, int64 [N], on the CPU, in the dataset's order
    logits : the network's, float32 [N, K], on the CPU
    labels : int64 [N], on the CPU
    """

    accuracy: float
    per_class_accuracy: list[float | None]
    loss: float
    predictions: Tensor
    logits: Tensor
    labels: Tensor

    @property
    def auc(self) -> float | None:
        """The area under the ROC curve: the chance that an image of a class is given more of it than one of another, ties
        counted half. Of more than two classes the mean over them of each against the rest (macro one-vs-rest), by its
        probability. None where all images are of one class; a class of which there is none does not count.
        """
        logits = self.logits.double()
        if logits.shape[1] == 2:
            return _auc(self.labels == 1, logits[:, 1] - logits[:, 0])  # probabilities near 1 would become ties
        found = [_auc(self.labels == k, scores) for k, scores in enumerate(logits.softmax(1).T)]
        found = [auc for auc in found if auc is not None]
        return sum(found) / len(found) if found else None


def _auc(positive: Tensor, scores: Tensor) -> float | None:
    """Of scores [N]; nan where one is, None where all are positive, or none is."""
    from sklearn.metrics import roc_auc_score  # not at the top: it takes a second

    if not 0 < int(positive.sum()) < len(positive):
        return None
    return float(roc_auc_score(positive.numpy(), scores.numpy())) if scores.isfinite().all() else math.nan


@dataclass
class TrainResult:
    """A trained network and how it came to be.

    Attributes
    ----------
    model : after the last epoch, in eval mode, not frozen
    preprocessing : how pixels become its input
    accuracy : on the test dataset; None without one
    per_class_accuracy : on the test dataset, for each class; None without one
    auc : on the test dataset, see `Evaluation.auc`; None without one
    train_accuracy : on the training images as they are, without augmentation
    history : one dict an epoch: epoch, loss, lr (of its last step), train_accuracy (running, augmented), seconds and,
        where it was tested, accuracy
    seconds : wall-clock time of the training, tests included
    """

    model: nn.Module
    preprocessing: Preprocessing
    accuracy: float | None
    per_class_accuracy: list[float | None] | None
    auc: float | None
    train_accuracy: float
    history: list[dict]
    seconds: float


def train(
    dataset,
    config: TrainConfig,
    *,
    test=None,
    preprocessing: Preprocessing | None = None,
    soft_labels: bool = False,
    labels: Labels | None = None,
    progress: bool = True,
    out: str | Path | None = None,
    device: torch.device | str | None = None,
) -> TrainResult:
    """Train the network that `config` names from random weights.

    The same config, data, device and number of threads give the same network. No epoch is chosen by its test accuracy:
    the last one counts.

    Parameters
    ----------
    dataset : what to train on: ``labels`` int64 [N], ``class_names``, ``num_classes``, ``name``, ``soft_labels``
        (float32 logits [N, K], or None), and ``dataset[i] -> (float32 [C, H, W] in [0, 1], label)``. With ``images``,
        uint8 [N, H, W, C], it is trained on in memory; so it is with ``in_memory()``, which returns such a dataset, and
        ``nbytes`` of at most `batches.IN_MEMORY_BYTES`.
    config : how
    test : a dataset to test on, of the same classes
    preprocessing : None takes the size of the images and their mean and std for each channel
    soft_labels : learn the dataset's logits instead of its labels, with the loss T²·KL(softmax(teacher/T) ‖
        softmax(student/T)). An augmented image keeps the logits of the original.
    labels : what `relabel` wrote of the dataset, learnt likewise. Of views, the network sees those and augments nothing itself
    progress : show a progress bar on stderr, where that is a terminal
    out : a folder for ``model.safetensors`` (see `checkpoints.save_checkpoint`) and ``metrics.json``
    device : None takes the GPU where there is one

    Raises
    ------
    InputError
        The datasets, the preprocessing and the network do not fit each other; soft labels are asked for and not there;
        the loss is no longer finite.
    """
    started = time.perf_counter()
    logits = getattr(dataset, "soft_labels", None) if labels is None or not labels.plain else labels.logits()  # [N, K]
    if soft_labels and labels is None and logits is None:
        raise InputError(f"{dataset.name} has no soft labels: relabel it with a teacher, or train on its hard labels")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dataset, test = decoded(dataset), decoded(test)
    preprocessing = preprocessing or measure_preprocessing(dataset)
    source = Source(dataset, preprocessing, device, config.workers)
    if len(source) < 2:
        raise InputError(f"{dataset.name} has {len(source)} images; training with BatchNorm needs at least 2")
    if labels is not None:
        _check_labels(labels, dataset, preprocessing, config)
    if (labels is None or labels.plain) and config.shift >= min(preprocessing.image_size):
        raise InputError(f"shift={config.shift} is no less than the image size {preprocessing.image_size}")
    if test is not None:
        _check_same_classes(dataset, test)
        test_source = Source(test, preprocessing, device, config.workers)
    if out is not None:
        check_place(Path(out) / WEIGHTS)  # now, rather than when the training is done

    generator = Generator().manual_seed(config.seed)  # order and augmentation; on the CPU, so that a GPU draws the same
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)  # weights and dropout
        model = build_model(config.model, dataset.num_classes, preprocessing.channels)
        check_output(model, config.model, preprocessing, dataset.num_classes)
        model = model.to(device, memory_format=torch.channels_last).train()
        optimizer = _optimizer(model, config)
        steps = config.epochs * len(even_batches(len(source), config.batch_size))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, steps, config.warmup))
        distils = soft_labels or labels is not None
        if labels is None or labels.plain:
            targets = _targets(dataset, config, logits if distils else None).to(device)  # [N, K], probabilities

        history = []
        with tqdm(total=config.epochs * len(source), unit="img", disable=None if progress else True) as bar:
            for epoch in range(1, config.epochs + 1):
                bar.set_description(f"epoch {epoch}/{config.epochs}")
                record = {"epoch": epoch}
                if labels is None or labels.plain:
                    samples = _augmented(source, targets, config, generator)
                else:
                    samples = _replayed(source, labels.views((epoch - 1) % labels.passes), config)
                record |= _train_epoch(model, samples, config, distils, optimizer, schedule, device, bar.update)
                if not math.isfinite(record["loss"]):
                    raise InputError(
                        f"the loss is {record['loss']} in epoch {epoch}: training diverged; lower lr, now {config.lr}"
                    )
                last = epoch == config.epochs
                if test is not None and (last or (config.eval_every and epoch % config.eval_every == 0)):
                    evaluation = _evaluate(model, test_source, 2 * config.batch_size)
                    record["accuracy"] = evaluation.accuracy
                history.append(record)
                shown = record.get("accuracy", record["train_accuracy"])
                bar.set_postfix(loss=f"{record['loss']:.3f}", accuracy=f"{shown:.1%}")

    result = TrainResult(
        model=model.eval(),
        preprocessing=preprocessing,
        accuracy=evaluation.accuracy if test is not None else None,
        per_class_accuracy=evaluation.per_class_accuracy if test is not None else None,
        auc=evaluation.auc if test is not None else None,
        train_accuracy=_evaluate(model, source, 2 * config.batch_size).accuracy,
        history=history,
        seconds=time.perf_counter() - started,
    )
    if out is not None:
        _write(Path(out), result, config, dataset, test, labels_learnt(soft_labels, labels))
    return result


def _augmented(source: Source, targets: Tensor, config, generator: Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The dataset once, in random order, as `config.sampling` says, each image augmented by its own draw.

    Yields (inputs [B, C, H, W], what is to be answered to them [B, K], and to the images before they were mixed [B, K]).
    `targets` are probabilities [N, K].
    """
    order = draw_order(torch.as_tensor(source.dataset.labels).cpu(), config.sampling, generator)
    batches = [order[part] for part in even_batches(len(source), config.batch_size)]
    for index, images in source.batches(batches, lambda images, at: flip_and_shift(images, at, config, generator)):
        images = random_crop(images, config.crop_scale, generator)
        if config.noise:
            images = images + config.noise * torch.randn(images.shape, generator=generator).to(images.device)
        inputs = source.preprocessing.normalize(images)  # [B, C, H, W]
        target = targets[index]  # [B, K]
        inputs, mixed_target = mix(inputs, target, config, generator)
        yield inputs, mixed_target, target


def _replayed(source: Source, labelled: LabelledViews, config) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The views of one pass with the teacher's answers to them, in the order in which it gave them; yields as `_augmented`."""
    parts, views = even_batches(len(source), config.batch_size), labelled.views
    needed = [views.index[views.needed(part)] for part in parts]
    for part, (_, images) in zip(parts, source.batches(needed)):
        inputs = source.preprocessing.normalize(views.show(images, part))
        target = F.softmax(labelled.logits(part).to(source.device) / config.temperature, dim=1)
        yield inputs, target, target


def _train_epoch(model, samples, config, distils: bool, optimizer, schedule, device, report) -> dict:
    """One pass over the dataset; returns its mean loss, running accuracy, last lr and seconds.

    `samples` as `_augmented` yields them; `report(images)` is called after each step.
    """
    started = time.perf_counter()
    model.train()
    loss_sum, correct = (torch.zeros((), device=device) for _ in range(2))  # read once an epoch: no waiting
    seen = 0
    for inputs, mixed_target, target in samples:
        with torch.autocast("cuda", torch.bfloat16, enabled=inputs.is_cuda):
            logits = model(inputs)
        if not isinstance(logits, Tensor):
            raise InputError(
                f"{config.model} returns {type(logits).__name__} in training mode; bnfuse trains networks that return "
                "logits [N, num_classes] alone"
            )
        logits = logits.float()
        if distils:
            loss = distillation_loss(logits, mixed_target, config.temperature)
        else:
            loss = F.cross_entropy(logits, mixed_target, label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        lr = schedule.get_last_lr()[0]
        schedule.step()
        loss_sum += loss.detach() * len(inputs)
        correct += (logits.argmax(1) == target.argmax(1)).sum()
        seen += len(inputs)
        report(len(inputs))
    return {
        "loss": loss_sum.item() / seen,
        "train_accuracy": correct.item() / seen,
        "lr": lr,
        "seconds": time.perf_counter() - started,
    }


def _targets(dataset, config: TrainConfig, logits) -> Tensor:
    """What the network is to answer for each image: probabilities, float32 [N, K]; of the labels, where logits are None."""
    labels = checked_labels(dataset, dataset.num_classes)
    if logits is None:
        return F.one_hot(labels, dataset.num_classes).float()
    logits = torch.as_tensor(logits, dtype=torch.float32)
    if logits.shape != (len(labels), dataset.num_classes):
        raise InputError(
            f"the soft labels of {dataset.name} must be [{len(labels)}, {dataset.num_classes}], one logit an image and "
            f"class, got {list(logits.shape)}"
        )
    if not logits.isfinite().all():
        raise InputError(f"the soft labels of {dataset.name} are not all finite")
    return F.softmax(logits / config.temperature, dim=1)


def _check_labels(labels: Labels, dataset, preprocessing: Preprocessing, config: TrainConfig) -> None:
    """InputError where labels are of other images than the dataset's, as far as that can be seen, or cannot be learnt so."""
    of, ours = (labels.images, labels.num_classes), (len(dataset), dataset.num_classes)
    if of != ours:
        raise InputError(
            f"{labels.root} labels {of[0]} images of {of[1]} classes, {dataset.name} has {ours[0]} of {ours[1]}: train on the "
            "whole dataset that was relabelled"
        )
    if not labels.plain and config.sampling != "instance":
        raise InputError(
            f"the views of {labels.root} are shown as they were labelled, each once: leave out sampling={config.sampling!r}, "
            "or relabel the images themselves (without --views)"
        )
    (height, width), (teachers_height, teachers_width) = preprocessing.image_size, labels.image_size
    same_shape = height * teachers_width == width * teachers_height  # of any size: crops and mixes are fractions of it
    if not labels.plain and not same_shape:
        raise InputError(
            f"the views of {labels.root} were labelled at {teachers_height}x{teachers_width} pixels and the images are "
            f"{height}x{width}: bring them to that shape, of whatever size (image_size, --image-size)"
        )


def distillation_loss(logits: Tensor, teacher_probabilities: Tensor, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ softmax(logits / T)), the mean over samples (Hinton et al., arXiv 1503.02531, section 2).

    Parameters
    ----------
    logits : the student's, [N, K]
    teacher_probabilities : softmax(teacher's logits / T), [N, K]
    temperature : T; the factor T² keeps the size of the gradient
    """
    student = F.log_softmax(logits / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher_probabilities, reduction="batchmean")


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    common = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **common)
    return torch.optim.SGD(model.parameters(), momentum=config.momentum, nesterov=True, **common)


def _lr_factor(step: int, steps: int, warmup: float) -> float:
    """Linear from zero over the first `warmup` of the steps, then half a cosine down to zero."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def evaluate(model: nn.Module, dataset, preprocessing: Preprocessing, batch_size: int = 256) -> Evaluation:
    """Test a network in eval mode, on the device it is on; its modes are put back.

    Parameters
    ----------
    model : [N, C, H, W] → logits [N, K]
    dataset : as in `train`
    preprocessing : what the network expects
    batch_size : images at a time

    Raises
    ------
    InputError
        The images are not of the size and channels that the network expects, there are none, or a label is beyond K.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return _evaluate(model, Source(dataset, preprocessing, device), batch_size)


def _evaluate(model: nn.Module, source: Source, batch_size: int) -> Evaluation:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            batches = source.batches(list(torch.arange(len(source)).split(batch_size)))
            logits = [model(source.preprocessing.normalize(images)).float().cpu() for _, images in batches]
    finally:
        for module in training:
            module.training = True
    logits = torch.cat(logits)  # [N, K]
    labels = checked_labels(source.dataset, logits.shape[1])
    predictions = logits.argmax(1)
    correct = predictions == labels
    per_class = [correct[labels == k] for k in range(logits.shape[1])]
    return Evaluation(
        accuracy=correct.double().mean().item(),
        per_class_accuracy=[right.double().mean().item() if len(right) else None for right in per_class],
        loss=F.cross_entropy(logits.double(), labels).item(),
        predictions=predictions,
        logits=logits,
        labels=labels,
    )


def _check_same_classes(dataset, test) -> None:
    """As many classes; and where names are the same, at the same places, since labels are positions."""
    if test.num_classes != dataset.num_classes:
        raise InputError(
            f"{dataset.name} has {dataset.num_classes} classes and the test dataset {test.name} {test.num_classes}; "
            "a network is tested on the classes it was trained on"
        )
    ours, theirs = list(dataset.class_names or []), list(test.class_names or [])
    if misplaced(theirs, ours) is not None:
        raise InputError(f"{test.name} has classes of {dataset.name} at other places: {theirs[:5]}, {ours[:5]}")


def labels_learnt(soft_labels: bool, labels: Labels | None) -> str:
    """What the labels are that `train` learns with these arguments: "hard", "soft", or of "views"."""
    if labels is not None:
        return "soft" if labels.plain else "views"
    return "soft" if soft_labels else "hard"


def refuse_other_network(out: Path, config: TrainConfig, dataset, labels: str) -> None:
    """InputError where `out` holds a network that came of another training than this: its statistics would fit none then."""
    if not (out / WEIGHTS).exists():
        return
    wanted = json.loads(json.dumps({"dataset": dataset.name, "images": len(dataset), "labels": labels, **asdict(config)}))
    try:
        before = json.loads((out / METRICS).read_text())
        found = {name: before[name] for name in ("dataset", "images", "labels") if name in before} | before["config"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{out} holds a network, and no {METRICS} that says of what training ({error}): choose another folder (--out), or "
            "remove it"
        ) from error
    others = [f"{name}: {found[name]!r}, now {value!r}" for name, value in wanted.items() if found.get(name, value) != value]
    if others:
        raise InputError(
            f"{out} holds a network of another training ({'; '.join(others[:5])}): choose another folder (--out), or remove it"
        )


def _write(out: Path, result: TrainResult, config: TrainConfig, dataset, test, labels: str) -> None:
    """``model.safetensors`` and ``metrics.json``."""
    names = list(dataset.class_names or map(str, range(dataset.num_classes)))
    metrics = {
        "accuracy": result.accuracy,
        "auc": result.auc,
        "per_class_accuracy": dict(zip(names, result.per_class_accuracy)) if result.per_class_accuracy else None,
        "train_accuracy": result.train_accuracy,
        "seconds": result.seconds,
        "dataset": dataset.name,
        "images": len(dataset),
        "labels": labels,
        "test_dataset": test.name if test is not None else None,
        "test_images": len(test) if test is not None else None,
        "config": asdict(config),
        "fingerprint": fingerprint(result.model),
        "history": result.history,
    }
    save_checkpoint(
        out / WEIGHTS,
        result.model,
        architecture=config.model,
        num_classes=dataset.num_classes,
        preprocessing=result.preprocessing,
        class_names=dataset.class_names and list(dataset.class_names),
        metrics={name: metrics[name] for name in ("accuracy", "train_accuracy")},
    )
    write_atomically(out / METRICS, (json.dumps(metrics, indent=2) + "\n").encode())
