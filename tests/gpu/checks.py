"""The checks of `make test-gpu`. Each runs on any device, so the CPU can try the code of all."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kfac_dist import KFAC
from kfac_dist.core.factors import KroneckerPair
from kfac_dist.core.inverse.damped import invert_pair
from kfac_dist.core.inverse.ekfac import eigen_inverse
from tests.gpu.host_reads import host_reads
from workers.exchange.host_copies import HostCopies

CPU = torch.device("cpu")
INVERSES = ("block_diagonal", "block_tridiagonal", "ekfac")


class Table(NamedTuple):
    """A table of results; all its cells are text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def parity(device: torch.device, tolerance: float = 1e-4) -> Table:
    """Check that directions on `device` are those of the CPU, although TF32 is allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rows = [(inverse, f"{_direction_error(inverse, device):.1e}") for inverse in INVERSES]
    finally:
        torch.set_float32_matmul_precision(before)
    for inverse, error in rows:
        assert float(error) <= tolerance, f"{inverse}: directions differ by {error}"
    return Table(f"Directions against those of the CPU, at most {tolerance:g}", ("", ""), rows)


def _direction_error(inverse: str, device: torch.device) -> float:
    """Return the largest relative difference of a layer's direction in the Frobenius norm."""
    expected, found = _directions(inverse, CPU), _directions(inverse, device)
    return max(
        float((found[name].cpu() - value).norm() / value.norm()) for name, value in expected.items()
    )


