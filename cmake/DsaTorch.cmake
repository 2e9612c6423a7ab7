# SPDX-License-Identifier: Apache-2.0
# dsa::torch_stable: the headers and the link line of LibTorch's stable ABI, from the torch of the
# Python that builds. Nothing else of torch is used, so torch's own CMake package is not needed.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import pathlib, torch; print(pathlib.Path(torch.__file__).parent, torch.__version__, sep=';')"
  OUTPUT_VARIABLE dsa_torch OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE dsa_torch_failed)
if(dsa_torch_failed)
  message(FATAL_ERROR "torch: expected torch >= 2.11 in ${Python_EXECUTABLE}, found none")
endif()
list(GET dsa_torch 0 DSA_TORCH_DIR)
list(GET dsa_torch 1 DSA_TORCH_VERSION)
if(DSA_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "torch: expected >= 2.11, got ${DSA_TORCH_VERSION}")
endif()

add_library(dsa_torch_stable INTERFACE)
add_library(dsa::torch_stable ALIAS dsa_torch_stable)
target_include_directories(dsa_torch_stable SYSTEM INTERFACE ${DSA_TORCH_DIR}/include)
target_compile_definitions(dsa_torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000ULL)
# By name, not by path: at run time the torch that Python imported is the one that answers.
target_link_directories(dsa_torch_stable INTERFACE ${DSA_TORCH_DIR}/lib)
target_link_libraries(dsa_torch_stable INTERFACE -Wl,--no-as-needed -ltorch -Wl,--as-needed)
message(STATUS "dsa_ext: torch ${DSA_TORCH_VERSION} headers, stable ABI target 2.11")
