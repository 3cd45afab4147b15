"""The model card of a trained checkpoint."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .architectures import ARCHITECTURES
from .environment import commit
from .modeling import HKTConfig
from .objectives import Objective


REPOSITORY_TAGS = ["hkt", "hierarchical-attention", "multi-scale-attention"]

_TEMPLATE = """---
{card_data}
---

# {name}

{architecture}

| | |
| --- | --- |
| task | {task} |
| data | {data} |
| seed | {seed} |
| training | {training} |
| parameters | {parameters:,} |
| code | {code} |

## Results

{results}

## How to load

```python
from transformers import {auto_name}, AutoTokenizer

model = {auto_name}.from_pretrained("{location}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{location}"{trust})
```

`{location}` stands for this folder or its repository on the Hub.{trust_note}
"""


def build_card(
    model,
    *,
    objective: Objective,
    name: str,
    data: str,
    task: str,
    seed: int,
    metrics: dict[str, dict],
    training: str,
    base_model: str | None = None,
) -> ModelCard:
    """Write the card of a model from what was measured.

    Args:
        model (`PreTrainedModel`): the trained model.
        objective ([`~hkt_hf.objectives.Objective`]): what it was trained for.
        name (`str`): heading, and the location in the loading example.
        data (`str`): the dataset, its size and how it was split.
        task (`str`): short name of the task, e.g. `"listops"`.
        seed (`int`): seed of the run.
        metrics (`dict[str, dict]`): measured values a split, e.g. `{"test": {"accuracy": 0.5}}`.
        training (`str`): steps, batch size and learning rate in words.
        base_model (`str`, *optional*): folder or Hub id of the checkpoint that was fine-tuned. Its licence is not
            known here, so the card then names none.
    """
    is_hkt = model.config.model_type == HKTConfig.model_type
    has_code = model.config.model_type in ARCHITECTURES
    revision = commit()
    results = [
        EvalResult(
            task_type=objective.pipeline,
            dataset_type=task,
            dataset_name=data,
            dataset_split=split,
            metric_type=metric,
            metric_value=round(value, 6),
        )
        for split, values in metrics.items()
        for metric, value in values.items()
    ]
    card_data = ModelCardData(
        model_name=name,
        library_name="transformers",
        license="apache-2.0" if base_model is None else None,
        base_model=base_model if base_model is not None and not Path(base_model).exists() else None,
        pipeline_tag=objective.pipeline,
        tags=REPOSITORY_TAGS if is_hkt else None,
        eval_results=results,
    )
    architecture = _describe(model.config) if is_hkt else f"`{type(model).__name__}`."
    if base_model is not None:
        architecture += f" Fine-tuned from `{Path(base_model).name if Path(base_model).exists() else base_model}`."
    content = _TEMPLATE.format(
        card_data=card_data.to_yaml(),
        name=name,
        architecture=architecture,
        task=f"{task} ({objective.kind(model.config)})",
        auto_name=objective.auto_name,
        data=data,
        seed=seed,
        training=training,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        code=f"hkt-hf, commit {revision}" if revision else "hkt-hf",
        results=_table(metrics),
        location=name,
        trust=", trust_remote_code=True" if has_code else "",
        trust_note=" With the package `hkt_hf` imported, `trust_remote_code` is not "
        "needed; the tokenizer has no code of its own, but transformers asks before it reads the model's configuration."
        if has_code
        else "",
    )
    return ModelCard(content)


def _describe(config) -> str:
    kind = (
        f"Hierarchical Kernel Transformer (arXiv 2604.08829) with {config.num_levels} levels"
        if config.num_levels > 1
        else "Flat transformer (one level of the Hierarchical Kernel Transformer: plain multi-head attention)"
    )
    return (
        f"{kind}: width {config.hidden_size}, {config.num_hidden_layers} layers, {config.num_attention_heads} heads, "
        f"{config.position_embedding_type} positions, at most {config.max_position_embeddings} tokens."
    )


def _table(metrics: dict[str, dict]) -> str:
    rows = ["| split | metric | value |", "| --- | --- | --- |"]
    rows += [
        f"| {split} | {name} | {value:.4f} |" for split, values in metrics.items() for name, value in values.items()
    ]
    return "\n".join(rows)
