"""What goes wrong while a cache is filled or read is named and mended, and never trained on."""

import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cache_examples import (
    Diary,
    Encoder,
    assert_right,
    ended,
    fill,
    image_clips,
    in_child,
    look,
    store_at,
    waits_for,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.buckets import Clip
from data.cache import CacheReport, Entries, Store, cache_latents, cache_text
from data.entries import write_entry
from data.items import DataError

SHM = Path("/dev/shm")
CLONE_NEWNS = 0x20000  # of linux/sched.h: a mount table of its own
NO_RIGHT = 77


@pytest.fixture
def clips(tmp_path: Path) -> list[Clip]:
    return image_clips(tmp_path / "media", 3)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_at(tmp_path / "cache")


def on_small_disk(folder: Path, work: Callable[[], None]) -> None:
    """Do this while `folder` is a file system of 256 KB, in a process that alone sees it so."""

    def mount_and_work() -> None:
        private = ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
        for command in (
            ["mount", "--make-rprivate", "/"],
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)],
        ):
            if not private or subprocess.run(command, capture_output=True, check=False).returncode:
                sys.exit(NO_RIGHT)
        work()

    (exit_code,) = ended([in_child(mount_and_work)])
    if exit_code == NO_RIGHT:
        pytest.skip("no right to mount a file system here")
    assert exit_code == 0


def filled(clips: list[Clip], store: Store, encoder: Encoder) -> Entries:
    return cache_latents(clips, look(clips, store.root), encoder.load, "vae", store)[0]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_in_the_header(path: Path) -> None:
    os.truncate(path, 20)


def flip_a_bit_of_the_data(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def turn_the_shape(path: Path) -> None:
    """The header says (1, 1, 32, 16) of what was (1, 1, 16, 32)."""
    path.write_bytes(path.read_bytes().replace(b"[1,1,16,32]", b"[1,1,32,16]"))


def change_the_recipe(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"vae", b"var"))


def put_another_in_its_place(path: Path) -> None:
    other = next(p for p in path.parents[1].rglob("*.safetensors") if p != path)
    path.write_bytes(other.read_bytes())


def save_as_another_kind(path: Path) -> None:
    with safe_open(path, framework="pt") as entry:
        save_file({"text": torch.zeros(2, 2)}, path, entry.metadata())


def save_in_two_dimensions(path: Path) -> None:
    with safe_open(path, framework="pt") as entry:
        save_file({"latents": torch.zeros(2, 2)}, path, entry.metadata())


FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (Path.unlink, "is missing"),
    (truncate, "cannot be read"),
    (empty, "cannot be read"),
    (cut_in_the_header, "cannot be read"),
    (flip_a_bit_of_the_data, "holds other bytes than were written"),
    (turn_the_shape, "holds other bytes than were written"),
    (change_the_recipe, "is that of something else"),
    (put_another_in_its_place, "is that of something else"),
    (save_as_another_kind, "holds no latents"),
    (save_in_two_dimensions, r"holds latents of shape \(2, 2\)"),
]


@pytest.mark.parametrize(("fault", "found"), FAULTS)
def test_damage_is_named_when_it_is_read_and_mended(
    clips: list[Clip], store: Store, fault: Callable[[Path], object], found: str
) -> None:
    said, encoder = [], Encoder()
    entries = filled(clips, replace(store, say=said.append), encoder)
    fault(entries.paths[1])
    assert_right(clips, entries)
    assert len(encoder.frames) == 4
    (line,) = said
    assert re.search(rf"1\.png: its latents in the cache {found}.*; encoding it again", line)
    assert entries.paths[1].name in line
    assert fill(clips, store)[0] == 0


@pytest.mark.parametrize("fault", [truncate, empty, put_another_in_its_place])
def test_damage_that_the_header_shows_is_found_at_the_start(
    clips: list[Clip], store: Store, fault: Callable[[Path], object]
) -> None:
    fault(filled(clips, store, Encoder()).paths[1])
    assert fill(clips, store)[1].reasons == {"damaged": 1}


def test_nan_of_a_valid_checksum_is_not_returned(clips: list[Clip], store: Store) -> None:
    said = []
    entries = filled(clips, replace(store, say=said.append), Encoder())
    write_entry(entries._entries[0], torch.full((1, 1, 16, 32), float("inf")))
    assert_right(clips, entries)
    assert "0.png: its latents in the cache holds NaN or infinity" in said[0]


def test_damaged_text_is_named_by_its_prompt(store: Store) -> None:
    said, encoder = [], Encoder()
    entries, _ = cache_text(["a ball"], encoder.load_text, "umt5", replace(store, say=said.append))
    flip_a_bit_of_the_data(entries.paths[0])
    assert torch.equal(entries.read(0), torch.ones(7, 2))
    assert said[0].startswith("the prompt 'a ball': its text in the cache holds other bytes")
    assert encoder.prompts == ["a ball"] * 2


def test_damage_is_an_error_where_nothing_may_be_encoded(clips: list[Clip], store: Store) -> None:
    filled(clips, store, Encoder())
    entries = filled(clips, replace(store, encode=False), Encoder())
    flip_a_bit_of_the_data(entries.paths[2])
    with pytest.raises(DataError, match=r"2\.png: .*holds other bytes .*tools\.cache"):
        entries.read(2)


def test_damage_is_an_error_when_the_file_has_changed(clips: list[Clip], store: Store) -> None:
    entries = filled(clips, store, Encoder())
    entries.paths[1].unlink()
    Image.new("L", (32, 16), 99).save(clips[1].item.path)
    with pytest.raises(DataError, match=r"1\.png has changed since this run began"):
        entries.read(1)
    clips[0].item.path.unlink()
    entries.paths[0].unlink()
    with pytest.raises(DataError, match=r"0\.png: cannot be opened"):
        entries.read(0)


