"""A step may run twice, its effect must not: send the step's id along as the idempotency key.

``step_id`` is the same at every attempt, and at every execution that a crash repeats, and no other call of a step has
it. Here the answer of the first request is lost on its way, as after a crash: the retry charges nobody again.
"""

import json
import urllib.request
from typing import ClassVar

from _run import Api, run, serving
from durably import AsyncClient, get_step_metadata, step, workflow


class Bank(Api):
    """Carries out each key once, and answers a repeated one as before."""

    charges: ClassVar[dict[str, bytes]] = {}
    requests = 0

    def do_POST(self) -> None:  # noqa: N802 - as http.server calls it
        Bank.requests += 1
        amount = json.loads(self.rfile.read(int(self.headers["content-length"])))
        answer = Bank.charges.setdefault(self.headers["idempotency-key"], f"receipt for {amount}".encode())
        self.reply(200, answer)


@step(backoff="50ms")
def charge_once(bank: str, cents: int) -> str:
    me = get_step_metadata()
    request = urllib.request.Request(  # noqa: S310 - the example's own server
        bank, json.dumps(cents).encode(), {"idempotency-key": me.step_id}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - as above
        receipt = answer.read().decode()
    if me.attempt == 1:
        raise ConnectionResetError("the answer was lost")
    return receipt


@workflow
async def buy(bank: str, cents: int) -> str:
    return await charge_once(bank, cents)


async def main() -> None:
    with serving(Bank) as bank:
        async with AsyncClient() as client:
            bought = await client.start(buy, bank, 1250)
            print(await bought.result(timeout=60))
        print(f"{Bank.requests} requests, {len(Bank.charges)} charge")


if __name__ == "__main__":
    run(main)
