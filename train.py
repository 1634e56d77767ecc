"""Train HMR: the straight loop, its hyperparameters, and the measures at the end.

Chapter 4 of 4 (smpl.py <- hmr.py <- data.py <- train.py).  HMR Sec. 3.4 and 4.

    python train.py --small --overfit --steps 150 --out runs/overfit    # is one batch learnt?
    python train.py --small                         # about 10 minutes on two CPU cores
    python train.py --eval runs/small/checkpoint.pt # the table again
    python train.py                                 # official recipe (ResNet-50, 224 px): days
    python train.py --resume --out runs/small       # go on after Ctrl-C
    python train.py --small --ablate                # the paper's claims, one by one: seven runs
    python train.py --degradation                   # the slides' plain and residual networks
    torchrun --nproc_per_node=2 train.py --small --out runs/two   # two processes share each batch
    python train.py --small --bench                 # what each part of a step costs

Axes:  B pictures   T regression iterations   N = B * T   19 keypoints (first 14 = LSP)   V vertices
       F frames of motion capture
"""

import argparse
import contextlib
import csv
import dataclasses
import datetime
import functools
import io
import itertools
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data import (Batch, SyntheticPeople, compare, draw_chart, load_mocap, look_at, mirror_pose,
                  save_png)
from hmr import (CAM, HMR, LSP, Discriminator, HMROutput, WholeDiscriminator, center_hips,
                 discriminator_loss, encoder_adversarial_loss, joints3d_loss, keypoint_loss,
                 pose_to_rotmats, smpl_loss, split_theta)
from smpl import SMPL, batch_rodrigues, exit_status, in_turn, write_atomically

# --------------------------------------------------------------------------------------------
# 1. Hyperparameters.  Losses, batch, steps and rates are the official do_train.sh's (the official
#    flags' own defaults differ).


def option(default, help: str, choices: tuple | None = None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    # the network
    depth: int = option(50, "layers of the ResNet (Sec. 3.4: 50)", (18, 34, 50, 101, 152))
    width: int = option(64, "channels of its first stage (slides: 64)")
    stem: str = option("imagenet", "light: 3x3 for small pictures (ours)", ("imagenet", "light"))
    plain: bool = option(False, "no shortcuts (slides: deeper plain networks train worse)")
    iterations: int = option(3, "T of the iterative regressor (Sec. 3.4: 3); 1: in one go, which "
                                "Sec. 3.2 calls hard")
    dropout: float = option(0.5, "in the regressor (official code: 0.5 after both hidden layers)")
    rotation: str = option("axis-angle", "6d: the regressor's rotations as SPIN has them",
                           ("axis-angle", "6d"))
    pretrained: str = option("imagenet", "encoder's weights: imagenet, none, or a state-dict FILE")
    # the world
    smpl: str = option("", "body FILE, .npz or official .pkl (default: the open body)")
    size: int = option(224, "side of the crop, pixels (Sec. 3.4: 224)")
    look: str = option("hard", "how people and backgrounds look (ours)", ("plain", "hard"))
    upright: bool = option(False, "only the clips in which people are mostly upright (ours)")
    paired: bool = option(True, "half of each batch has 3D labels (Sec. 3.4); no: all 2D only, "
                                "the adversary alone comes close to paired 3D (Fig. 4)")
    # the losses; they only mean something with hmr.py's denominators
    adv: bool = option(True, "D and L_adv (Sec. 3.3); without them and 3D: monsters (Fig. 5)")
    discriminator: str = option("factorised", "25 small networks, which Sec. 3.3 calls easier to "
                                "train than one whole on beta and pose", ("factorised", "whole"))
    supervise: str = option("last", "all: every iteration gets every loss; last: all but the last "
                            "get L_adv only (slides), so that they may correct", ("last", "all"))
    weight_kp: float = option(60.0, "of L_reproj (do_train.sh: 60; the paper's lambda)")
    weight_joints: float = option(60.0, "of L_joints (do_train.sh: e_3d_weight 60)")
    weight_smpl: float = option(60.0, "of L_smpl (do_train.sh: e_3d_weight 60)")
    weight_adv: float = option(1.0, "of L_adv (do_train.sh: 1; Eq. (1))")
    # the optimisation; no weight decay: the official flags register one that no loss ever reads
    batch: int = option(64, "pictures a step (Sec. 3.4: 64)")
    steps: int = option(667_589, "optimiser steps (the released checkpoint's: do_train.sh's 75 "
                                 "epochs of 569,753 / 64; the paper says 55)")
    lr: float = option(1e-5, "of encoder and regressor, Adam (Sec. 3.4)")
    lr_scratch: float = option(1e-4, "instead of lr when there are no ImageNet weights (ours; "
                                     "1:1 with lr_d then, not 1:10)")
    lr_d: float = option(1e-4, "of the discriminators, Adam (Sec. 3.4: ten times E's)")
    schedule: str = option("constant", "onecycle: warm up, then anneal to 0 (ours)",
                           ("constant", "onecycle"))
    amp: str = option("auto", "bf16 in the encoder: where the hardware has it natively, or never "
                              "(a GPU's convolutions may then round to TF32)", ("auto", "off"))
    overfit: bool = option(False, "train on ONE batch: L_kp, L_joints, L_smpl must fall far")
    # the run
    seed: int = option(0, "of initialisation and training pictures; not of the evaluation's")
    device: str = option("auto", "cuda where there is one", ("auto", "cpu", "cuda"))
    out: str = option("", "folder of the run (default: runs/small, full, ablation, degradation)")
    log_every: int = option(50, "steps a log line; its numbers are means over them")
    picture_every: int = option(500, "steps between pictures")
    save_every: int = option(500, "steps between checkpoints")
    eval_pictures: int = option(512, "pictures of held-out motion at the end")


# --small: printed as a diff from the above.  2 million small pictures (128,000 without a GPU)
# instead of 43 million: learning rates a hundred times the paper's, annealed (still 1:10); no
# dropout (nothing is seen twice); joints and rotations weigh more against the adversary, and it
# less against the 2D; 6D rotations have no seam that a body turning round must jump over (these
# three, and 48 px without a GPU, were ahead in trials of equal length).
SMALL = dict(depth=18, width=32, size=64, look="plain", upright=True, dropout=0.0,
             pretrained="none", rotation="6d", weight_joints=300.0, weight_smpl=120.0,
             weight_adv=0.25, lr_scratch=1e-3, lr_d=1e-2, schedule="onecycle", batch=256,
             steps=8_000)
SMALL_CPU = dict(size=48, batch=64, steps=2_000)                      # without a GPU


# --------------------------------------------------------------------------------------------
# 2. The training loop (Sec. 3.4)

def training_world(config: Config, smpl: SMPL, device) -> SyntheticPeople:
    """The training clips' people; under torchrun each rank draws its share, other pictures."""
    rank, ranks = rank_and_ranks()
    return SyntheticPeople(smpl, load_mocap(config.upright, held_out=False), config.batch // ranks,
                           config.size, config.look, config.seed, rank, device=device,
                           labels="half" if config.paired else "2d")


def lr_factor(step: int, config: Config) -> float:
    """Factor on both learning rates: 1, or one cycle (a linear rise, then a cosine to 0)."""
    if config.schedule == "constant":
        return 1.0
    rise = 0.1 * config.steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (config.steps - rise))


