"""Errors that a user can act on. Every message says what was given, what is allowed and what to do."""

__all__ = [
    "ConfigError",
    "DataError",
    "InactiveWarning",
    "Interrupted",
    "MissingExtraError",
    "PlanError",
    "RankError",
    "RunError",
    "SaidElsewhere",
    "SharedBlockWarning",
    "SpreadError",
    "SpreadWarning",
    "UsageError",
]


class UsageError(ValueError):
    """Bad input. The command line prints it as one line and exits with code 2."""


class ConfigError(UsageError):
    """A rate, name, option or combination of options that residrop does not accept."""


class SpreadError(ConfigError):
    """Times that differ too much from step to step to tell what a block costs."""


class DataError(UsageError):
    """A data source that is missing, incomplete or corrupt. The message names the file."""


class RankError(UsageError):
    """Processes of a distributed run that disagree about what they train. The message names the ranks."""


class RunError(UsageError):
    """A run directory that is missing, incomplete or does not fit the request."""


class SaidElsewhere(UsageError):
    """An error that another process of a distributed training reports; this process ends without a message."""


class MissingExtraError(UsageError, ImportError):
    """An optional package that is not installed. The message has the command that installs it."""


class PlanError(UsageError, RuntimeError):
    """A rule was run without a draw, or with a draw made for another model."""


class Interrupted(Exception):
    """A training was stopped by Ctrl-C or SIGTERM, and its state was saved. The message says how to continue it."""


class SharedBlockWarning(UserWarning):
    """A block is called several times in one forward, and all its calls have one coin."""


class InactiveWarning(UserWarning):
    """Rules are in place but change nothing: all rates are 1, or no training forward ever drew."""


class EmptyStepWarning(UserWarning):
    """A training step in which no block that is trained is present, so that nothing can be learnt from it."""


class NotFiniteWarning(UserWarning):
    """A model gives NaN or infinity for some inputs, whose predictions mean nothing."""


class SpreadWarning(UserWarning):
    """Times were too uncertain for a budget of time, and FLOPs took their place."""
