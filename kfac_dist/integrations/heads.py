"""Which outputs of Hugging Face's models are predictions, what their loss counts, and how.

The class of a model tells, by the head that its name ends with. Nothing is imported for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac_dist.core.passes.distributions import DistributionName
from kfac_dist.errors import InvalidSpecError
from kfac_dist.optim.model_calls import Arguments, ModelCalls

# The label of positions without a target, in torch's cross-entropy and in these models.
IGNORED = -100

_CAUSAL = ("ForCausalLM", "LMHeadModel")
_BY_POSITION = ("ForMaskedLM", "ForTokenClassification")
_BY_CASE = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")
_SEQ2SEQ = ("ForConditionalGeneration", "ForSeq2SeqLM")

# Arguments that only serve the model's own loss, or let it reuse or return more than logits.
_LEFT_OUT = (
    "labels",
    "num_items_in_batch",
    "return_loss",
    "use_cache",
    "past_key_values",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
)
_PADDED = {
    "attention_mask": (
        "input_ids",
        "inputs_embeds",
        "token_type_ids",
        "position_ids",
        "input_values",
        "input_features",
    ),
    "decoder_attention_mask": ("decoder_input_ids", "decoder_inputs_embeds"),
}


class ModelHead(NamedTuple):
    """The predictive distribution of a model, and how its calls are read."""

    distribution: DistributionName
    calls: ModelCalls


def head_of(model: nn.Module) -> ModelHead:
    """Return what the class and the configuration of a model say about its predictions.

    Raises:
        InvalidSpecError: the class has a head that is not known.
    """
    name = type(model).__name__
    if name.endswith(_CAUSAL):
        padded = _with_labels(_PADDED, "attention_mask")
        # The last position has no next token.
        return ModelHead(
            "categorical",
            _calls(outputs=lambda result: result.logits[:, :-1], padded=padded, counted=_next),
        )
    if name.endswith(_BY_POSITION):
        padded = _with_labels(_PADDED, "attention_mask")
        return ModelHead("categorical", _calls(padded=padded, counted=_labelled))
    if name.endswith(_SEQ2SEQ) and hasattr(model, "prepare_decoder_input_ids_from_labels"):
        padded = _with_labels(_PADDED, "decoder_attention_mask")
        prepare = partial(_with_decoder_inputs, model)
        return ModelHead("categorical", _calls(padded=padded, counted=_labelled, prepare=prepare))
    if name.endswith(_BY_CASE):
        return ModelHead(_distribution(model), _calls(padded=_PADDED))
    known = ", ".join((*_CAUSAL, *_BY_POSITION, *_SEQ2SEQ, *_BY_CASE))
    raise InvalidSpecError(
        f"kfac_dist.integrations: {name} ends with no head that is known ({known}); give "
        "KFACPreconditioner the distribution and calls=ModelCalls(outputs=...) yourself"
    )


def _calls(**fields: Any) -> ModelCalls:
    fields.setdefault("outputs", lambda result: result.logits)
    return ModelCalls(left_out=_LEFT_OUT, **fields)


def _with_labels(padded: Mapping[str, tuple[str, ...]], mask: str) -> Mapping[str, tuple[str, ...]]:
    """Return which arguments have padding, where the labels have that of one mask."""
    return {**padded, mask: (*padded[mask], "labels")}


def _distribution(model: Any) -> DistributionName:
    """Return the distribution of one prediction a case, as these models choose their loss."""
    kind = getattr(model.config, "problem_type", None)
    if kind == "regression" or (kind is None and model.config.num_labels == 1):
        return "gaussian"
    return "bernoulli" if kind == "multi_label_classification" else "categorical"


def _labelled(arguments: Arguments) -> Tensor | None:
    """Return the positions that have a label; None, for all, if the call has no labels."""
    labels = arguments.get("labels")
    return None if labels is None else labels != IGNORED


def _next(arguments: Arguments) -> Tensor | None:
    """Return the positions whose next token has a label."""
    counted = _labelled(arguments)
    return None if counted is None else counted[:, 1:]


def _with_decoder_inputs(model: Any, arguments: Arguments) -> Arguments:
    """Add the decoder's inputs, which the model makes of the labels, and the mask of its padding.

    The decoder looks back only, so positions after the last label have no part in the loss.
    """
    labels = arguments.get("labels")
    if labels is None:
        return arguments
    more = dict(arguments)
    if more.get("decoder_input_ids") is None and more.get("decoder_inputs_embeds") is None:
        more["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    if more.get("decoder_attention_mask") is None:
        places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
        lengths = (places * (labels != IGNORED)).amax(dim=1)
        more["decoder_attention_mask"] = (places <= lengths.unsqueeze(1)).long()
    return more
