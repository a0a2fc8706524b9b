"""What holds inside of an image; run in it by `images/smoke`. Exits with a message at the first thing that does not."""

import getpass
import importlib
import os
import pkgutil
import resource
import shutil
import subprocess
import sys
from pathlib import Path

HELP_SECONDS = 1.0
IMPORT_SECONDS = 0.1
ABSENT = ("gcc", "cc", "c++", "ld", "make", "pip", "pip3", "git")
HEAVY = (
    "torch",
    "transformers",
    "fairscale",
    "kfp.dsl.executor_main",
    "mlflow",
    "pyarrow.parquet",
    "matplotlib.pyplot",
)


def check(holds: bool, what: str) -> None:
    """End with `what` unless it holds."""
    if not holds:
        sys.exit(f"smoke: {what}")


def fastest(command: list[str]) -> float:
    """Seconds of the fastest of three runs, on the cores: a busy machine is not the image's fault."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def check_user() -> None:
    """Any user of group 0 has a name and places to write, and cannot change what is installed."""
    check(os.getuid() != 0, "runs as root")
    check(bool(getpass.getuser()), "the user has no name")
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR"):
        folder = Path(os.environ[name])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "probe").write_text("")
    check(not os.access(sys.prefix, os.W_OK), f"{sys.prefix} can be written")


def check_contents() -> None:
    """Nothing that builds, nothing that was only there to build, every module of cbtm, bytecode for it."""
    found = [name for name in ABSENT if shutil.which(name)]
    check(not found, f"{found} are in the image")
    left = [path for path in ("/src", "/wheels", "/run/secrets", "/etc/pip.conf") if os.path.exists(path)]
    check(not left, f"{left} are left from the build")
    for name in HEAVY:
        importlib.import_module(name)
    import cbtm

    for module in pkgutil.walk_packages(cbtm.__path__, "cbtm."):
        importlib.import_module(module.name)
    check(Path(cbtm.__path__[0], "compiled/cbtm.yaml").is_file(), "the compiled pipeline is not in the image")
    check(any(Path(cbtm.__path__[0], "__pycache__").iterdir()), "cbtm has no bytecode")


def check_speed() -> None:
    """How long a start takes."""
    help_seconds = fastest(["cbtm", "--help"])
    check(help_seconds < HELP_SECONDS, f"cbtm --help takes {help_seconds:.2f} s; at most {HELP_SECONDS} s")
    timed = "import time; began = time.process_time(); import cbtm; print(time.process_time() - began)"
    seconds = float(subprocess.run([sys.executable, "-c", timed], check=True, capture_output=True).stdout)
    check(seconds < IMPORT_SECONDS, f"import cbtm takes {seconds:.2f} s; at most {IMPORT_SECONDS} s")
    sys.stdout.write(f"help_seconds={help_seconds:.2f} import_seconds={seconds:.4f}\n")


if __name__ == "__main__":
    check_user()
    check_contents()
    check_speed()
