"""Exercises cut from the real files: hand them out, take them in, grade them.

    python -m appendix.exercises write DIR            # the folder that a student gets
    python -m appendix.exercises grade FOLDER ..      # [--tasks 3,7] [--out DIR] (Linux)
    python -m appendix.exercises answers              # to the questions in words, for the marker
    python -m appendix.exercises figures              # the pictures that the questions ask about
    python -m appendix.exercises check [--all]        # the round trip: blank, solved, three tasks

A task is one or several functions of a chapter, found by name.  `write` leaves their docstrings,
signatures and the comments that state the problem, puts a NotImplementedError for the rest, and
marks each function by `# Task 9: project` and `# end of task`.  `grade` takes what stands between
these two lines out of a student's file and grafts it, one task at a time, into the PROJECT's files: each task is judged alone, by the project's tests and by inputs of the
grader's own, in a process of its own with limits of time and memory.  It is made for honest work
and its accidents (endless loops, exits, broken files), not against an attacker who knows it: grade
strangers in a container.
"""

import argparse
import ast
import csv
import io
import json
import math
import re
import shutil
import sys
import tempfile
import textwrap
import zlib
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

from appendix.gallery import CHAPTERS, HERE, MISTAKES, Edit, Job, Result, apply, run_apart
from smpl import exit_status, printable, write_atomically


class Task(NamedTuple):
    number: int
    title: str
    file: str
    functions: tuple[str, ...]    # whose bodies are cut
    points: int
    where: str                    # in the paper or on the slides
    text: str                     # what to write
    first: str                    # what the first test checks
    tests: tuple[str, ...]        # of test_hmr.py, in this order
    keep: tuple[str, ...] = ()    # comments that state the problem begin like this


TASKS = (
    Task(1, "batch_rodrigues", "smpl.py", ("batch_rodrigues",), 8, "Sec. 3.1",
         "Axis-angle to rotation matrix, for any leading shape, right in value and gradient at "
         "zero, too, in float32 and in float64.",
         "that a quarter turn about z takes x to y (and not to -y)",
         ("test_rodrigues_turns_columns_and_keeps_leading_shapes",
          "test_rodrigues_agrees_with_scipy_and_the_exponential_map",
          "test_rodrigues_has_the_right_gradient_even_at_zero",
          "test_rodrigues_is_accurate_in_float32_across_the_switch_to_the_series",
          "test_rotations_are_the_official_codes")),
    Task(2, "blend_shapes", "smpl.py", ("blend_shapes",), 3, "Sec. 3.1",
         "Offsets that are linear in some coefficients, for betas and for pose features alike.",
         "the offsets against a sum over the directions",
         ("test_blend_shapes_are_a_sum_of_directions", "test_lbs_equals_a_slow_loop")),
    Task(3, "batch_rigid_transform", "smpl.py", ("batch_rigid_transform",), 9, "Sec. 3.1",
         "Forward kinematics: each bone turns about its own joint, and its parent carries it "
         "along.  A loop over the 23 joints is as good as one over the tree's levels.",
         "posed joints and the bones' motions against a loop over the 23 joints",
         ("test_kinematics_equal_a_loop_over_the_23_joints",
          "test_a_tall_person_has_long_bones_and_bones_do_not_stretch")),
    Task(4, "lbs", "smpl.py", ("lbs",), 10, "Sec. 3.1",
         "SMPL's five steps, from betas and rotations to vertices and joints.",
         "that the rest pose returns the template and that the root turns about joint 0",
         ("test_zero_input_returns_the_template_and_the_root_turns_about_joint_0",
          "test_joints_depend_on_betas_but_not_on_pose_blend_shapes",
          "test_lbs_equals_a_slow_loop", "test_lbs_gradients"),
         ("1. Shape", "2. The joints of THIS", "3. Pose blend shapes", "4. Kinematic chain",
          "5. Skinning: each vertex")),
    Task(5, "the residual block and its shortcut", "hmr.py", ("Block.forward", "shortcut"), 5,
         "slides: y = F(x) + x",
         "What a block does with F(x), which `residual` computes, and with x; and what its "
         "shortcut is: nn.Identity(), or the projection, nn.Sequential of a 1x1 convolution "
         "without bias and a BatchNorm2d.",
         "that a block whose F is zero is the identity",
         ("test_a_residual_block_with_zero_weights_is_the_identity",
          "test_the_slides_constructed_solution", "test_resnet_equals_torchvisions[18]",
          "test_resnet_equals_torchvisions[50]")),
    Task(6, "ResNet's stages", "hmr.py", ("resnet_stages",), 6, "slides: the table",
         "The four stages conv2_x to conv5_x, each an nn.Sequential of blocks.",
         "the encoder's number of features, and a picture alone",
         ("test_resnets_options", "test_resnet_equals_torchvisions[18]",
          "test_resnet_equals_torchvisions[50]", "test_multiply_adds_are_the_slides")),
    Task(7, "mean_theta", "hmr.py", ("mean_theta",), 4, "Sec. 3.2",
         "Theta-bar, where the regressor starts: upright in a camera whose y points down.",
         "scale 0.9 and the root's Rx(pi)",
         ("test_theta_bar_is_upright_average_and_fixed",
          "test_the_three_thetas_are_the_official_codes")),
    Task(8, "IEF's loop", "hmr.py", ("Regressor.forward",), 8, "Sec. 3.2, 3.4",
         "Iterative error feedback: T corrections with the same weights, a ReLU and a dropout "
         "after each hidden layer.",
         "three Thetas against a loop written by hand",
         ("test_the_regressor_equals_a_hand_written_loop",
          "test_dropout_follows_both_hidden_layers_with_fresh_masks",
          "test_gradients_run_through_all_iterations",
          "test_the_three_thetas_are_the_official_codes", "test_the_whole_network")),
    Task(9, "project", "hmr.py", ("project",), 4, "Eq. (2)",
         "The weak-perspective camera, in the official code's form.",
         "the official code's projection of a body, to 1e-14",
         ("test_projection_is_the_official_codes",)),
    Task(10, "keypoint_loss and masked_mean", "hmr.py", ("masked_mean", "keypoint_loss"), 6,
         "Eq. (3)",
         "The mean over what is labelled, which the other losses use, too; and L_reproj.",
         "the loss against a loop over visible points",
         ("test_reprojection_loss", "test_nothing_labelled_costs_nothing_and_gives_no_nan",
          "test_what_a_mask_hides_may_be_anything", "test_the_losses_are_the_official_codes")),
    Task(11, "joints3d_loss", "hmr.py", ("hip_midpoint", "joints3d_loss"), 5, "Eq. (5)",
         "L_joints, of bodies that are centred at their own hips.",
         "the loss against a loop over 14 keypoints of the labelled bodies",
         ("test_3d_joint_loss", "test_what_a_mask_hides_may_be_anything",
          "test_the_losses_are_the_official_codes")),
    Task(12, "smpl_loss", "hmr.py", ("smpl_loss",), 4, "Eq. (6)",
         "L_smpl, on rotation matrices and betas together.",
         "the loss against a sum over the labelled bodies",
         ("test_smpl_parameter_loss", "test_the_two_3d_indicators_are_separate",
          "test_the_losses_are_the_official_codes")),
    Task(13, "the discriminators' heads", "hmr.py", ("Discriminator.forward",), 7, "Sec. 3.3, 3.4",
         "From rotations and betas to 25 outputs, by the layers that __init__ makes.",
         "the outputs' shape",
         ("test_there_are_25_discriminators", "test_the_23_joint_heads_are_23_separate_linears",
          "test_each_discriminator_sees_only_its_own",
          "test_ds_25_outputs_are_the_official_codes")),
    Task(14, "the adversarial losses", "hmr.py",
         ("sum_heads", "encoder_adversarial_loss", "discriminator_loss"), 6, "Eqs. (7), (8)",
         "What the encoder wants of the discriminators, and what these want.",
         "both losses where D says 0, 0.5 or 1 to everything",
         ("test_adversarial_losses", "test_real_is_pulled_to_1_and_fake_to_0")),
    Task(15, "mirror_pose", "data.py", ("mirror_pose",), 3, "Sec. 4",
         "The pose of the mirrored person.",
         "the posed skeleton against the mirrored one's",
         ("test_a_mirrored_pose_is_the_mirrored_body",)),
    Task(16, "train_step", "train.py", ("train_step",), 7, "Eqs. (1), (4)",
         "One step of both players, first D, then E: which iteration gets which loss, what is "
         "detached, what is held fixed.",
         "what the losses and optimisers of two real steps are given, and in which order",
         ("test_the_loop_gives_every_loss_and_optimiser_its_own",
          "test_gradients_do_not_leak_between_encoder_and_discriminators",
          "test_a_whole_step_is_the_official_codes",
          "test_without_an_adversary_d_is_left_alone"),
         ('slides: "if t = T', "---- (1) update D", "---- (2) update E", "The paper's one lambda",
          "labels; here each loss has")),
    Task(17, "compute_similarity_transform", "train.py", ("compute_similarity_transform",), 5,
         "Sec. 4.1",
         "Procrustes: the best scale, proper rotation and shift of each body onto another.",
         "that any similarity is undone, for several numbers of bodies and points",
         ("test_procrustes_undoes_any_similarity",
          "test_procrustes_does_not_reflect_and_is_the_best",
          "test_procrustes_scale_is_the_best_even_for_a_mirrored_body",
          "test_the_measures_are_the_official_codes")),
)


