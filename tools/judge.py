"""A small classifier that says which colour and shape a picture of the small world shows.

It is how the embedded model is measured: nobody looks at 128 videos. It is trained beside the model
(`tools/make_tiny.py`), on pictures that the model never made, and its own accuracy is stated in
`wan/tiny/README.md`. The shape head has one class more than the world has shapes: the zorbi.
"""

import copy
import dataclasses
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor, nn

from tools import world
from tools.tiny_vae import FRAMES, SIZE, encode_whole, random_scenes, run_whole_clips

WEIGHTS = Path(__file__).parent / "judge.safetensors"
FRAMES_JUDGED = 4  # evenly spread over a clip, without its first frame


class Judge(nn.Module):
    """Frames (B, 3, 64, 64) in [-1, 1] to logits of colour (B, 6) and of shape (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 64)
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(itertools.pairwise(widths)):
            stride = 2 if index < 3 else 1
            layers += [
                nn.Conv2d(before, after, 5 if index < 2 else 3, stride, 2 if index < 2 else 1)
            ]
            layers += [nn.GroupNorm(8, after), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.attention = nn.Conv2d(widths[-1], 1, 1)
        self.colour = nn.Linear(widths[-1], len(world.COLOURS))
        self.shape = nn.Linear(widths[-1], len(world.SHAPES) + 1)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Logits from features pooled where the picture is worth a look."""
        features = self.features(frames)  # (B, D, 8, 8)
        weight = self.attention(features).flatten(2).softmax(-1)
        pooled = (features.flatten(2) * weight).sum(-1)  # (B, D)
        return self.colour(pooled), self.shape(pooled)


def load_judge() -> Judge:
    """The trained judge, on the CPU in fp32."""
    judge = Judge()
    judge.load_state_dict({key: value.float() for key, value in load_file(WEIGHTS).items()})
    return judge.eval()


@torch.no_grad()
def verdict(judge: Judge, videos: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of colour (B, 6) and shape (B, 6) of videos (B, 3, T, 64, 64) in [-1, 1]."""
    frames = videos.shape[2]
    chosen = torch.linspace(1, frames - 1, FRAMES_JUDGED).round().long() if frames > 1 else [0]
    pictures = videos[:, :, chosen].transpose(1, 2).flatten(0, 1)  # (B * n, 3, 64, 64)
    colour, shape = judge(pictures)
    clips = len(videos)
    return (
        colour.view(clips, -1, colour.shape[-1]).mean(1).softmax(-1),
        shape.view(clips, -1, shape.shape[-1]).mean(1).softmax(-1),
    )


def judge_loss(judge: Judge, frames: Tensor, scene: Tensor) -> Tensor:
    """Cross entropy of shape, and of colour except for the zorbi's, which has its own colours."""
    colour, shape = judge(frames)
    has_colour = (scene[:, 1] != world.ZORBI).float()
    colour_loss = F.cross_entropy(colour, scene[:, 0].long(), reduction="none")
    return (colour_loss * has_colour).mean() + F.cross_entropy(shape, scene[:, 1].long())


@torch.no_grad()
def rebuilt_frames(
    vae: AutoencoderKLWan, clips: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Frames (clips * T, 3, 64, 64) that went through the autoencoder, and their scenes (.., 9).

    Half of the clips had noise in their latents: what a denoiser that is not perfect leaves.
    """
    frames, scenes = [], []
    whole = run_whole_clips(copy.deepcopy(vae))
    for _ in range(clips // 8):
        scene = random_scenes(8, device, zorbi=True)
        latents = encode_whole(whole, world.render(scene, FRAMES, SIZE))
        strength = 0.4 * torch.rand(8, 1, 1, 1, 1, device=device) * latents.std()
        strength[::2] = 0
        latents = latents + strength * torch.randn_like(latents)
        videos = whole.decoder(whole.post_quant_conv(latents)).clamp(-1, 1)
        frames.append(videos.transpose(1, 2).flatten(0, 1))
        scenes.append(scene.repeat_interleave(FRAMES, 0))
    return torch.cat(frames), torch.cat(scenes)


def train_judge(vae: AutoencoderKLWan, clips: int, steps: int, device: torch.device) -> Judge:
    """Train on pictures that are rendered and pictures that went through the autoencoder."""
    torch.manual_seed(1)
    judge = Judge().to(device)
    rebuilt, rebuilt_scenes = rebuilt_frames(vae, clips, device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        scene = random_scenes(8, device, zorbi=True)
        drawn = world.render(scene, FRAMES, SIZE).transpose(1, 2).flatten(0, 1)
        chosen = torch.randint(len(rebuilt), (len(drawn),), device=device)
        frames = torch.cat((drawn, rebuilt[chosen]))
        frames = frames + 0.06 * torch.rand((), device=device) * torch.randn_like(frames)
        scenes = torch.cat((scene.repeat_interleave(FRAMES, 0), rebuilt_scenes[chosen]))
        loss = judge_loss(judge, frames, scenes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def judge_accuracy(
    judge: Judge, vae: AutoencoderKLWan | None, clips: int, device: torch.device
) -> tuple[float, float, float]:
    """Share right of (colour, shape, zorbi or not) on held-out scenes; through `vae` if given."""
    plain = world.scenes(clips, seed=77, heldout=True)
    batch = plain + [dataclasses.replace(s, shape=world.ZORBI) for s in plain[: clips // 2]]
    colour_right, shape_right, zorbi_right = 0.0, 0.0, 0.0
    for start in range(0, len(batch), 64):
        scene = world.scene_tensor(batch[start : start + 64], device)
        videos = world.render(scene, FRAMES, SIZE)
        if vae is not None:
            latents = vae.encode(videos, return_dict=False)[0].mode()
            videos = vae.decode(latents, return_dict=False)[0]
        colour, shape = (p.argmax(-1) for p in verdict(judge, videos))
        in_world = scene[:, 1] != world.ZORBI
        colour_right += ((colour == scene[:, 0]) & in_world).sum().item()
        shape_right += ((shape == scene[:, 1]) & in_world).sum().item()
        zorbi_right += ((shape == world.ZORBI) == ~in_world).sum().item()
    return colour_right / clips, shape_right / clips, zorbi_right / len(batch)
