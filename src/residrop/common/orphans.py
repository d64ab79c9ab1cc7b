"""Processes that end with the one that started them."""

import os
import signal
import threading
import time
from collections.abc import Callable

__all__ = ["leave_with_parent"]


def leave_with_parent(on_gone: Callable[[], object] = lambda: None, seconds: float = 1.0) -> None:
    """Watch whether the parent process is there; once it is gone, call `on_gone` and send this process SIGTERM.

    That ends what waits; a training saves its state first.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        on_gone()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
