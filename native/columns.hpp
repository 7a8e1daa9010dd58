// Statistics of the features of a block: counts, mean and central sums, extremes, added to those of earlier blocks.
//
// A chunk of rows stays in the cache for two passes. The first adds the values, for a center near the mean, and finds
// the extremes. The second adds powers of d = x - center, where the subtraction is exact if x is within a factor of 2 of
// the center. With sk = sum d^k over n values, and e = s1 / n,
//
//     mean = center + e          m2 = s2 - s1 e
//     m3 = s3 - 3 e s2 + 2 n e^3    m4 = s4 - 4 e s3 + 6 e^2 s2 - 3 n e^4
//
// The mean is stored in two numbers, so that means of chunks far from zero lose no digits of the variance when chunks
// are merged, by the formulas of src/batchnorm/moments_union.py. A sum that is not finite shows a NaN or an infinity
// without any test in the loop; then the finite values of that feature are copied out and added by themselves.
#pragma once
#include "arithmetic.hpp"
#include "vectors.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace batchnorm::ISA {
namespace {

constexpr int SIDE_BY_SIDE = LANES >= 16 ? 2 : 1; // vectors added at once, as many as the registers allow
constexpr int64_t PANEL = SIDE_BY_SIDE * LANES;   // columns added at once
constexpr int64_t NARROW = 64;                    // so many features are read in panels of their own
constexpr int64_t CHUNK = 4096;                   // values of narrow rows that are read twice
constexpr int64_t CHUNK_ROWS = 512;               // rows of a panel that are read twice
constexpr double INFINITE = std::numeric_limits<double>::infinity(), NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

// By way of int32 for the small types: processors have no instruction for less.
template <class T> inline Vec64 load_double(const char *from) {
    typedef T Narrow __attribute__((vector_size(LANES * sizeof(T))));
    typedef int32_t Middle __attribute__((vector_size(LANES * 4)));
    if constexpr (sizeof(T) < 4) return __builtin_convertvector(__builtin_convertvector(read<Narrow>(from), Middle), Vec64);
    else return __builtin_convertvector(read<Narrow>(from), Vec64);
}

// Sums of d, d^2, d^3 and d^4 about a center.
struct Powers {
    double s1 = 0, s2 = 0, s3 = 0, s4 = 0;
    void add(double d) {
        const double square = d * d;
        s1 += d, s2 += square, s3 += square * d, s4 += square * square;
    }
};

// Mean and central sums of n values.
struct Central {
    double n = 0, mean = NOT_A_NUMBER, low = 0, m2 = 0, m3 = 0, m4 = 0;

    static Central of(double n, double center, const Powers &sums, double least, double most) {
        if (least == most) return {n, least, 0, 0, 0, 0}; // without the rounding errors of the mean of equal values
        const double e = sums.s1 / n, square = e * e;
        Central made{n, 0, 0, sums.s2 - sums.s1 * e, sums.s3 - 3 * e * sums.s2 + 2 * n * square * e,
                     sums.s4 - 4 * e * sums.s3 + 6 * square * sums.s2 - 3 * n * square * square};
        made.m2 = made.m2 < 0 ? 0 : made.m2, made.m4 = made.m4 < 0 ? 0 : made.m4;
        made.put(center, std::isfinite(e) ? e : 0); // deviations of the largest numbers may have too large a sum
        return made.bounded();
    }
    Central operator+(const Central &b) const {
        if (b.n == 0) return *this;
        if (n == 0) return b;
        const double total = n + b.n, p = n / total, q = b.n / total, d = (b.mean - mean) + (b.low - low);
        const double dd = d * d, weight = n * q;
        Central made{total, 0, 0, m2 + b.m2 + dd * weight,
                     m3 + b.m3 + (3 * d * (p * b.m2 - q * m2) + dd * d * (weight * (p - q))),
                     m4 + b.m4 + (4 * d * (p * b.m3 - q * m3) + 6 * dd * (p * p * b.m2 + q * q * m2) +
                                  dd * dd * (weight * (p * p - p * q + q * q)))};
        if (std::isfinite(d)) made.put(mean, low + d * q);
        else made.put(p * mean + q * b.mean, 0); // means of both signs whose distance is too large for float64
        return made.bounded();
    }

