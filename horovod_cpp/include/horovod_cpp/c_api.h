/* The C ABI of libhorovod_cpp.so: everything a binding or another language needs.
 *
 * Rules. Functions return HVD_OK or another hvd_code; the text of a failure is hvd_last_error() of the same thread.
 * Structs begin with their size in bytes, set by the caller (HVD_INIT_STRUCT), so that fields can be added at the
 * end. Strings are UTF-8, ended by a zero byte, and borrowed for the call. Unless it says otherwise, a function
 * may be called from any thread and does not block.
 */
#ifndef HOROVOD_CPP_C_API_H_
#define HOROVOD_CPP_C_API_H_

#include <stdint.h>

#if defined(__GNUC__)
#define HVD_API __attribute__((visibility("default")))
#else
#define HVD_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define HVD_ABI_VERSION 1

/* Zeroes a struct and sets its size. */
#define HVD_INIT_STRUCT(pointer)                                                       \
  do {                                                                                 \
    char* hvd_bytes = (char*)(pointer);                                                \
    for (uint32_t hvd_i = 0; hvd_i < sizeof *(pointer); ++hvd_i) hvd_bytes[hvd_i] = 0; \
    (pointer)->struct_bytes = (uint32_t)sizeof *(pointer);                             \
  } while (0)

typedef enum hvd_code {
  HVD_OK = 0,
  HVD_INVALID_ARGUMENT = 1, /* the caller's mistake, or ranks that disagree */
  HVD_PRECONDITION = 2,     /* not initialised, shut down, not a member of the process set */
  HVD_INTERNAL = 3,         /* lost peer, shutdown of another rank, stall limit */
  HVD_UNAVAILABLE = 4,      /* a library, device or transport is missing */
  HVD_DEADLINE_EXCEEDED = 5 /* a wait came to its time limit; the handle is still good */
} hvd_code;

typedef enum hvd_op {
  HVD_ALLREDUCE = 0,
  HVD_ALLGATHER = 1,
  HVD_BROADCAST = 2,
  HVD_BARRIER = 3,
  HVD_REDUCESCATTER = 6,
  HVD_ALLTOALL = 7,
  HVD_JOIN = 8
} hvd_op;

/* The numbers of data types, reductions and memory kinds. */
typedef enum hvd_dtype {
  HVD_UINT8 = 0,
  HVD_INT8 = 1,
  HVD_INT16 = 3,
  HVD_INT32 = 4,
  HVD_INT64 = 5,
  HVD_FLOAT16 = 6,
  HVD_FLOAT32 = 7,
  HVD_FLOAT64 = 8,
  HVD_BOOL = 9,
  HVD_BFLOAT16 = 10,
  /* Complex numbers, each the real part and then the imaginary one. Reductions: sum and average. */
  HVD_COMPLEX = 0x100, /* not a type: the bit that tells one from that of its parts */
  HVD_COMPLEX32 = HVD_COMPLEX | HVD_FLOAT16,
  HVD_COMPLEX64 = HVD_COMPLEX | HVD_FLOAT32,
  HVD_COMPLEX128 = HVD_COMPLEX | HVD_FLOAT64
} hvd_dtype;

typedef enum hvd_reduce_op {
  HVD_AVERAGE = 0,
  HVD_SUM = 1,
  HVD_ADASUM = 2,
  HVD_MIN = 3,
  HVD_MAX = 4,
  HVD_PRODUCT = 5
} hvd_reduce_op;

typedef enum hvd_memory_kind { HVD_HOST = 0, HVD_CUDA = 1 } hvd_memory_kind;

/* ---- lifecycle ------------------------------------------------------------------------------------------- */

typedef struct hvd_rank_list {
  const int32_t* ranks; /* global ranks, any order, no duplicates */
  int32_t count;
} hvd_rank_list;

typedef struct hvd_setting {
  const char* name; /* of a HOROVOD_* variable */
  const char* value;
} hvd_setting;

typedef struct hvd_init_options {
  uint32_t struct_bytes;
  int32_t process_set_count;         /* static process sets; they get the ids 1, 2, ... in this order */
  const hvd_rank_list* process_sets; /* equal on all ranks */
  hvd_rank_list comm;                /* count > 0: these ranks of the launch form the job, numbered in this order */
  int32_t setting_count;
  const hvd_setting* settings; /* in place of the environment's variables of these names */
} hvd_init_options;

