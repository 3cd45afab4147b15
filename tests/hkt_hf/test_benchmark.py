"""Benchmarks: exact memory, honest ratios, rows that are resumed, peers that can't run, tables and plots."""

import itertools
import json
from pathlib import Path

import clients
import pytest
import torch

from hkt_hf.benchmark import measurement, registry, sweep
from hkt_hf.benchmark.decoding import cache_bytes, measure_decoding
from hkt_hf.benchmark.measurement import NotAvailableError, Step, measure, peak_allocation, summary, turn_order
from hkt_hf.benchmark.profiling import PARTS, REST, part_of, profile_training_step
from hkt_hf.benchmark.registry import ModelSizes, OperatorSizes, model_step, operator_step
from hkt_hf.benchmark.report import compare, crossings, groups, markdown, write_report
from hkt_hf.benchmark.sweep import ModelSweep, OperatorSweep, Protocol, read_result, run_sweep
from hkt_hf.cli import main


MIB = 2**20
RESULTS = Path(__file__).resolve().parents[2] / "results"
QUICK = Protocol(warm_up=0, repeats=2)


def allocate(mebibytes):
    return torch.empty(mebibytes * MIB, dtype=torch.uint8)


# Measurement


def test_peak_is_that_of_the_running_total():
    before = allocate(50)

    def run():
        first = allocate(4)
        second = allocate(2)
        del first
        third = allocate(3)  # 2 + 3 is less than 4 + 2
        del second, third
        return allocate(1)

    assert peak_allocation(Step(run)) == (6 * MIB, 4 * MIB)
    assert before.numel() == 50 * MIB


def test_workspaces_inside_an_operator_count():
    matrix = torch.randn(256, 256)
    peak, largest = peak_allocation(Step(lambda: matrix.softmax(-1).softmax(-1).sum()))
    assert peak == 2 * 256 * 256 * 4 and largest == 256 * 256 * 4
    # `sort` makes values and indices: two outputs of one operator.
    peak, largest = peak_allocation(Step(lambda: matrix.sort(dim=-1)))
    assert peak >= 256 * 256 * (4 + 8) and largest == 256 * 256 * 8


def test_what_the_last_step_left_behind_is_freed_and_counted_again():
    weight = torch.ones(MIB, requires_grad=True)

    def release():
        weight.grad = None

    def run():
        (weight * 2).sum().backward()
        return allocate(16)

    step = Step(run, release)
    first, second = peak_allocation(step), peak_allocation(step)
    assert first == second == (20 * MIB, 16 * MIB)  # with the gradient of the step itself
    assert weight.grad is not None


@pytest.mark.parametrize("count", [1, 2, 5])
def test_turns_give_every_step_every_place(count):
    names = [str(i) for i in range(count)]
    orders = [turn_order(names, turn) for turn in range(2 * count)]
    assert all(sorted(order) == names for order in orders)
    for place in range(count):
        assert sorted(order[place] for order in orders) == sorted(2 * names)
    if count > 2:
        followers = {
            name: {after for order in orders for a, after in itertools.pairwise(order) if a == name} for name in names
        }
        assert all(len(after) > 1 for after in followers.values())
    assert turn_order([], 3) == []


def test_ratios_are_of_medians_and_turn_by_turn():
    result = summary([2.0, 8.0, 9.0], [1.0, 2.0, 9.0])
    assert result["ratio"] == 8.0 / 2.0
    assert result["paired_ratio"] == 2.0  # of 2, 4, 1
    assert result["seconds"] == {"median": 8.0, "quartiles": [2.0, 9.0], "samples": [2.0, 8.0, 9.0]}
    alone = summary([1.0, 2.0], None)
    assert alone["ratio"] is None and alone["paired_ratio"] is None


def test_measured_turns_follow_each_other_in_one_run():
    calls = []

    def builder(name):
        return lambda: Step(lambda: calls.append(name), facts={"note": name})

    entries = measure({name: builder(name) for name in "abc"}, "a", warm_up=1, repeats=4)
    assert calls[:9] == list("aaabbbccc")  # compiled, judged, counted
    turns = ["".join(calls[i : i + 3]) for i in range(9, len(calls), 3)]
    assert turns == ["abc", "bca", "cab", "cba", "acb"]
    assert all(len(entry["seconds"]["samples"]) == 4 and entry["status"] == "ok" for entry in entries.values())
    assert entries["a"]["ratio"] == entries["a"]["paired_ratio"] == 1.0
    assert entries["b"]["note"] == "b"


