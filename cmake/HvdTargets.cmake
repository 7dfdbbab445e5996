# How the targets of this project are made: one static library per layer, modules opened at run time, and tests.

# For C++ alone: nvcc takes none of these as they are, and compiles what the CUDA module says itself.
add_library(hvd_build_flags INTERFACE)
function(hvd_cxx_flags)
  target_compile_options(hvd_build_flags INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${ARGN}>")
endfunction()
hvd_cxx_flags(
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion -Wnon-virtual-dtor -fvisibility=hidden
  # A binary says nothing of where it was built.
  -fmacro-prefix-map=${PROJECT_SOURCE_DIR}/=
  # Quote-only, so that <torch/...> can only mean PyTorch.
  -iquote ${PROJECT_SOURCE_DIR})
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # g++ 12 warns of overlaps in std::string's operator+ that are not there (GCC bug 105651, mended in 13).
  hvd_cxx_flags(-Wno-restrict)
endif()
if(HVD_WERROR)
  hvd_cxx_flags(-Werror)
endif()
if(HVD_SANITIZE)
  hvd_cxx_flags(-fsanitize=${HVD_SANITIZE} -fno-omit-frame-pointer)
  target_link_options(hvd_build_flags INTERFACE -fsanitize=${HVD_SANITIZE})
  # Half of the time goes into headers that all files have. Nobody works in these builds, and clang-tidy reads another.
  set(CMAKE_UNITY_BUILD ON)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    hvd_cxx_flags(-Wno-subobject-linkage)  # which takes what a file that is included has for itself for a header's
  endif()
  if(HVD_SANITIZE STREQUAL "address")
    # Without the checks that find what address sanitizer finds when it happens: they double the time to compile.
    hvd_cxx_flags(-fsanitize=undefined -fno-sanitize-recover=undefined
                  -fno-sanitize=null,vptr,object-size,pointer-overflow,nonnull-attribute,returns-nonnull-attribute)
    target_link_options(hvd_build_flags INTERFACE -fsanitize=undefined)
  endif()
endif()

# hvd_add_library(NAME SOURCES a.cc b.cc DEPS hvd::other): a layer, linked into libhorovod_cpp.so and into tests.
function(hvd_add_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_library(hvd_${name} STATIC ${ARG_SOURCES})
  add_library(hvd::${name} ALIAS hvd_${name})
  target_link_libraries(hvd_${name} PRIVATE hvd_build_flags PUBLIC hvd::public_headers ${ARG_DEPS})
endfunction()

# hvd_add_module(NAME SOURCES ... DEPS ...): a shared object that the library opens with dlopen when it needs it.
function(hvd_add_module name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_library(${name} MODULE ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE hvd_build_flags ${ARG_DEPS})
endfunction()

# hvd_precompile(TARGET <header>...): what nearly all of its files include. Not for files that clang-tidy reads in this
# build: it cannot use what g++ precompiles.
function(hvd_precompile name)
  target_precompile_headers(${name} PRIVATE ${ARGN})
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(${name} PRIVATE -fpch-preprocess)  # ccache keeps nothing without it
  endif()
endfunction()

# Labels of the tests that a build makes. Thread sanitizer finds nothing where all runs in one thread.
set(hvd_test_labels ".*")
if(HVD_SANITIZE STREQUAL "thread")
  set(hvd_test_labels "threads")
elseif(HVD_SANITIZE)
  set(hvd_test_labels "threads|memory|simulator")
endif()

# hvd_add_test(NAME SOURCES ... DEPS ... [TIMEOUT seconds] [LABELS ...]): one GoogleTest program, one ctest entry.
function(hvd_add_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;DEPS;LABELS" ${ARGN})
  if(NOT "${ARG_LABELS}" MATCHES "${hvd_test_labels}")
    return()
  endif()
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE hvd_build_flags ${ARG_DEPS} GTest::gtest GTest::gtest_main)
  add_test(NAME ${name} COMMAND ${name})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  # What may take long begins first, so that none of it is left for the end.
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} COST ${ARG_TIMEOUT} LABELS "${ARG_LABELS}")
endfunction()
