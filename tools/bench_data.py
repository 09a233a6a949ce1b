"""How long a large dataset takes before anything is encoded, and in how much memory.

python -m tools.bench_data --lines 100000 --files 10000

writes so many rows into a manifest of each kind over so many small images (a temporary folder), and
prints, for each kind, the seconds to read it and the peak of memory; then the seconds to read all
files for the first time, and to verify them when nothing has changed.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image

from data.files import read_files
from data.items import Source
from data.sources import read_source

KINDS = ("jsonl", "csv", "parquet")


def main() -> None:
    """Make the files, read them, and print one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read_one(arguments.read)))
        return
    found: dict[str, object] = {"lines": arguments.lines, "files": arguments.files}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = write_images(root / "media", arguments.files)
        write_manifests(root, images, arguments.lines)
        for kind in KINDS:
            command = [sys.executable, "-m", "tools.bench_data", "--read", root / f"list.{kind}"]
            found[kind] = json.loads(subprocess.check_output(command))
        for name in ("first_reading_seconds", "unchanged_seconds"):
            if name == "first_reading_seconds":
                time.sleep(2.5)  # younger files are read again next time, as they may still change
            start = time.perf_counter()
            read_files(images, root / "cache", arguments.workers, _quiet)
            found[name] = round(time.perf_counter() - start, 2)
    print(json.dumps(found))


def write_images(folder: Path, count: int) -> list[Path]:
    """Small images that all differ."""
    folder.mkdir()
    paths = [folder / f"{index:06d}.png" for index in range(count)]
    for index, path in enumerate(paths):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def write_manifests(root: Path, images: list[Path], lines: int) -> None:
    """The same rows in each format."""
    rows = [
        {
            "path": images[index % len(images)].relative_to(root).as_posix(),
            "caption": f"picture {index} of a long and rather ordinary collection of pictures",
            "repeats": index % 3 + 1,
        }
        for index in range(lines)
    ]
    (root / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (root / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    Dataset.from_list(rows).to_parquet(root / "list.parquet")


def read_one(manifest: Path) -> dict[str, object]:
    """Seconds and memory of reading one manifest in this process."""
    start = time.perf_counter()
    reading = read_source(Source(manifest, "data.path"))
    return {
        "items": len(reading.items),
        "seconds": round(time.perf_counter() - start, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def _quiet(steps: Iterable[int], _: str) -> Iterable[int]:
    return steps


if __name__ == "__main__":
    main()
