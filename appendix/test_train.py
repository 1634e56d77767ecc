"""train.py and data.py under stress: a recorded step, pictures drawn ahead, odd checkpoints.

The formulas are tested in test_hmr.py, whose fixtures and `close` are used here.
"""

import contextlib
import copy
import inspect
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

import data
import train
from data import SyntheticPeople
from hmr import HMR, Discriminator, Regressor
from smpl import SMPL
from test_hmr import (body, close, precision_of_the_encoder, same,  # noqa: F401 (fixtures)
                      same_numbers_every_time, tiny, weights_of)

HERE = Path(__file__).resolve().parent.parent
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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
        adam, init = train.adam, train.RecordedStep.__init__

        class Graph:
            def replay(self):
                made.launches += 1
                step, batch = made.steps[-1], data.Batch(*made.steps[-1].tensors[:9])
                losses = step.step(batch, step.tensors[9:] or None)
                for mine, new in zip(step.losses, losses):
                    mine.copy_(new)

        @contextlib.contextmanager
        def record(graph, stream, capture_error_mode):
            assert stream is made.steps[-1].stream, "recorded on another stream than the first steps"
            made.mode, names = capture_error_mode, ("E", "wrapped_D", "opt_E", "opt_D")
            parts = [inspect.getclosurevars(made.steps[-1].step).nonlocals[name] for name in names]
            before, numbers = [copy.deepcopy(part.state_dict()) for part in parts], \
                torch.get_rng_state()
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


@pytest.mark.parametrize("changes", [{}, {"adv": False}, {"iterations": 1}, {"overfit": True}])
def test_a_recorded_run_is_the_plain_run(changes, tmp_path, monkeypatch):
    recording = Recording(monkeypatch)
    plain, weights = run(tmp_path / "plain", monkeypatch, record=False, **changes)
    assert recording.launches == 0
    recorded, others = run(tmp_path / "recorded", monkeypatch, **changes)
    assert recording.launches == 9, "steps 0 to 2 are ordinary, each later one is one launch"
    assert recording.mode == "thread_local", "a thread that loads photographs may call CUDA"
    assert [step for step, _ in recorded] == list(range(12)), "a step lost, or made twice"
    for (step, a), (_, b) in zip(plain, recorded):
        assert a == b, f"step {step}: another step's batch, rate or losses"
    for key in ("model", "discriminator", "opt_E", "opt_D"):
        assert same(weights[key], others[key]), f"{key} differs after 12 steps"


def test_the_rate_of_a_recorded_step_is_filled_not_replaced():
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], torch.tensor(0.5))
    rate = optimizer.param_groups[0]["lr"]
    train.set_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate and rate == 0.25, "the recording holds its address"
    plain = torch.optim.Adam([torch.zeros(1, requires_grad=True)], 0.5)
    train.set_rate(plain, 0.25)
    assert plain.param_groups[0]["lr"] == 0.25


