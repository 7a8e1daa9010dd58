// Parallel loops on torch's own thread pool, so that a process never has two.
#pragma once
#include <cstdint>

namespace batchnorm {

using Body = void (*)(int64_t begin, int64_t end, void *context);

// Find torch's parallel loop; without it, and in a forked child, loops run serially.
void find_threads();
void run_parallel(int64_t count, int64_t grain, Body body, void *context);

// Calls `work(i)` for every i in 0..count, `grain` of them at least to a thread.
template <class Work> void parallel_for(int64_t count, int64_t grain, const Work &work) {
    run_parallel(
        count, grain,
        [](int64_t begin, int64_t end, void *context) {
            for (int64_t i = begin; i < end; ++i) (*static_cast<const Work *>(context))(i);
        },
        const_cast<Work *>(&work));
}

} // namespace batchnorm
