"""Workers: the order of results, how far ahead they are, and what is said when one dies."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.items import DataError
from data.workers import map_in_workers


def waits_until(claim: Callable[[], bool]) -> bool:
    for _ in range(400):
        if claim():
            return True
        time.sleep(0.05)
    return False


def slow_for_even(index: int) -> tuple[int, int]:
    time.sleep(0.05 * (index % 2 == 0))
    return index * index, os.getpid()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers: int) -> None:
    indices = [5, 2, 2, 8, 1, 0, 9, 7]
    results = list(map_in_workers(slow_for_even, iter(indices), workers))
    assert [(index, square) for index, (square, _) in results] == [(i, i * i) for i in indices]
    pids = {pid for _, (_, pid) in results}
    assert len(pids) == max(workers, 1)
    assert (os.getpid() in pids) == (workers == 0)
    assert list(map_in_workers(slow_for_even, [], workers)) == []


def test_workers_have_one_thread() -> None:
    results = map_in_workers(lambda _: torch.get_num_threads(), range(2), 2)
    assert [threads for _, threads in results] == [1, 1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.bool])
def test_tensors_arrive_as_they_were(workers: int, dtype: torch.dtype) -> None:
    shapes = [(), (0, 3), (7, 5, 3), (2, 3)]

    def make(index: int) -> Tensor:
        shape = torch.Size(shapes[index])
        return (torch.arange(shape.numel()) % 100 + 1).to(dtype).reshape(shape)

    for index, tensor in map_in_workers(make, range(4), workers):
        assert tensor.dtype == dtype
        assert torch.equal(tensor, make(index))
        tensor.zero_()  # it may be written to
    ((_, strided),) = map_in_workers(lambda _: torch.arange(6).reshape(2, 3).T, [0], 1)
    assert torch.equal(strided, torch.arange(6).reshape(2, 3).T)


def test_tensors_leave_no_open_files_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _, tensor in map_in_workers(lambda index: torch.full((999,), index), range(50), 2):
        assert len(os.listdir("/proc/self/fd")) < before + 9
        del tensor
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_indices_are_drawn_a_few_ahead(workers: int) -> None:
    drawn = 0

    def indices() -> Iterator[int]:
        nonlocal drawn
        while drawn < 30:
            drawn += 1
            yield drawn

    for taken, _ in enumerate(map_in_workers(lambda index: index, indices(), workers), start=1):
        assert drawn <= taken + 2 * workers
        assert drawn >= min(30, taken + 2 * workers - 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_error_arrives_as_it_is(workers: int) -> None:
    def work(index: int) -> int:
        if index == 3:
            raise DataError("c.mp4: is empty")
        return index

    results = map_in_workers(work, range(9), workers)
    assert [next(results)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError) as caught:
        next(results)
    assert str(caught.value) == "c.mp4: is empty"
    assert not multiprocessing.active_children()


def test_other_errors_are_shown_with_their_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    def work(index: int) -> int:
        return 1 // (1 - index)

    with pytest.raises(RuntimeError, match="b: a worker failed with the error above"):
        list(map_in_workers(work, range(4), 2, "abcd".__getitem__))
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("ended_by", "said"),
    [
        (signal.SIGKILL, "c.mp4: .* SIGKILL, as happens when memory runs out; set fewer data.work"),
        (signal.SIGSEGV, "c.mp4: .* SIGSEGV, a crash of the decoder; re-encode .*workers=0"),
        (signal.SIGBUS, "c.mp4: .* SIGBUS"),
    ],
)
def test_worker_that_dies_is_named_with_its_file(ended_by: signal.Signals, said: str) -> None:
    def work(index: int) -> Tensor:
        if index == 2:
            faulthandler.disable()  # pytest's, which would fill the screen
            os.kill(os.getpid(), ended_by)
        return torch.full((1000,), index)

    def take() -> None:
        for index, tensor in map_in_workers(work, range(20), 2, lambda i: "abcdef"[i] + ".mp4"):
            assert (tensor == index).all()
            got.append(index)
            time.sleep(0.2)  # so that the worker is dead when the results before it are taken

    got: list[int] = []
    with pytest.raises(DataError, match=said):
        take()
    assert got == [0, 1]  # what it made before still arrives
    assert not multiprocessing.active_children()


def test_idle_worker_that_dies_is_noticed() -> None:
    results = map_in_workers(lambda index: (index, os.getpid()), range(20), 1)
    _, (_, pid) = next(results)
    time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"item 2: .* SIGKILL"):
        list(results)


def test_closing_early_ends_the_workers() -> None:
    def work(index: int) -> int:
        time.sleep(0 if index == 0 else 600)
        return index

    results = map_in_workers(work, range(99), 2)
    assert next(results) == (0, 0)
    assert len(multiprocessing.active_children()) == 2
    results.close()
    assert not multiprocessing.active_children()


PARENT = """
import os, signal, time
from pathlib import Path
from data.workers import map_in_workers
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell lets us ignore it
def work(index):
    Path({folder!r}, str(os.getpid())).touch()
    time.sleep(0.01)
    return index
for _ in map_in_workers(work, range(9), 2):
    time.sleep(600)
"""


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_their_parent(tmp_path: Path, ended_by: signal.Signals) -> None:
    program = PARENT.format(folder=str(tmp_path))
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL) as parent:
        try:
            assert waits_until(lambda: len(list(tmp_path.iterdir())) == 2)
            workers = [Path("/proc", file.name) for file in tmp_path.iterdir()]
        finally:
            parent.send_signal(ended_by)
        parent.wait(20)
    assert waits_until(lambda: not any(worker.exists() for worker in workers))


def test_work_sees_memory_of_the_parent_and_indices_may_fail() -> None:
    words = ["a", "b"]
    assert [word for _, word in map_in_workers(words.__getitem__, range(2), 2)] == words

    def indices() -> Iterator[int]:
        yield 0
        raise KeyError("the bar broke")

    with pytest.raises(KeyError, match="the bar broke"):
        list(map_in_workers(words.__getitem__, indices(), 1))
    assert not multiprocessing.active_children()
