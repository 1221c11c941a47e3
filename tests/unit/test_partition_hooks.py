"""Tokens, resumes and children in a partition, without Kafka."""

from __future__ import annotations

import pytest
from durably.authoring import WorkflowDefinition
from durably.broker.port import TP
from durably.children import start
from durably.errors import RecordTooLarge
from durably.payloads import dump, load
from durably.tokens import default_token
from durably_processor.engine.run import Run
from durably_processor.partition import Poisoned
from durably_processor.state.store import Holder, Token
from durably_processor.tokens import REMEMBERED, Tokens, applied
from durably_processor.turn import Part
from durably_schemas import events as ev
from durably_schemas import records as rec
from partition_lab import CATALOGUE, CODEC, Lab, content, doing, rebuilt, requests

pytestmark = pytest.mark.usefixtures("guarded")


TO = rec.ReplyTo(partition=0, request_id="q")


def resume(lab: Lab, token: str, value: object, resume_id: str, key: bytes | None = None):
    record = rec.ResumeHook(token=token, resume_id=resume_id, payload=dump(value, "p"), requested_at=0, reply_to=TO)
    return lab.put(CATALOGUE.commands, record, key if key is not None else token.encode())


def events(part) -> list[rec.Event]:
    return [CODEC.decode_as(rec.Event, value) for _, value in part.events]


def reply(part) -> rec.Reply:
    ((_, make),) = part.answers
    return make()


def hold(lab: Lab, run_id: str = "r1", n: int = 1) -> None:
    """Starts a run and lets it have the token order-7."""
    claimed = lab.settle(*lab.signals(lab.settle(lab.start("hooked", n, run_id))))
    lab.settle(*lab.signals(claimed))


def test_a_resume_by_a_custom_token_reaches_the_run_and_is_answered_when_it_is_committed(lab):
    hold(lab)
    routed = lab.settle(resume(lab, "order-7", "yes", "r-1"))
    assert not routed.answers, "the run's owner answers"
    part = lab.settle(*lab.signals(routed))
    assert [e.type for e in events(part)] == ["hook_received", "run_completed"]
    assert reply(part).summary.status == "completed"
    released = lab.settle(*lab.signals(part))
    assert [(e.type, e.seq, e.run_id) for e in events(released)] == [("token_released", 2, "token|order-7|r1|hook_1")]
    assert lab.store.token("order-7").holder is None


def test_a_copy_of_a_resume_is_answered_as_recorded_even_when_another_run_holds_the_token(lab):
    hold(lab)
    lab.settle(*lab.signals(lab.settle(*lab.signals(lab.settle(resume(lab, "order-7", "yes", "r-1"))))))
    hold(lab, "r2")
    part = lab.settle(*lab.signals(lab.settle(resume(lab, "order-7", "yes", "r-1"))))
    assert not part.events
    assert reply(part).summary.run_id == "r1"
    part = lab.settle(*lab.signals(lab.settle(resume(lab, "order-7", "new", "r-2"))))
    assert reply(part).summary.run_id == "r2"


def test_a_copy_is_answered_as_recorded_however_many_resumes_came_after_it(lab):
    hold(lab, n=200)
    for n in range(200):
        lab.settle(*lab.signals(lab.settle(resume(lab, "order-7", n, f"r-{n}"))))
    lab.settle(*lab.signals(lab.settle(lab.put(CATALOGUE.commands, rec.CancelRun(run_id="r1", requested_at=0)))))
    part = lab.settle(*lab.signals(lab.settle(resume(lab, "order-7", 0, "r-0"))))
    assert reply(part).summary.status == "completed"
    late = reply(lab.settle(*lab.signals(lab.settle(resume(lab, "order-7", 0, "r-new")))))
    assert (late.status, late.run_id) == ("NOT_FOUND", "r1")
    assert "ended" in late.message


