"""How long training steps take on this machine, by doing a few: `tools.plan --measure`."""

from dataclasses import replace
from statistics import median

import torch
from accelerate import Accelerator

from data.batches import BatchOrder
from data.shapes import Bucket
from train.compose import trained_experts
from train.dataset import Progress
from train.encode import encode_dataset
from train.learner import make_learner, train_step
from train.plan import buckets_of
from train.run import Checked
from train.speed import check_speed, load_to_sample

MOST_SHAPES = 3  # beside the largest
WARM_UP, TIMED = 1, 3  # steps on each


def timed_steps(checked: Checked, device: torch.device, progress: Progress) -> dict[Bucket, float]:
    """Seconds of a forward and backward pass of a batch, on each of the shapes that matter.

    One clip of each is encoded into the run's cache and makes a whole batch. Steps are those of the
    first expert that is trained; the experts of a pair are of one size.
    """
    config = replace(checked.config, accumulate=1)
    check_speed(config.speed, device)
    expert, *_ = trained_experts(config)
    chosen = {clip.bucket: clip for clip in checked.clips.train}
    clips = replace(checked.clips, train=[chosen[b] for b in _shapes(checked)], heldout=[])
    dataset = encode_dataset(clips, (), config, checked.model, device, progress, lambda _: None)
    experts = load_to_sample(checked.model, config.model.dtype, config.speed, device)
    learner = make_learner(expert, config, checked.facts, experts, dataset)
    accelerator = Accelerator()
    found = {}
    for clip in dataset.train.clips:
        learner.order = BatchOrder([clip.bucket], [1.0], config.batch_size, learner.seed)
        alone = replace(dataset, train=replace(dataset.train, clips=[clip]))
        seconds = [
            train_step(learner, step, config, checked.facts, experts, alone, accelerator).seconds
            for step in progress(range(WARM_UP + TIMED), "timing steps")
        ]
        found[clip.bucket] = median(s["data"] + s["compute"] for s in seconds[WARM_UP:])
    return found


def _shapes(checked: Checked) -> list[Bucket]:
    """The most frequent, and the largest, which decides what blocks keep."""
    buckets = buckets_of(checked.clips.train)
    largest = max(buckets, key=lambda b: b.frames * b.height * b.width)
    return list(dict.fromkeys([*buckets[:MOST_SHAPES], largest]))
