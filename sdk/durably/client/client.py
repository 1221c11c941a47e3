"""`Client` for threads and `AsyncClient` for tasks, with the same names in the same order."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar, overload

from durably_schemas import Catalogue

from durably.broker import connect
from durably.client.connection import Connection
from durably.client.exchange import submit, submit_async
from durably.client.feeds import Feeds
from durably.client.listing import DEFAULT_LIMIT, list_runs
from durably.client.run import AsyncRun, Run
from durably.client.starting import NamedOptions, StartOptions, call
from durably.errors import ConfigurationError
from durably.identifiers import checked_run_id
from durably.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from types import TracebackType

    from durably_schemas.records import Payload, RunStatus, RunSummary

    from durably.authoring import WorkflowDefinition
    from durably.broker.port import Broker
    from durably.client.hooks import HookInfo
    from durably.durations import Duration
    from durably.web import Request, Response

P = ParamSpec("P")
R = TypeVar("R")


def _connection(
    url: str | Broker | None, namespace: str | None, kafka: Mapping[str, str] | None, timeout: float
) -> Connection:
    if url is None or isinstance(url, str):
        settings = Settings.from_environment(url=url, namespace=namespace, kafka=kafka)
        return Connection(
            connect(settings.url, settings.kafka, own=False), settings.catalogue, timeout=timeout, owned=True
        )
    return Connection(url, Catalogue(namespace or "durably"), timeout=timeout)


def _named(workflow: str) -> str:
    if not workflow:
        raise ConfigurationError("the workflow's name is empty: give a function marked @workflow, or the name of one")
    return workflow


class Starter:
    """Starts runs in one certain way. Made by `Client.options`."""

    def __init__(self, connection: Connection, options: StartOptions, feeds: Feeds | None = None) -> None:
        self._connection = connection
        self._options = options
        self._feeds = feeds or Feeds(connection)

    @overload
    def start(self, workflow: WorkflowDefinition[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Run[R]: ...
    @overload
    def start(self, workflow: str, /, *args: Any, **kwargs: Any) -> Run[Any]: ...
    def start(self, workflow: WorkflowDefinition[..., Any] | str, /, *args: Any, **kwargs: Any) -> Run[Any]:
        """As `Client.start`."""
        options = self._options.named()
        args, kwargs, feeds = self._feeds.take(options.run_id, args, kwargs)
        name, payload, returns = call(workflow, args, kwargs)
        run = self._submit(options, name, payload, returns)
        self._feeds.start(feeds)
        return run

    def start_payload(self, workflow: str, payload: Payload) -> Run[Any]:
        """Starts a workflow by name, with an input that is encoded already.

        Args:
            workflow: the name.
            payload: ``application/json``: a list holds positional arguments, an object keywords. Or ``application/msgpack``.
        """
        return self._submit(self._options.named(), workflow, payload, None)

    def _submit(self, options: NamedOptions, name: str, payload: Payload, returns: Any) -> Run[Any]:
        command = options.command(_named(name), payload, now=self._connection.now())
        submit(self._connection, command)
        return Run(self._connection, command.run_id, returns)


class AsyncStarter:
    """Starts runs in one certain way. Made by `AsyncClient.options`."""

    def __init__(self, connection: Connection, options: StartOptions, feeds: Feeds | None = None) -> None:
        self._connection = connection
        self._options = options
        self._feeds = feeds or Feeds(connection)

    @overload
    async def start(self, workflow: WorkflowDefinition[P, R], /, *args: P.args, **kwargs: P.kwargs) -> AsyncRun[R]: ...
    @overload
    async def start(self, workflow: str, /, *args: Any, **kwargs: Any) -> AsyncRun[Any]: ...
    async def start(self, workflow: WorkflowDefinition[..., Any] | str, /, *args: Any, **kwargs: Any) -> AsyncRun[Any]:
        """As `AsyncClient.start`."""
        options = self._options.named()
        args, kwargs, feeds = self._feeds.take(options.run_id, args, kwargs)
        name, payload, returns = call(workflow, args, kwargs)
        run = await self._submit(options, name, payload, returns)
        await self._feeds.start_async(feeds)
        return run

    async def start_payload(self, workflow: str, payload: Payload) -> AsyncRun[Any]:
        """Starts a workflow by name, with an input that is encoded already.

        Args:
            workflow: the name.
            payload: ``application/json``: a list holds positional arguments, an object keywords. Or ``application/msgpack``.
        """
        return await self._submit(self._options.named(), workflow, payload, None)

    async def _submit(self, options: NamedOptions, name: str, payload: Payload, returns: Any) -> AsyncRun[Any]:
        command = options.command(_named(name), payload, now=self._connection.now())
        await submit_async(self._connection, command)
        return AsyncRun(self._connection, command.run_id, returns)


class Client:
    """Starts runs and follows them, for code in threads. Thread-safe; a context manager.

    Args:
        url: ``kafka://host:port`` or ``embedded:PATH``, ``DURABLY_URL`` by default; or a `Broker`, which the client then
            does not close.
        namespace: the prefix of the topics; ``DURABLY_NAMESPACE``, else ``"durably"``, by default.
        kafka: properties for librdkafka, beside those of ``DURABLY_KAFKA_*``.
        timeout: seconds to wait for an acknowledgement or a processor's answer; not for a run's result.

    Raises:
        ConfigurationError: no URL, or a setting that cannot be.
    """

    def __init__(
        self,
        url: str | Broker | None = None,
        *,
        namespace: str | None = None,
        kafka: Mapping[str, str] | None = None,
        timeout: float = 30,
    ) -> None:
        self._connection = _connection(url, namespace, kafka, timeout)
        self._feeds = Feeds(self._connection)

    @overload
    def start(self, workflow: WorkflowDefinition[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Run[R]: ...
    @overload
    def start(self, workflow: str, /, *args: Any, **kwargs: Any) -> Run[Any]: ...
    def start(self, workflow: WorkflowDefinition[..., Any] | str, /, *args: Any, **kwargs: Any) -> Run[Any]:
        """Starts a run; returns when the broker has the start durably.

        Args:
            workflow: a function marked ``@workflow``, or the name of one.
            *args: its positional arguments, checked against its signature where that is known. An iterator among
                them, async or not, reaches the workflow as a `Readable`: a stream that this client writes, until the
                iterator ends, the run does, or the client is closed.
            **kwargs: its keyword arguments; as above.

        Raises:
            TypeError: the arguments do not fit.
            SerializationError: an argument cannot be written; names it.
            RecordTooLarge: the arguments are larger than a record may be.
            ConfigurationError: topics are missing.
            BrokerUnreachable: nobody acknowledged the start; it may come through yet.
        """
        return Starter(self._connection, StartOptions(), self._feeds).start(workflow, *args, **kwargs)

    def options(
        self,
        *,
        run_id: str | None = None,
        attributes: Mapping[str, str] | None = None,
        delay: Duration | None = None,
    ) -> Starter:
        """What the starts through the result have in common: ``client.options(run_id="order-7").start(fulfil, "7")``.

        Args:
            run_id: an id of your own; starting it again attaches to the first run.
            attributes: texts to find the run by.
            delay: how long, or until when, the run waits before its workflow begins.

        Raises:
            ConfigurationError: no run may have this id.
        """
        options = StartOptions(run_id=run_id, attributes=attributes or {}, delay=delay)
        return Starter(self._connection, options, self._feeds)

    def get_run(self, run_id: str) -> Run[Any]:
        """A run by its id; no I/O. Raises `ConfigurationError` where no run may have this id."""
        return Run(self._connection, checked_run_id(run_id))

    def rerun(self, run_id: str, *, new_id: str | None = None) -> Run[Any]:
        """Starts a new run of the same workflow, with the same input and attributes; its ``origin`` is the old one.

        Args:
            run_id: the old one; it may have ended or not.
            new_id: an id for the new one; an existing run of this id is attached to.

        Raises:
            RunNotFoundError: there is no such run.
            ConfigurationError: no run may have one of these ids.
        """
        return self.get_run(run_id).rerun(run_id=new_id)

    def reset(self, run_id: str, to_event: int, *, reason: str | None = None) -> Run[Any]:
        """As `Run.reset`, of the run with this id."""
        return self.get_run(run_id).reset(to_event, reason=reason)

    def runs(
        self,
        *,
        workflow: str | None = None,
        status: RunStatus | Collection[RunStatus] | None = None,
        attributes: Mapping[str, str] | None = None,
        limit: int | None = DEFAULT_LIMIT,
    ) -> list[RunSummary]:
        """Runs that match, newest first; at most ``limit``, None for all."""
        return list_runs(self._connection, workflow=workflow, status=status, attributes=attributes, limit=limit)

    def resume_hook(self, token: str, payload: Any = None, *, resume_id: str | None = None) -> RunSummary:
        """Hands data to the hook with this token; returns the run as it is once its log has them.

        Args:
            token: the hook's.
            payload: any value that can travel.
            resume_id: names this delivery: a second one of the same name is dropped, and answered as the first was.

        Raises:
            HookNotFoundError: no open hook has this token.
            SerializationError: the payload cannot travel.
            TimeoutError: no processor answered.
        """
        from durably.client import hooks  # most clients ask for none

        return hooks.resume_hook(self._connection, token, payload, resume_id)

    def resume_webhook(self, token: str, request: Request) -> Response:
        """Hands a request to the webhook with this token, as the gateway does; returns what it answers.

        Raises:
            HookNotFoundError: no open webhook has this token.
            TimeoutError: no processor answered, or no step did where the webhook responds by one.
        """
        from durably.client import hooks  # most clients ask for none

        return hooks.resume_webhook(self._connection, token, request)

    def get_hook(self, token: str) -> HookInfo:
        """The open hook with this token. Raises `HookNotFoundError` where there is none."""
        from durably.client import hooks  # most clients ask for none

        return hooks.get_hook(self._connection, token)

    def close(self) -> None:
        """Flushes and lets go. What still waits for an answer fails with a `DurablyError`.

        Iterators that were passed to starts are drawn to their end first, for ``timeout`` seconds at most.
        """
        self._feeds.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """Starts runs and follows them, for code in tasks. An async context manager; not bound to one event loop.

    Args:
        url: ``kafka://host:port`` or ``embedded:PATH``, ``DURABLY_URL`` by default; or a `Broker`, which the client then
            does not close.
        namespace: the prefix of the topics; ``DURABLY_NAMESPACE``, else ``"durably"``, by default.
        kafka: properties for librdkafka, beside those of ``DURABLY_KAFKA_*``.
        timeout: seconds to wait for an acknowledgement or a processor's answer; not for a run's result.

    Raises:
        ConfigurationError: no URL, or a setting that cannot be.
    """

    def __init__(
        self,
        url: str | Broker | None = None,
        *,
        namespace: str | None = None,
        kafka: Mapping[str, str] | None = None,
        timeout: float = 30,
    ) -> None:
        self._connection = _connection(url, namespace, kafka, timeout)
        self._feeds = Feeds(self._connection)

    @overload
    async def start(self, workflow: WorkflowDefinition[P, R], /, *args: P.args, **kwargs: P.kwargs) -> AsyncRun[R]: ...
    @overload
    async def start(self, workflow: str, /, *args: Any, **kwargs: Any) -> AsyncRun[Any]: ...
    async def start(self, workflow: WorkflowDefinition[..., Any] | str, /, *args: Any, **kwargs: Any) -> AsyncRun[Any]:
        """Starts a run; returns when the broker has the start durably.

        Args:
            workflow: a function marked ``@workflow``, or the name of one.
            *args: its positional arguments, checked against its signature where that is known. An iterator among
                them, async or not, reaches the workflow as a `Readable`: a stream that this client writes, until the
                iterator ends, the run does, or the client is closed.
            **kwargs: its keyword arguments; as above.

        Raises:
            TypeError: the arguments do not fit.
            SerializationError: an argument cannot be written; names it.
            RecordTooLarge: the arguments are larger than a record may be.
            ConfigurationError: topics are missing.
            BrokerUnreachable: nobody acknowledged the start; it may come through yet.
        """
        return await AsyncStarter(self._connection, StartOptions(), self._feeds).start(workflow, *args, **kwargs)

    def options(
        self,
        *,
        run_id: str | None = None,
        attributes: Mapping[str, str] | None = None,
        delay: Duration | None = None,
    ) -> AsyncStarter:
        """What the starts through the result have in common: ``client.options(run_id="order-7").start(fulfil, "7")``.

        Args:
            run_id: an id of your own; starting it again attaches to the first run.
            attributes: texts to find the run by.
            delay: how long, or until when, the run waits before its workflow begins.

        Raises:
            ConfigurationError: no run may have this id.
        """
        options = StartOptions(run_id=run_id, attributes=attributes or {}, delay=delay)
        return AsyncStarter(self._connection, options, self._feeds)

    def get_run(self, run_id: str) -> AsyncRun[Any]:
        """A run by its id; no I/O. Raises `ConfigurationError` where no run may have this id."""
        return AsyncRun(self._connection, checked_run_id(run_id))

    async def rerun(self, run_id: str, *, new_id: str | None = None) -> AsyncRun[Any]:
        """Starts a new run of the same workflow, with the same input and attributes; its ``origin`` is the old one.

        Args:
            run_id: the old one; it may have ended or not.
            new_id: an id for the new one; an existing run of this id is attached to.

        Raises:
            RunNotFoundError: there is no such run.
            ConfigurationError: no run may have one of these ids.
        """
        return await self.get_run(run_id).rerun(run_id=new_id)

    async def reset(self, run_id: str, to_event: int, *, reason: str | None = None) -> AsyncRun[Any]:
        """As `AsyncRun.reset`, of the run with this id."""
        return await self.get_run(run_id).reset(to_event, reason=reason)

    async def runs(
        self,
        *,
        workflow: str | None = None,
        status: RunStatus | Collection[RunStatus] | None = None,
        attributes: Mapping[str, str] | None = None,
        limit: int | None = DEFAULT_LIMIT,
    ) -> list[RunSummary]:
        """Runs that match, newest first; at most ``limit``, None for all."""
        return await asyncio.to_thread(
            list_runs, self._connection, workflow=workflow, status=status, attributes=attributes, limit=limit
        )

    async def resume_hook(self, token: str, payload: Any = None, *, resume_id: str | None = None) -> RunSummary:
        """Hands data to the hook with this token; returns the run as it is once its log has them.

        Args:
            token: the hook's.
            payload: any value that can travel.
            resume_id: names this delivery: a second one of the same name is dropped, and answered as the first was.

        Raises:
            HookNotFoundError: no open hook has this token.
            SerializationError: the payload cannot travel.
            TimeoutError: no processor answered.
        """
        from durably.client import hooks  # most clients ask for none

        return await hooks.resume_hook_async(self._connection, token, payload, resume_id)

    async def resume_webhook(self, token: str, request: Request) -> Response:
        """Hands a request to the webhook with this token, as the gateway does; returns what it answers.

        Raises:
            HookNotFoundError: no open webhook has this token.
            TimeoutError: no processor answered, or no step did where the webhook responds by one.
        """
        from durably.client import hooks  # most clients ask for none

        return await hooks.resume_webhook_async(self._connection, token, request)

    async def get_hook(self, token: str) -> HookInfo:
        """The open hook with this token. Raises `HookNotFoundError` where there is none."""
        from durably.client import hooks  # most clients ask for none

        return await hooks.get_hook_async(self._connection, token)

    async def close(self) -> None:
        """Flushes and lets go. What still waits for an answer fails with a `DurablyError`.

        Iterators that were passed to starts are drawn to their end first, for ``timeout`` seconds at most.
        """
        await asyncio.to_thread(self._feeds.close)
        await asyncio.to_thread(self._connection.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
