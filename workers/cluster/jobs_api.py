"""Which cluster answers at the address of a Jobs API, and is it one?

A host may run several Ray clusters. A driver that Ray starts finds one of them by looking at the
processes of the host, which may be the wrong one. So the cluster itself is asked who it is, and its
drivers compare.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from kfac_dist.errors import NotAuthenticatedError, UnreachableError, UsageError

_ANSWER_SECONDS = 30.0
_FIRST_ANSWER_SECONDS = 5.0
_GCS_OPTION = "--gcs-address="
_REFUSED = (401, 403)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A cluster's id, and where drivers connect; None if its head has not said that yet."""

    cluster_id: str
    gcs_address: str | None


class JobsClient(JobSubmissionClient):
    """Ray's own client, which would wait without end for an API that is stopped."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        bounded = {"timeout": _ANSWER_SECONDS} | options
        return super()._do_request(method, endpoint, **bounded)

    def identity(self) -> Identity:
        """Ask the cluster who it is.

        Raises:
            RuntimeError: it does not say, as Ray's own client raises.
        """
        cluster_id = self._data("/cluster_id").get("clusterId")
        if not cluster_id:
            raise RuntimeError("the cluster does not tell its id")
        nodes = self._data("/nodes?view=summary").get("summary", [])
        return Identity(cluster_id=cluster_id, gcs_address=_gcs_address(nodes))

    def _data(self, path: str) -> Mapping[str, Any]:
        response = self._do_request("GET", path)
        if response.status_code != requests.codes.ok:
            raise RuntimeError(f"{path}: status {response.status_code}")
        data: Mapping[str, Any] = response.json().get("data") or {}
        return data


def _gcs_address(nodes: Any) -> str | None:
    """Return the address with which the raylet of the head was started."""
    for node in nodes:
        if node.get("raylet", {}).get("isHeadNode"):
            for word in node.get("cmdline") or ():
                if word.startswith(_GCS_OPTION):
                    return str(word.removeprefix(_GCS_OPTION))
    return None


def check_url(url: str) -> None:
    """Refuse what cannot be the address of a Jobs API.

    Raises:
        UsageError: it is not http://HOST:PORT or https://HOST:PORT.
    """
    example = "for example http://127.0.0.1:8265"
    parts = urlsplit(url)
    if "://" not in url:
        raise UsageError(
            f"--ray-address {url}: needs the URL of a cluster's Jobs API (Ray's dashboard), with "
            f"its scheme, {example}"
        )
    try:
        has_place = bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number, or too large
        has_place = False
    if parts.scheme not in ("http", "https") or not has_place:
        raise UsageError(
            f"--ray-address {url}: must be http://HOST:PORT or https://HOST:PORT, the URL of a "
            f"cluster's Jobs API (Ray's dashboard), {example}"
        )


def check_answer(url: str) -> None:
    """Ask once whether a Jobs API with this Ray's version answers.

    Raises:
        UnreachableError: nothing answers, or TLS fails.
        UsageError: something else answers, or another version of Ray.
        NotAuthenticatedError: it wants a token, and none or a wrong one is set.
    """
    name = f"--ray-address {url}"
    try:
        response = requests.get(f"{url.rstrip('/')}/api/version", timeout=_FIRST_ANSWER_SECONDS)
    except requests.exceptions.SSLError as error:
        raise UnreachableError(f"{name}: the TLS connection fails: {error}") from error
    except requests.RequestException as error:
        raise UnreachableError(f"{name}: nobody answers there") from error
    if response.status_code in _REFUSED:
        _check_token(url)
        return
    version = _version(response)
    if version is None:
        raise UsageError(
            f"{name}: what answers there is not Ray's Jobs API (status {response.status_code}); "
            "give the URL of the cluster's dashboard"
        )
    if version != ray.__version__:
        raise UsageError(
            f"{name}: the cluster runs Ray {version}, drivers would come with Ray "
            f"{ray.__version__}; install the same version in both places"
        )


def _version(response: requests.Response) -> str | None:
    try:
        body = response.json()
    except ValueError:
        return None
    return body.get("ray_version") if isinstance(body, dict) else None


def _check_token(url: str) -> None:
    if os.environ.get("RAY_AUTH_MODE") != "token":
        raise NotAuthenticatedError(
            f"--ray-address {url}: the cluster asks for a token; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH, the file with its token"
        )
    try:
        JobsClient(url)
    except AuthenticationError as error:
        raise NotAuthenticatedError(
            f"--ray-address {url}: the cluster refuses the token that RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH gives"
        ) from error
