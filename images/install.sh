#!/bin/sh
# Install into the virtual environment of the image: from images/wheels alone where it holds wheels, otherwise from pip's
# index. The secrets `ca` (a bundle of certificates) and `pip.conf` are there for networks that need them, and stay in
# no layer.
set -eu
if ls /wheels/*.whl >/dev/null 2>&1; then
    set -- --no-index --find-links /wheels "$@"
fi
if [ -f /run/secrets/ca ]; then
    export PIP_CERT=/run/secrets/ca
fi
exec /opt/venv/bin/pip install --no-cache-dir --no-compile --disable-pip-version-check --constraint constraints.txt "$@"
