"""The models: equalities with BERT and across batches, saving, losses, recording, and what they refuse."""

import copy
import re

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import (
    IMPLEMENTATIONS,
    POSITIONS,
    head_inputs,
    randomize,
    right_padded_batch,
    tiny_config,
    tiny_head,
)
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BertConfig
from transformers.models.bert.modeling_bert import BertSelfAttention

from hkt_hf import HKTConfig, HKTForCausalLM, HKTForSequenceClassification, HKTModel
from hkt_hf.modeling import polyphase_hkt
from hkt_hf.modeling.layers_common import pool
from hkt_hf.modeling.modeling_hkt import AUTO_CLASSES, HKTAttention


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_one_level_with_biases_is_bert_self_attention(implementation, padded):
    config = tiny_config(num_levels=1, attention_bias=True, position_embedding_type="absolute")
    config._attn_implementation = implementation
    attention = randomize(HKTAttention(config, layer_idx=0))
    bert_config = BertConfig(
        hidden_size=32, num_attention_heads=4, attention_probs_dropout_prob=0.0, attn_implementation="eager"
    )
    bert = BertSelfAttention(bert_config).eval()
    for ours, theirs in (
        (attention.q_proj[0], bert.query),
        (attention.k_proj[0], bert.key),
        (attention.v_proj, bert.value),
    ):
        theirs.load_state_dict(ours.state_dict())
    hidden_states = torch.randn(2, 19, 32)
    visible = torch.ones(2, 1, 1, 19, dtype=torch.bool)
    if padded:
        visible[1, ..., 11:] = False
    additive = torch.zeros(2, 1, 1, 19).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = attention.o_proj(bert(hidden_states, attention_mask=additive)[0])
        actual = attention(hidden_states, attention_mask=additive if implementation == "eager" else visible)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    padding=st.integers(0, 9),
    positions=st.sampled_from(POSITIONS),
    pooling=st.sampled_from(["mean", "cls", "last"]),
    num_levels=st.integers(1, 4),
    kernel_size=st.integers(1, 4),
    implementation=st.sampled_from(IMPLEMENTATIONS),
)
def test_right_padding_changes_nothing(lengths, padding, positions, pooling, num_levels, kernel_size, implementation):
    config = tiny_config(
        position_embedding_type=positions,
        pooling=pooling,
        num_levels=num_levels,
        downsample_kernel_size=kernel_size,
        downsample_type="dense" if kernel_size == 3 else "depthwise",
    )
    torch.manual_seed(0)
    model = randomize(HKTForSequenceClassification(config))
    model.set_attn_implementation(implementation)
    input_ids, attention_mask = right_padded_batch(lengths, max(lengths) + padding)
    with torch.no_grad():
        batch = model(input_ids, attention_mask=attention_mask).logits
        alone = torch.cat([model(input_ids[row : row + 1, :n]).logits for row, n in enumerate(lengths)])
    torch.testing.assert_close(batch, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_fully_padded_row_is_finite(implementation, pooling):
    model = randomize(HKTForSequenceClassification(tiny_config(pooling=pooling)))
    model.set_attn_implementation(implementation)
    input_ids, attention_mask = right_padded_batch([8, 0], 12)
    output = model(input_ids, attention_mask=attention_mask, labels=torch.tensor([0, 1]))
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "implementation, kernel",
    [("sdpa", "aten::_scaled_dot_product_flash_attention_for_cpu"), ("auto", "mkldnn::_linear_pointwise")],
)
def test_the_model_reaches_the_fast_cpu_kernels_and_forms_no_square_matrix(
    implementation, kernel, padded, monkeypatch
):
    monkeypatch.setattr(polyphase_hkt, "TILE", 256)
    length = 1536
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "num_hidden_layers": 1}
    model = HKTModel(tiny_config(max_position_embeddings=length, **sizes))
    model.set_attn_implementation(implementation)
    input_ids, attention_mask = right_padded_batch([length, length - 500], length)
    model(input_ids)  # what the first call of a process does once is not measured
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = model(input_ids, attention_mask=attention_mask if padded else None)
        output.last_hidden_state.sum().backward()
    names = {event.key for event in profiler.key_averages()}
    assert kernel in names
    assert "aten::_scaled_dot_product_attention_math" not in names
    bytes_of_a_square_bool_mask = length * length
    assert max(event.cpu_memory_usage for event in profiler.events()) < bytes_of_a_square_bool_mask


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_order_of_tokens_matters(positions):
    model = randomize(HKTForSequenceClassification(tiny_config(position_embedding_type=positions, num_levels=1)))
    input_ids, _ = right_padded_batch([9], 9)
    with torch.no_grad():
        assert (model(input_ids).logits - model(input_ids.flip(1)).logits).abs().max() > 1e-2


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_scaled_rotary_embeddings_are_used_and_saved(rope_type, tmp_path):
    plain, scaled = (
        randomize(HKTModel(tiny_config(rope_parameters=parameters)))
        for parameters in (None, {"rope_type": rope_type, "factor": 4.0, "rope_theta": 10000.0})
    )
    input_ids, _ = right_padded_batch([20], 20)
    scaled.save_pretrained(tmp_path)
    with torch.no_grad():
        output = scaled(input_ids)[0]
        assert (plain(input_ids)[0] - output).abs().max() > 1e-2
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(input_ids)[0], output)
    if rope_type == "yarn":
        cos, sin = scaled.rotary_emb(output, torch.arange(20)[None])
        torch.testing.assert_close((cos**2 + sin**2).sqrt().mean().item(), scaled.rotary_emb.attention_scaling)


