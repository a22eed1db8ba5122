"""The type in which inverses are applied: set, refused, or measured."""

import pytest
import torch

from kfac_dist import KFAC
from kfac_dist.config import KFACSpec, kfac_settings
from kfac_dist.core.blocks.registration import register
from kfac_dist.errors import InvalidSpecError
from kfac_dist.optim import precision
from kfac_dist.optim.precision import choose_precondition_dtype
from tests.oracles.truth.cases import Case

CASE = Case(widths=(6, 5, 4), activation="tanh", distribution="bernoulli", num_cases=24)


def choice(wanted, dtype=torch.float32):
    blocks = register(CASE.model(), KFACSpec()).blocks
    settings = kfac_settings({"precondition_dtype": wanted})
    return choose_precondition_dtype(settings, blocks, torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_the_setting_is_obeyed(wanted):
    assert choice(wanted).dtype == wanted


def test_float64_is_never_rounded():
    assert (
        choice("auto", torch.float64).dtype == choice("float32", torch.float64).dtype == "float32"
    )
    with pytest.raises(InvalidSpecError, match="bfloat16 needs parameters in float32; these are"):
        choice("bfloat16", torch.float64)
    with pytest.raises(InvalidSpecError, match="precondition_dtype"):
        KFAC(CASE.model(), distribution="bernoulli", precondition_dtype="bfloat16")


def test_auto_measures_and_logs_what_it_found(caplog):
    with caplog.at_level("INFO", logger="kfac_dist"):
        optimizer = KFAC(CASE.model().float(), distribution="bernoulli", precondition_dtype="auto")
    assert "times as long as float32 on cpu (products with 4 x 6 and 5 x 7)" in caplog.text
    assert optimizer.settings.precondition_dtype in ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("speedups", "dtype"), [([0.2], "float32"), ([0.6, 1.1], "float32"), ([0.6, 1.3], "bfloat16")]
)
def test_rounding_must_pay(monkeypatch, speedups, dtype):
    measured = iter(speedups)
    monkeypatch.setattr(precision, "_speedup", lambda _matrices: next(measured))
    assert choice("auto").dtype == dtype
    assert next(measured, None) is None


@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal", "ekfac"])
def test_training_with_rounded_products_lowers_the_objective(inverse):
    model, (inputs, targets) = CASE.model().float(), CASE.data()
    optimizer = KFAC(
        model,
        distribution="bernoulli",
        inverse=inverse,
        precondition_dtype="bfloat16",
        damping=1.0,
        fisher_fraction=1.0,
    )
    results = [optimizer.step(inputs.float(), targets.float()) for _ in range(15)]
    assert results[-1].objective < 0.8 * results[0].objective
    assert not +optimizer.numeric_events
