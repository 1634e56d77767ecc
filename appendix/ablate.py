"""The paper's claims and the slides' degradation, seen: the same training, once for every variant.

    python -m appendix.ablate paper --steps 2000 --seeds 2     # six variants, runs/ablation
    python -m appendix.ablate degradation --seeds 2            # four networks, runs/degradation

Both commands imply --small and take train.py's flags.  A finished run is not trained again, and an
interrupted one goes on.  Tables and figures are of all finished runs in the folder, earlier
commands' included.

Axes:  B pictures   K keypoints   H = W pixels   T iterations   N = B * T
"""

import argparse
import csv
import dataclasses
import io
import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as vision

import train
from data import Batch, draw_mesh, save_png, side_view
from hmr import LSP, Discriminator, mixed_precision
from smpl import SMPL, exit_status, say, write_atomically
from train import GUESSES, MEASURES, Config, evaluation_pictures, flag, load_checkpoint, make_config

# What each variant changes of train.py's defaults and --small's.  paper: Sec. 3.2 (T), Sec. 3.3
# (one discriminator or 25), Figs. 4 and 5 (3D labels, adversary).
PAPER = {"paired+adv": {}, "adv": {"paired": False}, "paired": {"adv": False},
         "neither": {"paired": False, "adv": False}, "T=1": {"iterations": 1}, "whole": {}}
FIGURE = {"paired+adv": "paired 3D + adversary", "adv": "adversary only (Fig. 4)",
          "paired": "paired 3D only", "neither": "neither (Fig. 5)"}
# degradation: no adversary, so that all four networks minimise one and the same loss
NETWORKS = {f"{kind}-{depth}": {"plain": kind == "plain", "depth": depth, "adv": False}
            for kind in ("plain", "ResNet") for depth in (18, 34)}
PANEL = 176                                     # pixels: five panels are as wide as a README


class WholeDiscriminator(nn.Sequential):
    """What Sec. 3.3 advises against: ONE network on shape and pose, inputs as `Discriminator`'s.

    217 -> 1239 -> 1239 -> 1 has as many parameters as the 25, within 0.005 %.  Its one opinion
    counts 25 times, (N, 25), so that L_adv's weight and D's rate mean the same for both forms.
    """

    def __init__(self):
        super().__init__(nn.Linear(10 + 23 * 9, 1239), nn.ReLU(), nn.Linear(1239, 1239), nn.ReLU(),
                         nn.Linear(1239, 1))
        self.amp = None                         # as `Discriminator`'s; train() sets it
        for layer in list(self)[::2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, rotmats: Tensor, betas: Tensor) -> Tensor:
        with mixed_precision(betas.device, self.amp):
            opinion = super().forward(torch.cat([betas, rotmats.flatten(1)], 1))  # (N, 1)
        return opinion.float().expand(-1, 25)                         # (N, 25)


# --------------------------------------------------------------------------------------------
# The runs.  A run is a (variant, seed)

