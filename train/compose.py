"""From command-line arguments and YAML files to one checked `Config`, or one clear sentence.

Hydra composes; after `typed` nothing sees a Hydra object any more.
"""

import difflib
from collections.abc import Collection, Mapping
from operator import attrgetter
from pathlib import Path

import hydra
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ValidationError

from train.config import EMBEDDED, Config, SourceConfig, schema
from train.rules import ConfigError, Key, check_value, keys_of
from wan.adapter_choices import BLOCK_LINEARS, PRESETS, module_ranks, target_modules
from wan.variants import VARIANTS, Expert

CONF = Path(__file__).resolve().parent.parent / "conf"
OF_USERS = ("optim.args", "lora.rank_pattern")  # tables whose keys are not ours


def unknown_key(path: str, keys: Mapping[str, Key]) -> ConfigError:
    """The error for a key that is none of `keys`, with those that look like it."""
    if path.startswith("optim.args."):
        return ConfigError(f"{path} is not set yet: to add it, write +{path}=…")
    if path.startswith("lora.rank_pattern."):
        return ConfigError("to add to lora.rank_pattern, write '+lora.rank_pattern={REGEX: RANK}'")
    if path.split(".")[-1] in ("boundary", "boundary_ratio"):
        facts = [f"{v.boundary:g} of {name}" for name, v in VARIANTS.items() if v.boundary]
        return ConfigError(
            f"{path} is not a key: at which noise the experts take turns belongs to model.variant "
            f"({', '.join(facts)}), and another boundary would train each on the other's noise."
        )
    groups = {
        folder.name: f"a file of conf/{folder.name}" for folder in CONF.iterdir() if folder.is_dir()
    }
    known = groups | {name: found.doc for name, found in keys.items()}
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.8)
    if not near:  # the right key in the wrong section, such as rank or data.rank
        ends = difflib.get_close_matches(
            path.split(".")[-1], {n.split(".")[-1] for n in known}, n=1
        )
        near = [name for name in known if name.split(".")[-1] in ends]
    if not near:
        return ConfigError(f"{path} is not a key. conf/config.yaml lists them all.")
    guesses = " or ".join(f"{name} ({known[name]})" for name in near)
    return ConfigError(f"{path} is not a key; did you mean {guesses}?")


def typed(cfg: DictConfig) -> Config:
    """The composed settings as checked plain dataclasses; `ConfigError` if one is wrong."""
    values = leaves(OmegaConf.to_container(cfg), of_users=OF_USERS)
    _refuse_sections(values)
    _refuse_references(values)
    mixed = [f"data.mix.{name}" for name in cfg.data.mix]
    known = schema() | {found.path: found for name in mixed for found in _source_keys(name)}
    for path in values:
        if path not in known:  # +lora.rnak=3 gets past Hydra
            raise unknown_key(path, known)
    missing = [path for path, value in values.items() if value == MISSING]
    missing += [f"{name}.path" for name in mixed if f"{name}.path" not in values]
    if missing:
        raise ConfigError(
            f"not set: {', '.join(f'{path} ({known[path].doc})' for path in missing)}. Write "
            f"{' '.join(f'{path}=…' for path in missing)} on the command line, or choose an "
            "experiment that sets this, such as experiment=demo."
        )
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config), "the defaults list of conf/config.yaml begins with `schema`"
    config.data.mix = {name: _source(name, cfg.data.mix[name]) for name in config.data.mix}
    check(config)
    return config


def _source(name: str, given: DictConfig) -> SourceConfig:
    """One dataset of `data.mix`, its types checked."""
    try:
        source = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), given))
    except ValidationError as error:
        found = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"data.mix.{name}.{error.full_key}: {found}.") from None
    assert isinstance(source, SourceConfig)
    return source


def section_told(path: str, keys: list[str]) -> str:
    """That `path` is a section of settings, and which `keys` can be set in it."""
    return f"{path} is a section, not a key: set {', '.join(keys)}"


def keys_within(path: str) -> list[str]:
    """The keys of a section of settings; none if `path` is not one."""
    return [name for name in schema() if name.startswith(f"{path}.")]


