"""What a run prints for people: the timestep law before training, the held-out table after it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path

import torch

from data.buckets import Bucket, Clip, describe_buckets
from train import plan_lines
from train.compose import trained_experts
from train.config import Config
from train.dataset import Clips
from train.encode import EncodedDataset
from train.learner import Learner
from train.run import Checked, Run
from train.stopping import resume_command
from train.validate import HeldoutLoss
from wan.flow import SigmaRange, TimestepLaw, expert_range
from wan.lora_format import ExportedFile
from wan.speed_choices import Keep
from wan.variants import Expert, Variant

BARS = " ▁▂▃▄▅▆▇█"
HISTOGRAM_BARS = 24
PROOFS = {  # what `wan.reload` does with a file of each kind
    "lora": "reloaded by diffusers' WanPipeline",
    "rslora": "reloaded by diffusers' WanPipeline",
    "dora": "computed as ComfyUI does, diffusers cannot read it",
    "lokr": "given to diffusers as a plain LoRA, it cannot read the file itself",
    "loha": "given to diffusers as a plain LoRA, it cannot read the file itself",
}
SMALL_SHARE = 0.05  # below it an untruncated law would hardly train the expert


def before_training(checked: Checked, device: torch.device, law: TimestepLaw) -> str:
    """What will be trained on what: the first lines of a run."""
    config, facts = checked.config, checked.facts
    ranks = ", ".join(
        f"{expert}: rank {s.rank}, {s.steps} steps at {s.learning_rate:g}"
        for expert in trained_experts(config)
        for s in [attrgetter(expert)(config)]
    )
    kind = "" if config.lora.kind == "lora" else f"; {config.lora.kind}"
    return "\n".join(
        [
            f"model      {facts.title} in {config.model.dtype} on {device}",
            clips_lines(checked.clips),
            f"adapters   {ranks}; {config.lora.targets} linears{kind}",
            *(start.told for start in checked.starts.values()),
            _law_lines(config, law, facts),
            *plan_lines.first_screen(checked, device),
        ]
    )


def clips_lines(clips: Clips) -> str:
    """What is used of the datasets, what is not and why, and what to know about it."""
    return "\n".join(
        [
            _clips_line("train", clips.train),
            _clips_line("held out", clips.heldout),
            *(f"left out   {entry.name}: {entry.reason}" for entry in clips.dropped),
            *(f"note       {note}" for note in clips.notes),
        ]
    )


def steps_of_one_shape(checked: Checked, processes: int) -> str:
    """How many batches a step is made of, and which shapes fill one less than once an epoch."""
    config, batches = checked.config, dict[Bucket, float]()  # of an epoch
    together = config.accumulate * processes
    for clip in checked.clips.train:
        more = clip.item.visits / config.batch_size
        batches[clip.bucket] = batches.get(clip.bucket, 0.0) + more
    epochs = max(attrgetter(f"{e}.steps")(config) for e in trained_experts(config))
    epochs *= together / sum(batches.values())
    lines = [
        f"a step     {together} batches of one shape: processes {processes}, each "
        f"{config.accumulate} of {config.batch_size} clips"
    ]
    for bucket, count in sorted(batches.items()):
        if count < together and len(batches) > 1:
            seen = "" if epochs * count >= together else ": NEVER in these steps"
            lines.append(
                f"           {bucket.frames}x{bucket.height}x{bucket.width} fills one in "
                f"{together / count:.3g} epochs{seen}; data.max_buckets merges rare shapes"
            )
    return "\n".join(lines)


def _clips_line(name: str, clips: Sequence[Clip]) -> str:
    shapes = [f"{n} of {b.frames}x{b.height}x{b.width}" for b, n in describe_buckets(clips)]
    return f"{name:<10} {len(clips)} clips: {', '.join(shapes)} (frames x height x width)"


def cache_use(config: Config, dataset: EncodedDataset) -> str:
    """What was encoded now and what was there already."""
    lines = [line for report in dataset.reports for line in report.lines()]
    return "\n".join([f"cache      in {config.data.cache}/", *(f"  {line}" for line in lines)])


def kept(learners: Mapping[Expert, Learner]) -> str:
    """What the blocks of each expert keep of a step, and so do not compute twice."""
    lines = [
        f"{expert}: " + ", ".join(f"{kind} in {count} blocks" for kind, count in counts.items())
        for expert, counts in kept_blocks(learners).items()
    ]
    return f"kept       {'; '.join(lines)} (speed.keep; the rest is computed twice)"


def kept_blocks(learners: Mapping[Expert, Learner]) -> dict[Expert, dict[Keep, int]]:
    """How many blocks of each expert keep what."""
    return {expert: dict(Counter(learner.kept)) for expert, learner in learners.items()}


def _law_lines(config: Config, law: TimestepLaw, facts: Variant) -> str:
    lines = [
        f"timesteps  {law.base}, shift {law.shift:g}, truncated to each expert's range of sigma:"
    ]
    for expert in facts.experts:
        sigmas = expert_range(facts.boundary, expert)
        share = law.share(sigmas)
        use = "" if expert in trained_experts(config) else " (not trained)"
        lines.append(
            f"  {expert:<8} {sigmas.low:.3f} |{_histogram(law, sigmas)}| {sigmas.high:.3f}  "
            f"{share:6.1%} of the untruncated law{use}"
        )
        if share < SMALL_SHARE:
            lines.append(
                f"           only {share:.1%}: without truncation it would hardly be trained"
            )
    return "\n".join(lines)


def _histogram(law: TimestepLaw, sigmas: SigmaRange) -> str:
    """Density of the truncated law over equal steps of sigma, tallest bar full."""
    edges = torch.linspace(sigmas.low, sigmas.high, HISTOGRAM_BARS + 1, dtype=torch.float64)
    density = law.cdf(edges).diff()
    heights = (density / density.max() * (len(BARS) - 1)).round().long().tolist()
    return "".join(BARS[height] for height in heights)


def heldout_table(before: Sequence[HeldoutLoss], after: Sequence[HeldoutLoss]) -> str:
    """Held-out loss of the base model and with adapters, for each expert and noise bin."""
    lines = ["held-out   sigma                base   adapters    change"]
    for base, trained in zip(before, after, strict=True):
        bins = list(zip(base.edges[:-1], base.edges[1:], base.bins, trained.bins, strict=True))
        for low, high, was, now in bins:
            lines.append(_table_row(base.expert, f"{low:.3f} to {high:.3f}", was, now))
        spread = f"all ± {trained.standard_error:.4f}"
        lines.append(_table_row(base.expert, spread, base.mean, trained.mean))
    return "\n".join(lines)


def _table_row(name: str, where: str, was: float, now: float) -> str:
    return f"  {name:<8} {where:<16} {was:8.4f}   {now:8.4f}  {now / was - 1:+8.1%}"


def export(
    config: Config,
    facts: Variant,
    files: Mapping[Expert, ExportedFile],
    errors: Mapping[Expert, float],
) -> str:
    """Where the files are, what they are, and where to put them."""
    lines = ["adapters   (strength 1.0)"]
    for expert, file in files.items():
        lines.append(
            f"  {file.path}  {file.size_bytes / 1e6:.1f} MB  AutoV2 {file.autov2}  "
            f"AutoV3 {file.autov3}\n"
            f"    {PROOFS[config.lora.kind]}: {errors[expert]:.2%} from the trained "
            f"adapter ({config.export.dtype} rounding)"
        )
    pair = len(facts.experts) > 1
    lines.append(
        f"  ComfyUI: {'both ' if pair else ''}into models/loras, one LoraLoaderModelOnly "
        "per expert.\n"
        "  diffusers: load_lora_weights(high), "
        "load_lora_weights(low, load_into_transformer_2=True)\n"
        f"  CivitAI: base model {facts.base_model!r}, one version for each file"
        if pair
        else "  ComfyUI: into models/loras, one LoraLoaderModelOnly.\n"
        "  diffusers: load_lora_weights(file)\n"
        f"  CivitAI: base model {facts.base_model!r}"
    )
    return "\n".join(lines)


def what_next(config: Config, folder: Path, sheet: Path | None) -> str:
    """What to look at and to type next."""
    lines = [f"look at    {sheet}" if sheet else "", f"all of it  {folder}/"]
    if config.model.variant == "tiny":
        lines += [
            f"measure    python -m tools.measure_tiny {folder}",
            "data       python -m tools.dataset experiment=demo",
            "try        accelerate launch train/lora.py experiment=demo lora.rank=4 name=rank4",
        ]
    return "\n".join(line for line in lines if line)


def resumed(run: Run, checkpoint: Path, changes: Sequence[str]) -> str:
    """From where a run goes on, and what is not as it was."""
    return "\n".join([f"goes on    after {run.done} of {run.total} steps, {checkpoint}", *changes])


def nothing_left(folder: Path) -> str:
    """That the run in this folder has finished, and what one could want."""
    return (
        f"finished   {folder} has all its steps and its adapters. More: set more steps. Anew: "
        "resume=never, which moves this run aside."
    )


def how_to_go_on(reason: str, processes: int) -> str:
    """What to type after a stop that was asked for."""
    return f"stopped    {reason}. To go on:\n{resume_command(processes)}"


def figures(
    before: Sequence[HeldoutLoss],
    after: Sequence[HeldoutLoss],
    errors: Mapping[Expert, float],
    seconds: Mapping[str, float],
    learners: Mapping[Expert, Learner],
) -> dict[str, object]:
    """The same figures for programs: summary.json."""
    return {
        "kept_blocks": kept_blocks(learners),
        "heldout_base": {loss.expert: asdict(loss) for loss in before},
        "heldout_adapters": {loss.expert: asdict(loss) for loss in after},
        "reload_error": dict(errors),
        "seconds": {phase: round(spent, 1) for phase, spent in seconds.items()},
    }
