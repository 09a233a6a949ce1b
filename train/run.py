"""What a run consists of once all is checked and loaded, and what is done with it repeatedly."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, distributed
from torch.nn import Module

from train.apart import is_apart, newest_of_others, shared_folder
from train.checkpoint import checkpoint_name
from train.config import Config
from train.dataset import Clips
from train.drift import DriftPlan, prior_drift
from train.ema import averaged
from train.encode import EncodedDataset
from train.evaluation import Beside, Evaluated, figures, table
from train.export import Exporter
from train.few_step import at_strengths
from train.groups import Parts, is_together, parts_of
from train.health import adapter_health, summarised
from train.history import History
from train.learner import Learner, as_used
from train.preview import Progress, render, save_samples
from train.preview_plan import PreviewPlan, Shot
from train.start import Start
from train.stopping import Stopped, StopRequest, on_any
from train.tracking import Tracker
from train.turns import Turns, is_due
from train.validate import HeldoutLoss, HeldoutPlan, heldout_loss
from train.verdict import judge
from wan.checkpoints import Model
from wan.experts import Experts
from wan.lora import adapter_state
from wan.speed import sampling_attention
from wan.speed_choices import Attention
from wan.variants import Expert, Variant


@dataclass(frozen=True)
class Checked:
    """A run's inputs, found and checked; no weight has been read."""

    config: Config
    facts: Variant
    model: Model
    clips: Clips
    previews: PreviewPlan
    starts: Mapping[Expert, Start]  # empty where adapters start from nothing


@dataclass(frozen=True)
class Run:
    """Everything that training needs, loaded."""

    config: Config
    facts: Variant
    folder: Path
    accelerator: Accelerator
    tracker: Tracker
    dataset: EncodedDataset
    experts: Experts
    vae: AutoencoderKLWan
    learners: Mapping[Expert, Learner]
    checks: HeldoutPlan
    train_checks: HeldoutPlan  # the same on clips that are trained on
    drift_plan: DriftPlan
    previews: PreviewPlan
    exporter: Exporter
    turns: Turns
    history: History
    stop: StopRequest

    @property
    def done(self) -> int:
        """Steps that are done, of all experts."""
        return sum(learner.steps_done for learner in self.learners.values())

    @property
    def total(self) -> int:
        """Steps of all experts when the run is at its end."""
        planned = self.turns.steps
        return sum(max(planned[e], le.steps_done) for e, le in self.learners.items())

    @property
    def parts(self) -> Parts:
        """How the processes divide what is measured and rendered."""
        return parts_of(self.config, self.accelerator, self.stop)


def look(run: Run, base: Sequence[np.ndarray]) -> None:
    """Measure and show what is due now and has not been yet; a request to stop ends it at once."""
    done, config, history = run.done, run.config, run.history
    if is_due(config.eval.every, done, run.total) and done not in history.heldout:
        history.heldout[done] = measure(run, done)
        conclude(run)
    if is_due(config.preview.every, done, run.total) and history.shown != done:
        show(run, done, base)
        history.shown = done


def measure(run: Run, done: int) -> list[HeldoutLoss]:
    """Held-out loss of each trained expert after `done` steps, and all that is told beside it.

    At 0 the caller has set the adapters aside: these are the base model's.
    """
    alone = run.accelerator.num_processes == 1
    _make_room(run)
    with run.tracker.phase("measuring"), run.stop.interruptible(alone):
        with as_used(run.learners):
            found = [_heldout(run, expert) for expert in run.learners]
            beside: dict[Expert, Beside] = {e: _beside(run, e, done) for e in run.learners}
            states: dict[Expert, dict[str, Tensor]] = {
                expert: adapter_state(run.experts[expert]) for expert in run.learners
            }
            health = {} if done == 0 else _health(run)
        others = {} if done == 0 else {e: _other_loss(run, e) for e in run.learners}
    history = run.history
    history.beside[done], history.adapters = beside, states
    run.tracker.heldout(done, found, history.heldout.get(0, found))
    if health and 0 in history.heldout.keys() & history.beside.keys():
        bases = zip(found, history.before, strict=True)
        evaluated = [
            Evaluated(
                heldout=now,
                beside=beside[now.expert],
                base=base,
                base_trained=history.beside[0][now.expert].trained,
                health=health[now.expert],
                other=others[now.expert],
            )
            for now, base in bases
        ]
        run.tracker.figures(done, figures(evaluated))
        run.tracker.say(table(done, evaluated))
    return found


