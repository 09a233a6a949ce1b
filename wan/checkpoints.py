"""Find, check and load a model: every mistake is told before a single weight is read.

The layout is that of diffusers' folders (`spec/wan22.md` section 7.2). Nothing here ever asks the
network.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from wan.variants import FOLDER_OF_EXPERT, TINY_PATH, Expert, Variant, variant

WEIGHTS_OF_COMPONENT = {
    FOLDER_OF_EXPERT["high"]: "diffusion_pytorch_model.safetensors",
    FOLDER_OF_EXPERT["low"]: "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
INCOMPLETE = "the download is incomplete: download the model again"
HINT_OF_SETTING = {
    "in_channels": "I2V-A14B and TI2V-5B have more channels",
    "image_dim": "the image-to-video models of Wan 2.1 have it",
    "added_kv_proj_dim": "the image-to-video models of Wan 2.1 have it",
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
HASH_WHOLE_BELOW = 256 * 2**20  # bytes
HASHED_ENDS = 2**20  # bytes at either end of a larger file

Model = TypeVar("Model", WanTransformer3DModel, AutoencoderKLWan, UMT5EncoderModel)


class ModelError(ValueError):
    """A model that cannot be used: the message says which file, what it holds and what to do."""


@dataclass(frozen=True)
class ModelFolder:
    """A folder that `find_model` has checked: it holds a whole model of this variant."""

    path: Path
    variant: Variant


def find_model(path: str, variant_name: str, key: str = "model.path") -> ModelFolder:
    """The model in the folder `path`, checked down to the headers of its weight files.

    `ModelError` if there is none, if it is incomplete or of another kind; `key` is the config key
    that the message asks to set.
    """
    folder = ModelFolder(Path(path).expanduser(), variant(variant_name))
    remedy = _remedy(folder.variant, key)
    if not path.strip():
        raise ModelError(f"{key} is empty: it must name the model's folder; {remedy}")
    if not folder.path.is_dir():
        found = "is not a folder" if folder.path.exists() else "does not exist"
        raise ModelError(f"{key}={path} {found}; {remedy}")
    if not (folder.path / "model_index.json").is_file():
        official = (folder.path / "high_noise_model").is_dir()
        layout = " (this is the official layout, which is not read yet)" if official else ""
        raise ModelError(f"{key}={path} has no model_index.json{layout}; {remedy}")
    for component in [*FOLDER_OF_EXPERT.values(), "vae"]:
        _check_config(folder, component)
    _check_boundary(folder)
    for component, weights in WEIGHTS_OF_COMPONENT.items():
        _check_weights(folder.path / component, weights)
    if not (folder.path / "tokenizer" / "tokenizer.json").is_file():
        raise ModelError(f"{folder.path / 'tokenizer'} has no tokenizer.json; {INCOMPLETE}")
    return folder


def load_transformer(
    folder: ModelFolder, expert: Expert, dtype: torch.dtype, device: torch.device | str
) -> WanTransformer3DModel:
    """The frozen transformer of an expert, in `dtype` but for what diffusers keeps in fp32."""
    return _load(WanTransformer3DModel, folder, FOLDER_OF_EXPERT[expert], dtype, device)


def load_vae(
    folder: ModelFolder, dtype: torch.dtype, device: torch.device | str
) -> AutoencoderKLWan:
    """The frozen VAE; fp32 is the official dtype."""
    return _load(AutoencoderKLWan, folder, "vae", dtype, device)


def load_text_encoder(
    folder: ModelFolder, dtype: torch.dtype, device: torch.device | str
) -> UMT5EncoderModel:
    """The frozen text encoder; `ModelError` if its token embedding came out as zeros.

    Some versions of transformers 5 leave it so (wan22.md, trap 20), and every prompt is then equal.
    """
    encoder = _load(UMT5EncoderModel, folder, "text_encoder", dtype, device)
    if not encoder.encoder.embed_tokens.weight.any():
        raise ModelError(
            f"the token embedding of {folder.path / 'text_encoder'} is all zeros after loading: "
            "the installed transformers cannot load it, or the file is damaged; install the "
            "version that the constraints file names"
        )
    return encoder


def load_tokenizer(folder: ModelFolder) -> PreTrainedTokenizerFast:
    """The tokenizer exactly as its tokenizer.json says, whatever class the config names."""
    return PreTrainedTokenizerFast.from_pretrained(folder.path / "tokenizer", local_files_only=True)


def component_hash(folder: ModelFolder, name: str) -> str:
    """16 hex digits that change when the component (a subfolder such as "vae") does.

    sha256 over the names and contents of its .json and .safetensors files. Hashing 28 GB is slow,
    so if the weights exceed 256 MiB together, a weight file counts with its size and its first and
    last MiB only.
    """
    content = (folder.path / name).iterdir()
    files = sorted(file for file in content if file.suffix in (".json", ".safetensors"))
    whole = sum(file.stat().st_size for file in files) <= HASH_WHOLE_BELOW
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            if whole or file.suffix == ".json":
                digest.update(stream.read())
            else:
                digest.update(stream.read(HASHED_ENDS))
                stream.seek(max(0, file.stat().st_size - HASHED_ENDS))
                digest.update(stream.read())
    return digest.hexdigest()[:16]


def _load(
    model_class: type[Model],
    folder: ModelFolder,
    component: str,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Model:
    """A component as its library loads it, refused unless the files hold exactly its weights."""
    path = folder.path / component
    try:
        loaded = model_class.from_pretrained(
            path, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (ValueError, RuntimeError) as error:  # both libraries, for a weight of another shape
        raise ModelError(f"{path} cannot be loaded ({error}); {INCOMPLETE}") from error
    model, report = cast("tuple[Model, dict[str, list[object]]]", loaded)
    for finding in ("missing", "unexpected", "mismatched"):
        if names := sorted(map(str, report[f"{finding}_keys"])):
            raise ModelError(
                f"the weights in {path} do not fit its config.json: {len(names)} are {finding}, "
                f"such as {names[0]}; {INCOMPLETE}"
            )
    model.to(device)  # pyright: ignore[reportArgumentType] (the libraries' decorators hide its type)
    return model.eval().requires_grad_(False)


def _remedy(variant: Variant, key: str) -> str:
    if variant.name == "tiny":
        return f"`make tiny` builds it in {TINY_PATH}; set {key}={TINY_PATH}"
    return (
        f"download the diffusers folder of {variant.title} from huggingface.co/Wan-AI (its name "
        f"ends in -Diffusers) and set {key}, such as {key}=/path/to/Wan2.2-T2V-A14B-Diffusers"
    )


def _read_json(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(f"{file} is missing; {INCOMPLETE}") from None
    except ValueError as error:  # not JSON or not text
        raise ModelError(f"{file} is not valid JSON ({error}); {INCOMPLETE}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no settings, but {type(content).__name__}; {INCOMPLETE}")
    return content


def _check_config(folder: ModelFolder, component: str) -> None:
    """A transformer or the VAE must be built as the variant's is."""
    path, title = folder.path / component, folder.variant.title
    if component == FOLDER_OF_EXPERT["low"] and not path.is_dir():
        raise ModelError(
            f"{folder.path} has no {component}: {title} consists of two transformers, this model "
            "of one (as those of Wan 2.1 and TI2V-5B do); give a folder that holds both"
        )
    config = _read_json(path / "config.json")
    expected = _vae_settings if component == "vae" else _transformer_settings
    for setting, value in expected(folder).items():
        # A setting that the config leaves out has the library's default, which is Wan's.
        if config.get(setting, value) != value:
            hint = f" ({HINT_OF_SETTING[setting]})" if setting in HINT_OF_SETTING else ""
            raise ModelError(
                f"{path / 'config.json'}: {setting} is {config[setting]}, but {title} has "
                f"{value}{hint}: this is another model; give the folder of {title}"
            )


