// What a call is doing, told to whoever keeps a record of it: the interface that the data plane declares and the engine
// implements. Runs under the Turn.
#pragma once

#include <cstdint>
#include <string_view>

namespace hvd {

enum class ActivityKind : std::uint8_t {
  kPack,         ///< copies the tensors of the call into one buffer
  kCommunicate,  ///< the algorithm runs
  kUnpack,       ///< copies the result out of the buffer
};

class ActivityListener {
 public:
  virtual ~ActivityListener() = default;
  /// `algorithm` lives as long as the program; empty unless the kind is kCommunicate.
  virtual void on_activity_begin(ActivityKind kind, std::string_view algorithm) = 0;
  virtual void on_activity_end() = 0;
};

/// An activity for as long as this object lives. Costs a comparison where nobody listens.
class Activity {
 public:
  Activity(ActivityListener* listener, ActivityKind kind, std::string_view algorithm = {}) : listener_(listener) {
    if (listener_ != nullptr) listener_->on_activity_begin(kind, algorithm);
  }
  ~Activity() {
    if (listener_ != nullptr) listener_->on_activity_end();
  }
  Activity(const Activity&) = delete;
  Activity& operator=(const Activity&) = delete;

 private:
  ActivityListener* listener_;
};

}  // namespace hvd
