"""Every layout gives the same model, tensor by tensor, in little memory and off the network."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import layouts
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from quantised import FP8_FLAVOURS
from safetensors.torch import load_file, save_file
from stored_weights import FILE, transformer_weights, weights_of
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from tests.processes import loading_bytes
from wan.headers import ModelError
from wan.latents import decode_latents, encode_video
from wan.recognise import Weights
from wan.text import encode_ids
from wan.variants import VARIANTS
from wan.weights import (
    build_text_encoder,
    build_transformer,
    build_vae,
    empty_transformer,
    parameter_count,
    read_tensors,
)

FIXTURES = Path(__file__).parent / "fixtures"
SLACK = 8 * 2**20  # bytes of memory that are no tensor's
KEPT_IN_FP32 = ("time_embedder", "scale_shift_table", "norm2")
T2V, TI2V = VARIANTS["t2v_a14b"], VARIANTS["ti2v_5b"]
pytestmark = pytest.mark.usefixtures("no_network")


def equal(model: nn.Module, expected: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """The model holds exactly these values, cast once to `dtype` or kept in fp32."""
    state = model.state_dict()
    state.pop("encoder.embed_tokens.weight", None)
    assert state.keys() == expected.keys() - {"encoder.embed_tokens.weight"}
    for name, tensor in state.items():
        is_kept = isinstance(model, WanTransformer3DModel) and any(k in name for k in KEPT_IN_FP32)
        assert tensor.dtype == (torch.float32 if is_kept else dtype), name
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


LAYOUTS = ("diffusers", "official", "fp32", "bf16", "fp16", *FP8_FLAVOURS)
PREFIXED = ("bf16+model.diffusion_model.", "fp8_comfy+diffusion_model.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [*LAYOUTS, *PREFIXED])
def test_a_transformer_is_the_same_in_every_layout(
    toy_t2v_model: Path, tmp_path: Path, layout: str, dtype: torch.dtype
) -> None:
    weights, values = transformer_weights(toy_t2v_model, tmp_path, layout)
    equal(build_transformer(weights, dtype, "cpu"), values, dtype)


def test_a_transformer_of_any_layout_is_the_library_s(toy_ti2v_model: Path, tmp_path: Path) -> None:
    weights, _ = transformer_weights(toy_ti2v_model, tmp_path, "official")
    ours = build_transformer(weights, torch.bfloat16, "cpu")
    library = WanTransformer3DModel.from_pretrained(
        toy_ti2v_model / "transformer", torch_dtype=torch.bfloat16
    ).eval()
    for (name, found), (_, expected) in zip(
        ours.named_buffers(), library.named_buffers(), strict=True
    ):
        assert torch.equal(found, expected), name  # the tables of RoPE: in no file
        assert found.dtype == expected.dtype, name
    x = torch.randn(1, 48, 2, 4, 4, dtype=torch.bfloat16)
    text, t = torch.randn(1, 8, 32, dtype=torch.bfloat16), torch.tensor([625.0])
    with torch.no_grad():
        assert torch.equal(ours(x, t, text)[0], library(x, t, text)[0])


@pytest.mark.parametrize("model", ["toy_t2v_model", "toy_ti2v_model"])
@pytest.mark.parametrize("layout", ["diffusers", "pth", "safetensors"])
def test_a_vae_is_the_same_in_every_layout(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, layout: str
) -> None:
    folder = request.getfixturevalue(model) / "vae"
    values = load_file(folder / FILE)
    file, naming = folder / FILE, "diffusers"
    if layout != "diffusers":
        file, naming = tmp_path / f"vae.{layout}", "official"
        save = torch.save if layout == "pth" else save_file
        save(layouts.official_vae(values), file)
    weights = weights_of("vae", file, naming, folder / "config.json")
    for dtype in (torch.float32, torch.bfloat16):
        equal(build_vae(weights, dtype, "cpu"), values, dtype)


TEXT_LAYOUTS = ("transformers", "shards", "pth", "kijai", "fp16", "bf16", *FP8_FLAVOURS)


@pytest.mark.parametrize("layout", TEXT_LAYOUTS)
def test_a_text_encoder_is_the_same_in_every_layout(
    toy_t2v_model: Path, tmp_path: Path, layout: str
) -> None:
    folder = toy_t2v_model / "text_encoder"
    values, files, naming = load_file(folder / "model.safetensors"), tmp_path / "file", "official"
    if layout in ("transformers", "shards"):
        naming = "transformers"
        layouts.write_shards(values, tmp_path, "model.safetensors")
        shards = list(tmp_path.glob("*.safetensors"))
        files = shards if layout == "shards" else folder / "model.safetensors"
    elif layout == "pth":
        torch.save(layouts.official_text_encoder(values), files := tmp_path / "umt5.pth")
    elif layout == "kijai":
        save_file(layouts.official_text_encoder(values), files)
    else:
        naming, values = (
            "transformers",
            layouts.write_comfy_text_encoder(toy_t2v_model, files, layout),
        )
    weights = weights_of("text_encoder", files, naming, folder / "config.json")
    for dtype in (torch.float32, torch.bfloat16):
        encoder = build_text_encoder(weights, dtype, "cpu")
        equal(encoder, values, dtype)
        assert encoder.encoder.embed_tokens.weight is encoder.shared.weight


def test_a_text_encoder_keeps_in_fp32_what_overflows_in_fp16(toy_t2v_model: Path) -> None:
    folder = toy_t2v_model / "text_encoder"
    weights = weights_of(
        "text_encoder", folder / "model.safetensors", "transformers", folder / "config.json"
    )
    ours = build_text_encoder(weights, torch.float16, "cpu")
    library = UMT5EncoderModel.from_pretrained(folder, dtype=torch.float16)
    expected = {name: p.dtype for name, p in library.named_parameters()}
    assert {name: p.dtype for name, p in ours.named_parameters()} == expected
    assert set(expected.values()) == {torch.float16, torch.float32}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", ["vae21", "vae22"])
def test_the_official_vae_computes_what_the_official_code_does(
    tmp_path: Path, name: str, suffix: str
) -> None:
    source = FIXTURES / ("official" if name == "vae22" else "")
    stored, recorded = (
        load_file(source / f"{name}_{kind}.safetensors") for kind in ("weights_official", "io")
    )
    file = tmp_path / f"vae.{suffix}"
    (torch.save if suffix == "pth" else save_file)(stored, file)
    # The fixtures normalise with figures of their own: they must come from the config.
    config: dict[str, object] = {"base_dim": 8}
    config |= {f"latents_{k}": recorded[k].tolist() for k in ("mean", "std")}
    if name == "vae22":
        config |= {"decoder_base_dim": 8, "z_dim": 48, "is_residual": True, "patch_size": 2}
        config |= {"in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    vae = build_vae(Weights("vae", (file,), "official", "", "fp32", config), torch.float32, "cpu")
    for frames in (1, 5, 9):
        latents = encode_video(vae, recorded[f"video_T{frames}"])
        assert relative(latents, recorded[f"latent_T{frames}"]) < 1e-5
        decoded = decode_latents(vae, recorded[f"latent_T{frames}"])
        assert relative(decoded, recorded[f"decoded_T{frames}"]) < 1e-5


def test_the_official_text_encoder_computes_what_the_official_code_does(tmp_path: Path) -> None:
    file = tmp_path / "umt5.pth"
    torch.save(load_file(FIXTURES / "umt5_weights_official.safetensors"), file)
    config: dict[str, object] = {
        "vocab_size": 1000,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 160,
        "num_layers": 3,
    }
    config |= {"num_heads": 4, "feed_forward_proj": "gated-gelu"}
    weights = Weights("text_encoder", (file,), "official", "", "fp32", config)
    encoder = build_text_encoder(weights, torch.float32, "cpu")
    recorded = load_file(FIXTURES / "umt5_io.safetensors")
    for ids, mask, out in zip(recorded["ids"], recorded["mask"], recorded["out"], strict=True):
        valid = int(mask.sum())
        assert relative(encode_ids(ids[:valid], encoder), out[:valid]) < 1e-5


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("head.head.bias"),
            r"file.safetensors do not fit .* 1 are missing, such as",
        ),
        (lambda t: t.update(img_emb=torch.ones(2)), r"1 are unexpected, such as img_emb"),
        (
            lambda t: t.update({"head.modulation": torch.ones(1, 2, 7)}),
            r"file.safetensors cannot be loaded: scale_shift_table has the shape \(1, 2, 7\), its",
        ),
        (
            lambda t: t.update({"blocks.0.ffn.0.scale_weight": torch.ones(7)}),
            r"blocks.0.ffn.0.weight cannot be made whole \(a scale \(7,\) does not fit a weight",
        ),
        (
            lambda t: t.update({"blocks.0.ffn.0.weight": torch.ones(512, 128, dtype=torch.uint8)}),
            r"blocks.0.ffn.0.weight is stored as torch.uint8, a quantisation that is not read",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    toy_t2v_model: Path, tmp_path: Path, change: Change, message: str
) -> None:
    weights, _ = transformer_weights(toy_t2v_model, tmp_path, "bf16")
    tensors = load_file(weights.files[0])
    change(tensors)
    save_file(tensors, weights.files[0])
    with pytest.raises(ModelError, match=message):
        build_transformer(weights, torch.bfloat16, "cpu")


def test_a_file_that_cannot_be_read_is_named(toy_t2v_model: Path, tmp_path: Path) -> None:
    folder, cut = toy_t2v_model / "vae", tmp_path / "cut.safetensors"
    cut.write_bytes((folder / FILE).read_bytes()[:-10])
    layouts.write_gguf_transformer(toy_t2v_model / "transformer", whole := tmp_path / "gguf")
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:-10_000])
    for file in (
        cut,
        tmp_path / "cut.gguf",
        tmp_path / "missing.safetensors",
        tmp_path / "missing.pth",
    ):
        with pytest.raises(ModelError, match=f"{file.name} cannot be read"):
            build_vae(
                weights_of("vae", file, "diffusers", folder / "config.json"), torch.float32, "cpu"
            )


def test_a_model_outlives_its_file(toy_t2v_model: Path, tmp_path: Path) -> None:
    weights, values = transformer_weights(toy_t2v_model, tmp_path, "fp32")
    model = build_transformer(weights, torch.float32, "cpu")
    content = weights.files[0].read_bytes()
    with weights.files[0].open("r+b") as file:  # overwritten in place
        file.write(bytes(len(content)))
    equal(model, values, torch.float32)


def test_tensors_are_counted_and_read_one_at_a_time(toy_ti2v_model: Path, tmp_path: Path) -> None:
    weights, values = transformer_weights(toy_ti2v_model, tmp_path, "fp8_musubi_blocks")
    assert parameter_count(weights) == sum(tensor.numel() for tensor in values.values())
    read = dict(read_tensors(weights))
    assert read.keys() == values.keys()
    assert all(torch.equal(read[name].float(), values[name]) for name in values)


def test_loading_takes_little_more_than_the_finished_model(tmp_path: Path) -> None:
    """300 MB of fp32 in four shards into bf16, in a process of its own: one tensor more."""
    config = {"num_attention_heads": 8, "num_layers": 4, "ffn_dim": 4096, "text_dim": 512}
    shapes = {name: t.shape for name, t in empty_transformer(config).state_dict().items()}
    files = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for i, file in enumerate(files):
        save_file({name: torch.ones(shapes[name]) for name in list(shapes)[i::4]}, file)
    assert sum(file.stat().st_size for file in files) > 2.5e8
    weights = Weights("high", tuple(files), "diffusers", "", "fp32", config)
    beside, _ = loading_bytes(partial(build_transformer, weights, torch.bfloat16, "cpu"))
    tensor = 4 * max(shape.numel() for shape in shapes.values())
    shard = max(file.stat().st_size for file in files)
    assert beside < 1.2 * tensor + SLACK < 0.5 * shard
