"""Which part of all work a process has: processes that share a sequence have one part together."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from train.config import Config
from train.rules import ConfigError
from train.stopping import Stopped, StopRequest, on_any
from wan.checkpoints import Model
from wan.context import Context, make_context
from wan.variants import Variant


def groups(config: Config, accelerator: Accelerator) -> int:
    """How many groups of processes there are; each has batches of its own."""
    return accelerator.num_processes // config.speed.context


def own_group(config: Config, accelerator: Accelerator) -> int:
    """The group of this process, from 0."""
    return accelerator.process_index // config.speed.context


def shared_context(config: Config) -> Context | None:
    """With whom this process shares its sequences, if with anyone; all processes must call it."""
    return make_context(config.speed.context) if config.speed.context > 1 else None


def shared_base(config: Config, accelerator: Accelerator) -> DeviceMesh | None:
    """Over which processes the base is sharded, if it is; all processes must call it."""
    if config.speed.placement != "shard":
        return None
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def is_together(config: Config) -> bool:
    """Whether a pass of the model takes other processes too: none may leave one out."""
    return config.speed.context > 1 or config.speed.placement == "shard"


@dataclass(frozen=True)
class Parts:
    """How work is divided among groups of processes, and which part is that of this process."""

    accelerator: Accelerator
    stop: StopRequest
    count: int
    own: int
    speaks: bool  # of all processes of its group this one

    def of(self, count: int) -> list[int]:
        """The own ones of 0 .. count - 1, and the last one where a group would have one less."""
        return [min(first + self.own, count - 1) for first in range(0, count, self.count)]

    def until_stopped(self, items: Iterable[int]) -> Iterator[int]:
        """The items; `Stopped` on all processes between two of them, if any is asked to stop."""
        for item in items:
            if on_any(self.accelerator, self.stop.reason is not None):
                raise Stopped(self.stop.reason)
            yield item


def parts_of(config: Config, accelerator: Accelerator, stop: StopRequest) -> Parts:
    """How a run divides what is measured and rendered."""
    return Parts(
        accelerator,
        stop,
        count=groups(config, accelerator),
        own=own_group(config, accelerator),
        speaks=accelerator.process_index % config.speed.context == 0,
    )


def in_parts(
    count: int,
    make: Callable[[int], Tensor],
    progress: Callable[[Iterable[int], str], Iterable[int]],
    name: str,
    parts: Parts | None,
) -> Tensor:
    """What `make` gives of 0 .. count - 1, in rows, on all processes: each group makes a part.

    To the bit what one process alone makes, `parts` being None. Groups make as many each, as passes
    of a sharded base take all processes: what is made twice counts once.
    """
    if parts is None or parts.accelerator.num_processes == 1:
        return torch.stack([make(index) for index in progress(range(count), name)])
    own = parts.of(count)
    made = [make(own[turn]) for turn in parts.until_stopped(progress(range(len(own)), name))]
    rows = torch.zeros(count, *made[0].shape, dtype=made[0].dtype)
    for index, row in zip(range(parts.own, count, parts.count), made, strict=False):
        rows[index] = row if parts.speaks else 0
    rows = rows.to(parts.accelerator.device)
    distributed.all_reduce(rows)  # of each row one process has what is not 0
    return rows.cpu()


def check_heads(config: Config, facts: Variant) -> None:
    """`ConfigError` unless each process of a group can have as many heads of attention."""
    context, heads = config.speed.context, facts.transformer.heads
    if heads % context:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ConfigError(
            f"speed.context is {context}, but the {heads} heads of {facts.title} can be divided "
            f"among {', '.join(map(str, fitting))} processes only. Set one of these."
        )


def check_groups(config: Config, accelerator: Accelerator) -> None:
    """`ConfigError` unless the processes can be divided into groups, and a base over them."""
    context, processes = config.speed.context, accelerator.num_processes
    if processes == 1 and config.speed.placement == "shard":
        raise ConfigError(
            "speed.placement is shard, and there is one process, which would hold all of the "
            "base. Type accelerate launch --num_processes 2 or more, or set speed.placement=swap."
        )
    if processes % context and not config.dry_run:
        raise ConfigError(
            f"speed.context is {context}, and there are {processes} processes, which cannot be "
            f"divided into groups of {context}. Type accelerate launch --num_processes {context}, "
            "or a multiple of it, or set speed.context=1."
        )


def check_shardable(config: Config, model: Model) -> None:
    """`ConfigError` for files that stay quantised: those of a GGUF cannot be sharded."""
    for expert in model.variant.experts:
        weights = model.parts[expert]
        if config.speed.placement == "shard" and weights.storage.startswith("gguf"):
            raise ConfigError(
                f"speed.placement is shard, but {weights.files[0]} stays quantised, which cannot "
                "be sharded. Set speed.placement=swap, or give a model in bf16."
            )
