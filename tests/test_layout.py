"""The house: who may import whom, what files may be called, and what every YAML key must have."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "wan": {"wan"},
    "data": {"data"},
    "train": {"train", "wan", "data"},
    "tools": {"tools", "train", "wan", "data"},
}
MODULES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which package is meant"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    modules = [path for path in MODULES if path.is_relative_to(ROOT / package)]
    assert modules
    for path in modules:
        rooms = {name.split(".")[0] for name in imported_modules(path)} & MAY_IMPORT.keys()
        assert rooms <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {rooms}"


def test_only_tests_import_the_entry_file() -> None:
    # Run as a script it is __main__: imported as well, everything in it would exist twice.
    for path in MODULES:
        for name in imported_modules(path):
            assert name.split(".")[:2] != ["train", "lora"], path.relative_to(ROOT)


def test_no_script_folder_shadows_a_module() -> None:
    # A script's folder is the first place where Python looks for every import.
    ours = set(MAY_IMPORT) | {"tests", "conf"}
    taken = set(sys.stdlib_module_names) | set(packages_distributions()) | ours
    names = {path.stem for folder in ("train", "tools") for path in (ROOT / folder).iterdir()}
    assert not (names - {"__init__", "__pycache__"}) & taken


def test_every_file_is_named_for_what_is_in_it() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    tests = [*(ROOT / "tests").rglob("*.py")]
    assert not [path for path in [*MODULES, *tests] if set(path.stem.split("_")) & vague]


def test_the_entry_runs_from_a_folder_that_holds_a_users_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, ROOT / "train" / "lora.py", "experiment=demo", "lora.rnak=3"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()  # and no traceback
    assert line.startswith("error: lora.rnak is not a key; did you mean lora.rank (")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("data/sources.py", False),
        ("wan/tiny/vae/diffusion_pytorch_model.safetensors", False),
        ("datasets/demo/train/zorbi_01.mp4", False),
        ("datasets/mine/clip.mp4", True),
        ("outputs/demo/metrics.jsonl", True),
        ("cache/entry.safetensors", True),
    ],
)
def test_git_keeps_code_and_leaves_out_what_users_make(
    path: str, ignored: bool, tmp_path: Path
) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    asked = subprocess.run(["git", "-C", tmp_path, "check-ignore", "--quiet", path], check=False)
    assert (asked.returncode == 0) == ignored


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "conf").rglob("*.yaml")),
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_every_yaml_key_has_a_comment(path: Path) -> None:
    above = ""
    for line in path.read_text().splitlines():
        if re.match(r"\s*[\w.]+:(\s|$)", line):
            assert " # " in line or above.strip().startswith("#"), line
        above = line


def test_constraints_pin_every_dependency_to_one_version() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)  # no +cpu: any build of torch
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    project = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r'"([\w-]+)[><=]=[^"]+"', project.partition("dependencies = [")[2])
    assert len(named) > 15
    assert set(named) <= pinned
