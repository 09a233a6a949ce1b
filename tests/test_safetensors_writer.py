import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from adapter_examples import INFO, RANK, random_state
from safetensors import safe_open
from torch import Tensor

from wan.lora_format import export_adapter, to_comfy
from wan.safetensors_writer import (
    file_hashes,
    legacy_hash,
    serialised,
    write_safetensors,
)


def comfy(blocks: int = 12) -> dict[str, Tensor]:
    return to_comfy(random_state(1, blocks), 1.0, RANK, torch.bfloat16)


def header_and_data(path: Path) -> tuple[bytes, bytes]:
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return whole[8:end], whole[end:]


def test_the_order_in_which_things_are_given_does_not_matter(tmp_path: Path) -> None:
    tensors, entries = comfy(2), {"format": "pt", "b": "2", "a": "1"}
    write_safetensors(tmp_path / "one", tensors, entries)
    write_safetensors(
        tmp_path / "two", dict(reversed(tensors.items())), dict(reversed(entries.items()))
    )
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_data_section_is_that_of_the_library(tmp_path: Path) -> None:
    tensors = comfy() | {"scale": torch.tensor(0.5), "a.half": torch.ones(3, dtype=torch.bfloat16)}
    write_safetensors(tmp_path / "ours", tensors, {"format": "pt"})
    safetensors.torch.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    (ours, data), (theirs, their_data) = (header_and_data(tmp_path / x) for x in ("ours", "theirs"))
    assert data == their_data
    assert json.loads(ours) == json.loads(theirs)


def test_the_header_is_padded_and_holds_only_text(tmp_path: Path) -> None:
    for title in ("", "x", "xy", '雪 "quoted"\n\\'):
        entries = {"format": "pt", "title": title}
        write_safetensors(tmp_path / "file", comfy(2), entries)
        header, _ = header_and_data(tmp_path / "file")
        assert len(header) % 8 == 0
        with safe_open(tmp_path / "file", framework="pt") as file:
            assert file.metadata() == entries


def test_the_hashes_of_a_file_made_by_hand(tmp_path: Path) -> None:
    path, header = tmp_path / "file", b'{"__metadata__":{}}     '
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    hashes = file_hashes(path)
    assert hashes.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert hashes.autov2 == hashes.sha256[:10]
    assert hashes.autov3 == "ba7816bf8f01"  # sha256 of "abc", as in FIPS 180


def test_the_hash_in_the_header_is_that_of_the_data(tmp_path: Path) -> None:
    exported = export_adapter(tmp_path, "fox", random_state(1), INFO, torch.bfloat16)
    _, data = header_and_data(exported.path)
    digest = hashlib.sha256(data).hexdigest()
    with safe_open(exported.path, framework="pt") as file:
        entries = file.metadata()
    assert entries["sshs_model_hash"] == digest == entries["modelspec.hash_sha256"][2:]
    assert exported.autov3 == digest[:12]
    assert exported.sha256 == hashlib.sha256(exported.path.read_bytes()).hexdigest()
    assert entries["sshs_legacy_hash"] == "e3b0c442"  # of nothing: the file is smaller than 1 MiB


def test_the_legacy_hash_is_of_64_kib_at_1_mib_with_training_entries_only() -> None:
    tensors = {"a": torch.arange(300_000).float(), "b": torch.arange(50_000).float()}
    whole = b"".join(serialised(tensors, {"ss_seed": "7"}))
    expected = hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]
    assert legacy_hash(tensors, {"ss_seed": "7", "modelspec.title": "x"}) == expected != "e3b0c442"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fox.safetensors"
    write_safetensors(path, comfy(2), {})
    before = path.read_bytes()
    with pytest.raises(KeyError, match="complex64"):
        write_safetensors(path, {"a": torch.zeros(3, dtype=torch.complex64)}, {})
    for place, message in ((9, "cannot be read back"), (len(before) - 1, "read back is not what")):

        def failing_disk(descriptor: int, place: int = place) -> None:
            os.pwrite(descriptor, b"#", place)

        monkeypatch.setattr(os, "fsync", failing_disk)
        with pytest.raises(OSError, match=message):
            write_safetensors(path, comfy(2), {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