def test_a_step_that_cannot_be_recorded_names_the_way_out(tmp_path, monkeypatch, capsys):
    Recording(monkeypatch)

    @contextlib.contextmanager
    def old_driver(*args, **options):
        raise RuntimeError("CUDA error: operation not supported")
        yield
    monkeypatch.setattr(torch.cuda, "graph", old_driver)
    assert train.main([*SHORT, "--steps", "5", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "cannot be recorded (CUDA error: operation not supported); give --no-record" in error
    assert train.main(["--resume", "--no-record", "--out", str(tmp_path / "run")]) == 0


def test_a_checkpoint_is_the_same_whether_its_steps_were_recorded_or_not(tmp_path, body):
    """A state made by hand: a rate that is a tensor and `capturable` neither reach the file nor
    come back from it."""
    def parts(**how):
        torch.manual_seed(0)
        model, D = HMR(body, 18, width=8), Discriminator()
        optimizers = [torch.optim.Adam(net.parameters(), **how, fused=True) for net in (model, D)]
        return dict(zip(("model", "discriminator", "opt_E", "opt_D"), (model, D, *optimizers)))

    def save(folder, parts):
        for name in ("opt_E", "opt_D"):
            for p in parts[name].param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            parts[name].step()
        train.save(parts, 1, 0.0, tiny(tmp_path / folder), "drawn people")
        return train.load_checkpoint(tmp_path / folder / "checkpoint.pt")
    recorded, plain = parts(lr=torch.tensor(1e-3)), parts(lr=1e-3)
    a, b = save("recorded", recorded), save("plain", plain)
    assert a["opt_E"].keys() == {"state"}, "an optimiser's settings are the config's"
    for key in ("model", "opt_E", "opt_D"):
        assert same(a[key], b[key]), key
    for fresh, rate in ((parts(lr=torch.tensor(0.5)), torch.tensor(0.5)), (parts(lr=0.5), 0.5)):
        fresh["opt_E"].param_groups[0]["capturable"] = "mine"
        train.restore(a, fresh)
        group = fresh["opt_E"].param_groups[0]
        assert group["lr"] == rate and type(group["lr"]) is type(rate) and (
            group["capturable"] == "mine"), "settings come from the command, not from the file"
        assert same(fresh["opt_E"].state_dict()["state"], a["opt_E"]["state"])


@gpu
def test_a_recorded_run_has_the_losses_of_an_ordinary_one(tmp_path, monkeypatch):
    """float32, the same stored batches: a recorded step 4 is the ordinary step 4."""
    body = SMPL().cuda()
    world = SyntheticPeople(body, data.load_mocap(True, False), 16, 32)
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
    flags = ["--small", "--width", "8", "--batch", "4", "--size", "32", "--eval-pictures", "2",
             "--log-every", "2", "--schedule", "constant", "--out", out]
    assert train.main([*flags, "--steps", "8"]) == 0
    for device, steps in (("cuda", "14"), ("cpu", "16"), ("cuda", "22")):
        assert train.main(["--resume", "--out", out, "--steps", steps, "--device", device]) == 0
    rows = (tmp_path / "run" / "log.csv").read_text(encoding="utf-8").split()
    assert [int(row.split(",")[0]) for row in rows[1:]] == list(range(2, 23, 2))
    assert weights_of(tmp_path / "run")["opt_E"]["state"][0]["step"] == 22


@gpu
def test_a_recorded_dropout_heeds_the_seed_of_each_launch():
    regressor = Regressor(7, torch.zeros(1, 85)).cuda().train()
    feature = torch.randn(3, 7, device="cuda")
    step = train.RecordedStep(lambda batch, motion: train.Losses(
        *[regressor(batch.image)[-1].detach()] * 9))
    batch = data.Batch(*[feature] * 9)
    outputs = {}
    for launch, seed in enumerate([0, 1, 2, 7, 8, 7]):
        torch.manual_seed(seed)
        outputs[launch] = step(batch, None)[0].clone()
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
        assert not torch.equal(in_order[a][1][0], in_order[b][1][0])
    for batch, _ in in_order:
        assert batch.image.shape == (5, 3, 16, 16) and batch.has_smpl.tolist() == [1, 0, 1, 0, 1], \
            "half of EVERY batch has 3D labels"


@gpu
def test_a_gpu_draws_eight_steps_at_once_and_every_batch_is_labelled():
    world = SyntheticPeople(SMPL().cuda(), data.load_mocap(True, False), 6, 32)
    assert world.ahead == 8
    batches = [world.batch(step) for step in range(10)]
    assert all(batch.has_smpl.tolist() == [1, 0, 1, 0, 1, 0] for batch in batches)
    assert not torch.equal(batches[7].image, batches[8].image)


# ============================================================================================
# Checkpoints of others, unlucky runs

SHORT = ["--small", "--width", "8", "--batch", "2", "--size", "32", "--eval-pictures", "1",
         "--log-every", "1", "--schedule", "constant", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train.train(tiny(folder / "run", steps=1))
    return folder / "run" / "checkpoint.pt"


def forge(content: dict, keys: list, value) -> None:
    *path, last = keys
    for key in path:
        content = content[key]
    content[last] = value


@pytest.mark.parametrize("keys, value, sentence", [
    (["config", "amp"], "foo", "--amp foo: expected one of"),
    (["config", "width"], 0, "--width 0: expected 8 or more"),
    (["config", "lr"], math.nan, "--lr nan"),
    (["config", "plain"], 7, "--plain 7: expected a value such as False"),
    (["config", "smpl"], 5, "--smpl 5"), (["config"], None, "not a checkpoint"),
    (["body"], None, "not a checkpoint"), (["step"], 2.5, "not a checkpoint"),
    (["model", "encoder.conv1.weight"], torch.zeros(8, 3, 7, 7).to_sparse(), "no plain tensor"),
    (["model", "encoder.conv1.weight"], torch.zeros(8, 3, 7, 7, device="meta"), "no plain tensor"),
    (["model", "encoder.conv1.weight"], torch.zeros(1).expand(10 ** 6, 10 ** 6), "no plain tensor"),
    (["model", "encoder.conv1.weight"], torch.zeros(8, 3, 7, 6), "checkpoint's model does not fit"),
    (["opt_E", "state", 0, "exp_avg"], torch.zeros(3), "checkpoint's opt_E does not fit"),
    (["opt_E", "state", 0, "exp_avg_sq"], None, "checkpoint's opt_E does not fit"),
    (["opt_E", "state"], [], "not a run's checkpoint")],
    ids=lambda x: ".".join(map(str, x)) if isinstance(x, list) else "")
def test_a_forged_checkpoint_is_refused_by_name(checkpoint, tmp_path, keys, value, sentence, capsys):
    content = torch.load(checkpoint, weights_only=True)
    forge(content, keys, value)
    torch.save(content, tmp_path / "checkpoint.pt")
    assert train.main(["--resume", "--out", str(tmp_path), "--steps", "2"]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error) and error.count("\n") == 1, error


def test_a_flipped_bit_and_a_bomb_are_refused(checkpoint, tmp_path, capsys):
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 64
    (tmp_path / "flipped.pt").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.infolist()[0].file_size = 2 ** 32 - 2
        for n in range(3):
            archive.writestr(f"archive/data/{n}", b"")
            archive.infolist()[-1].file_size = 2 ** 32 - 2
    knot = []
    for _ in range(40):
        knot = [knot, knot]                     # 2^40 lists for whoever visits them all
    torch.save({"model": knot}, tmp_path / "knot.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    for name, sentence in (("flipped", "not a readable checkpoint"), ("bomb", "not a readable"),
                           ("knot", "not a checkpoint of this version"), ("pipe", "no plain file")):
        begun = time.monotonic()
        assert train.main(["--eval", str(tmp_path / f"{name}.pt")]) == 2
        assert sentence in capsys.readouterr().err and time.monotonic() - begun < 20, name


def test_two_fresh_runs_do_not_share_a_folder(tmp_path, monkeypatch, capsys):
    """The folder is claimed by the checkpoint of step 0, which one of two programs can make."""
    out, save = tmp_path / "run", train.save

    def other_first(parts, step, *rest):
        if step == 0 and not (out / "checkpoint.pt").exists():
            save(parts, step, *rest)            # another program's, a moment ago
        return save(parts, step, *rest)
    monkeypatch.setattr(train, "save", other_first)
    assert train.main([*SHORT, "--steps", "1", "--out", str(out)]) == 2
    assert "checkpoint.pt: cannot be written (File exists)" in capsys.readouterr().err
    assert weights_of(out)["step"] == 0 and not list(out.glob(".*")), "the first run's stays"


def test_a_log_without_a_checkpoint_is_of_no_run_and_is_kept(tmp_path):
    (tmp_path / "log.csv").write_text("mine")
    (tmp_path / ".checkpoint.pt.12345").write_bytes(b"left by a killed process")
    assert train.main([*SHORT, "--steps", "1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "log.csv.old").read_text() == "mine"
    assert train.main(["--resume", "--steps", "2", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert not list(tmp_path.glob(".*")), "what a killed process left is swept"


def test_bad_settings_leave_no_folder_behind(tmp_path, capsys):
    for flags in (["--smpl", "absent.pkl"], ["--validate", "kick"], ["--pretrained", "absent.pt"]):
        assert train.main([*SHORT, *flags, "--out", str(tmp_path / "run")]) == 2
        assert not (tmp_path / "run").exists(), flags
    with pytest.raises(ValueError, match="--schedule foo: expected one of"):
        train.train(tiny(tmp_path / "run", schedule="foo"))


def test_a_killed_run_goes_on_to_the_same_end(tmp_path):
    """SIGKILL, which no program can handle, somewhere in the middle.

    Each run is a process of one thread: the order of a sum depends on the number of threads.
    """
    program = "import train, sys; train.SAVE_SECONDS = 0; sys.exit(train.main(sys.argv[1:]))"

    def start(*flags: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", program, *flags], cwd=HERE,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
    flags = [*SHORT, "--seed", "3", "--steps", "20", "--out"]
    whole, killed = start(*flags, str(tmp_path / "whole")), start(*flags, str(tmp_path / "killed"))
    for line in killed.stdout:
        if line.split()[:1] == [b"9"]:
            break
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    again = start("--resume", "--out", str(tmp_path / "killed"), "--device", "cpu")
    for process in (whole, again):
        process.communicate()
        assert process.returncode == 0
    a, b = (weights_of(tmp_path / name) for name in ("whole", "killed"))
    assert b["step"] == 20
    for key in ("model", "discriminator", "opt_E", "opt_D"):
        assert same(a[key], b[key]), f"{key} differs from the uninterrupted run's"
    logs = [[row.split(",")[:10] for row in (tmp_path / name / "log.csv").read_text().split()]
            for name in ("whole", "killed")]
    assert logs[0] == logs[1], "log.csv ends as an uninterrupted run's, but for its timings"
