"""Headers of weight files: what they declare, and what is no weight file at all."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wan.headers import ModelError, read_header


def header_of(places: dict[str, tuple[int, int]]) -> bytes:
    """The start of a safetensors file with fp32 tensors at these places."""
    entries = {
        name: {"dtype": "F32", "shape": [abs(end - start) // 4], "data_offsets": [start, end]}
        for name, (start, end) in places.items()
    }
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def nested_header(depth: int) -> bytes:
    text = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    return len(text).to_bytes(8, "little") + text


TENSORS = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}


def safetensors_file(folder: Path) -> Path:
    save_file(TENSORS, folder / "weights.safetensors", {"made": "here"})
    return folder / "weights.safetensors"


def pth_file(folder: Path) -> Path:
    torch.save(TENSORS, folder / "weights.pth")
    return folder / "weights.pth"


def gguf_file(folder: Path) -> Path:
    writer = gguf.GGUFWriter(folder / "weights.gguf", "wan")
    writer.add_token_list([f"token {i}" for i in range(40)])  # longer than what is kept
    writer.add_token_scores([0.5] * 40)
    writer.add_bool("flag", True)
    writer.add_float32("ratio", 0.5)
    writer.add_array("comfy.gguf.orig_shape.five", [2, 4, 1, 2, 2])
    writer.add_tensor("five", np.zeros((2, 16), dtype=np.float32))
    block = gguf.quants.quantize(np.ones((3, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("block", block, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "weights.gguf"


@pytest.mark.parametrize("make", [safetensors_file, pth_file])
def test_names_shapes_and_dtypes_are_read(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    header = read_header(make(tmp_path))
    found = {name: (t.dtype, t.shape, t.size) for name, t in header.tensors.items()}
    assert found == {"a": ("F32", (2, 3), 24), "b": ("BF16", (4,), 8)}


def test_metadata_of_safetensors_is_read(tmp_path: Path) -> None:
    assert read_header(safetensors_file(tmp_path)).metadata == {"made": "here"}


def test_gguf_shapes_are_as_pytorch_writes_them(tmp_path: Path) -> None:
    header = read_header(gguf_file(tmp_path))
    found = {name: (t.dtype, t.shape, t.size) for name, t in header.tensors.items()}
    assert found == {"five": ("F32", (2, 4, 1, 2, 2), 128), "block": ("Q8_0", (3, 64), 3 * 68)}
    assert header.metadata == {"general.architecture": "wan"}


def test_gguf_agrees_with_the_library(tmp_path: Path) -> None:
    file = gguf_file(tmp_path)
    library = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    ours = read_header(file).tensors
    assert ours.keys() == library.keys()
    assert all(ours[name].size == library[name].n_bytes for name in ours)
    assert ours["block"].shape == tuple(library["block"].shape[::-1])


@pytest.mark.parametrize("make", [safetensors_file, pth_file, gguf_file])
@pytest.mark.parametrize("kept", [0.97, 0.3])
def test_a_file_that_is_cut_short_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], kept: float
) -> None:
    file = make(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ModelError, match=rf"{file.name} .*cut short.*download it again"):
        read_header(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\): the download failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><head>", "is a web page, not weights"),
        (b"<html><body>401</body>", "is a web page, not weights"),
        (b"PK\x03\x04 archive", "is a pickle, which may run code"),
        (b"just some text, which is no header", "is not a safetensors file, whatever its name"),
        (b"\x05\0\0\0\0\0\0\0{]{]}", "has a damaged header"),
        (b'\x0d\0\0\0\0\0\0\0{"a": [1, 2]}', "has a damaged header"),
        (header_of({"a": (0, 8), "b": (4, 12)}) + bytes(12), "tensors that overlap or leave gaps"),
        (header_of({"a": (0, 8), "b": (16, 24)}) + bytes(24), "tensors that overlap or leave gaps"),
        (header_of({"a": (8, 0), "b": (0, 16)}) + bytes(16), "tensors that overlap or leave gaps"),
        (nested_header(100_000), "has a damaged header"),
        (b"\x02\0\0\0\0\0\0\0{}trailing", "has 18 bytes, its header tells of 10"),
        (b"GGUF\x09\0\0\0" + 16 * b"\0", "is GGUF version 9; versions 2 and 3 are read"),
        (b"GGUF\x03\0\0\0" + 8 * b"\xff" + 8 * b"\0", "has a damaged header: it is cut short"),
    ],
)
def test_what_is_no_weight_file_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_header(file)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    torch.save(TENSORS, file)
    with pytest.raises(ModelError, match="is a pickle, which may run code when read"):
        read_header(file)


class Trap:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self._path,)


def test_a_pth_that_would_run_code_does_not(tmp_path: Path) -> None:
    file = tmp_path / "trap.pth"
    sprung = tmp_path / "sprung"
    torch.save(TENSORS | {"trap": Trap(sprung)}, file)
    with pytest.raises(ModelError, match="holds more than tensors, which may run code"):
        read_header(file)
    assert not sprung.exists()


def test_a_pth_of_something_else_is_told(tmp_path: Path) -> None:
    torch.save([TENSORS["a"]], tmp_path / "list.pth")
    with pytest.raises(ModelError, match="holds no tensors by name, but list"):
        read_header(tmp_path / "list.pth")


def test_a_missing_file_and_a_broken_link_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none.safetensors is missing: the download"):
        read_header(tmp_path / "none.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(ModelError, match=r"missing \(a link to a file that is not there\)"):
        read_header(tmp_path / "link.safetensors")
