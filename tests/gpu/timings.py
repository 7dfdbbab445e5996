"""What the library adds to NCCL: raw calls and ours in the same process, in turns; and host waits in optimizer.step().

Raw is libnccl through ctypes, the one that torch has loaded, with a communicator of its own. With several ranks on one
GPU the processes take turns on it, about 10 ms each: differences hold there, bandwidths do not.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checks import Checks, argument_parser, keep_gpu_busy, reducing_alone, say
from torch.profiler import ProfilerActivity, profile, record_function

import horovod_cpp.torch as hvd

KIB, MIB = 1 << 10, 1 << 20
FLOAT32, SUM = 7, 0  # ncclDataType_t, ncclRedOp_t
# Calls that stop the calling thread until the GPU has done something.
BLOCKING = {
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaFree",
    "cudaMemcpy",
    "cudaMemcpy2D",
    "cudaStreamSynchronize",
    "cuCtxSynchronize",
    "cuEventSynchronize",
    "cuMemcpy",
    "cuStreamSynchronize",
}


class UniqueId(ctypes.Structure):
    """ncclUniqueId, which goes by value."""

    _fields_ = [("internal", ctypes.c_char * 128)]


def nccl_paths() -> list[str]:
    """The NCCL libraries in this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in lines if "libnccl.so" in line})


class RawNccl:
    """Plain ncclAllReduce on the current stream, with a communicator of all ranks."""

    def __init__(self, checks: Checks) -> None:
        self._library = ctypes.CDLL(nccl_paths()[0])
        identity = UniqueId()
        if checks.rank == 0:
            self._require(self._library.ncclGetUniqueId(ctypes.byref(identity)), "ncclGetUniqueId")
        data = hvd.broadcast_object(bytes(bytearray(identity)), 0, name="unique id")
        ctypes.memmove(ctypes.byref(identity), data, len(data))
        self._communicator = ctypes.c_void_p()
        self._library.ncclCommInitRank.argtypes = [
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int,
            UniqueId,
            ctypes.c_int,
        ]
        result = self._library.ncclCommInitRank(ctypes.byref(self._communicator), checks.size, identity, checks.rank)
        self._require(result, "ncclCommInitRank")
        self._all_reduce = self._library.ncclAllReduce
        self._all_reduce.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]

    def version(self) -> int:
        number = ctypes.c_int()
        self._require(self._library.ncclGetVersion(ctypes.byref(number)), "ncclGetVersion")
        return number.value

    def allreduce(self, source: torch.Tensor, target: torch.Tensor) -> None:
        result = self._all_reduce(
            source.data_ptr(),
            target.data_ptr(),
            source.numel(),
            FLOAT32,
            SUM,
            self._communicator,
            torch.cuda.current_stream().cuda_stream,
        )
        self._require(result, "ncclAllReduce")

    @staticmethod
    def _require(result: int, call: str) -> None:
        if result != 0:
            raise RuntimeError(f"{call} gave ncclResult_t {result}")


