// What MPI says about an error code. Called by the thread that calls MPI.
#pragma once

#include <string>

#include "ops/transport/mpi/mpi_api.h"

namespace hvd {

inline std::string mpi_error_text(const MpiApi& api, int error) {
  char text[512] = "";
  api.error_text(error, text, sizeof text);
  return text;
}

}  // namespace hvd
