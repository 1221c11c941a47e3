"""The checker finds what it is there to find."""

from __future__ import annotations

import checker
import pytest
from durably import health
from durably.broker import connect
from durably_schemas import Catalogue, Codec
from durably_schemas import events as ev
from durably_schemas.records import DeadLetter, Parent, Payload, RunSummary, StartRun

NOTHING = Payload(content_type="application/json", data=b"null")
CREATED = ev.RunCreated(workflow="w", input=NOTHING)
BORN = ev.RunCreated(workflow="w", input=NOTHING, parent=Parent(run_id="r", correlation_id="c", root_run_id="r"))
STEP = ev.StepCreated(
    step="s",
    queue="q",
    input=NOTHING,
    fingerprint="",
    max_retries=0,
    backoff=ev.Backoff(initial_ms=0, factor=1, max_ms=0),
)
DONE = ev.StepCompleted(attempt=1, result=NOTHING)
END = ev.RunCompleted(result=NOTHING)
HOOK = ev.HookCreated(token="t")
GRANTED = ev.HookGranted()
DATA = ev.HookReceived(resume_id="x", payload=NOTHING)
CHILD = ev.ChildCreated(child_run_id="child", workflow="w", input=NOTHING)
TOLD = ev.ChildCompleted(status="completed", result=NOTHING)
WAIT = ev.WaitCreated(due_at=5)


def log(*entries):
    """A run's log of (data, correlation id), or of data alone."""
    pairs = [entry if isinstance(entry, tuple) else (entry, None) for entry in entries]
    return [(seq, data, about) for seq, (data, about) in enumerate(pairs, 1)]


GOOD = log(CREATED, (STEP, "a"), (DONE, "a"), END)
FAMILY = {"r": log(CREATED, (CHILD, "c"), (TOLD, "c"), END), "child": log(BORN, END)}


def claim(run_id="r", hook_id="h"):
    return f"token|t|{run_id}|{hook_id}", 1, ev.TokenClaimed(token="t", run_id=run_id, hook_id=hook_id)


def release(run_id="r", hook_id="h", seq=2):
    return f"token|t|{run_id}|{hook_id}", seq, ev.TokenReleased(token="t", run_id=run_id, hook_id=hook_id)


@pytest.fixture
def topics(tmp_path):
    catalogue, broker = Catalogue("c", 1), connect(f"embedded:{tmp_path}/b")
    broker.create(catalogue.topics())
    yield _Topics(broker, catalogue)
    broker.close()


class _Topics:
    def __init__(self, broker, catalogue):
        self.broker, self.catalogue = broker, catalogue
        self._codec = Codec()

    def write(self, topic, *records):
        producer = self.broker.producer()
        for record in records:
            producer.send(topic, self._codec.encode(record), key=b"k", partition=0)
        assert producer.flush(5) == 0
        producer.close()

    def logs(self, logs, *, at=lambda _: 1, summarised=True):
        for run_id, entries in logs.items():
            self.write(
                self.catalogue.events, *(ev.event(run_id, seq, at(seq), data, about) for seq, data, about in entries)
            )
            end = checker.TERMINAL.get(type(entries[-1][1])) if entries else None
            if end and summarised:
                self.write(self.catalogue.runs, self.summary(run_id, end, len(entries)))

    def summary(self, run_id, status, events):
        return RunSummary(run_id=run_id, workflow="w", status=status, created_at=0, events=events)

    def tokens(self, *entries):
        self.write(self.catalogue.events, *(ev.event(log_id, seq, 1, data) for log_id, seq, data in entries))

    def violations(self, *started, unfinished=()):
        return checker.violations(self.broker, self.catalogue, started, unfinished)


@pytest.mark.parametrize(
    ("entries", "finding"),
    [
        (GOOD, None),
        (GOOD[:3], "ends []"),
        ([], "ends []"),
        ([GOOD[0], GOOD[2], GOOD[3]], "seq"),
        ([GOOD[0], *GOOD], "seq"),
        (log(CREATED, END, END), "ends ['run_completed', 'run_completed']"),
        (log(CREATED, END, (DONE, "a")), "last step_completed"),
        (log(CREATED, (STEP, "a"), (DONE, "a"), (DONE, "a"), END), "a has 2 results"),
        (log(CREATED, (STEP, "a"), (ev.StepCancelled(), "a"), (DONE, "a"), END), "a has 2 results"),
        (log(CREATED, (STEP, "a"), (STEP, "a"), (DONE, "a"), END), "a was created 2 times"),
        (log(CREATED, (DONE, "a"), END), "never created"),
        (
            log(CREATED, (STEP, "a"), (ev.StepStarted(attempt=2, worker="w", started_at=1), "a"), (DONE, "a"), END),
            "one too many",
        ),
        (log(CREATED, (WAIT, "w"), (ev.WaitCompleted(), "w"), END), None),
        (log(CREATED, (WAIT, "w"), (ev.WaitCompleted(), "w"), (ev.WaitCompleted(), "w"), END), "w has 2 results"),
        (log(CREATED, (HOOK, "h"), (GRANTED, "h"), (DATA, "h"), END), None),
        (log(CREATED, (HOOK, "h"), (GRANTED, "h"), (GRANTED, "h"), END), "h has 2 results"),
        (log(CREATED, (HOOK, "h"), (DATA, "h"), (DATA, "h"), END), "x was received 2 times"),
        (log(CREATED, (DATA, "h"), END), "not open"),
        (log(CREATED, (HOOK, "h"), (ev.HookDisposed(), "h"), (DATA, "h"), END), "not open"),
        (
            log(CREATED, (HOOK, "h"), (ev.HookConflict(token="t", holder_run_id="o"), "h"), (DATA, "h"), END),
            "not open",
        ),
    ],
)
def test_each_violation_of_one_log_is_found(topics, entries, finding):
    topics.logs({"r": entries})
    found = topics.violations("r")
    assert (finding is None and not found) or any(finding in each for each in found), found


