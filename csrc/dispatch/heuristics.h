// SPDX-License-Identifier: Apache-2.0
// Which of several kernels that take the arguments is not worth running here, each with its reason.
#pragma once

#include "dsa/params.h"

namespace dsa {

// mma.sync on e4m3 operands is an instruction on SM89 and SM12x; elsewhere the assembler widens
// both operands to f16 at every use, and a kernel that widens each key once is faster.
bool e4m3_products_are_widened(Device device);

template <typename Params>
bool e4m3_products_are_widened(const Params& p) {
  return e4m3_products_are_widened(p.launch.device);
}

}  // namespace dsa
