"""What a network is trained on, batch by batch: pixels on the device, augmented at random.

Small datasets are held as one uint8 tensor, from which batches are gathered, flipped and shifted in one indexing;
anything else comes through a DataLoader. A `dataset` is what `training.train` describes, a `config` its `TrainConfig`,
of which only the fields of an augmentation are read. Random numbers are drawn on the CPU, so that a GPU sees the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from .errors import InputError
from .preprocessing import Preprocessing

# a dataset on disk whose pixels take less is decoded once, rather than in every epoch
IN_MEMORY_BYTES = 2 * 2**30


class Source:
    """A dataset as batches of pixels on a device: from one tensor where it has ``images``, else by a DataLoader.

    Raises InputError where the images are not of the size and channels that the preprocessing says.
    """

    def __init__(self, dataset, preprocessing: Preprocessing, device: torch.device, workers: int = 0):
        self.dataset, self.preprocessing, self.device, self.workers = dataset, preprocessing, device, workers
        self.images = _images_in_memory(dataset)  # uint8 [N, H, W, C], or None
        if len(dataset) == 0:
            raise InputError(f"{dataset.name} has no images")
        if self.images is not None:
            _check_image([self.images.shape[3], *self.images.shape[1:3]], preprocessing, dataset.name)
            self.images = self.images.to(device)

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, batches: list[Tensor], gather=None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (index [B], pixels [B, C, H, W], float32 in [0, 1], channels_last) for each of the given index tensors.

        `gather(images, at)` picks the rows `at` [B] out of `images` [M, H, W, C]; None picks them as they are.
        """
        gather = gather or (lambda images, at: images[at])
        if self.images is not None:
            for index in batches:
                index = index.to(self.device)
                yield index, _pixels(gather(self.images, index).float() / 255)
            return
        loader = DataLoader(
            self.dataset,
            batch_sampler=[index.tolist() for index in batches],
            num_workers=self.workers,
            collate_fn=_Collate(self.preprocessing, self.dataset.name),
            pin_memory=self.device.type == "cuda",
            generator=Generator(),  # seeds the workers, which would otherwise draw from the model's
        )
        for index, images in zip(batches, read(loader)):
            images = images.to(self.device, non_blocking=True).permute(0, 2, 3, 1)  # [B, H, W, C]
            yield index.to(self.device), _pixels(gather(images, torch.arange(len(images), device=self.device)))


def read(loader: Iterable) -> Iterator:
    """What a loader yields. An InputError of one of its processes comes as it was: PyTorch makes its traceback the message."""
    try:
        yield from loader
    except InputError as error:
        said = str(error).rpartition(f"{InputError.__module__}.InputError: ")[2].strip()
        raise (error if said == str(error) else InputError(said)) from None


class _Collate:
    """Stack the images of a batch, having seen that each is of the right shape; the labels are in the dataset."""

    def __init__(self, preprocessing: Preprocessing, name: str):
        self.preprocessing, self.name = preprocessing, name

    def __call__(self, samples: list[tuple[Tensor, int]]) -> Tensor:
        for image, _ in samples:
            _check_image(list(image.shape), self.preprocessing, self.name)
        return torch.stack([image for image, _ in samples])


def _pixels(images: Tensor) -> Tensor:
    """[B, H, W, C] → [B, C, H, W] in channels_last, which is the same memory."""
    return images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _check_image(shape: list[int], preprocessing: Preprocessing, name: str) -> None:
    expected = [preprocessing.channels, *preprocessing.image_size]
    if shape != expected:
        raise InputError(
            f"{name} has an image of {shape[0]} channels and {'x'.join(map(str, shape[1:]))} pixels, the network "
            f"expects {expected[0]} channels and {expected[1]}x{expected[2]} pixels: resize or convert the images"
        )


def decoded(dataset):
    """The dataset in memory, where it can be had there and is small enough; else as it is."""
    if _images_in_memory(dataset) is None and hasattr(dataset, "in_memory") and dataset.nbytes <= IN_MEMORY_BYTES:
        return dataset.in_memory()
    return dataset


