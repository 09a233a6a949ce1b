"""Previews: settings from the variant, equal renderings, and files that players can read."""

from collections.abc import Iterable
from pathlib import Path

import decord
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from tests.toy_runs import config_of, make_image, silent
from train.config import PreviewConfig
from train.lora import check
from train.preview import render, save_samples
from train.preview_plan import PreviewPlan, Shot, plan_previews
from train.rules import ConfigError
from train.video_files import LABEL_HEIGHT, side_by_side, write_mp4, write_sheet
from wan.checkpoints import ModelPaths, find_model, load_vae
from wan.experts import Experts, load_experts
from wan.variants import EXPERTS, Guidance, Variant, variant

TINY, A14B = variant("tiny"), variant("t2v_a14b")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def experts(toy_model: Path) -> Experts:
    return load_experts(find_model(ModelPaths(str(toy_model)), "tiny"), torch.float32, CPU)


@pytest.fixture(scope="module")
def vae(toy_model: Path) -> AutoencoderKLWan:
    return load_vae(find_model(ModelPaths(str(toy_model)), "tiny"), torch.float32, CPU)


@pytest.fixture(scope="module")
def text() -> dict[str, Tensor]:
    """Embeddings (L, D) of two prompts and the negative one."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(4, 32, generator=generator) for name in ("a ball", "a cube", "")}


def quick(batch_size: int = 1, **changes: object) -> PreviewPlan:
    """A plan of two small shots."""
    small = {"steps": 3, "frames": 5, "height": 32, "width": 48, "prompts": ["a ball", "a cube"]}
    preview = PreviewConfig(**(small | changes))  # pyright: ignore[reportArgumentType]
    return plan_previews(preview, TINY, batch_size)


def rendered(
    plan: PreviewPlan, experts: Experts, vae: AutoencoderKLWan, text: dict[str, Tensor]
) -> list[np.ndarray]:
    def progress(steps: Iterable[int], _: str) -> Iterable[int]:
        return steps

    return render(plan, TINY, experts, vae, text, progress, print)


def gradient_video(frames: int, height: int, width: int) -> np.ndarray:
    """A smooth video that a codec keeps well: brightness rises with the frame and to the right."""
    ramp = np.arange(frames)[:, None, None] * 8 + np.arange(width)[None, None] * 2 + 20
    return np.broadcast_to(ramp, (frames, height, width)).astype(np.uint8)[..., None].repeat(3, 3)


def decoded(path: Path) -> tuple[np.ndarray, float]:
    reader = decord.VideoReader(str(path))
    return np.stack([frame.asnumpy() for frame in reader]), reader.get_avg_fps()


def file_names(folder: Path) -> list[str]:
    """All of them, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("facts", [TINY, A14B], ids=lambda facts: facts.name)
def test_what_is_null_is_taken_from_the_variant(facts: Variant) -> None:
    plan = plan_previews(PreviewConfig(prompts=["a ball"]), facts, 2)
    settings = plan.settings
    assert settings.steps == facts.sample_steps
    assert settings.shift == facts.sample_shift
    assert settings.guidance == facts.guidance
    assert (settings.frames, settings.height, settings.width) == (
        facts.frames, facts.height, facts.width,
    )  # fmt: skip
    assert plan.negative_prompt == facts.negative_prompt
    assert plan.batch_size == 2


def test_what_is_set_is_used() -> None:
    preview = PreviewConfig(
        prompts=["a ball"], steps=7, shift=2.5, guidance_high=0.0, guidance_low=1.0, frames=9,
        height=32, width=48, negative_prompt="",
    )  # fmt: skip
    plan = plan_previews(preview, A14B, 1)
    assert plan.settings.steps == 7
    assert plan.settings.shift == 2.5
    assert plan.settings.guidance == Guidance(low=1.0, high=0.0)
    assert (plan.settings.frames, plan.settings.height, plan.settings.width) == (9, 32, 48)
    assert plan.negative_prompt == ""


def test_each_prompt_is_rendered_with_each_seed() -> None:
    plan = plan_previews(PreviewConfig(prompts=["a", "b"], seeds=[3, 1]), TINY, 1)
    assert plan.shots == [Shot("a", 3), Shot("a", 1), Shot("b", 3), Shot("b", 1)]
    assert plan_previews(PreviewConfig(), TINY, 1).shots == []