def test_nan_while_mending_is_an_error(clips: list[Clip], store: Store) -> None:
    values = iter([1.0, float("nan")])
    entries, _ = cache_latents(
        clips[:1],
        look(clips, store.root),
        lambda: lambda _: torch.full((1, 1, 2, 2), next(values)),
        "vae",
        store,
    )
    truncate(entries.paths[0])
    with pytest.raises(DataError, match=r"0\.png: the encoder returned NaN"):
        entries.read(0)


@pytest.mark.parametrize(("workers", "moment"), [(0, 1), (0, 3), (2, 1), (2, 5)])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_stopped_run_goes_on_where_it_was(
    tmp_path: Path, workers: int, moment: int, sent: signal.Signals
) -> None:
    clips, store = image_clips(tmp_path / "media", 6), store_at(tmp_path / "cache", workers)
    facts, diary = look(clips, store.root), Diary(tmp_path / "diary")

    def encode(frames: Tensor) -> Tensor:
        diary.write("begun")
        if len(diary.lines()) == moment:
            signal.pause()
        return frames.float().mean(dim=-1)[None]

    child = in_child(lambda: cache_latents(clips, facts, lambda: encode, "vae", store) and None)
    waits_for(lambda: len(diary.lines()) == moment)
    waits_for(lambda: len([*store.root.glob("latents/*/*.safetensors")]) == moment - 1)
    assert child.pid is not None
    os.kill(child.pid, sent)
    assert ended([child]) == [-9 if sent == signal.SIGKILL else 1]
    assert fill(clips, store)[0] == 6 - (moment - 1)
    if sent == signal.SIGINT:
        assert not [*store.root.glob("locks/*")]


def test_run_killed_while_it_writes_leaves_nothing_half_written(
    clips: list[Clip], store: Store
) -> None:
    facts = look(clips, store.root)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the system ends it in the middle of a write
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        cache_latents(clips, facts, Encoder().load, "vae", store)

    assert ended([in_child(work)]) == [-signal.SIGXFSZ]
    partial = list(store.root.glob("latents/*/*"))  # several are written at a time
    assert {file.name[0] for file in partial} == {"."}
    assert max(file.stat().st_size for file in partial) == 1000
    assert fill(clips, store) == (3, CacheReport("latents", 3, 0, {"new": 3}))


def test_disk_that_fills_up_is_named_and_what_fits_is_kept(tmp_path: Path) -> None:
    clips, kept = image_clips(tmp_path / "media", 6), tmp_path / "kept"
    disk = tmp_path / "disk"
    disk.mkdir()

    def encode(frames: Tensor) -> Tensor:
        return frames.float().mean(dim=-1).expand(28, -1, -1, -1)  # 57 KB

    def work() -> None:
        store = store_at(disk / "cache")
        facts = look(clips, store.root)
        with pytest.raises(DataError, match=r"cannot write .*No space left.*free some space"):
            cache_latents(clips, facts, lambda: encode, "vae", store)
        assert not [*store.root.glob("latents/*/.*")]
        shutil.copytree(store.root, kept)

    on_small_disk(disk, work)
    fitted = len([*kept.glob("latents/*/*.safetensors")])
    assert 1 <= fitted <= 4
    report = cache_latents(clips, look(clips, kept), lambda: encode, "vae", store_at(kept))[1]
    assert report.reused == fitted


def test_write_that_is_cut_short_is_named(clips: list[Clip], store: Store) -> None:
    """Wherever one may not mount: a limit to the size of files makes every write end early."""
    facts = look(clips, store.root)
    diary = Diary(store.root / "diary")

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            cache_latents(clips, facts, Encoder().load, "vae", store)
        except DataError as error:
            diary.write(str(error))

    assert ended([in_child(work)]) == [0]
    assert "cannot write" in diary.lines()[0]
    assert not [*store.root.glob("latents/*/*")]
    assert fill(clips, store)[0] == 3


def test_folder_that_cannot_be_written_is_named(clips: list[Clip], tmp_path: Path) -> None:
    facts = look(clips, tmp_path / "elsewhere")
    (tmp_path / "cache").write_text("a file in the place of the folder")
    with pytest.raises(DataError, match=r"cannot write .*set another cache folder"):
        cache_latents(clips, facts, Encoder().load, "vae", store_at(tmp_path / "cache"))


def test_read_only_cache_is_read_and_what_is_missing_is_an_error(
    clips: list[Clip], store: Store
) -> None:
    store.root.mkdir()

    def work() -> None:
        facts = look(clips, store.root)
        cache_latents(clips[:2], facts, Encoder().load, "vae", store)
        subprocess.run(["mount", "-o", "remount,ro", str(store.root)], check=True)
        entries, _ = cache_latents(clips[:2], facts, Encoder().load, "vae", store)
        assert_right(clips[:2], entries)
        with pytest.raises(DataError, match=r"cannot write .*Read-only.*set another cache folder"):
            cache_latents(clips, facts, Encoder().load, "vae", store)

    on_small_disk(store.root, work)


@pytest.mark.skipif(not SHM.is_dir(), reason="there is no /dev/shm")
def test_cache_on_another_file_system(clips: list[Clip]) -> None:
    with tempfile.TemporaryDirectory(dir=SHM) as folder:
        if os.stat(folder).st_dev == clips[0].item.path.stat().st_dev:
            pytest.skip("/dev/shm is no file system of its own")
        store = store_at(Path(folder) / "cache", workers=1)
        assert fill(clips, store)[0] == 3
        assert fill(clips, store)[0] == 0
