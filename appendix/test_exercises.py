"""Exercises and gallery; .ci/run runs the whole gallery and the exercises' check, too."""

import ast
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from appendix import datasets, exercises, gallery
from appendix.exercises import TASKS
from appendix.gallery import CHAPTERS, HERE, MISTAKES, source
from test_hmr import same_numbers_every_time  # noqa: F401 (a fixture)


# ============================================================================================
# The table of mistakes

def test_beyond_the_picture_its_edge_is_repeated():
    keypoints = 50 * torch.rand(19, 2)
    crop, _ = datasets.crop_person(torch.ones(3, 50, 50), keypoints, torch.ones(19), 64, zoom=0.8)
    assert crop.min() > 0.99, f"black ({crop.min():.2f}) beyond the edge: SPIN's zeros, not hmr's"


EDITS = [gallery.Edit(*edit) for _, _, _, *edits in MISTAKES for edit in edits]


def caught(file: str, first: int, last: int, tests: list[str]) -> list[gallery.Edit]:
    """The edits of these lines (from 1) that one of these tests catches."""
    text = source(file)
    return [e for e in EDITS if e.file == file and e.test.partition("[")[0] in tests
            and first <= text.count("\n", 0, text.index(e.old)) + 1 <= last]


def test_the_table_is_complete_and_every_edit_applies():
    assert [number for number, *_ in MISTAKES] == list(range(1, len(MISTAKES) + 1))
    assert [number for number, _, _, *edits in MISTAKES if not edits] == [35]
    assert len({edit[:3] for edit in EDITS}) == len(EDITS) > 100
    for edit in EDITS:
        edited = gallery.apply(edit)                      # raises if the line has changed
        assert edited != source(edit.file) and "\n" not in edit.old[:-1], f"{edit}: not one line"
        ast.parse(edited)
        gallery.place(edit.test)                          # raises if there is no such test
    with pytest.raises(ValueError, match="mend this edit"):
        gallery.apply(EDITS[0]._replace(old="another text"))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: str(task.number))
def test_a_mistake_of_each_task_is_caught_by_a_test_of_the_task(task):
    tests = [f"test_{name}".partition("[")[0] for name in task.tests]
    known = exercises.functions(source(task.file))
    assert any(caught(task.file, *known[name][:3:2], tests) for name in task.functions)


def test_readmes_map_of_the_equations_is_the_codes():
    """Tag, function and test of each row; the gallery shows that the test looks at the function."""
    rows = re.findall(r"^\| ((?:Eq\.|slides:)[^|]*) \| `(\w+\.py):(\w+)` \| `(\w+)` \|$",
                      source("README.md"), re.M)
    tags = [re.match(r"Eq\. \(\d\)|slides: .*", tag)[0] for tag, *_ in rows]
    assert set(tags) == {f"Eq. ({n})" for n in range(1, 9)} | {f"slides: {formula}" for formula in (
        "y = F(x, {W_i}) + x", "F(x) := H(x) - x", "y = F(x) + W_s x",
        '"if t = T the full L, else L_adv"')}
    for tag, (_, file, name, test) in zip(tags, rows):
        kind, _, formula = tag.partition(": ")
        tagged = [i for i, line in enumerate(source(file).split("\n"), 1) if (
            line.endswith(f"# {tag}") if not formula else kind + ":" in line and formula in line)]
        (node,) = (n for n in ast.parse(source(file)).body if getattr(n, "name", "") == name)
        assert len(tagged) == 1 and node.lineno <= tagged[0] <= node.end_lineno, \
            f"README: {tag} is not (once) in {file}:{name}, but in lines {tagged}"
        assert caught(file, node.lineno, node.end_lineno, [test]), f"README: {test} catches nothing"


def python(*arguments: str | Path, cwd: Path = HERE) -> subprocess.CompletedProcess:
    """`python -m ..` in a process of its own, which has computed nothing and so may fork."""
    return subprocess.run([sys.executable, "-m", *arguments], cwd=cwd, text=True,
                          capture_output=True)


def test_the_gallery_runs_and_tells():
    shown = python("appendix.gallery", "16", "35").stdout
    assert "1 of 1 edits caught" in shown and "cannot be made here" in shown
    assert "this is upside down, without the half turn" in shown, "the mistake is named"
    assert gallery.main(["99"]) == 2


# ============================================================================================
# The hand-out

@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("course") / "student"
    exercises.write(folder)
    return folder


