"""All that a study needs of the demo's data, in one small file: no video has to be decoded again.

Latents (n, C, F, h, w) are normalised; captions are rows of one table of text embeddings.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TEXT_LEN = 512


@dataclass(frozen=True)
class StudyData:
    """Clips to train on, clips to measure on, and prompts to render, with what they ask for."""

    texts: Tensor  # (n, L, D), zero-padded; row 0 is the empty caption
    videos: Tensor  # (n, C, F, h, w)
    video_texts: Tensor  # (n,) rows of `texts`
    images: Tensor  # (n, C, 1, h, w)
    image_texts: Tensor  # (n,)
    heldout: Tensor  # (n, C, F, h, w), all of the concept
    heldout_texts: Tensor  # (n,)
    concept_prompts: Tensor  # (n,) rows of `texts`
    world_prompts: Tensor  # (n,)
    world_wanted: Tensor  # (n, 2): colour and shape by the world's indices

    def save(self, path: Path) -> None:
        """One safetensors file."""
        tensors = {field.name: getattr(self, field.name).contiguous() for field in fields(self)}
        save_file(tensors, path)

    def to(self, device: torch.device) -> "StudyData":
        """The same on a device."""
        return StudyData(*(getattr(self, field.name).to(device) for field in fields(self)))

    def text(self, rows: Tensor) -> Tensor:
        """(n, 512, D) for the transformer, of rows (n,) of the table."""
        chosen = self.texts[rows]
        padded = chosen.new_zeros(len(rows), TEXT_LEN, chosen.shape[-1])
        padded[:, : chosen.shape[1]] = chosen
        return padded


def load_data(path: Path) -> StudyData:
    """What `save` wrote, on the CPU in fp32; `SystemExit` with the command that makes the file."""
    if not path.is_file():
        raise SystemExit(
            f"error: there is no file {path}; make it with "
            f"`python -m tools.learning_study prepare {path}`"
        )
    return StudyData(**load_file(path))
