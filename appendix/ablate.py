"""The paper's claims and the slides' degradation, seen: the same training, once for every variant.

    python -m appendix.ablate paper --steps 2000 --seeds 2     # six variants, runs/ablation
    python -m appendix.ablate degradation --seeds 2            # four networks, runs/degradation

Both imply --small and take train.py's flags; --variants A,B,.. chooses.  Every variant and seed has
a folder of its own: after an interruption the same command goes on.  Tables are written after each
run, figures at the end.  (Text in figures is set by Pillow, which comes with torchvision.)

Axes:  B pictures   P keypoints   T iterations   N = B * T
"""

import argparse
import csv
import dataclasses
import datetime
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

# --------------------------------------------------------------------------------------------
# The variants: what each changes of train.py's defaults and --small's.

# paper: Sec. 3.2 (T), Sec. 3.3 (one discriminator or 25), Figs. 4 and 5 (3D, adversary)
PAPER = {"paired+adv": {}, "adv": {"paired": False}, "paired": {"adv": False},
         "neither": {"paired": False, "adv": False}, "T=1": {"iterations": 1}, "whole": {}}
FIGURE = {"paired+adv": "paired 3D + adversary", "adv": "adversary only (Fig. 4)",
          "paired": "paired 3D only", "neither": "neither (Fig. 5)"}
# degradation: no adversary, so that all four networks minimise one and the same loss
NETWORKS = {f"{kind}-{depth}": {"plain": kind == "plain", "depth": depth}
            for kind in ("plain", "ResNet") for depth in (18, 34)}
DEGRADATION = dict(adv=False, log_every=10, steps=4_000)             # changes of --small
DEGRADATION_CPU = dict(steps=600)


class WholeDiscriminator(nn.Module):
    """What Sec. 3.3 advises against: ONE network on shape and pose, inputs as `Discriminator`'s.

    217 -> 1239 -> 1239 -> 1 has the 25's number of parameters within 0.005 %: only the
    factorisation differs.  Its one opinion counts 25 times, (N, 25), so that one weight of L_adv
    and one learning rate of D mean the same for both forms.
    """

    def __init__(self):
        super().__init__()
        self.amp = None                         # as `Discriminator`'s; train() sets it
        self.fc1 = nn.Linear(10 + 23 * 9, 1239)
        self.fc2 = nn.Linear(1239, 1239)
        self.fc3 = nn.Linear(1239, 1)
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, rotmats: Tensor, betas: Tensor) -> Tensor:
        x = torch.cat([betas, rotmats.flatten(1)], 1)                 # (N, 217)
        with mixed_precision(betas.device, self.amp):
            opinion = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))             # (N, 1)
        return opinion.float().expand(-1, 25)                         # (N, 25)


# --------------------------------------------------------------------------------------------
# The runs

