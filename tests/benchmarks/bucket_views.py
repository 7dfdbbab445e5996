"""Times a training step with gradients of torch's own, in groups, and as views of buckets (gradient_as_bucket_view).

Run `OMP_NUM_THREADS=1 mpirun -np 2 python tests/benchmarks/bucket_views.py` with PYTHONPATH at the root of the tree.

The ways are taken in turns, a few steps each. A step is timed on each rank from the beginning of backward to the end of
optimizer.step(); the slower rank counts. Two networks: one of many small tensors, one of few large ones.

Views pay where gradients are many and small: each is an operation of its own otherwise, with its enqueue, negotiation
and two copies for fusion. Large gradients are reduced where they are in either way, and autograd writes a fresh one,
which has to be copied into its view: there, views cost that copy. With zero_grad(set_to_none=False) autograd adds to a
view itself, which costs as much; later ones of several backward passes do so in any case.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import horovod_cpp.torch as hvd

NETWORKS: dict[str, tuple[Callable[[], torch.nn.Module], int]] = {
    "many small": (lambda: layers(100, 32), 32),
    "few large": (lambda: layers(6, 1024), 1024),
}
WAYS: dict[str, dict[str, Any]] = {
    "own gradients": {},
    "groups=2": {"groups": 2},
    "bucket views": {"gradient_as_bucket_view": True},
    "bucket views, zeros": {"gradient_as_bucket_view": True},
    "own, fp16": {"compression": hvd.Compression.fp16},
    "bucket views, fp16": {"gradient_as_bucket_view": True, "compression": hvd.Compression.fp16},
}


def layers(count: int, width: int) -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        *(layer for _ in range(count) for layer in (torch.nn.Linear(width, width), torch.nn.Tanh()))
    )


class Way:
    """One network and its optimizer."""

    def __init__(self, name: str, make: Callable[[], torch.nn.Module], width: int) -> None:
        self.set_to_none = not name.endswith("zeros")
        self.model = make()
        named = [(f"{name}.{key}", parameter) for key, parameter in self.model.named_parameters()]
        inner = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.optimizer = hvd.DistributedOptimizer(inner, named, **WAYS[name])
        self.batch = torch.randn(8, width)
        self.times: list[float] = []

    def step(self) -> float:
        """Seconds of the slower rank."""
        self.optimizer.zero_grad(set_to_none=self.set_to_none)
        loss = self.model(self.batch).square().mean()
        hvd.barrier()
        start = time.perf_counter()
        loss.backward()
        self.optimizer.step()
        return hvd.allreduce(torch.tensor(time.perf_counter() - start, dtype=torch.float64), op=hvd.Max).item()


def measure(network: str, rounds: int, steps: int) -> dict[str, list[float]]:
    ways = {name: Way(name, *NETWORKS[network]) for name in WAYS}
    for turn in range(rounds + 1):
        for way in ways.values():
            times = [way.step() for _ in range(steps)]
            if turn > 0:  # the first is for warming up
                way.times += times
    return {name: way.times for name, way in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="turns of each way")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hvd.init()
    for network in NETWORKS:
        result = measure(network, arguments.rounds, arguments.steps)
        if hvd.rank() == 0:
            parameters = list(NETWORKS[network][0]().parameters())
            mebibytes = sum(parameter.numel() for parameter in parameters) * 4 / (1 << 20)
            print(f"{network}: {len(parameters)} gradients, {mebibytes:.1f} MiB; {hvd.size()} ranks, ms a step")
            for name, times in result.items():
                low, middle, high = (1e3 * value for value in statistics.quantiles(times, n=4))
                print(f"  {name:22}{middle:8.2f}   quartiles {low:8.2f}{high:8.2f}")
    hvd.shutdown()


if __name__ == "__main__":
    main()
