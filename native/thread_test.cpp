// Calls every pass of the arithmetic from four threads at once, each with its own pool, and compares with a serial run,
// bit for bit.
//
// Only sanitize.sh builds this file. ThreadSanitizer does not see the joins of torch's pool, which is not instrumented,
// so here run_parallel uses std::thread. Tensors are allocated with their exact size, so that AddressSanitizer guards both
// ends. Results are filled with one pattern before the serial run and with another before the parallel runs, so that a
// value that is never written differs.
#include "arithmetic.hpp"
#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace batchnorm {
namespace {

constexpr int OUTER = 4, INNER = 3; // calling threads, and helper threads of each
thread_local bool serial = true;

} // namespace

void find_threads() {}

// The grain is ignored: threads get tasks one at a time, so that several threads compute even small tensors.
void run_parallel(int64_t count, int64_t, Body body, void *context) {
    if (serial || count < 2) return body(0, count, context);
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        // relaxed: the counter must not order what tasks do, or it would hide their races
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i, i + 1, context);
    };
    std::vector<std::thread> helpers;
    for (int64_t i = 1; i < std::min<int64_t>(INNER, count); ++i) helpers.emplace_back(work);
    work();
    for (std::thread &helper : helpers) helper.join();
}

namespace {

using Bytes = std::unique_ptr<unsigned char[]>;

struct Buffer {
    size_t size;
    Bytes bytes;
    explicit Buffer(size_t size, int pattern = 0) : size(size), bytes(new unsigned char[size]) {
        std::memset(bytes.get(), pattern, size);
    }
    Buffer(const Buffer &other) : Buffer(other.size) { std::memcpy(bytes.get(), other.bytes.get(), size); }
    template <class T = void> T *at() { return reinterpret_cast<T *>(bytes.get()); }
    template <class T = void> const T *at() const { return reinterpret_cast<const T *>(bytes.get()); }
};

size_t bytes_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

Buffer random(Type type, int64_t count, double mean, double deviation, unsigned seed) {
    Buffer buffer(count * bytes_of(type));
    std::minstd_rand bits(seed);
    std::uniform_real_distribution<float> uniform(-1.7f, 1.7f);
    for (int64_t i = 0; i < count; ++i) {
        const float value = float(mean + deviation * uniform(bits));
        switch (type) {
        case Type::float32: buffer.at<float>()[i] = value; break;
        case Type::float64: buffer.at<double>()[i] = value; break;
        case Type::bfloat16: buffer.at<uint16_t>()[i] = uint16_t(std::bit_cast<uint32_t>(value) >> 16); break;
        case Type::float16: buffer.at<_Float16>()[i] = _Float16(value); break;
        }
    }
    return buffer;
}

// The tensors that all threads read.
struct Inputs {
    Type type, wide;
    Shape shape;
    Buffer x, residual, grad, weight, bias, mean, var;
    Inputs(Type type, Shape shape)
        : type(type), wide(type == Type::float64 ? type : Type::float32), shape(shape),
          x(random(type, count(), 3, 2, 1)), residual(random(type, count(), 0, 1, 2)),
          grad(random(type, count(), 0, 1, 3)), weight(random(wide, shape.channels, 1, 0.4, 4)),
          bias(random(wide, shape.channels, 0, 1, 5)), mean(random(Type::float64, shape.channels, 3, 0.1, 6)),
          var(random(Type::float64, shape.channels, 4, 0.1, 7)) {}
    int64_t count() const { return shape.outer * shape.channels * shape.inner; }
};

enum class Other { none, residual, y };
const char *const OTHERS[] = {"", " residual", " y"};
const char *const TYPES[] = {"float32", "float64", "bfloat16", "float16"};

struct Call {
    enum Pass { train, inplace, normalize, moments, exact_moments, backward, inverted, sums, input_gradient, update } pass;
    Act act = Act::none;
    Other other = Other::none;
    bool constant = false, affine = true;
    double momentum = 0.1;
    bool wide = false; // whether running statistics are float64

