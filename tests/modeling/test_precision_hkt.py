"""Half precision and gradient checkpointing: finite, and the numbers of float32.

Tolerances: hidden states (after a layer norm, of magnitude up to 4) differ from float32 by at most 0.02 in float16 and
0.1 in bfloat16, weights or autocast; each of 20 losses by at most 0.01 and 0.05. Checkpointed gradients are equal.
"""

import copy

import pytest
import torch
from tiny_models import IMPLEMENTATIONS, left_padded, randomize, right_padded_batch, tiny_config

from hkt_hf import HKTForCausalLM, HKTForSequenceClassification, HKTModel


STATE_TOLERANCE = {"float16": 0.02, "bfloat16": 0.1, "autocast": 0.1}
LOSS_TOLERANCE = {"float16": 0.01, "bfloat16": 0.05, "autocast": 0.05}


def in_precision(model, precision):
    """A copy with such weights, and the context in which it runs."""
    model = copy.deepcopy(model)
    if precision in ("float16", "bfloat16"):
        model = model.to(getattr(torch, precision))
    return model, torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")


@pytest.mark.parametrize("num_levels", [1, 2, 3, 4])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("precision", STATE_TOLERANCE)
def test_half_precision_is_close_to_float32(precision, implementation, num_levels):
    for is_decoder in (False, True):
        model = randomize(HKTModel(tiny_config(num_levels=num_levels, is_decoder=is_decoder)))
        model.set_attn_implementation(implementation)
        half, context = in_precision(model, precision)
        right = right_padded_batch([19, 8, 1], 19)
        for input_ids, attention_mask in (right, left_padded(*right)):
            with torch.no_grad():
                expected = model(input_ids, attention_mask=attention_mask).last_hidden_state[attention_mask == 1]
                with context:
                    output = half(input_ids, attention_mask=attention_mask, output_level_weights=True)
            states = output.last_hidden_state[attention_mask == 1]
            if precision != "autocast":
                assert states.dtype == getattr(torch, precision)
            torch.testing.assert_close(states.float(), expected, rtol=0, atol=STATE_TOLERANCE[precision])
            assert all(weights.dtype == torch.float32 for weights in output.level_weights)


@pytest.mark.parametrize("num_levels", [1, 2, 3, 4])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("left", [False, True])
def test_training_in_half_precision_follows_float32(left, implementation, num_levels):
    torch.manual_seed(0)
    model = HKTForSequenceClassification(tiny_config(num_levels=num_levels, initializer_range=0.1)).train()
    model.set_attn_implementation(implementation)
    batch = right_padded_batch([19, 8, 1, 12, 5, 0], 19)  # one row of padding alone
    input_ids, attention_mask = left_padded(*batch) if left else batch
    labels = torch.arange(6) % 3

    def losses(precision):
        trained, context = in_precision(model, precision)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.02, momentum=0.9)
        result = []
        for _ in range(20):
            optimizer.zero_grad()
            with context:
                loss = trained(input_ids, attention_mask=attention_mask, labels=labels).loss
            loss.backward()
            assert all(parameter.grad.isfinite().all() for parameter in trained.parameters())
            optimizer.step()
            result.append(loss.item())
        return torch.tensor(result)

    expected = losses("float32")
    assert expected[-1] < 0.7 * expected[0]
    for precision, tolerance in LOSS_TOLERANCE.items():
        torch.testing.assert_close(losses(precision), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model_class", [HKTForSequenceClassification, HKTForCausalLM])
def test_gradient_checkpointing_gives_the_same_gradients(model_class, implementation, use_reentrant):
    """With dropout: the second forward of a layer draws what the first drew."""
    config = tiny_config(is_decoder=model_class is HKTForCausalLM, hidden_dropout=0.1, attention_dropout=0.1)
    model = randomize(model_class(config)).train()
    model.set_attn_implementation(implementation)
    input_ids, attention_mask = left_padded(*right_padded_batch([9, 4], 9))
    labels = input_ids if model_class is HKTForCausalLM else torch.tensor([0, 2])
    runs = []
    forwards = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: forwards.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(input_ids, attention_mask=attention_mask, labels=labels).loss
        loss.backward()
        runs.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert len(forwards) == 3  # one without, two with
    for plain, checkpointed in zip(*runs, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)
