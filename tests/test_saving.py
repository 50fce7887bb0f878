"""Files written in one step, models saved whole or not at all, files that lie."""

import contextlib
import errno
import json
import math
import os
import stat
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import make_model as make
from helpers import signal
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from test_tasks import classifier, forecaster, speaker

from s4mini.layer import S4Layer
from s4mini.model import S4Config, S4Model, parameter_groups
from s4mini.saving import CONFIG, WEIGHTS, write_atomically, write_together
from s4mini.tasks import S4Classifier, S4Forecaster, S4LanguageModel

CALLS = ("open", "fsync", "replace", "write")


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


@contextlib.contextmanager
def failing(k, action, monkeypatch):
    """Do something else at the k-th call that reaches the disk; count the calls."""
    made = [0]

    def counted(function):
        def called(*args, **kwargs):
            made[0] += 1
            if made[0] == k:
                action()
            return function(*args, **kwargs)

        return called

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        yield made


def full():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path, failed = tmp_path / "note", 0
    for k in range(1, 20):
        write_atomically(path, b"old")
        try:
            with failing(k, full, monkeypatch) as made:
                write_atomically(path, b"new")
        except OSError as error:
            assert error.errno == errno.ENOSPC
            failed += 1
            assert contents(tmp_path) == {"note": b"old"}
        if made[0] < k:
            break
    assert failed >= 3 and contents(tmp_path) == {"note": b"new"}


def killed_at(k, work):
    """Run work in a child that dies at its k-th call; say whether it did."""
    child = os.fork()
    if child == 0:
        monkeypatch = pytest.MonkeyPatch()
        with failing(k, lambda: os._exit(9), monkeypatch):
            work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize(
    "wrap", [lambda model: model, lambda model: S4Classifier(model, ["a", "b"])]
)
def test_a_model_with_a_layer_of_its_own_is_refused(wrap, tmp_path):
    """The configuration would tell of another system than the layer's."""
    model = S4Model(S4Config(d_input=3, d_output=2, d_model=4, n_layers=2, d_state=4))
    old = model.blocks[1].layer.system()
    model.blocks[1].layer = S4Layer.from_system(old.Lambda, old.P, old.B, 4)
    with pytest.raises(ValueError, match=r"^blocks\.1\.layer: .*'legs'.*got \('own'"):
        wrap(model).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_kill_leaves_the_old_model_or_the_new(tmp_path):
    old, new = make(seed=1).float(), make(seed=2, n_layers=1).float()
    u, seen = signal(2, 5, 2).float(), set()
    expected = {"old": old(u), "new": new(u)}
    for k in range(1, 30):
        old.save_pretrained(tmp_path)
        killed = killed_at(k, lambda: new.save_pretrained(tmp_path))
        y = S4Model.from_pretrained(tmp_path)(u)
        seen |= {name for name, value in expected.items() if torch.equal(y, value)}
        assert any(torch.equal(y, value) for value in expected.values())
        if not killed:
            break
    assert not killed and k > 6 and seen == {"old", "new"}
    new.save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == {CONFIG, WEIGHTS}  # nothing is left of the killed


def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch):
    old, new = make(seed=1), make(seed=2, d_model=8)
    old.save_pretrained(tmp_path)
    before, k = contents(tmp_path), 0
    while True:
        k += 1
        try:
            with failing(k, full, monkeypatch):
                new.save_pretrained(tmp_path)
        except OSError:
            S4Model.from_pretrained(tmp_path)
            if contents(tmp_path)[WEIGHTS] == before[WEIGHTS]:
                old.save_pretrained(tmp_path)
            continue
        break
    assert k > 6 and set(contents(tmp_path)) == {CONFIG, WEIGHTS}


def test_what_cannot_be_serialised_touches_nothing(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"^parameters: .*bfloat16"):
        make().bfloat16().save_pretrained(tmp_path)
    odd = make()
    odd.decoder = torch.nn.Linear(6, 5).double()
    with pytest.raises(ValueError, match=r"^decoder.weight: expected F64 of shape \(3, 6\)"):
        odd.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_the_mode_is_the_umasks(tmp_path):
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            write_together(tmp_path, {"a": b"1", "b": b"2"})
        finally:
            os.umask(before)
        for name in ("a", "b"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask


def test_temporaries_of_the_dead_are_removed_and_of_the_living_kept(tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    dead, alive = (tmp_path / f".note.{pid}-0.tmp" for pid in (done.pid, os.getppid()))
    other = tmp_path / f".other.{done.pid}-0.tmp"
    for path in (dead, alive, other):
        path.touch()
    write_atomically(tmp_path / "note", b"x")
    assert not dead.exists() and alive.exists() and other.exists()


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["", "a/b", "../a", "/a"])
def test_only_plain_names(tmp_path, name):
    with pytest.raises(ValueError, match=r"^files: expected plain names"):
        write_together(tmp_path / "new", {name: b""})
    assert not (tmp_path / "new").exists()


def test_many_writers_of_one_file(tmp_path):
    path, texts = tmp_path / "note", [bytes([65 + i]) * 9999 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_atomically(path, text), texts * 5))
    assert path.read_bytes() in texts and set(contents(tmp_path)) == {"note"}