def test_what_fails_is_recorded_and_the_others_are_measured(monkeypatch):
    def unavailable():
        raise NotAvailableError("no such thing here")

    calls = []

    def later():
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("broke in its turn\nat some place")

    slow = iter([0.0, 100.0])
    seconds_of = measurement.seconds_of

    def seconds(run, device):
        elapsed = seconds_of(run, device)
        return next(slow) * 10 if run == slow_run else elapsed

    def slow_run():
        pass

    monkeypatch.setattr(measurement, "seconds_of", seconds)
    next(slow)
    entries = measure(
        {
            "a": lambda: Step(lambda: None),
            "missing": unavailable,
            "wrong": lambda: Step(lambda: 1 / 0),
            "slow": lambda: Step(slow_run),
            "later": lambda: Step(later),
        },
        "a",
        repeats=5,
        max_step_seconds=60,
    )
    assert list(entries) == ["a", "missing", "wrong", "slow", "later"]
    assert entries["a"]["status"] == "ok" and entries["a"]["ratio"] == 1.0
    assert entries["missing"] == {"status": "NA", "reason": "no such thing here"}
    assert entries["wrong"] == {"status": "FAIL", "reason": "ZeroDivisionError: division by zero"}
    assert entries["slow"] == {"status": "NA", "reason": "a step took 1000.0 s, more than 60 s"}
    assert entries["later"] == {"status": "FAIL", "reason": "RuntimeError: broke in its turn"}
    alone = measure({"a": unavailable, "b": lambda: Step(lambda: None)}, "a", repeats=2)
    assert alone["b"]["status"] == "ok" and alone["b"]["ratio"] is None


def test_too_much_memory_is_a_row_and_not_the_end(monkeypatch):
    monkeypatch.setattr(measurement, "available_memory", lambda: 512 * MIB)
    entries = measure(
        {"a": lambda: Step(lambda: allocate(1)), "large": lambda: Step(lambda: allocate(4096))}, "a", repeats=2
    )
    assert entries["a"]["status"] == "ok"
    assert entries["large"]["status"] == "FAIL" and "memory" in entries["large"]["reason"]
    assert allocate(4096).numel() == 4096 * MIB  # the limit is gone


# Operators and models


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_operators_compute_what_they_say(is_causal, padding):
    sizes = OperatorSizes(13, 8, batch_heads=6, batch_size=3, num_levels=3, is_causal=is_causal, padding=padding)
    outputs, gradients = {}, {}
    for name in ("eager", "lifted", "auto"):
        outputs[name] = operator_step(name, "forward", sizes).run()
        gradients[name] = operator_step(name, "forward_backward", sizes).run()
        assert not outputs[name].requires_grad and len(gradients[name]) == 3 + 3 + 1 + 1
        torch.testing.assert_close(outputs[name], outputs["eager"], atol=1e-5, rtol=1e-5)
        for gradient, expected in zip(gradients[name], gradients["eager"], strict=True):
            torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
    # With one level the operator is the reference.
    one = OperatorSizes(13, 8, batch_heads=6, batch_size=3, num_levels=1, is_causal=is_causal, padding=padding)
    real = registry.padding_mask(3, 13, "cpu")[:, None, :, None] if padding else torch.ones(1, dtype=torch.bool)
    flat, eager = (operator_step(name, "forward", one).run() * real for name in ("flat", "eager"))
    torch.testing.assert_close(flat, eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_hsa_attends_along_its_trees(is_causal, padding):
    """On a tree with one family it is the reference; text trees have families of text."""
    sizes = OperatorSizes(13, 8, batch_heads=6, batch_size=3, is_causal=is_causal, padding=padding)
    real = registry.padding_mask(3, 13, "cpu")[:, None, :, None] if padding else torch.ones(1, dtype=torch.bool)
    flat = operator_step("flat", "forward", sizes).run() * real
    for name in registry.HSA_TREES:
        step = operator_step(name, "forward", sizes)
        assert "built beforehand" in step.facts["note"]
        assert len(operator_step(name, "forward_backward", sizes).run()) == 3
        if name != "hsa-text":  # 13 tokens are one family of 16
            torch.testing.assert_close(step.run(), flat, atol=1e-5, rtol=1e-5)
    long = OperatorSizes(2000, 8, batch_heads=2, batch_size=2, padding=padding)
    sentences, paragraphs, top = registry.HSA_TREES["hsa-text"](long).family_sizes()
    assert 5 <= sentences[0] <= 40 and 2 <= paragraphs[0] <= 8 and len(top) == 2


def test_ragged_lengths_reach_from_all_to_half():
    assert registry.sequence_lengths(3, 64) == [64, 48, 32]
    assert registry.sequence_lengths(2, 5) == [5, 3]
    assert registry.padding_mask(2, 5, "cpu").sum(1).tolist() == [5, 3]


def test_eager_makes_square_matrices_and_flat_does_not():
    def largest(name, length):
        return peak_allocation(operator_step(name, "forward_backward", OperatorSizes(length, 8, batch_heads=2)))[1]

    assert largest("eager", 2048) == 4 * largest("eager", 1024) == 2 * 2048 * 2048 * 4
    assert largest("flat", 2048) <= 2 * largest("flat", 1024)


TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "batch_size": 2}


