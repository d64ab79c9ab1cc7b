"""Agreement of the ranks: one small all-gather says who differs, in what."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from residrop.blocks.attach import rules_of, sampler_of
from residrop.common.errors import ConfigError, RankError
from residrop.common.torchrun import world_size
from residrop.rules.base import Rule

__all__ = ["broadcast", "check_ranks", "is_distributed"]

_PARTS = ("parameters", "rules", "survival rates", "timing or coupling", "seed", "step")
_BROADCAST_BYTES = 1 << 28


def is_distributed(group: dist.ProcessGroup | None = None) -> bool:
    """Whether there are several processes; ConfigError under torchrun before the process group exists."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(group) > 1
    if world_size() > 1:
        raise ConfigError(
            "torchrun started several processes, but there is no process group; "
            "call torch.distributed.init_process_group() first"
        )
    return False


def check_ranks(model: nn.Module, *, group: dist.ProcessGroup | None = None) -> None:
    """Raise RankError on every rank if the ranks do not draw the same: an error instead of a hang later on.

    Compared are the parameters (names, shapes, types), the rules, their rates, their timing and coupling, the seed and
    the step.
    Where draws are made per rank, the ranks' numbers must differ. One all-gather of 56 bytes a rank, to be called by
    all ranks: at set-up (`data_parallel` does), after loading a checkpoint, and now and then in training. Does nothing
    in a single process.

    Args:
        model: an attached model, plain, wrapped in DistributedDataParallel or sharded by `fully_shard`.
        group: the ranks to compare (default: all).

    Raises:
        RankError: naming the ranks that differ from most others (of two, from rank 0) and in what.
        ConfigError: the model is not attached, or torchrun is running but no process group exists.
    """
    sampler = sampler_of(model)
    if not is_distributed(group):
        return
    rules = rules_of(model)
    mine = [
        _digest(_shape(name, parameter) for name, parameter in model.named_parameters()),
        _digest((type(rule).__name__, _options(rule)) for rule in rules),
        _digest(site.rates for site in sampler.sites),
        _digest([sampler.schedule.timing, sampler.coupling, sampler.costs, sampler.at_least, sampler.draw_every]),
        sampler.seed if abs(sampler.seed) < 1 << 63 else _digest([sampler.seed]),
        sampler.step,
        sampler.rank,
    ]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    *compared, ranks = zip(*_gathered(mine, device, group), strict=True)
    odd = [_differences(part, values) for part, values in zip(_PARTS, compared, strict=True)]
    if found := [text for text in odd if text]:
        raise RankError(
            f"the ranks differ in {'; in '.join(found)}; build, attach and step the model alike on all of them"
        )
    own = any(rule.scope == "per_rank" and rule.rates for rule in rules)
    if own and len(set(ranks)) < len(ranks):
        raise RankError(
            f"draws are made per rank, but the ranks draw as numbers {', '.join(map(str, ranks))}; "
            "leave rank= of residrop.attach out, or give every rank its own"
        )


def _shape(name: str, parameter: nn.Parameter) -> tuple[object, ...]:
    # DDP and compilation add prefixes; what matters is that ranks agree, so the name stands as it is
    return name, tuple(parameter.shape), parameter.stride(), parameter.dtype, parameter.requires_grad


def _options(rule: Rule) -> list[tuple[str, str]]:
    return sorted((name, value) for name, value in vars(rule).items() if isinstance(value, str))


def _digest(values: object) -> int:
    """63-bit hash of the text of some values; no Python hash, which differs between processes."""
    text = "\n".join(map(str, values))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _gathered(numbers: Sequence[int], device: torch.device, group: dist.ProcessGroup | None) -> list[list[int]]:
    """Every rank's numbers, by rank."""
    # nccl alone knows no tensors on the CPU
    device = torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else device
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    return torch.stack(every).tolist()


def _differences(part: str, values: Sequence[int]) -> str:
    """'' or who differs: 'seed (rank 1 has 7, the others 0)'."""
    counts = Counter(values)
    if len(counts) == 1:
        return ""
    usual = max(counts, key=lambda value: (counts[value], value == values[0]))
    odd = [rank for rank, value in enumerate(values) if value != usual]
    if part in ("seed", "step"):
        who = ", ".join(f"rank {rank} has {values[rank]}" for rank in odd)
        return f"{part} ({who}, {'the others' if len(values) - len(odd) > 1 else 'the other'} {usual})"
    return f"{part} ({'rank' if len(odd) == 1 else 'ranks'} {', '.join(map(str, odd))} from the rest)"


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Copy the values of rank 0 of the group to all its ranks, in flat pieces of at most 256 MiB or one tensor."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for one in tensors:
        kinds.setdefault((one.dtype, one.device), []).append(one)
    for (dtype, _), left in kinds.items():
        while left:
            piece, size = [left.pop()], 0
            while left and (size := size + piece[-1].numel() * dtype.itemsize) < _BROADCAST_BYTES:
                piece.append(left.pop())
            flat = torch.cat([one.reshape(-1) for one in piece])
            dist.broadcast(flat, group=group, group_src=0)
            for one, values in zip(piece, flat.split([one.numel() for one in piece]), strict=True):
                one.copy_(values.view(one.shape))
