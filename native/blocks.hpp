// What is summed over a block of neighbouring values, what a channel's sums come to, and how that is applied.
//
// Sums never see the mean: a block of values that fits the first-level cache is read twice, first for its own mean,
// then for the deviations from it, and blocks are merged in double (Chan, Golub and LeVeque 1979).
#pragma once
#include "arithmetic.hpp"
#include "vectors.hpp"

#include <cmath>

namespace batchnorm::ISA {
namespace {

struct Moments {
    double count = 0, mean = 0, m2 = 0;

    void add(const Moments &other) {
        if (other.count == 0) return;
        const double both = count + other.count;
        add(other, other.count / both);
        count = both;
    }
    // `share` is the part of `other` in both counts together, for callers that know it for many channels at once
    void add(const Moments &other, double share) {
        const double delta = other.mean - mean;
        mean += delta * share;
        m2 += other.m2 + delta * delta * count * share;
    }
};

// Moments of neighbouring values that fit the first-level cache.
template <class T> inline Moments block_moments(const T *x, int64_t count) {
    using W = Wide<T>;
    const int64_t whole = count / LANES * LANES;
    const double one = 1.0 / double(count);
    Vec<T> sums[2] = {};
    for (int64_t i = 0; i < whole; i += LANES) sums[(i / LANES) & 1] += load(x + i);
    double sum = total(sums[0] + sums[1]);
    for (int64_t i = whole; i < count; ++i) sum += widen(x[i]);
    const W center = W(sum * one); // the mean but for rounding, which the sum of deviations puts right
    Vec<T> first[2] = {}, second[2] = {};
    for (int64_t i = 0; i < whole; i += LANES) {
        const Vec<T> deviation = load(x + i) - center;
        first[(i / LANES) & 1] += deviation;
        second[(i / LANES) & 1] += deviation * deviation;
    }
    double d1 = total(first[0] + first[1]), d2 = total(second[0] + second[1]);
    for (int64_t i = whole; i < count; ++i) {
        const W deviation = widen(x[i]) - center;
        d1 += deviation;
        d2 += double(deviation) * double(deviation);
    }
    return {double(count), double(center) + d1 * one, d2 - d1 * d1 * one};
}

// Sums of the gradient, and of its products with x - mean.
struct Products {
    double sum = 0, dot = 0;
    void add(const Products &other) { sum += other.sum, dot += other.dot; }
};

template <class T> inline Products block_products(const T *grad, const T *x, int64_t count, Wide<T> mean) {
    const int64_t whole = count / LANES * LANES;
    Vec<T> sums = {}, dots = {};
    for (int64_t i = 0; i < whole; i += LANES) {
        const Vec<T> g = load(grad + i);
        sums += g;
        dots += g * (load(x + i) - mean);
    }
    Products products{total(sums), total(dots)};
    for (int64_t i = whole; i < count; ++i) {
        products.sum += widen(grad[i]);
        products.dot += double(widen(grad[i])) * double(widen(x[i]) - mean);
    }
    return products;
}

// ---- the coefficients of a channel

template <class W> W or_else(const void *values, int64_t channel, W otherwise) {
    return values ? static_cast<const W *>(values)[channel] : otherwise;
}
template <class W> double rstd(const void *var, int64_t channel, double eps) {
    return 1 / std::sqrt(double(static_cast<const W *>(var)[channel]) + eps);
}

// y = (x - mean) * scale + shift; what rounding left of the mean is in the shift
template <class W> struct Forward {
    W mean, scale, shift;

    // Of stored statistics.
    Forward(const Normalize &job, int64_t c)
        : mean(static_cast<const W *>(job.mean)[c]),
          scale(W(rstd<W>(job.var, c, job.eps) * or_else<W>(job.weight, c, 1))), shift(or_else<W>(job.bias, c, 0)) {}

    // Of a batch, whose statistics are written out.
    Forward(const Train &job, int64_t c, const Moments &moments) : mean(W(moments.mean)) {
        const double residual = moments.mean - double(mean), var = moments.m2 / moments.count;
        static_cast<W *>(job.mean)[c] = mean;
        static_cast<W *>(job.residual)[c] = W(residual);
        static_cast<W *>(job.var)[c] = W(var < 0 ? 0 : var); // NaN stays NaN
        const double slope = rstd<W>(job.var, c, job.eps) * or_else<W>(job.weight, c, 1);
        scale = W(slope);
        shift = W(or_else<W>(job.bias, c, 0) - residual * slope);
    }
};

// d_x = grad * scale - (x - mean) * along - even
template <class W> struct Back {
    W mean, scale, along, even;

    Back(const Backward &job, int64_t c, const Products &products, double count)
        : mean(static_cast<const W *>(job.mean)[c]) {
        const double residual = static_cast<const W *>(job.residual)[c], inverse = rstd<W>(job.var, c, job.eps);
        const double d_weight = (products.dot - residual * products.sum) * inverse;
        static_cast<W *>(job.d_weight)[c] = W(d_weight);
        static_cast<W *>(job.d_bias)[c] = W(products.sum);
        const double slope = inverse * or_else<W>(job.weight, c, 1), per = d_weight / count * inverse * slope;
        scale = W(slope);
        along = W(per);
        even = W(products.sum / count * slope - residual * per);
    }
};

template <class T> inline void apply(const Forward<Wide<T>> &to, const T *x, T *y, int64_t count) {
    const int64_t whole = count / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) store(y + i, (load(x + i) - to.mean) * to.scale + to.shift);
    for (int64_t i = whole; i < count; ++i) y[i] = narrow<T>((widen(x[i]) - to.mean) * to.scale + to.shift);
}

template <class T> inline void apply(const Back<Wide<T>> &to, const T *grad, const T *x, T *d_x, int64_t count) {
    const int64_t whole = count / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        store(d_x + i, load(grad + i) * to.scale - (load(x + i) - to.mean) * to.along - to.even);
    for (int64_t i = whole; i < count; ++i)
        d_x[i] = narrow<T>(widen(grad[i]) * to.scale - (widen(x[i]) - to.mean) * to.along - to.even);
}

} // namespace
} // namespace batchnorm::ISA
