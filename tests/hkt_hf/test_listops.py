import hashlib
import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hkt_hf.data import listops
from hkt_hf.data.listops import ListOpsConfig, evaluate, generate, load_listops


SMALL = {"min_length": 8, "max_length": 40, "num_train": 60, "num_validation": 20, "num_test": 30}
GOLDEN_SHA256 = {
    "train": "05a95f220f8e5a39abccc8b5ca2f64c23ff228b63dc3af7f37c091aed59f515e",
    "validation": "80f0185109ea196dcee4bde7a80eca04e4b7e53601e4b531572e1771e1fdadc5",
    "test": "72062f9377811b188b5f93bef04c7a25b9606c7089de84b2a6d2126aeb60d41d",
}


def reference_value(tokens):
    """Recursive evaluator, written apart from the iterative one; consumes the tokens it reads."""
    head = tokens.pop(0)
    if head.isdigit():
        return int(head)
    arguments = []
    while tokens[0] != "]":
        arguments.append(reference_value(tokens))
    tokens.pop(0)
    if head == "[SM":
        return sum(arguments) % 10
    return int({"[MIN": min, "[MAX": max, "[MED": statistics.median}[head](arguments))


def depth(tokens):
    levels = itertools.accumulate((token.startswith("[")) - (token == "]") for token in tokens)
    return 1 + max(levels)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MED 1 4 9 ]", 4),
        ("[MED 9 4 ]", 6),
        ("[MED 1 2 8 9 ]", 5),
        ("[SM 9 9 [SM 3 ] ]", 1),
        ("  [MIN   5\n3 ] ", 3),
    ],
)
def test_evaluate(expression, value):
    assert evaluate(expression) == value


def test_evaluate_has_no_recursion_limit():
    assert evaluate("[MAX " * 50_000 + "4" + " ]" * 50_000) == 4


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "empty"),
        ("[AVG 1 2 ]", r"'\[AVG' at position 0"),
        ("[MAX 1 12 ]", "'12' at position 2"),
        ("[MAX 1 ٣ ]", "'٣' at position 2"),
        ("[MAX 1 2", r"after position 2: '\[MAX' is not closed"),
        ("]", "position 0 closes nothing"),
        ("[MAX 1 [SM ] ]", r"position 3 closes '\[SM', which has no arguments"),
        ("[MAX 1 2 ] 3", "'3' at position 4"),
        ("1 2", "'2' at position 1"),
    ],
)
def test_malformed_expressions(expression, message):
    with pytest.raises(ValueError, match=message):
        evaluate(expression)


@given(
    seed=st.integers(0, 10**9),
    lengths=st.tuples(st.integers(4, 40), st.integers(0, 60)),
    max_depth=st.integers(4, 12),
    max_args=st.integers(4, 10),
)
def test_generated_expressions(seed, lengths, max_depth, max_args):
    low, extra = lengths
    config = ListOpsConfig(
        seed=seed, min_length=low, max_length=low + extra + 10, max_depth=max_depth, max_args=max_args
    )
    for expression, value in itertools.islice(generate(config), 10):
        tokens = expression.split(" ")
        assert config.min_length <= len(tokens) <= config.max_length
        assert depth(tokens) <= max_depth
        assert reference_value(list(tokens)) == value


def test_lengths_are_inclusive_and_operators_all_occur():
    config = ListOpsConfig(min_length=10, max_length=12)
    expressions = [expression.split() for expression, _ in itertools.islice(generate(config), 2000)]
    assert {len(tokens) for tokens in expressions} == {10, 11, 12}
    assert {token for tokens in expressions for token in tokens} == {*listops.DIGITS, *listops.OPERATORS, "]"}