def test_fields_reach_the_layers_they_name():
    torch.manual_seed(0)
    model = HKTForSequenceClassification(
        tiny_config(hidden_act="relu", layer_norm_eps=1e-3, hidden_dropout=0.2, classifier_dropout=0.3)
    )
    assert model.dropout.p == 0.3 and model.model.dropout.p == model.model.layers[0].dropout.p == 0.2
    assert HKTForSequenceClassification(tiny_config(hidden_dropout=0.2)).dropout.p == 0.2
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 5 and all(norm.eps == 1e-3 for norm in norms)
    assert isinstance(model.model.layers[0].mlp.act_fn, torch.nn.ReLU)
    assert model.model.embed_tokens.weight[0].eq(0).all()


def test_pooling_reads_what_it_says():
    hidden_states = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(hidden_states, mask, "mean").tolist() == [[1.0, 2.0], [8.0, 9.0]]
    assert pool(hidden_states, mask, "cls").tolist() == [[0.0, 1.0], [6.0, 7.0]]
    assert pool(hidden_states, mask, "last").tolist() == [[2.0, 3.0], [10.0, 11.0]]
    for pooling in ("mean", "cls", "last"):
        assert torch.equal(pool(hidden_states, None, pooling), pool(hidden_states, torch.ones(2, 3), pooling))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_of_a_long_sequence_is_within_half_precision(dtype):
    hidden_states = torch.full((1, 4096, 4), 20.0, dtype=dtype)
    pooled = pool(hidden_states, torch.ones(1, 4096), "mean")
    assert pooled.dtype == dtype and pooled.eq(20).all()


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_replicas_of_data_parallel_give_the_loss_of_the_model(auto_class):
    """`nn.DataParallel` needs GPUs; what its replicas lack are parameters: theirs are plain tensors."""
    model = randomize(tiny_head(auto_class))
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        for name, child in module._modules.items():
            setattr(replicas[module], name, replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replicas[module], name, None if parameter is None else parameter.detach().clone())
    assert not list(replicas[model].parameters())
    input_ids, attention_mask = right_padded_batch([9, 5], 9)
    one_a_row = torch.tensor([0, 1])
    inputs = head_inputs(auto_class, input_ids, attention_mask)
    inputs |= {
        "AutoModel": {},
        "AutoModelForMultipleChoice": {"labels": torch.tensor([1])},
        "AutoModelForQuestionAnswering": {"start_positions": one_a_row, "end_positions": one_a_row},
        "AutoModelForSequenceClassification": {"labels": one_a_row},
        "AutoModelForTokenClassification": {"labels": input_ids % 2},
    }.get(auto_class, {"labels": input_ids})
    with torch.no_grad():
        assert torch.equal(replicas[model](**inputs)[0], model(**inputs)[0])


