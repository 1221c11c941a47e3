"""Hooks from outside: looking one up by its token, handing data to it, and calling a webhook."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from durably_schemas.records import Hook, Payload, Reply, ReplyTo, ResumeHook, RunSummary

from durably import payloads
from durably.client.exchange import Question, Talk, converse, converse_async, query
from durably.client.outcome import summary_of
from durably.errors import ConfigurationError, DurablyError, HookNotFoundError
from durably.identifiers import LONGEST_ID, checked_run_id, ulid
from durably.streams import bound_to
from durably.tokens import PREFIX, checked_token, run_of
from durably.web import MANUAL, Request, Response

if TYPE_CHECKING:
    from durably.client.connection import Connection

RESPONSE_TIMEOUT = 30.0
"""Seconds that whoever calls a webhook waits for the response that a step is to give."""


class HookInfo:
    """An open hook, as committed when it was asked about."""

    __slots__ = ("_record",)

    def __init__(self, record: Hook) -> None:
        self._record = record

    @property
    def token(self) -> str:
        """What it is addressed by."""
        return self._record.token

    @property
    def hook_id(self) -> str:
        """What its run's log knows it by."""
        return self._record.hook_id

    @property
    def run_id(self) -> str:
        """The run that waits."""
        return self._record.run_id

    @property
    def created_at(self) -> datetime:
        """Since when it can be resumed."""
        return datetime.fromtimestamp(self._record.created_at / 1000, UTC)

    @property
    def webhook(self) -> bool:
        """Whether it takes HTTP requests."""
        return self._record.webhook

    @property
    def received(self) -> int:
        """How many payloads it has been given."""
        return self._record.received

    @property
    def metadata(self) -> Any:
        """What the workflow left for whoever resumes it. Raises `SerializationError` where it cannot be read here."""
        return None if self._record.metadata is None else payloads.load(self._record.metadata)

    @property
    def response(self) -> Response | Literal["manual"] | None:
        """What a webhook answers: always the same, ``"manual"`` (a step gives it), or None: 202 at once."""
        if self._record.response is None:
            return None
        found: Response | Literal["manual"] = payloads.load(self._record.response)
        return found

    @property
    def record(self) -> Hook:
        """As it came, with its payloads undecoded."""
        return self._record

    def __repr__(self) -> str:
        kind = "webhook" if self.webhook else "hook"
        return f"<{kind} {self.token} of run {self.run_id}>"


def resume_hook(connection: Connection, token: str, payload: Any, resume_id: str | None = None) -> RunSummary:
    """Hands data to the hook with this token; returns when the run's log has it.

    Args:
        connection: who asks.
        token: the hook's.
        payload: any value that can travel; a `Payload` is sent as it is, whatever its media type.
        resume_id: names this delivery to the hook: a second one of the same name is dropped, and answered as the
            first was. 1 to 1,024 bytes.

    Returns:
        The run that the hook belongs to, as committed with the payload.

    Raises:
        HookNotFoundError: no open hook has this token.
        ConfigurationError: no hook can have it, or no delivery this name.
        SerializationError: the payload cannot travel.
        RecordTooLarge: the payload is larger than a record may be.
        TimeoutError: no processor answered; names the resume_id to try again with.
    """
    resume_id = _named(resume_id)
    talk = _resume(token, _payload(token, payload), resume_id)
    try:
        return converse(connection, talk)
    except TimeoutError as e:
        raise TimeoutError(_uncertain(e, resume_id)) from None


async def resume_hook_async(
    connection: Connection, token: str, payload: Any, resume_id: str | None = None
) -> RunSummary:
    """As `resume_hook`."""
    resume_id = _named(resume_id)
    talk = _resume(token, _payload(token, payload), resume_id)
    try:
        return await converse_async(connection, talk)
    except TimeoutError as e:
        raise TimeoutError(_uncertain(e, resume_id)) from None


def get_hook(connection: Connection, token: str) -> HookInfo:
    """The open hook with this token.

    Raises:
        HookNotFoundError: there is none.
        ConfigurationError: no hook can have this token.
        TimeoutError: no processor answered.
    """
    return converse(connection, _hook(token))


async def get_hook_async(connection: Connection, token: str) -> HookInfo:
    """As `get_hook`."""
    return await converse_async(connection, _hook(token))


