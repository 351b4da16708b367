"""The commands. No logic: each reads its arguments, calls one function, and shows what it returned."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from crl.core import INSTALLED_ONLY, CrlError, printable
from crl.failing import Failed, culprit, failed
from crl.stopping import interruptible

STUDIES = (
    "critic_scale",
    "plasticity",
    "forgetting",
    "split_mnist",
    "split_cifar100",
    "collapse_mnist",
    "permuted_mnist",
    "minigrid_fast",
    "slippery_ant",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Whatever goes wrong costs one line on stderr and an exit code that is not 0.

    2: a mistake, or a part that failed (`-v` shows its traceback); 130: ended at once by Ctrl-C; 141: nobody reads.
    """
    _open_streams()
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown and not hasattr(arguments, "options"):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.options = unknown
    command: Callable[[argparse.Namespace], int] = arguments.command
    before = os.environ.get(INSTALLED_ONLY)
    if arguments.installed_only:
        os.environ[INSTALLED_ONLY] = "1"
    try:
        with interruptible():
            code = command(arguments)
            _open_streams()  # a part may have closed them
            sys.stdout.flush()
            return code
    except KeyboardInterrupt as error:
        return _say(f"stopped at once{f'; {error}' if str(error) else ''}", 130)
    except BrokenPipeError as error:
        if culprit(error):
            return _failed(error, arguments)
        return 141
    except (Exception, SystemExit) as error:
        return _failed(error, arguments)
    finally:
        if before is None:
            os.environ.pop(INSTALLED_ONLY, None)
        _let_go()


def _failed(error: BaseException, arguments: argparse.Namespace) -> int:
    if isinstance(error, OSError) and not culprit(error):  # the disk is full, or a file is where a folder should be
        return _say(f"{error.filename or 'a file'}: {error.strerror or error}", 2)
    if isinstance(error, CrlError) and not isinstance(error, Failed):
        return _say(str(error), 2)
    told, loud = failed(error), getattr(arguments, "verbosity", 0) > 0
    if loud and told.trace:
        print(told.trace, file=sys.stderr)
    return _say(f"{told}{'' if loud or not told.trace or 'error.log' in str(told) else _how_to_see(arguments)}", 2)


def _how_to_see(arguments: argparse.Namespace) -> str:
    return "; -v shows its traceback" if hasattr(arguments, "verbosity") else ""


def _show(text: object, done: str = "") -> None:
    """The last thing that a command does: where it cannot be read, all else is done."""
    _open_streams()
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CrlError(f"stdout: cannot be written: {error.strerror}{f'; {done}' if done else ''}") from None


def _say(line: str, code: int) -> int:
    _open_streams()
    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(f"crl: {printable(' '.join(line.split()))}", file=sys.stderr)
    return code


def _let_go() -> None:
    """What nobody reads any more is dropped here: the interpreter would complain of it at its end."""
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_streams() -> None:
    """Streams that were closed are as good as /dev/null, and characters that a stream cannot show are replaced.

    A closed one would otherwise be the number of the next file that is opened, a checkpoint perhaps.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
    for name in ("stdout", "stderr"):
        there = [stream for stream in (getattr(sys, name), getattr(sys, f"__{name}__")) if not _closed(stream)]
        stream = there[0] if there else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "replace":  # it would be flushed
            stream.reconfigure(errors="replace")


def _closed(stream: Any) -> bool:
    return stream is None or bool(getattr(stream, "closed", False))


class _Parser(argparse.ArgumentParser):
    """A mistake on the command line costs one line too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def _train(arguments: argparse.Namespace) -> int:
    from crl import config, run, seeds

    if arguments.data is not None and arguments.env_seq:
        raise CrlError("--data names the dataset of a --data-seq; environments have none")
    source, changes = arguments.env_seq or arguments.data_seq, tuple(_changes(arguments))
    stream = bool(config.read(source, changes).stream)
    if stream != bool(arguments.data_seq):
        other = "slices of a dataset: say --data-seq" if stream else "environments: say --env-seq"
        raise CrlError(f"{source} is a sequence of {other}")
    if arguments.jobs is not None and arguments.seeds is None:
        raise CrlError("--jobs says how many seeds run at once, so it needs --seeds")
    how = {name: getattr(arguments, name) for name in ("out", "overwrite", "verbosity")}
    if arguments.seeds is None:
        done = run.train(source, **how, go_on=arguments.go_on, changes=changes)
        if arguments.verbosity >= 0:
            _show(done.path, f"the run is finished: {done.path}")
        return 0
    several = seeds.train_seeds(source, arguments.seeds, jobs=arguments.jobs, **how, changes=changes)
    if arguments.verbosity >= 0:
        _show(several.table())
    for seed, why in several.failed.items():
        print(f"crl: seed {seed} failed: {why}", file=sys.stderr)
    return 2 if several.failed else 0