def test_levels_share_or_own_their_projections():
    own, shared = (HKTAttention(tiny_config(share_level_projections=share), 0) for share in (False, True))
    assert len(own.q_proj) == len(own.k_proj) == 3
    assert len(shared.q_proj) == len(shared.k_proj) == 1


def test_rope_gives_a_block_the_position_of_its_first_token():
    """With equal hidden states everywhere, rotated scores of level 1 depend on the distance of first tokens."""
    sizes = {"num_attention_heads": 1, "hidden_size": 8, "head_dim": 8}
    config = tiny_config(num_levels=2, downsample_kernel_size=2, **sizes)
    config._attn_implementation = "eager"
    model = randomize(HKTModel(config))
    attention = model.layers[0].self_attn
    with torch.no_grad():
        attention.level_logits.copy_(torch.tensor([[-100.0, 100.0]]))
        embeddings = torch.ones(1, 9, 8)
        weights = model(inputs_embeds=embeddings, output_attentions=True).attentions[0]
        hidden_states = model.layers[0].input_layernorm(embeddings)
        cos, sin = model.rotary_emb(hidden_states, torch.arange(9)[None])
        block = attention.levels(hidden_states)[1][:, 1]  # every block but the first, which sees the left padding
        query, key = attention.q_proj[1](block), attention.k_proj[1](block)

        def rotate(states, position):
            first, second = states.chunk(2, -1)
            turned = torch.cat((-second, first), -1)
            return states * cos[:, position] + turned * sin[:, position]

        def score(i, j):
            return (rotate(query, i // 2 * 2) * rotate(key, j // 2 * 2)).sum() * attention.scaling

        logits = weights[0, 0].log()
        for i, j in ((4, 7), (5, 6), (7, 2), (8, 8)):
            expected = score(i, j) - score(i, 3)
            torch.testing.assert_close(logits[i, j] - logits[i, 3], expected, rtol=1e-4, atol=1e-4)


def test_outputs_are_recorded_on_request():
    model = randomize(HKTForSequenceClassification(tiny_config()))
    model.set_attn_implementation("eager")
    input_ids, attention_mask = right_padded_batch([7, 5], 7)
    output = model(
        input_ids,
        attention_mask=attention_mask,
        output_attentions=True,
        output_hidden_states=True,
        output_level_weights=True,
    )
    assert [tuple(t.shape) for t in output.hidden_states] == [(2, 7, 32)] * 3
    assert [tuple(t.shape) for t in output.attentions] == [(2, 4, 7, 7)] * 2
    assert [tuple(t.shape) for t in output.level_weights] == [(4, 3)] * 2
    for attention in output.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 7))
        assert attention[1, :, :, 5:].eq(0).all()
    for weights in output.level_weights:
        assert weights.min() > 0
        torch.testing.assert_close(weights.sum(-1), torch.ones(4))
    plain = model(input_ids, attention_mask=attention_mask)
    assert plain.level_weights is None and plain.attentions is None and plain.hidden_states is None
    assert torch.equal(plain.logits, output.logits)
    assert torch.equal(model(input_ids, attention_mask=attention_mask, return_dict=False)[0], output.logits)
    model.config.return_dict = False
    assert torch.equal(model(input_ids, attention_mask=attention_mask)[0], output.logits)


def test_recording_can_be_asked_for_in_the_config_and_under_checkpointing(tmp_path):
    config = tiny_config(output_level_weights=True, output_hidden_states=True)
    HKTForSequenceClassification(config).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).train()
    model.gradient_checkpointing_enable()
    input_ids, _ = right_padded_batch([7], 7)
    output = model(input_ids)
    assert len(output.level_weights) == 2 and len(output.hidden_states) == 3


