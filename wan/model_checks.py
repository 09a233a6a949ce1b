"""Whether weights are what a variant needs: every mistake has its reason, told before loading.

Only headers and small JSON files are read. Source: `spec/wan22.md` sections 1.1, 1.3, 1.4 and 7.
"""

from collections.abc import Mapping
from pathlib import Path

from wan.headers import ModelError
from wan.model_config import Settings, config_of_shapes, contradiction, settings_of_shapes
from wan.model_files import INCOMPLETE, read_json
from wan.recognise import Found, Kind, Part, Weights, expert_by_name, is_called_wan_21
from wan.variants import Variant
from wan.weights import TIED_EMBEDDING, empty_text_encoder, empty_transformer, empty_vae

KIND_OF_PART: dict[Part, Kind] = {
    "high": "transformer",
    "low": "transformer",
    "single": "transformer",
    "vae": "vae",
    "text_encoder": "text_encoder",
}
NAME_OF_PART: dict[Part, str] = {
    "high": "high-noise transformer",
    "low": "low-noise transformer",
    "single": "transformer",
    "vae": "VAE",
    "text_encoder": "UMT5 text encoder",
}
NAME_OF_KIND: dict[Kind, str] = {
    "transformer": "a transformer",
    "vae": "a VAE",
    "text_encoder": "a text encoder",
}
KEY_OF_PART: dict[Part, str] = {
    "high": "model.high",
    "low": "model.low",
    "single": "model.path",
    "vae": "model.vae",
    "text_encoder": "model.text_encoder",
}
CLASSES: dict[tuple[Kind, bool], str] = {  # (kind, official naming) -> _class_name in config.json
    ("transformer", True): "WanModel",
    ("transformer", False): "WanTransformer3DModel",
    ("vae", False): "AutoencoderKLWan",
}
MODEL_TYPES = {"none": "t2v", "channels": "i2v", "first_frame": "ti2v"}
WIDTHS = {1536: "the 1.3B models of Wan 2.1", 3072: "TI2V-5B", 5120: "the 14B models"}
CHANNELS = {16: "T2V-A14B", 36: "I2V-A14B", 48: "TI2V-5B"}
VAES = {16: "the Wan 2.1 VAE, of the A14B models", 48: "the Wan 2.2 VAE, of TI2V-5B alone"}
WAN_21_I2V = "the image-to-video models of Wan 2.1 have it"


def checked(found: Found, part: Part, facts: Variant) -> Weights:
    """What was found as this part of the variant; `ModelError` says why it cannot be."""
    if found.kind != KIND_OF_PART[part]:
        raise ModelError(
            f"{found.place} holds {NAME_OF_KIND[found.kind]}, but {KEY_OF_PART[part]} must name "
            f"the {NAME_OF_PART[part]} of {facts.title}"
        )
    if is_other_expert(found, part):
        other = "low" if part == "high" else "high"
        raise ModelError(
            f"{found.files[0]} is the {NAME_OF_PART[other]} by its name, and was given as "
            f"the {NAME_OF_PART[part]}: set {KEY_OF_PART[other]} to it, and {KEY_OF_PART[part]} "
            "to the other file (or rename it, if its name is wrong)"
        )
    config = _settings(found, facts)
    _check_fit(found, config)
    return Weights(part, found.files, found.naming, found.prefix, found.storage, config)


def is_other_expert(found: Found, part: Part) -> bool:
    """Whether the names of the files say that they are the other expert's."""
    told = expert_by_name(found.files[0])
    return part in ("high", "low") and told is not None and told != part


def _settings(found: Found, facts: Variant) -> Settings:
    """The arguments of the library's class: its config.json, or else what the shapes tell.

    Either must be of the variant, and they must agree.
    """
    file, config = _config_beside(found)
    official = config.get("_class_name") == CLASSES["transformer", True]
    if official:
        _check_model_type(file, config, facts)
    else:
        _check_settings(file, config, found, facts)
    given = config.get("num_heads" if official else "num_attention_heads")
    heads = given if isinstance(given, int) else None
    settings = settings_of_shapes(found, facts, heads)
    if not official and (name := contradiction(config, settings)):
        raise ModelError(
            f"{file}: {name} is {config[name]}, but its weights have {settings[name]}: the config "
            f"is another model's; {INCOMPLETE}"
        )
    _check_settings(found.place, settings, found, facts)
    if found.kind == "transformer":
        _check_identity(found, facts)
    if official or not config:
        return config_of_shapes(found, facts, heads)
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _config_beside(found: Found) -> tuple[Path, Settings]:
    """(file, content) of the config.json next to the weights, if it is of such a part; or ({})."""
    file = found.files[0].parent / "config.json"
    if not file.is_file():
        return file, {}
    config = read_json(file)
    expected = CLASSES.get((found.kind, found.naming == "official"))
    is_its_own = expected is not None and config.get("_class_name") == expected
    if found.naming == "transformers":
        is_its_own = config.get("model_type") == "umt5"
    return file, config if is_its_own else {}


