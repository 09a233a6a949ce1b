"""What a run says about itself: the terminal, metrics.jsonl in its folder, and Weights & Biases.

The folder is the truth: everything that W&B gets is in metrics.jsonl and samples/ too. Only the
main process speaks.
"""

import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import wandb
from tqdm import tqdm

from train.apart import is_apart
from train.artifacts import adapter_artifact, dataset_artifact
from train.compose import trained_experts
from train.config import Config
from train.encode import EncodedDataset
from train.learner import Learner, StepFigures
from train.metrics_file import MetricsFile, read_metrics
from train.noise_panel import noise_panel
from train.other_trackers import OtherTrackers
from train.preview_plan import Shot
from train.running_loss import RunningLoss
from train.validate import HeldoutLoss
from train.wandb_log import WandbLog
from train.window import Window, pace, peak_memory
from wan.lora_format import ExportedFile
from wan.variants import Expert

T = TypeVar("T")
LOG_FILE_INTERVAL = 15.0  # seconds between lines of progress where there is no terminal
STALL = 600.0  # seconds that any step may take, and
STALL_TIMES = 10  # how many times as long as the run's steps


@dataclass(frozen=True)
class TrackerState:
    """What a tracker must know in order to go on as if it had never been away."""

    metrics_bytes: int = 0
    metrics_waiting: list[str] = field(default_factory=list)  # lines that are not on the disk
    wandb_id: str | None = None
    elapsed: float = 0.0  # seconds
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    window: dict[Expert, Window] = field(default_factory=dict)
    window_start: float = 0.0
    running: dict[Expert, RunningLoss] = field(default_factory=dict)


