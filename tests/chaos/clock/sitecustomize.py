"""Wrong clocks: `time.time` and `time.time_ns` of this process are off by what the file CHAOS_CLOCK says.

Python runs this at its start where the folder is on PYTHONPATH. The file holds one signed 64-bit number, nanoseconds in
native order, which the harness changes while the process runs. The monotonic clock stays as it is, as in a real jump.
"""

import mmap
import os
import struct
import time

_LONG = struct.Struct("q")


def _install(path: str) -> None:
    with open(path, "rb") as file:  # noqa: PTH123 - every process of the harness starts with this
        offset = mmap.mmap(file.fileno(), _LONG.size, access=mmap.ACCESS_READ)
    real, real_ns = time.time, time.time_ns

    def now_ns() -> int:
        return real_ns() + _LONG.unpack_from(offset)[0]

    def now() -> float:
        return real() + _LONG.unpack_from(offset)[0] / 1e9

    time.time, time.time_ns = now, now_ns


if "CHAOS_CLOCK" in os.environ:
    _install(os.environ["CHAOS_CLOCK"])
