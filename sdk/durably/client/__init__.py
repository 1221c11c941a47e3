"""The client: starts runs and follows them, from outside of any run."""

from durably.client.client import AsyncClient, AsyncStarter, Client, Starter
from durably.client.default import get_hook_by_token, get_run, options, resume_hook, resume_webhook, start
from durably.client.hooks import HookInfo
from durably.client.run import AsyncRun, Run
from durably.client.stream import StreamInfo

__all__ = [
    "AsyncClient",
    "AsyncRun",
    "AsyncStarter",
    "Client",
    "HookInfo",
    "Run",
    "Starter",
    "StreamInfo",
    "get_hook_by_token",
    "get_run",
    "options",
    "resume_hook",
    "resume_webhook",
    "start",
]
