"""One run driven by hand: the engine's tests are Kafka, the workers and the clock."""

from __future__ import annotations

from contextlib import nullcontext

from durably import step
from durably.authoring import Registry, WorkflowDefinition
from durably.failures import to_error
from durably.payloads import dump, dump_arguments, load
from durably.tokens import hook_of
from durably_processor.engine.execution import Environment
from durably_processor.engine.run import Run
from durably_schemas import events as ev
from durably_schemas import records as rec

T0 = 1_700_000_000_000


@step(max_retries=2, backoff="1s")
async def work(x: object) -> object:
    return x


@step(max_retries=0)
async def once(x: object) -> object:
    return x


def step_result(request: rec.StepRequest, outcome: rec.StepSucceeded | rec.StepFailed, at: int) -> rec.StepResult:
    """A worker's answer to a request."""
    return rec.StepResult(
        run_id=request.run_id,
        step_id=request.step_id,
        attempt=request.attempt,
        fingerprint=request.fingerprint,
        outcome=outcome,
        started_at=at,
        finished_at=at,
        worker="w",
    )


class Bench:
    """One run, driven by hand; every step returns its argument unless told otherwise."""

    def __init__(
        self,
        fn,
        *args,
        run_id: str = "wrun_1",
        registry: Registry | None = None,
        parent=None,
        build: str | None = None,
        **how,
    ) -> None:
        self.registry = registry or Registry()
        self.registry.workflows["wf"] = WorkflowDefinition("wf", fn, **how)
        queues = {"default", "other", "default.v1"}
        self.environment = Environment(self.registry, 1_000_000, queues, lambda _: nullcontext(), build=build)
        self.log: list[rec.Event] = []
        self.queues: list[str] = []
        self.open: list[rec.StepRequest] = []
        self.signals: list[rec.Record] = []
        self.commands: list[rec.Record] = []
        self.now = T0
        start = rec.StartRun(
            run_id=run_id,
            workflow="wf",
            input=dump_arguments(fn, args, {}, "wf"),
            requested_at=T0,
            nonce="n",
            parent=parent,
        )
        self.run, outcome = Run.start(start, T0, self.environment, lambda seq: iter(self.log[seq - 1 :]))
        self.take(outcome)

    def take(self, outcome) -> None:
        self.log += outcome.events
        self.open += [request for _, request in outcome.requests]
        self.queues += [queue for queue, _ in outcome.requests]
        self.signals += outcome.signals
        self.commands += outcome.commands

    def resume(self, token: str, value: object, resume_id: str = "r", hook_id: str | None = None) -> str:
        outcome, answer = self.run.resume(token, hook_id or hook_of(token), resume_id, dump(value, "payload"), self.now)
        self.take(outcome)
        return answer

    def grant(self, token: str, hook_id: str = "hook_1") -> None:
        record = rec.TokenGranted(token=token, run_id="wrun_1", hook_id=hook_id)
        self.take(self.run.granted(record, self.now))

    def refuse(self, token: str, hook_id: str = "hook_1", holder: str = "wrun_other") -> None:
        record = rec.TokenRefused(token=token, run_id="wrun_1", hook_id=hook_id, holder_run_id=holder)
        self.take(self.run.refused(record, self.now))

    def child_ends(self, child_id: str = "child_1", error: BaseException | None = None, value: object = None) -> None:
        child = self.run.state.items[child_id]
        record = rec.ChildFinished(
            run_id="wrun_1",
            correlation_id=child_id,
            child_run_id=child.run_id,
            status="completed" if error is None else "failed",
            result=dump(value, "result") if error is None else None,
            error=None if error is None else to_error(error),
        )
        self.take(self.run.child_finished(record, self.now))

    def result(
        self, request: rec.StepRequest, value: object = None, error: BaseException | None = None, **more
    ) -> None:
        if request in self.open:
            self.open.remove(request)
        self.now += 10
        args, _ = load(request.input)
        result = dump(args[0] if value is None else value, "result")
        outcome = (
            rec.StepFailed(error=to_error(error), **more) if error is not None else rec.StepSucceeded(result=result)
        )
        self.take(
            self.run.result(
                step_result(request, outcome, self.now),
                self.now,
            )
        )

    def next_timer(self) -> None:
        correlation_id, item = min(
            ((i, item) for i, item in self.run.state.items.items() if item.due is not None),
            key=lambda pair: (pair[1].due, pair[0]),
        )
        self.now = max(self.now, item.due)
        self.take(self.run.timer(correlation_id, item.due))

    def types(self) -> list[str]:
        return [event.type for event in self.log]

    @property
    def status(self) -> str:
        return self.run.state.header.status

    @property
    def value(self) -> object:
        last = self.log[-1].data
        assert isinstance(last, ev.RunCompleted), last
        return load(last.result)
