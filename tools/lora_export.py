"""`export` of tools.lora: the adapters of a run, after any checkpoint, in any layout.

Values come from the fp32 state of the checkpoint, so that they are rounded once. Where there is no
state, or training moved other values than are to be used (a schedule-free optimizer), they come
from the files that the run itself exported.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from torch import Tensor
from yaml import YAMLError

from tools.lora_files import DTYPES, convert_file, how_to_load, new_file
from train.checkpoint import checkpoints_in, problem_with, step_of
from wan.adapter_choices import Kind, scale_of
from wan.adapter_layouts import DORA, AdapterFile, read_any
from wan.adapter_names import Layout, diffusers_name
from wan.headers import ModelError
from wan.lora_format import SUFFIX_OF_EXPERT, write_state
from wan.lora_metadata import OURS
from wan.recognise import expert_by_name
from wan.variants import Expert

PREFIX = {"live": "adapter.", "ema": "ema."}  # of their names in a state
MAGNITUDE = ".lora_magnitude_vector.weight"
MEASURED = (f"{OURS}heldout_loss", f"{OURS}best_heldout_loss")
SAME_DATA = "sshs_model_hash"


@dataclass(frozen=True)
class Saved:
    """What a run has saved of an expert at one moment."""

    expert: Expert
    files: dict[
        str, AdapterFile
    ]  # "live" or "ema" -> the file that was exported; the first is main
    state: Path | None  # all values in fp32, unless they are not what is to be used


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `export` to tools.lora."""
    parser = subparsers.add_parser("export", help="the files of a run, in any layout")
    parser.add_argument("folder", type=Path, metavar="RUN", help="outputs/NAME")
    parser.add_argument("--step", type=int, help="of a checkpoint; the finished run by default")
    parser.add_argument("--expert", choices=SUFFIX_OF_EXPERT, help="only this one")
    parser.add_argument("--weights", choices=PREFIX, help="those that the run exports by default")
    parser.add_argument("--layout", choices=get_args(Layout), default="comfy")
    parser.add_argument("--dtype", choices=DTYPES, help="that of the run's files by default")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.set_defaults(run=export)


def export(args: argparse.Namespace) -> None:
    """Write the adapters of a run, finished or after a step, and say how to load them."""
    dtype = DTYPES[args.dtype] if args.dtype else None
    written, base_model = [], ""
    for file in run_files(args.folder, args.step, args.expert):
        saved = _saved(args.folder, file, args.step)
        written.append(_export_one(saved, args.weights, args.layout, dtype, args.out))
        base_model = next(iter(saved.files.values())).metadata.get("ss_base_model_version", "")
    print("\n".join(how_to_load(written, args.layout, base_model)))


def run_files(folder: Path, step: int | None, expert: Expert | None = None) -> list[Path]:
    """The adapter files of a run, high first; `ModelError` if it has none (after that step)."""
    try:
        name = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "name")
    except (OSError, YAMLError) as error:
        name, found = None, str(error)
    else:
        found = "its config.yaml has no name"
    if not isinstance(name, str):
        raise ModelError(f"{folder} is not the folder of a run, outputs/NAME ({found})")
    checkpoints = folder / "checkpoints"
    stem = folder / name
    if step is not None:
        stem = checkpoints / f"step_{step:09d}" / f"{name}_{step:09d}"
    ends = [end for e, end in SUFFIX_OF_EXPERT.items() if expert in (None, e)]
    files = [stem.with_name(f"{stem.name}{end}.safetensors") for end in ends]
    existing = [file for file in files if file.is_file()]
    if not existing:
        steps = [step_of(path) for path in checkpoints_in(checkpoints)]
        known = f"there are checkpoints after --step {', '.join(map(str, steps))}"
        raise ModelError(
            f"{folder} has no {files[0].relative_to(folder)}; "
            + (known if steps else "the run has written no adapter yet")
        )
    return existing


def _saved(folder: Path, path: Path, step: int | None) -> Saved:
    """The files of an expert, and the state that they were made of."""
    expert = expert_by_name(path) or "single"
    end = f"{SUFFIX_OF_EXPERT[expert]}.safetensors"
    main = read_any(path, with_dora=True)
    files = {main.metadata.get(f"{OURS}weights", "live"): main}
    average = path.with_name(f"{path.name.removesuffix(end)}_ema{end}")
    if average.is_file():
        files["ema"] = read_any(average, with_dora=True)
    return Saved(expert, files, _state_of(folder, main, expert, step))


