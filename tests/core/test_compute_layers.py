"""What the passes over a model may and may not change, with layers of every kind."""

import pytest
import torch
from torch import nn

from kfac_dist.errors import InvalidSpecError
from tests.oracles.truth import dense, dense_layers
from tests.oracles.truth.layer_models import MODELS, scaled
from tests.oracles.truth.library import computer_for, mean_tensors

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def batch(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def buffers_of(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def test_only_the_gradient_moves_running_statistics():
    model, inputs, targets = scaled()
    model.train()
    computer = computer_for("categorical", model, "mc")
    before = buffers_of(model)
    vectors = torch.ones(2, dense.num_parameters(model), dtype=torch.float64)
    computer.loss(inputs, targets)
    computer.statistics(inputs, targets, step=1)
    computer.fisher_sums(inputs, vectors)
    assert same(buffers_of(model), before)
    assert model.norm.track_running_stats
    computer.gradient(inputs, targets)
    assert not same(buffers_of(model), before)
    assert model.norm.num_batches_tracked == before["norm.num_batches_tracked"] + 1


def test_fisher_products_see_through_the_statistics_of_the_batch():
    model, inputs, _ = scaled()
    model.train()
    computer = computer_for("gaussian", model)
    direction = batch(dense.num_parameters(model))
    step, change = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            start = dense.parameter_vector(model)
            nn.utils.vector_to_parameters(start + sign * step * direction, model.parameters())
            change.append(model(inputs))
            nn.utils.vector_to_parameters(start, model.parameters())
    expected = ((change[0] - change[1]) / (2 * step)).square().sum()
    gram = computer.fisher_sums(inputs, direction.unsqueeze(0)).gram
    torch.testing.assert_close(gram[0, 0], expected, rtol=1e-6, atol=1e-8)


def test_diagonals_in_training_take_the_statistics_of_the_batch_as_constants():
    model, inputs, targets = scaled()
    model.train()
    actual = mean_tensors("categorical", model, inputs, targets, "empirical")["scale"]["M"]
    convolved = model.first(inputs).detach()
    axes = (0, 2, 3)
    model.eval()
    with torch.no_grad():
        model.norm.running_mean.copy_(convolved.mean(axes))
        model.norm.running_var.copy_(convolved.var(axes, unbiased=False))
    expected = dense.empirical_fisher("categorical", model, inputs, targets).diagonal()
    expected = expected[dense_layers.places(model)["scale"]]
    torch.testing.assert_close(actual.flatten(), expected, **CLOSE)


def test_outputs_that_are_overwritten_in_place_have_their_own_gradients():
    def net(inplace):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=inplace), nn.Linear(4, 2)).double()

    inputs, targets = batch(5, 3), batch(5, 2)
    plain = mean_tensors("gaussian", net(False), inputs, targets)
    for name, factors in mean_tensors("gaussian", net(True), inputs, targets).items():
        for key, value in factors.items():
            assert torch.equal(value, plain[name][key])


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)
        self.bare = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.used(x)


def test_what_the_model_does_not_use_has_zeros():
    model, inputs, targets = Unused().double(), batch(4, 3), batch(4, 2)
    computer = computer_for("gaussian", model, "exact")
    gradient = computer.gradient(inputs, targets).gradient
    at = dense_layers.places(model)
    assert not gradient[at["bare"]].any()
    assert not gradient[at["unused.weight"]].any()
    assert gradient[at["used.weight"]].any()
    sums = computer.statistics(inputs, targets, step=1).factors
    for name in ("unused", "bare"):
        assert not any(value.any() for value in sums[name].tensors().values())


class Bypassed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return x @ self.linear.weight.T + self.linear.bias


def test_a_weight_that_is_used_without_its_module_is_refused_by_name():
    model, inputs, targets = Bypassed().double(), batch(4, 3), batch(4, 2)
    with pytest.raises(InvalidSpecError, match=r"linear\.weight.*diagonal: \[linear\.weight\]"):
        computer_for("gaussian", model).statistics(inputs, targets, step=1)
    diagonal = mean_tensors("gaussian", model, inputs, targets, diagonal=["linear"])
    expected = dense.fisher("gaussian", model, inputs).diagonal()
    torch.testing.assert_close(diagonal["linear.weight"]["M"].flatten(), expected[:6], **CLOSE)


class Positions(nn.Module):
    """A position embedding of arange(T), with no axis of cases."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(5, 3), nn.Embedding(4, 3)
        self.out = nn.Linear(3, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.tokens(x) + self.places(torch.arange(x.shape[1]))))


@pytest.mark.parametrize("num_cases", [3, 4])
@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
def test_an_input_without_cases_is_refused_where_single_cases_are_needed(num_cases, fisher_type):
    model = Positions().double()
    inputs, targets = torch.zeros(num_cases, 4, dtype=torch.long), batch(num_cases, 4, 2)
    with pytest.raises(InvalidSpecError, match=r"places: its input \(4,\) has no axis"):
        computer_for("gaussian", model, fisher_type).statistics(inputs, targets, step=1)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_an_input_without_cases_gives_unbiased_samples(sharing):
    torch.manual_seed(0)
    model = Positions().double()
    inputs, targets = torch.randint(5, (4, 4)), batch(4, 4, 2)
    computer = computer_for("gaussian", model, "mc", weight_sharing=sharing)
    mean = sum(
        computer.statistics(inputs, targets, step=step).factors["places"].G for step in range(1500)
    ) / (1500 * len(inputs))

    def expanded(x):
        places = model.places(torch.arange(4).expand(len(x), -1))
        return model.out(torch.tanh(model.tokens(x) + places))

    A = computer.statistics(inputs, targets, step=0).factors["places"].A / len(inputs)
    model.forward = expanded
    exact = mean_tensors("gaussian", model, inputs, targets, weight_sharing=sharing)["places"]
    torch.testing.assert_close(A, exact["A"], **CLOSE)
    assert (mean - exact["G"]).norm() / exact["G"].norm() < 0.1


@pytest.mark.parametrize("which", MODELS)
def test_no_cases_give_zeros(which):
    model, inputs, targets = MODELS[which]()
    sums = computer_for("categorical", model).statistics(inputs[:0], targets[:0], step=1).factors
    assert all(not v.any() for factors in sums.values() for v in factors.tensors().values())


@pytest.mark.parametrize("which", MODELS)
def test_statistics_have_no_graph(which):
    model, inputs, targets = MODELS[which]()
    first = next(name for name, _ in model.named_parameters())
    computer = computer_for("categorical", model, diagonal=(first,))
    sums = computer.statistics(inputs, targets, step=1).factors
    assert not any(v.requires_grad for f in sums.values() for v in f.tensors().values())


def test_parts_of_a_fused_projection_share_one_factor():
    model, inputs, targets = MODELS["attention"]()
    computer = computer_for("categorical", model)
    statistics = computer.statistics(inputs, targets, step=1)
    parts = [factors for name, factors in statistics.factors.items() if name.startswith("qkv[")]
    assert len(parts) == 3
    assert len({id(part.A) for part in parts}) == 1
    doubled = {name: 2 * factors.G for name, factors in statistics.factors.items() if "qkv" in name}
    expected = 2 * parts[0].A
    statistics.add_(computer.statistics(inputs, targets, step=1))
    torch.testing.assert_close(parts[0].A, expected)
    assert all(torch.allclose(statistics.factors[name].G, G) for name, G in doubled.items())
