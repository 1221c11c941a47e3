"""Durable workflows whose database is the Kafka you already run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from durably.authoring import Backoff, StepDefinition, WorkflowDefinition, step, workflow
from durably.errors import (
    BrokerError,
    BrokerUnreachable,
    ConfigurationError,
    DeterminismError,
    DurablyError,
    FatalError,
    Fenced,
    NonDeterminismError,
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
from durably.runtime import get_step_metadata, get_workflow_metadata, sleep
from durably.streams import Writable, get_writable

if TYPE_CHECKING:
    from durably.client import AsyncClient, AsyncRun, Client, Run, get_run, start

_LAZY = {"AsyncClient", "AsyncRun", "Client", "Run", "get_run", "start"}

__all__ = [
    "AsyncClient",
    "AsyncRun",
    "Backoff",
    "BrokerError",
    "BrokerUnreachable",
    "Client",
    "ConfigurationError",
    "DeterminismError",
    "DurablyError",
    "FatalError",
    "Fenced",
    "NonDeterminismError",
    "RecordTooLarge",
    "RegistrationError",
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
    "UnknownTopic",
    "WorkerLostError",
    "WorkflowDefinition",
    "Writable",
    "get_run",
    "get_step_metadata",
    "get_workflow_metadata",
    "get_writable",
    "sleep",
    "start",
    "step",
    "workflow",
]


def __getattr__(name: str) -> Any:
    """The client's names, imported when they are first asked for: workers and the CLI do without."""
    if name not in _LAZY:
        raise AttributeError(f"module 'durably' has no attribute {name!r}")
    return getattr(import_module("durably.client"), name)
