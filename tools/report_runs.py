"""What lies in the folder of a run, whatever state it is in: finished, under way, or killed.

Nothing but `config.yaml` must be there, and what is unknown is passed over, so that a report can
be made of any run, also of one by another version. Read, if there are any:

    metrics.jsonl                 figures by step; a last line that was cut off is left out
    summary.json                  of a finished run: edges of noise bins, seconds by phase
    checkpoints/step_N/           adapters, and state.json: versions, seconds, the best step
    dataset.json                  {"train": {"clips": 54, "shapes": {"13x64x64": 54}}, "heldout":
                                  {...}, "dropped": [{"name": ..., "reason": ...}], "notes": [...]}
    samples/step_N/               what `train.preview.save_samples` writes
    evaluation/**/sweep.json      [{"strengths": {"high": 0.4, "low": 1.0}, "prompt": ...,
                                  "seed": 0, "file": "00.mp4"}, ...], files beside it
    *.safetensors                 adapters
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, cast

import yaml
from safetensors import SafetensorError, safe_open

from train.rules import ConfigError
from wan.flow import TimestepLaw, bin_edges, expert_range
from wan.safetensors_writer import FileHashes, file_hashes
from wan.variants import VARIANTS, Expert

Points = list[tuple[int, float]]  # step and value, steps rising
EXPERTS: tuple[Expert, ...] = ("high", "low", "single")
STEP_FOLDER = re.compile(r"step_(\d+)")
STEP_FILE = re.compile(r".*_(\d{9})(_.*)?\.safetensors")


@dataclass(frozen=True)
class Export:
    """An adapter file; `hashes` is None if it cannot be read."""

    name: str
    size_bytes: int
    hashes: FileHashes | None
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class SweepEntry:
    """One video of a strength sweep."""

    strengths: Mapping[str, float]
    prompt: str
    seed: int
    file: Path


@dataclass(frozen=True)
class RunRecord:
    """All that is known of a run; what is not known is empty."""

    name: str  # of the folder: two runs may have the same name in their settings
    settings: Mapping[str, object]  # by dotted key
    figures: Mapping[str, Points]  # by the names of metrics.jsonl
    seconds: float  # of work, over all starts
    last_written: datetime | None
    finished: bool
    phases: Mapping[str, float]  # seconds
    edges: Mapping[Expert, list[float]]  # sigma at the edges of the noise bins
    dataset: Mapping[str, object]
    samples: Mapping[int, list[Path]]  # step -> videos with adapters, in the order of the shots
    compared: list[Path]  # the last videos that have the base beside the adapters, same order
    sweep: list[SweepEntry]
    exports: list[Export]
    checkpoints: Mapping[int, list[str]]  # step -> names of adapters
    best: int | None  # the step that the last checkpoint calls the best of the pair
    versions: Mapping[str, str]  # of what the last checkpoint was written by

    @property
    def experts(self) -> list[Expert]:
        """Those of whom there are figures, high first."""
        return [e for e in EXPERTS if any(f"/{e}/" in f"{key}/" for key in self.figures)]

    @property
    def step(self) -> int:
        """The last step with figures."""
        return max((points[-1][0] for points in self.figures.values()), default=0)

    @property
    def planned_steps(self) -> int:
        """The length of the run as it was configured, 0 if that cannot be told."""
        facts = VARIANTS.get(str(self.settings.get("model.variant")))
        named = self.settings.get("experts")
        experts = named if isinstance(named, list) else facts.experts if facts else ()
        steps = [self.settings.get(f"{expert}.steps") for expert in experts]
        return sum(count for count in steps if isinstance(count, int))


def read_record(folder: Path) -> RunRecord:
    """What is known of a run; `ConfigError` if this is not the folder of one."""
    settings = _settings(folder)
    metrics, summary = folder / "metrics.jsonl", _json(folder / "summary.json")
    figures, seconds = _figures(metrics)
    last = _last_state(folder / "checkpoints")
    tracker, best = last.get("tracker"), last.get("best")
    spent = summary.get("seconds") or (tracker.get("seconds") if isinstance(tracker, dict) else 0)
    versions = last.get("versions")
    samples = _samples(folder / "samples", "adapters")
    compared = _samples(folder / "samples", "base_and_adapters")
    written = datetime.fromtimestamp(metrics.stat().st_mtime, UTC) if metrics.is_file() else None
    return RunRecord(
        name=folder.resolve().name,
        settings=settings,
        figures=figures,
        seconds=seconds,
        last_written=written,
        finished=bool(summary),
        phases={name: value for name, value in numbers(spent) if value > 0},
        edges=_edges(summary, settings, figures),
        dataset=_json(folder / "dataset.json"),
        samples=samples,
        compared=compared[max(compared)] if compared else [],
        sweep=_sweep(folder / "evaluation"),
        exports=[_export(path) for path in sorted(folder.glob("*.safetensors"))],
        checkpoints=_checkpoints(folder / "checkpoints"),
        best=best if isinstance(best, int) else None,
        versions={str(k): str(v) for k, v in versions.items()}
        if isinstance(versions, dict)
        else {},
    )


def numbers(found: object) -> Iterator[tuple[str, float]]:
    """The finite numbers of a dictionary, whatever else may be in it, or in its place."""
    for name, value in found.items() if isinstance(found, dict) else ():
        if isinstance(value, (int, float)) and math.isfinite(value):
            yield str(name), float(value)


def _settings(folder: Path) -> dict[str, object]:
    path = folder / "config.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{folder} is not the folder of a run: there is no config.yaml in it; "
            "give one that training has made, such as outputs/demo"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        found = str(error).splitlines()[0]
        raise ConfigError(f"{path} cannot be read ({found}); put back what the run wrote") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds no settings; put back what the run wrote")
    return _of_its_experts(dict(_leaves(settings, "")))


def _of_its_experts(settings: dict[str, object]) -> dict[str, object]:
    """Without the settings of experts that the model does not have."""
    facts = VARIANTS.get(str(settings.get("model.variant")))
    absent = set(EXPERTS) - set(facts.experts) if facts else set()
    return {key: value for key, value in settings.items() if key.split(".")[0] not in absent}


def _leaves(settings: Mapping[object, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _json(path: Path) -> dict[str, object]:
    """The dictionary in a JSON file, empty if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _figures(path: Path) -> tuple[dict[str, Points], float]:
    """Figures by name, and the seconds of all starts together.

    A run that was resumed may have been some steps further before: what it did anew counts.
    """
    figures: dict[str, Points] = {}
    before, now = 0.0, 0.0
    for record in _records(path):
        step, entries = record.get("step"), dict(numbers(record))
        if not isinstance(step, int):
            continue
        seconds = entries.pop("seconds", now)
        before, now = (before + now if seconds < now else before), seconds
        for name, value in entries.items():
            points = figures.setdefault(name, [])
            while points and points[-1][0] >= step:
                points.pop()
            points.append((step, value))
    figures.pop("step", None)
    return figures, before + now


