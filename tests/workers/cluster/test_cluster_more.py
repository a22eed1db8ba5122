"""A driver compares the cluster that it finds with the one that its server asked."""

from __future__ import annotations

import pytest

from kfac_dist.errors import ConflictError, UnreachableError
from workers.cluster.cluster import check_cluster
from workers.cluster.ray_internals import cluster_id_of


def test_another_cluster_is_refused(cluster: None) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    own = cluster_id_of(address)
    check_cluster(address, own)
    with pytest.raises(ConflictError, match=f"its id is {own}, not 00ff"):
        check_cluster(address, "00ff")


def test_a_driver_needs_an_address() -> None:
    with pytest.raises(UnreachableError, match="did not tell the driver"):
        check_cluster(None, "00ff")
