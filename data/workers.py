"""Work done by processes beside this one, a few items ahead of whoever takes the results.

Tensors come back through memory that both processes map, not through /dev/shm, of which containers
have little. A worker that dies is noticed at once, with what it was doing.
"""

import mmap
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from multiprocessing.reduction import recv_handle, send_handle
from typing import TypeVar, cast

import torch
from torch import Tensor

from data.items import DataError

T = TypeVar("T")

AHEAD = 2  # items that each worker is given before the first of them is taken


@dataclass(frozen=True)
class _Worker:
    process: ForkProcess
    pipe: Connection


@dataclass(frozen=True)
class _SharedTensor:
    """Announces a tensor whose memory follows on the pipe as a file descriptor."""

    dtype: torch.dtype
    shape: torch.Size


def map_in_workers(
    work: Callable[[int], T],
    indices: Iterable[int],
    workers: int,
    name: Callable[[int], str] = "item {}".format,
) -> Generator[tuple[int, T], None, None]:
    """(index, work(index)) in the order of `indices`, computed by so many processes.

    They are forks of this one, of one thread each: `work` sees what this process had in memory, but
    must not use a GPU. Indices are drawn a few ahead of the results that were taken; 0 workers: one
    by one, in this process. A `DataError` of `work` is raised here; one that says what
    `name(index)` was read is raised for a worker that died. Closing the iterator ends the workers.
    """
    if workers == 0:
        for index in indices:
            yield index, work(index)
        return
    crew: list[_Worker] = []
    try:
        for _ in range(workers):
            crew.append(_start(work, crew))
        for index, result in _results(crew, indices, name):
            yield index, cast("T", result)
    finally:
        for worker in crew:
            worker.process.kill()  # at once, whatever it is decoding: it keeps nothing
            worker.process.join()
            worker.pipe.close()


def _results(
    crew: Sequence[_Worker], indices: Iterable[int], name: Callable[[int], str]
) -> Iterator[tuple[int, object]]:
    given: deque[tuple[int, _Worker]] = deque()
    for index, worker in zip(indices, cycle(crew), strict=False):
        with suppress(OSError):  # it has died: taking what it was given before says so
            worker.pipe.send(index)
        given.append((index, worker))
        if len(given) == AHEAD * len(crew):
            yield _take(*given.popleft(), name)
    while given:
        yield _take(*given.popleft(), name)


def _start(work: Callable[[int], object], crew: list[_Worker]) -> _Worker:
    here, there = multiprocessing.Pipe()
    ends = [worker.pipe for worker in crew] + [here]
    process = multiprocessing.get_context("fork").Process(
        target=_serve, args=(work, there, ends), daemon=True
    )
    process.start()
    there.close()  # its worker holds the only other copy, so that its death closes the pipe
    return _Worker(process, here)


def _serve(work: Callable[[int], object], pipe: Connection, ends: list[Connection]) -> None:
    """A worker's life: an index comes, its result goes, until the other side is gone."""
    for end in ends:  # this process has copies, which would keep the pipes open for ever
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):
        while True:
            index = pipe.recv()
            try:
                result = work(index)
            except DataError as problem:
                pipe.send(problem)
            else:
                _send(pipe, result)


def _send(pipe: Connection, result: object) -> None:
    if not isinstance(result, Tensor) or result.numel() == 0:
        pipe.send(result)
        return
    pipe.send(_SharedTensor(result.dtype, result.shape))
    memory = os.memfd_create("tensor")
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(result.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        send_handle(pipe, memory, None)
    finally:
        os.close(memory)


def _take(index: int, worker: _Worker, name: Callable[[int], str]) -> tuple[int, object]:
    """The next result of a worker, which is that of `index`."""
    try:
        result = worker.pipe.recv()
        if isinstance(result, _SharedTensor):
            result = _receive(worker.pipe, result)
    except (EOFError, ConnectionError) as error:
        worker.process.join()
        raise _explain(worker.process.exitcode or 0, name(index)) from error
    if isinstance(result, DataError):
        raise result
    return index, result


def _receive(pipe: Connection, shared: _SharedTensor) -> Tensor:
    memory = recv_handle(pipe)
    try:
        mapped = mmap.mmap(memory, 0)
    finally:
        os.close(memory)
    return torch.frombuffer(mapped, dtype=shared.dtype).reshape(shared.shape)


def _explain(exit_code: int, name: str) -> Exception:
    """Why a worker ended while it read `name`."""
    if exit_code >= 0:
        return RuntimeError(f"{name}: a worker failed with the error above")
    found = f"{name}: the process that read it was ended by {signal.Signals(-exit_code).name}"
    if -exit_code == signal.SIGKILL:
        return DataError(f"{found}, as happens when memory runs out; set fewer data.workers, or 0")
    return DataError(
        f"{found}, a crash of the decoder; re-encode this file with ffmpeg, or remove it and its "
        "caption. data.workers=0 decodes without processes"
    )
