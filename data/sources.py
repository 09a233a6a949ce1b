"""The user's datasets become items, and items are split into what is trained on and what is not."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from data.folders import read_folder
from data.items import (
    LISTED_PROBLEMS,
    DataError,
    Item,
    Reading,
    Source,
    Split,
    did_you_mean,
    raise_problems,
)
from data.manifests import read_tables
from data.tables import find_tables, shorten


def read_source(source: Source, *, media: Path = Path("cache/media")) -> Reading:
    """All items of a source. Nothing is written beside the data.

    Videos and images that a Hugging Face dataset holds inside are written to `media`. `DataError`
    if the source as a whole, or nothing of it, can be used.
    """
    where = f"{source.key}={source.path}"
    if not source.path.exists():
        raise DataError(
            f"{where}: there is no such folder or file; give the folder that holds your videos"
        )
    tables = find_tables(source)
    reading = read_tables(tables, source, media) if tables else read_folder(source)
    if tables and source.path.is_dir() and any(source.path.rglob("*.txt")):
        names = ", ".join(table.name for table in tables)
        reading.notes.append(f"{names}: used in place of the captions in .txt files beside it")
    if not reading.items:
        raise_problems(where, [f"{lost.name}: {lost.reason}" for lost in reading.dropped])
    return reading


def split_heldout(
    items: Sequence[Item], fraction: float, groups: Sequence[str]
) -> tuple[list[Item], list[Item]]:
    """(training, held out), both in the order of `items`; no group is on both sides.

    `groups[i]` is what holds item i together with others: the sha256 of its file. A group goes
    where one of its items says (`split`; a regularisation item says "train"), `DataError` if two
    disagree. Of the others nothing is held out if any item says "heldout" or `fraction` is 0. Else
    about `fraction` of the groups is, drawn by the smallest name in the group, so that an item
    keeps its side when others are added: at least one group, and never all that could be trained.
    """
    members: dict[str, list[Item]] = defaultdict(list)
    for item, group in zip(items, groups, strict=True):
        members[group].append(item)
    said = {group: _said_split(together) for group, together in members.items()}
    heldout = {group for group, split in said.items() if split == "heldout"}
    if not heldout and fraction > 0:
        draws = {group: _draw(members[group]) for group in members if said[group] is None}
        always_trained = any(item.split == "train" and not item.regularisation for item in items)
        most = len(draws) if always_trained else len(draws) - 1
        count = min(max(sum(draw < fraction for draw in draws.values()), 1), most)
        heldout = set(sorted(draws, key=lambda group: draws[group])[: max(count, 0)])
    sides = [(item, group in heldout) for item, group in zip(items, groups, strict=True)]
    return [item for item, held in sides if not held], [item for item, held in sides if held]


def _said_split(together: Sequence[Item]) -> Split | None:
    """Where the items of one group are to go, None if no item says it."""
    train = [item for item in together if item.regularisation or item.split == "train"]
    heldout = [item for item in together if not item.regularisation and item.split == "heldout"]
    if train and heldout:
        what = "a regularisation item" if train[0].regularisation else "split=train"
        raise DataError(
            f"{train[0].name} ({what}) and {heldout[0].name} (split=heldout) are the same file, "
            "which cannot be trained on and held out; give both the same split, or remove one"
        )
    return "train" if train else "heldout" if heldout else None


def _draw(together: Sequence[Item]) -> float:
    """A number in [0, 1) that depends on the smallest name alone."""
    digest = hashlib.sha256(min(item.name for item in together).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def read_name_list(path: Path, key: str, items: Sequence[Item]) -> set[str]:
    """The names of items that a text file lists: one on a line, with or without its suffix.

    Blank lines and lines that start with # are ignored. `key` is the config key that named the
    file. `DataError` for a name that no item has.
    """
    where = f"{key}={path}"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(
            f"{where}: cannot be read ({error.strerror}); give a text file with one name on a line"
        ) from error
    names: dict[str, set[str]] = defaultdict(set)  # as it may be written -> as items are called
    for item in items:
        names[item.name].add(item.name)
        names[PurePosixPath(item.name).with_suffix("").as_posix()].add(item.name)
    wanted = [line.strip() for line in lines]
    wanted = [line for line in wanted if line and not line.startswith("#")]
    unknown = [name for name in wanted if name not in names]
    near = [did_you_mean(name, names) for name in unknown[:LISTED_PROBLEMS]]  # slow for all
    near += [""] * (len(unknown) - len(near))
    raise_problems(
        where,
        [
            f"{shorten(repr(name))}: no item has this name{hint}"
            for name, hint in zip(unknown, near, strict=True)
        ],
    )
    return {name for line in wanted for name in names[line]}
