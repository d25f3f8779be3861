#!/usr/bin/env bash
# pip 25.3, setuptools 80.9.0, Python 3.11: pip caches the wheel that it built from a source archive, and installs it again
# even if the build would now give a different result: the key of its cache does not include --no-build-isolation.
#
# Take a package that compiles against an installed one (as extensions do against torch), and is built without it if that
# one is missing. The first plain "pip install" builds it without. "pip install --no-build-isolation", which would find
# the other package, installs the cached wheel all the same, with --force-reinstall too. Only --no-cache-dir builds again,
# and the old wheel stays in the cache.
# This holds for a requirement with a name, as from an index or as "demo @ file:...". A path alone (pip install ., or an
# archive) is built again each time.
#
# Output seen, in short (the whole output has a line for each installation):
#   pip install "demo @ file:///demo-1.0.tar.gz"                                            without it
#   pip install --no-build-isolation --force-reinstall "demo @ ..."                         without it
#   pip install --no-build-isolation --no-cache-dir --force-reinstall "demo @ ..."          with it
#
# Exits with an error if the output differs. Takes a minute, and needs the network.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -q pip==25.3
venv/bin/python -m pip install -q setuptools==80.9.0 colorama==0.4.6 # colorama stands for torch
export PIP_CACHE_DIR=$folder/cache PIP_DISABLE_PIP_VERSION_CHECK=1

mkdir demo-1.0
cat > demo-1.0/pyproject.toml <<'END'
[build-system]
requires = ["setuptools==80.9.0"]
build-backend = "setuptools.build_meta"
[project]
name = "demo"
version = "1.0"
END
cat > demo-1.0/setup.py <<'END'
import importlib.util
from setuptools import setup
found = importlib.util.find_spec("colorama") is not None
with open("demo.py", "w") as file:
    file.write(f'HOW = "{"with" if found else "without"} it"\n')
setup(py_modules=["demo"])
END
tar czf demo-1.0.tar.gz demo-1.0

failed=0
expect() { # the result to expect; then what to install, and options
    local expected=$1
    shift
    venv/bin/python -m pip install -q "$@"
    local found
    found=$(venv/bin/python -c 'import demo; print(demo.HOW)')
    printf '%-98s %s\n' "pip install ${*/$folder/}" "$found"
    [ "$found" = "$expected" ] || { echo "  expected: $expected"; failed=1; }
}

venv/bin/python -m pip --version | cut -d' ' -f1-2
named="demo @ file://$folder/demo-1.0.tar.gz"
expect "without it" "$named"
expect "without it" --no-build-isolation --force-reinstall "$named" # here it could have been built with it
expect "with it" --no-build-isolation --no-cache-dir --force-reinstall "$named"
expect "without it" --no-build-isolation --force-reinstall "$named" # not what was installed before
for path in ./demo-1.0.tar.gz ./demo-1.0; do
    expect "without it" "$path"
    expect "with it" --no-build-isolation "$path"
done
exit $failed
