"""Optimizers of torch and of packages with its interface: a backward pass, then a step."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from timed_race import Setting
from torch import Tensor, nn

from kfac_dist.core.passes.distributions import get_distribution
from kfac_dist.core.step.averaging import ParameterAverage
from kfac_dist.core.vector import flatten
from kfac_dist.tasks import Task

AVERAGING_DECAY = 0.99  # upper limit of the weight of the old average

Optimizers = Callable[[nn.Module], list[torch.optim.Optimizer]]


def gradient_step(
    model: nn.Module, task: Task, optimizers: list[torch.optim.Optimizer]
) -> Callable[[Tensor, Tensor], None]:
    """Return a step on the mean loss of a batch."""
    predictive = get_distribution(task.distribution)

    def step(inputs: Tensor, targets: Tensor) -> None:
        model.zero_grad()
        predictive.loss(model(inputs), targets).mean().backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


class FirstOrderRunner:
    """The optimizers of a model, and the average of its parameters."""

    def __init__(self, setting: Setting, make: Optimizers) -> None:
        self.spec = setting.spec
        model = setting.model()
        self._step = gradient_step(model, setting.task, make(model))
        self._parameters = list(model.parameters())
        self._average = ParameterAverage(AVERAGING_DECAY, start=1)
        self._num_steps = 0

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """Do one step and return the CPU seconds it took."""
        started = time.process_time()
        self._step(inputs, targets)
        self._num_steps += 1
        self._average.update(self._num_steps, flatten(self._parameters))
        return time.process_time() - started

    def vectors(self) -> dict[str, Tensor]:
        """Return the parameters and their average."""
        average = self._average.value
        assert average is not None
        return {"loss": flatten(self._parameters), "averaged_loss": average}

    def close(self) -> None:
        """Do nothing: the runner has started nothing outside this process."""


def sgd(lr: float) -> Optimizers:
    """SGD with Nesterov's momentum."""
    return lambda model: [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)]


def adam(lr: float) -> Optimizers:
    """Adam."""
    return lambda model: [torch.optim.Adam(model.parameters(), lr=lr)]


def muon(lr: float) -> Optimizers:
    """Muon for the matrices, Adam with the learning rate 1e-3 for the biases.

    Torch orthogonalises in bfloat16. On a CPU without instructions for it, that is some twenty
    times slower than float32, so this function replaces it by a version in float32.
    """
    import torch.optim._muon as torch_muon

    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        torch_muon._zeropower_via_newtonschulz = orthogonalized
        matrices = [p for p in model.parameters() if p.dim() == 2]
        biases = [p for p in model.parameters() if p.dim() != 2]
        return [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.0),
            torch.optim.Adam(biases, lr=1e-3),
        ]

    return make


def orthogonalized(
    gradient: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
) -> Tensor:
    """Move all singular values of a matrix towards 1 by `X <- aX + b(XX'X) + c(XX'XX'X)`."""
    a, b, c = ns_coefficients
    wide = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
    x = wide / wide.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is gradient else x.T


def soap(lr: float) -> Optimizers:
    """SOAP: Adam in the eigenbases of Shampoo, refreshed every 10 steps."""
    from pytorch_optimizer import SOAP

    return lambda model: [SOAP(model.parameters(), lr=lr, weight_decay=0.0)]


def shampoo(lr: float) -> Optimizers:
    """Distributed Shampoo: blocks up to 512, roots every 20 steps, step sizes of RMSProp."""
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [
            ScalableShampoo(
                model.parameters(),
                lr=lr,
                betas=(0.9, 0.99),
                moving_average_for_momentum=True,
                preconditioning_compute_steps=20,
                graft_type=LayerWiseGrafting.RMSPROP,
            )
        ]

    return make
