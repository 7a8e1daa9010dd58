// Parallel loops on torch's thread pool, so that a process does not have two pools.
#pragma once
#include <cstdint>

namespace batchnorm {

using Body = void (*)(int64_t begin, int64_t end, void *context);

// Finds torch's parallel loop. If there is none, and in a forked child, loops run serially.
void find_threads();
void run_parallel(int64_t count, int64_t grain, Body body, void *context);

// Calls `work(i)` for every i from 0 to count - 1; a thread gets at least `grain` of these calls.
template <class Work> void parallel_for(int64_t count, int64_t grain, const Work &work) {
    run_parallel(
        count, grain,
        [](int64_t begin, int64_t end, void *context) {
            for (int64_t i = begin; i < end; ++i) (*static_cast<const Work *>(context))(i);
        },
        const_cast<Work *>(&work));
}

} // namespace batchnorm
