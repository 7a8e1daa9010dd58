// Vectors of float32 or float64, read from and written to tensors of any type. Included once for each instruction set:
// everything here is local to the translation unit that defines ISA.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace batchnorm::ISA {
namespace {

#ifdef __AVX512F__
constexpr int LANES = 16; // a register of float32
#else
constexpr int LANES = 8; // one register of AVX2, two registers of SSE or NEON
#endif

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

// A tensor's address is aligned to its element only, so vectors are copied by memcpy: one unaligned move when compiled.
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

// ---- a last vector of fewer than LANES values

template <class T> inline Vec<T> load(const T *from, int count, Wide<T> otherwise) {
    T values[LANES];
    for (T &value : values) value = narrow<T>(otherwise);
    std::memcpy(values, from, count * sizeof(T));
    return load(values);
}
template <class T> inline void store(T *to, Vec<T> values, int count) {
    T narrowed[LANES];
    store(narrowed, values);
    std::memcpy(to, narrowed, count * sizeof(T));
}

// Which lanes of a vector have values: all lanes, or the first `count`. The other lanes read as zero.
struct Whole {};
struct First { int count; };
template <class T> inline Vec<T> load(const T *from, Whole) { return load(from); }
template <class T> inline Vec<T> load(const T *from, First lanes) { return load(from, lanes.count, 0); }
template <class T> inline void store(T *to, Vec<T> values, Whole) { store(to, values); }
template <class T> inline void store(T *to, Vec<T> values, First lanes) { store(to, values, lanes.count); }

// The same where memory behind the last value may be read, and set to 0: padding is there.
struct Near { int count; };
template <class V> inline V alive(V values, Near lanes) {
    V distance; // from the first dead lane
    for (int lane = 0; lane < LANES; ++lane) distance[lane] = lane - lanes.count;
    return distance < 0 ? values : V{};
}
template <class T> inline Vec<T> load(const T *from, Near lanes) { return alive(load(from), lanes); }
template <class T> inline void store(T *to, Vec<T> values, Near lanes) { store(to, alive(values, lanes)); }

// Calls visit(i, lanes) for the vectors of `count` values.
template <class Visit> inline void for_vectors(int64_t count, const Visit &visit) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) visit(i, Whole{});
    if (i < count) visit(i, First{int(count - i)});
}

inline Vec64 to_double(Vec32 v) { return __builtin_convertvector(v, Vec64); }
inline Vec64 to_double(Vec64 v) { return v; }

// Values as float64 if `A` is double, else in the type of the arithmetic on T.
template <class A, class T, class Lanes> inline Vec<A> load_as(const T *from, Lanes lanes) {
    if constexpr (std::is_same_v<A, double>) return to_double(load(from, lanes));
    else return load(from, lanes);
}

// The sum of all lanes, added in pairs.
template <class V> inline double total(V values) {
    const Vec64 v = to_double(values);
    double sums[LANES];
    std::memcpy(sums, &v, sizeof sums);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    return sums[0];
}

inline double total(const double *values, int64_t count) {
    Vec64 sums = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sums += read<Vec64>(values + i);
    double sum = i ? total(sums) : 0;
    for (; i < count; ++i) sum += values[i];
    return sum;
}

} // namespace
} // namespace batchnorm::ISA
