"""The strengths at which adapters are rendered, and distilled adapters beside them for few steps.

All of it is undone afterwards, to the bit: training goes on with its adapters at 1 and nothing
beside them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from train.rules import ConfigError
from wan.experts import Experts
from wan.lora import ADAPTER, adapter_layers
from wan.lora_format import read_adapter
from wan.strengths import adapter_strengths, load_adapter, set_strengths
from wan.variants import Expert

FEW_STEP = "few_step"  # the name of a distilled adapter on its expert
ELSEWHERE = "elsewhere"  # that of an adapter which another process trains


@contextmanager
def at_strengths(
    experts: Experts,
    strengths: Mapping[Expert, float],
    few_step: Mapping[Expert, Path],
    elsewhere: Mapping[Expert, Path] | None = None,
) -> Iterator[None]:
    """Within the block the trained adapters work at these strengths, 0 for an expert not named.

    The distilled adapters of the files `few_step` are there too, at 1: at their speed. So are the
    adapters `elsewhere`, of experts that other processes train.
    """
    files = {FEW_STEP: few_step, ELSEWHERE: elsewhere or {}}
    loaded: list[tuple[Expert, str]] = []
    try:
        for name, of_experts in files.items():
            for expert, path in of_experts.items():
                put_on(experts, expert, path, name)
                loaded.append((expert, name))
        for expert in experts:
            wanted = {ADAPTER: strengths.get(expert, 0.0), FEW_STEP: 1.0, ELSEWHERE: 1.0}
            known = adapter_strengths(experts[expert])
            set_strengths(experts[expert], {n: s for n, s in wanted.items() if n in known})
        yield
    finally:
        for expert, name in loaded:
            experts[expert].delete_adapters(name)
        for expert in experts:
            if ADAPTER in adapter_strengths(experts[expert]):
                set_strengths(experts[expert], {ADAPTER: 1.0})


def put_on(experts: Experts, expert: Expert, path: Path, name: str) -> None:
    """Add the finished adapter of a file to its expert, on the device; `ConfigError` if unfit."""
    state, _, _ = read_adapter(path)
    transformer = experts[expert]
    try:
        load_adapter(transformer, state, name)
    except ValueError as error:
        raise ConfigError(f"{path} is not for the {expert} expert: {error}") from None
    for layer in adapter_layers(transformer, name).values():  # blocks that stream are not there
        layer.lora_A[name].to(transformer.device)
        layer.lora_B[name].to(transformer.device)
        if name in layer.lora_magnitude_vector:
            layer.lora_magnitude_vector[name].to(transformer.device)
