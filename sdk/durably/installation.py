"""What of durably is installed beside the SDK."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from durably.errors import ConfigurationError

if TYPE_CHECKING:
    from types import ModuleType


def processor_module(name: str) -> ModuleType:
    """A module of the processor, found by name: the SDK stands below it and cannot import it.

    Raises:
        ConfigurationError: there is no processor in this installation.
    """
    try:
        return importlib.import_module(f"durably_processor.{name}")
    except ModuleNotFoundError as e:
        if not (e.name or "").startswith("durably_processor"):
            raise
        raise ConfigurationError(
            f"this installation has no processor ({e.name} is missing): install the whole distribution, pip install durably"
        ) from e
