"""A whole synthesis step of each network: forward, loss, backward to the images, Adam.

Rivals run in both layouts, and the faster one counts: which it is differs from rival to rival and from network to network.
"""

from __future__ import annotations

import copy

import torch
from contenders import other_backends
from sites import LAYOUTS, NETWORKS
from steps import LOSSES, AutocastLoss, FusedLoss, HookLoss, compiled_hook_loss, make_images, make_step, make_teacher, verify
from timing import OURS, Contender, alternate, medians, ratios

RIVALS = ("hook", "plain")


def test_step(network, benchmark, settings, machine, record):
    batch = settings.step_batch(network)
    model = make_teacher(network, settings.device, settings.dtype, torch.contiguous_format)
    images, labels = make_images(network, batch, model, torch.contiguous_format)
    # (name, layout) → loss; bnfuse and its convolutions choose the layout themselves.
    losses = {(name, ""): LOSSES[name](model, labels) for name in (OURS, "conv_only")}
    losses |= {(name, ""): FusedLoss(model, labels, backend=name) for name in other_backends(settings.device)}
    for layout in LAYOUTS:
        laid_out = _laid_out(model, layout)
        losses |= {(name, layout): LOSSES[name](laid_out, labels) for name in RIVALS}
        # Compiling a network takes longer than all the rest of the quick run; for a GPU the compiler chooses the layout itself.
        needed = settings.device.type == "cpu" or layout == settings.layout
        if needed and network in settings.compile_for and not settings.quick:
            losses["compiled_hook", layout] = compiled_hook_loss(laid_out, labels)
    with_images = {key: (loss, _in_layout(images, key[1])) for key, loss in losses.items()}
    verify(model, with_images, images, labels)
    if settings.dtype == torch.bfloat16:
        with_images |= _under_autocast(network, batch, settings)

    def contender(step) -> Contender:
        return Contender(lambda _: step())

    contenders = {key: contender(make_step(*given)) for key, given in with_images.items()}
    contenders[OURS] = contenders.pop((OURS, ""))
    timed = alternate(benchmark, contenders, machine, settings.step_limits, hide_launches=False)  # they are the step's own
    times, layouts = _in_the_faster_layout(timed)
    record.cases["steps"].append(
        {
            "network": network,
            "batch": batch,
            "image_size": NETWORKS[network].size,
            "rounds": len(times[OURS]),
            "layouts": layouts,
            "seconds": medians(times),
            "ratios": ratios(times),
        }
    )


def _under_autocast(network: str, batch: int, settings) -> dict:
    """bnfuse and the eager hook as mixed precision is mostly run, with weights and images in float32: as `with_images`."""
    model = make_teacher(network, settings.device, torch.float32, torch.contiguous_format)
    images, labels = make_images(network, batch, model, torch.contiguous_format)
    losses = {(OURS, ""): FusedLoss(model, labels)}
    losses |= {("hook", layout): HookLoss(_laid_out(model, layout), labels) for layout in LAYOUTS}
    with_images = {key: (AutocastLoss(loss, settings.dtype), _in_layout(images, key[1])) for key, loss in losses.items()}
    verify(model, with_images, images, labels, autocast=settings.dtype)
    return {(f"autocast_{name}", layout): given for (name, layout), given in with_images.items()}


def _laid_out(model: torch.nn.Module, layout: str) -> torch.nn.Module:
    return copy.deepcopy(model).to(memory_format=LAYOUTS[layout])


def _in_layout(images: torch.Tensor, layout: str) -> torch.Tensor:
    """Images [N, 3, H, W] as a rival's layout wants them; contiguous for those that choose it themselves."""
    return images.to(memory_format=LAYOUTS[layout or "contiguous"])


def _in_the_faster_layout(times: dict) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds by (name, layout) → seconds of each name in its faster layout, and that layout where there was a choice."""
    middle = medians(times)
    chosen, layouts = {OURS: times[OURS]}, {}
    for name, layout in sorted(times.keys() - {OURS}, key=lambda key: -middle[key]):  # the fastest is set last
        chosen[name] = times[name, layout]
        layouts |= {name: layout} if layout else {}
    return chosen, layouts
