"""The serial K-FAC of this project."""

from __future__ import annotations

import json
import time
from typing import Any

from timed_race import Setting
from torch import Tensor

from kfac_dist import KFAC
from kfac_dist.config import JobSpec, parse_spec
from kfac_dist.core.vector import flatten

# Changes to a specification: new values by dotted key.
Changes = dict[str, Any]


def changed(spec: JobSpec, changes: Changes) -> JobSpec:
    """Return a job with `changes`; keys such as `optimizer.lr` lead into sections."""
    content = spec.model_dump()
    for key, value in changes.items():
        *path, last = key.split(".")
        section = content
        for name in path:
            section = section[name]
        section[last] = value
    return parse_spec(json.loads(json.dumps(content)))


class SerialRunner:
    """`KFAC` with the options of the job and some changes."""

    def __init__(self, setting: Setting, changes: Changes) -> None:
        self.spec = changed(setting.spec, changes)
        model = setting.model()
        self._parameters = list(model.parameters())
        self._optimizer = KFAC(
            model,
            distribution=setting.task.distribution,
            seed=self.spec.seed,
            **self.spec.optimizer.model_dump(exclude={"name"}),
        )

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """Do one step and return the CPU seconds it took."""
        started = time.process_time()
        self._optimizer.step(inputs, targets)
        return time.process_time() - started

    def vectors(self) -> dict[str, Tensor]:
        """Return the parameters and, once the job's averaging has started, their average."""
        vectors = {"loss": flatten(self._parameters)}
        average = self._optimizer.averaged_parameters
        return vectors if average is None else vectors | {"averaged_loss": average}

    def close(self) -> None:
        """Do nothing: the runner has started nothing outside this process."""