def _resume(arguments: argparse.Namespace) -> int:
    from crl import run

    path = run.resume(arguments.run, verbosity=arguments.verbosity).path
    _show(path, f"the run is finished: {path}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from crl import plan

    _show(plan.describe(arguments.config, tuple(_changes(arguments)), arguments.deep))
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from crl import plan

    _show(plan.evaluate(arguments.run, arguments.visit, arguments.episodes, arguments.greedy, arguments.render))
    return 0


def _probe(arguments: argparse.Namespace) -> int:
    from crl import probe
    from crl.terminal import Terminal

    terminal, options = Terminal(visits=1, total_steps=1), _options(arguments.options)
    try:
        seen = probe.probe(
            arguments.run, arguments.visit, arguments.phase, arguments.monitor or (), options, terminal.doing
        )
    finally:
        terminal.close()
    _show(seen.json() if arguments.json else seen.table())
    return 0


def _options(words: Sequence[str]) -> dict[str, Any]:
    """`--probes 20 --samples 4096`: options of a monitor, which only the monitor knows."""
    from crl import config

    options: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name or (not equals and not rest):
            raise CrlError(f"{word}: expected an option of the monitor and its value, such as --probes 20")
        options[name.replace("-", "_")] = config.parse_yaml(text if equals else rest.pop(0), word)
    return options


def _data_status(arguments: argparse.Namespace) -> int:
    _show("\n".join(_fetching().status()))
    return 0


def _data_fetch(arguments: argparse.Namespace) -> int:
    _fetching().fetch(arguments.name)
    return 0


def _data_import(arguments: argparse.Namespace) -> int:
    _fetching().import_files(arguments.name, arguments.path)
    return 0


def _fetching() -> Any:
    import importlib

    return importlib.import_module("envs.fetching")


def _correlate(arguments: argparse.Namespace) -> int:
    from crl import correlate

    _show(correlate.correlate(arguments.runs, arguments.out, arguments.resamples, arguments.within).table())
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from crl import plan

    _show("\n".join(plan.listing(arguments.what)))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    import importlib

    timed = () if arguments.what == "coverage" else ("pairs", "steps")
    names = ("seeds", "out", "jobs") if arguments.what in STUDIES else timed
    asked = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.what in STUDIES:
        bench = importlib.import_module("crl.bench.study")
        study = importlib.import_module("crl.bench.studies").STUDIES[arguments.what]()
        asked |= {"name": arguments.what, "study": study}
    else:
        bench = importlib.import_module(f"crl.bench.{arguments.what}")
    _show(bench.main(**asked, as_json=arguments.json))
    return 0


def _changes(arguments: argparse.Namespace) -> list[tuple[str, Any]]:
    """What the flags change in the YAML, in order: named flags first, so that --set has the last word."""
    from crl import config

    changes: list[tuple[str, Any]] = []
    if arguments.data is not None:
        changes.append(("stream.data", arguments.data))
    if arguments.agent is not None:
        changes.append(("agent", {"use": arguments.agent}))
    if arguments.method:
        changes.append(("methods", [{"use": use} for use in arguments.method]))
    if arguments.monitor:
        changes.append(("monitors", [{"use": use} for use in arguments.monitor if use != "none"]))
    if arguments.engine is not None:
        changes.append(("engine.kind", arguments.engine))
    changes += [(k, v) for k in ("seed", "device", "baseline") if (v := getattr(arguments, k)) is not None]
    for item in arguments.set or []:
        place, equals, text = item.partition("=")
        if not equals or not place:
            raise CrlError(f"--set {item}: expected PLACE=VALUE, such as tasks.0.steps=20000")
        changes.append((place, config.parse_yaml(text, f"--set {place}")))
    return changes


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="crl", description="Continual reinforcement learning that looks inside.")
    parser.add_argument(
        "--installed-only",
        action="store_true",
        help="before the command: import no file that is not of an installed package (for a stranger's config or run)",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_walking, _looking, _data, _benches):
        add(commands)
    return parser


def _walking(commands: Any) -> None:
    """The commands that walk."""
    train = commands.add_parser("train", help="walk an agent through environments, or through slices of a dataset")
    what = train.add_mutually_exclusive_group(required=True)
    what.add_argument("--env-seq", metavar="YAML", help="environments: a file, or the name of a shipped config")
    what.add_argument("--data-seq", metavar="YAML", help="slices of a dataset: a file, or the name of a shipped config")
    train.add_argument("--out", default="runs", help="where runs go (default: runs)")
    there = train.add_mutually_exclusive_group()
    there.add_argument("--overwrite", action="store_true", help="drop the run that is there already")
    there.add_argument(
        "--continue", dest="go_on", action="store_true", help="go on with the run that is there already, if one is"
    )
    train.add_argument("--seeds", type=int, metavar="N", help="walk with N seeds, from --seed on, and sum them up")
    train.add_argument("--jobs", type=int, help="seeds at once (default: as many as there are cores for their threads)")
    _settings(train)
    _loudness(train)
    train.set_defaults(command=_train)

    resume = commands.add_parser("resume", help="go on with a run that was stopped or killed")
    resume.add_argument("run", help="a run's folder, such as runs/minigrid/ppo/seed-0")
    _loudness(resume)
    resume.set_defaults(command=_resume)

    check = commands.add_parser("check", help="validate a config and print its plan; trains nothing")
    check.add_argument("config", help="a file, or the name of a shipped config")
    check.add_argument("--deep", action="store_true", help="also step every environment: does it come back exactly?")
    _settings(check)
    check.set_defaults(command=_check)


