"""What can be chosen of how a model runs: kept activations, kernels of attention, fewer bits.

Names alone, which settings, plans and reports share: what they do is in `wan.speed` and in
`wan.quantised_weight`.
"""

from typing import Literal, get_args

# Kept of a block for its backward pass, each with what is before it; the rest is computed twice.
Keep = Literal[
    "host",  # nothing: its input waits in host memory
    "nothing",  # but its input
    "attention",  # the output of self-attention: half of the forward's time, two bytes a channel
    "products",  # the outputs of the linears
    "everything",
]
KEEPS: tuple[Keep, ...] = get_args(Keep)

# Where the inputs of blocks wait for the backward pass, and for which kinds that can be chosen.
InputPlace = Literal["device", "host"]
INPUT_PLACES: tuple[InputPlace, ...] = get_args(InputPlace)
WITH_INPUTS: frozenset[Keep] = frozenset(("nothing", "attention", "products"))

# The kernels of attention; "auto" is PyTorch's choice. All but sage can train.
Attention = Literal["auto", "cudnn", "flash", "efficient", "flash2", "flash3", "sage"]
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)

# fp8 multiplies in fp8 where the card can; of the others only the weight is in fewer bits.
FrozenFormat = Literal["fp8", "fp8_weights", "int8", "nf4"]
FROZEN_FORMATS: tuple[FrozenFormat, ...] = get_args(FrozenFormat)