def _refuse_sections(values: Mapping[str, object]) -> None:
    """A section in whose place one value stands: Hydra lets `++data=${name}` pass."""
    for path in values:
        if path not in schema() and keys_within(path):
            raise ConfigError(section_told(path, keys_within(path)))


def _refuse_references(values: Mapping[str, object]) -> None:
    """Lists and tables are written out: what `${...}` stands for there, OmegaConf never checks."""
    for path, known in schema().items():
        value = values.get(path)
        if isinstance(value, str) and value != MISSING and known.type.startswith(("list", "dict")):
            raise ConfigError(
                f"{path} is {value}: expected {known.type} ({known.doc}). Write its values out."
            )
    args = values.get("optim.args")
    for name, value in args.items() if isinstance(args, dict) else ():
        if "${" in str(value):
            raise ConfigError(
                f"optim.args.{name} is {value}, but what an optimizer takes is written out, as "
                "nothing checks what a reference stands for. Write its value."
            )


def _source_keys(prefix: str) -> list[Key]:
    """The keys of one dataset of `data.mix`, which users name."""
    return keys_of(SourceConfig, f"{prefix}.")


def leaves(value: object, path: str = "", of_users: Collection[str] = ()) -> dict[str, object]:
    """What nested tables hold, by dotted paths; those at `of_users` and empty ones stay whole."""
    if not isinstance(value, Mapping) or path in of_users or not value:
        return {path: value}
    inner = [leaves(v, f"{path}.{name}".strip("."), of_users) for name, v in value.items()]
    return {name: leaf for part in inner for name, leaf in part.items()}


def compose(overrides: list[str]) -> Config:
    """The run that these command-line arguments describe, for tests and tools."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(hydra.compose("config", overrides))


def resolved_yaml(config: Config) -> str:
    """The configuration of a run as YAML without interpolations, for its folder."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def check(config: Config) -> None:
    """Raise `ConfigError` at the first value that cannot work, alone or with the others."""
    for path, known in schema().items():
        check_value(known, attrgetter(path)(config))
    for name, source in config.data.mix.items():
        for known in _source_keys(f"data.mix.{name}"):
            check_value(known, getattr(source, known.path.split(".")[-1]))
    _check_together(config)


def trained_experts(config: Config) -> tuple[Expert, ...]:
    """The experts that a run trains, in the model's order."""
    experts = VARIANTS[config.model.variant].experts
    return tuple(expert for expert in experts if expert in (config.experts or experts))


def _check_together(config: Config) -> None:
    _check_model(config)
    _check_experts(config)
    _check_data(config)
    _check_condition(config)
    _check_looks(config)
    _check_lora(config)
    _check_shard(config)
    timesteps, optim = config.timesteps, config.optim
    if timesteps.base == "uniform" and timesteps.scale != 1:
        raise ConfigError(
            f"timesteps.scale is {timesteps.scale:g}, which has no effect with "
            "timesteps.base=uniform. Leave it out, or set timesteps.base=logit_normal."
        )
    if "lr" in optim.args:
        raise ConfigError("optim.args has lr: the learning rate is set as optim.learning_rate.")
    if optim.name == "torch.optim.Muon" and config.lora.kind == "dora":
        raise ConfigError(
            "optim.name is torch.optim.Muon, which takes matrices alone, but lora.kind=dora has "
            "vectors too. Use optim=adamw, or set lora.kind=lora."
        )
    for expert in trained_experts(config):
        steps = attrgetter(f"{expert}.steps")(config)
        if optim.warmup_steps >= steps:
            raise ConfigError(
                f"optim.warmup_steps is {optim.warmup_steps}, but {expert}.steps is {steps}: the "
                "full learning rate is never reached. Set a shorter warm-up or more steps."
            )


def _check_model(config: Config) -> None:
    model, facts = config.model, VARIANTS[config.model.variant]
    if model.path == EMBEDDED and model.variant != "tiny":
        raise ConfigError(
            f"model.path is {EMBEDDED}, but only the variant tiny lies in this repository, and "
            f"model.variant is {model.variant}. Set model.path to the folder of its weights."
        )
    foreign = [expert for expert in config.experts or [] if expert not in facts.experts]
    if foreign:
        raise ConfigError(
            f"experts holds {foreign[0]}, but {facts.title} has {' and '.join(facts.experts)}. "
            "Leave experts out to train all that the model has."
        )
    for expert in ("high", "low"):
        if getattr(model, expert) is not None and expert not in facts.experts:
            raise ConfigError(
                f"model.{expert} is {getattr(model, expert)}, but {facts.title} has one "
                "transformer: give it as model.path."
            )


