"""train.py and data.py under stress: a recorded step, pictures drawn ahead, odd checkpoints.

The formulas are tested in test_hmr.py, whose fixtures and `close` are used here.
"""

import contextlib
import copy
import functools
import inspect
import math
import os
import re
import time
import zipfile
from pathlib import Path

import pytest
import torch

import data
import train
from data import SyntheticPeople
from hmr import HMR, Discriminator, Regressor
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


# ============================================================================================
# The recorded step

class Stream:
    """A stand-in for torch.cuda.Stream where there is no GPU."""

    def wait_stream(self, other):
        pass


class Recording:
    """A stand-in for CUDA graphs: what a step does while it is recorded is undone afterwards, and a
    launch calls the step on the recorded tensors and overwrites the losses that it returned."""

    def __init__(self, monkeypatch):
        self.steps, self.launches, self.mode, made = [], 0, None, self
        init = train.RecordedStep.__init__

        def step_of(graph) -> train.RecordedStep:
            return next(step for step in made.steps if step.graph is graph)

        class Graph:
            def replay(self):
                step = step_of(self)
                batch, made.launches = data.Batch(*step.tensors[:9]), made.launches + 1
                for mine, new in zip(step.losses, step.step(batch, step.tensors[9:] or None)):
                    mine.copy_(new)

        @contextlib.contextmanager
        def record(graph, stream, capture_error_mode):
            assert stream is step_of(graph).stream, "not the stream of the first steps"
            made.mode, used = capture_error_mode, inspect.getclosurevars(step_of(graph).step)
            parts = [part for part in used.nonlocals.values() if hasattr(part, "state_dict")]
            assert len(parts) == 4, "E, D and both optimisers"
            before, numbers = copy.deepcopy([x.state_dict() for x in parts]), torch.get_rng_state()
            yield
            torch.set_rng_state(numbers)
            for part, state in zip(parts, before):
                part.load_state_dict(state)
        monkeypatch.setattr(train, "records", lambda config: config.record)
        # on a CPU: the rate as a tensor, but not `capturable`, which needs a GPU
        monkeypatch.setattr(train, "adam", lambda network, rate, config: torch.optim.Adam(
            network.parameters(), torch.tensor(rate), fused=True))
        monkeypatch.setattr(train.RecordedStep, "__init__",
                            lambda step, *args: made.steps.append(step) or init(step, *args))
        for name, stand_in in (("CUDAGraph", Graph), ("graph", record), ("Stream", Stream),
                               ("current_stream", Stream),
                               ("stream", lambda stream: contextlib.nullcontext())):
            monkeypatch.setattr(torch.cuda, name, stand_in)


def run(folder: Path, monkeypatch, **changes) -> tuple[list, dict]:
    """Train 12 steps -> what each step returned and was given, the weights it left."""
    seen, add = [], train.Log.add

    def noted(log, step, losses):
        seen.append((step, [x.item() for x in losses]))
        return add(log, step, losses)
    with monkeypatch.context() as patch:
        patch.setattr(train.Log, "add", noted)
        patch.setattr(train, "finish", lambda *args: {})
        train.train(tiny(folder, **{"steps": 12, "schedule": "onecycle", **changes}))
    return seen, weights_of(folder)


@pytest.mark.parametrize("changes", [{}, {"adv": False, "iterations": 1}])
def test_a_recorded_run_is_the_plain_run(changes, tmp_path, monkeypatch):
    recording = Recording(monkeypatch)
    plain, weights = run(tmp_path / "plain", monkeypatch, record=False, **changes)
    assert recording.launches == 0, "--no-record records"
    recorded, others = run(tmp_path / "recorded", monkeypatch, **changes)
    assert recording.launches == 9, "steps 0 to 2 are ordinary, each later one is one launch"
    assert recording.mode == "thread_local", "a thread that loads photographs may call CUDA"
    assert [step for step, _ in recorded] == list(range(12)), "a step lost, or made twice"
    for (step, a), (_, b) in zip(plain, recorded):
        assert a == b, f"step {step}: another step's batch, rate or losses"
    for key in ("model", "discriminator", "opt_E", "opt_D"):
        assert same(weights[key], others[key]), f"{key} differs after 12 steps"


def test_the_rate_of_a_recorded_step_is_filled_not_replaced():
    for rate in (torch.tensor(0.5), 0.5):
        group = (optimizer := torch.optim.Adam([torch.zeros(1)], rate)).param_groups[0]
        train.set_rate(optimizer, 0.25)
        assert group["lr"] == 0.25, "the rate stays at what it was in the beginning"
        assert group["lr"] is rate or rate == 0.5, "the recording holds the tensor's address"


