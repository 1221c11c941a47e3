"""Starts a run, runs its step and resumes its hook, with a Kafka client, Avro and MessagePack: no durably here.

    python foreign.py 127.0.0.1:9092 path/to/avro order-7 1250

What it takes, in any language: a producer whose partitioner is that of Kafka's Java client, records in Avro's
single-object encoding (``C3 01``, the CRC-64-AVRO fingerprint of the schema, the body), and their keys.
"""

from __future__ import annotations

import argparse
import io
import json
import secrets
import time
from pathlib import Path
from typing import Any

import fastavro
import msgspec.msgpack
from confluent_kafka import Consumer, Producer
from fastavro.schema import fingerprint, to_parsing_canonical_form

Record = dict[str, Any]


class Schema:
    """One kind of record."""

    def __init__(self, folder: Path, name: str) -> None:
        plain = json.loads((folder / f"{name}.avsc").read_text())
        self._header = b"\xc3\x01" + bytes.fromhex(fingerprint(to_parsing_canonical_form(plain), "CRC-64-AVRO"))
        self._schema = fastavro.parse_schema(plain)

    def encode(self, record: Record) -> bytes:
        out = io.BytesIO()
        out.write(self._header)
        fastavro.schemaless_writer(out, self._schema, record)
        return out.getvalue()

    def decode(self, data: bytes) -> Record:
        header, body = data[:10], data[10:]
        if header != self._header:
            raise ValueError(f"{header.hex()} is the header of another schema than {self._header.hex()}")
        record = fastavro.schemaless_reader(io.BytesIO(body), self._schema, None)
        assert isinstance(record, dict)
        return record


def as_json(value: object) -> Record:
    """A payload: durably takes JSON wherever it takes a value."""
    return {"content_type": "application/json", "data": json.dumps(value).encode()}


def now() -> int:
    return time.time_ns() // 1_000_000


def take(order: str, cents: int) -> Record:
    """What the step does."""
    return {"number": f"receipt for {order}", "cents": cents}


def answer(request: Record) -> Record:
    """Runs the step that a StepRequest asks for; the StepResult, which repeats what says which attempt it was."""
    began = now()
    args, kwargs = msgspec.msgpack.decode(request["input"]["data"])
    try:
        outcome = ("durably.StepSucceeded", {"result": as_json(take(*args, **kwargs))})
    except Exception as e:
        error = {"type": type(e).__name__, "message": str(e)}
        outcome = ("durably.StepFailed", {"error": error, "fatal": False})
    same = {name: request[name] for name in ("run_id", "step_id", "attempt", "fingerprint")}
    return {**same, "outcome": outcome, "started_at": began, "finished_at": now(), "worker": "foreign"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Starts a run, runs its step and resumes its hook.")
    parser.add_argument("bootstrap", help="host:port of a broker")
    parser.add_argument("schemas", type=Path, help="the folder with the .avsc files")
    parser.add_argument("order", help="the order's id")
    parser.add_argument("cents", type=int, help="what it costs")
    parser.add_argument("--namespace", default="durably", help="the prefix of the topics")
    args = parser.parse_args()
    start_run, step_request, step_result, resume_hook = (
        Schema(args.schemas, name) for name in ("StartRun", "StepRequest", "StepResult", "ResumeHook")
    )
    producer = Producer(
        {"bootstrap.servers": args.bootstrap, "partitioner": "murmur2_random", "enable.idempotence": True}
    )
    # A plain consumer group; offsets are committed when the answer is durable, so a crash runs the step again.
    consumer = Consumer(
        {
            "bootstrap.servers": args.bootstrap,
            "group.id": f"{args.namespace}.payments",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
        }
    )
    consumer.subscribe([f"{args.namespace}.requests.payments"])

    def send(topic: str, key: str, value: bytes) -> None:
        producer.produce(f"{args.namespace}.{topic}", key=key.encode(), value=value)
        if producer.flush(30):
            raise TimeoutError(f"no acknowledgement for {key} on {topic} within 30 s")

    run_id, token = f"pay-{args.order}", f"paid-{args.order}"
    start: Record = {
        "run_id": run_id,
        "workflow": "pay",
        "input": as_json({"order": args.order, "cents": args.cents}),
        "requested_at": now(),
        "nonce": secrets.token_urlsafe(16),
    }
    send("commands", run_id, start_run.encode(start))
    while True:
        message = consumer.poll(1.0)
        if message is None:
            continue
        if message.error():
            raise RuntimeError(str(message.error()))
        request = step_request.decode(message.value())
        send("results", request["run_id"], step_result.encode(answer(request)))
        consumer.commit(message)
        if request["run_id"] == run_id:
            break
    # The hook is there, because the workflow created it before it called the step. Its token is its own: so is the key.
    confirm: Record = {
        "token": token,
        "resume_id": f"confirm-{args.order}",
        "payload": as_json("the bank"),
        "requested_at": now(),
    }
    send("commands", token, resume_hook.encode(confirm))
    consumer.close()
    print(f"{run_id} is paid")


if __name__ == "__main__":
    main()
