"""Workers: take step-requests from queues, run the steps, and reply on the results topic."""

from durably.worker.clock import Clock, SystemClock
from durably.worker.worker import Worker

__all__ = ["Clock", "SystemClock", "Worker"]
