"""The instruments of `hkt analyze`: identities to rounding, verdicts on constructed cases, errors."""

import base64
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from sklearn.datasets import load_iris
from tiny_models import POSITIONS, randomize, right_padded_batch, tiny_config
from torch import nn
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertAttention, BertSelfAttention

from hkt_hf.analysis import (
    GaussianityCallback,
    approximation_report,
    as_causal_convolution,
    as_standard_attention,
    constructions,
    decay_rates,
    directional_report,
    gaussianity_report,
    kernel_report,
    mardia_test,
)
from hkt_hf.analysis.approximation import divergence
from hkt_hf.analysis.constructions import log_odds_shift
from hkt_hf.analysis.directions import forward_share, recombined, split
from hkt_hf.analysis.gaussianity import head_vectors
from hkt_hf.analysis.kernels import HOLDS, bilinear_forms, symmetric_spectrum
from hkt_hf.analysis.maps import attention_maps, focus_report
from hkt_hf.analysis.page import write_page
from hkt_hf.analysis.scores import sequence_scores, spread
from hkt_hf.cli import main
from hkt_hf.modeling import HKTForCausalLM, HKTForSequenceClassification, HKTModel
from hkt_hf.modeling.modeling_hkt import HKTAttention


REPORTS = [kernel_report, directional_report, approximation_report, gaussianity_report, focus_report]


def model_of(**fields):
    return randomize(HKTForSequenceClassification(tiny_config(num_labels=2, **fields)))


def batch_of(lengths=(21, 40, 13), total=40):
    input_ids, attention_mask = right_padded_batch(list(lengths), total)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


# Scores


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("is_left", [False, True])
def test_scores_are_those_of_the_model(positions, is_left):
    """A softmax of the combined scores gives the attention weights that the model returns, padding cut off."""
    model = model_of(position_embedding_type=positions).double()
    model.set_attn_implementation("eager")
    batch = batch_of()
    if is_left:
        shifts = (batch["attention_mask"] == 0).sum(1).tolist()
        batch = {
            name: torch.stack([row.roll(shift) for row, shift in zip(rows, shifts, strict=True)])
            for name, rows in batch.items()
        }
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    found = list(sequence_scores(model, batch))
    assert [(each.layer, each.sequence, each.length) for each in found] == [
        (layer, sequence, length) for layer in (0, 1) for sequence, length in enumerate((21, 40, 13))
    ]
    for each in found:
        real = batch["attention_mask"][each.sequence].bool()
        wanted = attentions[each.layer][each.sequence][:, real][:, :, real]
        torch.testing.assert_close(each.attention(each.scores()), wanted, rtol=0, atol=1e-10)


def test_a_decoder_sees_the_past_alone():
    model = randomize(HKTForCausalLM(tiny_config(is_decoder=True)))
    (first, *_) = sequence_scores(model, {"input_ids": torch.randint(5, 40, (1, 9))})
    assert first.attention(first.scores()).triu(1).abs().max() == 0
    assert all(entry["bound_holds"] for entry in approximation_report(model, batch_of()))


@pytest.mark.parametrize("report", REPORTS)
def test_the_model_is_left_as_it_was(report):
    model = model_of().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report(model, batch_of())
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Prop. 3.1: kernels


@pytest.mark.parametrize("positions", POSITIONS)
def test_psd_scores_hold_by_construction(positions):
    report = kernel_report(model_of(score_symmetry="psd", position_embedding_type=positions), batch_of())
    assert {entry["verdict"] for entry in report} == {HOLDS}
    assert all(entry["min_eigenvalue"] >= -1e-6 * entry["max_eigenvalue"] for entry in report)
    assert len(report) == 2 * 4 * (3 + 1)


