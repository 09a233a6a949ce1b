"""The schema of a run: every key's type, default, unit, meaning and rule.

Hydra merges the YAML files of `conf/` over `Config`, which refuses unknown keys and wrong types;
`train/compose.py` turns the result into plain dataclasses and checks every rule. `schema` lists the
keys for error messages and for the reference page of the docs.

Relative paths (`data.path`, `data.cache`, `model.path`, `output_dir`) are relative to the folder
in which the command is typed.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import II, MISSING

from train.rules import (
    COUNT,
    COUNT_OR_0,
    DOTTED_NAME,
    EXPERT_LIST,
    FILE_NAME,
    FRAMES,
    INNER_SHARE,
    NOT_BLANK,
    NOT_NEGATIVE,
    PIXELS,
    POSITIVE,
    PROBABILITY,
    RANKS,
    SCALES,
    SEEDS,
    SHARE,
    UP_TO_HALF,
    Key,
    key,
    keys_of,
    one_of,
)
from wan.adapter_choices import KINDS, PRESETS
from wan.speed_choices import ATTENTIONS, FROZEN_FORMATS, INPUT_PLACES, KEEPS
from wan.variants import VARIANTS

EMBEDDED = "embedded"  # model.path of the model that lies in this repository, wan/tiny


@dataclass
class ExpertConfig:
    """What experts may have differently. Each has its own optimizer state; 5B has `single`."""

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
        MISSING, f"folder or file of the weights; {EMBEDDED} = wan/tiny", "path", NOT_BLANK
    )
    high: str | None = key(None, "weights of the high expert, if elsewhere", "path", NOT_BLANK)
    low: str | None = key(None, "weights of the low expert, if elsewhere", "path", NOT_BLANK)
    vae: str | None = key(None, "weights of the VAE, if elsewhere", "path", NOT_BLANK)
    text_encoder: str | None = key(None, "weights of UMT5, if elsewhere", "path", NOT_BLANK)
    tokenizer: str | None = key(None, "folder of the tokenizer, if elsewhere", "path", NOT_BLANK)
    dtype: str = key(
        "bfloat16", "number format of the frozen weights", rule=one_of("bfloat16", "float32")
    )


@dataclass
class SourceConfig:
    """A further dataset, mixed in with the one of `data.path`."""

    path: str = key(MISSING, "folder, manifest or Hugging Face dataset", "path", NOT_BLANK)
    root: str | None = key(None, "folder that a manifest's paths start from", "path", NOT_BLANK)
    prefix: str | None = key(None, "text before each of its captions; null = data.prefix")
    weight: float = key(1.0, "visits of each of its items in an epoch", "visits", POSITIVE)
    loss_weight: float = key(1.0, "weight of its samples in the loss", rule=POSITIVE)
    regularisation: bool = key(
        False, "ordinary things to keep: no prefix, no trigger, never held out"
    )


@dataclass
class SpeedConfig:
    """How the model fits the card and how fast it runs; the presets of `conf/speed` set it."""

    placement: str = key(
        "swap",
        "where frozen weights wait: all on the device; the expert not at work in host memory; all "
        "in host memory, block by block to the device; or a share of all on each of several GPUs",
        rule=one_of("resident", "swap", "stream", "shard"),
    )
    frozen: str | None = key(
        None,
        "number format of the frozen linears; null = model.dtype, or as a GGUF file has them",
        rule=one_of(*FROZEN_FORMATS),
    )
    attention: str = key(
        "auto", "kernel of attention; auto = PyTorch's choice", rule=one_of(*ATTENTIONS)
    )
    compile: bool | None = key(None, "compile the blocks; null = where there is a GPU")
    keep: str = key(
        "auto",
        "activations that a step keeps rather than computes twice; auto = as fits the card",
        rule=one_of("auto", *KEEPS),
    )
    inputs: str = key(
        "device",
        "where the inputs of blocks wait for the backward pass, unless everything is kept",
        rule=one_of(*INPUT_PLACES),
    )
    graphs: bool = key(
        True, "launch each step of pictures and short clips as one CUDA graph, where compiled"
    )
    context: int = key(1, "processes that share a clip, each with its tokens", "processes", COUNT)


@dataclass
class DataConfig:
    """The user's videos and images, and how they become clips."""

    path: str = key(
        MISSING,
        "folder of videos and images with .txt captions, manifest or Hugging Face dataset",
        "path",
        NOT_BLANK,
    )
    root: str | None = key(None, "folder that a manifest's paths start from", "path", NOT_BLANK)
    # OmegaConf cannot add to a dictionary of dataclasses from the command line: train/compose.py
    # makes each value a SourceConfig.
    mix: dict[str, Any] = key({}, "further datasets, by a name of your choice")
    skip_bad: bool = key(False, "leave out files that cannot be used, instead of stopping")
    heldout_path: str | None = key(
        None, "what to measure on and never to train on: a dataset, or a .txt list of names",
        "path", NOT_BLANK,
    )  # fmt: skip
    heldout_fraction: float = key(
        0.1, "share of data.path held out when there is no heldout_path", "share", UP_TO_HALF
    )
    trigger: str | None = key(None, "word that names the concept in the captions", rule=NOT_BLANK)
    prefix: str = key("", "text before each caption, such as a trigger that they lack")
    cache: str = key("cache", "folder of encoded latents and captions", "path", NOT_BLANK)
    encode: bool = key(True, "encode what is not in the cache; false = stop instead")
    workers: int = key(4, "processes that decode files beside the encoder", "processes", COUNT_OR_0)
    vae_dtype: str = key(
        "float32", "number format of the VAE while encoding", rule=one_of("float32", "bfloat16")
    )
    height: int = key(480, "height of the training clips", "pixels", PIXELS)
    width: int = key(832, "width of the training clips", "pixels", PIXELS)
    scales: list[float] = key([1.0], "sizes at which each item is used", "times", SCALES)
    upscale: bool = key(False, "enlarge what is smaller than the training size")
    max_buckets: int | None = key(None, "most shapes; the rarest are merged", "shapes", COUNT)
    frames: int = key(81, "length of the training clips", "frames", FRAMES)
    fps_policy: str = key(
        "resample",
        "what to do with a video whose frame rate is not the model's",
        rule=one_of("resample", "keep", "error"),
    )
    extraction: str = key(
        "head",
        "which windows of a longer video to take",
        rule=one_of("head", "middle", "uniform", "sliding", "full"),
    )
    windows: int | None = key(None, "windows of a video, for uniform", "windows", COUNT)
    stride: int | None = key(None, "distance of two windows, for sliding", "frames", COUNT)
    caption_dropout: float = key(
        0.1, "share of samples trained with an empty caption, for guidance", "share", PROBABILITY
    )


