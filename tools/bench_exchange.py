"""What processes send each other in a step: counted while the step runs, then timed by itself."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import distributed
from torch.profiler import ProfilerActivity, profile

from tools.bench_step import synchronise

Kind = Literal["all_reduce", "all_gather", "all_to_all"]
# PyTorch's operators by the names that its profiler sees, given (output, input, ...).
KINDS: dict[str, Kind] = {
    "c10d::allreduce_": "all_reduce",
    "c10d::_allgather_base_": "all_gather",
    "c10d::alltoall_base_": "all_to_all",
}
BYTES = {"c10::BFloat16": 2, "float": 4, "unsigned char": 1}


@dataclass(frozen=True)
class Message:
    """One exchange among all processes, and the bytes of the tensor that each gives to it."""

    kind: Kind
    size: int

    def sent(self, processes: int) -> float:
        """Bytes that leave a process, if a ring reduces and gathers and shares are equal."""
        others = processes - 1
        if self.kind == "all_gather":
            return float(others * self.size)
        return (2 if self.kind == "all_reduce" else 1) * others / processes * self.size


def messages_of(step: Callable[[], None], reduced: int) -> list[Message]:
    """Those of a step, as PyTorch's profiler sees them go out, compiled or not.

    `reduced` are the bytes of what the step reduces: of lists the profiler tells no sizes.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        step()
    assert seen.profiler is not None
    results = seen.profiler.kineto_results
    assert results is not None
    found = []
    for event in results.events():
        kind = KINDS.get(event.name())
        if kind == "all_reduce":
            found.append(Message(kind, reduced))
        elif kind is not None:
            found.append(Message(kind, prod(event.shapes()[1]) * BYTES[event.dtypes()[1]]))
    return found


def exchange_seconds(messages: Sequence[Message], device: torch.device, rounds: int) -> float:
    """What the messages take one after the other with nothing beside them: the least of rounds.

    All processes call it alike.
    """
    shares = distributed.get_world_size()
    given = {m: torch.zeros(m.size // 4, device=device) for m in set(messages)}
    taken = []
    for _ in range(1 + rounds if messages else 0):  # the first sets up the links
        distributed.barrier()
        started = time.perf_counter()
        for message in messages:
            tensor = given[message]
            if message.kind == "all_reduce":
                distributed.all_reduce(tensor)
            elif message.kind == "all_gather":
                distributed.all_gather_into_tensor(tensor.new_empty(shares * len(tensor)), tensor)
            else:
                even = tensor[: len(tensor) // shares * shares]
                distributed.all_to_all_single(torch.empty_like(even), even)
        synchronise(device)
        taken.append(time.perf_counter() - started)
    return min(taken[1:], default=0.0)
