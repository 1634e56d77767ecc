"""What things cost: a training step and its parts, how it grows, SMPL against the textbook's way.

    python -m appendix.bench step --small        # each part of a step, on top of the encoder
    python -m appendix.bench grow --small        # batch, size, depth and body, one at a time
    python -m appendix.bench smpl                # a body of the official size, in milliseconds
    python -m appendix.bench step --rounds 5     # --rounds N; step and grow take train.py's flags

Axes:  B bodies or pictures   V vertices   24 joints   19 keypoints

All numbers are medians, and what is compared is timed in turn, so that both are of one moment.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import train
from data import seed_of
from hmr import Discriminator
from smpl import PARENTS, SMPL, SMPLOutput, batch_rigid_transform, batch_rodrigues, exit_status

ROUNDS = {"step": 20, "grow": 5, "smpl": 15}


def in_turn(ways: dict, rounds: int, device: torch.device, twice=False) -> dict[str, Tensor]:
    """Seconds (rounds,) of each named function, all in turn so that drift hits them alike.

    twice: each runs twice and the second time counts, for functions of a few milliseconds.  The
    first one may have to give back the memory that the function before it left.
    """
    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
    seconds = {name: [] for name in ways}
    for _ in range(rounds + 2):                                       # two rounds to warm up
        for name, run_once in ways.items():
            if twice:
                run_once()
            begun = clock()
            run_once()
            seconds[name].append(clock() - begun)
    return {name: torch.tensor(s[2:], dtype=torch.float64) for name, s in seconds.items()}


# --------------------------------------------------------------------------------------------
# step: what each part of a step costs, on top of the encoder that any such network pays for.

STAGES = ("encoder: forward, backward, Adam", "+ regressor", "+ SMPL and losses",
          "+ discriminators, L_adv", "+ pictures and motion", "+ rates and log: the whole loop")


def bench_steps(config: train.Config, smpl: SMPL) -> dict:
    """train()'s step, built up part by part: each of STAGES -> a function that does one step.

    A test holds the weights that the last one leaves against train()'s.
    """
    torch.manual_seed(config.seed)
    model, D = train.build(config, smpl), Discriminator().to(config.device)
    world = train.training_world(config, smpl)
    D.amp = model.amp
    opt_E = torch.optim.Adam(model.parameters(), config.lr, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), config.lr_d, fused=True)
    with contextlib.redirect_stdout(None), tempfile.TemporaryDirectory() as out:  # no header
        endless = dataclasses.replace(config, steps=2 ** 62, log_every=2 ** 62, out=out)
        log = train.Log(endless)                                      # never comes to a line
    model.train(), D.train()
    n, numbers = config.iterations * world.batch_size, itertools.count()
    fixed, without_D = (world.batch(0), world.motion(n, 0)), dataclasses.replace(config, adv=False)

    def descend(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def step(stage: int) -> None:
        number = next(numbers) if stage >= 4 else 0
        batch, motion = (world.batch(number), world.motion(n, number)) if stage >= 4 else fixed
        if stage == 5:
            for optimizer, rate in ((opt_E, config.lr), (opt_D, config.lr_d)):
                optimizer.param_groups[0]["lr"] = rate * train.lr_factor(number, config)
            torch.manual_seed(seed_of(config.seed, number, 0))
            losses = train.train_step(model, D, opt_E, opt_D, batch, motion, config)
            return log.add(number, losses)
        if stage < 2:
            feature = model.encode(batch.image)                       # (B, C)
            out = feature if stage == 0 else torch.cat(model.regressor(feature))
            return descend(opt_E, out.square().mean())
        if stage == 2:
            return train.train_step(model, D, opt_E, opt_D, batch, None, without_D)
        train.train_step(model, D, opt_E, opt_D, batch, motion, config)
    return {name: functools.partial(step, stage) for stage, name in enumerate(STAGES)}


def bench_inference(config: train.Config, smpl: SMPL, B: int) -> dict:
    """The same for inference: name -> a function that does one forward pass of B pictures."""
    model = train.build(config, smpl).eval()
    image = torch.rand(B, 3, config.size, config.size, device=config.device)
    image = image.contiguous(memory_format=torch.channels_last)
    return {"encoder": lambda: model.encode(image),
            "+ regressor, SMPL's keypoints": lambda: model(image),
            "  the same with all vertices": lambda: model.decode(
                model.regressor(model.encode(image))[-1], vertices=True)}


def print_costs(seconds: dict[str, Tensor], pictures: int) -> None:
    (first, *_), (*_, last) = seconds.values(), seconds.values()
    before = 0.0
    for name, s in seconds.items():
        low, median, high = s.quantile(s.new_tensor([0.25, 0.5, 0.75])).tolist()
        share, before = 100 * (median - before) / last.median().item(), median
        print(f"{name:34s}{1000 * median:10.1f}  {f'[{1000 * low:.1f}, {1000 * high:.1f}]':20s}"
              f"{(s / first).median():9.2f}{share:9.1f} %{pictures / median:10.1f}", flush=True)


def bench_step(config: train.Config, rounds: int) -> None:
    """Print what the parts of a training step, and of inference, cost."""
    device, smpl = torch.device(config.device), SMPL(config.smpl or None).to(config.device)
    print(f"ResNet-{config.depth} of width {config.width}, {config.size} px, batch {config.batch}, "
          f"V = {len(smpl.v_template)}, {train.PRECISION[config.amp]}; "
          f"{train.device_name(config.device)}; medians of {rounds} rounds")
    titles = f"{'ms':>10s}  {'[quartiles]':20s}{'x encoder':>9s}{'share':>11s}{'img/s':>10s}"
    print(f"{'a training step':34s}" + titles)
    print_costs(in_turn(bench_steps(config, smpl), rounds, device), config.batch)
    print(f"peak memory of training: {peak_memory(device) / 2 ** 30:.2f} GiB")
    with torch.inference_mode():
        for B in (1, 64):
            print(f"{f'inference, {B} at a time':34s}" + titles)
            print_costs(in_turn(bench_inference(config, smpl, B), rounds, device), B)


def peak_memory(device: torch.device) -> float:
    """Bytes: of the GPU's tensors, or of this process; NaN where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource                                               # not on Windows
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --------------------------------------------------------------------------------------------
# grow: how a whole step's cost grows

