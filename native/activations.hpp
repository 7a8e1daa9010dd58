// Activations on vectors: the value a(p), and the gradient g multiplied by a'(p).
//
// Identity and Relu have loops of their own; the others share Curve, which selects a formula for each vector.
#pragma once
#include "arithmetic.hpp"
#include "vectors.hpp"

#include <cmath>

namespace batchnorm::ISA {
namespace {

// exp(x) = 2^n exp(r), r = x - n ln 2 in [-0.35, 0.35]; exp(r) - 1 by its Taylor series, to 2^-28 relative.
struct Exponential {
    Vec32 power, rest; // 2^n and exp(r) - 1

    explicit Exponential(Vec32 x) {
        x = x < -87.0f ? Vec32{} - 87.0f : x; // exp(-87) is near the smallest normal float32; NaN stays NaN
        x = x > 88.0f ? Vec32{} + 88.0f : x;
        const float magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
        const Vec32 shifted = x * 1.44269504f + magic, n = shifted - magic;
        const Vec32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f; // ln 2 in two parts
        rest = ((((((r / 5040 + 1.0f / 720) * r + 1.0f / 120) * r + 1.0f / 24) * r + 1.0f / 6) * r + 0.5f) * r * r) + r;
        const Bits32 bits = (read<Bits32>(&shifted) - 0x4b400000u + 127u) << 23;
        power = read<Vec32>(&bits);
    }
};
inline Vec32 exp(Vec32 x) {
    const Exponential e(x);
    return x < -87.0f ? Vec32{} : e.power * e.rest + e.power;
}
inline Vec32 expm1(Vec32 x) {
    const Exponential e(x);
    return e.power * e.rest + (e.power - 1.0f);
}

inline Vec32 sigmoid(Vec32 p) {
    const Vec32 e = exp(p < 0 ? p : -p); // at most 1: exp of a large positive value would overflow
    return (p < 0 ? e : Vec32{} + 1.0f) / (e + 1.0f);
}

// The standard normal distribution function, with its density.
// erfc(z) = exp(-z^2) t P(t), t = 1 / (1 + 0.375 z): P is fitted to 1.2e-8 relative for z from 0 to 10.
struct Normal {
    Vec32 below, density;

    explicit Normal(Vec32 p) {
        constexpr float P[] = {0.21161348f, 0.21064967f,  0.20531335f, 0.12150554f, 0.27372319f,
                               -0.22941108f, 0.43239653f, -0.28732902f, 0.06153835f};
        const Vec32 z = (p < 0 ? -p : p) * 0.70710678f;
        const Vec32 t = 1.0f / (z * 0.375f + 1.0f);
        Vec32 sum = Vec32{} + P[8];
        for (int k = 7; k >= 0; --k) sum = sum * t + P[k];
        const Vec32 bell = exp(-z * z), tail = 0.5f * bell * sum * t;
        below = p < 0 ? tail : 1.0f - tail;
        density = bell * 0.39894228f;
    }
};

struct Identity {
    template <class V> static V value(V p, const Layer &) { return p; }
    template <class V> static V gradient(V g, V, const Layer &) { return g; }
};

struct Relu {
    template <class V> static V value(V p, const Layer &) { return p <= 0 ? V{} : p; } // NaN stays NaN
    template <class V> static V gradient(V g, V p, const Layer &) { return p > 0 ? g : V{}; }
};

// All other activations; for float64 with the functions of the C library, one lane at a time.
struct Curve {
    static Vec32 value(Vec32 p, const Layer &layer) {
        const float param = float(layer.param);
        switch (layer.act) {
        case Act::leaky_relu: return p > 0 ? p : p * param;
        case Act::elu: return p > 0 ? p : expm1(p) * param;
        case Act::silu: return p * sigmoid(p);
        case Act::gelu: return p * Normal(p).below;
        case Act::hardswish: return p * clipped(p);
        default: return p;
        }
    }
    static Vec32 gradient(Vec32 g, Vec32 p, const Layer &layer) {
        const float param = float(layer.param);
        switch (layer.act) {
        case Act::leaky_relu: return p > 0 ? g : g * param;
        case Act::elu: return p > 0 ? g : g * exp(p) * param;
        case Act::silu: {
            const Vec32 s = sigmoid(p);
            return g * s * (p * (1.0f - s) + 1.0f);
        }
        case Act::gelu: {
            const Normal normal(p);
            return g * (normal.below + p * normal.density);
        }
        case Act::hardswish: return p <= -3.0f ? Vec32{} : p >= 3.0f ? g : g * (p * (1.0f / 3) + 0.5f);
        default: return g;
        }
    }
    static Vec64 value(Vec64 p, const Layer &layer) {
        for (int lane = 0; lane < LANES; ++lane) p[lane] = value(p[lane], layer);
        return p;
    }
    static Vec64 gradient(Vec64 g, Vec64 p, const Layer &layer) {
        for (int lane = 0; lane < LANES; ++lane) g[lane] *= derivative(p[lane], layer);
        return g;
    }

  private:
    static Vec32 clipped(Vec32 p) { // min(max(p + 3, 0), 6) / 6, exact at both ends
        const Vec32 sixth = p * (1.0f / 6) + 0.5f;
        return p <= -3.0f ? Vec32{} : p >= 3.0f ? Vec32{} + 1.0f : sixth;
    }
    static double below(double p) { return 0.5 * std::erfc(-p * 0.70710678118654752440); }
    static double value(double p, const Layer &layer) {
        switch (layer.act) {
        case Act::leaky_relu: return p > 0 ? p : p * layer.param;
        case Act::elu: return p > 0 ? p : std::expm1(p) * layer.param;
        case Act::silu: return p / (1 + std::exp(-p));
        case Act::gelu: return p * below(p);
        case Act::hardswish: return p <= -3 ? 0 : p >= 3 ? p : p * (p + 3) / 6;
        default: return p;
        }
    }
    static double derivative(double p, const Layer &layer) {
        switch (layer.act) {
        case Act::leaky_relu: return p > 0 ? 1 : layer.param;
        case Act::elu: return p > 0 ? 1 : std::exp(p) * layer.param;
        case Act::silu: {
            const double s = 1 / (1 + std::exp(-p));
            return s * (1 + p * (1 - s));
        }
        case Act::gelu: return below(p) + p * std::exp(-0.5 * p * p) * 0.39894228040143267794;
        case Act::hardswish: return p <= -3 ? 0 : p >= 3 ? 1 : p / 3 + 0.5;
        default: return 1;
        }
    }
};

} // namespace
} // namespace batchnorm::ISA