/* Joins the ranks of the job (see README, Use it) and starts the background thread. Blocks until all ranks have
 * met or HOROVOD_START_TIMEOUT has passed. A second call does nothing. `options` may be NULL. */
HVD_API int hvd_init(const hvd_init_options* options);

/* Ends the job for all ranks: what is in flight anywhere ends with an error. Blocks for at most about 5 s.
 * Does nothing before hvd_init. hvd_init may be called again afterwards. */
HVD_API int hvd_shutdown(void);

HVD_API int hvd_is_initialized(void); /* 1 or 0 */

/* Text of the last failure on the calling thread; valid until its next call. Never NULL. */
HVD_API const char* hvd_last_error(void);
HVD_API const char* hvd_version(void);
HVD_API int hvd_abi_version(void);

typedef struct hvd_topology {
  uint32_t struct_bytes;
  int32_t rank, size;
  int32_t local_rank, local_size; /* among the ranks of this host */
  int32_t cross_rank, cross_size; /* among the ranks with this local rank, one per host */
  int32_t is_homogeneous;         /* 1 when every host has as many ranks */
  int32_t mpi_enabled;            /* 1 when the job was joined through MPI */
  int32_t mpi_threads_supported;  /* 1 when MPI gave MPI_THREAD_MULTIPLE */
} hvd_topology;

/* HVD_PRECONDITION before hvd_init. */
HVD_API int hvd_get_topology(hvd_topology* topology);

/* ---- what this build has, and what it finds on this machine ---------------------------------------------------- */

/* None of these needs hvd_init. The first question about a library opens it, which may block for a second; the answer
 * is that of all later ones. HVD_UNAVAILABLE: there is none, and hvd_last_error() says what is missing and where it was
 * looked for. A text stays valid as long as the process. */

/* 1 when the MPI module was built with this package (whether or not an MPI is on this machine). */
HVD_API int hvd_mpi_built(void);
/* What the MPI of this machine says of itself. Does not initialise it. */
HVD_API int hvd_mpi_text(const char** text);

/* 1 when the CUDA module lies where the library looks for it (whether or not a driver is on this machine). */
HVD_API int hvd_cuda_built(void);
/* Number of CUDA devices that this process sees, 1 or more. */
HVD_API int hvd_cuda_devices(int32_t* count);
/* The number of the CUDA device whose memory lies at `data`, managed memory included: for arrays that do not say where
 * they lie. HVD_INVALID_ARGUMENT for other memory. */
HVD_API int hvd_cuda_device_of(const void* data, int32_t* device);
/* The versions of the module and of the driver: "CUDA 13.0, driver 13.0". */
HVD_API int hvd_cuda_text(const char** text);

/* The version of NCCL as its NCCL_VERSION_CODE: 22809 is 2.28.9. Needs no device. */
HVD_API int hvd_nccl_version(int32_t* version);
/* Version, file, and which of the calls it has that not every NCCL has. */
HVD_API int hvd_nccl_text(const char** text);

/* ---- process sets ------------------------------------------------------------------------------------------ */

/* Collective over all ranks of the job: each calls with the same ranks. Blocks until all have. Writes the new id.
 * HVD_PRECONDITION without HOROVOD_DYNAMIC_PROCESS_SETS=1. HVD_INVALID_ARGUMENT for a set that exists already. */
HVD_API int hvd_process_set_add(const hvd_rank_list* ranks, int32_t* id);
/* Collective as above; the set must not be in use. Set 0 stays. */
HVD_API int hvd_process_set_remove(int32_t id);
/* The same without blocking: *handle is done once all ranks have called; hvd_handle_output then tells the id. Errors
 * that the ranks find out together come from waiting for it. A handle that is destroyed before does not undo the call.
 */
struct hvd_handle;
HVD_API int hvd_process_set_add_async(const hvd_rank_list* ranks, struct hvd_handle** handle);
HVD_API int hvd_process_set_remove_async(int32_t id, struct hvd_handle** handle);
/* Number of sets, set 0 included; writes up to `capacity` ids in ascending order. */
HVD_API int hvd_process_set_ids(int32_t* ids, int32_t capacity, int32_t* count);
/* Ranks of a set in ascending order; HVD_INVALID_ARGUMENT for an unknown id. */
HVD_API int hvd_process_set_ranks(int32_t id, int32_t* ranks, int32_t capacity, int32_t* count);

