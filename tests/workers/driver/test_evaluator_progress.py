"""A long evaluation is asked for again until no case is left, and says how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers.driver.evaluator import evaluate_splits
from workers.exchange.messages import EvaluationSums


class SlowCrew:
    """Two workers with 4 cases each, of which a call evaluates 2."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def share_buffers(self) -> None: ...

    def averaged_parameters(self) -> None:
        return None

    def call_workers(
        self, method: str, split: str, parameters: object, before: Sequence[EvaluationSums]
    ) -> list[EvaluationSums]:
        self.calls.append(split)
        done = (before[0].num_cases if before else 0) + 2
        return [
            EvaluationSums(
                num_cases=done, loss=3.0 * done, metrics={}, half_square_norm=5.0, num_left=4 - done
            )
        ] * 2

    def gather(self, calls: list[Any]) -> list[Any]:
        return calls


class Heard:
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def event(self, kind: str, message: str, *, severity: str) -> None:
        assert kind == "evaluating"
        self.events.append((severity, message))


def test_progress_is_said_and_means_are_over_all_cases() -> None:
    crew, journal = SlowCrew(), Heard()
    found = evaluate_splits(crew, journal, 0.1)  # type: ignore[arg-type]
    assert crew.calls == ["train", "train", "test", "test"]
    assert found.train == found.test == {"objective": 3.5, "loss": 3.0}
    assert [severity for severity, _ in journal.events] == ["warning", "info"]
    assert journal.events[0][1].startswith("evaluating: 4 of 8 cases of the train data set")
    assert "evaluation.limit" in journal.events[0][1]
