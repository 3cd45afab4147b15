"""A checkpoint loads where this project is not installed, with every Auto class, and gives the same numbers."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from clients import WITHOUT_PROJECT, run_python
from tiny_models import head_inputs, tiny_head, tiny_hsa_head
from transformers import pipeline

import hkt_hf
from hkt_hf.modeling import modeling_hsa
from hkt_hf.modeling.modeling_hkt import AUTO_CLASSES
from hkt_hf.tokenization import build_tokenizer


REMOTE = (
    WITHOUT_PROJECT
    + """
import json, torch, transformers

folder, saved_again, output, pipelines = sys.argv[1:5]
auto_classes = sys.argv[5:]
inputs = torch.load(f"{folder}/inputs.pt")

def check_is_remote(cls):
    assert cls.__module__.startswith("transformers_modules."), cls

def load(auto_class, checkpoint):
    model, info = getattr(transformers, auto_class).from_pretrained(
        checkpoint, trust_remote_code=True, output_loading_info=True
    )
    check_is_remote(type(model))
    # A matrix-vector product of PyTorch differs in the last bit with the alignment of a weight in its file.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model, info

def output_of(model, auto_class):
    with torch.no_grad():
        return type(model).__name__, model(**inputs[auto_class])[0]

try:
    import hkt_hf
except ImportError:
    pass
else:
    raise AssertionError("the project can be imported")

results = {"first": {}, "again": {}, "backbone": {}}
config = transformers.AutoConfig.from_pretrained(f"{folder}/AutoModel", trust_remote_code=True)
check_is_remote(type(config))
results["config"] = type(config).__name__
for auto_class in auto_classes:
    # Each head from its own checkpoint and from what that model saves, and the backbone alone.
    model, info = load(auto_class, f"{folder}/{auto_class}")
    assert not any(info.values()), info
    results["first"][auto_class] = output_of(model, auto_class)
    model.save_pretrained(f"{saved_again}/{auto_class}")
    results["again"][auto_class] = output_of(load(auto_class, f"{saved_again}/{auto_class}")[0], auto_class)
    results["backbone"][auto_class] = output_of(load("AutoModel", f"{folder}/{auto_class}")[0], "AutoModel")
results["pipelines"] = {}
for task, (auto_class, texts, arguments) in json.loads(pipelines).items():
    run = transformers.pipeline(task, model=f"{folder}/{auto_class}", trust_remote_code=True, batch_size=2)
    check_is_remote(type(run.model))
    results["pipelines"][task] = json.dumps(run(texts, **arguments), default=float)
torch.save(results, output)
"""
)

HSA_PIPELINES = ["feature-extraction", "fill-mask", "text-classification"]
TEXTS = ["h i e r a r c h y", "t r e e"]
PIPELINES = {
    "feature-extraction": ("AutoModel", TEXTS, {}),
    "fill-mask": ("AutoModelForMaskedLM", ["h i [MASK] r a r c h y", "t r [MASK]"], {}),
    "text-classification": ("AutoModelForSequenceClassification", TEXTS, {"top_k": None}),
    "text-generation": ("AutoModelForCausalLM", TEXTS[:1], {"max_new_tokens": 6, "do_sample": False}),
    "token-classification": ("AutoModelForTokenClassification", TEXTS, {}),
    "zero-shot-classification": (
        "AutoModelForSequenceClassification",
        TEXTS,
        {"candidate_labels": ["a", "b"], "hypothesis_template": " {}"},
    ),
}


def load_elsewhere(folder, heads, inputs, pipelines):
    """Save models and load them in a process without this project.

    Args:
        folder (`Path`): where to.
        heads (`dict`): models by Auto class, with the vocabulary of `TOKENIZER`.
        inputs (`dict`): what each is called with.
        pipelines (`dict`): as `PIPELINES`.

    Returns:
        `tuple`: results of the other process, expected outputs by Auto class.
    """
    expected, found_here = {}, {}
    backbones = {}
    for auto_class, model in heads.items():
        model.save_pretrained(folder / auto_class)
        TOKENIZER.save_pretrained(folder / auto_class)
        with torch.no_grad():
            expected[auto_class] = model(**inputs[auto_class])[0]
            backbones[auto_class] = model.base_model(**inputs["AutoModel"])[0]
    for task, (auto_class, texts, arguments) in pipelines.items():
        run = pipeline(task, model=str(folder / auto_class), batch_size=2)
        assert type(run.model).__module__.startswith("hkt_hf.")
        found_here[task] = json.dumps(run(texts, **arguments), default=float)
    torch.save(inputs, folder / "inputs.pt")
    run_python(
        REMOTE,
        folder / "cwd",
        {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"},
        folder,
        folder / "again",
        folder / "results.pt",
        json.dumps(pipelines),
        *heads,
    )
    return torch.load(folder / "results.pt"), {**expected, "backbone": backbones, "pipelines": found_here}


INPUT_IDS = torch.randint(1, 28, (2, 13), generator=torch.Generator().manual_seed(0))
ATTENTION_MASK = torch.tensor([[1] * 13, [1] * 6 + [0] * 7])
TOKENIZER = build_tokenizer("bytes", model_max_length=64, split_special_tokens=False)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """`(results of the process without this project, expected outputs by Auto class)`."""
    heads = {auto_class: tiny_head(auto_class, vocab_size=len(TOKENIZER)) for auto_class in AUTO_CLASSES}
    inputs = {auto_class: head_inputs(auto_class, INPUT_IDS, ATTENTION_MASK) for auto_class in AUTO_CLASSES}
    return load_elsewhere(tmp_path_factory.mktemp("remote"), heads, inputs, PIPELINES)


@pytest.fixture(scope="module")
def loaded_hsa(tmp_path_factory):
    """The same of HSA, with segments as inputs; the pipelines know none and attend along the configuration's trees."""
    heads = {name: tiny_hsa_head(name, vocab_size=len(TOKENIZER)) for name in modeling_hsa.AUTO_CLASSES}
    sentences, paragraphs = torch.arange(13) // 3, torch.arange(13) // 6
    segment_ids = torch.stack([sentences, paragraphs]).expand(2, -1, -1)
    batch = {"input_ids": INPUT_IDS, "attention_mask": ATTENTION_MASK, "segment_ids": segment_ids}
    pipelines = {task: PIPELINES[task] for task in HSA_PIPELINES}
    return load_elsewhere(tmp_path_factory.mktemp("remote-hsa"), heads, dict.fromkeys(heads, batch), pipelines)