def test_a_resume_that_is_read_again_before_its_commit_is_delivered_once(lab):
    token = default_token("r1", "n", 1)
    start = lab.start("hooked", 0)
    message = resume(lab, token, 1, "r-1", b"r1")
    lab.settle(start)
    part = lab.turn(message, resume(lab, token, 1, "r-1", b"r1"))
    assert [e.type for e in events(part)].count("hook_received") == 1
    assert len(part.answers) == 2


@pytest.mark.parametrize(
    ("token", "key", "why"),
    [
        ("hook_x", b"hook_x", "names no run"),
        ("hook_1_x.r1", b"r2", "demands"),
        ("", b"", "1 to 1024"),
        ("x" * 2000, b"x" * 2000, "1 to 1024"),
    ],
)
def test_a_resume_that_is_not_where_its_token_belongs_is_a_dead_letter(lab, token, key, why):
    part = lab.settle(resume(lab, token, 1, "r", key))
    (letter,) = [CODEC.decode_as(rec.DeadLetter, o.value) for o in part.outputs]
    assert why in letter.reason


def test_one_resume_id_counts_once_for_each_hook_of_a_run(lab):
    async def two(n: int) -> list[object]:
        from durably import create_hook

        return [await hook for hook in [create_hook(), create_hook()]]

    lab.registry.workflows["two"] = WorkflowDefinition("two", two)
    lab.settle(lab.start("two", 1))
    for n in (1, 2):
        part = lab.settle(resume(lab, default_token("r1", "n", n), n, "payment-4711", b"r1"))
        assert [e.type for e in events(part)][:1] == ["hook_received"]
    assert [e.type for e in events(part)][-1] == "run_completed"
    again = lab.settle(resume(lab, default_token("r1", "n", 1), 1, "payment-4711", b"r1"))
    assert not again.events
    assert reply(again).status == "OK"


def test_a_resume_that_cannot_be_handled_is_refused_and_blocks_its_run_alone(lab, monkeypatch):
    lab.settle(lab.start("hooked", 0), lab.start("chain", 1, "other"))
    message = resume(lab, default_token("r1", "n", 1), 1, "r", b"r1")
    with monkeypatch.context() as broken:
        broken.setattr(Run, "resume", lambda *_: 1 / 0)
        with pytest.raises(Poisoned) as poison:
            lab.turn(message)
    lab.partition.drop()
    lab.options["poisoned"] = frozenset({poison.value.what})
    lab.take_over({**{topic: len(log) for topic, log in lab.logs.items()}, CATALOGUE.commands: message.offset})
    part = lab.settle(message)
    assert reply(part).status == "REFUSED"
    assert lab.store.state("r1").header.blocked
    assert not lab.store.state("other").header.blocked


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (rec.ResumeHook(token="t", resume_id="x" * 2000, payload=dump(1, "p"), requested_at=0), "resume_id of 2,000"),
        (rec.ResumeHook(token="t", resume_id="", payload=dump(1, "p"), requested_at=0), "resume_id of 0"),
        (
            rec.CancelRun(run_id="r", requested_at=0, reply_to=rec.ReplyTo(partition=0, request_id="x" * 2000)),
            "request_id",
        ),
        (
            rec.StartRun(
                run_id="r",
                workflow="chain",
                input=dump([[1], {}], "i"),
                requested_at=0,
                parent=rec.Parent(run_id="x" * 600_000, correlation_id="c", root_run_id="r"),
            ),
            "the parent's run_id",
        ),
    ],
)
def test_ids_that_would_swell_other_records_are_refused_where_they_come_in(lab, record, why):
    part = lab.settle(lab.put(CATALOGUE.commands, record))
    (letter,) = [CODEC.decode_as(rec.DeadLetter, o.value) for o in part.outputs]
    assert why in letter.reason


def test_what_is_sent_on_and_too_large_for_kafka_is_found_before_the_commit(lab):
    with pytest.raises(RecordTooLarge, match="a HookDelivery takes"):
        lab.partition._send(
            Part(lab.store),
            rec.HookDelivery(
                token="t", run_id="r", hook_id="hook_1", resume_id="r",
                payload=rec.Payload(content_type="", data=b"x" * 1_000_000),
            ),
        )  # fmt: skip


