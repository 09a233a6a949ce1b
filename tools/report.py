"""One HTML file about a run, or comparing several: curves, videos, settings, files.

    python -m tools.report outputs/demo                      # writes outputs/demo/report.html
    python -m tools.report outputs/demo outputs/rank4        # writes outputs/report_compare.html
    python -m tools.report outputs/demo --to demo.html

The file needs nothing beside it and no network, and is smaller than 25 MB. A run that is still
under way or was killed can be looked at, too.
"""

import argparse
from pathlib import Path

from tools.report_page import write_page
from tools.report_runs import read_record
from train.errors import clear_errors


def main() -> None:
    """Read the runs and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--to", type=Path, metavar="FILE", help="where to write the page")
    args = parser.parse_args()
    with clear_errors():
        records = [read_record(folder) for folder in args.runs]
        first = args.runs[0]
        several = first.resolve().parent / "report_compare.html"
        path = args.to or (first / "report.html" if len(records) == 1 else several)
        write_page(path, records)
        print(f"report     {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
