"""kfac-jax with its adaptive rules, in a child process that is idle between two steps.

The parent sends a batch and waits; the child answers with the CPU seconds of its step. The code is
compiled before the first step, with other parameters, and that time is not counted.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from timed_race import Setting
from torch import Tensor, nn

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
WARM_UP_STEPS = 6  # with and without damping adaptation, with and without new inverses
AVERAGING_DECAY = 0.99
L2 = 1e-5  # as in the examples for this net, both that of kfac-jax and ours

Layers = list[dict[str, np.ndarray]]


class KfacJaxRunner:
    """The side of the parent."""

    def __init__(self, setting: Setting, *, initial_damping: float, inverse_period: int) -> None:
        self.spec = setting.spec
        model = setting.model()
        assert isinstance(model, nn.Sequential), "only a chain of layers can be rebuilt in jax"
        linear = [module for module in model if isinstance(module, nn.Linear)]
        activated = [
            isinstance(after, nn.Tanh)
            for module, after in zip(model, [*model[1:], None], strict=True)
            if isinstance(module, nn.Linear)
        ]
        layers = [{"w": _array(layer.weight).T, "b": _array(layer.bias)} for layer in linear]
        options = {"initial_damping": initial_damping, "inverse_update_period": inverse_period}
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        batch = setting.spec.batch_size
        assert isinstance(batch, int)
        self._process = context.Process(
            target=serve,
            args=(child, layers, activated, options, setting.spec.seed, batch),
            daemon=True,
        )
        self._process.start()
        child.close()
        self._pipe.recv()  # compiled

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """Do one step and return the CPU seconds the child took for it."""
        self._pipe.send(("step", (inputs.numpy(), targets.numpy())))
        return float(self._pipe.recv())

    def vectors(self) -> dict[str, Tensor]:
        """Return the parameters and their average."""
        self._pipe.send(("vectors", None))
        return {name: torch.from_numpy(vector) for name, vector in self._pipe.recv().items()}

    def close(self) -> None:
        """End the child."""
        self._pipe.close()
        self._process.join()


def _array(values: Tensor) -> np.ndarray:
    return values.detach().numpy().copy()


def serve(
    pipe: Connection,
    layers: Layers,
    activated: list[bool],
    options: dict[str, Any],
    seed: int,
    batch_size: int,
) -> None:
    """Answer the requests from `pipe` until it closes: the side of the child."""
    os.environ["XLA_FLAGS"] = ONE_THREAD
    training = Training(layers, activated, options, seed, batch_size)
    pipe.send("compiled")
    while True:
        try:
            request, argument = pipe.recv()
        except EOFError:
            return
        pipe.send(training.step(*argument) if request == "step" else training.vectors())


class Training:
    """The net in jax, its optimizer and the average of its parameters."""

    def __init__(
        self,
        layers: Layers,
        activated: list[bool],
        options: dict[str, Any],
        seed: int,
        batch_size: int,
    ) -> None:
        import jax
        import kfac_jax

        self._jax = jax
        self._optimizer = kfac_jax.Optimizer(
            value_and_grad_func=jax.value_and_grad(objective(activated)),
            l2_reg=L2,
            use_adaptive_learning_rate=True,
            use_adaptive_momentum=True,
            use_adaptive_damping=True,
            damping_adaptation_interval=5,
            damping_adaptation_decay=0.95,
            min_damping=1e-5,
            max_damping=1000.0,
            curvature_ema=0.95,
            num_burnin_steps=0,
            multi_device=False,
            **options,
        )
        self._average = jax.jit(
            lambda old, new, keep: jax.tree.map(lambda o, n: keep * o + (1 - keep) * n, old, new)
        )
        noise = np.random.default_rng(0).random((batch_size, len(layers[0]["w"])), np.float32)
        self._start(layers, seed, noise)
        for _ in range(WARM_UP_STEPS):
            self.step(noise, noise)
        self._start(layers, seed, noise)

    def _start(self, layers: Layers, seed: int, inputs: np.ndarray) -> None:
        jax = self._jax
        self._params = jax.tree.map(jax.numpy.array, layers)
        self._averaged = jax.tree.map(jax.numpy.zeros_like, self._params)
        self._key, key = jax.random.split(jax.random.PRNGKey(seed))
        self._state = self._optimizer.init(self._params, key, (inputs, inputs))
        self._num_steps = 0

    def step(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        """Do one step on a batch [N, features] and return its CPU seconds."""
        batch = self._jax.device_put((inputs, targets))
        self._jax.block_until_ready(batch)
        started = time.process_time()
        self._key, key = self._jax.random.split(self._key)
        self._params, self._state, _ = self._optimizer.step(
            self._params, self._state, key, batch=batch, global_step_int=self._num_steps
        )
        self._num_steps += 1
        keep = min(1 - 1 / self._num_steps, AVERAGING_DECAY)
        self._averaged = self._average(self._averaged, self._params, keep)
        self._jax.block_until_ready((self._params, self._state, self._averaged))
        return time.process_time() - started

    def vectors(self) -> dict[str, np.ndarray]:
        """Return the vectors in the order of the parent's model."""
        return {"loss": flat(self._params), "averaged_loss": flat(self._averaged)}


def objective(activated: list[bool]) -> Callable[[Any, Any], Any]:
    """Return the mean cross-entropy of a batch plus the l2 term, registered with kfac-jax."""
    import jax.numpy as jnp
    import kfac_jax

    def value(layers: Any, batch: Any) -> Any:
        outputs, targets = batch
        for layer, tanh in zip(layers, activated, strict=True):
            outputs = outputs @ layer["w"] + layer["b"]
            outputs = jnp.tanh(outputs) if tanh else outputs
        kfac_jax.register_multi_bernoulli_predictive_distribution(outputs, targets)
        nats = jnp.logaddexp(0.0, outputs) - targets * outputs
        square = sum(jnp.vdot(v, v) for layer in layers for v in layer.values())
        return nats.sum(axis=1).mean() + 0.5 * L2 * square

    return value


def flat(layers: Any) -> np.ndarray:
    """Return the layers as one vector [P] in the order of torch's `parameters()`."""
    return np.concatenate(
        [np.asarray(v).ravel() for layer in layers for v in (layer["w"].T, layer["b"])]
    )
