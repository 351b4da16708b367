"""A mistake costs one clear line and exit code 2: no traceback, and nothing is written."""

import dataclasses
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from crl.cli import main
from crl.config import Experiment

PARTS = {
    "engine": {"envs": 2},
    "evaluation": {"episodes": 1},
    "agent": {"use": "ppo", "n_steps": 16, "batch_size": 16},
    "monitors": [],
}
CARTPOLE = {"env": "CartPole-v1", "steps": 64}
PENDULUM = {"env": "Pendulum-v1", "steps": 64}
SAC = {"use": "stable_baselines3.SAC"}


def config(*tasks, **parts):
    """The text of a small YAML."""
    return yaml.safe_dump({"tasks": list(tasks) or [CARTPOLE], **PARTS, **parts}, sort_keys=False, allow_unicode=True)


def task(**parts):
    """The text of a small YAML of one CartPole task."""
    return config({**CARTPOLE, **parts})


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder; its one line, once it has been refused and nothing has changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)

    def refused(*argv, text=None, wrote=False, seq="--env-seq"):
        if text is not None:
            Path("c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
            argv = ("train", seq, "c.yaml", "-q", *argv)
        before = snapshot(tmp_path)
        capsys.readouterr()
        try:
            code = main(argv)
        except SystemExit as error:  # argparse's own way out
            code = error.code
        said = capsys.readouterr()
        assert code == 2, said.err
        assert said.out == ""
        assert len(said.err.splitlines()) == 1, said.err
        assert "Traceback" not in said.err
        assert wrote or snapshot(tmp_path) == before
        return said.err

    return refused


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def contains(said, parts):
    for part in [parts] if isinstance(parts, str) else parts:
        assert part in said


# The file.


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("missing.yaml", "missing.yaml: no such file"),
        ("minigrd", "no such file; did you mean the shipped config 'minigrid'?"),
        (".", ".: no such file"),
    ],
)
@pytest.mark.parametrize("command", [["train", "--env-seq"], ["check"]])
def test_file_not_found(refused, command, name, parts):
    contains(refused(*command, name), parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("tasks: [\n", "c.yaml, line 2, column 1: not valid YAML"),
        ("tasks:\n\t- x\n", "c.yaml, line 2, column 1: not valid YAML: found character '\\t'"),
        ("name: *x\n", "line 1, column 7: not valid YAML: found undefined alias 'x'"),
        ("seed: 1\nseed: 2\n", "line 2, column 1: not valid YAML: key 'seed' is given twice"),
        ("seed: 1\nname: 2020-99-99\n", "line 2, column 7: not valid YAML: month must be in 1..12"),
        ("name: !!python/object/apply:os.system [true]\n", "line 1, column 7: not valid YAML: could not determine"),
        ("tasks: &t [*t]\n", "c.yaml: not valid YAML: ValueError: Circular reference"),
        ("[" * 3000, "c.yaml: not valid YAML: RecursionError"),
        (b"\xff\xfe\x00", "c.yaml: cannot be read: 'utf-8' codec"),
        (b"tasks: \x00\n", "c.yaml: not valid YAML: ReaderError: unacceptable character"),
    ],
)
def test_not_yaml(refused, text, parts):
    contains(refused(text=text), parts)


@pytest.mark.parametrize(
    ("text", "what"),
    [("", "nothing"), ("# x\n", "nothing"), ("- a\n", "a list"), ("hello\n", "text"), ("3", "a number")],
)
def test_not_an_experiment(refused, text, what):
    contains(refused(text=text), f"c.yaml: an experiment is a mapping with `tasks:` or `stream:`, not {what}")


