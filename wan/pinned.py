"""Host memory that the device reads and writes by itself, and copies beside the computation."""

import weakref
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

SMALLEST_LOCKED = 2**20  # bytes; of smaller tensors there are many, and little to gain


def lock_in_memory(tensor: Tensor, device: torch.device) -> None:
    """Let the device reach host memory by itself, until this very `tensor` object is gone.

    Copies are several times as fast, and the only ones that run beside the computation. Where the
    system does not allow it, they are only slower. Done in place: PyTorch's own pinned memory is a
    copy, rounded up to a power of two.
    """
    if device.type != "cuda" or tensor.nbytes < SMALLEST_LOCKED:
        return
    runtime = torch.cuda.cudart()
    assert runtime is not None, "there is a CUDA device"
    address = tensor.data_ptr()
    if runtime.cudaHostRegister(address, tensor.nbytes, 0) == runtime.cudaError.success:
        weakref.finalize(tensor, _unlock, address, device).atexit = False
    else:
        with suppress(RuntimeError):  # whoever launches the next kernel is told of the failure
            torch.ones(1, device=device)


def _unlock(address: int, device: torch.device) -> None:
    """Before memory is freed: for the device, a new tensor there would have the old values."""
    torch.cuda.synchronize(device)  # copies that are asked for may not have been made
    runtime = torch.cuda.cudart()
    assert runtime is not None
    runtime.cudaHostUnregister(address)


class SideStream:
    """Copies in the order in which they are asked for, beside what the device computes.

    On the CPU each copy is made at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        """Copy to each first from each second tensor, once the work asked for so far is done.

        Before `wait` of the event that it returns, no target may be used, and no tensor on the
        device be freed or written to.
        """
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(self._stream)
        return copied

    def wait(self, copied: torch.cuda.Event | None) -> None:
        """What is asked for from now on runs when those copies are done; the host goes on."""
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