class Span:
    """Microseconds between two points of the current stream, and on the host."""

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure(self, call: Callable[[], object], count: int = 1) -> tuple[float, float]:
        """GPU and host time for each of `count` calls, from an idle GPU on."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self._begin.record()
        for _ in range(count):
            call()
        self._end.record()
        host = time.perf_counter() - begin
        torch.cuda.synchronize()
        return self._begin.elapsed_time(self._end) * 1e3 / count, host * 1e6 / count


def median(values: list[float]) -> float:
    return round(statistics.median(values), 2)


class Timings:
    """The measurements."""

    def __init__(self, checks: Checks) -> None:
        self.checks = checks
        self.device = checks.device
        self.alone = checks.size == 1
        self.raw: RawNccl | None = None

    def make_raw(self) -> str:
        self.raw = RawNccl(self.checks)
        tensor = torch.full((5,), float(self.checks.rank + 1), device=self.device)
        self.raw.allreduce(tensor, tensor)
        assert tensor[0].item() == self.checks.size * (self.checks.size + 1) / 2
        return f"NCCL {self.raw.version()} at {', '.join(nccl_paths())}"

    # ---- one tensor

    def sizes(self) -> list[int]:
        if self.checks.short:
            return [4, 64 * KIB, MIB]
        if self.alone:
            return [4, KIB, 64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB]
        return [4, 64 * KIB, MIB, 16 * MIB, 64 * MIB]

    def allreduce(self) -> None:
        """In place with several ranks. One rank would have nothing to do in place, so there it is into a new tensor."""
        assert self.raw is not None, "there is no raw NCCL to compare with"
        raw, span = self.raw, Span()
        for size in self.sizes():
            source = torch.ones(size // 4, device=self.device)
            target = torch.empty_like(source) if self.alone else source
            name = f"timed.{size}"

            def call_raw(source: torch.Tensor = source, target: torch.Tensor = target) -> None:
                raw.allreduce(source, target)

            def call_ours(source: torch.Tensor = source, name: str = name) -> None:
                if self.alone:
                    hvd.allreduce(source, op=hvd.Max, name=name)
                else:
                    hvd.allreduce_(source, op=hvd.Max, name=name)

            def start_ours(source: torch.Tensor = source, name: str = name) -> int:
                return hvd.allreduce_async_(source, op=hvd.Max, name=name)

            for _ in range(3):
                span.measure(call_raw)
                span.measure(call_ours)
                hvd.synchronize(start_ours())
            turns = (40 if size <= MIB else 8) if self.alone else (10 if size <= MIB else 3)
            singles: dict[str, list[tuple[float, float]]] = {"raw": [], "ours": []}
            rows: dict[str, list[tuple[float, float]]] = {"raw": [], "ours": []}
            enqueue = []
            in_row = (200 if size <= 16 * MIB else 20) if self.alone else 3
            for _ in range(turns):
                singles["raw"].append(span.measure(call_raw))
                singles["ours"].append(span.measure(call_ours))
                torch.cuda.synchronize()
                begin = time.perf_counter()
                handle = start_ours()
                enqueue.append((time.perf_counter() - begin) * 1e6)
                hvd.synchronize(handle)
            for _ in range(max(3, turns // 8)):
                rows["raw"].append(span.measure(call_raw, in_row))
                rows["ours"].append(span.measure(call_ours, in_row))
            gpu = {kind: median([one[0] for one in values]) for kind, values in singles.items()}
            host = {kind: median([one[1] for one in values]) for kind, values in singles.items()}
            row = {kind: median([one[0] for one in values]) for kind, values in rows.items()}
            self.checks.measure(
                "allreduce",
                bytes=size,
                from_idle_us=gpu,  # from an event before the call to one after it
                excess_us=round(gpu["ours"] - gpu["raw"], 2),
                host_us=host,
                enqueue_us=median(enqueue),
                in_a_row_us=row,
                ratio=round(row["ours"] / row["raw"], 3) if row["raw"] > 0 else None,
                raw_gigabytes_per_second=round(size / row["raw"] / 1e3, 2) if row["raw"] > 0 else None,
            )

    # ---- a group

    def group(self) -> None:
        """A hundred tensors that are packed, reduced and unpacked, against copies of as many bytes."""
        assert self.raw is not None, "there is no raw NCCL to compare with"
        raw, span = self.raw, Span()
        count = 10 if self.checks.short else 100
        byte_counts = [(64 * KIB + index * (MIB - 64 * KIB) // (count - 1)) // 4 * 4 for index in range(count)]
        tensors = [torch.ones(one // 4, device=self.device) for one in byte_counts]
        total = sum(byte_counts)
        whole = torch.ones(total // 4, device=self.device)
        other = torch.empty_like(whole)

        def call_ours() -> None:
            hvd.grouped_allreduce_(tensors, op=hvd.Max, name="timed group")

        calls: dict[str, Callable[[], object]] = {
            "ours": call_ours,
            "raw_allreduce_of_the_sum": lambda: raw.allreduce(whole, whole),
            "copy_of_the_sum": lambda: other.copy_(whole),
        }
        turns = 20 if self.alone else 4
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(turns + 2):
            for name, call in calls.items():
                elapsed, _ = span.measure(call)
                if turn >= 2:
                    times[name].append(elapsed)
        medians = {name: median(values) for name, values in times.items()}
        self.checks.measure("group", tensors=count, bytes=total, microseconds=medians)

        events = self.trace(lambda: [call() for _ in range(3) for call in calls.values()])
        kernels: dict[str, list[float]] = {}
        for event in events:
            if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
                kernels.setdefault(event["name"][:160], []).append(event["dur"])
        shown = {
            name: {"count": len(durations), "total_us": round(sum(durations), 1), "median_us": median(durations)}
            for name, durations in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:12]
        }
        ours = {name: sum(durations) / 3 for name, durations in kernels.items() if "hvd" in name.lower()}
        copies = [duration for name, one in kernels.items() if "Memcpy DtoD" in name for duration in one]
        fields: dict[str, Any] = {"kernels_of_three_rounds": shown, "ours_per_round_us": ours}
        if copies and max(copies) > 0:
            # Bytes are read and written; ours read and write all of them twice, for packing and unpacking.
            whole_copy = median([duration for duration in copies if duration > max(copies) / 2])
            fields["copy_gigabytes_per_second"] = round(2 * total / whole_copy / 1e3, 1)
            if ours:
                fields["packing_gigabytes_per_second"] = round(4 * total / sum(ours.values()) / 1e3, 1)
        self.checks.measure("group, kernels", **fields)

    def trace(self, call: Callable[[], object]) -> list[dict[str, Any]]:
        """What the profiler has seen of it."""
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "trace.json")
            profiler.export_chrome_trace(path)
            events: list[dict[str, Any]] = json.loads(Path(path).read_text(errors="replace"))["traceEvents"]
        return events

    # ---- the optimizer's step

    def make_step(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """Forward and backward, and the step."""
        torch.manual_seed(5)
        layers = [torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU()) for _ in range(8)]
        model = torch.nn.Sequential(*layers).to(self.device)
        base = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        with reducing_alone():
            optimizer = hvd.DistributedOptimizer(base, model.named_parameters())
        data = torch.randn(64, 512, device=self.device)

        def backward() -> None:
            optimizer.zero_grad()
            model(data).square().mean().backward()

        return backward, optimizer.step

    @staticmethod
    def behind_a_busy_gpu(busy: float, backward: Callable[[], None], step: Callable[[], None]) -> dict[str, float]:
        """How long the host takes for both while the GPU has work for `busy` milliseconds."""
        torch.cuda.synchronize()
        hvd.barrier()  # a step waits for the other ranks' backward pass
        begin = time.perf_counter()
        keep_gpu_busy(busy)
        backward()
        between = time.perf_counter()
        step()
        after = time.perf_counter()
        torch.cuda.synchronize()
        end = time.perf_counter()
        times = {"backward_ms": between - begin, "step_ms": after - between, "all_ms": end - begin}
        return {name: round(value * 1e3, 2) for name, value in times.items()}

    def step_without_waiting(self, on_side_stream: bool) -> str:
        """No call in step() stops the host; and with a busy GPU it returns long before the GPU is there."""
        stream = torch.cuda.Stream() if on_side_stream else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            backward, step = self.make_step()
            for _ in range(5):
                backward()
                step()
            torch.cuda.synchronize()

            busy = 300.0
            tries = [self.behind_a_busy_gpu(busy, backward, step) for _ in range(3)]
            host = min(tries, key=lambda one: one["backward_ms"] + one["step_ms"])  # other programs may disturb one

            rounds = 3

            def traced() -> None:
                for _ in range(rounds):
                    backward()
                    with record_function("hvd step"):
                        step()

            events = self.trace(traced)
        waits, elsewhere, calls = self.calls_within(events, "hvd step")
        self.checks.measure(
            "step",
            side_stream=on_side_stream,
            behind_a_busy_gpu=host,
            waits_on_the_calling_thread=dict(waits),
            waits_on_other_threads=dict(elsewhere),
            runtime_calls_of_all_steps=dict(calls),
        )
        assert host["backward_ms"] + host["step_ms"] < busy / 2, f"backward() or step() waited for the GPU: {host}"
        assert calls, "the profiler has seen no CUDA call in step()"
        assert not waits, f"calls in {rounds} steps that stop the host: {dict(waits)}"
        return f"{host}"

    @staticmethod
    def calls_within(events: list[dict[str, Any]], label: str) -> tuple[Counter[str], Counter[str], Counter[str]]:
        """Blocking calls on the thread with the label, on other threads meanwhile, and all calls, by name."""
        spans = [
            (event["ts"], event["ts"] + event["dur"], event["tid"])
            for event in events
            if event.get("cat") == "user_annotation" and event.get("name") == label
        ]
        waits: Counter[str] = Counter()
        elsewhere: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        for event in events:
            if event.get("cat") not in ("cuda_runtime", "cuda_driver"):
                continue
            name = event["name"].removesuffix("_v2").split("_v")[0]
            for begin, end, thread in spans:
                if begin <= event["ts"] <= end:
                    calls[name] += 1
                    if name in BLOCKING:
                        (waits if event["tid"] == thread else elsewhere)[name] += 1
        return waits, elsewhere, calls


def main() -> int:
    arguments = argument_parser(__doc__).parse_args()
    if arguments.device == "cpu":
        say(part="timings", check="all", ok=True, note="skipped: there is no GPU to time")
        return 0
    checks = Checks("timings", arguments.device, arguments.short)
    part = Timings(checks)
    checks.run("raw NCCL", part.make_raw)
    checks.run("allreduce", part.allreduce)
    checks.run("step on the default stream", lambda: part.step_without_waiting(on_side_stream=False))
    checks.run("step on a side stream", lambda: part.step_without_waiting(on_side_stream=True))
    checks.run("group", part.group)
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
