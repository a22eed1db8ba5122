"""Who asks, and whether a role is enough."""

from __future__ import annotations

from dataclasses import dataclass

from kfac_dist.errors import NotAllowedError
from kfac_dist.service.job_records import Job, Role


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The holder of a token; `name` is the token's, and the owner of the jobs it submits."""

    name: str
    role: Role

    def require(self, needed: Role, what: str) -> None:
        """Refuse `what` to a lesser role than `needed`.

        Raises:
            NotAllowedError: the role is not enough.
        """
        if not self.role.includes(needed):
            raise NotAllowedError(
                f"{what} needs the role {needed}; the token {self.name!r} is of a {self.role}"
            )

    def require_control_of(self, job: Job, what: str) -> None:
        """Refuse `what` with another's job to all but an admin.

        Raises:
            NotAllowedError: the job is another's.
        """
        if job.owner != self.name and not self.role.includes(Role.ADMIN):
            raise NotAllowedError(
                f"{what}: job {job.id} was submitted by {job.owner!r}, and the token "
                f"{self.name!r} is of a {self.role}; another's job needs the role {Role.ADMIN}"
            )