/* ---- operations ---------------------------------------------------------------------------------------------- */

typedef struct hvd_tensor {
  void* data;
  const int64_t* shape; /* `dimensions` sizes in elements */
  int32_t dimensions;
  int32_t dtype;       /* hvd_dtype */
  int32_t memory_kind; /* hvd_memory_kind, the same for all tensors of an operation; so is: */
  int32_t device;      /* HVD_CUDA: number of the device, as this process sees it */
  /* As many strides, in elements; NULL: C order, which is dense with the last dimension fastest. Allreduce and
   * broadcast of HVD_HOST memory take the dimensions of a dense tensor in any order, the input and the output in the
   * same: the memory is used as it lies where all ranks have the tensor in the same order, and copied where they do
   * not. Else strides have to be those of C order. Those of dimensions of size 1, and of tensors without elements, do
   * not count. hvd_enqueue answers others, and such with gaps or overlaps, with HVD_INVALID_ARGUMENT. */
  const int64_t* strides;
} hvd_tensor;

typedef struct hvd_operation {
  uint32_t struct_bytes;
  int32_t op;          /* hvd_op */
  int32_t process_set; /* 0: all ranks */
  int32_t reduce_op;   /* allreduce; reducescatter: HVD_AVERAGE or HVD_SUM */
  int32_t root_rank;   /* broadcast: global rank of the root */
  int32_t call_site_line;
  const char* call_site_file; /* where the user called, for messages; NULL if not known */
  const char* name;           /* key of the operation, equal on all ranks; NULL: made from a counter of the set */
  double prescale;            /* allreduce, reducescatter: factors before and after the reduction */
  double postscale;
  hvd_tensor input;  /* barrier: ignored; join: memory_kind and device say where to put what stands in for tensors */
  hvd_tensor output; /* same shape, strides and dtype as `input`, may be the same memory; broadcast: filled on every
                        rank; allgather, reducescatter and alltoall: ignored (the handle has the output) */
  void* keep_alive;  /* given to `release` when the engine needs the memory no more; may be NULL */
  void (*release)(void* keep_alive); /* called by a thread that is inside a function of this header, never by
                                        the background thread */
  int32_t caller_waits; /* 1: the calling thread goes straight on to hvd_handle_wait and drives the engine there */
  int32_t group_count;  /* above 0: so many tensors are one operation (allreduce, allgather, reducescatter), agreed and
                           done all or none; `input` and `output` are ignored */
  const hvd_tensor* group_inputs;
  const hvd_tensor* group_outputs; /* allreduce: as `output` */
  const int64_t* splits; /* alltoall: rows for each rank of the set, in the order of its ranks; NULL: equal shares */
  int32_t split_count;
  void* stream; /* HVD_CUDA: the cudaStream_t that makes the inputs, and so far uses the outputs: what it has been given
                   until now is waited for on the device. NULL: the default stream */
} hvd_operation;

/* On CUDA memory a handle is done once the work is in line on the device: nothing waits for the device. Let the stream
 * that uses the results wait for them with hvd_handle_stream_wait. Where `stream` is being captured the work becomes
 * part of its graph; all ranks have to capture then, and a process set has to have done one operation before. */

/* Join: this rank has no more data. Blocks in the wait until all ranks of the job have joined; meanwhile the rank takes
 * part in allreduces of the others with elements that change nothing, and in barriers. Averages still divide by the
 * size of the set. Every other operation of the others ends with an error that names the ranks that have joined. Until
 * all have joined, a rank that has can enqueue nothing more: HVD_PRECONDITION. */

typedef struct hvd_handle hvd_handle;

/* Hands the tensor over. Both memories stay untouched by the caller until the handle is done. On HVD_OK the caller
 * owns *handle. On failure `release` is not called.
 * HVD_INVALID_ARGUMENT: bad dtype, op, shape, root, a name that is in flight already, an unknown process set.
 * HVD_PRECONDITION: not initialised or shut down; not a member of the set. */
HVD_API int hvd_enqueue(const hvd_operation* operation, hvd_handle** handle);

/* Blocks until the operation is done: HVD_OK, or the failure that it ended with. A negative limit is none.
 * Any thread, but one at a time per handle. */
HVD_API int hvd_handle_wait(hvd_handle* handle, int64_t limit_nanoseconds);
/* Blocks until all of `count` operations are done, be it well or with a failure: HVD_OK. One wait for many costs less
 * than many waits, and the engine is driven until the last one ends. Any thread, but one at a time per handle. */
