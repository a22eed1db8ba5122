"""A task of your own: a model, its data, and the distribution of its outputs.

Here a small network learns the height of a damped wave from place and time. Each worker process
loads this file by itself, so its results must depend only on the arguments.
"""

import torch
from torch import nn
from torch.utils.data import TensorDataset


class DampedWave:
    """Regression: `exp(-t) cos(frequency * x - 4 t)` from `(x, t)`, with a little noise.

    The constructor's arguments are the `task_args` of the specification.
    """

    # The outputs are the mean of a Gaussian with unit variance. The other distributions are
    # "bernoulli" and "categorical", for which the outputs are logits.
    distribution = "gaussian"

    def __init__(self, width=32, frequency=3.0, num_cases=2000):
        self.width = width
        self.frequency = frequency
        self.num_cases = num_cases

    def model(self):
        """Return the network; the job sets its seed before it calls this."""
        return nn.Sequential(
            nn.Linear(2, self.width),
            nn.Tanh(),
            nn.Linear(self.width, self.width),
            nn.Tanh(),
            nn.Linear(self.width, 1),
        )

    def train_data(self, data_dir):
        """Return pairs (input, target); `data_dir` is the folder given as --data-dir, or None."""
        return self._waves(self.num_cases, seed=1)

    def test_data(self, data_dir):
        """Return the cases for evaluation."""
        return self._waves(500, seed=2)

    def metrics(self, outputs, targets):
        """Optional: return one number a case for each name; the job reports the means."""
        return {"squared_error": (outputs - targets).square().sum(dim=1)}

    def _waves(self, num_cases, seed):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.rand(num_cases, 2, generator=generator) * 2 - 1
        x, t = inputs[:, :1], inputs[:, 1:] + 1
        height = torch.exp(-t) * torch.cos(self.frequency * x - 4 * t)
        noise = 0.01 * torch.randn(num_cases, 1, generator=generator)
        return TensorDataset(inputs, height + noise)
