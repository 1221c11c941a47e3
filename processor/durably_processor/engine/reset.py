"""The beginning of a run's log as the log of a new run, which goes on from there.

What stays, and what becomes of what is open at the cut, is in `Run.copied`. Here is decided where a log may be cut, and
what the copy says of itself: ids of steps are those of the new run, since they are idempotency keys and what runs again
must not pass for what has run; ids of children and tokens stay, since the code has seen them.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import takewhile

import msgspec
from durably_schemas import events as ev
from durably_schemas import records as rec
from durably_schemas.records import Event

from durably_processor.engine.execution import is_command, is_delivery, step_id
from durably_processor.engine.state import Header, OpenHook, OpenStep, RunState, created

_RUN_ENDS = (ev.RunCompleted, ev.RunFailed, ev.RunCancelled)


class CannotReset(Exception):
    """The log cannot be cut there; says why, and what can be done."""


def copied(log: Sequence[Event], header: Header, command: rec.ResetRun, queues: Container[str]) -> list[Event]:
    """The first events of a run under a new run's id, then the payloads that hooks which are open at the cut received later.

    Args:
        log: of the run that is reset.
        header: of the same.
        command: where to cut, and the new run's id.
        queues: those whose topic exists.

    Raises:
        CannotReset: not there.
    """
    _check_cut(log, command.to_event)
    kept, rest = log[: command.to_event], log[command.to_event :]
    state = created(kept[0])
    for event in kept:
        state.apply(event)
    _check_steps(state, queues)
    _check_hooks(state, header, command)
    granted = {hook_id for hook_id, item in state.items.items() if isinstance(item, OpenHook) and not item.claiming}
    later = [e for e in rest if isinstance(e.data, ev.HookReceived) and e.correlation_id in granted]
    steps: dict[str | None, str] = {}
    return [_renamed(event, command, steps) for event in (*kept, *later)]


def _check_cut(log: Sequence[Event], count: int) -> None:
    if not 1 <= count <= len(log):
        raise CannotReset(f"there is no event {count}: the log has events 1 to {len(log)}")
    last = log[count - 1]
    if isinstance(last.data, _RUN_ENDS):
        raise CannotReset(f"event {count} is the run's end: reset to an earlier one")
    blocked: int | None = None
    for event in log[:count]:
        if isinstance(event.data, ev.RunBlocked):
            blocked = event.seq if blocked is None else blocked
        elif isinstance(event.data, ev.RunUnblocked):
            blocked = None
    if blocked is not None:
        raise CannotReset(
            f"the run was blocked from event {blocked} on: reset to event {blocked - 1} or an earlier one"
        )
    cause = next((event.seq for event in reversed(log[:count]) if is_delivery(event.data)), None)
    led_to = list(takewhile(_is_of_code, log[count:]))
    if cause is not None and cause < count and led_to:
        end = led_to[-1]
        whole = "" if isinstance(end.data, _RUN_ENDS) else f", or to event {end.seq}"
        raise CannotReset(
            f"event {count} is one of those that event {cause} led to, up to {end.seq}: reset to event {cause}, and the "
            f"code decides anew{whole}"
        )


def _is_of_code(event: Event) -> bool:
    """Whether the code caused this event. A run that is reset is ended by its processor."""
    return is_command(event.data) and not (isinstance(event.data, ev.RunCancelled) and event.data.successor is not None)


def _check_steps(state: RunState, queues: Container[str]) -> None:
    # They begin anew, and nobody would run them.
    for item in state.items.values():
        if isinstance(item, OpenStep) and item.queue not in queues:
            raise CannotReset(
                f"step {item.step!r}, which is open there, goes to queue {item.queue!r}, whose topic does not exist: create "
                f"it with `durably topics create --queue {item.queue}`, then restart the processors; or reset to event "
                f"{item.seq - 1} or an earlier one"
            )


def _check_hooks(state: RunState, header: Header, command: rec.ResetRun) -> None:
    # The token of such a hook names its run, which hands on what comes for it; one that had ended before cannot.
    if header.status in rec.TERMINAL and header.successor != command.new_run_id:
        for item in state.items.values():
            if isinstance(item, OpenHook) and not item.custom:
                raise CannotReset(
                    f"a hook that is open there has the token {item.token!r}, which leads to this run, and the run has "
                    f"ended: reset to event {item.seq - 1} or an earlier one, before the hook was made"
                )


def _renamed(event: Event, command: rec.ResetRun, steps: dict[str | None, str]) -> Event:
    data, about = event.data, event.correlation_id
    if isinstance(data, ev.RunCreated):
        clipped = (
            rec.Origin(run_id=o.run_id, events=min(o.events, command.to_event)) for o in data.origins if o.events
        )
        origins = (*clipped, rec.Origin(run_id=command.run_id, events=command.to_event))
        data = msgspec.structs.replace(data, parent=None, origins=origins)
    elif isinstance(data, ev.StepCreated):
        assert about is not None, event
        steps[about] = step_id(command.new_run_id, int(about.split("_")[1]), data.fingerprint)
    return msgspec.structs.replace(event, run_id=command.new_run_id, data=data, correlation_id=steps.get(about, about))
