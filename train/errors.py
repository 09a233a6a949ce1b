"""One clear sentence, in place of a traceback, for everything that a user can get wrong."""

import difflib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import yaml
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    OmegaConfBaseException,
    ValidationError,
)

from data.items import DataError
from train.compose import keys_within, section_told, unknown_key
from train.config import schema
from train.rules import ConfigError, MemoryFull, TrainingStopped
from wan.headers import ModelError

# What one of several processes may meet alone: a clip that is gone, memory that is full.
OF_ONE_PROCESS = (DataError, MemoryFull)
# What Hydra raises for some settings that are none: it has no class of its own for them.
RAISED_BY_HYDRA = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    RecursionError,
    OSError,
)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Print a user's mistake as one message on stderr and exit with status 2.

    Errors of the program itself pass through with their traceback. Hydra reports an error that
    leaves the job by a line of its own, so the entry file uses this inside the job and around it.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them
    try:
        yield
    except (
        ConfigError,
        DataError,
        ModelError,
        TrainingStopped,
        OverrideParseException,
        ConfigCompositionException,
        OmegaConfBaseException,
    ) as error:
        # Under a launcher one process speaks for all, but of what it does not know.
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, OF_ONE_PROCESS):
            sys.stderr.write(f"error: {explain(error)}\n")
        raise SystemExit(2) from None
    except (*RAISED_BY_HYDRA, yaml.YAMLError) as error:
        if not isinstance(error, yaml.YAMLError) and not _reads_settings(error):
            raise
        found = str(error).strip().splitlines() or [type(error).__name__]
        sys.stderr.write(
            f"error: the settings cannot be read ({found[0][:200]!a}); correct what you typed, or "
            f"the file of conf that you chose{_line(error)}\n"
        )
        raise SystemExit(2) from None
    except RuntimeError as error:
        if not _lost_a_process(error):
            raise
        sys.stderr.write(
            "error: another process of this run has ended, and so does this one. What it said, or "
            "what the launcher says of it, is the cause; then the same command goes on.\n"
        )
        raise SystemExit(2) from None


def _lost_a_process(error: RuntimeError) -> bool:
    """Whether a process that this one waited for is gone: gloo's errors have no class."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


def _reads_settings(error: Exception) -> bool:
    """Whether Hydra, or what it reads with, raised this itself, and not the program inside it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return module.split(".")[0] in ("hydra", "omegaconf", "yaml", "antlr4", "codecs")


def _line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" (line {mark.line + 1})" if mark is not None else ""


def explain(error: Exception) -> str:
    """What is wrong and what to do, from an exception of ours, of Hydra or of OmegaConf."""
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if isinstance(error, MissingConfigException):
        return _no_such_file(error)
    composing = isinstance(error, ConfigCompositionException)
    cause = (error.__cause__ or error.__context__) if composing else error
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return _place(error) + _wrong_setting(cause)
    return str(error)


def _unreadable(error: OverrideParseException) -> str:
    setting = error.override
    if "=" not in setting:
        return f"{setting} is not a setting: write key=value, such as lora.rank=32"
    return (
        f"{setting} cannot be read. Put a value with spaces, commas, brackets or letters beyond "
        "a to z into two kinds of quotes: 'preview.prompts=[\"A ball, rolling.\"]'"
    )


def _no_such_file(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    options = list(error.options or [])
    near = difflib.get_close_matches(name, options, n=2)
    guess = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(options)}."
    return f"{group}={name}: there is no file conf/{group}/{name}.yaml; {guess}"


def _place(error: Exception) -> str:
    """The YAML file in which a setting stands, or nothing if it stands on the command line."""
    text = str(error)
    return f"conf/{text.split(chr(39))[1]}.yaml: " if text.startswith("In '") else ""


def _wrong_setting(error: OmegaConfBaseException) -> str:
    path = str(error.full_key)
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)):
        return str(unknown_key(path, schema()))
    known = schema().get(path)
    keys = keys_within(path)
    if isinstance(error, ValidationError) and keys:
        return section_told(path, keys)
    found = str(error.msg or error).splitlines()[0].rstrip(".")
    if known is None:
        return f"{path}: {found}."
    expected = f"{known.type}, {known.rule.text}" if known.rule else known.type
    return f"{path}: {found}. Expected {expected} ({known.doc})."
