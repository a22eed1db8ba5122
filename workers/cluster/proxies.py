"""Proxies in the environment, which Ray's HTTP clients honour without asking."""

from __future__ import annotations

import os
from collections.abc import Iterable
from urllib.parse import urlsplit

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
# Libraries differ in which of them they read, so one that is set must not hide the other.
_VARIABLES = ("no_proxy", "NO_PROXY")
# Where it is set, gRPC reads it instead of the others.
_OF_GRPC = ("no_grpc_proxy",)


def bypass_proxies(url: str) -> None:
    """Let this process, and those it starts, reach the Jobs API at `url` without a proxy.

    A proxy cannot reach this machine's loopback, and without TLS it would read the cluster's secret
    and the commands of jobs. With TLS, the proxies that the environment names are used.
    """
    parts = urlsplit(url)
    hosts = list(LOOPBACK_NAMES)
    if parts.scheme != "https" and parts.hostname and parts.hostname not in hosts:
        hosts.append(parts.hostname)
    os.environ.update(without_proxy(hosts))


def without_proxy(hosts: Iterable[str] = LOOPBACK_NAMES) -> dict[str, str]:
    """Return variables with which a process reaches `hosts` without a proxy.

    They keep the exceptions that the environment names already. Ray's own processes need them too:
    they reach each other on loopback by gRPC, which asks a proxy first.
    """
    variables = [*_VARIABLES, *(name for name in _OF_GRPC if os.environ.get(name))]
    before = ",".join(os.environ.get(variable, "") for variable in variables)
    names = [name.strip() for name in before.split(",")]
    exceptions = ",".join(dict.fromkeys(filter(None, [*names, *hosts])))
    return dict.fromkeys(variables, exceptions)
