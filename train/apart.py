"""`launch=experts`: each expert is trained by a process of its own, on its own GPU or machine.

    outputs/NAME/high/   two runs, each of them whole: it is resumed, stopped and reported alone
    outputs/NAME/low/
    outputs/NAME/NAME_high_noise.safetensors   the newest adapter of each, as of its last previews;
    outputs/NAME/NAME_low_noise.safetensors    in the end the files to upload

The processes never speak to each other and never wait: previews take the other's newest file.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from train.compose import trained_experts
from train.config import Config
from train.rules import ConfigError
from wan.lora_format import SUFFIX_OF_EXPERT
from wan.variants import VARIANTS, Expert

OF_LAUNCHERS = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
KEPT = "WAN_LORA_"  # before their names: the next run of a sweep asks for them again


def is_apart(config: Config) -> bool:
    """Whether this process trains one expert, and another one the other."""
    return config.launch == "experts" and not config.dry_run


def own_run(config: Config) -> tuple[Config, int]:
    """The run of this process, and how many processes were launched.

    With `launch=experts` it is the run of one expert, on the GPU of this process; a launcher's
    variables are taken out of the environment, so that it is a run of one process in all respects.
    `ConfigError` unless there are as many processes as experts.
    """
    processes = _of_launcher("WORLD_SIZE", 1)
    if not is_apart(config):
        return config, processes
    experts = trained_experts(config)
    _check(config, experts, processes)
    expert = experts[_of_launcher("RANK", 0)]
    _take_gpu(_of_launcher("LOCAL_RANK", 0))
    for name in OF_LAUNCHERS & os.environ.keys():
        os.environ[f"{KEPT}{name}"] = os.environ.pop(name)
    folder = str(Path(config.output_dir) / expert)
    return replace(config, experts=[expert], output_dir=folder), processes


def _of_launcher(name: str, alone: int) -> int:
    """A number that the launcher has told; `alone` if there is no launcher."""
    return int(os.environ.get(name) or os.environ.get(f"{KEPT}{name}") or alone)


def _check(config: Config, experts: tuple[Expert, ...], processes: int) -> None:
    facts = VARIANTS[config.model.variant]
    if len(facts.experts) < 2:
        raise ConfigError(
            f"launch is experts, but {facts.title} has one expert. Leave launch out: all processes "
            "train it together."
        )
    if processes != len(experts):
        raise ConfigError(
            f"launch is experts, which takes a process for each of {' and '.join(experts)}, and "
            f"there are {processes}. Type accelerate launch --num_processes {len(experts)} "
            "train/lora.py launch=experts …, or on each machine one process with experts=[high] "
            "or experts=[low]."
        )
    if config.resume not in ("auto", "never"):
        raise ConfigError(
            f"resume is {config.resume}, one checkpoint, but launch is experts, where each expert "
            "has its own. Set resume=auto, or leave launch out."
        )
    if (Path(config.output_dir) / "config.yaml").exists():
        raise ConfigError(
            f"output_dir is {config.output_dir}, the folder of a run that is not launch=experts. "
            "Give this run another name=…, or leave launch out to go on with that one."
        )


def _take_gpu(index: int) -> None:
    """Make the GPU of this number the one that this process uses; nothing without GPUs."""
    if torch.cuda.is_available():
        torch.cuda.set_device(index)
        os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{index}"


def as_one_run(config: Config) -> Config:
    """What the runs of both experts have in common: the settings that were typed."""
    if not is_apart(config):
        return config
    return replace(config, experts=None, output_dir=str(shared_folder(config)))


def shared_folder(config: Config) -> Path:
    """Where the experts that train apart put what the other one takes."""
    return Path(config.output_dir).parent


def newest_of_others(config: Config) -> dict[Expert, Path]:
    """The newest adapters of the experts that other processes train, as far as there are any."""
    if not is_apart(config):
        return {}
    others = set(VARIANTS[config.model.variant].experts) - set(trained_experts(config))
    files: dict[Expert, Path] = {expert: _newest(config, expert) for expert in sorted(others)}
    return {expert: path for expert, path in files.items() if path.is_file()}


def withdraw(config: Config) -> None:
    """Remove the newest adapter of an earlier run: this one starts anew."""
    if is_apart(config):
        for expert in trained_experts(config):
            _newest(config, expert).unlink(missing_ok=True)


def hand_over(config: Config) -> None:
    """Put the files to upload where the pair is; each is seen whole or not at all."""
    if not is_apart(config):
        return
    for file in Path(config.output_dir).glob(f"{config.name}*.safetensors"):
        partial = shared_folder(config) / f".{file.name}.partial"
        shutil.copyfile(file, partial)
        partial.replace(shared_folder(config) / file.name)


def _newest(config: Config, expert: Expert) -> Path:
    name = f"{config.name}{SUFFIX_OF_EXPERT[expert]}.safetensors"
    return shared_folder(config) / name
