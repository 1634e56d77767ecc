"""train.py and data.py under stress: a recorded step, pictures drawn ahead, odd checkpoints.

The formulas are tested in test_hmr.py, whose fixtures and `close` are used here.
"""

import contextlib
import functools
import math
import os
import re
import time
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch

import data
import train
from data import SyntheticPeople
from hmr import Regressor
from smpl import OPEN_BODY, SMPL
from test_hmr import (body, close, precision_of_the_encoder, same,  # noqa: F401 (fixtures)
                      same_numbers_every_time, tiny, weights_of)

HERE = Path(__file__).resolve().parent.parent
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHORT = ["--small", "--width", "8", "--batch", "2", "--size", "32", "--eval-pictures", "1",
         "--log-every", "1", "--schedule", "constant", "--device", "cpu"]


@pytest.fixture
def quick_guesses(monkeypatch):
    """Without the lazy guesses' mean camera, which is of 2,048 people: a second for each table."""
    monkeypatch.setattr(train, "mean_camera", lambda *_: torch.tensor([[0.8, 0.0, 0.0]]))


@pytest.fixture
def no_measures(monkeypatch):
    monkeypatch.setattr(train, "finish", lambda *args: {})


# ============================================================================================
# The recorded step, pictures drawn ahead

class Recording:
    """A stand-in for a CUDA graph.  Recording makes the step, so that the first launch has nothing
    to do.  Each later one calls the step on the recorded tensors and overwrites its losses."""

    def __init__(self, monkeypatch):
        self.launches, self.modes, self.adams, init = 0, [], [], train.RecordedStep.__init__
        monkeypatch.setattr(train, "records", lambda config: config.record)
        monkeypatch.setattr(train, "adam", self.adam)
        monkeypatch.setattr(train.RecordedStep, "__init__", lambda step, *args:
                            setattr(self, "step", step) or init(step, *args))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.record)
        for name in ("Stream", "current_stream", "stream"):
            monkeypatch.setattr(torch.cuda, name, mock.MagicMock())

    @contextlib.contextmanager
    def record(self, graph, stream, capture_error_mode):
        assert stream is torch.cuda.Stream(), "not the stream of the first steps"
        self.modes.append(capture_error_mode)
        yield
        self.is_made = True

    def replay(self):
        self.launches += 1
        if not self.is_made:
            tensors = self.step.tensors
            losses = self.step.step(data.Batch(*tensors[:9]), tensors[9:] or None)
            for mine, new in zip(self.step.losses, losses):
                mine.copy_(new)
        self.is_made = False

    def adam(self, network, rate, config) -> torch.optim.Adam:
        """Not `capturable`, which needs a GPU; the rate in float64, to be exactly the same."""
        lr = torch.tensor(rate, dtype=torch.float64) if config.record else rate
        self.adams.append(torch.optim.Adam(network.parameters(), lr, fused=True))
        return self.adams[-1]


def run(folder: Path, **changes) -> tuple[list, dict]:
    """Train 12 steps -> log.csv's rows, a step and its losses each; the weights it left."""
    train.train(tiny(folder, **{"steps": 12, "schedule": "onecycle", "log_every": 1, **changes}))
    rows = (folder / "log.csv").read_text(encoding="utf-8").split()[1:]
    return [[float(x) for x in row.split(",")[:10]] for row in rows], weights_of(folder)


@pytest.mark.parametrize("changes", [{}, {"adv": False, "iterations": 1}])
def test_a_recorded_run_is_the_plain_run(changes, tmp_path, monkeypatch, no_measures):
    recording = Recording(monkeypatch)
    plain, weights = run(tmp_path / "plain", record=False, **changes)
    assert recording.launches == 0, "--no-record records"
    recorded, others = run(tmp_path / "recorded", **changes)
    assert recording.launches == 9, "steps 0 to 2 are ordinary, each later one is one launch"
    assert recording.modes == ["thread_local"], \
        "recorded once, while a thread that loads photographs may call CUDA"
    assert recorded == plain, "a step lost, or made twice; another step's batch, rate or losses"
    for key in ("model", "discriminator", "opt_E", "opt_D"):
        assert same(weights[key], others[key]), f"{key} differs after 12 steps"
    assert others["opt_E"].keys() == {"state"}, "the file must not say whether it was recorded"
    for adam in recording.adams[2:]:
        assert adam.param_groups[0]["lr"] is adam.defaults["lr"], \
            "the recording holds the address of the rate's tensor: fill it"


