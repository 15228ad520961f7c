"""A whole synthesis step of each network: forward, loss, backward to the images, Adam."""

from __future__ import annotations

from sites import NETWORKS
from steps import LOSSES, compiled_hook_loss, make_images, make_step, make_teacher, verify
from timing import Contender, Limits, alternate, medians, ratios


def test_step(network, benchmark, settings, machine, record):
    batch = NETWORKS[network].quick_step_batch if settings.quick else NETWORKS[network].step_batch
    model = make_teacher(network, *settings.tensors)
    images, labels = make_images(network, batch, model, settings.memory_format)
    losses = {name: make(model, labels) for name, make in LOSSES.items()}
    if not settings.quick:  # compiling a network takes longer than all the rest of the quick run
        losses["compiled_hook"] = compiled_hook_loss(model, labels)
    verify(model, losses, images, labels)

    def contender(step) -> Contender:
        return Contender(lambda _: step())

    contenders = {name: contender(make_step(loss, images)) for name, loss in losses.items()}
    limits = Limits(3, 5, 10.0) if settings.quick else Limits(5, 9, 40.0)
    times = alternate(benchmark, contenders, machine, limits)
    record.cases["steps"].append(
        {
            "network": network,
            "batch": batch,
            "rounds": len(times["hook"]),
            "seconds": medians(times),
            "ratios": ratios(times),
        }
    )
