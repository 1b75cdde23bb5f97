# Sets OMNI_MOE_WITH_CUDA from OMNI_MOE_CUDA (AUTO, ON, OFF), says in one line what was chosen and
# why, and enables the CUDA language where it was.

# CUDACXX names a compiler, by path or as a command. CMake keeps the compiler of a build directory, so
# another one than that of the first time is an error instead of being ignored.
if(NOT OMNI_MOE_CUDA STREQUAL "OFF" AND NOT "$ENV{CUDACXX}" STREQUAL "")
  find_program(_cudacxx NAMES "$ENV{CUDACXX}" NO_CACHE)
  if(NOT _cudacxx)
    message(FATAL_ERROR "CUDACXX=$ENV{CUDACXX}: there is no such program")
  endif()
  if(OMNI_MOE_NVCC AND NOT OMNI_MOE_NVCC STREQUAL _cudacxx)
    message(FATAL_ERROR "CUDACXX=$ENV{CUDACXX}, but ${CMAKE_BINARY_DIR} was configured with "
                        "${OMNI_MOE_NVCC}: delete that directory to change the compiler")
  endif()
  set(OMNI_MOE_NVCC ${_cudacxx} CACHE FILEPATH "The CUDA compiler" FORCE)
endif()
find_program(OMNI_MOE_NVCC nvcc HINTS ENV CUDA_HOME /usr/local/cuda PATH_SUFFIXES bin)

# nvcc looks for its parts beside the path by which it was called, so a plain symbolic link to it does
# not work: follow it.
set(_nvcc ${OMNI_MOE_NVCC})
if(_nvcc)
  file(REAL_PATH ${_nvcc} _real_nvcc)
  cmake_path(GET _nvcc PARENT_PATH _nvcc_dir)
  cmake_path(GET _real_nvcc PARENT_PATH _real_nvcc_dir)
  if(EXISTS ${_real_nvcc_dir}/nvcc.profile AND NOT EXISTS ${_nvcc_dir}/nvcc.profile)
    set(_nvcc ${_real_nvcc})
  endif()
endif()

if(NOT OMNI_MOE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "OMNI_MOE_CUDA: expected AUTO, ON or OFF, but got '${OMNI_MOE_CUDA}'")
endif()

set(OMNI_MOE_WITH_CUDA OFF)
if(OMNI_MOE_CUDA STREQUAL "OFF")
  set(_why "OMNI_MOE_CUDA=OFF")
elseif(OMNI_MOE_TORCH AND NOT TORCH_CUDA_VERSION)
  set(_why "torch ${TORCH_VERSION_STRING} is a CPU build")
elseif(NOT _nvcc)
  set(_why "no nvcc in CUDACXX, CUDA_HOME, /usr/local/cuda or on PATH")
else()
  execute_process(COMMAND ${_nvcc} --version OUTPUT_VARIABLE _nvcc_text)
  string(REGEX MATCH "release ([0-9]+)\\.([0-9]+)" _release "${_nvcc_text}")
  set(_nvcc_version "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
  string(REGEX MATCH "^[0-9]+" _torch_cuda_major "${TORCH_CUDA_VERSION}")
  if(NOT OMNI_MOE_TORCH)
    set(OMNI_MOE_WITH_CUDA ON)
    set(_why "nvcc ${_nvcc_version}, without torch")
  elseif(NOT _nvcc_version MATCHES "^${_torch_cuda_major}\\.")
    set(_why "nvcc ${_nvcc_version} does not match torch's CUDA ${TORCH_CUDA_VERSION}")
  else()
    set(OMNI_MOE_WITH_CUDA ON)
    set(_why "nvcc ${_nvcc_version}, torch ${TORCH_VERSION_STRING} for CUDA ${TORCH_CUDA_VERSION}")
  endif()
endif()

if(OMNI_MOE_CUDA STREQUAL "ON" AND NOT OMNI_MOE_WITH_CUDA)
  message(FATAL_ERROR "OMNI_MOE_CUDA=ON, but ${_why}")
endif()

set(OMNI_MOE_CUDA_VERSION "")
if(OMNI_MOE_WITH_CUDA)
  set(CMAKE_CUDA_COMPILER ${_nvcc})
  set(CMAKE_CUDA_ARCHITECTURES ${OMNI_MOE_CUDA_ARCHITECTURES})
  set(CMAKE_CUDA_STANDARD ${CMAKE_CXX_STANDARD})
  enable_language(CUDA)
  # What links with these kernels is C++ and names the CUDA libraries that it needs. Without this
  # CMake adds the library directories of nvcc's host compiler (CUDAHOSTCXX), whose libstdc++ may be a
  # static one, which CheckToolchain is there to refuse.
  set(CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES "")
  set(CMAKE_CUDA_IMPLICIT_LINK_LIBRARIES "")
  set(CMAKE_CUDA_RUNTIME_LIBRARY None)
  find_package(CUDAToolkit REQUIRED)
  set(OMNI_MOE_CUDA_VERSION ${_nvcc_version})
  message(STATUS "omni_moe: CUDA backend ON (${_why}; architectures ${OMNI_MOE_CUDA_ARCHITECTURES})")
else()
  message(STATUS "omni_moe: CUDA backend OFF (${_why})")
endif()
