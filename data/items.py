"""What an entry of a dataset is, and what can be wrong with it: words that this room shares."""

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["video", "image"]
Split = Literal["train", "heldout"]

KIND_OF_SUFFIX: dict[str, Kind] = {
    **dict.fromkeys((".mp4", ".mov", ".webm", ".mkv", ".gif", ".avi"), "video"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp"), "image"),
}
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
LISTED_PROBLEMS = 5  # an error that lists more than a screen is not read


class DataError(ValueError):
    """The user's data cannot be used as it is: one message that names the files and the mend."""


@dataclass(frozen=True)
class Source:
    """One dataset of a run: a folder, a .jsonl, .csv or .parquet list, or a saved HF dataset.

    `key` is the config key that named it, for messages. The paths of a list are relative to `root`
    (None: the list's own folder) and must stay inside it.
    """

    path: Path
    key: str
    root: Path | None = None
    prefix: str = ""  # put before every caption, but not in a regularisation set
    weight: float = 1.0  # visits of each of its items in an epoch; 0.5 = every second epoch
    loss_weight: float = 1.0
    regularisation: bool = False  # ordinary things: no trigger expected, never held out


@dataclass(frozen=True)
class Item:
    """One entry of a dataset: all that is known of it without opening the file.

    `name` is its path from the source's root, with "/" and printable, for messages.
    """

    path: Path
    captions: tuple[str, ...]  # final prompts (prefix applied), not yet cleaned; at least one
    kind: Kind
    name: str
    visits: float = 1.0  # the source's weight * repeats
    loss_weight: float = 1.0
    start: float | None = None  # seconds; only this part of the video is used
    end: float | None = None
    mask: Path | None = None  # image or video of the same shape: white = learn, black = ignore
    split: Split | None = None  # from a column; None = not said
    regularisation: bool = False


@dataclass(frozen=True)
class Dropped:
    """What is not used and why: `reason` says what was found, what was expected, what to do."""

    name: str
    reason: str


@dataclass(frozen=True)
class Reading:
    """What a source holds: items (of folders by name, of lists in file order) and remarks."""

    items: list[Item]
    dropped: list[Dropped]
    notes: list[str]


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds, as it is seen: rotation applied, frames / fps = its seconds.

    An image is one frame at 0 fps.
    """

    frames: int
    fps: float
    height: int
    width: int


def raise_problems(where: str, problems: Sequence[str]) -> None:
    """Raise one `DataError` that counts the problems, if any, and lists the first of them."""
    if not problems:
        return
    lines = [f"{where}: {len(problems)} {'problem' if len(problems) == 1 else 'problems'}"]
    lines += [f"  {problem}" for problem in problems[:LISTED_PROBLEMS]]
    if len(problems) > LISTED_PROBLEMS:
        lines.append(f"  ... and {len(problems) - LISTED_PROBLEMS} more")
    raise DataError("\n".join(lines))


def kind_of(path: Path) -> Kind | None:
    """What a file is by its suffix; None for neither video nor image."""
    return KIND_OF_SUFFIX.get(path.suffix.lower())


def printable(text: str) -> str:
    """Text that can be printed and encoded, and steers no terminal, whatever it was made of."""
    encodable = text.encode("utf-8", "backslashreplace").decode()
    return CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", encodable)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """' (did you mean repeats?)' if `name` is none of `known` but looks like one, else ''."""
    if name in known:
        return ""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f" (did you mean {near[0]}?)" if near else ""
