"""What things cost: a training step and its parts, how it grows, SMPL against the textbook's way.

    python -m appendix.bench step --small        # each part of a step, on top of the encoder
    python -m appendix.bench grow --small        # batch, size, depth and body, one at a time
    python -m appendix.bench smpl --rounds 5     # a body of the official size, in milliseconds

step and grow take train.py's flags, but for --steps and --adv.  Times are medians.

Axes:  B bodies or pictures   C channels   V vertices   24 joints   19 keypoints
"""

import argparse
import dataclasses
import itertools
import os
import re
import statistics
import sys
import time
import timeit
from typing import Callable

import torch
from torch import Tensor

import train
from data import seed_of
from hmr import Discriminator
from smpl import SMPL, SMPLOutput, batch_rigid_transform, batch_rodrigues, exit_status


def in_turn(ways: list[Callable], rounds: int, calls: int = 1) -> list[float]:
    """Each function's median seconds a call.  They take turns, so that the machine's drift hits all
    alike.  Of twice `calls` calls the second time counts: the first may give back memory that the
    function before it left.  Two rounds warm up."""
    def clock() -> float:                       # when a GPU has done all that it was asked for
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
    table = [[timeit.repeat(way, timer=clock, repeat=2, number=calls)[1] / calls for way in ways]
             for _ in range(rounds + 2)]
    return [statistics.median(of_one) for of_one in zip(*table[2:])]


def bench_steps(config: train.Config, smpl: SMPL) -> tuple[dict[str, Callable], int]:
    """train()'s step, built up part by part: title -> a function, and how many calls to time
    together, on a GPU as many as the world draws ahead.  The last is train()'s whole step, on a GPU
    recorded."""
    torch.manual_seed(config.seed)
    model, D = train.build(config, smpl), Discriminator().to(config.device)
    world, numbers = train.training_world(config, smpl), itertools.count()
    D.amp = model.amp
    opt_E, opt_D = train.adam(model, config.lr, config), train.adam(D, config.lr_d, config)
    model.train(), D.train()
    N, without_D = config.iterations * world.batch_size, dataclasses.replace(config, adv=False)
    fixed = world.batch(0), world.motion(N, 0)

    def part(decode: Callable) -> None:         # a loss on the encoder's feature, (B, C), or more
        opt_E.zero_grad()
        decode(model.encode(fixed[0].image)).square().mean().backward()
        opt_E.step()

    def loss(batch, motion, config=config) -> train.Losses:
        return train.train_step(model, D, opt_E, opt_D, batch, motion, config)

    def whole(step: Callable) -> None:
        number = next(numbers)
        for optimizer, rate in ((opt_E, config.lr), (opt_D, config.lr_d)):
            train.set_rate(optimizer, rate * train.lr_factor(number, config))
        batch, motion = world.batch(number), world.motion(N, number)
        torch.manual_seed(seed_of(config.seed, number, 0))
        step(batch, motion)
    steps = {
        "encoder: forward, backward, Adam": lambda: part(lambda feature: feature),
        "+ regressor": lambda: part(lambda feature: torch.cat(model.regressor(feature))),
        "+ SMPL and losses": lambda: loss(fixed[0], None, without_D),
        "+ discriminators, L_adv": lambda: loss(*fixed),
        "+ pictures, motion, rates: the whole step": lambda: whole(loss)}
    if train.records(config):
        recorded = train.RecordedStep(loss)
        steps |= {"recorded: all but pictures, motion, rates": lambda: recorded(*fixed),
                  "recorded: the whole step": lambda: whole(recorded)}
    return steps, world.ahead


