# The job of bench_nvme_guest.py: the kernel's target over a RAM disk, then ours over a store in tmpfs, to the kernel's host.
# Prints "CASE TARGET OPERATIONS_PER_SECOND P99_NANOSECONDS" for each "NAME:OPERATION:BYTES:DEPTH" that is an argument.
set -euo pipefail
SECONDS_EACH=$1 ROUNDS=$2 SPAN=$3; shift 3
export PYTHONPATH=/mnt/host/packages:/mnt/host/source PYTHONDONTWRITEBYTECODE=1
for module in brd nvmet-tcp nvme-tcp; do modprobe -q $module || true; done # built in under User-Mode Linux
mount -t configfs none /sys/kernel/config 2>/dev/null || true
nvmet=/sys/kernel/config/nvmet ram=/sys/kernel/config/nvmet/subsystems/ram
mkdir -p $ram/namespaces/1 $nvmet/ports/1
echo 1 >$ram/attr_allow_any_host; echo -n /dev/ram0 >$ram/namespaces/1/device_path; echo 1 >$ram/namespaces/1/enable
(cd $nvmet/ports/1; echo ipv4 >addr_adrfam; echo 127.0.0.1 >addr_traddr; echo tcp >addr_trtype; echo 4421 >addr_trsvcid
 ln -s $ram subsystems/ram)

space() { python3 -c 'from space.cli import main; main()' --data /tmp/data "$@"; }
space create --size "$SPAN" --block-size 4096 --name /device >/dev/null
space project --view nvme --path /device --listen 127.0.0.1:4420 >/tmp/ready &
until [ -s /tmp/ready ]; do sleep 0.2; done
ours=$(python3 -c 'import json; print(json.load(open("/tmp/ready"))["nqn"])')

disk() { # NQN: the disk of a connected subsystem
  local each
  for _ in $(seq 100); do
    for each in /sys/class/nvme-subsystem/*; do
      if [ "$(cat "$each/subsysnqn")" = "$1" ]; then
        for each in "$each"/nvme*n*; do [ ! -b "/dev/${each##*/}" ] || { echo "/dev/${each##*/}"; return; }; done
      fi
    done
    sleep 0.1
  done
  return 1
}
nvme connect -t tcp -a 127.0.0.1 -s 4421 -n ram -i 1 >&2; nvme connect -t tcp -a 127.0.0.1 -s 4420 -n "$ours" -i 1 >&2
disks="nvmet=$(disk ram) ours=$(disk "$ours")"
for each in $disks; do dd if=/dev/urandom of="${each#*=}" bs=1M count=$((SPAN >> 20)) oflag=direct status=none; done
for _ in $(seq "$ROUNDS"); do
  for case in "$@"; do
    IFS=: read -r name operation bytes depth <<<"$case"
    for each in $disks; do
      fio --name=x --filename="${each#*=}" --direct=1 --ioengine=libaio --rw="$operation" --bs="$bytes" \
        --iodepth="$depth" --size="$SPAN" --time_based --runtime="$SECONDS_EACH" --output-format=json >/tmp/fio
      python3 - "$name" "${each%%=*}" "$operation" <<'END'
import json, sys
job = json.load(open("/tmp/fio"))["jobs"][0]
part = job["read" if "read" in sys.argv[3] else "write"]
print(sys.argv[1], sys.argv[2], part["iops"], part["clat_ns"]["percentile"]["99.000000"], flush=True)
END
    done
  done
done
nvme disconnect-all >&2; space project stop 127.0.0.1:4420 >&2; wait
