"""A partition that is sent anything, in any order, twice, and dies in between: it goes on, and its logs keep the promise."""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from itertools import count
from pathlib import Path
from typing import Any

import checker
import pytest
from durably import step, tokens
from durably.authoring import WorkflowDefinition
from durably.broker.port import TP, Message
from durably.payloads import JSON, MSGPACK, dump, dump_arguments
from durably_processor.engine import guards
from durably_processor.restore import Restore
from durably_processor.state.store import Store
from durably_schemas import CodecError
from durably_schemas import events as ev
from durably_schemas import records as rec
from fuzz.budget import budget
from fuzz.test_fuzz_codec import written
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from partition_lab import CATALOGUE, CODEC, T0, Lab, content, doing, requests

RUNS = st.sampled_from(["r1", "r2", "r3"])
TOPICS = [CATALOGUE.commands, CATALOGUE.results, CATALOGUE.signals]
IDS = st.one_of(RUNS, st.text(max_size=5), st.sampled_from(["", "|", "\0", "r1|x", "x" * 1_100, "hook_0"]))
TOKENS = st.one_of(IDS, st.sampled_from(["order-7", "hook_0_x.r1", "hook_.r2", "hook_1_x."]))
INSTANTS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 10**6).map(lambda ms: T0 + ms), st.just(0))
PAYLOADS = st.one_of(
    st.builds(lambda n: dump(n, "it"), st.integers()),
    st.builds(rec.Payload, content_type=st.sampled_from([MSGPACK, JSON, "x/y", f"{MSGPACK};codec=zz"]), data=st.binary(max_size=9)),
)  # fmt: skip
ERRORS = st.recursive(
    st.builds(rec.Error, type=st.sampled_from(["builtins:ValueError", "x:Y", ""]), message=st.text(max_size=3), data=st.none() | PAYLOADS),
    lambda cause: st.builds(rec.Error, type=st.just("builtins:OSError"), message=st.just("m"), cause=cause),
    max_leaves=3,
)  # fmt: skip
REPLY_TO = st.none() | st.builds(rec.ReplyTo, partition=st.integers(-1, 3), request_id=IDS)
OUTCOMES = st.one_of(
    st.builds(rec.StepSucceeded, result=PAYLOADS),
    st.builds(rec.StepFailed, error=ERRORS, retry_after=st.none() | INSTANTS, fatal=st.booleans()),
)
STREAMS = st.lists(
    st.builds(
        rec.StreamWritten,
        namespace=IDS,
        writer=IDS,
        partition=st.just(0),
        first_offset=INSTANTS,
        chunks=st.integers(0, 9),
    ),
    max_size=2,
).map(tuple)
STRANGE = st.sampled_from(["StartRun", "ResumeHook", "CancelRun", "StepResult", "ClaimToken", "Event", "Reply"])


@step(max_retries=2, backoff="10s", timeout="5s")
async def fuzz_timed(x: int) -> int:
    return x


async def fuzz_timing(n: int) -> int:
    return await fuzz_timed(n) + await doing(n)


