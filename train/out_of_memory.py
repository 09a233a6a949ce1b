"""What to change when a GPU's memory is full, in the order in which it costs least."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from data.shapes import Bucket
from train import plan
from train.config import Config, SpeedConfig
from train.learner import TrainingStopped
from train.plan import Setting
from train.plan_lines import here
from train.run import Checked
from wan.cards import H200, Card
from wan.footprint import GIB, TRAINED, activation_bytes
from wan.speed import KEEPS, Keep

SMALLER = 0.75  # of height and width
LEAST = 0.1 * GIB  # what is not worth a line
FRAGMENTS = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


def out_of_memory(config: Config, device: torch.device) -> TrainingStopped:
    """The error for a run whose memory is full; the state before that step has been saved."""
    checked = plan.look_up(config, lambda steps, _: steps)
    card = here(device) or _unknown(device)
    setting = plan.setting_of(checked, card)
    works = plan.training(setting, plan.buckets_of(checked.clips.train))
    worst = max(works, key=lambda work: work.peak)
    shape = f"{worst.bucket.frames}x{worst.bucket.height}x{worst.bucket.width}"
    savings = [
        f"{change} saves {saved / GIB:.1f} GiB"
        for change, saved in changes(setting, checked, worst.bucket, worst.keep)
        if saved > LEAST
    ]
    return TrainingStopped(
        f"the memory of {card.name} ({card.gib:.1f} GiB) is full. The largest batch, {shape}, is "
        f"predicted to take {worst.peak / GIB:.1f} GiB. Change, in this order (predicted): "
        f"{'; '.join(savings)}. If it is full of holes, set {FRAGMENTS} in the environment. Every "
        "step before this one is saved: type the same command with the change."
    )


def _unknown(device: torch.device) -> Card:
    """A card of which nothing is known but its memory."""
    if device.type != "cuda":
        return replace(H200, name="this machine")
    properties = torch.cuda.get_device_properties(device)
    return replace(H200, name=properties.name, gib=properties.total_memory / GIB)


def changes(
    setting: Setting, checked: Checked, bucket: Bucket, keep: tuple[Keep, ...]
) -> Iterator[tuple[str, float]]:
    """Each setting that can be changed, and the bytes that it alone saves; exact ones first."""
    config, speed = setting.config, setting.config.speed
    now = _peak(setting, bucket, keep)
    if speed.placement == "resident" and len(setting.experts) > 1:
        swapped = plan.setting_of(checked, setting.card, replace(speed, placement="swap"))
        yield "speed.placement=swap", now - _peak(swapped, bucket, keep)
    for kind in reversed(KEEPS[: KEEPS.index(keep[-1])]):
        yield f"speed.keep={kind}", now - _peak(setting, bucket, (kind,) * len(keep))
    if config.batch_size > 1:
        half, passes = config.batch_size // 2, config.accumulate * 2
        halved = replace(setting, config=replace(config, batch_size=half))
        change = f"batch_size={half} accumulate={passes}"
        yield change, now - _peak(halved, bucket, keep)
    yield from _placed(setting, checked, bucket, keep, now)
    yield from _smaller(setting, bucket, keep, now)


def _placed(
    setting: Setting, checked: Checked, bucket: Bucket, keep: tuple[Keep, ...], now: float
) -> Iterator[tuple[str, float]]:
    """Frozen weights in fewer bits, or in host memory."""
    speed = setting.config.speed

    def saved(changed: SpeedConfig) -> float:
        return now - _peak(plan.setting_of(checked, setting.card, changed), bucket, keep)

    if speed.placement != "stream":
        yield "speed.placement=stream", saved(replace(speed, placement="stream"))
    if speed.frozen is None:
        yield "speed.frozen=fp8", saved(replace(speed, frozen="fp8"))


def _smaller(
    setting: Setting, bucket: Bucket, keep: tuple[Keep, ...], now: float
) -> Iterator[tuple[str, float]]:
    """Smaller clips: what the run learns from changes."""
    geometry, data = setting.facts.geometry, setting.config.data
    if bucket.frames > 1:
        latent_frames = (bucket.frames - 1) // geometry.time_stride + 1
        frames = (latent_frames - 1) // 2 * geometry.time_stride + 1
        yield f"data.frames={frames}", now - _peak(setting, replace(bucket, frames=frames), keep)
    height, width = (_lowered(side, geometry.multiple) for side in (bucket.height, bucket.width))
    small = replace(bucket, height=height, width=width)
    sides = [_lowered(side, geometry.multiple) for side in (data.height, data.width)]
    yield f"data.height={sides[0]} data.width={sides[1]}", now - _peak(setting, small, keep)


def _lowered(side: int, multiple: int) -> int:
    return max(multiple, int(side * SMALLER) // multiple * multiple)


def _peak(setting: Setting, bucket: Bucket, keep: tuple[Keep, ...]) -> float:
    """Bytes of a step that keeps exactly this."""
    load = plan.load_of(setting, bucket)
    return setting.resting + TRAINED // 4 * setting.trained + activation_bytes(load, keep)
