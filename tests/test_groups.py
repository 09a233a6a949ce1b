"""Work that processes share out: each does its part, all get all, and all stop together."""

import os
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, distributed

from tests.processes import run_processes
from tests.toy_runs import silent
from train.groups import Parts, in_parts
from train.stopping import Stopped, StopRequest


def row(made: list[int], index: int) -> Tensor:
    made.append(index)
    return torch.tensor([index, 1 / (index + 1)], dtype=torch.float64)


def parts(context: int) -> Parts:
    """Of this process, `context` of them to a group."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, not used
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    own, speaks = rank // context, rank % context == 0
    return Parts(accelerator, StopRequest(), world // context, own, speaks)


def share_out(context: int) -> dict[str, Tensor]:
    """Three rows, in parts; then again, with process 1 asked to stop in its first."""
    divided, made = parts(context), []
    rows = in_parts(3, partial(row, made), silent, "rows", divided)
    stopped, begun = False, []

    def until_asked(index: int) -> Tensor:
        if distributed.get_rank() == 1:
            divided.stop.reason = "SIGTERM"
        return row(begun, index)

    try:
        in_parts(4, until_asked, silent, "rows", divided)
    except Stopped:
        stopped = True
    return {
        "rows": rows,
        "made": torch.tensor(made),
        "stopped": torch.tensor(stopped),
        "begun": torch.tensor(begun),
    }


def alone() -> Tensor:
    return in_parts(3, partial(row, []), silent, "rows", None)


def test_two_processes_share_out_what_one_makes(tmp_path: Path) -> None:
    seen = run_processes(partial(share_out, 1), 2, tmp_path)
    assert [process["made"].tolist() for process in seen] == [[0, 2], [1, 2]]  # as many each
    assert all(torch.equal(process["rows"], alone()) for process in seen)
    assert all(process["stopped"] for process in seen)
    assert [process["begun"].tolist() for process in seen] == [[0], [1]]


def test_processes_of_one_group_have_one_part(tmp_path: Path) -> None:
    seen = run_processes(partial(share_out, 2), 2, tmp_path)
    assert [process["made"].tolist() for process in seen] == [[0, 1, 2]] * 2
    assert all(torch.equal(process["rows"], alone()) for process in seen)
