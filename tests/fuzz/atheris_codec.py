"""Coverage-guided: the codec's decoders, from a corpus of valid records. ``make fuzz``, or with libFuzzer's own arguments."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["durably_schemas"]):
    from durably_schemas import Codec, CodecError
    from durably_schemas import records as rec
    from durably_schemas.codec import _SHAPES, MARKER, RECORDS, fingerprint_of, schema_of

CODEC = Codec()
HEADERS = [MARKER + fingerprint_of(schema_of(cls.__name__)) for cls in RECORDS]


def one(data: bytes) -> None:
    """The first byte says which record it is to be; what is read must be written in the same way again."""
    if not data:
        return
    try:
        record = CODEC.decode(HEADERS[data[0] % len(HEADERS)] + data[1:])
    except CodecError:
        return
    assert isinstance(record, rec.Record)
    assert CODEC.decode(CODEC.encode(record)) == record or "nan" in repr(record)


if __name__ == "__main__":
    for shape in _SHAPES.values():  # made by exec, which no hook on imports sees
        for name, function in shape.decode.__globals__.items():
            if name.startswith("decode_"):
                atheris.instrument_func(function)
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
