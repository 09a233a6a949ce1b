"""What a run was made of and what came out of it, as W&B keeps them: artifacts with lineage."""

import re
from collections.abc import Mapping, Sequence

import wandb

from train.encode import EncodedDataset
from train.validate import HeldoutLoss
from wan.lora_format import ExportedFile
from wan.variants import Expert


def dataset_artifact(dataset: EncodedDataset, report: str) -> wandb.Artifact:
    """What was trained and measured on: a report and a table of the clips, no pictures or captions.

    The same data have the same name, whatever run uses them.
    """
    fingerprint = dataset.fingerprint()
    sides = {"train": dataset.train, "held out": dataset.heldout}
    table = wandb.Table(columns=["clip", "side", "frames", "height", "width", "visits", "weight"])
    for side, clips in sides.items():
        for clip in clips.clips:
            shape = clip.bucket.frames, clip.bucket.height, clip.bucket.width
            table.add_data(clip.name, side, *shape, clip.visits, clip.loss_weight)
    artifact = wandb.Artifact(
        f"dataset-{fingerprint}",
        "dataset",
        metadata={"fingerprint": fingerprint} | {side: len(clips) for side, clips in sides.items()},
    )
    with artifact.new_file("report.txt") as file:
        file.write(report + "\n")
    artifact.add(table, "clips")
    return artifact


def adapter_artifact(
    name: str, files: Mapping[Expert, ExportedFile], losses: Sequence[HeldoutLoss]
) -> wandb.Artifact:
    """The files to upload, which stay where they are until W&B has them."""
    about: dict[str, object] = {f"heldout/{loss.expert}/loss": loss.mean for loss in losses}
    for expert, file in files.items():
        about |= {f"{expert}/autov2": file.autov2, f"{expert}/autov3": file.autov3}
    artifact = wandb.Artifact(
        re.sub(r"[^\w.-]", "-", name, flags=re.ASCII), "model", metadata=about
    )
    for file in files.values():
        artifact.add_file(str(file.path), policy="immutable")  # no second copy
    return artifact
