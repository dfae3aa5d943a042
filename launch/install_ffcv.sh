#!/usr/bin/env bash
# Install FFCV into $PYTHON's environment, or that of launch/_env.sh: its system libraries through
# apt-get where this may be done (root, or sudo without a password), then the package, compiled here.
# Otherwise say what is lacking and how to get it. Exit status 3: FFCV is not installed.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called as `sh …`
set -euo pipefail
# shellcheck source=launch/_env.sh
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$ROOT"

FFCV=ffcv==1.0.2
packages=(pkg-config g++ libturbojpeg0-dev libopencv-dev)

lacking() { # prints the Debian packages whose content is missing
    command -v pkg-config >/dev/null || echo pkg-config
    command -v g++ >/dev/null || echo g++
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
}

loads() { # the compiled part alone: importing all of ffcv takes seconds
    "$PY" - 2>/dev/null <<'PY'
import ctypes
import importlib.util
from pathlib import Path

for library in list(Path(importlib.util.find_spec("ffcv").origin).parent.glob("_libffcv*.so")) or 1:
    ctypes.CDLL(str(library))
PY
}

PY=${PYTHON:-}
if [[ -n $PY ]]; then
    PY=$(command -v "$PY") || die "PYTHON=$PYTHON is not a command"
else
    prepare_environment "" 6
fi
if loads; then
    say "FFCV $("$PY" -c 'from importlib.metadata import version; print(version("ffcv"))') is installed"
    exit 0
fi
if [[ $(uname -s) != Linux ]]; then
    say "FFCV: this script knows Linux only"
    exit 3
fi

mapfile -t missing < <(lacking)
if ((${#missing[@]})); then
    root=()
    if ((EUID != 0)); then
        root=(sudo -n)
        sudo -n true 2>/dev/null || root=()
    fi
    if ! command -v apt-get >/dev/null || { ((EUID != 0)) && ((${#root[@]} == 0)); }; then
        say "FFCV needs system libraries that cannot be installed from here: ${missing[*]}"
        say "have them installed (apt-get install ${packages[*]}, or your system's own names) and run this again"
        exit 3
    fi
    say "FFCV: apt-get install ${missing[*]} (about 41 MB to download on Debian 12)"
    if ! { "${root[@]}" apt-get update -qq &&
        "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
            --no-install-recommends "${missing[@]}" </dev/null >/dev/null; }; then
        say "FFCV: apt-get could not install ${missing[*]}"
        exit 3
    fi
fi

say "FFCV: compiling $FFCV"
# no isolation: its setup.py is built with the setuptools of the lock, not with the newest
if ! "$PY" -m pip install --quiet -c "$LOCK" --no-build-isolation "$FFCV"; then
    say "FFCV: $FFCV could not be compiled for $("$PY" -V)"
    exit 3
fi
if ! reason=$("$PY" -c 'import ffcv' 2>&1); then
    say "FFCV: $FFCV was installed and cannot be imported: $(tail -1 <<<"$reason")"
    exit 3
fi
say "FFCV: installed"
