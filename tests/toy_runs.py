"""Small datasets of noise, what runs make of them, and cache entries of chosen tensors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from data.batches import Batch, EncodedClip, EncodedClips, Pictures
from data.buckets import Bucket, Clip
from data.cache import cache_latents, cache_text
from data.files import read_files
from data.filling import Entries, Store
from data.items import Item
from train.compose import compose
from train.config import Config
from train.dataset import Clips, plan_dataset
from train.encode import EncodedDataset, encode_dataset, model_paths
from train.learner import Learner, StepFigures, make_learner, train_step
from wan.checkpoints import Model, find_model
from wan.experts import Experts, load_experts
from wan.lora import adapter_state
from wan.variants import VARIANTS, Expert

CPU = torch.device("cpu")


@dataclass
class Progress:
    """Counts what was announced, and goes through it."""

    done: list[str] = field(default_factory=list)

    def __call__(self, steps: Iterable[int], name: str) -> Iterable[int]:
        for step in steps:
            self.done.append(name)
            yield step


def silent(steps: Iterable[int], _: str) -> Iterable[int]:
    return steps


def make_image(path: Path, seed: int, caption: str, size: tuple[int, int] = (32, 48)) -> Path:
    """Noise of `size` (height, width), and its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    path.with_suffix(".txt").write_text(caption)
    return path


def make_video(path: Path, frames: int, caption: str, size: tuple[int, int] = (32, 48)) -> Path:
    """At 8 frames a second, the frame rate of the tiny model."""
    from tests.media_files import encode  # needs ffmpeg: only where there are videos

    path.parent.mkdir(parents=True, exist_ok=True)
    encode(path, np.random.default_rng(frames).integers(0, 256, (frames, *size, 3), np.uint8))
    path.with_suffix(".txt").write_text(caption)
    return path


def config_of(data: Path, model: Path, *overrides: str) -> Config:
    """A run of the tiny variant on a dataset, its cache beside the dataset."""
    return compose(
        [
            "name=toy", "model=tiny", f"model.path={model}", f"data.path={data}",
            f"data.cache={data.parent / 'cache'}", "data.height=32", "data.width=48",
            "data.workers=0", "lora.rank=2", *overrides,
        ]
    )  # fmt: skip


def planned(config: Config) -> Clips:
    return plan_dataset(config.data, VARIANTS[config.model.variant], silent)


def encoded(
    config: Config,
    prompts: Sequence[str] = (),
    progress: Progress | None = None,
    said: list[str] | None = None,
) -> EncodedDataset:
    """The dataset of a run; what is repaired later goes to `said`."""
    model = find_model(model_paths(config.model), config.model.variant)
    say = ([] if said is None else said).append
    return encode_dataset(planned(config), prompts, config, model, CPU, progress or silent, say)


@dataclass
class Training:
    """One expert with all that its steps need."""

    config: Config
    experts: Experts
    learner: Learner
    dataset: EncodedDataset

    def step(self, step: int) -> StepFigures:
        facts = VARIANTS[self.config.model.variant]
        return train_step(
            self.learner, step, self.config, facts, self.experts, self.dataset, Accelerator()
        )

    def adapter(self) -> dict[str, Tensor]:
        return adapter_state(self.experts[self.learner.expert])


def start(
    config: Config, model: Model, dataset: EncodedDataset, expert: Expert = "low"
) -> Training:
    """An expert of the model, about to be trained on a dataset that is encoded."""
    experts = load_experts(model, getattr(torch, config.model.dtype), CPU)
    learner = make_learner(expert, config, model.variant, experts, dataset)
    return Training(config, experts, learner, dataset)


def latent_entries(folder: Path, tensors: Sequence[Tensor]) -> Entries:
    """Real cache entries of these latents (C, F, h, w)."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for index in range(len(tensors)):
        path = folder / f"{index}.png"
        Image.new("L", (16, 16), index).save(path)
        item = Item(path, ("a caption",), "image", path.name)
        clips.append(Clip(item, Bucket(1, 16, 16), 0, 0, "keep"))
    paths = [clip.item.path for clip in clips]
    facts = dict(zip(paths, read_files(paths, folder, 0, silent), strict=True))
    store = Store(folder, 0, True, silent, lambda _: None)
    return cache_latents(
        clips, facts, lambda: lambda frames: tensors[int(frames[0, 0, 0, 0])], "chosen", store
    )[0]


def text_entries(folder: Path, tensors: Sequence[Tensor]) -> Entries:
    """Real cache entries of these embeddings (L, D)."""
    store = Store(folder, 0, True, silent, lambda _: None)
    prompts = [str(index) for index in range(len(tensors))]
    return cache_text(prompts, lambda: lambda prompt: tensors[int(prompt)], "chosen", store)[0]


def encoded_clips(folder: Path, latents: Sequence[Tensor], text: Sequence[Tensor]) -> EncodedClips:
    """A clip for each of the latents with the text of its number; the last text is that of ""."""
    clips = []
    for index, tensor in enumerate(latents):
        _, frames, height, width = tensor.shape
        bucket = Bucket(4 * frames - 3, 8 * height, 8 * width)
        clips.append(EncodedClip(f"{index}.png", bucket, index, (index,), None, 1.0, 1.0))
    latent, texts = latent_entries(folder, latents), text_entries(folder, text)
    return EncodedClips(clips, Pictures(latent, None, None, None), texts, len(text) - 1)


def batch_of(latents: Tensor, text: list[Tensor]) -> Batch:
    """A batch of latents (B, C, F, h, w) that is given nothing but text."""
    count = len(latents)
    nothing = torch.zeros(count, dtype=torch.bool)
    return Batch(
        clips=list(range(count)),
        latents=latents,
        text=text,
        mask=None,
        loss_weight=torch.ones(count),
        condition=None,
        first_given=nothing,
        last_given=nothing,
    )
