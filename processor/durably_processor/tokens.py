"""Who holds which custom token: decided by the owner of the token's partition, one claim after the other. No I/O.

    ClaimToken      free, or held by the same hook    token_claimed (once), TokenGranted
                    held by another hook              TokenRefused, naming the holder's run
    ReleaseToken    held by this hook                 token_released;  else nothing

A copy of a resume, which a client sends that got no answer, belongs to the run that has received it, and only that run
knows. So a free token remembers its last holder, who is asked; and a token that is held remembers which resumes earlier
holders have received.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from durably_schemas import events as ev
from durably_schemas import records as rec
from durably_schemas.records import Event

from durably_processor.state.store import Holder, Token

REMEMBERED = 100
"""Resumes of earlier holders that a token remembers."""


def applied(token: Token, data: ev.TokenClaimed | ev.TokenReleased, at: int) -> Token:
    """The token after an event of its log; live and in recovery alike."""
    holder = Holder(data.run_id, data.hook_id)
    if isinstance(data, ev.TokenClaimed):
        return Token(holder, None, token.resumes, at)
    resumes = {**token.resumes, **dict.fromkeys(data.resume_ids, holder)}
    return Token(None, holder, dict(list(resumes.items())[-REMEMBERED:]), at)


def holding(token: str, holder: Holder) -> str:
    """What stands for a run's id in the log of a token's holding."""
    return f"token|{token}|{holder.run_id}|{holder.hook_id}"


class Tokens:
    """The custom tokens of one partition.

    Args:
        stored: a token, as far as it is committed and applied.
    """

    def __init__(self, stored: Callable[[str], Token]) -> None:
        self._stored = stored
        # What was decided and may not be in the store yet, with the turn that did; oldest first.
        self._recent: OrderedDict[str, tuple[int, Token]] = OrderedDict()

    def get(self, token: str) -> Token:
        """The token as it is now."""
        recent = self._recent.get(token)
        return self._stored(token) if recent is None else recent[1]

    def is_settled(self, token: str) -> bool:
        """What is known of it is committed and applied."""
        return token not in self._recent

    def addressee(self, token: str, resume_id: str, *, caught_up: bool) -> Holder | None:
        """Whose a resume is: the hook's that has received it before, else the holder's, else perhaps the last one's.

        The latter only when all that came before the take-over has been ``caught_up`` with: a claim may be ahead.
        """
        known = self.get(token)
        return known.resumes.get(resume_id) or known.holder or (known.last if caught_up else None)

    def claim(
        self, record: rec.ClaimToken, at: int, turn: int
    ) -> tuple[Event | None, rec.TokenGranted | rec.TokenRefused]:
        """The event to record, if any, and the answer."""
        wanted = Holder(record.run_id, record.hook_id)
        holder = self.get(record.token).holder
        if holder is not None and holder != wanted:
            return None, rec.TokenRefused(
                token=record.token, run_id=record.run_id, hook_id=record.hook_id, holder_run_id=holder.run_id
            )
        granted = rec.TokenGranted(token=record.token, run_id=record.run_id, hook_id=record.hook_id)
        if holder is not None:
            return None, granted
        claimed = ev.TokenClaimed(token=record.token, run_id=record.run_id, hook_id=record.hook_id)
        return self._record(claimed, 1, at, turn), granted

    def release(self, record: rec.ReleaseToken, at: int, turn: int) -> Event | None:
        """The event to record; None where this hook does not hold the token."""
        if self.get(record.token).holder != Holder(record.run_id, record.hook_id):
            return None
        released = ev.TokenReleased(
            token=record.token, run_id=record.run_id, hook_id=record.hook_id, resume_ids=record.resume_ids
        )
        return self._record(released, 2, at, turn)

    def forget(self, acked: int) -> None:
        """Drops what the store knows: decisions of turns up to this one."""
        while self._recent and next(iter(self._recent.values()))[0] <= acked:
            self._recent.popitem(last=False)

    def _record(self, data: ev.TokenClaimed | ev.TokenReleased, seq: int, at: int, turn: int) -> Event:
        self._recent[data.token] = (turn, applied(self.get(data.token), data, at))
        self._recent.move_to_end(data.token)
        # A log for each holding: it begins with the claim and ends with the release, so seq is dense without being kept.
        return ev.event(holding(data.token, Holder(data.run_id, data.hook_id)), seq, at, data, data.hook_id)