  private:
    // mean + low = a + b without a rounding error, if a is the larger one
    void put(double a, double b) {
        mean = a + b;
        const double part = mean - a, rest = (a - (mean - part)) + (b - part);
        low = std::isfinite(rest) ? rest : 0;
    }
    Central bounded() const {
        Central made = *this;
        if (!std::isfinite(m2)) made.m2 = made.m4 = INFINITE, made.m3 = NOT_A_NUMBER;
        if (!std::isfinite(m4)) made.m4 = INFINITE;
        if (!std::isfinite(m3)) made.m3 = NOT_A_NUMBER;
        return made;
    }
};

// The statistics of earlier blocks, which grow: rows that are `stride` values apart, in the order of feature_sums.py.
struct Totals {
    double *numbers;
    int64_t *counts, stride;

    double &number(int row, int64_t f) const { return numbers[row * stride + f]; }
    int64_t &count(int row, int64_t f) const { return counts[row * stride + f]; }

    void add(int64_t f, const Central &values, double least, double most) const {
        if (values.n == 0) return;
        const bool first = count(0, f) == 0;
        const Central before{double(count(0, f)), number(0, f), number(1, f), number(2, f), number(3, f), number(4, f)};
        const Central both = before + values;
        number(0, f) = both.mean, number(1, f) = both.low;
        number(2, f) = both.m2, number(3, f) = both.m3, number(4, f) = both.m4;
        number(5, f) = first || least < number(5, f) ? least : number(5, f);
        number(6, f) = first || most > number(6, f) ? most : number(6, f);
        count(0, f) += int64_t(values.n);
    }
};

// Sums and powers of `width` neighbouring columns. Columns that belong to one feature are `features` apart.
class Strip {
  public:
    Strip(int64_t width, int64_t features) : width(width), features(features), room(8 * width) {}

    template <class T> void sum(const char *x, int64_t rows, int64_t stride) {
        for_panels([&](int64_t column) {
            Vec64 sums[SIDE_BY_SIDE] = {}, least[SIDE_BY_SIDE], most[SIDE_BY_SIDE];
            for (int v = 0; v < SIDE_BY_SIDE; ++v) least[v] = Vec64{} + INFINITE, most[v] = Vec64{} - INFINITE;
            const char *row = x + column * int64_t(sizeof(T));
            for (int64_t r = 0; r < rows; ++r, row += stride)
                for (int v = 0; v < SIDE_BY_SIDE; ++v) {
                    const Vec64 value = load_double<T>(row + v * LANES * sizeof(T));
                    sums[v] += value;
                    least[v] = value < least[v] ? value : least[v], most[v] = value > most[v] ? value : most[v];
                }
            for (int v = 0; v < SIDE_BY_SIDE; ++v)
                write(at(0, column + v * LANES), sums[v]), write(at(1, column + v * LANES), least[v]), write(at(2, column + v * LANES), most[v]);
        });
        fold([&](double *into, const double *from) { *into += *from; }, 0);
        fold([&](double *into, const double *from) { *into = std::min(*into, *from); }, 1);
        fold([&](double *into, const double *from) { *into = std::max(*into, *from); }, 2);
    }

    // center(f) is the center of feature f.
    template <class T, class Center> void add_powers(const char *x, int64_t rows, int64_t stride, const Center &center) {
        for (int64_t column = 0; column < width; ++column)
            *at(3, column) = column < features ? center(column) : *at(3, column - features);
        for_panels([&](int64_t column) {
            Vec64 centers[SIDE_BY_SIDE], s1[SIDE_BY_SIDE] = {}, s2[SIDE_BY_SIDE] = {}, s3[SIDE_BY_SIDE] = {}, s4[SIDE_BY_SIDE] = {};
            for (int v = 0; v < SIDE_BY_SIDE; ++v) centers[v] = read<Vec64>(at(3, column + v * LANES));
            const char *row = x + column * int64_t(sizeof(T));
            for (int64_t r = 0; r < rows; ++r, row += stride)
                for (int v = 0; v < SIDE_BY_SIDE; ++v) {
                    const Vec64 d = load_double<T>(row + v * LANES * sizeof(T)) - centers[v], square = d * d;
                    s1[v] += d, s2[v] += square, s3[v] += square * d, s4[v] += square * square;
                }
            for (int v = 0; v < SIDE_BY_SIDE; ++v) {
                const int64_t to = column + v * LANES;
                write(at(4, to), s1[v]), write(at(5, to), s2[v]), write(at(6, to), s3[v]), write(at(7, to), s4[v]);
            }
        });
        for (int row = 4; row < 8; ++row) fold([&](double *into, const double *from) { *into += *from; }, row);
    }

