"""``make chaos``: the full form, on a broker of its own. Ends with 1 where anything broke the promise."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import kafka_cluster

from chaos import faults, verdict
from chaos.campaign import campaign


def main() -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="chaos", description=main.__doc__)
    parser.add_argument("--runs", type=int, default=20_000, help="how many runs the load generator starts")
    parser.add_argument("--faults", type=int, default=200, help="how many faults are injected")
    parser.add_argument("--seconds", type=float, default=3_600, help="after which no more faults and runs begin")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the schedule and the load; drawn and printed if not given"
    )
    parser.add_argument(
        "--fault",
        action="append",
        choices=sorted(faults.FAULTS | faults.OF_PROCESSORS),
        help="this one alone; repeatable",
    )
    parser.add_argument("--gap", type=float, default=0.5, help="at least so many seconds between two faults")
    parser.add_argument("--processors", type=int, default=3)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--in-flight", type=int, default=300, help="how many runs are open at once")
    parser.add_argument("--folder", type=Path, default=None, help="for logs and stores; kept")
    parser.add_argument("--plan", action="store_true", help="prints the schedule, and does nothing")
    options = parser.parse_args()
    seed = int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed
    schedule = faults.plan(seed, sorted(options.fault or faults.FAULTS), options.faults, options.gap)
    if options.plan:
        for number, planned in enumerate(schedule, 1):
            say(f"{number:3}  {planned.gap:4.1f} s later  {planned.name}  (seed {planned.seed})")
        return 0
    folder = options.folder or Path(tempfile.mkdtemp(prefix="durably-chaos-"))
    say(f"seed {seed}; logs and stores in {folder}")
    cluster = kafka_cluster.start()
    try:
        report = campaign(
            cluster,
            folder,
            schedule,
            seed=seed,
            runs=options.runs,
            seconds=options.seconds,
            processors=options.processors,
            workers=options.workers,
            in_flight=options.in_flight,
            say=say,
        )
    finally:
        cluster.stop()
    say(f"\nseed {seed}, {time.strftime('%Y-%m-%d')}\n{report}\n")
    report.violations += [
        f"a take-over took {ms} ms, and {verdict.TAKE_OVER_MS} are allowed"
        for ms in report.take_overs
        if ms > verdict.TAKE_OVER_MS
    ]
    for found in report.violations[:100]:
        say(f"VIOLATION  {found}")
    say(f"{len(report.violations)} violations")
    return 1 if report.violations else 0


def say(text: str) -> None:
    """At once, also into a pipe."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