def _check_settings(
    place: Path, settings: Mapping[str, object], found: Found, facts: Variant
) -> None:
    """A transformer or VAE must have the variant's channels; `settings` may leave some out."""
    for name, value in _expected(found.kind, facts).items():
        # A setting that a config leaves out has the library's default, which is Wan's.
        given = settings.get(name, value)
        if given != value:
            hint = _hint(found.kind, name, given)
            raise ModelError(
                f"{place}: {name} is {given}, but {facts.title} has {value}{hint}: this is "
                f"another model; give the one of {facts.title}"
            )


def _expected(kind: Kind, facts: Variant) -> Settings:
    geometry = facts.geometry
    patch = geometry.multiple // geometry.space_stride
    if kind == "vae":
        return {
            "z_dim": geometry.channels,
            "scale_factor_temporal": geometry.time_stride,
            "scale_factor_spatial": geometry.space_stride,
            "is_residual": facts.vae.is_residual,
        }
    if kind == "text_encoder":
        return {}
    return {
        "in_channels": facts.in_channels,
        "out_channels": geometry.channels,
        "patch_size": [1, patch, patch],
        "image_dim": None,
        "added_kv_proj_dim": None,
    }


def _hint(kind: Kind, name: str, value: object) -> str:
    if name in ("image_dim", "added_kv_proj_dim"):
        return f" ({WAN_21_I2V})"
    owners = {"in_channels": CHANNELS, "z_dim": VAES}.get(name, {})
    owner = owners.get(value) if isinstance(value, int) else None
    if owner is None:
        return ""
    return f" (it is {owner})" if kind == "vae" else f" ({owner} has {value})"


def _check_model_type(file: Path, config: Settings, facts: Variant) -> None:
    kind, expected = config.get("model_type"), MODEL_TYPES[facts.conditioning]
    if kind != expected:
        raise ModelError(
            f"{file}: model_type is {kind!r}, but {facts.title} has {expected!r}: this is another "
            f"model; give the one of {facts.title}"
        )


def _check_identity(found: Found, facts: Variant) -> None:
    """Refuse another size of Wan, and what is called Wan 2.1, which no header tells from 2.2."""
    dim = found.shapes["patch_embedding.weight"][0]
    if dim in WIDTHS and dim != facts.transformer.dim:
        raise ModelError(
            f"{found.place} is {dim} channels wide, as {WIDTHS[dim]} are, but {facts.title} is "
            f"{facts.transformer.dim} wide: this is another model; give the one of {facts.title}"
        )
    if is_called_wan_21(found.files[0]):
        raise ModelError(
            f"{found.files[0]} is called Wan 2.1, which cannot be told from {facts.title} by its "
            "content; give the model of Wan 2.2, or rename it, if its name is wrong"
        )


def _check_fit(found: Found, config: Settings) -> None:
    """The files must hold exactly the tensors of the model that the config describes."""
    build = {
        "transformer": empty_transformer,
        "vae": empty_vae,
        "text_encoder": empty_text_encoder,
    }
    tensors = build[found.kind](config).state_dict()
    expected = {name: tuple(t.shape) for name, t in tensors.items() if name != TIED_EMBEDDING}
    findings = {
        "missing": expected.keys() - found.shapes.keys(),
        "unexpected": found.shapes.keys() - expected.keys(),
        "of another shape": {n for n in expected if found.shapes.get(n) != expected[n]},
    }
    for finding, names in findings.items():
        if names:
            raise ModelError(
                f"the weights in {found.place} do not fit the model's config: {len(names)} are "
                f"{finding}, such as {min(names)}; {INCOMPLETE}"
            )
