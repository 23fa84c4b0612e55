# Shared functions of the scripts beside it; sourced by them, never run.
# shellcheck shell=bash

set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
HACK="$REPO/hack"
# Everything that outlives a run and is no part of the checkout: tools, images, registry storage, builds.
CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/stave"
mkdir -p "$CACHE"

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }
# What a run leaves out must be seen.
skipped() {
    say "=============================================================================="
    say "SKIPPED: $*"
    say "=============================================================================="
}

need_root() { [ "$(id -u)" = 0 ] || die "$1 must run as root"; }

# apt_install PACKAGE...: installs those that are missing; nothing at all when none is. APT_OPTIONS may hold options.
apt_install() {
    local missing=() package
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return 0
    say "installing with apt: ${missing[*]}"
    need_root "the installation of packages"
    # Services of the packages must not start: a registry or containerd of the node is not ours to run.
    local policy=/usr/sbin/policy-rc.d made_policy=
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        made_policy=1
    fi
    local ok=1
    export DEBIAN_FRONTEND=noninteractive
    local options=(-y --no-install-recommends "${APT_OPTIONS[@]+"${APT_OPTIONS[@]}"}")
    apt-get install "${options[@]}" "${missing[@]}" >&2 ||
        { apt-get update >&2 && apt-get install "${options[@]}" "${missing[@]}" >&2; } || ok=
    [ -z "$made_policy" ] || rm -f "$policy"
    [ -n "$ok" ] || die "apt could not install: ${missing[*]}"
}

# What hack/images needs, and the registry that serves what it builds.
IMAGE_PACKAGES=(python3 docker-registry procps util-linux gcc libc6-dev libpcre2-8-0 libssl3 libcrypt1 zlib1g)

# find_cargo: puts cargo into the PATH.
find_cargo() {
    command -v cargo >/dev/null || PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
    command -v cargo >/dev/null || die "there is no cargo: install Rust (https://rustup.rs)"
    # One a checkout: cargo takes the crates of another checkout for its own.
    export PATH CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$CACHE/target-$(printf %s "$REPO" | cksum | cut -d" " -f1)}"
}

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
    local limit=$(($1 * 20)) i
    shift
    for ((i = 0; i < limit; i++)); do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.05
    done
    return 1
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# In a process of its own, which closes the connection.
registry_answers() (
    exec 3<>"/dev/tcp/${1%:*}/${1##*:}"
    printf 'GET /v2/ HTTP/1.0\r\n\r\n' >&3
    read -r -t 2 answer <&3
    [[ $answer == HTTP/*" 200 "* ]]
)

# start_registry STORAGE_DIR: a docker-registry on a free loopback port; sets REGISTRY (host:port) and REGISTRY_PID.
start_registry() {
    local storage=$1 work attempt
    mkdir -p "$storage"
    work=$(mktemp -d)
    for attempt in 1 2 3; do
        REGISTRY="127.0.0.1:${REGISTRY_PORT:-$(free_port)}"
        cat >"$work/config.yml" <<Y
version: 0.1
log:
  level: error
  accesslog:
    disabled: true
storage:
  filesystem:
    rootdirectory: $storage
  delete:
    enabled: true
  maintenance:
    uploadpurging:
      enabled: false
http:
  addr: $REGISTRY
Y
        OTEL_TRACES_EXPORTER=none docker-registry serve "$work/config.yml" >"$work/log" 2>&1 &
        REGISTRY_PID=$!
        if wait_for 10 registry_answers "$REGISTRY"; then
            rm -rf "$work"
            return 0
        fi
        stop_registry
        say "docker-registry did not answer on $REGISTRY (attempt $attempt):"
        cat "$work/log" >&2
    done
    rm -rf "$work"
    die "no registry"
}

stop_registry() {
    [ -n "${REGISTRY_PID:-}" ] || return 0
    kill "$REGISTRY_PID" 2>/dev/null || true
    wait "$REGISTRY_PID" 2>/dev/null || true
    REGISTRY_PID=
}

# write_mirrors DIR ADDRESS HOST...: certs.d with a hosts.toml for each host, mirrored to a plain http registry.
write_mirrors() {
    local dir=$1 address=$2 host
    shift 2
    for host in "$@"; do
        mkdir -p "$dir/$host"
        cat >"$dir/$host/hosts.toml" <<T
server = "http://$address"

[host."http://$address"]
  capabilities = ["pull", "resolve"]
T
    done
}

# The cgroup hierarchies: each v1 controller's, and that of cgroup v2.
cgroup_hierarchies() {
    awk '$3 == "cgroup" || $3 == "cgroup2" { print $2 }' /proc/mounts
}

# sweep DIR CGROUP_PARENT BRIDGE: takes away what a daemon on DIR left behind, and says what that was.
# Nothing to do is the good case. Processes are found by DIR in their command line or by their cgroup.
sweep() {
    local dir=$1 parent=$2 bridge=$3 hierarchy pid cgroup mount cmdline program swept=
    [ ${#dir} -gt 8 ] && [ "$parent" != / ] || die "sweep: refusing DIR=$dir CGROUP_PARENT=$parent"
    for pid in /proc/[0-9]*; do
        pid=${pid#/proc/}
        [ "$pid" != $$ ] && [ "$pid" != "$BASHPID" ] || continue
        # A process may end while we look.
        cmdline=$(tr '\0' '\n' 2>/dev/null <"/proc/$pid/cmdline") 2>/dev/null || continue
        program=${cmdline%%$'\n'*}
        if [[ ${program##*/} == stave* && $cmdline == *"$dir/"* ]]; then
            kill -KILL "$pid" 2>/dev/null && swept+=" process:$pid"
        fi
    done
    for hierarchy in $(cgroup_hierarchies); do
        [ -d "$hierarchy$parent" ] || continue
        while read -r cgroup; do
            while read -r pid; do
                kill -KILL "$pid" 2>/dev/null && swept+=" process:$pid"
            done < <(cat "$cgroup/cgroup.procs" 2>/dev/null)
        done < <(find "$hierarchy$parent" -depth -type d)
    done
    for hierarchy in $(cgroup_hierarchies); do
        [ -d "$hierarchy$parent" ] || continue
        for _ in $(seq 40); do
            find "$hierarchy$parent" -depth -type d -exec rmdir {} \; 2>/dev/null || true
            [ -d "$hierarchy$parent" ] || break
            sleep 0.05
        done
        [ ! -d "$hierarchy$parent" ] || swept+=" cgroup:$hierarchy$parent"
    done
    while read -r mount; do
        umount -l "$mount" 2>/dev/null && swept+=" mount:$mount"
    done < <(awk -v dir="$dir/" 'index($2, dir) == 1 { print $2 }' /proc/mounts | tac)
    if [ -n "$bridge" ] && [ -e "/sys/class/net/$bridge" ]; then
        ip link delete "$bridge" 2>/dev/null || true
    fi
    nft list tables 2>/dev/null | awk -v name="stave-$bridge" '$3 == name' | while read -r _ family name; do
        nft delete table "$family" "$name" || true
    done
    [ -z "$swept" ] || say "left behind, and now taken away:$swept"
    SWEPT=$swept
}