def _make_room(run: Run) -> None:
    """Forget recorded steps: they hold the memory that measuring and rendering may need."""
    for learner in run.learners.values():
        learner.graphs.clear()


def _heldout(run: Run, expert: Expert) -> HeldoutLoss:
    transformer, progress = run.experts[expert], run.tracker.progress
    return heldout_loss(transformer, expert, run.facts, run.checks, progress, parts=run.parts)


def _beside(run: Run, expert: Expert, done: int) -> Beside:
    """The same on clips that are trained on, and how far the prior has drifted."""
    transformer, progress = run.experts[expert], run.tracker.progress
    name = "training clips"
    trained = heldout_loss(
        transformer, expert, run.facts, run.train_checks, progress, name, run.parts
    )
    drift = 0.0
    if done > 0:
        drift = prior_drift(transformer, expert, run.facts, run.drift_plan, progress, run.parts)
    return Beside(run.learners[expert].steps_done, trained, drift)


def _health(run: Run) -> dict[Expert, dict[str, float]]:
    return {
        expert: summarised(adapter_health(run.experts[expert], run.history.adapters.get(expert)))
        for expert in run.learners
    }


def _other_loss(run: Run, expert: Expert) -> tuple[str, HeldoutLoss] | None:
    """Of an adapter with an average, the loss of the one of the two that is not used."""
    learner = run.learners[expert]
    if learner.ema is None:
        return None
    if learner.uses_ema:
        return "live", _heldout(run, expert)
    with averaged(learner.ema):
        return "ema", _heldout(run, expert)


def conclude(run: Run) -> None:
    """Say which expert overfits, and let it end there if that is wanted; all processes agree."""
    patience = run.config.eval.patience
    for expert, learner in run.learners.items():
        if expert in run.history.stopped or learner.steps_done >= run.turns.steps[expert]:
            continue
        verdict = judge(run.history, expert)
        if verdict.newest.done != run.done:
            continue  # it was the other expert's turn
        overfits = verdict.rising >= patience
        run.tracker.figures(run.done, {f"alarm/{expert}": float(overfits)})
        if overfits:
            run.tracker.say(f"overfits   {verdict.told(expert)}")
        if verdict.rising == patience:
            run.tracker.alert("overfits", verdict.told(expert))
        elif verdict.stale == patience:
            run.tracker.alert("learns no more", verdict.told(expert))
        stops = run.config.eval.early_stop and verdict.stale >= patience
        if on_any(run.accelerator, stops):
            run.history.stopped[expert] = learner.steps_done
            run.turns.end(expert)
            run.tracker.say(f"ends early {verdict.told(expert)}")


def sample(
    run: Run, strengths: Mapping[Expert, float], elsewhere: Mapping[Expert, Path] | None = None
) -> list[np.ndarray]:
    """The configured previews with adapters at these strengths, uint8 (T, H, W, 3) each.

    `elsewhere` are files of experts that other processes train. Each group of processes renders
    its share, and all get all. Nothing, with a line, if one has not memory enough.
    """
    shots, parts = run.previews.shots, run.parts
    own = range(parts.own, len(shots), parts.count)
    rendered = parts.of(len(shots)) if is_together(run.config) else own
    videos, stopped = None, False
    try:
        videos = _rendered(run, strengths, elsewhere, [shots[index] for index in rendered])
    except Stopped:
        stopped = True
    if on_any(run.accelerator, stopped):
        raise Stopped(run.stop.reason)
    if on_any(run.accelerator, videos is None):
        run.tracker.say(
            "samples    left out: not enough memory even for one at a time. Lower preview.frames, "
            "preview.height and preview.width."
        )
    elif videos is not None:
        return _of_all(run, dict(zip(own, videos, strict=False)))  # the rest is another's
    return []


