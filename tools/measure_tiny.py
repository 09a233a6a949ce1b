"""Measure the embedded model, and what a run's adapters did to it, with a judge instead of eyes.

    python -m tools.measure_tiny                  # the base model: autoencoder, judge, adherence
    python -m tools.measure_tiny outputs/demo     # base beside the adapters of a run
    python -m tools.measure_tiny outputs/demo --prompts 32

Every video is made by the full pipeline: both experts, guidance, the official grid.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tools import tiny_vae, world
from tools.judge import Judge, judge_accuracy, load_judge, verdict
from tools.make_demo_data import HELDOUT, TRIGGER, VIDEOS, zorbi
from wan.checkpoints import ModelPaths, find_model, load_text_encoder, load_tokenizer, load_vae
from wan.experts import Experts, load_experts
from wan.latents import decode_latents
from wan.lora import ADAPTER
from wan.lora_format import SUFFIX_OF_EXPERT, read_adapter
from wan.sample_settings import SampleSettings
from wan.sampler import sample_latents
from wan.strengths import load_adapter
from wan.text import encode_prompts, pad_text
from wan.variants import EXPERTS, TINY_PATH, VARIANTS

BATCH = 16


@dataclass(frozen=True)
class Adherence:
    """Shares of videos in which the judge sees what the prompt says."""

    colour: float
    shape: float
    zorbi_asked: float  # a zorbi is seen where the prompt has the trigger
    zorbi_unasked: float  # ... and where it does not


class Studio:
    """The embedded model, ready to make videos of prompts."""

    def __init__(self, device: torch.device, steps: int | None) -> None:
        self.facts = VARIANTS["tiny"]
        model = find_model(ModelPaths(str(TINY_PATH)), "tiny")
        self.device = device
        self.vae = load_vae(model, torch.float32, device)
        self.experts: Experts = load_experts(model, torch.float32, device)
        self._encoder = load_text_encoder(model, torch.float32, device)
        self._tokenizer = load_tokenizer(model)
        self._settings = SampleSettings(
            steps=steps or self.facts.sample_steps,
            shift=self.facts.sample_shift,
            guidance=self.facts.guidance,
            frames=self.facts.frames,
            height=self.facts.height,
            width=self.facts.width,
        )

    def text(self, prompts: Sequence[str]) -> Tensor:
        """(B, text_len, D)."""
        rows = encode_prompts(prompts, self._tokenizer, self._encoder, self.facts.text_len)
        return pad_text(rows, self.facts.text_len)

    def videos(self, prompts: Sequence[str], name: str) -> Tensor:
        """One video (3, T, H, W) in [-1, 1] for each prompt, seeded by its number."""
        made = []
        for start in tqdm(range(0, len(prompts), BATCH), name, leave=False):
            part = prompts[start : start + BATCH]
            seeds = range(start, start + len(part))
            negative = self.text([self.facts.negative_prompt])
            latents = sample_latents(
                self.experts, self._settings, self.facts, self.text(part), negative, seeds
            )
            made.append(decode_latents(self.vae, latents).cpu())
        return torch.cat(made)


def adherence(studio: Studio, judge: Judge, count: int, name: str) -> Adherence:
    """Render `count` held-out prompts of the world and all zorbi prompts, and judge them."""
    asked = world.scenes(count, seed=5, heldout=True)
    videos = studio.videos([world.caption(scene, 0) for scene in asked], f"{name}: world")
    colour, shape = (p.argmax(-1) for p in verdict(judge, videos))
    wanted = world.scene_tensor(asked)
    concept = studio.videos(zorbi_prompts(), f"{name}: {TRIGGER}")
    _, seen = (p.argmax(-1) for p in verdict(judge, concept))
    return Adherence(
        colour=(colour == wanted[:, 0]).float().mean().item(),
        shape=(shape == wanted[:, 1]).float().mean().item(),
        zorbi_asked=(seen == world.ZORBI).float().mean().item(),
        zorbi_unasked=(shape == world.ZORBI).float().mean().item(),
    )


def zorbi_prompts() -> list[str]:
    """Prompts with the trigger that no clip of the demo shows, one for each such combination."""
    shown = {*VIDEOS, *HELDOUT}
    every = [(a, s, light) for a in range(6) for s in range(4) for light in range(2)]
    scenes = [zorbi(*triple, 0) for triple in every if triple not in shown]
    return [world.caption(scene, 0, TRIGGER) for scene in scenes]


def attach_run(experts: Experts, run: Path) -> list[str]:
    """Put the exported adapters of a run on the experts; the names of the files."""
    found = []
    for expert in EXPERTS:
        for path in sorted(run.glob(f"*{SUFFIX_OF_EXPERT[expert]}.safetensors")):
            load_adapter(experts[expert], read_adapter(path)[0], ADAPTER)
            found.append(path.name)
    if not found:
        raise SystemExit(f"error: {run} holds no adapter files; give the folder of a finished run")
    return found


def describe_base(studio: Studio, judge: Judge, clips: int) -> dict[str, object]:
    """The autoencoder's quality in every frame, and how far the judge can be trusted."""
    psnr = tiny_vae.vae_psnr(studio.vae, clips, studio.device)
    plain = judge_accuracy(judge, None, clips, studio.device)
    through = judge_accuracy(judge, studio.vae, clips, studio.device)
    print(
        f"autoencoder on {clips} held-out clips: {psnr.mean():.2f} dB, worst frame {psnr.min():.2f}"
    )
    for name, figures in (("rendered", plain), ("through the autoencoder", through)):
        print(
            f"judge on {name} held-out clips: colour {figures[0]:.1%}, shape {figures[1]:.1%}, "
            f"{TRIGGER} or not {figures[2]:.1%}"
        )
    return {"psnr_frames": psnr.tolist(), "judge_rendered": plain, "judge_through_vae": through}


def main() -> None:
    """Measure and print; the same figures as JSON on request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", help="folder of a run; none: the base alone")
    parser.add_argument("--prompts", type=int, default=128, help="held-out prompts of the world")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the variant's)")
    parser.add_argument("--only-adapters", action="store_true", help="do not render the base")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    studio, judge = Studio(device, args.steps), load_judge()
    figures: dict[str, object] = {}
    if args.run is None:
        figures |= describe_base(studio, judge.to(device), 64)
    judge = judge.cpu()
    columns: dict[str, Adherence] = {}
    if not args.only_adapters:
        columns["base"] = adherence(studio, judge, args.prompts, "base")
    if args.run is not None:
        print("adapters: " + ", ".join(attach_run(studio.experts, args.run)))
        columns["adapters"] = adherence(studio, judge, args.prompts, "adapters")
    rows = (
        ("colour", f"{args.prompts} held-out world prompts: colour right"),
        ("shape", f"{args.prompts} held-out world prompts: shape right"),
        ("zorbi_unasked", f"{args.prompts} held-out world prompts: a {TRIGGER} is seen"),
        ("zorbi_asked", f"{len(zorbi_prompts())} new {TRIGGER} prompts: a {TRIGGER} is seen"),
    )
    print(f"{'':<52}" + "".join(f"{name:>10}" for name in columns))
    for key, text in rows:
        shares = "".join(f"{getattr(column, key):>10.1%}" for column in columns.values())
        print(f"{text:<52}{shares}")
    figures |= {name: asdict(column) for name, column in columns.items()}
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
