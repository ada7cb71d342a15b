"""Every mistake on the command line or in a config file is reported in one line."""

import os
import shutil
import subprocess
import sys

import jax
import pytest
from absl import flags, logging

from examples.trainer import __main__ as trainer
from examples.trainer import launch
from examples.trainer.cluster.layout import device_count
from examples.trainer.diloco import __main__ as diloco
from examples.trainer.errors import UserError
from examples.trainer.options import command_line
from trainer.helpers import ROOT

# ml_collections loads config files with it
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def give(monkeypatch):
    """Defines the flags of a program, as if the command line were these arguments."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = logging.get_verbosity()

    def give(*arguments, program=trainer):
        values = flags.FlagValues()
        program.define_flags(values)
        monkeypatch.setattr(flags, "FLAGS", values)
        monkeypatch.setattr(sys, "argv", ["program", *arguments])  # ml_collections looks there

    yield give
    logging.set_verbosity(before)


@pytest.fixture
def end(give, capsys):
    """Runs a program with these arguments; returns the message with which it ends."""

    def end(*arguments, program=trainer):
        give(*arguments, program=program)
        with pytest.raises(SystemExit) as exit:
            program.main(command_line.parse_flags(sys.argv))
        assert capsys.readouterr().out == ""
        return exit.value.code

    return end


def run(program, *options, **environment):
    """The program as a process."""
    return subprocess.run(
        [sys.executable, "-m", program, *options],
        cwd=ROOT, capture_output=True, text=True, timeout=600, env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config.learnin_rate=1", 'Did you mean "learning_rate"'),
        ("--config.optimizer.nesterov=True", "the config has no field 'nesterov'"),
        ("--config.learning_rate=fast", "could not convert string to float: 'fast'"),
        ("--config.optimizer=adam", "config.optimizer is a group of fields; set one of them"),
        ("--workdir=", "--workdir is empty"),
        ("--config.optimizer.name=sgdm", "config.optimizer.name must be one of nag"),
        ("--config=configs/missing.py", "No such file or directory: 'configs/missing.py'"),
        ("--config=", "Path to config file is an empty string"),
        (
            "--config=configs/mlp.py:a",
            "configs/mlp.py:a: TypeError: get_config() takes 0 positional",
        ),
        ("--config.help", "lists all fields with their meaning, --help the other options"),
        ("--learning_rate=1", "Unknown command line flag 'learning_rate'"),
        ("extra", "unknown arguments extra"),
        ("--config.momentum=1.5", "config: momentum must be in [0, 1), got 1.5"),
    ],
)
def test_mistakes_give_one_line(tmp_path, end, option, message):
    found = end("--config=configs/mlp.py", f"--workdir={tmp_path / 'run'}", option)
    assert found.startswith("error: ")
    assert message in found
    assert "\n" not in found
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_options_that_are_missing(end):
    assert end() == "error: --config and --workdir must be given; --help lists all options"
    assert end(program=diloco) == "error: --config must be given; --help lists all options"


@pytest.mark.slow
def test_a_mistake_as_a_process(tmp_path):
    options = ["--config=configs/mlp.py", "--config.optimizer.name=sgd", "--config.momentum=0.8"]
    result = run("examples.trainer", *options, f"--workdir={tmp_path / 'run'}")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    message = "error: config.momentum=0.8 has no effect with config.optimizer.name=sgd"
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_platform_that_is_not_there_as_a_process(tmp_path):
    options = ["--config=configs/mlp.py", f"--workdir={tmp_path / 'run'}"]
    result = run("examples.trainer", *options, JAX_PLATFORMS="cuda", CUDA_VISIBLE_DEVICES="")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "error: no device can be used with JAX_PLATFORMS=cuda: " in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "jax has no plugin for it"),  # what jax raises without its CUDA plugin
        (RuntimeError("Unable to initialize (set JAX_PLATFORMS=''...)"), "Unable to initialize"),
    ],
)
def test_a_platform_that_is_not_there(monkeypatch, error, reason):
    def fail():
        raise error

    monkeypatch.setattr(jax, "device_count", fail)
    message = f"no device can be used with JAX_PLATFORMS=.*: {reason}; unset JAX_PLATFORMS to"
    with pytest.raises(UserError, match=message):
        device_count()


def test_an_unusable_workdir_gives_one_line(tmp_path, end):
    (tmp_path / "file").write_text("in the way")
    found = end("--config=configs/mlp.py", f"--workdir={tmp_path / 'file' / 'run'}")
    assert found.endswith("cannot be used: Not a directory")
    assert "\n" not in found
    assert (tmp_path / "file").read_text() == "in the way"


def test_settings_that_another_program_uses(end, tmp_path):
    found = end("--config=configs/diloco.py", "--config.find_lr=True", program=diloco)
    assert "config.find_lr=True has no effect in examples.trainer.diloco" in found
    found = end("--config=configs/diloco.py", f"--workdir={tmp_path}", "--config.local.workers=2")
    assert "config.local.workers=2 has no effect in examples.trainer;" in found


def test_errors_in_a_config_file_are_reported_as_they_are():
    message = "'NoneType' object has no attribute 'x'"
    assert command_line.explain(AttributeError(message)) == message
    assert command_line.explain(AssertionError()) == "AssertionError"


def test_a_tilde_in_the_path_of_the_config_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command_line.with_home("--config=~/own.py") == f"--config={tmp_path / 'own.py'}"
    assert command_line.with_home("--config.text_file=~/a") == "--config.text_file=~/a"


@pytest.mark.slow
@pytest.mark.parametrize("program", ["trainer", "trainer.diloco"])
def test_help_starts_nothing(program):
    result = run(f"examples.{program}", "--help")
    assert result.stderr == ""
    assert "--config: File with the config of the run." in result.stdout
    assert f"python -m examples.{program}" in result.stdout


def test_help_of_the_launcher(capsys):
    with pytest.raises(SystemExit) as exit:
        launch.parse(["--help"])
    assert exit.value.code == 0
    assert "usage: python -m examples.trainer.launch" in capsys.readouterr().out


def test_a_launcher_without_processes(capsys):
    with pytest.raises(SystemExit) as exit:
        launch.parse(["--processes=0", "--", "--config=x"])
    assert exit.value.code == 2
    message = "--processes and --devices_per_process must be at least 1"
    assert message in capsys.readouterr().err


OWN = """
from configs import {base}

