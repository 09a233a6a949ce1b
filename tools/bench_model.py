"""A whole model of `tools.random_model`: loading, a step of each expert, a sample, by phase."""

import resource
import time
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from data.batches import Batch
from tools.bench_random import Shape
from tools.bench_step import synchronise
from train.config import ModelConfig
from train.encode import model_paths
from train.step import NoiseDraw, velocity_error
from wan import lora
from wan.adapter_choices import target_modules
from wan.checkpoints import find_model, load_vae
from wan.conditioning import Condition, channels_condition
from wan.experts import Experts, load_experts
from wan.key_names import vae_config
from wan.latents import decode_latents
from wan.memory import set_up_blocks
from wan.sample_settings import SampleSettings, distilled
from wan.sampler import sample_latents
from wan.text import pad_text
from wan.variants import Variant


def bench_model(folder: Path, facts: Variant, shape: Shape, sample_steps: int) -> dict[str, object]:
    """Seconds and memory of loading, of a training step of each expert, and of a sample.

    A sample of 4 steps is a distilled one, without guidance.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    finding = time.perf_counter()
    model = find_model(model_paths(ModelConfig(facts.name, str(folder))), facts.name)
    found: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "variant": facts.name,
        "shape": list(shape),
        "find_seconds": round(time.perf_counter() - finding, 2),
    }
    loading = time.perf_counter()
    experts = load_experts(model, dtype, device)
    found |= _spent("load", loading)
    for expert in experts:
        moving = time.perf_counter()
        transformer = experts[expert]
        found |= _spent(f"{expert}_to_device", moving)
        lora.attach(transformer, 16, 16.0, target_modules("all"), 0.0, seed=0)
        latent = torch.Size((1, facts.in_channels, *facts.geometry.latent_shape(*shape)[1:]))
        rows = latent[2] if facts.conditioning == "first_frame" else 1
        set_up_blocks(transformer, "auto", device.type == "cuda", latent, rows)
        parameters = lora.adapter_parameters(transformer)
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        for step in range(2):
            started = time.perf_counter()
            batch, draw = random_batch(facts, shape, step)
            velocity_error(transformer, batch, draw, facts).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            found |= _spent(f"{expert}_step", started)

    if len(facts.experts) > 1:
        moving = time.perf_counter()
        _ = experts[facts.experts[0]]
        found |= _spent("swap", moving)
    found |= _sample(experts, facts, shape, sample_steps, device)
    found["host_peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    return found


def _sample(
    experts: Experts, facts: Variant, shape: Shape, sample_steps: int, device: torch.device
) -> dict[str, object]:
    """Seconds and memory of a sample's steps and of its decoding."""
    settings = SampleSettings(sample_steps, facts.sample_shift, facts.guidance, *shape)
    text = pad_text([torch.randn(20, facts.transformer.text_dim)], facts.text_len).to(device)
    condition = Condition()
    if facts.conditioning == "channels":
        latents = torch.randn(1, *facts.geometry.latent_shape(*shape), device=device)
        condition = Condition(channels=channels_condition(latents, last=False))
    if sample_steps == 4:
        settings = distilled(settings)
    started = time.perf_counter()
    sampled = sample_latents(experts, settings, facts, text, text, [0], condition)
    found = _spent(f"sample_{sample_steps}_steps", started)
    started = time.perf_counter()
    video = decode_latents(make_vae(facts, torch.float32, device), sampled)
    found |= _spent("decode", started)
    assert video.isfinite().all()
    return found


def random_batch(facts: Variant, shape: tuple[int, int, int], seed: int) -> tuple[Batch, NoiseDraw]:
    """One clip of noise with a caption of noise, as the model takes them."""
    torch.manual_seed(seed)
    latents = torch.randn(1, *facts.geometry.latent_shape(*shape))
    yes = torch.ones(1, dtype=torch.bool)
    batch = Batch(
        clips=[0],
        latents=latents,
        text=[torch.randn(20, facts.transformer.text_dim)],
        mask=None,
        loss_weight=torch.ones(1),
        condition=torch.randn_like(latents) if facts.conditioning == "channels" else None,
        first_given=yes,
        last_given=~yes,
    )
    return batch, NoiseDraw(torch.tensor([0.9]), torch.randn_like(latents))


def _spent(what: str, started: float) -> dict[str, object]:
    """Seconds since then and the peak of the device's memory since the last such question."""
    synchronise(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found: dict[str, object] = {f"{what}_seconds": round(time.perf_counter() - started, 2)}
    if torch.cuda.is_available():
        found[f"{what}_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        torch.cuda.reset_peak_memory_stats()
    return found


def make_vae(facts: Variant, dtype: torch.dtype, device: torch.device) -> AutoencoderKLWan:
    """The VAE of a variant at its real size: random, but for the toy model's."""
    if facts.name == "tiny":
        model = find_model(model_paths(ModelConfig(path="embedded")), facts.name)
        return load_vae(model, dtype, device)
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**vae_config(facts))  # pyright: ignore[reportArgumentType]
    return vae.to(device=device, dtype=dtype).eval()  # pyright: ignore[reportCallIssue]
