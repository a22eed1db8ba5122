import pytest
import torch
from torch import nn

from kfac_dist.config import kfac_settings
from kfac_dist.core.registration import register
from kfac_dist.errors import InvalidSpecError
from tests.oracles import dense


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False))


def test_blocks_are_the_linear_layers_in_order():
    registration = register(net(), kfac_settings({}))
    assert registration.names == ("0", "2")
    assert [(b.dim_A, b.dim_G) for b in registration.blocks] == [(5, 3), (3, 2)]
    assert registration.num_parameters == 21


def test_report_has_one_row_for_each_parameter():
    rows = register(net(), kfac_settings({})).report
    assert [row.parameter for row in rows] == ["0.weight", "0.bias", "2.weight"]
    assert sum(row.num_parameters for row in rows) == 21
    assert [row.cost for row in rows] == [5**3 + 3**3, 0, 3**3 + 2**3]


def test_matrices_lie_where_the_dense_truth_has_them():
    model = net()
    registration = register(model, kfac_settings({}))
    vector = torch.arange(float(registration.num_parameters))
    for block in registration.blocks:
        expected = vector[dense.layer_indices(model, block.name, "rows")]
        expected = expected.reshape(block.dim_G, block.dim_A)
        assert torch.equal(block.matrix(vector), expected)
        target = torch.zeros_like(vector)
        block.write(expected, target)
        assert torch.equal(block.matrix(target), expected)
        assert target.count_nonzero() == expected.count_nonzero()


def test_a_frozen_bias_is_not_in_the_block():
    model = net()
    model[0].bias.requires_grad_(False)
    registration = register(model, kfac_settings({}))
    assert [(b.dim_A, b.dim_G) for b in registration.blocks] == [(4, 3), (3, 2)]
    assert [row.parameter for row in registration.report] == ["0.weight", "2.weight"]


def test_a_parameter_without_a_block_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with pytest.raises(InvalidSpecError, match=r"1\.weight"):
        register(model, kfac_settings({}))


def test_a_frozen_parameter_without_a_block_is_no_matter():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model[1].requires_grad_(False)
    assert register(model, kfac_settings({})).names == ("0",)


def test_tied_weights_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    with pytest.raises(InvalidSpecError, match="share"):
        register(model, kfac_settings({}))


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(InvalidSpecError, match="no trainable"):
        register(net().requires_grad_(False), kfac_settings({}))
