#include "threads.hpp"

#include <atomic>
#include <dlfcn.h>
#include <pthread.h>

namespace batchnorm {
namespace {

using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void *context);
std::atomic<ParallelFor> torch_parallel_for{nullptr};

// A forked child inherits the pool's locks but not its threads: there a parallel loop would wait for ever.
void serial_from_now_on() { torch_parallel_for = nullptr; }

} // namespace

void find_threads() {
    static const int registered = pthread_atfork(nullptr, nullptr, serial_from_now_on);
    (void)registered;
    // torch_parallel_for is in torch's stable C interface; RTLD_DEFAULT does not search libraries loaded by Python
    if (void *library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
        torch_parallel_for = reinterpret_cast<ParallelFor>(dlsym(library, "torch_parallel_for"));
        dlclose(library);
    }
}

void run_parallel(int64_t count, int64_t grain, Body body, void *context) {
    const ParallelFor parallel = torch_parallel_for;
    if (parallel == nullptr || count <= grain || parallel(0, count, grain, body, context) != 0) body(0, count, context);
}

} // namespace batchnorm
