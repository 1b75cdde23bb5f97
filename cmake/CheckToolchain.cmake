# Refuses a toolchain that links libstdc++ into what it builds. torch brings libstdc++.so, and with a
# second copy of the library in the process, printing one of torch's types crashes: the two share
# objects such as locales, whose layout and initialisation belong to one copy.

separate_arguments(_shared_flags UNIX_COMMAND "${CMAKE_SHARED_LINKER_FLAGS}")
set(_program ${CMAKE_BINARY_DIR}/check_libstdcxx)
try_compile(_links
  SOURCE_FROM_CONTENT check_libstdcxx.cpp
    "#include <iostream>\nint main() { std::cout << 1 << std::endl; }\n"
  LINK_OPTIONS ${_shared_flags}
  OUTPUT_VARIABLE _output
  COPY_FILE ${_program} COPY_FILE_ERROR _copy_error
  NO_CACHE)
if(NOT _links)
  message(FATAL_ERROR "omni_moe: ${CMAKE_CXX_COMPILER} cannot build a program that uses iostream:\n"
                      "${_output}")
endif()
# The name of a needed library stands as text in the file, and nowhere else than there.
file(STRINGS ${_program} _needed REGEX "libstdc\\+\\+\\.so" LIMIT_COUNT 1)
if(NOT _needed)
  message(FATAL_ERROR
    "omni_moe: ${CMAKE_CXX_COMPILER} links libstdc++ statically, or another C++ library. Beside the "
    "libstdc++.so of torch such a library crashes, for example in its error messages. Build without "
    "-static-libstdc++ (CXXFLAGS, LDFLAGS), or with the system's compiler: CXX=/usr/bin/g++, in an "
    "empty build directory.")
endif()
