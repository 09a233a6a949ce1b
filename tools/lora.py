"""Adapter files: check, convert, merge, publish and the like. Each on one file or on a pair.

python -m tools.lora info outputs/demo/demo_high_noise.safetensors
python -m tools.lora check outputs/demo/*.safetensors
python -m tools.lora convert FILE --pair --to kohya --out converted
python -m tools.lora export outputs/demo --step 500 --layout diffusers --out for_diffusers
python -m tools.lora publish outputs/demo
python -m tools.lora merge fox_high_noise.safetensors:0.8 style_high_noise.safetensors --out DIR
python -m tools.lora resize FILE --pair --rank 8 --out small
python -m tools.lora extract BASE TUNED --rank 64 --out DIR
python -m tools.lora diff FILE OTHER
python -m tools.lora fetch hf://owner/name/fox_high_noise.safetensors
"""

import argparse
import os
import sys

from tools import (
    lora_algebra,
    lora_check,
    lora_diff,
    lora_export,
    lora_extract,
    lora_fetch,
    lora_files,
    lora_publish,
)
from train.errors import clear_errors

READER_GONE = 141  # as a shell tells of SIGPIPE


def make_parser() -> argparse.ArgumentParser:
    """The command line of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.lora",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    lora_files.add_parser(subparsers)
    lora_check.add_parser(subparsers)
    lora_export.add_parser(subparsers)
    lora_publish.add_parser(subparsers)
    lora_algebra.add_parser(subparsers)
    lora_extract.add_parser(subparsers)
    lora_diff.add_parser(subparsers)
    lora_fetch.add_parser(subparsers)
    return parser


def main() -> None:
    """Read the command line and do what its subcommand says."""
    arguments = make_parser().parse_args()
    try:
        try:
            with clear_errors():
                arguments.run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `info FILE | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        raise SystemExit(READER_GONE) from None


if __name__ == "__main__":
    main()