def _images_in_memory(dataset) -> Tensor | None:
    """The dataset's uint8 [N, H, W, C], or None where it reads its images one by one."""
    images = getattr(dataset, "images", None)
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        images = torch.as_tensor(images)
    if isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4:
        return images
    return None


def checked_labels(dataset, num_classes: int) -> Tensor:
    """The dataset's labels, int64 [N] on the CPU, each in [0, num_classes)."""
    labels = torch.as_tensor(dataset.labels, dtype=torch.int64).cpu()
    if labels.shape != (len(dataset),):
        raise InputError(f"{dataset.name} has {len(dataset)} images, but labels of shape {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"the labels of {dataset.name} run from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}"
        )
    return labels


SAMPLINGS = ("instance", "class_balanced")


def draw_order(labels: Tensor, sampling: str, generator: Generator) -> Tensor:
    """The images of an epoch in random order, int64 [N] of labels [N]: each once (instance); or (class_balanced) each class as
    often as any other that is there, to one image, and in a class each image as often as any other, to once."""
    if sampling == "instance":
        return torch.randperm(len(labels), generator=generator)
    present = labels.unique()
    present = present[torch.randperm(len(present), generator=generator)]  # which of them have one more changes
    drawn = []
    for place, k in enumerate(present):
        members = (labels == k).nonzero().flatten()
        wanted = len(labels) // len(present) + (place < len(labels) % len(present))
        turns = math.ceil(wanted / len(members))
        drawn.append(torch.cat([members[torch.randperm(len(members), generator=generator)] for _ in range(turns)])[:wanted])
    return torch.cat(drawn)[torch.randperm(len(labels), generator=generator)]


