"""Train HMR: hyperparameters, one step of the two players, the straight loop, the measures.

Chapter 4 of 4 (smpl.py <- hmr.py <- data.py <- train.py).  HMR Sec. 3.4 and 4.

    python train.py --small --overfit --steps 150 --out runs/overfit    # is one batch learnt?
    python train.py --small                         # about 10 minutes on two CPU cores
    python train.py --eval runs/small/checkpoint.pt # the table again
    python train.py                                 # official recipe (ResNet-50, 224 px): days
    python train.py --resume --out runs/small       # go on after Ctrl-C

Axes:  B pictures   T regression iterations   N = B * T   19 keypoints (first 14 = LSP)   V vertices
       P points   M recorded frames
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import io
import json
import math
import os
import signal
import sys
import tempfile
import time
import urllib.error
from pathlib import Path
from typing import Iterator, NamedTuple

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

from data import (CROPS, Batch, SyntheticPeople, load_clips, load_mocap, look_at, mirror_pose,
                  save_png)
from hmr import (CAM, HMR, LSP, Discriminator, HMROutput, center_hips, discriminator_loss,
                 encoder_adversarial_loss, joints3d_loss, keypoint_loss, pose_to_rotmats, smpl_loss,
                 split_theta)
from smpl import SMPL, batch_rodrigues, exit_status, say, write_atomically

# --------------------------------------------------------------------------------------------
# 1. Hyperparameters.  Losses, batch, steps and rates are the official do_train.sh's (the official
#    flags' own defaults differ).

def option(default, help: str, choices: tuple | None = None, least: float | None = None,
           below: float = 2 ** 63, many: type | None = None):
    """A field of Config and a flag of the command line: one of choices, or in [least, below), or a
    tuple of many."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, least=least,
                                                            below=below, many=many))


@dataclasses.dataclass(frozen=True)
class Config:
    # the network
    depth: int = option(50, "layers of the ResNet (Sec. 3.4: 50)", (18, 34, 50, 101, 152))
    width: int = option(64, "channels of its first stage (slides: 64)", least=8)
    plain: bool = option(False, "no shortcuts (slides: deeper plain networks train worse)")
    iterations: int = option(3, "T of the regressor (Sec. 3.4); 1: in one go (Sec. 3.2)", least=1)
    dropout: float = option(0.5, "after both hidden layers (official code: 0.5)", least=0, below=1)
    rotation: str = option("axis-angle", "of the regressor; 6d: SPIN's", ("axis-angle", "6d"))
    pretrained: str = option("imagenet", "encoder's weights: imagenet, none, or a state-dict FILE")
    # the world
    smpl: str = option("", "body FILE, .npz or official .pkl (default: the open body)")
    size: int = option(224, "side of the crop, pixels (Sec. 3.4: 224)", least=32)
    crop: str = option("official", "size of the person in it; tight: larger", tuple(CROPS))
    look: str = option("hard", "how people and backgrounds look (ours)", ("plain", "hard"))
    upright: bool = option(False, "only the clips in which people are mostly upright (ours)")
    validate: str = option("", "a training CLIP to leave out and measure, to choose settings by")
    paired: bool = option(True, "half of each batch has 3D labels (Sec. 3.4); no: Fig. 4")
    # photographs in its place (appendix/datasets.py)
    data: tuple = option((), "coco:FILE@IMAGES, spin:FILE@IMAGES or lsp:DIR, several", many=str)
    mix: tuple = option((), "of --data: a weight each (default: half 2D, half 3D)", many=float)
    mocap: str = option("", "with --data, of the adversary: AMASS' DIR (default: the open clips)")
    workers: int = option(2, "processes that load --data", least=0)
    joint_regressor: str = option("", "for --eval with --data: J_regressor_h36m.npy")
    smpl_genders: tuple = option((), "for --eval with --data: MALE and FEMALE body FILE", many=str)
    # the losses; they only mean something with hmr.py's denominators
    adv: bool = option(True, "D and L_adv (Sec. 3.3); without them and 3D: monsters (Fig. 5)")
    weight_kp: float = option(60.0, "of L_reproj (do_train.sh: 60; the paper's lambda)", least=0)
    weight_joints: float = option(60.0, "of L_joints (do_train.sh: e_3d_weight 60)", least=0)
    weight_smpl: float = option(60.0, "of L_smpl (do_train.sh: e_3d_weight 60)", least=0)
    weight_adv: float = option(1.0, "of L_adv (do_train.sh: 1; Eq. (1))", least=0)
    # the optimisation; no weight decay: the official flags register one that no loss ever reads
    batch: int = option(64, "pictures a step (Sec. 3.4: 64)", least=2)
    # the released checkpoint's: do_train.sh's 75 epochs of 569,753 / 64 (the paper says 55)
    steps: int = option(667_589, "optimiser steps", least=1)
    lr: float = option(1e-5, "of encoder and regressor, Adam (Sec. 3.4)", least=0)
    lr_scratch: float = option(1e-4, "of the same without pretrained weights (ours)", least=0)
    lr_d: float = option(1e-4, "of the discriminators, Adam (Sec. 3.4: ten times E's)", least=0)
    schedule: str = option("constant", "onecycle: rise, anneal (ours)", ("constant", "onecycle"))
    amp: str = option("auto", "of encoder and D; auto: bf16 if native", ("auto", "bf16", "off"))
    overfit: bool = option(False, "train on ONE batch: L_kp, L_joints, L_smpl must fall far")
    # the run
    seed: int = option(0, "of initialisation and training; not of the evaluation", least=0)
    device: str = option("auto", "cuda where there is one", ("auto", "cpu", "cuda"))
    out: str = option("", "folder of the run (default: runs/full; --small: runs/small)")
    log_every: int = option(50, "steps a log line; its numbers are means over them", least=1)
    picture_every: int = option(500, "steps between pictures", least=1)
    save_every: int = option(500, "steps between checkpoints", least=1)
    eval_pictures: int = option(512, "pictures of held-out motion at the end", least=1)


