"""The program: real files from toy models, and again from their recipes."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import decord
import numpy as np
import pytest
import torch
from adapter_examples import INFO, random_state
from render_examples import export_pairs, save_noise

from tools import render
from tools.recipe import PROGRAM, read_recipe
from tools.storyboard import KEYS, Shot, read_storyboard
from wan.lora_format import export_adapter
from wan.variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--frames=5", "--height=32", "--width=32", "--steps=2"]

Run = Callable[..., list[Path]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the program and gives the videos that it made, in the order of their names."""

    def run(*words: str | Path, out: str = "out") -> list[Path]:
        command = ["render", f"--out={tmp_path / out}", *map(str, words)]
        monkeypatch.setattr(sys, "argv", command)
        render.main()
        return sorted((tmp_path / out).glob("*.mp4"))

    return run


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the exported pairs fox and owl."""
    folder = tmp_path_factory.mktemp("adapters")
    export_pairs(folder)
    return folder


def decoded(path: Path) -> np.ndarray:
    return np.stack([frame.asnumpy() for frame in decord.VideoReader(str(path))])


def test_the_embedded_model_renders_prompts_and_seeds(run: Run, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("\ufeffA blue box.\n\n")
    videos = run(
        "A red ball.", "--prompts", tmp_path / "more.txt", "--seeds", "3", "1", "--steps=2"
    )
    names = [re.sub("_[0-9a-f]{8}.mp4", "", path.name) for path in videos]
    assert names == ["shot01_seed1", "shot01_seed3", "shot02_seed1", "shot02_seed3"]
    frames = [decoded(path) for path in videos]
    assert [video.shape for video in frames] == [(13, 64, 64, 3)] * 4
    assert len({video.tobytes() for video in frames}) == 4
    recipe = read_recipe(videos[2])
    assert (recipe["prompts"], recipe["seed"]) == (["A blue box."], 1)
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["sheet.png"]


def test_the_command_in_a_file_makes_the_same_file(
    run: Run,
    toy_i2v_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Read back by the program, and typed in another folder that holds the files it names."""
    image = save_noise(tmp_path / "first.png", 0, 48, 64)
    save_noise(tmp_path / "last.png", 1, 32, 32)
    options = [
        "a ball", "--variant=i2v_a14b", f"--model={toy_i2v_model}", "--dtype=float32", *SMALL,
        "--seeds", "7", "8", "--batch=2", "--negative=blurry, 'old'", "--then=it stops",
        f"--image={image}", f"--last-image={tmp_path}/last.png", "--cfg=sequential", "--tiled",
    ]  # fmt: skip
    first = run(*options)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / toy_i2v_model.name).symlink_to(toy_i2v_model)
    for path in (image, tmp_path / "last.png"):
        shutil.copy(path, elsewhere)
    monkeypatch.chdir(elsewhere)  # the working folder is where the names of files begin
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["render", "--read", str(first[0])])
    render.main()
    command = shlex.split(capsys.readouterr().out.splitlines()[0])
    assert tuple(command[:3]) == PROGRAM
    again = run(*command[3:], out="again")
    assert [path.name for path in again] == [path.name for path in first]
    assert len(first) == 2 * 3
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(decoded(one), decoded(other))
        assert read_recipe(one) == read_recipe(other)
        assert str(tmp_path) not in json.dumps(read_recipe(one))
        assert str(toy_i2v_model.parent) not in json.dumps(read_recipe(one))


