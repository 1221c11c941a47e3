"""What each peer needs, in an environment of its own below ``bench/.peers``: ``make bench-peers`` installs all of it.

A peer's module states its requirements as inline script metadata (PEP 723), with versions:

    dependencies         Python packages, from pip
    tool.bench.npm       packages from npm, where it is here
    tool.bench.go        programs from Go's module proxy, where Go is here; optional
    tool.bench.variants  the ways in which the peer is measured
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from figures import Figure, System

BENCH = Path(__file__).parent
HOME = BENCH / ".peers"
METADATA = re.compile(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$")  # the expression of PEP 723
PATIENCE = 240  # seconds for one variant; all of them together have less than eight minutes
INSTALLATION = 900  # seconds for one command


class Unavailable(Exception):
    """A peer cannot be installed or measured here; the message says why."""


class Found(msgspec.Struct):
    """What the process of a peer writes: a system with its figures, or why there are none."""

    system: System | None = None
    figures: list[Figure] = []
    unavailable: str = ""


class Peer:
    """One of the systems that durably is compared with.

    Args:
        script: its module, which runs in its own environment.
    """

    def __init__(self, script: Path) -> None:
        self.name = script.stem.removesuffix("_peer")
        self._script = script
        self._home = HOME / self.name
        self._python = self._home / "venv" / "bin" / "python"
        self._stamp = self._home / "installed"

    @cached_property
    def _metadata(self) -> dict[str, Any]:
        found = METADATA.search(self._script.read_text())
        if found is None:
            raise ValueError(f"{self._script} lacks the script metadata of PEP 723")
        return tomllib.loads("".join(line[2:] or "\n" for line in found["content"].splitlines(keepends=True)))

    @property
    def variants(self) -> list[str]:
        """The groups of its figures."""
        return list(self._metadata["tool"]["bench"]["variants"])

    def requirements(self) -> dict[str, list[str]]:
        """What it needs, with versions, by where that comes from: ``dependencies`` (pip), ``npm``, ``go``."""
        tools = self._metadata["tool"]["bench"]
        return {"dependencies": self._metadata["dependencies"], "npm": tools.get("npm", []), "go": tools.get("go", [])}

    @property
    def _wanted(self) -> str:
        return hashlib.sha256(json.dumps(self._metadata, sort_keys=True).encode()).hexdigest()

    def _current(self) -> bool:
        return self._stamp.exists() and self._stamp.read_text() == self._wanted

    def install(self) -> None:
        """Leaves alone what is there in the versions that are wanted.

        Raises:
            Unavailable: pip, npm or go failed.
        """
        wanted = self.requirements()
        if not self._current():
            shutil.rmtree(self._home, ignore_errors=True)
            self._home.mkdir(parents=True)
            self._command(sys.executable, "-m", "venv", self._home / "venv")
            self._command(self._python, "-m", "pip", "install", "--quiet", *wanted["dependencies"])
            if packages := wanted["npm"]:
                # None of the packages needs its install scripts; one of them reports to its makers.
                options = ("--no-audit", "--no-fund", "--ignore-scripts")
                self._command("npm", "install", "--prefix", self._home, *options, *packages)
            self._stamp.write_text(self._wanted)
        if shutil.which("go") and not (self._home / "bin").exists():
            for program in wanted["go"]:
                self._command("go", "install", program, GOBIN=str(self._home / "bin"))

    def _command(self, *command: str | Path, **environment: str) -> None:
        try:
            done = subprocess.run(
                command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=INSTALLATION
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(str(error)) from error
        if done.returncode:
            raise Unavailable(f"{Path(command[0]).name} {command[1]}: {_last_line(done.stderr)}")

    def measure(self, variant: str, small: bool) -> tuple[System, list[Figure]]:
        """Measures one variant, in a process in the peer's own environment.

        Raises:
            Unavailable: it is not installed, lacks something, failed, or took too long.
        """
        if not self._current():
            raise Unavailable("not installed in this version: make bench-peers")
        with tempfile.TemporaryDirectory(prefix="bench-peer-") as folder:
            # What it leaves behind when it is killed goes with this folder. Readable: PostgreSQL does not run as root.
            Path(folder).chmod(0o755)
            out = Path(folder) / "found.json"
            command = [self._python, self._script, variant, "--out", out, *(["--small"] if small else [])]
            # In a session of its own, so that what it has started can be ended with it.
            process = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": str(BENCH), "TMPDIR": folder},
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            try:
                _, said = process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired as error:
                raise Unavailable(f"not done within {PATIENCE} s") from error
            finally:
                _end_session(process)
            if not out.exists():
                raise Unavailable(f"ended with {process.returncode}: {_last_line(said)}")
            found = msgspec.json.decode(out.read_bytes(), type=Found)
        if found.system is None:
            raise Unavailable(found.unavailable)
        return found.system, found.figures


def _end_session(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait()


def _last_line(said: str) -> str:
    return next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "without a word")


def peers() -> list[Peer]:
    """All of them, by name."""
    return [Peer(script) for script in sorted((BENCH / "peers").glob("*_peer.py"))]


def main(only: Annotated[list[str] | None, typer.Argument(help="Names of peers; all by default.")] = None) -> None:
    """Installs the peers, and says which could not be."""
    for peer in peers():
        if only and peer.name not in only:
            continue
        try:
            peer.install()
        except Unavailable as reason:
            print(f"{peer.name}: cannot be installed here: {reason}")
        else:
            print(f"{peer.name}: installed")


if __name__ == "__main__":
    typer.run(main)
