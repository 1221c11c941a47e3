"""Signatures of workflows and steps, prepared for checking and converting arguments quickly."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from durably.conversion import convert, hints_of

if TYPE_CHECKING:
    from collections.abc import Callable


class Signature:
    """A function's parameters, prepared for checking and converting arguments quickly."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.name = getattr(fn, "__qualname__", repr(fn)).rpartition(".<locals>.")[2]
        self.signature = inspect.signature(fn)
        hints = hints_of(inspect.unwrap(fn))
        self.result = hints.get("return", Any)
        self.by_position: list[tuple[str, Any]] = []
        self.by_name: dict[str, Any] = {}
        self.more: tuple[str, Any] | None = None
        self.more_names: Any = None
        needed: list[str] = []
        for p in self.signature.parameters.values():
            hint = hints.get(p.name, Any)
            if p.kind is p.VAR_POSITIONAL:
                self.more = (p.name, hint)
                continue
            if p.kind is p.VAR_KEYWORD:
                self.more_names = hint
                continue
            if p.kind is not p.KEYWORD_ONLY:
                self.by_position.append((p.name, hint))
            if p.kind is not p.POSITIONAL_ONLY:
                self.by_name[p.name] = hint
            if p.default is p.empty:
                needed.append(p.name)
        names = [name for name, _ in self.by_position]
        # For n positional arguments: the names that are taken by them, and those that must be given by keyword.
        self.taken = [frozenset(names[:n]) for n in range(len(names) + 1)]
        self.missing = [frozenset(needed) - taken for taken in self.taken]

    def check(self, args: list[Any] | tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises `TypeError`, naming the function and the misfit."""
        n = len(args)
        given = kwargs.keys()
        if (
            n < len(self.taken)
            and given <= self.by_name.keys()
            and given.isdisjoint(self.taken[n])
            and self.missing[n] <= given
        ):
            return
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as e:
            raise TypeError(f"{self.name}(): {e}") from None

    def parameter(self, path: str) -> str:
        """A path within ``[args, kwargs]`` in terms of the parameters: ``[0][1].x`` is ``'cents'.x``."""
        where, _, rest = path[1:].partition("][")
        first, _, rest = rest.partition("]")
        if where == "1":
            return f"{first}{rest}"
        n = int(first)
        if n < len(self.by_position):
            return f"{self.by_position[n][0]!r}{rest}"
        return f"{'*' + self.more[0] if self.more else n!r}[{n - len(self.by_position)}]{rest}"

    def convert(self, args: list[Any], kwargs: dict[str, Any], *, textual: bool) -> None:
        """Makes the arguments, in place, what the annotations say. Raises `SerializationError` for one that does not fit."""
        named = self.by_position
        for i, value in enumerate(args):
            name, hint = named[i] if i < len(named) else self.more or ("", Any)
            if hint is not Any and hint is not type(value):
                args[i] = convert(value, hint, textual=textual, what=f"{self.name}(): argument {name!r}")
        for name, value in kwargs.items():
            hint = self.by_name.get(name, self.more_names or Any)
            if hint is not Any and hint is not type(value):
                kwargs[name] = convert(value, hint, textual=textual, what=f"{self.name}(): argument {name!r}")


signature_of = lru_cache(maxsize=4096)(Signature)
"""The signature of a function; cached, since taking it costs more than a step."""
