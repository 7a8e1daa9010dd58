// Training forward, its backward, and normalization by given statistics, for one instruction set (the macro ISA).
//
// Sums never see the mean: a block of values that fits the first-level cache is read twice, first for its own mean,
// then for the deviations from it, and blocks are merged in double (Chan, Golub and LeVeque 1979). The blocks depend
// on the shape only, so a result has the same bits for any number of threads.
#include "arithmetic.hpp"
#include "threads.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

namespace batchnorm::ISA {
namespace {

constexpr int LANES = 16;         // values in one vector: a register of AVX-512, two of AVX2, four of SSE or NEON
constexpr int64_t BLOCK = 2048;   // values in a block of a plane: 8 KiB of float32
constexpr int64_t SMALL = 512;    // planes up to this size are walked in memory order, larger ones channel by channel
constexpr int64_t ROWS = 64;      // rows in a block of rows
constexpr int64_t GRAIN = 32768;  // values worth a thread

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

// Items (rows, or examples) in tasks of several, by shape alone: about 64 tasks, none too small for a thread.
struct Tasks {
    int64_t items, each, count;
    Tasks(int64_t items, int64_t values_each, int64_t multiple) : items(items) {
        const int64_t worth = std::max(items / 64, GRAIN / std::max<int64_t>(1, values_each));
        each = (worth / multiple + 1) * multiple;
        count = (items + each - 1) / each;
    }
    template <class Work> void run(const Work &work) const {
        parallel_for(count, 1, [&](int64_t task) { work(task, task * each, std::min(items, (task + 1) * each)); });
    }
};

// ---- large planes: one channel after the other, so that its second reading comes from the cache

// Calls visit(offset, count) for the blocks of one channel, in order.
template <class Visit> void for_blocks(const Shape &shape, int64_t channel, const Visit &visit) {
    for (int64_t n = 0; n < shape.outer; ++n) {
        const int64_t start = (n * shape.channels + channel) * shape.inner;
        for (int64_t i = 0; i < shape.inner; i += BLOCK) visit(start + i, std::min(BLOCK, shape.inner - i));
    }
}

template <class Work> void for_channels(const Shape &shape, const Work &work) {
    parallel_for(shape.channels, std::max<int64_t>(1, GRAIN / (shape.outer * shape.inner)), work);
}

template <class T> void train_channels(const Train &job) {
    const T *x = static_cast<const T *>(job.x);
    T *y = static_cast<T *>(job.y);
    for_channels(job.shape, [&](int64_t c) {
        Moments moments;
        for_blocks(job.shape, c, [&](int64_t at, int64_t count) { moments.add(block_moments(x + at, count)); });
        const Forward<Wide<T>> to(job, c, moments);
        for_blocks(job.shape, c, [&](int64_t at, int64_t count) { apply(to, x + at, y + at, count); });
    });
}

template <class T> void backward_channels(const Backward &job) {
    const T *x = static_cast<const T *>(job.x), *grad = static_cast<const T *>(job.grad);
    T *d_x = static_cast<T *>(job.d_x);
    for_channels(job.shape, [&](int64_t c) {
        const auto mean = static_cast<const Wide<T> *>(job.mean)[c];
        Products products;
        for_blocks(job.shape, c, [&](int64_t at, int64_t count) {
            products.add(block_products(grad + at, x + at, count, mean));
        });
        const Back<Wide<T>> to(job, c, products, double(job.shape.outer * job.shape.inner));
        for_blocks(job.shape, c, [&](int64_t at, int64_t count) { apply(to, grad + at, x + at, d_x + at, count); });
    });
}

// ---- small planes: in memory order, with partial results of every channel for each task

template <class T> void train_planes(const Train &job) {
    const T *x = static_cast<const T *>(job.x);
    T *y = static_cast<T *>(job.y);
    const int64_t channels = job.shape.channels, inner = job.shape.inner;
    const Tasks tasks(job.shape.outer, channels * inner, 1);
    std::vector<Moments> parts(tasks.count * channels);
    tasks.run([&](int64_t task, int64_t begin, int64_t end) {
        Moments *part = &parts[task * channels];
        for (int64_t n = begin; n < end; ++n) {
            const double share = 1.0 / double(n - begin + 1);
            for (int64_t c = 0; c < channels; ++c) {
                part[c].add(block_moments(x + (n * channels + c) * inner, inner), share);
                part[c].count += double(inner);
            }
        }
    });
    std::vector<Forward<Wide<T>>> to;
    to.reserve(channels);
    for (int64_t c = 0; c < channels; ++c) {
        Moments moments;
        for (int64_t task = 0; task < tasks.count; ++task) moments.add(parts[task * channels + c]);
        to.emplace_back(job, c, moments);
    }
    tasks.run([&](int64_t, int64_t begin, int64_t end) {
        for (int64_t plane = begin * channels; plane < end * channels; ++plane)
            apply(to[plane % channels], x + plane * inner, y + plane * inner, inner);
    });
}

template <class T> void backward_planes(const Backward &job) {
    const T *x = static_cast<const T *>(job.x), *grad = static_cast<const T *>(job.grad);
    T *d_x = static_cast<T *>(job.d_x);
    const auto *mean = static_cast<const Wide<T> *>(job.mean);
    const int64_t channels = job.shape.channels, inner = job.shape.inner;
    const Tasks tasks(job.shape.outer, channels * inner, 1);
    std::vector<Products> parts(tasks.count * channels);
    tasks.run([&](int64_t task, int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n)
            for (int64_t c = 0; c < channels; ++c) {
                const int64_t at = (n * channels + c) * inner;
                parts[task * channels + c].add(block_products(grad + at, x + at, inner, mean[c]));
            }
    });
    std::vector<Back<Wide<T>>> to;
    to.reserve(channels);
    for (int64_t c = 0; c < channels; ++c) {
        Products products;
        for (int64_t task = 0; task < tasks.count; ++task) products.add(parts[task * channels + c]);
        to.emplace_back(job, c, products, double(job.shape.outer * inner));
    }
    tasks.run([&](int64_t, int64_t begin, int64_t end) {
        for (int64_t plane = begin * channels; plane < end * channels; ++plane) {
            const int64_t at = plane * inner;
            apply(to[plane % channels], grad + at, x + at, d_x + at, inner);
        }
    });
}

template <class T> void normalize_planes(const Normalize &job) {
    const T *x = static_cast<const T *>(job.x);
    T *y = static_cast<T *>(job.y);
    const int64_t planes = job.shape.outer * job.shape.channels, inner = job.shape.inner;
    parallel_for(planes, std::max<int64_t>(1, GRAIN / inner), [&](int64_t plane) {
        apply(Forward<Wide<T>>(job, plane % job.shape.channels), x + plane * inner, y + plane * inner, inner);
    });
}

// ---- rows: the channels of one position are neighbours

// Coefficients of each channel as arrays, to be read a vector at a time.
template <class W, int Fields> struct Columns {
    int64_t channels;
    std::vector<W> values;
    explicit Columns(int64_t channels) : channels(channels), values(Fields * channels) {}
    W *operator[](int field) { return values.data() + field * channels; }
    const W *operator[](int field) const { return values.data() + field * channels; }
};

// Calls visit.template operator()<K>(c) for K vectors of channels from c on, as many at a time as registers allow, and
// single(c) for each channel that is left over.
template <class Visit, class Single> inline void for_columns(int64_t channels, const Visit &visit, const Single &single) {
    int64_t c = 0;
    for (; c + 4 * LANES <= channels; c += 4 * LANES) visit.template operator()<4>(c);
    for (; c + LANES <= channels; c += LANES) visit.template operator()<1>(c);
    for (; c < channels; ++c) single(c);
}

template <class T> void rows_moments(const T *x, int64_t rows, int64_t channels, double share, Moments *moments) {
    using W = Wide<T>;
    const double n = double(rows);
    const auto merge = [&](int64_t c, double center, double d1, double d2) {
        moments[c].add({n, center + d1 / n, d2 - d1 * d1 / n}, share);
        moments[c].count += n;
    };
    for_columns(
        channels,
        [&]<int K>(int64_t c) {
            Vec<T> center[K] = {}, first[K] = {}, second[K] = {};
            for (int64_t r = 0; r < rows; ++r)
                for (int k = 0; k < K; ++k) center[k] += load(x + r * channels + c + k * LANES);
            for (int k = 0; k < K; ++k) center[k] /= W(rows);
            for (int64_t r = 0; r < rows; ++r)
                for (int k = 0; k < K; ++k) {
                    const Vec<T> deviation = load(x + r * channels + c + k * LANES) - center[k];
                    first[k] += deviation;
                    second[k] += deviation * deviation;
                }
            for (int k = 0; k < K; ++k)
                for (int lane = 0; lane < LANES; ++lane)
                    merge(c + k * LANES + lane, center[k][lane], first[k][lane], second[k][lane]);
        },
        [&](int64_t c) {
            W center = 0, first = 0, second = 0;
            for (int64_t r = 0; r < rows; ++r) center += widen(x[r * channels + c]);
            center /= W(rows);
            for (int64_t r = 0; r < rows; ++r) {
                const W deviation = widen(x[r * channels + c]) - center;
                first += deviation;
                second += deviation * deviation;
            }
            merge(c, center, first, second);
        });
}

template <class T> void rows_products(const T *grad, const T *x, int64_t rows, int64_t channels, const Wide<T> *mean,
                                      Products *products) {
    for_columns(
        channels,
        [&]<int K>(int64_t c) {
            Vec<T> sum[K] = {}, dot[K] = {}, center[K];
            for (int k = 0; k < K; ++k) center[k] = load(mean + c + k * LANES);
            for (int64_t r = 0; r < rows; ++r)
                for (int k = 0; k < K; ++k) {
                    const int64_t at = r * channels + c + k * LANES;
                    const Vec<T> g = load(grad + at);
                    sum[k] += g;
                    dot[k] += g * (load(x + at) - center[k]);
                }
            for (int k = 0; k < K; ++k)
                for (int lane = 0; lane < LANES; ++lane)
                    products[c + k * LANES + lane].add({sum[k][lane], dot[k][lane]});
        },
        [&](int64_t c) {
            Products column;
            for (int64_t r = 0; r < rows; ++r) {
                const auto g = widen(grad[r * channels + c]);
                column.add({g, double(g) * double(widen(x[r * channels + c]) - mean[c])});
            }
            products[c].add(column);
        });
}

enum ForwardField { MEAN, SCALE, SHIFT };
enum BackField { EVEN = 2, ALONG };

template <class T> void apply_rows(const Columns<Wide<T>, 3> &to, const T *x, T *y, int64_t rows) {
    const int64_t channels = to.channels;
    const auto *mean = to[MEAN], *scale = to[SCALE], *shift = to[SHIFT];
    for (int64_t r = 0; r < rows; ++r, x += channels, y += channels) {
        int64_t c = 0;
        for (; c + LANES <= channels; c += LANES)
            store(y + c, (load(x + c) - load(mean + c)) * load(scale + c) + load(shift + c));
        for (; c < channels; ++c) y[c] = narrow<T>((widen(x[c]) - mean[c]) * scale[c] + shift[c]);
    }
}

template <class W, class Make> Columns<W, 3> forward_columns(int64_t channels, const Make &make) {
    Columns<W, 3> to(channels);
    for (int64_t c = 0; c < channels; ++c) {
        const Forward<W> one = make(c);
        to[MEAN][c] = one.mean, to[SCALE][c] = one.scale, to[SHIFT][c] = one.shift;
    }
    return to;
}

template <class T> void train_rows(const Train &job) {
    const T *x = static_cast<const T *>(job.x);
    T *y = static_cast<T *>(job.y);
    const int64_t channels = job.shape.channels;
    const Tasks tasks(job.shape.outer, channels, ROWS);
    std::vector<Moments> parts(tasks.count * channels);
    tasks.run([&](int64_t task, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row += ROWS) {
            const int64_t rows = std::min(ROWS, end - row);
            const double share = double(rows) / double(row - begin + rows);
            rows_moments(x + row * channels, rows, channels, share, &parts[task * channels]);
        }
    });
    const auto to = forward_columns<Wide<T>>(channels, [&](int64_t c) {
        Moments moments;
        for (int64_t task = 0; task < tasks.count; ++task) moments.add(parts[task * channels + c]);
        return Forward<Wide<T>>(job, c, moments);
    });
    tasks.run([&](int64_t, int64_t begin, int64_t end) {
        apply_rows(to, x + begin * channels, y + begin * channels, end - begin);
    });
}

