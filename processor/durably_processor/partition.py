"""One partition: its runs, what each record does to them, and their timers. No Kafka: records in, a `Turn` out."""

from __future__ import annotations

import heapq
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import msgspec
from durably import tokens
from durably.broker.port import TP, End, Headers, Message
from durably.errors import BrokerError, DurablyError, RecordTooLarge, RunNotFoundError
from durably.failures import summed_up, to_error
from durably.health import WORKFLOW as HEALTH
from durably.health import Asker
from durably.identifiers import LONGEST_ID
from durably.observability.tracing import Trace
from durably_schemas import Catalogue, Codec, CodecError
from durably_schemas import events as ev
from durably_schemas import records as rec
from durably_schemas.records import Event, Reply, ReplyTo

from durably_processor import health
from durably_processor.admission import KEYED_BY_TOKEN, Admission
from durably_processor.answers import Answers
from durably_processor.engine.execution import RECORD_OVERHEAD, Environment
from durably_processor.engine.reset import CannotReset, copied
from durably_processor.engine.run import Outcome, Resumed, Run
from durably_processor.engine.state import OpenStep
from durably_processor.observer import Observer
from durably_processor.state.store import (
    Changes,
    Holder,
    Store,
    Stored,
    StoreError,
    Timer,
    activations_key,
    blocked_key,
    encode_token,
    resume_key,
    token_key,
)
from durably_processor.tokens import Tokens
from durably_processor.traces import RunTraces
from durably_processor.turn import Output, Part, Turn
from durably_processor.upkeep import Retention, Upkeep

log = logging.getLogger("durably.processor")

WINDOW_MS = 60_000
"""Timers due within this are held in memory; the rest waits in RocksDB."""
LEASE_GRACE_MS = 20_000
"""After a take-over no lease lapses for this long: its last heartbeats may have been forgotten."""
TIMERS_A_TURN = 250
"""So that ten thousand that fall due together do not hold up what else arrives."""
DEADLY = 2
"""Activations of a run that never ended, after which it is blocked instead of tried again."""
MAX_KEY = 1_024
FRAMING = 700
"""Bytes that Kafka puts around a record, and a Snapshot, with the run's id, around an event that it holds."""
WAITER_MS = 10 * 60 * 1000
"""Whoever waits for a result asks again more often than this; the answer would not be kept for longer either."""

Dispatch = Literal["early", "committed"]
Told = tuple[str, bool, int]
"""What decides whether a run's summary is to be written again: its status, whether it is blocked, its news."""


Poison = tuple[str, int, int] | str
"""The place of a record, or the id of a run, that could not be handled."""


class Poisoned(Exception):
    """Handling a record or a timer raised what nobody foresaw; the partition's memory can no longer be trusted."""

    def __init__(self, what: Poison) -> None:
        super().__init__(f"run {what}" if isinstance(what, str) else f"{what[0]}[{what[1]}]@{what[2]}")
        self.what = what


class _Entry:
    """A run in memory. ``turn``: the last that changed it; ``tainted``: the last whose causes were not log-ordered."""

    __slots__ = (
        "bytes", "counted", "gathers", "headers", "recent", "resumed", "run", "since", "steps", "stored", "tainted",
        "turn",
    )  # fmt: skip

    def __init__(self, run: Run, stored: Stored, headers: Headers, steps: dict[str, str], *, gathers: bool) -> None:
        self.run = run
        self.headers = headers  # its trace, for what it asks for
        self.steps = steps  # the names of its open steps by id, for the observer
        self.gathers = gathers  # whether its log must be readable before all of it is in the store
        self.since = 0  # the turn from which on it does
        self.recent: list[Event] = []  # its events from then on
        self.resumed: set[tuple[str, str]] = set()  # (hook, resume) received since it was loaded
        self.stored = stored
        self.turn = 0
        self.tainted = 0
        self.bytes = 0
        self.counted = 0  # up to which seq its log is counted in ``bytes``


class Figures(NamedTuple):
    """A partition in numbers.

    Attributes:
        runs: how many are in memory.
        blocked: how many are blocked.
        timers: how many are due within a minute or two.
        parked: records that wait for what they are about.
        positions: the offset of each input from which on nothing has been taken in.
    """

    runs: int
    blocked: int
    timers: int
    parked: int
    positions: dict[str, int]


