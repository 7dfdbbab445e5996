// Operations of the C ABI: memory goes in as addresses, a Handle comes out.
// The GIL stays held in enqueue, which does not block: a switch of threads there would delay a backward pass.
#include <pybind11/stl.h>

#include <optional>

#include "horovod_cpp/bindings/bind.h"
#include "horovod_cpp/bindings/gil.h"
#include "horovod_cpp/bindings/handle.h"

namespace py = pybind11;

namespace hvd::bindings {
namespace {

// Gets the reference that enqueue took. Runs inside a function of the C ABI, where the GIL may be let go.
void release_reference(void* object) { drop_reference(static_cast<PyObject*>(object)); }

const char* text_or_null(const std::optional<std::string>& text) { return text ? text->c_str() : nullptr; }

Handle enqueue(int op, int dtype, const std::vector<std::int64_t>& shape, std::uintptr_t input, std::uintptr_t output,
               const std::optional<std::string>& name, int process_set, int reduce_op, int root_rank, double prescale,
               double postscale, const std::optional<std::string>& call_site_file, int call_site_line,
               bool caller_waits, py::object keep_alive) {
  refuse_after_fork();
  if (name && name->find('\0') != std::string::npos) throw py::value_error("a name may not contain a zero byte");
  hvd_operation operation;
  HVD_INIT_STRUCT(&operation);
  operation.op = op;
  operation.process_set = process_set;
  operation.reduce_op = reduce_op;
  operation.root_rank = root_rank;
  operation.call_site_line = call_site_line;
  operation.call_site_file = text_or_null(call_site_file);
  operation.name = text_or_null(name);
  operation.prescale = prescale;
  operation.postscale = postscale;
  operation.input = {reinterpret_cast<void*>(input),
                     shape.data(),
                     static_cast<std::int32_t>(shape.size()),
                     dtype,
                     HVD_HOST,
                     /*device=*/0};
  operation.output = operation.input;
  operation.output.data = reinterpret_cast<void*>(output);
  operation.keep_alive = keep_alive.ptr();
  operation.release = release_reference;
  operation.caller_waits = caller_waits ? 1 : 0;
  hvd_handle* handle = nullptr;
  check(hvd_enqueue(&operation, &handle));
  static_cast<void>(keep_alive.release());  // release_reference has it now
  return {handle, dtype};
}

void bind_numbers(py::module_& module) {
  module.attr("ALLREDUCE") = static_cast<int>(HVD_ALLREDUCE);
  module.attr("ALLGATHER") = static_cast<int>(HVD_ALLGATHER);
  module.attr("BROADCAST") = static_cast<int>(HVD_BROADCAST);
  module.attr("BARRIER") = static_cast<int>(HVD_BARRIER);
  module.attr("UINT8") = static_cast<int>(HVD_UINT8);
  module.attr("INT8") = static_cast<int>(HVD_INT8);
  module.attr("INT16") = static_cast<int>(HVD_INT16);
  module.attr("INT32") = static_cast<int>(HVD_INT32);
  module.attr("INT64") = static_cast<int>(HVD_INT64);
  module.attr("FLOAT16") = static_cast<int>(HVD_FLOAT16);
  module.attr("FLOAT32") = static_cast<int>(HVD_FLOAT32);
  module.attr("FLOAT64") = static_cast<int>(HVD_FLOAT64);
  module.attr("BOOL") = static_cast<int>(HVD_BOOL);
  module.attr("BFLOAT16") = static_cast<int>(HVD_BFLOAT16);
  module.attr("AVERAGE") = static_cast<int>(HVD_AVERAGE);
  module.attr("SUM") = static_cast<int>(HVD_SUM);
  module.attr("ADASUM") = static_cast<int>(HVD_ADASUM);
  module.attr("MIN") = static_cast<int>(HVD_MIN);
  module.attr("MAX") = static_cast<int>(HVD_MAX);
  module.attr("PRODUCT") = static_cast<int>(HVD_PRODUCT);
}

}  // namespace

void bind_operations(py::module_& module) {
  bind_numbers(module);
  py::class_<Handle>(module, "Handle")
      .def("wait", &Handle::wait, "Block until done; raise on error. Ctrl-C ends the wait, not the operation.")
      .def("poll", &Handle::poll, "True when done, be it well or with an error.")
      .def("to_dlpack", &Handle::to_dlpack, "The output of an allgather that is done, once; takes the handle along.");
  module.def("wait_all", wait_all, "Block until all handles are done, be it well or with an error.");
  module.def("enqueue", enqueue, "Hand a tensor over; see hvd_operation in c_api.h. Does not block.");
}

}  // namespace hvd::bindings
