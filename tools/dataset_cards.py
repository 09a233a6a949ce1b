"""From a planned dataset to its page: how each item is used, and what to look at twice."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np

from data.batches import BatchOrder
from data.buckets import FPS_TOLERANCE, MUCH_CROPPED, Clip
from data.files import FileFacts
from data.items import Item, MediaInfo
from data.shapes import Bucket, cropped_share
from tools.dataset_page import (
    STATE_WORDS,
    BucketRow,
    Caption,
    DuplicateGroup,
    Page,
    PageItem,
    State,
    Window,
)
from tools.dataset_pictures import Shot
from tools.near_duplicates import Duplicates, find_duplicates
from train.config import Config
from train.dataset import Clips
from wan.text import clean_prompt
from wan.variants import Variant

LISTED_NAMES = 8  # of a group of duplicates; the page shows all of them


@dataclass(frozen=True)
class Entry:
    """An item that is used, its clips in the order of the plan, and those of which there is more.

    An item of very many clips is shown by a few of them, the first among them.
    """

    item: Item
    state: State
    clips: tuple[Clip, ...]
    shots: tuple[Shot, ...] = ()


def entries_of(plan: Clips) -> list[Entry]:
    """All that is used, what is trained on first. Two rows of one file are two entries."""
    sides: tuple[tuple[State, list[Clip]], ...] = (("train", plan.train), ("heldout", plan.heldout))
    entries = []
    for state, clips in sides:
        of_item: dict[int, list[Clip]] = defaultdict(list)
        for clip in clips:
            of_item[id(clip.item)].append(clip)
        entries += [Entry(group[0].item, state, tuple(group)) for group in of_item.values()]
    return entries


def final_prompts(item: Item) -> list[str]:
    """The captions of an item as the text encoder gets them."""
    return [clean_prompt(caption) for caption in item.captions]


def make_page(
    config: Config,
    facts: Variant,
    plan: Clips,
    entries: Sequence[Entry],
    tokens: Mapping[str, int],
) -> Page:
    """The page of these entries, which have shots, and of all that was dropped.

    Of the figures on top, warnings and duplicates are those of the entries, all else of the plan.
    `tokens` has the number of tokens of each final prompt, as far as it is known.
    """
    groups = duplicate_groups(entries, plan.files)
    place = {index: number for number, group in enumerate(groups) for index in group.members}
    leaks = _leaks(entries, groups)
    cards = [
        _card(entry, config, facts, plan.files, tokens, place.get(index), leaks.get(index))
        for index, entry in enumerate(entries)
    ]
    cards += [PageItem(entry.name, "dropped", reason=entry.reason) for entry in plan.dropped]
    data = config.data
    return Page(
        title=config.name,
        subtitle=f"{data.path} for {facts.title}: {data.frames} frames at {facts.fps} fps, "
        f"{data.height} × {data.width} (height × width)",
        summary=_summary(config, plan, cards),
        notes=plan.notes,
        buckets=_bucket_rows(plan.train, config.batch_size),
        groups=[
            DuplicateGroup(
                f"{len(group.members)} {'are the same file' if group.exact else 'look alike'}",
                tuple(entries[index].item.name for index in group.members[:LISTED_NAMES]),
            )
            for group in groups
        ],
        items=cards,
    )


def duplicate_groups(entries: Sequence[Entry], files: Mapping[Path, FileFacts]) -> list[Duplicates]:
    """Entries that show the same; two parts (start, end) of one file are not the same."""
    if not entries:
        return []
    items = [entry.item for entry in entries]
    digests = [f"{files[item.path].digest} {item.start} {item.end}" for item in items]
    return find_duplicates(digests, np.stack([entry.shots[0].look for entry in entries]))


def _leaks(entries: Sequence[Entry], groups: Sequence[Duplicates]) -> dict[int, str]:
    """A warning for each entry of which a duplicate is on the other side of the split."""
    warnings = {}
    for group in groups:
        first_of: dict[State, str] = {}
        for index in group.members:
            first_of.setdefault(entries[index].state, entries[index].item.name)
        for index in group.members:
            other: State = "train" if entries[index].state == "heldout" else "heldout"
            if other in first_of:
                warnings[index] = (
                    f"{first_of[other]} shows the same and is {STATE_WORDS[other]}: the held-out "
                    "loss is too good"
                )
    return warnings


def _card(
    entry: Entry,
    config: Config,
    facts: Variant,
    files: Mapping[Path, FileFacts],
    tokens: Mapping[str, int],
    group: int | None,
    leak: str | None,
) -> PageItem:
    info = files[entry.item.path].info
    assert info is not None, "what cannot be decoded is not planned"
    captions = tuple(Caption(text, tokens.get(text)) for text in final_prompts(entry.item))
    warnings = [
        *(shot.problem for shot in entry.shots if shot.problem),
        *_clip_warnings(entry, info, facts),
        *_caption_warnings(entry.item, captions, config.data.trigger, facts),
        *([leak] if leak else []),
    ]
    windows = tuple(
        Window(_name_of(shot.clip.bucket), _used(shot), shot.strips) for shot in entry.shots
    )
    return PageItem(
        name=entry.item.name,
        state=entry.state,
        captions=captions,
        windows=windows,
        facts=_facts(entry, info),
        warnings=tuple(warnings),
        group=group,
    )


def _facts(entry: Entry, info: MediaInfo) -> tuple[tuple[str, str], ...]:
    item, shots = entry.item, entry.shots
    size = f"{info.height} × {info.width}"
    length = f"{info.frames} frames at {info.fps:.4g} fps, " if info.fps else ""
    part = "" if item.start is None and item.end is None else (
        f"{item.start or 0:g} s to {'the end' if item.end is None else f'{item.end:g} s'}"
    )  # fmt: skip
    several = f"{len(shots)} of {len(entry.clips)} windows" if len(entry.clips) > 1 else ""
    shapes = ", ".join(dict.fromkeys(_name_of(clip.bucket) for clip in entry.clips))
    crop = max(cropped_share(info, clip.bucket) for clip in entry.clips)
    rows = (
        ("source", f"{length}{size}"),
        ("part", part),
        ("used", _used(shots[0]) if len(entry.clips) == 1 else ""),
        ("shown", several),
        ("shape", shapes),
        ("crop", f"{crop:.0%}"),
        ("mask", "" if item.mask is None else item.mask.name),
        ("visits", "" if item.visits == 1 else f"{item.visits:g} in an epoch"),
        ("loss", "" if item.loss_weight == 1 else f"weighted {item.loss_weight:g}"),
        ("set", "regularisation" if item.regularisation else ""),
    )
    return tuple((label, fact) for label, fact in rows if fact)


def _used(shot: Shot) -> str:
    clip = shot.clip
    frames = f"{clip.bucket.frames} frames at {clip.fps:.4g} fps from {clip.start:.2f} s"
    used = frames if clip.fps else "the image"
    return used if shot.psnr is None else f"{used}, {shot.psnr:.1f} dB after the VAE"


def _clip_warnings(entry: Entry, info: MediaInfo, facts: Variant) -> list[str]:
    warnings, clip = [], entry.clips[0]
    crop = max(cropped_share(info, clip.bucket) for clip in entry.clips)
    if crop > MUCH_CROPPED:
        warnings.append(f"{crop:.0%} of the picture is cropped away")
    if clip.fps and abs(clip.fps / facts.fps - 1) > FPS_TOLERANCE:
        pace = clip.fps / facts.fps
        how = f"{pace:.3g} times slower" if pace > 1 else f"{1 / pace:.3g} times faster"
        warnings.append(f"{clip.fps:.4g} fps shown to the model as {facts.fps}: motion is {how}")
    if clip.policy == "resample" and info.fps and info.fps < facts.fps * (1 - FPS_TOLERANCE):
        warnings.append(f"{info.fps:.4g} fps: frames repeat to make {facts.fps}")
    return warnings


def _caption_warnings(
    item: Item, captions: Sequence[Caption], trigger: str | None, facts: Variant
) -> list[str]:
    warnings = [
        f"a caption of {caption.tokens} tokens: the model sees the first {facts.text_len}"
        for caption in captions
        if caption.tokens is not None and caption.tokens > facts.text_len
    ]
    if trigger and not item.regularisation:
        word = re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)", re.IGNORECASE)
        missing = sum(not word.search(caption.text) for caption in captions)
        if missing:
            which = f"{missing} of its captions lack" if len(captions) > 1 else "its caption lacks"
            warnings.append(f"{which} the trigger {trigger}")
    return warnings


def _summary(config: Config, plan: Clips, cards: Sequence[PageItem]) -> list[tuple[str, str]]:
    items = Counter(entry.state for entry in entries_of(plan))
    order = BatchOrder(
        [clip.bucket for clip in plan.train],
        [clip.item.visits for clip in plan.train],
        config.batch_size,
        config.seed,
    )
    batches = order.batches_in_epoch(0)
    warned = sum(bool(card.warnings) for card in cards)
    figures = [
        ("trained on", f"{items['train']:,}"),
        ("in clips", f"{len(plan.train):,}"),
        ("held out", f"{items['heldout']:,}"),
        ("dropped", f"{len(plan.dropped):,}"),
        ("with warnings", f"{warned:,}"),
        (f"batches of {config.batch_size} in an epoch", f"{batches:,}"),
        ("steps in an epoch", f"{batches / config.accumulate:,.4g}"),
    ]
    return figures


def _bucket_rows(clips: Sequence[Clip], batch_size: int) -> list[BucketRow]:
    visits: dict[Bucket, list[float]] = defaultdict(list)
    for clip in clips:
        visits[clip.bucket].append(clip.item.visits)
    return [
        BucketRow(_name_of(bucket), len(counts), ceil(sum(counts) / batch_size))
        for bucket, counts in sorted(visits.items())
    ]


def _name_of(bucket: Bucket) -> str:
    return f"{bucket.frames}x{bucket.height}x{bucket.width}"