# --small: printed as a diff from the above.  2 million small pictures (256,000 without a GPU)
# instead of 43 million: learning rates a hundred times the paper's, annealed (still 1:10); no
# dropout (nothing is seen twice); joints and rotations weigh more against the adversary, and it
# less against the 2D; 6D rotations have no seam that a body turning round must jump over (these
# three, and 48 px without a GPU, were ahead in trials of equal length).
SMALL = dict(depth=18, width=32, size=64, crop="tight", look="plain", upright=True, dropout=0.0,
             pretrained="none", rotation="6d", weight_joints=300.0, weight_smpl=120.0,
             weight_adv=0.25, lr_scratch=1e-3, lr_d=1e-2, schedule="onecycle", batch=256,
             steps=8_000)
SMALL_CPU = dict(size=48, batch=64, steps=4_000)                      # without a GPU
REAL = "data mix mocap workers joint_regressor smpl_genders"          # what photographs bring along
EVALUATION_SEED = 2018                  # of the test pictures: the same whatever --seed says


# --------------------------------------------------------------------------------------------
# 2. The training loop (Sec. 3.4)

class Losses(NamedTuple):
    """What one step reports, () each; the log's columns.  Unweighted but for loss_E."""
    loss_E: Tensor            # Eq. (1), weighted
    L_kp: Tensor              # Eq. (3)
    L_joints: Tensor          # Eq. (5)
    L_smpl: Tensor            # Eq. (6)
    L_adv: Tensor             # Eq. (7), by D as it is AFTER its own step
    loss_D: Tensor            # Eq. (8)
    D_real: Tensor            # D's mean output on motion capture, BEFORE its step
    D_fake: Tensor            # and on predictions
    abs_beta: Tensor          # mean |beta| over predictions


# Task 16: train_step
def train_step(E: HMR, D: nn.Module, opt_E: torch.optim.Optimizer, opt_D: torch.optim.Optimizer,
               batch: Batch, motion: tuple[Tensor, Tensor] | None, config: Config) -> Losses:
    """One step of both players: E, the encoder with its regressor, and D, the 25 discriminators.

    motion: real rotations (N, 23, 3, 3) and betas (N, 10), as many as predictions; None without
    the adversary.  Under torchrun E and D are wrapped so that `backward` averages their gradients
    over the processes; each loss's denominator is its own process's, as everywhere in the field.
    """
    thetas, pred = E(batch.image)    # T x (B, 85 or 157), the latter with 6D; decoded Theta_T
    # slides: "if t = T the full L, else L_adv": all T face the adversary (Theta_0 does not)
    _, pose, betas = split_theta(torch.cat(thetas))         # (N, 72 or 144), (N, 10); N = B * T
    rotmats = pose_to_rotmats(pose)[:, 1:]                            # (N, 23, 3, 3) without root
    D_real = D_fake = loss_D = L_adv = betas.new_zeros(())            # () each; 0 without adv
    # D's products are a third of a step: in the encoder's precision, its outputs in float32
    low = (torch.autocast(betas.device.type, torch.bfloat16) if config.amp == "bf16" else
           contextlib.nullcontext())

    # ---- (1) update D:  min_D  sum_i E[(D_i(Theta) - 1)^2] + E[D_i(E(I))^2]            Eq. (8) --
    if config.adv:
        with low:
            real = D(*motion)                                         # (N, 25)
            fake = D(rotmats.detach(), betas.detach())                # (N, 25) nothing reaches E
        loss_D, D_real, D_fake = discriminator_loss(real, fake), real.mean(), fake.mean()  # ()
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()

    # ---- (2) update E:  min_E  lambda (L_reproj + 1 L_3D) + L_adv                      Eq. (1) --
    # The paper's one lambda is three weights here; its indicator "1", whether an image has 3D
    # labels, is each loss's mask: visible, has_3d, has_smpl.
    L_kp = keypoint_loss(pred.keypoints2d, batch.keypoints2d, batch.visible)      # ()
    L_joints = joints3d_loss(pred.keypoints3d, batch.keypoints3d, batch.has_3d)   # ()
    L_smpl = smpl_loss(pred.rotmats, pred.betas, batch.rotmats, batch.betas, batch.has_smpl)  # ()
    if config.adv:                    # D judges, having learnt first (official code: both at once)
        D.requires_grad_(False)       # L_adv moves E only: spare D's gradients
        with low:
            verdict = D(rotmats, betas)                               # (N, 25)
        D.requires_grad_(True)
        L_adv = encoder_adversarial_loss(verdict)
    L_3d = config.weight_joints * L_joints + config.weight_smpl * L_smpl          # Eq. (4)
    loss_E = config.weight_kp * L_kp + L_3d + config.weight_adv * L_adv           # Eq. (1)
    opt_E.zero_grad()
    loss_E.backward()
    opt_E.step()
    return Losses(loss_E, L_kp, L_joints, L_smpl, L_adv, loss_D, D_real, D_fake, betas.abs().mean())
