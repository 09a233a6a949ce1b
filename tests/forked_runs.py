"""A run in several processes as torchrun makes them, but imported once: a program of its own.

python -m tests.forked_runs PROCESSES SETTINGS...
"""

import os
import socket
import sys

from train.compose import compose
from train.lora import train


def free_port() -> str:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def main(processes: int, settings: list[str]) -> None:
    """Leaves with a status other than 0 if one of the processes did."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for rank in range(processes):
        if not os.fork():
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            train(compose(settings))
            return
    ends = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(processes)]
    sys.exit(max(ends, key=abs))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
