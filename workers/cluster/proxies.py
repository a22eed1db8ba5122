"""Proxies in the environment, which Ray's HTTP clients honour without asking."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
# Libraries differ in which of them they read, so one that is set must not hide the other.
_VARIABLES = ("no_proxy", "NO_PROXY")


def bypass_proxies(url: str) -> None:
    """Let this process, and those it starts, reach the Jobs API at `url` without a proxy.

    A proxy cannot reach this machine's loopback, and without TLS it would read the cluster's secret
    and the commands of jobs. With TLS, the proxies that the environment names are used.
    """
    parts = urlsplit(url)
    hosts = list(LOOPBACK_NAMES)
    if parts.scheme != "https" and parts.hostname and parts.hostname not in hosts:
        hosts.append(parts.hostname)
    before = ",".join(os.environ.get(variable, "") for variable in _VARIABLES)
    names = [name.strip() for name in before.split(",")]
    for variable in _VARIABLES:
        os.environ[variable] = ",".join(dict.fromkeys(filter(None, [*names, *hosts])))
