"""A process that knows only Kafka and the Avro schemas starts runs, and they come out right."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import durably
import pytest
from foreign import FOREIGN, environment_of

ORDERS = Path(__file__).parents[2] / "examples" / "orders"
DURABLY = Path(sys.executable).parent / "durably"


@pytest.fixture
def installation(kafka: str, namespace: str, tmp_path: Path) -> Iterator[str]:
    """A processor and a worker on Kafka, each its own process."""
    environment = environment_of(kafka, namespace, tmp_path / "data")
    subprocess.run([DURABLY, "topics", "create"], env=environment, check=True)
    processes = []
    for role in ("processor", "worker"):
        with (tmp_path / f"{role}.log").open("wb") as log:
            processes.append(
                subprocess.Popen([DURABLY, role, str(ORDERS / "workflows.py")], env=environment, stdout=log, stderr=log)
            )
    yield environment["DURABLY_URL"]
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    for log in tmp_path.glob("*.log"):
        print(log.name, log.read_text(), sep="\n")  # shown when the test fails


@pytest.mark.kafka
def test_runs_started_without_durably_come_out_right(installation: str, kafka: str, namespace: str) -> None:
    producer = subprocess.run(
        [
            sys.executable, "-c", FOREIGN, ORDERS / "produce_orders.py", kafka,
            str(files("durably_schemas") / "avro"), ORDERS / "orders.csv",
            "--namespace", namespace, "--prefix", "foreign-", "--limit", "3",
        ],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert producer.returncode == 0, producer.stderr
    with durably.Client(installation, namespace=namespace) as client:
        results = [client.get_run(f"foreign-order-000{n}").result(timeout=60) for n in (1, 2, 3)]
    # Rows 1 to 3 of the CSV: one customer's first three orders, 29.33, 29.73 and 14.96 dollars; 8 % tax on each, and
    # 5 % off the third.
    assert [r["order_id"] for r in results] == ["order-0001", "order-0002", "order-0003"]
    assert [(r["net"], r["tax"], r["discount"]) for r in results] == [(2933, 235, 0), (2973, 238, 0), (1496, 120, 81)]
    assert [r["charged"] for r in results] == [3168, 3211, 1535]
