"""Several processes on this machine that talk by gloo, and what each of them returns."""

from collections.abc import Callable
from multiprocessing import set_forkserver_preload
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch.multiprocessing.spawn import start_processes

Work = Callable[[], dict[str, Tensor]]

# What takes seconds to import, once for all processes of all tests.
set_forkserver_preload(["wan.sampler", "wan.sharding", "wan.speed"])


def run_processes(work: Work, count: int, folder: Path) -> list[dict[str, Tensor]]:
    """What `work`, a function of a module, returns in each of `count` processes.

    An error in one of them is raised here, with its traceback.
    """
    start_processes(_process, (work, count, str(folder)), count, start_method="forkserver")
    return [load_file(folder / f"{rank}.safetensors") for rank in range(count)]


def _process(rank: int, work: Work, count: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    results = {name: tensor.contiguous() for name, tensor in work().items()}
    save_file(results, Path(folder) / f"{rank}.safetensors")
    distributed.destroy_process_group()
