# follow COMMAND... runs COMMAND and leaves its exit code in $code. On $signal, by default
# SIGTERM, it calls `forward CHILD`, which the caller defines.
follow() {
  local child='' signaled='' again
  trap 'signaled=yes; if [[ -n $child ]]; then forward "$child"; fi' "${signal:-TERM}"
  "$@" &
  child=$!
  # The signal may have come before the child started.
  if [[ -n $signaled ]]; then forward "$child"; fi
  code=0
  wait "$child" || code=$?
  # A signal ends `wait`, not the child. 127: an earlier `wait` already returned its code.
  while [[ -n $signaled ]]; do
    signaled='' again=0
    wait "$child" 2>/dev/null || again=$?
    if [[ $again -ne 127 ]]; then code=$again; fi
  done
  trap - "${signal:-TERM}"
}