def experiment(given: dict, args: argparse.Namespace) -> None:
    """Train what is not trained yet, one after another; tables after each run, figures at the end.

    Each run has its own folder, out/<variant>_seed<k>; a finished one is left alone, an interrupted
    one goes on.  Raises ValueError.
    """
    if torch.distributed.is_torchelastic_launched():
        raise ValueError("the variants are trained in one process: leave torchrun out")
    paper = args.kind == "paper"
    kind, variants = ("ablation", PAPER) if paper else ("degradation", NETWORKS)
    names = list(variants if args.variants is None else dict.fromkeys(args.variants.split(",")))
    for name in names:
        if name not in variants:
            raise ValueError(f"--variants {args.variants}: {name!r} is none of the variants "
                             f"{', '.join(variants)}")
    for name in sorted(set(given) & set().union(*variants.values())):
        raise ValueError(f"{flag(name)}: the variants differ in it; leave it out")
    if not 1 <= args.seeds <= 1000:
        raise ValueError(f"--seeds: expected 1 to 1000, got {args.seeds}")
    if not paper and given.get("adv"):
        raise ValueError("--adv: degradation compares one loss, without the adversary; leave it "
                         "out")
    preset = train.small_preset(given)
    if not paper:
        changes = DEGRADATION | (DEGRADATION_CPU if preset["steps"] == train.SMALL_CPU["steps"]
                                 else {})
        say(f"degradation changes: {', '.join(f'{k} {v}' for k, v in changes.items())}")
        preset |= changes
    out, first = Path(given.get("out", f"runs/{kind}")), given.get("seed", 0)
    names_in_order = list(variants)

    def config_of_run(name: str, seed: int) -> Config:
        return make_config(given | {"seed": seed, "out": str(out / f"{name}_seed{seed}")},
                           preset | variants[name])

    def finished() -> dict[tuple[str, int], Config]:
        """The folder's runs, earlier calls' included, in the variants' order."""
        runs = (path.parent.name.rpartition("_seed") for path in out.glob("*_seed*/metrics.json"))
        found = sorted((names_in_order.index(name), int(seed)) for name, _, seed in runs
                       if name in names_in_order and seed.isdecimal())
        return {(names_in_order[i], seed): config_of_run(names_in_order[i], seed)
                for i, seed in found}
    wanted = [(name, seed) for seed in range(first, first + args.seeds) for name in names]
    done = finished()
    for config in [config_of_run(*run) for run in wanted] + list(done.values()):
        require_same_settings(config)
    missing = [run for run in wanted if run not in done]
    for n, run in enumerate(missing):
        seconds = [load_metrics(config)["seconds"] for config in finished().values()]
        left = (len(missing) - n) * sum(seconds) / max(len(seconds), 1)
        say(f"\n{run[0]}, seed {run[1]}: run {len(wanted) - len(missing) + n + 1} of {len(wanted)}"
            + (f", {datetime.timedelta(seconds=round(left))} left for all" if seconds else ""))
        try:
            train_or_go_on(run[0], config_of_run(*run))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on where it was") from None
        TABLES[kind](out, finished())           # what there is so far
    if not missing:
        TABLES[kind](out, finished())
    FIGURES[kind](out, finished())
    say("\n" + (out / f"{kind}.md").read_text(encoding="utf-8") + f"\nwritten to {out}")


def require_same_settings(config: Config) -> None:
    """A folder's earlier run must be the one that is asked for now."""
    folder = Path(config.out)
    if (folder / "metrics.json").is_file():
        stored = load_metrics(config)["config"]
    elif (folder / "checkpoint.pt").is_file():
        stored = load_checkpoint(folder / "checkpoint.pt")["config"]
    else:
        return
    for f in dataclasses.fields(Config):
        now, then = getattr(config, f.name), stored.get(f.name, f.default)
        free = ("device", "out", "log_every", "picture_every")
        if now != then and f.name not in free:
            raise ValueError(f"--out {folder.parent}: {folder.name} was trained with "
                             f"{flag(f.name)} {then}, now it is {now}; give the same "
                             f"options as before or name another folder")


def load_metrics(config: Config) -> dict:
    path = Path(config.out) / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        metrics = {}
    if not (isinstance(metrics, dict) and
            {"config", "truth", *GUESSES, "per_iteration", "seconds", "device", "torch",
             "precision", "measured_on"} <= set(metrics)):
        raise ValueError(f"{path}: not the numbers of a finished run; delete it, and the run's "
                         f"checkpoint will be measured again")
    return metrics


def train_or_go_on(name: str, config: Config) -> None:
    path = Path(config.out) / "checkpoint.pt"
    if not path.is_file():                      # the log of a run without a checkpoint helps nobody
        path.with_name("log.csv").unlink(missing_ok=True)
    train.train(config, load_checkpoint(path) if path.is_file() else None,
                make_D=WholeDiscriminator if name == "whole" else Discriminator)


# --------------------------------------------------------------------------------------------
# The tables

def mean_std(values: list[float], form: str = ".1f") -> str:
    if any(map(math.isnan, values)):
        return ""                               # a run without discriminators has no heads
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(set(values)) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"


