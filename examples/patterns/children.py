"""One workflow within another: awaited in place, or started as a run of its own.

Awaited in place its steps are part of the caller's log: simple, and cancelled with the caller. Started, it has a log, an
id and an end of its own; the parent may wait for it, leave it alone, or have it cancelled when the parent ends.
"""

import asyncio

import durably
from _run import run
from durably import AsyncClient, RunFailedError, step, workflow


@step
async def translate(text: str, language: str) -> str:
    if language == "xx":
        raise durably.FatalError("no such language")
    return f"{text} [{language}]"


@workflow
async def chapter(text: str, language: str) -> str:
    return await translate(text, language)


@workflow
async def book_in_place(chapters: list[str], language: str) -> list[str]:
    return [await chapter(text, language) for text in chapters]


@workflow
async def book_of_runs(chapters: list[str], language: str) -> list[str]:
    children = [await durably.options(on_parent_end="cancel").start(chapter, text, language) for text in chapters]
    try:
        return await asyncio.gather(*(child.result() for child in children))
    except RunFailedError as e:
        return [f"not translated: {e.cause}"]


async def main() -> None:
    async with AsyncClient() as client:
        for book, language in ((book_in_place, "de"), (book_of_runs, "de"), (book_of_runs, "xx")):
            translated = await client.start(book, ["one", "two"], language)
            print(f"{book.name}: {await translated.result(timeout=60)}")


if __name__ == "__main__":
    run(main)
