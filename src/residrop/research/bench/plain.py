"""The training loop that most people write today, in a process of its own, for `residrop bench throughput`.

Pillow images, the usual transforms of torchvision (pad-4 crop, flip, ToTensor, Normalize) in a DataLoader with two
workers, float32, eager, contiguous, plain SGD, at constant depth. Its own process keeps what `residrop train` does to
threads and memory away from it.
"""

import multiprocessing
import signal
import time
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from residrop.common.errors import RunError
from residrop.models import create

__all__ = ["PlainLoop", "Task", "images_of"]

CLASSES = 10
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Task(NamedTuple):
    """What is trained.

    Attributes:
        network: a name that `residrop.create` knows.
        width: multiple of its width.
        images: number of images there are, of CIFAR's size.
        batch_size: images in a step.
        batches: steps of an epoch.
        workers: processes of the DataLoader.
        device: where to run.
        threads: of the arithmetic.
        seed: of images and weights.
    """

    network: str
    width: int
    images: int
    batch_size: int
    batches: int
    workers: int
    device: str
    threads: int
    seed: int


def images_of(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Synthetic images: uint8 `Tensor[count, 3, 32, 32]` and int64 `Tensor[count]` of ten classes."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return pixels, torch.randint(CLASSES, (count,), generator=generator)


class _Pictures(Dataset[Any]):
    def __init__(self, count: int, seed: int) -> None:
        pixels, labels = images_of(count, seed)
        self.pixels, self.labels = pixels.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(_MEAN, _STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def _epoch(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], device: torch.device) -> None:
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def serve(task: Task, connection: Connection) -> None:
    """What the process does: an epoch whenever it is told to, and its seconds back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this
    torch.set_num_threads(task.threads)
    device = torch.device(task.device)
    pictures = _Pictures(task.images, task.seed)
    loader = DataLoader(
        pictures,
        task.batch_size,
        sampler=RandomSampler(pictures, num_samples=task.batches * task.batch_size),
        num_workers=task.workers,
        persistent_workers=task.workers > 0,
        pin_memory=device.type == "cuda",
    )
    model = create(task.network, width=task.width, classes=CLASSES, seed=task.seed).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    while connection.recv():
        started = time.perf_counter()
        _epoch(model, optimizer, loader, device)
        connection.send(time.perf_counter() - started)


class PlainLoop:
    """The process, as a context manager; a whole epoch is timed, so that its workers load nothing outside of it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        context = multiprocessing.get_context("spawn")
        self._connection, self._other = context.Pipe()
        self._process = context.Process(target=serve, args=(task, self._other))

    def __enter__(self) -> Self:
        self._process.start()
        self._other.close()  # or the end of the process would not be seen here
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._process.is_alive():
            self._connection.send(False)
            self._process.join(timeout=30)
        self._process.kill()
        self._process.join()
        self._connection.close()

    def seconds(self) -> float:
        """Seconds of one step: the mean over an epoch; RunError if the process has ended."""
        try:
            self._connection.send(True)
            return self._connection.recv() / self.task.batches
        except (EOFError, OSError):
            self._process.join(timeout=5)
            raise RunError(
                f"the plain loop in {self.task.network} ended with code {self._process.exitcode}; its message is above"
            ) from None
