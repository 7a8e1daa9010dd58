// What the native kernels compute; see src/batchnorm/kernels/reference.py for the formulas.
#pragma once
#include <cstdint>

namespace batchnorm {

enum class Type : int { float32, float64, bfloat16, float16 };
// numbered as in src/batchnorm/kernels/activations.py
enum class Act : int { none, relu, leaky_relu, elu, silu, gelu, hardswish };
constexpr const char *ACTS[] = {"none", "relu", "leaky_relu", "elu", "silu", "gelu", "hardswish"};

// A tensor of `outer` x `channels` x `inner` values, contiguous. A matrix of rows (N, C), or channels_last, has inner 1.
struct Shape {
    int64_t outer, channels, inner;
};

// Running statistics, float32 or float64, that move towards those of a batch. Null counter: nothing is stored.
struct Running {
    int64_t *batches;
    void *mean, *var;
    bool wide;       // float64
    double momentum; // NaN: the average of all batches
};

// Batch statistics are float64. Gamma and beta are float32, or float64 for float64 values; null: none.
struct Layer {
    Type type;
    Shape shape;
    double *mean, *var; // (channels)
    const void *weight, *bias;
    double eps;
    Act act;
    double param; // of the activation
};

struct Forward {
    const void *x, *residual; // null residual: none
    void *y;
};

struct Backward {
    const void *grad, *x;
    const void *other; // the residual, or y where its sign shows the derivative; null: none
    bool other_is_y, x_is_y;
    bool constant; // whether mean and variance are constants, not those of x
    void *d_x, *d_residual, *d_weight, *d_bias;
};

// The halves of a backward pass, between which sums of other values may be added: see kernels/interface.py.
struct Halves {
    double *sums;        // (2, channels), of g and of g z
    const double *means; // the same divided by the count; null: mean and variance are constants
};

struct Arithmetic {
    // Measures x, writes mean and var, normalizes, moves running statistics; returns how many channels are not finite.
    int64_t (*train)(const Layer &, const Forward &, const Running &);
    void (*backward)(const Layer &, const Backward &);
    void (*normalize)(const Layer &, const Forward &); // by the mean and var of the layer
    // Mean and biased variance of every channel: with the bits of train, or every value added in float64.
    void (*moments)(const Layer &, const void *x, bool exact);
    int64_t (*update)(int64_t channels, const double *mean, const double *var, double count, const Running &);
    void (*sum_gradients)(const Layer &, const Backward &, const Halves &);  // writes sums, and d_residual if there is one
    void (*input_gradient)(const Layer &, const Backward &, const Halves &); // writes d_x
};

namespace portable { extern const Arithmetic arithmetic; }
namespace avx2 { extern const Arithmetic arithmetic; }
namespace avx512 { extern const Arithmetic arithmetic; }

} // namespace batchnorm