@pytest.mark.parametrize(
    ("problem_type", "num_labels"),
    [
        ("regression", 1),
        ("regression", 4),
        ("multi_label_classification", 1),
        ("multi_label_classification", 4),
        ("single_label_classification", 4),
    ],
)
def test_problem_types_and_their_losses(problem_type, num_labels):
    model = randomize(HKTForSequenceClassification(tiny_config(num_labels=num_labels, problem_type=problem_type)))
    input_ids, attention_mask = right_padded_batch([6, 3], 6)
    labels = torch.randint(0, num_labels, (2, num_labels)) if num_labels > 1 else torch.tensor([1.0, 0.0])
    if problem_type == "single_label_classification":
        labels = labels[:, 0]
    elif problem_type == "multi_label_classification":
        labels = labels.reshape(2, num_labels).clamp(max=1).float()
    output = model(input_ids, attention_mask=attention_mask, labels=labels)
    expected = {
        "regression": lambda x: (x.squeeze() - labels).square().mean(),
        "multi_label_classification": lambda x: torch.nn.functional.binary_cross_entropy_with_logits(x, labels),
        "single_label_classification": lambda x: torch.nn.functional.cross_entropy(x, labels),
    }[problem_type](output.logits)
    torch.testing.assert_close(output.loss, expected)


def test_targets_of_a_regression_are_not_rounded_to_half_precision():
    model = randomize(HKTForSequenceClassification(tiny_config(num_labels=1))).bfloat16()
    input_ids, _ = right_padded_batch([6, 6], 6)
    labels = torch.tensor([1000.7, -3333.3])
    output = model(input_ids, labels=labels)
    torch.testing.assert_close(output.loss, (output.logits.float().squeeze() - labels).square().mean())
    assert model(input_ids, labels=torch.tensor([3, 4])).loss.dtype == torch.float32


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_save_and_load_through_the_auto_classes_is_bit_equal(auto_class, tmp_path):
    model = tiny_head(auto_class)
    model.save_pretrained(tmp_path)
    loaded, info = getattr(transformers, auto_class).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded).__name__ == AUTO_CLASSES[auto_class]
    assert not any(info.values()), info
    # A matrix-vector product of PyTorch differs in the last bit with the alignment of a weight in its file.
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    inputs = head_inputs(auto_class, *right_padded_batch([12, 5], 12))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])


def test_config_survives_a_round_trip(tmp_path):
    config = tiny_config(num_levels=2, downsample_type="dense", pooling="last", position_embedding_type="absolute")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, HKTConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_backbone_weights_move_into_a_head_and_missing_parameters_are_initialised(tmp_path):
    """Raw parameters that a file lacks come back in their initial state, not as uninitialised memory."""
    backbone = randomize(HKTModel(tiny_config()))
    state = {name: tensor for name, tensor in backbone.state_dict().items() if "level_logits" not in name}
    state = {name: tensor for name, tensor in state.items() if "downsample" not in name}
    backbone.save_pretrained(tmp_path, state_dict=state)
    loaded = HKTForSequenceClassification.from_pretrained(tmp_path)
    for layer, original in zip(loaded.model.layers, backbone.layers, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, original.mlp.up_proj.weight)
        assert layer.self_attn.level_logits.eq(0).all()
        for downsample in layer.self_attn.downsample:
            assert downsample.weight.eq(1 / loaded.config.downsample_kernel_size).all()
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, backbone.rotary_emb.inv_freq, rtol=0, atol=0)


def test_the_flat_twin_has_a_subset_of_the_parameters():
    flat, deep = (dict(HKTModel(tiny_config(num_levels=n)).named_parameters()) for n in (1, 3))
    assert set(flat) < set(deep)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("field", ["hidden_dropout", "attention_dropout", "classifier_dropout"])
def test_each_dropout_works_alone_and_only_in_training(field, implementation):
    fields = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0, field: 0.5}
    model = randomize(HKTForSequenceClassification(tiny_config(**fields)))
    model.set_attn_implementation(implementation)
    input_ids, _ = right_padded_batch([9], 9)
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, model(input_ids).logits)
        model.train()
        assert not torch.equal(model(input_ids).logits, model(input_ids).logits)


