"""metrics.jsonl: a line of JSON for each step that is logged, and none twice."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path


class MetricsFile:
    """Lines that reach the disk, if not at once then later: a full disk stops no training."""

    def __init__(
        self,
        path: Path,
        size: int | None,
        say: Callable[[str], None],
        waiting: Sequence[str] = (),
    ) -> None:
        """Go on after the first `size` bytes: what follows belongs to steps that are done again.

        None: after all that is there. Lines that were still `waiting` then come next.
        """
        self._path = path
        self._say = say
        self._waiting = list(waiting)
        self._told = False
        if size is not None and path.exists() and path.stat().st_size > size:
            os.truncate(path, size)

    def write(self, record: Mapping[str, object]) -> None:
        """Add a line. It waits for the next one if the file cannot be written now."""
        self._waiting.append(json.dumps(record) + "\n")
        self._flush(sync=False)

    def size(self) -> int:
        """Bytes that are on the disk for good."""
        self._flush(sync=True)
        return self._path.stat().st_size if self._path.exists() else 0

    def waiting(self) -> list[str]:
        """Lines that could not be written yet."""
        return list(self._waiting)

    def _flush(self, sync: bool) -> None:
        before = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)  # it may have been taken away
            with self._path.open("ab") as file:
                before = file.tell()
                file.write("".join(self._waiting).encode())
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            if before is not None:  # take back the part of a line that a full disk has kept
                with suppress(OSError):
                    os.truncate(self._path, before)
            if not self._told:
                self._say(
                    f"metrics    {self._path} cannot be written ({error.strerror}): they wait"
                )
            self._told = True
        else:
            self._waiting.clear()
            self._told = False


def read_metrics(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """The figures that were written, line by line, with their steps."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            yield record.pop("step"), {name: v for name, v in record.items() if name != "seconds"}
