"""Checkpoints on the disk: whole or not there, checked before they are believed, old ones removed.

    outputs/NAME/checkpoints/step_000000500/
        NAME_000000500_high_noise.safetensors    the pair, to try
        NAME_000000500_low_noise.safetensors
        state_high.safetensors                   what training needs of each expert: adapter, EMA
        state_low.safetensors                    and optimizer, exactly
        state.json                               all that is no tensor
        config.yaml                              the settings
        SHA256SUMS                               of all of these; `sha256sum -c SHA256SUMS` reads it

There is no state of random generators in it: what is drawn is a function of (seed, place).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan.safetensors_writer import write_safetensors
from wan.variants import Expert

FORMAT = 1  # raise it when what is in a checkpoint changes
SUMS = "SHA256SUMS"
STATE = "state.json"
NAME = re.compile(r"step_(\d{9})")
PARTIAL = ".partial"  # the end of the name while one is written or removed


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been found sound."""

    path: Path
    state: Mapping[str, object]  # as JSON has it

    def tensors(self, expert: Expert) -> dict[str, Tensor]:
        """What training needs of an expert, by name; of an expert that was not trained nothing."""
        path = self.path / _tensor_file(expert)
        if not path.is_file():
            return {}
        with safe_open(path, framework="pt") as file:  # copies: the file may be removed meanwhile
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def checkpoint_name(done: int) -> str:
    """The name of the checkpoint after so many steps of the run."""
    return f"step_{done:09d}"


def step_of(checkpoint: Path) -> int:
    """After how many steps of the run a checkpoint was written, by its name."""
    found = NAME.fullmatch(checkpoint.name)
    assert found is not None, f"{checkpoint} is no checkpoint"
    return int(found[1])


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; whether they are sound is not looked at."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))
    return []


def write_checkpoint(
    folder: Path,
    done: int,
    tensors: Mapping[Expert, Mapping[str, Tensor]],
    state: Mapping[str, object],
    config: str,
    export: Callable[[Path], object],
) -> Path:
    """Write, read back, and only then let appear the checkpoint after `done` steps.

    `config` is YAML; `export` writes the pair into the folder it is given. `OSError`, and nothing
    but a partial folder is left, if the disk does not keep it.
    """
    target = folder / checkpoint_name(done)
    partial = folder / f".{target.name}{PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    export(partial)
    for expert, named in tensors.items():
        write_safetensors(partial / _tensor_file(expert), named, {})
    _write(partial / STATE, json.dumps(state))
    _write(partial / "config.yaml", config)
    sums = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
    _write(partial / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    _sync(partial)
    if problem := problem_with(partial):
        raise OSError(f"what was written to {partial} is not there: {problem}; check the disk")
    partial.rename(target)
    _sync(folder)
    return target


def problem_with(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if every byte is as it was written."""
    try:
        lines = (checkpoint / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        needed = {STATE, *(path.name for path in checkpoint.glob("state_*.safetensors"))}
        if missing := sorted(needed - sums.keys()):
            return f"{SUMS} does not list {missing[0]}"
        for name, digest in sums.items():
            if _sha256(checkpoint / name) != digest:
                return f"{name} holds other bytes than were written"
    except OSError as error:
        return f"{Path(error.filename or SUMS).name} cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        return f"{SUMS} holds other bytes than were written"
    return None


def read_checkpoint(checkpoint: Path) -> Checkpoint | str:
    """A sound checkpoint, or what is wrong with it."""
    if problem := problem_with(checkpoint):
        return problem
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        for path in checkpoint.glob("state_*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError) as error:
        return f"it cannot be read ({error})"
    if state.get("format") != FORMAT:
        return f"it is of format {state.get('format')}, and this version reads {FORMAT}"
    return Checkpoint(checkpoint, state)


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` and the one after step `best`, and what was left half done.

    What cannot be removed stays: it harms nothing.
    """
    for path in checkpoints_in(folder)[:-keep]:
        if step_of(path) != best:
            with suppress(OSError):
                _remove(path)
    for path in folder.glob(f".*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """First its name, so that no half of it is ever found."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old{PARTIAL}")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _tensor_file(expert: Expert) -> str:
    return f"state_{expert}.safetensors"


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in a folder outlast a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
