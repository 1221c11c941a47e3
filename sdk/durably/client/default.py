"""The default client, of ``DURABLY_URL``, behind the module-level functions."""

from __future__ import annotations

import atexit
import threading
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from durably.client.client import AsyncClient
from durably.errors import DurablyError
from durably.runtime import workflow_context

if TYPE_CHECKING:
    from durably.authoring import WorkflowDefinition
    from durably.client.run import AsyncRun

P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.Lock()
_client: AsyncClient | None = None


def default_client() -> AsyncClient:
    """The process's client, made at the first call and closed at exit. Raises `ConfigurationError` without a URL."""
    global _client  # noqa: PLW0603 - one for the process is what it is for
    with _lock:
        if _client is None:
            _client = AsyncClient()
            atexit.register(_client._connection.close)  # noqa: SLF001 - no event loop is left to close it properly
        return _client


@overload
async def start(workflow: WorkflowDefinition[P, R], /, *args: P.args, **kwargs: P.kwargs) -> AsyncRun[R]: ...
@overload
async def start(workflow: str, /, *args: Any, **kwargs: Any) -> AsyncRun[Any]: ...
async def start(workflow: WorkflowDefinition[..., Any] | str, /, *args: Any, **kwargs: Any) -> AsyncRun[Any]:
    """`AsyncClient.start` of the default client. Raises `DurablyError` in a workflow."""
    _outside("start")
    return await default_client().start(workflow, *args, **kwargs)


def get_run(run_id: str) -> AsyncRun[Any]:
    """`AsyncClient.get_run` of the default client. Raises `DurablyError` in a workflow."""
    _outside("get_run")
    return default_client().get_run(run_id)


def _outside(name: str) -> None:
    if workflow_context() is not None:
        raise DurablyError(f"{name}() talks to the broker, which a workflow must not: call it in a step")
