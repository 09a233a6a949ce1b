"""Weights of any layout into the library's models: one tensor at a time, each checked.

A model is built without memory, then each tensor is read, made whole, moved, cast and put in its
place. What the host holds beside the finished model is one tensor (for a `.pth`, also the pages of
the mapped file, which the system takes back when it needs them). Nothing here asks the network.
Source: `spec/wan22.md` sections 5.3 and 7, traps 9 to 12 and 20.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import (
    WanRotaryPosEmbed,
    WanTransformer3DModel,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from wan.adapter_choices import split_module
from wan.dequantise import GgufTensor, dequantise_fp8, dequantise_gguf, gguf_tensors
from wan.frozen_linear import FrozenLinear
from wan.headers import ModelError
from wan.key_names import TIED_EMBEDDING, library_name
from wan.quantised_weight import PackedWeight, check_format, fp8_as_stored, pack
from wan.recognise import EXTRAS, SCALES, Weights
from wan.speed_choices import FrozenFormat

Device = torch.device | str
Read = Callable[[], Tensor | GgufTensor]
Readers = Mapping[str, Read]  # how to read each tensor of a file, by its name
OnBlock = Callable[[nn.Module], None]


@dataclass(frozen=True)
class _Stored:
    """How to read a tensor as it is stored, and its scale if it has one."""

    name: str  # in the file
    read: Read
    read_scale: Read | None


def build_transformer(
    weights: Weights,
    dtype: torch.dtype,
    device: Device,
    frozen: FrozenFormat | None = None,
    pack_on: Device | None = None,
    on_block: OnBlock | None = None,
) -> WanTransformer3DModel:
    """The frozen transformer in `dtype`, but for what diffusers keeps in fp32, in every layout.

    The linears of blocks are packed as `frozen` says, one by one as they are read, on a device of
    their own if one is given. What the file has in that format already stays as it is stored, and
    so does what a GGUF quantised, unless a format is asked for. `on_block` gets each block once all
    of it is read. `ModelError` unless the files hold exactly the model's tensors, and if the format
    cannot be had.
    """
    check_format(frozen)
    model = empty_transformer(weights.config)
    kept = WanTransformer3DModel._keep_in_fp32_modules or ()
    packing = partial(_packed, weights, frozen, pack_on or device)
    _fill(model, weights, dtype, device, kept, packing, on_block)
    # Built anew: its tables are in no file, and nothing computes them from a model without memory.
    config = model.config
    model.rope = WanRotaryPosEmbed(
        config["attention_head_dim"], config["patch_size"], config["rope_max_seq_len"]
    ).to(device)
    return model.eval().requires_grad_(False)


def build_vae(weights: Weights, dtype: torch.dtype, device: Device) -> AutoencoderKLWan:
    """The frozen VAE, 2.1 or 2.2, in `dtype`; `ModelError` as for a transformer."""
    model = empty_vae(weights.config)
    _fill(model, weights, dtype, device, (), None)
    return model.eval().requires_grad_(False)


def build_text_encoder(weights: Weights, dtype: torch.dtype, device: Device) -> UMT5EncoderModel:
    """The frozen text encoder in `dtype`, never quantised; `ModelError` as for a transformer."""
    model = empty_text_encoder(weights.config)
    # As transformers does: some of its layers overflow in fp16, and in no other dtype.
    kept = model._keep_in_fp32_modules if dtype == torch.float16 else None
    _fill(model, weights, dtype, device, tuple(kept or ()), None)
    model.encoder.embed_tokens.weight = model.shared.weight
    return model.eval().requires_grad_(False)


def empty_transformer(config: Mapping[str, object]) -> WanTransformer3DModel:
    """A transformer on the `meta` device: names, shapes and counts, but no memory."""
    with torch.device("meta"):
        return cast("WanTransformer3DModel", WanTransformer3DModel.from_config(dict(config)))


def empty_vae(config: Mapping[str, object]) -> AutoencoderKLWan:
    """A VAE on the `meta` device."""
    with torch.device("meta"):
        return cast("AutoencoderKLWan", AutoencoderKLWan.from_config(dict(config)))


def empty_text_encoder(config: Mapping[str, object]) -> UMT5EncoderModel:
    """A text encoder on the `meta` device."""
    with torch.device("meta"):
        return UMT5EncoderModel(UMT5Config.from_dict(dict(config)))


def parameter_count(model: nn.Module | Weights) -> int:
    """How many numbers a model consists of, quantised or not; shared ones count once."""
    if isinstance(model, Weights):
        empty = {"vae": empty_vae, "text_encoder": empty_text_encoder}
        return parameter_count(empty.get(model.part, empty_transformer)(model.config))
    packed = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    return sum(parameter.numel() for parameter in model.parameters()) + sum(
        linear.in_features * linear.out_features for linear in packed
    )


def read_tensors(
    weights: Weights, device: Device = "cpu"
) -> Iterator[tuple[str, Tensor | GgufTensor]]:
    """Each tensor under the library's name, on `device`, one at a time.

    fp8 with scales comes made whole in fp32; what GGUF quantises comes as a GgufTensor. A
    tensor on the CPU may be a view of the file: copy what you keep.
    """
    for name, stored in _stored_tensors(weights).items():
        tensor = _as_stored(weights, stored)
        is_packed = isinstance(tensor, GgufTensor)
        yield name, tensor if is_packed else _whole(weights, stored, tensor, device)


def _fill(
    model: nn.Module,
    weights: Weights,
    dtype: torch.dtype,
    device: Device,
    kept: Sequence[str],
    packing: Callable[[_Stored, Tensor | GgufTensor], PackedWeight | None] | None,
    on_block: OnBlock | None = None,
) -> None:
    """Put every tensor in its place, in `dtype`, or fp32 where a part of its name is in `kept`."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shapes.pop(TIED_EMBEDDING, None)
    tensors = _stored_tensors(weights)
    _check_names(weights, list(shapes), list(tensors))
    missing = Counter(map(_block_of, shapes))
    for name, stored in tensors.items():
        tensor = _as_stored(weights, stored)
        if tensor.shape != shapes[name]:
            raise ModelError(
                f"{_place(weights)} cannot be loaded: {name} has the shape {tuple(tensor.shape)},"
                f" its config says {tuple(shapes[name])}: it is of another model; download the "
                "model again"
            )
        path, _, leaf = name.rpartition(".")
        module, block = model.get_submodule(path), _block_of(name)
        # wan/transformer.py needs what is outside of its blocks whole.
        in_linear = leaf == "weight" and isinstance(module, nn.Linear) and split_module(path)
        packed = packing(stored, tensor) if packing and in_linear else None
        if packed:
            linear = FrozenLinear(packed.to(device), cast("nn.Linear", module), dtype)
            model.set_submodule(path, linear)
        else:
            wanted = torch.float32 if any(part in kept for part in name.split(".")) else dtype
            whole = _unpacked(weights, stored, tensor, device, wanted)
            setattr(module, leaf, nn.Parameter(whole, requires_grad=False))
        missing[block] -= 1
        if on_block and block and not missing[block]:
            on_block(model.get_submodule(block))


