"""Model folders: every mistake is told before weights are read; what loads, loads right."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan import checkpoints
from wan.checkpoints import (
    ModelError,
    ModelFolder,
    component_hash,
    find_model,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
)
from wan.variants import EXPERTS, FOLDER_OF_EXPERT

Break = Callable[[Path], object]
WEIGHTS = "diffusion_pytorch_model.safetensors"
KEPT_IN_FP32 = ("time_embedder", "scale_shift_table", "norm2")


@pytest.fixture
def model(toy_model: Path, tmp_path: Path) -> Path:
    """A copy of the toy model to break."""
    return Path(shutil.copytree(toy_model, tmp_path / "model"))


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


def cut_short(model: Path) -> None:
    weights = model / "transformer" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])


def git_lfs_pointer(model: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 28577914792\n"
    (model / "transformer" / WEIGHTS).write_text(text)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda m: (m / "model_index.json").unlink(), r"has no model_index.json; `make tiny`"),
        (lambda m: (m / "model_index.json").write_text("{"), r"model_index.json is not valid JSON"),
        (lambda m: (m / "model_index.json").write_text("[]"), r"holds no settings, but list"),
        (lambda m: (m / "model_index.json").write_bytes(b"\xff"), r"is not valid JSON"),
        (set_in("model_index.json", boundary_ratio=0.9), r"boundary_ratio is 0.9, .* has 0.875"),
        (set_in("model_index.json", boundary_ratio=None), r"boundary_ratio is None, .* has 0.875"),
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
        (set_in("transformer/config.json", text_dim=4096), r"text_dim is 4096, .* has 32"),
        (set_in("vae/config.json", z_dim=48), r"vae/config.json: z_dim is 48, .* has 16"),
        (set_in("vae/config.json", scale_factor_spatial=16), r"scale_factor_spatial is 16"),
        (lambda m: (m / "vae" / WEIGHTS).unlink(), r"vae has no diffusion_pytorch_model.safe"),
        (
            lambda m: (m / "vae" / WEIGHTS).rename(m / "vae" / "diffusion_pytorch_model.bin"),
            r"diffusion_pytorch_model.bin is not read, as it may run code",
        ),
        (shard, r"vae has no vae-2-of-2.safetensors; the download is incomplete"),
        (cut_short, r"transformer/.*safetensors cannot be read .* cut short"),
        (git_lfs_pointer, r"transformer/.*safetensors cannot be read .* Git LFS pointer"),
    ],
)
def test_a_broken_folder_is_told_before_loading(model: Path, break_it: Break, message: str) -> None:
    find_model(str(model), "tiny")
    break_it(model)
    with pytest.raises(ModelError, match=message):
        find_model(str(model), "tiny")


def test_a_missing_path_says_where_models_come_from(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"base is empty: .* base=/path/to/Wan2.2-T2V-A14B-Diff"):
        find_model("", "t2v_a14b", key="base")
    with pytest.raises(ModelError, match=r"model.path=.*nowhere does not exist; .*huggingface.co"):
        find_model(str(tmp_path / "nowhere"), "t2v_a14b")
    with pytest.raises(ModelError, match=r"does not exist; `make tiny` builds it"):
        find_model(str(tmp_path / "nowhere"), "tiny")
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is not a folder"):
        find_model(str(tmp_path / "file"), "tiny")
    (tmp_path / "official" / "high_noise_model").mkdir(parents=True)
    with pytest.raises(ModelError, match="the official layout, which is not read yet"):
        find_model(str(tmp_path / "official"), "t2v_a14b")


def test_shards_that_are_all_there_load(model: Path) -> None:
    expected = load_vae(find_model(str(model), "tiny"), torch.float32, "cpu").state_dict()
    shard(model)
    tensors = load_file(model / "vae" / "vae-1-of-2.safetensors")
    first = next(iter(tensors))
    save_file(
        {first: tensors.pop(first)}, model / "vae" / "vae-2-of-2.safetensors", {"format": "pt"}
    )
    save_file(tensors, model / "vae" / "vae-1-of-2.safetensors", {"format": "pt"})
    loaded = load_vae(find_model(str(model), "tiny"), torch.float32, "cpu").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())


def test_loading_never_asks_the_network(toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    folder = find_model(str(toy_model), "tiny")
    load_everything(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id == 0


def test_each_expert_comes_from_its_own_folder(toy_model: Path) -> None:
    folder = find_model(str(toy_model), "tiny")
    for expert in EXPERTS:
        stored = load_file(toy_model / FOLDER_OF_EXPERT[expert] / WEIGHTS)
        loaded = load_transformer(folder, expert, torch.float32, "cpu").state_dict()
        assert all(torch.equal(loaded[key], weight) for key, weight in stored.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sensitive_parts_stay_in_fp32(toy_model: Path, dtype: torch.dtype) -> None:
    transformer = load_transformer(find_model(str(toy_model), "tiny"), "high", dtype, "cpu")
    for name, parameter in transformer.named_parameters():
        kept = any(part in name for part in KEPT_IN_FP32)
        assert parameter.dtype == (torch.float32 if kept else dtype), name


def test_models_are_frozen_and_in_the_dtype_asked_for(model: Path) -> None:
    for name in ("transformer", "transformer_2", "vae"):  # stored as bf16, as published
        file = model / name / WEIGHTS
        save_file({k: w.bfloat16() for k, w in load_file(file).items()}, file, {"format": "pt"})
    folder = find_model(str(model), "tiny")
    for loaded in (
        load_transformer(folder, "high", torch.float32, "cpu"),
        load_vae(folder, torch.float32, "cpu"),
        load_text_encoder(folder, torch.float32, "cpu"),
    ):
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert not loaded.training


def without_a_weight(component: str, weights: str = WEIGHTS) -> Break:
    def change(model: Path) -> None:
        tensors = load_file(model / component / weights)
        del tensors[sorted(tensors)[0]]
        save_file(tensors, model / component / weights, {"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            without_a_weight("transformer"),
            r"transformer do not fit .* 1 are missing, such as blocks",
        ),
        (without_a_weight("vae"), r"vae do not fit .* 1 are missing, such as decoder"),
        (
            without_a_weight("text_encoder", "model.safetensors"),
            r"text_encoder do not fit .* 1 are missing, such as encoder.block.0",
        ),
        (set_in("transformer/config.json", num_layers=1), r"27 are unexpected, such as blocks.1"),
        (set_in("transformer/config.json", num_layers=3), r"27 are missing, such as blocks.2"),
        (set_in("transformer/config.json", ffn_dim=64), r"transformer cannot be loaded .*ffn"),
        (set_in("vae/config.json", base_dim=8), r"vae cannot be loaded"),
        (set_in("text_encoder/config.json", d_ff=96), r"text_encoder cannot be loaded"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(
    model: Path, break_it: Break, message: str
) -> None:
    break_it(model)
    folder = find_model(str(model), "tiny")
    with pytest.raises(ModelError, match=message):
        load_everything(folder)


def load_everything(folder: ModelFolder) -> None:
    for expert in EXPERTS:
        load_transformer(folder, expert, torch.float32, "cpu")
    load_vae(folder, torch.float32, "cpu")
    load_text_encoder(folder, torch.float32, "cpu")


def test_an_embedding_of_zeros_is_refused(model: Path) -> None:
    file = model / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"shared.weight": 0 * tensors["shared.weight"]}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"token embedding of .* is all zeros"):
        load_text_encoder(find_model(str(model), "tiny"), torch.float32, "cpu")


def test_a_component_s_hash_follows_its_content(model: Path) -> None:
    folder = find_model(str(model), "tiny")
    names = ("vae", "text_encoder", "transformer", "transformer_2", "tokenizer")
    before = {name: component_hash(folder, name) for name in names}
    assert len(set(before.values())) == len(names)
    assert all(len(digest) == 16 for digest in before.values())
    set_in("vae/config.json", latents_mean=[0.0] * 16)(model)
    change_byte(model / "transformer" / WEIGHTS, -50_000)
    after = {name: component_hash(folder, name) for name in names}
    assert {name for name in names if before[name] != after[name]} == {"vae", "transformer"}


def test_a_large_component_is_hashed_by_its_ends(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "HASH_WHOLE_BELOW", 1000)
    monkeypatch.setattr(checkpoints, "HASHED_ENDS", 1000)
    folder = find_model(str(model), "tiny")
    before = component_hash(folder, "vae")
    change_byte(model / "vae" / WEIGHTS, -50_000)
    assert component_hash(folder, "vae") == before
    change_byte(model / "vae" / WEIGHTS, -10)
    assert component_hash(folder, "vae") != before


def change_byte(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
