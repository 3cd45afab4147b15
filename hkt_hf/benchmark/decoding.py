"""What a decoder's cache costs: bytes, and seconds for one more token, against the flat twin."""

import statistics
import time

import torch
from tqdm.auto import tqdm
from transformers import Cache

from ..modeling import HKTForCausalLM
from ..presets import preset


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that the layers of a cache hold."""
    return sum(tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in _tensors(vars(layer)))


def _tensors(values):
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def measure_decoding(
    model_name: str = "hkt-small",
    contexts: tuple[int, ...] = (1024, 4096, 16384),
    batch_size: int = 1,
    num_tokens: int = 64,
    warm_up: int = 8,
    num_levels: int = 3,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, object]]:
    """Time single decoding steps of HKT and of its flat twin (`num_levels=1`), turn by turn.

    Args:
        model_name (`str`): a packaged model size.
        contexts (`tuple[int, ...]`): tokens in the cache before the first measured step.
        batch_size (`int`): sequences.
        num_tokens (`int`): measured steps; the cache grows by one token at each.
        warm_up (`int`): steps before them.
        num_levels (`int`): levels of HKT.
        device (`str`), dtype (`torch.dtype`): where and in what precision.

    Returns:
        `list[dict]`: one entry a context, with bytes of both caches after the prompt, median and quartiles of the
        seconds of a step, and the ratios of HKT to flat: bytes, medians, and the median of the step by step ratios.
    """
    vocab_size, rows = 512, []
    models = {}
    for arm, levels in (("flat", 1), ("hkt", num_levels)):
        torch.manual_seed(0)
        config = preset(
            model_name,
            vocab_size=vocab_size,
            num_levels=levels,
            is_decoder=True,
            max_position_embeddings=max(contexts) + num_tokens + warm_up,
        )
        models[arm] = HKTForCausalLM(config).to(device, dtype).eval()
    with torch.inference_mode():
        for context in tqdm(contexts, desc="contexts"):
            prompt = torch.randint(vocab_size, (batch_size, context), device=device)
            caches = {arm: model(prompt, logits_to_keep=1).past_key_values for arm, model in models.items()}
            sizes = {arm: cache_bytes(cache) for arm, cache in caches.items()}
            seconds: dict[str, list[float]] = {arm: [] for arm in models}
            for step in range(warm_up + num_tokens):
                token = torch.randint(vocab_size, (batch_size, 1), device=device)
                for arm in sorted(models, reverse=step % 2 == 1):  # neither arm always comes first
                    elapsed = _seconds(models[arm], token, caches[arm], device)
                    if step >= warm_up:
                        seconds[arm].append(elapsed)
            medians = {arm: statistics.median(values) for arm, values in seconds.items()}
            rows.append(
                {
                    "context": context,
                    "cache_bytes": sizes,
                    "cache_ratio": sizes["hkt"] / sizes["flat"],
                    "step_seconds": {
                        arm: {"median": medians[arm], "quartiles": statistics.quantiles(values, n=4)[::2]}
                        for arm, values in seconds.items()
                    },
                    "step_ratio": medians["hkt"] / medians["flat"],
                    "paired_step_ratio": statistics.median(
                        hkt / flat for hkt, flat in zip(seconds["hkt"], seconds["flat"], strict=True)
                    ),
                }
            )
    return rows


def _seconds(model: HKTForCausalLM, token: torch.Tensor, cache: Cache, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(token, past_key_values=cache)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start
