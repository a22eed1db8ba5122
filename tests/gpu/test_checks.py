"""The checks of `make test-gpu`, made small, on the CPU: so that nobody's GPU finds their slips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu import checks, run
from tests.gpu.checks import CPU, Table, inversions, parity, phases, poisoned_copies, reads
from tests.gpu.lost_member import killed_member
from tests.gpu.test_host_reads import READS_A_STEP


def test_directions_are_compared_for_every_inverse_and_the_setting_is_restored():
    table = parity(CPU)
    assert table.rows == [(inverse, "0.0e+00") for inverse in checks.INVERSES]
    assert torch.get_float32_matmul_precision() == "highest"


def test_directions_that_differ_fail_the_check(monkeypatch):
    monkeypatch.setattr(checks, "_direction_error", lambda inverse, device: 2e-4)
    with pytest.raises(AssertionError, match="block_diagonal: directions differ by 2"):
        parity(CPU)


def test_the_reads_of_a_step_are_counted_and_bounded():
    table = reads(CPU, READS_A_STEP)
    assert {layers for layers, _ in table.rows} == {"2", "6"}
    with pytest.raises(AssertionError, match="copies to the host in a step, not 3"):
        reads(CPU, 3)


def test_copies_have_the_values_of_their_tensors():
    assert poisoned_copies(CPU, num_elements=1000).rows[0][0] == "0.0"


def test_a_killed_member_is_noticed_by_all_others():
    ((backend, others, seconds, _),) = killed_member("gloo", num_workers=2, timeout_seconds=60).rows
    assert (backend, others) == ("gloo", "2")
    assert float(seconds) < 60


def test_phases_and_inversions_are_timed_and_written(tmp_path: Path):
    found = [phases(CPU, sizes=(12, 8, 3), batch_size=40), inversions(CPU, orders=(8, 16))]
    assert [len(table.rows) for table in found] == [6, 2]
    assert all(float(row[-1]) > 0 for table in found for row in table.rows)
    path = tmp_path / "gpu.md"
    run.write_results(found, "a GPU", path)
    text = path.read_text()
    assert text.startswith("# On a GPU\n`make test-gpu` on a GPU (")
    assert "## Phases, autoencoder 12-8-3, batch 40\n| phase | ms |\n| --- | --- |\n" in text


def test_without_a_gpu_nothing_is_claimed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main() == 2
    assert capsys.readouterr().err.strip() == run.NO_GPU


def test_all_checks_are_run_and_named(monkeypatch, capsys):
    done: list[str] = []

    def noted(name: str) -> object:
        def check(*args: object, **kwargs: object) -> Table:
            done.append(name)
            return Table(name, ("",), [])

        return check

    names = ("parity", "reads", "poisoned_copies", "killed_member", "phases", "inversions")
    for name in names:
        monkeypatch.setattr(run, name, noted(name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [table.title for table in run.tables(CPU)] == [*names, "killed_member"] == done
    assert "phases: " in capsys.readouterr().out
