"""A toy in place of a model: channels, VAE and text encoder of its kind, at toy width, random."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from train.video_files import write_mp4
from wan.key_names import transformer_config, vae_config
from wan.variants import FOLDER_OF_EXPERT, TINY_PATH, VARIANTS, Variant

TOY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 512}
VIDEOS = 4


def write_model(folder: Path, facts: Variant) -> None:
    """A diffusers folder of the variant; the text encoder is the toy model's."""
    for part in ("tokenizer", "scheduler", "text_encoder"):
        shutil.copytree(TINY_PATH / part, folder / part)
    text = {"text_dim": VARIANTS["tiny"].transformer.text_dim}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for expert in facts.experts:
            config = transformer_config(facts) | TOY | text
            transformer = WanTransformer3DModel(**config)  # pyright: ignore[reportArgumentType]
            transformer.save_pretrained(folder / FOLDER_OF_EXPERT[expert])
        decoder = {"decoder_base_dim": 8 if facts.vae.decoder_base_dim else None}
        config = vae_config(facts) | {"base_dim": 4} | decoder
        vae = AutoencoderKLWan(**config)  # pyright: ignore[reportArgumentType]
        vae.save_pretrained(folder / "vae")
    names = {"transformer_2": [None, None]} if len(facts.experts) == 1 else {}
    index = json.loads((TINY_PATH / "model_index.json").read_text()) | names
    index |= {
        "boundary_ratio": facts.boundary,
        "expand_timesteps": facts.conditioning == "first_frame",
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def write_videos(folder: Path, side: int, frames: int, fps: int) -> None:
    """Videos of noise with captions."""
    for number in range(VIDEOS):
        pixels = np.random.default_rng(number).integers(0, 256, (frames, side, side, 3), np.uint8)
        write_mp4(folder / f"{number}.mp4", pixels, fps)
        (folder / f"{number}.txt").write_text(f"Noise number {number}.")
