"""How other programs take an adapter file: their key rules as a table, with the version read.

Nothing here is guessed: what no source says is not in the table. "run": their code was executed on
small files; "emulated": their rules were; "read": only their source was. Source:
`spec/lora_formats.md` sections 2.0, 2.A to 2.F and 3, and the commits at its head.
"""

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["yes", "partly", "wrong strength", "no", "error"]

# What a file can have that some loader minds. `wan.adapter_check.features` says which it has.
Feature = Literal[
    "comfy",  # layouts, as in wan.adapter_keys.Style
    "kohya",
    "diffusers",
    "official",
    "peft",
    "fun",
    "comfy_diffusers",
    "transformer_2",
    "stages",
    "unknown",  # keys that name nothing of Wan
    "lora_down",  # spellings of the factors
    "default",
    "bare",
    "alpha",
    "some_alpha_missing",
    "alpha_zero",
    "alpha_negative",
    "alpha_outside_blocks",
    "adapter_metadata",  # diffusers' entry lora_adapter_metadata
    "no_blocks",
    "outside_blocks",
    "patch_embedding",
    "head",
    "image_attention",
    "gap_in_blocks",  # a linear without LoRA in some block from 0 to the last
    "mixed_ranks",
    "orphans",
    "misfit",  # shapes of no Wan model
    "not_14b_or_5b",
    "no_detection_key",  # no blocks.0.cross_attn.k
    "swarm_misses_width",  # not 1536 or 5120 wide, and no architecture that SwarmUI knows
    "diff",
    "diff_b",
    "diff_b_on_some",
    "diff_m",
    "modulation_diff",
    "set_weight",
    "dora_scale",
    "magnitude",
    "lokr",
    "lokr_and_alpha",
    "lokr_factored",
    "loha",
    "lora_mid",
]


@dataclass(frozen=True)
class Rule:
    """What comes of a file that has all these features; `reason` is one phrase."""

    when: tuple[Feature, ...]
    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class Loader:
    """A program: the first rule that fits decides; without one, it applies the whole file."""

    name: str
    version: str
    known_by: Literal["run", "emulated", "read"]
    rules: tuple[Rule, ...]


def _each(features: tuple[Feature, ...], outcome: Outcome, reason: str) -> tuple[Rule, ...]:
    """The same rule for each of several features."""
    return tuple(Rule((feature,), outcome, reason) for feature in features)


_MISFIT = Rule(("misfit",), "no", "no Wan model has these shapes")
_SHAPES_ERROR = Rule(("misfit",), "error", "no Wan model has these shapes: size mismatch")

_COMFYUI = (
    *_each(
        ("diffusers", "comfy_diffusers", "peft", "official", "transformer_2", "stages"),
        "no",
        "maps official names after diffusion_model. or lora_unet_ only",
    ),
    Rule(("misfit",), "no", "logs 'shape is invalid' and leaves the weights as they are"),
    Rule(("fun", "no_detection_key"), "no", "lora_unet__ needs blocks_0_cross_attn_k"),
    Rule(("lokr_and_alpha",), "wrong strength", "ignores alpha where both LoKr factors are full"),
    Rule(("diff_m",), "partly", "does not know .diff_m, logs 'lora key not loaded'"),
    Rule(("magnitude",), "partly", "ignores PEFT's magnitudes: a plain LoRA is left of the DoRA"),
    Rule(("unknown",), "partly", "logs 'lora key not loaded' for the unknown keys"),
    Rule(("orphans",), "partly", "skips factors without a partner"),
    Rule(("dora_scale",), "yes", "with LyCORIS's norm of the base weights, not PEFT's"),
    Rule(("image_attention",), "yes", "Wan 2.2 has no k_img and v_img: logged, the rest loads"),
)

_KIJAI = (
    Rule(("patch_embedding",), "error", "takes a patch_embedding LoRA for a Control-LoRA"),
    _MISFIT,
    Rule(("peft",), "wrong strength", "assumes rsLoRA: multiplies by the square root of the rank"),
    *_each(
        ("diffusers", "comfy_diffusers"), "partly", "renames attn1 and attn2 both to cross_attn"
    ),
    *_each(("transformer_2", "stages"), "no", "does not know these names"),
    Rule(("alpha_zero",), "wrong strength", "takes alpha 0 for 1 when it does not merge"),
    Rule(("magnitude",), "partly", "ignores PEFT's magnitudes"),
    Rule(("head",), "partly", "skips the head when it does not merge"),
)

