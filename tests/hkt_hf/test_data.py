import csv
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hkt_hf.data import DataConfig, ListOpsConfig, load_data
from hkt_hf.data import text as text_module
from hkt_hf.data.images import images_to_text


DATA_DIR = Path(os.environ.get("HKT_DATA_DIR", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))


def real_data(name):
    folder = DATA_DIR / name
    if not folder.is_dir():
        pytest.skip(f"no folder {name} in HKT_DATA_DIR ({DATA_DIR})")
    return str(folder)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_csv(path, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def rows(num_rows, num_classes=2, start=0):
    return [{"text": f"text {start + i}", "label": i % num_classes} for i in range(num_rows)]


def load(tmp_path, **settings):
    settings = {"task": "text", **settings}
    return load_data(DataConfig(**settings), tmp_path / "cache")


def texts(task):
    return {split: list(dataset["text"]) for split, dataset in task.splits.items()}


# --- Files, columns and splits ---


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_formats(suffix, tmp_path):
    examples = [{"text": f'"quoted", {i} é\tNA', "label": i % 2} for i in range(40)]
    file = tmp_path / f"train{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(examples).to_parquet(str(file))
    elif suffix == ".json":
        file.write_text(json.dumps(examples))
    elif suffix == ".jsonl":
        write_jsonl(file, examples)
    else:
        write_csv(file, examples, "\t" if suffix == ".tsv" else ",")
    task = load(tmp_path, path=str(file))
    found = [row for split in task.splits.values() for row in split]
    assert sorted((row["text"], row["label"]) for row in found) == sorted((r["text"], r["label"]) for r in examples)
    assert task.problem_type == "single_label_classification"
    assert task.label_names == ["0", "1"]
    assert task.tokenizer_kind == "bytes"


def test_missing_splits_are_cut_stratified_and_seeded(tmp_path):
    examples = [{"text": f"text {i}", "label": int(i >= 160)} for i in range(200)]
    file = write_jsonl(tmp_path / "mine.jsonl", examples)
    task = load(tmp_path, path=file, test_fraction=0.2, validation_fraction=0.25)
    assert {split: len(dataset) for split, dataset in task.splits.items()} == {
        "train": 120,
        "validation": 40,
        "test": 40,
    }
    assert [sum(task.splits[split]["label"]) for split in ("train", "validation", "test")] == [24, 8, 8]
    everything = [text for split in texts(task).values() for text in split]
    assert sorted(everything) == sorted(row["text"] for row in examples)
    assert texts(task) == texts(load(tmp_path, path=file, test_fraction=0.2, validation_fraction=0.25))
    assert texts(task) != texts(load(tmp_path, path=file, test_fraction=0.2, validation_fraction=0.25, seed=1))
    assert "\n" not in task.description
    for part in ("mine.jsonl", "120 train", "test cut from train (20%, seed 0)", "validation cut from train (25%"):
        assert part in task.description
    assert str(tmp_path) not in task.description


def test_given_splits_are_kept(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train-00000-of-00002.jsonl", rows(6))
    write_jsonl(folder / "train-00001-of-00002.jsonl", rows(4, start=6))
    write_csv(folder / "dev.csv", rows(4, start=50))
    write_csv(folder / "test.csv", rows(6, start=100))
    write_csv(folder / "test_results.csv", rows(6, start=900))
    (folder / "README.md").write_text("notes")
    task = load(tmp_path, path=str(folder))
    assert texts(task)["train"] == [f"text {i}" for i in range(10)]
    assert texts(task)["validation"] == [f"text {i}" for i in range(50, 54)]
    assert texts(task)["test"] == [f"text {i}" for i in range(100, 106)]
    assert "cut" not in task.description


def test_files_and_columns_by_name(tmp_path):
    files = {}
    for number, split in enumerate(("train", "validation", "test")):
        examples = [
            {"id": i, "body": row["text"], "label": "x", "stars": row["label"]}
            for i, row in enumerate(rows(8, start=10 * number))
        ]
        files[f"{split}_file"] = write_csv(tmp_path / f"part{number}.csv", examples)
    task = load(tmp_path, **files, text_column="body", label_column="stars", max_train_samples=3)
    assert task.splits["test"].column_names == ["text", "label"]
    assert texts(task)["test"][0] == "text 20"
    assert len(task.splits["train"]) == 3
    assert "train sampled from 8" in task.description


def test_samples_are_shuffled_first(tmp_path):
    examples = [{"text": f"text {i}", "label": int(i >= 500)} for i in range(1000)]
    file = write_jsonl(tmp_path / "sorted.jsonl", examples)
    task = load(tmp_path, path=file, max_train_samples=100, max_validation_samples=20, max_test_samples=10**6)
    assert [len(task.splits[split]) for split in ("train", "validation", "test")] == [100, 20, 100]
    assert 30 < sum(task.splits["train"]["label"]) < 70
    assert texts(task) == texts(load(tmp_path, path=file, max_train_samples=100, max_validation_samples=20))


def test_a_rare_class_does_not_stop_the_cut(tmp_path):
    examples = [*rows(50), {"text": "once", "label": 2}]
    task = load(tmp_path, path=write_jsonl(tmp_path / "rare.jsonl", examples))
    assert task.label_names == ["0", "1", "2"]
    assert sum(len(split) for split in task.splits.values()) == 51


# --- Labels ---


def test_string_labels_are_sorted_names(tmp_path):
    examples = [{"text": f"t{i}", "label": ["pear", "apple", "fig"][i % 3]} for i in range(60)]
    task = load(tmp_path, path=write_jsonl(tmp_path / "a.jsonl", examples))
    assert task.label_names == ["apple", "fig", "pear"]
    names = {row["text"]: row["label"] for row in examples}
    for row in task.splits["test"]:
        assert task.label_names[row["label"]] == names[row["text"]]


def test_class_labels_keep_their_names(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_list(rows(40), features=features).to_parquet(str(tmp_path / "train.parquet"))
    task = load(tmp_path, path=str(tmp_path / "train.parquet"))
    assert task.label_names == ["no", "yes"]
    assert task.splits["train"].features["label"].names == ["no", "yes"]


def test_boolean_labels(tmp_path):
    examples = [{"text": f"t{i}", "label": i % 4 == 0} for i in range(40)]
    task = load(tmp_path, path=write_jsonl(tmp_path / "a.jsonl", examples))
    assert task.label_names == ["False", "True"]
    assert all(row["label"] == (int(row["text"][1:]) % 4 == 0) for row in task.splits["train"])


def test_decimal_labels_are_regression(tmp_path):
    train = write_csv(tmp_path / "a.csv", [{"text": f"t{i}", "label": i / 4} for i in range(30)])
    test = write_csv(tmp_path / "b.csv", [{"text": f"t{i}", "label": i} for i in range(5)])
    task = load(tmp_path, train_file=train, test_file=test)
    assert task.problem_type == "regression"
    assert task.label_names == ["value"]
    assert task.splits["train"].features["label"] == datasets.Value("float32")
    assert list(task.splits["test"]["label"]) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_list_labels_are_several(tmp_path):
    examples = [{"text": f"t{i}", "label": [i % 2, 1, int(i < 5)]} for i in range(30)]
    task = load(tmp_path, path=write_jsonl(tmp_path / "vectors.jsonl", examples))
    assert task.problem_type == "multi_label_classification"
    assert task.label_names == ["0", "1", "2"]
    assert task.splits["train"].features["label"] == datasets.List(datasets.Value("float32"))
    expected = {row["text"]: [float(value) for value in row["label"]] for row in examples}
    assert all(row["label"] == expected[row["text"]] for split in task.splits.values() for row in split)


def test_lists_of_names_or_ids_become_vectors(tmp_path):
    examples = [{"text": f"t{i}", "label": [["joy"], ["anger", "joy"], []][i % 3]} for i in range(30)]
    task = load(tmp_path, path=write_jsonl(tmp_path / "names.jsonl", examples))
    assert task.label_names == ["anger", "joy"]
    vectors = {0: [0.0, 1.0], 1: [1.0, 1.0], 2: [0.0, 0.0]}
    assert all(row["label"] == vectors[int(row["text"][1:]) % 3] for row in task.splits["train"])

    labels = datasets.List(datasets.ClassLabel(names=["anger", "fear", "joy"]))
    features = datasets.Features({"text": datasets.Value("string"), "label": labels})
    ids = [{"text": f"t{i}", "label": [[2], [0, 2], []][i % 3]} for i in range(30)]
    datasets.Dataset.from_list(ids, features=features).to_parquet(str(tmp_path / "ids.parquet"))
    task = load(tmp_path, path=str(tmp_path / "ids.parquet"))
    assert task.label_names == ["anger", "fear", "joy"]
    assert {tuple(row["label"]) for row in task.splits["train"]} == {(0, 0, 1), (1, 0, 1), (0, 0, 0)}


def test_a_test_file_replaces_that_split_of_a_path(tmp_path):
    path = write_jsonl(tmp_path / "all.jsonl", rows(40))
    test = write_jsonl(tmp_path / "test.jsonl", [{"text": f"new {i}", "label": i % 2} for i in range(7)])
    task = load(tmp_path, path=path, test_file=test)
    assert texts(task)["test"] == [f"new {i}" for i in range(7)]
    assert len(task.splits["train"]) + len(task.splits["validation"]) == 40
    assert "all.jsonl" in task.description and "test.jsonl" in task.description


def test_classes_may_be_numbered_from_one(tmp_path):
    stars = write_jsonl(tmp_path / "stars.jsonl", [{"text": f"t{i}", "label": i % 5 + 1} for i in range(50)])
    task = load(tmp_path, path=stars)
    assert task.label_names == ["1", "2", "3", "4", "5"]
    for row in task.splits["train"]:
        assert task.label_names[row["label"]] == str(int(row["text"][1:]) % 5 + 1)


# --- Errors ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({3: {"text": "a", "label": 5}}, "up to 5 but never 2"),
        ({3: {"text": "a", "label": -2}}, "column 'label' of train holds the label -2 in row 3"),
        ({3: {"text": None, "label": 1}}, "column 'text' of train holds a null in row 3"),
        ({3: {"text": "", "label": 1}}, "column 'text' of train holds an empty text in row 3"),
        ({4: {"text": "a", "label": None}}, "column 'label' of train holds a null in row 4"),
        ({i: {"text": i, "label": i % 2} for i in range(20)}, "must hold text, got int64"),
        ({i: {"text": "a", "label": 1} for i in range(20)}, "single class, '1'"),
        ({i: {"text": "a", "label": 0} for i in range(20)}, "single class, '0'"),
        ({i: {"text": "a", "label": {"x": 1}} for i in range(20)}, "got struct"),
        ({i: {"text": "a", "label": [0, 1, 2][: i % 3]} for i in range(20)}, "0/1 vectors"),
        ({i: {"text": "a", "label": [0, 1] if i < 5 else [1]} for i in range(20)}, r"holds \[1\] in row 5"),
        ({i: {"text": "a", "label": "x" if i else ""} for i in range(20)}, "empty label in row 0"),
        (
            {i: {"body": "a", "label": 1} for i in range(20)},
            r"no column 'text', but \['body', 'label'\]: set `data.text_column`$",
        ),
        ({i: {"text": "a", "lable": 1} for i in range(20)}, "data.label_column`, perhaps to 'lable'"),
    ],
)
def test_bad_rows(changes, message, tmp_path):
    examples = [changes.get(i, row) for i, row in enumerate(rows(20))]
    with pytest.raises(ValueError, match=message):
        load(tmp_path, path=write_jsonl(tmp_path / "bad.jsonl", examples))


def test_labels_that_differ_between_splits(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", rows(20))
    test = write_jsonl(tmp_path / "b.jsonl", [*rows(4), {"text": "a", "label": 2}])
    with pytest.raises(ValueError, match="of test holds the label 2 in row 4; labels must be 0 to 1"):
        load(tmp_path, train_file=train, test_file=test)
    names = write_jsonl(tmp_path / "c.jsonl", [{"text": "a", "label": "x"}])
    with pytest.raises(ValueError, match="one type in all splits"):
        load(tmp_path, train_file=train, test_file=names)
    words = write_jsonl(tmp_path / "d.jsonl", [{"text": "a", "label": "xy"[i % 2]} for i in range(20)])
    other = write_jsonl(tmp_path / "e.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "z"}])
    with pytest.raises(ValueError, match="of test holds the unknown label 'z' in row 1"):
        load(tmp_path, train_file=words, test_file=other)


def test_not_a_number(tmp_path):
    file = write_csv(tmp_path / "a.csv", [{"text": "a", "label": value} for value in ("0.5", "inf", "2.0")])
    with pytest.raises(ValueError, match="holds the label inf in row 1; it must be finite"):
        load(tmp_path, path=file)


@pytest.mark.parametrize("missing", ["NA", "nan", "null", "n/a"])
@pytest.mark.parametrize("scale", [1, 0.1])
def test_a_number_that_is_missing_makes_no_class(missing, scale, tmp_path):
    examples = [{"text": f"a {i}", "label": missing if i == 7 else i % 4 * scale} for i in range(20)]
    with pytest.raises(ValueError, match=f"holds numbers, but '{missing}' in row 7"):
        load(tmp_path, path=write_csv(tmp_path / "a.csv", examples))
    names = [{"text": "a", "label": ("x", "NA")[i % 2]} for i in range(20)]
    assert load(tmp_path, path=write_csv(tmp_path / "b.csv", names)).label_names == ["NA", "x"]


@pytest.mark.parametrize("suffix, separator", [(".csv", ","), (".tsv", "\t")])
def test_a_row_of_more_fields_than_the_header(suffix, separator, tmp_path):
    """pandas would take the first field of each row for an index."""
    file = tmp_path / f"train{suffix}"
    lines = [separator.join((f"long {i}", "and thoughtful", str(i % 2))) for i in range(20)]
    file.write_text("\n".join([f"text{separator}label", *lines]))
    with pytest.raises(ValueError, match=r"2 fields in its header, .* and 3 in its first row"):
        load(tmp_path, path=str(file))


def test_quotation_marks_in_a_tab_separated_file(tmp_path):
    """As in GLUE, where they are part of the texts; and as spreadsheets write them, even around a line break."""
    said = ['"a quote that opens only', '"another', '"whole"', 'in "the" middle', *(f"plain {i}" for i in range(16))]
    plain = tmp_path / "plain.tsv"
    plain.write_text("text\tlabel\n" + "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(said)))
    lines = [{"text": f'one\nline, "{i}"', "label": i % 2} for i in range(20)]
    for file, expected in (
        (str(plain), said),
        (write_csv(tmp_path / "sheet.tsv", lines, "\t"), [row["text"] for row in lines]),
    ):
        found = texts(load(tmp_path, path=file))
        assert sorted(text for split in found.values() for text in split) == sorted(expected)


def test_bad_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`data.train_file`=.*no such file"):
        load(tmp_path, train_file=str(tmp_path / "none.csv"))
    with pytest.raises(FileNotFoundError, match=r"`data.path`=.*no such file"):
        load(tmp_path, path=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is neither"):
        load(tmp_path, path="nobody/nothing")
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"unsupported suffix '.xlsx', use one of \['.csv'"):
        load(tmp_path, path=str(tmp_path / "a.xlsx"))
    for name, content, message in (
        ("empty.csv", "", "the file is empty"),
        ("header.csv", "text,label\n", "holds no examples"),
        ("broken.jsonl", '{"text": ', "can't be read as json"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            load(tmp_path, path=str(tmp_path / name))
    folder = tmp_path / "folder"
    folder.mkdir()
    write_csv(folder / "test.csv", rows(4))
    with pytest.raises(FileNotFoundError, match="no train file"):
        load(tmp_path, path=str(folder))
    write_csv(folder / "train.csv", rows(4))
    write_jsonl(folder / "train.jsonl", rows(4))
    with pytest.raises(ValueError, match="train is ambiguous"):
        load(tmp_path, path=str(folder))


def test_too_few_rows_to_cut(tmp_path):
    with pytest.raises(ValueError, match=r"`data.test_fraction`=0.1 of 4 train examples is 0"):
        load(tmp_path, path=write_jsonl(tmp_path / "a.jsonl", rows(4)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "imbd"}, "nearest one is 'imdb'"),
        ({"task": None}, "`data.task`"),
        ({"task": "text"}, "needs `data.path`"),
        ({"task": "listops", "path": "x"}, "`data.path`='x' can't be used with the task 'listops'"),
        ({"task": "imdb", "path": 3}, "`data.path` must be a non-empty string"),
        ({"task": "imdb", "train_file": "a.csv", "subset": "x"}, "`data.subset`"),
        ({"task": "imdb", "validation_fraction": 1.0}, "`data.validation_fraction` must be between 0 and 1"),
        ({"task": "imdb", "test_fraction": 0}, "`data.test_fraction`"),
        ({"task": "imdb", "validation_fraction": "0.1"}, "`data.validation_fraction`"),
        ({"task": "imdb", "seed": -1}, "`data.seed` must be an integer of at least 0"),
        ({"task": "imdb", "seed": None}, "`data.seed`"),
        ({"task": "imdb", "max_train_samples": 0}, "`data.max_train_samples` must be an integer of at least 1"),
        ({"task": "imdb", "max_test_samples": 2.5}, "`data.max_test_samples`"),
        ({"task": "imdb", "listops": {"seed": 1}}, "`data.listops`"),
        ({"task": "imdb", "text_column": "a", "label_column": "a"}, "are both 'a'"),
        ({"task": "imdb", "image_size": 16}, "`data.image_size`=16 is for the task 'cifar10', .* with 'imdb'"),
        ({"task": "cifar10", "image_size": 15}, r"one of \[1, 2, 4, 8, 16, 32\], the divisors of 32, got 15"),
        *(({"task": "cifar10", "image_size": size}, "`data.image_size`") for size in (0, -16, 64, 16.0, "16", True)),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_a_single_class_left_to_train_on(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", rows(40))
    with pytest.raises(ValueError, match=r"train holds a single class, .[01]., after cuts and samples \(1 rows\)"):
        load(tmp_path, path=file, max_train_samples=1)
    task = load_data(DataConfig(task="text", path=file, max_train_samples=1), tmp_path / "cache", need_labels=False)
    assert len(task.splits["train"]) == 1
    listops = ListOpsConfig(min_length=8, max_length=40, num_train=1, num_validation=5, num_test=5)
    with pytest.raises(ValueError, match=r"train holds a single class, .* after cuts"):
        load(tmp_path, task="listops", listops=listops)
    numbers = write_csv(tmp_path / "a.csv", [{"text": f"t{i}", "label": 0.5} for i in range(30)])
    assert load(tmp_path, path=numbers, max_train_samples=1).problem_type == "regression"


@pytest.mark.parametrize(
    ("task", "column", "label"),
    [("imdb", "text", "label"), ("sst2", "sentence", "label"), ("cifar10", "img", "label")],
)
def test_wrong_datasets_of_known_tasks(task, column, label, monkeypatch, tmp_path):
    def examples(num_rows, num_classes=2, **names):
        inputs = [bytes([i]) * 1024 if task == "cifar10" else f"text {i}" for i in range(num_rows)]
        return [
            {names.get("column", column): value, names.get("label", label): i % num_classes}
            for i, value in enumerate(inputs)
        ]

    good = examples(20)
    for split in ("train", "validation", "test"):
        others = {name: good for name in ("train", "validation", "test") if name != split}
        for bad, message in (
            (examples(20, column="body"), f"{split} has no column '{column}'|{split} has no column 'pixels'"),
            (examples(20, label="class"), f"{split} has no column 'label', but"),
            ([], f"{split} of .* holds no examples"),
        ):
            hub(monkeypatch, {**others, split: bad})
            with pytest.raises(ValueError, match=message):
                load(tmp_path, task=task)
    hub(monkeypatch, {"train": examples(20, num_classes=1), "validation": good, "test": good})
    with pytest.raises(ValueError, match=r"'label' of train holds a single class, '(neg|negative|airplane)'"):
        load(tmp_path, task=task)


# --- Tasks ---


def hub(monkeypatch, splits):
    """Let a Hub id name these datasets; returns the arguments of the calls."""
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append(args)
        return datasets.DatasetDict({name: datasets.Dataset.from_list(examples) for name, examples in splits.items()})

    monkeypatch.setattr(text_module.datasets, "load_dataset", load_dataset)
    return calls


def test_hidden_test_labels_of_sst2(monkeypatch, tmp_path):
    def examples(start, num, hidden=False):
        return [
            {"idx": i, "sentence": f"text {i}", "label": -1 if hidden else i % 2} for i in range(start, start + num)
        ]

    calls = hub(
        monkeypatch, {"train": examples(0, 100), "validation": examples(200, 20), "test": examples(300, 30, True)}
    )
    task = load(tmp_path, task="sst2")
    assert calls == [("stanfordnlp/sst2", None)]
    assert texts(task)["test"] == [f"text {i}" for i in range(200, 220)]
    assert [len(task.splits[split]) for split in ("train", "validation")] == [90, 10]
    assert task.label_names == ["negative", "positive"]
    assert "test is the validation split of GLUE" in task.description
    task = load(tmp_path, path="nyu-mll/glue", subset="sst2", text_column="sentence")
    assert calls[1] == ("nyu-mll/glue", "sst2")
    assert [len(task.splits[split]) for split in ("train", "validation", "test")] == [90, 20, 10]
    assert "the test labels are hidden; test cut from train" in task.description


def test_imdb_ignores_the_unlabelled_split_and_needs_a_test(monkeypatch, tmp_path):
    unsupervised = [{"text": "a", "label": -1}] * 5
    hub(monkeypatch, {"train": rows(50), "test": rows(20, start=100), "unsupervised": unsupervised})
    task = load(tmp_path, task="imdb")
    assert [len(task.splits[split]) for split in ("train", "validation", "test")] == [45, 5, 20]
    assert task.label_names == ["neg", "pos"]
    hub(monkeypatch, {"train": rows(50)})
    with pytest.raises(ValueError, match=r"'imdb' needs a test split, there is only \['train'\]"):
        load(tmp_path, task="imdb")
    hub(monkeypatch, {"train": rows(50, 3), "test": rows(20)})
    with pytest.raises(ValueError, match="the label 2 in row 2; labels must be 0 to 1"):
        load(tmp_path, task="imdb")


def test_listops_task(tmp_path):
    listops = ListOpsConfig(min_length=8, max_length=40, num_train=50, num_validation=10, num_test=20)
    task = load(tmp_path, task="listops", listops=listops, max_train_samples=30)
    assert [len(task.splits[split]) for split in ("train", "validation", "test")] == [30, 10, 20]
    assert task.tokenizer_kind == "listops"
    assert task.label_names == [str(digit) for digit in range(10)]
    assert DataConfig().task == "listops"


def write_images(folder, size=(32, 32)):
    folder.mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (40, *size[::-1], 3), dtype=np.uint8)
    images = [Image.fromarray(array) for array in colours]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    for split, part in (("train", slice(0, 30)), ("test", slice(30, 40))):
        columns = {"img": images[part], "label": [i % 10 for i in range(40)][part]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return images


def test_images_and_bytes_give_the_same_pixels(tmp_path):
    images = write_images(tmp_path / "images")
    task = load(tmp_path, task="cifar10", path=str(tmp_path / "images"))
    expected = [" ".join(map(str, np.asarray(image.convert("L")).ravel().tolist())) for image in images]
    assert texts(task)["test"] == expected[30:]
    assert list(task.splits["test"]["label"]) == list(range(10))
    assert sorted(texts(task)["train"] + texts(task)["validation"]) == sorted(expected[:30])
    assert task.tokenizer_kind == "pixels"
    assert task.label_names[6] == "frog"
    files = {}
    for split, part in (("train", slice(0, 30)), ("test", slice(30, 40))):
        columns = {
            "pixels": [image.convert("L").tobytes() for image in images[part]],
            "label": [i % 10 for i in range(40)][part],
        }
        files[f"{split}_file"] = str(tmp_path / f"{split}.parquet")
        datasets.Dataset.from_dict(columns).to_parquet(files[f"{split}_file"])
    assert texts(load(tmp_path, task="cifar10", **files)) == texts(task)


@pytest.mark.parametrize("image_size", [16, 8, 1])
def test_smaller_images_are_rounded_means(image_size, tmp_path):
    images = write_images(tmp_path / "images")[30:]
    task = load(tmp_path, task="cifar10", path=str(tmp_path / "images"), image_size=image_size)
    luma = np.stack([np.asarray(image.convert("L"), dtype=float) for image in images])
    block = 32 // image_size
    means = sum(luma[:, row::block, column::block] for row in range(block) for column in range(block)) / block**2
    found = np.array([text.split(" ") for text in texts(task)["test"]], dtype=int)
    assert found.shape == (10, image_size**2)
    np.testing.assert_array_equal(found, np.floor(means.reshape(10, -1) + 0.5))
    assert f"{image_size} by {image_size} pixels" in task.description
    assert list(task.splits["test"]["label"]) == list(range(10))


def test_the_size_of_images_to_text(tmp_path):
    pixels = bytes([254, 255] * 16 + [255, 255] * 16) * 16  # blocks of two by two with the sum 1019: mean 254.75
    dataset = datasets.Dataset.from_dict({"text": [pixels], "label": [0]})
    assert images_to_text(dataset, "test", image_size=16)[0] == {"text": " ".join(["255"] * 256), "label": 0}
    assert images_to_text(dataset, "test")[0]["text"] == " ".join(map(str, pixels))
    assert images_to_text(dataset.remove_columns("label"), "test", image_size=1)[0] == {"text": "255"}
    with pytest.raises(ValueError, match=r"`image_size` must be one of .* got 5"):
        images_to_text(dataset, "test", image_size=5)


def test_images_of_another_size(tmp_path):
    write_images(tmp_path / "images", size=(16, 32))
    with pytest.raises(ValueError, match="'img' of train must hold 32 by 32 images, got 16 by 32"):
        load(tmp_path, task="cifar10", path=str(tmp_path / "images"))
    file = write_jsonl(tmp_path / "a.jsonl", [{"image": "1 2 3", "label": i % 10} for i in range(20)])
    with pytest.raises(ValueError, match="must hold images or 1024 bytes"):
        load(tmp_path, task="cifar10", train_file=file, test_file=file)


@pytest.mark.parametrize(("name", "sizes"), [("imdb", (22_500, 2_500, 25_000)), ("sst2", (60_614, 6_735, 872))])
def test_real_text(name, sizes, tmp_path):
    task = load(tmp_path, task=name, path=real_data(name))
    assert tuple(len(task.splits[split]) for split in ("train", "validation", "test")) == sizes
    assert np.mean(task.splits["validation"]["label"][:]) == pytest.approx(
        np.mean(task.splits["train"]["label"][:]), abs=1e-3
    )
    if name == "imdb":
        assert np.mean(task.splits["train"]["label"][:]) == 0.5


def test_real_images(tmp_path):
    settings = {"max_train_samples": 200, "max_validation_samples": 50, "max_test_samples": 50}
    task = load(tmp_path, task="cifar10", path=real_data("cifar10"), **settings)
    values = np.array([text.split(" ") for text in task.splits["train"]["text"]], dtype=int)
    assert values.shape == (200, 1024)
    assert (values.min(), values.max()) == (0, 255)
    image = values.reshape(-1, 32, 32)
    rows_apart, columns_apart = np.abs(np.diff(image, axis=1)).mean(), np.abs(np.diff(image, axis=2)).mean()
    assert max(rows_apart, columns_apart) < 30  # neighbours in both directions are alike: rows of 32 pixels
