# What every job of test_nvme_kernel.py begins with: $1 is the target's port, $2 its subsystem.
set -euo pipefail
# As grep -q, but reads all: who writes to a pipe that is closed early is killed, and pipefail takes that for a failure.
has() { grep "$@" >/dev/null; }
PORT=$1 NQN=$2
at=(-t tcp -a 10.0.2.2 -s "$PORT")
modprobe -q nvme-tcp || true # built in under User-Mode Linux

connect() { nvme connect "${at[@]}" -n "$NQN" "$@" >&2; }
disconnect() { nvme disconnect -n "$NQN" >&2; }

# device NSID: the block device of a namespace, once the kernel has it
device() {
  local each i
  for i in $(seq 100); do
    for each in /sys/block/nvme*n*; do
      if [ "$(cat "$each/nsid" 2>/dev/null)" = "$1" ] && [ -b "/dev/${each##*/}" ]; then
        echo "/dev/${each##*/}"; return 0
      fi
    done
    sleep 0.1
  done
  echo "no namespace $1" >&2; return 1
}

# ask WORD...: has the test do something outside, and prints its answer
ask() {
  echo "$*" >/mnt/host/asking; mv /mnt/host/asking /mnt/host/ask
  while [ -e /mnt/host/ask ]; do sleep 0.05; done
  cat /mnt/host/answer
}
