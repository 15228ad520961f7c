"""Drop-in hooks: the names that other projects' scripts use, with the fused operators behind them."""

from .recorder import Recorder

__all__ = ["Recorder"]