# --------------------------------------------------------------------------------------------
# A task's functions: by name in a chapter, by markers in a student's file (which may not parse)

BEGIN = re.compile(r"[ \t]*# Task (\d+): ([\w.]+)[ \t]*")
END = re.compile(r"[ \t]*# end of task[ \t]*")


def regions(lines: list[str]) -> tuple[dict, dict]:
    """A student's lines -> {(task, function): (first, last + 1), without the markers}, {(task,
    function): what is wrong with its markers}.  A marker that is missing costs its own task only."""
    found, wrong, open_part = {}, {}, None
    for i, line in enumerate(lines):
        if begin := BEGIN.fullmatch(line):
            if open_part:
                wrong[open_part] = "no '# end of task' after its lines"
            open_part, first = (int(begin[1]), begin[2]), i + 1
            if open_part in found or open_part in wrong:
                wrong[open_part] = "its marker stands twice"
        elif END.fullmatch(line) and open_part:
            found[open_part], open_part = (first, i), None
    if open_part:
        wrong[open_part] = "no '# end of task' after its lines"
    return {part: span for part, span in found.items() if part not in wrong}, wrong


def span(function: ast.FunctionDef) -> tuple[int, int]:
    """Lines (first, last + 1) of a chapter's function, its decorators included."""
    return min([function, *function.decorator_list], key=lambda n: n.lineno).lineno - 1, \
        function.end_lineno


def read_lines(path: Path) -> list[str]:
    """Raises ValueError, OSError.  A folder or a pipe by that name is no file."""
    if not path.is_file() or path.stat().st_size > 2 ** 20:
        raise ValueError(f"{path.name}: no such file, or larger than 1 MiB")
    return path.read_text(encoding="utf-8-sig").split("\n")


def code_of(line: str) -> str:
    """A line without indentation and comment (the chapters' comments stand behind two blanks)."""
    return line.strip().partition("  # ")[0].rstrip() if not line.lstrip().startswith("#") else ""


def functions(text: str) -> dict[str, ast.FunctionDef]:
    """A file's functions and methods by name."""
    found = {}
    for node in ast.parse(text).body:
        inside = node.body if isinstance(node, ast.ClassDef) else []
        found |= {f"{node.name}.{n.name}": n for n in inside if isinstance(n, ast.FunctionDef)}
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
    return found


def cuts(task: Task, lines: list[str]) -> list[tuple[int, int, str]]:
    """Which lines of the chapter a student has to write: [(first, last + 1, function)]."""
    found, known = [], functions("\n".join(lines))
    for name in task.functions:
        node = known[name]
        stays = [isinstance(n, ast.Expr) or isinstance(n, ast.If) and isinstance(
            n.body[0], ast.Raise) for n in node.body]     # the docstring, then checks of the input
        n = stays.index(False)
        first = node.body[n - 1].end_lineno if n else node.body[0].lineno - 1
        found.append((first, node.end_lineno, name))
    return found