# write_cni DIR BRIDGE SUBNET: a configuration of CNI's bridge with host ports in DIR/cni, leases in DIR/leases.
write_cni() {
    local dir=$1 bridge=$2 subnet=$3
    mkdir -p "$dir/cni"
    cat >"$dir/cni/10-bridge.conflist" <<J
{
  "cniVersion": "1.0.0",
  "name": "$bridge",
  "plugins": [
    {
      "type": "bridge", "bridge": "$bridge", "isGateway": true, "ipMasq": true, "promiscMode": false,
      "ipam": {
        "type": "host-local", "dataDir": "$dir/leases",
        "ranges": [[{"subnet": "$subnet"}]], "routes": [{"dst": "0.0.0.0/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
J
}

# start_stave DIR BIN_DIR BRIDGE SUBNET CGROUP_PARENT [MODE [RUNTIME]]: a daemon with everything of its own under DIR (certs.d of DIR
# is its registries' configuration); sets STAVE_PID and STAVE_SOCKET. Its output goes to DIR/stave.log. MODE is the
# network's: bridge, or cni with Debian's plugins. A CGROUP_PARENT that is a slice is for the systemd driver.
# RUNTIME is the program of an OCI runtime that makes all containers; "" is the built-in executor.
start_stave() {
    local dir=$1 bin=$2 bridge=$3 subnet=$4 parent=$5 mode=${6:-bridge} runtime=${7:-} driver=cgroupfs handler=
    [[ $parent != *.slice ]] || driver=systemd
    mkdir -p "$dir/certs.d"
    if [ "$mode" = cni ]; then
        CNI_RULES_BEFORE=$(cni_rules)
        write_cni "$dir" "$bridge" "$subnet"
    fi
    STAVE_SOCKET="$dir/stave.sock"
    if [ -n "$runtime" ]; then
        handler="default_runtime = \"oci\"
[runtimes.oci]
type = \"oci\"
path = \"$runtime\""
    fi
    cat >"$dir/config.toml" <<T
$handler
[cgroup]
driver = "$driver"
parent = "$parent"

[network]
mode = "$mode"

[network.bridge]
name = "$bridge"
subnets = ["$subnet"]

[network.cni]
conf_dir = "$dir/cni"
bin_dirs = ["/usr/lib/cni"]
netns_dir = "$dir/netns"

[registries]
config_dir = "$dir/certs.d"

[streaming]
address = "127.0.0.1"
port = 0
T
    "$bin/stave" serve --config "$dir/config.toml" --root "$dir/root" --state "$dir/state" --listen "$STAVE_SOCKET" \
        --log-level "${STAVE_LOG_LEVEL:-info}" >>"$dir/stave.log" 2>&1 &
    STAVE_PID=$!
    wait_for 20 test -S "$STAVE_SOCKET" || {
        tail -n 20 "$dir/stave.log" >&2
        stop_daemon "$STAVE_PID"
        die "stave serve made no socket"
    }
}

# The rules of CNI's portmap plugin, in the form of iptables-save.
cni_rules() { iptables-save -t nat 2>/dev/null | grep -E '^(-A|:).*CNI-' || true; }

# stop_containerd: ends the containerd of start_containerd, and takes away what it and its CNI plugins leave on the node.
stop_containerd() {
    [ -n "${CONTAINERD_PID:-}" ] || return 0
    stop_daemon "$CONTAINERD_PID"
    CONTAINERD_PID=
    local hierarchy
    for hierarchy in $(cgroup_hierarchies); do
        rmdir "$hierarchy/k8s.io" 2>/dev/null || true
    done
    remove_cni_rules
}

# remove_cni_rules: what CNI's portmap plugin leaves on the node when its last port is gone. Only when that came with us, as
# CNI_RULES_BEFORE says: the node may have a CNI of its own.
remove_cni_rules() {
    local rule chain
    [ -z "$CNI_RULES_BEFORE" ] || return 0
    while read -r rule; do
        # shellcheck disable=SC2086 # the words of the rule, whose comments are quoted
        eval "iptables -t nat ${rule/#-A/-D}" || true
    done < <(cni_rules | grep '^-A' || true)
    for chain in $(cni_rules | sed -n 's/^:\([^ ]*\) .*/\1/p'); do
        iptables -t nat -X "$chain" || true
    done
}

# start_containerd DIR BRIDGE SUBNET: Debian's containerd with runc and the CNI bridge, everything of its own under DIR;
# sets CONTAINERD_PID and CONTAINERD_SOCKET.
start_containerd() {
    local dir=$1 bridge=$2 subnet=$3
    mkdir -p "$dir/certs.d"
    CNI_RULES_BEFORE=$(cni_rules)
    CONTAINERD_SOCKET="$dir/containerd.sock"
    write_cni "$dir" "$bridge" "$subnet"
    # restrict_oom_score_adj: a root without CAP_SYS_RESOURCE can't lower it.
    cat >"$dir/config.toml" <<T
version = 2
root = "$dir/root"
state = "$dir/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.zfs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "$CONTAINERD_SOCKET"
[ttrpc]
  address = "$dir/containerd.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "$dir/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.k8s.io/pause:3.9"
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  enable_unprivileged_ports = true
  enable_unprivileged_icmp = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$dir/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "$dir/certs.d"
T
    # Its shims outlive us when all goes wrong, and must not hold a lock of ours (descriptor 8).
    containerd --config "$dir/config.toml" --log-level warn >>"$dir/containerd.log" 2>&1 8>&- &
    CONTAINERD_PID=$!
    wait_for 20 test -S "$CONTAINERD_SOCKET" || {
        tail -n 20 "$dir/containerd.log" >&2
        stop_daemon "$CONTAINERD_PID"
        die "containerd made no socket"
    }
}

# stop_daemon PID: SIGTERM, and SIGKILL where that has no effect within 10 s.
stop_daemon() {
    local pid=$1
    [ -n "$pid" ] || return 0
    kill "$pid" 2>/dev/null || return 0
    wait_for 10 sh -c "! kill -0 $pid 2>/dev/null || grep -q '^State:.Z' /proc/$pid/status" || {
        say "process $pid did not end on SIGTERM"
        kill -KILL "$pid" 2>/dev/null || true
    }
    wait "$pid" 2>/dev/null || true
}

# A crictl that reads no configuration of the node: crictl_at SOCKET ARGUMENTS...
crictl_at() {
    local socket=$1
    shift
    "$TOOLS/crictl" --config /dev/null --runtime-endpoint "unix://$socket" --image-endpoint "unix://$socket" "$@"
}