def train_step(E: HMR, judge: torch.nn.Module, opt_E: torch.optim.Optimizer,
               opt_D: torch.optim.Optimizer, batch: Batch, motion: tuple[Tensor, Tensor] | None,
               config: Config) -> list[Tensor]:
    """One step of both players, E and the discriminators -> the numbers of a log line, () each.

    E and judge are the encoder and the discriminators, under torchrun wrapped so that a backward
    pass averages their gradients over the processes; model and D are the same two, unwrapped, for
    passes after which nothing is to be averaged.  motion: real rotations (N, 23, 3, 3) and betas
    (N, 10), as many as predictions; None without the adversary.
    """
    model, D = getattr(E, "module", E), getattr(judge, "module", judge)
    image = batch.image.contiguous(memory_format=torch.channels_last)             # fastest layout
    thetas, pred = E(image)          # T x (B, 85), or (B, 157) with 6D rotations; decoded Theta_T
    # slides: "if t = T the full L, else L_adv": all T face the adversary (Theta_0 does not)
    _, pose, betas = split_theta(torch.cat(thetas))         # (N, 72 or 144), (N, 10); N = B * T
    rotmats = pose_to_rotmats(pose)[:, 1:]                            # (N, 23, 3, 3) without root
    if config.supervise == "all":          # not the slides' rule: every t gets the full L, at 1/T
        pred = model.decode(torch.cat(thetas))                        # N bodies, and N labels:
        _, *labels = batch                                            # all but the pictures
        batch = Batch(image, *(torch.cat([label] * len(thetas)) for label in labels))
    real = fake = loss_D = L_adv = betas.new_zeros(())                # they stay 0 without adv

    # ---- (1) update D:  min_D  sum_i E[(D_i(Theta) - 1)^2] + E[D_i(E(I))^2]            Eq. (8) --
    if config.adv:
        real = judge(*motion)                                         # (N, 25); whole: (N, 1)
        fake = judge(rotmats.detach(), betas.detach())                # the same; nothing reaches E
        loss_D = discriminator_loss(real, fake)
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()

    # ---- (2) update E:  min_E  lambda (L_reproj + 1 L_3D) + L_adv                      Eq. (1) --
    L_kp = keypoint_loss(pred.keypoints2d, batch.keypoints2d, batch.visible)
    L_joints = joints3d_loss(pred.keypoints3d, batch.keypoints3d, batch.has_3d)
    L_smpl = smpl_loss(pred.rotmats, pred.betas, batch.rotmats, batch.betas, batch.has_smpl)
    if config.adv:                    # D judges, having learnt first (official code: both at once)
        D.requires_grad_(False)       # L_adv moves E only: spare D's gradients
        L_adv = encoder_adversarial_loss(D(rotmats, betas))
        D.requires_grad_(True)
    L_3d = config.weight_joints * L_joints + config.weight_smpl * L_smpl          # Eq. (4)
    loss_E = config.weight_kp * L_kp + L_3d + config.weight_adv * L_adv           # Eq. (1)
    opt_E.zero_grad()
    loss_E.backward()
    opt_E.step()
    return [loss_E, L_kp, L_joints, L_smpl, L_adv, loss_D, real.mean(), fake.mean(),
            betas.abs().mean()]


def train(config: Config, checkpoint: dict | None = None) -> dict:
    """Train, from the start or a checkpoint; evaluate; write all to the folder config.out.

    Returns what metrics.json holds.  Raises ValueError or OSError (used folder, bad file); after
    Ctrl-C, once the run is saved, KeyboardInterrupt with the options that go on with it.
    """
    out, device = Path(config.out), torch.device(config.device)
    if not checkpoint:
        refuse_a_used_folder(out)
    rank, _ = rank_and_ranks()                                        # 0 unless torchrun is used
    torch.manual_seed(config.seed + rank)                             # initialisation and dropout
    smpl = SMPL(config.smpl or None).to(device)
    model, D, lr = build(config, smpl, checkpoint)      # lr: is there a pretrained encoder or not?
    world = training_world(config, smpl, device)
    # Adam with its usual betas (fused: one kernel, the same up to rounding); no weight decay.
    # slides: "encoder E" is the image encoder and the 3D module, here ResNet and regressor
    opt_E = torch.optim.Adam(model.parameters(), lr, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), config.lr_d, fused=True)
    state = {"model": model, "discriminator": D, "opt_E": opt_E, "opt_D": opt_D}
    start, seconds = load_state(checkpoint, state) if checkpoint else (0, 0.0)
    log = Log(out, config, lr, start, seconds)
    # four held-out pictures, drawn with their bodies every picture_every steps
    shown = next(evaluation_pictures(dataclasses.replace(config, eval_pictures=4), smpl, device))
    model.train(), D.train()
    E, judge = share_gradients(model), share_gradients(D)   # under torchrun; else the same objects
    with finish_the_step_first() as stopping:                         # on Ctrl-C
        for step in range(start, config.steps):
            for optimizer, rate in ((opt_E, lr), (opt_D, config.lr_d)):
                optimizer.param_groups[0]["lr"] = rate * lr_factor(step, config)
            batch = world.batch(0 if config.overfit else step)
            N = config.iterations * world.batch_size                  # as many real as predicted
            motion = world.motion(N, step) if config.adv else None    # (N, 23, 3, 3), (N, 10)
            numbers = train_step(E, judge, opt_E, opt_D, batch, motion, config)
            log.add(step, numbers)
            stop = on_any_rank(stopping)
            if (step + 1) % config.picture_every == 0 and rank == 0:
                save_png(out / "pictures" / f"step_{step + 1:06d}.png", overlays(model, shown))
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps or stop:
                save_state(log, state, step + 1, numbers[0].item())
            if stop:
                raise KeyboardInterrupt(f"--resume --out {out}")
    metrics = finish(model, D, shown, log) if rank == 0 else {}
    on_any_rank(False)                                                # all leave together
    return metrics


# --------------------------------------------------------------------------------------------
# 3. The measures (Sec. 4.1), on the 14 LSP keypoints