def _check_experts(config: Config) -> None:
    """Settings of an expert that the model does not have would be read by nothing."""
    facts = VARIANTS[config.model.variant]
    derived = {
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "learning_rate": config.optim.learning_rate,
        "steps": config.steps,
    }
    for expert in ("high", "low", "single"):
        for name, value in derived.items():
            found = attrgetter(f"{expert}.{name}")(config)
            if expert not in facts.experts and found != value:
                raise ConfigError(
                    f"{expert}.{name} is {found:g}, which has no effect with model.variant="
                    f"{facts.name}: it has {' and '.join(facts.experts)}. Set "
                    f"{facts.experts[0]}.{name}, or leave it out."
                )


def lora_ranks(config: Config, rank: int) -> dict[str, int]:
    """The rank of each linear that gets an adapter, for an expert of this rank."""
    layers = VARIANTS[config.model.variant].transformer.layers
    linears = [f"blocks.{i}.{linear}" for i in range(layers) for linear in BLOCK_LINEARS]
    targets, pattern = config.lora.targets, config.lora.rank_pattern
    chosen = target_modules(targets) if targets in PRESETS else targets
    try:
        return module_ranks(linears, chosen, rank, pattern)
    except ValueError as error:
        raise ConfigError(
            f"lora.targets is {targets}, lora.rank_pattern {pattern}: {error}. Layers are called "
            f"{linears[0]} to {linears[-1]}; presets of targets are {', '.join(PRESETS)}."
        ) from None


def _check_lora(config: Config) -> None:
    lora = config.lora
    lora_ranks(config, lora.rank)
    if lora.kind in ("loha", "lokr"):
        if lora.init is not None:
            raise ConfigError(
                f"lora.init is {lora.init}, but lora.kind is {lora.kind}, which no file's product "
                "can be turned into. Set lora.kind=lora, rslora or dora, or leave lora.init out."
            )
        if config.optim.b_ratio != 1:
            raise ConfigError(
                f"optim.b_ratio is {config.optim.b_ratio:g}, but lora.kind is {lora.kind}, which "
                "has no factors A and B. Leave one of the two out."
            )
    if lora.ema is not None and config.optim.name.startswith("schedulefree"):
        raise ConfigError(
            f"lora.ema is {lora.ema:g}, but optim.name is {config.optim.name}, which keeps an "
            "average by itself. Leave lora.ema out."
        )
    if config.export.weights != "live" and lora.ema is None:
        raise ConfigError(
            f"export.weights is {config.export.weights}, but lora.ema is null: there is no average "
            "to export. Set lora.ema=0.999, or export.weights=live."
        )


def _check_shard(config: Config) -> None:
    """A sharded base is whole blocks of many processes, in the format in which they were read."""
    if config.speed.placement != "shard":
        return
    if config.speed.frozen is not None:
        raise ConfigError(
            f"speed.placement is shard, but speed.frozen is {config.speed.frozen}: a base in fewer "
            "bits cannot be sharded. Set speed.placement=swap, or speed.frozen=null."
        )
    if config.launch == "experts":
        raise ConfigError(
            "speed.placement is shard, but launch is experts, where each process trains alone. Set "
            "speed.placement=swap, or leave launch out."
        )
    if config.lora.kind == "dora":
        raise ConfigError(
            "speed.placement is shard, but lora.kind is dora, which needs whole weights for its "
            "norms. Set speed.placement=swap, or lora.kind=lora."
        )


