"""What each step of one small operation costs the host, in microseconds: medians over many calls on an idle GPU."""

from __future__ import annotations

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
    say(measure="host steps", what=label, **{name: round(statistics.median(t) * 1e6, 2) for name, t in times.items()})


def main() -> int:
    checks = Checks("host_steps", argument_parser(__doc__).parse_args().device)
    on_device = torch.ones(1000, device=checks.device)
    on_host = torch.ones(1000)
    event = torch.cuda.Event()
    other = torch.cuda.Stream()
    say(
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
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
