"""Payloads are compressed and encrypted, everywhere, and without losing what was written before or under other keys."""

import copy
import os
import subprocess
import sys
import zlib
from itertools import count

import msgspec
import pytest
from durably import failures, payload_codec, payloads
from durably.errors import ConfigurationError, SerializationError, StepError
from durably.payload_codec import LARGEST, AesGcm, Gzip
from durably.payloads import JSON, MSGPACK, dump, dump_arguments, fingerprint, load, load_arguments, plain_arguments
from durably_schemas.records import Payload
from hypothesis import given
from hypothesis import strategies as st

KEY, OTHER = b"k" * 32, b"o" * 32
LONG = {"text": "abc" * 1000}


@pytest.fixture(autouse=True)
def _restored():
    before = payload_codec.active
    yield
    payload_codec.active = before


def aes(current: str | None = "a", **keys: bytes) -> AesGcm:
    return AesGcm(keys or {"a": KEY}, current, fingerprint_key=KEY)


def step(a: int, b: str = "") -> dict[str, str]: ...


def test_a_payload_says_what_it_went_through():
    payload_codec.install(Gzip(), aes())
    payload = dump(LONG, "it")
    assert payload.content_type == f"{MSGPACK};codec=gzip,aes-gcm"
    assert len(payload.data) < 200
    assert load(payload) == LONG
    assert dump([1], "it").content_type == f"{MSGPACK};codec=aes-gcm", "too short to compress"


@given(st.binary(max_size=3000), st.booleans())
def test_what_is_encoded_is_decoded(data, compressible):
    raw = data * 10 if compressible else data
    for codec in (Gzip(above=0), aes()):
        assert codec.decode(codec.encode(raw)) == raw if codec.encode(raw) is not raw else codec.name == "gzip"


def test_compression_is_left_out_where_it_does_not_help():
    noise = os.urandom(5000)
    assert Gzip().encode(noise) is noise
    assert Gzip().encode(b"a" * 1024) is not None
    assert Gzip().encode(data := b"a" * 1024) is data
    assert len(Gzip().encode(b"a" * 1025)) < 100
    assert Gzip().encode(b"a" * 2000) == Gzip().encode(b"a" * 2000)


def test_arguments_results_and_chunks_are_encoded():
    payload_codec.install(aes())
    encoded = [
        dump_arguments(step, (1,), {"b": "secret"}, "it"),
        payloads.dump_result(step, {"b": "secret"}, "it"),
        dump("secret", "it"),
    ]
    assert all(b"secret" not in payload.data for payload in encoded)
    assert load_arguments(encoded[0], step) == ([1], {"b": "secret"})
    assert payloads.encode(encoded[0]) is encoded[0], "once only"


def test_json_of_others_stays_readable_and_can_be_encoded():
    payload_codec.install(aes())
    foreign = Payload(content_type=f"{JSON}; charset=utf-8", data=b"[1]")
    assert load(foreign) == [1]
    encoded = payloads.encode(foreign)
    assert encoded.content_type == f"{JSON}; charset=utf-8;codec=aes-gcm"
    assert load(encoded) == [1]
    assert payload_codec.decode(encoded) == foreign


def test_what_was_written_before_there_were_codecs_stays_readable():
    payload_codec.install()
    before = dump(LONG, "it")
    payload_codec.install(Gzip(), aes())
    assert load(before) == LONG


def test_compressed_data_are_read_everywhere():
    payload_codec.install(Gzip())
    payload = dump(LONG, "it")
    payload_codec.install()
    assert load(payload) == LONG


def test_an_absent_codec_is_named_with_the_remedy():
    payload_codec.install(aes())
    payload = dump(1, "it")
    payload_codec.install()
    with pytest.raises(
        SerializationError, match=r"codec 'aes-gcm', which this process does not have: .*DURABLY_PAYLOAD"
    ):
        load(payload)


def test_keys_rotate():
    payload_codec.install(aes("a", a=KEY))
    old = dump("old", "it")
    print_before = fingerprint("step", plain_arguments(step, (1,), {}, "it"), old)
    payload_codec.install(aes("b", a=KEY, b=OTHER))
    new = dump("new", "it")
    assert (load(old), load(new)) == ("old", "new")
    assert fingerprint("step", plain_arguments(step, (1,), {}, "it"), new) == print_before
    payload_codec.install(aes("b", b=OTHER))
    with pytest.raises(SerializationError, match="key 'a', which this process does not have: it has b"):
        load(old)
    payload_codec.install(aes(None, a=KEY, b=OTHER))
    assert dump("plain", "it").content_type == MSGPACK, "it only decrypts"
    assert (load(old), load(new)) == ("old", "new")


