"""The schema of a run: every key's type, default, unit, meaning and rule.

Hydra merges the YAML files of `conf/` over `Config`, which refuses unknown keys and wrong types;
`typed` turns the result into plain dataclasses and checks every rule. Nothing after it sees a
Hydra object. `schema` lists the keys for error messages and for the reference page of the docs.

Relative paths (`data.path`, `data.cache`, `model.path`, `output_dir`) are relative to the folder
in which the command is typed.
"""

import difflib
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import II, MISSING, DictConfig, OmegaConf

from train.rules import (
    COUNT,
    COUNT_OR_0,
    DOTTED_NAME,
    EXPERT_LIST,
    FILE_NAME,
    FRAMES,
    NOT_BLANK,
    NOT_NEGATIVE,
    PIXELS,
    POSITIVE,
    PROBABILITY,
    SEEDS,
    UP_TO_HALF,
    ConfigError,
    Key,
    check_value,
    key,
    keys_of,
    one_of,
)
from wan.variants import EXPERTS, VARIANTS

CONF = Path(__file__).resolve().parent.parent / "conf"
EMBEDDED = "embedded"  # model.path of the model that lies in this repository, wan/tiny


@dataclass
class ExpertConfig:
    """What the two experts may have differently. Each has its own optimizer state."""

    rank: int = key(II("lora.rank"), "rank of this expert's adapter", rule=COUNT)
    alpha: float = key(II("lora.alpha"), "alpha of this expert's adapter", rule=POSITIVE)
    learning_rate: float = key(
        II("optim.learning_rate"), "peak learning rate of this expert", rule=POSITIVE
    )
    steps: int = key(II("steps"), "length of this expert's training", "optimizer steps", COUNT)


@dataclass
class ModelConfig:
    """The base model, which stays frozen."""

    variant: str = key("t2v_a14b", "family of the model", rule=one_of(*VARIANTS))
    path: str = key(
        MISSING, f"diffusers folder of the weights; {EMBEDDED} = wan/tiny", "path", NOT_BLANK
    )
    dtype: str = key(
        "bfloat16", "number format of the frozen weights", rule=one_of("bfloat16", "float32")
    )
    gradient_checkpointing: bool = key(
        True, "compute activations twice instead of keeping them: less memory, a third more time"
    )


@dataclass
class DataConfig:
    """The user's videos and images, and how they become clips."""

    path: str = key(MISSING, "folder of videos and images with .txt captions", "path", NOT_BLANK)
    heldout_path: str | None = key(
        None, "folder of clips to measure on and never to train on", "path", NOT_BLANK
    )
    heldout_fraction: float = key(
        0.1, "share of data.path held out when there is no heldout_path", "share", UP_TO_HALF
    )
    trigger: str | None = key(None, "word that names the concept in the captions", rule=NOT_BLANK)
    cache: str = key("cache", "folder of encoded latents and captions", "path", NOT_BLANK)
    height: int = key(480, "height of the training clips", "pixels", PIXELS)
    width: int = key(832, "width of the training clips", "pixels", PIXELS)
    frames: int = key(81, "length of the training clips", "frames", FRAMES)
    fps_policy: str = key(
        "resample",
        "what to do with a video whose frame rate is not the model's",
        rule=one_of("resample", "keep", "error"),
    )
    extraction: str = key(
        "head", "which part of a longer video to take", rule=one_of("head", "middle")
    )
    caption_dropout: float = key(
        0.1, "share of samples trained with an empty caption, for guidance", "share", PROBABILITY
    )


@dataclass
class LoraConfig:
    """The adapters, for both experts unless `high` or `low` says otherwise."""

    rank: int = key(16, "rank of the adapters: their capacity and file size", rule=COUNT)
    alpha: float = key(
        II("lora.rank"),
        "strength of the adapters: the update is scaled by alpha/rank",
        "",
        POSITIVE,
    )
    targets: str = key(
        "all",
        "layers that get an adapter",
        rule=one_of("all", "attention", "self_attention", "ffn"),
    )
    dropout: float = key(0.0, "dropout on the adapters' input", "share", PROBABILITY)


@dataclass
class OptimConfig:
    """Optimizer and schedule of each expert."""

    name: str = key("torch.optim.AdamW", "class of the optimizer", rule=DOTTED_NAME)
    learning_rate: float = key(1e-4, "peak learning rate of both experts", rule=POSITIVE)
    args: dict[str, Any] = key(
        {"betas": [0.9, 0.99], "weight_decay": 0.01}, "further arguments of the optimizer's class"
    )
    warmup_steps: int = key(
        20, "steps in which the learning rate rises from 0", "optimizer steps", COUNT_OR_0
    )
    schedule: str = key(
        "constant", "learning rate after the warm-up", rule=one_of("constant", "cosine", "linear")
    )
    max_grad_norm: float = key(1.0, "norm to which gradients are clipped", rule=POSITIVE)


