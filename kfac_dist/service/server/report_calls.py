"""ReportService: the one call of drivers."""

from __future__ import annotations

from dataclasses import dataclass

from kfac_dist.errors import NotAuthenticatedError, NotFoundError
from kfac_dist.service.jobs import Jobs
from kfac_dist.service.reporting.report_messages import from_request, to_response
from kfac_dist.service.server import requests
from kfac_dist.service.server.calls import Stream, Unary
from kfac_dist.v1 import report_service_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["ReportService"].full_name


@dataclass(frozen=True, kw_only=True)
class ReportCalls:
    """Checks that a report comes from the driver of its attempt, then hands it to `jobs`."""

    jobs: Jobs

    def report(self, request: pb.ReportRequest, token: str) -> pb.ReportResponse:
        """Store a driver's report and answer what the driver should do."""
        job_id = requests.job_id(request.job_id)
        if not self._is_report_token(job_id, request.attempt, token):
            raise NotAuthenticatedError(
                f"this is not the report token of attempt {request.attempt} of job {job_id}"
            )
        requests.at_most("events", request.events)
        requests.at_most("steps", request.steps)
        return to_response(self.jobs.report(from_request(request)))

    def _is_report_token(self, job_id: str, attempt: int, token: str) -> bool:
        """Return whether the token belongs to that attempt.

        A wrong token and a missing job give the same answer, so that a caller without a valid
        token cannot find out which jobs exist.
        """
        try:
            return self.jobs.check_report_token(job_id, attempt, token)
        except NotFoundError:
            return False


def report_methods(calls: ReportCalls) -> dict[str, Unary | Stream]:
    """Return the methods of ReportService; its token is checked by the function, not by role."""
    return {"Report": Unary(request=pb.ReportRequest, role=None, function=calls.report)}
