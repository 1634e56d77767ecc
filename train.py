"""Train HMR: hyperparameters, one step of the two players, the training loop, the measures.

Chapter 4 of 4 (smpl.py <- hmr.py <- data.py <- train.py).  HMR Sec. 3.4 and 4.

    python train.py --small --overfit --steps 150 --out runs/overfit    # can it learn one batch?
    python train.py --small                         # 7 to 12 minutes on two CPU cores
    python train.py --eval runs/small/checkpoint.pt # prints the table of a finished run again
    python train.py                                 # official settings (ResNet-50, 224 px)
    python train.py --resume --out runs/small       # goes on with a run that was stopped

Axes:  B pictures   T regression iterations   N = B * T   19 keypoints (the first 14 are LSP's)
       V vertices   P points   M recorded frames
"""

import argparse
import copy
import dataclasses
import datetime
import io
import json
import math
import os
import sys
import time
import urllib.error
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

from data import (CROPS, Batch, SyntheticPeople, draw_mesh, load_clips, load_mocap, mirror_pose,
                  save_png, seed_of, side_view)
from hmr import (CAM, HMR, LSP, Discriminator, HMROutput, discriminator_loss,
                 encoder_adversarial_loss, hip_midpoint, joints3d_loss, keypoint_loss,
                 pose_to_rotmats, smpl_loss, split_theta)
from smpl import (SMPL, batch_rodrigues, exit_status, load_tensors, require_finite, say,
                  write_atomically)

# --------------------------------------------------------------------------------------------
# 1. Hyperparameters
#
# Weights of the losses, batch, steps and rates are those of the official script, do_train.sh.  (The
# defaults of the official flags differ from it.)  A setting is our choice if its help names no
# source.

def option(default, help: str, choices: tuple | None = None, least: float | None = None,
           below: float = 2 ** 63):
    """A field of Config and a flag.  Its value is one of choices, or lies in [least, below)."""
    return dataclasses.field(default=default, metadata=dict(help=help, allowed=(choices, least,
                                                                                below)))


@dataclasses.dataclass(frozen=True)
class Config:
    # the network
    depth: int = option(50, "layers of the ResNet (Sec. 3.4: 50)", (18, 34, 50, 101, 152))
    width: int = option(64, "channels of the ResNet's first stage (slides: 64)", least=8)
    plain: bool = option(False, "ResNet without shortcuts (slides: deeper ones train worse)")
    iterations: int = option(3, "iterations T of the regressor (Sec. 3.4: 3)", least=1)
    dropout: float = option(0.5, "dropout in the regressor (official code: 0.5)", least=0, below=1)
    rotation: str = option("axis-angle", "form of the regressed rotations", ("axis-angle", "6d"))
    pretrained: str = option("imagenet", "initial weights of the encoder: imagenet, none, or FILE")
    # the world
    smpl: str = option("", "body file, .npz or official .pkl (default: the open body)")
    size: int = option(224, "side of the crop in pixels (Sec. 3.4: 224)", least=32)
    crop: str = option("official", "size of the person in the crop; tight is larger", tuple(CROPS))
    look: str = option("hard", "look of people and background", ("plain", "hard"))
    upright: bool = option(False, "restriction to the clips in which people are mostly upright")
    validate: str = option("", "CLIP that is left out of training and measured, to choose settings")
    paired: bool = option(True, "3D labels for half of each batch (Sec. 3.4; Fig. 4 has none)")
    # the losses; their weights assume the denominators in hmr.py
    adv: bool = option(True, "discriminators and L_adv (Sec. 3.3; Fig. 5 has neither them nor 3D)")
    weight_kp: float = option(60.0, "weight of L_reproj (do_train.sh: 60)", least=0)
    weight_joints: float = option(60.0, "weight of L_joints (do_train.sh: e_3d_weight 60)", least=0)
    weight_smpl: float = option(60.0, "weight of L_smpl (do_train.sh: e_3d_weight 60)", least=0)
    weight_adv: float = option(1.0, "weight of L_adv (do_train.sh: 1; Eq. (1))", least=0)
    # the optimisation; no weight decay, since the official code sets one but adds it to no loss
    batch: int = option(64, "pictures in a step (Sec. 3.4: 64)", least=2)
    # the released checkpoint's number, 74.99 of do_train.sh's 75 epochs; the paper says 55 epochs
    steps: int = option(667_589, "number of optimiser steps", least=1)
    lr: float = option(1e-5, "learning rate of encoder and regressor (Sec. 3.4: 1e-5)", least=0)
    lr_d: float = option(1e-4, "learning rate of the discriminators (Sec. 3.4: 1e-4)", least=0)
    schedule: str = option("constant", "course of both learning rates", ("constant", "onecycle"))
    amp: str = option("auto", "precision; auto is bf16 if native", ("auto", "bf16", "off"))
    overfit: bool = option(False, "training on ONE batch, as a check that the losses fall far")
    record: bool = option(True, "recording of the training step as one CUDA graph, on one GPU")
    # the run
    seed: int = option(0, "seed of initialisation and training; not of the evaluation", least=0)
    device: str = option("auto", "device; auto: cuda if there is one", ("auto", "cpu", "cuda"))
    out: str = option("", "folder of the run (default: runs/full; with --small: runs/small)")
    log_every: int = option(50, "steps that are averaged in one line of the log", least=1)
    picture_every: int = option(500, "steps between two pictures", least=1)
    eval_pictures: int = option(512, "pictures of held-out motion to measure at the end", least=1)


# --small is printed as a list of changes to the defaults.  It sees 4 million small pictures
# (256,000 without a GPU) instead of 43 million, so the learning rates are a hundred times the
# paper's, and fall to 0; their ratio is still 1:10.  There is no dropout, because no picture is
# seen twice.  L_joints and L_smpl have larger weights than in do_train.sh, L_adv has a smaller one.
# 6D rotations are continuous, while axis-angle jumps at half a turn.
SMALL = dict(depth=18, width=64, size=64, crop="tight", look="plain", upright=True, dropout=0.0,
             pretrained="none", rotation="6d", weight_joints=300.0, weight_smpl=120.0,
             weight_adv=0.25, lr=1e-3, lr_d=1e-2, schedule="onecycle", batch=256, steps=16_000)
