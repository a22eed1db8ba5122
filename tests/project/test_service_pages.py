"""The pages on protocol and security agree with the code."""

from __future__ import annotations

import re

from kfac_dist.coordination.jobs.lifecycle import JobState
from kfac_dist.runs.transfer.package import MAX_FILES, MAX_PACKED_BYTES, MAX_UNPACKED_BYTES
from kfac_dist.service.access.limits import ServerLimits
from kfac_dist.service.job_records import Role
from kfac_dist.service.wire.status import CODES
from kfac_dist.service.wire.transport import MAX_MESSAGE_BYTES, MAX_SPEC_BYTES
from tests.paths import ROOT

DOCS = ROOT / "docs"
PROTOCOL = (DOCS / "protocol.md").read_text()
SECURITY = (DOCS / "security.md").read_text()


def rows(page: str, head: str) -> list[list[str]]:
    table = page[page.index(head) :].split("\n\n")[0]
    return [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]


def test_every_state_is_explained() -> None:
    assert [row[0] for row in rows(PROTOCOL, "| state |")] == [f"`{state}`" for state in JobState]


def test_the_table_of_errors_is_the_codes() -> None:
    documented = [tuple(row) for row in rows(PROTOCOL, "| error |")]
    assert documented == [
        (f"`{kind.__name__}`", f"`{code.name}`", str(kind.exit_code))
        for kind, code in CODES.items()
    ]


def test_every_role_is_explained() -> None:
    assert [row[0] for row in rows(SECURITY, "| role |")] == [f"`{role}`" for role in Role]


def test_the_limits_are_documented() -> None:
    limits = ServerLimits()
    for text in (
        f"after {limits.call_seconds:g} s",
        f"{MAX_MESSAGE_BYTES / 2**20:g} MiB",
        f"{MAX_SPEC_BYTES // 2**10} KiB",
        f"{MAX_PACKED_BYTES // 2**20} MiB packed",
        f"{MAX_UNPACKED_BYTES // 2**20} MiB unpacked",
        f"{MAX_FILES:,} files",
        f"{limits.streams_a_user} streams",
    ):
        assert text in PROTOCOL, text


def test_links_to_other_pages_are_valid() -> None:
    for page in (PROTOCOL, SECURITY):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page):
            assert (DOCS / link).exists(), link
