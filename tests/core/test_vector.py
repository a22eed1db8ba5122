import torch
from torch import nn

from kfac_dist.core.vector import (
    add_to_parameters,
    assign_parameters,
    flatten,
    rows_at,
    trainable_parameters,
    unflatten,
)


def model():
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    net[2].bias.requires_grad_(False)
    return net


def test_order_is_that_of_the_named_parameters_without_the_frozen():
    net = model()
    named = trainable_parameters(net)
    assert list(named) == ["0.weight", "0.bias", "2.weight"]
    expected = torch.cat([net[0].weight.flatten(), net[0].bias, net[2].weight.flatten()])
    assert torch.equal(flatten(list(named.values())), expected)


def test_a_shared_parameter_is_there_once():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    assert list(trainable_parameters(net)) == ["0.weight", "0.bias", "1.bias"]


def test_flatten_copies_and_unflatten_views():
    tensors = [torch.arange(6.0).reshape(2, 3), torch.arange(2.0)]
    vector = flatten(tensors)
    vector[0] = 100.0
    assert tensors[0][0, 0] == 0
    parts = unflatten(vector, tensors)
    assert [part.shape for part in parts] == [(2, 3), (2,)]
    parts[1][0] = 7.0
    assert vector[6] == 7.0


def test_parameters_are_changed_in_place():
    parameters = list(trainable_parameters(model()).values())
    before, storage = flatten(parameters), [p.data_ptr() for p in parameters]
    step = torch.linspace(0, 1, len(before))
    add_to_parameters(parameters, step)
    torch.testing.assert_close(flatten(parameters), before + step)
    assign_parameters(parameters, before)
    assert torch.equal(flatten(parameters), before)
    assert [p.data_ptr() for p in parameters] == storage
    assert all(p.requires_grad for p in parameters)


def test_rows_at_positions_are_copied_in_their_order():
    values = torch.arange(12).reshape(4, 3)
    assert rows_at(values, [3, 1]).tolist() == [[9, 10, 11], [3, 4, 5]]
    assert rows_at(values, range(1, 3)).tolist() == [[3, 4, 5], [6, 7, 8]]
    assert rows_at(values, []).shape == (0, 3)
    assert rows_at(torch.tensor([5.0, 6.0]), [1]).tolist() == [6.0]


def test_all_rows_are_the_values_themselves():
    values = torch.arange(12).reshape(4, 3)
    assert rows_at(values, range(4)) is values
    empty = torch.ones(0, 3)
    assert rows_at(empty, []) is empty
