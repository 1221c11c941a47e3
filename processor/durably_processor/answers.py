"""Replies about runs, made of what is committed. On the commit thread, when all that they speak of is in the store."""

from __future__ import annotations

from durably_schemas import Codec
from durably_schemas import events as ev
from durably_schemas import records as rec
from durably_schemas.records import Event, Reply

from durably_processor.engine.state import OpenHook
from durably_processor.state.store import Store

PAGE_EVENTS, PAGE_BYTES = 500, 500_000


class Answers:
    """What one partition's store has to tell."""

    def __init__(self, store: Store, codec: Codec) -> None:
        self._store = store
        self._codec = codec

    def summary(self, request_id: str, run_id: str, *, message: str | None = None, existing: bool = False) -> Reply:
        """Of a run, or that there is none."""
        state = self._store.state(run_id)
        if state is None:
            return Reply(request_id=request_id, run_id=run_id, status="NOT_FOUND", message=f"no run {run_id!r}")
        return Reply(request_id=request_id, run_id=run_id, summary=state.summary(), message=message, existing=existing)

    def result(self, request_id: str, run_id: str) -> Reply | None:
        """How a run ended, or why it is blocked; None: it was blocked when it was asked about, and has gone on."""
        state = self._store.state(run_id)
        assert state is not None, run_id
        if not state.terminal and not state.header.blocked:
            return None  # the asker asks again
        last = self._event(run_id, state.header.seq).data if state.terminal else None
        result = last.result if isinstance(last, ev.RunCompleted) else None
        message = state.header.cancel_reason if state.header.status == "cancelled" else None
        return Reply(request_id=request_id, run_id=run_id, summary=state.summary(), result=result, message=message)

    def page(self, request_id: str, run_id: str, from_seq: int) -> Reply:
        """A run's events from a seq on, as many as a record holds."""
        page: list[bytes] = []
        size = 0
        next_seq: int | None = None
        for value in self._store.events(run_id, from_seq):
            if page and (len(page) >= PAGE_EVENTS or size + len(value) > PAGE_BYTES):
                next_seq = from_seq + len(page)
                break
            page.append(value)
            size += len(value)
        state = self._store.state(run_id)
        return Reply(
            request_id=request_id,
            run_id=run_id,
            summary=state.summary() if state else None,
            events=tuple(page),
            next_seq=next_seq,
        )

    def hooks(self, request_id: str, run_id: str, token: str | None) -> Reply:
        """One open hook of a run, or all of them."""
        state = self._store.state(run_id)
        assert state is not None, run_id
        hooks: list[rec.Hook] = []
        size = 0
        for hook_id, item in state.items.items():
            if isinstance(item, OpenHook) and not item.claiming and token in (None, item.token):
                hook = self._hook(run_id, hook_id, item)
                size += (
                    sum(len(p.data) for p in (hook.metadata, hook.response) if p is not None) + len(hook.token) + 200
                )
                if size > PAGE_BYTES and hooks:
                    break  # those that are not told can be asked about by their tokens
                hooks.append(hook)
        if token is not None and not hooks:
            why = f"run {run_id} has no open hook with the token {token!r}"
            return Reply(request_id=request_id, run_id=run_id, status="NOT_FOUND", message=why)
        return Reply(request_id=request_id, run_id=run_id, summary=state.summary(), hooks=tuple(hooks))

    def _hook(self, run_id: str, hook_id: str, item: OpenHook) -> rec.Hook:
        created = self._event(run_id, item.seq).data
        assert isinstance(created, ev.HookCreated), created
        return rec.Hook(
            token=item.token,
            hook_id=hook_id,
            run_id=run_id,
            created_at=item.created_at,
            webhook=created.webhook,
            received=item.received,
            metadata=created.metadata,
            response=created.response,
        )

    def _event(self, run_id: str, seq: int) -> Event:
        return self._codec.decode_as(Event, self._store.event(run_id, seq))