@pytest.mark.parametrize("name", [*registry.model_names(), "hkt:eager"])
def test_every_model_trains(name):
    step = model_step(name, "train_step", ModelSizes(64, **TINY))
    step.run()
    peak, largest = peak_allocation(step)
    # Gradients count in the peak, the two moments of AdamW and the parameters in what stays (poolers get none).
    trained = 4 * 0.9 * step.facts["parameters"]
    assert peak > trained and 0 < largest < peak
    assert step.resident_bytes() > 3 * trained
    forward = model_step(name, "forward", ModelSizes(64, **TINY))
    assert forward.run().shape == (2, registry.NUM_LABELS)
    assert forward.resident_bytes() < step.resident_bytes()


@pytest.mark.parametrize("name", [name for name in registry.model_names() if name != "fnet"])
def test_models_take_padding(name):
    padded, whole = (
        model_step(name, "forward", ModelSizes(64, padding=padding, **TINY)).run() for padding in (True, False)
    )
    torch.testing.assert_close(padded[0], whole[0], atol=1e-6, rtol=1e-5)  # the longest sequence has no padding
    assert padded.isfinite().all() and (padded[1] - whole[1]).abs().max() > 5e-6


def test_nystromformer_takes_padding_with_fewer_landmarks_than_tokens():
    padded, whole = (
        model_step("nystromformer", "forward", ModelSizes(128, padding=padding, **TINY)).run()
        for padding in (True, False)
    )
    torch.testing.assert_close(padded[0], whole[0], atol=1e-5, rtol=1e-4)
    assert (padded[1] - whole[1]).abs().max() > 5e-6


