"""`from_pretrained(distributed_config=...)` of transformers, which follows the plans that HKT declares.

usage: torchrun ... sharded_loading.py FOLDER, with FOLDER/<case>/ saved by the test; writes FOLDER/<case>-<kind>/ and
FOLDER/rank<N>.pt. Every process runs the whole batch.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import right_padded_batch, tiny_config
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from hkt_hf import HKTForCausalLM, HKTForMaskedLM, HKTForSequenceClassification


STEPS = 3
CASES = {
    "masked-lm": (HKTForMaskedLM, {}),
    "masked-lm-untied": (HKTForMaskedLM, {"tie_word_embeddings": False, "attention_bias": True}),
    "classifier": (HKTForSequenceClassification, {"position_embedding_type": "absolute", "pooling": "cls"}),
    "shared-projections": (HKTForSequenceClassification, {"share_level_projections": True, "num_levels": 4}),
    "flat": (HKTForMaskedLM, {"num_levels": 1}),
    "symmetric": (HKTForMaskedLM, {"score_symmetry": "symmetric"}),
    "psd": (HKTForMaskedLM, {"score_symmetry": "psd"}),
    "decoder": (HKTForCausalLM, {"is_decoder": True}),
    "post-norm": (HKTForMaskedLM, {"norm_placement": "post", "type_vocab_size": 2}),
    "post-norm-decoder": (
        HKTForCausalLM,
        {
            "is_decoder": True,
            "norm_placement": "post",
            "position_embedding_type": "absolute",
            "type_vocab_size": 2,
        },
    ),
}
KINDS = {"tp": {"tp_size": 2}, "fsdp": {"fsdp_size": 2}}


def config_of(case):
    return tiny_config(**CASES[case][1])


def batch_of(case):
    torch.manual_seed(3)
    input_ids, attention_mask = right_padded_batch([13, 8], 13)
    labels = torch.tensor([2, 0]) if CASES[case][0] is HKTForSequenceClassification else input_ids
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def run(case, model):
    """Losses and gradients of some steps, then logits, and a continuation where the model is a decoder."""
    batch = batch_of(case)
    # Before any forward pass: after one, FSDP2 leaves the last units whole, which an optimizer must not see.
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.02)
    results = {"losses": [], "gradients": []}
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        results["losses"].append(loss.item())
        results["gradients"].append({name: whole(parameter.grad) for name, parameter in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    return {**results, **infer(case, model)}


def infer(case, model):
    """Logits, and a continuation where the model is a decoder."""
    inputs = batch_of(case)
    inputs.pop("labels")
    with torch.no_grad():
        results = {"logits": model.eval()(**inputs).logits}
    if config_of(case).is_decoder:
        generated = model.generate(
            **{name: values.flip(1) for name, values in inputs.items()},  # padded on the left
            max_new_tokens=9,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        results |= {"generated": generated.sequences, "generated_logits": torch.stack(generated.logits)}
    return results


def describe(parameter):
    """Shape, sharded dimension, and shape of what this process holds."""
    if not isinstance(parameter, DTensor):
        return tuple(parameter.shape), None, tuple(parameter.shape)
    return tuple(parameter.shape), getattr(parameter.placements[-1], "dim", None), tuple(parameter.to_local().shape)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def main(folder):
    dist.init_process_group("gloo")
    results = {}
    for case, (model_class, _) in CASES.items():
        for kind, sizes in KINDS.items():
            model = model_class.from_pretrained(folder / case, distributed_config=DistributedConfig(**sizes))
            parameters = {name: describe(parameter) for name, parameter in model.named_parameters()}
            results[case, kind] = {"parameters": parameters, **run(case, model)}
            model.save_pretrained(folder / f"{case}-{kind}")
        if config_of(case).is_decoder:  # transformers' pipelines are for generation alone
            model = model_class.from_pretrained(folder / case, distributed_config=DistributedConfig(pp_size=2))
            results[case, "pp"] = {"layers": sum(hasattr(layer, "self_attn") for layer in model.model.layers)}
            results[case, "pp"] |= infer(case, model)
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
