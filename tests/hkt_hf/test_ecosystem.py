"""Libraries around transformers: peft, PyTorch's dynamic quantisation, sentence-transformers."""

import copy

import datasets
import pytest
import torch
from clients import WITHOUT_PROJECT, run_python
from tiny_models import right_padded_batch, tiny_head
from torch import nn
from transformers import AutoModelForSequenceClassification

from hkt_hf import HKTForSequenceClassification, preset
from hkt_hf.modeling.modeling_hkt import AUTO_CLASSES, HKTModel
from hkt_hf.tokenization import build_tokenizer


TOKENIZER = build_tokenizer("bytes", model_max_length=64)
TEXTS = ["A film to remember.", "Dull.", "Two hours I will not get back"]

# peft: LoRA.

peft = pytest.importorskip("peft")

# Queries and keys have one projection a level, `q_proj.0`, `q_proj.1`, ...: a plain "q_proj" names the list of them.
QUERIES_AND_VALUES = r".*\.(q_proj\.\d+|v_proj)"


def adapted(model):
    return {
        name.rsplit("layers.0.", 1)[1]
        for name, part in model.named_modules()
        if hasattr(part, "lora_A") and "layers.0." in name
    }


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (QUERIES_AND_VALUES, {"self_attn.q_proj.0", "self_attn.q_proj.1", "self_attn.q_proj.2", "self_attn.v_proj"}),
        (["q_proj.0", "v_proj"], {"self_attn.q_proj.0", "self_attn.v_proj"}),
        (
            "all-linear",
            {f"self_attn.{part}_proj.{level}" for part in "qk" for level in range(3)}
            | {"self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"},
        ),
    ],
)
def test_lora_finds_the_projections_of_every_level(targets, expected):
    model = peft.get_peft_model(
        tiny_head("AutoModelForSequenceClassification"), peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets)
    )
    assert adapted(model) == expected


def test_a_plain_q_proj_is_refused_by_peft_not_skipped():
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="ModuleList"):
        peft.get_peft_model(tiny_head("AutoModelForSequenceClassification"), config)


def test_lora_for_token_classification_leaves_the_head_to_training():
    """peft takes the head of token classifiers, those of BERT too, for one of "all-linear" unless it is excluded."""
    config = peft.LoraConfig(task_type="TOKEN_CLS", target_modules="all-linear", exclude_modules=["classifier"])
    model = peft.get_peft_model(tiny_head("AutoModelForTokenClassification"), config)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum("classifier.modules_to_save" in name for name in trainable) == 2
    assert len(adapted(model)) == 10


@pytest.mark.parametrize(
    "choice",
    [
        {"target_modules": QUERIES_AND_VALUES},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "modules_to_save": ["downsample.0", "downsample.1"]},
    ],
    ids=["queries-and-values", "all-linear", "and-downsampling"],
)
def test_lora_trains_its_adapters_and_the_head_alone(choice, tmp_path):
    base = tiny_head("AutoModelForSequenceClassification")
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.0, **copy.deepcopy(choice))  # peft adds the head
    model = peft.get_peft_model(copy.deepcopy(base), config).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    input_ids, attention_mask = right_padded_batch([12, 7, 9], 12)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert changed == trained
    for part in ["classifier", *choice.get("modules_to_save", [])]:
        assert any(f"{part}.modules_to_save" in name for name in trained)

    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        tuned = model(input_ids=input_ids, attention_mask=attention_mask).logits
        loaded = peft.PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        ).eval()
        torch.testing.assert_close(loaded(input_ids=input_ids, attention_mask=attention_mask).logits, tuned)
        # The merged model is a plain HKT again: it is saved and loaded without peft.
        merged = loaded.merge_and_unload()
        assert type(merged) is HKTForSequenceClassification
        merged.save_pretrained(tmp_path / "merged")
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        logits = plain(input_ids, attention_mask).logits
    torch.testing.assert_close(logits, tuned, rtol=1e-4, atol=1e-5)
    assert (base(input_ids, attention_mask).logits - tuned).abs().max() > 0.1


# PyTorch's own dynamic quantisation.

