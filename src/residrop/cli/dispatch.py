"""From a name on the command line to the module that does what it asks for, which is imported only then."""

import importlib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from residrop.common.errors import ConfigError

__all__ = ["dispatch"]


def dispatch(package: str, what: str, names: Iterable[str], usage: str, arguments: Sequence[str], prog: str) -> int:
    """Call `run(arguments, prog)` of a module of `package`, the one that the first argument names.

    Args:
        package: dotted name of the package.
        what: what the names are called in messages, such as "command".
        names: the modules to choose from.
        usage: printed where the first argument is missing or asks for help.
        arguments: the name and what follows it.
        prog: the words before the name, for help texts.

    Returns:
        The exit code.

    Raises:
        ConfigError: the name is unknown.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage, end="")
        return 0
    name, *rest = arguments
    if name not in names:
        close = get_close_matches(name, names, n=1)
        advice = f"did you mean {close[0]}? {prog} --help lists all" if close else f"choose one of {', '.join(names)}"
        raise ConfigError(f"{what} {name!r} is unknown; {advice}")
    return importlib.import_module(f"{package}.{name}").run(rest, f"{prog} {name}")