def run_hooks(connection: Connection, run_id: str) -> list[HookInfo]:
    """The open hooks of a run, oldest first. Raises `RunNotFoundError`, or `TimeoutError`."""
    return converse(connection, _hooks(run_id))


async def run_hooks_async(connection: Connection, run_id: str) -> list[HookInfo]:
    """As `run_hooks`."""
    return await converse_async(connection, _hooks(run_id))


def resume_webhook(
    connection: Connection,
    token: str,
    request: Request,
    resume_id: str | None = None,
    *,
    timeout: float = RESPONSE_TIMEOUT,
) -> Response:
    """Hands a request to the webhook with this token, and returns what it answers.

    Args:
        connection: who asks.
        token: the webhook's.
        request: what its workflow is to receive.
        resume_id: as of `resume_hook`.
        timeout: seconds to wait for the response, where a step gives it.

    Raises:
        HookNotFoundError: no open webhook has this token; a plain hook is none.
        TimeoutError: no processor answered; or no step has responded in time, although the run has the request.
    """
    call = WebhookCall(get_hook(connection, token))
    try:
        run = call.deliver_sync(connection, request, resume_id)
        return call.answered_sync(connection, run, timeout)
    finally:
        call.forget()


async def resume_webhook_async(
    connection: Connection,
    token: str,
    request: Request,
    resume_id: str | None = None,
    *,
    timeout: float = RESPONSE_TIMEOUT,  # noqa: ASYNC109 - as its twin
) -> Response:
    """As `resume_webhook`."""
    call = WebhookCall(await get_hook_async(connection, token))
    try:
        run = await call.deliver(connection, request, resume_id)
        return await call.answered(connection, run, timeout)
    finally:
        call.forget()


def token_key(token: str) -> str:
    """The routing key of a token: the run's ID of a default one, else the token.

    Raises:
        ConfigurationError: no hook can have this token.
        HookNotFoundError: it is a default one that was mangled on its way.
    """
    run_id = run_of(token) if isinstance(token, str) else None
    if run_id is None:
        if isinstance(token, str) and token.startswith(PREFIX):
            raise _not_found(
                token,
                f"hook token {token!r:.200}: one with this beginning ends with '.' and a run's ID, and this one does not",
            )
        return checked_token(token)
    try:
        return checked_run_id(run_id)
    except ConfigurationError:
        raise _not_found(token) from None


class WebhookCall:
    """One request to a webhook that has been looked up.

    Args:
        hook: the webhook.

    Raises:
        HookNotFoundError: it is a plain hook.
    """

    def __init__(self, hook: HookInfo) -> None:
        if not hook.webhook:
            raise HookNotFoundError(
                f"token {hook.token!r} is a plain hook's, which takes no HTTP requests: use resume_hook()", hook.token
            )
        self.hook = hook
        self._answer = hook.response
        self._reply: Future[Reply] | None = None

    async def deliver(self, connection: Connection, request: Request, resume_id: str | None) -> RunSummary:
        """Hands the request over; returns the run when its log has it. Raises as `resume_hook`."""
        if self._answer == MANUAL:
            await asyncio.wrap_future(connection.listening())
        return await resume_hook_async(connection, self.hook.token, self._payload(connection, request), resume_id)

    async def answered(
        self,
        connection: Connection,
        run: RunSummary,
        timeout: float,  # noqa: ASYNC109 - as its twin
    ) -> Response:
        """The response to what was delivered. Raises `TimeoutError` where no step gives it in time."""
        if self._reply is None:
            return self._immediate()
        waiting = asyncio.wrap_future(self._reply)
        done, _ = await asyncio.wait([waiting], timeout=timeout)
        if not done:
            raise TimeoutError(self._unanswered(run, timeout))
        return self._response(connection, waiting.result())

    def deliver_sync(self, connection: Connection, request: Request, resume_id: str | None) -> RunSummary:
        """As `deliver`."""
        return resume_hook(connection, self.hook.token, self._payload(connection, request), resume_id)

    def answered_sync(self, connection: Connection, run: RunSummary, timeout: float) -> Response:
        """As `answered`."""
        if self._reply is None:
            return self._immediate()
        try:
            return self._response(connection, self._reply.result(timeout))
        except TimeoutError:
            raise TimeoutError(self._unanswered(run, timeout)) from None

    def forget(self) -> None:
        """Waits for no response any more. To be called in the end."""
        if self._reply is not None:
            self._reply.cancel()

    def _payload(self, connection: Connection, request: Request) -> Payload:
        """What the workflow receives, with the address of the response where a step is to give one."""
        to: ReplyTo | None = None
        if self._answer == MANUAL:
            to, self._reply = connection.expect()
        sent = Request.received(request.method, request.url, request.headers, request.body, to)
        return payloads.dump(sent, f"the request to webhook {self.hook.token}")

    def _immediate(self) -> Response:
        return self._answer if isinstance(self._answer, Response) else Response(status=202)

    def _response(self, connection: Connection, reply: Reply) -> Response:
        """What the step gave; a body that is a stream is read through the connection."""
        if reply.result is None:
            raise DurablyError(f"webhook {self.hook.token}: the step's reply holds no response")
        with bound_to(connection):
            response: Response = payloads.load(reply.result, Response)
        return response

    def _unanswered(self, run: RunSummary, timeout: float) -> str:
        return (
            f"run {run.run_id} has the request, but no step of it has responded within {timeout:g} s: the run goes on, "
            f"and its response comes too late for this call"
        )


