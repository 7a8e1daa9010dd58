// From a channel's sums: its mean and variance, and the coefficients of y and d_x.
//
// Sums are of deviations from `shift`, a guess of the mean. With d = (x - shift) unit, and sums over n values,
//
//     mean = shift + sum d / (n unit)     var = (sum d^2 - (sum d)^2 / n) / (n unit^2)
//
// This loses no digits if the guess is within one or two standard deviations of the mean. `unit` is 1, or a power of
// two that keeps the squares of very large values finite.
#pragma once
#include "arithmetic.hpp"
#include "vectors.hpp"

#include <cmath>
#include <type_traits>

namespace batchnorm::ISA {
namespace {

// Sums of d and d^2; or sums of a gradient g and of g (x - mean).
struct Sums {
    double first = 0, second = 0;
    void add(const Sums &other) { first += other.first, second += other.second; }
};

// The guess around which a channel is summed.
template <class A> struct Guess {
    A shift = 0, unit = 1;

    // Improves the guess from the sums around it; returns whether the sums must be computed again around the new guess.
    bool improve(const Sums &sums, double count) {
        const double off = sums.first / count, spread = sums.second / count - off * off;
        if (!std::isfinite(sums.second)) { // too large to be squared, or not finite
            const A before = unit;
            shift = 0, unit = std::is_same_v<A, double> ? A(0x1p-540) : A(0x1p-66);
            return unit != before;
        }
        if (off * off <= 3 * spread || sums.second == 0) return false;
        const A before = shift;
        shift = A(double(shift) + off / double(unit));
        return shift != before;
    }
    A operator[](int field) const { return field == 0 ? shift * unit : unit; }
    void finish(const Sums &sums, double count, double &mean, double &var) const {
        const double off = sums.first / count, spread = sums.second / count - off * off;
        mean = double(shift) + off / double(unit);
        var = (spread < 0 ? 0 : spread) / double(unit) / double(unit); // NaN stays NaN
    }
};

template <class W> inline double or_else(const void *values, int64_t channel, double otherwise) {
    return values ? double(static_cast<const W *>(values)[channel]) : otherwise;
}

// p = (x - mean) scale + shift, and x - mean = (p - shift) unscale; the rounding error of `mean` is part of `shift`.
// d_x = grad back - (x - mean) rstd along - even; rstd is not part of `along`, because its square can underflow to 0.
enum Field { MEAN, SCALE, SHIFT, UNSCALE, BACK, RSTD, ALONG, EVEN, FIELDS };

template <class W> struct Coefficients {
    W fields[FIELDS] = {};

    W operator[](int field) const { return fields[field]; }

    Coefficients(const Layer &layer, int64_t c) {
        const double slope = rstd(layer, c) * or_else<W>(layer.weight, c, 1);
        fields[MEAN] = W(layer.mean[c]);
        fields[SCALE] = W(slope);
        fields[SHIFT] = W(or_else<W>(layer.bias, c, 0) - low(layer, c) * slope);
        fields[UNSCALE] = W(1 / slope);
    }
    // Sums of g and g z, from sums of g and of g (x - mean), where `mean` is the rounded mean.
    static Sums of_gradient(const Layer &layer, int64_t c, const Sums &sums) {
        return {sums.first, (sums.second - low(layer, c) * sums.first) * rstd(layer, c)};
    }
    // Also the coefficients of d_x, from the means of g and g z; null if mean and variance are constants.
    Coefficients(const Layer &layer, int64_t c, const Sums *means) : Coefficients(layer, c) {
        const double inverse = rstd(layer, c), slope = inverse * or_else<W>(layer.weight, c, 1);
        fields[BACK] = W(slope);
        if (!means) return;
        fields[RSTD] = W(inverse);
        fields[ALONG] = W(means->second * slope);
        fields[EVEN] = W((means->first - low(layer, c) * inverse * means->second) * slope);
    }

  private:
    static double rstd(const Layer &layer, int64_t c) { return 1 / std::sqrt(layer.var[c] + layer.eps); }
    static double low(const Layer &layer, int64_t c) { return layer.mean[c] - double(W(layer.mean[c])); }
};

} // namespace
} // namespace batchnorm::ISA
