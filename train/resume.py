"""What a checkpoint holds of a run, how a run goes on from it, and what may have changed between.

Nothing here is approximate: parameters, optimizer, positions and figures come back to the bit. A
run that goes on with other settings is told what changed; what would make it another run is refused
unless `resume_reason` says why. On another number of processes the items go on where they stopped.
"""

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
import yaml
from torch import nn

from data.items import DataError
from train.checkpoint import FORMAT, Checkpoint
from train.compose import leaves
from train.config import Config
from train.evaluation import read_beside
from train.groups import groups
from train.history import read_heldout
from train.learner import Learner, step_places
from train.optim import learning_rate_at
from train.rules import ConfigError, written
from train.run import Run
from train.running_loss import RunningLoss
from train.tensor_tree import flatten, load_optimizer, unflatten
from train.tracking import TrackerState, Window
from wan.lora import named_adapter_parameters
from wan.variants import Expert

NEVER_COMPARED = {"resume", "resume_reason"}
# What makes a run another one: the adapter's form, the optimizer's memory, the order of items.
FIXED = {"model.variant", "experts", "seed", "batch_size", "optim.name", "optim.b_ratio"}
FREE_OF_LORA = {"lora.dropout", "lora.ema", "lora.init"}

Written = dict[str, object]


def state_of(run: Run) -> tuple[Written, dict[Expert, dict[str, torch.Tensor]]]:
    """All that a run must know to go on: as JSON, and the tensors of each expert by name."""
    processes, accumulate = groups(run.config, run.accelerator), run.config.accumulate
    tensors: dict[Expert, dict[str, torch.Tensor]] = {}
    learners: Written = {}
    for expert, learner in run.learners.items():
        named = {f"adapter.{n}": p for n, p in _trained(run, expert).items()}
        if learner.ema is not None:
            named |= {f"ema.{name}": value for name, value in learner.ema.values.items()}
        measured = run.history.adapters.get(expert, {})
        named |= {f"measured.{n}": then for n, then in measured.items()}
        tensors[expert] = {n: t.detach().to("cpu", copy=True) for n, t in named.items()}
        place = step_places(learner, learner.steps_done, accumulate, processes).start
        learners[expert] = {
            "steps_done": learner.steps_done,
            "order": learner.order.state(place),
            "bad_steps": learner.bad_steps,
            "bad_in_row": learner.bad_in_row,
            "optimizer": flatten(learner.optimizer.state_dict(), "optimizer", tensors[expert]),
        }
    turns, history = run.turns, run.history
    assert turns.expert is not None, "no step has been done"
    begun = turns.done.get(turns.expert, 0) - run.learners[turns.expert].steps_done
    state: Written = {
        "format": FORMAT,
        "done": run.done,
        "versions": _versions(),
        "processes": processes,
        "base": run.exporter.base_hash,
        "turn": {"expert": turns.expert, "in_turn": turns.in_turn - begun},
        "learners": learners,
        "heldout": {str(s): [asdict(loss) for loss in f] for s, f in history.heldout.items()},
        "beside": {
            str(step): {expert: asdict(found) for expert, found in experts.items()}
            for step, experts in history.beside.items()
        },
        "stopped": history.stopped,
        "shown": history.shown,
        "best": history.best(list(history.heldout)),
        "tracker": asdict(run.tracker.state()),
    }
    return state, tensors