SAVED = [
    (lambda: make(norm="batch", prenorm=True, dt_min=3e-3), signal(2, 9, 2)),
    (lambda: make(bidirectional=True, measure="legt").float(), signal(2, 9, 2).float()),
    (lambda: make(measure="diag-lin", method="bilinear", tied=True), signal(2, 9, 2)),
    (classifier, signal(2, 9, 2)),
    (forecaster, signal(2, 9, 2)),
    (speaker, torch.tensor([[0, 3, 5, 1]])),
]


@pytest.mark.parametrize(("build", "u"), SAVED)
def test_saved_and_loaded(build, u, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "new")
    again = type(model).from_pretrained(str(tmp_path / "new"))
    assert type(again) is type(model) and not again.training
    assert again.arguments() == model.arguments()
    assert all(p.requires_grad for p in again.parameters())
    assert torch.equal(again(u), model(u)) and repr(again) == repr(model)
    if not getattr(model, "model", model).config.bidirectional:
        inner, same = getattr(model, "model", model), getattr(again, "model", again)
        a, b = (m.step(u[:, 0], m.initial_state(len(u)))[0] for m in (inner, same))
        assert torch.equal(a, b)
    assert set(contents(tmp_path / "new")) == {CONFIG, WEIGHTS}
    # what was loaded can be trained, changed and saved once more, over the old files
    again.train()(u).square().sum().backward()
    with torch.no_grad():
        next(again.parameters()).mul_(0.5)
    again.eval().save_pretrained(tmp_path / "new")
    third = type(model).from_pretrained(tmp_path / "new")
    assert torch.equal(third(u), again(u)) and not torch.equal(third(u), model(u))


def test_the_tie_is_restored(tmp_path):
    model, u = speaker(), torch.tensor([[0, 3, 5, 1]])
    model.model.decoder.weight = model.model.encoder.weight
    model.save_pretrained(tmp_path)
    again = S4LanguageModel.from_pretrained(tmp_path)
    assert again.model.decoder.weight is again.model.encoder.weight
    assert torch.equal(again(u), model(u))
    optimizer = torch.optim.SGD(parameter_groups(again, lr=0.1, weight_decay=0.0, ssm_lr=0.1))
    before = again.model.encoder.weight.detach().clone()
    again.train()(u).sum().backward()
    optimizer.step()
    moved = before - 0.1 * again.model.encoder.weight.grad
    assert (again.model.encoder.weight - moved).abs().max() < 1e-12  # one step, not two
    assert again.model.decoder.weight is again.model.encoder.weight


def test_loaded_tensors_begin_where_complex_numbers_may(tmp_path):
    make().save_pretrained(tmp_path)
    state = S4Model.from_pretrained(tmp_path).state_dict()
    assert all(v.data_ptr() % 16 == 0 for v in state.values())


def test_numpy_numbers_are_saved(tmp_path):
    import numpy as np

    config = S4Config(d_model=np.int64(6), dropout=np.float32(0.25), prenorm=np.bool_(True))
    S4Model(config).save_pretrained(tmp_path)
    assert S4Model.from_pretrained(tmp_path).config == config


def test_other_files_of_a_folder_stay(tmp_path):
    (tmp_path / "metrics.csv").write_text("kept")
    make().save_pretrained(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "kept"


def test_eight_threads_load_at_once(tmp_path):
    """Nothing of the process is touched: precision, random numbers, output."""
    models = [make(seed=i) if i % 2 else make(seed=i).float() for i in range(8)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    torch.manual_seed(0)
    before, out = torch.get_rng_state(), sys.stdout

    def load(i):
        model = S4Model.from_pretrained(tmp_path / str(i % 8))
        assert torch.get_default_dtype() == torch.float32 and sys.stdout is out
        return model.state_dict()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(load, range(40)))
    for i, state in enumerate(found):
        expected = models[i % 8].state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in state.items())
        assert all(v.dtype == expected[k].dtype for k, v in state.items())
    assert torch.equal(torch.get_rng_state(), before) and sys.stdout is out
    assert torch.get_default_dtype() == torch.float32


