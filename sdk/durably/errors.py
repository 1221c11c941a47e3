"""Every error that durably raises.

DurablyError
├── FatalError                  raised by a step: do not retry
├── RetryableError              raised by a step: retry, after retry_after
├── StepError                   a step's exception whose class cannot be rebuilt
├── StepTimeoutError            an attempt took longer than its timeout
├── WorkerLostError             the worker of an attempt fell silent
├── RunFailedError              the run ended with an exception (.cause)
├── RunCancelledError           the run was cancelled
├── RunBlockedError             the run waits for other code
├── RunNotFoundError            there is no such run
├── HookNotFoundError           no open hook has this token (.token)
├── HookConflictError           another run holds the token (.token, .run_id)
├── HookDisposedError           the workflow waits for a hook that it disposed of itself (.token)
├── SerializationError          a value cannot be written or read; names the path
│   └── PayloadCodecError       it went through a codec that this process does not have, or cannot undo
├── DeterminismError            workflow code did what only a step may do
├── NonDeterminismError         workflow code differs from what its log says it did
├── RegistrationError           a workflow or step cannot be registered, or is not
├── ConfigurationError          a setting, URL, module or topic is not as it must be
└── BrokerError                 Kafka, or the embedded broker, did not do as asked
    ├── BrokerUnreachable       nobody answers
    ├── AccessDenied            the broker does not know the user, or does not grant it that
    ├── Fenced                  another process is the owner now
    ├── RecordTooLarge          a record is larger than its topic takes
    └── UnknownTopic            a topic is missing
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from durably.durations import Duration


class DurablyError(Exception):
    """What all of them are."""


class FatalError(DurablyError):
    """Raised by a step: the step fails now, whatever retries it has left."""


class RetryableError(DurablyError):
    """Raised by a step: it is tried again, after ``retry_after`` instead of its backoff.

    Args:
        message: what went wrong.
        retry_after: seconds, ``"10s"``, a timedelta, or an aware datetime. Counts against ``max_retries``.
    """

    def __init__(self, message: str = "", *, retry_after: Duration | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StepError(DurablyError):
    """A step failed with an exception whose class cannot be imported or rebuilt here.

    Attributes:
        type: the class's name, as recorded.
    """

    def __init__(self, message: str, type: str = "Exception") -> None:  # noqa: A002 - named for the attribute
        super().__init__(message, type)
        self.message = message
        self.type = type

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


class StepTimeoutError(DurablyError, TimeoutError):
    """An attempt of a step took longer than its timeout. Retried like any other error."""


class WorkerLostError(DurablyError):
    """The worker that ran an attempt sends no more heartbeats. Retried like any other error."""


class _RunError(DurablyError):
    def __init__(self, message: str, run_id: str) -> None:
        super().__init__(message, run_id)
        self.run_id = run_id

    def __str__(self) -> str:
        return str(self.args[0])


class RunFailedError(_RunError):
    """The run ended with an exception.

    Attributes:
        run_id: the run.
        cause: what the workflow raised, as its own class where that can be rebuilt, else a `StepError`.
    """

    def __init__(self, message: str, run_id: str, cause: BaseException | None = None) -> None:
        super().__init__(message, run_id)
        self.cause = cause


class RunCancelledError(_RunError):
    """The run was cancelled."""


class RunBlockedError(_RunError):
    """The run cannot go on with the code that the processors have; it does when other code is deployed."""


class RunNotFoundError(_RunError):
    """There is no run with this id."""


class _HookError(DurablyError):
    def __init__(self, message: str, token: str) -> None:
        super().__init__(message, token)
        self.token = token

    def __str__(self) -> str:
        return str(self.args[0])


class HookNotFoundError(_HookError):
    """No open hook has this token: it was never created, or not yet, or it was disposed of, or its run has ended."""


class HookConflictError(_HookError):
    """The custom token that a workflow asked for is held by another run's hook, or by another hook of this one.

    Attributes:
        token: the token.
        run_id: the run that holds it.
    """

    def __init__(self, message: str, token: str, run_id: str) -> None:
        super().__init__(message, token)
        self.args = (message, token, run_id)
        self.run_id = run_id


class HookDisposedError(_HookError):
    """The workflow waits for the payload of a hook that it has disposed of."""


class SerializationError(DurablyError, TypeError):
    """A value cannot be written or read. The message names the path to it and the remedy."""


class PayloadCodecError(SerializationError):
    """A payload went through a codec, such as an encryption, that this process does not have or cannot undo."""


class DeterminismError(DurablyError):
    """Workflow code called what only a step may call: files, sockets, threads, subprocesses, blocking sleeps."""


class NonDeterminismError(DurablyError):
    """Workflow code does not do what its log says it did.

    Attributes:
        expected: the log's entry.
        found: what the code did instead.
    """

    def __init__(self, message: str, expected: str = "", found: str = "") -> None:
        super().__init__(message, expected, found)
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        return str(self.args[0])


class RegistrationError(DurablyError):
    """A workflow or step cannot be registered, or none of this name is."""


class ConfigurationError(DurablyError):
    """A setting, URL, module or topic is not as it must be; the message says what to change."""


class BrokerError(DurablyError):
    """Kafka, or the embedded broker, did not do as asked."""


class BrokerUnreachable(BrokerError):
    """Nobody answers at this address."""


class AccessDenied(BrokerError):
    """The broker does not know the user, or its ACLs do not grant what was asked; the message has what to add."""


class Fenced(BrokerError):
    """Another process is the owner by now; nothing was committed.

    Attributes:
        stale: only the group's metadata were too old: it has moved on to another generation, and the member, which is
            still one, may own the same partitions in it.
    """

    stale = False


class RecordTooLarge(BrokerError):
    """A record is larger than its topic takes."""

    @classmethod
    def of(cls, what: str, size: int, limit: int) -> RecordTooLarge:
        """The error in its usual words: what it is that has ``size`` bytes, and how many a record holds."""
        return cls(
            f"{what} takes {size:,} bytes, and a record holds {limit:,}: keep large data elsewhere and pass a reference, "
            f"such as an object store's key, or raise max.message.bytes of the topics and message.max.bytes of the clients"
        )


class UnknownTopic(BrokerError):
    """A topic is missing."""