@pytest.mark.parametrize("key", ["height", "width"])
def test_a_size_that_does_not_fit_is_told_before_any_weight_is_read(
    toy_model: Path, tmp_path: Path, key: str
) -> None:
    for seed in range(2):
        make_image(tmp_path / "data" / f"{seed}.png", seed, "noise")
    config = config_of(tmp_path / "data", toy_model, "preview.prompts=[a]", f"preview.{key}=40")
    with pytest.raises(ConfigError, match=rf"preview\.{key}.*40.*16"):
        check(config, CPU, silent)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("clip.mp4", "is no image; give a .png"),
        ("missing.png", "does not exist"),
        ("broken.png", "is damaged or cut short"),
    ],
)
def test_an_image_that_cannot_be_used_is_told_with_the_key(
    tmp_path: Path, name: str, words: str
) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"-")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    preview = PreviewConfig(prompts=["a ball"], images=[str(tmp_path / name)])
    with pytest.raises(ConfigError, match=rf"preview\.images.*{name}.*{words}"):
        plan_previews(preview, variant("ti2v_5b"), 1)


def test_rendering_twice_gives_the_same_videos(
    experts: Experts, vae: AutoencoderKLWan, text: dict[str, Tensor]
) -> None:
    first = rendered(quick(), experts, vae, text)
    torch.manual_seed(99)
    again = rendered(quick(), experts, vae, text)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert [(video.shape, video.dtype) for video in first] == [((5, 32, 48, 3), np.uint8)] * 2
    assert not np.array_equal(first[0], first[1])


def test_the_batch_size_changes_no_video(
    experts: Experts, vae: AutoencoderKLWan, text: dict[str, Tensor]
) -> None:
    plans = [quick(batch_size, seeds=[0, 1]) for batch_size in (1, 3)]
    alone, together = (rendered(plan, experts, vae, text) for plan in plans)
    assert len(alone) == len(together) == 4
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 2  # rounding


def test_seed_prompt_and_negative_prompt_make_the_video(
    experts: Experts, vae: AutoencoderKLWan, text: dict[str, Tensor]
) -> None:
    plans = [
        quick(prompts=["a ball"]),
        quick(prompts=["a ball"], seeds=[1]),
        quick(prompts=["a cube"]),
        quick(prompts=["a ball"], negative_prompt="a cube"),
    ]
    videos = [rendered(plan, experts, vae, text)[0] for plan in plans]
    assert len({video.tobytes() for video in videos}) == 4


def test_guidance_of_0_ignores_the_prompt_and_of_1_the_negative_prompt(
    experts: Experts, vae: AutoencoderKLWan, text: dict[str, Tensor]
) -> None:
    ignoring = quick(guidance_high=0.0, guidance_low=0.0)
    ball, cube = rendered(ignoring, experts, vae, text)
    assert np.abs(ball.astype(int) - cube).max() <= 1
    plans = [
        quick(guidance_high=1.0, guidance_low=1.0, negative_prompt=prompt)
        for prompt in ("", "a ball")
    ]
    one, other = (rendered(plan, experts, vae, text)[1] for plan in plans)
    assert np.array_equal(one, other)


def test_no_shots_render_nothing(
    experts: Experts, vae: AutoencoderKLWan, text: dict[str, Tensor]
) -> None:
    assert rendered(quick(prompts=[]), experts, vae, text) == []


