"""What an adapter file says about itself: ModelSpec, kohya `ss_*` and our own `wan_lora.*` entries.

Source: `spec/lora_formats.md` sections 4.2 to 4.6 and 6.2. All values are text. Nothing that is
written can hold a local path, a user's name (unless given as author) or a caption.
"""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

from wan.adapter_choices import Kind
from wan.flow import expert_range
from wan.headers import ModelError
from wan.variants import TRAIN_TIMESTEPS, Expert, Variant

FORMAT_VERSION = "1"
OURS = "wan_lora."
IMPLEMENTATION = "https://github.com/Wan-Video/Wan2.2"
LIBRARIES = ("torch", "diffusers", "peft")


@dataclass(frozen=True)
class AdapterInfo:
    """The facts of one expert's training that go into its file; empty texts are left out.

    `rank` and `alpha` are those of training; `date` (the end) and `started` are ISO 8601, taken as
    UTC without a zone; `resolution` is "WxH". `pair_id` is the same for the two experts of a run.
    """

    title: str
    variant: Variant
    expert: Expert
    rank: int
    alpha: float
    targets: str
    steps: int
    learning_rate: float
    optimizer: str
    seed: int
    resolution: str
    num_items: int
    shift: float
    timestep_law: str
    config_sha256: str
    base_hash: str
    dataset_hash: str
    pair_id: str
    date: str
    started: str = ""
    trigger: str = ""
    heldout_loss: float | None = None  # the last that was measured
    best_heldout_loss: float | None = None  # the lowest of the training so far
    dropout: float = 0.0
    max_steps: int | None = None  # planned steps, if training ended before or goes on after `steps`
    epoch: int | None = None
    num_epochs: int | None = None
    schedule: str = ""
    warmup_steps: int = 0
    mixed_precision: str = "no"
    accumulation: int = 1
    max_grad_norm: float | None = None
    weights: str = "live"  # or "ema"
    kind: Kind = "lora"
    base_model_id: str = ""  # of a hub, never a folder
    git_commit: str = ""
    author: str = ""
    description: str = ""
    license: str = ""
    tags: str = ""
    comment: str = ""

    def __post_init__(self) -> None:
        """Refuse what loaders cannot read (section 2.F) and what gives a user away."""
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.resolution):
            raise ModelError(f"a resolution is '<width>x<height>'; found {self.resolution!r}")
        if self.rank < 1 or self.alpha <= 0:
            raise ModelError(
                f"an adapter has rank >= 1 and alpha > 0; found {self.rank} and {self.alpha}"
            )
        if self.base_model_id and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", self.base_model_id):
            raise ModelError(
                f"base_model_id={self.base_model_id!r} is not 'owner/name' of a hub; "
                "a folder of this machine does not belong into a file that is shared"
            )


def metadata(info: AdapterInfo, data_sha256: str, rank: int | None = None) -> dict[str, str]:
    """All entries of an adapter's file but `sshs_legacy_hash`, which needs the file's bytes.

    `rank` is that of the file, if it is not that of training: the largest of all linears.
    """
    entries = _modelspec(info) | _kohya(info, rank or info.rank) | _own(info)
    entries = {key: value for key, value in entries.items() if value}
    return entries | {
        "format": "pt",
        "modelspec.hash_sha256": f"0x{data_sha256}",
        "sshs_model_hash": data_sha256,
    }


def _modelspec(info: AdapterInfo) -> dict[str, str]:
    sigmas = expert_range(info.variant.boundary, info.expert)
    single = info.expert == "single"
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": info.variant.architecture,
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": info.title if single else f"{info.title} ({info.expert} noise)",
        "modelspec.author": info.author,
        "modelspec.description": info.description,
        "modelspec.date": info.date,
        "modelspec.license": info.license,
        "modelspec.tags": info.tags,
        "modelspec.resolution": info.resolution,
        "modelspec.trigger_phrase": info.trigger,
        "modelspec.usage_hint": "strength 1.0"
        if single
        else f"load in the {info.expert.upper()}-noise model; strength 1.0",
        "modelspec.timestep_range": ""
        if single
        else ",".join(f"{TRAIN_TIMESTEPS * sigma:g}" for sigma in (sigmas.low, sigmas.high)),
    }


def _kohya(info: AdapterInfo, rank: int) -> dict[str, str]:
    width, height = map(int, info.resolution.split("x"))
    items = info.num_items
    return {
        "ss_base_model_version": info.variant.base_model,
        "ss_network_module": "wan.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),  # the effective one: the scale is folded into B
        "ss_network_args": json.dumps({"targets": info.targets, "dropout": info.dropout}),
        "ss_output_name": info.title,
        "ss_session_id": info.pair_id,
        "ss_training_started_at": _unix_seconds(info.started),
        "ss_training_finished_at": _unix_seconds(info.date),
        "ss_steps": str(info.steps),
        "ss_epoch": _optional(info.epoch),
        "ss_num_epochs": _optional(info.num_epochs),
        "ss_max_train_steps": str(info.max_steps or info.steps),
        "ss_learning_rate": str(info.learning_rate),
        "ss_lr_scheduler": info.schedule,
        "ss_lr_warmup_steps": str(info.warmup_steps),
        "ss_optimizer": info.optimizer,
        "ss_seed": str(info.seed),
        "ss_mixed_precision": info.mixed_precision,
        "ss_gradient_accumulation_steps": str(info.accumulation),
        "ss_max_grad_norm": _optional(info.max_grad_norm),
        "ss_num_train_items": str(items),
        "ss_discrete_flow_shift": str(info.shift),
        "ss_timestep_sampling": info.timestep_law,
        "ss_datasets": json.dumps([{"resolution": [width, height], "num_items": items}]),
        # Readers take the trigger words from here: the folder is kohya's "<repeats>_<class>".
        "ss_tag_frequency": (
            json.dumps({f"{items}_{info.trigger}": {info.trigger: items}}) if info.trigger else ""
        ),
        "ss_training_comment": info.comment,
    }


def _own(info: AdapterInfo) -> dict[str, str]:
    entries = {
        "format_version": FORMAT_VERSION,
        "variant": info.variant.name,
        "expert": info.expert,
        "boundary": _optional(info.variant.boundary),
        "shift": str(info.shift),
        "timestep_law": info.timestep_law,
        "original_alpha": str(info.alpha),
        "original_rank": str(info.rank),
        "kind": info.kind,
        "rslora": str(info.kind == "rslora").lower(),
        "weights": info.weights,
        "heldout_loss": _optional(info.heldout_loss),
        "best_heldout_loss": _optional(info.best_heldout_loss),
        "config_sha256": info.config_sha256,
        "git_commit": info.git_commit,
        "base_model_id": info.base_model_id,
        "base_model_hash": info.base_hash,
        "dataset_hash": info.dataset_hash,
        "pair_id": info.pair_id,
    }
    versions = {f"{library}_version": version(library) for library in LIBRARIES}
    return {f"{OURS}{key}": value for key, value in (entries | versions).items()}


def _optional(value: float | None) -> str:
    return "" if value is None else str(value)


def _unix_seconds(date: str) -> str:
    """An ISO 8601 date as readers of `ss_*` expect it; empty stays empty."""
    if not date:
        return ""
    moment = datetime.fromisoformat(date)
    return str((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