class Partition:
    """A partition whose store holds everything that was committed, ready to take records from ``positions`` on.

    Args:
        number: of the partition.
        store: restored.
        environment: what executions are given.
        codec, catalogue: of the topics.
        positions: the committed offsets of the three inputs.
        ends: the end offsets of the three inputs when the partition was taken over.
        now: the clock, in milliseconds.
        dispatch: whether requests may go out ahead of their transaction.
        always_replay: every run is evicted after each of its inputs, and replayed for the next: finds workflow code
            that is not deterministic, at the cost of speed.
        max_runs, max_bytes: how many runs, and roughly how many bytes of their logs, stay in memory.
        poisoned: records and runs that could not be handled before.
        refused: runs whose step-requests Kafka will never take, and why: they are blocked, and send none.
        retention: how long ended runs are kept; None: for ever.
        traces: makes the spans of runs.
        observer: who counts what happens to runs.
    """

    def __init__(
        self,
        number: int,
        store: Store,
        environment: Environment,
        codec: Codec,
        catalogue: Catalogue,
        *,
        positions: dict[str, int],
        ends: dict[str, int],
        now: Callable[[], int],
        dispatch: Dispatch = "early",
        always_replay: bool = False,
        max_runs: int = 20_000,
        max_bytes: int = 512 * 1024 * 1024,
        poisoned: frozenset[Poison] = frozenset(),
        refused: Mapping[str, BrokerError] = MappingProxyType({}),
        retention: Retention | None = None,
        traces: RunTraces | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.number = number
        self.store = store
        self._environment = environment
        self._codec = codec
        self._catalogue = catalogue
        self._positions = positions
        self._ends = ends
        self._now = now
        self._early = dispatch == "early"
        self._always_replay = always_replay
        self._max_runs, self._max_bytes = max_runs, max_bytes
        self._poisoned = poisoned
        self._refused = refused
        self._traces = traces or RunTraces()
        self._observer = observer
        self._blocked_runs = 0 if observer is None else len(store.blocked())
        self._runs: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = 0
        self._blocked: list[str] = []  # still to be tried with this code
        self._finished: deque[tuple[int, str]] = deque()
        self._horizon = now() + WINDOW_MS
        self._timers = store.timers(0, self._horizon)  # ordered, and so a heap
        self._waiting: dict[str, dict[str, tuple[int, ReplyTo]]] = {}
        self._committed = dict(positions)
        self._admission = Admission(number, catalogue, environment.max_payload_bytes)
        self._answers = Answers(store, codec)
        self._tokens = Tokens(store.token)
        self._upkeep = Upkeep(number, store, self._tokens, codec, retention, now, self._let_go)
        self._parked: list[Message] = []  # about runs and steps that are not known yet
        self._late: list[Message] = []  # about hooks that are not: what opens them may be a step's result
        self._resets: list[Message] = []  # of runs whose logs are not wholly in the store yet
        self._complete = False  # commands and signals have passed their ends: what is unknown now stays unknown
        self._caught_up = False  # results have, too: timers may fire
        self._leases_from = now() + LEASE_GRACE_MS
        self._requests_topic = lru_cache(catalogue.requests)

    # -- inputs ----------------------------------------------------------------------------------------------------

    @property
    def figures(self) -> Figures:
        """What is in memory just now. May be asked from any thread."""
        return Figures(
            runs=len(self._runs),
            blocked=self._blocked_runs,
            timers=len(self._timers),
            parked=len(self._parked) + len(self._late),
            positions=dict(self._positions),
        )

    @property
    def caught_up(self) -> bool:
        """All three inputs have passed the ends that they had at the take-over."""
        return self._caught_up

    def handle(self, message: Message | End, turn: Turn) -> None:
        """Takes one record in. Raises `Poisoned` when nothing in memory can be trusted any more."""
        topic = message.topic
        if isinstance(message, End):
            self._positions[topic] = max(self._positions[topic], message.offset)
            return
        if message.offset < self._positions[topic]:
            return
        self._positions[topic] = message.offset + 1
        self._take(message, turn)

    def end_turn(self, turn: Turn) -> None:
        """After the records of a turn: catching up, timers, the offsets to commit, memory."""
        if not self._caught_up:
            self._catch_up(turn)
        if self._resets:
            resets, self._resets = self._resets, []
            for message in resets:
                self._take(message, turn)
            if len(self._resets) < len(resets):
                self._committed = {}  # their offsets were held back
        if self._caught_up:
            self._unblock(turn)
            self._fire(turn)
            self._upkeep.turn(turn)
        part = turn.parts.get(self.number)
        if part is not None or self._committed != self._positions:
            part = turn.part(self.number, self.store)
            part.offsets = self.offsets()
        self._shrink(turn)

    def offsets(self) -> dict[TP, int]:
        """What may be committed: parked records are still to be read again."""
        offsets = {TP(topic, self.number): position for topic, position in self._positions.items()}
        for message in (*self._parked, *self._late, *self._resets):
            tp = TP(message.topic, self.number)
            offsets[tp] = min(offsets[tp], message.offset)
        self._committed = dict(self._positions)
        return offsets

    def _take(self, message: Message, turn: Turn) -> None:
        record: rec.Record | None = None
        try:
            record = self._codec.decode(message.value)
            self._admission.check(message, record)
        except CodecError as e:
            if self._held(message):
                return
            self._dead_letter(message, str(e), turn)
            self._refuse(record, str(e), turn)
            return
        if (message.topic, message.partition, message.offset) in self._poisoned:
            self._quarantine(message, record, turn)
            return
        try:
            self._dispatch_record(message, record, turn)
        except StoreError:
            raise
        except Exception as e:
            log.exception("%s on %s[%s]@%s", type(record).__name__, message.topic, message.partition, message.offset)
            raise Poisoned((message.topic, message.partition, message.offset)) from e

    def _refuse(self, record: rec.Record | None, why: str, turn: Turn) -> None:
        reply_to: ReplyTo | None = getattr(record, "reply_to", None)
        if reply_to is not None and len(reply_to.request_id) <= LONGEST_ID:
            self._answer(turn, reply_to, lambda r: Reply(request_id=r, status="REFUSED", message=why))

    def _dispatch_record(self, message: Message, record: rec.Record, turn: Turn) -> None:
        at = message.timestamp
        if isinstance(record, rec.StepResult):
            entry = self._entry(record.run_id)
            if entry is None or record.step_id not in entry.run.state.items:
                self._unknown_result(message, record, turn)
            else:
                run = entry.run
                self._advance(entry, lambda: run.result(record, at), turn)
        elif isinstance(record, rec.StartRun):
            self._start(message, record, turn)
        elif isinstance(record, rec.QueryRun):
            self._query(message, record, at, turn)
        elif isinstance(record, rec.StepClaim):
            self._claim(message, record, at, turn)
        elif isinstance(record, rec.StepHeartbeat):
            self._heartbeat(message, record, at, turn)
        elif isinstance(record, rec.CancelRun):
            self._cancel(record, at, turn)
        elif isinstance(record, rec.ResetRun):
            self._reset(message, record, at, turn)
        elif isinstance(record, rec.RunCopied):
            self._copied(record, at, turn)
        else:
            self._hook_record(message, record, at, turn)

    def _hook_record(self, message: Message, record: rec.Record, at: int, turn: Turn) -> None:
        """Records about hooks, tokens and children."""
        if isinstance(record, rec.ResumeHook):
            self._resume(message, record, at, turn)
        elif isinstance(record, rec.HookDelivery):
            self._deliver(message, record, Holder(record.run_id, record.hook_id), at, turn)
        elif type(record) is rec.ClaimToken:
            event, answer = self._tokens.claim(record, at, turn.number)
            self._record_token(event, answer, turn)
        elif isinstance(record, rec.ReleaseToken):
            self._record_token(self._tokens.release(record, at, turn.number), None, turn)
        elif isinstance(record, rec.WatchRun):
            self._watch(message, record, at, turn)
        else:
            assert isinstance(record, rec.TokenGranted | rec.TokenRefused | rec.ChildFinished), record
            entry = self._entry(record.run_id)
            if entry is None:
                self._unknown(message)
                return
            run, act = entry.run, _SIGNALLED[type(record)]
            self._advance(entry, lambda: act(run, record, at), turn, ordered=False)

    def _unknown(self, message: Message) -> bool:
        """Whether a record must wait: the one that creates its run or step may still be ahead on another topic."""
        if not self._complete:
            self._parked.append(message)
        return not self._complete

    def _unknown_result(self, message: Message, record: rec.StepResult, turn: Turn) -> None:
        asker = Asker.of(record.step_id)
        if asker is None:
            self._unknown(message)
        else:
            reply_to = ReplyTo(partition=asker.partition, request_id=asker.request_id)
            self._answer(turn, reply_to, lambda _: health.answered(record, asker, message.timestamp))

    def _held(self, message: Message) -> bool:
        """Whether one that cannot be handled must wait, since it would be read again, and be two dead letters."""
        for waiting in (self._parked, self._late, self._resets):
            if any(earlier.topic == message.topic for earlier in waiting):
                waiting.append(message)
                return True
        return False

    def _ask_worker(self, record: rec.StartRun, at: int, turn: Turn) -> None:
        """Sends a request that is no run's to a queue, and whoever runs it answers: see `durably.health`."""
        if record.reply_to is None:
            return
        asked = health.requested(record, record.reply_to, at, self._environment.queues)
        if isinstance(asked, str):
            self._refuse(record, asked, turn)
            return
        queue, request = asked
        part = turn.part(self.number, self.store)
        part.outputs.append(Output(self._requests_topic(queue), self._codec.encode(request), request.step_id.encode()))
        part.urgent = True

    def _start(self, message: Message, record: rec.StartRun, turn: Turn) -> None:
        if record.workflow == HEALTH:
            self._ask_worker(record, message.timestamp, turn)
            return
        entry = self._entry(record.run_id)
        existing = entry is not None
        if entry is None:
            at = message.timestamp
            run, outcome = self._guarded_start(record, at, self._traces.began(record, at, Trace.of(message.headers)))
            entry = self._runs[record.run_id] = self._new_entry(run, Stored(record.run_id))
            self._record(entry, outcome, turn, early=self._early, before=None)
        elif record.parent is not None:
            run, parent = entry.run, record.parent
            self._advance(
                entry, lambda: run.watch(parent.run_id, parent.correlation_id, message.timestamp), turn, ordered=False
            )
        if record.reply_to is not None:
            run_id = record.run_id
            self._answer(
                turn,
                record.reply_to,
                lambda r: self._answers.summary(r, run_id, existing=existing),
            )

    def _guarded_start(self, record: rec.StartRun, at: int, trace: Trace | None) -> tuple[Run, Outcome]:
        history = self._history(record.run_id)
        refusal = self._refused.get(record.run_id)
        if self._caught_up or refusal is not None:
            return Run.start(record, at, self._environment, history, trace, refusal)
        with self._counted(record.run_id, 0) as obstacle:
            return Run.start(record, at, self._environment, history, trace, obstacle)

    def _cancel(self, record: rec.CancelRun, at: int, turn: Turn) -> None:
        entry = self._entry(record.run_id)
        message = None
        if entry is not None:
            run = entry.run
            if run.state.terminal:
                message = f"the run has ended before: {run.state.header.status}"
            self._advance(entry, lambda: run.cancel(record.reason, at), turn, ordered=False)
        if record.reply_to is not None:
            self._answer_about(turn, record.reply_to, record.run_id, message=message)

    # -- resetting -------------------------------------------------------------------------------------------------

    def _reset(self, message: Message, record: rec.ResetRun, at: int, turn: Turn) -> None:
        """Sends the beginning of a run's log to the owner of the run that is to go on from it, and ends the run."""
        entry = self._entry(record.run_id)
        if entry is None:
            if record.reply_to is not None:
                self._answer_about(turn, record.reply_to, record.run_id)
            return
        if not self._readable(entry, turn):
            self._resets.append(message)
            return
        run = entry.run
        try:
            whole = list(self._history(record.run_id)(1))
            log = copied(whole, run.state.header, record, self._environment.queues)
            seed = rec.RunCopied(
                run_id=record.new_run_id,
                events=tuple(self._codec.encode(event) for event in log),
                reason=record.reason,
                reply_to=record.reply_to,
            )
            size, limit = len(self._codec.encode(seed)), self._environment.max_payload_bytes
            if size > limit:
                raise CannotReset(
                    f"its events up to {record.to_event} have, with the reason, {size:,} bytes, and {limit:,} can be "
                    f"copied at most: reset to an earlier one"
                )
        except CannotReset as e:
            self._refuse(record, str(e), turn)
            return
        finally:
            if not self._always_replay:
                entry.gathers, entry.recent = False, []
        self._advance(
            entry, lambda: run.reset(record.to_event, record.new_run_id, record.reason, at), turn, ordered=False
        )
        self._send(turn.part(self.number, self.store), seed)

    def _readable(self, entry: _Entry, turn: Turn) -> bool:
        """Whether a run's log can be read as far as it goes.

        The store never knows the last events of a run that is busy: so from the first time that this is asked they are
        gathered, and it is enough when the store has those before.
        """
        if not entry.gathers and entry.turn > turn.acked:
            entry.gathers, entry.since = True, entry.turn
        return entry.since <= turn.acked

    def _copied(self, record: rec.RunCopied, at: int, turn: Turn) -> None:
        """A run that begins with another one's log; a copy of the record changes nothing."""
        run_id = record.run_id
        log = [self._codec.decode_as(Event, value) for value in record.events]
        first = log[0].data
        assert isinstance(first, ev.RunCreated), log[0]
        entry = self._entry(run_id)
        existing = entry is not None
        if entry is None:
            history = self._history(run_id)
            with self._counted(run_id, 0) as deadly:
                obstacle = self._refused.get(run_id) or deadly
                run, outcome = Run.copied(record, log, at, self._environment, history, obstacle)
            entry = self._runs[run_id] = self._new_entry(run, Stored(run_id))
            self._record(entry, outcome, turn, early=False, before=None)
        elif entry.run.state.header.origin != (origin := first.origins[-1]):
            why = f"run {run_id} was there before: reset run {origin.run_id}, which has been ended, as another one"
            self._refuse(record, why, turn)
            return
        if record.reply_to is not None:
            self._answer(turn, record.reply_to, lambda r: self._answers.summary(r, run_id, existing=existing))

    def _heartbeat(self, message: Message, record: rec.StepHeartbeat, at: int, turn: Turn) -> None:
        entry = self._entry(record.run_id)
        # The worker's clock says how long the lease is, and ours from when: they may differ.
        length = max(0, record.lease_until - record.sent_at)
        record = msgspec.structs.replace(record, lease_until=self._now() + length)
        step = entry.run.state.step(record.step_id) if entry is not None else None
        if entry is None or step is None:
            if self._unknown(message):
                return
        else:
            run = entry.run
            self._advance(entry, lambda: run.heartbeat(record, at), turn)
        wanted = step is not None and step.status == "leased" and step.attempt == record.attempt
        if record.reply_to is not None:
            answer: rec.ClaimAnswer = "LEASED" if wanted else "DONE"
            self._answer(turn, record.reply_to, lambda r: Reply(request_id=r, run_id=record.run_id, claim=answer))

    # -- hooks -----------------------------------------------------------------------------------------------------

    def _resume(self, message: Message, record: rec.ResumeHook, at: int, turn: Turn) -> None:
        run_id = tokens.run_of(record.token)
        if run_id is not None:
            self._deliver(message, record, Holder(run_id, tokens.hook_of(record.token)), at, turn)
            return
        holder = self._tokens.addressee(record.token, record.resume_id, caught_up=self._caught_up)
        if holder is not None:
            delivery = rec.HookDelivery(
                token=record.token,
                run_id=holder.run_id,
                hook_id=holder.hook_id,
                resume_id=record.resume_id,
                payload=record.payload,
                reply_to=record.reply_to,
            )
            self._send(turn.part(self.number, self.store), delivery)
        elif not self._caught_up:
            self._late.append(message)
        elif record.reply_to is not None:
            self._no_hook(turn, record.reply_to, None, record.token, "no run has a hook with this token")

    def _deliver(
        self, message: Message, record: rec.ResumeHook | rec.HookDelivery, hook: Holder, at: int, turn: Turn
    ) -> None:
        """Gives a payload to a hook of a run of this partition."""
        run_id, hook_id = hook.run_id, hook.hook_id
        entry = self._entry(run_id)
        resumed: Resumed = "UNKNOWN"
        if entry is not None:
            run = entry.run
            if entry.turn <= turn.acked:
                entry.resumed.clear()  # the store has them
            known = (hook_id, record.resume_id) in entry.resumed
            if known or self.store.received(run_id, hook_id, record.resume_id):
                resumed = "OK"
            else:
                found: list[Resumed] = []

                def act() -> Outcome:
                    outcome, answer = run.resume(record.token, hook_id, record.resume_id, record.payload, at)
                    found.append(answer)
                    return outcome

                self._advance(entry, act, turn, ordered=False)
                resumed = found[0]
        successor = None if entry is None else entry.run.state.header.successor
        if resumed == "ENDED" and successor is not None and tokens.run_of(record.token) is not None:
            self._hand_on(record, successor, hook_id, turn)
        elif resumed == "UNKNOWN" and not self._caught_up:
            self._late.append(message)
        elif record.reply_to is None:
            pass
        elif resumed == "OK":
            self._answer_about(turn, record.reply_to, run_id)
        else:
            self._no_hook(turn, record.reply_to, run_id, record.token, _REFUSALS[resumed])

    def _hand_on(self, record: rec.ResumeHook | rec.HookDelivery, successor: str, hook_id: str, turn: Turn) -> None:
        """The run was reset: what comes by a token that names it is for the run that goes on in its place."""
        delivery = rec.HookDelivery(
            token=record.token,
            run_id=successor,
            hook_id=hook_id,
            resume_id=record.resume_id,
            payload=record.payload,
            reply_to=record.reply_to,
        )
        self._send(turn.part(self.number, self.store), delivery)

    def _no_hook(self, turn: Turn, reply_to: ReplyTo, run_id: str | None, token: str, why: str) -> None:
        self._answer(
            turn,
            reply_to,
            lambda r: Reply(request_id=r, run_id=run_id, status="NOT_FOUND", message=f"hook token {token!r}: {why}"),
        )

    def _record_token(self, event: Event | None, answer: rec.Record | None, turn: Turn) -> None:
        part = turn.part(self.number, self.store)
        if event is not None:
            assert isinstance(event.data, ev.TokenClaimed | ev.TokenReleased)
            part.events.append((event.data.token.encode(), self._codec.encode(event)))
            key, value = token_key(event.data.token), encode_token(self._tokens.get(event.data.token))
            part.change({key: value}, set(), [])
        if answer is not None:
            self._send(part, answer)

    def _send(self, part: Part, record: rec.Record, headers: Headers = ()) -> None:
        """Adds a signal or a command to the transaction. Raises `RecordTooLarge`: Kafka would refuse all of it."""
        commands = type(record) in _COMMANDS
        key = (record.token if type(record) in KEYED_BY_TOKEN else record.run_id).encode()  # type: ignore[attr-defined]
        value = self._codec.encode(record)
        size, limit = len(value) + len(key) + FRAMING, self._environment.max_event_bytes
        if size > limit:
            raise RecordTooLarge.of(f"a {type(record).__name__}", size, limit)
        topic = self._catalogue.commands if commands else self._catalogue.signals
        part.outputs.append(Output(topic, value, key, headers=headers))
        part.urgent = True

    def _watch(self, message: Message, record: rec.WatchRun, at: int, turn: Turn) -> None:
        entry = self._entry(record.run_id)
        if entry is not None:
            run, watcher, child_id = entry.run, record.watcher_run_id, record.correlation_id
            self._advance(entry, lambda: run.watch(watcher, child_id, at), turn, ordered=False)
        elif not self._unknown(message):
            missing = RunNotFoundError(f"there is no run {record.run_id}", record.run_id)
            told = rec.ChildFinished(
                run_id=record.watcher_run_id,
                correlation_id=record.correlation_id,
                child_run_id=record.run_id,
                status="failed",
                error=to_error(missing),
            )
            self._send(turn.part(self.number, self.store), told)

    def _claim(self, message: Message, record: rec.StepClaim, at: int, turn: Turn) -> None:
        entry = self._entry(record.run_id)
        answer, execution = "DONE", 0
        if entry is not None and record.step_id in entry.run.state.items:
            run = entry.run
            found: list[tuple[rec.ClaimAnswer, int]] = []

            def claim() -> Outcome:
                outcome, claimed, number = run.claim(record, at)
                found.append((claimed, number))
                return outcome

            self._advance(entry, claim, turn)
            answer, execution = found[0]
        elif self._unknown(message):
            return
        self._answer(
            turn,
            record.reply_to,
            lambda r: Reply(request_id=r, run_id=record.run_id, claim=answer, execution=execution),  # type: ignore[arg-type]
        )

    # -- queries ---------------------------------------------------------------------------------------------------

    def _query(self, message: Message, record: rec.QueryRun, at: int, turn: Turn) -> None:
        run_id, reply_to = record.run_id, record.reply_to
        if not run_id:
            self._query_token(message, record, turn)
            return
        entry = self._entry(run_id)
        if entry is None or record.what == "SUMMARY":
            self._answer_about(turn, reply_to, run_id)
        elif record.what == "EVENTS":
            from_seq = max(1, record.from_seq)
            self._answer(turn, reply_to, lambda r: self._answers.page(r, run_id, from_seq))
        elif record.what == "RESULT":
            if entry.run.state.terminal or entry.run.state.header.blocked:
                self._answer(turn, reply_to, lambda r: self._answers.result(r, run_id))
            else:
                self._wait(run_id, reply_to, at)
        elif record.token is not None and entry.run.state.header.successor is not None:
            forwarded = msgspec.structs.replace(record, run_id=entry.run.state.header.successor)
            self._send(turn.part(self.number, self.store), forwarded)
        elif record.token is not None and record.token not in entry.run.state.hooks and not self._caught_up:
            self._late.append(message)  # as of a resume: the hook may come of a result that is still ahead
        else:
            self._answer(turn, reply_to, lambda r: self._answers.hooks(r, run_id, record.token))

    def _query_token(self, message: Message, record: rec.QueryRun, turn: Turn) -> None:
        assert record.token is not None  # checked
        holder = self._tokens.get(record.token).holder
        if holder is None and not self._caught_up:
            self._late.append(message)
        elif holder is None:
            self._no_hook(turn, record.reply_to, None, record.token, "no run has a hook with this token")
        else:
            self._answer(turn, record.reply_to, lambda r: Reply(request_id=r, run_id=holder.run_id))

    def _wait(self, run_id: str, reply_to: ReplyTo, at: int) -> None:
        waiting = self._waiting.pop(run_id, {})
        waiting.pop(reply_to.request_id, None)
        waiting[reply_to.request_id] = (at, reply_to)
        self._waiting[run_id] = waiting  # in the order in which they were last waited for
        while next(iter(waiting.values()))[0] < at - WAITER_MS:
            del waiting[next(iter(waiting))]
        while next(reversed(next(iter(self._waiting.values())).values()))[0] < at - WAITER_MS:
            del self._waiting[next(iter(self._waiting))]  # nobody waits for it any more

    def _answer(self, turn: Turn, reply_to: ReplyTo, make: Callable[[str], Reply | None]) -> None:
        part = turn.part(self.number, self.store)
        part.answers.append((reply_to, lambda: make(reply_to.request_id)))
        part.urgent = True

    def _answer_about(self, turn: Turn, reply_to: ReplyTo, run_id: str, message: str | None = None) -> None:
        self._answer(turn, reply_to, lambda r: self._answers.summary(r, run_id, message=message))

    # -- advancing a run -------------------------------------------------------------------------------------------

    def _entry(self, run_id: str) -> _Entry | None:
        entry = self._runs.get(run_id)
        if entry is not None:
            self._runs.move_to_end(run_id)
            return entry
        state = None if self._upkeep.is_purged(run_id) else self.store.state(run_id)
        if state is None:
            return None
        run = Run(state, self._environment, self._history(run_id))
        entry = self._runs[run_id] = self._new_entry(run, Stored(run_id, state))
        return entry

    def _new_entry(self, run: Run, stored: Stored) -> _Entry:
        trace = self._traces.within(run.state.header)
        steps = {} if self._observer is None else self._observer.steps_of(run.state)
        return _Entry(run, stored, () if trace is None else trace.headers, steps, gathers=self._always_replay)

    def _history(self, run_id: str) -> Callable[[int], Iterator[Event]]:
        def read(from_seq: int) -> Iterator[Event]:
            entry = self._runs.get(run_id)
            uncommitted = entry.recent if entry is not None else []
            for value in self.store.events(run_id, from_seq):
                event = self._codec.decode_as(Event, value)
                if uncommitted and event.seq >= uncommitted[0].seq:
                    break
                if from_seq == 1 and entry is not None and event.seq > entry.counted:
                    entry.counted = event.seq  # a replay brings what it holds into memory
                    entry.bytes += len(value)
                    self._bytes += len(value)
                yield event
            yield from (event for event in uncommitted if event.seq >= from_seq)

        return read

    def _advance(self, entry: _Entry, act: Callable[[], Outcome], turn: Turn, *, ordered: bool = True) -> None:
        """Lets one input act on a run.

        ``ordered``: the cause is a record of ``results``, whose order with the run's other causes no crash can change
        while the run waits for nothing but steps. Only then may the requests that follow go out before the commit.
        """
        state = entry.run.state
        before = (state.header.status, state.header.blocked, state.news)
        if not ordered or state.waits or state.unsettled:
            entry.tainted = turn.number
        early = self._early and entry.tainted <= turn.acked
        outcome = self._act(entry, act)
        self._record(entry, outcome, turn, early=early, before=before)

    def _act(self, entry: _Entry, act: Callable[[], Outcome]) -> Outcome:
        run_id = entry.run.state.header.run_id
        if run_id in self._poisoned:
            return self._blocked_first(entry, DurablyError(f"the processor failed on run {run_id}; see its log"), act)
        if run_id in self._refused:
            return self._blocked_first(entry, self._refused[run_id], act)
        if self._caught_up:
            return act()
        # Something ended the previous owner: perhaps one of these runs, by ending the whole process.
        with self._counted(run_id, entry.run.state.header.seq) as obstacle:
            return act() if obstacle is None else self._blocked_first(entry, obstacle, act)

    @contextmanager
    def _counted(self, run_id: str, seq: int) -> Iterator[DurablyError | None]:
        """Around an activation that may end the process; an error where it has done so too often to be tried again."""
        deaths = self.store.begin_activation(run_id, seq)
        why = f"activations of run {run_id} ended their processor {DEADLY} times"
        yield DurablyError(why) if deaths >= DEADLY else None
        if deaths < DEADLY:  # else all counts until the block is committed, and with other code one counts anew
            entry = self._runs.get(run_id)
            self.store.end_activation(run_id, seq + 1 if entry is None else entry.run.state.header.seq)

    def _blocked_first(self, entry: _Entry, why: DurablyError, act: Callable[[], Outcome]) -> Outcome:
        events = [] if entry.run.state.header.blocked else entry.run.block(why).events
        outcome = act()
        outcome.events[:0] = events
        return outcome

    def _record(self, entry: _Entry, outcome: Outcome, turn: Turn, *, early: bool, before: Told | None) -> None:
        state = entry.run.state
        header = state.header
        if not outcome.events and not state.touched and not outcome.signals:
            return  # commands come with events
        part = turn.part(self.number, self.store)
        run_id = header.run_id
        key = run_id.encode()
        # A step may ask about the child that was started before it: the start must not come after the request.
        early = early and not outcome.commands
        changes: Changes = {}
        created: set[bytes] = set()
        encode = self._codec.encode
        for event in outcome.events:
            value = encode(event)
            size, limit = len(value) + len(key) + FRAMING, self._environment.max_event_bytes
            if size > limit:
                raise RecordTooLarge.of(f"{event.type} of run {run_id}", size, limit)
            part.events.append((key, value))
            entry.counted = event.seq
            changes[entry.stored.event_key(event.seq)] = value
            if isinstance(event.data, ev.HookReceived):
                assert event.correlation_id is not None, event
                entry.resumed.add((event.correlation_id, event.data.resume_id))
                changes[resume_key(run_id, event.correlation_id, event.data.resume_id)] = b""
            entry.bytes += len(value)
            self._bytes += len(value)
        for timer in entry.stored.changes(state, changes, created):
            if timer.due < self._horizon + WINDOW_MS:  # later ones are on disk by the time their window opens
                heapq.heappush(self._timers, timer)
        for queue, request in outcome.requests if run_id not in self._refused else ():
            output = Output(
                self._requests_topic(queue),
                encode(request),
                request.step_id.encode(),
                run_id=request.run_id,
                headers=entry.headers,
            )
            if early:
                part.early.append(output)
            else:
                part.outputs.append(output)
                part.urgent = True
        for record in (*outcome.signals, *outcome.commands):
            self._send(part, record, entry.headers if type(record) is rec.StartRun else ())
        if self._observer is not None:
            self._observer.recorded(part.counts, header.workflow, outcome.events, entry.steps)
        if header.blocked:
            changes[activations_key(run_id)] = None
        if before != (header.status, header.blocked, state.news):
            self._status_changed(entry, part, changes, before)
            if state.terminal:
                self._finished.append((turn.number, run_id))
        if state.waits or state.unsettled:
            entry.tainted = turn.number
        part.change(changes, created, [key for key, value in changes.items() if value is None])
        entry.turn = turn.number
        if entry.gathers:
            entry.recent += outcome.events
        if self._always_replay:
            entry.run.evict()

    def _status_changed(self, entry: _Entry, part: Part, changes: Changes, before: Told | None) -> None:
        state = entry.run.state
        header = state.header
        run_id, key = header.run_id, header.run_id.encode()
        part.summaries[key] = self._codec.encode(state.summary())
        was_blocked = before is not None and before[1]
        if header.blocked:
            changes[blocked_key(run_id)] = b""
            if not was_blocked:
                self._blocked_runs += 1
                why = summed_up(header.error) if header.error else ""
                about = {"run_id": run_id, "workflow": header.workflow}
                log.error("run %s is blocked: %s", run_id, why, extra=about)
        elif was_blocked:
            changes[blocked_key(run_id)] = None
            self._blocked_runs -= 1
        if state.terminal and self._traces.on:
            part.ended.append(header)
        if state.terminal and header.streams:
            end = rec.StreamChunk(run_id=run_id, namespace="", writer="", n=1, kind="END", at=header.at)
            part.outputs.append(Output(self._catalogue.streams, self._codec.encode(end), key))
        if state.terminal or header.blocked:
            part.urgent = True
            for _, reply_to in self._waiting.pop(run_id, {}).values():
                part.answers.append((reply_to, lambda to=reply_to: self._answers.result(to.request_id, run_id)))  # type: ignore[misc]

    # -- time ------------------------------------------------------------------------------------------------------

    @property
    def next_due(self) -> int | None:
        """When the next timer fires, in milliseconds since the epoch; None: not within the window."""
        return self._timers[0].due if self._caught_up and self._timers else None

    def _fire(self, turn: Turn) -> None:
        now = self._now()
        if now + WINDOW_MS // 2 >= self._horizon:
            # Some of these are there since they were made. What is sorted is a heap.
            self._timers = sorted({*self._timers, *self.store.timers(self._horizon, now + WINDOW_MS)})
            self._horizon = now + WINDOW_MS
        for _ in range(TIMERS_A_TURN):
            if not self._timers or self._timers[0].due > now:
                return
            _, run_id, correlation_id = heapq.heappop(self._timers)
            entry = self._entry(run_id)
            item = entry.run.state.items.get(correlation_id) if entry else None
            if entry is None or item is None or item.due is None or item.due > now:
                continue  # closed, or moved: then its new timer is on its way
            if isinstance(item, OpenStep) and item.status == "leased" and now < self._leases_from:
                heapq.heappush(self._timers, Timer(self._leases_from, run_id, correlation_id))
                continue
            self._fire_one(entry, correlation_id, item.due, turn)
            item = entry.run.state.items.get(correlation_id)
            if isinstance(item, OpenStep) and item.status == "backoff" and item.due <= now:
                # A lease lapsed into a retry that is due at the same instant: to the store it is the same timer.
                heapq.heappush(self._timers, Timer(item.due, run_id, correlation_id))

    def _catch_up(self, turn: Turn) -> None:
        behind = {topic for topic, end in self._ends.items() if self._positions[topic] < end}
        if not self._complete and behind <= {self._catalogue.results}:
            self._complete = True
            parked, self._parked = self._parked, []
            self._committed = {}  # their offsets were held back
            for message in parked:
                self._take(message, turn)
        if self._complete and not behind:
            self._caught_up = True
            self._blocked = self.store.blocked()
            late, self._late = self._late, []
            self._committed = {}
            for message in late:
                self._take(message, turn)

    def _fire_one(self, entry: _Entry, correlation_id: str, due: int, turn: Turn) -> None:
        run = entry.run
        try:
            self._advance(entry, lambda: run.timer(correlation_id, due), turn, ordered=False)
        except StoreError:
            raise
        except Exception as e:
            log.exception("a timer of run %s", run.state.header.run_id)
            raise Poisoned(run.state.header.run_id) from e

    def _unblock(self, turn: Turn) -> None:
        """Tries blocked runs, once each after a take-over, with the code that there is now."""
        again: list[str] = []
        for run_id in self._blocked:
            entry = self._entry(run_id)
            if (
                entry is None
                or not entry.run.state.header.blocked
                or run_id in self._poisoned
                or run_id in self._refused
            ):
                continue
            if entry.turn > turn.acked:
                again.append(run_id)  # it is replayed from the store, which must have all of its log
                continue
            header = entry.run.state.header
            stubborn = header.error is not None and header.error.type in _TRY_AGAIN_ONLY_WITH_OTHER_CODE
            if stubborn and header.blocked_under == self._environment.code_version:
                continue
            try:
                self._unblock_one(entry, turn)
            except StoreError:
                raise
            except Exception as e:
                log.exception("run %s", run_id)
                raise Poisoned(run_id) from e
        self._blocked = again

    def _unblock_one(self, entry: _Entry, turn: Turn) -> None:
        run, state = entry.run, entry.run.state
        run_id = state.header.run_id
        before = (state.header.status, state.header.blocked, state.news)
        with self._counted(run_id, state.header.seq) as obstacle:
            outcome = run.unblock() if obstacle is None else run.block(obstacle)
        entry.tainted = turn.number
        self._record(entry, outcome, turn, early=False, before=before)
        for correlation_id, item in state.items.items():
            if item.due is not None:
                heapq.heappush(self._timers, Timer(item.due, run_id, correlation_id))

    # -- what cannot be handled ------------------------------------------------------------------------------------

    def _dead_letter(self, message: Message, reason: str, turn: Turn) -> None:
        log.error("dead letter: %s[%s]@%s: %s", message.topic, message.partition, message.offset, reason)
        part = turn.part(self.number, self.store)
        if self._observer is not None:
            self._observer.dead_letter(part.counts)
        value, key = message.value, message.key
        if value is not None and len(value) > self._environment.max_payload_bytes:
            value = value[: self._environment.max_payload_bytes - RECORD_OVERHEAD]
            reason = f"{reason} (its value is cut short; the whole is at the place named)"
        if key is not None and len(key) > MAX_KEY:
            key = key[:MAX_KEY]
            reason = f"{reason} (its key of {len(message.key or b''):,} bytes is cut short)"
        letter = rec.DeadLetter(
            topic=message.topic,
            partition=message.partition,
            offset=message.offset,
            key=key,
            value=value,
            reason=reason,
            component="processor",
            at=message.timestamp,
        )
        output = Output(self._catalogue.dead_letters, self._codec.encode(letter), key or b"")
        part.outputs.append(output)

    def _quarantine(self, message: Message, record: rec.Record, turn: Turn) -> None:
        why = "handling it raised an error in the processor; its log has the traceback"
        self._dead_letter(message, why, turn)
        self._refuse(record, f"{why}, and the record is among the dead letters", turn)
        of_token = isinstance(record, rec.ResumeHook)
        run_id = tokens.run_of(record.token) if of_token else record.run_id  # type: ignore[attr-defined]
        entry = self._entry(run_id) if run_id else None
        if entry is not None:
            place = f"{message.topic}[{message.partition}]@{message.offset}"
            error = DurablyError(f"the processor failed on its input {place}, which is among the dead letters")
            self._advance(entry, lambda: entry.run.block(error), turn, ordered=False)

    # -- memory ----------------------------------------------------------------------------------------------------

    def _shrink(self, turn: Turn) -> None:
        self._tokens.forget(turn.acked)
        while self._finished and self._finished[0][0] <= turn.acked:
            self._forget(self._finished.popleft()[1])
        if len(self._runs) <= self._max_runs and self._bytes <= self._max_bytes:
            return
        # A run with uncommitted events must stay: the store does not know all of it yet.
        for run_id in [r for r, e in islice(self._runs.items(), 1_000) if e.turn <= turn.acked]:
            self._forget(run_id)
            if len(self._runs) <= self._max_runs and self._bytes <= self._max_bytes:
                return

    def _forget(self, run_id: str) -> None:
        entry = self._runs.pop(run_id, None)
        if entry is not None:
            self._bytes -= entry.bytes
            entry.run.evict()

    def _let_go(self, run_id: str, acked: int) -> bool:
        """Forgets a run, unless it has changes that the store does not know."""
        entry = self._runs.get(run_id)
        if entry is not None and entry.turn > acked:
            return False
        self._forget(run_id)
        self._waiting.pop(run_id, None)
        return True

    def drop(self) -> None:
        """Forgets everything that is in memory only."""
        for entry in self._runs.values():
            entry.run.evict()
        self._runs.clear()


_COMMANDS = frozenset({rec.StartRun, rec.CancelRun, rec.WatchRun, rec.QueryRun})
_SIGNALLED: dict[type, Callable[[Run, Any, int], Outcome]] = {
    rec.TokenGranted: Run.granted,
    rec.TokenRefused: Run.refused,
    rec.ChildFinished: Run.child_finished,
}
_REFUSALS: dict[Resumed, str] = {
    "UNKNOWN": "its run has no hook with it: it does not exist yet, or was disposed of, or the token is wrong",
    "ENDED": "its run has ended",
}
_TRY_AGAIN_ONLY_WITH_OTHER_CODE = frozenset(
    {"durably_processor.engine.watchdog:ActivationTimeout", "durably.errors:DurablyError"}
)
