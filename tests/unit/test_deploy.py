"""What is shipped to deploy with fits the program: settings, commands, probes, alerts, and the page for operators."""

from __future__ import annotations

import inspect
import re
import runpy
import shlex
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import kubernetes_validate
import pytest
import yaml
from durably import payload_codec
from durably.cli.app import app
from durably.durations import milliseconds
from durably.observability.endpoint import Endpoint
from durably.observability.metrics import METRICS
from durably.settings import KAFKA_PREFIX, Settings
from typer.main import get_command
from unit.gateway_under_test import gateway_under_test

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "deploy" / "kubernetes"
PAGE = ROOT / "docs" / "operations.md"
CLI = get_command(app)
IMAGE = "durably"
METRICS_PORT = "9464"
CUSTOMERS = runpy.run_path(str(ROOT / "examples/payments/customers.py"))


class Process(NamedTuple):
    """One process of durably: its command line, its environment, and seconds that it has to end."""

    name: str
    args: list[str]
    environment: dict[str, str]
    grace: float


def parsed(args: list[str]) -> tuple[str, dict[str, Any]]:
    """The command and its parameters. Raises where the command line has no such command or option."""
    command, context = CLI, CLI.make_context("durably", list(args))
    name = "durably"
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    return name, context.params


def documents() -> list[dict[str, Any]]:
    files = [path for path in sorted(MANIFESTS.glob("*.yaml")) if path.name != "kustomization.yaml"]
    return [document for path in files for document in yaml.safe_load_all(path.read_text())]


DOCUMENTS = documents()
COMPOSE: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def identity(document: dict[str, Any]) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def named(kind: str) -> dict[str, dict[str, Any]]:
    return {document["metadata"]["name"]: document for document in DOCUMENTS if document["kind"] == kind}


def pods() -> dict[str, dict[str, Any]]:
    """The template of every pod."""
    return {identity(d): d["spec"]["template"] for d in DOCUMENTS if "template" in d.get("spec", {})}


def in_kubernetes() -> list[Process]:
    found = []
    for name, pod in pods().items():
        (container,) = pod["spec"]["containers"]
        environment: dict[str, str] = {}
        for source in container["envFrom"]:
            for kind, key, field in (("ConfigMap", "configMapRef", "data"), ("Secret", "secretRef", "stringData")):
                if key in source:
                    environment |= named(kind)[source[key]["name"]][field]
        environment |= {entry["name"]: entry.get("value", "a-pod") for entry in container.get("env", ())}
        if "args" in container:
            grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
            found.append(Process(name, container["args"], environment, grace))
    return found


def in_compose() -> list[Process]:
    """Those whose command is durably's."""
    default = re.compile(r"\$\{\w+:-([^}]*)\}")
    return [
        Process(
            f"compose/{name}",
            [default.sub(r"\1", word) for word in service["command"]],
            {key: default.sub(r"\1", value) for key, value in service["environment"].items()},
            milliseconds(service.get("stop_grace_period", "10s")) / 1000,
        )
        for name, service in COMPOSE.items()
        if "DURABLY_IMAGE" in service["image"] and "entrypoint" not in service
    ]


PROCESSES = [*in_kubernetes(), *in_compose()]