# end of task


def lr_factor(step: int, config: Config) -> float:
    """Factor on both learning rates: 1, or one cycle (a linear rise, then a cosine to 0)."""
    if config.schedule == "constant":
        return 1.0
    rise = 0.1 * config.steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (config.steps - rise))


def training_world(config: Config, smpl: SMPL) -> SyntheticPeople:
    """The training clips' people; under torchrun each rank draws its share, other pictures."""
    rank, ranks = rank_and_ranks()
    if config.data:
        return real_data().RealPeople(config, smpl, rank, ranks)
    frames = load_mocap(config.upright, False, config.validate)       # (M, 24, 3)
    return SyntheticPeople(smpl, frames, config.batch // ranks, config.size, config.look,
                           config.seed, rank, "half" if config.paired else "2d", crop=config.crop)


def train(config: Config, checkpoint: dict | None = None, D: nn.Module | None = None) -> dict:
    """Train, from the start or a checkpoint; evaluate; write all to the folder config.out.

    D: other discriminators than the paper's, (N, 23, 3, 3) and (N, 10) -> (N, 25).
    Returns what metrics.json holds.  Raises ValueError, OSError (used folder, bad file); after
    Ctrl-C, once all is saved, KeyboardInterrupt.
    """
    config = settle(config)
    out = Path(config.out)
    if not checkpoint and any((out / name).exists() for name in ("checkpoint.pt", "log.csv")):
        raise ValueError(f"--out {out}: holds a run already; name another folder, or go on with it "
                         f"(if it has a checkpoint.pt) by --resume --out {out}")
    try:                                          # found now, not at the first log line
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out {out}: expected a folder that can be written ({error.strerror}); "
                         f"name another") from None
    rank, ranks = rank_and_ranks()                                    # 0, 1 unless by torchrun
    torch.manual_seed(config.seed + rank)                             # initialisation and dropout
    smpl = SMPL(config.smpl or None).to(config.device)
    model = build(config, smpl)
    D = (Discriminator() if D is None else D).to(config.device)
    lr = config.lr_scratch if config.pretrained == "none" else config.lr
    world = training_world(config, smpl)
    # Adam with its usual betas (fused: one kernel, the same up to rounding); no weight decay.
    # slides: "encoder E" is the image encoder and the 3D module, here ResNet and regressor
    opt_E = torch.optim.Adam(model.parameters(), lr, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), config.lr_d, fused=True)
    state = {"model": model, "discriminator": D, "opt_E": opt_E, "opt_D": opt_D}
    if not checkpoint and config.pretrained != "none":
        load_pretrained(model.encoder, config)
    log = Log(config, lr, *(load_state(checkpoint, state) if checkpoint else (0, 0.0)))
    # four held-out pictures (of --data, its own first), drawn with bodies every picture_every steps
    shown = Batch(*(part[:4] for part in world.batch(0))) if config.data else next(
        evaluation_pictures(dataclasses.replace(config, eval_pictures=4), smpl))
    model.train(), D.train()
    # torchrun: SMPL's buffers never change, of batch norm's rank 0's are kept: none need be sent
    players = [model, D] if ranks == 1 else [
        nn.parallel.DistributedDataParallel(net, broadcast_buffers=False) for net in (model, D)]
    with finish_the_step_first() as pressed:                          # on Ctrl-C
        for step in range(log.start, config.steps):
            for optimizer, rate in ((opt_E, lr), (opt_D, config.lr_d)):
                optimizer.param_groups[0]["lr"] = rate * lr_factor(step, config)
            batch = world.batch(0 if config.overfit else step)
            N = config.iterations * world.batch_size                  # as many real as predicted
            motion = world.motion(N, step) if config.adv else None    # (N, 23, 3, 3), (N, 10)
            losses = train_step(*players, opt_E, opt_D, batch, motion, config)
            stop = log.add(step, losses, bool(pressed))
            if (step + 1) % config.picture_every == 0 and rank == 0:
                save_png(out / "pictures" / f"step_{step + 1:06d}.png", overlays(model, shown))
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps or stop:
                save_state(log, state, step + 1, losses.loss_E.item())
            if stop:
                raise KeyboardInterrupt(f"stopped and saved; go on by --resume --out {out}")
    metrics = finish(model, D, shown, log) if rank == 0 else {}
    if ranks > 1:
        dist.barrier()                                                # all leave together
    return metrics


# --------------------------------------------------------------------------------------------
# 3. The measures (Sec. 4.1): of 14 LSP keypoints; 2D of all 19, PVE of the skin

# Task 17: compute_similarity_transform
def compute_similarity_transform(source: Tensor, target: Tensor) -> Tensor:
    """Procrustes: source (B, P, 3) moved onto target (B, P, 3) by a scale, rotation and shift.

    Each body by its own transform.  The rotation is proper (det = +1): a mirrored body must not
    be excused.  Right for any B and P >= 3, B = P = 3 included (guessing the axis fails there).
    """
    mu_s, mu_t = source.mean(1, keepdim=True), target.mean(1, keepdim=True)       # (B, 1, 3)
    s, t = source - mu_s, target - mu_t                               # (B, P, 3)
    # min over R, scale of |t - scale R s|^2: R from the SVD of t's and s's 3 x 3 covariance
    U, S, Vh = torch.linalg.svd(t.mT @ s)                             # (B, 3, 3), (B, 3), (B, 3, 3)
    sign = torch.ones_like(S)                                         # (B, 3)
    sign[:, 2] = torch.linalg.det(U @ Vh).sign()                      # undo a reflection
    R = U @ (sign[..., None] * Vh)                                    # (B, 3, 3)
    scale = (S * sign).sum(1) / s.square().sum((1, 2)).clamp(min=1e-12)           # (B,)
    return scale[:, None, None] * s @ R.mT + mu_t                     # (B, P, 3)