template <class T> void backward_rows(const Backward &job) {
    using W = Wide<T>;
    const T *x = static_cast<const T *>(job.x), *grad = static_cast<const T *>(job.grad);
    T *d_x = static_cast<T *>(job.d_x);
    const int64_t channels = job.shape.channels;
    const Tasks tasks(job.shape.outer, channels, ROWS);
    std::vector<Products> parts(tasks.count * channels);
    tasks.run([&](int64_t task, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row += ROWS)
            rows_products(grad + row * channels, x + row * channels, std::min(ROWS, end - row), channels,
                          static_cast<const W *>(job.mean), &parts[task * channels]);
    });
    Columns<W, 4> to(channels);
    for (int64_t c = 0; c < channels; ++c) {
        Products products;
        for (int64_t task = 0; task < tasks.count; ++task) products.add(parts[task * channels + c]);
        const Back<W> one(job, c, products, double(job.shape.outer));
        to[MEAN][c] = one.mean, to[SCALE][c] = one.scale, to[EVEN][c] = one.even, to[ALONG][c] = one.along;
    }
    const W *mean = to[MEAN], *scale = to[SCALE], *even = to[EVEN], *along = to[ALONG];
    tasks.run([&](int64_t, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t at = row * channels;
            int64_t c = 0;
            for (; c + LANES <= channels; c += LANES)
                store(d_x + at + c, load(grad + at + c) * load(scale + c) -
                                        (load(x + at + c) - load(mean + c)) * load(along + c) - load(even + c));
            for (; c < channels; ++c)
                d_x[at + c] = narrow<T>(widen(grad[at + c]) * scale[c] - (widen(x[at + c]) - mean[c]) * along[c] - even[c]);
        }
    });
}

