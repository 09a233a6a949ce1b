"""The settings of a model's part, told from the shapes of its tensors.

A single file brings no config.json, and one that lies beside it may be another's: what the shapes
say holds. The rest (strides, latent statistics) is the variant's (`spec/wan22.md` section 1).
"""

from collections.abc import Mapping

from wan.headers import ModelError
from wan.key_names import text_encoder_config, transformer_config, vae_config
from wan.recognise import Found, Shapes
from wan.variants import Variant

HEAD_DIM = 128  # of every published Wan
STAGES_WIDEST = 4  # a VAE's widest stage is that many times its base_dim

Settings = dict[str, object]


def settings_of_shapes(found: Found, variant: Variant, heads: int | None = None) -> Settings:
    """What the shapes alone say, in the words of the library's config.

    `heads` of a transformer, if a config tells; otherwise those of the variant, or of 128 channels
    each. `ModelError` if a tensor that tells is missing.
    """
    try:
        if found.kind == "vae":
            return _vae(found.shapes)
        if found.kind == "text_encoder":
            return _text_encoder(found.shapes)
        return _transformer(found, variant, heads)
    except ModelError:
        raise
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(
            f"{found.place} has no usable {error}: the download is incomplete; download it again"
        ) from None


def config_of_shapes(found: Found, variant: Variant, heads: int | None = None) -> Settings:
    """All arguments of the library's class for a part that has no config of its own."""
    settings = settings_of_shapes(found, variant, heads)
    if found.kind == "vae":
        return vae_config(variant) | settings
    if found.kind == "text_encoder":
        return text_encoder_config() | settings
    return transformer_config(variant) | settings


def contradiction(config: Mapping[str, object], settings: Settings) -> str | None:
    """The first setting that a config gives otherwise than the shapes do; None if they agree."""
    for name, value in settings.items():
        given = config.get(name, value)
        if given != value:
            return name
    return None


def _transformer(found: Found, variant: Variant, heads: int | None) -> Settings:
    shapes = found.shapes
    dim, in_channels, *patch = shapes["patch_embedding.weight"]  # (dim, C, 1, 2, 2)
    if heads is None:
        known = variant.transformer
        heads = known.heads if dim == known.dim else dim // HEAD_DIM
    if not heads or dim % heads:
        raise ModelError(
            f"{found.place} is {dim} channels wide, which does not tell its number of heads; give "
            "the model's folder, with its config.json"
        )
    return {
        "patch_size": patch,
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // (patch[0] * patch[1] * patch[2]),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": _count(shapes, "blocks."),
    }


def _vae(shapes: Shapes) -> Settings:
    base, pixel_channels, *_ = shapes["encoder.conv_in.weight"]  # (C, 3 or 12, 3, 3, 3)
    decoder_base = shapes["decoder.conv_in.weight"][0] // STAGES_WIDEST
    return {
        "base_dim": base,
        "decoder_base_dim": decoder_base if decoder_base != base else None,
        "z_dim": shapes["post_quant_conv.weight"][0],
        "is_residual": any(name.startswith("encoder.down_blocks.0.resnets.") for name in shapes),
        "in_channels": pixel_channels,
        "out_channels": shapes["decoder.conv_out.weight"][0],
    }


def _text_encoder(shapes: Shapes) -> Settings:
    vocabulary, width = shapes["shared.weight"]
    attention = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = shapes[f"{attention}relative_attention_bias.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[f"{attention}q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": _count(shapes, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def _count(shapes: Shapes, prefix: str) -> int:
    """How many blocks there are: the largest number after `prefix`, and one."""
    places = (name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix))
    return 1 + max(int(place) for place in places)
