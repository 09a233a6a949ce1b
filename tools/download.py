"""One file from a site to the disk: resumed, limited, checked, and never over another file.

What has arrived lies in NAME.part, beside a note of what it is the beginning of. The file gets its
name when all of it is there, its hash is right and the caller has found nothing wrong with it.
"""

import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data.claims import try_claim
from tools.public_web import BrokenTransferError, Patience, Site, opened, pieces, retried
from wan.headers import ModelError

PROGRESS_EVERY = 0.5  # seconds


@dataclass(frozen=True)
class RemoteFile:
    """A file as its site tells of it."""

    url: str
    name: str  # fit for this disk
    size: int | None  # bytes; CivitAI rounds it
    sha256: str | None  # None if the site knows none


@dataclass(frozen=True)
class _Part:
    """The beginning of a file, and the note that says of which."""

    path: Path
    stream: BinaryIO
    note: Path
    remote: RemoteFile

    def remember(self, etag: str) -> None:
        """Note what the part is of, before its first byte."""
        self.note.write_text(json.dumps({"sha256": self.remote.sha256, "etag": etag}))

    def known_etag(self) -> str | None:
        """The ETag of what has arrived, "" if there is none; None if it is of another file."""
        try:
            note = json.loads(self.note.read_text())
            etag, sha256 = str(note["etag"]), note["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return etag if sha256 == self.remote.sha256 and (etag or sha256) else None


def is_there(target: Path, remote: RemoteFile) -> bool:
    """Whether this very file is on the disk; `ModelError` if another one has its name."""
    if not target.exists() and not target.is_symlink():
        return False
    if not target.is_file() or remote.sha256 is None or sha256_of(target) != remote.sha256:
        known = "another file" if remote.sha256 else "perhaps another file (the site tells no hash)"
        raise ModelError(
            f"{target} exists and is {known}; it is not overwritten: move it, or name another "
            "folder with --to"
        )
    return True


@contextmanager
def downloaded(
    remote: RemoteFile, target: Path, site: Site, most_bytes: int, patience: Patience
) -> Iterator[Path]:
    """Bring a file; it is given under a name for the time being, and gets its own afterwards.

    A transfer that broke off goes on where it stopped, now or at the next call. `ModelError` if it
    cannot be had, is larger than `most_bytes`, or has another hash than the site tells; if the
    caller raises one nothing of the file is left.
    """
    claim = try_claim(target.with_name(f"{target.name}.lock"))
    if claim is None:
        raise ModelError(f"{target} is being fetched by another process")
    path = _part_path(target)
    note = target.with_name(f"{target.name}.part.json")
    arrived = False
    try:
        with path.open("ab", buffering=0) as stream:
            part = _Part(path, stream, note, remote)
            retried(lambda: _transfer(part, site, most_bytes, patience), patience)
            os.fsync(stream.fileno())
        arrived = True
        _check_hash(path, remote, site)
        yield path
        is_there(target, remote)  # another may have come in the meantime
        path.rename(target)
        note.unlink(missing_ok=True)
    except ModelError:
        if arrived or not path.stat().st_size:  # nothing that could be gone on with
            path.unlink()
            note.unlink(missing_ok=True)
        raise
    except OSError as error:
        raise ModelError(f"{target} cannot be written ({error.strerror})") from None
    finally:
        claim.release()


def still_needed(target: Path, remote: RemoteFile) -> int:
    """Bytes that have not arrived yet, as far as the site tells."""
    part = _part_path(target)
    have = part.stat().st_size if part.exists() else 0
    return max(0, (remote.size or 0) - have)


def check_space(folder: Path, needed: int) -> None:
    """`ModelError` if the folder's disk has no room for so many bytes."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ModelError(
            f"{folder} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed: free some "
            "space, or name another folder with --to"
        )


def check_size(remote: RemoteFile, size: int, most_bytes: int) -> None:
    """`ModelError` if a file is larger than the user wants."""
    if size > most_bytes:
        raise ModelError(
            f"{remote.name} has {size / 1e9:.2f} GB, the limit is {most_bytes / 1e9:.2f} GB: if "
            "you want it, set a higher one with --max-gb"
        )


def sha256_of(file: Path) -> str:
    """The SHA256 of a file's bytes, in lower case."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _part_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _transfer(part: _Part, site: Site, most_bytes: int, patience: Patience) -> None:
    """Bring what is missing of a part, in one connection."""
    etag = part.known_etag()
    if etag is None:
        part.stream.truncate(0)
    have = part.stream.seek(0, 2)
    asked = {"Range": f"bytes={have}-"} if have else {}
    asked |= {"If-Range": etag} if have and etag else {}
    with opened(part.remote.url, site, asked, patience) as response:
        if response.status == 416 and _numbers(response) == (None, have):
            return  # all of it had arrived
        start = _numbers(response)[0] if response.status == 206 else 0
        if response.status == 416 or start not in (0, have):
            part.stream.truncate(0)
            raise BrokenTransferError("the file has changed since it was begun")
        if start == 0:
            part.stream.truncate(0)
            etag = response.headers.get("ETag", "")
            part.remember("" if etag.startswith("W/") else etag)
        _check_page(response, site)
        total = start + response.length if response.length is not None else None
        if total is not None:
            _fitting(part, total, most_bytes)
            check_space(part.path.parent, total - start)
        _receive(part, response, total, most_bytes, patience)


def _receive(
    part: _Part,
    response: http.client.HTTPResponse,
    total: int | None,
    most_bytes: int,
    patience: Patience,
) -> None:
    begun = shown = time.monotonic()
    first = done = part.stream.seek(0, 2)
    for piece in pieces(response, patience):
        done += len(piece)
        _fitting(part, done, most_bytes)
        _write(part, piece)
        if sys.stderr.isatty() and time.monotonic() - shown > PROGRESS_EVERY:
            shown = time.monotonic()
            of = f" of {total / 1e6:,.1f}" if total else ""
            speed = (done - first) / 1e6 / (shown - begun)
            sys.stderr.write(f"\r{done / 1e6:,.1f}{of} MB, {speed:,.1f} MB/s\033[K")
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")


def _write(part: _Part, piece: bytes) -> None:
    try:
        while piece:
            piece = piece[part.stream.write(piece) :]
    except OSError as error:
        kept = part.path.stat().st_size
        raise ModelError(
            f"{part.path} cannot be written beyond {kept:,} bytes ({error.strerror}): free some "
            "space and run the command again; it goes on from there"
        ) from None


def _fitting(part: _Part, size: int, most_bytes: int) -> None:
    """Keep nothing of a file that is too large."""
    try:
        check_size(part.remote, size, most_bytes)
    except ModelError:
        part.stream.truncate(0)
        raise


def _numbers(response: http.client.HTTPResponse) -> tuple[int | None, int | None]:
    """(first byte, all bytes) of "bytes 7-99/100" or "bytes */100"; None where not told."""
    text = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", text.strip())
    first, total = found.groups() if found else (None, None)
    return (int(first) if first else None, int(total) if total else None)


def _check_page(response: http.client.HTTPResponse, site: Site) -> None:
    if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise ModelError(
            f"{site.name} answered with a web page in place of the file: it asks to sign in, or is "
            f"down. Try later, or make a token at {site.token_page} and set it as "
            f"{site.token_variable}"
        )


def _check_hash(path: Path, remote: RemoteFile, site: Site) -> None:
    found = sha256_of(path)
    if remote.sha256 not in (None, found):
        raise ModelError(
            f"{remote.name} has the SHA256 {found[:16]}…, {site.name} tells "
            f"{remote.sha256[:16]}…: it was damaged on the way or changed by somebody, and was "
            "removed; fetch it again"
        )
