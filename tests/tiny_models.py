"""Tiny models with parameters that nothing hides behind, and batches for them."""

import clients
import torch

from hkt_hf import HSAConfig
from hkt_hf.modeling import modeling_hkt, modeling_hsa
from hkt_hf.modeling.modeling_hkt import AUTO_CLASSES


# Fields of the configuration without which a head can't be built.
HEAD_FIELDS = {"HKTForCausalLM": {"is_decoder": True}}


def tiny_config(**kwargs):
    return clients.tiny_config(**{"vocab_size": 40, "hidden_dropout": 0.0, **kwargs})


def tiny_head(auto_class, **fields):
    """The model that `auto_class` builds, with random parameters (the same in each call), in evaluation mode."""
    name = AUTO_CLASSES[auto_class]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(getattr(modeling_hkt, name)(tiny_config(**{**HEAD_FIELDS.get(name, {}), **fields})))


def tiny_hsa_config(**kwargs):
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "branching": [4, None],
        "max_position_embeddings": 64,
        "hidden_dropout": 0.0,
        "num_labels": 3,
    }
    return HSAConfig(**{**sizes, **kwargs})


def tiny_hsa_head(auto_class, **fields):
    """The HSA model that `auto_class` builds, as [`tiny_head`]."""
    model_class = getattr(modeling_hsa, modeling_hsa.AUTO_CLASSES[auto_class])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(model_class(tiny_hsa_config(**fields)))


def head_inputs(auto_class, input_ids, attention_mask):
    """The batch `(B, T)` as the model of `auto_class` takes it: multiple choice reads it as one question, `(1, B, T)`."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if auto_class == "AutoModelForMultipleChoice":
        return {name: tensor.unsqueeze(0) for name, tensor in inputs.items()}
    return inputs


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
