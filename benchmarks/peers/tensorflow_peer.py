"""TensorFlow: fused_batch_norm inside tf.function. Its kernels for the CPU take channels-last tensors of four axes."""

from __future__ import annotations

import os

from worker import Unsupported, arrays, means, serve


def load():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    import tensorflow as tf

    threads = int(os.environ["OMP_NUM_THREADS"])
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    return tf.__version__


def prepare(case):
    import tensorflow as tf

    if not case["channels_last"] or len(case["shape"]) != 4:
        raise Unsupported("its fused batch norm for the CPU takes (N, H, W, C) only")
    x, residual, grad = (tf.cast(tf.constant(values), case["dtype"]) for values in arrays(case))
    gamma, beta = tf.ones(case["shape"][1]), tf.zeros(case["shape"][1])
    stored = {} if case["train"] else {"mean": tf.zeros_like(gamma), "variance": tf.ones_like(gamma)}

    def run():
        normalize = tf.compat.v1.nn.fused_batch_norm
        y, *moments = normalize(x, gamma, beta, epsilon=1e-5, is_training=case["train"], **stored)
        y = y + residual if case["residual"] else y
        return (tf.nn.relu(y) if case["relu"] else y), moments

    @tf.function
    def both():
        wanted = [x, gamma, beta, residual][: 4 if case["residual"] else 3]
        with tf.GradientTape() as tape:
            tape.watch(wanted)
            y, moments = run()
        return y, moments, tape.gradient(y, wanted, output_gradients=grad)

    function = both if case["backward"] else tf.function(run)
    result = function()
    found = means(result[0], result[2][0]) if case["backward"] else means(result[0])
    return function, found


if __name__ == "__main__":
    serve(load, prepare)
