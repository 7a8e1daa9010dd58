// The Python module batchnorm._native: addresses and sizes in, nothing returned. No arithmetic here.
#include "arithmetic.hpp"
#include "threads.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <string>
#include <vector>

namespace nb = nanobind;
using namespace batchnorm;

namespace {

struct Choice {
    const char *name;
    const Arithmetic *arithmetic;
};

// Those that this processor runs, widest first.
std::vector<Choice> runnable() {
    std::vector<Choice> found;
#ifdef BATCHNORM_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        found.push_back({"avx512", &avx512::arithmetic});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        found.push_back({"avx2", &avx2::arithmetic});
#endif
    found.push_back({"portable", &portable::arithmetic});
    return found;
}

const std::vector<Choice> choices = runnable();
Choice chosen = choices.front();

nb::list instruction_sets() {
    nb::list names;
    for (const Choice &choice : choices) names.append(choice.name);
    return names;
}

void use(const std::string &name) {
    for (const Choice &choice : choices)
        if (name == choice.name) {
            chosen = choice;
            return;
        }
    throw nb::value_error("use needs one of instruction_sets(), the sets that this processor runs.");
}

void *at(uintptr_t address) { return reinterpret_cast<void *>(address); }

void train(int type, int64_t outer, int64_t channels, int64_t inner, uintptr_t x, uintptr_t y, uintptr_t mean,
           uintptr_t residual, uintptr_t var, uintptr_t weight, uintptr_t bias, double eps) {
    nb::gil_scoped_release free;
    chosen.arithmetic->train(Type(type), {{outer, channels, inner}, at(x), at(y), at(mean), at(residual), at(var),
                                          at(weight), at(bias), eps});
}

void backward(int type, int64_t outer, int64_t channels, int64_t inner, uintptr_t grad, uintptr_t x, uintptr_t mean,
              uintptr_t residual, uintptr_t var, uintptr_t weight, uintptr_t d_x, uintptr_t d_weight, uintptr_t d_bias,
              double eps) {
    nb::gil_scoped_release free;
    chosen.arithmetic->backward(Type(type), {{outer, channels, inner}, at(grad), at(x), at(mean), at(residual), at(var),
                                             at(weight), at(d_x), at(d_weight), at(d_bias), eps});
}

void normalize(int type, int64_t outer, int64_t channels, int64_t inner, uintptr_t x, uintptr_t y, uintptr_t mean,
               uintptr_t var, uintptr_t weight, uintptr_t bias, double eps) {
    nb::gil_scoped_release free;
    chosen.arithmetic->normalize(
        Type(type), {{outer, channels, inner}, at(x), at(y), at(mean), at(var), at(weight), at(bias), eps});
}

int64_t update(int type, int64_t channels, uintptr_t running_mean, uintptr_t running_var, uintptr_t mean, uintptr_t var,
               double momentum, double unbias, bool whole) {
    return chosen.arithmetic->update(
        Type(type), {channels, at(running_mean), at(running_var), at(mean), at(var), momentum, unbias, whole});
}

} // namespace

NB_MODULE(_native, module) {
    find_threads();
    module.def("instruction_sets", &instruction_sets);
    module.def("use", &use);
    module.def("train", &train);
    module.def("backward", &backward);
    module.def("normalize", &normalize);
    module.def("update", &update);
}
