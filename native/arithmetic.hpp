// The arguments and functions of the native kernels; see src/batchnorm/kernels/reference.py for the formulas.
#pragma once
#include <cstdint>

namespace batchnorm {

enum class Type : int { float32, float64, bfloat16, float16 };
// with the numbers of src/batchnorm/kernels/activations.py
enum class Act : int { none, relu, leaky_relu, elu, silu, gelu, hardswish };
constexpr const char *ACTS[] = {"none", "relu", "leaky_relu", "elu", "silu", "gelu", "hardswish"};

// A contiguous tensor of `outer` x `channels` x `inner` values. A matrix (N, C) or a channels_last tensor has inner 1.
struct Shape {
    int64_t outer, channels, inner;
};

// Running statistics, float32 or float64, that move towards those of a batch. If `batches` is null, there are none.
struct Running {
    int64_t *batches;
    void *mean, *var;
    bool wide;       // whether they are float64
    double momentum; // NaN: all batches are averaged equally
};

// Statistics are float64. Gamma and beta are float32, or float64 for float64 values; null if the layer has none.
struct Layer {
    Type type;
    Shape shape;
    double *mean, *var; // (channels)
    const void *weight, *bias;
    double eps;
    Act act;
    double param; // of the activation
    const uint8_t *valid = nullptr; // (outer, inner): which positions are no padding; null: all. Not for train and backward
};

struct Forward {
    const void *x, *residual; // residual may be null
    void *y;
};

struct Backward {
    const void *grad, *x;
    const void *other; // the residual, or y if its sign gives the derivative; may be null
    bool other_is_y, x_is_y;
    bool constant; // whether mean and variance do not depend on x
    void *d_x, *d_residual, *d_weight, *d_bias;
};

// For a backward pass in two halves; between them the caller may add sums of other values: see kernels/interface.py.
struct Halves {
    double *sums;        // (2, channels), of g and of g z
    const double *means; // sums divided by the count; null if mean and variance are constants
};

// The types of the values of data sets, with the numbers of src/batchnorm/datasets/feature_sums.py.
enum class Kind : int { float64, float32, int8, int16, int32, int64, uint8, uint16, uint32, uint64 };
constexpr int KINDS = 10;

// A block (rows, features) of a data set, and the statistics that it is added to. Strides of x and `present` are bytes,
// also negative ones; an address need not be aligned.
struct Columns {
    Kind kind;
    const void *x;
    int64_t rows, features, row_stride, feature_stride;
    const uint8_t *present; // 0 where a value is null; null: no value is
    int64_t present_row_stride, present_feature_stride;
    double *numbers;  // (7, features): mean, mean_low, m2, m3, m4, minimum, maximum
    int64_t *counts;  // (4, features): finite values, NaN, infinities, nulls
    int64_t totals_stride; // values between two rows of `numbers` and of `counts`
};

struct Arithmetic {
    // Measures x, writes mean and var, normalizes, moves running statistics; returns the number of non-finite channels.
    int64_t (*train)(const Layer &, const Forward &, const Running &);
    void (*backward)(const Layer &, const Backward &);
    void (*normalize)(const Layer &, const Forward &); // by layer.mean and layer.var
    // Mean and biased variance of every channel: the same bits as in train, or, if `exact`, with all sums in float64.
    void (*moments)(const Layer &, const void *x, bool exact);
    int64_t (*update)(int64_t channels, const double *mean, const double *var, double count, const Running &);
    void (*sum_gradients)(const Layer &, const Backward &, const Halves &);  // writes sums, and d_residual if there is one
    void (*input_gradient)(const Layer &, const Backward &, const Halves &); // writes d_x
    void (*add_columns)(const Columns &); // on one thread
};

namespace portable { extern const Arithmetic arithmetic; }
namespace avx2 { extern const Arithmetic arithmetic; }
namespace avx512 { extern const Arithmetic arithmetic; }

} // namespace batchnorm