def _looking(commands: Any) -> None:
    """The commands that look at runs, and at what there is."""
    evaluate = commands.add_parser("eval", help="evaluate a checkpoint on every task")
    evaluate.add_argument("run", help="a run's folder")
    evaluate.add_argument("--visit", type=int, help="after which visit (0: before the first; default: the last)")
    evaluate.add_argument("--episodes", type=int, help="episodes a task (default: the config's)")
    evaluate.add_argument("--greedy", action="store_true", help="the likeliest action instead of a sampled one")
    evaluate.add_argument("--render", metavar="OUT.gif", help="write a film of one episode of each task")
    evaluate.set_defaults(command=_eval)

    probe = commands.add_parser("probe", help="look inside a checkpoint, as the run did or otherwise")
    probe.add_argument("run", help="a run's folder")
    probe.add_argument("--visit", type=int, help="which visit (default: the last that was finished)")
    probe.add_argument("--phase", choices=("init", "end"), default="init", help="before the visit or after it")
    probe.add_argument("--monitor", action="append", help="hessian, erank, ... (default: the run's own)")
    probe.add_argument("--json", action="store_true", help="print JSON, the spectra whole")
    probe.set_defaults(command=_probe, options=[])

    correlate = commands.add_parser("correlate", help="does collapse go with forgetting, or with what is learned next?")
    correlate.add_argument("runs", nargs="+", metavar="RUN", help="runs' folders, or folders that hold such")
    correlate.add_argument("--out", default="correlation", help="where tables and figures go (default: correlation)")
    correlate.add_argument("--resamples", type=int, default=2000, help="of the bootstrap intervals (default: 2000)")
    correlate.add_argument("--within", action="store_true", help="take each run's own mean from its numbers first")
    correlate.set_defaults(command=_correlate)

    listing = commands.add_parser("list", help="what there is: agents, configs, envs, methods, monitors, nets, streams")
    listing.add_argument("what", choices=("agents", "configs", "envs", "methods", "monitors", "nets", "streams"))
    listing.set_defaults(command=_list)


def _data(commands: Any) -> None:
    """The datasets."""
    data = commands.add_parser("data", help="the datasets: what is here, download, take files that you have")
    verbs = data.add_subparsers(required=True, metavar="VERB")
    verbs.add_parser("status", help="which are here, and where").set_defaults(command=_data_status)
    fetch = verbs.add_parser("fetch", help="download one, checked by its official checksums; goes on where it stopped")
    fetch.add_argument("name", help="mnist, fashion_mnist, cifar10, cifar100")
    fetch.set_defaults(command=_data_fetch)
    take = verbs.add_parser("import", help="take files that you have, checked in the same way")
    take.add_argument("name", help="mnist, fashion_mnist, cifar10, cifar100")
    take.add_argument("path", help="an archive, or the folder that holds the files")
    take.set_defaults(command=_data_import)


def _benches(commands: Any) -> None:
    """Benchmarks and studies."""
    bench = commands.add_parser("bench", help="side-by-side benchmarks, studies of the methods, what intervals hold")
    bench.add_argument("what", choices=("rl", "curvature", "methods", "supervised", "coverage", *STUDIES))
    bench.add_argument("--pairs", type=int, help="how often each side runs (default: the bench's own)")
    bench.add_argument("--steps", type=int, help="environment steps of each run (default: the bench's own)")
    bench.add_argument("--seeds", type=int, help="of a study: runs of each method (default: 5)")
    bench.add_argument("--out", help="of a study: where its runs go (default: runs/study)")
    bench.add_argument("--jobs", type=int, help="of a study: runs at once (default: as many as there are cores)")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.set_defaults(command=_bench)


def _settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="of a --data-seq: mnist, cifar100, shapes (built in), a folder, an import path")
    parser.add_argument("--agent", help="ppo, dqn, or an import path such as stable_baselines3.A2C or my_agent.MyAgent")
    parser.add_argument("--method", action="append", help="l2_er, ewc, ... or an import path; may be given again")
    parser.add_argument("--monitor", action="append", help="instead of the config's monitors; or none")
    parser.add_argument(
        "--engine", choices=("sync", "async", "envpool"), help="how environments are stepped (default: sync)"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N")
    choices = ("none", "fresh", "fresh_with_methods")
    parser.add_argument("--baseline", choices=choices, help="fresh: also a new agent alone on each task, no methods")
    parser.add_argument(
        "--set", action="append", metavar="PLACE=VALUE", help="any key of the YAML: tasks.0.steps=20000"
    )


def _loudness(parser: argparse.ArgumentParser) -> None:
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-q", dest="verbosity", action="store_const", const=-1, default=0, help="say nothing")
    loudness.add_argument("-v", dest="verbosity", action="store_const", const=1, help="print every number")
