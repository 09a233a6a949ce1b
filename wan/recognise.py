"""What lies in a file of weights, from its header alone: never a tensor's data.

High and low noise, and the text-to-video models of Wan 2.1 and 2.2, have the same names and shapes:
only what files are called tells them apart. Source: `spec/wan22.md` sections 1, 7.3 to 7.7.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wan.headers import Header, ModelError, TensorHeader, read_header
from wan.key_names import library_name
from wan.variants import Expert

Part = Literal["high", "low", "single", "vae", "text_encoder"]
Kind = Literal["transformer", "vae", "text_encoder"]
Naming = Literal["diffusers", "official", "transformers", "llama"]
Shapes = dict[str, tuple[int, ...]]

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
# Names that only a part of this kind in this naming has.
MARKS: dict[tuple[Kind, Naming], tuple[str, ...]] = {
    ("transformer", "official"): ("patch_embedding.weight", "time_projection.1.weight"),
    ("transformer", "diffusers"): ("patch_embedding.weight", "condition_embedder.time_proj.weight"),
    ("vae", "official"): ("encoder.conv1.weight", "decoder.middle.0.residual.0.gamma"),
    ("vae", "diffusers"): ("encoder.conv_in.weight", "decoder.mid_block.resnets.0.norm1.gamma"),
    ("text_encoder", "official"): ("token_embedding.weight", "blocks.0.attn.q.weight"),
    ("text_encoder", "transformers"): (
        "encoder.final_layer_norm.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
    ),
    ("text_encoder", "llama"): ("token_embd.weight", "enc.blk.0.attn_q.weight"),
}
SCALES = (".scale_weight", ".weight_scale")
# Ends of the names of what is no weight: scales, marks of fp8 files, the tokenizer.
EXTRAS = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8", "spiece_model")
SCALE_DTYPES = ("F32", "BF16", "F16")
FP8_METADATA = "_quantization_metadata"
STORAGES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
# What `wan.dequantise` reads. Named here, as to ask diffusers takes seconds.
GGUF_STORAGES = {"F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q5_1", "Q4_K", "Q4_0"}
GGUF_STORAGES |= {"Q4_1", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS"}
ADAPTER = re.compile(
    r"[._](lora_([AB]|up|down|magnitude_vector)|lokr_w\d|hada_w\d|dora_scale|diff_b|diff)(\.|_|$)"
)
# Names in lower case that tell the expert; high quality and low VRAM tell nothing.
IN_FOLDER_NAME = (r"(high|low)[-_. ]?noise", r"^(high|low)$")
IN_FILE_NAME = (
    r"(high|low)[-_. ]?noise",
    r"(?<![a-z])(high|low)(?![a-z])(?![-_. ]?(?:quality|res|v?ram|mem|rank|detail|fidelity|speed))",
)
# What no model of Wan 2.2 itself has -> the models that do.
STRANGERS = {
    r"img_emb|image_embedder|\bk_img|add_k_proj": "an image-to-video model of Wan 2.1",
    r"vace": "a VACE model",
    r"face_|motion_encoder|pose_patch": "Wan-Animate",
    r"audio|cond_encoder|trainable_cond": "a speech-to-video model",
    r"control_adapter|ref_conv|add_conv_in": "a Fun model (control or camera)",
}


@dataclass(frozen=True)
class Weights:
    """The weights of one part of a model, wherever they lie and whatever they are called there."""

    part: Part
    files: tuple[Path, ...]  # safetensors shards, or one .gguf, or one .pth
    naming: Naming  # how its tensors are called ("llama": a umt5 GGUF of llama.cpp)
    prefix: str  # before each name in the file: "", "model.diffusion_model.", "diffusion_model."
    storage: str  # for people: "fp32", "bf16", "fp16", "fp8", "fp8_scaled", "gguf Q4_K" …
    config: dict[str, object]  # of WanTransformer3DModel, AutoencoderKLWan or UMT5Config


@dataclass(frozen=True)
class Found:
    """What the headers of a file, or of the shards of one part, say."""

    kind: Kind
    files: tuple[Path, ...]
    naming: Naming
    prefix: str
    storage: str
    shapes: Shapes  # by the library's names

    @property
    def place(self) -> Path:
        """What a message names: the file, or the folder of several."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent


def recognise(files: Sequence[Path]) -> Found:
    """What a file holds, or all shards of one part together.

    `ModelError` if a file is damaged, an adapter, of another family of models, or quantised in a
    way that is not read.
    """
    headers = {file: read_header(file) for file in files}
    tensors = {name: t for header in headers.values() for name, t in header.tensors.items()}
    place = files[0] if len(files) == 1 else files[0].parent
    if _has_adapter(tensors):
        raise ModelError(
            f"{place} holds a LoRA, not a model: a LoRA is applied on top of a model, by "
            "tools/render.py; give the model's own file here"
        )
    for (kind, naming), marks in MARKS.items():
        for prefix in PREFIXES:
            if all(prefix + mark in tensors for mark in marks):
                shapes = _library_shapes(tensors, kind, naming, prefix)
                _check_family(place, kind, shapes)
                storage = _storage(place, headers)
                return Found(kind, tuple(files), naming, prefix, storage, shapes)
    sample = ", ".join(list(tensors)[:3])
    raise ModelError(
        f"{place} holds no transformer, VAE or text encoder of Wan (it has {sample}): it is of "
        "another model; give a file of Wan 2.2"
    )


