"""Every exception numagraft raises. Each is also a builtin kind. Imports nothing.

NumagraftError
├── RuleError(ValueError)            a rule file, an override or a preset is wrong; lists every problem with file:line:column
├── PlanError(ValueError)            rules and model do not go together, or the plan does not fit this machine
├── ConfigurationError(ValueError)   an environment variable, an argument or a setting is wrong
├── CheckpointError(ValueError)      a checkpoint is damaged, incomplete, of another model, or quantised by others
├── WeightError(ValueError)          one tensor has the wrong shape or dtype, came twice, or never came
├── PlacementError(RuntimeError)     memory could not be placed as asked, or the proof failed
├── PlatformError(OSError)           the machine, or a dump of one, cannot be read
└── UnsupportedOperationError(RuntimeError)   not possible on a grafted model (save_pretrained, deepcopy, to another dtype...)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong: where, what was found and expected, and what to do next."""

    where: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n    {self.hint}" if self.hint else text


class NumagraftError(Exception):
    """Base of all of them; `problems` holds every offender, in a stable order."""

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join([message, *(f"  {problem}" for problem in self.problems)]))


class RuleError(NumagraftError, ValueError):
    """A rule file, an override or a preset is wrong; lists every problem with file:line:column."""


class PlanError(NumagraftError, ValueError):
    """Rules and model do not go together, or the plan does not fit this machine."""


class ConfigurationError(NumagraftError, ValueError):
    """An environment variable, an argument or a setting is wrong."""


class CheckpointError(NumagraftError, ValueError):
    """A checkpoint is damaged, incomplete, of another model, or quantised by others."""


class WeightError(NumagraftError, ValueError):
    """One tensor has the wrong shape or dtype, came twice, or never came."""


class PlacementError(NumagraftError, RuntimeError):
    """Memory could not be placed as asked, or the proof failed."""


class PlatformError(NumagraftError, OSError):
    """The machine, or a dump of one, cannot be read."""


class UnsupportedOperationError(NumagraftError, RuntimeError):
    """Not possible on a grafted model: saving, copying, another dtype or device, training."""