    std::string name() const {
        const char *const passes[] = {"train", "train in place", "normalize", "moments", "exact moments", "backward", "backward of a leaky ReLU in place", "sums of gradients", "gradient of x", "update"};
        return std::string(passes[pass]) + " " + ACTS[int(act)] + OTHERS[int(other)] + (constant ? " constant" : "") + (affine ? "" : " plain");
    }
};

std::vector<Call> calls() {
    std::vector<Call> all{{Call::moments}, {Call::exact_moments}};
    for (const bool wide : {false, true})
        for (const double momentum : {0.1, std::nan("")}) {
            all.push_back({Call::update, Act::none, Other::none, false, true, momentum, wide});
            all.push_back({Call::train, Act::none, Other::none, false, false, momentum, wide});
        }
    for (std::size_t number = 0; number < std::size(ACTS); ++number) {
        const Act act = Act(number);
        for (const Other other : {Other::none, Other::residual})
            for (const auto pass : {Call::train, Call::inplace, Call::normalize}) all.push_back({pass, act, other});
        for (const Other other : {Other::none, Other::residual, Other::y})
            if (act != Act::none || other == Other::none) all.push_back({Call::sums, act, other});
        for (const bool constant : {false, true}) {
            all.push_back({Call::backward, act, Other::none, constant});
            all.push_back({Call::backward, act, Other::none, constant, false});
            all.push_back({Call::input_gradient, act, Other::none, constant});
            if (act == Act::none) continue; // callers pass no residual then: the gradient does not need it
            all.push_back({Call::backward, act, Other::residual, constant});
            all.push_back({Call::backward, act, Other::y, constant});
        }
    }
    // callers pass no residual here: x could not be recovered from y with a residual
    for (const bool constant : {false, true}) all.push_back({Call::inverted, Act::leaky_relu, Other::none, constant});
    return all;
}

// Everything that a call writes.
std::vector<Buffer> results(const Arithmetic &arithmetic, const Inputs &in, const Call &call, int pattern) {
    const int64_t channels = in.shape.channels;
    std::vector<Buffer> out;
    out.reserve(8);
    const auto add = [&](size_t bytes) -> void * { return out.emplace_back(bytes, pattern).at(); };
    // tensors that are only read are shared; Layer's pointers are not const
    Layer layer{in.type, in.shape, const_cast<double *>(in.mean.at<double>()), const_cast<double *>(in.var.at<double>()),
                call.affine ? in.weight.at() : nullptr, call.affine ? in.bias.at() : nullptr, 1e-5, call.act, 0.25};
    const void *residual = call.other == Other::none ? nullptr : in.residual.at();
    const auto running = [&]() -> Running {
        const auto stored = [&](double value) -> void * {
            Buffer &values = out.emplace_back(channels * (call.wide ? 8 : 4));
            for (int64_t c = 0; c < channels; ++c)
                if (call.wide) values.at<double>()[c] = value;
                else values.at<float>()[c] = float(value);
            return values.at();
        };
        auto *batches = out.emplace_back(sizeof(int64_t)).at<int64_t>();
        void *mean = stored(0);
        return {batches, mean, stored(1), call.wide, call.momentum};
    };
    switch (call.pass) {
    case Call::train:
    case Call::inplace: {
        layer.mean = static_cast<double *>(add(channels * sizeof(double)));
        layer.var = static_cast<double *>(add(channels * sizeof(double)));
        const bool inplace = call.pass == Call::inplace;
        void *y = inplace ? out.emplace_back(in.x).at() : add(in.x.size);
        arithmetic.train(layer, {inplace ? y : in.x.at(), residual, y}, running());
        break;
    }
    case Call::normalize: arithmetic.normalize(layer, {in.x.at(), residual, add(in.x.size)}); break;
    case Call::moments:
    case Call::exact_moments:
        layer.mean = static_cast<double *>(add(channels * sizeof(double)));
        layer.var = static_cast<double *>(add(channels * sizeof(double)));
        arithmetic.moments(layer, in.x.at(), call.pass == Call::exact_moments);
        break;
    case Call::backward:
    case Call::inverted: {
        const size_t wide = bytes_of(in.wide) * channels;
        void *d_x = add(in.x.size), *d_residual = residual ? add(in.x.size) : nullptr, *d_weight = add(wide);
        arithmetic.backward(layer, {in.grad.at(), in.x.at(), residual, call.other == Other::y, call.pass == Call::inverted,
                                    call.constant, d_x, d_residual, d_weight, add(wide)});
        break;
    }
    case Call::sums: {
        void *d_residual = residual ? add(in.x.size) : nullptr, *sums = add(2 * channels * sizeof(double));
        arithmetic.sum_gradients(layer, {in.grad.at(), in.x.at(), residual, call.other == Other::y, false, false, nullptr, d_residual},
                                 {static_cast<double *>(sums), nullptr});
        break;
    }
    case Call::input_gradient: {
        const std::vector<double> means(2 * channels, 0.5);
        arithmetic.input_gradient(layer, {in.grad.at(), in.x.at(), nullptr, false, false, false, add(in.x.size)},
                                  {nullptr, call.constant ? nullptr : means.data()});
        break;
    }
    case Call::update: arithmetic.update(channels, layer.mean, layer.var, double(in.shape.outer * in.shape.inner), running());
    }
    return out;
}

bool same(const std::vector<Buffer> &a, const std::vector<Buffer> &b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Buffer &p, const Buffer &q) {
        return p.size == q.size && std::memcmp(p.at(), q.at(), p.size) == 0;
    });
}

