# Sourced by demo.sh and test.sh: makes .venv once, installs into it what requirements.txt pins, puts it on the PATH.
# PYTHON=python3.12 chooses the interpreter of a new environment; VENV=DIR its place.

environment() {
    local python="${PYTHON:-python3}" venv="${VENV:-$PWD/.venv}" wanted
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: $python is not Python 3.11 or newer; set PYTHON=/path/to/python" >&2
        return 2
    fi
    if [ ! -x "$venv/bin/python" ] && ! "$python" -m venv "$venv"; then
        rm -rf "$venv"
        echo "error: $python cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2
        return 2
    fi
    wanted=$(cat requirements.txt setup.py | cksum)
    if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into $venv (once; about a minute)" >&2
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt || return
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e . || return
        echo "$wanted" >"$venv/.installed"
    fi
    export PATH="$venv/bin:$PATH"
}