SMALL_CPU = dict(width=32, size=48, batch=64, steps=4_000)            # without a GPU
EVALUATION_SEED = 2018                  # of the test pictures, which do not depend on --seed
SAVE_SECONDS = 60                       # at least, between two checkpoints


# --------------------------------------------------------------------------------------------
# 2. The training loop (Sec. 3.4)

class Losses(NamedTuple):
    """What one step reports: detached scalars, the log's columns.  Only loss_E is weighted."""
    loss_E: Tensor            # Eq. (1), weighted
    L_kp: Tensor              # Eq. (3)
    L_joints: Tensor          # Eq. (5)
    L_smpl: Tensor            # Eq. (6)
    L_adv: Tensor             # Eq. (7), computed AFTER D's step
    loss_D: Tensor            # Eq. (8)
    D_real: Tensor            # D's mean output on motion capture, BEFORE its step
    D_fake: Tensor            # D's mean output on predictions, BEFORE its step
    abs_beta: Tensor          # mean |beta| over predictions


def train_step(E: HMR, D: nn.Module, opt_E: torch.optim.Optimizer, opt_D: torch.optim.Optimizer,
               batch: Batch, motion: tuple[Tensor, Tensor] | None, config: Config) -> Losses:
    """One step of both players: E, the encoder with its regressor, and D, the 25 discriminators.

    motion: real rotations (N, 23, 3, 3) and betas (N, 10), as many as predictions; None without
    the adversary.  Under torchrun, E and D are wrapped so that `backward` averages their gradients
    over the processes.  Each process uses the denominators of its own losses.
    """
    thetas, pred = E(batch.image)    # T x (B, 85 or 157), the latter with 6D; decoded Theta_T
    # slides: "if t = T the full L, else L_adv": D judges all T of them, but not Theta_0
    _, pose, betas = split_theta(torch.cat(thetas))         # (N, 72 or 144), (N, 10); N = B * T
    rotmats = pose_to_rotmats(pose)[:, 1:]                            # (N, 23, 3, 3) without root
    D_real = D_fake = loss_D = L_adv = betas.new_zeros(())            # they stay 0 without D

    # ---- (1) update D:  min_D  sum_i (E[(D_i(Theta) - 1)^2] + E[D_i(E(I))^2])          Eq. (8) --
    if config.adv:
        real = D(*motion)                                             # (N, 25)
        fake = D(rotmats.detach(), betas.detach())                    # (N, 25) nothing reaches E
        loss_D, D_real, D_fake = discriminator_loss(real, fake), real.mean(), fake.mean()  # ()
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()

    # ---- (2) update E:  min_E  lambda (L_reproj + 1 L_3D) + L_adv                      Eq. (1) --
    # The paper's one lambda is three weights here.  Its indicator "1" says whether an image has 3D
    # labels; here each loss has a mask: visible, has_3d, has_smpl.
    L_kp = keypoint_loss(pred.keypoints2d, batch.keypoints2d, batch.visible)      # ()
    L_joints = joints3d_loss(pred.keypoints3d, batch.keypoints3d, batch.has_3d)   # ()
    L_smpl = smpl_loss(pred.rotmats, pred.betas, batch.rotmats, batch.betas, batch.has_smpl)  # ()
    if config.adv:                    # the official code updates D and E at once
        D.requires_grad_(False)       # only E learns from L_adv
        verdict = D(rotmats, betas)                                   # (N, 25)
        D.requires_grad_(True)
        L_adv = encoder_adversarial_loss(verdict)                     # ()
    L_3d = config.weight_joints * L_joints + config.weight_smpl * L_smpl          # Eq. (4)
    loss_E = config.weight_kp * L_kp + L_3d + config.weight_adv * L_adv           # Eq. (1)
    opt_E.zero_grad()
    loss_E.backward()
    opt_E.step()
    return Losses(*(value.detach() for value in (
        loss_E, L_kp, L_joints, L_smpl, L_adv, loss_D, D_real, D_fake, betas.abs().mean())))


def lr_factor(step: int, config: Config) -> float:
    """What both rates are multiplied by: 1, or one cycle (a linear rise, then a cosine to 0)."""
    if config.schedule == "constant":
        return 1.0
    rise = 0.1 * config.steps
    return (step + 1) / (rise + 1) if step < rise else (
        0.5 + 0.5 * math.cos(math.pi * (step - rise) / (config.steps - rise)))


def training_world(config: Config, smpl: SMPL) -> SyntheticPeople:
    """The training clips' people.  Under torchrun each process draws batch / P other pictures."""
    rank, ranks = rank_and_ranks()
    frames = load_mocap(config.upright, False, config.validate)       # (M, 24, 3)
    return SyntheticPeople(smpl, frames, config.batch // ranks, config.size, config.look,
                           config.seed, rank, "half" if config.paired else "2d", crop=config.crop)


