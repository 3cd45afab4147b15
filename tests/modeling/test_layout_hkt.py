"""Left padding and packing: a sequence gives the same numbers wherever it lies."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import IMPLEMENTATIONS, POSITIONS, left_padded, randomize, right_padded_batch, tiny_config

from hkt_hf import HKTForSequenceClassification, HKTModel
from hkt_hf.modeling.layout_hkt import find_layout, packed_layout, rolled_layout


def packed(rows, total):
    """`rows`: lists of sequences (1-D id tensors); ids, mask and positions `(len(rows), total)`, padded at the end."""
    input_ids = torch.zeros(len(rows), total, dtype=torch.long)
    attention_mask, position_ids = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, sequences in enumerate(rows):
        joined = torch.cat(sequences)
        input_ids[row, : len(joined)] = joined
        attention_mask[row, : len(joined)] = 1
        position_ids[row, : len(joined)] = torch.cat([torch.arange(len(ids)) for ids in sequences])
    return input_ids, attention_mask, position_ids


model_settings = {
    "positions": st.sampled_from(POSITIONS),
    "num_levels": st.integers(1, 4),
    "kernel_size": st.integers(1, 4),
    "implementation": st.sampled_from(IMPLEMENTATIONS),
    "is_decoder": st.booleans(),
}


def build(model_class, positions, num_levels, kernel_size, implementation, **fields):
    torch.manual_seed(0)
    config = tiny_config(
        position_embedding_type=positions, num_levels=num_levels, downsample_kernel_size=kernel_size, **fields
    )
    model = randomize(model_class(config))
    model.set_attn_implementation(implementation)
    return model


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    padding=st.integers(0, 9),
    pooling=st.sampled_from(["mean", "cls", "last"]),
    **model_settings,
)
def test_left_padding_changes_nothing(lengths, padding, pooling, **settings):
    pooling = "last" if settings["is_decoder"] else pooling
    model = build(HKTForSequenceClassification, pooling=pooling, **settings)
    right = right_padded_batch(lengths, max(lengths) + padding)
    left = left_padded(*right)
    with torch.no_grad():
        expected, output = model(*right, output_hidden_states=True), model(*left, output_hidden_states=True)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
    for hidden, hidden_right in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(hidden[left[1] == 1], hidden_right[right[1] == 1], rtol=1e-5, atol=1e-5)


@given(
    rows=st.lists(st.lists(st.integers(1, 14), min_size=1, max_size=4), min_size=1, max_size=3),
    padding=st.integers(0, 5),
    **model_settings,
)
def test_packed_sequences_are_as_if_alone(rows, padding, **settings):
    model = build(HKTModel, **settings)
    sequences = [[torch.randint(5, 40, (length,)) for length in row] for row in rows]
    input_ids, attention_mask, position_ids = packed(sequences, max(map(sum, rows)) + padding)
    with torch.no_grad():
        output = model(input_ids, attention_mask=attention_mask, position_ids=position_ids)[0]
        alone = torch.cat([model(ids[None])[0][0] for row in sequences for ids in row])
    torch.testing.assert_close(output[attention_mask == 1], alone, rtol=1e-5, atol=1e-5)


def test_packing_needs_no_mask_and_may_be_longer_than_the_position_table():
    model = build(HKTModel, "absolute", 3, 2, "sdpa")
    sequences = [torch.randint(5, 40, (40,)), torch.randint(5, 40, (50,))]
    input_ids, _, position_ids = packed([sequences], 90)
    with torch.no_grad():
        output = model(input_ids, position_ids=position_ids)[0][0]
        torch.testing.assert_close(output[40:], model(sequences[1][None])[0][0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"65 tokens, more than `max_position_embeddings` \(64\)"):
        model(torch.randint(5, 40, (1, 65)))


@pytest.mark.parametrize("kind", ["left", "packed"])
def test_attention_weights_are_those_of_the_columns_of_the_batch(kind):
    model = build(HKTModel, "rope", 3, 2, "eager")
    first, second = torch.randint(5, 40, (5,)), torch.randint(5, 40, (7,))
    if kind == "left":
        input_ids = torch.stack([torch.cat([torch.zeros(2, dtype=torch.long), first]), second])
        attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        places = [(0, slice(2, 7), first), (1, slice(0, 7), second)]
    else:
        input_ids, attention_mask, position_ids = packed([[first, second]], 15)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        places = [(0, slice(0, 5), first), (0, slice(5, 12), second)]
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
        for row, columns, ids in places:
            for weights, alone in zip(attentions, model(ids[None], output_attentions=True).attentions, strict=True):
                torch.testing.assert_close(weights[row, :, columns, columns], alone[0], rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(weights[row, :, columns].sum(-1), torch.ones(4, len(ids)))


@pytest.mark.parametrize("kind", ["left", "packed"])
def test_gradients_are_those_of_the_lone_sequences(kind):
    sequences = [torch.randint(5, 40, (length,)) for length in (6, 11)]
    model = build(HKTModel, "rope", 3, 2, "sdpa")
    if kind == "left":
        padded = torch.cat([torch.zeros(5, dtype=torch.long), sequences[0]])
        inputs = {"input_ids": torch.stack([padded, sequences[1]])}
        inputs["attention_mask"] = (torch.arange(11) >= torch.tensor([[5], [0]])).long()
    else:
        input_ids, attention_mask, position_ids = packed([sequences], 19)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    gradients = []
    for outputs in (
        lambda: model(**inputs)[0][inputs["attention_mask"] == 1],
        lambda: torch.cat([model(ids[None])[0][0] for ids in sequences]),
    ):
        model.zero_grad()
        (outputs() * torch.linspace(-1, 1, 17 * 32).view(17, 32)).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for together, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), left=st.booleans())
def test_rolling_there_and_back_is_the_identity(lengths, left):
    _, attention_mask = right_padded_batch(lengths, 10)
    mask = attention_mask.flip(1) if left else attention_mask
    layout = rolled_layout(mask == 1)
    rows = torch.randn(len(lengths), 10, 3)
    assert torch.equal(layout.to_rows(layout.to_sequences(rows)), rows)
    assert torch.equal(layout.mask, attention_mask == 1)


def test_packing_keeps_every_token_once():
    _, attention_mask, position_ids = packed([[torch.ones(3), torch.ones(1)], [torch.ones(6)]], 7)
    layout = packed_layout(attention_mask == 1, position_ids)
    assert layout.mask.sum(1).tolist() == [3, 1, 6]
    rows = torch.arange(14.0).view(2, 7)
    assert layout.to_sequences(rows)[layout.mask].tolist() == [0, 1, 2, 3, 7, 8, 9, 10, 11, 12]
    assert torch.equal(layout.positions()[attention_mask == 1], position_ids[attention_mask == 1])


def test_right_padded_batches_are_left_as_they_are():
    _, attention_mask = right_padded_batch([7, 3, 0], 7)
    assert find_layout(None, None, 3, 7) is None
    assert find_layout(attention_mask, None, 3, 7) is None
    assert find_layout(attention_mask, torch.arange(7)[None], 3, 7) is None
    assert find_layout(attention_mask.flip(1), None, 3, 7) is not None


def test_position_ids_of_padded_tokens_are_not_read():
    """As `generate` and data collators make them: 0 or 1 where the mask is 0."""
    model = build(HKTModel, "rope", 3, 2, "sdpa")
    input_ids, attention_mask = left_padded(*right_padded_batch([9, 4], 9))
    position_ids = (attention_mask.cumsum(1) - 1).masked_fill(attention_mask == 0, 1)
    with torch.no_grad():
        expected = model(input_ids, attention_mask=attention_mask)[0]
        output = model(input_ids, attention_mask=attention_mask, position_ids=position_ids)[0]
    assert torch.equal(output, expected)
