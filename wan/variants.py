"""Every fact of every Wan 2.2 variant, in one table: the only place where these numbers stand.

Sources: `spec/wan22.md` sections 1 and 2 (official configs of Wan-Video/Wan2.2); for `tiny`,
`tools/make_tiny.py`, which trains it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Expert = Literal["high", "low", "single"]  # "single": the one transformer of TI2V-5B
EXPERTS: tuple[Expert, ...] = ("high", "low")  # of a model that has two

# What a model is given beside noise and text: nothing; an image in further channels of its input
# (I2V-A14B); or an image as the clean first latent frame (TI2V-5B, which also works without).
Conditioning = Literal["none", "channels", "first_frame"]

TRAIN_TIMESTEPS = 1000  # timestep = TRAIN_TIMESTEPS * sigma, in fp32

# diffusers: `transformer` handles t >= boundary (high noise), `transformer_2` the rest (wan22.md,
# trap 1).
FOLDER_OF_EXPERT: dict[Expert, str] = {
    "high": "transformer",
    "low": "transformer_2",
    "single": "transformer",
}

TINY_PATH = Path(__file__).parent / "tiny"

WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance scale of each expert, by name: the official tuple is (low, high)."""

    low: float  # also that of a single transformer
    high: float

    def of(self, expert: Expert) -> float:
        """The scale of one expert."""
        return self.high if expert == "high" else self.low


@dataclass(frozen=True)
class TransformerFacts:
    """The size of one transformer, as published (wan22.md section 1.1)."""

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    text_dim: int
    freq_dim: int


@dataclass(frozen=True)
class VaeFacts:
    """How a VAE is built, in the words of diffusers' AutoencoderKLWan (sections 1.3 and 1.4)."""

    name: str
    base_dim: int
    decoder_base_dim: int | None
    z_dim: int
    is_residual: bool
    patch_size: int | None
    pixel_channels: int  # after the patchify
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]


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
    experts: tuple[Expert, ...]
    boundary: float | None  # sigma at and above which the high-noise expert works; None for one
    conditioning: Conditioning
    transformer: TransformerFacts  # of each expert
    vae: VaeFacts
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

    @property
    def in_channels(self) -> int:
        """Channels of a transformer's input: noise, and for I2V-A14B a mask and the image."""
        latents = self.geometry.channels
        given = self.geometry.time_stride + latents if self.conditioning == "channels" else 0
        return latents + given


A14B = TransformerFacts(dim=5120, ffn_dim=13824, heads=40, layers=40, text_dim=4096, freq_dim=256)
TI2V_5B = TransformerFacts(
    dim=3072, ffn_dim=14336, heads=24, layers=30, text_dim=4096, freq_dim=256
)
TINY = TransformerFacts(dim=192, ffn_dim=768, heads=6, layers=6, text_dim=64, freq_dim=256)

