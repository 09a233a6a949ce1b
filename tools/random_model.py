"""A checkpoint of a variant's full size with random weights, to measure memory and speed with.

python -m tools.random_model ti2v_5b DIR
python -m tools.random_model t2v_a14b DIR --layers 4

What comes out is a diffusers folder that the program loads like a published one, but for the text
encoder, which is one thin layer of the right width (10 GB less on the disk). Pictures from it are
noise.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from wan.key_names import transformer_config, vae_config
from wan.variants import FOLDER_OF_EXPERT, TINY_PATH, VARIANTS, Expert, Variant
from wan.weights import empty_transformer

SHARD_BYTES = 5_000_000_000
WEIGHTS = "diffusion_pytorch_model"


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="fewer blocks than the real model has")
    arguments = parser.parse_args()
    facts = VARIANTS[arguments.variant]
    if arguments.layers:
        smaller = replace(facts.transformer, layers=arguments.layers)
        facts = replace(facts, transformer=smaller)
    write_model(facts, arguments.folder)


def write_model(facts: Variant, folder: Path) -> None:
    """The whole model, bf16 transformers, in the layout of diffusers."""
    for seed, expert in enumerate(facts.experts):
        write_transformer(facts, expert, folder, seed)
    torch.manual_seed(0)
    AutoencoderKLWan(**vae_config(facts)).save_pretrained(folder / "vae")  # pyright: ignore[reportArgumentType]
    write_text_encoder(facts, folder)
    names = {"transformer_2": [None, None]} if len(facts.experts) == 1 else {}
    index = json.loads((TINY_PATH / "model_index.json").read_text()) | names
    index |= {
        "_class_name": "WanImageToVideoPipeline"
        if facts.conditioning == "channels"
        else "WanPipeline",
        "boundary_ratio": facts.boundary,
        "expand_timesteps": facts.conditioning == "first_frame",
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def write_transformer(facts: Variant, expert: Expert, folder: Path, seed: int) -> None:
    """The shards of one expert; a full one is made in memory one shard at a time."""
    path = folder / FOLDER_OF_EXPERT[expert]
    path.mkdir(parents=True, exist_ok=True)
    model = empty_transformer(transformer_config(facts))
    model.save_config(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(seed)
    places: dict[str, str] = {}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for number, shard in enumerate(_shards(shapes), start=1):
        file = f"{WEIGHTS}-{number:05d}.safetensors"
        tensors = {name: _random(name, shapes[name], generator).cpu() for name in shard}
        save_file(tensors, path / file)
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": places}
    (path / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index))


def write_text_encoder(facts: Variant, folder: Path) -> None:
    """One layer of the right width, with the toy model's tokenizer."""
    shutil.copytree(TINY_PATH / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    shutil.copytree(TINY_PATH / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    vocabulary = json.loads((TINY_PATH / "text_encoder" / "config.json").read_text())["vocab_size"]
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=facts.transformer.text_dim,
        d_kv=64,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    encoder = UMT5EncoderModel(config)
    encoder.to(dtype=torch.bfloat16)  # pyright: ignore[reportCallIssue, reportArgumentType] (hidden by a decorator)
    encoder.save_pretrained(folder / "text_encoder")


def _shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        names.append(name)
        size += 2 * shape.numel()
        if size > SHARD_BYTES:
            yield names
            names, size = [], 0
    if names:
        yield names


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Values of the scale that a trained model has, so that its activations stay finite."""
    device = generator.device
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)
    fan_in = shape[1:].numel() if len(shape) > 1 else shape.numel()
    values = torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device)
    return values * fan_in**-0.5


if __name__ == "__main__":
    main()
