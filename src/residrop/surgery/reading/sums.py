"""Finding the residual sums among the steps of a forward, and the steps that make up their branches."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from residrop.surgery.reading.functions import path_of
from residrop.surgery.reading.nodes import copied, walk
from residrop.surgery.reading.questions import Questions
from residrop.surgery.reading.steps import Fork, Forward, Step, names_in

__all__ = ["Sum", "find_sums", "roots_of_results"]


@dataclass(eq=False)
class Sum(Step):
    """shortcut(x) + branch(x), in the place of the steps that compute it.

    Attributes:
        number: of the branch, in the order in which they are computed.
        x: name of the value that both start from.
        result: name of the sum.
        branch: the steps of the branch alone.
        out: name of what the branch gives.
        taken: names of other values that the branch uses.
        live: names of other values of the branch that are used elsewhere.
        beyond: those of them that are tuples of which the first element is not.
        shortcut: the steps of the shortcut; none where it is x itself.
        skip: name of what the shortcut gives.
        skip_taken: names of other values that the shortcut uses.
        post: path of the child that the sum goes through, and nothing else does: its activation.
    """

    number: int = -1
    x: str = ""
    result: str = ""
    branch: tuple[Step, ...] = ()
    out: str = ""
    taken: tuple[str, ...] = ()
    live: tuple[str, ...] = ()
    beyond: frozenset[str] = frozenset()
    shortcut: tuple[Step, ...] = ()
    skip: str = ""
    skip_taken: tuple[str, ...] = ()
    post: str = ""

    @property
    def branch_paths(self) -> frozenset[str]:
        """Attributes of the block that the branch uses."""
        return frozenset(path for step in self.branch for path in step.paths)


_PROPERTIES = ("shape", "dtype", "device", "ndim")
_MEASURES = ("size", "dim")


def find_sums(forward: Forward, questions: Questions) -> list[Sum]:
    """Put a `Sum` in the place of every residual sum of a forward; returns them in the order of their computation."""
    finder = _Finder(forward, questions)
    finder.region(forward.steps)
    finder.absorb(forward.steps)
    found = [step for step in _every(forward.steps) if isinstance(step, Sum)]
    _number(forward.steps, 0)
    return found


def _number(steps: list[Step], number: int) -> int:
    """Number the branches; of two arms only one is taken, so their branches have the same numbers."""
    for step in steps:
        if isinstance(step, Fork):
            number = max(_number(arm, number) for arm in step.arms)
        elif isinstance(step, Sum):
            step.number = number
            number += 1
    return number


def roots_of_results(forward: Forward, questions: Questions) -> list[str | None]:
    """For every value that a forward returns: the name of the argument from which sums lead to it, or None.

    It is asked before `find_sums`.
    """
    finder = _Finder(forward, questions)
    arguments = {value: name for name, value in forward.arguments.items()}
    returned = forward.steps[-1].node
    assert isinstance(returned, ast.Return)
    values = returned.value.elts if isinstance(returned.value, ast.Tuple) else [returned.value]
    results: list[str | None] = []
    for one in values:
        chain = finder.chain(one.id) if isinstance(one, ast.Name) else frozenset()
        starts = [arguments[name] for name in chain if name in arguments]
        results.append(starts[0] if len(starts) == 1 and chain & finder.summed else None)
    return results


def _every(steps: list[Step]) -> Iterator[Step]:
    for step in steps:
        yield from step.walk()


def _dependencies(steps: list[Step]) -> dict[str, frozenset[str]]:
    """For every value all values that it is computed from."""
    depends: dict[str, frozenset[str]] = {}
    for step in steps:
        if isinstance(step, Fork):
            continue
        reads = step.reads - _only_measured(step)
        every = reads.union(*(depends.get(name, frozenset()) for name in reads))
        for name in step.writes:
            depends[name] = depends.get(name, frozenset()) | every
    return depends


def _operands(step: Step) -> tuple[str, str] | None:
    """The two values that a step adds, if that is what it does."""
    if isinstance(step, Sum):
        return step.x, step.out
    node = step.node
    pair: tuple[ast.expr, ast.expr] | None = None
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add) and hasattr(node, "old"):
        pair = node.old, node.value  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        value = node.value
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
            pair = value.left, value.right
        elif isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and not value.keywords:
            name, base = value.func.attr, value.func.value
            if name == "add" and isinstance(base, ast.Name) and base.id == "torch" and len(value.args) == 2:
                pair = value.args[0], value.args[1]
            elif name in ("add", "add_") and "__" in getattr(base, "id", "") and len(value.args) == 1:
                pair = base, value.args[0]
    if pair is None or not all(isinstance(one, ast.Name) for one in pair):
        return None
    names = pair[0].id, pair[1].id  # pyright: ignore[reportAttributeAccessIssue]
    return names if all("__" in name[1:] for name in names) and names[0] != names[1] else None


def _packs(step: Step) -> bool:
    """Whether a step only picks elements or puts values into tuples, for what is returned."""
    if isinstance(step, Sum):
        return False
    if isinstance(step, Fork):
        return not step.effect and all(_packs(one) for arm in step.arms for one in arm)
    node = step.node
    if isinstance(node, ast.Return):
        return True
    value = node.value if isinstance(node, (ast.Assign, ast.AugAssign)) else None
    if isinstance(value, ast.BinOp):
        return isinstance(value.op, ast.Add) and any(
            isinstance(one, (ast.Tuple, ast.List)) for one in (value.left, value.right)
        )
    if isinstance(node, ast.AugAssign):
        return isinstance(value, (ast.Tuple, ast.List))
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        return value.func.id in ("tuple", "list")
    return isinstance(value, (ast.Subscript, ast.Tuple, ast.Name, ast.Starred, ast.Constant, ast.Dict, ast.List))


def _called_alone(step: Step, name: str) -> str:
    """The path of the child that a step calls with this value and nothing else; "" if it does something else."""
    node = step.node
    call = node.value if isinstance(node, ast.Assign) and not isinstance(step, (Sum, Fork)) else None
    if not isinstance(call, ast.Call) or call.keywords or len(call.args) != 1 or step.effect:
        return ""
    (argument,) = call.args
    return (path_of(call.func) or "") if isinstance(argument, ast.Name) and argument.id == name else ""


def _only_measured(step: Step) -> frozenset[str]:
    """Values of which a step looks at the shape, dtype or device, and not at what they hold."""
    looked: set[int] = set()
    for part in walk(step.node):
        call = isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute) and part.func.attr in _MEASURES
        base = part.func if call else part  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(base, ast.Attribute) and (call or base.attr in _PROPERTIES) and isinstance(base.value, ast.Name):
            looked.add(id(base.value))
    names = [part for part in walk(step.node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)]
    return frozenset(part.id for part in names) - {part.id for part in names if id(part) not in looked}


def _looks_up(step: Step, name: str) -> bool:
    """Whether a step takes a value by its key out of a dict."""
    return any(
        isinstance(part, ast.Subscript)
        and isinstance(part.value, ast.Name)
        and part.value.id == name
        and isinstance(part.slice, ast.Constant)
        and isinstance(part.slice.value, str)
        for part in walk(step.node)
    )


def _measures(step: Step) -> bool:
    """Whether a step looks at the shape of one value, and at nothing else."""
    value = step.node.value if isinstance(step.node, ast.Assign) and not isinstance(step, (Sum, Fork)) else None
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "size":
        value = value.func
        return isinstance(value.value, ast.Name) and len(step.reads) == 1
    if isinstance(value, ast.Subscript):
        value = value.value
    return isinstance(value, ast.Attribute) and value.attr == "shape" and isinstance(value.value, ast.Name)


def _checks(step: Step) -> bool:
    """Whether a step only raises an error where something is wrong."""
    if isinstance(step, Fork):
        inside = [one for arm in step.arms for one in arm]
        return any(map(_checks, inside)) and all(_checks(one) or _plain(one) for one in inside)
    return isinstance(step.node, (ast.Assert, ast.Raise))


def _plain(step: Step) -> bool:
    return not step.effect and not step.mutates and not isinstance(step, (Sum, Fork))


class _Finder:
    def __init__(self, forward: Forward, questions: Questions) -> None:
        self.forward, self.questions = forward, questions
        steps = list(_every(forward.steps))
        self.depends = _dependencies(steps)
        self.mutated: dict[str, list[Step]] = {}
        for step in steps:
            for name in step.mutates if not isinstance(step, Fork) else ():
                self.mutated.setdefault(name, []).append(step)
        self.summed: set[str] = set()
        self.chains = self._chains(steps)

    def _chains(self, steps: list[Step]) -> dict[str, frozenset[str]]:
        """For every value those that sums lead from to it, itself among them."""
        chains: dict[str, frozenset[str]] = {}
        for step in steps:
            operands = _operands(step)
            if operands is not None:
                a, b = operands
                earlier = frozenset[str]()
                for x, y in ((a, b), (b, a)):
                    if self.depends.get(y, frozenset()) & chains.get(x, frozenset({x})):
                        earlier |= chains.get(x, frozenset({x}))
                chains[step.writes[0]] = earlier | {step.writes[0]}
                if earlier:
                    self.summed.add(step.writes[0])
            elif isinstance(step.node, ast.Assign) and isinstance(step.node.value, ast.Name) and len(step.writes) == 1:
                source, name = step.node.value.id, step.writes[0]
                chains[name] = chains.get(name, frozenset({name})) | chains.get(source, frozenset({source}))
            elif not isinstance(step, Fork):
                chains.update({name: frozenset({name}) for name in step.writes})  # of a loop, which changes it
        return chains

    def chain(self, name: str) -> frozenset[str]:
        return self.chains.get(name, frozenset({name}))

    def region(self, steps: list[Step]) -> None:
        """Find the sums of one list of steps, the last first: they may contain others."""
        position = len(steps) - 1
        while position >= 0:
            step = steps[position]
            operands = None if isinstance(step, (Sum, Fork)) else _operands(step)
            if operands is not None:
                for a, b in (operands, operands[::-1]):
                    found = self.cut(steps, step, a, b)
                    if found is not None:
                        gone = {*found.branch, *found.shortcut}
                        late = self.late(steps[:position], gone, found.live)
                        earlier = [one for one in steps[:position] if one not in late]
                        rest = (*earlier, found, *late, *steps[position + 1 :])
                        steps[:] = [one for one in rest if one not in gone]
                        position = steps.index(found)
                        break
            position -= 1
        for step in steps:
            if isinstance(step, Fork):
                for arm in step.arms:
                    self.region(arm)
                step.update()

    def late(self, before: list[Step], gone: set[Step], live: tuple[str, ...]) -> list[Step]:
        """The steps before a sum that use values of its branch, and come after it then: they pack what is returned."""
        made, found = set(live), []
        for step in before:
            if step not in gone and made & step.reads:
                found.append(step)
                made |= set(step.writes)
        return found

    def absorb(self, steps: list[Step]) -> None:
        """Let sums have the call of a child right behind them, if that is their only use."""
        for step in list(steps):
            if isinstance(step, Fork):
                for arm in step.arms:
                    self.absorb(arm)
            elif isinstance(step, Sum):
                users = self.users(step.result, {step})
                if len(users) == 1 and users[0] in steps and (path := _called_alone(users[0], step.result)):
                    after = users[0]
                    step.post, step.result = path, after.writes[0]
                    step.writes = (step.result, *step.writes[1:])
                    step.paths |= after.paths
                    steps.remove(after)

    def users(self, name: str, without: set[Step]) -> list[Step]:
        """The steps outside that use a value; a fork that has such steps stands for them."""
        found: list[Step] = []

        def look(steps: list[Step]) -> None:
            for step in steps:
                if step in without:
                    continue
                if isinstance(step, Fork):
                    if name in names_in(step.test):
                        found.append(step)
                    for arm in step.arms:
                        look(arm)
                elif name in step.reads:
                    found.append(step)

        look(self.forward.steps)
        return found

    def cut(self, steps: list[Step], total: Step, a: str, b: str) -> Sum | None:
        """The sum of a shortcut that gives a and a branch that gives b, if it is one."""
        roots = self.chain(a)
        before = steps[: steps.index(total)]
        if self.depends.get(b, frozenset()) & roots:
            start, shortcut = a, []
        else:
            common = self.depends.get(a, frozenset()) & self.depends.get(b, frozenset())
            common = {name for name in common if self.from_arguments(name)}
            order = [name for step in before for name in step.writes if name in common]
            order = order or [name for name in self.forward.arguments.values() if name in common]
            if not order:
                return None
            start = order[-1] if order[0] not in self.forward.arguments.values() else order[0]
            roots = self.chain(start)
            shortcut = self.way(before, a, start)
            if not self.is_shortcut(shortcut):
                return None
        branch = self.branch(steps, total, b, roots, set(shortcut), {a, start})
        if branch is None:
            return None
        collected, live = branch
        if any(_looks_up(step, start) for step in (*collected, *shortcut)):
            return None  # they start from different values of a dict
        paths = frozenset(path for step in collected for path in step.paths)
        every = [*paths, *(path for step in shortcut for path in step.paths)]
        if any(self.questions.ask("parts", path) is None for path in every):
            return None  # what it uses cannot be seen
        if not self.questions.ask("weighs", tuple(sorted(paths))):
            return None
        if shortcut:
            around = frozenset(path for step in shortcut for path in step.paths)
            if not self.questions.ask("lighter", tuple(sorted(around)), tuple(sorted(paths))):
                return None
        taken = self.taken(collected, start)
        sizes = self.sizes(before, taken, start, roots)
        if sizes:
            collected = [*sizes, *collected]
            taken = self.taken(collected, start)
        skip_made = {name for step in shortcut for name in step.writes}
        skip_taken = sorted({name for step in shortcut for name in step.reads} - skip_made - {start})
        if any(self.users(name, {total, *shortcut}) for step in shortcut for name in step.writes):
            # what the shortcut computes is needed elsewhere, or by the branch, too: it stays where it is
            shortcut, skip_taken, start = [], [], a
            taken = self.taken(collected, start)
        for name in {start, *taken, *skip_taken}:
            if any(step is not total for step in self.mutated.get(name, ())):
                return None
        if total.mutates and any(self.users(name, {total, *collected}) for name in total.mutates):
            return None  # somebody else looks at what the sum overwrites
        return Sum(
            total.node,
            frozenset({start, *taken, *skip_taken}),
            (total.writes[0], *live),
            total.paths | paths,
            inside=total.inside,
            x=start,
            result=total.writes[0],
            branch=tuple(collected),
            out=b,
            taken=tuple(taken),
            live=tuple(live),
            beyond=frozenset(name for name in live if self.never_first(name, {total, *collected})),
            shortcut=tuple(shortcut),
            skip=a,
            skip_taken=tuple(skip_taken),
        )

    def taken(self, steps: list[Step], start: str) -> list[str]:
        """Names of the values that steps use, besides those they make and the one they start from."""
        made = {name for step in steps for name in step.writes}
        return sorted({name for step in steps for name in step.reads} - made - {start})

    def sizes(self, before: list[Step], taken: list[str], start: str, roots: frozenset[str]) -> list[Step]:
        """Steps that look at the shape of the running value, once more for a branch: it may get fewer rows."""
        wanted, found = set(taken), []
        for step in reversed(before):
            if wanted & set(step.writes) and _measures(step) and step.reads & roots:
                node = copied(step.node)
                for part in walk(node):
                    if isinstance(part, ast.Name) and part.id in roots:
                        part.id = start  # of the same shape
                found.append(Step(node, frozenset({start}), step.writes, step.paths, inside=step.inside))
        return found[::-1]

    def from_arguments(self, name: str) -> bool:
        """Whether a value is an argument of the forward, or computed from one."""
        arguments = set(self.forward.arguments.values())
        return name in arguments or bool(self.depends.get(name, frozenset()) & arguments)

    def way(self, before: list[Step], name: str, start: str) -> list[Step]:
        """The steps of a list between one value and another that is computed from it."""
        wanted, found = {name}, []
        for step in reversed(before):
            if wanted & set(step.writes) and start not in step.writes:
                found.append(step)
                wanted |= {one for one in step.reads if start in self.depends.get(one, ())}
        return found[::-1]

    def is_shortcut(self, steps: list[Step]) -> bool:
        """Whether steps are what a shortcut consists of: a projection, pooling, a cast, a scale, not a computation."""
        if not steps or len(steps) > 3 or any(isinstance(step, (Sum, Fork)) or step.effect for step in steps):
            return False
        modules = {path for step in steps for path in step.paths if self.questions.ask("weighs", (path,))}
        return len(modules) <= 1 and not any(isinstance(step.node, ast.AugAssign) for step in steps)

    def branch(
        self,
        steps: list[Step],
        total: Step,
        b: str,
        roots: frozenset[str],
        shortcut: set[Step],
        keep: set[str],
    ) -> tuple[list[Step], list[str]] | None:
        """The steps that only the branch needs, and the values of them that are used outside all the same."""
        before = steps[: steps.index(total)]
        wanted: set[str] = {b}
        collected: set[Step] = set()
        for step in reversed(before):
            if step in shortcut or not wanted & set(step.writes) or roots & set(step.writes):
                continue
            if step.effect or keep & set(step.writes):
                continue
            collected.add(step)
            wanted |= step.reads
        while True:
            out = self.outside(steps, collected, total)
            if out is None:
                break
            collected -= self.upstream(collected, out)
        if not any(b in step.writes for step in collected):
            return None
        made = {name for step in collected for name in step.writes}
        # what only picks from, or checks, values of the branch belongs to it
        for step in steps:
            if step in collected or step is total or step in shortcut or isinstance(step.node, ast.Return):
                continue
            if step.reads and step.reads <= made and ((_packs(step) and _plain(step)) or _checks(step)):
                collected.add(step)
                made |= set(step.writes)
        ordered = [step for step in steps if step in collected]
        outside = {*collected, total}
        live = [name for step in ordered for name in step.writes if self.users(name, outside)]
        return ordered, live

    def outside(self, steps: list[Step], collected: set[Step], total: Step) -> Step | None:
        """A step of which something is used outside for more than what the forward returns."""
        made = {name for step in collected for name in step.writes}
        for step in collected:
            for name in step.writes:
                for user in self.users(name, {*collected, total}):
                    if user in steps and _checks(user) and user.reads <= made:
                        continue
                    if not self.only_returned(user):
                        return step
        return None

    def never_first(self, name: str, inside: set[Step]) -> bool:
        """Whether of a value only elements from the second on are used outside."""
        for user in self.users(name, inside):
            for step in user.walk():
                if name not in step.reads or isinstance(step, Fork):
                    continue
                value = step.node.value if isinstance(step.node, ast.Assign) else None
                if not isinstance(value, ast.Subscript) or names_in(value) != {name}:
                    return False
                first = value.slice.lower if isinstance(value.slice, ast.Slice) else value.slice
                if not (isinstance(first, ast.Constant) and isinstance(first.value, int) and first.value > 0):
                    return False
        return True

    def only_returned(self, step: Step) -> bool:
        """Whether what a step makes is only packed and returned."""
        if not _packs(step):
            return False
        return all(self.only_returned(user) for name in step.writes for user in self.users(name, {step}))

    def upstream(self, collected: set[Step], last: Step) -> set[Step]:
        """A step, and those that it needs."""
        gone, wanted = {last}, set(last.reads)
        changed = True
        while changed:
            changed = False
            for step in collected - gone:
                if wanted & set(step.writes):
                    gone.add(step)
                    wanted |= step.reads
                    changed = True
        return gone