# end of task


def pose_errors(pred: HMROutput, true: HMROutput) -> dict[str, Tensor]:
    """Per-picture errors of one decoded prediction against the truth (HMROutputs with vertices).

    mpjpe (B, 14), pa_mpjpe (B, 14), pve (B, V) in mm; px (B, 19) in pixels of a 224 crop; turned
    (B,): 100 where the heading, the root's rotation, is over 90 degrees off.
    MPJPE (official code) and PVE after moving both bodies' hip midpoints to the origin.
    """
    # keypoints and skin in one go: the hips that center it come first
    p, t = (center_hips(torch.cat([body.keypoints3d[:, :LSP], body.vertices], 1))
            for body in (pred, true))                                 # (B, 14 + V, 3)
    vertex = p[:, LSP:] - t[:, LSP:]                                  # (B, V, 3)
    p, t = p[:, :LSP], t[:, :LSP]                                     # (B, 14, 3)
    return {"mpjpe": 1000 * (p - t).norm(dim=-1),
            "pa_mpjpe": 1000 * (compute_similarity_transform(p, t) - t).norm(dim=-1),
            "pve": 1000 * vertex.norm(dim=-1),
            "px": 112 * (pred.keypoints2d - true.keypoints2d).norm(dim=-1),
            # the trace of A^T B, 1 + 2 cos(angle), is the sum of the elements' products
            "turned": 100.0 * ((pred.rotmats[:, 0] * true.rotmats[:, 0]).sum((1, 2)) < 1)}