@dataclass
class ConditionConfig:
    """The images that a model is given in training, where it takes any."""

    first_frame: float | None = key(
        None, "TI2V-5B: share of clips whose first frame is given; null = half", "share", SHARE
    )
    last_frame: float | None = key(
        None, "I2V-A14B: share of clips whose last frame is given too; null = 0", "share", SHARE
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
    rank_pattern: dict[str, int] = key(
        {}, "ranks of some layers, by regexes over their names; their scale stays", "", RANKS
    )
    targets: str = key(
        "all",
        f"layers that get an adapter: {', '.join(PRESETS)}, or a regex over their names",
        rule=NOT_BLANK,
    )
    dropout: float = key(0.0, "dropout on the adapters' input", "share", PROBABILITY)
    kind: str = key("lora", "what an adapter computes beside a layer", rule=one_of(*KINDS))
    init: str | None = key(
        None, "adapter file to start from; of a pair, either one", "path", NOT_BLANK
    )
    ema: float | None = key(
        None, "decay of an average of the adapters over the steps; null = none", "", INNER_SHARE
    )


@dataclass
class OptimConfig:
    """Optimizer and schedule of each expert."""

    name: str = key("torch.optim.AdamW", "class of the optimizer", rule=DOTTED_NAME)
    learning_rate: float = key(1e-4, "peak learning rate of both experts", rule=POSITIVE)
    b_ratio: float = key(1.0, "learning rate of B over that of A; 16 = LoRA+", rule=POSITIVE)
    # Empty: OmegaConf would give another optimizer what is the default of this one.
    args: dict[str, Any] = key({}, "further arguments of the optimizer's class")
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
    patience: int = key(
        3, "measurements of an expert without progress before the run says so", "", COUNT
    )
    early_stop: bool = key(False, "then train that expert no further; the other goes on")


@dataclass
class PreviewConfig:
    """Sample videos rendered during training; what is null is taken from the model variant."""

    every: int = key(500, "steps between previews; 0 = before and after", "steps", COUNT_OR_0)
    prompts: list[str] = key([], "prompts to render; empty = no previews")
    images: list[str] = key([], "first frame of each prompt's video: I2V-A14B, TI2V-5B", "paths")
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
    grid: bool = key(False, "also render with each of the two adapters alone")
    distilled: list[str] = key([], "few-step adapters to render with, in 4 steps", "paths")
    budget: float | None = key(
        None, "most share of the run's time for previews on the way", "share", INNER_SHARE
    )


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
    group: str | None = key(
        None, "runs to show as one; null = those of the same data and settings", rule=NOT_BLANK
    )
    others: list[str] = key([], "trackers beside W&B, of those that accelerate knows")
    floor: float | None = key(
        None, "time that one clip's kernels take alone, to log the use of the card", "seconds",
        POSITIVE,
    )  # fmt: skip


@dataclass
class CheckpointConfig:
    """What is kept on the way."""

    every: int = key(500, "steps between checkpoints; 0 = only at the end", "steps", COUNT_OR_0)
    keep: int = key(3, "newest checkpoints that are kept, beside the best", "folders", COUNT)
    time_limit: float | None = key(
        None, "time after which the run saves and ends, to be continued", "hours", POSITIVE
    )


@dataclass
class ExportConfig:
    """The files to upload, and what they say about themselves."""

    dtype: str = key(
        "bfloat16", "number format of the files", rule=one_of("bfloat16", "float16", "float32")
    )
    weights: str = key(
        "live",
        "the adapters as they are, their average (lora.ema), or a pair of each; measured are the "
        "first that are written",
        rule=one_of("live", "ema", "both"),
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
    experts: list[str] | None = key(
        None, "experts to train; null = all of the model", rule=EXPERT_LIST
    )
    launch: str = key(
        "together",
        "what several processes share: each step, or the experts, one for each process",
        rule=one_of("together", "experts"),
    )
    steps: int = key(2000, "length of each expert's training", "optimizer steps", COUNT)
    turn_steps: int = key(
        100, "steps of one expert before the other takes over", "optimizer steps", COUNT
    )
    batch_size: int = key(1, "clips in one forward pass", "clips", COUNT)
    accumulate: int = key(1, "forward passes in one optimizer step", "passes", COUNT)
    max_bad_steps: int = key(
        10,
        "most steps in a row whose loss or gradient is not finite",
        "optimizer steps",
        COUNT_OR_0,
    )
    resume: str = key(
        "auto",
        "auto = go on with the run in output_dir; never = start over; or a checkpoint's folder",
        "path",
        NOT_BLANK,
    )
    resume_reason: str | None = key(
        None, "why a run goes on with settings that make it another one", rule=NOT_BLANK
    )
    dry_run: bool = key(False, "try every kind of step on a toy model, and write nothing")
    model: ModelConfig = field(default_factory=ModelConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    data: DataConfig = field(default_factory=DataConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    high: ExpertConfig = field(default_factory=ExpertConfig)
    low: ExpertConfig = field(default_factory=ExpertConfig)
    single: ExpertConfig = field(default_factory=ExpertConfig)
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
