"""A whole synthesis step of each network: forward, loss, backward to the images, Adam.

Rivals run in both layouts, and the faster one counts: which it is differs from rival to rival and from network to network.
"""

from __future__ import annotations

import copy

import torch
from contenders import other_backends
from sites import LAYOUTS
from steps import LOSSES, FusedLoss, compiled_hook_loss, make_images, make_step, make_teacher, verify
from timing import OURS, Contender, Limits, alternate, medians, ratios

RIVALS = ("hook", "plain")


def test_step(network, benchmark, settings, machine, record):
    batch = settings.step_batch(network)
    model = make_teacher(network, settings.device, settings.dtype, torch.contiguous_format)
    images, labels = make_images(network, batch, model, torch.contiguous_format)
    # (name, layout) → loss; bnfuse and its convolutions choose the layout themselves.
    losses = {(name, ""): LOSSES[name](model, labels) for name in (OURS, "conv_only")}
    losses |= {(name, ""): FusedLoss(model, labels, backend=name) for name in other_backends(settings.device)}
    for layout, memory_format in LAYOUTS.items():
        laid_out = copy.deepcopy(model).to(memory_format=memory_format)
        losses |= {(name, layout): LOSSES[name](laid_out, labels) for name in RIVALS}
        if not settings.quick:  # compiling a network takes longer than all the rest of the quick run
            losses["compiled_hook", layout] = compiled_hook_loss(laid_out, labels)
    images_in = {layout: images.to(memory_format=LAYOUTS.get(layout, torch.contiguous_format)) for _, layout in losses}
    verify(model, {key: (loss, images_in[key[1]]) for key, loss in losses.items()}, images, labels)

    def contender(step) -> Contender:
        return Contender(lambda _: step())

    contenders = {key: contender(make_step(loss, images_in[key[1]])) for key, loss in losses.items()}
    contenders[OURS] = contenders.pop((OURS, ""))
    limits = Limits(3, 5, 10.0) if settings.quick else Limits(5, 9, 40.0)
    times, layouts = _in_the_faster_layout(alternate(benchmark, contenders, machine, limits))
    record.cases["steps"].append(
        {
            "network": network,
            "batch": batch,
            "rounds": len(times[OURS]),
            "layouts": layouts,
            "seconds": medians(times),
            "ratios": ratios(times),
        }
    )


def _in_the_faster_layout(times: dict) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds by (name, layout) → seconds of each name in its faster layout, and that layout where there was a choice."""
    middle = medians(times)
    chosen, layouts = {OURS: times[OURS]}, {}
    for name, layout in sorted(times.keys() - {OURS}, key=lambda key: -middle[key]):  # the fastest is set last
        chosen[name] = times[name, layout]
        layouts |= {name: layout} if layout else {}
    return chosen, layouts
