"""Statistics do not depend on where a model has its cases, and leave left-out positions out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_dist.config import kfac_settings
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.passes.distributions import get_distribution
from kfac_dist.errors import InvalidSpecError

INPUTS = torch.arange(4 * 6 * 5, dtype=torch.float64).reshape(4, 6, 5).mul(7).sin()
# The longest T divides by N, N by T, or neither.
LENGTHS = [4, 6, 2, 1]


class Net(nn.Module):
    """Attention over positions; `layout` is where the layers have cases and positions."""

    def __init__(self, layout, *, returns="cases"):
        super().__init__()
        torch.manual_seed(0)
        self.layout, self.returns = layout, returns
        self.embed = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.out = nn.Linear(4, 3)
        self.double()

    def _to(self, x):
        if self.layout == "sequence":
            return x.transpose(0, 1)
        if self.layout == "inside":
            return x.transpose(0, 1).flatten(0, 1)
        return x.flatten(0, 1) if self.layout == "outside" else x

    def _back(self, x, shape):
        if self.layout == "sequence":
            return x.transpose(0, 1)
        if self.layout == "inside":
            return x.unflatten(0, (shape[1], shape[0])).transpose(0, 1)
        return x.unflatten(0, shape[:2]) if self.layout == "outside" else x

    def forward(self, x):
        x = x.transpose(0, 1) if self.returns == "sequence" else x
        shape = x.shape
        h = self.norm(self.embed(self._to(x))) * self.scale
        h = self._back(torch.tanh(self.mix(h)), shape)
        h = F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])[:, 0]
        z = self._back(self.out(self._to(h)), shape)
        if self.returns == "sequence":
            return z.transpose(0, 1)
        return z.flatten(0, 1) if self.returns == "rows" else z


def statistics_of(model, inputs, fisher_type="exact", targets=None, *, case_axis=0, **options):
    registration = register(model, kfac_settings(options))
    computer = BatchComputer(
        model,
        distribution=get_distribution("categorical"),
        seed=0,
        registration=registration,
        fisher_type=fisher_type,
        case_axis=case_axis,
    )
    bases = {
        block.name: KroneckerPair(
            A=torch.linalg.qr(torch.ones(block.dim_A, block.dim_A).tril().double())[0],
            G=torch.linalg.qr(torch.ones(block.dim_G, block.dim_G).tril().double())[0],
        )
        for block in registration.blocks
        if block.kind == "kronecker"
    }
    sums = computer.statistics(inputs, targets, step=1, links=registration.links, bases=bases)
    vectors = torch.ones(1, registration.num_parameters, dtype=torch.float64)
    return [*sums.tensors(), computer.fisher_sums(inputs, list(vectors)).squares]


def assert_same(mine, expected):
    assert len(mine) == len(expected)
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("layout", ["sequence", "inside", "outside"])
def test_every_layout_inside_the_model_gives_the_same(layout, length, fisher_type, sharing):
    inputs = INPUTS[:, :length]
    options = {"weight_sharing": sharing}
    expected = statistics_of(Net("cases"), inputs, fisher_type, **options)
    assert_same(statistics_of(Net(layout), inputs, fisher_type, **options), expected)


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
@pytest.mark.parametrize(("returns", "case_axis"), [("sequence", 1), ("rows", 0)])
def test_every_layout_of_inputs_and_outputs_gives_the_same(returns, case_axis, fisher_type):
    expected = statistics_of(Net("cases"), INPUTS, fisher_type)
    model = Net("cases", returns=returns)
    assert_same(statistics_of(model, INPUTS, fisher_type, case_axis=case_axis), expected)


@pytest.mark.parametrize("fisher_type", ["mc", "exact", "empirical"])
def test_left_out_positions_are_as_if_their_outputs_were_constant(fisher_type):
    targets = torch.arange(24).reshape(4, 6) % 3
    targets[:, 2:] = -100

    class Constant(Net):
        def forward(self, x):
            return super().forward(x) * (targets[: len(x), : x.shape[1]] >= 0).unsqueeze(-1)

    mine = statistics_of(Net("cases"), INPUTS, fisher_type, targets)[:-1]
    full = statistics_of(Net("cases"), INPUTS, fisher_type, targets.clamp(min=0))[:-1]
    expected = statistics_of(Constant("cases"), INPUTS, fisher_type, targets)[:-1]
    assert_same(mine, expected)
    assert not all(torch.allclose(a, b) for a, b in zip(mine, full, strict=True))


def test_fisher_products_leave_positions_out():
    targets = torch.arange(24).reshape(4, 6) % 3
    targets[:, 2:] = -100
    model = Net("cases")
    computer = BatchComputer(model, distribution=get_distribution("categorical"), seed=0)
    vector = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    mine = computer.fisher_sums(INPUTS, [vector], None, targets)
    outputs, derivatives = computer._products.multiply(INPUTS, vector.unsqueeze(0))
    roots = computer.distribution.root_transpose_product(outputs, derivatives[0])[:, :2]
    torch.testing.assert_close(mine.gram[0, 0], roots.square().sum())


class Shuffled(nn.Module):
    """Mixes rows of cases so that nothing tells them apart."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(5, dtype=torch.float64)
        self.out = nn.Linear(5, 3, dtype=torch.float64)

    def forward(self, x):
        pairs = x[:, None] * x[None]
        return self.out(self.norm(pairs).mean(1))


def test_a_layer_whose_cases_are_unknown_is_refused_by_name_where_they_are_needed():
    inputs = INPUTS[:, 0]
    with pytest.raises(InvalidSpecError, match=r"layer norm: nothing shows .* \(4, 4, 5\)"):
        statistics_of(Shuffled(), inputs, "exact")
    with pytest.raises(InvalidSpecError, match="layer norm: nothing shows"):
        statistics_of(Shuffled(), inputs, "mc", weight_sharing="reduce")
    statistics_of(Shuffled(), inputs, "mc")


def test_classes_of_several_dimensions_need_an_axis_when_no_targets_are_seen():
    model = Net("cases")
    computer = BatchComputer(
        model,
        distribution=get_distribution("categorical", None),
        seed=0,
        registration=register(model, kfac_settings({})),
    )
    with pytest.raises(InvalidSpecError, match=r"shape \(4, 6, 3\), and no targets are seen"):
        computer.statistics(INPUTS, None, step=1)