def _check_data(config: Config) -> None:
    data, known = config.data, schema()
    if data.heldout_path and not data.heldout_path.endswith(".txt"):
        if data.heldout_fraction != known["data.heldout_fraction"].default:
            raise ConfigError(
                f"data.heldout_fraction is {data.heldout_fraction:g}, which has no effect next to "
                f"data.heldout_path={data.heldout_path}. Leave one of the two out."
            )
        if Path(data.heldout_path).resolve() == Path(data.path).resolve():
            raise ConfigError(
                f"data.heldout_path is {data.heldout_path}, what is trained on. Set another "
                "folder, or leave it out to hold out a share of data.path."
            )
    for name, extraction in (("windows", "uniform"), ("stride", "sliding")):
        value = getattr(data, name)
        if value is not None and data.extraction != extraction:
            raise ConfigError(
                f"data.{name} is {value}, which has no effect with data.extraction="
                f"{data.extraction}. Leave it out, or set data.extraction={extraction}."
            )
    if data.extraction == "uniform" and data.windows is None:
        raise ConfigError(
            "data.extraction is uniform and data.windows is null. Set data.windows to how many "
            "windows to take of each video."
        )
    for name, source in data.mix.items():
        if source.regularisation and source.prefix:
            raise ConfigError(
                f"data.mix.{name}.prefix is {source.prefix!r}, which has no effect on a "
                "regularisation set: its captions stay as they are. Leave one of the two out."
            )


def _check_looks(config: Config) -> None:
    preview = config.preview
    if config.eval.early_stop and config.eval.every == 0:
        raise ConfigError(
            "eval.early_stop is true, but eval.every is 0: nothing is measured on the way. Set "
            "eval.every=250, or leave early_stop out."
        )
    for name in ("steps", "shift", "guidance_high", "guidance_low"):
        value = getattr(preview, name)
        if preview.distilled and value is not None:
            raise ConfigError(
                f"preview.{name} is {value:g}, which has no effect next to preview.distilled: its "
                "adapters need settings of their own. Leave one of the two out."
            )
    if preview.shift is not None and not preview.prompts:
        raise ConfigError(
            f"preview.shift is {preview.shift:g}, which has no effect with preview.prompts=[]: "
            "nothing is rendered. Leave one of the two out; the shift of training is "
            "timesteps.shift."
        )
    facts = VARIANTS[config.model.variant]
    if preview.guidance_high is not None and "high" not in facts.experts:
        raise ConfigError(
            f"preview.guidance_high is {preview.guidance_high:g}, which has no effect with "
            f"model.variant={facts.name}: the scale of its one transformer is "
            "preview.guidance_low. Leave it out."
        )
    if preview.grid and len(trained_experts(config)) < 2:
        raise ConfigError(
            "preview.grid is true, but one expert alone is trained: there is no other adapter to "
            "leave out. Leave it out."
        )


def _check_condition(config: Config) -> None:
    facts, condition, preview = VARIANTS[config.model.variant], config.condition, config.preview
    if facts.conditioning == "channels" and config.data.frames == 1:
        raise ConfigError(
            f"data.frames is 1, but model.variant is {facts.name}, which learns how an image moves "
            "on: with images alone there is nothing to learn. Set data.frames=81, or train "
            "model=t2v_a14b."
        )
    for name, needed in (("first_frame", "first_frame"), ("last_frame", "channels")):
        value = getattr(condition, name)
        if value is not None and facts.conditioning != needed:
            meant = [v.title for v in VARIANTS.values() if v.conditioning == needed]
            raise ConfigError(
                f"condition.{name} is {value:g}, which has no effect with {facts.title}: it is a "
                f"setting of {' and '.join(meant)}. Leave it out."
            )
    if preview.images and facts.conditioning == "none":
        raise ConfigError(
            f"preview.images is set, but {facts.title} takes no image. Leave it out, or train "
            "model=i2v_a14b or model=ti2v_5b."
        )
    if preview.images and len(preview.images) != len(preview.prompts):
        raise ConfigError(
            f"preview.images holds {len(preview.images)} and preview.prompts "
            f"{len(preview.prompts)}: give one image for each prompt, in the same order."
        )
    if facts.conditioning == "channels" and preview.prompts and not preview.images:
        raise ConfigError(
            f"preview.prompts is set without preview.images: {facts.title} makes videos from "
            "images. Give one image for each prompt, or preview.prompts=[] for no previews."
        )