def _records(path: Path) -> Iterator[dict[str, object]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def _edges(
    summary: Mapping[str, object], settings: Mapping[str, object], figures: Mapping[str, Points]
) -> dict[Expert, list[float]]:
    """From the summary, or from the settings of a run that has none yet."""
    measured = summary.get("heldout_base")
    facts = VARIANTS.get(str(settings.get("model.variant")))
    base, shift = settings.get("timesteps.base"), settings.get("timesteps.shift")
    scale = settings.get("timesteps.scale", 1.0)
    edges: dict[Expert, list[float]] = {}
    for expert in EXPERTS:
        entry = measured.get(expert) if isinstance(measured, dict) else None
        bins = sum(name.startswith(f"heldout/{expert}/bin_") for name in figures)
        if isinstance(entry, dict) and isinstance(entry.get("edges"), list):
            edges[expert] = entry["edges"]
        elif (
            facts
            and bins
            and base in ("uniform", "logit_normal")
            and isinstance(shift, float)
            and isinstance(scale, float)
        ):
            law = TimestepLaw(cast("Literal['uniform', 'logit_normal']", base), shift, scale)
            edges[expert] = bin_edges(law, expert_range(facts.boundary, expert), bins).tolist()
    return edges


def _samples(folder: Path, kind: str) -> dict[int, list[Path]]:
    """Step -> videos of a kind, of the steps that have any."""
    found = {
        int(match[1]): sorted(p for p in path.glob("*.mp4") if re.fullmatch(rf"\d+_{kind}", p.stem))
        for path in folder.glob("step_*")
        if (match := STEP_FOLDER.fullmatch(path.name))
    }
    return {step: paths for step, paths in sorted(found.items()) if paths}


def _sweep(folder: Path) -> list[SweepEntry]:
    """The entries of the last sweep; a file beyond the sweep's own folder is none of it."""
    paths = sorted(folder.glob("**/sweep.json"))
    try:
        rows = json.loads(paths[-1].read_text(encoding="utf-8")) if paths else []
    except (OSError, ValueError):
        return []
    entries = []
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, dict) or not isinstance(row.get("seed"), int):
            continue
        home = paths[-1].parent.resolve()
        file = (home / str(row.get("file"))).resolve()
        if file.is_relative_to(home) and file.suffix == ".mp4" and file.is_file():
            strengths = dict(numbers(row.get("strengths")))
            entries.append(SweepEntry(strengths, str(row.get("prompt", "")), row["seed"], file))
    return entries


def _export(path: Path) -> Export:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return Export(path.name, path.stat().st_size, file_hashes(path), metadata)
    except (OSError, SafetensorError):
        return Export(path.name, path.stat().st_size, None, {})


def _checkpoints(folder: Path) -> dict[int, list[str]]:
    """The exported pairs by the step in their names; a version before had no folders for them."""
    found: dict[int, list[str]] = {}
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("step_*/*.safetensors")]):
        if match := STEP_FILE.fullmatch(path.name):
            name = str(path.relative_to(folder.parent))
            found.setdefault(int(match[1]), []).append(name)
    return dict(sorted(found.items()))


def _last_state(folder: Path) -> dict[str, object]:
    """What the newest checkpoint says of the run, empty if there is none."""
    paths = sorted(folder.glob("step_*/state.json"))
    return _json(paths[-1]) if paths else {}
