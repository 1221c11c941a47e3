"""A real Kafka broker for the tests: one that is named, else a container, else a child process.

    DURABLY_TEST_KAFKA=host:port       uses that broker (a test that kills its broker starts one of its own all the same)
    DURABLY_TEST_KAFKA_VIA=docker|java takes that way only
    KAFKA_IMAGE=apache/kafka:4.4.0     the container's image

Brokers listen on loopback only.
"""

from __future__ import annotations

import base64
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from testcontainers.core.container import DockerContainer

KAFKA_VERSION = "4.4.0"
IMAGE = os.environ.get("KAFKA_IMAGE", f"apache/kafka:{KAFKA_VERSION}")
JARS = Path(__file__).parents[1] / ".kafka"
ARTIFACTS = {
    "org.apache.kafka:kafka_2.13": KAFKA_VERSION,
    "org.apache.logging.log4j:log4j-slf4j-impl": "2.25.5",
}
REMEDY = (
    "These tests need a Kafka broker: start Docker, or install Java 17 or newer together with Maven, "
    "or name a running broker with DURABLY_TEST_KAFKA=host:port."
)

SETTINGS = {
    "node.id": "1",
    "process.roles": "broker,controller",
    # The broker speaks to itself over PLAINTEXT: a container's mapped port does not exist inside of it.
    "inter.broker.listener.name": "PLAINTEXT",
    "controller.listener.names": "CONTROLLER",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    "auto.create.topics.enable": "false",
    # However long a broker is paused, or its machine is busy, it must not be counted as dead: see `mourners`.
    "broker.session.timeout.ms": "60000",
    # Tests of abandoned transactions would wait for the coordinator's scan: 10 s by default.
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "500",
}


class Listeners(NamedTuple):
    """What clients connect to.

    Attributes:
        protocols: the security protocol of each, by name: capital letters. The first one's address is ``bootstrap``.
        settings: what the broker needs for them.
        client: librdkafka's properties for asking on the first one whether the broker is ready.
    """

    protocols: Mapping[str, str]
    settings: Mapping[str, str] = MappingProxyType({})
    client: Mapping[str, str] = MappingProxyType({})

    def configured(
        self, bound: Mapping[str, str], addresses: Mapping[str, str], inner: str, controller: str
    ) -> Settings:
        """The broker's settings.

        Args:
            bound: ``host:port`` that each listens on, as the broker sees it.
            addresses: as clients see it.
            inner: ``host:port`` on which the broker speaks to itself.
            controller: the same for its controller.
        """
        return {
            **SETTINGS,
            **self.settings,
            "listener.security.protocol.map": ",".join(
                f"{name}:{protocol}"
                for name, protocol in {**self.protocols, "PLAINTEXT": "PLAINTEXT", "CONTROLLER": "PLAINTEXT"}.items()
            ),
            "listeners": _joined({**bound, "PLAINTEXT": inner, "CONTROLLER": controller}),
            "advertised.listeners": _joined({**addresses, "PLAINTEXT": inner}),
            "controller.quorum.voters": f"1@{controller}",
        }


def _joined(addresses: Mapping[str, str]) -> str:
    return ",".join(f"{name}://{address}" for name, address in addresses.items())


Settings = dict[str, str]


def mourners(settings: Settings) -> Settings:
    """The settings of the same node as a mere controller, which counts its broker as dead at once.

    It runs between a kill and a restart. A broker that comes back on metadata that call it alive begins to end the
    transactions that it was about to end, and when it is counted as dead a little later Kafka 4.4 forgets to
    do so: what they wrote is neither committed nor aborted, ever, and nobody reads what comes behind it.
    """
    kept = (
        "node.id",
        "log.dirs",
        "controller.listener.names",
        "controller.quorum.voters",
        "listener.security.protocol.map",
    )
    return {name: settings[name] for name in kept} | {
        "process.roles": "controller",
        "listeners": f"CONTROLLER://{settings['controller.quorum.voters'].partition('@')[2]}",
        "broker.session.timeout.ms": "1000",
        "broker.heartbeat.interval.ms": "250",
    }


MOURNED = b"because its session has timed out"
"""What a controller logs when it counts a broker as dead; what it only reads of earlier deaths it says otherwise."""

OPEN = Listeners({"HOST": "PLAINTEXT"})
"""Anybody may do anything."""


class Unavailable(Exception):
    """This way to a broker does not exist here; the message says why."""


class KafkaCluster(Protocol):
    """A broker of the tests' own. Its addresses, of each listener by name, outlive `kill` and `restart`."""

    bootstrap: str
    addresses: Mapping[str, str]

    def kill(self) -> None:
        """SIGKILL."""

    def restart(self) -> None:
        """Starts what was killed, on the same data, and waits until it answers."""

    def pause(self) -> None:
        """Freezes it: connections stay open, nobody answers."""

    def unpause(self) -> None:
        """Ends a pause."""

    def stop(self) -> None:
        """Ends it and drops its data."""