def test_hidden_dropout_follows_embeddings_attention_and_feed_forward():
    model = HKTModel(tiny_config(hidden_dropout=0.1, num_hidden_layers=1)).train()
    inputs = []
    for module in (model.dropout, model.layers[0].dropout):
        module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    outputs = {}
    for name, module in (("attention", model.layers[0].self_attn), ("feed-forward", model.layers[0].mlp)):
        module.register_forward_hook(
            lambda module, args, output, name=name: outputs.update(
                {name: (output[0] if isinstance(output, tuple) else output).detach()}
            )
        )
    input_ids, _ = right_padded_batch([9], 9)
    model(input_ids)
    expected = [model.embed_tokens(input_ids), outputs["attention"], outputs["feed-forward"]]
    assert all(torch.equal(left, right) for left, right in zip(inputs, expected, strict=True))


def test_input_embeddings_are_found():
    model = HKTForSequenceClassification(tiny_config())
    assert model.get_input_embeddings() is model.model.embed_tokens
    model.resize_token_embeddings(50)
    assert model.config.vocab_size == 50
    input_ids, _ = right_padded_batch([9], 9)
    embedded = model(inputs_embeds=model.get_input_embeddings()(input_ids)).logits
    torch.testing.assert_close(embedded, model(input_ids).logits)


@pytest.mark.parametrize(
    ("field", "kwargs"),
    [
        ("hidden_size", {"hidden_size": 30}),
        ("hidden_size", {"hidden_size": "wide"}),
        ("hidden_size", {"hidden_size": 0}),
        ("head_dim", {"head_dim": 0}),
        ("head_dim", {"head_dim": 7}),
        ("num_levels", {"num_levels": 0}),
        ("num_levels", {"num_levels": 8}),
        ("max_position_embeddings", {"num_levels": 8}),
        ("downsample_kernel_size", {"downsample_kernel_size": 0}),
        ("downsample_type", {"downsample_type": "mean"}),
        ("pooling", {"pooling": "max"}),
        ("position_embedding_type", {"position_embedding_type": "alibi"}),
        ("rope_type", {"rope_parameters": {"rope_type": "spiral"}}),
        ("partial_rotary_factor", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("score_symmetry", {"score_symmetry": "odd"}),
        ("hidden_act", {"hidden_act": "gulu"}),
        ("hidden_dropout", {"hidden_dropout": 1.5}),
        ("attention_dropout", {"attention_dropout": -0.1}),
        ("classifier_dropout", {"classifier_dropout": 2.0}),
        ("layer_norm_eps", {"layer_norm_eps": -1.0}),
        ("vocab_size", {"vocab_size": 0}),
        ("pad_token_id", {"pad_token_id": 40}),
        ("norm_placement", {"norm_placement": "sandwich"}),
        ("type_vocab_size", {"type_vocab_size": -1}),
    ],
)
def test_bad_configs_name_the_field(field, kwargs):
    with pytest.raises(Exception, match=field):
        tiny_config(**kwargs)


def test_an_odd_head_is_possible_with_absolute_positions():
    config = tiny_config(hidden_size=36, position_embedding_type="absolute")
    assert config.head_dim == 9 and config.rope_parameters is None
    assert HKTModel(config)(torch.tensor([[5, 6, 7]]))[0].shape == (1, 3, 36)


def test_the_default_config_is_valid_and_of_bert_base_size():
    config = HKTConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_levels, config.head_dim) == (768, 12, 3, 64)


