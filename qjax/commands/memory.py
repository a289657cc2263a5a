"""Peak memory of a piece of work."""

import ctypes
import gc
import threading
from types import TracebackType

import jax
import psutil


class PeakMemory:
    """Context manager: how far the process's memory rose, in bytes.

    `rise` is the peak over the start, sampled every 5 ms: of the bytes in use on the
    accelerator where it counts them, else of the process's resident memory (RSS), after
    the C library has handed its free pages back (glibc).
    """

    def __init__(self):
        self.rise = 0
        self._done = threading.Event()

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        _hand_back_free_pages()
        self._start = _resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._sample()

    def _sample(self) -> None:
        self.rise = max(self.rise, _resident() - self._start)


def _hand_back_free_pages() -> None:
    """Without it, work that fits into pages freed before would seem to take none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident() -> int:
    """Bytes in use on the accelerator, or in the process where it does not count."""
    stats = jax.devices()[0].memory_stats()
    if stats is not None and "bytes_in_use" in stats:
        return int(stats["bytes_in_use"])
    return psutil.Process().memory_info().rss
