"""What a plan says to people: memory in each phase, time and money, and the presets that fit."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch

from data.shapes import Bucket
from train import plan
from train.compose import trained_experts
from train.machine import disk
from train.plan import Choice, Setting
from train.run import Checked
from wan.cards import CARDS, H200, Card, card_of
from wan.footprint import CONTEXT, GIB, SHARES
from wan.memory import MARGIN
from wan.speed_choices import Keep

MOST_SHAPES = 4  # told one by one
KEPT: dict[Keep, str] = {
    "host": "their input in host memory",
    "nothing": "their input",
    "attention": "attention",
    "products": "products",
    "everything": "everything",
}


def here(device: torch.device) -> Card | None:
    """The card of this machine, if it is one whose figures are known."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return card_of(properties.name, properties.total_memory)


def first_screen(checked: Checked, device: torch.device) -> list[str]:
    """What every training says of itself: disk, and on a card that is known memory and time."""
    card = here(device)
    return [*disk(checked), *([] if card is None else [on_card(checked, card)])]


def on_card(
    checked: Checked,
    card: Card,
    hourly: float | None = None,
    measured: Mapping[Bucket, float] = MappingProxyType({}),
) -> str:
    """All of it for one card; predictions, and told to be such, with passes that were measured."""
    setting = replace(plan.setting_of(checked, card), measured=measured)
    return "\n".join(
        [
            f"plan       predicted for {card.name}, {card.gib:.0f} GiB, {_speed_told(setting)}",
            *_memory_lines(setting, checked),
            *_time_lines(setting, checked, hourly),
        ]
    )


def measured_lines(
    checked: Checked, measured: Mapping[Bucket, float], hourly: float | None
) -> list[str]:
    """What a few real passes took here, and all of training at that pace, on whatever card."""
    setting = replace(plan.setting_of(checked, H200), measured=measured)
    training = plan.hours(setting, checked).training
    passes = ", ".join(f"{shape_told(b)} {seconds:.3g} s" for b, seconds in measured.items())
    return [
        f"measured   a pass here (samples and held-out loss not counted): {passes}",
        f"           {plan.total_steps(checked.config):,} steps: {_duration(training)}"
        f"{_money(training, hourly)}",
    ]


def _speed_told(setting: Setting) -> str:
    speed = setting.config.speed
    frozen = speed.frozen or setting.config.model.dtype
    shares = f" (counted for {SHARES} GPUs)" if speed.placement == "shard" else ""
    shared = f", each clip shared by {speed.context} GPUs" if speed.context > 1 else ""
    return f"speed.placement={speed.placement}{shares}, frozen weights in {frozen}{shared}"


def _memory_lines(setting: Setting, checked: Checked) -> list[str]:
    clips = checked.clips.train
    works = plan.training(setting, plan.buckets_of(clips))
    rows = [("caching", plan.caching_bytes(setting, checked, plan.largest_bucket(checked)), "")]
    shown = sorted(works, key=lambda work: -work.peak)[:MOST_SHAPES]
    rows += [
        ("training", w.peak, f"{shape_told(w.bucket)}: {w.seconds:.2f} s a pass") for w in shown
    ]
    if sampling := plan.sampling_bytes(setting, checked):
        less = "" if sampling <= setting.usable else "at once; less in tiles"
        rows.append(("sampling", sampling, less))
    lines = []
    for name, peak, told in rows:
        fits = name == "sampling" or peak <= setting.usable
        verdict = "" if fits else "  DOES NOT FIT"
        lines.append(f"memory     {name:<9}{peak / GIB:6.1f} GiB  {told}{verdict}".rstrip())
    lines.append(f"           blocks keep {_kept_told(works[0].keep)} for the backward pass")
    host = plan.in_host_memory(setting, works)
    if host:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        short = "  MORE THAN THERE IS" if host > there else ""
        lines.append(
            f"           host     {host / GIB:6.1f} GiB  of {there / GIB:.0f} on this machine"
            f"{short}"
        )
    return lines


def shape_told(bucket: Bucket) -> str:
    """Frames x height x width."""
    return f"{bucket.frames}x{bucket.height}x{bucket.width}"


def _kept_told(keep: Sequence[Keep]) -> str:
    counted = Counter(keep)
    if len(counted) == 1:
        return KEPT[keep[0]]
    return " and ".join(f"{KEPT[kind]} in {count}" for kind, count in counted.items())


def _time_lines(setting: Setting, checked: Checked, hourly: float | None) -> list[str]:
    config, spent = setting.config, plan.hours(setting, checked)
    trained = trained_experts(config)
    parts = {
        "training": spent.training,
        "samples": spent.sampling,
        "held-out loss": spent.measuring,
        "swaps": spent.swapping,
        "encoding": spent.caching,
    }
    told = ", ".join(f"{name} {part / spent.total:.0%}" for name, part in parts.items() if part)
    return [
        f"time       {plan.total_steps(config):,} steps of {' and '.join(trained)}: "
        f"{_duration(spent.total)}{_money(spent.total, hourly)}",
        f"           {told}",
    ]


def _money(hours: float, hourly: float | None) -> str:
    return "" if hourly is None else f", ${hours * hourly:,.2f} at ${hourly:g} an hour"


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.0f} minutes"


def presets(checked: Checked, card: Card) -> str:
    """Each preset of `conf/speed` on a card, and which one to take."""
    found = plan.choices(checked, card)
    lines = [f"presets    on {card.name}, of its {card.gib:.0f} GiB"]
    lines += [_preset_line(choice) for choice in found]
    best = found[0]
    if best.fits:
        lines.append(f"take       speed={best.name}, the fastest that fits{_exact(found)}")
    else:
        least = min(found, key=lambda choice: choice.peak)
        room = ((1 - MARGIN) * card.gib * GIB - CONTEXT) / GIB
        lines.append(
            f"take       none fits: speed={least.name} needs least, {least.peak / GIB:.1f} GiB of "
            f"{room:.1f} that can be filled. Lower data.frames, or data.height and data.width, or "
            f"batch_size, and preview.height and preview.width; or take a larger card, of "
            f"{', '.join(_larger(card))}."
        )
    return "\n".join(lines)


def _exact(found: Sequence[Choice]) -> str:
    """Which preset to take instead of one that rounds the frozen weights."""
    exact = [choice.name for choice in found if choice.fits and not choice.rounds]
    if not found[0].rounds:
        return ""
    return f"; of those that round no weight, speed={exact[0]}" if exact else ""


def _larger(card: Card) -> list[str]:
    return [name for name, other in CARDS.items() if other.gib > card.gib] or ["none that is known"]


def _preset_line(choice: Choice) -> str:
    host = f"{choice.host / GIB:5.1f} GiB of host memory" if choice.host else ""
    fits = "" if choice.fits else "does not fit"
    return (
        f"  {choice.name:<9} {choice.peak / GIB:6.1f} GiB  {choice.seconds:7.2f} s a pass  "
        f"{host:<25} {fits}"
    ).rstrip()
