// Process sets of the C ABI.
// Adding and removing wait for the other ranks as operations do: without the GIL, and Ctrl-C ends the wait.
#include <pybind11/stl.h>

#include "horovod_cpp/bindings/bind.h"
#include "horovod_cpp/bindings/handle.h"

namespace py = pybind11;

namespace hvd::bindings {
namespace {

using Numbers = std::vector<std::int32_t>;

std::int32_t add(const Numbers& ranks) {
  refuse_after_fork();
  const hvd_rank_list list = rank_list(ranks);
  hvd_handle* started = nullptr;
  check(hvd_process_set_add_async(&list, &started));
  Handle handle(started, {});
  handle.wait();
  return handle.process_set();
}

void remove(std::int32_t id) {
  refuse_after_fork();
  hvd_handle* started = nullptr;
  check(hvd_process_set_remove_async(id, &started));
  Handle(started, {}).wait();
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
