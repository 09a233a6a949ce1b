"""Model folders: every mistake is told before weights are read; what loads, loads right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan import checkpoints
from wan.checkpoints import (
    Model,
    ModelError,
    ModelPaths,
    component_hash,
    find_model,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
)
from wan.recognise import Part
from wan.variants import EXPERTS, FOLDER_OF_EXPERT

Break = Callable[[Path], object]
WEIGHTS = "diffusion_pytorch_model.safetensors"
KEPT_IN_FP32 = ("time_embedder", "scale_shift_table", "norm2")


@pytest.fixture
def model(toy_model: Path, tmp_path: Path) -> Path:
    """A copy of the toy model to break."""
    return Path(shutil.copytree(toy_model, tmp_path / "model"))


def find(path: Path, variant_name: str = "tiny") -> Model:
    return find_model(ModelPaths(str(path)), variant_name)


def set_in(file: str, **settings: object) -> Break:
    def change(model: Path) -> None:
        content = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(content | settings))

    return change


def shard(model: Path) -> None:
    """Replace the VAE's weights by the index of two shards, of which only the first is there."""
    weights = model / "vae" / WEIGHTS
    names = list(load_file(weights))
    weight_map = dict.fromkeys(names, "vae-1-of-2.safetensors") | {
        names[0]: "vae-2-of-2.safetensors"
    }
    (model / "vae" / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    weights.rename(model / "vae" / "vae-1-of-2.safetensors")


def without_a_weight(component: str, weights: str = WEIGHTS) -> Break:
    def change(model: Path) -> None:
        tensors = load_file(model / component / weights)
        del tensors[sorted(tensors)[0]]
        save_file(tensors, model / component / weights, {"format": "pt"})

    return change


def cut_short(model: Path) -> None:
    weights = model / "transformer" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])


def git_lfs_pointer(model: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 28577914792\n"
    (model / "transformer" / WEIGHTS).write_text(text)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda m: (m / "model_index.json").write_text("{"), r"model_index.json is not valid JSON"),
        (lambda m: (m / "model_index.json").write_text("[]"), r"holds no settings, but list"),
        (lambda m: (m / "model_index.json").write_bytes(b"\xff"), r"is not valid JSON"),
        (set_in("model_index.json", boundary_ratio=0.9), r"boundary_ratio is 0.9, .* has 0.875"),
        (set_in("model_index.json", boundary_ratio=None), r"boundary_ratio is None, .* has 0.875"),
        (set_in("model_index.json", expand_timesteps=True), r"expand_timesteps is True, .* False"),
        (lambda m: shutil.rmtree(m / "transformer"), r"transformer/config.json is missing"),
        (lambda m: shutil.rmtree(m / "transformer_2"), r"no transformer_2: .* two transformers"),
        (lambda m: shutil.rmtree(m / "vae"), r"vae/config.json is missing; the download"),
        (lambda m: shutil.rmtree(m / "text_encoder"), r"text_encoder/config.json is missing"),
        (lambda m: shutil.rmtree(m / "tokenizer"), r"tokenizer has no tokenizer.json"),
        (lambda m: (m / "vae/config.json").write_text("?"), r"vae/config.json is not valid JSON"),
        (set_in("transformer/config.json", in_channels=36), r"is 36, .* has 16 \(I2V-A14B"),
        (set_in("transformer/config.json", in_channels=48), r"is 48, .* has 16 .*TI2V-5B"),
        (set_in("transformer_2/config.json", image_dim=1280), r"image_dim is 1280, .* Wan 2.1"),
        (set_in("transformer/config.json", added_kv_proj_dim=5120), r"added_kv_proj_dim is 5120"),
        (set_in("transformer/config.json", patch_size=[1, 4, 4]), r"patch_size is \[1, 4, 4\]"),
        (set_in("transformer/config.json", text_dim=4096), r"text_dim is 4096, .* have 32"),
        (set_in("transformer/config.json", num_layers=3), r"num_layers is 3, .* weights have 2"),
        (set_in("transformer/config.json", ffn_dim=64), r"ffn_dim is 64, .* weights have 48"),
        (set_in("vae/config.json", base_dim=8), r"base_dim is 8, .* weights have 4"),
        (set_in("vae/config.json", num_res_blocks=2), r"weights in .*vae.* do not fit .* missing"),
        (set_in("text_encoder/config.json", d_ff=96), r"d_ff is 96, .* weights have 64"),
        (without_a_weight("transformer"), r"transformer.* do not fit .* 1 are missing, such as b"),
        (without_a_weight("vae"), r"vae.* do not fit .* 1 are missing, such as decoder"),
        (
            without_a_weight("text_encoder", "model.safetensors"),
            r"text_encoder.* do not fit .* 1 are missing, such as encoder.block.0",
        ),
        (set_in("vae/config.json", z_dim=48), r"vae/config.json: z_dim is 48, .* has 16"),
        (set_in("vae/config.json", scale_factor_spatial=16), r"scale_factor_spatial is 16"),
        (lambda m: (m / "vae" / WEIGHTS).unlink(), r"vae has no safetensors file; the down"),
        (
            lambda m: (m / "vae" / WEIGHTS).rename(m / "vae" / "diffusion_pytorch_model.bin"),
            r"diffusion_pytorch_model.bin is not read, as it may run code",
        ),
        (shard, r"vae has no vae-2-of-2.safetensors \(1 of 2 shards are missing\); the download"),
        (cut_short, r"transformer/.*safetensors is cut short: it has .* bytes"),
        (git_lfs_pointer, r"transformer/.*safetensors is a Git LFS pointer"),
    ],
)
def test_a_broken_folder_is_told_before_loading(model: Path, break_it: Break, message: str) -> None:
    find(model)
    break_it(model)
    with pytest.raises(ModelError, match=message):
        find(model)


