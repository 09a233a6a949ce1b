"""Train LoRA adapters for the experts of Wan 2.2, from a folder of clips to the files to upload.

accelerate launch train/lora.py experiment=demo
accelerate launch train/lora.py experiment=demo experts=[low] low.rank=8 name=demo_low
accelerate launch train/lora.py experiment=t2v_character model.path=DIR data.path=DIR
"""

import os
from collections.abc import Sequence
from contextlib import suppress

import hydra
import numpy as np
import torch
from accelerate import Accelerator
from omegaconf import DictConfig

from train import optim, report
from train.apart import own_run, withdraw
from train.base_samples import base_samples
from train.compose import typed
from train.config import Config
from train.dataset import Progress, check_sides, plan_dataset
from train.deliver import deliver
from train.drift import plan_drift
from train.encode import EncodedDataset, encode_dataset, model_paths
from train.errors import clear_errors
from train.export import Exporter
from train.groups import (
    check_groups,
    check_heads,
    check_shardable,
    groups,
    shared_base,
    shared_context,
)
from train.history import History
from train.learner import Learner, make_learners, timestep_law, train_step
from train.other_trackers import check_trackers
from train.out_of_memory import Moment, moment_of, out_of_memory, phase_of
from train.preview_plan import plan_previews
from train.rehearsal import rehearsed
from train.resume import restore, tracker_state
from train.run import Checked, Run, look, measure
from train.run_folder import RunFolder, open_run_folder, write_dataset
from train.saving import rescue, save, stop_at_bad_steps
from train.speed import check_speed, load_to_sample
from train.start import plan_starts
from train.stopping import Stopped, StopRequest, on_any, stop_requests
from train.tracking import Tracker, progress_bar, say
from train.turns import Turns, is_due
from train.validate import plan_checks, plan_train_checks
from wan.checkpoints import find_model, load_vae
from wan.experts import Experts, base_only
from wan.lora_format import checked_name
from wan.variants import VARIANTS, Expert


def train(config: Config) -> None:
    """The whole run, from its start or from where it stopped, to its end or a request to stop."""
    config, launched = own_run(config)
    accelerator = Accelerator()
    check_groups(config, accelerator)
    main = accelerator.is_main_process
    if accelerator.device.type == "cpu" and launched == 1:
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # `accelerate launch` leaves it one
    with stop_requests(config.checkpoint.time_limit) as stop:
        try:
            with stop.interruptible(accelerator.num_processes == 1):
                with accelerator.main_process_first():  # the others find what it has read
                    checked = check(config, accelerator.device, progress_bar(main))
                folder = open_run_folder(config, accelerator)
                if folder.finished:
                    return say(report.nothing_left(folder.path), main)
                run = prepare(checked, folder, accelerator, stop)
            try:
                advance(run)
                deliver(run)
            except torch.OutOfMemoryError as error:
                rescue(run, error)
                raise out_of_memory(config, accelerator.device, moment_of(run, error)) from error
            except (OSError, RuntimeError, ValueError) as error:  # a clip is gone, a process dead
                rescue(run, error)
                raise
            finally:
                run.tracker.finish()
        except torch.OutOfMemoryError as error:
            moment = Moment(phase_of(error))
            raise out_of_memory(config, accelerator.device, moment) from error
        except Stopped as stopped:
            say(report.how_to_go_on(str(stopped), launched), main)


def advance(run: Run) -> None:
    """Train the experts in turns to the end of the run: step, then measure, show and save."""
    base = begin(run)
    schedule = run.tracker.progress(run.turns, "training", run.total - run.done)
    for expert, step in schedule:
        learner = run.learners[expert]
        with run.tracker.phase("training"):
            figures = train_step(
                learner,
                step,
                run.config,
                run.facts,
                run.experts,
                run.dataset,
                run.accelerator,
            )
        run.tracker.trained(run.done, run.total, learner, figures)
        if learner.bad_in_row > run.config.max_bad_steps:
            stop_at_bad_steps(run, learner, figures)
        pause(run, base)
        run.experts.expect(run.turns.after_next() or expert)


def begin(run: Run) -> list[np.ndarray]:
    """Measure and render the base model, as far as that was not done before the run stopped."""
    base = []
    with suppress(Stopped):
        if 0 not in run.history.heldout:
            with base_only(run.experts, list(run.learners)):
                run.history.heldout[0] = measure(run, 0)
        base = base_samples(run)
    if on_any(run.accelerator, run.stop.reason is not None):
        raise Stopped(run.stop.reason)
    if run.done > 0:  # what was due when it stopped
        pause(run, base)
    return base


