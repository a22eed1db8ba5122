"""Models of transformers: their curvature is that of a module that takes one tensor."""

import copy

import pytest
import torch
from torch import nn

from kfac_dist import KFACPreconditioner
from kfac_dist.config import kfac_settings
from kfac_dist.core.blocks.layer_rules import rule_for
from kfac_dist.core.blocks.registration import register
from kfac_dist.errors import InvalidSpecError

pytest.importorskip("transformers", reason="needs the extra integrations")

import transformers as hf
from transformers.pytorch_utils import Conv1D

from kfac_dist.integrations.transformers import preconditioner_for
from kfac_dist.optim.call_statistics import statistics_of_calls

OPTIONS = {"damping": 0.1, "statistics_fraction": 1.0, "fisher_type": "exact"}
VOCABULARY, WIDTH, CASES, LENGTH = 11, 8, 3, 4

GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": LENGTH,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
BERT = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": LENGTH,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3,
}  # fmt: skip
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 12,
    "max_position_embeddings": LENGTH, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VIT = {
    "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 12, "image_size": 4, "patch_size": 2, "num_channels": 1,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 4, "d_ff": 12, "num_layers": 1,
    "num_decoder_layers": 1, "num_heads": 2, "dropout_rate": 0.0, "pad_token_id": 0,
    "decoder_start_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def built(kind, config):
    torch.manual_seed(0)
    return kind(config).double()


def gpt2(kind=hf.GPT2LMHeadModel, **changes):
    return built(kind, hf.GPT2Config(**GPT2 | changes))


def tokens(length=LENGTH):
    return torch.randint(1, VOCABULARY, (CASES, length), generator=torch.Generator().manual_seed(1))


def positions(length=LENGTH):
    # One row a case: an exact Fisher needs the derivatives of each.
    return torch.arange(length).expand(CASES, -1)


class OneTensor(nn.Module):
    """The reference: the model as a function of one tensor."""

    def __init__(self, model, call):
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, inputs):
        return self.call(self.model, inputs)


