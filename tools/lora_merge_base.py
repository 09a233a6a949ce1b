"""`merge --into MODEL` of tools.lora: adapters added to a model's own weights.

W + strength * alpha / rank * B @ A in fp32, rounded once to what the model stores. Its files keep
their layout, names, dtypes and shards; fp8 keeps its scale, which grows only where a value would
not fit. In memory are one tensor and its factors. GGUF is refused: nothing here quantises to it.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from tools.lora_changes import MERGED_FROM
from wan.adapter_layouts import AdapterFile
from wan.adapter_names import diffusers_name
from wan.adapter_stream import READ_SIZE, TORCH_DTYPES, StrictHeader, read_strict_header
from wan.adapter_values import Factors
from wan.headers import ModelError
from wan.lora_metadata import OURS
from wan.model_files import hub_snapshot
from wan.recognise import Found
from wan.stored_tensors import (
    StoredTensor,
    read_stored,
    read_whole,
    stored_tensors,
    transformers_at,
)
from wan.variants import VARIANTS, Expert

Summands = Sequence[tuple[AdapterFile, float]]  # adapters and their strengths
Change = list[tuple[Factors, float]]  # of one linear

INPUT = "patch_embedding.weight"  # its channels tell text-to-video from image-to-video


def merge_into_models(
    place: Path, groups: Sequence[tuple[Expert | None, Summands]], out: Path
) -> list[str]:
    """Write the models at `place` to `out`, the adapters of each expert added; lines about it.

    `out` is a new folder, or a new .safetensors file if there is one file to write. All is there
    or nothing. `ModelError` if an adapter is not for its model, or if the disk is too small.
    """
    models = _models_for([expert for expert, _ in groups], place)
    summands = [group for _, group in groups]
    changes = [_changes(found, group) for found, group in zip(models, summands, strict=True)]
    files = [file for found in models for file in found.files]
    is_file = out.suffix == ".safetensors"
    if is_file and len(files) > 1:
        raise ModelError(f"--out {out} is one file, and the model has {len(files)}; give a folder")
    _check_room(out, files)
    root = hub_snapshot(place) if place.is_dir() else files[0].parent
    building = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        building.mkdir(parents=True)
        for found, group, change in zip(models, summands, changes, strict=True):
            for folder in {file.parent for file in found.files}:
                _copy_settings(found, folder, building / folder.relative_to(root))
            for file in found.files:
                _write_file(found, file, change, building / file.relative_to(root), _told(group))
        (building / files[0].relative_to(root) if is_file else building).rename(out)
    except OSError as error:
        raise ModelError(f"{out} cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    lines: list[str] = []
    for (expert, group), found, change in zip(groups, models, changes, strict=True):
        made = out if is_file else out / found.place.relative_to(root)
        lines += [f"{made} = {found.place} + {_told(group)}", f"  {len(change)} linears changed"]
        lines += [f"  to use it: model.{expert}={made}"] if expert in ("high", "low") else []
    return lines


def merged_weight(place: StoredTensor, change: Change) -> tuple[Tensor, Tensor | None]:
    """A linear's weight with the change added, as its file stores it, and its scale if it has one.

    `ModelError` if the sum does not fit into the dtype.
    """
    whole = read_whole(place)  # (out, in), fp32
    for factors, strength in change:
        whole.addmm_(factors.b.float() * (factors.scale * strength), factors.a.float())
    dtype = TORCH_DTYPES[place.tensor.dtype]
    largest = torch.finfo(torch.float32 if place.scale else dtype).max
    if not all(abs(float(end)) <= largest for end in whole.aminmax()):  # nor is NaN
        raise ModelError(
            f"{place.file}: {place.tensor.name} with the adapter does not fit into {dtype}; "
            "take a lower strength, or the model in bf16"
        )
    if place.scale is None:
        return whole.to(dtype), None
    return _quantised(whole, read_stored(place, place.scale), dtype)


def _quantised(whole: Tensor, old: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp8 values and their scale: the old one where all fits, so that nothing else is rounded."""
    rows = 1 if old.numel() == 1 else len(whole)
    parts = whole.reshape(rows, old.numel() // rows, -1)  # one scale for each
    largest = torch.finfo(dtype).max
    needed = parts.abs().amax(dim=2, keepdim=True) / largest
    scale = torch.maximum(old.float().reshape(needed.shape), needed).to(old.dtype)
    scale[scale == 0] = 1  # of zeros alone
    # The scale may have been rounded down: a value just above the largest is the largest.
    values = (parts / scale.float()).clamp_(-largest, largest).to(dtype)
    return values.reshape(whole.shape), scale.reshape(old.shape)


def _models_for(experts: Sequence[Expert | None], place: Path) -> list[Found]:
    """The model that each expert's adapters are added to; `ModelError` if none or two can be."""
    models = transformers_at(place)
    chosen: list[Found] = []
    for expert in experts:
        alone = next(iter(models)) if len(models) == 1 else None
        fits = alone is not None and (alone == "single" or expert in (None, "single"))
        found = models.get(expert) if expert else None
        if found is None and not fits:
            have = " and ".join(f"{model.place} ({name})" for name, model in models.items())
            raise ModelError(
                f"the adapter is of {expert or 'no told'} noise, and the model at {place} is "
                f"{have}: give the model's file of that expert as --into"
            )
        chosen.append(found or next(iter(models.values())))
    if len({found.files for found in chosen}) < len(chosen):
        raise ModelError(
            f"{place} is one transformer, and the pair needs two: give the folder that holds both, "
            "or merge each file by itself, without --pair"
        )
    for found in chosen:
        if found.files[0].suffix == ".gguf":
            raise ModelError(
                f"{found.place} is a GGUF ({found.storage}), which is read but not written: merge "
                "into the bf16 or fp8 file of the same model, and quantise that"
            )
    return chosen


def _changes(found: Found, summands: Summands) -> dict[str, Change]:
    """What is added to each weight, by the library's name; `ModelError` if the model lacks it."""
    changes: dict[str, Change] = {}
    for file, strength in summands:
        variant = VARIANTS.get(file.metadata.get(f"{OURS}variant", ""))
        channels = found.shapes[INPUT][1]
        if variant and variant.in_channels != channels:
            raise ModelError(
                f"{file.path} is for {variant.title}, whose model takes {variant.in_channels} "
                f"channels; {found.place} takes {channels}: give the model it was trained on"
            )
        for module, factors in file.modules.items():
            name = f"{diffusers_name(module)}.weight"
            width = (factors.b.shape[0], factors.a.shape[1])
            if found.shapes.get(name) != width:
                has = found.shapes.get(name, "no such linear")
                raise ModelError(
                    f"{file.path} is for another model than {found.place}: {module} is {width} "
                    f"(out, in) in the adapter, and {has} in the model"
                )
            changes.setdefault(name, []).append((factors, strength))
    return changes


def _check_room(out: Path, files: Sequence[Path]) -> None:
    """`ModelError` if something is at `out`, or if the files do not fit beside what is there."""
    if out.exists():
        raise ModelError(f"{out} exists; choose another place with --out")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    needed, free = sum(file.stat().st_size for file in files), shutil.disk_usage(folder).free
    if needed > free:
        raise ModelError(
            f"{folder} has {free / 1e9:.1f} GB free, the merged model needs {needed / 1e9:.1f} GB: "
            "make room, or choose another disk with --out"
        )


def _told(summands: Summands) -> str:
    return ", ".join(f"{file.path.stem}:{strength:g}" for file, strength in summands)


def _copy_settings(found: Found, folder: Path, target: Path) -> None:
    """What makes a folder of weights a model: its config, and the index of its shards."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in ("config.json", "*.safetensors.index.json" if len(found.files) > 1 else ""):
        for file in folder.glob(pattern) if pattern else ():
            shutil.copyfile(file, target / file.name)


def _write_file(
    found: Found, file: Path, changes: Mapping[str, Change], target: Path, told: str
) -> None:
    """One file of a model with its changed weights, everything else as it was."""
    header = read_strict_header(file)
    here = {name: p for name, p in stored_tensors(found).items() if p.file == file}
    changed = {name: place for name, place in here.items() if name in changes}
    rewritten = {p.tensor.name for p in changed.values()}
    rewritten |= {p.scale.name for p in changed.values() if p.scale}
    before = _header_bytes(header, told)
    with file.open("rb") as source, target.open("wb") as sink:
        sink.write(before)
        for tensor in header.tensors:
            if tensor.name not in rewritten:
                source.seek(len(header.before) + tensor.start)
                sink.seek(len(before) + tensor.start)
                _copy(source, sink, tensor.end - tensor.start)
        for name, place in changed.items():
            weight, scale = merged_weight(place, changes[name])
            _put(sink, len(before) + place.tensor.start, weight)
            if place.scale and scale is not None:
                _put(sink, len(before) + place.scale.start, scale)
        sink.flush()
        os.fsync(sink.fileno())


def _header_bytes(header: StrictHeader, told: str) -> bytes:
    """The header with what was merged, and without hashes of the data as they were."""
    metadata = {
        name: value
        for name, value in header.metadata.items()
        if not name.startswith("sshs_") and name != "modelspec.hash_sha256"
    }
    earlier = metadata.get(MERGED_FROM)
    metadata[MERGED_FROM] = f"{earlier}, {told}" if earlier else told
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    for tensor in header.tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy(source: BinaryIO, sink: BinaryIO, size: int) -> None:
    while size:
        piece = source.read(min(size, READ_SIZE))
        if not piece:
            raise ModelError("the model's file became shorter while it was read")
        sink.write(piece)
        size -= len(piece)


def _put(sink: BinaryIO, place: int, tensor: Tensor) -> None:
    sink.seek(place)
    sink.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
