"""The field's mistakes in one table: what, whose, the edit that makes it here, the test that fails.

HMR has been written anew often, and the same things went wrong again and again.  Each row of
MISTAKES is one of them with the published code that shows it, and edits of one line that make it
in this code.  Three readers: `python -m appendix.gallery` applies each edit to a copy and runs only
the test that must catch it; `appendix.exercises grade` runs the edited reference beside a student's
wrong answer and names the mistake whose output is the same; whoever writes HMR once more reads it.

    python -m appendix.gallery              # all, two minutes of processor time (Linux)
    python -m appendix.gallery 20 38        # these numbers
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

from smpl import exit_status, printable

HERE = Path(__file__).resolve().parent.parent
CHAPTERS = ("smpl.py", "hmr.py", "data.py", "train.py")


class Edit(NamedTuple):
    file: str
    old: str                 # stands once in the file, in one line
    new: str
    test: str                # of test_hmr.py, or FILE::NAME: fails after the edit
    tell: str                # to the student who made it
    task: int = 0            # of appendix/exercises.py; 0: in no task's lines


class Mistake(NamedTuple):
    number: int
    what: str
    who: str                 # the published code that shows it; "" = anyone's slip
    edits: tuple[Edit, ...] = ()
    elsewhere: str = ""      # without edits: why it cannot be made here


# --------------------------------------------------------------------------------------------
# A test run in a process of its own.  The parent has imported torch, which takes seconds, and has
# computed nothing (a process whose threads have worked must not be forked); each child imports the
# chapters of its own folder anew.

class Job(NamedTuple):
    key: object
    files: dict[str, str]                     # path in the folder: text in place of the project's
    tests: tuple[str, ...] = ()               # run in this order, up to the first that fails
    probe: Callable | None = None             # called with the fresh chapters -> {name: Tensor}
    appendix: bool = False                    # are its modules and tests needed?
    seconds: float = 120                      # of processor time; twice that by the clock


class Result(NamedTuple):
    passed: list[str]                         # names of tests
    failed: list[tuple[str, str]]             # (name, message)
    outputs: dict | None                      # the probe's: name -> (shape, numbers)
    probe_error: str                          # what it raised
    ending: str                               # "" if the process reported and left as it should


def message_of(report) -> str:
    """The first words of a failure, without what repeats itself: kind, machine, versions."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    text = text.removeprefix("AssertionError: ")
    text = re.split(r"\nassert ", text)[0].strip()
    if not crash and text:                    # an import that failed: the last line says why
        text = text.splitlines()[-1].removeprefix("E").strip()
    text = re.sub(r"; (bf16|float32) encoder with --amp[^)]*\)", ")", " ".join(text.split()))
    return printable(text)[:600]


class _Reports:
    """A pytest plugin that counts: exit codes and printed lines prove nothing."""

    def __init__(self):
        self.passed, self.failed = [], []

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.partition("::")[2]
        if report.failed:
            self.failed.append((name, message_of(report)))
        elif report.when == "call" and report.passed:
            self.passed.append(name)

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed.append((report.nodeid, message_of(report)))


