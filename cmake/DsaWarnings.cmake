# SPDX-License-Identifier: Apache-2.0
# dsa_warnings(target): the warnings every C++ target of this project is clean under.
function(dsa_warnings target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion>)
endfunction()
