"""Weights & Biases, which may be lost at any time: then the folder goes on without it.

Nothing ever asks for a login.
"""

import hashlib
import json
import netrc
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, cast
from urllib.parse import urlsplit

import wandb

from train.compose import trained_experts
from train.config import Config
from train.rules import ConfigError
from train.wandb_file import Logged, logged

WandbMode = Literal["online", "offline", "disabled", "shared"]
NETWORK_WAIT = 3.0  # seconds
LOWEST = ("heldout/*", "heldout_over_base/*")  # told of a run as their lowest value, too
# What two runs of one group may have differently: which expert they train, how long, how they tell.
OF_ONE_RUN = (
    "name", "output_dir", "experts", "high", "low", "single", "steps", "turn_steps", "resume",
    "resume_reason", "speed", "preview", "tracking", "checkpoint", "export", "launch",
)  # fmt: skip


def run_group(config: Config) -> str:
    """The name that runs of the same model, data and settings share, whatever expert they train."""
    if config.tracking.group is not None:
        return config.tracking.group
    shared = {name: value for name, value in asdict(config).items() if name not in OF_ONE_RUN}
    digest = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.model.variant}-{Path(config.data.path).name[:64]}-{digest}"


class WandbLog:
    """A run on W&B; `say` is told when it is lost."""

    def __init__(
        self, config: Config, folder: Path, run_id: str | None, say: Callable[[str], None]
    ) -> None:
        """Begin a run, or go on with that of `run_id`."""
        self._say = say
        self.run_id = run_id
        mode = _wandb_mode(config.tracking.mode)
        # Videos of tables are staged here until `wandb sync`: all of a run is in its folder.
        os.environ.setdefault("WANDB_DATA_DIR", str(folder.resolve() / "wandb"))
        self._run = None
        self._has = Logged() if run_id is None else logged(folder, run_id)
        if mode == "disabled":
            say("wandb      disabled")
            return
        experts = trained_experts(config)
        try:
            self._run = wandb.init(
                project=config.tracking.project,
                name=config.name,
                group=run_group(config),
                job_type="+".join(experts),
                tags=[config.model.variant, *experts],
                id=run_id,
                resume=None if run_id is None else "allow",
                dir=str(folder),
                mode=mode,
                config=asdict(config),
                settings=wandb.Settings(silent=True, console="off", init_timeout=30),
            )
            for names in LOWEST:
                self._run.define_metric(names, summary="min,last")
        except (wandb.Error, OSError) as error:
            self._lost(error)
            return
        if self._run.step - 1 > self._has.step:  # W&B itself has more, from another machine
            self._has = replace(self._has, step=self._run.step - 1, names=frozenset())
        self.run_id = self._run.id
        say(f"wandb      {mode}" + (f": {self._run.url}" if mode == "online" else ""))

    def log(self, record: Mapping[str, object], step: int) -> None:
        """Send what belongs to a step, but for what W&B has already from an earlier start."""
        if step == self._has.step:
            record = {name: record[name] for name in record if name not in self._has.names}
        if step >= self._has.step and record:
            self._try(lambda run: run.log(dict(record), step=step))

    def alert(self, title: str, text: str) -> None:
        """A message to the people who follow the run."""
        self._try(lambda run: run.alert(title, text, level="WARN"))

    def used(self, artifact: wandb.Artifact) -> None:
        """What the run was made of. Public calls refuse this offline: the record is their own."""
        if artifact.digest not in self._has.artifacts:
            self._try(lambda run: run._log_artifact(artifact, use_after_commit=True))

    def made(self, artifact: wandb.Artifact) -> None:
        """What came out of the run."""
        if artifact.digest not in self._has.artifacts:
            self._try(lambda run: run.log_artifact(artifact))

    def finish(self) -> None:
        """Send what is left, and wait until the file on the disk has all of it."""
        self._try(lambda run: (run.finish(), wandb.teardown()))

    def _try(self, send: Callable[[wandb.Run], object]) -> None:
        if self._run is None:
            return
        try:
            send(self._run)
        except (wandb.Error, OSError) as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        self._run = None
        self._say(
            f"wandb      lost ({str(error) or type(error).__name__}): figures and samples are in "
            "the run's folder, as always"
        )


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


def account_told() -> str:
    """Whether this machine has an account to log to; the network is not asked."""
    host = urlsplit(str(wandb.Settings().base_url)).hostname or ""
    return f"{'an' if _has_account(host) else 'no'} account for {host} on this machine"


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
