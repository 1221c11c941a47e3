"""What the processors and workers of the harness run. Each workflow's outcome stands in `chaos.shapes`."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, NoReturn

from durably import FatalError, Readable, create_hook, get_step_metadata, get_writable, sleep, start, step, workflow

MANY = 30  # retries: workers that die use up attempts, and that is not what a test shall fail by
SOON = "50ms"


def _append(variable: str, entry: dict[str, Any]) -> None:
    """One line in one write, which O_APPEND makes atomic: processes may die, but lines are whole."""
    file = os.open(os.environ[variable], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, json.dumps(entry).encode() + b"\n")
    finally:
        os.close(file)


def note() -> None:
    """One line in the ledger for each execution of a step. Not by `time.time`, which the harness makes jump."""
    meta = get_step_metadata()
    at = time.clock_gettime_ns(time.CLOCK_REALTIME) // 1_000_000
    entry = {"run": meta.run_id, "step": meta.step_id, "attempt": meta.attempt, "pid": os.getpid(), "at": at}
    _append("CHAOS_LEDGER", entry)


@step(max_retries=MANY, backoff=SOON)
async def chaos_add(a: int, b: int) -> int:
    note()
    return a + b


@step(max_retries=MANY, backoff=SOON)
def chaos_double(n: int) -> int:
    note()
    time.sleep(0.005)
    return 2 * n


@step(max_retries=MANY, backoff=SOON)
async def chaos_doze(seconds: float) -> str:
    note()
    await asyncio.sleep(seconds)
    return "step"


@step(max_retries=MANY, backoff=SOON)
async def chaos_stumble(n: int) -> int:
    note()
    if get_step_metadata().attempt < 3:
        raise ValueError("not yet")
    return n


@step(max_retries=2, backoff=SOON)
async def chaos_always_raises() -> NoReturn:
    note()
    raise OSError("it never works")


@step(max_retries=MANY)
async def chaos_hopeless() -> NoReturn:
    note()
    raise FatalError("this cannot be")


@step(max_retries=MANY, backoff=SOON)
async def chaos_tell(token: str) -> None:
    """Tells the load generator that the run waits, and for what."""
    note()
    _append("CHAOS_MAIL", {"run": get_step_metadata().run_id, "token": token})


@step(max_retries=MANY, backoff=SOON)
async def chaos_write(first: int, count: int) -> None:
    note()
    out = get_writable("log")
    for i in range(first, first + count):
        await out.write(i)


@step(max_retries=MANY, backoff=SOON)
async def chaos_produce(count: int) -> AsyncIterator[int]:
    note()
    for i in range(count):
        yield i


@step(max_retries=MANY, backoff=SOON)
def chaos_produce_plainly(count: int) -> Iterator[int]:
    note()
    yield from range(count)


@workflow
async def chaos_sequence(n: int) -> int:
    for i in range(5):
        n = await chaos_add(n, i)
    return n


@workflow
async def chaos_fan(n: int) -> int:
    return sum(await asyncio.gather(*(chaos_add(n, i) for i in range(6)), *(chaos_double(n) for _ in range(4))))


@workflow
async def chaos_race(n: int) -> str:
    try:
        async with asyncio.timeout(0.05 + n % 5 * 0.02):
            said = await chaos_doze(0.1)
    except TimeoutError:
        said = "timer"
    await chaos_add(n, 1)
    return said


@workflow
async def chaos_naps(n: int) -> int:
    for i in range(3):
        await sleep(f"{20 + 40 * i}ms")
        n = await chaos_double(n)
    return n


@workflow
async def chaos_hook(n: int) -> int:
    hook = create_hook()
    await chaos_tell(hook.token)
    return n + await hook + await hook


@workflow
async def chaos_token(n: int) -> int:
    async with create_hook(token=f"chaos-{n}") as hook:
        await chaos_tell(hook.token)
        total = n + await hook + await hook
    return await chaos_add(total, 1)


@workflow
async def chaos_mutex(n: int) -> str:
    async with create_hook(token=f"mutex-{n // 3}") as hook:
        if await hook.get_conflict() is not None:
            return "conflict"
        await chaos_add(n, 1)
    return "held"


@workflow
async def chaos_family(n: int) -> int:
    children = [await start(chaos_sequence, n), await start(chaos_stubborn, n)]
    return sum([await child.result() for child in children])


@workflow
async def chaos_stubborn(n: int) -> int:
    return await chaos_stumble(n)


@workflow
async def chaos_streams(n: int) -> Readable:
    handle, plain, _ = await asyncio.gather(chaos_produce(20), chaos_produce_plainly(10), chaos_write(0, 10))
    await chaos_write(10, 10)
    return handle if n % 2 else plain


@workflow
async def chaos_failing(n: int) -> int:
    try:
        await chaos_always_raises()
    except OSError:
        n = await chaos_add(n, 1)
    await chaos_hopeless()
    return n


@workflow
async def chaos_cancelled(n: int) -> None:
    try:
        hook = create_hook()
        await chaos_tell(hook.token)
        await hook
    finally:
        await chaos_add(n, 1)


@workflow
async def chaos_lease(n: int) -> str:
    return await chaos_doze(6.0 + n % 3)


# What no processor likes: each of these runs must be blocked, and hurt nobody else.


@workflow
async def chaos_loops_for_ever(n: int) -> None:
    await chaos_add(n, 1)
    while True:
        pass


@workflow
async def chaos_ends_the_process(n: int) -> None:
    await chaos_add(n, 1)
    os._exit(70)


@workflow
async def chaos_breaks_the_engine(n: int) -> None:
    """Workflow code shares its process with the processor; this breaks what handles it, for this run alone."""
    from durably.runtime import workflow_context

    await chaos_add(n, 1)
    vars(workflow_context())["_commands"] = None
