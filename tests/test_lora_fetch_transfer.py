"""One file from a server to the disk: broken, resumed, too large, wrong, in the way."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import FileServer, Reply, file_server

from tools.download import RemoteFile, downloaded, is_there
from tools.public_web import Patience, Site
from wan.headers import ModelError

BODY = bytes(range(256)) * 400
SHA256 = hashlib.sha256(BODY).hexdigest()
ETAG = {"ETag": '"one"'}
LIMIT = 1_000_000


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as running:
        yield running


def fetch(
    server: FileServer,
    folder: Path,
    sha256: str | None = SHA256,
    most_bytes: int = LIMIT,
    attempts: int = 3,
    timeout: float = 30,
) -> Path:
    """Download /file as fox.safetensors."""
    remote = RemoteFile(f"{server.origin}/file", "fox.safetensors", None, sha256)
    site = Site("Tiny Hub", server.origin, "TINY_TOKEN", "https://tiny.example/tokens")
    patience = Patience(timeout, attempts, 0, frozenset({server.origin}))
    target = folder / remote.name
    with downloaded(remote, target, site, most_bytes, patience) as file:
        assert not target.exists()
        assert file.read_bytes() == BODY
    return target


def failure(server: FileServer, folder: Path, **options: float | str | None) -> str:
    with pytest.raises(ModelError) as caught:
        fetch(server, folder, **options)  # type: ignore[arg-type]
    assert not (folder / "fox.safetensors").exists()
    return str(caught.value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("form", [{}, {"chunked": True}, {"length": False}, {"stays_open": True}])
def test_a_whole_file_arrives(server: FileServer, tmp_path: Path, form: dict[str, bool]) -> None:
    server.serve("/file", Reply(BODY, piece=1000, **form))  # type: ignore[arg-type]
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert names(tmp_path) == ["fox.safetensors"]
    assert "range" not in server.headers_of("/file")[0]


def test_what_comes_after_the_last_byte_is_not_read(server: FileServer, tmp_path: Path) -> None:
    told = {"Content-Length": str(len(BODY))}
    server.serve("/file", Reply(BODY + b"more", length=False, headers=told, piece=1000))
    fetch(server, tmp_path)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_transfer_that_breaks_goes_on_where_it_stopped(
    server: FileServer, tmp_path: Path, chunked: bool
) -> None:
    server.serve(
        "/file",
        Reply(BODY, headers=ETAG, cut=30_000, chunked=chunked),
        Reply(BODY, headers=ETAG, ranges=True, cut=1000),
        Reply(BODY, headers=ETAG, ranges=True),
    )
    fetch(server, tmp_path)
    asked = [(h.get("range"), h.get("if-range")) for h in server.headers_of("/file")]
    assert asked == [(None, None), ("bytes=30000-", '"one"'), ("bytes=31000-", '"one"')]


def test_the_next_call_goes_on_too(server: FileServer, tmp_path: Path) -> None:
    server.serve("/file", Reply(BODY, headers=ETAG, ranges=True, cut=20_000))
    told = failure(server, tmp_path, attempts=2)
    assert "2 attempts" in told
    assert "run the command again" in told
    assert (tmp_path / "fox.safetensors.part").stat().st_size == 40_000
    server.serve("/file", Reply(BODY, headers=ETAG, ranges=True))
    fetch(server, tmp_path)
    assert server.headers_of("/file")[-1]["range"] == "bytes=40000-"
    assert names(tmp_path) == ["fox.safetensors"]


def test_a_server_without_ranges_sends_it_anew(server: FileServer, tmp_path: Path) -> None:
    server.serve("/file", Reply(BODY, headers=ETAG, cut=50_000), Reply(BODY, headers=ETAG))
    fetch(server, tmp_path)
    assert server.headers_of("/file")[1]["range"] == "bytes=50000-"


def test_a_file_that_changed_meanwhile_is_begun_anew(server: FileServer, tmp_path: Path) -> None:
    server.serve(
        "/file",
        Reply(b"x" * 80_000, headers={"ETag": '"old"'}, cut=50_000),
        Reply(BODY, headers=ETAG, ranges=True),
    )
    fetch(server, tmp_path, sha256=None)  # no hash would tell
    assert server.headers_of("/file")[1]["if-range"] == '"old"'


def test_a_server_that_sends_another_part_is_not_believed(
    server: FileServer, tmp_path: Path
) -> None:
    wrong = {**ETAG, "Content-Range": f"bytes 10-{len(BODY) - 1}/{len(BODY)}"}
    server.serve(
        "/file",
        Reply(BODY, headers=ETAG, cut=100),
        Reply(BODY[10:], status=206, headers=wrong),
        Reply(BODY),
    )
    fetch(server, tmp_path, sha256=None)
    assert "range" not in server.headers_of("/file")[2]


@pytest.mark.parametrize("etag", [{}, {"ETag": 'W/"weak"'}])
def test_without_a_hash_and_an_etag_nothing_is_gone_on_with(
    server: FileServer, tmp_path: Path, etag: dict[str, str]
) -> None:
    broken = Reply(b"x" * len(BODY), headers=etag, cut=100)
    server.serve("/file", broken, Reply(BODY, headers=etag, ranges=True))
    fetch(server, tmp_path, sha256=None)
    assert "range" not in server.headers_of("/file")[1]


def test_a_part_of_another_file_is_not_gone_on_with(server: FileServer, tmp_path: Path) -> None:
    server.serve("/file", Reply(BODY, headers=ETAG, ranges=True, cut=100))
    failure(server, tmp_path, sha256="0" * 64, attempts=1)
    server.serve("/file", Reply(BODY, headers=ETAG, ranges=True))
    fetch(server, tmp_path)
    assert "range" not in server.headers_of("/file")[1]


def test_a_part_that_is_whole_is_enough(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "fox.safetensors.part").write_bytes(BODY)
    note = {"sha256": SHA256, "etag": '"one"'}
    (tmp_path / "fox.safetensors.part.json").write_text(json.dumps(note))
    server.serve("/file", Reply(BODY, headers=ETAG, ranges=True))
    fetch(server, tmp_path)
    assert len(server.asked) == 1


def test_a_part_that_is_too_long_is_begun_anew(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "fox.safetensors.part").write_bytes(BODY + b"more")
    note = {"sha256": SHA256, "etag": '"one"'}
    (tmp_path / "fox.safetensors.part.json").write_text(json.dumps(note))
    server.serve("/file", Reply(BODY, headers=ETAG, ranges=True))
    fetch(server, tmp_path)
    assert len(server.asked) == 2


@pytest.mark.parametrize("note", [b"", b"[]", b'{"sha256": 1}', b"\xff"])
def test_a_part_with_a_damaged_note_is_begun_anew(
    server: FileServer, tmp_path: Path, note: bytes
) -> None:
    (tmp_path / "fox.safetensors.part").write_bytes(b"whatever")
    (tmp_path / "fox.safetensors.part.json").write_bytes(note)
    server.serve("/file", Reply(BODY, ranges=True))
    fetch(server, tmp_path)
    assert "range" not in server.headers_of("/file")[0]


def test_a_wrong_hash_leaves_nothing(server: FileServer, tmp_path: Path) -> None:
    server.serve("/file", Reply(BODY))
    told = failure(server, tmp_path, sha256="ab" * 32)
    assert f"SHA256 {SHA256[:16]}…, Tiny Hub tells abababababababab…" in told
    assert names(tmp_path) == []


@pytest.mark.parametrize("form", [{}, {"chunked": True}, {"length": False}])
def test_a_file_over_the_limit_is_stopped(
    server: FileServer, tmp_path: Path, form: dict[str, bool]
) -> None:
    server.serve("/file", Reply(BODY, piece=1000, **form))  # type: ignore[arg-type]
    assert "--max-gb" in failure(server, tmp_path, most_bytes=len(BODY) - 1)
    assert names(tmp_path) == []
    fetch(server, tmp_path, most_bytes=len(BODY))


def test_a_length_that_no_disk_has_is_refused(server: FileServer, tmp_path: Path) -> None:
    server.serve("/file", Reply(b"", length=False, headers={"Content-Length": str(10**18)}))
    assert "free some space" in failure(server, tmp_path, most_bytes=10**19)


def test_a_server_that_hangs_is_given_up(server: FileServer, tmp_path: Path) -> None:
    server.serve("/file", Reply(BODY, wait=30, piece=1000))
    assert "timed out" in failure(server, tmp_path, attempts=2, timeout=0.3)
    assert len(server.asked) == 2


def test_a_server_that_trickles_is_given_up(server: FileServer, tmp_path: Path) -> None:
    server.serve("/file", Reply(BODY, wait=0.05, piece=1))
    assert "bytes came in" in failure(server, tmp_path, attempts=1, timeout=0.3)


def test_a_web_page_is_no_file(server: FileServer, tmp_path: Path) -> None:
    page = {"Content-Type": "text/html; charset=utf-8"}
    server.serve("/file", Reply(b"<html>sign in</html>", headers=page))
    assert "web page in place of the file" in failure(server, tmp_path)
    assert names(tmp_path) == []


def test_what_the_caller_refuses_is_removed(server: FileServer, tmp_path: Path) -> None:
    server.serve("/file", Reply(BODY + b"!"))
    remote = RemoteFile(f"{server.origin}/file", "fox.safetensors", None, None)
    site = Site("Tiny Hub", server.origin, "TINY_TOKEN", "")
    patience = Patience(local=frozenset({server.origin}))
    with (
        pytest.raises(ModelError, match="no adapter"),
        downloaded(remote, tmp_path / remote.name, site, LIMIT, patience),
    ):
        raise ModelError("no adapter")
    assert names(tmp_path) == []


def test_another_file_is_never_overwritten(server: FileServer, tmp_path: Path) -> None:
    target = tmp_path / "fox.safetensors"
    remote = RemoteFile("", "fox.safetensors", len(BODY), SHA256)
    assert not is_there(target, remote)
    target.write_bytes(BODY)
    assert is_there(target, remote)
    with pytest.raises(ModelError, match="no hash"):
        is_there(target, RemoteFile("", "fox.safetensors", len(BODY), None))
    target.write_bytes(b"mine")
    with pytest.raises(ModelError, match="another file; it is not overwritten"):
        is_there(target, remote)
    server.serve("/file", Reply(BODY))
    with pytest.raises(ModelError, match="not overwritten"):  # though it came during the transfer
        fetch_over(server, target)
    assert target.read_bytes() == b"mine"
    target.unlink()
    target.symlink_to("nowhere")
    with pytest.raises(ModelError, match="not overwritten"):
        is_there(target, remote)


def fetch_over(server: FileServer, target: Path) -> None:
    remote = RemoteFile(f"{server.origin}/file", target.name, None, SHA256)
    site = Site("Tiny Hub", server.origin, "TINY_TOKEN", "")
    with downloaded(remote, target, site, LIMIT, Patience(local=frozenset({server.origin}))):
        pass


def test_two_processes_do_not_write_one_file(server: FileServer, tmp_path: Path) -> None:
    server.serve("/file", Reply(BODY))
    target = tmp_path / "fox.safetensors"
    remote = RemoteFile(f"{server.origin}/file", target.name, None, SHA256)
    site = Site("Tiny Hub", server.origin, "TINY_TOKEN", "")
    with downloaded(remote, target, site, LIMIT, Patience(local=frozenset({server.origin}))):
        assert "being fetched by another process" in failure(server, tmp_path)
    assert names(tmp_path) == ["fox.safetensors"]


def test_a_full_disk_is_told_and_what_arrived_is_kept(server: FileServer, tmp_path: Path) -> None:
    server.serve("/file", Reply(BODY, headers=ETAG, ranges=True))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handled = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        told = failure(server, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handled)
    assert "cannot be written beyond 40,000 bytes" in told
    assert "goes on from there" in told
    fetch(server, tmp_path)
    assert server.headers_of("/file")[-1]["range"] == "bytes=40000-"


def test_a_killed_process_leaves_a_part_that_the_next_goes_on_with(
    server: FileServer, tmp_path: Path
) -> None:
    slow = Reply(BODY, headers=ETAG, ranges=True, wait=0.2, piece=2000)
    server.serve("/file", slow)
    script = (
        "import sys; from pathlib import Path\n"
        "from test_lora_fetch_transfer import *\n"
        "fetch(FileServer(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", script, server.origin, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parent, env=_environment()) as child:
        part = tmp_path / "fox.safetensors.part"
        while child.poll() is None and not (part.exists() and part.stat().st_size >= 4000):
            server.closing.wait(0.02)
        assert child.poll() is None
        child.kill()
    have = part.stat().st_size
    assert 4000 <= have < len(BODY)
    server.serve("/file", Reply(BODY, headers=ETAG, ranges=True))
    fetch(server, tmp_path)
    assert server.headers_of("/file")[-1]["range"] == f"bytes={have}-"
    assert names(tmp_path) == ["fox.safetensors"]


def _environment() -> dict[str, str]:
    root = Path(__file__).parent
    return os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root.parent}"}
