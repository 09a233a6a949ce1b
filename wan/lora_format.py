"""The adapter files that training writes, and any adapter as a state for the model.

Written is layout `comfy`, the only one that every popular loader applies with scale 1.0: no alpha
keys, alpha / rank folded into B, one rank per file. `spec/lora_formats.md` sections 0, 2.0, 6.1 to
6.3; other layouts are in `wan/adapter_layouts.py`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wan.adapter_layouts import named_tensors, read_any
from wan.adapter_names import diffusers_name
from wan.adapter_values import Factors, written_factors
from wan.headers import ModelError
from wan.lora import BLOCK_LINEARS, split_module
from wan.lora_metadata import AdapterInfo, metadata
from wan.safetensors_writer import data_sha256, file_hashes, legacy_hash, write_safetensors
from wan.variants import Expert

FACTORS = (".lora_A.weight", ".lora_B.weight")
SUFFIX_OF_EXPERT: dict[Expert, str] = {"high": "_high_noise", "low": "_low_noise", "single": ""}

# diffusers skips files with these words when it looks for weights (section 3.1).
FORBIDDEN_WORDS = ("checkpoint", "optimizer", "scheduler")


@dataclass(frozen=True)
class ExportedFile:
    """A written adapter file and what identifies it elsewhere."""

    path: Path
    sha256: str
    autov2: str
    autov3: str
    size_bytes: int


def export_adapter(
    folder: Path, name: str, state: dict[str, Tensor], info: AdapterInfo, dtype: torch.dtype
) -> ExportedFile:
    """Write `<name>_high_noise.safetensors`, `<name>_low_noise.safetensors` or, of one transformer,
    `<name>.safetensors` into `folder`.

    The bytes depend on the arguments and the library versions alone. `ModelError`, and nothing is
    written, if the name or the adapter is one that loaders would trip over.
    """
    path = folder / f"{checked_name(name)}{SUFFIX_OF_EXPERT[info.expert]}.safetensors"
    tensors = to_comfy(state, info.alpha / info.rank, info.rank, dtype)
    entries = metadata(info, data_sha256(tensors))
    entries["sshs_legacy_hash"] = legacy_hash(tensors, entries)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, tensors, entries)
    return exported_file(path)


def exported_file(path: Path) -> ExportedFile:
    """What identifies a file that has been written."""
    hashes = file_hashes(path)
    return ExportedFile(path, hashes.sha256, hashes.autov2, hashes.autov3, path.stat().st_size)


def checked_name(name: str) -> str:
    """`name`, if loaders find a file that is called so; `ModelError` otherwise."""
    if not name or name.startswith(".") or re.search(r'[\\/:*?"<>|\x00-\x1f]', name):
        raise ModelError(f"{name!r} cannot name a file: use letters, digits, '-' and '_'")
    if word := next((word for word in FORBIDDEN_WORDS if word in name.lower()), None):
        raise ModelError(
            f"the name {name!r} contains {word!r}, and diffusers skips such files: choose another"
        )
    return name


def to_comfy(
    state: dict[str, Tensor], scale: float, rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A state of `wan.lora.adapter_state` as the tensors of a file of layout `comfy`.

    `scale` (alpha / rank) goes into B; the rest is as `written_factors` promises. `ModelError` for
    a state that is no plain LoRA on the linears of blocks.
    """
    modules: dict[str, Factors] = {}
    for module in dict.fromkeys(key.removesuffix(".weight").rpartition(".")[0] for key in state):
        official = _official(module)
        a, b = (state.get(f"{module}{suffix}") for suffix in FACTORS)
        if a is None or b is None:
            raise ModelError(f"{module} needs both lora_A.weight and lora_B.weight; one is missing")
        modules[official] = Factors(a, b, scale)
    if not modules:
        raise ModelError("the adapter is empty; expected tensors named <module>.lora_A.weight")
    if extra := [key for key in state if not key.endswith(FACTORS)]:
        raise ModelError(f"{min(extra)} is no part of a plain LoRA without alpha keys")
    return named_tensors(written_factors(modules, rank, dtype), "comfy")


def read_adapter(path: Path) -> tuple[dict[str, Tensor], int, dict[str, str]]:
    """(state with diffusers names in fp32, rank, metadata) of an adapter file of any layout.

    The scale is in B, so the state belongs to an adapter whose alpha equals its rank. `ModelError`
    if the file is missing, broken, no plain LoRA on linears of Wan 2.2's blocks, or (a file of
    ours) not what was written.
    """
    file = read_any(path)
    state: dict[str, Tensor] = {}
    for official, factors in file.modules.items():
        module = diffusers_name(official)
        if split_module(module) is None:
            raise ModelError(
                f"{path} has weights for {official}, which Wan 2.2 has not or most loaders skip; "
                "expected the linears of blocks only"
            )
        state[f"{module}{FACTORS[0]}"] = factors.a.float()
        state[f"{module}{FACTORS[1]}"] = factors.b.float() * factors.scale
    ranks = sorted({factors.rank for factors in file.modules.values()})
    if len(ranks) > 1:
        raise ModelError(f"{path} mixes the ranks {ranks}; expected one rank in the whole file")
    return state, ranks[0], file.metadata


def _official(module: str) -> str:
    """The official name of a diffusers module; `ModelError` for all but the linears of blocks."""
    found = split_module(module)
    if found is None:
        raise ModelError(
            f"the adapter has weights for {module}, which loaders refuse, skip or misread; "
            f"expected the linears of blocks only ({', '.join(BLOCK_LINEARS)})"
        )
    block, linear = found
    return f"{block}.{BLOCK_LINEARS[linear]}"
