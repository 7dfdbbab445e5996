"""Word vectors (skip-gram with negative samples), whose gradients are sparse: only rows that were used travel.

    mpirun -np 2 python examples/pytorch_sparse_embeddings.py

A step uses a few hundred rows of two tables with thousands. With `nn.Embedding(sparse=True)` the gradient holds these
rows alone, and the optimizer gathers them from all ranks. The same training is done again with `sparse_as_dense=True`,
which reduces whole tables: the vectors are the same, and the bytes that each way has sent are compared.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
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
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64, help="pairs of words a step on each rank")
    parser.add_argument("--dimensions", type=int, default=64, help="of a word's vector")
    parser.add_argument("--window", type=int, default=4, help="words on each side that a word is paired with")
    parser.add_argument("--negatives", type=int, default=5, help="random words that each pair is held against")
    parser.add_argument("--learning-rate", type=float, default=0.05, help="of a pair")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


class Words:
    """The words of a text as numbers, the more frequent the lower, in pairs of neighbours."""

    def __init__(self, text: str, window: int) -> None:
        found = re.findall(r"[a-z]+", text.lower())
        counts = Counter(found).most_common()
        self.spelling = [word for word, _ in counts]
        self.number = {word: index for index, word in enumerate(self.spelling)}
        self.chances = torch.tensor([count for _, count in counts]).float() ** 0.75  # as word2vec draws its negatives
        numbers = torch.tensor([self.number[word] for word in found])
        pairs = [torch.stack([numbers[:-gap], numbers[gap:]], dim=1) for gap in range(1, window + 1)]
        pairs += [pair.flip(1) for pair in pairs]
        # The pairs of the last tenth of the text are for the test.
        self.train_pairs = torch.cat([pair[: len(pair) * 9 // 10] for pair in pairs])
        self.test_pairs = torch.cat([pair[len(pair) * 9 // 10 :] for pair in pairs])


class SkipGram(nn.Module):
    def __init__(self, words: int, dimensions: int) -> None:
        super().__init__()
        self.word = nn.Embedding(words, dimensions, sparse=True)
        self.neighbour = nn.Embedding(words, dimensions, sparse=True)
        nn.init.uniform_(self.word.weight, -0.5 / dimensions, 0.5 / dimensions)
        nn.init.zeros_(self.neighbour.weight)

    def forward(self, pairs: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
        """The loss of each pair. pairs: (n, 2); negatives: (n, k)."""
        word = self.word(pairs[:, 0]).unsqueeze(2)
        near = self.neighbour(pairs[:, 1:]) @ word
        far = self.neighbour(negatives) @ word
        return -(F.logsigmoid(near).sum((1, 2)) + F.logsigmoid(-far).sum((1, 2)))


def train(model: SkipGram, words: Words, sparse_as_dense: bool, arguments: argparse.Namespace) -> int:
    """Returns the bytes that this rank has sent."""
    # Each pair moves its words by the whole rate, however many pairs the ranks have together: a sum, not an average.
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=arguments.learning_rate),
        named_parameters=model.named_parameters(),
        op=hvd.Sum,
        sparse_as_dense=sparse_as_dense,
    )
    chance = torch.Generator().manual_seed(arguments.seed + hvd.rank())  # other pairs on each rank, the same each time
    before = hvd.statistics()["data_bytes_sent"]
    progress = tqdm(
        range(arguments.steps),
        desc="dense " if sparse_as_dense else "sparse",
        unit="step",
        disable=hvd.rank() != 0,
    )
    for _ in progress:
        chosen = torch.randint(len(words.train_pairs), (arguments.batch_size,), generator=chance)
        negatives = torch.multinomial(words.chances, arguments.batch_size * arguments.negatives, True, generator=chance)
        optimizer.zero_grad()
        model(words.train_pairs[chosen], negatives.view(-1, arguments.negatives)).sum().backward()
        optimizer.step()
    return hvd.statistics()["data_bytes_sent"] - before


@torch.no_grad()
def test_loss(model: SkipGram, words: Words, arguments: argparse.Namespace) -> float:
    """Per pair; each rank takes its share of the pairs."""
    pairs = words.test_pairs[hvd.rank() :: hvd.size()]
    chance = torch.Generator().manual_seed(arguments.seed)
    negatives = torch.multinomial(words.chances, len(pairs) * arguments.negatives, True, generator=chance)
    losses = model(pairs, negatives.view(-1, arguments.negatives))
    total, count = hvd.allreduce(torch.tensor([losses.double().sum(), len(losses)]), name="test_loss", op=hvd.Sum)
    return float(total / count)


def nearest(model: SkipGram, words: Words, word: str) -> list[str]:
    vectors = F.normalize(model.word.weight.detach()[:1000])  # rare words have been seen too little
    closeness = vectors @ vectors[words.number[word]]
    return [words.spelling[index] for index in closeness.topk(6).indices[1:]]


def main() -> None:
    arguments = parse_arguments()
    hvd.init()
    torch.set_num_threads(1)  # the ranks share the cores
    words = Words(read_text(arguments.text), arguments.window)

    models, bytes_sent, before = [], [], 0.0
    for sparse_as_dense in (False, True):
        torch.manual_seed(arguments.seed + hvd.rank())
        models.append(SkipGram(len(words.spelling), arguments.dimensions))
        hvd.broadcast_parameters(models[-1].state_dict(), root_rank=0)
        before = test_loss(models[-1], words, arguments)
        bytes_sent.append(train(models[-1], words, sparse_as_dense, arguments))
    after = test_loss(models[0], words, arguments)
    sparse, dense = models
    difference = float((sparse.word.weight - dense.word.weight).detach().abs().max())

    if hvd.rank() == 0:
        for word in [word for word in words.spelling if len(word) > 5][:6]:
            print(f"{word}: {', '.join(nearest(sparse, words, word))}")
        print(f"{len(words.spelling)} words; the vectors of both ways differ by at most {difference:.1e}")
        rates = [f"{sent // arguments.steps:,}" for sent in bytes_sent]
        print(f"bytes that rank 0 sent a step: {rates[0]} sparse, {rates[1]} dense")
        print(f"result: test loss {before:.3f} before, {after:.3f} after {arguments.steps} steps")
    hvd.shutdown()


if __name__ == "__main__":
    main()