def test_the_table_of_tasks_is_whole():
    assert [t.number for t in TASKS] == list(range(1, 18)) and sum(t.points for t in TASKS) == 100
    assert exercises.QUESTIONS.count(f"\n{exercises.ANSWER}") == 3 * 8 == 3 * (
        exercises.QUESTIONS.count("**Question "))
    tests = {f"test_{test}".partition("[")[0] for task in TASKS for test in task.tests}
    bare = [f"{f.name}, line {n.lineno}" for f in ast.parse(source("test_hmr.py")).body
            if getattr(f, "name", "") in tests
            for n in ast.walk(f) if isinstance(n, ast.Assert) and not n.msg]
    assert not bare, f"{bare}: a student needs a sentence"


def test_a_tasks_command_runs_its_tests_and_no_others(student, capsys):
    pytest.main(["--collect-only", "-qs", "--assert=plain", "-pno:cacheprovider",
                 "-pno:faulthandler", str(HERE / "test_hmr.py")])
    nodes = {line.partition("::")[2] for line in capsys.readouterr().out.splitlines()} - {""}
    page = (student / "TASKS.md").read_text(encoding="utf-8")
    for task in TASKS:
        chosen = {node for node in nodes if any(
            word.lower() in node.lower() for word in task.key.split(" or "))}
        tests = {f"test_{name}" for name in task.tests}
        its = {node for node in nodes if {node, node.partition("[")[0]} & tests}
        odd = {node for node in chosen ^ its if not node.startswith("test_resnet_equals")}
        assert not odd, f"task {task.number}: -k {task.key!r} and its tests differ in {odd}"
        assert f'    pytest test_hmr.py -k "{task.key}"\n' in page


def test_a_handout_keeps_what_states_the_task_and_gives_no_answer(student):
    texts = {path.name: path.read_text(encoding="utf-8") for path in student.glob("*.*")}
    assert texts["test_hmr.py"] == source("test_hmr.py") and len(texts) == 7
    for file in CHAPTERS:
        ours, theirs = ({(f.name, ast.unparse(f.args), ast.get_docstring(f))
                         for f in ast.walk(ast.parse(text)) if isinstance(f, ast.FunctionDef)}
                        for text in (source(file), texts[file]))
        assert theirs <= ours, f"{file}: {theirs - ours}"
    blanks = re.findall('raise NotImplementedError."Task (.*?), .*: (.*)"', "".join(texts.values()))
    assert sorted(blanks) == sorted((str(t.number), name) for t in TASKS for name in t.functions)
    assert exercises.ANSWER not in texts["TASKS.md"]
    for line in sum(map(exercises.answer, TASKS), []):
        found = [name for name, text in texts.items() if len(line) > 20 and line in text]
        assert not found, f"{line!r} stands in {found}"


def test_the_folder_is_whole(student, tmp_path):
    assert not list(student.parent.glob(".*")), "temporary files left behind"
    names = {str(path.relative_to(student)) for path in student.rglob("*")}
    assert names >= {"TASKS.md", "assets/body.npz", "figures/elbow.png", "LICENSE"}
    assert not names & {"appendix", "assets/make_assets.py"}
    shown = python("pytest", "-qx", "test_hmr.py", cwd=student).stdout
    assert "NotImplementedError: Task 1, Sec. 3.1: batch_rodrigues" in shown, shown
    assert exercises.main(["write", str(tmp_path / "some"), "--tasks", "9,14"]) == 0
    text = "".join((tmp_path / "some" / file).read_text(encoding="utf-8") for file in CHAPTERS)
    assert set(re.findall(r"# >>> Task (\d+):", text)) == {"9", "14"}, "the others stay solved"


@pytest.mark.parametrize("arguments, sentence", [
    (["write", HERE / "assets"], "inside the project"), (["write", "."], "exists already"),
    (["grade", ".", "--tasks", "99"], "expected numbers of 1 to 17 such as 3,7"),
    (["grade", ".", "--seconds", "0"], "expected more than 0")])
def test_bad_options_end_in_a_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exercises.main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_the_questions_commands_print_what_the_answers_say(capsys):
    shown = []
    for code in re.findall(r'^    python -c "(.*?)"$', exercises.QUESTIONS, re.M | re.S):
        exec(code.replace("\n    ", "\n"), {})
        shown.append(capsys.readouterr().out)
    first, second, third = shown
    assert "[0.8000" in first and ", 0.4000" in first, first
    norms = [float(line.split()[-1]) for line in second.splitlines()]
    assert norms == pytest.approx([1.8, 23.8, 2.2, 7.2], rel=0.05), norms
    assert float(third) == 0


# ============================================================================================
# Grading

