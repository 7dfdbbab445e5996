// The few structs of the DLPack ABI that this package uses: of version 0.8 for "dltensor" capsules, and the table for
// exchange in C of version 1.3. Layout and numbers are fixed by https://dmlc.github.io/dlpack/latest/c_api.html.
#pragma once

#include <cstdint>

namespace hvd::bindings {

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

/// What a tensor type offers as `__dlpack_c_exchange_api__`. Members that nobody calls here have no type.
struct DlExchangeTable {
  struct Header {
    std::uint32_t major;
    std::uint32_t minor;
    Header* older;  // of a former major version
  };
  Header header;
  void* new_tensor;
  void* managed_tensor_of;
  void* object_of;
  // Lends what `tensor` gets: 0, or -1 and a Python error. May be null.
  int (*tensor_of)(void* object, DlTensor* tensor);
  void* current_stream;
};
constexpr std::uint32_t kDlMajor = 1;
constexpr char kDlTableName[] = "dlpack_exchange_api";

constexpr std::int32_t kDlCpu = 1;
constexpr std::int32_t kDlCuda = 2;

enum DlTypeCode : std::uint8_t { kDlInt = 0, kDlUint = 1, kDlFloat = 2, kDlBfloat = 4, kDlComplex = 5, kDlBool = 6 };

}  // namespace hvd::bindings
