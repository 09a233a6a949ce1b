"""Find, check and load a model: every mistake is told before a single weight is read.

Any layout, and any mix of them: experts from one place, VAE and text encoder from another. Nothing
here ever asks the network. Source: `spec/wan22.md` section 7.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from wan.headers import ModelError
from wan.model_checks import KEY_OF_PART
from wan.model_files import (
    INCOMPLETE,
    TOKENIZER,
    Scan,
    hub_snapshot,
    read_json,
    scan,
    tokenizer_in,
)
from wan.model_parts import part_of_diffusers, part_of_file, part_of_scan
from wan.recognise import Part, Weights
from wan.speed_choices import FrozenFormat
from wan.variants import TINY_PATH, Expert, Variant, variant
from wan.weights import OnBlock, build_text_encoder, build_transformer, build_vae

HASH_WHOLE_BELOW = 256 * 2**20  # bytes
HASHED_ENDS = 2**20  # bytes at either end of a larger file
PIPELINE = "model_index.json"
TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json")
EXAMPLES = {
    "t2v_a14b": "Wan2.2-T2V-A14B-Diffusers",
    "i2v_a14b": "Wan2.2-I2V-A14B-Diffusers",
    "ti2v_5b": "Wan2.2-TI2V-5B-Diffusers",
}


@dataclass(frozen=True)
class ModelPaths:
    """Where the user says that a model lies; None = within `path`."""

    path: str | None
    high: str | None = None
    low: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class Model:
    """A whole model of this variant that `find_model` has checked."""

    variant: Variant
    parts: Mapping[Part, Weights]
    tokenizer: Path  # the folder of tokenizer.json


def find_model(paths: ModelPaths, variant_name: str) -> Model:
    """The model at `paths`, checked down to the headers of its weight files.

    `ModelError` if there is none, if it is incomplete or of another kind, or if several files could
    be a part of it; the message names the config key to set.
    """
    facts = variant(variant_name)
    scans: dict[Path, Scan] = {}
    wanted: tuple[Part, ...] = (*facts.experts, "vae", "text_encoder")
    if (paths.high or paths.low) and len(facts.experts) == 1:
        raise ModelError(
            f"model.high or model.low is set, but {facts.title} has one transformer: give it as "
            "model.path, and take them out"
        )
    parts: dict[Part, Weights] = {part: _find_part(paths, part, facts, scans) for part in wanted}
    if len(facts.experts) == 2:
        _check_pair(parts["high"], parts["low"])
    for weights in parts.values():
        _check_text(weights, parts["text_encoder"])
    return Model(facts, parts, _find_tokenizer(paths, facts, parts["text_encoder"]))


def load_transformer(
    model: Model,
    expert: Expert,
    dtype: torch.dtype,
    device: torch.device | str,
    frozen: FrozenFormat | None = None,
    pack_on: torch.device | str | None = None,
    on_block: OnBlock | None = None,
) -> WanTransformer3DModel:
    """The frozen transformer of an expert, in `dtype` but for what diffusers keeps in fp32.

    The linears of its blocks are packed as `frozen` says (None = as loaded), on a device of their
    own if one is given, as that of the training is faster at it than the CPU. `on_block` is called
    with each block once all of it is read.
    """
    return build_transformer(model.parts[expert], dtype, device, frozen, pack_on, on_block)


def load_vae(model: Model, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKLWan:
    """The frozen VAE; fp32 is the official dtype."""
    return build_vae(model.parts["vae"], dtype, device)


def load_text_encoder(
    model: Model, dtype: torch.dtype, device: torch.device | str
) -> UMT5EncoderModel:
    """The frozen text encoder; `ModelError` if its token embedding came out as zeros.

    Some versions of transformers 5 leave it so (wan22.md, trap 20), and every prompt is then equal.
    """
    encoder = build_text_encoder(model.parts["text_encoder"], dtype, device)
    if not encoder.encoder.embed_tokens.weight.any():
        raise ModelError(
            f"the token embedding of {model.parts['text_encoder'].files[0]} is all zeros after "
            "loading: the installed transformers cannot load it, or the file is damaged; install "
            "the version that the constraints file names"
        )
    return encoder


def load_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    """The tokenizer exactly as its tokenizer.json says, whatever class the config names."""
    return PreTrainedTokenizerFast.from_pretrained(model.tokenizer, local_files_only=True)


def component_hash(model: Model, part: Part | Literal["tokenizer"]) -> str:
    """16 hex digits that change when the part does, and not when it only lies elsewhere.

    sha256 over its config, and the names and contents of its files. Hashing 28 GB is slow, so if
    the files exceed 256 MiB together, each counts with its size and its first and last MiB only.
    """
    digest = hashlib.sha256()
    if part == "tokenizer":
        named = [model.tokenizer / name for name in TOKENIZER_FILES]
        files = [file for file in named if file.is_file()]
    else:
        files = list(model.parts[part].files)
        digest.update(json.dumps(model.parts[part].config, sort_keys=True).encode())
    whole = sum(file.stat().st_size for file in files) <= HASH_WHOLE_BELOW
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        for piece in _pieces(file, whole):
            digest.update(piece)
    return digest.hexdigest()[:16]


def _pieces(file: Path, whole: bool) -> Iterator[bytes]:
    with file.open("rb") as stream:
        if whole:
            yield stream.read()
            return
        yield stream.read(HASHED_ENDS)
        stream.seek(max(0, file.stat().st_size - HASHED_ENDS))
        yield stream.read()


def _find_part(paths: ModelPaths, part: Part, facts: Variant, scans: dict[Path, Scan]) -> Weights:
    given = {
        "high": paths.high,
        "low": paths.low,
        "vae": paths.vae,
        "text_encoder": paths.text_encoder,
    }.get(part)
    key = "model.path" if given is None else KEY_OF_PART[part]
    place = _existing(paths.path if given is None else given, key, facts)
    if place.is_file():
        if given is None and part != "single":
            raise ModelError(
                f"{key}={place} is one file, and {KEY_OF_PART[part]} is not set: a model has "
                f"several parts; set {KEY_OF_PART[part]}, or give the folder that holds them all"
            )
        return part_of_file(place, part, facts)
    if (place / PIPELINE).is_file():
        _check_pipeline(place / PIPELINE, facts)
        return part_of_diffusers(place, part, facts)
    if place not in scans:
        scans[place] = scan(place)
    return part_of_scan(scans[place], place, part, facts, named=given is not None)


def _existing(path: str | None, key: str, facts: Variant) -> Path:
    """The file or folder that a key names, that of the snapshot in a Hugging Face cache."""
    remedy = _remedy(facts, key)
    if path is None or not path.strip():
        raise ModelError(f"{key} is empty: it must name the model's folder; {remedy}")
    place = Path(path).expanduser()
    if not place.exists():
        raise ModelError(f"{key}={path} does not exist; {remedy}")
    return hub_snapshot(place)


def _remedy(facts: Variant, key: str) -> str:
    if facts.name == "tiny":
        return f"`make tiny` builds it in {TINY_PATH}; set {key}={TINY_PATH}"
    return (
        f"download {facts.title} from huggingface.co/Wan-AI and set {key}, such as "
        f"{key}=/path/to/{EXAMPLES[facts.name]}"
    )


def _check_pipeline(file: Path, facts: Variant) -> None:
    """What the pipeline says must be the variant's, or the experts would be misused."""
    index = read_json(file)
    expected = {
        "boundary_ratio": facts.boundary,
        "expand_timesteps": facts.conditioning == "first_frame",
    }
    for name, value in expected.items():
        found = index.get(name, False if name == "expand_timesteps" else None)
        if found != value:
            raise ModelError(
                f"{file}: {name} is {found}, but {facts.title} has {value}: this is another "
                f"model; give the folder of {facts.title}"
            )