HVD_API int hvd_handles_wait(hvd_handle* const* handles, int32_t count, int64_t limit_nanoseconds);
/* 1 when done, be it well or with a failure. Who asks gets the operation under way if it still lies. */
HVD_API int hvd_handle_poll(const hvd_handle* handle);

/* Makes `stream` (a cudaStream_t) wait for the results of an operation that is done; does not block. It does nothing
 * for operations on host memory. Outputs that the engine made are that stream's from then on: once the handle is gone
 * their memory is used again in its order. */
HVD_API int hvd_handle_stream_wait(hvd_handle* handle, void* stream);
/* The same for many. */
HVD_API int hvd_handles_stream_wait(hvd_handle* const* handles, int32_t count, void* stream);

typedef struct hvd_output {
  uint32_t struct_bytes;
  int32_t dimensions;
  const int64_t* shape; /* valid as long as the handle */
  void* data;           /* the caller's output memory; where the engine made the output: valid as long as the handle */
  int64_t bytes;
  const int64_t* received_splits; /* alltoall: rows that came from each rank of the set; valid as long as the handle */
  int32_t received_split_count;
  int32_t last_joined_rank; /* join */
  int32_t memory_kind;      /* of an output that the engine made */
  int32_t device;
  int32_t process_set; /* that was added or removed */
} hvd_output;

/* The result of a handle that is done without failure; of a group: of its first tensor. */
HVD_API int hvd_handle_output(hvd_handle* handle, hvd_output* output);
/* Of a group: the result of one of its tensors. HVD_INVALID_ARGUMENT where there is none of that number. */
HVD_API int hvd_handle_group_output(hvd_handle* handle, int32_t index, hvd_output* output);
/* May be called at any time; an operation in flight goes on. NULL does nothing. */
HVD_API void hvd_handle_destroy(hvd_handle* handle);

/* Calls `release` for operations that have ended; hvd_enqueue and hvd_handle_wait do it by themselves. */
HVD_API void hvd_collect_released(void);

/* ---- what happened so far ------------------------------------------------------------------------------------ */

typedef struct hvd_statistics {
  uint32_t struct_bytes;
  uint32_t reserved;
  int64_t operations_done; /* handles that ended well */
  int64_t operations_failed;
  int64_t bytes_reduced;    /* payload of allreduce operations that ended well */
  int64_t collective_calls; /* after fusion */
  int64_t control_messages_sent;
  int64_t control_bytes_sent;
  int64_t data_bytes_sent;
  int64_t cache_hits;                 /* requests that went out as a cache bit */
  int64_t background_cpu_nanoseconds; /* processor time of the background thread */
  int64_t background_wakeups;
  int64_t bytes_reordered; /* of tensors that were copied into C order, as ranks lay them out differently in memory */
  int64_t standing_calls;  /* of collective_calls: begun without negotiation */
  int64_t standing_calls_withdrawn;  /* of these: negotiated after all, as not all ranks began them */
  int64_t nccl_registered_bytes;     /* of device memory that is registered with NCCL now, for fused calls */
  int64_t nccl_registrations_failed; /* process sets whose fused calls go without, as this rank could not register */
  int64_t data_bytes_pulled;         /* read from the memory of ranks on this host, instead of from what they sent */
} hvd_statistics;

HVD_API int hvd_get_statistics(hvd_statistics* statistics);

/* Records what happens to operations in a file that chrome://tracing and Perfetto load (docs/timeline.md), from now on.
 * Each rank calls it for itself. "{rank}" in `path` stands for the rank's number; without it rank 0 alone records, and
 * on other ranks the call does nothing. While another file is being written that one is ended first; the same file goes
 * on. `mark_cycles`: 1 marks when new operations are taken up. Opens the file, so it may block as a file system does.
 * HVD_PRECONDITION before hvd_init. HVD_INVALID_ARGUMENT, with path and reason, if the file cannot be written. If that
 * shows later, the recording ends with a line in the log and nothing else is touched. */
HVD_API int hvd_timeline_start(const char* path, int32_t mark_cycles);
/* Ends the file; blocks until everything is in it. Does nothing where nothing is recorded. hvd_shutdown does it, too.
 * HVD_PRECONDITION before hvd_init. */
HVD_API int hvd_timeline_stop(void);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* HOROVOD_CPP_C_API_H_ */
