"""What vLLM's Transformers backend asks of a model, checked without vLLM.

Source: "Writing custom models" in https://docs.vllm.ai/en/stable/models/supported_models/, and the classes `Base` and
`vllm_attention_forward` in vllm/model_executor/models/transformers. A stand-in plays the server's side: tokens of all
requests in one row without a mask, positions that restart, one attention layer a model layer, flat outputs.
"""

import json

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import POSITIONS, tiny_config, tiny_head
from transformers import AttentionInterface, AutoModel

from hkt_hf import HKTModel
from hkt_hf.modeling.modeling_hkt import AUTO_CLASSES, HKTAttention


class ServerLayer:
    """The attention of one layer over a row of requests, with heads of `head_size` features."""

    def __init__(self, lengths, num_heads, head_size, is_causal):
        self.lengths, self.num_heads, self.head_size, self.is_causal = lengths, num_heads, head_size, is_causal
        self.calls = []

    def __call__(self, query, key, value, scale):
        """`(N, num_heads * head_size)` each, and so the result."""
        self.calls.append((query, key, value))
        parts = []
        for states in zip(*(part.split(self.lengths) for part in (query, key, value)), strict=True):
            heads = [part.unflatten(-1, (self.num_heads, self.head_size)).transpose(0, 1) for part in states]
            output = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=self.is_causal, scale=scale)
            parts.append(output.transpose(0, 1).flatten(1))
        return torch.cat(parts)


def server_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    assert attention_mask is None and query.shape[0] == 1
    flat = (states.squeeze(0).transpose(0, 1).flatten(1) for states in (query, key, value))
    return attention_instances[module.layer_idx](*flat, scale=scaling), None


AttentionInterface.register("server", server_attention)


def serve(model, requests):
    """The model's hidden states for `requests` in one call, as the server makes it; and the server's layers."""
    config = model.config
    lengths = [len(request) for request in requests]
    head_size = config.num_levels * config.head_dim
    layers = {
        index: ServerLayer(lengths, config.num_attention_heads, head_size, config.is_decoder)
        for index in range(config.num_hidden_layers)
    }
    with torch.no_grad():
        (states,) = model(
            input_ids=torch.cat(requests)[None],
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            attention_instances=layers,
            use_cache=False,
            return_dict=False,
        )
    return states[0].split(lengths), layers


def alone(model, request):
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        states = model(request[None], use_cache=False).last_hidden_state[0]
    model.set_attn_implementation(implementation)
    return states


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    positions=st.sampled_from(POSITIONS),
    num_levels=st.integers(1, 4),
    is_decoder=st.booleans(),
)
def test_requests_in_one_row_give_what_each_gives_alone(lengths, positions, num_levels, is_decoder):
    model = tiny_head("AutoModel", position_embedding_type=positions, num_levels=num_levels, is_decoder=is_decoder)
    model.set_attn_implementation("server")
    torch.manual_seed(0)
    requests = [torch.randint(5, 40, (length,)) for length in lengths]
    served, _ = serve(model, requests)
    for states, request in zip(served, requests, strict=True):
        torch.testing.assert_close(states, alone(model, request), rtol=1e-5, atol=1e-5)


def test_the_server_needs_heads_as_wide_as_all_levels():
    """Keys and padded values have `num_levels * head_dim` features, which no field of the configuration says."""
    model = tiny_head("AutoModel")
    model.set_attn_implementation("server")
    _, layers = serve(model, [torch.randint(5, 40, (9,))])
    assert (model.config.num_levels, model.config.head_dim) == (3, 8)
    for layer in layers.values():
        assert len(layer.calls) == 1
        query, key, value = (states.unflatten(-1, (4, 24)) for states in layer.calls[0])
        assert query.shape == key.shape == value.shape == (9, 4, 24)
        assert value[..., :8].ne(0).all() and value[..., 8:].eq(0).all()


@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_request_that_goes_on_is_refused(is_decoder):
    """The server keeps keys and values, but not what the coarser levels are computed from."""
    model = tiny_head("AutoModel", is_decoder=is_decoder)
    model.set_attn_implementation("server")
    for positions in ([[7]], [[4, 5, 6]], [[0, 1, 9]]):
        tokens = torch.full_like(torch.tensor(positions), 5)
        with pytest.raises(ValueError, match="`position_ids` must count 0, 1, 2"):
            model(input_ids=tokens, position_ids=torch.tensor(positions), use_cache=False, attention_instances={})


@pytest.mark.parametrize("is_decoder", [False, True])
def test_attention_modules_say_whether_they_are_causal(is_decoder):
    model = HKTModel(tiny_config(is_decoder=is_decoder))
    flags = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    assert flags == [is_decoder] * 2
    assert all(
        module.layer_idx == i for i, module in enumerate(m for m in model.modules() if isinstance(m, HKTAttention))
    )


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_every_class_declares_the_backend_and_every_checkpoint_names_the_base_model(auto_class, tmp_path):
    model = tiny_head(auto_class)
    assert model.is_backend_compatible()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_hkt.HKTModel"
    # Nothing but the head lies outside the base model.
    attentions = [part for part in model.modules() if isinstance(part, HKTAttention)]
    assert attentions == [layer.self_attn for layer in model.base_model.layers]


def test_the_base_model_is_built_without_memory_and_filled_by_name():
    saved = tiny_head("AutoModel")
    with init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(saved.config, attn_implementation="server")
    assert type(model.get_decoder()) is HKTModel
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    model.load_state_dict(saved.state_dict(), assign=True)
    requests = [torch.randint(5, 40, (length,)) for length in (9, 4)]
    for states, request in zip(serve(model.eval(), requests)[0], requests, strict=True):
        torch.testing.assert_close(states, alone(saved, request), rtol=1e-5, atol=1e-5)


def test_the_classifier_is_found_by_its_name():
    """The server builds the sequence classifier of a checkpoint from its layer `classifier` and the first token."""
    model = tiny_head("AutoModelForSequenceClassification", pooling="cls")
    request = torch.randint(5, 40, (9,))
    with torch.no_grad():
        expected = model(request[None]).logits[0]
        torch.testing.assert_close(model.classifier(model.model(request[None])[0][0, 0]), expected)
    assert isinstance(model, transformers.PreTrainedModel) and isinstance(model.classifier, torch.nn.Linear)
