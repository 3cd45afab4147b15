"""A checkpoint loads where this project is not installed, with every Auto class, and gives the same numbers."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from clients import TEXTS, WITHOUT_PROJECT, run_python, tiny_config, tiny_tokenizer

import hkt_hf
from hkt_hf import HKTForSequenceClassification
from hkt_hf.modeling.modeling_hkt import AUTO_CLASSES


REMOTE = (
    WITHOUT_PROJECT
    + """
import torch, transformers

folder, saved_again, output = sys.argv[1:4]
auto_classes = sys.argv[4:]

def check_is_remote(cls):
    assert cls.__module__.startswith("transformers_modules."), cls

def outputs_of(folder):
    inputs = torch.load(f"{folder}/../inputs.pt")
    outputs = {}
    for name in auto_classes:
        model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
        check_is_remote(type(model))
        with torch.no_grad():
            outputs[name] = type(model).__name__, model(**inputs)[0]
    return outputs

try:
    import hkt_hf
except ImportError:
    pass
else:
    raise AssertionError("the project can be imported")

config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
check_is_remote(type(config))
outputs = outputs_of(folder)
model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(saved_again)
classify = transformers.pipeline("text-classification", model=folder, trust_remote_code=True)
check_is_remote(type(classify.model))
scores = classify(["h i e r a r c h y", "t r e e"], top_k=None)
results = {"config": type(config).__name__, "first": outputs, "again": outputs_of(saved_again), "scores": scores}
torch.save(results, output)
"""
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """`(results of the process without this project, expected outputs by Auto class)`."""
    folder = tmp_path_factory.mktemp("remote")
    torch.manual_seed(0)
    model = HKTForSequenceClassification(tiny_config(initializer_range=0.5)).eval()
    model.save_pretrained(folder / "checkpoint")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "checkpoint")
    inputs = {
        "input_ids": torch.randint(1, 28, (2, 13)),
        "attention_mask": torch.tensor([[1] * 13, [1] * 6 + [0] * 7]),
    }
    torch.save(inputs, folder / "inputs.pt")
    run_python(
        REMOTE,
        folder / "cwd",
        {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"},
        folder / "checkpoint",
        folder / "again",
        folder / "results.pt",
        *AUTO_CLASSES,
    )
    with torch.no_grad():
        expected = {"AutoModel": model.model(**inputs)[0], "AutoModelForSequenceClassification": model(**inputs)[0]}
        expected["probabilities"] = [
            model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1) for text in TEXTS
        ]
    return torch.load(folder / "results.pt"), expected


def test_config_loads(loaded):
    assert loaded[0]["config"] == "HKTConfig"


def test_the_pipeline_gives_the_same_scores(loaded):
    results, expected = loaded
    for scores, probabilities in zip(results["scores"], expected["probabilities"], strict=True):
        found = {score["label"]: score["score"] for score in scores}
        assert [found[f"LABEL_{index}"] for index in range(3)] == pytest.approx(probabilities.tolist(), abs=1e-6)


@pytest.mark.parametrize("saved", ["first", "again"], ids=["saved-here", "saved-from-remote-code"])
@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_model_gives_the_same_numbers(loaded, auto_class, saved):
    results, expected = loaded
    class_name, output = results[saved][auto_class]
    assert class_name == AUTO_CLASSES[auto_class]
    assert torch.equal(output, expected[auto_class])


MODELING_FILES = sorted(Path(hkt_hf.modeling.__file__).parent.glob("*.py"))
ALLOWED_PACKAGES = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", MODELING_FILES, ids=lambda path: path.name)
def test_model_code_imports_nothing_else(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            packages = {alias.name.split(".")[0] for alias in node.names}
            assert packages <= ALLOWED_PACKAGES, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in ALLOWED_PACKAGES, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            # `from .module import name` of the same folder is the only form that travels with a checkpoint.
            assert node.level == 1, ast.unparse(node)
            assert node.module and (path.parent / f"{node.module}.py").is_file(), ast.unparse(node)
