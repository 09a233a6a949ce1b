"""Several processes fill one cache folder: no entry is made twice, and none is left out."""

import errno
import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
from cache_examples import (
    SECONDS,
    Diary,
    assert_right,
    ended,
    fill,
    image_clips,
    in_child,
    look,
    store_at,
    waits_for,
)
from torch import Tensor

from data.buckets import Clip
from data.cache import Store, cache_latents
from data.claims import try_claim, wait_for_release
from data.files import FileFacts
from data.items import DataError

COUNT = 12


def test_claim_is_given_once_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "a"
    claim = try_claim(path)
    assert claim is not None
    assert try_claim(path) is None
    assert try_claim(tmp_path / "locks" / "b") is not None
    claim.release()
    assert not path.exists()
    again = try_claim(path)
    assert again is not None
    again.release()


def test_claim_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    path, diary = tmp_path / "a", Diary(tmp_path / "diary")

    def claim_and_wait() -> None:
        try_claim(path)
        diary.write("claimed")
        signal.pause()

    child = in_child(claim_and_wait)
    waits_for(lambda: diary.lines() == ["claimed"])
    assert try_claim(path) is None
    child.kill()
    wait_for_release(path)
    assert try_claim(path) is not None
    ended([child])


def test_release_counts_though_a_process_was_forked_meanwhile(tmp_path: Path) -> None:
    claim = try_claim(tmp_path / "a")
    assert claim is not None
    os.link(tmp_path / "a", tmp_path / "b")  # another name of the locked file
    child = in_child(signal.pause)
    claim.release()
    assert try_claim(tmp_path / "b") is not None
    child.kill()
    ended([child])


def test_no_two_processes_hold_a_claim_at_once(tmp_path: Path) -> None:
    def claim_often() -> None:
        for _ in range(1000):
            claim = try_claim(tmp_path / "a")
            if claim is not None:
                os.close(os.open(tmp_path / "held", os.O_CREAT | os.O_EXCL))
                os.unlink(tmp_path / "held")
                claim.release()

    assert ended([in_child(claim_often) for _ in range(3)]) == [0, 0, 0]


def test_waiting_ends_when_the_claim_is_released_or_was_never_made(tmp_path: Path) -> None:
    wait_for_release(tmp_path / "a")
    claim = try_claim(tmp_path / "a")
    assert claim is not None
    waiting = threading.Thread(target=wait_for_release, args=[tmp_path / "a"])
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    claim.release()
    waiting.join(SECONDS)
    assert not waiting.is_alive()


def test_without_locks_every_claim_is_granted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    claims = [try_claim(tmp_path / "a") for _ in range(2)]
    for claim in claims:
        assert claim is not None
        claim.release()
    clips = image_clips(tmp_path / "media", 3)
    assert fill(clips, store_at(tmp_path / "cache", workers=1))[0] == 3


@dataclass(frozen=True)
class Team:
    """Processes that fill one cache and write down what they encode."""

    clips: list[Clip]
    facts: dict[Path, FileFacts]
    store: Store
    diary: Diary

    def start(self, who: str, begin: Callable[[], None]) -> ForkProcess:
        """A process that does `begin` while it has its first clip, before that is encoded."""

        def encode(frames: Tensor) -> Tensor:
            self.diary.write(f"{who} encodes {frames.max().item()}")
            if len(self.lines(f"{who} encodes")) == 1:
                begin()
            return frames.float().mean(dim=-1)[None]

        def progress(indices: Iterable[int], label: str) -> Iterable[int]:
            self.diary.write(f"{who}: {label}")
            return indices

        def work() -> None:
            store = replace(self.store, progress=progress)
            entries, report = cache_latents(self.clips, self.facts, lambda: encode, "vae", store)
            assert_right(self.clips, entries)
            self.diary.write(f"{who}: {report.lines()[0]}")

        return in_child(work)

    def lines(self, start: str) -> list[str]:
        return [line for line in self.diary.lines() if line.startswith(start)]

    def encoded(self) -> list[int]:
        """The brightness of every clip that was encoded, by anyone."""
        return sorted(int(line.split()[-1]) for line in self.diary.lines() if "encodes" in line)


def team(folder: Path, workers: int) -> Team:
    clips, store = image_clips(folder / "media", COUNT), store_at(folder / "cache", workers)
    return Team(clips, look(clips, store.root), store, Diary(folder / "diary"))


@pytest.mark.parametrize("workers", [0, 1])
def test_two_processes_share_the_work(tmp_path: Path, workers: int) -> None:
    both = team(tmp_path, workers)

    def meet() -> None:
        waits_for(lambda: bool(both.lines("a encodes") and both.lines("b encodes")))

    assert ended([both.start("a", meet), both.start("b", meet)]) == [0, 0]
    assert both.encoded() == [10 * i for i in range(COUNT)]
    a, b = len(both.lines("a encodes")), len(both.lines("b encodes"))
    assert both.lines("a: latents") == [
        f"a: latents: 0 reused, 12 encoded ({a} here, {b} by other processes)"
    ]
    assert not [*both.store.root.glob("locks/*")]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_killed_process_had_claimed_is_made_by_the_others(
    tmp_path: Path, workers: int
) -> None:
    three = team(tmp_path, workers)

    def meet() -> None:
        waits_for(lambda: bool(three.lines("c encodes")))

    others = [three.start(who, meet) for who in "ab"]
    victim = three.start("c", signal.pause)
    waits_for(lambda: len(three.lines("a: waiting") + three.lines("b: waiting")) >= 2)
    victim.kill()
    assert ended([*others, victim]) == [0, 0, -9]
    begun = three.lines("c encodes")
    assert len(begun) == 1
    assert three.encoded() == sorted([10 * i for i in range(COUNT)] + [int(begun[0].split()[-1])])
    assert fill(three.clips, three.store)[0] == 0


def test_what_another_process_could_not_encode_fails_here_too(tmp_path: Path) -> None:
    """Nobody waits for ever, and nobody goes on without the entry."""
    clips, store = image_clips(tmp_path / "media", 2), store_at(tmp_path / "cache")
    facts, diary = look(clips, store.root), Diary(tmp_path / "diary")

    def work() -> None:
        def encode(frames: Tensor) -> Tensor:
            return frames.float().mean(dim=-1)[None] / frames.max()  # NaN where it is black

        try:
            cache_latents(clips, facts, lambda: encode, "vae", store)
        except DataError as error:
            diary.write(str(error))

    assert ended([in_child(work), in_child(work)]) == [0, 0]
    assert [line.split(":")[0] for line in diary.lines()] == ["0.png"] * 2
