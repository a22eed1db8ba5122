"""The commands for jobs on a server, against a real server in this process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kfac_dist.cli.output import local_time
from kfac_dist.coordination.jobs.lifecycle import JobState, Trigger
from kfac_dist.errors import FirstFailure
from kfac_dist.runs import Event
from kfac_dist.service.control.launching import begin_attempt
from kfac_dist.service.job_records import Report, ReportedEvent, ReportedState, Role, StepValues
from kfac_dist.service.store.job_rows import move
from kfac_dist.service.submission import package_path
from tests.cli.conftest import KfacDist
from tests.service.serving import Serving, serving


@pytest.fixture
def server(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    with serving(tmp_path / "server") as running:
        monkeypatch.setenv("KFAC_DIST_SERVER", running.address)
        monkeypatch.setenv("KFAC_DIST_TOKEN", running.token("ada", Role.SUBMITTER))
        yield running


@pytest.fixture
def job(server: Serving, kfac_dist: KfacDist, spec: Path) -> str:
    done = kfac_dist("submit", spec, "-o", "json")
    assert done.code == 0, done.err
    return str(json.loads(done.out)["job"])


def begin(server: Serving, job: str) -> None:
    with server.jobs.change(job) as (session, row):
        move(session, row, Trigger.ENQUEUE, time.time())
        begin_attempt(session, row, "secret", resumes=False, now=time.time())


def report(server: Serving, job: str, state: JobState | None = None, **parts: object) -> None:
    stands = parts.pop("stands", None) or (state and ReportedState(state=state, step=3))
    server.jobs.report(Report(job=job, attempt=1, state=stands, **parts))


def test_submit_prints_job_and_state(server: Serving, kfac_dist: KfacDist, spec: Path) -> None:
    done = kfac_dist("submit", spec, "-o", "json", "--set", "steps=7", "--priority", 4)
    facts = json.loads(done.out)
    assert set(facts) == {"job", "state"}
    stored = server.jobs.get(facts["job"])
    assert (stored.owner, stored.num_steps, stored.priority) == ("ada", 7, 4)


def test_the_same_key_submits_once(server: Serving, kfac_dist: KfacDist, spec: Path) -> None:
    options = ("submit", spec, "--idempotency-key", "k", "-o", "json")
    first, second = kfac_dist(*options), kfac_dist(*options)
    assert first.out == second.out
    done = kfac_dist(*options, "--set", "steps=9")
    assert (done.code, done.out) == (9, "")


def test_user_code_is_sent_along(server: Serving, kfac_dist: KfacDist, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "task.py").write_text("class Task: pass\n")
    path = folder / "job.yaml"
    path.write_text("name: own\ntask: task.py:Task\nsteps: 1\nbatch_size: 1\n")
    (folder / ".secret").write_text("x")
    dry = kfac_dist("submit", path, "--dry-run", "-o", "json")
    plan = json.loads(dry.out)
    assert plan["package_bytes"] > 0
    assert [file["name"] for file in plan["packed"]] == ["job.yaml", "task.py"]
    assert plan["left_out"] == [{"name": ".secret", "why": "hidden", "files": 1, "bytes": 1}]
    assert ".secret" in kfac_dist("submit", path, "--dry-run").out
    assert server.jobs.list() == ([], "")
    done = kfac_dist("submit", path, "-o", "json")
    assert "not sent: 1 hidden" in done.err
    stored = server.jobs.get(json.loads(done.out)["job"])
    assert stored.package is not None
    assert package_path(server.jobs.home, stored.package).is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "SPEC", "--priority", "99999999999"], "priority: 99999999999 is not between"),
        (["submit", "SPEC", "--priority", "1001"], "-1000 and 1000"),
        (["logs", "JOB", "--tail", "99999999999999999999"], "tail_lines: 9999999999"),
        (["logs", "JOB", "--rank", "99999999999"], "ranks: [99999999999]"),
        (["logs", "JOB", "--attempt", "-99999999999"], "attempts: [-99999999999]"),
        (["metrics", "JOB", "loss", "--from", "99999999999999999999"], "first_step: 999999"),
        (["describe", "a\udcff"], "job_id: "),
    ],
)
def test_numbers_and_texts_that_cannot_be_sent_are_exit_code_2(
    kfac_dist: KfacDist, job: str, spec: Path, arguments: list[str], message: str
) -> None:
    names = {"SPEC": str(spec), "JOB": job}
    done = kfac_dist(*(names.get(word, word) for word in arguments))
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_submissions_do_not_vanish_with_the_store(
    server: Serving, kfac_dist: KfacDist, job: str, spec: Path
) -> None:
    path = server.jobs.home / "store.db"
    path.rename(path.with_name("away"))
    for arguments in (["submit", spec], ["describe", job], ["list"]):
        done = kfac_dist(*arguments)
        assert (done.code, done.out) == (5, ""), arguments
        assert "was removed or replaced" in done.err
    path.with_name("away").rename(path)
    assert kfac_dist("describe", job).code == 0


def test_list_in_three_formats(server: Serving, kfac_dist: KfacDist, job: str) -> None:
    assert [row["job"] for row in json.loads(kfac_dist("list", "-o", "json").out)["jobs"]] == [job]
    assert yaml.safe_load(kfac_dist("list", "-o", "yaml").out)["jobs"][0]["state"] == "PENDING"
    table = kfac_dist("list").out
    assert job in table
    assert "0/5" in table
    for options in (["--state", "running"], ["--owner", "eve"], ["--name", "other"]):
        assert json.loads(kfac_dist("list", *options, "-o", "json").out)["jobs"] == []
    assert len(json.loads(kfac_dist("list", "--active", "-o", "json").out)["jobs"]) == 1


def test_describe_has_what_train_prints(server: Serving, kfac_dist: KfacDist, job: str) -> None:
    facts = json.loads(kfac_dist("describe", job, "-o", "json").out)
    keys = list(facts)
    assert keys[:5] == ["job", "state", "step", "train", "test"]
    assert {"wall_seconds", "steps_per_second", "inverse_staleness_steps", "run_dir"} <= set(keys)
    assert facts["workers"] == {"gradient": 1, "inverse": 1, "parameter_server": 1}
    assert facts["group"] is None, "there was no step"
    assert facts["attempts"] == []
    assert facts["spec"]["optimizer"]["name"] == "kfac"
    assert "digits" in kfac_dist("describe", job).out


def test_pause_resume_cancel_and_retry(server: Serving, kfac_dist: KfacDist, job: str) -> None:
    def state(verb: str, *options: str) -> str:
        done = kfac_dist(verb, job, *options, "-o", "json")
        assert done.code == 0, done.err
        return str(json.loads(done.out)["state"])

    assert state("pause") == "PAUSED"
    assert state("resume") == "QUEUED"
    assert state("cancel", "--wait") == "CANCELLED"
    assert state("retry") == "QUEUED"
    done = kfac_dist("resume", job)
    assert done.code == 9
    assert "possible now: " in done.err


def test_scale_changes_the_specification_and_reaches_the_driver(
    server: Serving, kfac_dist: KfacDist, job: str
) -> None:
    assert kfac_dist("scale", job, "--inverse", 3, "-o", "json").code == 0
    begin(server, job)
    answer = server.jobs.report(Report(job=job, attempt=1))
    assert (answer.gradient_workers, answer.inverse_workers) == (1, 3)
    assert kfac_dist("scale", job, "--gradient", 2).code == 0
    assert server.jobs.get(job).spec["workers"] == {
        **server.jobs.get(job).spec["workers"],
        "gradient": 2,
        "inverse": 3,
    }
    asked = [event.message for event in server.jobs.events(job) if "scale" in event.kind]
    assert asked == ["asked for 3 inverse workers", "asked for 2 gradient workers"]
    for arguments, code, says in (
        ([], 2, "give --gradient N, --inverse M, or both"),
        (["--gradient", 0], 2, "greater than or equal to 1"),
    ):
        done = kfac_dist("scale", job, *arguments)
        assert (done.code, done.out) == (code, "")
        assert says in done.err
    report(server, job, JobState.CANCELLED)
    with server.jobs.change(job) as (session, row):
        move(session, row, Trigger.FAIL, time.time())
    done = kfac_dist("scale", job, "--inverse", 1)
    assert done.code == 9
    assert "is FAILED, and has no workers to change" in done.err


@pytest.mark.parametrize(
    "verb", ["describe", "logs", "cancel", "metrics", "explain", "checkpoints", "replay"]
)
def test_no_such_job_is_exit_code_4(server: Serving, kfac_dist: KfacDist, verb: str) -> None:
    done = kfac_dist(verb, "none-such")
    assert (done.code, done.out) == (4, "")
    assert done.err.startswith("error: ")
    assert "none-such" in done.err


def test_a_wrong_specification_is_exit_code_3_and_not_submitted(
    server: Serving, kfac_dist: KfacDist, spec: Path
) -> None:
    assert kfac_dist("submit", spec, "--set", "optimizer.nme=sgd").code == 3
    assert server.jobs.list() == ([], "")


def test_what_a_token_does_not_permit_is_exit_code_6(
    server: Serving, kfac_dist: KfacDist, job: str, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFAC_DIST_TOKEN", server.token("looker", Role.VIEWER))
    assert kfac_dist("submit", spec).code == 6
    assert kfac_dist("describe", job).code == 0
    monkeypatch.setenv("KFAC_DIST_TOKEN", server.token("eve", Role.SUBMITTER))
    assert kfac_dist("cancel", job).code == 6
    monkeypatch.setenv("KFAC_DIST_TOKEN", "kfd_wrong")
    done = kfac_dist("list", "-o", "json")
    assert done.code == 6
    assert json.loads(done.err)["error"]["exit_code"] == 6
    monkeypatch.delenv("KFAC_DIST_TOKEN")
    assert "$KFAC_DIST_TOKEN" in kfac_dist("list").err


def test_no_server_is_exit_code_5(kfac_dist: KfacDist, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFAC_DIST_SERVER", raising=False)
    done = kfac_dist("list")
    assert done.code == 5
    assert "kfac-dist serve" in done.err
    assert kfac_dist("list", "--server", "127.0.0.1:9").code == 5
    assert kfac_dist("list", "--server", "nonsense").code == 2


def test_logs(server: Serving, kfac_dist: KfacDist, job: str) -> None:
    folder = server.jobs.log_dir(job)
    folder.mkdir(parents=True)
    line = {"event": "a step", "step": 3, "level": "warning", "timestamp": "2026-01-01T00:00:01Z"}
    (folder / "gradient_worker-0.log").write_text(json.dumps(line) + "\nplain\n")
    (folder / "driver-0.a2.log").write_text("printed\n")
    server.jobs.cancel(job)
    out = kfac_dist("logs", job, "-f").out.splitlines()
    assert out == [
        "driver-0.a2 printed",
        f"{local_time(1767225601.0)} gradient_worker-0 [warning] a step step=3",
        "gradient_worker-0 plain",
    ]
    rows = [json.loads(row) for row in kfac_dist("logs", job, "-o", "json").out.splitlines()]
    assert [row["text"] for row in rows] == ["printed", json.dumps(line), "plain"]
    assert kfac_dist("logs", job, "--attempt", 2).out == "driver-0.a2 printed\n"
    assert kfac_dist("logs", job, "--role", "gradient_worker", "--tail", 1).out == (
        "gradient_worker-0 plain\n"
    )


def test_metrics(server: Serving, kfac_dist: KfacDist, job: str) -> None:
    begin(server, job)
    steps = [
        StepValues(step=step, time=float(step), values={"loss": 1.0 / step, "gamma": float("nan")})
        for step in range(1, 6)
    ]
    report(server, job, JobState.RUNNING, steps=steps)
    names = json.loads(kfac_dist("metrics", job, "-o", "json").out)["names"]
    assert sorted(names) == ["gamma", "loss"]
    done = kfac_dist("metrics", job, "loss", "gamma", "--from", 2, "--to", 4, "-o", "json")
    loss, gamma = json.loads(done.out)["series"]
    assert (loss["steps"], loss["values"]) == ([2, 3, 4], [1 / 2, 1 / 3, 1 / 4])
    assert gamma["values"] == [None, None, None]
    assert "0.25" in kfac_dist("metrics", job, "loss").out
    assert kfac_dist("metrics", job, "lss").code == 4


def test_describe_shows_the_group_of_the_last_step(
    server: Serving, kfac_dist: KfacDist, job: str
) -> None:
    begin(server, job)
    steps = [
        StepValues(
            step=step,
            time=float(step),
            values={"epoch": epoch, "gradient_workers": 4.0 - epoch, "shards": 1.0},
        )
        for step, epoch in ((1, 1.0), (2, 1.0), (3, 2.0))
    ]
    report(server, job, JobState.RUNNING, steps=steps)
    facts = json.loads(kfac_dist("describe", job, "-o", "json").out)
    assert facts["group"] == {"epoch": 2, "gradient_workers": 2, "shards": 1}


def test_watch_and_wait_end_with_the_job(
    server: Serving, kfac_dist: KfacDist, job: str, spec: Path
) -> None:
    begin(server, job)
    steps = [StepValues(step=1, time=1.0, values={"objective": 2.0, "damping": 3.0})]
    report(server, job, JobState.RUNNING, steps=steps)
    server.jobs.cancel(job)
    with server.jobs.change(job) as (session, row):
        move(session, row, Trigger.VANISH, time.time())
    rows = [json.loads(row) for row in kfac_dist("watch", job, "-o", "json").out.splitlines()]
    assert rows[0]["metrics"]["objective"] == [[1, 2.0]]
    assert rows[-1]["job"]["state"] == "CANCELLED"
    done = kfac_dist("watch", job)
    assert done.code == 0
    assert "CANCELLED" in done.out
    again = kfac_dist("submit", spec, "--idempotency-key", "w", "-o", "json")
    server.jobs.cancel(json.loads(again.out)["job"])
    waited = kfac_dist("submit", spec, "--idempotency-key", "w", "--wait", "-o", "json")
    assert waited.code == 8
    assert json.loads(waited.out)["state"] == "CANCELLED"


def test_explain_puts_the_first_failure_before_its_echoes(
    server: Serving, kfac_dist: KfacDist, job: str
) -> None:
    begin(server, job)
    events = [
        Event(
            kind="x",
            message="echo of rank 0.",
            step=3,
            time=20.0,
            severity="error",
            role="gradient_worker",
            rank=0,
        ),
        Event(kind="x", message="just so.", step=3, time=21.0),
        Event(kind="member_joined", message="worker 1 has joined.", step=3, time=22.0),
    ]
    failed = ReportedState(
        state=JobState.FAILED,
        step=3,
        reason="worker_died",
        message="gradient worker 1 died",
        first_failure=FirstFailure(
            role="gradient_worker", rank=1, time_seconds=10.0, log_tail="Killed"
        ),
    )
    told = [ReportedEvent(line=line, event=event) for line, event in enumerate(events, 1)]
    report(server, job, stands=failed, events=told)
    with server.jobs.change(job) as (session, row):
        move(session, row, Trigger.FAIL, time.time(), reason="worker_died", message=failed.message)
    out = kfac_dist("explain", job).out
    told_in_order = ("is FAILED", "gradient_worker 1", "Killed", "echo of", "has joined", "advice")
    places = [out.index(text) for text in told_in_order]
    assert places == sorted(places)
    assert "just so" not in out
    facts = json.loads(kfac_dist("explain", job, "-o", "json").out)
    assert facts["first_failure"]["rank"] == 1
    assert [echo["rank"] for echo in facts["echoes"]] == [0, None]
    assert job in facts["advice"]


def test_tokens_are_created_listed_and_revoked(kfac_dist: KfacDist, home: Path) -> None:
    made = json.loads(kfac_dist("token", "create", "eve", "--role", "submitter", "-o", "json").out)
    assert made["role"] == "submitter"
    listed = kfac_dist("token", "list", "-o", "json").out
    assert made["token"] not in listed
    assert [token["name"] for token in json.loads(listed)["tokens"]] == ["eve"]
    assert kfac_dist("token", "create", "eve").code == 9
    assert kfac_dist("token", "revoke", "eve").code == 0
    assert kfac_dist("token", "revoke", "eve").code == 4
    assert kfac_dist("token", "create", "a b").code == 2
    assert kfac_dist("token", "list", "--store", "mysql://x").code == 2


def test_serve_refuses_to_be_exposed(kfac_dist: KfacDist) -> None:
    done = kfac_dist("serve", "--listen", "0.0.0.0:0")
    assert done.code == 2
    assert "--insecure" in done.err
    assert kfac_dist("serve", "--listen", "nonsense").code == 2
    assert kfac_dist("serve", "--tls-cert", "x.pem").code == 2


def test_replay_names_the_folder_that_is_not_on_this_machine(
    server: Serving, kfac_dist: KfacDist, job: str
) -> None:
    run_dir = server.jobs.get(job).run_dir
    done = kfac_dist("replay", job)
    assert (done.code, done.out) == (4, "")
    assert f"its run folder, {run_dir} at the server, cannot be read on this machine" in done.err
    Path(run_dir).mkdir(parents=True)
    done = kfac_dist("replay", job)
    assert done.code == 4
    assert f"{run_dir}: not the folder of a run" in done.err


def test_a_cluster_with_active_jobs_is_not_ended(
    server: Serving, kfac_dist: KfacDist, spec: Path, tmp_path: Path
) -> None:
    for _ in range(6):
        done = kfac_dist("submit", spec, "-o", "json")
        begin(server, json.loads(done.out)["job"])
    store = f"sqlite:///{tmp_path}/server/store.db"
    refused = kfac_dist("cluster", "down", "--store", store)
    assert refused.code == 9, refused.err
    assert "6 jobs are active on the cluster" in refused.err
    assert ", ...); cancel them first" in " ".join(refused.err.split())