def restore(run: Run, checkpoint: Checkpoint) -> list[str]:
    """Put a run where the checkpoint was written; lines that say what is not as it was.

    `ConfigError` or `DataError` if it cannot go on and `resume_reason` does not say why it should.
    """
    state = cast("dict", checkpoint.state)
    forced = run.config.resume_reason is not None
    old = yaml.safe_load((checkpoint.path / "config.yaml").read_text(encoding="utf-8"))
    changes = [f"changed    {line}" for line in _changes(old, run.config)]
    changes += [f"changed    {line}" for line in _environment_changes(state)]
    changes += [f"changed    {line}" for line in _schedule_changes(state, old, run)]
    for expert, found in run.exporter.base_hash.items():
        if found != state["base"].get(expert) and not forced:
            raise ConfigError(
                f"the weights of the {expert} expert are not those of {checkpoint.path}. Set "
                "model.path back, start over with resume=never, or say why: resume_reason='…'."
            )
    for expert, learner in run.learners.items():
        if expert in state["learners"]:
            changes += _restore_learner(run, learner, checkpoint, old)
    changes += _process_changes(run, state["processes"])
    run.turns.done = {expert: learner.steps_done for expert, learner in run.learners.items()}
    run.turns.expert, run.turns.in_turn = state["turn"]["expert"], state["turn"]["in_turn"]
    run.history.heldout = {int(s): read_heldout(f) for s, f in state["heldout"].items()}
    run.history.beside = {int(s): read_beside(b) for s, b in state.get("beside", {}).items()}
    run.history.shown = state["shown"]
    if run.config.eval.early_stop:
        for expert in run.learners.keys() & state.get("stopped", {}).keys():
            run.history.stopped[expert] = state["stopped"][expert]
            run.turns.end(expert)
    return changes


def tracker_state(checkpoint: Checkpoint, folder: Path) -> TrackerState:
    """What the tracker knew; in a new `folder` it begins new metrics and a new run on W&B."""
    saved = dict(cast("dict", checkpoint.state["tracker"]))
    saved["window"] = {expert: Window(**window) for expert, window in saved["window"].items()}
    running = saved.get("running", {}).items()
    saved["running"] = {expert: RunningLoss(**sums) for expert, sums in running}
    state = TrackerState(**saved)
    if checkpoint.path.resolve().parent.parent != folder.resolve():
        return replace(state, metrics_bytes=0, metrics_waiting=[], wandb_id=None)
    return state


def check_settings(checkpoint: Checkpoint, config: Config) -> None:
    """`ConfigError` if settings changed that make it another run, before any weight is read."""
    if config.resume_reason is not None:
        return
    old = yaml.safe_load((checkpoint.path / "config.yaml").read_text(encoding="utf-8"))
    refused = [line for line in _changes(old, config) if _is_fixed(line.partition(":")[0])]
    if refused:
        raise ConfigError(
            f"{checkpoint.path} cannot go on with other settings: {'; '.join(refused)}. Set them "
            "back, start over with resume=never (the earlier run is moved aside), give the run "
            "another name=…, or say why it should go on all the same: resume_reason='…'."
        )


def _restore_learner(
    run: Run, learner: Learner, checkpoint: Checkpoint, old: Mapping[str, object]
) -> list[str]:
    """Parameters, optimizer and position of an expert; lines about what did not fit."""
    saved = cast("dict", checkpoint.state["learners"])[learner.expert]
    tensors = checkpoint.tensors(learner.expert)
    trained = {f"adapter.{name}": p for name, p in _trained(run, learner.expert).items()}
    kept = {name for name in tensors if name.startswith("adapter.")}
    fitting = [n for n, p in trained.items() if n in kept and tensors[n].shape == p.shape]
    lines = []
    if fits := len(fitting) == len(trained) == len(kept):
        _restore_optimizer(learner, unflatten(saved["optimizer"], tensors), old, run.config)
    if not fits and run.config.resume_reason is None:
        raise ConfigError(
            f"the adapter of the {learner.expert} expert in {checkpoint.path} is of another form "
            f"({len(fitting)} of {len(trained)} tensors fit). Start over with resume=never, or say "
            "why it should go on all the same: resume_reason='…'."
        )
    if not fits:
        lines.append(
            f"changed    {learner.expert}: {len(fitting)} of {len(trained)} tensors of the adapter "
            "go on, the others and the optimizer start anew"
        )
    if fits:
        run.history.adapters[learner.expert] = {
            name.removeprefix("measured."): tensor
            for name, tensor in tensors.items()
            if name.startswith("measured.")
        }
    _copy_adapter(learner, trained, {name: tensors[name] for name in fitting}, tensors)
    for name in ("steps_done", "bad_steps", "bad_in_row"):
        setattr(learner, name, saved[name])
    try:
        place = learner.order.go_on(saved["order"])
    except DataError:
        if run.config.resume_reason is None:
            raise
        place = int(saved["order"]["place"])
        learner.order.start_at(place, [])
        lines.append(f"changed    {learner.expert}: the order of items is another one from here on")
    each = run.config.accumulate * groups(run.config, run.accelerator)
    learner.first_place = place - learner.steps_done * each
    return lines


