import pytest
import torch
from torch import nn

from kfac_dist.core.passes.capture import capturing, output_gradients
from kfac_dist.core.passes.chain import Trace, find_chain
from kfac_dist.core.passes.chain_products import ChainProducts
from kfac_dist.core.passes.jacobian_products import JacobianProducts
from tests.oracles.truth import dense

ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU)


def chain(activation):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 5), activation(), nn.Linear(5, 5, bias=False))
    model = nn.Sequential(nn.Flatten(), inner, activation(), nn.Linear(5, 3), nn.Flatten())
    return model.double(), torch.randn(7, 2, 3, dtype=torch.float64)


def traced(model, inputs):
    products = ChainProducts(model, find_chain(model))
    with capturing(products.modules) as captures:
        outputs = model(inputs)
    return products, Trace.from_captures(products.modules, captures, outputs)


def assert_products(model, inputs):
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(3, dense.num_parameters(model), generator=generator).double()
    products, trace = traced(model, inputs)
    outputs, expected = JacobianProducts(model).multiply(inputs, vectors)
    torch.testing.assert_close(trace.outputs, outputs)
    torch.testing.assert_close(products.multiply(trace, list(vectors)), expected)
    some = products.multiply(trace.rows_at([1, 4]), list(vectors))
    torch.testing.assert_close(some, expected[:, [1, 4]])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_products_are_those_of_forward_mode(activation):
    assert_products(*chain(activation))


@pytest.mark.parametrize("frozen", ["1.0.weight", "1.0.bias", "3.weight"])
def test_frozen_parameters_do_not_move(frozen):
    model, inputs = chain(nn.Tanh)
    model.get_parameter(frozen).requires_grad_(False)
    assert_products(model, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_go_back_as_in_autograd(activation):
    model, inputs = chain(activation)
    products, trace = traced(model, inputs)
    with capturing(products.modules) as captures:
        outputs = model(inputs)
    derivative = torch.randn(outputs.shape, dtype=torch.float64)
    expected = output_gradients(outputs, captures, derivative)
    found = products.output_gradients(trace, derivative)
    assert set(found) == {m for m in products.modules if isinstance(m, nn.Linear)}
    for module in found:
        torch.testing.assert_close(found[module], expected[module])
        assert products.captures(trace)[module][0].shape == captures[module][0].shape


def test_a_weight_that_two_modules_share():
    model, inputs = chain(nn.Tanh)
    again = nn.Linear(5, 5).double()
    again.weight = model[1][2].weight
    assert_products(nn.Sequential(*model[:3], again, model[3]), inputs)


def test_positions_of_a_case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    assert_products(model, torch.randn(6, 5, 3, dtype=torch.float64))


def test_other_models_are_no_chain_of_known_modules():
    linear = nn.Linear(3, 3)
    hooked = nn.Linear(3, 3)
    hooked.register_forward_hook(lambda _module, _args, out: 2 * out)
    others = (
        nn.Dropout(),  # the trace would belong to another draw
        nn.ReLU(inplace=True),  # overwrites the trace
        nn.BatchNorm1d(3),
        hooked,
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        linear,  # twice
    )
    assert find_chain(nn.Sequential(linear)) == (linear,)
    for other in others:
        assert find_chain(nn.Sequential(linear, other)) is None
