// What a launch of DeviceRuntime::convert does, on the host, with the functions of the CPU path.
// Pure functions of their arguments; any thread.
#pragma once

#include <string>
#include <vector>

#include "ops/device/device_runtime.h"
#include "tests/support/access_checker.h"

namespace hvd::testing {

bool is_supported(const DeviceConversion& conversion);
void convert_piece(const DeviceConversion& conversion, const DevicePiece& piece);
/// All pieces of a launch run at once: what one writes, no other may touch. Says what overlaps; empty if nothing does.
std::string find_overlap(const std::vector<ByteRange>& reads, std::vector<ByteRange> writes);

}  // namespace hvd::testing
