"""What `apply` did to a model, block by block."""

from dataclasses import dataclass

__all__ = ["Entry", "Report"]


@dataclass(frozen=True)
class Entry:
    """A block under rules.

    Attributes:
        name: dotted name in the model.
        kind: library and class, with ", whole" after it for x + b (block(x) - x).
        rates: survival rate of each of its branches.
        granularity: `block`, `row` or `unit`.
    """

    name: str
    kind: str
    rates: tuple[float, ...]
    granularity: str


@dataclass(frozen=True)
class Report:
    """What `apply` did.

    Attributes:
        blocks: the blocks under rules, from input to output.
        left_alone: (name, why) of blocks that were looked at and stay as they are.
        parameters: share of the model's parameters that may be left out, in [0, 1].
        flops: the same of its operations in a forward, if `apply` was given an example; else None.
    """

    blocks: tuple[Entry, ...]
    left_alone: tuple[tuple[str, str], ...]
    parameters: float = 0.0
    flops: float | None = None

    @property
    def expected_depth(self) -> float:
        """Expected number of live branches, sum of p_l."""
        return sum(rate for entry in self.blocks for rate in entry.rates)

    def short(self) -> str:
        """The first line, and those of what was left alone."""
        lines = str(self).splitlines()
        return "\n".join([lines[0], *lines[1 + len(self.blocks) :]])

    def __str__(self) -> str:
        branches = sum(len(entry.rates) for entry in self.blocks)
        count = f"{_number(len(self.blocks), 'block')}, {_number(branches, 'branch')}"
        rows = [
            (entry.name, ", ".join(f"{rate:.3g}" for rate in entry.rates), entry.granularity, entry.kind)
            for entry in self.blocks
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        shares = f"{self.parameters:.0%} of the parameters"
        if self.flops is not None:
            shares += f" and {self.flops:.0%} of the operations"
        lines = [f"{count}, expected depth {self.expected_depth:.2f}, {shares} may be left out"]
        for row in rows:
            cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
            lines.append(f"  {'  '.join(cells)}".rstrip())
        lines += [f"  left alone: {name}: {why}" for name, why in self.left_alone]
        return "\n".join(lines)


def _number(count: int, what: str) -> str:
    plural = "es" if what.endswith("ch") else "s"
    return f"{count} {what}{'' if count == 1 else plural}"
