"""Batch normalisation over the batches of all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from horovod_cpp.common.process_sets import ProcessSet, global_process_set
from horovod_cpp.torch.collectives import Sum, allgather, allreduce


class SyncBatchNorm(_BatchNorm):
    """Normalises with mean and variance of the batches of all ranks while it trains; in evaluation as `BatchNorm` does.

    All ranks run their layers in the same order, in one thread of each process; second derivatives are refused.
    Input of shape (N, C, ...); N may differ between ranks, and be 0. One packed collective in forward and one in
    backward; both block. The statistics are put together by the update of Chan, Golub and LeVeque ("Algorithms for
    Computing the Sample Variance", 1983), in double precision. Gradients of weight and bias are those of this rank's
    batch; `DistributedOptimizer` reduces them.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats: as in torch.nn.BatchNorm1d.
        process_set: the ranks whose batches count as one.
    Raises (forward): NotImplementedError, as torch, for input that is not floating-point; ValueError for input of less
        than two dimensions, and, on all ranks, for a batch that has one value a channel in all; HorovodInternalError if
        ranks disagree or one is lost.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_set: ProcessSet = global_process_set,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.process_set = process_set

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise `input`; its shape and dtype stay."""
        self._check_input_dim(input)
        if not input.is_floating_point():  # rounded to its type, what is normalised would be zeros
            raise NotImplementedError(f"SyncBatchNorm takes floating-point input; this one is of {input.dtype}")
        if not (self.training or self.running_mean is None):
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        output, mean, variance, count = _Normalize.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, self.eps, self.process_set
        )
        if self.training and self.running_mean is not None:
            self._update(mean, variance * (count / (count - 1)))
        return output  # type: ignore[no-any-return]

    @torch.no_grad()
    def _update(self, mean: torch.Tensor, unbiased_variance: torch.Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        for running, found in ((self.running_mean, mean), (self.running_var, unbiased_variance)):
            if self.momentum is None:
                running.lerp_(found.to(running.dtype), self.num_batches_tracked.double().reciprocal().to(running.dtype))
            else:
                running.lerp_(found.to(running.dtype), self.momentum)


class _Normalize(torch.autograd.Function):
    """Output, and mean, variance (of all values) and number of values a channel, over all ranks.

    All stay on the device: the host would stop there in every layer, and nothing could be captured into a graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        process_set: ProcessSet,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, variance, count = _statistics(_wide(input), process_set)
        if _own_count(input) < 2 and count < 2:  # the count of all is not less, so others need not read it
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)} on this "
                f"rank and {int(count)} values a channel on all"
            )
        scale = torch.rsqrt(variance + eps)
        output = (_wide(input) - _channels(mean, input)) * _channels(scale, input)
        if weight is not None and bias is not None:
            output = output * _channels(weight, input) + _channels(bias, input)
        ctx.save_for_backward(input, weight, mean, scale, count)
        ctx.process_set = process_set
        ctx.mark_non_differentiable(mean, variance, count)
        return output.to(input.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        input, weight, mean, scale, count = ctx.saved_tensors
        gradient = _wide(grads[0])
        normalized = (_wide(input) - _channels(mean, input)) * _channels(scale, input)
        dims = _all_but_channels(input)
        sums = torch.cat([gradient.sum(dims), (gradient * normalized).sum(dims)]).double()
        bias_gradient, weight_gradient = sums.chunk(2)
        input_gradient = None
        if ctx.needs_input_grad[0]:
            total = allreduce(sums, op=Sum, name="sync_batch_norm.backward", process_set=ctx.process_set) / count
            along_bias, along_weight = (_channels(part, input) for part in total.chunk(2))
            input_gradient = (gradient - along_bias - normalized * along_weight) * _channels(scale, input)
            if weight is not None:
                input_gradient = input_gradient * _channels(weight, input)
            input_gradient = input_gradient.to(input.dtype)
        if weight is None:
            return input_gradient, None, None, None, None
        return input_gradient, weight_gradient.to(weight.dtype), bias_gradient.to(weight.dtype), None, None


def _own_count(values: torch.Tensor) -> int:
    return values.numel() // max(values.shape[1], 1)


def _statistics(values: torch.Tensor, process_set: ProcessSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dims = _all_but_channels(values)
    channels = values.shape[1]
    count = _own_count(values)
    mean = values.sum(dims).double() / max(count, 1)
    squares = (values - _channels(mean, values)).square().sum(dims).double()
    packed = torch.cat([mean, squares, mean.new_full((1,), count)]).unsqueeze(0)
    rows = allgather(packed, name="sync_batch_norm.forward", process_set=process_set)
    means, squares_of_all, counts = torch.split(rows, [channels, channels, 1], dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total.clamp(min=1)
    squares = (squares_of_all + counts * (means - mean).square()).sum(0)
    return mean, squares / total.clamp(min=1), total


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In the type in which sums of it are made."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _all_but_channels(tensor: torch.Tensor) -> list[int]:
    return [0, *range(2, tensor.dim())]


def _channels(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One value a channel, to be combined with a tensor of the shape of `like`."""
    return values.to(_wide(like).dtype).reshape(1, -1, *([1] * (like.dim() - 2)))
