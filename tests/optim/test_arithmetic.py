"""K-FAC works in full precision, and leaves the user's settings as they were."""

import threading

import pytest
import torch
from torch import nn

from kfac_dist import KFAC, KFACPreconditioner
from kfac_dist.optim.arithmetic import float32_precision, full_precision, in_full_precision

CPU = torch.device("cpu")
BACKENDS = (
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
    torch.backends.mkldnn.rnn,
)
INPUTS, TARGETS = torch.randn(64, 40), torch.randint(3, (64,))


def settings():
    return [backend.fp32_precision for backend in BACKENDS], torch.backends.fp32_precision


def ask_of_all():
    torch.set_float32_matmul_precision("medium")


def ask_of_cuda():
    torch.backends.cuda.matmul.allow_tf32 = True


def ask_of_cuda_by_the_new_name():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def ask_of_cpu():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def ask_of_every_backend():
    torch.backends.fp32_precision = "tf32"


@pytest.fixture
def restored():
    before = settings()
    yield
    torch.backends.fp32_precision = before[1]
    torch.set_float32_matmul_precision("highest")
    for backend, value in zip(BACKENDS, before[0], strict=True):
        backend.fp32_precision = value


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    "ask", [ask_of_all, ask_of_cuda, ask_of_cuda_by_the_new_name, ask_of_cpu, ask_of_every_backend]
)
def test_reduced_products_are_off_inside_and_restored_afterwards(ask):
    ask()
    before = settings()
    with full_precision(CPU):
        assert settings()[0] == ["ieee"] * len(BACKENDS)
        with full_precision(CPU):
            pass
        assert settings()[0] == ["ieee"] * len(BACKENDS)
    assert settings() == before


def test_nothing_is_set_if_nothing_is_reduced():
    before = settings()
    with full_precision(CPU):
        assert settings() == before


@pytest.mark.usefixtures("restored")
def test_the_last_thread_that_leaves_restores_the_setting():
    ask_of_all()
    before = settings()
    entered, may_leave = threading.Event(), threading.Event()

    def other():
        with full_precision(CPU):
            entered.set()
            assert may_leave.wait(30)

    thread = threading.Thread(target=other)
    with full_precision(CPU):
        thread.start()
        assert entered.wait(30)
    assert settings() != before
    may_leave.set()
    thread.join(30)
    assert settings() == before


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("ask", "recorded"),
    [
        (lambda: None, "highest"),
        (ask_of_all, "medium"),
        (ask_of_cpu, "mkldnn.matmul bf16"),
        (ask_of_cuda_by_the_new_name, "cuda.matmul tf32"),
    ],
)
def test_what_the_user_allows_is_named_for_the_records(ask, recorded):
    ask()
    assert float32_precision() == recorded


@pytest.mark.usefixtures("restored")
def test_a_decorated_method_works_in_full_precision_and_returns_its_result():
    class Worker:
        @in_full_precision
        def found(self, more, *, last):
            return [settings()[0], torch.is_autocast_enabled("cpu"), more, last]

    ask_of_all()
    before = settings()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Worker().found(1, last=2) == [["ieee"] * len(BACKENDS), False, 1, 2]
    assert settings() == before


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 3))


def serial():
    model = network()
    optimizer = KFAC(model, distribution="categorical", damping=1.0)
    results = [optimizer.step(INPUTS, TARGETS) for _ in range(3)]
    return [results, *(p.detach() for p in model.parameters())]


def factors_and_directions():
    model = network()
    preconditioner = KFACPreconditioner(model, distribution="categorical")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model(INPUTS).sum().mul(0).backward()
    preconditioner.step()
    return [None, *(p.grad for p in model.parameters())]


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("work", [serial, factors_and_directions])
def test_a_step_has_the_same_bits_whatever_the_process_allows(work):
    expected = work()
    ask_of_all()
    reduced = work()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = work() if work is serial else reduced
    for other in (reduced, cast):
        assert other[0] == expected[0]
        assert all(map(torch.equal, other[1:], expected[1:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_in_half_precision_are_converted(dtype):
    rounded, results = INPUTS.to(dtype), []
    for inputs in (rounded, rounded.float()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(KFAC(network(), distribution="categorical").step(inputs, TARGETS))
    assert results[0] == results[1]


class CastsItself(nn.Module):
    def __init__(self, *, returns_half=False):
        super().__init__()
        self.net = network()
        self.returns_half = returns_half

    def forward(self, inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = self.net(inputs)
        return outputs if self.returns_half else outputs.float()


def test_a_model_that_turns_autocast_on_itself_has_factors_in_full_precision():
    optimizer = KFAC(CastsItself(), distribution="categorical", statistics_fraction=1.0)
    plain = KFAC(network(), distribution="categorical", statistics_fraction=1.0)
    optimizer.step(INPUTS, TARGETS)
    plain.step(INPUTS, TARGETS)
    for name, factors in plain.factors.items():
        seen = optimizer.factors[f"net.{name}"]
        assert seen.A.dtype == seen.G.dtype == torch.float32
        torch.testing.assert_close(seen.A, factors.A, rtol=0.02, atol=0.02)


def test_outputs_in_half_precision_are_refused():
    model = CastsItself(returns_half=True)
    with pytest.raises(ValueError, match=r"CastsItself returned outputs in torch.bfloat16.*float"):
        KFAC(model, distribution="categorical").step(INPUTS, TARGETS)
    preconditioner = KFACPreconditioner(model, distribution="categorical")
    nn.functional.cross_entropy(model(INPUTS).float(), TARGETS).backward()
    with pytest.raises(ValueError, match="although autocast was off"):
        preconditioner.step()
