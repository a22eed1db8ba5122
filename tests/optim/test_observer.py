"""Which passes the preconditioner takes, what it keeps of them, and when it lets go."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kfac_dist import KFAC, KFACPreconditioner
from kfac_dist.errors import InvalidSpecError
from kfac_dist.optim import observer as observer_module
from kfac_dist.optim.call_statistics import statistics_of_calls

INPUTS, TARGETS = torch.randn(32, 6), torch.randint(3, (32,))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def preconditioner_for(model, **options):
    options = {"distribution": "categorical", "statistics_fraction": 1.0} | options
    return KFACPreconditioner(model, **options)


def backward(model, inputs=INPUTS):
    nn.functional.cross_entropy(model(inputs), TARGETS[: len(inputs)]).backward()


def mean_square(preconditioner):
    """The mean square of the inputs that the factor A of the first layer was made of."""
    diagonal = preconditioner._curvature.averages.pair("0").A.diagonal()
    return float(diagonal[:-1].mean())


def expected_square(*batches):
    return pytest.approx(float(torch.cat(batches).square().mean()), rel=1e-5)


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


def watched(preconditioner):
    """Return a list that gets a weak reference to whatever is kept of an input from now on."""
    keep, kept = preconditioner._observer._keep, []

    def and_note(*call):
        rows = keep(*call)
        kept.append(weakref.ref(rows))
        return rows

    preconditioner._observer._keep = and_note
    return kept


@pytest.mark.usefixtures("no_collector")
def test_an_abandoned_preconditioner_leaves_nothing_behind():
    model = network()
    first = preconditioner_for(model)
    backward(model)
    kept = weakref.ref(first._observer._passes[0].inputs)
    observer = weakref.ref(first._observer)
    del first
    assert observer() is None
    assert kept() is None
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_it_ends_with_remove_or_with_its_block():
    model = network()
    with preconditioner_for(model) as preconditioner:
        backward(model)
        preconditioner.step()
        backward(model)
    assert not model._forward_pre_hooks
    assert not preconditioner._observer.num_passes
    with pytest.raises(InvalidSpecError, match="its hooks were removed"):
        preconditioner.step()
    preconditioner.remove()


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "make_copy",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "save"],
)
def test_a_copy_of_the_model_is_not_observed(make_copy):
    model = network()
    preconditioner = preconditioner_for(model)
    duplicate = make_copy(model)
    backward(duplicate)
    assert not preconditioner._observer.num_forward
    assert not duplicate._forward_pre_hooks
    assert not duplicate._forward_hooks
    second = make_copy(model)
    own = preconditioner_for(second)
    assert len(second._forward_hooks) == 1, "the idle hook of the copy has made way"
    backward(second)
    own.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_the_preconditioner_itself_is_not_copied(copied):
    with pytest.raises(InvalidSpecError, match="cannot be copied or pickled"):
        copied(preconditioner_for(network()))


def test_no_preconditioner_sees_passes_of_k_fac():
    model = network()
    first, second = preconditioner_for(model), preconditioner_for(model)
    backward(model)
    second.step()
    serial = KFAC(model, distribution="categorical")
    serial.step(INPUTS, TARGETS)
    assert (first._observer.num_forward, first._observer.num_passes) == (1, 1)
    for parameter in model.parameters():
        parameter.grad = parameter.grad.clone()  # a new gradient, not the direction of `second`
    first.step()
    assert mean_square(first) == mean_square(second) == expected_square(INPUTS)


def test_a_pass_without_backward_is_forgotten_with_its_graph():
    model = network()
    preconditioner = preconditioner_for(model)
    kept = watched(preconditioner)
    validation = model(1000 * INPUTS)
    backward(model)
    del validation
    assert kept[0]() is None
    assert kept[1]() is not None
    preconditioner.step()
    assert mean_square(preconditioner) == expected_square(INPUTS)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_passes_whose_gradients_were_cleared_do_not_count(set_to_none):
    model = network()
    preconditioner = preconditioner_for(model)
    backward(model, 1000 * INPUTS)
    backward(model, 1000 * INPUTS)
    model.zero_grad(set_to_none=set_to_none)
    backward(model)
    backward(model, 2 * INPUTS)
    preconditioner.step()
    assert mean_square(preconditioner) == expected_square(INPUTS, 2 * INPUTS)


def test_one_backward_pass_of_two_forward_passes_takes_both():
    model = network()
    preconditioner = preconditioner_for(model)
    losses = [
        nn.functional.cross_entropy(model(inputs), TARGETS) for inputs in (INPUTS, 3 * INPUTS)
    ]
    sum(losses).backward()
    preconditioner.step()
    assert mean_square(preconditioner) == expected_square(INPUTS, 3 * INPUTS)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_pass_counts_once(reentrant):
    model = network()
    preconditioner = preconditioner_for(model)
    inputs = INPUTS.clone().requires_grad_()
    outputs = checkpoint(model, inputs, use_reentrant=reentrant)
    nn.functional.cross_entropy(outputs, TARGETS).backward()
    assert preconditioner._observer.num_passes == 1


def test_passes_in_function_transforms_are_not_observed():
    model = network()
    preconditioner = preconditioner_for(model)

    def loss(parameters):
        outputs = torch.func.functional_call(model, parameters, (INPUTS,))
        return nn.functional.cross_entropy(outputs, TARGETS)

    torch.func.grad(loss)(dict(model.named_parameters()))
    assert not preconditioner._observer.num_forward


class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 1)

    def forward(self, inputs):
        return self.linear(inputs).squeeze(1)


def test_outputs_that_are_overwritten_are_still_those_of_the_pass():
    model = Squeezed()
    preconditioner = preconditioner_for(model, distribution="bernoulli")
    outputs = model(INPUTS)
    outputs += 1.0
    outputs.sum().backward()
    assert preconditioner._observer.num_passes == 1


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_loop_may_refill_its_buffer(fraction):
    model = network()
    preconditioner = preconditioner_for(model, statistics_fraction=fraction)
    batches = [torch.randn(32, 6) * scale for scale in (1, 2, 3)]
    buffer = torch.empty(32, 6)
    for batch in batches:
        buffer.copy_(batch)
        backward(model, buffer)
    buffer.fill_(1000.0)
    preconditioner.step()
    step = round(1 / fraction)
    assert mean_square(preconditioner) == expected_square(*(batch[::step] for batch in batches))


class Scaling(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, inputs):
        return self.linear(inputs.div_(255))


def test_a_model_that_changes_its_input_is_refused():
    model = Scaling()
    with preconditioner_for(model), pytest.raises(InvalidSpecError, match="Scaling changed its in"):
        model(INPUTS.clone())
    before = copy.deepcopy(model.state_dict())
    optimizer = KFAC(model, distribution="categorical")
    with pytest.raises(InvalidSpecError, match=r"Scaling changed its input in place.*x\.clone"):
        optimizer.step(INPUTS.clone(), TARGETS)
    assert optimizer.step_count == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_passes_without_a_step_are_kept_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(observer_module, "_MOST_PASSES", 3)
    model = network()
    preconditioner = preconditioner_for(model)
    backward(model)
    backward(model)
    with pytest.warns(UserWarning, match="3 backward passes since the last step"):
        backward(model)
    backward(model, 1000 * INPUTS)
    preconditioner.step()
    assert mean_square(preconditioner) == expected_square(INPUTS)


def test_a_kept_graph_does_not_keep_the_inputs():
    model = network()
    preconditioner = preconditioner_for(model)
    loss = nn.functional.cross_entropy(model(INPUTS), TARGETS)
    loss.backward(retain_graph=True)
    kept = weakref.ref(preconditioner._observer._passes[0].inputs)
    preconditioner.step()
    assert kept() is None
    assert loss.grad_fn is not None


def test_inputs_in_half_precision_are_seen_in_that_of_the_parameters():
    model, other = network(), network()
    rounded = INPUTS.bfloat16()
    preconditioner, plain = preconditioner_for(model), preconditioner_for(other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(rounded), TARGETS)
    loss.backward()
    backward(other, rounded.float())
    preconditioner.step()
    plain.step()
    for seen, expected in zip(
        preconditioner._curvature.averages.pair("2").tensors().values(),
        plain._curvature.averages.pair("2").tensors().values(),
        strict=True,
    ):
        assert torch.equal(seen, expected)


def test_steps_without_backward_or_cases_say_so():
    model = network()
    preconditioner = preconditioner_for(model, factor_update_period=10)
    outputs = model(INPUTS)
    with pytest.raises(InvalidSpecError, match="no backward pass since the last step went through"):
        preconditioner.step()
    del outputs
    model(INPUTS[:0]).sum().backward()
    with pytest.raises(InvalidSpecError, match="have no cases; step 1 needs at least one"):
        preconditioner.step()
    assert preconditioner.step_count == 0
    for _ in range(4):
        model.zero_grad()
        backward(model)
        preconditioner.step()
    assert not preconditioner._observer.num_passes, "step 5 needs no statistics"
    model.zero_grad()
    with pytest.raises(InvalidSpecError, match="no parameter has a gradient in step 5"):
        preconditioner.step()


def test_directions_are_not_preconditioned_again():
    model = network()
    first, second = (preconditioner_for(model, factor_update_period=10) for _ in range(2))
    for _ in range(3):  # later steps need no statistics
        model.zero_grad()
        backward(model)
        copies = [parameter.grad.clone() for parameter in model.parameters()]
        first.step()
        for parameter, gradient in zip(model.parameters(), copies, strict=True):
            parameter.grad = gradient
        second.step()
    model.zero_grad()
    backward(model)
    first.step()
    for again in (first, second):
        with pytest.raises(InvalidSpecError, match="the gradients are directions already"):
            again.step()
    backward(model)
    first.step()
    assert (first.step_count, second.step_count) == (5, 3)


def test_other_parts_of_a_buffer_may_be_filled_during_a_pass():
    ring = torch.randn(2, 32, 6)

    class Filling(nn.Linear):
        def forward(self, inputs):
            ring[1] = 0.0
            return super().forward(inputs)

    model = Filling(6, 3)
    preconditioner = preconditioner_for(model)
    backward(model, ring[0])
    assert preconditioner._observer.num_passes == 1


def test_a_process_without_a_pass_takes_part_with_zeros():
    preconditioner = preconditioner_for(network())
    statistics, num_cases = statistics_of_calls(
        preconditioner._computer, preconditioner._curvature, [], step=1, place=(0, 1)
    )
    assert num_cases == 0
    assert not any(tensor.any() for tensor in statistics.tensors())


def test_an_input_without_axes_is_refused():
    model = network()
    with preconditioner_for(model), pytest.raises(InvalidSpecError, match="no axis 0 of cases"):
        model(torch.tensor(1.0))
