// See dlpack.h.
#include "horovod_cpp/bindings/dlpack.h"

#include <memory>
#include <stdexcept>
#include <utility>

#include "horovod_cpp/bindings/bind.h"
#include "horovod_cpp/bindings/dlpack_abi.h"

namespace py = pybind11;

namespace hvd::bindings {
namespace {

constexpr char kCapsuleName[] = "dltensor";  // a consumer renames it to "used_dltensor" and calls the deleter itself

struct KnownType {
  int dtype;
  DlDataType type;
};
constexpr KnownType kKnownTypes[] = {
    {HVD_UINT8, {kDlUint, 8, 1}},          {HVD_INT8, {kDlInt, 8, 1}},           {HVD_INT16, {kDlInt, 16, 1}},
    {HVD_INT32, {kDlInt, 32, 1}},          {HVD_INT64, {kDlInt, 64, 1}},         {HVD_FLOAT16, {kDlFloat, 16, 1}},
    {HVD_FLOAT32, {kDlFloat, 32, 1}},      {HVD_FLOAT64, {kDlFloat, 64, 1}},     {HVD_BOOL, {kDlBool, 8, 1}},
    {HVD_BFLOAT16, {kDlBfloat, 16, 1}},    {HVD_COMPLEX32, {kDlComplex, 32, 1}}, {HVD_COMPLEX64, {kDlComplex, 64, 1}},
    {HVD_COMPLEX128, {kDlComplex, 128, 1}}};

DlDataType dl_data_type(int dtype) {
  for (const KnownType& known : kKnownTypes) {
    if (known.dtype == dtype) return known.type;
  }
  throw std::logic_error("data type " + std::to_string(dtype) + " has no DLPack type");
}

void delete_managed(DlManagedTensor* managed) {
  delete static_cast<std::shared_ptr<hvd_handle>*>(managed->context);
  delete managed;
}

void delete_unconsumed(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, kCapsuleName) == 0) return;
  delete_managed(static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule, kCapsuleName)));
}

// Dense, last dimension fastest. Where a dimension has one element its stride says nothing.
bool is_dense(const DlTensor& tensor) {
  if (tensor.strides == nullptr) return true;
  std::int64_t dense = 1;
  for (std::int32_t i = tensor.dimensions - 1; i >= 0; --i) {
    if (tensor.shape[i] == 0) return true;
    if (tensor.shape[i] != 1 && tensor.strides[i] != dense) return false;
    dense *= tensor.shape[i];
  }
  return true;
}

std::optional<int> hvd_dtype_of(const DlDataType& type) {
  for (const KnownType& known : kKnownTypes) {
    if (known.type.code == type.code && known.type.bits == type.bits && type.lanes == 1) return known.dtype;
  }
  return std::nullopt;
}

}  // namespace

void PlainTensorReader::add_type(const py::type& type) {
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (count_ == kMost || PyCapsule_IsValid(capsule.ptr(), kDlTableName) == 0) return;
  const auto* table = static_cast<DlExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), kDlTableName));
  if (table->header.major != kDlMajor || table->tensor_of == nullptr) return;
  known_[count_++] = {reinterpret_cast<PyTypeObject*>(type.ptr()), table->tensor_of};
}

std::optional<PlainTensor> PlainTensorReader::read(py::handle tensor) const {
  for (std::size_t i = 0; i < count_; ++i) {
    if (Py_TYPE(tensor.ptr()) != known_[i].type) continue;
    DlTensor lent{};
    if (known_[i].tensor_of(tensor.ptr(), &lent) != 0) {
      PyErr_Clear();  // it cannot be described so; who asks has another way
      return std::nullopt;
    }
    const std::optional<int> dtype = hvd_dtype_of(lent.dtype);
    if (lent.dtype.code == kDlComplex) return std::nullopt;  // it may be meant conjugated, which DLPack does not tell
    if (lent.device.type != kDlCpu || !dtype || !is_dense(lent)) return std::nullopt;
    return PlainTensor{static_cast<std::byte*>(lent.data) + lent.byte_offset, lent.shape, lent.dimensions, *dtype};
  }
  return std::nullopt;
}

PlainTensorReader& plain_tensor_reader() {
  static auto* const instance = new PlainTensorReader;
  return *instance;
}

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