def train(config: Config, checkpoint: dict | None = None, make_world: Callable = training_world,
          make_D: Callable = Discriminator, theta_bar: Callable | None = None) -> dict:
    """Train from the start or from a checkpoint, evaluate, and write all to the folder config.out.

    make_world(config, smpl) makes what to train on.  A world has `batch(step)`, `motion(n, step)`,
    `batch_size` and `name`, a string that says what the world is made of.  make_D() makes the
    discriminators, (N, 23, 3, 3) and (N, 10) -> (N, 25), which have an attribute `amp`.
    theta_bar(rotation) gives another start than the body file's mean pose, (1, 85 or 157).
    Returns what metrics.json holds.  Raises ValueError or OSError (a used folder, a bad file).
    After Ctrl-C it raises KeyboardInterrupt with a sentence that says how to go on.
    """
    config = settle(config)
    out, (rank, ranks) = Path(config.out), rank_and_ranks()           # 0 of 1 unless by torchrun
    if rank == 0 and not checkpoint and (out / "checkpoint.pt").exists():
        raise ValueError(f"--out {out}: holds a run already; name another folder, or go on with it "
                         f"by --resume --out {out}")
    torch.manual_seed(config.seed)                                    # initialisation
    smpl = SMPL(config.smpl or None).to(config.device)
    model, D = build(config, smpl), make_D().to(config.device)
    D.amp = model.amp
    if theta_bar and not checkpoint:            # a checkpoint holds its own
        model.regressor.theta_bar.copy_(theta_bar(config.rotation))   # (1, 85 or 157)
    elif not checkpoint and not smpl.mean_pose.any():
        say(f"{smpl.name} holds no mean_pose: the regressor starts from the T-pose")
    world = make_world(config, smpl)
    # slides: "encoder E" is the image encoder and the 3D module, here ResNet and regressor.
    opt_E, opt_D = adam(model, config.lr, config), adam(D, config.lr_d, config)
    parts = {"model": model, "discriminator": D, "opt_E": opt_E, "opt_D": opt_D}
    if checkpoint:
        restore(checkpoint, parts, world.name)
    else:
        load_pretrained(model.encoder, config)
        save(parts, 0, 0.0, config, world.name)     # so that --resume always has a checkpoint
    log, shown = Log(config, checkpoint), pictures_to_show(config, smpl, world)
    saved_step, saved_at = log.start, log.seconds()
    model.train(), D.train()
    E, wrapped_D = [average_gradients(net, ranks) for net in (model, D)]
    take_step = lambda batch, motion: train_step(E, wrapped_D, opt_E, opt_D, batch, motion, config)
    take_step = RecordedStep(take_step) if records(config) else take_step
    try:
        for step in range(log.start, config.steps):
            for optimizer, rate in ((opt_E, config.lr), (opt_D, config.lr_d)):
                set_rate(optimizer, rate * lr_factor(step, config))
            batch = world.batch(0 if config.overfit else step)
            N = config.iterations * world.batch_size                  # as many real as predicted
            motion = world.motion(N, step) if config.adv else None    # (N, 23, 3, 3), (N, 10)
            torch.manual_seed(seed_of(config.seed, step, rank))       # fixes dropout's masks
            losses = take_step(batch, motion)
            if log.add(step, losses) and (step + 1 == config.steps or
                                          log.seconds() > saved_at + SAVE_SECONDS):
                save(parts, step + 1, log.seconds(), config, world.name)
                saved_step, saved_at = step + 1, log.seconds()
            if (step + 1) % config.picture_every == 0 and rank == 0:
                save_png(out / "pictures" / f"step_{step + 1:06d}.png", overlays(model, shown))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; --resume --out {out} goes on from step {saved_step}"
                                ) from None
    metrics = finish(model, D, shown, log, world.name) if rank == 0 else {}
    if ranks > 1:
        dist.barrier()                                                # all leave together
    return metrics


# --------------------------------------------------------------------------------------------
# 3. The measures (Sec. 4.1): 3D errors are of the 14 LSP keypoints, 2D of all 19, PVE of the skin

def compute_similarity_transform(source: Tensor, target: Tensor) -> Tensor:
    """Procrustes: source (B, P, 3) moved onto target (B, P, 3) by a scale, rotation and shift.

    Each body has its own transform.  The rotation is proper (det = +1), since a mirrored body must
    count as wrong.  B and P >= 3 may have any values.
    """
    mu_s, mu_t = source.mean(1, keepdim=True), target.mean(1, keepdim=True)       # (B, 1, 3)
    s, t = source - mu_s, target - mu_t                               # (B, P, 3)
    # min over R, scale of |t - scale R s|^2: R from the SVD of the 3 x 3 covariance of t and s
    U, S, Vh = torch.linalg.svd(t.mT @ s)                             # (B, 3, 3), (B, 3), (B, 3, 3)
    sign = torch.ones_like(S)                                         # (B, 3)
    sign[:, 2] = torch.linalg.det(U @ Vh).sign()                      # undo a reflection
    R = U @ (sign[..., None] * Vh)                                    # (B, 3, 3)
    scale = (S * sign).sum(1) / s.square().sum((1, 2)).clamp(min=1e-12)           # (B,)
    return scale[:, None, None] * s @ R.mT + mu_t                     # (B, P, 3)


def pose_errors(pred: HMROutput, true: HMROutput) -> dict[str, Tensor]:
    """Per-picture errors of one decoded prediction against the truth (HMROutputs with vertices).

    mpjpe (B, 14), pa_mpjpe (B, 14), pve (B, V) in mm; px (B, 19) in pixels of a 224 crop; turned
    (B,): 100 where the root's rotation is over 90 degrees off.
    For MPJPE (as in the official code) and PVE both bodies are centred at their hips' midpoint.
    """
    hips_p, hips_t = hip_midpoint(pred.keypoints3d), hip_midpoint(true.keypoints3d)     # (B, 1, 3)
    p, t = pred.keypoints3d[:, :LSP] - hips_p, true.keypoints3d[:, :LSP] - hips_t     # (B, 14, 3)
    p_skin, t_skin = pred.vertices - hips_p, true.vertices - hips_t   # (B, V, 3)
    # The trace of A^T B is the sum of the products of their elements, and it is 1 + 2 cos(angle).
    trace = (pred.rotmats[:, 0] * true.rotmats[:, 0]).sum((1, 2))     # (B,)
    return {"mpjpe": 1000 * (p - t).norm(dim=-1),
            "pa_mpjpe": 1000 * (compute_similarity_transform(p, t) - t).norm(dim=-1),
            "pve": 1000 * (p_skin - t_skin).norm(dim=-1),
            "px": 112 * (pred.keypoints2d - true.keypoints2d).norm(dim=-1),
            "turned": 100.0 * (trace < 1)}


