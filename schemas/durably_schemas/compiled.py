"""Avro's binary encoding for our own records, compiled from their schemas.

fastavro reads and writes any schema through dictionaries; at 8-15 µs a record that was the largest part of a step.
Here each schema becomes two Python functions that go straight between bytes and records, 3-4 times as fast. The
encoding is that of the Avro 1.12 specification, "Binary Encoding"; the tests hold it to fastavro, byte for byte.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NoReturn

Encode = Callable[[Any, Callable[[Iterable[bytes]], None]], None]
Decode = Callable[[bytes, int], tuple[Any, int]]

DEPTH = 64
"""Levels of records within records of their own kind. What one process can read every other one can, however much of
its stack is taken."""
_FAST = 4096


@lru_cache(4096)  # instants: a batch has the same few again and again
def varint(n: int) -> bytes:
    """A long: zig-zag, then seven bits a byte, lowest first. Raises `OverflowError` beyond 64 bits."""
    if not -(1 << 63) <= n < 1 << 63:
        raise OverflowError(f"{n} does not fit a long")
    z = n << 1 if n >= 0 else (-n << 1) - 1
    out = bytearray()
    while z > 0x7F:
        out.append(z & 0x7F | 0x80)
        z >>= 7
    out.append(z)
    return bytes(out)


def read_long(data: bytes, at: int) -> tuple[int, int]:
    """The long at a place, and the place behind it. Raises `ValueError` for more than 64 bits."""
    z = data[at]
    if z < 0x80:
        return (z >> 1) ^ -(z & 1), at + 1
    try:  # an instant in this century: six bytes, without a loop
        _, b, c, d, e, f = data[at : at + 6]
        if b & c & d & e & 0x80 and f < 0x80:
            z = z & 0x7F | (b & 0x7F) << 7 | (c & 0x7F) << 14 | (d & 0x7F) << 21 | (e & 0x7F) << 28 | f << 35
            return (z >> 1) ^ -(z & 1), at + 6
    except ValueError:  # fewer bytes are left
        pass
    z = shift = 0
    while True:
        byte = data[at]
        at += 1
        z |= (byte & 0x7F) << shift
        shift += 7
        if z >> 64 or shift > 70:
            raise ValueError("a long of more than 64 bits")
        if byte < 0x80:
            return (z >> 1) ^ -(z & 1), at


def _bad(what: str) -> NoReturn:
    raise ValueError(what)


def _refers(schema: Any, full_name: str) -> bool:
    """Whether a named type is meant somewhere in a schema."""
    if isinstance(schema, dict):
        return any(_refers(part, full_name) for part in schema.values())
    return any(_refers(part, full_name) for part in schema) if isinstance(schema, list) else schema == full_name


_SMALL = [varint(n) for n in range(_FAST)]
_DOUBLE = struct.Struct("<d")


class _Writer:
    """Source code, indented. Pieces of output that follow one another are handed over by one call."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._pieces: list[str] = []
        self._depth = 0
        self._temporaries = 0

    def line(self, depth: int, text: str) -> None:
        self.flush()
        self.lines.append("    " * depth + text)

    def piece(self, depth: int, expression: str) -> None:
        if depth != self._depth:
            self.flush()
            self._depth = depth
        self._pieces.append(expression)

    def flush(self) -> None:
        if self._pieces:
            self.lines.append("    " * self._depth + f"out(({', '.join(self._pieces)},))")
            self._pieces.clear()

    def temporary(self) -> str:
        self._temporaries += 1
        return f"t{self._temporaries}"