def markdown(title: list[str], rows: list[list[str]]) -> str:
    lines = [title, ["---"] * len(title), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def heading(what: str, configs: dict) -> str:
    """Where the numbers come from; the spread is the sample standard deviation over seeds."""
    c, seeds = next(iter(configs.values())), sorted({seed for _, seed in configs})
    where = sorted({f"trained in {m['precision']}, {m['device']}, torch {m['torch']}"
                    for m in map(load_metrics, configs.values())})
    return (f"{what}, measured on {load_metrics(c)['measured_on']}: {c.steps:,} steps of {c.batch} "
            f"pictures of {c.size} px, {c.crop} crop, networks of width {c.width}, seeds "
            f"{', '.join(map(str, seeds))}; mean ± standard deviation where a row has several."
            f" {'; '.join(where)}.\n\n")


def write_csv(path: Path, rows: list[list]) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    write_atomically(path, file.getvalue().encode())


def ablation_tables(out: Path, configs: dict[tuple[str, int], Config]) -> None:
    """ablation.csv: a row for every run and body (the truth, Theta-bar, each iteration);
    ablation.md: means over seeds of the variants, and of the iterations."""
    keys, titles = zip(*MEASURES)
    rows, groups = [], {}                       # groups: (variant, body) -> its rows over seeds
    for (name, seed), config in configs.items():
        metrics = load_metrics(config)
        heads = metrics.get("heads", {"real": [math.nan], "fake": [math.nan]})
        bodies = {"truth": metrics["truth"],
                  **{title: metrics[key] for key, title in GUESSES.items()},
                  **{f"iteration {t}": m for t, m in enumerate(metrics["per_iteration"], 1)}}
        for body, measured in bodies.items():
            values = [*(measured[key] for key in keys), *map(statistics.mean, heads.values())]
            rows.append([name, seed, body, *values, metrics["seconds"]])
            groups.setdefault((name, body), []).append(values)
    write_csv(out / "ablation.csv", [["variant", "seed", "body", *keys, "D_real", "D_fake",
                                      "seconds"], *rows])

    def line(title: str, group: tuple[str, str], columns: int) -> list[str]:
        cells = [mean_std(v) for v in zip(*groups[group])][:len(keys)]
        heads = [mean_std(v, ".2f") for v in zip(*groups[group])][len(keys):]
        return [title, *cells, *heads][:columns]
    T = {name: config.iterations for (name, _), config in configs.items()}
    one = next(iter(T))
    *common, truth = [line(body, (one, body), len(keys) + 1) + ["", ""]
                      for body in (*GUESSES.values(), "truth")]
    text = heading("Ablation", configs) + markdown(
        ["", *titles, "D on real", "D on fake"],
        [*common, *(line(name, (name, f"iteration {t}"), 99) for name, t in T.items()), truth])
    if "paired+adv" in T:
        steps = [line(body, ("paired+adv", body), len(keys) + 1)
                 for body in (*GUESSES.values(),
                              *(f"iteration {t + 1}" for t in range(T["paired+adv"])))]
        alone = [line("T = 1, trained alone", ("T=1", "iteration 1"), len(keys) + 1)] \
            if "T=1" in T else []
        text += "\n" + markdown(["paired+adv", *titles], [*steps, *alone])
    write_atomically(out / "ablation.md", text.encode())


def probe(config: Config) -> tuple[list[float], list[float]]:
    """A finished run -> norms of the loss's gradient at the first layer, before and after training
    (on one batch that training did not see); and the standard deviation of each 3x3 layer's
    response after BN, before ReLU and addition, on held-out pictures (He et al., Fig. 7)."""
    checkpoint = load_checkpoint(Path(config.out) / "checkpoint.pt")
    kept = Path(config.out) / "probe.json"
    if kept.is_file():
        of, *result = json.loads(kept.read_text(encoding="utf-8"))
        if of == checkpoint["seconds"]:         # no two runs take equally long
            return tuple(result)
    torch.manual_seed(config.seed)              # as `train` begins
    model = train.build(config, SMPL(config.smpl or None).to(config.device))
    model.amp = None                            # networks are compared in one precision: float32
    batch = train.training_world(config, model.smpl).batch(config.steps)

    def gradient() -> float:
        still = torch.optim.SGD(model.parameters(), 0.0)              # a step of length 0
        train.train_step(model.train(), None, still, None, batch, None, config)   # adv is off
        return model.encoder.conv1.weight.grad.norm().item()
    before, responses = gradient(), []
    train.restore(checkpoint, {"model": model})
    for name, layer in model.encoder.named_modules():
        if name.startswith("layer") and name.rpartition(".")[2] in ("bn1", "bn2"):
            layer.register_forward_hook(lambda _, i, y: responses.append(y.float().std().item()))
    with torch.no_grad():
        model.eval()(next(evaluation_pictures(config, model.smpl)).image)
    layers = list(responses)                    # the gradient's forward pass appends again
    result = [before, gradient()], layers
    write_atomically(kept, json.dumps([checkpoint["seconds"], *result]).encode())
    return result


def loss_curve(config: Config) -> tuple[list[int], list[float]]:
    text = (Path(config.out) / "log.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    return [int(row["step"]) for row in rows], [float(row["loss_E"]) for row in rows]


def degradation_tables(out: Path, configs: dict[tuple[str, int], Config]) -> None:
    """degradation.csv: the training losses; degradation.md: their ends, gradients, responses."""
    rows, groups = [["network", "seed", "step", "loss"]], {}
    layers = [["network", "seed", "layer", "response_std"]]
    for (name, seed), config in configs.items():
        steps, losses = loss_curve(config)
        rows += [[name, seed, *point] for point in zip(steps, losses)]
        final = [loss for step, loss in zip(steps, losses) if step > 0.9 * config.steps]
        gradients, responses = probe(config)
        layers += [[name, seed, n, std] for n, std in enumerate(responses, 1)]
        groups.setdefault(name, []).append([statistics.mean(final), load_metrics(config)["mpjpe"],
                                            *gradients, statistics.mean(responses)])
    write_csv(out / "degradation.csv", rows)
    write_csv(out / "responses.csv", layers)
    forms = (".2f", ".1f", ".4g", ".4g", ".3f")
    table = [[name, *map(mean_std, zip(*values), forms)] for name, values in groups.items()]
    text = heading("Degradation", configs) + markdown(
        ["", "training loss, last 10 %", "MPJPE mm", "gradient norm at conv1, before",
         "after training", "std of 3x3 layers' responses"], table)
    write_atomically(out / "degradation.md", text.encode())


def degradation_figure(out: Path, configs: dict[tuple[str, int], Config]) -> None:
    """Loss against steps, and responses against layers: thin = plain, bold = residual."""
    def lines(path: str, x: str, y: str) -> list:
        groups = {}
        for row in csv.DictReader(io.StringIO((out / path).read_text(encoding="utf-8"))):
            groups.setdefault(row["network"], {}).setdefault(int(row[x]), []).append(float(row[y]))
        return [(name, "#c0392b" if "34" in name else "#2471a3", 1 if "plain" in name else 3,
                 [*line], [statistics.mean(v) for v in line.values()])
                for name, line in groups.items()]
    losses = [(*style, *zip(*[(x, y) for x, y in zip(xs, ys) if x > 0.05 * xs[-1]]))
              for *style, xs, ys in lines("degradation.csv", "step", "loss")]
    save_png(out / "degradation.png", torch.cat([
        draw_chart("training loss", "step", losses),
        draw_chart("std of the 3x3 layers' responses", "layer",
                   lines("responses.csv", "layer", "response_std"))], 2))


# --------------------------------------------------------------------------------------------
# The figures

@torch.no_grad()
def ablation_figures(out: Path, configs: dict[tuple[str, int], Config]) -> None:
    """Five held-out pictures, taken at regular intervals: what each variant of the first seed
    sees in them (ablation.png), and how the iterations arrive there (iterations.png)."""
    seed = min(seed for _, seed in configs)
    drawn = {name: configs[name, seed] for name in FIGURE if (name, seed) in configs}
    columns, iterations = {}, {}
    for name, config in drawn.items():
        model, _, _ = train.load(Path(config.out) / "checkpoint.pt", config.smpl, config.device)
        if not columns:     # the same people twice: as the network sees them, and fit to draw on
            (image, keypoints2d, *_), (sharp, *_) = (
                [f[::13] for f in next(evaluation_pictures(dataclasses.replace(
                        config, size=size, eval_pictures=64), model.smpl))]
                for size in (config.size, max(config.size, 224)))
        thetas, _ = model(image)
        parts = [(body.vertices, body.cam, body.keypoints2d[:, :LSP]) for body in (
            model.decode(theta, vertices=True)
            for theta in (model.regressor.theta_bar.expand(len(image), -1), *thetas))]
        columns[FIGURE[name]] = parts[-1]
        if name == "paired+adv":
            iterations = dict(zip(["Theta-bar"] + [f"iteration {t + 1}" for t in
                                                   range(len(thetas))], parts))
    for name, shown in (("ablation.png", columns), ("iterations.png", iterations)):
        if shown:
            compare(out / name, image, sharp, keypoints2d[:, :LSP], shown, model.smpl.faces)


def compare(path: str | Path, image: Tensor, sharp: Tensor, keypoints2d: Tensor, columns: dict,
            faces: Tensor) -> None:
    """PNG: the input | each column's bodies as overlay and turned 90 degrees; one row a picture.

    image (B, 3, h, h) what the network saw; sharp (B, 3, size, size) the same people, to draw
    over; keypoints2d (B, P, 2) the truth: unfilled circles, predictions filled (as in Fig. 5);
    columns: title -> (vertices (B, V, 3), cam (B, 3), keypoints2d (B, P, 2)).
    """
    size, black, white = sharp.shape[-1], (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    parts = [F.interpolate(image, (size, size), mode="nearest")]      # (B, 3, size, size)
    for vertices, cam, predicted in columns.values():
        overlay = draw_mesh(vertices, faces, cam, size, sharp)
        for i, (true, pred) in enumerate(zip(keypoints2d, predicted)):
            picture = draw_points(overlay[i], true, black, 5.5, filled=False)
            picture = draw_points(picture, true, white, 4.5, filled=False)
            overlay[i] = draw_points(draw_points(picture, pred, black, 3), pred, radius=2.2)
        parts += [overlay, draw_mesh(side_view(vertices), faces, cam, size)]
    head = Image.new("RGB", (len(parts) * size, 32), "white")
    for i, title in enumerate(["input", *columns]):                   # a column is two parts wide
        ImageDraw.Draw(head).text((max(2 * i, 0.5) * size, 16), title, "black",
                                  ImageFont.load_default(20), anchor="mm")
    rows = [vision.pil_to_tensor(head) / 255, *torch.cat(parts, 3).cpu()]
    save_png(path, torch.cat(rows, 1))


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


def draw_chart(title: str, x_label: str, lines: list, size: tuple[int, int] = (640, 420)) -> Tensor:
    """lines: (label, colour, thickness, xs, ys) -> chart (3, H, W), axes from the data's extent."""
    W, H = (2 * side for side in size)                                # halved at the end
    left, right, top, bottom = 120, W - 30, 70, H - 100
    extent = []                                                       # of x, of y: low, high, step
    for values in ([x for line in lines for x in line[3]], [y for line in lines for y in line[4]]):
        span = max(max(values) - min(values), 1e-9)
        ten = 10 ** math.floor(math.log10(span / 4))
        step = ten * next(k for k in (1, 2, 5, 10) if ten * k * 6 >= span)
        extent.append((min(values), min(values) + span, step))

    def at(x, y):
        (x0, x1, _), (y0, y1, _) = extent
        return (left + (x - x0) / (x1 - x0) * (right - left),
                bottom - (y - y0) / (y1 - y0) * (bottom - top))
    sheet = Image.new("RGB", (W, H), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(26)
    for axis, (low, high, step) in enumerate(extent):
        for k in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1):
            x, y = at(k * step, extent[1][0]) if axis == 0 else at(extent[0][0], k * step)
            draw.line((x, top, x, bottom) if axis == 0 else (left, y, right, y), "#dddddd", 2)
            draw.text((x, y + 26) if axis == 0 else (x - 12, y), f"{k * step:.4g}", "black", font,
                      anchor="mm" if axis == 0 else "rm")
    draw.rectangle((left, top, right, bottom), outline="black", width=2)
    draw.text((W / 2, 34), title, "black", ImageFont.load_default(30), anchor="mm")
    draw.text((W / 2, H - 28), x_label, "black", font, anchor="mm")
    for i, (label, colour, thickness, xs, ys) in enumerate(lines):
        draw.line([at(x, y) for x, y in zip(xs, ys)], colour, 2 * thickness, joint="curve")
        y = top + 30 + 36 * i
        draw.line((right - 250, y, right - 190, y), colour, 2 * thickness)
        draw.text((right - 175, y), label, "black", font, anchor="lm")
    return F.avg_pool2d(vision.pil_to_tensor(sheet)[None] / 255, 2)[0]


TABLES = {"ablation": ablation_tables, "degradation": degradation_tables}
FIGURES = {"ablation": ablation_figures, "degradation": degradation_figure}


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m appendix.ablate", allow_abbrev=False,
                                     description="Train and compare variants of --small.")
    parser.add_argument("kind", choices=("paper", "degradation"),
                        help=f"paper: {', '.join(PAPER)}; degradation: {', '.join(NETWORKS)}")
    parser.add_argument("--variants", metavar="A,B,..", help="only these [all]")
    parser.add_argument("--seeds", metavar="N", type=int, default=1,
                        help="how many, from --seed on [1]")
    experiment(*train.parse(parser, argv))


def main(argv: list[str] | None = None) -> int:
    return exit_status("appendix.ablate", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
