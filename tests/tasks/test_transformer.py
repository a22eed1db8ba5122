"""The network of the task char_transformer, and the task."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_dist.core.compute import BatchComputer
from kfac_dist.core.passes.distributions import get_distribution
from kfac_dist.data import fetch
from kfac_dist.errors import InvalidSpecError
from kfac_dist.tasks import build_model, check_model, load_task
from kfac_dist.tasks.transformer import CausalAttention, CharTransformer
from tests.data.small_sets import TEXT, write_text
from tests.tasks.specs import spec


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def network(**changes):
    sizes = {"context": 6, "width": 8, "num_heads": 2, "num_blocks": 2, "tie_weights": False}
    return CharTransformer(11, **(sizes | changes)).double()


CODES = torch.tensor([[1, 5, 2, 10, 0, 3], [4, 4, 7, 1, 9, 8]])


def test_the_module_names_say_what_a_layer_is():
    linear = [name for name, m in network().named_modules() if isinstance(m, nn.Linear)]

    block = ["attention.qkv", "attention.projection", "expand", "contract"]
    assert linear == [f"blocks.{i}.{name}" for i in (0, 1) for name in block] + ["output"]


def test_attention_is_torchs_own():
    attention = CausalAttention(8, 2, 1.0).double()
    inputs = torch.randn(3, 5, 8, dtype=torch.float64)
    reference = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        reference.in_proj_weight.copy_(attention.qkv.weight)
        reference.in_proj_bias.copy_(attention.qkv.bias.normal_())
        reference.out_proj.weight.copy_(attention.projection.weight)
        reference.out_proj.bias.copy_(attention.projection.bias.normal_())
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)

    expected, _ = reference(inputs, inputs, inputs, attn_mask=mask, need_weights=False)

    torch.testing.assert_close(attention(inputs), expected)


def test_a_prediction_sees_nothing_later():
    model = network()
    changed = CODES.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % 11

    before, after = model(CODES), model(changed)

    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.isclose(before[:, 3:], after[:, 3:]).all(dim=-1).any()


def test_shorter_sequences_than_the_context():
    model = network()

    torch.testing.assert_close(model(CODES[:, :4]), model(CODES)[:, :4])


def test_every_layer_has_one_input_row_a_case():
    model = network()
    rows = {}
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda m, args, out, n=name: rows.update({n: len(args[0])})
            )

    model(CODES)

    assert set(rows.values()) == {2}
    assert "position_embedding" in rows


def test_tied_weights_are_one_parameter():
    model = network(tie_weights=True)

    assert model.output.weight is model.token_embedding.weight
    assert "output.weight" not in dict(model.named_parameters())
    assert model(CODES).shape == (2, 6, 11)


@pytest.mark.parametrize("tie_weights", [False, True])
def test_the_first_guess_is_nearly_uniform(tie_weights):
    model = CharTransformer(
        65, context=32, width=64, num_heads=4, num_blocks=3, tie_weights=tie_weights
    )
    codes = torch.randint(65, (16, 33))

    logits = model(codes[:, :-1])

    assert F.cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten()).item() == pytest.approx(
        math.log(65) + 0.5, abs=0.3
    )


@pytest.mark.parametrize("tie_weights", [False, True])
def test_forward_mode_works(tie_weights):
    model = network(tie_weights=tie_weights)
    distribution = get_distribution("categorical")
    computer = BatchComputer(model, distribution=distribution, seed=0)
    base = nn.utils.parameters_to_vector(model.parameters()).detach()
    vectors = torch.randn(2, len(base), dtype=torch.float64)

    gram = computer.fisher_sums(CODES, vectors).gram

    step, outputs = 1e-6, []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(base + sign * step * vectors[1], model.parameters())
        with torch.no_grad():
            outputs.append(model(CODES))
    nn.utils.vector_to_parameters(base, model.parameters())
    with torch.no_grad():
        quotient = (outputs[0] - outputs[1]) / (2 * step)
        root = distribution.root_transpose_product(model(CODES), quotient)
    assert gram[1, 1].item() == pytest.approx(root.square().sum().item(), rel=1e-5)


def load(tmp_path, **args):
    write_text(tmp_path)
    small = {"context": 16, "width": 8, "num_heads": 2, "num_blocks": 1}
    job = spec("char_transformer", data={"name": "text"}, task_args=small | args, dtype="float64")
    return load_task(job, tmp_path, data_dir=tmp_path, cache_dir=tmp_path)


def test_model_and_data_fit_together(tmp_path):
    task = load(tmp_path)
    model = build_model(task, 0, torch.float64)

    check_model(task, model, task.train_data())
    check_model(task, model, task.test_data())
    assert task.distribution == "categorical"
    assert model.token_embedding.num_embeddings == len(set(TEXT))


def test_the_stride_is_of_the_training_windows_only(tmp_path):
    task, dense = load(tmp_path), load(tmp_path, stride=1)

    num_train = len(TEXT) - len(TEXT) // 10
    assert len(dense.train_data()) == num_train - 16
    assert len(task.train_data()) == (num_train - 1) // 16
    assert len(dense.test_data()) == len(task.test_data()) == (len(TEXT) // 10 - 1) // 16


def test_metrics_are_means_over_the_characters(tmp_path):
    task = load(tmp_path)
    _, targets = fetch(task.train_data(), torch.arange(3))
    outputs = torch.randn(3, 16, len(set(TEXT)), dtype=torch.float64)

    metrics = task.metrics(outputs, targets)

    losses = get_distribution("categorical").loss(outputs, targets)
    torch.testing.assert_close(metrics["nats_per_character"], losses / 16)
    right = (outputs.argmax(-1) == targets).sum(1) / 16
    torch.testing.assert_close(metrics["accuracy"], right.double())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"context": 0}, r"task_args\.context: 0 is not a whole number above 0"),
        ({"stride": 1.5}, r"task_args\.stride: 1\.5 is not a whole number"),
        ({"width": 9}, r"task_args\.width: 9 cannot be divided by num_heads, 2"),
        ({"num_blocks": True}, r"task_args\.num_blocks: True is not"),
        ({"tie_weights": "yes"}, r"task_args\.tie_weights: 'yes' is not true or false"),
        ({"heads": 2}, r"task_args\.heads: task char_transformer has no such argument"),
    ],
)
def test_mistakes_in_the_arguments(args, message, tmp_path):
    with pytest.raises(InvalidSpecError, match=message):
        load(tmp_path, **args)


def test_other_data_do_not_fit(tmp_path):
    with pytest.raises(InvalidSpecError, match=r"mnist does not fit this task, which takes text"):
        load_task(spec("char_transformer", data={"name": "mnist"}), tmp_path)
