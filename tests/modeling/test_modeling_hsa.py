"""HSA models: trees from data and from the configuration, padding, saving, training, errors."""

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tiny_models import randomize, right_padded_batch, tiny_hsa_config, tiny_hsa_head
from transformers import AutoConfig

from hkt_hf.modeling.attention_hsa import hsa_matrix
from hkt_hf.modeling.configuration_hsa import HSAConfig
from hkt_hf.modeling.modeling_hsa import (
    AUTO_CLASSES,
    SIBLING_POSITION_INIT,
    HSAAttention,
    HSAForSequenceClassification,
    HSASiblingPositions,
)
from hkt_hf.modeling.tree_hsa import SignalTree


POSITIONS = ["absolute", "rope", "none"]


def model_of(auto_class="AutoModelForSequenceClassification", **fields):
    return tiny_hsa_head(auto_class, **fields)


each_positions = pytest.mark.parametrize("positions", POSITIONS)


@each_positions
def test_padding_on_either_side_changes_nothing(positions):
    model = model_of(position_embedding_type=positions)
    input_ids, mask = right_padded_batch([15, 23, 9], 23)
    with torch.no_grad():
        logits = model(input_ids, mask).logits
        shifts = (mask == 0).sum(1).tolist()
        left = [torch.stack([row.roll(n) for row, n in zip(rows, shifts, strict=True)]) for rows in (input_ids, mask)]
        torch.testing.assert_close(model(*left).logits, logits, rtol=0, atol=1e-5)
        for row, length in enumerate((15, 23, 9)):
            single = model(input_ids[row : row + 1, :length]).logits
            torch.testing.assert_close(single, logits[row : row + 1], rtol=0, atol=1e-5)


@each_positions
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_mask_with_gaps_leaves_those_tokens_out(positions, pooling):
    model = model_of(position_embedding_type=positions, pooling=pooling)
    input_ids, _ = right_padded_batch([9, 9], 9)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        logits = model(input_ids, mask).logits
        other = torch.where(mask == 1, input_ids, (input_ids + 1) % model.config.vocab_size)
        assert torch.equal(model(other, mask).logits, logits)
        if positions == "none":
            for row in range(2):
                alone = model(input_ids[row, mask[row] == 1][None]).logits
                torch.testing.assert_close(alone, logits[row : row + 1], rtol=0, atol=1e-5)


def test_padding_is_not_counted_among_the_positions():
    model = model_of(position_embedding_type="absolute", max_position_embeddings=24)
    input_ids, mask = right_padded_batch([23, 20], 40)
    with torch.no_grad():
        logits = model(input_ids, mask).logits
        torch.testing.assert_close(model(input_ids[:, :23], mask[:, :23]).logits, logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="the input has 25 tokens, more than `max_position_embeddings`"):
        model(input_ids, (torch.arange(40) < 25).expand(2, -1))


def test_the_positions_of_siblings_are_as_wide_as_the_model():
    config = tiny_hsa_config(num_hidden_layers=1)
    positions = HSASiblingPositions(config).double()
    assert {vectors.dtype for vectors in positions([3, 2])} == {torch.double}
    assert {vectors.dtype for vectors in positions.bfloat16()([3, 2])} == {torch.float}
    model = model_of(sibling_positions=True).double()
    input_ids, mask = right_padded_batch([7], 7)
    amplitude = model.model.layers[0].self_attn.sibling_positions.amplitude

    def logits(values):
        state = {"model.layers.0.self_attn.sibling_positions.amplitude": values}
        return torch.func.functional_call(model, state, (input_ids, mask)).logits

    assert torch.autograd.gradcheck(logits, amplitude.detach().clone().requires_grad_())


@pytest.mark.parametrize("has_segments", [False, True])
def test_an_empty_batch_has_no_results(has_segments):
    input_ids = torch.zeros(0, 20).long()
    segment_ids = torch.zeros(0, 1, 20).long() if has_segments else None
    assert model_of()(input_ids, segment_ids=segment_ids).logits.shape == (0, 3)


