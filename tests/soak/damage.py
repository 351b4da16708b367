"""Damaged and hostile files: each is refused in one line, and nothing of it is run."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import torch

from tests.soak.runs import accepted, command, dice, finished, here, kept, run_of

COMMANDS = (["resume", "{run}", "-q"], ["eval", "{run}", "--episodes", "1"], ["probe", "{run}"])


def _run(number: int, out: Path) -> tuple[Path, Path]:
    """(the case's folder, a run in it that was stopped), copied from one that is made once for each agent."""
    kind = number % 11
    source = out / f"source-{kind}"
    if run_of(source, "runs") is None:
        code, said = here(command(accepted(kind), source, "runs"))
        if code:
            raise RuntimeError(said)
    folder = out / f"damaged-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    run = run_of(folder, "runs")
    assert run is not None
    manifest = run / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished"', '"interrupted"'))
    return folder, run


def _judge(folder: Path, run: Path, target: Path, number: int) -> tuple[str, str]:
    """Every command on it: one line and exit code 2, or no difference at all."""
    before, notes, outcome = target.name, [], "refused"
    for words in COMMANDS:
        code, said = here([word.format(run=run) for word in words])
        if code == 0:
            outcome = "ran"
        elif code != 2 or len(said.splitlines()) != 1 or "Traceback" in said or "crl itself failed" in said:
            shutil.rmtree(folder)
            return "not one line", f"{before}: {' '.join(words)}: {said[-300:]}"
        notes.append(said.strip()[:100])
    if outcome == "ran" and finished(run):
        other = run_of(folder.parent / f"source-{number % 11}", "runs")
        assert other is not None
        if kept(run) != kept(other):
            shutil.rmtree(folder)
            return "silent", f"{before}: it loads, and what comes of it differs"
    shutil.rmtree(folder)
    return outcome, f"{before}: {notes[0] if notes else ''}"


def _target(run: Path, number: int, part: str) -> Path:
    """The last checkpoint mostly; also the log, the matrix, the manifest, another checkpoint."""
    files = [run / name for name in ("metrics.jsonl", "matrix.csv", "manifest.json", "config.yaml")]
    last = max(run.glob("checkpoints/*.pt"))
    return dice(part, number).choice([last] * 8 + [min(run.glob("checkpoints/*.pt")), *files])


def flip_case(number: int, out: Path) -> tuple[str, str]:
    """One bit of one file is another."""
    folder, run = _run(number, out)
    target, chance = _target(run, number, "flip target"), dice("flip", number)
    data = bytearray(target.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    target.write_bytes(data)
    return _judge(folder, run, target, number)


def cut_case(number: int, out: Path) -> tuple[str, str]:
    """A file ends too soon."""
    folder, run = _run(number, out)
    target = _target(run, number, "cut target")
    data = target.read_bytes()
    target.write_bytes(data[: dice("cut", number).randrange(len(data))])
    return _judge(folder, run, target, number)


class _Runs:
    """Unpickled, it runs a program."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.mark,)  # type: ignore[return-value]


def hostile_case(number: int, out: Path) -> tuple[str, str]:
    """A checkpoint that runs code when it is unpickled, in several wrappings; a FIFO and a device in a file's place."""
    folder, run = _run(number, out)
    mark, last = folder / "it ran", max(run.glob("checkpoints/*.pt"))
    kind = number % 4
    if kind == 0:
        last.write_bytes(pickle.dumps(_Runs(mark)))
    elif kind == 1:
        torch.save({"format": 4, "agent": _Runs(mark)}, last)
    elif kind == 2:
        last.unlink()
        last.symlink_to("/dev/null")
    else:
        (run / "config.yaml").write_text(f"name: !!python/object/apply:pathlib.Path.touch ['{mark}']\n")
    code, said = here(["resume", str(run), "-q"])
    ran = mark.exists()
    shutil.rmtree(folder)
    if ran:
        return "it ran", said
    return ("caught", said) if code == 2 and len(said.splitlines()) == 1 else ("not one line", said)
