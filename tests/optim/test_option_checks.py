"""Messages for arguments that are not what they should be: with name, value and what is right."""

import math

import pytest
import torch
from torch import nn

from kfac_dist import KFAC, KFACPreconditioner
from kfac_dist.errors import InvalidSpecError


class WithProjection(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, inputs):
        return self.proj(inputs)


def kfac(**options):
    return KFAC(WithProjection(), **({"distribution": "categorical"} | options))


def preconditioner(**options):
    return KFACPreconditioner(WithProjection(), **({"distribution": "categorical"} | options))


BOTH = (kfac, preconditioner)
BOUND = {"lr": 0.1, "norm_constraint": 1e-3}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        *((make, {"seed": "a"}, 'seed: "a" is not a whole number') for make in BOTH),
        *((make, {"seed": True}, "seed: true is not a whole number") for make in BOTH),
        *((make, {"distribution": "x"}, "distribution must be one of") for make in BOTH),
        *(
            (make, {"fused_outputs": {"*kv": 2}}, r"fused_outputs: \*kv matches no .*'proj'")
            for make in BOTH
        ),
        (kfac, {"delay_steps": {"conv*": 3}}, r"delay_steps: conv\* matches no layer.*'proj'"),
        (kfac, {"delay_steps": {"*": 1.5}}, r"delay_steps\.\*: 1.5 is not a whole number"),
        (kfac, {"warmup_steps": -1}, "warmup_steps: -1 is not a whole number, 0 or above"),
        (kfac, BOUND | {"norm_constraint": 0.0}, "KFAC: norm_constraint: 0.0 is not a number abo"),
        (kfac, BOUND | {"lr": math.nan}, "KFAC: lr: NaN is not"),
        (preconditioner, BOUND | {"norm_constraint": 0.0}, "norm_constraint: 0 is not a finite"),
        (preconditioner, BOUND | {"norm_constraint": -1.0}, "norm_constraint: -1 is not a finite"),
        (preconditioner, BOUND | {"lr": math.nan}, "KFACPreconditioner: lr: nan is not a finite"),
        (preconditioner, BOUND | {"lr": "a"}, 'KFACPreconditioner: lr: "a" is not a finite'),
        (preconditioner, {"damping": {"initial": 1.0}}, "KFACPreconditioner: damping: {.* is not"),
        (preconditioner, {"damping": 1e-12}, "damping: 1e-12 is not between 1e-08 and 1e"),
        (preconditioner, {"dampin": 1.0}, r"no option dampin. Did you mean damping\?"),
        (preconditioner, {"factor_decay": 2}, "^KFACPreconditioner: factor_decay: 2 is not"),
    ],
)
def test_a_wrong_argument_is_named(make, options, message):
    with pytest.raises(InvalidSpecError, match=message):
        make(**options)


def test_the_preconditioner_proposes_only_options_that_it_has():
    with pytest.raises(InvalidSpecError) as caught:
        preconditioner(zzz=1)
    listed = str(caught.value).partition("The options are ")[2].split(", ")
    assert {"damping", "norm_constraint", "lr", "inverse", "diagonal"} <= set(listed)
    assert not {"step_rule", "momentum", "averaging", "gamma", "l2", "name"} & set(listed)


def test_patterns_that_match_and_defaults_are_accepted():
    kfac(fused_outputs={"proj": 3, "*qkv": 3}, delay_steps={"proj*": 2}, seed=7)


@pytest.mark.parametrize("attribute", ["damping", "norm_constraint", "lr"])
def test_values_that_change_later_are_checked_before_the_step(attribute):
    model = WithProjection()
    rate = [0.1]
    made = KFACPreconditioner(
        model, distribution="categorical", norm_constraint=1e-3, lr=lambda: rate[0]
    )
    model(torch.randn(8, 6)).square().sum().backward()
    before = model.proj.weight.grad.clone()
    if attribute == "lr":
        rate[0] = -1.0
    else:
        setattr(made, attribute, -1.0)
    with pytest.raises(InvalidSpecError, match=f"{attribute}: -1 is not a finite number"):
        made.step()
    assert made.step_count == 0
    assert torch.equal(model.proj.weight.grad, before)
