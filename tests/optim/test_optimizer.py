import math

import pytest
import torch
from torch import nn

from kfac_dist import KFAC
from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.inverse import structure as structure_module
from kfac_dist.core.inverse.damped import InversionFailedError
from kfac_dist.core.passes.fisher import FisherSums
from kfac_dist.core.statistics.sums import BatchStatistics
from kfac_dist.errors import InvalidSpecError
from tests.oracles.truth import dense
from tests.oracles.truth.cases import DISTRIBUTIONS, Case
from tests.saved_optimizers import assert_same_next_steps

RULES = {
    "adaptive": {
        "step_rule": "adaptive",
        "damping": {"initial": 1.0, "adapt_period": 2},
        "gamma": {"adapt_period": 3},
    },
    "norm_constraint": {
        "step_rule": "norm_constraint",
        "damping": {"initial": 1.0, "adapt_period": 2},
        "lr": 0.5,
        "momentum": 0.8,
        "norm_constraint": 0.05,
    },
}


def case_for(distribution, seed=0):
    return Case(
        widths=(6, 5, 4),
        activation="tanh",
        distribution=distribution,
        num_cases=24,
        seed=seed,
    )


def optimizer_for(model, distribution="bernoulli", rule="adaptive", **options):
    chosen = {"inverse_update_period": 4, "statistics_fraction": 0.5, "fisher_fraction": 0.5}
    chosen.update(RULES[rule])
    chosen.update(options)
    return KFAC(model, distribution=distribution, **chosen)


def test_an_empty_batch_is_refused_and_counts_no_step():
    model, (inputs, targets) = case_for("gaussian").model(), case_for("gaussian").data()
    optimizer = optimizer_for(model, "gaussian")

    with pytest.raises(InvalidSpecError, match="the batch has no cases"):
        optimizer.step(inputs[:0], targets[:0])

    assert optimizer.step(inputs, targets).step == 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_training_lowers_the_objective(distribution, rule):
    model, (inputs, targets) = case_for(distribution).model(), case_for(distribution).data()
    optimizer = optimizer_for(model, distribution, rule, fisher_fraction=1.0)
    first = optimizer.step(inputs, targets)
    assert first.loss == pytest.approx(
        dense.batch_loss(distribution, case_for(distribution).model(), inputs, targets).item() / 24
    )
    for _ in range(39):
        last = optimizer.step(inputs, targets)
    assert last.step == 40
    assert last.objective < 0.7 * first.objective
    assert not +optimizer.numeric_events