def count_calls(step: Callable, steps: int, device: str) -> float:
    """Launches of kernels and graphs by a step on a GPU; on a CPU calls of PyTorch's operators,
    those of one operator by another included."""
    # No lines of the profiler's own; some versions crashed when CUPTI restarted beside CUDA graphs.
    os.environ.update(KINETO_LOG_LEVEL="99", DISABLE_CUPTI_LAZY_REINIT="1", TEARDOWN_CUPTI="0")
    with torch.profiler.profile() as seen:
        for _ in range(steps):
            step()
    name = "cu(da)?(Graph)?Launch" if device == "cuda" else "aten::"
    return sum(bool(re.match(name, call.name)) for call in seen.events()) / steps


def row(title: str, pictures: int, seconds: float, encoder: float) -> str:
    return f"{title:42s}{1000 * seconds:9.1f}{seconds / encoder:11.2f}{pictures / seconds:9.1f}"


def bench_step(config: train.Config, rounds: int) -> None:
    """Print what the parts of a training step cost and how much they ask for, and inference."""
    smpl = SMPL(config.smpl or None).to(config.device)
    model = train.build(config, smpl).eval()
    for B in (1, 64):
        image = torch.rand(B, 3, config.size, config.size, device=config.device)  # (B, 3, H, W)
        with torch.inference_mode():
            s, = in_turn([lambda: model.decode(model.regressor(model.encode(image))[-1], True)],
                         rounds)
        print(f"{f'inference, {B} at a time, all vertices':42s}{1000 * s:9.1f}{B / s:20.1f}")
    steps, ahead = bench_steps(config, smpl)
    seconds = in_turn(list(steps.values()), rounds, ahead)
    for (title, step), s in zip(steps.items(), seconds):              # counting slows later steps
        calls = count_calls(step, ahead, config.device)
        print(row(title, config.batch, s, seconds[0]) + f"{calls:11.0f}")


def bench_growth(config: train.Config, rounds: int) -> None:
    """Print how the cost of train()'s whole step grows, one setting at a time."""
    V = len(SMPL(config.smpl or None).v_template)
    for name, values in (("batch", (1, 4, 16, 64, 256)), ("size", (64, 96, 128, 224)),
                         ("depth", (18, 34, 50, 101, 152)), ("vertices", (V, max(V, 6890)))):
        for value in values:
            of = {name: value} if name != "vertices" else {}
            smpl = with_vertices(SMPL(config.smpl or None), V if of else value).to(config.device)
            steps, ahead = bench_steps(changed := dataclasses.replace(config, **of), smpl)
            encoder, *_, whole = steps.values()                       # on a GPU a recorded step
            encoder, whole = in_turn([encoder, whole], rounds, ahead)
            print(row(f"{name} {value}", changed.batch, whole, encoder), flush=True)


