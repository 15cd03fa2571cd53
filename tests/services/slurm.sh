#!/usr/bin/env bash
# Runs a command beside a Slurm of its own, two nodes on this machine without systemd, in a temporary folder, and ends it with it:
#
#   tests/services/slurm.sh cargo nextest run --features failpoints -E 'test(slurm)'
#   tests/services/slurm.sh --found          only says whether there are programs to do that with
#
# Needs root, Slurm's programs and munge (Debian: slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge). A munged that runs
# is used; otherwise one is started with a key of its own.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }

PATH="$PATH:/usr/sbin"
for program in slurmctld slurmd sbatch squeue scancel sinfo munged munge unmunge; do
  command -v "$program" >/dev/null || { echo "no $program here: install slurmctld, slurmd, slurm-client and munge" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "Slurm's daemons are started as root here" >&2; exit 2; }
id slurm munge >/dev/null 2>&1 || { echo "the users slurm and munge are not there" >&2; exit 2; }

[ "$1" != --found ] || exit 0

folder="$(mktemp -d -t attune-slurm.XXXXXX)"
chmod 755 "$folder"
host="$(hostname -s)"
export SLURM_CONF="$folder/slurm.conf"
stop() {
  scancel --me >/dev/null 2>&1 || true
  for file in "$folder"/run/*.pid "$folder"/spool/*.pid "$folder"/munge/*.pid; do
    [ ! -s "$file" ] || kill "$(cat "$file")" 2>/dev/null || true
  done
  for _ in $(seq 50); do
    alive=
    for file in "$folder"/run/*.pid "$folder"/spool/*.pid; do
      [ ! -s "$file" ] || ! kill -0 "$(cat "$file")" 2>/dev/null || alive=1
    done
    [ -n "$alive" ] || break
    sleep 0.1
  done
  rm -rf "$folder"
}
trap stop EXIT

mkdir -p "$folder/state" "$folder/run" "$folder/spool" "$folder/munge"
chown slurm "$folder/state" "$folder/run"
ports=($(python3 - <<'PY'
import socket
taken = [socket.socket() for _ in range(3)]
for s in taken:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in taken))
PY
))
auth=
if ! munge -n 2>/dev/null | unmunge >/dev/null 2>&1; then
  chown munge "$folder/munge"
  head -c 1024 /dev/urandom >"$folder/munge/key"
  chown munge "$folder/munge/key"; chmod 400 "$folder/munge/key"
  runuser -u munge -- munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munge/munged.pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
  auth="AuthInfo=socket=$folder/munge/socket"
fi
cat >"$SLURM_CONF" <<CONF
ClusterName=attune
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
$auth
SlurmUser=slurm
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmctldLogFile=$folder/run/slurmctld.log
SlurmdPidFile=$folder/spool/slurmd-%n.pid
SlurmdLogFile=$folder/spool/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=2
SlurmdTimeout=30
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=2 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
logs() { tail -n 20 "$folder"/run/*.log "$folder"/spool/*.log >&2 || true; }
slurmctld -c >>"$folder/run/out" 2>&1 || { cat "$folder/run/out" >&2; logs; exit 1; }
for node in n1 n2; do slurmd -N "$node" >>"$folder/spool/out" 2>&1 || { cat "$folder/spool/out" >&2; logs; exit 1; }; done
ready=
for _ in $(seq 300); do
  [ "$(sinfo --noheader --Node --format=%T 2>/dev/null | grep -c '^idle$')" != 2 ] || { ready=1; break; }
  sleep 0.2
done
[ -n "$ready" ] || { echo "Slurm's nodes do not become idle:" >&2; sinfo >&2 || true; logs; exit 1; }

export ATTUNE_TEST_SLURM="$folder"
"$@"
