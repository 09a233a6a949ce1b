"""From files as published to the library's classes: names of tensors, arguments of constructors.

Official names (of Wan-Video/Wan2.2, which ComfyUI and GGUF files share) and those of llama.cpp, as
diffusers and transformers call the same tensors. A name without a rule comes back as it is: what
reads the tensors then finds that nothing is called so. Source: `spec/wan22.md` sections 1 and 7.
"""

import re

from wan.adapter_choices import BLOCK_LINEARS
from wan.variants import Variant

EMBEDDING = "shared.weight"  # of the text encoder: the name that stands for both
TIED_EMBEDDING = "encoder.embed_tokens.weight"

_TRANSFORMER_MODULES = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_BLOCK_MODULES = {official: library for library, official in BLOCK_LINEARS.items()} | {
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "norm3": "norm2",  # diffusers counts the norms in the order of the forward pass
    "modulation": "scale_shift_table",
}

# Rules on a part of a VAE's name; those of 2.2 first, whose stages are nested.
_VAE_RULES = (
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (
        r"\.(down|up)samples\.(\d+)\.\1samples\.\d+\.(resample|time_conv)",
        r".\1_blocks.\2.\1sampler.\3",
    ),
    (r"\.(down|up)samples\.(\d+)\.\1samples\.", r".\1_blocks.\2.resnets."),
    (r"\.downsamples\.", ".down_blocks."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)

_TEXT_MODULES = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_LLAMA_TEXT_MODULES = {  # llama.cpp's name -> official name
    "token_embd": "token_embedding",
    "enc.output_norm": "norm",
    "attn_norm": "norm1",
    "ffn_norm": "norm2",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_o": "attn.o",
    "attn_rel_b": "pos_embedding.embedding",
    "ffn_gate": "ffn.gate.0",
    "ffn_up": "ffn.fc1",
    "ffn_down": "ffn.fc2",
}


def library_name(name: str, part: str, naming: str) -> str:
    """The library's name of a tensor of a "vae", a "text_encoder" or else a transformer.

    `naming` is how the file names it: "official", "llama", or as the library does.
    """
    if naming == "llama":
        return text_encoder_name_of_llama(name)
    if naming == "official":
        rules = {"vae": vae_name, "text_encoder": text_encoder_name}
        return rules.get(part, transformer_name)(name)
    return EMBEDDING if name == TIED_EMBEDDING else name


def transformer_name(official: str) -> str:
    """The name in diffusers' WanTransformer3DModel of an official tensor (section 7.3)."""
    block, module, leaf = _split(official)
    modules = _BLOCK_MODULES if block else _TRANSFORMER_MODULES
    return f"{block}{modules.get(module, module)}{leaf}"


def vae_name(official: str) -> str:
    """The name in diffusers' AutoencoderKLWan of an official tensor of either VAE (section 7.4)."""
    for pattern, replacement in _VAE_RULES:
        official = re.sub(pattern, replacement, official)
    found = re.match(r"decoder\.upsamples\.(\d+)", official)
    if not found:
        return official
    stage, place = divmod(int(found[1]), 4)  # VAE 2.1: three residual blocks, then a resampler
    part = "upsamplers.0" if place == 3 else f"resnets.{place}"
    return f"decoder.up_blocks.{stage}.{part}{official[found.end() :]}"


def text_encoder_name(official: str) -> str:
    """The name in transformers' UMT5EncoderModel of an official tensor (section 7.5)."""
    block, module, leaf = _split(official)
    inside = block.replace("blocks.", "encoder.block.")
    return f"{inside}{_TEXT_MODULES.get(module, module)}{leaf}"


def text_encoder_name_of_llama(name: str) -> str:
    """The name in transformers' UMT5EncoderModel of a tensor that llama.cpp's converter wrote."""
    block, module, leaf = _split(name.replace("enc.blk.", "blocks."))
    return text_encoder_name(f"{block}{_LLAMA_TEXT_MODULES.get(module, module)}{leaf}")


def transformer_config(variant: Variant) -> dict[str, object]:
    """The arguments of diffusers' WanTransformer3DModel for a transformer of `variant`."""
    facts, geometry = variant.transformer, variant.geometry
    patch = geometry.multiple // geometry.space_stride
    return {
        "patch_size": (1, patch, patch),
        "num_attention_heads": facts.heads,
        "attention_head_dim": facts.dim // facts.heads,
        "in_channels": variant.in_channels,
        "out_channels": geometry.channels,
        "text_dim": facts.text_dim,
        "freq_dim": facts.freq_dim,
        "ffn_dim": facts.ffn_dim,
        "num_layers": facts.layers,
    }


def vae_config(variant: Variant) -> dict[str, object]:
    """The arguments of diffusers' AutoencoderKLWan for the VAE of `variant`."""
    facts, geometry = variant.vae, variant.geometry
    return {
        "base_dim": facts.base_dim,
        "decoder_base_dim": facts.decoder_base_dim,
        "z_dim": facts.z_dim,
        "is_residual": facts.is_residual,
        "patch_size": facts.patch_size,
        "in_channels": facts.pixel_channels,
        "out_channels": facts.pixel_channels,
        "latents_mean": list(facts.latents_mean),
        "latents_std": list(facts.latents_std),
        "scale_factor_temporal": geometry.time_stride,
        "scale_factor_spatial": geometry.space_stride,
    }


def text_encoder_config() -> dict[str, object]:
    """The arguments of transformers' UMT5Config for UMT5-XXL, which every Wan model uses."""
    return {
        "vocab_size": 256384,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    }


def _split(name: str) -> tuple[str, str, str]:
    """("blocks.3.", "attn.q", ".weight") of blocks.3.attn.q.weight; "" for what is not there."""
    found = re.fullmatch(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", name)
    assert found, "every string matches"
    return found[1] or "", found[2], found[3] or ""
