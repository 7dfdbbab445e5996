# What makes the library usable from other projects, in three places that are laid out differently: a prefix
# (cmake --install, component cpp), the Python package (component python), and the source tree after a build there.
include(CMakePackageConfigHelpers)

set(hvd_package_templates ${CMAKE_CURRENT_LIST_DIR}/package)

# hvd_package_files(FOLDER LIBRARY dir INCLUDE dir TORCH dir PC_LIBRARY dir PC_INCLUDE dir [PC_RPATH text]): writes the
# files; LIBRARY, INCLUDE and TORCH (that has torch/*.cc) are as seen from where the config file will lie, PC_... from the
# pkg-config file.
function(hvd_package_files folder)
  cmake_parse_arguments(ARG "" "LIBRARY;INCLUDE;TORCH;PC_LIBRARY;PC_INCLUDE;PC_RPATH" "" ${ARGN})
  set(HVD_PACKAGE_LIBRARY ${ARG_LIBRARY})
  set(HVD_PACKAGE_INCLUDE ${ARG_INCLUDE})
  set(HVD_PACKAGE_TORCH ${ARG_TORCH})
  set(HVD_PC_LIBRARY ${ARG_PC_LIBRARY})
  set(HVD_PC_INCLUDE ${ARG_PC_INCLUDE})
  set(HVD_PC_RPATH ${ARG_PC_RPATH})
  configure_file(${hvd_package_templates}/HorovodCppConfig.cmake.in ${folder}/HorovodCppConfig.cmake @ONLY)
  configure_file(${hvd_package_templates}/HorovodCppTorch.cmake ${folder}/HorovodCppTorch.cmake COPYONLY)
  configure_file(${hvd_package_templates}/horovod_cpp.pc.in ${folder}/horovod_cpp.pc @ONLY)
  write_basic_package_version_file(${folder}/HorovodCppConfigVersion.cmake COMPATIBILITY SameMinorVersion)
endfunction()

set(hvd_libraries horovod_cpp)
foreach(module hvd_mpi hvd_cuda)  # opened from the folder of libhorovod_cpp.so
  if(TARGET ${module})
    list(APPEND hvd_libraries ${module})
  endif()
endforeach()

# A prefix.
set(hvd_prefix_files ${PROJECT_BINARY_DIR}/package/prefix)
set(hvd_config_folder ${CMAKE_INSTALL_LIBDIR}/cmake/HorovodCpp)
file(RELATIVE_PATH hvd_config_to_include /${hvd_config_folder} /${CMAKE_INSTALL_INCLUDEDIR})
file(RELATIVE_PATH hvd_pc_to_include /${CMAKE_INSTALL_LIBDIR}/pkgconfig /${CMAKE_INSTALL_INCLUDEDIR})
hvd_package_files(${hvd_prefix_files} LIBRARY ../.. INCLUDE ${hvd_config_to_include} TORCH .
  PC_LIBRARY .. PC_INCLUDE ${hvd_pc_to_include})
install(TARGETS ${hvd_libraries} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/horovod_cpp/include/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT cpp)
install(FILES ${hvd_prefix_files}/HorovodCppConfig.cmake ${hvd_prefix_files}/HorovodCppConfigVersion.cmake
  ${hvd_prefix_files}/HorovodCppTorch.cmake DESTINATION ${hvd_config_folder} COMPONENT cpp)
set(hvd_torch_files REGEX "CMakeLists" EXCLUDE)
install(DIRECTORY torch DESTINATION ${hvd_config_folder} COMPONENT cpp ${hvd_torch_files})
install(FILES ${hvd_prefix_files}/horovod_cpp.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT cpp)

# The Python package, which has the headers as they lie in the source folder. Nobody looks for libraries in there when a
# program starts, so what pkg-config says adds the place to the program.
set(hvd_python_layout LIBRARY .. INCLUDE ../include PC_LIBRARY .. PC_INCLUDE ../include
  PC_RPATH "-Wl,-rpath,\${libdir} ")
set(hvd_python_files ${PROJECT_BINARY_DIR}/package/python)
hvd_package_files(${hvd_python_files} TORCH . ${hvd_python_layout})
install(DIRECTORY ${hvd_python_files}/ DESTINATION horovod_cpp/cmake COMPONENT python EXCLUDE_FROM_ALL)
install(DIRECTORY torch DESTINATION horovod_cpp/cmake COMPONENT python EXCLUDE_FROM_ALL ${hvd_torch_files})
if(HVD_INPLACE)
  hvd_package_files(${PROJECT_SOURCE_DIR}/horovod_cpp/cmake TORCH ../.. ${hvd_python_layout})
endif()
