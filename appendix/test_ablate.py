"""The ablations: variants that work together, runs that go on, tables and figures of the runs."""

import dataclasses
import json
import signal

import torch
from PIL import Image
from torch import nn

import data
import train
from appendix import ablate
from appendix.test_train import quick_guesses  # noqa: F401 (a fixture)
from test_hmr import (body, close, precision_of_the_encoder,  # noqa: F401 (fixtures)
                      same_numbers_every_time, tiny, weights_of)

TINY = ["--device", "cpu", "--size", "32", "--width", "8", "--batch", "4", "--steps", "2",
        "--eval-pictures", "4", "--log-every", "1"]


def test_the_whole_discriminator_is_as_large_and_weighs_as_much():
    D = ablate.WholeDiscriminator()
    count = sum(p.numel() for p in D.parameters())
    assert count == 1_807_702 and abs(count / 1_807_619 - 1) < 1e-3, "only the form may differ"
    R, betas = torch.randn(4, 23, 3, 3), torch.randn(4, 10)
    x = torch.cat([betas, R.reshape(4, 207)], 1)
    expected = D[4](D[2](D[0](x).relu()).relu())
    close(D(R, betas), expected.expand(4, 25), 1e-6, "two hidden layers, one opinion")


def test_the_ablation_goes_on_after_an_interruption(tmp_path, monkeypatch, capsys, quick_guesses):
    steps, batch = [], data.SyntheticPeople.batch
    command = ["paper", *TINY, "--variants", "paired+adv,whole", "--out", str(tmp_path)]
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)

    def noted(world, step):
        if world.batch_size == 4:                                     # training's, not evaluation's
            steps.append(step)
            if len(steps) == 4:
                signal.raise_signal(signal.SIGINT)
        return batch(world, step)
    monkeypatch.setattr(data.SyntheticPeople, "batch", noted)
    assert ablate.main(command) == 130 and "same command" in capsys.readouterr().err
    assert ablate.main(command) == 0
    assert steps == [0, 1, 0, 1, 1], "the interrupted step is made again, no other twice"
    assert "paired+adv, seed 0: run 1 of 2 is there" in capsys.readouterr().out
    weights = weights_of(tmp_path / "whole_seed0")["discriminator"]
    assert len(weights) == 6, "the variant's D must be the one that trains"
    assert weights["0.bias"].any(), "its biases start at 0: D has not learnt"

    rows, table = ((tmp_path / f"ablation.{kind}").read_text("utf-8") for kind in ("csv", "md"))
    for name in ("paired+adv", "whole"):
        metrics = tmp_path / f"{name}_seed0" / "metrics.json"
        values = [json.loads(metrics.read_text("utf-8"))[key] for key, _ in train.MEASURES]
        assert f"\n{name},0,iteration 3,{','.join(map(str, values))}," in rows
        assert f"\n| {name} | {' | '.join(f'{value:.1f}' for value in values)} |" in table
    for body in ("truth | 0.0", "Theta-bar", "mean pose, true heading"):
        assert f"\n| {body} |" in table, "the truth and the lazy guesses belong to the table"
    for picture, columns in (("ablation", 2), ("iterations", 5)):
        with Image.open(tmp_path / f"{picture}.png") as image:
            size = columns * ablate.PANEL, 6 * ablate.PANEL + 28
            assert image.size == size, "three people in two rows; input, a column each"

    metrics.write_text("{}", "utf-8")           # without its measures
    for flags, sentence in ((["--steps", "3"], "with --steps 2, not 3"), (["--no-adv"], "--adv"),
                            (["--variants", "adv,all"], "adv,all: expected"),
                            (["--seeds", "0"], "--seeds")):
        assert ablate.main([*command, *flags]) == 2, flags
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1, error
    assert ablate.main(command) == 0 and json.loads(metrics.read_text()), "it is measured again"
    assert len(steps) == 5, "a refused command trains nothing, a finished run no more"


def test_the_ablations_spread_is_over_seeds(tmp_path, monkeypatch):
    runs = {}
    for name, heads in (("paired", {}),         # without D
                        ("T=1", {"heads": {"real": [0.5, 0.7], "fake": [0.25, 0.25]}})):
        for seed, mpjpe in ((0, 100.0), (1, 110.0)):
            row = {key: mpjpe for key, _ in train.MEASURES}
            runs[name, seed] = heads | {
                "truth": row, **dict.fromkeys(train.GUESSES, row), "per_iteration": [row],
                "measured_on": "held-out clips", "seconds": 1.0, "device": "none", "torch": "0",
                "precision": "float32", "config": tiny(tmp_path, iterations=1)}
    monkeypatch.setattr(ablate, "draw_networks", lambda *_: None)
    text = ablate.ablation_report(tmp_path, runs)
    assert "(paired 0, 1; T=1 0, 1)" in text, "the footing names the seeds"
    cells, first = (cell * len(train.MEASURES) for cell in ("105.0 ± 7.1 | ", "100.0 | "))
    for row in (f"T=1 | {cells}0.60 ± 0.00 | 0.25 ± 0.00", f"paired | {cells} | ",
                f"Theta-bar | {first} | "):     # D has judged no other body than the last
        assert f"\n| {row} |\n" in text


def test_degradation_measures_four_networks(tmp_path, body, quick_guesses):
    assert ablate.main(["degradation", *TINY, "--variants", "plain-18", "--out",
                        str(tmp_path)]) == 0
    losses, layers = ((tmp_path / f"{name}.csv").read_text("utf-8").split()[1:]
                      for name in ("degradation", "responses"))
    assert [row[:12] for row in losses] == ["plain-18,0,1", "plain-18,0,2"], "log.csv's steps"
    assert len(layers) == 16, "18 layers less the first and the last are 3x3"
    text = (tmp_path / "degradation.md").read_text("utf-8")
    cells = text.split("| plain-18 | ")[1].split(" | ")
    assert cells[0] == f"{float(losses[1][13:]):.2f}", "loss of the last 10 % of the steps"
    config = train.Config(**weights_of(tmp_path / "plain-18_seed0")["config"])
    assert config.plain and not config.adv and config.depth == 18, "another variant's settings"
    (before, after), responses = ablate.probe(config)
    assert cells[2:4] == [f"{before:.4g}", f"{after:.4g}"], "its columns"
    assert 0 < before != after > 0, "a gradient that is 0, or that of the same weights"
    in_float32 = ablate.probe(dataclasses.replace(config, amp="off"))
    assert in_float32 == ([before, after], responses), "training's precision reached the probe"
    model, _, _ = train.load(tmp_path / "plain-18_seed0" / "checkpoint.pt", device="cpu")
    with torch.no_grad():
        image, e = next(train.evaluation_pictures(config, body)).image, model.encoder
        x = e.bn1(e.conv1((image - model.mean) / model.std)).relu()
        block = e.layer1[0]
        first = block.bn1(block.conv1(nn.functional.max_pool2d(x, 3, 2, 1)))
    # the same operations in another order: relative to a deviation of about 1
    close(responses[0], first.std(), 1e-4, "after BN, before ReLU, in eval mode, in float32")
    with Image.open(tmp_path / "degradation.png") as image:
        assert image.size == (2 * 440, 320), "two charts side by side"