class PartitionMachine(RuleBasedStateMachine):
    """The tests are Kafka, and everybody who may write to it."""

    always_replay = False

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="durably-fuzz-"))
        self.lab = Lab(self.folder, always_replay=self.always_replay)
        self.lab.registry.workflows["fuzz_timing"] = WorkflowDefinition("fuzz_timing", fuzz_timing)
        self.requests: list[rec.StepRequest] = []
        self.runs = ["r1", "r2", "r3"]
        self.copies = count()
        self.committed: dict[str, int] = dict.fromkeys(self.lab.logs, 0)

    def teardown(self) -> None:
        try:
            self.lab.settle()
            self.what_is_rebuilt_is_what_was_live()
        finally:
            self.lab.partition.drop()
            self.lab.store.close()
            shutil.rmtree(self.folder)

    @initialize(name=st.sampled_from(["chain", "fanning", "hooked", "napping", "fuzz_timing"]), n=st.integers(0, 3))
    def something_runs(self, name: str, n: int) -> None:
        self.take(self.lab.start(name, n))

    def take(self, *messages: Message, commits: bool = True) -> None:
        part = self.lab.turn(*messages)
        self.requests += [*requests(part, early=True), *requests(part, early=False)]
        for output in part.outputs:
            CODEC.decode(output.value)
        if not commits:
            self.crash()
            return
        self.lab.commit(part)
        for _, answer in part.answers:
            if (reply := answer()) is not None:
                CODEC.encode(reply)
        self.committed = dict(self.lab.partition._positions)
        for tp, offset in part.offsets.items():
            self.committed[tp.topic] = offset
        signals = self.lab.signals(part)
        if signals:
            self.take(*signals)

    def crash(self) -> None:
        """What was not committed is forgotten, and read again."""
        self.lab.partition.drop()
        self.lab.take_over(self.committed)
        left = [m for topic, log in self.lab.logs.items() for m in log[self.committed[topic] :]]
        self.take(*left)

    def put(self, topic: str, record: rec.Record | bytes, key: str) -> Message | None:
        try:
            return self.lab.put(topic, record, key.encode())
        except (CodecError, UnicodeEncodeError):  # nobody could write it
            return None

    # -- who knows what it does ------------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from(["chain", "hooked", "napping", "fuzz_timing", "nobody's"]),
        n=st.integers(0, 3),
        run_id=RUNS,
    )
    def start(self, name: str, n: int, run_id: str) -> None:
        given = dump_arguments(self.lab.registry.workflows["chain"].fn, (n,), {}, name)
        record = rec.StartRun(run_id=run_id, workflow=name, input=given, requested_at=0, nonce="n")
        self.take(self.lab.put(CATALOGUE.commands, record))

    @rule(data=st.data(), commits=st.booleans(), wrong=st.booleans())
    def answer(self, data: st.DataObject, commits: bool, wrong: bool) -> None:
        if self.requests:
            request = data.draw(st.sampled_from(self.requests))
            self.take(self.lab.answer(request, ValueError("no") if wrong else None), commits=commits)

    @rule(ms=st.sampled_from([1, 10_000, 60_000, 30 * 86_400_000]))
    def time_passes(self, ms: int) -> None:
        self.lab.now += ms
        self.take()

    @rule()
    def dies(self) -> None:
        self.crash()

    # -- who does not ----------------------------------------------------------------------------------------------

    @rule(data=st.data(), outcome=OUTCOMES, at=INSTANTS, streams=STREAMS, attempt=st.integers(-1, 3))
    def answer_oddly(self, data: st.DataObject, outcome: Any, at: int, streams: Any, attempt: int) -> None:
        if self.requests:
            request = data.draw(st.sampled_from(self.requests))
            result = rec.StepResult(
                run_id=request.run_id, step_id=request.step_id, attempt=attempt, fingerprint=request.fingerprint,
                outcome=outcome, started_at=at, finished_at=at, worker="w", streams=streams,
            )  # fmt: skip
            self.take(self.lab.put(CATALOGUE.results, result))

    @rule(data=st.data(), started=INSTANTS, until=INSTANTS, sent=INSTANTS, attempt=st.integers(0, 3), reply_to=REPLY_TO)
    def heartbeat(self, data: st.DataObject, started: int, until: int, sent: int, attempt: int, reply_to: Any) -> None:
        if self.requests:
            request = data.draw(st.sampled_from(self.requests))
            beat = rec.StepHeartbeat(
                run_id=request.run_id, step_id=request.step_id, attempt=attempt, worker="w", started_at=started,
                lease_until=until, sent_at=sent, reply_to=reply_to,
            )  # fmt: skip
            self.take(self.lab.put(CATALOGUE.results, beat))

    @rule(data=st.data(), attempt=st.integers(0, 3), request_id=IDS)
    def claim_step(self, data: st.DataObject, attempt: int, request_id: str) -> None:
        if self.requests:
            request = data.draw(st.sampled_from(self.requests))
            to = rec.ReplyTo(partition=0, request_id=request_id)
            claim = rec.StepClaim(
                run_id=request.run_id, step_id=request.step_id, attempt=attempt, worker="w", reply_to=to
            )
            self.take(self.lab.put(CATALOGUE.results, claim))

    @rule(token=TOKENS, resume_id=IDS, payload=PAYLOADS, reply_to=REPLY_TO)
    def resume(self, token: str, resume_id: str, payload: rec.Payload, reply_to: Any) -> None:
        record = rec.ResumeHook(token=token, resume_id=resume_id, payload=payload, requested_at=0, reply_to=reply_to)
        if (message := self.put(CATALOGUE.commands, record, tokens.routing_key(token))) is not None:
            self.take(message)

    @rule(run_id=RUNS, reason=st.none() | IDS, reply_to=REPLY_TO)
    def cancel(self, run_id: str, reason: str | None, reply_to: Any) -> None:
        self.take(
            self.lab.put(
                CATALOGUE.commands, rec.CancelRun(run_id=run_id, requested_at=0, reason=reason, reply_to=reply_to)
            )
        )

    @rule(data=st.data(), n=st.integers(-1, 15), reason=st.none() | IDS, reply_to=REPLY_TO, commits=st.booleans())
    def reset(self, data: st.DataObject, n: int, reason: str | None, reply_to: Any, commits: bool) -> None:
        of, new = data.draw(st.sampled_from(self.runs)), f"r{len(self.runs) + 1}"
        self.runs.append(new)
        record = rec.ResetRun(run_id=of, new_run_id=new, to_event=n, requested_at=0, reason=reason, reply_to=reply_to)
        self.take(self.lab.put(CATALOGUE.commands, record), commits=commits)

    @rule(
        run_id=RUNS,
        what=st.sampled_from(["SUMMARY", "EVENTS", "RESULT", "HOOK"]),
        seq=INSTANTS,
        token=st.none() | TOKENS,
    )
    def query(self, run_id: str, what: rec.Query, seq: int, token: str | None) -> None:
        to = rec.ReplyTo(partition=0, request_id="q")
        self.take(
            self.lab.put(
                CATALOGUE.commands, rec.QueryRun(run_id=run_id, what=what, from_seq=seq, token=token, reply_to=to)
            )
        )

    @rule(run_id=RUNS, start_at=INSTANTS, given=PAYLOADS, parent=st.none() | IDS, attributes=st.dictionaries(IDS, IDS))
    def start_oddly(self, run_id: str, start_at: int, given: rec.Payload, parent: str | None, attributes: Any) -> None:
        of = None if parent is None else rec.Parent(run_id=parent, correlation_id=parent, root_run_id=parent)
        record = rec.StartRun(
            run_id=run_id, workflow="chain", input=given, requested_at=start_at, start_at=start_at, parent=of,
            attributes=attributes,
        )  # fmt: skip
        if (message := self.put(CATALOGUE.commands, record, run_id)) is not None:
            self.take(message)

    @rule(topic=st.sampled_from(TOPICS), name=STRANGE, key=st.none() | IDS, data=st.data())
    def misplace(self, topic: str, name: str, key: str | None, data: st.DataObject) -> None:
        """Any record anywhere, under its own key or another."""
        value = data.draw(written(name))
        record = CODEC.decode(value)
        own = getattr(record, "token", None) or getattr(record, "run_id", None) or ""
        if (message := self.put(topic, value, own if key is None else key)) is not None:
            self.take(message)

    @rule(topic=st.sampled_from(TOPICS), value=st.binary(max_size=20), key=st.binary(max_size=4))
    def garbage(self, topic: str, value: bytes, key: bytes) -> None:
        self.take(self.lab.put(topic, value, key))

    @rule(data=st.data(), topic=st.sampled_from(TOPICS))
    def repeat(self, data: st.DataObject, topic: str) -> None:
        """A copy of a record, as a producer sends that has lost an acknowledgement."""
        if self.lab.logs[topic]:
            old = data.draw(st.sampled_from(self.lab.logs[topic]))
            self.take(self.lab.put(topic, old.value, old.key))

    # -- what holds ------------------------------------------------------------------------------------------------

    @invariant()
    def the_logs_keep_the_promise(self) -> None:
        logs: dict[str, list[rec.Event]] = defaultdict(list)
        held: dict[str, tuple[str, str]] = {}
        wrong: list[str] = []
        for _, value in self.lab.events:
            event = CODEC.decode_as(rec.Event, value)
            if isinstance(event.data, ev.TokenClaimed | ev.TokenReleased):
                wrong += checker._about_token(event, held)
            else:
                logs[event.run_id].append(event)
        for run_id, log in logs.items():
            wrong += checker._about_run(run_id, log, ended=False)
        assert wrong == []

    @rule()
    def what_is_rebuilt_is_what_was_live(self) -> None:
        folder = self.folder / f"copy-{next(self.copies)}"
        store = Store(folder)
        try:
            restore = Restore(0, store, EventsOnly(self.lab.events), CATALOGUE, CODEC)
            assert restore.step(60)
            # Not what only this process knows: leases that heartbeats have extended, claims, and counted activations.
            for kinds in (b"e", b"r", b"m", b"b", b"k"):
                assert content(store, kinds) == content(self.lab.store, kinds)
        finally:
            store.close()
            shutil.rmtree(folder)