def summarize(errors: list[dict[str, Tensor]]) -> dict[str, float]:
    """Batches of pose_errors -> means, PCK@150 mm and AUC (0, 5 .. 150 mm) of MPJPE, in %.

    Counted strictly below the threshold, as MPI-INF-3DHP's official script does, so that a perfect
    prediction has AUC 96.8 (30 of the 31 thresholds), not 100.
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
    """How far bodies are from any that motion capture has seen; `recorded` (2M, 23, 9).

    outside (B, 23): 100 where a joint's rotation is over 20 degrees from each that was recorded of
    this joint (held-out clips: 1 in 100); mocap (B,): degrees to the nearest recorded pose, mean
    over joints; beta3 (B, 10): 100 where |beta| > 3 standard deviations.  The root is free.
    """
    rotmats = body.rotmats[:, 1:].flatten(2)                          # (B, 23, 9)
    # the angle of A^T B, from its trace = the sum of the products of A's and B's elements
    cosine = (torch.einsum("bjk,fjk->bfj", rotmats, recorded) - 1) / 2            # (B, 2M, 23)
    angle = cosine.clamp(-1, 1).acos().rad2deg()                      # (B, 2M, 23)
    # 20: SyntheticPeople.poses' noise moves a rotation by 12 or less, 1,999 times in 2,000
    return {"outside": 100.0 * (angle.amin(1) > 20), "mocap": angle.mean(2).amin(1),
            "beta3": 100.0 * (body.betas.abs() > 3)}


def evaluation_pictures(config: Config, smpl: SMPL, frames: Tensor | None = None
                        ) -> Iterator[Batch]:
    """Yield the test set in batches of 64, on the device of `smpl`: unmixed frames, (M, 24, 3) or
    the held-out clips', drawn on the CPU, so that they show the same people on every machine."""
    frames = load_mocap(config.upright, True, config.validate) if frames is None else frames
    world = SyntheticPeople(copy.deepcopy(smpl).cpu(), frames, 64, config.size, config.look,
                            EVALUATION_SEED, labels="all", mix=False, crop=config.crop)
    for first in range(0, config.eval_pictures, 64):
        batch = world.batch(first // 64)
        yield Batch(*(part[:config.eval_pictures - first].to(smpl.v_template.device)
                      for part in batch))


def mean_camera(config: Config, smpl: SMPL) -> Tensor:
    """What a network that never looks would guess: the training world's mean camera (1, 3)."""
    frames = load_mocap(config.upright, False, config.validate)       # (M, 24, 3)
    world = SyntheticPeople(copy.deepcopy(smpl).cpu(), frames, 512, 2, seed=EVALUATION_SEED,
                            crop=config.crop)     # 2 pixels: only cameras are wanted
    cam = torch.cat([world.batch(step).cam for step in range(4)])     # (2048, 3)
    return cam.mean(0, keepdim=True).to(smpl.v_template.device)       # (1, 3)


@torch.no_grad()
def evaluate(model: HMR, config: Config, D: nn.Module | None = None,
             frames: Tensor | None = None, cam: Tensor | None = None) -> dict:
    """All measures on the held-out clips, or on frames (M, 24, 3): of each IEF iteration, the truth
    and two lazy guesses.

    In float32, whatever training's precision.  The guesses, both under the mean camera (cam):
    baseline, Theta-bar, faces us (people face anywhere); mean_pose is turned the TRUE way, so that
    only the pose is guessed.  heads: D on Theta_T and on motion.
    """
    model.eval()                  # batch norm uses its running statistics, dropout is off
    amp, model.amp = model.amp, None
    baseline = model.regressor.theta_bar.clone()                      # (1, 85)
    baseline[:, CAM] = mean_camera(config, model.smpl) if cam is None else cam
    recorded = recorded_rotations(config, baseline.device)            # (2M, 23, 9)
    errors, scores = [[] for _ in range(config.iterations + 3)], []   # + truth and two guesses
    for batch in evaluation_pictures(config, model.smpl, frames):
        true = model.body(batch.cam, batch.rotmats, batch.betas)
        thetas, _ = model(batch.image)                                # T x (B, 85)
        bodies = [model.decode(theta, vertices=True)
                  for theta in (baseline.expand(len(batch.image), -1), *thetas)]
        bar, heading = bodies[0], batch.rotmats[:, :1]                # (B, 1, 3, 3)
        turned = torch.cat([heading, bar.rotmats[:, 1:]], 1)          # (B, 24, 3, 3)
        bodies.insert(1, model.body(bar.cam, turned, bar.betas))
        if not all(body.vertices.abs().max() < 1e6 for body in bodies):           # NaN, too
            raise ValueError("the network's bodies are not finite, or a thousand kilometres large: "
                             "it cannot be measured; train again at a lower rate")
        for kept, pred in zip(errors, [true, *bodies]):
            kept.append(pose_errors(pred, true) | monstrosity(pred, recorded))
        if D is not None:
            scores.append(D(bodies[-1].rotmats[:, 1:], bodies[-1].betas))         # (B, 25)
    model.amp = amp
    of_truth, of_baseline, of_mean_pose, *per_iteration = [summarize(e) for e in errors]
    result = per_iteration[-1] | dict(
        per_iteration=per_iteration, truth=of_truth, baseline=of_baseline, mean_pose=of_mean_pose,
        measured_on=config.validate or "held-out clips")
    if D is not None:       # the 25 one by one: which are winning?
        # step `steps` is one that training never reached: motion that D has not seen
        motion = training_world(config, model.smpl).motion(2048, config.steps)
        result["heads"] = {"real": D(*motion).mean(0).tolist(),
                           "fake": torch.cat(scores).mean(0).tolist()}
    return result


# ============================================================================================
# Not needed to understand HMR: building, files, the log, the command line.

def settle(config: Config) -> Config:
    """Replace "auto" and the empty folder by what they mean here.  Raises ValueError."""
    device = "cpu" if config.device == "cpu" or not torch.cuda.is_available() else "cuda"
    if config.device not in ("auto", device):
        raise ValueError("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    amp = config.amp if config.amp != "auto" else "bf16" if native_bf16(device) else "off"
    for f in dataclasses.fields(config):
        value, least, below = getattr(config, f.name), f.metadata["least"], f.metadata["below"]
        if least is not None and not least <= value < below:          # False for NaN too
            raise ValueError(f"{flag(f.name)} {value}: expected {least} or more, below {below:g}")
    _, ranks = rank_and_ranks()
    if config.batch % ranks or config.batch < 2 * ranks:
        raise ValueError(f"--batch {config.batch}: expected two pictures or more for each process, "
                         f"and a multiple of the {ranks} processes")
    if not config.data and any(getattr(config, k) for k in REAL.split() if k != "workers"):
        raise ValueError("--mix, --mocap, --joint-regressor, --smpl-genders go with --data; name "
                         "photographs by it, or leave them out")
    return dataclasses.replace(config, device=device, amp=amp, out=config.out or "runs/full")


def real_data():
    """The one chapter's need of the appendix, and only with --data."""
    try:
        from appendix import datasets
    except ModuleNotFoundError:                 # a student's folder
        raise ValueError("--data: needs the folder appendix/ beside train.py; get the whole project"
                         ) from None
    return datasets


def native_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # older versions of PyTorch do not tell: float32 then
    return getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)


def build(config: Config, smpl: SMPL) -> HMR:
    """A fresh model on the device of `smpl`."""
    # float32 means float32: TF32 would be 1 mm in a body, and is a GPU's default in convolutions
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if not smpl.mean_pose.any():
        say(f"{smpl.name} holds no mean_pose: the regressor starts from the T-pose")
    model = HMR(smpl, config.depth, config.iterations, config.width, config.plain, config.dropout,
                config.rotation, torch.bfloat16 if config.amp == "bf16" else None)
    # channels_last: the fastest layout
    return model.to(smpl.v_template.device).to(memory_format=torch.channels_last)


def load_pretrained(encoder: nn.Module, config: Config) -> None:
    """ImageNet's (or a FILE's) weights into the encoder.  Raises ValueError, never goes without."""
    if config.pretrained == "imagenet":
        weights = torchvision.models.get_model_weights(f"resnet{config.depth}")["IMAGENET1K_V1"]
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        try:
            weights = weights.get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:
            no_network = (urllib.error.URLError, TimeoutError, ConnectionError)
            why = f"no network to reach {weights.url}" if isinstance(error, no_network) else \
                f"{file} cannot be read or written" if isinstance(error, OSError) else \
                f"{file} is cut or not what its name says; delete it, if it is there"
            raise ValueError(f"--pretrained imagenet: {why} ({type(error).__name__}).  Or give "
                             f"--pretrained FILE, or --pretrained none: from scratch, at the rate "
                             f"--lr-scratch {config.lr_scratch:g}") from None
    else:
        weights = load_file(Path(config.pretrained))
    try:                                        # all but torchvision's classifier
        encoder.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fc.")})
    except (RuntimeError, AttributeError):
        raise ValueError(f"--pretrained {config.pretrained}: expected torchvision's names, and "
                         f"sizes of depth {config.depth}, width {config.width}") from None


def load_file(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}); it may be "
                         f"truncated or of another program") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors by name; name a checkpoint")
    if bad := not_finite(content):
        raise ValueError(f"{path}: {bad} holds NaN or infinity; name another file")
    return content


