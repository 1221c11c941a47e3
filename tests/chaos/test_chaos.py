"""The short form of ``make chaos``, and proofs that it would find what it is there to find."""

from __future__ import annotations

import kafka_cluster
import pytest

from chaos import faults
from chaos.campaign import SABOTAGED, campaign

SHORT = [
    "sigkill", "sigstop", "broker-kill", "rebalance", "delete-store", "corrupt-store", "bad-records",
    "poison-breaks-the-engine",
]  # fmt: skip
SEED = 20
TRIES = 3
"""A fault finds a processor idle, now and then, and does no harm."""


@pytest.fixture(scope="module")
def cluster():
    try:
        started = kafka_cluster.start()
    except kafka_cluster.Unavailable as error:
        pytest.fail(str(error), pytrace=False)
    yield started
    started.stop()


@pytest.mark.kafka
@pytest.mark.timeout(600)
def test_runs_of_every_shape_survive_mixed_faults(cluster, tmp_path):
    schedule = faults.plan(SEED, SHORT, len(SHORT))
    report = campaign(
        cluster, tmp_path, schedule, seed=SEED, runs=300, seconds=300, processors=2, workers=2, partitions=4, in_flight=60,
        say=print,
    )  # fmt: skip
    print(report)
    assert report.violations == []
    assert len(report.injected) == len(SHORT)


@pytest.mark.kafka
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("fault", "found"), [("sigstop-processor", ": seq ["), ("sigkill-processor", "did not end")])
def test_processors_without_transactions_and_fences_are_found_out(cluster, tmp_path, monkeypatch, fault, found):
    monkeypatch.setattr("chaos.campaign.QUIET", 8.0)  # what is lost will not end
    for attempt in range(TRIES):
        report = campaign(
            cluster, tmp_path / str(attempt), faults.plan(SEED + attempt, [fault], 3), seed=SEED + attempt, runs=0,
            seconds=200, processors=2, workers=1, partitions=4, in_flight=60, at_once=1, workflows=SABOTAGED, say=print,
        )  # fmt: skip
        print(report, *report.violations, sep="\n")
        if any(found in violation for violation in report.violations):
            return
    pytest.fail(f"{3 * TRIES} faults, and no violation says {found!r}")
