"""Adapter files: check, convert, merge, publish and the like. Each on one file or on a pair.

python -m tools.lora info outputs/demo/demo_high_noise.safetensors
python -m tools.lora convert FILE --pair --to kohya --out converted
python -m tools.lora export outputs/demo --step 500 --layout diffusers --out for_diffusers
    python -m tools.lora publish outputs/demo
"""

import argparse

from tools import lora_check, lora_files, lora_publish
from train.errors import clear_errors


def main() -> None:
    """Read the command line and do what its subcommand says."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.lora",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    lora_files.add_parser(subparsers)
    lora_check.add_parser(subparsers)
    lora_publish.add_parser(subparsers)
    arguments = parser.parse_args()
    with clear_errors():
        arguments.run(arguments)


if __name__ == "__main__":
    main()
