#!/usr/bin/env bash
# Runs a command beside an S3 server of its own (moto, in memory) and ends the server with it:
#
#   tests/services/s3.sh cargo nextest run -p attune-artifacts s3::
#
# Needs Python 3 with venv; moto is installed once from PyPI into target/services.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }

venv="${CARGO_TARGET_DIR:-target}/services/moto"
[ -x "$venv/bin/moto_server" ] || {
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet 'moto[server]==5.2.5'
}

log="$(mktemp)"
# moto looks whether an object is there and then writes it, with nothing between the two that keeps others out: of 280
# stores that were opened on it under load, 3 saw two winners of one name. A real server lets one win, so requests are
# answered one at a time here.
PYTHONUNBUFFERED=1 "$venv/bin/python" - >"$log" 2>&1 <<'EOF' &
import socket, threading
from collections import Counter
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

moto, one_at_a_time, seen = DomainDispatcherApplication(create_backend_app), threading.Lock(), Counter()

def hang_up(environ, *pieces):
    yield from pieces
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError

def answer(environ, start_response):
    with one_at_a_time:
        # Objects below "flaky" are served badly: failures, answers that get lost, bodies that are cut.
        if "/flaky/projects/" not in environ["PATH_INFO"]:
            return list(moto(environ, start_response))
        method, is_begin = environ["REQUEST_METHOD"], environ["QUERY_STRING"] == "uploads"
        seen[method] += 1
        seen["all"] += 1
        if seen["all"] % 5 == 0:
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return []
        body = b"".join(moto(environ, start_response))
        if method in ("PUT", "POST") and seen[method] % 3 == 0 and not is_begin:
            return hang_up(environ)
        if method == "GET" and seen[method] % 2 == 0 and len(body) > 1000:
            return hang_up(environ, body[: len(body) // 2])
        return [body]

run_simple("127.0.0.1", 0, answer, threaded=True, request_handler=MotoRequestHandler)
EOF
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; rm -f "$log"' EXIT
for _ in $(seq 300); do
  url="$(sed -n 's/.*Running on \(http:[^ ]*\).*/\1/p' "$log" | head -1)"
  [ -z "$url" ] || break
  kill -0 "$server" 2>/dev/null || { cat "$log" >&2; exit 1; }
  sleep 0.1
done
[ -n "$url" ] || { echo "the server did not say where it listens:" >&2; cat "$log" >&2; exit 1; }

export AWS_ENDPOINT_URL="$url" AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test AWS_REGION=us-east-1
python3 - "$url/attune" <<'EOF'
import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="PUT")).read()
EOF
export ATTUNE_TEST_S3="s3://attune/test"
"$@"
