// SPDX-License-Identifier: Apache-2.0
// Selections as the launches of their kernels see them: those of topk_select, and those that are
// steps of one.
#pragma once

#include <cstdint>

#include "cuda/common/device_info.h"
#include "cuda/topk/output_row.cuh"
#include "dsa/params.h"

namespace dsa::cuda::topk {

struct SelectCall {
  TopkTask task;
  DType dtype;  // of the scores
  Launch launch;
  std::int64_t rows;
  std::int64_t columns;     // most that a window has
  bool reads_early = true;  // scores of a row outside its window may be read

  explicit SelectCall(const TopkSelectParams& p)
      : task(p),
        dtype(p.scores.dtype),
        launch(p.launch),
        rows(p.scores.size(0)),
        columns(p.scores.size(1)) {}

  // Each has an SM.
  bool has_few_rows() const { return rows <= device_limits(launch.device).num_sms; }
};

// Of more than one CTA.
inline bool has_clusters(const DeviceLimits& limits) {
  return limits.arch >= 90 && limits.arch < 120;
}

bool resident_takes(const SelectCall& call);
Status select_resident(const SelectCall& call);
Status select_stream(const SelectCall& call);

}  // namespace dsa::cuda::topk
