"""What a decoder's cache costs: bytes, and seconds for one more token, against the flat twin."""

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Cache

from ..modeling import HKTForCausalLM
from ..presets import preset
from .measurement import summary, take_turns


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


class DecodingStep:
    """A decoder that has read `context` random tokens; each call reads one more, and its cache grows by it.

    Args:
        model (`nn.Module`): a causal language model of transformers, or one with its interface.
        context (`int`): tokens before the first call.
        batch_size (`int`): sequences.

    `cache` is the model's cache, wherever the model's output keeps it.
    """

    @torch.inference_mode()
    def __init__(self, model: nn.Module, context: int, batch_size: int = 1):
        self.model = model.eval()
        vocab_size, device = model.config.vocab_size, next(model.parameters()).device
        output = model(torch.randint(vocab_size, (batch_size, context), device=device), use_cache=True)
        self._cache_name = "cache_params" if "cache_params" in output else "past_key_values"
        self.cache = output[self._cache_name]
        self._token = torch.randint(vocab_size, (batch_size, 1), device=device)

    @torch.inference_mode()
    def __call__(self) -> None:
        """Decode one token."""
        self.model(self._token, use_cache=True, **{self._cache_name: self.cache})


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
    rows, models = [], {}
    for arm, levels in (("flat", 1), ("hkt", num_levels)):
        torch.manual_seed(0)
        config = preset(
            model_name,
            vocab_size=512,
            num_levels=levels,
            is_decoder=True,
            max_position_embeddings=max(contexts) + num_tokens + warm_up,
        )
        models[arm] = HKTForCausalLM(config).to(device, dtype)
    for context in tqdm(contexts, desc="contexts"):
        steps = {arm: DecodingStep(model, context, batch_size) for arm, model in models.items()}
        sizes = {arm: cache_bytes(step.cache) for arm, step in steps.items()}
        seconds = take_turns(steps, warm_up, num_tokens, device)
        arms = {arm: summary(seconds[arm], seconds["flat"]) for arm in steps}
        rows.append(
            {
                "context": context,
                "cache_bytes": sizes,
                "cache_ratio": sizes["hkt"] / sizes["flat"],
                "step_seconds": {
                    arm: {key: values["seconds"][key] for key in ("median", "quartiles")}
                    for arm, values in arms.items()
                },
                "step_ratio": arms["hkt"]["ratio"],
                "paired_step_ratio": arms["hkt"]["paired_ratio"],
            }
        )
    return rows