def settings_of_all_commands() -> set[str]:
    """The name of every variable that some process reads."""
    known = {f"DURABLY_{name.upper()}" for name in inspect.signature(Settings.from_environment).parameters}
    pending = [CLI]
    while pending:
        command = pending.pop()
        pending += getattr(command, "commands", {}).values()
        for parameter in command.params:
            names = parameter.envvar or ()
            known |= {names} if isinstance(names, str) else set(names)
    return known | {payload_codec.SETTING}


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.name)
def test_deploy_a_process_is_a_command_with_settings_that_exist(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = settings_of_all_commands()
    unknown = {name for name in process.environment if name not in known and not name.startswith(KAFKA_PREFIX)}
    assert not unknown
    for name, value in process.environment.items():
        monkeypatch.setenv(name, value)
    Settings.from_environment(process.environment)  # raises where a value cannot be
    command, parameters = parsed(process.args)
    modules = [*parameters.get("modules", ()), *filter(None, [parameters.get("module")])]
    assert all((ROOT / module).is_file() for module in modules)
    if command in {"processor", "worker", "gateway"}:
        assert parameters["metrics"] == f"0.0.0.0:{METRICS_PORT}"
    if command == "worker":
        assert process.grace > milliseconds(parameters["drain"]) / 1000


def test_deploy_every_role_is_there() -> None:
    kinds = {"processor", "worker", "gateway", "connectors"}
    assert {process.args[0] for process in in_compose()} == kinds | {"topics"}
    assert {process.args[0] for process in in_kubernetes()} == kinds | {"topics"}


def test_deploy_a_name_that_is_no_setting_or_option_is_found() -> None:
    assert "DURABLY_INSTANCE_ID" not in settings_of_all_commands()
    with pytest.raises(Exception, match="No such option"):
        parsed(["worker", "shop.py", "--drains", "5m"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=identity)
def test_deploy_a_manifest_keeps_to_the_schema_of_kubernetes(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_deploy_a_manifest_with_a_field_that_there_is_not_is_found() -> None:
    wrong = {**named("Service")["durably-gateway"], "spce": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_deploy_kustomize_takes_all_manifests_and_sets_their_image() -> None:
    kustomization = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())
    files = {path.name for path in MANIFESTS.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files
    (image,) = kustomization["images"]
    assert image["name"] == IMAGE
    assert {container["image"] for pod in pods().values() for container in pod["spec"]["containers"]} == {IMAGE}


@pytest.mark.parametrize("name", pods())
def test_deploy_a_pod_refers_to_what_is_there_and_is_confined(name: str) -> None:
    spec = pods()[name]["spec"]
    (container,) = spec["containers"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    claims = named("StatefulSet").get(name.partition("/")[2], {"spec": {}})["spec"].get("volumeClaimTemplates", ())
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == volumes.keys() | {claim["metadata"]["name"] for claim in claims}
    assert {v["configMap"]["name"] for v in volumes.values() if "configMap" in v} <= named("ConfigMap").keys()
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("document", [*named("Service").values(), *named("PodDisruptionBudget").values()], ids=identity)
def test_deploy_a_selector_selects_the_pods_of_one_kind(document: dict[str, Any]) -> None:
    selector = document["spec"]["selector"]
    wanted = selector.get("matchLabels", selector)
    chosen = [pod for pod in pods().values() if wanted.items() <= pod["metadata"]["labels"].items()]
    assert len(chosen) == 1
    ports = {port["name"] for port in chosen[0]["spec"]["containers"][0].get("ports", ())}
    assert {port["targetPort"] for port in document["spec"].get("ports", ())} <= ports


def probed() -> dict[str, set[str]]:
    """The paths that are asked for on each port, by the port's name, in manifests and in compose."""
    paths: dict[str, set[str]] = {}
    for pod in pods().values():
        (container,) = pod["spec"]["containers"]
        ports = {port["name"]: str(port["containerPort"]) for port in container.get("ports", ())}
        for key, probe in container.items():
            if key.endswith("Probe") and "httpGet" in probe:
                paths.setdefault(ports[probe["httpGet"]["port"]], set()).add(probe["httpGet"]["path"])
    for text in re.findall(r"http://127\.0\.0\.1:\d+/\w+/?'", (ROOT / "docker-compose.yml").read_text()):
        port, _, path = text.removesuffix("'").removeprefix("http://127.0.0.1:").partition("/")
        paths.setdefault(port, set()).add(f"/{path}")
    return paths


def test_deploy_probes_ask_for_what_there_is() -> None:
    paths = probed()
    assert paths.keys() == {METRICS_PORT, "8233", "8234"}
    served = Endpoint("127.0.0.1:0", [])
    try:
        for path in paths[METRICS_PORT]:
            with urllib.request.urlopen(served.url + path) as answer:
                assert answer.status == 200
    finally:
        served.close()
    with gateway_under_test() as gateway:
        assert {gateway.http.get(path).status_code for path in paths["8233"]} <= {200, 503}


def test_deploy_compose_gives_each_processor_a_name_and_a_volume_of_its_own() -> None:
    processors = [COMPOSE[name] for name in COMPOSE if name.startswith("processor-")]
    names = {service["environment"]["DURABLY_GROUP_INSTANCE_ID"] for service in processors}
    volumes = {volume for service in processors for volume in service["volumes"]}
    assert len(names) == len(volumes) == len(processors) == 2


def test_deploy_what_compose_runs_besides_is_in_the_image() -> None:
    scripts = [service["entrypoint"][1] for service in COMPOSE.values() if "entrypoint" in service]
    assert len(scripts) == 2
    assert all((ROOT / script).is_file() for script in scripts)


def test_deploy_customers_send_each_order_once_and_each_payment_at_least_once() -> None:
    sent = [(topic, value["order"]) for topic, value in CUSTOMERS["messages"](20)]
    orders, payments = ([order for topic, order in sent if topic == wanted] for wanted in ("orders", "payments"))
    assert len(orders) == len(set(orders)) == len(set(payments)) == 20
    assert len(payments) == 24
    assert sent.index(("payments", "3")) < sent.index(("orders", "3"))


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((ROOT / "deploy/prometheus/durably.rules.yml").read_text())["groups"]
    return group["rules"]


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_deploy_an_alert_asks_for_metrics_that_there_are_and_says_what_to_do(alert: dict[str, Any]) -> None:
    series = {re.sub(r"_bucket$", "", name) for name in re.findall(r"\bdurably_\w+", alert["expr"])}
    assert series <= METRICS.keys()
    assert series or "up{" in alert["expr"]
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert ROOT / page == PAGE
    headings = re.findall(r"^#+ (.*)$", PAGE.read_text(), re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def test_deploy_prometheus_scrapes_what_compose_serves() -> None:
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    targets = {target for group in job["static_configs"] for target in group["targets"]}
    serving = {name for name in COMPOSE if name.startswith(("processor", "worker", "gateway"))}
    assert targets == {f"{name}:{METRICS_PORT}" for name in serving}
    assert all((ROOT / "deploy/prometheus" / name).is_file() for name in prometheus["rule_files"])


def test_deploy_commands_on_the_page_are_commands_of_the_program() -> None:
    page = PAGE.read_text()
    spans = re.findall(r"`(?:kubectl [^`\n]* -- )?(durably [a-z][^`\n]*)`", page)
    lines = re.findall(r"^\$ (?:kubectl .* -- )?(durably .*)$", page, re.MULTILINE)
    assert len(spans) > 10
    assert lines
    for text in [*spans, *lines]:
        words = shlex.split(text, comments=True)[1:]
        parsed([re.sub(r"^DATA$", "{}", word) for word in words])


def test_deploy_messages_on_the_page_are_messages_of_the_program() -> None:
    """The first cells of the tables that begin with what a process says; `…` stands for anything."""
    page = PAGE.read_text()
    source = "".join(
        path.read_text() for room in ("schemas", "sdk", "processor") for path in (ROOT / room).rglob("*.py")
    )
    source = re.sub(r'"\s+f?"', "", source)
    tables = re.findall(r"^\| (?:what it says|its last line|reason) \|.*\n\|.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert len(tables) == 3
    said = [text for table in tables for row in table.splitlines() for text in re.findall("`(.*?)`", row.split("|")[1])]
    assert len(said) > 12
    for text in said:
        for part in filter(None, map(str.strip, text.split("…"))):
            assert part in source, text
