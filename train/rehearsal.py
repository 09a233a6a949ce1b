"""`dry_run`: the whole program once through, on a toy of the model, in a folder that goes away.

What the user set is looked at first: model, clips, plan. Then each expert takes a step as
configured, and everything that a run does between and after steps is done once: encoding,
measuring, samples, a checkpoint, the files to upload, their reload.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from PIL import Image

from train import plan, report
from train.compose import trained_experts
from train.config import Config, DataConfig, PreviewConfig
from train.learner import timestep_law
from train.rules import ConfigError
from train.stand_in import write_model, write_videos
from train.tracking import progress_bar, say
from train.turns import Turns
from wan.variants import VARIANTS, Expert, Variant

CPU = torch.device("cpu")
FRAMES = 5
MOST_TURNS = 6  # that are listed


@contextmanager
def rehearsed(config: Config) -> Iterator[Config]:
    """The run as it is, or for `dry_run` its rehearsal; `ConfigError` on several processes."""
    if not config.dry_run:
        yield config
        return
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "dry_run is true, which takes one process. Type python train/lora.py in place of "
            "accelerate launch train/lora.py."
        )
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory(prefix="wan_lora_dry_run_") as folder:
        say(before(config), True)
        facts = VARIANTS[config.model.variant]
        side = 2 * facts.geometry.multiple
        write_model(Path(folder) / "model", facts)
        write_videos(Path(folder) / "videos", side, FRAMES, facts.fps)
        Image.new("RGB", (side, side)).save(Path(folder) / "first_frame.png")
        yield stand_in_run(config, facts, Path(folder), side)
    say("dry run    done: every kind of step works, and nothing was written", True)


def before(config: Config) -> str:
    """What the real run would be, all of its files looked at."""
    checked = plan.look_up(config, progress_bar(True))
    return "\n".join([report.before_training(checked, CPU, timestep_law(config)), schedule(config)])


def schedule(config: Config) -> str:
    """Whose turn it is when, and what is done between steps."""
    steps: dict[Expert, int] = {e: getattr(config, e).steps for e in trained_experts(config)}
    turns = [
        f"{expert} {len(list(taken))}"
        for expert, taken in groupby(Turns(dict(steps), config.turn_steps), itemgetter(0))
    ]
    more = f" … ({len(turns)} turns)" if len(turns) > MOST_TURNS else ""
    every = {
        "measured": config.eval.every,
        "samples": config.preview.every if config.preview.prompts else None,
        "checkpoints": config.checkpoint.every,
    }
    return "\n".join(
        [
            f"schedule   {sum(steps.values()):,} steps: {', '.join(turns[:MOST_TURNS])}{more}",
            *(f"  {name:<12} {_times(often)}" for name, often in every.items()),
            f"  {'rate':<12} {config.optim.schedule}, {config.optim.warmup_steps} steps of warm-up",
        ]
    )


def _times(every: int | None) -> str:
    if every is None:
        return "none"
    return f"every {every} steps and at the end" if every else "at the end"


def stand_in_run(config: Config, facts: Variant, folder: Path, side: int) -> Config:
    """The same run on the toy, a step of each expert; what needs a GPU is left out."""
    one = {e: replace(getattr(config, e), steps=1) for e in ("high", "low", "single")}
    on_gpu = config.optim.name.startswith("bitsandbytes.")
    optim = replace(config.optim, warmup_steps=0)
    if on_gpu:
        optim = replace(optim, name="torch.optim.AdamW", args={})
    frozen = None if config.speed.frozen == "nf4" else config.speed.frozen
    speed = replace(config.speed, attention="auto", compile=False, frozen=frozen, context=1)
    if speed.placement == "shard":  # here is one process
        speed = replace(speed, placement="swap")
    model = replace(
        config.model,
        path=str(folder / "model"),
        high=None,
        low=None,
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )
    return replace(
        config,
        **one,
        output_dir=str(folder / "run"),
        steps=1,
        turn_steps=1,
        resume="never",
        optim=optim,
        speed=speed,
        model=model,
        data=_toy_data(config, folder, side),
        lora=replace(config.lora, init=None),
        eval=replace(config.eval, every=1, bins=1, draws=1),
        preview=_toy_preview(config, facts, folder, side),
        checkpoint=replace(config.checkpoint, every=1),
        tracking=replace(config.tracking, mode="disabled"),
    )


def _toy_data(config: Config, folder: Path, side: int) -> DataConfig:
    return DataConfig(
        path=str(folder / "videos"),
        heldout_fraction=0.25,
        trigger=config.data.trigger,
        prefix=config.data.prefix,
        cache=str(folder / "cache"),
        workers=0,
        vae_dtype=config.data.vae_dtype,
        height=side,
        width=side,
        frames=FRAMES,
        caption_dropout=config.data.caption_dropout,
    )


def _toy_preview(config: Config, facts: Variant, folder: Path, side: int) -> PreviewConfig:
    preview = config.preview
    image = [str(folder / "first_frame.png")]
    return replace(
        preview,
        every=1,
        prompts=preview.prompts[:1],
        images=image if preview.images or facts.conditioning == "channels" else [],
        seeds=preview.seeds[:1],
        steps=2,
        frames=FRAMES,
        height=side,
        width=side,
        distilled=[],
        budget=None,
    )
