"""`ElasticSampler`: the part of a data set that this rank has, and what of the epoch is done already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, NamedTuple

import torch

from horovod_cpp.common.basics import rank, size


class Progress(NamedTuple):
    """What is done of an epoch, by masks over the indices of the data set. Cheap to make, for commits are frequent."""

    epoch: int
    recorded: torch.Tensor  # what this rank knows to be processed
    settled: torch.Tensor  # what was left out when the indices were last split; equal on all ranks
    shares: torch.Tensor  # the indices that were split, a column for each rank
    done: torch.Tensor  # a mask over the rows, in which this rank has processed its index

    @classmethod
    def of_all(cls, epoch: int, processed: torch.Tensor) -> Progress:
        """What all ranks know of each other."""
        return cls(epoch, processed, processed, torch.empty(0, 1, dtype=torch.int64), torch.empty(0, dtype=torch.bool))

    def assumed(self) -> torch.Tensor:
        """What is processed if the other ranks have processed the rows that this one has."""
        mask = self.settled.clone()
        mask[self.shares[self.done].flatten()] = True
        return mask


class ElasticSampler(torch.utils.data.Sampler[int]):
    """Splits a data set between the ranks as torch's DistributedSampler does, and leaves out what was processed.

    Hand it to a DataLoader, tell it of each batch after its step, and put it into the `TorchState`. After a reset the
    indices that no rank has recorded are split anew between the ranks; ranks may have recorded different numbers.
    Without a `TorchState` every rank takes the others to have recorded as much as itself.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int = 0) -> None:
        """Args: dataset: has a length, equal on all ranks; seed: equal on all ranks. ValueError before `init`."""
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.num_replicas = self.rank = 0
        self._recorded = self._nothing()
        self._settled = self._nothing()
        self._divide()

    def _nothing(self) -> torch.Tensor:
        return torch.zeros(len(self.dataset), dtype=torch.bool)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, in another order if `shuffle`, with nothing processed.

        Call it at the end of the epoch before: at the beginning, after a restart in the middle of an epoch, it would
        forget what was processed.
        """
        self.epoch = epoch
        self._recorded = self._nothing()
        self._settled = self._nothing()
        self._divide()

    def record_batch(self, batch_idx: int, batch_size: int) -> None:
        """Note that a batch of this rank was processed.

        Args:
            batch_idx: its number since this rank last asked for an iterator, from 0.
            batch_size: size of every batch of this rank; the last one may have less.
        """
        if batch_idx < 0 or batch_size < 0:
            raise ValueError(f"record_batch: there is no batch {batch_idx} of size {batch_size}")
        batch = slice(batch_idx * batch_size, (batch_idx + 1) * batch_size)
        self._done[batch] = True
        self._recorded[self._own[batch]] = True

    def record_indices(self, indices: Iterable[int]) -> None:
        """Note that these indices of the data set were processed. IndexError for one that it does not have."""
        which = torch.tensor(list(indices), dtype=torch.int64)
        self._recorded[which] = True
        self._done |= torch.isin(self._own, which)

    @property
    def processed_num(self) -> int:
        """How many indices of the epoch are processed, if all ranks have recorded as much as this one.

        Assign it, the same on all ranks, to go to that place of the epoch's order: what is left is split anew at once.
        ValueError for a number that the data set does not have.
        """
        return int(self.progress().assumed().sum())

    @processed_num.setter
    def processed_num(self, count: int) -> None:
        if not 0 <= count <= len(self.dataset):
            raise ValueError(f"processed_num={count}: the data set has {len(self.dataset)} indices")
        mask = self._nothing()
        mask[self._order[:count]] = True
        self.settle(Progress.of_all(self.epoch, mask))

    @property
    def indices(self) -> list[int]:
        """What an iterator gives: the indices of this rank from the last split on."""
        return self._own.tolist()

    @property
    def remaining_indices(self) -> list[int]:
        """What was not processed when the indices were last split: the share of all ranks, in the epoch's order."""
        return self._remaining(self._settled).tolist()

    def state_dict(self) -> dict[str, Any]:
        """The progress as if all ranks had recorded as much as this one: `epoch` and `processed_num`.

        Where a number cannot say it, as what was processed is not the first part of the epoch's order, there is
        `processed_indices`, too. For checkpoints on disk; `TorchState` keeps what each rank has recorded.
        """
        assumed = self.progress().assumed()
        count = int(assumed.sum())
        state: dict[str, Any] = {"epoch": self.epoch, "processed_num": count}
        if not bool(assumed[self._order[:count]].all()):
            state["processed_indices"] = assumed.nonzero().flatten().tolist()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a `state_dict` was taken, also with another number of ranks. Load the same on all ranks."""
        self.epoch = state_dict["epoch"]
        self._order = self._order_of_epoch()
        done = state_dict.get("processed_indices", self._order[: state_dict["processed_num"]])
        mask = self._nothing()
        mask[torch.as_tensor(done, dtype=torch.int64)] = True
        self.settle(Progress.of_all(self.epoch, mask))

    def reset(self) -> None:
        """Split what is left between the current ranks, as if all had recorded as much as this one."""
        self._settled = self.progress().assumed()
        self._divide()

    def progress(self) -> Progress:
        """A copy of what is done."""
        return Progress(self.epoch, self._recorded.clone(), self._settled, self._shares, self._done.clone())

    def settle(self, progress: Progress) -> None:
        """Go to a copy of `progress`, and split what it leaves, if all ranks have done as much, between them."""
        self.epoch = progress.epoch
        self._recorded = progress.recorded.clone()
        self._settled = progress.assumed()
        self._divide()

    def __iter__(self) -> Iterator[int]:
        """The indices of this rank from the last split on, those that were recorded since included."""
        return iter(self._own.tolist())

    def __len__(self) -> int:
        """How many indices an iterator gives; equal on all ranks."""
        return self.num_samples

    def _order_of_epoch(self) -> torch.Tensor:
        count = len(self.dataset)
        if not self.shuffle:
            return torch.arange(count)
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + self.epoch))

    def _remaining(self, done: torch.Tensor) -> torch.Tensor:
        return self._order[~done[self._order]]

    def _divide(self) -> None:
        """Deal the indices that are left out to the ranks in turn; some twice, so that all ranks get as many."""
        try:
            self.num_replicas, self.rank = size(), rank()
        except ValueError:
            if self.num_replicas == 0:
                raise
            # The job was shut down and could not be formed again: what is restored keeps the split that there was.
        self._order = self._order_of_epoch()
        left = self._remaining(self._settled)
        self.num_samples = -(-len(left) // self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas
        # From the beginning of the epoch's order, not of what is left: a run that was interrupted repeats the same.
        padding = torch.arange(self.total_size - len(left)) % max(1, len(self._order))
        self._shares = torch.cat([left, self._order[padding]]).reshape(self.num_samples, self.num_replicas)
        self._own = self._shares[:, self.rank].clone()
        self._done = torch.zeros(self.num_samples, dtype=torch.bool)
