"""Stage 2 of the embedded model: text encoder and denoiser together, then the two experts.

First one denoiser learns all noise levels together with the text encoder; then each expert starts
from it and continues on its own range of noise levels, drawn by the law of `wan/flow.py`.
"""

import copy
import logging
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue] (a lazy alias)
    UMT5Config,
    UMT5EncoderModel,
)

from tools import tiny_vae, world
from tools.graphed import Trainable, graphed_step
from wan import flow, variants

log = logging.getLogger(__name__)

TEXT_WIDTH = 64
TOKENS = 31  # the longest caption of the world is shorter; more rows of text are all zeros
DROPPED = 0.1  # share of captions replaced by "", for guidance
LAW = flow.TimestepLaw(base="uniform", shift=3.0)
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,-'!?"


@dataclass
class Bank:
    """Encoded clips of the world and three captions of each, by detail."""

    latents: Tensor  # (N, 16, F, 8, 8) bf16, normalised
    tokens: Tensor  # (N, 3, TOKENS)
    mask: Tensor  # (N, 3, TOKENS)


@dataclass(frozen=True)
class TrainingData:
    """All that denoisers learn from: videos, pictures, and the empty caption."""

    videos: Bank
    pictures: Bank
    empty: tuple[Tensor, Tensor]  # tokens and mask of "", each (TOKENS,)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A T5 tokenizer (pad 0, end 1, unknown 2) of the world's words; others are spelled out."""
    everything = [world.SHAPES, world.ACTIONS, world.SETTINGS, world.LIGHTS, world.CAMERAS]
    words = {w for texts in everything for text in texts for w in text.split()}
    words |= set(world.COLOURS) | set(world.PREPOSITION.values()) | {"A", "down"}
    words |= set(world.STYLE.split())
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocabulary += [("▁" + word, -2.0) for word in sorted(words)]
    vocabulary += [(character, -6.0) for character in CHARACTERS]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_ids=0,
        model_max_length=variants.VARIANTS["tiny"].text_len,
    )


def new_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """A UMT5 encoder of 0.1 M parameters."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=16,
        num_heads=4,
        d_ff=128,
        num_layers=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,  # pyright: ignore[reportCallIssue] (hidden by a decorator)
        is_encoder_decoder=False,
        use_cache=False,
    )
    return UMT5EncoderModel(config)


def new_denoiser() -> WanTransformer3DModel:
    """The Wan 2.2 T2V architecture at width 192 with 6 blocks: 3.95 M parameters."""
    return WanTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=768,
        num_layers=6,
    )


def tokens_of(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, each (len(captions), TOKENS)."""
    encoded = tokenizer(
        captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    )
    return encoded["input_ids"], encoded["attention_mask"]


def embed(encoder: UMT5EncoderModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """Text for `merge_pads`: (B, TOKENS + 1, TEXT_WIDTH), zeros after the last token."""
    valid = mask.to(torch.float32)
    # A mask of four dimensions is taken as it is: no look at its values, so it can be captured.
    additive = (1 - valid)[:, None, None, :] * torch.finfo(torch.float32).min / 2
    rows = encoder(input_ids=tokens, attention_mask=additive.expand(-1, -1, tokens.shape[1], -1))[0]
    return F.pad(rows.float() * valid[..., None], (0, 0, 0, 1))


class _MergedPads:
    """Cross-attention to TOKENS rows and one row that stands for all the padding after them.

    Equal rows have equal keys and values, so n of them weigh as one with ln(n) added to its score.
    Exact, and a tenth of the work (wan22.md section 9, item 5).
    """

    def __init__(self, device: torch.device) -> None:
        self.score = torch.zeros(1, 1, 1, TOKENS + 1, device=device)
        self.score[..., -1] = math.log(variants.VARIANTS["tiny"].text_len - TOKENS)

    def __call__(
        self, attn: WanAttention, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: object
    ) -> Tensor:
        query = attn.norm_q(attn.to_q(hidden_states))
        key = attn.norm_k(attn.to_k(encoder_hidden_states))
        value = attn.to_v(encoder_hidden_states)
        query, key, value = (  # (B, heads, L, D)
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.score)
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))