def test_weights_of_another_method_are_refused():
    """The configuration comes with the weights; nothing loads them without it."""
    a, b = make(measure="diag-lin"), make(measure="diag-lin", method="bilinear")
    assert a.arguments() != b.arguments()
    assert a.config.method == "zoh" and "zoh" in repr(a.config)


def rewrite(folder, note=None, tensors=None, change=None):
    """Write the weights file as someone else might."""
    path = folder / WEIGHTS
    header, state = json.loads((folder / CONFIG).read_text()), load_file(path)
    header |= note or {}
    header["arguments"] |= change or {}
    state = {k: v for k, v in (state | (tensors or {})).items() if v is not None}
    path.write_bytes(save(state, {"s4mini": json.dumps(header)}))
    (folder / CONFIG).unlink()


H = torch.ones(6)
LIES = [
    ({"change": {"d_model": 10**9}}, "d_model: expected at most 65536"),
    ({"change": {"d_model": 2**16}}, "expected F32 of shape"),
    ({"change": {"n_layers": 10**9}}, "n_layers: expected at most 1024"),
    ({"change": {"n_layers": 1000}}, "expected a tensor blocks.2"),
    ({"change": {"d_state": 8000}}, "expected F32 of shape"),
    ({"change": {"d_state": 20000}}, "d_state: expected at most 8192"),
    ({"change": {"n_layers": 1}}, "expected no tensor blocks.1"),
    ({"change": {"d_model": "6"}}, "d_model: expected an integer"),
    ({"change": {"prenorm": "False"}}, "prenorm: expected True or False"),
    ({"change": {"pool": "max"}}, "pool: expected one of"),
    ({"change": {"measure": "diag-lin", "method": "zoh"}}, "expected no tensor .*P"),
    ({"change": {"colour": 1}}, "it has 'colour'"),
    ({"note": {"class": None}}, "class: expected str, got None"),
    ({"note": {"class": "S4Forecaster"}}, "expected a saved S4Model, found S4Forecaster"),
    ({"note": {"dtype": "int8"}}, "dtype: expected float32 or float64"),
    ({"note": {"dtype": "float64"}}, "expected F64 of shape"),
    ({"note": {"more": 1}}, "expected a note with"),
    ({"note": {"arguments": {}}}, "it lacks"),
    ({"note": {"shared": {"x": "y"}}}, "expected no tensor x"),
    ({"note": {"shared": {"decoder.weight": ["encoder.weight"]}}}, "unhashable|expected"),
    ({"note": {"shared": {"decoder.weight": "decoder.bias"}}}, "expected F32 of shape"),
    ({"note": {"shared": {"decoder.bias": "blocks.0.norm.norm.running_var"}}}, "expected"),
    ({"tensors": {"decoder.bias": None}}, "expected a tensor decoder.bias, found none"),
    ({"tensors": {"more": H}}, "expected no tensor more"),
    ({"tensors": {"decoder.bias": torch.ones(3) * math.nan}}, "decoder.bias: expected finite"),
    ({"tensors": {"decoder.bias": torch.ones(3).int()}}, "decoder.bias: expected F32"),
    ({"tensors": {"decoder.bias": torch.ones(3).bool()}}, "decoder.bias: expected F32"),
    ({"tensors": {"decoder.bias": torch.ones(3).half()}}, "decoder.bias: expected F32"),
    ({"tensors": {"decoder.bias": torch.ones(4)}}, "decoder.bias: expected F32"),
    ({"tensors": {"blocks.0.norm.norm.running_var": -H}}, "no variance below zero"),
    ({"tensors": {"blocks.1.norm.norm.num_batches_tracked": torch.tensor(-1)}}, "a count"),
]


@pytest.mark.parametrize("number", range(len(LIES)))
def test_files_that_lie(tmp_path, number):
    changes, match = LIES[number]
    make(norm="batch").float().save_pretrained(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(ValueError, match=match) as caught:
        S4Model.from_pretrained(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / WEIGHTS))


def test_a_rewritten_file_that_is_true_is_read(tmp_path):
    make(norm="batch").float().save_pretrained(tmp_path)
    rewrite(tmp_path)
    S4Model.from_pretrained(tmp_path)


def test_files_of_other_programs(tmp_path):
    path = tmp_path / WEIGHTS
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: not found"):
        S4Model.from_pretrained(tmp_path)
    for content in (
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 10) + b"[" * 10,
        b"PK\3\4" + b"x" * 99,
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model.safetensors: "):
            S4Model.from_pretrained(tmp_path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="expected a note with class"):
        S4Model.from_pretrained(tmp_path)
    path.write_bytes(save({"a": torch.ones(2)}, {"s4mini": "[" * 100_000}))
    with pytest.raises(ValueError, match=r"model.safetensors: "):
        S4Model.from_pretrained(tmp_path)


