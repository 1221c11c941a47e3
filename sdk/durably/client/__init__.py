"""The client: starts runs and follows them, from outside of any run."""

from durably.client.client import AsyncClient, AsyncStarter, Client, Starter
from durably.client.default import get_run, start
from durably.client.run import AsyncRun, Run

__all__ = ["AsyncClient", "AsyncRun", "AsyncStarter", "Client", "Run", "Starter", "get_run", "start"]
