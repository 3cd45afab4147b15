# Sourced by the other scripts: makes .venv in the project folder and installs the project with tested versions.
# usage: make_environment [EXTRA]     e.g. make_environment test
make_environment() {
    local extra="${1:-}"
    local python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { echo "Python 3.10 or newer is needed; set PYTHON to one" >&2; return 1; }
    [ -x .venv/bin/pip ] || "$python" -m venv .venv
    local wanted stamp=".venv/.installed${extra:+-$extra}"
    wanted=$(cat pyproject.toml scripts/constraints.txt | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into .venv (the first time takes a few minutes)"
        # torch first and pinned: the newest build would pull gigabytes of GPU libraries where there is no GPU.
        # What is imported gets compiled then; compiling all of torch and transformers took as long as installing it.
        local install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile)
        "${install[@]}" -c scripts/constraints.txt torch
        "${install[@]}" -c scripts/constraints.txt -e ".${extra:+[$extra]}"
        echo "$wanted" >"$stamp"
    fi
}