    double sum_of(int64_t f) { return *at(0, f); }
    double least(int64_t f) { return *at(1, f); }
    double most(int64_t f) { return *at(2, f); }
    double center(int64_t f) { return *at(3, f); }
    Powers powers(int64_t f) { return {*at(4, f), *at(5, f), *at(6, f), *at(7, f)}; }

  private:
    int64_t width, features;
    std::vector<double> room;

    double *at(int row, int64_t column) { return room.data() + row * width + column; }

    // The last panel overlaps the one before it: the columns of both get the same bits twice.
    template <class Visit> void for_panels(const Visit &visit) {
        for (int64_t column = 0; column < width; column += PANEL) visit(std::min(column, width - PANEL));
    }
    template <class Add> void fold(const Add &add, int row) {
        for (int64_t column = features; column < width; ++column) add(at(row, column % features), at(row, column));
    }
};

// Statistics of one feature's finite values, which lie side by side.
class Gathered {
  public:
    Gathered() : strip(PANEL, 1) {}

    std::vector<double> values;

    void add_to(const Totals &totals, int64_t f, int64_t count) {
        if (count == 0) return;
        const int64_t rows = count / PANEL;
        const char *x = reinterpret_cast<const char *>(values.data());
        strip.sum<double>(x, rows, PANEL * sizeof(double));
        double sum = strip.sum_of(0), least = strip.least(0), most = strip.most(0);
        for (int64_t i = rows * PANEL; i < count; ++i)
            sum += values[i], least = std::min(least, values[i]), most = std::max(most, values[i]);
        const double center = std::isfinite(sum) ? sum / double(count) : scaled_mean(count);
        strip.add_powers<double>(x, rows, PANEL * sizeof(double), [&](int64_t) { return center; });
        Powers powers = strip.powers(0);
        for (int64_t i = rows * PANEL; i < count; ++i) powers.add(values[i] - center);
        totals.add(f, Central::of(double(count), center, powers, least, most), least, most);
    }

  private:
    Strip strip;

