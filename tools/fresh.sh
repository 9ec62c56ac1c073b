#!/usr/bin/env bash
# What a new user gets: `make demo` (a few rows, to the end), and `pip install .` with the session of the README.
# Each from a clone of HEAD, in a new environment that holds what we declare and nothing else, with empty caches.
# Of this machine it uses Python, make, git, and pip's settings and cache (or every run would download torch).
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3}  # the Makefile's too

root=$(mktemp -d "${TMPDIR:-/tmp}/trimtab-fresh.XXXXXX")
trap 'rm -rf "$root"' EXIT
PIP_CACHE_DIR=${PIP_CACHE_DIR:-$("$PYTHON" -m pip cache dir)}
export PIP_CACHE_DIR XDG_CACHE_HOME=$root/cache TRIMTAB_CACHE=$root/cache/trimtab HF_HOME=$root/cache/huggingface
export TORCH_HOME=$root/cache/torch MPLCONFIGDIR=$root/cache/matplotlib PYTHONNOUSERSITE=1
unset VIRTUAL_ENV PYTHONPATH PYTHONHOME MAKEFLAGS MAKELEVEL
git clone --quiet . "$root/clone"

step() { printf '== fresh, %s s: %s\n' "$SECONDS" "$*"; }

step "make demo"
make -C "$root/clone" --no-print-directory demo ARGS="--rows 8 --epochs 1"
test -f "$root/clone/runs/demo/adapter/adapter_model.safetensors"
test -f "$TRIMTAB_CACHE/smollm2-135m-instruct/config.json"  # made now, not found
rm -rf "$root/clone/.venv-demo" "$root/clone/runs" "$root/cache"

step "pip install ."
plain=$root/plain
"$PYTHON" -m venv "$plain"
pip() { "$plain/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt "$@"; }
pip "$(grep '^torch==' constraints.txt)"  # first and pinned, as in the Makefile
pip "$root/clone"

step "the session of the README"
mkdir "$root/work"
sed -n '/^```python$/,/^```$/p' README.md | sed '/^```/d' >"$root/work/session.py"
cd "$root/work"
"$plain/bin/python" session.py
test -f adapter/adapter_model.safetensors

step "every module, without the extras"
"$plain/bin/python" - <<'EOF'
import importlib, pkgutil
import trimtab

for module in pkgutil.walk_packages(trimtab.__path__, "trimtab."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
EOF
"$plain/bin/trimtab" methods >/dev/null
if said=$("$plain/bin/trimtab" demo 2>&1); then
  echo "trimtab demo ran without its extra"; exit 1
fi
grep -F "pip install 'trimtab[demo]'" <<<"$said"
test ! -e "$root/cache/trimtab"  # it said so before it fetched anything
step "done"
