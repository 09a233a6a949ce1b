"""The tensors that a file declares, without their data: safetensors, GGUF and PyTorch's `.pth`.

A file that is not what its name says is told apart here: cut short, empty, a Git LFS pointer, a web
page. Sources: the formats' own specifications; `spec/wan22.md` sections 7.1, 7.6 and 7.7.
"""

import json
import pickle
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

AGAIN = "download it again"
MAX_HEADER = 100_000_000  # bytes: the limit of the safetensors library
MOST_NAME = 500  # characters: what names a tensor stands in messages
MOST_VALUES = 1 << 60  # of a tensor, and in a dimension: PyTorch counts in 63 bits
PICKLES = (".bin", ".pt", ".ckpt")
TORCH_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
GGUF_MAGIC = b"GGUF"
GGUF_VERSIONS = (2, 3)
GGUF_ALIGNMENT = 32  # bytes, unless general.alignment says otherwise
GGUF_SHAPE_KEY = "comfy.gguf.orig_shape."  # GGUF has four dimensions, the patch embedding five
GGUF_FORMATS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
GGUF_MOST_DIMENSIONS = 8
GGUF_LONGEST_KEPT = 16  # values of an array: a shape is kept, a vocabulary is passed over


class ModelError(ValueError):
    """A model that cannot be used: the message says which file, what it holds and what to do."""


@dataclass(frozen=True)
class TensorHeader:
    """What a file says about a tensor."""

    dtype: str  # as safetensors and GGUF write it: "F32", "BF16", "F8_E4M3", "Q4_K"
    shape: tuple[int, ...]
    size: int  # bytes
    offset: int = 0  # of a GGUF, from the start of the file


@dataclass(frozen=True)
class Header:
    """What a file says about itself."""

    tensors: dict[str, TensorHeader]
    metadata: dict[str, str] = field(default_factory=dict)  # its entries of text


def read_header(file: Path) -> Header:
    """The header of a weight file, checked against the file's length; no tensor is read.

    `ModelError` if the file is missing, cut short, or no safetensors, GGUF or `.pth` file.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(512)
            stream.seek(0)
            size = file.stat().st_size
            _check_start(file, start)
            if start.startswith(GGUF_MAGIC):
                return _read_gguf(file, stream, size)
            if file.suffix != ".pth":
                return _read_safetensors(file, stream, size)
    except FileNotFoundError:
        link = " (a link to a file that is not there)" if file.is_symlink() else ""
        raise ModelError(f"{file} is missing{link}: the download is incomplete; {AGAIN}") from None
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror})") from None
    return _read_pth(file)


def _check_start(file: Path, start: bytes) -> None:
    """Refuse what is no weight file at all, by its first bytes."""
    text = start.lstrip().lower()
    if not start:
        raise ModelError(f"{file} is empty (0 bytes): the download failed; {AGAIN}")
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(
            f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ModelError(
            f"{file} is a web page, not weights: the download was answered by a login or error "
            f"page; {AGAIN}, signed in if the site asks for it"
        )
    if file.suffix in PICKLES or (start.startswith(b"PK") and file.suffix != ".pth"):
        raise ModelError(
            f"{file} is a pickle, which may run code when read: it is refused; take the "
            "safetensors or GGUF file of the same model"
        )


def _read_safetensors(file: Path, stream: BinaryIO, size: int) -> Header:
    length = int.from_bytes(stream.read(8), "little")
    opening = stream.read(1)
    if opening != b"{" or not 0 < length <= MAX_HEADER:
        raise ModelError(f"{file} is not a safetensors file, whatever its name says; {AGAIN}")
    if 8 + length > size:
        raise _cut_short(file, size, 8 + length)
    try:
        entries = json.loads(opening + stream.read(length - 1))
        metadata = {str(k): str(v) for k, v in entries.pop("__metadata__", {}).items()}
        tensors, end = {}, 0
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            if not isinstance(dtype, str) or not _are_counts((first, last, *shape)):
                raise ValueError(f"{_checked_name(name)} has a dtype or numbers that are none")
            tensors[_checked_name(name)] = TensorHeader(dtype, shape, last - first)
            end = max(end, last)
        sizes = [0, *(tensor.size for tensor in tensors.values())]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} has a damaged header ({str(error)[:200]!a}); {AGAIN}") from None
    if end != sum(tensor.size for tensor in tensors.values()) or min(sizes) < 0:
        raise ModelError(
            f"{file} has a damaged header (tensors that overlap or leave gaps); {AGAIN}"
        )
    if (needed := 8 + length + end) > size:
        raise _cut_short(file, size, needed)
    if needed < size:
        raise ModelError(f"{file} has {size:,} bytes, its header tells of {needed:,}; {AGAIN}")
    return Header(tensors, metadata)


def _are_counts(numbers: Iterable[object]) -> bool:
    """Whether all are whole numbers that a file's sizes and a tensor's shape can have."""
    return all(type(number) is int and 0 <= number <= MOST_VALUES for number in numbers)


def _checked_name(name: str) -> str:
    """A tensor's name that can stand in a message; `ValueError` for any other."""
    if len(name) > MOST_NAME or not name.isprintable():
        raise ValueError("a tensor whose name is too long or cannot be printed")
    return name