def _state_of(folder: Path, main: AdapterFile, expert: Expert, step: int | None) -> Path | None:
    """The state that a file was made of; of a finished run, in the newest checkpoint."""
    checkpoints = checkpoints_in(folder / "checkpoints")
    checkpoint = main.path.parent if step is not None else checkpoints[-1] if checkpoints else None
    if checkpoint is None or not (checkpoint / f"state_{expert}.safetensors").is_file():
        return None
    if problem := problem_with(checkpoint):
        raise ModelError(f"{checkpoint} is damaged: {problem}; choose another --step")
    optimizer = OmegaConf.select(OmegaConf.load(checkpoint / "config.yaml"), "optim.name")
    if "schedulefree" in str(optimizer):  # the values in training are not the average
        return None
    end = f"_{step_of(checkpoint):09d}{SUFFIX_OF_EXPERT[expert]}.safetensors"
    twin = next(
        (path for path in checkpoint.glob(f"*{end}") if f"_ema{end}" not in path.name), None
    )
    hashes = {
        read_any(path, with_dora=True).metadata[SAME_DATA] for path in (twin, main.path) if path
    }
    return checkpoint / f"state_{expert}.safetensors" if len(hashes) == 1 else None


def _export_one(
    saved: Saved, wanted: str | None, layout: Layout, dtype: torch.dtype | None, out: Path
) -> Path:
    main_weights, main = next(iter(saved.files.items()))
    weights = wanted or main_weights
    exported = saved.files.get(weights)
    if saved.state is None:
        if exported is None:
            raise ModelError(
                f"{main.path} holds {main_weights} weights, and no checkpoint has {weights} ones "
                f"that belong to it; leave out --weights, or train with export.weights={weights}"
            )
        return convert_file(exported, out, layout, dtype, outside_blocks=False)
    metadata = dict((exported or main).metadata)
    if exported is None:  # nobody has measured these
        metadata = {k: v for k, v in metadata.items() if k not in MEASURED}
        metadata[f"{OURS}weights"] = weights
    state = _values(saved.state, weights)
    _add_dora(state, exported, main.path, weights)
    name = main.path.stem.removesuffix(SUFFIX_OF_EXPERT[saved.expert])
    name += "" if weights == main_weights else f"_{weights}"
    target = new_file(out, name + SUFFIX_OF_EXPERT[saved.expert], layout)
    kept = next(iter(main.modules.values())).a.dtype
    target.parent.mkdir(parents=True, exist_ok=True)
    write_state(target, state, _scale(metadata), layout, dtype or kept, metadata)
    return target


def _values(path: Path, weights: str) -> dict[str, Tensor]:
    """The live or the averaged adapter in a state, by names of `wan.lora.adapter_state`."""
    prefix = PREFIX[weights]
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            values = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({error}); choose another --step") from None
    if not values:
        raise ModelError(f"{path} has no {weights} weights: the run was trained without lora.ema")
    return values


def _add_dora(
    state: dict[str, Tensor], exported: AdapterFile | None, path: Path, weights: str
) -> None:
    """Put in place of a DoRA's magnitudes the scales that loaders take.

    They need the base model, and so come from the file that the run exported beside the state.
    """
    magnitudes = [name for name in state if name.endswith(MAGNITUDE)]
    if magnitudes and exported is None:
        raise ModelError(
            f"{path} is a DoRA, whose file needs the base model: the run exported no {weights} "
            f"weights; train with export.weights={weights} or both"
        )
    for name in magnitudes:
        del state[name]
    if exported is not None:
        state |= {f"{diffusers_name(m)}.{DORA}": scale for m, scale in exported.dora.items()}


def _scale(metadata: Mapping[str, str]) -> float:
    """That of training, as our own files tell it."""
    kind, rank = metadata[f"{OURS}kind"], int(metadata[f"{OURS}original_rank"])
    return scale_of(cast("Kind", kind), rank, float(metadata[f"{OURS}original_alpha"]))
