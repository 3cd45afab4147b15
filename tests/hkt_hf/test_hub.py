"""Pushing and loading over HTTP: every file that leaves a process arrives, and another process gets the same logits."""

import hashlib
import json

import pytest
import torch
from clients import TEXTS, WITHOUT_PROJECT, run_python, tiny_config, tiny_tokenizer
from hub_server import CORRUPT_UPLOAD, DROP_UPLOAD, OVERTAKE_COMMIT, REFUSE_COMMIT, HubServer
from tiny_models import tiny_head, tiny_hsa_head
from transformers.dynamic_module_utils import get_relative_import_files

import hkt_hf.hub
from hkt_hf import HKTForSequenceClassification
from hkt_hf.hub import push_checkpoint, release_files
from hkt_hf.modeling import modeling_hkt, modeling_hsa
from hkt_hf.modeling.modeling_hkt import AUTO_CLASSES, AUTO_MAP


PUSHED, PLAIN = "someone/pushed", "someone/plain"

PUSH = """
import sys
from hkt_hf.checkpoints import load_checkpoint
from hkt_hf.hub import push_checkpoint

url = push_checkpoint(sys.argv[1], "pushed", commit_message="First weights")
model, tokenizer = load_checkpoint(sys.argv[1])
model.push_to_hub("plain")
tokenizer.push_to_hub("plain")
print(url)
"""

LOAD = """
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

trust_remote_code, output, texts = sys.argv[1] == "True", sys.argv[2], eval(sys.argv[3])
logits = {}
for repo_id in sys.argv[4:]:
    tokenizer = AutoTokenizer.from_pretrained(repo_id)
    model = AutoModelForSequenceClassification.from_pretrained(repo_id, trust_remote_code=trust_remote_code)
    expected = "transformers_modules" if trust_remote_code else "hkt_hf.modeling"
    assert type(model).__module__.startswith(expected), type(model)
    with torch.no_grad():
        logits[repo_id] = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
torch.save(logits, output)
"""

