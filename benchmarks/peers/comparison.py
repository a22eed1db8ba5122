"""Compare the curves of a race: seconds to an objective, ours over a peer's.

Within one run, seconds are compared directly; across runs, in steps of the SGD that ran in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from timed_race import score, seconds_to

KFAC_JAX, KFAC_JAX_GOALS = "kfac-jax", (59.2, 54.9)

Run = Mapping[str, Any]


def compare(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row for each of our entrants, each peer and each objective of the peer.

    The objective of a peer is the lowest that it reaches; for kfac-jax there are two fixed ones.
    `at_most` means that the peer's budget ended before it reached the objective, so the ratio is an
    upper bound.
    """
    rows = []
    for name, our_run in _latest(runs, ours=True).items():
        for peer, peer_run in _latest(runs, ours=False).items():
            for goal in _goals(peer, peer_run):
                own_run = peer_run if name in peer_run["entrants"] else our_run
                rows.append(_row(name, own_run, peer, peer_run, goal))
    return rows


def _goals(peer: str, run: Run) -> tuple[float, ...]:
    return KFAC_JAX_GOALS if peer == KFAC_JAX else (_lowest(run, peer),)


def _latest(runs: Sequence[Run], *, ours: bool) -> dict[str, Run]:
    """Return the last run of each of our entrants, and the best run of each peer."""
    chosen: dict[str, Run] = {}
    for run in runs:
        for name, entrant in run["entrants"].items():
            if entrant["ours"] is not ours:
                continue
            if ours or name not in chosen or _lowest(run, name) < _lowest(chosen[name], name):
                chosen[name] = run
    return chosen


def _lowest(run: Run, name: str) -> float:
    return min(score(point) for point in run["entrants"][name]["curve"])


def _row(name: str, own_run: Run, peer: str, peer_run: Run, goal: float) -> dict[str, Any]:
    own, other = own_run["entrants"][name], peer_run["entrants"][peer]
    own_seconds = seconds_to(own["curve"], goal)
    reached = seconds_to(other["curve"], goal)
    peer_seconds = other["curve"][-1]["cpu_seconds"] if reached is None else reached
    own_unit, peer_unit = own_run["sgd_step_seconds"], peer_run["sgd_step_seconds"]
    ratio = None if own_seconds is None else (own_seconds / own_unit) / (peer_seconds / peer_unit)
    return {
        "ours": name,
        "peer": peer,
        "objective": round(goal, 2),
        "peer_cpu_seconds": round(peer_seconds, 1),
        "our_cpu_seconds": None if own_seconds is None else round(own_seconds, 1),
        "ratio": None if ratio is None else round(ratio, 3),
        "at_most": reached is None,
        "same_run": own_run is peer_run,
    }


def compare_jobs(curves: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return for each baseline its lowest objective and the seconds K-FAC needs to reach it."""
    rows = []
    for name, curve in curves.items():
        if name == "kfac":
            continue
        goal = min(score(point) for point in curve)
        peer = seconds_to(curve, goal, "wall_seconds")
        ours = seconds_to(curves["kfac"], goal, "wall_seconds")
        assert peer is not None, "a curve reaches its own lowest point"
        ratio = None if ours is None else round(ours / peer, 3)
        rows.append(
            {
                "peer": name,
                "objective": round(goal, 2),
                "peer_wall_seconds": peer,
                "our_wall_seconds": ours,
                "ratio": ratio,
            }
        )
    return rows


def table(result: Mapping[str, Any]) -> str:
    """Return the results as Markdown tables."""
    lines = [*_race_lines(result["runs"]), "", *_comparison_lines(result["comparison"])]
    if "distributed" in result:
        lines += ["", *_job_lines(result["distributed"])]
    return "\n".join(lines)


def _job_lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield "| job | gradient workers | steps | steps a second | objective at the end |"
    yield "| --- | --- | --- | --- | --- |"
    for name, job in found["jobs"].items():
        end = job["curve"][-1]
        at = f"{score(end):.2f} after {end['wall_seconds']:.0f} s"
        workers = job["workers"]["gradient"]
        yield f"| {name} | {workers} | {job['steps']} | {job['steps_per_second']:.2f} | {at} |"
    yield ""
    yield "| peer | objective | peer, s | K-FAC, s | K-FAC over peer |"
    yield "| --- | --- | --- | --- | --- |"
    for row in found["comparison"]:
        ours = "not reached" if row["ratio"] is None else f"{row['our_wall_seconds']:.1f}"
        yield (
            f"| {row['peer']} | {row['objective']} | {row['peer_wall_seconds']:.1f} | {ours} | "
            f"{row['ratio'] or ''} |"
        )


def _race_lines(runs: Sequence[Run]) -> Iterator[str]:
    yield "| run | optimizer | options | steps | a step, in steps of SGD | objective at the end |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for number, run in enumerate(runs, start=1):
        for name, entrant in run["entrants"].items():
            shown = {} if entrant["ours"] else entrant["options"]  # ours are long; see the JSON
            options = ", ".join(f"{key} {value}" for key, value in shown.items())
            cost = entrant["seconds_a_step"] / run["sgd_step_seconds"]
            end = entrant["curve"][-1]
            at = f"{score(end):.2f} after {end['cpu_seconds']:.0f} s"
            yield f"| {number} | {name} | {options} | {entrant['steps']} | {cost:.2f} | {at} |"


def _comparison_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| ours | peer | objective | peer, CPU s | ours, CPU s | ours over peer |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in rows:
        bound = "> " if row["at_most"] else ""
        ours = "not reached" if row["ratio"] is None else f"{row['our_cpu_seconds']}"
        ratio = "" if row["ratio"] is None else f"{'< ' if row['at_most'] else ''}{row['ratio']}"
        yield (
            f"| {row['ours']} | {row['peer']} | {row['objective']} | "
            f"{bound}{row['peer_cpu_seconds']} | {ours} | {ratio} |"
        )
