"""Every program of examples/patterns prints what it should: each on a `durably dev` of its own, and all on one Kafka."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parents[2] / "examples" / "patterns"
DURABLY = Path(sys.executable).with_name("durably")
AT_ONCE = 3

PRINTED = {
    "agent": """
        user: Where shall I go?
        assistant: 2
        tool: sunny in Lisbon
        tool: failed: no such city
        assistant: 1
        tool: yes
        assistant: yes: Lisbon, because it is sunny in Lisbon""",
    "approval": """
        r1: 4200 cents to ada, approved by grace
        r2: refused by grace""",
    "background": "invoice-ada.pdf sent to ada@example.com",
    "batches": """
        by_item: 5177125 in 250 steps
        by_batch: 5177125 in 5 steps""",
    "business_key": """
        run deliver-7 does it already
        packed > shipped > delivered""",
    "children": """
        book_in_place: ['one [de]', 'two [de]']
        book_of_runs: ['one [de]', 'two [de]']
        book_of_runs: ['not translated: no such language']""",
    "idempotent": """
        receipt for 1250
        2 requests, 1 charge""",
    "parallel": "{'stock': 4.0, 'price': 400.0, 'rating': 4.75}",
    "periodic": """
        report 3, then run reports/from-4
        report 5""",
    "pipeline": "1000 lines, from 'LINE 0' to 'LINE 999'",
    "polling": "done at question 4",
    "progress": """
        1 of 3
        2 of 3
        3 of 3
        the last row was c, and 3 rows are imported""",
    "race": """
        0.01 s: exact quote
        4.5 s: rough quote""",
    "rate_limit": "sunny at attempt 3",
    "saga": """
        failed: no car is left in Lisbon
        called off: hotel for Lisbon
        called off: flight for Lisbon""",
    "sequential": "parcel from shelf-cd-7, paid by receipt-cd-7-1250",
    "webhook": """
        {"thanks for":"thesis.pdf"}
        POST: 90 pages of thesis.pdf""",
}
"""What each program prints, whatever it runs on."""


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def program(name: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, FOLDER / f"{name}.py"],
        env=environment, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("DURABLY_")}


@pytest.fixture(scope="module")
def ended() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """All programs, as they end; a few run at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {name: pool.submit(program, name, clean_environment()) for name in PRINTED}
        yield running
        pool.shutdown(cancel_futures=True)


def test_every_program_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("[!_]*.py")} == PRINTED.keys()


@pytest.mark.parametrize("name", PRINTED)
def test_it_prints_what_it_should(name: str, ended: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    result = ended[name].result()
    assert result.returncode == 0, result.stderr
    assert lines(result.stdout) == lines(PRINTED[name])


@contextlib.contextmanager
def installation(environment: dict[str, str], folder: Path, port: int) -> Iterator[None]:
    """A processor, a worker and a gateway with all programs' workflows, each its own process."""
    subprocess.run([DURABLY, "topics", "create"], env=environment, check=True, timeout=60)
    modules = [str(FOLDER / f"{name}.py") for name in PRINTED]
    commands = {"processor": modules, "worker": modules, "gateway": ["--port", str(port)]}
    processes = {}
    for role, arguments in commands.items():
        with (folder / role).open("wb") as log:
            processes[role] = subprocess.Popen([DURABLY, role, *arguments], env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while missing := [role for role in commands if "ready: " not in (folder / role).read_text()]:
            logs = "\n".join((folder / role).read_text() for role in missing)
            assert time.monotonic() < deadline, f"not ready after a minute: {missing}\n{logs}"
            assert all(processes[role].poll() is None for role in missing), logs
            time.sleep(0.05)
        yield
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait(30)
        for role in commands:
            print(role, (folder / role).read_text(), sep="\n")  # shown when the test fails


@pytest.mark.kafka
@pytest.mark.timeout(240)
def test_all_of_them_print_the_same_on_kafka(kafka: str, namespace: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    environment = clean_environment() | {
        "DURABLY_URL": f"kafka://{kafka}",
        "DURABLY_NAMESPACE": namespace,
        "DURABLY_PARTITIONS": "3",
        "DURABLY_DATA_DIR": str(tmp_path / "data"),
        "DURABLY_GATEWAY_URL": f"http://127.0.0.1:{port}",
    }
    with installation(environment, tmp_path, port), ThreadPoolExecutor(2 * AT_ONCE) as pool:
        results = dict(zip(PRINTED, pool.map(lambda name: program(name, environment), PRINTED), strict=True))
    for name, result in results.items():
        assert result.returncode == 0, f"{name}: {result.stderr}"
        assert lines(result.stdout) == lines(PRINTED[name]), name
