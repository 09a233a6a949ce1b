"""Weights of the toy models in each layout, as recognition would describe them."""

import json
from collections.abc import Mapping
from pathlib import Path

import layouts
from safetensors.torch import load_file

from wan.recognise import Naming, Part, Weights

FILE = "diffusion_pytorch_model.safetensors"


def weights_of(
    part: Part, files: Path | list[Path], naming: Naming, config: Path, prefix: str = ""
) -> Weights:
    """What recognition would say of files whose library's config lies at `config`."""
    paths = sorted(files) if isinstance(files, list) else [files]
    return Weights(part, tuple(paths), naming, prefix, "", json.loads(config.read_text()))


def transformer_weights(source: Path, tmp_path: Path, layout: str) -> tuple[Weights, Mapping]:
    """The high-noise transformer of a diffusers folder in another layout, and its values."""
    folder, file = source / "transformer", tmp_path / "file.safetensors"
    config, values = folder / "config.json", load_file(folder / FILE)
    if layout == "diffusers":
        return weights_of("high", folder / FILE, "diffusers", config), values
    if layout == "official":
        layouts.write_shards(layouts.official_transformer(values), tmp_path, FILE)
        shards = list(tmp_path.glob("*.safetensors"))
        assert len(shards) == 2
        return weights_of("high", shards, "official", config), values
    storage, _, prefix = layout.partition("+")
    values = layouts.write_comfy_transformer(folder, file, storage, prefix)
    return weights_of("high", file, "official", config, prefix), values