def compute_similarity_transform(source: Tensor, target: Tensor) -> Tensor:
    """Procrustes: source (B, N, 3) moved onto target (B, N, 3) by a scale, rotation and shift.

    Each body by its own transform.  The rotation is proper (det = +1): a mirrored body must not
    be excused.  Right for any B and N >= 3, B = N = 3 included (implementations that guess which
    axis holds the coordinates transpose that one).
    """
    mu_s, mu_t = source.mean(1, keepdim=True), target.mean(1, keepdim=True)       # (B, 1, 3)
    s, t = source - mu_s, target - mu_t                               # (B, N, 3)
    # min over R, scale of |t - scale R s|^2: R from the SVD of t's and s's 3 x 3 covariance
    U, S, Vh = torch.linalg.svd(t.mT @ s)                             # (B, 3, 3), (B, 3), (B, 3, 3)
    sign = torch.ones_like(S)                                         # (B, 3)
    sign[:, 2] = torch.linalg.det(U @ Vh).sign()                      # undo a reflection
    R = U @ (sign[..., None] * Vh)                                    # (B, 3, 3)
    scale = (S * sign).sum(1) / s.square().sum((1, 2)).clamp(min=1e-12)           # (B,)
    return scale[:, None, None] * s @ R.mT + mu_t                     # (B, N, 3)


def pose_errors(pred: HMROutput, true: HMROutput) -> dict[str, Tensor]:
    """Per-picture errors of one decoded prediction against the truth (HMROutputs with vertices).

    mpjpe (B, 14), pa_mpjpe (B, 14), pve (B, V) in mm; px (B, 19) in pixels of a 224 crop.
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
            "px": 112 * (pred.keypoints2d - true.keypoints2d).norm(dim=-1)}


def summarize(errors: list[dict[str, Tensor]]) -> dict[str, float]:
    """Batches of pose_errors -> means, and PCK@150 mm and AUC (0 to 150 mm step 5) of MPJPE.

    As in MPI-INF-3DHP's own code, strictly below a threshold: a perfect prediction has AUC 96.8.
    """
    all_errors = {key: torch.cat([e[key] for e in errors]) for key in errors[0]}
    result = {key: value.mean().item() for key, value in all_errors.items()}
    mpjpe = all_errors["mpjpe"]
    result["pck"] = 100 * (mpjpe < 150).double().mean().item()
    thresholds = torch.arange(0, 151, 5, device=mpjpe.device)         # (31,)
    result["auc"] = 100 * (mpjpe[..., None] < thresholds).double().mean().item()
    return result


EVALUATION_SEED = 2018


def evaluation_pictures(config: Config, smpl: SMPL, device) -> Iterator[Batch]:
    """Yield the test set: unmixed frames of the held-out clips, the same whatever --seed says."""
    world = SyntheticPeople(smpl, load_mocap(config.upright, held_out=True), 64, config.size,
                            config.look, EVALUATION_SEED, labels="all", mix=False, device=device,
                            rng_device="cpu")
    for first in range(0, config.eval_pictures, 64):
        batch = world.batch(first // 64)
        yield Batch(*(part[:config.eval_pictures - first] for part in batch))


def mean_camera(config: Config, smpl: SMPL, device) -> Tensor:
    """What a network that never looks would guess: the training world's mean camera (1, 3)."""
    # pictures of 2 pixels: only the cameras are wanted
    world = SyntheticPeople(smpl, load_mocap(config.upright, held_out=False), 512, size=2,
                            seed=EVALUATION_SEED, device=device, rng_device="cpu")
    return torch.cat([world.batch(step).cam for step in range(4)]).mean(0, keepdim=True)


@torch.no_grad()
def evaluate(model: HMR, config: Config, device, D: torch.nn.Module | None = None) -> dict:
    """All measures on the held-out clips: of each IEF iteration, the baseline and the truth.

    In float32, whatever precision the encoder was trained in.  The baseline is Theta-bar under the training world's mean camera: the mean pose, facing us
    (people face anywhere).  heads: each discriminator's mean on Theta_T and on fresh motion.
    """
    model.eval()                  # batch norm uses its running statistics, dropout is off
    amp, model.amp = model.amp, None
    baseline = model.regressor.theta_bar.clone()                      # (1, 85)
    baseline[:, CAM] = mean_camera(config, model.smpl, device)
    recorded = recorded_rotations(config, device)                     # (F, 23, 9)
    errors, scores = [[] for _ in range(config.iterations + 2)], []   # + truth and Theta-bar
    for batch in evaluation_pictures(config, model.smpl, device):
        body = model.smpl(batch.betas, batch.rotmats)
        true = HMROutput(batch.rotmats, batch.betas, batch.cam, body.joints, body.keypoints,
                         batch.keypoints2d, body.vertices)
        thetas, _ = model(batch.image)                                # T x (B, 85)
        bodies = [model.decode(theta, vertices=True)
                  for theta in (baseline.expand(len(batch.image), -1), *thetas)]
        for kept, pred in zip(errors, [true, *bodies]):
            kept.append(pose_errors(pred, true) | monstrosity(pred, recorded))
        if D is not None:
            scores.append(D(bodies[-1].rotmats[:, 1:], bodies[-1].betas))         # (B, 25)
    model.amp = amp
    of_truth, of_baseline, *per_iteration = [summarize(e) for e in errors]
    result = {**per_iteration[-1], "per_iteration": per_iteration, "baseline": of_baseline,
              "truth": of_truth}
    if D is not None:       # the 25 one by one: which are winning?
        # step `steps` is one that training never reached: motion that D has not seen
        motion = training_world(config, model.smpl, device).motion(2048, config.steps)
        result["heads"] = {"real": D(*motion).mean(0).tolist(),
                           "fake": torch.cat(scores).mean(0).tolist()}
    return result


# ============================================================================================
# Not needed to understand HMR: building, files, the log, the command line.

# Several processes: `torchrun --nproc_per_node=P train.py ...` starts P copies of this program, the
# "ranks", one a GPU (or all on the CPU).  Each draws, encodes and judges batch / P pictures, and
# DistributedDataParallel averages the gradients in `backward`, so all take the same step.  The
# losses' denominators count over all ranks (hmr.mean_over_processes): P ranks learn what one
# process would from the joined batch, but for batch norm, which sees its own rank's pictures.
# Rank 0 alone prints, saves and evaluates.

def join_the_ranks(device: str) -> None:
    """Meet the processes that torchrun started; without torchrun, nothing."""
    if not dist.is_torchelastic_launched():
        return
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node: expected at most one process a GPU, found "
                             f"{torch.cuda.device_count()} GPUs; start fewer or use --device cpu")
        torch.cuda.set_device(local)                      # "cuda" now means this one
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")


def rank_and_ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share_gradients(module: torch.nn.Module) -> torch.nn.Module:
    if not dist.is_initialized():
        return module
    shared = DistributedDataParallel(module)
    # buffers are sent once, not each step: SMPL's never change, of batch norm's only rank 0's count
    shared.broadcast_buffers = False
    return shared


def on_any_rank(condition) -> bool:
    """All ranks must ask together: one that stops alone would leave the others waiting for ever."""
    if not dist.is_initialized():
        return bool(condition)
    found = torch.tensor(float(bool(condition)))          # () on the CPU, through gloo
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