@torch.no_grad()
def _copy_adapter(
    learner: Learner,
    trained: Mapping[str, nn.Parameter],
    saved: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Put the adapter back, and its average, which begins here if there was none."""
    for name, tensor in saved.items():
        trained[name].copy_(tensor)
        plain = name.removeprefix("adapter.")
        if learner.ema is not None:
            learner.ema.values[plain].copy_(tensors.get(f"ema.{plain}", tensor))


def _restore_optimizer(
    learner: Learner, state: object, old: Mapping[str, object], config: Config
) -> None:
    """The optimizer as it was saved, but with arguments that were changed since as they are now."""
    optimizer = learner.optimizer
    if config.optim.name != cast("dict", old["optim"])["name"]:
        return  # forced: it starts anew
    fresh = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    load_optimizer(optimizer, state)
    was = cast("dict", old["optim"])["args"]
    now = config.optim.args
    changed = [key for key in was.keys() | now.keys() if was.get(key) != now.get(key)]
    for group, new in zip(optimizer.param_groups, fresh, strict=True):
        group.update({key: new[key] for key in changed if key in new})


def _trained(run: Run, expert: Expert) -> dict[str, nn.Parameter]:
    """The parameters of an expert that move, by their names in the adapter."""
    return named_adapter_parameters(run.experts[expert])


def _changes(old: Mapping[str, object], config: Config) -> list[str]:
    """ "key: old -> new" for each setting that is not as it was."""
    was, now = leaves(old), leaves(asdict(config))
    return [
        f"{key}: {written(was.get(key))} -> {written(now.get(key))}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and key not in NEVER_COMPARED
    ]


def _is_fixed(key: str) -> bool:
    if key.startswith("lora."):
        return key not in FREE_OF_LORA
    return key in FIXED or key.endswith((".rank", ".alpha"))


def _environment_changes(state: Mapping[str, Mapping[str, str]]) -> list[str]:
    was, now = state["versions"], _versions()
    return [f"{n}: {was.get(n)} -> {v}" for n, v in now.items() if was.get(n) != v]


def _schedule_changes(
    state: Mapping[str, dict], old: Mapping[str, dict], run: Run
) -> Iterator[str]:
    """Where an expert has other steps than its schedule was made for, how its rate jumps."""
    optim = run.config.optim
    for expert, learner in run.learners.items():
        if expert not in state["learners"] or optim.schedule == "constant":
            continue
        done, peak = state["learners"][expert]["steps_done"], learner.settings.learning_rate
        lasted, lasts = old[expert]["steps"], learner.settings.steps
        was, now = (learning_rate_at(done, steps, optim, peak) for steps in (lasted, lasts))
        if lasted != lasts:
            yield (
                f"{expert}.steps: optim.schedule={optim.schedule} lasted {lasted} steps and now "
                f"lasts {lasts}: after {done} the learning rate goes on at {now:.2g}, not {was:.2g}"
            )


def _process_changes(run: Run, before: int) -> list[str]:
    """What another number of processes means."""
    now, accumulate = groups(run.config, run.accelerator), run.config.accumulate
    if now == before:
        return []
    advice = ""
    if accumulate * before % now == 0:
        advice = f"; accumulate={accumulate * before // now} gives each step the same items"
    return [
        f"changed    processes: {before} -> {now}: the items go on where they stopped, a step has "
        f"{accumulate * now} batches instead of {accumulate * before}{advice}; sums round otherwise"
    ]


def _versions() -> dict[str, str]:
    names = ("wan-lora", "torch", "diffusers", "peft", "accelerate")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
