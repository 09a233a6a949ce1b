"""Finding a model in every layout and any mix, and the message of each mistake."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from layouts import (
    WEIGHTS,
    write_comfy,
    write_comfy_transformer,
    write_gguf_transformer,
    write_hub_cache,
    write_official,
    write_sharded_diffusers,
)
from safetensors.torch import load_file, save_file

from wan.checkpoints import Model, ModelError, ModelPaths, find_model
from wan.variants import VARIANTS, Variant

Write = Callable[[Path, Path, Variant], Path]

TOYS = {"t2v_a14b": "toy_t2v_model", "i2v_a14b": "toy_i2v_model", "ti2v_5b": "toy_ti2v_model"}


def hub(source: Path, target: Path, _facts: Variant) -> Path:
    return write_hub_cache(source, target, "Wan-AI/Wan2.2-T2V-A14B-Diffusers")


def official_hub(source: Path, target: Path, facts: Variant) -> Path:
    official = write_official(source, target / "official", facts)
    return write_hub_cache(official, target / "hub", "Wan-AI/Wan2.2-T2V-A14B")


def comfy(source: Path, target: Path, facts: Variant) -> Path:
    shutil.copytree(source / "tokenizer", target / "tokenizer")
    return write_comfy(source, target, facts, "fp8_comfy", "model.diffusion_model.")


def flat(source: Path, target: Path, facts: Variant) -> Path:
    """All files of a ComfyUI `models` folder and a tokenizer.json in one folder."""
    target.mkdir()
    folder = write_comfy(source, target.with_name("unpacked"), facts)
    for file in [*folder.glob("*/*.safetensors"), source / "tokenizer" / "tokenizer.json"]:
        shutil.copyfile(file, target / file.name)
    return target


def gguf(source: Path, target: Path, facts: Variant) -> Path:
    """Quantised experts in folders of their own, the rest as in a diffusers folder."""
    for name in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(source / name, target / name)
    for expert in facts.experts:
        folder = target / {"high": "HighNoise", "low": "LowNoise", "single": "."}[expert]
        folder.mkdir(exist_ok=True)
        subfolder = "transformer_2" if expert == "low" else "transformer"
        write_gguf_transformer(source / subfolder, folder / "Wan2.2-Q4_K.gguf", "Q4_K")
    return target


def sharded(source: Path, target: Path, _facts: Variant) -> Path:
    return write_sharded_diffusers(source, target)


def folder_itself(source: Path, _target: Path, _facts: Variant) -> Path:
    return source


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize(
    "write", [folder_itself, sharded, write_official, hub, official_hub, comfy, flat, gguf]
)
@pytest.mark.usefixtures("no_network")
def test_every_layout_is_found_without_the_network(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    name: str,
    write: Write,
) -> None:
    source: Path = request.getfixturevalue(TOYS[name])
    facts = VARIANTS[name]
    path = write(source, tmp_path / "model", facts)
    model = find(path, name)
    assert set(model.parts) == {*facts.experts, "vae", "text_encoder"}
    assert (model.tokenizer / "tokenizer.json").is_file()
    expected = find(source, name)
    for part, weights in model.parts.items():
        ours, theirs = weights.config, expected.parts[part].config
        assert {n: v for n, v in ours.items() if theirs.get(n, v) != v} == {}
        assert weights.part == part


def find(path: Path | None, variant: str = "t2v_a14b", **places: Path) -> Model:
    text = {name: str(place) for name, place in places.items()}
    return find_model(ModelPaths(None if path is None else str(path), **text), variant)


@pytest.fixture
def files(toy_t2v_model: Path, tmp_path: Path) -> Path:
    """A ComfyUI `models` folder to break."""
    return comfy(toy_t2v_model, tmp_path / "models", VARIANTS["t2v_a14b"])


def experts_of(files: Path) -> tuple[Path, Path]:
    folder = files / "diffusion_models"
    return next(folder.glob("*high*")), next(folder.glob("*low*"))


def test_parts_come_from_where_they_are_named(toy_t2v_model: Path, files: Path) -> None:
    high, low = experts_of(files)
    mixed = find(toy_t2v_model, high=high, vae=files / "vae")
    assert mixed.parts["high"].files == (high,)
    assert mixed.parts["vae"].files[0].parent == files / "vae"
    assert mixed.parts["low"].files == (toy_t2v_model / "transformer_2" / WEIGHTS,)
    parts = {
        "high": high,
        "low": low,
        "vae": toy_t2v_model / "vae" / WEIGHTS,
        "text_encoder": toy_t2v_model,
        "tokenizer": toy_t2v_model / "tokenizer" / "tokenizer.json",
    }
    assert find(None, **parts).parts["low"].storage == "fp8_scaled"
    assert find(None, **parts).tokenizer == toy_t2v_model / "tokenizer"


def test_the_file_of_5b_is_a_path(toy_ti2v_model: Path) -> None:
    vae, text = toy_ti2v_model / "vae", toy_ti2v_model / "text_encoder"
    file = toy_ti2v_model / "transformer" / WEIGHTS
    model = find(file, "ti2v_5b", vae=vae, text_encoder=text)
    assert model.parts["single"].files == (file,)
    assert model.tokenizer == toy_ti2v_model / "tokenizer"
    with pytest.raises(ModelError, match=r"is one file, and model.vae is not set"):
        find(file, "ti2v_5b")
    with pytest.raises(ModelError, match=r"has one transformer: give it as model.path"):
        find(toy_ti2v_model, "ti2v_5b", high=file)


def test_an_expert_is_what_the_user_says_where_no_name_does(files: Path, tmp_path: Path) -> None:
    high, low = experts_of(files)
    (tmp_path / "a").mkdir()
    one, other = tmp_path / "a" / "one.safetensors", tmp_path / "a" / "other.safetensors"
    shutil.move(high, one)
    shutil.move(low, other)
    assert find(files, high=one, low=other).parts["high"].files == (one,)
    shutil.move(one, high.with_name("one.safetensors"))
    shutil.move(other, low.with_name("other.safetensors"))
    with pytest.raises(
        ModelError, match=r"nothing tells whether .*one.* of high or low noise; say"
    ):
        find(files)


def test_one_expert_given_as_the_other_is_refused(toy_t2v_model: Path, files: Path) -> None:
    high, low = experts_of(files)
    with pytest.raises(ModelError, match=r"is the low-noise transformer by its name.* model.low"):
        find(files, high=low, low=high)
    with pytest.raises(ModelError, match=r"is the high-noise transformer by its name"):
        find(files, low=toy_t2v_model / "transformer" / WEIGHTS)
    with pytest.raises(ModelError, match=r"has no high-noise transformer"):
        find(files, high=toy_t2v_model / "transformer_2")


def test_the_same_weights_twice_are_refused(files: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    shutil.copyfile(experts_of(files)[0], file)
    with pytest.raises(ModelError, match=r"hold the same weights, but a model has"):
        find(files, high=file, low=file)
    shutil.copyfile(*experts_of(files))
    with pytest.raises(ModelError, match=r"hold the same weights, but a model has"):
        find(files)


def test_experts_of_two_sizes_are_refused(files: Path, toy_model: Path) -> None:
    with pytest.raises(
        ModelError, match=r"attention_head_dim is 128 in .* they are not the two exp"
    ):
        find(files, low=toy_model)


@pytest.mark.parametrize(
    ("folder", "key"),
    [
        ("diffusion_models", r"2 files can be the high-noise transformer: .*again.*model.high=…"),
        ("vae", r"2 files can be the VAE: .*again.*wan_2.1_vae.*; say which, with model.vae=…"),
        ("text_encoders", r"2 files can be the UMT5 text encoder: .* with model.text_encoder=…"),
    ],
)
def test_nothing_is_chosen_in_silence(files: Path, folder: str, key: str) -> None:
    first = min((files / folder).iterdir())
    shutil.copyfile(first, first.with_name(f"again_{first.name}"))
    with pytest.raises(ModelError, match=key):
        find(files)


def test_a_tokenizer_must_be_somewhere(files: Path) -> None:
    shutil.rmtree(files / "tokenizer")
    with pytest.raises(ModelError, match=r"no tokenizer.json lies in .* set model.tokenizer="):
        find(files)
    with pytest.raises(ModelError, match=r"model.tokenizer=.*vae has no tokenizer.json"):
        find(files, tokenizer=files / "vae")


@pytest.mark.parametrize(
    ("variant", "key", "place", "message"),
    [
        (
            "t2v_a14b",
            "high",
            "i2v/transformer",
            r"in_channels is 36, .* has 16 \(I2V-A14B has 36\)",
        ),
        (
            "i2v_a14b",
            "high",
            "t2v/transformer",
            r"in_channels is 16, .* has 36 \(T2V-A14B has 16\)",
        ),
        ("t2v_a14b", "high", "ti2v/transformer", r"in_channels is 48, .* \(TI2V-5B has 48\)"),
        ("t2v_a14b", "vae", "ti2v/vae", r"z_dim is 48, .* \(it is the Wan 2.2 VAE, of TI2V-5B al"),
        ("ti2v_5b", "vae", "t2v/vae", r"z_dim is 16, .* \(it is the Wan 2.1 VAE, of the A14B"),
        ("t2v_a14b", "high", "t2v/vae", r"holds a VAE, but model.high must name the high-noise"),
        ("t2v_a14b", "vae", "t2v/text_encoder", r"holds a text encoder, but model.vae must name"),
        ("t2v_a14b", "text_encoder", "t2v/vae", r"holds a VAE, but model.text_encoder must name"),
    ],
)
def test_another_part_or_model_is_told(
    request: pytest.FixtureRequest, tmp_path: Path, variant: str, key: str, place: str, message: str
) -> None:
    model, part = place.split("/")
    given: Path = request.getfixturevalue(f"toy_{model}_model")
    file = tmp_path / "file.safetensors"
    shutil.copyfile(next((given / part).glob("*.safetensors")), file)
    with pytest.raises(ModelError, match=message):
        find(request.getfixturevalue(TOYS[variant]), variant, **{key: file})


def test_what_is_called_wan_21_is_refused(files: Path) -> None:
    high, _ = experts_of(files)
    renamed = high.with_name("wan2.1_t2v_high_14B.safetensors")
    high.rename(renamed)
    with pytest.raises(ModelError, match=r"is called Wan 2.1, which cannot be told from Wan 2.2"):
        find(files, high=renamed)
    with pytest.raises(ModelError, match=r"no high-noise transformer of .*: .* is called Wan 2.1"):
        find(files)


def test_a_width_tells_another_size(files: Path, tmp_path: Path) -> None:
    file = tmp_path / "wan_1.3B.safetensors"
    tensors = load_file(experts_of(files)[0])
    prefix = "model.diffusion_model."
    patch = tensors[f"{prefix}patch_embedding.weight"]
    tensors[f"{prefix}patch_embedding.weight"] = patch.repeat(6, 1, 1, 1, 1)  # (1536, 16, 1, 2, 2)
    save_file(tensors, file)
    with pytest.raises(
        ModelError, match=r"is 1536 channels wide, as the 1.3B models of Wan 2.1 are"
    ):
        find(files, high=file)


def test_an_official_config_of_another_model_is_told(toy_t2v_model: Path, tmp_path: Path) -> None:
    folder = write_official(toy_t2v_model, tmp_path / "official", VARIANTS["t2v_a14b"])
    file = folder / "high_noise_model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "i2v"}))
    with pytest.raises(ModelError, match=r"config.json: model_type is 'i2v', but .* has 't2v'"):
        find(folder)


def test_a_missing_shard_is_told(toy_t2v_model: Path, tmp_path: Path) -> None:
    folder = write_official(toy_t2v_model, tmp_path / "official", VARIANTS["t2v_a14b"])
    inner = folder / "low_noise_model"
    (inner / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"low_noise_model has no .*-00002-of-00002.safetensors \(1"
    ):
        find(folder)
    (inner / f"{WEIGHTS}.index.json").unlink()
    with pytest.raises(
        ModelError, match=r"low_noise_model has no .*-00002-of-00002.safetensors \(1"
    ):
        find(folder)
    with pytest.raises(ModelError, match=r"has no .*-00002-of-00002.safetensors \(1 of 2 shards"):
        find(folder, low=inner / "diffusion_pytorch_model-00001-of-00002.safetensors")


def test_a_damaged_file_of_a_folder_is_told(files: Path) -> None:
    file = files / "vae" / "wan_2.1_vae.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"no VAE of .*: .*wan_2.1_vae.safetensors is cut short"):
        find(files)
    file.rename(file.with_suffix(".ckpt"))
    with pytest.raises(ModelError, match=r"no VAE of Wan 2.2 T2V-A14B.*set model.vae=…"):
        find(files)


def test_a_lora_given_as_a_model_is_told(files: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora_high_noise.safetensors"
    tensor = next(iter(load_file(experts_of(files)[0]).values()))
    save_file({"diffusion_model.blocks.0.ffn.0.lora_A.weight": tensor}, lora)
    with pytest.raises(ModelError, match=r"lora_high_noise.* holds a LoRA, not a model"):
        find(files, high=lora)


def test_a_cache_with_two_snapshots_needs_a_mark(toy_t2v_model: Path, tmp_path: Path) -> None:
    folder = write_hub_cache(toy_t2v_model, tmp_path, "Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    (folder / "snapshots" / "older").mkdir()
    assert find(folder).parts["vae"].files[0].is_relative_to(folder / "snapshots")
    (folder / "refs" / "main").unlink()
    with pytest.raises(ModelError, match=r"holds several snapshots or none \(0123.*, older\)"):
        find(folder)
    shutil.rmtree(folder / "snapshots" / "older")
    find(folder)
    next((folder / "blobs").iterdir()).unlink()
    with pytest.raises(ModelError, match="missing"):
        find(folder)


def test_heads_that_shapes_do_not_tell_come_from_a_config(toy_model: Path, tmp_path: Path) -> None:
    folder = write_official(toy_model, tmp_path / "official", VARIANTS["tiny"])
    config = find(folder, "tiny", vae=toy_model).parts["high"].config
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (2, 12)
    file = tmp_path / "high.safetensors"
    write_comfy_transformer(toy_model / "transformer", file)
    with pytest.raises(
        ModelError, match=r"24 channels wide, which does not tell its number of heads"
    ):
        find(folder, "tiny", high=file)
