"""The models under the attention functions that need a GPU, against eager in float32: Triton, flex, flash attention.

usage: check_attention_functions.py [--device cuda]
Prints a line a case, the largest difference of hidden states of real tokens; ends with 1 when one is above 0.1 in
bfloat16 or 1e-3 in float32. Flash attention is left out where the package `flash_attn` is missing.
"""

import argparse
import copy
import importlib.util

import torch
from tiny_models import randomize, right_padded_batch, tiny_config

from hkt_hf.modeling import HKTModel


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    cases = [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("flex_attention", torch.float32)]
    if device != "cpu":
        cases += [("triton", torch.float32), ("triton", torch.bfloat16)]
    if importlib.util.find_spec("flash_attn") is not None:
        cases.append(("flash_attention_2", torch.bfloat16))
    failed = False
    for is_decoder in (False, True):
        model = randomize(HKTModel(tiny_config(num_levels=3, is_decoder=is_decoder))).to(device).eval()
        input_ids, mask = (tensor.to(device) for tensor in right_padded_batch([19, 8, 1], 19))
        states = {}
        for implementation, dtype in [("eager", torch.float32), *cases]:
            rounded = copy.deepcopy(model).to(dtype)
            rounded.set_attn_implementation(implementation)
            with torch.no_grad():
                output = rounded(input_ids, attention_mask=mask, use_cache=False).last_hidden_state
            states[implementation, dtype] = output[mask == 1].float()
            difference = (states[implementation, dtype] - states["eager", torch.float32]).abs().max().item()
            passed = difference <= (1e-3 if dtype == torch.float32 else 0.1)
            failed |= not passed
            print(f"{implementation=} {dtype=} {is_decoder=} {difference=:.1e} {passed=}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