def test_a_solved_file_becomes_the_projects_again(tmp_path):
    for task in TASKS:
        text, known = source(task.file), exercises.functions(source(task.file))
        lines = text.split("\n")
        for name in sorted(task.functions, key=known.get, reverse=True):
            first, _, end, _ = known[name]
            lines.insert(end, "# a longer answer\n" + exercises.END.format(task.number, name))
            lines.insert(first, exercises.BEGIN.format(task.number, name))
        (tmp_path / task.file).write_text("\n".join(lines), encoding="utf-8")
        grafted, _ = exercises.graft(task, tmp_path / task.file)
        assert grafted.replace("# a longer answer\n", "") == text


RIGHT = "return cam[:, None, :1] * (points[..., :2] + cam[:, None, 1:])"
SUBMISSIONS = {    # of Task 9; what stands in place of its line, and what the grader says
    "right": (RIGHT, None),
    "comments": ("# >>> Task 10: x\n    # end of task\n    # <<< Task 9\n    " + RIGHT, None),
    "paper": ("return cam[:, None, :1] * points[..., :2] + cam[:, None, 1:]",
              "this is the paper's s X + t"),
    "leaves": ("import os\n    os._exit(0)", "the process left by itself"),
    "hangs": ("while True:\n        pass", "did not end within 4 seconds: an endless loop?"),
    "hungry": ("return points.new_zeros(2 ** 40)", "asks for more than 4 GiB of memory"),
    "talks": ("while True:\n        print('x' * 2 ** 24)", "writes more than 256 MiB"),
    "silent": ("points", "expected a torch.float32 tensor, as the input is, got NoneType"),
    "helper": ("return half(points) * cam[:, :1]", "'half' stands outside the task's lines"),
    "looks": ("import os, sys\n    here = [os.getcwd(), *sys.argv, *sys.path, *os.environ.values()]"
              f"\n    assert not [x for x in here if '{HERE}' in x], here\n    {RIGHT}", None),
    "broken": ("return (cam", "hmr.py, line"),
    "latin": ("return cam  # caf\xe9", "in Latin-1 or the like; save it as UTF-8"),
    "unmarked": ("", "the line '# >>> Task 9: project' or '# <<< Task 9: project' is")}
NOTHING = {"empty": "an empty folder", "nested": "the files stand deeper, in work",
           "zipped": "none of the four files but hmr.zip", "gone": "no such folder"}


@pytest.fixture(scope="module")
def graded(student, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    classroom, out = tmp_path_factory.mktemp("class"), tmp_path_factory.mktemp("out")
    blank = (student / "hmr.py").read_text(encoding="utf-8")
    line = re.search(r"raise NotImplementedError\(\"Task 9.*\n", blank)[0]
    files = {name: blank.replace(line, f"{text}\n") + "\n\ndef half(x):\n    return x / 2\n"
             for name, (text, _) in SUBMISSIONS.items()}
    files["unmarked"] = files["right"].replace("# <<< Task 9: project", "")
    files["nested/work"] = files["again/right"] = files["right"]
    for name, text in files.items():
        (classroom / name).mkdir(parents=True)
        (classroom / name / "hmr.py").write_text(text, encoding="latin-1")     # ASCII but for one
    (classroom / "empty").mkdir()
    (classroom / "zipped").mkdir()
    (classroom / "zipped" / "hmr.zip").touch()
    folders = [classroom / name for name in (*SUBMISSIONS, *NOTHING, "again/right")]
    return python("appendix.exercises", "grade", "--tasks", "9", "--seconds", "4", "--processes",
                  "2", "--out", out, *folders), out


def test_no_submission_stops_the_grading(graded):
    done, out = graded
    assert done.returncode == 1 and not done.stderr, done.stderr
    with open(out / "class.csv", encoding="utf-8", newline="") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    assert len(rows) == len(SUBMISSIONS) + len(NOTHING) + 1, "one row a student"
    right = {name for name, row in rows.items() if row["points"] == row["9 project"] == "4"}
    assert right == {next(iter(rows)), "comments", "looks", "again_right"}, "two are named right"
    for name, sentence in NOTHING.items():
        assert rows[name]["remark"].startswith(sentence) and rows[name]["points"] == "0"
    table = done.stdout.split("most frequent loss\n")[1]
    assert re.match(r" 9 project +4 +0 +14  1 x ", table), table


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_a_submission_is_told_what_is_wrong(graded, name):
    path = next(graded[1].glob(f"*{name}.json"))
    content = json.loads(path.read_text(encoding="utf-8"))
    (test,), says = content["tests"], SUBMISSIONS[name][1]
    assert test["max_score"] == 4 and test["score"] == content["score"] == 4 * (says is None)
    assert (says or "") in test["output"] and bool(says) == bool(test["output"]), test["output"]
