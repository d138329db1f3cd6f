# follow COMMAND... runs it, hands SIGTERM on to it, and leaves its exit code in $code.
follow() {
  local told='' again
  "$@" &
  local child=$!
  trap 'told=yes; kill -TERM "$child" 2>/dev/null || true' TERM
  code=0
  wait "$child" || code=$?
  # A signal ends the wait, not the command; 127 says that its end was already told.
  while [[ -n $told ]]; do
    told='' again=0
    wait "$child" 2>/dev/null || again=$?
    if [[ $again -ne 127 ]]; then code=$again; fi
  done
  trap - TERM
}