# Keys and values.


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (config(sed=3), "sed: unknown key; did you mean 'seed'?"),
        (config(engine={"env": 2}), "engine.env: unknown key; did you mean 'envs'?"),
        (task(stpes=3), "tasks.0.stpes: unknown key; did you mean 'steps'?"),
        (config(agent={"use": "ppo", "learning_rat": 1}), ["agent", "'learning_rat'; did you mean 'learning_rate'?"]),
        (config(agent={"use": "ppo", "net": {"hiden": [3]}}), "agent.net: unknown 'hiden'; did you mean 'hidden'?"),
        (config(boundary={"zzz": 1}), "boundary.zzz: unknown key; known are optimizer, head"),
        (config() + "3: 4\n", "3: unknown key; known are tasks, stream, name"),
        (config(agent={"use": "ppo", "seed": 3}), "agent.seed: PPO takes no such option"),
    ],
)
def test_unknown_key(refused, text, parts):
    contains(refused(text=text), parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (config(CARTPOLE, CARTPOLE, {**CARTPOLE, "steps": "lots"}), "tasks.2.steps: expected a whole number, not text"),
        (config(CARTPOLE, CARTPOLE, {**CARTPOLE, "steps": 0}), "tasks.2.steps: 0 is too small; the least is 1"),
        (task(steps=True), "tasks.0.steps: expected a whole number, not true or false"),
        (task(steps=1.5), "tasks.0.steps: expected a whole number, not a number (1.5)"),
        (task(steps=None), "tasks.0.steps: expected a whole number, not nothing"),
        (task(steps=float("inf")), "tasks.0.steps: expected a whole number"),
        (task(env=3), "tasks.0.env: expected text, not a number"),
        (config({"steps": 64}), "tasks.0: `env` is missing"),
        (config({"env": "CartPole-v1"}), "tasks.0: `steps` is missing"),
        (config("CartPole-v1"), "tasks.0: expected a mapping, not text"),
        (config(tasks=3), "tasks: expected a list, not a number"),
        (config(tasks=None), "tasks: expected a list, not nothing"),
        (config(tasks=[]), "c: has neither `tasks:` nor `stream:`; a walk goes through environments or through slices"),
        (config(seed=-1), "seed: -1 is too small; the least is 0"),
        (config(seed=2**32), "seed: 4294967296 is too large; the most is 4294967295"),
        (config(engine={"envs": 10**8}), "engine.envs: 100000000 is too large; the most is"),
        (config(engine={"kind": "sinc"}), "engine.kind: 'sinc' is not one of sync"),
        (config(repeat=10**9), "repeat: 1000000000 is too large"),
        (config(threads=10**6), "threads: 1000000 is too large"),
        (config(engine=None), "engine: expected a mapping, not nothing"),
        (config(boundary="reset"), "boundary: expected a mapping, not text"),
        (config(boundary={"announced": "no"}), "boundary.announced: expected true, false or detected, not text"),
        (config(agent=3), "agent: expected a name or a mapping with `use:`, not a number"),
        (config(agent={"use": 3}), "agent.use: expected text, not a number"),
        (config(agent={"use": "ppo", 3: 3}), "agent.3: a key is a name here, not a number"),
        (config(agent={"use": "ppo", "n_steps": "x"}), "agent.n_steps: 'x' is not a whole number"),
        (config(agent={"use": "ppo", "net": {"hidden": [-3]}}), "agent.net.hidden: -3 is not a whole number of at"),
        (config(agent={"use": "dqn", "train_freq": 0}), "agent.train_freq: 0 is too small; the least is 1"),
        (config(methods="x"), "methods: expected a list, not text"),
        (config(methods=[3]), "methods.0: expected a name or a mapping with `use:`, not a number"),
        (config(methods=[{}]), "methods.0: `use` is missing"),
        (config(methods=["x"]), "methods.0: unknown 'x' (an import path"),
        (config(monitors=["collections.OrderedDict"]), "monitors.0: collections.OrderedDict lacks measure()"),
        (config(name="a/b"), "name: 'a/b' names a folder: at most 60 letters"),
        (config(name=".."), "name: '..' names a folder"),
        (config(name="a" * 300), "names a folder: at most 60 letters"),
        (config(name="😀"), "name: '😀' names a folder"),
        (task(name="a\nb"), "tasks.0.name: 'a\\nb' must be one line of printable text"),
        (config({**CARTPOLE, "name": "a"}, {**CARTPOLE, "name": "a", "kwargs": {"max_episode_steps": 9}}), "tasks.1: "),
    ],
)
def test_wrong_type_or_range(refused, text, parts):
    contains(refused(text=text), parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("sed=3", "sed: unknown key; did you mean 'seed'?"),
        ("engine.env=3", "engine.env: unknown key; did you mean 'envs'?"),
        ("tasks.0.stpes=3", "tasks.0.stpes: unknown key; did you mean 'steps'?"),
        ("agent.net.hiden=[3]", "agent.net: unknown 'hiden'; did you mean 'hidden'?"),
        ("tasks.5.steps=3", "--set tasks.5.steps: tasks has no entry '5'; they are counted from 0 to 0"),
        ("tasks.-1.steps=3", "--set tasks.-1.steps: tasks has no entry '-1'"),
        ("tasks.².steps=3", "--set tasks.².steps: tasks has no entry '²'"),
        ("tasks.0=3", "tasks.0: expected a mapping, not a number"),
        ("evaluation.episodes.x=3", "--set evaluation.episodes.x: evaluation.episodes is a number and has no 'x'"),
        ("tasks..steps=3", "--set tasks..steps: expected a place such as tasks.0.steps"),
        ("seed", "--set seed: expected PLACE=VALUE, such as tasks.0.steps=20000"),
        ("=3", "--set =3: expected PLACE=VALUE"),
        ("seed=[1", "--set seed, line 1, column 3: not valid YAML"),
        ("agent.use=ppp", "agent: unknown 'ppp'; did you mean 'ppo'?"),
    ],
)
def test_set_on_a_key_that_does_not_exist(refused, change, parts):
    contains(refused("--set", change, text=config()), parts)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "crl train: one of the arguments --env-seq --data-seq is required"),
        (["train", "--env-seq", "a", "--data-seq", "b"], "--data-seq: not allowed with argument --env-seq"),
        (["train", "--env-seq", "c", "--seed", "x"], "argument --seed: invalid int value: 'x' (see crl train --help)"),
        (["eval", "x", "--episodes", "0"], "--episodes: 0 is too small; the least is 1"),
        (["eval", "x", "--render", "no/x.gif"], "--render: there is no folder 'no'"),
    ],
)
def test_wrong_command_line(refused, argv, parts):
    contains(refused(*argv), parts)