def _block_of(name: str) -> str:
    """blocks.3 of blocks.3.norm2.weight; nothing of what is outside of blocks."""
    return ".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""


def _unpacked(
    weights: Weights,
    stored: _Stored,
    tensor: Tensor | GgufTensor,
    device: Device,
    dtype: torch.dtype,
) -> Tensor:
    if isinstance(tensor, GgufTensor):
        return dequantise_gguf(tensor, dtype).to(device)
    # A copy: a file that is replaced under a run must not change its model.
    return _whole(weights, stored, tensor, device).to(dtype, copy=True)


def _packed(
    weights: Weights,
    frozen: FrozenFormat | None,
    device: Device,
    stored: _Stored,
    tensor: Tensor | GgufTensor,
) -> PackedWeight | None:
    """A linear's weight in the format, or as a GGUF stores it; None if it is to be whole."""
    if isinstance(tensor, GgufTensor):
        if frozen is None:
            return PackedWeight(tensor.stored, torch.empty(0), tensor.kind)
        return pack(dequantise_gguf(tensor, torch.float32, device), frozen)
    if frozen is None:
        return None
    kept = fp8_as_stored(tensor, _scale(weights, stored), frozen)
    return kept or pack(_whole(weights, stored, tensor, device), frozen)


def _check_names(weights: Weights, expected: Sequence[str], found: Sequence[str]) -> None:
    """Told before a single weight is read."""
    findings = {
        "missing": sorted(set(expected) - set(found)),
        "unexpected": sorted(set(found) - set(expected)),
    }
    for finding, names in findings.items():
        if names:
            raise ModelError(
                f"the weights in {_place(weights)} do not fit the model's config: {len(names)} "
                f"are {finding}, such as {', '.join(names[:3])}; the download is incomplete or of "
                "another model: download the model again"
            )


