// SPDX-License-Identifier: Apache-2.0
// What tests of emulated kernels have in common.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "compare.h"
#include "dsa/status.h"
#include "machine.h"

namespace dsa::test {

inline void expect_ok(const Status& status) { EXPECT_TRUE(status.ok()) << status.message(); }

inline void expect_same(const TensorView& got, const TensorView& expected, Rule rule,
                        const std::string& what) {
  expect_close(got, got.ptr<const std::uint8_t>(), expected.ptr<const std::uint8_t>(), rule, what);
}

}  // namespace dsa::test
