"""The race by CPU time: a short one from the command line, and what is read off its curves."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.paths import ROOT

SCRIPT = ROOT / "benchmarks/time_to_objective.py"
SMALL_JOB = """
name: small
task: autoencoder
task_args: {hidden: [30, 10], activation: tanh}
data: {name: mnist-5k, limit: 400}
steps: 1
batch_size: 100
optimizer: {damping: {initial: 3}}
"""


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script finds its modules beside itself."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def job(tmp_path: Path) -> str:
    """A job of a net so small that a race of it is over in a moment."""
    path = tmp_path / "job.yaml"
    path.write_text(SMALL_JOB)
    return str(path)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_a_race_in_two_parts_is_compared_by_steps_of_sgd(tmp_path: Path, job: str) -> None:
    results = tmp_path / "results.json"
    common = ("--spec", job, "--budget", "0.2", "--tuning-seconds", "0", "--results", str(results))
    for name in ("adam", "kfac"):
        done = command(*common, "--only", name)
        assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads(results.read_text())
    assert [list(run["entrants"]) for run in result["runs"]] == [["adam"], ["kfac"]]
    for run in result["runs"]:
        assert run["sgd_step_seconds"] > 0
        (entrant,) = run["entrants"].values()
        assert entrant["curve"][-1]["cpu_seconds"] >= entrant["budget_seconds"] == 0.2
        assert all(math.isfinite(point["loss"]) for point in entrant["curve"])
        assert entrant["curve"][-1]["step"] == entrant["steps"]
    (row,) = result["comparison"]
    assert (row["ours"], row["peer"], row["same_run"]) == ("kfac", "adam", False)

    printed = command("--results", str(results), "--table")
    assert "| 2 | kfac |" in printed.stdout


def test_a_grid_is_searched_once(tmp_path: Path, job: str) -> None:
    results = tmp_path / "results.json"
    common = (
        "--spec",
        job,
        "--tuning-seconds",
        "0.05",
        "--results",
        str(results),
        "--only",
        "adam",
    )
    done = command(*common, "--tune-only")
    assert done.returncode == 0, done.stderr
    tuning = json.loads(results.read_text())["tuning"]["adam"]
    losses = [trial["loss"] for trial in tuning["tried"]]
    assert len(losses) == 3
    best = min(tuning["tried"], key=lambda t: min(t["loss"], t["averaged_loss"]))
    assert tuning["best"] == best["options"]

    assert command(*common, "--budget", "0.2").returncode == 0
    assert json.loads(results.read_text())["tuning"]["adam"] == tuning


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("kfca", "'kfca' is not one of sgd, adam"),
        ("kfac=soon", "'soon' is not a number of CPU seconds"),
    ],
)
def test_a_wrong_contestant_is_named(argument: str, message: str) -> None:
    done = command("--short", "--only", argument)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"cpu_seconds": seconds, "loss": loss} for seconds, loss in points]


def test_seconds_to_a_loss_are_read_between_two_points() -> None:
    from timed_race import seconds_to

    points = curve((10, 100), (40, 80), (160, 60))
    assert seconds_to(points, 70) == pytest.approx(80)
    assert seconds_to(points, 80) == pytest.approx(40)
    assert seconds_to(points, 100) == 10
    assert seconds_to(points, 59) is None


def test_the_better_of_last_and_average_counts() -> None:
    from timed_race import score

    assert score({"loss": 3.0, "averaged_loss": 2.0}) == 2.0
    assert score({"loss": None}) == math.inf


def test_marks_end_with_the_budget() -> None:
    from timed_race import marks

    assert marks(100, 1) == (100,)
    assert marks(100, 3) == pytest.approx((100 / 15, 100 / 15**0.5, 100))


def run_of(unit: float, name: str, ours: bool, points: list[dict[str, float]]) -> dict[str, Any]:
    return {"sgd_step_seconds": unit, "entrants": {name: {"ours": ours, "curve": points}}}


def test_a_slow_hour_of_the_machine_cancels() -> None:
    from peers.comparison import compare

    def ratio(slowness: float) -> float:
        own_curve = curve((10 * slowness, 100), (40 * slowness, 80))
        runs = [
            run_of(0.1, "adam", False, curve((100, 90), (200, 80))),
            run_of(0.1 * slowness, "kfac", True, own_curve),
        ]
        (row,) = compare(runs)
        return float(row["ratio"])

    assert ratio(3) == ratio(1) == 0.2


def test_a_peer_is_judged_by_its_best_run_and_ours_beside_it() -> None:
    from peers.comparison import compare

    own_run = {"ours": True, "curve": curve((30, 80))}
    best = {"ours": False, "curve": curve((100, 80))}
    runs = [
        {"sgd_step_seconds": 0.1, "entrants": {"kfac": own_run, "muon": best}},
        run_of(0.1, "muon", False, curve((100, 95))),
        run_of(0.1, "kfac", True, curve((10, 80))),
    ]
    (row,) = compare(runs)
    assert (row["objective"], row["ratio"], row["same_run"]) == (80, 0.3, True)


def test_a_peer_that_does_not_arrive_gives_a_bound() -> None:
    from peers.comparison import compare

    runs = [
        run_of(0.1, "kfac-jax", False, curve((100, 70), (200, 58))),
        run_of(0.1, "kfac", True, curve((50, 59.2), (100, 54))),
    ]
    rows = {row["objective"]: row for row in compare(runs)}
    assert not rows[59.2]["at_most"]
    assert rows[54.9]["at_most"]
    assert rows[54.9]["peer_cpu_seconds"] == 200


def orthogonal_part(matrix: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_muon_in_float32_turns_singular_values_towards_one(shape: tuple[int, int]) -> None:
    from peers.first_order import orthogonalized

    torch.manual_seed(0)
    gradient = torch.randn(shape)
    # These coefficients converge to the orthogonal part; Muon's own stop short of it on purpose.
    result = orthogonalized(gradient, (1.875, -1.25, 0.375), 12, 1e-7)
    torch.testing.assert_close(result, orthogonal_part(gradient), atol=1e-4, rtol=0)


def test_torch_hands_its_muon_to_us() -> None:
    """The name that is replaced is the one that torch calls."""
    from peers import first_order

    layer = torch.nn.Linear(3, 2)
    matrices, _ = first_order.muon(0.5)(layer)
    layer.weight.grad = torch.randn(2, 3)
    before = layer.weight.detach().clone()
    called: list[torch.Size] = []
    torch_muon = sys.modules["torch.optim._muon"]
    ours: Callable[..., torch.Tensor] = vars(torch_muon)["_zeropower_via_newtonschulz"]
    assert ours is first_order.orthogonalized

    def counting(gradient: torch.Tensor, *arguments: Any) -> torch.Tensor:
        called.append(gradient.shape)
        return ours(gradient, *arguments)

    torch_muon._zeropower_via_newtonschulz = counting  # type: ignore[attr-defined]
    matrices.step()
    assert called == [before.shape]


def test_kfac_jax_starts_where_we_do_and_takes_a_step(job: str) -> None:
    pytest.importorskip("kfac_jax", reason="needs the extra `peers`")
    from peers.kfac_jax_runner import KfacJaxRunner
    from race import batches
    from timed_race import Setting

    from kfac_dist.config import load_spec

    spec = load_spec(Path(job))
    setting = Setting.load(spec, Path(job).parent, None)
    runner = KfacJaxRunner(setting, initial_damping=3.0, inverse_period=5)
    try:
        start = torch.nn.utils.parameters_to_vector(setting.model().parameters()).detach()
        assert torch.equal(runner.vectors()["loss"], start)
        before = setting.loss(start)
        for inputs, targets in itertools.islice(batches(spec, setting.data), 10):
            assert runner.step(inputs, targets) > 0
        vectors = runner.vectors()
    finally:
        runner.close()
    assert setting.loss(vectors["loss"]) < 0.9 * before
    assert not torch.equal(vectors["loss"], vectors["averaged_loss"])
