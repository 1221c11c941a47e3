"""What is done to payloads before they leave the process: compression, encryption, or whatever a codec of the user's does.

The codecs of a process are a chain: `install`, or ``DURABLY_PAYLOAD_CODEC="module:object,module:object"``. A payload says
which of them it went through (``application/msgpack;codec=gzip,aes-gcm``), so that what was written before there were
codecs, or under other ones, stays readable.
"""

from __future__ import annotations

import os
import re
import zlib
from hashlib import blake2b
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from durably_schemas.records import Payload

from durably.errors import ConfigurationError, PayloadCodecError, SerializationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

SETTING = "DURABLY_PAYLOAD_CODEC"
LARGEST = 16 * 1024 * 1024
"""Bytes that a payload may have when it is decompressed: more is refused before it is there, and not compressed either."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class PayloadCodec(Protocol):
    """One transformation of payloads.

    A codec that encrypts also has ``hides = True``: the messages and tracebacks of exceptions then travel encoded as
    well. And it has a ``fingerprint_key``, 16 to 64 secret bytes that never change, from which the fingerprints of
    steps are made. One that has ``binds = True`` is given, as a second argument to both methods, the content type of the
    data that it encodes, as bytes: so that they cannot be passed off as data of another.
    """

    @property
    def name(self) -> str:
        """What payloads call it: lower-case letters, digits, ``.``, ``_`` and ``-``."""

    def encode(self, data: bytes) -> bytes:
        """The data as they are to travel. The same object again means: not worth it, leave them as they are."""

    def decode(self, data: bytes) -> bytes:
        """What was given to `encode`. Raises whatever says best why it cannot be had."""


class Gzip:
    """Compresses payloads of more than ``above`` bytes, where that makes them smaller. Every process can read them."""

    name = "gzip"

    def __init__(self, level: int = 6, above: int = 1024) -> None:
        self._level = level
        self._above = above

    def encode(self, data: bytes) -> bytes:
        """The data compressed, or as they are. Raises `SerializationError` where they are larger than `LARGEST`."""
        if len(data) <= self._above:
            return data
        if len(data) > LARGEST:  # a decompressor would refuse them
            raise SerializationError(
                f"{len(data):,} bytes are more than the {LARGEST:,} that a payload may have: keep large data elsewhere, and "
                f"pass a reference"
            )
        smaller = zlib.compress(data, self._level, wbits=31)
        return smaller if len(smaller) < len(data) else data

    def decode(self, data: bytes) -> bytes:
        """The data decompressed. Raises `SerializationError` where they are damaged, or larger than `LARGEST`."""
        reader = zlib.decompressobj(wbits=31)
        out = reader.decompress(data, LARGEST)
        if reader.unconsumed_tail or reader.unused_data or not reader.eof:
            raise SerializationError(
                f"compressed data are cut off, followed by others, or larger than {LARGEST:,} bytes decompressed"
            )
        return out


class AesGcm:
    """Encrypts payloads with AES-256-GCM; needs the package ``cryptography`` (``pip install 'durably[crypto]'``).

    To change keys: give the new one to every process, in ``keys``; then make it ``current`` everywhere; keep the old one
    until no payload is left that was written with it. Each payload is encrypted under a key of its own, derived from
    one in ``keys`` by 12 random bytes, so that one key serves for any number of them.

    Args:
        keys: 32 bytes each, by a name that payloads carry in clear.
        current: the one to encrypt with; None: only decrypt.
        fingerprint_key: 16 to 64 bytes that stay the same for good; by default the key, as long as there is one only.

    Raises:
        ConfigurationError: a key of another length, an unknown ``current``, a second key without ``fingerprint_key``, or
            no ``cryptography``.
    """

    name = "aes-gcm"
    binds = True

    def __init__(self, keys: Mapping[str, bytes], current: str | None, *, fingerprint_key: bytes | None = None) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as e:
            raise ConfigurationError(
                "AesGcm needs the package cryptography: install it, or durably as durably[crypto]"
            ) from e
        self._cipher, self._mismatch = AESGCM, InvalidTag
        self._keys = {key_id: _checked_key(key_id, key) for key_id, key in keys.items()}
        if current is not None and current not in self._keys:
            raise ConfigurationError(f"AesGcm: current={current!r} is none of the keys {_listed(self._keys)}")
        if fingerprint_key is None:
            if len(self._keys) != 1:
                raise ConfigurationError(
                    f"AesGcm has {len(self._keys)} keys and no fingerprint_key: give the one that it had when there was "
                    f"one key only, which was that key, and never change it, or open runs no longer know their steps"
                )
            (fingerprint_key,) = self._keys.values()
        self._current = current
        self.hides = current is not None
        self.fingerprint_key = fingerprint_key
        # Not os.urandom for each payload: in workflow code that would draw from the run's own, repeatable randomness.
        self._seed = os.urandom(32)
        self._count = count()

    def encode(self, data: bytes, content_type: bytes = b"") -> bytes:
        """A header (length and name of the key, 24 bytes of salt), the encrypted data, and 16 bytes that authenticate all.

        Args:
            data: what is to be encrypted.
            content_type: what is authenticated with them: theirs, with the codecs that they went through before.
        """
        if self._current is None:
            return data
        # The data count as well: a copy of this process, which counts alike, salts alike only what is alike.
        salt = blake2b(next(self._count).to_bytes(8, "big") + data, key=self._seed, digest_size=24).digest()
        key_id = self._current.encode()
        header = bytes([len(key_id)]) + key_id + salt
        return header + self._cipher(self._derived(self._current, salt)).encrypt(salt[12:], data, header + content_type)

    def decode(self, data: bytes, content_type: bytes = b"") -> bytes:
        """The data decrypted, which had this content type. Raises `SerializationError`, naming the key, where it is not here or does not fit."""
        end = 1 + data[0] + 24 if data else 0
        if len(data) < end + 16 or not data:
            raise SerializationError(f"encrypted data are cut off: {len(data)} bytes")
        key_id, salt = data[1 : end - 24].decode("utf-8", "replace"), data[end - 24 : end]
        if key_id not in self._keys:
            raise SerializationError(
                f"encrypted with key {key_id!r}, which this process does not have: it has {_listed(self._keys)}; add it"
            )
        try:
            return self._cipher(self._derived(key_id, salt)).decrypt(salt[12:], data[end:], data[:end] + content_type)
        except self._mismatch as e:
            raise SerializationError(
                f"encrypted with key {key_id!r}, but altered since, they or their content type, or another key has that name "
                f"here"
            ) from e

    def _derived(self, key_id: str, salt: bytes) -> bytes:
        return blake2b(salt[:12], key=self._keys[key_id], digest_size=32, person=b"durably-aes-gcm").digest()

    def __repr__(self) -> str:
        return f"<AesGcm keys {_listed(self._keys)}, current {self._current}>"


class Chain:
    """Codecs, applied in order. Made by `install`."""

    def __init__(self, codecs: Iterable[PayloadCodec]) -> None:
        self.codecs: dict[str, PayloadCodec] = {}
        for codec in codecs:
            _check(codec)
            if codec.name in self.codecs:
                raise ConfigurationError(f"two payload codecs are named {codec.name!r}: install one of them")
            self.codecs[codec.name] = codec

    def hides(self) -> bool:
        """Whether what is encoded cannot be read without a key."""
        return any(getattr(codec, "hides", False) for codec in self.codecs.values())

    def encode(self, payload: Payload) -> Payload:
        """The payload, encoded, and saying by what. Raises `SerializationError` where a codec fails."""
        if _split(payload.content_type)[1]:
            return payload
        data = payload.data
        applied: list[str] = []
        for name, codec in self.codecs.items():
            try:
                encoded = _bound(codec, codec.encode, payload.content_type, applied)(data)
            except SerializationError as e:
                raise SerializationError(f"payload codec {name!r} cannot encode: {e}") from e
            except Exception as e:  # a user's
                raise SerializationError(f"payload codec {name!r} cannot encode: {type(e).__name__}: {e}") from e
            if encoded is not data:
                applied.append(name)
                data = encoded
        if not applied:
            return payload
        return Payload(content_type=f"{payload.content_type};codec={','.join(applied)}", data=data)


class _Environment(Chain):
    """What is active before anything was installed: it looks at the setting when it is first needed."""

    def __init__(self) -> None:
        super().__init__(())

    def hides(self) -> bool:
        chain = installed()
        return chain is not None and chain.hides()

    def encode(self, payload: Payload) -> Payload:
        chain = installed()
        return payload if chain is None else chain.encode(payload)


active: Chain | None = _Environment()
"""The codecs of this process; None where there are none."""
_ALWAYS: dict[str, PayloadCodec] = {Gzip.name: Gzip()}


def install(*codecs: PayloadCodec) -> None:
    """Sets the codecs of this process, in the order in which they are applied; none: payloads stay as they are.

    Stands before the setting ``DURABLY_PAYLOAD_CODEC``. Call it before the first payload is written.

    Raises:
        ConfigurationError: something is no codec, or two have one name.
    """
    global active  # noqa: PLW0603 - it is the process's
    active = Chain(codecs) if codecs else None


def installed() -> Chain | None:
    """The codecs of this process, from the setting where nothing was installed. For a process to call as it starts.

    Raises:
        ConfigurationError: the setting is at fault.
    """
    if isinstance(active, _Environment):
        install(*from_setting(os.environ.get(SETTING, "")))
    return active


def from_setting(setting: str) -> list[PayloadCodec]:
    """The codecs that a setting names: ``module:object[,module:object]``. An object that is a class is called.

    Raises:
        ConfigurationError: a module cannot be imported, or has no such object.
    """
    from durably.authoring import load_object

    example = "durably.payload_codec:Gzip"
    specs = filter(None, (part.strip() for part in setting.split(",")))
    return [load_object(spec, SETTING, example) for spec in specs]


def decode(payload: Payload) -> Payload:
    """The payload as it was before any codec.

    Raises:
        PayloadCodecError: a codec that it names is not here, or fails.
    """
    content_type, names = _split(payload.content_type)
    if not names:
        return payload
    if len(names) != len(set(names)):  # by which a few bytes would keep a process at work for as long as they like
        raise PayloadCodecError(f"the payload says that it went through a codec twice: {', '.join(names)[:200]}")
    known = _known()
    data = payload.data
    for n, name in reversed([*enumerate(names)]):
        codec = known.get(name)
        if codec is None:
            raise PayloadCodecError(
                f"the payload went through codec {name!r}, which this process does not have: name it in {SETTING}, or "
                f"call durably.payload_codec.install()"
            )
        try:
            data = _bound(codec, codec.decode, content_type, names[:n])(data)
        except SerializationError as e:
            raise PayloadCodecError(f"the payload cannot be decoded by codec {name!r}: {e}") from e
        except Exception as e:  # a user's, and bytes from anywhere
            raise PayloadCodecError(f"the payload cannot be decoded by codec {name!r}: {type(e).__name__}: {e}") from e
    return Payload(content_type=content_type, data=data)


def fingerprint_key(like: Payload | None) -> bytes:
    """The key for fingerprints in a run with this input, or, for None, in this process; empty where nothing is hidden."""
    names = list(_known()) if like is None else _split(like.content_type)[1]
    for name in names:
        codec = _known().get(name)
        key: bytes = getattr(codec, "fingerprint_key", b"")
        if key and (like is not None or getattr(codec, "hides", False)):
            return blake2b(b"durably fingerprints", key=key, digest_size=32).digest()
    return b""


def _bound(
    codec: PayloadCodec, method: Callable[..., bytes], content_type: str, before: list[str]
) -> Callable[[bytes], bytes]:
    """The method of a codec, given the content type where it binds that, after the codecs that were applied before."""
    if not getattr(codec, "binds", False):
        return method
    return lambda data: method(data, ";codec=".join(filter(None, (content_type, ",".join(before)))).encode())


def _known() -> dict[str, PayloadCodec]:
    chain = installed()
    return _ALWAYS if chain is None else {**_ALWAYS, **chain.codecs}


def _split(content_type: str) -> tuple[str, list[str]]:
    """The media type without its codecs, and these, in the order in which they were applied."""
    if "codec=" not in content_type:
        return content_type, []
    kept, names = [], []
    for part in content_type.split(";"):
        parameter, _, value = part.strip().partition("=")
        if parameter == "codec":
            names += value.split(",")
        else:
            kept.append(part)
    return ";".join(kept), names


def _check(codec: Any) -> None:
    name = getattr(codec, "name", None)
    if not isinstance(name, str) or not all(callable(getattr(codec, do, None)) for do in ("encode", "decode")):
        raise ConfigurationError(f"{codec!r:.100} is no payload codec: it needs name, encode(data) and decode(data)")
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"payload codec {name!r}: its name must be of lower-case letters, digits, '.', '_', '-'"
        )
    key = getattr(codec, "fingerprint_key", b"")
    if getattr(codec, "hides", False) and not key:
        raise ConfigurationError(f"payload codec {name!r} hides data, and has no fingerprint_key: give it one")
    if key and not (isinstance(key, bytes) and 16 <= len(key) <= 64):
        raise ConfigurationError(f"payload codec {name!r}: its fingerprint_key must have 16 to 64 bytes")


def _checked_key(key_id: str, key: bytes) -> bytes:
    if not isinstance(key_id, str) or not 0 < len(key_id.encode()) < 256:
        raise ConfigurationError(f"AesGcm: {key_id!r:.100} names a key; use a text of 1 to 255 bytes")
    if not isinstance(key, bytes) or len(key) != 32:
        raise ConfigurationError(f"AesGcm: key {key_id!r} must have 32 bytes, such as os.urandom(32) makes")
    return key


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys)) or "none"
