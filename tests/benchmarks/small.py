"""Times what Python sees of one small allreduce, and what a rank costs that has nothing to do.

Started by tests/benchmarks/run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import horovod_cpp.torch as hvd


def percentiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {f"p{p}_us": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] * 1e6 for p in (50, 90, 99)}


def timed(calls: int, operation: Callable[[], list[float]]) -> list[dict[str, float]]:
    for _ in range(calls // 10):
        operation()
    rows = [operation() for _ in range(calls)]
    return [percentiles(list(column)) for column in zip(*rows, strict=True)]


def enqueue_and_wait() -> dict[str, dict[str, float]]:
    data = torch.zeros(1)

    def operation() -> list[float]:
        start = time.perf_counter()
        handle = hvd.allreduce_async_(data, op=hvd.Sum, name="small")
        enqueued = time.perf_counter()
        hvd.synchronize(handle)
        end = time.perf_counter()
        return [enqueued - start, end - start]

    enqueue, whole = timed(5000, operation)
    return {"enqueue": enqueue, "enqueue and wait, 4 B": whole}


def compute(seconds: float) -> None:
    """Keep this thread busy for long enough that the engine goes to sleep."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def enqueue_alone(burst: int = 16) -> dict[str, dict[str, float]]:
    """From call to return. The first call of a burst finds the engine asleep, as in a backward pass; the others come
    while it is awake, or on its way."""
    tensors = [torch.zeros(16) for _ in range(burst)]
    names = [f"burst.{i}" for i in range(burst)]

    def operation() -> list[float]:
        hvd.barrier()
        compute(0.0005)
        times = []
        handles = []
        for tensor, name in zip(tensors, names, strict=True):
            start = time.perf_counter()
            handle = hvd.allreduce_async_(tensor, op=hvd.Sum, name=name)
            times.append(time.perf_counter() - start)
            handles.append(handle)
        for handle in handles:
            hvd.synchronize(handle)
        return [times[0], statistics.median(times[1:])]

    asleep, awake = timed(1000, operation)
    return {"enqueue, engine asleep": asleep, "enqueue, engine awake": awake, "a bare wake-up": bare_wake_up(1000)}


def hook_alone(gradients: int = 200) -> dict[str, dict[str, float]]:
    """One hook of DistributedOptimizer and its share of synchronize(), on average of a step."""
    parameters = [torch.nn.Parameter(torch.zeros(16)) for _ in range(gradients)]
    named = [(f"hook.{i}", parameter) for i, parameter in enumerate(parameters)]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.0), named)
    hooks = [hook for parameter in parameters for hook in (parameter._post_accumulate_grad_hooks or {}).values()]
    if not hooks:  # one rank
        return {}

    def operation() -> list[float]:
        optimizer.zero_grad()
        for parameter in parameters:
            parameter.grad = torch.ones(16)
        hvd.barrier()
        compute(0.0005)
        start = time.perf_counter()
        for hook, parameter in zip(hooks, parameters, strict=True):
            hook(parameter)
        begun = time.perf_counter()
        optimizer.synchronize()
        return [(begun - start) / gradients, (time.perf_counter() - begun) / gradients]

    hook, share = timed(500, operation)
    return {"a gradient's hook": hook, "its share of synchronize": share}


def bare_wake_up(calls: int) -> dict[str, float]:
    """What it costs to wake a thread that sleeps as the engine's does: a write to what its epoll watches."""
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    poller = select.epoll()
    poller.register(bell, select.EPOLLIN)
    over = threading.Event()

    def sleeper() -> None:
        while not over.is_set():
            poller.poll(1.0)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(bell)

    thread = threading.Thread(target=sleeper)
    thread.start()

    def operation() -> list[float]:
        compute(0.0005)
        start = time.perf_counter()
        os.eventfd_write(bell, 1)
        return [time.perf_counter() - start]

    result = timed(calls, operation)[0]
    over.set()
    os.eventfd_write(bell, 1)
    thread.join()
    poller.close()
    os.close(bell)
    return result


def many_in_flight() -> dict[str, dict[str, float]]:
    tensors = [torch.zeros(256) for _ in range(100)]

    def operation() -> list[float]:
        start = time.perf_counter()
        handles = [hvd.allreduce_async_(t, op=hvd.Sum, name=f"many.{i}") for i, t in enumerate(tensors)]
        for handle in handles:
            hvd.synchronize(handle)
        return [(time.perf_counter() - start) / len(tensors)]

    return {"one of 100 in flight, 1 KiB": timed(200, operation)[0]}


def idle(seconds: float) -> dict[str, float]:
    """The CPU clocks of all threads of this rank while it has nothing to do."""
    hvd.barrier()
    time.sleep(0.2)
    before, cpu = hvd.statistics(), time.process_time()
    time.sleep(seconds)
    cpu = time.process_time() - cpu
    after = hvd.statistics()
    time.sleep(1)  # a rank that is done first must not wake one that still measures
    return {
        "seconds": seconds,
        "cpu_percent_of_a_core": 100 * cpu / seconds,
        "background_cpu_us": (after["background_cpu_nanoseconds"] - before["background_cpu_nanoseconds"]) / 1e3,
        "wakeups": after["background_wakeups"] - before["background_wakeups"],
        "messages_sent": after["control_messages_sent"] - before["control_messages_sent"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--idle-seconds", type=float, default=5)
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hvd.init()
    times = {**enqueue_and_wait(), **enqueue_alone(), **hook_alone(), **many_in_flight()}
    idleness = idle(arguments.idle_seconds)
    if hvd.rank() == 0:
        for name, row in times.items():
            print(f"{name:<28}" + "".join(f"  {key[:-3]} {value:8.1f} us" for key, value in row.items()))
        print("an idle rank: " + ", ".join(f"{key} {value:g}" for key, value in idleness.items()))
        if arguments.output:
            arguments.output.mkdir(parents=True, exist_ok=True)
            result = {"benchmark": "small", "ranks": hvd.size(), "times": times, "idle": idleness}
            (arguments.output / f"small-np{hvd.size()}.json").write_text(json.dumps(result, indent=1) + "\n")
    hvd.shutdown()


if __name__ == "__main__":
    main()