_DIFFUSERS = (
    Rule(("alpha_negative",), "error", "never ends: its scaling loop waits for a positive alpha"),
    _SHAPES_ERROR,
    *_each(("comfy_diffusers", "stages"), "error", "ValueError: keys are left over"),
    Rule(("fun",), "error", "KeyError: does not know lora_unet__"),
    Rule(("official",), "no", "only warns: it wants a prefix"),
    Rule(("peft",), "no", "only warns: load_lora_adapter(prefix=...) on the model takes some"),
    Rule(("transformer_2",), "no", "only warns: it wants transformer. for both experts"),
    Rule(("comfy", "no_blocks"), "error", "ValueError: no key has a block number"),
    Rule(("comfy", "alpha_outside_blocks"), "error", "ValueError: alpha outside the blocks"),
    Rule(("comfy", "patch_embedding"), "error", "ValueError: LoRA on patch_embedding"),
    Rule(("comfy", "dora_scale"), "error", "ValueError: dora_scale is left over"),
    Rule(("kohya", "dora_scale"), "error", "ValueError: dora_scale is left over"),
    Rule(("comfy", "default"), "error", "ValueError: .default in the names"),
    Rule(("diffusers", "default"), "no", "only warns: .default in the names"),
    Rule(("comfy", "unknown"), "error", "ValueError: unknown keys are left over"),
    Rule(("kohya", "some_alpha_missing"), "error", "KeyError: a kohya file needs every alpha"),
    Rule(("kohya", "outside_blocks"), "error", "IndexError: kohya keys outside the blocks"),
    Rule(("kohya", "gap_in_blocks"), "error", "KeyError: needs all 10 linears of every block"),
    Rule(("diffusers", "alpha"), "error", "ValueError: alpha keys after transformer."),
    Rule(("diffusers", "lora_down"), "error", "IndexError: lora_down after transformer."),
    *_each(("lokr", "lokr_factored", "loha"), "error", "takes plain LoRA and DoRA only"),
    Rule(("lora_mid",), "no", "does not know .lora_mid"),
    Rule(("orphans",), "error", "only warns, and leaves the missing factors without values"),
    Rule(
        ("diff_b_on_some",),
        "error",
        "only warns: diff_b on some linears leaves the others without values",
    ),
    Rule(("comfy", "alpha", "adapter_metadata"), "wrong strength", "applies the scale twice"),
    *_each(("diff", "diff_m", "modulation_diff", "set_weight"), "partly", "drops full differences"),
    Rule(("diffusers", "dora_scale"), "partly", "drops dora_scale"),
    Rule(("comfy", "magnitude"), "error", "ValueError: magnitudes are left over"),
    Rule(("image_attention",), "yes", "Wan 2.2 has no k_img and v_img: a warning, the rest loads"),
)
_OLD_RANKS = Rule(("mixed_ranks",), "wrong strength", "up to 0.38: scales all by the first rank")
_NO_ALPHA = Rule(("comfy", "alpha"), "error", "ValueError: alpha keys after diffusion_model.")

_DIFFSYNTH = (
    _MISFIT,
    *_each(
        ("kohya", "fun", "diffusers", "comfy_diffusers", "peft", "transformer_2", "stages"),
        "no",
        "wants official names, with diffusion_model. or nothing before them",
    ),
    *_each(("lokr", "lokr_factored", "loha"), "no", "takes plain LoRA only"),
    *_each(
        ("diff", "diff_b", "diff_m", "modulation_diff", "set_weight", "dora_scale", "magnitude"),
        "partly",
        "takes the factors of plain LoRA only",
    ),
)

_LIGHTX2V = (
    _MISFIT,
    *_each(
        ("kohya", "fun", "diffusers", "comfy_diffusers", "peft", "transformer_2", "stages"),
        "no",
        "wants official names after diffusion_model.",
    ),
    Rule(("default",), "no", ".default in the names"),
    *_each(("lokr", "lokr_factored", "loha"), "no", "takes plain LoRA and full differences only"),
    Rule(("alpha_zero",), "wrong strength", "takes alpha 0 for no alpha: 1"),
    *_each(("dora_scale", "magnitude", "set_weight"), "partly", "takes LoRA and .diff keys only"),
)

