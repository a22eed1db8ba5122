"""Memory by role: what explains a peak is found, and what does not is seen."""

from __future__ import annotations

from typing import Any

import pytest

from tests.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, as a module: it finds its own beside itself."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory

    return memory


def runs_of(memory: Any, **peaks: Any) -> list[Any]:
    rows = ((1e6, 2e6, 1e6), (3e6, 5e6, 1e6), (4e6, 9e6, 3e6), (5e6, 6e6, 2e6))
    sizes = [memory.Size(*row, 0) for row in rows]
    idle = memory.Size(0, 0, 0, 0)
    return [
        memory.Run(
            size=size,
            peak_bytes={role: peak(size) for role, peak in peaks.items()},
            refresh_seconds=0.1,
            inverse_cpu_seconds=1.0,
        )
        for size in (idle, *sizes)
    ]


def test_vectors_and_factors_are_counted(memory: Any) -> None:
    def peak(size: Any) -> float:
        of_factors = 1.5 * size.factor_elements + 9 * size.largest_elements
        return 1e8 + 4 * (7 * size.num_parameters + of_factors)

    idle, *runs = runs_of(memory, parameter_server=peak)
    found = memory.explain(idle, runs, "parameter_server")
    assert (found["num_vectors"], found["num_factors"], found["num_largest"]) == (7, 1.5, 9)
    assert found["explained_over_own"] == [1, 1, 1, 1]


def test_memory_that_grows_otherwise_is_not_explained(memory: Any) -> None:
    idle, *runs = runs_of(memory, inverse_worker=lambda size: 1e-5 * size.num_parameters**2)
    explained = memory.explain(idle, runs, "inverse_worker")["explained_over_own"]
    assert max(abs(share - 1) for share in explained) > 0.05


def test_activations_count_for_gradient_workers_alone(memory: Any) -> None:
    def peak(size: Any) -> float:
        return 4 * (size.num_parameters + size.activation_elements)

    idle, *runs = runs_of(memory, gradient_worker=peak, parameter_server=peak)
    runs = [run._replace(size=run.size._replace(activation_elements=5e6)) for run in runs]
    runs = [
        run._replace(peak_bytes={role: peak(run.size) for role in run.peak_bytes}) for run in runs
    ]
    assert memory.explain(idle, runs, "gradient_worker")["explained_over_own"] == [1] * 4
    assert memory.explain(idle, runs, "parameter_server")["explained_over_own"] != [1] * 4
