"""The chain in numeric trouble; oracle 7 shows that it is right otherwise."""

import math
from dataclasses import replace

import pytest
import torch

from kfac_dist.core.factors import Link
from kfac_dist.core.inverse import kronecker_sum
from kfac_dist.core.inverse.damped import InversionFailedError
from kfac_dist.core.inverse.tridiagonal import invert_conditional, precondition_chain
from tests.core.inverse.layers_of_a_chain import (
    GAMMAS,
    NAMES,
    at,
    gradients,
    prepared,
    snapshots,
    structure_of,
)


@pytest.mark.parametrize("which", ["next_pair", "cross"])
def test_a_link_with_a_factor_that_is_not_finite_is_not_inverted(which):
    snapshot = snapshots()["first"]
    getattr(snapshot, which).G[0, 0] = math.nan
    assert structure_of("block_tridiagonal").invert_at_gammas(snapshot, GAMMAS) == [None] * 3


def test_a_chain_with_a_part_that_does_not_descend_still_does():
    structure, V = structure_of("block_tridiagonal"), gradients()
    inverses = at(prepared(structure), 0)
    good = inverses["second"].conditional
    for spoiled in (-good.denominators, good.denominators * math.nan):
        broken = inverses | {
            "second": replace(inverses["second"], conditional=replace(good, denominators=spoiled))
        }
        solved, fallen = structure.precondition(V, broken, 0.5)
        assert fallen == ("second",)
        assert sum((V[name] * solved[name]).sum() for name in NAMES) > 0


def test_links_join_neighbours_in_the_order_of_the_model():
    assert structure_of("block_diagonal").links == structure_of("ekfac").links == ()
    links = structure_of("block_tridiagonal").links
    assert links == (Link("first", "second"), Link("second", "third"))
    assert structure_of("block_tridiagonal", ("alone",)).links == ()


def test_a_chain_of_one_layer_is_block_diagonal():
    snapshot = snapshots()["third"]
    (part,) = structure_of("block_tridiagonal").invert_at_gammas(snapshot, (0.2,))
    (expected,) = structure_of("block_diagonal").invert_at_gammas(snapshot, (0.2,))
    V = {"third": gradients()["third"]}
    solved, _ = precondition_chain(V, {"third": part.inverse}, (), 0.2)
    torch.testing.assert_close(solved["third"], expected.inverse.apply(V["third"]))


def failing_in_float32(A, *args):
    if A.dtype == torch.float32:
        raise InversionFailedError("made to fail")
    return real_whiten(A, *args)


real_whiten = kronecker_sum._whiten


def test_a_link_that_fails_is_tried_in_float64(monkeypatch):
    snapshot = snapshots(torch.float32)["first"]
    expected = invert_conditional(snapshot, 0.3)
    monkeypatch.setattr(kronecker_sum, "_whiten", failing_in_float32)
    inverted = invert_conditional(snapshot, 0.3)
    assert inverted.rungs == ("float64",)
    V = gradients(dtype=torch.float32)["first"]
    U = inverted.inverse.apply(V)
    assert U.dtype == torch.float32
    torch.testing.assert_close(U, expected.inverse.apply(V), rtol=1e-4, atol=1e-5)


def test_an_indefinite_factor_raises_the_damping_of_its_link():
    snapshot = snapshots()["first"]
    snapshot.pair.A.diagonal().sub_(3.0)
    inverted = invert_conditional(snapshot, 0.3)
    assert inverted.rungs[0] == "float64"
    assert set(inverted.rungs[1:]) == {"raised_damping"}
    V = gradients()["first"]
    assert (V * inverted.inverse.apply(V)).sum() > 0
