#!/usr/bin/env bash
# A real Slurm of this one machine, for tests: `slurm_cluster.sh start|die|revive|stop FOLDER`, as root on Debian with
# slurm-wlm and munge installed. Callers set SLURM_CONF=FOLDER/slurm.conf. `die` is what a power cut does to a node: the
# daemon and all that it started are gone at once.
set -euo pipefail
folder=$2
export SLURM_CONF=$folder/slurm.conf

ended() { # by the number in a file, and waited for
    [ -f "$1" ] || return 0
    local number
    number=$(cat "$1")
    kill "-${2:-TERM}" "$number" 2>/dev/null || true
    for _ in $(seq 100); do kill -0 "$number" 2>/dev/null || break; sleep 0.1; done
    rm -f "$1"
}

node() { # in a namespace of its own, whose processes end at once with the first
    setsid unshare --pid --fork --kill-child --mount-proc slurmd -N node -D >>"$folder/slurmd.log" 2>&1 </dev/null &
    echo $! >"$folder/node.pid"
}

case $1 in
start)
    mkdir -p "$folder/spool" "$folder/state" /run/munge /var/log/munge
    chown munge: /run/munge /var/log/munge
    grep -qw "$(hostname)" /etc/hosts || echo "127.0.0.1 $(hostname)" >>/etc/hosts
    cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
ReturnToService=2
SlurmUser=root
SwitchType=switch/none
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdTimeout=10
KillWait=5
AuthInfo=cred_expire=5
MinJobAge=60
SlurmdSpoolDir=$folder/spool
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=node NodeHostname=$(hostname) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    munge -n >/dev/null 2>&1 || runuser -u munge -- munged # the one that is here is used
    slurmctld
    node
    for _ in $(seq 100); do sinfo -h -o %t 2>/dev/null | grep -q idle && exit 0; sleep 0.2; done
    tail -n 20 "$folder"/*.log >&2
    exit 1
    ;;
die) ended "$folder/node.pid" KILL ;;
revive) node ;;
stop)
    ended "$folder/node.pid" KILL # unshare heeds no other signal
    ended "$folder/slurmctld.pid"
    ;;
esac
