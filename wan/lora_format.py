"""Adapter files of layout `comfy`: `diffusion_model.<official>.lora_A.weight`, `.lora_B.weight`.

The only layout that every popular loader applies with scale 1.0: no alpha keys, alpha / rank folded
into B, one rank per file. `spec/lora_formats.md` sections 0, 2.0, 6.1 to 6.3.
"""

import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan.checkpoints import ModelError
from wan.lora import BLOCK_LINEARS, split_module
from wan.lora_metadata import OURS, AdapterInfo, metadata
from wan.safetensors_writer import data_sha256, file_hashes, legacy_hash, write_safetensors
from wan.variants import Expert

log = logging.getLogger(__name__)

PREFIX = "diffusion_model."
FACTORS = (".lora_A.weight", ".lora_B.weight")
SUFFIX_OF_EXPERT: dict[Expert, str] = {"high": "_high_noise", "low": "_low_noise", "single": ""}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MOST_ALPHA = 1e6  # section 6.4

FP16_MAX = 65504.0
FP16_SMALL = 6e-5  # below it fp16 is subnormal and loses digits
FP16_SMALL_SHARE = 0.01

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
    """A state of `wan.lora.adapter_state` as the tensors of a file: contiguous, on the CPU.

    `scale` (alpha / rank) goes into B in fp32 before the cast; ranks below `rank` are filled up
    with zeros, which changes nothing in B @ A. `ModelError` for what loaders, or the dtype, cannot
    hold; a warning if some kind of linear was never trained.
    """
    if dtype not in DTYPES:
        raise ModelError(f"adapters are exported as bf16, fp16 or fp32; found {dtype}")
    if not 0 < scale < math.inf:
        raise ModelError(f"the scale alpha / rank of an adapter must be positive; found {scale}")
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in _pairs(state).items():
        if a.shape[0] > rank:
            raise ModelError(f"{module} has rank {a.shape[0]}, above the adapter's rank {rank}")
        padded_a, padded_b = torch.zeros(rank, a.shape[1]), torch.zeros(b.shape[0], rank)
        padded_a[: a.shape[0]] = a
        padded_b[:, : b.shape[1]] = b.float() * scale
        for suffix, tensor in zip(FACTORS, (padded_a, padded_b), strict=True):
            # A NaN is both ends of its tensor; isfinite() would make three temporaries of each.
            if not all(math.isfinite(end) for end in tensor.aminmax()):
                raise ModelError(f"{module}{suffix} has NaN or infinite values: training diverged")
            tensors[f"{PREFIX}{_official(module)}{suffix}"] = tensor
    _warn_if_untrained(tensors)
    if dtype == torch.float16:
        _check_fp16(tensors)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def read_adapter(path: Path) -> tuple[dict[str, Tensor], int, dict[str, str]]:
    """(state with diffusers names in fp32, rank, metadata) of a file with official names.

    That is a file of ours, or one with lora_down, lora_up and alpha, as distilled adapters have.
    The scale is in B, so the state belongs to an adapter whose alpha equals its rank. `ModelError`
    if the file is missing, broken, of another layout, or (a file of ours) not what was written.
    """
    tensors, entries = _read(path)
    plain = _with_scale_in_b(tensors, path)
    state = {_diffusers_key(name, path): tensor for name, tensor in plain.items()}
    try:
        pairs = _pairs(state)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    if wrong := {tensor.dtype for tensor in tensors.values()}.difference(DTYPES):
        raise ModelError(f"{path} holds {wrong.pop()}; expected bf16, fp16 or fp32")
    ranks = sorted({a.shape[0] for a, _ in pairs.values()})
    if len(ranks) > 1:
        raise ModelError(f"{path} mixes the ranks {ranks}; expected one rank in the whole file")
    is_ours = f"{OURS}format_version" in entries
    if is_ours and entries.get("sshs_model_hash") != data_sha256(tensors):
        raise ModelError(f"{path} is damaged: its data do not have the hash of its header")
    return {name: tensor.float() for name, tensor in state.items()}, ranks[0], entries


