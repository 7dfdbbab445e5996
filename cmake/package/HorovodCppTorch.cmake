# HorovodCpp::torch: compiled in the build that uses it, against its LibTorch; links it and HorovodCpp::core.
# Expects hvd_torch_sources, the folder with our files.
#
# LibTorch is, in this order: that of an earlier find_package(Torch); that of Torch_DIR or CMAKE_PREFIX_PATH; that of the
# Python package of Python_EXECUTABLE or of the Python on PATH. A CUDA build is imported by its libraries: torch's own
# package would ask for a CUDA toolkit, which nothing here needs.

# Sets hvd_torch_root: the folder that has include/ and lib/.
macro(hvd_find_torch_root)
  find_path(hvd_torch_config TorchConfig.cmake NO_CACHE NO_DEFAULT_PATH
    PATHS ${Torch_DIR} ${CMAKE_PREFIX_PATH} ENV CMAKE_PREFIX_PATH PATH_SUFFIXES share/cmake/Torch Torch)
  if(hvd_torch_config)
    get_filename_component(hvd_torch_root "${hvd_torch_config}/../../.." ABSOLUTE)
  else()
    find_package(Python QUIET COMPONENTS Interpreter)
    set(hvd_python ${Python_EXECUTABLE})
    if(hvd_python)
      execute_process(COMMAND ${hvd_python} -c "import importlib.util as u, os
spec = u.find_spec('torch')
print(os.path.dirname(spec.origin) if spec and spec.origin else '', end='')"
        OUTPUT_VARIABLE hvd_torch_root ERROR_QUIET)
    endif()
  endif()
endmacro()

# Sets hvd_torch_problem where this LibTorch will not do.
macro(hvd_check_torch_version)
  set(hvd_torch_problem "")
  set(hvd_torch_version "")
  foreach(file torch/headeronly/version.h torch/csrc/api/include/torch/version.h)
    if(EXISTS "${hvd_torch_root}/include/${file}" AND NOT hvd_torch_version)
      file(STRINGS "${hvd_torch_root}/include/${file}" hvd_lines REGEX "define TORCH_VERSION_(MAJOR|MINOR) [0-9]+")
      string(REGEX REPLACE "[^0-9;]" "" hvd_numbers "${hvd_lines}")
      string(REPLACE ";" "." hvd_torch_version "${hvd_numbers}")
    endif()
  endforeach()
  # The library's own functions say which std::string it was built with.
  file(STRINGS "${hvd_torch_root}/lib/libc10.so" hvd_new_strings REGEX "__cxx11" LIMIT_COUNT 1)
  if(NOT hvd_torch_version)
    set(hvd_torch_problem "${hvd_torch_root} has no version of LibTorch that is known")
  elseif(hvd_torch_version VERSION_LESS 2.1)
    set(hvd_torch_problem "LibTorch ${hvd_torch_version} in ${hvd_torch_root} is too old: gradient hooks need 2.1 or later")
  elseif(NOT hvd_new_strings)
    string(CONCAT hvd_torch_problem "LibTorch ${hvd_torch_version} in ${hvd_torch_root} was built with the old std::string "
      "(_GLIBCXX_USE_CXX11_ABI=0), which C++20 programs do not link with: take the package of torch 2.7 or later, or a "
      "LibTorch archive with the 'cxx11 ABI'")
  endif()
endmacro()

# Adds the target hvd_libtorch.
macro(hvd_import_torch)
  add_library(hvd_libtorch INTERFACE)
  foreach(name c10 torch_cpu)
    add_library(hvd_lib${name} SHARED IMPORTED GLOBAL)
    set_target_properties(hvd_lib${name} PROPERTIES
      IMPORTED_LOCATION "${hvd_torch_root}/lib/lib${name}.so"
      INTERFACE_INCLUDE_DIRECTORIES "${hvd_torch_root}/include;${hvd_torch_root}/include/torch/csrc/api/include")
    target_link_libraries(hvd_libtorch INTERFACE hvd_lib${name})
  endforeach()
  # The libraries of CUDA that these need are found when the program starts.
  target_link_options(hvd_libtorch INTERFACE "LINKER:--allow-shlib-undefined")
  if(EXISTS "${hvd_torch_root}/lib/libtorch_cuda.so")
    # It registers itself when it is opened, so it has to be, though no function of it is called.
    target_link_options(hvd_libtorch INTERFACE "LINKER:--push-state,--no-as-needed"
      "${hvd_torch_root}/lib/libtorch_cuda.so" "${hvd_torch_root}/lib/libc10_cuda.so" "LINKER:--pop-state")
    set_property(TARGET hvd_libtorch APPEND PROPERTY INTERFACE_LINK_OPTIONS "LINKER:-rpath,${hvd_torch_root}/lib")
  endif()
endmacro()

macro(hvd_add_torch)
  hvd_find_torch_root()  # an earlier find_package(Torch) has left Torch_DIR
  if(NOT hvd_torch_root OR NOT EXISTS "${hvd_torch_root}/lib/libtorch_cpu.so")
    string(CONCAT hvd_torch_problem "there is no LibTorch: name one with -DTorch_DIR=<folder of TorchConfig.cmake>, or a "
      "Python that has torch with -DPython_EXECUTABLE=")
  else()
    hvd_check_torch_version()
  endif()
  if(NOT hvd_torch_problem)
    if(TARGET torch)
      add_library(hvd_libtorch INTERFACE)
      target_link_libraries(hvd_libtorch INTERFACE ${TORCH_LIBRARIES})
    else()
      hvd_import_torch()
    endif()
    add_library(hvd_torch STATIC EXCLUDE_FROM_ALL
      ${hvd_torch_sources}/torch/attributes.cc
      ${hvd_torch_sources}/torch/bucket_reduction.cc
      ${hvd_torch_sources}/torch/buckets.cc
      ${hvd_torch_sources}/torch/changes.cc
      ${hvd_torch_sources}/torch/collectives.cc
      ${hvd_torch_sources}/torch/differentiable.cc
      ${hvd_torch_sources}/torch/distributed_options.cc
      ${hvd_torch_sources}/torch/freezing.cc
      ${hvd_torch_sources}/torch/grouped.cc
      ${hvd_torch_sources}/torch/normalize.cc
      ${hvd_torch_sources}/torch/optimizer_state.cc
      ${hvd_torch_sources}/torch/reduction.cc
      ${hvd_torch_sources}/torch/sparse.cc
      ${hvd_torch_sources}/torch/streams.cc
      ${hvd_torch_sources}/torch/sync_batch_norm.cc
      ${hvd_torch_sources}/torch/tensors.cc)
    add_library(HorovodCpp::torch ALIAS hvd_torch)
    target_compile_features(hvd_torch PUBLIC cxx_std_20)
    # Quote-only: <torch/...> means LibTorch's.
    target_compile_options(hvd_torch PRIVATE "SHELL:-iquote \"${hvd_torch_sources}\"")
    set_target_properties(hvd_torch PROPERTIES POSITION_INDEPENDENT_CODE ON)
    target_link_libraries(hvd_torch PUBLIC HorovodCpp::core hvd_libtorch)
  endif()
endmacro()
