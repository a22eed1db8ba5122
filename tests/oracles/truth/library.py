"""The library's functions in the form that the oracle tests call them."""

from torch import Tensor, nn

from kfac_dist.config import kfac_settings
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.passes.distributions import get_distribution


def computer_for(
    distribution: str, model: nn.Module, fisher_type: str = "exact", seed: int = 0, **options
):
    return BatchComputer(
        model,
        distribution=get_distribution(distribution),
        seed=seed,
        registration=register(model, kfac_settings(options)),
        fisher_type=fisher_type,
    )


def mean_tensors(
    distribution: str,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    fisher_type: str = "exact",
    **options,
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of every block's factors by name, means over the cases."""
    computer = computer_for(distribution, model, fisher_type, **options)
    sums = computer.statistics(inputs, targets, step=1).factors
    return {
        name: {key: value / len(inputs) for key, value in factors.tensors().items()}
        for name, factors in sums.items()
    }


def mean_factors(
    distribution: str,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    fisher_type: str = "exact",
    *,
    seed: int = 0,
    step: int = 1,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (A, G) of every layer, means over the cases."""
    computer = computer_for(distribution, model, fisher_type, seed)
    sums = computer.statistics(inputs, targets, step=step).factors
    return {name: (p.A / len(inputs), p.G / len(inputs)) for name, p in sums.items()}