def kept_comments(task: Task, lines: list[str]) -> list[str]:
    """The comments that state the problem; of one that goes on with the answer, its beginning."""
    stays = [bool(task.keep) and line.strip("# \t").startswith(task.keep) for line in lines]
    kept = []
    for line, this, following, then in zip(lines, stays, [*lines[1:], ""], [*stays[1:], False]):
        if this:
            text = line.strip()
            if following.lstrip().startswith("#") and not then:
                end = max(text.rfind(".  ") + 1, text.rfind(":"))
                text = text[:end] if end > 0 else text
            kept.append(text)
    return kept


def blank(file: str) -> tuple[str, list[str]]:
    """A chapter as it is handed out, and the code lines that were removed from it."""
    lines = read_lines(HERE / file)
    known, replaced, removed = functions("\n".join(lines)), {}, []
    for task in TASKS:
        for first, last, name in cuts(task, lines) if task.file == file else ():
            begin, _ = span(known[name])
            outer, pad = (" " * (len(lines[i]) - len(lines[i].lstrip())) for i in (begin, first))
            kept = [pad + comment for comment in kept_comments(task, lines[first:last])]
            what = f'"Task {task.number}, {task.where}: {name}"'
            replaced[begin] = last, [f"{outer}# Task {task.number}: {name}", *lines[begin:first],
                                     *kept, f"{pad}raise NotImplementedError({what})",
                                     f"{outer}# end of task"]
            removed += [code for line in lines[first:last] if (code := code_of(line))]
    result, i = [], 0
    while i < len(lines):
        last, new = replaced.get(i, (i + 1, lines[i:i + 1]))
        result += new
        i = last
    return "\n".join(result), removed


def solution_lines(task: Task) -> int:
    lines = read_lines(HERE / task.file)
    return sum(bool(code_of(line)) for first, last, _ in cuts(task, lines)
               for line in lines[first:last])


# --------------------------------------------------------------------------------------------
# write: the folder that a student gets

def handout() -> dict[str, str]:
    """File name -> text.  Raises ValueError if a task's answer stands in another line of them."""
    blanked = {file: blank(file) for file in CHAPTERS}
    texts = {file: text for file, (text, _) in blanked.items()}
    for name in ("test_hmr.py", "requirements.txt", "LICENSE"):
        texts[name] = (HERE / name).read_text(encoding="utf-8")
    texts["TASKS.md"] = tasks_md()
    for file, (_, removed) in blanked.items():
        for code in removed:
            for name, text in texts.items():
                if len(code) > 20 and code in text:
                    raise ValueError(f"{file}: a task's line stands in the hand-out's {name}, too: "
                                     f"{code}")
    return texts


def write(folder: Path) -> None:
    if folder.resolve() == HERE or HERE in folder.resolve().parents:
        raise ValueError(f"{folder}: inside the project (two test_hmr.py stop pytest); name a "
                         f"folder outside")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists already; name a new folder")
    texts = handout()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new = Path(temporary) / "new"
        shutil.copytree(HERE / "assets", new / "assets",
                        ignore=shutil.ignore_patterns("make_assets.py", "__pycache__"))
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        figures(new / "figures")
        if folder.exists():
            folder.rmdir()                                # empty
        new.rename(folder)


RULES = """\
# Exercises

Four chapters, `smpl.py`, `hmr.py`, `data.py`, `train.py`, from which {n} pieces are missing; the
paper is Kanazawa et al., "End-to-end Recovery of Human Shape and Pose", CVPR 2018.  Each function
of a task is marked by `# Task 9: project` and `# end of task`: replace the line that raises
NotImplementedError.

    pip install -r requirements.txt
    pytest -x test_hmr.py                 # in the paper's order; read the failure
    pytest test_hmr.py -k projection      # one task's tests

- Hand in the four files.  Only what stands between a function's two markers is graded: put helpers and
  imports there, too (what the four chapters import is there to use, nothing else), and leave the
  markers as they are.
- Each task is graded alone, beside the right solution of all others: nothing is lost by a gap
  before it.  So do not call your own helper of another task.  Grading has tests and inputs beyond
  `test_hmr.py`'s; a task's points are given for all of them together.
- Docstrings give shapes, units and frames.  Mark the line that computes an equation by its tag,
  `# Eq. (3)`, at the line's end; a test reads them (no points).
"""


def paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 100, break_long_words=False,
                         break_on_hyphens=False)


def tasks_md() -> str:
    rows = [f"| {t.number} {t.title} | `{t.file}` | {t.where} | {solution_lines(t)} | {t.points} "
            f"|\n" for t in TASKS]
    parts = [RULES.format(n=len(TASKS)),
             "| task | file | paper | lines | points |\n|---|---|---|---|---|\n" + "".join(rows)]
    for file in CHAPTERS:
        parts.append(f"## {file}\n")
        for t in TASKS:
            if t.file == file:
                lines = solution_lines(t)
                parts.append(paragraph(
                    f"**Task {t.number}: {t.title}** ({t.where}; {t.points} points; "
                    f"{lines} line{'s' * (lines > 1)} in ours). {t.text} The first test, "
                    f"`{t.tests[0]}`, checks {t.first}.") + "\n")
        for number, question in enumerate(QUESTIONS, 1):
            if question.file == file:
                parts.append(paragraph(f"**Question {number}**, to answer in words. "
                                       f"{question.text}") + f"\n\n{question.command}\n")
    return "\n".join(parts)


class Question(NamedTuple):
    file: str
    text: str
    command: str             # indented, as in Markdown; its output or picture is to be explained
    answer: str


