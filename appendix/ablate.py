"""The paper's claims and the slides' degradation, seen: the same training, once for every variant.

    python -m appendix.ablate paper --steps 2000 --seeds 2     # six variants, runs/ablation
    python -m appendix.ablate degradation --seeds 2            # four networks, runs/degradation

Both commands imply --small and take train.py's flags.  Each run has a folder of its own.  A
finished run is not trained again, and an interrupted one goes on, so that the same command can be
given until all are done.  The tables and figures are then made of all finished runs in the folder,
earlier commands' included.  (Text in figures is set by Pillow, which comes with torchvision.)

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

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as vision

import train
from data import draw_mesh, save_png, side_view
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
DEGRADATION, DEGRADATION_CPU = (dict(log_every=10, steps=steps) for steps in (4_000, 600))
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
# The runs

def experiment(given: dict, args: argparse.Namespace) -> None:
    """Train what is not trained yet, one run after another, then make tables and figures.

    Raises ValueError for options that do not fit each other or an earlier run in the folder.
    """
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
        changes = DEGRADATION_CPU if preset["steps"] == train.SMALL_CPU["steps"] else DEGRADATION
        say(f"degradation changes: {', '.join(f'{k} {v}' for k, v in changes.items())}")
        preset |= changes
    out, first = Path(given.get("out", f"runs/{kind}")), given.get("seed", 0)

    def config_of(name: str, seed: int) -> Config:
        return make_config(given | {"seed": seed, "out": str(out / f"{name}_seed{seed}")},
                           preset | variants[name])
    wanted = [(name, seed) for seed in range(first, first + args.seeds) for name in names]
    for run in [*wanted, *finished_runs(out, list(variants))]:
        earlier_part(config_of(*run))           # it raises, better now than after some runs
    for n, (name, seed) in enumerate(wanted, 1):
        config = config_of(name, seed)
        metrics, checkpoint = earlier_part(config)
        say(f"\n{name}, seed {seed}: run {n} of {len(wanted)}" + " is there" * bool(metrics))
        make_D = WholeDiscriminator if name == "whole" else Discriminator
        try:
            metrics or train.train(config, checkpoint, make_D=make_D)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on where it was") from None
    configs = {run: config_of(*run) for run in finished_runs(out, list(variants))}
    report(out, configs, {run: earlier_part(config)[0] for run, config in configs.items()})
    say("\n" + (out / f"{kind}.md").read_text(encoding="utf-8") + f"\nwritten to {out}")


def finished_runs(out: Path, names: list[str]) -> list[tuple[str, int]]:
    """A folder's finished runs, (variant, seed), in the variants' order."""
    found = [path.parent.name.rpartition("_seed") for path in out.glob("*_seed*/metrics.json")]
    return sorted(((name, int(seed)) for name, _, seed in found if name in names
                   and seed.isdecimal()), key=lambda run: (names.index(run[0]), run[1]))


def earlier_part(config: Config) -> tuple[dict | None, dict | None]:
    """A run's folder -> its metrics if the run is finished, or its checkpoint, or neither.

    Raises ValueError if that run has other settings, or its metrics.json is not whole.
    """
    folder, metrics, checkpoint = Path(config.out), None, None
    if (folder / "metrics.json").is_file():
        try:
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            then = metrics["config"] if numbers(metrics) else {}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{folder / 'metrics.json'}: not the numbers of a finished run; "
                             f"delete it, and the checkpoint is measured again") from None
    elif (folder / "checkpoint.pt").is_file():
        checkpoint = load_checkpoint(folder / "checkpoint.pt", config.smpl)
        then = checkpoint["config"]
    else:
        return None, None
    for name, new in dataclasses.asdict(config).items():
        free = name in ("device", "out", "log_every", "picture_every", "record")
        if not free and then.get(name) != new:
            raise ValueError(f"--out {folder.parent}: {folder.name} was trained with {flag(name)} "
                             f"{then.get(name)}, not {new}; give that or name another folder")
    return metrics, checkpoint


# --------------------------------------------------------------------------------------------
# The tables.  configs, all_metrics: (variant, seed) -> settings, what metrics.json holds

def numbers(metrics: dict) -> dict[str, list[float]]:
    """What a run measured -> body: MEASURES, and D's mean outputs on real and predicted bodies.

    The bodies are the lazy guesses, the iterations and the truth.  NaN: D has not judged this body.
    """
    rows = {title: metrics[key] for key, title in GUESSES.items()}
    rows |= {f"iteration {t}": row for t, row in enumerate(metrics["per_iteration"], 1)}
    rows = {body: [float(row[key]) for key, _ in MEASURES] + [math.nan, math.nan]
            for body, row in (rows | {"truth": metrics["truth"]}).items()}
    if "heads" in metrics:
        rows[f"iteration {len(metrics['per_iteration'])}"][-2:] = [
            statistics.mean(metrics["heads"][side]) for side in ("real", "fake")]
    return rows


def table(what: str, configs: dict, all_metrics: dict, columns: dict, rows: dict) -> str:
    """A markdown table under a line that says what its numbers are of.

    columns: title -> format; rows: title -> a list of numbers for each seed.  A cell is their mean
    and, of several seeds, their sample standard deviation.  NaN leaves it empty.
    """
    c, m = next(iter(configs.values())), next(iter(all_metrics.values()))
    seeds = "; ".join(f"{name} {', '.join(str(seed) for of, seed in configs if of == name)}"
                      for name in dict.fromkeys(name for name, _ in configs))
    where = {f"{m['precision']}, {m['device']}, torch {m['torch']}" for m in all_metrics.values()}
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for title, of_seeds in rows.items():
        lines.append([title])
        for values, form in zip(zip(*of_seeds), columns.values()):
            cell = f"{statistics.mean(values):{form}}"
            if len(values) > 1 and cell != "nan":
                cell += f" ± {statistics.stdev(values):{form}}"
            lines[-1].append(cell.replace("nan", ""))
    return (f"{what}, measured on {m['measured_on']}: {c.steps:,} steps of {c.batch} pictures of "
            f"{c.size} px, {c.crop} crop, networks of width {c.width}, trained in "
            f"{'; '.join(sorted(where))}; mean ± sample standard deviation over seeds ({seeds})."
            f"\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines))


def write_csv(path: Path, rows: list[list]) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    write_atomically(path, file.getvalue().encode())


def ablation_report(out: Path, configs: dict, all_metrics: dict) -> None:
    """ablation.csv: a row for every run and body.  ablation.md: a table of the variants and one of
    the iterations.  ablation.png, iterations.png: what networks of the first seed see."""
    columns = {title: ".1f" for _, title in MEASURES} | {"D on real": ".2f", "D on fake": ".2f"}
    keys = [key for key, _ in MEASURES]
    rows, of = [["variant", "seed", "body", *keys, "D_real", "D_fake", "seconds"]], {}
    for (name, seed), metrics in all_metrics.items():
        for body, values in numbers(metrics).items():
            rows.append([name, seed, body, *values, metrics["seconds"]])
            of.setdefault((name, body), []).append(values)            # a list for each seed
    write_csv(out / "ablation.csv", rows)
    one = next(iter(configs))[0]                # guesses and truth are the same for all
    guesses = {title: of[one, title][:1] for title in GUESSES.values()}
    last = {name: of[name, f"iteration {c.iterations}"] for (name, _), c in configs.items()}
    steps = {f"paired+adv, {body}": values for (name, body), values in of.items()
             if name == "paired+adv" and body.startswith("iteration")}
    rows = guesses | last | steps | {"truth": of[one, "truth"][:1]}
    write_atomically(out / "ablation.md", table("Ablation", configs, all_metrics, columns, rows
                                                ).encode())
    draw_networks(out, {name: config for (name, _), config in reversed(configs.items())})


@torch.no_grad()
def draw_networks(out: Path, configs: dict[str, Config]) -> None:
    """Three held-out pictures, taken at regular intervals, as each variant sees them."""
    columns = {}
    for name in (name for name in FIGURE if name in configs):
        config = configs[name]
        model, _, _ = train.load(Path(config.out) / "checkpoint.pt", config.smpl, config.device)
        # the same people twice: as the network sees them, and large enough to draw on
        seen, sharp = (next(evaluation_pictures(dataclasses.replace(
            config, size=size, eval_pictures=64), model.smpl)) for size in (config.size, PANEL))
        inputs = seen.image[::22], sharp.image[::22], seen.keypoints2d[::22, :LSP]
        thetas = model(inputs[0])[0]
        bodies = [model.decode(theta, vertices=True)
                  for theta in (model.regressor.theta_bar.expand(len(inputs[0]), -1), *thetas)]
        columns[FIGURE[name]] = bodies[-1]
        if name == "paired+adv":
            titles = ["Theta-bar", *(f"iteration {t}" for t in range(1, len(bodies)))]
            compare(out / "iterations.png", *inputs, dict(zip(titles, bodies)), model.smpl.faces)
    if columns:
        compare(out / "ablation.png", *inputs, columns, model.smpl.faces)


def compare(path: Path, image: Tensor, sharp: Tensor, true: Tensor, columns: dict,
            faces: Tensor) -> None:
    """PNG, two rows a picture: the input, then each column's body over it, and turned 90 degrees.

    image (B, 3, h, h) what the network saw; sharp (B, 3, H, H) the same people, to draw over; true
    (B, K, 2) keypoints, drawn as white circles, predicted ones red; columns: title -> HMROutput.
    """
    size = sharp.shape[-1]
    shown = F.interpolate(image, (size, size), mode="nearest")        # (B, 3, H, H)
    parts = [torch.cat([shown, torch.ones_like(shown)], 2)]           # (B, 3, 2H, H)
    for body in columns.values():
        overlay = draw_mesh(body.vertices, faces, body.cam, size, sharp)          # (B, 3, H, H)
        for i, (circles, discs) in enumerate(zip(true, body.keypoints2d[:, :LSP])):
            for color, rim in (((0, 0, 0), 1), ((1, 1, 1), 0)):       # black, seen on any ground
                overlay[i] = draw_points(overlay[i], circles, color, 4.5 + rim, filled=False)
            overlay[i] = draw_points(draw_points(overlay[i], discs, (0, 0, 0), 3.2), discs)
        turned = draw_mesh(side_view(body.vertices), faces, body.cam, size)       # (B, 3, H, H)
        parts.append(torch.cat([overlay, turned], 2))                 # (B, 3, 2H, H)
    head = Image.new("RGB", (len(parts) * size, 28), "white")
    for i, title in enumerate(["input", *columns]):
        ImageDraw.Draw(head).text(((i + 0.5) * size, 14), title, "black",
                                  ImageFont.load_default(14), anchor="mm")
    save_png(path, torch.cat([vision.pil_to_tensor(head) / 255, *torch.cat(parts, 3).cpu()], 1))


def draw_points(image: Tensor, keypoints2d: Tensor, color=(1.0, 0.2, 0.2), radius: float = 2,
                filled: bool = True) -> Tensor:
    """Discs, or circles if not filled, at keypoints2d (K, 2) in [-1, 1] on image (3, H, W)."""
    size = image.shape[-1]
    p = torch.arange(size, device=image.device) + 0.5                 # (W,)
    for x, y in ((keypoints2d + 1) * size / 2).tolist():
        distance = ((p[None] - x) ** 2 + (p[:, None] - y) ** 2).sqrt()            # (H, W)
        mask = distance <= radius if filled else (distance - radius).abs() <= 0.8
        image = torch.where(mask, image.new_tensor(color)[:, None, None], image)
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
    model = train.build(config, SMPL(config.smpl or None).to(config.device))
    model.amp = None                            # networks are compared in one precision: float32
    batch = train.training_world(config, model.smpl).batch(config.steps)

    def gradient() -> float:
        still = torch.optim.SGD(model.parameters(), 0.0)              # a step of length 0
        train.train_step(model.train(), None, still, None, batch, None, config)   # adv is off
        return model.encoder.conv1.weight.grad.norm().item()
    before, responses = gradient(), []
    train.restore(load_checkpoint(Path(config.out) / "checkpoint.pt", config.smpl),
                  {"model": model})
    hooks = [layer.register_forward_hook(lambda _, i, y: responses.append(y.std().item()))
             for name, layer in model.encoder.named_modules()
             if name.startswith("layer") and name.endswith(("bn1", "bn2"))]
    with torch.no_grad():
        model.eval()(next(evaluation_pictures(config, model.smpl)).image)
    for hook in hooks:
        hook.remove()
    return [before, gradient()], responses


def degradation_report(out: Path, configs: dict, all_metrics: dict) -> None:
    """degradation.csv: training losses.  responses.csv: responses by layer.  degradation.md: their
    means, and gradients.  degradation.png: both by step and layer; thin is plain, bold residual."""
    csvs = {"degradation": [["network", "seed", "step", "loss"]],
            "responses": [["network", "seed", "layer", "response_std"]]}
    rows, lines = {}, {"degradation": {}, "responses": {}}  # lines: network -> x -> y of the seeds
    for (name, seed), config in configs.items():
        with open(Path(config.out) / "log.csv", encoding="utf-8") as file:
            curve = [(int(row["step"]), float(row["loss_E"])) for row in csv.DictReader(file)]
        gradients, responses = probe(config)
        for kind, points in (("degradation", curve), ("responses", enumerate(responses, 1))):
            for x, y in points:
                csvs[kind].append([name, seed, x, y])
                lines[kind].setdefault(name, {}).setdefault(x, []).append(y)
        end = statistics.mean(loss for step, loss in curve if step > 0.9 * config.steps)
        rows.setdefault(name, []).append([end, all_metrics[name, seed]["mpjpe"], *gradients,
                                          statistics.mean(responses)])
    for kind, content in csvs.items():
        write_csv(out / f"{kind}.csv", content)
    columns = {"training loss, last 10 %": ".2f", "MPJPE mm": ".1f", "gradient norm at conv1, "
               "before": ".4g", "after training": ".4g", "std of 3x3 layers' responses": ".3f"}
    text = table("Degradation", configs, all_metrics, columns, rows)
    write_atomically(out / "degradation.md", text.encode())
    for of in lines["degradation"].values():    # the first losses are far larger than all others
        for x in [x for x in of if x <= 0.05 * max(of)]:
            del of[x]
    save_png(out / "degradation.png", torch.cat([
        draw_chart("training loss, by step", lines["degradation"]),
        draw_chart("std of the 3x3 layers' responses, by layer", lines["responses"])], 2))


def draw_chart(title: str, lines: dict, W: int = 880, H: int = 640) -> Tensor:
    """lines: network -> x -> values, of which the mean is drawn -> chart (3, H / 2, W / 2)."""
    lines = {name: [(x, statistics.mean(ys)) for x, ys in of.items()] for name, of in lines.items()}
    xs, ys = ([point[axis] for line in lines.values() for point in line] for axis in (0, 1))
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys) + 1e-9)
    left, right, top, bottom = 110, W - 30, 100, H - 50

    def at(x: float, y: float) -> tuple[float, float]:
        return (left + (x - x0) / max(x1 - x0, 1) * (right - left),
                bottom - (y - y0) / (y1 - y0) * (bottom - top))
    sheet = Image.new("RGB", (W, H), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(26)
    draw.text((W / 2, 30), title, "black", ImageFont.load_default(30), anchor="mm")
    for k in range(5):                          # a grid of five lines each way
        x, y = x0 + (x1 - x0) * k / 4, y0 + (y1 - y0) * k / 4
        draw.line([at(x, y0), at(x, y1)], "#dddddd", 2)
        draw.line([at(x0, y), at(x1, y)], "#dddddd", 2)
        draw.text((at(x, y0)[0], bottom + 26), f"{x:.4g}", "black", font, anchor="mm")
        draw.text((left - 10, at(x0, y)[1]), f"{y:.3g}", "black", font, anchor="rm")
    for i, (name, points) in enumerate(lines.items()):
        style = "#c0392b" if "34" in name else "#2471a3", 2 if "plain" in name else 6
        x = left + 190 * i                      # of the legend
        draw.line([at(*point) for point in points], *style, joint="curve")
        draw.line([(x, 74), (x + 40, 74)], *style)
        draw.text((x + 50, 74), name, "black", font, anchor="lm")
    return F.avg_pool2d(vision.pil_to_tensor(sheet)[None] / 255, 2)[0]            # (3, H/2, W/2)


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m appendix.ablate", allow_abbrev=False,
                                     description="Train and compare variants of --small.")
    parser.add_argument("kind", choices=("paper", "degradation"),
                        help=f"paper: {', '.join(PAPER)}; degradation: {', '.join(NETWORKS)}")
    parser.add_argument("--variants", metavar="A,B,..", help="variants to train [all]")
    parser.add_argument("--seeds", metavar="N", type=int, default=1,
                        help="number of seeds, from --seed on [1]")
    experiment(*train.parse(parser, argv))


def main(argv: list[str] | None = None) -> int:
    return exit_status("appendix.ablate", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