def _place(weights: Weights) -> Path:
    """What a message names: the file, or the folder of several."""
    return weights.files[0] if len(weights.files) == 1 else weights.files[0].parent


def _stored_tensors(weights: Weights) -> dict[str, _Stored]:
    """How to read each tensor, by the library's name."""
    readers: dict[str, Read] = {}
    for file in weights.files:
        for name, read in _tensors_in(file).items():
            readers[name.removeprefix(weights.prefix)] = read
    found: dict[str, _Stored] = {}
    for name, read in readers.items():
        if name.endswith(EXTRAS):
            continue
        scales = [name.removesuffix(".weight") + end for end in SCALES]
        read_scale = next((readers[scale] for scale in scales if scale in readers), None)
        library = library_name(name, weights.part, weights.naming)
        found[library] = _Stored(name, read, read_scale)
    return found


def _as_stored(weights: Weights, stored: _Stored) -> Tensor | GgufTensor:
    tensor = stored.read()
    if isinstance(tensor, Tensor) and not tensor.is_floating_point():
        raise ModelError(
            f"{_place(weights)}: {stored.name} is stored as {tensor.dtype}, a quantisation that is "
            "not read; take a file in bf16, fp16, fp8 or GGUF"
        )
    return tensor


def _whole(weights: Weights, stored: _Stored, tensor: Tensor, device: Device) -> Tensor:
    """A tensor as it was read, on `device`: made whole there with its scale if it has one."""
    tensor, scale = tensor.to(device), _scale(weights, stored)
    if scale is not None:
        try:
            return dequantise_fp8(tensor, scale.to(device))
        except ValueError as error:
            raise ModelError(
                f"{_place(weights)}: {stored.name} cannot be made whole ({error}); take a file in "
                "bf16, or in fp8 as ComfyUI, LightX2V or musubi-tuner write it"
            ) from None
    return tensor


def _scale(weights: Weights, stored: _Stored) -> Tensor | None:
    scale = stored.read_scale() if stored.read_scale else None
    if isinstance(scale, GgufTensor):
        raise ModelError(
            f"{_place(weights)}: the scale of {stored.name} is quantised itself, which no tool "
            "writes; download the model again"
        )
    return scale


def _tensors_in(file: Path) -> Readers:
    """How to read each tensor of one file, by the name it has there, in the file's order."""
    try:
        if file.suffix == ".gguf":
            return gguf_tensors(file)
        if file.suffix == ".pth":
            return _pickled_tensors(file)
        with safe_open(file, "pt") as opened:
            return {name: partial(_safetensor, file, name) for name in opened.offset_keys()}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{file} cannot be read ({error}): it is cut short or no such file; download it again"
    )


def _safetensor(file: Path, name: str) -> Tensor:
    # Opened for each tensor: what was read of an open file counts as this process's memory.
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)
    except (SafetensorError, OSError) as error:  # a dtype that PyTorch lacks, a file that is gone
        raise _unreadable(file, error) from None


def _pickled_tensors(file: Path) -> Readers:
    stored = torch.load(file, "cpu", weights_only=True, mmap=True)
    return {name: t.detach for name, t in stored.items() if isinstance(t, Tensor)}