def summarize(errors: list[dict[str, Tensor]]) -> dict[str, float]:
    """Batches of pose_errors -> means, PCK@150 mm and AUC (0, 5 .. 150 mm) of MPJPE, in %.

    An error counts as correct if it is strictly below the threshold, as in MPI-INF-3DHP's official
    script, so that a perfect prediction has AUC 96.8 (30 of the 31 thresholds), not 100.
    """
    all_errors = {key: torch.cat([e[key] for e in errors]) for key in errors[0]}
    result = {key: value.mean().item() for key, value in all_errors.items()}
    mpjpe = all_errors["mpjpe"]                                       # (pictures, 14)
    result["pck"] = 100 * (mpjpe < 150).double().mean().item()
    thresholds = torch.arange(0, 151, 5, device=mpjpe.device)         # (31,)
    result["auc"] = 100 * (mpjpe[..., None] < thresholds).double().mean().item()
    return result


def recorded_rotations(config: Config, device) -> Tensor:
    """The training clips' frames and their mirror images -> (2M, 23, 9), without root."""
    pose = load_mocap(config.upright, False, config.validate)         # (M, 24, 3)
    pose = torch.cat([pose, mirror_pose(pose)])[:, 1:].to(device)     # (2M, 23, 3)
    return batch_rodrigues(pose).flatten(2)                           # (2M, 23, 9)


def monstrosity(body: HMROutput, recorded: Tensor) -> dict[str, Tensor]:
    """How far each body is from the recorded rotations (2M, 23, 9).

    outside (B, 23): 100 where a joint's rotation is over 20 degrees away from every rotation that
    was recorded of this joint (1 % of the held-out clips' rotations are); mocap (B,): degrees to
    the nearest recorded pose, mean over joints; beta3 (B, 10): 100 where |beta| is over 3
    standard deviations.  The root does not count, because every heading is possible.
    """
    rotmats = body.rotmats[:, 1:].flatten(2)                          # (B, 23, 9)
    cosine = (torch.einsum("bjk,fjk->bfj", rotmats, recorded) - 1) / 2      # (B, 2M, 23), by traces
    angle = cosine.clamp(-1, 1).acos().rad2deg()                      # (B, 2M, 23)
    # 20 degrees, because the noise of SyntheticPeople.poses stays below 12 in 1,999 of 2,000 cases
    return {"outside": 100.0 * (angle.amin(1) > 20), "mocap": angle.mean(2).amin(1),
            "beta3": 100.0 * (body.betas.abs() > 3)}


