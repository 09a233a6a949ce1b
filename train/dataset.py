"""The user's datasets become clips: what is read, what is held out, and what is dropped and why."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data.buckets import Clip, ClipSettings, describe_buckets, plan_clips
from data.files import FileFacts, read_files
from data.items import DataError, Dropped, Item, Source, raise_problems
from data.sources import read_name_list, read_source, split_heldout
from train.config import DataConfig
from wan.variants import Variant

Progress = Callable[[Iterable[int], str], Iterable[int]]


@dataclass(frozen=True)
class Clips:
    """What is trained on and what is only measured on; no file is on both sides."""

    train: list[Clip]
    heldout: list[Clip]
    files: dict[Path, FileFacts]
    dropped: list[Dropped]
    notes: list[str]


def plan_dataset(data: DataConfig, facts: Variant, progress: Progress) -> Clips:
    """Read the datasets, open every file that is not known yet, choose windows and shapes.

    Nothing is encoded. `DataError` names all files that cannot be used, unless `data.skip_bad`:
    then they are in `dropped`.
    """
    settings = _clip_settings(data, facts)
    readings = [read_source(source, media=_media(data)) for source in _sources(data)]
    items = [item for reading in readings for item in reading.items]
    dropped = [entry for reading in readings for entry in reading.dropped]
    notes = [note for reading in readings for note in reading.notes]
    apart = []
    if data.heldout_path is not None and not data.heldout_path.endswith(".txt"):
        source = Source(Path(data.heldout_path), "data.heldout_path", prefix=data.prefix)
        reading = read_source(source, media=_media(data))
        apart, dropped, notes = (
            reading.items,
            [*dropped, *reading.dropped],
            [*notes, *reading.notes],
        )
    elif data.heldout_path is not None:
        chosen = read_name_list(Path(data.heldout_path), "data.heldout_path", items)
        items = [replace(i, split="heldout" if i.name in chosen else "train") for i in items]

    paths = {path for item in [*items, *apart] for path in (item.path, item.mask) if path}
    ordered = sorted(paths)
    found = read_files(ordered, Path(data.cache), data.workers, progress)
    files = dict(zip(ordered, found, strict=True))
    items, dropped = _usable(items, files, dropped, facts)
    apart, dropped = _usable(apart, files, dropped, facts)

    train, heldout = _split(items, apart, files, data, notes)
    plans = []
    for side in (train, heldout):
        infos = [info for item in side if (info := files[item.path].info) is not None]
        plans.append(plan_clips(side, infos, settings))
        dropped += plans[-1].dropped
        notes += plans[-1].warnings
    if not data.skip_bad:
        raise_problems(
            f"data.path={data.path} (data.skip_bad=true leaves such files out)",
            [f"{entry.name}: {entry.reason}" for entry in dropped],
        )
    return Clips(plans[0].clips, plans[1].clips, files, dropped, notes)


def _clip_settings(data: DataConfig, facts: Variant) -> ClipSettings:
    multiple = facts.geometry.multiple
    if data.height % multiple or data.width % multiple:
        raise DataError(
            f"data.height={data.height} and data.width={data.width}: {facts.title} takes "
            f"multiples of {multiple} pixels; set such a size"
        )
    return ClipSettings(
        resolution=(data.height, data.width),
        frames=data.frames,
        fps=facts.fps,
        policy=data.fps_policy,  # pyright: ignore[reportArgumentType] (checked by the schema)
        multiple=multiple,
        time_stride=facts.geometry.time_stride,
        extraction=data.extraction,  # pyright: ignore[reportArgumentType] (checked by the schema)
        scales=tuple(data.scales),
        windows=data.windows or 1,
        stride=data.stride or data.frames,
        upscale=data.upscale,
        max_buckets=data.max_buckets,
    )


def _media(data: DataConfig) -> Path:
    """Where media that a dataset holds inside itself are written, to be files like all others."""
    return Path(data.cache) / "media"


def _sources(data: DataConfig) -> list[Source]:
    root = None if data.root is None else Path(data.root)
    sources = [Source(Path(data.path), "data.path", root, data.prefix)]
    for name, mixed in data.mix.items():
        sources.append(
            Source(
                path=Path(mixed.path),
                key=f"data.mix.{name}.path",
                root=None if mixed.root is None else Path(mixed.root),
                prefix=data.prefix if mixed.prefix is None else mixed.prefix,
                weight=mixed.weight,
                loss_weight=mixed.loss_weight,
                regularisation=mixed.regularisation,
            )
        )
    return sources


def _usable(
    items: Sequence[Item], files: dict[Path, FileFacts], dropped: list[Dropped], facts: Variant
) -> tuple[list[Item], list[Dropped]]:
    """The items whose files can be decoded and used with this model, and all that were dropped."""
    usable, dropped = [], list(dropped)
    for item in items:
        problem = files[item.path].problem
        if problem is None and item.mask is not None and files[item.mask].problem is not None:
            problem = f"its mask {item.mask.name} {files[item.mask].problem}"
        info = files[item.path].info
        if problem is None and facts.conditioning == "channels" and info and info.frames == 1:
            problem = (
                f"is a single frame, and {facts.title} learns how an image moves on: nothing is "
                "left to learn from it; remove it, or train a text-to-video model with it"
            )
        if problem is None:
            usable.append(item)
        else:
            dropped.append(Dropped(item.name, problem))
    return usable, dropped


def _split(
    items: Sequence[Item],
    apart: Sequence[Item],
    files: dict[Path, FileFacts],
    data: DataConfig,
    notes: list[str],
) -> tuple[list[Item], list[Item]]:
    """(training, held out), no content on both sides: a copy of a file is that file."""
    content = [files[item.path].digest for item in items]
    fraction = 0.0 if data.heldout_path else data.heldout_fraction
    train, heldout = split_heldout(items, fraction, content)
    kept_away = {files[item.path].digest for item in apart}
    kept = [item for item in train if files[item.path].digest not in kept_away]
    if len(kept) < len(train):
        notes.append(
            f"{len(train) - len(kept)} of the files to train on are in data.heldout_path="
            f"{data.heldout_path} too: they are only measured on"
        )
    return kept, [*heldout, *apart]


def overview(clips: Clips) -> dict[str, object]:
    """How many clips of which shapes are used, and what is not and why, for programs."""
    sides = {"train": clips.train, "heldout": clips.heldout}
    used = {
        side: {
            "clips": len(chosen),
            "shapes": {f"{b.frames}x{b.height}x{b.width}": n for b, n in describe_buckets(chosen)},
        }
        for side, chosen in sides.items()
    }
    return {**used, "dropped": [asdict(entry) for entry in clips.dropped], "notes": clips.notes}


def check_sides(clips: Clips, data: DataConfig) -> None:
    """`DataError` unless there is something to train on and something to measure on."""
    if not clips.train:
        raise DataError(
            f"data.path={data.path}: nothing is left to train on. Everything is held out or cannot "
            "be used; `python -m tools.dataset` with the same settings says what and why."
        )
    if not clips.heldout:
        raise DataError(
            f"data.path={data.path}: nothing is left to measure on. Add another file, or set "
            "data.heldout_path to a folder of clips that are never trained on."
        )
