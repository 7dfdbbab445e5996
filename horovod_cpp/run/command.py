"""The command line of hvdrun."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence

import horovod_cpp
from horovod_cpp.run.check_build import CheckBuild
from horovod_cpp.run.launcher import Job, JobOptions

LOG_LEVELS = ("trace", "debug", "info", "warning", "error", "fatal")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: that of the first rank that failed, or 0."""
    parser = _parser()
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("the program to run is missing: hvdrun -np 2 python train.py")
    if shutil.which(command[0]) is None:
        print(f"hvdrun: there is no program '{command[0]}' that can be run", file=sys.stderr)
        return 127
    job = JobOptions(
        command=command,
        size=options.num_proc,
        environment=_environment(options),
        tag=not options.no_tag,
        output_folder=options.output_filename,
        verbose=options.verbose,
    )
    try:
        return Job(job).run()
    except OSError as error:
        print(f"hvdrun: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hvdrun",
        description="Start the ranks of a job on this machine, and end all of them when one fails.",
        epilog="The exit code is that of the first rank that failed (128 + n for signal n), or 0.",
    )
    add = parser.add_argument
    add("-v", "--version", action="version", version=horovod_cpp.__version__)
    add("-cb", "--check-build", action=CheckBuild, help="show what this build has and finds on this machine, and exit")
    add("-np", "--num-proc", type=_positive, required=True, metavar="N", help="number of ranks to start")
    add("--verbose", action="store_true", help="say what is started and how each rank ended")
    add("--output-filename", metavar="FOLDER", help="also write FOLDER/rank.N/stdout and FOLDER/rank.N/stderr")
    add("--no-tag", action="store_true", help="do not put '[rank] ' before each line of output")
    add("--start-timeout", type=_positive, metavar="SECONDS", help="how long init waits for all ranks (30)")
    add("--log-level", type=str.lower, choices=LOG_LEVELS, help="how much the library logs (warning)")
    add("--timeline-filename", metavar="FILE", help="rank 0 records a timeline there; with {rank} in it, every rank")
    add("--timeline-mark-cycles", action=argparse.BooleanOptionalAction, help="mark when operations are taken up")
    add("command", nargs=argparse.REMAINDER, metavar="program [argument ...]", help="what each rank runs")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _environment(options: argparse.Namespace) -> dict[str, str]:
    environment = dict(os.environ)
    environment.setdefault("PYTHONUNBUFFERED", "1")  # output goes through a pipe; show it at once
    if options.start_timeout is not None:
        environment["HOROVOD_START_TIMEOUT"] = str(options.start_timeout)
    if options.log_level is not None:
        environment["HOROVOD_LOG_LEVEL"] = options.log_level
    if options.timeline_filename is not None:
        environment["HOROVOD_TIMELINE"] = options.timeline_filename
    if options.timeline_mark_cycles is not None:
        environment["HOROVOD_TIMELINE_MARK_CYCLES"] = str(int(options.timeline_mark_cycles))
    return environment
