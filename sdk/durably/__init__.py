"""Durable workflows whose database is the Kafka you already run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from durably.authoring import Backoff, StepDefinition, WorkflowDefinition, step, workflow
from durably.cancellation import step_cancelled
from durably.children import ChildRun
from durably.errors import (
    AccessDenied,
    BrokerError,
    BrokerUnreachable,
    ConfigurationError,
    DeterminismError,
    DurablyError,
    FatalError,
    Fenced,
    HookConflictError,
    HookDisposedError,
    HookNotFoundError,
    NonDeterminismError,
    PayloadCodecError,
    RecordTooLarge,
    RegistrationError,
    RetryableError,
    RunBlockedError,
    RunCancelledError,
    RunFailedError,
    RunNotFoundError,
    SerializationError,
    StepError,
    StepTimeoutError,
    UnknownTopic,
    WorkerLostError,
)
from durably.hooks import Hook, HookDefinition, Webhook, create_hook, create_webhook, define_hook
from durably.patches import deprecate_patch, patched
from durably.runtime import get_step_metadata, get_workflow_metadata, set_attributes, sleep
from durably.serialization import serializable
from durably.streams import Readable, Writable, get_writable

if TYPE_CHECKING:
    from durably.client import (
        AsyncClient,
        AsyncRun,
        Client,
        HookInfo,
        Run,
        StreamInfo,
        get_hook_by_token,
        get_run,
        options,
        resume_hook,
        resume_webhook,
        start,
    )
    from durably.web import Request, Response, fetch

_LAZY = {
    **dict.fromkeys(("AsyncClient", "AsyncRun", "Client", "HookInfo", "Run", "StreamInfo"), "durably.client"),
    **dict.fromkeys(
        ("get_hook_by_token", "get_run", "options", "resume_hook", "resume_webhook", "start"), "durably.client"
    ),
    **dict.fromkeys(("Request", "Response", "fetch"), "durably.web"),
}

__all__ = [
    "AccessDenied",
    "AsyncClient",
    "AsyncRun",
    "Backoff",
    "BrokerError",
    "BrokerUnreachable",
    "ChildRun",
    "Client",
    "ConfigurationError",
    "DeterminismError",
    "DurablyError",
    "FatalError",
    "Fenced",
    "Hook",
    "HookConflictError",
    "HookDefinition",
    "HookDisposedError",
    "HookInfo",
    "HookNotFoundError",
    "NonDeterminismError",
    "PayloadCodecError",
    "Readable",
    "RecordTooLarge",
    "RegistrationError",
    "Request",
    "Response",
    "RetryableError",
    "Run",
    "RunBlockedError",
    "RunCancelledError",
    "RunFailedError",
    "RunNotFoundError",
    "SerializationError",
    "StepDefinition",
    "StepError",
    "StepTimeoutError",
    "StreamInfo",
    "UnknownTopic",
    "Webhook",
    "WorkerLostError",
    "WorkflowDefinition",
    "Writable",
    "create_hook",
    "create_webhook",
    "define_hook",
    "deprecate_patch",
    "fetch",
    "get_hook_by_token",
    "get_run",
    "get_step_metadata",
    "get_workflow_metadata",
    "get_writable",
    "options",
    "patched",
    "resume_hook",
    "resume_webhook",
    "serializable",
    "set_attributes",
    "sleep",
    "start",
    "step",
    "step_cancelled",
    "workflow",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """The client's names, and those of HTTP, imported when they are first asked for: most processes do without."""
    if name not in _LAZY:
        raise AttributeError(f"module 'durably' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
