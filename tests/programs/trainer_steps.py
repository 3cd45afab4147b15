"""Some training steps with a plain `Trainer`; the launcher decides how many processes share a step, and how.

usage: accelerate launch ... trainer_steps.py FOLDER [fsdp]; writes FOLDER/<case>/ (the model) and FOLDER/rank<N>.pt.
The test runs `train` in one process.
"""

import os
import sys
from pathlib import Path

import datasets
import torch
from accelerate import DistributedType, PartialState
from clients import tiny_tokenizer
from tiny_models import randomize, tiny_config
from torch.distributed.tensor import DTensor
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hkt_hf import HKTForMaskedLM, HKTForSequenceClassification


STEPS = 5
GLOBAL_BATCH = 8
CASES = {
    "classifier": HKTForSequenceClassification,
    "masked-lm": HKTForMaskedLM,
}


def rows_of(case):
    """One row for each place of all steps, so that every step has a whole batch; labels of few and of many tokens."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(4, 20, (STEPS * GLOBAL_BATCH,), generator=generator).tolist()
    rows = [torch.randint(5, 28, (length,), generator=generator).tolist() for length in lengths]
    if case == "classifier":
        return {"input_ids": rows, "labels": [row[0] % 3 for row in rows]}
    every = [2 + index % 5 for index in range(len(rows))]
    labels = [
        [token if column % period == 0 else -100 for column, token in enumerate(row)]
        for row, period in zip(rows, every, strict=True)
    ]
    return {"input_ids": rows, "labels": labels}


class Recorder(TrainerCallback):
    """Gradients as the optimizer sees them, the rows that this process was given, and its part of sharded parameters."""

    def __init__(self):
        self.gradients, self.rows, self.shards = [], [], {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parameters = {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
        self.gradients.append({name: whole(parameter.grad) for name, parameter in parameters.items()})
        self.shards = {
            name: (tuple(parameter.shape), tuple(parameter.to_local().shape))
            for name, parameter in parameters.items()
            if isinstance(parameter, DTensor)
        }


def train(case, folder, world_size=1, use_cpu=True):
    """Losses and gradients of every step, rows that this process had, and the weights at the end."""
    torch.manual_seed(0)
    model = randomize(CASES[case](tiny_config()))
    tokenizer, recorder = tiny_tokenizer(), Recorder()
    collator = (DataCollatorWithPadding if case == "classifier" else DataCollatorForTokenClassification)(tokenizer)

    def collate(rows):
        recorder.rows.append([list(row["input_ids"]) for row in rows])
        return collator(rows)

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=GLOBAL_BATCH // world_size,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        train_sampling_strategy="sequential",
        use_cpu=use_cpu,
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(rows_of(case)),
        data_collator=collate,
        callbacks=[recorder],
    )
    trainer.train()
    trainer.save_model()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "world_size": arguments.world_size,
        "losses": [entry["loss"] for entry in logged],
        "gradients": recorder.gradients,
        "rows": recorder.rows,
        "shards": recorder.shards,
        "weights": {name: whole(values) for name, values in trainer.model.state_dict().items()},
    }


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def main(folder, *options):
    if "fsdp" in options:
        # Accelerate has FSDP only where it finds an accelerator; told that gloo serves one, it shards on the CPU as well.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    results = {case: train(case, folder / case, world_size=2, use_cpu="fsdp" not in options) for case in CASES}
    torch.save(results, folder / f"rank{PartialState().process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