def evaluation_pictures(config: Config, smpl: SMPL, frames: Tensor | None = None
                        ) -> Iterator[Batch]:
    """Yield the test set in batches of 64, on the device of `smpl`.

    Its poses are recorded frames (M, 24, 3) without limb mixing, by default the held-out clips'.
    It is drawn on the CPU, so that it shows the same people on every machine.
    """
    frames = load_mocap(config.upright, True, config.validate) if frames is None else frames
    world = SyntheticPeople(copy.deepcopy(smpl).cpu(), frames, 64, config.size, config.look,
                            EVALUATION_SEED, labels="all", mix=False, crop=config.crop)
    for first in range(0, config.eval_pictures, 64):
        batch = world.batch(first // 64)
        yield Batch(*(part[:config.eval_pictures - first].to(smpl.v_template.device)
                      for part in batch))


def mean_camera(config: Config, smpl: SMPL) -> Tensor:
    """The training world's mean camera (1, 3), which the lazy guesses of `evaluate` use."""
    frames = load_mocap(config.upright, False, config.validate)       # (M, 24, 3)
    world = SyntheticPeople(copy.deepcopy(smpl).cpu(), frames, 512, 2, seed=EVALUATION_SEED,
                            crop=config.crop)     # 2 pixels: only cameras are wanted
    cam = torch.cat([world.batch(step).cam for step in range(4)])     # (2048, 3)
    return cam.mean(0, keepdim=True).to(smpl.v_template.device)       # (1, 3)


# Lazy guesses do not look at the picture; the second one is told the true root rotation.
GUESSES = {"baseline": "Theta-bar", "mean_pose": "mean pose, true heading"}


@torch.no_grad()
def evaluate(model: HMR, config: Config, D: nn.Module | None = None,
             frames: Tensor | None = None, cam: Tensor | None = None) -> dict:
    """All measures on the held-out clips, or on frames (M, 24, 3).

    The table has a row for each iteration, for the truth, and for two lazy guesses under the mean
    camera (cam).  "baseline" is Theta-bar, which faces us, while people face anywhere.  "mean_pose"
    has the true root rotation, so that only the pose is guessed.  With D, "heads" holds the mean
    output of each discriminator on Theta_T and on motion.  Model and D are measured, and left, in
    eval mode and in float32.  Raises ValueError for bodies that are not finite.
    """
    model.eval().amp = None       # batch norm uses its running statistics, dropout is off
    baseline = model.regressor.theta_bar.clone()                      # (1, 85)
    baseline[:, CAM] = mean_camera(config, model.smpl) if cam is None else cam
    recorded = recorded_rotations(config, baseline.device)            # (2M, 23, 9)
    errors, scores = {}, []
    for batch in evaluation_pictures(config, model.smpl, frames):
        thetas, _ = model(batch.image)                                # T x (B, 85)
        bar = model.decode(baseline.expand(len(batch.image), -1), vertices=True)
        turned = torch.cat([batch.rotmats[:, :1], bar.rotmats[:, 1:]], 1)         # (B, 24, 3, 3)
        bodies = {"truth": model.body(batch.cam, batch.rotmats, batch.betas), "baseline": bar,
                  "mean_pose": model.body(bar.cam, turned, bar.betas)}
        bodies |= {f"iteration {t}": model.decode(theta, vertices=True)
                   for t, theta in enumerate(thetas, 1)}
        for name, body in bodies.items():
            if not body.vertices.abs().max() < 1e6:                   # NaN, too
                raise ValueError("bodies are not finite or 1,000 km large; lower the rates")
            errors.setdefault(name, []).append(pose_errors(body, bodies["truth"])
                                               | monstrosity(body, recorded))
        if D is not None:
            D.amp, theta_T = None, bodies[f"iteration {len(thetas)}"]
            scores.append(D(theta_T.rotmats[:, 1:], theta_T.betas))   # (B, 25)
    of = {name: summarize(batches) for name, batches in errors.items()}
    per_iteration = [of[f"iteration {t}"] for t in range(1, config.iterations + 1)]
    result = per_iteration[-1] | {key: of[key] for key in ("truth", *GUESSES)} | dict(
        per_iteration=per_iteration, measured_on=config.validate or "held-out clips")
    if D is not None:       # one number for each of the 25: which tell real from fake?
        # Training ends before the step number `steps`, so D has not seen this motion.
        motion = training_world(config, model.smpl).motion(2048, config.steps)    # 2048 samples
        result["heads"] = {"real": D(*motion).mean(0).tolist(),
                           "fake": torch.cat(scores).mean(0).tolist()}
    return result


# ============================================================================================
# Not needed to understand HMR: building, checkpoints, the log, the command line.

def check(config: Config) -> None:
    """Raises ValueError for a value that the command line would not take."""
    for f in dataclasses.fields(config):
        value, (choices, least, below) = getattr(config, f.name), f.metadata["allowed"]
        kinds = (float, int) if type(f.default) is float else (type(f.default),)
        if type(value) not in kinds or choices and value not in choices or (
                least is not None and not least <= value < below):
            wanted = (f"one of {choices}" if choices else f"{least} or more, below {below:g}"
                      if least is not None else f"a value such as {f.default!r}")
            raise ValueError(f"{flag(f.name)} {value}: expected {wanted}")


def settle(config: Config) -> Config:
    """Check a Config and replace "auto" and the empty folder.  Raises ValueError."""
    check(config)
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    if config.device not in ("auto", device):
        raise ValueError("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    amp = config.amp if config.amp != "auto" else "bf16" if native_bf16(device) else "off"
    ranks = rank_and_ranks()[1]
    if config.batch % ranks or config.batch < 2 * ranks:
        raise ValueError(f"--batch {config.batch}: expected 2 or more pictures for each of {ranks} "
                         f"processes, equally many")
    return dataclasses.replace(config, device=device, amp=amp, out=config.out or "runs/full")


def native_bf16(device: str) -> bool:
    """Does the hardware compute in bf16?  Older PyTorch cannot tell for a CPU and says no."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else \
        getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)


def build(config: Config, smpl: SMPL) -> HMR:
    """A fresh model on the device of `smpl`."""
    # TF32 would move a body by 1 mm, and it is a GPU's default in convolutions.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    model = HMR(smpl, config.depth, config.iterations, config.width, config.plain, config.dropout,
                config.rotation, torch.bfloat16 if config.amp == "bf16" else None)
    # channels_last is the fastest memory layout for convolutions.
    return model.to(smpl.v_template.device).to(memory_format=torch.channels_last)


def adam(network: nn.Module, rate: float, config: Config) -> torch.optim.Adam:
    """Adam with its usual betas.  `fused` runs one kernel; only rounding differs."""
    is_recorded = records(config)       # a recorded step reads the rate from a tensor
    lr = torch.tensor(rate, device=config.device) if is_recorded else rate
    return torch.optim.Adam(network.parameters(), lr, fused=True, capturable=is_recorded)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    group = optimizer.param_groups[0]
    group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate


def records(config: Config) -> bool:
    """Is the training step recorded?  On one GPU, unless --no-record."""
    return config.record and config.device == "cuda" and rank_and_ranks()[1] == 1


class RecordedStep:
    """A training step whose kernels are recorded once and then launched together, as a CUDA graph.

    Python launches a step of --small as 1,724 kernels, one by one, at some 30 microseconds each.
    On one H100 such a step takes 41 to 51 ms, and its kernels take 14: the GPU waits for
    Python.  A graph is one launch.  A prototype of this class brought the step to 11.5 ms, and to
    6.5 ms with pictures drawn ahead.

    The recording holds addresses, not values.  So each batch is copied into the tensors that were
    there at the recording, and the losses that it returns are overwritten by the next launch.  The
    first three steps are ordinary ones: libraries choose their algorithms in them, and optimisers
    make their state.  Random numbers (dropout) follow torch.manual_seed at each launch.  The
    recording keeps its memory, so that a small card may need --no-record.
    Raises ValueError if the step cannot be recorded.
    """

    def __init__(self, step: Callable):
        self.step, self.ordinary, self.graph = step, 3, None
        self.stream = torch.cuda.Stream()       # of ordinary steps and recording: the same one

    def __call__(self, batch: Batch, motion: tuple[Tensor, Tensor] | None) -> Losses:
        if self.ordinary > 0:
            self.ordinary -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                losses = self.step(batch, motion)
            torch.cuda.current_stream().wait_stream(self.stream)
            return losses
        tensors = *batch, *(motion or ())
        if self.graph is None:
            self.graph, self.tensors = torch.cuda.CUDAGraph(), [x.clone() for x in tensors]
            batch, motion = Batch(*self.tensors[:len(batch)]), self.tensors[len(batch):] or None
            try:        # thread_local: another thread (a DataLoader's) may go on calling CUDA
                with torch.cuda.graph(self.graph, stream=self.stream,
                                      capture_error_mode="thread_local"):
                    self.losses = self.step(batch, motion)            # executes nothing yet
            except RuntimeError as error:
                # The context is the first error, if ending the recording failed, too.
                raise ValueError(f"the training step cannot be recorded ("
                                 f"{error.__context__ or error!s:.99}); give --no-record") from None
        for mine, new in zip(self.tensors, tensors):
            mine.copy_(new)
        self.graph.replay()
        return self.losses


def downloaded(weights, option: str, remedy: str) -> dict:
    """torchvision's weights by name, from its cache or the network.  Raises ValueError."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        return weights.get_state_dict(check_hash=True, weights_only=True)
    except Exception as error:
        no_network = isinstance(error, (urllib.error.URLError, TimeoutError, ConnectionError))
        why = (f"no network to reach {weights.url}" if no_network else
               f"{file} cannot be read or written" if isinstance(error, OSError) else
               f"{file} is cut or not what its name says; delete it, if it is there")
        raise ValueError(f"{option}: {why} ({type(error).__name__}); {remedy}") from None


def load_pretrained(encoder: nn.Module, config: Config) -> None:
    """Fill the encoder with the weights that --pretrained names, if any.  Raises ValueError."""
    if config.pretrained == "none":
        return
    if config.pretrained == "imagenet":
        weights = torchvision.models.get_model_weights(f"resnet{config.depth}")["IMAGENET1K_V1"]
        weights = downloaded(weights, "--pretrained imagenet", "or give --pretrained FILE or none")
    else:
        weights = load_tensors(Path(config.pretrained))
        require_finite(weights, config.pretrained)
    try:                                        # without torchvision's classifier
        encoder.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fc.")})
    except (RuntimeError, AttributeError):
        raise ValueError(f"--pretrained {config.pretrained}: expected torchvision's names, and "
                         f"sizes of depth {config.depth}, width {config.width}") from None


# --------------------------------------------------------------------------------------------
# Checkpoints

def save(parts: dict, step: int, seconds: float, config: Config, world: str) -> None:
    """Write checkpoint.pt, all that a continuation needs.  Raises ValueError, OSError.

    That is both networks with batch norm's statistics, Adam's states, step, seconds, settings, the
    world's name, and the body's name and hash.  Learning rates, dropout's masks and pictures are
    functions of (settings, seed, step, rank), so that no random state is kept.  On a CPU saving
    takes 0.2 to 0.4 seconds for --small (72 MiB) and 1.7 for the full recipe (328 MiB).
    """
    if rank_and_ranks()[0] > 0:
        return
    smpl, file = parts["model"].smpl, io.BytesIO()
    # An optimiser's settings come from the config, so only its state is kept.
    content = {name: part.state_dict() if isinstance(part, nn.Module) else
               {"state": part.state_dict()["state"]} for name, part in parts.items()}
    for name, state in content.items():
        require_finite(state, f"{name} after step {step}",
                       f"lower --lr {config.lr:g}; a checkpoint saved before is kept")
    content |= {"step": step, "seconds": seconds, "world": world,
                "config": dataclasses.asdict(config), "body": [smpl.name, smpl.sha256]}
    torch.save(content, file)
    write_atomically(Path(config.out) / "checkpoint.pt", file.getvalue(), is_new=step == 0)


def load_checkpoint(path: Path, smpl: str | None = None) -> dict:
    """A run's checkpoint.pt, checked; smpl: the body file's place, if it has moved.

    Raises ValueError or FileNotFoundError.
    """
    kinds = dict(model=dict, discriminator=dict, opt_E=dict, opt_D=dict, config=dict, body=list,
                 world=str, step=int, seconds=float)
    checkpoint, default = load_tensors(path), dataclasses.asdict(Config())
    if checkpoint.keys() != kinds.keys() or any(
            not isinstance(checkpoint[key], kind) for key, kind in kinds.items()) or \
            checkpoint["config"].keys() != default.keys():
        raise ValueError(f"{path}: not a checkpoint of this version of train.py; name one")
    checkpoint["config"]["smpl"] = smpl or checkpoint["config"]["smpl"]
    try:
        check(Config(**checkpoint["config"]))
        for name in ("model", "discriminator", "opt_E", "opt_D"):
            require_finite(checkpoint[name], name)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a run's checkpoint ({error})") from None
    return checkpoint


def restore(checkpoint: dict, parts: dict, world: str | None = None) -> None:
    """Fill networks and optimisers.  Raises ValueError for another body, world or program."""
    (name, sha256), smpl = checkpoint["body"], parts["model"].smpl
    if sha256 != smpl.sha256:
        raise ValueError(f"--smpl: the checkpoint was trained with {name} (sha256 {sha256[:12]}), "
                         f"this is {smpl.name} ({smpl.sha256[:12]}); name the same file")
    if world not in (None, checkpoint["world"]):
        raise ValueError(f"--resume: the run was trained on {checkpoint['world']}, this command "
                         f"trains on {world}; go on by the command that began the run")
    try:
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                part.load_state_dict(checkpoint[name])
            else:
                part.load_state_dict(part.state_dict() | {"state": checkpoint[name]["state"]})
                for p, kept in part.state.items():      # PyTorch itself compares no shapes
                    if any((kept[key].shape, kept[key].stride()) != (p.shape, p.stride())
                           for key in ("exp_avg", "exp_avg_sq")):
                        raise ValueError(name)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"the checkpoint's {name} does not fit the settings in it") from None


def load(path: str | os.PathLike, smpl: str | os.PathLike | None = None,
         device: str = "auto") -> tuple[HMR, Discriminator, Config]:
    """A trained model to use from Python: HMR in eval mode, its discriminators, its settings.

    path: a run's checkpoint.pt; smpl: the body file, if it is no longer where it was in training.
    The model computes in float32; set `model.amp = torch.bfloat16` for speed.  Raises
    FileNotFoundError or ValueError.
    """
    checkpoint = load_checkpoint(Path(path), os.fspath(smpl or ""))
    config = settle(Config(**checkpoint["config"] | {"device": device}))
    model = build(config, SMPL(config.smpl or None).to(config.device))
    D, model.amp = Discriminator().to(config.device), None
    restore(checkpoint, {"model": model, "discriminator": D})
    return model.eval(), D, config


# --------------------------------------------------------------------------------------------
# The log and the results

class Log:
    """One fixed-width line, and one row of log.csv, for every `log_every` steps: their means."""
    COLUMNS = ("step", *Losses._fields, "img/s", "left")

    def __init__(self, config: Config, checkpoint: dict | None = None):
        self.config, self.values, rows = config, [], [",".join(self.COLUMNS)]
        self.start, self.before = (checkpoint["step"], checkpoint["seconds"]) if checkpoint else (
            0, 0.0)
        self.path = Path(config.out) / "log.csv" if rank_and_ranks()[0] == 0 else Path(os.devnull)
        if not checkpoint and self.path.is_file():      # without a checkpoint it belongs to no run
            self.path.replace(self.path.with_suffix(".csv.old"))
        if checkpoint and self.path.is_file():  # whole rows, without what came after the checkpoint
            old = self.path.read_text(encoding="utf-8").split("\n")[1:-1]
            rows += [row for row in old if int(row.split(",")[0]) <= self.start]
        self.path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        say("".join(f"{name:>10s}" for name in self.COLUMNS))
        self.begun = self.line_begun = time.perf_counter()

    def seconds(self) -> float:
        """Training time so far, earlier parts of the run included."""
        return self.before + time.perf_counter() - self.begun

    def add(self, step: int, losses: Losses) -> bool:
        """Keep a step's losses.  After `log_every` steps write a line of means -> was one written?

        The losses stay on the device until then, so that the program does not wait for a GPU.
        Raises ValueError if they are not finite.
        """
        self.values.append(torch.stack(losses))                       # (9,)
        if (step + 1) % self.config.log_every and step + 1 < self.config.steps:
            return False
        means, ranks = torch.stack(self.values).mean(0), rank_and_ranks()[1]      # (9,)
        if ranks > 1:
            dist.all_reduce(means)
        means = (means / ranks).tolist()
        if not math.isfinite(sum(means)):
            raise ValueError(f"the losses are no longer finite at step {step + 1}: lower --lr "
                             f"{self.config.lr:g}; {self.path} may show which term grew first")
        now = time.perf_counter()
        rate = len(self.values) * self.config.batch / (now - self.line_begun)
        left = (self.config.steps - step - 1) * (now - self.begun) / (step + 1 - self.start)
        self.line_begun, self.values = now, []
        row = [step + 1, *(f"{m:.6g}" for m in means), f"{rate:.1f}", round(left)]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(",".join(map(str, row)) + "\n")
        say(f"{step + 1:10d}" + "".join(f"{m:10.4g}" for m in means) + f"{rate:10.0f}"
            f"{str(datetime.timedelta(seconds=round(left))):>10s}")
        return True


def pictures_to_show(config: Config, smpl: SMPL, world) -> Batch:
    """Four pictures for `overlays`: held-out drawn people, or the first four of another world."""
    if world.name == SyntheticPeople.name:
        return next(evaluation_pictures(dataclasses.replace(config, eval_pictures=4), smpl))
    return Batch(*(part[:4] for part in world.batch(0)))


@torch.no_grad()
def overlays(model: HMR, batch: Batch, size: int = 224) -> Tensor:
    """input | overlay | turned by 90 degrees, one row a picture -> (3, B * size, 3 * size)."""
    pred = model.decode(model.eval()(batch.image)[0][-1], vertices=True)
    model.train()                                                     # training goes on
    image = nn.functional.interpolate(batch.image, (size, size), mode="bilinear")  # (B, 3, H, W)
    overlay = draw_mesh(pred.vertices, model.smpl.faces, pred.cam, size, image)
    turned = draw_mesh(side_view(pred.vertices), model.smpl.faces, pred.cam, size)    # as `overlay`
    return torch.cat([torch.cat(list(column), 1) for column in (image, overlay, turned)], 2)


def finish(model: HMR, D: nn.Module, shown: Batch, log: Log, world: str) -> dict:
    """Make the table, the picture and metrics.json of a finished run -> what metrics.json holds."""
    config, out, seconds = log.config, Path(log.config.out), log.seconds()
    save_png(out / "picture.png", overlays(model, shown))
    metrics = evaluate(model, config, D if config.adv else None) if (
        world == SyntheticPeople.name) else {}  # another world is measured by its own program
    metrics |= {"seconds": seconds, "images": config.steps * config.batch,
                "precision": PRECISION[config.amp], "device": device_name(config.device),
                "torch": torch.__version__, "seed": config.seed,
                "config": dataclasses.asdict(config)}
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False).encode())
    if "truth" in metrics:
        print_table(metrics)
    say(f"{metrics['images']:,} pictures in {seconds / 60:.1f} min on {metrics['device']}: {out}")
    return metrics


