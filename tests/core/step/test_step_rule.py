from typing import get_args

import pytest

from kfac_dist.config import KFACSpec, kfac_settings
from kfac_dist.core.step.plane_model import PlaneModel
from kfac_dist.core.step.step_rule import constrained_step, step_rule_for

NAMES = get_args(KFACSpec.model_fields["step_rule"].annotation)
MODEL = PlaneModel(slopes=(-6.0, 0.0), squares=(1.0, 0.0, 0.0), fisher=(2.0, 0.0, 0.0))


def rule_for(name, **options):
    return step_rule_for(kfac_settings({"step_rule": name, **options}))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_that_the_settings_allow_has_a_rule(name):
    rule = rule_for(name)
    alpha, mu = rule.coefficients(MODEL, ridge=1.0, lr=0.1 if rule.takes_lr else None)
    assert alpha > 0
    assert 0 <= mu < 1


def test_the_adaptive_rule_takes_the_minimum_of_the_model():
    rule = rule_for("adaptive")
    assert rule.needs_fisher
    assert not rule.takes_lr
    assert rule.coefficients(MODEL, ridge=1.0, lr=None) == (2.0, 0.0)


def test_the_norm_constraint_takes_lr_and_momentum_and_no_fisher_products():
    rule = rule_for("norm_constraint", norm_constraint=1.5, momentum=0.8)
    assert not rule.needs_fisher
    assert rule.takes_lr
    assert rule.coefficients(MODEL, ridge=1.0, lr=0.1) == (0.1, 0.8)
    assert rule.coefficients(MODEL, ridge=1.0, lr=10.0) == (0.5, 0.8)


@pytest.mark.parametrize(("name", "expected"), [("adaptive", 7), ("norm_constraint", None)])
def test_gamma_is_searched_for_under_a_rule_with_fisher_products(name, expected):
    assert rule_for(name, gamma={"adapt_period": 7}).gamma_search_period == expected
    assert rule_for(name, gamma={"adapt_period": None}).gamma_search_period is None


def test_constrained_step_bounds_the_norm_in_the_metric():
    assert constrained_step(0.1, 100.0, 4.0) == 0.1
    assert constrained_step(10.0, 1.0, 4.0) == 0.5
    for slope in (0.5, 4.0, 1e6):
        assert constrained_step(10.0, 0.01, slope) ** 2 * slope <= 0.01 * (1 + 1e-12)
    assert constrained_step(0.1, 1.0, 0.0) == 0.1
