"""Tests of workflows: a run without broker, processes or waiting, and recorded histories against new code.

`WorkflowEnvironment` is the fixture ``durably_env`` of the pytest plugin; `replay_history` replays what
``durably runs events --json`` has printed; `durably.testing.kafka` runs a real installation.
"""

from durably.testing.environment import EnvironmentRun, EnvironmentStarter, WorkflowEnvironment
from durably.testing.faults import Call
from durably.testing.replayer import replay_history
from durably.testing.stage import RunStuckError

__all__ = ["Call", "EnvironmentRun", "EnvironmentStarter", "RunStuckError", "WorkflowEnvironment", "replay_history"]
