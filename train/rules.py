"""What a setting of a run is and what its values must be; how a run tells that it cannot go on."""

import copy
import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from omegaconf import MISSING

from wan.variants import EXPERTS

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting of the run is wrong. The message names the key, what was found and what to do."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says where it stopped and what to do."""


class MemoryFull(TrainingStopped):
    """The memory of this process's device is full; that of others may not be."""


@dataclass(frozen=True)
class Rule:
    """What a value must be beyond its type, in words and as a test. NaN never passes."""

    text: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Key:
    """One setting, as the docs and the error messages show it."""

    path: str
    type: str
    default: object
    unit: str
    doc: str
    rule: Rule | None


COUNT = Rule("a whole number of at least 1", lambda n: n >= 1)
COUNT_OR_0 = Rule("a whole number of at least 0", lambda n: n >= 0)
POSITIVE = Rule("a number above 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Rule("a number of at least 0", lambda x: 0 <= x < math.inf)
SHARE = Rule("a number from 0 to 1", lambda x: 0 <= x <= 1)
PROBABILITY = Rule("a number of at least 0 and below 1", lambda x: 0 <= x < 1)
INNER_SHARE = Rule("a number above 0 and below 1", lambda x: 0 < x < 1)
UP_TO_HALF = Rule("a number above 0 and at most 0.5", lambda x: 0 < x <= 0.5)
PIXELS = Rule("a whole number of at least 16", lambda n: n >= 16)
FRAMES = Rule("4n+1 frames, such as 1, 5, 13, 49 or 81", lambda n: n >= 1 and n % 4 == 1)
NOT_BLANK = Rule("some text", lambda text: bool(text.strip()))
FILE_NAME = Rule(
    "a file name of letters, digits, '.', '_' and '-'",
    lambda text: re.fullmatch(r"\w[\w.-]*", text) is not None,
)
DOTTED_NAME = Rule(
    "the dotted name of a class, such as torch.optim.AdamW",
    lambda text: re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", text) is not None,
)
SEEDS = Rule("one or more whole numbers of at least 0", lambda ns: bool(ns) and min(ns) >= 0)
RANKS = Rule("whole numbers of at least 1", lambda ranks: all(n >= 1 for n in ranks.values()))
SCALES = Rule("one or more numbers above 0", lambda xs: bool(xs) and 0 < min(xs) < math.inf)
EXPERT_LIST = Rule(
    "[high], [low] or [high, low], and [single] for TI2V-5B",
    lambda names: (
        bool(names) and set(names) <= {*EXPERTS, "single"} and len(set(names)) == len(names)
    ),
)


def one_of(*choices: str) -> Rule:
    """The rule of a key that takes one of a few words."""
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices)


def key(default: T, doc: str, unit: str = "", rule: Rule | None = None) -> T:
    """A dataclass field that carries its meaning; typed as its default so that it reads as one."""
    metadata = {"doc": doc, "unit": unit, "rule": rule}
    if isinstance(default, (list, dict)):
        return field(default_factory=partial(copy.copy, default), metadata=metadata)
    return field(default=default, metadata=metadata)


def keys_of(section: type, prefix: str) -> list[Key]:
    """Every key of a dataclass of settings and of the sections in it, in their order."""
    keys: list[Key] = []
    for item in dataclasses.fields(section):
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            keys += keys_of(item.type, f"{prefix}{item.name}.")
            continue
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        name = item.type.__name__ if type(item.type) is type else str(item.type)
        keys.append(Key(path=prefix + item.name, type=name, default=default, **item.metadata))
    return keys


def check_value(known: Key, value: object) -> None:
    """Raise `ConfigError` if a value breaks its key's rule; null breaks none."""
    if value is not None and known.rule is not None and not known.rule.holds(value):
        raise ConfigError(
            f"{known.path} is {written(value)}: expected {known.rule.text} ({known.doc}). "
            f"{_mend(known)}"
        )


def written(value: object) -> str:
    """A value as one would write it in YAML: [a, b], null, true."""
    if isinstance(value, list):
        return f"[{', '.join(written(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value) or '""'


def _mend(known: Key) -> str:
    default = str(known.default)
    if default == MISSING:
        return f"Set {known.path}=… on the command line."
    if default.startswith("${"):
        return f"Set {known.path}=…, or {default[2:-1]}=… from which it comes by default."
    return f"Set another value; the default is {known.path}={written(known.default)}."
