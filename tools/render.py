"""Videos from prompts, images and storyboards, by the official pipeline, with any adapters.

    python -m tools.render "A red ball rolling down a green hill on a sunny day." --seeds 0 1
    python -m tools.render --storyboard story.yaml --variant i2v_a14b --model DIR
    python -m tools.render --read outputs/render/shot01_seed0_0123abcd.mp4

Each mp4 holds its recipe: --read prints it, and first the command that makes the video again.
Without --model it is the toy model of this repository that renders. docs/render.md shows more.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from tools.film import Film, Take, film, open_studio, read_adapters
from tools.recipe import Setup, as_comment, describe, digest_of, make_recipe, read_recipe
from tools.storyboard import (
    Shot,
    check_shots,
    clip_prompts,
    read_lora,
    read_storyboard,
    settings_of,
)
from train.errors import clear_errors
from train.rules import COUNT, NOT_NEGATIVE, POSITIVE, ConfigError
from train.video_files import write_mp4, write_sheet
from wan.checkpoints import ModelError, ModelPaths, find_model
from wan.sample_settings import Cfg, SampleSettings, SolverName, distilled
from wan.variants import TINY_PATH, VARIANTS, Guidance, Variant

OF_ONE_SHOT = ("image", "last_image", "extend", "then", "loop")
RULES = {
    **dict.fromkeys(("batch", "steps", "height", "width", "extend"), COUNT),
    "shift": POSITIVE,
    **dict.fromkeys(("guidance_high", "guidance_low"), NOT_NEGATIVE),
}


def main() -> None:
    """Render, or say how a video was rendered."""
    args = arguments(sys.argv[1:])
    with clear_errors():
        if args.read is not None:
            print(describe(read_recipe(args.read)))
            return
        try:
            render(args)
        except ModelError as error:
            raise ModelError(_with_options(str(error))) from None


def render(args: argparse.Namespace) -> None:
    """Check everything, then load the models, and write each video when it is made."""
    facts = VARIANTS[args.variant]
    takes = list(plan_takes(args, facts))
    device = _device(args.device)
    _make_folder(args.out)
    paths = ModelPaths(args.model, args.high, args.low, args.vae, args.text_encoder, args.tokenizer)
    embedded = replace(paths, path=paths.path or str(TINY_PATH))
    model = find_model(embedded if facts.name == "tiny" else paths, facts.name)
    states = read_adapters((lora for take in takes for lora in take.shot.loras), model)
    if args.distilled and not states:
        print("note: --distilled without --lora is for a model that is distilled itself")
    setup = Setup(
        model=model,
        paths=paths,
        negative_prompt=facts.negative_prompt if args.negative is None else args.negative,
        dtype=args.dtype or ("float32" if facts.name == "tiny" else "bfloat16"),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        tiled=args.tiled,
        forced=args.force_expert,
    )
    prompts = [prompt for take in takes for prompt in take.shot.prompts]
    studio = open_studio(
        model, [*prompts, setup.negative_prompt], states, getattr(torch, setup.dtype), device
    )
    videos: list[tuple[str, np.ndarray]] = []
    for take in takes:
        made = film(take, setup.negative_prompt, setup.tiled, studio)
        setup = replace(setup, tiled=made.tiled)
        with _writing(args.out):
            videos += write_take(args.out, take, made, setup)
    with _writing(args.out):
        write_sheets(args.out, videos, facts.title)


def plan_takes(args: argparse.Namespace, facts: Variant) -> Iterator[Take]:
    """What the command line asks for, checked; every video's settings are resolved."""
    _check_options(args)
    usual = _usual_settings(args, facts)
    by_image = args.height is None and args.width is None
    shots = _shots(args, facts)
    check_shots(shots, facts)
    for number, shot in enumerate(shots, start=1):
        settings = settings_of(shot, usual, facts, by_image)
        for start in range(0, len(shot.seeds), args.batch):
            seeds = shot.seeds[start : start + args.batch]
            yield Take(number, replace(shot, seeds=seeds), settings)


def _check_options(args: argparse.Namespace) -> None:
    for name, rule in RULES.items():
        value = getattr(args, name)
        if value is not None and not rule.holds(value):
            raise ConfigError(f"{_option(name)} is {value}: expected {rule.text}")
    if args.extend and args.then:
        raise ConfigError("--extend and --then both say how a video goes on: leave one out")
    if args.storyboard is None:
        if not args.prompt and args.prompts is None:
            raise ConfigError("nothing to render: give a prompt, --prompts or --storyboard")
        return
    if args.prompt or args.prompts is not None:
        raise ConfigError("--storyboard has its own prompts: leave out those of the command line")
    for name in OF_ONE_SHOT:
        if getattr(args, name):
            raise ConfigError(
                f"{_option(name)} is of one shot: write {name} into {args.storyboard}"
            )


def _usual_settings(args: argparse.Namespace, facts: Variant) -> SampleSettings:
    """The variant's settings, or those of distilled adapters, and what is given instead."""
    usual = SampleSettings(
        steps=facts.sample_steps,
        shift=facts.sample_shift,
        guidance=facts.guidance,
        frames=facts.frames,
        height=facts.height,
        width=facts.width,
    )
    if args.distilled:
        usual = distilled(usual)
    low, high = args.guidance_low, args.guidance_high
    guidance = Guidance(
        low=usual.guidance.low if low is None else low,
        high=usual.guidance.high if high is None else high,
    )
    names = ("steps", "shift", "height", "width", "solver", "cfg")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(usual, guidance=guidance, **given)


