// What this build has and what it finds on this machine, from the C ABI.
// The GIL is let go while a library is opened.
#include <cstdint>

#include "horovod_cpp/bindings/bind.h"

namespace py = pybind11;

namespace hvd::bindings {
namespace {

template <typename Value, typename Question>
Value ask(Question question) {
  refuse_after_fork();
  Value answer{};
  const py::gil_scoped_release without_gil;
  check(question(&answer));
  return answer;
}

}  // namespace

void bind_builds(py::module_& module) {
  module.def("mpi_built", [] { return hvd_mpi_built() == 1; });
  module.def(
      "mpi_text", [] { return ask<const char*>(hvd_mpi_text); },
      "What the MPI of this machine says of itself. May block for a second, as the following; see c_api.h.");
  module.def("cuda_built", [] { return hvd_cuda_built() == 1; });
  module.def(
      "cuda_devices", [] { return ask<std::int32_t>(hvd_cuda_devices); },
      "Number of CUDA devices that this process sees; an Error with the reason where there is none.");
  module.def(
      "cuda_device_of",
      [](std::uintptr_t data) {
        return ask<std::int32_t>(
            [data](std::int32_t* device) { return hvd_cuda_device_of(reinterpret_cast<const void*>(data), device); });
      },
      "The number of the CUDA device whose memory lies at an address.");
  module.def(
      "cuda_text", [] { return ask<const char*>(hvd_cuda_text); },
      "The versions of the CUDA module and of the driver.");
  module.def(
      "nccl_version", [] { return ask<std::int32_t>(hvd_nccl_version); },
      "22809 is 2.28.9; an Error with where it was looked for where there is none.");
  module.def(
      "nccl_text", [] { return ask<const char*>(hvd_nccl_text); },
      "Version, file, and which of the calls it has that not every NCCL has.");
}

}  // namespace hvd::bindings
