"""Processes of their own on this machine: several that talk by gloo, or one whose memory counts."""

import ctypes
from collections.abc import Callable
from multiprocessing import get_context, set_forkserver_preload
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import start_processes

from wan.quantised_weight import pack

Work = Callable[[], dict[str, Tensor]]
M_MMAP_THRESHOLD = -3  # of malloc.h

# What takes seconds to import, once for all processes of all tests.
set_forkserver_preload(
    ["wan.sampler", "wan.sharding", "wan.speed", "diffusers.quantizers.gguf.utils"]
)


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


def loading_bytes(load: Callable[[], nn.Module]) -> tuple[int, int]:
    """Most bytes at once beside a model while it is loaded, and those of the model itself."""
    context = get_context("forkserver")
    received, sent = context.Pipe(duplex=False)
    process = context.Process(target=_load, args=(load, sent))
    process.start()
    sent.close()  # else a process that died would be waited for
    beside, held = received.recv()
    process.join()
    return beside, held


def _load(load: Callable[[], nn.Module], answer: Connection) -> None:
    torch.set_num_threads(1)
    # Else what was freed counts for as long as glibc keeps it.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    pack(torch.ones(256, 1024), "fp8")  # what the first product of a process takes
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    model = load()
    held = sum(parameter.nbytes for parameter in [*model.parameters(), *model.buffers()])
    answer.send((_memory("VmHWM") - before - held, held))


def _memory(name: str) -> int:
    """Bytes of this process, as the kernel calls them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
