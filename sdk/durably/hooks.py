"""Hooks and webhooks, as workflow code sees them: points where a run waits for outside data."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast
from urllib.parse import quote

from durably import payloads
from durably.children import ChildRun
from durably.errors import ConfigurationError, DurablyError, HookConflictError, HookDisposedError
from durably.runtime import workflow_context
from durably.tokens import checked_token

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import TracebackType

    from durably_schemas.records import Payload, RunSummary

    from durably.runtime import WorkflowContext
    from durably.web import Request, Response  # noqa: F401 - Request: in Webhook's bases

T = TypeVar("T")

WEBHOOK_PATH = "/.well-known/workflow/v1/webhook/"
"""Where the gateway takes the requests for webhooks; the token follows, percent-encoded."""


class Hook(Generic[T]):
    """A point where the run waits for outside data, any number of times.

    ``await hook`` gives the next payload; ``async for`` gives one after the other, until the hook is disposed of.
    Payloads are kept in the order of the log until somebody asks. Whoever is cancelled while waiting takes nothing, so
    ``asyncio.wait_for`` and races are safe. As an async context manager the hook is disposed of at the block's end.

    Attributes:
        token: what it is addressed by.

    Raises:
        HookConflictError: awaiting it, where another hook holds the token.
        HookDisposedError: awaiting it after `dispose`, when the payloads that came before are used up.
        SerializationError: awaiting it, where a payload does not fit the hook's model.
    """

    def __init__(
        self,
        run: WorkflowContext,
        token: str | None,
        metadata: Any,
        model: Any = Any,
        *,
        webhook: bool = False,
        response: Payload | None = None,
    ) -> None:
        told = None if metadata is None else payloads.dump(metadata, "the metadata of a hook")
        chosen = None if token is None else checked_token(token)
        self._run = run
        self._model = model
        self._payloads: deque[Payload] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._settled = asyncio.get_running_loop().create_future()
        self._granted = False
        self._holder: str | None = None
        self._disposed = False
        self._id, self.token = run.open_hook(self, chosen, told, webhook=webhook, response=response)
        if chosen is None:
            self.granted()

    def __await__(self) -> Generator[Any, None, T]:
        """The next payload."""
        return self._next().__await__()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            return await self._next()
        except HookDisposedError:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.dispose()

    def dispose(self) -> None:
        """Gives the token back, so that others may hold it. What arrives from now on is refused; may be called twice."""
        self._run.close_hook(self._id)
        self._disposed = True
        if not self._settled.done():
            self._settled.set_result(None)
        self._wake_all()

    async def get_conflict(self) -> ChildRun[Any] | None:
        """The run that holds the token, or None when this hook does; waits until that is known.

        Raises:
            HookDisposedError: the hook was disposed of before that.
        """
        await asyncio.shield(self._settled)
        if self._holder is not None:
            return ChildRun(self._run, self._holder)
        if not self._granted:
            raise HookDisposedError(f"hook {self.token!r} was disposed of before its token was granted", self.token)
        return None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.token}>"

    # As in asyncio.Queue, a waiter is only woken; it takes the payload when it runs. One that is cancelled between the
    # two wakes the next instead, so nothing is swallowed by a race that was lost.
    async def _next(self) -> T:
        while not self._payloads:
            if self._holder is not None:
                raise HookConflictError(
                    f"hook token {self.token!r} is held by run {self._holder}: dispose of that hook, or take another token",
                    self.token,
                    self._holder,
                )
            if self._disposed:
                raise HookDisposedError(f"hook {self.token!r} was disposed of: nothing arrives any more", self.token)
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except BaseException:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                elif self._payloads and not waiter.cancelled():
                    self._wake_one()
                raise
        return cast("T", await self._run.load(self._payloads.popleft(), self._model))

    def _wake_one(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _wake_all(self) -> None:
        while self._waiters:
            self._wake_one()

    # -- told by the run: see `durably.runtime.HookSink` -------------------------------------------------------------

    def granted(self) -> None:
        """The run holds the token."""
        self._granted = True
        if not self._settled.done():
            self._settled.set_result(None)

    def refused(self, holder_run_id: str) -> None:
        """Another hook holds it."""
        self._holder = holder_run_id
        if not self._settled.done():
            self._settled.set_result(None)
        self._wake_all()

    def received(self, payload: Payload) -> None:
        """Outside data arrived."""
        self._payloads.append(payload)
        self._wake_one()


class Webhook(Hook["Request"]):
    """A hook that any HTTP client reaches, through the gateway: its payloads are `Request` objects.

    Attributes:
        url: where to send requests to. Whoever knows it may.
    """

    @property
    def url(self) -> str:
        """Raises `ConfigurationError` where the processors were not told where the gateway is."""
        base = self._run.url
        if base is None:
            raise ConfigurationError(
                "a webhook's URL is not known, because the processors were not told where the gateway is: set "
                "DURABLY_GATEWAY_URL, such as https://hooks.example.com, for them; runs that start from then on have it"
            )
        return base.rstrip("/") + WEBHOOK_PATH + quote(self.token, safe="")


def create_hook(*, token: str | None = None, metadata: Any = None) -> Hook[Any]:
    """A point where the run waits for outside data. In workflows only.

    Args:
        token: a name of your own, such as a business key, so that senders need no lookup; only one open hook of all
            runs may have it. By default one that nobody can guess.
        metadata: what senders may read before they resume it.

    Raises:
        ConfigurationError: no hook may have this token.
        SerializationError: the metadata cannot travel.
        RecordTooLarge: the metadata are larger than a record may be.
    """
    return Hook(_run("create_hook"), token, metadata)


def create_webhook(
    *, token: str | None = None, respond_with: Response | str | None = None, metadata: Any = None
) -> Webhook:
    """A hook that takes HTTP requests of any method at its ``url``. In workflows only.

    Args:
        token: as of `create_hook`. Knowing it is all that a sender needs, so choose one only where that does no harm.
        respond_with: None answers 202 as soon as the request is recorded; a `Response` answers with that each time;
            ``"manual"`` keeps the caller waiting until a step calls ``request.respond_with(…)``.
        metadata: what senders may read.

    Raises:
        ConfigurationError: no hook may have this token, or ``respond_with`` is none of these.
    """
    from durably.web import MANUAL, Request, Response

    run = _run("create_webhook")
    if token in {".", ".."}:
        raise ConfigurationError(
            f"token {token!r}: HTTP clients take it for a folder; use a business key, such as order-7"
        )
    if respond_with is not None and respond_with != MANUAL and not isinstance(respond_with, Response):
        raise ConfigurationError(f'respond_with={respond_with!r:.100}: give a Response, "{MANUAL}", or None for 202')
    response = None if respond_with is None else payloads.dump(respond_with, "the response of a webhook")
    return Webhook(run, token, metadata, Request, webhook=True, response=response)


class HookDefinition(Generic[T]):
    """A kind of hook whose payloads fit a model; made by `define_hook`."""

    def __init__(self, model: type[T]) -> None:
        self.model = model

    def create(self, *, token: str | None = None, metadata: Any = None) -> Hook[T]:
        """As `create_hook`; what is awaited is an instance of the model."""
        return Hook(_run("create"), token, metadata, self.model)

    async def resume(self, token: str, value: Any, *, resume_id: str | None = None) -> RunSummary:
        """As `resume_hook`, after validation: what does not fit the model raises, and nothing is recorded.

        Args:
            token: of the hook.
            value: an instance of the model, or what it can be made from.
            resume_id: a second resume with the same id is dropped.

        Raises:
            SerializationError: the value does not fit the model; names the misfit.
            HookNotFoundError: no open hook has this token.
        """
        from durably.client.default import resume_hook

        return await resume_hook(token, self.validated(value), resume_id=resume_id)

    def validated(self, value: Any) -> Any:
        """The value as an instance of the model. Raises `SerializationError`, naming the misfit."""
        return payloads.load(payloads.dump(value, "the payload"), self.model)


def define_hook(model: type[T]) -> HookDefinition[T]:
    """A kind of hook whose payloads fit a model: a msgspec Struct, a dataclass, an attrs or pydantic class, or any type.

    ``Approval = define_hook(ApprovalModel)``; then ``Approval.create(…)`` in workflows, and ``await
    Approval.resume(token, …)`` elsewhere.
    """
    return HookDefinition(model)


def _run(name: str) -> WorkflowContext:
    run = workflow_context()
    if run is None:
        raise DurablyError(f"{name}() works in a workflow only: a hook belongs to the run that waits for it")
    return run
