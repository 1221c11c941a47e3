"""The bench: what it measures is what it says, and what was written once stays readable."""

import asyncio
import json
import re
import sys
from pathlib import Path

import environments
import figures
import history
import measure
import processes
import pytest
import report

PEERS = environments.peers()


class Counting:
    """A system that takes no time, and counts the steps of each run."""

    def __init__(self) -> None:
        self.runs: list[int] = []

    async def run(self, steps: int) -> None:
        self.runs.append(steps)

    def cpu_seconds(self) -> dict[str, float]:
        return {"server": len(self.runs) * 1e-3}

    def check(self) -> None:
        pass


def test_the_work_of_a_measurement_is_the_work_that_its_figures_name() -> None:
    system = Counting()
    size = measure.Size(3, 30, 40, 7, short_runs=25, warm_up=0)
    (step,) = asyncio.run(measure.sequential("g", system, size))
    assert step.what == "sequential step, p50 of 3 runs of 30"
    assert system.runs.count(30) == 3
    system.runs.clear()
    p50, p99 = asyncio.run(measure.short("g", system, size))
    assert (p50.what.endswith(" of 25"), p99.what.endswith(" of 25"), system.runs) == (True, True, [3] * 25)
    system.runs.clear()
    rate, cpu = asyncio.run(measure.throughput("g", system, size))
    assert rate.what == "throughput, 40 runs of 7 steps at once"
    assert system.runs == [7] * 40
    assert cpu.value == pytest.approx(40 * 1e3 / 280)  # a millisecond of CPU a run, in µs a step


def test_who_is_slow_does_less_and_says_so() -> None:
    system = Counting()
    found = asyncio.run(measure.measure("g", system, measure.Size(2, 200, 500, 20, short_runs=200, warm_up=0, limit=0)))
    assert [figure.what.rpartition(" of ")[2] for figure in found[:3]] == ["20", "20", "20"]
    assert found[3].what == f"throughput, {measure.WARM_UP_RUNS} runs of 20 steps at once"


def test_runs_beyond_those_at_once_wait_their_turn() -> None:
    class Slow(Counting):
        now = most = 0

        async def run(self, steps: int) -> None:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0)
            self.now -= 1

    system = Slow()
    size = measure.Size(throughput_runs=40, throughput_steps=7, at_once=5)
    rate, _ = asyncio.run(measure.throughput("g", system, size))
    assert (system.most, rate.what) == (5, "throughput, 40 runs of 7 steps, 5 at once")


def test_every_system_has_every_measure() -> None:
    found = asyncio.run(measure.measure("g", Counting(), measure.Size(warm_up=0)))
    for beginning in figures.MEASURES:
        assert [figure for figure in found if figure.what.startswith(beginning)], beginning


def test_earlier_sessions_stay_readable() -> None:
    sessions = history.read()
    assert len(sessions) == len(history.PATH.read_text().splitlines())
    first = sessions[0]
    assert (first.note, first.systems, first.curves) == ("", {}, [])
    assert first.value("floor", "two hops") == pytest.approx(2.6033, abs=1e-4)
    ratio = report.RATIOS["step on Kafka / two hops (at most 2)"](first)
    assert ratio == pytest.approx(2.139, abs=1e-3)


def test_a_session_reads_back_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "PATH", tmp_path / "history.jsonl")
    session = history.Session(
        conditions={"date": "2026-11-23 14:46 UTC"},
        figures=[figures.Figure("kafka", "sequential step", 1.5, "ms")],
        note="nothing",
        systems={"kafka": figures.System("durably", "1", "none", "")},
        missing={"temporal": "no server binary here"},
        curves=[figures.Curve("kafka", "run", [1.0], [2.0], "events", "µs")],
    )
    history.append(session)
    history.append(session)
    assert history.read() == [session, session]


def test_the_report_says_why_a_system_is_missing() -> None:
    session = history.Session(
        conditions={"date": "today"},
        figures=[
            figures.Figure("kafka", "sequential step, p50 of 1 runs of 1", 4.0, "ms"),
            figures.Figure("kafka", "throughput, 1 runs of 1 steps at once", 250.0, "steps/s"),
            figures.Figure("kafka", "CPU of the broker process, 1 runs", 100.0, "µs/step"),
            figures.Figure("kafka", "CPU of the worker process, 1 runs", 23.0, "µs/step"),
        ],
        systems={"kafka": figures.System("durably on Kafka", "durably 1", "fsync", "Alone.")},
        missing={"temporal": "no server binary here"},
    )
    lines = list(report.readme(session, [session], set()))
    assert "| durably on Kafka | 4.00 ms |  |  | 250 steps/s | 123 µs/step |" in lines
    assert "- **temporal** was not measured: no server binary here" in lines


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peers_packages_are_pinned(peer: environments.Peer) -> None:
    pins = {"dependencies": r"[\w.-]+==\d[\w.]*", "npm": r"@?[\w./-]+@\d[\w.]*", "go": r"[\w./-]+@v\d[\w.]*"}
    for kind, packages in peer.requirements().items():
        assert all(re.fullmatch(pins[kind], package) for package in packages), packages
    assert peer.requirements()["dependencies"]


def test_each_variant_belongs_to_one_peer() -> None:
    variants = [variant for peer in PEERS for variant in peer.variants]
    assert len(variants) == len(set(variants)) >= 6
    assert not {*variants} & {"floor", "kafka", "embedded", figures.SCALE, "length"}


def test_a_peer_that_is_not_installed_says_how_it_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "HOME", tmp_path)
    with pytest.raises(environments.Unavailable, match="make bench-peers"):
        environments.peers()[0].measure("dbos-sqlite", small=True)


def test_what_a_peers_process_says_is_given_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "HOME", tmp_path)
    script = tmp_path / "parrot_peer.py"
    script.write_text(
        '# /// script\n# dependencies = []\n# [tool.bench]\n# variants = ["parrot"]\n# ///\nimport sys, pathlib\n'
        'asked = sys.argv[1]\nif asked == "dead": sys.exit("shot")\n'
        f"pathlib.Path(sys.argv[3]).write_text({json.dumps(json.dumps({'unavailable': 'pining'}))})\n"
    )
    peer = environments.Peer(script)
    monkeypatch.setattr(peer, "_python", Path(sys.executable))
    (tmp_path / "parrot").mkdir()
    monkeypatch.setattr(peer, "_current", lambda: True)
    with pytest.raises(environments.Unavailable, match=r"^pining$"):
        peer.measure("parrot", small=True)
    with pytest.raises(environments.Unavailable, match=r"^ended with 1: shot$"):
        peer.measure("dead", small=True)


def test_a_process_that_ends_by_itself_is_noticed_with_what_it_said(tmp_path: Path) -> None:
    with processes.Processes(tmp_path) as running:
        running.start("server", [sys.executable, "-c", "raise SystemExit('no port')"])
        with pytest.raises(RuntimeError, match="server ended with 1:\nno port"):
            running.wait_until(lambda: False)


def test_the_cpu_time_of_ended_children_counts(tmp_path: Path) -> None:
    parent = (
        "import subprocess, sys, time\n"
        "subprocess.run([sys.executable, '-c', 'import time\\nwhile time.process_time() < 0.3: pass'])\n"
        "print('done', flush=True)\n"
        "time.sleep(60)\n"
    )
    with processes.Processes(tmp_path) as running:
        running.start("server", [sys.executable, "-c", parent])
        running.wait_until(lambda: "done" in running.outputs("server")[0])
        assert running.cpu_seconds()["server"] >= 0.3
