"""A tiny language model and its data, for the loops of other libraries."""

import torch
import transformers as hf

CASES, LENGTH, VOCABULARY = 16, 6, 11


def model():
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_positions=LENGTH,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return hf.GPT2LMHeadModel(config)


def data(padded=True):
    """Sequences that count up, some of them padded on the right."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(1, VOCABULARY, (CASES, 1), generator=generator)
    ids = (first + torch.arange(LENGTH) - 1) % (VOCABULARY - 1) + 1
    mask = torch.ones_like(ids)
    if padded:
        mask[::3, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return [
        {"input_ids": ids[n] * mask[n], "attention_mask": mask[n], "labels": labels[n]}
        for n in range(CASES)
    ]


def batch(cases):
    """Stack cases, with a row of positions for each: the model's own row has no axis of cases."""
    together = {name: torch.stack([case[name] for case in cases]) for name in cases[0]}
    return together | {"position_ids": torch.arange(LENGTH).expand(len(cases), -1)}


def vector(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


OPTIONS = {"damping": 0.1, "statistics_fraction": 1.0}


def by_hand(num_steps, lr, preconditioner_for, divisor=None, **options):
    """The same training as a plain loop, on the cases in order: the reference.

    The loss is a mean over the tokens that have a label, or their sum over a divisor.
    """
    tiny = model().train()
    optimizer = torch.optim.SGD(tiny.parameters(), lr=lr)
    if "norm_constraint" in options:
        options["lr"] = lr
    preconditioner = preconditioner_for(tiny, **OPTIONS | options)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = tiny(**batch(data()), num_items_in_batch=divisor).loss
        loss.backward()
        preconditioner.step()
        optimizer.step()
        losses.append(loss.item())
    return tiny, losses
