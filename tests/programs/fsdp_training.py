"""Some training steps with `fully_shard`, the FSDP2 of PyTorch itself: one unit a layer, and the rest.

usage: torchrun ... fsdp_training.py FOLDER; writes FOLDER/<case>/ (weights gathered on rank 0) and FOLDER/rank<N>.pt.
Each process takes its rows of the global batch. The test runs `train` in one process, unsharded, on all rows.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import randomize, right_padded_batch, tiny_config
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from hkt_hf import HKTForCausalLM, HKTForMaskedLM, HKTForSequenceClassification


STEPS = 4
CASES = {
    "classifier": (HKTForSequenceClassification, {}, False),
    "classifier-checkpointed": (HKTForSequenceClassification, {"position_embedding_type": "absolute"}, True),
    "masked-lm": (HKTForMaskedLM, {}, False),
    "masked-lm-checkpointed": (HKTForMaskedLM, {"attention_bias": True}, True),
    "decoder": (HKTForCausalLM, {"is_decoder": True}, False),
}


def build(case):
    model_class, fields, checkpointing = CASES[case]
    torch.manual_seed(0)
    model = randomize(model_class(tiny_config(**fields))).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def global_batch(case):
    """4 sequences of different lengths; the language models have labels for some of the tokens."""
    torch.manual_seed(2)
    input_ids, attention_mask = right_padded_batch([13, 6, 9, 11], 13)
    if CASES[case][0] is HKTForSequenceClassification:
        labels = torch.tensor([0, 2, 1, 1])
    else:
        labelled = (torch.rand(input_ids.shape) < 0.4) & (attention_mask != 0)
        labels = input_ids.masked_fill(~labelled, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def train(case, model, rank=0, world_size=1):
    """Losses of the whole batch, and the gradients (whole) of every step."""
    batch = global_batch(case)
    is_language_model = batch["labels"].dim() == 2
    shifted = CASES[case][0] is HKTForCausalLM
    # FSDP averages gradients over the processes, so each divides the sum of its losses by its even share of all labels.
    options = {}
    if is_language_model:
        labels = batch["labels"][:, 1:] if shifted else batch["labels"]
        options["num_items_in_batch"] = (labels != -100).sum() / world_size
    rows = {name: values.chunk(world_size)[rank] for name, values in batch.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, gradients = [], []
    for _ in range(STEPS):
        loss = model(**rows, **options).loss
        loss.backward()
        total = loss.detach().clone()
        if world_size > 1:
            dist.all_reduce(total)
            total = total / world_size
        losses.append(total.item())
        gradients.append({name: whole(parameter.grad) for name, parameter in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def describe(parameter):
    """Whole shape, and shape of what this process holds."""
    assert isinstance(parameter, DTensor) and parameter.placements == (Shard(0),)
    return tuple(parameter.shape), tuple(parameter.to_local().shape)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def main(folder):
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results = {"world_size": world_size, "cases": {}}
    for case in CASES:
        model = build(case)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        shards = {name: describe(parameter) for name, parameter in model.named_parameters()}
        losses, gradients = train(case, model, rank, world_size)
        state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        batch = global_batch(case)
        batch.pop("labels")
        with torch.no_grad():
            logits = model.eval()(**batch).logits
        if rank == 0:
            model.save_pretrained(folder / case, state_dict=state_dict)
        dist.barrier()
        results["cases"][case] = {
            "shards": shards,
            "losses": losses,
            "gradients": gradients,
            "logits": logits,
        }
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