# Environments.


@pytest.mark.parametrize(
    ("env", "parts"),
    [
        ("CartPol-v1", "tasks.0: unknown environment 'CartPol-v1'; did you mean CartPole-v1"),
        ("CartPole-v9", "tasks.0: unknown environment 'CartPole-v9'; did you mean CartPole-v1"),
        ("Cärtpole-v1", "did you mean CartPole-v1"),
        ("MiniGrid-Emty-5x5-v0", "did you mean MiniGrid-Empty-5x5-v0"),
        ("LunarLander-v2", "Please use `LunarLander-v3` instead"),
        ("", "tasks.0: Malformed environment ID"),
        ("nope:CartPole-v1", "tasks.0: cannot import 'nope': ModuleNotFoundError"),
        (".x:CartPole-v1", "tasks.0: cannot import '.x'"),
    ],
)
def test_unknown_environment(refused, env, parts):
    contains(refused(text=task(env=env)), parts)


@pytest.mark.parametrize(
    ("env", "package", "extra"),
    [
        ("Ant-v5", "mujoco", "gymnasium[mujoco]"),
        ("LunarLander-v3", "Box2D", "gymnasium[box2d]"),
        ("ALE/Pong-v5", "ale_py", "gymnasium[atari]"),
        ("MiniGrid-WFC-MazeSimple-v0", "imageio", "minigrid[wfc]"),
    ],
)
def test_extra_is_not_installed(refused, monkeypatch, env, package, extra):
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, name)  # they remember what they found
    for name in (package, f"{package}.v2"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not
    contains(refused(text=task(env=env)), f'tasks.0: {env} needs an extra: pip install "{extra}"')


@pytest.mark.parametrize(
    ("parts_of_task", "parts"),
    [
        ({"kwargs": {"foo": 1}}, "tasks.0: CartPole-v1 cannot be made or stepped with kwargs {'foo': 1}: TypeError: "),
        ({"kwargs": {"max_episode_steps": -3}}, "to be positive, actually: -3"),
        ({"kwargs": [1]}, "tasks.0.kwargs: expected a mapping, not a list"),
        ({"kwargs": {1: 1}}, "tasks.0.kwargs.1: a key is a name here"),
        ({"change": {"grvity": [1]}}, "tasks.0: change: CartPole-v1 has no attribute 'grvity'; did you mean"),
        ({"change": {"gravity": ["heavy"]}}, "tasks.0: change: gravity: expected a number, not 'heavy'"),
        ({"change": {"step": [3]}}, "tasks.0: change: step of CartPole-v1 cannot be changed"),
        ({"change": {"gravity": [1, 2], "length": [1]}}, "tasks.0.change: every attribute needs the same number"),
    ],
)
def test_environment_refuses(refused, parts_of_task, parts):
    contains(refused(text=task(**parts_of_task)), parts)


@pytest.mark.parametrize(
    ("wrapper", "parts"),
    [
        ("scale_revard", "tasks.0.wrappers.0: unknown 'scale_revard'; did you mean 'scale_reward'?"),
        (
            {"use": "scale_reward", "bye": 2},
            "tasks.0.wrappers.0.bye: ScaleReward takes no such option; did you mean 'by'?",
        ),
        ({"use": "scale_reward", "env": 2}, "tasks.0.wrappers.0.env: ScaleReward takes no such option; known are by"),
        ({"use": "scale_reward", 3: 2}, "tasks.0.wrappers.0.3: a key is a name here"),
        ({"use": "mission", "foo": 2}, "tasks.0.wrappers.0.foo: mission takes no such option"),
        ("mission", "mission is a part of MiniGrid's observations, which CartPole-v1 has not"),
        ("gymnasium.wrappers.TimeLimi", "module 'gymnasium.wrappers' has no 'TimeLimi'; did you mean 'TimeLimit'?"),
        ("gymnasium.wrappers.TimeLimit", "TimeLimit missing a required argument: 'max_episode_steps'"),
        ({"use": "gymnasium.wrappers.TimeLimit", "max_episode_steps": "x"}, "with wrappers ['TimeLimit']: TypeError"),
        ("os.system", "tasks.0.wrappers.0: os.system is a builtin_function_or_method, not a class"),
        ({"use": "remap_action", "order": [0, 0]}, "remap_action.order must hold each of 0..1 once"),
        (3, "tasks.0.wrappers.0: expected a mapping, not a number"),
    ],
)
def test_wrapper(refused, wrapper, parts):
    contains(refused(text=task(wrappers=[wrapper])), parts)


def test_spaces_that_cannot_be_joined(refused):
    said = refused(text=config(CARTPOLE, PENDULUM))
    contains(said, "tasks: CartPole-v1 has discrete actions and Pendulum-v1 has continuous ones; one agent cannot")


# Agents and rules.


@pytest.mark.parametrize(
    ("agent", "parts"),
    [
        ("ppoo", "agent: unknown 'ppoo'; did you mean 'ppo'? (an import path, such as my_agent.MyAgent, works too)"),
        ("", "agent: unknown ''"),
        ("nope.MyAgent", "agent: cannot import 'nope': ModuleNotFoundError: No module named 'nope'"),
        ("./a/b.MyAgent", "agent: cannot import './a/b'"),
        ("broken_at_import.A", "agent: cannot import 'broken_at_import': ZeroDivisionError: division by zero"),
        ("broken_syntax.A", "agent: cannot import 'broken_syntax': SyntaxError"),
        ("stable_baselines3.PPOO", "agent: module 'stable_baselines3' has no 'PPOO'; did you mean 'PPO'?"),
        ("stable_baselines3.HerReplayBuffer", "HerReplayBuffer is not supported; supported are PPO, A2C"),
        ("stable_baselines3.ppo", "agent: stable_baselines3.ppo is a module, not a class"),
        ("os.system", "agent: os.system is a builtin_function_or_method, not a class"),
        ("os.PathLike", "agent: os.PathLike lacks act(), observe(), update(), state_dict(), load_state_dict()"),
        ("stable_baselines3.SAC", "agent: SAC refuses these settings"),
    ],
)
def test_agent(refused, agent, parts):
    Path("broken_at_import.py").write_text("1 / 0\n")
    Path("broken_syntax.py").write_text("def f(:\n")
    contains(refused("--agent", agent, text=config(agent={})), parts)


@pytest.mark.parametrize(
    ("parts_of_config", "parts"),
    [
        ({"baseline": "frsh"}, "baseline: 'frsh' is not one of none, fresh, fresh_with_methods"),
        ({"boundary": {"optimizer": "rest"}}, "boundary.optimizer: 'rest' is not one of keep, reset"),
        ({"boundary": {"announced": False, "optimizer": "reset"}}, ["announced: false", "optimizer: reset cannot"]),
        ({"boundary": {"announced": False, "head": "per_task"}}, ["announced: false", "head: per_task cannot"]),
        ({"boundary": {"buffer": "reset"}}, "boundary.buffer: reset, but agent PPO has no buffer to reset"),
        ({"boundary": {"normalizer": "reset"}}, "boundary.normalizer: reset, but agent PPO has no normalizer"),
        (
            {"boundary": {"head": "per_task"}, "agent": SAC, "tasks": [PENDULUM]},
            "boundary.head: per_task works with PPO, A2C, TRPO and DQN, not with SAC",
        ),
    ],
)
def test_rules_that_contradict(refused, parts_of_config, parts):
    contains(refused(text=config(**parts_of_config)), parts)


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_no_cuda(refused, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    contains(
        refused("--device", device, text=config()),
        f"device: {device} was asked for, but torch sees no CUDA devices here; use cpu",
    )


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", ""])
def test_unknown_device(refused, device):
    contains(refused("--device", device, text=config()), f"device: {device!r} is not one of auto, cpu, cuda, cuda:N")


# Slices of a dataset.

TINY = {"data": "tests.tiny_images.tiny", "tasks": 3, "batch": 8}
LEARNER = {"use": "classifier", "net": {"hidden": [4]}}


def stream(**parts):
    """The text of a small YAML of a stream; what is None is left out of it."""
    own = {key: parts.pop(key) for key in [*parts] if key not in {f.name for f in dataclasses.fields(Experiment)}}
    data = {"stream": {**TINY, **own}, "threads": 1, "agent": LEARNER, "monitors": [], **parts}
    return yaml.safe_dump({key: value for key, value in data.items() if value is not None}, sort_keys=False)


@pytest.fixture
def declined(refused, tmp_path, monkeypatch):
    """As `refused`, of a stream; there is no dataset here but the built-in ones."""
    monkeypatch.setenv("CRL_DATA_DIR", str(tmp_path / "none"))
    return lambda *argv, **parts: refused(*argv, text=stream(**parts), seq="--data-seq")


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"tasks": [CARTPOLE], "stream": TINY}, "c: has both `tasks:` and `stream:`; a walk goes through environments"),
        ({"stream": None}, "c: has neither `tasks:` nor `stream:`; a walk goes through environments or"),
        ({"stream": 3}, "stream: expected a name or a mapping with `use:`, not a number"),
        ({"stream": "split"}, "stream: `data` is missing: mnist, cifar100, shapes, a folder, or an import path"),
        ({"use": "splt"}, "stream.use: 'splt' is not split or permuted or incremental or random_label or pairs"),
        ({"taks": 3}, "stream.taks: split takes no such option; did you mean 'tasks'?"),
        ({"use": "permuted", "cumulativ": True}, "stream.cumulativ: permuted takes no such option; did you mean"),
        ({"use": "pairs", "scenario": "task"}, "stream.scenario: pairs takes no such option; known are tasks, batch"),
        ({"batch": 0}, "stream.batch: 0 is not a whole number of at least 1"),
        ({"epochs": 1.5}, "stream.epochs: 1.5 is not a whole number of at least 1"),
        ({"epochs": True}, "stream.epochs: True is not a whole number of at least 1"),
        ({"samples": -1}, "stream.samples: -1 is not a whole number of at least 0"),
        ({"joint": 1}, "stream.joint: 1 is not true or false"),
        ({"scenario": "tsk"}, "stream.scenario: 'tsk' is not task or class"),
        ({"order": "sorted"}, "stream.order: 'sorted' is not drawn or as_is"),
        ({"augment": ["flpi"]}, "stream.augment: ['flpi'] is not a list of crop, flip"),
        ({"augment": "flip"}, "stream.augment: 'flip' is not a list of crop, flip"),
        ({"augment": ["flip"], "data": "tests.tiny_images.vectors"}, "stream.augment: crop and flip are for images"),
        ({"stream": {**TINY, "tasks": 4}}, "stream.tasks: 6 classes are not cut into 4 equal parts"),
        ({"stream": {**TINY, "tasks": 0}}, "stream.tasks: 0 is not a whole number of at least 1"),
        (
            {"stream": {**TINY, "use": "incremental", "tasks": 5}},
            "stream.tasks: 6 classes are not cut into 5 equal parts",
        ),
        ({"only": 4}, "stream.only: 4 is no task; they are counted from 1 to 3"),
        ({"only": -1}, "stream.only: -1 is not a whole number of at least 0"),
        ({"data": "tests.tiny_images.untested", "order": "as_is"}, "stream: task 'task 3' has no images to learn from"),
        ({"evaluation": {"of": "al"}}, "evaluation.of: 'al' is not one of all, seen, own"),
        ({"checkpoint": {"keep": -1}}, "checkpoint.keep: -1 is too small; the least is 0"),
    ],
)
def test_stream(declined, parts, said):
    contains(declined(**parts), said)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ("mnist", ["stream: mnist is not here: `crl data fetch mnist` downloads it", "`crl data import mnist PATH`"]),
        ("cifar100", ["`crl data fetch cifar100`", "`crl data import cifar100 PATH`", "`--data shapes` runs without"]),
        ("shaeps", "stream: unknown dataset 'shaeps'; did you mean shapes? (a folder of classes, or my_data.digits"),
        ("no/such", "stream: no/such is no folder: right would be a folder of classes"),
        ("os.getcwd", "stream: os.getcwd is no function annotated to return Arrays, so it is not called"),
        ("tests.tiny_images.tniy", "module 'tests.tiny_images' has no 'tniy'; 'tiny'?"),
        (3, "stream.data: expected text, not a number (3)"),
    ],
)
def test_data(declined, data, parts):
    contains(declined(data=data), parts)


