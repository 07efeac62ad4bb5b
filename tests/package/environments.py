"""Wheel and sdist of this checkout, and environments outside it in which the wheel is installed."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEMPLATE = "Qwen/Qwen2.5-3B"


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and the empty folder where its programs are run."""

    folder: Path
    work: Path

    def run(self, *command: str | Path, code: int = 0) -> subprocess.CompletedProcess:
        """A program of the environment, which must end with ``code``. Neither the checkout nor what
        runs the tests is on its path."""
        variables = outer()
        variables["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        variables["VIRTUAL_ENV"] = str(self.folder)
        variables["XDG_CACHE_HOME"] = str(self.work / "cache")  # of rows that are prepared
        run = subprocess.run(
            [self.folder / "bin" / command[0], *command[1:]],
            cwd=self.work,
            env=variables,
            capture_output=True,
            text=True,
        )
        assert run.returncode == code, f"{command}\n{run.stdout}{run.stderr}"
        return run

    def python(self, program: str) -> str:
        return self.run("python", "-c", program).stdout


def outer() -> dict[str, str]:
    """The variables of this process without those that put the checkout on Python's path."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def build(output: Path) -> tuple[Path, Path]:
    """``(wheel, sdist)``, the wheel made from what the sdist holds."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = output.glob("*.whl")
    (sdist,) = output.glob("*.tar.gz")
    return wheel, sdist


def create(folder: Path, *options: str) -> Environment:
    """An empty virtual environment below ``folder``."""
    environment = Environment(folder / "venv", folder / "work")
    subprocess.run([sys.executable, "-m", "venv", *options, environment.folder], check=True)
    environment.work.mkdir()
    return environment


def installed(wheel: Path, folder: Path, without: str | None = None) -> Environment:
    """The wheel alone in an environment of its own, which finds the packages of the running one
    through a .pth file: all but coati, and but the package ``without``."""
    environment = create(folder, "--without-pip")
    hidden = ("coati", "__editable__", *([without] if without else []))
    packages = folder / "packages"
    packages.mkdir()
    for site in (Path(entry) for entry in sys.path if entry.endswith("-packages")):
        for path in site.iterdir():
            if not path.name.startswith(hidden) and not (packages / path.name).exists():
                (packages / path.name).symlink_to(path)
    (library,) = environment.folder.glob("lib/python3*/site-packages")
    (library / "running.pth").write_text(f"{packages}\n")
    install = [sys.executable, "-m", "pip", "--python", environment.folder / "bin" / "python"]
    install += ["install", "--quiet", "--no-deps", "--no-index", "--ignore-requires-python", wheel]
    subprocess.run(install, check=True, env=outer(), cwd=environment.work)
    return environment


def train(environment: Environment, model: Path, *config: str) -> Path:
    """Two steps of ``coati sft`` on three conversations, with the template TEMPLATE and the flags
    of ``config``; the folder of the run."""
    turns = (("hello", "hello there"), ("how are you", "today"), ("user", "system"))
    rows = [
        {"messages": [{"from": "user", "content": ask}, {"from": "assistant", "content": reply}]}
        for ask, reply in turns
    ]
    data = environment.work / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [
        "coati",
        "sft",
        *config,
        "--pretrain",
        model,
        "--dataset",
        data,
        "--max_length",
        "512",
    ]
    command += ["--max_steps", "2", "--batch_size", "1", "--plugin", "ddp"]
    command += ["--accumulation_steps", "1", "--conversation_template_config", TEMPLATE]
    environment.run(*command, "--save_dir", "out")
    return environment.work / "out"