def bench_growth(config: train.Config, rounds: int) -> None:
    """Print how a whole training step's cost grows, one setting at a time."""
    device, V = torch.device(config.device), len(SMPL(config.smpl or None).v_template)
    print(f"{'':16s}{'img/s':>10s}{'ms':>10s}{'x encoder':>11s}   "
          f"{train.device_name(config.device)}, medians of {rounds} rounds, the rest as depth "
          f"{config.depth}, {config.size} px, batch {config.batch}, {train.PRECISION[config.amp]}")
    for name, values in (("batch", (1, 4, 16, 64, 256)), ("size", (64, 96, 128, 224)),
                         ("depth", (18, 34, 50, 101, 152)),
                         ("vertices", sorted({V, max(V, 6890)}))):
        for value in values:
            smpl = SMPL(config.smpl or None)
            if name == "vertices":
                smpl, changed = with_vertices(smpl, value), config
            else:
                changed = dataclasses.replace(config, **{name: value})
            steps = bench_steps(changed, smpl.to(device))
            seconds = in_turn({s: steps[s] for s in (STAGES[0], STAGES[-1])}, rounds, device)
            encoder, whole = (s.median().item() for s in seconds.values())
            print(f"{f'{name} {value}':16s}{changed.batch / whole:10.1f}{1000 * whole:10.1f}"
                  f"{whole / encoder:11.2f}", flush=True)


