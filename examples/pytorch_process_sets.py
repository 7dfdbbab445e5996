"""Hybrid parallelism: a network is split over the two ranks of a pair, and the pairs share the data.

    mpirun --oversubscribe -np 4 python examples/pytorch_process_sets.py

A process set is a part of the ranks, in which operations run as they do in the whole job. With four ranks, these:

              left half    right half
    pair 0    rank 0       rank 1        pair sets: [0, 1], [2, 3]
    pair 1    rank 2       rank 3        half sets: [0, 2], [1, 3]

The hidden layer of the network has two halves. A rank has one of them, with the weights that lead to it and away from
it. Ranks of a pair see the same images: each computes what its half adds to the logits, and an allreduce over the pair
adds these up. Ranks of a half set have the same weights and see different images: their optimizer averages the
gradients over the half set. So a rank sends weights' gradients to those that share its half alone.

All ranks register all sets, in the same order. After that a rank calls operations of its own two sets only; one that
is outside a set calls nothing there, and is not waited for. With two ranks there is one pair, and nothing to average.
"""

from __future__ import annotations

import argparse
import sys
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
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64, help="images a step in each pair")
    parser.add_argument("--hidden", type=int, default=256, help="size of the hidden layer, both halves together")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="for one pair; it grows with their number")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def make_process_set(ranks: list[int]) -> hvd.ProcessSet:
    """Collective over all ranks. The set of all ranks is there from the start."""
    return hvd.global_process_set if len(ranks) == hvd.size() else hvd.add_process_set(ranks)


class Half(nn.Module):
    """One half of a network with one hidden layer. Its output is that of the whole network."""

    def __init__(self, hidden: int, pair: hvd.ProcessSet) -> None:
        super().__init__()
        self.pair = pair
        self.first = nn.Linear(28 * 28, hidden // 2)
        self.second = nn.Linear(hidden // 2, 10, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.second(F.relu(self.first(images.flatten(1))))
        return hvd.allreduce(logits, op=hvd.Sum, process_set=self.pair)


def train(half: Half, images: Images, pair_index: int, half_set: hvd.ProcessSet, arguments: argparse.Namespace) -> None:
    pairs = hvd.size() // 2
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(half.parameters(), lr=arguments.learning_rate * pairs, momentum=0.9),
        named_parameters=half.named_parameters(),
        process_set=half_set,
    )
    choice = torch.Generator().manual_seed(arguments.seed + pair_index)  # the same images in a pair, others in the next
    for _ in tqdm(range(arguments.steps), unit="step", disable=hvd.rank() != 0):
        inputs, labels = images.batch(torch.randint(len(images), (arguments.batch_size,), generator=choice))
        optimizer.zero_grad()
        # Both ranks of a pair have this loss. The gradient of a sum over ranks is the sum of their gradients: with a
        # half of the loss on each it is that of one loss.
        loss = F.cross_entropy(half(inputs), labels) / 2
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(half: Half, images: Images, pair_index: int, half_set: hvd.ProcessSet) -> float:
    """Each pair tests its share of the images; a half set has one rank of each pair."""
    indices = torch.arange(pair_index, len(images), hvd.size() // 2)
    inputs, labels = images.batch(indices)
    right = (half(inputs).argmax(1) == labels).sum()
    return int(hvd.allreduce(right, op=hvd.Sum, process_set=half_set)) / len(images)


@torch.no_grad()
def put_together(half: Half, pair: hvd.ProcessSet) -> nn.Module:
    """The whole network. The ranks of the pair call this, and no others."""
    state = {
        "1.weight": hvd.allgather(half.first.weight, process_set=pair),
        "1.bias": hvd.allgather(half.first.bias, process_set=pair),
        "3.weight": hvd.allgather(half.second.weight.T, process_set=pair).T,  # rows are gathered; these are columns
    }
    hidden, pixels = state["1.weight"].shape
    whole = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 10, bias=False))
    whole.load_state_dict(state)
    return whole


def main() -> None:
    arguments = parse_arguments()
    hvd.init(process_sets="dynamic")
    torch.set_num_threads(1)  # the ranks share the cores
    if hvd.size() % 2 != 0:
        sys.exit(f"{hvd.size()} ranks do not make pairs")
    pair_sets = [make_process_set([rank, rank + 1]) for rank in range(0, hvd.size(), 2)]
    half_sets = [make_process_set(list(range(side, hvd.size(), 2))) for side in (0, 1)]
    pair_index, side = divmod(hvd.rank(), 2)
    pair, half_set = pair_sets[pair_index], half_sets[side]

    torch.manual_seed(arguments.seed + hvd.rank())
    half = Half(arguments.hidden, pair)
    hvd.broadcast_parameters(half.state_dict(), root_rank=side, process_set=half_set)  # the root is a rank of the job
    train(half, Images(arguments.data, "train"), pair_index, half_set, arguments)

    test_images = Images(arguments.data, "t10k")
    in_halves = accuracy(half, test_images, pair_index, half_set)
    if pair_index == 0:
        whole = put_together(half, pair)
    if hvd.rank() == 0:
        inputs, labels = test_images.batch(torch.arange(len(test_images)))
        alone = float((whole(inputs).argmax(1) == labels).float().mean())
        print(f"rank 0 sent {hvd.statistics()['data_bytes_sent']:,} bytes")
        print(f"result: test accuracy {in_halves:.2%} in halves, {alone:.2%} put together on rank 0")
    hvd.barrier()  # the first rank that shuts down ends the job for all: the other pairs wait for the first
    hvd.shutdown()


if __name__ == "__main__":
    main()