def _read_pth(file: Path) -> Header:
    """Names and shapes of a state dict: on the meta device, tensors take no memory."""
    try:
        content = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{file} holds more than tensors, which may run code when read: it is refused; take "
            "the safetensors file of the same model"
        ) from None
    except (
        RuntimeError,
        EOFError,
        ValueError,
    ):  # for an archive that is cut short
        raise ModelError(f"{file} cannot be read: it is cut short or damaged; {AGAIN}") from None
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{file} holds no tensors by name, but {type(content).__name__}")
    tensors = {
        str(name): TensorHeader(_dtype_name(value.dtype), tuple(value.shape), value.nbytes)
        for name, value in content.items()
        if isinstance(value, torch.Tensor)
    }
    return Header(tensors)


def _dtype_name(dtype: torch.dtype) -> str:
    return TORCH_DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def _read_gguf(file: Path, stream: BinaryIO, size: int) -> Header:
    try:
        stream.seek(len(GGUF_MAGIC))
        version, count, entries = struct.unpack("<IQQ", stream.read(20))
        if version not in GGUF_VERSIONS:
            raise ModelError(f"{file} is GGUF version {version}; versions 2 and 3 are read")
        metadata = dict(_gguf_entry(stream) for _ in range(entries))
        found = [_gguf_tensor(stream, metadata) for _ in range(count)]
    except (struct.error, KeyError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"{file} has a damaged header: it is cut short, or not what its name says; {AGAIN}"
        ) from None
    alignment = metadata.get("general.alignment", GGUF_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= size:
        raise ModelError(f"{file} has a damaged header (it aligns to {alignment!r:.50}); {AGAIN}")
    start = -(-stream.tell() // alignment) * alignment
    tensors = {name: replace(tensor, offset=start + tensor.offset) for name, tensor in found}
    end = max((tensor.offset + tensor.size for tensor in tensors.values()), default=start)
    if end > size:
        raise _cut_short(file, size, end)
    return Header(tensors, {k: v for k, v in metadata.items() if isinstance(v, str)})


def _gguf_entry(stream: BinaryIO) -> tuple[str, object]:
    key = _gguf_text(stream)
    return key, _gguf_value(stream, GGUFValueType(_number(stream, "<I")))


def _gguf_value(stream: BinaryIO, kind: GGUFValueType) -> object:
    """A value of the metadata; of a long array None, as a vocabulary is of no use here."""
    if kind == GGUFValueType.STRING:
        return _gguf_text(stream)
    if kind != GGUFValueType.ARRAY:
        return _number(stream, GGUF_FORMATS[kind])
    element, length = GGUFValueType(_number(stream, "<I")), _number(stream, "<Q")
    if length <= GGUF_LONGEST_KEPT:
        return [_gguf_value(stream, element) for _ in range(length)]
    if element != GGUFValueType.STRING:
        stream.seek(length * struct.calcsize(GGUF_FORMATS[element]), 1)
        return None
    for _ in range(length):
        stream.seek(_number(stream, "<Q"), 1)
    return None


def _gguf_tensor(stream: BinaryIO, metadata: dict[str, object]) -> tuple[str, TensorHeader]:
    """The next tensor, its offset still that in the data; dimensions are stored in reverse."""
    name = _checked_name(_gguf_text(stream))
    dimensions = _number(stream, "<I")
    if dimensions > GGUF_MOST_DIMENSIONS:
        raise ValueError("a tensor of more dimensions than any")
    shape = struct.unpack(f"<{dimensions}Q", stream.read(8 * dimensions))[::-1]
    kind, offset = GGMLQuantizationType(_number(stream, "<I")), _number(stream, "<Q")
    values, block = GGML_QUANT_SIZES[kind]
    count = prod(shape)
    if not count or not _are_counts((*shape, count)):
        raise ValueError("a tensor without values, or of too many")
    size = count // values * block
    original = metadata.get(GGUF_SHAPE_KEY + name)
    if isinstance(original, list):
        if not _are_counts(original) or prod(original) != count:
            raise ValueError("a tensor whose two shapes do not agree")
        shape = tuple(original)
    if (shape[-1] if shape else 1) % values:
        raise ValueError("a tensor whose rows end within a block")
    return name, TensorHeader(kind.name, shape, size, offset)


def _gguf_text(stream: BinaryIO) -> str:
    length = _number(stream, "<Q")
    if length > MAX_HEADER:
        raise ValueError("a text longer than any")
    return stream.read(length).decode()


def _number(stream: BinaryIO, form: str) -> int:
    return struct.unpack(form, stream.read(struct.calcsize(form)))[0]


def _cut_short(file: Path, size: int, needed: int) -> ModelError:
    return ModelError(
        f"{file} is cut short: it has {size:,} of {needed:,} bytes; the download is incomplete: "
        f"{AGAIN}"
    )
