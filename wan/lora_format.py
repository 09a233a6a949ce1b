"""The adapter files that training writes, and any adapter as a state for the model.

Written is layout `comfy`, the only one that every popular loader applies with scale 1.0: no alpha
keys, alpha / rank folded into B, one rank per file. `spec/lora_formats.md` sections 0, 2.0, 6.1 to
6.3; other layouts are in `wan/adapter_writing.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from wan.adapter_choices import BLOCK_LINEARS, scale_of, split_module
from wan.adapter_layouts import DORA, read_any
from wan.adapter_names import Layout, diffusers_name, stem_of
from wan.adapter_products import PRODUCT, product_factors, written_products
from wan.adapter_values import Factors, written_factors
from wan.adapter_writing import dora_tensors, entries_of, named_tensors, write_layout
from wan.headers import ModelError
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
    ranks = [tensor.shape[0] for key, tensor in state.items() if key.endswith(FACTORS[0])]
    rank = max([info.rank, *ranks])
    tensors = to_comfy(state, scale_of(info.kind, info.rank, info.alpha), rank, dtype)
    entries = metadata(info, data_sha256(tensors), rank)
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


@dataclass(frozen=True)
class AdapterParts:
    """A state of `wan.lora.finished_state`, by official module."""

    plain: dict[str, Factors]
    products: dict[str, dict[str, Tensor]]  # of LoHa and LoKr
    dora: dict[str, Tensor]  # dora_scale (out, 1)


def parts_of(state: Mapping[str, Tensor], scale: float) -> AdapterParts:
    """What is in a state; `ModelError` if it is no adapter of the linears of blocks."""
    parts = AdapterParts({}, {}, {})
    for key, tensor in state.items():
        if found := PRODUCT.fullmatch(key):
            parts.products.setdefault(_official(found[1]), {})[found[2]] = tensor
        elif key.endswith(f".{DORA}"):
            parts.dora[_official(key.removesuffix(f".{DORA}"))] = tensor
        elif key.endswith(FACTORS):
            module = key.rpartition(".lora_")[0]
            official = _official(module)
            a, b = (state.get(f"{module}{suffix}") for suffix in FACTORS)
            if a is None or b is None:
                raise ModelError(
                    f"{module} needs both lora_A.weight and lora_B.weight; one is missing"
                )
            parts.plain[official] = Factors(a, b, scale)
        else:
            _official(key.removesuffix(".weight").rpartition(".")[0])
            raise ModelError(f"{key} is no part of a plain LoRA without alpha keys")
    if not parts.plain and not parts.products:
        raise ModelError("the adapter is empty; expected tensors named <module>.lora_A.weight")
    return parts


def to_comfy(
    state: Mapping[str, Tensor], scale: float, rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A state of `wan.lora.finished_state` as the tensors of a file of layout `comfy`.

    `scale` goes into B; the rest is as `written_factors`, `dora_tensors` and, for LoHa and LoKr,
    `written_products` promise. `ModelError` as `parts_of` says.
    """
    parts = parts_of(state, scale)
    tensors = named_tensors(written_factors(parts.plain, rank, dtype), "comfy")
    tensors |= dora_tensors(parts.dora)
    for module, found in written_products(parts.products, scale, dtype).items():
        tensors |= {f"{stem_of(module, 'comfy')}.{part}": tensor for part, tensor in found.items()}
    return tensors


def write_state(
    path: Path,
    state: Mapping[str, Tensor],
    scale: float,
    layout: Layout,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    """Write a state of `wan.lora.finished_state` in any layout, as `write_layout` promises.

    LoHa and LoKr stay what they are in layout comfy; in others they are the plain LoRA they equal.
    """
    parts = parts_of(state, scale)
    if parts.products and layout == "comfy":
        tensors = to_comfy(state, scale, 1, dtype)
        rank = max(t.shape[0] for name, t in tensors.items() if name.endswith("_w2_b"))
        write_safetensors(path, tensors, entries_of(tensors, rank, rank, metadata))
        return
    expanded = {
        module: replace(product_factors(found, module, None), scale=scale)
        for module, found in parts.products.items()
    }
    write_layout(path, parts.plain | expanded, layout, dtype, metadata, parts.dora)


def read_adapter(path: Path) -> tuple[dict[str, Tensor], int, dict[str, str]]:
    """(state with diffusers names in fp32, rank, metadata) of an adapter file of any layout.

    The scale is in B, so the state belongs to an adapter whose alpha equals its rank, the largest
    of the file; LoHa and LoKr come as the plain LoRA that they equal, a DoRA with its `dora_scale`
    (out, 1). `ModelError` if the file is missing, broken, no such adapter on linears of Wan 2.2's
    blocks, or (a file of ours) not what was written.
    """
    file = read_any(path, with_dora=True)
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
        if official in file.dora:
            state[f"{module}.{DORA}"] = file.dora[official].float()
    return state, max(factors.rank for factors in file.modules.values()), file.metadata


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
