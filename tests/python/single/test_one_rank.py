"""A program that no launcher started: one rank, and what happens before init and at exit."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def run(code: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    program = "import os, signal, sys, threading, time, torch\nimport horovod_cpp.torch as hvd\n" + textwrap.dedent(
        code
    )
    return subprocess.run(
        [*launcher, sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120
    )


HVDRUN_2 = (sys.executable, "-m", "horovod_cpp.run", "-np", "2")


def assert_well(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_before_init() -> None:
    assert_well(run("""
        assert hvd.is_initialized() is False
        for ask in (hvd.rank, hvd.size, hvd.local_rank, hvd.local_size, hvd.cross_rank, hvd.cross_size,
                    hvd.is_homogeneous, hvd.mpi_threads_supported, hvd.mpi_enabled, hvd.gloo_enabled):
            try:
                ask()
            except ValueError as error:
                assert str(error) == "Horovod has not been initialized; use hvd.init()."
            else:
                sys.exit(f"{ask} gave an answer")
        for call in (lambda: hvd.allreduce(torch.ones(1)), lambda: hvd.broadcast_async(torch.ones(1), 0),
                     hvd.barrier):
            try:
                call()
            except hvd.HorovodInternalError as error:
                assert "Horovod has not been initialized; use hvd.init()." in str(error)
            else:
                sys.exit("an operation was taken")
        assert [hvd.gloo_built(), hvd.ddl_built(), hvd.ccl_built(), hvd.rocm_built()] == [False] * 4
        assert isinstance(hvd.mpi_built(), bool) and isinstance(hvd.cuda_built(), bool)
        assert type(hvd.nccl_built()) is int
        hvd.shutdown()
    """))  # fmt: skip


def test_one_rank_without_a_launcher() -> None:
    assert_well(run("""
        hvd.init()
        assert (hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size()) == (0, 1, 0, 1)
        assert hvd.allreduce(torch.ones(3)).tolist() == [1.0] * 3
        assert hvd.allgather(torch.ones(2, 2, dtype=torch.bfloat16)).shape == (2, 2)
        hvd.shutdown()
        hvd.init()
        assert hvd.broadcast(torch.ones(3), 0).tolist() == [1.0] * 3
    """))  # fmt: skip


def test_exit_with_operations_in_flight() -> None:
    assert_well(run("""
        hvd.init()
        kept = [hvd.allreduce_async(torch.ones(1 << 20), name=f"{hvd.rank()}.{i}") for i in range(20)]
        gathered = hvd.allgather(torch.ones(5))
    """, *HVDRUN_2))  # fmt: skip


def test_exit_while_threads_wait() -> None:
    """Rank 0 leaves first: what wakes its daemon threads is its own shutdown at exit."""
    assert_well(run("""
        hvd.init()

        def wait(number):
            try:
                hvd.allreduce(torch.ones(1), name=f"nobody else asks for this {number}")
            except hvd.HorovodInternalError:
                pass

        if hvd.rank() == 0:
            for number in range(50):  # one alone rarely meets the moment at which the interpreter ends
                threading.Thread(target=wait, args=(number,), daemon=True).start()
            time.sleep(0.3)
        hvd.barrier()
        if hvd.rank() == 1:
            wait("until rank 0 has left")
    """, *HVDRUN_2))  # fmt: skip


def test_ctrl_c_ends_a_wait_at_once_and_the_handle_stays_good() -> None:
    assert_well(run("""
        hvd.init()
        if hvd.rank() == 0:
            handle = hvd.allreduce_async(torch.ones(2), name="late")
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                hvd.synchronize(handle)
            except KeyboardInterrupt:
                hvd.barrier()
            else:
                sys.exit("no KeyboardInterrupt")
        else:
            hvd.barrier()
            handle = hvd.allreduce_async(torch.ones(2), name="late")
        assert hvd.synchronize(handle).tolist() == [1.0, 1.0]
    """, *HVDRUN_2))  # fmt: skip


def test_a_lost_rank_is_an_error_that_names_it() -> None:
    result = run("""
        hvd.init()
        hvd.barrier()
        if hvd.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # hvdrun would end us
        try:
            hvd.allreduce(torch.ones(3))
        except hvd.HorovodInternalError as error:
            print("error:", error)
    """, *HVDRUN_2)  # fmt: skip
    assert result.returncode == 137
    assert "[0] error: " in result.stdout
    assert "rank 1" in result.stdout


def test_a_comm_of_ranks_that_are_not_there_is_refused_with_a_reason() -> None:
    assert_well(run("""
        for comm in ([1], [0, 1], [0, 0], [-1], [0.5], [True], "0", 3, [2**40]):
            try:
                hvd.init(comm=comm)
            except ValueError as error:
                assert f"init(comm={comm!r})" in str(error), error
            else:
                sys.exit(f"{comm} was taken")
        assert not hvd.is_initialized()
        hvd.init(comm=[0])
        assert (hvd.rank(), hvd.size()) == (0, 1)
    """))  # fmt: skip


def test_options_from_code() -> None:
    assert_well(
        run("""
        os.environ["HOROVOD_CACHE_CAPACITY"] = "0"  # what the program says comes first
        hvd.init(options={"cache_capacity": 8, "HOROVOD_DYNAMIC_PROCESS_SETS": True, "cycle_time": 0.5})
        for _ in range(3):
            hvd.allreduce(torch.ones(1), name="again")
        assert hvd.statistics()["cache_hits"] == 2
        hvd.remove_process_set(hvd.ProcessSet([0]))
        hvd.shutdown()
        for options, text in (({"cache_capacity": "lots"}, "HOROVOD_CACHE_CAPACITY='lots'"),
                              ({"cash_capacity": 8}, "HOROVOD_CASH_CAPACITY is no option; there are HOROVOD_")):
            try:
                hvd.init(options=options)
            except ValueError as error:
                assert text in str(error), error
            else:
                sys.exit(f"{options} was taken")
        hvd.init()
        for _ in range(3):
            hvd.allreduce(torch.ones(1), name="again")
        assert hvd.statistics()["cache_hits"] == 0
    """)
    )


def test_options_that_differ_between_ranks_are_named() -> None:
    result = run(
        """
        try:
            hvd.init(options={"fusion_threshold": 1000 + int(os.environ["HOROVOD_RANK"])})
        except ValueError as error:
            text = str(error)
            assert "HOROVOD_FUSION_THRESHOLD: 1000: rank 0, 1001: rank 1" in text, text
        else:
            sys.exit("ranks with other settings have met")
        """,
        *HVDRUN_2,
    )
    assert result.returncode == 0, result.stderr


def test_a_value_of_horovod_elastic_that_cannot_be_used_is_an_error() -> None:
    assert_well(
        run("""
        os.environ["HOROVOD_ELASTIC"] = "yes"
        try:
            hvd.init()
        except ValueError as error:
            assert str(error) == "HOROVOD_ELASTIC='yes' cannot be used: it has to be 0 or 1", error
        else:
            raise AssertionError
        os.environ["HOROVOD_ELASTIC"] = "1"
        hvd.init()
        parameter = torch.nn.Parameter(torch.ones(1))
        assert all(hvd.DistributedOptimizer(torch.optim.SGD([parameter], lr=1.0))._reduction.active.values())
        os.environ["HOROVOD_ELASTIC"] = "0"
        assert not any(hvd.DistributedOptimizer(torch.optim.SGD([parameter], lr=1.0))._reduction.active.values())
    """)
    )


def test_variables_without_effect_are_named_once() -> None:
    assert_well(
        run("""
        import warnings
        os.environ.update({"HOROVOD_AUTOTUNE": "1", "HOROVOD_GLOO_TIMEOUT_SECONDS": "5", "HOROVOD_LOG_LEVEL": "error"})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hvd.init()
            hvd.init()
            hvd.shutdown()
            hvd.init()
        assert [str(one.message) for one in caught] == [
            "HOROVOD_AUTOTUNE has no effect: there is no autotuning yet",
            "HOROVOD_GLOO_TIMEOUT_SECONDS has no effect: there is no Gloo",
        ], caught
        assert all(one.filename == "<string>" for one in caught)
    """)
    )
