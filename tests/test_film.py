"""The studio: adapters at their strengths, images, and clips that go on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from render_examples import export_pairs, save_noise

from tools.film import Film, Studio, Take, film, open_studio, read_adapters
from tools.storyboard import Lora, Shot
from train.rules import ConfigError
from wan.checkpoints import ModelPaths, find_model
from wan.sample_settings import SampleSettings
from wan.variants import Guidance

CPU = torch.device("cpu")
SETTINGS = SampleSettings(
    steps=2, shift=5.0, guidance=Guidance(low=2.0, high=3.0), frames=5, height=32, width=32
)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_noise(tmp_path_factory.mktemp("images") / "first.png", 0, 48, 64)


def studio_of(folder: Path, name: str, *loras: Lora) -> Studio:
    model = find_model(ModelPaths(str(folder)), name)
    prompts = ["a ball", "it stops", ""]
    return open_studio(model, prompts, read_adapters(loras, model), torch.float32, CPU)


@pytest.fixture(scope="module")
def i2v(toy_i2v_model: Path) -> Studio:
    return studio_of(toy_i2v_model, "i2v_a14b")


@pytest.fixture(scope="module")
def ti2v(toy_ti2v_model: Path) -> Studio:
    return studio_of(toy_ti2v_model, "ti2v_5b")


def filmed(shot: Shot, studio: Studio, **changes: object) -> Film:
    size = 64 if studio.facts.name == "ti2v_5b" else 32
    settings = replace(SETTINGS, height=size, width=size, **changes)
    return film(Take(1, shot, settings), "", False, studio)


def first_clip(shot: Shot, studio: Studio, **changes: object) -> np.ndarray:
    return filmed(shot, studio, **changes).clips[0][0]


# --- adapters


def test_strengths_of_adapters(toy_model: Path, tmp_path: Path) -> None:
    export_pairs(tmp_path)
    fox = Lora(tmp_path / "fox_high_noise.safetensors", "high", 1.0)
    owl = replace(fox, path=tmp_path / "owl_high_noise.safetensors")
    low = Lora(tmp_path / "fox_low_noise.safetensors", "low", 1.0)
    with_all = studio_of(toy_model, "tiny", fox, owl, low)
    base = first_clip(Shot(("a ball",)), studio_of(toy_model, "tiny"))

    def clip(*loras: Lora) -> np.ndarray:
        return first_clip(Shot(("a ball",), loras=loras), with_all)

    assert np.array_equal(clip(), base)
    assert np.array_equal(clip(replace(fox, strength=0.0)), base)
    videos = [clip(fox), clip(owl), clip(low), clip(fox, owl), clip(replace(fox, strength=-0.5))]
    assert len({video.tobytes() for video in (base, *videos)}) == 6
    alone = studio_of(toy_model, "tiny", fox)
    assert np.array_equal(clip(fox), first_clip(Shot(("a ball",), loras=(fox,)), alone))


def test_an_adapter_of_another_model_is_refused_by_its_shapes(
    toy_t2v_model: Path, tmp_path: Path
) -> None:
    export_pairs(tmp_path)
    model = find_model(ModelPaths(str(toy_t2v_model)), "t2v_a14b")
    lora = Lora(tmp_path / "fox_low_noise.safetensors", "low", 1.0)
    with pytest.raises(ConfigError, match=r"fox_low_noise.*\(24, 24\).*\(256, 256\)"):
        read_adapters([lora], model)


# --- images, and clips that go on


def test_i2v_begins_with_its_image_and_ends_with_the_last(
    i2v: Studio, image: Path, tmp_path: Path
) -> None:
    other = save_noise(tmp_path / "other.png", 1, 48, 64)
    shots = [
        Shot(("a ball",), image=image),
        Shot(("a ball",), image=other),
        Shot(("a ball",), image=image, last_image=other),
        Shot(("a ball",), image=image, last_image=image),
    ]
    clips = [first_clip(shot, i2v) for shot in shots]
    assert {clip.shape for clip in clips} == {(5, 32, 32, 3)}
    assert len({clip.tobytes() for clip in clips}) == 4


def test_a_clip_goes_on_from_the_last_frame(i2v: Studio, image: Path, tmp_path: Path) -> None:
    made = filmed(Shot(("a ball", "it stops"), seeds=(5,), image=image), i2v)
    ((first, second),) = made.clips
    Image.fromarray(first[-1]).save(tmp_path / "end.png")
    alone = Shot(("it stops",), seeds=(6,), image=tmp_path / "end.png")
    assert np.array_equal(second, first_clip(alone, i2v))
    (joined,) = made.joined(loop=False)
    assert np.array_equal(joined, np.concatenate([first, second[1:]]))


def test_a_loop_ends_where_it_began(i2v: Studio, image: Path) -> None:
    shot = Shot(("a ball",), image=image, loop=True)
    made = filmed(shot, i2v)
    ends = first_clip(replace(shot, loop=False, last_image=image), i2v)
    assert np.array_equal(made.clips[0][0], ends)
    assert np.array_equal(made.joined(loop=True)[0], ends[:-1])
    longer = filmed(replace(shot, prompts=("a ball", "it stops")), i2v)
    ((first, second),) = longer.clips
    assert np.array_equal(first, first_clip(replace(shot, loop=False), i2v))
    assert len(longer.joined(loop=True)[0]) == len(first) + len(second) - 2


def test_ti2v_makes_videos_of_text_and_of_images_and_goes_on(
    ti2v: Studio, image: Path, tmp_path: Path
) -> None:
    of_text = filmed(Shot(("a ball", "a ball")), ti2v)
    of_image = first_clip(Shot(("a ball",), image=image), ti2v)
    ((first, second),) = of_text.clips
    assert first.shape == second.shape == of_image.shape == (5, 64, 64, 3)
    assert not np.array_equal(first, of_image)
    Image.fromarray(first[-1]).save(tmp_path / "end.png")
    alone = Shot(("a ball",), seeds=(1,), image=tmp_path / "end.png")
    assert np.array_equal(second, first_clip(alone, ti2v))


@pytest.mark.parametrize("cfg", ["batched", "sequential"])
def test_seeds_together_are_as_alone(i2v: Studio, image: Path, cfg: str) -> None:
    shot = Shot(("a ball", "it stops"), seeds=(1, 4), image=image)
    together = filmed(shot, i2v, cfg=cfg)
    for seed, clips in zip(shot.seeds, together.clips, strict=True):
        ((alone, _),) = filmed(replace(shot, seeds=(seed,)), i2v).clips
        assert np.abs(clips[0].astype(int) - alone).max() <= 2  # rounding


def test_an_image_of_another_shape_is_cropped_and_not_stretched(
    i2v: Studio, tmp_path: Path
) -> None:
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = np.random.default_rng(2).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide[:, 16:48]).save(tmp_path / "middle.png")
    clips = [
        first_clip(Shot(("a ball",), image=tmp_path / name), i2v)
        for name in ("wide.png", "middle.png")
    ]
    assert np.array_equal(*clips)


def test_what_memory_cannot_decode_is_decoded_in_tiles_and_told(
    ti2v: Studio, capsys: pytest.CaptureFixture[str]
) -> None:
    shot = Shot(("a ball",))
    expected = filmed(shot, ti2v)
    assert not expected.tiled

    def fail(*_: object) -> None:
        hook.remove()
        raise torch.OutOfMemoryError

    hook = ti2v.load_vae().decoder.register_forward_pre_hook(fail)
    made = filmed(shot, ti2v)
    assert made.tiled
    assert np.array_equal(made.clips[0][0], expected.clips[0][0])  # of one tile
    assert "note: not enough memory to decode" in capsys.readouterr().err
