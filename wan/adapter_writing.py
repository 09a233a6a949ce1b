"""Adapter files as loaders of each layout expect them; `wan.adapter_layouts` tells the layouts.

Source: `spec/lora_formats.md` sections 5.3 and 6.1 to 6.3.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from wan.adapter_choices import BLOCK_LINEARS
from wan.adapter_layouts import CONFIGS, DORA, PEFT_CONFIG, PEFT_WEIGHTS
from wan.adapter_names import Layout, block_linear, diffusers_name, stem_of
from wan.adapter_values import Factors, check_growth, written_factors
from wan.headers import ModelError
from wan.safetensors_writer import data_sha256, legacy_hash, write_safetensors
from wan.variants import VARIANTS


def write_layout(
    path: Path,
    modules: Mapping[str, Factors],
    layout: Layout,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    dora: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write an adapter as loaders of `layout` expect it; the same bytes in each process.

    `dora` is as in `AdapterFile`: only layout comfy holds it, and in fp32 in any file. PEFT keeps
    alpha in adapter_config.json, which is written beside `path`; elsewhere the scale is in B.
    Hashes, rank and alpha among `metadata` are made right. `ModelError`, and nothing is written, if
    a layout or the dtype cannot hold the adapter.
    """
    if not modules:
        raise ModelError(f"{path} would be empty: the adapter has no modules")
    if dora and layout != "comfy":
        raise ModelError(
            f"{path}: the adapter is a DoRA, which no program reads as it was trained from layout "
            f"{layout}; layout comfy holds it"
        )
    rank = max(factors.rank for factors in modules.values())
    scales = {factors.scale for factors in modules.values()}
    fold = layout != "peft" or len(scales) > 1
    alpha = float(rank if fold else scales.pop() * rank)
    written = written_factors(modules, rank, dtype, fold)
    if layout == "kohya":
        written = _whole_blocks(written, rank, dtype)
    tensors = named_tensors(written, layout) | dora_tensors(dora)
    if layout == "peft" and path.name != PEFT_WEIGHTS:
        raise ModelError(f"{path}: PEFT reads no file but {PEFT_WEIGHTS}; name it so")
    write_safetensors(path, tensors, entries_of(tensors, rank, alpha, metadata))
    if layout == "peft":
        _write_peft_config(path.with_name(PEFT_CONFIG), written, rank, alpha)


def named_tensors(
    written: Mapping[str, tuple[Tensor, Tensor]], layout: Layout
) -> dict[str, Tensor]:
    """The tensors of a file, from those of `written_factors`."""
    factors = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
    tensors: dict[str, Tensor] = {}
    for module, pair in written.items():
        stem = stem_of(module, layout)
        for factor, tensor in zip(factors, pair, strict=True):
            tensors[f"{stem}.{factor}.weight"] = tensor
        if layout == "kohya":  # diffusers and musubi fail without it
            tensors[f"{stem}.alpha"] = torch.tensor(float(pair[0].shape[0]))
    return tensors


def dora_tensors(dora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What makes a file of layout comfy a DoRA, by official module.

    It stays in fp32: rounded, it would change all of W by more than an adapter does.
    """
    for module, scale in dora.items():
        if not scale.isfinite().all():
            raise ModelError(f"{module}.{DORA} has NaN or infinite values: training diverged")
    return {
        f"{stem_of(module, 'comfy')}.{DORA}": scale.float().cpu().contiguous()
        for module, scale in dora.items()
    }


def entries_of(
    tensors: Mapping[str, Tensor], rank: int, alpha: float, metadata: Mapping[str, str]
) -> dict[str, str]:
    """`metadata` as it holds for these tensors."""
    digest = data_sha256(tensors)
    entries = {name: value for name, value in metadata.items() if name not in CONFIGS}
    if "ss_network_dim" in entries:
        entries |= {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    entries |= {
        "format": "pt",
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_model_hash": digest,
    }
    return entries | {"sshs_legacy_hash": legacy_hash(tensors, entries)}


def _whole_blocks(
    written: Mapping[str, tuple[Tensor, Tensor]], rank: int, dtype: torch.dtype
) -> dict[str, tuple[Tensor, Tensor]]:
    """All ten linears of all blocks, zeros where nothing is: diffusers wants them in kohya's."""
    places = {module: block_linear(module) for module in written}
    if outside := [module for module, place in places.items() if place is None]:
        raise ModelError(
            f"the adapter has weights for {outside[0]}, which diffusers cannot read in layout "
            "kohya; expected the linears of blocks only, or another layout"
        )
    seen = {place: written[module] for module, place in places.items() if place}
    widths = {linear: (b.shape[0], a.shape[1]) for (_, linear), (a, b) in seen.items()}
    dim = next(out if linear == "ffn.2" else wide for linear, (out, wide) in widths.items())
    facts = next((v.transformer for v in VARIANTS.values() if v.transformer.dim == dim), None)
    ffn = widths["ffn.0"][0] if "ffn.0" in widths else widths.get("ffn.2", (0, 0))[1]
    ffn = ffn or (facts.ffn_dim if facts else 0)
    if not ffn:
        raise ModelError(
            f"no model of width {dim} is known, so the missing ffn of its blocks cannot be filled "
            "up with zeros, as layout kohya needs; expected another layout"
        )
    widths = dict.fromkeys(BLOCK_LINEARS.values(), (dim, dim))
    widths |= {"ffn.0": (ffn, dim), "ffn.2": (dim, ffn)}
    layers, last = facts.layers if facts else 0, max(block for block, _ in seen)
    if facts is None:
        layers = last + 1
        growth = layers * rank * sum(out + wide for out, wide in widths.values())
        check_growth((Factors(a, b, 1.0) for a, b in seen.values()), growth)
    elif last >= layers:
        raise ModelError(
            f"the adapter has a block {last}; models of its width, {dim}, have {layers} blocks"
        )
    return {
        f"blocks.{block}.{linear}": seen.get((block, linear))
        or (torch.zeros(rank, wide, dtype=dtype), torch.zeros(out, rank, dtype=dtype))
        for block in range(layers)
        for linear, (out, wide) in widths.items()
    }


def _write_peft_config(
    path: Path, written: Mapping[str, tuple[Tensor, Tensor]], rank: int, alpha: float
) -> None:
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
        "target_modules": sorted(diffusers_name(module) for module in written),
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
