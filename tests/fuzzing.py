"""What the fuzz tests share: how many cases they try, ways to damage a file, and what is allowed.

`WAN_LORA_FUZZ=10000 pytest tests/test_*fuzz*.py` tries 10,000 cases of each subject, within half
an hour (last done on 2026-11-24); the default takes seconds. The same cases are drawn each time.
"""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

T = TypeVar("T")

LONG_RUN = int(os.environ.get("WAN_LORA_FUZZ", "0"))
CASES = LONG_RUN or 200
PATIENCE = 20.0  # seconds: what takes longer hangs, even on a busy machine
LONGEST = 3000  # characters of a message: one that is longer repeats what it was given
NUMBERS = (0, 1, 7, 31, 32, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63, 2**64 - 1)
WORDS = (
    *(b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"{", b"}", b"[", b'"', b",,"),
    *(b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 30, b"null", b"true", b"..", b"/", b"\n"),
)


class Hangs(BaseException):
    """No `Exception`, for what reads a file may take a `TimeoutError` for the file's fault."""


def cases(share: float = 1.0, each_day: int = 0) -> settings:
    """The profile of a test that makes this share of the cases of its subject.

    A subject whose cases are dear makes `each_day` of them where no long run is asked for.
    """
    return settings(
        max_examples=each_day if each_day and not LONG_RUN else max(int(share * CASES), 1),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # what fails is small enough, and shrinking it takes minutes
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def in_time(seconds: float = PATIENCE) -> Iterator[None]:
    """Raise `Hangs` inside if it is not left in time."""

    def stop(*_: object) -> None:
        raise Hangs

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def answer_or(error: type[Exception], call: Callable[[], T]) -> T | None:
    """What a call returns; None if it raises `error` with a sentence. All else passes through."""
    with in_time():
        try:
            return call()
        except error as refusal:
            assert_sentence(str(refusal))
    return None


def assert_sentence(message: str) -> None:
    """It says something, can be printed anywhere, and is short enough to be read."""
    assert len(message.split()) > 2, message
    assert len(message) <= LONGEST, message[:LONGEST]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", message), repr(message)


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


@st.composite
def damaged(draw: st.DrawFn, *originals: bytes) -> bytes:
    """One of the files with a few bits, bytes, numbers or pieces changed, or cut short."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        width = draw(st.sampled_from([1, 4, 8]))
        match draw(st.integers(0, 6)):
            case 0 if place < len(content):
                content[place] ^= 1 << draw(st.integers(0, 7))
            case 1:
                number = draw(st.sampled_from(NUMBERS)) % 256**width
                content[place : place + width] = number.to_bytes(width, "little")
            case 2:
                content[place:place] = draw(st.sampled_from(WORDS))
            case 3:
                content[place : place + width] = draw(st.sampled_from(WORDS))
            case 4:
                content[place:place] = draw(st.binary(max_size=20))
            case 5:
                del content[place : place + draw(st.integers(1, 40))]
            case _:
                piece = content[place : place + draw(st.integers(1, 80))]
                content[place:place] = piece * draw(st.sampled_from([1, 1, 1, 50]))
    if draw(st.integers(0, 9)) == 0:
        content = content[: draw(st.integers(0, len(content)))]
    return bytes(content)
