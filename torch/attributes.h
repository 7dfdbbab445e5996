// What ranks have to bring alike where the library cannot compare it: it travels with the data, as bytes.
// Ranks in Python read and write the same bytes (horovod_cpp/common/attributes.py); the texts are those of the
// library's own mismatches. Pure; any thread.
#pragma once

#include <source_location>
#include <span>
#include <string>
#include <string_view>

namespace hvd::torch::detail {

/// The values of the attributes and the place of the call, one line. All ranks give the attributes in one order.
std::string encode_attributes(std::span<const std::string> values, const std::source_location& site);

/// What differs in the lines of all `ranks` (ascending), one behind the other: "mismatched op: Sum: rank 0 (a.cc:7);
/// Average: ranks 1-2 (b.py:8)"; or nothing. Also says so where the bytes are no such lines.
std::string disagreements(std::span<const std::string_view> names, std::string_view gathered,
                          std::span<const int> ranks);

}  // namespace hvd::torch::detail
