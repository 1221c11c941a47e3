"""How a peer is measured, within its own environment: ``PYTHONPATH=bench python dbos_peer.py dbos-sqlite --out FILE``.

The module of a peer begins with its requirements (inline script metadata, PEP 723), which `environments` installs, and
ends with `main` over its variants.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from figures import System
from measure import SMALL, Size, measure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from measure import Subject

CLIENT = "client"  # the role of the process that measures
SIZE = Size(warm_up=5.0)  # no peer brings a virtual machine that compiles as long as the broker's


class Unavailable(Exception):
    """This variant cannot be measured here; the message says why."""


class Variant(NamedTuple):
    """One way of running a peer.

    Attributes:
        running: starts it, with its data in a folder of its own, and gives a client of it. Raises `Unavailable`.
        at_once: how many runs it is given at once, at most, to measure its throughput.
    """

    system: System
    running: Callable[[Path], AbstractAsyncContextManager[Subject]]
    at_once: int = SIZE.at_once


def home(peer: str) -> Path:
    """Where `environments` has installed what a peer needs."""
    return Path(__file__).parents[1] / ".peers" / peer


def free_port() -> int:
    """A loopback port that nobody uses just now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def versions(*packages: str) -> str:
    """Python packages of this environment with their versions."""
    return ", ".join(f"{name} {version(name)}" for name in packages)


async def _measured(name: str, variant: Variant, folder: Path, size: Size) -> dict[str, object]:
    try:
        async with variant.running(folder) as subject:
            figures = await measure(name, subject, size._replace(at_once=variant.at_once))
    except Unavailable as reason:
        return {"unavailable": str(reason)}
    return {"system": asdict(variant.system), "figures": [asdict(figure) for figure in figures]}


def main(variants: Mapping[str, Variant]) -> None:
    """Measures one variant and writes what was found, as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=tuple(variants))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix=f"bench-{asked.variant}-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL does not run as root
        found = asyncio.run(_measured(asked.variant, variants[asked.variant], folder, SMALL if asked.small else SIZE))
    asked.out.write_text(json.dumps(found))
    os._exit(0)  # some peers leave threads behind that would hold the interpreter
