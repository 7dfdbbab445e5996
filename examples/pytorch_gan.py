"""Two networks, two optimizers: a generator makes pictures of clothes, a discriminator tells them from Fashion-MNIST's.

    mpirun -np 2 python examples/pytorch_gan.py --output pictures.png

Each optimizer reduces the gradients of its own network; how a step keeps them apart is said where it happens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from _data import FASHION_MNIST, Images
from torch import nn
from tqdm import tqdm

import horovod_cpp.torch as hvd

NOISE = 64  # numbers that a picture is made from


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=FASHION_MNIST, help="folder with the IDX files, plain or .gz")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=32, help="pictures a step on each rank")
    parser.add_argument("--learning-rate", type=float, default=0.001)
    parser.add_argument("--output", type=Path, default=Path("gan-pictures.png"))
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def make_generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(NOISE, 64 * 7 * 7),
        nn.Unflatten(1, (64, 7, 7)),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        nn.Tanh(),
    )


def make_discriminator() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 1),
    )


def distributed_adam(network: nn.Module, prefix: str, rate: float) -> torch.optim.Optimizer:
    """The names are keys of the reductions: both networks have a "0.weight", so each name gets a prefix."""
    return hvd.DistributedOptimizer(
        torch.optim.Adam(network.parameters(), lr=rate, betas=(0.5, 0.999)),
        named_parameters=[(f"{prefix}.{name}", parameter) for name, parameter in network.named_parameters()],
    )


def pictures(images: torch.Tensor) -> torch.Tensor:
    """Pixels from -1 to 1, as the generator's tanh makes them."""
    return images.float() / 127.5 - 1


def train(generator: nn.Module, discriminator: nn.Module, images: torch.Tensor, arguments: argparse.Namespace) -> None:
    generator_optimizer = distributed_adam(generator, "generator", arguments.learning_rate)
    discriminator_optimizer = distributed_adam(discriminator, "discriminator", arguments.learning_rate)
    real_label, made_label = torch.ones(arguments.batch_size, 1), torch.zeros(arguments.batch_size, 1)
    progress = tqdm(range(arguments.steps), unit="step", disable=hvd.rank() != 0)
    for _ in progress:
        real = pictures(images[torch.randint(len(images), (arguments.batch_size,))])
        made = generator(torch.randn(arguments.batch_size, NOISE))

        # One backward pass for both halves, since each starts the reductions; detach() keeps it out of the generator.
        discriminator_optimizer.zero_grad()
        told = F.binary_cross_entropy_with_logits(discriminator(real), real_label)
        told = told + F.binary_cross_entropy_with_logits(discriminator(made.detach()), made_label)
        told.backward()
        discriminator_optimizer.step()

        # The generator's loss goes back through the discriminator. With `inputs` it leaves no gradients there:
        # they would be handed to the discriminator's optimizer and reduced for nothing.
        generator_optimizer.zero_grad()
        fooled = F.binary_cross_entropy_with_logits(discriminator(made), real_label)
        fooled.backward(inputs=list(generator.parameters()))
        generator_optimizer.step()
        progress.set_postfix(discriminator=f"{told.item():.2f}", generator=f"{fooled.item():.2f}", refresh=False)


@torch.no_grad()
def distance(generator: nn.Module, images: torch.Tensor) -> float:
    """How far the made pictures are from real ones: the Fréchet distance of two normal distributions of thumbnails.

    Each rank makes some of the pictures. The measure knows nothing of the discriminator.
    """
    made = generator(torch.randn(2000 // hvd.size(), NOISE))
    thumbnails = [F.avg_pool2d(hvd.allgather(made, name="made"), 4), F.avg_pool2d(pictures(images), 4)]
    first, second = (thumbnail.flatten(1).double() for thumbnail in thumbnails)
    spread = torch.linalg.eigvals(first.T.cov() @ second.T.cov()).real.clamp(min=0).sqrt().sum()
    gap = (first.mean(0) - second.mean(0)).square().sum()
    return float(gap + first.T.cov().trace() + second.T.cov().trace() - 2 * spread)


@torch.no_grad()
def save_grid(generator: nn.Module, path: Path) -> None:
    import matplotlib.image

    made = generator(torch.randn(64, NOISE)).reshape(8, 8, 28, 28)
    matplotlib.image.imsave(path, made.transpose(1, 2).reshape(8 * 28, 8 * 28).numpy(), cmap="gray", vmin=-1, vmax=1)


def main() -> None:
    arguments = parse_arguments()
    hvd.init()
    torch.set_num_threads(1)  # the ranks share the cores
    torch.manual_seed(arguments.seed + hvd.rank())  # each rank draws images and noise of its own

    images = Images(arguments.data, "train").images
    unseen = Images(arguments.data, "t10k").images[:2000]
    generator, discriminator = make_generator(), make_discriminator()
    for network in (generator, discriminator):
        hvd.broadcast_parameters(network.state_dict(), root_rank=0)

    before = distance(generator, unseen)
    train(generator, discriminator, images, arguments)
    after = distance(generator, unseen)
    if hvd.rank() == 0:
        save_grid(generator, arguments.output)
        print(f"rank 0 sent {hvd.statistics()['data_bytes_sent']:,} bytes; {arguments.output} shows 64 pictures")
        print(
            f"result: distance to unseen real pictures {before:.2f} before, {after:.2f} after {arguments.steps} steps"
        )
    hvd.shutdown()


if __name__ == "__main__":
    main()
