"""An installation in which a bit of everything has happened: what the dashboard is shown, and tested, with."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import durably
from durably import create_hook, create_webhook, get_writable, sleep, step, workflow
from durably.broker import connect
from durably.client import Client
from durably.settings import Settings
from durably_connectors.http import GatewayThread, create_gateway
from durably_processor.dev import Dev
from durably_processor.engine import guards
from harness import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from durably.broker.port import Broker

HOSTILE = '{{ 7 * 7 }}<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">\'"`'
"""What would run where it is not escaped."""
_code = {"changed": False}
_tries: dict[str, int] = {}


@step(name="dash.charge", max_retries=3, backoff="200ms")
async def charge(order: str, cents: int) -> dict[str, Any]:
    _tries[order] = _tries.get(order, 0) + 1
    if _tries[order] < 3:
        raise ConnectionError("the bank does not answer")
    return {"receipt": f"r-{order}", "cents": cents}


@step(name="dash.pack")
async def pack(order: str) -> str:
    async with get_writable() as progress:
        for n in range(3):
            await progress.write({"packing": order, "item": n})
            await asyncio.sleep(0.02)
    return f"box {order}"


@step(name="dash.talk")
async def talk(lines: int) -> int:
    async with get_writable() as said:
        for n in range(lines):
            await said.write(f"line {n}")
            await asyncio.sleep(0.05)
    return lines


@step(name="dash.fails", max_retries=0)
async def fails(said: str) -> None:
    raise ValueError(said)


@workflow(name="dash.label")
async def label(order: str) -> str:
    return f"label of {await pack(order)}"


@workflow(name="dash.order")
async def order(order_id: str, cents: int) -> dict[str, Any]:
    receipt, box = await asyncio.gather(charge(order_id, cents), pack(order_id))
    child = await durably.start(label, order_id)
    await sleep("300ms")
    return {"receipt": receipt, "box": box, "label": await child.result()}


@workflow(name="dash.approval")
async def approval(document: str) -> dict[str, Any]:
    await pack(document)
    async with create_hook(token=f"approve-{document}", metadata={"document": document, "amount": 1250}) as hook:
        return {"decision": await hook}


@workflow(name="dash.callback")
async def callback(token: str) -> str:
    async with create_webhook(token=token) as hook:
        await hook
    return "called"


@workflow(name="dash.report")
async def report(said: str) -> None:
    await fails(said)


@workflow(name="dash.nightly")
async def nightly() -> None:
    await sleep("8h")


@workflow(name="dash.speech")
async def speech(lines: int) -> int:
    return await talk(lines)


@workflow(name="dash.changing")
async def changing() -> str:
    if _code["changed"]:
        await pack("changed")
    else:
        await label_of("unchanged")
    async with create_hook(token="dash-changing") as hook:
        return await hook


@step(name="dash.label_of")
async def label_of(order: str) -> str:
    return order


class Scene:
    """The installation, and a gateway before it."""

    def __init__(self, broker: Broker, settings: Settings) -> None:
        self.broker = broker
        self.client = Client(broker)
        self.settings = settings

    @contextmanager
    def gateway(self, **options: Any) -> Iterator[GatewayThread]:
        """A gateway on loopback."""
        thread = GatewayThread(lambda: create_gateway(self.settings.url, **options), 0)
        thread.start()
        try:
            yield thread
        finally:
            thread.stop()

    @contextmanager
    def working(self) -> Iterator[None]:
        """A processor and a worker."""
        dev = Dev(self.settings, self.broker, ("default", "mail"), 10)
        dev.start()
        try:
            yield
        finally:
            dev.stop()

    def put(self, topic: str, value: bytes) -> None:
        """A record on a topic, as somebody wrote it."""
        producer = self.broker.producer()
        producer.send(topic, value, key=b"order-x")
        producer.flush(10)
        producer.close()

    def happen(self, *, orders: int = 1) -> None:
        """Lets a bit of everything happen; the last of it blocks a run, by code that is another after a restart."""
        with self.working():
            start = self.client.options
            runs = [
                start(run_id=f"order-{n}", attributes={"team": "eu" if n % 3 else "us", "tier": "gold"}).start(
                    order, str(n), 1250 + n
                )
                for n in range(orders)
            ]
            start(run_id="expense-7").start(approval, "7")
            start(run_id="call-1").start(callback, "dash-call-1")
            start(run_id="nightly-1").start(nightly)
            start(run_id="hostile/<b>1</b>", attributes={"<i>team</i>": HOSTILE}).start(report, HOSTILE)
            gone = start(run_id="nightly-0").start(nightly)
            gone.cancel("not tonight")
            start(run_id="changing-1").start(changing)
            for run in runs:
                run.result(60)
            for run_id in ("expense-7", "call-1", "changing-1"):
                until(lambda run_id=run_id: self.client.get_run(run_id).describe().hooks)
            self.put("durably.commands", b"\xc3\x01no event" + HOSTILE.encode())
        _code["changed"] = True


@contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    """An installation on the embedded broker in this folder, in this process."""
    settings = Settings.from_environment(url=f"embedded:{folder / 'broker'}", partitions=3)
    guards.install()
    broker = connect(settings.url)
    made = Scene(broker, settings)
    _code["changed"] = False
    _tries.clear()
    try:
        yield made
    finally:
        made.client.close()
        broker.close()
        guards.uninstall()