def test_unconstrained_scores_are_indefinite():
    assert {entry["verdict"] for entry in kernel_report(model_of(position_embedding_type="absolute"), batch_of())} == {
        "condition fails"
    }
    report = kernel_report(model_of(position_embedding_type="rope"), batch_of())
    assert {entry["verdict"] for entry in report if entry["level"] != "combined"} == {"undecided by the projections"}
    assert {entry["verdict"] for entry in report if entry["level"] == "combined"} == {"indefinite"}


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(0, 8), st.integers(0, 2**32 - 1))
def test_half_the_eigenvalues_of_independent_projections_are_negative(head_dim, more, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, head_dim, 2 * head_dim + more, generator=generator, dtype=torch.float64)
    eigenvalues = symmetric_spectrum(query, key)
    assert len(eigenvalues) == 2 * head_dim and (eigenvalues < 0).sum() == head_dim


def test_scores_can_be_psd_although_the_condition_fails():
    """A form with a negative eigenvalue in a direction that no feature has."""
    model = model_of(position_embedding_type="absolute", num_levels=1, norm_placement="post", num_hidden_layers=1)
    with torch.no_grad():
        model.model.embed_norm.weight[0] = model.model.embed_norm.bias[0] = 0.0  # feature 0 is always zero
        attention = model.model.layers[0].self_attn
        attention.k_proj[0].weight.copy_(attention.q_proj[0].weight)
        attention.k_proj[0].weight[:, 0] *= -1
    report = kernel_report(model, batch_of())
    assert {entry["verdict"] for entry in report if entry["level"] == 0} == {"condition fails"}
    assert {entry["verdict"] for entry in report if entry["level"] == "combined"} == {
        "PSD although the condition fails"
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("symmetry", ["none", "symmetric", "psd"])
def test_bilinear_forms_give_the_scores(symmetry, bias):
    attention = randomize(
        HKTAttention(tiny_config(score_symmetry=symmetry, attention_bias=bias, position_embedding_type="absolute"), 0)
    ).double()
    features = torch.randn(1, 7, 32, dtype=torch.double)
    appended = torch.cat([features, torch.ones(1, 7, 1)], -1) if bias else features
    for level in range(3):
        query, key = bilinear_forms(attention, level)
        form = query.transpose(-1, -2) @ key
        wanted = torch.einsum("bid,hde,bje->bhij", appended, form, appended)
        query_states, key_states = attention.queries_and_keys(features, level)
        torch.testing.assert_close(query_states @ key_states.transpose(-1, -2), wanted, rtol=0, atol=1e-10)
        # The spectrum without the zeros that the rank forces.
        whole = torch.linalg.eigvalsh((form + form.transpose(-1, -2)) / 2)
        reduced = symmetric_spectrum(query, key)
        for head in range(4):
            padded = torch.cat([reduced[head], torch.zeros(whole.shape[1] - reduced.shape[1])]).sort().values
            torch.testing.assert_close(padded, whole[head], rtol=0, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 40),
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_upsampling_and_convex_mixing_keep_psd(length, weights, seed):
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(length, length, dtype=torch.double)
    for level, weight in enumerate(weights):
        blocks = -(-length // 2**level)
        factor = torch.randn(blocks, 3, generator=generator, dtype=torch.double)
        total += weight / sum(weights) * spread(factor @ factor.T, level, length)
    eigenvalues = torch.linalg.eigvalsh(total)
    assert eigenvalues[0] >= -1e-10 * max(1.0, eigenvalues[-1].item())


# Props. 3.5 and 3.6: directions


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_decomposition_is_unique_and_recombines(positions):
    model = model_of(position_embedding_type=positions)
    for scores in sequence_scores(model, batch_of()):
        combined = scores.scores()
        assert (recombined(scores) - combined).abs().max() <= 1e-10 * combined.abs().max()
        symmetric, antisymmetric = split(combined)
        assert torch.equal(symmetric, symmetric.transpose(-1, -2))
        assert torch.equal(antisymmetric, -antisymmetric.transpose(-1, -2))
        # Orthogonal parts, so there is no other way to write the sum.
        assert abs((symmetric * antisymmetric).sum()) <= 1e-10 * combined.square().sum()
    for entry in directional_report(model, batch_of()):
        assert 0 <= entry["directional_ratio"] <= 1
        assert entry.get("recombination_error", 0.0) <= 1e-10


def test_directions_of_known_scores():
    for symmetry in ("symmetric", "psd"):
        for entry in directional_report(model_of(score_symmetry=symmetry), batch_of()):
            assert entry["directional_ratio"] < 1e-7 and entry["looks"] == "both ways"


def test_which_way_scores_look():
    positions = torch.arange(9, dtype=torch.double)
    later = (positions - positions[:, None]).expand(1, 9, 9)
    distance = -later.abs()
    for scores, wanted in ((later, 1), (-later, -1), (distance, 0), (distance + later, 1)):
        share = forward_share(scores).mean().item()
        assert abs(share) < 1e-12 if wanted == 0 else share * wanted > 0.1
    assert forward_share(20 * later)[0, 0] == pytest.approx(1) and forward_share(-20 * later)[0, 8] == pytest.approx(
        -1
    )


# Approximation


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 24), scale=st.floats(0.01, 20), seed=st.integers(0, 2**16))
def test_kl_is_its_parts(length, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    target, approximation = scale * torch.randn(2, 3, length, length, generator=generator, dtype=torch.double)
    found = divergence(target, approximation)
    torch.testing.assert_close(found["gaussian"] + found["non_gaussian"], found["kl"], rtol=0, atol=1e-10)
    p = target.softmax(-1)
    difference = target - approximation
    series = (p * difference).sum(-1) + torch.log((p * torch.exp(-difference)).sum(-1))
    torch.testing.assert_close(found["kl"], series, rtol=1e-8, atol=1e-10)
    assert (found["kl"] >= -1e-12).all()


def test_the_series_converges_for_small_differences():
    target = torch.randn(5, 16, 16, dtype=torch.double)
    difference = 0.05 * torch.randn(5, 16, 16, dtype=torch.double)
    found = divergence(target, target - difference)
    terms = found["gaussian"] + found["third_cumulant_term"] + found["fourth_cumulant_term"]
    assert ((terms - found["kl"]).abs() <= 1e-3 * found["kl"]).all()
    assert ((found["gaussian"] - found["kl"]).abs() <= 0.2 * found["kl"]).all()


@settings(max_examples=10, deadline=None)
@given(num_levels=st.integers(1, 4), is_decoder=st.booleans(), seed=st.integers(0, 100))
def test_the_bound_holds_on_every_row(num_levels, is_decoder, seed):
    torch.manual_seed(seed)
    model = randomize(HKTModel(tiny_config(num_levels=num_levels, is_decoder=is_decoder)))
    report = approximation_report(model, batch_of())
    assert all(entry["bound_holds"] for entry in report)
    for entry in report:
        assert entry["kl"] == pytest.approx(entry["truncation"], abs=1e-12)
        if entry["num_levels"] == num_levels:
            assert entry["kl"] == pytest.approx(0.0, abs=1e-12) and entry["truncation_bound"] == 0


def test_a_bound_that_is_too_small_is_seen(monkeypatch):
    monkeypatch.setattr(
        "hkt_hf.analysis.approximation.truncation_bound",
        lambda scores, num_levels: torch.zeros(scores.queries[0].shape[:2], dtype=torch.double),
    )
    report = approximation_report(model_of(), batch_of())
    assert not any(entry["bound_holds"] for entry in report if entry["num_levels"] < 3)


def test_references():
    model, flat, batch = model_of(), model_of(num_levels=1), batch_of()
    by_model = approximation_report(model, batch, reference=flat)
    scores = torch.full((2, 3, 4, 40, 40), torch.nan, dtype=torch.double)
    for each in sequence_scores(flat, batch):
        scores[each.layer, each.sequence, :, : each.length, : each.length] = each.scores()
    by_tensor = approximation_report(model, batch, reference=scores)
    own = approximation_report(model, batch)
    for first, second, third in zip(by_model, by_tensor, own, strict=True):
        assert first == second
        assert first["truncation"] == third["truncation"] and first["kl"] != third["kl"]
    for reference, error in (
        (scores[:1], ValueError),
        (scores[..., :5], ValueError),
        (scores[0], TypeError),
        (3, TypeError),
    ):
        with pytest.raises(error, match="`reference` must"):
            approximation_report(model, batch, reference=reference)


def test_decay_rates_of_a_known_series():
    report = [
        {"layer": 0, "head": head, "num_levels": levels, "truncation": 3 * rate**levels * (levels < 5)}
        for head, rate in enumerate((0.5, 0.25))
        for levels in range(1, 6)
    ]
    rates = decay_rates(report)
    assert [entry["rate"] for entry in rates] == pytest.approx([0.5, 0.25]) and rates[0]["points"] == 4
    assert decay_rates(report[:1])[0]["rate"] is None


# Gaussianity


def test_mardia_on_fishers_irises():
    """Published values, of the R package MVN on the 50 setosa: 25.6643 (skewness, p 0.177), 1.2950 (kurtosis, p 0.195).

    MVN takes the asymptotic kurtosis and no correction of the skewness.
    """
    found = mardia_test(load_iris().data[:50])
    n, p = 50, 4
    assert found.num_samples == n and found.width == p
    assert n * found.skewness / 6 == pytest.approx(25.66434, abs=1e-5)
    assert (found.kurtosis - p * (p + 2)) / math.sqrt(8 * p * (p + 2) / n) == pytest.approx(1.294992, abs=1e-6)
    assert stats.chi2.sf(n * found.skewness / 6, 20) == pytest.approx(0.1771859, abs=1e-6)


def test_mardia_p_values_are_uniform_for_gaussian_samples():
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(4, 4))
    found = [mardia_test(generator.normal(size=(400, 4)) @ mix + 3) for _ in range(400)]
    for key in ("skewness_p_value", "kurtosis_p_value"):
        assert stats.kstest([getattr(each, key) for each in found], "uniform").pvalue > 0.01, key


