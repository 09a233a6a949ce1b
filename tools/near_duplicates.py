"""Which files of a dataset show the same thing: equal bytes, or pictures that hardly differ.

A video and its copy at another size, quality or brightness count twice in training, and one of them
held out makes the held-out loss too good. Not found: mirrored, cropped or differently cut copies.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

GRID = 8  # cells of a frame in height and in width
FRAMES = 3  # first, middle and last; of an image three times the same
LOOK_SIZE = FRAMES * GRID * GRID * 3
# Copies of the demo at half the size, at quality 35 or 12 % brighter have 0.993 and more in common,
# at 1.4 times the saturation 0.981; the two most alike of its clips 0.969.
ALIKE = 0.98
BLOCK = 1024  # looks compared at once, for the memory's sake


@dataclass(frozen=True)
class Duplicates:
    """Files that belong together, by their index, lowest first; `exact`: they have equal bytes."""

    members: tuple[int, ...]
    exact: bool


def look_of(frames: np.ndarray) -> np.ndarray:
    """What a clip looks like, fp32 (LOOK_SIZE,), from uint8 frames (T, H, W, 3).

    The product of two looks is 1 for equal pictures, whatever their brightness and contrast. It is
    all zeros where nothing is to be seen: frames of one grey.
    """
    chosen = [frames[0], frames[(len(frames) - 1) // 2], frames[-1]]
    cells = [Image.fromarray(frame).resize((GRID, GRID), Image.Resampling.BOX) for frame in chosen]
    look = np.stack([np.asarray(cell, np.float32) for cell in cells]).ravel()
    look -= look.mean()
    length = np.linalg.norm(look)
    return look / length if length > LOOK_SIZE**0.5 else np.zeros_like(look)  # below 1 of 255


def find_duplicates(digests: Sequence[str], looks: np.ndarray) -> list[Duplicates]:
    """Groups of duplicates among files with these digests and looks (N, D), in their order.

    A file belongs to a group if it is alike one of its members. "" is no digest.
    """
    labels = np.arange(len(digests))  # of each file: the lowest index of its group
    first_of: dict[str, int] = {}
    for index, digest in enumerate(digests):
        if digest:
            _join(labels, np.array([first_of.setdefault(digest, index), index]))
    for members in _alike(looks):
        _join(labels, members)
    groups: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels.tolist()):
        groups[label].append(index)
    return [
        Duplicates(
            tuple(members),
            exact={digests[index] for index in members} == {digests[members[0]] or None},
        )
        for members in groups.values()
        if len(members) > 1
    ]


def _alike(looks: np.ndarray) -> Iterator[np.ndarray]:
    """Each look with those after it, in a block of them, that have ALIKE or more in common."""
    for start in range(0, len(looks), BLOCK):
        rows = looks[start : start + BLOCK]
        for column in range(start, len(looks), BLOCK):
            alike = rows @ looks[column : column + BLOCK].T >= ALIKE
            if column == start:
                alike &= ~np.tri(len(rows), dtype=bool)  # not with itself, and not twice
            for row in np.flatnonzero(alike.any(axis=1)):
                yield np.append(column + np.flatnonzero(alike[row]), start + row)


def _join(labels: np.ndarray, members: np.ndarray) -> None:
    found = np.unique(labels[members])
    if len(found) > 1:
        labels[np.isin(labels, found)] = found[0]
