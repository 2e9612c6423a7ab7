# SPDX-License-Identifier: Apache-2.0
# Use ccache where it is installed.
find_program(DSA_CCACHE ccache)
mark_as_advanced(DSA_CCACHE)
if(DSA_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${DSA_CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${DSA_CCACHE})
endif()
