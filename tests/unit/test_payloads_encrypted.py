"""A whole installation that encrypts: nothing of the user's is in clear, and runs are taken over as ever."""

from pathlib import Path

import pytest
from durably import payload_codec, sleep, step, workflow
from durably.errors import RunFailedError
from durably.payload_codec import AesGcm, Gzip
from harness import System

SECRET = "q7Zx2LmW9vTaK4sd"  # nothing that compression would take apart


class CardRefused(Exception):
    def __init__(self, *, card: str) -> None:
        super().__init__(f"card {card} was refused")
        self.card = card


@step
async def card_of(order: str) -> str:
    return f"{SECRET} of {order}"


@step(max_retries=0)
async def charge_card(card: str) -> None:
    raise CardRefused(card=card)


@workflow
async def pays_by_card(order: str) -> str:
    card = await card_of(order)
    await sleep(1)
    await charge_card(card)
    return card


@pytest.fixture
def _restored():
    before = payload_codec.active
    yield
    payload_codec.active = before


def stored(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def run_with_a_take_over(folder: Path, order: str) -> CardRefused:
    system = System(f"embedded:{folder}/broker", "durably", folder)
    try:
        first = system.start_processor("first")
        system.start_worker()
        run = system.client.start(pays_by_card, order)
        while not any(event.type == "wait_created" for event in run.events()):
            pass
        system.stop_processor(first)
        system.start_processor("second")
        with pytest.raises(RunFailedError) as failed:
            run.result(30)
        assert isinstance(failed.value.cause, CardRefused)
        return failed.value.cause
    finally:
        system.close()


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("hidden", [True, False])
def test_runs_replay_and_nothing_is_stored_in_clear(tmp_path, hidden):
    payload_codec.install(*([Gzip(), AesGcm({"a": b"k" * 32}, "a")] if hidden else []))
    order = f"order of {SECRET}"
    assert run_with_a_take_over(tmp_path, order).card == f"{SECRET} of {order}"
    assert (SECRET.encode() in stored(tmp_path)) is not hidden