def get_config():
    config = {base}.get_config()
    config.optimizer.name = "nag_auto"
    {more}
    return config
"""


@pytest.fixture
def check_file(give, tmp_path):
    """Checks a config file with this content, and options of the command line, for effects."""

    def check_file(content, *options, path=None):
        path = path or tmp_path / "own.py"
        path.write_text(content)
        give(f"--config={path}", "--workdir=run", *options)
        flags.FLAGS(sys.argv)
        command_line.refuse_without_effect("examples.trainer")

    return check_file


@pytest.mark.parametrize(
    ("base", "more", "options", "refused"),
    [
        ("default", "config.learning_rate = 0.3", [], True),
        ("default", "config.learning_rate = 0.3", ["--config.optimizer.name=nag"], False),
        ("default", "config.optimizer.name = 'nag'; config.learning_rate = 0.3",
         ["--config.optimizer.name=nag_auto"], False),
        ("rnn", "config.batch_size = 16", [], False),
        ("linear", "config.dataset = 'digits'; config.model.name = 'mlp'; config.num_epochs = 2",
         [], False),
        ("linear", "config.model.name = 'mlp'; config.learning_rate = 0.3", [], True),
    ],
)  # fmt: skip
def test_a_users_own_config_file(check_file, base, more, options, refused):
    """It is compared with the recipe it is based on; the command line may correct it."""
    content = OWN.format(base=base, more=more)
    if not refused:
        check_file(content, *options)
        return
    with pytest.raises(UserError, match=r"config\.learning_rate=0\.3 has no effect with"):
        check_file(content, *options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learnin_rate = 0.3", r"no field config\.learnin_rate; did you mean config\.learning_rat"),
        ("model.layers = 3", r"no field config\.model\.layers; "),
        (
            "zzz = 3",
            r"own\.py: there is no field config\.zzz; configs/default\.py lists all fields",
        ),
        ("keep = 1; del config.keep", r"its config has no field keep; start from the config of"),
    ],
)
def test_a_config_file_with_other_fields(check_file, line, message):
    with pytest.raises(UserError, match=message):
        check_file(OWN.format(base="mlp", more=f"config.{line}"))


def test_a_config_file_that_returns_no_config(check_file):
    with pytest.raises(UserError, match=r"own\.py: get_config\(\) must return a ConfigDict$"):
        check_file("def get_config():\n    return {'seed': 0}")


def test_files_of_users_in_the_folder_of_the_recipes(tmp_path, monkeypatch, check_file):
    """They are checked like others, and do not prevent other files from running."""
    recipes = {path.stem for path in (ROOT / "configs").glob("[a-z]*.py")}
    assert recipes == set(command_line._RECIPES)
    folder = tmp_path / "configs"
    shutil.copytree(ROOT / "configs", folder)
    monkeypatch.setattr(command_line, "_SHIPPED", folder)
    (folder / "unfinished.py").write_text("def get_config(")
    (folder / "rnn.py").write_text("def get_config(")
    check_file(OWN.format(base="mlp", more=""), path=folder / "own.py")
    with pytest.raises(UserError, match=r"config\.learning_rate=0\.3 has no effect with"):
        check_file(OWN.format(base="mlp", more="config.learning_rate = 0.3"))
    wrong = OWN.format(base="mlp", more="config.learnin_rate = 0.3")
    for path in (folder / "own.py", folder / "mlp.py"):  # the second is a recipe that was edited
        with pytest.raises(UserError, match=r"no field config\.learnin_rate; did you mean"):
            check_file(wrong, path=path)