def test_mardia_rejects_what_is_not_gaussian():
    generator = np.random.default_rng(0)
    student = generator.standard_t(4, size=(500, 4))
    mixture = generator.normal(size=(500, 4)) + 4 * (generator.random((500, 1)) < 0.15)
    assert mardia_test(student).kurtosis_p_value < 1e-6 and mardia_test(student).excess > 0
    assert mardia_test(mixture).skewness_p_value < 1e-6


def test_kurtosis_at_width_16_is_near_288():
    found = mardia_test(np.random.default_rng(0).normal(size=(4000, 16)))
    assert found.expected_kurtosis == 288 and abs(found.excess) < 3


@pytest.mark.parametrize(
    "samples, message",
    [
        (np.zeros(5), "must be"),
        (np.zeros((1, 3)), "at least 5 of width 3"),
        (np.zeros((9, 3)), "subspace"),
        (np.full((9, 3), np.nan), "finite"),
    ],
)
def test_bad_samples_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        mardia_test(samples)


def test_gaussianity_of_too_few_blocks_says_where():
    with pytest.raises(ValueError, match=r"layer 0, head 0, level 1, keys.*larger `batch`"):
        gaussianity_report(model_of(), {"input_ids": torch.randint(5, 40, (1, 11))})


def test_gaussianity_of_few_different_vectors_is_that_of_their_span():
    """With rotary positions and six different tokens, the first layer has vectors in five dimensions of eight."""
    model = model_of(position_embedding_type="rope")
    batch = {"input_ids": torch.randint(5, 11, (2, 40), generator=torch.Generator().manual_seed(0))}
    report = [entry for entry in gaussianity_report(model, batch) if entry["level"] == 0]
    assert {(entry["layer"], entry["width"]) for entry in report} == {(0, 5), (1, 8)}
    ((_, vectors), *_) = head_vectors(model, batch).items()
    rotated = vectors @ np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    _, directions = np.linalg.eigh(np.cov(rotated, rowvar=False))
    assert report[0]["kurtosis"] == pytest.approx(mardia_test(rotated @ directions[:, 3:]).kurtosis, rel=1e-6)


