// What the native kernels compute; see src/batchnorm/kernels/reference.py for the formulas.
#pragma once
#include <cstdint>

namespace batchnorm {

enum class Type : int { float32, float64, bfloat16, float16 };

// A tensor of `outer` x `channels` x `inner` values, contiguous. A matrix of rows (N, C), or channels_last, has inner 1.
struct Shape {
    int64_t outer, channels, inner;
};

// Statistics and parameters are float32, or float64 for float64 values. Null weight or bias: none.
struct Train {
    Shape shape;
    const void *x;
    void *y;
    void *mean, *residual, *var; // out, (channels)
    const void *weight, *bias;
    double eps;
};

struct Backward {
    Shape shape;
    const void *grad, *x;
    const void *mean, *residual, *var, *weight;
    void *d_x, *d_weight, *d_bias; // out
    double eps;
};

struct Normalize {
    Shape shape;
    const void *x;
    void *y;
    const void *mean, *var, *weight, *bias;
    double eps;
};

// Running statistics and those of a batch, all of one type, float32 or float64.
struct Update {
    int64_t channels;
    void *running_mean, *running_var;
    const void *mean, *var;
    double momentum, unbias; // the batch's variance times `unbias` is unbiased
    bool whole;              // a batch with a non-finite channel is left out for all channels
};

struct Arithmetic {
    void (*train)(Type, const Train &);
    void (*backward)(Type, const Backward &);
    void (*normalize)(Type, const Normalize &);
    int64_t (*update)(Type, const Update &); // the number of channels that are not finite
};

namespace portable { extern const Arithmetic arithmetic; }
namespace avx2 { extern const Arithmetic arithmetic; }
namespace avx512 { extern const Arithmetic arithmetic; }

} // namespace batchnorm
