"""Asked to stop: Ctrl-C, SIGTERM (also the notice before a spot machine is taken), a time limit.

The step at work is finished, the run is saved, and the program ends with status 0. What changes
nothing (encoding, loading, measuring, rendering) is left at once, to be done again.
"""

import ctypes
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator

WORDS = {
    signal.SIGINT: "Ctrl-C",
    signal.SIGTERM: "SIGTERM",
    signal.SIGALRM: "checkpoint.time_limit",
}
PR_SET_PDEATHSIG = 1  # of Linux's prctl
ONE_CTRL_C = (
    1.0  # seconds within which a launcher may pass on the Ctrl-C that came from the keyboard
)


class Stopped(KeyboardInterrupt):
    """The run ends here because it was asked to."""


@dataclass
class StopRequest:
    """Whether somebody asked this process to stop, and whether it may drop what it is doing."""

    reason: str | None = None
    at: float = 0.0  # on the monotonic clock
    may_interrupt: bool = False

    @contextmanager
    def interruptible(self, allowed: bool = True) -> Iterator[None]:
        """Within the block, if `allowed`, a request raises `Stopped` at once, or has already."""
        outer, self.may_interrupt = self.may_interrupt, allowed
        try:
            if allowed and self.reason:
                raise Stopped(self.reason)
            yield
        finally:
            self.may_interrupt = outer

    def receive(self, number: int, frame: FrameType | None) -> None:
        """What a signal does: it asks once; a second Ctrl-C ends the process where it is."""
        now = time.monotonic()
        if self.reason is None:
            self.reason, self.at = WORDS[signal.Signals(number)], now
            if self.may_interrupt:
                raise Stopped(self.reason)
        elif number == signal.SIGINT and now - self.at > ONE_CTRL_C:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def stop_requests(hours: float | None) -> Iterator[StopRequest]:
    """Within the block signals, and the end of so many hours, are requests to stop."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # signals are not for others
        yield stop
        return
    _hear_the_launcher_end()
    before = {number: signal.signal(number, stop.receive) for number in WORDS}
    signal.setitimer(signal.ITIMER_REAL, 0 if hours is None else hours * 3600)
    try:
        yield stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _hear_the_launcher_end() -> None:
    """SIGTERM when `accelerate launch` dies of it: for one process it passes no signal on."""
    with suppress(OSError):
        if b"accelerate" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def on_any(accelerator: Accelerator, here: bool) -> bool:
    """Whether it is so on any process; all must ask."""
    if accelerator.num_processes == 1:
        return here
    count = accelerator.reduce(torch.tensor([float(here)], device=accelerator.device))
    assert isinstance(count, torch.Tensor)
    return count.item() > 0


def resume_command(processes: int) -> str:
    """What to type in order to go on: this program's own command."""
    launcher = (
        ["accelerate", "launch"] if "ACCELERATE_MIXED_PRECISION" in os.environ else ["python"]
    )
    if processes > 1:
        launcher = ["accelerate", "launch", "--num_processes", str(processes)]
    return shlex.join([*launcher, *sys.argv])