def test_a_configuration_that_contradicts_the_weights(tmp_path):
    make().save_pretrained(tmp_path)
    text = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(text.replace('"mean"', '"last"'))
    with pytest.raises(ValueError, match=r"config.json says other"):
        S4Model.from_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(text[:40])
    with pytest.raises(ValueError, match=r"model.safetensors"):
        S4Model.from_pretrained(tmp_path)
    for kind in (S4Classifier, S4Forecaster):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=rf"expected a saved {kind.__name__}, found S4Model"):
            kind.from_pretrained(tmp_path)


def test_task_arguments_are_examined(tmp_path):
    forecaster().float().save_pretrained(tmp_path)
    rewrite(tmp_path, change={"horizon": -1})
    with pytest.raises(ValueError, match="horizon: expected an integer"):
        S4Forecaster.from_pretrained(tmp_path)
    forecaster().float().save_pretrained(tmp_path)
    rewrite(tmp_path, change={"colour": 1})
    with pytest.raises(ValueError, match="colour"):
        S4Forecaster.from_pretrained(tmp_path)


def test_local_folders_need_safetensors_only(tmp_path):
    program = f"""
import sys
sys.modules["huggingface_hub"] = None
from s4mini.model import S4Config, S4Model
model = S4Model(S4Config(d_model=4, n_layers=1, d_state=8))
model.save_pretrained({str(tmp_path)!r})
S4Model.from_pretrained({str(tmp_path)!r})
sys.modules["safetensors"] = sys.modules["safetensors.torch"] = None
calls = [lambda: model.save_pretrained("x"), lambda: S4Model.from_pretrained("x")]
for call in [*calls, lambda: model.push_to_hub("a/b")]:
    try:
        call()
    except ModuleNotFoundError as error:
        assert "s4mini[train]" in str(error), error
    else:
        raise AssertionError("worked without the package")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_push_to_hub_uploads_the_folder(monkeypatch):
    import huggingface_hub

    seen = {}

    def upload(repo_id, folder_path):
        seen.update(repo=repo_id, files=set(contents(folder_path)))
        return "https://huggingface.co/a/b"

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *a, **k: seen.update(k))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    assert make().push_to_hub("a/b", private=True) == "https://huggingface.co/a/b"
    assert seen == {
        "repo": "a/b",
        "files": {CONFIG, WEIGHTS},
        "private": True,
        "exist_ok": True,
    }


def test_a_turned_bit_is_seen(tmp_path):
    """Every bit of the header, and one of each byte of some hundred behind it."""
    model = S4Model(S4Config(d_model=2, n_layers=1, d_state=2, norm="batch"))
    model.save_pretrained(tmp_path)
    (tmp_path / CONFIG).unlink()  # the weights' file must tell by itself
    path = tmp_path / WEIGHTS
    whole, same = path.read_bytes(), S4Model.from_pretrained(tmp_path).state_dict()
    start = 8 + int.from_bytes(whole[:8], "little")
    places = [(k, bit) for k in range(0, start, 19) for bit in range(8)]
    places += [(k, k % 8) for k in range(start, len(whole), 7)]
    seen = 0
    for k, bit in places:
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 1 << bit]) + whole[k + 1 :])
        try:
            found = S4Model.from_pretrained(tmp_path)
        except ValueError as error:
            seen += str(error).startswith(str(path))
        else:  # the name of the checksum itself, or of the format
            assert k < start and found.config == model.config
            assert all(torch.equal(v, same[name]) for name, v in found.state_dict().items())
            seen += 1
    assert seen == len(places)


def test_a_checksum_is_named_and_may_be_missing(tmp_path):
    S4Model(S4Config(d_model=2, n_layers=1, d_state=2)).save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"expected contents of SHA-256 \w{64}, found \w{64}$"):
        S4Model.from_pretrained(tmp_path)
    with safe_open(path, "pt") as file:
        notes = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    del notes["sha256"]
    save_file(tensors, path, notes)
    S4Model.from_pretrained(tmp_path)


def test_weights_of_another_kind_are_refused(tmp_path):
    S4Model(S4Config(d_model=2, n_layers=1, d_state=2)).save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS
    with safe_open(path, "pt") as file:
        notes = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    tensors["blocks.0.layer.kind"] += 1
    del notes["sha256"]
    save_file(tensors, path, notes)
    with pytest.raises(ValueError, match=r"blocks\.0\.layer\.kind: expected \[0.0, 0.0\]"):
        S4Model.from_pretrained(tmp_path)
