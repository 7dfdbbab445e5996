"""Names, positions and defaults of the public functions are Horovod's."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import horovod_cpp
import horovod_cpp.torch as hvd
from horovod_cpp import _core

NONE = hvd.Compression.none
GLOBAL = hvd.global_process_set
REQUIRED = inspect.Parameter.empty

SIGNATURES: dict[str, list[tuple[str, object]]] = {
    "init": [("comm", None), ("process_sets", None), ("options", None)],
    "allreduce": [
        ("tensor", REQUIRED), ("average", None), ("name", None), ("compression", NONE), ("op", None),
        ("prescale_factor", 1.0), ("postscale_factor", 1.0), ("process_set", GLOBAL),
    ],
    "allreduce_async": [
        ("tensor", REQUIRED), ("average", None), ("name", None), ("op", None), ("prescale_factor", 1.0),
        ("postscale_factor", 1.0), ("process_set", GLOBAL),
    ],
    "allgather": [("tensor", REQUIRED), ("name", None), ("process_set", GLOBAL)],
    "broadcast": [("tensor", REQUIRED), ("root_rank", REQUIRED), ("name", None), ("process_set", GLOBAL)],
    "barrier": [("process_set", GLOBAL)],
    "poll": [("handle", REQUIRED)],
    "synchronize": [("handle", REQUIRED)],
    "broadcast_parameters": [("params", REQUIRED), ("root_rank", REQUIRED), ("process_set", GLOBAL)],
    "broadcast_optimizer_state": [
        ("optimizer", REQUIRED), ("root_rank", REQUIRED), ("model", None), ("process_set", GLOBAL),
    ],
    "broadcast_object": [("obj", REQUIRED), ("root_rank", 0), ("name", None), ("process_set", GLOBAL)],
    "allgather_object": [("obj", REQUIRED), ("name", None), ("process_set", GLOBAL)],
    "sparse_allreduce_async": [("tensor", REQUIRED), ("name", REQUIRED), ("op", REQUIRED), ("process_set", GLOBAL)],
    "DistributedOptimizer": [
        ("optimizer", REQUIRED), ("named_parameters", None), ("compression", NONE), ("backward_passes_per_step", 1),
        ("op", hvd.Average), ("gradient_predivide_factor", 1.0), ("num_groups", 0), ("groups", None),
        ("sparse_as_dense", False), ("process_set", GLOBAL), ("gradient_as_bucket_view", False),
    ],
    "SyncBatchNorm": [
        ("num_features", REQUIRED), ("eps", 1e-5), ("momentum", 0.1), ("affine", True), ("track_running_stats", True),
        ("process_set", GLOBAL),
    ],
    "ProcessSet": [("ranks_or_comm", REQUIRED)],
    "start_timeline": [("file_path", REQUIRED), ("mark_cycles", False)],
    "add_process_set": [("process_set", REQUIRED)],
    "remove_process_set": [("process_set", REQUIRED)],
}  # fmt: skip
for same, name in {
    "allreduce_": "allreduce_async", "allreduce_async_": "allreduce_async", "allgather_async": "allgather",
    "broadcast_async": "broadcast", "broadcast_": "broadcast", "broadcast_async_": "broadcast",
}.items():  # fmt: skip
    SIGNATURES[same] = SIGNATURES[name]
WITHOUT_PARAMETERS = [
    "shutdown", "is_initialized", "rank", "size", "local_rank", "local_size", "cross_rank", "cross_size",
    "is_homogeneous", "mpi_threads_supported", "mpi_enabled", "gloo_enabled", "mpi_built", "gloo_built", "nccl_built",
    "ddl_built", "ccl_built", "cuda_built", "rocm_built", "stop_timeline",
]  # fmt: skip
SIGNATURES.update({name: [] for name in WITHOUT_PARAMETERS})


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    parameters = inspect.signature(getattr(hvd, name)).parameters.values()
    assert [(parameter.name, parameter.default) for parameter in parameters] == SIGNATURES[name]
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)


def test_constants() -> None:
    assert [hvd.Average, hvd.Sum, hvd.Adasum, hvd.Min, hvd.Max, hvd.Product] == [0, 1, 2, 3, 4, 5]


def test_everything_public_is_documented_and_typed() -> None:
    for name in hvd.__all__:
        value = getattr(hvd, name)
        if not callable(value):
            continue
        assert inspect.getdoc(value), name
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            annotations = [parameter.annotation for parameter in signature.parameters.values()]
            assert inspect.Signature.empty not in [*annotations, signature.return_annotation], name


def test_one_version() -> None:
    pyproject = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    written = re.search(r'^version = "(.*)"$', pyproject, re.MULTILINE)
    assert written is not None
    assert written.group(1) == horovod_cpp.__version__ == _core.version()


def test_the_stub_names_what_the_extension_has() -> None:
    stub = (Path(_core.__file__).parent / "_core.pyi").read_text()
    named = set(re.findall(r"^(?:class|def) (\w+)|^(\w+): int", stub, re.MULTILINE))
    assert {one or other for one, other in named} == {name for name in dir(_core) if not name.startswith("__")}
