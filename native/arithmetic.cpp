// Training forward, its backward, and normalization by given statistics, for one instruction set (the macro ISA): in
// which order memory is walked. The blocks depend on the shape only, so a result has the same bits for any number of
// threads.
#include "arithmetic.hpp"
#include "blocks.hpp"
#include "threads.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

namespace batchnorm::ISA {
namespace {

constexpr int64_t BLOCK = 2048;  // values in a block of a plane: 8 KiB of float32
constexpr int64_t SMALL = 512;   // planes up to this size are walked in memory order, larger ones channel by channel
constexpr int64_t ROWS = 64;     // rows in a block of rows
constexpr int64_t GRAIN = 32768; // values worth a thread

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
