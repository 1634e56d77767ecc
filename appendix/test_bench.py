"""The bench: what it times is what trains, and its textbook's body is SMPL."""

import contextlib
import re
from types import SimpleNamespace

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
    recording = Recording(monkeypatch) if record else None            # a stand-in
    config = tiny(tmp_path / "run", steps=5, dropout=0.5, weight_kp=3.0, weight_smpl=7.0, seed=3,
                  schedule="onecycle")
    monkeypatch.setattr(train, "finish", lambda *args: {})
    train.train(config)
    kept, build = [], train.build
    monkeypatch.setattr(train, "build", lambda *args: kept.append(build(*args)) or kept[-1])
    monkeypatch.setattr(bench, "Discriminator", lambda: kept.append(Discriminator()) or kept[-1])
    steps, ahead = bench.bench_steps(config, body)
    assert ahead == 1, "on a CPU each call of a stage is one step"
    assert len(steps) == 5 + 2 * record, "no GPU, no recording"
    for _ in range(config.steps):
        list(steps.values())[-1]()
    assert not record or recording.launches == 2 * (5 - 3), "train() and bench: three are ordinary"
    trained = weights_of(tmp_path / "run")
    for name, timed in zip(("model", "discriminator"), kept):
        for key, value in timed.state_dict().items():
            assert torch.equal(value, trained[name][key]), f"{name}, {key}: bench, train() differ"


def test_launches_and_operators_are_counted(monkeypatch):
    calls = bench.count_calls(lambda: torch.ones(2, 2).mm(torch.ones(2, 2)), 2, "cpu")
    assert calls >= 3, f"{calls} operators, but ones, ones and mm were called"
    names = "cudaLaunchKernel cuLaunchKernelEx cudaGraphLaunch cudaMemcpyAsync aten::mm Launch"
    seen = SimpleNamespace(events=lambda: [SimpleNamespace(name=name) for name in names.split()])
    monkeypatch.setattr(torch.profiler, "profile", lambda: contextlib.nullcontext(seen))
    assert bench.count_calls(lambda: None, 1, "cuda") == 3, "kernels and graphs, and no copies"


def test_the_benchs_large_body_and_its_textbook_are_the_body():
    smpl = bench.with_vertices(SMPL(), 3000).double()
    inputs = torch.randn(3, 10).double(), batch_rodrigues(torch.randn(3, 24, 3).double())
    exact, ours = SMPL().double()(*inputs), smpl(*inputs)
    close(ours.keypoints, exact.keypoints, 1e-12, "keypoints are of the first layer of skin")
    close(ours.vertices[:, 1229:2458], exact.vertices, 1e-12, "the second lies on the first")
    its = bench.textbook(smpl, smpl.posedirs.flatten(0, 1).T, *inputs)
    for name, a, b in zip(ours._fields, ours, its):
        close(b, a, 1e-12, f"{name}: the bench times something else")


def test_the_bench_prints_every_row_and_reports_bad_input_in_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(bench, "with_vertices", lambda smpl, V: smpl)
    monkeypatch.setattr(bench, "bench_steps", lambda *_: ({"encoder": int, "+ all": int}, 1))
    monkeypatch.setattr(bench, "in_turn", lambda ways, *_: [(way(), 1.0)[1] for way in ways])
    small = ["--small", "--device", "cpu", "--width", "8"]
    for arguments, count in ((["smpl"], 8), (["grow", *small], 16), (["step", *small], 4)):
        assert bench.main([*arguments, "--rounds", "1"]) == 0
        rows = capsys.readouterr().out.splitlines()[-count:]
        assert all(re.fullmatch(r".*[a-z]\b.*?( +[0-9.]+){2,}", row) for row in rows), rows
    for arguments, sentence in [
            (["step", "--rounds", "0"], "--rounds 0: expected 1 or more"),
            (["grow", "--small", "--no-adv"], "--adv"), (["smpl", "--batch", "4"], "smpl takes"),
            (["step", "--small", "--smpl", "absent.pkl", "--device", "cpu"], "absent.pkl")]:
        assert bench.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert sentence in error and error.startswith("appendix.bench: "), error
