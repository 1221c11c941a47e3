"""Consumer groups within one process: who owns which partition numbers."""

from __future__ import annotations

import os
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from durably.broker.port import TP, GroupMember
from durably.errors import Fenced

if TYPE_CHECKING:
    from collections.abc import Sequence

    from durably.broker.embedded_cursor import Reading

SESSION_SECONDS = 10.0
_ids = count(1)


class Membership(NamedTuple):
    """What fences a member's commits: valid while the member is in the group and has not polled past a rebalance."""

    group: Group
    member: Member
    generation: int

    def check(self) -> None:
        """Raises `Fenced` when commits with this membership may no longer be made."""
        member = self.member
        if self.group.members.get(member.id) is not member or self.generation != member.generation:
            raise Fenced(f"group {self.group.name!r} has moved on: generation {self.generation} of member {member.id}")


class Member:
    """One consumer.

    Attributes:
        generation: the last one that it has taken up in its own poll.
        owned: the partition numbers that nobody else may have until it gives them up.
        polled: when it last polled, monotonic.
        fenced: another one has joined with its ``instance_id``.
    """

    def __init__(self, reading: Reading, instance_id: str | None) -> None:
        self.id = next(_ids)
        self.instance_id = instance_id
        self.reading = reading
        self.generation = 0
        self.owned: set[int] = set()
        self.polled = monotonic()
        self.fenced = False


class Coordinator:
    """The groups of a log, and who has which transactional id. Guarded by the log's lock."""

    def __init__(self) -> None:
        self.transactional: dict[str, object] = {}
        self._groups: dict[tuple[str, str], Group] = {}

    def group(self, name: str, topic: str, numbers: int) -> Group:
        """The members of group ``name`` that consume ``topic``, which has ``numbers`` partitions."""
        return self._groups.setdefault((name, topic), Group(name, numbers))

    def members(self, name: str) -> list[GroupMember]:
        """Who is in group ``name``, as others see it. All of them live in this process."""
        host = f"process {os.getpid()}"
        return [
            GroupMember(f"member {member.id}", host, [TP(topic, number) for number in sorted(member.owned)])
            for (group, topic), found in self._groups.items()
            if group == name
            for member in found.members.values()
        ]


class Group:
    """The members that consume one topic together. Guarded by the log's lock.

    Hand-over is cooperative, as in KIP-429: ``target`` says what each is to have; a member gives up what it has too
    much in its own poll, and takes what it lacks as soon as no other member owns it. So a number never has two owners.
    """

    def __init__(self, name: str, numbers: int) -> None:
        self.name = name
        self.numbers = numbers
        self.generation = 0
        self.members: dict[int, Member] = {}
        self.target: dict[int, set[int]] = {}

    def join(self, member: Member) -> None:
        """Adds a member; one with the same ``instance_id`` is put out."""
        if member.instance_id is not None:
            for other in list(self.members.values()):
                if other.instance_id == member.instance_id:
                    other.fenced = True
                    self.leave(other)
        self.members[member.id] = member
        member.polled = monotonic()
        self._rebalance()

    def leave(self, member: Member) -> None:
        """Takes a member out, with all that it owns."""
        if self.members.pop(member.id, None):
            self._rebalance()

    def _rebalance(self) -> None:
        self.generation += 1
        members = list(self.members.values())
        shares = spread(self.numbers, [member.owned for member in members])
        self.target = {member.id: share for member, share in zip(members, shares, strict=True)}
        self.wake()

    def wake(self) -> None:
        """Lets every member see at once that something has changed."""
        for member in self.members.values():
            member.reading.poke()

    def lacking(self, member: Member) -> set[int]:
        """What the member is to have and nobody owns.

        A member that has not polled for `SESSION_SECONDS` and keeps others waiting is put out of the group.
        """
        wanted = self.target[member.id] - member.owned
        if not wanted:
            return wanted
        late = monotonic() - SESSION_SECONDS
        for other in list(self.members.values()):
            asleep = other.polled < late and not other.reading.waiting
            if asleep and other is not member and other.owned & wanted:
                self.leave(other)
        taken = {number for other in self.members.values() for number in other.owned}
        return self.target[member.id] - taken

    def settled(self, member: Member) -> bool:
        """The member has taken up the current generation and has what it is to have."""
        return member.generation == self.generation and member.owned == self.target.get(member.id)


def spread(numbers: int, owned: Sequence[set[int]]) -> list[set[int]]:
    """Shares ``range(numbers)`` out evenly, moving as few as possible.

    >>> spread(4, [{0, 1, 2, 3}, set()])
    [{0, 1}, {2, 3}]
    """
    if not owned:
        return []
    base, extra = divmod(numbers, len(owned))
    shares: list[set[int]] = [set() for _ in owned]
    quotas = [base] * len(owned)
    # The members that own most keep the odd ones, so that an even group stays as it is.
    for index in sorted(range(len(owned)), key=lambda i: -len(owned[i]))[:extra]:
        quotas[index] += 1
    for share, have, quota in zip(shares, owned, quotas, strict=True):
        share.update(sorted(have)[:quota])
    free = sorted(set(range(numbers)).difference(*shares))
    for share, quota in zip(shares, quotas, strict=True):
        while len(share) < quota:
            share.add(free.pop(0))
    return shares
