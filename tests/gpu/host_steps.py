"""What each step of one small operation costs the host, in microseconds: medians over many calls on an idle GPU."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from checks import Checks, argument_parser, say

import horovod_cpp.torch as hvd
from horovod_cpp.common.call_site import call_site
from horovod_cpp.torch import operations, streams

ROUNDS = 200


def timed(call: Callable[[], object]) -> float:
    """The median time of one call, each from an idle GPU on."""
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
    return round(statistics.median(times) * 1e6, 2)


def steps_of(tensor: torch.Tensor, waits: bool, label: str) -> None:
    """The way of one operation through the library, step by step."""
    times: dict[str, list[float]] = {"start": [], "wait": [], "stream_wait": [], "all": []}
    site = call_site()
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        time.sleep(0.0005)  # until the background thread sleeps
        points = [time.perf_counter()]
        pending = operations.start_allreduce(
            tensor, True, label, int(hvd.Max), 1.0, 1.0, hvd.global_process_set, site, caller_waits=waits
        )
        points.append(time.perf_counter())
        handle = pending.parts()[0]._handle
        handle.wait()
        points.append(time.perf_counter())
        if tensor.is_cuda:
            handle.stream_wait(streams.current_stream(tensor.get_device()))
        points.append(time.perf_counter())
        for name, begin, end in zip(times, points, points[1:], strict=False):
            times[name].append(end - begin)
        times["all"].append(points[-1] - points[0])
    say(
        part="host_steps",
        measure="host steps",
        what=label,
        **{name: round(statistics.median(t) * 1e6, 2) for name, t in times.items()},
    )


def in_a_row(tensor: torch.Tensor, label: str) -> None:
    """Back to back, as a loop of steps sees it."""

    def median_of(call: Callable[[], object]) -> float:
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(20):
                call()
            times.append((time.perf_counter() - begin) / 20)
        return round(statistics.median(times) * 1e6, 2)

    name = f"row {label}"
    say(
        part="host_steps",
        measure="host steps",
        what=f"{label}, in a row",
        waits=median_of(lambda: hvd.allreduce_(tensor, op=hvd.Max, name=name)),
        goes_on=median_of(lambda: hvd.synchronize(hvd.allreduce_async_(tensor, op=hvd.Max, name=name))),
        torch_add=median_of(lambda: tensor.add_(1)),
    )


def measure(checks: Checks) -> None:
    on_device = torch.ones(1000, device=checks.device)
    on_host = torch.ones(1000)
    event = torch.cuda.Event()
    other = torch.cuda.Stream()
    say(
        part="host_steps",
        measure="host steps",
        what="of CUDA",
        event_record=timed(event.record),
        stream_wait=timed(lambda: other.wait_event(event)),
        kernel=timed(lambda: on_device.add_(1)),
        empty_like=timed(lambda: torch.empty_like(on_device)),
        current_stream=timed(lambda: streams.current_stream(0)),
        stream_object=timed(lambda: torch.cuda.current_stream(0)),
        call_site=timed(call_site),
    )
    for waits in (True, False):
        steps_of(on_host, waits, f"host, caller {'waits' if waits else 'goes on'}")
        steps_of(on_device, waits, f"device, caller {'waits' if waits else 'goes on'}")
    in_a_row(on_host, "host")
    in_a_row(on_device, "device")


def main() -> int:
    arguments = argument_parser(__doc__).parse_args()
    checks = Checks("host_steps", arguments.device, arguments.short)
    checks.run("steps", functools.partial(measure, checks))
    return checks.end()


if __name__ == "__main__":
    raise SystemExit(main())
