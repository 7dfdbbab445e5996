"""The idiom of ImageNet scripts, on Fashion-MNIST: warm-up, sampler, averaged metrics, checkpoints and resuming.

    mpirun -np 2 python examples/pytorch_imagenet_style.py --epochs 3 --checkpoints /tmp/checkpoints
    mpirun -np 2 python examples/pytorch_imagenet_style.py --epochs 6 --checkpoints /tmp/checkpoints

The second command goes on where the first has ended. --fp16-allreduce halves the bytes that travel.
"""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from _data import FASHION_MNIST, Images
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm

import horovod_cpp.torch as hvd


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=FASHION_MNIST, help="folder with the IDX files, plain or .gz")
    parser.add_argument("--checkpoints", type=Path, help="folder to save to after each epoch, and to go on from")
    parser.add_argument("--epochs", type=int, default=6, help="in all, those before a resume included")
    parser.add_argument("--steps", type=int, help="of an epoch; all images if not given")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step on each rank")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="for one rank; it grows with their number")
    parser.add_argument("--warmup-epochs", type=float, default=2)
    parser.add_argument("--decay-epochs", type=int, nargs="*", default=[4, 5], help="the rate falls to a tenth there")
    parser.add_argument("--fp16-allreduce", action="store_true", help="gradients travel as float16")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def make_network() -> nn.Module:
    def convolution(channels: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *convolution(1, 16),
        nn.MaxPool2d(2),
        *convolution(16, 32),
        nn.MaxPool2d(2),
        *convolution(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def rate_factor(epoch: float, arguments: argparse.Namespace) -> float:
    """What the learning rate of one rank is multiplied by at this point of the training.

    A batch of all ranks is size() times as large, and so is the rate; but a fresh network would not bear that at once.
    """
    if epoch < arguments.warmup_epochs:
        return float(1 + (hvd.size() - 1) * epoch / arguments.warmup_epochs)
    return float(hvd.size() * 0.1 ** sum(epoch >= decay for decay in arguments.decay_epochs))


class Metric:
    """A mean over all that the ranks have seen."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sum_and_count = torch.zeros(2, dtype=torch.float64)

    def update(self, mean: torch.Tensor, count: int) -> None:
        self.sum_and_count += torch.tensor([float(mean) * count, count])

    def average(self) -> float:
        total, count = hvd.allreduce(self.sum_and_count, name=self.name, op=hvd.Sum)
        return float(total / count)


def train_epoch(network: nn.Module, optimizer: torch.optim.Optimizer, schedule: LambdaLR, batches: tqdm) -> float:
    network.train()
    train_loss = Metric("train_loss")
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        train_loss.update(loss.detach(), len(labels))
    for buffer in network.buffers():  # batch normalisation's running statistics, until now of this rank's images only
        if buffer.is_floating_point():
            hvd.allreduce_(buffer, op=hvd.Average)
    return train_loss.average()


@torch.no_grad()
def validate(network: nn.Module, batches: DataLoader[tuple[torch.Tensor, ...]]) -> float:
    network.eval()
    accuracy = Metric("accuracy")
    for images, labels in batches:
        right = network(images).argmax(1) == labels
        accuracy.update(right.float().mean(), len(labels))
    return accuracy.average()


def checkpoint(folder: Path, epochs: int) -> Path:
    return folder / f"after-epoch-{epochs}.pt"


def save(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}, unfinished)
    os.replace(unfinished, path)  # a job that is killed while it saves leaves no half of a checkpoint


def main() -> None:
    arguments = parse_arguments()
    hvd.init()
    torch.set_num_threads(1)  # the ranks share the cores
    torch.manual_seed(arguments.seed + hvd.rank())  # the ranks begin with different weights until the broadcast

    train, test = (Images(arguments.data, part) for part in ("train", "t10k"))
    train_set, test_set = (TensorDataset(*part.batch(torch.arange(len(part)))) for part in (train, test))
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(
        train_set, num_replicas=hvd.size(), rank=hvd.rank(), seed=arguments.seed
    )
    train_batches = DataLoader(train_set, arguments.batch_size, sampler=sampler, drop_last=True)
    # The sampler would repeat images where their number is no multiple of the ranks; a test counts each once.
    test_batches = DataLoader(Subset(test_set, range(hvd.rank(), len(test_set), hvd.size())), batch_size=500)
    steps = min(len(train_batches), arguments.steps or len(train_batches))

    network = make_network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(network.parameters(), lr=arguments.learning_rate, momentum=0.9, weight_decay=5e-5),
        named_parameters=network.named_parameters(),
        compression=hvd.Compression.fp16 if arguments.fp16_allreduce else hvd.Compression.none,
    )

    # Rank 0 alone looks for a checkpoint and reads it: the others may have no such folder. They get all from rank 0.
    epochs_done = 0
    if hvd.rank() == 0 and arguments.checkpoints is not None:
        found = [epoch for epoch in range(1, arguments.epochs + 1) if checkpoint(arguments.checkpoints, epoch).exists()]
        epochs_done = max(found, default=0)
        if epochs_done > 0:
            saved = torch.load(checkpoint(arguments.checkpoints, epochs_done), weights_only=True)
            network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
            print(f"resumes from {checkpoint(arguments.checkpoints, epochs_done)}", flush=True)
    epochs_done = int(hvd.broadcast(torch.tensor(epochs_done), root_rank=0, name="epochs_done"))
    hvd.broadcast_parameters(network.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    # Made after that: it takes up the count of steps, and finds in the optimizer the rate that all factors refer to.
    schedule = LambdaLR(
        optimizer, lambda step: rate_factor(step / steps, arguments), last_epoch=epochs_done * steps - 1
    )

    accuracy = validate(network, test_batches)
    if hvd.rank() == 0:
        print(f"after epoch {epochs_done}: test accuracy {accuracy:.2%}", flush=True)
    for epoch in range(epochs_done, arguments.epochs):
        sampler.set_epoch(epoch)  # another order of the images in each epoch, the same on all ranks
        batches = itertools.islice(train_batches, steps)
        progress = tqdm(batches, desc=f"epoch {epoch + 1}", total=steps, unit="step", disable=hvd.rank() != 0)
        train_loss = train_epoch(network, optimizer, schedule, progress)
        accuracy = validate(network, test_batches)
        if hvd.rank() == 0:
            print(f"after epoch {epoch + 1}: train loss {train_loss:.5f}, test accuracy {accuracy:.2%}", flush=True)
            if arguments.checkpoints is not None:
                save(checkpoint(arguments.checkpoints, epoch + 1), network, optimizer)

    if hvd.rank() == 0:
        print(f"rank 0 sent {hvd.statistics()['data_bytes_sent']:,} bytes")
        print(f"result: test accuracy {accuracy:.2%} after epoch {arguments.epochs}")
    hvd.shutdown()


if __name__ == "__main__":
    main()