def test_data_on_the_command_line(declined, refused):
    contains(declined("--data", "mnist"), "stream: mnist is not here: `crl data fetch mnist` downloads it (11 MB)")
    said = "--data names the dataset of a --data-seq; environments have none"
    contains(refused("--data", "shapes", text=config()), said)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        ({"use": "resnet81"}, "agent.net.use: unknown 'resnet81'; did you mean 'resnet18'?"),
        ({"hiden": [3]}, "agent.net: unknown 'hiden'; did you mean 'hidden'?"),
        ({"use": "resnet18", "widht": 4}, "agent.net: unknown 'widht'; did you mean 'width'?"),
        ({"use": "resnet18", "width": 0}, "agent.net.width: 0 is not a whole number of at least 1"),
        ({"use": "biconvgru", "both": True}, "agent.net: unknown 'both'; known are"),
        ({"use": "conv"}, "agent.net: 3 convolutions with pooling leave nothing of a 16x16 image"),
        ({"use": "conv", "channels": [4], "activation": "crelu"}, "agent.net.activation: unknown 'crelu'"),
        ({"use": "convgru", "bands": 5}, "agent.net.bands: an image of 16 rows is not cut into 5 equal bands"),
        ({"init": "kaimin"}, "agent.net.init: unknown 'kaimin'; did you mean 'kaiming'?"),
        ({"use": "nope.Net"}, "agent.net.use: cannot import 'nope.Net': ModuleNotFoundError"),
        ({"hidden": [0]}, "agent.net.hidden: 0 is not a whole number of at least 1"),
        ({"use": "convgru", "bands": 0}, "agent.net.bands: 0 is not a whole"),
        ("resnet18x", "agent.net.use: unknown 'resnet18x'; did you mean 'resnet18'?"),
        (3, "agent.net: "),
    ],
)
def test_net(declined, net, said):
    contains(declined(agent={"use": "classifier", "net": net}), said)


