import math

import pytest
import torch

from kfac_dist.config import kfac_settings
from kfac_dist.core.passes.fisher import FisherMeans
from kfac_dist.core.step.block_numbers import block_numbers, direction_numbers
from kfac_dist.core.step.choice import Choice, combine
from kfac_dist.core.step.update import KFACUpdate

W1 = 19 / 20
GRADIENT = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
ALONG = 2 * GRADIENT
ASKEW = torch.tensor([4.0, 0.0, 3.0], dtype=torch.float64)


def update_for(**options):
    return KFACUpdate(kfac_settings({"fisher_type": "exact", **options}))


def numbers_of(directions, gradient=GRADIENT, previous=None):
    """The numbers of vectors that are one block."""
    previous = torch.zeros_like(gradient) if previous is None else previous
    tried = [{"all": direction} for direction in directions]
    return direction_numbers(block_numbers({"all": gradient}, tried, {"all": previous}))


def flat_fisher(count):
    return FisherMeans(
        gram=torch.zeros(count + 1, count + 1, dtype=torch.float64),
        squares=torch.zeros(count + 1, dtype=torch.float64),
    )


def choice_of(prediction):
    return Choice(
        candidate=0,
        gamma=1.0,
        alpha=1.0,
        mu=0.0,
        update_norm=1.0,
        predicted_change=prediction,
        prediction_for_ratio=prediction,
    )


def test_gamma_starts_at_the_root_of_damping_and_l2():
    update = update_for(damping={"initial": 3.0}, l2=1.0)
    assert update.gamma == 2.0
    assert update_for(damping={"initial": 3.0}, gamma={"initial": 0.7}).gamma == 0.7


def test_gammas_are_tried_on_both_sides():
    update = update_for(damping={"initial": 4.0}, l2=0.0, gamma={"adapt_period": 20})
    w2 = W1**10
    assert update.gammas(search=False) == (2.0,)
    assert update.gammas(search=True) == (2.0, pytest.approx(2.0 * w2), pytest.approx(2.0 / w2))


@pytest.mark.parametrize("winner", [0, 1, 2])
def test_the_candidate_with_the_lowest_model_wins(winner):
    """With F = 0 the model is lowest along the gradient itself."""
    update = update_for(damping={"initial": 1.0})
    gammas = update.gammas(search=True)
    directions = torch.stack([ALONG if c == winner else ASKEW for c in range(3)])
    choice = update.choose(numbers_of(directions), gammas, flat_fisher(3), lr=None)
    assert choice.applied
    assert choice.candidate == winner
    assert update.gamma == choice.gamma == gammas[winner]
    assert choice.predicted_change < 0


@pytest.mark.parametrize(("winner", "bound"), [(1, 0.5), (2, 8.0)])
def test_gamma_moves_both_ways_up_to_its_bounds(winner, bound):
    update = update_for(
        damping={"initial": 4.0},
        l2=0.0,
        gamma={"adapt_period": 10, "min": 0.5, "max": 8.0},
    )
    seen = [update.gamma]
    for _ in range(20):
        gammas = update.gammas(search=True)
        best = (
            winner if len(gammas) == 3 else gammas.index(min(gammas, key=lambda g: abs(g - bound)))
        )
        directions = torch.stack([ALONG if c == best else ASKEW for c in range(len(gammas))])
        update.choose(numbers_of(directions), gammas, flat_fisher(len(gammas)), lr=None)
        seen.append(update.gamma)
    assert seen[-1] == bound
    assert seen == sorted(seen, reverse=winner == 1)


@pytest.mark.parametrize("period", [1, 5])
@pytest.mark.parametrize(
    ("actual", "power"),
    [(-0.76, 1), (-2.0, 1), (-0.75, 0), (-0.5, 0), (-0.25, 0), (-0.24, -1), (0.1, -1)],
)
def test_damping_follows_the_reduction_ratio(actual, power, period):
    update = update_for(damping={"initial": 8.0, "adapt_period": period})
    ratio = update.adapt_damping(choice_of(-1.0), actual)
    assert ratio == pytest.approx(-actual)
    assert update.damping == pytest.approx(8.0 * W1 ** (period * power))


@pytest.mark.parametrize("actual", [math.nan, math.inf, -math.inf])
def test_a_change_that_is_not_finite_raises_damping(actual):
    update = update_for(damping={"initial": 8.0, "adapt_period": 5})
    assert update.adapt_damping(choice_of(-1.0), actual) is None
    assert update.damping == pytest.approx(8.0 / W1**5)


def test_damping_keeps_its_bounds():
    update = update_for(damping={"initial": 1.0, "adapt_period": 5, "min": 0.9, "max": 1.2})
    for _ in range(3):
        update.adapt_damping(choice_of(-1.0), -1.0)
    assert update.damping == 0.9
    for _ in range(5):
        update.adapt_damping(choice_of(-1.0), 1.0)
    assert update.damping == 1.2


