"""Argument checks that several classes share, so that their messages are the same."""

from typing import Any, get_args


def check_choice(name: str, value: object, choices: Any) -> None:
    """Checks that a value is one of the values of a ``Literal``.

    Raises:
        ValueError: it is not; the message lists the allowed values.
    """
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_count(name: str, value: object) -> None:
    """Checks that a value is a whole number, at least 1.

    Raises:
        ValueError: it is not; the message contains the value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
