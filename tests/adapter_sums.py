"""Adapters for toy models and what they add, for the tests of merge, resize and extract."""

import json
import sys
from pathlib import Path

import pytest
import torch
from layout_adapters import deltas
from torch import Tensor

from tools import lora
from wan.adapter_layouts import read_any
from wan.adapter_values import Factors
from wan.adapter_writing import write_layout
from wan.lora_format import read_adapter
from wan.variants import Expert

RANK = 4


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """The exit status of `python -m tools.lora`."""
    monkeypatch.setattr(sys, "argv", ["lora", *map(str, words)])
    try:
        lora.main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def trained_for(folder: Path, model: Path, expert: Expert = "high", seed: int = 0) -> Path:
    """An adapter for a toy model of `t2v_a14b`, on its blocks and its head."""
    generator, modules = torch.Generator().manual_seed(seed), {}
    config = json.loads((model / "transformer" / "config.json").read_text())
    dim, ffn = config["num_attention_heads"] * config["attention_head_dim"], config["ffn_dim"]
    for module, (out, wide) in {
        "blocks.0.self_attn.q": (dim, dim),
        "blocks.1.cross_attn.o": (dim, dim),
        "blocks.0.ffn.0": (ffn, dim),
        "blocks.1.ffn.2": (dim, ffn),
    }.items():
        a = 0.1 * torch.randn(RANK, wide, generator=generator)
        modules[module] = Factors(a, 0.1 * torch.randn(out, RANK, generator=generator), 0.5)
    path = folder / f"fox_{expert}_noise.safetensors"
    entries = {"wan_lora.expert": expert, "wan_lora.variant": "t2v_a14b"}
    write_layout(path, modules, "comfy", torch.float32, entries)
    return path


def changed(path: Path) -> dict[str, Tensor]:
    """dW by the library's name of the weight."""
    state, _, _ = read_adapter(path)
    modules = dict.fromkeys(name.partition(".lora_")[0] for name in state)
    return {
        f"{m}.weight": state[f"{m}.lora_B.weight"] @ state[f"{m}.lora_A.weight"] for m in modules
    }


def total(*parts: tuple[Path, float]) -> dict[str, Tensor]:
    """The sum of strength * dW of files, by module."""
    found: dict[str, Tensor] = {}
    for path, strength in parts:
        for module, delta in deltas(read_any(path).modules).items():
            found[module] = found.get(module, 0) + strength * delta
    return found


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative difference of a module."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[m] - theirs[m]).norm() / theirs[m].norm()) for m in ours)