def test_a_step_that_cannot_be_recorded_names_the_way_out(tmp_path, monkeypatch, capsys,
                                                          no_measures):
    Recording(monkeypatch)
    monkeypatch.setattr(torch.cuda, "graph", mock.Mock(
        side_effect=RuntimeError("CUDA error: operation not supported")))
    assert train.main([*SHORT, "--steps", "5", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "cannot be recorded (CUDA error: operation not supported); give --no-record" in error
    assert train.main(["--resume", "--no-record", "--out", str(tmp_path / "run")]) == 0


@gpu
def test_a_recorded_run_has_the_losses_of_an_ordinary_one(tmp_path, monkeypatch, no_measures):
    """float32, the same stored batches: a recorded step 4 is the ordinary step 4."""
    body = SMPL().cuda()
    world = SyntheticPeople(body, data.load_mocap(True, False), 16, 32)
    assert world.ahead == 8, "a GPU draws the pictures of eight steps in one go"
    stored = {step: (world.batch(step), world.motion(48, step)) for step in range(8)}
    monkeypatch.setattr(SyntheticPeople, "batch", lambda _, step: stored[step][0])
    monkeypatch.setattr(SyntheticPeople, "motion", lambda _, n, step: stored[step][1])
    monkeypatch.setattr(train, "pictures_to_show", lambda *args: stored[0][0])
    plain, recorded = (run(tmp_path / str(record), record=record, steps=8, batch=16, device="cuda",
                           lr=1e-4)[0] for record in (False, True))
    # Rounding grows from step to step (weights perturbed by 1e-6 at each step: 3e-5 at most).  A
    # stale batch, other dropout masks or a frozen rate make 6e-3 and more.
    for a, b in zip(plain, recorded):
        for x, y in zip(a, b):
            close(y, x, (1e-4 if a[0] < 5 else 5e-4) * max(1.0, abs(x)),
                  f"step {a[0]:.0f}: another step's batch, masks or rate?")


@gpu
def test_a_recorded_run_goes_on_and_its_checkpoint_goes_to_the_cpu_and_back(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert train.main([*SHORT[:-2], "--batch", "4", "--eval-pictures", "64", "--log-every", "2",
                       "--steps", "8", "--out", out]) == 0
    for device, steps in (("cuda", "14"), ("cpu", "16"), ("cuda", "22")):
        assert train.main(["--resume", "--out", out, "--steps", steps, "--device", device]) == 0
    rows = (tmp_path / "run" / "log.csv").read_text(encoding="utf-8").split()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(2, 23, 2)), "a row lost, or twice"
    assert weights_of(tmp_path / "run")["opt_E"]["state"][0]["step"] == 22, "Adam starts again?"
    errors = [train.evaluate(*(train.load(f"{out}/checkpoint.pt", device=device)[n] for n in (0, 2))
                             )["mpjpe"] for device in ("cpu", "cuda")]
    close(errors[1], errors[0], 0.1, "MPJPE, mm, of one checkpoint on the same pictures")


@gpu
def test_a_recorded_dropout_heeds_the_seed_of_each_launch():
    regressor = Regressor(7, torch.zeros(1, 85)).cuda().train()
    batch, outputs = data.Batch(*[torch.randn(3, 7, device="cuda")] * 9), []
    step = train.RecordedStep(lambda batch, motion: train.Losses(
        *[regressor(batch.image)[-1].detach()] * 9))
    for seed in (0, 1, 2, 7, 8, 7):             # three ordinary steps, three launches
        torch.manual_seed(seed)
        outputs.append(step(batch, None)[0].clone())
    assert torch.equal(outputs[3], outputs[5]), "two launches of one step must drop the same"
    assert not torch.equal(outputs[3], outputs[4]), "of two steps they must not"


def test_pictures_drawn_ahead_are_a_function_of_the_step(body):
    def drawn(*steps, **changes):
        world = SyntheticPeople(body, data.load_mocap(True, False), 5, 16, "hard", **changes)
        return [[*world.batch(step), *world.motion(7, step)] for step in steps]
    in_order = drawn(*range(7), ahead=3)
    for step in (6, 2, 4, 0):                   # any order, any start, as after --resume
        assert same(drawn(step, ahead=3), [in_order[step]]), f"step {step}: began elsewhere?"
    for a, b in ((0, 1), (2, 3)):               # of one block, of two
        for i in (0, -1):                       # pictures, the discriminators' betas
            assert not torch.equal(in_order[a][i], in_order[b][i]), "each step its own"
    for batch in in_order:
        assert batch[0].shape == (5, 3, 16, 16) and batch[7].tolist() == [1, 0, 1, 0, 1], \
            "half of EVERY batch has 3D labels"


# ============================================================================================
# Checkpoints of others, unlucky runs

def forge(path: Path, kind: str, value) -> None:
    """Spoil a checkpoint: its bytes, or the entry whose keys `kind` names."""
    if kind == "a flipped bit":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 64
        path.write_bytes(content)
    elif kind == "a bomb":
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("data.pkl", "data/0", "data/1", "data/2"):
                archive.writestr(f"archive/{name}", b"")
                archive.infolist()[-1].file_size = 2 ** 32 - 2        # says the archive
    elif kind == "a pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        content = part = torch.load(path, weights_only=True)
        *keys, last = (int(key) if key.isdecimal() else key for key in kind.split())
        for key in keys:
            part = part[key]
        part[last] = value
        torch.save(content, path)


@pytest.mark.parametrize("kind, value, sentence", [
    ("config amp", "foo", "--amp foo: expected one of"),
    ("config plain", 7, "--plain 7: expected a value such as False"),
    ("config", functools.reduce(lambda knot, _: [knot, knot], range(40), []),     # 2^40 lists
     "not a checkpoint of this version"),
    ("model encoder.conv1.weight", torch.zeros(1).expand(10 ** 6, 10 ** 6), "no plain tensor"),
    ("model encoder.conv1.weight", torch.zeros(8, 3, 7, 6), "checkpoint's model does not fit"),
    ("discriminator all3.bias", torch.tensor([math.nan]), "discriminator.all3.bias holds NaN"),
    ("opt_E state 0 exp_avg", torch.zeros(3), "checkpoint's opt_E does not fit"),
    ("opt_E state", [], "not a run's checkpoint"), ("a flipped bit", None, "not a readable"),
    ("a bomb", None, "not a readable"), ("a pipe", None, "no plain file")],
    ids=lambda x: x if type(x) is str else "")
def test_a_forged_checkpoint_is_refused_by_name(tmp_path, capsys, no_measures, kind, value,
                                                sentence):
    train.train(tiny(tmp_path, steps=1))
    forge(tmp_path / "checkpoint.pt", kind, value)
    begun = time.monotonic()
    assert train.main(["--resume", "--out", str(tmp_path), "--steps", "2"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1, error
    assert time.monotonic() - begun < 20, "what the file claims was followed"


def test_nothing_that_is_not_finite_is_written(tmp_path, capsys, monkeypatch, quick_guesses):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    path = tmp_path / "run" / "checkpoint.pt"
    assert train.main([*SHORT, "--rotation", "axis-angle", "--no-adv", "--lr", "1",
                       "--steps", "4", "--out", str(path.parent)]) == 2
    error = capsys.readouterr().err
    assert re.search(r"model after step 2.encoder\S+ holds NaN .*; lower --lr 1", error), error
    assert train.load_checkpoint(path)["step"] == 1, "the last one that is finite stays"
    # weights may be finite and bodies not: one sentence, no traceback from the measures' SVD
    assert train.main(["--eval", str(path), "--eval-pictures", "2"]) == 2
    error = capsys.readouterr().err
    assert "bodies are not finite" in error and error.count("\n") == 1, error
    monkeypatch.setattr(train, "evaluate", lambda *args: {"mpjpe": math.inf})
    with pytest.raises(ValueError, match="JSON"):
        train.train(tiny(tmp_path / "inf", steps=1))
    assert not (tmp_path / "inf" / "metrics.json").exists(), "Infinity is no JSON"


def test_a_run_goes_on_after_a_kill_and_with_a_body_file_that_moved(tmp_path, capsys, no_measures):
    old, new = tmp_path / "old.npz", tmp_path / "new.npz"
    old.write_bytes(OPEN_BODY.read_bytes())
    (tmp_path / "log.csv").write_text("mine")
    train.train(tiny(tmp_path, steps=1, smpl=str(old)))
    assert (tmp_path / "log.csv.old").read_text() == "mine", "a log without a checkpoint: whose?"
    old.rename(new)
    command = ["--resume", "--out", str(tmp_path), "--steps", "2", "--device", "cpu"]
    assert train.main(command) == 2
    assert "old.npz: no such file; expected a body file; give --smpl" in capsys.readouterr().err
    assert train.load(tmp_path / "checkpoint.pt", smpl=new)
    (tmp_path / ".checkpoint.pt.12345").write_bytes(b"half of one, of a killed process")
    assert train.main([*command, "--smpl", str(new)]) == 0
    assert not list(tmp_path.glob(".*")), "half a checkpoint is left lying about"
