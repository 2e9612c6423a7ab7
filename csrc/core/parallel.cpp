// SPDX-License-Identifier: Apache-2.0
#include "dsa/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace dsa {
namespace {

thread_local bool inside_parallel_for = false;

// One call: the ranges that are left, handed out in order to whichever thread asks.
class RangeQueue {
 public:
  RangeQueue(std::int64_t begin, std::int64_t end, std::int64_t range_size, RangeBody body,
             void* context)
      : begin_(begin),
        end_(end),
        range_size_(range_size),
        num_ranges_((end - begin - 1) / range_size + 1),
        body_(body),
        context_(context) {}

  std::int64_t num_ranges() const { return num_ranges_; }

  // Runs ranges until none is left or a body has thrown.
  void drain() {
    inside_parallel_for = true;
    while (!failed_.load(std::memory_order_relaxed)) {
      const std::int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= num_ranges_) break;
      const std::int64_t begin = begin_ + index * range_size_;
      try {
        body_(begin, index + 1 == num_ranges_ ? end_ : begin + range_size_, context_);
      } catch (...) {
        keep_first(std::current_exception());
      }
    }
    inside_parallel_for = false;
  }

  // To be called when every thread has left drain().
  void rethrow() {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void keep_first(std::exception_ptr error) {
    const std::lock_guard<std::mutex> lock(error_mutex_);
    if (!error_) error_ = std::move(error);
    failed_.store(true, std::memory_order_relaxed);
  }

  const std::int64_t begin_;
  const std::int64_t end_;
  const std::int64_t range_size_;
  const std::int64_t num_ranges_;
  const RangeBody body_;
  void* const context_;
  std::atomic<std::int64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

void parallel_for_with_threads(std::int64_t begin, std::int64_t end, std::int64_t grain,
                               RangeBody body, void* context) {
  // More ranges than threads, since a row of a causal batch may cost many times another.
  constexpr std::int64_t kRangesPerThread = 4;
  const std::int64_t max_threads =
      inside_parallel_for ? 1 : std::max<std::int64_t>(std::thread::hardware_concurrency(), 1);
  if (max_threads == 1 || end - begin <= grain) return body(begin, end, context);

  const std::int64_t even_size = (end - begin - 1) / (max_threads * kRangesPerThread) + 1;
  RangeQueue queue(begin, end, std::max(grain, even_size), body, context);
  std::vector<std::thread> helpers;
  const std::int64_t num_helpers = std::min(max_threads, queue.num_ranges()) - 1;
  helpers.reserve(static_cast<std::size_t>(num_helpers));
  try {
    for (std::int64_t i = 0; i < num_helpers; ++i) helpers.emplace_back([&] { queue.drain(); });
  } catch (const std::exception&) {
    // The system has no more threads: those that did start, and this one, do all the work.
  }
  queue.drain();
  for (std::thread& helper : helpers) helper.join();
  queue.rethrow();
}

std::atomic<ParallelForFn> installed{&parallel_for_with_threads};

}  // namespace

void set_parallel_for(ParallelForFn fn) {
  installed.store(fn != nullptr ? fn : &parallel_for_with_threads);
}

void parallel_for(std::int64_t begin, std::int64_t end, std::int64_t grain, RangeBody body,
                  void* context) {
  if (begin >= end) return;
  installed.load()(begin, end, std::max<std::int64_t>(grain, 1), body, context);
}

}  // namespace dsa