    // The mean of values whose sum is too large for float64.
    double scaled_mean(int64_t count) const {
        double sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += values[i] * 0x1p-60;
        return sum / double(count) * 0x1p60;
    }
};

// A block whose values have type T.
template <class T> class ColumnsOf {
  public:
    explicit ColumnsOf(const Columns &block) : block(block), totals{block.numbers, block.counts, block.totals_stride} {}

    void add() {
        if (block.features == 0) return;
        if (block.features > 1 && block.row_stride == size && block.feature_stride != size) return add_each();
        const bool together = block.features == 1 || block.feature_stride == size;
        const bool joined = block.features < NARROW && block.row_stride == block.features * size;
        if (together && joined) return add_joined();
        if (together && block.features >= NARROW) return add_panels();
        for (int64_t row = 0; row < block.rows; row += CHUNK_ROWS) gather(row, std::min(CHUNK_ROWS, block.rows - row));
    }

  private:
    static constexpr int64_t size = sizeof(T);
    const Columns &block;
    Totals totals;
    Gathered gathered;

    const char *at(int64_t row, int64_t f) const {
        return static_cast<const char *>(block.x) + row * block.row_stride + f * block.feature_stride;
    }

    // Features that are contiguous columns.
    void add_each() {
        for (int64_t f = 0; f < block.features; ++f) {
            Columns column = block;
            column.x = at(0, f), column.features = 1, column.numbers += f, column.counts += f;
            if (column.present) column.present += f * block.present_feature_stride;
            ColumnsOf(column).add();
        }
    }

    // Several short rows are read as one row, whose length is a multiple of the vectors'.
    void add_joined() {
        const int64_t rows = PANEL / std::gcd(PANEL, block.features), width = rows * block.features;
        const int64_t chunk = std::max<int64_t>(CHUNK / width, 8) * rows;
        Strip strip(width, block.features);
        for (int64_t row = 0; row < block.rows; row += chunk) {
            const int64_t here = std::min(chunk, block.rows - row), whole = here / rows;
            if (!all_present(row, here)) gather(row, here);
            else {
                if (whole) add_strip(strip, row, whole * rows, 0, block.features, whole, width * size);
                if (here % rows) gather(row + whole * rows, here % rows);
            }
        }
    }

    void add_panels() {
        Strip strip(PANEL, PANEL), last(PANEL + block.features % PANEL, PANEL + block.features % PANEL);
        for (int64_t row = 0; row < block.rows; row += CHUNK_ROWS) {
            const int64_t here = std::min(CHUNK_ROWS, block.rows - row);
            if (!all_present(row, here)) {
                gather(row, here);
                continue;
            }
            int64_t f = 0;
            for (; f + 2 * PANEL <= block.features; f += PANEL) add_strip(strip, row, here, f, PANEL, here, block.row_stride);
            add_strip(last, row, here, f, block.features - f, here, block.row_stride);
        }
    }

    void add_strip(Strip &strip, int64_t row, int64_t rows, int64_t first, int64_t features, int64_t lines, int64_t stride) {
        const char *x = at(row, first);
        strip.template sum<T>(x, lines, stride);
        strip.template add_powers<T>(x, lines, stride, [&](int64_t f) { return strip.sum_of(f) / double(rows); });
        for (int64_t f = 0; f < features; ++f) {
            if (!std::isfinite(strip.sum_of(f))) gather(row, rows, first + f);
            else {
                const double least = strip.least(f), most = strip.most(f);
                totals.add(first + f, Central::of(double(rows), strip.center(f), strip.powers(f), least, most), least, most);
            }
        }
    }

    bool all_present(int64_t row, int64_t rows) const {
        if (!block.present) return true;
        if (block.present_feature_stride != 0 && block.features > 1) return false;
        const uint8_t *flags = block.present + row * block.present_row_stride;
        bool all = true;
        for (int64_t r = 0; r < rows; ++r) all &= flags[r * block.present_row_stride] != 0;
        return all;
    }

    void gather(int64_t row, int64_t rows) {
        for (int64_t f = 0; f < block.features; ++f) gather(row, rows, f);
    }
    void gather(int64_t row, int64_t rows, int64_t f) {
        if (int64_t(gathered.values.size()) < rows) gathered.values.resize(rows);
        const char *x = at(row, f);
        static constexpr uint8_t TRUE = 1;
        const uint8_t *flags = &TRUE;
        int64_t step = 0, found = 0, nan = 0, null = 0;
        if (block.present) flags = block.present + row * block.present_row_stride + f * block.present_feature_stride, step = block.present_row_stride;
        for (int64_t r = 0; r < rows; ++r, x += block.row_stride, flags += step) {
            const double value = double(read<T>(x));
            const bool here = *flags != 0;
            gathered.values[found] = value;
            found += here && std::isfinite(value), nan += here && std::isnan(value), null += !here;
        }
        gathered.add_to(totals, f, found);
        totals.count(1, f) += nan, totals.count(2, f) += rows - found - nan - null, totals.count(3, f) += null;
    }
};

void add_columns(const Columns &block) {
    switch (block.kind) {
    case Kind::float64: return ColumnsOf<double>(block).add();
    case Kind::float32: return ColumnsOf<float>(block).add();
    case Kind::int8: return ColumnsOf<int8_t>(block).add();
    case Kind::int16: return ColumnsOf<int16_t>(block).add();
    case Kind::int32: return ColumnsOf<int32_t>(block).add();
    case Kind::int64: return ColumnsOf<int64_t>(block).add();
    case Kind::uint8: return ColumnsOf<uint8_t>(block).add();
    case Kind::uint16: return ColumnsOf<uint16_t>(block).add();
    case Kind::uint32: return ColumnsOf<uint32_t>(block).add();
    case Kind::uint64: return ColumnsOf<uint64_t>(block).add();
    }
}

} // namespace
} // namespace batchnorm::ISA