class Tracker:
    """The voice of a run. On other processes than the main one all methods do nothing.

    `resumed` is the `state` of the tracker of this run, or of another run that this one goes on
    from; what the former has logged is not logged again.
    """

    def __init__(
        self, config: Config, folder: Path, speaks: bool, resumed: TrackerState | None = None
    ) -> None:
        begun = resumed or TrackerState()
        self._speaks = speaks
        self._voice = f"{trained_experts(config)[0]:<5}" if is_apart(config) else ""
        self._config = config
        self._started = time.monotonic() - begun.elapsed
        self.seconds = dict(begun.seconds)  # by phase
        self._window = dict(begun.window)
        self._window_start = begun.window_start  # of training time
        self._running = dict(begun.running)
        self._edges: dict[Expert, list[float]] = {}  # of noise bins
        self._steps = 0  # of this process
        self._steps_start = self.seconds.get("training", 0.0)
        self._metrics = self._wandb = self._others = None
        self._path = path = folder / "metrics.jsonl"
        if speaks:
            self._metrics = MetricsFile(path, begun.metrics_bytes, self.say, begun.metrics_waiting)
            self._others = OtherTrackers(config, folder, self.say)
            self._wandb = WandbLog(config, folder, begun.wandb_id, self.say)
            if begun.wandb_id is not None:  # what a process that was killed has not sent
                for step, figures in read_metrics(path):
                    self._wandb.log(figures, step)

    def state(self) -> TrackerState:
        """What to save, once all that was logged is on the disk."""
        return TrackerState(
            metrics_bytes=self._metrics.size() if self._metrics else 0,
            metrics_waiting=self._metrics.waiting() if self._metrics else [],
            wandb_id=self._wandb.run_id if self._wandb else None,
            elapsed=time.monotonic() - self._started,
            seconds=dict(self.seconds),
            window=dict(self._window),
            window_start=self._window_start,
            running=dict(self._running),
        )

    def say(self, text: str) -> None:
        """One line, or a few, on the terminal; of an expert that trains apart with its name."""
        say(textwrap.indent(text, self._voice), self._speaks)

    def progress(self, steps: Iterable[T], name: str, total: int | None = None) -> Iterable[T]:
        """Iterate with a progress bar, which stays on the screen only while it moves."""
        return _bar(steps, name, total, self._speaks)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time spent within as that of the phase `name`; a step that hangs is told."""
        started = time.monotonic()
        spent = self.seconds.get("training", 0.0) - self._steps_start
        limit = max(STALL, STALL_TIMES * spent / max(self._steps, 1))
        watch = threading.Timer(limit, self._stalled, [limit])
        if name == "training" and self._speaks:
            watch.daemon = True
            watch.start()
        try:
            yield
        except torch.OutOfMemoryError as error:
            error.add_note(name)  # for train/out_of_memory.py
            raise
        finally:
            watch.cancel()
            spent = time.monotonic() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def share(self, phase: str) -> float:
        """The share of the run's time so far that a phase has taken."""
        total = time.monotonic() - self._started
        return self.seconds.get(phase, 0.0) / max(total, 1e-9)

    def time_spent(self) -> str:
        """Where the time of the run went."""
        total = time.monotonic() - self._started
        shares = ", ".join(
            f"{name} {spent:.0f} s ({spent / max(total, 1e-9):.0%})"
            for name, spent in self.seconds.items()
        )
        return f"time       {total:.0f} s: {shares}"

    def figures(
        self, step: int, figures: dict[str, float], shown: Mapping[str, object] | None = None
    ) -> None:
        """Write named numbers of a step, in the order of steps; what is `shown` is W&B's alone."""
        if self._metrics is None or self._wandb is None or self._others is None:
            return
        seconds = round(time.monotonic() - self._started, 2)
        self._metrics.write({"step": step, "seconds": seconds, **figures})
        self._others.log(figures, step)
        self._wandb.log({**figures, **(shown or {})}, step)

    def alert(self, title: str, text: str) -> None:
        """Tell the people who follow the run from elsewhere."""
        if self._wandb is not None:
            self._wandb.alert(f"{self._config.name}: {title}", text)

    def trained(self, done: int, total: int, learner: Learner, figures: StepFigures) -> None:
        """Collect one training step; every `log_every` steps write the means since the last."""
        expert = learner.expert
        self._steps += 1
        if figures.problem:
            self.say(f"skipped    {expert} expert, {figures.problem}")
            self.figures(done, {f"bad_steps/{expert}": learner.bad_steps})
            if learner.bad_in_row == 1:
                self.alert("NaN", f"{expert} expert, {figures.problem}")
        else:
            bins = self._window.setdefault(expert, Window()).add(learner, figures)
            running = self._running.get(expert)
            if running is None or len(running.losses) != len(learner.edges) - 1:
                running = RunningLoss.of(len(learner.edges) - 1)
            running.add(figures.losses.tolist(), bins)
            self._running[expert] = running
            self._edges[expert] = learner.edges.tolist()
        count = sum(len(window.losses) for window in self._window.values())
        if count >= self._config.tracking.log_every or (done == total and count > 0):
            self._write_window(done)

    def _write_window(self, done: int) -> None:
        spent = self.seconds.get("training", 0.0)
        windows, floor = list(self._window.values()), self._config.tracking.floor
        record = pace(windows, spent - self._window_start, floor) | peak_memory()
        record |= {f"time/spent/{name}_s": seconds for name, seconds in self.seconds.items()}
        maps = {}
        for name, window in self._window.items():
            record |= window.figures(name)
            if name in self._running:
                record |= self._running[name].figures(f"train/{name}")
                if name in self._edges:
                    means = self._running[name].means()
                    maps |= _heat_map(f"train/{name}", means, self._edges[name])
        self.figures(done, record, maps)
        self._window.clear()
        self._window_start = spent

    def heldout(
        self, step: int, losses: Sequence[HeldoutLoss], base: Sequence[HeldoutLoss]
    ) -> None:
        """Write held-out losses, in all and by bin, and how they differ from the base model's."""
        record, maps = {}, {}
        for loss, was in zip(losses, base, strict=True):
            name = f"heldout/{loss.expert}"
            record |= {f"{name}/loss": loss.mean, f"{name}/standard_error": loss.standard_error}
            record |= {f"{name}/bin_{index}": value for index, value in enumerate(loss.bins)}
            errors = enumerate(loss.bin_errors)
            record |= {f"{name}/standard_error_bin_{index}": error for index, error in errors}
            over = f"heldout_over_base/{loss.expert}"  # 0: the base; -0.1: a tenth is gone
            record[f"{over}/loss"] = loss.mean / was.mean - 1
            for index, (now, before) in enumerate(zip(loss.bins, was.bins, strict=True)):
                record[f"{over}/bin_{index}"] = now / before - 1
            maps |= _heat_map(name, dict(enumerate(loss.bins)), loss.edges)
        self.figures(step, record, maps)
        self._noise_panels(step, losses)

    def _noise_panels(self, step: int, losses: Sequence[HeldoutLoss]) -> None:
        """What has changed so far at each level of noise, from the start of the run on."""
        if self._wandb is None:
            return
        history = list(read_metrics(self._path))
        pages = {loss.expert: noise_panel(loss.expert, loss.edges, history) for loss in losses}
        panels = {f"noise/change/{e}": wandb.Html(p, inject=False) for e, p in pages.items() if p}
        self._wandb.log(panels, step)

    def samples(
        self,
        step: int,
        shots: Sequence[Shot],
        files: Sequence[Path],
        sheet: Path,
        checkpoint: str | None,
    ) -> None:
        """Show what the adapters do, and the base beside them, as playable videos in a table.

        `files` are the side-by-sides of the shots; `checkpoint` is the one written at this step.
        """
        if self._wandb is None:
            return
        experts = trained_experts(self._config)
        strengths = [f"strength {expert}" for expert in experts]
        known = ["step", "checkpoint", "prompt", "seed"]
        table = wandb.Table(columns=[*known, *strengths, "video", "beside the base"])
        shown: dict[str, object] = {"samples/sheet": wandb.Image(str(sheet))}
        for index, (shot, file) in enumerate(zip(shots, files, strict=True)):
            beside = wandb.Video(str(file), caption=shot.prompt, format="mp4")
            shown[f"samples/{file.stem}"] = beside  # a table's videos wait for `wandb sync`
            alone = {f"{expert}_only": [float(e == expert) for e in experts] for expert in experts}
            for name, used in {"adapters": [1.0] * len(experts), **alone}.items():
                path = file.with_name(f"{index:02d}_{name}.mp4")
                if path.is_file():
                    video = wandb.Video(str(path), caption=shot.prompt, format="mp4")
                    what = step, checkpoint, shot.prompt, shot.seed
                    table.add_data(*what, *used, video, beside)
        self._wandb.log({"samples/table": table, **shown}, step)

    def dataset(self, dataset: EncodedDataset, report: str) -> None:
        """Keep what the run is made of beside it."""
        if self._wandb is not None:
            self._wandb.used(dataset_artifact(dataset, report))

    def exported(self, files: Mapping[Expert, ExportedFile], losses: Sequence[HeldoutLoss]) -> None:
        """Keep what came out of the run beside it."""
        if self._wandb is not None:
            self._wandb.made(adapter_artifact(self._config.name, files, losses))

    def finish(self) -> None:
        """Close everything."""
        if self._wandb is not None and self._others is not None:
            self._wandb.finish()
            self._others.finish()

    def _stalled(self, seconds: float) -> None:
        text = f"a step has taken more than {seconds:.0f} s; the run waits for it"
        self.say(f"stalled    {text}")
        self.alert("stalled", text)


def say(text: str, speaks: bool) -> None:
    """A line, or a few, on the terminal of the main process."""
    if speaks:
        tqdm.write(text)


def progress_bar(speaks: bool) -> Callable[[Iterable[int], str], Iterable[int]]:
    """Progress before there is a run to track; silent on other processes than the main one."""
    return lambda steps, name: _bar(steps, name, None, speaks)


def _bar(steps: Iterable[T], name: str, total: int | None, speaks: bool) -> Iterable[T]:
    return tqdm(
        steps,
        f"{name:<20}",
        total,
        leave=False,
        disable=not speaks,
        mininterval=0.2 if sys.stderr.isatty() else LOG_FILE_INTERVAL,
    )


def _heat_map(
    name: str, losses: Mapping[int, float], edges: Sequence[float]
) -> dict[str, wandb.Histogram]:
    """Loss over sigma: W&B shows histograms of many steps as a heat map over these.

    Nothing while a bin is missing.
    """
    if len(losses) < len(edges) - 1:
        return {}
    values = np.array([losses[index] for index in sorted(losses)])
    return {f"noise/{name}": wandb.Histogram(np_histogram=(values, np.array(edges)))}
