"""The recipe of a video, written into its file: how to make it again, and of what it was made.

Files are told by name and hash, never by folder: a recipe that is shared gives nobody away. There
is no date in it, so the same command writes the same recipe.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

import imageio_ffmpeg

from data.items import DataError
from tools.storyboard import Lora, Shot
from wan.checkpoints import Model, ModelPaths, component_hash
from wan.safetensors_writer import file_hashes
from wan.sample_settings import SampleSettings

FORMAT = "wan_lora_render"
FORMAT_VERSION = 1
LIBRARIES = ("wan-lora", "torch", "diffusers", "transformers", "peft")
PROGRAM = ("python", "-m", "tools.render")

Recipe = dict[str, object]


@dataclass(frozen=True)
class Setup:
    """What all videos of one call are made with, as it was resolved."""

    model: Model
    paths: ModelPaths  # as the user gave them: None for what is the default
    negative_prompt: str
    dtype: str
    device: str
    tiled: bool
    forced: bool  # adapters may be on another expert than their own


def make_recipe(shot: Shot, settings: SampleSettings, setup: Setup) -> Recipe:
    """The recipe of the videos of a shot that are made together, one for each of its seeds."""
    images = {"image": shot.image, "last_image": shot.last_image}
    return {
        FORMAT: FORMAT_VERSION,
        "command": shlex.join(repeat_command(shot, settings, setup)),
        "variant": setup.model.variant.name,
        "prompts": list(shot.prompts),
        "negative_prompt": setup.negative_prompt,
        "seeds": list(shot.seeds),
        "settings": {
            "frames": settings.frames,
            "height": settings.height,
            "width": settings.width,
            "steps": settings.steps,
            "shift": settings.shift,
            "solver": settings.solver,
            "guidance_high": settings.guidance.high,
            "guidance_low": settings.guidance.low,
            "cfg": settings.cfg,
            "dtype": setup.dtype,
            "tiled": setup.tiled,
            "loop": shot.loop,
        },
        "images": {key: _file(path) for key, path in images.items() if path is not None},
        "adapters": [_adapter(lora) for lora in shot.loras],
        "model": _components(setup.model),
        "device": setup.device,
        "versions": {library: version(library) for library in LIBRARIES},
    }


def repeat_command(shot: Shot, settings: SampleSettings, setup: Setup) -> list[str]:
    """The command that makes the shot again, typed in a folder with the files that it names.

    Every value is in it, so that it means the same when a default has changed.
    """
    first, *others = shot.prompts
    said_again = others == [first] * len(others)
    options = [
        f"--variant={setup.model.variant.name}",
        *_model_options(setup.paths),
        f"--frames={settings.frames}",
        f"--height={settings.height}",
        f"--width={settings.width}",
        f"--steps={settings.steps}",
        f"--shift={settings.shift}",
        f"--solver={settings.solver}",
        f"--guidance-high={settings.guidance.high}",
        f"--guidance-low={settings.guidance.low}",
        f"--negative={setup.negative_prompt}",
        f"--cfg={settings.cfg}",
        f"--dtype={setup.dtype}",
        f"--batch={len(shot.seeds)}",
        *([f"--image={shot.image.name}"] if shot.image else []),
        *([f"--last-image={shot.last_image.name}"] if shot.last_image else []),
        *([f"--extend={len(others)}"] if others and said_again else []),
        *([] if said_again else [f"--then={prompt}" for prompt in others]),
        *(f"--lora={lora.expert}={lora.path.name}:{lora.strength}" for lora in shot.loras),
        *(["--loop"] if shot.loop else []),
        *(["--tiled"] if setup.tiled else []),
        *(["--force-expert"] if setup.forced else []),
        "--seeds",
        *map(str, shot.seeds),
    ]
    # Where it can, it ends with the options, so that one can be added to it.
    return [*PROGRAM, *options, "--", first] if first[:1] == "-" else [*PROGRAM, first, *options]


def _model_options(paths: ModelPaths) -> Iterator[str]:
    for field in fields(paths):
        given: str | None = getattr(paths, field.name)
        if given is not None:
            option = "model" if field.name == "path" else field.name.replace("_", "-")
            # Not resolved: in a Hugging Face cache a link has the name, and its target a hash.
            yield f"--{option}={Path(os.path.abspath(Path(given).expanduser())).name}"


def _components(model: Model) -> dict[str, object]:
    parts = {
        part: {
            "file": weights.files[0].name,
            "storage": weights.storage,
            "hash": component_hash(model, part),
        }
        for part, weights in model.parts.items()
    }
    return {**parts, "tokenizer": {"hash": component_hash(model, "tokenizer")}}


def _adapter(lora: Lora) -> dict[str, object]:
    hashes = file_hashes(lora.path)
    return {
        "file": lora.path.name,
        "expert": lora.expert,
        "strength": lora.strength,
        "sha256": hashes.sha256,
        "autov3": hashes.autov3,
    }


def _file(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def digest_of(recipe: Recipe) -> str:
    """8 hex digits that change with anything in the recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]


def as_comment(recipe: Recipe) -> str:
    """The recipe as the comment of a video file."""
    return json.dumps(recipe, ensure_ascii=False)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a video file; `DataError` if there is none."""
    if not path.is_file():
        raise DataError(f"there is no file {path}; give an mp4 that tools.render wrote")
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    found = subprocess.run(
        [ffmpeg, "-v", "error", "-i", f"file:{path}", "-f", "ffmetadata", "-"],
        capture_output=True,
        check=False,
    )
    text = found.stdout.decode(errors="replace")
    comment = re.search(r"^comment=((?:[^\\\n]|\\.)*)", text, re.MULTILINE | re.DOTALL)
    # What has a meaning in ffmetadata (= ; # \ and line ends) is written after a backslash.
    written = re.sub(r"\\(.)", r"\1", comment[1], flags=re.DOTALL) if comment else ""
    try:
        recipe = json.loads(written)
    except ValueError:
        recipe = None
    if not isinstance(recipe, dict) or recipe.get(FORMAT) != FORMAT_VERSION:
        raise DataError(
            f"{path} holds no recipe of tools.render (version {FORMAT_VERSION}): it is another "
            "file, or it was re-encoded by a program or a site that drops metadata"
        )
    return recipe


def describe(recipe: Recipe) -> str:
    """The recipe for people: first the command, then all the rest."""
    rest = {key: value for key, value in recipe.items() if key not in (FORMAT, "command")}
    return f"{recipe['command']}\n\n{json.dumps(rest, indent=2, ensure_ascii=False)}"