def test_nothing_is_written_of_a_configuration_that_can_not_be_saved(tmp_path):
    model = model_of(pad_token_id=39)
    model.resize_token_embeddings(20)
    with pytest.raises(StrictDataclassError, match="pad_token_id"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_segments_are_the_tree():
    model = model_of()
    input_ids, mask = right_padded_batch([15, 23], 23)
    sentences = torch.arange(23).expand(2, -1) // 4
    paragraphs = torch.arange(23).expand(2, -1) // 12
    with torch.no_grad():
        by_rule = model(input_ids, mask).logits
        torch.testing.assert_close(model(input_ids, mask, segment_ids=sentences[:, None]).logits, by_rule)
        nested = model(input_ids, mask, segment_ids=torch.stack([sentences, paragraphs], 1)).logits
        tree = SignalTree.from_segments([sentences, paragraphs], mask)
        assert torch.equal(model(input_ids, mask, tree=tree).logits, nested)
        assert (nested - by_rule).abs().max() > 1e-4


@each_positions
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_leaves_of_a_tree_are_the_real_tokens(positions, pooling, side):
    """With the mask or without it; another mask is refused."""
    model = model_of(position_embedding_type=positions, pooling=pooling)
    input_ids, mask = right_padded_batch([23, 15], 23)
    if side == "left":
        input_ids, mask = input_ids.flip(1), mask.flip(1)
    sentences = (torch.arange(23) // 5).expand(2, -1)
    tree = SignalTree.from_segments(sentences, mask)
    with torch.no_grad():
        expected = model(input_ids, mask, segment_ids=sentences[:, None]).logits
        assert torch.equal(model(input_ids, mask, tree=tree).logits, expected)
        assert torch.equal(model(input_ids, tree=tree).logits, expected)
        padding = mask == 0
        assert torch.equal(model(input_ids.masked_fill(padding, 7), tree=tree).logits, expected)
    for other in (torch.ones_like(mask), mask.flip(1)):
        with pytest.raises(
            ValueError, match=r"`attention_mask` must be of the leaves of `tree`.* and \[23, 15\] leaves"
        ):
            model(input_ids, other, tree=tree)


@each_positions
@pytest.mark.parametrize("branching", [[16, None], [None], [2, 2, None]])
def test_padding_beyond_the_longest_sequence_changes_nothing(branching, positions):
    model = model_of(branching=branching, position_embedding_type=positions)
    input_ids, mask = right_padded_batch([23, 15], 23)
    with torch.no_grad():
        expected = model(input_ids, mask).logits
        for size in (32, 64):
            padded = [torch.nn.functional.pad(tensor, (0, size - 23)) for tensor in (input_ids, mask)]
            torch.testing.assert_close(model(*padded).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("segment_ids", [None, torch.zeros(2, 1, 9).long()])
def test_a_batch_without_a_real_token_has_finite_results_and_gradients(segment_ids):
    model = model_of().train()
    logits = model(torch.ones(2, 9).long(), torch.zeros(2, 9).long(), segment_ids=segment_ids).logits
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(each.grad.isfinite().all() for each in model.parameters() if each.grad is not None)


@pytest.mark.parametrize("num_tree_levels", [1, 2, 4])
@pytest.mark.parametrize("width, max_family_size", [(12, 8), (36, 3)])
def test_large_families_of_others_in_the_batch_change_nothing(width, max_family_size, num_tree_levels):
    """A family is split once or several times: the levels that this puts in move no level of another sequence."""
    model = model_of(max_family_size=max_family_size, num_tree_levels=num_tree_levels)
    input_ids = torch.randint(5, 40, (2, 36))
    place = torch.arange(36)
    sentences = torch.stack([place // 2, place // width])
    paragraphs = torch.stack([place // 6, place // 36])
    segment_ids = torch.stack([sentences, paragraphs], dim=1)
    tree = SignalTree.from_segments([sentences, paragraphs], max_family_size=max_family_size)
    assert len(tree.parents) > 3
    with torch.no_grad():
        together = model(input_ids, segment_ids=segment_ids).logits
        for row in range(2):
            rows = slice(row, row + 1)
            alone = model(input_ids[rows], segment_ids=segment_ids[rows]).logits
            torch.testing.assert_close(together[rows], alone, rtol=0, atol=1e-5)


def test_deeper_trees_of_others_in_the_batch_change_nothing():
    model = model_of()
    input_ids = torch.randint(5, 40, (2, 6))
    nested = [[[0, 1, 2], [3, 4, 5]], [[[[0, 1], 2], 3], [4, 5]]]
    with torch.no_grad():
        together = model(input_ids, tree=SignalTree.from_nested(nested)).logits
        for row, each in enumerate(nested):
            alone = model(input_ids[row : row + 1], tree=SignalTree.from_nested([each])).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("branching", [2, [2, None], [3]])
def test_pictures_are_quadtrees(branching):
    model = model_of(branching=branching, tree_layout="square")
    input_ids = torch.randint(5, 40, (2, 36))
    blocks = branching if isinstance(branching, int) else [branching[0], None]
    with torch.no_grad():
        logits = model(input_ids, torch.ones_like(input_ids)).logits
        tree = SignalTree.from_grid(6, 6, blocks, batch_size=2)
        assert torch.equal(model(input_ids, tree=tree).logits, logits)
        line = SignalTree.regular([36, 36], 4)
        assert (model(input_ids, tree=line).logits - logits).abs().max() > 1e-4
        for ids, mask, message in (
            (input_ids[:, :35], None, "a square number of tokens without padding, got 35 tokens:"),
            (input_ids, torch.arange(36).expand(2, -1) < 30, "got 36 tokens with padding"),
        ):
            with pytest.raises(ValueError, match=message):
                model(ids, mask)


@pytest.mark.parametrize("has_eps", [False, True])
def test_the_attention_is_that_of_the_definition(has_eps):
    config = tiny_hsa_config(sibling_positions=has_eps)
    attention = randomize(HSAAttention(config, 0))
    hidden_states = torch.randn(2, 13, 32)
    tree = SignalTree.regular([13, 6], [4, None])
    with torch.no_grad():
        split = lambda states: states.unflatten(-1, (4, 8)).transpose(1, 2)  # noqa: E731
        query = attention.q_norm(split(attention.q_proj(hidden_states)))
        key = torch.nn.functional.layer_norm(split(attention.k_proj(hidden_states)), (8,), eps=1e-5)
        eps = attention.sibling_positions([4, 4]) if has_eps else None
        matrix = hsa_matrix(query, key, tree, eps=eps)
        expected = (matrix @ split(attention.v_proj(hidden_states)).double()).transpose(1, 2).flatten(2).float()
        found = attention(hidden_states, tree=tree)[0]
    torch.testing.assert_close(found, attention.o_proj(expected), rtol=1e-4, atol=1e-5)


def test_flat_branching_is_plain_attention():
    """By PyTorch's kernel and by the operator alike."""
    model = model_of(branching=[None], sibling_positions=False)
    input_ids, mask = right_padded_batch([15, 23], 23)
    with torch.no_grad():
        fast = model(input_ids, mask).logits
        slow = model(input_ids, mask, segment_ids=torch.zeros(2, 1, 23, dtype=torch.long)).logits
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_places_of_siblings_are_seen():
    model = model_of(position_embedding_type="none")
    without = model_of(position_embedding_type="none", sibling_positions=False)
    input_ids = torch.randint(5, 40, (1, 12))
    swapped = input_ids[:, [1, 0, *range(2, 12)]]
    with torch.no_grad():
        assert torch.allclose(without(input_ids).logits, without(swapped).logits, atol=1e-5)
        assert not torch.allclose(model(input_ids).logits, model(swapped).logits, atol=1e-4)


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_saved_models_come_back_through_the_auto_classes(auto_class, tmp_path):
    model = model_of(auto_class)
    input_ids, mask = right_padded_batch([15, 23], 23)
    model.save_pretrained(tmp_path)
    again, info = getattr(transformers, auto_class).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(again).__name__ == AUTO_CLASSES[auto_class]
    assert type(AutoConfig.from_pretrained(tmp_path)) is HSAConfig
    assert again.config.to_diff_dict() == model.config.to_diff_dict() and again.config.branching == [4, None]
    # A matrix-vector product of PyTorch differs in the last bit with the alignment of a weight in its file.
    for parameter in again.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        assert torch.equal(again(input_ids, mask)[0], model(input_ids, mask)[0])


def test_what_a_file_lacks_is_initialised(tmp_path):
    """Raw parameters too, and not left as uninitialised memory."""
    backbone = model_of("AutoModel")
    state = {name: tensor for name, tensor in backbone.state_dict().items() if "amplitude" not in name}
    backbone.save_pretrained(tmp_path, state_dict=state)
    loaded = HSAForSequenceClassification.from_pretrained(tmp_path)
    for layer, original in zip(loaded.model.layers, backbone.layers, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, original.mlp.up_proj.weight)
        assert layer.self_attn.sibling_positions.amplitude.eq(SIBLING_POSITION_INIT).all()


@pytest.mark.parametrize("has_segments", [False, True])
def test_compiled_models_give_the_same(has_segments):
    model = model_of()
    input_ids, mask = right_padded_batch([15, 23], 23)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if has_segments:
        inputs["segment_ids"] = (torch.arange(23) // 5).expand(2, 1, -1)
    with torch.no_grad():
        expected = model(**inputs).logits
        found = torch.compile(model, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_autocast_keeps_the_attention_wide():
    """Linear layers in bfloat16, the attention itself in float32 with the same result as in a wide model, nearly."""
    model = model_of().train()
    input_ids, mask = right_padded_batch([15, 23], 23)
    expected = model(input_ids, mask).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids, mask, labels=torch.tensor([0, 2]))
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    torch.testing.assert_close(output.logits.float(), expected, rtol=0.1, atol=0.1)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@each_positions
def test_every_parameter_learns(positions):
    model = model_of(position_embedding_type=positions).train()
    input_ids, mask = right_padded_batch([15, 23], 23)
    model(input_ids, mask, labels=torch.tensor([0, 2])).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    masked = model_of("AutoModelForMaskedLM", position_embedding_type=positions).train()
    labels = torch.where(mask == 1, input_ids, -100)
    masked(input_ids, mask, labels=labels).loss.backward()
    assert all(parameter.grad is not None for parameter in masked.parameters())


def test_gradient_checkpointing_gives_the_same_gradients():
    input_ids, mask = right_padded_batch([15, 23], 23)
    gradients = []
    for checkpointing in (False, True):
        model = model_of().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids, mask, labels=torch.tensor([0, 2])).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_half_precision_is_close():
    model, input_ids = model_of(), torch.randint(5, 40, (2, 23))
    with torch.no_grad():
        expected = model(input_ids).logits
        found = model.bfloat16()(input_ids).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


def test_hidden_states_are_recorded():
    output = model_of()(torch.randint(5, 40, (1, 9)), output_hidden_states=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(1, 9, 32)] * 3


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"branching": [1, None]}, "`branching`"),
        ({"branching": [None, 4]}, "`branching`"),
        ({"branching": []}, "`branching`"),
        ({"head_dim": 7}, "`head_dim` must be even"),
        ({"hidden_size": 30}, "`hidden_size`"),
        ({"max_family_size": 1}, "max_family_size"),
        ({"tree_layout": "cube"}, "tree_layout"),
        ({"hidden_act": "gelo"}, "`hidden_act`"),
        ({"hidden_dropout": 1.5}, "`hidden_dropout`"),
        ({"pad_token_id": 40}, "`pad_token_id`"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_hsa_config(**fields)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({}, "exactly one of"),
        ({"input_ids": torch.full((1, 3), 40)}, r"must lie in \[0, vocab_size\)"),
        ({"input_ids": torch.ones(1, 65).long()}, "more than `max_position_embeddings`"),
        (
            {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 4)},
            "`attention_mask` must have shape",
        ),
        (
            {"input_ids": torch.ones(1, 3).long(), "segment_ids": torch.ones(1, 3).long()},
            "`segment_ids` must have shape",
        ),
        (
            {
                "input_ids": torch.ones(1, 3).long(),
                "segment_ids": torch.ones(1, 1, 3).long(),
                "tree": SignalTree.regular([3], 2),
            },
            "at most one",
        ),
        ({"input_ids": torch.ones(1, 3).long(), "tree": SignalTree.regular([4], 2)}, "`tree` is of"),
        ({"input_ids": torch.ones(1, 3).long(), "tree": [[0, 1, 2]]}, "`tree` must be a .*SignalTree, got a .*list"),
        ({"input_ids": torch.ones(1, 3).long(), "labels": torch.tensor([3])}, "`labels` must lie in"),
    ],
)
def test_bad_input_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        model_of()(**inputs)