class Compiler:
    """Compiles record schemas; the named types that they define are compiled once each.

    Args:
        class_of: the record class for a full name.
    """

    def __init__(self, class_of: Callable[[str], type]) -> None:
        self._class_of = class_of
        self._types: dict[str, dict[str, Any]] = {}
        self._names: dict[str, Any] = {
            "SMALL": _SMALL, "varint": varint, "long": read_long, "bad": _bad,
            "pack": _DOUBLE.pack, "unpack": _DOUBLE.unpack_from,
        }  # fmt: skip
        self._done: set[str] = set()

    def compile(self, schema: dict[str, Any]) -> tuple[Encode, Decode]:
        """(encode, handing over piece by piece; decode, from a place) for a record's schema."""
        name = self._define(schema)
        return self._names[f"encode_{name}"], self._names[f"decode_{name}"]

    def _define(self, schema: dict[str, Any]) -> str:
        full_name = f"{schema['namespace']}.{schema['name']}"
        name = full_name.replace(".", "_")
        if name in self._done:
            return name
        self._done.add(name)  # before its fields: a record may refer to itself
        self._types[full_name] = schema
        self._names[f"class_{name}"] = self._class_of(full_name)
        encode, decode = _Writer(), _Writer()
        encode.line(0, f"def encode_{name}(r, out, depth=0):")
        decode.line(0, f"def decode_{name}(b, p, depth=0):")
        for function in (encode, decode) if _refers(schema["fields"], full_name) else ():
            function.line(1, f"if depth > {DEPTH}: bad('nested deeper than {DEPTH} levels')")
        for field in schema["fields"]:
            self._encode(encode, 1, field["type"], f"r.{field['name']}")
            self._decode(decode, 1, field["type"], f"v_{field['name']}")
        if not schema["fields"]:
            encode.line(1, "pass")
        encode.flush()
        arguments = ", ".join(f"{f['name']}=v_{f['name']}" for f in schema["fields"])
        decode.line(1, f"return class_{name}({arguments}), p")
        source = "\n".join([*encode.lines, *decode.lines])
        exec(compile(source, f"<avro {full_name}>", "exec"), self._names)  # noqa: S102 - source made here, from our own schemas
        return name

    def _resolve(self, schema: Any) -> Any:
        return self._types.get(schema, schema) if isinstance(schema, str) else schema

    # -- encoding --------------------------------------------------------------------------------------------------

    def _encode(self, w: _Writer, depth: int, schema: Any, value: str) -> None:
        schema = self._resolve(schema)
        if isinstance(schema, list):
            self._encode_union(w, depth, schema, value)
            return
        kind = schema if isinstance(schema, str) else schema["type"]
        if kind in ("string", "bytes"):
            data = f"{value}.encode()" if kind == "string" else value
            w.piece(depth, f"SMALL[n] if (n := len(t := {data})) < {_FAST} else varint(n), t")
        elif kind in ("int", "long"):
            w.piece(depth, f"SMALL[n] if 0 <= (n := {value}) < {_FAST} else varint(n)")
        elif kind == "boolean":
            w.piece(depth, f"b'\\x01' if {value} else b'\\x00'")
        elif kind == "double":
            w.piece(depth, f"pack({value})")
        elif kind == "enum":
            table = self._table("symbols", {s: varint(i) for i, s in enumerate(schema["symbols"])})
            w.piece(depth, f"{table}[{value}]")
        elif kind == "record":
            w.line(depth, f"encode_{self._define(schema)}({value}, out, depth + 1)")
        elif kind == "array":
            item = w.temporary()
            self._encode_block(w, depth, value, f"for {item} in {value}:", [(schema["items"], item)])
        elif kind == "map":
            key, item = w.temporary(), w.temporary()
            pairs = [("string", key), (schema["values"], item)]
            self._encode_block(w, depth, value, f"for {key}, {item} in {value}.items():", pairs)
        else:
            raise TypeError(f"no code for {kind}")

    def _encode_block(self, w: _Writer, depth: int, value: str, loop: str, items: list[tuple[Any, str]]) -> None:
        w.line(depth, f"if {value}:")
        w.piece(depth + 1, f"varint(len({value}))")
        w.line(depth + 1, loop)
        for schema, item in items:
            self._encode(w, depth + 2, schema, item)
        w.piece(depth, "b'\\x00'")

    def _encode_union(self, w: _Writer, depth: int, branches: list[Any], value: str) -> None:
        if branches[0] == "null" and len(branches) == 2:
            t = w.temporary()
            w.line(depth, f"{t} = {value}")
            w.line(depth, f"if {t} is None:")
            w.piece(depth + 1, "b'\\x00'")
            w.line(depth, "else:")
            w.piece(depth + 1, "b'\\x02'")
            self._encode(w, depth + 1, branches[1], t)
            return
        names = [self._define(self._resolve(branch)) for branch in branches]
        table = self._table(
            "branches",
            {self._names[f"class_{n}"]: (varint(i), self._names[f"encode_{n}"]) for i, n in enumerate(names)},
        )
        t = w.temporary()
        w.line(depth, f"{t} = {value}")
        w.line(depth, f"index, encode = {table}[type({t})]")
        w.piece(depth, "index")
        w.line(depth, f"encode({t}, out)")

    # -- decoding --------------------------------------------------------------------------------------------------

    def _decode(self, w: _Writer, depth: int, schema: Any, into: str) -> None:
        schema = self._resolve(schema)
        if isinstance(schema, list):
            self._decode_union(w, depth, schema, into)
            return
        kind = schema if isinstance(schema, str) else schema["type"]
        if kind in ("string", "bytes"):
            self._decode_index(w, depth)
            decoded = f"b[p:p + n]{'.decode()' if kind == 'string' else ''}"
            w.line(depth, f"{into} = {decoded}")
            w.line(depth, "p += n")
        elif kind in ("int", "long"):
            w.line(depth, f"{into}, p = long(b, p)")
        elif kind == "boolean":
            w.line(depth, "n = b[p]")
            w.line(depth, "if n > 1: bad('a boolean that is neither')")
            w.line(depth, f"{into} = n == 1")
            w.line(depth, "p += 1")
        elif kind == "double":
            w.line(depth, f"{into} = unpack(b, p)[0]")
            w.line(depth, "p += 8")
        elif kind == "enum":
            self._decode_index(w, depth)
            w.line(depth, f"{into} = {self._table('symbols', tuple(schema['symbols']))}[n]")
        elif kind == "record":
            w.line(depth, f"{into}, p = decode_{self._define(schema)}(b, p, depth + 1)")
        elif kind == "array":
            items, item = w.temporary(), w.temporary()
            w.line(depth, f"{items} = []")
            self._decode_block(w, depth, [(schema["items"], item)], f"{items}.append({item})")
            w.line(depth, f"{into} = tuple({items})")
        elif kind == "map":
            key, item = w.temporary(), w.temporary()
            w.line(depth, f"{into} = {{}}")
            self._decode_block(w, depth, [("string", key), (schema["values"], item)], f"{into}[{key}] = {item}")
        else:
            raise TypeError(f"no code for {kind}")

    def _decode_index(self, w: _Writer, depth: int) -> None:
        """``n`` becomes a length or an index: one byte nearly always, and never negative."""
        w.line(depth, "n = b[p]")
        w.line(depth, "if n < 0x80:")
        w.line(depth + 1, "p += 1")
        w.line(depth + 1, "n = n >> 1 if not n & 1 else bad('a negative length or index')")
        w.line(depth, "else:")
        w.line(depth + 1, "n, p = long(b, p)")
        w.line(depth + 1, "if n < 0 or n > len(b): bad('a length beyond the end')")

    def _decode_block(self, w: _Writer, depth: int, items: list[tuple[Any, str]], take: str) -> None:
        count = w.temporary()
        w.line(depth, "while True:")
        w.line(depth + 1, f"{count}, p = long(b, p)")
        w.line(depth + 1, f"if not {count}: break")
        w.line(depth + 1, f"if {count} < 0:")  # a block that also gives its size in bytes
        w.line(depth + 2, f"{count} = -{count}")
        w.line(depth + 2, "_, p = long(b, p)")
        w.line(depth + 1, f"if {count} > len(b): bad('more items than bytes')")
        w.line(depth + 1, f"for _ in range({count}):")
        for schema, item in items:
            self._decode(w, depth + 2, schema, item)
        w.line(depth + 2, take)

    def _decode_union(self, w: _Writer, depth: int, branches: list[Any], into: str) -> None:
        if branches[0] == "null" and len(branches) == 2:
            w.line(depth, "n = b[p]")
            w.line(depth, "p += 1")
            w.line(depth, "if n == 0:")
            w.line(depth + 1, f"{into} = None")
            w.line(depth, "elif n == 2:")
            self._decode(w, depth + 1, branches[1], into)
            w.line(depth, "else: bad('an index beyond the union')")
            return
        names = [self._define(self._resolve(branch)) for branch in branches]
        table = self._table("branches", tuple(self._names[f"decode_{n}"] for n in names))
        self._decode_index(w, depth)
        w.line(depth, f"{into}, p = {table}[n](b, p)")

    def _table(self, kind: str, table: Any) -> str:
        name = f"{kind}_{len(self._names)}"
        self._names[name] = table
        return name