PRECISION = {"off": "float32", "bf16": "bf16 (encoder, D)"}              # of training
MEASURES = (("mpjpe", "MPJPE mm"), ("pa_mpjpe", "PA-MPJPE mm"), ("pve", "PVE mm"),
           ("px", "2D px/224"), ("pck", "PCK@150 %"), ("auc", "AUC %"), ("turned", "turned %"),
           ("outside", "outside %"), ("mocap", "mocap deg"), ("beta3", "beta>3 %"))


def print_table(metrics: dict) -> None:
    say(f"{metrics['measured_on']}, measured in float32; trained in {metrics['precision']}")
    say(" " * 24 + "".join(f"{title:>12s}" for _, title in MEASURES))
    rows = {title: metrics[key] for key, title in GUESSES.items()}
    rows |= {f"iteration {t}": row for t, row in enumerate(metrics["per_iteration"], 1)}
    for name, row in {**rows, "truth": metrics["truth"]}.items():
        say(f"{name:24s}" + "".join(f"{row[key]:12.1f}" for key, _ in MEASURES))
    share = [100 * metrics[key] / metrics["mean_pose"][key] for key, _ in MEASURES[:4]]    # errors
    say(f"{'% of that mean pose':24s}" + "".join(f"{s:12.0f}" for s in share))
    for side, heads in metrics.get("heads", {}).items():
        say(f"D's {len(heads)} outputs on {side}: {min(heads):.2f} to {max(heads):.2f}")


