"""The module-level functions: they work in workflows, in steps and elsewhere, by the client that each place has.

In a step that is the worker's own client; outside of runs it is the default client, of ``DURABLY_URL``. In workflow code
starting a run and waiting for one is recorded; what else talks to the broker belongs into a step.
"""

from __future__ import annotations

import atexit
import os
import threading
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast, overload

from durably.client.client import AsyncClient
from durably.errors import ConfigurationError, DurablyError
from durably.runtime import step_context, workflow_context
from durably.settings import URL_FORMS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from durably_schemas.records import RunSummary

    from durably.authoring import WorkflowDefinition
    from durably.children import OnParentEnd
    from durably.client.client import AsyncStarter
    from durably.client.hooks import HookInfo
    from durably.client.run import AsyncRun
    from durably.durations import Duration
    from durably.web import Request, Response

P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.Lock()
_client: AsyncClient | None = None


def default_client() -> AsyncClient:
    """The process's client, made at the first call and closed at exit. Raises `ConfigurationError` without a URL."""
    global _client  # noqa: PLW0603 - one for the process is what it is for
    with _lock:
        if _client is None:
            if not os.environ.get("DURABLY_URL"):
                raise ConfigurationError(
                    f"durably's own functions, called outside of workflows and steps, need to know the broker: set "
                    f"DURABLY_URL, to {URL_FORMS}, or use a client of your own: AsyncClient(url)"
                )
            _client = AsyncClient()
            atexit.register(_close, _client)
        return _client


@overload
async def start(workflow: WorkflowDefinition[P, R], /, *args: P.args, **kwargs: P.kwargs) -> AsyncRun[R]: ...
@overload
async def start(workflow: str, /, *args: Any, **kwargs: Any) -> AsyncRun[Any]: ...
async def start(workflow: WorkflowDefinition[..., Any] | str, /, *args: Any, **kwargs: Any) -> AsyncRun[Any]:
    """Starts a run; returns when the broker has the start durably.

    In a workflow the start is recorded, and the new run is its child: of the result, `id`, ``await result()`` and
    ``cancel()`` work there, and ``durably.options(on_parent_end="cancel")`` ends it with its parent. In a step a
    retried attempt starts another run, unless ``durably.options(run_id=…)`` names it.

    Args:
        workflow: a function marked ``@workflow``, or the name of one.
        *args: its positional arguments, checked against its signature where that is known.
        **kwargs: its keyword arguments.

    Raises:
        TypeError: the arguments do not fit.
        SerializationError: an argument cannot be written; names it.
        RecordTooLarge: the arguments are larger than a record may be.
        ConfigurationError: topics are missing, or outside of runs there is no ``DURABLY_URL``.
        BrokerUnreachable: nobody acknowledged the start; it may come through yet.
    """
    if workflow_context() is not None:
        from durably import children  # for workflow code only

        return cast("AsyncRun[Any]", await children.start(workflow, *args, **kwargs))
    return await _here().start(workflow, *args, **kwargs)


def options(
    *,
    run_id: str | None = None,
    attributes: Mapping[str, str] | None = None,
    delay: Duration | None = None,
    on_parent_end: OnParentEnd | None = None,
) -> AsyncStarter:
    """How a run is to be started: ``await durably.options(run_id="order-7").start(fulfil, "7")``.

    Args:
        run_id: an id of your own; starting it again attaches to the first run.
        attributes: texts to find the run by.
        delay: how long, or until when, the run waits before its workflow begins.
        on_parent_end: in a workflow: whether the run is cancelled when its parent ends (``"cancel"``), or goes on
            (``"abandon"``, the default).

    Raises:
        ConfigurationError: no run may have this id.
        DurablyError: ``on_parent_end`` outside of a workflow, where a run has no parent.
    """
    if workflow_context() is not None:
        from durably import children  # for workflow code only

        made = children.options(
            run_id=run_id, attributes=attributes, delay=delay, on_parent_end=on_parent_end or "abandon"
        )
        return cast("AsyncStarter", made)
    if on_parent_end is not None:
        raise DurablyError(
            f"on_parent_end={on_parent_end!r}: only a run that a workflow starts has a parent; start it in the workflow"
        )
    return _here().options(run_id=run_id, attributes=attributes, delay=delay)


def get_run(run_id: str) -> AsyncRun[Any]:
    """A run by its id; no I/O. In a workflow ``await result()`` of it is recorded.

    Raises:
        ConfigurationError: no run may have this id, or outside of runs there is no ``DURABLY_URL``.
    """
    if workflow_context() is not None:
        from durably import children  # for workflow code only

        return cast("AsyncRun[Any]", children.get_run(run_id))
    return _here().get_run(run_id)


async def resume_hook(token: str, payload: Any = None, *, resume_id: str | None = None) -> RunSummary:
    """As `AsyncClient.resume_hook`. Raises `DurablyError` in a workflow."""
    _outside("resume_hook")
    return await _here().resume_hook(token, payload, resume_id=resume_id)


async def resume_webhook(token: str, request: Request) -> Response:
    """As `AsyncClient.resume_webhook`. Raises `DurablyError` in a workflow."""
    _outside("resume_webhook")
    return await _here().resume_webhook(token, request)


async def get_hook_by_token(token: str) -> HookInfo:
    """As `AsyncClient.get_hook`. Raises `DurablyError` in a workflow."""
    _outside("get_hook_by_token")
    return await _here().get_hook(token)


def _close(client: AsyncClient) -> None:
    # No event loop is left to close it properly.
    client._feeds.close()  # noqa: SLF001
    client._connection.close()  # noqa: SLF001


def _here() -> AsyncClient:
    step = step_context.get()
    return default_client() if step is None else step.services.client()


def _outside(name: str) -> None:
    if workflow_context() is not None:
        raise DurablyError(f"{name}() talks to the broker, which a workflow must not: call it in a step")
