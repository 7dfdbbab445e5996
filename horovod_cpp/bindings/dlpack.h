// Engine memory as a DLPack capsule, which torch, numpy and others adopt without a copy.
// Made with the GIL held; the deleter runs on any thread, with or without the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include <horovod_cpp/c_api.h>

namespace hvd::bindings {

/// A capsule named "dltensor" over `output`, which keeps `handle` alive.
pybind11::capsule dlpack_capsule(std::shared_ptr<hvd_handle> handle, const hvd_output& output, int dtype);

}  // namespace hvd::bindings
