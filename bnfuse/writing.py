"""Images are encoded and committed while the next ones are optimised."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from .store import ImageRecord, Store


class BackgroundWriter:
    """Commits units to a store in a thread of its own, in order, one at a time.

    What `Store.commit` raises, it raises at the next `commit` or `drain`; no later unit is committed before. A `with` block
    drains it, also when the block fails: a unit once given is on disk, or its error is told.
    """

    def __init__(self, store: Store):
        self.store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bnfuse-writer")
        self._in_flight: Future | None = None

    def commit(self, unit: int, images: Tensor, records: Sequence[ImageRecord], soft_labels: Tensor | None = None) -> None:
        """As `Store.commit`, but it returns when the unit before is on disk; this one is when `drain` returns.

        The tensors must not be changed until then.
        """
        self.drain()
        # Fetched here: the device is the caller's, and a thread that waits for it would hold up the next unit's launches.
        images, soft_labels = images.detach().cpu(), None if soft_labels is None else soft_labels.detach().cpu()
        self._in_flight = self._thread.submit(self.store.commit, unit, images, records, soft_labels)

    def drain(self) -> None:
        """Waits until everything given is on disk. InputError where the store refused it."""
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            in_flight.result()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.drain()
        except Exception as refused:
            if error is None:
                raise
            warnings.warn(f"and the last unit was not committed: {refused}", stacklevel=2)
        finally:
            self._thread.shutdown()