def test_a_step_that_cannot_be_recorded_names_the_way_out(tmp_path, monkeypatch, capsys):
    Recording(monkeypatch)

    def old_driver(*args, **options):
        raise RuntimeError("CUDA error: operation not supported")
    monkeypatch.setattr(torch.cuda, "graph", old_driver)
    monkeypatch.setattr(train, "finish", lambda *args: {})
    assert train.main([*SHORT, "--steps", "5", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "cannot be recorded (CUDA error: operation not supported); give --no-record" in error
    assert train.main(["--resume", "--no-record", "--out", str(tmp_path / "run")]) == 0


def test_a_checkpoint_is_the_same_whether_its_steps_were_recorded_or_not(tmp_path, body):
    """A rate that is a tensor and `capturable` neither reach the file nor come back from it."""
    def parts(rate) -> dict:
        torch.manual_seed(0)
        networks = HMR(body, 18, width=8), Discriminator()
        adams = [torch.optim.Adam(network.parameters(), rate, fused=True) for network in networks]
        return dict(zip(("model", "discriminator", "opt_E", "opt_D"), (*networks, *adams)))
    saved = []
    for rate in (torch.tensor(1e-3), 1e-3):
        trained = parts(rate)
        for name in ("opt_E", "opt_D"):
            for p in trained[name].param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            trained[name].step()
        train.save(trained, 1, 0.0, tiny(tmp_path / str(type(rate))), "drawn people")
        saved.append(train.load_checkpoint(tmp_path / str(type(rate)) / "checkpoint.pt"))
    for key in ("model", "opt_E", "opt_D"):
        assert same(saved[0][key], saved[1][key]), f"{key}: was it recorded? the file must not say"
    for rate in (torch.tensor(0.5), 0.5):
        fresh = parts(rate)
        fresh["opt_E"].param_groups[0]["capturable"] = "mine"
        train.restore(saved[0], fresh)
        group = fresh["opt_E"].param_groups[0]
        assert type(group["lr"]) is type(rate) and group["lr"] == rate, "the rate is the command's"
        assert group["capturable"] == "mine", "settings are the command's, not the file's"
        assert same(fresh["opt_E"].state_dict()["state"], saved[0]["opt_E"]["state"]), "its state"


@gpu
def test_a_recorded_run_has_the_losses_of_an_ordinary_one(tmp_path, monkeypatch):
    """float32, the same stored batches: a recorded step 4 is the ordinary step 4."""
    body = SMPL().cuda()
    world = SyntheticPeople(body, data.load_mocap(True, False), 16, 32)
    assert world.ahead == 8, "a GPU draws the pictures of eight steps in one go"
    stored = {step: (world.batch(step), world.motion(48, step)) for step in range(8)}
    monkeypatch.setattr(SyntheticPeople, "batch", lambda _, step: stored[step][0])
    monkeypatch.setattr(SyntheticPeople, "motion", lambda _, n, step: stored[step][1])
    monkeypatch.setattr(train, "pictures_to_show", lambda *args: stored[0][0])
    plain, recorded = (run(tmp_path / str(record), monkeypatch, record=record, steps=8, batch=16,
                           device="cuda", lr=1e-4)[0] for record in (False, True))
    # Rounding grows from step to step (weights perturbed by 1e-6 at each step: 3e-5 at most).  A
    # stale batch, other dropout masks or a frozen rate make 6e-3 and more.
    for step in range(8):
        for a, b in zip(plain[step][1], recorded[step][1]):
            close(b, a, (1e-4 if step < 4 else 5e-4) * max(1.0, abs(a)),
                  f"step {step}: another step's batch, masks or rate?")


@gpu
def test_a_recorded_run_goes_on_and_its_checkpoint_goes_to_the_cpu_and_back(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert train.main([*SHORT[:-2], "--batch", "4", "--eval-pictures", "64", "--log-every", "2",
                       "--steps", "8", "--out", out]) == 0
    for device, steps in (("cuda", "14"), ("cpu", "16"), ("cuda", "22")):
        assert train.main(["--resume", "--out", out, "--steps", steps, "--device", device]) == 0
    rows = (tmp_path / "run" / "log.csv").read_text(encoding="utf-8").split()
    assert [int(row.split(",")[0]) for row in rows[1:]] == list(range(2, 23, 2)), "rows"
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


# ============================================================================================
# Pictures drawn ahead

def test_pictures_drawn_ahead_are_a_function_of_the_step(body):
    def world(**changes):
        return SyntheticPeople(body, data.load_mocap(True, False), 5, 16, "hard", **changes)
    ahead, plain = world(ahead=3), world()
    assert plain.ahead == 1, "on a CPU each step draws its own"
    in_order = [(ahead.batch(step), ahead.motion(7, step)) for step in range(7)]
    for step in (6, 2, 4, 0):                   # any order, any start, as after --resume
        fresh = world(ahead=3)
        assert same(list(fresh.batch(step)), list(in_order[step][0])), f"step {step}: pictures"
        assert same(list(fresh.motion(7, step)), list(in_order[step][1])), f"step {step}: motion"
    for a, b in ((0, 1), (2, 3)):
        assert not torch.equal(in_order[a][0].image, in_order[b][0].image), "each step its own"
        assert not torch.equal(in_order[a][1][0], in_order[b][1][0]), "each step its own motion"
    for batch, _ in in_order:
        assert batch.image.shape == (5, 3, 16, 16) and batch.has_smpl.tolist() == [1, 0, 1, 0, 1], \
            "half of EVERY batch has 3D labels"


# ============================================================================================
# Checkpoints of others, unlucky runs

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "finish", lambda *args: {})
        train.train(tiny(folder / "run", steps=1))
    return folder / "run" / "checkpoint.pt"


@pytest.mark.parametrize("keys, value, sentence", [
    ("config amp", "foo", "--amp foo: expected one of"), ("config", None, "not a checkpoint"),
    ("config plain", 7, "--plain 7: expected a value such as False"),
    ("model encoder.conv1.weight", torch.zeros(1).expand(10 ** 6, 10 ** 6), "no plain tensor"),
    ("model encoder.conv1.weight", torch.zeros(8, 3, 7, 6), "checkpoint's model does not fit"),
    ("discriminator all3.bias", torch.tensor([math.nan]), "discriminator.all3.bias holds NaN"),
    ("opt_E state 0 exp_avg", torch.zeros(3), "checkpoint's opt_E does not fit"),
    ("opt_E state", [], "not a run's checkpoint")], ids=lambda x: x if type(x) is str else "")
def test_a_forged_checkpoint_is_refused_by_name(checkpoint, tmp_path, capsys, keys, value,
                                                sentence):
    content = part = torch.load(checkpoint, weights_only=True)
    *path, last = (int(key) if key.isdecimal() else key for key in keys.split())
    for key in path:
        part = part[key]
    part[last] = value
    torch.save(content, tmp_path / "checkpoint.pt")
    assert train.main(["--resume", "--out", str(tmp_path), "--steps", "2"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1, error


def test_a_flipped_bit_and_a_bomb_are_refused(checkpoint, tmp_path, capsys):
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 64
    (tmp_path / "flipped.pt").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w") as archive:
        for name in ("data.pkl", "data/0", "data/1", "data/2"):
            archive.writestr(f"archive/{name}", b"")
            archive.infolist()[-1].file_size = 2 ** 32 - 2            # says the archive
    knot = functools.reduce(lambda knot, _: [knot, knot], range(40), [])    # 2^40 lists
    torch.save({"model": knot}, tmp_path / "knot.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    for name, sentence in (("flipped", "not a readable checkpoint"), ("bomb", "not a readable"),
                           ("knot", "not a checkpoint of this version"), ("pipe", "no plain file")):
        begun = time.monotonic()
        assert train.main(["--eval", str(tmp_path / f"{name}.pt")]) == 2
        assert sentence in capsys.readouterr().err and time.monotonic() - begun < 20, name


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


def test_a_body_file_that_moved_is_asked_for(tmp_path, monkeypatch, capsys):
    run, old, new = tmp_path / "run", tmp_path / "old.npz", tmp_path / "new.npz"
    old.write_bytes(OPEN_BODY.read_bytes())
    monkeypatch.setattr(train, "finish", lambda *args: {})
    train.train(tiny(run, steps=1, smpl=str(old)))
    old.rename(new)
    command = ["--resume", "--out", str(run), "--steps", "2", "--device", "cpu"]
    assert train.main(command) == 2
    assert "old.npz: no such file; expected a body file; give --smpl" in capsys.readouterr().err
    assert train.load(run / "checkpoint.pt", smpl=new)
    assert train.main([*command, "--smpl", str(new)]) == 0


def test_what_a_killed_run_left_is_kept_or_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "finish", lambda *args: {})
    (tmp_path / "log.csv").write_text("mine")
    assert train.main([*SHORT, "--steps", "1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "log.csv.old").read_text() == "mine", "a log without a checkpoint: whose?"
    (tmp_path / ".checkpoint.pt.12345").write_bytes(b"half of one")
    assert train.main(["--resume", "--steps", "2", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert not list(tmp_path.glob(".*")), "half a checkpoint is left lying about"