QUESTIONS = (
    Question(
        "smpl.py", "`figures/elbow.png` shows an elbow bent by 115 degrees, seen from above: left, "
        "each vertex follows one bone alone (its largest weight); middle, the blended weights of "
        "`lbs`; right, with pose blend shapes. Where does each of the first two fail, and why?",
        "    python -m appendix.exercises figures    # the lecturer's; its picture is in figures/",
        "One bone alone: the mesh tears or folds where the largest weight changes from upper arm "
        "to forearm, because neighbouring vertices follow two different rigid motions. Blended: "
        "smooth, but a mean of two rotation matrices is no rotation: it shrinks (the mean of R "
        "and I for a large angle is near singular along the plane of the turn), so the elbow "
        "loses volume. The pose blend shapes add what is missing: they are learnt offsets, "
        "linear in R - I."),
    Question(
        "smpl.py", "The right two elbows of `figures/elbow.png` differ by the pose blend shapes. "
        "Why do these depend on R - I and not on R, and why not on the root's rotation?",
        "    python -m appendix.exercises figures    # the lecturer's; its picture is in figures/",
        "With R - I the rest pose has feature 0 and the template is left as it is; with R a "
        "constant offset would be part of every body. The root turns the whole body rigidly and "
        "bends nothing: a correction that depends on it would dent a body for the way it faces "
        "(and the official file has 207 = 23 * 9 directions)."),
    Question(
        "hmr.py", "The paper's Eq. (2) reads s X + t, the official code computes s (X + t). "
        "Which of the numbers printed would change, and what is the unit of t in each form? Why "
        "does it matter for a network that is to be initialised with a mean camera, or compared "
        "with another's?",
        '    python -c "import torch, hmr; X = torch.tensor([[[0.3, 0.4, 9.0]]]); '
        'print([hmr.project(X, torch.tensor([[s, 0.1, -0.2]])).tolist() for s in (1.0, 2.0)])"',
        "For s = 1 both forms agree; for s = 2 the paper's gives (0.7, 0.6), the code's (0.8, "
        "0.4). In the code t is in metres, before the scaling: the person's place; in the paper "
        "it is in units of the crop: t_paper = s t. Weights and mean cameras of one form are "
        "wrong in the other wherever t is not 0, and a change of s alone moves the person about "
        "another point."),
    Question(
        "hmr.py", "Do the gradients at the first layer of a plain network vanish with depth? Run "
        "this and explain the four numbers, and what then makes deep plain networks train badly.",
        "    python - <<EOF\n"
        "    import torch, hmr\n"
        "    for depth in (18, 34):\n"
        "        for plain in (True, False):\n"
        "            torch.manual_seed(0)\n"
        "            net = hmr.ResNet(depth, width=16, plain=plain)\n"
        "            net(torch.randn(16, 3, 64, 64)).square().mean().backward()\n"
        "            print(depth, plain, net.conv1.weight.grad.norm().item())\n"
        "    EOF",
        "They do not vanish: with batch normalisation the gradient at conv1 grows with depth, most "
        "of all in the plain network (18 layers: 1.8 plain, 2.2 with shortcuts; 34: 23.8 and "
        "7.2). So it is not a vanishing gradient, as He et al. argue and unlike the slides' aside; "
        "the deep plain network is a harder problem to optimise: its layers would have to learn "
        "the identity, which a residual block has for F = 0 (`assets/degradation.png`: training "
        "losses)."),
    Question(
        "data.py", "The program prints that half of the pictures have 3D. Which losses teach the "
        "network anything about the other half, and which mistakes of it do they not see?",
        "    python data.py",
        "L_reproj (2D keypoints) and L_adv. L_reproj sees nothing along the camera's z, nor a limb "
        "turned about its own axis; L_adv knows which rotations are human but not which one the "
        "picture shows, nor which way the root faces, which it is never shown. Of an unlabelled "
        "picture, L_joints and L_smpl are masked: not 0 as a label, but absent from mean and "
        "denominator."),
    Question(
        "data.py", "What does this number say about Eq. (3), which two bodies look alike to it, "
        "and what in the rest of the method can tell them apart?",
        '    python -c "import torch, hmr; X = torch.randn(1, 19, 3); '
        'M = torch.tensor([1, 1, -1]); cam = torch.tensor([[0.9, 0, 0]]); '
        'print((hmr.project(X, cam) - hmr.project(X * M, cam)).abs().max().item())"',
        "It is 0: weak perspective drops z, so a body and its mirror image in depth (a limb "
        "towards the camera or away from it) have the same keypoints. The mirrored skeleton is a "
        "reflection, no proper body: often its joints would bend the wrong way, which the "
        "discriminators know; 3D labels tell exactly; and the picture itself shows shading and "
        "occlusion."),
    Question(
        "train.py", "Fig. 5's monsters: train without paired 3D and without the adversary and "
        "look at runs/monsters/picture.png; `assets/ablation.png` has a longer run's (some "
        "minutes without a GPU; fewer steps will do). The 2D error is fine: why are the bodies "
        "not?",
        "    python train.py --small --no-paired --no-adv --steps 500 --out runs/monsters",
        "Only L_reproj is left: any body whose 19 keypoints fall in the right places is as good as "
        "any other. Limbs twist about their own axis and bend the wrong way, depth is free, betas "
        "grow. It has even the best 2D error, because nothing else holds it back. The adversary "
        "restores plausible bodies (Fig. 4), paired 3D the right ones."),
    Question(
        "train.py", "Look at the columns D_real and D_fake of the log. Why do they stay between "
        "0 and 1, a little apart, and what would 1 and 0 mean for the encoder? Which of the 25 "
        "come near it at the end of a longer run, and why?",
        "    python train.py --small --steps 300 --out runs/adversary",
        "D's outputs are linear, pulled to 1 and 0 by least squares; 0.5 and 0.5 if it cannot "
        "tell. At 1 and 0 it has won: (D - 1)^2 stays large whatever E does, and the gradient "
        "through a D that is sure of itself says little about the way to a human body. The heads "
        "of all joints and of the shape come near it: they see more than one joint's 9 numbers, "
        "and the encoder's betas are still too timid."),
)


def answers() -> None:
    for number, question in enumerate(QUESTIONS, 1):
        print(paragraph(f"Question {number} ({question.file}). {question.text}"))
        print(f"\n{question.command}\n\n{paragraph('Answer: ' + question.answer)}\n")


