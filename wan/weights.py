"""Weights of any layout into the library's models: one tensor at a time, each checked.

A model is built without memory, then each tensor is read, made whole, moved, cast and put in its
place. What the host holds beside the finished model is one tensor (for a `.pth`, also the pages of
the mapped file, which the system takes back when it needs them). Nothing here asks the network.
Source: `spec/wan22.md` sections 5.3 and 7, traps 9 to 12 and 20.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import (
    WanRotaryPosEmbed,
    WanTransformer3DModel,
)
from diffusers.quantizers.gguf.utils import GGUFParameter
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from wan.dequantise import dequantise_fp8, dequantise_gguf, gguf_linear, gguf_tensors, quantisation
from wan.headers import ModelError
from wan.key_names import TIED_EMBEDDING, library_name
from wan.recognise import EXTRAS, SCALES, Weights

Device = torch.device | str
Readers = Mapping[str, Callable[[], Tensor]]  # how to read each tensor, by its name


def build_transformer(
    weights: Weights, dtype: torch.dtype, device: Device
) -> WanTransformer3DModel:
    """The frozen transformer in `dtype`, but for what diffusers keeps in fp32, in every layout.

    Quantised linears of a GGUF stay quantised and compute in `dtype`. `ModelError` unless the files
    hold exactly the model's tensors.
    """
    model = empty_transformer(weights.config)
    _fill(model, weights, dtype, device, WanTransformer3DModel._keep_in_fp32_modules or ())
    # Built anew: its tables are in no file, and nothing computes them from a model without memory.
    config = model.config
    model.rope = WanRotaryPosEmbed(
        config["attention_head_dim"], config["patch_size"], config["rope_max_seq_len"]
    ).to(device)
    return model.eval().requires_grad_(False)


def build_vae(weights: Weights, dtype: torch.dtype, device: Device) -> AutoencoderKLWan:
    """The frozen VAE, 2.1 or 2.2, in `dtype`; `ModelError` as for a transformer."""
    model = empty_vae(weights.config)
    _fill(model, weights, dtype, device, ())
    return model.eval().requires_grad_(False)


def build_text_encoder(weights: Weights, dtype: torch.dtype, device: Device) -> UMT5EncoderModel:
    """The frozen text encoder in `dtype`, never quantised; `ModelError` as for a transformer."""
    model = empty_text_encoder(weights.config)
    # As transformers does: some of its layers overflow in fp16, and in no other dtype.
    kept = model._keep_in_fp32_modules if dtype == torch.float16 else None
    _fill(model, weights, dtype, device, tuple(kept or ()))
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
    return sum(_shape(parameter).numel() for parameter in model.parameters())


def read_tensors(weights: Weights, device: Device = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Each tensor under the library's name, on `device`, one at a time.

    fp8 with scales comes made whole in fp32; what GGUF quantises comes as a GGUFParameter on the
    CPU. A tensor on the CPU may be a view of the file: copy what you keep.
    """
    for name, read in _readers(weights, device).items():
        yield name, read()


def _fill(
    model: nn.Module, weights: Weights, dtype: torch.dtype, device: Device, kept: Sequence[str]
) -> None:
    """Put every tensor in its place, in `dtype`, or fp32 where a part of its name is in `kept`."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shapes.pop(TIED_EMBEDDING, None)
    readers = _readers(weights, device)
    _check_names(weights, list(shapes), list(readers))
    for name, read in readers.items():
        tensor = read()
        if _shape(tensor) != shapes[name]:
            raise ModelError(
                f"{_place(weights)} cannot be loaded: {name} has the shape {tuple(_shape(tensor))},"
                f" its config says {tuple(shapes[name])}: it is of another model; download the "
                "model again"
            )
        is_kept = any(part in kept for part in name.split("."))
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        wanted = torch.float32 if is_kept else dtype
        if isinstance(tensor, GGUFParameter):
            # Of a transformer: wan/transformer.py needs what is outside of its blocks whole.
            if name.startswith("blocks.") and isinstance(module, nn.Linear) and not is_kept:
                quantised = cast("GGUFParameter", tensor.to(device))
                model.set_submodule(path, gguf_linear(module, quantised, dtype))
                continue
            whole = dequantise_gguf(tensor, wanted).to(device)
        else:
            # A copy: a file that is replaced under a run must not change its model.
            whole = tensor.to(wanted, copy=True)
        setattr(module, leaf, nn.Parameter(whole, requires_grad=False))


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


def _shape(tensor: Tensor) -> torch.Size:
    return quantisation(tensor)[1] if isinstance(tensor, GGUFParameter) else tensor.shape


def _place(weights: Weights) -> Path:
    """What a message names: the file, or the folder of several."""
    return weights.files[0] if len(weights.files) == 1 else weights.files[0].parent


def _readers(weights: Weights, device: Device) -> Readers:
    """How to read each tensor, by the library's name."""
    stored: dict[str, Callable[[], Tensor]] = {}
    for file in weights.files:
        for name, read in _tensors_in(file).items():
            stored[name.removeprefix(weights.prefix)] = read
    return {
        library_name(name, weights.part, weights.naming): partial(
            _read, weights, stored, name, device
        )
        for name in stored
        if not name.endswith(EXTRAS)
    }


def _read(weights: Weights, stored: Readers, name: str, device: Device) -> Tensor:
    """One tensor on `device`, made whole there with its scale if it has one."""
    tensor = stored[name]()
    if isinstance(tensor, GGUFParameter):
        return tensor
    tensor = tensor.to(device)
    layer = name.removesuffix(".weight")
    scale = next((stored[layer + end] for end in SCALES if layer + end in stored), None)
    if scale:
        try:
            return dequantise_fp8(tensor, scale().to(device))
        except ValueError as error:
            raise ModelError(
                f"{_place(weights)}: {name} cannot be made whole ({error}); take a file in bf16, "
                "or in fp8 as ComfyUI, LightX2V or musubi-tuner write it"
            ) from None
    if not tensor.is_floating_point():
        raise ModelError(
            f"{_place(weights)}: {name} is stored as {tensor.dtype}, a quantisation that is not "
            "read; take a file in bf16, fp16, fp8 or GGUF"
        )
    return tensor


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
        raise ModelError(
            f"{file} cannot be read ({error}): it is cut short or no such file; download it again"
        ) from None


def _safetensor(file: Path, name: str) -> Tensor:
    # Opened for each tensor: what was read of an open file counts as this process's memory.
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def _pickled_tensors(file: Path) -> Readers:
    stored = torch.load(file, "cpu", weights_only=True, mmap=True)
    return {name: t.detach for name, t in stored.items() if isinstance(t, Tensor)}
