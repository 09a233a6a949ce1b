"""What a run has learned, to look at: with each adapter alone, at other strengths, over its steps.

    python -m tools.evaluate outputs/anna                     base, high only, low only, both
    python -m tools.evaluate outputs/anna --sweep             strengths 0.4 to 1.2, and losses
    python -m tools.evaluate outputs/anna --matrix            every checkpoint, every prompt
    python -m tools.evaluate outputs/anna --checkpoint best --grid --sweep

All of it goes to RUN/evaluation/: videos, a sheet, and JSON beside them.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tools.evaluation_stage import (
    Saved,
    Stage,
    choose,
    open_stage,
    read_settings,
    saved_pairs,
)
from tools.strength_sweep import combinations, describe, measure_curves, write_strengths
from train.errors import clear_errors
from train.preview import save_samples
from train.rules import ConfigError
from train.verdict import BEST
from train.video_files import SMALL, write_mp4, write_sheet
from wan.variants import Expert

STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2)
THUMBNAIL_FRAMES = 2


def main() -> None:
    """Make what the command line asks for."""
    args = parsed(sys.argv[1:])
    with clear_errors():
        evaluate(args)


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run, finished or under way")
    add("--checkpoint", default="final", help="final (the newest), best, or a number of steps")
    add("--grid", action="store_true", help="base, each adapter alone, both; the default")
    add("--sweep", action="store_true", help="each adapter and both at several strengths")
    add("--matrix", action="store_true", help="all checkpoints beside each other")
    add("--strengths", type=float, nargs="+", default=STRENGTHS, help="of the sweep")
    add("--prompt", action="append", default=[], help="instead of preview.prompts; repeatable")
    add("--seeds", type=int, nargs="+", default=[], help="instead of preview.seeds")
    return parser.parse_args(words)


def evaluate(args: argparse.Namespace) -> None:
    """Check everything, load once, make each part."""
    if not all(0 < strength <= 10 for strength in args.strengths):
        raise ConfigError("--strengths must be numbers above 0, such as 0.4 0.8 1.2")
    config, plan = read_settings(args.run, args.prompt, args.seeds)
    pairs = saved_pairs(args.run, config)
    saved = choose(pairs, args.checkpoint, _best(args.run))
    stage = open_stage(config, plan, measures=args.sweep)
    stage.put_on(saved)
    target = args.run / "evaluation" / saved.name
    if args.grid or not (args.sweep or args.matrix):
        print(make_grid(stage, saved, target / "grid"))
    if args.sweep:
        print(make_sweep(stage, saved, target / "sweep", sorted(set(args.strengths))))
    if args.matrix:
        print(make_matrix(stage, pairs, args.run / "evaluation" / "matrix"))


def _best(run: Path) -> int | None:
    try:
        return json.loads((run / BEST).read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError):
        return None


def make_grid(stage: Stage, saved: Saved, folder: Path) -> Path:
    """Each shot by the base, with each adapter alone and with all; the sheet of it."""
    together = dict.fromkeys(saved.files, 1.0)
    base, adapted = stage.render({}), stage.render(together)
    alone: dict[Expert, list[np.ndarray]] = {}
    if len(saved.files) > 1:
        alone = {expert: stage.render({expert: 1.0}) for expert in saved.files}
    save_samples(folder, stage.plan, base, adapted, stage.facts.fps, alone)
    entries = _entries(stage, together, [f"{i:02d}_adapters.mp4" for i in range(len(base))])
    for expert in alone:
        files = [f"{i:02d}_{expert}_only.mp4" for i in range(len(base))]
        entries += _entries(stage, {expert: 1.0}, files)
    _write_json(folder / "grid.json", entries)
    return folder / "sheet.png"


def make_sweep(stage: Stage, saved: Saved, folder: Path, strengths: Sequence[float]) -> Path:
    """Videos and held-out losses over strengths, and the strengths that these support."""
    rows = combinations(list(saved.files), strengths)
    made: dict[tuple[float, ...], list[np.ndarray]] = {}
    entries = []
    for at in [at for row in rows.values() for at in row]:
        key = tuple(at.values())
        if key in made:
            continue
        made[key] = stage.render(at)
        place = "_".join(f"{expert}{strength:g}" for expert, strength in at.items())
        files = [f"{index:02d}_{place}.mp4" for index in range(len(made[key]))]
        for file, video in zip(files, made[key], strict=True):
            write_mp4(folder / file, video, stage.facts.fps)
        entries += _entries(stage, at, files)
    _write_json(folder / "sweep.json", entries)
    sheet = [
        (f"{shot.prompt} (seed {shot.seed}): {title}",
         [_thumbnail(made[tuple(at.values())][index]) for at in row])
        for index, shot in enumerate(stage.plan.shots)
        for title, row in rows.items()
    ]  # fmt: skip
    write_sheet(folder / "sheet.png", sheet, [f"strength {strength:g}" for strength in strengths])
    curves = measure_curves(stage, strengths, saved)
    print(describe(curves))
    print(write_strengths(folder, curves, saved))
    return folder / "sheet.png"


def make_matrix(stage: Stage, pairs: Sequence[Saved], folder: Path) -> Path:
    """Each shot after each checkpoint, beside the base model's."""
    columns: dict[str, list[np.ndarray]] = {"base": stage.render({})}
    entries = []
    for saved in {pair.step: pair for pair in pairs}.values():
        stage.put_on(saved)
        strengths = dict.fromkeys(saved.files, 1.0)
        videos = columns[f"step {saved.step}"] = stage.render(strengths)
        files = [f"{index:02d}_{saved.name}.mp4" for index in range(len(videos))]
        for file, video in zip(files, videos, strict=True):
            write_mp4(folder / file, video, stage.facts.fps)
        entries += [e | {"step": saved.step} for e in _entries(stage, strengths, files)]
    _write_json(folder / "matrix.json", entries)
    sheet = [
        (f"{shot.prompt} (seed {shot.seed})", [_thumbnail(v[index]) for v in columns.values()])
        for index, shot in enumerate(stage.plan.shots)
    ]
    write_sheet(folder / "sheet.png", sheet, list(columns))
    return folder / "sheet.png"


def _entries(
    stage: Stage, strengths: Mapping[Expert, float], files: Sequence[str]
) -> list[dict[str, object]]:
    """What the videos of one rendering are, as JSON."""
    return [
        {
            "strengths": dict(strengths),
            "prompt": shot.prompt,
            "seed": shot.seed,
            "file": file,
            **({} if shot.image is None else {"image": shot.image.name}),
        }
        for shot, file in zip(stage.plan.shots, files, strict=True)
    ]


def _write_json(path: Path, entries: Sequence[Mapping[str, object]]) -> None:
    path.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _thumbnail(video: np.ndarray) -> np.ndarray:
    """A few frames of a video (T, H, W, 3), later ones, no higher than small ones are drawn."""
    chosen = np.linspace(0, len(video) - 1, THUMBNAIL_FRAMES + 1).round().astype(int)[1:]
    frames = video[np.unique(chosen)]
    height, width = video.shape[1:3]
    if height <= SMALL:
        return frames
    size = (round(width * SMALL / height), SMALL)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in frames])


if __name__ == "__main__":
    main()