def free_port() -> int:
    """A loopback port that nobody uses just now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_ready(
    bootstrap: str, ended: Callable[[], str | None], client: Mapping[str, str] = OPEN.client, timeout: float = 90
) -> None:
    """Until the broker answers; raises `Unavailable` when it ``ended`` (with what it said) or takes too long."""
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0, "reconnect.backoff.max.ms": 200, **client})
    deadline = time.monotonic() + timeout
    while True:
        try:
            if admin.list_topics(timeout=1).brokers:
                return
        except KafkaException:
            pass
        if (said := ended()) is not None:
            raise Unavailable(f"the broker ended:\n{said}")
        if time.monotonic() > deadline:
            raise Unavailable(f"the broker at {bootstrap} did not answer within {timeout:.0f} s")
        time.sleep(0.1)


def wait_mourned(logged: Callable[[], bytes], timeout: float = 90) -> None:
    """Until a controller has counted its broker as dead, by its log."""
    deadline = time.monotonic() + timeout
    while MOURNED not in (said := logged()):
        if time.monotonic() > deadline:
            raise Unavailable(f"the controller did not miss its broker:\n{said.decode(errors='replace')[-4000:]}")
        time.sleep(0.1)


class ContainerKafka:
    """A broker in a container, by Testcontainers."""

    def __init__(self, listeners: Listeners) -> None:
        # Ryuk is another image from a registry; whoever starts a broker stops it.
        os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
        import docker
        from testcontainers.core.container import DockerContainer

        try:
            engine = docker.from_env()
            try:
                engine.ping()
            finally:
                engine.close()
        except Exception as error:
            raise Unavailable(f"no Docker engine answers ({error})") from error
        self._listeners = listeners
        self.addresses = {name: f"127.0.0.1:{free_port()}" for name in listeners.protocols}
        self.bootstrap = next(iter(self.addresses.values()))
        inside = {name: 9100 + n for n, name in enumerate(self.addresses)}
        bound = {name: f":{port}" for name, port in inside.items()}
        settings = listeners.configured(bound, self.addresses, "localhost:19092", "localhost:9093")
        settings["log.dirs"] = "/var/lib/kafka/data"  # a volume of the image
        self._mourners = mourners(settings)
        self._container: DockerContainer = DockerContainer(IMAGE).with_env("KAFKA_HEAP_OPTS", "-Xms256m -Xmx512m")
        for name, address in self.addresses.items():
            outside = ("127.0.0.1", int(address.rpartition(":")[2]))
            self._container.ports[f"{inside[name]}/tcp"] = outside  # type: ignore[assignment]
        for variable, value in self._variables(settings).items():
            self._container.with_env(variable, value)
        try:
            self._container.start()
            self._wait_ready()
        except Unavailable:
            self.stop()
            raise
        except Exception as error:
            self.stop()
            raise Unavailable(f"the image {IMAGE} does not start ({error})") from error

    @staticmethod
    def _variables(settings: Settings) -> dict[str, str]:
        """How the image takes settings."""
        return {
            "KAFKA_" + name.upper().replace("_", "__").replace("-", "___").replace(".", "_"): value
            for name, value in settings.items()
        }

    def _wait_ready(self) -> None:
        wait_ready(self.bootstrap, self._ended, self._listeners.client)

    def _ended(self) -> str | None:
        box = self._container.get_wrapped_container()
        box.reload()
        return None if box.status in {"created", "running", "restarting"} else box.logs(tail=40).decode()

    def kill(self) -> None:
        box = self._container.get_wrapped_container()
        box.kill(signal="KILL")
        box.wait()

    def restart(self) -> None:
        box = self._container.get_wrapped_container()
        controller = self._container.get_docker_client().client.containers.run(
            IMAGE, detach=True, volumes_from=[box.id], environment=self._variables(self._mourners)
        )
        try:
            wait_mourned(controller.logs)
            controller.stop()  # in peace, so that what it has written is whole
        finally:
            controller.remove(force=True)
        box.start()
        self._wait_ready()

    def pause(self) -> None:
        self._container.get_wrapped_container().pause()

    def unpause(self) -> None:
        self._container.get_wrapped_container().unpause()

    def stop(self) -> None:
        self._container.stop()
        self._container.get_docker_client().client.close()


class ProcessKafka:
    """A broker as a child process; its jars come from Maven, once, into ``.kafka``."""

    def __init__(self, listeners: Listeners) -> None:
        self._java = find_java()
        libraries = fetch_jars()
        self._folder = Path(tempfile.mkdtemp(prefix="durably-kafka-"))
        self._listeners = listeners
        self.addresses = {name: f"127.0.0.1:{free_port()}" for name in listeners.protocols}
        self.bootstrap = next(iter(self.addresses.values()))
        inner, controller = (f"127.0.0.1:{free_port()}" for _ in range(2))
        settings = listeners.configured(self.addresses, self.addresses, inner, controller)
        settings["log.dirs"] = str(self._folder / "data")
        properties, controller_properties = self._folder / "server.properties", self._folder / "controller.properties"
        for file, what in ((properties, settings), (controller_properties, mourners(settings))):
            file.write_text("".join(f"{name}={value}\n" for name, value in what.items()))
        run = [self._java, "-Xms256m", "-Xmx512m", "-XX:+UseSerialGC", "-cp", f"{libraries}/*"]
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "A")
        self._command = [*run, "kafka.Kafka", str(properties)]
        self._mourning = [*run, "kafka.Kafka", str(controller_properties)]
        formatted = subprocess.run(
            [*run, "kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(properties)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if formatted.returncode:
            shutil.rmtree(self._folder)
            raise Unavailable(f"Kafka's storage cannot be formatted: {formatted.stdout}{formatted.stderr}")
        self._process = self._spawn(self._command)
        try:
            self._wait_ready()
        except Unavailable:
            self.stop()
            raise

    def _spawn(self, command: list[str], said: str = "broker.log") -> subprocess.Popen[bytes]:
        with (self._folder / said).open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder)

    def _wait_ready(self) -> None:
        wait_ready(self.bootstrap, self._ended, self._listeners.client)

    def _ended(self) -> str | None:
        if self._process.poll() is None:
            return None
        return (self._folder / "broker.log").read_text(errors="replace")[-4000:]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        log = self._folder / "controller.log"
        log.unlink(missing_ok=True)
        controller = self._spawn(self._mourning, log.name)
        try:
            wait_mourned(log.read_bytes)
            controller.terminate()  # in peace, so that what it has written is whole
            controller.wait(60)
        finally:
            controller.kill()
            controller.wait()
        self._process = self._spawn(self._command)
        self._wait_ready()

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def unpause(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.kill()
        shutil.rmtree(self._folder)


def find_java() -> str:
    """The path of a Java 17 or newer."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin" if home else None) or shutil.which("java")
    if java is None:
        raise Unavailable("there is no Java")
    said = subprocess.run([java, "-XshowSettings:properties", "-version"], capture_output=True, text=True, check=False)
    version = next(
        (line.split("=")[1] for line in said.stderr.splitlines() if "java.specification.version" in line), "0"
    )
    if float(version) < 17:
        raise Unavailable(f"Java {version.strip()} is too old")
    return java


