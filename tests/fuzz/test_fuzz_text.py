"""What people write: durations, ids, tokens, arguments of the command line. Understood, or refused with a reason."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import durably.broker
import msgspec
import pytest
from durably import tokens
from durably.cli.app import app
from durably.client import connection
from durably.durations import LONGEST, milliseconds
from durably.errors import ConfigurationError
from durably.identifiers import LONGEST_RUN_ID, checked_run_id
from durably_schemas import Catalogue
from fuzz.budget import budget
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner
from unit.scripted_broker import ScriptedBroker
from unit.scripted_hooks import ScriptedHooks

TEXTS = st.one_of(
    st.text(max_size=20), st.from_regex(r"\A\s*(\d{1,400}(\.\d{0,9})?\s*(ms|s|m|h|d|w|days|hr|x)\s*){0,3}\Z")
)


@budget(400)
@given(
    st.one_of(
        TEXTS, st.floats(), st.integers(), st.timedeltas(), st.datetimes(), st.datetimes(timezones=st.timezones()),
        st.none(), st.binary(max_size=3), st.just(10**5_00), st.just("9" * 100_000), st.just("1s" * 20_000),
    )
)  # fmt: skip
def test_a_duration_is_whole_milliseconds_or_refused(value: Any) -> None:
    try:
        ms = milliseconds(value, now=0)
    except (ValueError, TypeError) as e:
        assert str(e)
        return
    assert type(ms) is int
    assert 0 <= ms <= (LONGEST if not isinstance(value, datetime) else 10 * LONGEST)
    if isinstance(value, timedelta):
        assert ms >= value / timedelta(milliseconds=1) - 1e-3


@budget(300)
@given(st.text(max_size=300))
def test_an_id_and_a_token_are_taken_as_they_are_or_refused(text: str) -> None:
    try:
        assert checked_run_id(text) is text
        assert 0 < len(text.encode()) <= LONGEST_RUN_ID
        assert "|" not in text
    except ConfigurationError as e:
        assert str(e)
    try:
        assert tokens.checked_token(text) is text
        assert tokens.run_of(text) is None
    except ConfigurationError as e:
        assert str(e)
    tokens.hook_of(text)
    assert tokens.routing_key(text) or not text


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
).map(lambda value: msgspec.json.encode(value).decode())  # fmt: skip
WORDS = st.one_of(
    st.text(st.characters(exclude_characters="\0"), max_size=12),
    JSONS,
    st.sampled_from(["--", "-1", "--limit", "--json", "--timeout", "nan", "[" * 3_000, "--delay", "1s", "r1", "--run-id", "a=b", "\udcff"]),
)  # fmt: skip
COMMANDS = st.sampled_from(
    [["start"], ["runs", "show"], ["runs", "list"], ["runs", "cancel"], ["runs", "result"], ["runs", "events"],
     ["hooks", "show"], ["hooks", "resume"], ["hooks", "list"], []]
)  # fmt: skip


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = ScriptedBroker(Catalogue(partitions=3))
    ScriptedHooks(broker).start("r1")
    monkeypatch.setattr(durably.broker, "connect", lambda url, kafka, own: broker)
    monkeypatch.setattr(connection, "_TICK", 0.01)
    monkeypatch.setenv("DURABLY_URL", "kafka://scripted:1")


@pytest.mark.usefixtures("scripted")
@budget(60)
@given(COMMANDS, st.lists(WORDS, max_size=4))
def test_the_command_line_ends_with_a_status_whatever_its_arguments(command: list[str], words: list[str]) -> None:
    found = CliRunner().invoke(app, [*command, *words])
    assert found.exception is None or isinstance(found.exception, SystemExit), (command, words, found.exc_info)