def with_vertices(smpl: SMPL, V: int) -> SMPL:
    """A body of V vertices for timing: the skin laid over itself, keypoints from its first layer.
    (Its triangles do not shrink, so drawing it costs more than drawing a body as fine.)"""
    n = len(smpl.v_template)
    for name in ("v_template", "shapedirs", "posedirs", "weights"):
        setattr(smpl, name, getattr(smpl, name)[torch.arange(V) % n])
    for name in ("J_regressor", "cocoplus_regressor"):
        setattr(smpl, name, torch.nn.functional.pad(getattr(smpl, name), (0, V - n)))
    smpl.faces = torch.cat([smpl.faces + layer * n for layer in range(V // n)])
    return smpl


# --------------------------------------------------------------------------------------------
# smpl: a body of the official size, against the textbook's way

def official_sized(path: Path, V: int = 6890) -> None:
    """Write a body of random numbers of the official sizes and sparsity, to measure speed with."""
    rng = np.random.default_rng(0)

    def rows(n, nonzeros, width):               # each row: `nonzeros` equal weights that sum to 1
        table = np.zeros((n, width), np.float32)
        for row in table:
            row[rng.choice(width, nonzeros, replace=False)] = 1 / nonzeros
        return table
    np.savez(path, v_template=rng.normal(0, 0.4, (V, 3)), shapedirs=rng.normal(0, 0.01, (V, 3, 10)),
             posedirs=rng.normal(0, 0.002, (V, 3, 207)), J_regressor=rows(24, 32, V),
             weights=rows(V, 4, 24), cocoplus_regressor=rows(19, 16, V),
             f=np.arange(30).reshape(10, 3), kintree_table=[PARENTS, range(24)])


def textbook(smpl: SMPL, posedirs: Tensor, betas: Tensor, rotmats: Tensor) -> SMPLOutput:
    """The baseline as commonly written: (B, V, 4, 4) transforms, dense products, keypoints from
    every vertex; posedirs (207, 3V).  Only the kinematics are `lbs`'s own."""
    B, V = len(betas), len(smpl.v_template)
    v_shaped = smpl.v_template + torch.einsum("bn,vcn->bvc", betas, smpl.shapedirs)   # (B, V, 3)
    J = torch.einsum("bvc,jv->bjc", v_shaped, smpl.J_regressor)       # (B, 24, 3)
    eye = torch.eye(3, dtype=rotmats.dtype, device=betas.device)
    feature = (rotmats[:, 1:] - eye).reshape(B, 207)                  # (B, 207)
    v_posed = v_shaped + (feature @ posedirs).view(B, V, 3)           # (B, V, 3)
    joints, A = batch_rigid_transform(rotmats, J, smpl.parents)       # A (B, 24, 4, 4)
    T = (smpl.weights.expand(B, V, 24) @ A.reshape(B, 24, 16)).view(B, V, 4, 4)   # (B, V, 4, 4)
    v_homogeneous = torch.cat([v_posed, v_posed.new_ones(B, V, 1)], 2)            # (B, V, 4)
    v = (T @ v_homogeneous[..., None])[:, :, :3, 0]                   # (B, V, 3)
    return SMPLOutput(v, joints, torch.einsum("kv,bvc->bkc", smpl.cocoplus_regressor, v))


def bench_smpl(rounds: int) -> None:
    """Milliseconds, medians; the three ways take turns, so that their ratios are of one moment."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("highest")                     # as in train.py
    with tempfile.TemporaryDirectory() as folder:
        official_sized(Path(folder) / "random.npz")
        smpl = SMPL(Path(folder) / "random.npz").to(device)
    posedirs = smpl.posedirs.flatten(0, 1).T.contiguous()             # (207, 3V)
    ways = {"textbook": functools.partial(textbook, smpl, posedirs), "full": smpl,
            "keypoints": functools.partial(smpl, vertices=False)}
    print(f"V = 6,890, float32, from rotation matrices, medians of {rounds} rounds; torch "
          f"{torch.__version__} on {device.type}\n"
          "threads    B  pass      textbook ms    full ms  ratio   keypoints only ms  ratio")
    threads = torch.get_num_threads()
    for n in (1,) if device.type == "cuda" else (1, 2):
        torch.set_num_threads(n)
        for B in (1, 16, 64, 256):
            inputs = [torch.randn(B, 10, device=device), batch_rodrigues(
                0.3 * torch.randn(B, 24, 3, device=device))]
            for backward in (False, True):
                inputs = [x.detach().requires_grad_(backward) for x in inputs]
                seconds = in_turn({name: functools.partial(once, way, inputs, backward)
                                   for name, way in ways.items()},
                                  max(1, rounds // 2) if B > 64 else rounds, device, twice=True)
                a, b, c = (1000 * times.median().item() for times in seconds.values())
                print(f"{n:7d} {B:4d}  {'f + b' if backward else 'forward'} {a:14.2f} {b:10.2f} "
                      f"{a / b:6.1f} {c:19.2f} {a / c:6.1f}", flush=True)
    torch.set_num_threads(threads)


def once(way, inputs: list[Tensor], backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        out = [x for x in way(*inputs) if x is not None]
    if backward:                                # a gradient arrives at everything that came out
        torch.autograd.grad(out, inputs, [torch.ones(x.shape, device=x.device) for x in out])


# --------------------------------------------------------------------------------------------
# The command line

def settings(parser: argparse.ArgumentParser,
             argv: list[str] | None) -> tuple[argparse.Namespace, train.Config | None]:
    """The command line -> what to time, and with which settings.  Raises ValueError."""
    given, args = train.parse(parser, argv)
    if args.rounds is not None and args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: expected at least 1")
    if dist.is_torchelastic_launched():
        raise ValueError("a bench times one process; leave torchrun out")
    if args.what == "smpl":
        for name in [train.flag(name) for name in given] + ["--small"] * args.small:
            raise ValueError(f"{name}: smpl times a random body, and takes --rounds only")
        return args, None
    if "steps" in given:
        raise ValueError(f"--steps {given['steps']}: a bench counts rounds; give --rounds")
    given = {"pretrained": "none"} | given                            # as dear, and no download
    config = train.make_config(given, train.small_preset(given) if args.small else {})
    if not config.adv:
        raise ValueError("--no-adv: a bench times the step with the adversary last; leave it out")
    return args, config


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m appendix.bench", allow_abbrev=False,
        description="Measure what a training step, its growth, or a body costs.")
    parser.add_argument("what", choices=ROUNDS)
    parser.add_argument("--rounds", type=int, metavar="N",
                        help="how many [20 of step, 5 of grow, 15 of smpl]")
    parser.add_argument("--small", action="store_true", help="train.py --small's step")
    args, config = settings(parser, argv)
    rounds = args.rounds or ROUNDS[args.what]
    if args.what == "step":
        bench_step(config, rounds)
    elif args.what == "grow":
        bench_growth(config, rounds)
    else:
        bench_smpl(rounds)


def main(argv: list[str] | None = None) -> int:
    return exit_status("appendix.bench", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