def test_a_step_does_not_overtake_the_child_that_was_started_before_it(lab):
    async def asks(n: int) -> None:
        child = await start("chain", 0)
        await doing(n)
        await child.result()

    lab.registry.workflows["asks"] = WorkflowDefinition("asks", asks)
    part = lab.turn(lab.start("asks", 1))
    assert not part.early
    assert [o.topic for o in part.outputs] == [CATALOGUE.requests("default"), CATALOGUE.commands]


def test_after_a_take_over_a_question_about_a_hook_waits_as_a_resume_does(lab):
    positions = {topic: len(log) for topic, log in lab.logs.items()}
    start_message = lab.start("hooked", 0)
    ask = rec.QueryRun(run_id="r1", what="HOOK", token="hook_9_x.r1", reply_to=TO)
    question = lab.put(CATALOGUE.commands, ask)
    other = lab.put(CATALOGUE.commands, rec.QueryRun(run_id="", what="HOOK", token="order-7", reply_to=TO), b"order-7")
    result = lab.put(CATALOGUE.results, rec.StepClaim(run_id="r1", step_id="s", attempt=1, worker="w", reply_to=TO))
    lab.partition.drop()
    lab.take_over(positions)
    part = lab.settle(start_message, question, other)
    assert not part.answers
    part = lab.settle(result)
    assert [make().status for _, make in part.answers][1:] == ["NOT_FOUND", "NOT_FOUND"]


def test_a_lease_is_as_long_as_the_worker_says_whatever_its_clock_says(lab):
    (request,) = requests(lab.settle(lab.start("chain", 1)), early=True)
    behind = lab.now - 3_600_000
    beat = rec.StepHeartbeat(
        run_id="r1", step_id=request.step_id, attempt=1, worker="w", started_at=behind, lease_until=behind + 20_000,
        sent_at=behind,
    )  # fmt: skip
    lab.settle(lab.put(CATALOGUE.results, beat))
    assert lab.store.state("r1").items[request.step_id].due == lab.now + 20_000


def test_nobody_holds_the_token_nobody_has_the_hook_and_the_answer_says_which(lab):
    assert "no run has a hook" in reply(lab.settle(resume(lab, "order-7", 1, "r"))).message
    unknown = reply(lab.settle(resume(lab, "hook_1_x.nobody", 1, "r", b"nobody")))
    assert unknown.status == "NOT_FOUND"
    assert "does not exist yet" in unknown.message


def test_after_a_take_over_a_resume_waits_for_the_hook_that_a_result_may_open(tmp_path):
    lab = Lab(tmp_path)

    async def late(n: int) -> object:
        from durably import create_hook
        from partition_lab import doing

        await doing(n)
        return await create_hook()

    lab.registry.workflows["late"] = WorkflowDefinition("late", late)
    (request,) = requests(lab.settle(lab.start("late", 1)), early=True)
    positions = {topic: len(log) for topic, log in lab.logs.items()}
    answer = lab.answer(request)
    message = resume(lab, default_token("r1", "n", 1), "kept", "r-1", b"r1")
    lab.partition.drop()
    lab.take_over(positions)
    part = lab.turn(message)
    assert not part.events
    assert part.offsets[TP(CATALOGUE.commands, 0)] == message.offset, "its offset is held"
    part = lab.turn(answer)
    assert [e.type for e in events(part)][-2:] == ["hook_received", "run_completed"]
    assert part.offsets[TP(CATALOGUE.commands, 0)] == message.offset + 1
    lab.partition.drop()
    lab.store.close()


