// The few structs of the DLPack ABI (version 0.8, as in "dltensor" capsules) and the capsule's ends.
// See dlpack.h.
#include "horovod_cpp/bindings/dlpack.h"

#include <memory>
#include <stdexcept>
#include <utility>

#include "horovod_cpp/bindings/bind.h"

namespace py = pybind11;

namespace hvd::bindings {
namespace {

// Layout and numbers are fixed by https://dmlc.github.io/dlpack/latest/c_api.html.
struct DlDevice {
  std::int32_t type;
  std::int32_t id;
};
struct DlDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  std::int32_t dimensions;
  DlDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // null: dense, last dimension fastest
  std::uint64_t byte_offset;
};
struct DlManagedTensor {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor* self);
};

constexpr std::int32_t kDlCpu = 1;
constexpr std::int32_t kDlCuda = 2;
constexpr char kCapsuleName[] = "dltensor";  // a consumer renames it to "used_dltensor" and calls the deleter itself

enum DlTypeCode : std::uint8_t { kDlInt = 0, kDlUint = 1, kDlFloat = 2, kDlBfloat = 4, kDlBool = 6 };

DlDataType dl_data_type(int dtype) {
  switch (dtype) {
    case HVD_UINT8:
      return {kDlUint, 8, 1};
    case HVD_INT8:
      return {kDlInt, 8, 1};
    case HVD_INT16:
      return {kDlInt, 16, 1};
    case HVD_INT32:
      return {kDlInt, 32, 1};
    case HVD_INT64:
      return {kDlInt, 64, 1};
    case HVD_FLOAT16:
      return {kDlFloat, 16, 1};
    case HVD_FLOAT32:
      return {kDlFloat, 32, 1};
    case HVD_FLOAT64:
      return {kDlFloat, 64, 1};
    case HVD_BOOL:
      return {kDlBool, 8, 1};
    case HVD_BFLOAT16:
      return {kDlBfloat, 16, 1};
    default:
      throw std::logic_error("data type " + std::to_string(dtype) + " has no DLPack type");
  }
}

void delete_managed(DlManagedTensor* managed) {
  delete static_cast<std::shared_ptr<hvd_handle>*>(managed->context);
  delete managed;
}

void delete_unconsumed(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, kCapsuleName) == 0) return;
  delete_managed(static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule, kCapsuleName)));
}

}  // namespace

py::capsule dlpack_capsule(std::shared_ptr<hvd_handle> handle, const hvd_output& output, int dtype) {
  auto owner = std::make_unique<std::shared_ptr<hvd_handle>>(std::move(handle));
  // The shape is only read, and lives as long as the handle.
  auto managed = std::make_unique<DlManagedTensor>(
      DlManagedTensor{{output.data,
                       {output.memory_kind == HVD_CUDA ? kDlCuda : kDlCpu, output.device},
                       output.dimensions,
                       dl_data_type(dtype),
                       const_cast<std::int64_t*>(output.shape),
                       /*strides=*/nullptr,
                       /*byte_offset=*/0},
                      /*context=*/owner.get(),
                      delete_managed});
  auto capsule = py::reinterpret_steal<py::capsule>(PyCapsule_New(managed.get(), kCapsuleName, delete_unconsumed));
  if (!capsule) throw py::error_already_set();
  static_cast<void>(owner.release());
  static_cast<void>(managed.release());
  return capsule;
}

}  // namespace hvd::bindings
