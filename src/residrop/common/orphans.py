"""Processes that end with the one that started them."""

import os
import signal
import threading
import time
from collections.abc import Callable

__all__ = ["leave_with_parent", "leaving"]

_leaving = threading.Event()


def leave_with_parent(on_gone: Callable[[], object] = lambda: None, seconds: float = 1.0) -> None:
    """Watch whether the parent process is there; once it is gone, call `on_gone` and send this process SIGTERM.

    That ends what waits; a training saves its state first.
    """
    _leaving.clear()
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        on_gone()
        if not _leaving.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def leaving() -> None:
    """Say that this process is about to end by itself, so that no signal is to cut short what it still does."""
    _leaving.set()
