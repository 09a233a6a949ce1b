"""What a finished run left in its folder: adapters, their hashes and metadata, losses, samples."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.compose import trained_experts, typed
from train.config import Config
from train.preview_plan import PreviewPlan, plan_previews
from train.rules import ConfigError
from wan.headers import ModelError
from wan.lora_format import SUFFIX_OF_EXPERT, read_adapter
from wan.lora_metadata import OURS
from wan.safetensors_writer import FileHashes, file_hashes
from wan.variants import VARIANTS, Expert, Variant

STRENGTHS = "strengths.json"  # in evaluation/, by tools.strength_sweep
SAMPLE = re.compile(r"\d+_adapters\.mp4")  # not those with the base model beside them


@dataclass(frozen=True)
class Adapter:
    """A file of the run, whole and as it was exported."""

    path: Path
    hashes: FileHashes
    size_bytes: int
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Loss:
    """Mean held-out loss of an expert without and with its adapter, and the latter's error."""

    base: float
    adapted: float
    standard_error: float


@dataclass(frozen=True)
class FinishedRun:
    """All that can be said about a run without its dataset and its model."""

    config: Config
    facts: Variant
    adapters: dict[Expert, Adapter]  # of the experts that were trained
    losses: dict[Expert, Loss]
    previews: PreviewPlan  # without the images, which may be elsewhere by now
    videos: list[Path]  # the last samples with adapters, in the order of the shots
    sheet: Path | None  # all of them beside the base model's

    @property
    def title(self) -> str:
        """What people call it."""
        return self.config.export.title or self.config.name


def read_run(folder: Path) -> FinishedRun:
    """What lies in the folder of a run; `ConfigError` or `ModelError` if something is missing."""
    config = read_config(folder / "config.yaml")
    facts = VARIANTS[config.model.variant]
    losses = _read_losses(folder / "summary.json")
    adapters: dict[Expert, Adapter] = {
        expert: _read_adapter(folder, config, expert) for expert in trained_experts(config)
    }
    samples = _last_samples(folder / "samples")
    sheet = samples / "sheet.png"
    return FinishedRun(
        config=config,
        facts=facts,
        adapters=adapters,
        losses=losses,
        previews=plan_previews(replace(config.preview, images=[]), facts, config.batch_size),
        videos=sorted(path for path in samples.glob("*.mp4") if SAMPLE.fullmatch(path.name)),
        sheet=sheet if sheet.is_file() else None,
    )


def read_config(path: Path) -> Config:
    """The settings of a run from its config.yaml; `ConfigError` if that is none of this version."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing; expected the folder of a run, such as outputs/demo")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        assert isinstance(merged, DictConfig), "a structured config stays one"
        return typed(merged)
    except (OmegaConfBaseException, ConfigError, TypeError, ValueError, yaml.YAMLError) as error:
        found = str(error).splitlines()[0]
        raise ConfigError(
            f"{path} is not as this version writes it ({found}); train the run again"
        ) from error


def _read_losses(path: Path) -> dict[Expert, Loss]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return {
            expert: Loss(base["mean"], adapted["mean"], adapted["standard_error"])
            for expert, base in summary["heldout_base"].items()
            for adapted in [summary["heldout_adapters"][expert]]
        }
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is missing: the run has not finished; train it to the end"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the summary of a run ({error}); train the run again"
        ) from error


def _read_adapter(folder: Path, config: Config, expert: Expert) -> Adapter:
    path = folder / f"{config.name}{SUFFIX_OF_EXPERT[expert]}.safetensors"
    _, _, entries = read_adapter(path)
    found = tuple(entries.get(f"{OURS}{key}", "") for key in ("variant", "expert"))
    if found != (config.model.variant, expert):
        raise ModelError(
            f"{path} says that it is for {' '.join(found).strip() or 'nobody'}, expected "
            f"{config.model.variant} {expert}; put back the file that the run exported"
        )
    return Adapter(path, file_hashes(path), path.stat().st_size, entries)


def _last_samples(folder: Path) -> Path:
    """The folder of the samples after the most steps, or where it would be."""
    steps = [path for path in folder.glob("step_*") if path.name[5:].isdigit()]
    return max(steps, key=lambda path: int(path.name[5:]), default=folder)


def recommended_strengths(run: Path, sha256: Mapping[Expert, str]) -> dict[Expert, float]:
    """What the newest sweep in a run's folder recommends for files with these hashes; else {}."""
    for path in sorted((run / "evaluation").glob(f"**/{STRENGTHS}"), reverse=True):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            of = {expert: found["adapters"][expert]["sha256"] for expert in sha256}
            strengths: dict[Expert, float] = {
                expert: float(found["recommended"][expert]) for expert in sha256
            }
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if of == dict(sha256):
            return strengths
    return {}
