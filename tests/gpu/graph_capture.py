"""CUDA graphs: a training step with DistributedOptimizer is captured and replayed; what cannot be captured says so."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from checks import Checks, argument_parser, reducing_alone, say

import horovod_cpp.torch as hvd

WARM_UP = 3
ROWS = 16


class Capture:
    """The checks."""

    def __init__(self, checks: Checks) -> None:
        self.checks = checks
        self.device = checks.device
        self.replays = 20 if checks.short else 100

    def make(self, distributed: bool = True) -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
        model = model.to(self.device, torch.float64)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        if distributed:
            with reducing_alone():
                optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
        return model, optimizer

    def data(self, step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(7919 * rank + step)
        inputs = torch.randn(ROWS, 12, generator=generator, dtype=torch.float64)
        return inputs.to(self.device), torch.randn(ROWS, 4, generator=generator, dtype=torch.float64).to(self.device)

    def eager(self) -> list[torch.Tensor]:
        """Parameters after all steps in one process, with the rows of all ranks."""
        model, optimizer = self.make(distributed=False)
        for step in range(WARM_UP + self.replays):
            optimizer.zero_grad()
            parts = [self.data(step, rank) for rank in range(self.checks.size)]
            inputs, targets = (torch.cat(one) for one in zip(*parts, strict=True))
            torch.nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    def training_step(self) -> str:
        model, optimizer = self.make()
        static_input, static_target = self.data(0, self.checks.rank)

        def step_on_static_tensors() -> torch.Tensor:
            loss = torch.nn.functional.mse_loss(model(static_input), static_target)
            loss.backward()
            optimizer.step()
            return loss

        def fill(step: int) -> None:
            for static, fresh in zip((static_input, static_target), self.data(step, self.checks.rank), strict=True):
                static.copy_(fresh)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for step in range(WARM_UP):
                fill(step)
                optimizer.zero_grad(set_to_none=True)
                step_on_static_tensors()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()

        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            loss = step_on_static_tensors()
        losses = []
        for step in range(WARM_UP, WARM_UP + self.replays):
            fill(step)
            graph.replay()
            if step % 10 == 0:
                losses.append(loss.item())
        torch.cuda.synchronize()
        got = [parameter.detach().clone() for parameter in model.parameters()]
        worst = max((a - b).abs().max().item() for a, b in zip(got, self.eager(), strict=True))
        assert worst <= 1e-9, f"after {self.replays} replays the parameters are off by {worst}"
        return f"{self.replays} replays; off by {worst:.2g}, up to 1e-9 is good"

    def plain_allreduce(self) -> str:
        """Forms without an optimizer: in and out of place, and a group, in one graph."""
        size = self.checks.size
        source, placed = (torch.zeros(1000, device=self.device) for _ in range(2))

        def work() -> list[torch.Tensor]:
            total = hvd.allreduce(source * 2, op=hvd.Sum, name="captured.total")
            hvd.allreduce_(placed, op=hvd.Sum, name="captured.placed")
            pair = hvd.grouped_allreduce([source, source + 1], op=hvd.Average, name="captured.pair")
            return [total, *pair]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            total, first, second = work()
        for turn in range(1, 6):
            source.fill_(float(turn))
            placed.fill_(1.0)
            graph.replay()
            torch.cuda.synchronize()
            values = [one[7].item() for one in (total, placed, first, second)]
            assert values == [2.0 * turn * size, float(size), float(turn), turn + 1.0], f"replay {turn}: {values}"
        between = hvd.allreduce(torch.ones(3, device=self.device), op=hvd.Sum)
        assert between.tolist() == [float(size)] * 3, "an operation that is not captured, after the replays"
        return "5 replays"

    def not_capturable(self, call: Callable[[], object]) -> str:
        """`call` within a capture has to fail with an error that speaks of it, or work; never hang or break the job."""
        outcome = "it can be captured"
        graph = torch.cuda.CUDAGraph()
        started = torch.ones(3, device=self.device)
        try:
            with torch.cuda.graph(graph):
                started += 1
                try:
                    call()
                except (hvd.HorovodInternalError, ValueError, RuntimeError) as error:
                    outcome = f"{type(error).__name__}: {error}"
        except Exception as error:  # the end of the capture
            outcome += f" | then at the end of the capture {type(error).__name__}: {error}"
        torch.cuda.synchronize()
        after = hvd.allreduce(torch.ones(3, device=self.device), op=hvd.Sum, name="after capture")
        assert after.tolist() == [float(self.checks.size)] * 3, "the job is not usable afterwards"
        clear = outcome == "it can be captured" or ("captur" in outcome.lower() and "| then" not in outcome)
        assert clear, f"no clear error: {outcome}"
        return outcome[:600]

    def allgather(self) -> str:
        rows = torch.ones(2, 3, device=self.device)
        hvd.allgather(rows, name="gathered")
        return self.not_capturable(lambda: hvd.allgather(rows, name="gathered"))

    def alltoall(self) -> str:
        rows = torch.ones(self.checks.size, 3, device=self.device)
        hvd.alltoall(rows, name="exchanged")
        return self.not_capturable(lambda: hvd.alltoall(rows, name="exchanged"))

    def first_use_of_a_set(self) -> str:
        """The ranks of a new set have no communicator yet, and making one cannot be captured."""
        if self.checks.size == 1:
            return "one rank needs no communicator"
        ranks = list(range(self.checks.size - 1)) if self.checks.size > 2 else [0]
        process_set = hvd.add_process_set(ranks)
        try:
            tensor = torch.ones(1000, device=self.device)

            def call() -> None:
                if self.checks.rank in ranks:
                    hvd.allreduce(tensor, op=hvd.Sum, name="first", process_set=process_set)

            return self.not_capturable(call)
        finally:
            hvd.remove_process_set(process_set)

    def cpu_tensor(self) -> str:
        """It has nothing to do with the graph."""
        tensor = torch.ones(5)
        return self.not_capturable(lambda: hvd.allreduce(tensor, op=hvd.Sum, name="on the host"))


def main() -> int:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    arguments = argument_parser(__doc__).parse_args()
    if arguments.device == "cpu":
        say(part="graph_capture", check="all", ok=True, note="skipped: a CPU has no graphs")
        return 0
    checks = Checks("graph_capture", arguments.device, arguments.short)
    part = Capture(checks)
    checks.run("allreduces", part.plain_allreduce)
    checks.run("a training step", part.training_step)
    checks.run("a CPU tensor", part.cpu_tensor)
    checks.run("allgather", part.allgather)
    checks.run("alltoall", part.alltoall)
    checks.run("first use of a process set", part.first_use_of_a_set)
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
