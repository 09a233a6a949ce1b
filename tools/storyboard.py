"""What to render: shots from the command line or from a storyboard, a YAML file.

All that a user can get wrong in a shot is told here, before any weight is read.
"""

import difflib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data.items import kind_of
from data.media import probe
from train.rules import COUNT, FRAMES, ConfigError, Rule, written
from wan.conditioning import i2v_size, ti2v_size
from wan.headers import read_header
from wan.lora_metadata import OURS
from wan.recognise import expert_by_name
from wan.sample_settings import SampleSettings
from wan.variants import VARIANTS, Expert, Variant


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_seeds(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_whole, value))


KEYS: dict[str, Rule] = {
    "prompt": Rule("some text", _is_text),
    "seeds": Rule("a whole number, or a list of them", lambda v: _is_whole(v) or _are_seeds(v)),
    "frames": Rule(FRAMES.text, lambda v: _is_whole(v) and FRAMES.holds(v)),
    "image": Rule("the name of an image file", _is_text),
    "last_image": Rule("the name of an image file", _is_text),
    "loras": Rule("a list such as [anna_high_noise.safetensors:0.8]", _are_texts),
    "extend": Rule(COUNT.text, lambda v: _is_whole(v) and COUNT.holds(v)),
    "then": Rule("a list of prompts, one for each further clip", _are_texts),
    "loop": Rule("true or false", lambda v: isinstance(v, bool)),
}
LARGEST_SEED = 2**63 - 1
LONGEST_PROMPTS = 30_000  # bytes: what fits into a recipe, twice, as an argument of ffmpeg


@dataclass(frozen=True)
class Lora:
    """An adapter file, the expert that it works on, and how strongly: 1 is as trained."""

    path: Path
    expert: Expert
    strength: float


@dataclass(frozen=True)
class Shot:
    """A video for each seed: one clip, or several of which each goes on where the last one ended.

    The first frame of a further clip is the last frame of the one before.
    """

    prompts: tuple[str, ...]  # one for each clip
    seeds: tuple[int, ...] = (0,)
    frames: int | None = None  # of each clip; None = the model's
    image: Path | None = None  # the first frame of the first clip
    last_image: Path | None = None  # the last frame of the last clip
    loop: bool = False  # the last clip ends with the first frame of the first
    loras: tuple[Lora, ...] = ()


def read_storyboard(path: Path, default: Shot, facts: Variant, forced: bool) -> list[Shot]:
    """The shots of a storyboard; what one does not say is as in `default`.

    Names of files are relative to the storyboard's folder. `ConfigError` names the shot and the
    key. `forced` is for `read_lora`.
    """
    found = _read_yaml(path)
    shots = found.get("shots") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(shots, list) or not shots:
        raise ConfigError(f"{path}: expected `shots:` and, below it, `- prompt: …` for each shot")
    _check_keys(found, ("shots",), str(path))
    return [
        _read_shot(entry, f"{path}: shot {number}", default, path.parent, (facts, forced))
        for number, entry in enumerate(shots, start=1)
    ]


def _read_yaml(path: Path) -> object:
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}; give the YAML file of a storyboard") from None
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        found = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read as YAML: {found}") from None


def _check_keys(found: Collection[str], known: Collection[str], where: str) -> None:
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            guess = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
            raise ConfigError(f"{where}: {key} is not a key; {guess}")


def _read_shot(
    entry: object, where: str, default: Shot, folder: Path, lora_rules: tuple[Variant, bool]
) -> Shot:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is {written(entry)}: expected keys, such as `prompt: …`")
    _check_keys(entry, KEYS, where)
    for key, value in entry.items():
        if not KEYS[key].holds(value):
            raise ConfigError(f"{where}: {key} is {written(value)}: expected {KEYS[key].text}")
    if "prompt" not in entry:
        raise ConfigError(f"{where} has no prompt: write `prompt: …`, what the video shows")
    if "extend" in entry and "then" in entry:
        raise ConfigError(f"{where} has extend and then: both say how it goes on; leave one out")
    images = {key: folder / entry[key] for key in ("image", "last_image") if key in entry}
    seeds = entry.get("seeds", list(default.seeds))
    loras = [read_lora(text, folder, *lora_rules) for text in entry.get("loras", ())]
    return replace(
        default,
        prompts=clip_prompts(entry["prompt"], entry.get("extend", 0), entry.get("then", ())),
        seeds=tuple(seeds) if isinstance(seeds, list) else (seeds,),
        frames=entry.get("frames", default.frames),
        image=images.get("image"),
        last_image=images.get("last_image"),
        loop=entry.get("loop", False),
        loras=tuple(loras) if "loras" in entry else default.loras,
    )


def clip_prompts(prompt: str, extend: int, then: Sequence[str]) -> tuple[str, ...]:
    """The prompt of each clip: the first, `extend` times it again, and what `then` happens."""
    return (prompt, *[prompt] * extend, *then)


