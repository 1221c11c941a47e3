"""An API that says when to come back: its `Retry-After` becomes the step's.

The delay is a timer of the run's, not a worker that waits: it holds no slot, and survives every restart.
"""

import urllib.request
from urllib.error import HTTPError

from _run import Api, run, serving
from durably import AsyncClient, RetryableError, get_step_metadata, step, workflow


class LimitedApi(Api):
    """Has too much to do for the first two requests."""

    requests = 0

    def do_GET(self) -> None:  # noqa: N802 - as http.server calls it
        LimitedApi.requests += 1
        if LimitedApi.requests <= 2:
            self.reply(429, retry_after="0.2")
        else:
            self.reply(200, b"sunny")


@step(max_retries=10)
def weather(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - the example's own server
            return f"{answer.read().decode()} at attempt {get_step_metadata().attempt}"
    except HTTPError as e:
        if e.code == 429:
            raise RetryableError(f"{url} is busy", retry_after=float(e.headers["retry-after"])) from e
        raise


@workflow
async def forecast(url: str) -> str:
    return await weather(url)


async def main() -> None:
    with serving(LimitedApi) as url:
        async with AsyncClient() as client:
            asked = await client.start(forecast, url)
            print(await asked.result(timeout=60))


if __name__ == "__main__":
    run(main)