def test_time_that_goes_back_is_found(topics):
    topics.logs({"r": GOOD}, at=lambda seq: 10 - seq)
    assert ["time goes back" in each for each in topics.violations("r")] == [True]


def test_a_log_that_nobody_started_is_found(topics):
    topics.logs({"r": GOOD})
    assert topics.violations() == ["r: a log that nobody started"]


def test_a_run_that_is_declared_need_not_have_ended(topics):
    topics.logs({"r": GOOD[:3]})
    assert topics.violations("r", unfinished=["r"]) == []


@pytest.mark.parametrize(
    ("logs", "finding"),
    [
        (FAMILY, None),
        ({"r": FAMILY["r"]}, "never started"),
        ({**FAMILY, "r": log(CREATED, (CHILD, "c"))}, "does not know that its child child has ended"),
        ({**FAMILY, "r": log(CREATED, (CHILD, "c"), END)}, None),
        ({**FAMILY, "child": log(BORN, ev.RunCancelled())}, "child is cancelled, and it was told completed"),
        ({**FAMILY, "r": log(CREATED, (CHILD, "c"), (TOLD, "c"), (TOLD, "c"), END)}, "c has 2 results"),
        ({**FAMILY, "r": log(CREATED, END)}, "its parent r knows nothing of it"),
    ],
)
def test_each_violation_between_parent_and_child_is_found(topics, logs, finding):
    topics.logs(logs)
    unfinished = [run_id for run_id, entries in logs.items() if type(entries[-1][1]) not in checker.TERMINAL]
    found = topics.violations(*logs, unfinished=unfinished)
    assert (finding is None and not found) or any(finding in each for each in found), found


@pytest.mark.parametrize(
    ("entries", "finding"),
    [
        ([claim(), release()], None),
        ([claim(), release(), claim("o"), release("o")], None),
        ([claim(), claim("o"), release("o")], "claimed by ('o', 'h') while ('r', 'h') holds it"),
        ([claim(), claim("r", "h2")], "claimed by ('r', 'h2')"),
        ([claim(), release("r", "h2"), release()], "released by ('r', 'h2'), and ('r', 'h') holds it"),
        ([release()], "released by"),
        ([claim()], "held by r, which has ended"),
        ([claim(), release(seq=3)], "is #3 of log"),
    ],
)
def test_each_violation_about_a_token_is_found(topics, entries, finding):
    topics.logs({"r": GOOD})
    topics.tokens(*entries)
    found = topics.violations("r")
    assert (finding is None and not found) or any(finding in each for each in found), found


def test_a_token_may_be_held_by_a_run_that_has_not_ended(topics):
    topics.logs({"r": GOOD[:3]})
    topics.tokens(claim())
    assert topics.violations("r", unfinished=["r"]) == []


@pytest.mark.parametrize("said", [None, ("running", 4), ("completed", 3)])
def test_a_summary_that_differs_from_its_log_is_found(topics, said):
    topics.logs({"r": GOOD}, summarised=False)
    if said:
        topics.write(topics.catalogue.runs, topics.summary("r", *said))
    (found,) = topics.violations("r")
    assert "its log says completed with 4 events" in found


def test_what_was_started_is_what_was_asked_for_and_not_refused(topics):
    start = StartRun(run_id="a", workflow="w", input=NOTHING, requested_at=0)
    refused = StartRun(run_id="b", workflow="w", input=NOTHING, requested_at=0)
    asked = StartRun(run_id="c", workflow=health.WORKFLOW, input=NOTHING, requested_at=0)  # no run is made of it
    topics.write(topics.catalogue.commands, start, start, refused, asked)
    letter = DeadLetter(
        topic=topics.catalogue.commands, partition=0, offset=2, key=None, value=None, reason="", component="", at=0
    )
    topics.write(topics.catalogue.dead_letters, letter)
    assert checker.started(topics.broker, topics.catalogue) == {"a"}


def test_what_follows_the_end_of_a_run_is_waited_for(topics):
    topics.logs({"r": GOOD})
    topics.tokens(claim())
    wrong = checker.settled(topics.broker, topics.catalogue, ["r"], timeout=0)
    assert wrong == ["token t: held by r, which has ended"]
    topics.tokens(release())
    assert checker.settled(topics.broker, topics.catalogue, ["r"], timeout=5) == []