def bad_calls():
    ids = torch.randint(5, 40, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    hole, mixed, both = mask.clone(), mask.clone(), mask.clone()
    hole[0, 3] = 0
    mixed[0, :2], mixed[1, 4:] = 0, 0
    both[0, 0], both[0, 5] = 0, 0
    labels = torch.tensor([0, 3])
    yield "exactly one of `input_ids` and `inputs_embeds`", {}
    yield "exactly one of `input_ids` and `inputs_embeds`", {"input_ids": ids, "inputs_embeds": torch.ones(2, 6, 32)}
    yield r"`input_ids` must lie in \[0, vocab_size\) = \[0, 40\), got 40", {"input_ids": ids.clone().fill_(40)}
    yield r"`input_ids` .* got -1", {"input_ids": ids.clone().fill_(-1)}
    yield "`attention_mask` must have the ones of a row side by side", {"input_ids": ids, "attention_mask": hole}
    yield "`attention_mask` must be padded on one side", {"input_ids": ids, "attention_mask": mixed}
    yield "`attention_mask` must be padded on one side", {"input_ids": ids, "attention_mask": both}
    yield "`attention_mask` must have shape", {"input_ids": ids, "attention_mask": mask[:, :5]}
    yield "`attention_mask` must have shape", {"input_ids": ids, "attention_mask": torch.ones(2, 1, 6, 6)}
    yield "packed sequences can't be pooled", {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    yield "`position_ids` must count", {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 4, 5, 6]])}
    yield "`position_ids` must count", {"input_ids": ids, "position_ids": torch.tensor([[1, 2, 3, 4, 5, 6]])}
    yield r"`labels` must lie in \[0, num_labels\) = \[0, 3\), got 3", {"input_ids": ids, "labels": labels}
    yield r"`labels` .* got -1", {"input_ids": ids, "labels": torch.tensor([0, -1])}
    yield r"`labels` must have shape \(2,\) or \(2, 1\)", {"input_ids": ids, "labels": torch.tensor([0, 1, 2])}
    yield "`input_ids` must have shape", {"input_ids": ids[0]}
    yield "`input_ids` .* length of at least 1", {"input_ids": ids[:, :0]}
    yield "`inputs_embeds` must have shape", {"inputs_embeds": torch.ones(2, 6)}
    yield "`position_ids` must have shape", {"input_ids": ids, "position_ids": torch.arange(6)}
    yield "`is_causal`", {"input_ids": ids, "is_causal": True}
    yield "`token_type_ids` must be all 0 .* got 1", {"input_ids": ids, "token_type_ids": ids.new_ones(2, 6)}
    yield "`token_type_ids` must have shape", {"input_ids": ids, "token_type_ids": ids.new_zeros(2, 5)}


@pytest.mark.parametrize(("message", "kwargs"), list(bad_calls()))
def test_bad_inputs_are_refused_before_any_work(message, kwargs):
    model = HKTForSequenceClassification(tiny_config())
    with pytest.raises(ValueError, match=message):
        model(**kwargs)


@pytest.mark.parametrize(
    ("problem_type", "labels", "message"),
    [
        ("multi_label_classification", torch.tensor([[0, 1, 5], [0, 0, 1]]), r"must lie in \[0, 1\], got 5"),
        ("multi_label_classification", torch.tensor([0, 1]), r"must have shape \(2, 3\) for multi_label"),
        ("regression", torch.tensor([0.5, 1.0]), r"must have shape \(2, 3\) for regression"),
        ("single_label_classification", torch.tensor([0.0, 1.0]), "must be integers"),
    ],
)
def test_labels_that_do_not_fit_the_problem_are_refused(problem_type, labels, message):
    model = HKTForSequenceClassification(tiny_config(problem_type=problem_type))
    with pytest.raises(ValueError, match=f"`labels` {message}"):
        model(torch.randint(5, 40, (2, 6)), labels=labels)


def test_token_types_outside_their_table_are_refused():
    model = HKTModel(tiny_config(type_vocab_size=2))
    for value in (2, -1):
        with pytest.raises(ValueError, match=rf"`token_type_ids` must lie in .* = \[0, 2\), got {value}"):
            model(torch.tensor([[5, 6]]), token_type_ids=torch.tensor([[0, value]]))


