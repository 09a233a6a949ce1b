"""Samples by both experts on random weights, by phase: each expert's steps, its swap, decoding.

Weights are of the variant's full width, with adapters as in a preview; the blocks are compiled on a
GPU. Two steps come first each time, so that no phase is charged for compiling.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from tools.bench_model import make_vae
from tools.bench_random import Shape, adapted
from tools.bench_step import GIB, peak_bytes, reset_peak, synchronise
from wan.experts import Experts, Placement
from wan.latents import decode_latents
from wan.sample_settings import SampleSettings, distilled
from wan.sampler import sample_steps
from wan.speed import prepare_blocks
from wan.speed_choices import FrozenFormat
from wan.text import pad_text
from wan.variants import Expert, Variant


class _Asked(Mapping[Expert, WanTransformer3DModel]):
    """The experts, with the seconds that bringing each to the device took, and who came last."""

    def __init__(self, experts: Experts, device: torch.device) -> None:
        self._experts, self._device = experts, device
        self.last: Expert = next(iter(experts))
        self.moving = 0.0

    def __getitem__(self, expert: Expert) -> WanTransformer3DModel:
        synchronise(self._device)
        started = time.perf_counter()
        transformer = self._experts[expert]
        synchronise(self._device)
        self.moving += time.perf_counter() - started
        self.last = expert
        return transformer

    def __iter__(self) -> Iterator[Expert]:
        return iter(self._experts)

    def __len__(self) -> int:
        return len(self._experts)


def bench_sample(
    facts: Variant,
    blocks: int,
    shape: Shape,
    lengths: Sequence[int],
    placement: Placement,
    frozen: FrozenFormat | None,
) -> list[dict[str, object]]:
    """Seconds and peak GiB of each phase of samples of so many steps; 4 are a distilled one's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    experts = _random_experts(facts, blocks, dtype, device, placement, frozen)
    text = pad_text([torch.randn(60, facts.transformer.text_dim)], facts.text_len).to(device)
    found = []
    for steps in lengths:
        settings = SampleSettings(steps, facts.sample_shift, facts.guidance, *shape)
        if steps == 4:
            settings = distilled(settings)
        _time_steps(experts, replace(settings, steps=2), facts, text)  # compiles
        line: dict[str, object] = {
            "shape": list(shape),
            "blocks": blocks,
            "steps": steps,
            "guidance": [settings.guidance.of(expert) for expert in experts],
            "placement": placement,
            "frozen": frozen,
        }
        latents, phases = _time_steps(experts, settings, facts, text)
        line |= phases | _decoding(latents, facts)
        print(json.dumps(line), flush=True)
        found.append(line)
    return found


def _decoding(latents: Tensor, facts: Variant) -> dict[str, object]:
    device = latents.device
    vae = make_vae(facts, torch.float32, device)
    reset_peak(device)
    started = time.perf_counter()
    decode_latents(vae, latents)
    synchronise(device)
    seconds, peak = time.perf_counter() - started, peak_bytes(device)
    return {"decode_seconds": round(seconds, 2), "decode_peak_gib": round(peak / GIB, 1)}


def _random_experts(
    facts: Variant,
    blocks: int,
    dtype: torch.dtype,
    device: torch.device,
    placement: Placement,
    frozen: FrozenFormat | None,
) -> Experts:
    """The experts with the same random numbers, made on the device one after the other."""
    transformers: dict[Expert, WanTransformer3DModel] = {}
    for expert in facts.experts:
        transformer = adapted(facts, blocks, dtype, device, frozen).eval()
        compiled = device.type == "cuda"
        prepare_blocks(transformer, ("nothing",) * blocks, compiled, device)
        transformers[expert] = transformer
        if placement != "resident":
            nn.Module.to(transformer, "cpu")
    return Experts(transformers, device, placement)


def _time_steps(
    experts: Experts, settings: SampleSettings, facts: Variant, text: Tensor
) -> tuple[Tensor, dict[str, object]]:
    """The latents, and for each expert its steps, their seconds, and those of bringing it in."""
    device = text.device
    asked = _Asked(experts, device)
    seconds = dict.fromkeys(experts, 0.0)
    counts = dict.fromkeys(experts, 0)
    reset_peak(device)
    x, started, moved = text, time.perf_counter(), 0.0
    for latents in sample_steps(asked, settings, facts, text, text[:1], [0]):
        synchronise(device)
        now = time.perf_counter()
        seconds[asked.last] += now - started - (asked.moving - moved)
        counts[asked.last] += 1
        x, started, moved = latents, now, asked.moving
    found: dict[str, object] = {}
    for expert in experts:
        found[f"{expert}_steps"] = counts[expert]
        found[f"{expert}_seconds"] = round(seconds[expert], 2)
    found["moving_seconds"] = round(asked.moving, 2)
    found["sampling_peak_gib"] = round(peak_bytes(device) / GIB, 1)
    return x, found