@contextlib.contextmanager
def finish_the_step_first():
    """Ctrl-C fills the list that this yields, so that a step is never left half done; a second
    Ctrl-C interrupts at once."""
    pressed = []
    if threading.current_thread() is not threading.main_thread():     # signals belong to the main
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT)

    def press(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def build(config: Config, smpl: SMPL,
          checkpoint: dict | None = None) -> tuple[HMR, torch.nn.Module, float]:
    """-> model and discriminators on the device of `smpl`, and E's learning rate.

    With a checkpoint, its weights will follow and its learning rate holds: no ImageNet needed.
    """
    device = smpl.v_template.device
    amp = torch.bfloat16 if config.amp == "auto" and native_bf16(device) else None
    model = HMR(smpl, config.depth, config.iterations, config.width, config.stem, config.plain,
                config.dropout, config.rotation, amp)
    if checkpoint:
        lr = checkpoint["lr"]
    else:
        lr = config.lr if load_pretrained(model.encoder, config) else config.lr_scratch
    if not smpl.mean_pose.any():
        print(f"{smpl.name} holds no mean_pose: the regressor starts from the T-pose")
    model = model.to(device).to(memory_format=torch.channels_last)
    D = WholeDiscriminator() if config.discriminator == "whole" else Discriminator()
    return model, D.to(device), lr


def native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch before 2.10 or so does not tell: float32 then
    return getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)


def precision(model: HMR) -> str:
    return "float32" if model.amp is None else "bf16 encoder"


def load_pretrained(encoder: torch.nn.Module, config: Config) -> bool:
    """ImageNet's (or a FILE's) weights into the encoder; False, having said so, without any."""
    if config.pretrained == "none":
        return False
    if config.pretrained == "imagenet":
        try:
            weights = torchvision.models.get_model_weights(f"resnet{config.depth}")["IMAGENET1K_V1"]
            weights = weights.get_state_dict(progress=False, check_hash=True)
        except Exception as error:
            print(f"no ImageNet weights ({type(error).__name__}: no network?); training from "
                  f"scratch with lr {config.lr_scratch:g} instead of {config.lr:g}")
            return False
    else:
        weights = load_file(Path(config.pretrained), "--pretrained")
    weights = {k: v for k, v in weights.items() if not k.startswith("fc.")}       # the classifier
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"--pretrained {config.pretrained}: not the weights of a ResNet-"
                         f"{config.depth} of width {config.width}, stem {config.stem}"
                         f"{', plain' if config.plain else ''} "
                         f"({str(error).splitlines()[1].strip()[:80]} ..)") from None
    return True


def load_file(path: Path, option: str) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path}: " + (
            "a folder; name the file in it" if path.is_dir() else
            "no such file; expected a checkpoint"))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{option} {path}: not a readable checkpoint "
                         f"({type(error).__name__}); it may be truncated or of another "
                         f"program") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{option} {path}: expected a dict of tensors by name, found "
                         f"{type(content).__name__}; name a checkpoint")
    return content


def refuse_a_used_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, expected a folder; name another")
    if (out / "checkpoint.pt").exists():
        raise ValueError(f"--out {out}: holds a run already; go on with it by --resume --out {out}"
                         f", or name another folder")
    if (out / "log.csv").exists():
        raise ValueError(f"--out {out}: holds the log of a run that ended before its first "
                         f"checkpoint, so --resume cannot help; delete it or name another folder")


def load_checkpoint(path: Path, option: str) -> dict:
    checkpoint = load_file(path, option)
    missing = {"model", "discriminator", "opt_E", "opt_D", "config", "step", "body", "rng",
               "seconds", "lr", "precision"} - set(checkpoint)
    if missing:
        raise ValueError(f"{option} {path}: lacks {', '.join(sorted(missing))}; expected a "
                         f"checkpoint written by train.py")
    types = {f.name: (int, float) if isinstance(f.default, float) else type(f.default)
             for f in dataclasses.fields(Config)}
    stored, body = checkpoint["config"], checkpoint["body"]
    if not (isinstance(stored, dict) and isinstance(body, list) and len(body) == 2
            and all(isinstance(value, types.get(key, object)) for key, value in stored.items())):
        raise ValueError(f"{option} {path}: its settings are not of train.py's types; expected a "
                         f"checkpoint written by train.py")
    unknown = set(stored) - set(types)
    if unknown:
        raise ValueError(f"{option} {path}: holds the unknown settings "
                         f"{', '.join(sorted(unknown))}; it was written by another version of "
                         f"train.py")
    return checkpoint


def save_state(log: "Log", state: dict, step: int, loss: float) -> None:
    """checkpoint.pt: what a continuation needs, bit-identical on a CPU (on a GPU, atomic sums
    differ from run to run; of several processes, only rank 0's dropout goes on where it was).  The
    body is kept only as its name and hash.  A good checkpoint is never replaced by one of NaNs."""
    log.require_finite(loss, step - 1)
    if rank_and_ranks()[0] > 0:
        return
    smpl, rng = state["model"].smpl, {"cpu": torch.get_rng_state()}
    if log.config.device == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state()
    content = {name: part.state_dict() for name, part in state.items()}
    content |= {"step": step, "seconds": log.seconds(), "rng": rng, "lr": log.lr,
                "precision": precision(state["model"]),
                "config": dataclasses.asdict(log.config), "body": [smpl.name, smpl.sha256]}
    file = io.BytesIO()
    torch.save(content, file)
    write_atomically(log.out / "checkpoint.pt", file.getvalue())


def load_state(checkpoint: dict, state: dict) -> tuple[int, float]:
    """Fill model, discriminators and optimisers -> (step, seconds) reached."""
    check_body(checkpoint, state["model"].smpl)
    fill(state, checkpoint)
    if rank_and_ranks()[0] > 0:             # these are rank 0's random numbers; others begin anew
        return checkpoint["step"], checkpoint["seconds"]
    torch.set_rng_state(checkpoint["rng"]["cpu"])
    if torch.cuda.is_available() and "cuda" in checkpoint["rng"]:
        torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])
    return checkpoint["step"], checkpoint["seconds"]


def restore(checkpoint: dict, config: Config) -> tuple[HMR, torch.nn.Module]:
    """The trained model, in eval mode, and its discriminators."""
    smpl = SMPL(config.smpl or None).to(config.device)
    check_body(checkpoint, smpl)
    model, D, _ = build(config, smpl, checkpoint)
    fill({"model": model, "discriminator": D}, checkpoint)
    return model.eval(), D


def fill(parts: dict, checkpoint: dict) -> None:
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except (RuntimeError, ValueError, KeyError):
        raise ValueError(f"the checkpoint's {name} does not fit its own settings; it was written "
                         f"by another version of train.py") from None


def check_body(checkpoint: dict, smpl: SMPL) -> None:
    name, sha256 = checkpoint["body"]
    if sha256 != smpl.sha256:
        raise ValueError(f"--smpl: the checkpoint was trained with {name} (sha256 {sha256[:12]}), "
                         f"this is {smpl.name} ({smpl.sha256[:12]}); name the same file")


