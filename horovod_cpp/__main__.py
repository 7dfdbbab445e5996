"""``python -m horovod_cpp --check-build``: what this build has, and what it finds on this machine."""

import argparse
import sys

import horovod_cpp
from horovod_cpp.run.check_build import CheckBuild


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m horovod_cpp", description="About this package.")
    parser.add_argument("-v", "--version", action="version", version=horovod_cpp.__version__)
    parser.add_argument(
        "-cb", "--check-build", action=CheckBuild, help="show what this build has and finds on this machine, and exit"
    )
    parser.parse_args()
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
