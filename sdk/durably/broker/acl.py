"""Who may do what: the ACLs of each role, and of those that an error says are missing.

The least that each role works with, found on a broker that grants nothing else. Nobody needs anything of the cluster:
an idempotent producer does with Write on its topics (KIP-679), and readers, which join no group, with Read on theirs.
Read and Write imply Describe.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Literal, get_args

import msgspec

from durably.errors import AccessDenied, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from durably_schemas import Catalogue

Operation = Literal["Alter", "Create", "Delete", "Describe", "DescribeConfigs", "Read", "Write"]
Resource = Literal["topic", "group", "transactional-id", "cluster"]
Role = Literal["admin", "processor", "worker", "client", "gateway", "reader", "producer"]
Option = Literal["starts-runs", "reads-streams", "feeds-streams", "answers-webhooks", "retention", "replays"]

ROLES: tuple[Role, ...] = get_args(Role)
OPTIONS: dict[Option, tuple[Role, ...]] = {
    "starts-runs": ("worker",),
    "reads-streams": ("worker",),
    "answers-webhooks": ("worker",),
    "feeds-streams": ("client",),
    "retention": ("processor",),
    "replays": ("gateway",),
}
"""What a role may do beyond what all of its kind do, and which role has the choice."""

OURSELVES = "User:NAME"
"""Where the brokers alone know who we are: they map certificates and tokens to users."""
_PRINCIPAL = re.compile(r"[A-Za-z]+:.+")


class Acl(msgspec.Struct, frozen=True, kw_only=True):
    """Permission for one operation on one resource, from every host.

    Attributes:
        principal: ``User:NAME``.
        operation: as Kafka calls it.
        resource: what it is done to.
        name: the resource's name, or with ``prefixed`` how it begins.
        prefixed: whether the name is a prefix.
        why: what would fail without.
    """

    principal: str
    operation: Operation
    resource: Resource
    name: str
    prefixed: bool = False
    why: str = ""

    def command(self, bootstrap: str) -> str:
        """The command of Kafka's own that adds it."""
        named = ["--cluster"] if self.resource == "cluster" else [f"--{self.resource}", self.name]
        pattern = ["--resource-pattern-type", "prefixed"] if self.prefixed else []
        return shlex.join([
            "kafka-acls.sh", "--bootstrap-server", bootstrap, "--add", "--allow-principal", self.principal,
            "--operation", self.operation, *named, *pattern,
        ])  # fmt: skip


def required_acls(
    role: Role,
    catalogue: Catalogue,
    principal: str = OURSELVES,
    *,
    queues: Iterable[str] = ("default",),
    options: Collection[Option] = (),
) -> tuple[Acl, ...]:
    """What a role needs, and nothing more.

    Args:
        role: ``admin`` creates and checks topics; ``processor``; ``worker``; ``client``, with all that its methods do;
            ``gateway``; ``reader``, a Kafka consumer of streams; ``producer``, which only starts runs, resumes hooks and
            cancels, and learns nothing.
        catalogue: whose topics.
        principal: ``User:NAME``.
        queues: which a worker serves.
        options: what it is to do beside.

    Raises:
        ConfigurationError: a principal of another form, or an option that is not this role's.
    """
    if not _PRINCIPAL.fullmatch(principal):
        raise ConfigurationError(f"the principal {principal!r} is none: use User:NAME, as the brokers know the user")
    for option in options:
        if role not in OPTIONS[option]:
            raise ConfigurationError(
                f"{option!r} is no choice of the role {role!r}, but of {', '.join(OPTIONS[option])}: leave it out"
            )
    granted: dict[tuple[Operation, Resource, str, bool], Acl] = {}
    for operation, resource, name, prefixed, why in _needs(role, catalogue, tuple(queues), options):
        # What is needed for several reasons is granted once.
        granted.setdefault(
            (operation, resource, name, prefixed),
            Acl(
                principal=principal, operation=operation, resource=resource, name=name, prefixed=prefixed, why=why
            ),
        )  # fmt: skip
    return tuple(granted.values())


def denied(acls: Collection[Acl], address: str) -> AccessDenied:
    """The error for permissions that are missing; names each, and the commands that add them."""
    what = ", ".join(f"{acl.operation} on {acl.resource} {acl.name}".rstrip() for acl in acls)
    (principal,) = {acl.principal for acl in acls}
    commands = "; ".join(acl.command(address) for acl in acls)
    return AccessDenied(
        f"Kafka at {address} does not grant {principal} {what}: add it with {commands}; or all that its role needs, "
        f"with `durably acls --role ROLE --principal {principal} --apply`"
    )