class Log:
    """One fixed-width line, and one row of log.csv, for every `log_every` steps: their means.

    (After Ctrl-C between two lines, the first line of the continuation has fewer steps.)
    """
    COLUMNS = ("step", "loss_E", "L_kp", "L_joints", "L_smpl", "L_adv", "loss_D", "D_real",
               "D_fake", "abs_beta", "img/s", "left")

    def __init__(self, out: Path, config: Config, lr: float, start: int, seconds: float):
        self.out, self.config, self.lr, self.start, self.before = out, config, lr, start, seconds
        self.values, self.path = [], out / "log.csv"
        rows = [",".join(self.COLUMNS)]
        if start and self.path.exists():        # a run that died after its last checkpoint: rewind
            rows += [row for row in self.path.read_text().split("\n")[1:]
                     if row.count(",") == len(self.COLUMNS) - 1 and int(row.split(",")[0]) <= start]
        self.rows = "\n".join(rows) + "\n"      # written with the first line, not before
        print("".join(f"{name:>10s}" for name in self.COLUMNS))
        self.begun = self.line_begun = time.perf_counter()

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.begun

    def require_finite(self, loss: float, step: int) -> None:
        if on_any_rank(not math.isfinite(loss)):
            name = "--lr" if self.lr == self.config.lr else "--lr-scratch"
            raise ValueError(f"the losses are no longer finite at step {step + 1}: lower {name} "
                             f"{self.lr:g}" + (f"; {self.path} shows which term grew first"
                                               if self.path.exists() else ""))

    def add(self, step: int, values: list[Tensor]) -> None:
        self.values.append(torch.stack([v.detach() for v in values]))    # stays on the device
        if (step + 1) % self.config.log_every and step + 1 < self.config.steps:
            return
        means = torch.stack(self.values).mean(0)                      # (9,)
        rank, ranks = rank_and_ranks()
        if ranks > 1:                           # the joined batch's losses: see hmr.masked_mean
            dist.all_reduce(means)
        means = (means / ranks).tolist()
        now = time.perf_counter()
        rate = len(self.values) * self.config.batch / (now - self.line_begun)
        left = (self.config.steps - step - 1) * (now - self.begun) / (step + 1 - self.start)
        clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
        line = f"{step + 1:10d}" + "".join(f"{m:10.4g}" for m in means)
        print(line + f"{rate:10.0f}{clock:>10s}", flush=True)
        row = ",".join([str(step + 1), *(f"{m:.6g}" for m in means), f"{rate:.1f}", f"{left:.0f}"])
        if rank == 0:
            if self.rows is not None:
                write_atomically(self.path, self.rows.encode())
                self.rows = None
            with open(self.path, "a") as file:
                file.write(row + "\n")
        self.require_finite(sum(means), step)
        self.values, self.line_begun = [], now


@torch.no_grad()
def overlays(model: HMR, batch: Batch) -> Tensor:
    """input | overlay | turned 90 degrees of a few held-out pictures -> (3, B * 224, 3 * 224)."""
    was_training = model.training
    model.eval()
    thetas, _ = model(batch.image)
    pred = model.decode(thetas[-1], vertices=True)
    model.train(was_training)
    return look_at(batch.image, pred.vertices, model.smpl.faces, pred.cam)


def finish(model: HMR, D: torch.nn.Module, shown: Batch, log: Log) -> dict:
    """The table, the picture and metrics.json of a finished run."""
    out, config, seconds = log.out, log.config, log.seconds()
    save_png(out / "picture.png", overlays(model, shown))
    metrics = evaluate(model, config, torch.device(config.device), D if config.adv else None)
    metrics |= {"seconds": seconds, "images": config.steps * config.batch,
                "precision": precision(model),
                "device": device_name(config.device), "torch": torch.__version__,
                "seed": config.seed,
                "config": dataclasses.asdict(config) | {"lr_used": log.lr}}
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    print_table(metrics)
    print(f"{metrics['images']:,} pictures in {seconds / 60:.1f} min on {metrics['device']}; "
          f"picture: {out / 'picture.png'}  numbers: {out / 'metrics.json'}")
    return metrics


MEASURES = (("mpjpe", "MPJPE mm"), ("pa_mpjpe", "PA-MPJPE mm"), ("pve", "PVE mm"),
           ("px", "2D px/224"), ("pck", "PCK@150 %"), ("auc", "AUC %"), ("outside", "outside %"),
           ("mocap", "mocap deg"), ("beta3", "beta>3 %"))


def print_table(metrics: dict) -> None:
    print(f"held-out clips, measured in float32; trained in {metrics['precision']}")
    print(" " * 14 + "".join(f"{title:>12s}" for _, title in MEASURES))
    rows = [("Theta-bar", metrics["baseline"])]
    rows += [(f"iteration {t + 1}", m) for t, m in enumerate(metrics["per_iteration"])]
    for name, row in [*rows, ("truth", metrics["truth"])]:
        print(f"{name:14s}" + "".join(f"{row[key]:12.1f}" for key, _ in MEASURES))
    share = [100 * metrics[key] / metrics["baseline"][key] for key, _ in MEASURES[:4]]     # errors
    print(f"{'% of Theta-bar':14s}" + "".join(f"{s:12.0f}" for s in share))
    for side, heads in metrics.get("heads", {}).items():
        print(f"D's {len(heads)} outputs on {side}: min {min(heads):.2f}, median "
              f"{statistics.median(heads):.2f}, max {max(heads):.2f}")


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, " + torch.backends.cpu.get_cpu_capability()


# How monstrous are bodies?  For --ablate, but every run measures it.

# degrees: draw_poses' noise moves a recorded rotation by 12 or less, 1,999 times in 2,000
RANGE = 20.0


def recorded_rotations(config: Config, device) -> Tensor:
    """The training clips' frames and their mirror images -> (F, 23, 9), without root."""
    pose = load_mocap(config.upright, held_out=False)                 # (frames, 24, 3)
    pose = torch.cat([pose, mirror_pose(pose)])[:, 1:].to(device)     # (F, 23, 3)
    return batch_rodrigues(pose).flatten(2)                           # (F, 23, 9)


def monstrosity(body: HMROutput, recorded: Tensor) -> dict[str, Tensor]:
    """How far bodies are from any that motion capture has seen; `recorded` (F, 23, 9).

    outside (B, 23): 100 where a joint's rotation is over 20 degrees from each that was recorded of
    this joint (held-out clips: 1 in 100); mocap (B,): degrees to the nearest recorded pose, mean
    over joints; beta3 (B, 10): 100 where |beta| > 3 standard deviations.  The root is free.
    """
    rotmats = body.rotmats[:, 1:].flatten(2)                          # (B, 23, 9)
    # the angle of A^T B, from its trace = the sum of the products of A's and B's elements
    cosine = (torch.einsum("bjk,fjk->bfj", rotmats, recorded) - 1) / 2            # (B, F, 23)
    angle = cosine.clamp(-1, 1).acos().rad2deg()                      # (B, F, 23)
    return {"outside": 100.0 * (angle.amin(1) > RANGE), "mocap": angle.mean(2).amin(1),
            "beta3": 100.0 * (body.betas.abs() > 3)}


