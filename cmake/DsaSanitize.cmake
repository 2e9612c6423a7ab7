# SPDX-License-Identifier: Apache-2.0
# DSA_SANITIZE=ON: out-of-bounds accesses and undefined behaviour stop the program (make asan).
if(DSA_SANITIZE)
  add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=all
                      -fno-omit-frame-pointer)
  add_link_options(-fsanitize=address,undefined)
endif()
