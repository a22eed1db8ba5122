"""For every type in the table, a layer multiplies the rows that its rule reads."""

import pytest
import torch
from torch import nn

from kfac_dist.core.blocks.layer_rules import LAYER_RULES, bypasses_parts, rule_for

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
# A layer and the shape of its inputs; at least one for each row of the table.
LAYERS = [
    (nn.Linear(3, 4), (2, 3)),
    (nn.Linear(3, 4), (2, 5, 6, 3)),
    (nn.Conv1d(2, 4, 3, stride=2), (2, 2, 7)),
    (nn.Conv1d(2, 4, 3), (2, 7)),
    (nn.Conv2d(4, 6, (2, 3), padding=1, groups=2), (2, 4, 5, 5)),
    (nn.Conv2d(3, 6, 2, groups=3), (2, 3, 5, 5)),
    (nn.Conv2d(4, 4, 2, groups=4), (2, 4, 5, 5)),
    (nn.Conv3d(2, 3, 2, padding=1, padding_mode="circular"), (2, 2, 3, 3, 4)),
    (nn.LayerNorm(4), (2, 3, 4)),
    (nn.LayerNorm((3, 4)), (2, 3, 4)),
    (nn.LayerNorm(4), (4,)),
    (nn.RMSNorm(4), (2, 3, 4)),
    (nn.GroupNorm(2, 4), (2, 4, 3, 5)),
    (nn.BatchNorm1d(4), (5, 4)),
    (nn.BatchNorm1d(4), (2, 4, 3)),
    (nn.BatchNorm2d(4), (2, 4, 3, 5)),
    (nn.BatchNorm3d(4), (2, 4, 3, 2, 2)),
    (nn.BatchNorm2d(4).eval(), (2, 4, 3, 5)),
]


def randomised(layer):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in [*layer.parameters(), *layer.buffers()]:
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return layer.double()


def flat(rows):
    return rows.reshape(-1, rows.shape[-1])


def matrix_of(rule, layer):
    """Return the weight as [outputs, features]."""
    weight = layer.weight.detach()
    weight = weight.T if rule.transposed else weight
    return weight.reshape(rule.num_outputs(layer.weight), -1)


def computed_rows(rule, layer, inputs):
    """Return the layer's outputs as rows, computed from what the rule reads."""
    W = matrix_of(rule, layer)
    shift = 0 if getattr(layer, "bias", None) is None else layer.bias.detach().flatten()
    if rule.block_kind(layer, has_weight=True) == "unit-wise":
        features = flat(rule.input_rows(layer, inputs, None))
        return (features.reshape(-1, *W.shape) * W).sum(dim=2) + shift
    groups = rule.num_groups(layer)
    parts = [
        flat(rule.input_rows(layer, inputs, group)) @ part.T
        for group, part in enumerate(W.chunk(groups))
    ]
    return torch.cat(parts, dim=1) + shift


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_a_layer_multiplies_the_rows_that_its_rule_reads(layer, shape):
    layer, rule = randomised(layer), rule_for(layer)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        outputs = layer(inputs)
    expected = flat(rule.output_rows(layer, outputs, None))
    torch.testing.assert_close(computed_rows(rule, layer, inputs), expected, **CLOSE)


def test_each_group_has_its_own_output_rows():
    layer, outputs = nn.Conv1d(4, 6, 2, groups=2), torch.randn(2, 6, 3)
    rule = rule_for(layer)
    parts = [flat(rule.output_rows(layer, outputs, group)) for group in range(2)]
    assert torch.equal(torch.cat(parts, dim=1), flat(rule.output_rows(layer, outputs, None)))


def test_every_type_of_the_table_has_an_example():
    types = {type(layer) for layer, _ in LAYERS}
    assert types | {nn.Embedding} == set(LAYER_RULES)


def test_an_embedding_reads_indices_and_leaves_out_the_padding():
    layer, indices = nn.Embedding(5, 3, padding_idx=2), torch.tensor([[0, 2], [4, 2]])
    rule = rule_for(layer)
    assert rule.input_rows(layer, indices, None).tolist() == [[0, -1], [4, -1]]
    assert rule.input_rows(nn.Embedding(5, 3), indices, None) is indices
    assert torch.equal(matrix_of(rule, layer)[:, 4], layer(indices)[1, 0])


@pytest.mark.parametrize(
    ("layer", "shape", "has_cases"),
    [
        (nn.Linear(3, 4), (6, 3), True),
        (nn.Linear(3, 4), (3,), False),  # one row, not three cases
        (nn.Linear(3, 4), (4, 3), False),  # no multiple of three cases
        (nn.Embedding(5, 3), (3,), True),
        (nn.Conv2d(3, 4, 2), (3, 5, 5), False),
        (nn.Conv2d(3, 4, 2), (3, 3, 5, 5), True),
        (nn.LayerNorm((3, 4)), (3, 4), False),
        (nn.LayerNorm((3, 4)), (3, 3, 4), True),
        (nn.GroupNorm(1, 3), (3, 3), True),
    ],
    ids=str,
)
def test_the_axis_of_cases_is_told_by_the_dimensions(layer, shape, has_cases):
    assert rule_for(layer).has_case_axis(layer, torch.zeros(shape), 3) == has_cases


class Named(nn.Linear):
    """Computes the same as its base."""


class Negated(nn.Linear):
    def forward(self, input):
        return -super().forward(input)


def test_a_subclass_has_the_rule_of_its_base_if_it_computes_the_same():
    assert rule_for(Named(2, 2)) is LAYER_RULES[nn.Linear]
    assert rule_for(Negated(2, 2)) is None
    assert rule_for(nn.GRU(2, 2)) is None


def test_only_some_layers_of_a_type_are_covered():
    clipped = nn.Embedding(5, 3, max_norm=1.0)
    assert rule_for(clipped).why_not(clipped) == "max_norm changes the weight"
    assert rule_for(nn.Embedding(5, 3)).why_not(nn.Embedding(5, 3)) == ""


def test_attention_bypasses_its_parts():
    assert bypasses_parts(nn.MultiheadAttention(4, 2))
    assert not bypasses_parts(nn.TransformerEncoderLayer(4, 2, 4))
