// Forward and backward passes in train mode, normalization by given statistics, and statistics of data sets, for one
// instruction set (ISA).
#include "arithmetic.hpp"
#include "columns.hpp"
#include "plan.hpp"
#include "valid.hpp"

#include <vector>

namespace batchnorm::ISA {
namespace {

template <class W> using All = std::vector<Coefficients<W>>;

// ---- moments

// A guess of every channel's mean: the mean of a few values of a few rows.
template <class T, class A> std::vector<Guess<A>> guess(const T *x, const Window &window) {
    const int64_t length = window.columns / window.channels, values = std::min<int64_t>(length, 4);
    // so many values that a guess 1.5 standard deviations away from the mean is nearly impossible
    const int64_t step = std::max<int64_t>(1, window.rows / (values == 1 ? 16 : 8));
    std::vector<double> sums(window.channels);
    int64_t count = 0;
    for (int64_t row = 0; row < window.rows; row += step, count += values)
        for (int64_t c = 0; c < window.channels; ++c)
            for (int64_t i = 0; i < values; ++i) sums[c] += widen(x[window.at + row * window.stride + c * length + i]);
    std::vector<Guess<A>> guesses(window.channels);
    for (int64_t c = 0; c < window.channels; ++c)
        if (const A mean = A(sums[c] / double(count)); std::isfinite(mean)) guesses[c].shift = mean;
    return guesses;
}

// Calls sum(guesses, sums) until no guess needs to be improved, at most four times, and writes mean and variance.
template <class A, class Sum> void measure(double count, std::vector<Guess<A>> guesses, double *mean, double *var, const Sum &sum) {
    std::vector<Sums> sums(guesses.size());
    bool again = true;
    for (int attempt = 0; again; ++attempt) {
        std::fill(sums.begin(), sums.end(), Sums{});
        sum(guesses.data(), sums.data());
        again = false;
        for (size_t c = 0; c < guesses.size() && attempt < 3; ++c) again |= guesses[c].improve(sums[c], count);
    }
    for (size_t c = 0; c < guesses.size(); ++c) guesses[c].finish(sums[c], count, mean[c], var[c]);
}

// Calls sum(window, part) for all parts in parallel, then adds the parts to each channel in order.
template <class Sum> void sum_apart(const Plan &plan, Sums *channels, const Sum &sum) {
    std::vector<Sums> parts(plan.tasks * plan.width);
    plan.run([&](int64_t task, const Window &window) { sum(window, &parts[task * plan.width]); });
    for (int64_t task = 0; task < plan.tasks; ++task) {
        const Window window = plan.window(task);
        for (int64_t c = 0; c < window.channels; ++c) channels[window.channel + c].add(parts[task * plan.width + c]);
    }
}

template <class T, class A> void measure_window(const Plan &plan, const Layer &layer, const T *x, const Window &window) {
    measure(double(plan.count()), guess<T, A>(x, window), layer.mean + window.channel, layer.var + window.channel,
            [&](const Guess<A> *guesses, Sums *sums) { sum_moments(x, window, guesses, sums); });
}

template <class T, class A> void measure_apart(const Plan &plan, const Layer &layer, const T *x) {
    measure(double(plan.count()), guess<T, A>(x, plan.whole()), layer.mean, layer.var,
            [&](const Guess<A> *guesses, Sums *sums) {
                sum_apart(plan, sums, [&](const Window &window, Sums *part) {
                    sum_moments(x, window, guesses + window.channel, part);
                });
            });
}

template <class T, class A> void measure_all(const Layer &layer, const T *x) {
    const Plan plan(layer.shape, sizeof(T));
    if (!plan.together) return measure_apart<T, A>(plan, layer, x);
    plan.run([&](int64_t, const Window &window) { measure_window<T, A>(plan, layer, x, window); });
}
template <class T, class A> void measure_valid(const Layer &layer, const T *x) {
    const Padded padded(layer.shape, layer.valid);
    measure(double(padded.count()), padded.guess<T, A>(x), layer.mean, layer.var,
            [&](const Guess<A> *guesses, Sums *sums) { padded.sum<A, 2>(guesses, sums, moments_of<T, A>(x)); });
}
template <class T> void moments(const Layer &layer, const T *x, bool exact) {
    using W = Wide<T>;
    if (layer.valid) return exact ? measure_valid<T, double>(layer, x) : measure_valid<T, W>(layer, x);
    exact ? measure_all<T, double>(layer, x) : measure_all<T, W>(layer, x);
}

// ---- forward

// Calls run.template operator()<A>() with the class of the layer's activation.
template <class Work> void with_act(const Layer &layer, const Work &run) {
    switch (layer.act) {
    case Act::none: return run.template operator()<Identity>();
    case Act::relu: return run.template operator()<Relu>();
    default: return run.template operator()<Curve>();
    }
}

template <class W> All<W> coefficients(const Layer &layer, int64_t first, int64_t number) {
    All<W> all;
    all.reserve(number);
    for (int64_t c = first; c < first + number; ++c) all.emplace_back(layer, c);
    return all;
}

template <class T> using ApplyForward = void (*)(const Layer &, const Forward &, const Window &, const Coefficients<Wide<T>> *);

template <class T, class A> ApplyForward<T> with_residual(bool there) {
    return there ? &apply_forward<T, A, true> : &apply_forward<T, A, false>;
}
template <class T> ApplyForward<T> forward_for(const Layer &layer, const Forward &job) {
    const bool residual = job.residual != nullptr;
    switch (layer.act) {
    case Act::none: return with_residual<T, Identity>(residual);
    case Act::relu: return with_residual<T, Relu>(residual);
    default: return with_residual<T, Curve>(residual);
    }
}

template <class T, class A> void normalize_valid(const Layer &layer, const Forward &job) {
    const All<Wide<T>> all = coefficients<Wide<T>>(layer, 0, layer.shape.channels);
    const Padded padded(layer.shape, layer.valid);
    T *y = static_cast<T *>(job.y);
    if (job.residual) padded.apply<Wide<T>, 3>(all.data(), y, forward_of<T, A, true>(layer, job, 0));
    else padded.apply<Wide<T>, 3>(all.data(), y, forward_of<T, A, false>(layer, job, 0));
}

template <class T> void train(const Layer &layer, const Forward &job) {
    using W = Wide<T>;
    const T *x = static_cast<const T *>(job.x);
    const auto apply = forward_for<T>(layer, job);
    const Plan plan(layer.shape, sizeof(T));
    if (plan.together) {
        plan.run([&](int64_t, const Window &window) {
            measure_window<T, W>(plan, layer, x, window);
            apply(layer, job, window, coefficients<W>(layer, window.channel, window.channels).data());
        });
        return;
    }
    measure_apart<T, W>(plan, layer, x);
    const All<W> all = coefficients<W>(layer, 0, layer.shape.channels);
    plan.run([&](int64_t, const Window &window) { apply(layer, job, window, &all[window.channel]); });
}

template <class T> void normalize(const Layer &layer, const Forward &job) {
    if (layer.valid) return with_act(layer, [&]<class A>() { normalize_valid<T, A>(layer, job); });
    const auto apply = forward_for<T>(layer, job);
    const All<Wide<T>> all = coefficients<Wide<T>>(layer, 0, layer.shape.channels);
    const Plan plan(layer.shape, sizeof(T), true);
    plan.run([&](int64_t, const Window &window) { apply(layer, job, window, &all[window.channel]); });
}

// ---- backward

template <class T> struct Passes {
    void (*sum)(const Layer &, const Backward &, const Window &, const Coefficients<Wide<T>> *, Sums *);
    void (*apply)(const Layer &, const Backward &, const T *, const Window &, const Coefficients<Wide<T>> *);
};
template <class T, class A> Passes<T> passes(const Backward &job) {
    // with a residual, the first pass stores the gradient of p, so the second pass applies no activation
    if (job.other) return {&sum_products<T, A, true, false>, &apply_backward<T, Identity, false>};
    return {&sum_products<T, A, false, false>, &apply_backward<T, A, false>};
}
template <class T> Passes<T> backward_for(const Layer &layer, const Backward &job) {
    switch (layer.act) {
    case Act::none: return {&sum_products<T, Identity, false, false>, &apply_backward<T, Identity, false>};
    case Act::relu: return passes<T, Relu>(job);
    default: break;
    }
    if (!job.x_is_y) return passes<T, Curve>(job);
    return {&sum_products<T, Curve, false, true>, &apply_backward<T, Curve, true>};
}

Plan backward_plan(const Layer &layer, const Backward &job, int64_t value) {
    return Plan(layer.shape, (job.other ? 3 : 2) * value);
}

template <class T> void backward(const Layer &layer, const Backward &job) {
    using W = Wide<T>;
    const auto [sum, apply] = backward_for<T>(layer, job);
    const bool stored = job.other && layer.act != Act::none && !job.x_is_y; // whether the first pass stores the gradient of p
    const T *grad = static_cast<const T *>(stored ? job.d_residual : job.grad);
    const Plan plan = backward_plan(layer, job, sizeof(T));
    const double count = double(plan.count());
    const auto finish = [&](All<W> &all, int64_t first, const std::vector<Sums> &sums) {
        for (size_t i = 0; i < all.size(); ++i) {
            const int64_t c = first + int64_t(i);
            const Sums total = Coefficients<W>::of_gradient(layer, c, sums[i]);
            static_cast<W *>(job.d_weight)[c] = W(total.second);
            static_cast<W *>(job.d_bias)[c] = W(total.first);
            const Sums means{total.first / count, total.second / count};
            all[i] = Coefficients<W>(layer, c, job.constant ? nullptr : &means);
        }
    };
    if (plan.together) {
        plan.run([&](int64_t, const Window &window) {
            All<W> all = coefficients<W>(layer, window.channel, window.channels);
            std::vector<Sums> sums(window.channels);
            sum(layer, job, window, all.data(), sums.data());
            finish(all, window.channel, sums);
            apply(layer, job, grad, window, all.data());
        });
        return;
    }
    All<W> all = coefficients<W>(layer, 0, layer.shape.channels);
    std::vector<Sums> sums(layer.shape.channels);
    sum_apart(plan, sums.data(), [&](const Window &window, Sums *part) { sum(layer, job, window, &all[window.channel], part); });
    finish(all, 0, sums);
    plan.run([&](int64_t, const Window &window) { apply(layer, job, grad, window, &all[window.channel]); });
}

template <class T, class A> void sum_valid(const Layer &layer, const Backward &job, const All<Wide<T>> &all, Sums *sums) {
    const Padded padded(layer.shape, layer.valid);
    if (job.other && layer.act != Act::none) padded.sum<Wide<T>, 4>(all.data(), sums, products_of<T, A, true, false>(layer, job, 0));
    else padded.sum<Wide<T>, 4>(all.data(), sums, products_of<T, A, false, false>(layer, job, 0));
}

template <class T> void sum_gradients(const Layer &layer, const Backward &job, const Halves &halves) {
    using W = Wide<T>;
    const auto sum = backward_for<T>(layer, job).sum;
    const int64_t channels = layer.shape.channels;
    const All<W> all = coefficients<W>(layer, 0, channels);
    const Plan plan = backward_plan(layer, job, sizeof(T));
    std::vector<Sums> sums(channels);
    if (layer.valid)
        with_act(layer, [&]<class A>() { sum_valid<T, A>(layer, job, all, sums.data()); });
    else if (plan.together)
        plan.run([&](int64_t, const Window &window) { sum(layer, job, window, &all[window.channel], &sums[window.channel]); });
    else
        sum_apart(plan, sums.data(), [&](const Window &window, Sums *part) { sum(layer, job, window, &all[window.channel], part); });
    for (int64_t c = 0; c < channels; ++c) {
        const Sums total = Coefficients<W>::of_gradient(layer, c, sums[c]);
        halves.sums[c] = total.first, halves.sums[channels + c] = total.second;
    }
}

template <class T> void input_gradient(const Layer &layer, const Backward &job, const Halves &halves) {
    using W = Wide<T>;
    const auto apply = backward_for<T>(layer, job).apply;
    const int64_t channels = layer.shape.channels;
    All<W> all;
    for (int64_t c = 0; c < channels; ++c) {
        const Sums means = halves.means ? Sums{halves.means[c], halves.means[channels + c]} : Sums{};
        all.emplace_back(layer, c, halves.means ? &means : nullptr);
    }
    const T *grad = static_cast<const T *>(job.grad);
    if (layer.valid) return with_act(layer, [&]<class A>() {
        const Padded padded(layer.shape, layer.valid);
        padded.apply<W, FIELDS>(all.data(), static_cast<T *>(job.d_x), gradient_of<T, A, false>(layer, job, grad, 0));
    });
    const Plan plan(layer.shape, 2 * sizeof(T), true);
    plan.run([&](int64_t, const Window &window) { apply(layer, job, grad, window, &all[window.channel]); });
}

// ---- running statistics

template <class W> int64_t move_towards(int64_t channels, const double *mean, const double *var, double count, const Running &running) {
    const bool average = std::isnan(running.momentum);
    const double unbias = count / (count - 1);
    const auto finite = [&](int64_t c) { return std::isfinite(W(mean[c])) && std::isfinite(W(var[c] * unbias)); };
    int64_t skipped = 0;
    for (int64_t c = 0; c < channels; ++c) skipped += !finite(c);
    if (average && skipped) return skipped; // all channels share one count, so a batch enters all averages or none
    ++*running.batches;
    const double momentum = average ? 1 / double(*running.batches) : running.momentum;
    const auto move = [&](void *stored, int64_t c, double to) {
        W &old = static_cast<W *>(stored)[c];
        const W moved = W(double(old) + momentum * (to - double(old)));
        if (std::isfinite(moved)) old = moved;
    };
    for (int64_t c = 0; c < channels; ++c)
        if (finite(c)) move(running.mean, c, mean[c]), move(running.var, c, var[c] * unbias);
    return skipped;
}

// ---- by type

// Calls run.template operator()<T>() with the C++ type T of `type`.
template <class Run> void with_type(Type type, const Run &run) {
    switch (type) {
    case Type::float32: return run.template operator()<float>();
    case Type::float64: return run.template operator()<double>();
    case Type::bfloat16: return run.template operator()<bfloat16>();
    case Type::float16: return run.template operator()<float16>();
    }
}

int64_t update(int64_t channels, const double *mean, const double *var, double count, const Running &running) {
    return (running.wide ? move_towards<double> : move_towards<float>)(channels, mean, var, count, running);
}

int64_t train_any(const Layer &layer, const Forward &job, const Running &running) {
    with_type(layer.type, [&]<class T>() { train<T>(layer, job); });
    if (running.batches == nullptr) return 0;
    return update(layer.shape.channels, layer.mean, layer.var, double(layer.shape.outer * layer.shape.inner), running);
}
void backward_any(const Layer &layer, const Backward &job) {
    with_type(layer.type, [&]<class T>() { backward<T>(layer, job); });
}
void normalize_any(const Layer &layer, const Forward &job) {
    with_type(layer.type, [&]<class T>() { normalize<T>(layer, job); });
}
void moments_any(const Layer &layer, const void *x, bool exact) {
    with_type(layer.type, [&]<class T>() { moments<T>(layer, static_cast<const T *>(x), exact); });
}
void sum_gradients_any(const Layer &layer, const Backward &job, const Halves &halves) {
    with_type(layer.type, [&]<class T>() { sum_gradients<T>(layer, job, halves); });
}
void input_gradient_any(const Layer &layer, const Backward &job, const Halves &halves) {
    with_type(layer.type, [&]<class T>() { input_gradient<T>(layer, job, halves); });
}

} // namespace

extern const Arithmetic arithmetic{train_any, backward_any, normalize_any, moments_any, update, sum_gradients_any, input_gradient_any,
                            add_columns};

} // namespace batchnorm::ISA
