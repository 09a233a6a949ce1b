"""Train LoRA adapters for the experts of Wan 2.2, from a folder of clips to the files to upload.

accelerate launch train/lora.py experiment=demo
accelerate launch train/lora.py experiment=demo experts=[low] low.rank=8 name=demo_low
accelerate launch train/lora.py experiment=t2v_character model.path=DIR data.path=DIR
"""

import os
from dataclasses import replace
from pathlib import Path

import hydra
import torch
from accelerate import Accelerator
from omegaconf import DictConfig

from train import optim, report
from train.compose import trained_experts, typed
from train.config import Config
from train.dataset import Progress, check_sides, plan_dataset
from train.encode import encode_dataset, model_paths
from train.errors import clear_errors
from train.export import Exporter
from train.learner import (
    Learner,
    TrainingStopped,
    make_learner,
    sample_draws,
    timestep_law,
    train_step,
)
from train.preview import plan_previews
from train.run import Checked, Run, measure, sample, show
from train.run_folder import open_run_folder, write_summary
from train.tracking import Tracker, progress_bar
from train.turns import is_due, turns
from train.validate import HeldoutLoss, HeldoutPlan
from wan.checkpoints import find_model, load_vae
from wan.experts import base_only, load_experts
from wan.lora_format import checked_name
from wan.reload import TOLERANCE, reload_errors
from wan.variants import VARIANTS, Expert


def train(config: Config) -> None:
    """The whole run: check, encode, train the experts in turns, measure, render, export."""
    accelerator = Accelerator()
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # `accelerate launch` leaves it one
    with accelerator.main_process_first():  # the others find what it has read in the cache
        checked = check(config, progress_bar(accelerator.is_main_process))
    run = prepare(checked, accelerator)

    with base_only(run.experts, list(run.learners)):
        before = measure(run, 0)
        base_videos = sample(run)

    after, sheet = before, None
    steps: dict[Expert, int] = {e: learner.settings.steps for e, learner in run.learners.items()}
    total = sum(steps.values())
    schedule = run.tracker.progress(turns(steps, config.turn_steps), "training", total)
    for done, (expert, step) in enumerate(schedule, start=1):
        learner = run.learners[expert]
        with run.tracker.phase("training"):
            figures = train_step(
                learner, step, config, run.facts, run.experts, run.dataset, accelerator
            )
        run.tracker.trained(done, total, learner, figures)
        if is_due(config.eval.every, done, total):
            after = measure(run, done)
        if is_due(config.preview.every, done, total):
            sheet = show(run, done, base_videos)
        if is_due(config.checkpoint.every, done, total) and done < total:
            run.exporter.write_checkpoint(run.experts, run.learners, done, after)

    if accelerator.is_main_process:
        deliver(run, before, after)
        run.tracker.say(report.what_next(config, run.folder, sheet))
    accelerator.wait_for_everyone()
    run.tracker.finish()


def check(config: Config, progress: Progress) -> Checked:
    """Find everything that a user can get wrong, before any weight is read."""
    facts = VARIANTS[config.model.variant]
    optim.check_optimizer(config.optim)
    checked_name(config.name)
    model = find_model(model_paths(config.model), facts.name)
    clips = plan_dataset(config.data, facts, progress)
    check_sides(clips, config.data)
    return Checked(
        config=config,
        facts=facts,
        model=model,
        clips=clips,
        previews=plan_previews(config.preview, facts, config.batch_size),
    )


def prepare(checked: Checked, accelerator: Accelerator) -> Run:
    """Say what will happen, encode what is not in the cache, load the pair and attach adapters."""
    config, facts, model = checked.config, checked.facts, checked.model
    folder = open_run_folder(config, accelerator)
    tracker = Tracker(config, folder, accelerator.is_main_process)
    law = timestep_law(config)
    tracker.say(report.before_training(checked, accelerator.device, law))

    with tracker.phase("encoding"):
        dataset = encode_dataset(
            checked.clips,
            checked.previews.texts,
            config,
            model,
            accelerator.device,
            tracker.progress,
            tracker.say,
        )
    tracker.say(report.cache_use(config, dataset))

    with tracker.phase("loading"):
        experts = load_experts(
            model,
            getattr(torch, config.model.dtype),
            accelerator.device,
            resident=config.speed.placement == "resident",
        )
        learners: dict[Expert, Learner] = {
            expert: make_learner(expert, config, facts, experts, dataset)
            for expert in trained_experts(config)
        }
        vae = load_vae(model, torch.float32, accelerator.device)
        exporter = Exporter(config, model, dataset, folder)
    given = replace(sample_draws(config, facts, config.seed), caption_dropout=0.0)
    checks = HeldoutPlan(
        dataset.heldout,
        given,
        law,
        config.eval.bins,
        config.eval.draws,
        config.batch_size,
        config.seed,
    )
    return Run(
        config,
        facts,
        folder,
        accelerator,
        tracker,
        dataset,
        experts,
        vae,
        learners,
        checks,
        checked.previews,
        exporter,
    )


def deliver(run: Run, before: list[HeldoutLoss], after: list[HeldoutLoss]) -> None:
    """Export the pair, prove that diffusers reads it as it was trained, and say what came out."""
    with run.tracker.phase("exporting"):
        files = run.exporter.write(run.folder, run.config.name, run.experts, run.learners, after)
        latents, text = run.dataset.heldout.first()
        paths: dict[Expert, Path] = {expert: file.path for expert, file in files.items()}
        errors = reload_errors(run.experts, paths, run.facts, latents, text)
    run.tracker.say(report.heldout_table(before, after))
    run.tracker.say(report.export(run.config, run.facts, files, errors))
    run.tracker.say(run.tracker.time_spent())
    write_summary(run.folder, report.figures(before, after, errors, run.tracker.seconds))
    if max(errors.values()) > TOLERANCE:
        raise TrainingStopped(f"the files in {run.folder} do not do in diffusers what was trained")


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Hydra's door: typed settings in, a run out."""
    with clear_errors():
        train(typed(cfg))


if __name__ == "__main__":
    with clear_errors():
        main()