def test_the_mean_classifier_reads_real_tokens_alone():
    model = registry.MeanClassifier(lambda ids, mask: ids[..., None].float(), 1)
    ids, mask = torch.tensor([[1, 2, 3], [1, 2, 9]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    torch.testing.assert_close(model(ids, mask).logits, model.classifier(torch.tensor([[2.0], [1.5]])))
    torch.testing.assert_close(model(ids).logits, model.classifier(torch.tensor([[2.0], [4.0]])))
    labels = torch.tensor([0, 1])
    output = model(ids, mask, labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    dropping = registry.MeanClassifier(lambda ids, mask: ids[..., None].float(), 1, num_labels=5, dropout=0.5)
    dropped = dropping(torch.ones(2, 3)).logits
    assert dropped.shape == (2, 5) and not torch.equal(dropped, dropping.eval()(torch.ones(2, 3)).logits)


def test_a_train_step_changes_the_parameters_and_a_backward_alone_does_not(monkeypatch):
    models = []
    monkeypatch.setattr(registry, "_state", lambda model: models.append(model) or list(model.parameters()))
    for mode, changes in (("forward_backward", False), ("train_step", True)):
        step = model_step("hkt", mode, ModelSizes(64, **TINY))
        step.resident_bytes()
        before = [parameter.detach().clone() for parameter in models[-1].parameters()]
        step.run()
        same = all(torch.equal(old, new) for old, new in zip(before, models[-1].parameters(), strict=True))
        assert same is not changes
        if not changes:  # a second call clears the gradients of the first
            first = [parameter.grad.clone() for parameter in models[-1].parameters()]
            step.run()
            torch.testing.assert_close([parameter.grad for parameter in models[-1].parameters()], first)
        assert all(parameter.grad is not None for parameter in models[-1].parameters())
        step.release()
        assert all(parameter.grad is None for parameter in models[-1].parameters())


def test_models_have_the_attention_that_was_asked_for():
    for name, implementation in (("hkt:eager", "eager"), ("hkt:sdpa", "sdpa"), ("flat", "sdpa")):
        step = model_step(name, "forward", ModelSizes(64, **TINY))
        assert step.facts["attn_implementation"] == implementation
    flat, hkt = (model_step(name, "forward", ModelSizes(64, **TINY)).facts["parameters"] for name in ("flat", "hkt"))
    assert flat < hkt


@pytest.mark.parametrize("name", ["flat", "hkt", "bert", "mamba"])
def test_decoding_reads_one_token_a_step(name):
    step = model_step(name, "decode_step", ModelSizes(32, num_new_tokens=3, **TINY))
    resident = [step.resident_bytes()]
    for _ in range(3):
        step.run()
        resident.append(step.resident_bytes())
    assert step.facts["cache_bytes"] > 0
    if name == "mamba":
        assert len(set(resident)) == 1  # a state
    else:
        assert resident[0] < resident[1] < resident[2] < resident[3]


def test_decoding_rows():
    rows = measure_decoding("hkt-tiny", (16, 24), num_tokens=3, warm_up=1)
    assert [row["context"] for row in rows] == [16, 24]
    for row in rows:
        sizes, times = row["cache_bytes"], row["step_seconds"]
        # Two layers of keys and values of 64 channels; HKT has half and a quarter of the keys besides.
        assert sizes["flat"] == 2 * 2 * row["context"] * 64 * 4
        assert row["cache_ratio"] == sizes["hkt"] / sizes["flat"] > 1.3
        assert row["step_ratio"] == times["hkt"]["median"] / times["flat"]["median"]
        assert row["paired_step_ratio"] > 0 and len(times["hkt"]["quartiles"]) == 2


def test_notes_say_what_ran(monkeypatch):
    def note(name, length):
        return registry.peer_note(name, ModelSizes(length))

    assert "full attention" in note("big_bird", 704) and "blocks of 64" in note("big_bird", 705)
    assert "parallel scan of mambapy" in note("mamba", 64)
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    assert "a loop over the tokens" in note("mamba", 64)
    assert registry.PEERS.keys() == {name for name in registry.PEERS if note(name, 64)}


@pytest.mark.parametrize(("length", "window"), [(2, 2), (64, 16), (254, 62), (511, 126), (512, 512), (4096, 512)])
def test_the_window_of_longformer_is_shorter_than_a_short_sequence(length, window):
    assert registry.longformer_window(length) == window
    encoder = registry.PEERS["longformer"].build(ModelSizes(length, **TINY), False)
    assert encoder.config.attention_window == [window] * encoder.config.num_hidden_layers


def test_peers_that_cannot_run_say_why(monkeypatch):
    with pytest.raises(NotAvailableError, match="an encoder has no decoding step"):
        model_step("longformer", "decode_step", ModelSizes(64, **TINY))
    with pytest.raises(NotAvailableError, match="multiples of its 64 landmarks, got 65"):
        model_step("nystromformer", "forward", ModelSizes(65, **TINY))
    with pytest.raises(NotAvailableError, match="no padding mask"):
        model_step("fnet", "forward", ModelSizes(64, padding=True, **TINY))
    with pytest.raises(NotAvailableError, match="multiples of 32, got 48"):
        model_step("h-transformer-1d", "forward", ModelSizes(64, **{**TINY, "intermediate_size": 48}))
    find_spec = registry.importlib.util.find_spec
    monkeypatch.setattr(
        registry.importlib.util, "find_spec", lambda name: None if name == "h_transformer_1d" else find_spec(name)
    )
    with pytest.raises(NotAvailableError, match="pip install h-transformer-1d"):
        model_step("h-transformer-1d", "forward", ModelSizes(64, **TINY))
    assert "h-transformer-1d" in ModelSweep().entries
    with pytest.raises(ValueError, match="`models` 'h-transformer-1d': the package"):
        ModelSweep(names=["h-transformer-1d"])


# Sweeps


def tiny_operators(**fields):
    return OperatorSweep(**{"names": ["eager"], "lengths": [16, 8], "widths": [8], "batch_heads": 2, **fields})


def test_a_row_holds_everything_a_reader_needs(tmp_path):
    output = tmp_path / "results" / "operators.json"
    result = run_sweep(tiny_operators(), output, QUICK, command="hkt benchmark operators")
    assert json.loads(output.read_text()) == result == read_result(output)
    assert result["kind"] == "operators" and result["command"] == "hkt benchmark operators"
    assert result["versions"]["torch"] == torch.__version__ and result["machine"] and "commit" in result
    keys = [(row["configuration"]["mode"], row["configuration"]["length"]) for row in result["rows"]]
    assert keys == [("forward", 8), ("forward", 16), ("forward_backward", 8), ("forward_backward", 16)]
    row = result["rows"][0]
    assert set(row["configuration"]) == {"mode", *OperatorSizes.__dataclass_fields__}
    assert row["protocol"] == {
        "warm_up": 0,
        "repeats": 2,
        "max_step_seconds": 60.0,
        "threads": torch.get_num_threads(),
    }
    assert set(row["made"]) == {"versions", "machine", "processor", "commit", "command"}
    assert list(row["entries"]) == ["flat", "eager"] and row["reference"] == "flat"
    for entry in row["entries"].values():
        assert entry["status"] == "ok" and len(entry["seconds"]["samples"]) == 2
        assert entry["ratio"] > 0 and entry["peak_bytes"] > 0 and entry["resident_bytes"] > 0


def test_finished_rows_are_not_measured_again(tmp_path, monkeypatch):
    output, measured = tmp_path / "operators.json", []
    measure = sweep.measure

    def spy(builders, *arguments, **options):
        builder = next(iter(builders.values()))
        measured.append((builder.configuration["mode"], builder.configuration["length"], list(builders)))
        return measure(builders, *arguments, **options)

    monkeypatch.setattr(sweep, "measure", spy)

    def run(**options):
        fields = {key: options.pop(key) for key in ("names", "lengths", "modes") if key in options}
        measured.clear()
        result = run_sweep(
            tiny_operators(**{"modes": ["forward"], **fields}), output, options.pop("protocol", QUICK), **options
        )
        return result["rows"]

    interrupted = {"count": 0}

    def interrupt(result):
        interrupted["count"] += 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(on_row=interrupt)
    assert len(read_result(output)["rows"]) == 1 and interrupted["count"] == 1
    first = read_result(output)["rows"][0]
    rows = run()
    assert measured == [("forward", 16, ["flat", "eager"])] and rows[0] == first
    run()
    assert measured == []
    monkeypatch.setattr(sweep, "environment", lambda packages: {**environment_of(first), "commit": "another"})
    run()
    assert measured == []  # a commit by itself measures nothing anew
    rows = run(names=["lifted"], lengths=[16])
    assert measured == [("forward", 16, ["flat", "lifted", "eager"])]
    assert len(rows) == 2 and list(rows[1]["entries"]) == ["flat", "lifted", "eager"]
    assert rows[1]["made"]["commit"] == "another"
    rows = run(lengths=[16], fresh=True)
    assert measured == [("forward", 16, ["flat", "eager", "lifted"])] and len(rows[1]["entries"]) == 3
    rows = run(lengths=[8], protocol=Protocol(warm_up=0, repeats=3))
    assert len(measured) == 1 and len(rows) == 3
    monkeypatch.setattr(
        sweep,
        "environment",
        lambda packages: {**environment_of(first), "versions": {"torch": "3", "transformers": "6"}},
    )
    rows = run(lengths=[8])
    assert len(measured) == 1 and len(rows) == 3 and rows[0]["made"]["versions"]["torch"] == "3"


def environment_of(row):
    return {key: row["made"][key] for key in ("versions", "machine", "commit")}


def test_model_rows_record_what_the_results_hold():
    recorded = json.loads((RESULTS / "benchmark_models.json").read_text())["rows"]
    expected = {"mode", *ModelSizes.__dataclass_fields__} - set(registry.NOT_RECORDED)
    assert set(next(ModelSweep().configurations())) == expected
    assert all(set(row["configuration"]) == expected for row in recorded)


def test_a_model_sweep_with_peers_that_cannot_run(tmp_path):
    models = ModelSweep(
        names=["hkt", "longformer", "nystromformer"], modes=["decode_step", "forward"], lengths=[65], preset="hkt-tiny"
    )
    result = run_sweep(models, tmp_path / "models.json", QUICK)
    decode, forward = (row["entries"] for row in result["rows"])
    assert decode["longformer"] == {"status": "NA", "reason": "an encoder has no decoding step"}
    assert forward["nystromformer"]["status"] == "NA" and "landmarks" in forward["nystromformer"]["reason"]
    assert forward["longformer"]["status"] == "ok" and forward["hkt"]["parameters"] > forward["flat"]["parameters"]
    text = markdown(result)
    assert "- longformer: NA at T = 65: an encoder has no decoding step" in text
    assert "| 65 |" in text and "| NA |" in text
    assert [path.suffix for path in write_report(result, tmp_path / "models.json")] == [".md", ".png", ".png"]


def test_sizes_of_a_preset_can_be_changed():
    small = ModelSweep()
    assert (small.width, small.num_heads, small.num_layers, small.intermediate_size, small.num_levels) == (
        128,
        8,
        2,
        512,
        3,
    )
    wide = ModelSweep(width=64, num_levels=2)
    assert (wide.width, wide.intermediate_size, wide.num_levels) == (64, 256, 2)
    configuration = next(wide.configurations())
    assert configuration["hidden_size"] == 64 and configuration["num_levels"] == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": ["fast"]}, "`operators` must be among .*'lifted'.*, got 'fast'"),
        ({"modes": ["train_step"]}, "`modes` of operators must be among .*, got 'train_step'"),
        ({"modes": []}, "`modes` must hold at least one of"),
        ({"lengths": [3]}, "`lengths` must be at least .* = 4, .*got 3"),
        ({"lengths": []}, "`lengths` must hold at least one value"),
        ({"widths": [0]}, "`widths` must be at least 1, got 0"),
        ({"batch_heads": 8, "batch_size": 3}, r"`batch_heads` must be a multiple of `batch_size` \(3\), got 8"),
        ({"padding": True}, "`padding` needs a `batch_size` of at least 2 .*got 1"),
        ({"dtype": "int8"}, "`dtype` must be one of .*, got 'int8'"),
        ({"device": "tpu"}, "`device` must be 'cpu' or 'cuda', got 'tpu'"),
    ],
)
def test_operator_arguments_are_checked_before_work(fields, message):
    with pytest.raises(ValueError, match=message):
        OperatorSweep(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": ["gpt"]}, "`models` must be among .*'longformer'.*, got 'gpt'"),
        ({"names": ["hkt:fast"]}, "'hkt:fast': the `attn_implementation` must be one of .*'sdpa'.*, got 'fast'"),
        ({"names": ["bert:eager"]}, "`models` must be among"),
        ({"modes": ["sleep"]}, "`modes` of models must be among .*, got 'sleep'"),
        ({"width": 100}, "`width` must be a multiple of 2 . `num_heads` = 16 .*got 100"),
        ({"num_levels": 0}, "`num_levels` must be at least 1, got 0"),
        ({"padding": True, "batch_size": 2, "modes": ["decode_step"]}, "`padding` is for encoders"),
    ],
)
def test_model_arguments_are_checked_before_work(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelSweep(**fields)
    with pytest.raises(FileNotFoundError, match=r"hkt-huge.*hkt-small"):
        ModelSweep(preset="hkt-huge")


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"repeats": 1}, "`repeats`.*got 1"), ({"warm_up": -1}, "`warm_up`.*got -1"), ({"max_step_seconds": 0}, "got 0")],
)
def test_protocols_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**fields)


