"""The files to upload, made from a run's adapters, with what they should say about themselves."""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from train.apart import as_one_run
from train.compose import resolved_yaml
from train.config import Config
from train.ema import averaged
from train.encode import EncodedDataset
from train.learner import Learner, as_used
from train.validate import HeldoutLoss
from wan.adapter_choices import Kind
from wan.checkpoints import Model, component_hash
from wan.experts import Experts
from wan.lora import finished_state
from wan.lora_format import ExportedFile, export_adapter
from wan.lora_metadata import AdapterInfo
from wan.variants import Expert


class Exporter:
    """Writes pairs of one run: what they share is gathered once, before training starts."""

    def __init__(self, config: Config, model: Model, dataset: EncodedDataset) -> None:
        self._config = config
        self._variant = model.variant
        self._started = datetime.now(UTC)
        self.settings = resolved_yaml(config)  # of the run, as its folder and checkpoints have them
        self._config_hash = hashlib.sha256(self.settings.encode()).hexdigest()
        self._pair_hash = hashlib.sha256(resolved_yaml(as_one_run(config)).encode()).hexdigest()
        self._dataset_hash = dataset.fingerprint()
        self._num_items = len(dataset.train)
        self.base_hash: dict[Expert, str] = {
            expert: component_hash(model, expert) for expert in model.variant.experts
        }

    def write(
        self,
        target: Path,
        name: str,
        experts: Experts,
        learners: Mapping[Expert, Learner],
        losses: Sequence[HeldoutLoss],
        best: Mapping[Expert, float],
    ) -> dict[Expert, ExportedFile]:
        """One file for each trained expert: its adapter as it is used, its last held-out loss and
        its `best` one.

        With `export.weights=both` the averages lie beside them, as `<name>_ema`.
        """
        loss_of = {loss.expert: loss.mean for loss in losses}
        written: dict[Expert, ExportedFile] = {}
        for expert, learner in learners.items():
            with as_used({expert: learner}):
                info = self._info(learner, loss_of.get(expert), best.get(expert))
                written[expert] = self._write(target, name, experts[expert], info)
            if self._config.export.weights == "both":
                with averaged(learner.ema):
                    info = self._info(learner, None, None)  # the losses were measured without
                    self._write(target, f"{name}_ema", experts[expert], info)
        return written

    def _write(
        self, target: Path, name: str, transformer: WanTransformer3DModel, info: AdapterInfo
    ) -> ExportedFile:
        dtype = getattr(torch, self._config.export.dtype)
        return export_adapter(target, name, finished_state(transformer), info, dtype)

    def _info(self, learner: Learner, loss: float | None, best: float | None) -> AdapterInfo:
        config, export = self._config, self._config.export
        return AdapterInfo(
            title=export.title or config.name,
            variant=self._variant,
            expert=learner.expert,
            rank=learner.settings.rank,
            alpha=learner.settings.alpha,
            kind=cast("Kind", config.lora.kind),
            weights="ema" if learner.ema and learner.ema.shown else "live",
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
            base_hash=self.base_hash[learner.expert],
            dataset_hash=self._dataset_hash,
            pair_id=hashlib.sha256(f"{self._pair_hash} {self._dataset_hash}".encode()).hexdigest()[
                :16
            ],
            date=_iso(datetime.now(UTC)),
            started=_iso(self._started),
            trigger=config.data.trigger or "",
            heldout_loss=loss,
            best_heldout_loss=best,
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
