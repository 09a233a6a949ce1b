"""Adapter files as other tools write them, at the size of the tiny model, for the tests."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from adapter_examples import INFO
from safetensors.torch import save_file
from torch import Tensor

from wan.adapter_choices import BLOCK_LINEARS, target_modules
from wan.adapter_names import diffusers_name, stem_of
from wan.lora_format import export_adapter
from wan.variants import TINY, VARIANTS, Expert

RANK = 4
LAYERS = TINY.layers
PREFIXES = {
    "fun": "lora_unet__",
    "comfy_diffusers": "diffusion_model.",
    "transformer_2": "transformer_2.",
    "stages": "diffusion_model.transformer_1.",
}
Tensors = dict[str, Tensor]


def width_of(linear: str) -> tuple[int, int]:
    """(out, in) of a linear of a block, by its official name."""
    widths = {"ffn.0": (TINY.ffn_dim, TINY.dim), "ffn.2": (TINY.dim, TINY.ffn_dim)}
    return widths.get(linear, (TINY.dim, TINY.dim))


def stem(module: str, style: str) -> str:
    """The name of an official module in any layout, those that no loader takes included."""
    if style == "fun":
        return PREFIXES[style] + module.replace(".", "_")
    if style == "stages":
        return PREFIXES[style] + module
    if style in PREFIXES:
        return PREFIXES[style] + diffusers_name(module)
    return stem_of(module, style)  # type: ignore[arg-type]


def adapter(
    style: str = "comfy",
    alpha: float | None = None,
    spelling: tuple[str, str] = ("lora_A", "lora_B"),
    blocks: Iterable[int] = range(LAYERS),
    linears: Iterable[str] = BLOCK_LINEARS.values(),
    rank: int = RANK,
) -> Tensors:
    """The tensors of an adapter in some layout, drawn anew but always the same."""
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for block in blocks:
        for linear in linears:
            out, wide = width_of(linear)
            name = stem(f"blocks.{block}.{linear}", style)
            a, b = (f"{name}.{factor}.weight" for factor in spelling)
            tensors[a] = 0.1 * torch.randn(rank, wide, generator=generator)
            tensors[b] = 0.1 * torch.randn(out, rank, generator=generator)
            if alpha is not None:
                tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def kohya(
    alpha: float | None = RANK,
    blocks: Iterable[int] = range(LAYERS),
    linears: Iterable[str] = BLOCK_LINEARS.values(),
    rank: int = RANK,
) -> Tensors:
    """A file as musubi-tuner writes it."""
    return adapter("kohya", alpha, ("lora_down", "lora_up"), blocks, linears, rank)


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata or {"format": "pt"})
    return path


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with a header as given: an object that becomes JSON, or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def our_file(folder: Path, expert: Expert, seed: int = 0, **changes: str) -> Path:
    """A file of ours for the tiny model, in bf16."""
    generator = torch.Generator().manual_seed(seed)
    state: Tensors = {}
    for block in range(LAYERS):
        for linear in target_modules("all"):
            out, wide = width_of(BLOCK_LINEARS[linear])
            name = f"blocks.{block}.{linear}"
            state[f"{name}.lora_A.weight"] = torch.randn(RANK, wide, generator=generator)
            state[f"{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
    info = replace(INFO, variant=VARIANTS["tiny"], expert=expert, **changes)
    return export_adapter(folder, "fox", state, info, torch.bfloat16).path
