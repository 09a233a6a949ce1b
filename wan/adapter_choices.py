"""What can be chosen of an adapter: its kind, the linears it is on, and the rank of each.

Names alone: what the kinds compute is in `wan.adapter_kinds`, how they are attached in `wan.lora`.
Module names: `spec/lora_formats.md` section 1.2, `spec/wan22.md` section 7.3.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

Kind = Literal["lora", "rslora", "dora", "lokr", "loha"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# The ten linears of a block, diffusers name -> official name: the one key map of adapters.
BLOCK_LINEARS: dict[str, str] = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}

PRESETS: dict[str, tuple[str, ...]] = {
    "all": ("attn1.", "attn2.", "ffn."),
    "attention": ("attn1.", "attn2."),
    "self_attention": ("attn1.",),
    "ffn": ("ffn.",),
}


def scale_of(kind: Kind, rank: int, alpha: float) -> float:
    """What the product of an adapter is multiplied by."""
    return alpha / (math.sqrt(rank) if kind == "rslora" else rank)


def target_modules(preset: str) -> list[str]:
    """The linears (names within a block) of a preset; `ValueError` if there is no such preset."""
    if preset not in PRESETS:
        raise ValueError(f"no preset of targets is called {preset!r}; known: {', '.join(PRESETS)}")
    return [linear for linear in BLOCK_LINEARS if linear.startswith(PRESETS[preset])]


def split_module(module: str) -> tuple[str, str] | None:
    """("blocks.3", "attn1.to_q") of a block linear's full name; None for any other module."""
    found = re.fullmatch(r"(blocks\.\d+)\.(.+)", module)
    return (found[1], found[2]) if found and found[2] in BLOCK_LINEARS else None


def module_ranks(
    linears: Sequence[str], targets: Sequence[str] | str, rank: int, pattern: Mapping[str, int]
) -> dict[str, int]:
    """The linears that get an adapter, of those there are, and the rank of each.

    `targets` are names of linears within a block, or one regex over full names. `pattern` gives
    linears another rank by regexes over full names, the first that matches. `ValueError` for a
    regex that is none, or matches nothing that gets an adapter.
    """
    modules = _matching_modules(linears, targets)
    ranks = dict.fromkeys(modules, rank)
    for regex in reversed([*pattern]):
        found = _full_matches(regex, modules)
        if not found:
            raise ValueError(f"the pattern {regex!r} matches no linear that gets an adapter")
        ranks |= dict.fromkeys(found, pattern[regex])
    return ranks


def _matching_modules(linears: Sequence[str], targets: Sequence[str] | str) -> list[str]:
    """Full names of the block linears that `targets` means; each entry must mean at least one."""
    in_block = r"blocks\.\d+\."
    patterns = [targets] if isinstance(targets, str) else [in_block + re.escape(t) for t in targets]
    matching: list[str] = []
    for pattern in patterns:
        found = _full_matches(pattern, linears)
        if not found:
            raise ValueError(
                f"the adapter target {pattern!r} matches no linear of the model; "
                f"a full name looks like 'blocks.0.{next(iter(BLOCK_LINEARS))}'"
            )
        matching += found
    outside = [name for name in matching if split_module(name) is None]
    if outside or not matching:
        raise ValueError(
            f"adapters go on the linears of blocks ({', '.join(BLOCK_LINEARS)}); "
            f"the targets {targets!r} mean {outside[0] if outside else 'nothing'}"
        )
    return list(dict.fromkeys(matching))


def _full_matches(regex: str, names: Sequence[str]) -> list[str]:
    try:
        return [name for name in names if re.fullmatch(regex, name)]
    except re.error as error:
        raise ValueError(f"{regex!r} is no regular expression ({error})") from None
