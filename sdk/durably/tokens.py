"""Tokens of hooks: which the engine makes, which a workflow may choose, and where each is looked after."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from hashlib import blake2b

from durably.errors import ConfigurationError

PREFIX = "hook_"
"""What the engine's own tokens begin with: ``hook_<n>_<secret>.<run ID>``. Neither custom tokens nor run IDs may."""
LONGEST = 1_024
"""Bytes of a custom token."""


def default_token(run_id: str, nonce: str, ordinal: int) -> str:
    """The token of a run's n-th hook: the same at every replay, and not to be guessed without the run's nonce."""
    secret = blake2b(f"{run_id}\0{ordinal}".encode(), key=blake2b(nonce.encode()).digest(), digest_size=16).digest()
    return f"{PREFIX}{ordinal}_{urlsafe_b64encode(secret).decode().rstrip('=')}.{run_id}"


def run_of(token: str) -> str | None:
    """The run whose hook a default token belongs to; None for a custom token, which any run may hold."""
    if not token.startswith(PREFIX):
        return None
    return token.partition(".")[2] or None


def hook_of(token: str) -> str:
    """The id, within its run, of the hook that a default token belongs to; whether it is the hook's is another matter."""
    return PREFIX + token.removeprefix(PREFIX).partition("_")[0]


def routing_key(token: str) -> str:
    """The key of records about a token: the run's ID, else the token itself, whose partition arbitrates it."""
    return run_of(token) or token


def checked_token(token: str) -> str:
    """The same custom token. Raises `ConfigurationError` when no hook may have it, saying why."""
    remedy = f"use 1 to {LONGEST} bytes of printable text, such as a business key"
    if not isinstance(token, str):
        raise ConfigurationError(f"token {token!r:.100} is no text: {remedy}")
    if not 0 < len(token.encode("utf-8", "surrogatepass")) <= LONGEST:
        raise ConfigurationError(f"token {token[:40]!r} has {len(token)} characters: {remedy}")
    if not token.isprintable():
        raise ConfigurationError(f"token {token!r:.100} has unprintable characters: {remedy}")
    if token.startswith(PREFIX):
        raise ConfigurationError(f"token {token!r:.100} begins with {PREFIX!r}, which is reserved: {remedy}")
    return token