def test_sampling_is_that_of_the_paper():
    draw = random.Random(5).random
    trees = [listops._draw_tree(draw, min_length=1, max_length=12, max_depth=2, max_args=10) for _ in range(20_000)]
    lists = [tree for tree in trees if len(tree) > 1]
    assert len(lists) / len(trees) == pytest.approx(0.25, abs=0.01)
    num_args = [len(tree) - 2 for tree in lists]
    operators = [tree[0] for tree in lists]
    digits = [token for tree in trees for token in tree if token.isdigit()]
    for values, choices in ((num_args, range(2, 11)), (operators, listops.OPERATORS), (digits, listops.DIGITS)):
        assert set(values) == set(choices)
        for choice in choices:
            assert values.count(choice) / len(values) == pytest.approx(1 / len(choices), abs=0.02)


def test_unreachable_lengths_are_refused_at_once():
    with pytest.raises(ValueError, match="min_length`=500 can't be reached with max_depth=1"):
        ListOpsConfig(min_length=500, max_length=600, max_depth=1)
    ListOpsConfig(min_length=12, max_length=12, max_depth=2)
    with pytest.raises(ValueError, match="12 tokens"):
        ListOpsConfig(min_length=13, max_length=13, max_depth=2)


def test_exhausted_expressions_end_in_an_error(monkeypatch):
    monkeypatch.setattr(listops, "MAX_REJECTIONS", 2000)
    with pytest.raises(ValueError, match="after 10 expressions"):
        list(itertools.islice(generate(ListOpsConfig(min_length=1, max_length=3)), 11))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 1.0),
        ("min_length", 0),
        ("max_length", 16),
        ("max_depth", 0),
        ("max_args", 1),
        ("num_train", 0),
        ("num_test", True),
        ("num_validation", "10"),
    ],
)
def test_bad_values(field, value):
    name = "min_length" if field == "max_length" else field
    with pytest.raises(ValueError, match=f"`data.listops.{name}`"):
        ListOpsConfig(**{field: value})


def test_splits(tmp_path):
    splits = load_listops(ListOpsConfig(**SMALL), tmp_path)
    assert {name: len(split) for name, split in splits.items()} == {"train": 60, "validation": 20, "test": 30}
    assert splits["train"].features["label"].names == list("0123456789")
    texts = [text for split in splits.values() for text in split["text"]]
    assert len(set(texts)) == len(texts) == 110
    for split in splits.values():
        assert all(evaluate(row["text"]) == row["label"] for row in split)


def test_test_split_does_not_depend_on_the_size_of_train(tmp_path):
    few = load_listops(ListOpsConfig(**SMALL), tmp_path)
    many = load_listops(ListOpsConfig(**{**SMALL, "num_train": 90}), tmp_path)
    other = load_listops(ListOpsConfig(**SMALL, seed=1), tmp_path)
    assert few["test"][:] == many["test"][:]
    assert few["train"][:]["text"] == many["train"][:60]["text"]
    assert few["test"][:] != other["test"][:]


def test_files_are_the_same_everywhere(tmp_path):
    load_listops(ListOpsConfig(**SMALL), tmp_path)
    for split, digest in GOLDEN_SHA256.items():
        (file,) = tmp_path.glob(f"listops-*/{split}.jsonl")
        assert hashlib.sha256(file.read_bytes()).hexdigest() == digest


def test_second_call_reads_the_cache(tmp_path, monkeypatch):
    first = load_listops(ListOpsConfig(**SMALL), tmp_path)

    def fail(config):
        raise AssertionError("generated again")

    monkeypatch.setattr(listops, "generate", fail)
    assert load_listops(ListOpsConfig(**SMALL), tmp_path)["train"][:] == first["train"][:]
    with pytest.raises(AssertionError, match="generated again"):
        load_listops(ListOpsConfig(**SMALL, seed=1), tmp_path)


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(listops, "MAX_REJECTIONS", 2000)
    with pytest.raises(ValueError, match="no new ListOps expression"):
        load_listops(ListOpsConfig(min_length=1, max_length=3), tmp_path)
    assert list(tmp_path.iterdir()) == []
