# shellcheck shell=bash
# Sourced by the scripts beside it: prepare_environment finds or makes the Python environment and
# leaves its interpreter in $PY. In this order:
#   1. $PYTHON, if set: an environment that has everything is used as it stands, a virtual or conda
#      environment gets what it lacks, and from a plain interpreter .venv is made;
#   2. the active virtual or conda environment, in the same way (conda's base counts as plain);
#   3. .venv, made with the first of python3, python3.12, python3.11, python3.13 that will do.
# Running it again costs under a second: a stamp in .venv names what was installed.

unset CDPATH # with it `cd` prints where it went
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LOCK=$ROOT/requirements.lock
VENV=$ROOT/.venv
# The scripts work in the checkout; a relative path was meant from where they were called.
[[ ${PYTHON:-} != */* || $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON

say() { printf '== %s\n' "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

python_in_range() { # $1: interpreter; ≥ 3.11, and ≤ 3.13 unless it was asked for by name
    "$1" -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, ${2:-13}))" 2>/dev/null
}

is_environment() { # a virtual or conda environment, as against a plain interpreter
    "$1" -c 'import os, sys
conda = os.path.isdir(os.path.join(sys.prefix, "conda-meta"))
base = conda and os.environ.get("CONDA_DEFAULT_ENV", "base") == "base"
sys.exit(base or not (conda or sys.prefix != sys.base_prefix))'
}

choose_python() { # prints the interpreter of rule 1, 2 or 3
    local candidate found
    if [[ -n ${PYTHON:-} ]]; then
        found=$(command -v "$PYTHON") || die "PYTHON=$PYTHON is not a command"
        python_in_range "$found" 99 ||
            die "PYTHON=$PYTHON is $("$found" -V 2>&1), and 3.11 or newer is needed"
        echo "$found"
        return
    fi
    for candidate in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        if [[ -n $candidate && -x $candidate/bin/python ]]; then
            python_in_range "$candidate/bin/python" 99 ||
                die "the active environment $candidate has $("$candidate/bin/python" -V 2>&1)," \
                    "and 3.11 or newer is needed: deactivate it, or set PYTHON=…"
            echo "$candidate/bin/python"
            return
        fi
    done
    for candidate in python3 python3.12 python3.11 python3.13; do
        if found=$(command -v "$candidate") && python_in_range "$found"; then
            echo "$found"
            return
        fi
    done
    found=$(command -v python3 >/dev/null && python3 -V || echo missing)
    die "no Python 3.11, 3.12 or 3.13 on the PATH (python3: $found). Install one (Debian, Ubuntu:" \
        "apt-get install python3.12 python3.12-venv; or pyenv, conda) or set PYTHON=/path/to/python"
}

install_into() { # $1: interpreter, $2: extras
    "$1" -m pip --version >/dev/null 2>&1 || "$1" -m ensurepip >/dev/null ||
        die "$1 has no pip: install it (python -m ensurepip), then run this again"
    # setuptools comes from the lock too, so that the build needs no second download
    if ! { "$1" -m pip install --quiet -c "$LOCK" --upgrade pip setuptools wheel &&
        "$1" -m pip install --progress-bar off -c "$LOCK" --no-build-isolation \
            --editable "${ROOT}${2:+[$2]}"; }; then
        die "the installation did not finish; pip keeps what was downloaded, so run this again"
    fi
}

room_for() { # $1: what takes room, $2: GB, $3: folder
    local free
    free=$(df -Pk "$3" | awk 'NR == 2 { print int($4 / 1e6) }')
    ((free >= $2)) || die "$3 has $free GB free and $1 about $2 GB"
}

make_venv() { # $1: interpreter, $2: extras, $3: GB
    local stamp wanted
    stamp=$VENV/installed-${2//,/-}
    wanted=$("$1" - "$ROOT" "$2" "$ROOT/setup.py" "$LOCK" <<'PY'
import hashlib, sys
digest = hashlib.sha256(repr((sys.version_info[:2], sys.argv[1:3])).encode())
for path in sys.argv[3:]:
    digest.update(open(path, "rb").read())
print(digest.hexdigest())
PY
    )
    PY=$VENV/bin/python
    if [[ -x $PY && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        say "environment: .venv ($("$PY" -V)), unchanged"
        return
    fi
    # the standard library names a missing part only after half an environment was made
    "$1" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$1 cannot make environments: on Debian and Ubuntu," \
            "apt-get install python$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    [[ -x $PY ]] || room_for "the environment takes" "$3" "$ROOT"
    say "environment: installing into .venv ($("$1" -V)). The first time this downloads PyTorch with"
    say "its CUDA libraries: about $3 GB on disk and some minutes. Later runs skip it."
    rm -f "$stamp"
    if [[ ! -x $PY ]] || ! cmp -s <("$PY" -V 2>&1) <("$1" -V 2>&1); then
        "$1" -m venv --clear "$VENV"
    fi
    install_into "$PY" "$2"
    printf '%s\n' "$wanted" >"$stamp"
}

prepare_environment() { # $1: extras, comma-separated; $2: GB that a fresh environment takes
    local chosen missing names
    IFS=, read -r -a names <<<"$1"
    chosen=$(choose_python) || exit 1
    chosen=$("$chosen" -c 'import sys; print(sys.executable)') # absolute, and not a pyenv shim
    # an active .venv is rule 3, not rule 2
    if [[ $chosen == "$VENV"/* ]]; then
        chosen=$("$chosen" -c 'import sys; print(sys._base_executable)')
    elif missing=$("$chosen" "$ROOT/launch/missing.py" "${names[@]+"${names[@]}"}"); then
        PY=$chosen
        say "environment: $PY ($("$PY" -V)), which has everything"
        return
    elif is_environment "$chosen"; then
        PY=$chosen
        say "environment: $PY ($("$PY" -V)) lacks ${missing//$'\n'/, }: installing"
        install_into "$PY" "$1"
        return
    fi
    make_venv "$chosen" "$1" "$2"
}