def figures(folder: Path) -> None:
    """elbow.png: an elbow by one bone alone | blended | with pose blend shapes."""
    import data, smpl as chapter                                      # noqa: E401
    body = chapter.SMPL()
    bones = nn.functional.one_hot(body.weights.argmax(1), 24).float()             # (V, 24)
    pose = torch.zeros(1, 24, 3)
    pose[0, 0, 0] = math.pi / 2                                       # seen from above
    pose[0, chapter.JOINT_NAMES.index("left_elbow"), 1] = -math.radians(115)
    rotmats, ways = chapter.batch_rodrigues(pose), []
    for posedirs, weights in ((0 * body.posedirs, bones), (0 * body.posedirs, body.weights),
                              (body.posedirs, body.weights)):
        vertices, joints = chapter.lbs(torch.zeros(1, 10), rotmats, body.v_template,
                                       body.shapedirs, posedirs, body.J_regressor, body.parents,
                                       weights)                       # (1, V, 3), (1, 24, 3)
        ways.append(vertices)
    to_camera = torch.tensor([1.0, -1, -1])                           # (3,) Rx(pi)
    elbow = joints[:, chapter.JOINT_NAMES.index("left_elbow")] * to_camera        # (1, 3)
    cam = torch.tensor([[2 / 0.5, -elbow[0, 0], -elbow[0, 1]]])       # half a metre is seen
    drawn = [data.draw_mesh(way * to_camera, body.faces, cam, 320)[0] for way in ways]
    data.save_png(folder / "elbow.png", torch.cat(drawn, 2))


# --------------------------------------------------------------------------------------------
# The grader's own inputs: each probe calls a task's functions, with another seed and other sizes
# than the tests, in float64.  What a student's lines return is compared with the reference in the
# grader's process, so that nothing which the lines do to pytest or to torch's comparisons counts.

SEED, B = 2018, 5


