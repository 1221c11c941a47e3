"""Starts one run for each order with nothing but a Kafka client and the Avro schema: no durably in this process.

    python produce_orders.py 127.0.0.1:9092 path/to/avro orders.csv

What any language can do: encode a StartRun in Avro's single-object encoding (``C3 01``, the CRC-64-AVRO fingerprint
of the schema, the body), and send it with the run's id as its key and the partitioner of Kafka's Java client.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import time
from pathlib import Path

import fastavro
from confluent_kafka import KafkaError, Message, Producer
from fastavro.schema import fingerprint, to_parsing_canonical_form


def single_object(schema: dict[str, object], record: dict[str, object]) -> bytes:
    """The record in Avro's single-object encoding."""
    out = io.BytesIO()
    out.write(b"\xc3\x01" + bytes.fromhex(fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO")))
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), record)
    return out.getvalue()


def start_run(row: dict[str, str], prefix: str) -> dict[str, object]:
    """A StartRun for a row; its input is a JSON object, which durably takes for keyword arguments."""
    arguments = {**row, "cds": int(row["cds"])}
    return {
        "run_id": prefix + row["order_id"],
        "workflow": "fulfil",
        "input": {"content_type": "application/json", "data": json.dumps(arguments).encode()},
        "attributes": {"customer": row["customer"]},
        "requested_at": time.time_ns() // 1_000_000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Starts one run for each order.")
    parser.add_argument("bootstrap", help="host:port of a broker")
    parser.add_argument("schemas", type=Path, help="the folder with StartRun.avsc")
    parser.add_argument("orders", type=Path, help="the CSV")
    parser.add_argument("--namespace", default="durably", help="the prefix of the topics")
    parser.add_argument("--prefix", default="", help="put before each order's id to make its run's")
    parser.add_argument("--limit", type=int, default=None, help="the first orders only")
    args = parser.parse_args()

    schema = json.loads((args.schemas / "StartRun.avsc").read_text())
    producer = Producer(
        {"bootstrap.servers": args.bootstrap, "partitioner": "murmur2_random", "enable.idempotence": True}
    )
    failed: list[str] = []

    def acknowledged(error: KafkaError | None, message: Message) -> None:
        if error is not None:
            failed.append(f"{message.key()}: {error}")

    with args.orders.open(newline="") as file:
        rows = list(csv.DictReader(file))[: args.limit]
    for row in rows:
        record = start_run(row, args.prefix)
        producer.produce(
            f"{args.namespace}.commands",
            key=str(record["run_id"]).encode(),
            value=single_object(schema, record),
            on_delivery=acknowledged,
        )
        producer.poll(0)
    if producer.flush(60) or failed:
        sys.exit(f"not acknowledged: {failed or 'no answer from the broker within 60 s'}")
    print(f"{len(rows)} runs asked for")


if __name__ == "__main__":
    main()
