// The GIL in threads that come back from the engine, also when the interpreter ends meanwhile.
#pragma once

#include <pybind11/pybind11.h>

namespace hvd::bindings {

/// The interpreter begins to end, in the calling thread, which goes on as before. The GIL is held.
void interpreter_ends();

/// In place of PyEval_RestoreThread after a wait. Once the interpreter ends it does not return in other threads: they
/// are daemon threads, and to run Python in them now, theirs or another library's, could abort the process. They stay
/// here until the process is gone, as all of them do from Python 3.14 on.
void take_gil(PyThreadState* thread);

/// Takes the GIL and drops a reference. Once the interpreter ends the object goes with it: nothing is done then, but in
/// the thread that ends it.
void drop_reference(PyObject* object);

}  // namespace hvd::bindings
