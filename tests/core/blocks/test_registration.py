import pytest
import torch
from torch import nn

from kfac_dist.config import kfac_settings
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.factors import Link
from kfac_dist.errors import InvalidSpecError
from tests.oracles.truth import dense


def registered(model, **options):
    return register(model, kfac_settings(options))


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False))


def sizes(registration):
    return {b.name: (b.kind, b.dim_A, b.dim_G) for b in registration.blocks}


def test_blocks_are_the_linear_layers_in_order():
    registration = registered(net())
    assert registration.names == ("0", "2")
    assert [(b.dim_A, b.dim_G) for b in registration.blocks] == [(5, 3), (3, 2)]
    assert [b.orders for b in registration.blocks] == [(5, 3), (3, 2)]
    assert registration.links == (Link("0", "2"),)
    assert registration.num_parameters == 21


def test_report_has_one_row_for_each_parameter():
    rows = registered(net()).report
    assert [row.parameter for row in rows] == ["0.weight", "0.bias", "2.weight"]
    assert sum(row.num_parameters for row in rows) == 21
    assert [row.cost for row in rows] == [5**3 + 3**3, 0, 3**3 + 2**3]
    assert {(row.block, row.num_blocks, row.why) for row in rows} == {("kronecker", 1, "")}


def test_matrices_lie_where_the_dense_truth_has_them():
    model = net()
    registration = registered(model)
    vector = torch.arange(float(registration.num_parameters))
    for block in registration.blocks:
        expected = vector[dense.layer_indices(model, block.name, "rows")]
        expected = expected.reshape(block.dim_G, block.dim_A)
        assert torch.equal(block.matrix(vector), expected)


