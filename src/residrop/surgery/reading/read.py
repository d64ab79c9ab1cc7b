"""Reading a block."""

import ast
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import nn

from residrop.surgery.reading.functions import Unreadable
from residrop.surgery.reading.questions import Questions, Recorded
from residrop.surgery.reading.statements import forward_of
from residrop.surgery.reading.steps import Fork, Forward, Step
from residrop.surgery.reading.sums import Sum, find_sums, roots_of_results
from residrop.surgery.reading.writing import methods_of, written

__all__ = ["Branching", "Reading", "read", "read_again"]


@dataclass(frozen=True)
class Branching:
    """One branch of a block, as it was read.

    Attributes:
        paths: the attributes of the block that it uses.
        post: path of the activation after its sum; "" if there is none.
        plain: whether its shortcut is an argument of the block itself.
        last: whether the block returns its sum, after that activation.
    """

    paths: tuple[str, ...]
    post: str
    plain: bool
    last: bool


@dataclass(frozen=True, eq=False)
class Reading:
    """What the source of a forward says.

    Attributes:
        branches: the branches that were found, in the order of their computation; () if there are none.
        methods: the forward with rules in the place of its sums, and the branches, by name.
        source: their source.
        streams: for every value that the forward returns the argument that sums lead from to it; None where none do.
        elsewhere: attributes of the block that are used outside of the branches, too.
        variadic: names of values that are `*args` or `**kwargs`.
        log: what was asked of the block, with its answers.
        why: why there are no branches.
    """

    branches: tuple[Branching, ...]
    methods: dict[str, Any]
    source: str
    streams: tuple[str | None, ...]
    elsewhere: frozenset[str]
    variadic: frozenset[str]
    log: dict[tuple[Hashable, ...], Any]
    why: str = ""


_READ: dict[type, list[Reading]] = {}


def read(block: nn.Module) -> Reading:
    """What the source of a block's forward says of its branches; blocks alike share one reading."""
    questions = Questions(block)
    known = _READ.setdefault(type(block), [])
    for one in known:
        if questions.holds(one.log):
            return one
    made = _read(type(block), questions)
    known.append(made)
    return made


def read_again(block_class: type[nn.Module], log: dict[tuple[Hashable, ...], Any]) -> Reading:
    """The reading of a block of which only its class and answers are known.

    Raises:
        Unreadable: the class's source has changed since the answers were given.
    """
    known = _READ.setdefault(block_class, [])
    found = next((one for one in known if one.log == log), None)
    if found is None:
        try:
            found = _read(block_class, Recorded(log))
        except KeyError as error:
            raise Unreadable("other questions are asked") from error
        known.append(found)
    return found


def _read(block_class: type[nn.Module], questions: Questions) -> Reading:
    try:
        forward, sums, streams = _taken_apart(block_class, questions)
        if not sums:
            raise Unreadable("no sum of a value and a function of it was found in its forward")
        source = written(forward, sums)
        methods = methods_of(forward, source)
    except (Unreadable, RecursionError) as error:
        try:
            plain = forward_of(block_class, questions, frozenset())
            streams = tuple(roots_of_results(plain, questions))
        except (Unreadable, RecursionError):
            streams = ()
        return Reading((), {}, "", streams, frozenset(), frozenset(), dict(questions.log), str(error))
    branches = tuple(
        _branching(forward, questions, [one for one in sums if one.number == number]) for number in _numbers(sums)
    )
    used = {path for step in _outside(forward.steps) for path in step.paths}
    used |= {one.post for one in sums if one.post} | {
        path for one in sums for step in one.shortcut for path in step.paths
    }
    elsewhere = frozenset(_expanded(questions, frozenset(used - {""})))
    return Reading(branches, methods, source, streams, elsewhere, forward.variadic, dict(questions.log))


def _numbers(sums: list[Sum]) -> list[int]:
    return sorted({one.number for one in sums})


def _branching(forward: Forward, questions: Questions, sums: list[Sum]) -> Branching:
    """One branch, which may be computed in one of several places."""
    paths = frozenset(path for one in sums for path in one.branch_paths)
    arguments = set(forward.arguments.values())
    plain = all(not one.shortcut and one.x in arguments for one in sums)
    returned = ast.unparse(forward.steps[-1].node) == f"return {sums[0].result}"
    return Branching(_expanded(questions, paths), sums[0].post if len(sums) == 1 else "", plain, returned)


def _expanded(questions: Questions, paths: frozenset[str]) -> tuple[str, ...]:
    return tuple(sorted({one for path in paths for one in questions.ask("parts", path) or ()}))


def _outside(steps: list[Step]) -> list[Step]:
    """The steps that are in no branch."""
    return [step for one in steps for step in one.walk() if not isinstance(step, (Sum, Fork))]


def _taken_apart(
    block_class: type[nn.Module], questions: Questions
) -> tuple[Forward, list[Sum], tuple[str | None, ...]]:
    """The forward with its sums found; calls that have sums in them are replaced by their steps."""
    forward = forward_of(block_class, questions, frozenset())
    streams = tuple(roots_of_results(forward, questions))
    sums = find_sums(forward, questions)
    inline: frozenset[str] = frozenset()
    for site in [step.site for step in _outside(forward.steps) if step.site]:
        deep = forward_of(block_class, questions, inline, site)
        within = [one for one in find_sums(deep, questions) if site in one.inside]
        if within:
            inline |= {one for found in within for one in found.inside}
    if inline:
        forward = forward_of(block_class, questions, inline)
        sums = find_sums(forward, questions)
    return forward, sums, streams
