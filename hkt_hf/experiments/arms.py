"""What is compared: HKT, its flat twins and controls, its ablations, and models from outside this package."""

import copy
import difflib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..architectures import architecture
from ..config import ExperimentConfig
from ..data import TaskData
from ..modeling import HKTConfig
from ..modeling.modeling_hkt import HKTAttention, HKTForSequenceClassification
from ..presets import field_names
from ..training import build_model_and_tokenizer, new_tokenizer
from .peers import build_peer, is_peer, peer_names, peer_padding


CONVOLUTION_KERNEL_SIZE = 4
VALUE_CONVOLUTION_TAPS = 65  # as Nyströmformer of transformers has
ROPE_SUFFIX = "-rope"


@dataclass(frozen=True)
class Arm:
    """One model of a comparison.

    Args:
        description (`str`): what it is, for people.
        fields (mapping, *optional*): fields of [`HKTConfig`] that differ from the protocol's; with `model_type` those of
            that architecture.
        change (`Callable`, *optional*): changes the model once it is built, before training.
        as_large_as (`str`, *optional*): `"parameters"` or `"flops"`: the feed-forward layers are widened until the model
            has as many as the arm `"hkt"` with the same positions.
        setting_of (`str`, *optional*): the arm whose searched setting it takes; by default it has a search of its own.
        pretrained (`bool`, *optional*, defaults to `False`): begin with masked-LM pretraining on the task's training
            inputs.
        is_peer (`bool`, *optional*, defaults to `False`): a model of another library, by the arm's name.
        segments (`bool`, *optional*, defaults to `False`): it is told which sentence and paragraph each token is in.
        flat_twin (`str`, *optional*, defaults to `"flat"`): of an arm of HKT, the flat arm that has all else that it has.
    """

    description: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[nn.Module], None] | None = None
    as_large_as: str | None = None
    setting_of: str | None = None
    pretrained: bool = False
    is_peer: bool = False
    segments: bool = False
    flat_twin: str = "flat"

    @property
    def has_levels(self) -> bool:
        """Whether it is an HKT, flat or not, with a number of levels."""
        return not self.is_peer and "model_type" not in self.fields

    @property
    def is_checkpoint(self) -> bool:
        """Whether a trained model can be saved and loaded by its configuration alone."""
        return not self.is_peer and self.change is None


