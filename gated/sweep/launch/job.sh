# Runs one point of a sweep on one host: fetches and checks the sweep's sources, installs
# their requirements, and runs train.py unless the point has ended.
#
#   job --code=URL --sha256=DIGEST --requirements=FILE,FILE --python=3.11 --workdir=WORKDIR
#       --processes=one|auto|skypilot [--interpreter=PATH] [--cache=DIR] -- train.py ...
#
# The exit code is that of train.py, but $finished if the point diverged ($unstable): that
# point has ended too. --interpreter names a Python with all requirements, which skips the
# installation. work.py sets the exit codes $refused, $unstable and $finished.
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
    *) echo "job: unknown argument $1" >&2; exit "$refused" ;;
  esac
  shift
done
shift
point=("$@")

forward() { kill -TERM "$1" 2>/dev/null || true; }

# Prints the path of a supported Python, preferably the sweep's version; '' if none exists.
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

# fetch URL FILE: copies an object, or a local file, to FILE.
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

# make_environment FOLDER: makes a virtual environment. Without a supported Python, uv
# installs one.
make_environment() {
  local python
  rm -rf -- "$1"
  python=$(find_python)
  # On Debian the venv module is a package of its own, so this may fail.
  if [[ -n $python ]] && "$python" -m venv "$1"; then return; fi
  rm -rf -- "$1"
  if ! command -v uv >/dev/null; then
    echo "job: no supported Python on this host: uv will install $version" >&2
    python3 -m pip install --quiet --target "$cache/uv" uv
    PATH=$cache/uv/bin:$PATH
  fi
  uv venv --quiet --seed --python "$version" "$1"
}

# Unpacks the sources below $cache, once per digest.
unpack() {
  if [[ -e $sources/train.py ]]; then return; fi
  local draft
  rm -rf -- "$cache"/draft.*  # Left by killed jobs: the lock admits one job at a time.
  draft=$(mktemp -d "$cache/draft.XXXXXX")
  fetch "$code_url" "$draft/code.tar.gz"
  if ! echo "$sha256  $draft/code.tar.gz" | sha256sum --check --status; then
    echo "job: $code_url differs from the submitted sources, with sha256 $sha256" >&2
    exit "$refused"
  fi
  mkdir "$draft/code"
  tar -xzf "$draft/code.tar.gz" -C "$draft/code"
  rm -rf -- "$sources"
  mv "$draft/code" "$sources"
  rm -rf -- "$draft"
}

# Sets $environment, the folder of the virtual environment for these requirements.
find_environment() {
  local key
  key=$(cd "$sources" && cat requirements* | sha256sum)
  environment=$cache/env-$version-$(uname -m)-${requirements//[^a-z]/}-${key:0:16}
}

# Installs the requirements below $cache, once per set of versions.
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

# Prints 'ended', 'held' (a lock exists and may belong to a live run) or 'due'.
state() {
  PYTHONPATH=$sources "$interpreter" -P "$sources/gated/sweep/launch/point.py" "$workdir"
}

# Processes of a host share the cache; hosts may share it too.
prepare() {
  mkdir -p "$cache"
  exec 9>"$cache/lock"
  if ! flock 9; then
    echo "job: cannot lock --cache=$cache: name a folder on a local disk" >&2
    exit "$refused"
  fi
  unpack
  if [[ -z $interpreter ]]; then install; fi
}

sources=$cache/code-$sha256
# A short network failure should not cost a slice of machines.
for try in {1..3}; do
  follow prepare
  if [[ $code -eq 0 || $code -eq $refused || $code -gt 128 || $try -eq 3 ]]; then break; fi
  echo "job: preparation failed with exit code $code: retrying" >&2
  sleep "${GATED_JOB_PAUSE:-60}"
done
if [[ $code -ne 0 ]]; then exit "$code"; fi
if [[ -z $interpreter ]]; then
  find_environment
  interpreter=$environment/bin/python
fi

# Hosts of a slice may start at different times and install at different speeds.
if [[ $processes != one ]]; then point+=(--start_timeout=1800); fi
case $processes in
  one) ;;
  auto) point+=(--coordinator=auto) ;;
  skypilot)
    point+=("--coordinator=$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):8476")
    point+=("--processes=$SKYPILOT_NUM_NODES" "--process=$SKYPILOT_NODE_RANK")
    ;;
  *) echo "job: --processes=$processes must be one, auto or skypilot" >&2; exit "$refused" ;;
esac

# A plain assignment, so that `set -e` ends the job if the workdir cannot be read.
now=$(state)
if [[ $now == ended ]]; then
  echo "job: $workdir has ended: nothing to do"
  exit "$finished"
fi
cd "$sources"
# A killed run may leave its lock, which other machines respect for ten minutes.
for try in {1..15}; do
  follow "$interpreter" "${point[@]}"
  if [[ $code -ne $refused || $try -eq 15 ]]; then break; fi
  now=$(state)
  if [[ $now != held ]]; then break; fi
  sleep "${GATED_JOB_PAUSE:-60}"
done
if [[ $code -eq $unstable ]]; then
  echo "job: $workdir diverged: the point has ended"
  code=$finished
fi
exit "$code"
