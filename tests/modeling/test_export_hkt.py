"""`torch.compile`, `torch.export` and ONNX: one graph for every batch size and length, with the numbers of eager code.

Tolerances, absolute and relative: compiled and exported programs 1e-5, ONNX 1e-4, gradients 1e-4, all in float32.
"""

import shutil

import numpy
import onnxruntime
import pytest
import torch
from tiny_models import head_inputs, left_padded, randomize, right_padded_batch, tiny_config, tiny_head
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.export import Dim

from hkt_hf import HKTForCausalLM, HKTForSequenceClassification, HKTModel
from hkt_hf.modeling.modeling_hkt import AUTO_CLASSES


SLOW = pytest.mark.slow
# Of these heads the fast tests export, of the others they compile; the slow ones do the rest.
FAST_EXPORTS = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForQuestionAnswering",
)
LENGTHS = [[17, 4], [18, 3, 1], [9, 10], [31], [33, 33, 2, 8], [64, 1]]
"""Batches of sequences: odd and even, powers of two and their neighbours."""


def padded_batches(lengths):
    """Ids and mask of the sequences padded on the right, and on the left."""
    right = right_padded_batch(lengths, max(lengths))
    return [right, left_padded(*right)]


def real(output, attention_mask):
    """What the output says of real tokens, and of sequences: the numbers that padding may not change."""
    tensors = [tensor for tensor in output.to_tuple() if isinstance(tensor, torch.Tensor)]
    # Multiple choice puts a question in front.
    mask = attention_mask.bool()
    return [tensor[mask] if tensor.shape[: mask.dim()] == mask.shape else tensor for tensor in tensors]


def assert_same(actual, expected, attention_mask, tolerance=1e-5):
    pairs = zip(real(actual, attention_mask), real(expected, attention_mask), strict=True)
    for actual_tensor, expected_tensor in pairs:
        torch.testing.assert_close(actual_tensor, expected_tensor, rtol=tolerance, atol=tolerance)


def smallest_length(num_levels):
    """The smallest length of an exported program, at which every level has two blocks; in Python 1 will do."""
    return 2 ** (num_levels - 1) + 1


def dynamic_shapes(names, num_levels, first=0):
    dims = {first: Dim("batch"), first + 1: Dim("length", min=max(smallest_length(num_levels), 2), max=64)}
    return dict.fromkeys(names, dims)


# torch.compile


@pytest.mark.parametrize(
    "auto_class, num_levels, positions, implementation, with_mask",
    [
        ("AutoModel", 1, "rope", "eager", True),
        ("AutoModel", 3, "absolute", "sdpa", False),
        ("AutoModel", 4, "rope", "eager", True),
        ("AutoModelForCausalLM", 3, "rope", "sdpa", True),
        pytest.param("AutoModel", 2, "rope", "sdpa", True, marks=SLOW),
        pytest.param("AutoModel", 4, "absolute", "sdpa", True, marks=SLOW),
        pytest.param("AutoModel", 4, "rope", "eager", False, marks=SLOW),
        pytest.param("AutoModelForCausalLM", 4, "absolute", "eager", False, marks=SLOW),
    ],
)
def test_one_compiled_graph_serves_all_lengths(auto_class, num_levels, positions, implementation, with_mask):
    fields = {"num_levels": num_levels, "position_embedding_type": positions, "num_hidden_layers": 1}
    check_that_one_graph_serves_all_lengths(auto_class, implementation, with_mask, **fields)


@pytest.mark.parametrize(
    "auto_class",
    [
        pytest.param(name, marks=SLOW if name in FAST_EXPORTS else [])
        for name in sorted(set(AUTO_CLASSES) - {"AutoModel", "AutoModelForCausalLM"})
    ],
)
def test_every_head_compiles(auto_class):
    check_that_one_graph_serves_all_lengths(auto_class, "sdpa", with_mask=True, num_hidden_layers=1)


def check_that_one_graph_serves_all_lengths(auto_class, implementation, with_mask, **fields):
    torch._dynamo.reset()
    model = tiny_head(auto_class, **fields)
    model.set_attn_implementation(implementation)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for lengths in LENGTHS:
        if len(lengths) == 1:
            continue  # a batch of one is a graph of its own, as everywhere in PyTorch
        for input_ids, attention_mask in padded_batches(lengths):
            inputs = head_inputs(auto_class, input_ids, attention_mask)
            mask = inputs["attention_mask"]
            if not with_mask:
                mask = torch.ones_like(inputs.pop("attention_mask"))
            with torch.no_grad():
                assert_same(compiled(**inputs), model(**inputs), mask)
    assert counter.frame_count == 1