def test_triton_needs_a_gpu_where_it_is_a_backend(monkeypatch):
    monkeypatch.setitem(registry.attention_hkt.BACKENDS, "triton", lambda *arguments: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="`operators` 'triton': triton needs a GPU: --device cuda"):
        OperatorSweep(names=["triton"])
    assert "triton" in OperatorSweep().entries  # all: a row says why it was not measured
    with pytest.raises(NotAvailableError, match="needs a GPU"):
        operator_step("triton", "forward", OperatorSizes(8, 8))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert OperatorSweep(names=["triton"]).entries == ["flat", "triton"]


# Reports


def made_up_result():
    made = {"versions": {"torch": "2", "transformers": "5"}, "machine": "m", "processor": "m", "commit": None}
    made["command"] = "hkt benchmark models"

    def entry(samples, reference, size):
        return {"status": "ok", "peak_bytes": size, "resident_bytes": 10, **summary(samples, reference)}

    rows = []
    for length, hkt, peer in ((256, 1.0, 4.0), (1024, 2.0, 2.0), (512, 1.5, 3.0), (4096, 8.0, 2.0)):
        flat = [1.0, 1.0, 1.0]
        rows.append(
            {
                "configuration": {"mode": "train_step", "length": length, "dtype": "float32", "device": "cpu"},
                "protocol": {"repeats": 3, "threads": 2},
                "reference": "flat",
                "entries": {
                    "flat": entry(flat, flat, 90),
                    "hkt": entry([0.9 * hkt, hkt, 1.1 * hkt], flat, 190),
                    "peer": entry([peer, peer, peer], flat, length),
                    "gone": {"status": "NA", "reason": "not here"},
                },
                "made": made,
            }
        )
    return {"kind": "models", "rows": rows, **made}