def test_the_callback_records_each_epoch(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, batch = model_of(), batch_of()
    data = [{"input_ids": [5 + i % 20, 7, 9], "labels": i % 2} for i in range(8)]
    arguments = TrainingArguments(
        tmp_path / "run",
        num_train_epochs=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    callback = GaussianityCallback(batch, tmp_path / "gaussianity.json")
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    history = json.loads((tmp_path / "gaussianity.json").read_text())
    assert [(entry["epoch"], entry["step"]) for entry in history] == [(0.0, 0), (1.0, 2), (2.0, 4)]
    assert len(history[0]["report"]) == 2 * 4 * 3 * 2
    assert history[0]["report"] != history[2]["report"]


# Prop. 3.4: constructions


@pytest.mark.parametrize("num_levels", [1, 3])
def test_hkt_attention_is_bert_attention(num_levels):
    config = BertConfig(hidden_size=32, num_attention_heads=4)
    config._attn_implementation = "eager"
    hidden_states = torch.randn(2, 17, 32)
    own = BertSelfAttention(config).eval()
    whole = BertAttention(config).eval()
    torch_own = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    without_bias = nn.MultiheadAttention(32, 4, batch_first=True, bias=False).eval()
    with torch.no_grad():
        for module, wanted in (
            (own, own(hidden_states)[0]),
            (whole, whole.output.dense(whole.self(hidden_states)[0])),
            (torch_own, torch_own(hidden_states, hidden_states, hidden_states)[0]),
            (without_bias, without_bias(hidden_states, hidden_states, hidden_states)[0]),
        ):
            found = as_standard_attention(module, num_levels)(hidden_states)[0]
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    taps=st.integers(1, 8),
    dilation=st.integers(1, 3),
    is_depthwise=st.booleans(),
    length=st.integers(1, 64),
)
def test_hkt_attention_is_a_causal_convolution(channels, taps, dilation, is_depthwise, length):
    in_channels, out_channels = channels
    groups = in_channels if is_depthwise else 1
    convolution = nn.Conv1d(in_channels, groups * out_channels, taps, dilation=dilation, groups=groups)
    hidden_states = torch.randn(2, length, in_channels)
    padded = nn.functional.pad(hidden_states.transpose(1, 2), ((taps - 1) * dilation, 0))
    with torch.no_grad():
        found = as_causal_convolution(convolution, max_length=64)(hidden_states)
        torch.testing.assert_close(found, convolution(padded).transpose(1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("in_channels", [1, 2])
def test_long_inputs_of_few_channels_are_convolved_exactly(in_channels, dtype, monkeypatch):
    """710 tokens are 113 turns of the fastest rotary frequency, but for 2e-9 of one: with that alone they would be one."""
    convolution = nn.Conv1d(in_channels, 2, 3, dtype=dtype)
    hidden_states = torch.randn(1, 1024, in_channels, dtype=dtype)
    padded = nn.functional.pad(hidden_states.transpose(1, 2), (2, 0))
    with torch.no_grad():
        found = as_causal_convolution(convolution, max_length=1024)(hidden_states)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(found, convolution(padded).transpose(1, 2), rtol=0, atol=tolerance)
    monkeypatch.setattr(constructions, "MIN_HEAD_DIM", 2)
    with pytest.raises(ValueError, match=r"`max_length` \(1024\) .* too little for float32"):
        as_causal_convolution(convolution, max_length=1024)


def test_constructions_refuse_what_they_can_not_do():
    with pytest.raises(TypeError, match=r"must be an nn\.Conv1d, got Linear"):
        as_causal_convolution(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="stride 1, got 2"):
        as_causal_convolution(nn.Conv1d(3, 3, 2, stride=2))
    with pytest.raises(ValueError, match="`max_length` must be at least 1"):
        as_causal_convolution(nn.Conv1d(3, 3, 2), max_length=0)
    with pytest.raises(ValueError, match="at most 8"):
        as_causal_convolution(nn.Conv1d(3, 3, 2), max_length=8)(torch.zeros(1, 9, 3))
    with pytest.raises(TypeError, match="got Linear"):
        as_standard_attention(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="`add_bias_kv`"):
        as_standard_attention(nn.MultiheadAttention(8, 2, add_bias_kv=True))


def test_flat_attention_can_not_do_what_hkt_does():
    """Log-odds of two keys move with a fourth token: never in flat attention, by nats in HKT."""
    torch.manual_seed(0)
    fields = {"num_attention_heads": 1, "position_embedding_type": "absolute"}
    hidden_states = torch.randn(1, 12, 32, dtype=torch.double)
    changed = hidden_states.clone()
    changed[:, 3] += 1.0  # the neighbour of key 4 that its block at level 1 sees
    for num_levels, moves in ((1, False), (3, True)):
        attention = randomize(HKTAttention(tiny_config(num_levels=num_levels, **fields), 0)).double()
        shift = log_odds_shift(attention, hidden_states, changed, (8, 4, 10))
        assert (shift > 1e-3) if moves else (shift == 0)
    with pytest.raises(ValueError, match="must agree"):
        log_odds_shift(attention, hidden_states, changed, (8, 3, 10))


# Maps


def test_focus_of_even_and_of_sharp_attention():
    model = model_of(position_embedding_type="absolute")
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in layer.self_attn.q_proj:
                linear.weight.zero_()
    for entry in focus_report(model, batch_of()):
        assert entry["relative_entropy"] == pytest.approx(1.0) and entry["relative_distance"] == pytest.approx(1.0)
    weights = [entry["level_weight"] for entry in focus_report(model, batch_of()) if entry["level"] != "combined"]
    assert sum(weights) == pytest.approx(2 * 4)


def test_maps_are_rows_of_attention():
    model, batch = model_of(), batch_of()
    maps = attention_maps(model, batch, sequence=2)
    assert maps.weights.shape == (2, 4, 4, 13, 13) and maps.level_names == [
        "level 0",
        "level 1",
        "level 2",
        "combined",
    ]
    np.testing.assert_allclose(maps.weights.sum(-1), 1.0)
    np.testing.assert_allclose(maps.level_weights.sum(-1), 1.0)
    with pytest.raises(ValueError, match="`tokens` must name the 13 tokens"):
        attention_maps(model, batch, tokens=["a"], sequence=2)
    with pytest.raises(ValueError, match="`sequence` must be one of the batch"):
        attention_maps(model, batch, sequence=3)


def test_the_page_holds_the_maps_and_no_markup_of_tokens(tmp_path):
    maps = attention_maps(model_of(), batch_of(), tokens=["</script>", "<b>", "é", *map(str, range(10))], sequence=2)
    write_page(maps, tmp_path / "page.html", "a <title>")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<title>a &lt;title&gt;</title>" in text and text.count("</script>") == 2
    assert not re.search(r"(src|href|url)\s*[=(]|https?:|import", text)  # nothing to fetch
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    assert data["tokens"][:3] == ["</script>", "<b>", "é"] and data["levels"][-1] == "combined"
    steps = np.frombuffer(base64.b64decode(data["weights"]), dtype=np.uint8).reshape(maps.weights.shape)
    largest = np.array(data["largest"]).reshape(maps.weights.shape[:3])
    np.testing.assert_allclose(steps / 255 * largest[..., None, None], maps.weights, atol=0.003)
    assert np.array(data["entropy"]).reshape(2, 4, 4)[0, -1, 0] == pytest.approx(
        np.mean([stats.entropy(row) for row in maps.weights[0, -1, 0]]), rel=1e-4
    )


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MOVE_AND_POINT = """<script>
for (const [name, value] of [["layer", 1], ["head", 2], ["level", 0]]) {
  const slider = document.getElementById(name);
  slider.value = value;
  slider.dispatchEvent(new Event("input"));
}
const box = canvas.getBoundingClientRect(), at = index => margin + (index + 0.5) * cell;
canvas.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + at(2), clientY: box.top + at(1)}));
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_sliders_and_pointer_work_in_a_browser(tmp_path):
    maps = attention_maps(model_of(), batch_of(), [f"t{position}" for position in range(21)])
    write_page(maps, tmp_path / "page.html", "a page")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    (tmp_path / "moved.html").write_text(page.replace("</body>", MOVE_AND_POINT), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [CHROMIUM, *options, (tmp_path / "moved.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.findall(r"<output>(.*?)</output>", shown) == ["1", "2", "level 0"]
    mix = ", ".join(f"level {level}: {weight:.3f}" for level, weight in enumerate(maps.level_weights[1, 2]))
    assert mix in shown
    (pointed,) = re.findall(r'query 1 "t1" to key 2 "t2": ([\d.]+)', shown)
    assert float(pointed) == pytest.approx(maps.weights[1, 0, 2, 1, 2], abs=0.003)


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps of ListOps."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    words = ["--output_dir", str(folder), "--tokenizer.max_length", "40"]
    words += [
        "--data.listops",
        '{"min_length": 20, "max_length": 40, "num_train": 32, "num_validation": 16, "num_test": 8}',
    ]
    words += [
        "--model",
        '{"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}',
    ]
    words += ["--training.max_steps", "2", "--training.disable_tqdm", "true"]
    assert main(["train", "listops-hkt-tiny", *words]) == 0
    return folder


def test_the_command_measures_and_draws(run, capsys):
    assert main(["analyze", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "| layer | level |" in printed and "which holds on every row" in printed
    out = run / "analysis"
    found = json.loads((out / "analysis.json").read_text())
    assert {"kernel", "directional", "approximation", "gaussianity", "focus", "decay_rates", "versions"} <= set(found)
    assert found["command"] == f"hkt analyze {run}"
    assert len(found["kernel"]) == 2 * 2 * 4 and np.shape(found["level_weights"]) == (2, 2, 3)
    plots = {path.name for path in out.glob("*.png")}
    assert plots == {
        *("attention.png", "directional_ratio.png", "distance.png", "entropy.png", "gaussianity.png"),
        *("level_weights.png", "truncation.png"),
    }
    for name in plots:
        with Image.open(out / name) as image:
            assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 10, name
    assert "tiny" in (out / "attention.html").read_text()


def test_the_command_shows_a_given_text(run, tmp_path):
    out = tmp_path / "out"
    assert main(["analyze", str(run), "--text", "[MAX 2 9 [MIN 4 7 ] 0 ]", "--examples", "8", "--out", str(out)]) == 0
    assert '["[MAX", "2", "9", "[MIN", "4", "7", "]", "0", "]"]' in (out / "attention.html").read_text()
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    "words, message",
    [(["--examples", "0"], "`num_examples` must be at least 1"), (["--text", ""], "must hold at least one token")],
)
def test_the_command_refuses_before_it_writes(run, words, message, tmp_path, capsys):
    assert main(["analyze", str(run), *words, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["analyze", str(tmp_path / "nothing")]) == 1


# Errors


@pytest.mark.parametrize("report", REPORTS)
def test_what_can_not_be_analysed_is_refused(report):
    model, batch = model_of(), batch_of()
    bert = BertModel(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8))
    with pytest.raises(TypeError, match="`model` must be an HKT model, got BertModel"):
        report(bert, batch)
    with pytest.raises(ValueError, match="real tokens"):
        report(model, {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])})
    with pytest.raises(TypeError, match="`batch` must be a mapping"):
        report(model, batch["input_ids"])
    with pytest.raises(ValueError, match="`input_ids` or `inputs_embeds`"):
        report(model, {"attention_mask": batch["attention_mask"]})
    model.model.layers[1].self_attn.q_proj[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj\.0\.weight that are not finite"):
        report(model, batch)
