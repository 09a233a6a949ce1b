"""What an evaluation on demand is made with: a run's models, its prompts, its adapters to put on.

It is training's own pipeline: the experts, the VAE and `train.preview.render`, at the run's
settings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from tools.finished_run import read_config
from train.checkpoint import checkpoints_in, step_of
from train.compose import trained_experts
from train.config import Config
from train.dataset import Clips, plan_dataset
from train.encode import EncodedDataset, encode_dataset, model_paths
from train.few_step import at_strengths, put_on
from train.preview import render
from train.preview_plan import PreviewPlan, plan_previews
from train.rules import ConfigError
from train.speed import load_to_sample
from train.tracking import progress_bar
from wan.checkpoints import find_model, load_vae
from wan.experts import Experts
from wan.lora import ADAPTER
from wan.lora_format import SUFFIX_OF_EXPERT, read_adapter
from wan.variants import VARIANTS, Expert, Variant

PROGRESS = progress_bar(speaks=True)


@dataclass(frozen=True)
class Saved:
    """The adapters of a run as they were after so many of its steps."""

    step: int
    files: Mapping[Expert, Path]

    @property
    def name(self) -> str:
        """As checkpoints are called."""
        return f"step_{self.step:09d}"


@dataclass(frozen=True)
class Stage:
    """All that is loaded; no adapter is on the experts yet."""

    config: Config
    facts: Variant
    experts: Experts
    vae: AutoencoderKLWan
    dataset: EncodedDataset
    plan: PreviewPlan

    def put_on(self, saved: Saved) -> None:
        """Let the experts wear these adapters instead of those that they wear."""
        for expert in saved.files:
            transformer = self.experts[expert]
            if ADAPTER in getattr(transformer, "peft_config", {}):
                transformer.delete_adapters(ADAPTER)
            put_on(self.experts, expert, saved.files[expert], ADAPTER)

    def render(self, strengths: Mapping[Expert, float]) -> list[np.ndarray]:
        """A video for each shot of the plan, with the adapters at these strengths, else at 0."""
        try:
            with at_strengths(self.experts, strengths, self.plan.few_step):
                return render(
                    self.plan, self.facts, self.experts, self.vae, self.dataset.prompts, PROGRESS,
                    print,
                )  # fmt: skip
        except torch.OutOfMemoryError:
            raise ConfigError(
                "not enough memory to render even one video at a time: lower preview.frames, "
                "preview.height or preview.width in the run's config.yaml"
            ) from None


def saved_pairs(folder: Path, config: Config) -> list[Saved]:
    """What can be evaluated, oldest first: all checkpoints, and last the exported pair."""
    experts = trained_experts(config)
    found = [
        Saved(step_of(path), _pair(path, f"{config.name}_{step_of(path):09d}", experts))
        for path in checkpoints_in(folder / "checkpoints")
    ]
    exported = _pair(folder, config.name, experts)
    if all(path.is_file() for path in exported.values()):
        steps = [read_adapter(path)[2].get("ss_steps", "0") for path in exported.values()]
        found.append(Saved(sum(map(int, steps)), exported))
    if not found:
        raise ConfigError(f"{folder} has neither checkpoints nor exported adapters yet: wait")
    return found


def _pair(folder: Path, name: str, experts: Sequence[Expert]) -> dict[Expert, Path]:
    return {e: folder / f"{name}{SUFFIX_OF_EXPERT[e]}.safetensors" for e in experts}


def choose(pairs: Sequence[Saved], wanted: str, best: int | None) -> Saved:
    """The pair that `wanted` means: "final", "best" or a number of steps."""
    if wanted == "final":
        return pairs[-1]
    step = best if wanted == "best" else int(wanted) if wanted.isdigit() else None
    for pair in pairs:
        if pair.step == step:
            return pair
    known = ", ".join(str(pair.step) for pair in pairs)
    raise ConfigError(f"--checkpoint {wanted} is none of this run: give final, best, or {known}")


def read_settings(
    folder: Path, prompts: Sequence[str], seeds: Sequence[int]
) -> tuple[Config, PreviewPlan]:
    """A run's settings, and what to render: its previews, or these prompts and seeds."""
    config = read_config(folder / "config.yaml")
    preview = config.preview
    if prompts:
        images = [preview.images[i % len(preview.images)] for i in range(len(prompts))] if (
            preview.images
        ) else []  # fmt: skip
        preview = replace(preview, prompts=list(prompts), images=images)
    if seeds:
        preview = replace(preview, seeds=list(seeds))
    if not preview.prompts:
        raise ConfigError("the run has no preview.prompts: say with --prompt what to render")
    plan = plan_previews(preview, VARIANTS[config.model.variant], config.batch_size)
    return config, plan


def open_stage(config: Config, plan: PreviewPlan, measures: bool) -> Stage:
    """Load what is needed; with `measures` also the run's clips, from the cache."""
    facts = VARIANTS[config.model.variant]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = find_model(model_paths(config.model), facts.name)
    clips = Clips([], [], {}, [], [])
    if measures:
        clips = replace(plan_dataset(config.data, facts, PROGRESS), train=[])
    dataset = encode_dataset(clips, plan.texts, config, model, device, PROGRESS, print)
    # Compiled blocks would be compiled anew for each strength.
    speed = replace(config.speed, compile=False)
    experts = load_to_sample(model, config.model.dtype, speed, device)
    for expert in experts:
        experts[expert].requires_grad_(False)
    vae = load_vae(model, torch.float32, device)
    return Stage(config, facts, experts, vae, dataset, plan)