def test_comparison_says_where_hkt_wins_and_loses():
    (group,) = groups(made_up_result())
    assert group.lengths == [256, 512, 1024, 4096] and group.subjects == ["hkt"]
    assert group.peers == ["flat", "peer", "gone"]
    against = compare(group, "hkt", "peer")
    assert against.time_ratios == pytest.approx({256: 0.25, 512: 0.5, 1024: 1.0, 4096: 4.0})
    assert (against.faster, against.even, against.slower) == ([256, 512], [1024], [4096])
    assert against.memory_ratios[4096] == 200 / 4106
    assert compare(group, "hkt", "gone").time_ratios == {}


def test_crossings_lie_between_neighbours_on_logarithmic_axes():
    assert crossings({1024: 0.5, 4096: 2.0}) == pytest.approx([2048])
    assert crossings({64: 2.0, 128: 0.5, 512: 4.0}) == pytest.approx([90.5, 128 * 4 ** (1 / 3)], rel=1e-3)
    assert crossings({64: 2.0, 128: 3.0}) == [] and crossings({}) == []


def test_report_files(tmp_path):
    result = made_up_result()
    tables, plot = write_report(result, tmp_path / "models.json")
    assert plot.name == "models.png" and plot.read_bytes().startswith(b"\x89PNG")
    text = tables.read_text()
    assert "```bash\nhkt benchmark models\n```" in text
    assert "| T | flat | hkt | peer | gone |" in text
    assert "| 512 | 1 s | 1.50x, 1.5 s | 3.00x, 3 s | NA |" in text
    assert "- gone: NA at T = 256; 512; 1,024; 4,096: not here" in text
    assert "| hkt | peer | 256; 512 | 1,024 | 4,096 |" in text
    assert "Largest single allocation" not in text  # not counted here
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_plots_of_several_groups_have_names_of_their_own(tmp_path):
    result = made_up_result()
    other = json.loads(json.dumps(result["rows"]))
    for row in other:
        row["configuration"]["mode"] = "forward"
        row["protocol"]["threads"] = 1
    third = json.loads(json.dumps(other))
    for row in third:
        row["protocol"]["threads"] = 2
    result["rows"] += other + third
    names = [path.name for path in write_report(result, tmp_path / "models.json")[1:]]
    assert names == ["models_train_step.png", "models_forward_1.png", "models_forward_2.png"]


