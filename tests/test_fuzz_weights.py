"""Hostile weight files: recognised and read, or refused with a `ModelError`, whatever they hold."""

import json
import struct
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import pytest
import torch
from fuzzing import answer_or, assert_sentence, cases, damaged
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from wan.dequantise import GgufTensor
from wan.headers import ModelError, read_header
from wan.recognise import MARKS, Found, Weights, is_adapter, recognise
from wan.stored_tensors import whole_readers
from wan.weights import read_tensors

MODEL = {
    "patch_embedding.weight": torch.zeros(4, 2, 1, 2, 2),
    "time_projection.1.weight": torch.zeros(6, 4).to(torch.float8_e4m3fn),
    "time_projection.1.scale_weight": torch.ones(1),
    "blocks.0.self_attn.q.weight": torch.zeros(4, 4, dtype=torch.bfloat16),
}
NAMES = [
    *MODEL,
    *(mark for marks in MARKS.values() for mark in marks),
    "a",
    "",
    "\ud800",
    "é.lora_A",
]
DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL", "F64", "F4", "C64")
COUNTS = st.one_of(st.integers(0, 40), st.sampled_from([-1, 2**31, 2**62, 2**63, 2**64, 10**40]))
ANYTHING = st.recursive(
    st.one_of(COUNTS, st.none(), st.booleans(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@cache
def gguf_model() -> bytes:
    """A small transformer as ComfyUI-GGUF writes it."""
    with TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder, "a.gguf"), "wan")
        writer.add_token_list([f"token {i}" for i in range(20)])
        writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", [4, 2, 1, 2, 2])
        writer.add_tensor("patch_embedding.weight", np.zeros((4, 8), np.float32))
        block = gguf.quants.quantize(np.ones((3, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor("time_projection.1.weight", block, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Path(folder, "a.gguf").read_bytes()


@st.composite
def safetensors_headers(draw: st.DrawFn) -> bytes:
    """Tensors that lie behind each other, of any kind, a few things about them being wrong."""
    pairs: list[tuple[str, object]] = []
    place = 0
    names = [*draw(st.sampled_from([(), *MARKS.values()])), *draw(st.lists(st.sampled_from(NAMES)))]
    for name in names:
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 5), max_size=5))
        size = int(np.prod(shape)) * {"F32": 4, "F64": 8, "C64": 8, "F16": 2, "BF16": 2}.get(
            dtype, 1
        )
        entry: dict[str, object] = {"dtype": dtype, "shape": shape}
        entry["data_offsets"] = [place, place + size]
        place += size
        pairs.append((name, entry))
    for _ in range(draw(st.integers(0, 2)) if pairs else 0):
        name, entry = draw(st.sampled_from(pairs))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        if isinstance(entry, dict) and isinstance(entry.get(field), list) and entry[field]:
            index = draw(st.integers(0, len(entry[field]) - 1))
            entry[field][index] = draw(st.one_of(COUNTS, ANYTHING))
        elif isinstance(entry, dict):
            entry[field] = draw(ANYTHING)
    if draw(st.booleans()):
        pairs.append((draw(st.sampled_from(["__metadata__", "x"])), draw(ANYTHING)))
    text = ", ".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in pairs)
    nested = b"[" * draw(st.sampled_from([0, 0, 0, 5000]))
    header = b"{" + nested + text.encode() + b"}"
    length = draw(st.sampled_from([len(header)] * 8 + [0, len(header) - 1, 2**63]))
    missing = draw(st.sampled_from([0] * 5 + [1, -1]))
    return length.to_bytes(8, "little") + header + bytes(max(place - missing, 0))


@st.composite
def gguf_values(draw: st.DrawFn, depth: int = 0) -> tuple[int, bytes]:
    """(type, bytes) of a value of the metadata."""
    kind = draw(st.sampled_from([0, 4, 6, 7, 8, 9, 9, 10, 12, 13]))
    if kind == 8:
        return kind, _text(draw(st.text(max_size=4)))
    if kind != 9:
        return kind, draw(st.binary(min_size=8, max_size=8))[: 4 if kind in (4, 6) else 8]
    if depth > 2:
        count = draw(st.sampled_from([1, 16, 17, 2**32, 2**63]))
        return kind, struct.pack("<IQ", draw(st.integers(0, 13)), count)
    inner = [draw(gguf_values(depth + 1)) for _ in range(draw(st.integers(0, 3)))]
    head = struct.pack("<IQ", inner[0][0] if inner else 9, len(inner))
    levels = draw(st.sampled_from([0] * 9 + [2000]))  # arrays in arrays
    return kind, struct.pack("<IQ", 9, 1) * levels + head + b"".join(value for _, value in inner)


@st.composite
def gguf_files(draw: st.DrawFn) -> bytes:
    """A header of any entries and tensors, and some data."""
    keys = [
        "general.alignment",
        *(f"comfy.gguf.orig_shape.{name}" for name in MODEL),
        "a",
        "\u00e9",
    ]
    entries = [
        _text(draw(st.sampled_from(keys))) + struct.pack("<I", kind) + value
        for kind, value in draw(st.lists(gguf_values(), max_size=3))
    ]
    names = [
        "patch_embedding.weight",
        "time_projection.1.weight",
        *draw(st.lists(_NAMES, max_size=3)),
    ]
    tensors = []
    for name in names:
        shape = draw(st.lists(st.one_of(st.sampled_from([1, 2, 32, 64, 256]), _SIZES), max_size=6))
        kind = draw(st.one_of(st.sampled_from([0, 1, 2, 8, 12, 14, 30]), st.integers(0, 45)))
        place = draw(st.one_of(st.integers(0, 64), _SIZES))
        head = _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        tensors.append(head + struct.pack("<IQ", kind, place))
    counts = struct.pack("<QQ", len(tensors), len(entries))
    return b"GGUF\x03\0\0\0" + counts + b"".join(entries + tensors) + bytes(8192)


_SIZES = st.sampled_from([0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1])
_NAMES = st.sampled_from([*(name for name in NAMES if name != "\ud800"), "\x1b[2J"])


def _text(text: str) -> bytes:
    content = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(content)) + content


