# Interface target `pytorch` for the PyTorch of a Python interpreter, and TORCH_VERSION_STRING,
# TORCH_CUDA_VERSION (empty for a CPU build), TORCH_SITE_DIR (where the package lies).
#
# PyTorch's own find_package(Torch) is not used: with a CUDA build of torch it demands a CUDA toolkit
# even for a CPU-only target, and it rewrites the global CUDA flags.

find_package(Python COMPONENTS Interpreter Development.Module REQUIRED)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c [=[
import pathlib, torch
print(";".join([str(pathlib.Path(torch.__file__).parent), torch.__version__.split("+")[0],
                torch.version.cuda or "", str(int(torch.compiled_with_cxx11_abi()))]))
]=]
  OUTPUT_VARIABLE _torch_facts OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _torch_missing)
if(_torch_missing)
  message(FATAL_ERROR "omni_moe: ${Python_EXECUTABLE} cannot import torch. Install it first "
                      "(pip install 'torch==2.15.*') and build with --no-build-isolation.")
endif()
list(GET _torch_facts 0 _torch_dir)
list(GET _torch_facts 1 TORCH_VERSION_STRING)
list(GET _torch_facts 2 TORCH_CUDA_VERSION)
list(GET _torch_facts 3 _torch_cxx11_abi)
if(TORCH_VERSION_STRING VERSION_LESS 2.11)
  message(FATAL_ERROR "omni_moe: torch 2.11 or newer is needed, but ${_torch_dir} is "
                      "${TORCH_VERSION_STRING}")
endif()
cmake_path(GET _torch_dir PARENT_PATH TORCH_SITE_DIR)

add_library(pytorch INTERFACE)
target_include_directories(pytorch SYSTEM INTERFACE
  ${_torch_dir}/include ${_torch_dir}/include/torch/csrc/api/include)
target_compile_definitions(pytorch INTERFACE _GLIBCXX_USE_CXX11_ABI=${_torch_cxx11_abi})
target_link_directories(pytorch INTERFACE ${_torch_dir}/lib)
set(TORCH_LIBRARY_DIR ${_torch_dir}/lib)  # for the run path of what stays in the build tree
target_link_libraries(pytorch INTERFACE torch_cpu c10)