def _check_pair(high: Weights, low: Weights) -> None:
    """Two experts of one size, and not the same weights twice."""
    if high.files[0].samefile(low.files[0]) or _same_content(high, low):
        raise ModelError(
            f"{high.files[0]} and {low.files[0]} hold the same weights, but a model has a "
            "transformer of high noise and another of low noise; set model.high and model.low to "
            "the two"
        )
    for name in sorted(high.config.keys() & low.config.keys()):
        if high.config[name] != low.config[name]:
            raise ModelError(
                f"{name} is {high.config[name]} in {high.files[0]}, but {low.config[name]} in "
                f"{low.files[0]}: they are not the two experts of one model; give both from the "
                "same model"
            )


def _same_content(high: Weights, low: Weights) -> bool:
    """Whether the last bytes of all files are the same: two copies, one of them misnamed."""
    if [f.stat().st_size for f in high.files] != [f.stat().st_size for f in low.files]:
        return False
    pairs = zip(high.files, low.files, strict=True)
    return all(list(_pieces(a, False)) == list(_pieces(b, False)) for a, b in pairs)


def _check_text(weights: Weights, text_encoder: Weights) -> None:
    text_dim, width = weights.config.get("text_dim"), text_encoder.config["d_model"]
    if text_dim is not None and text_dim != width:
        raise ModelError(
            f"{weights.files[0]} takes text of {text_dim} channels, but the text encoder in "
            f"{text_encoder.files[0]} gives {width}; Wan 2.2 takes UMT5-XXL"
        )


def _find_tokenizer(paths: ModelPaths, facts: Variant, text_encoder: Weights) -> Path:
    """The folder of tokenizer.json: named, or in the model's folder, or near the text encoder."""
    if paths.tokenizer is not None:
        place = _existing(paths.tokenizer, "model.tokenizer", facts)
        folder = place.parent if place.name == TOKENIZER else tokenizer_in(place)
        if folder is None:
            raise ModelError(f"model.tokenizer={paths.tokenizer} has no {TOKENIZER}; {INCOMPLETE}")
        return folder
    beside = text_encoder.files[0].parent
    near = [] if paths.path is None else [_existing(paths.path, "model.path", facts)]
    for place in (*near, beside, beside.parent):
        if place.is_dir() and (folder := tokenizer_in(place)) is not None:
            return folder
    if near and (near[0] / PIPELINE).is_file():
        raise ModelError(f"{near[0] / 'tokenizer'} has no {TOKENIZER}; {INCOMPLETE}")
    raise ModelError(
        f"no {TOKENIZER} lies in {' or '.join(map(str, (*near, beside)))} (files of ComfyUI and "
        "GGUF bring none that is read): download the folder google/umt5-xxl of any Wan 2.2 "
        "repository of huggingface.co/Wan-AI and set model.tokenizer=/path/to/umt5-xxl"
    )