def _with_scale_in_b(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names as ours, whatever the prefix; alpha / rank, where there is an alpha, goes into B."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        named = PREFIX + name if name.startswith("blocks.") else name
        if named.startswith(PREFIX):
            named = named.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")
        plain[named] = tensor
    for name in [name for name in plain if name.endswith(".alpha")]:
        a, b = (name.removesuffix(".alpha") + factor for factor in FACTORS)
        if a not in plain or b not in plain:
            raise ModelError(
                f"{path} has {name} without its lora_down and lora_up; take a whole file"
            )
        alpha = plain.pop(name).item()
        if not 0 < alpha <= MOST_ALPHA:
            raise ModelError(f"{path}: {name} is {alpha:g}; expected a number above 0")
        plain[b] = plain[b].float() * (alpha / plain[a].shape[0])
    return plain


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; expected an adapter's .safetensors file") from None
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error})") from None


def _pairs(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A (rank, in) and B (out, rank) of each module; `ModelError` names the first fault."""
    modules = dict.fromkeys(key.removesuffix(".weight").rpartition(".")[0] for key in state)
    if not modules:
        raise ModelError("the adapter is empty; expected tensors named <module>.lora_A.weight")
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    widths: dict[str, tuple[int, int]] = {}
    for module in modules:
        _official(module)
        a, b = (state.get(f"{module}{suffix}") for suffix in FACTORS)
        if a is None or b is None:
            raise ModelError(f"{module} needs both lora_A.weight and lora_B.weight; one is missing")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ModelError(
                f"{module}: lora_A is {tuple(a.shape)} and lora_B {tuple(b.shape)}; "
                "expected (rank, in) and (out, rank)"
            )
        linear, width = module.split(".", 2)[2], (b.shape[0], a.shape[1])
        if widths.setdefault(linear, width) != width:
            raise ModelError(f"{module} is {width}, in other blocks {widths[linear]} (out, in)")
        pairs[module] = (a, b)
    if extra := state.keys() - {f"{module}{suffix}" for module in pairs for suffix in FACTORS}:
        raise ModelError(f"{min(extra)} is no part of a plain LoRA without alpha keys")
    return pairs


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


def _diffusers_key(name: str, path: Path) -> str:
    """The key of a state for the name of a tensor in the file at `path`."""
    diffusers_name = {official: linear for linear, official in BLOCK_LINEARS.items()}
    pattern = rf"{re.escape(PREFIX)}(blocks\.\d+)\.(\w+\.\w+)(\.lora_[AB]\.weight)"
    found = re.fullmatch(pattern, name)
    if found is None or found[2] not in diffusers_name:
        raise ModelError(
            f"{path} has a tensor named {name!r}; expected a plain LoRA on the linears of blocks, "
            f"with names like '{PREFIX}blocks.0.{next(iter(diffusers_name))}{FACTORS[0]}'"
        )
    return f"{found[1]}.{diffusers_name[found[2]]}{found[3]}"


def _warn_if_untrained(tensors: dict[str, Tensor]) -> None:
    """A warning if B @ A is surely 0, as A or B is, for every module of some kind."""
    live: dict[str, bool] = {}
    for name, a in tensors.items():
        if name.endswith(FACTORS[0]):
            stem = name.removesuffix(FACTORS[0])
            linear = stem.split(".", 3)[3]
            b = tensors[f"{stem}{FACTORS[1]}"]
            live[linear] = live.get(linear, False) or bool(a.any() and b.any())
    dead = sorted(linear for linear, is_live in live.items() if not is_live)
    if dead:
        what = "the adapter" if len(dead) == len(live) else ", ".join(dead)
        log.warning("%s has no effect in any block (B @ A is 0): was it trained?", what)


def _check_fp16(tensors: dict[str, Tensor]) -> None:
    """`ModelError` if fp16 would overflow, or lose digits of many values (section 6.1 rule 2)."""
    sizes = [tensor.abs() for tensor in tensors.values()]
    largest = max(float(size.max()) for size in sizes)
    nonzero = sum(int(size.count_nonzero()) for size in sizes)
    small = sum(int(((size > 0) & (size < FP16_SMALL)).sum()) for size in sizes)
    if largest > FP16_MAX or small > FP16_SMALL_SHARE * nonzero:
        raise ModelError(
            f"the adapter does not fit into fp16: its largest value is {largest:.3g} (at most "
            f"{FP16_MAX:g}), {small / max(nonzero, 1):.1%} of its values are below {FP16_SMALL:g} "
            f"(at most {FP16_SMALL_SHARE:.0%}); export it as bf16 or fp32"
        )
