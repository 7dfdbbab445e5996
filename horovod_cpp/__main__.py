"""``python -m horovod_cpp``: about this package.

``--check-build``: what this build has, and what it finds on this machine; ``--cmake-dir``: for C++ programs.
"""

import argparse
import sys
from pathlib import Path

import horovod_cpp
from horovod_cpp.run.check_build import CheckBuild


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m horovod_cpp", description="About this package.")
    parser.add_argument("-v", "--version", action="version", version=horovod_cpp.__version__)
    parser.add_argument(
        "-cb", "--check-build", action=CheckBuild, help="show what this build has and finds on this machine, and exit"
    )
    parser.add_argument(
        "--cmake-dir", action="store_true", help="print the folder of the CMake package: -DHorovodCpp_DIR=..."
    )
    options = parser.parse_args()
    if options.cmake_dir:
        return print_cmake_folder()
    parser.print_help()
    return 0


def print_cmake_folder() -> int:
    folder = Path(__file__).resolve().parent / "cmake"
    if not (folder / "HorovodCppConfig.cmake").is_file():
        print(f"this package was built without its CMake files: {folder} has none", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