# --bench: what each part of a step costs, on top of the encoder that any such network pays for.

STAGES = ("encoder: forward, backward, Adam", "+ regressor", "+ SMPL and losses",
          "+ discriminators, L_adv", "+ pictures and motion", "+ rates and log: the whole loop")


def bench_steps(config: Config, smpl: SMPL, device) -> dict:
    """train()'s step, built up part by part: each of STAGES -> a function that does one step.

    A test holds the weights that the last one leaves against train()'s.
    """
    torch.manual_seed(config.seed + rank_and_ranks()[0])
    model, D, lr = build(config, smpl)
    world = training_world(config, smpl, device)
    opt_E = torch.optim.Adam(model.parameters(), lr, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), config.lr_d, fused=True)
    with contextlib.redirect_stdout(None):                            # without its header
        log = Log(Path(), dataclasses.replace(config, steps=2 ** 62, log_every=2 ** 62), lr, 0, 0.0)
    model.train(), D.train()
    E, judge = share_gradients(model), share_gradients(D)
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
            for optimizer, rate in ((opt_E, lr), (opt_D, config.lr_d)):
                optimizer.param_groups[0]["lr"] = rate * lr_factor(number, config)
            return log.add(number, train_step(E, judge, opt_E, opt_D, batch, motion, config))
        image = batch.image.contiguous(memory_format=torch.channels_last)
        if stage < 2:
            feature = model.encode(image)                             # (B, C)
            out = feature if stage == 0 else torch.cat(model.regressor(feature))
            return descend(opt_E, out.square().mean())
        if stage == 2:
            return train_step(E, judge, opt_E, opt_D, batch, None, without_D)
        train_step(E, judge, opt_E, opt_D, batch, motion, config)
    return {name: functools.partial(step, stage) for stage, name in enumerate(STAGES)}


def bench_inference(config: Config, smpl: SMPL, device, B: int) -> dict:
    """The same for inference: name -> a function that does one forward pass of B pictures."""
    model = build(config, smpl)[0].eval()
    image = torch.rand(B, 3, config.size, config.size, device=device)
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


def bench(config: Config, rounds: int) -> None:
    """Print what the parts of a training step, and of inference, cost."""
    device, smpl = torch.device(config.device), SMPL(config.smpl or None).to(config.device)
    print(f"ResNet-{config.depth} of width {config.width}, {config.size} px, batch {config.batch}, "
          f"V = {len(smpl.v_template)}; {device_name(config.device)}; medians of {rounds} rounds")
    titles = f"{'ms':>10s}  {'[quartiles]':20s}{'x encoder':>9s}{'share':>11s}{'img/s':>10s}"
    print(f"{'a training step':34s}" + titles)
    print_costs(in_turn(bench_steps(config, smpl, device), rounds, device), config.batch)
    print(f"peak memory of training: {peak_memory(device) / 2 ** 30:.2f} GiB")
    with torch.inference_mode():
        for B in (1, 64):
            print(f"{f'inference, {B} at a time':34s}" + titles)
            print_costs(in_turn(bench_inference(config, smpl, device, B), rounds, device), B)


def bench_growth(config: Config, rounds: int) -> None:
    """Print how a whole training step's cost grows, one setting at a time."""
    if rank_and_ranks()[1] > 1:
        raise ValueError("--bench grow: expected one process; leave torchrun out")
    device, V = torch.device(config.device), len(SMPL(config.smpl or None).v_template)
    print(f"{'':16s}{'img/s':>10s}{'ms':>10s}{'x encoder':>11s}   {device_name(config.device)}, "
          f"medians of {rounds} rounds, the rest as depth {config.depth}, {config.size} px, "
          f"batch {config.batch}")
    for name, values in (("batch", (1, 4, 16, 64, 256)), ("size", (64, 96, 128, 224)),
                         ("depth", (18, 34, 50, 101, 152)),
                         ("vertices", sorted({V, max(V, 6890)}))):
        for value in values:
            smpl = SMPL(config.smpl or None)
            if name == "vertices":
                smpl, changed = with_vertices(smpl, value), config
            else:
                changed = dataclasses.replace(config, **{name: value})
            steps = bench_steps(changed, smpl.to(device), device)
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
    smpl.prepare()
    return smpl


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


def parse(argv: list[str] | None) -> tuple[dict, argparse.Namespace]:
    """Flags -> (the Config fields that were given, the rest).  Every field is a flag; an unknown
    or misspelt one ends the program with status 2."""
    parser = argparse.ArgumentParser(description="Train HMR on synthetic people.",
                                     allow_abbrev=False)
    parser.add_argument("--small", action="store_true",
                        help="a small network and world: prints what it changes")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true",
                      help="go on with the run in --out, with its own settings")
    mode.add_argument("--eval", metavar="CHECKPOINT", type=Path,
                      help="only measure this checkpoint on the held-out clips")
    mode.add_argument("--ablate", action="store_true",
                      help=f"train and compare the variants {', '.join(ABLATION)}; to go on after "
                           f"an interruption, the same command")
    mode.add_argument("--degradation", action="store_true",
                      help=f"train and compare {', '.join(NETWORKS)}, --small")
    mode.add_argument("--bench", nargs="?", const="step", choices=("step", "grow"),
                      help="only measure what the parts of a step cost, --steps rounds [20]; grow: "
                           "how a step's cost grows with batch, size, depth and body [5]")
    parser.add_argument("--variants", metavar="A,B,..",
                        help="only these, of --ablate or --degradation [all]")
    parser.add_argument("--seeds", metavar="N", type=int,
                        help="how many, of --ablate or --degradation, from --seed on [1]")
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else \
            {"type": type(f.default), "choices": f.metadata["choices"]}
        parser.add_argument(*flags_of(f.name), dest=f.name, default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} [{f.default}]".replace("%", "%%")
                            .removesuffix(" []"), **kind)
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config)
             if hasattr(args, f.name)}
    if given.get("out") == "":
        raise ValueError("--out: expected the name of a folder, got none")
    args.experiment = args.ablate or args.degradation
    for option in ("variants", "seeds"):
        if getattr(args, option) is not None and not args.experiment:
            raise ValueError(f"--{option} belongs to --ablate or --degradation; add one of them "
                             f"or leave it out")
    if args.seeds is None:
        args.seeds = 1
    args.small |= args.degradation
    given.setdefault("out", "runs/ablation" if args.ablate else "runs/degradation" if
                     args.degradation else "runs/small" if args.small else "runs/full")
    return given, args


def flags_of(name: str) -> list[str]:
    """A field's names on the command line; the first is what messages call it."""
    return ["--3d", "--paired"] if name == "paired" else ["--" + name.replace("_", "-")]


