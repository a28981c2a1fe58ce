"""Checks of arguments, the same words for each."""

from typing import Any, get_args


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuses a value that is none of a ``Literal``'s.

    Raises:
        ValueError: names those that there are.
    """
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_count(name: str, value: object) -> None:
    """Refuses what is no whole number from 1.

    Raises:
        ValueError: says the value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