def check(model, call, one_tensor, parts, distribution="categorical", fisher_type="exact"):
    """The directions after `call(model)` are those after `one_tensor(model, part)` for all parts.

    The gradients are drawn, so this is about the curvature alone.
    """
    reference = copy.deepcopy(model)
    wrapped = OneTensor(reference, one_tensor)
    options = OPTIONS | {"fisher_type": fisher_type}
    class_axis = -1 if distribution == "categorical" else None
    expected_by = KFACPreconditioner(
        wrapped, distribution=distribution, class_axis=class_axis, **options
    )
    seen_by = preconditioner_for(model, **options)
    for part in parts:
        wrapped(part).sum().backward()
    call(model).logits.sum().backward()
    torch.manual_seed(3)
    pairs = list(zip(model.named_parameters(), reference.parameters(), strict=True))
    for (_, parameter), other in pairs:
        parameter.grad = torch.randn_like(parameter)
        other.grad = parameter.grad.clone()
    expected_by.step()
    seen_by.step()
    for (name, parameter), other in pairs:
        assert torch.isfinite(other.grad).all()
        torch.testing.assert_close(parameter.grad, other.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_gpt2_is_the_function_of_its_tokens():
    ids, where = tokens(), positions()
    check(
        gpt2(),
        lambda m: m(input_ids=ids, position_ids=where, labels=ids),
        lambda m, x: m(input_ids=x, position_ids=where[: len(x)]).logits[:, :-1],
        [ids],
    )


def test_llama_is_the_function_of_its_tokens():
    ids = tokens()
    check(
        built(hf.LlamaForCausalLM, hf.LlamaConfig(**LLAMA)),
        lambda m: m(ids, labels=ids),
        lambda m, x: m(x).logits[:, :-1],
        [ids],
    )


@pytest.mark.parametrize(
    ("problem", "distribution"),
    [
        (None, "categorical"),
        ("regression", "gaussian"),
        ("multi_label_classification", "bernoulli"),
    ],
)
def test_bert_is_the_function_of_its_tokens(problem, distribution):
    ids, where = tokens(), positions()
    config = hf.BertConfig(**BERT, problem_type=problem)
    check(
        built(hf.BertForSequenceClassification, config),
        lambda m: m(ids, position_ids=where),
        lambda m, x: m(x, position_ids=where[: len(x)]).logits,
        [ids],
        distribution,
    )


def test_vit_is_the_function_of_its_pixels():
    pixels = torch.randn(CASES, 1, 4, 4, dtype=torch.float64)
    check(
        built(hf.ViTForImageClassification, hf.ViTConfig(**VIT)),
        lambda m: m(pixel_values=pixels, labels=torch.tensor([0, 1, 2])),
        lambda m, x: m(pixel_values=x).logits,
        [pixels],
    )


def test_t5_takes_the_inputs_of_its_decoder_from_the_labels():
    ids, labels = tokens(), tokens(3)
    check(
        built(hf.T5ForConditionalGeneration, hf.T5Config(**T5)),
        lambda m: m(input_ids=ids, labels=labels),
        lambda m, x: (
            m(
                input_ids=x[:, :LENGTH],
                decoder_input_ids=torch.nn.functional.pad(x[:, LENGTH:-1], (1, 0)),
            ).logits
        ),
        [torch.cat([ids, labels], dim=1)],
        fisher_type="mc",  # position biases are the same for all cases
    )


LENGTHS = [2, 4, 3]
MASK = (torch.arange(LENGTH) < torch.tensor(LENGTHS).unsqueeze(1)).long()


def cases_of(ids, lengths=LENGTHS):
    """The cases one by one, without their padding."""
    return [ids[n : n + 1, :length] for n, length in enumerate(lengths)]


def test_padding_has_no_part_in_the_curvature():
    ids, where = tokens() * MASK, positions()
    labels = ids.masked_fill(MASK == 0, -100)
    check(
        gpt2(),
        lambda m: m(input_ids=ids, attention_mask=MASK, position_ids=where, labels=labels),
        lambda m, x: m(input_ids=x, position_ids=where[:1, : x.shape[1]].expand(len(x), -1)).logits[
            :, :-1
        ],
        cases_of(ids),
    )


def test_padding_of_a_classifier_has_no_part_in_the_curvature():
    ids, where = tokens() * MASK, positions()[:1]
    check(
        built(hf.BertForSequenceClassification, hf.BertConfig(**BERT)),
        lambda m: m(ids, MASK, position_ids=where.expand(CASES, -1)),
        lambda m, x: m(x, position_ids=where[:, : x.shape[1]].expand(len(x), -1)).logits,
        cases_of(ids),
    )


def test_padding_on_both_sides_of_t5():
    ids, labels = tokens() * MASK, tokens(3)
    labels[0, 1:] = -100
    check(
        built(hf.T5ForConditionalGeneration, hf.T5Config(**T5)),
        lambda m: m(input_ids=ids, attention_mask=MASK, labels=labels),
        lambda m, x: m(input_ids=x[0], decoder_input_ids=x[1]).logits,
        # Sampled targets depend on the place, and the shortest come first.
        [
            (case, nn.functional.pad(label[label >= 0][:-1], (1, 0)).unsqueeze(0))
            for case, label in sorted(
                zip(cases_of(ids), labels, strict=True), key=lambda pair: pair[0].shape[1]
            )
        ],
        fisher_type="mc",
    )


def test_positions_without_a_label_have_no_derivative():
    ids, where = tokens(), positions()
    labels = ids.clone()
    labels[:, :2] = -100  # as for a prompt: only the last two tokens are learned
    check(
        gpt2(),
        lambda m: m(input_ids=ids, position_ids=where, labels=labels),
        lambda m, x: m(input_ids=x, position_ids=where[: len(x)]).logits[:, 1:-1],
        [ids],
    )


def test_a_masked_language_model_counts_the_masked_tokens():
    ids, where = tokens(), positions()
    labels = torch.full_like(ids, -100)
    labels[:, 1] = ids[:, 1]
    config = hf.BertConfig(**BERT | {"tie_word_embeddings": False})
    check(
        built(hf.BertForMaskedLM, config),
        lambda m: m(ids, position_ids=where, labels=labels),
        lambda m, x: m(x, position_ids=where[: len(x)]).logits[:, 1:2],
        [ids],
    )


def test_sounds_are_computed_without_their_padding():
    config = hf.Wav2Vec2Config(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        conv_dim=(6,), conv_kernel=(4,), conv_stride=(2,), feat_extract_norm="layer",
        num_conv_pos_embeddings=3, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
        classifier_proj_size=WIDTH, layerdrop=0.0, hidden_dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, num_labels=3,
    )  # fmt: skip
    lengths = [12, 20, 16]
    mask = (torch.arange(20) < torch.tensor(lengths).unsqueeze(1)).long()
    sounds = torch.randn(CASES, 20, dtype=torch.float64) * mask
    check(
        built(hf.Wav2Vec2ForSequenceClassification, config),
        lambda m: m(input_values=sounds, attention_mask=mask),
        lambda m, x: m(x).logits,
        cases_of(sounds, lengths),
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]], r"case 1 is \[0, 1, 1, 1\].*on the right"),
        ([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], r"case 2 is \[0, 0, 0, 0\]"),
    ],
)
def test_padding_elsewhere_is_refused(mask, message):
    model = gpt2()
    preconditioner = preconditioner_for(model, **OPTIONS)
    with preconditioner, pytest.raises(InvalidSpecError, match=message):
        model(input_ids=tokens(), attention_mask=torch.tensor(mask))