def _transformer_settings(folder: ModelFolder) -> dict[str, object]:
    geometry = folder.variant.geometry
    patch = geometry.multiple // geometry.space_stride
    return {
        "in_channels": geometry.channels,
        "out_channels": geometry.channels,
        "patch_size": [1, patch, patch],
        "image_dim": None,
        "added_kv_proj_dim": None,
        "text_dim": _read_json(folder.path / "text_encoder" / "config.json").get("d_model"),
    }


def _vae_settings(folder: ModelFolder) -> dict[str, object]:
    geometry = folder.variant.geometry
    return {
        "z_dim": geometry.channels,
        "scale_factor_temporal": geometry.time_stride,
        "scale_factor_spatial": geometry.space_stride,
    }


def _check_boundary(folder: ModelFolder) -> None:
    """The boundary in the folder must be the variant's, or the experts would be misused."""
    file, boundary = folder.path / "model_index.json", folder.variant.boundary
    found = _read_json(file).get("boundary_ratio")
    if found != boundary:
        raise ModelError(
            f"{file}: boundary_ratio is {found}, but {folder.variant.title} has {boundary}: this "
            f"is another model; give the folder of {folder.variant.title}"
        )


def _check_weights(path: Path, weights: str) -> None:
    """Every weight file of a component is there, and as long as its own header says."""
    index = path / f"{weights}.index.json"
    names = {weights}
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{index} names no weight files; {INCOMPLETE}")
        names = {str(name) for name in shards.values()}
    missing = sorted(name for name in names if not (path / name).is_file())
    if missing:
        pickles = sorted(file.name for file in path.glob("*") if file.suffix in PICKLES)
        unsafe = f"; {pickles[0]} is not read, as it may run code" if pickles else ""
        raise ModelError(f"{path} has no {', '.join(missing)}{unsafe}; {INCOMPLETE}")
    for name in sorted(names):
        try:
            with safe_open(path / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path / name} cannot be read ({error}): it is cut short, or a Git LFS pointer; "
                "download it again"
            ) from None
