// Where an MPI library and our module for it are looked for, and how they are opened.
// Called by the thread that runs init.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include <horovod_cpp/status.h>

#include "ops/transport/mpi/mpi_api.h"

namespace hvd {

/// The places, in the order in which they are tried.
struct MpiSearch {
  std::vector<std::string> sonames;       ///< one that the process has already loaded wins
  std::string chosen_by_user;             ///< HOROVOD_MPI_LIBRARY; if set, the only one besides
  std::vector<std::string> folders;       ///< with any of the sonames in them
  bool system = true;                     ///< then the bare sonames, where the dynamic loader looks
  std::vector<std::string> module_files;  ///< the first that exists is opened
};

/// What the environment and the place of this library say.
MpiSearch default_mpi_search();

/// Opens libmpi, then the module; both stay for ever. kUnavailable says in one line what is missing, where it was
/// looked for, how to get it and what works without it.
Result<const MpiApi*> load_mpi(const MpiSearch& search);

/// An MPI library in this process, ours or the program's, is initialised and not finalised.
bool mpi_in_use();

}  // namespace hvd
