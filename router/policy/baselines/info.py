"""What is told about a policy: where it comes from, what can be tuned, what of the original was left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from twinpool.router.policy.base import Policy

Value = float | int | str


@dataclass(frozen=True)
class Parameter:
    """One number or word that a policy takes. A default that is an int takes whole numbers only.

    ``low`` and ``high`` are the range that is accepted and searched in, both included; a word has ``choices`` instead.
    """

    default: Value
    low: float = 0.0
    high: float = 0.0
    help: str = ""
    choices: tuple[str, ...] = ()

    def figures(self) -> dict[str, object]:
        """As plain values for a JSON report."""
        span = {"choices": list(self.choices)} if self.choices else {"low": self.low, "high": self.high}
        return {"default": self.default, "help": self.help, **span}


@dataclass(frozen=True)
class PolicyInfo:
    """A policy that can be made by name."""

    name: str
    summary: str  # the rule, in a line
    source: str  # project or paper, with its version
    left_out: str  # of the original
    make: Callable[..., Policy]  # takes the parameters by name; all have defaults
    parameters: dict[str, Parameter] = field(default_factory=dict)

    def figures(self) -> dict[str, object]:
        """All of it but ``make``, as plain values for a JSON report."""
        return {
            "name": self.name,
            "summary": self.summary,
            "source": self.source,
            "left_out": self.left_out,
            "parameters": {name: parameter.figures() for name, parameter in self.parameters.items()},
        }