def print_clips(model: HMR, config: Config) -> None:
    """Print PA-MPJPE of every clip beside the mean pose's: does the network generalise?"""
    say(f"PA-MPJPE mm of the network, of the mean pose; {config.eval_pictures} pictures a clip")
    cam = mean_camera(config, model.smpl)                             # (1, 3) the same for all
    for kind, held_out in (("training clip", False), ("measured clip", True)):
        for name, frames in load_clips(config.upright, held_out, config.validate).items():
            of = evaluate(model, config, frames=frames, cam=cam)
            say(f"{kind:16s}{name:12s}{of['pa_mpjpe']:8.1f}{of['mean_pose']['pa_mpjpe']:8.1f}")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else \
        f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


# --------------------------------------------------------------------------------------------
# Several processes

def join_the_ranks(device: str) -> None:
    """Join the P processes ("ranks") that torchrun started, one a GPU.  Does nothing without it.

    Each process draws batch / P pictures, `backward` averages the gradients, so that all take the
    same step, and rank 0 alone prints, saves and evaluates.
    """
    if not dist.is_torchelastic_launched():
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))          # "cuda" now means this one
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")


def rank_and_ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average_gradients(network: nn.Module, ranks: int) -> nn.Module:
    """Under torchrun, a wrapper whose `backward` averages gradients over the processes."""
    # Buffers are not synchronised: SMPL's never change, and rank 0's of batch norm are saved.
    return network if ranks == 1 else nn.parallel.DistributedDataParallel(
        network, broadcast_buffers=False)


