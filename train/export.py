"""The files to upload, made from a run's adapters, with what they should say about themselves."""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from train.compose import resolved_yaml
from train.config import Config
from train.encode import EncodedDataset
from train.learner import Learner
from train.validate import HeldoutLoss
from wan.checkpoints import Model, component_hash
from wan.experts import Experts
from wan.lora import adapter_state
from wan.lora_format import ExportedFile, export_adapter
from wan.lora_metadata import AdapterInfo
from wan.variants import Expert


class Exporter:
    """Writes pairs of one run: what they share is gathered once, before training starts."""

    def __init__(self, config: Config, model: Model, dataset: EncodedDataset, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._variant = model.variant
        self._started = datetime.now(UTC)
        self._config_hash = hashlib.sha256(resolved_yaml(config).encode()).hexdigest()
        self._dataset_hash = dataset.fingerprint()
        self._num_items = len(dataset.train)
        self._base_hash = {
            expert: component_hash(model, expert) for expert in model.variant.experts
        }

    def write(
        self,
        target: Path,
        name: str,
        experts: Experts,
        learners: Mapping[Expert, Learner],
        losses: Sequence[HeldoutLoss],
    ) -> dict[Expert, ExportedFile]:
        """One file for each trained expert: its adapter as it is, and its last held-out loss."""
        loss_of = {loss.expert: loss.mean for loss in losses}
        return {
            expert: export_adapter(
                target,
                name,
                adapter_state(experts[expert]),
                self._info(learner, loss_of.get(expert)),
                getattr(torch, self._config.export.dtype),
            )
            for expert, learner in learners.items()
        }

    def write_checkpoint(
        self,
        experts: Experts,
        learners: Mapping[Expert, Learner],
        done: int,
        losses: Sequence[HeldoutLoss],
    ) -> None:
        """The pair after `done` steps of the run, in files that load everywhere, like the last."""
        name = f"{self._config.name}_{done:09d}"
        self.write(self._folder / "checkpoints", name, experts, learners, losses)

    def _info(self, learner: Learner, loss: float | None) -> AdapterInfo:
        config, export = self._config, self._config.export
        return AdapterInfo(
            title=export.title or config.name,
            variant=self._variant,
            expert=learner.expert,
            rank=learner.settings.rank,
            alpha=learner.settings.alpha,
            targets=config.lora.targets,
            steps=learner.steps_done,
            learning_rate=learner.settings.learning_rate,
            optimizer=config.optim.name,
            seed=config.seed,
            resolution=f"{config.data.width}x{config.data.height}",
            num_items=self._num_items,
            shift=config.timesteps.shift,
            timestep_law=config.timesteps.base,
            config_sha256=self._config_hash,
            base_hash=self._base_hash[learner.expert],
            dataset_hash=self._dataset_hash,
            pair_id=hashlib.sha256(
                f"{self._config_hash} {self._dataset_hash}".encode()
            ).hexdigest()[:16],
            date=_iso(datetime.now(UTC)),
            started=_iso(self._started),
            trigger=config.data.trigger or "",
            heldout_loss=loss,
            dropout=config.lora.dropout,
            max_steps=learner.settings.steps,
            schedule=config.optim.schedule,
            warmup_steps=config.optim.warmup_steps,
            mixed_precision="bf16" if config.model.dtype == "bfloat16" else "no",
            accumulation=config.accumulate,
            max_grad_norm=config.optim.max_grad_norm,
            author=export.author or "",
            description=export.description or "",
            license=export.license or "",
        )


def _iso(moment: datetime) -> str:
    return moment.replace(microsecond=0).isoformat()