def experiment(given: dict, args: argparse.Namespace) -> None:
    """Train what is not trained yet, then make tables and figures.  Raises ValueError for options
    that do not fit each other or an earlier run in the folder."""
    kind, variants, report = ("ablation", PAPER, ablation_report) if args.kind == "paper" else (
        "degradation", NETWORKS, degradation_report)
    names = list(variants) if args.variants is None else args.variants.split(",")
    if set(names) - set(variants):
        raise ValueError(f"--variants {args.variants}: expected some of {', '.join(variants)}")
    for name in set(given) & set().union(*variants.values()):
        raise ValueError(f"{flag(name)}: the variants differ in it or need it; leave it out")
    if not 1 <= args.seeds <= 1000 or torch.distributed.is_torchelastic_launched():
        raise ValueError("--seeds: expected 1 to 1000, in one process (without torchrun)")
    preset = train.small_preset(given)
    if kind == "degradation":
        on_cpu = preset["steps"] == train.SMALL_CPU["steps"]
        changes = {"log_every": 10, "steps": 600 if on_cpu else 4_000}
        say(f"degradation changes: {', '.join(f'{k} {v}' for k, v in changes.items())}")
        preset |= changes
    out, first = Path(given.get("out", f"runs/{kind}")), given.get("seed", 0)

    def earlier(name: str, seed: int) -> tuple[Config, dict | None, dict | None]:
        config = make_config(given | {"seed": seed, "out": str(out / f"{name}_seed{seed}")},
                             preset | variants[name])
        return config, *earlier_part(config)

    def finished() -> list[tuple[str, int]]:    # earlier commands', too, in the variants' order
        found = [path.parent.name.rpartition("_seed") for path in out.glob("*/metrics.json")]
        return [(name, seed) for name in variants for seed in sorted(
            int(end) for start, _, end in found if start == name and end.isdecimal())]
    wanted = [(name, seed) for seed in range(first, first + args.seeds) for name in names]
    for run in [*wanted, *finished()]:
        earlier(*run)                           # it raises, better now than after some runs
    for n, (name, seed) in enumerate(wanted, 1):
        config, metrics, checkpoint = earlier(name, seed)
        say(f"\n{name}, seed {seed}: run {n} of {len(wanted)}" + " is there" * bool(metrics))
        make_D = WholeDiscriminator if name == "whole" else Discriminator
        try:
            metrics or train.train(config, checkpoint, make_D=make_D)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on where it was") from None
    text = report(out, {run: metrics for run in finished() if (metrics := earlier(*run)[1])})
    write_atomically(out / f"{kind}.md", text.encode())
    say(f"\n{text}\nwritten to {out}")


def earlier_part(config: Config) -> tuple[dict | None, dict | None]:
    """A run's folder -> its metrics, with today's "config", if it is finished, else its checkpoint.

    Raises ValueError for a run of other settings.
    """
    folder = Path(config.out)
    if not (folder / "checkpoint.pt").is_file():
        return None, None
    try:
        metrics, checkpoint = json.loads((folder / "metrics.json").read_text("utf-8")), None
        then, _ = dict(metrics["config"]), [metrics[key] for key in (
            *GUESSES, "per_iteration", "truth", "seconds")]
        metrics["config"] = config
    except (OSError, ValueError, KeyError, TypeError):                # it is measured again
        metrics, checkpoint = None, load_checkpoint(folder / "checkpoint.pt", config.smpl)
        then = checkpoint["config"]
    for name, new in dataclasses.asdict(config).items():
        free = name in ("device", "out", "log_every", "picture_every", "record")
        if not free and then.get(name) != new:
            raise ValueError(f"--out {folder.parent}: {folder.name} was trained with {flag(name)} "
                             f"{then.get(name)}, not {new}; give that or name another folder")
    return metrics, checkpoint


# --------------------------------------------------------------------------------------------
# The tables.  runs: (variant, seed) -> what `earlier_part` returns of a finished run