def _named(resume_id: str | None) -> str:
    """The name of a delivery: the given one, or a new one. Raises `ConfigurationError`."""
    if resume_id is None:
        return ulid()
    remedy = f"use 1 to {LONGEST_ID:,} bytes of text, or none"
    if not isinstance(resume_id, str) or not resume_id:
        raise ConfigurationError(f"resume_id {resume_id!r:.100} names no delivery: {remedy}")
    try:
        size = len(resume_id.encode())
    except UnicodeEncodeError:
        raise ConfigurationError(f"resume_id {resume_id!r:.100} is no Unicode text: {remedy}") from None
    if size > LONGEST_ID:
        raise ConfigurationError(f"resume_id {resume_id[:40]!r}… has {size:,} bytes: {remedy}")
    return resume_id


def _payload(token: str, value: Any) -> Payload:
    return value if isinstance(value, Payload) else payloads.dump(value, f"the payload for hook {token}")


def _resume(token: str, payload: Payload, resume_id: str) -> Talk[RunSummary]:
    now = time.time_ns() // 1_000_000

    def command(to: ReplyTo) -> ResumeHook:
        return ResumeHook(token=token, resume_id=resume_id, payload=payload, requested_at=now, reply_to=to)

    reply = yield Question(token_key(token), command, _about(token))
    return summary_of(_found(reply, token), reply.run_id or token)


def _hook(token: str) -> Talk[HookInfo]:
    key = token_key(token)
    run_id = run_of(token)
    if run_id is None:
        reply = yield Question(key, query("", "HOOK", token=token), _about(token))
        run_id = _found(reply, token).run_id
    if run_id is None:
        raise _not_found(token)
    reply = _found((yield Question(run_id, query(run_id, "HOOK", token=token), f"run {run_id}")), token)
    if not reply.hooks:  # disposed of since its token's owner was asked
        raise _not_found(token)
    return HookInfo(reply.hooks[0])


def _hooks(run_id: str) -> Talk[list[HookInfo]]:
    reply = yield Question(run_id, query(run_id, "HOOK"), f"run {run_id}")
    if reply.status != "OK":
        summary_of(reply, run_id)
    return [HookInfo(hook) for hook in reply.hooks]


def _about(token: str) -> str:
    return f"hook {token}"


def _found(reply: Reply, token: str) -> Reply:
    if reply.status == "NOT_FOUND":
        raise _not_found(token, reply.message)
    if reply.status == "REFUSED":
        raise DurablyError(f"hook {token}: {reply.message or 'the processor refused to answer'}")
    return reply


def _not_found(token: str, why: str | None = None) -> HookNotFoundError:
    why = why or (
        f"no open hook has the token {token!r:.200}: its workflow may not have come that far yet, the hook was "
        f"disposed of, its run has ended, or the token is mistyped"
    )
    return HookNotFoundError(why, token)


def _uncertain(error: TimeoutError, resume_id: str) -> str:
    return f"{error}; the payload may come through yet: resume again with resume_id={resume_id!r}, which counts once"
