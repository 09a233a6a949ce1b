"""A safetensors writer whose bytes are a function of what is written, and the hashes of such files.

The library's own writer orders the metadata anew in each process, so the same adapter would have
another SHA256 (and CivitAI AutoV2) at every export. `spec/lora_formats.md` sections 4.1, 4.6, 6.3.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

READ_SIZE = 1 << 20


@dataclass(frozen=True)
class FileHashes:
    """The hashes by which CivitAI and others know a file, in lower-case hex."""

    sha256: str
    autov2: str  # of the whole file, 10 digits
    autov3: str  # of the data after the header, 12 digits


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, the same bytes in each process, whole or not at all.

    Tensors must be contiguous, on the CPU and of a dtype of `DTYPE_NAMES`. The file is read back
    and compared to the bit before it takes its name; `OSError` if the disk did not keep it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for piece in serialised(tensors, metadata):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        _compare(temporary, tensors, metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def serialised(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The bytes of the file, piece by piece: length of the header, header, data."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in _file_order(tensors):
        tensor = tensors[name]
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    yield from _data(tensors)


def data_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the data section alone, 64 hex digits: known before the header that holds it."""
    digest = hashlib.sha256()
    for piece in _data(tensors):
        digest.update(piece)
    return digest.hexdigest()


def file_hashes(path: Path) -> FileHashes:
    """SHA256, AutoV2 and AutoV3 of a safetensors file on disk."""
    whole, data = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        whole.update(length + header)
        while piece := file.read(READ_SIZE):
            whole.update(piece)
            data.update(piece)
    return FileHashes(whole.hexdigest(), whole.hexdigest()[:10], data.hexdigest()[:12])


def legacy_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The oldest hash: 64 KiB at 1 MiB of the file with its `ss_` metadata only, 8 digits."""
    start, end = 0x100000, 0x110000
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    digest, offset = hashlib.sha256(), 0
    for piece in serialised(tensors, training):
        digest.update(piece[max(start - offset, 0) : max(end - offset, 0)])
        offset += len(piece)
    return digest.hexdigest()[:8]


def _file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The library's order: larger elements first, so that each is aligned; then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _data(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    for name in _file_order(tensors):
        yield _bits(tensors[name]).numpy().data


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat: what is written and compared, NaN and -0 included."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _compare(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`OSError` unless the file holds these tensors, to the bit, and this metadata."""
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise OSError(f"{path}: what was written cannot be read back ({error})") from None
    with file:
        if set(file.keys()) != set(tensors) or (file.metadata() or {}) != dict(metadata):
            raise OSError(f"{path}: the header read back is not what was written; check the disk")
        for name, tensor in tensors.items():
            read = file.get_tensor(name)
            same_kind = read.dtype == tensor.dtype and read.shape == tensor.shape
            if not same_kind or not torch.equal(_bits(read), _bits(tensor)):
                raise OSError(f"{path}: {name} read back is not what was written; check the disk")
