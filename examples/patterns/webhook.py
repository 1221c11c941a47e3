"""Wait for another system to call: a webhook has a URL, and the run has the request as soon as somebody sends one.

The caller is answered by a step, while it waits. Without ``respond_with="manual"`` it gets a 202 at once.
"""

import asyncio
import json
import urllib.request

from _run import run
from durably import AsyncClient, Request, Response, create_webhook, get_writable, step, workflow


@step
async def order_print(document: str, callback: str) -> None:
    """Asks a print shop, which will call back. Here the order goes to a stream of the run, for `main` to read."""
    await get_writable("orders").write({"document": document, "callback": callback})


@step
async def thank(request: Request, printed: str) -> None:
    await request.respond_with(Response.json({"thanks for": printed}))


@workflow
async def print_document(document: str) -> str:
    async with create_webhook(respond_with="manual") as webhook:
        await order_print(document, webhook.url)
        request = await webhook
    body = await request.json()
    await thank(request, body["printed"])
    return f"{request.method}: {body['pages']} pages of {body['printed']}"


def call_back(order: dict[str, str]) -> str:
    """What the print shop does."""
    body = json.dumps({"printed": order["document"], "pages": 90}).encode()
    request = urllib.request.Request(  # noqa: S310 - of the local gateway
        order["callback"], body, {"content-type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - as above
        return str(answer.read().decode())


async def main() -> None:
    async with AsyncClient() as client:
        printing = await client.start(print_document, "thesis.pdf")
        order = await anext(printing.stream("orders"))
        print(await asyncio.to_thread(call_back, order))
        print(await printing.result(timeout=60))


if __name__ == "__main__":
    run(main, gateway=True)