def test_damping_stays_where_it_is_not_adapted():
    update = update_for(damping={"initial": 1.0, "adapt_period": None})
    assert update.adapt_damping(choice_of(-1.0), math.nan) is None
    update.adapt_damping(choice_of(-1.0), 1.0)
    assert update.damping == 1.0


def test_gamma_follows_damping_where_it_is_not_searched_for():
    update = update_for(
        damping={"initial": 3.0, "adapt_period": 1}, l2=1.0, gamma={"adapt_period": None}
    )
    update.adapt_damping(choice_of(-1.0), -1.0)
    assert update.gamma == pytest.approx(math.sqrt(3.0 * W1 + 1.0))
    searched = update_for(damping={"initial": 3.0, "adapt_period": 1}, l2=1.0)
    searched.adapt_damping(choice_of(-1.0), -1.0)
    assert searched.gamma == 2.0


def test_a_given_damping_takes_gamma_along_where_it_is_not_searched_for():
    fixed = {"initial": 3.0, "adapt_period": None, "min": 0.5}
    update = update_for(damping=fixed, l2=1.0, gamma={"adapt_period": None})
    assert update.gammas(search=False, damping=8.0) == (3.0,)
    update.begin_step(8.0)
    assert (update.damping, update.gamma) == (8.0, 3.0)
    update.begin_step(None)
    update.begin_step(0.1)
    assert update.damping == 0.5
    searched = update_for(damping=fixed, l2=1.0)
    searched.begin_step(8.0)
    assert (searched.damping, searched.gamma) == (8.0, 2.0)
    assert searched.gammas(search=False, damping=99.0) == (2.0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["gradient", "directions", "gram"])
def test_a_number_that_is_not_finite_is_not_applied(where, bad):
    update = update_for(damping={"initial": 8.0, "adapt_period": 5})
    gradient, directions, fisher = GRADIENT.clone(), ALONG.unsqueeze(0).clone(), flat_fisher(1)
    {"gradient": gradient, "directions": directions, "gram": fisher.gram}[where].view(-1)[0] = bad
    before = update.gamma
    choice = update.choose(numbers_of(directions, gradient), (before,), fisher, lr=None)
    assert not choice.applied
    assert (choice.alpha, choice.mu, choice.update_norm) == (0.0, 0.0, 0.0)
    assert update.damping == pytest.approx(8.0 / W1**5)
    assert update.gamma == before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_a_candidate_that_is_not_finite_leaves_the_choice_to_the_others(spoiled, bad):
    update = update_for(damping={"initial": 8.0, "adapt_period": 5})
    gammas, winner = update.gammas(search=True), (spoiled + 1) % 3
    directions = torch.stack([ALONG if c == winner else ASKEW for c in range(3)])
    directions[spoiled, 0] = bad
    fisher = flat_fisher(3)
    fisher.gram[spoiled, :] = fisher.gram[:, spoiled] = bad
    choice = update.choose(numbers_of(directions), gammas, fisher, lr=None)
    assert choice.applied
    assert choice.candidate == winner
    assert update.gamma == gammas[winner]
    assert update.damping == 8.0


def test_update_is_alpha_and_mu_times_the_two_vectors():
    update = update_for(damping={"initial": 1.0})
    previous = torch.ones_like(GRADIENT)
    numbers = numbers_of([ALONG], previous=previous)
    choice = update.choose(numbers, (1.0,), flat_fisher(1), lr=None)
    delta = combine(ALONG, previous, choice.alpha, choice.mu)
    torch.testing.assert_close(delta, choice.mu * torch.ones(3).double() - choice.alpha * ALONG)
    assert delta is previous
    assert choice.update_norm == pytest.approx(delta.norm().item())


def test_norm_constraint_bounds_the_step():
    options = {"step_rule": "norm_constraint", "lr": 10.0, "momentum": 0.9}
    update = update_for(norm_constraint=0.01, **options)
    assert update.fisher_fraction(1000, measure=False) is None
    assert update.fisher_fraction(1000, measure=True) == 1.0
    choice = update.choose(numbers_of([ALONG]), (1.0,), None, lr=10.0)
    assert choice.alpha == pytest.approx(math.sqrt(0.01 / 50.0))
    assert choice.mu == 0.9
    assert choice.predicted_change is None
    free = update_for(norm_constraint=1e6, **options)
    assert free.choose(numbers_of([ALONG]), (1.0,), None, lr=10.0).alpha == 10.0


def test_the_adaptive_rule_always_needs_fisher_products():
    assert update_for(fisher_fraction=0.3).fisher_fraction(1000, measure=False) == 0.3


def test_state_round_trip():
    update = update_for(damping={"initial": 2.0, "adapt_period": 1})
    choice = update.choose(numbers_of([ALONG]), (update.gamma,), flat_fisher(1), lr=None)
    update.adapt_damping(choice, -1.0)
    other = update_for(damping={"initial": 9.0})
    assert update.fisher_noise == math.inf  # products of zero tell nothing
    update.fisher_noise = 1.5
    other.load_state_dict(update.state_dict())
    assert (other.damping, other.gamma) == (update.damping, update.gamma)
    assert other.fisher_noise == update.fisher_noise
