"""On a broker that demands to know who asks: what lets one in, what each role may do, and what a refusal says."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import checker
import durably
import httpx
import pytest
from durably import create_hook, create_webhook, get_writable, step, workflow
from durably.authoring import registry
from durably.broker import connect
from durably.broker.acl import ROLES, Acl, required_acls
from durably.broker.port import TP, Message
from durably.client import AsyncClient, Client
from durably.client.tail import follow_events
from durably.errors import (
    AccessDenied,
    BrokerError,
    BrokerUnreachable,
    ConfigurationError,
    RunCancelledError,
    RunFailedError,
)
from durably.streams import Readable
from durably.web import Request, Response
from durably.worker import Worker
from durably_connectors.http import GatewayThread, create_gateway
from durably_processor.engine import guards
from durably_processor.processor import Processor
from durably_schemas import Catalogue, Codec
from durably_schemas.records import Payload, StartRun
from harness import RunningProcessor, until
from mortal import MortalBroker
from secured_kafka import ADMIN, Authority, SecuredKafka

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from durably.broker.acl import Option, Resource, Role
    from durably.broker.kafka import KafkaBroker
    from durably.broker.port import Broker

pytestmark = pytest.mark.kafka

DURABLY = Path(sys.executable).with_name("durably")
FOR_EVER = 600.0
"""Seconds, more than a test may take: who waits for so long has not been told."""


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    kafka = SecuredKafka(tmp_path_factory.mktemp("secured"))
    yield kafka
    kafka.stop()


def greeted(url: str, properties: dict[str, str], timeout: float = 30) -> list[str]:
    """The names of the topics that one sees there."""
    with contextlib.closing(connect(url, properties)) as broker:
        return broker.topics(timeout)


# -- being let in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_scram_lets_in_with_and_without_tls(secured: SecuredKafka, mechanism: str) -> None:
    user = secured.user(f"in-{mechanism[-3:]}", mechanism)
    assert greeted(secured.url("CLEAR"), user) == []
    assert greeted(secured.url("TLS"), secured.over_tls(user)) == []


def test_plain_and_a_certificate_let_in(secured: SecuredKafka) -> None:
    plain = ADMIN | {"sasl.username": "plain", "sasl.password": "plain-secret"}
    assert greeted(secured.url("TLS"), secured.over_tls(plain)) == []
    assert greeted(secured.url("MUTUAL"), secured.with_certificate("carol")) == []


def token_of(name: str) -> str:
    """A token that nobody signed."""
    now = int(time.time())
    parts = ({"alg": "none"}, {"sub": name, "iat": now, "exp": now + 300})
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts) + "."


def fetched(config: str) -> tuple[str, float]:
    """Stands behind oauth_cb."""
    return token_of(config), time.time() + 300


def unfetched(config: str) -> tuple[str, float]:
    raise RuntimeError(f"nobody gives {config} a token")


@pytest.fixture
def oidc() -> Iterator[str]:
    """The URL of a token endpoint that knows the client ``olga`` and her secret."""

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said = base64.b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode()
            known = said == "olga:olga-secret"
            body = json.dumps({"access_token": token_of("olga")} if known else {"error": "invalid_client"}).encode()
            self.send_response(200 if known else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/token"
    server.shutdown()
    thread.join()
    server.server_close()


def granted_reader(secured: SecuredKafka, namespace: str, name: str) -> str:
    """A topic that this user alone may read."""
    topic = f"{namespace}.commands"
    secured.admin.create(Catalogue(namespace, 1).topics(())[:1])
    secured.grant([Acl(principal=f"User:{name}", operation="Read", resource="topic", name=topic)])
    return topic


def test_a_token_of_an_identity_provider_lets_in_as_its_subject(
    secured: SecuredKafka, oidc: str, namespace: str
) -> None:
    topic = granted_reader(secured, namespace, "olga")
    olga = secured.over_tls({
        "sasl.mechanism": "OAUTHBEARER",
        "sasl.oauthbearer.method": "oidc",
        "sasl.oauthbearer.client.id": "olga",
        "sasl.oauthbearer.client.secret": "olga-secret",
        "sasl.oauthbearer.token.endpoint.url": oidc,
    })  # fmt: skip
    until(lambda: topic in greeted(secured.url("TLS"), olga))


def test_a_token_of_a_function_of_ones_own_lets_in_as_its_subject(secured: SecuredKafka, namespace: str) -> None:
    topic = granted_reader(secured, namespace, "oscar")
    oscar = secured.over_tls({
        "sasl.mechanism": "OAUTHBEARER",
        "sasl.oauthbearer.config": "oscar",
        "oauth.cb": f"{__name__}:fetched",
    })  # fmt: skip
    until(lambda: topic in greeted(secured.url("TLS"), oscar))
    with contextlib.closing(connect(secured.url("TLS"), oscar)) as broker:
        reader = broker.reader({TP(topic, 0): 0})
        until(lambda: reader.poll(0.1))  # its end: each handle asks for a token of its own
        reader.close()


def test_a_function_that_gives_no_token_is_told(secured: SecuredKafka) -> None:
    oscar = secured.over_tls({"sasl.mechanism": "OAUTHBEARER", "oauth.cb": f"{__name__}:unfetched"})
    with pytest.raises(AccessDenied, match=r"OAUTHBEARER do not come together.*OAuth token not set"):
        greeted(secured.url("TLS"), oscar)
    with pytest.raises(ConfigurationError, match="cannot load nowhere"):
        connect(secured.url("TLS"), oscar | {"oauth.cb": "nowhere:fetch"})


# -- not being let in --------------------------------------------------------------------------------------------------


def wrong(secured: SecuredKafka, how: str) -> tuple[str, dict[str, str], str]:
    """URL, properties, and what the error is to say."""
    user = secured.user("eve")
    match how:
        case "password":
            return secured.url(), user | {"sasl.password": "guessed"}, "user 'eve' by SASL_PLAINTEXT with SCRAM-SHA-256"
        case "mechanism":
            return (
                secured.url(),
                user | {"sasl.mechanism": "OAUTHBEARER", "oauth.cb": f"{__name__}:fetched"},
                ("broker's supported mechanisms: PLAIN"),
            )
        case "authority":
            stranger = secured.file("stranger.pem", Authority("stranger").certificate)
            return secured.url("TLS"), secured.over_tls(user) | {"ssl.ca.location": stranger}, "certificate"
        case "certificate":
            return secured.url("MUTUAL"), secured.with_certificate("eve", Authority("stranger")), "its client by SSL"
        case _:
            properties = secured.with_certificate("eve")
            del properties["ssl.certificate.location"], properties["ssl.key.location"]
            return secured.url("MUTUAL"), properties, "alert"


@pytest.mark.parametrize("how", ["password", "mechanism", "authority", "certificate", "no certificate"])
def test_who_is_not_let_in_is_told_at_once(secured: SecuredKafka, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("durably.broker.kafka.UNREACHABLE_AFTER", FOR_EVER)
    url, properties, said = wrong(secured, how)
    with pytest.raises(AccessDenied) as told:
        greeted(url, properties, FOR_EVER)
    for part in (said, url.removeprefix("kafka://"), "check the Kafka properties", "DURABLY_KAFKA_SECURITY_PROTOCOL"):
        assert part in str(told.value)
    assert "guessed" not in str(told.value)


def test_a_client_of_the_wrong_protocol_is_pointed_to_its_security_settings(secured: SecuredKafka) -> None:
    with pytest.raises(BrokerUnreachable, match="security settings"):
        greeted(secured.url("TLS"), {})


def test_a_property_that_cannot_be_used_is_named(secured: SecuredKafka) -> None:
    with pytest.raises(ConfigurationError, match=r"ssl.ca.location.*DURABLY_KAFKA_\*"):
        connect(secured.url("TLS"), secured.over_tls(ADMIN) | {"ssl.ca.location": "/nowhere.pem"})


@pytest.mark.parametrize(
    "command", ["topics check", "processor MODULE", "worker MODULE", "start security_echo", "health", "runs list"]
)
def test_every_command_ends_promptly_where_the_password_is_wrong(
    secured: SecuredKafka, tmp_path: Path, command: str
) -> None:
    module = tmp_path / "security_module.py"
    module.write_text("from durably import workflow\n\n@workflow\nasync def security_echo(): ...\n")
    arguments = [str(module) if part == "MODULE" else part for part in command.split()]
    result = run_durably(secured, secured.user("mallory") | {"sasl.password": "guessed"}, *arguments, cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert "user 'mallory' by SASL_PLAINTEXT with SCRAM-SHA-256 do not come together" in result.stdout + result.stderr


def run_durably(
    secured: SecuredKafka, user: dict[str, str], *arguments: str, cwd: Path, namespace: str = "security"
) -> subprocess.CompletedProcess[str]:
    """A command as this user, set by the environment."""
    variables = {f"DURABLY_KAFKA_{name.upper().replace('.', '_')}": value for name, value in user.items()}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DURABLY_")}
    environ = clean | variables | {"DURABLY_URL": secured.url(), "DURABLY_NAMESPACE": namespace, "COLUMNS": "1000"}
    return subprocess.run(
        [DURABLY, *arguments], cwd=cwd, env=environ, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_gateway_says_why_it_is_not_ready(secured: SecuredKafka, tmp_path: Path) -> None:
    user = secured.user("gertrude") | {"sasl.password": "guessed"}
    client = AsyncClient(secured.url(), namespace="security", kafka=user)
    gateway = GatewayThread(lambda: create_gateway(client), 0)
    gateway.start()
    try:
        for answer in (
            httpx.get(f"{gateway.url}/ready", timeout=60),
            httpx.post(f"{gateway.url}/api/v1/runs", json={"workflow": "security_echo"}, timeout=60),
        ):
            assert answer.status_code == 503
            assert "user 'gertrude' by SASL_PLAINTEXT with SCRAM-SHA-256 do not come together" in answer.text
    finally:
        gateway.stop()
        asyncio.run(client.close())


@pytest.mark.parametrize("before", [True, False])
def test_a_worker_that_is_not_let_in_ends(secured: SecuredKafka, monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    monkeypatch.setattr("durably.broker.kafka.LASTING", 1.0 if before else FOR_EVER)
    with contextlib.closing(connect(secured.url(), secured.user("walter"))) as broker:
        if before:
            broker.topics()
        # What connects from now on, the member of the group above all, has the wrong password.
        cast("KafkaBroker", broker).properties._user["sasl.password"] = "guessed"
        worker = Worker(broker, Catalogue("security"), registry)
        worker.start()
        worker.join()
        assert isinstance(worker.error, AccessDenied)


# -- what each role may do ---------------------------------------------------------------------------------------------


@step(name="security_add")
async def add(a: int, b: int) -> int:
    async with get_writable("sums") as sums:
        await sums.write(a + b)
    return a + b


@step(name="security_long")
async def long() -> str:
    await asyncio.sleep(1.0)  # becomes a lease
    return "long"


@step(name="security_total")
async def total(values: Readable) -> int:
    return sum([value async for value in values])


@step(name="security_respond")
async def respond(request: Request) -> None:
    await request.respond_with(Response.json({"length": len(await request.bytes())}, status=201))


@step(name="security_starter", max_retries=0)
async def starter() -> str:
    return (await durably.start(child)).id


@workflow(name="security_child")
async def child() -> int:
    return await add(20, 22)


@workflow(name="security_everything")
async def everything(fed: Readable) -> list[Any]:
    started = await durably.start(child)
    token = durably.get_workflow_metadata().run_id
    async with create_hook(token=token) as hook, create_webhook(respond_with="manual") as webhook:
        got = await hook
        await respond(await webhook)
        return [got, *await asyncio.gather(add(1, 2), long()), await started.result(), await total(fed)]


@workflow(name="security_waits")
async def waits() -> None:
    async with create_hook() as hook:
        await hook


@workflow(name="security_indirect")
async def indirect() -> str:
    return await starter()


class Roles:
    """Users of one namespace, each with the ACLs of its role and no other."""

    def __init__(self, secured: SecuredKafka, namespace: str, stack: contextlib.ExitStack) -> None:
        self.secured = secured
        self.catalogue = Catalogue(namespace, 2)
        self._stack = stack

    def user(self, role: Role, *options: Option) -> dict[str, str]:
        """A user."""
        name = f"{self.catalogue.namespace}-{role}-{len(options)}"
        user = self.secured.user(name)
        self.secured.grant(required_acls(role, self.catalogue, f"User:{name}", options=options))
        return user

    def broker(self, role: Role, *options: Option) -> KafkaBroker:
        """What one of them is connected to."""
        return self.connected(self.user(role, *options))

    def connected(self, user: dict[str, str]) -> KafkaBroker:
        broker = self._stack.enter_context(contextlib.closing(connect(self.secured.url(), user)))
        return cast("KafkaBroker", broker)


@pytest.fixture
def roles(secured: SecuredKafka, namespace: str) -> Iterator[Roles]:
    with contextlib.ExitStack() as stack:
        roles = Roles(secured, namespace, stack)
        secured.admin.create(roles.catalogue.topics())
        yield roles


@contextlib.contextmanager
def working(roles: Roles, folder: Path, *options: Option) -> Iterator[None]:
    """A processor is there, and a worker with these options."""
    ready = threading.Event()
    broker = MortalBroker(roles.broker("processor"))
    processor = Processor(broker, roles.catalogue, registry, folder, ready=ready.set)
    worker = Worker(
        roles.broker("worker", *options), roles.catalogue, registry, lease_after=0.3, heartbeat_every=0.2
    )  # fmt: skip
    running = RunningProcessor(processor, ready, broker)
    worker.start()
    try:
        yield
        assert (running.error, worker.error) == (None, None)
    finally:
        worker.stop()
        worker.join()
        running.stop()
        guards.uninstall()


@pytest.fixture
def at_work(roles: Roles, tmp_path: Path) -> Iterator[Roles]:
    """A processor is there, and a worker whose steps may do what those of `everything` do."""
    with working(roles, tmp_path, "reads-streams", "answers-webhooks"):
        yield roles


def test_all_of_a_run_works_with_each_role_as_a_user_of_its_own(at_work: Roles) -> None:
    catalogue = at_work.catalogue
    client = Client(at_work.broker("client", "feeds-streams"), namespace=catalogue.namespace)
    gateway_client = AsyncClient(at_work.broker("gateway"), namespace=catalogue.namespace)
    gateway = GatewayThread(lambda: create_gateway(gateway_client), 0)
    gateway.start()
    try:
        run = client.start(everything, iter([1, 2, 3]))
        until(lambda: len(run.describe().hooks) == 2)
        client.resume_hook(run.id, "resumed")
        (webhook,) = {*run.describe().hooks} - {run.id}
        body = b"x" * 400_000  # too large for a record: it becomes a stream
        url = f"{gateway.url}/.well-known/workflow/v1/webhook/{webhook}"
        answer = httpx.post(url, content=body, timeout=60)
        assert (answer.status_code, answer.json()) == (201, {"length": len(body)})
        assert run.result(60) == ["resumed", 3, "long", 42, 6]
        assert list(run.stream("sums")) == [3]
        followed = [event.type for events in follow_events(client._connection, run.id) for event in events]
        assert followed[-1] == "run_completed"
        assert run.id in {summary.run_id for summary in client.runs()}
        until(lambda: httpx.get(f"{gateway.url}/ready").status_code == 200)
        listed = httpx.get(f"{gateway.url}/api/v1/runs").json()["runs"]
        assert run.id in {summary["run_id"] for summary in listed}

        waiting = client.start(waits)
        until(lambda: waiting.describe().hooks)
        waiting.cancel()
        with pytest.raises(RunCancelledError):
            waiting.result(30)
        assert [letter for _, letter in dead_letters(at_work)] == []
    finally:
        gateway.stop()
        asyncio.run(gateway_client.close())
        client.close()


def dead_letters(roles: Roles) -> list[Any]:
    return checker.read(roles.secured.admin, roles.catalogue.dead_letters)


@pytest.mark.parametrize("granted", [False, True])
def test_a_step_that_starts_runs_needs_the_permission_and_the_error_says_which(
    roles: Roles, tmp_path: Path, granted: bool
) -> None:
    options: list[Option] = ["starts-runs"] if granted else []
    with working(roles, tmp_path, *options):
        client = Client(roles.broker("client"), namespace=roles.catalogue.namespace)
        try:
            run = client.start(indirect)
            if granted:
                assert client.get_run(run.result(60)).result(60) == 42
            else:
                with pytest.raises(RunFailedError, match=f"--topic {roles.catalogue.commands}") as failed:
                    run.result(60)
                assert isinstance(failed.value.cause, AccessDenied)
        finally:
            client.close()


def test_a_producer_starts_runs_and_learns_nothing(at_work: Roles) -> None:
    broker = at_work.broker("producer")
    run_id = f"produced-{at_work.catalogue.namespace}"
    payload = Payload(content_type="application/json", data=b"[]")
    start = StartRun(run_id=run_id, workflow="security_child", input=payload, requested_at=0)
    assert written(broker, at_work.catalogue.commands, Codec().encode(start), run_id.encode()) is None
    with pytest.raises(AccessDenied, match=f"Describe on topic {at_work.catalogue.replies}"):
        broker.end_offsets([TP(at_work.catalogue.replies, 0)])
    client = Client(at_work.broker("client"), namespace=at_work.catalogue.namespace)
    try:
        assert client.get_run(run_id).result(60) == 42
    finally:
        client.close()


def test_a_reader_follows_streams_in_a_group_of_its_own(at_work: Roles) -> None:
    client = Client(at_work.broker("client"), namespace=at_work.catalogue.namespace)
    try:
        assert client.start(child).result(60) == 42
    finally:
        client.close()

    class Told:
        def on_assigned(self, partitions: Sequence[int]) -> None: ...

        on_revoked = on_lost = on_assigned

    broker = at_work.broker("reader")
    consumer = broker.consumer(f"{at_work.catalogue.namespace}.reader.sums", at_work.catalogue.streams, Told())
    until(lambda: any(isinstance(record, Message) for record in consumer.poll(0.1)))
    consumer.close()


def written(broker: Broker, topic: str, value: bytes = b"forged", key: bytes = b"k") -> Exception | None:
    """How writing a record ended."""
    told: list[Exception | None] = []
    producer = broker.producer()
    try:
        producer.send(topic, value, key=key, on_ack=lambda error, _: told.append(error))
        until(lambda: producer.poll(0.1) or told)
    except BrokerError as error:
        return error
    finally:
        producer.close()
    return told[0]


MAY_WRITE: dict[tuple[Role, tuple[Option, ...]], set[str]] = {
    ("client", ()): {"commands"},
    ("client", ("feeds-streams",)): {"commands", "streams"},
    ("gateway", ()): {"commands", "streams"},
    ("gateway", ("replays",)): {"commands", "streams", "results", "requests.default"},
    ("producer", ()): {"commands"},
    ("reader", ()): set(),
    ("admin", ()): set(),
    ("worker", ()): {"results", "streams", "dead-letters"},
    ("worker", ("starts-runs",)): {"results", "streams", "dead-letters", "commands"},
    ("worker", ("answers-webhooks",)): {"results", "streams", "dead-letters", "replies"},
    ("processor", ()): {"commands", "signals", "events", "snapshots", "runs", "requests.default", "replies", "streams",
                        "dead-letters"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("role", "options"), MAY_WRITE, ids=lambda part: part if isinstance(part, str) else "+".join(part)
)
def test_nobody_can_forge_what_is_not_his(roles: Roles, role: Role, options: tuple[Option, ...]) -> None:
    broker = roles.broker(role, *options)
    for topic in roles.catalogue.topics():
        short = topic.name.removeprefix(f"{roles.catalogue.namespace}.")
        failure = written(broker, topic.name)
        if short in MAY_WRITE[role, options]:
            assert failure is None
        else:
            assert isinstance(failure, AccessDenied), (topic.name, failure)
            assert topic.name in str(failure)
            assert "--operation Write" in str(failure) or "--operation Describe" in str(failure)
            assert f"--topic {topic.name}" in str(failure)


def test_a_user_of_another_namespace_can_do_nothing(roles: Roles) -> None:
    other = roles.secured.user(f"{roles.catalogue.namespace}-other")
    elsewhere = Catalogue(f"{roles.catalogue.namespace}x", 2)
    for role in ROLES:
        roles.secured.grant(required_acls(role, elsewhere, f"User:{other['sasl.username']}"))
    broker = roles.connected(other)
    assert [name for name in broker.topics() if name.startswith(f"{roles.catalogue.namespace}.")] == []
    for topic in roles.catalogue.topics():
        assert isinstance(written(broker, topic.name), AccessDenied)


@pytest.mark.parametrize("role", ["processor", "worker"])
def test_each_topic_that_a_process_lacks_is_named_before_it_begins(roles: Roles, role: Role) -> None:
    broker = roles.broker(role)
    acls = required_acls(role, roles.catalogue, broker.properties.principal)
    until(lambda: permitted(broker, acls))
    for acl in acls:
        if acl.resource == "topic" and not acl.prefixed:
            roles.secured.revoke([acl])
            until(lambda acl=acl: not permitted(broker, [acl]))
            with pytest.raises(AccessDenied) as told:
                broker.require(required_acls(role, roles.catalogue))
            assert acl.command(broker.address) in str(told.value)
            assert str(told.value).count("--add") == 1
            roles.secured.grant([acl])


def test_a_retention_needs_delete_on_events_and_is_told_so_before_anything_is_dropped(roles: Roles) -> None:
    events = TP(roles.catalogue.events, 0)
    forbidden, allowed = roles.broker("processor"), roles.broker("processor", "retention")
    assert written(allowed, events.topic) is None
    needed = required_acls("processor", roles.catalogue, options=["retention"])
    until(lambda: permitted(allowed, needed))
    for refused in (lambda: forbidden.require(needed), lambda: forbidden.truncate({events: 0})):
        with pytest.raises(AccessDenied, match=f"--operation Delete --topic {events.topic}"):
            refused()
    (end,) = allowed.end_offsets([events]).values()
    allowed.truncate({events: end})
    assert allowed.start_offsets([events]) == {events: end}


def permitted(broker: KafkaBroker, acls: Iterable[Acl]) -> bool:
    try:
        broker.require(acls)
    except AccessDenied:
        return False
    return True


def processor_of(roles: Roles, folder: Path, without: Resource) -> Processor:
    user = roles.user("processor")
    acls = required_acls("processor", roles.catalogue, f"User:{user['sasl.username']}")
    roles.secured.revoke([acl for acl in acls if acl.resource == without])
    return Processor(roles.connected(user), roles.catalogue, registry, folder)


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("topic", "--operation Read --topic NAMESPACE.commands"),
        ("group", "--operation Read --group NAMESPACE.processor"),
        ("transactional-id", "--operation Write --transactional-id NAMESPACE.processor."),
    ],
)
def test_a_processor_that_lacks_permission_ends_and_says_what_to_add(
    roles: Roles, tmp_path: Path, without: Resource, said: str
) -> None:
    processor = processor_of(roles, tmp_path, without)
    try:
        with pytest.raises(AccessDenied) as told:
            processor.run()
    finally:
        guards.uninstall()
    assert said.replace("NAMESPACE", roles.catalogue.namespace) in str(told.value)


def test_a_worker_that_may_not_join_its_group_ends_and_says_what_to_add(roles: Roles) -> None:
    user = roles.user("worker")
    principal = f"User:{user['sasl.username']}"
    group = f"{roles.catalogue.namespace}.worker.default"
    roles.secured.revoke([Acl(principal=principal, operation="Read", resource="group", name=group)])
    worker = Worker(roles.connected(user), roles.catalogue, registry)
    worker.start()
    worker.join()
    assert isinstance(worker.error, AccessDenied)
    assert f"--allow-principal {principal} --operation Read --group {group}" in str(worker.error)


def test_a_client_that_may_not_start_is_told_which_acl_to_add(roles: Roles) -> None:
    broker = roles.broker("reader")
    client = Client(broker, namespace=roles.catalogue.namespace)
    try:
        with pytest.raises(AccessDenied, match=rf"Describe.*--topic {roles.catalogue.commands}"):
            client.start(child)
    finally:
        client.close()


# -- the commands ------------------------------------------------------------------------------------------------------


def test_acls_are_applied_by_the_command_and_an_admin_can_create_topics(
    secured: SecuredKafka, namespace: str, tmp_path: Path
) -> None:
    user = secured.user(f"{namespace}-chief")
    principal = f"User:{user['sasl.username']}"

    def as_user(who: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_durably(secured, who, *arguments, cwd=tmp_path, namespace=namespace)

    refused = as_user(user, "topics", "create")
    assert refused.returncode == 1
    assert f"--allow-principal {principal} --operation Describe --topic {namespace}." in refused.stderr
    denied = as_user(user, "acls", "--role", "admin", "--principal", principal, "--apply")
    assert (denied.returncode, "Alter on cluster" in denied.stderr) == (1, True), denied.stderr
    applied = as_user(ADMIN, "acls", "--role", "admin", "--principal", principal, "--apply")
    assert applied.returncode == 0, applied.stderr
    assert f"granted {principal} Create on topic {namespace}.requests.*" in applied.stdout
    created = as_user(user, "topics", "create", "--partitions", "2", "--queue", "default", "--queue", "gpu")
    assert created.returncode == 0, created.stderr
    checked = as_user(user, "topics", "check", "--queue", "gpu")
    assert checked.returncode == 0, checked.stdout + checked.stderr
