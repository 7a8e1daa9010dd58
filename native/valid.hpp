// Passes over the valid positions of a tensor. All others are padding: they are neither read nor counted, and results are
// 0 there.
//
// The parts that tasks work on depend on the shape alone, so a result has the same bits for any number of threads.
#pragma once
#include "threads.hpp"
#include "windows.hpp"

#include <vector>

namespace batchnorm::ISA {
namespace {

struct Run { int64_t begin, end; }; // neighbouring valid positions

// The valid positions of `lines` lines of `length` positions, from one byte for each position.
class Runs {
  public:
    Runs(const uint8_t *valid, int64_t lines, int64_t length) {
        for (int64_t line = 0; line < lines; ++line, valid += length) {
            starts.push_back(runs.size());
            for (int64_t at = 0; at < length; ++at) {
                if (!valid[at]) continue;
                const int64_t begin = at;
                while (at < length && valid[at]) ++at;
                runs.push_back({begin, at}), positions += at - begin;
            }
        }
        starts.push_back(runs.size());
    }
    int64_t count() const { return positions; }
    const Run *begin(int64_t line) const { return runs.data() + starts[line]; }
    const Run *end(int64_t line) const { return runs.data() + starts[line + 1]; }

    // Number of positions of padding behind a run.
    int64_t gap(int64_t line, const Run *run, int64_t length) const {
        return (run + 1 == end(line) ? length : run[1].begin) - run->end;
    }

  private:
    std::vector<Run> runs;
    std::vector<size_t> starts; // of each line's runs
    int64_t positions = 0;
};

// A tensor with padding: planes of `inner` positions, one for each channel; or rows of channels, where inner is 1.
class Padded {
  public:
    Padded(const Shape &given, const uint8_t *valid)
        : shape(given), runs(valid, is_rows() ? 1 : given.outer, is_rows() ? given.outer : given.inner) {
        // a channel's sums cost as much as some hundred values
        const int64_t enough = is_rows() ? std::max<int64_t>(1, 8192 / shape.channels) : (BLOCK + shape.inner - 1) / shape.inner;
        each = std::min(std::max(shape.outer / 64, enough), shape.outer);
        const int64_t parts = (shape.outer + each - 1) / each;
        width = is_rows() ? shape.channels : std::max<int64_t>(1, shape.channels * parts / 64);
        blocks = (shape.channels + width - 1) / width;
        tasks = parts * blocks;
    }
    int64_t count() const { return runs.count(); }

    // A mean of a few valid values for every channel.
    template <class T, class A> std::vector<Guess<A>> guess(const T *x) const {
        std::vector<Guess<A>> guesses(shape.channels);
        for (int64_t c = 0; c < shape.channels; ++c) {
            double sum = 0;
            int64_t number = 0;
            const int64_t lines = is_rows() ? 1 : shape.outer;
            for (int64_t line = 0; line < lines; line += std::max<int64_t>(1, lines / 4))
                if (const Run *run = runs.begin(line); run != runs.end(line))
                    for (int64_t at = run->begin; at < std::min(run->end, run->begin + 16); ++at, ++number)
                        sum += widen(x[is_rows() ? at * shape.channels + c : (line * shape.channels + c) * shape.inner + at]);
            if (const A mean = A(sum / double(number)); std::isfinite(mean)) guesses[c].shift = mean;
        }
        return guesses;
    }

    // Adds the sums of valid values to those of every channel: visit(first, second, i, values of the channel, lanes) adds.
    template <class W, int fields, class Channel, class Visit>
    void sum(const Channel *channels, Sums *sums, const Visit &visit) const {
        std::vector<Sums> parts(tasks * width);
        run([&](int64_t task, const Part &part) {
            is_rows() ? sum_rows<W, fields>(part, channels, &parts[task * width], visit)
                      : sum_planes<W, fields>(part, channels, &parts[task * width], visit);
        });
        for (int64_t task = 0; task < tasks; ++task)
            for (int64_t c = part(task).first; c < part(task).last; ++c) sums[c].add(parts[task * width + c - part(task).first]);
    }

