// Tensors as DLPack describes them: what the engine made as a capsule, which torch, numpy and others adopt without a
// copy, and where a tensor of Python lies, read without a call into Python.
// With the GIL held; the deleter of a capsule runs on any thread, with or without the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>

#include <horovod_cpp/c_api.h>

namespace hvd::bindings {

struct DlTensor;

/// A capsule named "dltensor" over `output`, which keeps `handle` alive.
pybind11::capsule dlpack_capsule(std::shared_ptr<hvd_handle> handle, const hvd_output& output, int dtype);

/// A tensor in host memory, dense, last dimension fastest. Valid as long as the tensor is and keeps its shape.
struct PlainTensor {
  void* data;
  const std::int64_t* shape;
  std::int32_t dimensions;
  int dtype;  ///< hvd_dtype
};

/// Reads tensors of exactly the types that it was told of, through DLPack's table for exchange in C
/// (https://dmlc.github.io/dlpack/latest/python_spec.html).
class PlainTensorReader {
 public:
  /// Tensors of `type` can be read from now on, if it has the table, in a version that is known here.
  void add_type(const pybind11::type& type);

  /// Nothing for a tensor of another type, on a device, not dense in this order, or of a dtype that hvd lacks. It does
  /// not see the bit by which torch negates when it reads.
  std::optional<PlainTensor> read(pybind11::handle tensor) const;

 private:
  static constexpr std::size_t kMost = 4;
  struct Known {
    PyTypeObject* type = nullptr;
    int (*tensor_of)(void* object, DlTensor* tensor) = nullptr;
  };
  std::array<Known, kMost> known_;
  std::size_t count_ = 0;
};

/// Of the process; the GIL guards it. Never destroyed: threads may call as long as there is an interpreter.
PlainTensorReader& plain_tensor_reader();

}  // namespace hvd::bindings
