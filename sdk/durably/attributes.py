"""Attributes of runs: texts to find them by. They stand in every summary of a run, so their size is limited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from durably.errors import RecordTooLarge

if TYPE_CHECKING:
    from collections.abc import Mapping

LIMIT = 16_384
"""Characters of all attributes of a run, names and values."""


def checked(attributes: Mapping[Any, Any] | None) -> dict[str, str]:
    """The same attributes.

    Raises:
        TypeError: a name or a value is no text.
        RecordTooLarge: they are longer than `LIMIT`.
    """
    for name, value in (attributes or {}).items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"attribute {name!r}={value!r}: names and values of attributes are texts")
    found = dict(attributes or {})
    check_size(found)
    return found


def check_size(attributes: Mapping[str, str | None]) -> None:
    """Raises `RecordTooLarge` for attributes that are longer than `LIMIT`."""
    size = sum(len(name) + len(value or "") for name, value in attributes.items())
    if size > LIMIT:
        raise RecordTooLarge(
            f"the attributes of a run have {LIMIT:,} characters at most, names and values, and these have {size:,}: "
            "keep data in arguments and results, and in attributes what to search by"
        )
