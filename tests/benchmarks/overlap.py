"""Measures how much of its communication a LibTorch program hides behind backward, on two ranks that a slow network
joins. Run tests/benchmarks/run_overlap.

The network and the data are those of examples/cpp_fashion_mnist. A step is done in three ways, in turns, and each is
timed on the slower rank:

  backward        loss.backward() of a network whose gradients nobody reduces
  communication   synchronize() with all gradients there: all are handed over at once, and nothing computes
  both            loss.backward() of a network with a DistributedOptimizer, and its synchronize()

Hidden is what communication does not add: 1 - (both - backward) / communication, of the medians. The network is the
token bucket of HOROVOD_FAULT=slow@segment_send#n. At the end some steps are recorded in a timeline, which says when the
first call began; unless that was before the end of backward in each of them, the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "build" / "release" / "tests" / "benchmarks" / "overlap"

Event = dict[str, Any]


def measure(arguments: argparse.Namespace, timeline: Path) -> dict[str, Any]:
    rate = int(arguments.megabytes_per_second * 1e6)
    command = ["mpirun", "--timeout", "300", "--oversubscribe", "--bind-to", "none", "-np", "2", str(PROGRAM)]
    run = subprocess.run(
        [*command, str(arguments.steps), str(arguments.batch), str(timeline)],
        env=os.environ | {"HOROVOD_FAULT": f"slow@segment_send#{rate}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def time_zero(events: list[Event]) -> int:
    key = "start_time_since_epoch_in_micros"
    return next(int(event["args"][key]) for event in events if key in event.get("args", {}))


def launches(events: list[Event]) -> list[float]:
    """When a call on gradients sent its first message, in microseconds of the timeline."""
    begun = (event for event in events if event["ph"] == "B" and event["name"].endswith("_ALLREDUCE"))
    return sorted(event["ts"] for event in begun if not event["name"].startswith("NEGOTIATE"))


def first_launches(events: list[Event], recorded: list[list[float]]) -> list[tuple[float, float]]:
    """Of each step: when the first call began and when backward ended, in ms since the step began."""
    zero, all_launches = time_zero(events), launches(events)
    found = []
    for times in recorded:
        start, backward_ended, end = (time - zero for time in times)
        first = next((launch for launch in all_launches if start <= launch <= end), math.inf)
        found.append(((first - start) / 1e3, (backward_ended - start) / 1e3))
    return found


def with_backward(events: list[Event], recorded: list[list[float]]) -> list[Event]:
    """A lane of its own for backward, above the others."""
    lane = -1
    added: list[Event] = [{"name": "process_name", "ph": "M", "pid": lane, "args": {"name": "backward"}}]
    for start, backward_ended, _ in recorded:
        added.append({"name": "backward", "ph": "B", "pid": lane, "tid": 0, "ts": start - time_zero(events)})
        added.append({"ph": "E", "pid": lane, "tid": 0, "ts": backward_ended - time_zero(events)})
    return events + added


def hidden_share(result: dict[str, Any]) -> float:
    backward, communication, both = (
        statistics.median(result[f"{name}_ms"]) for name in ("backward", "communication", "both")
    )
    return 1 - (both - backward) / communication


def show(result: dict[str, Any], steps: list[tuple[float, float]]) -> None:
    print(f"{'':24}{'median':>9}{'quartiles':>17}")
    for name in ("backward", "communication", "both"):
        times = result[f"{name}_ms"]
        low, middle, high = statistics.quantiles(times, n=4)
        print(f"{name + ', ms':24}{middle:9.1f}{low:9.1f}{high:8.1f}")
    print(f"{'hidden':24}{100 * hidden_share(result):8.0f} %")
    print("in the timeline, ms after the start of backward:")
    for first, backward_ended in steps:
        print(f"  first call at {first:6.2f}, end of backward at {backward_ended:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=256, help="images of a rank's step")
    parser.add_argument("--megabytes-per-second", type=float, default=50)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "benchmarks", help="folder for JSON and timeline"
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    timeline = arguments.output / "overlap-timeline.json"
    result = measure(arguments, timeline)
    events: list[Event] = json.loads(timeline.read_text())
    steps = first_launches(events, result["recorded"])
    print(f"{arguments.batch} images a step and rank, {arguments.megabytes_per_second:g} MB/s, {arguments.steps} steps")
    show(result, steps)
    result |= {"benchmark": "overlap", "batch": arguments.batch, "hidden": hidden_share(result)}
    result |= {"megabytes_per_second": arguments.megabytes_per_second, "first_launches_ms": steps}
    (arguments.output / "overlap.json").write_text(json.dumps(result, indent=1) + "\n")
    timeline.write_text("[\n" + ",\n".join(map(json.dumps, with_backward(events, result["recorded"]))) + "\n]\n")
    print(f"timeline, with backward in it: {timeline}")
    if not all(first < backward_ended for first, backward_ended in steps):
        sys.exit("a step began to communicate only after backward")


if __name__ == "__main__":
    main()
