"""What a start is: the StartRun record, made of what the caller gave."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

import msgspec
from durably_schemas.records import Payload, StartRun

from durably import payloads
from durably.authoring import WorkflowDefinition
from durably.durations import Duration, milliseconds
from durably.errors import ConfigurationError
from durably.identifiers import checked_run_id, new_run_id

if TYPE_CHECKING:
    from collections.abc import Mapping


LONGEST_ATTRIBUTES = 16_384
"""Characters of a run's attributes, names and values together: they are repeated in each of its summaries."""
_NONCE_BYTES = 16


class StartOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a run is to be started.

    Attributes:
        run_id: an id of the caller's own: the second start of one id attaches to the first.
        attributes: texts to find the run by.
        delay: how long, or until when, the run waits before its workflow begins.
    """

    run_id: str | None = None
    attributes: Mapping[str, str] = {}
    delay: Duration | None = None

    def __post_init__(self) -> None:
        if self.run_id is not None:
            checked_run_id(self.run_id)
        for name, value in self.attributes.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise TypeError(f"attribute {name!r}={value!r}: names and values of attributes are texts")
        length = sum(len(name) + len(value) for name, value in self.attributes.items())
        if length > LONGEST_ATTRIBUTES:
            raise ConfigurationError(
                f"the attributes {', '.join(self.attributes)[:100]} have {length:,} characters, names and values "
                f"together; {LONGEST_ATTRIBUTES:,} may be: pass long texts as arguments"
            )
        if self.delay is not None:
            milliseconds(self.delay, now=0)

    def named(self) -> NamedOptions:
        """The same for one certain run, with an id if none was given."""
        return NamedOptions(
            run_id=self.run_id if self.run_id is not None else new_run_id(),
            attributes=self.attributes,
            delay=self.delay,
        )


class NamedOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How one run is to be started. Made by `StartOptions.named`, which has checked them."""

    run_id: str
    attributes: Mapping[str, str]
    delay: Duration | None

    def command(
        self,
        workflow: str,
        input: Payload,  # noqa: A002 - as the record names it
        *,
        now: int | None = None,
    ) -> StartRun:
        """The record that asks for the run. ``now``: in milliseconds since the epoch; None: by the machine's clock."""
        now = time.time_ns() // 1_000_000 if now is None else now
        return StartRun(
            run_id=self.run_id,
            workflow=workflow,
            input=input,
            requested_at=now,
            attributes=dict(self.attributes),
            nonce=secrets.token_urlsafe(_NONCE_BYTES),
            start_at=None if self.delay is None else now + milliseconds(self.delay, now=now),
        )


def call(
    workflow: WorkflowDefinition[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Payload, Any]:
    """A call's workflow name, input, and the type of its result (None: not known here).

    Raises:
        TypeError: the arguments do not fit the workflow's signature, or it is no workflow.
        SerializationError: an argument cannot be written.
    """
    if isinstance(workflow, WorkflowDefinition):
        what = f"workflow {workflow.name}"
        made = payloads.dump_arguments(workflow.fn, args, kwargs, what)
        return workflow.name, made, payloads.result_type(workflow.fn)
    if not isinstance(workflow, str):
        raise TypeError(f"{workflow!r} is no workflow: give a function marked @workflow, or the name of one")
    return workflow, payloads.dump([list(args), kwargs], f"workflow {workflow}"), None