def is_adapter(file: Path) -> bool:
    """Whether a safetensors file holds a LoRA or another adapter, and not a model."""
    return _has_adapter(read_header(file).tensors)


def expert_by_name(file: Path) -> Expert | None:
    """The expert that a weight file's name tells, or else its folder's; None if neither does.

    high_noise, HighNoise, _HIGH_ and the like; `transformer_2` of a diffusers folder is the low
    one, and `transformer` beside it the high one.
    """
    folder = file.parent
    if (expert := _high_or_low(file.stem, IN_FILE_NAME)) is not None:
        return expert
    if (expert := _high_or_low(folder.name, IN_FOLDER_NAME)) is not None:
        return expert
    if folder.name == "transformer_2":
        return "low"
    pair = folder.name == "transformer" and (folder.parent / "transformer_2").is_dir()
    return "high" if pair else None


def is_called_wan_21(file: Path) -> bool:
    """Whether the names of a file and of the folders around it speak of Wan 2.1 alone."""
    around = [file.name, *(folder.name for folder in list(file.parents)[:2])]
    around += [part for part in file.parts if part.startswith("models--")]
    names = " ".join(around).lower()
    return bool(re.search(r"wan[-_. ]?2[._]?1(?!\d)", names)) and not re.search(
        r"wan[-_. ]?2[._]?2(?!\d)", names
    )


def _high_or_low(name: str, patterns: Sequence[str]) -> Expert | None:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    for pattern in patterns:
        found = set(re.findall(pattern, words))
        if len(found) == 1:
            return "high" if "high" in found else "low"
    return None


def _has_adapter(names: Mapping[str, TensorHeader]) -> bool:
    return any(ADAPTER.search(name) or name.startswith("lora_unet_") for name in names)


def _library_shapes(
    tensors: Mapping[str, TensorHeader], kind: Kind, naming: Naming, prefix: str
) -> Shapes:
    """Shapes of the weights, scales and marks aside, by the names that the library gives them."""
    shapes: Shapes = {}
    for name, tensor in tensors.items():
        if not name.endswith(EXTRAS):
            shapes[library_name(name.removeprefix(prefix), kind, naming)] = tensor.shape
    if kind == "text_encoder":  # the two are tied, and files hold one or both
        embedding = shapes.pop("encoder.embed_tokens.weight", None)
        if embedding is not None:
            shapes.setdefault("shared.weight", embedding)
    return shapes


def _check_family(place: Path, kind: Kind, shapes: Shapes) -> None:
    """Refuse relatives of Wan 2.2: they have its names, and more or fewer."""
    if kind == "transformer":
        for pattern, model in STRANGERS.items():
            if name := next((name for name in shapes if re.search(pattern, name)), None):
                raise ModelError(
                    f"{place} is {model} (it has {name}), which is not trained here; give a model "
                    "of Wan 2.2: T2V-A14B, I2V-A14B or TI2V-5B"
                )
    if kind == "text_encoder":
        blocks = {name.split(".")[2] for name in shapes if name.startswith("encoder.block.")}
        biases = [name for name in shapes if name.endswith("relative_attention_bias.weight")]
        if len(biases) < len(blocks):
            raise ModelError(
                f"{place} is T5, as Flux and SD3 use it, and not UMT5-XXL, which Wan uses (it has "
                "a position bias in each block); give a umt5_xxl file"
            )


def _storage(place: Path, headers: Mapping[Path, Header]) -> str:
    """How most of the bytes are stored; `ModelError` for what nothing here can read."""
    sizes: Counter[str] = Counter()
    scaled = False
    for header in headers.values():
        scaled = scaled or FP8_METADATA in header.metadata
        for name, tensor in header.tensors.items():
            if name.endswith(SCALES):
                scaled = True
                _check_scale(place, name, tensor)
            sizes[tensor.dtype] += 0 if name.endswith(EXTRAS) else tensor.size
    main = sizes.most_common(1)[0][0]
    if place.suffix == ".gguf":
        unread = sorted(set(sizes) - GGUF_STORAGES)
        if unread:
            raise ModelError(
                f"{place} is quantised as {unread[0]}, which cannot be computed with; take a file "
                "in Q8_0, Q6_K, Q5_K or Q4_K"
            )
        quantised = [kind for kind, _ in sizes.most_common() if kind not in STORAGES]
        return f"gguf {(quantised or [main])[0]}"
    if main not in STORAGES:
        raise ModelError(
            f"{place} is stored as {main}, a quantisation that is not read; take a file in bf16, "
            "fp16, fp8 or GGUF"
        )
    return "fp8_scaled" if STORAGES[main] == "fp8" and scaled else STORAGES[main]


def _check_scale(place: Path, name: str, scale: TensorHeader) -> None:
    if scale.dtype not in SCALE_DTYPES:
        raise ModelError(
            f"{place}: the scale {name} is stored as {scale.dtype}, a quantisation that is not "
            "read; take a file in bf16, fp16, fp8_scaled or GGUF"
        )
