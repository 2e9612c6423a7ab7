# SPDX-License-Identifier: Apache-2.0
# Resolves DSA_CUDA into DSA_WITH_CUDA and names the architectures.
#   DSA_CUDA_ARCHS       portable kernels: SASS for each, plus PTX of the last for newer GPUs
#   DSA_CUDA_FAST_ARCHS  kernels written for one architecture (Hopper: 90a)
set(DSA_CUDA_ARCHS "80;90" CACHE STRING "Architectures of the portable CUDA kernels")
set(DSA_CUDA_FAST_ARCHS "90a" CACHE STRING "Architectures of the architecture-specific kernels")

if(NOT DSA_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "DSA_CUDA: expected AUTO, ON or OFF, got ${DSA_CUDA}")
endif()

set(DSA_CUDA_OLDEST 12.5)  # the first with cudaGetDriverEntryPointByVersion
set(DSA_WITH_CUDA OFF)
if(NOT DSA_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # set for each target, from the lists above
  check_language(CUDA)
  set(dsa_nvcc none)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(dsa_nvcc ${CMAKE_CUDA_COMPILER_VERSION})
  endif()
  set(dsa_wanted "expected nvcc ${DSA_CUDA_OLDEST} or newer on PATH or in CUDACXX, got ${dsa_nvcc}")
  if(CMAKE_CUDA_COMPILER AND dsa_nvcc VERSION_GREATER_EQUAL DSA_CUDA_OLDEST)
    find_package(CUDAToolkit REQUIRED)
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(DSA_WITH_CUDA ON)
  elseif(DSA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "DSA_CUDA=ON: ${dsa_wanted}")
  else()
    message(WARNING "DSA_CUDA=AUTO: ${dsa_wanted}; this build runs on the CPU alone "
                    "(with DSA_CUDA=OFF without this warning)")
  endif()
endif()
message(STATUS "dsa_ext: CUDA backend ${DSA_WITH_CUDA} (DSA_CUDA=${DSA_CUDA})")

# dsa_cuda_portable(target sources...): adds .cu files to `target`, compiled for DSA_CUDA_ARCHS (SASS
# for each, PTX of the last). A register spill is an error on the default architectures, which the
# kernels' budgets were drawn up for, and a warning on others.
function(dsa_cuda_portable target)
  set(gencode "")
  foreach(arch IN LISTS DSA_CUDA_ARCHS)
    list(APPEND gencode "-gencode=arch=compute_${arch},code=sm_${arch}")
    set(newest ${arch})
  endforeach()
  list(APPEND gencode "-gencode=arch=compute_${newest},code=compute_${newest}")
  set(ptxas "--warn-on-spills")
  set(untuned ${DSA_CUDA_ARCHS})
  list(REMOVE_ITEM untuned 80 90)
  if(NOT untuned)
    string(APPEND ptxas ",--warning-as-error")
  endif()
  add_library(${target}_portable OBJECT ${ARGN})
  target_include_directories(${target}_portable PRIVATE
    $<TARGET_PROPERTY:${target},INCLUDE_DIRECTORIES>)
  target_link_libraries(${target}_portable PRIVATE CUDA::cudart_static)
  target_compile_options(${target}_portable PRIVATE
    ${gencode} --expt-relaxed-constexpr -Xfatbin=-compress-all -Xcompiler=-Wall,-Wextra
    -Xptxas=${ptxas})
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_portable>)
endfunction()

# dsa_cuda_fast(target arch sources...): adds .cu files of kernels written for `arch` alone. A register
# spill is an error.
function(dsa_cuda_fast target arch)
  add_library(${target}_${arch} OBJECT ${ARGN})
  target_include_directories(${target}_${arch} PRIVATE
    $<TARGET_PROPERTY:${target},INCLUDE_DIRECTORIES>)
  target_link_libraries(${target}_${arch} PRIVATE CUDA::cudart_static)
  target_compile_options(${target}_${arch} PRIVATE
    -gencode=arch=compute_${arch},code=sm_${arch} --expt-relaxed-constexpr -Xfatbin=-compress-all
    -Xcompiler=-Wall,-Wextra -Xptxas=--warn-on-spills,--warning-as-error)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_${arch}>)
endfunction()