def test_the_largest_allocation_shows_square_matrices(tmp_path):
    text = markdown(run_sweep(tiny_operators(lengths=[1024], modes=["forward"]), tmp_path / "operators.json", QUICK))
    table = text.partition("Largest single allocation")[2]
    assert "| T | flat | eager |" in table and "| 8 MiB |" in table  # two heads of 1024 x 1024 floats


# The command


def test_command_measures_prints_and_draws(tmp_path, capsys):
    output = tmp_path / "models.json"
    words = [
        "benchmark",
        "models",
        "--models",
        "hkt",
        "--modes",
        "train_step",
        "--preset",
        "hkt-tiny",
        "--lengths",
        "64",
    ]
    words += ["--width", "32", "--batch-size", "2", "--repeats", "2", "--warm-up", "0", "--output", str(output)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "## Train step, B 2, d 32, heads 4, layers 2, levels 3, float32, cpu" in printed
    result = read_result(output)
    assert result["command"].startswith("hkt benchmark models --models hkt --modes train_step")
    assert result["rows"][0]["configuration"]["intermediate_size"] == 128
    (tmp_path / "models.png").unlink()
    assert main(["benchmark", "report", str(output)]) == 0
    assert (tmp_path / "models.png").exists() and capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["operators", "--operators", "fast"], "`operators` must be among"),
        (["operators", "--threads", "0"], "`threads` must be at least 1, got 0"),
        (["models", "--width", "100"], "`width` must be a multiple"),
        (["models", "--preset", "huge"], "no configuration 'models/huge'"),
        (["report", "missing.json"], "missing.json"),
    ],
)
def test_command_names_what_is_wrong(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *words]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_files_of_something_else_are_refused(tmp_path, capsys):
    output = tmp_path / "result.json"
    for text in ("{}", "not JSON", "[1]", '{"kind": "quickstart", "rows": []}'):
        output.write_text(text)
        assert main(["benchmark", "operators", "--output", str(output)]) == 1
        assert "is no result of `hkt benchmark operators`" in capsys.readouterr().err
        assert output.read_text() == text
    output.write_text('{"kind": "models", "rows": []}')
    assert main(["benchmark", "operators", "--output", str(output)]) == 1
    assert "holds models, not operators: name another file" in capsys.readouterr().err


