"""Times allreduce of 4 B to 64 MiB: this library beside MPI_Allreduce and Gloo, in turns within each repetition.

Started by tests/benchmarks/run. A time is that of the slowest rank; a line shows the median of the repetitions, and the
median of the ratios that were taken within one repetition. A ratio above 1 means that this library is faster.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpi4py

mpi4py.rc.thread_level = "serialized"  # no locks inside MPI: its best case
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from mpi4py import MPI  # noqa: E402
from tqdm import tqdm  # noqa: E402

import horovod_cpp.torch as hvd  # noqa: E402

SIZES = [4 << 2 * i for i in range(13)]  # 4 B to 64 MiB, in steps of four
PEERS = ("MPI", "Gloo")  # Gloo unless --without-gloo


def peers() -> tuple[str, ...]:
    return PEERS if dist.is_initialized() else PEERS[:1]


def operations(data: torch.Tensor) -> dict[str, Callable[[], Any]]:
    array = data.numpy()
    name = f"benchmark.{data.numel()}"
    timed: dict[str, Callable[[], Any]] = {
        "horovod_cpp": lambda: hvd.allreduce_(data, op=hvd.Sum, name=name),
        "MPI": lambda: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, array, op=MPI.SUM),
    }
    if dist.is_initialized():
        timed["Gloo"] = lambda: dist.all_reduce(data)
    return timed


def time_once(operation: Callable[[], Any], calls: int) -> float:
    """Seconds a call, on the slowest rank."""
    # Not timed: a library that sleeps may leave two ranks on one core, and the next one would pay for their parting.
    for _ in range(max(1, calls // 2)):
        operation()
    MPI.COMM_WORLD.Barrier()
    start = time.perf_counter()
    for _ in range(calls):
        operation()
    took = (time.perf_counter() - start) / calls
    return MPI.COMM_WORLD.allreduce(took, op=MPI.MAX)


def measure(size: int, repetitions: int) -> dict[str, Any]:
    data = torch.zeros(size // 4)
    timed = operations(data)
    check(data, timed)
    calls = max(1, min(100, (4 << 20) // size))
    times: dict[str, list[float]] = {name: [] for name in timed}
    for repetition in range(repetitions + 1):
        for name in random.Random(repetition).sample(list(timed), len(timed)):  # the same order on all ranks
            took = time_once(timed[name], calls)
            if repetition > 0:  # the first is the warm-up
                times[name].append(took)
    line: dict[str, Any] = {"bytes": size}
    for name, took in times.items():
        line[name] = {"median_us": statistics.median(took) * 1e6, "best_us": min(took) * 1e6}
    for peer in peers():
        ratios = [theirs / ours for theirs, ours in zip(times[peer], times["horovod_cpp"], strict=True)]
        line[f"{peer} / horovod_cpp"] = statistics.median(ratios)
    return line


def check(data: torch.Tensor, timed: dict[str, Callable[[], Any]]) -> None:
    """All of them compute the same sum."""
    ranks = MPI.COMM_WORLD.Get_size()
    for name, operation in timed.items():
        data.fill_(MPI.COMM_WORLD.Get_rank() + 1)
        operation()
        assert (data == ranks * (ranks + 1) / 2).all(), f"{name} computed a wrong sum"
    data.zero_()


def start_gloo() -> None:
    folder = MPI.COMM_WORLD.bcast(tempfile.mkdtemp() if MPI.COMM_WORLD.Get_rank() == 0 else None)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(os.path.join(folder, "store"), MPI.COMM_WORLD.Get_size()),
        rank=MPI.COMM_WORLD.Get_rank(),
        world_size=MPI.COMM_WORLD.Get_size(),
        timeout=datetime.timedelta(seconds=60),
    )


def text_of(size: int) -> str:
    for unit, scale in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size // scale} {unit}"
    return f"{size} B"


def show(lines: list[dict[str, Any]]) -> None:
    names = ["horovod_cpp", *peers()]
    print(
        f"{'size':>8}"
        + "".join(f"{name + ' us':>16}" for name in names)
        + "".join(f"{p + ' / ours':>14}" for p in peers())
    )
    for line in lines:
        times = "".join(f"{line[name]['median_us']:>16,.1f}" for name in names)
        ratios = "".join(f"{line[f'{peer} / horovod_cpp']:>14.2f}" for peer in peers())
        print(f"{text_of(line['bytes']):>8}{times}{ratios}")


def plot(lines: list[dict[str, Any]], path: Path, ranks: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    sizes = np.array([line["bytes"] for line in lines])
    for name in ("horovod_cpp", *peers()):
        axes.plot(sizes, [line[name]["median_us"] for line in lines], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes[::2], [text_of(size) for size in sizes[::2]])
    axes.set_xlabel("size of the tensor (float32)")
    axes.set_ylabel("time of an allreduce, us (median)")
    axes.set_title(f"allreduce, {ranks} ranks on one host")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--smallest", type=int, default=SIZES[0], help="bytes")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="bytes")
    parser.add_argument("--without-gloo", action="store_true", help="its threads may leave ranks badly placed on cores")
    parser.add_argument("--output", type=Path, help="folder for the JSON file and the picture")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hvd.init()
    if not arguments.without_gloo:
        start_gloo()
    rank, ranks = hvd.rank(), hvd.size()
    sizes = [size for size in SIZES if arguments.smallest <= size <= arguments.largest]
    lines = [
        measure(size, arguments.repetitions) for size in tqdm(sizes, desc=f"allreduce, np {ranks}", disable=rank != 0)
    ]
    if rank == 0:
        show(lines)
        if arguments.output:
            arguments.output.mkdir(parents=True, exist_ok=True)
            result = {
                "benchmark": "allreduce",
                "ranks": ranks,
                "cores": os.cpu_count(),
                "machine": platform.processor() or platform.machine(),
                "mpi": MPI.Get_library_version().split(",")[0],
                "torch": torch.__version__,
                "repetitions": arguments.repetitions,
                "lines": lines,
            }
            (arguments.output / f"allreduce-np{ranks}.json").write_text(json.dumps(result, indent=1) + "\n")
            plot(lines, arguments.output / f"allreduce-np{ranks}.png", ranks)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    hvd.shutdown()


if __name__ == "__main__":
    main()
