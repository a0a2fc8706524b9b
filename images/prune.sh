#!/bin/sh
# Take out of the virtual environment $1 what no stage reads (pip, headers, the tests that packages ship: a sixth of its
# size), then compile the rest: the user of the image cannot write bytecode, and without it every start takes seconds.
# Packages are named, so that nobody's package called "tests" goes by accident.
set -eu
site=$(echo "$1"/lib/python3.*/site-packages)
rm -rf "$site"/pip "$site"/pip-*.dist-info "$1"/bin/pip* "$1"/bin/[Aa]ctivate*
rm -rf "$site"/torch/test "$site"/torch/include "$site"/pyarrow/include "$site"/pyarrow/src
# torch_shm_manager is started by torch itself; the others are protoc and tests in C++.
find "$site"/torch/bin -type f ! -name torch_shm_manager -delete
for package in matplotlib networkx numpy pyarrow scipy sklearn sympy; do
    find "$site/$package" -type d -name tests -prune -exec rm -rf {} +
done
# Some packages ship templates that are no valid Python, which compileall reports: what matters is imported in smoke.
"$1"/bin/python -m compileall -q -j 0 "$site" >/dev/null || true