@dataclass
class TimestepsConfig:
    """The law from which noise levels are drawn, before each expert takes its range of it."""

    base: str = key(
        "logit_normal", "distribution before the shift", rule=one_of("logit_normal", "uniform")
    )
    shift: float = key(3.0, "shift towards noise; 1 = none", rule=POSITIVE)
    scale: float = key(1.0, "width of logit_normal in standard deviations", rule=POSITIVE)
    low_discrepancy: bool = key(True, "spread the draws evenly over the steps")


@dataclass
class EvalConfig:
    """Held-out loss, with noise that is the same at every measurement."""

    every: int = key(250, "steps between measurements; 0 = before and after", "steps", COUNT_OR_0)
    bins: int = key(8, "noise bins of each expert", "bins", COUNT)
    draws: int = key(2, "noise draws of each held-out clip in each bin", "draws", COUNT)


@dataclass
class PreviewConfig:
    """Sample videos rendered during training; what is null is taken from the model variant."""

    every: int = key(500, "steps between previews; 0 = before and after", "steps", COUNT_OR_0)
    prompts: list[str] = key([], "prompts to render; empty = no previews")
    seeds: list[int] = key([0], "seeds with which each prompt is rendered", rule=SEEDS)
    steps: int | None = key(None, "sampling steps", "steps", COUNT)
    shift: float | None = key(None, "shift of the sampling grid", rule=POSITIVE)
    guidance_high: float | None = key(
        None, "guidance scale of the high expert; 1 = off", rule=NOT_NEGATIVE
    )
    guidance_low: float | None = key(
        None, "guidance scale of the low expert; 1 = off", rule=NOT_NEGATIVE
    )
    frames: int | None = key(None, "length of a preview", "frames", FRAMES)
    height: int | None = key(None, "height of a preview", "pixels", PIXELS)
    width: int | None = key(None, "width of a preview", "pixels", PIXELS)
    negative_prompt: str | None = key(None, "what previews are guided away from")


@dataclass
class TrackingConfig:
    """Weights & Biases. Nothing ever asks for a login."""

    project: str = key("wan-lora", "project that the run is logged to", rule=NOT_BLANK)
    mode: str = key(
        "auto",
        "auto = online where an account is set up, else offline",
        rule=one_of("auto", "online", "offline", "disabled"),
    )
    log_every: int = key(10, "steps between logged values", "steps", COUNT)


@dataclass
class CheckpointConfig:
    """What is kept on the way."""

    every: int = key(500, "steps between checkpoints; 0 = only at the end", "steps", COUNT_OR_0)


@dataclass
class ExportConfig:
    """The files to upload, and what they say about themselves."""

    dtype: str = key(
        "bfloat16", "number format of the files", rule=one_of("bfloat16", "float16", "float32")
    )
    author: str | None = key(None, "author, written into the files", rule=NOT_BLANK)
    title: str | None = key(None, "title, written into the files; null = name", rule=NOT_BLANK)
    license: str | None = key(None, "license, written into the files", rule=NOT_BLANK)
    description: str | None = key(None, "description, written into the files", rule=NOT_BLANK)


