"""Drop-in hooks: the names that other projects' scripts use, with the fused operators behind them.

    from bnfuse.compat import DeepInversionFeatureHook     # DeepInversion, breaching
    from bnfuse.compat import BNFeatureHook                # SRe2L, CDA, SCDD, DWA, CV-DD, FADRM
    from bnfuse.compat import Recorder                     # DP-ImgSyn: statistics of modules that keep none
    from bnfuse.compat.lpld import …                       # and wmdd, gvbsm, edc, fast_datafree, zeroq

A script changes its import, some a second line, see docs/drop_in.md. `BatchNormHook` is what they have in common.
"""

from .batchnorm import BatchNormHook
from .deepinversion import BNFeatureHook, DeepInversionFeatureHook
from .fast_datafree import DeepInversionHook
from .recorder import Recorder

__all__ = ["BNFeatureHook", "BatchNormHook", "DeepInversionFeatureHook", "DeepInversionHook", "Recorder"]