def not_finite(tree, name: str = "") -> str | None:
    """The name of the first tensor in nested dicts and lists that holds NaN or infinity."""
    if isinstance(tree, Tensor):
        return None if tree.isfinite().all() else name
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(
        tree, (list, tuple)) else ()
    found = (not_finite(part, f"{name}.{key}".lstrip(".")) for key, part in parts)
    return next(filter(None, found), None)


def load_checkpoint(path: Path, smpl: str | None = None) -> dict:
    checkpoint, default = load_file(path), dataclasses.asdict(Config())
    stored = checkpoint.get("config")
    if isinstance(stored, dict):                # of a version before these options
        later = {key: default[key] for key in ["crop", "validate", *REAL.split()]}
        stored = checkpoint["config"] = later | stored
    if not ({"model", "discriminator", "opt_E", "opt_D", "step", "seconds", "body", "rng"}
            <= checkpoint.keys() and isinstance(stored, dict) and stored.keys() == default.keys()
            and all(isinstance(stored[k], (type(v), int)) for k, v in default.items())):
        raise ValueError(f"{path}: not a checkpoint of this version of train.py; name one")
    stored["smpl"] = smpl or stored["smpl"]
    if stored["smpl"] and not os.path.exists(stored["smpl"]):
        raise FileNotFoundError(f"{stored['smpl']}: no such body file; give --smpl its new place")
    return checkpoint


def save_state(log: "Log", state: dict, step: int, loss: float) -> None:
    """checkpoint.pt: what a continuation needs, bit-identical on a CPU (of several processes, only
    rank 0's dropout goes on where it was).  The body is kept only as its name and hash."""
    log.require_finite(loss, step)
    if rank_and_ranks()[0] > 0:
        return
    smpl, rng = state["model"].smpl, {"cpu": torch.get_rng_state()}
    rng |= {"cuda": torch.cuda.get_rng_state()} if log.config.device == "cuda" else {}
    content = {name: part.state_dict() for name, part in state.items()}
    if bad := not_finite(content):
        raise ValueError(f"{bad} is no longer finite after step {step}: lower {log.rate()}; a "
                         f"checkpoint saved before is kept")
    content |= {"step": step, "seconds": log.seconds(), "rng": rng,
                "config": dataclasses.asdict(log.config), "body": [smpl.name, smpl.sha256]}
    file = io.BytesIO()
    torch.save(content, file)
    write_atomically(Path(log.config.out) / "checkpoint.pt", file.getvalue())


