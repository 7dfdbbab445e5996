"""A recurrent network that learns to write like a text, with gradients that are clipped after they are reduced.

    mpirun -np 2 python examples/pytorch_char_language_model.py
    mpirun -np 2 python examples/pytorch_char_language_model.py --text some-novel.txt --steps 2000

It prints how many bits the network needs for a character of the last tenth of the text, which it never trains on,
before and after the training.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from _data import LICENCES, read_text
from torch import nn
from tqdm import tqdm

import horovod_cpp.torch as hvd


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=LICENCES, help="a text file, or a folder of them")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16, help="stretches of text a step on each rank")
    parser.add_argument("--length", type=int, default=64, help="characters of a stretch")
    parser.add_argument("--hidden", type=int, default=192, help="size of the network's memory")
    parser.add_argument("--learning-rate", type=float, default=0.004, help="for one rank")
    parser.add_argument("--clip", type=float, default=1.0, help="longest gradient, all parameters taken together")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


class Writer(nn.Module):
    """From characters to the logits of the character that follows each."""

    def __init__(self, characters: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 48)
        self.memory = nn.GRU(48, hidden, batch_first=True)
        self.output = nn.Linear(hidden, characters)

    def forward(
        self, characters: torch.Tensor, state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        remembered, state = self.memory(self.embedding(characters), state)
        return self.output(remembered), state


def loss_of(writer: Writer, stretches: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    logits, _ = writer(stretches[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), stretches[:, 1:].flatten(), reduction=reduction)


def train(writer: Writer, text: torch.Tensor, arguments: argparse.Namespace) -> None:
    # Adam's rate grows with the root of the batch, rather than with the batch.
    adam = torch.optim.Adam(writer.parameters(), lr=arguments.learning_rate * math.sqrt(hvd.size()))
    optimizer = hvd.DistributedOptimizer(adam, named_parameters=writer.named_parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    places = torch.Generator().manual_seed(arguments.seed + hvd.rank())  # each rank reads elsewhere
    progress = tqdm(range(arguments.steps), unit="step", disable=hvd.rank() != 0)
    for _ in progress:
        starts = torch.randint(len(text) - arguments.length, (arguments.batch_size,), generator=places)
        stretches = torch.stack([text[start : start + arguments.length + 1] for start in starts])
        optimizer.zero_grad()
        loss = loss_of(writer, stretches)
        loss.backward()
        # Clipped as one: a rank that clipped its own gradients before the reduction would change the direction of all.
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(writer.parameters(), arguments.clip)
        with optimizer.skip_synchronize():
            optimizer.step()
        schedule.step()
        progress.set_postfix(bits=f"{loss.item() / math.log(2):.2f}", refresh=False)


@torch.no_grad()
def bits_per_character(writer: Writer, text: torch.Tensor, length: int) -> float:
    """Each rank reads its share of the stretches; the sums are reduced."""
    stretches = text.unfold(0, length + 1, length)[hvd.rank() :: hvd.size()]
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in stretches.split(32):
        sums += torch.tensor([loss_of(writer, batch, reduction="sum").item(), batch[:, 1:].numel()])
    nats, characters = hvd.allreduce(sums, op=hvd.Sum, name="bits_per_character")
    return float(nats / characters) / math.log(2)


@torch.no_grad()
def write(writer: Writer, alphabet: str, beginning: int, length: int, seed: int) -> str:
    chance = torch.Generator().manual_seed(seed)
    written, state = [beginning], None
    for _ in range(length):
        logits, state = writer(torch.tensor([written[-1:]]), state)
        chances = F.softmax(logits[0, -1] / 0.7, dim=0)  # what is likely becomes likelier
        written.append(int(torch.multinomial(chances, 1, generator=chance)))
    return "".join(alphabet[character] for character in written)


def main() -> None:
    arguments = parse_arguments()
    hvd.init()
    torch.set_num_threads(1)  # the ranks share the cores
    torch.manual_seed(arguments.seed + hvd.rank())  # the ranks begin with different weights until the broadcast

    characters = read_text(arguments.text)
    alphabet = "".join(sorted(set(characters)))
    number = {character: index for index, character in enumerate(alphabet)}
    text = torch.tensor([number[character] for character in characters])
    train_text, test_text = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]

    writer = Writer(len(alphabet), arguments.hidden)
    hvd.broadcast_parameters(writer.state_dict(), root_rank=0)
    before = bits_per_character(writer, test_text, arguments.length)
    train(writer, train_text, arguments)
    after = bits_per_character(writer, test_text, arguments.length)
    if hvd.rank() == 0:
        print(f"it writes: {write(writer, alphabet, int(text[0]), 300, arguments.seed)}")
        print(f"rank 0 sent {hvd.statistics()['data_bytes_sent']:,} bytes")
        print(f"result: {before:.3f} bits per character before, {after:.3f} after {arguments.steps} steps")
    hvd.shutdown()


if __name__ == "__main__":
    main()
