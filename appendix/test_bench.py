"""The bench: what it times is what trains, and its textbook's body is SMPL."""

import contextlib
import re
import types

import pytest
import torch

import train
from appendix import bench
from appendix.test_train import Recording
from hmr import Discriminator
from smpl import SMPL, batch_rodrigues
from test_hmr import (body, close, precision_of_the_encoder,  # noqa: F401 (fixtures)
                      same_numbers_every_time, tiny, weights_of)


@pytest.mark.parametrize("record", [False, True])
def test_the_bench_times_the_loop_that_trains(tmp_path, body, monkeypatch, record):
    """The bench builds train()'s step up from its parts; its whole steps must leave its weights."""
    if record:
        Recording(monkeypatch)                  # a stand-in: three steps are ordinary
    config = tiny(tmp_path / "run", steps=5, dropout=0.5, weight_kp=3.0, weight_smpl=7.0, seed=3,
                  schedule="onecycle")
    monkeypatch.setattr(train, "finish", lambda *args: {})
    train.train(config)
    kept, build = [], train.build
    monkeypatch.setattr(train, "build", lambda *args: kept.append(build(*args)) or kept[-1])
    monkeypatch.setattr(bench, "Discriminator", lambda: kept.append(Discriminator()) or kept[-1])
    steps, ahead = bench.bench_steps(config, body)
    assert ahead == 1, "on a CPU each call of a stage is one step"
    assert list(steps) == [*bench.STAGES, *bench.RECORDED[:2 * record]], "no GPU, no recording"
    for _ in range(config.steps):
        steps[bench.RECORDED[1] if record else bench.STAGES[-1]]()
    trained = weights_of(tmp_path / "run")
    for name, timed in zip(("model", "discriminator"), kept):
        for key, value in timed.state_dict().items():
            assert torch.equal(value, trained[name][key]), f"{name}, {key}: bench, train() differ"


def test_the_parts_are_timed_counted_and_leave_no_run(tmp_path, monkeypatch, capsys):
    recording = Recording(monkeypatch)
    flags = ["--device", "cpu", "--depth", "18", "--width", "8", "--size", "33", "--batch", "4",
             "--out", str(tmp_path / "unused")]
    monkeypatch.setattr(bench, "count_calls", lambda step, device: step() and 7)
    assert bench.main(["step", "--rounds", "1", *flags]) == 0
    rows = capsys.readouterr().out.splitlines()[-7:]
    assert [row[:42].strip() for row in rows] == [*bench.STAGES, *bench.RECORDED], "a row is lost"
    assert {row.split()[-1] for row in rows} == {"7"}, "the last column is the count"
    # six calls for the time, one for the count; of each recording the first three are ordinary
    assert recording.launches == 2 * (7 - 3), "not launched, or recorded again"
    assert not (tmp_path / "unused").exists(), "a bench leaves no run behind"


def test_launches_and_operators_are_counted(monkeypatch):
    calls = bench.count_calls(lambda: torch.ones(2, 2).mm(torch.ones(2, 2)), "cpu")
    assert calls >= 3, f"{calls} operators, but ones, ones and mm were called"
    names = "cudaLaunchKernel cuLaunchKernelEx cudaGraphLaunch cudaMemcpyAsync aten::mm Launch"

    class Profile(contextlib.nullcontext):
        __init__ = lambda self, activities: super(Profile, self).__init__(self)
        events = lambda self: [types.SimpleNamespace(name=name) for name in names.split()]
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert bench.count_calls(lambda: None, "cuda") == 3, "kernels and graphs, and no copies"


def test_the_benchs_large_body_and_its_textbook_are_the_body():
    smpl = bench.with_vertices(SMPL(), 3000).double()
    betas, rotmats = torch.randn(3, 10).double(), batch_rodrigues(torch.randn(3, 24, 3).double())
    exact, inputs = SMPL().double()(betas, rotmats), [x.requires_grad_() for x in (betas, rotmats)]
    outputs = [smpl(*inputs), bench.textbook(smpl, smpl.posedirs.flatten(0, 1).T, *inputs)]
    close(outputs[0].keypoints, exact.keypoints, 1e-12, "keypoints are of the first layer of skin")
    close(outputs[0].vertices[:, 1229:2458], exact.vertices, 1e-12, "the second lies on the first")
    weights = [torch.randn_like(x) for x in outputs[0]]
    gradients = [torch.autograd.grad(out, inputs, weights) for out in outputs]
    for name, ours, its in zip(("vertices", "joints", "keypoints"), *outputs):
        close(its, ours, 1e-12, f"{name}: the bench times something else")
    for name, ours, its in zip(("betas", "rotmats"), *gradients):
        close(its / ours.abs().max(), ours / ours.abs().max(), 1e-12, f"gradient to {name}")


def test_the_bench_prints_every_row_and_reports_bad_input_in_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(bench, "with_vertices", lambda smpl, V: smpl)
    monkeypatch.setattr(bench, "bench_steps", lambda *_: (dict.fromkeys(bench.STAGES, int), 1))
    monkeypatch.setattr(bench, "in_turn", lambda ways, _: [way() or 1.0 for way in ways.values()])
    for arguments, count in ((["smpl"], 8), (["grow", "--small", "--device", "cpu"], 16)):
        assert bench.main([*arguments, "--rounds", "1"]) == 0
        rows = capsys.readouterr().out.splitlines()[-count:]
        assert all(re.fullmatch("( *[0-9a-z+]+){2,}( +[0-9.]+)+", row) for row in rows), rows
    for arguments, sentence in [
            (["step", "--rounds", "0"], "--rounds 0: expected 1 or more"),
            (["grow", "--small", "--no-adv"], "--adv"), (["smpl", "--batch", "4"], "smpl takes"),
            (["step", "--small", "--smpl", "absent.pkl", "--device", "cpu"], "absent.pkl")]:
        assert bench.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert sentence in error and error.startswith("appendix.bench: "), error