@pytest.mark.parametrize("net", ["conv", "resnet18", "convgru"])
def test_a_net_of_images_on_vectors(declined, net):
    said = f"agent.net.use: {net} reads images (channels, height, width), and what is seen is (5,)"
    contains(declined(agent={"use": "classifier", "net": {"use": net}}, data="tests.tiny_images.vectors"), said)


@pytest.mark.parametrize("agent", ["ppo", "dqn", "stable_baselines3.PPO"])
def test_an_agent_of_environments_on_a_stream(declined, agent):
    said = f"agent: {agent.rpartition('.')[2].upper()} learns from transitions, and this sequence gives labelled pairs;"
    contains(declined("--agent", agent), [said, "use classifier"])


def test_the_classifier_on_environments(refused):
    said = "agent: Classifier learns from pairs, and this sequence gives transitions; use ppo or dqn"
    contains(refused("--agent", "classifier", text=config()), said)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"boundary": {"buffer": "reset"}}, "boundary.buffer: reset: the classifier has none"),
        ({"boundary": {"normalizer": "reset"}}, "boundary.normalizer: reset: the classifier has none"),
        (
            {"boundary": {"announced": False}, "methods": ["lwf"]},
            "announced: false hides boundaries, which method 'lwf'",
        ),
        ({"agent": {**LEARNER, "learning_rate": -1}}, "agent.learning_rate: -1 is not a number of at least 0"),
        ({"agent": {**LEARNER, "net": {"use": "resnet18", "width": 4}}, "methods": ["packnet"]}, "in none"),
    ],
)
def test_rules_of_the_classifier(declined, parts, said):
    contains(declined(**parts), said)


