"""The C ABI of libhorovod_cpp.so (``horovod_cpp/c_api.h``) for Python."""

from collections.abc import Sequence
from typing import Any

class Error(RuntimeError):
    """A failed call; ``code`` is its ``hvd_code``."""

    code: int

class ForkError(Error):
    """A call in a child process of a rank."""

OK: int
INVALID_ARGUMENT: int
PRECONDITION: int
INTERNAL: int
UNAVAILABLE: int

ALLREDUCE: int
ALLGATHER: int
BROADCAST: int
BARRIER: int
REDUCESCATTER: int
ALLTOALL: int

UINT8: int
INT8: int
INT16: int
INT32: int
INT64: int
FLOAT16: int
FLOAT32: int
FLOAT64: int
BOOL: int
BFLOAT16: int
COMPLEX32: int
COMPLEX64: int
COMPLEX128: int

BUCKET_BYTES: int
FIRST_BUCKET_BYTES: int
BUCKET_ALIGNMENT_BYTES: int

AVERAGE: int
SUM: int
ADASUM: int
MIN: int
MAX: int
PRODUCT: int

class Topology:
    """Place of this rank in the job."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def local_size(self) -> int: ...
    @property
    def cross_rank(self) -> int: ...
    @property
    def cross_size(self) -> int: ...
    @property
    def is_homogeneous(self) -> bool: ...
    @property
    def mpi_enabled(self) -> bool: ...
    @property
    def mpi_threads_supported(self) -> bool: ...

class Handle:
    """An operation that was handed over."""

    def wait(self) -> None:
        """Block until done; raise on error. Ctrl-C ends the wait, not the operation."""

    def poll(self) -> bool:
        """True when done, be it well or with an error."""

    def stream_wait(self, stream: int, /) -> None:
        """After `wait`: let a CUDA stream wait for the results. Does not block; nothing for host memory."""

    def output_place(self, index: int, /) -> tuple[int, list[int], int, int]:
        """Of an output that the library made: address, shape, dtype, and device or -1; valid as long as this object."""

    def to_dlpack(self, index: int, /) -> object:
        """An output that the library made, once it is done. All capsules of one share its memory."""

    def received_splits(self) -> list[int]:
        """Of an alltoall that is done: rows from each rank of the set."""

    def last_joined_rank(self) -> int:
        """Of a join that is done."""

def init(process_sets: Sequence[Sequence[int]], comm: Sequence[int], settings: Sequence[tuple[str, str]]) -> None:
    """Join the ranks of the job. Blocks. An empty `comm` means all ranks of the launch."""

def shutdown() -> None:
    """End the job for all ranks. Blocks for about 5 s at most. Does nothing in a forked child."""

def interpreter_ends() -> None:
    """Call first in an exit handler: threads that wait for operations stay asleep from now on."""

def is_initialized() -> bool: ...
def version() -> str: ...
def mpi_built() -> bool: ...
def mpi_text() -> str:
    """What the MPI of this machine says of itself. May block for a second, as the following; see c_api.h."""

def cuda_built() -> bool: ...
def cuda_devices() -> int:
    """Number of CUDA devices that this process sees; an Error with the reason where there is none."""

def cuda_device_of(data: int) -> int:
    """The number of the CUDA device whose memory lies at an address; an Error for other memory."""

def cuda_text() -> str:
    """The versions of the CUDA module and of the driver."""

def nccl_version() -> int:
    """22809 is 2.28.9; an Error with where it was looked for where there is none."""

def nccl_text() -> str:
    """Version, file, and which of the calls it has that not every NCCL has."""

def topology() -> Topology: ...
def process_set_add(ranks: Sequence[int]) -> int:
    """Collective over all ranks; returns the id. Blocks."""

def process_set_remove(id: int) -> None:
    """Collective over all ranks. Blocks."""

def process_set_ids() -> list[int]: ...
def process_set_ranks(id: int) -> list[int]: ...
def enqueue(
    op: int,
    dtype: int,
    shape: Sequence[int],
    input: int,
    output: int,
    name: str | None,
    process_set: int,
    reduce_op: int,
    root_rank: int,
    prescale: float,
    postscale: float,
    call_site_file: str | None,
    call_site_line: int,
    caller_waits: bool,
    device: int,
    stream: int,
    keep_alive: object,
    strides: Sequence[int] | None,
    /,
) -> Handle:
    """Hand a tensor over; see ``hvd_operation`` in c_api.h. No `strides`: C order. Does not block."""

def enqueue_plain(
    op: int,
    source: object,
    target: object,
    name: str | None,
    process_set: int,
    reduce_op: int,
    root_rank: int,
    prescale: float,
    postscale: float,
    call_site: tuple[str | None, int],
    caller_waits: bool,
    /,
) -> Handle | None:
    """As `enqueue`, for tensors that lie in host memory as they are; None for others. Does not block."""

class InPlace:
    """An allreduce in place, in flight. Once it is gone, what is in flight goes on."""

    def done(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> Any:
        """Block until done and return the tensor; raise `Error` if it failed. Ctrl-C ends the wait alone."""

def start_in_place(
    tensor: object,
    name: str | None,
    op: int | None,
    prescale: float,
    postscale: float,
    process_set: object,
    caller_waits: bool,
    /,
) -> InPlace | None:
    """Hand a tensor over for an allreduce in place, on behalf of the caller of this package. Does not block.

    None where anything is out of the ordinary, be it a mistake or a tensor that does not lie in host memory as it is.
    """

def prepare_allreduce(
    name: str,
    process_set: int,
    reduce_op: int,
    prescale: float,
    postscale: float,
    call_site: tuple[str | None, int],
    /,
) -> object:
    """What `start_prepared` takes, for an allreduce in place. Once it is gone, what is in flight goes on."""

def start_prepared(prepared: object, tensor: object, /) -> bool:
    """Hand a tensor over; false for one that does not lie in host memory as it is. Does not block."""

def wait_prepared(prepared: Sequence[object], /) -> list[tuple[int, str]]:
    """Block until all are done; which ones failed, and why."""

def read_tensors_of(type: type, /) -> None:
    """Let `enqueue_plain` take tensors of exactly this type, if they can be read without a call into Python."""

def call_site() -> tuple[str | None, int]:
    """File and line of the first caller outside the skipped folders; (None, 0) if there is none."""

def skip_folder(folder: str, /) -> None:
    """Pass over the frames of files below `folder`, which ends with a slash, in `call_site`."""

def enqueue_group(
    op: int,
    members: Sequence[tuple[int, Sequence[int], int, int, Sequence[int] | None]],
    name: str | None,
    process_set: int,
    reduce_op: int,
    prescale: float,
    postscale: float,
    call_site_file: str | None,
    call_site_line: int,
    caller_waits: bool,
    device: int,
    stream: int,
    keep_alive: object,
    /,
) -> Handle:
    """Hand several tensors (dtype, shape, input, output, strides) over as one operation. Does not block."""

def enqueue_alltoall(
    dtype: int,
    shape: Sequence[int],
    input: int,
    splits: Sequence[int] | None,
    name: str | None,
    process_set: int,
    call_site_file: str | None,
    call_site_line: int,
    caller_waits: bool,
    device: int,
    stream: int,
    keep_alive: object,
    /,
) -> Handle:
    """Hand a tensor over that is to be split; without `splits` in equal shares. Does not block."""

def enqueue_join(call_site_file: str | None, call_site_line: int, device: int, /) -> Handle:
    """This rank has no more data. Does not block; the wait ends when all ranks have joined."""

def wait_all(handles: Sequence[Handle], /) -> None:
    """Block until all handles are done, be it well or with an error. Ctrl-C ends the wait, not the operations."""

def streams_wait(handles: Sequence[Handle], stream: int, /) -> None:
    """After `wait_all`: let a CUDA stream wait for the results of all handles. Does not block."""

def statistics() -> dict[str, int]:
    """What happened so far on this rank; see ``hvd_statistics`` in c_api.h."""

def timeline_start(path: str | bytes, mark_cycles: bool) -> None:
    """Record into this file from now on; see ``hvd_timeline_start`` in c_api.h."""

def timeline_stop() -> None:
    """End the file; nothing if none is recorded. Blocks until everything is in it."""