def _limit(seconds: float) -> None:
    """Processor time, 4 GiB more than importing torch took, files of 256 MiB, no core dump."""
    import resource                           # not on Windows
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for what, most in ((resource.RLIMIT_CPU, int(seconds)), (resource.RLIMIT_FSIZE, 2 ** 28),
                       (resource.RLIMIT_AS, pages * resource.getpagesize() + 2 ** 32),
                       (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (most, most))


def _work(job: Job, folder: Path) -> None:
    """In the child: run the job in its folder and leave outputs.json and tests.json there."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ.pop("PYTEST_ADDOPTS", None)
    sys.dont_write_bytecode = True
    _limit(job.seconds)
    os.chdir(folder)
    own = {Path(file).stem for file in CHAPTERS} | {"test_hmr", "appendix"}
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]
    sys.path[:] = [str(folder)] + [p for p in sys.path if p and Path(p).resolve() != HERE]
    import pytest
    import torch
    torch.set_num_threads(1)
    if job.probe:
        found = {"outputs": None, "error": ""}
        try:
            chapters = types.SimpleNamespace(**{Path(file).stem: importlib.import_module(
                Path(file).stem) for file in CHAPTERS})
            outputs = job.probe(chapters)
            found["outputs"] = {name: (list(x.shape), x.detach().double().flatten().tolist())
                                for name, x in outputs.items()}
        except BaseException as error:        # SystemExit, too
            found["error"] = f"{type(error).__name__}: {error!s:.300}"
        (folder / "outputs.json").write_text(json.dumps(found), encoding="utf-8")
    if job.tests:
        reports = _Reports()
        ids = [test if "::" in test else f"test_hmr.py::{test}" for test in job.tests]
        pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--rootdir",
                     str(folder), "-c", os.devnull, "--basetemp", str(folder / "tmp"), *ids],
                    plugins=[reports])
        (folder / "tests.json").write_text(json.dumps([reports.passed, reports.failed]),
                                           encoding="utf-8")


def _fill(folder: Path, job: Job) -> None:
    copied = [*CHAPTERS, "test_hmr.py", *(f"assets/{p.name}" for p in HERE.glob("assets/*.npz"))]
    if job.appendix:
        copied += [f"appendix/{p.name}" for p in HERE.glob("appendix/*.py")]
    for name in copied:
        (folder / name).parent.mkdir(exist_ok=True)
        if name not in job.files:
            shutil.copyfile(HERE / name, folder / name)
    for name, text in job.files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _read(folder: Path, name: str):
    """A child's own report, not to be trusted: None if it is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if (folder / name).stat().st_size < 2 ** 26:
            return json.loads((folder / name).read_text(encoding="utf-8"))


def _collect(job: Job, folder: Path, ending: str) -> Result:
    found, tests = _read(folder, "outputs.json"), _read(folder, "tests.json")
    try:
        outputs, error = (found["outputs"], found["error"]) if job.probe else (None, "")
        passed, failed = tests if job.tests else ([], [])
        return Result([str(name) for name in passed], [(str(n), str(m)) for n, m in failed],
                      outputs, str(error), ending)
    except (TypeError, KeyError, ValueError):
        return Result([], [], None, "", ending or "the process ended without a report: did the "
                      "code leave by itself (os._exit)?")


def run_apart(jobs: Iterable[Job], processes: int = 0) -> Iterator[tuple[Job, Result]]:
    """Run each job in a forked process with its limits, some at a time; yield as they end."""
    if not (hasattr(os, "fork") and Path("/proc/self/statm").exists()):
        raise ValueError("grading, check and gallery need Linux; write and pytest do not")
    for slow in ("pytest", "scipy.io", "scipy.spatial.transform", "torchvision.transforms.v2"):
        importlib.import_module(slow)         # once, for all
    jobs, running = iter(jobs), {}
    processes = processes or min(len(os.sched_getaffinity(0)), 8)
    try:
        while True:
            while len(running) < processes and (job := next(jobs, None)) is not None:
                folder = Path(tempfile.mkdtemp(prefix="hmr_")).resolve()
                _fill(folder, job)
                sys.stdout.flush(), sys.stderr.flush()
                if (pid := os.fork()) == 0:
                    with contextlib.suppress(BaseException):
                        _work(job, folder)
                        os._exit(0)
                    os._exit(1)
                running[pid] = job, folder, time.monotonic() + 2 * job.seconds
            if not running:
                return
            time.sleep(0.01)
            for pid, (job, folder, deadline) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                late = not done and time.monotonic() > deadline
                if done or late:
                    del running[pid]
                    _end(pid, reaped=bool(done))
                    result = _collect(job, folder, _ending(job, status, late))
                    shutil.rmtree(folder, ignore_errors=True)
                    yield job, result
    finally:
        for pid, (_, folder, _) in running.items():
            _end(pid, reaped=False)
            shutil.rmtree(folder, ignore_errors=True)


def _end(pid: int, reaped: bool) -> None:
    """A child and whatever it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    if not reaped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _ending(job: Job, status: int, late: bool) -> str:
    if late or os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return f"did not end within {job.seconds:g} seconds: an endless loop?"
    if os.WIFSIGNALED(status):
        return f"the process was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return ""


# --------------------------------------------------------------------------------------------
# The table

DATASETS, PHOTO, BODY_FILE = (f"appendix/{name}.py" for name in ("datasets", "photo", "body_file"))
IN_DATASETS, IN_APPENDIX = "appendix/test_datasets.py::", "appendix/test_appendix.py::"

MISTAKES = (
    Mistake(1, "the camera, s (X + t) in the code and s X + t in the paper", "paper, Eq. (2)", (
        Edit("hmr.py", "return s * (points[..., :2] + t)", "return s * points[..., :2] + t",
             "test_projection_is_the_official_codes",
             "yours is the paper's s X + t; the official code's t is in metres: s (X + t)", 9),
        Edit("hmr.py", "s, t = cam[:, None, :1], cam[:, None, 1:]",
             "s, t = cam[:, None, 2:], cam[:, None, :2]", "test_projection_is_the_official_codes",
             "yours reads cam as [tx, ty, s]; it is [s, tx, ty]", 9),
        Edit("hmr.py", "return s * (points[..., :2] + t)",
             "return s * (points[..., :2] / points[..., 2:] + t)",
             "test_projection_is_the_official_codes",
             "yours divides by the depth; weak perspective drops it", 9))),
    Mistake(2, "the pictures' value range and order of colours", "pytorch_HMR", (
        Edit("hmr.py", "images = (images - self.mean) / self.std", "images = 2 * images - 1",
             "test_the_encoder_sees_imagenets_scale_and_the_last_theta_is_decoded",
             "[-1, 1] is for the official v2 network; torchvision's weights want mean and std"),
        Edit("hmr.py", "images = (images - self.mean) / self.std",
             "images = (images.flip(1) - self.mean) / self.std",
             "test_the_encoder_sees_imagenets_scale_and_the_last_theta_is_decoded",
             "OpenCV reads BGR, ImageNet's weights expect RGB"))),
    Mistake(3, "ResNet v1 mixed with v2; a shortcut or a stride in the wrong place", "", (
        Edit("hmr.py", "y = y + self.downsample(x)", "y = F.relu(y) + self.downsample(x)",
             "test_resnet_equals_torchvisions[18]",
             "your ReLU comes before the addition; in v1 it comes after y = F(x) + x", 5),
        Edit("hmr.py", "        return F.relu(y)", "        return y",
             "test_resnet_equals_torchvisions[18]",
             "you have no ReLU after the addition, as in v2's blocks, which begin with one", 5),
        Edit("hmr.py", "if self.downsample is not None:", "if False:", "test_a_residual_block_with_zero_weights_is_the_identity",
             "yours is the plain network's block: the shortcut is missing", 5),
        Edit("hmr.py", "    if stride == 1 and inputs == outputs:", "    if stride == 1:",
             "test_resnet_equals_torchvisions[50]",
             "an identity needs equal channels, too: ResNet-50's first stage goes from 64 to 256",
             5),
        Edit("hmr.py", "stride = 2 if stage > 0 and i == 0 else 1", "stride = 2 if i == 0 else 1",
             "test_resnet_equals_torchvisions[18]",
             "conv2_x has no stride: the pool before it has halved the picture already", 6),
        Edit("hmr.py", "stride = 2 if stage > 0 and i == 0 else 1",
             "stride = 2 if stage > 0 else 1", "test_resnet_equals_torchvisions[18]",
             "only the first block of a stage has the stride", 6),
        Edit("hmr.py", "channels = width * 2 ** stage * block.expansion",
             "channels = width * 2 ** stage",
             "test_resnet_equals_torchvisions[50]",
             "a bottleneck's output has 4 * width channels: block.expansion", 6))),
    Mistake(4, "a ReLU lost (in TensorFlow's slim it is a default that no line shows)",
            "SPIN (regressor), pytorch_HMR (D's embedding)", (
        Edit("hmr.py", "x = F.dropout(F.relu(self.fc1(x)), self.dropout, self.training)",
             "x = F.dropout(self.fc1(x), self.dropout, self.training)",
             "test_the_regressor_equals_a_hand_written_loop",
             "the ReLU after fc1 is missing, as in SPIN", 8),
        Edit("hmr.py", "x = F.dropout(F.relu(self.fc2(x)), self.dropout, self.training)",
             "x = F.dropout(self.fc2(x), self.dropout, self.training)",
             "test_the_three_thetas_are_the_official_codes",
             "the ReLU after fc2 is missing", 8),
        Edit("hmr.py", "x = F.relu(self.embed1(x))", "x = self.embed1(x)",
             "test_the_23_joint_heads_are_23_separate_linears",
             "the ReLU after embed1 is missing, as in pytorch_HMR", 13),
        Edit("hmr.py", "x = F.relu(self.embed2(x))", "x = self.embed2(x)",
             "test_ds_25_outputs_are_the_official_codes",
             "the ReLU after embed2 is missing, as in pytorch_HMR", 13))),
    Mistake(5, "the last layer's initialisation: a gain of 0.1", "SPIN, pytorch_HMR", (
        Edit("hmr.py", "(self.fc3, 0.1)", "(self.fc3, 0.01)", "test_the_regressor_is_the_papers",
             "0.01 is SPIN's; the official code's is 0.1"),
        Edit("hmr.py", "(self.fc3, 0.1)", "(self.fc3, 1.0)", "test_the_regressor_is_the_papers",
             "with 1 training starts with wild bodies"))),
    Mistake(6, "the shape's discriminator: 10 - 10 - 5 - 1, read as 10 - 5 - 1", "pytorch_HMR", (
        Edit("hmr.py", "z = F.relu(self.shape1(betas))", "z = betas",
             "test_the_23_joint_heads_are_23_separate_linears",
             "your shape head is 10 - 5 - 1; the official one has a hidden layer of 10 more", 13),)
            ),
    Mistake(7, "what the all-joints discriminator reads", "pytorch_HMR, 4D-Humans; the slides", (
        Edit("hmr.py", "y = F.relu(self.all1(x.flatten(1)))",
             "y = F.relu(self.all1(x.mT.flatten(1)))", "test_ds_25_outputs_are_the_official_codes",
             "you flatten the embedding channel by channel; it goes joint by joint", 13),
        Edit("hmr.py", "y = F.relu(self.all1(x.flatten(1)))",
             "y = F.relu(self.all1(rotmats.flatten(1)))", "test_there_are_25_discriminators",
             "207 raw numbers (Sec. 3.3) do not fit: it reads the shared embedding, 23 x 32", 13))),
    Mistake(8, "D's 25 outputs: their order; a mean over them in place of their sum",
            "4D-Humans (order), mmhuman3d (mean)", (
        Edit("hmr.py", "return torch.cat([per_joint, y, z], 1)",
             "return torch.cat([per_joint, z, y], 1)",
             "test_the_23_joint_heads_are_23_separate_linears",
             "your order is [joints | shape | all], 4D-Humans'; here it is [joints | all | shape]",
             13),
        Edit("hmr.py", "return error.sum(1).mean()", "return error.mean()",
             "test_adversarial_losses",
             "yours is a mean over the 25 discriminators, 25 times too weak: sum them", 14))),
    Mistake(9, "D's targets, and what is shown to it", "pytorch_HMR (24 real against 48 fake)", (
        Edit("hmr.py", "return sum_heads((fake - 1).square())", "return sum_heads(fake.square())",
             "test_adversarial_losses",
             "your encoder wants to be taken for fake: its target is 1", 14),
        Edit("hmr.py", "return sum_heads((real - 1).square()) + sum_heads(fake.square())",
             "return sum_heads(real.square()) + sum_heads((fake - 1).square())",
             "test_real_is_pulled_to_1_and_fake_to_0",
             "real and fake are swapped: real goes to 1, fake to 0", 14),
        Edit("hmr.py", "return sum_heads((real - 1).square()) + sum_heads(fake.square())",
             "return (sum_heads((real - 1).square()) + sum_heads(fake.square())) / 2",
             "test_adversarial_losses",
             "yours is half of Eq. (8): the two terms are added, not averaged", 14),
        Edit("train.py", "_, pose, betas = split_theta(torch.cat(thetas))",
             "_, pose, betas = split_theta(thetas[-1])",
             "test_the_loop_gives_every_loss_and_optimiser_its_own",
             "only Theta_T faces your adversary; all T iterations do", 16),
        Edit("train.py", "rotmats = pose_to_rotmats(pose)[:, 1:]",
             "rotmats = pose_to_rotmats(pose)[:, :-1]",
             "test_the_loop_gives_every_loss_and_optimiser_its_own",
             "you show D the root's rotation and leave out the last hand's: it sees joints 1 to 23",
             16),
        Edit("train.py", "N = config.iterations * world.batch_size", "N = world.batch_size",
             "test_the_loop_gives_every_loss_and_optimiser_its_own",
             "D needs as many real as predicted bodies, B * T"))),
    Mistake(10, "gradients that leak between the players", "", (
        Edit("train.py", "fake = D(rotmats.detach(), betas.detach())", "fake = D(rotmats, betas)",
             "test_gradients_do_not_leak_between_encoder_and_discriminators",
             "D's step sends gradients into E: detach what D is shown as fake", 16),
        Edit("train.py", "D.requires_grad_(False)", "D.requires_grad_(True)",
             "test_gradients_do_not_leak_between_encoder_and_discriminators",
             "E's backward leaves gradients in D: hold D fixed while it judges", 16))),
    Mistake(11, "L_adv added up over the iterations, in place of their mean",
            "the slides, read literally", (
        Edit("train.py", "+ config.weight_adv * L_adv ",
             "+ config.iterations * config.weight_adv * L_adv ",
             "test_the_loop_gives_every_loss_and_optimiser_its_own",
             "yours weighs each iteration 1, not 1/T: L_adv is a mean over B*T", 16),
        Edit("hmr.py", "return error.sum(1).mean()", "return error.sum()",
             "test_adversarial_losses", "yours sums over the bodies; over them it is a mean", 14))),
    Mistake(12, "L_kp's denominator: 2 * sum(v) of the whole batch", "SPIN", (
        Edit("hmr.py", "return error.sum() / mask.sum().clamp(min=1)", "return error.mean()",
             "test_reprojection_loss",
             "yours divides by all numbers, as SPIN; only labelled ones count", 10),
        Edit("hmr.py", "mask = (mask != 0).expand_as(difference)", "mask = mask != 0",
             "test_reprojection_loss",
             "yours counts keypoints; each has two coordinates: 2 * sum(v)", 10),
        Edit("hmr.py", "return error.sum() / mask.sum().clamp(min=1)",
             "return (error.flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)).mean()",
             "test_reprojection_loss",
             "yours is a mean per image first; the mean is over the whole batch at once", 10),
        Edit("hmr.py", "return error.sum() / mask.sum().clamp(min=1)",
             "return error.sum() / mask.sum()",
             "test_nothing_labelled_costs_nothing_and_gives_no_nan",
             "0/0: a batch without labels costs 0, not NaN", 10))),
    Mistake(13, "L_joints: the centre, the factor 0.5", "SPIN (its own pelvis)", (
        Edit("hmr.py", "error = (pred - hip_midpoint(pred)) - (target - hip_midpoint(target))",
             "error = pred - target", "test_3d_joint_loss",
             "you do not centre the bodies: each at the midpoint of its own hips", 11),
        Edit("hmr.py", "return 0.5 * masked_mean(error[:, :LSP]",
             "return masked_mean(error[:, :LSP]", "test_3d_joint_loss",
             "the official code's factor 0.5 is missing", 11),
        Edit("hmr.py", "keypoints3d[:, RIGHT_HIP:LEFT_HIP + 1].mean(1, keepdim=True)",
             "keypoints3d[:, RIGHT_HIP:LEFT_HIP].mean(1, keepdim=True)", "test_3d_joint_loss",
             "you centre at the right hip alone: the slice ends before the left one", 11),
        Edit("hmr.py", "labelled = (has_3d * has_hips)[..., None]",
             "labelled = has_3d[..., None]", "test_3d_joint_loss",
             "a body without both hips has no centre: none of its keypoints is a label", 11))),
    Mistake(14, "L_smpl without the root; separate means of pose and betas", "pytorch_HMR", (
        Edit("hmr.py", "return 0.5 * masked_mean(pred - target, has_smpl[:, None], torch.square)",
             "return 0.5 * masked_mean((pred - target)[:, 9:], has_smpl[:, None], torch.square)",
             "test_smpl_parameter_loss",
             "yours leaves out the root's rotation: 24 matrices, not 23", 12),
        Edit("hmr.py", "return 0.5 * masked_mean(pred - target, has_smpl[:, None], torch.square)",
             "return masked_mean(pred - target, has_smpl[:, None], torch.square)",
             "test_smpl_parameter_loss", "the official code's factor 0.5 is missing", 12),
        Edit("hmr.py", "return 0.5 * masked_mean(pred - target, has_smpl[:, None], torch.square)",
             "return 0.5 * sum(masked_mean((pred - target)[:, part], has_smpl[:, None], "
             "torch.square) for part in (slice(216), slice(216, None)))",
             "test_smpl_parameter_loss",
             "yours takes means of pose and betas apart; it is one mean over 226 numbers", 12))),
    Mistake(15, "the two 3D indicators taken for one; a mask that does not hide", "", (
        Edit("train.py", "batch.rotmats, batch.betas, batch.has_smpl)",
             "batch.rotmats, batch.betas, batch.has_3d[:, 0])",
             "test_the_loop_gives_every_loss_and_optimiser_its_own",
             "MPI-INF-3DHP has joints but no SMPL parameters: L_smpl has its own mask", 16),
        Edit("hmr.py", "error = penalty(torch.where(mask, difference, 0))",
             "error = penalty(difference) * mask", "test_what_a_mask_hides_may_be_anything",
             "a missing label may be NaN, and NaN * 0 is NaN: mask before the penalty", 10))),
    Mistake(16, "a body turned over twice, so upside down at the start", "pytorch_HMR", (
        Edit("hmr.py", "pose[0] = torch.tensor([math.pi, 0, 0])", "pose[0] = torch.zeros(3)",
             "test_theta_bar_is_upright_average_and_fixed",
             "your Theta-bar stands on its head: the camera's y points down, so root = Rx(pi)", 7),)
            ),
    Mistake(17, "Theta-bar: what is set, and what is written to", "pytorch_HMR", (
        Edit("hmr.py", "pose[0] = torch.tensor([math.pi, 0, 0])", "pose[0, 0] = math.pi",
             "test_theta_bar_is_upright_average_and_fixed",
             "all three numbers of the root are set, not only the first", 7),
        Edit("hmr.py", "cam = torch.tensor([0.9, 0.0, 0.0])", "cam = torch.tensor([1.0, 0.0, 0.0])",
             "test_theta_bar_is_upright_average_and_fixed", "the camera's scale starts at 0.9", 7),
        Edit("hmr.py", "pose = mean_pose.detach().cpu().clone().view(24, 3)",
             "pose = mean_pose.detach().cpu().view(24, 3)",
             "test_theta_bar_is_upright_average_and_fixed",
             "you write into the caller's mean pose: clone it first", 7))),
    Mistake(18, "Theta-bar trained along with the weights", "official code (on purpose)", (
        Edit("hmr.py", 'self.register_buffer("theta_bar", theta_bar)',
             "self.theta_bar = nn.Parameter(theta_bar)", "test_the_regressor_is_the_papers",
             "here Theta-bar is a buffer; the paper does not say that it is trained"),)),
    Mistake(19, "buffers as long as one batch", "pytorch_HMR", (
        Edit("hmr.py", "theta = self.theta_bar.expand(len(feature), -1)",
             "theta = self.theta_bar.repeat(4, 1)", "test_the_whole_network[axis-angle-85]",
             "your Theta_0 is made for one batch size: expand it to the feature's", 8),)),
    Mistake(20, "rotations read the other way: R for R transposed, 6D layouts", "4D-Humans' 6D", (
        Edit("smpl.py", "K = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1)",
             "K = torch.stack([o, z, -y, -z, o, x, y, -x, o], -1)",
             "test_rodrigues_turns_columns_and_keeps_leading_shapes",
             "yours is the transposed rotation", 1),
        Edit("smpl.py", "a1, a2 = x.unflatten(-1, (3, 2)).unbind(-1)",
             "a1, a2 = x.unflatten(-1, (2, 3)).unbind(-2)",
             "test_rot6d_has_spins_interleaved_layout",
             "the columns one after the other are 4D-Humans' layout; SPIN's is interleaved"),
        Edit("hmr.py", "x = rotmats.flatten(2)", "x = rotmats.mT.flatten(2)",
             "test_ds_25_outputs_are_the_official_codes",
             "you flatten the matrices column by column; it goes row by row", 13),
        Edit("smpl.py", "offsets = coefficients @ directions.flatten(0, 1).T",
             "offsets = coefficients @ directions.transpose(0, 1).flatten(0, 1).T",
             "test_blend_shapes_are_a_sum_of_directions",
             "your offsets are ordered coordinate by coordinate; it goes vertex by vertex", 2))),
    Mistake(21, "the pose feature and the joints: 23 rotations, R - I, the shaped rest pose", "", (
        Edit("smpl.py", "pose_feature = (rotmats[:, 1:] - eye).flatten(1)",
             "pose_feature = (rotmats[:, :-1] - eye).flatten(1)",
             "test_zero_input_returns_the_template_and_the_root_turns_about_joint_0",
             "your pose feature holds the root and not the last joint: rotmats[:, 1:]", 4),
        Edit("smpl.py", "pose_feature = (rotmats[:, 1:] - eye).flatten(1)",
             "pose_feature = rotmats[:, 1:].flatten(1)",
             "test_zero_input_returns_the_template_and_the_root_turns_about_joint_0",
             "your pose feature is R, not R - I: the rest pose would be corrected, too", 4),
        Edit("smpl.py", "pose_feature = (rotmats[:, 1:] - eye).flatten(1)",
             "pose_feature = (rotmats[:, 1:] - eye).mT.flatten(1)", "test_lbs_equals_a_slow_loop",
             "your pose feature goes column by column; it goes row by row", 4),
        Edit("smpl.py", 'J = torch.einsum("jv,bvc->bjc", J_regressor, v_shaped)',
             "J = (J_regressor @ v_template).expand(len(betas), 24, 3)",
             "test_joints_depend_on_betas_but_not_on_pose_blend_shapes",
             "your joints are the average person's: regress them from the shaped template", 4),
        Edit("smpl.py", "joints, A = batch_rigid_transform(rotmats, J, parents)",
             "joints, A = batch_rigid_transform(rotmats, J_regressor @ v_posed, parents)",
             "test_joints_depend_on_betas_but_not_on_pose_blend_shapes",
             "your joints are regressed after the pose blend shapes; it is done before", 4))),
    Mistake(22, "kintree_table's root, 4294967295 in uint32, taken as it is", "", (
        Edit(BODY_FILE, "parents = tree[0].astype(np.int64).astype(np.int32) if",
             "parents = tree[0].astype(np.int64) if",
             "appendix/test_body_file.py::test_an_official_style_pickle_equals_the_npz",
             "the root's parent is -1, stored in an unsigned integer"),)),
    Mistake(23, "left and right of the face and of COCO", "smplx and COCO differ", (
        Edit(DATASETS, 'COCO_NAMES = ("nose", "left_eye", "right_eye", "left_ear", "right_ear",',
             'COCO_NAMES = ("nose", "right_eye", "left_eye", "right_ear", "left_ear",',
             IN_DATASETS + "test_the_maps_between_joint_orders_are_the_published_numbers",
             "COCO lists left before right"),
        Edit("smpl.py", '"head_top", "nose", "left_eye", "right_eye", "left_ear", "right_ear")',
             '"head_top", "nose", "right_eye", "left_eye", "right_ear", "left_ear")',
             IN_APPENDIX + "test_the_open_body_is_a_person",
             "HMR's limbs are right first, its face is left first; smplx's face is right first"),
        Edit("smpl.py", "FLIP_KEYPOINTS = (5, 4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 6, 12, 13, 14, 16,",
             "FLIP_KEYPOINTS = (5, 4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 6, 12, 13, 14, 15,",
             "test_the_skeletons_tables_agree", "a mirrored face has its eyes swapped"))),
    Mistake(24, "neck and head's top, which COCO does not label", "", (
        Edit(DATASETS, "if name in COCO_NAMES else -1 for", "if name in COCO_NAMES else 0 for",
             IN_DATASETS + "test_coco_is_read_by_name_and_filtered_as_the_official_converter_does",
             "row 0 is the nose: what COCO lacks is not visible"),)),
    Mistake(25, "visibility: LSP's flag is 0, LSPET's 1; COCO's 1, occluded, is a label",
            "pytorch_HMR (0.5)", (
        Edit(DATASETS, "visible = joints[..., 2] == (1 if extended else 0)",
             "visible = joints[..., 2] == 1",
             IN_DATASETS + "test_lsp_and_lspet_have_opposite_flags[False]",
             "LSP's flag says occluded, LSPET's says visible"),
        Edit(DATASETS, "images, image, k[..., :2] + 0.5, k[..., 2],",
             "images, image, k[..., :2] + 0.5, k[..., 2] > 1,",
             IN_DATASETS + "test_coco_is_read_by_name_and_filtered_as_the_official_converter_does",
             "COCO's visibility 1 is an occluded point, and labelled"))),
    Mistake(26, "LSP's test half in the training set", "pytorch_HMR", (
        Edit(DATASETS, "joints = joints.transpose(2, 1, 0)[:joints.shape[2] // 2]",
             "joints = joints.transpose(2, 1, 0)",
             IN_DATASETS + "test_lsp_and_lspet_have_opposite_flags[False]",
             "LSP's second 1,000 pictures are its test set"),
        Edit("data.py", "training = [name for name in names if name not in HELD_OUT]",
             "training = list(names)", "test_mocap_is_split_by_clip",
             "the held-out clips are in the training set"))),
    Mistake(27, "the flip: the root's sign, the swapped sides, W - 1 - x against -x",
            "official docstring; SPIN (one pixel)", (
        Edit("data.py", "return pose[..., FLIP_JOINTS, :] * pose.new_tensor([1, -1, -1])",
             "return torch.cat([pose[..., :1, :], (pose[..., FLIP_JOINTS, :] * "
             "pose.new_tensor([1, -1, -1]))[..., 1:, :]], -2)",
             "test_a_mirrored_pose_is_the_mirrored_body",
             "you leave the root alone, as the official docstring says; its code mirrors it", 15),
        Edit("data.py", "return pose[..., FLIP_JOINTS, :] * pose.new_tensor([1, -1, -1])",
             "return pose * pose.new_tensor([1, -1, -1])",
             "test_a_mirrored_pose_is_the_mirrored_body",
             "left and right are not swapped: FLIP_JOINTS", 15),
        Edit("data.py", "return pose[..., FLIP_JOINTS, :] * pose.new_tensor([1, -1, -1])",
             "return pose[..., FLIP_JOINTS, :]", "test_a_mirrored_pose_is_the_mirrored_body",
             "the sides are swapped, but each vector's y and z keep their sign", 15),
        Edit("data.py", "return pose[..., FLIP_JOINTS, :] * pose.new_tensor([1, -1, -1])",
             "return pose[..., FLIP_JOINTS, :] * pose.new_tensor([-1, 1, 1])",
             "test_a_mirrored_pose_is_the_mirrored_body",
             "you mirror axis-angle as if it were a point; it is x that keeps its sign", 15),
        Edit(DATASETS, "keypoints2d=batch.keypoints2d[:, FLIP_KEYPOINTS] * M[:2],",
             "keypoints2d=batch.keypoints2d[:, FLIP_KEYPOINTS] * M[:2] - M.new_tensor([.01, 0]),",
             IN_APPENDIX + "test_flipping_a_batch_flips_every_label",
             "W - 1 - x counts whole pixels; here x goes to -x exactly"))),
    Mistake(28, "the head's centre and its top, joint 13 of two different 14", "SPIN against hmr", (
        Edit(DATASETS, 'FIELD14 = (*KEYPOINT_NAMES[:13], "head_h36m")',
             "FIELD14 = KEYPOINT_NAMES[:14]",
             IN_DATASETS + "test_the_maps_between_joint_orders_are_the_published_numbers",
             "the field measures the head's centre, not its top"),)),
    Mistake(29, "the crop's scale and centre: diagonal against longer side, midpoint against mean",
            "SPIN", (
        Edit("data.py", "scale = 2 * diagonal / 224 / (high - low).norm(dim=-1)",
             "scale = 2 * diagonal / 224 / (high - low).amax(-1)",
             "test_cameras_are_the_crop_and_its_jitter", "150 pixels are the box's diagonal"),
        Edit("data.py", "shift - (low + high) / 2], 1)",
             "shift - keypoints[..., :2].mean(1)], 1)",
             "test_cameras_are_the_crop_and_its_jitter",
             "the crop's centre is the box's midpoint, not the mean of the points"))),
    Mistake(30, "beyond the picture: its edge repeated, or black", "SPIN", (
        Edit(DATASETS, 'padding: str = "border")', 'padding: str = "zeros")',
             "appendix/test_exercises.py::test_beyond_the_picture_its_edge_is_repeated",
             "the official code repeats the picture's edge"),)),
    Mistake(31, "weight decay, which the official flags register and no loss reads; rates",
            "pytorch_HMR", (
        Edit("train.py", "opt_E = torch.optim.Adam(model.parameters(), config.lr, fused=True)",
             "opt_E = torch.optim.Adam(model.parameters(), config.lr, weight_decay=1e-4)",
             "test_the_loop_gives_every_loss_and_optimiser_its_own",
             "the official code decays nothing"),
        Edit("train.py", "lr: float = option(1e-5,", "lr: float = option(1e-3,",
             "test_the_defaults_are_the_official_recipe",
             "1e-3 is the official flags' default; do_train.sh says 1e-5"))),
    Mistake(32, "a schedule of learning rates that is made and never stepped", "pytorch_HMR", (
        Edit("train.py", 'optimizer.param_groups[0]["lr"] = rate * lr_factor(step, config)',
             'optimizer.param_groups[0]["lr"] = rate',
             "test_the_loop_gives_every_loss_and_optimiser_its_own",
             "the schedule is never applied"),)),
    Mistake(33, "55 epochs in the paper, 75 in the script", "paper", (
        Edit("train.py", "steps: int = option(667_589,", "steps: int = option(489_632,",
             "test_the_defaults_are_the_official_recipe",
             "the released checkpoint has 667,589 steps, 75 epochs"),)),
    Mistake(34, "a run that goes on elsewhere than it stopped", "SPIN", (
        Edit("train.py", "save(parts, step + 1, log.seconds(), config, world.name)",
             "save(parts, step, log.seconds(), config, world.name)",
             "test_resuming_is_bit_identical", "after step k the next one is k + 1"),)),
    Mistake(35, "wrong file names and undefined names in converters", "SPIN",
            elsewhere="these converters are not needed: the files are read as they are"),
    Mistake(36, "one picture alone: a squeeze that swallows the batch", "official code", (
        Edit("hmr.py", "x = x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))",
             "x = x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32)).squeeze()",
             "test_resnets_options", "with B = 1 your squeeze takes the batch away, too"),)),
    Mistake(37, "where paper, figure and code disagree: L1 or L2, how many dropouts",
            "paper, Fig. 2 and Sec. 3.4", (
        Edit("hmr.py", "return masked_mean(target - pred, visible[..., None], torch.abs)",
             "return masked_mean(target - pred, visible[..., None], torch.square)",
             "test_reprojection_loss", "yours is the squared L2 of Fig. 2; Eq. (3) is L1", 10),
        Edit("hmr.py", "x = F.dropout(F.relu(self.fc2(x)), self.dropout, self.training)",
             "x = F.relu(self.fc2(x))",
             "test_dropout_follows_both_hidden_layers_with_fresh_masks",
             "the official code drops out after both hidden layers", 8))),
    Mistake(38, "Procrustes: reflections, the scale", "", (
        Edit("train.py", "sign[:, 2] = torch.linalg.det(U @ Vh).sign()", "sign[:, 2] = 1.0",
             "test_procrustes_does_not_reflect_and_is_the_best",
             "yours excuses a mirrored body: the rotation's determinant must be +1", 17),
        Edit("train.py", "scale = (S * sign).sum(1) / s.square()", "scale = S.sum(1) / s.square()",
             "test_procrustes_scale_is_the_best_even_for_a_mirrored_body",
             "the scale needs the flipped sign, too", 17),
        Edit("train.py", "scale = (S * sign).sum(1) / s.square()",
             "scale = (S * sign).sum(1) / t.square()",
             "test_procrustes_undoes_any_similarity[1-14]",
             "divide by the variance of what is moved, the source's", 17),
        Edit("train.py", "return scale[:, None, None] * s @ R.mT + mu_t",
             "return scale[:, None, None] * s @ R + mu_t",
             "test_procrustes_undoes_any_similarity[1-14]",
             "rows are turned by R transposed: s @ R.mT", 17),
        Edit("train.py", "/ s.square().sum((1, 2)).clamp(min=1e-12)",
             "/ s.square().sum().clamp(min=1e-12)", "test_procrustes_undoes_any_similarity[2-14]",
             "each body has its own scale: sum over its own points only", 17))),
    Mistake(39, "where bodies are centred for MPJPE: the hips' midpoint or SMPL's pelvis",
            "SPIN", (
        Edit("train.py",
             "hips_p, hips_t = hip_midpoint(pred.keypoints3d), hip_midpoint(true.keypoints3d)",
             "hips_p, hips_t = pred.joints[:, :1], true.joints[:, :1]", "test_the_measures_on_a_known_error",
             "centre at the midpoint of the keypoints' hips, not at joint 0"),)),
    Mistake(40, "measured in train mode; trained in eval mode", "", (
        Edit("train.py", "model.eval().amp = None ", "model.train().amp = None ",
             "test_evaluation_is_in_eval_mode_and_float32_and_training_goes_on_as_before",
             "measuring needs model.eval()"),
        Edit("train.py", "    model.train()                                                     # ",
             "    model.eval()  # ",
             "test_evaluation_is_in_eval_mode_and_float32_and_training_goes_on_as_before",
             "after a picture, training must go on in train mode"))),
    Mistake(41, "the face's vertices, one too high", "paper's footnote", (
        Edit(BODY_FILE, "(template[:, 1].argmax(), 332, 2800, 6260, 583, 4071)",
             "(template[:, 1].argmax(), 333, 2801, 6261, 584, 4072)",
             "appendix/test_body_file.py::test_without_hmrs_regressor_keypoints_are_approximate",
             "the paper's numbers count from 1"),)),
    Mistake(42, "the pinhole camera nearest to a weak-perspective one: tz = 2 f / (size s)",
            "", (
        Edit(PHOTO, "torch.cat([cam[1:], 2 * f / (size * cam[:1])])",
             "torch.cat([cam[1:], f / (size * cam[:1])])",
             "appendix/test_photo.py::test_the_pinhole_camera_sees_what_the_losses_camera_sees",
             "the crop is 2 wide: f / tz = s size / 2"),)),
    Mistake(43, "Procrustes that guesses its axes from a size", "VIBE (B = 2 or 3)", (
        Edit("train.py", "U, S, Vh = torch.linalg.svd(t.mT @ s)",
             "U, S, Vh = torch.linalg.svd(t.mT @ s if len(s) not in (2, 3) else s.mT @ t)",
             "test_procrustes_undoes_any_similarity[2-14]",
             "with B = 2 or 3 yours takes bodies for coordinates", 17),)),
    Mistake(44, "an initialisation that misses its layers", "mmhuman3d", (
        Edit("hmr.py", "if isinstance(module, nn.Linear):", "if isinstance(module, nn.Conv2d):",
             "test_there_are_25_discriminators", "no layer of D is a convolution here"),
        Edit("hmr.py", "                nn.init.xavier_uniform_(module.weight)",
             "                nn.init.normal_(module.weight, std=0.001)",
             "test_there_are_25_discriminators",
             "with a standard deviation of 0.001 hardly any gradient passes D"),
        Edit("hmr.py", 'mode="fan_out", nonlinearity="relu")',
             'mode="fan_in", nonlinearity="relu")',
             "test_convolutions_keep_the_variance_past_a_relu", "He's, by the outputs"))),
    Mistake(45, "both optimisers stepped after E's backward", "mmhuman3d", (
        Edit("train.py", "    opt_E.step()\n", "    opt_E.step(), opt_D.step()\n",
             "test_the_loop_gives_every_loss_and_optimiser_its_own",
             "D steps twice: it has made its own step already", 16),)),
    Mistake(46, "two 6D layouts in one project", "mmhuman3d", (
        Edit("hmr.py", "pose = batch_rodrigues(pose)[..., :2]",
             "pose = batch_rodrigues(pose).mT[:, :2]",
             "test_theta_bar_is_upright_average_and_fixed",
             "your 6D Theta-bar holds the columns one after the other; "
             "rot6d_to_rotmat reads them interleaved", 7),)),
    Mistake(47, "the joints regressed from the posed skin", "GraphCMR", (
        Edit("smpl.py", "return vertices, joints ", "return vertices, J_regressor @ vertices ",
             "test_lbs_equals_a_slow_loop",
             "your joints are regressed from the posed skin; they are those of the kinematic chain",
             4),)),
    Mistake(48, "2D divided by size - 1", "mmhuman3d (223)", (
        Edit("data.py", "xyz = torch.cat([(points[..., :2] + 1) * (size / 2)",
             "xyz = torch.cat([(points[..., :2] + 1) * ((size - 1) / 2)",
             IN_APPENDIX + "test_the_renderer_samples_pixel_centres",
             "[-1, 1] is from edge to edge: size / 2, not (size - 1) / 2"),)),
    Mistake(49, "PCK and AUC: strictly below the threshold", "many ports", (
        Edit("train.py", "(mpjpe[..., None] < thresholds)", "(mpjpe[..., None] <= thresholds)",
             "test_errors_are_centred_at_the_hips_and_the_thresholds_are_3dhps",
             "3DHP's script counts strictly below: a perfect body has 96.8 %"),)),
    Mistake(50, "the crop by head top to hip, whose comment says shoulder to hip",
            "official MPII converter", (
        Edit(DATASETS, "ankles, shoulders, hips = (0, 5), (8, 9), (2, 3)",
             "ankles, shoulders, hips = (0, 5), (13, 13), (2, 3)",
             IN_APPENDIX + "test_the_crops_scale_is_the_official_codes",
             "COCO's converter measures shoulder to hip"),)),
    Mistake(51, "visibility that is neither 0 nor 1", "pytorch_HMR's 0.5 for occluded points", (
        Edit("hmr.py", "return masked_mean(target - pred, visible[..., None], torch.abs)",
             "return ((target - pred).abs() * visible[..., None]).sum() / "
             "(2 * visible.sum().clamp(min=0.5))",
             "test_reprojection_loss",
             "yours weighs by v; v is a mask: what is not 0 counts as 1, as in TensorFlow", 10),)),
    Mistake(52, "dodging Rodrigues' 0/0 by a small number, or by noise",
            "official code, smplx; CalciferZh's", (
        Edit("smpl.py", "a2 = pose.square().sum(-1)[..., None, None]",
             "a2 = (pose + 1e-8).square().sum(-1)[..., None, None]",
             "test_rodrigues_agrees_with_scipy_and_the_exponential_map",
             "yours takes the angle of r + 1e-8, which is inexact near zero", 1),
        Edit("smpl.py", "a2 = pose.square().sum(-1)[..., None, None]",
             "a2 = (pose + 1e-8 * torch.randn_like(pose)).square().sum(-1)[..., None, None]",
             "test_rodrigues_agrees_with_scipy_and_the_exponential_map",
             "noise gives one input two results", 1),
        Edit("smpl.py", "safe = torch.where(small, torch.ones_like(a2), a2)", "safe = a2",
             "test_rodrigues_has_the_right_gradient_even_at_zero[zero]",
             "right in value, NaN in the gradient at zero: the branch not taken divides 0 by 0", 1))
            ),
    # ---- everyone's slips, in no published code that we know of
    Mistake(53, "the kinematic chain", "", (
        Edit("smpl.py", "bones.append(bones[parents[i]] @ local[:, i])",
             "bones.append(local[:, i] @ bones[parents[i]])",
             "test_kinematics_equal_a_loop_over_the_23_joints",
             "your chain multiplies child by parent: it is A_parent @ A_child", 3),
        Edit("smpl.py", "t = joints - (rotmats @ joints[..., None])[..., 0]", "t = joints",
             "test_kinematics_equal_a_loop_over_the_23_joints",
             "your bones turn about the origin: x -> R (x - J) + J", 3),
        Edit("smpl.py", "return posed[:, :, :3, 0], A", "return A[:, :, :3, 3], A",
             "test_kinematics_equal_a_loop_over_the_23_joints",
             "A's last column is not where the joint is: apply A to the joint at rest", 3))),
    Mistake(54, "the regressor's loop", "", (
        Edit("hmr.py", "theta = theta + self.fc3(x) ", "theta = self.theta_bar + self.fc3(x) ",
             "test_the_regressor_equals_a_hand_written_loop",
             "your corrections do not add up: Theta_t + Delta, not Theta-bar + Delta", 8),
        Edit("hmr.py", "theta = theta + self.fc3(x) ", "theta = theta.detach() + self.fc3(x) ",
             "test_gradients_run_through_all_iterations",
             "your Theta is detached between the iterations: gradients run through all of them", 8),
        Edit("hmr.py", "x = torch.cat([feature, theta], 1)",
             "theta = theta.detach(); x = torch.cat([feature, theta], 1)",
             "test_gradients_run_through_all_iterations",
             "your Theta is detached before each iteration: gradients run through all of them", 8),
        Edit("hmr.py", "x = torch.cat([feature, theta], 1)", "x = torch.cat([theta, feature], 1)",
             "test_the_three_thetas_are_the_official_codes",
             "your input is [Theta | phi]; the official order is [phi | Theta]", 8),
        Edit("hmr.py", "return thetas, self.decode(thetas[-1])",
             "return thetas, self.decode(thetas[0])",
             "test_the_encoder_sees_imagenets_scale_and_the_last_theta_is_decoded",
             "the losses are of the last iteration's body"))),
    Mistake(55, "one training step", "", (
        Edit("train.py", "        opt_D.zero_grad()\n", "",
             "test_the_loop_gives_every_loss_and_optimiser_its_own",
             "D's gradients of earlier steps are never zeroed", 16),
        Edit("train.py", "    opt_E.zero_grad()\n", "",
             "test_the_loop_gives_every_loss_and_optimiser_its_own",
             "E's gradients of earlier steps are never zeroed", 16),
        Edit("train.py", "L_3d = config.weight_joints * L_joints + config.weight_smpl * L_smpl",
             "L_3d = config.weight_smpl * L_joints + config.weight_joints * L_smpl",
             "test_the_loop_gives_every_loss_and_optimiser_its_own",
             "the weights of L_joints and L_smpl are swapped", 16))),
)


# --------------------------------------------------------------------------------------------
# The command

def edits(numbers: Iterable[int] = ()) -> list[tuple[Mistake, Edit]]:
    """The table's edits, of these mistakes or of all.  Raises ValueError for another number."""
    numbers = set(numbers)
    known = {mistake.number: mistake for mistake in MISTAKES}
    for number in numbers:
        if number not in known:
            raise ValueError(f"{number}: expected numbers of mistakes, 1 to {max(known)}")
    return [(mistake, edit) for mistake in MISTAKES if not numbers or mistake.number in numbers
            for edit in mistake.edits]


def apply(edit: Edit, text: str) -> str:
    """The edited source.  Raises ValueError if the line is not there, or not once."""
    if text.count(edit.old) != 1:
        raise ValueError(f"{edit.file}: expected once, found {text.count(edit.old)} times: "
                         f"{edit.old.strip()!r}; mend this edit in appendix/gallery.py")
    return text.replace(edit.old, edit.new)


def job_of(edit: Edit) -> Job:
    text = (HERE / edit.file).read_text(encoding="utf-8")
    return Job(edit, {edit.file: apply(edit, text)}, (edit.test,),
               appendix="appendix/" in edit.file + edit.test, seconds=100)


def gallery(numbers: list[int], processes: int) -> bool:
    """Apply each edit, run its test, print the table -> was every one caught?"""
    begun, wanted, missed = time.monotonic(), edits(numbers), 0
    tests = tuple(sorted({edit.test for _, edit in wanted}, key=lambda test: "::" in test))
    # a stale edit raises first; "as it is": what fails without any edit proves nothing
    jobs = [Job("as it is", {}, tests, appendix=True, seconds=600), *(job_of(e) for _, e in wanted)]
    results = {job.key: result for job, result in run_apart(jobs, processes)}
    if not tests or results["as it is"].failed or results["as it is"].ending:
        raise ValueError(f"without any edit: {results['as it is'].failed or 'no report'}; run "
                         f"pytest")
    for mistake in MISTAKES:
        if numbers and mistake.number not in numbers:
            continue
        print(f"{mistake.number:3d}. {mistake.what}" + f"  [{mistake.who}]" * bool(mistake.who))
        if mistake.elsewhere:
            print(f"       cannot be made here: {mistake.elsewhere}")
        for edit in mistake.edits:
            result = results[edit]
            caught = bool(result.failed)
            missed += not caught
            print(f"     {edit.file}{f', task {edit.task}' * bool(edit.task)}: "
                  f"{edit.new.strip() or 'without ' + edit.old.strip()}\n"
                  f"       {edit.test.rpartition('::')[2]}: "
                  f"{result.failed[0][1] if caught else 'NOT CAUGHT ' + result.ending}\n"
                  f"       tell: {edit.tell}")
    print(f"{len(wanted) - missed} of {len(wanted)} edits caught, "
          f"{len({mistake.number for mistake, _ in wanted})} mistakes, "
          f"{time.monotonic() - begun:.0f} s")
    return not missed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the field's mistakes; are they caught?")
    parser.add_argument("numbers", nargs="*", type=int, help="of the mistakes (default: all)")
    parser.add_argument("--processes", type=int, default=0, help="at a time (default: one a core)")
    args, caught = parser.parse_args(argv), []
    status = exit_status("gallery", lambda: caught.append(gallery(args.numbers, args.processes)))
    return status or int(not caught[0])


if __name__ == "__main__":
    sys.exit(main())
