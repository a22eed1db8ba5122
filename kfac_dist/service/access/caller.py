"""The caller of a request, and what the caller's role permits."""

from __future__ import annotations

from dataclasses import dataclass

from kfac_dist.errors import NotAllowedError
from kfac_dist.service.job_records import Job, Role


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The holder of a token. Jobs submitted with the token belong to its `name`."""

    name: str
    role: Role

    def require(self, needed: Role, what: str) -> None:
        """Refuse `what` unless the role includes `needed`.

        Raises:
            NotAllowedError: the role does not permit `what`.
        """
        if not self.role.includes(needed):
            raise NotAllowedError(
                f"{what} needs the role {needed}; the token {self.name!r} has the role {self.role}"
            )

    def require_control_of(self, job: Job, what: str) -> None:
        """Refuse `what` to anyone but the job's owner and an admin.

        Raises:
            NotAllowedError: the job belongs to another user.
        """
        if job.owner != self.name and not self.role.includes(Role.ADMIN):
            raise NotAllowedError(
                f"{what}: job {job.id} was submitted by {job.owner!r}, and the token "
                f"{self.name!r} has the role {self.role}; only the role {Role.ADMIN} may control "
                "jobs of other users"
            )
