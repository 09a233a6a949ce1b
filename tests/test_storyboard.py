"""Storyboards: what a shot may say, what it means, and the sentence for each mistake."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_examples import INFO, random_state
from PIL import Image
from safetensors.torch import load_file, save_file

from data.items import DataError
from tools.storyboard import (
    Lora,
    Shot,
    check_shots,
    clip_prompts,
    read_lora,
    read_storyboard,
    settings_of,
)
from train.rules import ConfigError
from wan.headers import ModelError
from wan.lora_format import export_adapter
from wan.sample_settings import SampleSettings
from wan.variants import Guidance, Variant, variant

TINY, I2V, TI2V = variant("tiny"), variant("i2v_a14b"), variant("ti2v_5b")
DEFAULT = Shot(prompts=(), seeds=(4, 5), frames=9)
USUAL = SampleSettings(
    steps=4, shift=5.0, guidance=Guidance(low=1.0, high=1.0), frames=81, height=480, width=832
)


@pytest.fixture
def storyboard(tmp_path: Path) -> Callable[[str], list[Shot]]:
    def read(text: str, default: Shot = DEFAULT) -> list[Shot]:
        path = tmp_path / "story.yaml"
        path.write_text(text)
        return read_storyboard(path, default, TINY, forced=False)

    return read


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """A folder with an exported pair, and copies whose names tell nothing or the wrong expert."""
    for expert in ("high", "low"):
        info = replace(INFO, expert=expert)
        export_adapter(tmp_path, "fox", random_state(1, preset="attention"), info, torch.float32)
    high = tmp_path / "fox_high_noise.safetensors"
    shutil.copy(high, tmp_path / "renamed_low_noise.safetensors")
    for name in ("old", "Old-HighNoise"):
        save_file(load_file(high), tmp_path / f"{name}.safetensors")  # without metadata
    return tmp_path


def picture(path: Path, height: int, width: int) -> Path:
    Image.new("RGB", (width, height), "red").save(path)
    return path


def test_a_shot_with_everything(
    storyboard: Callable[[str], list[Shot]], adapters: Path, tmp_path: Path
) -> None:
    (shot,) = storyboard(
        """
        shots:
          - prompt: A red ball, rolling.
            seeds: [1, 2]
            frames: 5
            image: first.png
            last_image: deep/last.png
            loras: [fox_high_noise.safetensors:0.8, "low=fox_low_noise.safetensors"]
            then: [It stops., It melts.]
        """
    )
    assert shot == Shot(
        prompts=("A red ball, rolling.", "It stops.", "It melts."),
        seeds=(1, 2),
        frames=5,
        image=tmp_path / "first.png",
        last_image=tmp_path / "deep" / "last.png",
        loras=(
            Lora(adapters / "fox_high_noise.safetensors", "high", 0.8),
            Lora(adapters / "fox_low_noise.safetensors", "low", 1.0),
        ),
    )


def test_what_a_shot_does_not_say_is_as_on_the_command_line(
    storyboard: Callable[..., list[Shot]],
) -> None:
    lora = Lora(Path("a"), "high", 0.5)
    default = replace(DEFAULT, loras=(lora,))
    first, second = storyboard(
        "shots:\n- prompt: a\n  extend: 2\n- {prompt: b, seeds: 7, loop: true, loras: []}", default
    )
    assert first == Shot(prompts=("a", "a", "a"), seeds=(4, 5), frames=9, loras=(lora,))
    assert second == Shot(prompts=("b",), seeds=(7,), frames=9, loop=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shots:\n- {prompt: a, lora: [x]}", r"shot 1: lora is not a key; did you mean loras\?"),
        ("shots:\n- {prompt: a}\n- {promt: b}", r"shot 2: promt .* did you mean prompt\?"),
        ("shots:\n- {prompt: a, zebra: 1}", "zebra is not a key; there are prompt, seeds"),
        ("shots: [{prompt: a}]\nseeds: 3", "seeds is not a key; there are shots"),
        ("scenes: []", r"story.yaml: expected `shots:`"),
        ("- prompt: a", r"expected `shots:`"),
        ("", r"expected `shots:`"),
        ("5", "cannot be read as YAML"),
        ("shots: [", "cannot be read as YAML"),
        ("shots:\n- prompt: a\n  prompt: b", "found duplicate key prompt"),
        ("shots:\n- a ball", "shot 1 is a ball: expected keys"),
        ("shots:\n- {seeds: 1}", "shot 1 has no prompt"),
        ("shots:\n- {prompt: [a]}", r"prompt is \[a\]: expected some text"),
        ("shots:\n- {prompt: a, seeds: true}", "seeds is true: expected a whole number"),
        ("shots:\n- {prompt: a, seeds: []}", r"seeds is \[\]: expected a whole number"),
        ("shots:\n- {prompt: a, frames: 12}", "frames is 12: expected 4n"),
        ("shots:\n- {prompt: a, image: }", "image is null: expected the name"),
        ("shots:\n- {prompt: a, loras: x}", "loras is x: expected a list such as"),
        ("shots:\n- {prompt: a, loras: [x.safetensors]}", "no adapter file .*x.safetensors"),
        ("shots:\n- {prompt: a, extend: 0}", "extend is 0: expected a whole number"),
        ("shots:\n- {prompt: a, extend: 1, then: [b]}", "shot 1 has extend and then"),
        ("shots:\n- {prompt: a, loop: 1}", "loop is 1: expected true or false"),
    ],
)
def test_each_mistake_has_its_sentence(
    storyboard: Callable[[str], list[Shot]], text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        storyboard(text)
    assert "story.yaml" in str(caught.value) or "adapter" in message
    assert "\n" not in str(caught.value)


def test_a_storyboard_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        read_storyboard(tmp_path / "no.yaml", DEFAULT, TINY, forced=False)


def test_the_prompts_of_clips() -> None:
    assert clip_prompts("a", 0, []) == ("a",)
    assert clip_prompts("a", 2, []) == ("a", "a", "a")
    assert clip_prompts("a", 0, ["b", "c"]) == ("a", "b", "c")


# --- adapters


@pytest.mark.parametrize(
    ("text", "expert", "strength"),
    [
        ("fox_high_noise.safetensors", "high", 1.0),
        ("fox_low_noise.safetensors:0.75", "low", 0.75),
        ("low=fox_low_noise.safetensors:-1e-1", "low", -0.1),
        ("renamed_low_noise.safetensors:0", "high", 0.0),  # the file knows better than its name
        ("Old-HighNoise.safetensors", "high", 1.0),
        ("low=old.safetensors", "low", 1.0),
    ],
)
def test_the_expert_and_the_strength_of_an_adapter(
    adapters: Path, text: str, expert: str, strength: float
) -> None:
    lora = read_lora(text, adapters, TINY, forced=False)
    assert (lora.expert, lora.strength) == (expert, strength)
    assert lora.path.is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("old.safetensors", "write high=old.safetensors or low=old.safetensors"),
        ("low=fox_high_noise.safetensors", "an adapter of the expert high, and was given to low"),
        ("high=renamed_high.safetensors", "there is no adapter file"),
        ("single=old.safetensors", "single, but tiny .* has high and low"),
        ("fox_high_noise.safetensors:nan", "the strength is nan; expected a number"),
    ],
)
def test_an_adapter_that_cannot_be_used(adapters: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_lora(text, adapters, TINY, forced=False)


def test_an_expert_can_be_forced(adapters: Path) -> None:
    lora = read_lora("low=fox_high_noise.safetensors", adapters, TINY, forced=True)
    assert lora.expert == "low"


def test_the_one_transformer_of_ti2v(adapters: Path) -> None:
    assert read_lora("old.safetensors", adapters, TI2V, forced=False).expert == "single"
    with pytest.raises(ConfigError, match=r"expert high, but Wan 2\.2 TI2V-5B has single"):
        read_lora("fox_high_noise.safetensors", adapters, TI2V, forced=False)
    forced = read_lora("single=fox_high_noise.safetensors", adapters, TI2V, forced=True)
    assert forced.expert == "single"


def test_what_is_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "a_high_noise.safetensors").write_text("<html>")
    with pytest.raises(ModelError, match="a web page"):
        read_lora("a_high_noise.safetensors", tmp_path, TINY, forced=False)


# --- what a model can make


@pytest.mark.parametrize(
    ("name", "shot", "message"),
    [
        ("tiny", Shot(("a",), image=Path("i.png")), "tiny .* from text alone: leave out images"),
        ("tiny", Shot(("a", "a")), "from text alone.*I2V-A14B or Wan 2.2 TI2V-5B"),
        ("tiny", Shot(("a",), loop=True), "from text alone"),
        ("i2v_a14b", Shot(("a",)), "makes videos from an image: give it one"),
        ("ti2v_5b", Shot(("a",), loop=True), "a first frame only.*render with Wan 2.2 I2V-A14B"),
        ("ti2v_5b", Shot(("a", "b"), last_image=Path("i.png")), "a first frame only"),
        ("ti2v_5b", Shot(("a", "b"), frames=1), "nothing left to make"),
        ("i2v_a14b", Shot(("a",), image=Path("i.png"), frames=1), "nothing left to make"),
        (
            "i2v_a14b",
            Shot(("a",), image=Path("i.png"), last_image=Path("i.png"), loop=True),
            "loop and a last image",
        ),
        ("i2v_a14b", Shot(("a",), image=Path("no.png")), "there is no file .*no.png"),
        ("i2v_a14b", Shot(("a",), image=Path("story.mp4")), "story.mp4 is no image"),
        ("tiny", Shot(("a",), seeds=(0, -1)), "a seed is -1: expected whole numbers from 0"),
        ("tiny", Shot(("a",), frames=4), "frames is 4: expected 4n"),
        ("tiny", Shot(("a" * 20_000,) * 2), "longer than 30 kB"),
        ("tiny", Shot(("a",), loras=(Lora(Path("a"), "high", 1.0),) * 2), "given twice"),
        (
            "tiny",
            Shot(("a",), loras=(Lora(Path("a/x"), "high", 1.0), Lora(Path("b/x"), "low", 1.0))),
            "two adapters are called x: rename one",
        ),
    ],
)
def test_a_shot_that_the_model_cannot_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shot: Shot, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(Path("i.png"), 32, 32)
    Path("story.mp4").write_bytes(b"x")
    with pytest.raises(ConfigError, match=message):
        check_shots([shot], variant(name))


def test_the_shot_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n\0")
    shots = [Shot(("a",)), Shot(("b",), image=broken)]
    with pytest.raises(DataError, match=r"shot 2: .*broken.png: is damaged"):
        check_shots(shots, TI2V)
    with pytest.raises(ConfigError, match="shot 1: "):
        check_shots(shots, I2V)


def test_shots_that_can_be_made(tmp_path: Path) -> None:
    image = picture(tmp_path / "a.png", 32, 32)
    check_shots([Shot(("a",), frames=1), Shot(("a",))], TINY)
    ends = [Shot(("a", "b"), image=image, loop=True), Shot(("a",), image=image, last_image=image)]
    check_shots(ends, I2V)
    check_shots([Shot(("a",)), Shot(("a",), image=image), Shot(("a", "b"))], TI2V)


# --- sizes


def test_frames_and_size_are_the_usual_ones() -> None:
    assert settings_of(Shot(("a",)), USUAL, I2V, by_image=True) == USUAL
    assert settings_of(Shot(("a",), frames=5), USUAL, I2V, by_image=True).frames == 5


@pytest.mark.parametrize(
    ("facts", "image", "size"),
    [(I2V, (480, 832), (464, 832)), (I2V, (64, 64), (624, 624)), (TI2V, (720, 1280), (704, 1248))],
)
def test_an_image_gives_the_size(
    tmp_path: Path, facts: Variant, image: tuple[int, int], size: tuple[int, int]
) -> None:
    shot = Shot(("a",), image=picture(tmp_path / "a.png", *image))
    usual = replace(USUAL, height=facts.height, width=facts.width)
    settings = settings_of(shot, usual, facts, by_image=True)
    assert (settings.height, settings.width) == size
    assert settings_of(shot, usual, facts, by_image=False) == usual


def test_a_size_that_no_video_can_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"480x840.*multiples of 16"):
        settings_of(Shot(("a",)), replace(USUAL, width=840), I2V, by_image=False)
    line = Shot(("a",), image=picture(tmp_path / "line.png", 1, 10000))
    with pytest.raises(ConfigError, match=r"line.png: the height would be 0 .* --height and"):
        settings_of(line, USUAL, I2V, by_image=True)
