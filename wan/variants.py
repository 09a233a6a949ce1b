"""Every fact of every Wan 2.2 variant, in one table: the only place where these numbers stand.

Sources: `spec/wan22.md` sections 1 and 2 (official configs of Wan-Video/Wan2.2); for `tiny`,
`tools/make_tiny.py`, which trains it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Expert = Literal["high", "low"]
EXPERTS: tuple[Expert, ...] = ("high", "low")

TRAIN_TIMESTEPS = 1000  # timestep = TRAIN_TIMESTEPS * sigma, in fp32

# diffusers: `transformer` handles t >= boundary (high noise), `transformer_2` the rest (wan22.md,
# trap 1).
FOLDER_OF_EXPERT: dict[Expert, str] = {"high": "transformer", "low": "transformer_2"}

TINY_PATH = Path(__file__).parent / "tiny"

WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance scale of each expert, by name: the official tuple is (low, high)."""

    low: float
    high: float


@dataclass(frozen=True)
class Geometry:
    """How pixels become latents and tokens.

    A video of (T, H, W) pixels becomes latents of (F, h, w) with F = (T - 1) / time_stride + 1,
    h = H / space_stride, and F * h/2 * w/2 tokens. H and W must be multiples of `multiple`.
    """

    time_stride: int
    space_stride: int
    multiple: int
    channels: int

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, F, h, w) of the latents of a video of `frames` x `height` x `width` pixels."""
        if (frames - 1) % self.time_stride or height % self.multiple or width % self.multiple:
            raise ValueError(
                f"a video of {frames} frames of {height}x{width} does not fit the model: frames "
                f"must be {self.time_stride}n+1, height and width multiples of {self.multiple}"
            )
        return (
            self.channels,
            (frames - 1) // self.time_stride + 1,
            height // self.space_stride,
            width // self.space_stride,
        )


@dataclass(frozen=True)
class Variant:
    """One Wan 2.2 model family: what training, sampling and export must know about it."""

    name: str
    title: str
    boundary: float  # sigma at and above which the high-noise expert works
    sample_shift: float
    sample_steps: int
    guidance: Guidance
    fps: int
    frames: int  # frames of a sample by default, 4n+1
    height: int
    width: int
    geometry: Geometry
    text_len: int  # rows of text given to the model: zero-padded, never masked
    negative_prompt: str
    base_model: str  # the exact name in CivitAI's list
    architecture: str  # modelspec.architecture of an adapter


VARIANTS: dict[str, Variant] = {
    "t2v_a14b": Variant(
        name="t2v_a14b",
        title="Wan 2.2 T2V-A14B",
        boundary=0.875,
        sample_shift=12.0,
        sample_steps=40,
        guidance=Guidance(low=3.0, high=4.0),
        fps=16,
        frames=81,
        height=480,
        width=832,
        geometry=Geometry(time_stride=4, space_stride=8, multiple=16, channels=16),
        text_len=512,
        negative_prompt=WAN_NEGATIVE_PROMPT,
        base_model="Wan Video 2.2 T2V-A14B",
        architecture="wan2.2-t2v-a14b/lora",
    ),
    "tiny": Variant(
        name="tiny",
        title="tiny (a Wan 2.2 T2V pair at toy size)",
        boundary=0.875,
        sample_shift=5.0,
        sample_steps=24,
        guidance=Guidance(low=3.0, high=4.0),
        fps=8,
        frames=13,
        height=64,
        width=64,
        geometry=Geometry(time_stride=4, space_stride=8, multiple=16, channels=16),
        text_len=512,
        negative_prompt="",  # trained with dropped captions, not with descriptions of bad video
        base_model="Other",
        architecture="wan2.2-tiny/lora",
    ),
}


def variant(name: str) -> Variant:
    """The facts of the variant called `name`; `ValueError` with the known names otherwise."""
    if name not in VARIANTS:
        raise ValueError(f"no variant is called {name!r}; known: {', '.join(VARIANTS)}")
    return VARIANTS[name]