VAE_21 = VaeFacts(
    name="Wan 2.1 VAE",
    base_dim=96,
    decoder_base_dim=None,
    z_dim=16,
    is_residual=False,
    patch_size=None,
    pixel_channels=3,
    latents_mean=(
        -0.7571,
        -0.7089,
        -0.9113,
        0.1075,
        -0.1745,
        0.9653,
        -0.1517,
        1.5508,
        0.4134,
        -0.0715,
        0.5517,
        -0.3632,
        -0.1922,
        -0.9497,
        0.2503,
        -0.2921,
    ),
    latents_std=(
        2.8184,
        1.4541,
        2.3275,
        2.6558,
        1.2196,
        1.7708,
        2.6052,
        2.0743,
        3.2687,
        2.1526,
        2.8652,
        1.5579,
        1.6382,
        1.1253,
        2.8251,
        1.9160,
    ),
)
VAE_22 = VaeFacts(
    name="Wan 2.2 VAE",
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    is_residual=True,
    patch_size=2,
    pixel_channels=12,
    latents_mean=(
        -0.2289,
        -0.0052,
        -0.1323,
        -0.2339,
        -0.2799,
        0.0174,
        0.1838,
        0.1557,
        -0.1382,
        0.0542,
        0.2813,
        0.0891,
        0.1570,
        -0.0098,
        0.0375,
        -0.1825,
        -0.2246,
        -0.1207,
        -0.0698,
        0.5109,
        0.2665,
        -0.2108,
        -0.2158,
        0.2502,
        -0.2055,
        -0.0322,
        0.1109,
        0.1567,
        -0.0729,
        0.0899,
        -0.2799,
        -0.1230,
        -0.0313,
        -0.1649,
        0.0117,
        0.0723,
        -0.2839,
        -0.2083,
        -0.0520,
        0.3748,
        0.0152,
        0.1957,
        0.1433,
        -0.2944,
        0.3573,
        -0.0548,
        -0.1681,
        -0.0667,
    ),
    latents_std=(
        0.4765,
        1.0364,
        0.4514,
        1.1677,
        0.5313,
        0.4990,
        0.4818,
        0.5013,
        0.8158,
        1.0344,
        0.5894,
        1.0901,
        0.6885,
        0.6165,
        0.8454,
        0.4978,
        0.5759,
        0.3523,
        0.7135,
        0.6804,
        0.5833,
        1.4146,
        0.8986,
        0.5659,
        0.7069,
        0.5338,
        0.4889,
        0.4917,
        0.4069,
        0.4999,
        0.6866,
        0.4093,
        0.5709,
        0.6065,
        0.6415,
        0.4944,
        0.5726,
        1.2042,
        0.5458,
        1.6887,
        0.3971,
        1.0600,
        0.3943,
        0.5537,
        0.5444,
        0.4089,
        0.7468,
        0.7744,
    ),
)

VARIANTS: dict[str, Variant] = {
    "t2v_a14b": Variant(
        name="t2v_a14b",
        title="Wan 2.2 T2V-A14B",
        experts=EXPERTS,
        boundary=0.875,
        conditioning="none",
        transformer=A14B,
        vae=VAE_21,
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
    "i2v_a14b": Variant(
        name="i2v_a14b",
        title="Wan 2.2 I2V-A14B",
        experts=EXPERTS,
        boundary=0.9,
        conditioning="channels",
        transformer=A14B,
        vae=VAE_21,
        sample_shift=5.0,
        sample_steps=40,
        guidance=Guidance(low=3.5, high=3.5),
        fps=16,
        frames=81,
        height=480,
        width=832,
        geometry=Geometry(time_stride=4, space_stride=8, multiple=16, channels=16),
        text_len=512,
        negative_prompt=WAN_NEGATIVE_PROMPT,
        base_model="Wan Video 2.2 I2V-A14B",
        architecture="wan2.2-i2v-a14b/lora",
    ),
    "ti2v_5b": Variant(
        name="ti2v_5b",
        title="Wan 2.2 TI2V-5B",
        experts=("single",),
        boundary=None,
        conditioning="first_frame",
        transformer=TI2V_5B,
        vae=VAE_22,
        sample_shift=5.0,
        sample_steps=50,
        guidance=Guidance(low=5.0, high=5.0),
        fps=24,
        frames=121,
        height=704,
        width=1280,
        geometry=Geometry(time_stride=4, space_stride=16, multiple=32, channels=48),
        text_len=512,
        negative_prompt=WAN_NEGATIVE_PROMPT,
        base_model="Wan Video 2.2 TI2V-5B",
        architecture="wan-2_2-ti2v-5b/lora",  # the one name that SwarmUI knows it by
    ),
    "tiny": Variant(
        name="tiny",
        title="tiny (a Wan 2.2 T2V pair at toy size)",
        experts=EXPERTS,
        boundary=0.875,
        conditioning="none",
        transformer=TINY,
        vae=VAE_21,  # but for its base_dim
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
