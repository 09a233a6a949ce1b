"""A model of full size on the disk whose tensors are holes: headers, and no bytes."""

import json
import struct
from pathlib import Path

import torch
from torch import nn

from tools.random_model import write_text_encoder
from wan.key_names import transformer_config, vae_config
from wan.variants import FOLDER_OF_EXPERT, TINY_PATH, Variant
from wan.weights import empty_transformer, empty_vae


def full_size_model(folder: Path, facts: Variant) -> Path:
    """A diffusers folder that `find_model` takes; nothing in it can be loaded but the tokenizer."""
    for number, expert in enumerate(facts.experts):
        place = folder / FOLDER_OF_EXPERT[expert]
        model = empty_transformer(transformer_config(facts))
        model.save_config(place)
        _write_holes(place / "diffusion_pytorch_model.safetensors", model, bytes([number + 1]))
    vae = empty_vae(vae_config(facts))
    vae.save_config(folder / "vae")
    _write_holes(folder / "vae" / "diffusion_pytorch_model.safetensors", vae, b"\0")
    with torch.random.fork_rng(devices=[]):
        write_text_encoder(facts, folder)
    names = {"transformer_2": [None, None]} if len(facts.experts) == 1 else {}
    index = json.loads((TINY_PATH / "model_index.json").read_text()) | names
    index |= {
        "boundary_ratio": facts.boundary,
        "expand_timesteps": facts.conditioning == "first_frame",
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _write_holes(file: Path, model: nn.Module, last: bytes) -> None:
    """`last` is the file's last byte: two experts are not the same file twice."""
    header: dict[str, dict] = {}
    end = 0
    for name, tensor in model.state_dict().items():
        size = 2 * tensor.numel()
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.seek(8 + len(text) + end - 1)
        stream.write(last)