_Need = tuple[Operation, Resource, str, bool, str]


def _read(topic: str, why: str) -> _Need:
    return ("Read", "topic", topic, False, why)


def _write(topic: str, why: str) -> _Need:
    return ("Write", "topic", topic, False, why)


def _needs(role: Role, c: Catalogue, queues: tuple[str, ...], options: Collection[Option]) -> Iterator[_Need]:
    match role:
        case "admin":
            yield from _admin(c)
        case "processor":
            yield from _processor(c)
            if "retention" in options:
                yield ("Delete", "topic", c.events, False, "dropping the beginning of the logs")
        case "worker":
            yield from _worker(c, queues, options)
        case "client":
            yield from _client(c)
            if "feeds-streams" in options:
                yield _write(c.streams, "the chunks of iterators among a start's arguments")
        case "gateway":
            yield from _client(c)
            yield _write(c.streams, "the bodies of webhooks that are too large for a record")
            yield from _dashboard(c)
            if "replays" in options:
                yield _write(c.results, "dead letters that are sent again")
                yield ("Write", "topic", _requests(c), True, "the same")
        case "reader":
            yield _read(c.streams, "the chunks")
            yield ("Read", "group", f"{c.namespace}.reader.", True, "consumer groups of its own")
        case "producer":
            yield _write(c.commands, "starts, resumes and cancellations")


def _admin(c: Catalogue) -> Iterator[_Need]:
    fixed = [(topic.name, False) for topic in c.topics(())]
    operations: tuple[Operation, ...] = ("Create", "Describe", "DescribeConfigs")
    for name, prefixed in [*fixed, (_requests(c), True)]:
        for operation in operations:
            yield (operation, "topic", name, prefixed, "`durably topics create` and `check`")


def _processor(c: Catalogue) -> Iterator[_Need]:
    yield _read(c.commands, "its input")
    yield _read(c.results, "its input")
    yield _read(c.signals, "its input")
    yield ("Read", "group", f"{c.namespace}.processor", False, "membership, and the offsets of its inputs")
    yield (
        "Write", "transactional-id", f"{c.namespace}.processor.", True,
        "its transactions, and ending what a predecessor left open",
    )  # fmt: skip
    yield _read(c.events, "the logs, to take over")
    yield _write(c.events, "the logs")
    yield _read(c.snapshots, "what is kept of logs that outlast a retention, to take over")
    yield _write(c.snapshots, "the same")
    yield _write(c.signals, "what processors tell each other")
    yield _write(c.commands, "starts and cancellations of children")
    yield _write(c.runs, "summaries")
    yield ("Write", "topic", _requests(c), True, "step-requests, on every queue")
    yield _write(c.replies, "answers")
    yield _write(c.streams, "the end of a run's streams")
    yield _write(c.dead_letters, "what cannot be handled")


def _worker(c: Catalogue, queues: tuple[str, ...], options: Collection[Option]) -> Iterator[_Need]:
    for queue in queues:
        yield _read(c.requests(queue), "its input")
        yield ("Read", "group", f"{c.namespace}.worker.{queue}", False, "membership, and the offsets of the queue")
    yield _write(c.results, "results, heartbeats and claims")
    yield _write(c.streams, "what steps write to streams")
    yield _write(c.dead_letters, "requests that cannot be run")
    yield _read(c.replies, "answers to claims and heartbeats")
    if "answers-webhooks" in options:
        yield _write(c.replies, "responses of steps to the callers of webhooks")
    if "starts-runs" in options or "reads-streams" in options:
        yield _write(c.commands, "starts, resumes, cancellations and questions of steps")
    if "reads-streams" in options:
        yield _read(c.streams, "the streams that steps read")
        yield _read(c.runs, "the end of the runs whose streams they are")


def _client(c: Catalogue) -> Iterator[_Need]:
    yield _write(c.commands, "starts, resumes, cancellations and questions")
    yield _read(c.replies, "answers")
    yield _read(c.streams, "reading streams")
    yield _read(c.runs, "listing runs, and the end of those whose streams are read")
    yield _read(c.events, "following a log as it grows")


def _dashboard(c: Catalogue) -> Iterator[_Need]:
    yield _read(c.dead_letters, "showing them")
    for topic, prefixed in ((c.results, False), (c.signals, False), (_requests(c), True)):
        yield ("Describe", "topic", topic, prefixed, "showing how far behind its readers are")
    for group, prefixed in ((f"{c.namespace}.processor", False), (f"{c.namespace}.worker.", True)):
        yield ("Describe", "group", group, prefixed, "the same, and who they are")


def _requests(c: Catalogue) -> str:
    return c.requests("x")[:-1]