def _shots(args: argparse.Namespace, facts: Variant) -> list[Shot]:
    here = Path()
    shot = Shot(
        prompts=(),
        seeds=tuple(args.seeds),
        frames=args.frames,
        image=args.image,
        last_image=args.last_image,
        loop=args.loop,
        loras=tuple(read_lora(text, here, facts, args.force_expert) for text in args.lora),
    )
    if args.storyboard is not None:
        return read_storyboard(args.storyboard, shot, facts, args.force_expert)
    prompts = [*args.prompt, *(_lines(args.prompts) if args.prompts else [])]
    return [replace(shot, prompts=clip_prompts(p, args.extend or 0, args.then)) for p in prompts]


def _lines(path: Path) -> list[str]:
    """The prompts in a file, one in each line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path} cannot be read as text ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts {path} holds no prompt: write one in each line")
    return prompts


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name} cannot be used here: {reason}") from None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be a folder: {error.strerror}") from None


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """`ConfigError` if the disk does not take what is written within."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--out {folder} cannot be written ({error.strerror or error}): make room, or give "
            "another folder; videos that are there are whole"
        ) from None


def write_take(folder: Path, take: Take, made: Film, setup: Setup) -> list[tuple[str, np.ndarray]]:
    """Write each video and, of several clips, the clips; gives title and frames of each video.

    Names end with a digest of the recipe: another recipe never overwrites a video.
    """
    recipe = make_recipe(take.shot, take.settings, setup)
    fps = setup.model.variant.fps
    joined = made.joined(take.shot.loop)
    titles = []
    for seed, video, clips in zip(take.shot.seeds, joined, made.clips, strict=True):
        stem = f"shot{take.number:02d}_seed{seed}_{digest_of(recipe)}"
        of_seed = {**recipe, "seed": seed}
        write_mp4(folder / f"{stem}.mp4", video, fps, as_comment(of_seed))
        print(folder / f"{stem}.mp4")
        if len(clips) > 1:
            for number, clip in enumerate(clips, start=1):
                comment = as_comment({**of_seed, "part": number})
                write_mp4(folder / f"{stem}_part{number}.mp4", clip, fps, comment)
        titles.append(f"{' / '.join(dict.fromkeys(take.shot.prompts))} (seed {seed})")
    return list(zip(titles, joined, strict=True))


def write_sheets(folder: Path, videos: list[tuple[str, np.ndarray]], title: str) -> None:
    """All videos at a glance: one PNG, or one for each shape."""
    shapes = list(dict.fromkeys(video.shape for _, video in videos))
    for shape in shapes:
        rows = [(name, [video]) for name, video in videos if video.shape == shape]
        frames, height, width, _ = shape
        name = "sheet.png" if len(shapes) == 1 else f"sheet_{frames}x{height}x{width}.png"
        write_sheet(folder / name, rows, [title])
        print(folder / name)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _with_options(message: str) -> str:
    """A message about the keys of a config as one about the options of this program."""
    message = message.replace("model.path", "--model")
    keys = r"\bmodel\.(high|low|vae|text_encoder|tokenizer)\b"
    return re.sub(keys, lambda found: _option(found[1]), message)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prompt", nargs="*", help="what a video shows; several make as many shots")
    add("--read", type=Path, metavar="MP4", help="print the recipe in a video, and stop")
    add("--out", type=Path, default=Path("outputs/render"), help="folder for the videos")
    _add_shots(parser.add_argument_group("shots"))
    _add_model(parser.add_argument_group("model"))
    _add_sampling(parser.add_argument_group("sampling, by default as the variant has it"))
    # After -- come prompts, whatever they look like: parse_intermixed_args does not know it.
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_intermixed_args(words[:end])
    args.prompt += words[end + 1 :]
    return args


def _add_shots(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--prompts", type=Path, metavar="TXT", help="more prompts, one in each line")
    add("--storyboard", type=Path, metavar="YAML", help="shots with settings of their own")
    add("--seeds", type=int, nargs="+", default=[0], help="a video for each")
    add("--batch", type=int, default=1, help="seeds of a shot that are rendered together")
    add("--frames", type=int, help="frames of a clip, 4n+1")
    add("--image", type=Path, help="the first frame (I2V-A14B, TI2V-5B)")
    add("--last-image", type=Path, help="the last frame (I2V-A14B)")
    add("--extend", type=int, metavar="N", help="go on for N more clips of the same prompt")
    add("--then", action="append", default=[], metavar="PROMPT", help="go on with this prompt")
    add("--loop", action="store_true", help="end with the first frame (I2V-A14B)")


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--variant", choices=VARIANTS, default="tiny")
    add("--model", metavar="DIR", help="folder of the weights, in any layout")
    for part in ("high", "low", "vae", "text-encoder", "tokenizer"):
        add(f"--{part}", metavar="PATH", help="if it lies elsewhere")
    lora = "[high=|low=]FILE[:STRENGTH]"
    add("--lora", action="append", default=[], metavar=lora, help="an adapter; as often as needed")
    add("--force-expert", action="store_true", help="also on another expert than its own")
    add("--dtype", choices=("bfloat16", "float32"), help="of the weights but the VAE's")
    add("--device", help="cuda where there is one, else cpu")


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--height", type=int, help="pixels; with an image, by default of its shape")
    add("--width", type=int)
    add("--steps", type=int)
    add("--shift", type=float)
    add("--solver", choices=get_args(SolverName))
    add("--guidance-high", type=float, help="guidance scale of the high expert; 1 = off")
    add("--guidance-low", type=float, help="of the low expert, or of the only one")
    add("--negative", help="what to guide away from")
    add("--distilled", action="store_true", help="4 steps, for distilled adapters in --lora")
    add("--cfg", choices=get_args(Cfg), help="sequential: half the memory")
    add("--tiled", action="store_true", help="decode in tiles: less memory, faint seams")


if __name__ == "__main__":
    main()