def load_state(checkpoint: dict, state: dict) -> tuple[int, float]:
    """Fill model, discriminators and optimisers -> (step, seconds) reached."""
    fill(checkpoint, state)
    if rank_and_ranks()[0] == 0:            # the stored random numbers are rank 0's
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if "cuda" in checkpoint["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])
    return checkpoint["step"], checkpoint["seconds"]


def fill(checkpoint: dict, parts: dict) -> None:
    (name, sha256), smpl = checkpoint["body"], parts["model"].smpl
    if sha256 != smpl.sha256:
        raise ValueError(f"--smpl: the checkpoint was trained with {name} (sha256 {sha256[:12]}), "
                         f"this is {smpl.name} ({smpl.sha256[:12]}); name the same file")
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except (RuntimeError, ValueError, KeyError):
        raise ValueError(f"the checkpoint's {name} does not fit its own settings: another "
                         f"program or version of train.py wrote it") from None


def load(path: str | os.PathLike, smpl: str | os.PathLike | None = None,
         device: str = "auto") -> tuple[HMR, Discriminator | None, Config]:
    """A trained model to use from Python: HMR in eval mode, its discriminators, its settings.

    path: a run's checkpoint.pt; smpl: the body FILE, if it is no longer where it was in training.
    In float32 (`model.amp = torch.bfloat16` for speed).  Raises FileNotFoundError or ValueError.
    SPIN's published weights load, too; they have no discriminators (None).
    """
    try:
        checkpoint = load_checkpoint(Path(path), os.fspath(smpl or ""))
    except ValueError as error:
        try:
            from appendix.spin import load_spin, read_spin            # for these weights alone
        except ModuleNotFoundError:             # a student's folder
            raise error from None
        if read_spin(path) is None:
            raise
        config = settle(Config(rotation="6d", adv=False, amp="off", device=device, smpl=os.fspath(
            smpl or "")))
        return load_spin(path, SMPL(config.smpl or None)).to(config.device), None, config
    config = settle(Config(**checkpoint["config"] | {"device": device}))
    model = build(config, SMPL(config.smpl or None).to(config.device))
    D, model.amp = Discriminator().to(config.device), None
    fill(checkpoint, {"model": model, "discriminator": D})
    return model.eval(), D, config


class Log:
    """One fixed-width line, and one row of log.csv, for every `log_every` steps: their means."""
    COLUMNS = ("step", *Losses._fields, "img/s", "left")

    def __init__(self, config: Config, lr: float, start: int = 0, seconds: float = 0.0):
        self.config, self.lr, self.start, self.before = config, lr, start, seconds
        self.values, self.path, self.rows = [], Path(config.out) / "log.csv", [self.COLUMNS]
        if start and self.path.exists():        # a run that died after its last checkpoint: rewind
            rows = self.path.read_text(encoding="utf-8").splitlines()[1:]
            self.rows += [row.split(",") for row in rows if int(row.split(",")[0]) <= start]
        say("".join(f"{name:>10s}" for name in self.COLUMNS))
        self.begun = self.line_begun = time.perf_counter()

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.begun

    def rate(self) -> str:
        return ("--lr-scratch" if self.config.pretrained == "none" else "--lr") + f" {self.lr:g}"

    def require_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise ValueError(f"the losses are no longer finite at step {step}: lower {self.rate()}"
                             f"; {self.path} may show which term grew first")

    def add(self, step: int, losses: Losses, pressed: bool) -> bool:
        """pressed: Ctrl-C on this rank -> stop now?  Ranks agree on it at a line: they meet."""
        self.values.append(torch.stack([v.detach() for v in losses]))  # (9,) stays on the device
        (rank, ranks), last = rank_and_ranks(), step + 1 == self.config.steps
        if (step + 1) % self.config.log_every and not last:
            return pressed and ranks == 1
        means = torch.stack(self.values).mean(0)                      # (9,)
        means = torch.cat([means, means.new_tensor([pressed])])       # (10,)
        if ranks > 1:
            dist.all_reduce(means)
        *means, stop = (means / ranks).tolist()
        now, steps, self.values = time.perf_counter(), len(self.values), []
        rate = steps * self.config.batch / (now - self.line_begun)
        left = (self.config.steps - step - 1) * (now - self.begun) / (step + 1 - self.start)
        self.line_begun = now
        self.require_finite(sum(means), step + 1)
        # after Ctrl-C between two lines: no line, since its means would be over fewer steps
        if rank == 0 and (last or steps == self.config.log_every):
            say(f"{step + 1:10d}" + "".join(f"{m:10.4g}" for m in means) + f"{rate:10.0f}"
                f"{str(datetime.timedelta(seconds=round(left))):>10s}")
            self.rows.append([step + 1, *(f"{m:.6g}" for m in means), f"{rate:.1f}", round(left)])
            write_atomically(self.path, "".join(",".join(map(str, row)) + "\n"
                                                for row in self.rows).encode())
        return bool(stop)


@torch.no_grad()
def overlays(model: HMR, batch: Batch) -> Tensor:
    """input | overlay | turned 90 degrees of a few held-out pictures -> (3, B * 224, 3 * 224)."""
    pred = model.decode(model.eval()(batch.image)[0][-1], vertices=True)
    model.train()                                                     # where it was called from
    return look_at(batch.image, pred.vertices, model.smpl.faces, pred.cam)  # (3, B * 224, 3 * 224)


def finish(model: HMR, D: nn.Module, shown: Batch, log: Log) -> dict:
    """The table, the picture and metrics.json of a finished run."""
    config, out, seconds = log.config, Path(log.config.out), log.seconds()
    save_png(out / "picture.png", overlays(model, shown))
    # photographs are measured by --eval .. --data, on others than were trained on
    metrics = {"last_losses": dict(zip(log.COLUMNS, log.rows[-1]))} if config.data else evaluate(
        model, config, D if config.adv else None)
    metrics |= {"seconds": seconds, "images": config.steps * config.batch,
                "precision": PRECISION[config.amp], "device": device_name(config.device),
                "torch": torch.__version__, "seed": config.seed,
                "config": dataclasses.asdict(config) | {"lr_used": log.lr}}
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False).encode())
    if not config.data:
        print_table(metrics)
    say(f"{metrics['images']:,} pictures in {seconds / 60:.1f} min on {metrics['device']}; "
        f"picture: {out / 'picture.png'}  numbers: {out / 'metrics.json'}")
    return metrics


PRECISION = {"off": "float32", "bf16": "bf16 (encoder, D)"}              # of training
MEASURES = (("mpjpe", "MPJPE mm"), ("pa_mpjpe", "PA-MPJPE mm"), ("pve", "PVE mm"),
           ("px", "2D px/224"), ("pck", "PCK@150 %"), ("auc", "AUC %"), ("turned", "turned %"),
           ("outside", "outside %"), ("mocap", "mocap deg"), ("beta3", "beta>3 %"))
GUESSES = {"baseline": "Theta-bar", "mean_pose": "mean pose, true heading"}       # the lazy ones


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
        say(f"D's {len(heads)} outputs on {side}: min {min(heads):.2f}, median "
            f"{sorted(heads)[len(heads) // 2]:.2f}, max {max(heads):.2f}")


