"""The short form of ``make chaos``, and proofs that it would find what it is there to find."""

from __future__ import annotations

import kafka_cluster
import pytest

from chaos import faults
from chaos.campaign import BROKER, SABOTAGED, campaign

SHORT = [
    "sigkill", "sigstop", "broker-kill", "rebalance", "delete-store", "corrupt-store", "bad-records",
    "poison-breaks-the-engine",
]  # fmt: skip
SEED = 20


@pytest.fixture(scope="module")
def cluster():
    try:
        started = kafka_cluster.start(BROKER)
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
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("sabotage", "fault", "count"), [("unfenced", "sigstop-processor", 6), ("plain", "sigkill-processor", 8)]
)
def test_the_checker_finds_processors_that_are_not_fenced_or_not_transactional(
    cluster, tmp_path, monkeypatch, sabotage, fault, count
):
    monkeypatch.setattr("chaos.campaign.QUIET", 15.0)  # what is lost will not end
    report = campaign(
        cluster, tmp_path, faults.plan(SEED, [fault], count), seed=SEED, runs=300, seconds=300, processors=2, workers=1,
        partitions=4, in_flight=100, at_once=1, workflows=SABOTAGED, environment={"CHAOS_SABOTAGE": sabotage},
        say=print,
    )  # fmt: skip
    print(report, *report.violations[:20], sep="\n")
    about_logs = [v for v in report.violations if "no fault about" not in v]
    assert about_logs
