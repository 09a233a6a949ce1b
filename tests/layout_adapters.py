"""Adapters by official names, written in any layout, for the tests of layouts."""

from pathlib import Path

import torch
from adapter_examples import random_state
from torch import Tensor

from wan.adapter_layouts import AdapterFile, read_any
from wan.adapter_names import Layout, read_stem
from wan.adapter_values import Factors
from wan.adapter_writing import write_layout


def adapter(scale: float = 1.0, blocks: int = 2, preset: str = "all") -> dict[str, Factors]:
    """The adapter of `random_state` by official names."""
    state, modules = random_state(1, blocks, preset), {}
    for module in dict.fromkeys(key.partition(".lora_")[0] for key in state):
        found = read_stem(module)
        assert found is not None
        a, b = state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"]
        modules[found[1]] = Factors(a, b, scale)
    return modules


def deltas(modules: dict[str, Factors]) -> dict[str, Tensor]:
    return {name: f.scale * f.b.float() @ f.a.float() for name, f in modules.items()}


def write(
    folder: Path, layout: Layout, modules: dict[str, Factors], dtype: torch.dtype = torch.float32
) -> AdapterFile:
    """What is read of `modules`, once written."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "adapter_model.safetensors"
    write_layout(path, modules, layout, dtype, {"ss_network_dim": "9", "note": "kept"})
    return read_any(path)


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype
        for name, tensor in ours.items()
    )
