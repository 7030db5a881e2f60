// Work in pieces on torch's threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>

namespace luffy {

// task(scratch, i) for every i in [0, count). A thread that is free takes the next piece, so unequal pieces and a busy
// machine cost no waiting; which thread does which piece must not matter to the results. `scratch()` makes what a
// thread needs for itself.
template <typename Scratch, typename Task>
void for_each_task(int64_t count, const Scratch& scratch, const Task& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    auto mine = scratch();
    for (int64_t i = next++; i < count; i = next++) task(mine, i);
    at::native::cpublas::brgemm_release();  // a matrix unit's configuration, if one was used
  });
}

}  // namespace luffy