def even_batches(count: int, batch_size: int) -> list[slice]:
    """Cut range(count) into batches of about the same size; never one of a single image, which BatchNorm refuses."""
    batches = max(1, min(math.ceil(count / batch_size), count // 2))
    ends = [round(count * (i + 1) / batches) for i in range(batches)]
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


def measure_preprocessing(dataset) -> Preprocessing:
    """The size of the images, and the mean and standard deviation of their pixels for each channel, in float64.

    A channel that hardly varies is given a standard deviation of one grey level, 1/255.
    """
    if len(dataset) == 0:
        raise InputError(f"{dataset.name} has no images")
    images = _images_in_memory(dataset)
    if images is not None:
        size, chunks = images.shape[1:3], (part.double() / 255 for part in images.split(256))  # [B, H, W, C]
    else:
        size = dataset[0][0].shape[1:]
        chunks = (dataset[i][0].double().permute(1, 2, 0) for i in range(len(dataset)))  # [H, W, C]
    count, total, squares = 0, 0.0, 0.0
    for chunk in chunks:
        values = chunk.reshape(-1, chunk.shape[-1])  # [pixels, C]
        count, total, squares = count + len(values), total + values.sum(0), squares + values.square().sum(0)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
    return Preprocessing(tuple(size), mean.tolist(), std.tolist())


def flip_and_shift(images: Tensor, index: Tensor, config, generator: Generator) -> Tensor:
    """Rows `index` [B] of `images` [M, H, W, C], each mirrored and translated by its own draw, in one indexing."""
    if not config.flip and not config.shift:
        return images[index]
    count, (height, width) = len(index), images.shape[1:3]
    dy, dx = torch.randint(-config.shift, config.shift + 1, (2, count, 1), generator=generator)  # [B, 1] each
    rows = _reflect(torch.arange(height) + dy, height)  # [B, H]: which row of the original comes here
    columns = _reflect(torch.arange(width) + dx, width)  # [B, W]
    if config.flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    return images[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def _reflect(position: Tensor, size: int) -> Tensor:
    """Positions outside [0, size) → their mirror images at the first and last pixel, which is not repeated."""
    return size - 1 - (size - 1 - position.abs()).abs()


def random_crop(images: Tensor, lower_scale: float, generator: Generator) -> Tensor:
    """Random resized crop of [B, C, H, W]: area from `lower_scale` to 1, aspect ratio from 3/4 to 4/3, bilinear."""
    if lower_scale == 1:
        return images
    return crop(images, draw_crops(len(images), lower_scale, generator))


def draw_crops(count: int, lower_scale: float, generator: Generator) -> Tensor:
    """Boxes for `crop`, float32 [B, 4], with area and aspect ratio as in `random_crop`."""
    area, stretch, left, top = torch.rand(4, count, generator=generator)  # [B] each, in [0, 1)
    side = (lower_scale + (1 - lower_scale) * area).sqrt()
    stretch = torch.exp((2 * stretch - 1) * math.log(4 / 3) / 2)  # square root of the aspect ratio
    return torch.stack([(side * stretch).clamp(max=1), (side / stretch).clamp(max=1), left, top], dim=1)


def crop(images: Tensor, boxes: Tensor) -> Tensor:
    """The box of each image, resized to the whole image, bilinear: [B, C, H, W] → the same shape.

    boxes : float32 [B, 4]: width and height as fractions of the image's, and what part of the rest lies to the left and above
    """
    width, height, left, top = boxes.T
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width, (2 * left - 1) * (1 - width)
    theta[:, 1, 1], theta[:, 1, 2] = height, (2 * top - 1) * (1 - height)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def mix(inputs: Tensor, target: Tensor, config, generator: Generator) -> tuple[Tensor, Tensor]:
    """Mixup or CutMix with another image of the batch, each image by its own draw.

    Both are a convex combination with a weight for each pixel: constant in mixup, 0 or 1 in CutMix. The target is mixed
    in the proportion of the mean weight. inputs [B, C, H, W], target [B, K] → the same shapes.
    """
    if not config.mixup and not config.cutmix:
        return inputs, target
    draws, partner = draw_mix(len(inputs), config, generator)
    weight, partner = mix_weights(draws, *inputs.shape[2:]).to(inputs.device), partner.to(inputs.device)
    inputs = inputs[partner].lerp(inputs, weight[:, None])
    return inputs, target[partner].lerp(target, weight.mean((1, 2))[:, None])


def draw_mix(count: int, config, generator: Generator) -> tuple[Tensor, Tensor]:
    """How each image of a batch is mixed, and with which.

    Returns
    -------
    draws : float32 [B, 4]: whether by CutMix (1) or mixup (0), the image's own share, the centre of CutMix's box (y, x)
    partner : int64 [B], the other image's place in the batch
    """
    uses_cutmix = torch.rand(count, generator=generator) < (0.5 if config.mixup else 1.0)
    if not config.cutmix:
        uses_cutmix = torch.zeros_like(uses_cutmix)
    alpha = torch.where(uses_cutmix, float(config.cutmix), float(config.mixup))
    a, b = (torch._standard_gamma(alpha, generator) for _ in range(2))
    y, x = torch.rand(2, count, generator=generator)
    draws = torch.stack([uses_cutmix.float(), a / (a + b), y, x], dim=1)  # the share is Beta(alpha, alpha)
    return draws, torch.randperm(count, generator=generator)


def mix_weights(draws: Tensor, height: int, width: int) -> Tensor:
    """The weight of the image's own pixels, [B, H, W], from `draw_mix`'s draws."""
    uses_cutmix, share, y, x = draws[:, :, None, None].unbind(1)  # [B, 1, 1] each
    half = (1 - share).sqrt() / 2  # the box covers 1 - share of the image, before its border cuts it
    rows = (torch.arange(height)[:, None] + 0.5) / height  # [H, 1]
    columns = (torch.arange(width) + 0.5) / width  # [W]
    outside = ((rows - y).abs() > half) | ((columns - x).abs() > half)  # [B, H, W]
    return torch.where(uses_cutmix > 0, outside.float(), share)
