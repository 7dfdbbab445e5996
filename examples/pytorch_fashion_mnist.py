"""Trains a small convolutional network on Fashion-MNIST on several ranks.

    mpirun --bind-to none -np 2 python examples/pytorch_fashion_mnist.py
    hvdrun -np 2 python examples/pytorch_fashion_mnist.py

The images come from the Debian package dataset-fashion-mnist, or from any folder with the four IDX files (--data).
After the training, the script measures what the ranks gain and what communication costs, and prints one table.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _data import FASHION_MNIST, Images
from torch import nn
from tqdm import tqdm

import horovod_cpp.torch as hvd


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=FASHION_MNIST, help="folder with the IDX files, plain or .gz")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of an epoch; all images if not given")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step on each rank")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="for one rank; it grows with their number")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--rounds", type=int, default=24, help="of the measurement after the training; 0: no table")
    parser.add_argument(
        "--expect", type=float, default=0.0, metavar="PERCENT", help="the test accuracy below which the job fails"
    )
    return parser.parse_args()


# ---- the network -----------------------------------------------------------------------------------------------------


def make_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def make_optimizer(network: nn.Module, arguments: argparse.Namespace) -> torch.optim.Optimizer:
    # The batch of a step grows with the ranks, and the learning rate with it.
    rate = arguments.learning_rate * hvd.size()
    return torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, nesterov=True)


# ---- training --------------------------------------------------------------------------------------------------------


def train_epoch(
    epoch: int,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Images,
    arguments: argparse.Namespace,
) -> None:
    # The same order on all ranks; each takes its share of every step.
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(arguments.seed + epoch))
    together = arguments.batch_size * hvd.size()
    steps = min(len(data) // together, arguments.steps or len(data))
    network.train()
    progress = tqdm(
        range(steps),
        desc=f"epoch {epoch + 1}/{arguments.epochs}",
        unit="step",
        disable=hvd.rank() != 0,
        mininterval=0.2 if sys.stderr.isatty() else 5,
    )
    for step in progress:
        begin = step * together + hvd.rank() * arguments.batch_size
        images, labels = data.batch(order[begin : begin + arguments.batch_size])
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(network: nn.Module, data: Images) -> float:
    """Each rank tests its share of the images; the sums are reduced."""
    network.eval()
    right = torch.zeros(1, dtype=torch.int64)
    for indices in torch.arange(hvd.rank(), len(data), hvd.size()).split(500):
        images, labels = data.batch(indices)
        right += (network(images).argmax(1) == labels).sum()
    return hvd.allreduce(right, op=hvd.Sum, name="right").item() / len(data)


# ---- what the ranks gain, and what communication costs ---------------------------------------------------------------


class Measurement:
    """Steps of the same network, in turns: with the library, with only a barrier a step, and on one rank alone.

    The learning rate is 0: how long a step computes depends on the weights, and these stay the same in all three.
    """

    def __init__(self, network: nn.Module, data: Images, arguments: argparse.Namespace) -> None:
        self.batch_size = arguments.batch_size
        self.steps = 10  # a turn is short beside the machine's own changes of speed
        self.images, self.labels = data.batch(torch.arange(self.batch_size) + hvd.rank() * self.batch_size)
        self.local = copy.deepcopy(network)
        self.local_optimizer = make_optimizer(self.local, arguments)
        self.shared = copy.deepcopy(network)
        self.shared_optimizer = hvd.DistributedOptimizer(
            make_optimizer(self.shared, arguments),
            named_parameters=[(f"measured.{name}", value) for name, value in self.shared.named_parameters()],
        )
        for group in self.local_optimizer.param_groups + self.shared_optimizer.param_groups:
            group["lr"] = 0.0
        self.rates: dict[str, list[float]] = {"library": [], "barrier": [], "alone": []}
        self.waits: list[float] = []
        self.bytes_a_step = 0

    def run(self, rounds: int) -> None:
        self.time_steps(self.shared_step)  # warm-up
        self.time_steps(self.barrier_step)
        before = hvd.statistics()["bytes_reduced"]
        self.shared_step()
        self.bytes_a_step = hvd.statistics()["bytes_reduced"] - before
        self.waits.clear()
        for _ in tqdm(range(rounds), desc="measuring", disable=hvd.rank() != 0, mininterval=0.2):
            self.rates["library"].append(self.time_steps(self.shared_step) * hvd.size())
            self.rates["barrier"].append(self.time_steps(self.barrier_step) * hvd.size())
            if hvd.rank() == 0:  # the others sleep in the barrier of the next round
                self.rates["alone"].append(self.time_steps(self.local_step, synchronized=False))
        hvd.barrier()

    def time_steps(self, step: Callable[[], None], synchronized: bool = True) -> float:
        """Images a second on this rank."""
        if synchronized:
            hvd.barrier()
        step()  # finds the caches as the turn before has left them
        start = time.perf_counter()
        for _ in range(self.steps):
            step()
        return self.steps * self.batch_size / (time.perf_counter() - start)

    def backward(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(self.images), self.labels).backward()

    def shared_step(self) -> None:
        self.backward(self.shared, self.shared_optimizer)
        start = time.perf_counter()
        self.shared_optimizer.synchronize()
        self.waits.append(time.perf_counter() - start)
        with self.shared_optimizer.skip_synchronize():
            self.shared_optimizer.step()

    def local_step(self) -> None:
        self.backward(self.local, self.local_optimizer)
        self.local_optimizer.step()

    def barrier_step(self) -> None:
        self.local_step()
        hvd.barrier()

    def print_table(self, final_accuracy: float, seconds: float) -> None:
        rate = {name: statistics.median(rates) for name, rates in self.rates.items()}
        ratio = statistics.median(a / b for a, b in zip(self.rates["library"], self.rates["barrier"], strict=True))
        ranks = f"{hvd.size()} rank" + ("s" if hvd.size() > 1 else "")
        rows = [
            ("test accuracy", f"{final_accuracy:.2%}"),
            ("training", f"{seconds:.0f} s"),
            ("images/s, 1 rank alone", f"{rate['alone']:,.0f}"),
            (f"images/s, {ranks}", f"{rate['library']:,.0f}"),
            (f"images/s, {ranks}, only a barrier a step", f"{rate['barrier']:,.0f}"),
            ("library / only a barrier (median of the rounds)", f"{ratio:.3f}"),
            ("bytes reduced a step", f"{self.bytes_a_step:,}"),
            ("bytes reduced by this job", f"{hvd.statistics()['bytes_reduced']:,}"),
            ("waiting for communication a step (median)", f"{statistics.median(self.waits) * 1e3:.3f} ms"),
        ]
        width = max(len(label) for label, _ in rows)
        print()
        for label, value in rows:
            print(f"{label:<{width}}  {value:>14}")


def leave_the_one_core() -> None:
    """mpirun binds each rank to one core unless told --bind-to none; the threads of a rank then share that core."""
    if len(os.sched_getaffinity(0)) > 1 or (os.cpu_count() or 1) == 1:
        return
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    if int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == 0:
        print("each rank was bound to one core; undone (mpirun --bind-to none does not bind)")


def main() -> None:
    arguments = parse_arguments()
    leave_the_one_core()
    hvd.init()
    torch.set_num_threads(1)  # the ranks share the cores
    torch.manual_seed(arguments.seed)

    train_data = Images(arguments.data, "train")
    test_data = Images(arguments.data, "t10k")
    network = make_network()
    hvd.broadcast_parameters(network.state_dict(), root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        make_optimizer(network, arguments), named_parameters=network.named_parameters()
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs)

    final_accuracy = 0.0
    start = time.perf_counter()
    for epoch in range(arguments.epochs):
        train_epoch(epoch, network, optimizer, train_data, arguments)
        schedule.step()
        final_accuracy = accuracy(network, test_data)
        if hvd.rank() == 0:
            print(f"epoch {epoch + 1}: test accuracy {final_accuracy:.2%}", flush=True)
    seconds = time.perf_counter() - start

    if arguments.rounds > 0:
        measurement = Measurement(network, train_data, arguments)
        measurement.run(arguments.rounds)
        if hvd.rank() == 0:
            measurement.print_table(final_accuracy, seconds)
    is_enough = 100 * final_accuracy >= arguments.expect
    if not is_enough:
        if hvd.rank() == 0:
            print(f"the test accuracy is below {arguments.expect:g} %", flush=True)
        hvd.barrier()  # the launcher ends all ranks when one has failed; rank 0 has said everything by then
    hvd.shutdown()
    sys.exit(0 if is_enough else 1)


if __name__ == "__main__":
    main()