# Pushes that break off, then the old revision, then a push that succeeds and the new weights.
BREAK_OFF = """
import functools, json, sys, tempfile, torch
from huggingface_hub import lfs

# One quick retry instead of five slow ones.
lfs.http_backoff = functools.partial(lfs.http_backoff, max_retries=1, base_wait_time=0.01)

from transformers import AutoModelForSequenceClassification
import hkt_hf
from hkt_hf.checkpoints import load_checkpoint
from hkt_hf.hub import push_checkpoint

new, output, texts, repo_id, num_faults = sys.argv[1], sys.argv[2], eval(sys.argv[3]), sys.argv[4], int(sys.argv[5])
_, tokenizer = load_checkpoint(new)
batch = tokenizer(texts, padding=True, return_tensors="pt")

@torch.no_grad()
def logits():
    with tempfile.TemporaryDirectory() as cache_dir:
        return AutoModelForSequenceClassification.from_pretrained(repo_id, cache_dir=cache_dir)(**batch).logits.clone()

after_failure, errors = [], []
for _ in range(num_faults):
    try:
        push_checkpoint(new, repo_id)
    except Exception as error:
        errors.append(type(error).__name__)
    else:
        raise AssertionError("the push did not fail")
    after_failure.append(logits())
push_checkpoint(new, repo_id)
torch.save({"errors": errors, "after_failure": after_failure, "after_success": logits()}, output)
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


def save_checkpoint(folder, seed):
    """A folder as training leaves it, with files that nobody else needs; returns the logits of its model."""
    torch.manual_seed(seed)
    model = HKTForSequenceClassification(tiny_config(initializer_range=0.5)).eval()
    tokenizer = tiny_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Tiny\n")
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "metrics.json").write_text("{}\n")
    (folder / "curves.png").write_bytes(b"\x89PNG")
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "notes.py", ".env", ".curves.7.png"):
        (folder / name).write_bytes(b"private")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"partial")
    with torch.no_grad():
        return model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders and logits of an old and of a new checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: (folder / name, save_checkpoint(folder / name, seed)) for seed, name in enumerate(["old", "new"])}


@pytest.fixture(scope="module")
def pushed(hub, checkpoints, tmp_path_factory):
    """The old checkpoint on the hub, pushed by `push_checkpoint` and by `push_to_hub`; returns the URL printed."""
    cache = tmp_path_factory.mktemp("push")
    return run_python(PUSH, cache, hub.client_environment(cache), checkpoints["old"][0]).strip()


EXPECTED_FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "attention_hkt.py",
    "cache_hkt.py",
    "checks_common.py",
    "configuration_hkt.py",
    "from_flat_hkt.py",
    "layers_common.py",
    "layout_hkt.py",
    "memory_common.py",
    "modeling_hkt.py",
    "polyphase_hkt.py",
    "triton_hkt.py",
    "README.md",
    "config.yaml",
    "metrics.json",
    "curves.png",
}


def test_push_is_one_commit_with_the_bytes_of_the_folder(hub, checkpoints, pushed):
    folder, _ = checkpoints["old"]
    latest, initial = hub.repos[PUSHED].log()
    assert pushed == f"{hub.endpoint}/{PUSHED}/commit/{latest.oid}"
    assert latest.message == "First weights"
    assert set(latest.tree) - set(initial.tree) == EXPECTED_FILES
    for name in EXPECTED_FILES:
        assert latest.tree[name].content == (folder / name).read_bytes()


def test_large_files_arrive_with_their_checksum(hub, checkpoints, pushed):
    folder, _ = checkpoints["old"]
    checksum = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (checksum, checksum) in hub.uploads
    assert all(announced == received for announced, received in hub.uploads)
    for repo_id in (PUSHED, PLAIN):
        weights = hub.repos[repo_id].find("main").tree["model.safetensors"]
        assert weights.is_lfs
        assert weights.sha256 == checksum


def test_every_auto_class_is_pushed(hub, pushed):
    for repo_id in (PUSHED, PLAIN):
        tree = hub.repos[repo_id].find("main").tree
        assert json.loads(tree["config.json"].content)["auto_map"] == AUTO_MAP


@pytest.mark.parametrize("with_project", [True, False], ids=["installed", "remote-code"])
def test_another_process_gets_the_same_logits(hub, checkpoints, pushed, tmp_path, with_project):
    script = LOAD if with_project else WITHOUT_PROJECT + LOAD
    if with_project:
        script = "import hkt_hf\n" + script
    output = tmp_path / "logits.pt"
    run_python(
        script, tmp_path, hub.client_environment(tmp_path), not with_project, output, repr(TEXTS), PUSHED, PLAIN
    )
    logits = torch.load(output)
    for repo_id in (PUSHED, PLAIN):
        assert torch.equal(logits[repo_id], checkpoints["old"][1])


def test_a_push_that_breaks_off_leaves_the_old_revision(hub, checkpoints, pushed, tmp_path):
    (old_folder, old), (new_folder, new) = checkpoints["old"], checkpoints["new"]
    assert not torch.equal(old, new)
    before = hub.repos[PUSHED].branches["main"]
    faults = [DROP_UPLOAD, CORRUPT_UPLOAD, REFUSE_COMMIT, OVERTAKE_COMMIT]
    hub.faults.extend(faults)
    output = tmp_path / "results.pt"
    run_python(
        BREAK_OFF,
        tmp_path,
        hub.client_environment(tmp_path),
        new_folder,
        output,
        repr(TEXTS),
        PUSHED,
        len(faults),
    )
    results = torch.load(output)
    assert results["errors"] == ["RuntimeError", "RuntimeError", "HfHubHTTPError", "HfHubHTTPError"]
    for logits in results["after_failure"]:
        assert torch.equal(logits, old)
    assert torch.equal(results["after_success"], new)

    repo = hub.repos[PUSHED]
    latest, overtaker, previous, _ = repo.log()
    assert overtaker.message == OVERTAKE_COMMIT
    assert previous.oid == before
    assert previous.tree["model.safetensors"].content == (old_folder / "model.safetensors").read_bytes()
    assert latest.tree["model.safetensors"].content == (new_folder / "model.safetensors").read_bytes()
    assert any(announced != received for announced, received in hub.uploads)


# The rest needs no server: what is refused before anything is sent, and what would be sent.


class NoHub:
    """Stands for `HfApi` where a push must fail before it talks to the Hub."""

    def __init__(self, *args, **kwargs):
        raise AssertionError("the push reached the Hub")


class RecordingHub:
    """Stands for `HfApi` where a test looks at the one commit; `names` are the files that the repository has."""

    names = ()

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create_repo", kwargs))
        return type("RepoUrl", (), {"repo_id": f"someone/{repo_id}"})

    def create_branch(self, repo_id, **kwargs):
        self.calls.append(("create_branch", kwargs))

    def model_info(self, repo_id, **kwargs):
        siblings = [type("Sibling", (), {"rfilename": name}) for name in self.names]
        return type("Info", (), {"sha": "0" * 40, "siblings": siblings})

    def create_commit(self, repo_id, operations, **kwargs):
        added = {op.path_in_repo: op.path_or_fileobj for op in operations if hasattr(op, "path_or_fileobj")}
        self.calls.append(("create_commit", kwargs))
        self.added = {name: open(path, "rb").read() for name, path in added.items()}
        type(self).commit = self.added, {op.path_in_repo for op in operations} - set(added)
        return type("Commit", (), {"commit_url": "url"})


@pytest.fixture
def recording_hub(monkeypatch):
    recorder = type("Recorder", (RecordingHub,), {"calls": []})
    monkeypatch.setattr(hkt_hf.hub, "HfApi", recorder)
    return recorder


@pytest.mark.parametrize("repo_id", ["", None, "a/b/c", "with space", "someone/a--b"])
def test_malformed_repo_id_is_refused(checkpoints, monkeypatch, repo_id):
    monkeypatch.setattr(hkt_hf.hub, "HfApi", NoHub)
    with pytest.raises(ValueError, match=r"(?i)repo.?id"):
        push_checkpoint(checkpoints["old"][0], repo_id)


def test_broken_checkpoint_is_never_sent(monkeypatch, tmp_path):
    monkeypatch.setattr(hkt_hf.hub, "HfApi", NoHub)
    save_checkpoint(tmp_path / "broken", 0)
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        push_checkpoint(tmp_path / "broken", "name")
    with pytest.raises(FileNotFoundError, match="missing"):
        push_checkpoint(tmp_path / "missing", "name")
    with pytest.raises(FileNotFoundError, match="someone/name"):
        push_checkpoint("someone/name", "name")


def test_files_of_an_older_push_do_not_survive(checkpoints, recording_hub):
    recording_hub.names = (
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "added_tokens.json",
        "config.json",
        "README.md",
        "model_notes/x.safetensors",
        ".gitattributes",
    )
    push_checkpoint(checkpoints["old"][0], "name", private=True, revision="next", token="t")
    added, deleted = recording_hub.commit
    assert set(added) == EXPECTED_FILES
    assert deleted == {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "added_tokens.json"}
    calls = dict(recording_hub.calls)
    assert calls["create_repo"] == {"private": True, "exist_ok": True}
    assert calls["create_branch"] == {"branch": "next", "exist_ok": True}
    assert calls["create_commit"] == {
        "commit_message": "Upload HKTForSequenceClassification",
        "revision": "next",
        "parent_commit": "0" * 40,
    }


@pytest.mark.parametrize("lacking", ["code", "auto_map"])
def test_code_is_added_where_the_folder_lacks_it(recording_hub, tmp_path, lacking):
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, 0)
    if lacking == "code":
        (folder / "attention_hkt.py").unlink()
    else:
        config = json.loads((folder / "config.json").read_text())
        del config["auto_map"]["AutoModel"]
        (folder / "config.json").write_text(json.dumps(config))
    before = sorted(path.name for path in folder.iterdir())
    push_checkpoint(folder, "name")
    added, _ = recording_hub.commit
    assert set(added) == EXPECTED_FILES
    assert json.loads(added["config.json"])["auto_map"] == AUTO_MAP
    assert added["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert added["README.md"] == (folder / "README.md").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    "build, auto_class, name",
    [
        *((tiny_head, auto_class, name) for auto_class, name in AUTO_CLASSES.items()),
        *((tiny_hsa_head, auto_class, name) for auto_class, name in modeling_hsa.AUTO_CLASSES.items()),
    ],
)
def test_every_class_can_be_pushed(recording_hub, tmp_path, build, auto_class, name):
    build(auto_class).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    push_checkpoint(tmp_path, "name")
    added, _ = recording_hub.commit
    assert added["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    assert dict(recording_hub.calls)["create_commit"]["commit_message"] == f"Upload {name}"


def test_hsa_is_pushed_with_its_code(recording_hub, tmp_path):
    tiny_hsa_head("AutoModelForMaskedLM").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tree_hsa.py").unlink()  # an incomplete copy is made whole
    push_checkpoint(tmp_path, "name")
    added, _ = recording_hub.commit
    code = {path.rsplit("/", 1)[-1] for path in get_relative_import_files(modeling_hsa.__file__)}
    assert {name for name in added if name.endswith(".py")} == {"modeling_hsa.py", *code}
    assert json.loads(added["config.json"])["auto_map"] == modeling_hsa.AUTO_MAP


def test_release_has_shards_and_index_and_only_needed_code(tmp_path):
    HKTForSequenceClassification(tiny_config()).save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "other.py").touch()
    (tmp_path / "model-old.safetensors").touch()
    names = {path.name for path in release_files(tmp_path)}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    code = {"modeling_hkt.py", *(path.rsplit("/", 1)[-1] for path in get_relative_import_files(modeling_hkt.__file__))}
    assert len(set(index["weight_map"].values())) > 1
    assert names == {"config.json", "model.safetensors.index.json", *index["weight_map"].values(), *code}
