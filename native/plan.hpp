// How a tensor is cut into windows, by its shape alone: so a result has the same bits for any number of threads.
//
// Together: a task has some channels whole. It sums and applies them while they are in the cache, so memory is read once.
// Apart: tasks are parts of channels, in the order of memory. All are summed, then all are applied. That is faster where
// the whole tensor is in the last cache, or where the pieces of a channel are short: jumping costs more than reading.
#pragma once
#include "threads.hpp"
#include "windows.hpp"

namespace batchnorm::ISA {
namespace {

constexpr int64_t GRAIN = 32768;      // values worth a thread
constexpr int64_t SMALL = 512;        // planes up to this size are walked several channels at a time
constexpr int64_t CACHE = 256 << 10;  // bytes of several channels that are walked together
constexpr int64_t PIECE = 32 << 10;   // bytes between two jumps that make jumping cheap
constexpr int64_t LAST = 32 << 20;    // bytes of a server's last cache; what a virtual machine says of it is not to be trusted
constexpr int64_t SLAB = 4 << 20;     // bytes of some channels that are still read from a cache the second time
constexpr int64_t TASKS = 16;         // tasks that channels must give before they are kept whole
constexpr int64_t WIDE = 64;          // columns that make a row worth walking

class Plan {
  public:
    bool together;
    int64_t tasks, width; // width: channels in a task, at most

    // `bytes_each`: of all tensors for each value; `once`: whether they are read one time only.
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
            const int64_t first = task * width; // the last task has the channels that are left
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
    int64_t each = 1, joined = 1, pieces = 1; // rows of a part; rows walked as one; parts of a plane

    bool large() const { return shape.inner > SMALL || shape.channels == 1; }

    Window channels_of(int64_t first, int64_t number) const {
        return {first * shape.inner, shape.outer,       number * shape.inner, shape.channels * shape.inner,
                first,               number,            shape.inner};
    }

    // About 64 parts, of rows, and of pieces of rows where there are few of them.
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

    // A part of a large plane, or of several.
    Window plane(int64_t task) const {
        const int64_t piece = task % pieces, channel = task / pieces % shape.channels, part = task / pieces / shape.channels;
        const int64_t length = ((shape.inner + pieces - 1) / pieces + BLOCK - 1) / BLOCK * BLOCK, row = shape.channels * shape.inner;
        const int64_t begin = std::min(piece * length, shape.inner);
        return {part * each * row + channel * shape.inner + begin, std::min(each, shape.outer - part * each),
                std::min(length, shape.inner - begin), row, channel, 1, 1};
    }

    // Some rows of all channels; those that could not be joined come last.
    Window rows(int64_t task) const {
        const int64_t row = shape.channels * shape.inner, whole_rows = shape.outer / joined * joined;
        if (task == parts()) return {whole_rows * row, 1, (shape.outer - whole_rows) * row, row, 0, shape.channels, shape.inner};
        const int64_t begin = task * each, end = std::min(begin + each, whole_rows);
        return {begin * row, (end - begin) / joined, joined * row, joined * row, 0, shape.channels, shape.inner};
    }
};

} // namespace
} // namespace batchnorm::ISA
