"""The error that a person at the command line can act on, and the questions that configurations ask."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


class UserError(RuntimeError):
    """Something in the data, a file or the command is not as wanted; the message alone says what to do."""


def require(config: Any, wanted: str, fits: Callable[[Any], bool], *names: str) -> None:
    """Raises ValueError for the first of the fields `names` that does not fit; None, where a field has it, does."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not fits(value):
            raise ValueError(f"{name}: got {value!r}, wanted {wanted}")


def require_positive(config: Any, *names: str, most: int = 2**31 - 1) -> None:
    """Whole numbers from 1 on."""
    require(config, "at least 1", lambda value: value >= 1, *names)
    require(config, f"at most {most}", lambda value: value <= most, *names)


def require_share(config: Any, *names: str) -> None:
    """Real numbers in 0 .. 1."""
    require(config, "0 to 1", lambda value: 0 <= value <= 1, *names)


def require_amount(config: Any, *names: str) -> None:
    """Finite real numbers from 0 on."""
    require(config, "a finite number, at least 0", lambda value: 0 <= value < math.inf, *names)


MOST_SIZE = 2**20
"""Of one side of a model; what is larger by a slip is refused before memory is asked for it."""


def require_seed(config: Any) -> None:
    require(config, "0 to 2**63 - 1", lambda value: 0 <= value < 2**63, "seed")
