"""Join: ranks that have no more data let the others go on."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import horovod_cpp.torch as hvd


def first_ranks() -> int:
    """Ranks below this one have more data than the others."""
    return max(1, hvd.size() // 2)


def has_more() -> bool:
    return hvd.rank() < first_ranks()


def test_a_number_that_is_no_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^join: there is no device 1099511627776"):
        hvd.join(2**40)
    assert 0 <= hvd.join(-(2**40)) < hvd.size()


def test_all_get_the_same_last_rank() -> None:
    for _ in range(3):
        last = hvd.join()
        assert 0 <= last < hvd.size()
        assert hvd.broadcast_object(last) == last


def test_the_rank_with_most_data_joins_last() -> None:
    if has_more():
        for turn in range(3):
            hvd.allreduce(torch.ones(2), name=f"more.{turn}")
    assert hvd.join() < first_ranks()


@pytest.mark.parametrize("cached", [False, True], ids=["new name", "known name"])
@pytest.mark.parametrize(
    ("op", "expected"),
    [(hvd.Sum, 2.0), (hvd.Min, 2.0), (hvd.Max, 2.0), (hvd.Product, 2.0)],
    ids=["sum", "min", "max", "product"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8], ids=str)
def test_joined_ranks_change_nothing(op: int, expected: float, dtype: torch.dtype, cached: bool) -> None:
    name = f"neutral.{op}.{dtype}"
    if cached:
        hvd.allreduce(torch.ones(3, dtype=dtype), name=name, op=op)
    if hvd.rank() == 0:
        assert hvd.allreduce(torch.full((3,), 2, dtype=dtype), name=name, op=op).tolist() == [expected] * 3
    hvd.join()


def test_neutral_elements_of_negative_numbers_bool_and_factors() -> None:
    if hvd.rank() == 0:
        assert hvd.allreduce(torch.tensor([-5.0, 5.0]), name="max", op=hvd.Max).tolist() == [-5.0, 5.0]
        assert hvd.allreduce(torch.tensor([True, False]), name="and", op=hvd.Min).tolist() == [True, False]
        assert hvd.allreduce(torch.tensor([True, False]), name="or", op=hvd.Sum).tolist() == [True, False]
        scaled = hvd.allreduce(torch.tensor([3]), name="scaled", op=hvd.Min, prescale_factor=2.0, postscale_factor=0.5)
        assert scaled.item() == 3
    hvd.join()


def test_an_average_still_divides_by_all() -> None:
    if has_more():
        mean = hvd.allreduce(torch.full((2,), float(hvd.size())), name="mean", op=hvd.Average)
        assert mean.tolist() == [float(first_ranks())] * 2
    hvd.join()


def test_fused_grouped_and_large_tensors_go_on() -> None:
    total = float(first_ranks())
    if has_more():
        handles = [hvd.allreduce_async(torch.ones(n), name=f"fused.{n}", op=hvd.Sum) for n in (1, 10, 100, 200_000)]
        assert all((hvd.synchronize(handle) == total).all() for handle in handles)
        mixed = [torch.ones(3), torch.ones(50_000), torch.ones(4, dtype=torch.int32)]
        assert all((one == total).all() for one in hvd.grouped_allreduce(mixed, name="grouped", op=hvd.Sum))
        hvd.barrier()
    hvd.join()


def test_other_operations_name_the_ranks_that_have_joined() -> None:
    if hvd.size() == 1:
        pytest.skip("nobody else")
    if hvd.rank() == 0:
        joined = "rank 1 has joined" if hvd.size() == 2 else f"ranks 1-{hvd.size() - 1} have joined"
        operations = {
            "allgather": lambda: hvd.allgather(torch.ones(2), name="odd"),
            "broadcast": lambda: hvd.broadcast(torch.ones(2), 0, name="odd"),
            "alltoall": lambda: hvd.alltoall(torch.ones(hvd.size()), name="odd"),
            "reducescatter": lambda: hvd.reducescatter(torch.ones(hvd.size()), name="odd"),
        }
        for name, operation in operations.items():
            with pytest.raises(hvd.HorovodInternalError, match=f"{name} 'odd': {joined}"):
                operation()
        assert hvd.allreduce(torch.ones(1), name="odd", op=hvd.Sum).item() == 1.0
    hvd.join()
    assert hvd.allgather(torch.ones(2), name="odd").numel() == 2 * hvd.size()


def test_unnamed_operations_of_several_ranks_meet_while_others_have_joined() -> None:
    if hvd.size() < 3:
        pytest.skip("needs two ranks that have not joined")
    if hvd.rank() < 2:
        for _ in range(2):
            assert hvd.allreduce(torch.ones(2), op=hvd.Sum).tolist() == [2.0, 2.0]
            with pytest.raises(hvd.HorovodInternalError, match="joined"):
                hvd.allgather(torch.ones(1))
    hvd.join()
    assert hvd.allgather(torch.ones(1)).numel() == hvd.size()


def test_a_sparse_gradient_that_meets_a_joined_rank_says_what_to_do() -> None:
    if hvd.size() == 1:
        pytest.skip("nobody else")
    if hvd.rank() == 0:
        finish = hvd.sparse_allreduce_async(torch.ones(3).to_sparse(), "sparse", hvd.Sum)
        with pytest.raises(hvd.HorovodInternalError, match=r"joined.*sparse_as_dense=True"):
            finish()
    hvd.join()


def test_a_rank_that_has_joined_hands_nothing_over() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank has joined at once")
    if hvd.rank() == 1:
        waiting = threading.Thread(target=hvd.join)
        waiting.start()
        time.sleep(0.3)  # it has handed its join over by then
        with pytest.raises(hvd.HorovodInternalError, match="allreduce 'late': this rank has joined"):
            hvd.allreduce_async(torch.ones(1), name="late")
        waiting.join()
    else:
        time.sleep(1.0)
        hvd.join()
    assert hvd.allreduce(torch.ones(1), name="late", op=hvd.Sum).item() == hvd.size()


def test_unnamed_operations_count_alike_afterwards() -> None:
    if hvd.rank() == 0:
        for _ in range(3):
            hvd.allreduce(torch.ones(1))
    hvd.join()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()
    assert hvd.allgather(torch.ones(1)).numel() == hvd.size()


def test_uneven_epochs_of_training_end_together() -> None:
    torch.manual_seed(3)
    model = torch.nn.Linear(3, 2)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    for _ in range(2):
        for batch in range(2 + hvd.rank()):  # each rank has one more than the one before
            optimizer.zero_grad()
            model(torch.full((4, 3), float(batch))).sum().backward()
            optimizer.step()
        assert hvd.join() == hvd.size() - 1
    hvd.broadcast_parameters(model.state_dict(), root_rank=hvd.size() - 1)


def test_join_in_another_set_goes_on_while_one_is_stuck() -> None:
    if hvd.size() < 3:
        pytest.skip("needs a set without rank 0")
    others = hvd.add_process_set(range(1, hvd.size()))
    stuck = hvd.add_process_set([0, 1])
    handle = hvd.allreduce_async(torch.ones(1), name="stuck", op=hvd.Sum, process_set=stuck) if hvd.rank() == 0 else 0
    if hvd.rank() == 1:  # with ranks that have joined, also in their set
        assert hvd.allreduce(torch.ones(2), op=hvd.Sum, process_set=others).tolist() == [1.0, 1.0]
    hvd.join()
    # The operation that rank 0 left behind met the joined rank 1.
    if hvd.rank() == 0:
        assert hvd.synchronize(handle).item() == 1.0
    assert hvd.remove_process_set(stuck) and hvd.remove_process_set(others)


def test_a_set_that_is_added_or_removed_beside_joined_ranks_is_an_error() -> None:
    if hvd.size() == 1:
        pytest.skip("nobody else has joined")
    known = hvd.add_process_set([0])
    if hvd.rank() > 0:
        hvd.join()
    else:
        joined = "rank 1 has joined" if hvd.size() == 2 else rf"ranks 1-{hvd.size() - 1} have joined"
        with pytest.raises(hvd.HorovodInternalError, match=joined):
            hvd.add_process_set([1])
        with pytest.raises(hvd.HorovodInternalError, match=joined):
            hvd.remove_process_set(known)
        hvd.join()
    assert hvd.remove_process_set(known) and known.process_set_id is None
