// SPDX-License-Identifier: Apache-2.0
// The small language validate.cpp is written in: named dimensions, bound where they first appear.
//
//   Check c(MqaLogitsParams::kOp, p.launch.device);
//   c.tensor("q", p.q, {DType::kFloat8E4M3}, {"S", "H", "D"});
//   c.tensor("weights", p.weights, {DType::kFloat32}, {"S", "H"});
//
// The first failure is kept, as one line: "fp8_mqa_logits: weights: expected float32 [S=4, H=64],
// got float32 [4, 32]". Nothing is formatted while the arguments are right.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "dsa/params.h"
#include "dsa/status.h"

namespace dsa {

const char* dtype_name(DType dtype);
std::string device_name(Device device);
std::string describe_tensor(const TensorView& t);   // "float32 [4, 32]", or "None"
std::string describe_strides(const TensorView& t);  // "strides [32, 1]"

using Shape = std::initializer_list<const char*>;  // a name, or a decimal constant such as "1"
using DTypes = std::initializer_list<DType>;

enum class Layout { kInnerContiguous, kAnyStrides };

class Check {
 public:
  Check(const char* op, Device device) : op_(op), device_(device) {}

  void tensor(const char* name, const TensorView& t, DTypes dtypes, Shape shape,
              Layout layout = Layout::kInnerContiguous);
  // One of two shapes, told apart by their number of dimensions.
  void tensor(const char* name, const TensorView& t, DTypes dtypes, Shape shape_a, Shape shape_b,
              Layout layout = Layout::kInnerContiguous);
  // As above, and not given is right too.
  template <typename... Args>
  void optional(const char* name, const TensorView& t, Args&&... args) {
    if (t.defined()) tensor(name, t, std::forward<Args>(args)...);
  }
  void absent(const char* name, const TensorView& t, const char* when);

  // Fixes a dimension's size from outside, e.g. bind("D+4", c.dim("D") + 4).
  void bind(const char* dim, std::int64_t size);
  // 0 when a failure left it unbound.
  std::int64_t dim(const char* name) const;

  // A scalar, or a relation: `expected` and `got` complete "expected ..., got ...".
  void that(bool holds, const char* name, const char* expected, std::int64_t got);
  void that(bool holds, const char* name, const char* expected, const std::string& got);

  bool ok() const { return status_.ok(); }
  Status take() { return std::move(status_); }

 private:
  bool match(const TensorView& t, DTypes dtypes, Shape shape);
  std::string describe(DTypes dtypes, Shape shape) const;
  void placement(const char* name, const TensorView& t, Layout layout);
  void fail(const char* name, const std::string& expected, const std::string& got);

  struct Dim {
    const char* name;
    std::int64_t size;
  };
  const char* op_;
  Device device_;
  Status status_;
  std::array<Dim, 16> dims_{};
  int num_dims_ = 0;
};

}  // namespace dsa
