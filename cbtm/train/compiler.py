"""The compiler that PyTorch calls where a model is compiled."""

import os
import shlex
import shutil

from cbtm.errors import ConfigError


def check_compiler(device_type: str) -> None:
    """See that there is one: for a GPU Triton compiles launchers in C, for a CPU PyTorch kernels in C++.

    Args:
        device_type: `cuda` or `cpu`.

    Raises:
        ConfigError: If there is none.
    """
    variable, usual = ("CXX", ("g++",)) if device_type == "cpu" else ("CC", ("gcc", "clang"))
    named = " ".join(shlex.split(os.environ.get(variable, ""))[:1])  # without the options behind it
    if not any(map(shutil.which, (named,) if named else usual)):
        raise ConfigError(
            f"compile=true needs a compiler, and {named or ' or '.join(usual)} is not on the PATH; install one, name "
            f"it in {variable}, or use compile=false"
        )