def both_ways(f: Callable, *inputs: Tensor) -> dict[str, Tensor]:
    """f's results and the gradients of a weighted sum of them to its inputs."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    results = f(*inputs)
    results = results if isinstance(results, (tuple, list)) else (results,)
    weights = [torch.arange(r.numel(), dtype=r.dtype).cos().view_as(r) for r in results]
    total = sum((r * w).sum() for r, w in zip(results, weights))
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    named = {f"result {i + 1}": r for i, r in enumerate(results)}
    return named | {f"the gradient to input {i + 1}": torch.zeros_like(x) if g is None else g
                    for i, (x, g) in enumerate(zip(inputs, gradients))}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rotations(c, *shape: int) -> Tensor:
    return c.smpl.rot6d_to_rotmat(normal(*shape, 6))                  # (.., 3, 3); in no task


def filled(module: nn.Module) -> nn.Module:
    """The same numbers in every parameter and statistic, in whatever order they were made."""
    for name, x in module.state_dict().items():
        if x.is_floating_point():
            k = torch.arange(x.numel(), dtype=torch.float64) + zlib.crc32(name.encode()) % 997
            scales = x.ndim == 1 and name.endswith(("weight", "running_var"))     # batch norm's
            x.copy_((0.2 * (1.7 * k + k * k / 1000).sin() + scales).view_as(x))
    return module.double().eval()


def some_body(V: int = 13) -> tuple[Tensor, ...]:
    return (normal(V, 3), 0.1 * normal(V, 3, 10), 0.1 * normal(V, 3, 207),
            torch.softmax(normal(24, V), 1), torch.softmax(normal(V, 24), 1))


def probe_rodrigues(c) -> dict:
    r = torch.cat([2 * normal(B, 3), 1e-6 * normal(2, 3), torch.zeros(1, 3).double()])
    return both_ways(c.smpl.batch_rodrigues, r.view(2, 4, 3))


def probe_kinematics(c) -> dict:
    return both_ways(lambda R, J: c.smpl.batch_rigid_transform(R, J, c.smpl.PARENTS),
                     rotations(c, B, 24), 0.3 + normal(B, 24, 3))


def probe_lbs(c) -> dict:
    template, shapedirs, posedirs, J_regressor, weights = some_body()
    return both_ways(lambda betas, R: c.smpl.lbs(betas, R, template, shapedirs, posedirs,
                                                 J_regressor, c.smpl.PARENTS, weights),
                     normal(B, 10), rotations(c, B, 24))


def probe_blocks(c) -> dict:
    found = {}
    for name, block, channels in (("identity", c.hmr.BasicBlock(8, 8, 1, False), 8),
                                  ("projection", c.hmr.BasicBlock(8, 12, 2, False), 8),
                                  ("bottleneck, stride 1", c.hmr.Bottleneck(8, 6, 1, False), 8),
                                  ("bottleneck, identity", c.hmr.Bottleneck(24, 6, 1, False), 24),
                                  ("plain", c.hmr.BasicBlock(8, 8, 1, True), 8)):
        outputs = both_ways(filled(block), normal(3, channels, 6, 6))
        found |= {f"{name}: {key}": value for key, value in outputs.items()}
    return found


def probe_stages(c) -> dict:
    found = {}
    for depth, plain in ((18, False), (50, False), (34, True)):
        network = filled(c.hmr.ResNet(depth, width=8, plain=plain))
        found[f"features of depth {depth}"] = torch.tensor([network.feature_dim])
        for stage in range(4):
            layer = getattr(network, f"layer{stage + 1}")
            found[f"blocks of depth {depth}, stage {stage + 1}"] = torch.tensor([len(layer)])
        found[f"output of depth {depth}"] = 1e-3 * network(normal(3, 3, 64, 64))
    return found


def probe_mean_theta(c) -> dict:
    pose = normal(72).float()
    return {"axis-angle": c.hmr.mean_theta(pose), "6d": c.hmr.mean_theta(pose, "6d"),
            "the caller's mean pose": pose}


def probe_ief(c) -> dict:
    regressor = filled(c.hmr.Regressor(7, torch.zeros(1, 85), iterations=4))
    for layer in (regressor.fc1, regressor.fc2, regressor.fc3):
        layer.weight.data *= 0.1
    found = both_ways(regressor, normal(B, 7))
    regressor.dropout = 1.0                   # in train mode all zeros, so nothing random
    return found | {"all dropped out": regressor.train()(normal(B, 7))[-1]}


def probe_keypoints(c) -> dict:
    target, visible = normal(B, 19, 2), (normal(B, 19) > 0).double()
    target[visible == 0] = math.nan
    visible[:, ::2] /= 2                                              # still visible
    found = both_ways(lambda p: c.hmr.keypoint_loss(p, target, visible), normal(B, 19, 2))
    none = c.hmr.keypoint_loss(normal(B, 19, 2), target, 0 * visible)
    squares = c.hmr.masked_mean(normal(B, 7), (normal(B, 1) > 0).double(), torch.square)
    return found | {"nothing visible": none, "masked_mean of squares": squares}


def probe_joints(c) -> dict:
    target, has_3d = normal(B, 19, 3), (normal(B, 19) > -1).double()
    has_3d[:, 2:4], has_3d[1, 3], has_3d[2] = 1, 0, 0
    return both_ways(lambda p: c.hmr.joints3d_loss(p, target, has_3d), normal(B, 19, 3))


def probe_smpl_loss(c) -> dict:
    R, betas = rotations(c, B, 24), normal(B, 10)
    has_smpl = torch.tensor([1.0, 0, 1, 1, 0]).double()
    return both_ways(lambda r, b: c.hmr.smpl_loss(r, b, R, betas, has_smpl),
                     rotations(c, B, 24), normal(B, 10))


def probe_heads(c) -> dict:
    D = filled(c.hmr.Discriminator())
    for layer in (D.all1, D.all2, D.all3):
        layer.weight.data *= 0.1
    return both_ways(D, rotations(c, B, 23), normal(B, 10))


def probe_adversary(c) -> dict:
    ours = both_ways(c.hmr.encoder_adversarial_loss, normal(B, 25))
    theirs = both_ways(c.hmr.discriminator_loss, normal(B, 25), normal(B, 25))
    return {f"encoder: {k}": v for k, v in ours.items()} | {
        f"discriminators: {k}": v for k, v in theirs.items()}


def probe_step(c) -> dict:
    """Losses, gradients and parameters after a step of both players, weights and rates unlike."""
    config = c.train.Config(weight_kp=2.0, weight_joints=3.0, weight_smpl=5.0, weight_adv=7.0,
                            amp="off", device="cpu")
    body = c.smpl.SMPL()
    world = c.data.SyntheticPeople(body, c.data.load_mocap(True, False), B, 32)
    batch, motion = world.batch(3), world.motion(3 * B, 3)
    batch = batch._replace(has_smpl=batch.has_smpl * torch.tensor([1.0, 1, 0, 1, 1]))
    batch = c.data.Batch(*(x.double() for x in batch))
    E = c.hmr.HMR(c.smpl.SMPL(), depth=18, width=8, dropout=0.0).double().train()
    D = c.hmr.Discriminator().double()
    opt_E, opt_D = torch.optim.SGD(E.parameters(), 1e-3), torch.optim.SGD(D.parameters(), 1e-2)
    for p in (*E.parameters(), *D.parameters()):
        p.grad = torch.full_like(p, 0.1)                              # left by an earlier step
    losses = c.train.train_step(E, D, opt_E, opt_D, batch, tuple(x.double() for x in motion),
                                config)
    found = dict(zip(c.train.Losses._fields, losses))
    for name, p in (("conv1", E.encoder.conv1.weight), ("fc3", E.regressor.fc3.bias),
                    ("all1", D.all1.bias), ("shape1", D.shape1.weight)):
        found |= {f"{name} after the step": p, f"the gradient to {name}": p.grad}
    return found


def probe_procrustes(c) -> dict:
    f = c.train.compute_similarity_transform
    few, more = (both_ways(f, normal(n, 7, 3), normal(n, 7, 3)) for n in (2, B))
    return {f"of 2: {k}": v for k, v in few.items()} | {f"of {B}: {k}": v for k, v in more.items()}


PROBES: dict[int, Callable] = {
    1: probe_rodrigues,
    2: lambda c: both_ways(c.smpl.blend_shapes, normal(B, 7), normal(11, 3, 7)),
    3: probe_kinematics, 4: probe_lbs, 5: probe_blocks, 6: probe_stages, 7: probe_mean_theta,
    8: probe_ief, 9: lambda c: both_ways(c.hmr.project, 3 + normal(B, 7, 3), normal(B, 3)),
    10: probe_keypoints, 11: probe_joints, 12: probe_smpl_loss, 13: probe_heads,
    14: probe_adversary, 15: lambda c: both_ways(c.data.mirror_pose, normal(2, B, 24, 3)),
    16: probe_step, 17: probe_procrustes}


def seeded(number: int) -> Callable:
    def probe(chapters):
        torch.manual_seed(SEED + number)
        return PROBES[number](chapters)
    return probe


def difference(got: dict | None, expected: dict) -> str:
    """"" if two probes' outputs are equal up to rounding; else the first that is not."""
    try:
        for name, (shape, numbers) in expected.items():
            its_shape, its_numbers = got[name]
            if its_shape != shape:
                return f"{name} has the shape {tuple(its_shape)}, expected {tuple(shape)}"
            allowed = 1e-8 * max([1.0, *(abs(b) for b in numbers if math.isfinite(b))])
            off = [0.0 if a == b or a != a and b != b else abs(a - b) if a == a and b == b else
                   math.inf for a, b in zip(its_numbers, numbers, strict=True)]     # NaN != NaN
            worst = off.index(max(off))
            if off[worst] > allowed:
                return (f"{name} is {its_numbers[worst]:.6g} where {numbers[worst]:.6g} is "
                        f"expected (number {worst + 1} of {len(off)})")
        return ""
    except (TypeError, KeyError, ValueError, AttributeError):
        return "the results are not those that the docstring promises"


