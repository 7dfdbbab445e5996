#include "horovod_cpp/bindings/gil.h"

#include <cxxabi.h>
#include <unistd.h>

#include <atomic>
#include <thread>

namespace hvd::bindings {
namespace {

// Of the whole process, as the interpreter is. An empty id while it runs.
std::atomic<std::thread::id> ending_thread;

bool ends_elsewhere() {
  const std::thread::id ending = ending_thread.load();
  return ending != std::thread::id() && ending != std::this_thread::get_id();
}

[[noreturn]] void stay() {
  for (;;) ::pause();
}

}  // namespace

void interpreter_ends() { ending_thread.store(std::this_thread::get_id()); }

void take_gil(PyThreadState* thread) {
  if (ends_elsewhere()) stay();
  try {
    PyEval_RestoreThread(thread);
  } catch (const abi::__forced_unwind&) {  // it ended after the look above; C++ frames do not survive the unwinding
    stay();
  }
  // The end was said by a thread that held the GIL: now the answer cannot change before Python runs again.
  if (ends_elsewhere()) {
    PyEval_SaveThread();
    stay();
  }
}

void drop_reference(PyObject* object) {
  if (Py_IsInitialized() == 0 || ends_elsewhere()) return;
  try {
    const PyGILState_STATE state = PyGILState_Ensure();
    if (!ends_elsewhere()) Py_DECREF(object);  // as above: exact while the GIL is held
    PyGILState_Release(state);
  } catch (const abi::__forced_unwind&) {
    stay();
  }
}

}  // namespace hvd::bindings
