"""Which part of a step a process has: processes that share a sequence have one part together."""

from accelerate import Accelerator

from train.config import Config
from train.rules import ConfigError
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
    """`ConfigError` unless the processes can be divided into groups."""
    context, processes = config.speed.context, accelerator.num_processes
    if processes % context and not config.dry_run:
        raise ConfigError(
            f"speed.context is {context}, and there are {processes} processes, which cannot be "
            f"divided into groups of {context}. Type accelerate launch --num_processes {context}, "
            "or a multiple of it, or set speed.context=1."
        )
