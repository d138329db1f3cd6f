# follow COMMAND... runs it, and leaves its exit code in $code. On $signal, SIGTERM unless
# that is said, it calls `hand_on CHILD`, which the caller has.
follow() {
  local child='' heard='' again
  trap 'heard=yes; if [[ -n $child ]]; then hand_on "$child"; fi' "${signal:-TERM}"
  "$@" &
  child=$!
  # It may have come before there was a child.
  if [[ -n $heard ]]; then hand_on "$child"; fi
  code=0
  wait "$child" || code=$?
  # A signal ends the wait, not the command; 127 says that its end was already told.
  while [[ -n $heard ]]; do
    heard='' again=0
    wait "$child" 2>/dev/null || again=$?
    if [[ $again -ne 127 ]]; then code=$again; fi
  done
  trap - "${signal:-TERM}"
}
