"""Transformers on disk, tensor by tensor: where each lies, by the library's name, to be read alone.

`wan/weights.py` fills a model in one pass; here a tensor is read, changed and written back, or set
beside the same tensor of another file, whatever the order of either. Source: `spec/wan22.md`
sections 7.6 and 7.7.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wan.adapter_stream import TORCH_DTYPES, Stored, read_strict_header
from wan.dequantise import GgufTensor, dequantise_fp8, dequantise_gguf, gguf_tensors
from wan.headers import ModelError
from wan.key_names import library_name
from wan.model_files import hub_snapshot, scan, set_of
from wan.recognise import EXTRAS, SCALES, Found, expert_by_name, recognise
from wan.variants import Expert

MOST_LISTED = 3


def transformers_at(place: Path) -> dict[Expert, Found]:
    """The transformers in a file (with its other shards) or a folder, by what their names tell.

    One whose name tells no expert is "single". `ModelError` if there is none, if two are of one
    expert, or if a file is a pickle, which nothing here reads or writes.
    """
    place = hub_snapshot(place)
    if not place.exists():
        raise ModelError(f"{place} does not exist; expected a model's file or folder")
    if place.is_dir():
        scanned = scan(place)
        found = [model for model in scanned.found if model.kind == "transformer"]
        reasons = f": {'; '.join(scanned.problems[:MOST_LISTED])}" if scanned.problems else ""
    else:
        found, reasons = [recognise(set_of(place))], ""
        if found[0].kind != "transformer":
            raise ModelError(f"{place} is a {found[0].kind} of Wan; expected a transformer")
    models: dict[Expert, Found] = {}
    for model in found:
        if model.files[0].suffix == ".pth":
            raise ModelError(f"{model.place} is a pickle; take the safetensors file of this model")
        expert = expert_by_name(model.files[0]) or "single"
        if expert in models:
            raise ModelError(
                f"{models[expert].place} and {model.place} can both be meant; give one of them"
            )
        models[expert] = model
    if not models:
        raise ModelError(f"{place} holds no transformer of Wan{reasons}")
    return models


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, with its scale if it is fp8 that needs one."""

    file: Path
    data: int  # where the data begin in the file, in bytes
    tensor: Stored
    scale: Stored | None


def stored_tensors(found: Found) -> dict[str, StoredTensor]:
    """The tensors of a model in safetensors files, by the library's names.

    `ModelError` if a tensor and its scale are in two files, which no tool writes.
    """
    headers = [read_strict_header(file) for file in found.files]
    everywhere = {tensor.name for header in headers for tensor in header.tensors}
    stored: dict[str, StoredTensor] = {}
    for header in headers:
        here = {tensor.name: tensor for tensor in header.tensors}
        for name, tensor in here.items():
            if name.endswith(EXTRAS):
                continue
            scales = [name.removesuffix(".weight") + end for end in SCALES]
            scale = next((here[other] for other in scales if other in here), None)
            if scale is None and not everywhere.isdisjoint(scales):
                raise ModelError(
                    f"{header.path}: {name} has its scale in another file, which is not read; "
                    "take the model in one file"
                )
            library = library_name(name.removeprefix(found.prefix), found.kind, found.naming)
            stored[library] = StoredTensor(header.path, len(header.before), tensor, scale)
    return stored


def read_stored(place: StoredTensor, tensor: Stored) -> Tensor:
    """A tensor of the place's file (the weight or its scale) as it is stored, in memory."""
    # Read, not mapped: what is mapped counts as this process's memory until the file is closed.
    size, offset = tensor.end - tensor.start, place.data + tensor.start
    if not size:  # of which PyTorch takes no view
        return torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype])
    raw = torch.from_numpy(np.fromfile(place.file, np.uint8, size, offset=offset))
    return raw.view(TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)


def read_whole(place: StoredTensor) -> Tensor:
    """A tensor in fp32, made whole with its scale if it has one; always a copy."""
    tensor = read_stored(place, place.tensor)
    if not tensor.is_floating_point():
        raise ModelError(
            f"{place.file}: {place.tensor.name} is stored as {tensor.dtype}, a quantisation that "
            "is not read; take a file in bf16, fp16 or fp8"
        )
    if place.scale is None:
        return tensor.to(torch.float32)
    try:
        return dequantise_fp8(tensor, read_stored(place, place.scale))
    except ValueError as error:
        raise ModelError(
            f"{place.file}: {place.tensor.name} cannot be made whole ({error}); take a file in "
            "bf16, or in fp8 as ComfyUI, LightX2V or musubi-tuner write it"
        ) from None


def whole_readers(found: Found) -> Mapping[str, Callable[[], Tensor]]:
    """How to read each tensor of a model in fp32, by the library's name; GGUF as well."""
    file = found.files[0]
    if file.suffix == ".gguf":
        return {
            library_name(name.removeprefix(found.prefix), found.kind, found.naming): partial(
                _read_gguf, read
            )
            for name, read in gguf_tensors(file).items()
        }
    return {name: partial(read_whole, place) for name, place in stored_tensors(found).items()}


def _read_gguf(read: Callable[[], Tensor | GgufTensor]) -> Tensor:
    tensor = read()
    if isinstance(tensor, GgufTensor):
        return dequantise_gguf(tensor, torch.float32)
    return tensor.float()
