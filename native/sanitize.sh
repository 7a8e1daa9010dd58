#!/usr/bin/env bash
# Runs the native code under a sanitizer: native/sanitize.sh address|thread. Needs g++ and the .venv of `make`.
# Builds into build/sanitize-address or build/sanitize-thread; the normal build is not touched.
#
# thread:  thread_test.cpp under ThreadSanitizer. The Python tests cannot run under it: torch's OpenMP runtime is not
#          instrumented, so ThreadSanitizer does not see that a loop ends before the next one, and reports a race.
# address: thread_test.cpp, then tests/test_native.py and tests/test_datasets_statistics.py, under AddressSanitizer and UndefinedBehaviorSanitizer.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
  address) sanitize="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined" ;;
  thread) sanitize="-fsanitize=thread" ;;
  *) echo "usage: native/sanitize.sh address|thread" >&2; exit 2 ;;
esac
folder="build/sanitize-$1"
flags="-g -O1 -fno-omit-frame-pointer $sanitize"
compile="${CXX:-g++} -std=gnu++20 -fno-math-errno -fno-trapping-math -Wno-psabi $flags"
mkdir -p "$folder"

# reads the instruction sets and their options from CMakeLists.txt
objects=() defines=()
while read -r isa options; do
  if [[ $isa != portable ]]; then
    [[ $(uname -m) == x86_64 ]] || continue
    defines=(-DBATCHNORM_X86)
  fi
  $compile "-DISA=$isa" $options -c native/arithmetic.cpp -o "$folder/$isa.o"
  objects+=("$folder/$isa.o")
done < <(sed -nE 's/^ *add_arithmetic\(([a-z0-9]+) *(.*)\)$/\1 \2/p' CMakeLists.txt)
$compile "${defines[@]}" native/thread_test.cpp "${objects[@]}" -pthread -o "$folder/thread_test"

export UBSAN_OPTIONS=print_stacktrace=1
# setarch -R turns address randomization off: older runtimes of ThreadSanitizer do not start with it
TSAN_OPTIONS=halt_on_error=0 setarch -R "$folder/thread_test"
[[ $1 == address ]] || exit 0

# cmake adds -O3 for the arithmetic after these flags: the Python tests run the users' code, with the sanitizer's checks
.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target "$folder/site" \
  -C "build-dir=$folder/cmake" -C install.strip=false -C "cmake.define.CMAKE_CXX_FLAGS=$flags" .
# after a failed build the package has no native module, and every test would be skipped
test -f "$folder/site/batchnorm/_native.abi3.so"
# removes the finder of an editable install, which would find another `batchnorm` first, in child processes too
cat >"$folder/site/sitecustomize.py" <<'PYTHON'
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
PYTHON
library() { "${CXX:-g++}" -print-file-name="$1"; }
# Python is not instrumented, so the sanitizers' runtimes are preloaded, with libstdc++, whose exceptions they intercept.
# Python and torch keep memory until they exit, so leaks are not reported; accesses outside of memory blocks are.
LD_PRELOAD="$(library libasan.so) $(library libubsan.so) $(library libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$folder/site" PYTHONDONTWRITEBYTECODE=1 \
  .venv/bin/python -m pytest -q -p no:cacheprovider tests/test_native.py tests/test_datasets_statistics.py
