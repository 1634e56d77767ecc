"""The bench: what it times is what trains, and its textbook's body is SMPL."""

import pytest
import torch

import train
from appendix import bench
from hmr import Discriminator
from smpl import SMPL, batch_rodrigues
from test_hmr import (body, close, precision_of_the_encoder,  # noqa: F401 (fixtures)
                      same_numbers_every_time, tiny, weights_of)


def test_the_bench_times_the_loop_that_trains(tmp_path, body, capsys, monkeypatch):
    """The bench builds train()'s step up from its parts; its last stage must leave its weights."""
    config = tiny(tmp_path / "run", steps=2, dropout=0.5, weight_kp=3.0, weight_smpl=7.0, seed=3,
                  schedule="onecycle")
    monkeypatch.setattr(train, "finish", lambda *args: {})
    train.train(config)
    kept, build = [], train.build
    monkeypatch.setattr(train, "build", lambda *args: kept.append(build(*args)) or kept[-1])
    monkeypatch.setattr(bench, "Discriminator", lambda: kept.append(Discriminator()) or kept[-1])
    steps, ahead = bench.bench_steps(config, body)
    assert ahead == 1, "on a CPU each call of a stage is one step"
    for _ in range(config.steps):
        steps[bench.STAGES[-1]]()
    trained = weights_of(tmp_path / "run")
    for name, timed in zip(("model", "discriminator"), kept):
        for key, value in timed.state_dict().items():
            assert torch.equal(value, trained[name][key]), f"{name}, {key}: bench, train() differ"
    capsys.readouterr()
    flags = ["--device", "cpu", "--depth", "18", "--width", "8", "--size", "33", "--batch", "4",
             "--out", str(tmp_path / "unused")]
    assert bench.main(["step", "--rounds", "1", *flags]) == 0
    table = capsys.readouterr().out
    assert all(stage in table for stage in bench.STAGES) and "medians of 1 rounds" in table
    assert table.count("inference") == 2 and bench.RECORDED not in table, "no GPU, no recording"
    assert not (tmp_path / "unused").exists(), "a bench leaves no run behind"


def test_what_is_compared_takes_turns_and_the_median_counts(monkeypatch):
    calls, times = [], iter([x for n in range(20) for x in (0.0, float(n))])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(times))
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    a, b = bench.in_turn(ways, 3)
    assert "".join(calls) == "aabb" * 5, "twice each, so that the second time counts"
    assert (a, b) == (13.0, 15.0), "the median of the last three of five rounds"


def test_the_growth_is_a_row_for_each_setting(monkeypatch, capsys):
    def no_steps(config, smpl):
        return dict.fromkeys(bench.STAGES, lambda: sizes.append(len(smpl.v_template))), 1
    sizes = []
    monkeypatch.setattr(bench, "bench_steps", no_steps)
    assert bench.main(["grow", "--small", "--device", "cpu", "--rounds", "2"]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-16:]]
    assert [value for name, value in rows if name == "batch"] == ["1", "4", "16", "64", "256"]
    assert {name for name, _ in rows} == {"batch", "size", "depth", "vertices"}
    # two calls in each of four rounds, of the first stage and the last
    assert sizes.count(6890) == 2 * 4 * 2 and sizes.count(1229) == 15 * 2 * 4 * 2


def test_the_benchs_large_body_is_the_body(body):
    large = bench.with_vertices(SMPL(), 6890)
    betas, pose = torch.randn(2, 10), 0.3 * torch.randn(2, 72)
    a, b, few = body(betas, pose), large(betas, pose), large(betas, pose, vertices=False)
    assert b.vertices.shape == (2, 6890, 3) and large.faces.shape == (5 * 2454, 3)
    # float32 sums over thousands of vertices: 10 micrometres
    close(b.keypoints, a.keypoints, 1e-5, "keypoints come from the first layer of skin")
    close(few.keypoints, a.keypoints, 1e-5, "and so do those of the keypoints-only body")
    close(b.vertices[:, 1229:2458], a.vertices, 1e-5, "the second layer lies on the first")


def test_the_benchs_textbook_is_smpl_in_value_and_gradient(tmp_path):
    bench.official_sized(tmp_path / "random.npz", V=400)
    smpl = SMPL(tmp_path / "random.npz").double()
    assert (smpl.weights > 0).sum(1).tolist() == [4] * 400, "as sparse as the official file"
    posedirs = smpl.posedirs.flatten(0, 1).T
    inputs = [torch.randn(3, 10).double(), batch_rodrigues(torch.randn(3, 24, 3).double())]
    inputs = [x.requires_grad_() for x in inputs]
    outputs = [smpl(*inputs), bench.textbook(smpl, posedirs, *inputs)]
    weights = [torch.randn_like(x) for x in outputs[0]]
    gradients = [torch.autograd.grad(out, inputs, weights) for out in outputs]
    for name, ours, its in zip(("vertices", "joints", "keypoints"), *outputs):
        close(its, ours, 1e-12, f"{name}: the bench times something else")
    for name, ours, its in zip(("betas", "rotmats"), *gradients):
        close(its / ours.abs().max(), ours / ours.abs().max(), 1e-12, f"gradient to {name}")


def test_the_bench_prints_every_way_and_reports_bad_input_in_a_sentence(capsys, monkeypatch):
    sized = bench.official_sized
    monkeypatch.setattr(bench, "official_sized", lambda path: sized(path, V=40))
    assert bench.main(["smpl", "--rounds", "1"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 8 and all(len(row.split()) in (7, 9) for row in rows), rows
    for arguments, sentence in [
            (["step", "--rounds", "0"], "--rounds 0: expected 1 or more"),
            (["step", "--small", "--steps", "5"], "counts --rounds"),
            (["grow", "--small", "--no-adv"], "--adv"), (["smpl", "--batch", "4"], "smpl takes"),
            (["step", "--small", "--smpl", "absent.pkl", "--device", "cpu"], "absent.pkl")]:
        assert bench.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert sentence in error and error.startswith("appendix.bench: "), error
        assert error.count("\n") == 1, error
    for arguments in ([], ["nice"], ["step", "--rounds", "few"], ["step", "--resume"]):
        with pytest.raises(SystemExit) as stop:
            bench.main(arguments)
        assert stop.value.code == 2, arguments