def fetch_jars() -> Path:
    """Kafka's own jars and what they need, fetched by Maven where they are not there yet."""
    libraries = JARS / KAFKA_VERSION
    if libraries.is_dir():
        return libraries
    maven = shutil.which("mvn")
    if maven is None:
        raise Unavailable("there is no Maven")
    JARS.mkdir(exist_ok=True)
    # Renamed into place when complete: another session may be fetching at the same time, or this one be ended.
    with tempfile.TemporaryDirectory(dir=JARS) as folder:
        dependencies = "".join(
            "<dependency><groupId>{}</groupId><artifactId>{}</artifactId><version>{}</version></dependency>".format(
                *name.split(":"), version
            )
            for name, version in ARTIFACTS.items()
        )
        pom = Path(folder) / "pom.xml"
        pom.write_text(
            '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>'
            "<groupId>durably</groupId><artifactId>kafka</artifactId><version>1</version>"
            f"<dependencies>{dependencies}</dependencies></project>"
        )
        fetched = subprocess.run(
            [maven, "-q", "-B", "-f", str(pom), "dependency:copy-dependencies", f"-DoutputDirectory={folder}/libs"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if fetched.returncode:
            raise Unavailable(f"Maven cannot fetch Kafka's jars:\n{fetched.stdout[-2000:]}{fetched.stderr[-2000:]}")
        try:
            (Path(folder) / "libs").rename(libraries)
        except OSError:
            if not libraries.is_dir():
                raise
    return libraries


def start(listeners: Listeners = OPEN) -> KafkaCluster:
    """A broker of the caller's own.

    Raises:
        Unavailable: there is no way to one; the message says what to install.
    """
    ways: dict[str, Callable[[Listeners], KafkaCluster]] = {"docker": ContainerKafka, "java": ProcessKafka}
    only = os.environ.get("DURABLY_TEST_KAFKA_VIA")
    reasons = []
    for name, way in ways.items():
        if only in {None, "", name}:
            try:
                return way(listeners)
            except Unavailable as error:
                reasons.append(f"{name}: {error}")
    raise Unavailable("\n".join([REMEDY, *reasons]))