def read_lora(text: str, folder: Path, facts: Variant, forced: bool) -> Lora:
    """An adapter from `[high=|low=|single=]FILE[:STRENGTH]`, FILE relative to `folder`.

    The expert is told by the file's metadata, or by its name; `ConfigError` if neither does and it
    is not written, or if they tell another one than is written (unless `forced`).
    """
    prefix, equals, rest = text.partition("=")
    named: Expert | None = prefix if equals and prefix in ("high", "low", "single") else None
    name, strength = _split_strength(rest if named else text)
    path = folder / Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"there is no adapter file {path}; expected FILE or FILE:STRENGTH")
    told = _told_expert(path)
    expert = named or told or (facts.experts[0] if len(facts.experts) == 1 else None)
    if expert is None:
        raise ConfigError(
            f"nothing tells whether {path} is an adapter of high or of low noise: write "
            f"high={name} or low={name}"
        )
    if expert not in facts.experts:
        raise ConfigError(
            f"{path} is an adapter of the expert {expert}, but {facts.title} has "
            f"{' and '.join(facts.experts)}: give another file, or write "
            f"{facts.experts[0]}={name} and --force-expert"
        )
    if told is not None and told != expert and not forced:
        raise ConfigError(
            f"{path} is an adapter of the expert {told}, and was given to {expert}: write "
            f"{told}={name}, or force it with --force-expert"
        )
    return Lora(path, expert, strength)


def _split_strength(text: str) -> tuple[str, float]:
    name, colon, tail = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        strength = float(tail)
    except ValueError:
        return text, 1.0
    if not math.isfinite(strength):
        raise ConfigError(f"{text}: the strength is {tail}; expected a number, such as 0.8")
    return name, strength


def _told_expert(path: Path) -> Expert | None:
    told = read_header(path).metadata.get(f"{OURS}expert")
    return told if told in ("high", "low", "single") else expert_by_name(path)


def check_shots(shots: Sequence[Shot], facts: Variant) -> None:
    """`ConfigError` at the first shot that the model cannot make; `DataError` for a bad image."""
    for number, shot in enumerate(shots, start=1):
        if problem := _problem(shot) or _problem_of_images(shot, facts):
            raise ConfigError(f"shot {number}: {problem}")
        for image in (shot.image, shot.last_image):
            if image is not None:
                _check_image(image, number)
    paths = {lora.path.resolve() for shot in shots for lora in shot.loras}
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(
            f"two adapters are called {twice}: rename one, as a video's recipe tells them by name"
        )


def _problem(shot: Shot) -> str | None:
    """What is wrong with a shot for any model."""
    if not all(0 <= seed <= LARGEST_SEED for seed in shot.seeds):
        return f"a seed is {min(shot.seeds)}: expected whole numbers from 0 to {LARGEST_SEED}"
    if shot.frames is not None and not FRAMES.holds(shot.frames):
        return f"frames is {shot.frames}: expected {FRAMES.text}"
    if sum(len(prompt.encode()) for prompt in shot.prompts) > LONGEST_PROMPTS:
        return "its prompts are longer than 30 kB: the model reads the first 512 tokens of each"
    given = [(lora.path, lora.expert) for lora in shot.loras]
    if len(set(given)) < len(given):
        return "an adapter is given twice to one expert: give it once, with the strength you want"
    return None


def _problem_of_images(shot: Shot, facts: Variant) -> str | None:
    """What of the images that a shot needs the model cannot be given."""
    ends = shot.loop or shot.last_image is not None
    goes_on = len(shot.prompts) > 1
    if shot.loop and shot.last_image is not None:
        return "it has loop and a last image: both say how it ends; leave one out"
    if facts.conditioning == "none" and (ends or goes_on or shot.image is not None):
        return (
            f"{facts.title} makes videos from text alone: leave out images, extend, then and loop, "
            f"or render with {_titles('channels', 'first_frame')}"
        )
    if facts.conditioning == "first_frame" and ends:
        return (
            f"{facts.title} can be given a first frame only: leave out the last image and loop, or "
            f"render with {_titles('channels')}"
        )
    if facts.conditioning == "channels" and shot.image is None:
        return f"{facts.title} makes videos from an image: give it one"
    if (shot.image is not None or goes_on) and shot.frames == 1:
        return "a clip of 1 frame that is given has nothing left to make: set more frames"
    return None


def _titles(*conditionings: str) -> str:
    return " or ".join(v.title for v in VARIANTS.values() if v.conditioning in conditionings)


def _check_image(image: Path, number: int) -> None:
    if not image.is_file():
        raise ConfigError(f"shot {number}: there is no file {image}")
    if kind_of(image) != "image":
        raise ConfigError(f"shot {number}: {image} is no image; give a .png, .jpg or .webp")
    probe(image, "image", f"shot {number}: {image}")


def settings_of(
    shot: Shot, usual: SampleSettings, facts: Variant, by_image: bool
) -> SampleSettings:
    """The settings of a shot: its frames and, with `by_image`, the official size for its image.

    `ConfigError` if the model cannot make a video of that size.
    """
    height, width = usual.height, usual.width
    if shot.image is not None and by_image:
        info = probe(shot.image, "image", str(shot.image))
        official = i2v_size if facts.conditioning == "channels" else ti2v_size
        height, width = official(info.height, info.width, height * width)
    settings = replace(usual, frames=shot.frames or usual.frames, height=height, width=width)
    least = facts.geometry.multiple
    if min(height, width) < least:
        where = f"{shot.image}: " if shot.image is not None and by_image else ""
        raise ConfigError(
            f"{where}the height would be {height} and the width {width}: expected at least "
            f"{least}; set both, with --height and --width"
        )
    try:
        facts.geometry.latent_shape(settings.frames, height, width)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return settings