@SLOW
def test_short_and_single_sequences_compile_too():
    torch._dynamo.reset()
    model = tiny_head("AutoModel", num_levels=4, num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for lengths in ([1], [3, 2], [31]):
        for input_ids, attention_mask in padded_batches(lengths):
            with torch.no_grad():
                outputs = (run(input_ids, attention_mask=attention_mask) for run in (compiled, model))
                assert_same(*outputs, attention_mask)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_a_compiled_model_trains_with_the_same_gradients(backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    # The loss of a classifier writes down the kind of problem at its first call, unless it is known.
    fields = {"problem_type": "single_label_classification", "num_hidden_layers": 1}
    model = tiny_head("AutoModelForSequenceClassification", **fields).train()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for lengths in ([17, 4], [18, 5, 2]):
        for input_ids, attention_mask in padded_batches(lengths):
            gradients = []
            for run in (compiled, model):
                model.zero_grad()
                for tensor in (input_ids, attention_mask):
                    torch._dynamo.mark_dynamic(tensor, 0)
                    torch._dynamo.mark_dynamic(tensor, 1)
                labels = torch.arange(len(lengths)) % 3
                torch._dynamo.mark_dynamic(labels, 0)
                run(input_ids, attention_mask=attention_mask, labels=labels).loss.backward()
                gradients.append([parameter.grad.clone() for parameter in model.parameters()])
            for actual, expected in zip(*gradients, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


# torch.export


def export(model, inputs, num_levels, first=0):
    shapes = dynamic_shapes(inputs, num_levels, first)
    return torch.export.export(model, (), inputs, dynamic_shapes=shapes)


@pytest.mark.parametrize(
    "auto_class", [pytest.param(name, marks=[] if name in FAST_EXPORTS else SLOW) for name in AUTO_CLASSES]
)
def test_every_head_is_exported_once_for_all_lengths(auto_class):
    model = tiny_head(auto_class, num_levels=3, num_hidden_layers=1)
    first = 1 if auto_class == "AutoModelForMultipleChoice" else 0
    exported = export(model, head_inputs(auto_class, *right_padded_batch([17, 4], 17)), 3, first).module()
    for lengths in LENGTHS:
        for input_ids, attention_mask in padded_batches(lengths):
            inputs = head_inputs(auto_class, input_ids, attention_mask)
            with torch.no_grad():
                assert_same(exported(**inputs), model(**inputs), inputs["attention_mask"])


@pytest.mark.parametrize(
    "num_levels, positions, implementation",
    [
        pytest.param(num_levels, positions, implementation, marks=[] if fast else SLOW)
        for num_levels in (1, 2, 3, 4)
        for positions, implementation, fast in (
            ("rope", "sdpa", True),
            ("absolute", "eager", num_levels == 4),
            ("absolute", "sdpa", num_levels == 2),
            ("rope", "eager", False),
        )
    ],
)
def test_an_exported_program_serves_every_length_from_the_smallest_on(num_levels, positions, implementation):
    model = tiny_head("AutoModel", num_levels=num_levels, position_embedding_type=positions, num_hidden_layers=1)
    model.set_attn_implementation(implementation)
    input_ids, attention_mask = right_padded_batch([17, 4], 17)
    exported = export(model, {"input_ids": input_ids, "attention_mask": attention_mask}, num_levels).module()
    smallest = smallest_length(num_levels)
    for length in (smallest, smallest + 1, 2 * smallest - 1, 32, 63, 64):
        for input_ids, attention_mask in padded_batches([length, max(length - 3, 1), 1]) + padded_batches([length]):
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            with torch.no_grad():
                assert_same(exported(**inputs), model(**inputs), attention_mask)
    if num_levels > 1:
        short = torch.ones(2, smallest - 1, dtype=torch.long)
        with pytest.raises(AssertionError, match=rf"input_ids.size\(\)\[1\] >= {smallest}"):
            exported(input_ids=short, attention_mask=short)


def test_token_types_and_norms_as_in_bert_are_exported():
    fields = {"norm_placement": "post", "type_vocab_size": 2, "position_embedding_type": "absolute"}
    model = tiny_head("AutoModel", num_hidden_layers=1, **fields)
    input_ids, attention_mask = right_padded_batch([17, 4], 17)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": input_ids % 2}
    exported = export(model, inputs, 3).module()
    for input_ids, attention_mask in padded_batches([18, 3, 1]):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": input_ids % 2}
        with torch.no_grad():
            assert_same(exported(**inputs), model(**inputs), attention_mask)


def test_a_program_without_a_mask_survives_saving(tmp_path):
    model = tiny_head("AutoModel", num_levels=3, num_hidden_layers=1)
    input_ids = torch.randint(5, 40, (2, 9))
    torch.export.save(export(model, {"input_ids": input_ids}, 3), tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for shape in ((1, 5), (3, 8), (2, 63)):
        input_ids = torch.randint(5, 40, shape)
        with torch.no_grad():
            assert_same(exported(input_ids=input_ids), model(input_ids), torch.ones(shape))


def test_recorded_code_refuses_masks_with_gaps_and_packed_sequences_when_it_runs():
    model = tiny_head("AutoModel", num_levels=3, num_hidden_layers=1)
    input_ids, attention_mask = right_padded_batch([9, 4], 9)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": torch.arange(9).expand(2, -1).contiguous(),
    }
    exported = torch.export.export(model, (), inputs).module()
    gap = attention_mask.clone()
    gap[0, 3] = 0
    restart = inputs["position_ids"].clone()
    restart[0, 5:] -= 5
    for run in (torch.compile(model, backend="eager", fullgraph=True), exported):
        with torch.no_grad():
            assert_same(run(**inputs), model(**inputs), attention_mask)
        with pytest.raises(RuntimeError, match="ones of a row side by side"):
            run(**{**inputs, "attention_mask": gap})
        with pytest.raises(RuntimeError, match="must count 0, 1, 2"):
            run(**{**inputs, "position_ids": restart})


# ONNX


def onnx_session(model, num_levels, path):
    """The model in onnxruntime: a function of ids and mask that returns the first output."""
    input_ids, attention_mask = right_padded_batch([17, 4], 17)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    shapes = dynamic_shapes(inputs, num_levels)
    torch.onnx.export(model, (), path, kwargs=inputs, dynamic_shapes=shapes, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    return lambda *tensors: session.run(None, dict(zip(inputs, (x.numpy() for x in tensors), strict=True)))[0]


@pytest.mark.parametrize(
    "num_levels, positions, implementation",
    [
        (3, "rope", "sdpa"),
        pytest.param(4, "absolute", "eager", marks=SLOW),
        pytest.param(1, "absolute", "sdpa", marks=SLOW),
        pytest.param(2, "rope", "eager", marks=SLOW),
        pytest.param(4, "rope", "sdpa", marks=SLOW),
    ],
)
def test_onnxruntime_agrees_at_every_length(num_levels, positions, implementation, tmp_path):
    config = tiny_config(num_levels=num_levels, position_embedding_type=positions, num_hidden_layers=1)
    model = randomize(HKTForSequenceClassification(config))
    model.set_attn_implementation(implementation)
    run = onnx_session(model, num_levels, tmp_path / "model.onnx")
    for lengths in [*LENGTHS, [5, 2], [2, 1], [1]]:  # shorter ones too: ONNX knows no smallest length
        for input_ids, attention_mask in padded_batches(lengths):
            with torch.no_grad():
                expected = model(input_ids, attention_mask=attention_mask).logits.numpy()
            numpy.testing.assert_allclose(run(input_ids, attention_mask), expected, rtol=1e-4, atol=1e-4)


@SLOW
def test_onnxruntime_agrees_on_the_tokens_of_a_decoder(tmp_path):
    model = randomize(HKTForCausalLM(tiny_config(is_decoder=True)))
    run = onnx_session(model, 3, tmp_path / "model.onnx")
    for lengths in LENGTHS:
        for input_ids, attention_mask in padded_batches(lengths):
            with torch.no_grad():
                expected = model(input_ids, attention_mask=attention_mask).logits[attention_mask == 1].numpy()
            logits = run(input_ids, attention_mask)[attention_mask.numpy() == 1]
            numpy.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@SLOW
@pytest.mark.parametrize("export_format", ["dynamo", "onnx"])
def test_the_exporters_of_transformers_work(export_format):
    """Their `dynamic=True` marks every dimension as automatic."""
    auto = pytest.importorskip("transformers.exporters.auto", reason="this transformers has no exporters")
    if not hasattr(auto, "EXPORT_BACKENDS"):
        pytest.skip("the exporters of this transformers return programs of PyTorch, not models")
    backend = auto.EXPORT_BACKENDS[export_format]
    model = randomize(HKTModel(tiny_config(num_levels=3)))
    input_ids, attention_mask = right_padded_batch([17, 4], 17)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    exporter = auto.get_exporter_class(export_format)()
    exported = exporter.export(model, inputs, config=backend.config(dynamic=True))
    for lengths in LENGTHS:
        for input_ids, attention_mask in padded_batches(lengths):
            with torch.no_grad():
                output = exported(input_ids=input_ids, attention_mask=attention_mask)
                expected = model(input_ids, attention_mask=attention_mask)
            assert_same(output, expected, attention_mask, tolerance=1e-4)