def read_everything(file: Path) -> Found:
    """What recognition and both readers make of a file, down to its last value."""
    read_header(file)
    is_adapter(file)
    found = recognise([file])
    part = "single" if found.kind == "transformer" else found.kind
    weights = Weights(part, (file,), found.naming, found.prefix, found.storage, {})
    assert all(isinstance(tensor, torch.Tensor | GgufTensor) for _, tensor in read_tensors(weights))
    for read in whole_readers(found).values():
        assert read().dtype == torch.float32
    return found


def check(content: bytes, suffix: str) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder, f"fuzzed{suffix}")
        file.write_bytes(content)
        answer_or(ModelError, lambda: read_everything(file))


@cases(0.5)
@given(damaged(save(MODEL, {"format": "pt"})))
def test_damaged_safetensors(content: bytes) -> None:
    check(content, ".safetensors")


@cases(0.5)
@given(safetensors_headers())
def test_hostile_safetensors_headers(content: bytes) -> None:
    check(content, ".safetensors")


@cases(0.5)
@given(damaged(gguf_model()))
def test_damaged_gguf(content: bytes) -> None:
    check(content, ".gguf")


@cases(0.5)
@given(gguf_files())
def test_hostile_gguf_headers(content: bytes) -> None:
    check(content, ".gguf")


def _tensor(name: str, dtype: object, shape: list[float], size: int) -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({name: entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def _gguf(entries: bytes, *tensors: bytes) -> bytes:
    counts = struct.pack("<QQ", len(tensors), bool(entries))
    return b"GGUF\x03\0\0\0" + counts + entries + b"".join(tensors) + bytes(64)


FOUND = {  # what was an exception, or steered the terminal, before the fuzzing found it
    "a list as dtype": _tensor("a", [], [1], 4),
    "a fraction in a shape": _tensor("a", "F32", [1.0], 4),
    "half a character": _tensor("\ud800", "F32", [1], 4),
    "an escape sequence": _tensor("\x1b[2J", "F32", [1], 4),
    "no length": bytes(8) + b'{"a": 1}',
    "alignment to 0": _gguf(_text("general.alignment") + struct.pack("<II", 4, 0)),
    "alignment to a text": _gguf(_text("general.alignment") + struct.pack("<I", 8) + _text("a")),
    "arrays in arrays": _gguf(_text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 2000),
    "no values": _gguf(b"", _text("a") + struct.pack("<IQIQ", 1, 0, 0, 0)),
    "half a block": _gguf(b"", _text("a") + struct.pack("<IQIQ", 1, 33, 8, 0)),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(FOUND[case])
    with pytest.raises(ModelError, match=r"damaged header|no.* safetensors file") as error:
        read_header(tmp_path / "a.safetensors")
    assert_sentence(str(error.value))


def test_the_undamaged_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(save(MODEL))
    (tmp_path / "a.gguf").write_bytes(gguf_model())
    assert read_everything(tmp_path / "a.safetensors").storage == "fp32"
    assert read_everything(tmp_path / "a.gguf").storage == "gguf Q8_0"