@dataclass
class Config:
    """One training run. `steps` without more words are optimizer steps of both experts together."""

    name: str = key(MISSING, "name of the run and of its files", rule=FILE_NAME)
    output_dir: str = key("outputs/${name}", "folder of all that the run writes", "path", NOT_BLANK)
    seed: int = key(0, "seed of initial weights, order, noise and noise levels", rule=COUNT_OR_0)
    experts: list[str] = key(list(EXPERTS), "experts to train", rule=EXPERT_LIST)
    steps: int = key(2000, "length of each expert's training", "optimizer steps", COUNT)
    turn_steps: int = key(
        100, "steps of one expert before the other takes over", "optimizer steps", COUNT
    )
    batch_size: int = key(1, "clips in one forward pass", "clips", COUNT)
    accumulate: int = key(1, "forward passes in one optimizer step", "passes", COUNT)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    high: ExpertConfig = field(default_factory=ExpertConfig)
    low: ExpertConfig = field(default_factory=ExpertConfig)
    timesteps: TimestepsConfig = field(default_factory=TimestepsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


# Hydra finds the schema by this name, the first in the defaults list of conf/config.yaml.
ConfigStore.instance().store(name="schema", node=Config)


@cache
def schema() -> dict[str, Key]:
    """Every key of `Config` by its dotted name, in the order of the classes above."""
    return {found.path: found for found in keys_of(Config, "")}


def unknown_key(path: str) -> ConfigError:
    """The error for a key that does not exist, with the real keys that look like it."""
    if path.startswith("optim.args."):
        return ConfigError(f"{path} is not set yet: to add it, write +{path}=…")
    groups = {
        folder.name: f"a file of conf/{folder.name}" for folder in CONF.iterdir() if folder.is_dir()
    }
    known = groups | {name: found.doc for name, found in schema().items()}
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.8)
    if not near:  # the right key in the wrong section, such as rank or data.rank
        ends = difflib.get_close_matches(
            path.split(".")[-1], {n.split(".")[-1] for n in known}, n=1
        )
        near = [name for name in known if name.split(".")[-1] in ends]
    if not near:
        return ConfigError(f"{path} is not a key. conf/config.yaml lists them all.")
    guesses = " or ".join(f"{name} ({known[name]})" for name in near)
    return ConfigError(f"{path} is not a key; did you mean {guesses}?")


def typed(cfg: DictConfig) -> Config:
    """The composed settings as checked plain dataclasses; `ConfigError` if one is wrong."""
    values = _leaves(OmegaConf.to_container(cfg), "")
    for path in values:
        if path not in schema():  # +lora.rnak=3 gets past Hydra
            raise unknown_key(path)
    missing = [path for path, value in values.items() if value == MISSING]
    if missing:
        raise ConfigError(
            f"not set: {', '.join(f'{path} ({schema()[path].doc})' for path in missing)}. Write "
            f"{' '.join(f'{path}=…' for path in missing)} on the command line, or choose an "
            "experiment that sets this, such as experiment=demo."
        )
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config), "the defaults list of conf/config.yaml begins with `schema`"
    check(config)
    return config


def _leaves(value: object, path: str) -> dict[str, object]:
    if not isinstance(value, dict) or path == "optim.args":  # whose keys are the optimizer's
        return {path: value}
    inner = [_leaves(item, f"{path}.{name}".strip(".")) for name, item in value.items()]
    return {name: item for leaves in inner for name, item in leaves.items()}


def compose(overrides: list[str]) -> Config:
    """The run that these command-line arguments describe, for tests and tools."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(hydra.compose("config", overrides))


def resolved_yaml(config: Config) -> str:
    """The configuration of a run as YAML without interpolations, for its folder."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def check(config: Config) -> None:
    """Raise `ConfigError` at the first value that cannot work, alone or with the others."""
    for path, known in schema().items():
        check_value(known, attrgetter(path)(config))
    _check_together(config)


def _check_together(config: Config) -> None:
    data, optim, timesteps = config.data, config.optim, config.timesteps
    if config.model.path == EMBEDDED and config.model.variant != "tiny":
        raise ConfigError(
            f"model.path is {EMBEDDED}, but only the variant tiny lies in this repository, and "
            f"model.variant is {config.model.variant}. Set model.path to the folder of its weights."
        )
    if timesteps.base == "uniform" and timesteps.scale != 1:
        raise ConfigError(
            f"timesteps.scale is {timesteps.scale:g}, which has no effect with "
            "timesteps.base=uniform. Leave it out, or set timesteps.base=logit_normal."
        )
    if data.heldout_path and data.heldout_fraction != schema()["data.heldout_fraction"].default:
        raise ConfigError(
            f"data.heldout_fraction is {data.heldout_fraction:g}, which has no effect next to "
            f"data.heldout_path={data.heldout_path}. Leave one of the two out."
        )
    if data.heldout_path and Path(data.heldout_path).resolve() == Path(data.path).resolve():
        raise ConfigError(
            f"data.heldout_path is {data.heldout_path}, the folder that is trained on. Set another "
            "folder, or leave it out to hold out a share of data.path."
        )
    if "lr" in optim.args:
        raise ConfigError("optim.args has lr: the learning rate is set as optim.learning_rate.")
    for expert in config.experts:
        steps = attrgetter(f"{expert}.steps")(config)
        if optim.warmup_steps >= steps:
            raise ConfigError(
                f"optim.warmup_steps is {optim.warmup_steps}, but {expert}.steps is {steps}: the "
                "full learning rate is never reached. Set a shorter warm-up or more steps."
            )