constexpr Shape SHAPES[] = {
    {1, 1, 1}, {2, 1, 1}, {1, 5, 1}, {7, 5, 1},                       // rows, together
    {300, 33, 1}, {65, 144, 1},                                       //   and the last task has more channels
    {9001, 33, 1}, {301, 1000, 1}, {100003, 1, 1},                    // rows, apart: joined or not; one channel
    {5, 3, 7}, {8, 50, 49}, {64, 48, 49},                             // small planes, together
    {2011, 3, 49}, {300, 7, 361}, {5003, 2, 60},                      // small planes, apart
    {3, 2, 529}, {3, 2, 4099}, {7, 1, 100},                           // large planes, together
    {3, 2, 20011}, {2, 1, 50021}, {300, 2, 601}, {513, 2, 519},       // large planes, apart: pieces, parts
    {15, 2, 4 * 4096 + 3}, {1, 1, 64 * 4096 + 1},                     //   and pieces that are all but whole blocks
    {31, 41, 8200},                                                   // large planes of a tensor beyond the last cache
};

int failures = 0;
long runs = 0;

void check(const char *isa, const Arithmetic &arithmetic, const Inputs &in, const Call &call) {
    const auto expected = results(arithmetic, in, call, 0x11);
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < OUTER; ++i)
        threads.emplace_back([&] {
            serial = false;
            if (!same(results(arithmetic, in, call, 0x77), expected)) ++wrong;
        });
    for (std::thread &thread : threads) thread.join();
    runs += OUTER;
    if (wrong == 0) return;
    failures += wrong;
    std::printf("%s %s (%ld, %ld, %ld) %s: %d of %d threads differ from the serial run\n", isa, TYPES[int(in.type)],
                long(in.shape.outer), long(in.shape.channels), long(in.shape.inner), call.name().c_str(), wrong.load(), OUTER);
}

void check_all(const char *isa, const Arithmetic &arithmetic) {
    const std::vector<Call> all = calls();
    size_t turn = 0;
    for (const Shape &shape : SHAPES)
        for (const Type type : {Type::float32, Type::float64, Type::bfloat16, Type::float16}) {
            const int64_t count = shape.outer * shape.channels * shape.inner;
            const size_t step = count > 1 << 22 ? 23 : count > 1 << 14 ? 9 : 1; // for larger tensors only every 9th or 23rd call
            if (step == 23 && type != Type::float32) continue;
            const Inputs in(type, shape);
            for (size_t i = turn++ % step; i < all.size(); i += step) check(isa, arithmetic, in, all[i]);
        }
    std::printf("%s: %ld runs so far, %d differ\n", isa, runs, failures);
    std::fflush(stdout);
}

} // namespace
} // namespace batchnorm

int main() {
    using namespace batchnorm;
    check_all("portable", portable::arithmetic);
#ifdef BATCHNORM_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        check_all("avx2", avx2::arithmetic);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        check_all("avx512", avx512::arithmetic);
#endif
    return failures != 0;
}
