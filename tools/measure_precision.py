"""Measure what bf16 costs the transformer's output, on a random net as deep as Wan 2.2's A14B.

python -m tools.measure_precision
python -m tools.measure_precision --layers 8
"""

import argparse
import tempfile
from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from wan.flow import noise_like
from wan.transformer import TEXT_LEN, predict_velocity
from wan.variants import A14B

TEXT_DIM = 64
TOKENS = 77  # of the prompts; the rest of the rows is zeros


@dataclass(frozen=True)
class Inputs:
    """What a transformer is given."""

    x: Tensor  # (B, C, F, h, w)
    timestep: Tensor  # (B,)
    text: Tensor  # (B, 512, D)


@dataclass(frozen=True)
class Errors:
    """Relative to the output of the library's forward pass in fp32, with weights in fp32."""

    weights: float  # weights rounded to bf16, computed in fp32: what no forward pass can undo
    library: float  # diffusers as its pipelines run it, loaded in bf16 by from_pretrained
    ours: float


def main() -> None:
    """Print the errors."""
    parser = argparse.ArgumentParser(description="What bf16 costs the output.")
    parser.add_argument("--layers", type=int, default=A14B.layers)
    layers = parser.parse_args().layers
    errors = measure(random_transformer(layers), random_inputs())
    print(f"error against fp32, random net of {layers} layers:")
    print(f"  diffusers in bf16                           {errors.library:.2%}")
    print(f"  wan.transformer in bf16                     {errors.ours:.2%}")
    print(f"  of it by rounding the weights to bf16 alone {errors.weights:.2%}")


def random_transformer(layers: int, seed: int = 0) -> WanTransformer3DModel:
    """A narrow transformer in fp32, as the library initialises it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            num_layers=layers,
            num_attention_heads=2,
            attention_head_dim=128,
            ffn_dim=512,
            text_dim=TEXT_DIM,
        ).eval()


def random_inputs(seed: int = 0) -> Inputs:
    """Two samples, one for each expert: 833 is a timestep that bf16 does not have."""
    text = torch.zeros(2, TEXT_LEN, TEXT_DIM)
    text[:, :TOKENS] = noise_like((2, TOKENS, TEXT_DIM), seed, "text")
    x = noise_like((2, 16, 3, 8, 12), seed, "x")
    return Inputs(x=x, timestep=torch.tensor([957.0, 833.0]), text=text)


@torch.no_grad()
def measure(transformer: WanTransformer3DModel, inputs: Inputs) -> Errors:
    """The errors of both forward passes in bf16, for a transformer in fp32."""
    in_bf16 = load_in_bf16(transformer)
    expected = library_velocity(transformer, inputs)
    ours = predict_velocity(in_bf16, inputs.x, inputs.timestep, inputs.text)
    library = library_velocity(in_bf16, inputs)
    in_bf16.float()  # the rounded weights, in fp32
    return Errors(
        weights=_relative(library_velocity(in_bf16, inputs), expected),
        library=_relative(library, expected),
        ours=_relative(ours, expected),
    )


def load_in_bf16(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    """A copy in bf16 as users load it, with the modules in fp32 that the library keeps in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        transformer.save_pretrained(folder)
        return WanTransformer3DModel.from_pretrained(
            folder, torch_dtype=torch.bfloat16, local_files_only=True
        )


def library_velocity(transformer: WanTransformer3DModel, inputs: Inputs) -> Tensor:
    """(B, C, F, h, w): the library's own forward pass, called as its pipelines call it."""
    x, text = inputs.x.to(transformer.dtype), inputs.text.to(transformer.dtype)
    return transformer(x, inputs.timestep, text, return_dict=False)[0].float()


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    main()
