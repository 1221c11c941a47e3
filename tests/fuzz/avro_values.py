"""Values of any Avro schema, for hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st


def values(schema: Any, named: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """What fastavro reads for a schema: dictionaries, and (name, dictionary) for records in unions."""
    if isinstance(schema, list):
        branches = [s for s in schema if not (depth > 3 and s != "null" and "null" in schema)]
        return st.one_of([branch(s, named, depth, schema) for s in branches])
    if isinstance(schema, str) and schema in named:
        schema = named[schema]
    kind = schema if isinstance(schema, str) else schema["type"]
    if kind == "record":
        named[f"{schema['namespace']}.{schema['name']}"] = schema
        return st.fixed_dictionaries({f["name"]: values(f["type"], named, depth + 1) for f in schema["fields"]})
    if kind == "enum":
        named[f"{schema['namespace']}.{schema['name']}"] = schema
        return st.sampled_from(schema["symbols"])
    if kind == "array":
        return st.lists(values(schema["items"], named, depth + 1), max_size=2)
    if kind == "map":
        return st.dictionaries(st.text(max_size=5), values(schema["values"], named, depth + 1), max_size=2)
    return {
        "null": st.none(),
        "string": st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        "bytes": st.binary(max_size=20),
        "int": st.integers(-(2**31), 2**31 - 1),
        "long": st.integers(-(2**63), 2**63 - 1),
        "boolean": st.booleans(),
        "double": st.floats(allow_nan=False),
    }[kind]


def branch(schema: Any, named: dict[str, Any], depth: int, union: list[Any]) -> st.SearchStrategy[Any]:
    inner = values(schema, named, depth)
    resolved = named.get(schema, schema) if isinstance(schema, str) else schema
    if isinstance(resolved, dict) and resolved["type"] == "record":
        name = f"{resolved['namespace']}.{resolved['name']}"
        return inner.map(lambda value: (name, value))
    return inner


def plain(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {k: plain(v) for k, v in schema.items() if k not in ("logicalType", "doc")}
    return [plain(s) for s in schema] if isinstance(schema, list) else schema
