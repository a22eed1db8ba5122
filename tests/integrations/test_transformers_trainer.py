"""The callback in a `Trainer` does what a loop by hand does."""

from types import SimpleNamespace

import pytest
import torch

from kfac_dist.errors import InvalidSpecError

pytest.importorskip("transformers", reason="needs the extra integrations")
pytest.importorskip("accelerate", reason="needs the extra integrations")

import transformers as hf

from kfac_dist.integrations.transformers import KFACTrainerCallback, preconditioner_for
from tests.integrations import tiny

# The Trainer puts its own graphs and modes around a model; none of their warnings is about K-FAC.
pytestmark = pytest.mark.filterwarnings("ignore")


def trainer(folder, *callbacks, data=None, steps=4, **arguments):
    model = tiny.model()
    settings = {"per_device_train_batch_size": tiny.CASES, "max_grad_norm": 0.0} | arguments
    return hf.Trainer(
        model=model,
        args=hf.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            **settings,
        ),
        train_dataset=data or tiny.data(),
        data_collator=tiny.batch,
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("options", [{}, {"norm_constraint": 1e-3}])
def test_a_trainer_equals_a_loop_by_hand(tmp_path, options):
    callback = KFACTrainerCallback(**tiny.OPTIONS, **options)
    run = trainer(tmp_path, callback)
    run.train()
    # The Trainer divides by the number of labels, of which the first in each case is not predicted.
    labels = (tiny.batch(tiny.data())["labels"] != -100).sum()
    reference, losses = tiny.by_hand(4, 0.1, preconditioner_for, labels, **options)
    torch.testing.assert_close(tiny.vector(run.model), tiny.vector(reference), rtol=1e-5, atol=1e-6)
    assert losses[-1] < losses[0]
    assert callback.preconditioner.step_count == 4
    assert not run.model._forward_pre_hooks, "the model is not observed after its training"


def test_micro_batches_are_one_batch(tmp_path):
    results = []
    for size, number in ((tiny.CASES, 1), (tiny.CASES // 4, 4)):
        callback = KFACTrainerCallback(**tiny.OPTIONS)
        run = trainer(
            tmp_path,
            callback,
            data=tiny.data(padded=False),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=number,
        )
        run.train()
        assert callback.preconditioner.step_count == 4
        results.append(tiny.vector(run.model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_a_resumed_trainer_continues_with_the_same_factors(tmp_path):
    whole = trainer(tmp_path / "whole", KFACTrainerCallback(**tiny.OPTIONS))
    whole.train()
    for steps, resume in ((2, None), (4, True)):
        callback = KFACTrainerCallback(**tiny.OPTIONS)
        half = trainer(tmp_path / "half", callback, steps=steps, save_steps=2)
        half.train(resume_from_checkpoint=resume)
    torch.testing.assert_close(tiny.vector(half.model), tiny.vector(whole.model))


def test_a_checkpoint_without_factors_is_warned_of(tmp_path):
    trainer(tmp_path, steps=2, save_steps=2).train()
    with pytest.warns(UserWarning, match="at step 2.*the factors start again"):
        trainer(tmp_path, KFACTrainerCallback(**tiny.OPTIONS)).train(resume_from_checkpoint=True)


def test_bfloat16_leaves_the_statistics_in_float32(tmp_path):
    callback = KFACTrainerCallback(**tiny.OPTIONS)
    run = trainer(tmp_path, callback, bf16=True, steps=1)
    run.train()
    factors = callback.preconditioner.state_dict()["factors"]
    exact = trainer(tmp_path, other := KFACTrainerCallback(**tiny.OPTIONS), steps=1)
    exact.train()
    torch.testing.assert_close(factors, other.preconditioner.state_dict()["factors"])


def test_mistakes_are_reported():
    with pytest.raises(InvalidSpecError, match="no option lr"):
        KFACTrainerCallback(lr=0.1)
    callback = KFACTrainerCallback(norm_constraint=1e-3)
    arguments = SimpleNamespace(fp16=True, max_grad_norm=0.0)
    with pytest.raises(InvalidSpecError, match="gradients scaled"):
        callback.on_train_begin(arguments, SimpleNamespace(global_step=0), None)
