"""Masked tokens for masked-language-model training (Devlin et al. 2019, arXiv 1810.04805), the same on every machine."""

from collections.abc import Sequence

import datasets
import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, TrainerCallback


# Beside the seed, what keeps the masks of different uses apart.
_TRAIN_STREAM, _EVALUATION_STREAM = range(2)


class TokenMasker:
    """Masks tokens by `DataCollatorForLanguageModeling`: of those chosen, 80 % become the mask token, 10 % a random one.

    The stock collator draws from one generator as batches come: a resumed run would start that anew, and workers would
    share it out. Here every example is masked on its own, from a seed that the caller names. Special tokens are never
    chosen. An example in which none is chosen gets one mask token, so that no batch is without a loss (ours).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): tokenizer, with a mask token.
        probability (`float`): share of tokens to choose.

    Raises:
        ValueError: the tokenizer has no mask token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float):
        if tokenizer.mask_token_id is None:
            raise ValueError(
                "masked language modeling needs a mask token, which the tokenizer of the checkpoint lacks"
            )
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)
        self.special_ids = torch.tensor(tokenizer.all_special_ids)

    def __call__(self, input_ids: Sequence[int], seed: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask one sequence.

        Args:
            input_ids (sequence of `int`): token ids, `T` of them, at least one not special.
            seed (sequence of `int`): numbers of at least 0; equal ones give equal masks.

        Returns:
            `tuple[torch.LongTensor, torch.LongTensor]`: the masked ids and the labels, both `(T,)`. A label is the id
            that was there, or -100 where it is not to be predicted.
        """
        original = torch.as_tensor(input_ids)
        special = torch.isin(original, self.special_ids)
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        self.collator.generator = generator
        masked, labels = self.collator.torch_mask_tokens(original[None].clone(), special_tokens_mask=special[None])
        self.collator.generator = None
        masked, labels = masked[0], labels[0]
        if not (labels != -100).any():
            candidates = torch.nonzero(~special).flatten()
            chosen = candidates[torch.randint(len(candidates), (1,), generator=generator)]
            masked[chosen], labels[chosen] = self.collator.tokenizer.mask_token_id, original[chosen]
        return masked, labels

    def check(self, split: datasets.Dataset, name: str) -> None:
        """Refuse a split with a text of special tokens alone, such as unknown words.

        Args:
            split ([`datasets.Dataset`]): with the columns `input_ids` and `example`, its row.
            name (`str`): its name, for the message.

        Raises:
            ValueError: there is one.
        """
        special_ids = set(self.special_ids.tolist())
        for row in split:
            if special_ids.issuperset(row["input_ids"]):
                raise ValueError(f"row {row['example']} of split {name!r} has a text without a token to mask")

    def mask_for_evaluation(self, split: datasets.Dataset, seed: int) -> datasets.Dataset:
        """Mask the column `input_ids` of a split once, and add `labels`; the masks of a row depend on `example` alone."""

        def mask(row: dict) -> dict:
            masked, labels = self(row["input_ids"], (seed, _EVALUATION_STREAM, row["example"]))
            return {"input_ids": masked.tolist(), "labels": labels.tolist()}

        return split.map(mask, desc="masking")


class MaskingCollator:
    """Masks and pads a batch to train on, and pads one to evaluate on, which has its `labels` already.

    The masks of an example depend on the seed, the epoch and its row, and on nothing else: not on the batch it is in,
    on the number of processes or workers, or on whether the run was resumed.

    Args:
        masker ([`TokenMasker`]): masks one sequence.
        seed (`int`): seed of the masks.
    """

    def __init__(self, masker: TokenMasker, seed: int):
        self.masker = masker
        self.seed = seed
        # In shared memory: workers of a data loader that outlive an epoch see the next one begin.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Called at the start of each epoch, also of a resumed one."""
        self._epoch.fill_(epoch)

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """Collate.

        Args:
            examples (`list[dict]`): each with `input_ids` and `example` (its row), or with `input_ids` and `labels`.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels` (-100 where nothing is to be
            predicted), each `(B, T)` of `int64`.
        """
        epoch = int(self._epoch)
        pairs = [
            (torch.as_tensor(example["input_ids"]), torch.as_tensor(example["labels"]))
            if "labels" in example
            else self.masker(example["input_ids"], (self.seed, _TRAIN_STREAM, epoch, example["example"]))
            for example in examples
        ]
        tokenizer = self.masker.collator.tokenizer
        rows = [{"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)} for input_ids, _ in pairs]
        batch = dict(tokenizer.pad(rows, return_tensors="pt"))
        labels = torch.full_like(batch["input_ids"], -100)
        labels[batch["attention_mask"].bool()] = torch.cat([labels for _, labels in pairs])
        return {**batch, "labels": labels}


class EpochOfMasks(TrainerCallback):
    """Tells a [`MaskingCollator`] which epoch begins."""

    def __init__(self, collator: MaskingCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Called by the Trainer; `state.epoch` counts the epochs done, with a fraction after resuming within one."""
        self.collator.set_epoch(int(state.epoch or 0))