def test_a_head_that_is_not_known_is_refused():
    with pytest.raises(InvalidSpecError, match=r"GPT2Model ends with no head.*ModelCalls"):
        preconditioner_for(gpt2(hf.GPT2Model))


def linear_twin(model):
    """A copy with an `nn.Linear` for each `Conv1D`."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape).double()
            linear.weight.data = module.weight.data.T.contiguous()
            linear.bias.data = module.bias.data.clone()
            twin.set_submodule(name, linear)
    return twin


@pytest.mark.parametrize("inverse", ["block_diagonal", "block_tridiagonal", "ekfac"])
def test_conv1d_is_a_linear_layer_with_its_weight_transposed(inverse):
    model = gpt2()
    twin = linear_twin(model)
    seen = []
    for each in (model, twin):
        preconditioner = preconditioner_for(
            each, **OPTIONS, inverse=inverse, fused_outputs={"*c_attn": 3}
        )
        each(input_ids=tokens(), position_ids=positions(), labels=tokens()).loss.backward()
        preconditioner.step()
        seen.append({name: p.grad for name, p in each.named_parameters()})
    for name, direction in seen[0].items():
        other = seen[1][name]
        transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
        other = other.T if transposed and other.dim() == 2 else other
        torch.testing.assert_close(direction, other, msg=lambda m, n=name: f"{n}: {m}")


def test_a_conv1d_that_computes_something_else_has_no_rule():
    class Scaled(Conv1D):
        def forward(self, x):
            return 2 * super().forward(x)

    assert rule_for(Conv1D(3, 2)) is not None
    assert rule_for(Scaled(3, 2)) is None


def test_the_factors_of_conv1d_are_those_of_a_linear_layer():
    model = gpt2()
    sums = []
    for each in (model, linear_twin(model)):
        preconditioner = preconditioner_for(each, **OPTIONS)
        each(input_ids=tokens(), position_ids=positions()).logits.sum().backward()
        statistics, num_cases = statistics_of_calls(
            preconditioner._computer,
            preconditioner._curvature,
            preconditioner._observer.pop_inputs(),
            step=1,
            place=(0, 1),
        )
        assert num_cases == CASES
        sums.append(statistics.factors)
    names = [name for name in sums[0] if ".c_" in name]
    assert len([name for name in names if "c_attn" in name]) == 2 * 3
    for name in names:
        torch.testing.assert_close(sums[0][name].A, sums[1][name].A)
        torch.testing.assert_close(sums[0][name].G, sums[1][name].G)


@pytest.mark.parametrize(
    ("kind", "tied", "share"),
    [
        # The embedding is the last layer, too, which one Kronecker product cannot be.
        (hf.GPT2LMHeadModel, True, 0.68),
        (hf.GPT2LMHeadModel, False, 0.999),
        (hf.GPT2ForSequenceClassification, True, 0.999),
    ],
)
def test_gpt2_of_full_size_has_kronecker_blocks(kind, tied, share):
    with torch.device("meta"):
        model = kind(hf.GPT2Config(tie_word_embeddings=tied))
    report = register(model, kfac_settings({})).report
    covered = sum(row.num_parameters for row in report if row.block.startswith("kronecker"))
    assert covered / sum(row.num_parameters for row in report) > share
    parts = {row.num_blocks for row in report if row.module.endswith("c_attn")}
    assert min(parts) >= 3
