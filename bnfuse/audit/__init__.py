"""The audit of a synthetic dataset: what it gives away of the private images, measured, with controls.

`audit` (running) prepares a `Context` (context), hands it to every measure (measure; each is a module of its own) and collects
their `Finding`s (findings) into audit.json and audit.html (report, summary). `bnfuse.audit` is the function, so the modules
here are imported as ``from bnfuse.audit import findings``.
"""

from .context import ARMS, Context
from .findings import Control, Figure, Finding, Picture, Row
from .measure import MEASURES
from .running import AuditResult, audit

__all__ = ["ARMS", "MEASURES", "AuditResult", "Context", "Control", "Figure", "Finding", "Picture", "Row", "audit"]