class Everything(nn.Module):
    """A layer for each rule, and parameters that no rule covers."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.grouped = nn.Conv1d(4, 6, 3, groups=2)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.ones(2, 3))
        self.gru = nn.GRU(6, 2)
        self.qkv = nn.Linear(2, 6)
        self.out = nn.Linear(6, 9)


def test_every_kind_of_layer_has_its_block():
    found = sizes(registered(Everything()))
    assert found.pop("scale") == ("diagonal", 1, 6)
    assert {name for name in found if name.startswith("gru.")} == {
        f"gru.{kind}_{gate}_l0" for kind in ("weight", "bias") for gate in ("ih", "hh")
    }
    assert {k: v for k, v in found.items() if not k.startswith("gru.")} == {
        "tokens": ("kronecker, diagonal A", 7, 4),
        "conv": ("kronecker", 13, 4),
        "grouped[0:3,0:7]": ("kronecker", 7, 3),
        "grouped[3:6,0:7]": ("kronecker", 7, 3),
        "depthwise": ("unit-wise", 4, 6),
        "norm": ("unit-wise", 2, 6),
        "qkv[0:2,0:3]": ("kronecker", 3, 2),
        "qkv[2:4,0:3]": ("kronecker", 3, 2),
        "qkv[4:6,0:3]": ("kronecker", 3, 2),
        "out": ("kronecker", 7, 9),
    }


def test_orders_are_of_the_matrices_that_are_inverted():
    orders = {b.name: b.orders for b in registered(Everything()).blocks}
    assert orders["tokens"] == (4,)
    assert orders["conv"] == (13, 4)
    assert orders["norm"] == orders["depthwise"] == orders["scale"] == ()


@pytest.mark.parametrize("options", [{}, {"max_factor_dim": 3}, {"diagonal": ["*"]}], ids=str)
def test_every_element_of_the_vector_is_in_one_block(options):
    registration = registered(Everything(), **options)
    vector = torch.arange(1.0, registration.num_parameters + 1)
    copied = torch.zeros_like(vector)
    for block in registration.blocks:
        matrix = block.matrix(vector)
        assert matrix.shape == (block.dim_G, block.dim_A)
        before = copied.count_nonzero()
        block.write(matrix, copied)
        assert copied.count_nonzero() == before + matrix.numel()
    assert torch.equal(copied, vector)


def test_wide_layers_are_split_into_nearly_equal_ranges():
    registration = registered(net(), max_factor_dim=2)
    assert registration.names[:6] == (
        "0[0:1,0:1]",
        "0[0:1,1:3]",
        "0[0:1,3:5]",
        "0[1:3,0:1]",
        "0[1:3,1:3]",
        "0[1:3,3:5]",
    )
    assert max(order for block in registration.blocks for order in block.orders) == 2
    assert registration.links == ()
    assert registration.report[0].num_blocks == 6


@pytest.mark.parametrize(
    ("width", "options", "num_blocks"),
    [
        (700, {}, 2),
        (600, {}, 1),
        (700, {"inverse": "block_tridiagonal"}, 1),  # only whole layers can be linked
        (700, {"max_factor_dim": None}, 1),
        (700, {"inverse": "block_tridiagonal", "max_factor_dim": 640}, 2),
    ],
)
def test_very_wide_layers_are_split_by_default(width, options, num_blocks):
    assert len(registered(nn.Linear(width, 3), **options).blocks) == num_blocks


def test_outputs_that_are_not_in_equal_parts_are_refused():
    with pytest.raises(InvalidSpecError, match=r"0 has 2 equal parts, but its 3 outputs are not"):
        registered(net(), fused_outputs={"0": 2})


def test_links_pass_over_other_layers_and_leave_split_ones_out():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2)
    )
    registration = registered(model, fused_outputs={"2": 3})
    assert registration.links == (Link("0", "3"), Link("3", "4"))


def test_a_frozen_bias_is_not_in_the_block():
    model = net()
    model[0].bias.requires_grad_(False)
    registration = registered(model)
    assert [(b.dim_A, b.dim_G) for b in registration.blocks] == [(4, 3), (3, 2)]
    assert [row.block for row in registration.report] == ["kronecker", "frozen", "kronecker"]


def test_a_frozen_weight_leaves_the_bias_alone():
    model = net()
    model[0].weight.requires_grad_(False)
    registration = registered(model)
    assert sizes(registration) == {"0.bias": ("kronecker", 1, 3), "2": ("kronecker", 3, 2)}
    assert registration.links == ()


def test_tied_layers_are_one_block():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    registration = registered(model)
    assert sizes(registration) == {"0": ("kronecker", 4, 3)}
    assert registration.links == ()
    assert {row.module for row in registration.report} == {"0, 2"}


def test_tied_weights_with_two_biases_are_three_blocks():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert sizes(registered(model)) == {
        "0": ("kronecker", 3, 3),
        "0.bias": ("kronecker", 1, 3),
        "2.bias": ("kronecker", 1, 3),
    }


def test_weights_that_are_used_in_two_ways_are_diagonal():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    registration = registered(model)
    assert sizes(registration) == {"0.weight": ("diagonal", 1, 15), "1.bias": ("kronecker", 1, 5)}
    assert registration.report[0].why == "0 and 1 use it differently"


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_a_subclass_that_computes_something_else_is_diagonal():
    registration = registered(nn.Sequential(Doubled(2, 2)))
    assert {block.kind for block in registration.blocks} == {"diagonal"}


def test_what_attention_does_not_call_is_diagonal():
    model = nn.TransformerEncoderLayer(4, 2, 8)
    found = sizes(registered(model))
    assert found["self_attn.out_proj.weight"] == ("diagonal", 1, 16)
    assert found["linear1"] == ("kronecker", 5, 8)
    assert found["norm1"] == ("unit-wise", 2, 4)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(InvalidSpecError, match="diagonal: nowhere matches no module"):
        registered(net(), diagonal=["nowhere", "0"])
    assert sizes(registered(net(), diagonal=["0.bias"])) == {
        "0": ("kronecker", 4, 3),
        "0.bias": ("diagonal", 1, 3),
        "2": ("kronecker", 3, 2),
    }


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(InvalidSpecError, match="no trainable"):
        registered(net().requires_grad_(False))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: nn.LazyLinear(3), r"1\.weight, 1\.bias: .* no shape before"),
        (lambda: nn.Linear(4, 0), r"1\.weight \(0, 4\), 1\.bias \(0,\): .* at least one element"),
        (lambda: nn.Embedding(0, 4), r"1\.weight \(0, 4\): "),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_parameters_without_elements_or_shape_are_refused_by_name(module, message):
    model = nn.Sequential(nn.Linear(4, 4), module())
    with pytest.raises(InvalidSpecError, match=message):
        register(model, kfac_settings({}))