# --------------------------------------------------------------------------------------------
# The command line

def flag(name: str) -> str:
    """A field's name on the command line."""
    return "--" + name.replace("_", "-")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[dict, object]:
    """Make every field of Config a flag, then parse -> (the fields that were given, the rest)."""
    fields = dataclasses.fields(Config)
    for f in fields:
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else \
            {"type": type(f.default), "choices": f.metadata["allowed"][0]}
        text = f"{f.metadata['help']} [{f.default}]".removesuffix(" []").replace("%", "%%")
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **kind)
    args = parser.parse_args(argv)
    return {f.name: getattr(args, f.name) for f in fields if hasattr(args, f.name)}, args


def make_config(given: dict, preset: dict) -> Config:
    """The defaults, then a preset, then the flags that were given.  Raises ValueError."""
    config = settle(Config(**(preset | given)))
    if config.pretrained == "none" and config.lr == Config.lr:
        say(f"--lr {config.lr:g} suits pretrained weights; 1e-4 suits a fresh start")
    return config


def small_preset(given: dict) -> dict:
    """--small's changes of the defaults, printed; without a GPU the run is smaller."""
    no_gpu = given.get("device") == "cpu" or not torch.cuda.is_available()
    preset = SMALL | (SMALL_CPU if no_gpu else {})
    changes = [f"{k} {getattr(Config, k)} -> {v}" for k, v in (preset | given).items()
               if v != getattr(Config, k) and k not in ("device", "out")]
    say(f"--small{' without a GPU' if no_gpu else ''} changes: " + ", ".join(changes))
    return preset


def only(allowed: str, given: dict, option: str) -> None:
    for name in sorted(set(given) - set(allowed.split())):
        raise ValueError(f"{flag(name)}: {option} keeps the run's own settings; leave it out")


def continuation(given: dict) -> tuple[Config, dict]:
    """--resume: the settings and the checkpoint to go on with.  ValueError for another run's."""
    only("out smpl device steps record log_every picture_every eval_pictures", given, "--resume")
    given = {"device": "auto", "out": "runs/full"} | given
    path = Path(given["out"]) / "checkpoint.pt"
    checkpoint = load_checkpoint(path, given.get("smpl"))
    for left_over in path.parent.glob(".checkpoint.pt.*"):            # by a killed process
        left_over.unlink(missing_ok=True)
    config = make_config(given, checkpoint["config"])
    done, planned = checkpoint["step"], checkpoint["config"]["steps"]
    if config.schedule == "onecycle" and config.steps != planned:
        raise ValueError(f"--steps {config.steps}: the run's one cycle of learning rates ends at "
                         f"step {planned}; train anew with these --steps and another --out")
    if config.steps < done or (config.steps == done and path.with_name("metrics.json").exists()):
        raise ValueError(f"--resume: the run has already done {done} steps; measure it by --eval "
                         f"{path}, or if its rate is constant give more --steps")
    return config, checkpoint


def measure(path: Path, given: dict) -> None:
    """--eval: the table of a finished run, and its errors clip by clip."""
    only("smpl device eval_pictures", given, "--eval")
    model, D, config = load(path, given.get("smpl"), given.get("device", "auto"))
    config = settle(dataclasses.replace(config, **given))
    say(f"trained on {load_checkpoint(path, given.get('smpl'))['world']}")
    print_table(evaluate(model, config, D if config.adv else None)
                | {"precision": PRECISION[config.amp]})
    print_clips(model, dataclasses.replace(config, eval_pictures=min(128, config.eval_pictures)))


def run(argv: list[str] | None, make_world: Callable = training_world,
        make_D: Callable = Discriminator, theta_bar: Callable | None = None) -> None:
    """The command.  Another program trains through it by the last three, which are train()'s."""
    parser = argparse.ArgumentParser(description="Train HMR, or measure it.", allow_abbrev=False)
    parser.add_argument("--small", action="store_true", help="preset of a small network")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="continuation of the run in --out")
    mode.add_argument("--eval", metavar="CHECKPOINT", type=Path, help="checkpoint to measure only")
    given, args = parse(parser, argv)
    join_the_ranks(given.get("device", "auto"))
    if args.eval:
        measure(args.eval, given | ({"small": True} if args.small else {}))       # refused there
    else:
        given |= {"out": given.get("out", "runs/small")} if args.small else {}
        config, checkpoint = continuation(given) if args.resume else (
            make_config(given, small_preset(given) if args.small else {}), None)
        train(config, checkpoint, make_world, make_D, theta_bar)
    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    return exit_status("train.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