def make_config(given: dict, preset: dict) -> Config:
    """The defaults, then a preset, then the flags that were given.  Raises ValueError."""
    config = Config(**(preset | given))
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    at_least = {"width": 8, "iterations": 1, "size": 32, "batch": 2, "steps": 1, "log_every": 1,
                "picture_every": 1, "save_every": 1, "eval_pictures": 1, "seed": 0, "dropout": 0,
                "lr": 0, "lr_scratch": 0, "lr_d": 0, "weight_kp": 0, "weight_joints": 0,
                "weight_smpl": 0, "weight_adv": 0}
    for name, least in at_least.items():
        value = getattr(config, name)
        if not least <= value < 2 ** 63:                              # False for NaN too
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {least} (and below "
                             f"2^63), got {value}")
    if "lr" in given and config.pretrained == "none":
        raise ValueError("--lr: with --pretrained none the rate is --lr-scratch; set that one")
    _, ranks = rank_and_ranks()
    if config.batch % ranks or config.batch < 2 * ranks:
        raise ValueError(f"--batch {config.batch}: expected a multiple of the {ranks} processes, "
                         f"at least two pictures each; change it or --nproc_per_node")
    if config.dropout >= 1:
        raise ValueError(f"--dropout: expected a probability below 1, got {config.dropout}")
    return config


# --------------------------------------------------------------------------------------------
# Experiments: the same `train`, once for every variant and seed.

# --ablate: what each variant changes (the flags' help says which claim it tests).
ABLATION = {"paired+adv": {}, "adv": {"paired": False}, "paired": {"adv": False},
            "neither": {"paired": False, "adv": False}, "T=1": {"iterations": 1},
            "whole": {"discriminator": "whole"}, "supervise-all": {"supervise": "all"}}
FIGURE = {"paired+adv": "paired 3D + adversary", "adv": "adversary only (Fig. 4)",
          "paired": "paired 3D only", "neither": "neither (Fig. 5)"}
# --degradation: no adversary, so that all four networks minimise one and the same loss.
NETWORKS = {f"{kind}-{depth}": {"plain": kind == "plain", "depth": depth}
            for kind in ("plain", "ResNet") for depth in (18, 34)}
DEGRADATION = dict(adv=False, log_every=10, steps=4_000)             # changes of --small
DEGRADATION_CPU = dict(steps=600)


def experiment(given: dict, preset: dict, args: argparse.Namespace) -> None:
    """Train what is not trained yet, one after another; tables after each run, figures at the end.

    Each run has its own folder, out/<variant>_seed<k>; a finished one is left alone, an interrupted
    one goes on.  Raises ValueError.
    """
    variants, kind = (ABLATION, "ablation") if args.ablate else (NETWORKS, "degradation")
    names = list(variants if args.variants is None else dict.fromkeys(args.variants.split(",")))
    for name in names:
        if name not in variants:
            raise ValueError(f"--variants {args.variants}: {name!r} is none of the variants "
                             f"{', '.join(variants)}")
    for name in sorted(set(given) & set().union(*variants.values())):
        raise ValueError(f"{flags_of(name)[0]}: the variants differ in it; leave it out")
    if rank_and_ranks()[1] > 1:
        raise ValueError("--ablate and --degradation run in one process; start them by python, not "
                         "by torchrun")
    if not 1 <= args.seeds <= 1000:
        raise ValueError(f"--seeds: expected 1 to 1000, got {args.seeds}")
    if args.degradation and given.get("adv"):
        raise ValueError("--adv: --degradation compares one loss, without the adversary; leave it "
                         "out")
    out, first, names_in_order = Path(given["out"]), given.get("seed", 0), list(variants)

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
        print(f"\n{run[0]}, seed {run[1]}: run {len(wanted) - len(missing) + n + 1} of "
              f"{len(wanted)}" + (f", {datetime.timedelta(seconds=round(left))} left for all"
                                  if seconds else ""))
        try:
            train_or_go_on(config_of_run(*run))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("with the same options as before") from None
        TABLES[kind](out, finished())           # what there is so far
    if not missing:
        TABLES[kind](out, finished())
    FIGURES[kind](out, finished())
    print("\n" + (out / f"{kind}.md").read_text(encoding="utf-8") + f"\nwritten to {out}")


def require_same_settings(config: Config) -> None:
    """A folder's earlier run must be the one that is asked for now."""
    folder = Path(config.out)
    if (folder / "metrics.json").is_file():
        stored = load_metrics(config)["config"]
    elif (folder / "checkpoint.pt").is_file():
        stored = load_checkpoint(folder / "checkpoint.pt", "--out")["config"]
    else:
        return
    for f in dataclasses.fields(Config):
        now, then = getattr(config, f.name), stored.get(f.name, f.default)
        free = ("device", "out", "log_every", "picture_every", "save_every")
        if now != then and f.name not in free:
            raise ValueError(f"--out {folder.parent}: {folder.name} was trained with "
                             f"{flags_of(f.name)[0]} {then}, now it is {now}; give the same "
                             f"options as before or name another folder")


def load_metrics(config: Config) -> dict:
    path = Path(config.out) / "metrics.json"
    try:
        metrics = json.loads(path.read_text())
    except ValueError:
        metrics = {}
    if not (isinstance(metrics, dict) and
            {"config", "truth", "baseline", "per_iteration", "seconds", "device",
             "torch"} <= set(metrics)):
        raise ValueError(f"{path}: not the numbers of a finished run; delete it, and the run's "
                         f"checkpoint will be measured again")
    return metrics


