// SPDX-License-Identifier: Apache-2.0
#include "dispatch/check.h"

#include <cstdlib>
#include <cstring>

namespace dsa {

namespace {

std::string join(const std::int64_t* values, int n) {
  std::string text = "[";
  for (int i = 0; i < n; ++i) text.append(i ? ", " : "").append(std::to_string(values[i]));
  return text + "]";
}

bool is_constant(const char* dim) { return dim[0] >= '0' && dim[0] <= '9'; }

}  // namespace

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kUndefined: return "None";
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
    case DType::kFloat8E4M3: return "float8_e4m3fn";
    case DType::kUInt8: return "uint8";
    case DType::kInt8: return "int8";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kFloat64: return "float64";
    case DType::kFloat8E4M3Fnuz: return "float8_e4m3fnuz";
    case DType::kFloat8E5M2: return "float8_e5m2";
    case DType::kFloat8E8M0: return "float8_e8m0fnu";
    case DType::kFloat4E2M1: return "float4_e2m1fn_x2";
    case DType::kInt16: return "int16";
    case DType::kUInt16: return "uint16";
    case DType::kUInt32: return "uint32";
    case DType::kUInt64: return "uint64";
    case DType::kBool: return "bool";
    case DType::kOther: break;
  }
  return "another dtype";
}

std::string device_name(Device device) {
  switch (device.type) {
    case DeviceType::kCpu: return "cpu";
    case DeviceType::kCuda: return "cuda:" + std::to_string(device.index);
    case DeviceType::kOther: break;
  }
  return "another device";
}

std::string describe_tensor(const TensorView& t) {
  if (!t.defined()) return "None";
  const std::string dtype = dtype_name(t.dtype);
  if (t.ndim > kMaxDims) return dtype + " of " + std::to_string(t.ndim) + " dimensions";
  return dtype + " " + join(t.sizes, t.ndim);
}

std::string describe_strides(const TensorView& t) { return "strides " + join(t.strides, t.ndim); }

void Check::bind(const char* dim, std::int64_t size) {
  if (num_dims_ < static_cast<int>(dims_.size())) dims_[num_dims_++] = {dim, size};
}

std::int64_t Check::dim(const char* name) const {
  for (int i = 0; i < num_dims_; ++i) {
    if (std::strcmp(dims_[i].name, name) == 0) return dims_[i].size;
  }
  return 0;
}

bool Check::match(const TensorView& t, DTypes dtypes, Shape shape) {
  bool known_dtype = false;
  for (DType dtype : dtypes) known_dtype |= dtype == t.dtype;
  if (!known_dtype || t.ndim != static_cast<int>(shape.size())) return false;
  int i = 0;
  for (const char* dim : shape) {
    const std::int64_t size = t.sizes[i++];
    if (is_constant(dim)) {
      if (size != std::atoll(dim)) return false;
      continue;
    }
    bool bound = false;
    for (int d = 0; d < num_dims_ && !bound; ++d) {
      if (std::strcmp(dims_[d].name, dim) != 0) continue;
      if (dims_[d].size != size) return false;
      bound = true;
    }
    if (!bound) bind(dim, size);
  }
  return true;
}

std::string Check::describe(DTypes dtypes, Shape shape) const {
  std::string text;
  for (DType dtype : dtypes) text.append(text.empty() ? "" : " or ").append(dtype_name(dtype));
  text += " [";
  bool first = true;
  for (const char* dim : shape) {
    text.append(first ? "" : ", ").append(dim);
    first = false;
    for (int d = 0; d < num_dims_; ++d) {
      if (std::strcmp(dims_[d].name, dim) != 0) continue;
      text.append("=").append(std::to_string(dims_[d].size));
      break;
    }
  }
  return text + "]";
}

void Check::tensor(const char* name, const TensorView& t, DTypes dtypes, Shape shape,
                   Layout layout) {
  if (!ok()) return;
  const int dims_before = num_dims_;
  if (match(t, dtypes, shape)) return placement(name, t, layout);
  num_dims_ = dims_before;  // a half-matched tensor must not explain itself by its own sizes
  fail(name, describe(dtypes, shape), describe_tensor(t));
}

void Check::tensor(const char* name, const TensorView& t, DTypes dtypes, Shape shape_a,
                   Shape shape_b, Layout layout) {
  if (!ok()) return;
  const int dims_before = num_dims_;
  if (match(t, dtypes, t.ndim == static_cast<int>(shape_b.size()) ? shape_b : shape_a)) {
    return placement(name, t, layout);
  }
  num_dims_ = dims_before;
  const std::string second = describe(dtypes, shape_b);
  fail(name, describe(dtypes, shape_a) + " or " + second.substr(second.find('[')),
       describe_tensor(t));
}

void Check::placement(const char* name, const TensorView& t, Layout layout) {
  if (t.device != device_) {
    return fail(name, "a tensor on " + device_name(device_), "one on " + device_name(t.device));
  }
  if (layout == Layout::kInnerContiguous && t.ndim > 1 && t.size(-1) > 1 && t.stride(-1) != 1) {
    fail(name, "stride 1 in the last dimension", describe_strides(t));
  }
}

void Check::absent(const char* name, const TensorView& t, const char* when) {
  if (ok() && t.defined()) fail(name, std::string("None ") + when, describe_tensor(t));
}

void Check::that(bool holds, const char* name, const char* expected, std::int64_t got) {
  if (ok() && !holds) fail(name, expected, std::to_string(got));
}

void Check::that(bool holds, const char* name, const char* expected, const std::string& got) {
  if (ok() && !holds) fail(name, expected, got);
}

void Check::fail(const char* name, const std::string& expected, const std::string& got) {
  status_ = Status::invalid_argument(std::string(op_) + ": " + name + ": expected " + expected +
                                     ", got " + got);
}

}  // namespace dsa