@pytest.mark.parametrize("fisher_type", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("saved_after", [0, 1, 5, 8])
def test_state_round_trip_gives_the_same_next_steps_bitwise(saved_after, rule, fisher_type):
    options = {"fisher_type": fisher_type, "averaging": {"decay": 0.9, "start": 4}}

    def optimizer_of(model):
        return optimizer_for(model, "categorical", rule, **options)

    optimizer, other = assert_same_next_steps(case_for("categorical"), optimizer_of, saved_after)
    assert torch.equal(other.averaged_parameters, optimizer.averaged_parameters)


FALLING = {"schedule": "exponential", "initial": 4.0, "final": 1.0, "steps": 5}
WARMED = {"schedule": "cosine", "initial": 0.5, "final": 0.1, "steps": 6, "warmup_steps": 2}


@pytest.mark.parametrize("rule", RULES)
def test_schedules_continue_where_a_state_was_saved(rule):
    case = case_for("categorical")
    inputs, targets = case.data()
    options = {"damping": {"initial": FALLING, "adapt_period": None}, "lr": WARMED}
    options["gamma"] = {"adapt_period": None}
    model, other_model = case.model(), case.model()
    optimizer = optimizer_for(model, "categorical", rule, **options)
    results = [optimizer.step(inputs, targets) for _ in range(3)]
    other = optimizer_for(other_model, "categorical", rule, **options)
    other.load_state_dict(optimizer.state_dict())
    other_model.load_state_dict(model.state_dict())
    rest = [optimizer.step(inputs, targets) for _ in range(4)]
    assert [other.step(inputs, targets) for _ in range(4)] == rest
    results += rest
    dampings = [4.0, 4 / 2**0.5, 2.0, 2**0.5, 1.0, 1.0, 1.0]
    assert [r.damping for r in results] == pytest.approx(dampings)
    assert [r.gamma for r in results] == pytest.approx([(d + 1e-5) ** 0.5 for d in dampings])
    lrs = [0.25, 0.5, 0.1 + 0.4 * (2 + 2**0.5) / 4, 0.3, 0.1 + 0.4 * (2 - 2**0.5) / 4, 0.1, 0.1]
    expected = [None] * 7 if rule == "adaptive" else pytest.approx(lrs)
    assert [r.lr for r in results] == expected
    if rule == "norm_constraint":
        assert all(r.alpha <= r.lr for r in results)


def test_a_saved_state_does_not_change_with_later_steps():
    case = case_for("bernoulli")
    inputs, targets = case.data()
    optimizer = optimizer_for(case.model())
    optimizer.step(inputs, targets)
    state = optimizer.state_dict()
    previous = state["update"]["previous_update"].clone()
    inverse = state["inverses"]["0/1/0/A"].clone()
    for _ in range(5):
        optimizer.step(inputs, targets)
    assert torch.equal(state["update"]["previous_update"], previous)
    assert torch.equal(state["inverses"]["0/1/0/A"], inverse)


def test_a_state_of_another_model_is_refused():
    case = case_for("bernoulli")
    optimizer = optimizer_for(case.model())
    optimizer.step(*case.data())
    other = optimizer_for(nn.Sequential(nn.Linear(6, 4)).double())
    with pytest.raises(InvalidSpecError, match="another model"):
        other.load_state_dict(optimizer.state_dict())


def test_the_seed_decides_the_run():
    case = case_for("bernoulli")
    inputs, targets = case.data()
    ends = []
    for seed in (1, 1, 2):
        model = case.model()
        optimizer = optimizer_for(model, seed=seed)
        for _ in range(3):
            optimizer.step(inputs, targets)
        ends.append(dense.parameter_vector(model))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_changes_nothing(bad):
    case = case_for("gaussian")
    model, (inputs, targets) = case.model(), case.data()
    optimizer = optimizer_for(model, "gaussian")
    optimizer.step(inputs, targets)
    before = dense.parameter_vector(model)
    factors = optimizer.factors["0"].A
    poisoned = inputs.clone()
    poisoned[3, 1] = bad
    result = optimizer.step(poisoned, targets)
    assert not result.applied
    assert result.update_norm == 0
    assert optimizer.numeric_events["bad_step"] == 1
    assert torch.equal(dense.parameter_vector(model), before)
    assert torch.equal(optimizer.factors["0"].A, factors)
    assert optimizer.step(inputs, targets).applied


def test_fisher_products_that_are_not_finite_skip_the_step_once(monkeypatch):
    case = case_for("gaussian")
    model, (inputs, targets) = case.model(), case.data()
    optimizer = optimizer_for(model, "gaussian")
    optimizer.step(inputs, targets)
    before, damping = dense.parameter_vector(model), optimizer._update.damping
    monkeypatch.setattr(
        optimizer._computer,
        "fisher_sums",
        lambda _inputs, vectors, *_others: FisherSums.unpacked(
            torch.full((len(vectors) + 1, len(vectors)), math.nan, dtype=torch.float64)
        ),
    )
    result = optimizer.step(inputs, targets)
    assert not result.applied
    assert result.damping > damping
    assert torch.equal(dense.parameter_vector(model), before)
    assert sum(optimizer.numeric_events.values()) == 1


def test_statistics_that_are_not_finite_are_refused_at_the_door(monkeypatch):
    case = case_for("gaussian")
    model, (inputs, targets) = case.model(), case.data()
    optimizer = optimizer_for(model, "gaussian")
    optimizer.step(inputs, targets)
    factors = optimizer.factors

    def spoiled(*_args, **_kwargs):
        pairs = {
            name: KroneckerPair(A=pair.A * math.nan, G=pair.G) for name, pair in factors.items()
        }
        return BatchStatistics(factors=pairs, crosses={}, moments={})

    monkeypatch.setattr(optimizer._computer, "statistics", spoiled)
    result = optimizer.step(inputs, targets)
    assert result.applied
    assert optimizer.numeric_events["refused_statistics"] == 1
    for name, pair in optimizer.factors.items():
        assert torch.equal(pair.A, factors[name].A)


def failing_inversion(pair, gamma, norm):
    raise InversionFailedError("made to fail")


def test_the_last_good_inverse_is_kept_when_inverting_fails(monkeypatch):
    case = case_for("gaussian")
    model, (inputs, targets) = case.model(), case.data()
    optimizer = optimizer_for(model, "gaussian")
    optimizer.step(inputs, targets)
    gradient = {"0": torch.ones(5, 7, dtype=torch.float64)}
    before = optimizer.precondition(gradient)["0"]
    monkeypatch.setattr(structure_module, "invert_layer", failing_inversion)
    result = optimizer.step(inputs, targets)
    assert result.applied
    assert optimizer.numeric_events["kept_inverse"] == 2
    assert torch.equal(optimizer.precondition(gradient)["0"], before)


def test_without_any_inverse_a_layer_falls_back_to_the_gradient(monkeypatch):
    case = case_for("gaussian")
    model, (inputs, targets) = case.model(), case.data()
    start = dense.parameter_vector(model)
    gradient = dense.per_case_gradients("gaussian", model, inputs, targets).mean(dim=0)
    monkeypatch.setattr(structure_module, "invert_layer", failing_inversion)
    optimizer = optimizer_for(model, "gaussian", l2=0.0)
    first = optimizer.step(inputs, targets)
    assert first.applied
    assert optimizer.numeric_events["no_inverse"] == 2
    assert optimizer.numeric_events["gradient_fallback"] == 2
    moved = dense.parameter_vector(model) - start
    cosine = torch.nn.functional.cosine_similarity(moved, -gradient, dim=0)
    assert cosine.item() == pytest.approx(1.0)
    for _ in range(5):
        last = optimizer.step(inputs, targets)
    assert last.loss < first.loss


def test_precondition_is_the_dense_solve_with_the_averaged_factors():
    case = case_for("bernoulli")
    model, (inputs, targets) = case.model(), case.data()
    optimizer = optimizer_for(model)
    optimizer.step(inputs, targets)
    gamma = math.sqrt(1.0 + optimizer.settings.l2)
    gradients = {
        "0": torch.linspace(-1, 1, 35).double().reshape(5, 7),
        "2": torch.linspace(0, 2, 24).double().reshape(4, 6),
    }
    directions = optimizer.precondition(gradients)
    for name, pair in optimizer.factors.items():
        block = dense.damped_block(pair.A, pair.G, gamma, "columns")
        expected = torch.linalg.solve(block, gradients[name].T.flatten())
        torch.testing.assert_close(directions[name].T.flatten(), expected)


@pytest.mark.parametrize(("initial", "direction"), [(1e-4, 1), (100.0, -1)])
def test_gamma_finds_its_way_from_both_sides(initial, direction):
    """With a fixed damping, a gamma that is far too small grows, and one far too large shrinks."""
    case = case_for("gaussian", seed=4)
    model, (inputs, targets) = case.model(), case.data()
    optimizer = optimizer_for(
        model,
        "gaussian",
        damping={"initial": 1.0, "adapt_period": None},
        gamma={"initial": initial, "adapt_period": 2},
        fisher_fraction=1.0,
        fisher_type="mc",
        statistics_fraction=0.25,
    )
    gammas = [optimizer.step(inputs, targets).gamma for _ in range(20)]
    assert direction * gammas[-1] > direction * initial


def test_float32_models_are_trained_in_float32():
    case = case_for("categorical")
    model, (inputs, targets) = case.model().float(), case.data()
    optimizer = optimizer_for(model, "categorical")
    results = [optimizer.step(inputs.float(), targets) for _ in range(12)]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert optimizer.factors["0"].A.dtype == torch.float32
    assert results[-1].objective < results[0].objective


def test_damping_may_be_a_number():
    model = case_for("bernoulli").model()
    optimizer = KFAC(model, distribution="bernoulli", damping=3.0, gamma=0.5)
    assert optimizer.settings.damping.initial == 3.0
    assert optimizer.settings.gamma.initial == 0.5


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(InvalidSpecError, match="dampin"):
        KFAC(case_for("bernoulli").model(), distribution="bernoulli", dampin=3.0)


def test_the_report_names_every_parameter():
    report = optimizer_for(case_for("bernoulli").model()).registration_report()
    assert [row.parameter for row in report] == ["0.weight", "0.bias", "2.weight", "2.bias"]
