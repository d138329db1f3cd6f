# One point of a sweep, on one of the hosts that run it: fetches the sweep's sources and
# checks them, installs what they need, and runs the point unless it has ended.
#
#   job --code=URL --sha256=DIGEST --requirements=FILE,FILE --python=3.11 --workdir=WORKDIR
#       --processes=one|auto|skypilot [--interpreter=PATH] [--cache=DIR] -- train.py ...
#
# It leaves with the exit code of train.py, but with 0 where that is 3: a point that
# diverged has ended. --interpreter names a Python that has all it needs already.
code_url='' sha256='' requirements='' version='' workdir='' processes='' interpreter=''
cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/gated/jobs

while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --code=*) code_url=${1#*=} ;;
    --sha256=*) sha256=${1#*=} ;;
    --requirements=*) requirements=${1#*=} ;;
    --python=*) version=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --processes=*) processes=${1#*=} ;;
    --interpreter=*) interpreter=${1#*=} ;;
    --cache=*) cache=${1#*=} ;;
    *) echo "job: $1 is not known" >&2; exit 2 ;;
  esac
  shift
done
shift
point=("$@")

hand_on() { kill -TERM "$1" 2>/dev/null || true; }

# A Python that the sources take, the sweep's own version first; '' where there is none.
find_python() {
  local name
  for name in "python$version" python3.12 python3.11 python3; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
      2>/dev/null; then
      command -v "$name"
      return
    fi
  done
}

# fetch URL FILE
fetch() {
  local package tool
  case $1 in
    gs://*)
      package=gcsfs
      if command -v gcloud >/dev/null; then
        gcloud storage cp --quiet "$1" "$2"
        return
      fi
      ;;
    s3://*)
      package=s3fs
      if command -v aws >/dev/null; then
        aws s3 cp --only-show-errors "$1" "$2"
        return
      fi
      ;;
    *)
      cp -- "$1" "$2"
      return
      ;;
  esac
  tool=$cache/fetch-$package
  if [[ ! -e $tool/made ]]; then
    make_environment "$tool"
    "$tool/bin/python" -m pip install --quiet --disable-pip-version-check "$package"
    : >"$tool/made"
  fi
  "$tool/bin/python" -c 'import fsspec, sys; url, file = sys.argv[1:]
fsspec.filesystem(url.partition(":")[0]).get_file(url, file)' "$1" "$2"
}

# A virtual environment; where there is no Python for it, uv brings one.
make_environment() {
  local found
  rm -rf -- "$1"
  found=$(find_python)
  # Debian's Python has no venv unless that was installed too.
  if [[ -n $found ]] && "$found" -m venv "$1"; then return; fi
  rm -rf -- "$1"
  if ! command -v uv >/dev/null; then
    echo "job: no Python that will do here, so uv is asked to bring $version" >&2
    python3 -m pip install --quiet --target "$cache/uv" uv
    PATH=$cache/uv/bin:$PATH
  fi
  uv venv --quiet --seed --python "$version" "$1"
}

# The sources, once for each digest, under $cache.
unpack() {
  if [[ -e $sources/train.py ]]; then return; fi
  local draft
  rm -rf -- "$cache"/draft.*  # Of who was killed: one at a time is here.
  draft=$(mktemp -d "$cache/draft.XXXXXX")
  fetch "$code_url" "$draft/code.tar.gz"
  if ! echo "$sha256  $draft/code.tar.gz" | sha256sum --check --status; then
    echo "job: $code_url is not what was submitted: its sha256 is not $sha256" >&2
    exit 2
  fi
  mkdir "$draft/code"
  tar -xzf "$draft/code.tar.gz" -C "$draft/code"
  rm -rf -- "$sources"
  mv "$draft/code" "$sources"
  rm -rf -- "$draft"
}

# Where what the sources need is, or will be.
find_environment() {
  local key
  key=$(cd "$sources" && cat requirements* | sha256sum)
  environment=$cache/env-$version-$(uname -m)-${requirements//[^a-z]/}-${key:0:16}
}

# What the sources need, once for each set of versions, under $cache.
install() {
  local files=() hashes=() file
  find_environment
  if [[ -e $environment/made ]]; then return; fi
  IFS=, read -ra files <<<"$requirements"
  make_environment "$environment"
  for file in "${files[@]}"; do
    hashes=()
    if [[ $file == *.lock ]]; then hashes=(--require-hashes); fi
    (cd "$sources" && "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
      "${hashes[@]}" -r "$file")
  done
  : >"$environment/made"
}

# 'ended', 'held' by a run whose lock has not gone stale yet, or 'due'.
state() {
  PYTHONPATH=$sources "$interpreter" -P "$sources/gated/sweep/launch/point.py" "$workdir"
}

# The processes of a host share the cache, and so may hosts.
prepare() {
  mkdir -p "$cache"
  exec 9>"$cache/lock"
  if ! flock 9; then
    echo "job: $cache cannot be locked: give --cache a folder of the host's own" >&2
    exit 2
  fi
  unpack
  if [[ -z $interpreter ]]; then install; fi
}

sources=$cache/code-$sha256
# A network that fails for a while is no reason to give a slice of machines back.
for try in {1..3}; do
  follow prepare
  if [[ $code -eq 0 || $code -eq 2 || $code -gt 128 || $try -eq 3 ]]; then break; fi
  echo "job: this failed with exit code $code, and is tried again" >&2
  sleep "${GATED_JOB_PAUSE:-60}"
done
if [[ $code -ne 0 ]]; then exit "$code"; fi
if [[ -z $interpreter ]]; then
  find_environment
  interpreter=$environment/bin/python
fi

# Hosts install at their own pace, and a slice's need not start together.
if [[ $processes != one ]]; then point+=(--start_timeout=1800); fi
case $processes in
  one) ;;
  auto) point+=(--coordinator=auto) ;;
  skypilot)
    point+=("--coordinator=$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):8476")
    point+=("--processes=$SKYPILOT_NUM_NODES" "--process=$SKYPILOT_NODE_RANK")
    ;;
  *) echo "job: --processes=$processes is not known" >&2; exit 2 ;;
esac

# On a line of its own: a workdir that cannot be read ends the job here.
now=$(state)
if [[ $now == ended ]]; then
  echo "job: $workdir has ended: nothing to do"
  exit 0
fi
cd "$sources"
# Whoever was killed may have left a lock, which other machines believe for ten minutes.
for try in {1..15}; do
  follow "$interpreter" "${point[@]}"
  if [[ $code -ne 2 || $try -eq 15 ]]; then break; fi
  now=$(state)
  if [[ $now != held ]]; then break; fi
  sleep "${GATED_JOB_PAUSE:-60}"
done
if [[ $code -eq 3 ]]; then
  echo "job: $workdir diverged, and has ended"
  code=0
fi
exit "$code"