# PyTorch announces that its place becomes torchao: https://github.com/pytorch/ao/issues/2259
quantisation = pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")


def quantize(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@quantisation
@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_int8_linears_agree_to_a_tenth(auto_class):
    model = tiny_head(auto_class)
    quantized = quantize(model)
    assert not any(type(part) is nn.Linear for part in quantized.modules())
    input_ids, attention_mask = right_padded_batch([30, 12], 30)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if auto_class == "AutoModelForMultipleChoice":
        inputs = {name: tensor[None] for name, tensor in inputs.items()}
    with torch.no_grad():
        expected, actual = model(**inputs)[0], quantized(**inputs)[0]
    assert 0.0 < (actual - expected).norm() <= 0.1 * expected.norm()


@quantisation
def test_an_int8_checkpoint_is_a_third_as_large_and_loads(tmp_path):
    torch.manual_seed(0)
    model = HKTForSequenceClassification(preset("hkt-small", vocab_size=len(TOKENIZER), num_labels=2)).eval()
    quantized = quantize(model)
    batch = TOKENIZER(TEXTS, padding=True, return_tensors="pt")
    for name, part in (("float32", model), ("int8", quantized)):
        torch.save(part.state_dict(), tmp_path / name)
    assert (tmp_path / "int8").stat().st_size < 0.35 * (tmp_path / "float32").stat().st_size
    again = quantize(HKTForSequenceClassification(model.config).eval())
    again.load_state_dict(torch.load(tmp_path / "int8", weights_only=False))
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, quantized(**batch).logits)
        assert (quantized(**batch).logits - model(**batch).logits).abs().max() < 0.05


# sentence-transformers: HKT as the encoder of a sentence model.

sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6.0")

ENCODE = (
    WITHOUT_PROJECT
    + """
import torch
from sentence_transformers import SentenceTransformer

folder, output = sys.argv[1:3]
model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
assert type(model[0].auto_model).__module__.startswith("transformers_modules."), type(model[0].auto_model)
torch.save(model.encode(sys.argv[3:], batch_size=2, convert_to_tensor=True), output)
"""
)


def sentence_model(folder, pooling_mode="mean", padding_side="right"):
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    encoder = tiny_head("AutoModel", vocab_size=len(TOKENIZER))
    encoder.save_pretrained(folder)
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.padding_side = padding_side
    tokenizer.save_pretrained(folder)
    transformer = Transformer(str(folder))
    assert type(transformer.auto_model) is HKTModel
    assert (transformer.max_seq_length, transformer.get_embedding_dimension()) == (64, 32)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=pooling_mode)
    return sentence_transformers.SentenceTransformer(modules=[transformer, pooling], device="cpu"), encoder


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("pooling_mode", ["mean", "cls", "lasttoken"])
def test_sentence_embeddings_are_the_pooled_states_of_each_text(pooling_mode, padding_side, tmp_path):
    model, encoder = sentence_model(tmp_path, pooling_mode, padding_side)
    embeddings = model.encode(TEXTS, batch_size=2, convert_to_tensor=True)
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        with torch.no_grad():
            states = encoder(**TOKENIZER(text, return_tensors="pt")).last_hidden_state[0]
        expected = {"mean": states.mean(0), "cls": states[0], "lasttoken": states[-1]}[pooling_mode]
        torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-5)


def test_sentence_models_are_trained_saved_and_loaded_here_and_without_the_project(tmp_path):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model, _ = sentence_model(tmp_path / "encoder")
    pairs = {"anchor": [f"number {i}" for i in range(8)], "positive": [f"{i}, again {i}" for i in range(8)]}
    losses = []
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model,
        args=sentence_transformers.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=8,
            max_steps=10,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_dict(pairs),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]

    embeddings = model.encode(TEXTS, convert_to_tensor=True)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(loaded.encode(TEXTS, convert_to_tensor=True), embeddings)
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    run_python(ENCODE, tmp_path / "cwd", environment, tmp_path / "saved", tmp_path / "embeddings.pt", *TEXTS)
    torch.testing.assert_close(torch.load(tmp_path / "embeddings.pt"), embeddings, rtol=1e-5, atol=1e-5)