class EventsOnly:
    """The broker port, as far as a restore uses it: a partition of ``events``, and an empty one of ``snapshots``."""

    def __init__(self, events: list[tuple[bytes, bytes]]) -> None:
        self.events = events

    def identity(self, topic: str) -> str:
        return topic

    def start_offsets(self, tps: list[TP]) -> dict[TP, int]:
        return dict.fromkeys(tps, 0)

    def end_offsets(self, tps: list[TP]) -> dict[TP, int]:
        return {tp: len(self.events) if tp.topic == CATALOGUE.events else 0 for tp in tps}

    def reader(self, positions: dict[TP, int]) -> EventsOnly:
        return self

    def poll(self, timeout: float, limit: int) -> list[Message]:
        return [Message(CATALOGUE.events, 0, n, T0, key, value, ()) for n, (key, value) in enumerate(self.events)]

    def close(self) -> None:
        """There is nothing to let go of."""


class ReplayingMachine(PartitionMachine):
    """The same where each input meets a run that is made anew of its log."""

    always_replay = True


@pytest.mark.parametrize("machine", [PartitionMachine, ReplayingMachine])
def test_a_partition_takes_whatever_it_is_sent(machine: type[PartitionMachine]) -> None:
    guards.install()
    try:
        run_state_machine_as_test(machine, settings=budget(8, stateful_step_count=25))
    finally:
        guards.uninstall()