@pytest.mark.parametrize("training", [(True, False), (False, True), (True, True)])
def test_training_mode_is_left_as_it_was(
    experts: Experts, vae: AutoencoderKLWan, text: dict[str, Tensor], training: tuple[bool, bool]
) -> None:
    seen: set[bool] = set()
    hooks = [
        expert.patch_embedding.register_forward_pre_hook(lambda m, _: seen.add(m.training))
        for expert in experts.values()
    ]
    for expert, mode in zip(EXPERTS, training, strict=True):
        experts[expert].train(mode)
    rendered(quick(prompts=["a ball"]), experts, vae, text)
    assert [experts[expert].training for expert in EXPERTS] == list(training)
    assert seen == {False}
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("frames", [1, 13])
@pytest.mark.parametrize("fps", [8, 16])
def test_an_mp4_has_the_frames_and_the_rate(tmp_path: Path, frames: int, fps: int) -> None:
    video = gradient_video(frames, 64, 96)
    write_mp4(tmp_path / "new" / "a.mp4", video, fps)
    found, rate = decoded(tmp_path / "new" / "a.mp4")
    assert found.shape == video.shape
    assert rate == pytest.approx(fps)
    assert np.abs(found.astype(int) - video).mean() < 4
    assert file_names(tmp_path / "new") == ["a.mp4"]


def test_an_mp4_replaces_an_earlier_one(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", gradient_video(3, 64, 64), 8)
    write_mp4(tmp_path / "a.mp4", gradient_video(5, 64, 64), 8)
    assert len(decoded(tmp_path / "a.mp4")[0]) == 5
    assert file_names(tmp_path) == ["a.mp4"]


def test_side_by_side_enlarges_by_whole_factors_under_labels() -> None:
    left, right = gradient_video(3, 64, 96), 255 - gradient_video(3, 64, 96)
    both = side_by_side([left, right], ["base", "adapters"])
    assert both.shape == (3, LABEL_HEIGHT + 192, 2 * 288, 3)
    body = both[:, LABEL_HEIGHT:]
    assert np.array_equal(body[:, ::3, :288:3], left)
    assert np.array_equal(body[:, 1::3, 289::3], right)
    labels = both[:, :LABEL_HEIGHT]
    assert (labels[:, :, :288] < 128).any()
    assert (labels[:, :, 288:] < 128).any()


def test_large_videos_are_not_enlarged() -> None:
    both = side_by_side([gradient_video(1, 208, 224)] * 2, ["a", "b"])
    assert both.shape == (1, LABEL_HEIGHT + 208, 448, 3)


def test_the_sheet_has_a_row_for_each_prompt(tmp_path: Path) -> None:
    video = gradient_video(13, 64, 64)
    rows = [("a ball (seed 0)", [video, video]), ("日本 🎈\nsecond line", [video, video])]
    write_sheet(tmp_path / "new" / "sheet.png", rows, ["base model", "with both adapters"])
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        # Two videos of five frames with a gap after each; a bar above all and one for each row.
        assert sheet.size == (2 * (5 * 192 + 6), LABEL_HEIGHT + 2 * (LABEL_HEIGHT + 192))
        pixels = np.asarray(sheet)
    first = pixels[2 * LABEL_HEIGHT :][:192:3, : 5 * 192 : 3].reshape(64, 5, 64, 3)
    assert np.array_equal(first.swapaxes(0, 1), video[[0, 3, 6, 9, 12]])
    assert file_names(tmp_path / "new") == ["sheet.png"]


def test_samples_of_a_step_are_all_there(tmp_path: Path) -> None:
    plan = quick()
    base = [gradient_video(5, 32, 64), gradient_video(5, 32, 64) // 2]
    adapted = [255 - video for video in base]
    compared = save_samples(tmp_path / "step", plan, base, adapted, 8, {})
    assert [path.name for path in compared] == [
        "00_base_and_adapters.mp4", "01_base_and_adapters.mp4",
    ]  # fmt: skip
    assert file_names(tmp_path / "step") == [
        "00_adapters.mp4", "00_base_and_adapters.mp4", "01_adapters.mp4",
        "01_base_and_adapters.mp4", "sheet.png",
    ]  # fmt: skip
    for path in compared:
        frames, rate = decoded(path)
        assert frames.shape == (5, LABEL_HEIGHT + 192, 2 * 384, 3)
        assert rate == pytest.approx(8)
    alone, _ = decoded(tmp_path / "step" / "01_adapters.mp4")
    assert np.abs(alone.astype(int) - adapted[1]).mean() < 4
    with Image.open(tmp_path / "step" / "sheet.png") as sheet:
        assert sheet.height == LABEL_HEIGHT + 2 * (LABEL_HEIGHT + 192)
