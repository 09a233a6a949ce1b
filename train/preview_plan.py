"""What previews show and how they are made, from the settings and the variant; reads no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.items import DataError, kind_of
from data.media import probe
from train.config import PreviewConfig
from train.rules import ConfigError
from wan.adapter_layouts import pair_of
from wan.sample_settings import SampleSettings, distilled
from wan.variants import Expert, Guidance, Variant


@dataclass(frozen=True)
class Shot:
    """One video to render: what, and from which noise."""

    prompt: str
    seed: int
    image: Path | None = None  # its first frame


@dataclass(frozen=True)
class PreviewPlan:
    """What is rendered at each preview, and how."""

    shots: list[Shot]
    settings: SampleSettings
    negative_prompt: str
    batch_size: int
    few_step: Mapping[Expert, Path] = field(default_factory=dict)  # distilled adapters beside ours

    @property
    def texts(self) -> list[str]:
        """Everything that must be encoded for it."""
        return [*(shot.prompt for shot in self.shots), self.negative_prompt]


def plan_previews(preview: PreviewConfig, facts: Variant, batch_size: int) -> PreviewPlan:
    """The configured prompts and seeds, and the variant's values for what is not configured.

    `ConfigError` if the size is none that the model can make, or a file cannot be used.
    """
    settings = SampleSettings(
        steps=preview.steps or facts.sample_steps,
        shift=preview.shift or facts.sample_shift,
        guidance=Guidance(
            low=facts.guidance.low if preview.guidance_low is None else preview.guidance_low,
            high=facts.guidance.high if preview.guidance_high is None else preview.guidance_high,
        ),
        frames=preview.frames or facts.frames,
        height=preview.height or facts.height,
        width=preview.width or facts.width,
    )
    try:
        facts.geometry.latent_shape(settings.frames, settings.height, settings.width)
    except ValueError as error:
        raise ConfigError(
            f"preview.frames={settings.frames}, preview.height={settings.height}, "
            f"preview.width={settings.width}: {error}"
        ) from error
    negative = preview.negative_prompt
    images = [Path(image) for image in preview.images] or [None] * len(preview.prompts)
    for image in images:
        if image is not None:
            _check_image(image)
    few_step = few_step_files(preview.distilled, facts)
    return PreviewPlan(
        shots=[
            Shot(prompt, seed, image)
            for prompt, image in zip(preview.prompts, images, strict=True)
            for seed in preview.seeds
        ],
        settings=distilled(settings) if few_step else settings,
        negative_prompt=facts.negative_prompt if negative is None else negative,
        batch_size=batch_size,
        few_step=few_step,
    )


def few_step_files(given: Sequence[str], facts: Variant) -> dict[Expert, Path]:
    """The distilled adapter of each expert: of a pair either file means both.

    One whose name tells no expert is for all. `ConfigError` for a file that is not there.
    """
    files: dict[Expert, Path] = {}
    for path in map(Path, given):
        if not path.is_file():
            raise ConfigError(f"preview.distilled: {path} is no file; give a .safetensors file")
        pair = pair_of(path)
        found = dict.fromkeys(facts.experts, path) if "single" in pair else pair
        if unknown := [expert for expert in found if expert not in facts.experts]:
            raise ConfigError(
                f"preview.distilled: {path} is named for the {unknown[0]} expert, but "
                f"{facts.title} has {' and '.join(facts.experts)}; give a file that was made for it"
            )
        files |= found
    return files


def _check_image(image: Path) -> None:
    """`ConfigError` unless this is an image that can be decoded."""
    if kind_of(image) != "image":
        raise ConfigError(f"preview.images: {image} is no image; give a .png, .jpg or .webp")
    if not image.is_file():
        raise ConfigError(f"preview.images: {image} does not exist; give an image")
    try:
        probe(image, "image", str(image))
    except DataError as problem:
        raise ConfigError(f"preview.images: {problem}") from problem
