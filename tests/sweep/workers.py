"""Processes that examine models, each with a limit of time and memory."""

import dataclasses
import multiprocessing
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from sweep.checks import Found

MEMORY = 12 * 2**30  # bytes of address space, of which torch's libraries take some
WORN = 2 * 2**20  # kilobytes a process may have held before a new one takes its place


def serve(connection: Connection) -> None:
    """Answer names of models with what was found, until the other side is gone."""
    import torch

    from sweep.checks import examine

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while True:
        try:
            name, quick = connection.recv()
        except EOFError:
            return
        try:
            found = examine(name, quick=quick)
        except Exception as error:  # a model that breaks the sweep is a row of its results
            found = _broken(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        connection.send((dataclasses.asdict(found), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def _broken(name: str, why: str) -> Found:
    library, _, model = name.partition("/")
    return Found(library, model, status="broken", problems=[why])


class Worker:
    """A process that may be ended at any time."""

    def __init__(self) -> None:
        self.process: Any = None

    def examine(self, name: str, seconds: float, quick: bool) -> dict[str, Any]:
        """What was found of a model; "broken" if it took too long or ended the process."""
        if self.process is None:
            self.start()
        self.connection.send((name, quick))
        if not self.connection.poll(seconds):
            self.stop()
            return dataclasses.asdict(_broken(name, f"it took more than {seconds:.0f} s"))
        try:
            found, held = self.connection.recv()
        except (EOFError, OSError):
            self.stop()
            return dataclasses.asdict(_broken(name, "the process ended"))
        if held > WORN:
            self.stop()
        return found

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def examined(names: Sequence[str], number: int, seconds: float, *, quick: bool = False) -> Iterator[dict[str, Any]]:
    """What was found of every model, as `number` processes get to it."""
    free: SimpleQueue[Worker] = SimpleQueue()
    workers = [Worker() for _ in range(number)]
    for worker in workers:
        free.put(worker)

    def one(name: str) -> dict[str, Any]:
        worker = free.get()
        try:
            return worker.examine(name, seconds, quick)
        finally:
            free.put(worker)

    pool = ThreadPoolExecutor(number)
    try:
        for future in as_completed([pool.submit(one, name) for name in names]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.stop()