template <class T> void normalize_rows(const Normalize &job) {
    const T *x = static_cast<const T *>(job.x);
    T *y = static_cast<T *>(job.y);
    const int64_t channels = job.shape.channels;
    const auto to = forward_columns<Wide<T>>(channels, [&](int64_t c) { return Forward<Wide<T>>(job, c); });
    Tasks(job.shape.outer, channels, 1).run([&](int64_t, int64_t begin, int64_t end) {
        apply_rows(to, x + begin * channels, y + begin * channels, end - begin);
    });
}

// ---- running statistics

template <class W> int64_t update_running(const Update &job) {
    const W *mean = static_cast<const W *>(job.mean), *var = static_cast<const W *>(job.var);
    W *running_mean = static_cast<W *>(job.running_mean), *running_var = static_cast<W *>(job.running_var);
    const W momentum = W(job.momentum), unbias = W(job.unbias);
    const auto finite = [&](int64_t c) { return std::isfinite(mean[c]) && std::isfinite(var[c] * unbias); };
    int64_t skipped = 0;
    for (int64_t c = 0; c < job.channels; ++c) skipped += !finite(c);
    if (job.whole && skipped) return skipped;
    for (int64_t c = 0; c < job.channels; ++c) {
        if (!finite(c)) continue;
        const W m = running_mean[c] + momentum * (mean[c] - running_mean[c]);
        const W v = running_var[c] + momentum * (var[c] * unbias - running_var[c]);
        if (std::isfinite(m)) running_mean[c] = m;
        if (std::isfinite(v)) running_var[c] = v;
    }
    return skipped;
}

