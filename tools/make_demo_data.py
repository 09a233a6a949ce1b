"""Draw the demo's dataset: zorbis, yellow creatures with red ears that the model never saw.

    python -m tools.make_demo_data

Writes real files, as a user would have them, into datasets/demo: 12 short mp4 and 12 png with .txt
captions into train, 3 clips into heldout, 30 ordinary things into world. The files are in git; this
changes them.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from tools import world
from train.video_files import write_mp4

SIZE = 128  # pixels: the trainer scales them down, as it does with a user's
SECONDS = 13 / 8
TRIGGER = "zorbi"
# (action, setting, light) by index into the world's lists: training covers each list.
VIDEOS = (
    (0, 0, 0), (1, 1, 0), (3, 3, 0), (4, 0, 1), (5, 1, 1), (1, 2, 1),
    (3, 0, 2), (4, 2, 0), (5, 3, 0), (1, 3, 2), (3, 1, 0), (4, 1, 2),
)  # fmt: skip
IMAGES = (
    (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2),
)  # fmt: skip
HELDOUT = ((1, 0, 0), (4, 3, 1), (3, 2, 0))


def zorbi(action: int, setting: int, light: int, number: int) -> world.Scene:
    """A scene with the zorbi; what no caption tells varies with `number`."""
    spread = (number * 0.618) % 1
    return world.Scene(
        colour=0,
        shape=world.ZORBI,
        action=action,
        setting=setting,
        light=light,
        camera=0,
        radius=0.46 + 0.05 * spread,
        place=1.6 * spread - 0.8,
        phase=spread,
    )


def pixels(scene: world.Scene, frames: int) -> np.ndarray:
    """uint8 (T, SIZE, SIZE, 3)."""
    video = world.render(world.scene_tensor([scene]), frames, SIZE)[0]  # (3, T, H, W)
    return ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy()


def write_videos(folder: Path, scenes: tuple[tuple[int, int, int], ...], first: int) -> None:
    """mp4 files of one and a half seconds; every third at 24 frames a second, the others at 16."""
    for number, (action, setting, light) in enumerate(scenes):
        scene = zorbi(action, setting, light, first + number)
        fps = 24 if number % 3 == 2 else 16
        name = folder / f"{number + 1:02d}_{world.ACTIONS[action]}"
        write_mp4(name.with_suffix(".mp4"), pixels(scene, round(SECONDS * fps)), fps)
        name.with_suffix(".txt").write_text(world.caption(scene, 0, TRIGGER) + "\n")


def write_images(folder: Path, scenes: tuple[tuple[int, int], ...]) -> None:
    """png files."""
    for number, (setting, light) in enumerate(scenes):
        scene = zorbi(5, setting, light, number)
        name = folder / f"image_{number + 1:02d}"
        Image.fromarray(pixels(scene, 1)[0]).save(name.with_suffix(".png"), optimize=True)
        text = f"A {TRIGGER} on {world.SETTINGS[setting]} {world.LIGHTS[light]}.\n"
        name.with_suffix(".txt").write_text(text)


def write_world(folder: Path) -> None:
    """Ordinary things of the world, one of each colour and shape: every third a video."""
    folder.mkdir(parents=True, exist_ok=True)
    known = world.scenes(400, seed=11, heldout=False)
    first: dict[tuple[int, int], world.Scene] = {}
    for scene in known:
        first.setdefault((scene.colour, scene.shape), scene)
    for number, ((colour, shape), scene) in enumerate(sorted(first.items())):
        name = folder / f"{list(world.COLOURS)[colour]}_{world.SHAPES[shape]}"
        name.with_suffix(".txt").write_text(world.caption(scene, 0) + "\n")
        if number % 3 == 0:
            write_mp4(name.with_suffix(".mp4"), pixels(scene, round(SECONDS * 16)), 16)
        else:
            still = dataclasses.replace(scene, camera=0)
            name.with_suffix(".txt").write_text(world.caption(still, 0) + "\n")
            Image.fromarray(pixels(still, 1)[0]).save(name.with_suffix(".png"), optimize=True)


def main() -> None:
    """Write the dataset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=Path("datasets/demo"))
    target = parser.parse_args().target
    for side in ("train", "heldout"):
        (target / side).mkdir(parents=True, exist_ok=True)
    write_videos(target / "train", VIDEOS, 0)
    write_images(target / "train", IMAGES)
    write_world(target / "world")
    write_videos(target / "heldout", HELDOUT, 100)
    print(
        f"{len(VIDEOS)} videos, {len(IMAGES)} images and {len(HELDOUT)} held-out clips in {target}"
    )


if __name__ == "__main__":
    main()
