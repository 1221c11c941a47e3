"""What modules declare: the connectors that ``durably connectors`` is to run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from durably.errors import ConfigurationError

if TYPE_CHECKING:
    from durably_schemas import Catalogue

    from durably_connectors.faust.app import App


class _Ignore:
    """See `IGNORE`."""

    def __repr__(self) -> str:
        return "IGNORE"


IGNORE: Any = _Ignore()
"""What a connector's function returns for something that is not to be passed on."""


class Connector(Protocol):
    """Something that takes records from topics, in one app.

    Attributes:
        name: no other connector of the process has it.
    """

    name: str

    def topics(self, catalogue: Catalogue) -> list[str]:
        """The topics that must be there: those that it reads or writes, of the user's own."""

    def attach(self, app: App) -> None:
        """Adds its agents and tables to an app."""


class Connectors:
    """Connectors by name."""

    def __init__(self) -> None:
        self._connectors: dict[str, Connector] = {}

    def add(self, connector: Connector) -> None:
        """Raises `ConfigurationError` where the name is taken."""
        if connector.name in self._connectors:
            raise ConfigurationError(f"two connectors are named {connector.name!r}: rename one of the functions")
        self._connectors[connector.name] = connector

    def all(self) -> list[Connector]:
        """In the order of their declaration."""
        return list(self._connectors.values())


declared = Connectors()
"""Those of this process."""
