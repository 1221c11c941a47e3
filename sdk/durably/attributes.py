"""Attributes of runs: texts to find them by. They stand in every summary of a run, so their size is limited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from durably.errors import RecordTooLarge

if TYPE_CHECKING:
    from collections.abc import Mapping

LIMIT = 16_384
"""Bytes of all attributes of a run, names and values, in UTF-8."""


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
    size = sum(
        len(text.encode("utf-8", "surrogatepass")) for pair in attributes.items() for text in pair if text is not None
    )
    if size > LIMIT:
        raise RecordTooLarge(
            f"the attributes of a run have {LIMIT:,} bytes at most, names and values, and these have {size:,}: "
            "keep data in arguments and results, and in attributes what to search by"
        )
