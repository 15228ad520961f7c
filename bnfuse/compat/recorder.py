"""Running statistics for modules that keep none: what DP-ImgSyn wraps around GroupNorm, for any module.

A `Recorder` looks on. Recording, it gathers the mean and variance of what passes a module; matching, it measures how far a
batch is from them, as DeepInversion's hook does at BatchNorm. Class-wise statistics are `bnfuse.record`'s, which also sees that
they are of images enough; a recorder does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import InputError
from ..site_moments import SiteMoments
from ..sites import Site, SiteRule, hook_site


class Recorder(nn.Module):
    """Looks on at one module, which stays as it is.

        recorders = [Recorder(m) for m in network.modules() if isinstance(m, nn.GroupNorm)]
        for images in private:
            network(images)
        for recorder in recorders:
            recorder.match()
        network(synthetic)
        loss = sum(recorder.r_feature for recorder in recorders)

    Parameters
    ----------
    module : any whose input or output is a tensor, or has one
    at : what of it, as it follows KIND in `sites.SITE_GRAMMAR`: "input", "output:1", "input@last". Default "input", of a
        LayerNorm "input@last"
    momentum : None, the exact moments of all that was recorded. Else what each batch contributes, as to the buffers of
        nn.BatchNorm: from mean 0 and variance 1 on, and with the unbiased variance; DP-ImgSyn has 0.1
    backend : which kernels run, see `bnfuse.backends`

    Attributes
    ----------
    running_mean, running_var : float64 [C], in the state dict; [0] before anything was recorded. Without momentum the variance
        is the biased one
    elements : int64 scalar, recorded of each channel; in the state dict
    recording : whether it records (at first) or matches, see `record` and `match`
    module : what it looks at. Not a submodule: the recorder's state dict has its statistics alone

    Notes
    -----
    A copy or pickle of the network is of the network alone; ``copy.deepcopy((network, recorders))`` copies both, and the copies
    belong together. DataParallel's replicas share one recorder, which is then of no use: run the module in one place.
    """

    def __init__(self, module: nn.Module, *, at: str | None = None, momentum: float | None = None, backend: str = "auto"):
        super().__init__()
        if momentum is not None and not 0 < momentum <= 1:
            raise InputError(f"momentum must be above 0 and at most 1, or None for the exact moments, got {momentum}")
        self.__dict__["module"] = module  # past nn.Module's registration
        at = at or ("input@last" if type(module) is nn.LayerNorm else "input")
        name = f"{type(module).__name__}:{at}"
        rule = SiteRule.parse(f"type={name}")
        self.site = Site(name, "", rule.end, rule.index, rule.layout, rule.cells)
        self.momentum, self.backend, self.recording = momentum, backend, True
        self.register_buffer("running_mean", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("running_var", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("elements", torch.tensor(0))
        self._attach()

    @property
    def r_feature(self) -> Tensor:
        """``‖running_var − var‖₂ + ‖running_mean − mean‖₂`` of the last batch that was matched: a scalar, float32 at least."""
        if self._distance is None:
            raise InputError("this recorder has measured nothing yet: call match(), then run the network")
        return self._distance

    def record(self) -> None:
        """What comes is taken into the statistics."""
        self.recording = True

    def match(self) -> None:
        """What comes is held against the statistics. InputError where there are none."""
        if not int(self.elements):
            raise InputError(f"the recorder of {self.site.name} has recorded nothing to match: run the network on images first")
        self.recording = False

    def reset(self) -> None:
        """Forgets what was recorded."""
        self.running_mean, self.running_var = self.running_mean.new_zeros(0), self.running_var.new_zeros(0)
        self.elements.zero_()
        self.recording, self._distance = True, None

    def close(self) -> None:
        """Looks at the module no more. The statistics stay, and the last r_feature."""
        self._handle.remove()
        self._handle = None

    def _take(self, values: object) -> None:
        x = self.site.arrange(self.site.pick(values))
        if self.recording:
            self._record(x.detach())
        else:
            self._match(x)

    @torch.inference_mode(False)  # the buffers made here are used outside of it, too
    @torch.no_grad()
    def _record(self, x: Tensor) -> None:
        batch = SiteMoments.empty(1, x.shape[1])
        batch.add_batch(x, torch.zeros(len(x), dtype=torch.int64))
        if not self.running_mean.numel():
            self.running_mean = torch.zeros(x.shape[1], dtype=torch.float64, device=self.elements.device)
            self.running_var = torch.ones_like(self.running_mean)
        before = self.elements.cpu()[None]  # [1]
        mean, var = self.running_mean.cpu()[None], self.running_var.cpu()[None]  # [1, C]
        if self.momentum is None:
            merged = SiteMoments(before, mean, var * before).merge(batch)
            mean, var = merged.mean, merged.m2 / merged.count.clamp(min=1)
        else:
            mean = torch.lerp(mean, batch.mean, self.momentum)
            var = torch.lerp(var, batch.m2 / (batch.count - 1).clamp(min=1), self.momentum)
        self.running_mean.copy_(mean[0])
        self.running_var.copy_(var[0])
        self.elements += batch.count[0]

    def _match(self, x: Tensor) -> None:
        mean, var = ops.group_moments(x, backend=self.backend)  # [1, C]
        if mean.shape[1] != len(self.running_mean):
            raise InputError(
                f"the recorder of {self.site.name} has statistics of {len(self.running_mean)} channels, and was given "
                f"{mean.shape[1]}"
            )
        deltas = (target.to(mean) - moment[0] for target, moment in ((self.running_var, var), (self.running_mean, mean)))
        self._distance = sum(torch.linalg.vector_norm(delta) for delta in deltas)

    # ---- on the module and off it ----

    def _attach(self) -> None:
        self._distance: Tensor | None = None
        self._handle = hook_site(self.module, self.site, _Look(self))

    def extra_repr(self) -> str:
        doing = "closed" if self._handle is None else "recording" if self.recording else "matching"
        return f"{self.site.name}, {doing}, elements={int(self.elements)}"

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        return state | {"_distance": None, "_handle": self._handle is not None}  # r_feature hangs on a graph

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self._handle:
            self._attach()
        else:
            self._handle = None

    def _load_from_state_dict(self, state, prefix, *arguments) -> None:
        for name in ("running_mean", "running_var"):
            if (saved := state.get(prefix + name)) is not None:
                setattr(self, name, torch.zeros_like(saved, dtype=torch.float64, device=self.elements.device))
        super()._load_from_state_dict(state, prefix, *arguments)


class _Look:
    """The hook; a copy of it, which comes with a copy of the module, does nothing."""

    def __init__(self, recorder: Recorder | None):
        self.recorder = recorder

    def __call__(self, values: object) -> None:
        if self.recorder is not None:
            self.recorder._take(values)

    def __getstate__(self) -> dict:
        return {"recorder": None}
