"""`score_symmetry`: symmetric and PSD scores by construction, whatever training does."""

import copy

import pytest
import torch
from tiny_models import POSITIONS, randomize, tiny_config

from hkt_hf.modeling import HKTForSequenceClassification, HKTModel
from hkt_hf.modeling.modeling_hkt import HKTAttention, HKTForCausalLM


SYMMETRIES = ["symmetric", "psd"]


def score_matrices(model, dtype=None):
    """Scores `(B, H, T_l, T_l)` of all layers and levels on random tokens, in the dtype of the model."""
    found = []

    def keep(module, arguments, options):
        hidden_states = arguments[0] if arguments else options["hidden_states"]
        positions = options["position_embeddings"]
        for level, features in enumerate(module.levels(hidden_states)):
            query, key = module.queries_and_keys(features, level, None if positions is None else positions[level])
            found.append((query.double() @ key.double().transpose(-1, -2)) * module.scaling)

    hooks = [layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=torch.randint(5, 40, (2, 21)))
    for hook in hooks:
        hook.remove()
    return found


def trained(model):
    """The model after some steps with a large learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(5):
        model(input_ids=torch.randint(5, 40, (4, 21)), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_the_constraint_holds_through_training_saving_and_half_precision(symmetry, bias, share, positions, tmp_path):
    config = tiny_config(
        score_symmetry=symmetry,
        attention_bias=bias,
        share_level_projections=share,
        position_embedding_type=positions,
        num_labels=2,
    )
    model = trained(randomize(HKTForSequenceClassification(config)).train())
    model.save_pretrained(tmp_path)
    reloaded = HKTForSequenceClassification.from_pretrained(tmp_path)
    assert reloaded.config.score_symmetry == symmetry
    for each, tolerance in ((model, 1e-6), (reloaded, 1e-6), (copy.deepcopy(reloaded).bfloat16(), 1e-2)):
        for scores in score_matrices(each):
            largest = scores.abs().max()
            assert (scores - scores.transpose(-1, -2)).abs().max() <= tolerance * largest
            eigenvalues = torch.linalg.eigvalsh((scores + scores.transpose(-1, -2)) / 2)
            if symmetry == "psd":
                assert eigenvalues.min() >= -1e-6 * eigenvalues.max()


def test_symmetric_scores_need_not_be_positive():
    model = randomize(HKTForSequenceClassification(tiny_config(score_symmetry="symmetric")))
    for layer in model.model.layers:
        layer.self_attn.key_factors.data[:, :, 0] = -5.0
    assert min(torch.linalg.eigvalsh(scores).min() for scores in score_matrices(model)) < -1e-3


def test_what_each_constraint_trains():
    """Keys are derived, not projected: fewer parameters, and none that is never used."""
    names = {}
    for symmetry in ("none", *SYMMETRIES):
        attention = HKTAttention(tiny_config(score_symmetry=symmetry), 0)
        names[symmetry] = {name.split(".")[0]: tuple(value.shape) for name, value in attention.named_parameters()}
    assert "k_proj" in names["none"] and "key_factors" not in names["none"]
    assert "k_proj" not in names["symmetric"]
    assert names["symmetric"]["key_factors"] == (3, 4, 4)  # levels, heads, pairs
    assert names["psd"].keys() == names["none"].keys() - {"k_proj"}
    absolute = HKTAttention(tiny_config(score_symmetry="symmetric", position_embedding_type="absolute"), 0)
    assert absolute.key_factors.shape == (3, 4, 8)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_all_implementations_agree(symmetry, positions):
    model = randomize(HKTModel(tiny_config(score_symmetry=symmetry, position_embedding_type=positions)))
    input_ids = torch.randint(5, 40, (2, 19))
    with torch.no_grad():
        outputs = []
        for implementation in ("eager", "sdpa", "polyphase"):
            model.set_attn_implementation(implementation)
            outputs.append(model(input_ids).last_hidden_state)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_a_decoder_continues_from_its_cache(symmetry):
    model = randomize(HKTForCausalLM(tiny_config(score_symmetry=symmetry, is_decoder=True)))
    input_ids = torch.randint(5, 40, (2, 13))
    with torch.no_grad():
        whole = model(input_ids, use_cache=False).logits
        first = model(input_ids[:, :6], use_cache=True)
        rest = model(input_ids[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)
