"""Writes what coverage-guided fuzzing begins with: valid records and payloads. ``python -m fuzz.corpus FOLDER``."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from uuid import UUID

import fastavro
from durably import payload_types
from durably_schemas.codec import RECORDS, schema_of
from fastavro.utils import generate_many
from fuzz.avro_values import plain

VALUES = [
    None, [1, -1, 2**70, 0.5, "x", b"y"], {"a": (1, {2}), 3: frozenset([4])}, datetime(2026, 1, 1, tzinfo=UTC),
    [Decimal("1.5"), UUID(int=1), Path("/a")], ValueError("x", 1), {(1, 2): [[]]},
]  # fmt: skip


def write(folder: Path) -> None:
    """One file a record type and a value, each with the byte that says what it is."""
    for name in ("codec", "payloads"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for n, cls in enumerate(RECORDS):
        schema = fastavro.parse_schema(plain(schema_of(cls.__name__)))
        for i, value in enumerate(generate_many(schema, 4)):
            out = BytesIO()
            fastavro.schemaless_writer(out, schema, value)
            (folder / "codec" / f"{cls.__name__}-{i}").write_bytes(bytes([n]) + out.getvalue())
    for n, value in enumerate(VALUES):
        (folder / "payloads" / f"value-{n}").write_bytes(b"\0" + payload_types.write(value))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