# --------------------------------------------------------------------------------------------
# grade

class Grade(NamedTuple):
    task: Task
    passed: bool
    message: str = ""             # the first failure
    diagnosis: str = ""           # the known mistake whose output is the student's


def imported() -> set[str]:
    """What the four chapters import, the appendix left out."""
    found = set()
    for file in CHAPTERS:
        found |= imports_of(ast.parse((HERE / file).read_text(encoding="utf-8")))
    return found - {"appendix"}


def imports_of(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or "").partition(".")[0])
    return names


def graft(task: Task, submitted: Path) -> str:
    """The project's chapter with the student's lines of one task.  Raises ValueError."""
    ours, theirs = read_lines(HERE / task.file), read_lines(submitted)
    known, (parts, wrong) = functions("\n".join(ours)), regions(theirs)
    shift = 0                                             # of a line number, for the sentence below
    for name in sorted(task.functions, key=lambda name: -known[name].lineno):
        if (part := (task.number, name)) not in parts:
            raise ValueError(f"{task.file}: Task {task.number}: " + wrong.get(
                part, f"no line '# Task {task.number}: {name}' with '# end of task' after its "
                      f"lines"))
        (begin, end), (first, last) = span(known[name]), parts[part]
        ours[begin:end], shift = theirs[first:last], first - begin
    text = "\n".join(ours)
    try:
        unknown = imports_of(ast.parse(text)) - imported() - {"appendix"}
    except SyntaxError as error:
        raise ValueError(f"{task.file}, line {(error.lineno or 1) + shift}: "
                         f"{type(error).__name__}: {error.msg}") from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"{task.file}: not readable as Python ({type(error).__name__})") from None
    if unknown:
        raise ValueError(f"{task.file}: Task {task.number} imports {', '.join(sorted(unknown))}; "
                         f"only what the four chapters import is there to use")
    return text


class Grader:
    """Keeps what the reference and its known mistakes answer to the probes, each found once."""

    def __init__(self, tasks: list[Task], processes: int = 0, seconds: float = 60):
        self.tasks, self.processes, self.seconds = tasks, processes, seconds
        self.known: dict[int, list[tuple[Edit, Result]]] = {}
        jobs = [Job(task.number, {}, probe=seeded(task.number)) for task in tasks]
        self.reference = {job.key: result.outputs for job, result in run_apart(jobs, processes)}
        for number, outputs in self.reference.items():
            if outputs is None:
                raise ValueError(f"the reference of task {number} does not answer; run pytest")

    def folder(self, folder: Path) -> list[Grade]:
        grades, jobs, results = {}, [], {}
        for task in self.tasks:
            try:
                text = graft(task, folder / task.file)
                jobs.append(Job(task, {task.file: text}, task.tests, seeded(task.number),
                                seconds=self.seconds))
            except (ValueError, OSError) as error:        # UnicodeDecodeError, too
                grades[task] = Grade(task, False, printable(error)[:600])
        for job, result in run_apart(jobs, self.processes):
            results[job.key] = result
            grades[job.key] = self.judge(job.key, result)
        self.learn([task for task, result in results.items() if not grades[task].passed
                    and (result.outputs is not None or result.probe_error)])
        return [grades[task]._replace(diagnosis=self.diagnosis(task, results.get(task)))
                if not grades[task].passed else grades[task] for task in self.tasks]

    def judge(self, task: Task, result: Result) -> Grade:
        if result.failed:
            name, message = result.failed[0]
            return Grade(task, False, printable(f"{name}: {message}")[:700])
        names = {name.partition("[")[0] for name in result.passed}
        if result.ending or not {test.partition("[")[0] for test in task.tests} <= names:
            return Grade(task, False, result.ending or "not all of its tests were run")
        if result.probe_error:
            return Grade(task, False, printable(f"with inputs of the grader's own: "
                                                f"{result.probe_error}"))
        off = difference(result.outputs, self.reference[task.number])
        return Grade(task, not off, printable(f"passes test_hmr.py, but not with inputs of the "
                                              f"grader's own: {off}") if off else "")

    def learn(self, tasks: list[Task]) -> None:
        """What the known mistakes of these tasks answer, unless that is known already."""
        jobs = []
        for task in tasks:
            if task.number not in self.known:
                self.known[task.number] = []
                text = (HERE / task.file).read_text(encoding="utf-8")
                jobs += [Job(edit, {task.file: apply(edit, text)}, probe=seeded(task.number))
                         for mistake in MISTAKES for edit in mistake.edits
                         if edit.task == task.number]
        for job, result in run_apart(jobs, self.processes):
            self.known[job.key.task].append((job.key, result))

    def diagnosis(self, task: Task, result: Result | None) -> str:
        if result is None or result.probe_error.startswith("NotImplementedError"):
            return ""
        for edit, known in self.known.get(task.number, []):
            if result.outputs is not None and known.outputs is not None:
                if not difference(result.outputs, known.outputs):
                    return edit.tell
            elif result.probe_error and result.probe_error == known.probe_error:
                return edit.tell
        return ""


def points(grades: list[Grade]) -> int:
    return sum(grade.task.points for grade in grades if grade.passed)


def report(name: str, grades: list[Grade]) -> None:
    print(name)
    for grade in grades:
        task = grade.task
        print(f"  {task.number:2d} {task.title:37s} {'passed' if grade.passed else 'FAILED'} "
              f"{task.points * grade.passed:3d} of {task.points:2d}")
        for line in filter(None, (grade.message, grade.diagnosis)):
            print(textwrap.fill(line, 100, initial_indent=" " * 5, subsequent_indent=" " * 5,
                                break_long_words=False, break_on_hyphens=False))
    print(f"     {points(grades)} of {sum(grade.task.points for grade in grades)} points",
          flush=True)


def gradescope(grades: list[Grade]) -> str:
    """results.json as Gradescope's autograder reads it."""
    tests = [{"name": f"Task {g.task.number}: {g.task.title}", "max_score": g.task.points,
              "score": g.task.points * g.passed, "status": "passed" if g.passed else "failed",
              "output": "\n".join(filter(None, (g.message, g.diagnosis)))} for g in grades]
    return json.dumps({"score": points(grades), "tests": tests}, indent=1)


