"""An adapter file read once, tensor by tensor: a strict header, then the data in the file's order.

Whatever the bytes are, there is an answer or a `ModelError`: a shared file may be cut short,
damaged or made to harm. Source: the format of the safetensors library;
`spec/lora_formats.md` section 4.1.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from wan.headers import AGAIN, GGUF_MAGIC, ModelError, read_header

MOST_HEADER = 8 << 20  # bytes, which take most of a second to parse; an adapter has 0.3 MB
MOST_ENTRIES = 20_000  # a LoHa with alpha on all linears of A14B has 2,035
MOST_DIMENSIONS = 8
READ_SIZE = 16 << 20  # bytes
MOST_NAME = 80  # characters of a name in a message
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """A tensor as the header declares it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the data
    end: int


@dataclass(frozen=True)
class StrictHeader:
    """A header that fits its file to the byte; tensors in the order of their data."""

    path: Path
    size: int  # bytes of the file
    before: bytes  # all that stands before the data
    tensors: tuple[Stored, ...]
    metadata: dict[str, str]


def read_strict_header(path: Path) -> StrictHeader:
    """The header of a safetensors file, with nothing left open; the data are not read.

    `ModelError` if the file is missing or is none, if its length is not what the header tells, and
    for names that come twice, unknown dtypes, data that overlap or leave a gap, and for more of
    anything than an adapter has.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ModelError(f"{path} is missing, or no file; expected an adapter's .safetensors")
        size, text = path.stat().st_size, _header_text(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from None
    if (count := text.count(b"{")) > MOST_ENTRIES:  # before they take their time to be parsed
        _refuse(path, f"a header of {count:,} entries (at most {MOST_ENTRIES:,} are read)")
    entries = _parsed(path, text)
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    found = [_stored(path, name, entry) for name, entry in entries.items()]
    tensors = tuple(sorted(found, key=lambda tensor: (tensor.start, tensor.end)))
    before = len(text).to_bytes(8, "little") + text
    _check_places(path, tensors, size - len(before))
    return StrictHeader(path, size, before, tensors, metadata)


class Digest(Protocol):
    """A hash as hashlib makes it."""

    def update(self, data: bytearray, /) -> None:
        """Take in more bytes."""


def stream_tensors(
    header: StrictHeader, digests: Sequence[Digest]
) -> Iterator[tuple[Stored, Iterator[Tensor]]]:
    """Each tensor with its values, flat, in pieces of at most READ_SIZE bytes.

    The digests have taken in all data of the file when this ends; pieces that nobody wants are
    read for them all the same. `ModelError` if the file shrinks meanwhile.
    """
    with header.path.open("rb") as stream:
        stream.seek(len(header.before))
        for tensor in header.tensors:
            pieces = _pieces(header.path, stream, tensor, digests)
            yield tensor, pieces
            for _ in pieces:
                pass


def _pieces(
    path: Path, stream: BufferedReader, tensor: Stored, digests: Sequence[Digest]
) -> Iterator[Tensor]:
    left = tensor.end - tensor.start
    while left:
        piece = bytearray(min(left, READ_SIZE))
        if stream.readinto(piece) != len(piece):
            raise ModelError(f"{path} became shorter while it was read")
        for digest in digests:
            digest.update(piece)
        left -= len(piece)
        yield torch.frombuffer(piece, dtype=torch.uint8).view(TORCH_DTYPES[tensor.dtype])


def _header_text(path: Path) -> bytes:
    with path.open("rb") as stream:
        start = stream.read(9)
        if start[8:] != b"{":
            if not start.startswith(GGUF_MAGIC) and path.suffix != ".pth":
                read_header(path)  # says what the file is instead: empty, a web page, a pickle
            raise ModelError(f"{path} is not a safetensors file; expected an adapter's")
        length = int.from_bytes(start[:8], "little")
        if length > MOST_HEADER:
            _refuse(path, f"a header of {length:,} bytes (at most {MOST_HEADER:,} are read)")
        stream.seek(8)
        text = stream.read(length)
    if len(text) < length:
        raise ModelError(
            f"{path} is cut short: it ends within its header; the download is incomplete: {AGAIN}"
        )
    return text


def _parsed(path: Path, text: bytes) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content: dict[str, object] = {}
        for name, value in pairs:
            if name in content:
                raise ValueError(f"the name {short(name)} comes twice")
            content[name] = value
        return content

    def no_number(value: str) -> NoReturn:
        raise ValueError(f"{value} is no number of a header")

    try:
        entries = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=no_number)
    except RecursionError:
        _refuse(path, "a header that is nested without end")
    except ValueError as error:
        _refuse(path, f"a header that cannot be read ({str(error)[:200]})")
    if not isinstance(entries, dict):
        _refuse(path, "a header that is no table of tensors")
    return entries


def _metadata(path: Path, content: object) -> dict[str, str]:
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        _refuse(path, "metadata that are not all text")
    return content


def _stored(path: Path, name: str, entry: object) -> Stored:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]}:
            pass
        case _:
            _refuse(path, f"an entry {short(name)} without dtype, shape and data_offsets")
    if dtype not in TORCH_DTYPES:
        _refuse(path, f"a tensor {short(name)} of the dtype {short(dtype)}")
    if len(shape) > MOST_DIMENSIONS or not all(_is_count(n) for n in [*shape, start, end]):
        _refuse(path, f"a tensor {short(name)} whose shape or place is no list of whole numbers")
    if prod(shape) * TORCH_DTYPES[dtype].itemsize != end - start:
        _refuse(path, f"a tensor {short(name)} whose shape and place do not agree")
    return Stored(name, dtype, tuple(shape), start, end)


def _is_count(value: object) -> bool:
    """Whether this is a whole number from 0 to what a file's length can be."""
    return type(value) is int and 0 <= value < 1 << 63


def _check_places(path: Path, tensors: tuple[Stored, ...], size: int) -> None:
    """Refuse data that overlap, leave a gap or end elsewhere than the file."""
    place = 0
    for tensor in tensors:
        if tensor.start != place:
            what = "overlap those before" if tensor.start < place else "leave a gap"
            _refuse(path, f"a tensor {short(tensor.name)} whose data {what}")
        place = tensor.end
    if place > size:
        raise ModelError(
            f"{path} is cut short: it has {size:,} of {place:,} bytes of data; the download is "
            f"incomplete: {AGAIN}"
        )
    if place < size:
        _refuse(path, f"{size - place:,} bytes after the last tensor")


def short(name: str) -> str:
    """A name from a file as it can stand in a message: no control characters, not endless."""
    return repr(name if len(name) <= MOST_NAME else f"{name[:MOST_NAME]}…")


def _refuse(path: Path, found: str) -> NoReturn:
    raise ModelError(f"{path} has {found}: it is damaged or not to be trusted; {AGAIN}")
