"""Training on the ranks against training in one process with the batches of all ranks."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from checks import Checks, argument_parser, keep_gpu_busy, reducing_alone

import horovod_cpp.torch as hvd

STEPS = 20
ROWS = 8  # of each rank in each pass
Batch = tuple[torch.Tensor, torch.Tensor]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


def network(dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.Tanh(),
        torch.nn.Conv2d(4, 6, 3, stride=2),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(54, 10),
    )
    return model.to(device, dtype)


class Training:
    """The checks; `ranks` batches a pass, of which this rank has one and the comparison all."""

    def __init__(self, checks: Checks) -> None:
        self.checks = checks
        self.size, self.device = checks.size, checks.device

    def batches(self, step: int, dtype: torch.dtype) -> list[Batch]:
        generator = torch.Generator().manual_seed(1000 + step)
        made = []
        for _ in range(self.size):
            images = torch.randn(ROWS, 1, 9, 9, generator=generator, dtype=torch.float64)
            labels = torch.randint(0, 10, (ROWS,), generator=generator)
            made.append((images.to(self.device, dtype), labels.to(self.device)))
        return made

    def whole(self, step: int, dtype: torch.dtype) -> Batch:
        images, labels = zip(*self.batches(step, dtype), strict=True)
        return torch.cat(images), torch.cat(labels)

    def alone(self, make: MakeOptimizer, dtype: torch.dtype, passes: int = 1, clip: float | None = None) -> list[Any]:
        """Parameters after training in one process."""
        model = network(dtype, self.device)
        optimizer = make(model.parameters())
        for step in range(STEPS):
            optimizer.zero_grad()
            for part in range(passes):
                images, labels = self.whole(step * passes + part, dtype)
                F.cross_entropy(model(images), labels).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    def together(
        self, make: MakeOptimizer, dtype: torch.dtype, passes: int = 1, clip: float | None = None, **options: Any
    ) -> list[Any]:
        """The same with a DistributedOptimizer, on this rank's rows."""
        model = network(dtype, self.device)
        if self.checks.rank > 0:  # what the root has comes to all
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        with reducing_alone():
            optimizer = hvd.DistributedOptimizer(
                make(model.parameters()), model.named_parameters(), backward_passes_per_step=passes, **options
            )
        for step in range(STEPS):
            optimizer.zero_grad()
            for part in range(passes):
                images, labels = self.batches(step * passes + part, dtype)[self.checks.rank]
                F.cross_entropy(model(images), labels).backward()
            if clip is None:
                optimizer.step()
                continue
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            with optimizer.skip_synchronize():
                optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    def compare(self, got: list[Any], expected: list[Any], tolerance: float) -> str:
        """Largest difference of a parameter; and all ranks have the same, bit by bit."""
        rows = [hvd.allgather(parameter.reshape(1, -1)) for parameter in got]
        for one in rows:
            assert all(torch.equal(row, one[0]) for row in one), "parameters differ between ranks"
        worst = max((one - other).abs().max().item() for one, other in zip(got, expected, strict=True))
        assert worst <= tolerance, f"parameters are off by {worst}, more than {tolerance}"
        return f"off by {worst:.2g}; up to {tolerance} is good"

    def sgd(self, **options: Any) -> str:
        make = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        got = self.together(make, torch.float64, **options)
        passes = options.get("passes", 1)
        return self.compare(got, self.alone(make, torch.float64, passes, options.get("clip")), 1e-10)

    def adam(self) -> str:
        # Its first steps depend on the sign of gradients, however small: more of a rounding error comes through.
        make = functools.partial(torch.optim.Adam, lr=0.01)
        return self.compare(self.together(make, torch.float64), self.alone(make, torch.float64), 1e-7)

    def single_precision(self) -> str:
        make = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        return self.compare(self.together(make, torch.float32), self.alone(make, torch.float32), 1e-3)

    def fp16_compression(self) -> str:
        make = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        got = self.together(make, torch.float32, compression=hvd.Compression.fp16)
        return self.compare(got, self.alone(make, torch.float32), 1e-2)

    def on_a_side_stream(self) -> str:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            note = self.sgd()
        torch.cuda.current_stream().wait_stream(side)
        return note

    def late_gradients(self) -> str:
        """The GPU is far behind the host: a reduction or step that does not wait for it takes what was there before."""
        make = functools.partial(torch.optim.SGD, lr=0.05)
        models = [network(torch.float64, self.device) for _ in range(2)]
        with reducing_alone():
            optimizer = hvd.DistributedOptimizer(make(models[0].parameters()), models[0].named_parameters())
        reference = make(models[1].parameters())
        for step in range(3):
            images, labels = self.batches(step, torch.float64)[self.checks.rank]
            if self.checks.on_gpu:
                keep_gpu_busy(50)
            optimizer.zero_grad()
            F.cross_entropy(models[0](images), labels).backward()
            optimizer.step()
        for step in range(3):
            images, labels = self.whole(step, torch.float64)
            reference.zero_grad()
            F.cross_entropy(models[1](images), labels).backward()
            reference.step()
        got, expected = ([parameter.detach() for parameter in model.parameters()] for model in models)
        return self.compare(got, expected, 1e-10)

    def sparse_embedding(self) -> str:
        """In every second step rank 0 has no gradient of the table at all."""

        def run(ranks: list[int], distributed: bool) -> list[Any]:
            torch.manual_seed(2)
            table = torch.nn.Embedding(11, 3, sparse=True).to(self.device, torch.float64)
            head = torch.nn.Linear(3, 1).to(self.device, torch.float64)
            both = torch.nn.ModuleDict({"table": table, "head": head})
            optimizer: Any = torch.optim.SGD(both.parameters(), lr=0.1)
            if distributed:
                with reducing_alone():
                    optimizer = hvd.DistributedOptimizer(optimizer, both.named_parameters())
            for step in range(4):
                optimizer.zero_grad()
                for rank in ranks:
                    with_table = step % 2 == 0 or rank > 0
                    rows = torch.tensor([step, rank + 1, 10], device=self.device)
                    used = table(rows) if with_table else torch.ones(3, 3, device=self.device, dtype=torch.float64)
                    (head(used).square().sum() / (1 if distributed else self.size)).backward()
                optimizer.step()
            return [parameter.detach() for parameter in both.parameters()]

        return self.compare(run([self.checks.rank], True), run(list(range(self.size)), False), 1e-10)

    def mixed_precision(self) -> str:
        """autocast and GradScaler, the way that Horovod's documents show."""

        def run(distributed: bool) -> tuple[list[Any], list[float]]:
            model = network(torch.float32, self.device)
            optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            if distributed:
                with reducing_alone():
                    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
            scaler = torch.amp.GradScaler(self.device.type, init_scale=1024.0)
            losses = []
            for _ in range(STEPS):
                optimizer.zero_grad()
                batch = (
                    self.batches(0, torch.float32)[self.checks.rank] if distributed else self.whole(0, torch.float32)
                )
                with torch.autocast(self.device.type, dtype=torch.float16 if self.checks.on_gpu else torch.bfloat16):
                    loss = F.cross_entropy(model(batch[0]), batch[1])
                scaler.scale(loss).backward()
                if distributed:
                    optimizer.synchronize()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
                if distributed:
                    with optimizer.skip_synchronize():
                        scaler.step(optimizer)
                else:
                    scaler.step(optimizer)
                scaler.update()
                losses.append(loss.item())
            return [parameter.detach() for parameter in model.parameters()], losses

        got, losses = run(True)
        expected, _ = run(False)
        assert losses[-1] < losses[0], f"the loss does not fall: {losses[0]} to {losses[-1]}"
        return self.compare(got, expected, 5e-2)


def main() -> int:
    # Read when cuBLAS starts; without it, its sums may come in another order each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    arguments = argument_parser(__doc__).parse_args()
    checks = Checks("training", arguments.device, arguments.short)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    warnings.filterwarnings("ignore", message="Sparse invariant checks")
    part = Training(checks)
    checks.run("sgd with momentum", part.sgd)
    checks.run("adam", part.adam)
    checks.run("two backward passes a step", lambda: part.sgd(passes=2))
    checks.run("synchronize and clip_grad_norm_", lambda: part.sgd(clip=0.5))
    checks.run("two groups", lambda: part.sgd(groups=2))
    checks.run("predivided average", lambda: part.sgd(gradient_predivide_factor=2.0))
    checks.run("single precision", part.single_precision)
    checks.run("fp16 compression", part.fp16_compression)
    checks.run("late gradients", part.late_gradients)
    checks.run("sparse embedding", part.sparse_embedding)
    checks.run("autocast and GradScaler", part.mixed_precision)
    if checks.on_gpu:
        checks.run("on a side stream", part.on_a_side_stream)
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
