"""What to change when a GPU's memory is full, in the order in which it costs least."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.shapes import Bucket
from train import plan
from train.checkpoint import checkpoints_in
from train.config import Config
from train.plan import Setting
from train.plan_lines import here, shape_told
from train.rules import MemoryFull
from train.run import Checked, Run
from wan.cards import H200, Card
from wan.footprint import GIB, TRAINED, activation_bytes, sample_bytes
from wan.speed_choices import KEEPS, Keep

SMALLER = 0.75  # of height and width
LEAST = 0.1 * GIB  # what is not worth a line
FRAGMENTS = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
ANOTHER_RUN = ("batch_size=", "data.frames=", "data.height=")  # changes that need a reason


@dataclass(frozen=True)
class Moment:
    """What a run was doing when its memory was full."""

    phase: str  # as train/tracking.py counts time
    bucket: Bucket | None = None  # of the training batch at work
    step: int = 0  # of all experts, from 1; 0: training had not begun


@dataclass(frozen=True)
class Need:
    """What is done in a phase on one shape, with the settings that decide how much it takes."""

    phase: str
    checked: Checked
    setting: Setting
    bucket: Bucket
    keep: tuple[Keep, ...]

    @property
    def peak(self) -> float:
        """Bytes on the device."""
        setting = self.setting
        trained = TRAINED // 4 * setting.trained
        if self.phase == "encoding":
            return plan.caching_bytes(setting, self.checked, self.bucket)
        if self.phase == "loading":
            return setting.resting + trained
        load = plan.load_of(setting, self.bucket)
        if self.phase == "training":
            return setting.resting + trained + activation_bytes(load, self.keep)
        return setting.resting + trained + sample_bytes(load, guided=False)


def phase_of(error: torch.OutOfMemoryError) -> str:
    """In which phase of a run this was raised: the innermost has noted itself."""
    return next(iter(getattr(error, "__notes__", [])), "starting")


def moment_of(run: Run, error: torch.OutOfMemoryError) -> Moment:
    """What a run that had begun was doing."""
    phase = phase_of(error)
    if phase != "training":
        return Moment(phase, step=run.done)
    assert run.turns.expert is not None
    learner = run.learners[run.turns.expert]
    first, *_ = learner.order.indices(learner.place)
    return Moment(phase, run.dataset.train.clips[first].bucket, run.done + 1)


def out_of_memory(config: Config, device: torch.device, moment: Moment) -> MemoryFull:
    """The error for a run whose memory is full; what can be saved has been."""
    checked = plan.look_up(config, lambda steps, _: steps)
    card = here(device) or _unknown(device)
    need = need_of(checked, plan.setting_of(checked, card), moment)
    savings = [
        f"{change} saves {saved / GIB:.1f} GiB"
        for change, changed in changes(need)
        if (saved := need.peak - changed.peak) > LEAST
    ]
    listed = "; ".join(savings) or "nothing that this program knows of saves much"
    return MemoryFull(
        f"the memory of {card.name} ({card.gib:.1f} GiB) is full, {_told(need, moment)}. Change, "
        f"in this order (predicted): {listed}. If it is full of holes, set {FRAGMENTS} in the "
        f"environment. {_kept(config, savings)}"
    )


def need_of(checked: Checked, setting: Setting, moment: Moment) -> Need:
    """What was needed at a moment; where no batch was at work, by the largest shape of the run."""
    works = plan.training(setting, plan.buckets_of(checked.clips.train))
    bucket = moment.bucket or plan.largest_bucket(checked)
    return Need(moment.phase, checked, setting, bucket, works[0].keep)


def changes(need: Need) -> Iterator[tuple[str, Need]]:
    """Each setting that can be changed, and what would be needed with it; exact ones first."""
    config, speed = need.setting.config, need.setting.config.speed
    if speed.placement == "resident" and len(need.setting.experts) > 1:
        yield "speed.placement=swap", _with(need, placement="swap")
    if speed.inputs == "device":
        # Left to itself, keep=auto fills the room that this makes.
        alike = replace(need, keep=need.keep[:1] * len(need.keep)) if speed.keep == "auto" else need
        kept = f"speed.keep={need.keep[0]} " if speed.keep == "auto" else ""
        yield f"{kept}speed.inputs=host", _with(alike, inputs="host")
    for kind in reversed(KEEPS[: KEEPS.index(need.keep[-1])]):
        yield f"speed.keep={kind}", replace(need, keep=(kind,) * len(need.keep))
    if config.batch_size > 1:
        half, passes = config.batch_size // 2, config.accumulate * 2
        halved = replace(need.setting, config=replace(config, batch_size=half))
        yield f"batch_size={half} accumulate={passes}", replace(need, setting=halved)
    if speed.placement != "stream":
        yield "speed.placement=stream", _with(need, placement="stream")
    if config.model.dtype == "float32" and speed.frozen is None:
        yield "model.dtype=bfloat16", _in_bfloat16(need)
    if speed.frozen is None:
        yield "speed.frozen=fp8", _with(need, frozen="fp8")
    if config.data.vae_dtype == "float32":
        data = replace(config.data, vae_dtype="bfloat16")
        rounded = replace(need.setting, config=replace(config, data=data))
        yield "data.vae_dtype=bfloat16", replace(need, setting=rounded)
    yield from _smaller(need)


def _with(need: Need, **speed: str) -> Need:
    """The same with other settings of `speed`."""
    changed = replace(need.setting.config.speed, **speed)
    return replace(need, setting=plan.setting_of(need.checked, need.setting.card, changed))


def _in_bfloat16(need: Need) -> Need:
    model = replace(need.checked.config.model, dtype="bfloat16")
    checked = replace(need.checked, config=replace(need.checked.config, model=model))
    setting = plan.setting_of(checked, need.setting.card)
    return replace(need, checked=checked, setting=setting)


def _smaller(need: Need) -> Iterator[tuple[str, Need]]:
    """Smaller clips: what the run learns from changes."""
    bucket, geometry, data = need.bucket, need.setting.facts.geometry, need.setting.config.data
    if bucket.frames > 1:
        latent_frames = (bucket.frames - 1) // geometry.time_stride + 1
        frames = (latent_frames - 1) // 2 * geometry.time_stride + 1
        yield f"data.frames={frames}", replace(need, bucket=replace(bucket, frames=frames))
    height, width = (_lowered(side, geometry.multiple) for side in (bucket.height, bucket.width))
    small = replace(bucket, height=height, width=width)
    sides = [_lowered(side, geometry.multiple) for side in (data.height, data.width)]
    yield f"data.height={sides[0]} data.width={sides[1]}", replace(need, bucket=small)


def _lowered(side: int, multiple: int) -> int:
    return max(multiple, int(side * SMALLER) // multiple * multiple)


def _told(need: Need, moment: Moment) -> str:
    """At what it was full, and what that was predicted to take."""
    takes = f"is predicted to take {need.peak / GIB:.1f} GiB"
    if moment.bucket is None:
        after = f" after {moment.step} steps" if moment.step else ""
        return f"while {need.phase}{after}, which {takes}"
    text = f"in step {moment.step}: its batch of {shape_told(need.bucket)} {takes}"
    buckets = plan.buckets_of(need.checked.clips.train)
    largest = max((replace(need, bucket=bucket) for bucket in buckets), key=lambda n: n.peak)
    if largest.peak <= need.peak:
        return f"{text}, as much as any of this run"
    return f"{text}, the run's largest of {shape_told(largest.bucket)} {largest.peak / GIB:.1f} GiB"


def _kept(config: Config, savings: list[str]) -> str:
    """What there is to go on from, as the disk has it."""
    found = checkpoints_in(Path(config.output_dir) / "checkpoints")
    if not found:
        return (
            "No step is saved yet, and what is encoded stays in the cache: type the same command "
            "with the change."
        )
    reason = ""
    if any(saving.startswith(ANOTHER_RUN) for saving in savings):
        reason = " Another batch_size or size of clips needs resume_reason='memory was full' too."
    return f"Saved is {found[-1]}: type the same command with the change.{reason}"


def _unknown(device: torch.device) -> Card:
    """A card of which nothing is known but its memory."""
    if device.type != "cuda":
        return replace(H200, name="this machine")
    properties = torch.cuda.get_device_properties(device)
    return replace(H200, name=properties.name, gib=properties.total_memory / GIB)
