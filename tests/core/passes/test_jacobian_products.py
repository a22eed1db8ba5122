import pytest
import torch
from torch import nn

from kfac_dist.core.passes.jacobian_products import JacobianProducts
from kfac_dist.core.passes.kernels import plain_kernels
from kfac_dist.core.passes.running_statistics import running_statistics_kept
from kfac_dist.errors import InvalidSpecError
from kfac_dist.optim.optimizer import KFAC
from tests.oracles.truth import dense, dense_layers
from tests.oracles.truth.layer_models import MODELS


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("which", MODELS)
def test_both_modes_give_the_same_products(which, training):
    model, inputs, _ = MODELS[which]()
    model.train(training)
    model.unused = nn.Linear(2, 2).double()
    products = JacobianProducts(model)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, dense.num_parameters(model), generator=generator).double()
    if which == "attention":  # the padding row has no gradient, but the outputs depend on it
        padding = dense_layers.places(model)["tokens.weight"][model.tokens.padding_idx]
        vectors[:, padding] = 0
    outputs, expected = products.multiply(inputs, vectors)
    with running_statistics_kept(model), plain_kernels(model):
        again, actual = products.by_reverse_mode(inputs, vectors)
    torch.testing.assert_close(again, outputs)
    torch.testing.assert_close(actual, expected)


class Unusual(nn.Module):
    """Control flow on values and in-place changes, which vmap or forward mode cannot do."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(5, 4, max_norm=1.0)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.normed(self.tokens(x)))
        return self.out(h if h.detach().sum().item() > 0 else -h)


def test_a_model_that_permits_neither_vmap_nor_forward_mode_is_trained():
    torch.manual_seed(0)
    inputs = torch.randint(5, (20,))
    model, targets = Unusual(), inputs % 2
    optimizer = KFAC(model, distribution="categorical", damping=0.1)
    losses = [optimizer.step(inputs, targets).loss for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]


def test_an_operation_without_such_derivatives_is_reported():
    torch.manual_seed(0)
    inputs = torch.randint(5, (6, 3))
    options = {"distribution": "gaussian", "damping": 0.1}
    model = nn.Sequential(nn.EmbeddingBag(5, 4), nn.Linear(4, 2))
    with pytest.raises(InvalidSpecError, match="norm_constraint with damping"):
        KFAC(model, **options).step(inputs, torch.zeros(6, 2))
    fixed = {"initial": 0.1, "adapt_period": None}
    optimizer = KFAC(model, **options | {"damping": fixed, "step_rule": "norm_constraint"})
    assert optimizer.step(inputs, torch.zeros(6, 2)).applied
