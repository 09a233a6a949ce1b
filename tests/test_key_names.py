"""Names and sizes against those of the published files, at full size, without memory."""

import gzip
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from torch import nn

from wan.key_names import (
    text_encoder_config,
    text_encoder_name,
    text_encoder_name_of_llama,
    transformer_config,
    transformer_name,
    vae_config,
    vae_name,
)
from wan.variants import VARIANTS
from wan.weights import empty_text_encoder, empty_transformer, empty_vae, parameter_count

KEYMAPS = Path(__file__).parent / "fixtures" / "official" / "keymaps"

T2V, I2V, TI2V = (VARIANTS[name] for name in ("t2v_a14b", "i2v_a14b", "ti2v_5b"))

# keymap -> (rule, the library's model at full size, its parameters by spec/wan22.md section 8.1)
PUBLISHED: dict[str, tuple[Callable[[str], str], Callable[[], nn.Module], int]] = {
    "dit_t2v_A14B": (
        transformer_name,
        lambda: empty_transformer(transformer_config(T2V)),
        14_288_491_584,
    ),
    "dit_i2v_A14B": (
        transformer_name,
        lambda: empty_transformer(transformer_config(I2V)),
        14_288_901_184,
    ),
    "dit_ti2v_5B": (
        transformer_name,
        lambda: empty_transformer(transformer_config(TI2V)),
        4_999_787_712,
    ),
    "vae21": (vae_name, lambda: empty_vae(vae_config(T2V)), 126_892_531),
    "vae22": (vae_name, lambda: empty_vae(vae_config(TI2V)), 704_688_668),
    "umt5_xxl": (
        text_encoder_name,
        lambda: empty_text_encoder(text_encoder_config()),
        5_680_910_336,
    ),
}


def keymap(name: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """(official name, library's name, shape) of each tensor of a published file."""
    rows = gzip.decompress((KEYMAPS / f"{name}.tsv.gz").read_bytes()).decode().splitlines()[1:]
    columns = [row.split("\t") for row in rows]
    return [(a, b, tuple(int(size) for size in shape.split("x"))) for a, b, shape in columns]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_tensor_has_its_place_and_shape(name: str) -> None:
    rule, build, parameters = PUBLISHED[name]
    published, model = keymap(name), build()
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    shapes.pop("encoder.embed_tokens.weight", None)  # tied: in no file
    assert [rule(official) for official, _, _ in published] == [ours for _, ours, _ in published]
    assert {rule(official): shape for official, _, shape in published} == shapes
    assert len(published) == len(shapes)  # one to one
    assert parameter_count(model) == parameters
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_llama_cpp_names_are_those_of_its_own_package() -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 24)
    for _, ours, _ in keymap("umt5_xxl"):
        written = names.get_name(ours, try_suffixes=(".weight",))
        assert written
        assert text_encoder_name_of_llama(written) == ours


@pytest.mark.parametrize(
    "rule", [transformer_name, vae_name, text_encoder_name, text_encoder_name_of_llama]
)
@pytest.mark.parametrize(
    "name", ["blocks.0.cross_attn.k_img.weight", "img_emb.proj.0.bias", "", "x"]
)
def test_a_name_without_a_rule_never_takes_the_place_of_another(
    rule: Callable[[str], str], name: str
) -> None:
    places = {ours for key in PUBLISHED for _, ours, _ in keymap(key)}
    assert rule(name) not in places


def test_vae_statistics_and_scales_come_from_the_variant() -> None:
    for variant in (T2V, TI2V):
        config = empty_vae(vae_config(variant)).config
        assert tuple(config["latents_mean"]) == variant.vae.latents_mean
        assert tuple(config["latents_std"]) == variant.vae.latents_std
        assert len(variant.vae.latents_std) == config["z_dim"] == variant.geometry.channels
        assert config["scale_factor_spatial"] == variant.geometry.space_stride
