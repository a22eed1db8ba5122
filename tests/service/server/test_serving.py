"""Calls of a client to a real server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.errors import (
    ConflictError,
    InvalidSpecError,
    KfacDistError,
    LimitExceededError,
    NotAllowedError,
    NotAuthenticatedError,
    NotFoundError,
    TimedOutError,
    UnreachableError,
    UsageError,
)
from kfac_dist.service.access.limits import ServerLimits
from kfac_dist.service.client import Client
from kfac_dist.service.job_records import Role
from kfac_dist.service.server.serving import ServerOptions
from kfac_dist.v1 import job_service_pb2 as pb
from kfac_dist.v1 import report_service_pb2
from kfac_dist.v1.job_service_pb2_grpc import JobServiceStub
from kfac_dist.v1.report_service_pb2_grpc import ReportServiceStub
from tests.service.requests import spec
from tests.service.serving import Serving, serving


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path / "home") as running:
        yield running


def metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def test_client_and_server_have_the_same_job(server: Serving) -> None:
    with server.client() as client:
        job = client.submit(spec(), priority=3, data_dir="/data")
        assert (job.owner, job.state, job.priority) == ("ada", JobState.PENDING, 3)
        assert job.data_dir == "/data"
        there = server.jobs.get(job.id)
        assert client.get(job.id) == job
        assert job.spec == there.spec
        assert (job.created_at, job.run_dir) == (pytest.approx(there.created_at), there.run_dir)
        assert [event.kind for event in client.events(job.id)] == ["submitted"]
        assert client.attempts(job.id) == []
        assert client.checkpoints(job.id) == []
        assert client.metric_names(job.id) == []


def test_a_listing_yields_all_its_pages(server: Serving) -> None:
    with server.client() as client:
        ids = [client.submit(spec()).id for _ in range(7)]
        assert [job.id for job in client.jobs(page_size=3)] == ids[::-1]
        client.cancel(ids[2])
        assert [job.id for job in client.jobs(states=[JobState.CANCELLED])] == [ids[2]]
        assert list(client.jobs(owner="eve")) == []
        assert list(client.jobs(name="other")) == []


def test_the_same_key_is_the_same_job(server: Serving) -> None:
    with server.client() as client:
        first = client.submit(spec(), idempotency_key="once")
        assert client.submit(spec(), idempotency_key="once").id == first.id
        with pytest.raises(ConflictError, match="another request"):
            client.submit(spec(steps=77), idempotency_key="once")


def test_errors_arrive_with_their_class_and_message(server: Serving) -> None:
    with server.client() as client:
        with pytest.raises(NotFoundError, match="none-such"):
            client.get("none-such")
        with pytest.raises(UsageError, match="is not a job's id"):
            client.get("../../etc/passwd")
        job = client.submit(spec())
        with pytest.raises(ConflictError, match="possible now: pause, cancel"):
            client.resume(job.id)
        with pytest.raises(NotFoundError, match="no metrics yet"):
            client.metrics(job.id, ["loss"])
        with pytest.raises(UsageError, match="max_points"):
            client.metrics(job.id, ["loss"], max_points=1_000_000)


def test_the_server_checks_a_specification_itself(server: Serving) -> None:
    with server.client() as client, grpc.insecure_channel(server.address) as channel:
        stub = JobServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.CreateJob(
                pb.CreateJobRequest(spec_json='{"name": "x", "stps": 1}'),
                metadata=metadata(server.secrets["ada"]),
            )
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "stps" in caught.value.details()
        with pytest.raises(InvalidSpecError, match="stps"):
            client.submit({"name": "x", "task": "classifier", "stps": 1})


def test_a_wrong_field_is_named_in_the_details(server: Serving) -> None:
    with grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            JobServiceStub(channel).CreateJob(
                pb.CreateJobRequest(spec_json="[1]"),
                metadata=metadata(server.token("ada", Role.SUBMITTER)),
            )
        status = rpc_status.from_call(caught.value)
    assert status is not None
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("kfac_dist", "UsageError")
    assert status.details[1].Unpack(bad)
    assert bad.field_violations[0].field == "spec_json"


def test_a_message_too_long_for_metadata_is_shortened(server: Serving) -> None:
    wrong = spec() | {f"unknown_key_{number}_ü": 1 for number in range(2000)}
    with server.client() as client, grpc.insecure_channel(server.address) as channel:
        assert list(client.jobs()) == []
        with pytest.raises(grpc.RpcError) as caught:
            JobServiceStub(channel).CreateJob(
                pb.CreateJobRequest(spec_json=json.dumps(wrong)),
                metadata=metadata(server.secrets["ada"]),
            )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "unknown_key_0" in caught.value.details()
    details = caught.value.details().encode()
    rich = [len(value) for key, value in caught.value.trailing_metadata() if key.endswith("-bin")]
    assert len(details) > 1000
    assert 3 * details.count("ü".encode()) * 2 + len(details) + sum(rich) < 7000  # of 8 KiB


SINGLE = {
    "CreateJob": (pb.CreateJobRequest(), Role.SUBMITTER),
    "GetJob": (pb.GetJobRequest(), Role.VIEWER),
    "ListJobs": (pb.ListJobsRequest(), Role.VIEWER),
    "CancelJob": (pb.CancelJobRequest(), Role.SUBMITTER),
    "PauseJob": (pb.PauseJobRequest(), Role.SUBMITTER),
    "ResumeJob": (pb.ResumeJobRequest(), Role.SUBMITTER),
    "RetryJob": (pb.RetryJobRequest(), Role.SUBMITTER),
    "ScaleJob": (pb.ScaleJobRequest(), Role.SUBMITTER),
    "QueryMetrics": (pb.QueryMetricsRequest(), Role.VIEWER),
    "ListEvents": (pb.ListEventsRequest(), Role.VIEWER),
    "ListCheckpoints": (pb.ListCheckpointsRequest(), Role.VIEWER),
    "WatchJob": (pb.WatchJobRequest(), Role.VIEWER),
    "StreamLogs": (pb.StreamLogsRequest(), Role.VIEWER),
}


def code_of_call(stub: JobServiceStub, name: str, token: str | None) -> grpc.StatusCode:
    request, _ = SINGLE[name]
    try:
        answer = getattr(stub, name)(request, metadata=metadata(token) if token else ())
        if name in ("WatchJob", "StreamLogs"):
            list(answer)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_every_call_needs_a_token_and_its_role(server: Serving) -> None:
    assert set(SINGLE) == {
        method.name for method in pb.DESCRIPTOR.services_by_name["JobService"].methods
    }
    viewer = server.token("looker", Role.VIEWER)
    submitter = server.token("ada", Role.SUBMITTER)
    unauthenticated, denied = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
    with grpc.insecure_channel(server.address) as channel:
        stub = JobServiceStub(channel)
        for name, (_, role) in SINGLE.items():
            assert code_of_call(stub, name, None) is unauthenticated, name
            assert code_of_call(stub, name, "kfd_wrong") is unauthenticated, name
            got = code_of_call(stub, name, viewer)
            assert (got is denied) == (role is not Role.VIEWER), name
            assert code_of_call(stub, name, submitter) not in (denied, unauthenticated), name


def test_jobs_of_others_can_be_read_but_not_controlled(server: Serving) -> None:
    with (
        server.client("ada") as ada,
        server.client("eve") as eve,
        server.client("root", Role.ADMIN) as admin,
    ):
        job = ada.submit(spec())
        assert eve.get(job.id).id == job.id
        for verb in (eve.cancel, eve.pause, eve.resume, eve.retry):
            with pytest.raises(NotAllowedError, match="submitted by 'ada'"):
                verb(job.id)
        assert ada.pause(job.id).state is JobState.PAUSED
        assert admin.cancel(job.id).state is JobState.CANCELLED


def test_a_revoked_token_is_refused_at_once(server: Serving) -> None:
    with server.client() as client:
        client.submit(spec())
        server.tokens.revoke("ada")
        with pytest.raises(NotAuthenticatedError, match="unknown, revoked or expired"):
            list(client.jobs())


def test_reflection_lists_the_services_to_callers_with_a_token(server: Serving) -> None:
    with grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            ProtoReflectionDescriptorDatabase(channel).get_services()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        token = metadata(server.token("looker", Role.VIEWER))
        allowed = grpc.intercept_channel(channel, _WithMetadata(token))
        database = ProtoReflectionDescriptorDatabase(allowed)
        services = set(database.get_services())
        file = database.FindFileContainingSymbol("kfac_dist.v1.JobService")
    assert {"kfac_dist.v1.JobService", "kfac_dist.v1.ReportService"} <= services
    assert "CreateJob" in [method.name for method in file.service[0].method]


class _WithMetadata(grpc.StreamStreamClientInterceptor):
    def __init__(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self._metadata = metadata

    def intercept_stream_stream(self, continuation, details, requests):  # type: ignore[no-untyped-def]
        return continuation(details._replace(metadata=self._metadata), requests)


def test_health_answers_without_a_token(server: Serving) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "kfac_dist.v1.JobService", "kfac_dist.v1.ReportService"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_report_needs_the_token_of_its_attempt(server: Serving) -> None:
    with server.client("root", Role.ADMIN) as client:
        job = client.submit(spec())
    with grpc.insecure_channel(server.address) as channel:
        stub = ReportServiceStub(channel)
        for job_id in (job.id, "no-such-job"):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Report(
                    report_service_pb2.ReportRequest(job_id=job_id, attempt=1),
                    metadata=metadata(server.secrets["root"]),
                )
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_too_many_streams_of_one_user_are_refused(tmp_path: Path) -> None:
    options = ServerOptions(host="127.0.0.1", port=0, limits=ServerLimits(streams_a_user=2))
    with serving(tmp_path / "home", options) as server, server.client() as client:
        job = client.submit(spec())
        watches = [client.watch(job.id) for _ in range(2)]
        for watch in watches:
            next(watch)
        with pytest.raises(LimitExceededError, match="has 2 streams"):
            next(client.watch(job.id))
        with server.client("eve") as eve:
            next(eve.watch(job.id))
        watches[0].close()
        client.cancel(job.id)


def test_a_missing_server_is_unreachable() -> None:
    with (
        Client("127.0.0.1:9", token="x") as client,
        pytest.raises(UnreachableError, match="no answer"),
    ):
        client.get("x")


def test_a_watch_sees_the_job_its_events_and_its_end(server: Serving) -> None:
    with server.client() as client:
        job = client.submit(spec())
        updates = client.watch(job.id)
        first = next(updates)
        assert first.job is not None
        assert first.job.state is JobState.PENDING
        client.cancel(job.id)
        rest = list(updates)
        kinds = [event.kind for update in [first, *rest] for event in update.events]
        assert kinds == [event.kind for event in server.jobs.events(job.id)]
        states = [update.job.state for update in rest if update.job is not None]
        assert states[-1] is JobState.CANCELLED
        assert client.wait(job.id).state is JobState.CANCELLED


def test_waiting_ends_at_its_timeout(server: Serving) -> None:
    with server.client() as client:
        job = client.submit(spec())
        with pytest.raises(TimedOutError, match="is PENDING after"):
            client.wait(job.id, timeout_seconds=0.3)


def test_a_watch_survives_a_restart_of_its_server(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with serving(home) as server:
        client = server.client(reconnect_seconds=30)
        job = client.submit(spec())
        updates = client.watch(job.id)
        assert next(updates).job is not None
        port = int(server.address.rpartition(":")[2])
    ended: list[KfacDistError | JobState] = []

    def follow() -> None:
        try:
            ended.extend(update.job.state for update in updates if update.job is not None)
        except KfacDistError as error:
            ended.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    with serving(home, ServerOptions(host="127.0.0.1", port=port)) as again:
        again.jobs.cancel(job.id)
        thread.join(30)
    client.close()
    assert ended == [JobState.CANCELLED]
