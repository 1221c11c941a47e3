"""The checker finds what it is there to find."""

import checker
import pytest
from durably.broker import connect
from durably_schemas import Catalogue, Codec
from durably_schemas import events as ev
from durably_schemas.records import Payload

NOTHING = Payload(content_type="application/json", data=b"null")
CREATED = ev.RunCreated(workflow="w", input=NOTHING)
STEP = ev.StepCreated(
    step="s",
    queue="q",
    input=NOTHING,
    fingerprint="",
    max_retries=0,
    backoff=ev.Backoff(initial_ms=0, factor=1, max_ms=0),
)
DONE = ev.StepCompleted(attempt=1, result=NOTHING)
END = ev.RunCompleted(result=NOTHING)
GOOD = [(1, CREATED, None), (2, STEP, "a"), (3, DONE, "a"), (4, END, None)]


@pytest.mark.parametrize(
    ("log", "finding"),
    [
        (GOOD, None),
        (GOOD[:3], "ends"),
        ([], "ends"),
        ([GOOD[0], GOOD[2], GOOD[3]], "seq"),
        ([GOOD[0], *GOOD], "seq"),
        ([*GOOD, (5, END, None)], "ends"),
        ([*GOOD[:3], (4, DONE, "a"), (5, END, None)], "2 results"),
        ([GOOD[0], (2, DONE, "a"), (3, END, None)], "never created"),
    ],
)
def test_each_violation_is_found(tmp_path, log, finding):
    catalogue = Catalogue("c", 2)
    broker = connect(f"embedded:{tmp_path}/b")
    broker.create(catalogue.topics())
    producer, codec = broker.producer(), Codec()
    for seq, data, correlation_id in log:
        producer.send(
            catalogue.events, codec.encode(ev.event("r", seq, 1, data, correlation_id)), key=b"r", partition=0
        )
    assert producer.flush(5) == 0
    found = checker.violations(broker, catalogue, ["r"])
    producer.close()
    broker.close()
    assert (finding is None and not found) or any(finding in each for each in found)
