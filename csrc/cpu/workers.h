// SPDX-License-Identifier: Apache-2.0
// Work items of uneven cost on the threads of parallel_for: each worker takes the next item when it
// is done with one, in a workspace of its own. What an item computes depends on the item alone, so
// results do not depend on which worker took it.
// Memory: workers are limited so that all their workspaces stay within kWorkspaceBudget.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>

#include "dsa/parallel.h"

namespace dsa::cpu {

inline constexpr std::int64_t kWorkspaceBudget = std::int64_t{40} << 20;  // bytes, of one op

// Zeroed floats on a cache line of their own: vector loads may run into the padding of a row.
class FloatBuffer {
 public:
  explicit FloatBuffer(std::int64_t n)
      : data_(static_cast<float*>(::operator new(bytes(n), std::align_val_t{kAlign}))) {
    std::fill_n(data_.get(), n, 0.0f);
  }
  float* get() const { return data_.get(); }

 private:
  static constexpr std::size_t kAlign = 64;
  static std::size_t bytes(std::int64_t n) { return static_cast<std::size_t>(n) * sizeof(float); }
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{kAlign}); }
  };
  std::unique_ptr<float, Free> data_;
};

// How many threads may be worth feeding. Only shapes the split of work, never a result.
inline std::int64_t hardware_threads() {
  return std::max<std::int64_t>(1, std::thread::hardware_concurrency());
}

struct WorkItems {
  std::int64_t count;
  double flops;                  // of all items: a little work stays on the calling thread
  std::int64_t workspace_bytes;  // of one worker

  std::int64_t workers() const {
    constexpr double kFlopsPerWorker = 2e6;  // tens of microseconds, well above a thread's wake-up
    const auto useful = static_cast<std::int64_t>(std::min(flops / kFlopsPerWorker, 1e6));
    const std::int64_t affordable = kWorkspaceBudget / std::max<std::int64_t>(workspace_bytes, 1);
    return std::max<std::int64_t>(1, std::min({count, useful, affordable}));
  }
};

// Calls run(workspace, item) for each item, make_workspace() once a worker that gets an item.
template <typename MakeWorkspace, typename Run>
void for_each_item(const WorkItems& items, MakeWorkspace&& make_workspace, Run&& run) {
  if (items.count <= 0) return;
  std::atomic<std::int64_t> next{0};
  const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
  parallel_for(0, items.workers(), 1, [&](std::int64_t, std::int64_t) {
    std::int64_t item = take();
    if (item >= items.count) return;
    auto workspace = make_workspace();
    for (; item < items.count; item = take()) run(workspace, item);
  });
}

}  // namespace dsa::cpu