_WAN2GP = (
    *_each(
        ("diffusers", "comfy_diffusers", "peft", "transformer_2", "stages"),
        "error",
        "rejects a file with such names",
    ),
    _MISFIT,
    *_each(
        ("unknown", "lokr_factored", "loha", "lora_mid", "magnitude"),
        "error",
        "one key that it does not expect makes it reject the file",
    ),
    Rule(("set_weight",), "no", "does not know .set_weight"),
    Rule(("modulation_diff",), "partly", "drops modulation.diff"),
)

_MUSUBI = (
    _MISFIT,
    *_each(
        ("comfy", "official"),
        "no",
        "reads lora_unet_ keys only: convert to kohya, or use --base_weights",
    ),
    *_each(
        ("fun", "diffusers", "comfy_diffusers", "peft", "transformer_2", "stages"),
        "no",
        "reads lora_unet_ keys only: convert to kohya",
    ),
    Rule(("some_alpha_missing",), "partly", "applies it, but cannot train on from it: no alpha"),
)

_SWARMUI = (
    *_each(
        ("diffusers", "comfy_diffusers", "peft", "transformer_2", "stages", "fun"),
        "no",
        "does not detect such names as a LoRA of Wan",
    ),
    Rule(("no_detection_key",), "no", "knows a LoRA of Wan by blocks.0.cross_attn.k"),
    Rule(("swarm_misses_width",), "no", "knows this width by modelspec.architecture only"),
)

_INVOKEAI = (
    *_each(("comfy_diffusers", "transformer_2", "stages", "fun"), "no", "does not know such names"),
    Rule(("peft",), "no", "wants base_model.model.transformer."),
    Rule(("not_14b_or_5b",), "no", "knows the widths 5120 and 3072 only"),
    Rule(("default",), "no", ".default in the names"),
    *_each(("outside_blocks", "patch_embedding"), "partly", "takes the linears of blocks only"),
    *_each(
        ("diff", "diff_b", "diff_m", "modulation_diff", "set_weight", "magnitude"),
        "partly",
        "does not take full differences or PEFT's magnitudes",
    ),
)

_SD_CPP = (
    _MISFIT,
    *_each(
        ("diffusers", "comfy_diffusers", "peft", "official", "transformer_2", "stages", "fun"),
        "no",
        "maps diffusion_model. and lora_unet_ only",
    ),
    Rule(("kohya", "outside_blocks"), "partly", "kohya keys of blocks only"),
    *_each(
        ("diff_m", "dora_scale", "magnitude", "set_weight"),
        "partly",
        "does not know .diff_m, the scales of a DoRA or .set_weight",
    ),
)

LOADERS = (
    Loader("ComfyUI", "v0.3.64 (a125cd84)", "run", _COMFYUI),
    Loader("WanVideoWrapper", "33175770", "emulated", _KIJAI),
    Loader("diffusers", "0.42.1", "run", _DIFFUSERS),
    Loader("diffusers (old)", "0.34.0", "run", (_NO_ALPHA, _OLD_RANKS, *_DIFFUSERS)),
    Loader("DiffSynth-Studio", "fed7b18f", "run", _DIFFSYNTH),
    Loader("LightX2V", "f8aee98b", "run", _LIGHTX2V),
    Loader("Wan2GP", "8681e9f7, mmgp 3.7.12", "read", _WAN2GP),
    Loader("musubi-tuner", "30c658c4", "read", _MUSUBI),
    Loader("SwarmUI", "062407c7", "read", _SWARMUI),
    Loader("InvokeAI", "8e71a8a5", "read", _INVOKEAI),
    Loader("stable-diffusion.cpp", "97d29908", "read", _SD_CPP),
)


def verdict(loader: Loader, features: frozenset[Feature]) -> tuple[Outcome, str]:
    """What a loader makes of a file with these features, and why."""
    for rule in loader.rules:
        if features.issuperset(rule.when):
            return rule.outcome, rule.reason
    return "yes", ""
