"""Adapters and images for the tests of rendering."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from adapter_examples import INFO, random_state
from PIL import Image

from wan.lora_format import export_adapter
from wan.variants import EXPERTS


def export_pairs(folder: Path) -> None:
    """The files of two adapters, fox and owl, for both experts of the toy model."""
    for number, name in enumerate(("fox", "owl")):
        for expert in EXPERTS:
            state = random_state(number, preset="attention")
            export_adapter(folder, name, state, replace(INFO, expert=expert), torch.float32)


def save_noise(path: Path, seed: int, height: int, width: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path
