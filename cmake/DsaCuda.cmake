# SPDX-License-Identifier: Apache-2.0
# Resolves DSA_CUDA into DSA_WITH_CUDA and names the architectures.
#   DSA_CUDA_ARCHS       portable kernels: SASS for each, plus PTX of the last for newer GPUs
#   DSA_CUDA_FAST_ARCHS  kernels written for one architecture (Hopper: 90a)
set(DSA_CUDA_ARCHS "80;90" CACHE STRING "Architectures of the portable CUDA kernels")
set(DSA_CUDA_FAST_ARCHS "90a" CACHE STRING "Architectures of the architecture-specific kernels")

if(NOT DSA_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "DSA_CUDA: expected AUTO, ON or OFF, got ${DSA_CUDA}")
endif()

set(DSA_WITH_CUDA OFF)
if(NOT DSA_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # set for each target, from the lists above
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(DSA_WITH_CUDA ON)
  elseif(DSA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "DSA_CUDA=ON: expected nvcc on PATH or in CUDACXX, found none")
  endif()
endif()
message(STATUS "dsa_ext: CUDA backend ${DSA_WITH_CUDA} (DSA_CUDA=${DSA_CUDA})")
