"""Tiny models with parameters that nothing hides behind, and batches for them."""

import clients
import torch


def tiny_config(**kwargs):
    return clients.tiny_config(**{"vocab_size": 40, "hidden_dropout": 0.0, **kwargs})


def randomize(model):
    """Large random parameters, so that no path hides behind a small or symmetric initial state."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def right_padded_batch(lengths, total, vocab_size=40):
    input_ids = torch.randint(5, vocab_size, (len(lengths), total))
    attention_mask = (torch.arange(total) < torch.tensor(lengths)[:, None]).long()
    return input_ids.masked_fill(attention_mask == 0, 0), attention_mask


def left_padded(input_ids, attention_mask):
    """The same sequences, moved to the right end of their rows."""
    shifts = (attention_mask == 0).sum(1)
    pairs = [
        (ids.roll(n.item()), mask.roll(n.item()))
        for ids, mask, n in zip(input_ids, attention_mask, shifts, strict=True)
    ]
    return tuple(torch.stack(tensors) for tensors in zip(*pairs, strict=True))


POSITIONS = ["absolute", "rope"]
IMPLEMENTATIONS = ["eager", "sdpa"]