def test_a_missing_path_says_where_models_come_from(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model.path is empty: .*/path/to/Wan2.2-T2V-A14B-Diff"):
        find_model(ModelPaths(""), "t2v_a14b")
    with pytest.raises(ModelError, match=r"model.path=.*nowhere does not exist; .*huggingface.co"):
        find(tmp_path / "nowhere", "t2v_a14b")
    with pytest.raises(ModelError, match=r"does not exist; `make tiny` builds it"):
        find(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"has no high-noise transformer of Wan 2.2 T2V-A14B; the"):
        find(tmp_path, "t2v_a14b")


def test_shards_that_are_all_there_load(model: Path) -> None:
    expected = load_vae(find(model), torch.float32, "cpu").state_dict()
    shard(model)
    tensors = load_file(model / "vae" / "vae-1-of-2.safetensors")
    first = next(iter(tensors))
    save_file(
        {first: tensors.pop(first)}, model / "vae" / "vae-2-of-2.safetensors", {"format": "pt"}
    )
    save_file(tensors, model / "vae" / "vae-1-of-2.safetensors", {"format": "pt"})
    loaded = load_vae(find(model), torch.float32, "cpu").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())


@pytest.mark.usefixtures("no_network")
def test_loading_never_asks_the_network(toy_model: Path) -> None:
    folder = find(toy_model)
    load_everything(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id == 0


def test_each_expert_comes_from_its_own_folder(toy_model: Path) -> None:
    folder = find(toy_model)
    for expert in EXPERTS:
        stored = load_file(toy_model / FOLDER_OF_EXPERT[expert] / WEIGHTS)
        loaded = load_transformer(folder, expert, torch.float32, "cpu").state_dict()
        assert all(torch.equal(loaded[key], weight) for key, weight in stored.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sensitive_parts_stay_in_fp32(toy_model: Path, dtype: torch.dtype) -> None:
    transformer = load_transformer(find(toy_model), "high", dtype, "cpu")
    for name, parameter in transformer.named_parameters():
        kept = any(part in name for part in KEPT_IN_FP32)
        assert parameter.dtype == (torch.float32 if kept else dtype), name


def test_models_are_frozen_and_in_the_dtype_asked_for(model: Path) -> None:
    for name in ("transformer", "transformer_2", "vae"):  # stored as bf16, as published
        file = model / name / WEIGHTS
        save_file({k: w.bfloat16() for k, w in load_file(file).items()}, file, {"format": "pt"})
    folder = find(model)
    for loaded in (
        load_transformer(folder, "high", torch.float32, "cpu"),
        load_vae(folder, torch.float32, "cpu"),
        load_text_encoder(folder, torch.float32, "cpu"),
    ):
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert not loaded.training


def load_everything(model: Model) -> None:
    for expert in EXPERTS:
        load_transformer(model, expert, torch.float32, "cpu")
    load_vae(model, torch.float32, "cpu")
    load_text_encoder(model, torch.float32, "cpu")


def test_an_embedding_of_zeros_is_refused(model: Path) -> None:
    file = model / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"shared.weight": 0 * tensors["shared.weight"]}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"token embedding of .* is all zeros"):
        load_text_encoder(find(model), torch.float32, "cpu")


def test_a_component_s_hash_follows_its_content(model: Path, tmp_path: Path) -> None:
    parts: tuple[Part, ...] = ("vae", "text_encoder", "high", "low")
    before = {part: component_hash(find(model), part) for part in (*parts, "tokenizer")}
    assert len(set(before.values())) == len(before)
    assert all(len(digest) == 16 for digest in before.values())
    moved = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    assert before == {part: component_hash(find(moved), part) for part in (*parts, "tokenizer")}
    set_in("vae/config.json", latents_mean=[0.0] * 16)(model)
    change_byte(model / "transformer" / WEIGHTS, -5_000)
    after = {part: component_hash(find(model), part) for part in (*parts, "tokenizer")}
    assert {part for part in before if before[part] != after[part]} == {"vae", "high"}


def test_a_large_component_is_hashed_by_its_ends(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "HASH_WHOLE_BELOW", 1000)
    monkeypatch.setattr(checkpoints, "HASHED_ENDS", 1000)
    folder = find(model)
    before = component_hash(folder, "vae")
    change_byte(model / "vae" / WEIGHTS, -50_000)
    assert component_hash(folder, "vae") == before
    change_byte(model / "vae" / WEIGHTS, -10)
    assert component_hash(folder, "vae") != before


def change_byte(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