    // Calls visit(i, values of the channel, lanes) for valid values, and sets `result` to 0 in the padding.
    template <class W, int fields, class T, class Channel, class Visit>
    void apply(const Channel *channels, T *result, const Visit &visit) const {
        run([&](int64_t, const Part &part) {
            is_rows() ? apply_rows<W, fields>(part, channels, result, visit) : apply_planes<W, fields>(part, channels, result, visit);
        });
    }

  private:
    struct Part { int64_t begin, end, first, last; }; // outer indices and channels, both up to an end

    Shape shape;
    Runs runs;
    int64_t each = 1, width = 1, blocks = 1, tasks = 1; // outer indices and channels of a part

    bool is_rows() const { return shape.inner == 1; }

    Part part(int64_t task) const {
        const int64_t begin = task / blocks * each, first = task % blocks * width;
        return {begin, std::min(begin + each, shape.outer), first, std::min(first + width, shape.channels)};
    }
    template <class Work> void run(const Work &work) const {
        const int64_t values = shape.outer * shape.channels * shape.inner;
        parallel_for(tasks, std::max<int64_t>(1, 32768 * tasks / values), [&](int64_t task) { work(task, part(task)); });
    }

    template <class W, int fields, class Channel> static Values<W, fields> same(const Channel &channel) {
        Values<W, fields> values;
        for (int f = 0; f < fields; ++f) values.vectors[f] = Vec<W>{} + channel[f];
        return values;
    }

    template <class W, int fields, class Channel, class Visit>
    void sum_planes(const Part &part, const Channel *channels, Sums *sums, const Visit &visit) const {
        const int64_t number = 2 * (part.last - part.first);
        Array<Vec<W>> parts(number);
        Array<Vec64> totals(number);
        for (int64_t i = 0; i < number; ++i) parts[i] = Vec<W>{}, totals[i] = Vec64{};
        const auto flush = [&](int64_t i) { totals[i] += to_double(parts[i]), parts[i] = Vec<W>{}; };
        int64_t lines = 0, values = 0; // since the last flush of all channels
        for (int64_t line = part.begin; line < part.end; ++line) {
            for (int64_t c = part.first; c < part.last; ++c) {
                const auto here = same<W, fields>(channels[c]);
                const int64_t plane = (line * shape.channels + c) * shape.inner, i = 2 * (c - part.first);
                for (const Run *run = runs.begin(line); run != runs.end(line); ++run) {
                    const int64_t gap = runs.gap(line, run, shape.inner);
                    for (int64_t begin = run->begin; begin < run->end; begin += BLOCK) {
                        const int64_t end = std::min(begin + BLOCK, run->end);
                        add_run<W>(plane + begin, plane + end, gap, here, parts + i, visit);
                        if (end - begin == BLOCK) flush(i), flush(i + 1);
                    }
                }
            }
            for (const Run *run = runs.begin(line); run != runs.end(line); ++run) values += (run->end - run->begin) % BLOCK;
            if (++lines < ROWS && values < BLOCK && line + 1 < part.end) continue;
            for (int64_t i = 0; i < number; ++i) flush(i);
            lines = values = 0;
        }
        for (int64_t c = 0; c < part.last - part.first; ++c) sums[c] = {total(totals[2 * c]), total(totals[2 * c + 1])};
    }

    template <class W, class Here, class Visit>
    static void add_run(int64_t i, int64_t end, int64_t gap, const Here &here, Vec<W> *sums, const Visit &visit) {
        Vec<W> first[4] = {}, second[4] = {};
        for (; i + 4 * LANES <= end; i += 4 * LANES)
            for (int k = 0; k < 4; ++k) visit(first[k], second[k], i + k * LANES, here, Whole{});
        for (; i + LANES <= end; i += LANES) visit(first[0], second[0], i, here, Whole{});
        if (i < end && gap >= i + LANES - end) visit(first[1], second[1], i, here, Near{int(end - i)});
        else if (i < end) visit(first[1], second[1], i, here, First{int(end - i)});
        sums[0] += (first[0] + first[1]) + (first[2] + first[3]);
        sums[1] += (second[0] + second[1]) + (second[2] + second[3]);
    }