def pause(run: Run, base: Sequence[np.ndarray]) -> None:
    """Between two steps: measure, show and save what is due; save and stop if that was asked."""
    with suppress(Stopped):
        look(run, base)
    stop = on_any(run.accelerator, run.stop.reason is not None)
    if stop or is_due(run.config.checkpoint.every, run.done, run.total):
        save(run)
    if stop:
        raise Stopped(run.stop.reason)


def check(config: Config, device: torch.device, progress: Progress) -> Checked:
    """Find everything that a user can get wrong, before any weight is read."""
    facts = VARIANTS[config.model.variant]
    optim.check_optimizer(config)
    check_speed(config.speed, device)
    check_heads(config, facts)
    check_trackers(config.tracking.others)
    checked_name(config.name)
    model = find_model(model_paths(config.model), facts.name)
    check_shardable(config, model)
    clips = plan_dataset(config.data, facts, progress)
    check_sides(clips, config.data)
    return Checked(
        config=config,
        facts=facts,
        model=model,
        clips=clips,
        previews=plan_previews(config.preview, facts, config.batch_size),
        starts=plan_starts(config, facts),
    )


def prepare(
    checked: Checked, folder: RunFolder, accelerator: Accelerator, stop: StopRequest
) -> Run:
    """Say what will happen, encode what is not in the cache, load the pair and attach adapters.

    Of a run that goes on, everything is then as it was at its checkpoint.
    """
    config, facts = checked.config, checked.facts
    tracker = announce(checked, folder, accelerator)
    dataset = encode(checked, tracker, accelerator.device)
    with tracker.phase("loading"):
        experts, learners = load(checked, dataset, accelerator)
        vae = load_vae(checked.model, torch.float32, "cpu")  # until there is a preview
        exporter = Exporter(config, checked.model, dataset)
    if accelerator.device.type == "cuda":
        tracker.say(report.kept(learners))
    checks = plan_checks(config, facts, dataset.heldout)
    clips, prompts = checked.clips.train, [shot.prompt for shot in checked.previews.shots]
    run = Run(
        config,
        facts,
        folder.path,
        accelerator,
        tracker,
        dataset,
        experts,
        vae,
        learners,
        checks,
        plan_train_checks(checks, dataset.train, clips),
        plan_drift(checks, dataset, clips, prompts, config.data.trigger),
        checked.previews,
        exporter,
        Turns({e: learner.settings.steps for e, learner in learners.items()}, config.turn_steps),
        History(),
        stop,
    )
    if folder.checkpoint is not None:
        changes = restore(run, folder.checkpoint)
        tracker.say(report.resumed(run, folder.checkpoint.path, changes))
    return run


def announce(checked: Checked, folder: RunFolder, accelerator: Accelerator) -> Tracker:
    """Begin the run's figures, or go on with them, and say what it will do with which clips."""
    config, main = checked.config, accelerator.is_main_process
    resumed = None if folder.checkpoint is None else tracker_state(folder.checkpoint, folder.path)
    tracker = Tracker(config, folder.path, main, resumed)
    tracker.say(report.before_training(checked, accelerator.device, timestep_law(config)))
    tracker.say(report.steps_of_one_shape(checked, groups(config, accelerator)))
    if main:
        write_dataset(folder.path, checked.clips)
    if resumed is None:
        withdraw(config)
    return tracker


def encode(checked: Checked, tracker: Tracker, device: torch.device) -> EncodedDataset:
    """What the run needs of the encoders, from the cache as far as it is there."""
    config, texts = checked.config, checked.previews.texts
    with tracker.phase("encoding"):
        dataset = encode_dataset(
            checked.clips, texts, config, checked.model, device, tracker.progress, tracker.say
        )
    tracker.say(report.cache_use(config, dataset))
    tracker.dataset(dataset, report.clips_lines(checked.clips))
    return dataset


def load(
    checked: Checked, dataset: EncodedDataset, accelerator: Accelerator
) -> tuple[Experts, dict[Expert, Learner]]:
    """All experts, shared among the processes as configured, and a learner for each trained one."""
    config, parts = checked.config, groups(checked.config, accelerator)
    context, mesh = shared_context(config), shared_base(config, accelerator)
    dtype, device = config.model.dtype, accelerator.device
    experts = load_to_sample(checked.model, dtype, config.speed, device, context, mesh)
    return experts, make_learners(config, checked.facts, experts, dataset, checked.starts, parts)


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Hydra's door: typed settings in, a run out."""
    with clear_errors(), rehearsed(typed(cfg)) as config:
        train(config)


if __name__ == "__main__":
    with clear_errors():
        main()