def test_config_loads(loaded):
    assert loaded[0]["config"] == "HKTConfig"


def leaves(value):
    """The numbers and texts of a nested result, in order."""
    if isinstance(value, dict):
        value = [part for key in sorted(value) for part in (key, value[key])]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list) else [value]


def check_pipelines(loaded, task):
    results, expected = (leaves(json.loads(part["pipelines"][task])) for part in loaded)
    assert len(results) == len(expected) > 1
    for found, wanted in zip(results, expected, strict=True):
        assert found == (pytest.approx(wanted, abs=1e-5) if isinstance(wanted, float) else wanted)


@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines_give_the_same_results(loaded, task):
    check_pipelines(loaded, task)


@pytest.mark.parametrize("task", HSA_PIPELINES)
def test_pipelines_of_hsa_give_the_same_results(loaded_hsa, task):
    check_pipelines(loaded_hsa, task)


@pytest.mark.parametrize("auto_class", modeling_hsa.AUTO_CLASSES)
def test_hsa_gives_the_same_numbers(loaded_hsa, auto_class):
    results, expected = loaded_hsa
    assert results["config"] == "HSAConfig"
    for saved in ("first", "again"):
        class_name, output = results[saved][auto_class]
        assert class_name == modeling_hsa.AUTO_CLASSES[auto_class]
        assert torch.equal(output, expected[auto_class])
    class_name, output = results["backbone"][auto_class]
    assert class_name == "HSAModel" and torch.equal(output, expected["backbone"][auto_class])


def test_a_checkpoint_carries_the_code_of_its_own_architecture(tmp_path):
    tiny_hsa_head("AutoModel").save_pretrained(tmp_path)
    code = {
        "attention_hsa",
        "checks_common",
        "configuration_hsa",
        "layers_common",
        "memory_common",
        "modeling_hsa",
        "tree_hsa",
    }
    assert {path.stem for path in tmp_path.glob("*.py")} == code
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == modeling_hsa.AUTO_MAP


@pytest.mark.parametrize("saved", ["first", "again"], ids=["saved-here", "saved-from-remote-code"])
@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_model_gives_the_same_numbers(loaded, auto_class, saved):
    results, expected = loaded
    class_name, output = results[saved][auto_class]
    assert class_name == AUTO_CLASSES[auto_class]
    assert torch.equal(output, expected[auto_class])


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_every_checkpoint_serves_its_backbone(loaded, auto_class):
    results, expected = loaded
    class_name, output = results["backbone"][auto_class]
    assert class_name == "HKTModel"
    assert torch.equal(output, expected["backbone"][auto_class])


MODELING_FILES = sorted(Path(hkt_hf.modeling.__file__).parent.glob("*.py"))
ALLOWED_PACKAGES = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
OPTIONAL_PACKAGES = {"triton"}  # imported in a `try`, which transformers does not ask for when it loads remote code


@pytest.mark.parametrize("path", MODELING_FILES, ids=lambda path: path.name)
def test_model_code_imports_nothing_else(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    guarded = [node for attempt in nodes if isinstance(attempt, ast.Try) for node in attempt.body]
    for node in nodes:
        if isinstance(node, ast.Import):
            packages = {alias.name.split(".")[0] for alias in node.names}
            assert packages <= ALLOWED_PACKAGES | (OPTIONAL_PACKAGES if node in guarded else set()), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in ALLOWED_PACKAGES, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            # `from .module import name` of the same folder is the only form that travels with a checkpoint.
            assert node.level == 1, ast.unparse(node)
            assert node.module and (path.parent / f"{node.module}.py").is_file(), ast.unparse(node)
