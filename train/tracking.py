"""What a run says about itself: the terminal, metrics.jsonl in its folder, and Weights & Biases.

The folder is the truth: everything that W&B gets is in metrics.jsonl and samples/ too. Only the
main process speaks. Nothing ever asks for a login.
"""

import json
import netrc
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal, TypeVar, cast
from urllib.parse import urlsplit

import torch
import wandb
from torch import Tensor
from tqdm import tqdm

from train.config import Config
from train.learner import Learner, StepFigures
from train.preview import Shot
from train.rules import ConfigError
from train.validate import HeldoutLoss
from wan.flow import bin_of
from wan.variants import Expert

T = TypeVar("T")
WandbMode = Literal["online", "offline", "disabled", "shared"]
NETWORK_WAIT = 3.0  # seconds
LOG_FILE_INTERVAL = 15.0  # seconds between lines of progress where there is no terminal


class Tracker:
    """The voice of a run. On other processes than the main one all methods do nothing."""

    def __init__(self, config: Config, folder: Path, speaks: bool) -> None:
        self._speaks = speaks
        self._log_every = config.tracking.log_every
        self._started = time.monotonic()
        self.seconds: dict[str, float] = {}  # by phase
        self._window: dict[Expert, list[StepFigures]] = {}
        self._window_start = 0.0  # of training time
        self._edges: dict[Expert, Tensor] = {}
        self._run = None
        if not speaks:
            return
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        mode = _wandb_mode(config.tracking.mode)
        # Videos of tables are staged here until `wandb sync`: all of a run is in its folder.
        os.environ.setdefault("WANDB_DATA_DIR", str(folder.resolve() / "wandb"))
        self._run = wandb.init(
            project=config.tracking.project,
            name=config.name,
            dir=str(folder),
            mode=mode,
            config=asdict(config),
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        self.say(f"wandb      {mode}" + (f": {self._run.url}" if mode == "online" else ""))

    def say(self, text: str) -> None:
        """One line, or a few, on the terminal."""
        if self._speaks:
            tqdm.write(text)

    def progress(self, steps: Iterable[T], name: str, total: int | None = None) -> Iterable[T]:
        """Iterate with a progress bar, which stays on the screen only while it moves."""
        return _bar(steps, name, total, self._speaks)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time spent within as that of the phase `name`."""
        started = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def time_spent(self) -> str:
        """Where the time of the run went."""
        total = time.monotonic() - self._started
        shares = ", ".join(f"{name} {spent:.0f} s" for name, spent in self.seconds.items())
        return f"time       {total:.0f} s: {shares}"

    def figures(self, step: int, figures: dict[str, float]) -> None:
        """Write named numbers of a step, in the order of steps."""
        if not self._speaks or self._run is None:
            return
        record = {"step": step, "seconds": round(time.monotonic() - self._started, 2), **figures}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._run.log(figures, step=step)

    def trained(self, done: int, total: int, learner: Learner, figures: StepFigures) -> None:
        """Collect one training step; every `log_every` steps write the means since the last."""
        self._window.setdefault(learner.expert, []).append(figures)
        self._edges[learner.expert] = learner.edges
        count = sum(len(steps) for steps in self._window.values())
        if count < self._log_every and done < total:
            return
        seconds = self.seconds.get("training", 0.0) - self._window_start
        record = {"time/step_s": seconds / count}
        for name, steps in self._window.items():
            record[f"train/{name}/loss"] = sum(step.loss for step in steps) / len(steps)
            record[f"lr/{name}"] = steps[-1].learning_rate
            record[f"grad_norm/{name}"] = sum(step.grad_norm for step in steps) / len(steps)
            record |= _by_bin(f"train/{name}", steps, self._edges[name])
        self.figures(done, record)
        self._window.clear()
        self._window_start = self.seconds.get("training", 0.0)

    def heldout(self, step: int, losses: Sequence[HeldoutLoss]) -> None:
        """Write held-out losses, in all and by bin."""
        record = {}
        for loss in losses:
            record[f"heldout/{loss.expert}/loss"] = loss.mean
            record[f"heldout/{loss.expert}/standard_error"] = loss.standard_error
            for index, value in enumerate(loss.bins):
                record[f"heldout/{loss.expert}/bin_{index}"] = value
        self.figures(step, record)

    def samples(self, step: int, shots: Sequence[Shot], files: Sequence[Path], sheet: Path) -> None:
        """Show base and adapters side by side, as playable videos in a table."""
        if self._run is None:
            return
        table = wandb.Table(columns=["step", "prompt", "seed", "base and adapters"])
        shown: dict[str, object] = {"sheet": wandb.Image(str(sheet))}
        for shot, file in zip(shots, files, strict=True):
            video = wandb.Video(str(file), caption=shot.prompt, format="mp4")
            table.add_data(step, shot.prompt, shot.seed, video)
            shown[f"samples/{file.stem}"] = video  # a table's videos wait for `wandb sync`
        self._run.log({"samples": table, **shown}, step=step)

    def finish(self) -> None:
        """Close everything."""
        if not self._speaks or self._run is None:
            return
        self._run.finish()
        self._file.close()


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


def _by_bin(prefix: str, steps: Sequence[StepFigures], edges: Tensor) -> dict[str, float]:
    """Mean training loss of each bin that was visited."""
    losses = torch.cat([step.losses for step in steps])
    bins = bin_of(torch.cat([step.sigmas for step in steps]), edges)
    return {
        f"{prefix}/bin_{index}": losses[bins == index].mean().item()
        for index in bins.unique().tolist()
    }


def _wandb_mode(mode: str) -> WandbMode:
    """`auto` is online only with an account and a network: else W&B would ask, or wait."""
    host = urlsplit(str(wandb.Settings().base_url)).hostname or ""
    if mode == "online" and not _has_account(host):
        raise ConfigError(
            f"tracking.mode is online, but there is no account for {host} on this machine: set "
            "WANDB_API_KEY in the environment, or use tracking.mode=auto, which stays offline then."
        )
    if mode == "auto":
        wanted = os.environ.get("WANDB_MODE", "online")
        reachable = wanted != "online" or (_has_account(host) and _answers(host))
        mode = wanted if reachable else "offline"
    return cast("WandbMode", mode)


def _has_account(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _answers(host: str) -> bool:
    try:
        with socket.create_connection((host, 443), timeout=NETWORK_WAIT):
            return True
    except OSError:
        return False