def test_every_encryption_differs_also_in_a_copy_of_the_process():
    codec = aes()
    assert len({codec.encode(b"same") for _ in range(100)}) == 100
    twin = copy.copy(codec)
    codec._count, twin._count = count(7), count(7)
    assert codec.encode(b"one")[2:26] != twin.encode(b"two")[2:26], "one salt for two texts"


def test_encryption_does_not_draw_from_what_workflow_code_draws_from(monkeypatch):
    codec = aes()
    monkeypatch.setattr(os, "urandom", None)
    assert codec.decode(codec.encode(b"data")) == b"data"


@pytest.mark.parametrize("at", [0, 1, 5, 20, 30, -1])
def test_what_was_altered_is_refused(at):
    payload_codec.install(aes())
    payload = dump("secret", "it")
    data = bytearray(payload.data)
    data[at] ^= 1
    with pytest.raises(SerializationError, match="codec 'aes-gcm'"):
        load(msgspec.structs.replace(payload, data=bytes(data)))


def test_what_could_not_be_decompressed_is_not_compressed():
    payload_codec.install(Gzip())
    assert len(load(dump(bytes(LARGEST - 10), "it"))) == LARGEST - 10
    with pytest.raises(
        SerializationError, match=r"'gzip' cannot encode: 16,777,\d+ bytes are more than the 16,777,216"
    ):
        dump(bytes(LARGEST), "it")


@pytest.mark.parametrize(
    ("content_type", "altered"),
    [
        (JSON, MSGPACK),
        (f"{MSGPACK};v=1", MSGPACK),
        (MSGPACK, f"{MSGPACK};codec=gzip"),
        (f"{MSGPACK};codec=gzip", MSGPACK),
    ],
)
def test_encrypted_data_are_not_passed_off_as_data_of_another_type(content_type, altered):
    payload_codec.install(Gzip(), aes())
    plain = Payload(
        content_type=content_type.partition(";codec")[0], data=b"a" * (2000 if "gzip" in content_type else 9)
    )
    payload = payload_codec.active.encode(plain)
    assert payload_codec.decode(payload) == plain
    as_other = altered + (",aes-gcm" if "codec=" in altered else ";codec=aes-gcm")
    assert as_other != payload.content_type
    with pytest.raises(SerializationError, match="altered since, they or their content type"):
        payload_codec.decode(Payload(content_type=as_other, data=payload.data))


@pytest.mark.parametrize("codec", ["gzip", "aes-gcm", "gzip,aes-gcm", "", "x,gzip", "aes-gcm,aes-gcm"])
@given(data=st.binary(max_size=80))
def test_bytes_from_anywhere_are_refused(codec, data):
    payload_codec.install(aes())
    with pytest.raises(SerializationError):
        load(Payload(content_type=f"{MSGPACK};codec={codec}", data=data))
    payload_codec.install()


def test_a_cut_off_or_endless_compression_is_refused():
    payload_codec.install()
    data = zlib.compress(bytes(LARGEST + 1), wbits=31)
    for bad in (data, data[:-10], zlib.compress(b"a", wbits=31) + b"more"):
        with pytest.raises(SerializationError, match=r"cut off, followed by others, or larger than 16,777,216 bytes"):
            load(Payload(content_type=f"{MSGPACK};codec=gzip", data=bad))


def test_fingerprints_are_of_the_plain_input():
    def prints() -> set[str]:
        plain = plain_arguments(step, (1,), {"b": "x" * 3000}, "it")
        return {
            fingerprint("s", plain),
            fingerprint("s", payloads.encode(plain)),
            fingerprint("s", payloads.encode(plain)),
        }

    payload_codec.install()
    (unencoded,) = prints()
    payload_codec.install(Gzip())
    assert prints() == {unencoded}
    payload_codec.install(Gzip(), aes())
    (keyed,) = prints()
    assert keyed != unencoded, "so that nobody finds the input by trying"
    payload_codec.install(AesGcm({"a": KEY}, "a", fingerprint_key=OTHER))
    assert keyed not in prints()


def test_the_fingerprints_of_an_open_run_stay_when_encryption_is_turned_on_or_off():
    plain = plain_arguments(step, (1,), {}, "it")
    payload_codec.install()
    begun_plain = dump([[], {}], "it")
    before = fingerprint("s", plain, begun_plain)
    payload_codec.install(aes())
    begun_hidden = dump([[], {}], "it")
    assert fingerprint("s", plain, begun_plain) == before
    keyed = fingerprint("s", plain, begun_hidden)
    assert keyed != before
    payload_codec.install(aes(None))
    assert fingerprint("s", plain, begun_hidden) == keyed
    assert fingerprint("s", plain) == before, "nothing new is hidden"


class Refused(Exception):
    def __init__(self, *, card: str) -> None:
        super().__init__(f"card {card}")
        self.card = card


def refused() -> BaseException:
    try:
        try:
            raise KeyError("1234")
        except KeyError as e:
            raise ExceptionGroup("group of 1234", [Refused(card="1234")]) from e
    except ExceptionGroup as group:
        return group