WITHOUT_EXTRAS = """
import sys

blocked = ("datasets", "evaluate", "accelerate", "matplotlib", "h_transformer_1d", "mambapy")
sys.modules.update(dict.fromkeys(blocked))  # `import` fails, and `find_spec` finds nothing
from hkt_hf.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_benchmark_runs_without_the_packages_of_training_and_plots(tmp_path):
    words = "benchmark operators --operators lifted --lengths 8 --widths 8 --batch-heads 2 --repeats 2 --warm-up 0"
    printed = clients.run_python(WITHOUT_EXTRAS, tmp_path, {}, *words.split())
    result = read_result(tmp_path / "results/benchmark_operators.json")
    assert {row["entries"]["lifted"]["status"] for row in result["rows"]} == {"ok"}
    assert "| 8 |" in printed and "benchmark_operators.md" in printed and ".png" not in printed


def test_cache_bytes_counts_every_tensor():
    model = torch.nn.Module()
    model.layers = [type("Layer", (), {})() for _ in range(2)]
    for layer in model.layers:
        layer.keys, layer.levels, layer.length = torch.zeros(4), {"a": [torch.zeros(2, dtype=torch.int8)]}, 3
    assert cache_bytes(model) == 2 * (16 + 2)


def test_a_training_step_is_taken_apart():
    sizes = ModelSizes(192, batch_size=1, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    result = profile_training_step(("flat", "hkt"), sizes, warm_up=0, repeats=1, profiles=1)
    assert result["flat"]["ratio"] == 1.0
    for model in result.values():
        assert set(model["parts"]) == {*PARTS, REST}
        assert all(seconds > 0 for seconds in model["parts"].values())


def test_the_products_inside_attention_are_its_own():
    assert part_of(["aten::mm", "hkt_hf_modeling_polyphase_hkt::forward"]) == "attention"
    assert part_of(["aten::mm", "aten::linear"]) == "matrix products outside attention"
    assert part_of(["aten::add_"]) == REST