def with_vertices(smpl: SMPL, V: int) -> SMPL:
    """A body of V vertices for timing: the skin laid over itself, keypoints from its first layer.
    Its triangles do not shrink, so drawing it costs more than drawing a body as fine."""
    n = len(smpl.v_template)
    for name in ("v_template", "shapedirs", "posedirs", "weights"):
        setattr(smpl, name, getattr(smpl, name)[torch.arange(V) % n])
    for name in ("J_regressor", "cocoplus_regressor"):
        setattr(smpl, name, torch.nn.functional.pad(getattr(smpl, name), (0, V - n)))
    smpl.faces = torch.cat([smpl.faces + layer * n for layer in range(V // n)])
    return smpl


def textbook(smpl: SMPL, posedirs: Tensor, betas: Tensor, rotmats: Tensor) -> SMPLOutput:
    """SMPL as commonly written: (B, V, 4, 4) transforms, dense products, keypoints of all vertices;
    posedirs (207, 3V).  Only the kinematics are `lbs`'s own."""
    B, V = len(betas), len(smpl.v_template)
    v_shaped = smpl.v_template + torch.einsum("bn,vcn->bvc", betas, smpl.shapedirs)   # (B, V, 3)
    J = torch.einsum("bvc,jv->bjc", v_shaped, smpl.J_regressor)       # (B, 24, 3)
    feature = (rotmats[:, 1:] - torch.eye(3).to(rotmats)).reshape(B, 207)         # (B, 207)
    v_posed = v_shaped + (feature @ posedirs).view(B, V, 3)           # (B, V, 3)
    joints, A = batch_rigid_transform(rotmats, J, smpl.parents)       # A (B, 24, 4, 4)
    T = (smpl.weights.expand(B, V, 24) @ A.reshape(B, 24, 16)).view(B, V, 4, 4)   # (B, V, 4, 4)
    v_homogeneous = torch.cat([v_posed, v_posed.new_ones(B, V, 1)], 2)            # (B, V, 4)
    v = (T @ v_homogeneous[..., None])[:, :, :3, 0]                   # (B, V, 3)
    return SMPLOutput(v, joints, torch.einsum("kv,bvc->bkc", smpl.cocoplus_regressor, v))


def bench_smpl(rounds: int) -> None:
    """Print milliseconds of the three ways, which take turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    smpl = with_vertices(SMPL(), 6890).to(device)
    posedirs = smpl.posedirs.flatten(0, 1).T.contiguous()             # (207, 3V)
    ways = (lambda *inputs: textbook(smpl, posedirs, *inputs), smpl,
            lambda *inputs: smpl(*inputs, vertices=False))
    print(f"V = {len(smpl.v_template):,}, float32, from rotation matrices, medians of {rounds} "
          f"rounds, torch {torch.__version__}, {train.device_name(device.type)}\n"
          "   B  pass       textbook ms    full ms  ratio   keypoints only ms  ratio")
    for B, backward in itertools.product((1, 16, 64, 256), (False, True)):
        inputs = [x.to(device).requires_grad_(backward) for x in (
            torch.randn(B, 10), batch_rodrigues(0.3 * torch.randn(B, 24, 3)))]

        def once(way: Callable) -> None:
            out = [x for x in way(*inputs) if x is not None]
            if backward:                        # a gradient arrives at everything that came out
                torch.autograd.grad(out, inputs, [torch.ones_like(x) for x in out])
        a, b, c = in_turn([lambda way=way: once(way) for way in ways], rounds)
        print(f"{B:4d}  {'f + b' if backward else 'forward':7s} {1000 * a:14.2f} {1000 * b:10.2f} "
              f"{a / b:6.1f} {1000 * c:19.2f} {a / c:6.1f}", flush=True)


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m appendix.bench", allow_abbrev=False,
                                     description="Measure what a step, its growth, a body costs.")
    parser.add_argument("what", choices=("step", "grow", "smpl"))
    parser.add_argument("--rounds", type=int, metavar="N", default=10, help="number of rounds [10]")
    parser.add_argument("--small", action="store_true", help="settings of train.py --small")
    given, args = train.parse(parser, argv)
    if args.rounds < 1 or torch.distributed.is_torchelastic_launched():
        raise ValueError(f"--rounds {args.rounds}: expected 1 or more, in one process")
    if {"steps", "adv"} & set(given) or args.what == "smpl" and (given or args.small):
        raise ValueError("--steps, --adv: the bench times whole steps; smpl takes --rounds only")
    if args.what == "smpl":
        return bench_smpl(args.rounds)
    given = {"pretrained": "none"} | given      # as dear, and no download
    config = train.make_config(given, train.small_preset(given) if args.small else {})
    calls = "launches" if config.device == "cuda" else "operators"
    print(f"ResNet-{config.depth} of width {config.width}, {config.size} px, batch {config.batch}, "
          f"{train.PRECISION[config.amp]}; {train.device_name(config.device)}; medians of "
          f"{args.rounds} rounds\n{'ms':>51s}{'x encoder':>11s}{'img/s':>9s}"
          f"{calls * (args.what == 'step'):>11s}")
    (bench_step if args.what == "step" else bench_growth)(config, args.rounds)


def main(argv: list[str] | None = None) -> int:
    return exit_status("appendix.bench", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
