"""Runs the code of one page of the documentation, as a reader would who types it in: ``page.py PAGE.md FOLDER``.

The blocks fenced as ```python are one module, in their order; ``await`` may stand at its top level. A processor and a
worker on an embedded broker in FOLDER run what it starts, and DURABLY_URL names that broker. Where a block has comments ``#> …``, they are all that it
prints, line by line. A block fenced as ```python no-run is shown only.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import sys
import types
from pathlib import Path
from typing import NamedTuple

from durably.broker import connect
from durably.settings import Settings
from durably_processor.dev import Dev
from durably_processor.engine import guards

FENCE = re.compile(r"^```python[ ]*(?P<info>[^\n]*)\n(?P<code>.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
NOT_RUN = "no-run"
SHOWN = re.compile(r"^[ ]*#[ ]?>[ ]?(.*)$", re.MULTILINE)
QUEUE = re.compile(r"""queue=["']([\w.-]+)["']""")


class Block(NamedTuple):
    """One block: its first line within the page, its code, and the lines that it is to print."""

    line: int
    code: str
    output: list[str]


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page that are to be run. Raises `ValueError` for a fence with a word that means nothing."""
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        if match["info"] == NOT_RUN:
            continue
        if match["info"]:
            raise ValueError(f"line {line - 1}: ```python {match['info']}: only {NOT_RUN!r} may follow")
        found.append(Block(line, match["code"], SHOWN.findall(match["code"])))
    return found


def main(page: Path, folder: Path) -> None:
    """Runs a page. Raises what its code raises, and `AssertionError` where the output is another."""
    text = page.read_text()
    blocks = blocks_of(text)
    if not blocks:
        raise ValueError(f"{page} has no block of Python that is run")
    name = f"page_{page.stem.lower()}"
    os.chdir(folder)
    source = folder / f"{name}.py"
    source.write_text(_aligned(text, blocks))
    module = types.ModuleType(name)
    module.__file__ = str(source)
    sys.modules[name] = module

    settings = Settings.from_environment(url=f"embedded:{folder / 'broker'}")
    os.environ["DURABLY_URL"] = settings.url
    guards.install()
    broker = connect(settings.url)
    dev = Dev(settings, broker, ("default", *QUEUE.findall(text)), 20)
    dev.start()
    try:
        with asyncio.Runner() as runner:
            for block in blocks:
                _run(block, module, runner)
    finally:
        dev.stop()
        broker.close()


def _aligned(text: str, blocks: list[Block]) -> str:
    """The module: every line of code where it stands in the page, so that tracebacks and `inspect` find it."""
    lines = [""] * text.count("\n")
    for block in blocks:
        code = block.code.splitlines()
        lines[block.line - 1 : block.line - 1 + len(code)] = code
    return "\n".join(lines)


def _run(block: Block, module: types.ModuleType, runner: asyncio.Runner) -> None:
    printed: list[str] = []

    def show(*values: object) -> None:
        printed.extend(" ".join(map(str, values)).split("\n"))

    module.__dict__["print"] = show
    tree = ast.increment_lineno(ast.parse(block.code), block.line - 1)
    code = compile(tree, str(module.__file__), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if code.co_flags & inspect.CO_COROUTINE:
        runner.run(types.FunctionType(code, module.__dict__)())
    else:
        exec(code, module.__dict__)
    if block.output:
        assert printed == block.output, f"line {block.line}: printed {printed}, and the page says {block.output}"


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0" or os.environ.get("TZ") != "UTC":
        os.environ |= {"PYTHONHASHSEED": "0", "TZ": "UTC"}
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
