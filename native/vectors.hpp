// Vectors of sixteen lanes of any type that a tensor has. Included once for each instruction set: everything here is
// local to the translation unit that defines ISA.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace batchnorm::ISA {
namespace {

constexpr int LANES = 16; // a register of AVX-512, two of AVX2, four of SSE or NEON

struct bfloat16 { uint16_t bits; };
struct float16 { _Float16 value; };

template <class T> struct WideOf { using type = float; };
template <> struct WideOf<double> { using type = double; };
template <class T> using Wide = typename WideOf<T>::type;

typedef float Vec32 __attribute__((vector_size(LANES * 4)));
typedef double Vec64 __attribute__((vector_size(LANES * 8)));
typedef uint32_t Bits32 __attribute__((vector_size(LANES * 4)));
typedef uint16_t Bits16 __attribute__((vector_size(LANES * 2)));
template <class T> struct VecOf { using type = Vec32; };
template <> struct VecOf<double> { using type = Vec64; };
template <class T> using Vec = typename VecOf<T>::type;

// Tensors are aligned to their element only, so vectors go through memcpy, which compiles to one unaligned move.
template <class To> inline To read(const void *from) {
    To value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <class V> inline void write(void *to, V values) { std::memcpy(to, &values, sizeof values); }

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    return read<float>(&bits);
}
inline float widen(float16 x) { return float(x.value); }

template <class T> inline T narrow(Wide<T> x) { return T(x); }
template <> inline bfloat16 narrow<bfloat16>(float x) {
    const uint32_t bits = read<uint32_t>(&x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)}; // NaN stays NaN
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};                // to nearest, ties to even
}
template <> inline float16 narrow<float16>(float x) { return {_Float16(x)}; }

template <class T> inline Vec<T> load(const T *from) {
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
        return read<Vec<T>>(from);
    } else if constexpr (std::is_same_v<T, bfloat16>) {
        const Bits32 bits = __builtin_convertvector(read<Bits16>(from), Bits32) << 16;
        return read<Vec32>(&bits);
    } else {
        Vec32 wide;
        for (int lane = 0; lane < LANES; ++lane) wide[lane] = float(from[lane].value);
        return wide;
    }
}

template <class T> inline void store(T *to, Vec<T> values) {
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
        write(to, values);
    } else if constexpr (std::is_same_v<T, bfloat16>) {
        const Bits32 bits = read<Bits32>(&values);
        const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const Bits32 quiet = (bits >> 16) | 0x40u;
        const Bits32 chosen = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
        write(to, __builtin_convertvector(chosen, Bits16));
    } else {
        for (int lane = 0; lane < LANES; ++lane) to[lane].value = _Float16(values[lane]);
    }
}

// The sum of all lanes, in pairs: ((0 + 8) + (4 + 12)) + ...
inline double total(Vec32 v) {
    typedef float Half __attribute__((vector_size(32)));
    typedef float Quarter __attribute__((vector_size(16)));
    const Half h = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    const Quarter q = __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
    return (double(q[0]) + double(q[2])) + (double(q[1]) + double(q[3]));
}
inline double total(Vec64 v) {
    double sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += v[lane];
    return sum;
}

} // namespace
} // namespace batchnorm::ISA