def test_a_stream_is_no_sequence_of_environments(refused):
    contains(refused(text=stream()), "--data-seq")


def test_environments_are_no_sequence_of_slices(refused):
    contains(refused(text=config(), seq="--data-seq"), "--env-seq")


def test_pictures_make_no_film(refused):
    Path("c.yaml").write_text(stream())
    assert main(["train", "--data-seq", "c.yaml", "-q"]) == 0
    said = refused("eval", "runs/c/classifier/seed-0", "--render", "x.gif")
    contains(said, "--render: pictures that are classified make no film")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["data", "fetch", "nothing"], "unknown dataset 'nothing'; there are mnist, fashion_mnist, cifar10, cifar100"),
        (["data", "fetch", "mnsit"], "unknown dataset 'mnsit'; did you mean mnist?"),
        (["data", "import", "nothing", "."], "unknown dataset 'nothing'"),
        (["data", "import", "mnist", "nowhere"], "nowhere does not exist"),
        (["data"], "crl data: the following arguments are required: VERB"),
        (["correlate", "."], ".: no run is here, nor below (there is no manifest.json)"),
        (["correlate", "nowhere"], "nowhere: no run is here, nor below"),
    ],
)
def test_commands_on_data_and_runs(refused, argv, said):
    contains(refused(*argv), said)