@pytest.mark.parametrize("auto_class", sorted(AUTO_CLASSES))
def test_every_class_takes_token_types(auto_class):
    """They matter where there is a table, none means zeros, and zeros pass where there is no table."""
    import hkt_hf

    model_class = getattr(hkt_hf, AUTO_CLASSES[auto_class])
    input_ids, attention_mask = right_padded_batch([9, 4], 9)
    types = torch.arange(9).ge(3).long().expand(2, -1)
    if auto_class == "AutoModelForMultipleChoice":
        input_ids, attention_mask, types = input_ids[:, None], attention_mask[:, None], types[:, None]
    is_decoder = auto_class == "AutoModelForCausalLM"
    model = randomize(model_class(tiny_config(type_vocab_size=2, is_decoder=is_decoder)))
    plain = model(input_ids, attention_mask)[0]
    assert torch.equal(model(input_ids, attention_mask, token_type_ids=types * 0)[0], plain)
    assert (model(input_ids, attention_mask, token_type_ids=types)[0] - plain).abs().amax() > 1e-3
    model = randomize(model_class(tiny_config(is_decoder=is_decoder)))
    assert torch.equal(
        model(input_ids, attention_mask, token_type_ids=types * 0)[0], model(input_ids, attention_mask)[0]
    )


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_post_norm_decoder_with_token_types_generates_what_it_scores(positions):
    config = tiny_config(
        is_decoder=True, norm_placement="post", type_vocab_size=2, position_embedding_type=positions, vocab_size=40
    )
    model = randomize(HKTForCausalLM(config))
    input_ids = torch.randint(5, 40, (2, 7))
    types = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    inputs = {"input_ids": input_ids, "token_type_ids": types, "attention_mask": torch.ones_like(input_ids)}
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    output = model.generate(**inputs, **settings, return_dict_in_generate=True)
    types = torch.cat([types, types[:, -1:].expand(-1, 9)], dim=1)
    with torch.no_grad():
        expected = model(output.sequences, token_type_ids=types).logits[:, 6:-1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_norms_stand_where_the_config_says(placement):
    """Post-norm hidden states are normalised, each of them; of the pre-norm ones only the last is."""
    model = HKTModel(tiny_config(norm_placement=placement)).eval()
    states = model(torch.randint(5, 40, (2, 9)), output_hidden_states=True).hidden_states
    normalised = [
        bool((state.mean(-1).abs() < 1e-5).all() and (state.std(-1) - 1).abs().max() < 0.1) for state in states
    ]
    assert normalised == ([True] * 3 if placement == "post" else [False, False, True])
    # What the FSDP plan names is there.
    modules = {re.sub(r"\.\d+", ".*", name) for name, _ in model.named_modules()}
    assert set(model.config.base_model_fsdp_plan) <= modules
    assert set(HKTModel(HKTConfig.from_dict(model.config.to_dict())).config.base_model_fsdp_plan) <= modules


def test_int32_labels_are_class_labels():
    model = HKTForSequenceClassification(tiny_config())
    input_ids = torch.randint(5, 40, (2, 6))
    labels = torch.tensor([0, 2])
    assert torch.equal(model(input_ids, labels=labels.int()).loss, model(input_ids, labels=labels).loss)


def test_sequences_longer_than_the_position_table():
    input_ids = torch.randint(5, 40, (1, 65))
    with pytest.raises(ValueError, match=r"65 tokens, more than `max_position_embeddings` \(64\)"):
        HKTModel(tiny_config(position_embedding_type="absolute"))(input_ids)
    assert HKTModel(tiny_config(position_embedding_type="rope"))(input_ids)[0].shape == (1, 65, 32)


def test_ignored_labels_and_valid_position_ids_pass():
    model = HKTForSequenceClassification(tiny_config())
    input_ids = torch.randint(5, 40, (2, 6))
    output = model(input_ids, position_ids=torch.arange(6)[None], labels=torch.tensor([1, -100]))
    assert output.loss.isfinite()
    assert torch.equal(output.logits, model(input_ids).logits)


def test_models_can_be_copied_and_built_on_the_meta_device():
    copy.deepcopy(HKTForSequenceClassification(tiny_config()))
    with torch.device("meta"):
        model = HKTForSequenceClassification(tiny_config())
    assert all(parameter.is_meta for parameter in model.parameters())


def test_auto_classes_build_from_a_config():
    assert isinstance(AutoModel.from_config(tiny_config()), HKTModel)
    assert isinstance(AutoModelForSequenceClassification.from_config(tiny_config()), HKTForSequenceClassification)