def test_who_asks_for_a_token_learns_the_run_and_the_run_tells_the_hook(lab):
    hold(lab)
    ask = rec.QueryRun(run_id="", what="HOOK", token="order-7", reply_to=TO)
    assert reply(lab.settle(lab.put(CATALOGUE.commands, ask, b"order-7"))).run_id == "r1"
    ask = rec.QueryRun(run_id="r1", what="HOOK", token="order-7", reply_to=TO)
    (hook,) = reply(lab.settle(lab.put(CATALOGUE.commands, ask))).hooks
    assert (hook.token, hook.hook_id, hook.received, load(hook.metadata)) == ("order-7", "hook_1", 0, {"n": 1})
    ask = rec.QueryRun(run_id="r1", what="HOOK", token="other", reply_to=TO)
    assert reply(lab.settle(lab.put(CATALOGUE.commands, ask))).status == "NOT_FOUND"


def test_a_summary_tells_the_open_hooks_as_they_come_and_go(lab):
    part = lab.settle(lab.start("hooked", 1))
    assert CODEC.decode_as(rec.RunSummary, part.summaries[b"r1"]).hooks == ("order-7",)
    granted = lab.settle(*lab.signals(lab.settle(*lab.signals(part))))
    assert not granted.summaries
    part = lab.settle(*lab.signals(lab.settle(resume(lab, "order-7", "yes", "r-1"))))
    assert CODEC.decode_as(rec.RunSummary, part.summaries[b"r1"]).hooks == ()


def test_who_watches_a_run_that_is_not_there_is_told_so_once_that_is_certain(lab):
    watch = rec.WatchRun(run_id="nobody", watcher_run_id="r1", correlation_id="child_1")
    (told,) = [
        CODEC.decode_as(rec.ChildFinished, o.value) for o in lab.settle(lab.put(CATALOGUE.commands, watch)).outputs
    ]
    assert (told.run_id, told.status, told.error.type) == ("r1", "failed", "durably.errors:RunNotFoundError")


def test_recovery_rebuilds_tokens_and_resumes(lab, tmp_path):
    hold(lab, n=3)
    lab.settle(*lab.signals(lab.settle(resume(lab, "order-7", 1, "r-1"))))
    lab.settle(lab.start("hooked", 2, "r2"))
    for n in (2, 3):
        lab.settle(*lab.signals(lab.settle(*lab.signals(lab.settle(resume(lab, "order-7", n, f"r-{n}"))))))
    with rebuilt(lab, tmp_path) as (store, _):
        assert content(store, b"erotbckm") == content(lab.store, b"erotbckm")
        assert store.received("r1", "hook_1", "r-2")
        assert list(store.token("order-7").resumes) == ["r-1", "r-2", "r-3"]


def test_a_token_has_one_holder_at_a_time_and_a_release_applies_to_that_holder_alone():
    tokens = Tokens(lambda _: Token())
    claim = [rec.ClaimToken(token="t", run_id=f"r{n}", hook_id="hook_1") for n in range(3)]
    answers = [tokens.claim(c, 0, 1) for c in (*claim, claim[0])]
    assert [type(a).__name__ for _, a in answers] == ["TokenGranted", "TokenRefused", "TokenRefused", "TokenGranted"]
    assert [event is not None for event, _ in answers] == [True, False, False, False]
    assert answers[1][1].holder_run_id == "r0"
    assert tokens.release(rec.ReleaseToken(token="t", run_id="r1", hook_id="hook_1"), 0, 2) is None
    assert tokens.release(rec.ReleaseToken(token="t", run_id="r0", hook_id="hook_2"), 0, 2) is None
    assert tokens.release(rec.ReleaseToken(token="t", run_id="r0", hook_id="hook_1"), 0, 2) is not None
    assert isinstance(tokens.claim(claim[1], 0, 3)[1], rec.TokenGranted)
    tokens.forget(2)
    assert tokens.get("t").holder == Holder("r1", "hook_1"), "what is not applied yet is remembered"


def test_a_token_remembers_a_bounded_number_of_resumes():
    token = Token()
    for n in range(3 * REMEMBERED):
        token = applied(token, ev.TokenReleased(token="t", run_id="r", hook_id="h", resume_ids=(f"x{n}",)), n)
    assert list(token.resumes) == [f"x{n}" for n in range(2 * REMEMBERED, 3 * REMEMBERED)]
