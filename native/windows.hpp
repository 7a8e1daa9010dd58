// Loops over a window of a tensor: some rows of neighbouring values. A row is part of one channel (a large plane), or a
// sequence of whole small planes of several channels, or one value of each of several channels.
#pragma once
#include "activations.hpp"
#include "channels.hpp"

#include <algorithm>
#include <new>

namespace batchnorm::ISA {
namespace {

struct Window {
    int64_t at, rows, columns, stride; // the first value; rows of `columns` values, `stride` apart
    int64_t channel, channels;         // the first channel, the number of channels
    int64_t run;                       // neighbouring values of one channel, if there are several channels

    // Calls visit(channel, begin, end) for the columns of each run of one channel.
    template <class Visit> void for_runs(const Visit &visit) const {
        const int64_t length = channels == 1 ? columns : run;
        int64_t c = 0;
        for (int64_t column = 0; column < columns; column += length, c = c + 1 == channels ? 0 : c + 1)
            visit(c, column, column + length);
    }
};

constexpr int64_t BLOCK = 4096; // most values that are summed in float32, in 64 or more lanes, before float64
constexpr int64_t ROWS = 64;    // the same for the values of a column

template <class T, class Pointer> inline auto values_at(Pointer pointer, int64_t at) {
    using P = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const T *, T *>;
    return pointer ? static_cast<P>(pointer) + at : nullptr;
}

// ---- values for each column, or one for all

constexpr std::align_val_t ALIGNED{64}; // a vector across two cache lines takes twice as long

template <class V> struct Array {
    V *values;
    explicit Array(int64_t count) : values(new (ALIGNED) V[count]) {}
    Array(const Array &) = delete;
    ~Array() { operator delete[](values, ALIGNED); }
    V *operator+(int64_t i) { return values + i; }
    V &operator[](int64_t i) { return values[i]; }
};

inline int64_t padded(int64_t columns) { return (columns + LANES - 1) / LANES * LANES; }

// `fields` values of one column, in registers: in memory the compiler would have to read them again after every store.
template <class W, int fields> struct Values {
    Vec<W> vectors[fields];
    Vec<W> operator[](int field) const { return vectors[field]; }
};
template <class W, int fields> struct One {
    static constexpr bool varies = false;
    Values<W, fields> values;
    const Values<W, fields> &at(int64_t) const { return values; }
};
template <class W, int fields> struct Each {
    static constexpr bool varies = true;
    const W *arrays;
    int64_t width;
    Values<W, fields> at(int64_t column) const {
        Values<W, fields> here;
        for (int f = 0; f < fields; ++f) here.vectors[f] = load(arrays + f * width + column);
        return here;
    }
};

// Calls visit(each), where each.at(column) has channels[c][0] to channels[c][fields - 1] of the column's channel c.
template <class W, int fields, class Channel, class Visit>
inline void spread(const Window &window, const Channel *channels, const Visit &visit) {
    if (window.channels == 1) {
        One<W, fields> one;
        for (int f = 0; f < fields; ++f) one.values.vectors[f] = Vec<W>{} + (*channels)[f];
        return visit(one);
    }
    const int64_t width = padded(window.columns);
    Array<W> arrays(fields * width);
    for (int f = 0; f < fields; ++f) std::fill(arrays + f * width + window.columns, arrays + (f + 1) * width, W(0));
    for (int f = 0; f < fields; ++f)
        window.for_runs([&, array = arrays + f * width](int64_t c, int64_t begin, int64_t end) {
            const W value = channels[c][f];
            for (int64_t column = begin; column < end; ++column) array[column] = value;
        });
    visit(Each<W, fields>{arrays.values, width});
}

// ---- sums

inline void add_to(double *sums, Vec64 values) { write(sums, read<Vec64>(sums) + values); }

// R rows that are read at the same time, with a distance of `apart` rows: then they are in different pages, which
// processors prefetch much better than neighbouring rows.
struct Strides {
    int64_t apart, next, groups; // `next`: from a group's first row to that of the next group
    Strides(const Window &window, int64_t R) : groups(window.rows / R) {
        const bool neighbours = window.stride == window.columns;
        apart = neighbours ? groups : 1, next = neighbours ? 1 : R;
    }
};

// Adds R rows to two sums for each column. visit(first, second, i, values of the column, lanes) adds one vector.
template <int R, class W, class Each, class Visit>
inline void add_rows(const Window &window, int64_t row, int64_t apart, const Each &each, W *firsts, W *seconds,
                     const Visit &visit) {
    const auto add = [&]<int K>(int64_t column, auto lanes) { // K vectors, so that their additions overlap
        std::decay_t<decltype(each.at(0))> here[K];
        Vec<W> first[K], second[K];
        for (int k = 0; k < K; ++k) {
            const int64_t at = column + k * LANES;
            here[k] = each.at(at), first[k] = load(firsts + at), second[k] = load(seconds + at);
        }
        for (int64_t r = 0; r < R; ++r)
            for (int k = 0; k < K; ++k)
                visit(first[k], second[k], (row + r * apart) * window.stride + column + k * LANES, here[k], lanes);
        for (int k = 0; k < K; ++k) store(firsts + column + k * LANES, first[k]), store(seconds + column + k * LANES, second[k]);
    };
    constexpr int K = R == 1 ? 1 : LANES >= 16 ? 4 : 2; // as many as the registers allow
    int64_t column = 0;
    for (; column + K * LANES <= window.columns; column += K * LANES) add.template operator()<K>(column, Whole{});
    for (; K > 1 && column + LANES <= window.columns; column += LANES) add.template operator()<1>(column, Whole{});
    if (column < window.columns) add.template operator()<1>(column, First{int(window.columns - column)});
}

// The sums of each column over all rows, in float64.
template <class W, class Each, class Visit>
inline void sum_columns(const Window &window, const Each &each, double *firsts, double *seconds, const Visit &visit) {
    const int64_t width = padded(window.columns);
    Array<W> parts(2 * width);
    constexpr int R = 8;
    const Strides strides(window, R);
    const auto flush = [&] {
        for (int64_t column = 0; column < width; column += LANES) {
            add_to(firsts + column, to_double(load(parts + column)));
            add_to(seconds + column, to_double(load(parts + width + column)));
        }
        std::fill_n(parts.values, 2 * width, W(0));
    };
    std::fill_n(parts.values, 2 * width, W(0));
    for (int64_t group = 0; group < strides.groups; ++group) {
        add_rows<R>(window, group * strides.next, strides.apart, each, parts.values, parts + width, visit);
        if (group % (ROWS / R) == ROWS / R - 1) flush();
    }
    for (int64_t row = strides.groups * R; row < window.rows; ++row)
        add_rows<1>(window, row, 1, each, parts.values, parts + width, visit);
    flush();
}

// The sums of one channel over rows and columns.
template <class W, class One, class Visit> inline Sums sum_rows(const Window &window, const One &one, const Visit &visit) {
    const auto here = one.at(0);
    Sums sums;
    for (int64_t row = 0; row < window.rows; ++row)
        for (int64_t begin = 0; begin < window.columns; begin += BLOCK) {
            const int64_t at = row * window.stride;
            int64_t i = at + begin;
            const int64_t end = at + std::min(begin + BLOCK, window.columns);
            Vec<W> first[4] = {}, second[4] = {};
            for (; i + 4 * LANES <= end; i += 4 * LANES)
                for (int k = 0; k < 4; ++k) visit(first[k], second[k], i + k * LANES, here, Whole{});
            for (; i + LANES <= end; i += LANES) visit(first[0], second[0], i, here, Whole{});
            if (i < end) visit(first[1], second[1], i, here, First{int(end - i)});
            sums.add({total((first[0] + first[1]) + (first[2] + first[3])),
                      total((second[0] + second[1]) + (second[2] + second[3]))});
        }
    return sums;
}

// Adds the sums of a window to those of its channels. visit must add zero in lanes without a value.
template <class W, int fields, class Channel, class Visit>
inline void sum(const Window &window, const Channel *channels, Sums *sums, const Visit &visit) {
    spread<W, fields>(window, channels, [&](const auto &each) {
        if constexpr (!std::decay_t<decltype(each)>::varies) {
            sums->add(sum_rows<W>(window, each, visit));
        } else {
            const int64_t width = padded(window.columns);
            Array<double> columns(2 * width);
            std::fill_n(columns.values, 2 * width, 0.0);
            sum_columns<W>(window, each, columns.values, columns + width, visit);
            window.for_runs([&](int64_t c, int64_t begin, int64_t end) {
                sums[c].add({total(columns + begin, end - begin), total(columns + width + begin, end - begin)});
            });
        }
    });
}

template <class V> inline V alive(V values, Whole) { return values; }
template <class V> inline V alive(V values, First lanes) {
    for (int lane = lanes.count; lane < LANES; ++lane) values[lane] = 0;
    return values;
}

// Adds a value's deviation from its channel's guess, and the square of the deviation, in the type A.
template <class T, class A> auto moments_of(const T *x) {
    return [x](Vec<A> &first, Vec<A> &second, int64_t i, const Values<A, 2> &guess, auto lanes) {
        const Vec<A> deviation = alive(load_as<A>(x + i, lanes) * guess[1] - guess[0], lanes);
        first += deviation;
        second += deviation * deviation;
    };
}

// Sums of deviations from each channel's guess, and of their squares, in the type A.
template <class T, class A> void sum_moments(const T *x, const Window &window, const Guess<A> *guesses, Sums *sums) {
    sum<A, 2>(window, guesses, sums, moments_of<T, A>(x + window.at));
}

// ---- values and gradients

// Calls visit(i, values of the column, lanes) for all vectors of a window.
template <class Each, class Visit> inline void for_values(const Window &window, const Each &each, const Visit &visit) {
    const int64_t rows = window.rows, columns = window.columns, stride = window.stride;
    constexpr int R = Each::varies ? 4 : 1; // each column's values are read once for R rows
    const Strides strides(window, R);
    for (int64_t group = 0; group < strides.groups; ++group)
        for_vectors(columns, [&](int64_t column, auto lanes) {
            const auto here = each.at(column);
            for (int64_t r = 0; r < R; ++r)
                visit((group * strides.next + r * strides.apart) * stride + column, here, lanes);
        });
    for (int64_t row = strides.groups * R; row < rows; ++row)
        for_vectors(columns, [&](int64_t column, auto lanes) { visit(row * stride + column, each.at(column), lanes); });
}

// x - mean, and p, the value before the activation. `other` is the residual, or y in place of p.
template <class T> struct Inside { Vec<T> deviation, p; };

template <bool with_other, class T, class C, class Lanes>
inline Inside<T> inside(const T *x, const T *other, bool other_is_y, const C &of, Lanes lanes) {
    const Vec<T> deviation = load(x, lanes) - of[MEAN];
    const Vec<T> p = deviation * of[SCALE] + of[SHIFT];
    if constexpr (!with_other) return {deviation, p};
    const Vec<T> o = load(other, lanes);
    return {deviation, other_is_y ? o : p + o};
}

// The same from y of a leaky ReLU.
template <class T, class C, class Lanes> inline Inside<T> inside_again(const T *y, double slope, const C &of, Lanes lanes) {
    const Vec<T> value = load(y, lanes), p = value > 0 ? value : value * Wide<T>(1 / slope);
    return {(p - of[SHIFT]) * of[UNSCALE], p};
}

// Writes y for values of the tensors from index `at` on.
template <class T, class A, bool with_residual> auto forward_of(const Layer &layer, const Forward &job, int64_t at) {
    const T *x = values_at<T>(job.x, at), *residual = values_at<T>(job.residual, at);
    T *y = values_at<T>(job.y, at);
    return [=, &layer](int64_t i, const Values<Wide<T>, 3> &of, auto lanes) {
        const auto [_, p] = inside<with_residual, T>(x + i, with_residual ? residual + i : nullptr, false, of, lanes);
        store(y + i, A::value(p, layer), lanes);
    };
}

// y of a window.
template <class T, class A, bool with_residual>
void apply_forward(const Layer &layer, const Forward &job, const Window &window, const Coefficients<Wide<T>> *channels) {
    const auto visit = forward_of<T, A, with_residual>(layer, job, window.at);
    spread<Wide<T>, 3>(window, channels, [&](const auto &each) { for_values(window, each, visit); });
}

template <bool with_other, bool inverted, class T, class C, class Lanes>
inline Inside<T> inside(const Layer &layer, const Backward &job, const T *x, const T *other, const C &of, Lanes lanes) {
    if constexpr (inverted) return inside_again(x, layer.param, of, lanes);
    else return inside<with_other>(x, other, job.other_is_y, of, lanes);
}

// Adds the gradient g of p, and g (x - mean); with a residual, g is stored, because it is the residual's gradient.
template <class T, class A, bool with_other, bool inverted> auto products_of(const Layer &layer, const Backward &job, int64_t at) {
    using W = Wide<T>;
    const T *grad = values_at<T>(job.grad, at), *x = values_at<T>(job.x, at), *other = values_at<T>(job.other, at);
    T *d_residual = values_at<T>(job.d_residual, at);
    return [=, &layer, &job](Vec<W> &first, Vec<W> &second, int64_t i, const Values<W, 4> &of, auto lanes) {
        const auto [deviation, p] =
            inside<with_other, inverted>(layer, job, x + i, with_other ? other + i : nullptr, of, lanes);
        const Vec<W> g = alive(A::gradient(load(grad + i, lanes), p, layer), lanes);
        if constexpr (with_other) store(d_residual + i, g, lanes);
        first += g;
        second += alive(g * deviation, lanes);
    };
}

template <class T, class A, bool with_other, bool inverted>
void sum_products(const Layer &layer, const Backward &job, const Window &window, const Coefficients<Wide<T>> *channels,
                  Sums *sums) {
    sum<Wide<T>, 4>(window, channels, sums, products_of<T, A, with_other, inverted>(layer, job, window.at));
}

// Writes d_x; the activation is Identity if `grad` is already the gradient of p.
template <class T, class A, bool inverted> auto gradient_of(const Layer &layer, const Backward &job, const T *grad, int64_t at) {
    using W = Wide<T>;
    const T *x = values_at<T>(job.x, at);
    T *d_x = values_at<T>(job.d_x, at);
    grad += at;
    return [=, &layer, &job](int64_t i, const Values<W, FIELDS> &of, auto lanes) {
        const auto [deviation, p] = inside<false, inverted, T>(layer, job, x + i, nullptr, of, lanes);
        const Vec<W> g = A::gradient(load(grad + i, lanes), p, layer);
        store(d_x + i, g * of[BACK] - deviation * of[RSTD] * of[ALONG] - of[EVEN], lanes);
    };
}

template <class T, class A, bool inverted>
void apply_backward(const Layer &layer, const Backward &job, const T *grad, const Window &window,
                    const Coefficients<Wide<T>> *channels) {
    const auto visit = gradient_of<T, A, inverted>(layer, job, grad, window.at);
    spread<Wide<T>, FIELDS>(window, channels, [&](const auto &each) { for_values(window, each, visit); });
}

} // namespace
} // namespace batchnorm::ISA
