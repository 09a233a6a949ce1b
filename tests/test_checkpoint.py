"""Checkpoints on the disk: whole, checked, pruned; and any state without pickle."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from train.checkpoint import (
    FORMAT,
    Checkpoint,
    checkpoints_in,
    problem_with,
    prune,
    read_checkpoint,
    step_of,
    write_checkpoint,
)
from train.tensor_tree import flatten, load_optimizer, unflatten

ODD = [
    torch.tensor([1.5, float("nan"), float("-inf")]),
    torch.zeros(2, 0, dtype=torch.bfloat16),
    torch.arange(6).reshape(2, 3).T,  # not contiguous
    torch.tensor(7.0),
    torch.tensor([True, False]),
    torch.tensor([255], dtype=torch.uint8),
    torch.tensor([-1], dtype=torch.int8),
    torch.tensor([0.1], dtype=torch.float64),
]


def write(folder: Path, done: int, tensors: dict[str, Tensor] | None = None) -> Path:
    state: dict[str, object] = {"format": FORMAT, "done": done, "value": 0.1 + 0.2}
    pair = {"high": tensors or {"a": torch.full((3,), float(done))}}
    return write_checkpoint(
        folder, done, pair, state, "a: 1\n", lambda path: (path / "toy.txt").write_text("pair")
    )  # fmt: skip


def read(path: Path) -> Checkpoint:
    found = read_checkpoint(path)
    assert isinstance(found, Checkpoint), found
    return found


def test_what_is_read_is_what_was_written_to_the_bit(tmp_path: Path) -> None:
    tensors = {str(index): tensor.contiguous() for index, tensor in enumerate(ODD)}
    path = write(tmp_path / "checkpoints", 500, tensors)
    assert path.name == "step_000000500"
    checkpoint = read(path)
    assert checkpoint.state == {"format": FORMAT, "done": 500, "value": 0.1 + 0.2}
    found = checkpoint.tensors("high")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(
            found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)
        )
    assert checkpoint.tensors("low") == {}
    assert os.system(f"cd {path} && sha256sum --quiet --strict -c SHA256SUMS") == 0
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "name", ["state.json", "state_high.safetensors", "config.yaml", "toy.txt", "SHA256SUMS"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_any_damage_is_told_with_its_file(tmp_path: Path, name: str, damage: str) -> None:
    path = write(tmp_path, 1)
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    found = read_checkpoint(path)
    assert isinstance(found, str)
    if name != "SHA256SUMS" or damage == "remove":
        assert name in found


def test_an_empty_or_foreign_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert "SHA256SUMS" in str(problem_with(tmp_path))
    (tmp_path / "SHA256SUMS").write_text("")
    assert problem_with(tmp_path) == "SHA256SUMS does not list state.json"
    path = write(tmp_path, 1)
    sums = path / "SHA256SUMS"
    kept = [line for line in sums.read_text().splitlines() if "state_high" not in line]
    sums.write_text("\n".join(kept))
    assert problem_with(path) == "SHA256SUMS does not list state_high.safetensors"
    (tmp_path / "SHA256SUMS").write_bytes(b"\xff\xfe")
    assert problem_with(tmp_path) is not None


def test_another_format_is_told(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, {}, {"format": 99}, "", lambda _: None)
    assert read_checkpoint(path) == f"it is of format 99, and this version reads {FORMAT}"


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for done in (100, 200, 300, 1000, 2000):
        write(tmp_path, done)
    (tmp_path / ".step_000000400.partial").mkdir()
    (tmp_path / "notes").mkdir()
    prune(tmp_path, 2, 200)
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [200, 1000, 2000]
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {path.name for path in checkpoints_in(tmp_path)} == {"notes"}
    prune(tmp_path, 1, None)
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [2000]


def test_a_failed_export_leaves_no_checkpoint_and_is_no_hindrance(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise OSError(28, "No space left on device")

    write(tmp_path, 1)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, 2, {}, {}, "", fail)
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [1]
    write(tmp_path, 2)
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [1, 2]


def test_a_folder_that_is_missing_has_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoints_in(tmp_path / "nowhere") == []
    (tmp_path / "file").write_text("")
    assert checkpoints_in(tmp_path / "file") == []


def test_any_tree_comes_back_as_it_was() -> None:
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "pair": (torch.ones(2), 1)}, 10: {}},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "name": "a", "none": None, "on": True}],
        "1": {"nested": [[torch.zeros(1)]]},
    }
    tensors: dict[str, Tensor] = {}
    again = unflatten(flatten(tree, "x", tensors), tensors)
    assert str(again) == str(tree)
    assert len(tensors) == 3


@pytest.mark.parametrize("value", [object(), {1.5: 0}, {"a": {None: 1}}, [print], 1j])
def test_what_would_need_pickle_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"x"):
        flatten(value, "x", {})


class Halved(torch.optim.Optimizer):
    """Remembers the gradient in bf16 and a count in 8 bits, as optimizers that save memory do."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for parameter in self.param_groups[0]["params"]:
            memory = self.state[parameter]
            memory["mean"] = parameter.grad.bfloat16()
            memory["count"] = torch.tensor([200], dtype=torch.uint8)


def test_an_optimizer_gets_its_dtypes_back() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 0.3)
    optimizer = Halved([parameter])
    optimizer.step()
    tensors: dict[str, Tensor] = {}
    saved = flatten(optimizer.state_dict(), "optimizer", tensors)
    fresh = Halved([parameter])
    load_optimizer(fresh, unflatten(saved, tensors))
    for name, value in optimizer.state[parameter].items():
        assert fresh.state[parameter][name].dtype == value.dtype
        assert torch.equal(fresh.state[parameter][name], value)


def test_a_state_of_other_parameters_is_refused() -> None:
    one = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    two = torch.optim.SGD([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="parameter group"):
        load_optimizer(two, one.state_dict())