def print_clips(model: HMR, config: Config) -> None:
    """PA-MPJPE of every clip beside the mean pose's: what of what is learnt reaches other clips?"""
    config = dataclasses.replace(config, eval_pictures=min(config.eval_pictures, 128))
    cam = mean_camera(config, model.smpl)                             # (1, 3) the same for all
    say(f"PA-MPJPE mm, clip by clip, {config.eval_pictures} unmixed pictures of each: "
        f"the network's, the mean pose's")
    for kind, held_out in (("trained on", False), (config.validate or "held out", True)):
        for name, frames in load_clips(config.upright, held_out, config.validate).items():
            metrics = evaluate(model, config, frames=frames, cam=cam)
            say(f"{kind:12s}{name:12s}{metrics['pa_mpjpe']:8.1f}"
                f"{metrics['mean_pose']['pa_mpjpe']:8.1f}")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else \
        f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def join_the_ranks(device: str) -> None:
    """Meet the P processes ("ranks") that torchrun started, one a GPU; without it, nothing.  Each
    draws batch / P pictures, `backward` averages gradients, so that all take the same step, and
    rank 0 alone prints, saves and evaluates."""
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


@contextlib.contextmanager
def finish_the_step_first():
    """Ctrl-C fills the list that this yields: no step is left half done.  The second interrupts."""
    pressed, before = [], signal.getsignal(signal.SIGINT)

    def on_ctrl_c(do):
        with contextlib.suppress(ValueError):   # in a thread: signals belong to the main one
            signal.signal(signal.SIGINT, do)
    on_ctrl_c(lambda *_: (pressed.append(True), on_ctrl_c(before)))
    try:
        yield pressed
    finally:
        on_ctrl_c(before)


def flag(name: str) -> str:
    """A field's name on the command line."""
    return "--" + name.replace("_", "-")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[dict, object]:
    """Make every field of Config a flag, then parse -> (the fields that were given, the rest)."""
    fields = dataclasses.fields(Config)
    for f in fields:
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else \
            {"type": f.metadata["many"] or type(f.default), "choices": f.metadata["choices"],
             "nargs": "+" if f.metadata["many"] else None}
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=f"{f.metadata['help']} "
                            f"[{f.default if f.default != () else ''}]".replace("%", "%%")
                            .removesuffix(" []"), **kind)
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields if hasattr(args, f.name)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}, args


def make_config(given: dict, preset: dict) -> Config:
    """The defaults, then a preset, then the flags that were given.  Raises ValueError."""
    config = settle(Config(**(preset | given)))
    if "lr" in given and config.pretrained == "none":
        raise ValueError("--lr: with --pretrained none the rate is --lr-scratch; set that one")
    return config


def small_preset(given: dict, more: dict = {}, more_cpu: dict = {}) -> dict:
    """--small's changes, printed: fewer where there is no GPU.  more, more_cpu: changes of it."""
    no_gpu = given.get("device") == "cpu" or not torch.cuda.is_available()
    preset = SMALL | more | (SMALL_CPU | more_cpu if no_gpu else {})
    changes = [f"{k} {getattr(Config, k)} -> {v}" for k, v in (preset | given).items()
               if v != getattr(Config, k) and k not in ("device", "out")]
    say(f"--small{' without a GPU' if no_gpu else ''} changes: " + ", ".join(changes))
    return preset


def only(allowed: str, given: dict, option: str) -> None:
    for name in sorted(set(given) - set(allowed.split())):
        raise ValueError(f"{flag(name)}: {option} keeps the run's own settings; leave it out")


def resume(given: dict) -> None:
    only("out smpl device steps log_every picture_every save_every eval_pictures workers", given,
         "--resume")
    given = {"device": "auto", "out": "runs/full"} | given
    path = Path(given["out"]) / "checkpoint.pt"
    checkpoint = load_checkpoint(path, given.get("smpl"))
    done, planned = checkpoint["step"], checkpoint["config"]["steps"]
    config = make_config(given, checkpoint["config"])
    if config.schedule == "onecycle" and config.steps != planned:
        raise ValueError(f"--steps {config.steps}: the run's one cycle of learning rates ends at "
                         f"step {planned}; train anew with these --steps and another --out")
    if config.steps < done or (config.steps == done and path.with_name("metrics.json").exists()):
        raise ValueError(f"--resume: the run has already done {done} steps; measure it by --eval "
                         f"{path}" + ", or give it more --steps" * (config.schedule == "constant"))
    train(config, checkpoint)


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description="Train HMR, or measure it.", allow_abbrev=False)
    parser.add_argument("--small", action="store_true", help="small network, small pictures")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="go on with the run in --out")
    mode.add_argument("--eval", metavar="CHECKPOINT", type=Path, help="only measure this one")
    given, args = parse(parser, argv)
    join_the_ranks(given.get("device", "auto"))
    if args.small and not args.eval:
        given.setdefault("out", "runs/small")
    if args.eval:
        only("smpl device " + (REAL if "data" in given else "eval_pictures"),
             given | ({"small": 1} if args.small else {}), "--eval")
        model, D, config = load(args.eval, given.get("smpl"), given.get("device", "auto"))
        config = settle(dataclasses.replace(config, **{**dict(data=(), mix=(), mocap=""), **given}))
        if config.data:
            real_data().evaluate(model, config)
        else:
            metrics = evaluate(model, config, D if config.adv else None)
            print_table(metrics | {"precision": PRECISION[config.amp]})
            print_clips(model, config)
    elif args.resume:
        resume(given)
    else:
        train(make_config(given, small_preset(given) if args.small else {}))
    if dist.is_initialized():
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    return exit_status("train.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