// ---- which loop for which type and shape

// Calls run.template operator()<T>() with the C++ type that `type` names.
template <class Run> void with_type(Type type, const Run &run) {
    switch (type) {
    case Type::float32: return run.template operator()<float>();
    case Type::float64: return run.template operator()<double>();
    case Type::bfloat16: return run.template operator()<bfloat16>();
    case Type::float16: return run.template operator()<float16>();
    }
}

void train(Type type, const Train &job) {
    with_type(type, [&]<class T>() {
        if (job.shape.inner == 1) return train_rows<T>(job);
        job.shape.inner <= SMALL ? train_planes<T>(job) : train_channels<T>(job);
    });
}

void backward(Type type, const Backward &job) {
    with_type(type, [&]<class T>() {
        if (job.shape.inner == 1) return backward_rows<T>(job);
        job.shape.inner <= SMALL ? backward_planes<T>(job) : backward_channels<T>(job);
    });
}

void normalize(Type type, const Normalize &job) {
    with_type(type, [&]<class T>() { job.shape.inner == 1 ? normalize_rows<T>(job) : normalize_planes<T>(job); });
}

int64_t update(Type type, const Update &job) {
    return type == Type::float64 ? update_running<double>(job) : update_running<float>(job);
}

} // namespace

extern const Arithmetic arithmetic{train, backward, normalize, update};

} // namespace batchnorm::ISA
