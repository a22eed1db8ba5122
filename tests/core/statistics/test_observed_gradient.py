"""Uses of a weight that calls do not show, and calls that are no part of the loss."""

import pytest
import torch
import torch.nn.functional as F

from kfac_dist import KFAC, KFACPreconditioner
from kfac_dist.config import kfac_settings
from kfac_dist.core.blocks.registration import register
from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.passes.distributions import get_distribution
from kfac_dist.errors import InvalidSpecError
from tests.core.passes.used_twice import USES, Jacobian, Lazy, Routed, Slope, Twice


def computer_of(model, **options):
    settings = kfac_settings(options)
    return BatchComputer(
        model,
        distribution=get_distribution("categorical"),
        seed=0,
        registration=register(model, settings),
        fisher_type=settings.fisher_type,
    )


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_second_use_is_refused_by_name_and_right_as_diagonal(use, dtype):
    torch.manual_seed(0)
    model, name, inputs = USES[use]()
    model, inputs = model.to(dtype), inputs.to(dtype) if inputs.is_floating_point() else inputs
    with pytest.raises(InvalidSpecError, match=rf"{name}.* diagonal: \[{name}"):
        computer_of(model).statistics(inputs, None, step=1)
    names = [n for n, _ in model.named_parameters()]
    computer = computer_of(model, diagonal=names, fisher_type="exact")
    found = computer.statistics(inputs, None, step=1).factors[name].M.reshape(-1)
    assert torch.allclose(found, slow_diagonal(model, name, inputs), rtol=1e-3)


def slow_diagonal(model, name, inputs):
    """Return the diagonal of the sum over cases of the Fisher, class by class."""
    parameter = dict(model.named_parameters())[name]
    total = torch.zeros_like(parameter)
    for case in inputs.split(1):
        outputs = model(case)
        log = outputs.log_softmax(-1)
        flat = log.reshape(-1, log.shape[-1])
        weights = flat.exp().detach()
        # Positions are independent, so squares of single positions add up, and cross terms vanish.
        for position in range(len(flat)):
            for label in range(flat.shape[1]):
                (g,) = torch.autograd.grad(flat[position, label], parameter, retain_graph=True)
                total += weights[position, label] * g.square()
    return total.detach().reshape(-1)


@pytest.mark.parametrize("optimizer", [KFAC, KFACPreconditioner])
def test_both_optimizers_refuse_it(optimizer):
    model, name, inputs = USES["output by the embedding"]()
    made = optimizer(model, distribution="categorical", class_axis=-1)
    model(inputs).sum().backward()
    batch = (inputs, torch.randint(7, inputs.shape)) if optimizer is KFAC else ()
    with pytest.raises(InvalidSpecError, match=name):
        made.step(*batch)


def test_a_use_that_has_no_derivative_at_first_is_found_later():
    model = Twice(lambda m, h: h + m.gate * F.linear(h, m.hidden.weight))
    model.gate = 0.0
    computer, inputs = computer_of(model), torch.randn(12, 4)
    computer.statistics(inputs, None, step=1)
    model.gate = 1.0
    with pytest.raises(InvalidSpecError, match=r"hidden\.weight"):
        computer.statistics(inputs, None, step=2)


def factors_of(forward, weight_sharing="expand"):
    torch.manual_seed(0)
    model = Twice(forward)
    computer = computer_of(model, weight_sharing=weight_sharing)
    return computer.statistics(torch.randn(12, 4), None, step=1).factors["hidden"]


def outside_the_graph(model, h):
    with torch.no_grad():
        model.hidden(5 * h)
    return h


IDLE_CALLS = {
    "under no_grad": outside_the_graph,
    "detached": lambda model, h: h + 0 * model.hidden(5 * h).detach(),
    "not used": lambda model, h: (model.hidden(5 * h), h)[1],
    "no rows": lambda model, h: h + model.hidden(h[:0]).sum(),
}


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", IDLE_CALLS)
def test_calls_that_are_no_part_of_the_loss_do_not_count(name, weight_sharing):
    expected = factors_of(lambda model, h: h, weight_sharing)
    found = factors_of(IDLE_CALLS[name], weight_sharing)
    assert torch.equal(found.A, expected.A)
    assert torch.equal(found.G, expected.G)