# A run's folder.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that has finished."""
    home = tmp_path_factory.mktemp("finished")
    (home / "c.yaml").write_text(config())
    assert main(["train", "--env-seq", str(home / "c.yaml"), "--out", str(home), "-q"]) == 0
    return home / "c" / "ppo" / "seed-0"


@pytest.fixture
def run(finished, refused):
    """A copy of it in the folder where commands are given, where another run of c.yaml would go, and cut short."""
    path = Path("runs/c/ppo/seed-0")
    shutil.copytree(finished, path)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished"', '"interrupted"'))
    return path


LAST = "checkpoints/boundary-01.pt"
COMMANDS = pytest.mark.parametrize("command", ["resume", "eval"])


def test_occupied_folder(refused, run):
    said = refused(text=config())
    contains(said, [f"{run} holds a run already", f"`crl resume {run}`", "--overwrite drops it"])


def test_occupied_by_something_else(refused):
    path = Path("runs/c/ppo/seed-0")
    path.mkdir(parents=True)
    (path / "thesis.txt").write_text("all of it")
    contains(refused("--overwrite", text=config()), "not empty and not a run of crl: nothing there is overwritten")


@pytest.mark.parametrize("out", ["f", "f/deeper"])
def test_unwritable_out(refused, out):
    Path("f").write_text("a file")
    contains(refused("--out", out, text=config()), f"{out}/c/ppo/seed-0: cannot be written: Not a directory")