def test_what_a_failure_says_is_encrypted_too():
    payload_codec.install(aes())
    error = failures.to_error(refused())
    assert (error.message, error.traceback, error.cause.message) == ("(encrypted)", None, "(encrypted)")
    assert b"1234" not in msgspec.msgpack.encode(error)
    assert error.type == "builtins:ExceptionGroup"
    back = failures.to_exception(error)
    assert (back.message, back.exceptions[0].card, back.__cause__.args) == ("group of 1234", "1234", ("1234",))
    assert "in refused" in back.__notes__[0]
    told = failures.revealed(error)
    assert told.message.startswith("group of 1234")
    assert "in refused" in told.traceback
    assert told.cause.message == "'1234'"


def test_without_the_key_a_failure_tells_its_class():
    payload_codec.install(aes())
    error = failures.to_error(refused())
    payload_codec.install()
    back = failures.to_exception(error)
    assert (type(back), str(back)) == (StepError, "builtins:ExceptionGroup: (encrypted)")
    assert failures.revealed(error) == error


class Broken:
    name = "broken"
    hides = True
    fingerprint_key = b"f" * 16

    def encode(self, data: bytes) -> bytes:
        raise OSError("no key server")

    def decode(self, data: bytes) -> bytes:
        raise OSError("no key server")


def test_a_codec_that_fails_is_named():
    payload_codec.install(Broken())
    with pytest.raises(SerializationError, match="codec 'broken' cannot encode: OSError: no key server"):
        dump(1, "it")
    with pytest.raises(SerializationError, match="decoded by codec 'broken': OSError: no key server"):
        load(Payload(content_type=f"{MSGPACK};codec=broken", data=b""))
    assert failures.to_error(ValueError("secret")).message == "(encrypted)", "rather nothing than in clear"


def variant(**changes: object) -> object:
    return type("Codec", (), {"name": "x", "encode": bytes, "decode": bytes, **changes})()


@pytest.mark.parametrize(
    ("codecs", "message"),
    [
        ([object()], "is no payload codec: it needs name"),
        ([variant(name="A b")], "'A b': its name must be"),
        ([variant(hides=True)], "hides data, and has no fingerprint_key"),
        ([variant(fingerprint_key=b"short")], "16 to 64 bytes"),
        ([Gzip(), Gzip()], "two payload codecs are named 'gzip'"),
    ],
)
def test_what_is_no_codec_is_refused(codecs, message):
    with pytest.raises(ConfigurationError, match=message):
        payload_codec.install(*codecs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AesGcm({"a": b"short"}, "a"), "key 'a' must have 32 bytes"),
        (lambda: AesGcm({"": KEY}, ""), "1 to 255 bytes"),
        (lambda: AesGcm({"a": KEY}, "b"), "current='b' is none of the keys a"),
        (lambda: AesGcm({"a": KEY, "b": OTHER}, "a"), "has 2 keys and no fingerprint_key"),
    ],
)
def test_keys_that_cannot_be_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_the_first_key_is_the_fingerprints_key():
    one = AesGcm({"a": KEY}, "a")
    assert one.fingerprint_key == KEY
    assert repr(one) == "<AesGcm keys a, current a>"
    assert AesGcm({"a": KEY, "b": OTHER}, "b", fingerprint_key=KEY).fingerprint_key == one.fingerprint_key


def test_without_cryptography_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(ConfigurationError, match=r"durably\[crypto\]"):
        aes()


def dumped_by_a_process(tmp_path, setting: str) -> str:
    (tmp_path / "my_codecs.py").write_text(
        "from durably import payload_codec\n"
        "encryption = payload_codec.AesGcm({'a': b'k' * 32}, 'a')\n"
        "class Plain:\n  name = 'plain'\n"
    )
    code = "from durably.payloads import dump, encode; print(encode(dump('a' * 3000, 'it')).content_type)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env={"DURABLY_PAYLOAD_CODEC": setting},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return (done.stdout or done.stderr).strip().splitlines()[-1]


def test_the_setting_names_the_codecs(tmp_path):
    chain = "durably.payload_codec:Gzip, my_codecs:encryption"
    assert dumped_by_a_process(tmp_path, chain) == f"{MSGPACK};codec=gzip,aes-gcm"
    assert dumped_by_a_process(tmp_path, "") == MSGPACK


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("no_such_module:x", "cannot load no_such_module"),
        ("durably.payload_codec:Nothing", "names 'durably.payload_codec:Nothing': AttributeError"),
        ("durably.payload_codec", "write module:object"),
        ("my_codecs:Plain", "is no payload codec"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error_and_nothing_is_written(tmp_path, setting, message):
    said = dumped_by_a_process(tmp_path, setting)
    assert "ConfigurationError" in said
    assert message in said
