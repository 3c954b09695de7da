"""Python's garbage collector, paused while rows are made and sent.

Rows are freed by their reference counts as soon as they are sent. A collection before that would find nothing, but take
them for objects that live long, and so bring on full collections, each of 0.1 to 0.3 seconds where torch is loaded.
"""

import gc
import threading
from collections.abc import Generator
from contextlib import contextmanager

_lock = threading.Lock()
_pauses = 0
_was_enabled = True


@contextmanager
def paused() -> Generator[None]:
    """Without collections of garbage; afterwards, when no other thread pauses them either, as it was before."""
    global _pauses, _was_enabled
    with _lock:
        if not _pauses:
            _was_enabled = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if not _pauses and _was_enabled:
                gc.enable()
