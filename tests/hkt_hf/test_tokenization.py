import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hkt_hf.tokenization import TOKENIZER_KINDS, build_tokenizer, encode_texts


BYTES = build_tokenizer("bytes", model_max_length=10_000)
BYTES_CLS = build_tokenizer("bytes", model_max_length=24, add_cls_token=True)
SAMPLES = {
    "listops": "[MAX 2 9 [MIN 4 7 ] [MED 0 1 ] [SM 3 5 ] ]",
    "bytes": "Zażółć [PAD]\t🧠\x00[CLS]  end\r\n",
    "pixels": "0 7 42 128 255",
}
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
LOAD_ELSEWHERE = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert not any(name.split(".")[0] == "hkt_hf" for name in sys.modules), "hkt_hf was imported"
texts = json.loads(sys.argv[2])
print(json.dumps([tokenizer(texts)["input_ids"], tokenizer.model_max_length, tokenizer.padding_side,
                  tokenizer.model_input_names, type(tokenizer).__name__]))
"""


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_special_tokens(kind):
    tokenizer = build_tokenizer(kind, model_max_length=64)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4]
    assert [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id] == [0, 1, 2]
    assert [tokenizer.sep_token_id, tokenizer.mask_token_id] == [3, 4]
    assert tokenizer.padding_side == "right"
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer) == 5 + {"listops": 15, "bytes": 256, "pixels": 256}[kind]


def test_listops_words():
    tokenizer = build_tokenizer("listops", model_max_length=64)
    ids = tokenizer(SAMPLES["listops"])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == SAMPLES["listops"].split()
    assert tokenizer("[MAX 12 ]")["input_ids"][1] == tokenizer.unk_token_id
    assert tokenizer.decode(ids) == SAMPLES["listops"]


def test_pixel_words():
    tokenizer = build_tokenizer("pixels", model_max_length=1024)
    text = " ".join(map(str, range(256)))
    assert tokenizer(text)["input_ids"] == list(range(5, 261))
    assert tokenizer("256 -1 007 12")["input_ids"] == [1, 1, 1, 17]


def test_every_byte_has_its_id():
    text = "".join(map(chr, range(256))) + "€🧠"
    assert BYTES(text)["input_ids"] == [5 + byte for byte in text.encode()]


@given(any_text)
def test_bytes_round_trip(text):
    ids = BYTES(text)["input_ids"]
    assert ids == [5 + byte for byte in text.encode()]
    assert BYTES.decode(ids) == text
    assert BYTES_CLS.decode(BYTES_CLS(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["[PAD]", "a[CLS]b", "[MASK] [SEP][UNK]", " [PAD] "])
def test_special_tokens_in_text_stay_text(text):
    ids = BYTES(text)["input_ids"]
    assert ids == [5 + byte for byte in text.encode()]
    assert BYTES.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_in_text_can_be_read_as_such(tmp_path):
    build_tokenizer("bytes", model_max_length=64, split_special_tokens=False).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "a[MASK]b [PAD]"
    ids = [5 + ord("a"), tokenizer.mask_token_id, 5 + ord("b"), 5 + ord(" "), tokenizer.pad_token_id]
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    # Six characters are one token: the texts must not be cut before they are encoded.
    for max_length in (2, 5, 64):
        assert encode_texts(tokenizer, [text], max_length) == [ids[:max_length]]


@given(st.lists(any_text, min_size=1, max_size=5), st.integers(2, 80))
def test_encode_texts_equals_a_call(texts, max_length):
    for tokenizer in (BYTES, BYTES_CLS):
        expected = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        assert encode_texts(tokenizer, texts, max_length) == expected


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@pytest.mark.parametrize("add_cls_token", [False, True])
def test_encode_texts_of_each_kind(kind, add_cls_token):
    tokenizer = build_tokenizer(kind, model_max_length=4, add_cls_token=add_cls_token)
    texts = [SAMPLES[kind], SAMPLES[kind][:5]]
    expected = tokenizer(texts, truncation=True)["input_ids"]
    assert max(map(len, expected)) == 4
    assert encode_texts(tokenizer, texts) == expected
    assert encode_texts(tokenizer, texts, 3) == [ids[:3] for ids in expected]
    # The backend's state that `encode_texts` changes doesn't leak into later calls.
    assert tokenizer(texts, truncation=True, padding="max_length")["input_ids"][0] == expected[0]


def test_encode_texts_of_another_tokenizer():
    tokenizer = build_tokenizer("listops", model_max_length=4)
    del tokenizer.init_kwargs["hkt_kind"]
    assert encode_texts(tokenizer, ["1 2 3 4 5 6"]) == [tokenizer.convert_tokens_to_ids(list("1234"))]
    tokenizer = build_tokenizer("bytes", model_max_length=4)
    tokenizer.truncation_side = "left"
    assert tokenizer.decode(encode_texts(tokenizer, ["abcdef"])[0]) == "cdef"


def test_cls_padding_and_truncation():
    batch = BYTES_CLS(["ab", "x" * 100], padding=True, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 24)
    assert batch["input_ids"][:, 0].tolist() == [2, 2]
    assert batch["input_ids"][0, 1:].tolist() == [5 + ord("a"), 5 + ord("b")] + [0] * 21
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([3, 24]))
    assert sorted(batch) == ["attention_mask", "input_ids"]


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@pytest.mark.parametrize("add_cls_token", [False, True])
def test_save_and_load(kind, add_cls_token, tmp_path):
    tokenizer = build_tokenizer(kind, model_max_length=77, add_cls_token=add_cls_token)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [SAMPLES[kind], "[PAD]"]
    assert loaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert encode_texts(loaded, texts) == tokenizer(texts)["input_ids"]
    assert (loaded.model_max_length, loaded.split_special_tokens) == (77, True)
    assert loaded.init_kwargs["hkt_kind"] == kind
    loaded.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]


def test_load_in_a_process_without_this_package(tmp_path):
    texts = [SAMPLES["bytes"], "[PAD]"]
    BYTES_CLS.save_pretrained(tmp_path / "tokenizer")
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD_ELSEWHERE, str(tmp_path / "tokenizer"), json.dumps(texts)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ids, max_length, side, names, _ = json.loads(done.stdout.splitlines()[-1])
    assert ids == [[2, *(5 + byte for byte in text.encode())] for text in texts]
    assert (max_length, side, names) == (24, "right", ["input_ids", "attention_mask"])
    assert not list((tmp_path / "tokenizer").glob("*.py"))


def test_bad_arguments():
    with pytest.raises(ValueError, match="nearest is 'bytes'"):
        build_tokenizer("byte", model_max_length=8)
    with pytest.raises(ValueError, match="`kind`"):
        build_tokenizer(None, model_max_length=8)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        build_tokenizer("bytes", model_max_length=1, add_cls_token=True)
    for value in (0, 8.0, True, None):
        with pytest.raises(ValueError, match="`model_max_length`"):
            build_tokenizer("bytes", model_max_length=value)