def _rendered(
    run: Run,
    strengths: Mapping[Expert, float],
    elsewhere: Mapping[Expert, Path] | None,
    shots: list[Shot],
) -> list[np.ndarray] | None:
    """The videos of these shots; None if memory is short. The VAE is on the device meanwhile.

    Where processes compute each pass together none may do otherwise: each video is made alone, in
    passes that take the least, a request to stop is heeded between two, and short memory ends all.
    """
    _make_room(run)
    device, few_step, vae = run.accelerator.device, run.previews.few_step, cast(Module, run.vae)
    plan, progress = replace(run.previews, shots=shots), run.tracker.progress
    if together := is_together(run.config):
        settings = replace(plan.settings, cfg="sequential")
        plan = replace(plan, batch_size=1, settings=settings)
        progress = _until_stopped(run)
    at_once = run.stop.interruptible(not together)
    with run.tracker.phase("rendering"), as_used(run.learners), at_once:
        try:
            vae.to(device)
            attention = sampling_attention(cast("Attention", run.config.speed.attention))
            with at_strengths(run.experts, strengths, few_step, elsewhere), attention:
                return render(
                    plan,
                    run.facts,
                    run.experts,
                    run.vae,
                    run.dataset.prompts,
                    progress,
                    run.tracker.say,
                )
        except torch.OutOfMemoryError:
            if together:
                raise
            return None
        finally:
            vae.to("cpu")
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the shapes of training are others


def _until_stopped(run: Run) -> Progress:
    """The tracker's progress, that ends on all processes when one is asked to stop."""

    def progress(steps: Iterable[int], name: str) -> Iterable[int]:
        return run.parts.until_stopped(run.tracker.progress(steps, name))

    return progress


def _of_all(run: Run, own: Mapping[int, np.ndarray]) -> list[np.ndarray]:
    """The videos of all shots, from those that each group of processes has."""
    if run.accelerator.num_processes == 1:
        return list(own.values())
    settings = run.previews.settings
    shape = (len(run.previews.shots), settings.frames, settings.height, settings.width, 3)
    videos = torch.zeros(shape, dtype=torch.uint8, device=run.accelerator.device)
    if run.parts.speaks:
        for index, video in own.items():
            videos[index] = torch.from_numpy(video)
    distributed.all_reduce(videos)
    return list(videos.cpu().numpy())


def show(run: Run, done: int, base: Sequence[np.ndarray]) -> None:
    """Render, write and log the previews beside the base model's, if there are any."""
    if not run.previews.shots or not base:
        return
    spent, budget = run.tracker.share("rendering"), run.config.preview.budget
    over = on_any(run.accelerator, budget is not None and spent > budget)
    if budget is not None and over and done < run.total:
        run.tracker.say(
            f"samples    left out after {done} steps: rendering has taken {spent:.0%} of the time, "
            f"preview.budget is {budget:.0%}"
        )
        return
    if is_apart(run.config):
        share(run)
    adapted = sample(run, dict.fromkeys(run.learners, 1.0), newest_of_others(run.config))
    alone: dict[Expert, list[np.ndarray]] = {}
    if run.config.preview.grid:
        alone = {expert: sample(run, {expert: 1.0}) for expert in run.learners}
    if not adapted or not all(alone.values()) or not run.accelerator.is_main_process:
        return
    samples = sheet_of(run, done).parent
    try:
        files = save_samples(samples, run.previews, base, adapted, run.facts.fps, alone)
    except OSError as error:
        run.tracker.say(f"samples    {samples} cannot be written ({error.strerror or error})")
        return
    saved = is_due(run.config.checkpoint.every, done, run.total)
    checkpoint = checkpoint_name(done) if saved else None
    run.tracker.samples(done, run.previews.shots, files, sheet_of(run, done), checkpoint)
    run.tracker.say(
        f"samples    {sheet_of(run, done)}; rendering has taken "
        f"{run.tracker.share('rendering'):.0%} of the time so far"
    )


def share(run: Run) -> None:
    """Put the newest adapter where the process of the other expert finds it."""
    place, history = shared_folder(run.config), run.history
    others = newest_of_others(run.config)
    try:
        run.exporter.write(
            place, run.config.name, run.experts, run.learners, history.last, history.lowest
        )
    except OSError as error:
        run.tracker.say(f"not shared {place} cannot be written ({error.strerror or error})")
    if not others:
        run.tracker.say("alone      the other expert has no adapter yet: samples take its base")


def sheet_of(run: Run, done: int) -> Path:
    """The sheet of the previews after `done` steps."""
    return run.folder / "samples" / f"step_{done:06d}" / "sheet.png"
