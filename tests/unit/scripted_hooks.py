"""The scripted processor, with hooks: it answers ResumeHook and QueryRun for HOOK as a processor does."""

from __future__ import annotations

from typing import Any

from durably import payloads
from durably.tokens import run_of
from durably_schemas.records import Hook, Payload, QueryRun, Record, Reply, ResumeHook, StartRun
from unit.scripted_broker import ScriptedBroker, ScriptedProcessor


class ScriptedHooks(ScriptedProcessor):
    """``received`` holds what hooks were given; ``on_resume`` is called with each of it."""

    def __init__(self, broker: ScriptedBroker) -> None:
        super().__init__(broker)
        self.hooks: dict[str, Hook] = {}
        self.received: list[ResumeHook] = []
        self.on_resume = lambda command: None

    def open(
        self, token: str, run_id: str = "r1", *, webhook: bool = False, response: Any = None, metadata: Any = None
    ) -> Hook:
        self.start(run_id)
        hook = Hook(
            token=token,
            hook_id=f"hook_{len(self.hooks)}",
            run_id=run_id,
            created_at=1_700_000_000_000,
            webhook=webhook,
            metadata=_payload(metadata),
            response=_payload(response),
        )
        self.hooks[token] = hook
        self.change(run_id, hooks=tuple(h.token for h in self.hooks.values() if h.run_id == run_id))
        return hook

    def take(self, command: Record) -> None:
        match command:
            case _ if self.deaf:
                super().take(command)
            case StartRun(reply_to=reply_to) if reply_to is not None:
                existing = command.run_id in self.runs
                run = self.start(command.run_id, command.workflow, command)
                self.reply(
                    reply_to, Reply(request_id="", run_id=command.run_id, existing=existing, summary=run.summary)
                )
            case ResumeHook():
                self.resume(command)
            case QueryRun(what="HOOK"):
                self.ask(command)
            case _:
                super().take(command)

    def resume(self, command: ResumeHook) -> None:
        hook = self.hooks.get(command.token)
        if hook is None:
            told = f"hook token {command.token!r}: no run has a hook with this token"
            self.reply(command.reply_to, Reply(request_id="", status="NOT_FOUND", message=told))
            return
        if (command.token, command.resume_id) not in {(r.token, r.resume_id) for r in self.received}:
            self.received.append(command)
            self.on_resume(command)
        self.reply(command.reply_to, Reply(request_id="", run_id=hook.run_id, summary=self.runs[hook.run_id].summary))

    def ask(self, command: QueryRun) -> None:
        if command.token is None:
            known = command.run_id in self.runs
            found = tuple(h for h in self.hooks.values() if h.run_id == command.run_id)
            answer = Reply(request_id="", run_id=command.run_id, hooks=found) if known else None
        else:
            hook = self.hooks.get(command.token)
            if hook is None:
                answer = None
            elif command.run_id:
                answer = Reply(request_id="", run_id=hook.run_id, hooks=(hook,))
            else:
                assert run_of(command.token) is None  # the owner of a custom token knows the holder alone
                answer = Reply(request_id="", run_id=hook.run_id)
        missing = Reply(request_id="", run_id=command.run_id or None, status="NOT_FOUND")
        self.reply(command.reply_to, answer or missing)


def _payload(value: Any) -> Payload | None:
    return None if value is None else payloads.dump(value, "value")