@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal", "ekfac"])
def test_an_expert_without_tokens_is_a_layer_without_statistics(inverse):
    torch.manual_seed(0)
    model = Routed()
    optimizer = KFAC(model, distribution="categorical", inverse=inverse, inverse_update_period=1)
    inputs, targets = torch.randn(24, 4), torch.randint(3, (24,))
    for step in range(5):
        model.used = step % 2  # one expert, then the other
        assert optimizer.step(inputs, targets).applied
    model.used = 1
    factors = optimizer._computer.statistics(inputs, None, step=9).factors
    assert not factors["experts.0"].A.any()
    assert factors["experts.1"].A.any()


def test_reduce_refuses_an_expert_whose_cases_are_not_known_by_name():
    torch.manual_seed(0)
    model = Routed()
    optimizer = KFAC(model, distribution="categorical", weight_sharing="reduce")
    inputs, targets = torch.randn(24, 4), torch.randint(3, (24,))
    assert optimizer.step(inputs, targets).applied  # the other expert has no rows
    model.used = 1
    with pytest.raises(InvalidSpecError, match=r"layer experts\.1: .*weight_sharing: reduce"):
        optimizer._computer.statistics(inputs, None, step=2)


def test_a_hook_that_changes_the_output_counts_as_what_follows_the_layer():
    torch.manual_seed(0)
    model = Twice(lambda model, h: h)
    inputs = torch.randn(12, 4)
    model.hidden.register_forward_hook(lambda module, args, out: 2 * out)
    found = computer_of(model).statistics(inputs, None, step=1).factors["hidden"]
    model.hidden._forward_hooks.clear()
    model.forward = lambda x: model.out(
        torch.tanh(2 * model.hidden(model.norm(torch.tanh(model.first(x)))))
    )
    expected = computer_of(model).statistics(inputs, None, step=1).factors["hidden"]
    assert torch.allclose(found.A, expected.A)
    assert torch.allclose(found.G, expected.G)


class Peeks(torch.nn.Module):
    """Calls its layer with the positions first, for nothing, and then with the cases first."""

    def __init__(self, peeks):
        super().__init__()
        self.layer, self.peeks = torch.nn.Linear(4, 3), peeks

    def forward(self, x):
        if self.peeks:
            with torch.no_grad():
                self.layer(x.transpose(0, 1))
        return self.layer(x)


def test_the_axes_of_a_call_are_its_own_if_calls_before_it_do_not_count():
    inputs, found = torch.randn(6, 5, 4), []
    for peeks in (False, True):
        torch.manual_seed(0)
        computer = computer_of(Peeks(peeks), weight_sharing="reduce")
        found.append(computer.statistics(inputs, None, step=1).factors["layer"])
    assert torch.equal(found[0].A, found[1].A)
    assert torch.equal(found[0].G, found[1].G)


def test_gradients_that_hooks_rescale_are_not_taken_for_other_uses():
    model = Twice(lambda model, h: h)
    model.hidden.weight.register_hook(lambda gradient: 0.5 * gradient)
    computer_of(model).statistics(torch.randn(12, 4), None, step=1)


def test_a_model_of_derivatives_trains_with_diagonal_blocks_however_it_is_written():
    """Fisher products, measured losses and blocks are those of the same function."""
    ends = []
    for kind in (Slope, Jacobian, Lazy):
        torch.manual_seed(0)
        model = kind().double()
        damping = {"initial": 1.0, "adapt_period": 1}
        optimizer = KFAC(model, distribution="gaussian", diagonal=["*"], damping=damping)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            inputs, targets = torch.randn(2, 16, 4, generator=generator, dtype=torch.float64)
            result = optimizer.step(inputs, targets)
            assert result.applied
            assert result.reduction_ratio is not None
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.allclose(ends[0], ends[1], rtol=1e-9)
    assert torch.allclose(ends[0], ends[2], rtol=1e-9)


def test_layers_inside_a_transform_of_torch_func_are_refused_by_name():
    with pytest.raises(InvalidSpecError, match=r"first\.weight.* inside torch\.func"):
        computer_of(Jacobian()).statistics(torch.randn(8, 4), None, step=1)