def grade(folders: list[Path], wanted: list[int], out: Path, processes: int,
          seconds: float) -> bool:
    """Grade folders, print and write the results -> has everyone passed everything?"""
    for folder in folders:
        if not folder.is_dir() or not any((folder / file).exists() for file in CHAPTERS):
            raise ValueError(f"{folder}: expected a student's folder with {', '.join(CHAPTERS)}")
    names = [folder.resolve().name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name}: two folders of this name; their results would overwrite "
                             f"each other, rename one")
    grader = Grader(chosen(wanted), processes, seconds)
    rows = [["folder", *(f"{task.number} {task.title}" for task in grader.tasks), "points"]]
    everything = True
    for name, folder in zip(names, folders):
        grades = grader.folder(folder)
        report(name, grades)
        everything &= all(grade.passed for grade in grades)
        write_atomically(out / f"{name}.json", gradescope(grades).encode())
        rows.append([name, *(g.task.points * g.passed for g in grades), points(grades)])
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        write_atomically(out / "class.csv", text.getvalue().encode())
    print(f"wrote {out / 'class.csv'} and a .json for each folder")
    return everything


def chosen(wanted: list[int]) -> list[Task]:
    known = {task.number: task for task in TASKS}
    for number in wanted:
        if number not in known:
            raise ValueError(f"--tasks: {number} is no task; expected 1 to {len(TASKS)}")
    return [known[number] for number in dict.fromkeys(wanted)] or list(TASKS)


# --------------------------------------------------------------------------------------------
# check: the round trip

def restore(folder: Path, tasks: list[Task]) -> None:
    """Put the solutions of some tasks into a hand-out."""
    for task in tasks:
        ours, theirs = read_lines(HERE / task.file), read_lines(folder / task.file)
        known = functions("\n".join(ours))
        for name in task.functions:
            (begin, end), (first, last) = span(known[name]), regions(theirs)[0][task.number, name]
            theirs[first:last] = ours[begin:end]
        (folder / task.file).write_text("\n".join(theirs), encoding="utf-8")


def check(alone: list[list[Task]], processes: int) -> None:
    """Blank: each task fails by its own sentence.  Solved: all points.  Some alone: theirs.  The
    grader's inputs see each known mistake.  Raises ValueError where this does not hold."""
    grader = Grader(list(TASKS), processes)
    grader.learn(list(TASKS))
    for number, known in grader.known.items():
        for edit, result in known:
            if not result.probe_error and not difference(result.outputs, grader.reference[number]):
                raise ValueError(f"task {number}: the grader's inputs do not see {edit.new}")
    print(f"{sum(map(len, grader.known.values()))} known mistakes of {len(TASKS)} tasks, each seen "
          f"by the grader's own inputs", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        blank_folder = Path(temporary) / "blank"
        write(blank_folder)
        grades = grader.folder(blank_folder)
        for got in grades:
            sentence = f"NotImplementedError: Task {got.task.number}, {got.task.where}: "
            if sentence not in got.message:
                raise ValueError(f"blank, task {got.task.number}: {got.message or 'passes'}")
        print(f"blank: {points(grades)} points, each task fails by its own sentence", flush=True)
        for tasks in (list(TASKS), *alone):
            name = "tasks " + ",".join(str(task.number) for task in tasks)
            folder = Path(temporary) / name
            shutil.copytree(blank_folder, folder)
            restore(folder, tasks)
            grades = grader.folder(folder)
            expected = sum(task.points for task in tasks)
            if points(grades) != expected:
                report(name, grades)
                raise ValueError(f"{name}: {points(grades)} points, expected {expected}")
            print(f"{name} solved, nothing else: {expected} points", flush=True)


# --------------------------------------------------------------------------------------------
# The command line

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Exercises cut from the chapters, and graded.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("write", help="the folder that a student gets")
    one.add_argument("folder", type=Path, metavar="DIR")
    one = commands.add_parser("grade", help="students' folders (Linux); 1 if not all pass")
    one.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    one.add_argument("--tasks", default="", help="such as 3,7 (default: all)")
    one.add_argument("--out", type=Path, default=Path("out/grade"), metavar="DIR",
                     help="a .json for each folder, class.csv [out/grade]")
    one.add_argument("--seconds", type=int, default=60, help="of processor time for a task [60]")
    two = commands.add_parser("check", help="blank, solved, three tasks alone: their points")
    two.add_argument("--all", action="store_true", help="every task alone")
    for command in (one, two):
        command.add_argument("--processes", type=int, default=0, help="at a time [one a core]")
    commands.add_parser("answers", help="model answers to the questions in words")
    three = commands.add_parser("figures", help="elbow.png")
    three.add_argument("--out", type=Path, default=Path("out"), metavar="DIR")
    args, passed = parser.parse_args(argv), []

    def run() -> None:
        torch.set_num_threads(1)          # no threads, so that the process may be forked
        if args.command == "write":
            write(args.folder)
            print(f"wrote {args.folder}: {len(TASKS)} tasks, {sum(t.points for t in TASKS)} "
                  f"points; begin with TASKS.md")
        elif args.command == "grade":
            if not re.fullmatch(r"(\d+(,\d+)*)?", args.tasks):
                raise ValueError(f"--tasks {args.tasks}: expected numbers such as 3,7")
            wanted = [int(n) for n in args.tasks.split(",") if n]
            if not (args.seconds > 0 and args.processes >= 0):
                raise ValueError("--seconds, --processes: expected more than 0")
            passed.append(grade(args.folders, wanted, args.out, args.processes, args.seconds))
        elif args.command == "check":
            three = [task for task in TASKS if task.number in (2, 9, 14)]
            check([three, *([task] for task in TASKS if args.all)], args.processes)
        elif args.command == "figures":
            figures(args.out)
            print(f"wrote {args.out / 'elbow.png'}")
        else:
            answers()
    status = exit_status("exercises", run)
    return status or int(passed == [False])


if __name__ == "__main__":
    sys.exit(main())