def table(what: str, runs: dict, columns: dict, rows: dict) -> str:
    """A markdown table under a line that says what its numbers are of.

    columns: title -> format; rows: title -> a list of numbers for each seed, of which NaN leaves
    the cell empty.
    """
    def cell(values: tuple, form: str) -> str:
        if math.isnan(values[0]):
            return ""
        spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}" + spread
    m = next(iter(runs.values()))
    c, names = m["config"], dict.fromkeys(name for name, _ in runs)
    seeds = (f"{name} {', '.join(str(seed) for of, seed in runs if of == name)}" for name in names)
    where = {f"{m['precision']}, {m['device']}, torch {m['torch']}" for m in runs.values()}
    lines = [["", *columns], ["---"] * (len(columns) + 1)] + [
        [title, *map(cell, zip(*of_seeds), columns.values())] for title, of_seeds in rows.items()]
    return (f"{what}, measured on {m['measured_on']}: {c.steps:,} steps of {c.batch} pictures of "
            f"{c.size} px, {c.crop} crop, networks of width {c.width}, trained in "
            f"{'; '.join(sorted(where))}; mean ± sample standard deviation over seeds "
            f"({'; '.join(seeds)}).\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))


def write_csv(path: Path, rows: list) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    write_atomically(path, file.getvalue().encode())


def ablation_report(out: Path, runs: dict) -> str:
    """ablation.csv: a row for every run and body, which is a lazy guess, an iteration or the truth.
    ablation.png, iterations.png: what networks of the first seed see.  Returns a table of variants,
    iterations and bodies."""
    rows = [["variant", "seed", "body", *dict(MEASURES), "D_real", "D_fake", "seconds"]]
    of = {}                                     # (variant, body) -> a list for each seed
    for (name, seed), metrics in runs.items():
        bodies = {title: metrics[key] for key, title in GUESSES.items()}
        bodies |= {f"iteration {t}": row for t, row in enumerate(metrics["per_iteration"], 1)}
        last = list(bodies)[-1]                 # D has judged no other body, and none without adv
        for body, measures in (bodies | {"truth": metrics["truth"]}).items():
            heads = metrics.get("heads", {}) if body == last else {}
            values = [measures[key] for key, _ in MEASURES]
            values += [statistics.mean(heads.get(side, [math.nan])) for side in ("real", "fake")]
            rows.append([name, seed, body, *values, metrics["seconds"]])
            of.setdefault((name, body), []).append(values)
    write_csv(out / "ablation.csv", rows)
    configs = {name: metrics["config"] for (name, _), metrics in reversed(runs.items())}
    draw_networks(out, configs)
    one = next(iter(configs))                   # guesses and truth are the same for all
    shown = {title: of[one, title][:1] for title in GUESSES.values()}
    shown |= {name: of[name, f"iteration {configs[name].iterations}"] for name, _ in runs}
    shown |= {f"{name}, {body}": values for (name, body), values in of.items()
              if name == "paired+adv" and body.startswith("iteration")}
    shown |= {"truth": of[one, "truth"][:1]}
    columns = {title: ".1f" for _, title in MEASURES} | {"D on real": ".2f", "D on fake": ".2f"}
    return table("Ablation", runs, columns, shown)


@torch.no_grad()
def draw_networks(out: Path, configs: dict[str, Config]) -> None:
    """Three held-out pictures, at regular intervals, as each variant and iteration sees them."""
    config, bodies = next(iter(configs.values())), {}
    smpl = SMPL(config.smpl or None).to(config.device)
    # the same people twice: as the networks see them, and large enough to draw on
    seen, sharp = (Batch(*(part[::22] for part in next(evaluation_pictures(dataclasses.replace(
        config, size=size, eval_pictures=64), smpl)))) for size in (config.size, PANEL))
    for name in (name for name in FIGURE if name in configs):
        model, _, _ = train.load(f"{configs[name].out}/checkpoint.pt", config.smpl, config.device)
        thetas = model.regressor.theta_bar.expand(len(seen.image), -1), *model(seen.image)[0]
        bodies[name] = [model.decode(theta, vertices=True) for theta in thetas]
    iterations = {f"iteration {t}" if t else "Theta-bar": body
                  for t, body in enumerate(bodies.get("paired+adv", []))}
    for file, columns in (("iterations", iterations),
                          ("ablation", {FIGURE[name]: of[-1] for name, of in bodies.items()})):
        if columns:
            save_png(out / f"{file}.png", compare(seen, sharp, columns, smpl.faces))


def compare(seen: Batch, sharp: Batch, columns: dict, faces: Tensor) -> Tensor:
    """Two rows a picture: the input, then each column's body over it, and turned by 90 degrees.

    seen: what the network saw; sharp: the same people, to draw over; columns: title -> HMROutput.
    White circles are the true keypoints, red discs the predicted ones.
    """
    parts = [F.pad(F.interpolate(seen.image, (PANEL, PANEL)), (0, 0, 0, PANEL), value=1.0)]
    for body in columns.values():               # each part is (B, 3, 2H, H)
        overlay = draw_mesh(body.vertices, faces, body.cam, PANEL, sharp.image)   # (B, 3, H, H)
        true, predicted = sharp.keypoints2d[:, :LSP], body.keypoints2d[:, :LSP]   # (B, 14, 2)
        overlay = draw_points(overlay, true, (0, 0, 0), 5.5, filled=False)    # seen on any ground
        overlay = draw_points(overlay, true, (1, 1, 1), 4.5, filled=False)
        overlay = draw_points(draw_points(overlay, predicted, (0, 0, 0), 3.2), predicted)
        turned = draw_mesh(side_view(body.vertices), faces, body.cam, PANEL)      # (B, 3, H, H)
        parts.append(torch.cat([overlay, turned], 2))
    head = Image.new("RGB", (len(parts) * PANEL, 28), "white")
    for i, title in enumerate(["input", *columns]):
        ImageDraw.Draw(head).text(((i + 0.5) * PANEL, 14), title, "black",
                                  ImageFont.load_default(14), anchor="mm")
    return torch.cat([vision.pil_to_tensor(head) / 255, *torch.cat(parts, 3).cpu()], 1)  # (3, H, W)


def draw_points(image: Tensor, keypoints2d: Tensor, color=(1.0, 0.2, 0.2), radius: float = 2,
                filled: bool = True) -> Tensor:
    """Discs, or circles if not filled, at keypoints2d (.., K, 2) in [-1, 1] on (.., 3, H, W)."""
    size = image.shape[-1]
    p = torch.arange(size, device=image.device) + 0.5                 # (W,)
    for point in ((keypoints2d + 1) * size / 2).unbind(-2):           # (.., 2)
        x, y = point[..., None, None].unbind(-3)                      # (.., 1, 1)
        distance = ((p - x) ** 2 + (p[:, None] - y) ** 2).sqrt()      # (.., H, W)
        mask = distance <= radius if filled else (distance - radius).abs() <= 0.8
        image = torch.where(mask.unsqueeze(-3), image.new_tensor(color)[:, None, None], image)
    return image


# --------------------------------------------------------------------------------------------
# Degradation

def probe(config: Config) -> tuple[list[float], list[float]]:
    """A finished run -> gradient norms at the first layer before and after training, responses.

    The gradient is that of the loss on one batch that training did not see.  A response is the
    standard deviation of a 3x3 layer's output after BN, before ReLU and addition, on held-out
    pictures (He et al., Fig. 7).
    """
    torch.manual_seed(config.seed)              # as `train` begins
    fresh = train.build(config, SMPL(config.smpl or None).to(config.device))
    fresh.amp = None                            # networks are compared in one precision: float32
    trained, _, _ = train.load(f"{config.out}/checkpoint.pt", config.smpl, config.device)
    norms, responses, batch = [], [], train.training_world(config, fresh.smpl).batch(config.steps)
    hooks = [layer.register_forward_hook(lambda _, i, y: responses.append(y.std().item()))
             for name, layer in trained.encoder.named_modules()
             if name.startswith("layer") and name.endswith(("bn1", "bn2"))]
    with torch.no_grad():
        trained(next(evaluation_pictures(config, trained.smpl)).image)
    for model in (fresh, trained):
        still = torch.optim.SGD(model.parameters(), 0.0)              # a step of length 0
        train.train_step(model.train(), None, still, None, batch, None, config)   # adv is off
        norms.append(model.encoder.conv1.weight.grad.norm().item())
    return norms, responses[:len(hooks)]        # not those of the last step


def degradation_report(out: Path, runs: dict) -> str:
    """degradation.csv: training losses.  responses.csv: responses by layer.  degradation.png: both
    by step and layer; thin is plain, bold residual.  Returns a table of means and gradients."""
    losses, layers, rows = [], [], {}
    for (name, seed), metrics in runs.items():
        config = metrics["config"]
        with open(Path(config.out) / "log.csv", encoding="utf-8") as file:
            curve = [(int(row["step"]), float(row["loss_E"])) for row in csv.DictReader(file)]
        gradients, responses = probe(config)
        losses += [(name, seed, *point) for point in curve]
        layers += [(name, seed, *point) for point in enumerate(responses, 1)]
        end = statistics.mean(loss for step, loss in curve if step > 0.9 * config.steps)
        rows.setdefault(name, []).append([end, metrics["mpjpe"], *gradients,
                                          statistics.mean(responses)])
    write_csv(out / "degradation.csv", [("network", "seed", "step", "loss"), *losses])
    write_csv(out / "responses.csv", [("network", "seed", "layer", "response_std"), *layers])
    later = [point for point in losses if point[2] > 0.05 * config.steps]       # the first are huge
    save_png(out / "degradation.png", torch.cat([
        draw_chart("training loss, by step", later),
        draw_chart("std of the 3x3 layers' responses, by layer", layers)], 2))
    columns = {"training loss, last 10 %": ".2f", "MPJPE mm": ".1f", "gradient norm at conv1, "
               "before": ".4g", "after training": ".4g", "std of 3x3 layers' responses": ".3f"}
    return table("Degradation", runs, columns, rows)


def draw_chart(title: str, points: list[tuple]) -> Tensor:
    """points (network, seed, x, y), of which the mean over seeds is drawn -> (3, 320, 440)."""
    seeds, lines = {}, {}
    for name, _, x, y in points:
        seeds.setdefault((name, x), []).append(y)
    for (name, x), ys in seeds.items():
        lines.setdefault(name, []).append((x, statistics.mean(ys)))
    drawn = np.concatenate(list(lines.values()))                      # (points, 2)
    low, span = drawn.min(0), np.ptp(drawn, 0) + 1e-9                 # one point has no span
    sheet = Image.new("RGB", (880, 640), "white")                     # twice the result's pixels
    draw = ImageDraw.Draw(sheet)
    draw.font = ImageFont.load_default(26)
    draw.text((440, 30), title, "black", ImageFont.load_default(30), anchor="mm")
    for part in np.linspace(0, 1, 5):                                 # a grid
        (x, y), (across, down) = low + part * span, (110 + 740 * part, 590 - 490 * part)
        draw.line([across, 590, across, 100], "#dddddd", 2)
        draw.line([110, down, 850, down], "#dddddd", 2)
        draw.text((across, 616), f"{x:.4g}", "black", anchor="mm")
        draw.text((100, down), f"{y:.3g}", "black", anchor="rm")
    for i, (name, line) in enumerate(lines.items()):
        style = "#c0392b" if "34" in name else "#2471a3", 2 if "plain" in name else 6
        places = (110, 590) + (line - low) / span * (740, -490)       # (points of the line, 2)
        draw.line(places.flatten().tolist(), *style, joint="curve")
        draw.line([110 + 190 * i, 74, 150 + 190 * i, 74], *style)     # the legend
        draw.text((160 + 190 * i, 74), name, "black", anchor="lm")
    return vision.pil_to_tensor(sheet.reduce(2)) / 255                # (3, 320, 440)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m appendix.ablate", allow_abbrev=False,
                                     description="Train and compare variants of --small.")
    parser.add_argument("kind", choices=("paper", "degradation"),
                        help=f"paper: {', '.join(PAPER)}; degradation: {', '.join(NETWORKS)}")
    parser.add_argument("--variants", metavar="A,B,..", help="variants to train [all]")
    parser.add_argument("--seeds", metavar="N", type=int, default=1,
                        help="number of seeds, from --seed on [1]")
    given, args = train.parse(parser, argv)
    return exit_status("appendix.ablate", lambda: experiment(given, args))


if __name__ == "__main__":
    sys.exit(main())