@COMMANDS
@pytest.mark.parametrize("length", [0, 10, 3000])
def test_checkpoint_truncated(refused, run, command, length):
    (run / LAST).write_bytes((run / LAST).read_bytes()[:length])
    contains(refused(command, str(run)), f"{run / LAST}: truncated, damaged, or not a checkpoint of crl")


@COMMANDS
def test_checkpoint_from_another_config(refused, run, command):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("steps: 64", "steps: 96"))
    contains(refused(command, str(run)), [f"{run / LAST}: belongs to another config", "than config.yaml here"])


@pytest.mark.parametrize("content", [b"hello", b"\x80\x05}q.", b"PK\x03\x04", [1, 2], {"format": 99}])
def test_not_a_checkpoint(refused, run, content):
    if isinstance(content, bytes):
        (run / LAST).write_bytes(content)
    else:
        torch.save(content, run / LAST)
    contains(refused("resume", str(run)), [str(run / LAST), "not a checkpoint of crl"])


class Evil:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_checkpoint_that_would_run_code(refused, run, save):
    save({"format": 1, "digest": Evil()}, run / LAST)
    contains(refused("resume", str(run)), "truncated, damaged, or not a checkpoint of crl")
    assert not Path("ran").exists()


def test_resume_of_a_finished_run(refused, run, finished):
    shutil.copy(finished / "manifest.json", run)
    contains(refused("resume", str(run)), f"{run}: this run is finished; there is nothing to resume")


@COMMANDS
def test_no_run_there(refused, command):
    contains(refused(command, "."), ".: no run is here (there is no manifest.json)")


@pytest.mark.parametrize("manifest", ["[]", "{", "{}"])
def test_broken_manifest(refused, run, manifest):
    (run / "manifest.json").write_text(manifest)
    contains(refused("resume", str(run)), str(run / "manifest.json"))


def test_no_checkpoint(refused, run):
    shutil.rmtree(run / "checkpoints")
    contains(refused("eval", str(run)), f"{run}: there is no checkpoint here to go on from")


@pytest.mark.parametrize("visit", [7, -1])
def test_eval_of_a_visit_that_does_not_exist(refused, run, visit):
    said = refused("eval", str(run), "--visit", str(visit))
    contains(said, ["no such checkpoint", "(here are: boundary-00, boundary-01)"])


# A NaN in the loss.

NAN_AGENT = """
import numpy as np

class NanAgent:
    def __init__(self, interface, seed, device):
        self.updates = 0
    def act(self, obs, carry, greedy):
        return np.zeros(len(obs), dtype=int), None, None
    def observe(self, experience):
        self.updates += 1
    def update(self):
        return {"losses/policy": float("nan") if self.updates == 20 else 0.0}
    def state_dict(self):
        return {"updates": self.updates}
    def load_state_dict(self, state):
        self.updates = state["updates"]
"""


def test_nan_of_a_custom_agent(refused):
    Path("nan_agent.py").write_text(NAN_AGENT)
    said = refused(text=config(agent={"use": "nan_agent.NanAgent"}), wrote=True)
    contains(said, ["losses/policy is not finite any more: step 40, visit 1 (CartPole-v1)", "boundary-00.pt"])
    assert Path(said.split()[-1]).is_file()  # the last good checkpoint is there


def test_nan_of_ppo(refused):
    said = refused("--set", "agent.learning_rate=1e30", text=config(), wrote=True)
    contains(said, ["is not finite any more: step 32, visit 1 (CartPole-v1)", "runs/c/ppo/seed-0", "boundary-00.pt"])


def test_what_is_no_mistake(tmp_path, monkeypatch):
    """A name with spaces becomes a folder's, a null part its default, `--set agent=dqn` a whole agent."""
    monkeypatch.chdir(tmp_path)
    Path("my config (1).yaml").write_text(config(agent=None))
    assert main(["train", "--env-seq", "my config (1).yaml", "-q", "--set", "agent=dqn", "--seed", "4294967295"]) == 0
    assert Path("runs/my-config-1/dqn/seed-4294967295/matrix.csv").is_file()
    assert {f.name for f in dataclasses.fields(Experiment)} <= yaml.safe_load(
        Path("runs/my-config-1/dqn/seed-4294967295/config.yaml").read_text()
    ).keys()
