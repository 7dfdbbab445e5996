// Process sets of the C ABI.
// The GIL is let go while adding and removing wait for the other ranks.
#include <pybind11/stl.h>

#include "horovod_cpp/bindings/bind.h"

namespace py = pybind11;

namespace hvd::bindings {
namespace {

using Numbers = std::vector<std::int32_t>;

std::int32_t add(const Numbers& ranks) {
  refuse_after_fork();
  const hvd_rank_list list = rank_list(ranks);
  std::int32_t id = 0;
  const py::gil_scoped_release without_gil;
  check(hvd_process_set_add(&list, &id));
  return id;
}

void remove(std::int32_t id) {
  refuse_after_fork();
  const py::gil_scoped_release without_gil;
  check(hvd_process_set_remove(id));
}

// Calls `list(data, capacity, &count)` until all numbers fit: their count may grow between two calls.
template <typename List>
Numbers read_all(List list) {
  refuse_after_fork();
  Numbers numbers(16);
  for (;;) {
    std::int32_t count = 0;
    check(list(numbers.data(), static_cast<std::int32_t>(numbers.size()), &count));
    const bool fits = static_cast<std::size_t>(count) <= numbers.size();
    numbers.resize(static_cast<std::size_t>(count));
    if (fits) return numbers;
  }
}

Numbers ids() { return read_all(hvd_process_set_ids); }

Numbers ranks(std::int32_t id) {
  return read_all([id](std::int32_t* data, std::int32_t capacity, std::int32_t* count) {
    return hvd_process_set_ranks(id, data, capacity, count);
  });
}

}  // namespace

void bind_process_sets(py::module_& module) {
  module.def("process_set_add", add, py::arg("ranks"), "Collective over all ranks; returns the id. Blocks.");
  module.def("process_set_remove", remove, py::arg("id"), "Collective over all ranks. Blocks.");
  module.def("process_set_ids", ids, "The ids of all sets in ascending order, 0 included.");
  module.def("process_set_ranks", ranks, py::arg("id"), "The global ranks of a set in ascending order.");
}

}  // namespace hvd::bindings