def test_the_command_repeats_adapters_and_their_strengths(
    run: Run, toy_model: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = [f"--lora={adapters}/fox_{expert}_noise.safetensors:0.7" for expert in ("high", "low")]
    forced = [f"--lora=low={adapters}/owl_high_noise.safetensors:-0.25", "--force-expert"]
    (first,) = run("a ball", f"--model={toy_model}", *SMALL, *pair, *forced)
    command = shlex.split(str(read_recipe(first)["command"]))
    (adapters / toy_model.name).symlink_to(toy_model)
    monkeypatch.chdir(adapters)
    (again,) = run(*command[3:], out="again")
    assert again.name == first.name
    assert np.array_equal(decoded(first), decoded(again))
    (base,) = run("a ball", f"--model={toy_model}", *SMALL, out="base")
    assert not np.array_equal(decoded(first), decoded(base))


def test_a_storyboard_of_shots_with_adapters_of_their_own(
    run: Run, toy_model: Path, adapters: Path, tmp_path: Path
) -> None:
    for path in adapters.glob("*.safetensors"):
        shutil.copy(path, tmp_path)
    (tmp_path / "story.yaml").write_text(
        """
        shots:
          - prompt: a ball
          - prompt: a ball
            loras: [fox_high_noise.safetensors:0, fox_low_noise.safetensors:0]
          - prompt: a ball
            loras: [fox_high_noise.safetensors:0.5, owl_high_noise.safetensors]
          - {prompt: a ball, frames: 9, loras: [owl_low_noise.safetensors]}
        """
    )
    videos = run("--storyboard", tmp_path / "story.yaml", f"--model={toy_model}", *SMALL)
    plain, at_0, both, low = map(decoded, videos)
    assert np.array_equal(plain, at_0)
    assert not np.array_equal(plain, both)
    assert low.shape == (9, 32, 32, 3)
    told = [(a["file"], a["expert"], a["strength"]) for a in read_recipe(videos[2])["adapters"]]
    assert told == [
        ("fox_high_noise.safetensors", "high", 0.5),
        ("owl_high_noise.safetensors", "high", 1.0),
    ]
    sheets = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert sheets == ["sheet_5x32x32.png", "sheet_9x32x32.png"]


def test_distilled_settings_can_be_changed(run: Run, toy_model: Path) -> None:
    size = [f"--model={toy_model}", "--frames=5", "--height=32", "--width=32", "--distilled"]
    (plain,) = run("a ball", *size)
    settings = read_recipe(plain)["settings"]
    assert (settings["solver"], settings["steps"], settings["shift"]) == ("euler", 4, 5.0)
    assert (settings["guidance_high"], settings["guidance_low"]) == (1.0, 1.0)
    (other,) = run("a ball", *size, "--shift=16", "--guidance-high=3.5", out="other")
    settings = read_recipe(other)["settings"]
    assert (settings["shift"], settings["steps"]) == (16.0, 4)
    assert (settings["guidance_high"], settings["guidance_low"]) == (3.5, 1.0)


def test_shots_are_checked_before_a_model_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    story = tmp_path / "story.yaml"
    story.write_text("shots:\n- {prompt: a}\n- {prompt: b, frames: 9}\n- {prompt: c, image: i.png}")
    options = [f"--storyboard={story}", "--model=/no/where", "--variant=ti2v_5b"]
    monkeypatch.setattr(sys, "argv", ["render", *options])
    with pytest.raises(SystemExit, match="2"):
        render.main()
    assert f"shot 3: there is no file {tmp_path}/i.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to render: give a prompt"),
        (["a", "--storyboard=s.yaml"], "--storyboard has its own prompts"),
        (["--storyboard=s.yaml", "--last-image=i.png"], "write last_image into s.yaml"),
        (["--storyboard=s.yaml"], "there is no file s.yaml"),
        (["--prompts=empty.txt"], "--prompts empty.txt holds no prompt"),
        (["--prompts=no.txt"], "--prompts no.txt cannot be read"),
        (["a", "--extend=1", "--then=b"], "leave one out"),
        (["a", "--extend=1"], "from text alone"),
        (["a", "--batch=0"], "--batch is 0: expected a whole number"),
        (["a", "--shift=0"], "--shift is 0.0: expected a number above 0"),
        (["a", "--guidance-low=nan"], "--guidance-low is nan: expected a number of at least 0"),
        (["a", "--seeds", "-1"], "a seed is -1"),
        (["a", "--height=40"], "multiples of 16"),
        (["a", "--device=cudo"], "--device cudo cannot be used here"),
        (["a", "--out=empty.txt"], "--out empty.txt cannot be a folder"),
        (["a", "--lora=no.safetensors"], "there is no adapter file no.safetensors"),
        (["a", "--lora=narrow_high_noise.safetensors"], r"narrow_.*: the adapter does not fit"),
        (["a", "--variant=t2v_a14b"], "--model is empty.* set --model"),
        (["a", "--model=/no/where"], "--model=/no/where does not exist"),
        (["a", "--vae=/no/where"], "--vae=/no/where does not exist"),
        (["--read=empty.txt"], "empty.txt holds no recipe"),
    ],
)
def test_each_mistake_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    narrow = random_state(1, preset="attention")
    export_adapter(Path(), "narrow", narrow, INFO, torch.float32)
    monkeypatch.setattr(sys, "argv", ["render", *options])
    with pytest.raises(SystemExit) as caught:
        render.main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert re.search(message, said), said
    assert not list(tmp_path.rglob("*.mp4"))


def test_the_commands_and_the_storyboard_of_the_page_are_understood(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "render.md").read_text()
    commands = re.findall(r"^    python -m tools.render ((?:.*\\\n)*.*)$", page, re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        args = render.arguments(shlex.split(command.replace("\\\n", " ")))
        assert args.prompt or args.prompts or args.storyboard or args.read
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "story.yaml").write_text(example)
    for name in re.findall(r"[\w]+\.safetensors", example):
        export_adapter(tmp_path, name.split("_")[0], random_state(1), INFO, torch.float32)
    shots = read_storyboard(tmp_path / "story.yaml", Shot(()), VARIANTS["i2v_a14b"], forced=False)
    assert set(KEYS) == set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert len(shots) >= 2