def train_or_go_on(config: Config) -> None:
    path = Path(config.out) / "checkpoint.pt"
    if path.is_file():
        train(config, load_checkpoint(path, "--out"))
    else:                                       # the log of a run without a checkpoint helps nobody
        path.with_name("log.csv").unlink(missing_ok=True)
        train(config)


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
    where = sorted({f"{m['device']}, torch {m['torch']}" for m in map(load_metrics,
                                                                     configs.values())})
    return (f"{what}: {c.steps:,} steps of {c.batch} pictures of {c.size} px, networks of width "
            f"{c.width}, seeds {', '.join(map(str, seeds))}; mean ± standard deviation "
            f"where a row has several. {'; '.join(where)}.\n\n")


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
        bodies = {"truth": metrics["truth"], "Theta-bar": metrics["baseline"],
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
    common = [line(body, (one, body), len(keys) + 1) + ["", ""] for body in ("Theta-bar", "truth")]
    text = heading("Ablation", configs) + markdown(
        ["", *titles, "D on real", "D on fake"],
        [common[0], *(line(name, (name, f"iteration {t}"), 99) for name, t in T.items()),
         common[1]])
    if "paired+adv" in T:
        steps = [line(body, ("paired+adv", body), len(keys) + 1)
                 for body in ("Theta-bar", *(f"iteration {t + 1}" for t in range(T["paired+adv"])))]
        alone = [line("T = 1, trained alone", ("T=1", "iteration 1"), len(keys) + 1)] \
            if "T=1" in T else []
        text += "\n" + markdown(["paired+adv", *titles], [*steps, *alone])
    write_atomically(out / "ablation.md", text.encode())


@torch.no_grad()
def ablation_figures(out: Path, configs: dict[tuple[str, int], Config]) -> None:
    """Five held-out pictures, taken at regular intervals: what each variant of the first seed
    sees in them (ablation.png), and how the iterations arrive there (iterations.png)."""
    seed = min(seed for _, seed in configs)
    drawn = {name: configs[name, seed] for name in FIGURE if (name, seed) in configs}
    columns, iterations = {}, {}
    for name, config in drawn.items():
        model, _ = restore(load_checkpoint(Path(config.out) / "checkpoint.pt", "--out"), config)
        if not columns:     # the same people twice: as the network sees them, and fit to draw on
            (image, keypoints2d, *_), (sharp, *_) = (
                [f[::13] for f in next(evaluation_pictures(dataclasses.replace(
                    config, size=size, eval_pictures=64), model.smpl, config.device))]
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


def probe(config: Config) -> tuple[list[float], list[float]]:
    """A finished run -> norms of the loss's gradient at the first layer, before and after training
    (on one batch that training did not see); and the standard deviation of each 3x3 layer's
    response after BN, before ReLU and addition, on held-out pictures (He et al., Fig. 7)."""
    checkpoint = load_checkpoint(Path(config.out) / "checkpoint.pt", "--out")
    kept = Path(config.out) / "probe.json"
    if kept.is_file():
        of, *result = json.loads(kept.read_text())
        if of == checkpoint["seconds"]:         # no two runs take equally long
            return tuple(result)
    device = torch.device(config.device)
    torch.manual_seed(config.seed)              # as `train` begins
    model, _, _ = build(config, SMPL(config.smpl or None).to(device))
    model.amp = None                            # networks are compared in one precision: float32
    batch = training_world(config, model.smpl, device).batch(config.steps)

    def gradient() -> float:
        still = torch.optim.SGD(model.parameters(), 0.0)              # a step of length 0
        train_step(model.train(), None, still, None, batch, None, config)         # adv is off
        return model.encoder.conv1.weight.grad.norm().item()
    before, responses = gradient(), []
    fill({"model": model}, checkpoint)
    for name, layer in model.encoder.named_modules():
        if name.startswith("layer") and name.rpartition(".")[2] in ("bn1", "bn2"):
            layer.register_forward_hook(lambda _, i, y: responses.append(y.float().std().item()))
    with torch.no_grad():
        model.eval()(next(evaluation_pictures(config, model.smpl, device)).image)
    layers = list(responses)                    # the gradient's forward pass appends again
    result = [before, gradient()], layers
    write_atomically(kept, json.dumps([checkpoint["seconds"], *result]).encode())
    return result


def loss_curve(config: Config) -> tuple[list[int], list[float]]:
    rows = list(csv.DictReader(io.StringIO((Path(config.out) / "log.csv").read_text())))
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
        for row in csv.DictReader(io.StringIO((out / path).read_text())):
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


TABLES = {"ablation": ablation_tables, "degradation": degradation_tables}
FIGURES = {"ablation": ablation_figures, "degradation": degradation_figure}


def small_preset(given: dict, degradation: bool = False) -> dict:
    """--small's changes, printed; fewer steps where there is no GPU."""
    preset = with_gpu = SMALL | (DEGRADATION if degradation else {})
    if given["device"] == "cpu":
        preset = preset | SMALL_CPU | (DEGRADATION_CPU if degradation else {})
    shown = {name: value for name, value in (preset | given).items()
             if value != getattr(Config, name) and name not in ("device", "out")}
    print("--small changes:", ", ".join(f"{n} {getattr(Config, n)} -> {v}"
                                        for n, v in shown.items()))
    fewer = [f"{n} {preset[n]} instead of {with_gpu[n]}" for n in SMALL_CPU if n not in given]
    if given["device"] == "cpu" and fewer:
        print("no GPU:", ", ".join(fewer))
    return preset


def config_of(checkpoint: dict, given: dict, allowed: set[str], option: str) -> Config:
    """A checkpoint's own settings on this machine's device; only `allowed` flags may differ."""
    for name in sorted(set(given) - allowed - {"device", "out"}):
        raise ValueError(f"{flags_of(name)[0]}: {option} keeps the run's own settings; leave it "
                         f"out")
    return make_config(given, checkpoint["config"])


def run(argv: list[str] | None) -> None:
    given, args = parse(argv)
    # float32 means float32: TF32 would be 1 mm in a body, and is a GPU's default in convolutions
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if given.setdefault("device", "auto") == "auto":
        given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    join_the_ranks(given["device"])
    if args.eval and args.small:
        raise ValueError("--small: --eval keeps the run's own settings; leave it out")
    if args.eval:
        checkpoint = load_checkpoint(args.eval, "--eval")
        config = config_of(checkpoint, given, {"smpl", "eval_pictures"}, "--eval")
        model, D = restore(checkpoint, config)
        metrics = evaluate(model, config, torch.device(config.device), D if config.adv else None)
        print_table(metrics | {"precision": checkpoint["precision"]})
    elif args.bench:
        rounds = given.pop("steps", 20 if args.bench == "step" else 5)
        if rounds < 1:
            raise ValueError(f"--steps {rounds}: expected at least 1 round of --bench")
        given = {"pretrained": "none"} | given                        # as dear, and no download
        config = make_config(given, small_preset(given) if args.small else {})
        if not config.adv or config.supervise == "all":
            raise ValueError("--bench times the step with the adversary and --supervise last; "
                             "leave --no-adv and --supervise out")
        (bench if args.bench == "step" else bench_growth)(config, rounds)
    elif args.resume:
        checkpoint = load_checkpoint(Path(given["out"]) / "checkpoint.pt", "--resume")
        config = config_of(checkpoint, given, {"smpl", "steps", "log_every", "picture_every",
                                               "save_every", "eval_pictures"}, "--resume")
        if config.steps == checkpoint["step"] and (Path(given["out"]) / "metrics.json").exists():
            raise ValueError(f"--resume: the run is finished; measure it again by --eval "
                             f"{given['out']}/checkpoint.pt, or give it more --steps")
        if config.steps < checkpoint["step"]:
            raise ValueError(f"--steps {config.steps}: the run has already done "
                             f"{checkpoint['step']}")
        train(config, checkpoint)
    else:
        preset = small_preset(given, args.degradation) if args.small else {}
        if args.experiment:
            experiment(given, preset, args)
        else:
            train(make_config(given, preset))


def main(argv: list[str] | None = None) -> int:
    try:
        status = exit_status("train.py", lambda: run(argv))
        if status == 0 and dist.is_initialized():
            dist.destroy_process_group()
        return status
    except KeyboardInterrupt as stop:
        if rank_and_ranks()[0] == 0:
            print(f"\nstopped; saved: go on with  python train.py {stop}" if stop.args else
                  "\nstopped at once; the last checkpoint, if there was one, is kept",
                  file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
