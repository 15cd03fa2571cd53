#!/usr/bin/env bash
# Runs a command beside a PostgreSQL server of its own, on a socket in a temporary folder, and ends the server with it:
#
#   tests/services/postgres.sh cargo nextest run -p attune-store postgres
#   tests/services/postgres.sh --found          only says whether there are programs to do that with
#
# Needs PostgreSQL's programs (Debian: postgresql), from PATH, from Debian's folders or from ATTUNE_POSTGRES_BIN. As root it runs as
# nobody, for PostgreSQL refuses root.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }

bin="${ATTUNE_POSTGRES_BIN:-}"
for found in "$(dirname "$(command -v initdb || echo /none/initdb)")" $(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -rV); do
  [ -n "$bin" ] || { [ -x "$found/initdb" ] && [ -x "$found/pg_ctl" ] && bin="$found"; }
done
[ -x "$bin/initdb" ] || { echo "no PostgreSQL here: install it (Debian: postgresql) or set ATTUNE_POSTGRES_BIN" >&2; exit 2; }

[ "$1" != --found ] || exit 0

# Paths of sockets have at most 107 bytes.
folder="$(mktemp -d -t attune-pg.XXXXXX)"
as=()
if [ "$(id -u)" = 0 ]; then
  chown nobody "$folder"
  as=(setpriv --reuid=nobody --regid=nogroup --clear-groups --)
fi
run() { (cd "$folder" && "${as[@]}" env HOME="$folder" "$@"); }
stop() {
  run "$bin/pg_ctl" -D "$folder/data" -m immediate stop >/dev/null 2>&1 || true
  rm -rf "$folder"
}
trap stop EXIT
run "$bin/initdb" -D "$folder/data" -U attune -A trust --no-sync -E UTF8 --locale=C.UTF-8 >"$folder/log" 2>&1 ||
  { cat "$folder/log" >&2; exit 1; }
# What a power cut would lose is not what these tests are about.
run "$bin/pg_ctl" -D "$folder/data" -w -l "$folder/server.log" start \
  -o "-k $folder -c listen_addresses= -c fsync=off -c full_page_writes=off -c max_connections=400" >>"$folder/log" 2>&1 ||
  { cat "$folder/log" "$folder/server.log" >&2; exit 1; }

export ATTUNE_TEST_POSTGRES="postgres://attune@localhost/postgres?host=$folder"
"$@"
