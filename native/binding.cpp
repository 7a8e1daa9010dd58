// The Python module batchnorm._native: its functions get addresses and sizes as integers and call the arithmetic.
#include "arithmetic.hpp"
#include "threads.hpp"

#include <atomic>
#include <iterator>
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

// The instruction sets that this processor supports, the one with the widest vectors first.
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
std::atomic<const Arithmetic *> chosen = choices.front().arithmetic; // atomic: read without the GIL

nb::list instruction_sets() {
    nb::list names;
    for (const Choice &choice : choices) names.append(choice.name);
    return names;
}

void use(const std::string &name) {
    for (const Choice &choice : choices)
        if (name == choice.name) {
            chosen = choice.arithmetic;
            return;
        }
    throw nb::value_error("use needs one of instruction_sets(), the sets that this processor runs.");
}

using Address = uintptr_t;
template <class T = void> T *at(Address address) { return reinterpret_cast<T *>(address); }

Act activation(int number) {
    if (number < 0 || size_t(number) >= std::size(ACTS)) throw nb::value_error("act needs a number of activations().");
    return Act(number);
}

nb::list activations() {
    nb::list names;
    for (const char *name : ACTS) names.append(name);
    return names;
}

Layer layer(int type, int64_t outer, int64_t channels, int64_t inner, Address mean, Address var, Address weight,
            Address bias, double eps, int act, double param, Address valid = 0) {
    return {Type(type), {outer, channels, inner}, at<double>(mean), at<double>(var), at(weight), at(bias), eps,
            activation(act), param, at<uint8_t>(valid)};
}

int64_t train(int type, int64_t outer, int64_t channels, int64_t inner, Address mean, Address var, Address weight,
              Address bias, double eps, int act, double param, Address x, Address residual, Address y, Address batches,
              Address running_mean, Address running_var, bool wide, double momentum) {
    nb::gil_scoped_release free;
    return chosen.load()->train(
        layer(type, outer, channels, inner, mean, var, weight, bias, eps, act, param), {at(x), at(residual), at(y)},
        {at<int64_t>(batches), at(running_mean), at(running_var), wide, momentum});
}

void backward(int type, int64_t outer, int64_t channels, int64_t inner, Address mean, Address var, Address weight,
              Address bias, double eps, int act, double param, Address grad, Address x, Address other, bool other_is_y,
              bool x_is_y, bool constant, Address d_x, Address d_residual, Address d_weight, Address d_bias) {
    nb::gil_scoped_release free;
    chosen.load()->backward(layer(type, outer, channels, inner, mean, var, weight, bias, eps, act, param),
                                {at(grad), at(x), at(other), other_is_y, x_is_y, constant, at(d_x), at(d_residual),
                                 at(d_weight), at(d_bias)});
}

void normalize(int type, int64_t outer, int64_t channels, int64_t inner, Address mean, Address var, Address weight,
               Address bias, double eps, int act, double param, Address valid, Address x, Address residual, Address y) {
    nb::gil_scoped_release free;
    chosen.load()->normalize(layer(type, outer, channels, inner, mean, var, weight, bias, eps, act, param, valid),
                                 {at(x), at(residual), at(y)});
}

void moments(int type, int64_t outer, int64_t channels, int64_t inner, Address mean, Address var, Address valid, Address x,
             bool exact) {
    nb::gil_scoped_release free;
    chosen.load()->moments(layer(type, outer, channels, inner, mean, var, 0, 0, 0, 0, 0, valid), at(x), exact);
}

void sum_gradients(int type, int64_t outer, int64_t channels, int64_t inner, Address mean, Address var, Address weight,
                   Address bias, double eps, int act, double param, Address valid, Address grad, Address x, Address other,
                   bool other_is_y, bool x_is_y, Address d_residual, Address sums) {
    nb::gil_scoped_release free;
    chosen.load()->sum_gradients(layer(type, outer, channels, inner, mean, var, weight, bias, eps, act, param, valid),
                                 {at(grad), at(x), at(other), other_is_y, x_is_y, false, nullptr, at(d_residual)},
                                 {at<double>(sums), nullptr});
}

void input_gradient(int type, int64_t outer, int64_t channels, int64_t inner, Address mean, Address var, Address weight,
                    Address bias, double eps, int act, double param, Address valid, Address grad, Address x, bool x_is_y,
                    Address means, Address d_x) {
    nb::gil_scoped_release free;
    chosen.load()->input_gradient(layer(type, outer, channels, inner, mean, var, weight, bias, eps, act, param, valid),
                                  {at(grad), at(x), nullptr, false, x_is_y, false, at(d_x)},
                                  {nullptr, at<double>(means)});
}

int64_t update(int64_t channels, Address mean, Address var, double count, Address batches, Address running_mean,
               Address running_var, bool wide, double momentum) {
    return chosen.load()->update(channels, at<double>(mean), at<double>(var), count,
                                     {at<int64_t>(batches), at(running_mean), at(running_var), wide, momentum});
}

void add_columns(int kind, Address x, int64_t rows, int64_t features, int64_t row_stride, int64_t feature_stride,
                 Address present, int64_t present_row_stride, int64_t present_feature_stride, Address numbers,
                 Address counts) {
    if (kind < 0 || kind >= KINDS) throw nb::value_error("add_columns needs the number of a Kind.");
    nb::gil_scoped_release free;
    chosen.load()->add_columns({Kind(kind), at(x), rows, features, row_stride, feature_stride, at<uint8_t>(present),
                                present_row_stride, present_feature_stride, at<double>(numbers), at<int64_t>(counts),
                                features});
}

} // namespace

NB_MODULE(_native, module) {
    find_threads();
    module.def("instruction_sets", &instruction_sets);
    module.def("use", &use);
    module.def("train", &train);
    module.def("backward", &backward);
    module.def("normalize", &normalize);
    module.def("moments", &moments);
    module.def("update", &update);
    module.def("sum_gradients", &sum_gradients);
    module.def("input_gradient", &input_gradient);
    module.def("add_columns", &add_columns);
    module.def("activations", &activations);
}
