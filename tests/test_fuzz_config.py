"""Hostile settings: a checked `Config`, or status 2 and one sentence on stderr."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import hydra
import pytest
from fuzzing import LONGEST, cases, damaged, in_time
from hypothesis import given
from hypothesis import strategies as st

from train.compose import CONF, check, compose, typed
from train.config import Config, schema
from train.errors import clear_errors

BASE = ("name=fuzzed", "model=tiny", "data.path=data")
EXPERIMENTS = [found.read_bytes() for found in sorted((CONF / "experiment").iterdir())]
SECTIONS = [found.name for found in sorted(CONF.iterdir()) if found.is_dir()]
KEYS = [*schema(), *SECTIONS, "experiment", "data.mix.a", "data.mix.a.path", "data", "lora", "high"]
LONG = "9" * 5000
WORDS = (
    *(
        "0",
        "-1",
        "1",
        "16",
        "1e999",
        "nan",
        "-inf",
        "null",
        "true",
        "~",
        "???",
        "[]",
        "{}",
        "''",
        '""',
    ),
    *(LONG, "1_0", "0x10", "[0.5,nan]", "[[1]]", "{a: 1}", "{path: x}", "{a: {b: {c: []}}}"),
    *(
        "${seed}",
        "${name}",
        "${",
        "${nothing}",
        "${oc.env:NO_SUCH}",
        "${oc.decode:'['}",
        "${.name}",
    ),
    *(
        "high",
        "[high]",
        "[low,low]",
        "tiny",
        "demo",
        "i2v_a14b",
        "../../etc",
        "/",
        "a,b",
        "é",
        "\ud800",
    ),
    *(
        "[" * 300,
        "{a:" * 300,
        "blocks.(",
        ".*",
        "choice(1,2)",
        "range(1,9)",
        "sort(3,1)",
        "\x00",
        "\n",
    ),
)
VALUES = st.one_of(
    st.sampled_from(WORDS), st.text(max_size=8), st.integers().map(str), st.floats().map(str)
)


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """A key that is known, or nearly, and a value that may be of any type."""
    known = draw(st.sampled_from(KEYS))
    key = draw(
        st.sampled_from([known] * 6 + [known[:-1], f"{known}.x", f"{known}@_here_", "", "a=b"])
    )
    before = draw(st.sampled_from([""] * 6 + ["+", "++", "~", "hydra.", "--"]))
    override = f"{before}{key}={draw(VALUES)}"
    return [*BASE, override, *draw(st.lists(VALUES, max_size=1))]


@st.composite
def trees(draw: st.DrawFn) -> bytes:
    """Settings of an experiment's file, as JSON, which is YAML too."""
    settings: dict[str, object] = {}
    for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3)):
        section, *names = key.split(".")
        place = settings
        for name in (section, *names)[:-1]:
            inner = place.setdefault(name, {})
            place = inner if isinstance(inner, dict) else {}
        word = draw(VALUES)
        place[key.split(".")[-1]] = draw(
            st.sampled_from([word, [word], {word: word}, None, 1, 0.5])
        )
    return b"# @package _global_\n" + json.dumps(settings).encode()


def check_answer(composed: Callable[[], Config]) -> None:
    """A configuration that holds every rule, or exit status 2 and something to read."""
    said = io.StringIO()
    try:
        with in_time(), redirect_stderr(said), clear_errors():
            check(composed())
    except SystemExit as stopped:
        status = stopped.code
    else:
        return
    assert status == 2
    assert said.getvalue().startswith("error: ")
    assert len(said.getvalue().split()) > 3
    assert len(said.getvalue()) < LONGEST + 2 * len(LONG)  # what was typed may be said again


@cases(each_day=80)
@given(overrides())
def test_hostile_overrides(arguments: list[str]) -> None:
    check_answer(lambda: compose(arguments))


@cases(0.25, each_day=30)
@given(st.one_of(trees(), damaged(*EXPERIMENTS)))
def test_hostile_yaml_files(tmp_path: Path, content: bytes) -> None:
    conf = tmp_path / "conf"  # of all cases: hypothesis hands out one folder
    if not conf.exists():
        shutil.copytree(CONF, conf)
    (conf / "experiment" / "fuzzed.yaml").write_bytes(content)

    def composed() -> Config:
        with hydra.initialize_config_dir(str(conf), version_base="1.3"):
            return typed(hydra.compose("config", [*BASE, "experiment=fuzzed"]))

    check_answer(composed)


def test_what_hydra_has_no_error_for_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, clear_errors():
        compose([*BASE, "=5"])
    assert stopped.value.code == 2
    assert "the settings cannot be read" in capsys.readouterr().err


def test_a_file_of_settings_that_holds_a_number_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("9")
    conf = hydra.initialize_config_dir(str(tmp_path / "conf"), version_base="1.3")
    with pytest.raises(SystemExit) as stopped, clear_errors(), conf:
        hydra.compose("config", [*BASE, "experiment=mine"])
    assert stopped.value.code == 2
    assert "the settings cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("lora.rank_pattern=${seed}", "lora.rank_pattern is ${seed}: expected dict[str, int]"),
        ("lora.rank_pattern=${high}", "lora.rank_pattern is ${high}: expected"),
        ("optim.args=${lora}", "optim.args is ${lora}: expected dict[str"),
        ("optim.args.betas=${lora}", "optim.args.betas is ${lora}, but what an optimizer takes"),
        ("+optim.args.x={a: ['${lora}']}", "optim.args.x is {'a': ['${lora}']}, but"),
        ("data.mix=${seed}", "data.mix is ${seed}: expected dict[str"),
        ("preview.prompts=${seed}", "preview.prompts is ${seed}: expected list[str]"),
        ("experts=${name}", "experts is ${name}: expected list[str]"),
        ("+lora.rank_pattern={a: '${name}'}", "lora.rank_pattern.a: While dereferencing"),
        ("preview.seeds=['${name}']", "preview.seeds[0]: While dereferencing"),
        ("lora=5", "lora is a section, not a key: set lora.rank, "),
        ("++data=${name}", "data is a section, not a key: set data.path, "),
        ("++high=${low}", "high is a section, not a key: set high.rank, "),
    ],
)
def test_values_of_another_type_are_told(
    capsys: pytest.CaptureFixture[str], setting: str, expected: str
) -> None:
    with pytest.raises(SystemExit), clear_errors():
        compose([*BASE, setting])
    assert f"error: {expected}" in capsys.readouterr().err


def test_errors_of_the_program_keep_their_traceback() -> None:
    with pytest.raises(ValueError, match="ours"), clear_errors():
        raise ValueError("ours")
