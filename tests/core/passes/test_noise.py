import torch

from kfac_dist.core.passes.noise import keyed_noise, permutation

LIKE = torch.zeros((), dtype=torch.float64)


def noise(kind="normal", *, seed=1, step=1, rows=range(200), shape=(3,), like=LIKE):
    return keyed_noise(kind, seed=seed, step=step, rows=rows, shape=shape, like=like)


def test_permutation_holds_each_case_once():
    order = permutation(3, 0, 101)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(101))


def test_permutation_depends_on_seed_and_epoch_alone():
    assert torch.equal(permutation(3, 2, 50), permutation(3, 2, 50))
    assert not torch.equal(permutation(3, 2, 50), permutation(3, 3, 50))
    assert not torch.equal(permutation(3, 2, 50), permutation(4, 2, 50))


def test_noise_depends_on_seed_and_step():
    assert torch.equal(noise(), noise())
    assert not torch.equal(noise(), noise(seed=2))
    assert not torch.equal(noise(), noise(step=2))


def test_noise_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    noise()
    permutation(1, 1, 10)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_noise_has_the_shape_and_dtype_asked_for():
    drawn = noise(rows=range(5, 70), shape=(2, 4), like=torch.zeros(1))
    assert drawn.shape == (65, 2, 4)
    assert drawn.dtype == torch.float32
    assert noise(rows=range(5, 5)).shape == (0, 3)


def test_rows_differ():
    assert len(torch.unique(noise(shape=()))) == 200
    assert len(torch.unique(noise("uniform", shape=()))) == 200


def test_uniform_noise_is_uniform_and_normal_noise_normal():
    uniform = noise("uniform", rows=range(20_000))
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean().item() - 0.5) < 0.01
    assert abs(uniform.var().item() - 1 / 12) < 0.002
    normal = noise("normal", rows=range(20_000))
    assert abs(normal.mean().item()) < 0.02
    assert abs(normal.var().item() - 1) < 0.03
    neighbours = (normal[1:, 0] * normal[:-1, 0]).mean().item()
    assert abs(neighbours) < 0.03
