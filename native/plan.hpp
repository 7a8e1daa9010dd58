// How a tensor is cut into windows, by its shape alone, so that a result has the same bits for any number of threads.
//
// Together: a task is a few whole channels. It sums and normalizes them while they are in the cache, so memory is read
// once. Apart: tasks are parts of channels, in the order of memory. All parts are summed, then all are normalized. That
// is faster if the whole tensor fits into the last cache, or if the pieces of a channel in memory are short, because
// jumping costs more than reading.
#pragma once
#include "threads.hpp"
#include "windows.hpp"

namespace batchnorm::ISA {
namespace {

constexpr int64_t GRAIN = 32768;      // fewest values for which another thread is worthwhile
constexpr int64_t SMALL = 512;        // planes of at most so many values are read several channels at a time
constexpr int64_t CACHE = 256 << 10;  // bytes of the channels of one task
constexpr int64_t PIECE = 32 << 10;   // bytes read between two jumps from which on jumps are cheap
constexpr int64_t LAST = 32 << 20;    // bytes of a server's last cache; a fixed number, because virtual machines report wrong ones
constexpr int64_t SLAB = 4 << 20;     // bytes of channels that are still in a cache when they are read the second time
constexpr int64_t TASKS = 16;         // fewest tasks of whole channels; with fewer, channels are cut into parts
constexpr int64_t WIDE = 64;          // fewest columns of a row that are read efficiently

class Plan {
  public:
    bool together;
    int64_t tasks, width; // width: the most channels of a task, except the last

    // `bytes_each`: bytes of all tensors for one value; `once`: whether all tensors are read only once.
    Plan(Shape given, int64_t bytes_each, bool once = false) : shape(given) {
        if (shape.channels == 1) shape = {1, 1, shape.outer * shape.inner};
        const int64_t row_bytes = shape.inner * bytes_each, channel_bytes = shape.outer * row_bytes;
        const int64_t total = channel_bytes * shape.channels, most = std::max<int64_t>(1, shape.channels / TASKS);
        if (large()) {
            width = 1;
            together = total <= CACHE || (total > LAST && row_bytes >= PIECE && channel_bytes <= SLAB);
        } else if (shape.inner > 1) {
            width = std::clamp<int64_t>(CACHE / channel_bytes, 1, most);
            together = total <= CACHE || channel_bytes <= SLAB;
        } else {
            width = std::min(shape.channels, WIDE);
            together = total <= 4 * CACHE && !once;
        }
        tasks = shape.channels / width + (shape.inner > 1 && shape.channels % width != 0);
        together = together && !(once && large()) && (tasks >= TASKS || total <= 4 * CACHE);
        if (!together) cut();
    }

    int64_t count() const { return shape.outer * shape.inner; }
    int64_t channels() const { return shape.channels; }
    Window whole() const { return channels_of(0, shape.channels); }

    Window window(int64_t task) const {
        if (together) {
            const int64_t first = task * width; // the last task also has the remaining channels
            return channels_of(first, task == tasks - 1 ? shape.channels - first : width);
        }
        return large() ? plane(task) : rows(task);
    }

    template <class Work> void run(const Work &work) const {
        parallel_for(tasks, std::max<int64_t>(1, GRAIN * tasks / (count() * channels())), [&](int64_t task) {
            work(task, window(task));
        });
    }

  private:
    Shape shape;
    int64_t each = 1, joined = 1, pieces = 1; // rows of a part; rows joined to one; pieces of a plane

    bool large() const { return shape.inner > SMALL || shape.channels == 1; }

    Window channels_of(int64_t first, int64_t number) const {
        return {first * shape.inner, shape.outer,       number * shape.inner, shape.channels * shape.inner,
                first,               number,            shape.inner};
    }

    // Cuts into about 64 parts of some rows each; if there are few rows, into pieces of rows.
    void cut() {
        const int64_t row = shape.channels * shape.inner;
        if (large()) {
            each = std::max<int64_t>(1, shape.outer / 256);
            pieces = shape.outer < 16 ? std::clamp<int64_t>(64 / shape.outer, 1, (shape.inner + BLOCK - 1) / BLOCK) : 1;
            tasks = parts() * shape.channels * pieces;
            width = 1;
            return;
        }
        while (joined * row % LANES != 0 || joined * row < WIDE) ++joined;
        if (joined * row > 4 * BLOCK) joined = 1;
        each = (std::max(shape.outer / 64, 2 * GRAIN / row) / joined + 1) * joined;
        tasks = parts() + (shape.outer % joined != 0);
        width = shape.channels;
    }
    int64_t parts() const { return (shape.outer / joined * joined + each - 1) / each; }

    // Some large planes of one channel, or a piece of one.
    Window plane(int64_t task) const {
        const int64_t piece = task % pieces, channel = task / pieces % shape.channels, part = task / pieces / shape.channels;
        const int64_t length = ((shape.inner + pieces - 1) / pieces + BLOCK - 1) / BLOCK * BLOCK, row = shape.channels * shape.inner;
        const int64_t begin = std::min(piece * length, shape.inner);
        return {part * each * row + channel * shape.inner + begin, std::min(each, shape.outer - part * each),
                std::min(length, shape.inner - begin), row, channel, 1, 1};
    }

    // Some rows of all channels; the last task has the rows that are too few to be joined.
    Window rows(int64_t task) const {
        const int64_t row = shape.channels * shape.inner, whole_rows = shape.outer / joined * joined;
        if (task == parts()) return {whole_rows * row, 1, (shape.outer - whole_rows) * row, row, 0, shape.channels, shape.inner};
        const int64_t begin = task * each, end = std::min(begin + each, whole_rows);
        return {begin * row, (end - begin) / joined, joined * row, joined * row, 0, shape.channels, shape.inner};
    }
};

} // namespace
} // namespace batchnorm::ISA
