// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/tensor_map.h"

#include <cuda_runtime.h>

#include <string>

namespace dsa::cuda {

namespace {

using EncodeFn = decltype(&cuTensorMapEncodeTiled);

// From the driver that is running, so that nothing links against it.
EncodeFn find_encode() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
  constexpr unsigned kCuda12 = 12000;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, kCuda12, cudaEnableDefault,
                                       &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess) {
    return nullptr;
  }
  return reinterpret_cast<EncodeFn>(entry);
}

}  // namespace

Status make_tensor_map(const ByteTensor& tensor, CUtensorMap& map) {
  static const EncodeFn encode = find_encode();
  if (encode == nullptr) return Status::internal("the driver has no cuTensorMapEncodeTiled");
  cuuint64_t size[4], stride[3];
  cuuint32_t box[4], step[4] = {1, 1, 1, 1};
  for (int i = 0; i < tensor.rank; ++i) {
    size[i] = static_cast<cuuint64_t>(tensor.size[i]);
    box[i] = static_cast<cuuint32_t>(tensor.box[i]);
    if (i > 0) stride[i - 1] = static_cast<cuuint64_t>(tensor.stride[i - 1]);
  }
  const CUtensorMapSwizzle swizzle = tensor.box[0] == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : tensor.box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                           : CU_TENSOR_MAP_SWIZZLE_32B;
  const auto encode_map = [&] {
    return encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, static_cast<cuuint32_t>(tensor.rank),
                  const_cast<void*>(tensor.data), size, stride, box, step,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode_map();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {
    // A thread that has made no call of the runtime yet: unlike those, this one binds no context.
    int device = 0;
    if (cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess) {
      result = encode_map();
    }
  }
  if (result == CUDA_SUCCESS) return {};
  return Status::internal("cuTensorMapEncodeTiled: error " + std::to_string(result));
}

}  // namespace dsa::cuda