def _directions(inverse: str, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    sizes = (64, 48, 32, 10)
    model = _network(sizes).to(device)
    inputs = torch.randn(512, sizes[0], generator=generator)
    targets = torch.randint(sizes[-1], (512,), generator=generator)
    # Sampled targets would differ: each device has random numbers of its own.
    optimizer = KFAC(
        model, distribution="categorical", fisher_type="exact", inverse=inverse, damping=1.0
    )
    optimizer.step(inputs.to(device), targets.to(device))
    gradients = {
        name: torch.randn(len(pair.G), len(pair.A), generator=generator).to(device)
        for name, pair in optimizer.factors.items()
    }
    return optimizer.precondition(gradients)


def _network(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise(sizes):
        layers += [nn.Linear(width, next_width), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def reads(device: torch.device, most: int) -> Table:
    """Check that a step reads numbers at most `most` times, and none for each layer.

    On a GPU the copies to the host are counted, by the profiler, and also those without a read of
    ours.
    """
    counts = {depth: _reads_of_a_step(device, depth) for depth in (2, 6)}
    assert len(set(counts.values())) == 1, f"each layer costs a copy to the host: {counts}"
    assert max(counts.values()) <= most, f"{counts} copies to the host in a step, not {most}"
    rows = [(str(depth), str(count)) for depth, count in counts.items()]
    return Table("Copies to the host in a step", ("layers", "copies"), rows)


def _reads_of_a_step(device: torch.device, depth: int) -> int:
    torch.manual_seed(0)
    model = _network([16] * (depth + 1)).to(device)
    optimizer = KFAC(
        model,
        distribution="gaussian",
        inverse_update_period=1000,
        damping={"initial": 1.0, "adapt_period": 1000},
        gamma={"adapt_period": None},
    )
    inputs, targets = (torch.randn(256, 16, device=device) for _ in range(2))
    steps = 9  # the first ones refresh the inverses, and up to the eighth some are checked
    for _ in range(steps):
        optimizer.step(inputs, targets)
    if device.type == "cpu":
        with host_reads() as found:
            optimizer.step(inputs, targets)
        return found.total()
    torch.cuda.synchronize(device)
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        optimizer.step(inputs, targets)
        torch.cuda.synchronize(device)
    return sum("Memcpy DtoH" in event.name for event in profile.events())


def poisoned_copies(device: torch.device, num_elements: int = 1 << 22) -> Table:
    """Check copies to the host that are never mixed with those before or with what comes after.

    Buffers are filled with NaN once they were read, and the memory of a tensor is given to another
    one of NaN as soon as its copy has been started.
    """
    copies = HostCopies(device)
    num_copies, started = 8, time.perf_counter()
    ahead = None
    for number in range(num_copies + 1):
        behind = ahead
        if number < num_copies:
            tensor = torch.full((num_elements,), float(number), device=device)
            ahead = copies.start([tensor, tensor[:3].double()])
            del tensor
            torch.full((num_elements,), math.nan, device=device)  # takes its memory, if it can
        if behind is None:
            continue
        whole, part = behind.arrays()
        assert (whole == number - 1).all(), f"copy {number - 1} has other values"
        assert (part == number - 1).all()
        if device.type == "cuda":
            whole[:], part[:] = math.nan, math.nan
        behind.release()
    milliseconds = 1e3 * (time.perf_counter() - started) / num_copies
    row = (f"{4 * num_elements / 2**20:.1f}", f"{milliseconds:.1f}")
    return Table("Copies with poisoned buffers", ("MiB", "ms each, with the checks"), [row])


def phases(
    device: torch.device, sizes: Sequence[int] = (784, 1000, 500, 250, 30), batch_size: int = 4000
) -> Table:
    """Time the phases of a step of the paper's autoencoder, of which `sizes` is one half."""
    torch.manual_seed(0)
    model = _network((*sizes, *reversed(sizes[:-1]))).to(device)
    optimizer = KFAC(model, distribution="bernoulli", damping=1.0, max_factor_dim=None)
    inputs = torch.rand(batch_size, sizes[0], device=device)
    targets = (inputs > 0.5).float()
    optimizer.step(inputs, targets)
    computer, curvature = optimizer._computer, optimizer._curvature
    gradient = {
        name: torch.randn(len(pair.G), len(pair.A), device=device)
        for name, pair in optimizer.factors.items()
    }
    vector = torch.randn(sum(p.numel() for p in model.parameters()), device=device)
    calls: dict[str, Callable[[], object]] = {
        "gradient": lambda: computer.gradient(inputs, targets),
        "statistics of the whole batch": lambda: computer.statistics(inputs, targets, step=2),
        "inverses of all layers": lambda: curvature.invert([1.0]),
        "precondition": lambda: optimizer.precondition(gradient),
        "Fisher products with two vectors": lambda: computer.fisher_sums(inputs, [vector, vector]),
        "a step with inverses": lambda: optimizer.step(inputs, targets),
    }
    rows = [(name, f"{_milliseconds(call, device):.2f}") for name, call in calls.items()]
    shape = "-".join(map(str, sizes))
    return Table(f"Phases, autoencoder {shape}, batch {batch_size}", ("phase", "ms"), rows)


def inversions(device: torch.device, orders: Sequence[int] = (256, 512, 1024, 2048, 4096)) -> Table:
    """Time the inversion of one factor on the CPU and on `device`, by Cholesky and by eigh."""
    rows = []
    for order in orders:
        cells = [str(order)]
        for place in (CPU, device):
            pair = _factors(order, place)
            for invert in (invert_pair, eigen_inverse):
                call = _call(invert, pair)
                cells.append(f"{_milliseconds(call, place, repeats=3):.2f}")
        rows.append(tuple(cells))
    columns = ("order", "Cholesky, CPU", "eigh, CPU", f"Cholesky, {device}", f"eigh, {device}")
    return Table("One dense factor, ms", columns, rows)


def _call(invert: Callable[..., object], pair: KroneckerPair) -> Callable[[], object]:
    return lambda: invert(pair, 1.0)


def _factors(order: int, device: torch.device) -> KroneckerPair:
    """Return a factor of this order, and one of order 1, which costs nothing."""
    rows = torch.randn(2 * order, order, generator=torch.Generator().manual_seed(0))
    factor = (rows.T @ rows / len(rows)).to(device)
    return KroneckerPair(A=factor, G=torch.ones(1, 1, device=device))


def _milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the median time of a call; the first one is left out."""
    seconds = []
    for _ in range(repeats + 1):
        _wait_for(device)
        started = time.perf_counter()
        call()
        _wait_for(device)
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