def merge_pads(denoiser: WanTransformer3DModel) -> None:
    """Let a model take text of TOKENS + 1 rows, the last for all padding (for training only)."""
    device = next(denoiser.parameters()).device
    for block in denoiser.blocks:
        attention = block.attn2
        assert isinstance(attention, WanAttention)
        attention.set_processor(_MergedPads(device))  # pyright: ignore[reportArgumentType] (a closed list)


@torch.no_grad()
def fill_bank(
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    clips: int,
    frames: int,
    device: torch.device,
) -> Bank:
    """Render and encode `clips` training clips of that many frames."""
    encoder = tiny_vae.run_whole_clips(copy.deepcopy(vae))
    mean = torch.tensor(vae.config["latents_mean"], device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config["latents_std"], device=device).view(1, -1, 1, 1, 1)
    parts, captions = [], []
    for start in range(0, clips, 512):
        scene = tiny_vae.random_scenes(min(512, clips - start), device)
        if frames == 1:
            scene[:, 5] = 0  # a picture has no camera movement
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents = tiny_vae.encode_whole(encoder, world.render(scene, frames, tiny_vae.SIZE))
        parts.append(((latents.float() - mean) / std).bfloat16())
        for row in scene.tolist():
            made = world.Scene(*(int(x) for x in row[:6]), *row[6:])
            captions += [world.caption(made, detail) for detail in range(3)]
    tokens, mask = tokens_of(tokenizer, captions)
    shape = (clips, 3, TOKENS)
    return Bank(torch.cat(parts), tokens.view(shape).to(device), mask.view(shape).to(device))


def _batch(bank: Bank, empty: tuple[Tensor, Tensor], size: int, sigma: Tensor) -> list[Tensor]:
    """Random clips with one of their captions or none: latents, noise, sigma, tokens, mask."""
    device = bank.latents.device
    item = torch.randint(len(bank.latents), (size,), device=device)
    detail = torch.randint(3, (size,), device=device)
    latents = bank.latents[item].float()
    dropped = (torch.rand(size, device=device) < DROPPED)[:, None]
    tokens = torch.where(dropped, empty[0], bank.tokens[item, detail])
    mask = torch.where(dropped, empty[1], bank.mask[item, detail])
    return [latents, torch.randn_like(latents), sigma.to(device), tokens, mask]


def train_denoiser(
    denoiser: WanTransformer3DModel,
    encoder: UMT5EncoderModel,
    data: TrainingData,
    sigma_range: flow.SigmaRange,
    seconds: float,
    learning_rate: float,
    batch: int,
) -> float:
    """Train on videos (three steps of four) and pictures for `seconds`; the last running loss."""
    merge_pads(denoiser)
    trained_text = any(p.requires_grad for p in encoder.parameters())
    trainable = Trainable([denoiser, encoder] if trained_text else [denoiser], learning_rate, 0.999)

    def loss_of(x0: Tensor, noise: Tensor, sigma: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        text = embed(encoder, tokens, mask)
        noisy = flow.add_noise(x0, noise, sigma)
        predicted = denoiser(noisy, flow.timestep_of(sigma), text, return_dict=False)[0]
        return F.mse_loss(predicted.float(), flow.velocity(x0, noise))

    started, passed, step, running = time.monotonic(), 0.0, 0, 0.0
    steps = {}
    while passed < seconds:
        picture = step % 4 == 3
        trainable.set_progress(passed / seconds)
        u = torch.rand(batch, dtype=torch.float64)
        bank = data.pictures if picture else data.videos
        inputs = _batch(bank, data.empty, batch, LAW.draw(u, sigma_range))
        if picture not in steps:
            steps[picture] = graphed_step(loss_of, inputs, trainable)
        loss = steps[picture](*inputs)
        step += 1
        if step % 25 == 1:
            if not picture:
                running = 0.98 * running + 0.02 * loss.item() if running else loss.item()
            passed = time.monotonic() - started
        if step % 2000 == 1:
            log.warning("  step %d, %.0f s, loss %.4f", step, passed, running)
    trainable.use_average()
    log.warning("denoiser: %d steps of %d, loss %.4f", step, batch, running)
    return running
