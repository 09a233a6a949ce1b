"""Recipes in mp4 files: whole after the journey, private, and a command that means the same."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_examples import INFO, random_state
from PIL import Image

from data.items import DataError
from tools.recipe import (
    FORMAT,
    PROGRAM,
    Setup,
    as_comment,
    describe,
    digest_of,
    make_recipe,
    read_recipe,
    repeat_command,
)
from tools.render import arguments, plan_takes
from tools.storyboard import Lora, Shot
from train.video_files import write_mp4
from wan.checkpoints import ModelPaths, component_hash, find_model
from wan.lora_format import export_adapter
from wan.safetensors_writer import file_hashes
from wan.sample_settings import SampleSettings
from wan.variants import TINY_PATH, Guidance, variant

SETTINGS = SampleSettings(
    steps=3,
    shift=0.1 + 0.2,
    guidance=Guidance(low=1 / 3, high=4.0),
    frames=5,
    height=32,
    width=48,
    solver="dpm++",
    cfg="sequential",
)
ODD = "a = b; \"c\" #d \\ $e `f` 'g' 日本 🎈\nsecond line\ttab"
BLACK = np.zeros((2, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def setup() -> Setup:
    model = find_model(ModelPaths(str(TINY_PATH)), "tiny")
    paths = ModelPaths(None)
    return Setup(model, paths, ODD, "float32", "cpu", tiled=True, forced=True)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for expert in ("high", "low"):
        info = replace(INFO, expert=expert)
        export_adapter(tmp_path, "fox", random_state(1, preset="attention"), info, torch.float32)
    Image.new("RGB", (48, 32), "red").save(tmp_path / "-first.png")
    return tmp_path


def shot_of(folder: Path, **changes: object) -> Shot:
    shot = Shot(
        prompts=(ODD,),
        seeds=(3, 0),
        frames=5,
        loras=(
            Lora(folder / "fox_high_noise.safetensors", "high", 0.1),
            Lora(folder / "fox_low_noise.safetensors", "low", -1e-9),
        ),
    )
    return replace(shot, **changes)


@pytest.mark.parametrize("text", [ODD, "plain", "日" * 10_000, "\\", "=;#\\\n", "'\"'"])
def test_a_recipe_survives_the_file(tmp_path: Path, text: str) -> None:
    recipe = {FORMAT: 1, "command": text, "list": [text, 1, None, {"deep": 0.1}]}
    path = tmp_path / "-odd = name %d 🎈.mp4"
    write_mp4(path, BLACK, 8, as_comment(recipe))
    assert read_recipe(path) == recipe


def test_files_without_a_recipe(tmp_path: Path) -> None:
    write_mp4(tmp_path / "plain.mp4", BLACK, 8)
    write_mp4(tmp_path / "other.mp4", BLACK, 8, "a comment")
    write_mp4(tmp_path / "json.mp4", BLACK, 8, '{"prompt": "a"}')
    write_mp4(tmp_path / "newer.mp4", BLACK, 8, as_comment({FORMAT: 2}))
    (tmp_path / "text.mp4").write_text("no video")
    for path in tmp_path.iterdir():
        with pytest.raises(DataError, match=f"{path.name} holds no recipe"):
            read_recipe(path)
    with pytest.raises(DataError, match="there is no file"):
        read_recipe(tmp_path / "gone.mp4")


def test_it_tells_names_and_hashes_and_no_folder(files: Path, setup: Setup) -> None:
    shot = shot_of(files, prompts=("a", "b"), image=files / "-first.png")
    given = replace(setup, paths=ModelPaths(str(TINY_PATH), vae=str(TINY_PATH / "vae")))
    recipe = make_recipe(shot, SETTINGS, given)
    text = as_comment(recipe)
    assert str(files) not in text
    assert str(TINY_PATH.parent) not in text
    assert "--model=tiny --vae=vae" in recipe["command"]
    hashes = file_hashes(files / "fox_high_noise.safetensors")
    assert recipe["adapters"][0] == {
        "file": "fox_high_noise.safetensors", "expert": "high", "strength": 0.1,
        "sha256": hashes.sha256, "autov3": hashes.autov3,
    }  # fmt: skip
    assert recipe["model"]["low"]["hash"] == component_hash(setup.model, "low")
    assert recipe["model"]["tokenizer"]["hash"] == component_hash(setup.model, "tokenizer")
    assert recipe["images"]["image"]["file"] == "-first.png"
    assert len(recipe["images"]["image"]["sha256"]) == 64
    assert recipe["settings"]["guidance_low"] == 1 / 3
    assert recipe["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "prompts", [(ODD,), ("-a", "-a", "-a"), ("",), ("a", "b", "a"), ("2", "3"), ("--", "--")]
)
@pytest.mark.parametrize("with_image", [False, True])
def test_the_command_means_the_same_take(
    files: Path,
    setup: Setup,
    monkeypatch: pytest.MonkeyPatch,
    prompts: tuple[str, ...],
    with_image: bool,
) -> None:
    name = "i2v_a14b" if with_image else "ti2v_5b"
    facts = variant(name) if with_image or len(prompts) > 1 else variant("tiny")
    monkeypatch.chdir(files)
    image = Path("-first.png") if with_image else None
    shot = shot_of(Path(), prompts=prompts, image=image, loop=with_image)
    settings = SETTINGS
    if facts.name == "ti2v_5b":
        settings = replace(SETTINGS, width=64)
        shot = replace(shot, loras=(replace(shot.loras[0], expert="single"),))
    named = replace(setup, model=replace(setup.model, variant=facts))
    command = shlex.split(shlex.join(repeat_command(shot, settings, named)))
    assert tuple(command[:3]) == PROGRAM
    args = arguments(command[3:])
    (take,) = plan_takes(args, facts)
    assert take.shot == shot
    assert take.settings == settings
    assert (args.variant, args.negative, args.dtype) == (facts.name, ODD, "float32")
    assert (args.tiled, args.force_expert, args.batch) == (True, True, 2)


def test_the_digest_and_the_description(files: Path, setup: Setup) -> None:
    recipe = make_recipe(shot_of(files), SETTINGS, setup)
    assert digest_of(recipe) == digest_of(json.loads(as_comment(recipe)))
    other = make_recipe(shot_of(files), replace(SETTINGS, steps=4), setup)
    assert digest_of(other) != digest_of(recipe)
    command, _, rest = describe(recipe).partition("\n\n{")
    assert command == recipe["command"]
    assert json.loads("{" + rest)["seeds"] == [3, 0]