class ConvolvedLinear(nn.Module):
    """A projection of features that a short causal depthwise convolution has mixed: `(B, T, d)` to `(B, T, width)`.

    Args:
        linear (`nn.Linear`): the projection.
        kernel_size (`int`): taps; position `t` sees `t - kernel_size + 1 .. t`.
    """

    def __init__(self, linear: nn.Linear, kernel_size: int):
        super().__init__()
        self.linear = linear
        channels = linear.in_features
        self.convolution = nn.Conv1d(channels, channels, kernel_size, groups=channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mix and project."""
        history = self.convolution.kernel_size[0] - 1
        padded = F.pad(hidden_states.transpose(1, 2), (history, 0))
        return self.linear(self.convolution(padded).transpose(1, 2))


def add_short_convolution(model: nn.Module) -> None:
    """Put a causal depthwise convolution of kernel 4 before each query and key projection of level 0.

    The control for locality at one resolution, with the initial weights of `nn.Conv1d`. Ours; such a convolution stands
    before the mixing of many recent models, e.g. in Mamba (arXiv 2312.00752, section 3.4).
    """
    for attention in _attentions(model):
        for projections in (attention.q_proj, attention.k_proj):
            projections[0] = ConvolvedLinear(projections[0], CONVOLUTION_KERNEL_SIZE)


class ConvolvedValues(nn.Module):
    """Attention, to whose heads a depthwise convolution of their values is added before the output projection.

    `(B, T, d)` to `(B, T, d)`; position `t` sees `t - taps // 2 .. t + taps // 2`. As Nyströmformer has it (arXiv
    2102.03902, section 3.2): one kernel a head, no bias. It begins with zeros, so that the model begins as without it.

    Args:
        attention ([`HKTAttention`]): the attention.
        taps (`int`): of the convolution, an odd number.

    Raises:
        ValueError: in `forward`, for packed sequences and for padding on the left.
    """

    def __init__(self, attention: HKTAttention, taps: int):
        super().__init__()
        self.attention = attention
        heads = attention.num_heads
        self.convolution = nn.Conv2d(heads, heads, (taps, 1), padding=(taps // 2, 0), groups=heads, bias=False)
        nn.init.zeros_(self.convolution.weight)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, ...]:
        """What the attention returns, its output with the convolution; values are projected a second time."""
        if kwargs.get("layout") is not None:
            raise ValueError("`attention_mask` must have its padding on the right, and no packed sequences")
        output, *others = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        attention = self.attention
        values = attention.v_proj(hidden_states)
        if attention_mask is not None:  # of the last query, which sees every real token: bool, or 0 where it attends
            row = attention_mask[:, 0, -1, :, None]
            values = values * (row if row.dtype == torch.bool else row == 0)
        values = values.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        mixed = self.convolution(values).transpose(1, 2).flatten(2)
        return output + F.linear(mixed, attention.o_proj.weight), *others


def add_value_convolution(model: nn.Module) -> None:
    """Add the convolution of Nyströmformer, 65 taps to both sides, to the values of every layer.

    The control for what else than its attention a strong peer has.
    """
    for layer in model.model.layers:
        layer.self_attn = ConvolvedValues(layer.self_attn, VALUE_CONVOLUTION_TAPS)


class NoAttention(nn.Module):
    """Stands where attention was and adds nothing: no position sees another."""

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor]:
        """Zeros, of the shape of the input."""
        return (torch.zeros_like(hidden_states),)


def remove_attention(model: nn.Module) -> None:
    """Take attention out of every layer: the tokens are classified one by one and pooled.

    The control for how much of a task attention is needed for, or has learned, at all. Ours.
    """
    for layer in model.model.layers:
        layer.self_attn = NoAttention()


def freeze_uniform_weights(model: nn.Module) -> None:
    """Keep the level weights where they begin, all equal."""
    for attention in _attentions(model):
        attention.level_logits.requires_grad_(False)


def freeze_downsampling(model: nn.Module) -> None:
    """Keep the downsampling as the mean over its taps."""
    for attention in _attentions(model):
        attention.downsample.requires_grad_(False)


def freeze_single_level(level: int) -> Callable[[nn.Module], None]:
    """Give one level all the weight, for good."""

    def freeze(model: nn.Module) -> None:
        for attention in _attentions(model):
            attention.level_logits.requires_grad_(False)
            with torch.no_grad():
                attention.level_logits.fill_(-1e4)
                attention.level_logits[:, level] = 0.0

    return freeze


def _attentions(model: nn.Module) -> list[HKTAttention]:
    return [module for module in model.modules() if isinstance(module, HKTAttention)]


def _ablation(description: str, **arguments) -> Arm:
    return Arm(f"HKT, {description}", setting_of="hkt", **arguments)


ARMS: dict[str, Arm] = {
    "flat": Arm("one level: plain multi-head attention", {"num_levels": 1}),
    "hkt": Arm("three levels; the protocols give it two taps of downsampling"),
    "flat-convolution": Arm(
        "flat, with a causal depthwise convolution (kernel 4) on the inputs of queries and keys",
        {"num_levels": 1},
        change=add_short_convolution,
    ),
    "flat-post-norm": Arm(
        "flat, with layer norms after the embeddings and after each residual sum, as BERT has them",
        {"num_levels": 1, "norm_placement": "post"},
    ),
    "flat-post-norm-value-convolution": Arm(
        "flat, with these layer norms and Nyströmformer's depthwise convolution (65 taps) of the values",
        {"num_levels": 1, "norm_placement": "post"},
        change=add_value_convolution,
        setting_of="flat-post-norm",
    ),
    "flat-no-attention": Arm(
        "flat, with attention left out: what the tokens tell one by one",
        {"num_levels": 1},
        change=remove_attention,
        setting_of="flat",
    ),
    "bert": Arm("BERT of transformers, mean pooling: a multi-head model that shares no code with ours", is_peer=True),
    "flat-wide-parameters": Arm(
        "flat, with wider feed-forward layers: as many parameters as HKT",
        {"num_levels": 1},
        as_large_as="parameters",
        setting_of="flat",
    ),
    "flat-wide-flops": Arm(
        "flat, with wider feed-forward layers: as many FLOPs forward as HKT at the longest length",
        {"num_levels": 1},
        as_large_as="flops",
        setting_of="flat",
    ),
    "hkt-convolution": _ablation(
        "with the same convolution on level 0", change=add_short_convolution, flat_twin="flat-convolution"
    ),
    "hkt-post-norm": Arm(
        "HKT, with the same layer norms as flat-post-norm", {"norm_placement": "post"}, flat_twin="flat-post-norm"
    ),
    "hkt-post-norm-kernel-4": Arm(
        "HKT, with the same layer norms and 4 taps",
        {"norm_placement": "post", "downsample_kernel_size": 4},
        setting_of="hkt-post-norm",
        flat_twin="flat-post-norm",
    ),
    "hkt-post-norm-kernel-4-value-convolution": Arm(
        "HKT, with the same layer norms, 4 taps and the same convolution of the values",
        {"norm_placement": "post", "downsample_kernel_size": 4},
        change=add_value_convolution,
        setting_of="hkt-post-norm",
        flat_twin="flat-post-norm-value-convolution",
    ),
    "hkt-levels-2": _ablation("two levels", fields={"num_levels": 2}),
    "hkt-levels-4": _ablation("four levels", fields={"num_levels": 4}),
    "hkt-uniform-weights": _ablation("level weights fixed, all equal", change=freeze_uniform_weights),
    "hkt-only-level-0": _ablation("all weight on level 0, fixed", change=freeze_single_level(0)),
    "hkt-only-level-1": _ablation("all weight on level 1, fixed", change=freeze_single_level(1)),
    "hkt-only-level-2": _ablation("all weight on level 2, fixed", change=freeze_single_level(2)),
    "hkt-shared-projections": _ablation(
        "one query and key projection for all levels", fields={"share_level_projections": True}
    ),
    "hkt-kernel-3": _ablation("downsampling with 3 taps", fields={"downsample_kernel_size": 3}),
    "hkt-kernel-4": _ablation("downsampling with 4 taps", fields={"downsample_kernel_size": 4}),
    "hkt-dense": _ablation("dense downsampling", fields={"downsample_type": "dense"}),
    "hkt-untrained-mean": _ablation("downsampling by the mean, not trained", change=freeze_downsampling),
    "hkt-symmetric": _ablation(
        "symmetric scores: keys are queries times factors", fields={"score_symmetry": "symmetric"}
    ),
    "hkt-psd": _ablation("positive semidefinite scores: keys are the queries", fields={"score_symmetry": "psd"}),
    "hkt-pool-cls": _ablation("pooling: the first token", fields={"pooling": "cls"}),
    "hkt-pool-last": _ablation("pooling: the last token", fields={"pooling": "last"}),
    "hsa-flat": Arm(
        "HSA's layers on a flat tree: plain attention",
        {"model_type": "hsa", "branching": [None], "sibling_positions": False},
    ),
    "hsa": Arm("HSA along sentences and paragraphs", {"model_type": "hsa"}, segments=True),
    "hsa-windows": Arm(
        "HSA along windows of 16 tokens under one root",
        {"model_type": "hsa", "branching": [16, None]},
        setting_of="hsa",
    ),
    "hsa-line": Arm("HSA along runs of 4, of 4 runs, ...", {"model_type": "hsa", "branching": 4}),
    "hsa-quadtree": Arm(
        "HSA along blocks of 2 by 2 pixels, of 2 by 2 blocks, ...",
        {"model_type": "hsa", "branching": 2, "tree_layout": "square"},
    ),
    "flat-pretrained": Arm("flat, after masked-LM pretraining on the task", {"num_levels": 1}, pretrained=True),
    "hkt-pretrained": Arm(
        "HKT, after masked-LM pretraining on the task", pretrained=True, flat_twin="flat-pretrained"
    ),
}
"""Arms by name. With the suffix `-rope` an arm of ours has rotary positions, without it learned absolute ones."""


def parse_arm(name: str) -> tuple[Arm, str | None]:
    """Arm and `position_embedding_type` (`None` for a peer) of a name such as `"hkt-rope"`.

    Raises:
        ValueError: an unknown arm; the message names the nearest one.
    """
    check_arm(name)
    if name in ARMS:
        return ARMS[name], None if ARMS[name].is_peer else "absolute"
    if is_peer(name):
        return Arm(f"{name}, another architecture", is_peer=True), None
    return ARMS[name.removesuffix(ROPE_SUFFIX)], "rope"


def check_arm(name: str) -> None:
    """ValueError for a name that [`parse_arm`] does not know."""
    with_rope = [f"{arm}{ROPE_SUFFIX}" for arm in ARMS if not ARMS[arm].is_peer]
    if not (name in ARMS or name in with_rope or is_peer(name)):
        nearest = difflib.get_close_matches(str(name), [*ARMS, *with_rope, *peer_names()], n=1, cutoff=0.0)[0]
        raise ValueError(
            f"`arms` must be among {list(ARMS)} (those of ours also with {ROPE_SUFFIX!r}) or a `model_type` of "
            f"transformers, got {name!r}; the nearest one is {nearest!r}"
        )


def setting_source(name: str) -> str:
    """The arm whose search gives an arm its setting, with the same positions."""
    arm, position = parse_arm(name)
    if arm.setting_of is None:
        return name
    return arm.setting_of + (ROPE_SUFFIX if position == "rope" else "")


def model_fields(name: str, base: Mapping[str, Any], *, vocab_size: int, length: int, num_labels: int) -> dict:
    """Fields of the configuration of an arm of ours.

    Args:
        name (`str`): the arm.
        base (mapping): fields that all arms share; those that the arm's architecture does not have are left out.
        vocab_size (`int`): of the task.
        length (`int`): longest sequence, which FLOPs are counted at.
        num_labels (`int`): of the task.
    """
    arm, position = parse_arm(name)
    known = field_names(architecture(arm.fields.get("model_type", HKTConfig.model_type)).config_class)
    shared = {name: value for name, value in base.items() if name in known}
    fields = {**shared, **arm.fields, "position_embedding_type": position}
    if arm.as_large_as is not None:
        sizes = {"vocab_size": vocab_size, "max_position_embeddings": length, "num_labels": num_labels}
        target = _costs({**base, "position_embedding_type": position, **sizes}, arm, length)
        fields["intermediate_size"] = _width_for(target, {**fields, **sizes}, arm, length)
    return fields


def _costs(fields: Mapping[str, Any], arm: Arm, length: int) -> int:
    model = HKTForSequenceClassification(HKTConfig(**fields))
    if arm.as_large_as == "flops":
        return count_flops(model, length)
    return sum(parameter.numel() for parameter in model.parameters())


def _width_for(target: int, fields: Mapping[str, Any], arm: Arm, length: int) -> int:
    """The feed-forward width whose cost is nearest to the target; the cost is linear in it."""
    width = fields.get("intermediate_size", HKTConfig.intermediate_size)
    cost, twice = (_costs({**fields, "intermediate_size": factor * width}, arm, length) for factor in (1, 2))
    return width + round((target - cost) * width / (twice - cost))


def count_flops(model: nn.Module, length: int) -> int:
    """FLOPs (two a multiply-add) of the matrix products and convolutions of one sequence of `length` tokens, forward.

    Counted by PyTorch's `FlopCounterMode` on the `eager` attention, where the model has one; element-wise work, and for
    Mamba the scan, is not counted. HSA is counted along the trees of its configuration.
    """
    model = copy.deepcopy(model).eval()
    if isinstance(model, PreTrainedModel):
        model.set_attn_implementation("eager")
    else:
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.set_attn_implementation("eager")
    input_ids = torch.ones(1, length, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    return counter.get_total_flops()


def initialize_by_name(model: PreTrainedModel, seed: int) -> None:
    """Draw the initial weights of every module from a generator of its own, seeded by `seed` and the module's name.

    Models of different architectures then begin with the same weights wherever name and shape agree. The global
    generator is left as it was.
    """
    for name, module in reversed(list(model.named_modules())):  # embeddings after a head that is tied to them
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
            model._init_weights(module)


def build_arm(name: str, config: ExperimentConfig, task: TaskData) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model and tokenizer of an arm, ready to be trained; dropout draws the same masks in every arm of ours.

    Args:
        name (`str`): the arm.
        config ([`~hkt_hf.config.ExperimentConfig`]): of the run; its `model` holds the fields of [`model_fields`], or a
            `checkpoint` that was pretrained.
        task ([`~hkt_hf.data.TaskData`]): the data.

    Raises:
        NotAvailableError: a peer that can't be built here.
    """
    arm, _ = parse_arm(name)
    if arm.is_peer:
        return _build_peer(name, config, task)
    model, tokenizer = build_model_and_tokenizer(config, task)  # with the head of `config.objective`
    if "checkpoint" not in config.model:
        initialize_by_name(model, config.seed)
    if arm.change is not None:
        arm.change(model)
    set_seed(config.seed)
    return model, tokenizer


def arm_padding(name: str, length: int) -> int | None:
    """To a multiple of what an arm's batches are padded; `None` is the longest sequence of the batch."""
    return peer_padding(name, length) if parse_arm(name)[0].is_peer else None


def _build_peer(name: str, config: ExperimentConfig, task: TaskData) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    length = config.tokenizer.max_length
    tokenizer = new_tokenizer(config.tokenizer, task.tokenizer_kind)
    sizes = HKTConfig(**config.model)
    model = build_peer(
        name,
        vocab_size=len(tokenizer),
        num_labels=len(task.label_names),
        length=length,
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        num_hidden_layers=sizes.num_hidden_layers,
        intermediate_size=sizes.intermediate_size,
        dropout=sizes.hidden_dropout,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(config.seed)
    return model, tokenizer