    // Sums for each column, in float32 over ROWS valid rows at most, then in float64.
    template <class W, int fields, class Channel, class Visit>
    void sum_rows(const Part &part, const Channel *channels, Sums *sums, const Visit &visit) const {
        const int64_t columns = shape.channels, padded_columns = padded(columns);
        Array<W> parts(2 * padded_columns);
        Array<double> totals(2 * padded_columns);
        std::fill_n(parts.values, 2 * padded_columns, W(0));
        std::fill_n(totals.values, 2 * padded_columns, 0.0);
        const auto flush = [&] {
            for (int64_t at = 0; at < 2 * padded_columns; at += LANES) add_to(totals + at, to_double(load(parts + at)));
            std::fill_n(parts.values, 2 * padded_columns, W(0));
        };
        spread<W, fields>(columns_of(part), channels, [&](const auto &each) {
            int64_t waiting = 0;
            for (const Run *run = runs.begin(0); run != runs.end(0); ++run)
                for (int64_t row = std::max(run->begin, part.begin); row < std::min(run->end, part.end);) {
                    const int64_t number = std::min({std::min(run->end, part.end) - row, ROWS - waiting, int64_t(8)});
                    const Window window{row * columns, number, columns, columns, 0, columns, 1};
                    const auto shifted = [&](Vec<W> &a, Vec<W> &b, int64_t i, const auto &here, auto lanes) {
                        visit(a, b, window.at + i, here, lanes);
                    };
                    number == 8 ? add_rows<8>(window, 0, 1, each, parts.values, parts + padded_columns, shifted)
                                : add_each(window, each, parts.values, parts + padded_columns, shifted);
                    row += number, waiting += number;
                    if (waiting == ROWS) flush(), waiting = 0;
                }
        });
        flush();
        for (int64_t c = 0; c < columns; ++c) sums[c] = {totals[c], totals[padded_columns + c]};
    }

    template <class W, class Each, class Visit>
    static void add_each(const Window &window, const Each &each, W *firsts, W *seconds, const Visit &visit) {
        for (int64_t row = 0; row < window.rows; ++row) add_rows<1>(window, row, 1, each, firsts, seconds, visit);
    }

    Window columns_of(const Part &part) const {
        return {part.begin * shape.channels, 1, shape.channels, shape.channels, 0, shape.channels, 1};
    }

    template <class W, int fields, class T, class Channel, class Visit>
    void apply_planes(const Part &part, const Channel *channels, T *result, const Visit &visit) const {
        for (int64_t line = part.begin; line < part.end; ++line)
            for (int64_t c = part.first; c < part.last; ++c) {
                const auto here = same<W, fields>(channels[c]);
                const int64_t plane = (line * shape.channels + c) * shape.inner;
                int64_t cleared = 0;
                for (const Run *run = runs.begin(line); run != runs.end(line); cleared = run++->end) {
                    clear(result + plane + cleared, run->begin - cleared);
                    const int64_t end = plane + run->end, gap = runs.gap(line, run, shape.inner);
                    int64_t i = plane + run->begin;
                    for (; i + LANES <= end; i += LANES) visit(i, here, Whole{});
                    if (i < end && gap >= i + LANES - end) visit(i, here, Near{int(end - i)});
                    else if (i < end) visit(i, here, First{int(end - i)});
                }
                clear(result + plane + cleared, shape.inner - cleared);
            }
    }

    template <class W, int fields, class T, class Channel, class Visit>
    void apply_rows(const Part &part, const Channel *channels, T *result, const Visit &visit) const {
        const int64_t columns = shape.channels;
        spread<W, fields>(columns_of(part), channels, [&](const auto &each) {
            int64_t cleared = part.begin;
            for (const Run *run = runs.begin(0); run != runs.end(0); ++run) {
                const int64_t begin = std::max(run->begin, part.begin), end = std::min(run->end, part.end);
                if (begin >= end) continue;
                clear(result + cleared * columns, (begin - cleared) * columns);
                const Window window{begin * columns, end - begin, columns, columns, 0, columns, 1};
                for_values(window, each, [&](int64_t i, const auto &here, auto lanes) { visit(window.at + i, here, lanes); });
                cleared = end;
            }
            clear(result + cleared * columns, (part.end - cleared) * columns);
        });
    }

    template <class T> static void clear(T *values, int64_t count) {
        std::memset(static_cast<void *>(values), 0, count * sizeof(T));
    }
};

} // namespace
} // namespace batchnorm::ISA
