"""Who makes which cache entry, when several processes fill one folder: locks on files.

A claim is an exclusive `flock` on a file named after the entry. The system drops it when its
process dies, however it dies, so nothing that is claimed is ever stuck. Where the file system has
no locks every claim is granted: work is then done twice, and never wrong.
"""

import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from data.items import DataError

NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}


@dataclass(frozen=True)
class Claim:
    """The right to make one entry, until it is released."""

    path: Path
    descriptor: int

    def release(self) -> None:
        """Let others see that the entry is made, or that it can be made by them."""
        # While it is held, so that nobody claims a file that is gone.
        self.path.unlink(missing_ok=True)
        # By word, since a process forked in the meantime holds a copy of the descriptor.
        _flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)


def try_claim(path: Path) -> Claim | None:
    """Claim what the lock file `path` stands for; None while another process has claimed it.

    `DataError` if the lock file cannot be made.
    """
    while True:
        descriptor = _open(path)
        if not _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            os.close(descriptor)
            return None
        # The file that was opened may be gone: its owner removes it before letting go.
        if _is_at(descriptor, path):
            return Claim(path, descriptor)
        os.close(descriptor)


def wait_for_release(path: Path) -> None:
    """Return when nobody claims what `path` stands for, if only for a moment."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        _flock(descriptor, fcntl.LOCK_EX)
        _flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise DataError(
            f"cannot write {path} ({error.strerror}); free some space, or set another cache folder"
        ) from error


def _flock(descriptor: int, operation: int) -> bool:
    """Whether the lock was given; it is where there are no locks."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the file that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
