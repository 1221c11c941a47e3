"""Messages over a Unix socket: a length in four bytes, then msgpack."""

from __future__ import annotations

import os
import select
import socket
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

SOCKET = "broker.sock"
MAX_FRAME = 1 << 30
_CHUNK = 1 << 18
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


@contextmanager
def address(folder: Path) -> Iterator[str]:
    """The socket's path, by way of the folder's descriptor: a socket's path may have some 100 bytes only."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)


def connect(folder: Path) -> Channel:
    """Raises `OSError` when nobody listens."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with address(folder) as path:
            peer.connect(path)
    except BaseException:
        peer.close()
        raise
    return Channel(peer)


class Channel:
    """One connection. Sending and receiving may each have their own thread.

    Every method raises `ConnectionError` once the other side is gone.
    """

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._received = bytearray()

    def send(self, messages: Iterable[object]) -> None:
        """Sends messages."""
        out = bytearray()
        for message in messages:
            data = _encode(message)
            out += len(data).to_bytes(4, "big") + data
        try:
            self._peer.sendall(out)
        except OSError as error:
            raise ConnectionError(str(error)) from error

    def receive(self, timeout: float | None = None) -> list[Any]:
        """Waits for a message and takes all that are there; none on timeout."""
        deadline = None if timeout is None else monotonic() + timeout
        while not (messages := self._complete()):
            try:
                if deadline is not None and not self.readable(deadline - monotonic()):
                    return []
                data = self._peer.recv(_CHUNK)
            except (OSError, ValueError) as error:
                raise ConnectionError(str(error)) from error
            if not data:
                raise ConnectionError("closed by the other side")
            self._received += data
        return messages

    def readable(self, timeout: float) -> bool:
        """Waits until there is something to receive."""
        poller = select.poll()
        poller.register(self._peer, select.POLLIN)
        return bool(poller.poll(max(0.0, timeout) * 1000))

    def _complete(self) -> list[Any]:
        messages, at, received = [], 0, self._received
        while len(received) >= at + 4:
            size = int.from_bytes(received[at : at + 4], "big")
            if size > MAX_FRAME:
                raise ConnectionError(f"a frame of {size} bytes")
            if len(received) < at + 4 + size:
                break
            try:
                messages.append(_decode(memoryview(received)[at + 4 : at + 4 + size]))
            except (ValueError, RecursionError) as error:
                raise ConnectionError(f"a frame that is no message: {error}") from error
            at += 4 + size
        del received[:at]
        return messages

    def stop(self) -> None:
        """Ends the conversation, from any thread: whoever waits gets a `ConnectionError`."""
        try:
            self._peer.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        """Lets go of the socket."""
        self._peer.close()
