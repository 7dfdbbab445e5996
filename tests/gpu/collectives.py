"""Every collective, data type and reduction on GPU tensors against a CPU reference, with streams and errors."""

from __future__ import annotations

import copy
import functools
import gc
import re
import sys
from collections.abc import Callable

import torch
from checks import Checks, argument_parser, keep_gpu_busy
from reference import DTYPES, INTEGERS, OPS, assert_reduced, rank_input, reduced

import horovod_cpp.torch as hvd

BIG = 1 << 20
HALVES = [torch.float16, torch.bfloat16]


@functools.lru_cache(maxsize=64)
def inputs(shape: tuple[int, ...], dtype: torch.dtype, key: str = "") -> list[torch.Tensor]:
    """Of all ranks, on the CPU."""
    if dtype.is_complex:
        parts = [inputs((*shape, 2), torch.float32, key)[rank] for rank in range(hvd.size())]
        return [torch.view_as_complex(part) for part in parts]
    return [rank_input(shape, dtype, rank, key) for rank in range(hvd.size())]


class Collectives:
    """The checks. Each does all its collectives first and compares afterwards, so that ranks stay together."""

    def __init__(self, checks: Checks) -> None:
        self.checks = checks
        self.rank, self.size, self.device = checks.rank, checks.size, checks.device
        self.sizes = [0, 1, 17, 4097] if checks.short else [0, 1, 1009, BIG - 1, BIG + 1]

    # ---- help

    def own(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """This rank's, in memory of its own on the device."""
        return tensors[self.rank].to(self.device, copy=True)

    def full(self, value: float, count: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((count,), value, dtype=dtype, device=self.device)

    def compare(self, got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str) -> None:
        assert got.device == self.device, f"{what}: the result is on {got.device}"
        if dtype.is_complex:
            assert got.dtype == dtype, what
            real, wanted = torch.view_as_real(got.cpu().contiguous()), torch.view_as_real(expected.resolve_conj())
            assert_reduced(real, wanted.double(), torch.float32, what)
            return
        assert_reduced(got.cpu(), expected, dtype, what)

    def same(self, got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        """Bit by bit: nothing is computed."""
        assert got.device == self.device, f"{what}: the result is on {got.device}"
        assert got.dtype == expected.dtype, f"{what}: {got.dtype}"
        assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} in place of {tuple(expected.shape)}"
        assert torch.equal(got.cpu(), expected), f"{what}: wrong values"

    # ---- reductions

    def allreduce_of_all_types(self) -> str:
        """All in flight at once, so that there is fusion as well; then compared."""
        cases = [(dtype, name, size) for dtype in DTYPES for name in OPS for size in self.sizes]
        sources = {key: self.own(inputs((key[1],), key[0])) for key in {(dtype, size) for dtype, _, size in cases}}
        handles = [hvd.allreduce_async(sources[dtype, size], op=OPS[name]) for dtype, name, size in cases]
        outputs = [hvd.synchronize(handle) for handle in handles]
        for (dtype, name, size), output in zip(cases, outputs, strict=True):
            what = f"{name} of {size} {dtype}"
            self.compare(output, reduced(inputs((size,), dtype), OPS[name]), dtype, what)
            self.same(sources[dtype, size], inputs((size,), dtype)[self.rank], f"input of {what}")
        return f"{len(cases)} allreduces"

    def allreduce_one_by_one(self) -> None:
        for dtype in DTYPES:
            for size in (1, 1009):
                got = hvd.allreduce(self.own(inputs((size,), dtype)), op=hvd.Sum)
                self.compare(got, reduced(inputs((size,), dtype), hvd.Sum), dtype, f"sum of {size} {dtype}")
        scalar = hvd.allreduce(self.own(inputs((), torch.float32)), op=hvd.Sum)
        self.compare(scalar, reduced(inputs((), torch.float32), hvd.Sum), torch.float32, "sum of a scalar")

    def allreduce_in_place(self) -> None:
        cases = [(dtype, name, size) for dtype in DTYPES for name in ("sum", "average") for size in self.sizes[:3]]
        tensors = [self.own(inputs((size,), dtype)) for dtype, _, size in cases]
        handles = [
            hvd.allreduce_async_(tensor, op=OPS[name]) for tensor, (_, name, _) in zip(tensors, cases, strict=True)
        ]
        outputs = [hvd.synchronize(handle) for handle in handles]
        for (dtype, name, size), tensor, output in zip(cases, tensors, outputs, strict=True):
            assert output is tensor
            self.compare(
                tensor, reduced(inputs((size,), dtype), OPS[name]), dtype, f"{name} in place of {size} {dtype}"
            )
        one = self.own(inputs((1009,), torch.float32))
        assert hvd.allreduce_(one, op=hvd.Max) is one
        self.compare(one, reduced(inputs((1009,), torch.float32), hvd.Max), torch.float32, "max in place")

    def complex_numbers(self) -> None:
        dtype = torch.complex64
        for size in (0, 1, 1009):
            for name in ("sum", "average"):
                total = functools.reduce(torch.add, [tensor.to(torch.complex128) for tensor in inputs((size,), dtype)])
                expected = total / (self.size if name == "average" else 1)
                self.compare(
                    hvd.allreduce(self.own(inputs((size,), dtype)), op=OPS[name]), expected, dtype, f"{name} {size}"
                )
                place = self.own(inputs((size,), dtype))
                hvd.allreduce_(place, op=OPS[name])
                self.compare(place, expected, dtype, f"{name} {size} in place")
        gathered = hvd.allgather(self.own(inputs((3, 2), dtype)))
        self.same(gathered, torch.cat(inputs((3, 2), dtype)), "allgather")
        sent = hvd.broadcast(self.own(inputs((7,), dtype)), self.size - 1)
        self.same(sent, inputs((7,), dtype)[self.size - 1], "broadcast")

    def factors(self) -> None:
        for dtype in (torch.float64, torch.float32, *HALVES):
            tensors = inputs((1009,), dtype)
            expected = reduced([tensor.double() * 0.5 for tensor in tensors], hvd.Sum) * 1.5
            got = hvd.allreduce(self.own(tensors), op=hvd.Sum, prescale_factor=0.5, postscale_factor=1.5)
            self.compare(got, expected, dtype, f"factors of {dtype}")
            averaged = hvd.allreduce(self.own(tensors), prescale_factor=2.0, postscale_factor=0.25)
            self.compare(averaged, expected / self.size * (2 / 3), dtype, f"average with factors of {dtype}")
        for dtype in INTEGERS:
            tensors = inputs((1009,), dtype)
            halves = [(tensor.double() * 0.5).trunc().to(dtype) for tensor in tensors]
            got = hvd.allreduce(self.own(tensors), op=hvd.Sum, prescale_factor=0.5)
            self.compare(got, reduced(halves, hvd.Sum), dtype, f"prescale of {dtype}")
            got = hvd.allreduce(self.own(tensors), op=hvd.Sum, postscale_factor=0.5)
            total = (reduced(tensors, hvd.Sum).double() * 0.5).trunc()
            self.compare(got, total.to(torch.int64), dtype, f"postscale of {dtype}")

    def special_values(self) -> None:
        """Not a number and infinity come through, in each floating-point type."""
        for dtype in (torch.float32, torch.float64, *HALVES):
            values = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0], dtype=dtype, device=self.device)
            got = hvd.allreduce(values, op=hvd.Average).cpu()
            assert got[0] == float("inf") and got[1] == float("-inf"), f"{dtype}: {got}"
            assert got[2].isnan() and got[3] == 1, f"{dtype}: {got}"

    def adasum(self) -> str | None:
        if self.size > 2:
            return "checked for one and two ranks only"
        tensors = [tensor.double() for tensor in inputs((1009,), torch.float64)]
        expected = tensors[0]
        if self.size == 2:
            a, b = tensors
            dot = a @ b
            expected = a * (1 - dot / (2 * (a @ a))) + b * (1 - dot / (2 * (b @ b)))
        got = hvd.allreduce(self.own(inputs((1009,), torch.float64)), op=hvd.Adasum)
        self.compare(got, expected, torch.float64, "adasum")
        return None

    def many_in_flight(self) -> None:
        """Each rank starts them in an order of its own."""
        count = 60
        tensors = [inputs((i * 13 % 97,), torch.float32, str(i)) for i in range(count)]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.rank)).tolist()
        mine = {i: self.own(tensors[i]) for i in range(count)}
        handles = {i: hvd.allreduce_async(mine[i], op=hvd.Sum, name=f"many.{i}") for i in order}
        outputs = [hvd.synchronize(handles[i]) for i in range(count)]
        for i, output in enumerate(outputs):
            self.compare(output, reduced(tensors[i], hvd.Sum), torch.float32, f"many.{i}")

    def the_same_names_again(self) -> None:
        """What ranks have agreed on before takes a shorter way."""
        values = torch.arange(100.0, device=self.device)
        outputs = []
        for turn in range(12):
            pair = [
                hvd.allreduce_async(values * (turn + 1) * (self.rank + 1), op=hvd.Sum, name="again.a"),
                hvd.allreduce_async_(values + turn, op=hvd.Max, name="again.b"),
            ]
            outputs.append([hvd.synchronize(handle) for handle in pair])
        ranks = self.size * (self.size + 1) / 2
        for turn, (total, largest) in enumerate(outputs):
            self.same(total, torch.arange(100.0) * (turn + 1) * ranks, f"sum in turn {turn}")
            self.same(largest, torch.arange(100.0) + turn, f"max in turn {turn}")

    def compression(self) -> None:
        for compressor in (hvd.Compression.fp16, hvd.Compression.bf16):
            tensors = inputs((1009,), torch.float32)
            got = hvd.allreduce(self.own(tensors), op=hvd.Sum, compression=compressor)
            assert got.dtype == torch.float32
            error = (got.cpu().double() - reduced(tensors, hvd.Sum)).abs().max().item()
            assert error < 0.05 * self.size, f"{compressor.__name__}: off by {error}"

    def not_contiguous(self) -> None:
        tensors = inputs((6, 4), torch.float32)
        expected = reduced(tensors, hvd.Sum)
        transposed = self.own(tensors).t()
        self.compare(hvd.allreduce(transposed, op=hvd.Sum).contiguous(), expected.t(), torch.float32, "transposed")
        assert hvd.allreduce_(transposed, op=hvd.Sum) is transposed
        self.compare(transposed.contiguous(), expected.t(), torch.float32, "transposed in place")
        whole = self.own(tensors)
        columns = whole[:, 1:3]
        hvd.synchronize(hvd.allreduce_async_(columns, op=hvd.Sum))
        self.compare(whole[:, 1:3].contiguous(), expected[:, 1:3], torch.float32, "columns in place")
        self.same(whole[:, 0].contiguous(), tensors[self.rank][:, 0].contiguous(), "beside the columns")
        images = inputs((2, 3, 4, 5), torch.float32)
        mine = self.own(images)
        if self.rank % 2 == 0:  # the layout may differ between ranks
            mine = mine.to(memory_format=torch.channels_last)
        hvd.allreduce_(mine, op=hvd.Sum)
        self.compare(mine.contiguous(), reduced(images, hvd.Sum), torch.float32, "channels last")
        expanded = torch.full((1,), float(self.rank), device=self.device).expand(5)
        got = hvd.allreduce(expanded, op=hvd.Sum)
        self.same(got, torch.full((5,), self.size * (self.size - 1) / 2), "expanded")
        gathered = hvd.allgather(self.own(tensors)[:, 1:3])
        self.same(gathered, torch.cat([tensor[:, 1:3] for tensor in tensors]), "allgather of columns")

    # ---- groups

    def groups(self) -> None:
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
            ((3, 5), torch.float32),
            ((0,), torch.float32),
            ((4097,), torch.float16),
            ((7,), torch.int32),
            ((1,), torch.bfloat16),
            ((2, 2), torch.float64),
            ((33,), torch.int16),
        ]
        every = [inputs(shape, dtype, "group") for shape, dtype in shapes]
        mine = [self.own(tensors) for tensors in every]
        outputs = hvd.grouped_allreduce(mine, op=hvd.Sum)
        later = hvd.synchronize(hvd.grouped_allreduce_async(mine, op=hvd.Average))
        placed = [tensor.clone() for tensor in mine]
        returned = hvd.grouped_allreduce_(placed, op=hvd.Max)
        gathered = hvd.grouped_allgather(mine)
        scattered = hvd.grouped_reducescatter(mine, op=hvd.Sum)
        assert all(one is other for one, other in zip(returned, placed, strict=True))
        for index, (shape, dtype) in enumerate(shapes):
            what = f"group member {shape} {dtype}"
            self.compare(outputs[index], reduced(every[index], hvd.Sum), dtype, what)
            self.compare(later[index], reduced(every[index], hvd.Average), dtype, f"average of {what}")
            self.compare(placed[index], reduced(every[index], hvd.Max), dtype, f"max of {what}")
            self.same(gathered[index], torch.cat(every[index]), f"allgather of {what}")
            rows = self.rows_of_scatter(shape[0])
            part = reduced(every[index], hvd.Sum)[sum(rows[: self.rank]) :][: rows[self.rank]]
            self.compare(scattered[index], part, dtype, f"reducescatter of {what}")

    def a_large_group(self) -> None:
        """More tensors than one launch takes, of sizes that leave gaps."""
        count = 40 if self.checks.short else 400
        tensors = [inputs((1 + i * 37 % 501,), torch.float32, "large group") for i in range(count)]
        outputs = hvd.grouped_allreduce([self.own(one) for one in tensors], op=hvd.Sum)
        for one, output in zip(tensors, outputs, strict=True):
            self.compare(output, reduced(one, hvd.Sum), torch.float32, f"size {one[0].numel()}")

    # ---- what ranks get of each other

    def allgather(self) -> None:
        for dtype in DTYPES:
            for shape in ((), (3,), (2, 5)):
                rows = [2 * rank if self.size > 1 else 3 for rank in range(self.size)]
                tensors = [inputs((7, *shape), dtype, "gather")[rank][: rows[rank]] for rank in range(self.size)]
                got = hvd.allgather(self.own(tensors))
                self.same(got, torch.cat(tensors), f"allgather of {dtype} rows of {shape}")
        nothing = hvd.allgather(torch.empty(0, 4, device=self.device))
        self.same(nothing, torch.empty(0, 4), "allgather of nothing")
        if not self.checks.short:
            tensors = [rank_input((BIG // 4 + rank,), torch.float32, rank) for rank in range(self.size)]
            self.same(hvd.allgather(self.own(tensors)), torch.cat(tensors), "large allgather")
        handle = hvd.allgather_async(self.full(self.rank, self.rank + 1))
        expected = torch.cat([torch.full((rank + 1,), float(rank)) for rank in range(self.size)])
        self.same(hvd.synchronize(handle), expected, "allgather_async")

    def broadcast(self) -> None:
        handles = []
        cases = [(dtype, root, size) for dtype in DTYPES for root in range(self.size) for size in (0, 1, 1009)]
        for dtype, root, size in cases:
            handles.append(hvd.broadcast_async(self.own(inputs((size,), dtype)), root))
        outputs = [hvd.synchronize(handle) for handle in handles]
        for (dtype, root, size), output in zip(cases, outputs, strict=True):
            self.same(output, inputs((size,), dtype)[root], f"broadcast of {size} {dtype} from {root}")
        placed = self.own(inputs((self.sizes[-1],), torch.float32))
        assert hvd.broadcast_(placed, self.size - 1) is placed
        self.same(placed, inputs((self.sizes[-1],), torch.float32)[self.size - 1], "broadcast_")
        columns = self.own(inputs((6, 4), torch.float32))[:, 1:3]
        hvd.broadcast_(columns, 0)
        self.same(columns.contiguous(), inputs((6, 4), torch.float32)[0][:, 1:3].contiguous(), "columns")

    def alltoall(self) -> None:
        def splits(rank: int) -> list[int]:
            return [(rank + 2 * target) % 4 for target in range(self.size)]  # zeros are among them

        for dtype in DTYPES:
            tensors = [inputs((sum(splits(rank)), 3), dtype, f"from {rank}")[rank] for rank in range(self.size)]
            got, received = hvd.alltoall(self.own(tensors), splits=splits(self.rank))
            parts = []
            for rank, tensor in enumerate(tensors):
                first = sum(splits(rank)[: self.rank])
                parts.append(tensor[first : first + splits(rank)[self.rank]])
            self.same(got, torch.cat(parts), f"alltoall of {dtype}")
            assert received.tolist() == [len(part) for part in parts], f"{dtype}: received splits {received}"
        equal = hvd.alltoall(torch.arange(2.0 * self.size, device=self.device) + 100 * self.rank)
        expected = [100.0 * rank + 2 * self.rank + i for rank in range(self.size) for i in range(2)]
        self.same(equal, torch.tensor(expected), "alltoall in equal shares")

    def rows_of_scatter(self, rows: int) -> list[int]:
        return [rows // self.size + (rank < rows % self.size) for rank in range(self.size)]

    def reducescatter(self) -> None:
        for dtype in DTYPES:
            for name in ("sum", "average"):
                for shape in ((7, 3), (1,), (4 * self.size,)):
                    tensors = inputs(shape, dtype, "scatter")
                    got = hvd.reducescatter(self.own(tensors), op=OPS[name])
                    rows = self.rows_of_scatter(shape[0])
                    part = reduced(tensors, OPS[name])[sum(rows[: self.rank]) :][: rows[self.rank]]
                    self.compare(got, part, dtype, f"reducescatter, {name} of {shape} {dtype}")
        tensors = inputs((7, 3), torch.float32, "scatter")
        got = hvd.reducescatter(self.own(tensors), op=hvd.Sum, prescale_factor=0.5, postscale_factor=3.0)
        rows = self.rows_of_scatter(7)
        part = (reduced(tensors, hvd.Sum) * 1.5)[sum(rows[: self.rank]) :][: rows[self.rank]]
        self.compare(got, part, torch.float32, "reducescatter with factors")

    def sparse(self) -> None:
        def entries(rank: int) -> torch.Tensor:
            indices = torch.tensor([[0, rank + 1, 9], [1, 2, rank]])
            values = torch.tensor([1.0, 2.0, 3.0 + rank])
            return torch.sparse_coo_tensor(indices, values, (10, 8), check_invariants=True)

        for name in ("sum", "average"):
            wait = hvd.sparse_allreduce_async(entries(self.rank).to(self.device), name=f"sparse.{name}", op=OPS[name])
            got = wait()
            assert got.is_sparse and got.device == self.device, f"{name}: {got.layout} on {got.device}"
            dense = [entries(rank).to_dense() for rank in range(self.size)]
            self.compare(got.to_dense(), reduced(dense, OPS[name]), torch.float32, f"sparse {name}")

    # ---- control

    def barrier_and_poll(self) -> None:
        hvd.barrier()
        handle = hvd.allreduce_async(self.full(1.0), op=hvd.Sum)
        while not hvd.poll(handle):
            pass
        self.same(hvd.synchronize(handle), torch.full((5,), float(self.size)), "after poll")
        hvd.barrier()

    def join_with_uneven_data(self) -> None:
        def members(turn: int) -> list[int]:
            return [rank for rank in range(self.size) if rank >= turn]  # the last rank has most data

        outputs = []
        for turn in range(self.rank + 1):
            for dtype in (torch.float32, torch.float16, torch.int32, torch.int16):
                for name in OPS:
                    key = f"join.{turn}.{name}.{dtype}"
                    tensors = inputs((33,), dtype, key)
                    got = hvd.allreduce(self.own(tensors), name=key, op=OPS[name])
                    active = [tensors[rank] for rank in members(turn)]
                    expected = reduced(active, OPS[name])
                    if name == "average":  # still divides by all
                        total = reduced(active, hvd.Sum)
                        mode = None if dtype.is_floating_point else "trunc"
                        expected = torch.div(total, self.size, rounding_mode=mode)
                    outputs.append((got, expected, dtype, key))
            group = [self.full(1.0), self.full(2.0, 4097)]
            for got, value in zip(
                hvd.grouped_allreduce(group, name=f"join.{turn}.group", op=hvd.Sum), (1.0, 2.0), strict=True
            ):
                outputs.append((got, torch.full(got.shape, value * len(members(turn))), torch.float32, "join group"))
        last = hvd.join(self.device.index if self.device.index is not None else -1)
        assert last == self.size - 1, f"rank {last} is said to have joined last"
        for got, expected, dtype, key in outputs:
            self.compare(got, expected.double() if dtype.is_floating_point else expected, dtype, key)

    def process_sets(self) -> None:
        lists = [[0], *([rank, rank + 1] for rank in range(self.size - 1)), list(range(0, self.size, 2))]
        distinct = [list(one) for one in dict.fromkeys(tuple(ranks) for ranks in lists) if len(one) < self.size]
        sets = [hvd.add_process_set(ranks) for ranks in distinct]  # neighbours overlap
        started = []
        for process_set, ranks in zip(sets, distinct, strict=True):
            if self.rank not in ranks:
                continue
            tensors = inputs((1009,), torch.float32, f"set {ranks}")
            mine = self.own(tensors)
            started.append(
                (
                    ranks,
                    tensors,
                    hvd.allreduce_async(mine, op=hvd.Average, name="in set", process_set=process_set),
                    hvd.allgather_async(mine[: self.rank + 1], name="in set", process_set=process_set),
                    hvd.broadcast_async(mine, ranks[-1], name="in set", process_set=process_set),
                    hvd.reducescatter_async(mine, op=hvd.Sum, name="in set", process_set=process_set),
                )
            )
        results = [(ranks, tensors, [hvd.synchronize(handle) for handle in rest]) for ranks, tensors, *rest in started]
        everybody = hvd.allreduce(self.full(1.0), op=hvd.Sum)
        for ranks, tensors, (averaged, gathered, sent, scattered) in results:
            active = [tensors[rank] for rank in ranks]
            self.compare(averaged, reduced(active, hvd.Average), torch.float32, f"allreduce in {ranks}")
            self.same(gathered, torch.cat([tensors[rank][: rank + 1] for rank in ranks]), f"allgather in {ranks}")
            self.same(sent, tensors[ranks[-1]], f"broadcast in {ranks}")
            rows = [1009 // len(ranks) + (place < 1009 % len(ranks)) for place in range(len(ranks))]
            place = ranks.index(self.rank)
            part = reduced(active, hvd.Sum)[sum(rows[:place]) :][: rows[place]]
            self.compare(scattered, part, torch.float32, f"reducescatter in {ranks}")
        self.same(everybody, torch.full((5,), float(self.size)), "in the set of all")
        for process_set in sets:
            assert hvd.remove_process_set(process_set)

    # ---- whole models

    def objects(self) -> None:
        got = hvd.broadcast_object({"rank": self.rank, "list": list(range(5))}, self.size - 1)
        assert got == {"rank": self.size - 1, "list": list(range(5))}, got
        every = hvd.allgather_object(("rank", self.rank))
        assert every == [("rank", rank) for rank in range(self.size)], every

    def parameters_and_optimizer_state(self) -> None:
        def make(seed: int) -> torch.nn.Module:
            torch.manual_seed(seed)
            return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 2)).to(
                self.device
            )

        model = make(self.rank)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1 * (self.rank + 1))
        data = torch.randn(8, 5, generator=torch.Generator().manual_seed(self.rank)).to(self.device)
        model(data).square().sum().backward()
        optimizer.step()
        of_root = [hvd.broadcast_object(copy.deepcopy(_on_cpu(model.state_dict())), 0)]
        of_root.append(hvd.broadcast_object(copy.deepcopy(_on_cpu(optimizer.state_dict())), 0))
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        _assert_equal(_on_cpu(model.state_dict()), of_root[0], "model")
        _assert_equal(_on_cpu(optimizer.state_dict()), of_root[1], "optimizer")
        assert all(value.device == self.device for value in model.state_dict().values())
        moments = [state["exp_avg"] for state in optimizer.state.values()]
        assert all(moment.device == self.device for moment in moments), "the optimizer's state moved"

    def sync_batch_norm(self) -> None:
        for dtype, near in ((torch.float64, 1e-9), (torch.float32, 5e-4)):
            whole = torch.nn.BatchNorm2d(6).to(self.device, dtype)
            layer = hvd.SyncBatchNorm(6).to(self.device, dtype)
            rows = [3 + rank for rank in range(self.size)]
            parts = [rank_input((count, 6, 3, 4), dtype, rank, "norm") * 3 + 7 for rank, count in enumerate(rows)]
            expected_input = torch.cat(parts).to(self.device).requires_grad_()
            mine = parts[self.rank].to(self.device).requires_grad_()
            expected, got = whole(expected_input), layer(mine)
            first = sum(rows[: self.rank])
            factor = rank_input(tuple(expected.shape), dtype, 0, "factor").to(self.device)
            (expected * factor).sum().backward()
            (got * factor[first : first + len(mine)]).sum().backward()
            torch.testing.assert_close(got, expected[first : first + len(mine)], rtol=near, atol=near)
            assert mine.grad is not None and expected_input.grad is not None
            torch.testing.assert_close(mine.grad, expected_input.grad[first : first + len(mine)], rtol=near, atol=near)
            torch.testing.assert_close(layer.running_var, whole.running_var, rtol=near, atol=near)
            torch.testing.assert_close(layer.running_mean, whole.running_mean, rtol=near, atol=near)

    def gradients(self) -> None:
        weights = [rank_input((4,), torch.float64, rank, "weight") for rank in range(self.size)]
        weight = weights[self.rank].to(self.device)
        total = functools.reduce(torch.add, weights)

        def leaf(*shape: int) -> torch.Tensor:
            return torch.ones(*shape, dtype=torch.float64, device=self.device, requires_grad=True)

        def gradient(source: torch.Tensor, output: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
            (output * factor).sum().backward()
            assert source.grad is not None
            return source.grad

        results: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        for name, expected in (("sum", total), ("average", total / self.size)):
            source = leaf(4)
            got = gradient(source, hvd.allreduce(source, op=OPS[name]), weight)
            results.append((f"allreduce {name}", got, expected))
        pair = [leaf(4), leaf(4)]
        outputs = hvd.grouped_allreduce(pair, op=hvd.Sum)
        (outputs[0] * weight + outputs[1] * 2 * weight).sum().backward()
        assert pair[0].grad is not None and pair[1].grad is not None
        results += [("group, first", pair[0].grad, total), ("group, second", pair[1].grad, total * 2)]

        source = leaf(self.rank + 1, 4)
        got = gradient(source, hvd.allgather(source), weight)
        results.append(("allgather", got, (total / self.size).expand(self.rank + 1, 4)))

        source = leaf(4)
        got = gradient(source, hvd.broadcast(source, 0), weight)
        results.append(("broadcast", got, total / self.size if self.rank == 0 else torch.zeros(4).double()))

        source = leaf(2 * self.size, 4)
        output, _ = hvd.alltoall(source, splits=[2] * self.size)
        got = gradient(source, output, weight)
        results.append(("alltoall", got, torch.stack(weights).repeat_interleave(2, 0)))

        for name, factor in (("sum", self.size), ("average", 1)):
            source = leaf(2 * self.size, 4)
            got = gradient(source, hvd.reducescatter(source, op=OPS[name]), weight)
            results.append((f"reducescatter {name}", got, torch.stack(weights).repeat_interleave(2, 0) * factor))
        for name, got, expected in results:
            self.compare(got, expected, torch.float64, f"gradient of {name}")

    # ---- streams

    def starters(self) -> dict[str, tuple[Callable[[torch.Tensor], int], Callable[[torch.Tensor], torch.Tensor]]]:
        """Asynchronous forms on a tensor with 4 * size rows, and what they make of equal tensors on all ranks."""
        size, rank = self.size, self.rank
        return {
            "allreduce": (lambda x: hvd.allreduce_async(x, op=hvd.Sum), lambda x: x * size),
            "allreduce_": (lambda x: hvd.allreduce_async_(x, op=hvd.Sum), lambda x: x * size),
            "average": (lambda x: hvd.allreduce_async(x, op=hvd.Average), lambda x: x),
            "group": (lambda x: hvd.grouped_allreduce_async([x, x + 1], op=hvd.Sum), lambda x: x * size),
            "allgather": (hvd.allgather_async, lambda x: x.repeat(size, 1)),
            "broadcast": (lambda x: hvd.broadcast_async(x, size - 1), lambda x: x),
            "alltoall": (hvd.alltoall_async, lambda x: x[4 * rank : 4 * rank + 4].repeat(size, 1)),
            "reducescatter": (
                lambda x: hvd.reducescatter_async(x, op=hvd.Sum),
                lambda x: x[4 * rank : 4 * rank + 4] * size,
            ),
        }

    def order_of_streams(self) -> None:
        """The input is made late on one stream, the output used at once on another; nobody waits on the host."""
        default = torch.cuda.current_stream()
        pairs = {
            "default to default": (default, default),
            "side to the same side": (side := torch.cuda.Stream(), side),
            "side to another side": (torch.cuda.Stream(), torch.cuda.Stream()),
            "side to default": (torch.cuda.Stream(), default),
        }
        for dtype in (torch.float32, torch.int16):  # int16 is converted on the way
            shape = (4 * self.size, 1009)
            values = rank_input(shape, dtype, 0, "stream")
            late = values.to(self.device)
            for kind, (start, expected) in self.starters().items():
                if dtype == torch.int16 and kind not in ("allreduce", "average"):
                    continue
                for where, (producer, consumer) in pairs.items():
                    tensor = torch.full(shape, 77, dtype=dtype, device=self.device)
                    torch.cuda.synchronize()
                    with torch.cuda.stream(producer):
                        keep_gpu_busy(30)
                        tensor.copy_(late)
                        handle = start(tensor)
                    with torch.cuda.stream(consumer):
                        output = hvd.synchronize(handle)
                        output = output[0] if isinstance(output, (list, tuple)) else output
                        doubled = output * 2
                    torch.cuda.synchronize()
                    what = f"{kind} of {dtype}, {where}"
                    self.compare(doubled, (expected(values) * 2).to(_wide(dtype)), dtype, what)

    def blocking_forms_on_a_side_stream(self) -> None:
        values = rank_input((1009,), torch.float32, 0, "blocking")
        late = values.to(self.device)
        side = torch.cuda.Stream()
        tensor = self.full(77.0, 1009)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            keep_gpu_busy(30)
            tensor.copy_(late)
            output = hvd.allreduce(tensor, op=hvd.Sum)
            tensor.fill_(-1)  # the reduction must have read it by then
            doubled = output * 2
            placed = late.clone()
            hvd.allreduce_(placed, op=hvd.Sum)
            placed *= 3
        torch.cuda.synchronize()
        self.compare(doubled, values.double() * 2 * self.size, torch.float32, "allreduce")
        self.compare(placed, values.double() * 3 * self.size, torch.float32, "allreduce_")

    def memory_that_is_given_back_early(self) -> None:
        """The caching allocator hands out a freed tensor again at once: not while the library still reads it."""
        count = BIG if self.checks.short or self.size > 1 else 16 * BIG
        values = torch.arange(count, dtype=torch.float32, device=self.device) % 1000
        expected = values.cpu().double() * self.size
        producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()
        for turn in range(3):
            with torch.cuda.stream(producer):
                tensor = torch.empty_like(values)
                address = tensor.data_ptr()
                keep_gpu_busy(20)
                tensor.copy_(values)
                handle = hvd.allreduce_async(tensor, op=hvd.Sum)
            with torch.cuda.stream(consumer):
                output = hvd.synchronize(handle)
            del tensor, handle
            gc.collect()
            with torch.cuda.stream(producer):
                again = torch.empty_like(values)
                again.fill_(-1)
            with torch.cuda.stream(consumer):
                copied = output.clone()
            torch.cuda.synchronize()
            reused = again.data_ptr() == address
            self.compare(copied, expected, torch.float32, f"turn {turn}, memory was reused: {reused}")
            del again, output, copied

    # ---- errors

    def mismatches(self) -> str | None:
        if self.size == 1:
            return "one rank cannot disagree"
        odd = self.rank % 2 == 1
        on_host = torch.ones(4)
        cases: dict[str, tuple[str, Callable[[], object]]] = {
            "dtype": (
                "float32.*int32|int32.*float32",
                lambda: hvd.allreduce(self.full(1, dtype=torch.int32 if odd else torch.float32), name="mismatch"),
            ),
            "shape": (r"\b4\b.*\b5\b|\b5\b.*\b4\b", lambda: hvd.allreduce(self.full(1, 4 + odd), name="mismatch")),
            "op": (
                "reduc",
                lambda: hvd.allreduce(self.full(1), op=hvd.Max if odd else hvd.Sum, name="mismatch"),
            ),
            "columns": (
                "shape",
                lambda: hvd.allgather(torch.ones(2, 3 + odd, device=self.device), name="mismatch"),
            ),
            "root": ("root", lambda: hvd.broadcast(self.full(1), int(odd), name="mismatch")),
        }
        if self.checks.on_gpu:
            both = r"(?i)host: rank.*cuda device: rank|cuda device: rank.*host: rank"
            mine = on_host if odd else self.full(1, 4)
            cases |= {
                "device": (both, lambda: hvd.allreduce(mine, name="mismatch")),
                "device of allgather": (both, lambda: hvd.allgather(mine, name="mismatch")),
                "device of broadcast": (both, lambda: hvd.broadcast(mine, 0, name="mismatch")),
            }
        outcomes = []
        for what, (pattern, call) in cases.items():
            for _ in range(2):  # the name is free again afterwards
                try:
                    call()
                    outcomes.append((what, pattern, "no error"))
                except hvd.HorovodInternalError as error:
                    outcomes.append((what, pattern, str(error)))
            after = hvd.allreduce(self.full(1.0), op=hvd.Sum, name=f"after {what}")
            self.same(after, torch.full((5,), float(self.size)), f"after mismatch of {what}")
        for what, pattern, message in outcomes:
            found = re.search(pattern, message, re.DOTALL)
            named = "mismatch" in message and all(re.search(rf"\b{rank}\b", message) for rank in (0, 1))
            assert found and named, f"mismatch of {what}: {message}"
        return next((message for what, _, message in outcomes if what == "device"), None)

    def refusals(self) -> None:
        """Mistakes of the caller are errors at once."""
        calls: dict[str, Callable[[], object]] = {
            "scalar allgather": lambda: hvd.allgather(self.full(1)[0]),
            "unknown dtype": lambda: hvd.allreduce(self.full(1).to(torch.float8_e4m3fn)),
            "bad splits": lambda: hvd.alltoall(self.full(1), splits=[9] * self.size),
            "bad root": lambda: hvd.broadcast(self.full(1), self.size),
            "product of complex numbers": lambda: hvd.allreduce(self.full(1).to(torch.complex64), op=hvd.Product),
        }
        for what, call in calls.items():
            try:
                call()
            except (ValueError, hvd.HorovodInternalError):
                continue
            raise AssertionError(f"{what} is accepted")

    def both_devices_in_one_job(self) -> str:
        """CPU and GPU tensors side by side, each with the result where its input is."""
        tensors = inputs((1009,), torch.float32)
        handles = []
        for turn in range(4):
            handles.append(hvd.allreduce_async(self.own(tensors), op=hvd.Sum, name=f"here.{turn}"))
            handles.append(hvd.allreduce_async(tensors[self.rank].clone(), op=hvd.Sum, name=f"host.{turn}"))
        outputs = [hvd.synchronize(handle) for handle in handles]
        for index, output in enumerate(outputs):
            assert output.is_cuda == (index % 2 == 0), f"result {index} is on {output.device}"
            assert_reduced(output.cpu(), reduced(tensors, hvd.Sum), torch.float32, f"result {index}")
        try:
            mixed = hvd.grouped_allreduce([self.full(1.0), torch.ones(5)], op=hvd.Sum, name="mixed group")
        except (ValueError, hvd.HorovodInternalError) as error:
            return f"a group of both devices is refused: {error}"
        assert [one.is_cuda for one in mixed] == [True, False]
        assert all((one == self.size).all() for one in mixed)
        return "a group of both devices works"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else torch.int64


def _on_cpu(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_on_cpu(item) for item in value]
    return value


def _assert_equal(got: object, expected: object, what: str) -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(got, torch.Tensor) and torch.equal(got, expected), f"{what} differs"
    elif isinstance(expected, dict):
        assert isinstance(got, dict) and got.keys() == expected.keys(), f"{what}: other keys"
        for key, value in expected.items():
            _assert_equal(got[key], value, f"{what}.{key}")
    elif isinstance(expected, list):
        assert isinstance(got, list) and len(got) == len(expected), f"{what}: another length"
        for index, value in enumerate(expected):
            _assert_equal(got[index], value, f"{what}.{index}")
    else:
        assert got == expected, f"{what}: {got} in place of {expected}"


def main() -> int:
    arguments = argument_parser(__doc__).parse_args()
    checks = Checks("collectives", arguments.device, arguments.short)
    part = Collectives(checks)
    everywhere: list[Callable[[], object]] = [
        part.allreduce_one_by_one,
        part.allreduce_of_all_types,
        part.allreduce_in_place,
        part.complex_numbers,
        part.factors,
        part.special_values,
        part.many_in_flight,
        part.the_same_names_again,
        part.compression,
        part.not_contiguous,
        part.groups,
        part.a_large_group,
        part.allgather,
        part.broadcast,
        part.alltoall,
        part.reducescatter,
        part.sparse,
        part.barrier_and_poll,
        part.join_with_uneven_data,
        part.process_sets,
        part.objects,
        part.parameters_and_optimizer_state,
        part.sync_batch_norm,
        part.gradients,
        part.adasum,
        part.mismatches,
        part.refusals,
    ]
    on_gpu: list[Callable[[], object]] = [
        part.order_of_streams,
        part.blocking_forms_on_a_side_stream,
        part.memory_that_is_given_back_early,
        part.both_devices_in_one_job,
    ]
    for function in everywhere + (on_gpu if checks.on_gpu else []):
        checks.run(getattr(function, "__name__", "?"), function)
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
